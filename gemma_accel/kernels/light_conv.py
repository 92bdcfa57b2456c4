"""The middle of a conformer's light convolution, between its two products.

``g = a * sigmoid(b)`` of the two halves of a row, ``c[t] = sum_k w[k] g[t - K + 1 + k]`` channel by
channel, and ``y = clip(silu(rms_norm(clip(c)) * weight))``. Stock transposes, pads, convolves and
clamps in about twelve launches. Here a row reads the K rows before it again, which are still in
cache, so that nothing but its result is written. Backward first finds the gradient of ``c``, row by
row, then gathers it back over the K rows after each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_accel.kernels._triton import tl, triton, use_kernel
from gemma_accel.kernels.clip import EVERYTHING, Range, clip_ref, clipped, inside
from gemma_accel.kernels.clip_norm import silu_and_grad
from gemma_accel.kernels.rms_norm import (
    check_rows,
    check_weight,
    norm_input_grad,
    rms_norm_ref,
    share_rows,
    strided_rows,
    weight_grad,
    widen,
)


def light_conv_ref(
    x: Tensor,
    conv: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    before: Range = EVERYTHING,
    middle: Range = EVERYTHING,
    after: Range = EVERYTHING,
) -> Tensor:
    gated = F.glu(widen(clip_ref(x, before)), dim=-1).transpose(1, 2)
    gated = F.pad(gated, (conv.shape[-1] - 1, 0))
    c = F.conv1d(gated, widen(conv), groups=conv.shape[0]).transpose(1, 2)
    y = F.silu(rms_norm_ref(clip_ref(c, middle), weight, eps)).to(x.dtype)
    return clip_ref(y, after)


@triton.jit
def _gated(x_ptr, rows, exists, x_row_stride, cols, low, high, D: tl.constexpr):
    """``clip(a) * sigmoid(clip(b))`` of a tile's rows, 0 where there is no row."""
    at = x_ptr + rows[:, None] * x_row_stride + cols[None, :]
    mask = exists[:, None] & (cols < D)[None, :]
    a = clipped(tl.load(at, mask=mask, other=0.0).to(tl.float32), low, high)
    b = clipped(tl.load(at + D, mask=mask, other=0.0).to(tl.float32), low, high)
    return tl.where(mask, a * tl.sigmoid(b), 0.0)


@triton.jit
def _convolved(
    x_ptr, conv_ptr, rows, tokens_per_batch, n_rows, x_row_stride, cols, low, high,
    D: tl.constexpr, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    c = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    token = rows.to(tl.int32) % tokens_per_batch
    for k in tl.static_range(K):
        exists = (token >= K - 1 - k) & (rows < n_rows)
        g = _gated(x_ptr, rows - (K - 1 - k), exists, x_row_stride, cols, low, high, D)
        w = tl.load(conv_ptr + cols * K + k, mask=cols < D, other=0.0).to(tl.float32)
        c += g * w[None, :]
    return c


@triton.jit(do_not_specialize=["n_rows", "tokens_per_batch"])
def _light_conv_fwd_kernel(
    x_ptr,
    conv_ptr,
    weight_ptr,
    y_ptr,
    n_rows,
    tokens_per_batch,
    x_row_stride,
    eps,
    before_low,
    before_high,
    middle_low,
    middle_high,
    after_low,
    after_high,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < n_rows)[:, None] & (cols < D)[None, :]
    c = _convolved(
        x_ptr, conv_ptr, rows, tokens_per_batch, n_rows, x_row_stride, cols,
        before_low, before_high, D, K, BLOCK_R, BLOCK_D,
    )  # fmt: skip
    c = tl.where(mask, clipped(c, middle_low, middle_high), 0.0)
    rstd = tl.rsqrt(tl.sum(c * c, axis=1) / D + eps)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    y = c * rstd[:, None] * weight[None, :]
    y = (y * tl.sigmoid(y)).to(y_ptr.dtype.element_ty).to(tl.float32)
    y = clipped(y, after_low, after_high).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * D + cols[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["n_rows", "tokens_per_batch", "rows_per_program"])
def _light_conv_dc_kernel(
    dy_ptr,
    x_ptr,
    conv_ptr,
    weight_ptr,
    dc_ptr,  # [R, D] float32
    dw_ptr,  # [programs, D] float32
    n_rows,
    tokens_per_batch,
    rows_per_program,
    dy_row_stride,
    x_row_stride,
    eps,
    before_low,
    before_high,
    middle_low,
    middle_high,
    after_low,
    after_high,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_DW: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, n_rows)
    cols = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    if HAS_DW:
        dw = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)

    for start in range(first, last, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        mask = (rows < n_rows)[:, None] & (cols < D)[None, :]
        c = _convolved(
            x_ptr, conv_ptr, rows, tokens_per_batch, n_rows, x_row_stride, cols,
            before_low, before_high, D, K, BLOCK_R, BLOCK_D,
        )  # fmt: skip
        passes = inside(c, middle_low, middle_high)
        c = tl.where(mask, clipped(c, middle_low, middle_high), 0.0)
        rstd = tl.rsqrt(tl.sum(c * c, axis=1) / D + eps)
        c_hat = c * rstd[:, None]
        y, slope = silu_and_grad(c_hat * weight[None, :])
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32)  # what forward rounded and held
        dy = tl.load(dy_ptr + rows[:, None] * dy_row_stride + cols[None, :], mask=mask, other=0.0)
        dy = tl.where(inside(y, after_low, after_high), dy.to(tl.float32) * slope, 0.0)
        if HAS_DW:
            dw += dy * c_hat
        dc = norm_input_grad(dy * weight[None, :], c_hat, rstd, D)
        dc = tl.where(passes, dc, 0.0)
        tl.store(dc_ptr + rows[:, None] * D + cols[None, :], dc, mask=mask)

    if HAS_DW:
        tl.store(dw_ptr + program * D + cols, tl.sum(dw, axis=0), mask=cols < D)


