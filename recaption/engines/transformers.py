"""Engine transformers: any image-text-to-text model, by folder or hub name

Inputs are made by the model's own chat template and processor. A caption depends on its own image and prompt only:
prompts are padded on the left to a multiple of `BUCKET` tokens, prompts of different padded lengths run in different
batches, and batches have shapes in which a row does not depend on the other rows (see coca_decoding.py).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from capstan.pipeline.errors import MissingExtra, RecipeError, first_line
from capstan.recaption import preprocess, prompts
from capstan.recaption.config import Decoding, RecaptionConfig
from capstan.recaption.engines import MAX_TOKENS, Caption, EngineInput, Request, chat_settings, need, seed_of

log = logging.getLogger(__name__)

VERSION: Final = 2  # of this engine's computation; part of a layer's id
BUCKET: Final = 32  # tokens: prompts are padded to a multiple of this

# Files of a model's folder that can change a caption; others (readme, training state) are ignored.
_KINDS: Final = (".safetensors", ".bin", ".json", ".jinja", ".txt", ".model", ".py", ".tiktoken")

# What is kept of a model's generation_config: which tokens start, end and fill a sequence, and which must never be
# written. Its decoding (sampling, beams, penalties, lengths) is the recipe's, so that the layer's id covers it.
_TOKENS: Final = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
)

Message = dict[str, Any]


class TransformersEngine:
    """The engine, also for text; pickled without weights."""

    def __init__(self, config: RecaptionConfig, *, workers: int = 1) -> None:
        self.config = config
        self.folder = Path(config.model).absolute() if Path(config.model).is_dir() else None
        if self.folder is None and (config.model.startswith((".", "/", "~")) or config.model.count("/") > 1):
            hint = "use a folder written by save_pretrained, or a hub name, e.g. org/name"
            raise RecipeError("recaption.model", f"folder {config.model} does not exist", hint)
        if self.folder is not None and not (self.folder / "config.json").is_file():
            hint = "use a folder written by save_pretrained"
            raise RecipeError("recaption.model", f"{self.folder} has no config.json", hint)
        self.prompts, self.versions = prompts.instruct(config.slots, config.prompts, config.frames)
        self._description: dict[str, Any] | None = None
        self._loaded: _Loaded | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    @property
    def uses_original(self) -> bool:
        return prompts.quote_original(self.prompts)

    def describe(self) -> dict[str, Any]:
        if self._description is None:
            self._description = {
                "engine": "transformers",
                "version": VERSION,
                "weights": weights_of(self.config),  # includes processor and chat template
                **chat_settings(self.config, self.prompts, self.versions),
                "precision": self.config.precision or "auto",
            }
        return self._description

    def prepare(self, jpeg: bytes) -> np.ndarray:
        return preprocess.within(jpeg, self.config.max_side)

    def caption(
        self, images: Sequence[EngineInput], requests: Sequence[Request], *, attempt: int = 0
    ) -> list[dict[str, Caption]]:
        captions = [dict[str, Caption]() for _ in requests]
        how = self.config.decoding
        if attempt:
            how = how.model_copy(update={"method": "top_p"})
        for slot, prompt in self.prompts.items():
            rows = [row for row, request in enumerate(requests) if slot in request.slots]
            conversations = [
                self._conversation(prompts.quote(prompt, requests[row].original), images[row]) for row in rows
            ]
            seeds = [seed_of(how.seed, requests[row].sha256, slot, attempt) for row in rows]
            for row, caption in zip(rows, self._answer(conversations, seeds, how), strict=True):
                captions[row][slot] = caption
        return captions

    def write(self, prompts: Sequence[str], *, seeds: Sequence[int], max_tokens: int) -> list[Caption]:
        conversations = [self._conversation(prompt) for prompt in prompts]
        return self._answer(conversations, seeds, self.config.decoding, max_tokens)

    def _conversation(self, text: str, image: EngineInput | None = None) -> list[Message]:
        from PIL import Image

        content: list[Message] = [{"type": "text", "text": text}]
        if image is not None:
            content.insert(0, {"type": "image", "image": Image.fromarray(np.asarray(image))})
        system = [{"role": "system", "content": [{"type": "text", "text": self.config.system}]}]
        return [*(system if self.config.system else []), {"role": "user", "content": content}]

    def _answer(
        self, conversations: Sequence[list[Message]], seeds: Sequence[int], how: Decoding, max_tokens: int | None = None
    ) -> list[Caption]:
        loaded = self._loaded = self._loaded or _Loaded(self)
        limit, answers = max_tokens or self.config.max_tokens or MAX_TOKENS, list[Caption]()
        for first in range(0, len(conversations), self.config.batch):
            batch = slice(first, first + self.config.batch)
            answers += loaded.answer(conversations[batch], seeds[batch], how, limit)
        return answers


class _Loaded:
    """The state of a model worker: the model on its device and its processor."""

    def __init__(self, engine: TransformersEngine) -> None:
        transformers = need("transformers", "recaption")
        import torch

        transformers.utils.logging.disable_progress_bar()

        config = engine.config
        cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        self.device, self.batch = torch.device("cuda" if cuda else "cpu"), config.batch
        precision = config.precision or ("bf16" if cuda else "fp32")
        where = {"pretrained_model_name_or_path": str(engine.folder or config.model)}
        if engine.folder is None:
            where["revision"] = config.pretrained or "main"
        try:
            kind = transformers.AutoConfig.from_pretrained(**where)
            self.sees = type(kind) in transformers.AutoModelForImageTextToText._model_mapping
            auto = transformers.AutoModelForImageTextToText if self.sees else transformers.AutoModelForCausalLM
            self.processor = transformers.AutoProcessor.from_pretrained(**where)
            self.model = auto.from_pretrained(
                **where,
                dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
                attn_implementation="sdpa" if cuda else "eager",  # sdpa on the CPU depends on the number of threads
            )
        except ImportError as error:
            raise MissingExtra("recaption.model", first_line(error), "transformers") from None
        except (OSError, ValueError) as error:
            hint = "use a folder written by save_pretrained, or an image-text-to-text model on the hub"
            raise RecipeError("recaption.model", f"cannot load {config.model} ({first_line(error)})", hint) from None
        self.model.to(self.device).eval()
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        if getattr(self.processor, "chat_template", None) is None:
            hint = "use an instruction-tuned model"
            raise RecipeError("recaption.model", f"{config.model} has no chat template", hint)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        own = self.model.generation_config
        kept = {name: value for name in _TOKENS if (value := getattr(own, name, None)) is not None}
        self.model.generation_config = transformers.GenerationConfig(**kept)
        ends = own.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [self.tokenizer.eos_token_id if ends is None else ends])
        log.info("%s loaded on %s, %s", config.model, self.device, precision)

    def answer(
        self, conversations: Sequence[list[Message]], seeds: Sequence[int], how: Decoding, limit: int
    ) -> list[Caption]:
        """Return one answer per conversation. Prompts of equal padded length form a batch."""
        import torch

        answers: dict[int, Caption] = {}
        with torch.inference_mode():
            whole = self._inputs(self._filled(conversations))
            groups = _by_length(whole["attention_mask"][: len(conversations)].sum(1).tolist())
            for rows in groups:
                chosen = self._filled([conversations[row] for row in rows])
                inputs = whole if len(groups) == 1 else self._inputs(chosen)
                row_seeds = [seeds[row] for row in rows]
                lines = self._generate(inputs, [*row_seeds, *[0] * (len(chosen) - len(rows))], how, limit)
                for row, seed, line in zip(rows, row_seeds, lines, strict=False):
                    answers[row] = self._caption(line, seed if how.method == "top_p" else 0)
        return [answers[row] for row in range(len(conversations))]

    def _filled(self, conversations: Sequence[list[Message]]) -> list[list[Message]]:
        """Repeat the last conversation to fill a batch."""
        from capstan.recaption.engines.coca_decoding import padded

        count = len(conversations)
        total = padded(count) if self.device.type == "cpu" else max(count, self.batch)
        return [*conversations, *[conversations[-1]] * (total - count)]

    def _inputs(self, conversations: Sequence[list[Message]]) -> dict[str, Any]:
        """Return the model's inputs on its device, padded on the left to a multiple of BUCKET."""
        images = [_image(messages) for messages in conversations]
        if any(image is not None for image in images) and not self.sees:
            problem, hint = "the model takes no images", "use an image-text-to-text model"
            raise RecipeError("recaption.model", problem, hint)
        texts = [
            self.processor.apply_chat_template(
                messages if self.sees else _flat(messages), tokenize=False, add_generation_prompt=True
            )
            for messages in conversations
        ]
        # The chat template already contains the start token if the model needs one.
        start = self.tokenizer.bos_token
        special = not (start and texts[0].startswith(start))
        text_kwargs = {"padding": True, "padding_side": "left", "pad_to_multiple_of": BUCKET, "return_tensors": "pt"}
        text_kwargs["add_special_tokens"] = special
        if all(image is None for image in images):
            inputs = self.tokenizer(texts, **text_kwargs)
        else:
            inputs = self.processor(text=texts, images=[[image] for image in images], **text_kwargs)
        return {
            name: tensor.to(self.device, self.model.dtype if tensor.is_floating_point() else None)
            for name, tensor in inputs.items()
        }

    def _generate(self, inputs: Any, seeds: Sequence[int], how: Decoding, limit: int) -> list[list[int]]:
        """Return the new tokens of each row."""
        start = inputs["input_ids"].shape[1]
        settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
        if how.method == "beam":
            settings |= {"num_beams": how.beams, "length_penalty": how.length_penalty, "early_stopping": False}
        sampling = [_Sampler(seeds, how, start, limit)] if how.method == "top_p" else []
        output = self.model.generate(
            **inputs,
            **settings,
            max_new_tokens=limit,
            logits_processor=sampling,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=sorted(self.ends),
        )
        return [line[start:] if len(line) > start else [] for line in output.tolist()]

    def _caption(self, line: list[int], seed: int) -> Caption:
        length = next((place for place, token in enumerate(line) if token in self.ends), len(line))
        text = self.tokenizer.decode(line[:length], skip_special_tokens=True).strip()
        return Caption(text, length, "end" if length < len(line) else "length", seed)


