"""Latents encoded once through the unit map, and training that reads them."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_networks as tiny
import torch
from safetensors.numpy import save as save_file_bytes

from capstan.pipeline.config import Recipe, fingerprint
from capstan.pipeline.dataset.shards import Dataset, read_manifest, write_manifest
from capstan.pipeline.errors import CapstanError, DamagedFile, RecipeError
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import MarkerLog
from capstan.recaption.store import write_given_layer
from capstan.training import encode as encoding
from capstan.training.config import TrainConfig
from capstan.training.data.dataset import TrainingData
from capstan.training.data.tokenizer import Tokenizer
from capstan.training.data.transforms import batch_of, cut, to_signed
from capstan.training.encode import encode, encode_missing
from capstan.training.launch import train as train_
from capstan.training.models.autoencoder.family import AutoencoderFamily, load_autoencoder
from capstan.training.models.diffusion.family import DiffusionFamily
from capstan.training.precomputed.files import metadata_of, parse
from capstan.training.precomputed.latents import LatentsJob, encoder_identity, plan, reader
from capstan.training.precomputed.text_embeddings import TextStatesJob
from capstan.training.precomputed.text_embeddings import plan as text_plan
from capstan.training.precomputed.text_embeddings import reader as read_text_states
from capstan.training.product import read_facts
from capstan.training.run import Run
from capstan.training.run_data import open_data, pin
from capstan.training.trainer import fit


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
    """What `encode` does of images, without Ray: the job's stages in this process."""
    dataset = Dataset(Storage(recipe.dataset))
    return run_here(LatentsJob(dataset, *plan(TrainConfig.from_recipe(recipe), dataset), recipe.resources))


def run_here(job):
    job.storage.write(f"{job.folder}/recipe.json", json.dumps(job.identity).encode())
    apply = job.model()
    for entry in job.dataset.manifest.shards:
        unit = job.unit(entry)
        job.commit(unit, [apply(piece) for piece in job.prepare(unit)])
    return job.encoder


def changed(recipe, data=None, **diffusion):
    """The recipe with other settings of train.data and train.diffusion."""
    train = recipe.train | {"data": recipe.train["data"] | (data or {})}
    return recipe.model_copy(update={"train": train | {"diffusion": train["diffusion"] | diffusion}})


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
    assert plan(TrainConfig.from_recipe(square), Dataset(storage))[1] != plan(train, Dataset(storage))[1]


def test_encoding_and_training_agree_on_the_size(recipe, make_dataset, tmp_path):
    """Images of 24 pixels, of which a network of patches of 8 latents, 2 pixels each, takes 16."""
    folder = make_dataset(tmp_path / "odd", [3], size=24)
    section = {name: recipe.train["diffusion"][name] for name in ("autoencoder", "text")}
    section |= {"preset": "dit-tiny", "config": tiny.TRANSFORMER | {"patch_size": 8}}
    recipe = recipe.model_copy(update={"dataset": str(folder), "train": recipe.train | {"diffusion": section}})
    identity = plan(TrainConfig.from_recipe(recipe), Dataset(Storage(recipe.dataset)))[1]
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


@pytest.fixture
def captioned(frozen):
    """The recipe's dataset with a layer that lacks some captions."""
    dataset, texts = Dataset(Storage(frozen.dataset)), {}
    for shard in dataset.shard_names:
        keys = dataset.table(shard, ["key"])["key"].to_pylist()
        texts |= {key: {"descriptive": f"a square like {key[:4]}"} for key in keys[1:]}
    write_given_layer(dataset.storage, "x", texts)
    return changed(frozen, {"layer": "x", "blend": {"descriptive": 1, "original": 1}, "text_states": "auto"})


