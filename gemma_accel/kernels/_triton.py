"""Triton where it is installed, and the two questions every op asks about it.

Triton ships for Linux (and Windows, as a separate build). Elsewhere the package still imports and
every op runs its PyTorch reference, so the names below must exist without it.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # no Triton on this platform: kernels are defined but never launched

    class _Absent:
        """Stands in for ``triton`` and ``triton.language`` while kernels are being defined."""

        def jit(self, fn: Any = None, **_: Any) -> Any:
            return fn if fn is not None else (lambda f: f)

        def __getattr__(self, name: str) -> Any:
            raise ImportError("gemma_accel: this op's kernel needs Triton, which is not installed")

    triton = tl = _Absent()
    HAS_TRITON = False

__all__ = ["HAS_TRITON", "interpreting", "triton", "tl", "use_kernel"]


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU (``TRITON_INTERPRET=1``), for tests."""
    return HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_kernel(x: Tensor) -> bool:
    """Whether an op on ``x`` takes its Triton kernel: on CUDA always, on the CPU when interpreting.

    Every other device, fake or meta tensors, and tensors without columns take the PyTorch
    reference: there is no tile for a width of zero.
    """
    if isinstance(x, torch._subclasses.FakeTensor) or not (x.dim() and x.shape[-1]):
        return False
    return x.is_cuda or (x.device.type == "cpu" and interpreting())
