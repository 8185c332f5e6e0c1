"""The demo's recipes: a small captioned world, models that two cores train in minutes

Two datasets are built. `web` imitates a crawl: alt texts as captions, and every defect that images have. `labelled`
stands for the few thousand images for which people wrote good captions, short and descriptive; the captioner is fine-
tuned on them (Betker et al. 2023, "Improving Image Generation with Better Captions", section 2).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

WORLD: Final = {
    "size": 32,
    "shapes": ["circle", "square", "triangle"],
    "colours": ["red", "green", "blue", "yellow", "purple", "cyan"],
    "textures": ["plain"],  # textures cannot be told apart at this size
}
WEB_SCENES: Final = 6000
LABELLED_SCENES: Final = 3000
SEED_WEB, SEED_LABELLED = 0, 1
LABELLED_LAYER: Final = "labelled"
SHOWN: Final = 4  # prompts that are drawn again and again while the model trains

# The captioner: a CoCa of about half a million parameters over 8 × 8 patches.
_COCA: Final = {
    "vision": {"image_size": 32, "patch_size": 4, "width": 64, "head_width": 16, "layers": 4, "queries": 0},
    "text": {"context_length": 64, "width": 64, "heads": 4, "layers": 1, "decoder_layers": 2},
}
# A vocabulary of the web's captions alone would split descriptions into fragments, so it is trained on both.
TOKENIZER: Final = "tokenizer"
VOCABULARY: Final = 1024
# Two processes of one thread each train faster on two cores than one process of two threads. Ray Train launches the
# longest run; in the others its start-up, 10 s more than that of plain processes, would be a tenth of the time.
_ENGINE: Final = {"strategy": "deepspeed", "zero": 2, "workers": 2, "launcher": "local"}
_UNSHARDED: Final = {**_ENGINE, "zero": 0}  # a million parameters are not worth sharding: 10 to 20% faster than stage 2


def recipes(folder: Path, *, quick: bool = False) -> dict[str, dict[str, Any]]:
    """Return name → recipe, in the order in which they run; all paths are below `folder`.

    `quick`: few images and steps, to show that everything runs; the models learn next to nothing.
    """
    made = _recipes(folder)
    for recipe in made.values() if quick else ():
        recipe["source"]["world"]["scenes"] = 200
        recipe["shards"], recipe["unit"] = {"samples": 60}, {"rows": 60}
        if "train" in recipe:
            recipe["train"] |= {"steps": 6, "log_every": 1, "checkpoint": {"every": 2}}
            if "watch" in recipe["train"]:
                recipe["train"]["watch"] = {"samples": {"every": 3, "count": SHOWN}}
    return made


def _recipes(folder: Path) -> dict[str, dict[str, Any]]:
    web = {
        "dataset": str(folder / "web"),
        "source": {"format": "world", "world": {**WORLD, "scenes": WEB_SCENES, "seed": SEED_WEB}},
        "image": {"size": 32, "min_size": 24, "quality": 95},
        "fetch": {"retries": 1},
        "select": [{"name": "caption", "where": "length(caption) >= 3"}],
        # The perceptual hash sees no colour, and these drawings differ in little else: only equal hashes are near.
        "dedup": {"exact": True, "perceptual": None},
        "shards": {"samples": 1000},
        "unit": {"rows": 1000},
    }
    labelled = {
        **web,
        "dataset": str(folder / "labelled"),
        "source": {
            "format": "world",
            "world": {
                **WORLD,
                "scenes": LABELLED_SCENES,
                "seed": SEED_LABELLED,
                "captions": "descriptive",
                "defects": False,
            },
        },
    }
    return {
        "web": web,
        "labelled": labelled,
        "captioner-base": web | {"train": captioner_base(folder)},
        "captioner": labelled | {"train": captioner(folder)},
        "recaption": web | {"recaption": {"engine": "coca", "model": str(folder / "captioner"), "batch": 64}},
        "autoencoder": web | {"train": autoencoder(folder)},
        "diffusion": web | {"train": diffusion(folder)},
    }


def _train(model: str, run: Path, **keys: Any) -> dict[str, Any]:
    shared = {"schedule": "cosine", "final_lr": 0.05, "engine": _ENGINE, "log_every": 20}
    return {"model": model, "run": str(run), **shared, **keys}


def _precision() -> str:
    """Return bf16 if the processor supports it natively; emulated, a step takes 2.5 times as long as in fp32."""
    import torch

    native = torch.cuda.is_available() or any(
        "bf16" in name and has for name, has in torch.cpu.get_capabilities().items()
    )
    return "bf16" if native else "fp32"


def _coca(folder: Path) -> dict[str, Any]:
    return {**_COCA, "text": {**_COCA["text"], "tokenizer": str(folder / TOKENIZER)}}


def captioner_base(folder: Path) -> dict[str, Any]:
    """Return the section for pre-training on web captions, with both of CoCa's losses."""
    return _train(
        "captioner",
        folder / "captioner-base",
        steps=100,
        batch=64,
        lr=3e-3,
        warmup=30,
        ema=None,
        data={"layer": None},
        captioner=_coca(folder),
        checkpoint={"every": 100},
    )


