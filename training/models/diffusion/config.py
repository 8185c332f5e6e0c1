"""The recipe's section `train.diffusion`: network, text encoders, objective."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.config.families import Crop, FamilySettings
from capstan.training.models.diffusion.presets import Preset
from capstan.training.models.noise.schedulers import SamplerName
from capstan.training.models.noise.settings import DdpmSettings, FlowSettings, check_sampler

Positive = Annotated[int, Field(ge=1)]


class UNetSettings(Section):
    """diffusers' UNet2DConditionModel. Defaults: Stable Diffusion 1 (860 M parameters)."""

    block_out_channels: Annotated[tuple[Positive, ...], Field(min_length=1)] = (320, 640, 1280, 1280)
    """Channels at each level."""
    layers_per_block: Positive = 2
    """Number of ResNet layers at each level."""
    attention: tuple[bool, ...] | None = None
    """Whether each level has cross-attention; null: all levels but the lowest (unless it is the only one)."""
    heads: Positive = 8
    """Number of heads per attention layer."""
    transformer_layers: Positive = 1
    """Number of transformer layers per attention block."""
    norm_num_groups: Positive = 32
    """Groups of the group normalisation; all channel counts must be multiples of it."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability."""

    @model_validator(mode="after")
    def _fits(self) -> UNetSettings:
        levels = len(self.block_out_channels)
        if self.attention is not None and len(self.attention) != levels:
            raise ValueError("attention must be true or false for each of block_out_channels")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(f"block_out_channels {channels} does not divide by norm_num_groups")
            if channels % self.heads:
                raise ValueError(f"block_out_channels {channels} does not divide by heads")
        return self

    @property
    def attends(self) -> tuple[bool, ...]:
        """For each level, whether it has cross-attention."""
        levels = len(self.block_out_channels)
        return self.attention or tuple(level < levels - 1 or levels == 1 for level in range(levels))


class EncoderSettings(Section):
    """A frozen text encoder."""

    model: str
    """A folder with a CLIP or T5 of transformers or an open_clip model; or an open_clip model name."""
    pretrained: str | None = None
    """For an open_clip name: a checkpoint file or a tag; null: the folder's own weights."""


class TextSettings(Section):
    """A CLIPTextModel trained with the model, on a tokenizer learnt from the captions; or frozen encoders."""

    pretrained: str | tuple[str | EncoderSettings, ...] | None = None
    """Frozen encoders, in the pipeline's order: folders with a CLIP or T5 and its tokenizer, or the folder of a
    pipeline; null: train one."""
    vocab_size: Annotated[int, Field(ge=514)] = 8192
    """Largest size of the vocabulary of a trained encoder; smaller if the captions yield less."""
    length: Annotated[int, Field(ge=4)] = 77
    """Longest text in tokens, with start and end; longer prompts are truncated."""
    chunks: Positive | None = None
    """For frozen CLIPs: number of chunks in which a long text is read; null: 1. With more, there is no export."""
    width: Positive = 512
    """Width of a trained encoder; a multiple of heads."""
    layers: Positive = 6
    """Number of layers of a trained encoder."""
    heads: Positive = 8
    """Attention heads per layer of a trained encoder."""

    @model_validator(mode="after")
    def _fits(self) -> TextSettings:
        if (self.chunks or 1) > 1 and self.pretrained is None:
            raise ValueError("chunks is for frozen encoders; for one that is trained, set length")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide by heads")
        if self.pretrained == ():
            raise ValueError("pretrained is an empty list; set null to train an encoder")
        return self

    @property
    def encoders(self) -> tuple[EncoderSettings, ...]:
        """The encoders that `pretrained` names; empty if an encoder is trained."""
        named = (self.pretrained,) if isinstance(self.pretrained, str) else self.pretrained or ()
        return tuple(EncoderSettings(model=one) if isinstance(one, str) else one for one in named)


class SamplingSettings(Section):
    """Defaults of `capstan sample` and `capstan evaluate`."""

    steps: Positive = 25
    """Number of sampling steps."""
    guidance: Annotated[float, Field(ge=1)] = 4.0
    """Scale of classifier-free guidance; 1: off."""
    sampler: SamplerName | None = None
    """The sampler; null: dpm++ for flow (MMDiT: euler), ddim for ddpm."""


# Keys added after the first release are null by default, so that older runs can resume.
class DiffusionSettings(FamilySettings):
    """`train.diffusion`. The network is given by `preset`, else by `config`, else by `unet`."""

    buckets: ClassVar[bool] = True
    draws: ClassVar[str | None] = "image"

    autoencoder: str
    """The first stage: a run of the family autoencoder, its product, or a diffusers AutoencoderKL."""
    size: Positive | None = None
    """Side of the square images in pixels; null: the stored images' shorter side."""
    crop: Crop = "center"
    """How an image is made square: its center, or a random part."""
    preset: Preset | None = None
    """A network by name; null: given by config or unet."""
    config: str | dict[str, Any] | None = None
    """A diffusers configuration: a config.json, its folder, or a mapping with _class_name; with a preset, a mapping of
    the differences."""
    unet: UNetSettings = UNetSettings()
    """Shape of the network, if neither preset nor config names one."""
    text: TextSettings = TextSettings()
    """The text encoders."""
    objective: Literal["flow", "ddpm"] = "flow"
    """What the network learns: rectified flow, or DDPM."""
    flow: FlowSettings = FlowSettings()
    """Settings of objective flow."""
    ddpm: DdpmSettings = DdpmSettings()
    """Settings of objective ddpm."""
    drop_text: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of captions replaced by the empty one, for classifier-free guidance."""
    drop_each: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of samples of which each text encoder's states are zeroed independently (SD3); null: none."""
    sampling: SamplingSettings = SamplingSettings()
    """Steps, guidance and sampler of `capstan sample` and `capstan evaluate`, unless they are set there."""

    @model_validator(mode="after")
    def _one_network(self) -> DiffusionSettings:
        named = self.preset or self.config
        if named is not None and self.unet != UNetSettings():
            raise ValueError("unet and preset or config both describe the network; keep one of them")
        if self.preset is not None and isinstance(self.config, str):
            raise ValueError("config and preset both name a whole network; keep one of them")
        if self.config is not None and self.preset is None and "_class_name" not in self._mapping:
            raise ValueError("config has no _class_name; add it, e.g. _class_name: UNet2DConditionModel")
        return self

    @model_validator(mode="after")
    def _sampler_fits_objective(self) -> DiffusionSettings:
        check_sampler(self.objective, self.sampling.sampler)
        return self

    def models(self) -> dict[str, str]:
        return {"autoencoder": self.autoencoder}

    def check(self, train: TrainConfig) -> None:
        if train.data.latents is not None and self.crop != "center":
            problem = "latents are precomputed from the center of images, whatever crop is"
            raise RecipeError("train.diffusion.crop", problem, "set crop: center, or remove train.data.latents")

    @property
    def _mapping(self) -> dict[str, Any]:
        return self.config if isinstance(self.config, dict) else {"_class_name": None}
