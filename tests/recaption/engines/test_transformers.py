"""The transformers engine: any image-text-to-text model in a folder, and captions that depend on their image only."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vision_models
from PIL import Image

from capstan.pipeline.errors import MissingExtra, RecipeError
from capstan.recaption.config import RecaptionConfig
from capstan.recaption.engines import Caption, CaptionEngine, Request, TextEngine, make
from capstan.recaption.engines.transformers import TransformersEngine
from capstan.recaption.generate import write
from capstan.recaption.lint.linter import Settings

SLOTS = ("short", "descriptive")
PROMPTS = {"short": "write one short caption", "descriptive": "describe the image: {original}"}
SIZES = [(28, 28), (40, 30), (20, 60), (90, 20), (28, 28), (64, 64)]


def jpeg(number: int) -> bytes:
    width, height = SIZES[number % len(SIZES)]
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST).save(file, "JPEG", quality=95)
    return file.getvalue()


REQUESTS = [Request(f"image {n}", SLOTS, "the red circle " * (n % 5)) for n in range(10)]


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_models.llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_models.qwen2_vl(tmp_path_factory.mktemp("qwen"))


def engine(folder: Path, **recipe: Any) -> TransformersEngine:
    section = {"engine": "transformers", "model": str(folder), "max_tokens": 8, "prompts": PROMPTS, **recipe}
    made = make(RecaptionConfig.model_validate(section))
    assert isinstance(made, TransformersEngine)
    return made


def captions(folder: Path, rows: Any = range(10), attempt: int = 0, **recipe: Any) -> list[dict[str, Caption]]:
    made = engine(folder, **recipe)
    return made.caption([made.prepare(jpeg(n)) for n in rows], [REQUESTS[n] for n in rows], attempt=attempt)


@pytest.mark.parametrize(
    ("model", "decoding"),
    [
        ("llava", {}),
        ("qwen", {}),
        ("qwen", {"method": "beam", "beams": 2}),
    ],
)
def test_captions_do_not_depend_on_the_batch(model: str, decoding: Any, request: pytest.FixtureRequest) -> None:
    """Other sizes, companions and orders; images and prompts of different lengths; other numbers of threads."""
    import torch

    folder: Path = request.getfixturevalue(model)
    expected = captions(folder, decoding=decoding)
    assert len({found["descriptive"].raw for found in expected}) > 5, "the test needs captions that differ"
    assert captions(folder, range(9, -1, -1), batch=7, decoding=decoding)[::-1] == expected
    for number in (0, 4):
        assert captions(folder, [number], decoding=decoding) == [expected[number]]
    try:
        torch.set_num_threads(2)
        assert captions(folder, range(3, 7), decoding=decoding) == expected[3:7]
    finally:
        torch.set_num_threads(1)


def own(folder: Path, cases: list[tuple[bytes, str]]) -> list[Caption]:
    """What the model's own `generate` gives for (JPEG, prompt), one at a time and without any padding, as its card
    would do it.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    found = []
    for data, text in cases:
        with Image.open(io.BytesIO(data)) as image:
            content = [{"type": "image", "image": image.convert("RGB")}, {"type": "text", "text": text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        made = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :].tolist()
        end = processor.tokenizer.eos_token_id
        kept = made[: made.index(end)] if end in made else made
        raw = processor.tokenizer.decode(kept, skip_special_tokens=True).strip()
        found.append(Caption(raw, len(kept), "end" if end in made else "length", 0))
    return found


def test_the_models_own_generate_gives_the_same_tokens(llava: Path) -> None:
    prompts = [PROMPTS["descriptive"].replace("{original}", request.original.strip()) for request in REQUESTS[:6]]
    expected = own(llava, [(jpeg(number), prompt) for number, prompt in enumerate(prompts)])
    assert [found["descriptive"] for found in captions(llava)[:6]] == expected


@pytest.mark.parametrize("model", ["llava", "qwen"])
def test_padding_next_to_longer_prompts_changes_no_caption(
    model: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of one to sixty words in one batch give what each gives alone, and what it gives with no padding at all.

    The engine puts prompts of like length together; here also all of them into one batch, so that the shortest is
    mostly padding.
    """
    from capstan.recaption.engines import transformers

    folder: Path = request.getfixturevalue(model)
    asked = [
        Request(f"image {n}", ("descriptive",), "the red circle " * words) for n, words in enumerate((0, 1, 4, 20))
    ]
    made = engine(folder)
    images = [made.prepare(jpeg(number)) for number in range(len(asked))]

    def together() -> list[Caption]:
        return [found["descriptive"] for found in made.caption(images, asked)]

    prompts = [PROMPTS["descriptive"].replace("{original}", one.original.strip()) for one in asked]
    expected = own(folder, [(jpeg(number), prompt) for number, prompt in enumerate(prompts)])
    assert len({caption.raw for caption in expected}) > 1, "the test needs captions that differ"
    alone = [made.caption([image], [one])[0]["descriptive"] for image, one in zip(images, asked, strict=True)]
    assert together() == alone == expected
    monkeypatch.setattr(transformers, "_by_length", lambda lengths: [list(range(len(lengths)))])
    assert together() == expected
    # And the test can tell: captions are others once the model takes padding for words.
    inputs = transformers._Loaded._inputs
    monkeypatch.setattr(
        transformers._Loaded,
        "_inputs",
        lambda *asked: (found := inputs(*asked)) | {"attention_mask": found["attention_mask"] * 0 + 1},
    )
    assert together() != expected


def test_the_original_caption_is_quoted_on_one_line(llava: Path) -> None:
    made = engine(llava)
    assert made.uses_original
    assert not engine(llava, prompts={}).uses_original
    image = made.prepare(jpeg(0))
    asked = [Request("a", ("descriptive",), text) for text in ("a dog", "a  dog\n", "a cat")]
    one, same, other = made.caption([image] * 3, asked)
    assert one == same
    assert one != other


def test_attempts_draw_with_seeds_of_their_own(llava: Path) -> None:
    first, second, third = (captions(llava, range(4), attempt=number) for number in range(3))
    assert {caption.seed for found in first for caption in found.values()} == {0}
    seeds = [caption.seed for found in second + third for caption in found.values()]
    assert len(set(seeds)) == 16
    assert first != second != third
    assert captions(llava, range(4), attempt=1, batch=1) == second


def test_only_what_is_asked_for_is_written(llava: Path) -> None:
    made = engine(llava)
    image = made.prepare(jpeg(1))
    found = made.caption([image, image], [Request("a", ("short",)), Request("a", SLOTS)])
    assert [list(one) for one in found] == [["short"], ["short", "descriptive"]]
    assert found[0]["short"] == found[1]["short"]


@pytest.mark.parametrize("model", ["llava", "qwen"])
def test_answers_without_images(model: str, request: pytest.FixtureRequest) -> None:
    made = engine(request.getfixturevalue(model), decoding={"method": "top_p"})
    assert isinstance(made, CaptionEngine)
    assert isinstance(made, TextEngine)
    one, other = made.write(["describe the red circle", "describe"], seeds=[1, 2], max_tokens=5)
    assert 0 < one.tokens <= 5
    assert made.write(["describe"], seeds=[2], max_tokens=5) == [other]


def test_a_language_model_writes_and_refuses_images(tmp_path: Path) -> None:
    made = engine(vision_models.language_model(tmp_path))
    assert made.write(["describe the circle"], seeds=[0], max_tokens=4)[0].tokens > 0
    with pytest.raises(RecipeError, match="takes no images"):
        made.caption([made.prepare(jpeg(0))], [REQUESTS[0]])


def test_description_changes_with_what_changes_captions_and_with_nothing_else(llava: Path, tmp_path: Path) -> None:
    base = engine(llava).describe()
    moved = shutil.copytree(llava, tmp_path / "elsewhere")
    assert engine(moved, batch=3, device="cpu").describe() == base
    (moved / "README.md").write_text("about")
    assert engine(moved).describe() == base
    json.dumps(base)
    for change in (
        {"prompts": {}},
        {"system": "be brief"},
        {"max_side": 64},
        {"max_tokens": 9},
        {"decoding": {"method": "top_p"}},
        {"precision": "bf16"},
    ):
        assert engine(llava, **change).describe() != base, change
    (moved / "chat_template.jinja").write_text("{{ messages }}")
    assert engine(moved).describe() != base


def test_travels_without_weights_and_its_images_are_bounded(llava: Path) -> None:
    made = engine(llava, max_side=32)
    image = made.prepare(jpeg(3))
    assert image.shape == (7, 32, 3)
    assert made._loaded is None
    found = made.caption([image], REQUESTS[:1])
    assert len(sent := pickle.dumps(made)) < 5000
    assert pickle.loads(sent).caption([image], REQUESTS[:1]) == found
    with pytest.raises(OSError, match=r"(?i)truncated"):
        made.prepare(jpeg(5)[:600])


def test_what_cannot_work_is_said_with_the_field_and_the_fix(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match=r"folder \./nowhere does not exist"):
        engine(Path("./nowhere"), model="./nowhere")
    with pytest.raises(RecipeError, match=r"has no config\.json"):
        engine(tmp_path)
    with pytest.raises(RecipeError, match="no prompt for 'poem'"):
        engine(llava, slots=["poem"], prompts={})
    plain = shutil.copytree(llava, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(RecipeError, match="no chat template"):
        engine(plain).write(["x"], seeds=[0], max_tokens=1)
    broken = shutil.copytree(llava, tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"recaption\.model: cannot load"):
        engine(broken).write(["x"], seeds=[0], max_tokens=1)

    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'capstan-t2i\[recaption\]'"):
        engine(llava).write(["x"], seeds=[0], max_tokens=1)


def test_an_image_that_a_processor_refuses_does_not_take_the_batch_with_it(qwen: Path) -> None:
    """Qwen2-VL's processor raises for images of more than 200 to 1."""
    made, file = engine(qwen), io.BytesIO()
    Image.new("RGB", (13000, 64), (200, 30, 30)).save(file, "JPEG")
    inputs = [made.prepare(jpeg(n)) for n in range(3)]
    inputs.insert(1, made.prepare(file.getvalue()))
    rows = write(made, inputs, REQUESTS[:4], Settings(retries=0), {})
    assert [rows[n]["short"].finish == "none" for n in range(4)] == [False, True, False, False]
    assert rows[1]["short"].flags == ("engine_error", "failed")
    assert "aspect ratio" in rows[1]["short"].raw
    alone = write(made, inputs[2:], REQUESTS[2:4], Settings(retries=0), {})
    assert rows[2:] == alone


@pytest.mark.parametrize("method", ["greedy", "top_p", "beam"])
def test_a_models_own_generation_config_does_not_leak_in(llava: Path, tmp_path: Path, method: str) -> None:
    """Decoding is the recipe's, also in a retry; only the special tokens are the model's."""
    folder = tmp_path / "llava"
    shutil.copytree(llava, folder)
    file = folder / "generation_config.json"
    leaky = {
        "do_sample": True,
        "temperature": 0.3,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
        "num_beams": 3,
        "num_return_sequences": 2,
        "length_penalty": 3.0,
        "repetition_penalty": 1.9,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 5,
        "return_dict_in_generate": True,
        "output_scores": True,
        "max_length": 3,
        "max_time": 0.0,
        "stop_strings": ["a"],
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | leaky))
    decoding = {"method": method, "beams": 2, "seed": 3}
    assert captions(folder, range(4), decoding=decoding) == captions(llava, range(4), decoding=decoding)
    assert captions(folder, range(4), 1, decoding=decoding) == captions(llava, range(4), 1, decoding=decoding)
