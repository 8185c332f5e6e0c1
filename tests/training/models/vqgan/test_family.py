"""The family vqgan: its codebook, its loss, the folder it leaves behind, and how that is measured."""

import json

import pytest
import torch
from diffusers import VQModel

from capstan.pipeline.config import WorldSource
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.config import TrainConfig
from capstan.training.data.dataset import TrainingData
from capstan.training.data.transforms import to_signed
from capstan.training.evaluate import evaluate
from capstan.training.models.autoencoder.family import load_autoencoder
from capstan.training.models.vqgan.family import VqganFamily, load_vq
from capstan.training.models.vqgan.model import choices, codebook_loss, nearest, revival_loss, usage
from capstan.training.product import kind_of, read_facts

SMALL = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4, "codes": 32}


def configure(**settings):
    section = {"model": "vqgan", "run": "unused", "steps": 1, "vqgan": SMALL | settings}
    return TrainConfig.from_section(section)


@pytest.fixture
def data(squares):
    train = configure()
    return TrainingData(Dataset(Storage(str(squares))), train.data, 0, layer=None)


@pytest.fixture
def family(data, tmp_path):
    train = configure()
    torch.manual_seed(0)
    VqganFamily.make_assets(train, data, tmp_path)
    return VqganFamily(train, tmp_path)


