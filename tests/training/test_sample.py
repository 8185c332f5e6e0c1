"""From a run to images: sampling, the grid, export and the oracle's measures, with a tiny untrained pipeline."""

import json
import shutil

import chat_server
import numpy as np
import pytest
import torch
from PIL import Image

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import RecipeError
from capstan.training.data.transforms import square
from capstan.training.drawing.grid import cut, grid
from capstan.training.evaluate import evaluate
from capstan.training.export import export
from capstan.training.models.noise.schedulers import most_steps
from capstan.training.sample import open_sampler, sample, style_of

PROMPTS = ["a red square", "a blue square, number 7", "a green square"]


@pytest.fixture(scope="module")
def runs(squares, tmp_path_factory):
    """Folders `ae` and `run` of an untrained autoencoder and diffusion model, as the trainer leaves them."""
    from capstan.pipeline.dataset.shards import Dataset
    from capstan.pipeline.storage import Storage
    from capstan.training.config import TrainConfig
    from capstan.training.data.dataset import TrainingData
    from capstan.training.models.autoencoder.family import AutoencoderFamily
    from capstan.training.models.diffusion.family import DiffusionFamily

    root = tmp_path_factory.mktemp("runs")
    small = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
    sections = {
        "ae": {"model": "autoencoder", "autoencoder": small},
        "run": {
            "model": "diffusion",
            "diffusion": {
                "autoencoder": str(root / "ae"),
                "unet": small | {"heads": 2},
                "text": {"vocab_size": 600, "length": 24, "width": 16, "layers": 1, "heads": 2},
                "sampling": {"steps": 4, "guidance": 2.0},
            },
        },
    }
    for name, kind in (("ae", AutoencoderFamily), ("run", DiffusionFamily)):
        train = TrainConfig.from_section(sections[name] | {"run": str(root / name), "steps": 1})
        data = TrainingData(Dataset(Storage(str(squares))), train.data, 0, layer=None)
        for part in ("assets", "product"):
            (root / name / part).mkdir(parents=True)
        torch.manual_seed(0)
        kind.make_assets(train, data, root / name / "assets")
        family = kind(train, root / name / "assets")
        family.save(family.model, root / name / "product")
        source = {"format": "world", "world": {"scenes": 10, "size": 16}}
        section = sections[name] | {"run": str(root / name), "steps": 1}
        recipe = {"dataset": str(squares), "source": source, "train": section}
        (root / name / "recipe.json").write_text(json.dumps({"identity": {}, "recipe": recipe}))
    return root


def test_sample_publishes_a_labelled_grid(runs, tmp_path):
    summary = sample(runs / "run", PROMPTS, tmp_path / "new" / "grid.png")
    assert summary["pictures"] == 3
    assert summary["seeds"] == [0, 1, 2]
    with Image.open(summary["grid"]) as image:
        assert image.width > 3 * 200
        assert image.height > 240  # the prompts stand beneath


def test_one_prompt_with_several_seeds(runs, tmp_path):
    assert sample(runs / "run", PROMPTS[:1], tmp_path / "g.png", seeds=[5, 6])["pictures"] == 2
    with pytest.raises(RecipeError, match="--seed: 2 seeds for 3 prompts"):
        sample(runs / "run", PROMPTS, tmp_path / "g.png", seeds=[1, 2])
    with pytest.raises(RecipeError, match="-p: is missing"):
        sample(runs / "run", [], tmp_path / "g.png")


def test_a_image_depends_on_prompt_and_seed_not_on_its_batch(runs):
    sampler = open_sampler(runs / "run")
    together = sampler.draw(PROMPTS, [1, 2, 3], batch=3).arrays.astype(int)
    alone = sampler.draw(PROMPTS, [1, 2, 3], batch=1).arrays.astype(int)
    other = sampler.draw(PROMPTS, [4, 5, 6], batch=3).arrays.astype(int)
    assert np.abs(together - alone).max() <= 1
    assert np.abs(together - other).max() > 1


