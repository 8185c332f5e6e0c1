"""A stage that enlarges and begins as its input: what it learns is a correction of the enlarged image

A U-Net of diffusers has no way around its last normalisation, so an image that it is given is lost in its first
weights, and has to be found again in training. Weights that keep it exist. Per colour, one group of channels carries

    (x, −x, K, −K, 0 …)      x: the image in −1 … 1, K: a constant that is large beside it

from the first convolution through the last skip connection. A group's mean is then 0 and its standard deviation
σ = √((x̄² + K²) · 2/n) hardly depends on the image (n channels), so that normalisation divides by a known number; and
silu(x) − silu(−x) = x undoes the activation. Learning a residual of the enlarged image is Kim et al. 2016 (VDSR), §3.2.
"""

from __future__ import annotations

from typing import Any, Final

import torch

_CONSTANT: Final = 10.0  # K; the image comes back within about x̄²/2K², 0.5%


def begin_as_input(net: Any, channels: int) -> None:
    """Set first weights of a UNet2DConditionModel with which it returns the second image of its input, at any noise.

    Its input is two images of `channels` channels, [B, 2 · channels, h, w]; its output's first `channels` are the
    image. Each of the first `channels` groups of its last normalisation needs four channels or more.
    """
    last, norm, out = net.up_blocks[-1], net.conv_norm_out, net.conv_out
    size = norm.num_channels // norm.num_groups
    resnet = last.resnets[-1]
    skipped = resnet.conv_shortcut.in_channels - net.conv_in.out_channels  # channels before those of the skip
    with torch.no_grad():
        for layer in (resnet.conv2, out):
            layer.weight.zero_()
            layer.bias.zero_()
        for colour in range(channels):
            group = slice(colour * size, (colour + 1) * size)
            for layer in (net.conv_in, resnet.conv_shortcut):
                layer.weight[group] = 0
                layer.bias[group] = 0
            for channel in range(group.start, group.stop):
                resnet.conv_shortcut.weight[channel, skipped + channel] = 1
            _silence(last, group)
            for place, sign in enumerate((1, -1)):
                channel = group.start + place
                net.conv_in.weight[channel, channels + colour, 1, 1] = sign
                net.conv_in.bias[channel + 2] = sign * _CONSTANT
                norm.weight[channel] = _CONSTANT * (2 / size) ** 0.5
                out.weight[colour, channel, 1, 1] = sign


def _silence(block: Any, group: slice) -> None:
    """Make the block's last attention, if it has one, add nothing to a group of channels."""
    for attention in getattr(block, "attentions", [])[-1:]:
        attention.to_out[0].weight[group] = 0
        attention.to_out[0].bias[group] = 0
