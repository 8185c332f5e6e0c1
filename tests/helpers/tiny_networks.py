"""A diffusion family a backbone, each drawn in milliseconds: untrained, but shaken so that everything matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_towers
import torch

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.storage import Storage
from capstan.training.config import TrainConfig
from capstan.training.data.dataset import TrainingData
from capstan.training.models.autoencoder.family import AutoencoderFamily
from capstan.training.models.diffusion.family import DiffusionFamily

UNET = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "heads": 2}
OWN = {"vocab_size": 600, "length": 16, "width": 16, "layers": 2, "heads": 2}
SDXL = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 2],
    "addition_time_embed_dim": 8,
}
TRANSFORMER = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
ENCODERS = {"sd": ["clip"], "sdxl": ["plain", "clip"], "dit": ["t5"], "mmdit": ["clip", "clip", "t5"]}
NETWORKS: dict[str, dict[str, Any]] = {
    "sd": {"unet": UNET},
    "sdxl": {"preset": "sdxl-tiny", "config": SDXL},
    "dit": {"preset": "dit-tiny", "config": TRANSFORMER},
    "mmdit": {"preset": "mmdit-tiny", "config": TRANSFORMER},
}


def save_towers(root: Path) -> dict[str, str]:
    """Folders of encoders: a CLIP with and without projection, a T5."""
    return {
        "clip": tiny_towers.save_clip(root / "clip"),
        "plain": tiny_towers.save_clip(root / "plain", projected=False, seed=1),
        "t5": tiny_towers.save_t5(root / "t5"),
    }


def settings_of(network: str, towers: dict[str, str] | None, **others: Any) -> dict[str, Any]:
    """`train.diffusion` of a tiny network with frozen encoders (`towers`), or its own (None)."""
    text = OWN if towers is None else {"pretrained": [towers[name] for name in ENCODERS[network]]}
    return NETWORKS[network] | {"text": text} | others


def parsed(**section: Any) -> Any:
    """`train.diffusion` as a recipe is read. Raises RecipeError where it is wrong."""
    train = {"model": "diffusion", "run": "x", "steps": 1, "diffusion": {"autoencoder": "y"} | section}
    return TrainConfig.from_section(train).settings


def data_of(dataset: Path) -> TrainingData:
    section = {"model": "autoencoder", "run": "unused", "steps": 1, "data": {"layer": None}}
    return TrainingData(Dataset(Storage(str(dataset))), TrainConfig.from_section(section).data, 0, layer=None)


def save_autoencoder(dataset: Path, run: Path, **shape: Any) -> str:
    """A run folder with an untrained autoencoder: 16 pixels → latents [4, 8, 8]."""
    small = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4} | shape
    train = TrainConfig.from_section({"model": "autoencoder", "run": str(run), "steps": 1, "autoencoder": small})
    return _saved(AutoencoderFamily, train, dataset, run)


def family_of(dataset: Path, assets: Path, settings: dict[str, Any], **train: Any) -> DiffusionFamily:
    """A family whose network is shaken: zeros at the start (adaLN-Zero) would hide most of it."""
    section = {"model": "diffusion", "run": "unused", "steps": 1, "diffusion": settings} | train
    config = TrainConfig.from_section(section)
    assets.mkdir(parents=True)
    DiffusionFamily.make_assets(config, data_of(dataset), assets)
    torch.manual_seed(0)
    family = DiffusionFamily(config, assets)
    shake(family.model)
    family.to(torch.device("cpu"))
    return family


def shake(model: torch.nn.Module, by: float = 0.1) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(by * torch.randn_like(weight))


def save_product(family: Any, run: Path) -> Path:
    """What the trainer would leave in `run`."""
    (run / "product").mkdir(parents=True)
    family.save(family.model, run / "product")
    return run


def _saved(kind: Any, train: TrainConfig, dataset: Path, run: Path) -> str:
    (run / "assets").mkdir(parents=True)
    torch.manual_seed(0)
    kind.make_assets(train, data_of(dataset), run / "assets")
    family = kind(train, run / "assets")
    save_product(family, run)
    return str(run)


def told(net, call):
    """What `net` is called with, noise and time left out, while `call` runs for the first time."""
    seen = []

    def note(_, args, kwargs):
        more = {name: value for name, value in kwargs.items() if isinstance(value, dict)}
        tensors = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
        for inner in more.values():
            tensors |= {name: value for name, value in inner.items() if value is not None}
        for name in ("hidden_states", "timestep"):
            tensors.pop(name, None)
        seen.append({name: value.detach().float() for name, value in tensors.items()})

    hook = net.register_forward_pre_hook(note, with_kwargs=True)
    call()
    hook.remove()
    return seen[0]
