"""A CLIP model by name or folder: images and captions → embeddings.

One loaded model is shared by all scorers that use it. `model` is an open_clip name, or a folder with
open_clip_config.json as open_clip's `local-dir:` and `capstan train` write it. `pretrained` is a checkpoint file or one
of open_clip's tags. Files are loaded as data only: safetensors, or pickles that hold nothing but tensors.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from capstan.pipeline.config import fingerprint
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.preprocess import Preprocessing, fit
from capstan.pipeline.score.scorer import sha256_of_file

CONFIG_FILE: Final = "open_clip_config.json"
BPE_FILE: Final = "bpe.txt.gz"  # the merges of a folder's own vocabulary
_WEIGHTS: Final = (  # in the order in which open_clip prefers them
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
)
FILE_SUFFIXES: Final = (".pt", ".pth", ".bin", ".safetensors", ".npz", ".ckpt")
_VERSION: Final = 1  # of the arithmetic in this file
PART: Final = 16  # images or captions that one thread encodes together


class ClipModel:
    """A CLIP's settings, light to pickle. `section` is the recipe section that errors name."""

    def __init__(self, model: str, pretrained: str | None, precision: str, section: str) -> None:
        self.model, self.precision, self.section = model, precision, section
        folder = Path(model).absolute()
        self.folder = folder if (folder / CONFIG_FILE).is_file() else None
        if self.folder is not None:
            self.file = self._file_in(self.folder, pretrained)
            config = self._read(self.folder / CONFIG_FILE)
            architecture, preprocess = config.get("model_cfg"), config.get("preprocess_cfg", {})
            if not isinstance(architecture, dict):
                raise RecipeError(f"{section}.model", f"{self.folder / CONFIG_FILE} has no model_cfg", _ANOTHER)
        else:
            architecture = self._by_name()
            self.file, preprocess = self._pretrained(pretrained, architecture)
        self.architecture: dict[str, Any] = architecture
        try:
            size = preprocess.get("size") or architecture["vision_cfg"].get("image_size", 224)
            self.preprocessing = Preprocessing.of(size, preprocess)
        except (KeyError, ValueError) as error:
            raise RecipeError(f"{section}.model", str(error), _ANOTHER) from None

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that can change an embedding. Reads the weights."""
        return {
            "version": _VERSION,
            "model": self.model if self.folder is None else self.folder.name,
            "weights": sha256_of_file(self.file, f"{self.section}.pretrained"),
            "architecture": self.architecture,
            "vocabulary": sha256_of_file(self._bpe, self.section) if self._bpe else None,
            "preprocessing": {**vars(self.preprocessing)},
            "precision": self.precision,
        }

    @functools.cached_property
    def id(self) -> str:
        return fingerprint(self.identity)

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return int(self.architecture["embed_dim"])

    @property
    def _bpe(self) -> Path | None:
        own = self.folder / BPE_FILE if self.folder else None
        return own if own and own.is_file() else None

    def prepare(self, rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Fit pixels of any size to the model's input, [height, width, 3]; runs on a CPU worker, without torch."""
        return np.asarray(fit(Image.fromarray(rgb), self.preprocessing))

    # Where its files are ---------------------------------------------------------------------------------------------

    def _by_name(self) -> dict[str, Any]:
        """Return an open_clip model's architecture from the package's files: importing open_clip takes seconds."""
        spec = importlib.util.find_spec("open_clip")
        assert spec is not None
        (package,) = spec.submodule_search_locations or []
        known = {path.stem: path for path in (Path(package) / "model_configs").glob("*.json")}
        if (name := self.model.replace("/", "-")) not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else f"use a folder with {CONFIG_FILE}, or e.g. ViT-B-32"
            )
            raise RecipeError(
                f"{self.section}.model", f"{self.model!r} is neither a folder nor an open_clip model", hint
            )
        return self._read(known[name])

    def _read(self, file: Path) -> dict[str, Any]:
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise RecipeError(f"{self.section}.model", f"cannot read {file} ({error})", _ANOTHER) from None

    def _file_in(self, folder: Path, pretrained: str | None) -> Path:
        if pretrained is not None:
            return Path(pretrained).absolute()
        return next((path for path in map(folder.joinpath, _WEIGHTS) if path.is_file()), folder / _WEIGHTS[0])

    def _pretrained(self, pretrained: str | None, architecture: Mapping[str, Any]) -> tuple[Path, Mapping[str, Any]]:
        """Return (weights, preprocessing) of an open_clip model: a file, or a tag that open_clip downloads."""
        field = f"{self.section}.pretrained"
        if pretrained is not None and (Path(pretrained).is_file() or pretrained.endswith(FILE_SUFFIXES)):
            return Path(pretrained).absolute(), {}
        import open_clip

        tags = open_clip.list_pretrained_tags_by_model(self.model)
        if pretrained not in tags:
            problem = (
                "is missing" if pretrained is None else f"{pretrained!r} is neither a file nor a tag of {self.model}"
            )
            near = difflib.get_close_matches(pretrained or "", tags, n=3) or tags
            raise RecipeError(field, problem, f"use a checkpoint file, or one of the tags {', '.join(near)}")
        config = open_clip.get_pretrained_cfg(self.model, pretrained)
        if (quick := architecture.get("quick_gelu", False)) != config.get("quick_gelu", False):
            # open_clip only warns, and computes other features than the weights were trained for.
            other = self.model.removesuffix("-quickgelu") if quick else f"{self.model}-quickgelu"
            problem = f"{pretrained} was trained with a different activation than {self.model} has"
            raise RecipeError(field, problem, f"set the model to {other}")
        try:
            return Path(open_clip.download_pretrained(config)), config
        except Exception as error:  # noqa: BLE001 - hubs and their clients have errors of every kind
            hub = config.get("hf_hub", "").rstrip("/")
            wanted = f"{_WEIGHTS[0]} of {hub}" if hub else config.get("url")
            problem = f"cannot download the weights {pretrained!r} ({' '.join(str(error).split())[:200]})"
            raise RecipeError(field, problem, f"copy {wanted} to this machine and set its path here") from None

    def load(self, device: str, threads: int = 1) -> Loaded:
        return Loaded(self, device, threads)


