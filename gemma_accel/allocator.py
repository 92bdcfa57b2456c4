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
_expanding = False


def hold_to(gib: float, device: torch.device) -> Callable[[], None]:
    """Hold the allocator to ``gib``, unless it is held to less already; returns the undo."""
    index = device.index if device.type == "cuda" else None
    before = torch.cuda.get_per_process_memory_fraction(index)
    total = torch.cuda.get_device_properties(index or torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(before, gib * 2**30 / total), index)
    return functools.partial(torch.cuda.set_per_process_memory_fraction, before, index)


def expand_segments() -> Callable[[], None]:
    """Let the allocator's segments grow from now on; returns the undo.

    Not where the user has set the allocator up (``PYTORCH_CUDA_ALLOC_CONF``), nor where the driver
    cannot be trusted with it: outside Linux, and on WSL2 (pytorch/pytorch issue 192330).
    """
    global _expanding
    if _expanding or not torch.cuda.is_available() or not _may_expand():
        return lambda: None
    _set("expandable_segments:True")
    _expanding = True
    return _stop_expanding


def _stop_expanding() -> None:
    global _expanding
    _set("expandable_segments:False")
    _expanding = False


def _may_expand() -> bool:
    is_set = any(os.environ.get(name) for name in _SETTINGS)
    return not is_set and sys.platform == "linux" and "microsoft" not in platform.release().lower()


def _set(settings: str) -> None:
    # the newer name is the only one that does not warn; torch 2.9 knows both or the older one
    module: Any = torch._C
    setter = getattr(module, "_accelerator_setAllocatorSettings", None)
    (setter or torch.cuda.memory._set_allocator_settings)(settings)
