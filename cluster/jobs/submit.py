"""A capstan command and a target → a job there

arguments ──plan──▶ JobSpec: an id, the arguments as used there, the recipe's bytes
          ──check─▶ errors that would otherwise only appear there: the recipe, local paths, a job that still runs
          ──submit▶ JobRecord ──wait──▶ the job's output here, its exit code
"""

from __future__ import annotations

import re
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from capstan.cluster.jobs.store import JobRecord, save, state_of, still_running
from capstan.cluster.recipe import load
from capstan.cluster.targets.base import JobSpec, State, Target
from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.secrets import refuse_assignments, refuse_secrets
from capstan.pipeline.text.printable import printable
from capstan.pipeline.text.recipe_file import apply_overrides

_HERE_ONLY: Final = {"submit", "jobs", "init", "schema"}
_ASK_EVERY_S: Final = 1.0
_ASK_AGAIN: Final = 60  # unanswered queries in a row after which waiting ends


def plan(target: Target, arguments: Sequence[str]) -> tuple[JobSpec, Path | None, Recipe | None]:
    """Return what to run on `target`, with the path and content of the recipe in `arguments`, if there is one.

    Raises RecipeError for anything that cannot work there.
    """
    if not arguments or arguments[0] in _HERE_ONLY or arguments[0].startswith("-"):
        raise RecipeError(
            "COMMAND", "is not a command that can run elsewhere", "use e.g. `submit -- build recipe.yaml`"
        )
    refuse_secrets(apply_overrides({}, _overrides(arguments)), "")
    refuse_secrets(list(arguments), "COMMAND")
    refuse_assignments(list(arguments), "COMMAND")
    files = [number for number, argument in enumerate(arguments) if number and Path(argument).is_file()]
    recipe_file = next(
        (Path(arguments[number]) for number in files if arguments[number].endswith((".yaml", ".yml"))), None
    )
    recipe = load(recipe_file, _overrides(arguments)) if recipe_file is not None else None
    if recipe is not None and target.elsewhere:
        _refuse_paths_of_this_machine(recipe, target)
    stem = recipe_file.stem if recipe_file else "job"
    job = JobSpec(_new_id(arguments[0], stem), list(arguments))
    return (_packed(job, files, target) if target.elsewhere else job), recipe_file, recipe


def submit(target: Target, arguments: Sequence[str], *, force: bool = False) -> JobRecord:
    """Start the command on `target` and return its record.

    Raises RecipeError if the recipe's last job may still be running, unless `force`.
    """
    job, recipe_file, recipe = plan(target, arguments)
    running = still_running(recipe_file) if recipe_file is not None and not force else None
    if running is not None:
        problem = f"job {running.id} of this recipe is still running on {running.target}"
        raise RecipeError(
            "RECIPE", problem, f"wait for it, stop it with `capstan jobs stop {running.id}`, or use --force"
        )
    record = JobRecord(
        id=job.id,
        target=target.name,
        settings=target.model_dump(mode="json", exclude={"name"}),
        arguments=list(arguments),
        recipe=str(recipe_file.resolve()) if recipe_file else "",
        dataset=recipe.dataset if recipe else "",
        submitted=time.time(),
        handle=target.send(job),
    )
    save(record)
    return record


def wait(record: JobRecord) -> State:
    """Stream the job's output to stderr until it ends, and return its final state.

    A cluster that does not answer for a while is queried again. Raises CapstanError if that lasts.
    """
    target, silent = record.open(), 0
    try:
        _await_start(record)
        for text in target.logs(record.handle, follow=True):
            sys.stderr.write(printable(text))
            sys.stderr.flush()
    except RecipeError:
        raise
    except CapstanError as error:
        print(printable(f"{error}; waiting for {record.id} without its output"), file=sys.stderr)
    while True:
        try:
            state = state_of(record)
            silent = 0
        except RecipeError:
            raise
        except CapstanError:
            silent += 1
            if silent == _ASK_AGAIN:
                raise
        else:
            if state.is_final:
                return state
        time.sleep(_ASK_EVERY_S)


def _await_start(record: JobRecord) -> None:
    while state_of(record).status == "pending":
        time.sleep(_ASK_EVERY_S)


def _overrides(arguments: Sequence[str]) -> list[str]:
    """Return the values of --set among the arguments."""
    found = [arguments[n + 1] for n, argument in enumerate(arguments[:-1]) if argument == "--set"]
    return found + [argument.removeprefix("--set=") for argument in arguments if argument.startswith("--set=")]


def _new_id(command: str, stem: str) -> str:
    """Return an id that Kubernetes, Slurm and Ray all accept: command, recipe, time, four random digits."""
    words = re.sub(r"[^a-z0-9]+", "-", f"{command[:10]}-{stem[:12]}".lower()).strip("-")
    return f"{words}-{time.strftime('%y%m%d%H%M%S')}-{secrets.token_hex(2)}"


def _packed(job: JobSpec, files: list[int], target: Target) -> JobSpec:
    """Return the job with the files that its arguments name, and the arguments as the files are named there."""
    arguments, content = list(job.arguments), dict[str, bytes]()
    folder = getattr(target, "working_dir", None)
    for number in files:
        path = Path(arguments[number])
        if folder is not None:
            arguments[number] = _inside(path, Path(folder))
            continue
        if content.get(path.name, path.read_bytes()) != path.read_bytes():
            raise RecipeError("COMMAND", f"names two files {path.name}", "rename one of them")
        content[path.name], arguments[number] = path.read_bytes(), path.name
    return JobSpec(job.id, arguments, content)


def _inside(path: Path, folder: Path) -> str:
    try:
        return str(path.resolve().relative_to(folder.resolve()))
    except ValueError:
        raise RecipeError("working_dir", f"{path} is not in {folder}", "move it there") from None


def _refuse_paths_of_this_machine(recipe: Recipe, target: Target) -> None:
    """Raise RecipeError for relative paths: they would mean other folders on whichever node runs the command."""
    paths: dict[str, Any] = {"dataset": recipe.dataset}
    if recipe.source is not None:
        sources = recipe.source.path
        paths["source.path"] = sources[0] if isinstance(sources, list) and sources else sources
    if recipe.train is not None:
        paths["train.run"] = recipe.train.get("run")
    for field, path in paths.items():
        if isinstance(path, str) and "://" not in path and not path.startswith("/"):
            problem = f"{path} is relative to a folder on this machine, which {target.name} cannot see"
            raise RecipeError(field, problem, "use a bucket, or an absolute path on a disk that all its nodes share")
