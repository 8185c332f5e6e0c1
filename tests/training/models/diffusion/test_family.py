"""The family diffusion: paths against diffusers' schedulers, the text side, the loss and the product."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.config import TrainConfig
from capstan.training.data.dataset import TrainingData
from capstan.training.data.tokenizer import Tokenizer
from capstan.training.family import Sample
from capstan.training.models.autoencoder.family import AutoencoderFamily
from capstan.training.models.diffusion.config import DdpmSettings, FlowSettings
from capstan.training.models.diffusion.family import DiffusionFamily
from capstan.training.models.noise.process import Ddpm, Flow
from capstan.training.product import kind_of, read_facts

UNET = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "heads": 2}
TEXT = {"vocab_size": 600, "length": 16, "width": 16, "layers": 1, "heads": 2}


@pytest.fixture
def data(squares):
    train = TrainConfig.from_section({"model": "autoencoder", "run": "unused", "steps": 1, "data": {"layer": None}})
    return TrainingData(Dataset(Storage(str(squares))), train.data, 0, layer=None)


@pytest.fixture
def autoencoder(data, tmp_path):
    """A run folder with an untrained autoencoder: 16 pixels → latents [4, 8, 8]."""
    small = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
    train = TrainConfig.from_section({"model": "autoencoder", "run": "unused", "steps": 1, "autoencoder": small})
    assets, product = tmp_path / "ae-assets", tmp_path / "ae" / "product"
    assets.mkdir()
    product.mkdir(parents=True)
    torch.manual_seed(0)
    AutoencoderFamily.make_assets(train, data, assets)
    family = AutoencoderFamily(train, assets)
    family.save(family.model, product)
    return str(tmp_path / "ae")


@pytest.fixture
def make(autoencoder, data, tmp_path):
    def build(init=None, **settings):
        section = {"autoencoder": autoencoder, "unet": UNET, "text": TEXT} | settings
        train = TrainConfig.from_section(
            {"model": "diffusion", "run": "unused", "steps": 1, "init": init, "diffusion": section}
        )
        assets = tmp_path / f"assets-{len(list(tmp_path.iterdir()))}"
        assets.mkdir()
        DiffusionFamily.make_assets(train, data, assets)
        torch.manual_seed(0)
        return DiffusionFamily(train, assets)

    return build


# Paths ----------------------------------------------------------------------------------------------------------------


def walk_back(path, velocity, steps=25):
    """Draw with the path's scheduler as the pipelines do; `velocity(x, timestep)` is the model."""
    scheduler = path.scheduler()
    scheduler.set_timesteps(steps)
    noise = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = getattr(
        path, "exact", False
    )  # StableDiffusion3Pipeline, which neither scales noise nor what the model sees
    x = noise if exact else noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        given = x if exact else scheduler.scale_model_input(x, timestep)
        torch.testing.assert_close(given, x)  # the model sees x_t itself, as in training
        x = scheduler.step(velocity(given, timestep), timestep, x, return_dict=False)[0]
    return noise, x


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("sampler", "exact", "steps"),
    [(None, False, 25), ("euler", False, 200), (None, True, 200), ("dpm++", True, 25)],
)
def test_the_flow_scheduler_walks_the_path_that_is_learnt(shift, sampler, exact, steps):
    """For data N(m, s²) the velocity is known, and x0 = m + s·ε is where it leads."""
    m, s = 0.7, 0.5
    path = Flow(FlowSettings(shift=shift), sampler, exact=exact)
    sigmas = iter(path_sigmas(path, steps))

    def velocity(x, timestep):
        t = next(sigmas)
        if exact and sampler is None:  # times as in training: thousandths, which are exact or cut off
            assert float(timestep) == pytest.approx(t * 1000)
        else:
            assert int(timestep) == int(t * 1000)
        variance = (1 - t) ** 2 * s**2 + t**2
        return (t - (1 - t) * s**2) / variance * (x - (1 - t) * m) - m

    noise, x = walk_back(path, velocity, steps)
    torch.testing.assert_close(x, m + s * noise, atol=0.03, rtol=0.03)


