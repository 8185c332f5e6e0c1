"""Captioning: how true captions are, the speed of cached decoding, and how busy the model workers are.

    python benchmarks/recaption.py accuracy   captioners trained on the captioned world, two from one base: their
                                              captions of unseen images against the truth, and chance
    python benchmarks/recaption.py decode     coca_ViT-B-32's sizes with random weights, 76 tokens, greedy: images/s of
                                              both, and whether the tokens are the same
    python benchmarks/recaption.py busy       a whole `capstan recaption` over drawn JPEGs of 512 px: the share of the
                                              time between its first and last image that the model worker computes

open_clip's loop is that of its `generate`, which does not start under transformers 5: text tower and decoder over the
whole caption for every new token, with the image's tokens kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TOKENS = 76  # start token included: coca_ViT-B-32's context
PROMPT = "a photo of"


# How true captions are ------------------------------------------------------------------------------------------------

SCENES, UNSEEN = 12_500, 500
WORLD = {"size": 32, "textures": ["plain"], "scenes": SCENES, "defects": False}  # all colours and shapes
LAYER = "written"
COCA = {
    "vision": {"image_size": 32, "patch_size": 4, "width": 64, "head_width": 16, "layers": 4, "queries": 0},
    "text": {"context_length": 64, "width": 64, "heads": 4, "layers": 2, "decoder_layers": 3},
}
VOCABULARY = 1024
BUDGET_S = 1800  # 15 minutes of two cores


def captioners(folder: Path) -> dict[str, dict[str, Any]]:
    """Return name → section `train`: both losses on web captions; from there short captions, and descriptions."""
    coca = {**COCA, "text": {**COCA["text"], "tokenizer": str(folder / "tokenizer")}}

    def section(name: str, steps: int, **keys: Any) -> dict[str, Any]:
        shared = {
            "model": "captioner",
            "run": str(folder / name),
            "steps": steps,
            "batch": 32,
            "lr": 2e-3,
            "warmup": 100,
        }
        shared |= {"schedule": "cosine", "final_lr": 0.02, "betas": [0.9, 0.98], "ema": 0.99, "log_every": 50}
        shared |= {"checkpoint": {"every": 500}}
        shared["engine"] = {"zero": 0, "workers": 2, "launcher": "local"}  # too small to shard
        return shared | keys | {"data": {"holdout": UNSEEN, **keys["data"]}}

    def tuned(slot: str, steps: int) -> dict[str, Any]:
        data, alone = {"layer": LAYER, "blend": {slot: 1}}, {**coca, "contrastive": 0, "caption": 1}
        return section(slot, steps, init=str(folder / "base"), data=data, captioner=alone)

    return {
        "base": section("base", 150, batch=64, data={"layer": None}, captioner=coca),
        "descriptive": tuned("descriptive", 5000),
        "short": tuned("short", 1500),
    }


def accuracy(folder: Path) -> dict[str, Any]:
    """Train, caption unseen images, and compare the captions' statements with the scenes."""
    from capstan.pipeline.build import build
    from capstan.pipeline.config import Recipe
    from capstan.pipeline.dataset.shards import Dataset
    from capstan.pipeline.storage import Storage
    from capstan.pipeline.world.captions import descriptive, short
    from capstan.pipeline.world.table import scene_of_url
    from capstan.recaption.prompts import PREFIXES
    from capstan.recaption.store import write_given_layer
    from capstan.training.data.tokenizer import Tokenizer
    from capstan.training.launch import train

    recipe = Recipe.model_validate(
        {
            "dataset": str(folder / "ds"),
            "source": {"format": "world", "world": WORLD},
            "image": {"size": WORLD["size"], "min_size": 24, "quality": 95},
            "fetch": {"allow_private": True},
            "dedup": {"exact": False, "perceptual": None},
            "shards": {"samples": 1000},
            "resources": {"cpus": 2},
        }
    )
    build(recipe, progress=False)
    assert recipe.source is not None and recipe.source.world is not None  # noqa: PT018
    dataset = Dataset(Storage(recipe.dataset))
    rows = [row for name in dataset.shard_names for row in dataset.table(name, ["key", "url", "caption"]).to_pylist()]
    scenes = {row["key"]: scene_of_url(recipe.source.world, row["url"]) for row in rows}
    texts = {key: {"short": short(scene), "descriptive": descriptive(scene)} for key, scene in scenes.items()}
    write_given_layer(dataset.storage, LAYER, texts)
    # Learnt on web captions alone, the vocabulary would split descriptions into fragments.
    words = [row["caption"] for row in rows] + [text for slots in texts.values() for text in slots.values()]
    Tokenizer.train(words + 100 * list(PREFIXES.values()), VOCABULARY).save(folder / "tokenizer")
    results: dict[str, Any] = {"pictures": len(scenes) - UNSEEN, "unseen": UNSEEN, "steps": {}}
    for name, section in captioners(folder).items():
        with _cpu_s_added(folder / "cpu_s.json", name):
            results["steps"][name] = train(recipe.model_copy(update={"train": section}))["steps"]
    spent = json.loads((folder / "cpu_s.json").read_text())
    results |= {"cpu_s": spent, "cpu_s_of_all": round(sum(spent.values())), "cpu_s_allowed": BUDGET_S}
    unseen = list(scenes)[-UNSEEN:]
    jpegs = [jpeg for shard in dataset.shard_names for _, jpeg in dataset.read_images(shard)][-UNSEEN:]
    for slot in ("short", "descriptive"):
        captions = _captions(folder / slot, slot, unseen, jpegs)
        results[slot] = _measured(captions, [scenes[key] for key in unseen], slot)
    return results


