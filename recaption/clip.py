"""Pictures and texts → embeddings by an open_clip CLIP: the judge of captions, which should not be their author."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.errors import RecipeError
from recaption.engines.coca import BPE_FILE, CONFIG_FILE

BATCH: Final = 64

Embeddings = npt.NDArray[np.float32]  # [pictures or texts, width], each of length 1


class Clip:
    """A model by open_clip's name, with a tag or a checkpoint file, or a folder that holds one. Loads it at once."""

    def __init__(self, model: str, pretrained: str | None = None) -> None:
        import open_clip
        import torch

        folder = Path(model)
        self.name = model if folder.is_dir() else f"{model}/{pretrained}"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if folder.is_dir():
            if not (folder / CONFIG_FILE).is_file():
                raise RecipeError("--model", f"{folder} has no {CONFIG_FILE}", "name a folder that open_clip wrote")
            arguments: dict[str, Any] = {"model_name": f"local-dir:{folder.absolute()}"}
        else:
            _check(model, pretrained)
            arguments = {"model_name": model, "pretrained": pretrained}
        try:
            net, _, self._transform = open_clip.create_model_and_transforms(**arguments)
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            first = str(error).splitlines()[0] if str(error) else repr(error)
            mend = "where no hub can be reached, name a folder or a checkpoint file"
            raise RecipeError("--model", f"cannot load {self.name} ({first})", mend) from None
        self._model = net.to(self.device).eval()
        self._tokenizer = _tokenizer(folder, arguments["model_name"], net)
        self._pad = self._tokenizer([""])[0][-1]

    def fits(self, text: str) -> bool:
        """Whether the model sees all of `text`."""
        return bool(self._tokenizer([text])[0][-1] == self._pad)

    def pictures(self, files: Sequence[bytes]) -> Embeddings:
        """Of encoded pictures."""
        import torch

        def read(data: bytes) -> Any:
            with Image.open(io.BytesIO(data)) as picture:
                return self._transform(picture.convert("RGB"))

        return self._each(
            files, lambda some: self._model.encode_image(torch.stack([read(f) for f in some]).to(self.device))
        )

    def texts(self, texts: Sequence[str]) -> Embeddings:
        """Of texts that fit."""
        return self._each(texts, lambda some: self._model.encode_text(self._tokenizer(list(some)).to(self.device)))

    def _each(self, items: Sequence[Any], encode: Any) -> Embeddings:
        import torch

        made = []
        with torch.inference_mode():
            for start in range(0, len(items), BATCH):
                found = torch.nn.functional.normalize(encode(items[start : start + BATCH]).float(), dim=-1)
                made.append(found.cpu().numpy())
        return np.concatenate(made)


def _check(model: str, pretrained: str | None) -> None:
    import open_clip

    if model not in open_clip.list_models():
        mend = "name one of open_clip.list_models(), e.g. ViT-B-32, or a folder"
        raise RecipeError("--model", f"no folder and no model of open_clip is named {model!r}", mend)
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is None or not (pretrained in tags or Path(pretrained).is_file()):
        problem = f"{pretrained!r} is neither a file nor a tag of {model}"
        raise RecipeError("--pretrained", problem, f"name a checkpoint file, or one of {', '.join(tags) or 'none'}")


def _tokenizer(folder: Path, name: str, model: Any) -> Any:
    """The model's tokenizer; of a captioner that Capstan trained, with its own vocabulary."""
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    own = folder / BPE_FILE
    if own.is_file():
        return SimpleTokenizer(bpe_path=str(own), context_length=model.text.context_length)
    return open_clip.get_tokenizer(name)
