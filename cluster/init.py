"""`capstan init`: a commented starter recipe"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from capstan.cluster.recipe import schema
from capstan.pipeline.errors import RecipeError

SCHEMA_FILE: Final = "recipe.schema.json"  # named in the first line of the recipe

STARTER = """\
# yaml-language-server: $schema=./recipe.schema.json
# A Capstan recipe. `capstan schema` prints every key; `capstan doctor recipe.yaml` checks it against this machine.

dataset: ./out/ds                # a folder or any fsspec URL (s3://bucket/ds)
storage: {}                      # fsspec options, e.g. {endpoint_url: "http://127.0.0.1:9000"}; no secrets here

# 1. capstan build recipe.yaml -------------------------------------------------------------------------------------
source:
  path: urls.parquet             # a file, glob, folder or URL; or a list of them
  url: url                       # column with the URL
  caption: caption               # column with the caption
fetch: {concurrency: 64, per_host: 8, timeout_s: 20, retries: 2}
image: {size: 512, resize: keep_ratio, quality: 95, min_size: 64}
# score: {caption: {}, image: {}}  # columns to select by; docs/scoring.md: also clip, aesthetic, nsfw, watermark,
                                 # language, text_in_image
select:                          # named SQL conditions over the ledger; each is one step of the funnel
  - {name: size, where: "least(original_width, original_height) >= 200"}
  - {name: caption, where: "length(caption) >= 5"}
dedup: {exact: true, perceptual: 6}  # docs/duplicates.md: also copies, semantic, decontaminate
shards: {samples: 10000}

# 2. capstan recaption recipe.yaml ---------------------------------------------------------------------------------
recaption:
  engine: coca
  model: coca_ViT-L-14           # an open_clip name, or the folder that `capstan train` wrote for a captioner
  pretrained: mscoco_finetuned_laion2b_s13b_b90k
  slots: [short, descriptive]

# 3. capstan train recipe.yaml, then: capstan sample ./out/run -p "a red circle" ------------------------------------
# (docs/training.md shows the recipes of the autoencoder and of the captioner)
train:
  model: diffusion
  run: ./out/run
  steps: 100000
  batch: 256
  precision: bf16
  data: {blend: {descriptive: 0.95, original: 0.05}}   # how often each caption is drawn
  engine: {zero: 2, workers: 1}  # workers: one per GPU
  diffusion:
    autoencoder: ./out/autoencoder     # a run of `model: autoencoder`, or any diffusers AutoencoderKL
"""


def write_starter(folder: Path) -> Path:
    """Write recipe.yaml into `folder`, and next to it the schema by which editors help; return the recipe's path.

    Raises RecipeError if there is a recipe already.
    """
    path = folder / "recipe.yaml"
    if path.exists():
        raise RecipeError("DIR", f"{path} already exists", "choose another folder, or move the file away")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SCHEMA_FILE).write_text(json.dumps(schema(), indent=2) + "\n", encoding="utf-8")
        path.write_text(STARTER, encoding="utf-8")
    except OSError as error:
        problem = f"cannot write {path} ({error.strerror})"
        raise RecipeError("DIR", problem, "choose a folder that you can write to") from None
    return path
