"""Every backbone: it is told in training what its pipeline tells it, learns, and draws elsewhere what it draws here."""

import json
import shutil
import sys

import numpy as np
import pytest
import tiny_networks as tiny
import torch
import warm_python
from diffusers import DiffusionPipeline

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.world import oracle
from capstan.training.config import TrainConfig
from capstan.training.evaluate import evaluate
from capstan.training.export import export
from capstan.training.models.diffusion.family import DiffusionFamily
from capstan.training.models.diffusion.registry import backbone_of
from capstan.training.product import read_facts
from capstan.training.sample import open_sampler, sample

CAPTION = "a red square, number 3"
CASES = [(network, own) for network in tiny.NETWORKS for own in (False, True)]


@pytest.mark.parametrize(("network", "own"), CASES)
def test_a_network_is_told_in_training_what_its_pipeline_tells_it(make, run_of, squares, network, own):
    """With guidance a pipeline tells of an empty prompt and the given one: as rows that lost a caption, or kept it."""
    family = make(network, own, sampling={"steps": 2, "guidance": 2.0})
    batch = family.prepare([tiny.data_of(squares).at(number) for number in (3, 3)])
    batch |= family.text.ids([CAPTION] * 2)
    noisy, times = torch.zeros(2, 4, 8, 8), torch.tensor([1, 1])
    text = family.text.given(batch, torch.tensor([True, False]))
    here = tiny.told(family.model.net, lambda: family.model(noisy, times, text, batch.get("conditions")))
    pipeline = open_sampler(run_of(network, own)).pipeline
    net = getattr(pipeline, family.backbone.part)
    sampler = open_sampler(run_of(network, own))
    net = getattr(sampler.pipeline, family.backbone.part)
    there = tiny.told(net, lambda: sampler.draw([CAPTION], [0]))
    assert set(here) == set(there)
    assert len(here) == {"sd": 1, "sdxl": 3, "dit": 2, "mmdit": 2}[network]
    for name, value in here.items():
        torch.testing.assert_close(value, there[name].expand_as(value), atol=1e-5, rtol=1e-4, msg=name)
    assert not torch.equal(here["encoder_hidden_states"][0], here["encoder_hidden_states"][1])


@pytest.mark.parametrize(("network", "own"), CASES)
def test_every_weight_learns(make, squares, network, own):
    """DDP waits for ever for a gradient that does not come."""
    family = make(network, own)
    samples = [tiny.data_of(squares).at(number) for number in range(4)]
    loss, _ = family.loss(family.model, family.prepare(samples), torch.Generator().manual_seed(0))
    family.model.zero_grad()
    loss.backward()
    idle = [name for name, weight in family.model.named_parameters() if weight.grad is None]
    assert idle == []
    assert any(name.startswith("text_encoder") for name, _ in family.model.named_parameters()) == own


