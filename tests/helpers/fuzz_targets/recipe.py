"""The recipe loader: a file of YAML and `--set`, checked by every floor."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

from repo import ROOT

from capstan.cluster import recipe
from capstan.pipeline.errors import RecipeError

SUFFIXES = (".yaml",)
WORDS = [
    b"&a",
    b"*a",
    b"<<: ",
    b"!!",
    b"- ",
    b": ",
    b"{",
    b"[",
    b"? ",
    b"|\n",
    b"---\n",
    b"\t",
    b"0x",
    b"1e999",
    b".nan",
]
WORDS += [b"dataset: ", b"source: ", b"select: ", b"recaption: ", b"train: ", b"experiment: ", b"2001-99-99", b"null"]
LONGEST = 1 << 14


def seeds() -> list[bytes]:
    examples = [path.read_bytes() for path in sorted((ROOT / "examples").glob("*.yaml"))]
    return [
        *(data for data in examples if b"\ntrain:" not in data),  # the check of a model's settings imports torch
        b"dataset: d\nsource: {path: a.parquet}\nselect: [{name: a, where: '1 = 1'}]\ndedup: {perceptual: 4}\n",
        b"a: &a [*a, &b {c: *b}]\n",
        b"[" * 2000,
        b"a: " + b"9" * 5000,
        b"l1: &l1 [x, x]\nl2: &l2 [*l1, *l1]\nl3: [*l2, *l2]\ndate: 2001-02-03\nset: !!set {a, b}\n",
    ]


def check(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_bytes(data)
        head, _, override = data.decode("utf-8", "replace").partition("\n")
        for overrides in ([], [f"{head[:60]}={override[:500]}"]):
            with suppress(RecipeError):
                recipe.load(file, overrides)
