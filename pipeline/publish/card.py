"""README.md of a published dataset: a YAML header for the Hugging Face Hub, then what it is and how it was made

What Capstan writes stands between two marks. Text outside them is people's own, and stays when the dataset is published
again; so do keys of the header that Capstan does not write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import yaml

from capstan.pipeline.dataset.shards import Manifest
from capstan.pipeline.publish.contents import Wishes
from capstan.pipeline.text.printable import printable
from capstan.pipeline.text.spdx import UNKNOWN

NAME: Final = "README.md"
_BEGIN: Final = "<!-- capstan: from here to the end mark, publishing again replaces the text -->"
_END: Final = "<!-- capstan: end -->"
_HEADER: Final = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)
_SIZES: Final = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_LARGER: Final = ((10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"))
# Licences that the Hub knows by the SPDX identifier in lower case.
_HUB: Final = re.compile(r"(?:cc-by(?:-nc)?(?:-sa|-nd)?-\d\.\d|cc0-1\.0|apache-2\.0|mit|odbl|pddl)\Z")
_RENAMED: Final = {"ODbL-1.0": "odbl", "PDDL-1.0": "pddl", UNKNOWN: "unknown"}
_LICENSES: Final = 20
_LONGEST: Final = 300  # characters of a condition


def card(manifest: Manifest, wishes: Wishes, layers: Mapping[str, Sequence[str]], before: str = "") -> str:
    """Return the card. `layers`: published caption layers → their slots; `before`: the card that is there."""
    header, rest = _split(before)
    header |= _header(manifest, wishes)
    text = "\n".join([_BEGIN, "", *_body(manifest, wishes, layers), "", _END])
    head, mark, tail = rest.partition(_BEGIN)
    if mark and _END in tail:
        rest = head + text + tail.partition(_END)[2]
    else:
        rest = f"{rest.rstrip()}\n\n{text}\n" if rest.strip() else f"{text}\n"
    top = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    return f"---\n{top}---\n\n{rest.lstrip()}"


def _split(before: str) -> tuple[dict[str, Any], str]:
    """Return the header of an existing card and the text after it; a header that is not YAML counts as text."""
    if found := _HEADER.match(before):
        try:
            header = yaml.safe_load(found[1])
        except yaml.YAMLError:
            header = None
        if isinstance(header, dict):
            return dict(header), before[found.end() :]
    return {}, before


def _header(manifest: Manifest, wishes: Wishes) -> dict[str, Any]:
    samples = _samples(manifest)
    size = next((name for most, name in (*_SIZES, *_LARGER) if samples < most), "n>1B")
    header: dict[str, Any] = {"pretty_name": wishes.name}
    if manifest.licenses:
        names = list(dict.fromkeys(map(_hub_license, manifest.licenses)))
        header["license"] = names[0] if len(names) == 1 else names
    return header | {
        "task_categories": ["text-to-image", "image-to-text"],
        "size_categories": [size],
        "tags": ["webdataset", "image", "text", "capstan"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "shards/*.tar"}]}],
    }


def _hub_license(expression: str) -> str:
    name = _RENAMED.get(expression, expression.lower())
    return name if _HUB.match(name) or name == "unknown" else "other"


def _samples(manifest: Manifest) -> int:
    return sum(entry.samples for entry in manifest.shards)


def _body(manifest: Manifest, wishes: Wishes, layers: Mapping[str, Sequence[str]]) -> list[str]:
    size = sum(entry.bytes for entry in manifest.shards)
    about = f"{_samples(manifest):,} captioned images in {len(manifest.shards):,} WebDataset shards ({_bytes(size)})."
    lines = [f"# {_text(wishes.name)}", "", f"{about} Built with Capstan.", ""]
    lines += ["## Read it", "", *_usage(wishes), ""]
    lines += ["## What is kept", "", *_funnel(manifest), ""]
    lines += ["## Where it comes from", "", *_provenance(manifest, wishes), ""]
    lines += ["## Licences", "", *_licenses(manifest), ""]
    lines += ["## Captions", "", *_captions(manifest, layers), ""]
    lines += ["## Ask for removal", "", *_removal(wishes)]
    return lines


def _usage(wishes: Wishes) -> list[str]:
    where = f'"{wishes.url.rpartition("/datasets/")[2]}"' if "/datasets/" in wishes.url else '"webdataset"'
    files = "" if "/datasets/" in wishes.url else ', data_files="shards/*.tar"'
    return [
        "```python",
        "from datasets import load_dataset",
        f'samples = load_dataset({where}{files}, split="train", streaming=True)',
        "```",
        "",
        "A sample is KEY.jpg, KEY.txt (the caption) and KEY.json. `shards/*.parquet` has the same facts as tables, "
        "`dataset.json` the SHA-256 of every file, `croissant.json` a description for tools.",
    ]


def _funnel(manifest: Manifest) -> list[str]:
    conditions = {str(step.get("name")): _rule(step) for step in manifest.recipe.get("select") or []}
    rows = [
        [_text(step["step"]), _code(conditions.get(step["step"], "")), f"{step['left']:,}", f"{step['lost']:,}"]
        for step in manifest.funnel
        if step["lost"] or step["step"] in conditions or step["step"] in ("rows", "fetched and decoded")
    ]
    return _table(["step", "condition", "rows left", "rows dropped"], rows)


def _rule(step: Mapping[str, Any]) -> str:
    """Return a selection step in one line."""
    keys = ("where", "at_most", "balance", "top", "review", "per", "by")
    stated = {key: step.get(key) for key in keys if step.get(key) is not None}
    if set(stated) == {"where"}:
        return str(stated["where"])
    return ", ".join(f"{key}: {value}" for key, value in stated.items())


def _provenance(manifest: Manifest, wishes: Wishes) -> list[str]:
    recipe = manifest.recipe
    source, image, fetch = (recipe.get(name) or {} for name in ("source", "image", "fetch"))
    path = source.get("path") or []
    listed = path if isinstance(path, list) else [path]
    facts = [["source", ", ".join(_code(str(name)) for name in listed[:20]) or _text(str(source.get("format", "")))]]
    if wishes.fetched:
        honoured = "robots.txt and opt-outs of sites honoured" if fetch.get("robots") else "robots.txt not read"
        facts.append(["images", f"fetched from the URL of each row; {honoured}"])
    else:
        facts.append(["images", "part of the source"])
    if image:
        facts.append(["stored as", _text(f"JPEG, {image.get('resize')}, at most {image.get('size')} pixels, sRGB")])
    scores = [_code(name) for name, value in (recipe.get("score") or {}).items() if value is not None]
    if scores:
        facts.append(["scored by", ", ".join(scores)])
    facts.append(["recipe", f"in `dataset.json`, hash {_code(manifest.recipe_hash)}"])
    return _table(["", ""], facts)


def _licenses(manifest: Manifest) -> list[str]:
    if not manifest.licenses:
        return ["The source does not say under which licences the images may be used."]
    rows = [[_code(name), f"{count:,}"] for name, count in list(manifest.licenses.items())[:_LICENSES]]
    about = "What the source says, as SPDX license expressions; nobody has checked it."
    if (left := len(manifest.licenses) - len(rows)) > 0:
        about += f" {left:,} rarer ones are in `dataset.json`."
    return [about, "", *_table(["licence", "images"], rows)]


def _captions(manifest: Manifest, layers: Mapping[str, Sequence[str]]) -> list[str]:
    lines = ["The caption in KEY.txt is the source's own."]
    if exported := manifest.recipe.get("captions"):
        about = "The caption in KEY.txt is of the caption layer"
        lines = [f"{about} {_code(str(exported.get('layer')))}, slot {_code(str(exported.get('slot')))}."]
    if layers:
        rows = [[_code(f"captions/{name}"), ", ".join(map(_code, slots))] for name, slots in layers.items()]
        lines += ["", "More captions, by key and slot:", "", *_table(["layer", "slots"], rows)]
    return lines


def _removal(wishes: Wishes) -> list[str]:
    whom = _contact(wishes.contact)
    if not whom and wishes.url:
        whom = f"{wishes.url}/discussions"
    if not whom:
        return ["Ask whoever gave you this copy. Name the images by their key, URL or SHA-256."]
    return [f"Write to {whom}. Name the images by their key, URL or SHA-256; `shards/*.parquet` has all three."]


def _contact(text: str) -> str:
    """Return whom to ask, with a URL or an e-mail address as a link."""
    plain = text.strip()
    link = re.fullmatch(r"https?://[^\s<>]+|[^\s<>@]+@[^\s<>@]+", plain)
    return f"<{plain}>" if link else _text(plain)


# Markdown ------------------------------------------------------------------------------------------------------------


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _text(text: str) -> str:
    """Return a user's text for one line of Markdown, where it is neither markup nor HTML."""
    plain = printable(" ".join(text.split()))[:_LONGEST]
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", plain)


def _code(text: str) -> str:
    """Return a user's text as code in a table's cell."""
    plain = printable(" ".join(text.split()))[:_LONGEST].replace("`", "'").replace("|", "\\|")
    return f"`{plain}`" if plain else ""


def _bytes(size: int) -> str:
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= limit:
            return f"{size / limit:.3g} {unit}"
    return f"{size} B"
