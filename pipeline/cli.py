"""Commands build, cut, score, select, remove, publish, verify, report; shared CLI options

stdout carries only the summary (with --json, one JSON object on the last line). Progress and logs go to stderr.

What the commands need is imported when they run, so that `--help` and completion are quick.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capstan.pipeline.errors import CapstanError, Quarantined, RecipeError
from capstan.pipeline.secrets import refuse_secrets
from capstan.pipeline.text.completion import complete_reasons, complete_rows, complete_setting
from capstan.pipeline.text.printable import printable

if TYPE_CHECKING:
    from capstan.pipeline.config import Recipe
    from capstan.pipeline.storage import Storage

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="A.B=VALUE", help="Override a recipe key. Repeatable.", autocompletion=complete_setting
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object on stdout.")]
DatasetArgument = Annotated[str, typer.Argument(metavar="DATASET", help="Dataset folder or URL.")]

StorageOption = Annotated[
    list[str], typer.Option("--set", metavar="storage.KEY=VALUE", help="Storage option, as in a recipe. Repeatable.")
]

Load = Callable[[Path, list[str]], "Recipe"]
ReportOfRun = Callable[["Storage"], str | None]
Summary = Mapping[str, Any]
Tracked = Callable[[str, "Recipe", Callable[[], Summary]], Summary]  # command, its recipe, what it does → its summary


def untracked(command: str, recipe: Recipe, run: Callable[[], Summary]) -> Summary:
    """Return the summary of a command, and log it nowhere."""
    return run()


def add_commands(
    app: typer.Typer, load: Load, report_of_run: ReportOfRun | None = None, tracked: Tracked = untracked
) -> None:
    """Add this floor's commands to `app`; `load` reads and validates a recipe file with its overrides.

    `report_of_run` writes the report of a training run, which is a matter of a higher floor; None if there is no run.
    `tracked` runs a command and logs its summary where the recipe says.
    """
    _add_recipe_commands(app, load, tracked)
    _add_cut(app, load, tracked)
    _add_takedown(app)
    _add_publish(app)
    _add_verify(app)
    _add_report(app, report_of_run or (lambda storage: None))


def _add_recipe_commands(app: typer.Typer, load: Load, tracked: Tracked) -> None:
    @app.command()
    def build(
        recipe: RecipeArgument,
        retry: Annotated[
            str | None,
            typer.Option(
                "--retry",
                metavar="REASONS",
                help="Retry failed rows: `failed` for all, or reasons such as timeout,http_503.",
                autocompletion=complete_reasons,
            ),
        ] = None,
        overrides: SetOption = [],  # noqa: B006
        as_json: JsonOption = False,
    ) -> None:
        """Build the dataset of a recipe.

        Fetches, decodes, scores and selects the rows, then packs shards. Resumes where it stopped.
        """
        from capstan.pipeline.build import build as run

        ready = load(recipe, overrides)
        finish(tracked("build", ready, lambda: run(ready, retry=retry)), as_json)

    @app.command()
    def score(recipe: RecipeArgument, overrides: SetOption = [], as_json: JsonOption = False) -> None:  # noqa: B006
        """Add score columns to a built dataset.

        Runs the scorers of the recipe's section `score`. Nothing is fetched.
        """
        from capstan.pipeline.build import score as run

        ready = load(recipe, overrides)
        finish(tracked("score", ready, lambda: run(ready)), as_json)

    @app.command()
    def select(
        recipe: RecipeArgument,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the funnel; write nothing.")] = False,
        overrides: SetOption = [],  # noqa: B006
        as_json: JsonOption = False,
    ) -> None:
        """Apply the recipe's conditions again.

        Repacks only the shards that change.
        """
        from capstan.pipeline.build import select as run

        ready = load(recipe, overrides)
        note = untracked if dry_run else tracked
        finish(note("select", ready, lambda: run(ready, dry_run=dry_run)), as_json)


def _add_cut(app: typer.Typer, load: Load, tracked: Tracked) -> None:
    @app.command()
    def cut(
        recipe: RecipeArgument,
        retry: Annotated[
            str | None,
            typer.Option(
                "--retry",
                metavar="REASONS",
                help="Cut the units again that have videos with these failures: `failed` for all, or a list.",
                autocompletion=complete_reasons,
            ),
        ] = None,
        overrides: SetOption = [],  # noqa: B006
        as_json: JsonOption = False,
    ) -> None:
        """Cut videos into clips.

        Fetches each video once and writes a WebDataset of clips, and a ledger with one row per video.
        """
        from capstan.pipeline.clips.cut import cut as run

        ready = load(recipe, overrides)
        finish(tracked("cut", ready, lambda: run(ready, retry=retry)), as_json)


def _add_takedown(app: typer.Typer) -> None:
    @app.command()
    def remove(
        dataset: DatasetArgument,
        keys: Annotated[str | None, typer.Option("--keys", metavar="FILE", help="File of keys, one per line.")] = None,
        urls: Annotated[str | None, typer.Option("--urls", metavar="FILE", help="File of URLs, one per line.")] = None,
        domains: Annotated[
            str | None, typer.Option("--domains", metavar="FILE", help="File of domains; subdomains are included.")
        ] = None,
        sha256: Annotated[
            str | None, typer.Option("--sha256", metavar="FILE", help="File of SHA-256 sums of source files.")
        ] = None,
        overrides: StorageOption = [],  # noqa: B006
        as_json: JsonOption = False,
    ) -> None:
        """Remove rows for good (takedown).

        Removes the rows and everything made from them. Rewrites only the files that hold them.
        """
        from capstan.pipeline.build import remove as run
        from capstan.pipeline.config import Blocklist

        lists = Blocklist(keys=keys, urls=urls, domains=domains, sha256=sha256)
        finish(run(dataset, lists, open_dataset(dataset, overrides).options), as_json)


def _add_publish(app: typer.Typer) -> None:
    @app.command()
    def publish(
        dataset: DatasetArgument,
        dest: Annotated[
            str, typer.Argument(metavar="DEST", help="hf://datasets/USER/NAME[@BRANCH], a folder, or a URL.")
        ],
        layer: Annotated[
            list[str], typer.Option("--layer", metavar="LAYER", help="Caption layer to add, or `all`. Repeatable.")
        ] = [],  # noqa: B006
        ledger: Annotated[
            bool, typer.Option("--ledger", help="Add the ledger: URLs and reasons of rows that were not kept.")
        ] = False,
        contact: Annotated[
            str, typer.Option("--contact", metavar="TEXT", help="Whom the card names for removal: an address or URL.")
        ] = "",
        create: Annotated[bool, typer.Option("--create", help="Create the dataset on the Hub if needed.")] = False,
        private: Annotated[bool, typer.Option("--private", help="Create it as private.")] = False,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent; write nothing.")] = False,
        overrides: StorageOption = [],  # noqa: B006
        as_json: JsonOption = False,
    ) -> None:
        """Publish a dataset with its card.

        Sends what the manifest lists and what DEST does not have yet. Readers see it whole or not at all.
        """
        from capstan.pipeline.publish.folder import Folder
        from capstan.pipeline.publish.hub import PREFIX, Hub
        from capstan.pipeline.publish.job import Destination
        from capstan.pipeline.publish.job import publish as run

        source = open_dataset(dataset, overrides)
        target: Destination
        if dest.startswith(PREFIX):
            target = Hub(dest, create=create, private=private)
        elif create or private:
            raise RecipeError("--create" if create else "--private", "is for the Hub only", "remove it")
        else:
            target = Folder(open_dataset(dest, overrides, field="DEST"))
        finish(run(source, target, dest, layers=layer, ledger=ledger, contact=contact, dry_run=dry_run), as_json)


def _add_verify(app: typer.Typer) -> None:
    @app.command()
    def verify(
        dataset: DatasetArgument,
        repair: Annotated[
            bool, typer.Option("--repair", help="Rebuild missing and damaged files, and list what is left.")
        ] = False,
        overrides: StorageOption = [],  # noqa: B006
        as_json: JsonOption = False,
    ) -> None:
        """Check every tar, checksum and index.

        --repair rebuilds from shards, staged files and the source.
        """
        from capstan.pipeline.pack.verify import verify as run

        storage = open_dataset(dataset, overrides)
        if repair:
            from capstan.pipeline.build import repair as run_repair

            summary = run_repair(dataset, storage.options)
        else:
            problems = run(storage, progress=True)
            summary = {"dataset": dataset, "ok": not problems, "problems": problems}
        finish(summary, as_json)
        if not summary["ok"]:
            raise CapstanError(f"{len(summary['problems'])} problem(s) in {dataset}")


def _add_report(app: typer.Typer, report_of_run: ReportOfRun) -> None:
    @app.command()
    def report(
        dataset: Annotated[str, typer.Argument(metavar="DATASET|RUN", help="Folder or URL of a dataset or a run.")],
        samples: Annotated[
            list[str],
            typer.Option(
                "--samples",
                metavar="COLUMN=VALUE|NAME|FILE",
                help="Write a contact sheet of these rows instead: reason=match, a condition's name, or a file of "
                "keys. Repeatable; all must match.",
                autocompletion=complete_rows,
            ),
        ] = [],  # noqa: B006
        count: Annotated[int, typer.Option(min=1, max=1000, help="Number of rows on the contact sheet.")] = 64,
        out: Annotated[Path, typer.Option("-o", metavar="FILE", help="Where to write the contact sheet.")] = Path(
            "samples.png"
        ),
        overrides: StorageOption = [],  # noqa: B006
        as_json: JsonOption = False,
    ) -> None:
        """Write an HTML report or a contact sheet.

        The report is DATASET/report.html: the funnel, examples of what each step dropped, histograms. Of a training
        run it is RUN/report.html: curves, samples over steps, evaluations, recipe, versions and cost.
        """
        storage = open_dataset(dataset, overrides)
        if samples:
            from capstan.pipeline.report.contact_sheet import write_sheet

            finish(write_sheet(storage, samples, out, count), as_json)
        else:
            from capstan.pipeline.report.report import write_report

            finish({"report": report_of_run(storage) or write_report(storage)}, as_json)


def open_dataset(dataset: str, overrides: Sequence[str], *, field: str = "DATASET") -> Storage:
    """Return the storage of the dataset at a path or URL. `overrides` may set only `storage` keys.

    Raises RecipeError for other keys, and if the storage cannot be reached.
    """
    from capstan.pipeline.config import Recipe, validate
    from capstan.pipeline.storage import Storage
    from capstan.pipeline.text.recipe_file import apply_overrides

    raw = apply_overrides({}, overrides)
    if unused := sorted(raw.keys() - {"storage"}):
        problem = f"{unused[0]} has no effect on this command"
        raise RecipeError("--set", problem, "set only storage keys, e.g. storage.endpoint_url")
    options = validate(Recipe, {"dataset": dataset, **raw}).storage
    refuse_secrets(options, "storage")
    refuse_secrets(dataset, field)
    storage = Storage(dataset, options, field=field)
    storage.check_reachable()
    return storage


def concluded(run: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the summary of `run`; if it raises Quarantined, a summary that lists the units, for `finish` to show."""
    try:
        return run()
    except Quarantined as bad:
        return {"job": bad.job, "quarantined": bad.units}


def finish(summary: Mapping[str, Any], as_json: bool) -> None:
    """Print a command's summary on stdout, as text or, with --json, as one JSON object.

    Raises Quarantined (exit code 3) if the summary's `quarantined` (unit → reason) is not empty.
    """
    if as_json:
        typer.echo(json.dumps(summary, default=str))
    else:
        typer.echo(printable("\n".join(_lines(summary))))
    if quarantined := summary.get("quarantined"):
        raise Quarantined(str(summary.get("dataset") or summary.get("job", "")), quarantined)


def _lines(summary: Mapping[str, Any], indent: str = "") -> list[str]:
    """Return the summary as lines: mappings indented, lists of mappings as table rows, empty values left out."""
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
