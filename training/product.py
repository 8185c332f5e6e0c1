"""A path or URL from the user → the finished model there, and its kind

A run folder holds its model in product/. The product folder itself, or a folder of the same format from another tool,
is accepted as well.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.config import scratch_folder
from capstan.training.config.families import FAMILIES, family_class
from capstan.training.run import download

if TYPE_CHECKING:
    from capstan.training.family import Family

FACTS: Final = "capstan.json"  # facts about a product that its library's own format does not hold
_SIGNS: Final = ("model_index.json", "config.json", "open_clip_config.json", FACTS)  # every product has one of them
# diffusers' class → the family that trains it; pipelines that are not named here are the family diffusion's
_KINDS: Final = {
    "AutoencoderKL": "autoencoder",
    "VQModel": "vqgan",
    "AutoencoderOobleck": "oobleck",
    "StableAudioPipeline": "audio",
    "DDPMPipeline": "ddpm",
    "TextToPixelsPipeline": "ddpm",
    "IFPipeline": "imagen",
    "AnimateDiffPipeline": "video",
    "StableVideoDiffusionPipeline": "svd",
    "AutoencoderKLCogVideoX": "video_autoencoder",
    "CogVideoXPipeline": "cogvideox",
}


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
    """Return the name of the family that a product is of (`package.module:Class` for your own); "" if unknown."""
    facts = read_facts(product)
    if "family" in facts:
        return str(facts["family"])
    if (product / "model_index.json").is_file():
        return _KINDS.get(_class_in(product / "model_index.json"), "diffusion")
    if (product / "config.json").is_file():
        return _KINDS.get(_class_in(product / "config.json"), "")
    return "captioner" if (product / "open_clip_config.json").is_file() else ""


def _class_in(config: Path) -> str:
    return str(json.loads(config.read_text(encoding="utf-8")).get("_class_name", ""))


def family_of(product: Path) -> type[Family] | None:
    """Return the family that a product is of, or None if its format is unknown. Raises RecipeError.

    A product may be a stranger's, so it can name a family that is installed here, but none that lies beside it.
    """
    from capstan.training.family import Family

    name = kind_of(product)
    if name in FAMILIES:
        return family_class(name)  # type: ignore[no-any-return]
    module, colon, _ = name.partition(":")
    if not colon:
        return None
    _refuse_beside(product, module)
    found = family_class(name, "RUN")
    if not (isinstance(found, type) and issubclass(found, Family)):
        raise RecipeError("RUN", f"{name}, named in {product / FACTS}, is not a model family", "name another run")
    return found


def _refuse_beside(product: Path, module: str) -> None:
    """Raise RecipeError if the module's top-level package lies in the product's folder or its run's."""
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])
    except ValueError:
        spec = None
    places = [] if spec is None else [*(spec.submodule_search_locations or []), spec.origin or ""]
    run = (product.parent if product.name == "product" else product).resolve()
    if any(Path(place).resolve().is_relative_to(run) for place in places if place):
        problem = f"{product / FACTS} names code that lies in {run}, and a model's folder must not choose what runs"
        raise RecipeError("RUN", problem, f"install {module}, or put it elsewhere on PYTHONPATH, if you trust it")


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


def name_family(product: Path, model: str) -> None:
    """Note in a product which family outside Capstan it is of (`package.module:Class`); its own are known by name."""
    if ":" in model:
        write_facts(product, **read_facts(product) | {"family": model})


def write_facts(product: Path, **facts: Any) -> None:
    """Write facts for sampling and evaluation next to the model."""
    (product / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
