"""Latents encoded once through the unit map, and training that reads them."""

import json

import numpy as np
import pytest
import torch

from pipeline.config import Recipe, fingerprint
from pipeline.errors import RecipeError
from pipeline.shards import Dataset, read_manifest, write_manifest
from pipeline.storage import Storage
from training.autoencoder import AutoencoderFamily
from training.autoencoder.family import load_autoencoder
from training.config import TrainConfig
from training.data import TrainingData
from training.diffusion import DiffusionFamily
from training.latents import LatentsJob, encode, encoder_identity, reader
from training.pixels import batch_of, to_signed


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def encode_here(recipe):
    """What `encode` does, without Ray: the job's stages in this process."""
    storage = Storage(recipe.dataset)
    dataset = Dataset(storage)
    autoencoder = recipe.train["diffusion"]["autoencoder"]
    identity = encoder_identity(load_autoencoder(autoencoder, "x"), 16)
    job = LatentsJob(dataset, autoencoder, identity, recipe.resources)
    storage.write(f"{job.folder}/recipe.json", json.dumps(identity).encode())
    apply = job.model()
    for entry in dataset.manifest.shards:
        unit = job.unit(entry)
        job.commit(unit, [apply(piece) for piece in job.prepare(unit)])
    return job.encoder


def test_stored_latents_are_those_of_the_autoencoder(recipe):
    encoder = encode_here(recipe)
    storage = Storage(recipe.dataset)
    dataset = Dataset(storage)
    read = reader(storage, encoder)
    vae = load_autoencoder(recipe.train["diffusion"]["autoencoder"], "x")
    data = TrainingData(dataset, TrainConfig.from_recipe(recipe).data, 0, layer=None)
    for shard, first, count in (("shard-000000", 0, 40), ("shard-000001", 40, 5)):
        latents = read(shard)
        assert latents.shape == (count, 8, 8, 8)
        assert latents.dtype == np.float16
        assert isinstance(latents, np.memmap)
        pictures = to_signed(batch_of([data.sample(first), data.sample(first + count - 1)], 16))
        with torch.no_grad():
            posterior = vae.encode(pictures).latent_dist
        mean, std = np.split(latents[[0, -1]].astype(np.float32), 2, axis=1)
        np.testing.assert_allclose(mean, posterior.mean.numpy(), atol=5e-3)
        np.testing.assert_allclose(std, posterior.std.numpy(), atol=5e-3)


def test_training_reads_them(recipe, tmp_path):
    encoder = encode_here(recipe)
    section = recipe.train | {"data": {"layer": None, "latents": encoder}}
    train = TrainConfig.from_section(section)
    storage = Storage(recipe.dataset)
    data = TrainingData(Dataset(storage), train.data, 0, layer=None, latents=reader(storage, encoder))
    assets = tmp_path / "diffusion-assets"
    assets.mkdir()
    DiffusionFamily.make_assets(train, data, assets)
    family = DiffusionFamily(train, assets)
    batch = family.prepare([data.at(number) for number in range(4)])
    assert set(batch) == {"ids", "latents"}
    loss, _ = family.loss(family.model, batch, torch.Generator().manual_seed(0))
    assert torch.isfinite(loss)
    wrong = TrainConfig.from_section(section | {"data": {"layer": None, "latents": "0" * 16}})
    with pytest.raises(RecipeError, match=f"are not of this autoencoder .* would be {encoder}"):
        DiffusionFamily.make_assets(wrong, data, tmp_path / "unused")


def test_the_id_changes_with_weights_and_size_only(recipe):
    path = recipe.train["diffusion"]["autoencoder"]
    vae = load_autoencoder(path, "x")
    same = fingerprint(encoder_identity(load_autoencoder(path, "x"), 16))
    assert fingerprint(encoder_identity(vae, 16)) == same
    assert fingerprint(encoder_identity(vae, 32)) != same
    with torch.no_grad():
        vae.decoder.conv_out.weight.add_(1)  # the decoder makes no latents
    assert fingerprint(encoder_identity(vae, 16)) == same
    with torch.no_grad():
        vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert fingerprint(encoder_identity(vae, 16)) != same


def test_missing_and_stale_latents_are_refused(recipe):
    storage = Storage(recipe.dataset)
    with pytest.raises(RecipeError, match="has no latents abc"):
        reader(storage, "abc")
    encoder = encode_here(recipe)
    manifest = read_manifest(storage)
    changed = [entry.model_copy(update={"sha256": "0" * 64}) for entry in manifest.shards]
    write_manifest(storage, manifest.model_copy(update={"shards": changed}))
    with pytest.raises(RecipeError, match="of an earlier version of that shard"):
        reader(storage, encoder)("shard-000000")
    storage.delete(f"latents/{encoder}/shard-000001.safetensors")
    with pytest.raises(RecipeError, match="lacks shard-000001"):
        reader(storage, encoder)("shard-000001")


def test_only_what_can_be_encoded_ahead_is(recipe):
    random = recipe.train | {"diffusion": recipe.train["diffusion"] | {"crop": "random"}}
    with pytest.raises(RecipeError, match=r"train\.diffusion\.crop"):
        encode(recipe.model_copy(update={"train": random}))
    other = {"model": "autoencoder", "run": "x", "steps": 1}
    with pytest.raises(RecipeError, match="is not trained on latents"):
        encode(recipe.model_copy(update={"train": other}))


@pytest.mark.integration
def test_encoding_through_the_unit_map_does_only_what_is_missing(recipe):
    summary = encode(recipe, progress=False)
    assert summary["shards_done"] == 2
    assert summary["samples"] == 45
    again = encode(recipe, progress=False)
    assert (again["shards_done"], again["shards_skipped"]) == (0, 2)
    storage, file = Storage(recipe.dataset), f"latents/{summary['encoder']}/shard-000001.safetensors"
    assert reader(storage, summary["encoder"])("shard-000001").shape == (5, 8, 8, 8)
    before = storage.read(file)
    storage.delete(file)
    assert encode(recipe, progress=False)["shards_done"] == 1
    assert storage.read(file) == before

    # Another selection's latents are written under the same names: those of the first one are done no longer.
    dataset, autoencoder = Dataset(storage), recipe.train["diffusion"]["autoencoder"]
    job = LatentsJob(dataset, autoencoder, encoder_identity(load_autoencoder(autoencoder, "x"), 16), recipe.resources)
    first = [job.unit(entry) for entry in dataset.manifest.shards]
    second = [job.unit(entry.model_copy(update={"sha256": "0" * 64})) for entry in dataset.manifest.shards]
    assert job.stale(first) == set()
    assert job.stale(second) == {unit.id for unit in first}
