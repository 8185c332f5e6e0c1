"""The recipe's section `train.oobleck`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from capstan.training.config.families import FamilySettings

Positive = Annotated[int, Field(ge=1)]


class OobleckSettings(FamilySettings):
    """`train.oobleck`. Defaults: Stable Audio's autoencoder (2048 values a latent, 64 channels)."""

    captions: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ("flac",)

    rate: Annotated[int, Field(ge=100)] | None = None
    """Values per second of the sounds; null: those of the first sound."""
    channels: Literal[1, 2] | None = None
    """Channels of the sounds, mono or stereo; null: those of the first sound."""
    seconds: Annotated[float, Field(gt=0)] | None = None
    """Length of the pieces that are trained on; null: that of the first sound."""
    part: Literal["random", "start"] = "random"
    """Which piece of a longer sound is read: a random one, or its start."""
    encoder_hidden_size: Annotated[int, Field(ge=2, multiple_of=2)] = 128
    """Channels of the encoder's first level; a latent has half as many."""
    decoder_channels: Positive = 128
    """Channels of the decoder's last level."""
    downsampling_ratios: Annotated[tuple[Positive, ...], Field(min_length=1)] = (2, 4, 4, 8, 8)
    """By how much each level shortens a sound; their product is the number of values in a latent."""
    channel_multiples: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 4, 8, 16)
    """Channels after each level, as multiples of the first one's."""
    waveform: Annotated[float, Field(ge=0)] = 10.0
    """Weight of the squared error of the waveform."""
    spectral: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the difference of the spectra, over all of `fft_sizes`."""
    fft_sizes: Annotated[tuple[Annotated[int, Field(ge=8)], ...], Field(min_length=1)] = (2048, 1024, 512, 256, 128, 64)
    """Windows in which spectra are compared, values; short ones see when, long ones at which pitch."""
    kl: Annotated[float, Field(ge=0)] = 1e-4
    """Weight of the KL divergence of the latents, per value of a latent."""
    statistics: Positive = 128
    """Number of sounds from which the scale of the latents is computed at the end."""

    @model_validator(mode="after")
    def _fits(self) -> OobleckSettings:
        if len(self.channel_multiples) != len(self.downsampling_ratios):
            raise ValueError("channel_multiples must have one number for each of downsampling_ratios")
        if odd := [ratio for ratio in self.downsampling_ratios if ratio % 2]:
            raise ValueError(
                f"downsampling_ratios {odd[0]} is odd, so a decoded sound would be too short; use even ones"
            )
        if not self.waveform and not self.spectral:
            raise ValueError("waveform and spectral are both 0, so nothing is learnt; set one of them")
        return self

    def shape(self) -> dict[str, Any]:
        """Return AutoencoderOobleck's arguments but the sounds' form."""
        return {
            "encoder_hidden_size": self.encoder_hidden_size,
            "downsampling_ratios": list(self.downsampling_ratios),
            "channel_multiples": list(self.channel_multiples),
            "decoder_channels": self.decoder_channels,
            "decoder_input_channels": self.encoder_hidden_size // 2,
        }

    @property
    def hop(self) -> int:
        """Values of a sound per latent."""
        hop = 1
        for ratio in self.downsampling_ratios:
            hop *= ratio
        return hop