def captioner(folder: Path) -> dict[str, Any]:
    """Return the section for fine-tuning on short and descriptive captions, with the caption loss alone."""
    return _train(
        "captioner",
        folder / "captioner",
        init=str(folder / "captioner-base"),
        steps=1300,
        batch=32,
        lr=2e-3,
        betas=[0.9, 0.98],
        warmup=50,
        ema=0.99,
        data={"layer": LABELLED_LAYER, "blend": {"short": 0.25, "descriptive": 0.75}},
        captioner={**_coca(folder), "contrastive": 0.0, "caption": 1.0},
        engine=_UNSHARDED,
        checkpoint={"every": 200},
    )


def autoencoder(folder: Path) -> dict[str, Any]:
    """Return the section of the autoencoder: 32 × 32 pixels → 8 × 8 × 4 latents."""
    return _train(
        "autoencoder",
        folder / "autoencoder",
        steps=1100,
        batch=32,
        lr=2e-3,
        warmup=50,
        betas=[0.9, 0.99],
        ema=0.99,
        precision=_precision(),
        weight_decay=0.0,
        autoencoder={
            "block_out_channels": [16, 32, 64],
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "mid_attention": False,
            "reconstruction": "l2",
            "kl": 1e-4,
        },
        data={"layer": None},
        engine=_UNSHARDED,
        checkpoint={"every": 200},
    )


def diffusion(folder: Path) -> dict[str, Any]:
    """Return the section of the diffusion model: 95% descriptive, 5% original captions.

    The demo adds the layer and the latents once they exist.
    """
    return _train(
        "diffusion",
        folder / "diffusion",
        steps=1900,
        batch=64,  # per image a third cheaper than 32: at this size a step's cost is in its number of operations
        lr=2.5e-3,
        warmup=100,
        ema=0.995,
        weight_decay=0.0,
        diffusion={
            "autoencoder": str(folder / "autoencoder"),
            "unet": {
                "block_out_channels": [32, 64],
                "layers_per_block": 1,
                "attention": [True, True],  # at 4 × 4 too: a quarter more time per step
                "heads": 2,
                "norm_num_groups": 4,  # groups of 8 channels: a lower loss at equal steps than groups of 2
            },
            "text": {"vocab_size": 1024, "length": 50, "width": 64, "layers": 2, "heads": 4},
            "flow": {"mean": 0.5},  # noisier times, which decide what is where and in which colour
            "sampling": {"steps": 15, "guidance": 2.0},
        },
        engine={**_UNSHARDED, "launcher": "ray"},
        checkpoint={"every": 200},
        watch={"samples": {"every": 475, "count": SHOWN}},  # four times
    )
