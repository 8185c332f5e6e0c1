"""Grids, evaluations and the best state while a run trains: right, and without a trace in the run itself."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from capstan.pipeline.errors import RecipeError
from capstan.training.drawing.grid import grid
from capstan.training.metrics.oracle import OracleScore
from capstan.training.sample import open_sampler, sample
from capstan.training.trainer import fit

PROMPTS = ["a red square", "a blue square", "a green square"]
ORACLE = ["background", "colours", "count", "colour_shape", "relation"]


def all_of_it(metrics: dict[str, Any], **evaluate: Any) -> dict[str, Any]:
    measured = {
        "every": 2,
        "count": 4,
        "batch": 2,
        "measures": ["oracle", "clip", "fid", "cmmd"],
        **metrics,
        **evaluate,
    }
    best = {"measure": "fid"}
    return {"samples": {"every": 2, "prompts": PROMPTS}, "evaluate": measured, "best": best, "bands": 4}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "product" / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def watched(recipe_in, metrics, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watched")
    fit(recipe_in(folder, watch=all_of_it(metrics)))
    return folder / "run"


def test_watching_changes_no_step_and_shows_everything(recipe, watched: Path, tmp_path: Path) -> None:
    fit(recipe("plain"))
    timed = {"samples_per_s", "images_per_s", "data_wait", "cpu_s", "flops_per_s", "host_memory_gib"}
    ours, theirs = (
        [{name: value for name, value in line.items() if name not in timed} for line in lines(run / "log.jsonl")]
        for run in (watched, tmp_path / "plain")
    )
    by_time = [(line.pop("loss_by_time"), other.pop("loss_by_time")) for line, other in zip(ours, theirs, strict=True)]
    assert ours == theirs
    for few, many in by_time:  # 4 bands and 10, of the same losses
        assert set(few) <= {"0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00"}
        assert few
        assert set(many) <= {f"{n / 10:.2f}-{(n + 1) / 10:.2f}" for n in range(10)}
    assert all(torch.equal(weights(watched)[name], value) for name, value in weights(tmp_path / "plain").items())

    evaluations = lines(watched / "evaluations.jsonl")
    assert [record["step"] for record in evaluations] == [2, 4]
    assert list(evaluations[0]["measures"]) == [*ORACLE, "clip", "fid", "cmmd"]
    assert evaluations[0]["measures"]["fid"] > 0
    assert -1 <= evaluations[0]["measures"]["clip"] <= 1
    assert [list(record["ceilings"]) for record in evaluations] == [["cmmd"]] * 2  # 2 images are too few for fid

    best = json.loads((watched / "best.json").read_text())
    assert best["value"] == pytest.approx(min(record["measures"]["fid"] for record in evaluations), abs=1e-6)
    assert [path.name for path in (watched / "best").iterdir()] == [f"step-{best['step']:06d}"]
    kept = watched / best["folder"]
    assert json.loads((kept / "checkpoint" / "checkpoint.json").read_text())["step"] == best["step"]
    assert open_sampler(kept).draw(PROMPTS[:1], [0]).arrays.shape == (1, 16, 16, 3)
    assert not (watched / "drawing").exists()


def test_a_grid_is_what_sampling_gives(watched: Path, tmp_path: Path) -> None:
    """That of the last step was drawn with the weights of the product."""
    assert sorted(path.name for path in (watched / "samples").iterdir()) == ["step-000002.png", "step-000004.png"]
    sample(watched, PROMPTS, tmp_path / "grid.png")
    ours, theirs, early = (
        np.asarray(Image.open(path)).astype(int)
        for path in (watched / "samples/step-000004.png", tmp_path / "grid.png", watched / "samples/step-000002.png")
    )
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(early - theirs).max() > 1
    events = next((watched / "tensorboard").iterdir()).read_bytes()
    assert b"samples" in events
    assert b"evaluation/clip" in events
    assert b"loss_by_time/0.50-0.75" in events


def test_a_stop_is_heard_while_measuring_and_the_rest_made_up_for(
    recipe, metrics, watched: Path, tmp_path: Path, monkeypatch
) -> None:
    watch, run = all_of_it(metrics), tmp_path / "run"
    with monkeypatch.context() as patch:
        add = OracleScore.add

        def told_to_stop(self: OracleScore, *given: Any) -> None:
            (run / "stop").touch()
            add(self, *given)

        patch.setattr(OracleScore, "add", told_to_stop)
        stopped = fit(recipe(watch=watch))
    assert (stopped["steps"], stopped["stopped"]) == (2, True)
    assert not (run / "evaluations.jsonl").exists()
    assert fit(recipe(watch=watch))["steps"] == 4
    timeless = [[{**record, "seconds": 0} for record in lines(r / "evaluations.jsonl")] for r in (run, watched)]
    assert timeless[0] == timeless[1]
    assert all(torch.equal(weights(run)[name], value) for name, value in weights(watched).items())


def test_a_stop_at_the_last_step_leaves_nothing_out(recipe, metrics, tmp_path: Path, monkeypatch) -> None:
    watch, run = all_of_it(metrics, measures=["fid"]), tmp_path / "run"
    run.mkdir()
    (run / "stop").touch()
    stopped = fit(recipe(watch=watch, steps=1))
    assert (stopped["steps"], stopped["stopped"]) == (1, True)
    assert not (run / "finished.json").exists()
    with monkeypatch.context() as patch:

        def fail(*_: Any) -> None:
            raise OSError("no space left")

        patch.setattr("capstan.training.monitoring.validation._link", fail)
        with pytest.raises(OSError, match="no space left"):  # or killed, between the evaluation and its best state
            fit(recipe(watch=watch, steps=1))
    assert not fit(recipe(watch=watch, steps=1))["stopped"]
    assert (run / "samples" / "step-000001.png").exists()
    assert [record["step"] for record in lines(run / "evaluations.jsonl")] == [1]
    assert open_sampler(run / json.loads((run / "best.json").read_text())["folder"])


def test_the_best_is_of_evaluations_that_compare(recipe, metrics, tmp_path: Path) -> None:
    pointer = tmp_path / "run" / "best.json"

    def best(steps: int, **evaluate: Any) -> int:
        fit(recipe(watch=all_of_it(metrics, measures=["fid"], **evaluate), steps=steps, schedule="constant"))
        return json.loads(pointer.read_text())["step"]

    assert best(1) == 1
    pointer.write_text(json.dumps(json.loads(pointer.read_text()) | {"value": -1.0}))  # no FID is better
    assert best(2) == 1
    assert best(3, count=3) == 3


def test_held_out_samples_are_the_prompts_where_there_is_no_world(recipe, metrics, tmp_path: Path) -> None:
    watch = {"samples": {"every": 4, "count": 2}, "evaluate": {"every": 4, "count": 4, "measures": ["clip"], **metrics}}
    fit(recipe(source=None, watch=watch, steps=1))
    (record,) = lines(tmp_path / "run" / "evaluations.jsonl")
    assert list(record["measures"]) == ["clip"]
    sampler = open_sampler(tmp_path / "run")
    texts = [f"a {name} square, number {number}" for name, number in (("red", 60), ("green", 61))]
    expected, png = grid(sampler.draw(texts, [0, 1]).arrays, texts), io.BytesIO()
    expected.save(png, format="PNG")
    drawn = np.asarray(Image.open(tmp_path / "run" / "samples" / "step-000001.png")).astype(int)
    assert np.abs(drawn - np.asarray(Image.open(png)).astype(int)).max() <= 1


def test_what_is_missing_is_named_before_the_first_step(recipe, metrics, tmp_path: Path) -> None:
    def refused(match: str, **evaluate: Any) -> None:
        watch = {"evaluate": {"every": 1, "count": 4, **metrics, **evaluate}}
        with pytest.raises(RecipeError, match=match):
            fit(recipe("refused", source=None, watch=watch))
        assert not (tmp_path / "refused" / "log.jsonl").exists()

    refused(r"evaluate\.measures: oracle works only on the captioned world", measures=["oracle"])
    refused(r"evaluate\.count: needs 5 samples .*holdout is 4", count=5)
    refused(
        r"fid\.features: /no/inception\.pth is not on this machine",
        measures=["fid"],
        fid={"features": "/no/inception.pth"},
    )
    refused(r"clip\.pretrained: .*open_clip_model\.safetensors", clip={"model": str(_empty_clip(tmp_path))})


def _empty_clip(folder: Path) -> Path:
    from small_clip import CLIP

    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": {}}))
    return folder
