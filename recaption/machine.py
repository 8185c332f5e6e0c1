"""Whether this machine has the GPUs that captioning is to run on: checked before a model is loaded"""

from __future__ import annotations

from capstan.pipeline.config import Resources
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.gpus import check_gpus, this_machine_has, usable_gpus
from capstan.recaption.config import RecaptionConfig


def check_machine(config: RecaptionConfig, resources: Resources) -> None:
    """Raise RecipeError if the engine needs GPUs that are not there. Nothing is known of a cluster's before it runs."""
    if config.engine == "openai":
        return
    check_gpus(resources)
    here = usable_gpus(resources)
    if here is None:
        return
    if config.device == "cuda" and not here:
        why = "resources.gpus is 0" if resources.gpus == 0 else this_machine_has(here)
        raise RecipeError("recaption.device", f"is cuda, but {why}", "set auto, or run on a cluster (capstan submit)")
    servers, each = config.vllm.replicas, config.vllm.tensor_parallel
    if config.engine == "vllm" and servers != "auto" and here and servers * each > here:
        problem = f"is {servers}, which takes {servers * each} GPUs, but {this_machine_has(here)}"
        raise RecipeError("recaption.vllm.replicas", problem, "set auto, or run on a cluster (capstan submit)")
