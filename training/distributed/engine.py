"""A model → the same model trained by many processes (accelerate, DeepSpeed)

    prepare(model) → backward(loss) × accumulate, with an optimizer step at the last → slices, which checkpoints store

ZeRO 0–3 (Rajbhandari et al. 2020) or plain DDP, on GPUs (nccl) or CPUs (gloo), in one process or many. Only this module
uses accelerate and deepspeed. It works around three faults: `Accelerator(cpu=True)` silently drops DeepSpeed; without a
named backend every rank runs alone; DeepSpeed compiles an inference kernel at start-up, and a killed build leaves a
lock.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.ports import free_port
from capstan.training.config import TrainConfig
from capstan.training.distributed import model_options
from capstan.training.distributed.loss_scale import LossScale
from capstan.training.distributed.optimizer import adamw
from capstan.training.distributed.state import WEIGHT, StateReader, StateSlice, adam_slices, adam_state, even_share
from capstan.training.distributed.zero import load_forward_weights, slices_of_stage_1_or_2, slices_of_stage_3

logger = logging.getLogger(__name__)

_LARGEST_BUCKET = 50_003_968  # elements reduced or gathered at once
_PATIENCE = timedelta(minutes=60)  # for a worker that builds assets or writes a checkpoint while the others wait


class Engine:
    """One process of a run: `rank` of `world`, on `device`."""

    def __init__(self, train: TrainConfig) -> None:
        self.train = train
        self.zero = train.engine.zero if train.engine.strategy == "deepspeed" else 0
        self._deepspeed = train.engine.strategy == "deepspeed"
        self._wanted = int(os.environ.get("WORLD_SIZE", "1"))
        if self._wanted not in train.world_sizes():
            problem = f"is {train.engine.workers}, but the launcher started {self._wanted}"
            raise RecipeError("train.engine.workers", problem, "use the same number for both")
        _set_environment(alone=self._wanted == 1 and not self._deepspeed)
        self._accelerator = self._start()
        self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes
        device = self._accelerator.device
        self.device: torch.device = device if device.type != "cpu" else torch.device("cpu")  # not cpu:0
        self.is_main = self.rank == 0
        self.loss_scale = LossScale() if train.precision == "fp16" else None
        self.skipped = False  # whether the last step was skipped because its gradient overflowed in fp16
        if self.loss_scale is not None and not _has_fp16(self.device):
            raise RecipeError("train.precision", f"fp16 requires a GPU, not {self.device}", "use bf16 or fp32")
        if self.device.type == "cpu":
            local = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
            torch.set_num_threads(train.engine.threads or max(1, _cores() // local))
        # Small values are exchanged by gloo, which never waits for a GPU.
        self._small = dist.new_group(backend="gloo", timeout=_PATIENCE) if self.world > 1 else None
        self.model: Any = None
        self._module: Any = None  # what `model` wraps
        self.optimizer: Any = None

    def _start(self) -> Any:
        from accelerate import Accelerator, InitProcessGroupKwargs

        on_cpu = not torch.cuda.is_available()
        kwargs = InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=_PATIENCE)
        if not self._deepspeed:
            handlers = [kwargs] if self._wanted > 1 else []
            accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=handlers)
        else:
            _refuse_inference_kernel()
            from accelerate import DeepSpeedPlugin

            plugin = DeepSpeedPlugin(hf_ds_config=self._deepspeed_config())
            accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[kwargs], deepspeed_plugin=plugin)
            _keep_transformers_out()
        if self._deepspeed and accelerator.distributed_type.value != "DEEPSPEED":
            raise CapstanError(f"training: accelerate chose {accelerator.distributed_type} instead of DeepSpeed")
        seen = dist.get_world_size() if dist.is_initialized() else 1
        if not accelerator.num_processes == seen == self._wanted:
            raise CapstanError(
                f"training: {self._wanted} workers were started, torch.distributed sees {seen} and accelerate "
                f"{accelerator.num_processes}: they would train separately"
            )
        return accelerator

    def _deepspeed_config(self) -> dict[str, Any]:
        train, world = self.train, self._wanted
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": max(1, train.batch // (world * train.accumulate)),
            "gradient_accumulation_steps": train.accumulate,
            "gradient_clipping": (train.clip or 0.0) if self.zero else 0.0,  # at stage 0 we clip, to get the norm
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": self.zero},
        }
        if train.engine.offload:  # stepped by torch's fused AdamW: DeepSpeed's own takes minutes to compile
            pinned = torch.cuda.is_available()
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
            config["zero_force_ds_cpu_optimizer"] = False
        if train.precision == "bf16":  # weights stay fp32, the forward pass computes in bf16
            # Without the empty list the gradients of every Linear and Conv would be averaged over workers in bf16.
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        return config

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        """Wrap the trainable model and create its optimizer; return the model to call in the loss."""
        parameters = sum(parameter.numel() for parameter in model.parameters())
        model_options.apply(model, self.train, self.device)
        if self._deepspeed and self.loss_scale is not None:  # DeepSpeed ends an autocast around the model
            model.forward = torch.autocast(self.device.type, torch.float16)(model.forward)  # type: ignore[method-assign]
        if self._deepspeed:
            bucket = min(_LARGEST_BUCKET, -(-parameters // 1024) * 1024)  # DeepSpeed wants an even number
            zero = {"stage": self.zero, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
            zero |= {"overlap_comm": self.device.type == "cuda", "contiguous_gradients": True}
            if self.zero == 3:
                zero |= {
                    "stage3_prefetch_bucket_size": bucket,
                    "stage3_param_persistence_threshold": min(100_000, bucket),
                    "stage3_gather_16bit_weights_on_model_save": True,
                }
            self._accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"].update(zero)
        optimizer = adamw(model, self.train, fused=self.device.type in ("cpu", "cuda"))
        self.model, self.optimizer = self._accelerator.prepare(model, optimizer)
        self._module = model
        strategy = f"DeepSpeed, ZeRO stage {self.zero}" if self._deepspeed else "DDP"
        if self._deepspeed and self.model.zero_optimization_stage() != self.zero:
            raise CapstanError(f"training: requested ZeRO {self.zero}, got {self.model.zero_optimization_stage()}")
        log = logger.info if self.is_main else logger.debug
        log(
            "engine: %s, world size %d, %s, %s, %d threads, %s parameters",
            strategy,
            self.world,
            self.device,
            self.train.precision,
            torch.get_num_threads(),
            f"{parameters:,}",
        )
        return self.model

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Compute the loss in the recipe's precision inside this context. Weights and gradients stay fp32."""
        dtype = torch.float16 if self.train.precision == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype, enabled=self.train.precision != "fp32"):
            yield

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def backward(self, loss: torch.Tensor, *, last: bool) -> torch.Tensor | float | None:
        """Add the gradient of a part's mean loss; with the `last` part of a step, clip and update weights.

        Returns the norm of the whole gradient before clipping at the last part, None otherwise. If fp16 overflows, the
        norm is infinite and the step is skipped (`skipped`).
        """
        if self.loss_scale is not None and self.zero == 0:
            loss = loss * self.loss_scale.scale
        if self._deepspeed:
            norm = self._backward_deepspeed(loss, last)
        else:
            unsynced = contextlib.nullcontext() if last else self._accelerator.no_sync(self.model)
            with unsynced:
                self._accelerator.backward(loss / self.train.accumulate)
            norm = self._clip(self.model) if last else None
            if last and not self.skipped:
                self.optimizer.step()
            if last:
                self.optimizer.zero_grad()
        if last and self.loss_scale is not None:
            self.loss_scale.update(self.skipped)
        return norm

    def _backward_deepspeed(self, loss: torch.Tensor, last: bool) -> torch.Tensor | float | None:
        model = self.model
        if self.loss_scale is not None and self.zero:
            model.optimizer.override_loss_scale(self.loss_scale.scale)
        model.set_gradient_accumulation_boundary(is_boundary=last)
        model.backward(loss)  # divides by the number of parts
        if not last:
            return None
        if not self.zero:
            norm = self._clip(model.module)
            if self.skipped:
                model.zero_grad()
            else:
                model.step()
            return norm
        model.step()
        self.skipped = self.loss_scale is not None and bool(model.optimizer.overflow)
        return math.inf if self.skipped else model.get_global_grad_norm()

    def _clip(self, model: torch.nn.Module) -> torch.Tensor:
        """Clip the gradient and return its norm before; set `skipped` if fp16 has overflowed."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if self.loss_scale is not None:
            torch._foreach_mul_(gradients, 1 / self.loss_scale.scale)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.train.clip or math.inf)
        self.skipped = self.loss_scale is not None and not math.isfinite(norm)
        return torch.full_like(norm, math.inf) if self.skipped else norm

    def clamp(self, bounds: Mapping[str, tuple[float, float]]) -> None:
        """Bring weights back between their bounds (name → least, largest): those that are stepped, and their copies."""
        if not bounds:
            return
        held = [(part.name, part.tensor) for part in self.slices(bounds) if part.kind == WEIGHT]
        for name, parameter in self.named_parameters() if self.zero else ():
            copies = [parameter.detach(), getattr(parameter, "ds_tensor", None)]
            held += [(name, copy) for copy in copies if name in bounds and copy is not None]
        with torch.no_grad():
            for name, tensor in held:
                tensor.clamp_(*bounds[name])

    # One worker's share of the weights --------------------------------------------------------------------------------

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Return the trainable weights, named as in the model passed to `prepare`."""
        return [(name, parameter) for name, parameter in self._module.named_parameters() if parameter.requires_grad]

    def shapes(self) -> dict[str, torch.Size]:
        """Return the full shape of every trainable weight, even if this worker holds only a part of it."""
        return {name: getattr(p, "ds_shape", p.shape) for name, p in self.named_parameters()}

    def shards(self) -> list[torch.Tensor]:
        """Return this worker's even share of every trainable weight: flat views, at most ceil(numel / world) long."""
        return [self._shard(parameter) for _, parameter in self.named_parameters()]

    def _shard(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        sharded = getattr(parameter, "ds_tensor", None)
        if sharded is not None:  # ZeRO 3 holds only this
            return sharded.detach()
        flat = parameter.detach().reshape(-1)  # a view, except for channels_last
        return flat[even_share(flat.numel(), self.rank, self.world)]

    def gather(self, shards: Iterable[torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """Join shards (as from `shards`) of all workers: name → full tensor on the CPU on rank 0, None elsewhere."""
        full: dict[str, torch.Tensor] = {}
        for (name, shape), shard in zip(self.shapes().items(), shards, strict=True):
            size = -(-shape.numel() // self.world)
            padded = torch.nn.functional.pad(shard[:size], (0, size - min(size, shard.numel())))
            pieces = [torch.empty_like(padded) for _ in range(self.world)] if self.is_main else None
            if self.world > 1:
                dist.gather(padded.contiguous(), pieces, dst=0)
            else:
                pieces = [padded]
            if pieces is not None:
                full[name] = torch.cat(pieces)[: shape.numel()].view(shape).float().cpu()
        return full if self.is_main else None

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the model's buffers on the CPU, such as running statistics; they are never sharded."""
        return {name: buffer.detach().cpu() for name, buffer in self._module.named_buffers()}

    def load_buffers(self, buffers: dict[str, torch.Tensor]) -> None:
        """Restore what `buffers` returned."""
        for name, buffer in self._module.named_buffers():
            buffer.copy_(buffers[name])

    # Collectives -----------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Block until all workers have reached this call."""
        if self._small is not None:
            dist.barrier(group=self._small)

    def raised(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether any worker raised it; the same on all workers."""
        return tuple(votes > 0 for votes in self.sums([float(flag) for flag in flags]))

    def sums(self, values: list[float]) -> list[float]:
        """Return the sum of each number over all workers; the same on all workers."""
        if self._small is None:
            return values
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self._small)
        return sums.tolist()

    def collect(self, value: Any) -> list[Any]:
        """Return the (small) value of every worker, by rank; the same list on all workers."""
        if self._small is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._small)
        return values

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of every worker's CPU tensor; the same on all workers."""
        if self._small is not None:
            dist.all_reduce(tensor, group=self._small)
        return tensor

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def slices(self, names: Collection[str] | None = None) -> Iterator[StateSlice]:
        """Yield this worker's weights and optimizer state in fp32, by name, for saving and loading; all, or `names`."""
        named = [(name, parameter) for name, parameter in self.named_parameters() if names is None or name in names]
        if self.zero == 3:
            return slices_of_stage_3(self.model.optimizer, named, self.rank)
        if self.zero:
            return slices_of_stage_1_or_2(self.model.optimizer, named)
        return self._whole_slices(named)

    def _whole_slices(self, named: list[tuple[str, torch.nn.Parameter]]) -> Iterator[StateSlice]:
        optimizer = self.optimizer.optimizer  # torch's, out of accelerate's
        for name, parameter in named:
            mine = even_share(parameter.numel(), self.rank, self.world)
            yield from adam_slices(name, 0, parameter, adam_state(optimizer, parameter), slice(None), mine)

    def load_from(self, reader: StateReader) -> None:
        """Load the state that any number of workers, with any strategy, wrote."""
        for part in self.slices():
            part.load_from(reader)
        if self.zero:
            load_forward_weights(self.named_parameters(), reader, self.rank)

    def close(self) -> None:
        """Leave the process group and reset global state, so that another engine can start in this process."""
        from accelerate.state import AcceleratorState, GradientState

        self._accelerator.free_memory()
        if dist.is_initialized() and self._deepspeed:
            from deepspeed import comm

            comm.destroy_process_group()  # torch's, and DeepSpeed's record of its groups
        elif dist.is_initialized():
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def _set_environment(*, alone: bool) -> None:
    """Set what a launcher would set, if there is none (nothing, if `alone`), and silence libraries."""
    if alone:
        os.environ.pop("LOCAL_RANK", None)  # otherwise accelerate would wrap the model
    elif "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed searches and warns
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # otherwise accelerate sets torch's threads; Engine does that
    os.environ.pop("ACCELERATE_USE_CPU", None)  # set by `accelerate launch --cpu`; it would drop DeepSpeed
    for name in ("DeepSpeed", "deepspeed", "accelerate", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _refuse_inference_kernel() -> None:
    """Prevent DeepSpeed from compiling its shared-memory all-reduce on CPUs.

    Training never calls it (only `inference_all_reduce` does). Building it takes g++ and tens of seconds, fails the run
    without a compiler, and if killed leaves a lock on which every later run would wait.
    """
    deepspeed = _import_deepspeed()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__ = {}  # checked before building: nothing counts as compatible


def _import_deepspeed() -> ModuleType:
    """Import DeepSpeed without what takes 3 CPU seconds and is not used here: mlflow, and a compiled Muon optimizer."""
    compile_, hidden = torch.compile, "mlflow" not in sys.modules
    try:
        if hidden:
            sys.modules["mlflow"] = None  # type: ignore[assignment]
        torch.compile = lambda function, **_options: function  # type: ignore[assignment]
        import deepspeed
        import deepspeed.runtime.zero.muon.original_muon
    finally:
        torch.compile = compile_
        if hidden:
            del sys.modules["mlflow"]
    return deepspeed


def _keep_transformers_out() -> None:
    """Unset transformers' DeepSpeed configuration: under ZeRO 3 it would shard frozen models too."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def _has_fp16(device: torch.device) -> bool:
    return device.type == "cuda"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
