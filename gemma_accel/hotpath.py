"""What a Trainer does at every step that has the same result as the step before.

Each step it walks all modules of the model to set them to train mode, to count parameters for its
FLOP statistics, to clip gradients and to zero them: thousands of each for E2B with adapters, and a
good part of a short step's Python (benchmarks/LOG.md). The answers are remembered while a training
runs.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as registration

from gemma_accel.models import base_model, text_model

__all__ = ["remembered"]


@contextlib.contextmanager
def remembered(model: nn.Module) -> Iterator[None]:
    """While open, ``model.train()`` does nothing where it was the last to be called with that mode,
    parameters are counted once, and found once for as long as none is registered anywhere.
    """
    base: Any = base_model(model)
    wanted: list[_Stand] = [_Count(base, "num_parameters")]
    if not any(_differs_in_training(module) for module in model.modules()):
        wanted.append(_Train(model, "train"))
    found = _Parameters(model, "parameters")
    stands = [stand for stand in (*wanted, found) if stand.name not in vars(stand.owner)]
    for stand in stands:
        setattr(stand.owner, stand.name, stand)
    hooks = [
        register(found.forget)
        for register in (
            registration.register_module_parameter_registration_hook,
            registration.register_module_module_registration_hook,
        )
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for stand in stands:
            vars(stand.owner).pop(stand.name, None)


class _Stand:
    """In the place of a module's method. A copy of the module has the method itself there."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner, self.name, self.stock = owner, name, getattr(owner, name)

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)  # found in its class: it has no attributes yet


class _Count(_Stand):
    """Of all parameters: how many are trained a callback may change."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__(owner, name)
        self._known: dict[bool, int] = {}

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        if only_trainable:
            return self.stock(only_trainable, exclude_embeddings)
        if exclude_embeddings not in self._known:
            self._known[exclude_embeddings] = self.stock(False, exclude_embeddings)
        return self._known[exclude_embeddings]


class _Train(_Stand):
    """Walks the modules only when the mode changes.

    Somebody may set single modules to another mode between two steps, which stock's walk would
    undo. That is only seen where a module computes something else in train mode (there is no
    stand-in then), and where the whole model inside PEFT's was set, or its text model: its layers
    are not checkpointed then.
    """

    _last: bool | None = None

    def __call__(self, mode: bool = True) -> nn.Module:
        base = base_model(self.owner)
        as_left = base.training is mode and text_model(base).training is mode
        if mode is not self._last or not as_left:
            self.stock(mode)
            self._last = mode
        return self.owner


def _differs_in_training(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.modules.batchnorm._NormBase)


class _Parameters(_Stand):
    """Weakly: one that was replaced is not held, and makes the others be looked for again."""

    _known: list[weakref.ref[nn.Parameter]] | None = None

    def __call__(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        if not recurse:
            yield from self.stock(recurse)
            return
        alive = [p for known in self._known or () if (p := known()) is not None]
        if self._known is None or len(alive) < len(self._known):
            alive = list(self.stock())
            self._known = [weakref.ref(parameter) for parameter in alive]
        yield from alive

    def forget(self, *_: Any) -> None:
        """Something was registered in some module: this one's may be others now."""
        self._known = None