@contextlib.contextmanager
def _cpu_s_added(file: Path, name: str) -> Iterator[None]:
    """Add to `file` the CPU seconds, user and system, of processes that start and end within the block.

    They count however the block ends: a stopped training resumes with the next run.
    """

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    try:
        yield
    finally:
        spent = json.loads(file.read_text()) if file.exists() else {}
        spent[name] = round(spent.get(name, 0.0) + used() - before, 1)
        file.write_text(json.dumps(spent))
        print(json.dumps(spent), file=sys.stderr, flush=True)


def _captions(model: Path, slot: str, keys: Sequence[str], jpegs: Sequence[bytes]) -> list[str]:
    """Return the engine's captions, as a recaptioning job would get them."""
    from capstan.recaption.config import RecaptionConfig
    from capstan.recaption.engines import Request, make

    engine = make(RecaptionConfig.model_validate({"model": str(model), "slots": [slot], "batch": 64}))
    found = engine.caption([engine.prepare(jpeg) for jpeg in jpegs], [Request(key, (slot,)) for key in keys])
    return [captions[slot].raw for captions in found]


def _measured(captions: Sequence[str], scenes: Sequence[Any], slot: str) -> dict[str, Any]:
    """Return measure → (share of captions that are right, share that other images' captions would get).

    `relation` counts captions whose two things are both present, `relation_of_all` all images of several things. Its
    chance is the best score of one word for all images, and of one word for each order of mention: things are listed
    from left to right.
    """
    from capstan.pipeline.world import oracle
    from capstan.pipeline.world.captions import compare, facts

    read = [facts(caption) for caption in captions]
    right = oracle.aggregate([compare(*pair) for pair in zip(read, scenes, strict=True)])
    others = oracle.aggregate([compare(*pair) for pair in zip(read, [*scenes[1:], scenes[0]], strict=True)])
    names = ["colours", "count", "colour_shape"] + ["background", "size", "place"] * (slot == "descriptive")
    found: dict[str, Any] = {name: (round(right[name], 3), round(others[name], 3)) for name in names}
    if slot == "descriptive":
        stated = [pair for pair in (_relation(*pair) for pair in zip(read, scenes, strict=True)) if pair]
        by_order = {first: Counter(truth for _, truth, f in stated if f == first) for first in (True, False)}
        one_word = max(Counter(truth for _, truth, _ in stated).values()) / len(stated)
        by_order_right = sum(max(words.values(), default=0) for words in by_order.values()) / len(stated)
        share = sum(said == truth for said, truth, _ in stated) / len(stated)
        found["relation"] = (round(share, 3), round(one_word, 3), round(by_order_right, 3))
        found["relation_of_all"] = (round(right["relation"], 3), round(others["relation"], 3))
    return found


def _relation(read: Any, scene: Any) -> tuple[str, str, bool] | None:
    """Return (stated relation, true one, whether the first named is listed first) if both things are present."""
    from capstan.pipeline.world.scene import relation

    things = {(thing.colour, thing.shape): thing for thing in scene.things}
    if read.relation is None:
        return None
    a, said, b = read.relation
    if a == b or a not in things or b not in things:
        return None
    order = [thing for thing in scene.things if thing in (things[a], things[b])]
    return said, relation(things[a], things[b]), order[0] == things[a]


