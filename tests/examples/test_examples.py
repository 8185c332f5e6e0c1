"""The recipes of examples/: each is valid, and does what its head says as far as that goes without foreign weights."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import chat_server
import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_networks
import tiny_towers
import transformers
import warm_python
import yaml
from moving import RED, movie, seconds_of
from PIL import Image
from repo import ROOT
from small_dataset import write_dataset

from capstan.cluster import cli
from capstan.cluster.recipe import load
from capstan.pipeline.select.conditions import check_conditions
from capstan.pipeline.storage import Storage

EXAMPLES = ROOT / "examples"
RECIPES = sorted(path for path in EXAMPLES.rglob("*.yaml") if path.name != "clusters.yaml")
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One working folder for all: Ray's workers stay in that of the first build."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in the working folder, as a user does; return its summary."""
    monkeypatch.chdir(folder)

    def run(*arguments: str, code: int = 0, **overrides: Any) -> dict[str, Any]:
        settings = [f"--set={name}={json.dumps(value)}" for name, value in overrides.items()]
        assert cli.run([*arguments, *settings, "--json"]) == code
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def two_cpus() -> dict[str, int]:
    """Resources of a small run, whatever machine tests run on."""
    return {"cpus": 2}


def jpeg(number: int, width: int = 320, height: int = 240) -> bytes:
    """Return an image unlike those of other numbers."""
    pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def stored(dataset: str) -> dict[str, bytes]:
    """Return caption → JPEG, of all samples of a dataset."""
    found = {}
    for path in sorted(Path(dataset, "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        found |= {text.decode(): files[f"{name[:-4]}.jpg"] for name, text in files.items() if name.endswith(".txt")}
    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(EXAMPLES).as_posix())
def test_a_recipe_is_valid_and_its_head_says_how_to_run_it(path: Path) -> None:
    recipe = load(path)
    check_conditions(recipe)
    head = re.match(r"(?:#.*\n)+", path.read_text())
    assert head
    commands = re.findall(rf"capstan .*examples/{path.relative_to(EXAMPLES).as_posix()}", head[0])
    assert commands
    assert "# Bring:" in head[0]
    assert "# Result:" in head[0]


def test_every_example_is_in_the_list() -> None:
    page = (EXAMPLES / "README.md").read_text()
    assert {path.relative_to(EXAMPLES).as_posix() for path in RECIPES} <= set(re.findall(r"\]\(([^)]+)\)", page))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """Serve a folder of images on loopback; yield its URL."""
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / "same.jpg").write_bytes(jpeg(0))
    (tmp_path / "small.jpg").write_bytes(jpeg(7, 160, 120))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.integration
def test_url_table(run: Run, site: str, two_cpus: dict[str, int]) -> None:
    names = [*(f"{n}.jpg" for n in range(6)), "same.jpg", "small.jpg", "gone.jpg", "5.jpg"]
    captions = [*(f"a test image number {n}" for n in range(9)), "cat"]
    table = pa.table({"url": [f"{site}/{name}" for name in names], "caption": captions})
    pq.write_table(table, "urls.parquet")
    recipe = str(EXAMPLES / "url_table.yaml")
    summary = run("build", recipe, **{"fetch.allow_private": True, "resources": two_cpus})
    assert summary["counts"] | {"shards": 1} == summary["counts"]
    assert {step["step"]: step["lost"] for step in summary["funnel"]}["size"] == 1
    reasons = duckdb.sql(
        "select outcome, reason, count(*) from 'out/urls/ledger/*.parquet' group by all order by all"
    ).fetchall()
    assert ("failed", "http_404", 1) in reasons
    assert ("rejected", "size", 1) in reasons
    assert ("rejected", "caption", 1) in reasons
    assert ("duplicate", "exact", 1) in reasons
    assert len(stored("out/urls")) == summary["counts"]["kept"] == 6


@pytest.mark.integration
def test_hugging_face_parquet(run: Run, two_cpus: dict[str, int]) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in range(5)],
        "text": [*(f"a test image number {n}" for n in range(4)), "no"],
        "licence": ["cc0"] * 5,
    }
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "licence": datasets.Value("string")}
    Path("hf-dataset/data").mkdir(parents=True)
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet("hf-dataset/data/train-00000-of-00001.parquet")
    run("build", str(EXAMPLES / "hugging_face_parquet.yaml"), resources=two_cpus)
    assert set(stored("out/hugging-face")) == {f"a test image number {n}" for n in range(4)}
    ((extra,),) = duckdb.sql("select extra from 'out/hugging-face/ledger/*.parquet' limit 1").fetchall()
    assert json.loads(extra)["licence"] == "cc0"