@triton.jit(do_not_specialize=["n_rows", "tokens_per_batch", "rows_per_program"])
def _light_conv_dx_kernel(
    dc_ptr,
    x_ptr,
    conv_ptr,
    dx_ptr,
    dconv_ptr,  # [programs, K, D] float32
    n_rows,
    tokens_per_batch,
    rows_per_program,
    x_row_stride,
    before_low,
    before_high,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_DX: tl.constexpr,
    HAS_DCONV: tl.constexpr,
):
    """Row by row: what its K later rows give back, through the gate; and the filter's sums."""
    program = tl.program_id(0)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < D
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, n_rows)
    if HAS_DCONV:
        taps = tl.arange(0, BLOCK_K)
        dconv = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)

    for number in range(first, last):
        # a vector of 32 bits divides fast, one of 64 addresses
        left = tokens_per_batch - 1 - (tl.zeros([BLOCK_D], tl.int32) + number) % tokens_per_batch
        row = cols * 0 + number
        x_row = x_ptr + row * x_row_stride + cols
        a = tl.load(x_row, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_row + D, mask=mask, other=0.0).to(tl.float32)
        a_held, gate = clipped(a, before_low, before_high), clipped(b, before_low, before_high)
        gate = tl.sigmoid(gate)
        dg = tl.zeros([BLOCK_D], dtype=tl.float32)
        for k in tl.static_range(K):
            # row t reached row t + K - 1 - k through tap k
            there = mask & (left >= K - 1 - k)
            dc = tl.load(dc_ptr + (row + K - 1 - k) * D + cols, mask=there, other=0.0)
            if HAS_DX:
                dg += dc * tl.load(conv_ptr + cols * K + k, mask=mask, other=0.0).to(tl.float32)
            if HAS_DCONV:
                dconv += tl.where((taps == k)[:, None], (dc * a_held * gate)[None, :], 0.0)
        if HAS_DX:
            da = tl.where(inside(a, before_low, before_high), dg * gate, 0.0)
            db = dg * a_held * gate * (1.0 - gate)
            db = tl.where(inside(b, before_low, before_high), db, 0.0)
            dx_row = dx_ptr + row * (2 * D) + cols
            tl.store(dx_row, da.to(dx_ptr.dtype.element_ty), mask=mask)
            tl.store(dx_row + D, db.to(dx_ptr.dtype.element_ty), mask=mask)

    if HAS_DCONV:
        at = dconv_ptr + (program.to(tl.int64) * K + taps[:, None]) * D + cols[None, :]
        tl.store(at, dconv, mask=(taps < K)[:, None] & mask[None, :])


