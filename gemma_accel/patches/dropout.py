"""Whether a replay has to draw again what the forward drew."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

__all__ = ["draws"]


def draws(module: nn.Module) -> bool:
    """Whether the layer, or block, may draw random numbers now: a checkpoint then has to save their
    state and put it back, which costs a launch-bound step some.

    Asked at every forward: adapters come and go. Of PEFT's methods only LoRA has all its dropout in
    modules.
    """
    return any(map(_draws, module.modules()))


def _draws(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, BaseTunerLayer):
        return not isinstance(module, LoraLayer)
    return getattr(module, "attention_dropout", 0.0) > 0
