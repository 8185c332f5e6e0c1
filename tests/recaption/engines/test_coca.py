"""The coca engine: the same tokens as open_clip's own forward, whatever else is in the batch."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capstan.pipeline.errors import RecipeError
from capstan.recaption.config import Decoding, RecaptionConfig
from capstan.recaption.engines import CaptionEngine, Request, TextEngine, make
from capstan.recaption.engines.beam_search import search
from capstan.recaption.engines.coca import CocaEngine
from capstan.recaption.engines.coca_decoding import GROUP, CachedCoca, Tokens, decode, draw
from capstan.recaption.generate import write
from capstan.recaption.lint.linter import Settings

IMAGES = list(np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8))
SLOTS = ("short", "descriptive")
REQUESTS = [Request(f"image {number}", SLOTS) for number in range(20)]
END, START, PAD = 513, 512, 0
TOKENS = Tokens(START, END, PAD)

DECODINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top_p": {"method": "top_p", "top_p": 0.8, "temperature": 2.0},
    "beam": {"method": "beam", "beams": 2},
}


def engine(captioner: Path, **recipe: Any) -> CocaEngine:
    made = make(RecaptionConfig.model_validate({"model": str(captioner), **recipe}))
    assert isinstance(made, CocaEngine)
    return made


def scaled(images: list[np.ndarray]) -> torch.Tensor:
    """As the vision tower wants them."""
    return (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5


def model_of(coca: CocaEngine) -> Any:
    coca.caption(IMAGES[:1], REQUESTS[:1])
    assert coca._loaded is not None
    return coca._loaded.model


def uncached(model: Any, images: list[np.ndarray], prompt: list[int], limit: int) -> list[list[int]]:
    """Greedy captions by open_clip's whole forward for every token."""
    written = []
    for image in scaled(images):
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
    captions = coca.caption(IMAGES[:8], REQUESTS[:8])
    assert coca._loaded is not None
    prompt, limit = coca._loaded.slots["short"]
    expected = uncached(coca._loaded.model, IMAGES[:8], prompt, limit)
    assert [c["short"].tokens for c in captions] == [len(tokens) for tokens in expected]
    assert [c["short"].raw for c in captions] == [coca._loaded.tokenizer.decode(t).strip() for t in expected]
    assert len({c["short"].raw for c in captions}) > 4, "the test needs captions that differ"


