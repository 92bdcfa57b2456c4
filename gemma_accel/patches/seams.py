"""The two ways in which a patch sits in a module, each with its way back: another class, or an
attribute of the instance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from gemma_accel.errors import RestoreError
from gemma_accel.hookspecs import Patch

__all__ = [
    "ClassSwap",
    "Fused",
    "Undoing",
    "are_watched",
    "home_of",
    "is_watched",
    "set_attribute",
    "swap_class",
]


def home_of(thing: Any) -> str:
    """The top package that a function or class is defined in; empty where it does not say."""
    return (getattr(thing, "__module__", None) or "").split(".")[0]


def is_watched(module: nn.Module) -> bool:
    """Whether somebody watches the module by a hook, its own or one of all modules, or runs
    something else in place of its forward: then it must be called as a module, and not be read.
    """
    return are_watched((module,))


def are_watched(modules: Iterable[nn.Module]) -> bool:
    """Whether somebody watches one of them, or all modules."""
    # the latter by ``torch.nn.modules.module.register_module_forward_hook`` and its like
    return bool(_has_any_global_hook()) or any(map(_has_own_watcher, modules))


def _has_own_watcher(module: nn.Module) -> bool:
    v = vars(module)
    return bool(
        v["_forward_hooks"]
        or v["_forward_pre_hooks"]
        or v["_backward_hooks"]
        or v["_backward_pre_hooks"]
        or "forward" in v
    )


class Undoing:
    """An undo that can say beforehand why it must not run."""

    def __init__(self, run: Callable[[], None], obstacle: Callable[[], str | None]) -> None:
        self._run, self.obstacle = run, obstacle

    def __call__(self) -> None:
        if reason := self.obstacle():
            raise RestoreError(f"{reason}. Undo that first.")
        self._run()


class Fused:
    """Mixin of every class that stands in for a stock one.

    It bears the stock class's name: sharding, device maps, output recorders and `save_pretrained`
    go by it. It pickles as the stock class, without what this package has put into it, so a pickled
    model loads where the package is absent; a deep copy stays what it is.
    """

    stock: ClassVar[type[nn.Module]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.stock = next(
            base
            for base in cls.__mro__[1:]
            if issubclass(base, nn.Module) and not issubclass(base, Fused)
        )
        for name in ("__name__", "__qualname__", "__module__"):
            setattr(cls, name, getattr(cls.stock, name))

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        _, (_, *arguments), state, *rest = reduced
        state = {name: value for name, value in state.items() if not _is_ours(value)}
        return (object.__new__, (self.stock, *arguments), state, *rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        return twin


def _is_ours(value: Any) -> bool:
    """Whether its class, or the function that it is, is this package's."""
    return str(getattr(value, "__module__", "")).startswith("gemma_accel.")


def swap_class(module: Any, fused: type[Fused]) -> Undoing:
    """Give ``module`` the fused class (again, where it already has it) and return the undo to the
    stock one.
    """
    stock = fused.stock
    if type(module) not in (stock, fused):
        raise TypeError(f"swap_class: expected a {stock.__name__}, got {type(module)!r}")
    module.__class__ = fused

    def obstacle() -> str | None:
        if type(module) is stock:
            return None  # somebody restored it already
        if type(module) is not fused:
            return f"a {stock.__name__} was turned into {type(module)!r} since"
        if "forward" in vars(module):
            return f"another library bound its own forward to a patched {stock.__name__} since"
        return None

    def run() -> None:
        module.__class__ = stock

    return Undoing(run, obstacle)


_MISSING = object()


def set_attribute(owner: Any, name: str, value: Any) -> Undoing:
    """Set an attribute of an instance and return the undo, which also knows how to leave it
    unset.
    """
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)

    def obstacle() -> str | None:
        if vars(owner).get(name, _MISSING) not in (value, before):
            return f"{type(owner).__name__}.{name} was set to something else since"
        return None

    def run() -> None:
        if before is _MISSING:
            vars(owner).pop(name, None)
        else:
            setattr(owner, name, before)

    return Undoing(run, obstacle)


class ClassSwap(Patch):
    """A patch that gives modules of one stock class its fused subclass."""

    def __init__(
        self,
        name: str,
        modality: str,
        fused: type[Fused],
        why_not: Callable[[Any], str | None] | None = None,
    ) -> None:
        self.name, self.modality, self.fused = name, modality, fused
        self._why_not = why_not

    def matches(self, path: str, module: nn.Module) -> bool:
        return type(module) in (self.fused.stock, self.fused)

    def why_not(self, module: nn.Module) -> str | None:
        if "forward" in vars(module):
            return "another library bound its own forward here"
        return self._why_not(module) if self._why_not is not None else None

    def install(self, module: nn.Module) -> Undoing:
        return swap_class(module, self.fused)
