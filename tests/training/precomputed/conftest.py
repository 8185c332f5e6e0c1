"""A dataset of two shards with an untrained autoencoder, and with a frozen text encoder."""

import pytest
import torch
from encode_jobs import changed

from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.storage import Storage
from capstan.training.config import TrainConfig
from capstan.training.data.dataset import TrainingData
from capstan.training.data.tokenizer import Tokenizer
from capstan.training.models.autoencoder.family import AutoencoderFamily


@pytest.fixture
def recipe(make_dataset, tmp_path):
    """A dataset of two shards, and a recipe that trains on the latents of an untrained autoencoder."""
    folder = make_dataset(tmp_path / "ds", [40, 5])
    small = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
    train = TrainConfig.from_section({"model": "autoencoder", "run": "unused", "steps": 1, "autoencoder": small})
    for part in ("assets", "ae/product"):
        (tmp_path / part).mkdir(parents=True)
    data = TrainingData(Dataset(Storage(str(folder))), train.data, 0, layer=None)
    torch.manual_seed(0)
    AutoencoderFamily.make_assets(train, data, tmp_path / "assets")
    family = AutoencoderFamily(train, tmp_path / "assets")
    family.save(family.model, tmp_path / "ae" / "product")
    section = {
        "autoencoder": str(tmp_path / "ae"),
        "unet": small | {"heads": 2},
        "text": {"vocab_size": 600, "length": 16, "width": 16, "layers": 1, "heads": 2},
    }
    diffusion = {"model": "diffusion", "run": str(tmp_path / "run"), "steps": 1, "diffusion": section}
    diffusion["data"] = {"layer": None}
    return Recipe.model_validate({"dataset": str(folder), "train": diffusion, "resources": {"cpus": 2}})


@pytest.fixture
def frozen(recipe, tmp_path):
    """The same recipe with a frozen text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path / "text"
    Tokenizer.train([f"a red square, number {n}" for n in range(9)], 520).save(folder / "tokenizer")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    CLIPTextModel(CLIPTextConfig(vocab_size=600, max_position_embeddings=16, **shape)).save_pretrained(
        folder / "text_encoder"
    )
    return changed(recipe, text={"pretrained": str(folder)})
