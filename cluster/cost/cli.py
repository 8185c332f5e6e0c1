"""The command `capstan plan-cost`"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from capstan.pipeline.cli import JsonOption, Load, RecipeArgument, SetOption, finish
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.text.printable import printable


def add_commands(app: typer.Typer, load: Load) -> None:
    """Add `plan-cost` to `app`; `load` reads and validates a recipe file with its overrides."""

    @app.command("plan-cost")
    def plan_cost(
        recipe: RecipeArgument,
        rows: Annotated[
            int | None, typer.Option(min=1, help="Rows of the source. Default: counted in Parquet files.")
        ] = None,
        cores: Annotated[int, typer.Option(min=1, help="CPU cores of the cluster.")] = 64,
        gpus: Annotated[int, typer.Option(min=0, help="GPUs of the cluster.")] = 8,
        rates: Annotated[
            list[str], typer.Option("--rate", metavar="NAME=VALUE", help="Your own figure, e.g. captions=25.")
        ] = [],  # noqa: B006
        prices: Annotated[
            list[str], typer.Option("--price", metavar="NAME=VALUE", help="Your own price, e.g. gpu_hour=2.5.")
        ] = [],  # noqa: B006
        overrides: SetOption = [],  # noqa: B006
        as_json: JsonOption = False,
    ) -> None:
        """Estimate hours, storage, requests and dollars of every stage.

        Nothing is run or fetched. Each stage says whether its figures were measured, published, extrapolated or
        assumed; docs/sizing.md explains them.
        """
        from capstan.cluster.cost.plan import plan  # here, so that --help is quick
        from capstan.cluster.cost.table import lines

        stated, paid = _numbers(rates, "--rate"), _numbers(prices, "--price")
        planned = plan(load(recipe, overrides), rows=rows, cores=cores, gpus=gpus, rates=stated, prices=paid)
        summary = planned.summary()
        if as_json:
            finish(summary, as_json)
        else:
            typer.echo(printable("\n".join(lines(summary))))


def _numbers(settings: Sequence[str], option: str) -> dict[str, float]:
    """Return the numbers of settings such as `captions=25`. Raises RecipeError for others."""
    found = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        try:
            found[name] = float(text)
        except ValueError:
            raise RecipeError(option, f"{setting} is no NAME=NUMBER", "write e.g. captions=25") from None
    return found
