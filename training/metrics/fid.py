"""Fréchet inception distance between drawn and true images (Heusel et al. 2017, TTUR, eq. 6), by torchmetrics.

    ‖μ − μ'‖² + Tr(Σ + Σ' − 2 (Σ Σ')^½)      of the means and covariances of a network's features

Figures compare only where network and number of images are the same. Every worker adds up its share; the sums meet.
"""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch

from capstan.pipeline.errors import MissingExtra, RecipeError
from capstan.training.config.monitoring import Fid
from capstan.training.metrics.metric import Metric, Total
from capstan.training.metrics.samples import EvalSet

_SUMS: Final = ("features_sum", "features_cov_sum", "features_num_samples")
_WEIGHTS: Final = "weights-inception-2015-12-05-6726825d.pth, which torch-fidelity's authors publish"


class FrechetDistance(Metric):
    """The true images' sums are kept from one evaluation to the next."""

    knows_prompts: ClassVar[bool] = False

    def __init__(self, settings: Fid, field: str) -> None:
        self.file, self.field = Path(settings.features), f"{field}.features"
        self.metric: Any = None
        self.true: dict[str, torch.Tensor] = {}  # sums over all workers, once they are known

    def check(self, subjects: EvalSet) -> None:
        if not self.file.is_file():
            raise RecipeError(self.field, f"{self.file} is not on this machine", f"bring {_WEIGHTS}, and name the file")
        try:
            import torch_fidelity  # noqa: F401
            import torchmetrics  # noqa: F401
        except ModuleNotFoundError as error:
            raise MissingExtra(self.field, str(error.name), "fid") from None

    @contextlib.contextmanager
    def ready(self, device: torch.device) -> Iterator[None]:
        from torchmetrics.image.fid import FrechetInceptionDistance

        try:
            if self.file.suffix == ".pt":
                metric = FrechetInceptionDistance(_Script(self.file), sync_on_compute=False)
            else:
                metric = FrechetInceptionDistance(feature_extractor_weights_path=str(self.file), sync_on_compute=False)
        except (RuntimeError, KeyError, ValueError, OSError, EOFError, pickle.UnpicklingError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            problem = f"{self.file} holds no network that images can be given ({first})"
            raise RecipeError(self.field, problem, f"name {_WEIGHTS}, or a TorchScript file (.pt)") from None
        self.metric = metric.to(device)
        try:
            yield
        finally:
            self.metric = None

    def add(self, subjects: EvalSet, numbers: Sequence[int], images: np.ndarray) -> None:
        self._update(images, real=False)
        if not self.true:
            self._update(subjects.images(numbers, images.shape[1]), real=True)

    def _update(self, images: np.ndarray, real: bool) -> None:
        tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        with torch.no_grad():
            self.metric.update(tensor.to(self.metric.device), real=real)

    def result(self, total: Total) -> dict[str, float]:
        self.true = self.true or self._totals("real", total)
        for kind, sums in (("real", self.true), ("fake", self._totals("fake", total))):
            for name, tensor in sums.items():
                setattr(self.metric, f"{kind}_{name}", tensor)
        self.metric.orig_dtype = torch.float64  # which a worker that drew nothing does not know
        return {"fid": float(self.metric.compute())}

    def _totals(self, kind: str, total: Total) -> dict[str, torch.Tensor]:
        return {name: total(getattr(self.metric, f"{kind}_{name}").cpu()) for name in _SUMS}


class _Script(torch.nn.Module):
    """A TorchScript network of uint8 images [N, 3, H, W] → features [N, F].

    NVIDIA's inception-2015-12-05.pt, which clean-fid and StyleGAN use, gives them where `return_features` is asked for.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        with warnings.catch_warnings():  # torch would rather have another format; these files are of this one
            warnings.simplefilter("ignore")
            self.network = torch.jit.load(str(file), map_location="cpu").eval()
        named = [argument.name for argument in self.network.forward.schema.arguments]
        self.asked = {"return_features": True} if "return_features" in named else {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.network(images, **self.asked)
        return features.flatten(1)
