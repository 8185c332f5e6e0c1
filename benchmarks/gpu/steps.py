"""Training steps: MFU of each network by switch, waiting for images, and memory next to doctor's estimate."""

from __future__ import annotations

import functools
import json
import re
import shutil
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu import data
from benchmarks.gpu.results import Measurement, Results, Row, Scale
from capstan.pipeline.config import Recipe

LOG_EVERY, STEPS = 10, 40  # the last ten of forty steps are measured: by then kernels are compiled and chosen
LEAST_GAIN = 1.4  # of latents that are encoded ahead


@dataclass(frozen=True)
class Network:
    """A preset, its frozen text encoders, images per step, and the goal of its best MFU."""

    name: str
    preset: str
    encoders: tuple[str, ...]
    batch: int
    toy: str
    pixels: int = 256
    goal: float | None = None


# DiT's goal is for 512 image tokens or more: at 256 px there are 256, at 512 px 1,024.
NETWORKS = (
    Network("unet 860 M", "sd15", ("clip",), 128, "unet-tiny", goal=0.40),
    Network("dit 611 M", "dit-xl", ("t5",), 256, "dit-tiny"),
    Network("dit 611 M 512 px", "dit-xl", ("t5",), 64, "dit-tiny", pixels=512, goal=0.50),
    Network("mmdit 2 B", "mmdit-l", ("clip-l", "clip-g"), 128, "mmdit-tiny"),
)
# Each switch on top of those before it, with the seconds that it may take.
SWITCHES: tuple[tuple[str, dict[str, Any], float], ...] = (
    ("fp32", {}, 150),
    ("bf16", {"precision": "bf16"}, 120),
    ("channels_last", {"engine": {"channels_last": True}}, 120),
    ("compile", {"engine": {"compile": True}}, 270),
    ("latents ahead", {"data": {"latents": "auto"}}, 270),
    ("text ahead", {"data": {"text_states": "auto"}}, 270),
    ("checkpointing", {"engine": {"checkpointing": True}}, 300),
)
# What a dry run goes through. It compiles nothing, which takes a compiler and half a minute.
_TOY = {("unet 860 M", "channels_last"), ("dit 611 M", "bf16"), ("mmdit 2 B", "text ahead")}


def measurements() -> list[Measurement]:
    """Return a measurement per network and switch, the switches that matter most first."""
    first = ("bf16", "text ahead")
    order = sorted(range(len(SWITCHES)), key=lambda number: SWITCHES[number][0] not in first)
    return [
        Measurement(
            f"{network.name}, {SWITCHES[number][0]}",
            SWITCHES[number][2],
            functools.partial(measure, network, number),
            (network.name, SWITCHES[number][0]) in _TOY,
        )
        for number in order
        for network in NETWORKS
        if network.name.startswith("unet") or SWITCHES[number][0] != "channels_last"
    ]


def section_of(network: Network, last: int, scale: Scale) -> dict[str, Any]:
    """Return the recipe's section `train` with all switches up to number `last`."""
    batch = scale(network.batch, 2)
    section: dict[str, Any] = {"engine": {"strategy": "ddp"}, "data": {"layer": None, "threads": scale(8, 1)}}
    for name, switch, _ in SWITCHES[: last + 1]:
        if (name == "channels_last" and not network.name.startswith("unet")) or (name == "compile" and scale.toy):
            continue
        for key, value in switch.items():
            section[key] = section.get(key, {}) | value if isinstance(value, dict) else value
    text = [str(data.text_encoder(scale, name)) for name in network.encoders]
    diffusion = {
        "preset": scale(network.preset, network.toy),
        "autoencoder": str(data.autoencoder(scale)),
        "text": {"pretrained": text},
        "size": scale(network.pixels, 32),
    }
    if scale.toy:
        diffusion["config"] = _small(network)
    steps = scale(STEPS, 2)
    facts = {"steps": steps, "batch": batch, "log_every": scale(LOG_EVERY, 1), "checkpoint": {"every": 10**6}}
    return {"model": "diffusion", "run": str(scale.folder / "run"), "diffusion": diffusion, **facts, **section}


def _small(network: Network) -> dict[str, Any]:
    if network.name.startswith("unet"):
        return {"block_out_channels": [32, 32, 32], "attention_head_dim": 2}
    return {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}


def measure(network: Network, last: int, scale: Scale) -> list[Row]:
    """Train a few steps; return what the last records of the run's log say of them."""
    from capstan.cluster.doctor.estimates import state_bytes
    from capstan.training.config import TrainConfig

    dataset = data.drawings(scale, scale(network.pixels, 32), scale(512, 4))
    section, run = section_of(network, last, scale), scale.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    recipe = Recipe.model_validate({"dataset": str(dataset), "train": section})
    _train(recipe)
    record = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    (count,) = re.findall(r"([\d,]+) parameters", (run / "train.log").read_text())[-1:]
    parameters = int(count.replace(",", ""))
    estimate = state_bytes(TrainConfig.from_recipe(recipe), parameters) / 2**30
    shutil.rmtree(run)
    best = SWITCHES[last][0] == "text ahead"
    memory = {"memory_gib": record["memory_gib"]} if "memory_gib" in record else {}
    rate = {"images_per_s": record["images_per_s"], "batch": section["batch"], "millions": round(parameters / 1e6)}
    rows = [
        Row("MFU", record.get("mfu"), "", network.goal if best else None, facts=rate),
        Row("share of the time waiting for images", record["data_wait"], "", 0.05, below=True),
    ]
    if memory:
        rows.append(Row("peak memory", memory["memory_gib"], "GiB", facts={"doctor_before_activations": estimate}))
    return rows


def _train(recipe: Recipe) -> None:
    """Encode what is to be encoded ahead, then train in this process, as a worker of `capstan train` does."""
    from capstan.training.config import TrainConfig
    from capstan.training.encode import encode_missing
    from capstan.training.run import Run
    from capstan.training.trainer import fit

    train = TrainConfig.from_recipe(recipe)
    if "auto" in (train.data.latents, train.data.text_states):
        Run(train).open(recipe.model_dump(mode="json"))
        encode_missing(recipe, progress=False)
    fit(recipe)


def derived(results: Results) -> list[Row]:
    """Return what latents ahead gain over encoding on the fly, where both are measured."""
    rows = []
    for network in NETWORKS:
        before, after = (results.rows(f"{network.name}, {switch}") for switch in ("compile", "latents ahead"))
        if before and after:
            gain = after[0].facts["images_per_s"] / before[0].facts["images_per_s"]
            rows.append(Row(f"{network.name}: latents ahead, gain", gain, "×", LEAST_GAIN))
    return rows
