"""The commands train, encode, sample, evaluate, export and style."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from capstan.pipeline.cli import JsonOption, Load, RecipeArgument, SetOption, concluded, finish
from capstan.pipeline.errors import RecipeError
from capstan.training.style.cli import add_command as add_style

if TYPE_CHECKING:
    from capstan.recaption.config import RecaptionConfig


def _local_run(run: str) -> Path:
    from capstan.training.product import download_run

    return download_run(run) if "://" in run else Path(run)


_RUN_HELP = "A run folder, its product folder, or the URL of a finished run."
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help=_RUN_HELP, parser=_local_run)]
SamplerOption = Annotated[
    Literal["ddim", "ddpm", "dpm++", "euler"] | None,
    typer.Option(help="ddim, ddpm or dpm++ for DDPM models, dpm++ or euler for flow models. Default: from the recipe."),
]
LevelOption = Annotated[
    float | None, typer.Option("--level", min=0, max=1, help="Noise on images that are enlarged or continued, 0 to 1.")
]
MeasuresOption = Annotated[
    str | None,
    typer.Option(
        "--measures",
        help="Comma-separated metrics: oracle, world, clip, cmmd, kid, fid, consistency. "
        "Default: oracle, or world for a model without prompts.",
    ),
]
StepsOption = Annotated[int | None, typer.Option("--steps", min=1, help="Sampling steps. Default: from the recipe.")]
GuidanceOption = Annotated[
    float | None, typer.Option("--guidance", min=0, help="Guidance scale. Default: from the recipe.")
]
FeaturesOption = Annotated[
    Path | None,
    typer.Option("--features", metavar="FILE", help="Network for fid, kid, fad: .pth, .safetensors, open_nsfw."),
]
TorchScriptOption = Annotated[
    bool, typer.Option("--trust-torchscript", help="Run the program in a TorchScript file (.pt).")
]
CopiesOption = Annotated[
    str | None,
    typer.Option("--copies", metavar="FILE", help="Find copies of training images: an .onnx, or open_nsfw."),
]
CopiesThresholdOption = Annotated[
    float | None, typer.Option("--copies-threshold", min=0.01, max=1, help="Cosine of copies. Default: 0.75.")
]


def add_commands(app: typer.Typer, load: Load) -> None:
    """Add the training commands to `app`; `load` reads and validates a recipe file with its overrides."""
    _add_recipe_commands(app, load)
    _add_sample(app, load)
    _add_evaluate(app)
    _add_export(app)
    add_style(app)


def _add_recipe_commands(app: typer.Typer, load: Load) -> None:
    """Add the commands that take a recipe."""

    @app.command()
    def train(recipe: RecipeArgument, overrides: SetOption = [], as_json: JsonOption = False) -> None:  # noqa: B006
        """Train the model that train.model names.

        Resumes from the last checkpoint. A finished run is not trained again.
        """
        from capstan.training.launch import train as run

        finish(run(load(recipe, overrides)), as_json)

    @app.command()
    def encode(recipe: RecipeArgument, overrides: SetOption = [], as_json: JsonOption = False) -> None:  # noqa: B006
        """Precompute latents and text embeddings.

        Runs the frozen autoencoder over all images, and the frozen text encoder over all captions, once before
        training. Set train.data.latents: auto to train on them.
        """
        from capstan.training.encode import encode as run

        ready = load(recipe, overrides)
        finish(concluded(lambda: run(ready)), as_json)


def _add_sample(app: typer.Typer, load: Load) -> None:
    @app.command()
    def sample(
        run: RunArgument,
        prompt: Annotated[
            list[str], typer.Option("-p", "--prompt", help="Prompt; repeatable. None for a model without text.")
        ] = [],  # noqa: B006
        out: Annotated[Path, typer.Option("-o", "--out", help="PNG file for the grid.")] = Path("grid.png"),
        seed: Annotated[
            list[int], typer.Option("--seed", help="One seed per prompt, or several for a single prompt.")
        ] = [],  # noqa: B006
        negative: Annotated[str | None, typer.Option("--negative", help="Negative prompt.")] = None,
        steps: StepsOption = None,
        guidance: GuidanceOption = None,
        sampler: SamplerOption = None,
        level: LevelOption = None,
        image: Annotated[
            list[Path], typer.Option("--image", metavar="FILE", help="Image to continue as a clip; repeatable.")
        ] = [],  # noqa: B006
        motion: Annotated[
            int | None, typer.Option("--motion", min=0, max=255, help="How much such a clip moves, 0 to 255.")
        ] = None,
        size: Annotated[
            str | None, typer.Option("--size", metavar="WIDTHxHEIGHT", help="Pixels, e.g. 640x512.")
        ] = None,
        upsample: Annotated[
            bool, typer.Option("--upsample", help="Expand prompts into the style of the training captions.")
        ] = False,
        upsampler: Annotated[
            Path | None,
            typer.Option(metavar="RECIPE", help="Use this recipe's recaption engine instead of the run's."),
        ] = None,
        as_json: JsonOption = False,
    ) -> None:
        """Generate a labelled image grid from prompts."""
        from capstan.training.product import find_product

        find_product(run)  # before torch is loaded
        from capstan.training.sample import sample as draw

        drawn = draw(
            run,
            prompt,
            out,
            seeds=seed or None,
            negative=negative,
            steps=steps,
            guidance=guidance,
            sampler=sampler,
            level=level,
            size=None if size is None else _pixels(size),
            upsampler=_upsampler(load, run, upsample, upsampler),
            images=image,
            motion=motion,
        )
        finish(drawn, as_json)


def _upsampler(load: Load, run: Path, wanted: bool, recipe: Path | None) -> RecaptionConfig | None:
    """Return the engine that expands prompts: that of `recipe`, else the run's if it is wanted."""
    from capstan.recaption.config import RecaptionConfig
    from capstan.training.sample import upsampler_of

    if recipe is not None:
        return RecaptionConfig.from_recipe(load(recipe, []))
    return upsampler_of(run) if wanted else None


