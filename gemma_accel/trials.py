"""A call that is only tried: what the objects it belongs to keep of it is put back."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor

__all__ = ["untouched"]

_MOST = 1000
"""Entries of a tally; what is longer is data, and is not looked into."""


@contextlib.contextmanager
def untouched(*owners: Any) -> Iterator[None]:
    """Inside, ``owners`` may count and collect as they like; their attributes, and the lists,
    dictionaries and small tensors that these and their classes' hold, are as they were after it.
    """
    states = [vars(owner) for owner in owners if hasattr(owner, "__dict__")]
    attributes = [(state, dict(state)) for state in states]
    classes = [vars(kind) for owner in owners for kind in type(owner).__mro__]
    seen: dict[int, tuple[Any, Any]] = {}
    for state in (*states, *classes):
        for name, value in state.items():
            if not name.startswith("__"):
                _look_into(value, seen)
    try:
        yield
    finally:
        for state, before in attributes:
            for name in state.keys() - before.keys():
                del state[name]
            state.update(before)
        for value, before in seen.values():
            _put_back(value, before)


def _look_into(value: Any, seen: dict[int, tuple[Any, Any]]) -> None:
    if id(value) in seen:
        return
    if isinstance(value, Tensor):
        if value.numel() <= _MOST and not value.requires_grad and not value.is_inference():
            seen[id(value)] = value, value.clone()
    elif isinstance(value, list | set | deque | dict) and len(value) <= _MOST:
        seen[id(value)] = value, dict(value) if isinstance(value, dict) else list(value)
        for each in value.values() if isinstance(value, dict) else value:
            _look_into(each, seen)


def _put_back(value: Any, before: Any) -> None:
    if isinstance(value, Tensor):
        value.copy_(before)
        return
    value.clear()
    value.update(before) if isinstance(value, dict | set) else value.extend(before)
