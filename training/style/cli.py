"""The command style."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from capstan.pipeline.cli import JsonOption, finish


def add_command(app: typer.Typer) -> None:
    """Add the command style to `app`."""

    @app.command()
    def style(
        content: Annotated[Path, typer.Argument(metavar="CONTENT", help="Image whose content is kept.")],
        style: Annotated[Path, typer.Argument(metavar="STYLE", help="Image whose style is taken.")],
        out: Annotated[Path, typer.Option("-o", "--out", help="PNG file for the result.")],
        vgg: Annotated[
            str | None, typer.Option("--vgg", metavar="DIR", help="Folder with torchvision's vgg16-397923af.pth.")
        ] = None,
        features: Annotated[
            str | None,
            typer.Option("--features", metavar="RUN", help="Use the encoder of this autoencoder or VQGAN instead."),
        ] = None,
        size: Annotated[int, typer.Option("--size", min=32, help="Shorter side, pixels; nothing is enlarged.")] = 256,
        steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of L-BFGS.")] = 200,
        content_weight: Annotated[
            float, typer.Option("--content-weight", min=0, help="Weight of the distance from the content.")
        ] = 0.1,
        style_weight: Annotated[
            float, typer.Option("--style-weight", min=0, help="Weight of the distance from the style.")
        ] = 1.0,
        noise: Annotated[
            float, typer.Option("--noise", min=0, max=1, help="Share of noise in the start image; 0: CONTENT itself.")
        ] = 0.0,
        seed: Annotated[
            list[int], typer.Option("--seed", help="Seed of the noise (default 0); repeatable, one file per seed.")
        ] = [],  # noqa: B006
        sheet: Annotated[
            Path | None, typer.Option("--sheet", help="Also write a sheet over weights and steps (PNG).")
        ] = None,
        as_json: JsonOption = False,
    ) -> None:
        """Redraw an image in another's style.

        Optimises the pixels until a network sees the content of one image and the style of the other.
        """
        from capstan.training.style.stylise import Settings, stylise
        from capstan.training.style.transfer import Weights

        settings = Settings(vgg, features, size, steps, Weights(content_weight, style_weight), noise)
        finish(stylise(content, style, out, settings, seed or [0], sheet), as_json)
