"""A captioner with random weights, and small datasets of drawn pictures."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.records import SHARD_SCHEMA, make_key
from pipeline.shards import Manifest, Sample, ShardEntry, write_manifest, write_tar
from pipeline.storage import Storage

ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 16,
        "patch_size": 8,
        "width": 16,
        "head_width": 8,
        "layers": 1,
        "attentional_pool": True,
        "attn_pooler_queries": 5,
        "attn_pooler_heads": 2,
        "output_tokens": True,
    },
    "text_cfg": {
        "context_length": 24,
        "vocab_size": 514,
        "width": 16,
        "heads": 2,
        "layers": 2,
        "embed_cls": True,
        "output_tokens": True,
    },
    "multimodal_cfg": {"context_length": 24, "vocab_size": 514, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads only get into each other's way in models this small."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CoCa of random weights over bytes, with prompts for two slots."""
    import gzip

    import torch
    from open_clip.coca_model import CoCa
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = CoCa(**ARCHITECTURE)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # far apart logits, so that captions vary
    model.text_decoder.text_projection.data[:, 513] *= 4  # and now and then the end token
    folder = tmp_path_factory.mktemp("captioner")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {
        "model_cfg": {**ARCHITECTURE, "custom_text": True},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "capstan.json").write_text(json.dumps({"slots": {"short": "s:", "descriptive": "d:"}}))
    (folder / "bpe.txt.gz").write_bytes(gzip.compress(b"#version: 0.2"))
    return folder


def picture(number: int) -> bytes:
    """A JPEG unlike those of other numbers."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((20, 16), Image.Resampling.NEAREST).save(file, "JPEG", quality=95)
    return file.getvalue()


Shards = list[list[int]]


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Storage]:
    """build([[0, 1], [2]]) writes a dataset of two shards with those pictures; again, it replaces the dataset.

    A picture whose number is negative is no picture.
    """

    def make(shards: Shards, folder: str = "ds") -> Storage:
        storage = Storage(str(tmp_path / folder))
        entries = [_write(storage, tmp_path, f"shard-{n:06d}", numbers) for n, numbers in enumerate(shards)]
        write_manifest(storage, Manifest(shards=entries))
        return storage

    return make


def _write(storage: Storage, scratch: Path, name: str, numbers: list[int]) -> ShardEntry:
    jpegs = [picture(number) if number >= 0 else b"no picture" for number in numbers]
    keys = [make_key(str(number)) for number in numbers]
    tar = scratch / f"{name}.tar"
    digest = hashlib.sha256()
    spans = write_tar(
        tar, [Sample(k, j, {"url": ""}, f"alt {n}") for k, j, n in zip(keys, jpegs, numbers, strict=True)], digest
    )
    size = tar.stat().st_size
    storage.put(tar, f"shards/{name}.tar")
    rows: list[dict[str, Any]] = [
        {
            **dict.fromkeys(SHARD_SCHEMA.names, 0),
            "key": key,
            "caption": f"alt {number}",
            "url": "",
            "sha256": hashlib.sha256(jpeg).hexdigest(),
            "extra": "{}",
            "offset": offset,
            "size": length,
        }
        for number, key, jpeg, (offset, length) in zip(numbers, keys, jpegs, spans, strict=True)
    ]
    storage.write_table(f"shards/{name}.parquet", pa.Table.from_pylist(rows, SHARD_SCHEMA))
    return ShardEntry(name=name, samples=len(rows), bytes=size, sha256=digest.hexdigest(), table_sha256="")
