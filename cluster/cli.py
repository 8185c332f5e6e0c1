"""The `capstan` command: gathers every floor's commands and turns errors into lines and exit codes

0 done · 1 failed · 2 bad recipe, arguments or input · 3 finished with quarantined units · 130 interrupted
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer
from typer.exceptions import TyperException

import capstan.cluster.cost.cli
import capstan.cluster.jobs.cli
import capstan.cluster.view.cli
import capstan.pipeline.cli
import capstan.recaption.cli
import capstan.training.cli
import capstan.training.experiment.cli
from capstan.cluster.commands import describe
from capstan.cluster.interrupts import Interrupts
from capstan.cluster.jobs.cli import ClustersOption
from capstan.cluster.trackers import tracked
from capstan.pipeline import extras
from capstan.pipeline.cli import JsonOption, RecipeArgument, SetOption, concluded, finish
from capstan.pipeline.errors import CapstanError, RecipeError, first_line
from capstan.pipeline.text.completion import offer_settings, split_setting
from capstan.pipeline.text.printable import PrintableFormatter, printable

if TYPE_CHECKING:
    from capstan.pipeline.config import Recipe
    from capstan.pipeline.storage import Storage

INTERRUPTED: Final = 130
DISTRIBUTION: Final = "capstan-t2i"

QuickOption = Annotated[bool, typer.Option("--quick", help="Smoke test: run every stage for a few steps.")]

app = typer.Typer(
    name="capstan",
    help="Captioned web images in, a trained text-to-image model out. "
    "Every stage can be interrupted; run the same command again to resume it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _load(path: Path, overrides: list[str]) -> Recipe:
    from capstan.cluster.recipe import load  # here, so that --help and completion are quick

    return load(path, overrides)


def _report_of_run(storage: Storage) -> str | None:
    from capstan.training.monitoring.run_report import report_of_run

    return report_of_run(storage)


def _settings(incomplete: str) -> list[str]:
    from capstan.cluster.recipe import settings

    return settings(incomplete)


offer_settings(_settings)
capstan.pipeline.cli.add_commands(app, _load, _report_of_run, tracked)
capstan.recaption.cli.add_commands(app, _load, tracked)
capstan.training.cli.add_commands(app, _load)
capstan.cluster.jobs.cli.add_commands(app)
capstan.cluster.cost.cli.add_commands(app, _load)
capstan.cluster.view.cli.add_commands(app)
experiments = capstan.training.experiment.cli.experiments(_load)
app.add_typer(experiments, name="experiment")


def _show_version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata  # here, so that --help is quick

        typer.echo(f"capstan {importlib.metadata.version(DISTRIBUTION)}")
        raise typer.Exit


@app.callback()
def capstan_command(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options that come before the command."""


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder to write recipe.yaml to.")] = Path(),
    as_json: JsonOption = False,
) -> None:
    """Write a commented starter recipe, recipe.yaml. Never overwrites an existing one.

    Next to it, recipe.schema.json lets editors complete and check the recipe.
    """
    from capstan.cluster.init import write_starter

    finish({"recipe": str(write_starter(folder))}, as_json)


@app.command("schema")
def print_schema() -> None:
    """Print the recipe's JSON Schema, with which editors complete and check recipes."""
    from capstan.cluster.recipe import schema

    typer.echo(json.dumps(schema(), indent=2))


@app.command()
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="Also check this recipe and its storage.")
    ] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="NAME", help="Also check this target.")] = None,
    clusters: ClustersOption = None,
    overrides: SetOption = [],  # noqa: B006
    as_json: JsonOption = False,
) -> None:
    """Check the machine, package versions, storage, a recipe and a target. Each problem comes with its fix.

    Exits with 1 if there is a problem.
    """
    from capstan.cluster.doctor import examine, show
    from capstan.cluster.jobs.clusters_file import find_target

    findings = examine(recipe, find_target(to, clusters) if to is not None else None, overrides)
    show(findings)
    listed = {"findings": [f.as_dict() for f in findings]} if as_json else {}  # `show` has printed them
    finish({"ok": all(f.ok for f in findings), **listed}, as_json)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder for everything it writes.")] = Path(
        "capstan-demo"
    ),
    quick: QuickOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run every stage, from web images to a trained model, on a small captioned dataset that Capstan draws.

    Takes about 20 minutes on two cores. Resumes where it stopped.
    """
    from capstan.cluster.demo.demo import run_demo

    finish(run_demo(folder, quick=quick), as_json)


@experiments.command()
def lecture(
    recipe: RecipeArgument,
    overrides: SetOption = [],  # noqa: B006
    only: Annotated[str | None, typer.Option("--only", metavar="NAME", help="Work on one system only.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train systems on one dataset for equal time, and write a page where all draw the same prompts.

    The recipe's section lecture names them. Run the same command again to resume.
    """
    from capstan.training.lecture.run import run_lecture

    ready = _load(recipe, overrides)
    finish(concluded(lambda: run_lecture(ready, Path(recipe).parent, only)), as_json)


