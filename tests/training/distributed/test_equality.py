"""What is learnt depends on the recipe, not on `accumulate` or the number of workers: weights, losses and gradients."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_towers
import torch
import warm_python
from safetensors.torch import load_file

from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.ports import free_port
from capstan.pipeline.storage import Storage
from capstan.training.config import TrainConfig
from capstan.training.data.dataset import TrainingData
from capstan.training.distributed.engine import Engine
from capstan.training.distributed.step import Step
from capstan.training.models.captioner.contrast import contrast, surrogate
from capstan.training.models.captioner.family import CaptionerFamily, refuse_batch_norm
from capstan.training.models.captioner.model import contrastive_loss
from capstan.training.trainer import fit

WORKER = Path(__file__).with_name("equality_worker.py")
STEPS, BATCH = 2, 16
VISION = {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1, "queries": 0}
COCA = {"context_length": 24, "vocab_size": 600, "width": 16, "heads": 2, "layers": 1, "decoder_layers": 1}
STAGE = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
PIXELS = {**STAGE, "head_channels": 4, "dropout": 0}
TEXT = {"vocab_size": 600, "length": 16, "width": 16, "layers": 1, "heads": 2}
DDP, ZERO2, ZERO3 = {"strategy": "ddp"}, {"zero": 2}, {"zero": 3}
# family → (engine, accumulate) of the runs on two workers
ON_TWO = {
    "captioner": [(DDP, 1), (DDP, 2), (DDP, 4), (DDP, 8), (ZERO2, 2), (ZERO3, 1), (ZERO3, 2)],
    "diffusion": [(DDP, 1), (DDP, 2), (DDP, 4), (DDP, 8), (ZERO2, 2)],
    "autoencoder": [(DDP, 2)],
    "vitvqgan": [(DDP, 2)],
    "ddpm": [(DDP, 1), (DDP, 2)],
    "imagen": [(DDP, 1), (DDP, 2)],
    "damsm": [(DDP, 2)],
    "attngan": [(DDP, 2)],
    "dvae": [(DDP, 2)],
    "dalle": [(DDP, 2)],
}
WHOLE = {"captioner": "open_clip_model.safetensors", "autoencoder": "diffusion_pytorch_model.safetensors"}
WHOLE |= dict.fromkeys(("vitvqgan", "damsm", "attngan", "dalle"), "model.safetensors")
WHOLE["dvae"] = WHOLE["autoencoder"]
WHOLE["diffusion"] = WHOLE["ddpm"] = f"unet/{WHOLE['autoencoder']}"
WHOLE["imagen"] = f"super/{WHOLE['ddpm']}"


class Runs:
    """The runs of this module, made as they are asked for in this process, and by two workers in one go."""

    def __init__(self, dataset: Path, folder: Path) -> None:
        self.dataset, self.folder = dataset, folder
        fit(self.recipe("autoencoder", 1, DDP, 1))  # the other families need it
        base = self.recipe("imagen", 1, DDP, 1)
        base.train["run"] = str(folder / "imagen-base")  # type: ignore[index]
        base.train["imagen"] = {"text": tiny_towers.save_t5(folder / "t5"), "size": 8, "unet": PIXELS}  # type: ignore[index]
        fit(base)

    def recipe(self, family: str, workers: int, engine: dict[str, Any], accumulate: int) -> Recipe:
        """SGD in all but name: with so large an eps Adam's steps are in proportion to the gradient."""
        settings: dict[str, Any] = STAGE
        if family == "captioner":
            settings = {"vision": VISION, "text": COCA}
        elif family == "ddpm":
            settings = {"text": TEXT, "unet": PIXELS, "variance": "learned"}
        elif family == "imagen":
            settings = {"enlarge": {"after": str(self.folder / "imagen-base")}, "unet": PIXELS}
        elif family == "vitvqgan":
            tower = {"width": 16, "layers": 1, "heads": 2}
            settings = {"patch_size": 4, "encoder": tower, "decoder": tower, "codes": 8, "code_channels": 4}
            settings |= {"revival": 0}  # which codes are unused is a question to a part
        elif family == "damsm":
            settings = {"words": 8, "channels": 8, "tower": [8, 8]}
        elif family == "attngan":
            settings = {"damsm": str(self.path("damsm", 1, DDP, 1)), "noise": 4, "condition": 4, "channels": 8}
            settings |= {"stages": 2, "generators": 2, "blocks": 1, "discriminator": {"channels": 8, "lr": 1e-6}}
        elif family == "dvae":
            settings = {**STAGE, "codes": 8, "latent_channels": 4, "revival": 0}
        elif family == "dalle":
            settings = {"first_stage": str(self.path("dvae", 1, DDP, 1)), "text": {"vocab_size": 600, "length": 24}}
            settings |= {"width": 16, "layers": 1, "heads": 2, "drop_text": 0.5}
        elif family == "diffusion":
            settings = {"autoencoder": str(self.path("autoencoder", 1, DDP, 1)), "text": TEXT}
            settings |= {"unet": {**STAGE, "heads": 2}, "drop_text": 0.5}
        section = {"model": family, "run": str(self.path(family, workers, engine, accumulate)), family: settings}
        section |= {"steps": STEPS, "batch": BATCH, "accumulate": accumulate, "lr": 3.0, "eps": 10.0, "warmup": 0}
        section |= {"clip": None, "ema": None, "weight_decay": 0.0, "log_every": 1, "data": {"layer": None}}
        return Recipe(
            dataset=str(self.dataset), train=section | {"engine": {**engine, "workers": workers, "threads": 1}}
        )

    def path(self, family: str, workers: int, engine: dict[str, Any], accumulate: int) -> Path:
        return self.folder / f"{family}-{workers}-{engine.get('zero', 'ddp')}-{accumulate}"

    def on_two(self) -> None:
        wanted = [(family, *how) for family, runs in ON_TWO.items() for how in runs]
        recipes = [self.recipe(family, 2, *how).model_dump(mode="json") for family, *how in wanted]
        jobs = self.folder / "jobs.json"
        jobs.write_text(json.dumps([{"port": free_port(), "recipe": recipe} for recipe in recipes]))
        common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        environments = [os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        warm_python.run_together([sys.executable, str(WORKER), str(jobs)], environments, timeout=480)

    def records(self, *run: Any) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path(*run) / "log.jsonl").read_text().splitlines()]

    def weights(self, *run: Any) -> dict[str, torch.Tensor]:
        return load_file(self.path(*run) / "product" / WHOLE[run[0]])


