"""Posterior and variational bound agree with diffusers' scheduler and with the integrals that they stand for."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler

from capstan.training.models.noise.objectives import cosine_betas, linear_betas
from capstan.training.models.pixels.process import PixelDdpm
from capstan.training.models.pixels.settings import PixelNoise
from capstan.training.models.pixels.variance import Posterior, discretised_log_likelihood, gaussian_kl


def process(**noise: object) -> PixelDdpm:
    return PixelDdpm(PixelNoise.model_validate(noise), sampler="ddpm", variance="learned")


def test_the_schedules_are_those_of_diffusers() -> None:
    for ours, name in ((linear_betas(), "linear"), (cosine_betas(), "squaredcos_cap_v2")):
        theirs = DDPMScheduler(beta_schedule=name).betas
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    for schedule in ("linear", "cosine", "scaled_linear"):
        made = process(schedule=schedule)
        torch.testing.assert_close(made.alphas, made.scheduler().alphas_cumprod, rtol=1e-4, atol=1e-7)


def test_a_step_of_diffusers_has_our_posterior() -> None:
    """With the true x0 as its guess, the scheduler's step is μ̃ plus noise of the variance that we bound."""
    made = process()
    posterior, scheduler = Posterior(made.alphas), made.scheduler()
    scheduler.set_timesteps(1000)
    clean, noise = torch.rand(1, 3, 4, 4) * 1.6 - 0.8, torch.randn(1, 3, 4, 4)
    raw = torch.full_like(clean, 0.4)
    for time in (1, 30, 500, 999):
        times = torch.tensor([time])
        alpha = made.alphas[times].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        draws = torch.Generator().manual_seed(0)
        after = scheduler.step(torch.cat([noise, raw], 1), time, noisy, generator=draws).prev_sample
        again = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        ours = posterior.mean(clean, noisy, times) + (0.5 * posterior.log_variance(raw, times)).exp() * again
        torch.testing.assert_close(ours, after, rtol=1e-3, atol=1e-3)


def test_the_bound_is_least_at_the_truth_and_teaches_the_variance_alone() -> None:
    made = process()
    posterior = Posterior(made.alphas)
    clean, noise, times = torch.rand(4, 3, 4, 4) - 0.5, torch.randn(4, 3, 4, 4), torch.tensor([0, 5, 400, 999])
    alpha = made.alphas[times].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    low = torch.full_like(clean, -1.0, requires_grad=True)
    best = posterior.bound(clean, noisy, times, clean, low)
    torch.testing.assert_close(best[1:], torch.zeros(3), atol=1e-3, rtol=0)  # KL of a Gaussian to itself
    assert (posterior.bound(clean, noisy, times, clean + 0.1, low)[:3] > best[:3]).all()
    best.sum().backward()
    assert low.grad is not None
    torch.testing.assert_close(low.grad[1:], torch.zeros_like(low.grad[1:]), atol=1e-2, rtol=0)


def test_the_divergence_is_the_integral() -> None:
    torch.manual_seed(0)
    mean, other, log, log_other = (torch.tensor(value) for value in (0.3, -0.2, -0.5, 0.4))
    draws = mean + (0.5 * log).exp() * torch.randn(400_000)
    p = torch.distributions.Normal(mean, (0.5 * log).exp()).log_prob(draws)
    q = torch.distributions.Normal(other, (0.5 * log_other).exp()).log_prob(draws)
    torch.testing.assert_close(gaussian_kl(mean, log, other, log_other), (p - q).mean(), rtol=1e-2, atol=1e-2)


def test_the_masses_of_all_values_of_a_pixel_add_up() -> None:
    values = torch.arange(256) / 127.5 - 1
    for mean, log_std in ((0.1, -3.0), (-1.0, -1.0), (0.9, 0.0)):
        masses = discretised_log_likelihood(values, torch.tensor(mean), torch.tensor(log_std)).exp()
        torch.testing.assert_close(masses.sum(), torch.tensor(1.0), rtol=1e-4, atol=1e-4)
