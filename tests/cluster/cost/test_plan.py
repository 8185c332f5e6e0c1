"""What `capstan plan-cost` says of a recipe, where its figures come from, and that docs/sizing.md says the same."""

import json
import re

import pytest
import yaml
from repo import ROOT

from capstan.cluster.cli import run
from capstan.cluster.cost.laws import PRICES, RATES
from capstan.cluster.cost.plan import plan
from capstan.cluster.cost.table import aligned, cells
from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import RecipeError

PAGE = (ROOT / "docs" / "sizing.md").read_text(encoding="utf-8")
SECTIONS = {
    "dataset": "./ds",
    "source": {"path": "rows.parquet", "url": "url", "caption": "caption"},
    "score": {"clip": {}},
    "recaption": {"engine": "transformers", "model": "x"},
}


def recipe(**changes):
    return Recipe.model_validate(SECTIONS | changes)


def stages_of(planned):
    return {stage.name: stage for stage in planned.stages}


def test_ten_times_the_rows_cost_ten_times_as_much():
    small, large = (stages_of(plan(recipe(), rows=rows)) for rows in (10**8, 10**9))
    assert list(small) == ["plan", "build", "score", "select", "recaption"]
    for name, stage in small.items():
        for amount in ("core_s", "gpu_s", "driver_s", "scratch", "objects", "writes", "reads", "stored"):
            assert getattr(large[name], amount) == pytest.approx(10 * getattr(stage, amount)), (name, amount)


def test_more_cores_save_time_but_not_the_drivers():
    one, many = (plan(recipe(), rows=10**9, cores=cores) for cores in (2, 1000))
    assert one.stages == many.stages
    assert stages_of(one)["build"].hours(2, 8) == pytest.approx(500 * stages_of(many)["build"].hours(1000, 8))
    assert stages_of(one)["select"].hours(2, 8) == stages_of(many)["select"].hours(1000, 8)


def test_own_figures_and_prices_replace_those_that_are_known():
    usual, own = (plan(recipe(), rows=10**9, rates=rates, prices={"gpu_hour": 1.0}) for rates in ({}, {"captions": 80}))
    assert RATES["captions"].value == 8
    assert stages_of(usual)["recaption"].gpu_s == pytest.approx(10 * stages_of(own)["recaption"].gpu_s)
    summary = own.summary()
    assert summary["figures"]["captions"] == "80 images/s a GPU; yours: --rate"
    assert summary["figures"]["gpu_hour"] == "1 $ a GPU hour; yours: --price"
    assert set(PRICES) < set(summary["figures"])
    (line,) = [line for line in summary["stages"] if line["stage"] == "recaption"]
    assert line["basis"] == "yours, measured"


def test_images_of_the_table_all_count_and_dead_urls_do_not():
    of_urls = plan(recipe(), rows=10**6)
    embedded = plan(recipe(source={"path": "rows.parquet", "image": "image", "caption": "caption"}), rows=10**6)
    assert stages_of(of_urls)["score"].gpu_s == pytest.approx(0.6 * stages_of(embedded)["score"].gpu_s)
    assert "kept" not in stages_of(embedded)["build"].used
    copied = recipe(source=embedded_source(), image={"resize": "none", "check": "header"})
    assert stages_of(plan(copied, rows=10**6))["build"].used["build_copied"].value > 2000


def embedded_source():
    return {"path": "rows.parquet", "image": "image", "caption": "caption"}