@torch.inference_mode()
def test_cached_logits_are_open_clips_own_to_the_last_digits(captioner: Path) -> None:
    coca, images = model_of(engine(captioner)), torch.randn(16, 3, 16, 16)
    tokens = torch.randint(1, 512, (16, 20))
    whole = coca(images, tokens, output_labels=False)["logits"]
    cache = CachedCoca(coca)
    cache.set_images(coca.visual(images)[1])
    assert cache.start(20, range(16)) == 16
    stepwise = [cache.step(tokens[:, :4])] + [cache.step(tokens[:, n : n + 1]) for n in range(4, 20)]
    torch.testing.assert_close(torch.stack(stepwise, 1), whole[:, 3:], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_logits_are_the_same_to_the_last_bit_in_any_batch(captioner: Path, threads: int) -> None:
    """Not only the tokens: what they are chosen by."""
    coca = model_of(engine(captioner))
    tokens = torch.randint(1, 512, (20, 9), generator=torch.Generator().manual_seed(0))

    def logits(chosen: list[int]) -> torch.Tensor:
        cache, fill = CachedCoca(coca), [chosen[-1]] * (-len(chosen) % GROUP)
        cache.set_images(coca.visual(scaled([IMAGES[number] for number in chosen + fill]))[1])
        rows, new = cache.start(9, range(len(chosen))), tokens[chosen + fill]
        assert rows == len(new)
        steps = [cache.step(new[:, :3])] + [cache.step(new[:, n : n + 1]) for n in range(3, 9)]
        return torch.stack(steps, 1)[: len(chosen)]

    torch.set_num_threads(1)
    alone = torch.cat([logits([number]) for number in range(20)])
    try:
        torch.set_num_threads(threads)
        for chosen in ([7], [19, 0, 7], list(range(13)), list(range(17))[::-1], list(range(20)), [3] * 9 + [7] * 35):
            assert torch.equal(logits(chosen), alone[chosen]), chosen
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("method", DECODINGS)
def test_captions_do_not_depend_on_the_batch(captioner: Path, method: str) -> None:
    """Other batch sizes, other companions, another order, other slots: the same caption for each image."""
    decoding = DECODINGS[method]
    expected = engine(captioner, batch=20, decoding=decoding).caption(IMAGES, REQUESTS)
    assert len({captions["short"].raw for captions in expected}) > 10, "the test needs captions that differ"
    assert engine(captioner, batch=1, decoding=decoding).caption(IMAGES[4:6], REQUESTS[4:6]) == expected[4:6]
    for batch in (3, 17):
        assert engine(captioner, batch=batch, decoding=decoding).caption(IMAGES, REQUESTS) == expected, batch
    backwards = engine(captioner, decoding=decoding).caption(IMAGES[::-1], REQUESTS[::-1])
    assert backwards[::-1] == expected
    some = [Request(r.sha256, SLOTS[:1] if n % 3 else SLOTS[1:]) for n, r in enumerate(REQUESTS)]
    found = engine(captioner, decoding=decoding).caption(IMAGES, some)
    assert found == [{r.slots[0]: c[r.slots[0]]} for r, c in zip(some, expected, strict=True)]


def test_captions_end_at_the_end_token_or_say_that_they_were_cut(captioner: Path) -> None:
    captions = [c[slot] for c in engine(captioner).caption(IMAGES, REQUESTS) for slot in c]
    assert {c.finish for c in captions} == {"end", "length"}
    room = 24 - 1 - 2  # the context without start and prompt
    assert all(c.tokens == room if c.finish == "length" else c.tokens < room for c in captions)
    short = [c[slot] for c in engine(captioner, max_tokens=3).caption(IMAGES, REQUESTS) for slot in c]
    assert max(c.tokens for c in short) == 3
    assert not any("end_of_text" in c.raw for c in captions)


def test_captions_say_that_clips_tokenizer_set_their_spaces(captioner: Path) -> None:
    (captions,) = engine(captioner).caption(IMAGES[:1], REQUESTS[:1])
    assert all(caption.parted for caption in captions.values())


def test_sampling_has_a_seed_for_every_image_slot_and_attempt(captioner: Path) -> None:
    some, asked = IMAGES[:8], REQUESTS[:8]
    drawn = engine(captioner, decoding={"method": "top_p"}).caption(some, asked)
    other = engine(captioner, decoding={"method": "top_p", "seed": 1}).caption(some, asked)
    again = engine(captioner, decoding={"method": "top_p"}).caption(some, asked, attempt=1)
    found = [caption for run in (drawn, other, again) for captions in run for caption in captions.values()]
    assert len({caption.seed for caption in found}) == 48
    assert drawn != other
    assert drawn != again
    twice = engine(captioner, decoding={"method": "top_p"}).caption([some[0]] * 2, asked[:2])
    assert twice[0] != twice[1]


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_a_further_attempt_draws_and_leaves_the_layer_as_it_is(captioner: Path, method: str) -> None:
    coca = engine(captioner, decoding={"method": method})
    before = json.dumps(coca.describe())
    first, second, third = (coca.caption(IMAGES[:8], REQUESTS[:8], attempt=n) for n in range(3))
    assert {caption.seed for captions in first for caption in captions.values()} == {0}
    assert first != second != third
    drawing = engine(captioner, decoding={"method": "top_p"})
    assert drawing.caption(IMAGES[:8], REQUESTS[:8], attempt=1) == second
    assert json.dumps(coca.describe()) == before


@torch.inference_mode()
def test_beam_search_finds_what_a_plain_one_finds(captioner: Path) -> None:
    """Against the same search over open_clip's own forward, and never worse than greedy."""
    coca, prompt, limit, beams = model_of(engine(captioner)), [1, 2], 8, 3
    images = scaled(IMAGES[:16])
    how = Decoding(method="beam", beams=beams)
    cache = CachedCoca(coca)
    cache.set_images(coca.visual(images)[1])
    found = search(cache, range(16), prompt, limit, TOKENS, how)
    assert {ended for _, ended in found} == {True, False}, "the test needs both"

    def following(image: torch.Tensor, texts: list[list[int]]) -> torch.Tensor:
        lines = torch.tensor([[START, *prompt, *text] for text in texts])
        logits = coca(image.expand(len(texts), -1, -1, -1), lines, output_labels=False)["logits"][:, -1]
        logits[:, PAD] = -torch.inf
        return logits.log_softmax(-1)

    def plain(image: torch.Tensor) -> tuple[list[int], bool]:
        running, finished = [([], 0.0)], list[tuple[float, list[int], bool]]()
        for length in range(1, limit + 1):
            shares = following(image, [text for text, _ in running])
            best = [
                (score + float(shares[n, token]), [*text, token])
                for n, (text, score) in enumerate(running)
                for token in shares[n].topk(2 * beams).indices.tolist()
            ]
            best = sorted(best, key=lambda one: -one[0])[: 2 * beams]
            finished += [(score / len(text), text[:-1], True) for score, text in best[:beams] if text[-1] == END]
            finished = sorted(finished, key=lambda one: -one[0])[:beams]
            running = [(text, score) for score, text in best if text[-1] != END][:beams]
            if len(finished) == beams and finished[-1][0] >= running[0][1] / length:
                break
        else:
            finished += [(score / limit, text, False) for text, score in running]
        return max(finished, key=lambda one: one[0])[1:]

    assert found == [plain(image) for image in images]


def test_longer_contexts_only_where_asked_for(captioner: Path) -> None:
    """The model's own context bounds its captions; `context` bounds them closer, or stretches the positions."""
    own, near, far = (engine(captioner, context=context) for context in (None, 10, 60))
    lengths = [
        max(c.tokens for captions in coca.caption(IMAGES, REQUESTS) for c in captions.values())
        for coca in (own, near, far)
    ]
    assert lengths == [21, 7, 57]
    assert len({json.dumps(coca.describe()) for coca in (own, near, far)}) == 3
    table, stretched = (model_of(coca).text.positional_embedding for coca in (own, far))
    assert torch.equal(stretched[:12], table[:12])  # half of so few positions stay
    torch.testing.assert_close(stretched[[12, 59, 60]], table[[12, 23, 24]])  # ends, and the class token's
    assert model_of(near).text.positional_embedding.shape == table.shape


def test_is_a_caption_engine_and_no_text_engine(captioner: Path) -> None:
    coca = engine(captioner)
    assert isinstance(coca, CaptionEngine)
    assert not isinstance(coca, TextEngine)
    assert not coca.uses_original


def test_nucleus_sampling_draws_from_the_nucleus_in_proportion() -> None:
    shares = torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05])
    chances = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    drawn = draw(shares.log().expand(1000, -1), chances, Decoding(method="top_p", top_p=0.75))
    counts = torch.bincount(drawn, minlength=5) / 1000
    torch.testing.assert_close(counts, torch.tensor([0.0, 0.625, 0.0, 0.375, 0.0]), atol=0.002, rtol=0)
    top = draw(shares.log()[None], torch.tensor([0.999999]).double(), Decoding(method="top_p", top_p=0.01))
    assert top.tolist() == [1]


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_ended_captions_leave_the_batch(captioner: Path, method: str) -> None:
    """The batch shrinks as captions end, and the others are unchanged."""
    coca, sizes = model_of(engine(captioner)), list[int]()

    class Watched(CachedCoca):
        def step(self, tokens: torch.Tensor) -> torch.Tensor:
            sizes.append(len(tokens))
            return super().step(tokens)

    def lengths(images: list[np.ndarray]) -> list[int]:
        cache, fill = Watched(coca), images[-1:] * (-len(images) % GROUP)
        cache.set_images(coca.visual(scaled(images + fill))[1])
        how = Decoding.model_validate({"method": method, "beams": 2})
        rows = range(len(images))
        if method == "beam":
            return [len(tokens) for tokens, _ in search(cache, rows, [1, 2], 21, TOKENS, how)]
        return [len(tokens) for tokens, _ in decode(cache, rows, [1, 2], 21, TOKENS, how, [0] * len(rows))]

    with torch.inference_mode():
        together = lengths(IMAGES)
        assert sizes[0] > sizes[-1]
        assert [lengths([image])[0] for image in IMAGES[::7]] == together[::7]