@pytest.mark.parametrize("network", tiny.NETWORKS)
def test_gradient_checkpointing_changes_no_gradient(make, squares, network):
    family = make(network, own=True, drop_text=0.15)
    batch, found = family.prepare([tiny.data_of(squares).at(number) for number in range(2)]), []
    family.model.train()
    for switch in (lambda: None, family.model.enable_gradient_checkpointing):
        switch()
        family.model.zero_grad()
        loss, _ = family.loss(family.model, batch, torch.Generator().manual_seed(0))
        loss.backward()
        found.append([weight.grad.clone() for weight in family.model.parameters()])
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("network", tiny.NETWORKS)
def test_states_made_ahead_stand_in_for_captions(make, squares, network):
    family = make(network, drop_text=0.5)
    batch = family.prepare([tiny.data_of(squares).at(number) for number in range(4)])
    captions = [tiny.data_of(squares).at(number).text for number in range(4)]
    ahead = {name: value for name, value in batch.items() if not name.startswith("ids")} | family.text(captions)
    losses = [family.loss(family.model, b, torch.Generator().manual_seed(1))[0].item() for b in (batch, ahead)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("network", ["sdxl", "mmdit"])
def test_encoders_are_dropped_each_by_itself(make, squares, network):
    """What all but no encoder is kept of does not depend on the captions."""
    family = make(network, drop_text=0.0, drop_each=0.999999)
    samples = [tiny.data_of(squares).at(number) for number in range(4)]
    batch = family.prepare(samples)
    other = batch | family.text.ids(["quite other words"] * 4)
    losses = []
    for given in (batch, other):
        loss, metrics = family.loss(family.model, given, torch.Generator().manual_seed(0))
        assert metrics["encoders_dropped"] == 1
        losses.append(loss.item())
    assert losses[0] == losses[1]
    text = family.text.states(batch)
    alone = [torch.tensor([[n == kept for n in range(len(family.text.encoders))]] * 4) for kept in (0, 1)]
    conditions, noisy = batch.get("conditions"), torch.zeros(4, 4, 8, 8)
    seen = [
        tiny.told(family.model.net, lambda kept=kept: family.model(noisy, torch.ones(4), text, conditions, kept))
        for kept in alone
    ]
    assert not torch.equal(seen[0]["encoder_hidden_states"], seen[1]["encoder_hidden_states"])
    for states in seen:
        assert (states["encoder_hidden_states"] == 0).any()
        assert not (states["encoder_hidden_states"] == 0).all()


@pytest.mark.parametrize("network", ["dit", "mmdit"])
def test_transformers_begin_with_a_prediction_of_zero(squares, root, towers, make, network):
    """adaLN-Zero: diffusers' own start is another, and learns worse."""
    family = make(network)
    torch.manual_seed(0)
    fresh = DiffusionFamily(
        TrainConfig.from_section(
            {
                "model": "diffusion",
                "run": "x",
                "steps": 1,
                "diffusion": tiny.settings_of(network, towers, autoencoder=str(root / "ae")),
            }
        ),
        family.assets,
    )
    text = fresh.text.states(fresh.text.ids([CAPTION]))
    noisy = torch.randn(1, 4, 8, 8)
    assert not fresh.model(noisy, torch.tensor([500]), text).any()
    assert family.model(noisy, torch.tensor([500]), text).any()


@pytest.mark.parametrize(("network", "own"), [("sdxl", True), ("dit", False), ("mmdit", True)])
def test_a_product_starts_another_run(make, run_of, network, own):
    """With the tokenizer of the run before, if text encoders are trained on."""
    run = run_of(network, own)
    family = make(network, own, init=str(run))
    family.start_from(run / "product")
    wanted = make(network, own, sampling={"steps": 2, "guidance": 2.0})
    for name, weight in family.model.state_dict().items():
        torch.testing.assert_close(weight, wanted.model.state_dict()[name])
    torch.testing.assert_close(family.text.ids([CAPTION]), wanted.text.ids([CAPTION]))
    with pytest.raises(RecipeError, match=r"train\.init"):
        family.start_from(run_of("sd") / "product")


# Drawing -------------------------------------------------------------------------------------------------------------

_ELSEWHERE = """
import json, sys
import numpy as np, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
for folder, more in json.loads(sys.argv[1]).items():
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline("a red square", num_inference_steps=2, guidance_scale=2.0, output_type="np",
                      generator=torch.Generator("cpu").manual_seed(3), **more)
    np.save(folder + ".npy", result.images[0])
ours = [name for name in sys.modules if name.split(".")[0] == "capstan"]
assert not ours, ours
"""


def test_diffusers_alone_draws_the_image_that_we_draw(make, run_of, root, squares, towers):
    """For every backbone and for other samplers; PixArt's pipeline knows sizes of 256 and more, hence a run of 256."""
    vae = tiny.save_autoencoder(squares, root / "ae-256", block_out_channels=[4, 4, 4, 4], size=256)
    big = make("dit", autoencoder=vae, size=256, sampling={"steps": 2, "guidance": 2.0})
    runs = {name: (run_of(*case), None, {}) for case in CASES for name in ["-".join(map(str, case))]}
    for name in ("dit-False", "dit-True"):
        runs[name] = (*runs[name][:2], {"use_resolution_binning": False})
    runs["dit-256"] = (tiny.save_product(big, root / "run-dit-256"), None, {})
    runs |= {"sd-euler": (run_of("sd"), "euler", {}), "mmdit-dpm": (run_of("mmdit"), "dpm++", {})}
    asked, ours = {}, {}
    for name, (run, sampler, more) in runs.items():
        folder = str(root / f"exported-{name}")
        summary = export(run, folder, sampler=sampler)
        assert summary["pipeline"] == _PIPELINES[name.partition("-")[0]]
        asked[folder], ours[folder] = (
            more,
            open_sampler(run, sampler=sampler).draw(["a red square"], [3]).arrays[0] / 255,
        )
    warm_python.run([sys.executable, "-c", _ELSEWHERE, json.dumps(asked)], check=True, cwd=root, timeout=300)
    for folder, image in ours.items():
        theirs = np.load(folder + ".npy")
        assert np.abs(theirs - image).max() <= 0.5 / 255 + 1e-3, folder  # ours is rounded to 8 bits
        assert image.std() > 0.01, folder


_PIPELINES = {
    "sd": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "dit": "PixArtSigmaPipeline",
    "mmdit": "StableDiffusion3Pipeline",
}


@pytest.mark.parametrize("network", tiny.NETWORKS)
def test_images_follow_prompt_seed_guidance_negative_and_sampler(run_of, network):
    run = run_of(network)
    sampler = open_sampler(run)
    base = sampler.draw([CAPTION, "a blue square"], [1, 2]).arrays.astype(int)
    alone = sampler.draw([CAPTION], [1]).arrays.astype(int)
    assert np.abs(base[0] - alone[0]).max() <= 1
    others = {
        "seed": sampler.draw([CAPTION], [7]).arrays,
        "guidance": sampler.draw([CAPTION], [1], guidance=9.0).arrays,
        "negative": sampler.draw([CAPTION], [1], negative="a green square, number 8").arrays,
        "sampler": open_sampler(run, sampler="dpm++" if network == "mmdit" else "euler")
        .draw([CAPTION], [1], steps=4)
        .arrays,
        "prompt": sampler.draw(["a yellow square, number 7"], [1]).arrays,
    }
    reference = {"sampler": sampler.draw([CAPTION], [1], steps=4).arrays.astype(int)}
    for name, drawn in others.items():
        assert np.abs(drawn.astype(int)[0] - reference.get(name, alone)[0]).max() > 0, name


def test_a_sampler_for_another_path_is_refused(run_of, tmp_path, capsys):
    from capstan.cluster.cli import run as capstan

    command = ["sample", str(run_of("mmdit")), "-p", CAPTION, "-o", str(tmp_path / "g.png")]
    assert capstan([*command, "--sampler", "ddim"]) == 2
    assert "--sampler: ddim is not for flow models. Fix: use dpm++ or euler" in capsys.readouterr().err
    assert capstan([*command, "--sampler", "dpm++"]) == 0


@pytest.mark.parametrize("network", ["sdxl", "dit", "mmdit"])
def test_every_backbone_is_evaluated(run_of, squares, tmp_path, monkeypatch, network):
    monkeypatch.setattr(oracle, "accuracy_on_clean", lambda *_: {})  # of no backbone, and slow
    shutil.copytree(run_of(network), tmp_path / "run")
    source = {"format": "world", "world": {"scenes": 4, "size": 16}}
    recipe = {"recipe": {"dataset": str(squares), "source": source}}
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(recipe))
    result = evaluate(tmp_path / "run", count=2, steps=1)
    assert 0 <= result["measures"]["background"]["value"] <= 1


