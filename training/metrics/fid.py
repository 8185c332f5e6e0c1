"""Fréchet distance of generated and true images (FID, by torchmetrics), clips or sounds.

    ‖μ − μ'‖² + Tr(Σ + Σ' − 2 (Σ Σ')^½)      of the means and covariances of a network's features

(Heusel et al. 2017, TTUR, eq. 6.) Values are comparable only for the same network and the same number of images. Each
worker sums its share of the images; the sums are added over the workers.
"""

from __future__ import annotations

import contextlib
import pickle
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from capstan.pipeline.errors import MissingExtra, RecipeError
from capstan.pipeline.score import open_nsfw
from capstan.pipeline.score.descriptors import OPEN_NSFW
from capstan.training.config.monitoring import Fid
from capstan.training.data.sounds import Form
from capstan.training.drawing.drawer import Drawn, Kind
from capstan.training.metrics.metric import Metric, Total, random_state_kept
from capstan.training.metrics.samples import EvalSet

_UNREADABLE: Final = (RuntimeError, KeyError, ValueError, OSError, EOFError, pickle.UnpicklingError, SafetensorError)
_INCEPTION_FEATURES: Final = 2048
_SUMS: Final = ("features_sum", "features_cov_sum", "features_num_samples")
_WEIGHTS: Final = "weights-inception-2015-12-05-6726825d.pth, which torch-fidelity's authors publish"


class FrechetDistance(Metric):
    """Fréchet distance; the true images' sums are kept from one evaluation to the next."""

    name: ClassVar[str] = "fid"
    uses_prompts: ClassVar[bool] = False

    def __init__(self, settings: Fid, field: str) -> None:
        self.file, self.field, self.trusted = Path(settings.features), f"{field}.features", settings.trust_torchscript
        self.packaged = settings.features == OPEN_NSFW
        if self.packaged:
            self.file = open_nsfw.weights_file(self.field)
        self.section = field.rpartition(".")[0]
        self.metric: Any = None
        self.true: dict[str, torch.Tensor] = {}  # sums over all workers, once computed

    def check(self, eval_set: EvalSet) -> None:
        if not self.file.is_file():
            raise RecipeError(
                self.field, f"{self.file} is not on this machine", f"download {_WEIGHTS}, and set the path"
            )
        self._refuse_untrusted_code()
        try:
            import torch_fidelity  # noqa: F401
            import torchmetrics  # noqa: F401
        except ModuleNotFoundError as error:
            raise MissingExtra(self.field, str(error.name), "fid") from None
        self.refuse_few_images(len(eval_set))

    @contextlib.contextmanager
    def ready(self, device: torch.device) -> Iterator[None]:
        from torchmetrics.image.fid import FrechetInceptionDistance

        self._refuse_untrusted_code()
        try:
            if self.packaged:
                metric = FrechetInceptionDistance(_OpenNsfw(self.field), sync_on_compute=False)
            elif self.file.suffix == ".pt":
                metric = FrechetInceptionDistance(_Script(self.file), sync_on_compute=False)
            else:
                with _without_code(self.file) as weights:
                    metric = FrechetInceptionDistance(
                        feature_extractor_weights_path=str(weights), sync_on_compute=False
                    )
        except (
            RuntimeError,
            KeyError,
            ValueError,
            OSError,
            EOFError,
            pickle.UnpicklingError,
            SafetensorError,
        ) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            problem = f"{self.file} is not a network that takes images ({first})"
            raise RecipeError(self.field, problem, f"use {_WEIGHTS}") from None
        self.metric = metric.to(device)
        try:
            yield
        finally:
            self.metric = None

    def _count_features(self) -> int:
        if self.packaged:
            return open_nsfw.FEATURES
        if self.file.suffix != ".pt":
            return _INCEPTION_FEATURES
        cpu = torch.device("cpu")
        with random_state_kept(cpu), self.ready(cpu):
            return len(self.metric.real_features_sum)

    def refuse_few_images(self, count: int) -> None:
        """Raise RecipeError if there are no more images than features: the covariances are then singular.

        The value would be mostly bias, which falls as 1 / images (Chong & Forsyth 2020, “Effectively unbiased FID”).
        """
        features = self._count_features()
        if count <= features:
            problem = f"{count} images are too few for a Fréchet distance of {features} features"
            hint = f"set count (--count) to more than {features}, better ten times that; or measure kid instead"
            raise RecipeError(f"{self.section}.count", problem, hint)

    def _refuse_untrusted_code(self) -> None:
        if self.file.suffix == ".pt" and not self.trusted:
            problem = f"{self.file} is TorchScript, a program that can read, change and send your files"
            option = f"{self.field.removesuffix('features')}trust_torchscript: true (--trust-torchscript)"
            hint = f"use {_WEIGHTS}, or set {option} if you trust its source"
            raise RecipeError(self.field, problem, hint)

    def add(self, eval_set: EvalSet, numbers: Sequence[int], images: np.ndarray) -> None:
        self._update(images, real=False)
        if not self.true:
            self._update(eval_set.images(numbers, images.shape[1]), real=True)

    def _update(self, images: np.ndarray, real: bool) -> None:
        tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        with torch.no_grad():
            self.metric.update(tensor.to(self.metric.device), real=real)

    def result(self, total: Total) -> dict[str, float]:
        self.true = self.true or self._totals("real", total)
        for kind, sums in (("real", self.true), ("fake", self._totals("fake", total))):
            for name, tensor in sums.items():
                setattr(self.metric, f"{kind}_{name}", tensor)
        self.metric.orig_dtype = torch.float64  # unset on a worker that generated no image
        return {"fid": float(self.metric.compute())}

    def _totals(self, kind: str, total: Total) -> dict[str, torch.Tensor]:
        return {name: total(getattr(self.metric, f"{kind}_{name}").cpu()) for name in _SUMS}


