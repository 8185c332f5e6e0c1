"""A model that no library has → a folder that transformers opens without Capstan

    config.json             the model's settings, and `auto_map`, which names its classes
    model.safetensors       its weights
    modeling_<family>.py    its code, copied from the family's folder

    AutoModel.from_pretrained(DIR, trust_remote_code=True)

Such a family writes its model in one file, as a `PreTrainedModel` with its `PretrainedConfig`, which imports nothing of
Capstan. Products have no code in them, and are opened with Capstan's own: a stranger's run must not choose what runs.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from capstan.pipeline.errors import RecipeError
from capstan.training.drawing.drawer import refuse_options
from capstan.training.product import find_product, quieten

Model = TypeVar("Model", bound=torch.nn.Module)

_PRECISIONS: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_own(model_class: type[Model], path: str | Path, field: str) -> Model:
    """Load a model of `model_class` from a run, a product or an export, in fp32, in evaluation mode.

    Raises RecipeError naming `field` if there is none, or if one of its weights is missing or of another shape.
    """
    quieten()
    folder, kind = find_product(path, field), model_class.__name__
    loader: Any = model_class
    try:
        model, found = loader.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise RecipeError(field, f"{folder} is not a {kind} ({error})", f"set a folder with a {kind}") from None
    wrong = [*found["missing_keys"], *found["unexpected_keys"], *(key for key, *_ in found["mismatched_keys"])]
    if wrong:
        problem = f"{folder} is not a {kind} of its config.json: {wrong[0]} is missing, unknown or of another shape"
        raise RecipeError(field, problem, f"set a folder with a {kind}")
    return model.eval()  # type: ignore[no-any-return]


def export_own(
    model_class: type[torch.nn.Module], product: Path, folder: Path, *, precision: str, sampler: str | None
) -> str:
    """Write the model of `product` and its code into `folder`; return its kind. Raises RecipeError for a sampler."""
    refuse_options({"sampler": sampler})
    model: Any = load_own(model_class, product, "RUN")
    model.to(_PRECISIONS[precision]).save_pretrained(folder)
    code = Path(str(sys.modules[model_class.__module__].__file__))
    shutil.copyfile(code, folder / code.name)
    config = folder / "config.json"
    names = {"AutoConfig": type(model.config).__name__, "AutoModel": model_class.__name__}
    content = json.loads(config.read_text(encoding="utf-8"))
    content["auto_map"] = {auto: f"{code.stem}.{name}" for auto, name in names.items()}
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return model_class.__name__
