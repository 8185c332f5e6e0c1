"""The commands recaption, captions import, captions export and captions diff."""

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
    concluded,
    finish,
    open_dataset,
)
from capstan.pipeline.config import Recipe

LayerHelp = "A layer's id, or `latest`."


def add_commands(app: typer.Typer, load: Load) -> None:
    """Add this floor's commands to `app`; `load` reads and validates a recipe file with its overrides."""

    @app.command()
    def recaption(
        recipe: RecipeArgument,
        plan: Annotated[
            bool, typer.Option("--plan", help="Show what is new, stale and reused, and an ETA; write nothing.")
        ] = False,
        overrides: SetOption = [],  # noqa: B006
        as_json: JsonOption = False,
    ) -> None:
        """Add a layer of captions beside the shards, or complete it for new data. Goes on where it stopped."""
        from capstan.recaption import job

        run, ready = (job.plan if plan else job.recaption), load(recipe, overrides)
        finish(concluded(lambda: run(ready)), as_json)

    captions = typer.Typer(
        help="Take in caption layers, compare them, and write them into tars.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    app.add_typer(captions, name="captions")
    _add_import_and_export(captions)
    _add_diff(captions)


def _add_import_and_export(captions: typer.Typer) -> None:
    @captions.command("import")
    def import_(
        dataset: DatasetArgument,
        layer: Annotated[str, typer.Argument(metavar="LAYER", help="A name for the layer.")],
        file: Annotated[
            Path, typer.Argument(metavar="FILE", help="JSON Lines: key, url or image; and a field a slot.")
        ],
        slot: Annotated[
            list[str],
            typer.Option(
                "--slot",
                metavar="SLOT[=FIELD]",
                help="A slot, and the field with its text; repeatable. Default: short, descriptive.",
            ),
        ] = [],  # noqa: B006
        overrides: StorageOption = [],  # noqa: B006
        as_json: JsonOption = False,
    ) -> None:
        """Make a layer of captions that people wrote."""
        from capstan.recaption import import_captions

        slots = import_captions.fields(slot)
        finish(import_captions.write(open_dataset(dataset, overrides), layer, file, slots), as_json)

    @captions.command()
    def export(
        dataset: DatasetArgument,
        layer: Annotated[str, typer.Argument(metavar="LAYER", help=LayerHelp)],
        dest: Annotated[str, typer.Argument(metavar="DEST", help="The copy's folder or URL.")],
        slot: Annotated[str, typer.Option("--slot", help="Whose text KEY.txt becomes.")] = "descriptive",
        overrides: StorageOption = [],  # noqa: B006
        as_json: JsonOption = False,
    ) -> None:
        """Copy a dataset with a layer's text in the tars. Goes on where it stopped."""
        from capstan.recaption.export import export as run
        from capstan.recaption.store import find_layer

        source, target = open_dataset(dataset, overrides), open_dataset(dest, overrides, field="DEST")
        layer, resources = find_layer(source, layer), Recipe(dataset=dest).resources
        finish(concluded(lambda: run(source, layer, target, slot=slot, resources=resources)), as_json)


def _add_diff(captions: typer.Typer) -> None:
    @captions.command()
    def diff(
        dataset: DatasetArgument,
        a: Annotated[str, typer.Argument(metavar="A", help=f"{LayerHelp} Or `original`; or LAYER:SLOT.")],
        b: Annotated[str, typer.Argument(metavar="B", help="As A.")],
        slot: Annotated[str, typer.Option("--slot", help="Slot of the layers that name none.")] = "descriptive",
        model: Annotated[
            str, typer.Option("--model", help="A CLIP of open_clip by name, or a folder that holds one.")
        ] = "ViT-B-32",
        pretrained: Annotated[
            str, typer.Option("--pretrained", help="open_clip's tag or a checkpoint file, for a --model by name.")
        ] = "laion2b_s34b_b79k",
        sample: Annotated[int, typer.Option("--sample", min=2, help="Images to compare.")] = 1000,
        overrides: StorageOption = [],  # noqa: B006
        as_json: JsonOption = False,
    ) -> None:
        """Compare two caption layers: CLIP score, self-retrieval, length, openers, flags; where they disagree most."""
        from capstan.recaption.compare.clip import Clip
        from capstan.recaption.compare.compare import compare

        place = open_dataset(dataset, overrides)
        finish(compare(place, a, b, slot=slot, clip=Clip(model, pretrained), sample=sample), as_json)
