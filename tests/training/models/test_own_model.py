"""Models of Capstan's own: saved, opened with Capstan's code, exported with theirs."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_python

from capstan.pipeline.errors import RecipeError
from capstan.training.models.own_model import export_own, load_own

_CODE = '''
"""A model in one file."""

import torch
from transformers import PretrainedConfig, PreTrainedModel


class HalfConfig(PretrainedConfig):
    model_type = "half"

    def __init__(self, width=4, **more):
        super().__init__(**more)
        self.width = width


class Half(PreTrainedModel):
    config_class = HalfConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(config.width, 2)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, values):
        return self.layer(values)
'''


@pytest.fixture
def half(tmp_path: Path) -> Any:
    """A module with a model, in a file of its own."""
    path = tmp_path / "code" / "modeling_half.py"
    path.parent.mkdir()
    path.write_text(_CODE)
    spec = importlib.util.spec_from_file_location("modeling_half", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["modeling_half"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["modeling_half"]


def test_the_export_is_opened_by_transformers_alone(half: Any, tmp_path: Path) -> None:
    model = half.Half(half.HalfConfig(width=3))
    model.save_pretrained(tmp_path / "product")
    assert not list((tmp_path / "product").glob("*.py"))
    again = load_own(half.Half, tmp_path / "product", "RUN")
    assert torch.equal(again.layer.weight, model.layer.weight)
    assert not again.training

    folder = tmp_path / "export"
    assert export_own(half.Half, tmp_path / "product", folder, precision="bf16", sampler=None) == "Half"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "modeling_half.py"]
    code = (
        "import sys, torch; from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert model.dtype == torch.bfloat16 and not [n for n in sys.modules if n.split('.')[0] == 'capstan']\n"
        "print(model.layer.weight.tolist())"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    out = warm_python.run(
        [sys.executable, "-c", code, str(folder)], env=environment, cwd=tmp_path, check=True, capture_output=True
    )
    seen = torch.tensor(json.loads(out.stdout.decode().splitlines()[-1]))
    torch.testing.assert_close(seen, model.layer.weight.detach().bfloat16().float())
    assert torch.equal(load_own(half.Half, folder, "RUN").layer.weight, seen)  # exports are opened here, too


def test_what_is_not_such_a_model_is_named(half: Any, tmp_path: Path) -> None:
    half.Half(half.HalfConfig(width=3)).save_pretrained(tmp_path / "product")
    with pytest.raises(RecipeError, match=r"^--sampler: this model has no such setting"):
        export_own(half.Half, tmp_path / "product", tmp_path / "export", precision="fp32", sampler="ddim")
    config = tmp_path / "product" / "config.json"
    config.write_text(config.read_text().replace('"width": 3', '"width": 5'))
    with pytest.raises(RecipeError, match=r"^train\.x\.y: .*/product is not a Half"):
        load_own(half.Half, tmp_path / "product", "train.x.y")
    (tmp_path / "product" / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"^train\.x\.y: .*/product is not a Half"):
        load_own(half.Half, tmp_path / "product", "train.x.y")
    with pytest.raises(RecipeError, match=r"^train\.x\.y: no model at"):
        load_own(half.Half, tmp_path / "nothing", "train.x.y")
