"""The commands submit and jobs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from capstan.pipeline.cli import JsonOption, finish
from capstan.pipeline.errors import CapstanError

ClustersOption = Annotated[
    Path | None, typer.Option("--clusters", metavar="FILE", help="In place of clusters.yaml and the user's own.")
]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="A job's id or how it begins; or `last`.")]

jobs = typer.Typer(help="What was submitted: list, status, logs, stop.", no_args_is_help=True, rich_markup_mode=None)


def add_commands(app: typer.Typer) -> None:
    """Add submit and jobs to `app`."""
    app.command(context_settings={"allow_interspersed_args": False})(submit)
    app.add_typer(jobs, name="jobs")


def submit(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="Any capstan command.")],
    to: Annotated[str, typer.Option("--to", metavar="NAME", help="A target of clusters.yaml.")] = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent; send nothing.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Repeat its output, end with its exit code.")] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Although the recipe's last job still runs.")] = False,
    clusters: ClustersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a command on a cluster: `capstan submit --to NAME -- build recipe.yaml`."""
    from capstan.cluster.jobs import submit as work
    from capstan.cluster.jobs.clusters_file import find_target

    target = find_target(to, clusters)
    if dry_run:
        order, _, _ = work.plan(target, command)
        documents = target.documents(order)
        if as_json:
            finish({"job": order.id, "target": to, "documents": documents}, as_json)
            return
        for name, text in documents.items():
            typer.echo(f"# --- {name}\n{text}")
        return
    note = work.submit(target, command, anyway=anyway)
    summary: dict[str, Any] = {"job": note.id, "target": to}
    if not wait:
        print(f"submitted; see `capstan jobs logs -f {note.id}`", file=sys.stderr)
        finish(summary, as_json)
        return
    try:
        state = work.wait(note)
    except KeyboardInterrupt:
        print(f"\n{note.id} goes on; see `capstan jobs logs -f {note.id}`", file=sys.stderr)
        raise
    finish({**summary, "status": state.status, "exit_code": state.code, "message": state.message}, as_json)
    if state.code:
        raise typer.Exit(state.code)


@jobs.command("list")
def list_jobs(as_json: JsonOption = False) -> None:
    """All jobs that were submitted from here, the latest first."""
    from capstan.cluster.jobs.store import listed

    rows = list(listed())
    if as_json:
        finish({"jobs": rows}, as_json)
        return
    for row in rows:
        code = "" if row["exit_code"] is None else f" ({row['exit_code']})"
        status = f"{row['status']}{code}"
        typer.echo(f"{row['job']:<42} {row['target']:<12} {status:<14} {row['submitted']}  {row['command']}")


@jobs.command()
def status(job: JobArgument = "last", as_json: JsonOption = False) -> None:
    """How a job is."""
    from capstan.cluster.jobs.store import find, state_of

    note = find(job)
    state = state_of(note)
    told = {"job": note.id, "target": note.target, "status": state.status, "exit_code": state.exit_code}
    finish({**told, "message": state.message, "command": " ".join(note.arguments)}, as_json)


@jobs.command()
def logs(
    job: JobArgument = "last",
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job ends.")] = False,
) -> None:
    """What a job wrote."""
    from capstan.cluster.jobs.store import find

    note = find(job)
    for text in note.open().logs(note.handle, follow=follow):
        sys.stdout.write(text)
        sys.stdout.flush()


@jobs.command()
def stop(job: JobArgument, as_json: JsonOption = False) -> None:
    """Ask a job to end. What is finished is kept: the same command goes on."""
    from capstan.cluster.jobs.store import find, state_of

    note = find(job)
    if state_of(note).is_final:
        raise CapstanError(f"{note.id} has ended already")
    note.open().stop(note.handle)
    finish({"job": note.id, "target": note.target, "asked_to_stop": True}, as_json)
