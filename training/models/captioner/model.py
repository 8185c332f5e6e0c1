"""open_clip's CoCa as one trainable module: images and captions → image and text features, and next-token logits.

CoCa (Yu et al. 2022, arXiv:2205.01917): a vision tower; a causal text tower whose last token, a class token, is the
text's feature; and a decoder over the text tower's other tokens that looks at the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F

from capstan.recaption.preprocess import Preprocessing

PAD: Final = 0  # open_clip's CoCa masks this id, and its loss ignores it
IGNORED: Final = -100  # label of what is not to be learnt: prompts and padding


class Captioner(nn.Module):
    """`coca`, called in one piece, so that an engine may shard it."""

    def __init__(self, architecture: Mapping[str, Any], preprocessing: Preprocessing) -> None:
        from open_clip.coca_model import CoCa

        super().__init__()
        shape = {key: value for key, value in architecture.items() if key != "custom_text"}
        self.coca = CoCa(**shape, nonscalar_logit_scale=True)  # DeepSpeed broadcasts no tensor without dimensions
        self.register_buffer("mean", torch.tensor(preprocessing.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std)[:, None, None], persistent=False)

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] → float32 [B, 3, H, W] as the vision tower wants it."""
        return (images.permute(0, 3, 1, 2).float() / 255 - self.mean.float()) / self.std.float()

    def forward(
        self, images: torch.Tensor, tokens: torch.Tensor, length: int, contrast: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """uint8 images [B, H, W, 3] and tokens [B, L], of which only the first `length` are no padding.

        Gives unit image and text features [B, W], the logits' scale, and logits [B, length − 1, V] of the tokens after
        the first. Without `contrast` the text tower is spared the padding, behind which the class token would stand.
        """
        dtype = self.coca.text_decoder.text_projection.dtype
        image, image_tokens = self.coca.visual(self.normalised(images).to(dtype))
        text, text_tokens = self.coca.text(tokens if contrast else tokens[:, :length])
        logits = self.coca.text_decoder(image_tokens, text_tokens[:, : length - 1])
        scale = self.coca.logit_scale.exp().clamp(max=100)  # as CLIP (Radford et al. 2021, section 2.5)
        return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1), scale, logits.float()


def initialise(coca: Any) -> None:
    """What open_clip 3.3 leaves to chance or sets too small for a short training."""
    nn.init.normal_(coca.text_decoder.text_projection, std=coca.text_decoder.width**-0.5)  # else uninitialised memory
    if getattr(coca.visual, "positional_embedding", None) is not None:
        _place(coca.visual)


def _place(visual: Any) -> None:
    """Start the patches' learnt positions from sines and cosines of row and column.

    open_clip starts from noise of standard deviation width^-0.5, which the patches' contents outweigh several times.
    These are as strong as the contents, and neighbours are alike from the start.
    """
    from open_clip.pos_embed import get_2d_sincos_pos_embed

    rows, columns = visual.grid_size
    side = max(rows, columns)
    width = visual.positional_embedding.shape[1]
    grid = torch.from_numpy(get_2d_sincos_pos_embed(width, side, cls_token=False)).float().view(side, side, width)
    with torch.no_grad():
        visual.positional_embedding[1:] = grid[:rows, :columns].reshape(rows * columns, width)


def contrastive_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The symmetric cross-entropy of CLIP over the batch's pairs: unit features [B, W] twice → scalar."""
    logits = scale.float() * image @ text.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def caption_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token: logits [B, T, V], labels [B, T] with IGNORED → scalar."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
