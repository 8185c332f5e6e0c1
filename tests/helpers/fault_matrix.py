"""The commands of the fault matrix: what each starts from, how it is called, and which bytes it must leave.

A `Place` is where one command works; `Workshop` makes places and what they need, once, and starts commands there as
processes of their own. All of it is small: 24 drawn images of 32 pixels, models of a few thousand weights.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from command_life import LIMIT_S, Ended, Life
from repo import HELPERS, ROOT
from small_captioner import write_captioner

_SMALL = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
_SOURCE = {"format": "world", "world": {"scenes": 24, "size": 64}}
_SELECT = [{"name": "size", "where": "least(width, height) >= 30"}]


@dataclass(frozen=True)
class Place:
    """A folder, `url` as commands name it, and what they need to reach it: a recipe's `storage`, the environment."""

    folder: Path
    url: str
    storage: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A name of its own among all places of the tests."""
        return "-".join(self.folder.parts[-4:])


@dataclass(frozen=True)
class Command:
    """A command of the matrix.

    `start` writes what a place holds before; `arguments` are the command's; `products` are the files that must come out
    the same. `models`: it needs torch.
    """

    name: str
    start: Callable[[Workshop, Path], None]
    arguments: Callable[[Workshop, Place], list[str]]
    products: Callable[[Path], dict[str, Any]]
    models: bool = False


class Workshop:
    """Templates, models and captions in one folder, each made when it is first needed."""

    def __init__(self, root: Path) -> None:
        self.root, self._count = root, 0

    def place(self, command: Command, folder: Path) -> Place:
        """Write what `command` starts from into `folder`, which may exist."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(self._template(command), folder, dirs_exist_ok=True)
        return Place(folder, str(folder))

    @cache  # noqa: B019 - lives as long as the tests
    def _template(self, command: Command) -> Path:
        folder = self.root / "templates" / command.name.replace(" ", "-")
        folder.mkdir(parents=True)
        command.start(self, folder)
        return folder

    def launch(self, command: Command, place: Place) -> Life:
        """Start the command there, with its own folders for caches and scratch files."""
        self._count += 1
        own = self.root / "home" / place.name
        (own / "tmp").mkdir(parents=True, exist_ok=True)
        folders = {"CAPSTAN_RUNS": str(own / "runs"), "XDG_CACHE_HOME": str(own / "cache"), "TMPDIR": str(own / "tmp")}
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HELPERS)]), "CAPSTAN_STATE": str(own / "state")}
        variables = os.environ | {"OMP_NUM_THREADS": "1"} | paths | folders | place.env
        return Life(command.arguments(self, place), variables, own / f"{self._count}.log")

    def run(self, command: Command, place: Place) -> Ended:
        return self.launch(command, place).end()

    @cache  # noqa: B019
    def undisturbed(self, command: Command) -> Undisturbed:
        """Run the command with nothing in its way."""
        place = self.place(command, self.root / "undisturbed" / command.name.replace(" ", "-"))
        before, life = listing(place.folder), self.launch(command, place)
        assert wait_for_change(life, place.folder)
        busy_from = time.monotonic()
        ended, now = life.end(), time.monotonic()
        assert ended.code == 0, ended.lines
        written = [Path(name).stat().st_size for name, _ in listing(place.folder) - before]
        blocks = sum(-(-size // 4096) * 4096 for size in written)
        return Undisturbed(command.products(place.folder), now - busy_from, blocks, len(written))

    # What commands start from and refer to ---------------------------------------------------------------------------

    def recipe(self, place: Place, **sections: Any) -> str:
        """Write a recipe for the dataset of `place`, and return its path."""
        path = self.root / "recipes" / f"{place.name}.yaml"
        content = {
            "dataset": f"{place.url}/ds",
            "storage": place.storage,
            "source": _SOURCE,
            "image": {"size": 32, "min_size": 24, "resize": "center_crop"},
            "select": _SELECT,
            "unit": {"rows": 6},
            "shards": {"samples": 5},
            "resources": {"cpus": 1, "executor": "processes"},
        }
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(content | sections))
        return str(path)

    @cached_property
    def built(self) -> Path:
        """A dataset with a caption layer that people wrote, `mine`."""
        folder = self.root / "built"
        folder.mkdir()
        capstan("build", self.recipe(Place(folder, str(folder))))
        lines = [json.dumps({"key": key, "descriptive": f"words about {key}"}) for key in keys_of(folder / "ds")]
        self.captions.write_text("\n".join(lines))
        capstan("captions", "import", f"{folder}/ds", "mine", str(self.captions))
        return folder / "ds"

    @property
    def captions(self) -> Path:
        """Captions of all images of `built`, as a file to import."""
        return self.root / "captions.jsonl"

    @cached_property
    def takedown(self) -> Path:
        """Every third key of the dataset."""
        file = self.root / "keys.txt"
        file.write_text("\n".join(keys_of(self.built)[::3]))
        return file

    @cached_property
    def captioner(self) -> Path:
        return write_captioner(self.root / "captioner")

    @cached_property
    def models(self) -> Path:
        """Runs `ae` and `run`: an untrained autoencoder, and a diffusion model with it."""
        import tiny_networks as tiny

        folder = self.root / "models"
        tiny.save_autoencoder(self.built, folder / "ae")
        settings = {"autoencoder": str(folder / "ae"), **tiny.settings_of("sd", None)}
        tiny.save_product(tiny.family_of(self.built, folder / "assets", settings), folder / "run")
        section = {"model": "diffusion", "run": str(folder / "run"), "steps": 1, "diffusion": settings}
        recipe = {"dataset": str(self.built), "train": section}
        (folder / "run" / "recipe.json").write_text(json.dumps({"identity": {}, "recipe": recipe}))
        (folder / "run" / "finished.json").write_text(json.dumps({"steps": 1}))
        return folder


@dataclass(frozen=True)
class Undisturbed:
    """What a command leaves, how long it worked after its first change, and how much of what is there it wrote."""

    products: dict[str, Any]
    seconds: float
    bytes: int
    files: int


# Processes and folders -----------------------------------------------------------------------------------------------


def capstan(*arguments: str) -> None:
    """Run a command to make what others start from."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "capstan", *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def wait_for_change(life: Life, folder: Path) -> bool:
    """Wait until anything in `folder` differs from now; False if the process ended before."""
    before, deadline = listing(folder), time.monotonic() + LIMIT_S
    while life.code() is None and time.monotonic() < deadline:
        if listing(folder) != before:
            return True
        time.sleep(0.003)
    return False


def listing(folder: Path) -> set[tuple[str, int]]:
    """Names and times of all files; those that vanish meanwhile are left out."""
    found = set()
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                found.add((f"{root}/{name}", Path(root, name).stat().st_mtime_ns))
            except FileNotFoundError:
                continue
    return found


def keys_of(dataset: Path) -> list[str]:
    tables = sorted((dataset / "shards").glob("*.parquet"))
    return [key for table in tables for key in pq.read_table(table, columns=["key"])["key"].to_pylist()]


def files(folder: Path, *leave_out: str) -> dict[str, Any]:
    """Every file's bytes by name, but for those below `leave_out`."""
    names = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(leave_out or ("\0",))}


