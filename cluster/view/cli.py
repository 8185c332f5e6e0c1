"""The command `capstan view`"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Annotated

import typer

from capstan.pipeline.cli import JsonOption, StorageOption, open_dataset


def add_commands(app: typer.Typer) -> None:
    """Add `view` to `app`."""

    @app.command()
    def view(
        dataset: Annotated[
            str, typer.Argument(metavar="DATASET|RUN|FOLDER", help="A dataset, a training run, or a folder of runs.")
        ],
        port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0: any free one.")] = 0,
        browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
        read_only: Annotated[
            bool, typer.Option("--read-only", help="Write nothing: no verdicts, votes, edits.")
        ] = False,
        overrides: StorageOption = [],  # noqa: B006
        as_json: JsonOption = False,
    ) -> None:
        """Look at a dataset or runs in a browser.

        Of a dataset: kept, rejected, duplicate and failed rows with their reasons, all caption layers to compare, vote
        on and edit, groups of duplicates, what other thresholds would keep, and reviews. Of training runs: a table,
        curves, and all sample grids at one step. Listens on this machine only. Ctrl-C ends it.
        """
        import asyncio  # here, so that --help is quick

        from capstan.cluster.view.server import serve

        storage = open_dataset(dataset, overrides)

        def ready(address: str) -> None:
            if as_json:
                print(json.dumps({"url": address}), flush=True)
            else:
                print(f"{dataset} is at {address}\nCtrl-C ends it.", file=sys.stderr)

        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(serve(storage, port, browser=browser, ready=ready, read_only=read_only, options=overrides))