def test_description_changes_with_what_changes_captions_and_with_nothing_else(captioner: Path, tmp_path: Path) -> None:
    base = engine(captioner).describe()
    moved = shutil.copytree(captioner, tmp_path / "elsewhere" / "product")
    assert engine(moved).describe() == base
    assert engine(moved.parent).describe() == base  # a run folder stands for its product
    assert engine(captioner, batch=3, device="cpu").describe() == base
    assert make(engine(captioner).config, workers=3).describe() == base
    json.dumps(base)
    assert base["weights"] == hashlib.sha256((captioner / "open_clip_model.safetensors").read_bytes()).hexdigest()
    for change in (
        {"prompts": {"short": "other:"}},
        {"slots": ["short"]},
        {"max_tokens": 5},
        {"decoding": {"method": "top_p"}},
        {"precision": "bf16"},
        {"context": 20},
    ):
        assert engine(captioner, **change).describe() != base, change
    weights = moved / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert engine(moved).describe() != base


def test_engine_travels_without_its_weights(captioner: Path) -> None:
    coca = engine(captioner)
    captions = coca.caption(IMAGES[:8], REQUESTS[:8])
    sent = pickle.dumps(coca)
    assert len(sent) < 5000
    assert pickle.loads(sent).caption(IMAGES[:8], REQUESTS[:8]) == captions


