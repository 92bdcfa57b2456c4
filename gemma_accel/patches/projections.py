"""Linear layers as PEFT and bitsandbytes left them, seen as one autograd step over what they really compute.

Everything is read at call time, so it does not matter whether PEFT wraps before or after `apply`, and adapters may be switched,
disabled or merged between steps. What the fused step does not cover goes through the module's own forward, with the reason noted.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gemma_accel.kernels.lora import Projection, project
from gemma_accel.kernels.nf4 import nf4_weight

__all__ = ["project_rows"]


def project_rows(linear: nn.Module, x: Tensor, start: int, stop: int) -> Tensor | None:
    """``linear(x)[..., start:stop]`` from those rows of a frozen weight alone; None where they cannot be had apart."""
    weight = _frozen_weight(linear)
    if weight is None:
        return None
    return project(x, Projection(weight, None, None, None, 1.0, (start, stop)))[0]


def _frozen_weight(linear: nn.Module) -> Any:
    if type(linear) is nn.Linear and linear.bias is None and not linear.weight.requires_grad:
        return linear.weight
    if type(linear).__name__ == "Linear4bit" and linear.bias is None:
        return nf4_weight(linear.weight)
    return None
