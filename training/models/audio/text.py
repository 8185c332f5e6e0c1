"""Captions → the vocabulary and tokenizer of a small T5, and the T5"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from capstan.training.models.audio.config import T5Settings
from capstan.training.models.diffusion.config import EncoderSettings
from capstan.training.models.diffusion.load_text_encoder import load_text_encoder

_SPECIAL: Final = ("<pad>", "</s>", "<unk>")  # ids 0, 1 and 2, as every T5 has them
_SPACE: Final = "▁"  # begins a word


def save_tokenizer(captions: Iterable[str], settings: T5Settings, folder: Path) -> None:
    """Write a T5Tokenizer whose pieces are the most frequent words of the captions, and letters for all others."""
    from transformers import T5Tokenizer

    counts = Counter(word for caption in captions for word in re.findall(r"\w+|[^\w\s]", caption))
    letters = sorted({letter for word in counts for letter in word} | {_SPACE})
    total = max(1, sum(counts.values()))
    frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: settings.vocab_size]
    words = {_SPACE * word.isalnum() + word: math.log(count / total) for word, count in frequent}
    rare = {letter: -20.0 for letter in letters if letter not in words}
    vocabulary = [*((piece, 0.0) for piece in _SPECIAL), *(words | rare).items()]
    T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=settings.length).save_pretrained(folder)


def open_text(settings: T5Settings, tokenizer: Path, field: str) -> tuple[Any, Any]:
    """Return (T5, its tokenizer): the frozen one of `pretrained`, or a new one on the tokenizer in a folder.

    The tokenizer pads and truncates to `length`, as StableAudioPipeline's does.
    """
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    if settings.pretrained is not None:
        encoder, words = load_text_encoder(
            EncoderSettings(model=settings.pretrained), "text_encoder", "t5", False, field
        )
        words.model_max_length = settings.length
        return encoder, words
    words = AutoTokenizer.from_pretrained(tokenizer, model_max_length=settings.length, trust_remote_code=False)
    config = T5Config(
        vocab_size=len(words),
        d_model=settings.width,
        d_kv=settings.width // settings.heads,
        d_ff=2 * settings.width,
        num_layers=settings.layers,
        num_heads=settings.heads,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config), words


def ids_of(tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Return ids and mask, int64 [B, length], as the pipeline tokenizes prompts."""
    tokens = tokenizer(
        list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return {"ids": tokens.input_ids, "mask": tokens.attention_mask}
