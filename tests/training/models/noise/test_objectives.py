"""The objectives against closed forms and against diffusers' own schedulers."""

import math

import pytest
import torch

from capstan.training.models.noise import objectives as o


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def pair(draw):
    return torch.randn(6, 4, 3, 3, generator=draw), torch.randn(6, 4, 3, 3, generator=draw)


@pytest.mark.parametrize("zero", [False, True])
def test_the_schedule_is_that_of_diffusers(zero):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero
    ).alphas_cumprod
    torch.testing.assert_close(o.cumulative_alphas(zero_terminal_snr=zero), theirs, atol=1e-5, rtol=1e-4)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_step():
    before, after = o.cumulative_alphas(), o.cumulative_alphas(zero_terminal_snr=True)
    assert after[-1] == 0
    torch.testing.assert_close(after[0], before[0])
    assert (after.diff() < 0).all()


def test_diffuse_keeps_unit_variance(draw):
    x0, noise = torch.randn(200_000, generator=draw), torch.randn(200_000, generator=draw)
    for alpha in (0.1, 0.5, 0.9):
        noisy = o.diffuse(x0[None], noise[None], torch.tensor([alpha]))
        assert noisy.var().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_target_gives_back_the_data(kind, pair):
    x0, noise = pair
    alpha = torch.linspace(0.05, 0.95, 6)
    noisy = o.diffuse(x0, noise, alpha)
    target = o.diffusion_target(kind, x0, noise, alpha)
    torch.testing.assert_close(o.predicted_x0(kind, target, noisy, alpha), x0, atol=1e-5, rtol=1e-5)


def test_v_is_noise_at_the_data_and_minus_the_data_at_the_noise(pair):
    x0, noise = pair
    torch.testing.assert_close(o.diffusion_target("v_prediction", x0, noise, torch.ones(6)), noise)
    torch.testing.assert_close(o.diffusion_target("v_prediction", x0, noise, torch.zeros(6)), -x0)


def test_min_snr_weights_agree_over_parametrisations():
    """All three weigh the error in x0 by min(SNR, γ): w_ε·SNR = w_x0 and w_v·(SNR + 1) = w_x0."""
    alpha = torch.tensor([0.01, 0.3, 0.7, 5 / 6, 0.99])
    snr = alpha / (1 - alpha)
    clamped = snr.clamp(max=5.0)
    torch.testing.assert_close(o.min_snr_weight("sample", alpha), clamped)
    torch.testing.assert_close(o.min_snr_weight("epsilon", alpha), clamped / snr)
    torch.testing.assert_close(o.min_snr_weight("v_prediction", alpha), clamped / (snr + 1))


def test_min_snr_weights_are_finite_at_both_ends():
    for kind in ("epsilon", "sample", "v_prediction"):
        assert torch.isfinite(o.min_snr_weight(kind, torch.tensor([0.0, 1.0]))).all()


def test_the_flow_target_is_the_derivative_of_the_path(pair):
    x0, noise = (part.double() for part in pair)
    time = torch.linspace(0.1, 0.9, 6, dtype=torch.double)
    slope = (o.interpolate(x0, noise, time + 1e-6) - o.interpolate(x0, noise, time - 1e-6)) / 2e-6
    torch.testing.assert_close(slope, o.flow_target(x0, noise), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(o.interpolate(x0, noise, torch.zeros(6)), x0)
    torch.testing.assert_close(o.interpolate(x0, noise, torch.ones(6)), noise)


def test_logit_normal_times_have_the_stated_distribution(draw):
    """P(t < x) = Φ((logit x − m) / s)."""
    times = o.logit_normal_times(200_000, draw, mean=0.5, std=1.2)
    for x in (0.2, 0.5, 0.8):
        expected = 0.5 * (1 + math.erf((math.log(x / (1 - x)) - 0.5) / 1.2 / math.sqrt(2)))
        assert (times < x).float().mean().item() == pytest.approx(expected, abs=0.005)


def test_shift_keeps_the_ends_and_undoes_itself():
    time = torch.linspace(0, 1, 11)
    shifted = o.shift_times(time, 3.0)
    torch.testing.assert_close(shifted[[0, -1]], torch.tensor([0.0, 1.0]))
    assert shifted[5].item() == pytest.approx(0.75)
    torch.testing.assert_close(o.shift_times(shifted, 1 / 3.0), time)
    torch.testing.assert_close(o.shift_times(time, 1.0), time)


def test_resolution_shift_keeps_how_certain_the_data_is():
    """An image of k equal values c: its noisy mean tells c with an error of t / (1−t) / √k, which must not change."""
    time = torch.linspace(0.1, 0.9, 9)
    shifted = o.shift_times(time, o.resolution_shift(1024.0, 64.0))
    torch.testing.assert_close(shifted / (1 - shifted) / 1024**0.5, time / (1 - time) / 64**0.5)
    assert o.resolution_shift(64, 64) == 1


def test_offset_noise_is_one_value_a_channel(draw):
    added = o.offset_noise(torch.zeros(500, 4, 8, 8), 0.1, draw)
    assert (added == added[:, :, :1, :1]).all()
    assert added[:, :, 0, 0].std().item() == pytest.approx(0.1, rel=0.05)


def test_weighted_mse_is_the_mean_of_weighted_samples():
    prediction, target = torch.zeros(2, 3), torch.tensor([[1.0, 1, 1], [2, 2, 2]])
    assert o.weighted_mse(prediction, target).item() == pytest.approx(2.5)
    assert o.weighted_mse(prediction, target, torch.tensor([1.0, 0.5])).item() == pytest.approx(1.5)


def test_rows_are_dropped_at_the_stated_rate(draw):
    assert o.drop_rows(100_000, 0.1, draw).float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert not o.drop_rows(100, 0.0, draw).any()


def test_encoders_are_dropped_independently(draw):
    """Each with probability p, two with p², all three with p³: SD3's 0.463 leaves a tenth without text."""
    mask = o.drop_encoders(200_000, 3, 0.463, draw)
    torch.testing.assert_close(mask.float().mean(0), torch.full((3,), 0.463), atol=0.005, rtol=0)
    assert mask[:, :2].all(1).float().mean().item() == pytest.approx(0.463**2, abs=0.005)
    assert mask.all(1).float().mean().item() == pytest.approx(0.0992, abs=0.003)