@pytest.mark.parametrize(
    ("objective", "sampler", "most"),
    [
        ({"objective": "flow"}, "dpm++", 1000),
        ({"objective": "flow", "flow": {"shift": 3.0}}, "dpm++", 500),  # the first whole timestep occurs twice
        ({"objective": "flow", "flow": {"shift": 3.0}}, "euler", 500),
        ({"objective": "ddpm"}, "ddim", 1000),
        ({"objective": "ddpm"}, "dpm++", 1000),
    ],
)
def test_steps_beyond_what_the_schedule_holds_are_refused_by_name(runs, objective, sampler, most):
    """The most that is allowed still samples finite images; one more would fail inside diffusers, or be black."""
    from capstan.training.models.diffusion.config import DiffusionSettings
    from capstan.training.models.noise.process import process_of

    settings = DiffusionSettings.model_validate({"autoencoder": "x", **objective, "sampling": {"sampler": sampler}})
    sampler = open_sampler(runs / "run")
    sampler.pipeline.scheduler = process_of(settings, 16, exact=False).scheduler()
    with pytest.raises(
        RecipeError, match=rf"^--steps: the schedule of this model has no {most + 1} steps\. Fix: .* {most} or"
    ):
        sampler.draw(PROMPTS[:1], [0], steps=most + 1)
    assert most_steps(sampler.pipeline.scheduler) == most
    scheduler, latents = sampler.pipeline.scheduler, torch.randn(1, 4, 4, 4)
    scheduler.set_timesteps(most)
    for timestep in scheduler.timesteps:  # with a network that predicts 0
        latents = scheduler.step(torch.zeros_like(latents), timestep, latents).prev_sample
    assert latents.isfinite().all()


def test_a_recipe_with_too_many_sampling_steps_is_refused_before_the_first_step(runs):
    from capstan.training.config import TrainConfig
    from capstan.training.models.diffusion.family import DiffusionFamily

    section = json.loads((runs / "run" / "recipe.json").read_text())["recipe"]["train"] | {"run": "x", "steps": 1}
    for watch, sampling, field in (
        ({}, {"steps": 1001}, "train.diffusion.sampling.steps"),
        ({"samples": {"prompts": ["a"], "steps": 2000}}, {}, "train.watch.samples.steps"),
        ({"evaluate": {"measures": ["oracle"], "steps": 1500}}, {}, "train.watch.evaluate.steps"),
    ):
        train = TrainConfig.from_section(
            section | {"watch": watch, "diffusion": section["diffusion"] | {"sampling": sampling}}
        )
        with pytest.raises(RecipeError, match=rf"^{field}: the schedule .* Fix: use 1000 or fewer"):
            DiffusionFamily(train, runs / "run" / "assets")


def test_prompts_are_expanded_into_the_style_that_the_run_was_trained_on(runs, tmp_path, capsys):
    """By a real engine, over HTTP: the run's product knows how its captions were written."""
    from capstan.cluster.cli import run as capstan

    style = style_of(runs / "run")
    assert style_of(runs / "run" / "product") == style
    assert style.examples
    assert all("square" in example for example in style.examples)
    command = ["sample", str(runs / "run"), "-p", "a red square", "-o", str(tmp_path / "grid.png"), "--json"]
    assert capstan([*command, "--upsample"]) == 2
    assert "has no engine that writes text. Fix: add --upsampler RECIPE" in capsys.readouterr().err
    with chat_server.serving() as server:
        server.misbehave = lambda body, tries: (200, {}, chat_server.completion("a red square on grey"))
        section = {"engine": "openai", "model": "m", "server": {"url": server.url}}
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(json.dumps({"dataset": "unused", "recaption": section}))
        assert capstan([*command, "--upsampler", str(recipe)]) == 0
        of_its_own = tmp_path / "run"
        shutil.copytree(runs / "run", of_its_own)
        (line,) = capsys.readouterr().out.splitlines()[-1:]
        assert json.loads(line)["upsampled"] == ["a red square on grey"]
        # A run may be a stranger's: it does not choose a server, nor which variable is sent there.
        for spelling in (section, section | {"engine": {"kind": "openai", "model": "m"}, "model": None}):
            spelling = {name: value for name, value in spelling.items() if value is not None}
            (of_its_own / "recipe.json").write_text(json.dumps({"identity": {}, "recipe": {"recaption": spelling}}))
            assert capstan(["sample", str(of_its_own), *command[2:], "--upsample"]) == 2
            assert "names a server, and only your own recipe may" in capsys.readouterr().err
        assert len(server.bodies) == 1
    first = server.bodies[0]["messages"][0]["content"][0]["text"]
    assert f"- {style.examples[0]}" in first
    assert first.endswith("Request: a red square")