def test_training_needs_a_rate_or_a_run_or_a_model_whose_flops_are_known(tmp_path):
    section = {"run": str(tmp_path / "run"), "steps": 1000, "batch": 100}
    unet = section | {"model": "diffusion", "diffusion": {"autoencoder": "ae"}}
    stage = stages_of(plan(recipe(train=unet), rows=10**6))["train"]
    assert stage.used["flops"].value == pytest.approx(2.4e12, rel=0.1)  # Stable Diffusion's, at 512 pixels
    frozen = unet | {"diffusion": {"autoencoder": "ae", "text": {"pretrained": "clip"}}}
    with pytest.raises(RecipeError, match=r"^train\.model: nothing tells the work of a sample of diffusion\. Fix: "):
        plan(recipe(train=frozen), rows=10**6)
    told = stages_of(plan(recipe(train=frozen), rows=10**6, rates={"train": 50}))["train"]
    assert told.gpu_s == 2000

    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "recipe.json").write_text(json.dumps({"identity": {}, "recipe": {"train": frozen}}))
    (run_folder / "log.jsonl").write_text(json.dumps({"step": 10, "samples_per_s": 4.0, "flops_per_s": 2e12}) + "\n")
    stage = stages_of(plan(recipe(train=frozen), rows=10**6))["train"]
    assert stage.used["flops"].value == 5e11
    assert stage.gpu_s == pytest.approx(100_000 * 5e11 / (0.4 * 989e12))
    record = {"step": 20, "samples_per_s": 40.0, "flops_per_s": 2e13, "mfu": 0.3}
    (run_folder / "log.jsonl").write_text(json.dumps(record) + "\n")
    assert stages_of(plan(recipe(train=frozen), rows=10**6))["train"].gpu_s == 2500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--rows: only reading the source would tell. Fix: say how many there are: --rows 1000000000"),
        (["--rows", "9", "--rate", "speed=3"], "--rate: speed is not known. Fix: use one of kept, build_256, "),
        (["--rows", "9", "--rate", "captions"], "--rate: captions is no NAME=NUMBER. Fix: write e.g. captions=25"),
        (["--rows", "9", "--rate", "captions=0"], "--rate: captions is 0. Fix: give a number above 0"),
        (["--rows", "9", "--rate", "captions=nan"], "--rate: captions is nan. Fix: give a number above 0"),
        (["--rows", "9", "--price", "train=3"], "--price: train is not known. Fix: use one of core_hour, "),
        (["--rows", "9", "--gpus", "0"], "--gpus: is 0, and the stage score needs a GPU. Fix: say how many there are"),
    ],
)
def test_wrong_options_are_named(options, message, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SECTIONS | {"source": {"path": "rows.csv", "url": "url", "caption": "caption"}}))
    assert run(["plan-cost", str(path), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_command_prints_a_table_and_each_figure_with_its_source(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SECTIONS))
    assert run(["plan-cost", str(path), "--rows", "1000000000"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^stage +core hours +GPU hours +hours", printed, re.MULTILINE)
    assert re.search(r"^recaption .* assumed, measured$", printed, re.MULTILINE)
    assert "  captions: 8 images/s a GPU; assumed: " in printed
    assert run(["plan-cost", str(path), "--rows", "1000000000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 10**9


def of_the_page():
    """The recipe of docs/sizing.md, and its tables by the command above them."""
    section = re.search(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert section is not None
    blocks = re.findall(r"^```console\n\$ capstan plan-cost (.*?)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return Recipe.model_validate(yaml.safe_load(section[1])), blocks


def test_the_tables_of_the_page_are_those_of_the_command():
    page, blocks = of_the_page()
    assert len(blocks) == 2
    for options, block in blocks:
        rows, cores, gpus = map(int, re.findall(r"--(?:rows|cores|gpus) (\d+)", options))
        summary = plan(page, rows=rows, cores=cores, gpus=gpus).summary()
        assert block.splitlines()[: len(summary["stages"]) + 1] == aligned(cells(summary["stages"]))


def test_the_hours_of_the_page_are_those_of_the_command():
    page, _ = of_the_page()
    found = re.findall(r"^\| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,.]+) \| ([\d,.]+) \|$", PAGE, re.MULTILINE)
    assert len(found) == 6
    for line in found:
        rows, cores, gpus, hours, dollars = (float(text.replace(",", "")) for text in line)
        summary = plan(page, rows=int(rows), cores=int(cores), gpus=int(gpus)).summary()
        assert (summary["hours"], summary["dollars"]) == (hours, dollars)
