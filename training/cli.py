"""The commands train, encode, sample, evaluate and export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from capstan.pipeline.cli import JsonOption, Load, RecipeArgument, SetOption, concluded, finish
from capstan.pipeline.errors import RecipeError


def _on_this_machine(run: str) -> Path:
    from capstan.training.product import fetched

    return fetched(run) if "://" in run else Path(run)


_RUN_HELP = "A run folder, or the product in it; or a finished run in a bucket."
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help=_RUN_HELP, parser=_on_this_machine)]
SamplerOption = Annotated[
    Literal["ddim", "dpm++", "euler"] | None,
    typer.Option(help="ddim or dpm++ for a model that learnt DDPM, dpm++ or euler for flow; else the recipe's."),
]


def add_commands(app: typer.Typer, load: Load) -> None:
    """Add this floor's commands to `app`; `load` reads and validates a recipe file with its overrides."""
    _add_fitting(app, load)
    _add_drawing(app, load)
    _add_leaving(app)


def _add_fitting(app: typer.Typer, load: Load) -> None:
    """Commands on a recipe."""

    @app.command()
    def train(recipe: RecipeArgument, overrides: SetOption = [], as_json: JsonOption = False) -> None:  # noqa: B006
        """Fit what the recipe's train.model names. Goes on from its last checkpoint; a finished run is left alone."""
        from capstan.training.launch import train as run

        finish(run(load(recipe, overrides)), as_json)

    @app.command()
    def encode(recipe: RecipeArgument, overrides: SetOption = [], as_json: JsonOption = False) -> None:  # noqa: B006
        """Run the frozen models of train.diffusion over all images, and captions, once, ahead of training."""
        from capstan.training.encode import encode as run

        ready = load(recipe, overrides)
        finish(concluded(lambda: run(ready)), as_json)


def _add_drawing(app: typer.Typer, load: Load) -> None:
    @app.command()
    def sample(
        run: RunArgument,
        prompt: Annotated[list[str], typer.Option("-p", "--prompt", help="What to draw; repeatable.")],
        out: Annotated[Path, typer.Option("-o", "--out", help="Where the grid goes.")] = Path("grid.png"),
        seed: Annotated[list[int], typer.Option("--seed", help="One a prompt, or several for one prompt.")] = [],  # noqa: B006
        negative: Annotated[str | None, typer.Option("--negative", help="What not to draw.")] = None,
        steps: Annotated[int | None, typer.Option("--steps", min=1, help="Sampling steps.")] = None,
        guidance: Annotated[float | None, typer.Option("--guidance", min=0, help="Guidance scale.")] = None,
        sampler: SamplerOption = None,
        size: Annotated[
            str | None, typer.Option("--size", metavar="WIDTHxHEIGHT", help="Pixels, e.g. 640x512.")
        ] = None,
        upsample: Annotated[
            bool, typer.Option("--upsample", help="Expand prompts into the style of the captions trained on.")
        ] = False,
        upsampler: Annotated[
            Path | None,
            typer.Option(metavar="RECIPE", help="Expand with its recaption engine, in place of the run's own."),
        ] = None,
        as_json: JsonOption = False,
    ) -> None:
        """Draw a labelled grid of images from prompts."""
        from capstan.recaption.config import RecaptionConfig
        from capstan.training.sample import sample as draw
        from capstan.training.sample import upsampler_of

        seeds, writer = seed or None, None
        if upsampler is not None:
            writer = RecaptionConfig.from_recipe(load(upsampler, []))
        elif upsample:
            writer = upsampler_of(run)
        drawn = draw(
            run,
            prompt,
            out,
            seeds=seeds,
            negative=negative,
            steps=steps,
            guidance=guidance,
            sampler=sampler,
            size=None if size is None else _pixels(size),
            upsampler=writer,
        )
        finish(drawn, as_json)


def _pixels(size: str) -> tuple[int, int]:
    """`640x512` or `512` → width and height."""
    sides = size.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise RecipeError("--size", f"{size!r} is no size", "write e.g. 640x512")
    return int(sides[0]), int(sides[-1])


def _add_leaving(app: typer.Typer) -> None:
    """Commands on a finished run."""

    @app.command()
    def evaluate(
        run: RunArgument,
        count: Annotated[int, typer.Option("--count", min=2, help="How many unseen scenes or held-out samples.")] = 128,
        measures: Annotated[
            str, typer.Option("--measures", help="Of images from prompts: oracle, clip, fid; by commas.")
        ] = "oracle",
        clip: Annotated[
            str | None, typer.Option("--clip", metavar="MODEL", help="A CLIP: a folder, or a name of open_clip.")
        ] = None,
        pretrained: Annotated[
            str | None, typer.Option("--pretrained", help="Its weights: a file, or a tag of open_clip.")
        ] = None,
        features: Annotated[
            Path | None, typer.Option("--features", metavar="FILE", help="The network of fid: .pth or TorchScript .pt.")
        ] = None,
        as_json: JsonOption = False,
    ) -> None:
        """Measure a run on scenes or samples that it has not seen, each measure beside its chance level."""
        from capstan.training.config.monitoring import ClipSettings, Fid, measures_in
        from capstan.training.evaluate import evaluate as measure

        judge = None if clip is None else ClipSettings(model=clip, pretrained=pretrained)
        network = None if features is None else Fid(features=str(features))
        finish(measure(run, count=count, measures=measures_in(measures), clip=judge, fid=network), as_json)

    @app.command()
    def export(
        run: RunArgument,
        folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the diffusers folder goes.")],
        precision: Annotated[Literal["fp32", "fp16", "bf16"], typer.Option(help="Of the weights.")] = "fp32",
        sampler: SamplerOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Write a folder that diffusers.DiffusionPipeline.from_pretrained opens."""
        from capstan.training.export import export as write

        finish(write(run, folder, precision=precision, sampler=sampler), as_json)