def test_text_states_made_ahead_are_those_of_the_captions_drawn(captioned, tmp_path):
    train, storage = TrainConfig.from_recipe(captioned), Storage(captioned.dataset)
    run = Run(train)
    run.open(captioned.model_dump(mode="json"))
    pin(captioned, train, run)
    with pytest.raises(RecipeError, match=r"train\.data\.text_states: .* has no text states .*capstan encode"):
        open_data(captioned, train, run)
    identity = text_plan(train, Dataset(storage), "x")
    assert identity["slots"] == ["descriptive", "original"]
    job = TextStatesJob(Dataset(storage), train, identity, captioned.resources)
    run_here(job)
    data = open_data(captioned, train, run)
    encoder = DiffusionFamily.text_encoder(train)
    samples = [data.at(number) for number in range(20)]
    assert {sample.slot for sample in samples} == {"descriptive", "original"}
    with torch.no_grad():
        expected = encoder([sample.text for sample in samples])["text_states"]
    stored = np.stack([sample.states["text_states"] for sample in samples])
    assert stored.dtype == np.float16
    np.testing.assert_allclose(stored.astype(np.float32), expected.numpy(), atol=2e-3)

    assets = tmp_path / "diffusion-assets"
    assets.mkdir()
    DiffusionFamily.make_assets(train, data, assets)
    family = DiffusionFamily(train, assets)
    family.text.to(torch.device("cpu"))
    batch = family.prepare(samples)
    ahead, _ = family.loss(family.model, batch, torch.Generator().manual_seed(0))
    del batch["text_states"]
    on_the_fly, _ = family.loss(family.model, batch, torch.Generator().manual_seed(0))
    torch.testing.assert_close(ahead, on_the_fly, atol=1e-3, rtol=1e-3)


def test_text_states_of_other_captions_are_refused_and_made_again(captioned):
    train, storage = TrainConfig.from_recipe(captioned), Storage(captioned.dataset)
    dataset = Dataset(storage)
    job = TextStatesJob(dataset, train, text_plan(train, dataset, "x"), captioned.resources)
    encoder, work = run_here(job), [job.unit(entry) for entry in dataset.manifest.shards]
    for unit in work:
        job.markers.mark(unit.id, {"samples": 1})
    assert job.stale(work) == set()
    assert set(read_text_states(storage, encoder)("shard-000001")) == {
        "descriptive.text_states",
        "original.text_states",
    }
    name = "captions/x/shard-000001.parquet"
    storage.write_table(name, storage.read_table(name).slice(1))  # as `capstan remove` does
    with pytest.raises(RecipeError, match="the text states of shard-000001 belong to other captions"):
        read_text_states(storage, encoder)("shard-000001")
    assert job.stale(work) == {work[1].id}


def test_a_run_encodes_the_captions_of_its_own_layer_alone(captioned, monkeypatch):
    """Whichever is the latest by now, and even if the run could not be trained on that one."""
    recipe, encoded = changed(captioned, {"layer": "latest"}), []
    monkeypatch.setattr(encoding, "_run", lambda job, *_: encoded.append(job) or {"samples": 0})
    encode_missing(recipe)
    storage = Storage(recipe.dataset)
    (key,) = Dataset(storage).table("shard-000001", ["key"])["key"].to_pylist()[:1]
    write_given_layer(storage, "newer", {key: {"short": "a square"}})
    encode_missing(recipe)
    assert [job.identity["layer"] for job in encoded] == ["x", "x"]
    train = TrainConfig.from_recipe(recipe)
    pinned = json.loads((Run(train).folder / "pinned.json").read_text())
    assert pinned == {"layer": "x", "text_states": encoded[1].encoder}


def test_states_of_a_text_encoder_that_is_trained_are_refused_before_anything_starts(recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"train\.data\.text_states: the text encoder is trained"):
        train_(changed(recipe, {"text_states": "auto"}))


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
    dataset, autoencoder = Dataset(storage), recipe.train["diffusion"]["autoencoder"]
    job = LatentsJob(dataset, autoencoder, encoder_identity(load_autoencoder(autoencoder, "x"), 16), recipe.resources)
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


def test_text_states_that_are_not_finite_are_never_written(frozen):
    train = TrainConfig.from_recipe(frozen)
    dataset = Dataset(Storage(frozen.dataset))
    job = TextStatesJob(dataset, train, text_plan(train, dataset, None), frozen.resources)
    unit = job.unit(dataset.manifest.shards[1])
    pieces = [job.model()(piece) for piece in job.prepare(unit)]
    pieces[0]["states"]["text_states"] = pieces[0]["states"]["text_states"].copy()
    pieces[0]["states"]["text_states"][3] = np.inf
    key = dataset.table("shard-000001", ["key"])["key"][3].as_py()
    named = rf"the text encoder \(original\.text_states; .*one sample of shard-000001, the first is {key}"
    with pytest.raises(CapstanError, match=named):
        job.commit(unit, pieces)
    assert not list(Path(frozen.dataset).glob("latents/*/*.safetensors"))
