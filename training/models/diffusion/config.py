"""The recipe's section `train.diffusion`: the model's shape, its text encoders, and what it learns."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from capstan.pipeline.config import Section
from capstan.training.data.transforms import Crop
from capstan.training.models.diffusion.presets import Preset
from capstan.training.models.diffusion.schedulers import SamplerName

Positive = Annotated[int, Field(ge=1)]


class UNetSettings(Section):
    """diffusers' UNet2DConditionModel. The defaults are the shape of Stable Diffusion 1 (860 M parameters)."""

    block_out_channels: Annotated[tuple[Positive, ...], Field(min_length=1)] = (320, 640, 1280, 1280)  # one a level
    layers_per_block: Positive = 2
    attention: tuple[bool, ...] | None = None  # cross-attention, level by level; null: all but the lowest of several
    heads: Positive = 8  # of each attention
    transformer_layers: Positive = 1  # at each place with attention
    norm_num_groups: Positive = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _fits(self) -> UNetSettings:
        levels = len(self.block_out_channels)
        if self.attention is not None and len(self.attention) != levels:
            raise ValueError("attention must say true or false for each of block_out_channels")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(f"block_out_channels {channels} does not divide by norm_num_groups")
            if channels % self.heads:
                raise ValueError(f"block_out_channels {channels} does not divide by heads")
        return self

    @property
    def attends(self) -> tuple[bool, ...]:
        """Whether each level has cross-attention."""
        levels = len(self.block_out_channels)
        return self.attention or tuple(level < levels - 1 or levels == 1 for level in range(levels))


class EncoderSettings(Section):
    """A text encoder that is used as it is."""

    model: str  # a folder (transformers' CLIP or T5, or open_clip's), or one of open_clip's names
    pretrained: str | None = None  # for a name: a checkpoint file, or one of open_clip's tags


class TextSettings(Section):
    """transformers' CLIPTextModel: trained with the model, on a tokenizer learnt from the captions; or frozen ones."""

    # Used as they are, not trained: folders with a CLIP or T5 encoder and its tokenizer, in the order of the pipeline's
    # (SDXL: two CLIPs; MMDiT: two CLIPs, and a T5 or none); or one folder of a pipeline that has them all.
    pretrained: str | tuple[str | EncoderSettings, ...] | None = None
    vocab_size: Annotated[int, Field(ge=514)] = 8192  # at most; fewer where the captions give fewer
    length: Annotated[int, Field(ge=4)] = 77  # tokens, start and end included; longer prompts are cut
    width: Positive = 512
    layers: Positive = 6
    heads: Positive = 8

    @model_validator(mode="after")
    def _fits(self) -> TextSettings:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide by heads")
        if self.pretrained == ():
            raise ValueError("pretrained names no encoder; give null to train one")
        return self

    @property
    def encoders(self) -> tuple[EncoderSettings, ...]:
        """Those that `pretrained` names; none where an encoder is trained."""
        named = (self.pretrained,) if isinstance(self.pretrained, str) else self.pretrained or ()
        return tuple(EncoderSettings(model=one) if isinstance(one, str) else one for one in named)


class FlowSettings(Section):
    """Rectified flow (`objective: flow`)."""

    times: Literal["logit_normal", "uniform"] = "logit_normal"
    mean: float = 0.0  # of the logit: above 0, noisier times are drawn more
    std: Annotated[float, Field(gt=0)] = 1.0
    shift: Annotated[float, Field(gt=0)] = 1.0  # above 1: noisier times in training and in sampling, for large images
    base: Positive | None = None  # pixels, a side: with it the shift also grows as size / base (SD3: 256)


class DdpmSettings(Section):
    """DDPM (`objective: ddpm`), with the noise schedule of Stable Diffusion."""

    prediction: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.00085
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.012
    zero_terminal_snr: bool = True  # the last step is noise alone, as sampling begins
    min_snr: Annotated[float, Field(gt=0)] | None = None  # γ of min-SNR weighting, say 5; no zero SNR then
    offset_noise: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _can_be_sampled(self) -> DdpmSettings:
        if self.prediction == "epsilon" and self.zero_terminal_snr:
            raise ValueError(
                "prediction epsilon says nothing where there is only noise; "
                "use zero_terminal_snr: false, or prediction: v_prediction"
            )
        # Min-SNR weighs x0's error by min(SNR, γ) (Hang et al. 2023, §3.4), and an SNR of 0 is where sampling begins
        # (Lin et al. 2023, §3.3). A floor of 1 there is in no paper: the step beside has a millionth of it.
        if self.min_snr is not None and self.zero_terminal_snr:
            raise ValueError(
                "min_snr leaves the step untrained where there is only noise, at which sampling begins; "
                "use zero_terminal_snr: false, or remove min_snr"
            )
        return self


class SamplingSettings(Section):
    """What `capstan sample` and `capstan evaluate` do unless told otherwise."""

    steps: Positive = 25
    guidance: Annotated[float, Field(ge=1)] = 4.0  # 1: none
    sampler: SamplerName | None = None  # null: dpm++ for flow (MMDiT: euler), ddim for ddpm


# Keys that came after the first release are null by default: runs that began before them go on.
class DiffusionSettings(Section):
    """`train.diffusion`. The network is what `preset` names, what `config` describes, or else what `unet` does."""

    autoencoder: str  # a run of the family autoencoder, its product, or any diffusers AutoencoderKL
    size: Positive | None = None  # pixels, both sides; null: the stored images' shorter side
    crop: Crop = "center"  # how an image becomes square
    preset: Preset | None = None  # a network by name
    # A diffusers configuration: a config.json, its folder, or a mapping with _class_name; with a preset, a mapping of
    # what differs from it. What follows from the autoencoder, the text encoders and the size is filled in.
    config: str | dict[str, Any] | None = None
    unet: UNetSettings = UNetSettings()
    text: TextSettings = TextSettings()
    objective: Literal["flow", "ddpm"] = "flow"
    flow: FlowSettings = FlowSettings()
    ddpm: DdpmSettings = DdpmSettings()
    drop_text: Annotated[float, Field(ge=0, lt=1)] = 0.1  # share of captions left empty, for classifier-free guidance
    drop_each: Annotated[float, Field(gt=0, lt=1)] | None = None  # share blanked of each text encoder by itself (SD3)
    sampling: SamplingSettings = SamplingSettings()

    @model_validator(mode="after")
    def _one_network(self) -> DiffusionSettings:
        named = self.preset or self.config
        if named is not None and self.unet != UNetSettings():
            raise ValueError("unet describes a network beside preset or config; keep one (config: what differs)")
        if self.preset is not None and isinstance(self.config, str):
            raise ValueError("config names a whole network beside preset; keep one of them")
        if self.config is not None and self.preset is None and "_class_name" not in self._mapping:
            raise ValueError("config does not say which network it is of; add _class_name, e.g. UNet2DConditionModel")
        return self

    @model_validator(mode="after")
    def _sampler_walks_this_path(self) -> DiffusionSettings:
        other = {"flow": "ddim", "ddpm": "euler"}[self.objective]
        if self.sampling.sampler == other:
            hint = "dpm++ or euler" if self.objective == "flow" else "ddim or dpm++"
            raise ValueError(
                f"sampling.sampler {other} does not walk the path of objective {self.objective}; use {hint}"
            )
        return self

    @property
    def _mapping(self) -> dict[str, Any]:
        return self.config if isinstance(self.config, dict) else {"_class_name": None}
