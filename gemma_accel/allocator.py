"""How PyTorch's CUDA allocator is set up for a run that lives near its limit.

Two settings, both of the process. A cap (`hold_to`), so that the allocator gives back what it
caches before it grows past the budget. And expandable segments (`expand_segments`): a block that
grows in place, page by page, where separate segments leave holes that no later tensor fits. E2B at
2 x 2048 tokens in 3 GiB runs with them and dies of holes without (benchmarks/LOG.md).
"""

from __future__ import annotations

import functools
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["expand_segments", "hold_to"]

_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
# several models of one process share its allocator: who wants what of it, until they let go
_caps: dict[int, dict[object, float]] = {}
"""By device, the fractions of its memory that are asked for, that of before the first among them.
"""
_growing: set[object] = set()


def hold_to(gib: float, device: torch.device) -> Callable[[], None]:
    """Hold the allocator to ``gib``, unless it is held to less already; returns the undo.

    Of several limits the least holds, and each for as long as it is not undone.
    """
    index = device.index if device.type == "cuda" else None
    index = torch.cuda.current_device() if index is None else index
    total = torch.cuda.get_device_properties(index).total_memory
    asked = _caps.setdefault(index, {"before": torch.cuda.get_per_process_memory_fraction(index)})
    holder = object()
    asked[holder] = gib * 2**30 / total
    torch.cuda.set_per_process_memory_fraction(min(asked.values()), index)
    return functools.partial(_let_go, index, asked, holder)


def _let_go(index: int, asked: dict[object, float], holder: object) -> None:
    if asked.pop(holder, None) is None:
        return
    torch.cuda.set_per_process_memory_fraction(min(asked.values()), index)
    if len(asked) == 1:
        del _caps[index]


def expand_segments() -> Callable[[], None]:
    """Let the allocator's segments grow from now on, until nobody needs it any more; returns the
    undo.

    Not where the user has set the allocator up (``PYTORCH_CUDA_ALLOC_CONF``), nor where the driver
    cannot be trusted with it: outside Linux, and on WSL2 (pytorch/pytorch issue 192330).
    """
    if not torch.cuda.is_available() or not _may_expand():
        return lambda: None
    if not _growing:
        _set("expandable_segments:True")
    holder = object()
    _growing.add(holder)
    return functools.partial(_stop_expanding, holder)


def _stop_expanding(holder: object) -> None:
    if holder in _growing:
        _growing.remove(holder)
        if not _growing:
            _set("expandable_segments:False")


def _may_expand() -> bool:
    is_set = any(os.environ.get(name) for name in _SETTINGS)
    return not is_set and sys.platform == "linux" and "microsoft" not in platform.release().lower()


def _set(settings: str) -> None:
    # the newer name is the only one that does not warn; torch 2.9 knows both or the older one
    module: Any = torch._C
    setter = getattr(module, "_accelerator_setAllocatorSettings", None)
    (setter or torch.cuda.memory._set_allocator_settings)(settings)
