"""What SDXL is told of a picture beside its caption: how large it was, and what was cut from it."""

from __future__ import annotations

from collections.abc import Sequence

import simplejpeg
import torch

from training.family import Sample
from training.pixels import Crop


def conditions_of(samples: Sequence[Sample], size: int, *, crop: Crop = "center") -> torch.Tensor:
    """int64 [B, 6]: original height and width, top and left of the cut, height and width (Podell et al. 2023, §2.2).

    In diffusers' order of `add_time_ids`. Top and left are those of `training.pixels.square`: pixels of the picture as
    it is scaled for training.
    """
    rows = []
    for sample in samples:
        height, width = sample.height, sample.width
        if sample.jpeg:  # as the decoder gives it, which may scale down by itself
            height, width, *_ = simplejpeg.decode_jpeg_header(sample.jpeg, min_height=size, min_width=size)
        scale = size / min(height, width)
        spare = [max(size, round(side * scale)) - size for side in (height, width)]
        corner = [side // 2 for side in spare]
        if crop == "random":
            rng = sample.rng()
            corner = [int(rng.integers(side + 1)) for side in spare]
        rows.append([sample.original_height, sample.original_width, *corner, size, size])
    return torch.tensor(rows)
