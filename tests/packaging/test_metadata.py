"""pyproject.toml, the Dockerfile and the table of extras agree; the core needs nothing that only an extra brings."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from repo import ROOT
from source_tree import FILES, imports

from capstan.pipeline import extras
from capstan.pipeline.errors import MissingExtra

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
# What is imported → distribution, where the names differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "fasttext": "fasttext-numpy2-wheel",
    "mlflow": "mlflow-skinny",
    "open_clip": "open_clip_torch",
    "torch_fidelity": "torch-fidelity",
    "yaml": "pyyaml",
}
# Files of the core's floors that import torch as they are loaded, and are loaded by parts of an extra only.
OF_EXTRAS = {
    "capstan/torch_batches.py",
    "pipeline/media/codec.py",
    "pipeline/media/reader.py",
    "recaption/engines/coca.py",
    "recaption/engines/coca_decoding.py",
    "recaption/engines/beam_search.py",
}


def names(requirements: list[str]) -> set[str]:
    """Return the distributions of requirements, an extra's own extras followed."""
    found = set[str]()
    for requirement in requirements:
        own = re.match(r"capstan-t2i\[(.*)\]", requirement)
        if own:
            found |= {name for extra in own[1].split(",") for name in names(EXTRAS[extra])}
        else:
            found.add(re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-"))
    return found


CORE = names(PROJECT["dependencies"])


def distribution(package: str) -> str:
    return DISTRIBUTIONS.get(package, package).lower().replace("_", "-")


def test_an_extra_has_the_packages_that_its_error_looks_for() -> None:
    assert set(extras.PACKAGES) <= set(EXTRAS)
    for extra, packages in extras.PACKAGES.items():
        assert {distribution(package) for package in packages} <= names(EXTRAS[extra])


def test_all_is_every_extra_of_a_user_and_dev_repeats_none() -> None:
    assert names(["capstan-t2i[all]"]) == {name for extra in extras.PACKAGES for name in names(EXTRAS[extra])}
    (reference,) = (requirement for requirement in EXTRAS["dev"] if requirement.startswith("capstan-t2i["))
    plain = {*EXTRAS["dev"]} - {reference}
    assert not names([*plain]) & names([reference])
    assert not names([*plain]) & CORE


def test_the_core_has_no_torch_and_all_that_it_imports() -> None:
    assert not CORE & {
        "torch",
        "torchvision",
        "open-clip-torch",
        "transformers",
        "diffusers",
        "deepspeed",
        "accelerate",
    }
    known = CORE | names(["capstan-t2i[all]"])
    for path in FILES:
        floor = path.relative_to(ROOT).parts[0]
        for module in imports(path):
            package = module.partition(".")[0]
            if package not in sys.stdlib_module_names and package != "capstan":
                assert distribution(package) in known, f"{path}: {package} is not declared"
        if floor in ("capstan", "pipeline", "recaption", "cluster") and str(path.relative_to(ROOT)) not in OF_EXTRAS:
            for module in imports(path, at_import_time_only=True):
                package = module.partition(".")[0]
                if package not in sys.stdlib_module_names and package != "capstan":
                    assert distribution(package) in CORE, f"{path} imports {package}, which the core does not have"


def test_a_missing_extra_is_an_error_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra) as raised:
        extras.require(extras.TRAIN, "train")
    assert str(raised.value) == "train: needs the package diffusers. Fix: pip install 'capstan-t2i[train]'"
    extras.require(extras.RECAPTION, "recaption")
    with pytest.raises(ModuleNotFoundError) as missing:
        import diffusers.models  # noqa: F401
    explained = extras.explain(missing.value, "x")
    assert explained is not None
    assert "capstan-t2i[train]" in explained.hint
    assert extras.explain(ModuleNotFoundError(name="no_such_package"), "x") is None


def test_ray_is_bounded_while_its_private_parts_are_used() -> None:
    private = [path for path in FILES if any(re.match(r"ray\._(private|common)", name) for name in imports(path))]
    bounded = all("<" in line for line in [*PROJECT["dependencies"], *EXTRAS["train"]] if line.startswith("ray["))
    assert bounded == bool(private)


def test_the_supported_pythons_are_the_ones_that_are_named() -> None:
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    versions = {"3.11", "3.12", "3.13"}
    assert {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.", c)} == versions
    assert importlib.metadata.version("capstan-t2i") == PROJECT["version"]


def make_python(path: str) -> str:
    """Return the Python that `make` would set up the project with, where `path` is the PATH."""
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", ".venv/.capstan-installed"],
        cwd=ROOT,
        env={"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"^(\S+) -m venv", done.stdout, re.MULTILINE)
    return found[1] if found else done.stderr


def test_make_takes_a_python_that_works(tmp_path: Path) -> None:
    tools = "/usr/bin:/bin"
    works = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
    for name, script in {
        "python3": "#!/bin/sh\nexit 127\n",
        "python3.13": "#!/bin/sh\nexit 127\n",
        "python3.12": works,
    }.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    assert (
        make_python(f"{tmp_path}:{tools}") == "python3.12"
    )  # a later python3 is not on the PATH: the first one counts
    (tmp_path / "python3").write_text(works)
    assert make_python(f"{tmp_path}:{tools}") == "python3"
    for name in ("python3", "python3.13", "python3.12", "python3.11"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 127\n")
        (tmp_path / name).chmod(0o755)
    assert "Capstan needs Python 3.11, 3.12 or 3.13" in make_python(f"{tmp_path}:{tools}")


# The Dockerfile ------------------------------------------------------------------------------------------------------


def test_the_dockerfile_installs_what_pyproject_declares() -> None:
    text = (ROOT / "Dockerfile").read_text()
    python = re.search(r"^ARG PYTHON=(\S+)$", text, re.MULTILINE)
    assert python
    assert f"Programming Language :: Python :: {python[1]}" in PROJECT["classifiers"]
    stages = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM|\Z)", text, re.M | re.S))
    assert list(stages) == ["cpu", "gpu"]
    installs = {stage: re.findall(r"pip install (.*)", body) for stage, body in stages.items()}
    assert all("constraints.txt" in line for lines in installs.values() for line in lines)
    (core,), (rest,) = installs["cpu"], installs["gpu"]
    assert core.endswith(" .")
    named = re.search(r"'/opt/capstan\[(.*)\]'", rest)
    assert named
    assert named[1] in EXTRAS


@pytest.mark.parametrize("file", ["kuberay", "ray_jobs", "aws", "slurm"])
def test_targets_name_the_dockerfile(file: str) -> None:
    assert "Dockerfile" in (ROOT / "cluster" / "targets" / f"{file}.py").read_text()
