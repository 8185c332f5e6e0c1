"""Text encoders of a few thousand weights, in the formats in which real ones lie on disk."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch

from capstan.training.data.tokenizer import Tokenizer

LENGTH = 16  # tokens of the CLIPs
_CAPTIONS = [f"a {colour} square, number {n}" for n in range(9) for colour in ("red", "green", "blue", "yellow")]
WORDS = Tokenizer.train(_CAPTIONS, 560)


def save_clip(folder: Path, *, width: int = 16, layers: int = 2, projected: bool = True, seed: int = 0) -> str:
    """transformers' CLIP text encoder with its tokenizer beside it; its projection is 4 wider than its states."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = WORDS
    words.save(folder)
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=words.vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width + 4,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=words.start,
        eos_token_id=words.end,
        pad_token_id=words.pad,
    )
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    return _saved(model, folder)


def save_t5(folder: Path, *, width: int = 40) -> str:
    """transformers' T5 encoder; every letter is a token."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = [(letter, -3.0) for letter in ("▁", *string.ascii_lowercase, *string.digits, ",")]
    tokens = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters]
    T5Tokenizer(vocab=tokens, extra_ids=0).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return _saved(T5EncoderModel(T5Config(vocab_size=len(tokens), **shape)), folder)


def save_open_clip(folder: Path, text: dict[str, Any] | None = None, **architecture: Any) -> str:
    """An open_clip of its own vocabulary, as open_clip's `local-dir:` reads it; `text` changes its text tower."""
    import open_clip
    from safetensors.torch import save_file

    words = WORDS
    words.save(folder)
    tower = {"context_length": LENGTH, "vocab_size": words.vocab_size, "width": 16, "heads": 2, "layers": 2}
    eyes = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    shape = {"embed_dim": 20, "vision_cfg": eyes, "text_cfg": tower | (text or {})} | architecture
    content = {"model_cfg": shape, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)


def _saved(model: Any, folder: Path) -> str:
    with torch.no_grad():
        for weight in model.parameters():  # away from the start, where much is 0 and little depends on the text
            weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return str(folder)
