"""The coca engine: the same tokens as open_clip's own forward, whatever else is in the batch."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import RecipeError
from recaption.config import RecaptionConfig
from recaption.engines import make
from recaption.engines.coca import CocaEngine
from recaption.engines.decode import CachedCoca, Tokens, decode, draw

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
KEYS = [f"image {number}" for number in range(8)]
END, START, PAD = 513, 512, 0


def engine(captioner: Path, **recipe: Any) -> CocaEngine:
    made = make(RecaptionConfig.model_validate({"model": str(captioner), **recipe}))
    assert isinstance(made, CocaEngine)
    return made


def uncached(model: Any, pixels: np.ndarray, prompt: list[int], limit: int) -> list[list[int]]:
    """Greedy captions by open_clip's whole forward for every token."""
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    written = []
    for image in images:
        tokens = [START, *prompt]
        for _ in range(limit):
            logits = model(image[None], torch.tensor([tokens]), output_labels=False)["logits"][0, -1]
            logits[PAD] = -torch.inf
            tokens.append(int(logits.argmax()))
            if tokens[-1] == END:
                break
        written.append([token for token in tokens[1 + len(prompt) :] if token != END])
    return written


@torch.inference_mode()
def test_cached_tokens_are_open_clips_own(captioner: Path) -> None:
    coca = engine(captioner)
    captions = coca.caption(PIXELS, KEYS)
    assert coca._loaded is not None
    prompt, limit = coca._loaded.slots["short"]
    expected = uncached(coca._loaded.model, PIXELS, prompt, limit)
    assert [c["short"].tokens for c in captions] == [len(tokens) for tokens in expected]
    assert [c["short"].raw for c in captions] == [coca._loaded.tokenizer.decode(t).strip() for t in expected]
    assert len({c["short"].raw for c in captions}) > 4, "the test needs captions that differ"


@torch.inference_mode()
def test_cached_logits_are_open_clips_own_to_the_last_digits(captioner: Path) -> None:
    model = engine(captioner)
    model.caption(PIXELS[:1], KEYS[:1])
    assert model._loaded is not None
    coca, images = model._loaded.model, torch.randn(3, 3, 16, 16)
    tokens = torch.randint(1, 512, (3, 20))
    whole = coca(images, tokens, output_labels=False)["logits"]
    cache = CachedCoca(coca)
    cache.look(coca.visual(images)[1])
    cache.start(20)
    stepwise = [cache.step(tokens[:, :4])] + [cache.step(tokens[:, n : n + 1]) for n in range(4, 20)]
    torch.testing.assert_close(torch.stack(stepwise, 1), whole[:, 3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decoding", [{}, {"method": "top_p", "top_p": 0.8, "temperature": 2.0}])
def test_captions_do_not_depend_on_the_batch(captioner: Path, decoding: dict[str, Any]) -> None:
    found = [engine(captioner, batch=batch, decoding=decoding).caption(PIXELS, KEYS) for batch in (1, 3, 8)]
    assert found[0] == found[1] == found[2]
    backwards = engine(captioner, decoding=decoding).caption(PIXELS[::-1], KEYS[::-1])
    assert backwards[::-1] == found[0]


def test_captions_end_at_the_end_token_or_say_that_they_were_cut(captioner: Path) -> None:
    captions = [c[slot] for c in engine(captioner).caption(PIXELS, KEYS) for slot in c]
    assert {c.finish for c in captions} == {"end", "length"}
    room = 24 - 1 - 2  # the context without start and prompt
    assert all(c.tokens == room if c.finish == "length" else c.tokens < room for c in captions)
    short = [c[slot] for c in engine(captioner, max_tokens=3).caption(PIXELS, KEYS) for slot in c]
    assert max(c.tokens for c in short) == 3
    assert not any("end_of_text" in c.raw for c in captions)


def test_sampling_has_a_seed_for_every_image_and_slot(captioner: Path) -> None:
    drawn = engine(captioner, decoding={"method": "top_p"}).caption(PIXELS, KEYS)
    other = engine(captioner, decoding={"method": "top_p", "seed": 1}).caption(PIXELS, KEYS)
    assert len({caption.seed for captions in drawn for caption in captions.values()}) == 16
    assert drawn != other
    twice = engine(captioner, decoding={"method": "top_p"}).caption(PIXELS[[0, 0]], ["a", "b"])
    assert twice[0] != twice[1]


def test_nucleus_sampling_draws_from_the_nucleus_in_proportion() -> None:
    from recaption.config import Decoding

    shares = torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05])
    chances = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    drawn = draw(shares.log().expand(1000, -1), chances, Decoding(method="top_p", top_p=0.75))
    counts = torch.bincount(drawn, minlength=5) / 1000
    torch.testing.assert_close(counts, torch.tensor([0.0, 0.625, 0.0, 0.375, 0.0]), atol=0.002, rtol=0)
    top = draw(shares.log()[None], torch.tensor([0.999999]).double(), Decoding(method="top_p", top_p=0.01))
    assert top.tolist() == [1]


