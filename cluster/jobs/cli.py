"""The commands submit and jobs"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from capstan.pipeline.cli import JsonOption, finish
from capstan.pipeline.errors import CapstanError
from capstan.pipeline.text.printable import printable

ClustersOption = Annotated[
    Path | None,
    typer.Option(
        "--clusters",
        metavar="FILE",
        help="Use this file instead of ./clusters.yaml or ~/.config/capstan/clusters.yaml.",
    ),
]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, the start of it, or `last`.")]

jobs = typer.Typer(help="List and manage submitted jobs.", no_args_is_help=True, rich_markup_mode=None)


def add_commands(app: typer.Typer) -> None:
    """Add submit and jobs to `app`."""
    app.command(context_settings={"allow_interspersed_args": False})(submit)
    app.add_typer(jobs, name="jobs")


def submit(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="Any capstan command.")],
    to: Annotated[str, typer.Option("--to", metavar="NAME", help="Target in clusters.yaml.")] = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent, and send nothing.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Stream the job's output and exit with its exit code.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Submit even if the recipe's previous job is still running.")
    ] = False,
    anyway: Annotated[bool, typer.Option("--anyway", hidden=True)] = False,  # the former name of --force
    clusters: ClustersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a capstan command on a target of clusters.yaml. The recipe is sent along.

    The target `local`, this machine, needs no clusters.yaml: the command then runs in the background.
    """
    from capstan.cluster.jobs import submit as work
    from capstan.cluster.jobs.clusters_file import find_target

    target = find_target(to, clusters)
    if dry_run:
        job, _, _ = work.plan(target, command)
        documents = target.documents(job)
        if as_json:
            finish({"job": job.id, "target": to, "documents": documents}, as_json)
            return
        for name, text in documents.items():
            typer.echo(printable(f"# --- {name}\n{text}"))
        return
    record = work.submit(target, command, force=force or anyway)
    summary: dict[str, Any] = {"job": record.id, "target": to}
    if not wait:
        print(f"submitted; see `capstan jobs logs -f {record.id}`", file=sys.stderr)
        finish(summary, as_json)
        return
    try:
        state = work.wait(record)
    except KeyboardInterrupt:
        print(f"\n{record.id} is still running; see `capstan jobs logs -f {record.id}`", file=sys.stderr)
        raise
    finish({**summary, "status": state.status, "exit_code": state.code, "message": state.message}, as_json)
    if state.code:
        raise typer.Exit(state.code)


@jobs.command("list")
def list_jobs(as_json: JsonOption = False) -> None:
    """List all jobs that were submitted from this machine, the latest first."""
    from capstan.cluster.jobs.store import job_rows

    rows = list(job_rows())
    if as_json:
        finish({"jobs": rows}, as_json)
        return
    for row in rows:
        code = "" if row["exit_code"] is None else f" ({row['exit_code']})"
        status = f"{row['status']}{code}"
        line = f"{row['job']:<42} {row['target']:<12} {status:<14} {row['submitted']}  {row['command']}"
        typer.echo(printable(line))


@jobs.command()
def status(job: JobArgument = "last", as_json: JsonOption = False) -> None:
    """Show a job's status, queried from its cluster."""
    from capstan.cluster.jobs.store import find, state_of

    record = find(job)
    state = state_of(record)
    summary = {"job": record.id, "target": record.target, "status": state.status, "exit_code": state.exit_code}
    finish({**summary, "message": state.message, "command": " ".join(record.arguments)}, as_json)


@jobs.command()
def logs(
    job: JobArgument = "last",
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Keep printing until the job ends.")] = False,
) -> None:
    """Print the output of a job."""
    from capstan.cluster.jobs.store import find

    record = find(job)
    for text in record.open().logs(record.handle, follow=follow):
        sys.stdout.write(printable(text))
        sys.stdout.flush()


@jobs.command()
def stop(job: JobArgument, as_json: JsonOption = False) -> None:
    """Ask a job to stop. Finished work is kept; submit the same command again to resume."""
    from capstan.cluster.jobs.store import find, state_of

    record = find(job)
    if state_of(record).is_final:
        raise CapstanError(f"{record.id} has already ended")
    record.open().stop(record.handle)
    finish({"job": record.id, "target": record.target, "asked_to_stop": True}, as_json)