def test_a_image_may_have_another_size(run_of, tmp_path):
    """As aspect-ratio buckets train them."""
    for network in tiny.NETWORKS:
        assert sample(run_of(network), [CAPTION], tmp_path / "g.png", size=(24, 16))["size"] == [16, 24]
    with pytest.raises(RecipeError, match="--size: 20x16 pixels do not divide by 8"):
        sample(run_of("mmdit"), [CAPTION], tmp_path / "g.png", size=(20, 16))


def test_the_size_is_that_of_the_buckets(squares, root, towers, tmp_path, run_of):
    """Not that of a stored image, 16 pixels; and there is room for the longest bucket."""
    run_of("sd")  # its autoencoder
    data = {"layer": None, "buckets": {"sizes": [(32, 32), (160, 16)]}}
    section = tiny.settings_of("mmdit", towers, autoencoder=str(root / "ae"), flow={"base": 16})
    family = tiny.family_of(squares, tmp_path / "assets", section, data=data)
    assert (family.size, family.model.net.config.sample_size) == (48, 24)  # √(160 · 16) = 50.6
    assert family.process.shift == 3
    text = family.text.states(family.text.ids([CAPTION]))
    assert family.model(torch.zeros(1, 4, 8, 80), torch.tensor([500.0]), text).shape == (1, 4, 8, 80)
    small = section | {"config": tiny.TRANSFORMER | {"pos_embed_max_size": 39}}
    with pytest.raises(RecipeError, match=r"config\.pos_embed_max_size: is 39, but the longest side .* 40 patches"):
        tiny.family_of(squares, tmp_path / "small", small, data=data)


# Recipes -------------------------------------------------------------------------------------------------------------


