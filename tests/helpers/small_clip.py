"""A CLIP of random weights over 16 × 16 pixels and bytes, in the files that open_clip and Capstan write."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 24, "vocab_size": 514, "width": 16, "heads": 2, "layers": 1},
}


def write_clip(folder: Path, seed: int) -> Path:
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = open_clip.CLIP(**CLIP)
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": {}}))
    (folder / "bpe.txt.gz").write_bytes(gzip.compress(b"#version: 0.2", mtime=0))
    return folder
