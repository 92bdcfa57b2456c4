"""The per-layer embedding (PLE) of one decoder layer: fetch its columns of the table, gate them in.

``gather_rows`` reads ``table[ids, start : start + width]``. The table may be host memory that the
GPU can address: a token needs 512 bytes of it a layer, so reading those over PCIe when the layer
runs is quick, and the table's 4 to 5 GiB never enter the GPU's memory.

``ple_gate`` is what the layer does with them: ``gelu_tanh(gate) * ple``, where ``ple =
(rms_norm(projection * projection_scale) * norm_weight + rows * rows_scale) * input_scale``. Stock
builds ``ple`` for all layers at once, [B, T, layers, P], three times over; here a layer's share is
never in memory at all.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_accel.kernels._triton import tl, triton, use_kernel
from gemma_accel.kernels.geglu import gelu_tanh, gelu_tanh_and_grad
from gemma_accel.kernels.rms_norm import (
    FLOATS,
    check_rows,
    check_weight,
    norm_input_grad,
    rms_norm_ref,
    row_count,
    row_tile,
    share_rows,
    strided_rows,
    weight_grad,
    widen,
)


class HostRows(NamedTuple):
    """A row-major table in memory that is no tensor's: a mapped file, registered host memory.

    ``address`` is what the device of the ids sees (for CUDA, ``cudaHostGetDevicePointer``). Whoever
    makes one keeps the memory alive and in place for as long as it is used.
    """

    address: int
    rows: int
    columns: int
    dtype: torch.dtype


def _host_view(table: HostRows) -> Tensor:
    size = table.rows * table.columns * table.dtype.itemsize
    memory = (ctypes.c_byte * size).from_address(table.address)
    return torch.frombuffer(memory, dtype=table.dtype).view(table.rows, table.columns)


def gather_rows_ref(table: Tensor | HostRows, ids: Tensor, start: int, width: int) -> Tensor:
    table = _host_view(table) if isinstance(table, HostRows) else table
    try:
        rows = table[:, start : start + width].index_select(0, ids.reshape(-1))
    except IndexError as error:
        outside = ids[(ids < 0) | (ids >= table.shape[0])]
        raise IndexError(
            f"gather_rows: token id {outside[0].item()} is not in a table of {table.shape[0]} rows "
            f"({outside.numel()} of {ids.numel()} ids are not). Are tokenizer and model a pair? "
            "Where tokens were added: model.resize_token_embeddings(len(tokenizer))."
        ) from error
    return rows.view(*ids.shape, width)


@triton.jit(do_not_specialize=["address", "n_ids", "table_rows", "start"])
def _gather_rows_kernel(
    address,
    ids_ptr,
    out_ptr,
    n_ids,
    ids_stride,
    table_rows,
    table_row_stride,
    start,
    width,
    ALIGNED: tl.constexpr,  # bytes that the address of the first column is a multiple of
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = rows < n_ids
    ids = tl.load(ids_ptr + rows * ids_stride, mask=inside, other=0).to(tl.int64)
    mask = inside[:, None] & (cols < width)[None, :]

    table_ptr = tl.multiple_of(address.to(tl.int64).to(out_ptr.dtype) + start, ALIGNED)
    # an id outside the table must not read what lies beside it; NaN is seen, zero would not be
    known = mask & ((ids >= 0) & (ids < table_rows))[:, None]
    tile = table_ptr + ids[:, None] * table_row_stride + cols[None, :]
    values = tl.load(tile, mask=known, other=float("nan"))
    tl.store(out_ptr + rows[:, None] * width + cols[None, :], values, mask=mask)


def gather_rows(
    table: Tensor | HostRows,
    ids: Tensor,
    start: int,
    width: int,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Columns ``start`` to ``start + width`` of the rows ``ids`` of a table, without a gradient.

    Replaces:
        ``table[ids, start : start + width]``
    Shapes:
        ``table`` [V, C], a tensor on the ids' device or ``HostRows`` whose address that device can
        read; ``ids`` int32 or int64 of any shape and strides; returns [*ids.shape, width] on
        ``device`` (default: the ids' own), in the table's dtype.
    Numerics:
        Copies: bitwise what indexing gives. An id outside the table gives a row of NaN on the GPU,
        which cannot raise without stalling, and an IndexError in the reference.
    Raises:
        ValueError: the columns are not in the table; a tensor is on another device, is not
            contiguous in its last dimension or requires a gradient.
        TypeError: the ids are not int32 or int64; the table is not float32, bfloat16 or float16.
    Source:
        Written from the formula.
    """
    if device is not None:
        ids = ids.to(device, non_blocking=True)
    _check_gather(table, ids, start, width)
    if use_kernel(ids):
        return gather_rows_fwd(table, ids, start, width)
    return gather_rows_ref(table, ids, start, width)


