"""Run an encode job without Ray, and change the recipe it comes from."""

import json


def run_here(job):
    job.storage.write(f"{job.folder}/recipe.json", json.dumps(job.identity).encode())
    apply = job.model()
    for entry in job.dataset.manifest.shards:
        unit = job.unit(entry)
        job.commit(unit, [apply(piece) for piece in job.prepare(unit)])
    return job.encoder


def changed(recipe, data=None, **diffusion):
    """The recipe with other settings of train.data and train.diffusion."""
    train = recipe.train | {"data": recipe.train["data"] | (data or {})}
    return recipe.model_copy(update={"train": train | {"diffusion": train["diffusion"] | diffusion}})
