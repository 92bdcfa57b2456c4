"""RMSNorm over the last dimension: ``y = x * (mean(x^2) + eps)^-0.5 * weight``.

Stock runs five passes over a float32 copy of the input and keeps that copy for backward. Here a
row is read once, computed in float32, rounded once and written once, and backward keeps the input
as it came plus one float32 number a row.

The helpers that every row-wise op shares (row strides, tile shapes, partial sums of weight
gradients) live here too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_accel.kernels._triton import tl, triton, use_kernel

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 8192  # widest row that stays in registers, backward included
PARTIAL_SUMS = 512  # programs that sum a weight gradient; fixed, so every card sums alike


def widen(x: Tensor) -> Tensor:
    """``x`` in the dtype that references compute in: float32, or float64 where it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def strided_rows(x: Tensor) -> tuple[Tensor, int]:
    """``x`` as rows of its last dimension, one stride apart, and that stride.

    Copies only where the last dimension is not contiguous or the leading ones do not share one
    stride.
    """
    if x.is_contiguous():
        return x, x.shape[-1]
    x = x.reshape(-1, x.shape[-1])
    if x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0)


def row_count(x: Tensor) -> int:
    return x.numel() // x.shape[-1] if x.shape[-1] else 0


@cache
def row_tile(width: int) -> tuple[int, int, int]:
    """``BLOCK_R, BLOCK_D, num_warps``: whole rows, several if short, 16 elements a thread."""
    block_d = triton.next_power_of_2(width)
    block_r = max(1, 2048 // block_d)
    return block_r, block_d, block_r * block_d // 512


def share_rows(n_rows: int, block_r: int, summed: bool) -> tuple[int, int]:
    """Rows a program takes, and programs: one tile each, unless they sum a weight gradient."""
    tiles = -(-n_rows // block_r)
    per_program = max(1, -(-tiles // PARTIAL_SUMS)) if summed else 1
    return per_program * block_r, -(-tiles // per_program)


def weight_grad(sums: Tensor | None, weight: Tensor | None) -> Tensor | None:
    """The gradient of ``weight`` from the programs' partial sums [programs, D], or None without."""
    return None if sums is None or weight is None else sums.sum(0).to(weight.dtype)


def check_rows(op: str, x: Tensor, name: str = "x") -> None:
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} must be float32, bfloat16 or float16, got {x.dtype}. "
            f"Cast it, or call {op}_ref."
        )
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(
            f"{op}: rows of {name} must be at most {MAX_WIDTH} wide, got {x.shape[-1]}. "
            f"Call {op}_ref instead."
        )


def check_weight(op: str, weight: Tensor, x: Tensor, name: str = "weight") -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{op}: {name} must have shape (D,) = {tuple(x.shape[-1:])}, "
            f"got {tuple(weight.shape)}. Pass this norm's own weight."
        )
    if weight.device != x.device:
        raise ValueError(
            f"{op}: {name} must be on {x.device} like the input, got {weight.device}. "
            "Move the module there."
        )
    if not weight.is_floating_point():
        raise TypeError(
            f"{op}: {name} must be of a floating-point dtype, got {weight.dtype}. Cast it."
        )
    if not weight.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous, got a stride of {weight.stride(0)}. "
            "Call .contiguous() on it once."
        )


def rms_norm_ref(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    y = widen(x)
    y = y * (y.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * widen(weight)
    return y.to(x.dtype)


@triton.jit(do_not_specialize=["n_rows"])
def _rms_norm_fwd_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    n_rows,
    x_row_stride,
    eps,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < n_rows)[:, None] & (cols < D)[None, :]

    x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)

    y = x * rstd[:, None]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
        y *= weight[None, :]
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * D + cols[None, :], y, mask=mask)


@triton.jit
def norm_input_grad(dx_hat, x_hat, rstd, D: tl.constexpr):
    """Gradient of a tile's rows through ``x_hat = x * rstd``, all float32."""
    along = tl.sum(dx_hat * x_hat, axis=1) / D  # the part that would only change a row's length
    return (dx_hat - x_hat * along[:, None]) * rstd[:, None]