def test_guidance_and_negative_prompts_change_the_image(runs):
    sampler = open_sampler(runs / "run")
    plain, guided, negated = (
        sampler.draw(PROMPTS[:1], [0], **options).arrays.astype(int)
        for options in ({"guidance": 1.0}, {"guidance": 9.0}, {"guidance": 9.0, "negative": "a blue square"})
    )
    assert np.abs(plain - guided).max() > 0
    assert np.abs(negated - guided).max() > 0


def test_sampling_something_else_is_refused(runs, tmp_path):
    with pytest.raises(RecipeError, match=r"is not a text-to-image model \(autoencoder\)"):
        sample(runs / "ae", PROMPTS, tmp_path / "g.png")
    with pytest.raises(RecipeError, match="no model at"):
        sample(tmp_path / "nothing", PROMPTS, tmp_path / "g.png")


def test_a_grid_is_cut_into_its_images_again():
    images = np.random.default_rng(0).integers(0, 255, (5, 1, 1, 3), np.uint8).repeat(32, 1).repeat(32, 2)
    labels = ["a", "a very long label indeed " * 8, "b", "c", "d"]
    cells = cut(grid(images, labels), labels, 32)
    assert [cell.getpixel((0, 0)) for cell in cells] == [tuple(image[0, 0].tolist()) for image in images]
    assert {cell.size for cell in cells} == {(cells[0].width, cells[0].width)}
    assert cut(grid(images, labels), labels[:4], 32) == []


def test_the_grid_wraps_long_labels():
    images = np.zeros((5, 16, 16, 3), np.uint8)
    short, long = (grid(images, [label] * 5) for label in ("a", "a very long label indeed " * 8))
    assert long.height > short.height + 60
    assert grid(images, ["x"] * 5, columns=5).height < short.height


# Export (that diffusers draws it elsewhere: test_backbones.py) --------------------------------------------------------


def test_an_export_is_a_pipeline_of_safetensors(runs, tmp_path):
    export(runs / "run", tmp_path / "half", precision="fp16")
    files = {str(path.relative_to(tmp_path / "half")) for path in (tmp_path / "half").rglob("*") if path.is_file()}
    assert {
        "model_index.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
    } <= files
    assert not [name for name in files if name.endswith((".bin", ".py", ".pkl"))]
    index = json.loads((tmp_path / "half" / "model_index.json").read_text())
    libraries = {value[0] for name, value in index.items() if isinstance(value, list)}
    assert libraries == {"diffusers", "transformers", None}
    texts = [path.read_text() for path in (tmp_path / "half").rglob("*.json")]
    assert not [text for text in texts if str(runs) in text]  # no path of this machine
    export(runs / "run", tmp_path / "half")  # an earlier export may be replaced …
    assert open_sampler(tmp_path / "half").pipeline.unet.dtype == torch.float32
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(RecipeError, match="is not empty"):  # … and nothing else
        export(runs / "run", tmp_path / "other")
    with pytest.raises(RecipeError, match="is the model itself"):
        export(runs / "run", runs / "run" / "product")


# Evaluation ----------------------------------------------------------------------------------------------------------


def test_a_diffusion_run_is_measured_beside_chance_and_ceiling(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "run", run)
    result = evaluate(run, count=6)
    assert json.loads((run / "evaluation.json").read_text()) == result
    assert (run / "evaluation.png").is_file()
    assert set(result["measures"]) == {"background", "colours", "count", "colour_shape", "relation"}
    for row in result["measures"].values():
        assert set(row) == {"value", "chance", "ceiling"}
    assert result["oracle"]["background"] > 0.9
    assert result["sampling"] == {"steps": 4, "guidance": 2.0}
    other = evaluate(run, count=6, steps=2, guidance=1.5, sampler="euler")
    assert other["sampling"] == {"steps": 2, "guidance": 1.5, "sampler": "euler"}
    with pytest.raises(RecipeError, match=r"^--level: this model enlarges no image"):
        evaluate(run, count=6, level=0.1)