@experiments.command()
def world(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder for everything it writes.")] = Path(
        "capstan-experiment"
    ),
    quick: QuickOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train 3 caption blends and an upper bound, 3 seeds each, on a dataset that Capstan draws, and compare them.

    Takes about two hours on two cores. Resumes where it stopped.
    """
    from capstan.cluster.demo.experiment import run_experiment

    finish(run_experiment(folder, quick=quick), as_json)


describe(app)


def run(arguments: list[str] | None = None, interrupts: Interrupts | None = None) -> int:
    """Run one command and return its exit code. Without `interrupts`, signals do what they did before."""
    code = INTERRUPTED
    try:
        code = _run(arguments) if interrupts is None else interrupts.during(lambda: _run(arguments))
    except KeyboardInterrupt:
        pass
    except Exception as error:  # of what was interrupted, or of Ray's processes, which a terminal ends as well
        if interrupts is None or not interrupts.seen:
            raise
        _report(f"while it ended: {type(error).__name__}: {first_line(str(error))}")
    if code == INTERRUPTED:
        with contextlib.suppress(OSError):  # the terminal may be closed
            print("\ninterrupted: finished work is kept; run the same command again to resume", file=sys.stderr)
    return code


def _run(arguments: list[str] | None) -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(PrintableFormatter("%(message)s"))
    sys.excepthook = _print_traceback
    for library in ("botocore", "aiobotocore"):  # they log where credentials were found
        logging.getLogger(library).setLevel(logging.WARNING)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # other libraries' warnings, in worker processes
    try:
        result = typer.main.get_command(app)(args=arguments, standalone_mode=False)
    except typer.Exit as exit_:
        return exit_.exit_code
    except TyperException as error:
        problem, _, near = error.format_message().partition(" Did you mean ")
        hint = f"did you mean {near} " if near else ""
        _report(f"{problem.rstrip('.')}. Fix: {hint}see `capstan --help`")
        return 2
    except typer.Abort:
        raise KeyboardInterrupt from None
    except CapstanError as error:
        _report(" ".join(str(error).split()) if isinstance(error, RecipeError) else str(error))
        return error.exit_code
    except ModuleNotFoundError as error:
        if (explained := extras.explain(error, "capstan")) is None:
            raise
        _report(str(explained))
        return explained.exit_code
    except Exception as error:  # a full disk comes as any library's own error; all others are raised again
        from capstan.pipeline.storage.local import disk_error  # here, so that --help is quick

        if (full := disk_error(error)) is None:
            raise
        _report(str(full))
        return full.exit_code
    return result if isinstance(result, int) else 0


def _report(message: str) -> None:
    print(printable(f"error: {message}"), file=sys.stderr)


def _print_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    print(printable("".join(traceback.format_exception(kind, error, where))), end="", file=sys.stderr)


def main() -> NoReturn:
    """Run the console command, or complete one."""
    interrupts = Interrupts()
    split_setting(os.environ)
    code = [1]  # of a traceback
    atexit.register(_end_at_once, code)  # registered first, so that it runs last
    code[0] = run(interrupts=interrupts)
    sys.exit(code[0])


def _end_at_once(code: list[int]) -> None:
    """End without the clean-up of C++ libraries: Arrow's waits forever for a thread of its own that reads from a bucket
    through Python, which has ended by then.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code[0])


if __name__ == "__main__":
    main()