@pytest.mark.integration
def test_cut_videos(run: Run, folder: Path, two_cpus: dict[str, int]) -> None:
    (folder / "videos").mkdir()
    (folder / "videos/one.mp4").write_bytes(movie(seconds_of([RED], each=3.0)))
    (folder / "videos/one.txt").write_text("red")
    settings = {"source.path": "videos", "cut.min_size": 16, "resources": two_cpus}
    assert run("cut", str(EXAMPLES / "cut_videos.yaml"), **settings)["counts"]["clips"] == 1
    assert stored("out/clips").keys() == {"red"}


def test_img2dataset(run: Run, two_cpus: dict[str, int]) -> None:
    """As img2dataset 1.47 writes it: tars with KEY.jpg, KEY.json, KEY.txt; a table and statistics next to each."""
    output = Path("img2dataset-output")
    output.mkdir()
    columns: list[dict[str, Any]] = []
    with tarfile.open(output / "00000.tar", "w") as tar:
        for number in range(4):
            facts = {
                "caption": f"a test image number {number}",
                "url": f"https://images.example.org/{number}.jpg",
                "key": f"{number:09d}",
                "status": "success",
                "error_message": None,
                "width": 320,
                "height": 240,
                "original_width": 640 if number else 100,
                "original_height": 480 if number else 75,
                "exif": "{}",
                "sha256": f"{number:064x}",
            }
            columns.append(facts)
            for suffix, data in (
                ("jpg", jpeg(number)),
                ("json", json.dumps(facts, indent=4).encode()),
                ("txt", str(facts["caption"]).encode()),
            ):
                member = tarfile.TarInfo(f"{facts['key']}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    pq.write_table(pa.Table.from_pylist(columns), output / "00000.parquet")
    (output / "00000_stats.json").write_text('{"count": 4, "successes": 4}')
    run("build", str(EXAMPLES / "img2dataset.yaml"), resources=two_cpus)
    assert stored("out/from-img2dataset") == {f"a test image number {n}": jpeg(n) for n in range(1, 4)}
    extra = duckdb.sql("select extra from 'out/from-img2dataset/ledger/*.parquet' where outcome = 'kept'").fetchall()
    assert {json.loads(text)["url"] for (text,) in extra} == {f"https://images.example.org/{n}.jpg" for n in (1, 2, 3)}


@pytest.mark.integration
def test_recaption_server(run: Run, two_cpus: dict[str, int]) -> None:
    write_dataset(Storage("out/small"), [[0, 1, 2], [3, 4]])
    recipe = str(EXAMPLES / "recaption_server.yaml")
    with chat_server.serving() as server:
        settings = {
            "dataset": "out/small",
            "recaption.server.url": server.url,
            "recaption.lint.retries": 0,
            "resources": two_cpus,
        }
        plan = run("recaption", recipe, "--plan", **settings)
        assert plan["new"] == 5
        run("recaption", recipe, **settings)
        body = server.bodies[-1]
    assert body["model"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert body["temperature"] == 0.7
    rows = duckdb.sql("select slot, count(*), min(length(raw)) > 0 from 'out/small/captions/*/*.parquet' group by all")
    assert sorted(rows.fetchall()) == [("descriptive", 5, True), ("short", 5, True)]


@pytest.mark.integration
def test_sdxl_finetune(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of a network of SDXL's shape, started from a pipeline's folder with both of its text encoders."""
    dataset = tmp_path / "dataset"
    write_dataset(Storage(str(dataset)), [[0, 1, 2, 3], [4, 5]])
    vae = tiny_networks.save_autoencoder(dataset, tmp_path / "vae", size=16)
    towers = {
        "clip": tiny_towers.save_clip(tmp_path / "clip"),
        "plain": tiny_towers.save_clip(tmp_path / "plain", projected=False, seed=1),
    }
    tiny = tiny_networks.settings_of("sdxl", towers, autoencoder=vae, size=16)
    family = tiny_networks.family_of(dataset, tmp_path / "assets", tiny)
    pipeline = tiny_networks.save_product(family, tmp_path / "sdxl") / "product"
    smaller = {
        "dataset": str(dataset),
        "train.init": str(pipeline),
        "train.diffusion.autoencoder": str(pipeline / "vae"),
        "train.diffusion.text.pretrained": str(pipeline),
        "train.diffusion.preset": "sdxl-tiny",
        "train.diffusion.config": tiny_networks.SDXL,
        "train.diffusion.size": 16,
        "train.data": {"layer": None},
        "train.engine": {"strategy": "ddp", "launcher": "local"},
        "train.watch": {"trackers": []},
        "train.steps": 2,
        "train.batch": 2,
        "train.precision": "fp32",
    }
    monkeypatch.setattr("capstan.training.launch.subprocess", warm_python)
    run("train", str(EXAMPLES / "sdxl_finetune.yaml"), **smaller)
    product = Path("out/sdxl/product")
    assert json.loads((product / "model_index.json").read_text())["_class_name"] == "StableDiffusionXLPipeline"
    records = [json.loads(line) for line in Path("out/sdxl/log.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 2


def shortened(name: str) -> dict[str, Any]:
    """Overrides that build few scenes and train every run of an example for two steps; images take two steps, too."""
    train = yaml.safe_load((EXAMPLES / name).read_text())["train"]
    few = {"steps": 2, "log_every": 1, "watch": {"trackers": []}}
    drawing = {"sampling": {"steps": 2}}
    earlier = [one | few | {one["model"]: one[one["model"]] | drawing} for one in train.get("before", [])]
    world = {"source.world.scenes": 12, "dataset": f"out/{name}-world", "train.watch.samples": None}
    return world | {"train.before": earlier, "train.steps": 2, f"train.{train['model']}.sampling.steps": 2}


@pytest.mark.integration
def test_ddpm(run: Run, two_cpus: dict[str, int]) -> None:
    recipe, settings = str(EXAMPLES / "ddpm.yaml"), shortened("ddpm.yaml")
    run("build", recipe, resources=two_cpus, **settings)
    assert run("train", recipe, resources=two_cpus, **settings)["steps"] == 2
    assert set(run("evaluate", "out/ddpm", "--count", "4")["measures"]) == {"parsed", "background_tv", "colours_tv"}
    assert run("sample", "out/ddpm", "--seed", "0", "--seed", "1", "-o", "grid.png")["pictures"] == 2


@pytest.mark.integration
def test_imagen(run: Run, two_cpus: dict[str, int]) -> None:
    """With a T5 that the example's script trains on the captions for two steps."""
    recipe, settings = str(EXAMPLES / "imagen.yaml"), shortened("imagen.yaml")
    run("build", recipe, resources=two_cpus, **settings)
    script = [sys.executable, str(EXAMPLES / "small_t5.py"), settings["dataset"], "out/t5", "--steps", "2"]
    warm_python.run(script, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    words = transformers.T5Tokenizer.from_pretrained("out/t5")
    assert words.tokenize("a circle.") == ["▁a", "▁circle", "."]
    assert run("train", recipe, resources=two_cpus, **settings)["steps"] == 2
    assert (Path("out/imagen-base/product/base/model_index.json")).is_file()
    assert {"colours", "psnr"} <= set(run("evaluate", "out/imagen", "--count", "4")["measures"])
    summary = run("sample", "out/imagen", "-p", "a red circle.", "--level", "0.1", "-o", "grid.png")
    assert summary["size"] == [32, 32]


def test_slurm(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CAPSTAN_STATE", str(tmp_path / "state"))
    where = ["--to", "night", "--clusters", str(EXAMPLES / "slurm/clusters.yaml"), "--dry-run"]
    for command in ("build", "recaption", "train"):
        assert cli.run(["submit", *where, "--", command, str(EXAMPLES / "slurm/recipe.yaml")]) == 0
        script = capsys.readouterr().out
        assert "#SBATCH --nodes=4" in script
        assert "source /shared/venvs/capstan/bin/activate" in script
        assert f"{command} " in script
    assert yaml.safe_load((EXAMPLES / "slurm/clusters.yaml").read_text())["night"]["gpus"] == 8
