"""The `capstan` command: gathers every floor's commands, and turns errors into lines and exit codes.

0 done · 1 failed · 2 bad recipe, arguments or input · 3 finished with quarantined units · 130 interrupted, can go on
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer
from typer.exceptions import TyperException

import capstan.cluster.jobs.cli
import capstan.pipeline.cli
import capstan.recaption.cli
import capstan.training.cli
import capstan.training.experiment.cli
from capstan.cluster.jobs.cli import ClustersOption
from capstan.cluster.recipe import load, schema
from capstan.pipeline.cli import JsonOption, SetOption, finish
from capstan.pipeline.errors import CapstanError

INTERRUPTED: Final = 130

app = typer.Typer(
    name="capstan",
    help="Captioned web images in, a trained text-to-image model out. Every stage can stop anywhere and go on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for floor in (capstan.pipeline.cli, capstan.recaption.cli, capstan.training.cli):
    floor.add_commands(app, load)
capstan.cluster.jobs.cli.add_commands(app)
experiments = capstan.training.experiment.cli.experiments(load)
app.add_typer(experiments, name="experiment")


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Where to write recipe.yaml.")] = Path(), as_json: JsonOption = False
) -> None:
    """Write a commented starter recipe."""
    from capstan.cluster.init import write_starter

    finish({"recipe": str(write_starter(folder))}, as_json)


@app.command("schema")
def print_schema() -> None:
    """Print the recipe's JSON Schema."""
    typer.echo(json.dumps(schema(), indent=2))


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="Also check this recipe and its storage.")] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="NAME", help="Also check this target.")] = None,
    clusters: ClustersOption = None,
    overrides: SetOption = [],  # noqa: B006
    as_json: JsonOption = False,
) -> None:
    """Check the machine, the versions, the storage, a recipe and a target; say what to fix."""
    from capstan.cluster.doctor import examine, show
    from capstan.cluster.jobs.clusters_file import find_target

    findings = examine(recipe, find_target(to, clusters) if to is not None else None, overrides)
    show(findings)
    finish({"ok": all(f.ok for f in findings), "findings": [f.as_dict() for f in findings]}, as_json)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where everything is kept.")] = Path("capstan-demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps of everything: it runs, and learns nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Take the whole chain on a small captioned world that Capstan draws itself; goes on where it stopped."""
    from capstan.cluster.demo.demo import run_demo

    finish(run_demo(folder, quick=quick), as_json)


@experiments.command()
def world(
    folder: Annotated[Path, typer.Argument(help="Where everything is kept.")] = Path("capstan-experiment"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps of everything: it runs, and learns nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run the experiment on blends from nothing, on a captioned world; goes on where it stopped."""
    from capstan.cluster.demo.experiment import run_experiment

    finish(run_experiment(folder, quick=quick), as_json)


def run(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    code = _run(arguments)
    if code == INTERRUPTED:
        print("\ninterrupted: what is finished is kept; run the same command again to go on", file=sys.stderr)
    return code


def _run(arguments: list[str] | None) -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    for library in ("botocore", "aiobotocore"):  # they tell where credentials were found
        logging.getLogger(library).setLevel(logging.WARNING)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # other libraries' warnings, in worker processes
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = app(args=arguments, standalone_mode=False)
    except typer.Exit as exit_:
        return exit_.exit_code
    except TyperException as error:
        print(f"error: {error.format_message()}. Fix: see `capstan --help`", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except CapstanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return result if isinstance(result, int) else 0


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> NoReturn:
    """The console command."""
    sys.exit(run())


if __name__ == "__main__":
    main()
