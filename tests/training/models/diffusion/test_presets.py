"""Networks by name, configuration or nothing: the sizes that they have, and recipes that name none."""

import pytest
import tiny_networks as tiny
import torch

from capstan.pipeline.errors import RecipeError
from capstan.training.models.diffusion.registry import backbone_of


def parameters_of(preset):
    """In millions, with as many channels and as wide a text as the original has."""
    from capstan.training.models.diffusion.backbone import LatentSpec

    backbone = backbone_of(tiny.parsed(preset=preset))
    widths = {
        "sd15": {"text_encoder": 768},
        "sdxl": {"text_encoder": 768, "text_encoder_2": 1280},
        "dit-xl": {"text_encoder": 4096},
        "mmdit-l": {"text_encoder": 768, "text_encoder_2": 1280, "text_encoder_3": 4096},
    }[preset]
    pooled = {"sdxl": {"text_encoder_2": 1280}, "mmdit-l": {"text_encoder": 768, "text_encoder_2": 1280}}
    with torch.device("meta"):
        net = backbone.build(LatentSpec(16 if preset == "mmdit-l" else 4, 64, widths, pooled.get(preset, {})))
    return sum(weight.numel() for weight in net.parameters()) / 1e6


@pytest.mark.parametrize(("preset", "millions"), [("sd15", 859.5), ("sdxl", 2567), ("dit-xl", 610), ("mmdit-l", 2028)])
def test_presets_have_the_size_that_they_are_named_for(preset, millions):
    """SD 1.5 has 859.52 M weights, SDXL 2567 M, PixArt-Σ XL 610 M, SD 3 medium 2028 M."""
    assert parameters_of(preset) == pytest.approx(millions, rel=0.005)


def test_sd15_is_the_default_network():
    plain = {"transformer_layers_per_block": 1, "norm_num_groups": 32, "dropout": 0.0}  # diffusers' own defaults
    assert backbone_of(tiny.parsed()).config == plain | backbone_of(tiny.parsed(preset="sd15")).config


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"preset": "sd14"}, r"train\.diffusion\.preset"),
        ({"preset": "sd15", "unet": tiny.UNET}, r"train\.diffusion: unet and preset or config both"),
        ({"preset": "sd15", "config": "x"}, r"train\.diffusion: config and preset both"),
        ({"config": {"num_layers": 2}}, r"train\.diffusion: config has no _class_name"),
        ({"sampling": {"sampler": "ddim"}}, r"train\.diffusion: sampling\.sampler ddim is not for objective flow"),
        ({"text": {"pretrained": []}}, r"train\.diffusion\.text: pretrained is an empty list"),
    ],
)
def test_wrong_recipes_are_refused(section, problem):
    with pytest.raises(RecipeError, match=problem):
        tiny.parsed(**section)
