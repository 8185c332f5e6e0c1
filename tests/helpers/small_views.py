"""A small dataset with everything that the viewer shows, and `capstan view` running over it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import run_all_here
from PIL import Image

from capstan.pipeline.build import build
from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.storage import Storage
from capstan.recaption.lint.linter import Settings
from capstan.recaption.store import Place, Row, file_name, publish, write_given_layer, write_rows


def draw(seed: int, changed: int = 0) -> bytes:
    """A JPEG of coloured blocks, other for each seed; some of them may be `changed`."""
    blocks = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    blocks.reshape(-1, 3)[:changed] ^= 128
    file = io.BytesIO()
    Image.fromarray(np.kron(blocks, np.ones((16, 16, 1), np.uint8))).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_viewed(folder: Path) -> Path:
    """Build the hostile rows of helpers/hostile.py, with a layer of captions; return the dataset's folder."""
    rows = [hostile.row(number, draw) for number in range(hostile.ROWS)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    recipe = hostile.recipe(str(folder), str(folder / "rows.parquet")) | {"resources": {"cpus": 2}}
    build_here(Recipe.model_validate(recipe))
    storage = Storage(recipe["dataset"])
    dataset = Dataset(storage)
    keys = [key for shard in dataset.shard_names for key in dataset.table(shard, ["key"])["key"].to_pylist()]
    write_given_layer(storage, "people", {key: {"short": f"what a person wrote of {key[:4]}"} for key in keys})
    return Path(recipe["dataset"])


def write_copies(folder: Path) -> Recipe:
    """Build four drawings, each with copies in which 0, 1, 2, … of its blocks are changed; return the recipe."""
    rows = [
        {"image": draw(seed, changed), "caption": f"drawing {seed}, {changed} changed", "number": changed}
        for seed in range(4)
        for changed in (0, 0, 1, 2, 4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    recipe = Recipe.model_validate(
        {
            "dataset": f"{folder}/copies",
            "source": {"path": str(folder / "rows.parquet"), "image": "image"},
            "image": {"size": 96},
            "dedup": {"perceptual": 16, "colours": None},
            "resources": {"cpus": 2},
        }
    )
    build_here(recipe)
    return recipe


def build_here(recipe: Recipe) -> None:
    """Build without Ray, which would take ten seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("build", "pack.job"):
            patch.setattr(f"capstan.pipeline.{module}.run", run_all_here)
        build(recipe, progress=False)


HOSTILE = f"a <script>{hostile.RUNS}</script> \u202e backwards \x1b[31m red"


def write_model_layer(dataset: Path, layer: str = "model") -> None:
    """Add a layer of two slots as a model writes it: raw texts, flags, discarded attempts, hostile words."""
    storage = Storage(str(dataset))
    for shard in Dataset(storage).shard_names:
        rows = []
        for row in storage.read_table(f"shards/{shard}.parquet", ["key", "sha256"]).to_pylist():
            short = Row(
                "a photo of blocks . ", "a photo of blocks.", 6, "end", 1, ("opener",), (HOSTILE, "blocks blocks")
            )
            long = Row(HOSTILE, HOSTILE, 20, "end", 2, ())
            place = Place(row["key"], row["sha256"], "", "short")
            rows += [(place, short), (replace(place, slot="descriptive"), long)]
        write_rows(storage, file_name(layer, shard), rows)
    publish(storage, layer, ["short", "descriptive"], {"engine": "coca"}, Settings())


def wait(condition: str, value: str = "true") -> str:
    """JavaScript that waits until a condition holds, then returns a value; 'timeout' if it does not come to hold."""
    return f"""new Promise(done => {{
        const at = Date.now();
        const look = () => {{
            let holds;
            try {{ holds = ({condition}); }} catch {{ holds = false; }}
            if (holds) done({value});
            else if (Date.now() - at > 20000) done('timeout');
            else setTimeout(look, 50);
        }};
        look();
    }})"""


class Viewing:
    """`capstan view` of a dataset, in a process of its own."""

    def __init__(self, dataset: Path | str, *options: str) -> None:
        command = [sys.executable, "-m", "capstan", "view", str(dataset), "--no-browser", "--json", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = str(json.loads(self.process.stdout.readline())["url"])
        self.origin, _, query = self.url.partition("/?")
        self.token, self.port = query.removeprefix("token="), int(self.origin.rpartition(":")[2])
        self.cookie = {"Cookie": f"capstan-view={self.token}"}

    def __enter__(self) -> Viewing:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def get(self, path: str) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of a request with the cookie."""
        request = urllib.request.Request(self.origin + path, headers=self.cookie)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and answer of a request that writes."""
        headers = self.cookie | {"X-Capstan": "1", "Content-Type": "application/json"}
        request = urllib.request.Request(self.origin + path, data=json.dumps(body).encode(), headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def json(self, path: str) -> Any:
        status, _, body = self.get(path)
        assert status == 200, body
        return json.loads(body)
