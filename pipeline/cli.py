"""The commands of this floor; and the options and the ending that all floors' commands share.

stdout carries the summary only (with --json one JSON object, the last line); progress and logs go to stderr.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from capstan.pipeline.config import Recipe, apply_overrides, validate
from capstan.pipeline.errors import CapstanError, Quarantined, RecipeError
from capstan.pipeline.secrets import refuse_secrets
from capstan.pipeline.storage import Storage

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
SetOption = Annotated[list[str], typer.Option("--set", metavar="A.B=VALUE", help="Override a key; repeatable.")]
JsonOption = Annotated[bool, typer.Option("--json", help="End with the summary as one JSON object on stdout.")]
DatasetArgument = Annotated[str, typer.Argument(metavar="DATASET", help="A dataset's folder or URL.")]

StorageOption = Annotated[
    list[str], typer.Option("--set", metavar="storage.KEY=VALUE", help="How to reach the dataset, as in a recipe.")
]

Load = Callable[[Path, list[str]], Recipe]


def add_commands(app: typer.Typer, load: Load) -> None:
    """Add this floor's commands to `app`; `load` reads and validates a recipe file with its overrides."""
    _add_making(app, load)
    _add_takedown(app)
    _add_looking(app)


def _add_making(app: typer.Typer, load: Load) -> None:
    """Commands on a recipe."""

    @app.command()
    def build(
        recipe: RecipeArgument,
        retry: Annotated[
            str | None,
            typer.Option(
                "--retry", metavar="REASONS", help="Try rows again that failed: `failed`, or timeout,http_503…"
            ),
        ] = None,
        overrides: SetOption = [],  # noqa: B006
        as_json: JsonOption = False,
    ) -> None:
        """Rows → fetched → decoded → scored → selected → packed shards. Goes on where it stopped."""
        from capstan.pipeline.build import build as run

        finish(run(load(recipe, overrides), retry=retry), as_json)

    @app.command()
    def score(recipe: RecipeArgument, overrides: SetOption = [], as_json: JsonOption = False) -> None:  # noqa: B006
        """Add the columns of the recipe's scorers to a dataset that was built; nothing is fetched."""
        from capstan.pipeline.build import score as run

        finish(run(load(recipe, overrides)), as_json)

    @app.command()
    def select(
        recipe: RecipeArgument,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the funnel; write nothing.")] = False,
        overrides: SetOption = [],  # noqa: B006
        as_json: JsonOption = False,
    ) -> None:
        """Ask the ledger again with the recipe's conditions and repack the shards that change."""
        from capstan.pipeline.build import select as run

        finish(run(load(recipe, overrides), dry_run=dry_run), as_json)


def _add_takedown(app: typer.Typer) -> None:
    @app.command()
    def remove(
        dataset: DatasetArgument,
        keys: Annotated[str | None, typer.Option("--keys", metavar="FILE", help="Keys, one a line.")] = None,
        urls: Annotated[str | None, typer.Option("--urls", metavar="FILE", help="Addresses, one a line.")] = None,
        domains: Annotated[
            str | None, typer.Option("--domains", metavar="FILE", help="Domains, with all their subdomains.")
        ] = None,
        sha256: Annotated[
            str | None, typer.Option("--sha256", metavar="FILE", help="SHA-256 sums of source files.")
        ] = None,
        overrides: StorageOption = [],  # noqa: B006
        as_json: JsonOption = False,
    ) -> None:
        """Takedown: remove rows and all that was made of them, for good; only what holds them is rewritten."""
        from capstan.pipeline.build import remove as run
        from capstan.pipeline.config import Blocklist

        lists = Blocklist(keys=keys, urls=urls, domains=domains, sha256=sha256)
        finish(run(dataset, lists, open_dataset(dataset, overrides).options), as_json)


