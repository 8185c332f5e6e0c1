"""The network of the family `audio`: text encoder, projection of text and timing, and transformer

Noise is that of a variance-preserving path, x = cos φ · x0 + sin φ · ε with σ = tan φ, and the target is v = cos φ · ε
− sin φ · x0 (Salimans & Ho 2022, section 4): what diffusers' EDMDPMSolverMultistepScheduler with `v_prediction` and
`sigma_data` 1 makes of its inputs and outputs. The network's input for it is 0.25 log σ (Karras et al. 2022, table 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from capstan.training.draws import normal, uniform
from capstan.training.models.audio.config import SoundSampling, TransformerSettings


class Noised(NamedTuple):
    """One step's input [B, C, L], noise levels as the network sees them [B], the target, and φ in 0 … 1 [B]."""

    noisy: torch.Tensor
    levels: torch.Tensor
    target: torch.Tensor
    places: torch.Tensor


def noised(latents: torch.Tensor, sampling: SoundSampling, draw: torch.Generator) -> Noised:
    """Noise latents [B, C, L] at angles drawn uniformly between those of the lowest and highest level."""
    low, high = math.atan(sampling.sigma_min), math.atan(sampling.sigma_max)
    angle = low + (high - low) * uniform((len(latents),), draw)
    noise = normal(latents.shape, draw)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    levels = 0.25 * angle.tan().log()
    return Noised(cos * latents + sin * noise, levels, cos * noise - sin * latents, angle / (math.pi / 2))


def scheduler_of(sampling: SoundSampling) -> Any:
    """Return the diffusers scheduler that reverses `noised`."""
    from diffusers import EDMDPMSolverMultistepScheduler

    return EDMDPMSolverMultistepScheduler(
        sigma_min=sampling.sigma_min,
        sigma_max=sampling.sigma_max,
        sigma_data=1.0,
        sigma_schedule="exponential",
        prediction_type="v_prediction",
        final_sigmas_type="zero",
    )


def build_transformer(settings: TransformerSettings, *, channels: int, length: int) -> Any:
    """Return a new StableAudioDiTModel for latents [channels, length]."""
    from diffusers import StableAudioDiTModel

    return StableAudioDiTModel(
        sample_size=length,
        in_channels=channels,
        out_channels=channels,
        num_layers=settings.layers,
        attention_head_dim=settings.head_width,
        num_attention_heads=settings.heads,
        num_key_value_attention_heads=settings.condition_width // settings.head_width,
        cross_attention_dim=settings.condition_width,
        cross_attention_input_dim=settings.condition_width,
        time_proj_dim=settings.time_width,
        global_states_input_dim=2 * settings.condition_width,
    )


def build_projection(text_width: int, settings: TransformerSettings, longest: int) -> Any:
    """Return a new StableAudioProjectionModel for states of a text encoder and times of up to `longest` seconds."""
    from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

    return StableAudioProjectionModel(text_width, settings.condition_width, 0, longest)


class Denoiser(nn.Module):
    """The trainable module. Without a text encoder of its own, `forward` takes a frozen one's states."""

    def __init__(self, transformer: Any, projection: Any, text_encoder: Any | None) -> None:
        super().__init__()
        self.transformer, self.projection_model, self.text_encoder = transformer, projection, text_encoder

    def forward(
        self,
        noisy: torch.Tensor,
        levels: torch.Tensor,
        text: Mapping[str, torch.Tensor],
        seconds: torch.Tensor,
        dropped: torch.Tensor,
    ) -> torch.Tensor:
        """Return the prediction [B, C, L], as StableAudioPipeline calls its parts.

        `text` has `mask` and `ids` or `states`; `seconds` [B, 2] is where the piece starts and how long the whole
        sound is. Of the `dropped` samples [B] the cross-attention sees zeros in place of text and timing; the timing
        that comes before the latents stays.
        """
        from diffusers.models.embeddings import get_1d_rotary_pos_embed

        mask = text["mask"]
        states = text.get("states")
        if states is None:
            assert self.text_encoder is not None
            states = self.text_encoder(text["ids"], attention_mask=mask)[0]
        projected = self.projection_model(states.to(noisy.dtype), seconds[:, 0], seconds[:, 1])
        start, end = projected.seconds_start_hidden_states, projected.seconds_end_hidden_states
        given = projected.text_hidden_states * mask.unsqueeze(-1).to(noisy.dtype)
        given = torch.cat([given, start, end], dim=1)
        given = torch.where(dropped[:, None, None], torch.zeros_like(given), given)
        width = self.transformer.config.attention_head_dim // 2
        rotary = get_1d_rotary_pos_embed(width, noisy.shape[2] + 1, use_real=True, repeat_interleave_real=False)
        prediction: torch.Tensor = self.transformer(
            noisy,
            levels.to(noisy.dtype),
            encoder_hidden_states=given,
            global_hidden_states=torch.cat([start, end], dim=2),
            rotary_embedding=tuple(part.to(noisy.device) for part in rotary),
            return_dict=False,
        )[0]
        return prediction
