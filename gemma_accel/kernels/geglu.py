"""GEGLU: ``gelu_tanh(gate) * up``, with ``gelu_tanh(x) = x * sigmoid(2 z)``.

``z = sqrt(2/pi) (x + 0.044715 x^3)``, and ``(1 + tanh z) / 2 = sigmoid(2 z)``: one exponential of a
number that is never positive, so nothing overflows. Stock keeps four tensors of the MLP's width
for backward, this keeps gate and up, and one kernel recomputes the rest.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_accel.kernels._triton import tl, triton, use_kernel
from gemma_accel.kernels.rms_norm import FLOATS, row_count, strided_rows, widen


def geglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    y = F.gelu(widen(gate), approximate="tanh") * widen(up)
    return y.to(torch.promote_types(gate.dtype, up.dtype))


@triton.jit
def _gelu_parts(x):
    """``sigmoid(2 z)``, its derivative by ``2 z``, and ``|x|`` held below 30."""
    # beyond 30 the sigmoid is 0 or 1 to far below float32, and x^3 could overflow
    a = tl.minimum(tl.abs(x), 30.0)
    e = tl.exp(-1.5957691216057308 * a * (1.0 + 0.044715 * a * a))  # 2 sqrt(2/pi)
    r = 1.0 / (1.0 + e)
    return tl.where(x < 0, e * r, r), e * r * r, a


@triton.jit
def gelu_tanh(x):
    """``gelu_tanh`` of float32 values, for kernels."""
    s, _, _ = _gelu_parts(x)
    return x * s


@triton.jit
def gelu_tanh_and_grad(x):
    """``gelu_tanh`` of float32 values and its derivative, for kernels."""
    s, ds, a = _gelu_parts(x)
    return x * s, s + x * ds * (1.5957691216057308 * (1.0 + 3.0 * 0.044715 * a * a))


@triton.jit(do_not_specialize=["n_rows"])
def _geglu_fwd_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    n_rows,
    width,
    gate_row_stride,
    up_row_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < n_rows)[:, None] & (cols < width)[None, :]
    gate = tl.load(gate_ptr + rows[:, None] * gate_row_stride + cols[None, :], mask=mask, other=0.0)
    up = tl.load(up_ptr + rows[:, None] * up_row_stride + cols[None, :], mask=mask, other=0.0)
    y = gelu_tanh(gate.to(tl.float32)) * up.to(tl.float32)
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * width + cols[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _geglu_bwd_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,  # the three results may lie over the three inputs
    dup_ptr,
    out_ptr,
    n_rows,
    width,
    dy_row_stride,
    gate_row_stride,
    up_row_stride,
    dgate_row_stride,
    dup_row_stride,
    out_row_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    HAS_DGATE: tl.constexpr,
    HAS_DUP: tl.constexpr,
    HAS_OUT: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < n_rows)[:, None] & (cols < width)[None, :]
    rows, cols = rows[:, None], cols[None, :]
    dy = tl.load(dy_ptr + rows * dy_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + rows * gate_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    gelu, slope = gelu_tanh_and_grad(gate)
    if HAS_DGATE or HAS_OUT:
        up = tl.load(up_ptr + rows * up_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if IN_PLACE:
        tl.debug_barrier()  # another thread may read what this one is about to overwrite
    if HAS_DGATE:
        dgate = (dy * up * slope).to(dgate_ptr.dtype.element_ty)
        tl.store(dgate_ptr + rows * dgate_row_stride + cols, dgate, mask=mask)
    if HAS_DUP:
        dup = (dy * gelu).to(dup_ptr.dtype.element_ty)
        tl.store(dup_ptr + rows * dup_row_stride + cols, dup, mask=mask)
    if HAS_OUT:
        out = (gelu * up).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows * out_row_stride + cols, out, mask=mask)


def tile(n_rows: int, width: int) -> tuple[int, int, tuple[int, int]]:
    """``BLOCK_R, BLOCK_F`` and the grid: 1024 elements a program of four warps."""
    block_f = min(1024, triton.next_power_of_2(width))
    block_r = 1024 // block_f
    return block_r, block_f, (triton.cdiv(n_rows, block_r), triton.cdiv(width, block_f))


def geglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    dtype = torch.promote_types(gate.dtype, up.dtype)
    y = torch.empty(gate.shape, dtype=dtype, device=gate.device)
    gate, gate_row_stride = strided_rows(gate)
    up, up_row_stride = strided_rows(up)
    n_rows, width = row_count(gate), gate.shape[-1]
    block_r, block_f, grid = tile(n_rows, width)
    _geglu_fwd_kernel[grid](
        gate,
        up,
        y,
        n_rows,
        width,
        gate_row_stride,
        up_row_stride,
        BLOCK_R=block_r,
        BLOCK_F=block_f,
        num_warps=4,
    )
    return y


def geglu_bwd(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    dgate: Tensor | None = None,
    dup: Tensor | None = None,
    out: Tensor | None = None,
    *,
    needs_dgate: bool = True,
    needs_dup: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """``dgate`` and ``dup``, into the buffers given or new ones; ``out`` takes the product again.

    A buffer may be ``gate``, ``up`` or ``dy`` itself (or a view with the very same elements), which
    is then overwritten: rows of [R, 2F] can turn into their own gradients. One that is given is
    filled, whatever ``needs_*`` says.
    """
    in_place = dgate is not None or dup is not None or out is not None
    if dgate is None and needs_dgate:
        dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if dup is None and needs_dup:
        dup = torch.empty_like(up, memory_format=torch.contiguous_format)
    n_rows, width = row_count(gate), gate.shape[-1]
    inputs = [strided_rows(t) for t in (dy, gate, up)]
    results = [(None, 0) if t is None else _result_rows(t) for t in (dgate, dup, out)]
    rows, strides = zip(*inputs, *results, strict=True)
    block_r, block_f, grid = tile(n_rows, width)
    _geglu_bwd_kernel[grid](
        *rows,
        n_rows,
        width,
        *strides,
        BLOCK_R=block_r,
        BLOCK_F=block_f,
        HAS_DGATE=dgate is not None,
        HAS_DUP=dup is not None,
        HAS_OUT=out is not None,
        IN_PLACE=in_place,
        num_warps=4,
    )
    return dgate, dup


def _result_rows(x: Tensor) -> tuple[Tensor, int]:
    """``strided_rows`` of a tensor to write: a copy would take the result instead of it."""
    rows, stride = strided_rows(x)
    if rows.data_ptr() != x.data_ptr():
        raise ValueError(
            f"geglu_bwd: a result must have rows one stride apart, got strides {x.stride()} for "
            f"shape {tuple(x.shape)}. Pass a contiguous tensor, or columns of one."
        )
    return rows, stride


class GegluFunction(torch.autograd.Function):
    """Saves ``gate`` and ``up``, as they came."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return geglu_fwd(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        needs_dgate, needs_dup = ctx.needs_input_grad
        return geglu_bwd(dy, *ctx.saved_tensors, needs_dgate=needs_dgate, needs_dup=needs_dup)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """The gated activation of Gemma's MLPs.

    Replaces:
        ``torch.nn.functional.gelu(gate, approximate="tanh") * up``
    Shapes:
        ``gate``, ``up`` [..., F], any row stride (the halves of one [R, 2F] are not copied);
        returns [..., F] contiguous, in their promoted dtype. Saved: ``gate`` and ``up``.
    Numerics:
        float32 throughout, one rounding (stock rounds the activation and the product). No input
        overflows: the cube is taken of at most 30 in size. A repeated run is bitwise the same.
    Raises:
        ValueError: ``up`` has not the shape or device of ``gate``.
        TypeError: an input is not float32, bfloat16 or float16 (kernel only).
    Source:
        Written from the formula.
    """
    if up.shape != gate.shape or up.device != gate.device:
        raise ValueError(
            f"geglu: up must be like gate, {tuple(gate.shape)} on {gate.device}, got "
            f"{tuple(up.shape)} on {up.device}. Pass the two projections of one MLP."
        )
    if use_kernel(gate):
        for name, x in (("gate", gate), ("up", up)):
            if x.dtype not in FLOATS:
                raise TypeError(
                    f"geglu: {name} must be float32, bfloat16 or float16, got {x.dtype}. "
                    "Cast it, or call geglu_ref."
                )
        return GegluFunction.apply(gate, up)
    return geglu_ref(gate, up)
