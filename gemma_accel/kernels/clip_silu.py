"""SiLU between clamps: ``y = clip(s * sigmoid(s))`` with ``s = clip(x)``.

A conformer's feed-forward clamps what its first product gives and what its second takes. Stock runs
three passes and keeps three tensors for backward; here it is one pass, which keeps one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_accel.kernels._triton import tl, triton, use_kernel
from gemma_accel.kernels.clip import BLOCK, EVERYTHING, Range, clip_ref, clipped, inside
from gemma_accel.kernels.clip_norm import silu_and_grad
from gemma_accel.kernels.rms_norm import FLOATS, widen


def clip_silu_ref(x: Tensor, *, before: Range = EVERYTHING, after: Range = EVERYTHING) -> Tensor:
    return clip_ref(F.silu(widen(clip_ref(x, before))).to(x.dtype), after)


@triton.jit
def _clip_silu_fwd_kernel(
    x_ptr, y_ptr, n, before_low, before_high, after_low, after_high, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = clipped(tl.load(x_ptr + at, mask=at < n).to(tl.float32), before_low, before_high)
    y = (x * tl.sigmoid(x)).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + at, clipped(y, after_low, after_high).to(y_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def _clip_silu_bwd_kernel(
    dy_ptr, x_ptr, dx_ptr, n, before_low, before_high, after_low, after_high, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + at, mask=at < n).to(tl.float32)
    x = tl.load(x_ptr + at, mask=at < n).to(tl.float32)
    y, slope = silu_and_grad(clipped(x, before_low, before_high))
    y = y.to(dx_ptr.dtype.element_ty).to(tl.float32)  # what forward rounded and held
    passes = inside(x, before_low, before_high) & inside(y, after_low, after_high)
    dx = tl.where(passes, dy * slope, 0.0)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=at < n)


def clip_silu_fwd(x: Tensor, before: Range, after: Range) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    n = x.numel()
    grid = (triton.cdiv(n, BLOCK),)
    _clip_silu_fwd_kernel[grid](x, y, n, *before, *after, BLOCK=BLOCK, num_warps=4)
    return y


def clip_silu_bwd(dy: Tensor, x: Tensor, before: Range, after: Range) -> Tensor:
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    n = x.numel()
    grid = (triton.cdiv(n, BLOCK),)
    _clip_silu_bwd_kernel[grid](dy, x, dx, n, *before, *after, BLOCK=BLOCK, num_warps=4)
    return dx


class ClipSiluFunction(torch.autograd.Function):
    """Saves ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, before: Range, after: Range) -> Tensor:
        ctx.ranges = before, after
        ctx.save_for_backward(x)
        return clip_silu_fwd(x, before, after)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return clip_silu_bwd(dy, *ctx.saved_tensors, *ctx.ranges), None, None


def clip_silu(x: Tensor, *, before: Range = EVERYTHING, after: Range = EVERYTHING) -> Tensor:
    """The activation of a conformer's feed-forward, its clamps included.

    Replaces:
        ``torch.clamp(F.silu(torch.clamp(x, *before)), *after)``
    Shapes:
        ``x`` any; returns the same shape, contiguous. Saved: ``x``.
    Numerics:
        float32 throughout, rounded once, then clamped. The gradient passes a clamp where
        ``torch.clamp`` lets it. A repeated run is bitwise the same.
    Raises:
        TypeError: ``x`` is not float32, bfloat16 or float16 (kernel only).
    Source:
        Written from the formula.
    """
    if use_kernel(x):
        if x.dtype not in FLOATS:
            raise TypeError(
                f"clip_silu: x must be float32, bfloat16 or float16, got {x.dtype}. "
                "Cast it, or call clip_silu_ref."
            )
        return ClipSiluFunction.apply(x, before, after)
    return clip_silu_ref(x, before=before, after=after)
