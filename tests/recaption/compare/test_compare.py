"""The better captions win by every measure that can tell. The judge is one whose answers are known, or a real CLIP."""

from __future__ import annotations

import doctest
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_dataset import as_if_a_model_wrote_it, image

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.html import page
from capstan.pipeline.records import make_key
from capstan.pipeline.report.layer_diffs import comparisons
from capstan.pipeline.storage import Storage
from capstan.recaption import store
from capstan.recaption.compare import metrics
from capstan.recaption.compare.clip import Clip
from capstan.recaption.compare.compare import compare

COUNT = 24
NUMBERS = list(range(COUNT))


class Judge:
    """Knows images by their bytes, and what a sentence says by the number in it; numbers in a row are alike."""

    name = "judge"

    def __init__(self) -> None:
        self.number = {image(number): number for number in NUMBERS}

    def fits(self, text: str) -> bool:
        return len(text.split()) <= 20

    def _at(self, numbers: Sequence[int | None]) -> np.ndarray:
        made = np.zeros((len(numbers), COUNT + 1), np.float32)  # the last: says nothing of any image
        for row, number in enumerate(numbers):
            made[row, COUNT] = number is None
            for place in [] if number is None else NUMBERS:
                made[row, place] = 0.5 ** min(abs(place - number), 10)
        return made / np.linalg.norm(made, axis=1, keepdims=True)

    def images(self, files: Sequence[bytes]) -> np.ndarray:
        return self._at([self.number[data] for data in files])

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        found = [re.search(r"\d+", text) for text in texts]
        return self._at([int(match[0]) if match else None for match in found])


@pytest.fixture
def layers(build: Callable[..., Storage]) -> Storage:
    """Layers `right`, `wrong` in every third image, and `vague`, whose second sentence is not in the image."""
    storage = build([NUMBERS[:10], NUMBERS[10:20], NUMBERS[20:]])
    keys = [make_key(str(number)) for number in NUMBERS]

    def write(name: str, say: Callable[[int], str]) -> None:
        store.write_given_layer(
            storage, name, {key: {"descriptive": say(n), "short": f"a {n}"} for n, key in enumerate(keys)}
        )

    write("right", lambda n: f"one sees number {n}. it is a {n} on a wall.")
    write("wrong", lambda n: f"one sees number {n if n % 3 else n + 1}. it is a {n if n % 3 else n + 1} on a wall.")
    write("vague", lambda n: f"the image shows number {n}. it is as good as nothing at all")
    return storage