def test_what_cannot_work_is_said_with_the_field_and_the_fix(captioner: Path, tmp_path: Path) -> None:
    def refused(field: str, **recipe: Any) -> str:
        with pytest.raises(RecipeError) as caught:
            engine(captioner, **recipe).caption(IMAGES[:1], REQUESTS[:1])
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
    assert "transformers or openai" in refused("recaption.prompts.short", prompts={"short": "as in {original}"})
    empty = tmp_path / "empty"
    shutil.copytree(captioner, empty)
    (empty / "open_clip_model.safetensors").unlink()
    assert "No such file" in refused("recaption.model", model=str(empty))
    assert "laion2b.pt' is not a file" in refused("recaption.pretrained", pretrained=str(tmp_path / "laion2b.pt"))


def test_a_hub_that_cannot_be_reached_is_the_users_to_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each shard would be tried three times, and put into quarantine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    coca = CocaEngine(RecaptionConfig(model="coca_ViT-B-32", pretrained="laion2b_s13b_b90k"))
    with pytest.raises(RecipeError, match="cannot load the weights laion2b_s13b_b90k of coca_ViT-B-32") as caught:
        coca.caption(IMAGES[:1], REQUESTS[:1])
    assert caught.value.field == "recaption.pretrained"


def test_an_image_that_cannot_be_captioned_does_not_take_the_batch_with_it(captioner: Path) -> None:
    inputs = [*IMAGES[:2], np.zeros((8, 8, 3), np.uint8), IMAGES[3]]
    rows = write(engine(captioner), inputs, REQUESTS[:4], Settings(retries=0), {})
    assert [row["short"].flags == ("engine_error", "failed") for row in rows] == [False, False, True, False]
    whole = write(engine(captioner), IMAGES[:4], REQUESTS[:4], Settings(retries=0), {})
    assert [rows[n] for n in (0, 1, 3)] == [whole[n] for n in (0, 1, 3)]
