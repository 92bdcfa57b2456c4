"""Whether a replay has to draw again what the forward drew."""

from __future__ import annotations

import functools
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

__all__ = ["draws"]


def draws(module: nn.Module) -> bool:
    """Whether the layer, or block, may draw random numbers now: a checkpoint then has to save their
    state and put it back, which costs a launch-bound step some.

    Asked at every forward, and so made cheap: adapters come and go.
    """
    for each in module.modules():
        kind: Any = type(each)
        attributes: dict[str, Any] = vars(each)
        if _is_dropout(kind) and attributes["p"] > 0:
            return True
        if attributes.get("attention_dropout", 0.0) > 0 or _draws_by_itself(kind):
            return True
    return False


@functools.cache
def _is_dropout(kind: type) -> bool:
    return issubclass(kind, nn.modules.dropout._DropoutNd)


@functools.cache
def _draws_by_itself(kind: type) -> bool:
    """Of PEFT's methods only LoRA has all its dropout in modules."""
    return issubclass(kind, BaseTunerLayer) and not issubclass(kind, LoraLayer)