class MediaDistance(Metric):
    """Fréchet distance of clips (FVD, Unterthiner et al. 2019) or sounds (FAD, Kilgour et al. 2019).

    The network is a TorchScript file that the user names: of clips, uint8 [N, 3, frames, H, W], or sounds, float32
    [N, channels, values] → features [N, F]. Of films it judges the clips, and SoundDistance the sounds.
    """

    name: ClassVar[str] = "fid"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"clip", "film", "sound"})
    uses_prompts: ClassVar[bool] = False

    def __init__(self, settings: Fid, field: str) -> None:
        self.file, self.field, self.trusted = Path(settings.features), f"{field}.features", settings.trust_torchscript
        self.section = field.rpartition(".")[0]
        self.drawn: Drawn | None = None  # seen last, for its form
        self.network: _Script | None = None
        self.device = torch.device("cpu")
        self.sums: dict[str, torch.Tensor] = {}
        self.known: dict[str, torch.Tensor] | None = None  # sums over all workers, once computed

    def check(self, eval_set: EvalSet) -> None:
        if not self.file.is_file():
            raise RecipeError(self.field, f"{self.file} is not on this machine", "set a TorchScript file (.pt)")
        if self.file.suffix != ".pt":
            problem = f"{self.file.name} is no TorchScript, and clips and sounds have no network of a known form"
            raise RecipeError(self.field, problem, "set a TorchScript file (.pt), e.g. I3D of FVD")
        if not self.trusted:
            problem = f"{self.file} is TorchScript, a program that can read, change and send your files"
            option = f"{self.field.removesuffix('features')}trust_torchscript: true (--trust-torchscript)"
            raise RecipeError(self.field, problem, f"set {option} if you trust its source")

    @contextlib.contextmanager
    def ready(self, device: torch.device) -> Iterator[None]:
        try:
            self.network = _Script(self.file).to(device)
        except _UNREADABLE as error:
            problem = f"{self.file} is not TorchScript ({(str(error).splitlines() or [''])[0]})"
            raise RecipeError(self.field, problem, "set a TorchScript file (.pt)") from None
        self.device, self.sums = device, {}
        try:
            yield
        finally:
            self.network = None

    def seen(self, drawn: Drawn) -> np.ndarray:
        self.drawn = drawn
        return drawn.arrays

    def of_truth(self, eval_set: EvalSet, numbers: Sequence[int], side: int) -> np.ndarray:
        """Return true clips or sounds, of the form of those seen last."""
        drawn = self.drawn
        assert drawn is not None, "something was seen"
        if drawn.kind == "sound":
            return eval_set.sounds(numbers, Form(drawn.rate or 0, drawn.arrays.shape[2], drawn.arrays.shape[1]))
        return eval_set.clips(numbers, drawn.arrays.shape[1], drawn.fps or 1.0, drawn.arrays.shape[-2])

    def add(self, eval_set: EvalSet, numbers: Sequence[int], images: np.ndarray) -> None:
        self._update("drawn", images, len(eval_set))
        if self.known is None:
            self._update("true", self.of_truth(eval_set, numbers, 0), len(eval_set))

    def _update(self, kind: str, media: np.ndarray, count: int) -> None:
        assert self.network is not None
        order = (0, 2, 1) if media.ndim == _SOUND_DIMS else (0, 4, 1, 2, 3)
        given = torch.from_numpy(np.ascontiguousarray(media.transpose(order))).to(self.device)
        try:
            with torch.no_grad():
                features = self.network(given).double().cpu()
        except RuntimeError as error:
            problem = f"{self.file} does not take {list(given.shape)} ({str(error).strip().splitlines()[-1]})"
            raise RecipeError(self.field, problem, "set a network of clips, or of sounds") from None
        if count <= features.shape[1]:
            problem = f"{count} are too few for a Fréchet distance of {features.shape[1]} features"
            hint = f"set count (--count) to more than {features.shape[1]}, better ten times that"
            raise RecipeError(f"{self.section}.count", problem, hint)
        for name, part in _sums_of(features).items():
            key = f"{kind}_{name}"
            self.sums[key] = self.sums.get(key, torch.zeros_like(part)) + part

    def result(self, total: Total) -> dict[str, float]:
        """Return the distance; every worker has judged something."""
        whole = {name: total(part) for name, part in self.sums.items()}
        drawn, true = (
            {name.partition("_")[2]: part for name, part in whole.items() if name.startswith(kind)}
            for kind in ("drawn", "true")
        )
        self.known = self.known or true
        return {self.name: frechet(*(_moments(sums) for sums in (drawn, self.known)))}


