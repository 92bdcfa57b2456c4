"""RMSNorm between two clamps: ``y = clip(act(rms_norm(clip(x)) * weight))``, act SiLU or nothing.

Stock clamps before and after as passes of their own, whose gradients keep their inputs. Here a row
is read once and written once, and backward keeps what a norm alone keeps, the input and one number
a row: both clamps' gradients are read off the values recomputed from them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_accel.kernels._triton import tl, triton, use_kernel
from gemma_accel.kernels.clip import EVERYTHING, Range, clip_ref, clipped, inside
from gemma_accel.kernels.rms_norm import (
    check_rows,
    check_weight,
    norm_input_grad,
    rms_norm_ref,
    row_count,
    row_tile,
    share_rows,
    strided_rows,
    weight_grad,
)


def clip_norm_ref(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    before: Range = EVERYTHING,
    after: Range = EVERYTHING,
    silu: bool = False,
) -> Tensor:
    y = rms_norm_ref(clip_ref(x, before), weight, eps)
    return clip_ref(F.silu(y) if silu else y, after)


@triton.jit
def silu_and_grad(x):
    """``x sigmoid(x)`` of float32 values and its derivative."""
    s = tl.sigmoid(x)
    return x * s, s * (1.0 + x * (1.0 - s))


@triton.jit(do_not_specialize=["n_rows"])
def _clip_norm_fwd_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    n_rows,
    x_row_stride,
    eps,
    before_low,
    before_high,
    after_low,
    after_high,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    HAS_AFTER: tl.constexpr,
    SILU: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < n_rows)[:, None] & (cols < D)[None, :]

    x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    if HAS_BEFORE:
        x = tl.where(mask, clipped(x, before_low, before_high), 0.0)  # 0 may lie outside
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)

    y = x * rstd[:, None]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
        y *= weight[None, :]
    if SILU:
        y *= tl.sigmoid(y)
    y = y.to(y_ptr.dtype.element_ty)
    if HAS_AFTER:
        y = clipped(y.to(tl.float32), after_low, after_high).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * D + cols[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["n_rows", "rows_per_program"])
def _clip_norm_bwd_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    dw_ptr,
    n_rows,
    rows_per_program,
    dy_row_stride,
    x_row_stride,
    before_low,
    before_high,
    after_low,
    after_high,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    HAS_AFTER: tl.constexpr,
    SILU: tl.constexpr,
    HAS_DX: tl.constexpr,
    HAS_DW: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, n_rows)
    cols = tl.arange(0, BLOCK_D)
    if HAS_DW:
        dw = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)

    for start in range(first, last, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        mask = (rows < n_rows)[:, None] & (cols < D)[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * dy_row_stride + cols[None, :], mask=mask, other=0.0)
        x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
        dy = dy.to(tl.float32)
        x = x.to(tl.float32)
        if HAS_BEFORE:
            x_hat = tl.where(mask, clipped(x, before_low, before_high), 0.0) * rstd[:, None]
        else:
            x_hat = x * rstd[:, None]
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
        else:
            weight = 1.0
        if SILU:
            value, slope = silu_and_grad(x_hat * weight)
        else:
            value = x_hat * weight
        if HAS_AFTER:  # the rounded value was clamped
            value = value.to(dx_ptr.dtype.element_ty).to(tl.float32)
            dy = tl.where(inside(value, after_low, after_high), dy, 0.0)
        if SILU:
            dy *= slope
        if HAS_DW:
            dw += dy * x_hat
        if HAS_DX:
            dx = norm_input_grad(dy * weight, x_hat, rstd, D)
            if HAS_BEFORE:
                dx = tl.where(inside(x, before_low, before_high), dx, 0.0)
            dx = dx.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + rows[:, None] * D + cols[None, :], dx, mask=mask)

    if HAS_DW:
        tl.store(dw_ptr + program * D + cols, tl.sum(dw, axis=0), mask=cols < D)


def clip_norm_fwd(
    x: Tensor, weight: Tensor | None, eps: float, before: Range, after: Range, silu: bool
) -> tuple[Tensor, Tensor]:
    """``y`` like ``x``, contiguous, and ``rstd`` [R] in float32."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, x_row_stride = strided_rows(x)
    n_rows, width = row_count(x), x.shape[-1]
    rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    block_r, block_d, num_warps = row_tile(width)
    _clip_norm_fwd_kernel[(triton.cdiv(n_rows, block_r),)](
        x,
        weight,
        y,
        rstd,
        n_rows,
        x_row_stride,
        eps,
        *before,
        *after,
        D=width,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        HAS_WEIGHT=weight is not None,
        HAS_BEFORE=before.bounded,
        HAS_AFTER=after.bounded,
        SILU=silu,
        num_warps=num_warps,
    )
    return y, rstd


