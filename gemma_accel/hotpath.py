"""What a Trainer does at every step that has the same result as the step before.

Each step it walks all modules of the model to set them to train mode, and all parameters to count
them for its FLOP statistics: thousands of each for E2B with adapters, and a good part of a short
step's Python (benchmarks/LOG.md). Both answers are remembered while a training runs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

from gemma_accel.models import base_model

__all__ = ["remembered"]


@contextlib.contextmanager
def remembered(model: nn.Module) -> Iterator[None]:
    """While open, ``model.train()`` does nothing where it was the last to be called with that mode,
    and parameters are counted once.
    """
    base: Any = base_model(model)
    owners: list[tuple[Any, str]] = []
    for owner, name, replacement in (
        (base, "num_parameters", functools.cache(base.num_parameters)),
        (model, "train", _train_once(model, base)),
    ):
        if replacement is not None and name not in vars(owner):
            setattr(owner, name, replacement)
            owners.append((owner, name))
    try:
        yield
    finally:
        for owner, name in owners:
            vars(owner).pop(name, None)


def _train_once(model: nn.Module, base: nn.Module) -> Any:
    """`train` that walks the modules only when the mode changes; None where a module's own mode
    makes a difference.

    Somebody may set single modules to another mode between two steps, which stock's walk would
    undo. That is only seen where a module computes something else in train mode, and where the
    whole model inside PEFT's was set: its layers are not checkpointed then.
    """
    if any(_differs_in_training(module) for module in model.modules()):
        return None
    stock, last = model.train, None

    def train(mode: bool = True) -> nn.Module:
        nonlocal last
        if mode is not last or base.training is not mode:
            stock(mode)
            last = mode
        return model

    return train


def _differs_in_training(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.modules.batchnorm._NormBase)
