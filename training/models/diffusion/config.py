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
from capstan.training.models.noise.settings import DdpmSettings, FlowSettings

Positive = Annotated[int, Field(ge=1)]


class UNetSettings(Section):
    """diffusers' UNet2DConditionModel. Defaults: Stable Diffusion 1 (860 M parameters)."""

    block_out_channels: Annotated[tuple[Positive, ...], Field(min_length=1)] = (320, 640, 1280, 1280)  # one per level
    layers_per_block: Positive = 2
    attention: tuple[bool, ...] | None = (
        None  # cross-attention per level; null: all levels but the lowest (unless it is the only one)
    )
    heads: Positive = 8  # per attention layer
    transformer_layers: Positive = 1  # per attention block
    norm_num_groups: Positive = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

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

    model: str  # a folder (CLIP or T5 of transformers, or open_clip), or an open_clip model name
    pretrained: str | None = None  # with a name: a checkpoint file, or an open_clip tag


class TextSettings(Section):
    """A CLIPTextModel trained with the model, on a tokenizer learnt from the captions; or frozen encoders."""

    # Frozen encoders: folders with a CLIP or T5 encoder and its tokenizer, in the pipeline's order (SDXL: two CLIPs;
    # MMDiT: two CLIPs and optionally a T5); or the folder of a pipeline that has them all.
    pretrained: str | tuple[str | EncoderSettings, ...] | None = None
    vocab_size: Annotated[int, Field(ge=514)] = 8192  # at most; fewer if the captions yield fewer
    length: Annotated[int, Field(ge=4)] = 77  # tokens, including start and end; longer prompts are truncated
    chunks: Positive | None = None  # frozen CLIPs only: chunks in which a long text is read (null: 1); no export then
    width: Positive = 512
    layers: Positive = 6
    heads: Positive = 8

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
    guidance: Annotated[float, Field(ge=1)] = 4.0  # 1: off
    sampler: SamplerName | None = None  # null: dpm++ for flow (MMDiT: euler), ddim for ddpm


# Keys added after the first release are null by default, so that older runs can resume.
class DiffusionSettings(FamilySettings):
    """`train.diffusion`. The network is given by `preset`, else by `config`, else by `unet`."""

    buckets: ClassVar[bool] = True
    draws: ClassVar[str | None] = "image"

    autoencoder: str  # a run of the family autoencoder, its product, or a diffusers AutoencoderKL
    size: Positive | None = None  # pixels, both sides; null: the stored images' shorter side
    crop: Crop = "center"  # how an image is made square
    preset: Preset | None = None  # a network by name
    # A diffusers configuration: a config.json, its folder, or a mapping with _class_name; with a preset, a mapping of
    # the differences. Keys that follow from autoencoder, text encoders and size are filled in.
    config: str | dict[str, Any] | None = None
    unet: UNetSettings = UNetSettings()
    text: TextSettings = TextSettings()
    objective: Literal["flow", "ddpm"] = "flow"
    flow: FlowSettings = FlowSettings()
    ddpm: DdpmSettings = DdpmSettings()
    drop_text: Annotated[float, Field(ge=0, lt=1)] = (
        0.1  # share of captions replaced by the empty one, for classifier-free guidance
    )
    drop_each: Annotated[float, Field(gt=0, lt=1)] | None = (
        None  # share zeroed of each text encoder independently (SD3)
    )
    sampling: SamplingSettings = SamplingSettings()

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
        other = {"flow": "ddim", "ddpm": "euler"}[self.objective]
        if self.sampling.sampler == other:
            hint = "dpm++ or euler" if self.objective == "flow" else "ddim or dpm++"
            raise ValueError(f"sampling.sampler {other} is not for objective {self.objective}; use {hint}")
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