def dataset(folder: Path) -> dict[str, Any]:
    """All that readers of a dataset may see."""
    return files(folder / "ds", "state/", "staged/")


def without_removed(folder: Path) -> dict[str, Any]:
    """The dataset; of the takedown's log the lines of takedowns that found rows, without their dates."""
    log = [json.loads(line) for line in (folder / "ds/removed/log.jsonl").read_text().splitlines()]
    return dataset(folder) | {"removed/log.jsonl": [line | {"date": ""} for line in log if line["rows"]]}


def copy(folder: Path) -> dict[str, Any]:
    return files(folder / "out", "state/")


def pipeline(folder: Path) -> dict[str, Any]:
    return files(folder / "out")


def run_folder(folder: Path) -> dict[str, Any]:
    """The product, and the log without what is timed."""
    timed = ("images_per_s", "samples_per_s", "data_wait", "cpu_s", "flops_per_s", "host_memory_gib")
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    log = [{name: value for name, value in json.loads(line).items() if name not in timed} for line in lines]
    return files(folder / "run" / "product") | {"log.jsonl": log}


def verdicts(folder: Path) -> dict[str, Any]:
    """Key → verdict of the review that tests/helpers/give_verdicts.py writes."""
    table = pq.read_table(folder / "ds" / "review" / "mine.parquet")
    return dict(zip(table["key"].to_pylist(), table["verdict"].to_pylist(), strict=True))


