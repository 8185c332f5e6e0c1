"""A training step: Capstan compared with the usual loop, and the effect of each switch.

    python benchmarks/train.py [--rounds 3] [--steps 10] [--batch 4]

Three runs of the same UNet on the same images alternate, each in a process of its own: the loop of diffusers'
train_text_to_image with Accelerate (below: `plain`), Capstan encoding images on the fly, Capstan with precomputed
latents. The UNet and the autoencoder have Stable Diffusion's shapes: an eighth of their width on a CPU, all of it on a
GPU (860 M parameters, 256 pixels, bf16). The results are ratios of images/s, and of CPU seconds per image. On a GPU the
table of switches and the MFU follow.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import simplejpeg
import torch
import yaml

if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).resolve().parent))  # this folder has a recaption.py of its own

from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Manifest, Sample, ShardEntry, sha256_of, write_manifest, write_tar
from capstan.pipeline.records import SHARD_SCHEMA, make_key
from capstan.pipeline.storage import Storage
from capstan.pipeline.world.captions import descriptive
from capstan.pipeline.world.render import render
from capstan.pipeline.world.scene import Vocabulary, draw_scene

ROOT = Path(__file__).resolve().parents[1]
SIZE, IMAGES, WARM = 256, 256, 3  # pixels per side, samples, steps that are not measured
KINDS = ("plain", "capstan", "precomputed latents")
ON_GPU = torch.cuda.is_available()
SHARE = 1 if ON_GPU else 8  # Stable Diffusion's width is divided by this
UNET = {
    "block_out_channels": [320 // SHARE, 640 // SHARE, 1280 // SHARE, 1280 // SHARE],
    "layers_per_block": 2,
    "norm_num_groups": 32 // SHARE,
}
HEADS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40 if ON_GPU else 10, help="measured steps, after the first three")
    parser.add_argument("--batch", type=int, default=64 if ON_GPU else 4)
    parser.add_argument("--run", nargs=2, metavar=("FOLDER", "KIND"), help=argparse.SUPPRESS)
    parser.add_argument("--set", dest="section", default="{}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        work(Path(arguments.run[0]), arguments.run[1], arguments.steps, arguments.batch, json.loads(arguments.section))
        return
    with tempfile.TemporaryDirectory(prefix="capstan-bench-train-") as name:
        folder = Path(name)
        make(folder)
        compare(folder, arguments)
        if ON_GPU:
            switches(folder, arguments)
        else:
            print("no GPU: run `python benchmarks/train.py` on one for the MFU and the table of switches")


# The comparison ------------------------------------------------------------------------------------------------------


def compare(folder: Path, arguments: argparse.Namespace) -> None:
    precision = {"precision": "bf16"} if ON_GPU else {}
    taken: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(arguments.rounds):
        for kind in KINDS:
            taken[kind].append(run(folder, kind, arguments, precision))
    where = torch.cuda.get_device_name() if ON_GPU else f"{len(os.sched_getaffinity(0))} cores"
    print(f"{where}, {SIZE} pixels, batches of {arguments.batch}, {arguments.steps} steps, {arguments.rounds} rounds")
    for kind in KINDS:
        rate, cpu = (statistics.median(one[name] for one in taken[kind]) for name in ("images_per_s", "cpu_s"))
        print(f"  {kind:20} {rate:8.2f} images/s · {cpu * 1e3:8.1f} ms CPU per image")
    for ours, theirs, asked in (("capstan", "plain", "1.0"), ("precomputed latents", "capstan", "1.4")):
        faster = ratio(taken[ours], taken[theirs], "images_per_s")
        cheaper = ratio(taken[theirs], taken[ours], "cpu_s")
        print(f"  {ours} / {theirs}: {faster} × the images/s (goal: {asked}) · by CPU seconds {cheaper} ×")


def ratio(these: list[dict[str, float]], those: list[dict[str, float]], name: str) -> str:
    """Return the median of the rounds' ratios, and their range."""
    ratios = sorted(a[name] / b[name] for a, b in zip(these, those, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def run(folder: Path, kind: str, arguments: argparse.Namespace, section: dict[str, Any]) -> dict[str, float]:
    """Run one kind in a process of its own."""
    command = [sys.executable, __file__, "--run", str(folder), kind, "--set", json.dumps(section)]
    command += ["--steps", str(arguments.steps), "--batch", str(arguments.batch)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def switches(folder: Path, arguments: argparse.Namespace) -> None:
    """Print the effect of each switch on top of those before it."""
    steps: list[tuple[str, str, dict[str, Any]]] = [
        ("fp32", "capstan", {}),
        ("bf16", "capstan", {"precision": "bf16"}),
        ("channels_last", "capstan", {"engine": {"channels_last": True}}),
        ("compile", "capstan", {"engine": {"compile": True}}),
        ("precomputed latents", "precomputed latents", {}),
        ("text ahead", "precomputed latents", {"data": {"text_states": "auto"}}),
        ("checkpointing", "precomputed latents", {"engine": {"checkpointing": True}}),
    ]
    section: dict[str, Any] = {}
    print(f"{'switch':20} {'images/s':>9} {'×':>5} {'MFU':>6} {'memory':>9}")
    before = None
    for name, kind, more in steps:
        engine = section.get("engine", {}) | more.get("engine", {})
        section = section | more | ({"engine": engine} if engine else {})
        seen = run(folder, kind, arguments, section)
        gain = "" if before is None else f"{seen['images_per_s'] / before:.2f}"
        mfu = f"{seen['mfu']:.1%}" if "mfu" in seen else "?"
        print(f"{name:20} {seen['images_per_s']:9.1f} {gain:>5} {mfu:>6} {seen['memory_gib']:7.1f} GiB")
        before = seen["images_per_s"]


# One run -------------------------------------------------------------------------------------------------------------


class Clock:
    """A record of when each step ended, and of the CPU time of this process and its children, up to step `last`."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.ticks: list[tuple[float, float]] = []

    def tick(self) -> None:
        if ON_GPU and len(self.ticks) in (WARM, self.last):
            torch.cuda.synchronize()
        me = psutil.Process()
        spent = [process.cpu_times() for process in [me, *me.children(recursive=True)]]
        self.ticks.append((time.monotonic(), sum(times.user + times.system for times in spent)))

    def rates(self, batch: int) -> dict[str, float]:
        (start, spent), (end, spent_at_end) = self.ticks[WARM], self.ticks[self.last]
        images = (self.last - WARM) * batch
        return {"images_per_s": images / (end - start), "cpu_s": (spent_at_end - spent) / images}


def work(folder: Path, kind: str, steps: int, batch: int, section: dict[str, Any]) -> None:
    clock = Clock(WARM + steps)
    if kind == "plain":
        plain(folder, clock, batch, section.get("precision", "fp32"))
        print(json.dumps(clock.rates(batch)))
        return
    if kind == "precomputed latents":
        data = {"latents": (folder / "encoder").read_text()} | section.get("data", {})
        section = section | {"data": data}
    seen = capstan(folder, clock, batch, section)
    print(json.dumps(clock.rates(batch) | {name: seen[name] for name in ("mfu", "memory_gib") if name in seen}))


def capstan(folder: Path, clock: Clock, batch: int, section: dict[str, Any]) -> dict[str, Any]:
    """Run a recipe; return the last record of its log."""
    from capstan.training.monitoring.metrics_logger import MetricsLogger
    from capstan.training.trainer import fit

    step = MetricsLogger.step

    def timed(self: MetricsLogger, slots: Any) -> None:
        step(self, slots)
        clock.tick()

    MetricsLogger.step = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(dir=folder, prefix="run-") as name:
        recipe = recipe_of(folder, Path(name) / "run", clock.last + 1, batch, section)
        fit(recipe)
        return json.loads((Path(name) / "run" / "log.jsonl").read_text().splitlines()[-1])


def recipe_of(folder: Path, run_folder: Path, steps: int, batch: int, section: dict[str, Any]) -> Recipe:
    """Return the recipe of what `plain` does."""
    diffusion = {
        "autoencoder": str(folder / "vae"),
        "unet": UNET | {"heads": HEADS},
        "text": {"pretrained": str(folder / "text")},
        "objective": "ddpm",
        "ddpm": {"prediction": "epsilon", "zero_terminal_snr": False},
        "drop_text": 0.0,
    }
    train = {"model": "diffusion", "run": str(run_folder), "steps": steps, "batch": batch, "diffusion": diffusion}
    data = {"layer": None} | section.get("data", {})
    engine = {"strategy": "ddp"} | section.get("engine", {})
    train |= section | {"data": data, "engine": engine, "checkpoint": {"every": 10**6}}
    return Recipe.model_validate({"dataset": str(folder / "ds"), "train": train})


def plain(folder: Path, clock: Clock, batch: int, precision: str) -> None:
    """Run the loop of diffusers' examples/text_to_image/train_text_to_image.py, with its EMA, on the same decoding."""
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from torch.nn import functional
    from transformers import CLIPTextModel, CLIPTokenizer

    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=not ON_GPU)
    half = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    tokenizer = CLIPTokenizer.from_pretrained(folder / "text" / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(folder / "text" / "text_encoder").requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8,
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        cross_attention_dim=text_encoder.config.hidden_size,
        attention_head_dim=HEADS,
        **UNET,
    ).train()
    average = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=1e-2)
    rate = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=100)
    loader = torch.utils.data.DataLoader(
        Images(folder, tokenizer), shuffle=True, batch_size=batch, num_workers=1, persistent_workers=True
    )
    unet, optimizer, loader, rate = accelerator.prepare(unet, optimizer, loader, rate)
    vae.to(accelerator.device, dtype=half)
    text_encoder.to(accelerator.device, dtype=half)
    average.to(accelerator.device)
    for pixels, ids in repeated(loader):
        with accelerator.accumulate(unet):
            latents = vae.encode(pixels.to(half)).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(1000, (len(latents),), device=latents.device).long()
            noisy = scheduler.add_noise(latents, noise, timesteps)
            states = text_encoder(ids, return_dict=False)[0]
            prediction = unet(noisy, timesteps, states, return_dict=False)[0]
            loss = functional.mse_loss(prediction.float(), noise.float(), reduction="mean")
            accelerator.gather(loss.repeat(len(latents))).mean().item()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            average.step(unet.parameters())
        clock.tick()
        if len(clock.ticks) > clock.last:
            return


