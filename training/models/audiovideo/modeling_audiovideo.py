"""Text → clips with their sound, by one model over both latents; this file travels with the weights

    model = AutoModel.from_pretrained(DIR, trust_remote_code=True)
    made = model.generate(["first a red circle enters and moves left."], seeds=[0])
    made.frames                     uint8 [N, F, H, W, 3], model.config.fps per second
    made.sounds                     float32 [N, values, channels] in −1 … 1, model.config.rate per second

It needs torch, diffusers and transformers, not Capstan. With latents of frames x and of sound y, noise ε and η, and one
time t for both (rectified flow, Liu et al. 2022, eq. 1):

    x_t = (1 − t) x + t ε      y_t = (1 − t) y + t η      targets ε − x and η − y
    c, v_y = Coupling(x_t, y_t, t, text)                  v_x = UNet(x_t, t, text) with c added to its middle

Coupling is a transformer over the tokens of all frames, of the sound, and of the text, so that each frame sees all of
the sound and the sound sees all frames; blocks are modulated by the time (Peebles & Xie 2023, DiT, section 3.2,
adaLN-Zero). Frames and sound share the axis of time: their positions are seconds.

Shapes: B clips, F frames, C and K channels of latents, h × w and L their sides, T text tokens, W the width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, AutoencoderOobleck, UNetMotionModel
from torch import nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PretrainedConfig, PreTrainedModel

STEPS = 1000  # timesteps of the UNet at time 1
_SLOWEST, _FASTEST = 16.0, 0.04  # seconds: periods of the positions' waves


class AudioVideoConfig(PretrainedConfig):  # type: ignore[misc,unused-ignore]
    """Configurations of the parts, the form of clips and sounds, and defaults of drawing.

    `coupling` is {width, layers, heads, patch, sound_patch}; patches are in latents, of a frame's side and of sound.
    """

    model_type = "audiovideo"

    def __init__(
        self,
        unet: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        vae: dict[str, Any] | None = None,
        oobleck: dict[str, Any] | None = None,
        coupling: dict[str, int] | None = None,
        frames: int = 16,
        fps: float = 8.0,
        size: int = 256,
        rate: int = 44_100,
        values: int = 88_064,
        shift: float = 1.0,
        steps: int = 25,
        guidance: float = 4.0,
        **others: Any,
    ) -> None:
        self.unet, self.text, self.vae, self.oobleck = unet or {}, text or {}, vae or {}, oobleck or {}
        self.coupling = {"width": 512, "layers": 8, "heads": 8, "patch": 4, "sound_patch": 1} | (coupling or {})
        self.frames, self.fps, self.size, self.rate, self.values = frames, fps, size, rate, values
        self.shift, self.steps, self.guidance = shift, steps, guidance
        super().__init__(**others)


class Made(NamedTuple):
    """Clips, uint8 [N, F, H, W, 3], and their sounds, float32 [N, values, channels]."""

    frames: torch.Tensor
    sounds: torch.Tensor


def waves(places: torch.Tensor, width: int, slowest: float, fastest: float) -> torch.Tensor:
    """Return sines and cosines [..., width] of places [...], of periods between slowest and fastest."""
    periods = torch.logspace(math.log10(slowest), math.log10(fastest), width // 2, device=places.device)
    angles = 2 * math.pi * places.float()[..., None] / periods
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Block(nn.Module):
    """A transformer block, modulated by the time; at first it changes nothing."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        nn.init.zeros_(self.modulation[1].weight)
        nn.init.zeros_(self.modulation[1].bias)

    def forward(self, tokens: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(time)[:, None].chunk(6, dim=-1)
        count, length, width = tokens.shape
        normed = functional.layer_norm(tokens, (width,)) * (1 + scale) + shift
        query, key, value = self.qkv(normed).view(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(count, length, width)
        tokens = tokens + gate * self.out(seen)
        normed = functional.layer_norm(tokens, (width,)) * (1 + scale_mlp) + shift_mlp
        changed: torch.Tensor = tokens + gate_mlp * self.mlp(normed)
        return changed


class Coupling(nn.Module):
    """Noisy frames and sound, text → what the UNet's middle is to know of each frame, and the sound's velocity."""

    def __init__(self, config: AudioVideoConfig, channels: int, middle: int, sound: int, text: int) -> None:
        super().__init__()
        shape = config.coupling
        self.width, self.patch, self.step = shape["width"], shape["patch"], shape["sound_patch"]
        hop = math.prod(config.oobleck["downsampling_ratios"])
        self.frame_s, self.note_s = 1 / config.fps, hop * self.step / config.rate  # seconds of a frame, of a token
        side = config.unet["sample_size"] // self.patch
        self.from_frames = nn.Conv2d(channels, self.width, self.patch, stride=self.patch)
        self.from_sound = nn.Conv1d(sound, self.width, self.step, stride=self.step)
        self.from_text = nn.Linear(text, self.width)
        self.places = nn.Parameter(torch.empty(side * side, self.width))
        self.kinds = nn.Parameter(torch.empty(3, self.width))
        self.time = nn.Sequential(nn.Linear(self.width, self.width), nn.SiLU(), nn.Linear(self.width, self.width))
        self.blocks = nn.ModuleList(Block(self.width, shape["heads"]) for _ in range(shape["layers"]))
        self.last = nn.LayerNorm(self.width)
        self.to_middle, self.to_sound = nn.Linear(self.width, middle), nn.Linear(self.width, sound * self.step)
        for start in (self.places, self.kinds):
            nn.init.normal_(start, std=0.02)
        for end in (self.to_middle, self.to_sound):
            nn.init.zeros_(end.weight)
            nn.init.zeros_(end.bias)

    def forward(
        self, video: torch.Tensor, sound: torch.Tensor, times: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features [B · F, middle, h / patch, w / patch] of noisy frames [B, C, F, h, w], and the velocity of a
        noisy sound [B, K, L], at times [B] in 0 … 1, for states of a text [B, T, channels].
        """
        count, _, frames = video.shape[:3]
        cells = self.from_frames(video.transpose(1, 2).flatten(0, 1))  # [B · F, W, h / patch, w / patch]
        high, wide = cells.shape[2:]
        cells = cells.flatten(2).transpose(1, 2).unflatten(0, (count, frames)) + self.places
        cells = cells + self._seconds(frames, self.frame_s, video)[:, None] + self.kinds[0]
        notes = self.from_sound(sound).transpose(1, 2)
        notes = notes + self._seconds(notes.shape[1], self.note_s, video) + self.kinds[1]
        words = self.from_text(text) + self.kinds[2]
        tokens = torch.cat([cells.flatten(1, 2), notes, words], dim=1)
        at = self.time(waves(times * STEPS, self.width, 2 * math.pi * 10_000, 2 * math.pi).to(tokens.dtype))
        for block in self.blocks:
            tokens = block(tokens, at)
        tokens = self.last(tokens)
        seen, heard = tokens[:, : frames * high * wide], tokens[:, frames * high * wide : -words.shape[1]]
        middle = self.to_middle(seen).unflatten(1, (frames, high, wide)).flatten(0, 1).permute(0, 3, 1, 2)
        return middle, self.to_sound(heard).unflatten(2, (-1, self.step)).permute(0, 2, 1, 3).flatten(2)

    def _seconds(self, count: int, length: float, like: torch.Tensor) -> torch.Tensor:
        """Return positions [count, W] of the middles of tokens that last `length` seconds."""
        middles = (torch.arange(count, device=like.device) + 0.5) * length
        return waves(middles, self.width, _SLOWEST, _FASTEST).to(like.dtype)


class Denoiser(nn.Module):
    """What is trained: the UNet with its motion modules, the text encoder, and the coupling."""

    def __init__(self, unet: Any, text_encoder: Any, config: AudioVideoConfig) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        middle, sound = unet.config.block_out_channels[-1], config.oobleck["decoder_input_channels"]
        self.coupling = Coupling(config, unet.config.in_channels, middle, sound, text_encoder.config.hidden_size)
        self.halved = 2 ** (len(unet.config.block_out_channels) - 1)  # side of latents / side of the UNet's middle

    def forward(
        self, video: torch.Tensor, sound: torch.Tensor, times: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the velocities of noisy frames [B, C, F, h, w] and sound [B, K, L] at times [B], for tokens [B, T]."""
        text = self.text_encoder(ids)[0].to(video.dtype)
        middle, heard = self.coupling(video, sound, times, text)
        size = [side // self.halved for side in video.shape[-2:]]
        middle = functional.interpolate(middle, size=size, mode="nearest")
        each = text.repeat_interleave(video.shape[2], dim=0)
        seen = self.unet(
            video, times * STEPS, encoder_hidden_states=each, mid_block_additional_residual=middle, return_dict=False
        )
        return seen[0], heard

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the UNet's activations in the backward pass: less memory, about a third more time."""
        self.unet.enable_gradient_checkpointing()


class AudioVideoModel(PreTrainedModel):  # type: ignore[misc,unused-ignore]
    """The denoiser and both autoencoders. The tokenizer's files lie next to the weights."""

    config_class = AudioVideoConfig
    main_input_name = "video"

    def __init__(self, config: AudioVideoConfig, denoiser: Denoiser | None = None) -> None:
        """Build all parts; or take a denoiser."""
        super().__init__(config)
        if denoiser is None:
            unet = UNetMotionModel.from_config(config.unet)
            denoiser = Denoiser(unet, CLIPTextModel(CLIPTextConfig(**config.text)), config)
        self.denoiser = denoiser
        self.vae = AutoencoderKL.from_config(config.vae)
        self.oobleck = AutoencoderOobleck.from_config(config.oobleck)
        self._tokenizer: Any = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep what __init__ set."""

    def ids(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the tokens of texts, int64 [N, T]."""
        if self._tokenizer is None:
            self._tokenizer = CLIPTokenizer.from_pretrained(self.name_or_path)
        words = self._tokenizer
        found = words(
            list(texts), padding="max_length", max_length=words.model_max_length, truncation=True, return_tensors="pt"
        )
        ids: torch.Tensor = found.input_ids
        return ids.to(self.device)

    @torch.no_grad()  # type: ignore[untyped-decorator,unused-ignore]
    def generate(  # type: ignore[override,unused-ignore]
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        negative: str = "",
    ) -> Made:
        """Draw a clip with its sound per prompt; each one's noise depends on its seed, not on the others."""
        steps, scale = steps or self.config.steps, self.config.guidance if guidance is None else guidance
        video, sound = self._noise(list(range(len(prompts))) if seeds is None else seeds)
        ids = self.ids([*prompts, *[negative] * len(prompts)])
        ids = ids if scale != 1 else ids[: len(prompts)]
        times = torch.linspace(1, 0, steps + 1)
        times = (self.config.shift * times / (1 + (self.config.shift - 1) * times)).tolist()
        for now, then in itertools.pairwise(times):
            repeated = len(ids) // len(prompts)
            at = torch.full((len(ids),), now, device=self.device, dtype=self.dtype)
            found = self.denoiser(video.repeat(repeated, 1, 1, 1, 1), sound.repeat(repeated, 1, 1), at, ids)
            seen, heard = (_guided(velocity, scale, repeated) for velocity in found)
            video, sound = video + (then - now) * seen, sound + (then - now) * heard
        return self.decode(video, sound)

    def _noise(self, seeds: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        config, side = self.config, self.config.unet["sample_size"]
        length = config.values // math.prod(config.oobleck["downsampling_ratios"])
        video, sound = [], []
        for seed in seeds:
            draw = torch.Generator("cpu").manual_seed(seed)
            video.append(torch.randn(config.unet["in_channels"], config.frames, side, side, generator=draw))
            sound.append(torch.randn(config.oobleck["decoder_input_channels"], length, generator=draw))
        return tuple(torch.stack(part).to(self.device, self.dtype) for part in (video, sound))  # type: ignore[return-value]

    @torch.no_grad()  # type: ignore[untyped-decorator,unused-ignore]
    def decode(self, video: torch.Tensor, sound: torch.Tensor) -> Made:
        """Return the clips and sounds of latents [N, C, F, h, w] and [N, K, L]."""
        latents = video.transpose(1, 2).flatten(0, 1) / self.vae.config.scaling_factor
        images = self.vae.decode(latents).sample.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        frames = images.permute(0, 2, 3, 1).unflatten(0, (len(video), -1))
        sounds = self.oobleck.decode(sound).sample.float().clamp(-1, 1).transpose(1, 2)
        return Made(frames.cpu(), sounds.cpu())


def _guided(velocity: torch.Tensor, scale: float, repeated: int) -> torch.Tensor:
    """Return the velocity with guidance (Ho & Salimans 2022, eq. 6), of one with text and one without."""
    if repeated == 1:
        return velocity
    given, without = velocity.chunk(2)
    return without + scale * (given - without)
