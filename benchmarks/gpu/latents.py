"""Latents/s of the encoding job's own parts, in one process, next to the bare autoencoder."""

from __future__ import annotations

import time

from benchmarks.gpu import data
from benchmarks.gpu.results import Measurement, Row, Scale


def measure(scale: Scale) -> list[Row]:
    import torch

    from capstan.pipeline.config import Resources
    from capstan.pipeline.dataset.shards import Dataset
    from capstan.pipeline.storage import Storage
    from capstan.training.config import TrainConfig
    from capstan.training.models.autoencoder.family import load_autoencoder
    from capstan.training.precomputed.latents import LatentsJob, plan

    pixels, count = scale(256, 32), scale(2048, 4)
    dataset, path = Dataset(Storage(str(data.drawings(scale, pixels, count)))), str(data.autoencoder(scale))
    sizes = {"autoencoder": path, "size": pixels}
    train = TrainConfig.from_section({"model": "diffusion", "run": "unused", "steps": 1, "diffusion": sizes})
    job = LatentsJob(dataset, train, plan(train, dataset), Resources())
    (entry,) = dataset.manifest.shards
    unit, apply = job.unit(entry), job.model()
    pieces = job.prepare(unit)
    first = apply(next(pieces))  # a warm-up
    start = time.perf_counter()
    job.commit(unit, [first, *map(apply, pieces)])
    later = max(count - len(first["rows"]), 1)
    rate = later / (time.perf_counter() - start)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bare = bare_rate(load_autoencoder(path, "autoencoder").to(device).eval(), pixels, len(first["rows"]), scale(20, 1))
    facts = {"pixels": pixels, "precision": "fp32"}
    return [
        Row("bare autoencoder", bare, "images/s", facts=facts),
        Row("encoding job, decoding and writing included", rate, "images/s", facts={"share": rate / bare}),
    ]


def bare_rate(vae: object, pixels: int, batch: int, rounds: int) -> float:
    import torch

    device = next(vae.parameters()).device  # type: ignore[attr-defined]
    images = torch.rand(batch, 3, pixels, pixels, device=device) * 2 - 1

    def once() -> float:
        return float(vae.encode(images).latent_dist.mean.sum())  # type: ignore[attr-defined]

    with torch.no_grad():
        once()
        start = time.perf_counter()
        for _ in range(rounds):
            once()
    return batch * rounds / (time.perf_counter() - start)


MEASUREMENTS = [Measurement("latents", 180, measure)]
