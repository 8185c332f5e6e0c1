"""A stage that begins as its input: before any training its image is the small one, enlarged."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from capstan.training.models.diffusion.backbone import LatentSpec
from capstan.training.models.imagen.config import ImagenSettings
from capstan.training.models.imagen.copying import begin_as_input
from capstan.training.models.imagen.networks import SuperNet
from capstan.training.models.pixels.settings import PixelUNet

UNET = {"block_out_channels": [16, 32], "layers_per_block": 1, "head_channels": 8, "norm_num_groups": 4}
SETTINGS = {"enlarge": {"after": "base", "start": "image"}, "noise": {"prediction": "sample"}, "unet": UNET}


@pytest.mark.parametrize("attention", [[False, False], [True, True]])
@pytest.mark.parametrize("channels", [[16, 32], [24, 48]])
def test_the_network_begins_as_the_enlarged_image(attention: list[bool], channels: list[int]) -> None:
    torch.manual_seed(0)
    unet = PixelUNet.model_validate(UNET | {"attention": attention, "block_out_channels": channels})
    spec = LatentSpec(channels=3, side=16, widths={"text_encoder": 16}, pooled={})
    net = SuperNet(unet, section="imagen").build(spec)
    begin_as_input(net, 3)
    image = F.interpolate(torch.rand(4, 3, 8, 8) * 2 - 1, (16, 16), mode="bilinear", align_corners=True)
    image[0] = 1  # white
    image[1] = 0  # grey, in which only the constant is normalised
    states, levels = torch.randn(4, 5, 16), torch.tensor([0, 10, 300, 999])
    for time in (0, 500, 999):
        with torch.no_grad():
            given = torch.cat([torch.randn_like(image), image], dim=1)
            made = net(given, time, encoder_hidden_states=states, class_labels=levels).sample[:, :3]
        assert float((made - image).abs().max()) < 0.02


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"noise": {"prediction": "v_prediction"}}, "set noise.prediction: sample"),
        ({"unet": UNET | {"norm_num_groups": 8}}, "norm_num_groups 8 makes groups of 2"),
        ({"unet": UNET | {"norm_num_groups": 2}}, "needs 3 groups of 4 channels"),
    ],
)
def test_what_cannot_begin_as_an_image_is_refused(changed: dict[str, object], named: str) -> None:
    ImagenSettings.model_validate(SETTINGS)
    with pytest.raises(ValidationError, match=named):
        ImagenSettings.model_validate(SETTINGS | changed)