# Decoding -------------------------------------------------------------------------------------------------------------


def random_captioner(folder: Path, name: str = "coca_ViT-B-32") -> Path:
    """Write a folder with a model of this name's sizes and random weights."""
    import open_clip
    import torch
    from open_clip.coca_model import CoCa
    from safetensors.torch import save_file

    torch.manual_seed(0)
    architecture = open_clip.get_model_config(name)
    model = CoCa(**{key: value for key, value in architecture.items() if key != "custom_text"})
    # open_clip does not initialise it. Large, so that the likeliest token leads by far: ties would be decided by
    # rounding, and the two loops round differently.
    torch.nn.init.normal_(model.text_decoder.text_projection, std=1.0)
    folder.mkdir(parents=True)
    weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": architecture, "preprocess_cfg": {}}))
    return folder


def decode(batches: Sequence[int], repeats: int) -> dict[str, Any]:
    """Print images/s of both loops at each batch size, the encoding of images included."""
    import torch

    from capstan.recaption.config import RecaptionConfig
    from capstan.recaption.engines.coca import CocaEngine
    from capstan.recaption.engines.coca_decoding import decode as cached

    results: dict[str, Any] = {"threads": torch.get_num_threads(), "tokens": TOKENS, "batches": {}}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        section = {
            "model": str(random_captioner(Path(folder) / "m")),
            "slots": ["short"],
            "prompts": {"short": PROMPT},
        }
        engine = CocaEngine(RecaptionConfig.model_validate(section))
        loaded = _load(engine)
        prompt, limit = loaded.slots["short"]
        for batch in batches:
            images = list(np.random.default_rng(batch).integers(0, 256, (batch, 224, 224, 3), dtype=np.uint8))

            def ours(images: list[np.ndarray] = images, batch: int = batch) -> list[list[int]]:
                cache = loaded.encode(images, engine.preprocessing, batch)
                written = cached(cache, range(batch), prompt, limit, loaded.tokens, engine.config.decoding, [0] * batch)
                return [tokens for tokens, _ in written]

            ours()
            cached_s, cached_cpu_s, found = _best(ours, repeats)
            print(f"batch {batch}: cached {cached_s:.1f} s; now open_clip's own loop", file=sys.stderr, flush=True)
            plain_s, plain_cpu_s, expected = _best(
                lambda images=images: _plain(loaded, engine, images, prompt, limit), 1
            )
            results["batches"][batch] = {
                "open_clip_images_per_s": round(batch / plain_s, 4),
                "cached_images_per_s": round(batch / cached_s, 4),
                "ratio": round(plain_s / cached_s, 2),
                "cpu_ratio": round(plain_cpu_s / cached_cpu_s, 2),  # the least disturbed, on a shared machine
                "same_tokens": found == expected,
                "mean_tokens": float(np.mean([len(tokens) for tokens in found])),
            }
            print(json.dumps({batch: results["batches"][batch]}), flush=True)
    return results


def _load(engine: Any) -> Any:
    """Return the engine's model, loaded without captioning anything."""
    from capstan.recaption.engines.coca import _Loaded

    return _Loaded(engine)


def _best(run: Any, repeats: int) -> tuple[float, float, Any]:
    """Return the wall-clock and CPU seconds of the shortest of `repeats` runs, and the last result."""
    times = []
    for _ in range(repeats):
        start, cpu = time.perf_counter(), time.process_time()
        result = run()
        times.append((time.perf_counter() - start, time.process_time() - cpu))
    return *min(times), result


