"""Conditions of the network on an image and a clip: the image for CLIP, its latents, frame rate, motion, noise level"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import torch

from capstan.pipeline.errors import RecipeError, first_line
from capstan.pipeline.score.moving import motion
from capstan.training.models.svd.config import ImageEncoderSettings

_PIXELS: Final = 224  # side of the image for CLIP, fixed in the pipeline
_SIDE: Final = 64  # pixels at which motion is measured, as for score.video
LARGEST: Final = 255  # motion bucket


def image_encoder(settings: ImageEncoderSettings, width: int, field: str) -> tuple[Any, Any]:
    """Return (CLIPVisionModelWithProjection, CLIPImageProcessor): frozen ones of `pretrained`, or new ones.

    A new one's embedding has `width` values. Raises RecipeError naming `field`.
    """
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    if settings.pretrained is not None:
        folder = Path(settings.pretrained)
        try:
            encoder = CLIPVisionModelWithProjection.from_pretrained(folder)
            processor = CLIPImageProcessor.from_pretrained(folder)
        except (OSError, ValueError) as error:
            problem = f"{folder} is no CLIP with its image processor ({first_line(error)})"
            raise RecipeError(field, problem, "name a folder that save_pretrained wrote") from None
        found = (encoder.config.image_size, encoder.config.projection_dim)
        if found != (_PIXELS, width):
            problem = f"{folder} reads {found[0]} pixels to {found[1]} values; {_PIXELS} and {width} are needed"
            raise RecipeError(field, problem, "train one (pretrained: null), or use another image run")
        return encoder, processor
    config = CLIPVisionConfig(
        image_size=_PIXELS,
        patch_size=settings.patch,
        hidden_size=settings.width,
        intermediate_size=4 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        projection_dim=width,
    )
    return CLIPVisionModelWithProjection(config), CLIPImageProcessor()


def for_clip(images: torch.Tensor, processor: Any) -> torch.Tensor:
    """Return images [B, 3, H, W] in −1 … 1 as CLIP sees them, [B, 3, 224, 224]: resized and normalised as there."""
    from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing

    resized = (_resize_with_antialiasing(images, (_PIXELS, _PIXELS)) + 1) / 2
    mean, std = (
        torch.tensor(values, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
        for values in (processor.image_mean, processor.image_std)
    )
    made: torch.Tensor = (resized - mean) / std
    return made


def motion_of(frames: np.ndarray, fps: float) -> float:
    """Return the mean optical flow of uint8 RGB [frames, H, W, 3], in pixels per second at a side of 64."""
    luma = [cv2.cvtColor(_small(frame), cv2.COLOR_RGB2GRAY) for frame in frames]
    return float(np.mean([motion(a, b) for a, b in itertools.pairwise(luma)])) * fps


def _small(frame: np.ndarray) -> np.ndarray:
    smaller = min(frame.shape[:2]) > _SIDE
    return cv2.resize(frame, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)


def buckets_of(moved: Sequence[float], fastest: float) -> list[int]:
    """Return the motion buckets of motions in pixels per second; those from `fastest` on are in the last one."""
    return [min(LARGEST, round(LARGEST * one / fastest)) for one in moved]
