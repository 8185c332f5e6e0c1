"""Engine coca: an open_clip CoCa by name, checkpoint or folder

    folder/  open_clip_config.json  open_clip_model.safetensors     the format of open_clip's `local-dir:` schema
             bpe.txt.gz             the merges of its own vocabulary, if it has one
             capstan.json           {"slots": {"short": prompt, ...}}

An image is encoded once for all slots. Slots differ only in the words that their captions continue.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from capstan.pipeline.errors import RecipeError, first_line
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

VERSION: Final = 2  # of this engine's computation; part of a layer's id
KEPT: Final = 20  # position embeddings that interpolation leaves unchanged


class CocaEngine:
    """The engine; pickled without weights."""

    uses_original = False

    def __init__(self, config: RecaptionConfig, *, workers: int = 1) -> None:
        self.config = config
        # Absolute, since workers may have another working directory.
        self.folder = product_folder(Path(config.model).absolute())
        self.weights = self.folder / WEIGHTS_FILE if self.folder else None  # None: one of open_clip's tags
        if config.pretrained and Path(config.pretrained).is_file():
            self.weights = Path(config.pretrained).absolute()
        elif config.pretrained and self.folder:
            problem = f"{config.pretrained!r} is not a file, and {self.folder} has its own weights"
            raise RecipeError("recaption.pretrained", problem, "use a checkpoint file, or remove the key")
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
        prompts.refuse_original(self.prompts, "engine coca continues its prompts and takes no instructions")
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
        cache = loaded.encode(images, self.preprocessing, self.config.batch)
        for slot, (prompt, limit) in loaded.slots.items():
            rows = [row for row, request in enumerate(requests) if slot in request.slots]
            if not rows:
                continue
            sampled = how.method == "top_p"
            seeds = [seed_of(how.seed, requests[row].sha256, slot, attempt) if sampled else 0 for row in rows]
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
        """The file with the merges of the model's own vocabulary; None if it uses CLIP's."""
        own = self.folder / BPE_FILE if self.folder else None
        return own if own and own.is_file() else None

    def _weights_id(self) -> str:
        if self.weights is None:
            return f"open_clip:{self.config.model}/{self.config.pretrained}"
        return _digest(self.weights)


class _Loaded:
    """The state of a model worker: the model on its device, the tokenizer, and the slots' prompts as tokens."""

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

    def encode(self, images: Sequence[EngineInput], how: preprocess.Preprocessing, batch: int) -> CachedCoca:
        """Encode uint8 images [height, width, 3]. The last one is repeated to fill a batch of constant shape."""
        import torch

        from capstan.recaption.engines.coca_decoding import CachedCoca, padded

        total = padded(len(images)) if self.device.type == "cpu" else batch
        stacked = np.stack([*images, *[images[-1]] * (total - len(images))])
        x = torch.from_numpy(stacked).to(self.device).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (how.mean, how.std))
        _, image_tokens = self.model.visual(((x.float() / 255 - mean) / std).to(self.dtype))
        cache = CachedCoca(self.model)
        cache.set_images(image_tokens)
        return cache

    def _prompt(self, engine: CocaEngine, slot: str) -> tuple[list[int], int]:
        """Return a slot's prompt as tokens, and the number of tokens that may follow it."""
        text = engine.prompts[slot]
        prompt = self.tokenizer.encode(text)
        room = self.context - 1 - len(prompt)
        if room < 1 or self.tokens.pad in prompt:
            problem = (
                f"{text!r} fills the model's context" if room < 1 else f"{text!r} contains the model's padding token"
            )
            raise RecipeError(f"recaption.prompts.{slot}", problem, "use other or fewer words")
        return prompt, min(room, engine.config.max_tokens or room)


def _stretch(text: Any, context: int) -> None:
    """Interpolate a text tower's position embeddings to `context` tokens, if it has fewer.

    The model was not trained at the new positions: fine-tune it on long captions if you can.
    """
    import torch

    own = text.context_length
    if context <= own:
        return
    table = stretched(text.positional_embedding.data, context)
    text.positional_embedding = torch.nn.Parameter(table, requires_grad=False)
    log.warning("position embeddings interpolated from %d to %d tokens (recaption.context)", own, context)