def test_a_configuration_file_of_diffusers_names_a_network(run_of, tmp_path):
    product = run_of("mmdit") / "product"
    for path in (product, product / "transformer", product / "transformer" / "config.json"):
        assert type(backbone_of(tiny.parsed(config=str(path)))).__name__ == "MMDiT"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RecipeError, match=r"train\.diffusion\.config: cannot read"):
        backbone_of(tiny.parsed(config=str(tmp_path)))
    with pytest.raises(RecipeError, match=r"train\.diffusion\.config: no configuration at"):
        backbone_of(tiny.parsed(config=str(tmp_path / "nothing")))


UNET = {"_class_name": "UNet2DConditionModel", "block_out_channels": [8] * 4, "norm_num_groups": 4}


@pytest.mark.parametrize(
    ("network", "section", "problem"),
    [
        ("dit", {"config": {"num_layer": 2}}, r"train\.diffusion\.config\.num_layer: is not a key of PixArt"),
        ("mmdit", {"config": {"joint_attention_dim": 9}}, r"config\.joint_attention_dim: is 9, but .* require 40"),
        ("dit", {"config": {"norm_type": "x"}}, r"train\.diffusion\.config: PixArtTransformer2DModel rejects it"),
        ("dit", {"config": {"patch_size": "two"}}, r"config\.patch_size: 'two' is not a whole number from 1"),
        ("dit", {"config": {"num_attention_heads": []}}, r"config\.num_attention_heads: \[\] is not a whole number"),
        ("mmdit", {"config": {"pos_embed_max_size": "x"}}, r"config\.pos_embed_max_size: 'x' is not a whole number"),
        (
            "sd",
            {"unet": {}, "config": UNET | {"block_out_channels": 32}},
            r"block_out_channels: 32 is not a list",
        ),
        (
            "sd",
            {"unet": {}, "config": UNET | {"norm_num_groups": 0}},
            r"config: UNet2DConditionModel rejects it \(integer modulo by zero",
        ),
        (
            "sd",
            {"unet": {}, "config": UNET | {"time_embedding_dim": -8}},
            r"config: UNet2DConditionModel rejects it \(Trying to create",
        ),
        ("sd", {"unet": {}, "config": {"_class_name": "FluxTransformer2DModel"}}, r"_class_name: no backbone 'Flux"),
        ("dit", {"size": 24}, r"train\.diffusion\.size: 24 pixels do not divide by 16"),
    ],
)
def test_networks_that_do_not_fit_are_refused(squares, root, towers, tmp_path, run_of, network, section, problem):
    run_of("sd")  # its autoencoder
    vae = str(root / "ae")
    if "size" in section:  # latents of 4 pixels, patches of 2
        vae = tiny.save_autoencoder(squares, tmp_path / "ae", block_out_channels=[4, 4, 4, 4])
    made = tiny.settings_of(network, towers, **(section | {"autoencoder": vae}))
    with pytest.raises(RecipeError, match=problem):
        tiny.family_of(squares, tmp_path / "assets", made)


def test_a_table_of_positions_that_zero_3_would_shard_is_refused(squares, root, tmp_path, run_of):
    run_of("sd")  # its autoencoder
    wide = {"vocab_size": 600, "width": 336, "layers": 1, "heads": 2}
    section = tiny.settings_of("dit", None, autoencoder=str(root / "ae")) | {"text": wide}
    with pytest.raises(RecipeError, match=r"train\.engine\.zero: would shard the 300 positions"):
        tiny.family_of(squares, tmp_path / "assets", section, engine={"zero": 3})


def test_runs_of_the_first_release_go_on(run_of):
    """A run refuses another recipe; keys that are new must not make one of an old one."""
    new = TrainConfig.from_section(
        {"model": "diffusion", "run": "x", "steps": 1, "diffusion": {"autoencoder": "y"}}
    ).identity()["settings"]
    old = {"autoencoder", "size", "crop", "unet", "text", "objective", "flow", "ddpm", "drop_text", "sampling"}
    assert all(new[name] is None for name in new.keys() - old)
    assert new["flow"].keys() - {"base"} == {"times", "mean", "std", "shift"}
    assert new["flow"]["base"] is None
    assert new["sampling"] == {"steps": 25, "guidance": 4.0, "sampler": None}
    assert read_facts(run_of("sd") / "product")["sampling"] == {"steps": 2, "guidance": 2.0}
    assert DiffusionPipeline.config_name == "model_index.json"