def gather_rows_fwd(table: Tensor | HostRows, ids: Tensor, start: int, width: int) -> Tensor:
    if isinstance(table, HostRows):
        address, table_rows, row_stride, dtype = table
    else:
        address, table_rows, row_stride = table.data_ptr(), table.shape[0], table.stride(0)
        dtype = table.dtype
    out = torch.empty(*ids.shape, width, dtype=dtype, device=ids.device)
    ids = ids.reshape(-1)
    block_w = min(1024, triton.next_power_of_2(width))
    block_r = 2048 // block_w  # two 16 byte loads a thread: PCIe is slow to answer, so ask for more
    _gather_rows_kernel[(triton.cdiv(ids.numel(), block_r), triton.cdiv(width, block_w))](
        address,
        ids,
        out,
        ids.numel(),
        ids.stride(0),
        table_rows,
        row_stride,
        start,
        width,
        # a tensor's data in a safetensors file may begin at any multiple of 8 bytes, or less
        ALIGNED=math.gcd(address + start * dtype.itemsize, 16),
        BLOCK_R=block_r,
        BLOCK_W=block_w,
        num_warps=4,
    )
    return out


def _check_gather(table: Tensor | HostRows, ids: Tensor, start: int, width: int) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"gather_rows: ids must be int32 or int64, got {ids.dtype}. Cast them to int64."
        )
    if table.dtype not in FLOATS:
        raise TypeError(
            f"gather_rows: the table must be float32, bfloat16 or float16, got {table.dtype}. "
            "Index it in PyTorch instead."
        )
    columns = table.columns if isinstance(table, HostRows) else table.shape[-1]
    if start < 0 or width < 1 or start + width > columns:
        raise ValueError(
            f"gather_rows: columns {start} to {start + width} are not all in a table of {columns}. "
            "Start at layer * width."
        )
    if isinstance(table, HostRows):
        return
    if table.device != ids.device:
        raise ValueError(
            f"gather_rows: the table must be on {ids.device} like the ids, got {table.device}. "
            "Move the ids there, or register the table's memory and pass HostRows."
        )
    if table.dim() != 2 or table.stride(1) != 1:
        raise ValueError(
            f"gather_rows: the table must be [V, C] with contiguous rows, got shape "
            f"{tuple(table.shape)} and strides {table.stride()}. Call .contiguous() once."
        )
    if table.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "gather_rows: the table requires a gradient, and this op has none. "
            "Use torch.nn.functional.embedding to train it, or pass table.detach()."
        )


def ple_gate_ref(
    gate: Tensor,
    projection: Tensor,
    rows: Tensor,
    norm_weight: Tensor,
    *,
    eps: float = 1e-6,
    projection_scale: float,
    rows_scale: float,
    input_scale: float,
) -> Tensor:
    dtype = _promoted(gate, projection, rows)
    context = rms_norm_ref(widen(projection) * projection_scale, norm_weight, eps)
    ple = (context + widen(rows) * rows_scale) * input_scale
    return (F.gelu(widen(gate), approximate="tanh") * ple).to(dtype)


def _promoted(gate: Tensor, projection: Tensor, rows: Tensor) -> torch.dtype:
    dtype = torch.promote_types(gate.dtype, projection.dtype)
    return torch.promote_types(dtype, rows.dtype)


