"""`train.init` of a captioner: base shape, vocabulary, weights; longer context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capstan.pipeline.errors import RecipeError
from capstan.recaption.engines.coca import BPE_FILE, CONFIG_FILE, WEIGHTS_FILE, stretched
from capstan.training.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from capstan.training.models.captioner.config import CaptionerSettings


def inherit(product: Path, settings: CaptionerSettings) -> dict[str, Any]:
    """Return the base's configuration in open_clip's format, with the recipe's context length if that is longer.

    Raises RecipeError if the recipe sets a value that differs from the base's: it would be ignored.
    """
    config = _config(product)
    architecture = config["model_cfg"]
    there = _shape(architecture)
    for part in ("vision", "text"):
        section = getattr(settings, part)
        for key in sorted(section.model_fields_set & there[part].keys()):
            wanted, has = getattr(section, key), there[part][key]
            if not (wanted == has or (key == "context_length" and wanted > has)):
                hint = "remove it" + (f", or set at least {has}" if key == "context_length" else "")
                problem = f"is {wanted}, but train.init, whose shape is kept, has {has}"
                raise RecipeError(f"train.captioner.{part}.{key}", problem, hint)
    _check_vocabulary(product, settings, architecture["text_cfg"]["vocab_size"])
    if "context_length" in settings.text.model_fields_set:
        for part in ("text_cfg", "multimodal_cfg"):
            own = architecture[part]["context_length"]
            architecture[part]["context_length"] = max(own, settings.text.context_length)
    return config


def load(coca: Any, product: Path) -> None:
    """Load the base's weights into a CoCa; positions are stretched if it has more of them than the base.

    Raises RecipeError if they do not fit.
    """
    import open_clip
    from safetensors import SafetensorError

    table, own = coca.text.positional_embedding, _config(product)["model_cfg"]["text_cfg"]["context_length"]
    context = len(table) - 1
    if own < context:  # open_clip would stretch the class token's position along with the others
        table.data = table.data[: own + 1]
    try:
        open_clip.load_checkpoint(coca, str(product / WEIGHTS_FILE))
    except (RuntimeError, OSError, SafetensorError) as error:
        raise _refused(product, str(error).partition("\n")[0]) from None
    if own < context:
        table.data = stretched(table.data, context)


def _config(product: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((product / CONFIG_FILE).read_text()))
    except OSError as error:
        raise _refused(product, str(error)) from None


def _refused(product: Path, why: str) -> RecipeError:
    return RecipeError(
        "train.init", f"{product} has no captioner that fits ({why})", "use the run or product of a captioner"
    )


def _shape(architecture: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the recipe's sections `vision` and `text` that describe an architecture."""
    from open_clip.coca_model import CLIPTextCfg, CLIPVisionCfg, MultimodalCfg

    vision, text = CLIPVisionCfg(**architecture["vision_cfg"]), CLIPTextCfg(**architecture["text_cfg"])
    decoder = MultimodalCfg(**architecture["multimodal_cfg"])
    seen = {key: getattr(vision, key) for key in ("image_size", "patch_size", "width", "head_width", "layers")}
    written = {key: getattr(text, key) for key in ("width", "heads", "layers")}
    return {
        "vision": {**seen, "queries": vision.attn_pooler_queries - 1 if vision.attentional_pool else 0},
        "text": {
            **written,
            "decoder_layers": decoder.layers,
            "context_length": min(text.context_length, decoder.context_length),
        },
    }


def _check_vocabulary(product: Path, settings: CaptionerSettings, size: int) -> None:
    """Raise RecipeError if the recipe sets a vocabulary other than the base's."""
    text = settings.text
    if text.vocab_size is not None and text.vocab_size < size:  # vocab_size is an upper bound
        problem = f"is {text.vocab_size}, but the vocabulary of train.init, which is kept, has {size}"
        raise RecipeError("train.captioner.text.vocab_size", problem, "remove it")
    if text.tokenizer is not None and _merges(Path(text.tokenizer)) != _merges(product):
        problem = f"{text.tokenizer} differs from the vocabulary of train.init, which is kept"
        raise RecipeError("train.captioner.text.tokenizer", problem, "remove it")


def _merges(folder: Path) -> list[tuple[str, str]]:
    """Return the merges of the vocabulary in a folder; CLIP's if it has none."""
    return (Tokenizer.load(folder) if (folder / BPE_FILE).is_file() else Tokenizer.clip()).merges
