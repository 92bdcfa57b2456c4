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
import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4ClippableLinear,
    Gemma4ForConditionalGeneration,
)

from gemma_accel.hookspecs import Patch, Undo
from gemma_accel.kernels.clip import EVERYTHING, Range, clip
from gemma_accel.patches.projections import project_modules
from gemma_accel.patches.seams import ClassSwap, Fused, Undoing, is_watched, set_attribute

__all__ = [
    "FusedGemma4ClippableLinear",
    "Held",
    "TowerLora",
    "TowerSwap",
    "call_each",
    "clipped_adapters_patch",
    "held",
    "prepare_for_peft",
    "project_held",
    "shared_input",
    "spell_out_targets",
    "watched",
]


class Held(NamedTuple):
    """Where a clipped linear holds what it takes and what it gives."""

    input: Range
    output: Range


_FREE = Held(EVERYTHING, EVERYTHING)


class _Ranges:
    """The ranges of one module's clipped linears, read from their buffers once.

    They are numbers on the host, so that kernels take them as arguments; a buffer that is replaced
    or written to is read again.
    """

    def __init__(self, linears: tuple[Gemma4ClippableLinear, ...]) -> None:
        self.linears = linears
        self.seen: list[tuple[dict[str, Any], str, Tensor, int]] = []
        self.by_dtype: dict[torch.dtype, tuple[Held, ...]] = {}
        for linear in linears:
            for name in _BUFFERS if linear.use_clipped_linears else ():
                buffer = linear._buffers[name]
                assert buffer is not None
                self.seen.append((linear._buffers, name, buffer, _version(buffer)))
        # one wait for the device, however many there are
        buffers = [buffer.detach().float().reshape(1) for _, _, buffer, _ in self.seen]
        self.values: list[float] = torch.cat(buffers).tolist() if buffers else []

    def fresh(self, linears: tuple[Gemma4ClippableLinear, ...]) -> bool:
        return all(map(operator.is_, linears, self.linears)) and all(
            buffers[name] is buffer and _version(buffer) == version
            for buffers, name, buffer, version in self.seen
        )

    def in_dtype(self, dtype: torch.dtype) -> tuple[Held, ...]:
        """The ranges as a clamp in ``dtype`` takes them: rounded to it."""
        if dtype not in self.by_dtype:
            rounded = torch.tensor(self.values, dtype=torch.float64).to(dtype).double().tolist()
            values = iter(rounded)
            self.by_dtype[dtype] = tuple(
                Held(*(Range(next(values), next(values)) for _ in range(2)))
                if linear.use_clipped_linears
                else _FREE
                for linear in self.linears
            )
        return self.by_dtype[dtype]


_BUFFERS = ("input_min", "input_max", "output_min", "output_max")
_ranges: WeakKeyDictionary[nn.Module, _Ranges] = WeakKeyDictionary()


def _version(buffer: Tensor) -> int:
    return 0 if buffer.is_inference() else buffer._version


def held(
    owner: nn.Module, linears: tuple[Gemma4ClippableLinear, ...], dtype: torch.dtype
) -> tuple[Held, ...]:
    """The ranges of the clipped linears that ``owner`` holds, for activations of ``dtype``."""
    ranges = _ranges.get(owner)
    if ranges is None or not ranges.fresh(linears):
        ranges = _ranges[owner] = _Ranges(linears)
    return ranges.in_dtype(dtype)


def shared_input(*linears: Held) -> Range | None:
    """The input range that several clipped linears have in common, None where they differ."""
    first = linears[0].input
    return first if all(linear.input == first for linear in linears) else None


def watched(*linears: Any) -> bool:
    """Whether any of these is not just a clipped linear: replaced, or with a hook or forward of its
    own. Then it must be called as a module."""
    return any(
        not isinstance(linear, Gemma4ClippableLinear) or is_watched(linear) for linear in linears
    )


def call_each(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """Projections that share an input, one module call each; `TowerLora` sets another."""
    return tuple(linear(x) for linear in linears)


def project_held(
    project: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    linears: tuple[Any, ...],
    ranges: tuple[Held, ...],
    *,
    is_held: bool = False,
) -> tuple[Tensor, ...]:
    """The products of clipped linears that share an input: held before, not yet after.

    They are one group where they hold the input alike; ``is_held`` says that somebody did so.
    """
    common = shared_input(*ranges)
    if common is not None:
        return project(x if is_held else clip(x, common), *(each.linear for each in linears))
    pairs = zip(linears, ranges, strict=True)
    return tuple(project(clip(x, to.input), each.linear)[0] for each, to in pairs)


class FusedGemma4ClippableLinear(Fused, Gemma4ClippableLinear):
    """On its own: where a fused block holds it, the block takes the ranges and the inner linear."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self.use_clipped_linears:
            return self.linear(hidden_states)
        (ranges,) = held(self, (self,), hidden_states.dtype)
        out = self.linear(clip(hidden_states, ranges.input))
        if out.dtype != hidden_states.dtype:  # under autocast
            (ranges,) = held(self, (self,), out.dtype)
        return clip(out, ranges.output)


class TowerSwap(ClassSwap):
    """A class swap inside one tower: both have clipped linears."""

    def __init__(
        self, name: str, modality: str, tower: str, fused: type[Fused], *args: Any
    ) -> None:
        super().__init__(name, modality, fused, *args)
        self.tower = tower

    def matches(self, path: str, module: nn.Module) -> bool:
        return super().matches(path, module) and self.tower in path


class TowerLora(Patch):
    """Sets the projections' seam of a tower's fused blocks: see the text model's ``lora``."""

    seam = "project"

    def __init__(self, name: str, modality: str, fused: dict[type[nn.Module], str]) -> None:
        self.name, self.modality, self.fused = name, modality, fused

    def matches(self, path: str, module: nn.Module) -> bool:
        return self.needs(module) is not None

    def needs(self, module: nn.Module) -> str | None:
        return self.fused.get(type(module).stock if isinstance(module, Fused) else type(module))

    def install(self, module: nn.Module) -> Undoing:
        return set_attribute(module, "project", project_modules)


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

    BaseTuner.inject_adapter = inject_adapter  # type: ignore[method-assign]


def _unwrap_injection() -> None:
    global _stock_inject
    from peft.tuners.tuners_utils import BaseTuner

    if getattr(BaseTuner.inject_adapter, "__wrapped__", None) is _stock_inject:
        BaseTuner.inject_adapter = _stock_inject  # type: ignore[method-assign, assignment]
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
