"""Checks that the commands make before they start, as findings: what build, recaption or train would refuse"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from capstan.cluster.doctor.finding import Finding
from capstan.pipeline import extras
from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Manifest
from capstan.pipeline.errors import CapstanError
from capstan.pipeline.score import registry
from capstan.pipeline.select.conditions import check_conditions
from capstan.pipeline.select.review import check_reviews
from capstan.pipeline.source.plan import survey
from capstan.pipeline.storage import Storage
from capstan.recaption.config import RecaptionConfig
from capstan.recaption.engines import make
from capstan.recaption.machine import check_machine
from capstan.recaption.store import list_layers
from capstan.training.config import TrainConfig
from capstan.training.ready import run_checks

_SURVEYED = 10_000  # rows of the source
_ANSWER_S = 3.0  # for a caption server


def command_findings(recipe: Recipe, storage: Storage, manifest: Manifest | None) -> Iterator[Finding]:
    """Check what the recipe's commands need; `manifest` is that of its dataset, None before the first build."""
    yield from _build(recipe, storage)
    yield from _recaption(recipe)
    yield from _train(recipe, storage, built=manifest is not None)


def failed(name: str, error: CapstanError) -> Finding:
    """Return the finding of a check that raised."""
    problem = getattr(error, "problem", None)
    seen = f"{getattr(error, 'field', name)}: {problem}" if problem else str(error)
    return Finding(name, False, seen, getattr(error, "hint", "see above"))


def _checked(name: str, seen: str, check: Callable[[], object]) -> Finding:
    try:
        check()
    except CapstanError as error:
        return failed(name, error)
    return Finding(name, True, seen)


def _build(recipe: Recipe, storage: Storage) -> Iterator[Finding]:
    if recipe.select:
        names = ", ".join(condition.name for condition in recipe.select)
        yield _checked("conditions", names, lambda: check_conditions(recipe))
    if any(condition.review for condition in recipe.select):
        yield _checked("reviews", "all of them are there", lambda: check_reviews(recipe, storage))
    yield from _source(recipe)
    if recipe.score.model_dump(exclude_none=True) or recipe.dedup.copies is not None:
        yield from _scorers(recipe)


def _source(recipe: Recipe) -> Iterator[Finding]:
    """Check that the source is there, has the columns, and has captions in its first rows."""
    if recipe.source is None or recipe.source.path is None:  # no rows to read, or drawn ones
        return
    try:
        seen = survey(recipe, _SURVEYED)
    except CapstanError as error:
        yield failed("source", error)
        return
    text = ("the first rows: " if seen.read >= _SURVEYED else "") + seen.coverage()
    hint = "check source.path and source.caption (see docs/sources.md), or add a recaption section"
    yield Finding("source", bool(seen.captions) or recipe.recaption is not None, text, hint)


def _scorers(recipe: Recipe) -> Iterator[Finding]:
    yield _checked("scoring machine", "has what the scorers need", lambda: registry.check_machine(recipe))
    if hub := registry.from_hub(recipe):
        yield Finding("scorers", True, f"the weights of {', '.join(hub)} are downloaded when they are first needed")
    else:
        yield _checked("scorers", "all weights are there", lambda: registry.scorers(recipe))


def _recaption(recipe: Recipe) -> Iterator[Finding]:
    if recipe.recaption is None or extras.missing(extras.RECAPTION) is not None:
        return
    config = RecaptionConfig.from_recipe(recipe)
    yield _checked("captioning machine", "has what the engine needs", lambda: check_machine(config, recipe.resources))
    yield _checked("caption engine", f"{config.engine}, {config.model}", lambda: make(config))
    if config.engine == "openai":
        yield _server(str(config.server.url))


def _server(url: str) -> Finding:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), _ANSWER_S).close()
    except OSError as error:
        hint = "start the server, or correct recaption.server.url"
        return Finding("caption server", False, f"{url} does not answer ({error})", hint)
    return Finding("caption server", True, f"{url} answers")


def _train(recipe: Recipe, storage: Storage, *, built: bool) -> Iterator[Finding]:
    if recipe.train is None or extras.missing(extras.TRAIN) is not None:
        return
    train = TrainConfig.from_recipe(recipe)
    checks = run_checks(recipe, train)
    yield _checked(
        "training machine", f"has what {train.precision} and its workers need", checks.pop("training machine")
    )
    if not built and train.data.datasets is None:
        return  # `capstan build` comes first
    if recipe.recaption is not None and train.data.layer == "latest" and not (built and list_layers(storage)):
        yield Finding("training data", True, "no caption layer yet: run `capstan recaption` before `capstan train`")
        return
    for name, check in checks.items():
        yield _checked(name, "all of it is there", check)
