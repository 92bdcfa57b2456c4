"""Which activation a module has: the object that its forward calls, whatever its config says."""

from __future__ import annotations

from torch import nn
from transformers.activations import ACT2FN

from gemma_accel.patches.seams import is_watched

__all__ = ["why_not_gelu", "why_not_silu"]

_GELU, _SILU = type(ACT2FN["gelu_pytorch_tanh"]), type(ACT2FN["silu"])


def why_not_gelu(activation: nn.Module) -> str | None:
    """Why a kernel that computes the GELU by tanh does not stand for ``activation``, if so."""
    return _why_not(activation, _GELU, "gelu_pytorch_tanh")


def why_not_silu(activation: nn.Module) -> str | None:
    """The same of a kernel that computes the SiLU."""
    return _why_not(activation, _SILU, "silu")


def _why_not(activation: nn.Module, kind: type, name: str) -> str | None:
    if type(activation) is not kind:
        return f"activation is {type(activation).__name__}; the kernel computes {name!r}"
    return "the activation is watched by a hook" if is_watched(activation) else None