def test_a_straight_step_is_the_same_in_both_of_eulers_schedulers():
    """DPM-Solver++ of order 1 stands in for Euler where a pipeline does not take Euler's own scheduler."""
    path = Flow(FlowSettings(shift=2.0), "euler")
    scheduler = path.scheduler()
    scheduler.set_timesteps(7)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for timestep, now, then in zip(scheduler.timesteps, scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
        velocity = torch.sin(5 * x)
        stepped = scheduler.step(velocity, timestep, x, return_dict=False)[0]
        torch.testing.assert_close(stepped, x + (then - now) * velocity, atol=1e-5, rtol=1e-5)
        x = stepped


def path_sigmas(path, steps=25):
    scheduler = path.scheduler()
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.tolist()


@pytest.mark.parametrize("sampler", [None, "dpm++"])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_the_ddpm_scheduler_walks_the_path_that_is_learnt(prediction, sampler):
    m, s = 0.7, 0.5
    path = Ddpm(DdpmSettings(prediction=prediction), sampler)

    def predict(x, timestep):
        alpha = path.alphas[int(timestep)]
        x0 = m + alpha.sqrt() * s**2 / (alpha * s**2 + 1 - alpha) * (x - alpha.sqrt() * m)
        if prediction == "sample":
            return x0
        noise = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * x0

    noise, x = walk_back(path, predict, steps=50)
    torch.testing.assert_close(x, m + s * noise, atol=0.08, rtol=0.08)


def test_a_flow_task_is_noised_at_the_time_it_states():
    latents = torch.zeros(1000, 1, 2, 2)
    task = Flow(FlowSettings()).draw(latents, torch.Generator().manual_seed(0))
    # With x0 = 0: x_t = t ε and the target is ε.
    time = (task.noisy / task.target).mean((1, 2, 3))
    assert ((time * 1000).floor() - task.timesteps).abs().max() <= 1
    assert task.timesteps.min() >= 0
    assert task.timesteps.max() <= 999


def test_exact_times_are_not_cut_off():
    task = Flow(FlowSettings(base=8), size=24, exact=True).draw(
        torch.zeros(500, 1, 2, 2), torch.Generator().manual_seed(0)
    )
    time = (task.noisy / task.target).mean((1, 2, 3))
    torch.testing.assert_close(time * 1000, task.timesteps, atol=1e-2, rtol=1e-4)
    # Logit-normal times have their middle at 1/2; shifted by 24 / 8 it lies at 3·½ / (1 + 2·½).
    assert time.median().item() == pytest.approx(0.75, abs=0.02)
    assert Flow(FlowSettings(base=8), size=24).scheduler().config.flow_shift == 3.0


def test_a_ddpm_task_is_noised_at_the_time_it_states():
    path = Ddpm(DdpmSettings(prediction="epsilon", zero_terminal_snr=False, min_snr=5.0, offset_noise=0.1))
    task = path.draw(torch.zeros(100, 2, 4, 4), torch.Generator().manual_seed(0))
    alpha = path.alphas[task.timesteps][:, None, None, None]
    torch.testing.assert_close(task.noisy, (1 - alpha).sqrt() * task.target)
    assert task.weight.shape == (100,)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"ddpm": {"prediction": "epsilon"}}, r"train\.diffusion\.ddpm: prediction epsilon has no information"),
        ({"ddpm": {"min_snr": 5}}, r"train\.diffusion\.ddpm: min_snr leaves the pure-noise step untrained"),
        ({"ddpm": {"min_snr": 5, "prediction": "sample"}}, r"ddpm: min_snr .* use zero_terminal_snr: false"),
        ({"unet": {"block_out_channels": [8, 12], "norm_num_groups": 4, "heads": 8}}, "12 does not divide by heads"),
        ({"unet": {"block_out_channels": [8], "norm_num_groups": 4, "attention": [True, True]}}, "true or false"),
        ({"text": {"width": 15}}, "does not divide by heads"),
        ({"objective": "flw"}, r"train\.diffusion\.objective"),
    ],
)
def test_wrong_settings_are_refused(settings, problem):
    with pytest.raises(RecipeError, match=problem):
        TrainConfig.from_section(
            {"model": "diffusion", "run": "x", "steps": 1, "diffusion": {"autoencoder": "y"} | settings}
        )


def test_latents_that_cannot_be_halved_are_refused(make):
    deep = UNET | {"block_out_channels": [8] * 5}
    with pytest.raises(
        RecipeError, match=r"train\.diffusion\.unet\.block_out_channels: latents of side .* cannot be halved"
    ):
        make(unet=deep)