class _Sampler:
    """A logits processor that samples each row's next token with the row's own random numbers.

    transformers samples from the process-wide generator, which would make a caption depend on all earlier ones.
    """

    def __init__(self, seeds: Sequence[int], how: Decoding, start: int, limit: int) -> None:
        from capstan.recaption.engines.coca_decoding import uniforms

        self.chances, self.how, self.start = uniforms(seeds, limit), how, start

    def __call__(self, ids: Any, scores: Any) -> Any:
        import torch

        from capstan.recaption.engines.coca_decoding import draw

        chance = self.chances[:, ids.shape[1] - self.start].to(scores.device)
        chosen = draw(scores.float(), chance, self.how)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def _by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Group row numbers by the padded length of their prompts; `lengths` in tokens."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(-(-length // BUCKET), []).append(row)
    return [groups[length] for length in sorted(groups)]


def _image(messages: Sequence[Message]) -> Any:
    """Return the image in a conversation, or None."""
    parts = [part for message in messages for part in message["content"]]
    return next((part["image"] for part in parts if part["type"] == "image"), None)


def _flat(messages: Sequence[Message]) -> list[Message]:
    """Return messages with plain text instead of parts, as templates of language models expect."""
    return [{**message, "content": " ".join(part["text"] for part in message["content"])} for message in messages]


def weights_of(config: RecaptionConfig) -> Mapping[str, str] | str:
    """Return what identifies a model's weights: file → SHA-256 for a folder, else its name and revision on the hub."""
    folder = Path(config.model).absolute()
    return _digests(folder) if folder.is_dir() else f"{config.model}@{config.pretrained or 'main'}"


def _digests(folder: Path) -> Mapping[str, str]:
    """Return file → SHA-256 of a model's folder."""
    digests = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in _KINDS and file.is_file():
            with file.open("rb") as opened:
                digests[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return digests
