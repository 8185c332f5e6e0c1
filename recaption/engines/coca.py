"""Images → captions by an open_clip CoCa: a name with a tag or checkpoint, or a folder that Capstan trained.

    folder/  open_clip_config.json  open_clip_model.safetensors     what open_clip's `local-dir:` schema reads
             bpe.txt.gz             the merges of its own vocabulary, where it has one
             capstan.json           {"slots": {"short": prompt, ...}}

The image is encoded once for all slots; slots differ only in the words that their captions continue.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from capstan.pipeline.errors import RecipeError
from capstan.recaption import preprocess, prompts
from capstan.recaption.config import RecaptionConfig
from capstan.recaption.engines import Caption, EngineInput, Request, seed_of

if TYPE_CHECKING:
    import torch

    from capstan.recaption.engines.coca_decoding import CachedCoca

log = logging.getLogger(__name__)

CONFIG_FILE: Final = "open_clip_config.json"
WEIGHTS_FILE: Final = "open_clip_model.safetensors"
BPE_FILE: Final = "bpe.txt.gz"
SLOTS_FILE: Final = "capstan.json"

VERSION: Final = 2  # of this engine's own arithmetic; part of a layer's id
KEPT: Final = 20  # positions that stretching leaves as they are


class CocaEngine:
    """A `CaptionEngine`; pickles as its settings, without weights."""

    uses_original = False

    def __init__(self, config: RecaptionConfig, *, workers: int = 1) -> None:
        self.config = config
        # Absolute, since workers may stand elsewhere.
        self.folder = product_folder(Path(config.model).absolute())
        self.weights = self.folder / WEIGHTS_FILE if self.folder else None  # None: one of open_clip's tags
        if config.pretrained and Path(config.pretrained).is_file():
            self.weights = Path(config.pretrained).absolute()
        elif config.pretrained and self.folder:
            problem = f"{config.pretrained!r} is no file, and {self.folder} has weights of its own"
            raise RecipeError("recaption.pretrained", problem, "name a checkpoint file, or leave it out")
        if self.folder is None:
            self.architecture, config_of = _by_name(config.model, config.pretrained)
            own: Mapping[str, str] = {}
        else:
            self.architecture, config_of, own = _by_folder(self.folder)
        _check(self.architecture, config)
        try:
            self.preprocessing = preprocess.Preprocessing.of(self.architecture["vision_cfg"]["image_size"], config_of)
        except ValueError as error:
            raise RecipeError("recaption.model", str(error), "use another model") from None
        self.prompts = prompts.choose(config.slots, config.prompts, own or prompts.OPENINGS)
        prompts.refuse_original(self.prompts, "engine coca continues its prompts and cannot be told anything")
        self._description: dict[str, Any] | None = None
        self._loaded: _Loaded | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    def describe(self) -> dict[str, Any]:
        if self._description is None:
            self._description = {
                "engine": "coca",
                "version": VERSION,
                "weights": self._weights_id(),
                "architecture": self.architecture,
                "vocabulary": _digest(self.vocabulary) if self.vocabulary else "clip",
                "preprocessing": {**vars(self.preprocessing)},
                "prompts": {slot: self.prompts[slot] for slot in self.config.slots},
                "decoding": self.config.decoding.model_dump(),
                "max_tokens": self.config.max_tokens,
                "context": self.config.context,
                "precision": self.config.precision or "fp32",
            }
        return self._description

    def prepare(self, jpeg: bytes) -> np.ndarray:
        return preprocess.read(jpeg, self.preprocessing)

    def caption(
        self, images: Sequence[EngineInput], requests: Sequence[Request], *, attempt: int = 0
    ) -> list[dict[str, Caption]]:
        import torch

        loaded = self._loaded = self._loaded or _Loaded(self)
        step = self.config.batch
        with torch.inference_mode():
            return [
                captions
                for first in range(0, len(requests), step)
                for captions in self._batch(
                    loaded, images[first : first + step], requests[first : first + step], attempt
                )
            ]

    def _batch(
        self, loaded: _Loaded, images: Sequence[EngineInput], requests: Sequence[Request], attempt: int
    ) -> list[dict[str, Caption]]:
        from capstan.recaption.engines.beam_search import search
        from capstan.recaption.engines.coca_decoding import decode

        how, found = self.config.decoding, [dict[str, Caption]() for _ in requests]
        if attempt:
            how = how.model_copy(update={"method": "top_p"})
        cache = loaded.look(images, self.preprocessing, self.config.batch)
        for slot, (prompt, limit) in loaded.slots.items():
            rows = [row for row, request in enumerate(requests) if slot in request.slots]
            if not rows:
                continue
            drawn = how.method == "top_p"
            seeds = [seed_of(how.seed, requests[row].sha256, slot, attempt) if drawn else 0 for row in rows]
            if how.method == "beam":
                written = search(cache, rows, prompt, limit, loaded.tokens, how)
            else:
                written = decode(cache, rows, prompt, limit, loaded.tokens, how, seeds)
            for row, seed, (tokens, ended) in zip(rows, seeds, written, strict=True):
                text = loaded.tokenizer.decode(tokens).strip()
                found[row][slot] = Caption(text, len(tokens), "end" if ended else "length", seed, parted=True)
        return found

    @property
    def vocabulary(self) -> Path | None:
        """The merges of the model's own vocabulary; None where it has CLIP's."""
        own = self.folder / BPE_FILE if self.folder else None
        return own if own and own.is_file() else None

    def _weights_id(self) -> str:
        if self.weights is None:
            return f"open_clip:{self.config.model}/{self.config.pretrained}"
        return _digest(self.weights)


class _Loaded:
    """What a model worker holds: the model on its device, the tokenizer and the slots' prompts as tokens."""

    def __init__(self, engine: CocaEngine) -> None:
        import torch
        from open_clip.tokenizer import SimpleTokenizer

        from capstan.recaption.engines.coca_decoding import Tokens

        config = engine.config
        cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda" if cuda else "cpu")
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.model = _load(engine).eval()
        if config.context is not None:
            _stretch(self.model.text, config.context)
        self.model.to(self.device, self.dtype)
        self.tokenizer = SimpleTokenizer(**({"bpe_path": str(engine.vocabulary)} if engine.vocabulary else {}))
        self.tokens = Tokens(self.tokenizer.sot_token_id, self.tokenizer.eot_token_id, self.model.pad_id)
        self.context = config.context or min(self.model.text.context_length, self.model.text_decoder.context_length)
        self.slots = {slot: self._prompt(engine, slot) for slot in config.slots}
        log.info("%s loaded on %s, %s", config.model, self.device, config.precision or "fp32")

    def look(self, images: Sequence[EngineInput], how: preprocess.Preprocessing, batch: int) -> CachedCoca:
        """Encode uint8 images [height, width, 3]; where shapes must stay, `batch` of them, the last one repeated."""
        import torch

        from capstan.recaption.engines.coca_decoding import CachedCoca, padded

        total = padded(len(images)) if self.device.type == "cpu" else batch
        stacked = np.stack([*images, *[images[-1]] * (total - len(images))])
        x = torch.from_numpy(stacked).to(self.device).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (how.mean, how.std))
        _, image_tokens = self.model.visual(((x.float() / 255 - mean) / std).to(self.dtype))
        cache = CachedCoca(self.model)
        cache.look(image_tokens)
        return cache

    def _prompt(self, engine: CocaEngine, slot: str) -> tuple[list[int], int]:
        """A slot's prompt as tokens, and how many tokens may follow it."""
        text = engine.prompts[slot]
        prompt = self.tokenizer.encode(text)
        room = self.context - 1 - len(prompt)
        if room < 1 or self.tokens.pad in prompt:
            problem = f"{text!r} fills the model's context" if room < 1 else f"{text!r} holds the model's padding token"
            raise RecipeError(f"recaption.prompts.{slot}", problem, "use other, or fewer, words")
        return prompt, min(room, engine.config.max_tokens or room)


