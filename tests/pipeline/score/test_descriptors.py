"""Copy descriptors from an ONNX file: what is taken, what is refused, and what an image's descriptor is."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_file import write_colour_descriptor

from capstan.pipeline.config import CopyDetection
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.score.descriptors import CopyDescriptors
from capstan.pipeline.score.scorer import Sample

Noise = Callable[..., np.ndarray]


def scorer(file: Path, **settings: Any) -> CopyDescriptors:
    return CopyDescriptors(CopyDetection(model=str(file), **{"size": 64} | settings))


def of(made: CopyDescriptors, rgb: np.ndarray) -> np.ndarray:
    return np.asarray(made.score([Sample("", b"", np.ascontiguousarray(rgb))])["descriptor"][0], np.float32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_colour_descriptor(tmp_path / "colours.onnx")


def test_a_descriptor_has_length_1_and_survives_edits(file: Path, noise: Noise) -> None:
    made = pickle.loads(pickle.dumps(scorer(file)))
    assert [str(field.type) for field in made.columns] == ["fixed_size_list<item: halffloat>[32]"]
    whole = of(made, noise(1))
    assert abs(float(whole @ whole) - 1) < 0.01
    for edited in (noise(1)[:, ::-1], noise(1)[4:-4, 4:-4], noise(1)[::2, ::2]):
        assert float(whole @ of(made, edited)) > 0.99
    assert float(whole @ of(made, np.full((96, 96, 3), 250, np.uint8))) < 0.9


def test_the_size_is_the_networks_unless_stated(tmp_path: Path, file: Path) -> None:
    own = CopyDetection(model=str(write_colour_descriptor(tmp_path / "48.onnx", side=48)))
    assert CopyDescriptors(own).settings()["size"] == 48
    assert CopyDescriptors(CopyDetection(model=str(file))).settings()["size"] == 320


def test_planes_and_pixels_in_either_order_are_the_same(file: Path, tmp_path: Path, noise: Noise) -> None:
    other = write_colour_descriptor(tmp_path / "last.onnx", channels_last=True, side=64)
    assert np.allclose(of(scorer(file), noise(2)), of(scorer(other), noise(2)), atol=2e-3)


def test_mean_and_std_are_applied_to_rgb_of_0_to_1(file: Path) -> None:
    red = np.zeros((9, 30, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    weight = np.random.default_rng(0).normal(0, 1, (32, 3))
    random = np.random.default_rng(0)
    random.normal(0, 1, (32, 3))
    pixel = (np.array([1, 0, 0]) - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    expected = np.maximum(weight @ pixel + random.normal(0, 1, 32), 0)
    found = of(scorer(file, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7]), red)
    assert np.allclose(found, expected / np.linalg.norm(expected), atol=2e-3)


def test_the_identity_is_of_the_file_and_the_preparation(file: Path, tmp_path: Path) -> None:
    same = write_colour_descriptor(tmp_path / "copy.onnx")
    other = write_colour_descriptor(tmp_path / "other.onnx", seed=1)
    ids = [scorer(file).id, scorer(same).id, scorer(other).id, scorer(file, size=65).id]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3
    assert scorer(file, threshold=0.3).id == ids[0]
    assert scorer(file, std=[1, 1, 1]).id != ids[0]


def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path: Path, file: Path) -> None:
    cases: list[tuple[Callable[[Path], object], dict[str, Any], str]] = [
        (lambda f: f.write_bytes(b"no network"), {}, "model: cannot load .* Fix: use an .onnx file"),
        (lambda f: f.write_bytes(file.read_bytes()[:-900]), {}, "model: cannot load .* Fix: use an .onnx file"),
        (lambda f: None, {}, "model: no file .* Fix: copy x.onnx"),
        (lambda f: write_colour_descriptor(f, side=48), {}, "size: is 64, .* takes images of 48×48. Fix: set size: 48"),
        (
            lambda f: write_colour_descriptor(f, external=True),
            {},
            "in other files. Fix: export .* to one file",
        ),
        (lambda f: write_colour_descriptor(f, dim=2), {}, "no descriptor of a test image .2 numbers"),
        (lambda f: write_colour_descriptor(f, kernel=65), {}, "no descriptor of a test image"),
        (
            lambda f: f.write_bytes(file.read_bytes().replace(b"\x08\x03\x0a", b"\x08\x04\x0a", 1)),
            {},
            "dedup.copies.model: .* Fix: ",
        ),
    ]
    for make, settings, message in cases:
        bad = tmp_path / "x.onnx"
        bad.unlink(missing_ok=True)
        make(bad)
        with pytest.raises(RecipeError, match=message) as raised:
            _ = scorer(bad, **settings).id
        assert "\n" not in str(raised.value)


def test_open_nsfw_needs_no_file(noise: Noise) -> None:
    made = pickle.loads(pickle.dumps(CopyDescriptors(CopyDetection(model="open_nsfw"))))
    assert made.descriptor.dim == 1024
    assert float(of(made, noise(1)) @ of(made, noise(1)[4:-4, 4:-4])) > float(of(made, noise(1)) @ of(made, noise(2)))
    with pytest.raises(ValueError, match=r"size is of an \.onnx file"):
        CopyDetection(model="open_nsfw", size=224)


def test_an_image_without_a_direction_is_an_error_of_that_image(tmp_path: Path) -> None:
    made = scorer(write_colour_descriptor(tmp_path / "x.onnx", kernel=3), mean=[0, 0, 0], std=[1, 1, 1])
    with pytest.raises(ValueError, match="the descriptor is zero"):
        of(made, np.zeros((70, 70, 3), np.uint8))


@pytest.mark.parametrize(
    "settings", [{"std": [0, 1, 1]}, {"mean": [1, 2]}, {"threshold": 0}, {"size": 4}, {"mean": [float("nan"), 0, 0]}]
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        CopyDetection(model="x.onnx", **settings)