class SoundDistance(MediaDistance):
    """Fréchet distance of sounds (FAD, Kilgour et al. 2019): of films those that they have, or of sounds alone."""

    name: ClassVar[str] = "fad"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"film", "sound"})

    def seen(self, drawn: Drawn) -> np.ndarray:
        if drawn.sounds is not None:
            drawn = Drawn("sound", drawn.sounds, rate=drawn.rate)
        return super().seen(drawn)


_SOUND_DIMS: Final = 3  # of sounds [N, values, channels]
Moments = tuple[torch.Tensor, torch.Tensor]  # mean [F], covariance [F, F]


def _sums_of(features: torch.Tensor) -> dict[str, torch.Tensor]:
    count = torch.tensor(float(len(features)), dtype=torch.float64)
    return {"count": count, "sum": features.sum(0), "products": features.T @ features}


def _moments(sums: dict[str, torch.Tensor]) -> Moments:
    mean = sums["sum"] / sums["count"]
    return mean, (sums["products"] - sums["count"] * torch.outer(mean, mean)) / (sums["count"] - 1)


def frechet(one: Moments, other: Moments) -> float:
    """Return the Fréchet distance of two normal distributions (Heusel et al. 2017, eq. 6)."""
    (mean, covariance), (mean_too, covariance_too) = one, other
    root = torch.linalg.eigvals(covariance @ covariance_too).sqrt().real.sum()
    return float((mean - mean_too).square().sum() + covariance.trace() + covariance_too.trace() - 2 * root)


@contextlib.contextmanager
def _without_code(file: Path) -> Iterator[Path]:
    """Yield a copy of a weights file (.pth or .safetensors) that holds tensors only.

    torch-fidelity unpickles its file, which runs whatever program a .pth holds. Raises UnpicklingError for such a file.
    """
    if file.suffix == ".safetensors":
        weights = load_file(file)
    else:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "weights.pth"
        torch.save(weights, copy)
        yield copy


class _OpenNsfw(torch.nn.Module):
    """open_nsfw's features of uint8 images [N, 3, H, W] → [N, 1024]; it runs on the CPU."""

    def __init__(self, field: str) -> None:
        super().__init__()
        self.network = open_nsfw.features(field)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.permute(0, 2, 3, 1).to("cpu", torch.uint8).contiguous().numpy()
        rows = [self.network.run(open_nsfw.prepared(image)) for image in pixels]
        return torch.from_numpy(np.stack(rows)).to(images.device)


class _Script(torch.nn.Module):
    """A TorchScript network of uint8 images [N, 3, H, W] → features [N, F]; or of clips or sounds.

    NVIDIA's inception-2015-12-05.pt, used by clean-fid and StyleGAN, returns them if `return_features` is set. So does
    StyleGAN-V's I3D of clips, whose option to scale them is set.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        with warnings.catch_warnings():  # torch warns that TorchScript is deprecated
            warnings.simplefilter("ignore")
            self.network = torch.jit.load(str(file), map_location="cpu").eval()
        arguments = [argument.name for argument in self.network.forward.schema.arguments]
        self.options = {name: True for name in ("return_features", "rescale", "resize") if name in arguments}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.network(images, **self.options)
        return features.flatten(1)