@triton.jit(do_not_specialize=["n_rows"])
def _ple_gate_fwd_kernel(
    gate_ptr,
    projection_ptr,
    rows_ptr,
    weight_ptr,
    out_ptr,
    n_rows,
    gate_row_stride,
    projection_row_stride,
    rows_row_stride,
    eps,
    projection_scale,
    rows_scale,
    input_scale,
    P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_P)
    mask = (row < n_rows)[:, None] & (cols < P)[None, :]
    row, col = row[:, None], cols[None, :]
    gate = tl.load(gate_ptr + row * gate_row_stride + col, mask=mask, other=0.0)
    projection = tl.load(projection_ptr + row * projection_row_stride + col, mask=mask, other=0.0)
    rows = tl.load(rows_ptr + row * rows_row_stride + col, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + cols, mask=cols < P, other=0.0).to(tl.float32)

    projection = projection.to(tl.float32) * projection_scale
    rstd = tl.rsqrt(tl.sum(projection * projection, axis=1) / P + eps)
    context = projection * rstd[:, None] * weight[None, :]
    ple = (context + rows.to(tl.float32) * rows_scale) * input_scale
    out = gelu_tanh(gate.to(tl.float32)) * ple
    tl.store(out_ptr + row * P + col, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows", "rows_per_program"])
def _ple_gate_bwd_kernel(
    dout_ptr,
    gate_ptr,
    projection_ptr,
    rows_ptr,
    weight_ptr,
    dgate_ptr,
    dprojection_ptr,
    drows_ptr,
    dw_ptr,
    n_rows,
    rows_per_program,
    dout_row_stride,
    gate_row_stride,
    projection_row_stride,
    rows_row_stride,
    eps,
    projection_scale,
    rows_scale,
    input_scale,
    P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HAS_DGATE: tl.constexpr,
    HAS_DPROJECTION: tl.constexpr,
    HAS_DROWS: tl.constexpr,
    HAS_DW: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, n_rows)
    cols = tl.arange(0, BLOCK_P)
    col = cols[None, :]
    if HAS_DW:
        dw = tl.zeros([BLOCK_R, BLOCK_P], dtype=tl.float32)

    for start in range(first, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < n_rows)[:, None] & (cols < P)[None, :]
        row = row[:, None]
        dout = tl.load(dout_ptr + row * dout_row_stride + col, mask=mask, other=0.0)
        gate = tl.load(gate_ptr + row * gate_row_stride + col, mask=mask, other=0.0)
        dout = dout.to(tl.float32)
        gelu, slope = gelu_tanh_and_grad(gate.to(tl.float32))
        dsum = dout * gelu * input_scale  # the gradient at context + rows * rows_scale
        if HAS_DROWS:
            drows = (dsum * rows_scale).to(drows_ptr.dtype.element_ty)
            tl.store(drows_ptr + row * P + col, drows, mask=mask)
        if HAS_DGATE or HAS_DPROJECTION or HAS_DW:
            projection = tl.load(
                projection_ptr + row * projection_row_stride + col, mask=mask, other=0.0
            )
            weight = tl.load(weight_ptr + cols, mask=cols < P, other=0.0).to(tl.float32)[None, :]
            projection = projection.to(tl.float32) * projection_scale
            rstd = tl.rsqrt(tl.sum(projection * projection, axis=1) / P + eps)
            x_hat = projection * rstd[:, None]
            if HAS_DW:
                dw += dsum * x_hat
            if HAS_DGATE:
                rows = tl.load(rows_ptr + row * rows_row_stride + col, mask=mask, other=0.0)
                ple = (x_hat * weight + rows.to(tl.float32) * rows_scale) * input_scale
                dgate = (dout * ple * slope).to(dgate_ptr.dtype.element_ty)
                tl.store(dgate_ptr + row * P + col, dgate, mask=mask)
            if HAS_DPROJECTION:
                dprojection = norm_input_grad(dsum * weight, x_hat, rstd, P) * projection_scale
                dprojection = dprojection.to(dprojection_ptr.dtype.element_ty)
                tl.store(dprojection_ptr + row * P + col, dprojection, mask=mask)

    if HAS_DW:
        tl.store(dw_ptr + program * P + cols, tl.sum(dw, axis=0), mask=cols < P)


def ple_gate_fwd(
    gate: Tensor,
    projection: Tensor,
    rows: Tensor,
    norm_weight: Tensor,
    eps: float,
    projection_scale: float,
    rows_scale: float,
    input_scale: float,
) -> Tensor:
    dtype = _promoted(gate, projection, rows)
    out = torch.empty(gate.shape, dtype=dtype, device=gate.device)
    n_rows, width = row_count(gate), gate.shape[-1]
    block_r, block_p, num_warps = row_tile(width)
    inputs, strides = zip(*map(strided_rows, (gate, projection, rows)), strict=True)
    _ple_gate_fwd_kernel[(triton.cdiv(n_rows, block_r),)](
        *inputs,
        norm_weight,
        out,
        n_rows,
        *strides,
        eps,
        projection_scale,
        rows_scale,
        input_scale,
        P=width,
        BLOCK_R=block_r,
        BLOCK_P=block_p,
        num_warps=num_warps,
    )
    return out


def ple_gate_bwd(
    dout: Tensor,
    gate: Tensor,
    projection: Tensor,
    rows: Tensor,
    norm_weight: Tensor,
    eps: float,
    projection_scale: float,
    rows_scale: float,
    input_scale: float,
    *,
    needs: tuple[bool, bool, bool, bool] = (True, True, False, False),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``gate, projection, rows, norm_weight``, those that ``needs`` asks for."""
    needs_dw = needs[3]
    n_rows, width = row_count(gate), gate.shape[-1]
    block_r, block_p, num_warps = row_tile(width)
    rows_per_program, programs = share_rows(n_rows, block_r, needs_dw)
    dgate, dprojection, drows = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else None
        for x, needed in zip((gate, projection, rows), needs, strict=False)
    )
    sums = (
        torch.empty(programs, width, dtype=torch.float32, device=gate.device) if needs_dw else None
    )
    inputs, strides = zip(*map(strided_rows, (dout, gate, projection, rows)), strict=True)
    _ple_gate_bwd_kernel[(programs,)](
        *inputs,
        norm_weight,
        dgate,
        dprojection,
        drows,
        sums,
        n_rows,
        rows_per_program,
        *strides,
        eps,
        projection_scale,
        rows_scale,
        input_scale,
        P=width,
        BLOCK_R=block_r,
        BLOCK_P=block_p,
        HAS_DGATE=needs[0],
        HAS_DPROJECTION=needs[1],
        HAS_DROWS=needs[2],
        HAS_DW=needs_dw,
        num_warps=num_warps,
    )
    return dgate, dprojection, drows, weight_grad(sums, norm_weight)


class PLEGateFunction(torch.autograd.Function):
    """Saves the four tensors as they came; no gradient for the scales and ``eps``."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        projection: Tensor,
        rows: Tensor,
        norm_weight: Tensor,
        *scalars: float,
    ) -> Tensor:
        ctx.save_for_backward(gate, projection, rows, norm_weight)
        ctx.scalars = scalars
        return ple_gate_fwd(gate, projection, rows, norm_weight, *scalars)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:4]
        grads = ple_gate_bwd(dout, *ctx.saved_tensors, *ctx.scalars, needs=needs)
        return *grads, None, None, None, None


