"""Command `capstan experiment blend`; cluster/ adds `world` to the same group."""

from __future__ import annotations

import typer

from capstan.pipeline.cli import JsonOption, Load, RecipeArgument, SetOption, concluded, finish


def experiments(load: Load) -> typer.Typer:
    """Return the group `experiment`; `load` reads and validates a recipe file with its overrides."""
    group = typer.Typer(
        help="Compare models that differ in one thing.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )

    @group.command()
    def blend(recipe: RecipeArgument, overrides: SetOption = [], as_json: JsonOption = False) -> None:  # noqa: B006
        """Compare caption blends by prompt following.

        Trains one model per arm and seed of the recipe's section experiment, measures prompt following and writes a
        report. Run the same command again to resume.
        """
        from capstan.training.experiment.run import run_blend

        ready = load(recipe, overrides)
        finish(concluded(lambda: run_blend(ready)), as_json)

    return group
