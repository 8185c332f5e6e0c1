"""The family autoencoder: its loss, its latents' scale, and the folder it leaves behind."""

import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.config import TrainConfig
from capstan.training.data.dataset import TrainingData
from capstan.training.data.transforms import psnr, square, to_signed
from capstan.training.models.autoencoder.family import AutoencoderFamily, load_autoencoder
from capstan.training.models.autoencoder.model import kl_divergence, latent_moments, standardise
from capstan.training.product import kind_of, read_facts

SMALL = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}


def configure(**settings):
    section = {"model": "autoencoder", "run": "unused", "steps": 1, "autoencoder": SMALL | settings}
    return TrainConfig.from_section(section)


@pytest.fixture
def data(squares):
    train = configure()
    return TrainingData(Dataset(Storage(str(squares))), train.data, 0, layer=None)


@pytest.fixture
def family(data, tmp_path):
    train = configure()
    torch.manual_seed(0)
    AutoencoderFamily.make_assets(train, data, tmp_path)
    return AutoencoderFamily(train, tmp_path)


def fit(family, data, steps):
    """A few steps of plain Adam; gives the PSNR at each."""
    optimizer = torch.optim.Adam(family.model.parameters(), lr=3e-3)
    batch = family.prepare([data.at(number) for number in range(32)])
    reached = []
    for step in range(steps):
        loss, metrics = family.loss(family.model, batch, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        reached.append(float(metrics["psnr"]))
    return reached


def test_the_size_is_that_of_the_stored_images(family):
    assert family.size == 16
    assert family.factor == 2
    assert family.describe()["latents"] == [4, 8, 8]


def test_a_size_that_the_levels_do_not_divide_names_the_field(data, tmp_path):
    with pytest.raises(RecipeError, match=r"train\.autoencoder\.size: 15 pixels do not divide by 2"):
        AutoencoderFamily.make_assets(configure(size=15), data, tmp_path)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"block_out_channels": [8, 18]}, "18 does not divide by norm_num_groups"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "one block for each"),
        ({"chanels": 4}, "unknown key"),
    ],
)
def test_wrong_settings_are_refused(settings, problem):
    with pytest.raises(RecipeError, match=problem):
        configure(**settings)


def test_the_same_draw_gives_the_same_loss(family, data):
    batch = family.prepare([data.at(number) for number in range(4)])
    first, again, other = (
        family.loss(family.model, batch, torch.Generator().manual_seed(seed))[0].item() for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_the_posterior_starts_narrow(family, data):
    batch = family.prepare([data.at(0)])
    result = family.model(to_signed(batch["pictures"]), torch.zeros(1, 4, 8, 8))
    torch.testing.assert_close(result.log_variance, torch.full((1, 4, 8, 8), -6.0))


def test_it_learns(family, data):
    reached = fit(family, data, 60)
    assert reached[-1] > reached[0] + 6


def test_kl_is_the_closed_form():
    mean, variance = torch.tensor([[0.5, -1.0]]), torch.tensor([[0.2, 3.0]])
    posterior = torch.distributions.Normal(mean, variance.sqrt())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1)).sum()
    torch.testing.assert_close(kl_divergence(mean, variance.log())[0], expected)


def test_standardising_changes_the_latents_and_nothing_else(family, data):
    fit(family, data, 5)
    vae = family.model.vae.eval()
    images = to_signed(family.prepare([data.sample(index) for index in range(32)])["pictures"])
    with torch.no_grad():
        before = vae.decode(vae.encode(images).latent_dist.mean).sample
        standardise(vae, images)
        mean, std = latent_moments(vae, images)
        after = vae.decode(vae.encode(images).latent_dist.mean).sample
    torch.testing.assert_close(mean, torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(std, torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)
    assert vae.config.scaling_factor == 1.0


def test_without_the_convolutions_there_is_one_factor(data, family):
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    images = to_signed(family.prepare([data.sample(index) for index in range(8)])["pictures"])
    _, std = standardise(vae, images)
    assert vae.config.scaling_factor == pytest.approx(1 / math.sqrt(float(std.square().mean())), rel=1e-4)


def test_the_product_opens_in_diffusers_and_starts_another_run(family, data, tmp_path):
    product = tmp_path / "run" / "product"
    product.mkdir(parents=True)
    images = to_signed(family.prepare([data.sample(index) for index in range(8)])["pictures"])
    with torch.no_grad():
        expected = family.model.eval().vae(images).sample
    family.save(family.model, product)
    vae = AutoencoderKL.from_pretrained(product)
    with torch.no_grad():
        torch.testing.assert_close(vae(images).sample, expected, atol=1e-3, rtol=1e-3)
    assert kind_of(product) == "autoencoder"
    assert read_facts(product)["size"] == 16
    assert load_autoencoder(str(tmp_path / "run"), "x").config.latent_channels == 4

    other = AutoencoderFamily(configure(), tmp_path)
    other.start_from(product)
    with torch.no_grad():
        torch.testing.assert_close(other.model.vae(images).sample, vae(images).sample)
    wider = AutoencoderFamily(configure(block_out_channels=[8, 32]), tmp_path)
    with pytest.raises(RecipeError, match=r"train\.init"):
        wider.start_from(product)


def test_a_path_without_a_model_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"train\.diffusion\.autoencoder: no model at"):
        load_autoencoder(str(tmp_path / "nothing"), "train.diffusion.autoencoder")
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(RecipeError, match="no finished model yet"):
        load_autoencoder(str(tmp_path), "x")


def test_square_cuts_scales_and_mirrors():
    import simplejpeg

    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 32:] = 255
    jpeg = simplejpeg.encode_jpeg(wide, quality=100)
    middle = square(jpeg, 16)
    assert middle.shape == (16, 16, 3)
    assert middle[:, 0].mean() < 5
    assert middle[:, -1].mean() > 250
    assert square(jpeg, 16, flip=True)[:, 0].mean() > 250
    cuts = {square(jpeg, 16, rng=np.random.default_rng(seed)).mean().round() for seed in range(8)}
    assert len(cuts) > 2
    assert square(jpeg, 48).shape == (48, 48, 3)


def test_psnr_of_a_known_error():
    a = torch.zeros(1, 3, 4, 4)
    assert psnr(a, a + 0.2).item() == pytest.approx(10 * math.log10(4 / 0.04), abs=1e-3)
