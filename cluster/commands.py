"""The index of all commands: group, one line of help, examples, and the extra that each one needs"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import typer
from typer.core import TyperGroup

from capstan.pipeline import extras

DATA: Final = "Data"
CAPTIONS: Final = "Captions"
TRAINING: Final = "Training"
CLUSTER: Final = "Cluster"
GROUPS: Final = (DATA, CAPTIONS, TRAINING, CLUSTER)
LONGEST: Final = 45  # characters of a summary: longer ones are cut on a terminal of 80 columns


@dataclass(frozen=True)
class Command:
    """What the front door knows of one command; its options and its full help are in its own file."""

    group: str
    summary: str
    examples: tuple[str, ...]
    extra: str | None = None


_R, _T = extras.RECAPTION, extras.TRAIN
COMMANDS: Final[dict[str, Command]] = {
    "init": Command(DATA, "Write a commented starter recipe.", ("capstan init", "capstan init my-project")),
    "build": Command(
        DATA,
        "Fetch, filter and pack images into shards.",
        (
            "capstan build recipe.yaml",
            "capstan build recipe.yaml --set image.size=256",
            "capstan build recipe.yaml --retry timeout,http_503",
        ),
    ),
    "cut": Command(
        DATA,
        "Cut videos into clips.",
        (
            "capstan cut videos.yaml",
            "capstan cut videos.yaml --set cut.by=stride",
            "capstan cut videos.yaml --retry http_503",
        ),
        extras.VIDEO,
    ),
    "score": Command(
        DATA, "Add score columns to a built dataset.", ("capstan score recipe.yaml --set 'score={image: {}}'",)
    ),
    "select": Command(
        DATA,
        "Re-apply the conditions and repack shards.",
        ("capstan select recipe.yaml --dry-run", "capstan select recipe.yaml"),
    ),
    "report": Command(
        DATA,
        "Write an HTML report or a contact sheet.",
        (
            "capstan report out/ds",
            "capstan report out/ds --samples reason=timeout -o timeouts.png",
            "capstan report out/run",
        ),
    ),
    "view": Command(
        DATA,
        "Look at a dataset or runs in a browser.",
        ("capstan view out/ds", "capstan view s3://bucket/ds --no-browser --port 8000", "capstan view out/runs"),
    ),
    "verify": Command(
        DATA,
        "Check every tar, checksum and index.",
        (
            "capstan verify out/ds",
            "capstan verify out/ds --repair",
            "capstan verify s3://bucket/ds --set storage.endpoint_url=http://127.0.0.1:9000",
        ),
    ),
    "remove": Command(
        DATA,
        "Remove rows for good (takedown).",
        ("capstan remove out/ds --urls urls.txt", "capstan remove out/ds --domains domains.txt"),
    ),
    "publish": Command(
        DATA,
        "Publish a dataset with its card.",
        (
            "capstan publish out/ds hf://datasets/me/birds --create",
            "capstan publish out/ds s3://bucket/birds --dry-run",
        ),
    ),
    "schema": Command(DATA, "Print the recipe's JSON Schema.", ("capstan schema > recipe.schema.json",)),
    "recaption": Command(
        CAPTIONS,
        "Write captions with a model.",
        ("capstan recaption recipe.yaml --plan", "capstan recaption recipe.yaml"),
        _R,
    ),
    "captions": Command(CAPTIONS, "Import, compare and export caption layers.", ()),
    "captions import": Command(
        CAPTIONS,
        "Import captions from a JSON Lines file.",
        (
            "capstan captions import out/ds human captions.jsonl",
            "capstan captions import out/ds alt a.jsonl --slot short=text",
        ),
    ),
    "captions export": Command(
        CAPTIONS,
        "Copy a dataset with a layer's captions.",
        (
            "capstan captions export out/ds latest out/ds-descriptive",
            "capstan captions export out/ds human s3://bucket/ds",
        ),
    ),
    "captions diff": Command(
        CAPTIONS, "Compare two caption layers.", ("capstan captions diff out/ds original latest",), _R
    ),
    "train": Command(
        TRAINING,
        "Train the model that the recipe names.",
        ("capstan train recipe.yaml", "capstan train recipe.yaml --set train.steps=2000"),
        _T,
    ),
    "encode": Command(TRAINING, "Precompute latents and text embeddings.", ("capstan encode recipe.yaml",), _T),
    "sample": Command(
        TRAINING,
        "Draw images from prompts.",
        (
            'capstan sample out/run -p "a red circle" -o grid.png',
            'capstan sample out/run -p "a cat" --seed 1 --seed 2 --guidance 4',
        ),
        _T,
    ),
    "evaluate": Command(
        TRAINING,
        "Measure a run on data it has not seen.",
        ("capstan evaluate out/run", "capstan evaluate out/run --measures oracle,clip --clip ViT-B-32"),
        _T,
    ),
    "export": Command(
        TRAINING, "Export a run as a diffusers pipeline.", ("capstan export out/run pipeline --precision fp16",), _T
    ),
    "style": Command(
        TRAINING,
        "Redraw an image in another's style.",
        (
            "capstan style photo.jpg painting.jpg -o out.png --vgg ./lpips",
            "capstan style photo.jpg painting.jpg -o out.png --features out/ae",
        ),
        _T,
    ),
    "experiment": Command(TRAINING, "Compare several models side by side.", ()),
    "experiment blend": Command(
        TRAINING, "Compare caption blends on your dataset.", ("capstan experiment blend recipe.yaml",), _T
    ),
    "experiment lecture": Command(
        TRAINING, "Compare systems, each trained for equal time.", ("capstan experiment lecture lecture.yaml",), _T
    ),
    "experiment world": Command(
        TRAINING, "Compare caption blends on drawn images.", ("capstan experiment world --quick",), _T
    ),
    "demo": Command(
        TRAINING,
        "Run every stage on a small drawn dataset.",
        ("capstan demo", "capstan demo my-demo --quick"),
        _T,
    ),
    "doctor": Command(
        CLUSTER,
        "Check machine, recipe and target.",
        ("capstan doctor", "capstan doctor recipe.yaml --to lab"),
    ),
    "plan-cost": Command(
        CLUSTER,
        "Estimate hours, storage and dollars.",
        (
            "capstan plan-cost recipe.yaml --rows 1000000000",
            "capstan plan-cost recipe.yaml --cores 1000 --gpus 64 --rate captions=25",
            "capstan plan-cost recipe.yaml --price gpu_hour=2.5",
        ),
    ),
    "submit": Command(
        CLUSTER,
        "Run a command on a cluster.",
        (
            "capstan submit --to lab -- build recipe.yaml",
            "capstan submit --to lab --dry-run -- train recipe.yaml",
        ),
    ),
    "jobs": Command(CLUSTER, "List and manage submitted jobs.", ()),
    "jobs list": Command(CLUSTER, "List the jobs submitted from here.", ("capstan jobs list",)),
    "jobs status": Command(
        CLUSTER, "Show a job's status.", ("capstan jobs status", "capstan jobs status build-recipe")
    ),
    "jobs logs": Command(CLUSTER, "Print a job's output.", ("capstan jobs logs -f last",)),
    "jobs stop": Command(CLUSTER, "Stop a job; finished work is kept.", ("capstan jobs stop build-recipe",)),
}


class GroupedCommands(TyperGroup):
    """A group of commands that lists them under the headings of the index, in its order."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        prefix = "" if ctx.parent is None else f"{ctx.info_name} "
        names = [name for name in (entry.removeprefix(prefix) for entry in COMMANDS) if name in self.commands]
        groups = {name: COMMANDS[prefix + name].group for name in names if prefix + name in COMMANDS}
        for heading in [group for group in GROUPS if group in groups.values()]:
            rows = [
                (name, self.commands[name].get_short_help_str(LONGEST)) for name in groups if groups[name] == heading
            ]
            with formatter.section("Commands" if prefix else heading):
                formatter.write_dl(rows)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and self.no_args_is_help and not ctx.resilient_parsing:
            typer.echo(ctx.get_help(), err=True)
            ctx.exit(2)
        return super().parse_args(ctx, args)