def run(storage: Storage, a: str, b: str, **options: int | str) -> dict:
    return compare(storage, a, b, clip=Judge(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("module", [metrics])
def test_examples_in_the_docstrings_hold(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]


def test_captions_of_the_right_image_win(layers: Storage) -> None:
    found = run(layers, "right", "wrong")
    assert found["pictures"] == COUNT
    assert found["a_wins_by_mean"]["rate"] == pytest.approx(
        16 / 24 / 2 + 8 / 24, abs=1e-3
    )  # those that differ, and ties
    assert found["a_wins_by_mean"]["low"] < found["a_wins_by_mean"]["rate"] < found["a_wins_by_mean"]["high"]
    assert found["a"]["recall"] == 1.0
    assert found["b"]["recall"] == pytest.approx(16 / 24, abs=0.05)
    assert found["recall_by_chance"] == 0.1
    assert found["a"]["clip_mean"] > found["b"]["clip_mean"]
    other = run(layers, "wrong", "right")
    assert other["a_wins_by_mean"]["rate"] == pytest.approx(1 - found["a_wins_by_mean"]["rate"])
    assert (other["a"], other["b"]) == (found["b"], found["a"])


def test_what_is_not_there_shows_in_the_worst_sentence(layers: Storage) -> None:
    found = run(layers, "right", "vague")
    assert found["a_wins_by_min"]["rate"] == 1.0
    assert found["b"]["clip_min"] == pytest.approx(0, abs=0.1)
    assert found["b"]["clip_mean"] == pytest.approx(50, abs=0.1)  # one sentence of two
    assert found["b"]["flags"] == {"opener": 1.0}
    assert found["a"]["flags"] == {}
    assert found["b"]["openers"]["commonest"] == {"the image shows": 1.0}
    assert (found["b"]["openers"]["entropy_bits"], found["b"]["style"]["full_stop"]) == (0.0, 0.0)


def test_the_original_and_slots_can_be_compared(layers: Storage) -> None:
    found = run(layers, "original", "right")
    assert (found["a"]["name"], found["a"]["clip_mean"]) == ("original", pytest.approx(100, abs=0.1))  # "alt 7"
    found = run(layers, "right:short", "right")
    assert (found["a"]["name"], found["a"]["words"]["mean"]) == ("right.short", 2.0)
    assert (found["b"]["words"]["mean"], found["b"]["words"]["p50"]) == (11.0, 11.0)
    with pytest.raises(RecipeError, match="descriptive, short"):
        run(layers, "right:long", "wrong")
    with pytest.raises(RecipeError, match="is also A"):
        run(layers, "right", "right:descriptive")
    with pytest.raises(RecipeError, match="right, wrong, vague"):
        run(layers, "none", "right")


def test_what_is_published(layers: Storage) -> None:
    found = run(layers, "right", "wrong")
    assert store.list_layers(layers) == ["right", "wrong", "vague"]
    numbers = json.loads(layers.read("captions/diff-right-wrong.json"))
    assert numbers == {name: value for name, value in found.items() if name not in ("json", "png", "html")}
    with Image.open(io.BytesIO(layers.read("captions/diff-right-wrong.png"))) as sheet:
        assert sheet.format == "PNG"
        assert sheet.width == 1100
        assert sheet.height > 16 * 180  # sixteen images
    html = layers.read("captions/diff-right-wrong.html").decode()
    assert html.count("<img") == 16
    assert "://" not in re.sub(r"data:image[^\"]*", "", html)  # nothing is loaded from elsewhere
    worst = html.index("Where right fits best")
    wrong = [n for n in NUMBERS if n % 3 == 0]
    assert all(f"number {n}." in html[worst:] for n in wrong)


def test_images_without_a_caption_are_counted_and_left_out(layers: Storage) -> None:
    name = store.file_name("wrong", "shard-000000")
    table = layers.read_table(name)
    layers.write_table(name, table.slice(4))  # two images' rows
    layers.delete(store.file_name("wrong", "shard-000002"))
    found = run(layers, "right", "wrong")
    assert found["pictures"] == 18
    assert (found["a"]["without"], found["b"]["without"]) == (0, 6)
    assert run(layers, "right", "wrong", sample=5)["pictures"] == 5
    as_if_a_model_wrote_it(layers, "wrong")  # which has not come to the last shard yet
    found = run(layers, "right", "wrong")
    assert (found["pictures"], found["a"]["without"], found["b"]["without"]) == (18, 0, 2)
    assert found["a"]["captions"] == 20


def test_the_report_shows_the_comparison(layers: Storage) -> None:
    found = run(layers, "right", "wrong")
    shown = "".join(comparisons(layers))
    assert 'href="./captions/diff-right-wrong.html"' in shown
    assert f">{page.number(found['b']['clip_mean'])}<" in shown
    assert f"{found['a_wins_by_mean']['rate']:.1%}" in shown


def test_captions_are_untrusted(layers: Storage) -> None:
    key = make_key("0")
    store.write_given_layer(
        layers,
        "evil",
        {key: {"descriptive": "<script>alert(7)</script> is 9"}}
        | {make_key(str(n)): {"descriptive": f"a dog {n} " + "x" * 3000} for n in NUMBERS[1:]},
    )
    run(layers, "evil", "right")
    assert "<script>" not in layers.read("captions/diff-evil-right.html").decode()


def test_ties_are_shared_out() -> None:
    images = np.eye(4, dtype=np.float32)
    near = metrics.neighbours(images, 3)
    same = np.full((4, 4), 0.5, np.float32)
    assert metrics.recall(images, same, near) == pytest.approx(0.25)  # chance
    assert metrics.recall(images, images, near) == 1.0
    assert metrics.wins(np.ones(10), np.ones(10))["rate"] == 0.5


def test_hard_neighbours_are_the_nearest() -> None:
    angles = np.array([0.0, 0.1, 0.25, 2.0, 2.1])
    images = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    assert metrics.neighbours(images, 2).tolist() == [[1, 2], [0, 2], [1, 0], [4, 2], [3, 2]]


def test_a_clip_of_open_clip_in_a_folder(clip_folder: Path) -> None:
    import open_clip
    import torch

    model = open_clip.CLIP(**json.loads((clip_folder / "open_clip_config.json").read_text())["model_cfg"]).eval()
    open_clip.load_checkpoint(model, str(clip_folder / "open_clip_model.safetensors"))
    clip = Clip(str(clip_folder))
    texts = ["a dog", "two cats on a mat"]
    with torch.inference_mode():
        expected = model.encode_text(open_clip.SimpleTokenizer(context_length=12)(texts), normalize=True).numpy()
    np.testing.assert_allclose(clip.texts(texts), expected, atol=1e-6)
    seen = clip.images([image(0), image(1)])
    assert seen.shape == (2, 16)
    np.testing.assert_allclose(np.linalg.norm(seen, axis=1), 1, atol=1e-5)
    assert clip.fits("one two three four five six seven eight nine")
    assert not clip.fits("one two three four five six seven eight nine ten eleven twelve")
    long = "a dog and a cat and a bird and a fish and a horse sit on a mat. so it is."
    parts = metrics.chunks(long, clip.fits)
    assert len(parts) == 4
    assert all(clip.fits(part) for part in parts)
    assert " ".join(parts) == long


@pytest.mark.parametrize(
    ("model", "pretrained", "match"),
    [
        ("ViT-B-99", None, "--model: 'ViT-B-99' is neither a folder nor an open_clip model"),
        ("ViT-B-32", "nonesuch", "--pretrained: 'nonesuch' is neither"),
        (".", None, "has no open_clip_config.json"),
    ],
)
def test_judges_that_are_not_there(model: str, pretrained: str | None, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        Clip(model, pretrained)


def test_an_image_or_caption_that_the_clip_cannot_take_is_named_and_the_others_are_judged(
    layers: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    class Moody(Judge):
        def images(self, files: Sequence[bytes]) -> np.ndarray:
            if image(5) in files:
                raise RuntimeError("no such kernel")
            return super().images(files)

        def texts(self, texts: Sequence[str]) -> np.ndarray:
            if any("number 11" in text for text in texts):
                raise IndexError("token out of range")
            return super().texts(texts)

    found = compare(layers, "right", "vague", clip=Moody())  # type: ignore[arg-type]
    assert found["pictures"] == COUNT - 2
    assert found["unscored"] == {
        make_key("5"): "model_error: RuntimeError: no such kernel",
        make_key("11"): "model_error: IndexError: token out of range",
    }
    assert found["a_wins_by_min"]["rate"] == 1.0
    assert f"image {make_key('5')} is not judged: model_error: RuntimeError" in caplog.text
    assert "unscored" not in compare(layers, "right", "vague", clip=Judge())  # type: ignore[arg-type]
