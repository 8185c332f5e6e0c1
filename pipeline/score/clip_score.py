"""CLIP similarity of caption and image, and the image's embedding if kept."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from capstan.pipeline.score.clip_model import ClipModel
from capstan.pipeline.score.scorer import Embedded, EmbeddingScorer, Values


class ClipSimilarity(EmbeddingScorer):
    """Cosine of image and caption (Hessel et al. 2021, "CLIPScore", without its factor 2.5)."""

    name: ClassVar[str] = "clip"
    columns: ClassVar[list[pa.Field]] = [pa.field("clip_score", pa.float32())]

    def __init__(self, clip_model: ClipModel) -> None:
        self.clip_model = clip_model

    def score(self, batch: Embedded) -> dict[str, Values]:
        return {"clip_score": (batch.images * batch.texts).sum(-1).cpu().numpy()}


class Embeddings(EmbeddingScorer):
    """The images' embeddings, of length 1. They stay in files of their own: no condition refers to them."""

    name: ClassVar[str] = "embeddings"
    in_ledger: ClassVar[bool] = False

    def __init__(self, clip_model: ClipModel) -> None:
        self.clip_model = clip_model
        self.columns: list[pa.Field] = [pa.field("embedding", pa.list_(pa.float16(), clip_model.dim))]  # type: ignore[misc]

    def score(self, batch: Embedded) -> dict[str, Values]:
        vectors: Any = batch.images.cpu().numpy()
        return {"embedding": vectors.astype(np.float16)}
