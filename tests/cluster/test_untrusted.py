"""Data is never run: what a tar, a table or a weights' file holds is read, not executed."""

from __future__ import annotations

import ast
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from repo import ROOT
from source_files import rows, write_tar

FLOORS = ("pipeline", "recaption", "training", "cluster")
# Pickles that Capstan itself wrote a moment ago, for another process of the same run.
OWN_PICKLES = {
    "pipeline/ingest/guarded.py",
    "pipeline/units/__init__.py",
    "pipeline/units/on_processes.py",
    "pipeline/units/process_worker.py",
    "pipeline/units/shared.py",
    "pipeline/units/workers.py",
    "training/launch.py",
}


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def image() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((70, 70, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def test_pickles_in_a_tar_are_left_alone(tmp_path: Path) -> None:
    armed = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(armed))
    members = [
        ("a.jpg", image()),
        ("a.txt", b"a cat"),
        ("a.pkl", bomb),
        ("a.pyd", bomb),
        ("a.pth", bomb),
        ("a.npy", bomb),
    ]
    write_tar(tmp_path / "x.tar", members)
    found = rows(tmp_path / "x.tar", format="webdataset")
    assert [row["caption"] for row in found] == ["a cat"]
    assert not armed.exists()
    pickle.loads(bomb)
    assert armed.exists()  # it would have been seen


def test_weights_that_are_a_program_are_refused(tmp_path: Path) -> None:
    from small_captioner import write_captioner

    from capstan.recaption.config import RecaptionConfig
    from capstan.recaption.engines import make

    folder, armed = write_captioner(tmp_path / "captioner"), tmp_path / "exploded"
    (folder / "open_clip_model.safetensors").unlink()
    torch.save({"state_dict": Bomb(armed)}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the library says; what counts is that nothing ran
        make(RecaptionConfig(model=str(folder))).caption(np.zeros((1, 3, 32, 32), np.float32), ["x"])
    assert not armed.exists()


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", [p for floor in FLOORS for p in sorted((ROOT / floor).rglob("*.py"))], ids=str)
def test_nothing_loads_programs(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    for call in calls(path):
        function, options = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
        if function == "torch.load":
            assert options.get("weights_only") == "True", f"{name}:{call.lineno}"
        if function == "np.load":
            assert options.get("allow_pickle", "False") == "False", f"{name}:{call.lineno}"
        if function in ("pickle.load", "pickle.loads"):
            assert name in OWN_PICKLES, f"{name}:{call.lineno}"
        assert not function.endswith((".extractall", ".extract")), f"{name}:{call.lineno}"
        assert function not in ("yaml.load", "eval", "exec", "os.system", "marshal.loads"), f"{name}:{call.lineno}"