def describe(app: typer.Typer, prefix: str = "") -> None:
    """Give the commands of `app` their group, summary and examples; each checks that its extra is installed.

    Raises KeyError for a command that the index does not have.
    """
    app.info.cls = GroupedCommands
    for info in app.registered_commands:
        assert info.callback is not None
        name = prefix + (info.name or info.callback.__name__.replace("_", "-"))
        entry = COMMANDS[name]
        info.short_help = entry.summary
        info.epilog = "\b\nExamples:\n" + "\n".join(f"  {example}" for example in entry.examples)
        if entry.extra is not None:
            info.callback = _requiring(entry.extra, name, info.callback)
    for group in app.registered_groups:
        assert group.typer_instance is not None
        assert isinstance(group.name, str)
        entry = COMMANDS[group.name]
        group.short_help, group.cls = entry.summary, GroupedCommands
        describe(group.typer_instance, f"{prefix}{group.name} ")


def _requiring(extra: str, name: str, callback: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(callback)
    def checked(*arguments: Any, **options: Any) -> Any:
        extras.require(extra, name)
        return callback(*arguments, **options)

    return checked


def leaves() -> Iterator[tuple[str, Command]]:
    """Yield the commands that do something, without the groups that hold them."""
    groups = {name.rpartition(" ")[0] for name in COMMANDS}
    yield from ((name, entry) for name, entry in COMMANDS.items() if name not in groups)
