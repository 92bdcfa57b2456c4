"""What an applied model does not mix with, said before the first step, and what it has to be told
to mix well.

Kernels read whole weights at their addresses, and attention sees the whole sequence of its rows. So
data parallelism with one process a GPU (DDP) fits, and whatever splits weights or sequences, or
copies the modules within a process, does not. `torch.compile` fits in that the patched parts stay
out of it: traced, they would fall into dozens of graphs and gain nothing.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from gemma_accel.errors import UnsupportedTrainingError
from gemma_accel.hookspecs import Undo
from gemma_accel.models import text_model
from gemma_accel.report import Report

__all__ = ["check_trainer", "guard_model", "why_not_train"]


# ---- torch.compile

_OUTSIDE = "gemma_accel's kernels are fused by hand; traced, they would only be cut to pieces"


@torch.compiler.disable(reason=_OUTSIDE)
def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self._call_impl(*args, **kwargs)


def guard_model(base: nn.Module, report: Report) -> Undo:
    """Let `torch.compile` step around everything below the head of ``base``, whether it is called
    on the model, on a part of it, or asked for in the training arguments; returns the undo.

    Raises:
        UnsupportedTrainingError: DeepSpeed ZeRO-3 is on, and the weights are not all here.
    """
    if is_deepspeed_zero3_enabled():
        raise UnsupportedTrainingError(_sentence(_DEEPSPEED))
    inner: Any = base.model
    towers = (getattr(inner, f"{name}_tower", None) for name in ("vision", "audio"))
    modules: list[Any] = [inner, text_model(base), *(t for t in towers if t is not None)]
    for module in modules:
        # the seam of `nn.Module.compile`: `__call__` goes there first. Bound as a method, so that a
        # deep copy's is its own; it is not pickled.
        module._compiled_call_impl = types.MethodType(_call, module)
    report.note("torch.compile", "steps around what is below the head: kernels fused by hand")

    def undo() -> None:
        for module in modules:
            ours = vars(module).get("_compiled_call_impl")
            if getattr(ours, "__func__", None) is _call:
                del module._compiled_call_impl

    return undo


# ---- many processes, many devices

_DDP = (
    "Use data parallelism with one process a GPU: accelerate launch --multi_gpu (no FSDP, no "
    "DeepSpeed, no parallelism_config), or torchrun; what needed splitting fits one GPU here. "
    "Or train the stock model: report.restore(), or GEMMA_ACCEL_DISABLE=1."
)
_DEEPSPEED = (
    "DeepSpeed: ZeRO splits parameters or broadcasts all of them, also the table that stays in "
    "host memory."
)
_FSDP = (
    "FSDP: it splits parameters, also the table that stays in host memory, which the kernels read "
    "at one address."
)


def why_not_train(trainer: Any) -> str | None:
    """The reason why ``trainer`` must not train an applied model, with what to do instead; None
    where it may.
    """
    found = next(_obstacles(trainer.args, trainer.accelerator), None)
    return None if found is None else _sentence(found)


def _sentence(obstacle: str) -> str:
    return f"gemma_accel does not support {obstacle} {_DDP}"


def _obstacles(args: Any, accelerator: Any) -> Iterator[str]:
    state = accelerator.state
    kind = accelerator.distributed_type
    if kind == "DEEPSPEED" or args.deepspeed or getattr(state, "deepspeed_plugin", None):
        yield _DEEPSPEED
    if kind == "FSDP" or args.fsdp or getattr(state, "fsdp_plugin", None):
        yield _FSDP
    if kind in ("MEGATRON_LM", "XLA"):
        yield f"accelerate's distributed type {kind.value}: its models or its devices are others."
    parallel = getattr(accelerator, "parallelism_config", None)
    for name, what in (("tp", "tensor"), ("cp", "context"), ("sp", "sequence")):
        if getattr(parallel, f"{name}_enabled", False):
            yield (
                f"{what} parallelism: kernels read whole weights, and attention would not see the "
                "other devices' part of the sequence."
            )
    if args.n_gpu > 1:
        yield (
            f"torch.nn.DataParallel, which Trainer takes by itself where one process sees "
            f"{args.n_gpu} GPUs: it copies the modules at every step. For one GPU set "
            "CUDA_VISIBLE_DEVICES=0."
        )


def check_trainer(trainer: Any, report: Report) -> None:
    """Refuse a trainer that would train otherwise than stock; keep DDP off what is not on its
    device.

    Raises:
        UnsupportedTrainingError: `why_not_train` says why.
    """
    if reason := why_not_train(trainer):
        raise UnsupportedTrainingError(reason)
    if trainer.args.world_size > 1:
        names = _kept_elsewhere(trainer.model)
        known = getattr(trainer.model, "_ddp_params_and_buffers_to_ignore", [])
        trainer.model._ddp_params_and_buffers_to_ignore = sorted({*known, *names})
        if names:
            report.note(
                "processes",
                f"{trainer.args.world_size}; DDP passes by what stays in host memory "
                f"({len(names)} tensors)",
            )


def _kept_elsewhere(model: nn.Module) -> set[str]:
    """Names of what DDP must not touch: the table, of which its first broadcast would make a copy
    in every process (and could not, from host memory, on GPUs), and parked towers.
    """
    from gemma_accel.patches.per_layer import HostPerLayerEmbedding

    names: set[str] = set()
    for path, module in model.named_modules():
        parked = getattr(module, "_gemma_accel_parked", None) is not None
        if not parked and type(module) is not HostPerLayerEmbedding:
            continue
        tensors = [*module.named_parameters(), *module.named_buffers()]
        names.update(
            f"{path}.{name}"
            for name, tensor in tensors
            if not tensor.requires_grad and (parked or name == "weight")
        )
    return names
