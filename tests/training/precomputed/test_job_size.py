"""What is sent to workers does not grow with the dataset."""

from pathlib import Path

import cloudpickle

from capstan.pipeline.config import Resources
from capstan.pipeline.dataset.shards import Dataset, Manifest, ShardEntry
from capstan.pipeline.storage import Storage
from capstan.recaption.export import Export
from capstan.recaption.job import RecaptionJob
from capstan.training.config import TrainConfig
from capstan.training.precomputed.latents import LatentsJob
from capstan.training.precomputed.text_embeddings import TextStatesJob


def dataset(folder: Path, shards: int) -> Dataset:
    entry = {"samples": 10_000, "bytes": 1 << 30, "sha256": "0" * 64, "table_sha256": "1" * 64}
    listed = [ShardEntry(name=f"shard-{number:06d}", **entry) for number in range(shards)]
    return Dataset(Storage(str(folder)), Manifest(shards=listed))


def test_jobs_hold_no_manifest(tmp_path: Path) -> None:
    sizes, unit = [], None
    section = {"model": "diffusion", "run": "unused", "steps": 1, "diffusion": {"autoencoder": "unused"}}
    train = TrainConfig.from_section(section)
    for shards in (1, 10_000):
        whole = dataset(tmp_path, shards)
        latents = LatentsJob(whole, train, {"size": 32}, Resources())
        jobs = [latents, *(object.__new__(kind) for kind in (TextStatesJob, RecaptionJob, Export))]
        for job in jobs[1:]:
            job.dataset = whole
        sizes.append([len(cloudpickle.dumps(job)) for job in jobs])
        unit = latents.unit(whole.manifest.shards[0])
        sent = cloudpickle.loads(cloudpickle.dumps(latents))
        assert sent.dataset.part(unit.spec["entry"]).shard_names == ["shard-000000"]
    assert sizes[0] == sizes[1]
