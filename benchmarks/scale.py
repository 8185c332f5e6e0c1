"""Laws of the control plane: what a unit costs the driver, whatever the number of workers, shards and bytes.

    units     driver CPU ms a unit and growth of its memory, at 2 to 32 slots: units of nothing, and units with a model
              stage whose outputs have 4 MB
    models    pieces a second through 2 to 32 model workers that sleep
    manifest  a unit of nothing at 0 to 100,000 shards in the manifest
    hosts     the most connections that a site sees at once, and requests of its robots.txt, at 2 to 16 workers

    python benchmarks/scale.py [units] [models] [manifest] [hosts] [--units 200]

Each figure comes from a Ray of its own with as many CPUs as slots. Work is simulated, so that figures are those of the
driver and hold on a machine with few cores; wall-clock times do not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from capstan.pipeline import config
from capstan.pipeline.config import Resources
from capstan.pipeline.dataset.shards import Dataset, Manifest, ShardEntry, write_manifest
from capstan.pipeline.fetch.fetcher import Fetcher
from capstan.pipeline.fetch.host_limits import HostLimits
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Job, Piece, Unit, run, shared, start_ray

SLOTS = [2, 8, 16, 32]
MODELS = [2, 8, 32]
SHARDS = [0, 10_000, 100_000]
WORKERS = [2, 8, 16]
OUTPUT_BYTES = 4 << 20
PER_HOST = 4


class Nothing(Job):
    """Units that do nothing."""

    name = "nothing"

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        yield {}

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        return {"samples": len(pieces)}


class Outputs(Nothing):
    """Units whose pieces sleep in a model and come back with `output` bytes."""

    name = "outputs"

    def __init__(self, storage: Storage, pieces: int, sleep_s: float, output: int) -> None:
        super().__init__(storage)
        self.pieces, self.sleep_s, self.output = pieces, sleep_s, output

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        yield from ({"number": number} for number in range(self.pieces))

    def model(self) -> Callable[[Piece], Piece]:
        def sleep(piece: Piece) -> Piece:
            time.sleep(self.sleep_s)
            return {"output": b"x" * self.output}

        return sleep


class WithManifest(Nothing):
    """Units that do nothing, of a job that knows a dataset."""

    name = "manifest"

    def __init__(self, storage: Storage, dataset: Dataset) -> None:
        super().__init__(storage)
        self.dataset = dataset

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"dataset": self.dataset.part()}

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        self.dataset.part(unit.spec["entry"]) if "entry" in unit.spec else self.dataset.part()
        yield {}


class Fetching(Nothing):
    """Units that fetch from one site."""

    name = "fetching"

    def __init__(self, storage: Storage, port: int) -> None:
        super().__init__(storage)
        self.port = port

    def shared(self) -> HostLimits:
        return HostLimits(PER_HOST)

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        fetcher = Fetcher(config.Fetch(per_host=PER_HOST), {"site.test": f"127.0.0.1:{self.port}"}, shared=shared())
        rows = list(fetcher.fetch_many([f"http://site.test/{number}" for number in range(20)]))
        assert all(fetched.data for _, fetched in rows), rows
        yield {}


class Driver:
    """This process, from the moment when Ray is warm."""

    def __init__(self, storage: Storage, resources: Resources) -> None:
        start_ray(resources)
        run(Nothing(Storage(storage.url + "-warm")), [Unit(f"w{n}") for n in range(8)], resources, progress=False)
        self._process, self._peak = psutil.Process(), 0
        self._cpu, self._memory, self._start = self._spent(), self._process.memory_info().rss, time.perf_counter()
        threading.Thread(target=self._watch, daemon=True).start()

    def costs(self, units: int) -> dict[str, float]:
        """Return CPU ms a unit, MiB more than at the start, and seconds."""
        return {
            "cpu_ms": 1000 * (self._spent() - self._cpu) / units,
            "mib": max(0, self._peak - self._memory) / 2**20,
            "s": time.perf_counter() - self._start,
        }

    def _spent(self) -> float:
        return float(sum(self._process.cpu_times()[:2]))

    def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, self._process.memory_info().rss)
            time.sleep(0.1)


def of_units(kind: str, slots: int, units: int, storage: Storage) -> dict[str, float]:
    resources = Resources(cpus=slots, executor="ray", model_workers=2)
    job = Nothing(storage) if kind == "nothing" else Outputs(storage, 4, 0.0, OUTPUT_BYTES)
    driver = Driver(storage, resources)
    assert run(job, [Unit(str(n)) for n in range(units)], resources, progress=False).done == units
    return driver.costs(units)


def of_models(models: int, storage: Storage) -> dict[str, float]:
    resources = Resources(cpus=4, executor="ray", model_workers=models)
    driver = Driver(storage, resources)
    units, pieces = 8, 2 * models
    run(Outputs(storage, 1, 0.0, 1), [Unit(f"w{n}") for n in range(4 * models)], resources, progress=False)
    start = time.perf_counter()
    job = Outputs(storage, pieces, 1.0, 1)
    job.name = "sleeping"
    run(job, [Unit(str(n)) for n in range(units)], resources, progress=False)
    return {"pieces_per_s": units * pieces / (time.perf_counter() - start)} | driver.costs(units)


def of_manifest(shards: int, units: int, storage: Storage) -> dict[str, float]:
    entry = {"samples": 10_000, "bytes": 1 << 30, "sha256": "0" * 64, "table_sha256": "0" * 64}
    entries = [ShardEntry(name=f"shard-{number:06}", **entry) for number in range(shards)]
    write_manifest(storage, Manifest(complete=True, shards=entries))
    resources = Resources(cpus=2, executor="ray")
    dataset = Dataset(storage)
    driver = Driver(storage, resources)
    spec = {"entry": entries[0].model_dump()} if entries else {}
    run(WithManifest(storage, dataset), [Unit(str(n), spec) for n in range(units)], resources, progress=False)
    return driver.costs(units)


def of_hosts(workers: int, storage: Storage) -> dict[str, float]:
    from aiohttp import web

    seen = {"now": 0, "most": 0, "robots": 0}

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/robots.txt":
            seen["robots"] += 1
            return web.Response(status=404)
        seen["now"] += 1
        seen["most"] = max(seen["most"], seen["now"])
        await asyncio.sleep(0.05)
        seen["now"] -= 1
        return web.Response(body=b"image")

    async def serve(started: threading.Event) -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        seen["port"] = runner.addresses[0][1]
        started.set()
        await asyncio.Event().wait()

    started = threading.Event()
    threading.Thread(target=lambda: asyncio.run(serve(started)), daemon=True).start()
    started.wait()
    resources = Resources(cpus=workers, executor="ray")
    start = time.perf_counter()
    run(Fetching(storage, seen["port"]), [Unit(str(n)) for n in range(3 * workers)], resources, progress=False)
    return {"most": seen["most"], "robots": seen["robots"], "s": time.perf_counter() - start}


def child(what: str, number: int, units: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(f"{folder}/dataset")
        if what in ("nothing", "outputs"):
            return of_units(what, number, units, storage)
        return {
            "models": lambda: of_models(number, storage),
            "manifest": lambda: of_manifest(number, units, storage),
            "hosts": lambda: of_hosts(number, storage),
        }[what]()


def measured(what: str, number: int, units: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", what, str(number), "--units", str(units)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="units, models, manifest, hosts (default: all)")
    parser.add_argument("--units", type=int, default=200, help="units a figure (default: 200)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child[0], int(arguments.child[1]), arguments.units)))
        return
    parts = arguments.parts or ["units", "models", "manifest", "hosts"]
    if "units" in parts:
        print("| driver, a unit | slots | CPU ms | memory + MiB |\n|---|---|---|---|")
        for kind, count in (("nothing", 5 * arguments.units), ("outputs", arguments.units)):
            for slots in SLOTS:
                costs = measured(kind, slots, count)
                print(f"| {kind} | {slots} | {costs['cpu_ms']:.1f} | {costs['mib']:.0f} |", flush=True)
    if "models" in parts:
        print("\n| model workers that sleep 1 s | pieces/s | share of the most |\n|---|---|---|")
        for models in MODELS:
            rate = measured("models", models, 0)["pieces_per_s"]
            print(f"| {models} | {rate:.1f} | {rate / models:.2f} |", flush=True)
    if "manifest" in parts:
        print("\n| shards in the manifest | ms of wall-clock a unit | driver CPU ms |\n|---|---|---|")
        for shards in SHARDS:
            costs = measured("manifest", shards, 5 * arguments.units)
            print(f"| {shards:,} | {costs['s'] * 200 / arguments.units:.1f} | {costs['cpu_ms']:.1f} |", flush=True)
    if "hosts" in parts:
        print(f"\n| workers | most connections at once (per_host: {PER_HOST}) | robots.txt read |\n|---|---|---|")
        for workers in WORKERS:
            costs = measured("hosts", workers, 0)
            print(f"| {workers} | {costs['most']:.0f} | {costs['robots']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
