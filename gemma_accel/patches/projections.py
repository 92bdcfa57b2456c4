"""Linear layers as PEFT and bitsandbytes left them, seen as one autograd step over what they really
compute.

Everything is read at call time, so it does not matter whether PEFT wraps before or after `apply`,
and adapters may be switched, disabled or merged between steps. What the fused step does not cover
comes back as the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from gemma_accel.kernels.lora import Projection, project
from gemma_accel.kernels.nf4 import nf4_refusal, nf4_weight
from gemma_accel.patches.seams import is_watched

__all__ = [
    "as_projection",
    "project_modules",
    "project_rows",
    "read_all",
    "rows_apart",
    "several_dtypes",
]


_WATCHED = "somebody watches the layer by a hook, or bound another forward to it"


def read_all(linears: Sequence[nn.Module], x: Tensor) -> list[Projection] | None:
    """What each of a group computes now; None where one of them cannot be read."""
    projections = []
    for linear in linears:
        projection = as_projection(linear, x)
        if isinstance(projection, str):
            return None
        projections.append(projection)
    if several_dtypes(projections) and not torch.is_autocast_enabled(x.device.type):
        return None  # PEFT casts for each by itself
    return projections


def several_dtypes(projections: Sequence[Projection]) -> bool:
    """Whether their adapters' parameters differ in dtype, which one step has one of."""
    return len({x.dtype for p in projections for x in (p.lora_a, p.lora_b) if x is not None}) > 1


def project_modules(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """``linear(x)`` for each, as one step where all can be read, else each by its own forward."""
    projections = read_all(linears, x)
    if projections is None:
        return tuple(linear(x) for linear in linears)
    return project(x, *projections)


def rows_apart(linear: nn.Module, x: Tensor) -> bool:
    """Whether some of ``linear``'s outputs can be had from their rows alone, and had better be.

    Not of a trained dense weight: each slice would leave a gradient of the whole weight's size.
    """
    projection = as_projection(linear, x)
    return not isinstance(projection, str) and not (
        isinstance(projection.weight, Tensor) and projection.weight.requires_grad
    )


def project_rows(linear: nn.Module, x: Tensor, start: int, stop: int) -> Tensor:
    """``linear(x)[..., start:stop]`` from those rows alone, where `rows_apart` says yes."""
    projection = as_projection(linear, x)
    assert isinstance(projection, Projection), projection
    return project(x, projection._replace(rows=(start, stop)))[0]


def as_projection(linear: nn.Module, x: Tensor | None = None) -> Projection | str:
    """What ``linear`` computes now, or the reason (a sentence's end) why only its own forward can.

    Where ``x`` is given, what depends on its dtype is looked at too.
    """
    if not isinstance(linear, LoraLayer):
        base = _base(linear, x)
        return base if isinstance(base, str) else Projection(*base)
    base = _base(linear.base_layer, x)
    if isinstance(base, str):
        return base
    if is_watched(linear):
        return _WATCHED
    if linear.disable_adapters:
        return "adapters are disabled while merged" if linear.merged else Projection(*base)
    if linear.merged:
        return Projection(*base)
    active = [name for name in linear.active_adapters if name in linear.lora_A]
    if not active:
        return Projection(*base)
    if len(active) > 1:
        return "several adapters are active at once"
    return _adapted(linear, active[0], base)


def _base(linear: nn.Module, x: Tensor | None) -> tuple[Any, Any] | str:
    """Weight and bias of an unadapted layer."""
    if is_watched(linear):
        return _WATCHED
    if type(linear) is nn.Linear and type(linear.weight) in (nn.Parameter, Tensor):
        return linear.weight, linear.bias
    # bitsandbytes', not the class of that name which some PEFT methods have
    if type(linear).__name__ == "Linear4bit" and "base_layer" not in linear._modules:
        if refusal := nf4_refusal(linear.weight):
            return refusal
        computes = linear.compute_dtype if linear.compute_type_is_set else None
        if (
            x is not None
            and computes not in (None, x.dtype)
            and not torch.is_autocast_enabled(x.device.type)
        ):
            return f"bnb_4bit_compute_dtype is {computes}, the layer's input {x.dtype}"
        return nf4_weight(linear.weight), linear.bias
    return f"{type(linear).__name__} is quantised in a way the fused step does not read"


def _adapted(linear: Any, name: str, base: tuple[Any, Any]) -> Projection | str:
    if linear.lora_variant.get(name) is not None or getattr(linear, "use_dora", {}).get(name):
        return "the adapter is a LoRA variant (DoRA, aLoRA, ...)"
    dropout = linear.lora_dropout[name]
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"lora_dropout is a {type(dropout).__name__}"
    if dropout.training and getattr(dropout, "p", 0.0) > 0.0:
        return f"lora_dropout is {dropout.p}"
    lora_a, lora_b = linear.lora_A[name], linear.lora_B[name]
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
        return f"the adapter's factors are {type(lora_a).__name__}"  # AdaLoRA's are a Parameter
    if is_watched(lora_a) or is_watched(lora_b) or is_watched(dropout):
        return _WATCHED
    if lora_b.bias is not None or lora_a.bias is not None:
        return "the adapter has a bias (lora_bias)"
    return Projection(*base, lora_a.weight, lora_b.weight, linear.scaling[name])