@triton.jit(do_not_specialize=["n_rows", "rows_per_program"])
def _rms_norm_bwd_kernel(
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
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
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
        x_hat = x.to(tl.float32) * rstd[:, None]
        if HAS_DW:
            dw += dy * x_hat
        if HAS_DX:
            if HAS_WEIGHT:
                # read again for every tile: it stays in cache, and registers are for the rows
                weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
                dy *= weight[None, :]
            dx = norm_input_grad(dy, x_hat, rstd, D)
            dx = dx.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + rows[:, None] * D + cols[None, :], dx, mask=mask)

    if HAS_DW:
        tl.store(dw_ptr + program * D + cols, tl.sum(dw, axis=0), mask=cols < D)


def rms_norm_fwd(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``y`` like ``x``, contiguous, and ``rstd`` [R] in float32."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, x_row_stride = strided_rows(x)
    n_rows, width = row_count(x), x.shape[-1]
    rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    block_r, block_d, num_warps = row_tile(width)
    _rms_norm_fwd_kernel[(triton.cdiv(n_rows, block_r),)](
        x,
        weight,
        y,
        rstd,
        n_rows,
        x_row_stride,
        eps,
        D=width,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        HAS_WEIGHT=weight is not None,
        num_warps=num_warps,
    )
    return y, rstd


def rms_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    *,
    needs_dx: bool = True,
    needs_dw: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """``dx`` and ``dw``, each only if needed."""
    width, n_rows = x.shape[-1], rstd.numel()
    block_r, block_d, num_warps = row_tile(width)
    rows_per_program, programs = share_rows(n_rows, block_r, needs_dw)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else None
    sums = torch.empty(programs, width, dtype=torch.float32, device=x.device) if needs_dw else None
    dy, dy_row_stride = strided_rows(dy)
    x, x_row_stride = strided_rows(x)
    _rms_norm_bwd_kernel[(programs,)](
        dy,
        x,
        weight,
        rstd,
        dx,
        sums,
        n_rows,
        rows_per_program,
        dy_row_stride,
        x_row_stride,
        D=width,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        HAS_WEIGHT=weight is not None,
        HAS_DX=needs_dx,
        HAS_DW=needs_dw,
        num_warps=num_warps,
    )
    return dx, weight_grad(sums, weight)


class RMSNormFunction(torch.autograd.Function):
    """Saves ``x``, ``weight`` and ``rstd``; no gradient for ``eps``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        y, rstd = rms_norm_fwd(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        needs_dx, needs_dw, _ = ctx.needs_input_grad
        dx, dw = rms_norm_bwd(dy, x, weight, rstd, needs_dx=needs_dx, needs_dw=needs_dw)
        return dx, dw, None


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Root-mean-square norm of the last dimension, as ``Gemma4RMSNorm`` has it (no ``1 + weight``).

    Replaces:
        ``x32 = x.float(); x32 = x32 * (x32.pow(2).mean(-1, keepdim=True) + eps).pow(-0.5)``
        ``y = (x32 * weight.float()).type_as(x)``
    Shapes:
        ``x`` [..., D], any row stride; ``weight`` [D] or None; returns [..., D] contiguous in
        ``x``'s dtype. Saved: ``x``, ``weight``, ``rstd`` [R] float32.
    Numerics:
        float32 throughout, one rounding at the end, in backward too. The weight gradient is summed
        in float32 in a fixed order: a repeated run is bitwise the same.
    Raises:
        ValueError: ``weight`` is not [D] or lies on another device; rows are wider than 8192
            (kernel only).
        TypeError: ``x`` is not float32, bfloat16 or float16 (kernel only).
    Source:
        Written from the formula.
    """
    if weight is not None:
        check_weight("rms_norm", weight, x)
    if use_kernel(x):
        check_rows("rms_norm", x)
        return RMSNormFunction.apply(x, weight, eps)
    return rms_norm_ref(x, weight, eps)