# Batches and loss ----------------------------------------------------------------------------------------------------


def test_ids_are_those_of_our_tokenizer(make, data):
    family = make()
    texts = ["a red square, number 3", "", "something quite different, and much too long for this model to read it all"]
    ours = Tokenizer.train(data.captions(), 600)
    torch.testing.assert_close(family.text.ids(texts)["ids"], ours.encode(texts, 16))
    config = family.text.encoders[0].encoder.config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (ours.vocab_size, ours.start, ours.end)


def test_the_same_draw_gives_the_same_loss(make, data):
    family = make()
    batch = family.prepare([data.at(number) for number in range(4)])
    first, again, other = (
        family.loss(family.model, batch, torch.Generator().manual_seed(seed))[0].item() for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_it_learns(make, data, objective):
    family = make(objective=objective)
    family.to(torch.device("cpu"))
    optimizer = torch.optim.Adam(family.model.parameters(), lr=3e-3)
    batch = family.prepare([data.at(number) for number in range(16)])
    losses = []
    for step in range(40):
        loss, _ = family.loss(family.model, batch, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


def test_dropped_captions_become_empty_ones(make, data):
    """With every caption dropped the loss does not depend on the captions."""
    family = make(drop_text=0.999999)
    samples = [data.at(number) for number in range(4)]
    batch = family.prepare(samples)
    other = batch | family.text.ids(["quite other words"] * 4)
    losses = [family.loss(family.model, b, torch.Generator().manual_seed(0))[0].item() for b in (batch, other)]
    assert losses[0] == losses[1]


def test_stored_latents_stand_in_for_images(make, data):
    family = make()
    family.to(torch.device("cpu"))
    samples = [data.at(number) for number in range(4)]
    images = family.prepare(samples)["pictures"].float() / 127.5 - 1
    with torch.no_grad():
        posterior = family.vae.encode(images).latent_dist
    stored = torch.cat([posterior.mean, posterior.std], 1).numpy()
    replaced = [
        Sample(s.key, b"", s.text, s.slot, s.epoch, s.seed, 16, 16, 16, 16, latent=latent)
        for s, latent in zip(samples, stored, strict=True)
    ]
    seen, kept = (
        family.loss(family.model, family.prepare(batch), torch.Generator().manual_seed(0))[0]
        for batch in (samples, replaced)
    )
    torch.testing.assert_close(seen, kept)


# The product ----------------------------------------------------------------------------------------------------------


def test_the_product_is_a_diffusers_pipeline_and_starts_another_run(make, tmp_path):
    family = make()
    product = tmp_path / "run" / "product"
    product.mkdir(parents=True)
    family.save(family.model, product)
    assert kind_of(product) == "diffusion"
    assert read_facts(product)["sampling"] == {"steps": 25, "guidance": 4.0}
    pipeline = StableDiffusionPipeline.from_pretrained(product)
    assert pipeline.tokenizer.model_max_length == 16
    assert pipeline.scheduler.config.prediction_type == "flow_prediction"
    ids = pipeline.tokenizer(["a red square"], padding="max_length", return_tensors="pt").input_ids
    torch.testing.assert_close(ids, family.text.ids(["a red square"])["ids"])

    other = make(init=str(tmp_path / "run"))
    torch.nn.init.zeros_(other.model.unet.conv_in.weight)
    other.start_from(product)
    for name, weight in family.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], weight)


def test_a_pretrained_text_encoder_is_used_as_it_is(make, tmp_path):
    first = make()
    product = tmp_path / "run" / "product"
    product.mkdir(parents=True)
    first.save(first.model, product)
    family = make(text={"pretrained": str(tmp_path / "run")})
    assert family.model.text_encoder is None
    (frozen,) = family.text.modules
    assert frozen in family.frozen
    torch.testing.assert_close(family.text.ids(["a blue square"]), first.text.ids(["a blue square"]))
    for name, weight in first.text.modules[0].state_dict().items():
        torch.testing.assert_close(frozen.state_dict()[name], weight)


def test_a_missing_text_encoder_names_the_field(make):
    with pytest.raises(RecipeError, match=r"train\.diffusion\.text\.pretrained: no text encoder"):
        make(text={"pretrained": "/nowhere"})
