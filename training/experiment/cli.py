"""The commands below `capstan experiment`; the floor above adds its own."""

from __future__ import annotations

import typer

from capstan.pipeline.cli import JsonOption, Load, RecipeArgument, SetOption, concluded, finish


def experiments(load: Load) -> typer.Typer:
    """The group of commands; `load` reads and validates a recipe file with its overrides."""
    group = typer.Typer(
        help="Train several models that differ in one thing, and say which is better.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )

    @group.command()
    def blend(recipe: RecipeArgument, overrides: SetOption = [], as_json: JsonOption = False) -> None:  # noqa: B006
        """Train one model for each caption blend of the recipe's section experiment, measure how they follow prompts,
        and write a report. Goes on where it stopped."""
        from capstan.training.experiment.run import run_blend

        ready = load(recipe, overrides)
        finish(concluded(lambda: run_blend(ready)), as_json)

    return group
