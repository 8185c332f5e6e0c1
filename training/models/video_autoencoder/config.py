"""The recipe's section `train.video_autoencoder`, and which numbers of frames a causal first stage can have"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from capstan.training.config.families import FamilySettings

Positive = Annotated[int, Field(ge=1)]


def fits(frames: int, ratio: int) -> bool:
    """Return whether clips with this number of frames come back whole where `ratio` frames are one latent.

    The first frame is a latent of its own, and diffusers decodes two further latents at a time.
    """
    return ratio == 1 or frames % (2 * ratio) == 1


class VideoAutoencoderSettings(FamilySettings):
    """`train.video_autoencoder`. Defaults: CogVideoX (8 × 8 pixels and 4 frames a latent, 16 channels)."""

    captions: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ("jpg", "mp4")

    frames: Annotated[int, Field(ge=2)] = 17
    """Frames of a clip; an image is a clip of one."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """Frames per second at which clips are seen; null: each clip's own."""
    part: Literal["center", "random"] = "center"
    """Which part of a clip that is longer is seen."""
    size: Positive | None = None
    """Side of the square frames in pixels; null: the stored images' shorter side."""
    block_out_channels: Annotated[tuple[Positive, ...], Field(min_length=2)] = (128, 256, 256, 512)
    """Channels at each level; every level but the first halves the frames."""
    layers_per_block: Positive = 3
    """Number of ResNet layers at each level."""
    latent_channels: Positive = 16
    """Number of channels of the latents."""
    norm_num_groups: Positive = 32
    """Groups of the group normalisation; all channel counts must be multiples of it."""
    time_ratio: Literal[1, 2, 4, 8] = 4
    """Frames in a latent; the first frame is one of its own."""
    reconstruction: Literal["l1", "l2"] = "l1"
    """Reconstruction loss: mean absolute error (l1) or mean squared error (l2)."""
    kl: Annotated[float, Field(ge=0)] = 1e-6
    """Weight of the KL divergence of the latents, per pixel value."""
    log_variance: float = -6.0
    """Log-variance of the latents at the start of training; that of the prior is 0."""
    statistics: Positive = 64
    """Number of clips from which the scale of the latents is computed at the end."""

    @model_validator(mode="after")
    def _fits(self) -> VideoAutoencoderSettings:
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(f"block_out_channels {channels} does not divide by norm_num_groups")
        if self.time_ratio > 2 ** (len(self.block_out_channels) - 1):
            raise ValueError(f"time_ratio {self.time_ratio} needs more levels in block_out_channels; lower it")
        if not fits(self.frames, self.time_ratio):
            step = 2 * self.time_ratio
            raise ValueError(f"frames {self.frames} are not a multiple of {step}, and one more; use e.g. {step + 1}")
        return self

    def shape(self) -> dict[str, Any]:
        """Return AutoencoderKLCogVideoX's arguments but the size of the frames."""
        levels = len(self.block_out_channels)
        return {
            "down_block_types": ("CogVideoXDownBlock3D",) * levels,
            "up_block_types": ("CogVideoXUpBlock3D",) * levels,
            "block_out_channels": self.block_out_channels,
            "layers_per_block": self.layers_per_block,
            "latent_channels": self.latent_channels,
            "norm_num_groups": self.norm_num_groups,
            "temporal_compression_ratio": self.time_ratio,
        }
