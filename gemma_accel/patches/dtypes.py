"""Which dtypes the kernels take, asked once at install time."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["why_not_dtype"]

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_dtype(weight: Tensor) -> str | None:
    """The refusal for a module whose weights are in a dtype no kernel takes, else None."""
    if weight.dtype in _KERNEL_DTYPES:
        return None
    return f"its weights are {weight.dtype}; the kernels take float32, bfloat16 and float16"
