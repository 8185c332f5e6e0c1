"""The recipe's section `train.autoencoder`, and what the other first stages share with it"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.config.families import Crop, FamilySettings

Positive = Annotated[int, Field(ge=1)]


class PerceptualSettings(Section):
    """`perceptual`: LPIPS as a part of the loss."""

    network: str
    """Folder with vgg16-397923af.pth (torchvision's VGG16) and vgg.pth (the heads of LPIPS for it)."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of LPIPS in the loss, relative to the reconstruction."""


class DiscriminatorSettings(Section):
    """`discriminator`. The defaults are taming-transformers' for ImageNet."""

    start: Annotated[int, Field(ge=0)] = 10_000
    """First step with the discriminator; the images must be recognisable before it."""
    weight: Annotated[float, Field(gt=0)] = 0.8
    """Norm of its gradient at the last layer, relative to the gradient of the reconstruction."""
    adaptive: bool = True
    """Whether `weight` is relative to the reconstruction's gradient; false: it multiplies the loss directly."""
    loss: Literal["hinge", "vanilla"] = "hinge"
    """Loss of the discriminator: hinge, or vanilla (cross-entropy)."""
    channels: Annotated[int, Field(ge=1)] = 64
    """Channels of its first layer; each further layer doubles them, up to 8 times."""
    layers: Annotated[int, Field(ge=1)] = 3
    """Number of layers that halve the image: 3 see patches of 70 pixels, 2 of 34, 1 of 16."""
    lr: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of the discriminator, relative to train.lr at the same step."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.5, 0.9)
    """Both betas of the discriminator's Adam."""


class ImageStageSettings(FamilySettings):
    """The settings that all first-stage families share."""

    captions: ClassVar[bool] = False

    pretrained: str | None = None
    """Start from this model: a run, a product or a diffusers folder; null: from random weights."""
    size: Positive | None = None
    """Side of the square training images in pixels; null: the shorter side of the stored images."""
    crop: Crop = "center"
    """How an image is made square: its center, or a random part."""
    flip: bool = False
    """Mirror half of the images, chosen at random."""
    reconstruction: Literal["l1", "l2"] = "l1"
    """Reconstruction loss: mean absolute error (l1) or mean squared error (l2)."""
    edges: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the difference of image gradients, which keeps edges sharp; 0: off."""
    perceptual: PerceptualSettings | None = None
    """Perceptual loss by LPIPS; null: off."""
    discriminator: DiscriminatorSettings | None = None
    """A discriminator to train against, for sharp images; null: off."""
    statistics: Positive = 128
    """Number of images from which the scale of the latents is computed at the end."""

    def models(self) -> dict[str, str]:
        return {} if self.pretrained is None else {"pretrained": self.pretrained}

    def check(self, train: TrainConfig) -> None:
        if self.discriminator is None:
            return
        field = f"train.{train.model}.discriminator"
        check_adversary(train, field)
        if train.engine.compile and self.discriminator.adaptive:
            problem = f"a compiled model runs backward once per step, and the weight of {field}"
            hint = "remove it, or set discriminator: {adaptive: false}"
            raise RecipeError("train.engine.compile", f"{problem} needs its gradients before that", hint)


def check_adversary(train: TrainConfig, field: str) -> None:
    """Raise RecipeError if the run cannot train the second model that `field` adds."""
    if train.engine.strategy != "ddp":
        problem = f"{train.engine.strategy} trains one model, but {field} adds a second one"
        raise RecipeError("train.engine.strategy", problem, "set engine: {strategy: ddp}, without zero")
    if train.precision not in ("fp32", "bf16"):
        problem = f"{train.precision} needs loss scaling, which {field} does not support"
        raise RecipeError("train.precision", problem, "use bf16 or fp32")


class StageSettings(ImageStageSettings):
    """The settings of first stages built of convolutions."""

    block_out_channels: Annotated[tuple[Positive, ...], Field(min_length=1)] = (128, 256, 512, 512)
    """Channels at each level; every level but the first halves the image."""
    layers_per_block: Positive = 2
    """Number of ResNet layers at each level."""
    latent_channels: Positive = 4
    """Number of channels of the latents."""
    norm_num_groups: Positive = 32
    """Groups of the group normalisation; all channel counts must be multiples of it."""
    mid_attention: bool = True
    """Self-attention at the lowest level."""
    down_block_types: list[str] | None = None
    """Encoder blocks by diffusers' names, one per level; null: DownEncoderBlock2D everywhere."""
    up_block_types: list[str] | None = None
    """Decoder blocks by diffusers' names, one per level; null: UpDecoderBlock2D everywhere."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(f"block_out_channels {channels} does not divide by norm_num_groups")
        for name in ("down_block_types", "up_block_types"):
            blocks = getattr(self, name)
            if blocks is not None and len(blocks) != len(self.block_out_channels):
                raise ValueError(f"{name} must name one block for each of block_out_channels")
        return self

    def shape(self) -> dict[str, Any]:
        """Return the arguments that AutoencoderKL and VQModel have in common."""
        levels = len(self.block_out_channels)
        return {
            "down_block_types": tuple(self.down_block_types or ["DownEncoderBlock2D"] * levels),
            "up_block_types": tuple(self.up_block_types or ["UpDecoderBlock2D"] * levels),
            "block_out_channels": self.block_out_channels,
            "layers_per_block": self.layers_per_block,
            "latent_channels": self.latent_channels,
            "norm_num_groups": self.norm_num_groups,
            "mid_block_add_attention": self.mid_attention,
            "sample_size": self.size or 512,
        }


class AutoencoderSettings(StageSettings):
    """`train.autoencoder`. Defaults: Stable Diffusion's autoencoder (8× smaller, 4 channels)."""

    kl: Annotated[float, Field(ge=0)] = 1e-6
    """Weight of the KL divergence of the latents, per pixel value."""
    log_variance: float = -6.0
    """Log-variance of the latents at the start of training; that of the prior is 0."""
