"""Commands recaption, captions import, captions export, captions diff"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from capstan.pipeline.cli import (
    DatasetArgument,
    JsonOption,
    Load,
    RecipeArgument,
    SetOption,
    StorageOption,
    Tracked,
    concluded,
    finish,
    open_dataset,
    untracked,
)
from capstan.pipeline.text.completion import complete_layer

LayerHelp = "Layer id, or `latest`."


def add_commands(app: typer.Typer, load: Load, tracked: Tracked = untracked) -> None:
    """Add this floor's commands to `app`; `load` reads and validates a recipe file with its overrides.

    `tracked` runs a command and logs its summary where the recipe says.
    """

    @app.command()
    def recaption(
        recipe: RecipeArgument,
        plan: Annotated[
            bool, typer.Option("--plan", help="Show new, stale and reused counts and an ETA; write nothing.")
        ] = False,
        overrides: SetOption = [],  # noqa: B006
        as_json: JsonOption = False,
    ) -> None:
        """Write or complete a caption layer.

        A layer is kept next to the shards, which do not change. New data costs only the new images. An interrupted
        run resumes.
        """
        from capstan.recaption import job

        run, ready = (job.plan if plan else job.recaption), load(recipe, overrides)
        note = untracked if plan else tracked
        summary = note("recaption", ready, lambda: concluded(lambda: run(ready)))
        finish(summary, as_json)
        if not plan and (failure := job.failure_of(summary)):
            raise failure

    captions = typer.Typer(
        help="Import, compare and export caption layers.", no_args_is_help=True, rich_markup_mode=None
    )
    app.add_typer(captions, name="captions")
    _add_import_and_export(captions)
    _add_diff(captions)


def _add_import_and_export(captions: typer.Typer) -> None:
    @captions.command("import")
    def import_(
        dataset: DatasetArgument,
        layer: Annotated[str, typer.Argument(metavar="LAYER", help="Name of the new layer.")],
        file: Annotated[
            Path,
            typer.Argument(
                metavar="FILE",
                help="JSON Lines file. Each line has one of `key`, `url` or `image`, plus one field per slot.",
            ),
        ],
        slot: Annotated[
            list[str],
            typer.Option(
                "--slot",
                metavar="SLOT[=FIELD]",
                help="Slot, and the field with its text. Repeatable. Default: short, descriptive.",
            ),
        ] = [],  # noqa: B006
        over: Annotated[
            str | None,
            typer.Option("--over", metavar="LAYER", help="Layer to correct: what FILE does not name keeps its text."),
        ] = None,
        overrides: StorageOption = [],  # noqa: B006
        as_json: JsonOption = False,
    ) -> None:
        """Import captions from a JSON Lines file."""
        from capstan.recaption import import_captions

        slots = import_captions.fields(slot)
        finish(import_captions.write(open_dataset(dataset, overrides), layer, file, slots, over), as_json)

    @captions.command()
    def export(
        dataset: DatasetArgument,
        layer: Annotated[str, typer.Argument(metavar="LAYER", help=LayerHelp, autocompletion=complete_layer)],
        dest: Annotated[str, typer.Argument(metavar="DEST", help="Folder or URL of the copy.")],
        slot: Annotated[str, typer.Option("--slot", help="Caption slot to write to KEY.txt.")] = "descriptive",
        overrides: StorageOption = [],  # noqa: B006
        as_json: JsonOption = False,
    ) -> None:
        """Copy a dataset with a layer's captions.

        The copy's tars hold the layer's text. An interrupted export resumes.
        """
        from capstan.pipeline.config import Recipe
        from capstan.recaption.export import export as run
        from capstan.recaption.store import find_layer

        source, target = open_dataset(dataset, overrides), open_dataset(dest, overrides, field="DEST")
        layer, resources = find_layer(source, layer), Recipe(dataset=dest).resources
        finish(concluded(lambda: run(source, layer, target, slot=slot, resources=resources)), as_json)


def _add_diff(captions: typer.Typer) -> None:
    @captions.command()
    def diff(
        dataset: DatasetArgument,
        a: Annotated[
            str,
            typer.Argument(
                metavar="A", help=f"{LayerHelp} Or `original`; or LAYER:SLOT.", autocompletion=complete_layer
            ),
        ],
        b: Annotated[str, typer.Argument(metavar="B", help="As A.", autocompletion=complete_layer)],
        slot: Annotated[str, typer.Option("--slot", help="Slot for layers named without one.")] = "descriptive",
        model: Annotated[str, typer.Option("--model", help="Name of an open_clip CLIP, or a folder.")] = "ViT-B-32",
        pretrained: Annotated[
            str, typer.Option("--pretrained", help="open_clip tag or checkpoint file for a --model given by name.")
        ] = "laion2b_s34b_b79k",
        sample: Annotated[int, typer.Option("--sample", min=2, help="Number of images to compare.")] = 1000,
        overrides: StorageOption = [],  # noqa: B006
        as_json: JsonOption = False,
    ) -> None:
        """Compare two caption layers.

        Compares CLIP score, self-retrieval, length, openers and flags, and shows the images on which the layers differ
        most.
        """
        from capstan.recaption.compare.clip import Clip
        from capstan.recaption.compare.compare import compare, sides_of

        storage = open_dataset(dataset, overrides)
        sides_of(storage, a, b, slot)  # before the CLIP is loaded
        finish(compare(storage, a, b, slot=slot, clip=Clip(model, pretrained), sample=sample), as_json)