def _stretch(text: Any, context: int) -> None:
    """Give a text tower positions for `context` tokens: its own where they suffice, else stretched ones.

    Captions beyond the own context are what such a model makes of places that it was never trained at: fine-tune it
    there if you can.
    """
    import torch

    own = text.context_length
    if context <= own:
        return
    table = stretched(text.positional_embedding.data, context)
    text.positional_embedding = torch.nn.Parameter(table, requires_grad=False)
    log.warning("positions stretched from %d to %d tokens (recaption.context)", own, context)


def stretched(table: torch.Tensor, context: int) -> torch.Tensor:
    """Positions [own + 1, W], the class token's last → [context + 1, W], for a context that is longer than the own.

    The first positions stay as they are, since every caption uses them and they are learnt best; those after them are
    interpolated to reach as far as asked (Long-CLIP: Zhang et al. 2024, arXiv:2403.15378).
    """
    import torch

    own = len(table) - 1
    kept = min(KEPT, own // 2)
    tail = torch.nn.functional.interpolate(
        table[kept:own].T[None], size=context - kept, mode="linear", align_corners=True
    )[0].T
    return torch.cat([table[:kept], tail, table[own:]])


def product_folder(path: Path) -> Path | None:
    """The folder that holds the model: `path` itself, or product/ in it where it is a run; None where there is none."""
    return next((folder for folder in (path, path / "product") if (folder / CONFIG_FILE).is_file()), None)


def _by_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """(architecture, preprocessing, slots' prompts) of a model in a folder."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        slots = folder / SLOTS_FILE
        own = json.loads(slots.read_text(encoding="utf-8"))["slots"] if slots.is_file() else {}
        return config["model_cfg"], config.get("preprocess_cfg", {}), own
    except (KeyError, ValueError) as error:
        hint = "name a folder that open_clip or `capstan train` wrote"
        raise RecipeError("recaption.model", f"cannot read the model in {folder} ({error!r})", hint) from None


def _by_name(name: str, pretrained: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(architecture, preprocessing) of one of open_clip's models."""
    import open_clip

    known = [model for model in open_clip.list_models() if model.startswith("coca_")]
    if name not in known:
        hint = f"name a folder with {CONFIG_FILE}, or one of {', '.join(known)}"
        raise RecipeError("recaption.model", f"no folder and no CoCa of open_clip is named {name!r}", hint)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None or not (pretrained in tags or Path(pretrained).is_file()):
        problem = "is missing" if pretrained is None else f"{pretrained!r} is neither a file nor a tag of {name}"
        raise RecipeError("recaption.pretrained", problem, f"name a checkpoint file, or one of {', '.join(tags)}")
    tag = open_clip.pretrained.get_pretrained_cfg(name, pretrained) if pretrained in tags else {}
    return open_clip.get_model_config(name), tag


def _check(architecture: Mapping[str, Any], config: RecaptionConfig) -> None:
    """Refuse what cannot be decoded here."""
    text = architecture.get("text_cfg", {})
    if "multimodal_cfg" not in architecture:
        raise RecipeError("recaption.model", f"{config.model} writes no captions: it is not a CoCa", "name a CoCa")
    custom = {
        "block_type",
        "qk_norm",
        "scaled_cosine_attn",
        "scale_heads",
        "scale_attn_inner",
        "scale_attn",
        "scale_fc",
    }
    causal = text.get("embed_cls") and not text.get("hf_model_name") and not text.get("no_causal_mask")
    if not causal or any(text.get(name) for name in custom):
        problem = f"{config.model} has another text tower than CoCa's own, which cannot be decoded with a cache"
        raise RecipeError("recaption.model", problem, "name a CoCa with its own text tower, e.g. coca_ViT-L-14")


def _load(engine: CocaEngine) -> Any:
    """The model with its weights, fp32 on the CPU."""
    import open_clip
    from open_clip.coca_model import CoCa
    from safetensors import SafetensorError

    file = engine.weights
    if file is None:
        name, tag = engine.config.model, engine.config.pretrained
        try:
            return open_clip.create_model(name, pretrained=tag)
        except (RuntimeError, OSError) as error:
            problem = f"cannot load the weights {tag} of {name} ({_first_line(error)})"
            hint = "fetch the weights where the hub can be reached, or name a checkpoint file"
            raise RecipeError("recaption.pretrained", problem, hint) from None
    architecture = {key: value for key, value in engine.architecture.items() if key != "custom_text"}
    model = CoCa(**architecture)
    try:
        open_clip.load_checkpoint(model, str(file))
    except (RuntimeError, OSError, SafetensorError) as error:
        problem = f"cannot load {file} ({_first_line(error)})"
        raise RecipeError("recaption.model", problem, "name its own architecture") from None
    return model


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _digest(file: Path) -> str:
    """SHA-256 of a file. Raises RecipeError where it cannot be read."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise RecipeError("recaption.model", f"cannot read {file} ({error.strerror})", "check the path") from None