def test_ended_captions_leave_the_batch(captioner: Path) -> None:
    """The batch shrinks as captions end, and each goes on as it was."""
    coca = engine(captioner)
    coca.caption(PIXELS, KEYS)
    assert coca._loaded is not None
    sizes: list[int] = []

    class Watched(CachedCoca):
        def step(self, tokens: torch.Tensor) -> torch.Tensor:
            sizes.append(len(tokens))
            return super().step(tokens)

    with torch.inference_mode():
        cache = Watched(coca._loaded.model)
        images = (torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
        cache.look(coca._loaded.model.visual(images)[1])
        decode(cache, [1, 2], 21, Tokens(START, END, PAD), coca.config.decoding, [0] * 8)
    assert sizes[0] == 8
    assert sizes[-1] < 8


def test_identity_changes_with_what_changes_captions_and_with_nothing_else(captioner: Path, tmp_path: Path) -> None:
    base = engine(captioner).identity()
    moved = shutil.copytree(captioner, tmp_path / "elsewhere" / "product")
    assert engine(moved).identity() == base
    assert engine(moved.parent).identity() == base  # a run folder stands for its product
    assert engine(captioner, batch=3, device="cpu").identity() == base
    json.dumps(base)
    for change in (
        {"prompts": {"short": "other:"}},
        {"slots": ["short"]},
        {"max_tokens": 5},
        {"decoding": {"method": "top_p"}},
        {"precision": "bf16"},
    ):
        assert engine(captioner, **change).identity() != base, change
    weights = moved / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert engine(moved).identity() != base


def test_engine_travels_without_its_weights(captioner: Path) -> None:
    coca = engine(captioner)
    captions = coca.caption(PIXELS, KEYS)
    sent = pickle.dumps(coca)
    assert len(sent) < 5000
    assert pickle.loads(sent).caption(PIXELS, KEYS) == captions


def test_what_cannot_work_is_said_with_the_field_and_the_mend(captioner: Path, tmp_path: Path) -> None:
    def refused(field: str, **recipe: Any) -> str:
        with pytest.raises(RecipeError) as caught:
            engine(captioner, **recipe).caption(PIXELS[:1], KEYS[:1])
        assert caught.value.field == field
        return str(caught.value)

    assert "coca_ViT-B-32" in refused("recaption.model", model="no-such-model")
    assert "laion2b_s13b_b90k" in refused("recaption.pretrained", model="coca_ViT-B-32")
    assert "text tower" in refused(
        "recaption.model", model="coca_roberta-ViT-B-32", pretrained=str(captioner / "bpe.txt.gz")
    )
    assert "poem" in refused("recaption.slots", slots=["poem"])
    assert "same" in refused("recaption.prompts", prompts={"short": "d:"})
    assert "context" in refused("recaption.prompts.short", prompts={"short": "word " * 30})
    empty = tmp_path / "empty"
    shutil.copytree(captioner, empty)
    (empty / "open_clip_model.safetensors").unlink()
    assert "No such file" in refused("recaption.model", model=str(empty))
