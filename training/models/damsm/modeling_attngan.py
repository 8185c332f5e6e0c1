"""DAMSM and AttnGAN in one file; `capstan export` writes it next to the weights of either

    model = AutoModel.from_pretrained(DIR, trust_remote_code=True)
    model.draw(["a red circle"], seeds=[0])          AttnGAN: uint8 [N, H, W, 3]
    model.similarity(images, ["a red circle"])       DAMSM: [images, texts]

It needs torch and transformers, not Capstan. Xu et al. 2018, “AttnGAN: fine-grained text to image generation with
attentional generative adversarial networks”.

Shapes: ids [B, T], 0 where there is no word; words [B, T, D]; sentence [B, D]; images [B, 3, H, W] in −1 … 1; regions
[B, R, D]; features h [B, C, H, W].
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

_UNKNOWN = 1  # id of all words that are not in the vocabulary


class DamsmConfig(PretrainedConfig):
    """Shape of a DAMSM. `vocabulary` lists the known words; their ids count from 2."""

    model_type = "damsm"

    def __init__(
        self,
        vocabulary: Sequence[str] = (),
        words: int = 18,
        channels: int = 256,
        tower: Sequence[int] = (64, 128, 256, 512),
        image_size: int = 256,
        **more: Any,
    ) -> None:
        super().__init__(**more)
        self.vocabulary, self.words, self.channels = list(vocabulary), words, channels
        self.tower, self.image_size = list(tower), image_size


class AttnGANConfig(PretrainedConfig):
    """Shape of an AttnGAN, with that of its text encoder."""

    model_type = "attngan"

    def __init__(
        self,
        vocabulary: Sequence[str] = (),
        words: int = 18,
        text_channels: int = 256,
        noise: int = 100,
        condition: int = 100,
        channels: int = 32,
        image_size: int = 256,
        stages: int = 3,
        generators: int = 3,
        blocks: int = 2,
        **more: Any,
    ) -> None:
        super().__init__(**more)
        self.vocabulary, self.words, self.text_channels = list(vocabulary), words, text_channels
        self.noise, self.condition, self.channels = noise, condition, channels
        self.image_size, self.stages, self.generators, self.blocks = image_size, stages, generators, blocks


def split(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def word_ids(texts: Sequence[str], known: dict[str, int], length: int) -> torch.Tensor:
    """Return ids [B, length] of the first words of texts."""
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in enumerate(texts):
        found = [known.get(word, _UNKNOWN) for word in split(text)][:length] or [_UNKNOWN]
        ids[row, : len(found)] = torch.tensor(found)
    return ids


class TextEncoder(nn.Module):
    """A bidirectional LSTM: ids → words [B, T, D] and sentence [B, D]."""

    def __init__(self, vocabulary: Sequence[str], length: int, channels: int) -> None:
        super().__init__()
        self.known = {word: number for number, word in enumerate(vocabulary, 2)}
        self.length = length
        self.embedding = nn.Embedding(len(vocabulary) + 2, channels)
        self.lstm = nn.LSTM(channels, channels // 2, batch_first=True, bidirectional=True)

    def ids(self, texts: Sequence[str]) -> torch.Tensor:
        """Return ids [B, T] of texts."""
        return word_ids(texts, self.known, self.length)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = (ids > 0).sum(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(self.embedding(ids), lengths, batch_first=True, enforce_sorted=False)
        states, (last, _) = self.lstm(packed)
        words, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True, total_length=ids.shape[1])
        return words, last.transpose(0, 1).flatten(1)


class ImageEncoder(nn.Module):
    """Convolutions that halve the image at every level: images → regions [B, R, D] and the whole image [B, D]."""

    def __init__(self, tower: Sequence[int], channels: int) -> None:
        super().__init__()
        levels: list[nn.Module] = []
        for before, after in zip((3, *tower[:-1]), tower, strict=True):
            halve = nn.Conv2d(before, after, 4, stride=2, padding=1)
            same = nn.Conv2d(after, after, 3, padding=1)
            groups = _groups(after)
            levels.append(
                nn.Sequential(
                    halve, nn.GroupNorm(groups, after), nn.LeakyReLU(0.2), same, nn.GroupNorm(groups, after),
                    nn.LeakyReLU(0.2),
                )
            )  # fmt: skip
        self.levels = nn.ModuleList(levels)
        self.to_regions = nn.Conv2d(tower[-2], channels, 1)
        self.to_whole = nn.Linear(tower[-1], channels)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = images
        for level in self.levels[:-1]:
            h = level(h)
        regions = self.to_regions(h).flatten(2).transpose(1, 2)
        return regions, self.to_whole(self.levels[-1](h).mean((2, 3)))


class DamsmModel(PreTrainedModel):
    """Text and image encoder into one space (Xu et al. 2018, section 3.2)."""

    config_class = DamsmConfig
    main_input_name = "images"

    def __init__(self, config: DamsmConfig) -> None:
        super().__init__(config)
        self.text = TextEncoder(config.vocabulary, config.words, config.channels)
        self.image = ImageEncoder(config.tower, config.channels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep what __init__ set."""

    def forward(self, images: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return regions, whole images, words and sentences."""
        return *self.image(images), *self.text(ids)

    @torch.no_grad()  # type: ignore[untyped-decorator,unused-ignore]
    def similarity(self, images: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        """Return the cosine of every image [B, 3, H, W] with every text, [B, texts]."""
        _, whole = self.image(images)
        _, sentence = self.text(self.text.ids(texts).to(images.device))
        return F.normalize(whole, dim=-1) @ F.normalize(sentence, dim=-1).T


# AttnGAN -------------------------------------------------------------------------------------------------------------


def _groups(channels: int) -> int:
    """Return the number of groups of at least 4 channels that are normalised together."""
    return next(count for count in (8, 4, 2, 1) if channels % count == 0 and (channels >= 4 * count or count == 1))


class Gated(nn.Sequential):
    """Convolution, normalisation and gate: [B, C, H, W] → [B, after, H, W], twice as large if `up`."""

    def __init__(self, before: int, after: int, *, up: bool = False) -> None:
        first: list[nn.Module] = [nn.Upsample(scale_factor=2)] if up else []
        conv = nn.Conv2d(before, 2 * after, 3, padding=1, bias=False)
        super().__init__(*first, conv, nn.GroupNorm(_groups(2 * after), 2 * after), nn.GLU(dim=1))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        last = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.block = nn.Sequential(Gated(channels, channels), last, nn.GroupNorm(_groups(channels), channels))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        done: torch.Tensor = h + self.block(h)
        return done


class Attention(nn.Module):
    """F^attn: for every position, the words of the caption, weighted by how well they fit (eq. 2 and 3)."""

    def __init__(self, channels: int, text_channels: int) -> None:
        super().__init__()
        self.words = nn.Linear(text_channels, channels, bias=False)  # U: words in the space of features

    def forward(
        self, h: torch.Tensor, words: torch.Tensor, mask: torch.Tensor, order: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return contexts [B, C, H, W] and weights [B, T, H, W].

        `order` [B, T], of ablations, gives each word's weight to another word of its caption.
        """
        keys = self.words(words)
        scores = torch.einsum("bchw,btc->bthw", h, keys).masked_fill(~mask[:, :, None, None], float("-inf"))
        weights = scores.softmax(1)
        if order is not None:
            weights = weights.gather(1, order[:, :, None, None].expand_as(weights))
        return torch.einsum("bthw,btc->bchw", weights, keys), weights


class Stage(nn.Module):
    """F_i: features and words → features of twice the side (eq. 1)."""

    def __init__(self, channels: int, text_channels: int, blocks: int) -> None:
        super().__init__()
        self.attention = Attention(channels, text_channels)
        self.blocks = nn.Sequential(*(Residual(2 * channels) for _ in range(blocks)))
        self.up = Gated(2 * channels, channels, up=True)

    def forward(
        self, h: torch.Tensor, words: torch.Tensor, mask: torch.Tensor, order: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        context, weights = self.attention(h, words, mask, order)
        return self.up(self.blocks(torch.cat([h, context], 1))), weights


class Made(NamedTuple):
    """What the generators drew: images from small to large, attention weights by stage, the condition's N(μ, σ²)."""

    images: list[torch.Tensor]
    attention: list[torch.Tensor]
    mean: torch.Tensor
    log_variance: torch.Tensor


class Generator(nn.Module):
    """Conditioning augmentation, and stages that attend to words; the last of them draw."""

    def __init__(self, config: AttnGANConfig) -> None:
        super().__init__()
        self.noise, self.augmentation = config.noise, config.condition
        channels, side = config.channels, config.image_size >> (config.stages - 1)  # side of the first features
        doublings = max(0, (side // 4).bit_length() - 1)
        self.side = side >> doublings
        most = max(doublings, 2)
        widths = [channels * 2**n for n in range(most, most - doublings, -1)] + [channels]
        self.condition = nn.Linear(config.text_channels, 4 * config.condition)  # before the gate
        start = nn.Linear(config.noise + config.condition, 2 * widths[0] * self.side**2, bias=False)
        self.start = nn.Sequential(start, nn.GLU(dim=1))
        self.first = nn.Sequential(*(Gated(before, after, up=True) for before, after in itertools.pairwise(widths)))
        stages = range(config.stages - 1)
        self.stages = nn.ModuleList(Stage(channels, config.text_channels, config.blocks) for _ in stages)
        self.to_image = nn.ModuleList(nn.Conv2d(channels, 3, 3, padding=1) for _ in range(config.generators))

    def augmented(self, sentence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and log-variance of the condition (Zhang et al. 2017, StackGAN, section 3.2)."""
        mean, log_variance = F.glu(self.condition(sentence), dim=1).chunk(2, dim=1)
        return mean, log_variance.clamp(-10, 10)

    def forward(
        self,
        words: torch.Tensor,
        sentence: torch.Tensor,
        mask: torch.Tensor,
        noise: torch.Tensor,
        order: torch.Tensor | None = None,
    ) -> Made:
        """Draw from encoded texts; `noise` [B, noise + condition] is the image's own, then the condition's."""
        z, e = noise.split([self.noise, self.augmentation], dim=1)
        mean, log_variance = self.augmented(sentence)
        h = self.start(torch.cat([z, mean + e * torch.exp(0.5 * log_variance)], 1)).unflatten(
            1, (-1, self.side, self.side)
        )
        h = self.first(h)
        features, attention = [h], []
        for stage in self.stages:
            h, weights = stage(h, words, mask, order)
            features.append(h)
            attention.append(weights)
        drawn = features[len(features) - len(self.to_image) :]
        images = [torch.tanh(layer(h)) for layer, h in zip(self.to_image, drawn, strict=True)]
        return Made(images, attention, mean, log_variance)


class AttnGANModel(PreTrainedModel):
    """Text encoder and generator."""

    config_class = AttnGANConfig
    main_input_name = "ids"

    def __init__(self, config: AttnGANConfig) -> None:
        super().__init__(config)
        self.text = TextEncoder(config.vocabulary, config.words, config.text_channels)
        self.generator = Generator(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep what __init__ set."""

    def forward(self, ids: torch.Tensor, noise: torch.Tensor, order: torch.Tensor | None = None) -> Made:
        """Draw from ids of words [B, T] and noise [B, noise + condition]."""
        words, sentence = self.text(ids)
        made: Made = self.generator(words, sentence, ids > 0, noise, order)
        return made

    @torch.no_grad()  # type: ignore[untyped-decorator,unused-ignore]
    def made(self, texts: Sequence[str], seeds: Sequence[int], *, shuffled: bool = False) -> Made:
        """Draw one image per text and seed; `shuffled`: each word's attention goes to another word of its text."""
        device, config = self.device, self.config
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        size = config.noise + config.condition
        noise = torch.stack([torch.randn(size, generator=one) for one in generators]).to(device, self.dtype)
        ids = self.text.ids(texts)
        order = torch.stack([_shuffled(row, one) for row, one in zip(ids, generators, strict=True)]).to(device)
        made: Made = self(ids.to(device), noise, order if shuffled else None)
        return made

    def draw(self, texts: Sequence[str], seeds: Sequence[int] | None = None) -> Any:
        """Return one image per text, uint8 [N, H, W, 3]; `seeds` default to 0, 1, …"""
        return self.pixels(self.made(texts, range(len(texts)) if seeds is None else seeds).images[-1])

    @staticmethod
    def pixels(images: torch.Tensor) -> Any:
        """Return images in −1 … 1 as uint8 [N, H, W, 3]."""
        scaled = ((images.float() + 1) * 127.5).round().clamp(0, 255)
        return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _shuffled(ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a permutation of the words of one text [T]; padding stays in its place."""
    count = int((ids > 0).sum())
    return torch.cat([torch.randperm(count, generator=generator), torch.arange(count, len(ids))])