def clip_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    before: Range,
    after: Range,
    silu: bool,
    *,
    needs_dx: bool = True,
    needs_dw: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """``dx`` and ``dw``, each only if needed."""
    width, n_rows = x.shape[-1], rstd.numel()
    block_r, block_d, num_warps = row_tile(width)
    rows_per_program, programs = share_rows(n_rows, block_r, needs_dw)
    # not needed, it still tells the kernel the dtype that values were rounded to
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else x
    dw = torch.empty(programs, width, dtype=torch.float32, device=x.device) if needs_dw else None
    dy, dy_row_stride = strided_rows(dy)
    x, x_row_stride = strided_rows(x)
    _clip_norm_bwd_kernel[(programs,)](
        dy,
        x,
        weight,
        rstd,
        dx,
        dw,
        n_rows,
        rows_per_program,
        dy_row_stride,
        x_row_stride,
        *before,
        *after,
        D=width,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        HAS_WEIGHT=weight is not None,
        HAS_BEFORE=before.bounded,
        HAS_AFTER=after.bounded,
        SILU=silu,
        HAS_DX=needs_dx,
        HAS_DW=needs_dw,
        num_warps=num_warps,
    )
    return dx if needs_dx else None, weight_grad(dw, weight)


class ClipNormFunction(torch.autograd.Function):
    """Saves ``x``, ``weight`` and ``rstd``; gradients for ``x`` and ``weight`` alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        eps: float,
        before: Range,
        after: Range,
        silu: bool,
    ) -> Tensor:
        y, rstd = clip_norm_fwd(x, weight, eps, before, after, silu)
        ctx.how = before, after, silu
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        needs_dx, needs_dw, *_ = ctx.needs_input_grad
        saved = ctx.saved_tensors
        dx, dw = clip_norm_bwd(dy, *saved, *ctx.how, needs_dx=needs_dx, needs_dw=needs_dw)
        return dx, dw, None, None, None, None


def clip_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    before: Range = EVERYTHING,
    after: Range = EVERYTHING,
    silu: bool = False,
) -> Tensor:
    """RMSNorm of the last dimension with a clamp before it and a clamp, perhaps SiLU, after it.

    Replaces:
        ``y = rms_norm(torch.clamp(x, *before), weight, eps); y = F.silu(y)``
        ``torch.clamp(y, *after)``
    Shapes:
        ``x`` [..., D], any row stride; ``weight`` [D] or None; returns [..., D] contiguous in
        ``x``'s dtype. Saved: ``x``, ``weight``, ``rstd`` [R] float32.
    Numerics:
        float32 throughout, rounded once, then clamped (stock rounds SiLU's input too). Gradients
        pass a clamp where ``torch.clamp`` lets them. The weight's is summed in float32 in a fixed
        order: a repeated run is bitwise the same.
    Raises:
        ValueError: ``weight`` is not [D] or lies on another device; rows are wider than 8192
            (kernel only).
        TypeError: ``x`` is not float32, bfloat16 or float16 (kernel only).
    Source:
        Written from the formula.
    """
    if weight is not None:
        check_weight("clip_norm", weight, x)
    if use_kernel(x):
        check_rows("clip_norm", x)
        return ClipNormFunction.apply(x, weight, eps, before, after, silu)
    return clip_norm_ref(x, weight, eps=eps, before=before, after=after, silu=silu)
