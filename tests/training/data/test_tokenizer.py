"""Both formats of the tokenizer give the same ids, and text comes back."""

from __future__ import annotations

import pytest

from capstan.pipeline.errors import RecipeError
from capstan.training.data.tokenizer import BPE_FILE, SMALLEST, Tokenizer

CAPTIONS = [
    "a large red circle left of a small blue square on a grey background",
    "A striped GREEN triangle above two yellow stars; isn't it nice?",
    "photo_0012.jpg – buy now!!! 50% off",
    "ein roter Kreis über dem Quadrat, 赤い円",
] * 5
TEXTS = [*CAPTIONS, "", "  spaced \n out  ", "it's we'll they're", "naïve café 😀 &amp; co", "zyx 0123 ...'s"]


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer.train(CAPTIONS, 640)


def test_training_learns_merges_within_the_size_asked_for(small: Tokenizer) -> None:
    assert SMALLEST < small.vocab_size <= 640
    assert len(set(small.vocab.values())) == small.vocab_size == max(small.vocab.values()) + 1
    assert len(small.ids("background")) < len("background")
    assert Tokenizer.train(CAPTIONS, 640).merges == small.merges


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(RecipeError, match="vocab_size"):
        Tokenizer.train(CAPTIONS, 100)


@pytest.mark.parametrize("which", ["small", "clip"])
def test_open_clip_and_transformers_give_the_same_ids(which: str, small: Tokenizer, tmp_path) -> None:
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    ours = small if which == "small" else Tokenizer.clip()
    ours.save(tmp_path)
    simple = SimpleTokenizer(bpe_path=str(tmp_path / BPE_FILE))
    clip = CLIPTokenizer.from_pretrained(str(tmp_path))
    assert simple.vocab_size == ours.vocab_size == len(clip)
    for text in TEXTS:
        assert ours.ids(text) == simple.encode(text), text
    assert ours.encode(TEXTS, 24, pad=0).tolist() == simple(TEXTS, 24).tolist()
    padded = clip([" ".join(text.split()) for text in CAPTIONS], padding="max_length", max_length=24, truncation=True)
    assert padded["input_ids"] == ours.encode(CAPTIONS, 24).tolist()


def test_clip_vocabulary_is_clips(tmp_path) -> None:
    clip = Tokenizer.clip()
    assert (clip.vocab_size, clip.start, clip.end) == (49408, 49406, 49407)
    assert clip.ids("a photo of a cat") == [320, 1125, 539, 320, 2368]


def test_decode_gives_the_text_back(small: Tokenizer, tmp_path) -> None:
    text = "ein roter kreis über dem quadrat , 赤い円"
    row = small.encode([text], 80, pad=0)[0]
    assert small.decode(row) == text
    small.save(tmp_path)
    assert Tokenizer.load(tmp_path).vocab == small.vocab
