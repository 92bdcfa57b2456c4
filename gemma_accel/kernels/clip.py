"""Clamping to a range, ``y = min(max(x, low), high)``, alone or inside other ops.

The towers clamp what goes into and what comes out of every projection. The gradient is that of
``torch.clamp``: it passes inside the range and at its ends. Stock spends two launches on a clamp
and five on its gradient; other ops take the range as an argument and spend none.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_accel.kernels._triton import tl, triton, use_kernel
from gemma_accel.kernels.rms_norm import FLOATS


class Range(NamedTuple):
    """Where values are held. Ends are taken in the clamped tensor's dtype: round them to it."""

    low: float
    high: float

    @property
    def bounded(self) -> bool:
        return self.low > -math.inf or self.high < math.inf


EVERYTHING = Range(-math.inf, math.inf)


def clip_ref(x: Tensor, to: Range) -> Tensor:
    return x.clamp(*to) if to.bounded else x


@triton.jit
def clipped(x, low, high):
    """``x`` held in the range; NaN stays NaN."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def inside(x, low, high):
    """Where a gradient passes."""
    return (x >= low) & (x <= high)


@triton.jit
def _clip_fwd_kernel(x_ptr, y_ptr, n, low, high, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n).to(tl.float32)
    tl.store(y_ptr + at, clipped(x, low, high).to(y_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def _clip_bwd_kernel(dy_ptr, x_ptr, dx_ptr, n, low, high, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=at < n)
    tl.store(dx_ptr + at, tl.where(inside(x, low, high), dy, 0.0), mask=at < n)


BLOCK = 2048


def clip_fwd(x: Tensor, to: Range) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    n = x.numel()
    _clip_fwd_kernel[(triton.cdiv(n, BLOCK),)](x, y, n, *to, BLOCK=BLOCK, num_warps=4)
    return y


def clip_bwd(dy: Tensor, x: Tensor, to: Range) -> Tensor:
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(dy)
    n = x.numel()
    _clip_bwd_kernel[(triton.cdiv(n, BLOCK),)](dy, x, dx, n, *to, BLOCK=BLOCK, num_warps=4)
    return dx


class ClipFunction(torch.autograd.Function):
    """Saves ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to: Range) -> Tensor:
        ctx.to = to
        ctx.save_for_backward(x)
        return clip_fwd(x, to)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return clip_bwd(dy, x, ctx.to), None


def clip(x: Tensor, to: Range) -> Tensor:
    """``x`` held in a range; ``x`` itself where the range is everything.

    Replaces:
        ``torch.clamp(x, low, high)`` with ends that are tensors of one element
    Shapes:
        ``x`` any; returns the same shape, contiguous. Saved: ``x``.
    Numerics:
        Exact, and so is the gradient: it passes where ``low <= x <= high``, not where ``x`` is NaN.
    Raises:
        TypeError: ``x`` is not float32, bfloat16 or float16 (kernel only).
    Source:
        Written from the formula.
    """
    if not to.bounded:
        return x
    if use_kernel(x):
        if x.dtype not in FLOATS:
            raise TypeError(
                f"clip: x must be float32, bfloat16 or float16, got {x.dtype}. "
                "Cast it, or call clip_ref."
            )
        return ClipFunction.apply(x, to)
    return clip_ref(x, to)