_ANOTHER: Final = "use another model"


class Loaded:
    """A CLIP on a device, ready to embed; on a CPU it uses the given number of threads and none of torch's own."""

    def __init__(self, clip_model: ClipModel, device: str, threads: int) -> None:
        import torch

        torch.set_num_threads(1)

        if clip_model.precision == "fp16" and not device.startswith("cuda"):
            raise RecipeError(f"{clip_model.section}.precision", "fp16 needs a GPU", "use bf16 or fp32")
        self.device, self._how = torch.device(device), clip_model.preprocessing
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[clip_model.precision]
        on_cpu = self.device.type == "cpu"
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="clip") if on_cpu else None
        self._model, self._tokenize = load_model(clip_model, device), _tokenizer(clip_model)
        self._mean, self._std = (
            torch.tensor(values, device=self.device)[:, None, None] for values in (self._how.mean, self._how.std)
        )

    def images(self, pixels: npt.NDArray[np.uint8]) -> Any:
        """Embed uint8 [batch, height, width, 3] as a float32 tensor [batch, dim], not normalised."""
        import torch

        def encode(x: Any) -> Any:
            x = ((x.permute(0, 3, 1, 2).float() / 255 - self._mean) / self._std).to(self.dtype)
            return self._model.encode_image(x)

        return self._encode(encode, torch.from_numpy(pixels))

    @staticmethod
    def normalize(vectors: Any) -> Any:
        import torch

        return torch.nn.functional.normalize(vectors, dim=-1)

    def tokens(self, captions: Sequence[str]) -> Any:
        """Tokenize captions to ids [batch, context]; longer ones are truncated."""
        return self._tokenize(list(captions))

    def texts(self, captions: Sequence[str]) -> Any:
        """Embed captions as a float32 tensor [batch, dim], not normalised."""
        return self._encode(self._model.encode_text, self.tokens(captions))

    def _encode(self, encode: Callable[[Any], Any], batch: Any) -> Any:
        """Encode a batch; on a CPU in parts of one size, one thread each, so that results do not depend on threads."""
        import torch

        def one(part: Any) -> Any:
            with torch.inference_mode():  # applies to one thread only
                return encode(part.to(self.device)).float()

        if self._threads is None:
            return one(batch)
        missing = -len(batch) % PART
        padded = torch.cat([batch, batch[:1].expand(missing, *batch.shape[1:])]) if missing else batch
        return torch.cat(list(self._threads.map(one, padded.split(PART))))[: len(batch)]


def load_model(clip_model: ClipModel, device: str) -> Any:
    """Load the model with its weights. Raises RecipeError if they do not fit, or are not a checkpoint."""
    import open_clip
    import torch

    name = f"local-dir:{clip_model.folder}" if clip_model.folder else clip_model.model
    try:
        model = open_clip.create_model(
            name, precision=clip_model.precision, device=device, load_weights=False, pretrained_text=False
        )
        open_clip.load_checkpoint(model, str(clip_model.file))
    except FileNotFoundError:
        problem, hint = f"{clip_model.file} is not on this machine", "copy it to a place that all machines can read"
        raise RecipeError(f"{clip_model.section}.pretrained", problem, hint) from None
    except torch.OutOfMemoryError:
        raise  # the GPU's fault, not the file's
    except Exception as error:  # noqa: BLE001 - open_clip, torch and safetensors raise a dozen kinds for files that do not fit
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        problem = f"cannot load {clip_model.file} as {clip_model.model} ({first})"
        raise RecipeError(f"{clip_model.section}.pretrained", problem, "use weights of this architecture") from None
    return model.to(torch.device(device)).eval()


def _tokenizer(clip_model: ClipModel) -> Any:
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    if clip_model._bpe is not None:
        length = clip_model.architecture["text_cfg"].get("context_length", 77)
        return SimpleTokenizer(bpe_path=str(clip_model._bpe), context_length=length)
    return open_clip.get_tokenizer(f"local-dir:{clip_model.folder}" if clip_model.folder else clip_model.model)
