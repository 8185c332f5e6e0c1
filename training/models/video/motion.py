"""An image model → the same model with motion modules, which at first change nothing

AnimateDiff (Guo et al. 2023, section 4.2): after each layer of the UNet, attention over the frames at each place, with
the number of the frame added. The last layer of each module starts at zero, so training starts from clips whose frames
are images of the image model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import nn

from capstan.pipeline.errors import RecipeError, first_line
from capstan.training.models.diffusion.text_encoders import TextEncoder, TextEncoders, states_of
from capstan.training.models.diffusion.unet import UNet
from capstan.training.models.image_run import find_image_run
from capstan.training.models.video.config import MotionSettings

_SECTION: Final = "train.video"
FIELD: Final = f"{_SECTION}.after"
_SLOT: Final = UNet.slots[0]


class Starting(Protocol):
    """Settings of a family that starts from an image run; in the functions below `section` is its own, for errors."""

    @property
    def after(self) -> str: ...
    @property
    def objective(self) -> str: ...
    @property
    def trained(self) -> Sequence[str]: ...
    @property
    def motion(self) -> MotionSettings: ...


def image_product(settings: Starting, section: str = _SECTION) -> Path:
    """Return the folder of the image run's pipeline. Raises RecipeError if motion modules do not fit it."""
    product = find_image_run(settings.after, f"{section}.after", "motion modules need")
    scheduler = json.loads((product / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    learnt = "flow" if scheduler.get("prediction_type") == "flow_prediction" else "ddpm"
    if learnt != settings.objective:
        problem = f"is {settings.objective}, and the image run {settings.after} learnt {learnt}"
        raise RecipeError(f"{section}.objective", problem, f"set objective: {learnt}")
    return product


def text_encoders(settings: Starting, section: str = _SECTION) -> TextEncoders:
    """Return the image run's text encoder; it is trained further if the settings say so."""
    from transformers import CLIPTextModel, CLIPTokenizer

    product = image_product(settings, section)
    encoder = CLIPTextModel.from_pretrained(product / _SLOT.name)
    tokenizer = CLIPTokenizer.from_pretrained(product / _SLOT.tokenizer, trust_remote_code=False)
    return TextEncoders(
        [TextEncoder(_SLOT, encoder, tokenizer)], own="text" in settings.trained, field=f"{section}.after"
    )


def moving_unet(settings: Starting, side: int, section: str = _SECTION) -> Any:
    """Return diffusers' UNetMotionModel: the image run's UNet with new motion modules, for latents of `side`.

    Raises RecipeError for settings that do not fit the image run.
    """
    from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel

    unet = UNet2DConditionModel.from_pretrained(image_product(settings, section) / "unet")
    config, motion = unet.config, settings.motion
    if side % 2 ** (len(config.block_out_channels) - 1):
        problem = f"latents of side {side} cannot be halved {len(config.block_out_channels) - 1} times"
        raise RecipeError(f"{section}.size", problem, "use another size")
    for channels in config.block_out_channels:
        if channels % motion.heads:
            problem = f"{motion.heads} does not divide the image model's {channels} channels"
            raise RecipeError(f"{section}.motion.heads", problem, "use fewer")
    try:
        adapter = MotionAdapter(
            block_out_channels=config.block_out_channels,
            motion_layers_per_block=config.layers_per_block,
            motion_transformer_layers_per_block=motion.layers,
            motion_transformer_layers_per_mid_block=motion.layers,
            motion_num_attention_heads=motion.heads,
            motion_norm_num_groups=config.norm_num_groups,
            motion_max_seq_length=motion.positions,
        )
        net = UNetMotionModel.from_unet2d(unet, adapter)
    except (ValueError, RuntimeError) as error:  # networks of other tools, with blocks that do not exist in it
        problem = f"has a UNet that takes no motion modules ({first_line(error)})"
        raise RecipeError(f"{section}.after", problem, "use another image run") from None
    for name, module in net.named_modules():
        if name.endswith("proj_out") and "motion_modules" in name:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    net.register_to_config(sample_size=side)
    if "image" not in settings.trained:
        net.freeze_unet2d_params()
    return net


class Animator(nn.Module):
    """The network, and the text encoder if it is trained too, under their names in the pipeline."""

    def __init__(self, unet: nn.Module, text: TextEncoders) -> None:
        super().__init__()
        self.unet = unet
        self.register_module(_SLOT.name, text.modules[0] if text.own else None)

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, text: Mapping[str, torch.Tensor], still: torch.Tensor
    ) -> torch.Tensor:
        """Return the prediction for noisy latents [B, C, frames, h, w] at timesteps [B].

        `text` is ids if the text encoder is part of this module, else states. Samples that are `still` (bool [B]) are
        images: only their first frame is seen, as a video of one frame, and its prediction is that of all frames.
        """
        encoder: Any = getattr(self, _SLOT.name)
        states = (text if encoder is None else states_of(_SLOT, encoder, text))[_SLOT.states].to(noisy.dtype)
        if not still.any():
            return self._predict(noisy, timesteps, states)
        made = torch.zeros_like(noisy)
        for rows, frames in ((~still, noisy.shape[2]), (still, 1)):
            if rows.any():
                part = self._predict(noisy[rows, :, :frames], timesteps[rows], states[rows])
                made[rows] = part.to(made.dtype).expand(-1, -1, noisy.shape[2], -1, -1)
        return made

    def _predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        each = states.repeat_interleave(noisy.shape[2], dim=0)  # every frame attends to the text, as in the pipeline
        made: torch.Tensor = self.unet(noisy, timesteps, encoder_hidden_states=each, return_dict=False)[0]
        return made

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass: less memory, about a third more time."""
        unet: Any = self.unet
        unet.enable_gradient_checkpointing()
        encoder: Any = getattr(self, _SLOT.name)
        if encoder is not None:
            encoder.gradient_checkpointing_enable()
