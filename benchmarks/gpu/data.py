"""Datasets of drawings, and models of random weights at real shapes; made once, then read from the folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import simplejpeg

from benchmarks.gpu.results import Scale
from benchmarks.train import write_dataset
from capstan.pipeline.dataset.shards import Sample
from capstan.pipeline.records import make_key
from capstan.pipeline.world.captions import descriptive
from capstan.pipeline.world.render import render
from capstan.pipeline.world.scene import Vocabulary, draw_scene


def made(folder: Path, make: Callable[[Path], Any]) -> Path:
    """Return `folder`, made by `make` if it is not there; a process that is ended leaves no half of it."""
    if not folder.exists():
        partial = folder.with_name(f".partial-{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        make(partial)
        partial.replace(folder)
    return folder


def drawings(scale: Scale, pixels: int, count: int) -> Path:
    """Return a dataset of drawings with true descriptions."""

    def make(folder: Path) -> None:
        samples = []
        for number in range(count):
            scene, key = draw_scene(0, number, Vocabulary()), make_key(str(number))
            jpeg = simplejpeg.encode_jpeg(render(scene, pixels), 95)
            samples.append(Sample(key, jpeg, {"key": key}, descriptive(scene)))
        write_dataset(folder, samples, pixels)

    return made(scale.folder / f"drawings-{pixels}-{count}", make)


def autoencoder(scale: Scale) -> Path:
    """Return Stable Diffusion's autoencoder."""

    def make(folder: Path) -> None:
        from diffusers import AutoencoderKL

        channels = scale((128, 256, 512, 512), (8, 16))
        AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * len(channels),
            up_block_types=["UpDecoderBlock2D"] * len(channels),
            block_out_channels=channels,
            layers_per_block=scale(2, 1),
            latent_channels=4,
            norm_num_groups=scale(32, 4),
        ).save_pretrained(folder)

    return made(scale.folder / "autoencoder", make)


def text_encoder(scale: Scale, name: str) -> Path:
    """Return a text encoder with its tokenizer: clip (SD 1), clip-l and clip-g (SDXL, SD 3) with projection, or t5."""
    return made(scale.folder / name, lambda folder: _t5(folder, scale) if name == "t5" else _clip(folder, name, scale))


def _clip(folder: Path, name: str, scale: Scale) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from capstan.training.data.tokenizer import Tokenizer

    words = Tokenizer.train([descriptive(draw_scene(0, number, Vocabulary())) for number in range(200)], 8192)
    words.save(folder)
    width, layers, heads = scale({"clip-g": (1280, 32, 20)}.get(name, (768, 12, 12)), (16, 1, 2))
    config = CLIPTextConfig(
        vocab_size=words.vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        bos_token_id=words.start,
        eos_token_id=words.end,
        pad_token_id=words.pad,
    )
    (CLIPTextModel if name == "clip" else CLIPTextModelWithProjection)(config).save_pretrained(folder)


def _t5(folder: Path, scale: Scale) -> None:
    """Write an encoder of T5-large's shape over letters: XXL's 4.7 billion weights would fill the piece's minutes."""
    import string

    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = [(letter, -3.0) for letter in ("▁", *string.ascii_letters, *string.digits, ",", ".")]
    tokens = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters]
    T5Tokenizer(vocab=tokens, extra_ids=0).save_pretrained(folder)
    real = {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16}
    shape = scale(real, {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2})
    T5EncoderModel(T5Config(vocab_size=len(tokens), **shape)).save_pretrained(folder)