def ple_gate(
    gate: Tensor,
    projection: Tensor,
    rows: Tensor,
    norm_weight: Tensor,
    *,
    eps: float = 1e-6,
    projection_scale: float,
    rows_scale: float,
    input_scale: float,
) -> Tensor:
    """The gate of a decoder layer over its per-layer input, which is made on the way.

    Replaces:
        ``context = rms_norm(projection * projection_scale, norm_weight)``
        ``ple = (context + rows * rows_scale) * input_scale``
        ``out = torch.nn.functional.gelu(gate, approximate="tanh") * ple``
    Shapes:
        ``gate``, ``projection``, ``rows`` [..., P], any row stride (one layer's columns of a wider
        tensor are not copied); ``norm_weight`` [P]; returns [..., P] contiguous in the promoted
        dtype. Saved: the four tensors.
    Numerics:
        float32 throughout, one rounding (stock rounds seven times). The weight gradient is summed
        in float32 in a fixed order: a repeated run is bitwise the same.
    Raises:
        ValueError: shapes or devices do not match; rows are wider than 8192 (kernel only).
        TypeError: an input is not float32, bfloat16 or float16 (kernel only).
    Source:
        Written from the formula.
    """
    check_weight("ple_gate", norm_weight, gate, "norm_weight")
    for name, x in (("projection", projection), ("rows", rows)):
        if x.shape != gate.shape or x.device != gate.device:
            raise ValueError(
                f"ple_gate: {name} must be like gate, {tuple(gate.shape)} on {gate.device}, got "
                f"{tuple(x.shape)} on {x.device}. Pass this layer's own columns."
            )
    if use_kernel(gate):
        for name, x in (("gate", gate), ("projection", projection), ("rows", rows)):
            check_rows("ple_gate", x, name)
        return PLEGateFunction.apply(
            gate, projection, rows, norm_weight, eps, projection_scale, rows_scale, input_scale
        )
    return ple_gate_ref(
        gate,
        projection,
        rows,
        norm_weight,
        eps=eps,
        projection_scale=projection_scale,
        rows_scale=rows_scale,
        input_scale=input_scale,
    )
