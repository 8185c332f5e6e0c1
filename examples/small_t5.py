"""The captions of a dataset → a small T5 and its tokenizer, for `train.imagen.text` where there is no larger one

    python examples/small_t5.py DATASET FOLDER [--steps 400]

It learns to fill in spans of words that are left out (Raffel et al. 2020, section 3.1.4). Imagen uses the encoder of a
T5 that learnt from far more text than captions: use that where you can.
"""

from __future__ import annotations

import argparse
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, T5Tokenizer

from capstan.open_dataset import OpenDataset
from capstan.pipeline.storage import Storage

SPECIAL = ["<pad>", "</s>", "<unk>"]  # ids 0, 1 and 2, as every T5 has them
SPACE = "▁"  # begins a word
SENTINELS = 8  # tokens that stand for a span left out
LEFT_OUT, SPAN = 0.15, 3  # share of tokens, and tokens in a span


def small_t5(
    captions: Sequence[str],
    folder: Path,
    *,
    steps: int = 400,
    width: int = 64,
    layers: int = 2,
    vocabulary: int = 2000,
    batch: int = 32,
    seed: int = 0,
) -> list[float]:
    """Train a T5 on captions; write its encoder and tokenizer into `folder`; return each step's loss."""
    tokenizer = T5Tokenizer(vocab=_words(captions, vocabulary), extra_ids=SENTINELS)
    ids = [tokenizer(caption.lower().strip()).input_ids for caption in captions]
    torch.manual_seed(seed)
    shape = {"d_model": width, "d_kv": width // 4, "d_ff": 2 * width, "num_layers": layers, "num_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **shape, **special)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(2, steps))
    losses = []
    for given, wanted in _batches(ids, tokenizer, steps, batch, random.Random(seed)):
        loss = model(input_ids=given, attention_mask=given != 0, labels=wanted.masked_fill(wanted == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss))
    encoder = T5EncoderModel(model.config)
    encoder.load_state_dict(model.state_dict(), strict=False)
    encoder.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return losses


def _words(captions: Sequence[str], size: int) -> list[tuple[str, float]]:
    """Return a unigram vocabulary with log-probabilities: the most frequent words, and letters for all others."""
    counts = Counter(word for caption in captions for word in re.findall(r"\w+|[^\w\s]", caption.lower()))
    letters = sorted({letter for word in counts for letter in word} | {SPACE})
    total = sum(counts.values())
    words = {SPACE * word.isalnum() + word: math.log(count / total) for word, count in counts.most_common(size)}
    rare = {letter: -20.0 for letter in letters if letter not in words}
    return [(piece, 0.0) for piece in SPECIAL] + list((words | rare).items())


def _batches(
    ids: Sequence[Sequence[int]], tokenizer: T5Tokenizer, steps: int, batch: int, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield captions with spans left out, and the spans."""
    sentinels = [tokenizer.convert_tokens_to_ids(f"<extra_id_{number}>") for number in range(SENTINELS)]
    for _ in range(steps):
        pairs = [_left_out(rng.choice(ids), sentinels, rng) for _ in range(batch)]
        yield tuple(  # type: ignore[misc]
            torch.nn.utils.rnn.pad_sequence([torch.tensor(pair[side]) for pair in pairs], batch_first=True)
            for side in range(2)
        )


def _left_out(ids: Sequence[int], sentinels: Sequence[int], rng: random.Random) -> tuple[list[int], list[int]]:
    """Return one caption's ids with a sentinel for each span, and the spans, each after its sentinel."""
    words, end = list(ids[:-1]), ids[-1]
    count = min(len(sentinels), max(1, round(LEFT_OUT * len(words) / SPAN)))
    starts = sorted(rng.sample(range(0, max(1, len(words) - 1), SPAN), min(count, max(1, (len(words) - 1) // SPAN))))
    given: list[int] = []
    spans: list[int] = []
    at = 0
    for sentinel, start in zip(sentinels, starts, strict=False):
        given += [*words[at:start], sentinel]
        spans += [sentinel, *words[start : start + SPAN]]
        at = start + SPAN
    return [*given, *words[at:], end], [*spans, end]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    chosen = parser.parse_args()
    rows = OpenDataset(Storage(chosen.dataset)).samples.to_arrow()
    made = small_t5(rows["caption"].to_pylist(), chosen.folder, steps=chosen.steps)
    print(f"{chosen.folder}: loss {made[0]:.2f} at the first step, {made[-1]:.2f} at the last")
