"""The family captioner: what it learns from, its losses, and a product that open_clip and the coca engine open."""

from __future__ import annotations

import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.recaption.config import RecaptionConfig
from capstan.recaption.engines import Request, make
from capstan.recaption.store import write_given_layer
from capstan.training.config import TrainConfig
from capstan.training.data.dataset import TrainingData
from capstan.training.data.tokenizer import Tokenizer
from capstan.training.family import Sample
from capstan.training.models.captioner.family import CaptionerFamily
from capstan.training.models.captioner.model import IGNORED, caption_loss, contrastive_loss
from capstan.training.product import kind_of

SMALL = {
    "vision": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1, "queries": 0},
    "text": {"context_length": 20, "vocab_size": 640, "width": 32, "heads": 2, "layers": 1, "decoder_layers": 1},
}
PLACES = ["top left", "top right", "bottom left", "bottom right"]
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220)}


def configure(**settings: Any) -> TrainConfig:
    section = {"model": "captioner", "run": "unused", "steps": 1, "captioner": {**SMALL, **settings}}
    return TrainConfig.from_section(section)


def drawing(index: int) -> Sample:
    """A square of one of three colours in one of four places, and a caption in one of two slots."""
    colour, place = list(COLOURS)[index % 3], index // 3 % 4
    slot = ["short", "descriptive"][index // 12 % 2]
    pixels = np.full((32, 32, 3), 120, dtype=np.uint8)
    top, left = 20 * (place // 2), 20 * (place % 2)
    pixels[top : top + 12, left : left + 12] = COLOURS[colour]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    text = f"a {colour} square" if slot == "short" else f"a {colour} square at the {PLACES[place]}."
    sizes = dict.fromkeys(("width", "height", "original_width", "original_height"), 32)
    return Sample(key=f"{index:032x}", jpeg=file.getvalue(), text=text, slot=slot, epoch=0, seed=index, **sizes)


class Drawings:
    """24 drawings: every colour, place and slot."""

    def __len__(self) -> int:
        return 24

    def sample(self, index: int, epoch: int = 0) -> Sample:
        return drawing(index)

    def captions(self) -> Any:
        return (drawing(index).text for index in range(24))


def build(train: TrainConfig, folder: Path) -> CaptionerFamily:
    CaptionerFamily.make_assets(train, Drawings(), folder)
    torch.manual_seed(0)
    return CaptionerFamily(train, folder)


@pytest.fixture
def family(tmp_path: Path) -> CaptionerFamily:
    (tmp_path / "assets").mkdir()
    return build(configure(), tmp_path / "assets")


def saved(family: CaptionerFamily, folder: Path) -> Path:
    folder.mkdir()
    family.save(family.model, folder)
    return folder


def test_prompts_are_seen_and_not_learnt(family: CaptionerFamily) -> None:
    samples = [drawing(0), drawing(12)]
    original = Sample(**{**{f: getattr(samples[0], f) for f in Sample.__slots__}, "slot": "original"})
    batch = family.prepare([*samples, original])
    start, end, short = family.tokenizer.start, family.tokenizer.end, family.tokenizer.ids("short:")
    words = family.tokenizer.ids("a red square")
    assert len(short) <= 3
    line = [start, *short, *words, end]
    assert batch["tokens"][0, : len(line)].tolist() == line
    assert not batch["tokens"][0, len(line) :].any()
    labels = batch["labels"][0].tolist()
    assert labels[: len(short)] == [IGNORED] * len(short)
    assert [label for label in labels if label != IGNORED] == [*words, end]
    assert batch["tokens"][2, : len(words) + 2].tolist() == [start, *words, end]
    assert batch["pictures"].shape == (3, 32, 32, 3)
    assert batch["pictures"].dtype == torch.uint8


def test_a_caption_that_is_cut_has_no_end(family: CaptionerFamily) -> None:
    long = Sample(**{**{f: getattr(drawing(0), f) for f in Sample.__slots__}, "text": "red " * 40})
    batch = family.prepare([long])
    assert family.tokenizer.end not in batch["tokens"]
    assert family.tokenizer.end not in batch["labels"]
    assert batch["labels"][0, -1] == family.tokenizer.ids("red")[0]


def test_losses_are_open_clips(family: CaptionerFamily) -> None:
    from open_clip.loss import CoCaLoss

    batch = family.prepare([drawing(index) for index in range(6)])
    loss, metrics = family.loss(family.model, batch, torch.Generator())
    coca, whole = family.model.coca, CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
    images = family.model.normalised(batch["pictures"])
    out = coca(images, batch["tokens"])
    out["labels"] = torch.where(batch["labels"] == IGNORED, 0, batch["labels"])
    theirs = whole(**out, output_dict=True)
    torch.testing.assert_close(metrics["contrastive"], theirs["contrastive_loss"].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(2 * metrics["caption"], theirs["caption_loss"].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, theirs["contrastive_loss"] + theirs["caption_loss"], rtol=1e-4, atol=1e-5)
    assert abs(float(metrics["caption"]) - math.log(family.tokenizer.vocab_size)) < 1.5, "far from chance at the start"


def test_loss_functions_on_cases_with_known_answers() -> None:
    features = torch.eye(3)
    assert float(contrastive_loss(features, features, torch.tensor(100.0))) < 1e-6
    assert float(contrastive_loss(features, features.roll(1, 0), torch.tensor(100.0))) == pytest.approx(100, abs=1)
    logits = torch.zeros(1, 2, 4)
    assert float(caption_loss(logits, torch.tensor([[2, IGNORED]]))) == pytest.approx(math.log(4))


def test_weights_are_a_function_of_the_seed(family: CaptionerFamily, tmp_path: Path) -> None:
    torch.manual_seed(0)
    again = CaptionerFamily(configure(), family.assets)
    for name, tensor in family.model.state_dict().items():
        assert tensor.isfinite().all()
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def fit(family: CaptionerFamily, steps: int, lr: float = 3e-3) -> float:
    optimizer = torch.optim.AdamW(family.model.parameters(), lr=lr)
    for step in range(steps):
        batch = family.prepare([drawing(index) for index in range(step % 2, 24, 2)])
        loss, metrics = family.loss(family.model, batch, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(family.model.parameters(), 1.0)
        optimizer.step()
    return float(metrics["token_accuracy"])


def captions(product: Path) -> list[dict[str, str]]:
    engine = make(RecaptionConfig(model=str(product)))
    images = [engine.prepare(drawing(index).jpeg) for index in range(12)]
    found = engine.caption(images, [Request(str(index), ("short", "descriptive")) for index in range(12)])
    return [{slot: caption.raw for slot, caption in texts.items()} for texts in found]


def test_learns_what_is_where_and_writes_each_slot_in_its_style(family: CaptionerFamily, tmp_path: Path) -> None:
    fit(family, 150)
    product = saved(family, tmp_path / "product")
    for index, texts in enumerate(captions(product)):
        assert texts["short"] == drawing(index).text
        assert texts["descriptive"] == drawing(index + 12).text.replace(".", " .")


def test_product_opens_in_open_clip_itself(family: CaptionerFamily, tmp_path: Path) -> None:
    import open_clip

    product = saved(family, tmp_path / "product")
    assert kind_of(product) == "captioner"
    model = open_clip.create_model(f"local-dir:{product}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{product}", bpe_path=str(product / "bpe.txt.gz"))
    assert tokenizer(["a red square"])[0].tolist() == family.tokenizer.encode(["a red square"], 20, pad=0)[0].tolist()
    batch = family.prepare([drawing(index) for index in range(3)])
    images = family.model.normalised(batch["pictures"])
    with torch.no_grad():
        ours = family.model.coca(images, batch["tokens"])["logits"]
        theirs = model.eval()(images, batch["tokens"])["logits"]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("queries", [0, 6])
def test_fine_tuning_starts_from_a_product(queries: int, tmp_path: Path) -> None:
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
    base = build(configure(vision={**SMALL["vision"], "queries": queries}), tmp_path / "base")
    product = saved(base, tmp_path / "product")
    train = TrainConfig.from_section(
        {
            "model": "captioner",
            "run": "unused",
            "steps": 1,
            "init": str(product),
            "captioner": {"contrastive": 0, "prompts": {"poem": "poem:", "short": "s"}},  # its shape is the product's
        }
    )
    tuned = build(train, tmp_path / "tuned")
    tuned.start_from(product)
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor, tuned.model.state_dict()[name]), name
    assert tuned.prompts["short"] == base.prompts["short"]
    assert tuned.prompts["poem"]
    loss, metrics = tuned.loss(tuned.model, tuned.prepare([drawing(0), drawing(12)]), torch.Generator())
    assert "contrastive" not in metrics
    assert loss.item() == pytest.approx(2 * float(metrics["caption"]))
    other = shutil.copytree(product, tmp_path / "other")
    (other / "open_clip_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(RecipeError, match="captioner"):
        tuned.start_from(other)


def start(product: Path, **settings: Any) -> TrainConfig:
    section = {"model": "captioner", "run": "unused", "steps": 1, "init": str(product), "captioner": settings}
    return TrainConfig.from_section(section)


def test_fine_tuning_may_lengthen_the_context(family: CaptionerFamily, tmp_path: Path) -> None:
    product = saved(family, tmp_path / "product")
    (tmp_path / "tuned").mkdir()
    tuned = build(start(product, text={"context_length": 50}), tmp_path / "tuned")
    tuned.start_from(product)
    table, longer = (one.model.coca.text.positional_embedding for one in (family, tuned))
    assert longer.requires_grad
    assert longer.shape == (51, 32)
    assert torch.equal(longer[:10], table[:10])  # half of so few positions stay
    torch.testing.assert_close(longer[[10, 49, 50]], table[[10, 19, 20]])  # ends, and the class token's
    for name, tensor in family.model.state_dict().items():
        assert name.endswith("text.positional_embedding") or torch.equal(tensor, tuned.model.state_dict()[name]), name
    long = Sample(**{**{f: getattr(drawing(0), f) for f in Sample.__slots__}, "text": "red " * 40})
    batch = tuned.prepare([long, drawing(12)])
    assert tuned.tokenizer.end in batch["tokens"][0]
    tuned.loss(tuned.model, batch, torch.Generator())[0].backward()
    assert longer.grad is not None
    assert longer.grad[30].any()
    engine = make(RecaptionConfig(model=str(saved(tuned, tmp_path / "longer")), slots=["short"]))
    (caption,) = engine.caption([engine.prepare(drawing(0).jpeg)], [Request("a", ("short",))])
    assert caption["short"].tokens > 20  # untrained, it finds no end


def test_settings_beside_a_base_must_be_its_own(family: CaptionerFamily, tmp_path: Path) -> None:
    product = saved(family, tmp_path / "product")
    for name in ("fits", "other"):
        (tmp_path / name).mkdir()
    same = {**SMALL["text"], "vocab_size": None, "tokenizer": str(product)}
    CaptionerFamily.make_assets(start(product, vision=SMALL["vision"], text=same), Drawings(), tmp_path / "fits")
    CaptionerFamily.make_assets(start(product, text={"vocab_size": 640}), Drawings(), tmp_path / "fits")
    Tokenizer.train(["another one of another kind"] * 9, 530).save(tmp_path / "other")
    for part, key, value in (
        ("vision", "patch_size", 16),
        ("vision", "queries", 6),
        ("text", "width", 64),
        ("text", "decoder_layers", 2),
        ("text", "context_length", 10),
        ("text", "vocab_size", 514),
        ("text", "tokenizer", str(tmp_path / "other")),
    ):
        with pytest.raises(RecipeError) as caught:
            CaptionerFamily.make_assets(start(product, **{part: {key: value}}), Drawings(), tmp_path / "fits")
        assert caught.value.field == f"train.captioner.{part}.{key}"
    (tmp_path / "other" / "capstan.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"train\.init: .*has no captioner"):
        CaptionerFamily.make_assets(start(tmp_path / "other"), Drawings(), tmp_path / "fits")


@pytest.mark.parametrize("queries", [0, 6])
@pytest.mark.parametrize("weights", [(0, 1), (1, 0), (1, 2)])
def test_every_weight_learns(queries: int, weights: tuple[float, float], tmp_path: Path) -> None:
    """DDP waits for ever for a gradient that does not come, also where a loss has no weight."""
    vision = {**SMALL["vision"], "queries": queries}
    family = build(configure(vision=vision, contrastive=weights[0], caption=weights[1]), tmp_path)
    loss, _ = family.loss(family.model, family.prepare([drawing(0), drawing(13)]), torch.Generator())
    loss.backward()
    assert [name for name, weight in family.model.named_parameters() if weight.grad is None] == []
    assert all(weight.grad.isfinite().all() for weight in family.model.parameters())


def test_given_captions_reach_training_in_their_slots(squares: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(squares, tmp_path / "ds")
    storage = Storage(str(folder))
    table = Dataset(storage).table("shard-000000", ["key", "caption"]).to_pylist()
    given = {row["key"]: {"short": "a square", "descriptive": f"{row['caption']} on grey"} for row in table}
    write_given_layer(storage, "given", given)
    train = TrainConfig.from_section(
        {
            "model": "captioner",
            "run": "unused",
            "steps": 1,
            "data": {"layer": "given", "blend": {"short": 1, "descriptive": 1}},
            "captioner": SMALL,
        }
    )
    data = TrainingData(Dataset(storage), train.data, 0, layer="given")
    (tmp_path / "assets").mkdir()
    CaptionerFamily.make_assets(train, data, tmp_path / "assets")
    family = CaptionerFamily(train, tmp_path / "assets")
    samples = [data.sample(index) for index in range(20)]
    assert {sample.slot for sample in samples} == {"short", "descriptive"}
    assert {sample.text for sample in samples if sample.slot == "short"} == {"a square"}
    family.prepare(samples)


@pytest.mark.integration
def test_trains_on_deepspeed_and_writes_captions(squares: Path, tmp_path: Path) -> None:
    """In a process of its own, ZeRO-2: the whole way from a recipe to captions."""
    from capstan.pipeline.config import Recipe
    from capstan.training.launch import train

    section = {
        "model": "captioner",
        "run": str(tmp_path / "run"),
        "steps": 2,
        "batch": 8,
        "data": {"layer": None},
        "engine": {"launcher": "local", "zero": 2},
        "captioner": {**SMALL, "vision": {**SMALL["vision"], "image_size": 16}},
    }
    summary = train(Recipe(dataset=str(squares), train=section))
    assert summary["steps"] == 2
    engine = make(RecaptionConfig(model=str(tmp_path / "run"), max_tokens=4))
    requests = [Request(key, ("short", "descriptive")) for key in "ab"]
    texts = engine.caption([np.zeros((16, 16, 3), np.uint8)] * 2, requests)
    assert [set(captions) for captions in texts] == [{"short", "descriptive"}] * 2


def test_settings_that_do_not_fit_are_refused() -> None:
    for settings, problem in (
        ({"vision": {**SMALL["vision"], "patch_size": 7}}, "does not divide"),
        ({"vision": {**SMALL["vision"], "width": 64}}, "must be text.width"),
        ({"prompts": {"original": "x"}}, "prompts"),
        ({"prompts": {"short": "x", "long": "x"}}, "differ"),
        ({"contrastive": 0, "caption": 0}, "both 0"),
    ):
        with pytest.raises(RecipeError, match=problem):
            configure(**settings)


def test_a_slot_without_a_prompt_is_refused(family: CaptionerFamily) -> None:
    poem = Sample(**{**{f: getattr(drawing(0), f) for f in Sample.__slots__}, "slot": "poem"})
    with pytest.raises(RecipeError, match=r"train\.captioner\.prompts\.poem"):
        family.prepare([poem])


def test_the_default_shape_is_coca_vit_b_32s_with_a_longer_context() -> None:
    import open_clip

    from capstan.training.models.captioner.config import CaptionerSettings

    ours = CaptionerSettings().architecture(49408)
    theirs = open_clip.get_model_config("coca_ViT-B-32")
    assert ours["text_cfg"].pop("context_length") == 128
    assert ours["multimodal_cfg"].pop("context_length") == 128
    del theirs["text_cfg"]["context_length"], theirs["multimodal_cfg"]["context_length"]
    for part in ("vision_cfg", "text_cfg"):
        assert {key: ours[part][key] for key in theirs[part]} == theirs[part]
    json.dumps(ours)


def test_captions_longer_than_the_context_are_counted(family: CaptionerFamily, caplog) -> None:
    class Few:
        def __init__(self, texts: list[str]) -> None:
            self.samples = [replace(drawing(0), text=text) for text in texts]

        def __len__(self) -> int:
            return len(self.samples)

        def sample(self, index: int, epoch: int = 0) -> Sample:
            return self.samples[index]

    family.inspect(Few(["a red square"] * 3))
    assert not caplog.records
    long = "a red square " * family.length
    family.inspect(Few(["a red square", long, "a red square", "a red square"]))
    cut = (
        len([family.tokenizer.start, *family._prompt(drawing(0).slot), *family.tokenizer.ids(long), 0]) - family.length
    )
    assert f"25% of captions are longer than the {family.length} tokens" in caplog.text
    assert (
        f"lose their last {cut} on average (4 captions counted). Fix: raise train.captioner.text.context" in caplog.text
    )