def stretched(table: torch.Tensor, context: int) -> torch.Tensor:
    """Interpolate position embeddings [own + 1, W], the class token's last, to [context + 1, W]; context > own.

    The first `KEPT` positions are unchanged, since every caption uses them and they are trained best (Long-CLIP: Zhang
    et al. 2024, arXiv:2403.15378).
    """
    import torch

    own = len(table) - 1
    kept = min(KEPT, own // 2)
    tail = torch.nn.functional.interpolate(
        table[kept:own].T[None], size=context - kept, mode="linear", align_corners=True
    )[0].T
    return torch.cat([table[:kept], tail, table[own:]])


def product_folder(path: Path) -> Path | None:
    """Return the model's folder: `path`, or its product/ if `path` is a run; None if neither is one."""
    return next((folder for folder in (path, path / "product") if (folder / CONFIG_FILE).is_file()), None)


def _by_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Return (architecture, preprocessing, slots' prompts) of a model in a folder. Raises RecipeError."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        slots = folder / SLOTS_FILE
        own = json.loads(slots.read_text(encoding="utf-8"))["slots"] if slots.is_file() else {}
        return config["model_cfg"], config.get("preprocess_cfg", {}), own
    except (KeyError, ValueError) as error:
        hint = "use a folder written by open_clip or `capstan train`"
        raise RecipeError("recaption.model", f"cannot read the model in {folder} ({error!r})", hint) from None


def _by_name(name: str, pretrained: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (architecture, preprocessing) of one of open_clip's models. Raises RecipeError."""
    import open_clip

    known = [model for model in open_clip.list_models() if model.startswith("coca_")]
    if name not in known:
        hint = f"use a folder with {CONFIG_FILE}, or one of {', '.join(known)}"
        raise RecipeError("recaption.model", f"{name!r} is neither a folder nor a CoCa of open_clip", hint)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None or not (pretrained in tags or Path(pretrained).is_file()):
        problem = "is missing" if pretrained is None else f"{pretrained!r} is neither a file nor a tag of {name}"
        raise RecipeError("recaption.pretrained", problem, f"use a checkpoint file, or one of {', '.join(tags)}")
    tag = open_clip.pretrained.get_pretrained_cfg(name, pretrained) if pretrained in tags else {}
    return open_clip.get_model_config(name), tag


def _check(architecture: Mapping[str, Any], config: RecaptionConfig) -> None:
    """Raise RecipeError if the architecture cannot be decoded with the cache."""
    text = architecture.get("text_cfg", {})
    if "multimodal_cfg" not in architecture:
        raise RecipeError("recaption.model", f"{config.model} is not a CoCa and cannot write captions", "use a CoCa")
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
        problem = f"{config.model} has a text tower that cannot be decoded with a cache"
        raise RecipeError("recaption.model", problem, "use a CoCa with open_clip's own text tower, e.g. coca_ViT-L-14")


def _load(engine: CocaEngine) -> Any:
    """Return the model with its weights, fp32 on the CPU. Raises RecipeError."""
    import open_clip
    from open_clip.coca_model import CoCa
    from safetensors import SafetensorError

    file = engine.weights
    if file is None:
        name, tag = engine.config.model, engine.config.pretrained
        try:
            return open_clip.create_model(name, pretrained=tag)
        except (RuntimeError, OSError) as error:
            problem = f"cannot load the weights {tag} of {name} ({first_line(error)})"
            hint = "download the weights on a machine that reaches the hub, or use a checkpoint file"
            raise RecipeError("recaption.pretrained", problem, hint) from None
    architecture = {key: value for key, value in engine.architecture.items() if key != "custom_text"}
    model = CoCa(**architecture)
    try:
        open_clip.load_checkpoint(model, str(file))
    except (RuntimeError, OSError, SafetensorError) as error:
        problem = f"cannot load {file} ({first_line(error)})"
        raise RecipeError(
            "recaption.model", problem, "use the architecture that the checkpoint was trained with"
        ) from None
    return model


def _digest(file: Path) -> str:
    """Return the SHA-256 of a file. Raises RecipeError if it cannot be read."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise RecipeError("recaption.model", f"cannot read {file} ({error.strerror})", "check the path") from None
