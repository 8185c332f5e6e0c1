"""A captioner with random weights, and small datasets of drawn images."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process import run_here
from small_dataset import Shards, write_dataset

from capstan.pipeline import units
from capstan.pipeline.storage import Storage
from capstan.recaption.engines.coca import CocaEngine

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


CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP of random weights, as open_clip reads it."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    save_file(open_clip.CLIP(**CLIP).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": {}}))
    return folder


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Storage]:
    """build([[0, 1], [2]]) writes a dataset of two shards with those images; again, it replaces the dataset.

    An image with a negative number is not an image.
    """

    def make(shards: Shards, folder: str = "ds") -> Storage:
        storage = Storage(str(tmp_path / folder))
        write_dataset(storage, shards)
        return storage

    return make


@pytest.fixture
def captioned(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Runs jobs in this process and counts what the engine is asked for, by sha256."""
    asked = Counter[str]()
    caption = CocaEngine.caption

    def counted(self: CocaEngine, images: Any, requests: Any, *, attempt: int = 0) -> Any:
        if not attempt:
            asked.update(request.sha256 for request in requests)
        return caption(self, images, requests, attempt=attempt)

    monkeypatch.setattr(CocaEngine, "caption", counted)
    monkeypatch.setattr(units, "run", run_here)
    return asked
