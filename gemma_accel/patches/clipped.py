"""Clipped linears: the towers' projections, each a plain linear between two clamps, and what PEFT
must know of them.

`Gemma4ClippableLinear` is no `nn.Linear`; it holds one, named ``linear``. A list of names such as
``["q_proj", "v_proj"]`` therefore stops stock PEFT at the first tower (peft#3129). Adapters belong
on the inner linear, between the clamps, where a stock model and a stock PEFT find them again. So
before PEFT injects an adapter into a prepared model, its configuration is spelled out: where a
target names a clipped linear, the inner linear's full name takes its place. That is what PEFT
itself makes of ``"all-linear"``, and what it saves.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4ClippableLinear,
    Gemma4ForConditionalGeneration,
)

from gemma_accel.hookspecs import Patch, Undo

__all__ = ["clipped_adapters_patch", "prepare_for_peft", "spell_out_targets"]

_prepared: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_stock_inject: Callable[..., Any] | None = None


def prepare_for_peft(model: nn.Module) -> Undo:
    """Let PEFT adapt ``model``'s clipped linears by name; returns the undo.

    Acts on this model alone: PEFT's injection is wrapped once for the process and passes every
    other model by.
    """
    _prepared[model] = _prepared.get(model, 0) + 1
    _wrap_injection()
    held = True

    def let_go() -> None:
        nonlocal held
        if not held:
            return
        held = False
        _prepared[model] -= 1
        if not _prepared[model]:
            del _prepared[model]
        if not _prepared:
            _unwrap_injection()

    return let_go


def _wrap_injection() -> None:
    global _stock_inject
    from peft.tuners.tuners_utils import BaseTuner

    if _stock_inject is not None:
        return
    stock = _stock_inject = BaseTuner.inject_adapter

    @functools.wraps(stock)
    def inject_adapter(
        self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        if self.model in _prepared:
            spell_out_targets(self, self.peft_config[adapter_name])
        return stock(self, model, adapter_name, *args, **kwargs)

    BaseTuner.inject_adapter = inject_adapter


def _unwrap_injection() -> None:
    global _stock_inject
    from peft.tuners.tuners_utils import BaseTuner

    if getattr(BaseTuner.inject_adapter, "__wrapped__", None) is _stock_inject:
        BaseTuner.inject_adapter = _stock_inject
    _stock_inject = None


def spell_out_targets(tuner: Any, config: Any) -> None:
    """Name each target of ``config`` in full, a clipped linear by its inner one; in place.

    A configuration that hits no clipped linear stays as it is, and so does one that PEFT resolves
    by itself (``"all-linear"``, none).
    """
    from peft.utils.constants import DUMMY_TARGET_MODULES, INCLUDE_LINEAR_LAYERS_SHORTHAND

    targets = getattr(config, "target_modules", None)
    if not targets or targets == DUMMY_TARGET_MODULES:
        return
    if getattr(config, "feedforward_modules", None):
        return  # IA3 matches these by suffixes of their own, which full names would not meet
    if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    keys = _keys_outside_adapters(tuner.model)
    matched = [key for key in keys if tuner._check_target_module_exists(config, key)]
    clipped = {key for key in matched if isinstance(keys[key], Gemma4ClippableLinear)}
    if not clipped:
        return
    names = {f"{key}.linear" if key in clipped else key for key in matched}
    config.target_modules = {name for name in names if not _excluded(tuner, config, name)}
    for attribute in ("rank_pattern", "alpha_pattern"):
        if pattern := getattr(config, attribute, None):
            setattr(config, attribute, {_inner(k, clipped): v for k, v in pattern.items()})


def _keys_outside_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name, without what lies inside an adapter that is already there."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    keys: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for key, module in model.named_modules():
        if not key or key.startswith(inside):
            continue
        keys[key] = module
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{key}.")
    return keys


def _excluded(tuner: Any, config: Any, name: str) -> bool:
    from peft.tuners.tuners_utils import _ExcludedModule

    return isinstance(tuner._check_target_module_exists(config, name), _ExcludedModule)


def _inner(pattern: str, clipped: set[str]) -> str:
    """A rank or alpha pattern, made to name the inner linear too where it names a clipped one."""
    named = re.compile(rf"(.*\.)?({pattern})$")  # how PEFT reads it
    return rf"(?:{pattern})(?:\.linear)?" if any(map(named.match, clipped)) else pattern


class _ClippedAdapters(Patch):
    """PEFT's view of the model: adapters on the towers' projections by name."""

    name, modality, seam = "clipped_adapters", "vision", "peft"

    def matches(self, path: str, module: nn.Module) -> bool:
        return isinstance(module, Gemma4ForConditionalGeneration) and any(
            isinstance(child, Gemma4ClippableLinear) for child in module.modules()
        )

    def install(self, module: nn.Module) -> Undo:
        return prepare_for_peft(module)


clipped_adapters_patch = _ClippedAdapters()
