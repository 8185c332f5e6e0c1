"""Latents encoded once through the unit map, and training that reads them."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_networks as tiny
import torch
from encode_jobs import changed, run_here
from safetensors.numpy import save as save_file_bytes

from capstan.pipeline.config import fingerprint
from capstan.pipeline.dataset.shards import Dataset, read_manifest, write_manifest
from capstan.pipeline.errors import CapstanError, DamagedFile, RecipeError
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import MarkerLog
from capstan.training.config import TrainConfig
from capstan.training.data.dataset import TrainingData
from capstan.training.data.transforms import batch_of, cut, to_signed
from capstan.training.encode import encode, encode_missing
from capstan.training.models.autoencoder.family import load_autoencoder
from capstan.training.models.diffusion.family import DiffusionFamily
from capstan.training.precomputed.files import metadata_of, parse
from capstan.training.precomputed.latents import LatentsJob, latents_identity, plan, reader
from capstan.training.product import read_facts
from capstan.training.run import Run
from capstan.training.run_data import pin
from capstan.training.trainer import fit


def encode_here(recipe):
    """What `encode` does of images, without Ray: the job's stages in this process."""
    dataset, train = Dataset(Storage(recipe.dataset)), TrainConfig.from_recipe(recipe)
    return run_here(LatentsJob(dataset, train, plan(train, dataset), recipe.resources))


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
        images = to_signed(batch_of([data.sample(first), data.sample(first + count - 1)], 16))
        with torch.no_grad():
            posterior = vae.encode(images).latent_dist
        mean, std = np.split(latents[[0, -1]].astype(np.float32), 2, axis=1)
        np.testing.assert_allclose(mean, posterior.mean.numpy(), atol=5e-3)
        np.testing.assert_allclose(std, posterior.std.numpy(), atol=5e-3)