def _pixels(size: str) -> tuple[int, int]:
    """Return (width, height) from `640x512` or `512`."""
    sides = size.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise RecipeError("--size", f"{size!r} is not a size", "use e.g. 640x512")
    return int(sides[0]), int(sides[-1])


def _add_evaluate(app: typer.Typer) -> None:
    @app.command()
    def evaluate(
        run: RunArgument,
        count: Annotated[
            int, typer.Option("--count", min=2, help="Number of unseen scenes or held-out samples.")
        ] = 128,
        measures: MeasuresOption = None,
        clip: Annotated[
            str | None,
            typer.Option("--clip", metavar="MODEL", help="CLIP for clip and cmmd: a folder, or an open_clip name."),
        ] = None,
        pretrained: Annotated[
            str | None, typer.Option("--pretrained", help="Weights of the CLIP model: a file, or an open_clip tag.")
        ] = None,
        features: FeaturesOption = None,
        trust_torchscript: TorchScriptOption = False,
        copies: CopiesOption = None,
        copies_threshold: CopiesThresholdOption = None,
        steps: StepsOption = None,
        guidance: GuidanceOption = None,
        sampler: SamplerOption = None,
        level: LevelOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Measure a finished run on unseen data.

        Reports each metric next to its chance level and its ceiling.
        """
        from capstan.pipeline.config import CopyDetection
        from capstan.training.config.monitoring import ClipSettings, Fid, measures_in
        from capstan.training.product import find_product

        find_product(run)  # before torch is loaded
        from capstan.training.evaluate import evaluate as measure

        judge = None if clip is None else ClipSettings(model=clip, pretrained=pretrained)
        network = None if features is None else Fid(features=str(features), trust_torchscript=trust_torchscript)
        stated = {} if copies_threshold is None else {"threshold": copies_threshold}
        memory = None if copies is None else CopyDetection.model_validate({"model": copies, **stated})
        finish(
            measure(
                run,
                count=count,
                measures=None if measures is None else measures_in(measures),
                clip=judge,
                fid=network,
                copies=memory,
                steps=steps,
                guidance=guidance,
                sampler=sampler,
                level=level,
            ),
            as_json,
        )


def _add_export(app: typer.Typer) -> None:
    @app.command()
    def export(
        run: RunArgument,
        folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write the diffusers pipeline to.")],
        precision: Annotated[Literal["fp32", "fp16", "bf16"], typer.Option(help="Precision of the weights.")] = "fp32",
        sampler: SamplerOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Export a run as a diffusers pipeline.

        diffusers.DiffusionPipeline.from_pretrained opens the folder.
        """
        from capstan.training.product import find_product

        find_product(run)  # before torch is loaded
        from capstan.training.export import export as write

        finish(write(run, folder, precision=precision, sampler=sampler), as_json)
