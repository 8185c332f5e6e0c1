"""A path or URL from the user → the finished model there, and its kind

A run folder holds its model in product/. The product folder itself, or a folder of the same format from another tool,
is accepted as well.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any, Final

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.config import scratch_folder
from capstan.training.run import download

FACTS: Final = "capstan.json"  # facts about a product that its library's own format does not hold
_SIGNS: Final = ("model_index.json", "config.json", "open_clip_config.json", FACTS)  # every product has one of them
_KINDS: Final = {"AutoencoderKL": "autoencoder", "VQModel": "vqgan"}  # diffusers' class → the family that trains it


def find_product(path: str | Path, field: str = "RUN") -> Path:
    """Return the folder of the finished model at `path`, which may be a URL. Raises RecipeError if there is none."""
    folder = download_run(str(path), field) if "://" in str(path) else Path(path)
    for candidate in (folder / "product", folder):
        if any((candidate / name).is_file() for name in _SIGNS):
            return candidate
    if (folder / "recipe.json").exists() or (folder / "log.jsonl").exists():
        raise RecipeError(field, f"{folder} has no finished model yet", "run `capstan train` to the end first")
    raise RecipeError(field, f"no model at {folder}", "name a run folder, or a model folder")


def download_run(url: str, field: str = "RUN") -> Path:
    """Download the product and recipe of a finished run, unless this machine has them; return the local folder."""
    storage, folder = Storage(url, field=field), scratch_folder(url)
    storage.check_reachable()
    if not storage.exists("finished.json"):
        raise RecipeError(field, f"{url} has no finished model", "name the train.run or train.checkpoint.upload of one")
    mark, known = storage.read("finished.json"), folder / "fetched.json"  # identifies the run that was downloaded
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "fetching").open("w") as lock:  # several workers may download at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if known.exists() and known.read_bytes() == mark:
            return folder
        partial = folder / ".partial-product"
        shutil.rmtree(partial, ignore_errors=True)
        download(storage, "product", storage.names("product"), partial)
        (folder / "recipe.json").write_bytes(storage.read("recipe.json"))
        shutil.rmtree(folder / "product", ignore_errors=True)
        partial.rename(folder / "product")
        known.write_bytes(mark)
    return folder


def kind_of(product: Path) -> str:
    """Return `diffusion`, `autoencoder`, `vqgan`, `captioner` or another family's name; "" if the format is unknown."""
    facts = read_facts(product)
    if "family" in facts:
        return str(facts["family"])
    if (product / "model_index.json").is_file():
        return "diffusion"
    if (product / "config.json").is_file():
        config = json.loads((product / "config.json").read_text(encoding="utf-8"))
        return _KINDS.get(config.get("_class_name"), "")
    return "captioner" if (product / "open_clip_config.json").is_file() else ""


def quieten() -> None:
    """Turn off the progress bars of diffusers and transformers."""
    from diffusers.utils.logging import disable_progress_bar as disable_in_diffusers
    from transformers.utils.logging import disable_progress_bar as disable_in_transformers

    disable_in_diffusers()
    disable_in_transformers()


def read_facts(product: Path) -> dict[str, Any]:
    """Return what `write_facts` wrote; empty for a model from another tool."""
    path = product / FACTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_facts(product: Path, **facts: Any) -> None:
    """Write facts for sampling and evaluation next to the model."""
    (product / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
