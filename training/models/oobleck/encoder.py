"""Sounds → latents of an AutoencoderOobleck, computed once before training (`capstan encode`)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

from capstan.training.data.sounds import Form, batch_of, piece_of, to_wave
from capstan.training.drawing.drawer import Size
from capstan.training.models.autoencoder.encoder import digest_of

LEAST: Final = 2  # latents of a sound: beside them are two numbers
_MILLI: Final = 1000


class SoundEncoder:
    """The AutoencoderOobleck `vae`, which the recipe's key `field` names, over the start of each sound in `form`.

    A latent is [C + 1, L]: the posterior's mean, and a row that begins with the length of the whole sound in seconds
    and milliseconds, which float16 holds exactly up to 2048 s.
    """

    factor: None = None  # it reads no pixels

    def __init__(self, vae: Any, form: Form, field: str) -> None:
        self.vae, self.form, self.part = vae, form, f"the autoencoder of sounds ({field})"

    def identity(self) -> dict[str, Any]:
        form = {"rate": self.form.rate, "channels": self.form.channels, "values": self.form.values}
        return {"weights": digest_of(self.vae.state_dict(), ("encoder.",)), **form, "format": 1}

    def to(self, device: torch.device) -> None:
        self.vae.to(device).eval()

    def __call__(self, files: Sequence[bytes], size: Size) -> torch.Tensor:
        pieces = [piece_of(file, self.form) for file in files]
        waves = to_wave(batch_of(pieces)).to(self.vae.device, self.vae.dtype)
        means = self.vae.encode(waves).latent_dist.mean.float()
        lengths = means.new_zeros(len(means), 1, means.shape[-1])
        lengths[:, 0, :LEAST] = torch.tensor([divmod(round(piece.total_s * _MILLI), _MILLI) for piece in pieces]).to(
            means
        )
        return torch.cat([means, lengths], dim=1)


def split_latents(latents: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means of stored latents, [B, C, L], and start and length of the whole sounds in seconds, [B, 2]."""
    stored = torch.from_numpy(np.stack(latents)).float()
    whole = stored[:, -1, 0] + stored[:, -1, 1] / _MILLI
    return stored[:, :-1], torch.stack([torch.zeros_like(whole), whole], dim=1)
