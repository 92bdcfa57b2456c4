"""GEGLU between clamps: ``y = clip(gelu_tanh(clip(gate)) * clip(up))``.

A tower's MLP clamps what its two products give and what its third takes. Stock runs five passes
and keeps seven tensors of the MLP's width for backward; here it is one pass, which keeps two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_accel.kernels._triton import tl, triton, use_kernel
from gemma_accel.kernels.clip import EVERYTHING, Range, clip_ref, clipped, inside
from gemma_accel.kernels.geglu import geglu_ref, gelu_tanh, gelu_tanh_and_grad, tile
from gemma_accel.kernels.rms_norm import FLOATS, row_count, strided_rows


def clip_geglu_ref(
    gate: Tensor,
    up: Tensor,
    *,
    gate_range: Range = EVERYTHING,
    up_range: Range = EVERYTHING,
    after: Range = EVERYTHING,
) -> Tensor:
    return clip_ref(geglu_ref(clip_ref(gate, gate_range), clip_ref(up, up_range)), after)


@triton.jit(do_not_specialize=["n_rows"])
def _clip_geglu_fwd_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    n_rows,
    width,
    gate_row_stride,
    up_row_stride,
    gate_low,
    gate_high,
    up_low,
    up_high,
    after_low,
    after_high,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < n_rows)[:, None] & (cols < width)[None, :]
    rows, cols = rows[:, None], cols[None, :]
    gate = tl.load(gate_ptr + rows * gate_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    y = gelu_tanh(clipped(gate, gate_low, gate_high)) * clipped(up, up_low, up_high)
    y = clipped(y.to(y_ptr.dtype.element_ty).to(tl.float32), after_low, after_high)
    tl.store(y_ptr + rows * width + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _clip_geglu_bwd_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    n_rows,
    width,
    dy_row_stride,
    gate_row_stride,
    up_row_stride,
    gate_low,
    gate_high,
    up_low,
    up_high,
    after_low,
    after_high,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    HAS_DGATE: tl.constexpr,
    HAS_DUP: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < n_rows)[:, None] & (cols < width)[None, :]
    rows, cols = rows[:, None], cols[None, :]
    dy = tl.load(dy_ptr + rows * dy_row_stride + cols, mask=mask, other=0.0)
    gate = tl.load(gate_ptr + rows * gate_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    held = clipped(up, up_low, up_high)
    gelu, slope = gelu_tanh_and_grad(clipped(gate, gate_low, gate_high))
    y = (gelu * held).to(dy_ptr.dtype.element_ty).to(tl.float32)  # what forward rounded and held
    dy = tl.where(inside(y, after_low, after_high), dy.to(tl.float32), 0.0)
    if HAS_DGATE:
        dgate = tl.where(inside(gate, gate_low, gate_high), dy * held * slope, 0.0)
        tl.store(dgate_ptr + rows * width + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    if HAS_DUP:
        dup = tl.where(inside(up, up_low, up_high), dy * gelu, 0.0)
        tl.store(dup_ptr + rows * width + cols, dup.to(dup_ptr.dtype.element_ty), mask=mask)


def clip_geglu_fwd(
    gate: Tensor, up: Tensor, gate_range: Range, up_range: Range, after: Range
) -> Tensor:
    dtype = torch.promote_types(gate.dtype, up.dtype)
    y = torch.empty(gate.shape, dtype=dtype, device=gate.device)
    gate, gate_row_stride = strided_rows(gate)
    up, up_row_stride = strided_rows(up)
    n_rows, width = row_count(gate), gate.shape[-1]
    block_r, block_f, grid = tile(n_rows, width)
    _clip_geglu_fwd_kernel[grid](
        gate,
        up,
        y,
        n_rows,
        width,
        gate_row_stride,
        up_row_stride,
        *gate_range,
        *up_range,
        *after,
        BLOCK_R=block_r,
        BLOCK_F=block_f,
        num_warps=4,
    )
    return y


def clip_geglu_bwd(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_range: Range,
    up_range: Range,
    after: Range,
    *,
    needs_dgate: bool = True,
    needs_dup: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """``dgate`` and ``dup``, each only if needed. ``dy`` has the dtype of the result."""
    contiguous = torch.contiguous_format
    dgate = torch.empty_like(gate, memory_format=contiguous) if needs_dgate else None
    dup = torch.empty_like(up, memory_format=contiguous) if needs_dup else None
    rows, strides = zip(*(strided_rows(t) for t in (dy, gate, up)), strict=True)
    n_rows, width = row_count(gate), gate.shape[-1]
    block_r, block_f, grid = tile(n_rows, width)
    _clip_geglu_bwd_kernel[grid](
        *rows,
        dgate,
        dup,
        n_rows,
        width,
        *strides,
        *gate_range,
        *up_range,
        *after,
        BLOCK_R=block_r,
        BLOCK_F=block_f,
        HAS_DGATE=needs_dgate,
        HAS_DUP=needs_dup,
        num_warps=4,
    )
    return dgate, dup


class ClipGegluFunction(torch.autograd.Function):
    """Saves ``gate`` and ``up``, as they came."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, gate_range: Range, up_range: Range, after: Range
    ) -> Tensor:
        ctx.ranges = gate_range, up_range, after
        ctx.save_for_backward(gate, up)
        return clip_geglu_fwd(gate, up, gate_range, up_range, after)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        needs_dgate, needs_dup, *_ = ctx.needs_input_grad
        dgate, dup = clip_geglu_bwd(
            dy, *ctx.saved_tensors, *ctx.ranges, needs_dgate=needs_dgate, needs_dup=needs_dup
        )
        return dgate, dup, None, None, None


def clip_geglu(
    gate: Tensor,
    up: Tensor,
    *,
    gate_range: Range = EVERYTHING,
    up_range: Range = EVERYTHING,
    after: Range = EVERYTHING,
) -> Tensor:
    """The gated activation of a tower's MLP, its clamps included.

    Replaces:
        ``y = gelu_tanh(torch.clamp(gate, *gate_range)) * torch.clamp(up, *up_range)``
        ``torch.clamp(y, *after)``
    Shapes:
        ``gate``, ``up`` [..., F], any row stride; returns [..., F] contiguous, in their promoted
        dtype. Saved: ``gate`` and ``up``.
    Numerics:
        float32 throughout, rounded once, then clamped (stock rounds the activation too). Gradients
        pass a clamp where ``torch.clamp`` lets them. A repeated run is bitwise the same.
    Raises:
        ValueError: ``up`` has not the shape or device of ``gate``.
        TypeError: an input is not float32, bfloat16 or float16 (kernel only).
    Source:
        Written from the formula.
    """
    if up.shape != gate.shape or up.device != gate.device:
        raise ValueError(
            f"clip_geglu: up must be like gate, {tuple(gate.shape)} on {gate.device}, got "
            f"{tuple(up.shape)} on {up.device}. Pass the two projections of one MLP."
        )
    if use_kernel(gate):
        for name, x in (("gate", gate), ("up", up)):
            if x.dtype not in FLOATS:
                raise TypeError(
                    f"clip_geglu: {name} must be float32, bfloat16 or float16, got {x.dtype}. "
                    "Cast it, or call clip_geglu_ref."
                )
        return ClipGegluFunction.apply(gate, up, gate_range, up_range, after)
    return clip_geglu_ref(gate, up, gate_range=gate_range, up_range=up_range, after=after)