def test_other_judges_are_asked_for_by_option(runs, tmp_path, capsys):
    from small_clip import write_clip

    from capstan.cluster.cli import run as capstan

    run = tmp_path / "run"
    shutil.copytree(runs / "run", run)
    command = ["evaluate", str(run), "--count", "4", "--json", "--measures"]
    assert capstan([*command, "clip"]) == 2
    assert "clip needs a model, and the run's recipe does not name one." in capsys.readouterr().err
    assert capstan([*command, "fid", "--features", "/no/inception.pth"]) == 2
    assert "/no/inception.pth is not on this machine" in capsys.readouterr().err
    assert capstan([*command, "clip", "--clip", str(write_clip(tmp_path / "clip", 0))]) == 0
    (name, row), *others = json.loads(capsys.readouterr().out.splitlines()[-1])["measures"].items()
    assert (name, others) == ("clip", [])
    assert all(-1 <= row[kind] <= 1 for kind in ("value", "chance", "ceiling"))


def test_copies_of_training_images_are_found_and_shown(runs, tmp_path, capsys):
    from onnx_file import write_colour_descriptor

    from capstan.cluster.cli import run as capstan
    from capstan.pipeline.config import CopyDetection
    from capstan.training.metrics.memorisation import Memorisation

    run = tmp_path / "run"
    shutil.copytree(runs / "run", run)
    network = write_colour_descriptor(tmp_path / "colours.onnx")
    command = ["evaluate", str(run), "--count", "4", "--json", "--copies"]
    assert capstan([*command, str(tmp_path / "no.onnx")]) == 2
    assert "--copies: no file" in capsys.readouterr().err
    assert capstan([*command, str(network), "--copies-threshold", "0.2"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["measures"]["copies"]["chance"] == 1.0
    assert 0 <= found["measures"]["copies"]["value"] <= 1
    assert (run / "evaluation-copies.png").is_file()
    cosines = [pair["cosine"] for pair in found["copies"]["pairs"]]
    assert (len(cosines), cosines) == (4, sorted(cosines, reverse=True))

    # A drawn image that is a training image, mirrored, is found as it; one without a descriptor is near nothing.
    recipe = Recipe.model_validate(json.loads((run / "recipe.json").read_text())["recipe"])
    memory = Memorisation(recipe, CopyDetection(model=str(network), size=32, mean=[0, 0, 0], std=[1, 1, 1]), "x")
    trained = [square(memory.trained[0].sample(index).jpeg, 32) for index in (5, 0)]
    blank = write_colour_descriptor(tmp_path / "edges.onnx", kernel=3)
    nearest = memory.nearest(memory.describe([image[:, ::-1] for image in trained]), 32)
    assert nearest.place.tolist() == [[0, 5], [0, 0]]
    assert nearest.cosine.min() > 0.999
    edges = Memorisation(recipe, CopyDetection(model=str(blank), size=32, mean=[0, 0, 0], std=[1, 1, 1]), "x")
    nearest = edges.nearest(edges.describe([np.zeros((32, 32, 3), np.uint8)]), 32)
    assert nearest.cosine.tolist() == [-1]
    assert found["copies"]["training_images"] == memory.total


def test_an_autoencoder_run_is_measured_by_psnr(runs, tmp_path):
    run = tmp_path / "ae"
    shutil.copytree(runs / "ae", run)
    psnr = evaluate(run, count=6)["measures"]["psnr"]
    assert 0 < psnr["value"] < 60
    assert 5 < psnr["chance"] < 30
    with pytest.raises(RecipeError, match=r"^--guidance: .*draws no images of its own"):
        evaluate(run, count=6, guidance=2.0)


def test_what_has_no_truth_is_refused(runs, tmp_path):
    run = tmp_path / "ae"
    shutil.copytree(runs / "ae", run)
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["recipe"]["source"] = {"format": "parquet", "path": "x.parquet"}
    (run / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match="not trained on the captioned world"):
        evaluate(run)
    with pytest.raises(RecipeError, match="--count"):
        evaluate(run, count=1)
