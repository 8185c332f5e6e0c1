"""open_clip's CoCa as one trainable module, its initialisation and its losses.

CoCa (Yu et al. 2022, arXiv:2205.01917): a vision tower; a causal text tower whose last token, a class token, is the
text's feature; and a decoder over the text tower's other tokens that looks at the image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F

from capstan.recaption.preprocess import Preprocessing

PAD: Final = 0  # open_clip's CoCa masks this id, and its loss ignores it
IGNORED: Final = -100  # label of tokens that are not learnt: prompts and padding
LOGIT_SCALE: Final = (0.0, math.log(100))  # bounds of its logarithm, as CLIP (Radford et al. 2021, section 2.5)


class Captioner(nn.Module):
    """`coca` with a single forward call, so that an engine can shard it."""

    def __init__(self, architecture: Mapping[str, Any], preprocessing: Preprocessing) -> None:
        from open_clip.coca_model import CoCa

        super().__init__()
        shape = {key: value for key, value in architecture.items() if key != "custom_text"}
        self.coca = CoCa(**shape, nonscalar_logit_scale=True)  # DeepSpeed cannot broadcast zero-dimensional tensors
        self.register_buffer("mean", torch.tensor(preprocessing.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std)[:, None, None], persistent=False)

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """Return the vision tower's input float32 [B, 3, H, W] for images uint8 [B, H, W, 3]."""
        return (images.permute(0, 3, 1, 2).float() / 255 - self.mean.float()) / self.std.float()

    def forward(
        self, images: torch.Tensor, tokens: torch.Tensor, length: int, contrast: bool, decode: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return normalised image and text features [B, W], the logit scale, and next-token logits [B, length − 1, V].

        Takes uint8 images [B, H, W, 3] and tokens [B, L] that are padding from `length` on. Without `contrast` the text
        tower runs without the padding, which only the class token after it needs. Without `decode` there are no logits.
        """
        dtype = self.coca.text_decoder.text_projection.dtype
        image, image_tokens = self.coca.visual(self.normalised(images).to(dtype))
        text, text_tokens = self.coca.text(tokens if contrast else tokens[:, :length])
        scale = self.coca.logit_scale.exp()  # kept below 100 after each step (LOGIT_SCALE)
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        if not decode:
            return image, text, scale, None
        return image, text, scale, self.coca.text_decoder(image_tokens, text_tokens[:, : length - 1]).float()


def initialize_coca(coca: Any) -> None:
    """Initialise what open_clip 3.3 leaves uninitialised or sets too small for a short training."""
    nn.init.normal_(coca.text_decoder.text_projection, std=coca.text_decoder.width**-0.5)  # else uninitialised memory
    if getattr(coca.visual, "positional_embedding", None) is not None:
        _set_positions(coca.visual)


def _set_positions(visual: Any) -> None:
    """Initialise the patches' learnt positions with sines and cosines of row and column.

    open_clip initialises them with noise of standard deviation width^-0.5, several times weaker than the patches'
    contents. Sines and cosines are as strong as the contents, and similar for neighbours.
    """
    from open_clip.pos_embed import get_2d_sincos_pos_embed

    rows, columns = visual.grid_size
    side = max(rows, columns)
    width = visual.positional_embedding.shape[1]
    grid = torch.from_numpy(get_2d_sincos_pos_embed(width, side, cls_token=False)).float().view(side, side, width)
    with torch.no_grad():
        visual.positional_embedding[1:] = grid[:rows, :columns].reshape(rows * columns, width)


def contrastive_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    others: tuple[torch.Tensor, torch.Tensor] | None = None,
    first: int = 0,
) -> torch.Tensor:
    """Return CLIP's symmetric cross-entropy, the mean over pairs of normalised features [B, W] (scalar).

    Pairs are compared with each other, or with `others` ([N, W], [N, W]), in which they stand from `first` on.
    """
    images, texts = others if others is not None else (image, text)
    labels = torch.arange(first, first + len(image), device=image.device)
    of_image = F.cross_entropy(scale.float() * image @ texts.T, labels)
    of_text = F.cross_entropy(scale.float() * text @ images.T, labels)
    return (of_image + of_text) / 2


def caption_loss(logits: torch.Tensor, labels: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean cross-entropy of the next token (scalar): logits [B, T, V], labels [B, T] with IGNORED.

    `tokens` (scalar) replaces the number of labels that are learnt: in a step of several parts, the mean over parts.
    """
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (learnt_tokens(labels) if tokens is None else tokens)


def learnt_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Return the number of labels that are learnt, at least 1, as a float scalar."""
    return (labels != IGNORED).sum().clamp(min=1).float()
