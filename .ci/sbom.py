"""Write the software bill of materials of a release, from requirements.lock, as CycloneDX 1.6 JSON.

    python .ci/sbom.py build/sbom.cdx.json     (make sbom)

Versions and hashes are those of the lock; licences and dependencies come from the metadata of the installed packages,
so everything that the lock names for this Python must be installed. The same lock gives the same file.
"""

from __future__ import annotations

import json
import re
import sys
import uuid
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from packaging.markers import Marker
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = "capstan-t2i"
_ENTRY = re.compile(r"^([a-z0-9-]+)==(\S+)(?: ; (.+?))?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", re.M)


class Locked(NamedTuple):
    """A package of the lock: `marker` says for which Pythons ("": all)."""

    name: str
    version: str
    marker: str
    hashes: list[str]

    @property
    def purl(self) -> str:
        return f"pkg:pypi/{self.name}@{self.version}"


def locked(text: str) -> list[Locked]:
    """Return the packages of a lock file. Raises ValueError for a line that was not understood."""
    found = [
        Locked(name, version, marker, re.findall(r"sha256:(\w+)", hashes))
        for name, version, marker, hashes in _ENTRY.findall(text)
    ]
    if not found or text.count("==") - text.count("python_version ==") != len(found):
        raise ValueError("requirements.lock has lines of an unknown form")
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def licences(about: metadata.PackageMetadata) -> list[dict[str, Any]]:
    """Return a package's licences: its SPDX expression, else its classifiers, else the first line of its free text."""
    if expression := about.get("License-Expression"):
        return [{"expression": expression}]
    classifiers = [line.rpartition(" :: ")[2] for line in about.get_all("Classifier") or [] if "License ::" in line]
    text = (about.get("License") or "").strip().splitlines()
    return [{"license": {"name": name}} for name in classifiers or text[:1]]


def needs(about: metadata.PackageMetadata) -> Iterator[str]:
    """Yield the names of the packages that a package needs here, without extras."""
    for line in about.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield normal(requirement.name)


def sbom(packages: list[Locked]) -> dict[str, Any]:
    """Return the document. Raises ValueError naming what is not installed, or in another version than the lock's."""
    purls = {package.name: package.purl for package in packages}
    components, dependencies, wrong = [], [], []
    for package in packages:
        component: dict[str, Any] = {
            "type": "library",
            "bom-ref": package.purl,
            "name": package.name,
            "version": package.version,
            "purl": package.purl,
            "hashes": [{"alg": "SHA-256", "content": value} for value in package.hashes],
        }
        if package.marker:
            component["properties"] = [{"name": "python:marker", "value": package.marker}]
        if not package.marker or Marker(package.marker).evaluate():
            try:
                about = metadata.metadata(package.name)
            except metadata.PackageNotFoundError:
                wrong.append(f"{package.name} is not installed")
                continue
            if about["Version"] != package.version:
                wrong.append(f"{package.name} is {about['Version']}, not {package.version}")
            component["licenses"] = licences(about)
            inner = sorted({purls[name] for name in needs(about) if name in purls})
            dependencies.append({"ref": package.purl, "dependsOn": inner})
        components.append(component)
    if wrong:
        raise ValueError(f"the installed packages are not those of the lock: {'; '.join(wrong)}")
    return _document(components, dependencies, purls)


def _document(
    components: list[dict[str, Any]], dependencies: list[dict[str, Any]], purls: dict[str, str]
) -> dict[str, Any]:
    own = metadata.metadata(PROJECT)
    ref = f"pkg:pypi/{PROJECT}@{own['Version']}"
    root = {"type": "application", "bom-ref": ref, "name": PROJECT, "version": own["Version"], "purl": ref}
    first = sorted({purls[name] for name in needs(own) if name in purls})
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {**root, "licenses": licences(own)}},
        "components": components,
        "dependencies": [{"ref": ref, "dependsOn": first}, *dependencies],
    }
    number = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(document, sort_keys=True))
    return {"serialNumber": f"urn:uuid:{number}", **document}


def main(target: Path) -> None:
    document = sbom(locked((ROOT / "requirements.lock").read_text(encoding="utf-8")))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/sbom.cdx.json"))
