"""Text states encoded once through the unit map, and training that reads them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from encode_jobs import changed, run_here

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.storage import Storage
from capstan.recaption.store import write_given_layer
from capstan.training import encode as encoding
from capstan.training.config import TrainConfig
from capstan.training.encode import encode_missing
from capstan.training.launch import train as train_
from capstan.training.models.diffusion.family import DiffusionFamily
from capstan.training.precomputed.text_embeddings import TextStatesJob
from capstan.training.precomputed.text_embeddings import plan as text_plan
from capstan.training.precomputed.text_embeddings import reader as read_text_states
from capstan.training.run import Run
from capstan.training.run_data import open_data, pin


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
