"""Small heads over a CLIP's image embeddings: aesthetic, nsfw, watermark.

A file holds the state dict of linear layers, whatever the names before `.weight` and `.bias`, in the order of their
numbers. LAION's aesthetic predictors are one layer ("weight", "bias") or five ("layers.0.weight", "layers.2.weight",
…) with nothing but dropout between them; its NSFW detectors have ReLU between them. A single output is the score; of
two outputs the score is the second's softmax.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from capstan.pipeline.config import HeadScore
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.score.clip_model import ClipModel
from capstan.pipeline.score.scorer import Embedded, EmbeddingScorer, Values


class Head(EmbeddingScorer):
    """A head: linear layers. `activation` and `output` are the defaults that the recipe can override."""

    activation: ClassVar[str]
    output: ClassVar[str]

    def __init__(self, config: HeadScore, clip_model: ClipModel) -> None:
        self.clip_model, self._file, self._normalize = clip_model, Path(config.weights).absolute(), config.normalize
        self._activation, self._output = config.activation or self.activation, config.output or self.output

    @property
    def column(self) -> str:
        return f"{self.name}_score"

    def settings(self) -> dict[str, Any]:
        return {"activation": self._activation, "output": self._output, "normalize": self._normalize}

    def weights(self) -> dict[str, Path]:
        return {f"score.{self.name}.weights": self._file}

    def layers(self) -> list[tuple[Any, Any]]:
        """Return (weight, bias) of each layer, on the CPU. Raises RecipeError if they are not a head for this CLIP."""
        tensors = _read(self._file, f"score.{self.name}.weights")
        names = sorted((name.removesuffix("weight") for name in tensors if name.endswith("weight")), key=_natural)
        layers = [(tensors[f"{name}weight"].float(), tensors.get(f"{name}bias")) for name in names]
        self._check(layers)
        return layers

    def setup(self, device: str) -> None:
        import torch

        layers = self.layers()
        self._layers = [(w.to(device), None if b is None else b.float().to(device)) for w, b in layers]
        self._between = {"none": lambda x: x, "relu": torch.relu, "gelu": torch.nn.functional.gelu}[self._activation]

    def _check(self, layers: list[Any]) -> None:
        sizes = [self.clip_model.dim] + [weight.shape[0] for weight, _ in layers if weight.ndim == 2]
        fits = len(sizes) == len(layers) + 1 and all(w.shape[1] == n for (w, _), n in zip(layers, sizes, strict=False))
        if not layers or not fits or sizes[-1] not in (1, 2):
            shapes = " → ".join("×".join(map(str, weight.shape)) for weight, _ in layers) or "no weights"
            problem = f"{self._file.name} holds {shapes}, not linear layers from {self.clip_model.dim} to 1 or 2"
            hint = "use a head that was trained on this CLIP, or set its CLIP in `model` and `pretrained`"
            raise RecipeError(f"score.{self.name}.weights", problem, hint)

    def score(self, batch: Embedded) -> dict[str, Values]:
        import torch

        with torch.inference_mode():
            x = batch.images if self._normalize else batch.raw_images
            for number, (weight, bias) in enumerate(self._layers):
                x = torch.nn.functional.linear(self._between(x) if number else x, weight, bias)
            if x.shape[1] == 2:
                x = x.softmax(-1)[:, 1:]
            elif self._output == "sigmoid":
                x = x.sigmoid()
            return {self.column: x[:, 0].cpu().numpy()}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_layers", "_between")}


class Aesthetic(Head):
    name: ClassVar[str] = "aesthetic"
    activation: ClassVar[str] = "none"
    output: ClassVar[str] = "linear"
    columns: ClassVar[list[pa.Field]] = [pa.field("aesthetic_score", pa.float32())]  # LAION's: about 1 … 10


class Nsfw(Head):
    name: ClassVar[str] = "nsfw"
    activation: ClassVar[str] = "relu"
    output: ClassVar[str] = "linear"  # LAION's were trained to output 0 … 1 directly
    columns: ClassVar[list[pa.Field]] = [pa.field("nsfw_score", pa.float32())]


class Watermark(Head):
    name: ClassVar[str] = "watermark"
    activation: ClassVar[str] = "relu"
    output: ClassVar[str] = "sigmoid"
    columns: ClassVar[list[pa.Field]] = [pa.field("watermark_score", pa.float32())]


def _read(file: Path, field: str) -> dict[str, Any]:
    """Read a state dict (name → tensor) on the CPU; nothing in the file is executed."""
    import torch
    from safetensors.torch import load_file

    try:
        found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except FileNotFoundError:
        raise RecipeError(
            field, f"{file} is not on this machine", "copy it to a place that all machines can read"
        ) from None
    except Exception as error:  # noqa: BLE001 - torch and safetensors raise different errors for a wrong file
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = "use a file of tensors: .safetensors, or a state dict written by torch.save"
        raise RecipeError(field, f"cannot load {file} ({first})", hint) from None
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise RecipeError(field, f"{file} is not a state dict", "save model.state_dict(), not the model")
    return found


def _natural(name: str) -> list[Any]:
    """Return a sort key that puts layers.10. after layers.2."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
