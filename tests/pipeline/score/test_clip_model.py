"""CLIP scores equal open_clip's own; missing models and files are named before anything is loaded."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.score.clip_model import ClipModel
from capstan.pipeline.score.clip_score import ClipSimilarity, Embeddings
from capstan.pipeline.score.job import Batch

CAPTIONS = ["a cat", "two dogs in the snow, one of them black, seen from behind and far away", "Ünïcödé 汉字", ""]


def test_scores_and_embeddings_are_open_clips_own(
    clip: Path, noise: Callable[..., np.ndarray], as_jpeg: Callable[..., bytes]
) -> None:
    import open_clip

    clip_model = ClipModel(str(clip), None, "fp32", "score.clip")
    arrays = [noise(n)[: 64 + 8 * n] for n in range(4)]
    batch = Batch(clip_model.load("cpu"), np.stack([clip_model.prepare(rgb) for rgb in arrays]), CAPTIONS)
    found = ClipSimilarity(clip_model).score(batch)["clip_score"]
    kept = Embeddings(clip_model).score(batch)["embedding"]

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip}")
    tokenizer = open_clip.tokenizer.SimpleTokenizer(str(clip / "bpe.txt.gz"), context_length=24)
    with torch.no_grad():
        images = model.eval().encode_image(torch.stack([preprocess(Image.fromarray(p)) for p in arrays]), True)
        texts = model.encode_text(tokenizer(CAPTIONS), True)
    np.testing.assert_allclose(found, (images * texts).sum(-1), atol=1e-5)
    assert np.asarray(kept).dtype == np.float16
    np.testing.assert_allclose(kept, images, atol=1e-3)
    assert io.BytesIO(as_jpeg(arrays[0])).read(2) == b"\xff\xd8"


def test_threads_and_batch_change_no_bit(clip: Path) -> None:
    model = ClipModel(str(clip), None, "fp32", "score.clip")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    captions = [f"image {n}" for n in range(40)]
    one, three = model.load("cpu", threads=1), model.load("cpu", threads=3)
    assert torch.equal(one.images(pixels), three.images(pixels))
    assert torch.equal(one.images(pixels)[:32], one.images(pixels[:32]))
    assert torch.equal(one.texts(captions)[32:], three.texts(captions[32:]))


def test_weights_elsewhere_and_a_torch_file(clip: Path, other_clip: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(other_clip / "open_clip_model.safetensors"), tmp_path / "weights.pt")
    pixels = np.zeros((1, 16, 16, 3), np.uint8)
    mixed = ClipModel(str(clip), str(tmp_path / "weights.pt"), "fp32", "score.clip").load("cpu").images(pixels)
    own = ClipModel(str(other_clip), None, "fp32", "score.clip").load("cpu").images(pixels)
    assert torch.equal(mixed, own)


def test_a_name_of_open_clip_with_a_file(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"not weights")
    model = ClipModel("ViT-B-32", str(tmp_path / "weights.safetensors"), "fp32", "score.clip")
    assert (model.dim, model.preprocessing.width) == (512, 224)
    with pytest.raises(RecipeError, match=r"score.clip.pretrained: cannot load .*weights.safetensors as ViT-B-32"):
        model.load("cpu")


def test_a_full_gpu_is_not_blamed_on_the_weights(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("open_clip.create_model", full)
    with pytest.raises(torch.OutOfMemoryError):
        ClipModel(str(clip), None, "fp32", "score.clip").load("cpu")


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-23", "x.pt", r"score.clip.model: 'ViT-B-23' is neither a folder nor an open_clip model.*ViT-B-32"),
        ("ViT-B-32", None, r"score.clip.pretrained: is missing. Fix: use a checkpoint file, or one of the tags"),
        ("ViT-B-32", "laion2b", r"score.clip.pretrained: 'laion2b' is neither a file nor a tag.*laion2b_"),
        ("ViT-B-32", "openai", r"openai was trained with a different activation than ViT-B-32 has.*ViT-B-32-quickgelu"),
        (
            "ViT-B-32",
            "laion2b_s34b_b79k",
            r"pretrained: cannot download .*copy open_clip_model.safetensors of laion/CLIP",
        ),
    ],
)
def test_an_unknown_model_or_file_is_named(model: str, pretrained: str | None, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ClipModel(model, pretrained, "fp32", "score.clip")


def test_a_missing_file_is_named(clip: Path, tmp_path: Path) -> None:
    model = ClipModel(str(clip), str(tmp_path / "gone.safetensors"), "fp32", "score.clip")
    with pytest.raises(RecipeError, match=r"score.clip.pretrained: no file .*gone.safetensors. Fix: copy gone"):
        _ = model.id


def test_precision_and_weights_make_another_model(clip: Path, other_clip: Path) -> None:
    models = [ClipModel(str(clip), None, "fp32", "a"), ClipModel(str(clip), None, "fp32", "b")]
    models += [ClipModel(str(clip), None, "bf16", "a"), ClipModel(str(other_clip), None, "fp32", "a")]
    assert len({model.id for model in models}) == 3
