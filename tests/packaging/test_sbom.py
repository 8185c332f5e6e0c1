"""The bill of materials: every package of the lock, with its hashes and licence, and the same bytes each time."""

from __future__ import annotations

import importlib.util
import json
from importlib import metadata
from typing import Any

import pytest
from packaging.markers import Marker
from repo import ROOT


def sbom_module() -> Any:
    spec = importlib.util.spec_from_file_location("sbom", ROOT / ".ci" / "sbom.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULE = sbom_module()
PACKAGES = MODULE.locked((ROOT / "requirements.lock").read_text())


def _is_here(package: Any) -> bool:
    try:
        return metadata.version(package.name) == package.version
    except metadata.PackageNotFoundError:  # of an extra that the tests do not install, or of another Python
        return bool(package.marker) and not Marker(package.marker).evaluate()


def test_every_package_of_the_lock_is_read() -> None:
    assert len(PACKAGES) == (ROOT / "requirements.lock").read_text().count(" \\\n    --hash=") - sum(
        len(package.hashes) - 1 for package in PACKAGES
    )
    assert {"torch", "ray", "duckdb"} <= {package.name for package in PACKAGES}
    with pytest.raises(ValueError, match="unknown form"):
        MODULE.locked((ROOT / "requirements.lock").read_text() + "new==1\n")


def test_the_document_names_versions_hashes_licences_and_what_needs_what() -> None:
    chosen = [package for package in PACKAGES if _is_here(package)]
    document = MODULE.sbom(chosen)
    assert (document["bomFormat"], document["specVersion"], document["version"]) == ("CycloneDX", "1.6", 1)
    components = {component["name"]: component for component in document["components"]}
    assert components.keys() == {package.name for package in chosen}
    refs = {component["bom-ref"] for component in components.values()}
    assert len(refs) == len(components)
    duckdb = components["duckdb"]
    assert duckdb["purl"] == f"pkg:pypi/duckdb@{metadata.version('duckdb')}"
    assert duckdb["licenses"] == [{"license": {"name": "MIT License"}}] or duckdb["licenses"] == [{"expression": "MIT"}]
    assert all(len(one["content"]) == 64 for component in components.values() for one in component["hashes"])
    unknown = [name for name, component in components.items() if component.get("licenses") == []]
    assert len(unknown) <= len(components) // 20, f"no licence in the metadata of {unknown}"
    needed = {entry["ref"]: entry["dependsOn"] for entry in document["dependencies"]}
    assert components["duckdb"]["purl"] in needed[document["metadata"]["component"]["bom-ref"]]
    assert {ref for inner in needed.values() for ref in inner} <= refs
    assert json.dumps(MODULE.sbom(chosen)) == json.dumps(document)
    assert "://" not in json.dumps([{**component, "licenses": []} for component in components.values()])


def test_what_is_not_installed_or_differs_is_named() -> None:
    (duckdb,) = (package for package in PACKAGES if package.name == "duckdb")
    with pytest.raises(ValueError, match=r"no-such-package is not installed; duckdb is \S+, not 0\.0\.1"):
        MODULE.sbom([duckdb._replace(name="no-such-package"), duckdb._replace(version="0.0.1")])
