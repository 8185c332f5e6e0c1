"""A capstan command and a target → a job there.

arguments ──order──▶ Order: an id, the arguments as they are there, the recipe's bytes
          ──check──▶ what would only fail there is said here: the recipe, paths of this machine, a job that runs
          ──submit─▶ Note ──wait──▶ its output here, its exit code
"""

from __future__ import annotations

import re
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from capstan.cluster.jobs.store import Note, keep, state_of, still_running
from capstan.cluster.recipe import load
from capstan.cluster.targets.base import Order, State, Target
from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.secrets import refuse_secrets

_HERE_ONLY: Final = {"submit", "jobs", "init", "schema"}
_ASK_EVERY_S: Final = 1.0
_ASK_AGAIN: Final = 60  # so many unanswered questions in a row end the waiting


def plan(target: Target, arguments: Sequence[str]) -> tuple[Order, Path | None, Recipe | None]:
    """What is to be run on `target`, with the recipe that it names, if it names one.

    Raises RecipeError for what cannot work there.
    """
    if not arguments or arguments[0] in _HERE_ONLY or arguments[0].startswith("-"):
        raise RecipeError(
            "COMMAND", "is not a command that can run elsewhere", "write e.g. `submit -- build recipe.yaml`"
        )
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals:
            section, _, key = name.rpartition(".")
            refuse_secrets({key: value}, section)
    files = [number for number, argument in enumerate(arguments) if number and Path(argument).is_file()]
    recipe_file = next(
        (Path(arguments[number]) for number in files if arguments[number].endswith((".yaml", ".yml"))), None
    )
    recipe = load(recipe_file, _overrides(arguments)) if recipe_file is not None else None
    if recipe is not None and target.elsewhere:
        _refuse_paths_of_this_machine(recipe, target)
    stem = recipe_file.stem if recipe_file else "job"
    order = Order(_new_id(arguments[0], stem), list(arguments))
    return (_packed(order, files, target) if target.elsewhere else order), recipe_file, recipe


def submit(target: Target, arguments: Sequence[str], *, anyway: bool = False) -> Note:
    """Start the command on `target`; gives the note that was kept of it.

    Raises RecipeError where the recipe's last job still runs, unless `anyway`.
    """
    order, recipe_file, recipe = plan(target, arguments)
    running = still_running(recipe_file) if recipe_file is not None and not anyway else None
    if running is not None:
        problem = f"job {running.id} of this recipe still runs on {running.target}"
        raise RecipeError("RECIPE", problem, f"wait for it, `capstan jobs stop {running.id}`, or --anyway")
    note = Note(
        id=order.id,
        target=target.name,
        settings=target.model_dump(mode="json", exclude={"name"}),
        arguments=list(arguments),
        recipe=str(recipe_file.resolve()) if recipe_file else "",
        dataset=recipe.dataset if recipe else "",
        submitted=time.time(),
        handle=target.send(order),
    )
    keep(note)
    return note


def wait(note: Note) -> State:
    """Repeat the job's output on stderr until it ends; gives how it ended. A cluster may be silent for a while."""
    target, silent = note.open(), 0
    try:
        _await_start(note)
        for text in target.logs(note.handle, follow=True):
            sys.stderr.write(text)
            sys.stderr.flush()
    except RecipeError:
        raise
    except CapstanError as error:
        print(f"{error}; waiting for {note.id} without its output", file=sys.stderr)
    while True:
        try:
            state = state_of(note)
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


def _await_start(note: Note) -> None:
    while state_of(note).status == "pending":
        time.sleep(_ASK_EVERY_S)


def _overrides(arguments: Sequence[str]) -> list[str]:
    """The values of --set among the arguments."""
    found = [arguments[n + 1] for n, argument in enumerate(arguments[:-1]) if argument == "--set"]
    return found + [argument.removeprefix("--set=") for argument in arguments if argument.startswith("--set=")]


def _new_id(command: str, stem: str) -> str:
    """An id that Kubernetes, Slurm and Ray all take: command, recipe, time, four random digits."""
    words = re.sub(r"[^a-z0-9]+", "-", f"{command[:10]}-{stem[:12]}".lower()).strip("-")
    return f"{words}-{time.strftime('%y%m%d%H%M%S')}-{secrets.token_hex(2)}"


def _packed(order: Order, files: list[int], target: Target) -> Order:
    """The files that the arguments name travel along, and are named there as they lie."""
    arguments, content = list(order.arguments), dict[str, bytes]()
    folder = getattr(target, "working_dir", None)
    for number in files:
        path = Path(arguments[number])
        if folder is not None:
            arguments[number] = _inside(path, Path(folder))
            continue
        if content.get(path.name, path.read_bytes()) != path.read_bytes():
            raise RecipeError("COMMAND", f"names two files {path.name}", "give one of them another name")
        content[path.name], arguments[number] = path.read_bytes(), path.name
    return Order(order.id, arguments, content)


def _inside(path: Path, folder: Path) -> str:
    try:
        return str(path.resolve().relative_to(folder.resolve()))
    except ValueError:
        raise RecipeError("working_dir", f"{path} does not lie in {folder}", "move it there") from None


def _refuse_paths_of_this_machine(recipe: Recipe, target: Target) -> None:
    """Relative folders would be looked for, and lost, on whichever node the command runs."""
    places: dict[str, Any] = {"dataset": recipe.dataset}
    if recipe.source is not None:
        sources = recipe.source.path
        places["source.path"] = sources[0] if isinstance(sources, list) and sources else sources
    if recipe.train is not None:
        places["train.run"] = recipe.train.get("run")
    for field, place in places.items():
        if isinstance(place, str) and "://" not in place and not place.startswith("/"):
            problem = f"{place} is relative to a folder of this machine, which {target.name} does not see"
            raise RecipeError(field, problem, "name a bucket, or an absolute path on a disk that all its nodes share")