def same(runs: Runs, run: tuple[Any, ...], names: tuple[str, ...]) -> None:
    """The run's metrics and weights are those of one worker in one part, as far as floats go."""
    reference = (run[0], 1, DDP, 1)
    for ours, theirs in zip(runs.records(*run), runs.records(*reference), strict=True):
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=1e-6), (name, ours["step"])
    theirs = runs.weights(*reference)
    for name, tensor in runs.weights(*run).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-5, msg=lambda text, name=name: name + text)


NAMES = {
    "captioner": ("loss", "grad_norm", "caption", "contrastive", "token_accuracy"),
    "diffusion": ("loss", "grad_norm", "text_dropped"),
    "autoencoder": ("loss", "grad_norm"),
    "vitvqgan": ("loss", "grad_norm", "codebook"),
    "damsm": ("loss", "grad_norm", "words", "sentences"),
    "attngan": ("loss", "grad_norm", "words", "sentences", "kl", "discriminator", "rival_grad_norm"),
    "dvae": ("loss", "grad_norm", "kl"),
    "dalle": ("loss", "grad_norm", "text", "image"),
    "ddpm": ("loss", "grad_norm", "bound"),
    "imagen": ("loss", "grad_norm", "text_dropped"),
}


@pytest.fixture(scope="module")
def runs(make_dataset: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Captions of 3 to 17 words, so that a mean over tokens is not a mean over captions."""
    folder = tmp_path_factory.mktemp("equality")
    dataset = make_dataset(folder / "ds", [20, 20], captions=lambda index: "red square " * (1 + index * 5 % 8) + "end")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Runs(dataset, folder)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", ["captioner", "diffusion", "ddpm", "imagen"])
def test_accumulate_changes_nothing_that_is_learnt(family: str, runs: Runs) -> None:
    for accumulate in (1, 2, 8) if family == "captioner" else (1, 8):
        fit(runs.recipe(family, 1, DDP, accumulate))
        same(runs, (family, 1, DDP, accumulate), NAMES[family])
    first, second = runs.records(family, 1, DDP, 1)
    assert first["loss"] != second["loss"]


@pytest.mark.slow
@pytest.mark.integration
def test_the_number_of_workers_changes_nothing_that_is_learnt(runs: Runs) -> None:
    for family in ON_TWO:
        fit(runs.recipe(family, 1, DDP, 1))
    runs.on_two()
    for family, ways in ON_TWO.items():
        for engine, accumulate in ways:
            same(runs, (family, 2, engine, accumulate), NAMES[family])


def test_the_contrast_of_parts_has_the_gradient_of_the_whole() -> None:
    torch.manual_seed(0)
    image, text, scale = torch.randn(8, 4), torch.randn(8, 4), torch.tensor([3.0])
    leaves = [tensor.clone().requires_grad_() for tensor in (image, text, scale)]
    whole = contrastive_loss(*leaves)
    expected = torch.autograd.grad(whole, leaves)
    found = contrast(image, text, scale, Step())
    assert float(found.loss) == pytest.approx(whole.item(), rel=1e-6)
    step, total = Step(parts=8), 0.0
    for row in range(8):  # parts of one pair, whose own loss would be 0
        mine = found._replace(image=found.image[row : row + 1], text=found.text[row : row + 1])
        total = total + surrogate(mine, leaves[0][row : row + 1], leaves[1][row : row + 1], leaves[2], step) / 8
    assert total.item() == pytest.approx(whole.item(), rel=1e-6)
    for ours, theirs in zip(torch.autograd.grad(total, leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_logit_scale_is_held_after_the_step_and_its_gradient_lives(runs_of_one: Callable[[float], Any]) -> None:
    """Above the bound, a clamp in the forward pass would leave the scale without a gradient, for ever."""
    high = torch.log(torch.tensor(100.0))
    before, gradient, after = runs_of_one(5.0)
    assert before > high
    assert gradient != 0
    assert after <= high


@pytest.fixture
def runs_of_one(make_dataset: Callable[..., Path], tmp_path: Path) -> Callable[[float], tuple[float, ...]]:
    def run(start: float) -> tuple[float, ...]:
        dataset = make_dataset(tmp_path / "ds", [4])
        section = {"model": "captioner", "run": str(tmp_path / "run"), "steps": 1, "batch": 4, "lr": 1e-4}
        section |= {"captioner": {"vision": VISION, "text": COCA}, "data": {"layer": None}, "engine": DDP}
        train = TrainConfig.from_section(section)
        data = TrainingData(Dataset(Storage(str(dataset))), train.data, 0, layer=None)
        (assets := tmp_path / "assets").mkdir()
        CaptionerFamily.make_assets(train, data, assets)
        family, engine = CaptionerFamily(train, assets), Engine(train)
        try:
            scale = family.model.coca.logit_scale
            scale.data.fill_(start)
            model = engine.prepare(family.model)
            loss, _ = family.loss(model, family.prepare([data.sample(i) for i in range(4)]), torch.Generator())
            (gradient,) = torch.autograd.grad(loss, scale, retain_graph=True)
            engine.set_lr(1e-4)
            engine.backward(loss, last=True)
            engine.clamp(family.bounds)
            return start, float(gradient), float(scale.detach())
        finally:
            engine.close()

    return run


def test_networks_that_normalise_over_a_part_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    section = {"model": "captioner", "run": "unused", "steps": 1, "batch": 4, "accumulate": 2}
    with pytest.raises(RecipeError, match=r"train\.accumulate: is 2, but 1 normalises over a part"):
        refuse_batch_norm(TrainConfig.from_section(section), model)
    refuse_batch_norm(TrainConfig.from_section(section | {"captioner": {"contrastive": 0}}), model)
    refuse_batch_norm(TrainConfig.from_section(section | {"accumulate": 1}), model)
