"""The command recaption."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli import JsonOption, Load, RecipeArgument, SetOption, finish


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
        from recaption import job

        run = job.plan if plan else job.recaption
        finish(run(load(recipe, overrides)), as_json)
