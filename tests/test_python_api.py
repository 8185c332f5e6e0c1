"""The Python API: every line of docs/python.md runs, names load lazily, and what a notebook shows."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from repo import ROOT
from s3 import S3
from small_captioner import write_captioner
from tiny_networks import family_of, save_product

import capstan

SMALL = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
RECIPE = {
    "dataset": "out/ds",
    "source": {"format": "world", "world": {"scenes": 60, "size": 32}},
    "image": {"min_size": 16},
    "resources": {"cpus": 2},
    "recaption": {"engine": "coca", "model": "captioner"},
    "train": {
        "model": "autoencoder",
        "run": "out/autoencoder",
        "steps": 2,
        "batch": 4,
        "engine": {"strategy": "ddp", "launcher": "local"},
        "autoencoder": SMALL,
    },
}


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory):
    """What the page's code leaves behind: its names, run block by block in a folder with a recipe and a captioner."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    write_captioner(folder / "captioner")
    names: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks():
            if "capstan.sample(" in block:
                exec(compile(block.splitlines()[0], "docs/python.md", "exec"), names)
                write_diffusion()
                block = "\n".join(block.splitlines()[1:])
            exec(compile(block, "docs/python.md", "exec"), names)
        yield names


def write_diffusion() -> None:
    """Write an untrained diffusion model over the autoencoder that the page trained, as its trainer would."""
    text = {"vocab_size": 600, "length": 16, "width": 16, "layers": 1, "heads": 2}
    settings = {"autoencoder": "out/autoencoder", "unet": SMALL | {"heads": 2}, "text": text, "sampling": {"steps": 2}}
    run = Path("out/run")
    save_product(family_of(Path("out/ds"), run / "assets", settings), run)


@pytest.mark.integration
def test_every_line_of_the_page_runs(page):
    assert page["summary"].kept == len(page["ds"]) > 20
    assert page["summary"].counts["kept"] + sum(page["summary"].failed.values()) <= 60
    assert page["written"]["layer"] in page["ds"].layers
    assert [image.size for image in page["images"]] == [(32, 32)] * 4


@pytest.mark.integration
def test_samples_are_those_of_the_shards(page):
    ds = page["ds"]
    assert (
        [sample.key for sample in ds] == sorted(sample.key for sample in ds) == ds.samples.to_arrow()["key"].to_pylist()
    )
    assert ds[-1].key == ds[len(ds) - 1].key
    assert ds[2:4][1].jpeg == ds[3].jpeg
    assert ds[0].image.size == (ds[0].width, ds[0].height)
    with pytest.raises(IndexError):
        ds[len(ds)]
    assert len(ds.ledger) == 60
    assert ds.captions().to_pandas()["key"].nunique() == len(ds)


@pytest.mark.integration
def test_a_notebook_shows_images_and_escapes_what_strangers_wrote(page):
    ds = page["ds"]
    html = ds._repr_html_()
    assert html.count("data:image/jpeg;base64,") == 12
    hostile = ds[0].__class__(**(vars(ds[0]) | {"caption": "<script>alert(1)</script>"}))
    assert "<script>" not in hostile._repr_html_()
    assert "fetched" in ds.funnel._repr_html_()
    assert "fetched" in page["summary"]._repr_html_()
    assert "<table" in ds.ledger._repr_html_()


@pytest.mark.integration
def test_batches_resume_exactly_and_with_other_workers(page):
    def keys(start, stop, **options):
        parts = page["ds"].torch(batch=8, size=32, layer=None, seed=3, start=start, stop=stop, **options)
        return [key for batch in parts for key in batch["key"]]

    whole = keys(0, 6)
    assert whole == keys(0, 2) + keys(2, 6)
    halves = [keys(0, 6, rank=rank, world=2) for rank in range(2)]
    assert [k for i in range(6) for half in halves for k in half[4 * i : 4 * i + 4]] == whole
    epoch = len(page["ds"])
    assert len(set(keys(0, epoch // 8))) == epoch // 8 * 8

    batches = page["ds"].torch(batch=8, size=32, layer=None, seed=3)
    with pytest.raises(capstan.RecipeError, match="seed 4"):
        batches.load_state_dict(batches.state_dict() | {"seed": 4})


@pytest.mark.integration
def test_a_dataset_in_a_bucket(page, tmp_path, monkeypatch):
    for name, value in (server := S3(tmp_path, "capstan-key", "capstan-secret")).env.items():
        monkeypatch.setenv(name, value)
    shutil.copytree("out/ds", tmp_path / "bucket" / "ds")  # the server serves this folder
    with server:
        remote = capstan.open("s3://bucket/ds", storage=server.storage())
        assert remote[5].jpeg == page["ds"][5].jpeg
        assert len(remote.ledger) == 60


def test_import_is_quick_and_light():
    code = "import sys, time; t = time.perf_counter(); import capstan; print(time.perf_counter() - t, len(sys.modules))"
    code += "; print(sorted({'torch', 'ray', 'pyarrow', 'numpy', 'pydantic', 'duckdb'} & sys.modules.keys()))"
    seconds, modules = [], ""
    for _ in range(3):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        first, modules = out.splitlines()
        seconds.append(float(first.split()[0]))
    assert modules == "[]"
    assert min(seconds) < 0.2


def test_public_names_are_all_there():
    assert {name for name in capstan.__all__ if getattr(capstan, name, None) is None} == set()
    assert set(capstan.__all__) <= set(dir(capstan))
    with pytest.raises(AttributeError, match="nothing"):
        capstan.nothing  # noqa: B018


def test_recaption_is_a_function_and_a_folder():
    import capstan.recaption.config

    assert capstan.recaption.config.RecaptionConfig
    with pytest.raises(capstan.RecipeError, match=r"recaption: is missing"):
        capstan.recaption({"dataset": "x", "source": {"path": "x.csv"}})


def test_errors_name_the_field():
    with pytest.raises(capstan.RecipeError, match=r"image.size"):
        capstan.load_recipe({"dataset": "x", "image": {"size": "large"}})
    with pytest.raises(capstan.RecipeError, match="no dataset at"):
        capstan.open("/nowhere/at/all")


def test_overrides_may_be_a_mapping(tmp_path):
    recipe = capstan.load_recipe({"dataset": "x"}, {"image.size": 64, "dedup.perceptual": None})
    assert (recipe.image.size, recipe.dedup.perceptual) == (64, None)
    again = capstan.load_recipe(recipe, ["image.size=32"])
    assert (again.image.size, again.dedup.perceptual) == (32, None)
