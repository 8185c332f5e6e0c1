"""A folder or name → a transformers text encoder (CLIP, T5) and its tokenizer.

transformers    config.json, *.safetensors, and the tokenizer in the same folder or in the pipeline folder around it
open_clip       a folder with open_clip_config.json, or a name with a checkpoint; see open_clip_text.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.score.clip_model import CONFIG_FILE
from capstan.training.models.diffusion.config import EncoderSettings

Kind = Literal["clip", "t5"]

_KINDS: dict[str, Kind] = {"clip": "clip", "clip_text_model": "clip", "t5": "t5"}  # by transformers' `model_type`


def load_text_encoder(chosen: EncoderSettings, slot: str, kind: Kind, projected: bool, field: str) -> tuple[Any, Any]:
    """Load (encoder, tokenizer) for a pipeline's `slot`. Raises RecipeError naming `field`.

    CLIP: CLIPTextModel, or CLIPTextModelWithProjection if `projected`. T5: T5EncoderModel.
    """
    root = Path(chosen.model)
    if (root / "product").is_dir():
        root = root / "product"
    if (root / CONFIG_FILE).is_file() or chosen.pretrained is not None:
        from capstan.training.models.diffusion.open_clip_text import convert

        if kind != "clip":
            raise RecipeError(
                field, f"{chosen.model} is an open_clip model, but {slot} must be a {kind.upper()}", _ANOTHER
            )
        return convert(chosen, projected=projected, field=field)
    own = root / slot
    folder = own if own.is_dir() else root / "text_encoder" if (root / "text_encoder").is_dir() else root
    if not (folder / "config.json").is_file():
        hint = "set a folder that transformers or open_clip can load, or {model: an open_clip name, pretrained: …}"
        raise RecipeError(field, f"no text encoder at {root}", hint)
    words = folder.with_name(folder.name.replace("text_encoder", "tokenizer")) if folder != root else root
    try:
        stored = _KINDS.get(str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")))
        if stored != kind:
            raise RecipeError(field, f"{folder} is not a {kind.upper()}, which {slot} must be", _ANOTHER)
        return _t5(folder, words) if kind == "t5" else _clip(folder, words, projected, field)
    except (OSError, ValueError) as error:
        raise RecipeError(field, f"{folder} is not a {kind.upper()} text encoder ({error})", _ANOTHER) from None


_ANOTHER = "use another folder"


def _clip(folder: Path, words: Path, projected: bool, field: str) -> tuple[Any, Any]:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    chosen = CLIPTextModelWithProjection if projected else CLIPTextModel
    options = {"dtype": _dtype(folder), "trust_remote_code": False}
    encoder, report = chosen.from_pretrained(folder, output_loading_info=True, **options)
    if report["missing_keys"]:  # transformers would initialise them at random
        problem = f"{folder} lacks {', '.join(sorted(report['missing_keys'])[:3])}"
        raise RecipeError(field, problem, "use a CLIP with its text projection" if projected else _ANOTHER)
    return encoder, CLIPTokenizer.from_pretrained(
        words, model_max_length=encoder.config.max_position_embeddings, trust_remote_code=False
    )


def _t5(folder: Path, words: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, T5EncoderModel

    encoder = T5EncoderModel.from_pretrained(folder, dtype=_dtype(folder), trust_remote_code=False)
    return encoder, AutoTokenizer.from_pretrained(words, trust_remote_code=False)


def _dtype(folder: Path) -> torch.dtype:
    """Return the precision that an encoder computes in: bf16 if it is stored in bf16, else fp32.

    T5 overflows in fp16, whatever it is stored in.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return torch.bfloat16 if config.get("dtype", config.get("torch_dtype")) == "bfloat16" else torch.float32