def tile(width: int) -> tuple[int, int, int]:
    """``BLOCK_R, BLOCK_D, num_warps``: half of a norm's rows, as K of them are at hand."""
    block_d = triton.next_power_of_2(width)
    block_r = max(1, 1024 // block_d)
    return block_r, block_d, max(4, block_d // 128)


def light_conv_fwd(
    x: Tensor, conv: Tensor, weight: Tensor, eps: float, ranges: tuple[Range, Range, Range]
) -> Tensor:
    batch, tokens, _ = x.shape
    width, taps = conv.shape[0], conv.shape[-1]
    y = torch.empty(batch, tokens, width, dtype=x.dtype, device=x.device)
    x, x_row_stride = strided_rows(x)
    block_r, block_d, num_warps = tile(width)
    _light_conv_fwd_kernel[(triton.cdiv(batch * tokens, block_r),)](
        x,
        conv.contiguous(),
        weight,
        y,
        batch * tokens,
        tokens,
        x_row_stride,
        eps,
        *(end for to in ranges for end in to),
        D=width,
        K=taps,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=num_warps,
    )
    return y


DX_ROWS = 4  # rows a program of the second kernel takes where no filter is trained


def light_conv_bwd(
    dy: Tensor,
    x: Tensor,
    conv: Tensor,
    weight: Tensor,
    eps: float,
    ranges: tuple[Range, Range, Range],
    *,
    needs: tuple[bool, bool, bool] = (True, False, False),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``x, conv, weight``, those that ``needs`` asks for."""
    needs_dx, needs_dconv, needs_dw = needs
    batch, tokens, _ = x.shape
    n_rows, width, taps = batch * tokens, conv.shape[0], conv.shape[-1]
    block_r, block_d, num_warps = tile(width)
    rows_per_program, programs = share_rows(n_rows, block_r, needs_dw)
    dc = torch.empty(n_rows, width, dtype=torch.float32, device=x.device)
    dw = torch.empty(programs, width, dtype=torch.float32, device=x.device) if needs_dw else None
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else None
    dy, dy_row_stride = strided_rows(dy)
    x, x_row_stride = strided_rows(x)
    conv_rows = conv.contiguous()
    _light_conv_dc_kernel[(programs,)](
        dy,
        x,
        conv_rows,
        weight,
        dc,
        dw,
        n_rows,
        tokens,
        rows_per_program,
        dy_row_stride,
        x_row_stride,
        eps,
        *(end for to in ranges for end in to),
        D=width,
        K=taps,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        HAS_DW=needs_dw,
        num_warps=num_warps,
    )
    if not (needs_dx or needs_dconv):
        return None, None, weight_grad(dw, weight)
    rows_per_program, programs = share_rows(n_rows, DX_ROWS, needs_dconv)
    dconv = None
    if needs_dconv:
        dconv = torch.empty(programs, taps, width, dtype=torch.float32, device=x.device)
    block_d = min(512, triton.next_power_of_2(width))
    _light_conv_dx_kernel[(programs, triton.cdiv(width, block_d))](
        dc,
        x,
        conv_rows,
        dx,
        dconv,
        n_rows,
        tokens,
        rows_per_program,
        x_row_stride,
        *ranges[0],
        D=width,
        K=taps,
        BLOCK_K=triton.next_power_of_2(taps),
        BLOCK_D=block_d,
        HAS_DX=needs_dx,
        HAS_DCONV=needs_dconv,
        num_warps=4,
    )
    if dconv is not None:
        dconv = dconv.sum(0).t().reshape(conv.shape).to(conv.dtype)
    return dx, dconv, weight_grad(dw, weight)


class LightConvFunction(torch.autograd.Function):
    """Saves its inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        conv: Tensor,
        weight: Tensor,
        eps: float,
        ranges: tuple[Range, Range, Range],
    ) -> Tensor:
        ctx.how = eps, ranges
        ctx.save_for_backward(x, conv, weight)
        return light_conv_fwd(x, conv, weight, eps, ranges)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        grads = light_conv_bwd(dy, *ctx.saved_tensors, *ctx.how, needs=ctx.needs_input_grad[:3])
        return *grads, None, None


def light_conv(
    x: Tensor,
    conv: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    before: Range = EVERYTHING,
    middle: Range = EVERYTHING,
    after: Range = EVERYTHING,
) -> Tensor:
    """Gate, causal convolution by channel, norm and SiLU, with the clamps on the way.

    Replaces:
        ``g = F.glu(torch.clamp(x, *before), dim=-1).transpose(1, 2)``
        ``c = F.conv1d(F.pad(g, (K - 1, 0)), conv, groups=D).transpose(1, 2)``
        ``torch.clamp(F.silu(rms_norm(torch.clamp(c, *middle), weight)), *after)``
    Shapes:
        ``x`` [B, T, 2D], any row stride; ``conv`` [D, 1, K]; ``weight`` [D]; returns [B, T, D]
        contiguous in ``x``'s dtype. Saved: the inputs.
    Numerics:
        float32 throughout, rounded once, then clamped (stock rounds five times on the way).
        Gradients pass a clamp where ``torch.clamp`` lets them. Those of ``conv`` and ``weight`` are
        summed in float32 in a fixed order: a repeated run is bitwise the same.
    Raises:
        ValueError: shapes do not match; D is more than 8192 (kernel only).
        TypeError: ``x`` is not float32, bfloat16 or float16 (kernel only).
    Source:
        Written from the formula.
    """
    if x.dim() != 3 or conv.dim() != 3 or conv.shape[:2] != (x.shape[-1] // 2, 1) or x.shape[2] % 2:
        raise ValueError(
            f"light_conv: x must have shape [B, T, 2D] and conv [D, 1, K], got {tuple(x.shape)} "
            f"and {tuple(conv.shape)}. Pass the first product's output and the filter by channel."
        )
    if not conv.is_floating_point() or conv.device != x.device:
        raise ValueError(
            f"light_conv: conv must be of a floating-point dtype and on {x.device}, got "
            f"{conv.dtype} on {conv.device}. Pass the convolution's own weight."
        )
    if not conv.numel():
        raise ValueError(
            f"light_conv: there must be channels and taps, got conv of {tuple(conv.shape)}. "
            "Pass the convolution's own weight."
        )
    check_weight("light_conv", weight, x[..., : conv.shape[0]])
    ranges = (before, middle, after)
    if use_kernel(x):
        check_rows("light_conv", x[..., : conv.shape[0]])
        return LightConvFunction.apply(x, conv, weight, eps, ranges)
    return light_conv_ref(x, conv, weight, eps=eps, before=before, middle=middle, after=after)