def _plain(loaded: Any, engine: Any, pictures: list[np.ndarray], prompt: list[int], limit: int) -> list[list[int]]:
    """Return greedy captions by open_clip's loop."""
    import torch

    mean, std = (torch.tensor(v)[:, None, None] for v in (engine.preprocessing.mean, engine.preprocessing.std))
    images = (torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255 - mean) / std
    images = images.to(loaded.device, loaded.dtype)
    latent, embeddings = loaded.model._encode_image(images)
    tokens, model = loaded.tokens, loaded.model
    out = torch.tensor([[tokens.start, *prompt]], device=loaded.device).expand(len(pictures), -1)
    ended = torch.zeros(len(pictures), dtype=torch.bool, device=loaded.device)
    for _ in range(limit):
        answer = model(images, out, image_latent=latent, image_embs=embeddings, output_labels=False)
        logits = answer["logits"][:, -1]
        logits[:, tokens.pad] = -torch.inf
        chosen = logits.argmax(-1).masked_fill(ended, tokens.end)
        out = torch.cat([out, chosen[:, None]], 1)
        ended |= chosen == tokens.end
        if ended.all():
            break
    lines = out[:, 1 + len(prompt) :].tolist()
    return [line[: line.index(tokens.end)] if tokens.end in line else line for line in lines]


# How busy the model worker is ----------------------------------------------------------------------------------------


class TimedEngine:
    """An engine that records when it captioned: one line per call, [start, stop] in seconds."""

    uses_original = False

    def __init__(self, engine: Any, times: Path) -> None:
        self.engine, self.times = engine, times

    def describe(self) -> dict[str, Any]:
        return self.engine.describe()

    def prepare(self, jpeg: bytes) -> Any:
        return self.engine.prepare(jpeg)

    def caption(self, images: Any, requests: Any, *, attempt: int = 0) -> Any:
        start = time.time()
        found = self.engine.caption(images, requests, attempt=attempt)
        with self.times.open("a") as file:
            file.write(json.dumps([start, time.time()]) + "\n")
        return found


def busy(images: int, max_tokens: int, side: int) -> dict[str, Any]:
    """Print the model worker's share of computing while one CPU worker reads and decodes, without loading."""
    from capstan.pipeline.build import build
    from capstan.pipeline.config import Recipe
    from capstan.recaption import job
    from capstan.recaption.engines import make

    with tempfile.TemporaryDirectory() as place:
        folder, times = Path(place), Path(place) / "times"
        section = {"model": str(random_captioner(folder / "m")), "max_tokens": max_tokens, "batch": 8}
        section["slots"] = ["short"]
        recipe = Recipe.model_validate(
            {
                "dataset": str(folder / "ds"),
                "source": {"format": "world", "world": {"scenes": images, "size": side, "defects": False}},
                "fetch": {"allow_private": True},
                "dedup": {"exact": False, "perceptual": None},
                "shards": {"samples": max(1, images // 4)},
                "resources": {"cpus": 2, "model_workers": 1},
                "recaption": section,
            }
        )
        build(recipe, progress=False)
        job.make = lambda config, **workers: TimedEngine(make(config, **workers), times)  # type: ignore[assignment]
        summary = job.recaption(recipe, progress=False)
        spans = sorted(json.loads(line) for line in times.read_text().splitlines())[1:]  # the first loads the weights
        decoding = _decoding_rate(recipe, make(job.RecaptionConfig.from_recipe(recipe)))
    whole = spans[-1][1] - spans[0][0]
    return {
        "images": summary["new"],
        "calls": len(spans),
        "model_busy_share": round(sum(stop - start for start, stop in spans) / whole, 3),
        "decoded_images_per_s_and_core": round(decoding, 1),
    }


def _decoding_rate(recipe: Any, engine: Any) -> float:
    """Return the images/s that one core reads and decodes."""
    from capstan.pipeline.dataset.shards import Dataset
    from capstan.pipeline.storage import Storage

    dataset = Dataset(Storage(recipe.dataset))
    entry = dataset.manifest.shards[0]
    start = time.perf_counter()
    for _, jpeg in dataset.read_images(entry.name, range(entry.samples)):
        engine.prepare(jpeg)
    return entry.samples / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["accuracy", "decode", "busy"])
    parser.add_argument("--folder", help="accuracy: keep dataset and models here, and resume")
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[8, 16])
    parser.add_argument("--repeats", type=int, default=3, help="runs of the cached loop; the shortest counts")
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--max-tokens", type=int, default=12)
    parser.add_argument("--side", type=int, default=512)
    asked = parser.parse_args()
    # This file has a package's name: keep its folder off the module search path, also on Ray's workers.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
    if asked.part == "accuracy":
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(accuracy(Path(asked.folder or folder).absolute())))
    elif asked.part == "decode":
        print(json.dumps(decode(asked.batches, asked.repeats)))
    else:
        print(json.dumps(busy(asked.images, asked.max_tokens, asked.side)))


if __name__ == "__main__":
    main()
