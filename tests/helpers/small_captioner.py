"""A captioner of random weights, of the kind that `recaption.model` may name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

_TEXT = {"context_length": 20, "vocab_size": 514, "width": 16, "heads": 2, "layers": 1}
_VISION = {"image_size": 32, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1, "output_tokens": True}
_POOL = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}


def write_captioner(folder: Path) -> Path:
    """Write a CoCa over bytes into `folder`."""
    import torch
    from open_clip.coca_model import CoCa
    from safetensors.torch import save_file

    architecture = {
        "embed_dim": 16,
        "vision_cfg": {**_VISION, **_POOL},
        "text_cfg": {**_TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": _TEXT,
    }
    torch.manual_seed(0)
    model = CoCa(**architecture)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"model_cfg": {**architecture, "custom_text": True}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "capstan.json").write_text(json.dumps({"slots": {"short": "s:", "descriptive": "d:"}}))
    (folder / "bpe.txt.gz").write_bytes(gzip.compress(b"#version: 0.2"))
    return folder