# The commands --------------------------------------------------------------------------------------------------------


def _empty(_: Workshop, __: Path) -> None:
    pass


def _with_dataset(shop: Workshop, folder: Path) -> None:
    shutil.copytree(shop.built, folder / "ds")


def _for_export(shop: Workshop, folder: Path) -> None:
    """A run, and an earlier export of it in another precision."""
    shutil.copytree(shop.models / "run", folder / "run")
    capstan("export", str(folder / "run"), str(folder / "out"), "--precision", "bf16")


def _by_recipe(name: str, **sections: Any) -> Callable[[Workshop, Place], list[str]]:
    return lambda shop, place: ["-m", "capstan", name, shop.recipe(place, **sections)]


def _settings(place: Place) -> list[str]:
    """Return the options that say of a bucket what a recipe says under `storage`."""
    return [part for name, value in place.storage.items() for part in ("--set", f"storage.{name}={json.dumps(value)}")]


def _recaption(shop: Workshop, place: Place) -> list[str]:
    section = {"model": str(shop.captioner), "decoding": {"method": "top_p"}, "lint": {"retries": 1}, "batch": 2}
    return ["-m", "capstan", "recaption", shop.recipe(place, recaption=section)]


def _encode(shop: Workshop, place: Place) -> list[str]:
    import tiny_networks as tiny

    settings = {"autoencoder": str(shop.models / "ae"), **tiny.settings_of("sd", None)}
    section = {"model": "diffusion", "run": str(shop.root / "unused"), "steps": 1, "diffusion": settings}
    return ["-m", "capstan", "encode", shop.recipe(place, train=section | {"data": {"layer": None}})]


def _train(shop: Workshop, place: Place) -> list[str]:
    section: dict[str, Any] = {"model": "autoencoder", "run": f"{place.url}/run", "steps": 6, "batch": 2}
    section |= {"log_every": 1, "checkpoint": {"every": 2}, "data": {"layer": None}, "autoencoder": _SMALL}
    section |= {"engine": {"launcher": "local", "strategy": "ddp", "workers": 1, "threads": 1}}
    return ["-m", "capstan", "train", shop.recipe(place, train=section)]


COMMANDS = {
    command.name: command
    for command in (
        Command("build", _empty, _by_recipe("build"), dataset),
        Command("score", _with_dataset, _by_recipe("score", score={"image": {}, "caption": {}}), dataset),
        Command(
            "select", _with_dataset, _by_recipe("select", select=[{"name": "some", "where": "key < '9'"}]), dataset
        ),
        Command(
            "remove",
            _with_dataset,
            lambda shop, place: [
                *("-m", "capstan", "remove", f"{place.url}/ds", "--keys", str(shop.takedown)),
                *_settings(place),
            ],
            without_removed,
        ),
        Command("recaption", _with_dataset, _recaption, dataset, models=True),
        Command(
            "captions import",
            _with_dataset,
            lambda shop, place: [
                *("-m", "capstan", "captions", "import", f"{place.url}/ds", "human"),
                *(str(shop.captions), *_settings(place)),
            ],
            dataset,
        ),
        Command(
            "captions export",
            _with_dataset,
            lambda shop, place: [
                *("-m", "capstan", "captions", "export", f"{place.url}/ds", "mine", f"{place.url}/out"),
                *_settings(place),
            ],
            copy,
        ),
        Command("encode", _with_dataset, _encode, dataset, models=True),
        Command("train", _with_dataset, _train, run_folder, models=True),
        Command(
            "export",
            _for_export,
            lambda shop, place: ["-m", "capstan", "export", f"{place.url}/run", f"{place.folder}/out"],
            pipeline,
            models=True,
        ),
        Command(
            "review",
            _with_dataset,
            lambda shop, place: [str(HELPERS / "give_verdicts.py"), f"{place.url}/ds", *_settings(place)],
            verdicts,
        ),
    )
}
