"""Drawing with the family `dalle`, and its product

config.json model.safetensors    the transformer
tokenizer/                       of the captions
first_stage/                     the product whose codes it writes
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Unpack

import numpy as np
import torch

from capstan.pipeline.errors import RecipeError
from capstan.training.data.order import hash64
from capstan.training.data.tokenizer import Tokenizer
from capstan.training.drawing.drawer import Drawer, Drawn, Options, refuse_options
from capstan.training.models.dalle.config import TokenSampling
from capstan.training.models.dalle.model import Dalle, Shape
from capstan.training.models.dalle.sampling import Choice, draw_tokens
from capstan.training.models.dalle.tokens import emptied, open_first_stage, prompt_ids
from capstan.training.product import find_product, read_facts

_CONFIG: Final = "config.json"
_WEIGHTS: Final = "model.safetensors"
TOKENIZER: Final = "tokenizer"
FIRST_STAGE: Final = "first_stage"


def save_product(model: Any, folder: Path, tokenizer: Tokenizer, first_stage: str) -> None:
    """Write a product's files but its facts; `first_stage` is a run or a folder."""
    from safetensors.torch import save_file

    save_file({name: weight.contiguous() for name, weight in model.state_dict().items()}, folder / _WEIGHTS)
    (folder / _CONFIG).write_text(json.dumps(model.shape._asdict(), indent=1) + "\n", encoding="utf-8")
    tokenizer.save(folder / TOKENIZER)
    shutil.copytree(find_product(first_stage, "train.dalle.first_stage"), folder / FIRST_STAGE)


def load_model(product: Path) -> Dalle:
    """Load the transformer of a product, in fp32, in evaluation mode. Raises RecipeError if it is an export."""
    from safetensors.torch import load_file

    config = json.loads((product / _CONFIG).read_text(encoding="utf-8"))
    if "model_type" in config:
        problem = f"{product} is an export, which transformers draws with"
        raise RecipeError("RUN", problem, "name the run that it was made from")
    model = Dalle(Shape(**config))
    model.load_state_dict(load_file(product / _WEIGHTS))
    return model.eval().requires_grad_(False)


class DalleDrawer(Drawer):
    """An opened product: tokens from prompts, and images from tokens."""

    def __init__(self, product: Path, device: torch.device) -> None:
        facts = read_facts(product)
        self.device = device
        self.model = load_model(product).to(device)
        self.tokenizer = Tokenizer.load(product / TOKENIZER)
        self.codec = open_first_stage(str(product / FIRST_STAGE), "RUN")
        self.codec.to(device)
        self.side, self.length = int(facts["size"]) // self.codec.factor, int(facts["length"])
        self.sampling = TokenSampling.model_validate(facts["sampling"])
        self._clip: Any = None

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], *, batch: int = 16, **options: Unpack[Options]
    ) -> Drawn:
        guidance = options.pop("guidance", None)
        refuse_options(options)
        images = []
        for start in range(0, len(prompts), batch):
            texts, chosen = list(prompts[start : start + batch]), seeds[start : start + batch]
            candidates = [
                self._images(
                    texts, [seed if n == 0 else hash64(seed, "candidate", n) >> 1 for seed in chosen], guidance
                )
                for n in range(self.sampling.candidates)
            ]
            images.append(candidates[0] if len(candidates) == 1 else self._best(np.stack(candidates), texts))
        return Drawn("image", np.concatenate(images))

    def settings(self, *, steps: int | None = None, guidance: float | None = None) -> dict[str, Any]:
        whole = self.sampling.model_dump(exclude={"clip"}, exclude_none=True)
        return whole if guidance is None else whole | {"guidance": guidance}

    def ceiling(self, images: np.ndarray, batch: int) -> np.ndarray:
        return self.codec.reconstruct(images, batch)

    def _images(self, texts: Sequence[str], seeds: Sequence[int], guidance: float | None) -> np.ndarray:
        ids, mask = (part.to(self.device) for part in prompt_ids(self.tokenizer, texts, self.length))
        one = self.sampling
        how = Choice(one.guidance if guidance is None else guidance, one.temperature, one.top_k, one.top_p)
        with torch.no_grad():
            prompts = (ids, mask, emptied(ids, self.tokenizer))
            tokens = draw_tokens(self.model, prompts, self.side**2, seeds, how)
            made = self.codec.images(tokens.view(-1, self.side, self.side).to(self.device))
        values = ((made.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return values.permute(0, 2, 3, 1).numpy()

    def _best(self, candidates: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """Return each text's best image of [n, B, H, W, 3], by the cosine of CLIP's embeddings."""
        from capstan.pipeline.score.clip_model import ClipModel

        if self._clip is None:
            clip = self.sampling.clip
            assert clip is not None, "candidates need a clip, which the settings check"
            tower = ClipModel(clip.model, clip.pretrained, "fp32", "train.dalle.sampling.clip")
            self._clip = (tower, tower.load(str(self.device), threads=torch.get_num_threads()))
        tower, loaded = self._clip
        with torch.no_grad():
            text = loaded.texts(list(texts))
            scores = [
                torch.nn.functional.cosine_similarity(loaded.images(np.stack([tower.prepare(x) for x in images])), text)
                for images in candidates
            ]
        best = torch.stack(scores).argmax(0).cpu().numpy()
        return candidates[best, np.arange(len(texts))]