def _add_looking(app: typer.Typer) -> None:
    """Commands on a dataset that only look at it."""

    @app.command()
    def verify(dataset: DatasetArgument, overrides: StorageOption = [], as_json: JsonOption = False) -> None:  # noqa: B006
        """Reopen every tar, check every sum and index."""
        from capstan.pipeline.pack.verify import verify as run

        problems = run(open_dataset(dataset, overrides), progress=True)
        finish({"dataset": dataset, "ok": not problems, "problems": problems}, as_json)
        if problems:
            raise CapstanError(f"{len(problems)} problem(s) in {dataset}")

    @app.command()
    def report(
        dataset: DatasetArgument,
        samples: Annotated[
            list[str],
            typer.Option(
                "--samples",
                metavar="COLUMN=VALUE|NAME|FILE",
                help="A contact sheet of these rows instead: reason=match, a condition's name, or a file of keys; "
                "repeatable, all must hold.",
            ),
        ] = [],  # noqa: B006
        count: Annotated[int, typer.Option(min=1, max=1000, help="Rows on the contact sheet.")] = 64,
        out: Annotated[Path, typer.Option("-o", metavar="FILE", help="The contact sheet.")] = Path("samples.png"),
        overrides: StorageOption = [],  # noqa: B006
        as_json: JsonOption = False,
    ) -> None:
        """Write report.html into the dataset's folder: the funnel, what each step dropped; or a contact sheet."""
        storage = open_dataset(dataset, overrides)
        if samples:
            from capstan.pipeline.report.contact_sheet import write_sheet

            finish(write_sheet(storage, samples, out, count), as_json)
        else:
            from capstan.pipeline.report.report import write_report

            finish({"report": write_report(storage)}, as_json)


def open_dataset(dataset: str, overrides: Sequence[str], *, field: str = "DATASET") -> Storage:
    """The place of a dataset that is named by its address. Of a recipe's keys, `overrides` may give `storage`.

    Raises RecipeError for other keys, and where the place cannot be reached.
    """
    raw = apply_overrides({}, overrides)
    if unused := sorted(raw.keys() - {"storage"}):
        raise RecipeError("--set", f"{unused[0]} says nothing here", "only storage.… does, e.g. storage.endpoint_url")
    options = validate(Recipe, {"dataset": dataset, **raw}).storage
    refuse_secrets(options, "storage")
    storage = Storage(dataset, options, field=field)
    storage.check_reachable()
    return storage


def concluded(run: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """What `run` gives; where it ends with quarantined units, these, so that `finish` shows them as of any command."""
    try:
        return run()
    except Quarantined as bad:
        return {"job": bad.job, "quarantined": bad.units}


def finish(summary: Mapping[str, Any], as_json: bool) -> None:
    """Print a command's summary on stdout, as text or as the one JSON object of --json.

    Raises Quarantined (exit code 3) if the summary's `quarantined` (unit → reason) is not empty.
    """
    if as_json:
        typer.echo(json.dumps(summary, default=str))
    else:
        typer.echo("\n".join(_lines(summary)))
    if quarantined := summary.get("quarantined"):
        raise Quarantined(str(summary.get("dataset") or summary.get("job", "")), quarantined)


def _lines(summary: Mapping[str, Any], indent: str = "") -> list[str]:
    """Mappings indented, lists of mappings as rows, empty values left out."""
    lines: list[str] = []
    for name, value in summary.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines += [f"{indent}{name}:", *(f"{indent}  {_in_a_row(item)}" for item in value)]
        elif isinstance(value, list) and value:
            lines += [f"{indent}{name}:", *(f"{indent}  {item}" for item in value)]
        elif value not in ({}, [], None, ""):
            lines.append(f"{indent}{name}: {_plain(value)}")
    return lines


def _in_a_row(item: Mapping[str, Any]) -> str:
    return "  ".join(f"{_plain(value):>12}" if isinstance(value, int) else f"{value:<28}" for value in item.values())


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2f}"  # a share of 0.857 is not 0.9
    return f"{value:,}" if isinstance(value, int) else str(value)