def repeated(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


class Images(torch.utils.data.Dataset):
    """A folder's images with their captions, decoded as Capstan does."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.files = sorted((folder / "files").glob("*.jpg"))
        captions = [file.with_suffix(".txt").read_text() for file in self.files]
        self.ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        from capstan.training.data.transforms import square

        pixels = torch.from_numpy(square(self.files[index].read_bytes(), SIZE)).permute(2, 0, 1)
        return pixels.float() / 127.5 - 1, self.ids[index]


# What they train on --------------------------------------------------------------------------------------------------


def make(folder: Path) -> None:
    """Write the same images as a dataset and as files, the models, and the latents."""
    samples = []
    (folder / "files").mkdir()
    for number in range(IMAGES):
        scene = draw_scene(0, number, Vocabulary())
        jpeg, caption = simplejpeg.encode_jpeg(np.ascontiguousarray(render(scene, SIZE)), 95), descriptive(scene)
        key = make_key(str(number))
        samples.append(Sample(key, jpeg, {"key": key}, caption))
        (folder / "files" / f"{key}.jpg").write_bytes(jpeg)
        (folder / "files" / f"{key}.txt").write_text(caption)
    write_dataset(folder / "ds", samples)
    make_models(folder, [sample.caption for sample in samples])
    recipe = folder / "encode.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(folder, folder / "unused", 1, 4, {}).model_dump(mode="json")))
    command = [sys.executable, "-m", "capstan", "encode", str(recipe), "--json"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"encode failed:\n{done.stderr[-4000:]}")
    (folder / "encoder").write_text(json.loads(done.stdout.splitlines()[-1])["encoder"])


def write_dataset(folder: Path, samples: list[Sample], side: int = SIZE) -> None:
    """Write square images of `side` pixels as a dataset of one shard."""
    storage, name = Storage(str(folder)), "shard-000000"
    (folder / "shards").mkdir(parents=True)
    spans = write_tar(folder / "shards" / f"{name}.tar", samples)
    nothing = {f.name: "" if pa.types.is_string(f.type) else 0 for f in SHARD_SCHEMA}
    sizes = {"width": side, "height": side, "original_width": side, "original_height": side, "extra": "{}"}
    rows = [
        nothing | sizes | {"key": sample.key, "caption": sample.caption, "offset": offset, "size": size, "crc32": None}
        for sample, (offset, size) in zip(samples, spans, strict=True)
    ]
    storage.write_table(f"shards/{name}.parquet", pa.Table.from_pylist(rows, schema=SHARD_SCHEMA))
    tar, table = (storage.read(f"shards/{name}.{kind}") for kind in ("tar", "parquet"))
    entry = ShardEntry(
        name=name, samples=len(samples), bytes=len(tar), sha256=sha256_of(tar), table_sha256=sha256_of(table)
    )
    write_manifest(storage, Manifest(shards=[entry]))


def make_models(folder: Path, captions: list[str]) -> None:
    """Write the autoencoder, and the text encoder with its tokenizer, with random weights."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from capstan.training.data.tokenizer import Tokenizer

    torch.manual_seed(0)
    channels = [128 // SHARE, 256 // SHARE, 512 // SHARE, 512 // SHARE]
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32 // SHARE,
        sample_size=SIZE,
    )
    vae.save_pretrained(folder / "vae")
    Tokenizer.train(captions, 8192).save(folder / "text" / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "text" / "tokenizer")
    width = 768 // SHARE
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    CLIPTextModel(text).save_pretrained(folder / "text" / "text_encoder")


if __name__ == "__main__":
    main()