class TokenEncoder:
    """An encoder of a family that is trained on tokens: the mean brightness of each 4 × 4 pixels."""

    factor, part = 4, "the tokens"

    def identity(self):
        return {"tokens": "brightness"}

    def to(self, device):
        return self

    def __call__(self, files, size):
        images = np.stack([cut(jpeg, size) for jpeg in files]).mean(-1)
        count, height, width = images.shape
        blocks = images.reshape(count, height // 4, 4, width // 4, 4).mean((2, 4))
        return torch.from_numpy(blocks.round()).long()


@pytest.mark.parametrize("sizes", [[(16, 16)], [(16, 16), (24, 16), (16, 24)]])
def test_a_family_may_store_tokens(recipe, make_dataset, tmp_path, monkeypatch, sizes):
    folder = make_dataset(tmp_path / "shaped", [40, 5], sizes=sizes)
    monkeypatch.setattr(DiffusionFamily, "encoder", classmethod(lambda cls, train: TokenEncoder()))
    data = {"buckets": {"sizes": sizes}} if len(sizes) > 1 else {}
    recipe = changed(recipe, data).model_copy(update={"dataset": str(folder)})
    encoder, storage = encode_here(recipe), Storage(str(folder))
    (stored,) = parse(np.fromfile(folder / f"latents/{encoder}/shard-000001.safetensors", np.uint8)).values()
    assert stored.dtype == np.int16
    train = TrainConfig.from_recipe(changed(recipe, data | {"latents": encoder}))
    tokens, images = (
        TrainingData(Dataset(storage), train.data, 0, layer=None, latents=latents, batch=4)
        for latents in (reader(storage, encoder), None)
    )
    for index in (0, 1, 2, 41):
        sample = images.sample(index)
        width, height = size = sample.bucket or (16, 16)
        found = tokens.sample(index).latent
        assert (found.dtype, found.shape) == (np.int16, (height // 4, width // 4))
        np.testing.assert_array_equal(found, TokenEncoder()([sample.jpeg], size)[0].numpy())


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
    with pytest.raises(RecipeError, match=f"are of another autoencoder .* would be {encoder}"):
        DiffusionFamily.make_assets(wrong, data, tmp_path / "unused")


def test_the_id_changes_with_weights_and_size_only(recipe):
    encoder = DiffusionFamily.encoder(TrainConfig.from_recipe(recipe))
    again = DiffusionFamily.encoder(TrainConfig.from_recipe(recipe))
    same = fingerprint(latents_identity(again, 16))
    assert fingerprint(latents_identity(encoder, 16)) == same
    assert fingerprint(latents_identity(encoder, 32)) != same
    with torch.no_grad():
        encoder.vae.decoder.conv_out.weight.add_(1)  # the decoder makes no latents
    assert fingerprint(latents_identity(encoder, 16)) == same
    with torch.no_grad():
        encoder.vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert fingerprint(latents_identity(encoder, 16)) != same


def test_latents_that_earlier_versions_wrote_keep_their_id(recipe):
    """Their recipe.json is this, in this order; another id would have all of them encoded again."""
    encoder, digest = DiffusionFamily.encoder(TrainConfig.from_recipe(recipe)), hashlib.sha256()
    for name, weight in sorted(encoder.vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(name.encode() + weight.numpy().tobytes())
    before = {"weights": digest.hexdigest(), "crop": "center", "factor": 2, "format": 1, "size": 16}
    assert json.dumps(latents_identity(encoder, 16)) == json.dumps(before)


def test_missing_and_stale_latents_are_refused(recipe):
    storage = Storage(recipe.dataset)
    with pytest.raises(RecipeError, match="has no latents abc"):
        reader(storage, "abc")
    encoder = encode_here(recipe)
    manifest = read_manifest(storage)
    changed = [entry.model_copy(update={"sha256": "0" * 64}) for entry in manifest.shards]
    write_manifest(storage, manifest.model_copy(update={"shards": changed}))
    with pytest.raises(RecipeError, match="earlier version of that shard"):
        reader(storage, encoder)("shard-000000")
    storage.delete(f"latents/{encoder}/shard-000001.safetensors")
    with pytest.raises(RecipeError, match="lacks shard-000001"):
        reader(storage, encoder)("shard-000001")


def test_only_what_can_be_encoded_ahead_is(recipe):
    random = recipe.train | {"diffusion": recipe.train["diffusion"] | {"crop": "random"}}
    with pytest.raises(RecipeError, match=r"train\.diffusion\.crop"):
        encode(recipe.model_copy(update={"train": random}))
    for latents in ("auto", "0" * 16):
        with pytest.raises(RecipeError, match=r"train\.diffusion\.crop: latents .* remove train\.data\.latents"):
            TrainConfig.from_recipe(changed(recipe, {"latents": latents}, crop="random"))
    other = {"model": "autoencoder", "run": "x", "steps": 1}
    with pytest.raises(RecipeError, match="is not trained on latents"):
        encode(recipe.model_copy(update={"train": other}))


def test_latents_of_buckets_have_their_shapes(recipe, make_dataset, tmp_path):
    folder = make_dataset(tmp_path / "shaped", [40, 5], sizes=[(16, 16), (24, 16), (16, 24), (100, 80)])
    buckets = {"sizes": [(16, 16), (24, 16), (16, 24)]}
    recipe = changed(recipe, {"buckets": buckets}).model_copy(update={"dataset": str(folder)})
    encoder = encode_here(recipe)
    storage, train = Storage(recipe.dataset), TrainConfig.from_recipe(changed(recipe, {"latents": encoder}))
    data = TrainingData(
        Dataset(storage), train.data, 0, layer=None, latents=reader(storage, encoder), batch=4, order_seed=1
    )
    images = TrainingData(Dataset(storage), train.data, 0, layer=None, batch=4)
    vae = load_autoencoder(recipe.train["diffusion"]["autoencoder"], "x")
    for index in (0, 1, 2, 39, 41):
        sample = data.sample(index)
        width, height = sample.bucket
        assert sample.latent.shape == (8, height // 2, width // 2)
        signed = to_signed(torch.from_numpy(cut(images.sample(index).jpeg, sample.bucket)).permute(2, 0, 1)[None])
        with torch.no_grad():
            mean = vae.encode(signed).latent_dist.mean[0]
        np.testing.assert_allclose(sample.latent[:4].astype(np.float32), mean.numpy(), atol=5e-3)
    assets = tmp_path / "diffusion-assets"
    assets.mkdir()
    DiffusionFamily.make_assets(train, data, assets)
    family = DiffusionFamily(train, assets)
    shapes = set()
    for start in range(0, 40, 4):
        batch = family.prepare([data.at(number) for number in range(start, start + 4)])
        shapes.add(batch["latents"].shape[2:])
        loss, _ = family.loss(family.model, batch, torch.Generator().manual_seed(0))
        assert torch.isfinite(loss)
    assert len(shapes) == 3
    square = changed(recipe, {"buckets": None})
    assert plan(TrainConfig.from_recipe(square), Dataset(storage)) != plan(train, Dataset(storage))


def test_encoding_and_training_agree_on_the_size(recipe, make_dataset, tmp_path):
    """Images of 24 pixels, of which a network of patches of 8 latents, 2 pixels each, takes 16."""
    folder = make_dataset(tmp_path / "odd", [3], size=24)
    section = {name: recipe.train["diffusion"][name] for name in ("autoencoder", "text")}
    section |= {"preset": "dit-tiny", "config": tiny.TRANSFORMER | {"patch_size": 8}}
    recipe = recipe.model_copy(update={"dataset": str(folder), "train": recipe.train | {"diffusion": section}})
    identity = plan(TrainConfig.from_recipe(recipe), Dataset(Storage(recipe.dataset)))
    assert identity["size"] == 16
    train = TrainConfig.from_recipe(changed(recipe, {"latents": fingerprint(identity)}))
    DiffusionFamily.make_assets(train, tiny.data_of(folder), tmp_path)
    assert read_facts(tmp_path)["size"] == 16
    shaped = changed(recipe, {"buckets": {"sizes": [(16, 16), (24, 16)]}})
    with pytest.raises(RecipeError, match=r"train\.data\.buckets: a bucket of 24 × 16 pixels does not divide by 16"):
        plan(TrainConfig.from_recipe(shaped), Dataset(Storage(recipe.dataset)))


def test_a_run_keeps_to_the_autoencoder_whose_latents_it_reads(recipe):
    recipe = changed(recipe, {"latents": "auto"})
    train = TrainConfig.from_recipe(recipe)
    pin(recipe, train, Run(train))
    pin(recipe, train, Run(train))
    path = Path(recipe.train["diffusion"]["autoencoder"]) / "product"
    vae = load_autoencoder(str(path), "x")
    with torch.no_grad():
        vae.encoder.conv_in.weight.add_(1e-3)
    vae.save_pretrained(path)
    with pytest.raises(RecipeError, match=r"train\.data\.latents: this run was started with latents"):
        pin(recipe, train, Run(train))


def test_sizes_that_the_unet_cannot_halve_are_refused(recipe, tmp_path):
    buckets = {"sizes": [(16, 16), (18, 14)]}
    train = TrainConfig.from_recipe(changed(recipe, {"buckets": buckets}))
    data = TrainingData(Dataset(Storage(recipe.dataset)), train.data, 0, layer=None, batch=4)
    with pytest.raises(RecipeError, match=r"train\.data\.buckets: a bucket of 18 × 14 pixels does not divide by 8"):
        DiffusionFamily.make_assets(train, data, tmp_path)


@pytest.mark.integration
def test_encoding_through_the_unit_map_does_only_what_is_missing(frozen):
    recipe = changed(frozen, {"latents": "auto", "text_states": "auto"})
    summary = encode(recipe, progress=False)
    assert (summary["shards_done"], summary["samples"], summary["captions"]) == (4, 45, 45)
    again = encode(recipe, progress=False)
    assert (again["shards_done"], again["shards_skipped"]) == (0, 4)
    storage, file = Storage(recipe.dataset), f"latents/{summary['encoder']}/shard-000001.safetensors"
    assert reader(storage, summary["encoder"])("shard-000001").shape == (5, 8, 8, 8)
    before = storage.read(file)
    storage.delete(file)
    encode_missing(recipe, progress=False)
    assert storage.read(file) == before
    assert fit(recipe)["steps"] == 1
    pinned = json.loads((Path(recipe.train["run"]) / "pinned.json").read_text())
    assert pinned == {"layer": None, "text_states": summary["text_states"], "latents": summary["encoder"]}

    # Another selection's latents are written under the same names: those of the first one are done no longer.
    dataset, train = Dataset(storage), TrainConfig.from_recipe(recipe)
    job = LatentsJob(dataset, train, plan(train, dataset), recipe.resources)
    first = [job.unit(entry) for entry in dataset.manifest.shards]
    second = [job.unit(entry.model_copy(update={"sha256": "0" * 64})) for entry in dataset.manifest.shards]
    assert job.stale(first) == set()
    assert job.stale(second) == {unit.id for unit in first}


def test_a_flipped_bit_in_latents_is_seen_by_readers_and_by_verify(recipe):
    storage, encoder = Storage(recipe.dataset), encode_here(recipe)
    name = f"latents/{encoder}/shard-000001.safetensors"
    (entry,) = [entry for entry in read_manifest(storage).shards if entry.name == "shard-000001"]
    MarkerLog(storage, f"latents-{encoder}").mark(f"{entry.name}-{entry.sha256[:12]}", {})  # as the unit map does
    whole = storage.read(name)
    for place in (5, 40, -100):  # in the header's length, in the header, in the values
        data = bytearray(whole)
        data[place] ^= 1
        storage.write(name, bytes(data))
        reader(storage, encoder)("shard-000000")
        with pytest.raises(DamagedFile, match=name):
            reader(storage, encoder)("shard-000001")
        assert [line for line in verify(storage) if line.startswith(f"{name}: damaged")]
    storage.delete(name)
    (missing,) = [line for line in verify(storage) if line.startswith("latents/")]
    assert missing == f"{name}: missing: run `capstan encode` to make it again"
    encode(recipe, progress=False)
    again, before = (parse(np.frombuffer(data, np.uint8))["latents"] for data in (storage.read(name), whole))
    assert again.tobytes() == before.tobytes()
    assert not [line for line in verify(storage) if line.startswith("latents/")]


def test_latents_of_an_earlier_version_have_no_checksum(recipe):
    storage, encoder = Storage(recipe.dataset), encode_here(recipe)
    name = f"latents/{encoder}/shard-000001.safetensors"
    raw = np.frombuffer(storage.read(name), np.uint8)
    metadata = {"shard_sha256": metadata_of(raw)["shard_sha256"]}
    storage.write(name, save_file_bytes({k: np.ascontiguousarray(v) for k, v in parse(raw).items()}, metadata=metadata))
    assert len(reader(storage, encoder)("shard-000001")) == len(parse(raw)["latents"])


@pytest.mark.parametrize(("factor", "what"), [(float("nan"), "NaN"), (1e7, r"beyond half precision \(65,504\)")])
def test_latents_that_are_not_finite_are_never_written(recipe, tmp_path, factor, what):
    vae = load_autoencoder(recipe.train["diffusion"]["autoencoder"], "x")
    with torch.no_grad():
        vae.quant_conv.bias.add_(1).mul_(factor)
    vae.save_pretrained(tmp_path / "broken")
    broken = changed(recipe, autoencoder=str(tmp_path / "broken"))
    first = Dataset(Storage(recipe.dataset)).table("shard-000000", ["key"])["key"][0].as_py()
    problem = rf"the autoencoder \(train\.diffusion\.autoencoder\) made values that are {what}: 40 of 40 samples"
    with pytest.raises(CapstanError, match=rf"{problem} of shard-000000, the first is {first}\. Fix: "):
        encode_here(broken)
    assert not list(Path(recipe.dataset).glob("latents/*/*.safetensors"))