def fit(family, data, steps):
    """A few steps of plain Adam; gives the metrics at each."""
    optimizer = torch.optim.Adam(family.model.parameters(), lr=3e-3)
    batch = family.prepare([data.at(number) for number in range(32)])
    seen = []
    for step in range(steps):
        loss, metrics = family.loss(family.model, batch, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append({name: float(value) for name, value in metrics.items()})
    return seen


def test_latents_are_drawn_to_codes_by_beta_and_codes_to_latents_in_full():
    latents = torch.tensor([[1.0], [2.0]]).view(1, 2, 1, 1).requires_grad_()
    codes = torch.tensor([[0.0], [4.0]]).view(1, 2, 1, 1).requires_grad_()
    loss = codebook_loss(latents, codes, 0.25)
    assert loss.item() == pytest.approx(1.25 * (1 + 4) / 2)
    loss.backward()
    difference = (latents - codes).detach()
    torch.testing.assert_close(codes.grad, -difference)  # d/de mean of two (e − z)²
    torch.testing.assert_close(latents.grad, 0.25 * difference)


def test_the_gradient_passes_straight_through_the_choice(family, data):
    images = to_signed(family.prepare([data.at(number) for number in range(4)])["pictures"])
    made, latents, codes, indices, _ = family.model(images)
    torch.testing.assert_close(codes.movedim(1, -1), family.model.codebook[indices])
    latents.retain_grad()
    (to_codebook,) = torch.autograd.grad(made.sum(), family.model.codebook, retain_graph=True, allow_unused=True)
    assert to_codebook is None  # the images' loss moves no code …
    made.sum().backward()
    assert latents.grad.abs().max() > 0  # … and goes on into the encoder
    assert family.model.vq.encoder.conv_in.weight.grad.abs().max() > 0


def test_the_choice_is_that_of_diffusers(family, data):
    images = to_signed(family.prepare([data.at(number) for number in range(4)])["pictures"])
    with torch.no_grad():
        ours, latents, _, indices, _ = family.model(images)
        torch.testing.assert_close(ours, family.model.vq(images).sample)
        _, _, (_, _, theirs) = family.model.vq.quantize(latents)
    assert torch.equal(indices.flatten(), theirs)
    assert torch.equal(nearest(latents, family.model.codebook), indices)


def test_codes_that_nothing_chose_are_drawn_to_the_nearest_latent():
    latents = torch.tensor([0.0, 1.0, 5.0]).view(1, 1, 1, 3).requires_grad_()
    codebook = torch.tensor([[0.5], [-2.0], [9.0], [4.0]], requires_grad=True)  # the second and third are left behind
    indices, closest = choices(latents, codebook)
    assert indices.flatten().tolist() == [0, 0, 3]
    loss = revival_loss(latents, codebook, indices, closest)
    assert loss.item() == pytest.approx((2.0**2 + 4.0**2) / 4)
    loss.backward()
    torch.testing.assert_close(codebook.grad, torch.tensor([[0.0], [-1.0], [2.0], [0.0]]))
    assert latents.grad is None


@pytest.mark.parametrize(
    ("indices", "perplexity", "used"), [([0, 1, 2, 3], 4.0, 0.5), ([5] * 4, 1.0, 0.125), ([0, 0, 1, 1], 2.0, 0.25)]
)
def test_usage_counts_codes_and_their_entropy(indices, perplexity, used):
    seen = usage(torch.tensor([indices]), 8)
    assert [float(value) for value in seen] == pytest.approx([perplexity, used])


def test_the_first_codes_are_latents(family, data, tmp_path):
    batch = family.prepare([data.at(number) for number in range(32)])
    _, metrics = family.loss(family.model, batch, torch.Generator())
    uniform = VqganFamily(configure(start="uniform"), tmp_path)
    _, collapsed = uniform.loss(uniform.model, batch, torch.Generator())
    assert metrics["perplexity"] > 2 * collapsed["perplexity"]
    assert metrics["codebook"] < collapsed["codebook"] / 2


def test_it_learns(family, data):
    seen = fit(family, data, 40)
    assert seen[-1]["psnr"] > seen[0]["psnr"] + 4
    assert seen[-1]["perplexity"] > 4
    assert {"reconstruction", "codebook", "codes_used"} <= seen[-1].keys()


def test_the_product_opens_in_diffusers_and_starts_another_run(family, data, tmp_path):
    product = tmp_path / "run" / "product"
    product.mkdir(parents=True)
    fit(family, data, 3)
    images = to_signed(family.prepare([data.sample(index) for index in range(8)])["pictures"])
    family.save(family.model.eval(), product)
    vq = VQModel.from_pretrained(product)
    with torch.no_grad():
        torch.testing.assert_close(vq(images).sample, family.model(images).images)
        scaled = vq.encode(family.measured()).latents * vq.config.scaling_factor
    assert float(scaled.std()) == pytest.approx(1, rel=1e-3)
    assert kind_of(product) == "vqgan"
    facts = read_facts(product)
    assert (facts["size"], facts["factor"], facts["codes"]) == (16, 2, 32)
    assert 1 <= facts["codebook_use"]["perplexity"] <= 32
    (product / "capstan.json").unlink()
    assert kind_of(product) == "vqgan"  # also what other tools wrote

    other = VqganFamily(configure(pretrained=str(tmp_path / "run")), tmp_path)
    assert torch.equal(other.model.codebook, family.model.codebook)
    more = VqganFamily(configure(codes=64), tmp_path)
    with pytest.raises(RecipeError, match=r"train\.init"):
        more.start_from(product)


def test_a_codebook_is_not_cut_into_parts():
    section = {"model": "vqgan", "run": "unused", "steps": 1, "vqgan": SMALL}
    with pytest.raises(RecipeError, match=r"train\.engine\.zero: .*codebook.*zero: 2"):
        TrainConfig.from_section(section | {"engine": {"strategy": "deepspeed", "zero": 3}})
    assert TrainConfig.from_section(section | {"engine": {"strategy": "deepspeed", "zero": 2}}).engine.zero == 2


def test_where_an_autoencoder_kl_is_needed_a_vq_model_is_refused(family, tmp_path):
    family.model.vq.save_pretrained(tmp_path / "vq")
    with pytest.raises(RecipeError, match=r"train\.diffusion\.autoencoder: .* is a VQModel.*model: autoencoder"):
        load_autoencoder(str(tmp_path / "vq"), "train.diffusion.autoencoder")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(RecipeError, match="is not a VQModel"):
        load_vq(str(tmp_path / "other"), "train.vqgan.pretrained")


def test_it_is_measured_by_psnr_and_by_its_codes(family, tmp_path):
    family.save(family.model.eval(), tmp_path)
    result = evaluate(tmp_path, count=6, world=WorldSource(scenes=10, size=16))
    measures = result["measures"]
    assert result["kind"] == "vqgan"
    assert 0 < measures["psnr"]["value"] < 60
    assert 1 <= measures["perplexity"]["value"] <= 32
    assert 1 / 32 <= measures["codes_used"]["value"] <= 1
    assert measures["codes_used"]["chance"] == pytest.approx(1 / 32, abs=1e-4)
    assert (tmp_path / "evaluation.png").is_file()
