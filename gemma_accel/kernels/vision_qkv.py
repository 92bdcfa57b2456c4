"""What vision attention does to its heads first: clamp, RMSNorm, and RoPE in two dimensions.

q, k and v come from clamped products. q and k are normed with a weight and turned: the first half
of a head by the patch's column, the second by its row, each in pairs ``(d, d + H/4)``. v is normed
without a weight. Stock takes about thirty launches for it; here it is one a direction, rounding
once. Backward reads the same inputs again and keeps nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_accel.kernels._triton import tl, triton, use_kernel
from gemma_accel.kernels.clip import EVERYTHING, Range, clip_ref, clipped, inside
from gemma_accel.kernels.qk_norm_rope import _rotation, _token_rows, head_tile
from gemma_accel.kernels.rms_norm import (
    check_rows,
    check_weight,
    rms_norm_ref,
    share_rows,
    weight_grad,
    widen,
)


def vision_qkv_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    q_range: Range = EVERYTHING,
    k_range: Range = EVERYTHING,
    v_range: Range = EVERYTHING,
) -> tuple[Tensor, Tensor, Tensor]:
    c, s = (widen(t[:, :, None]).chunk(4, -1) for t in (cos, sin))

    def norm_rope(x: Tensor, weight: Tensor, to: Range) -> Tensor:
        n = rms_norm_ref(widen(clip_ref(x, to)), weight, eps).chunk(4, -1)
        turned = []
        for i in (0, 2):  # the column's half, the row's half
            turned.append(n[i] * c[i] - n[i + 1] * s[i])
            turned.append(n[i + 1] * c[i] + n[i] * s[i])
        return torch.cat(turned, -1).to(x.dtype)

    value = rms_norm_ref(clip_ref(v, v_range), None, eps)
    return norm_rope(q, q_weight, q_range), norm_rope(k, k_weight, k_range), value


@triton.jit
def _columns(QUARTER: tl.constexpr, BLOCK: tl.constexpr):
    """The first column of each pair, its partner lying a quarter further, and which exist."""
    pair = tl.arange(0, BLOCK)
    return pair + tl.where(pair < QUARTER, 0, QUARTER), pair < 2 * QUARTER


@triton.jit
def _place(tokens, tokens_per_batch):
    """Which row of the batch, and where in it; 32 bits divide faster."""
    batch = tokens.to(tl.int32) // tokens_per_batch
    token = tokens.to(tl.int32) - batch * tokens_per_batch
    return batch.to(tl.int64), token.to(tl.int64)


@triton.jit
def _rotation_of(
    cos_ptr, sin_ptr, tokens, tokens_per_batch, batch_stride, token_stride, cols, mask
):
    """cos and sin of a tile's rows; a pair's two columns share them."""
    batch, token = _place(tokens, tokens_per_batch)
    at = (batch * batch_stride + token * token_stride)[:, None] + cols[None, :]
    cos = tl.load(cos_ptr + at, mask=mask, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def _forward_tile(
    x_ptr,
    x_token_stride,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    rope_batch_stride,
    rope_token_stride,
    y_ptr,
    first,
    n_tokens,
    tokens_per_batch,
    eps,
    low,
    high,
    HEADS: tl.constexpr,
    QUARTER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HAS_RANGE: tl.constexpr,
    ROTATED: tl.constexpr,
):
    rows = first + tl.arange(0, BLOCK_R)
    cols, exists = _columns(QUARTER, BLOCK_HALF)
    tokens = rows // HEADS
    mask = (tokens < n_tokens)[:, None] & exists[None, :]

    x_tile = x_ptr + tokens * x_token_stride + rows % HEADS * (4 * QUARTER)
    x_tile = x_tile[:, None] + cols[None, :]
    y1 = tl.load(x_tile, mask=mask, other=0.0).to(tl.float32)
    y2 = tl.load(x_tile + QUARTER, mask=mask, other=0.0).to(tl.float32)
    if HAS_RANGE:
        y1 = tl.where(mask, clipped(y1, low, high), 0.0)  # 0 may lie outside
        y2 = tl.where(mask, clipped(y2, low, high), 0.0)
    rstd = tl.rsqrt(tl.sum(y1 * y1 + y2 * y2, axis=1) / (4 * QUARTER) + eps)
    y1 *= rstd[:, None]
    y2 *= rstd[:, None]
    if ROTATED:
        cos, sin = _rotation_of(
            cos_ptr, sin_ptr, tokens, tokens_per_batch,
            rope_batch_stride, rope_token_stride, cols, mask,
        )  # fmt: skip
        y1 *= tl.load(weight_ptr + cols, mask=exists, other=0.0).to(tl.float32)[None, :]
        y2 *= tl.load(weight_ptr + cols + QUARTER, mask=exists, other=0.0).to(tl.float32)[None, :]
        turned = y1 * cos - y2 * sin
        y2 = y2 * cos + y1 * sin
        y1 = turned

    y_tile = y_ptr + rows[:, None] * (4 * QUARTER) + cols[None, :]
    tl.store(y_tile, y1.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_tile + QUARTER, y2.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_tokens", "tokens_per_batch", "q_programs", "k_programs"])
def _vision_qkv_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    n_tokens,
    tokens_per_batch,
    q_programs,
    k_programs,
    q_token_stride,
    k_token_stride,
    v_token_stride,
    rope_batch_stride,
    rope_token_stride,
    eps,
    q_low,
    q_high,
    k_low,
    k_high,
    v_low,
    v_high,
    N: tl.constexpr,
    K: tl.constexpr,
    QUARTER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HAS_RANGE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)  # of q, then of k, then of v
    if program < q_programs:
        _forward_tile(
            q_ptr, q_token_stride, q_weight_ptr,
            cos_ptr, sin_ptr, rope_batch_stride, rope_token_stride, q_out_ptr,
            program * BLOCK_R, n_tokens, tokens_per_batch, eps, q_low, q_high,
            N, QUARTER, BLOCK_R, BLOCK_HALF, HAS_RANGE, True,
        )  # fmt: skip
    program -= q_programs
    if (program >= 0) & (program < k_programs):
        _forward_tile(
            k_ptr, k_token_stride, k_weight_ptr,
            cos_ptr, sin_ptr, rope_batch_stride, rope_token_stride, k_out_ptr,
            program * BLOCK_R, n_tokens, tokens_per_batch, eps, k_low, k_high,
            K, QUARTER, BLOCK_R, BLOCK_HALF, HAS_RANGE, True,
        )  # fmt: skip
    program -= k_programs
    if program >= 0:
        _forward_tile(
            v_ptr, v_token_stride, None,
            cos_ptr, sin_ptr, rope_batch_stride, rope_token_stride, v_out_ptr,
            program * BLOCK_R, n_tokens, tokens_per_batch, eps, v_low, v_high,
            K, QUARTER, BLOCK_R, BLOCK_HALF, HAS_RANGE, False,
        )  # fmt: skip


@triton.jit
def _backward_tiles(
    dy_ptr,
    dy_batch_stride,
    dy_token_stride,
    dy_head_stride,
    x_ptr,
    x_token_stride,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    rope_batch_stride,
    rope_token_stride,
    dx_ptr,
    dw_ptr,
    program,
    rows_per_program,
    n_tokens,
    tokens_per_batch,
    eps,
    low,
    high,
    HEADS: tl.constexpr,
    QUARTER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HAS_RANGE: tl.constexpr,
    ROTATED: tl.constexpr,
    HAS_DX: tl.constexpr,
    HAS_DW: tl.constexpr,
):
    """Gradients of a program's rows of [B * T * HEADS, H], and its row of the partial sums."""
    cols, exists = _columns(QUARTER, BLOCK_HALF)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, n_tokens.to(tl.int64) * HEADS)
    if HAS_DW:
        dw1 = tl.zeros([BLOCK_R, BLOCK_HALF], dtype=tl.float32)
        dw2 = tl.zeros([BLOCK_R, BLOCK_HALF], dtype=tl.float32)

    for start in range(first, last, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        heads = rows % HEADS
        tokens = rows // HEADS
        mask = (tokens < n_tokens)[:, None] & exists[None, :]

        batch, token = _place(tokens, tokens_per_batch)
        dy_tile = dy_ptr + batch * dy_batch_stride + token * dy_token_stride
        dy_tile = (dy_tile + heads * dy_head_stride)[:, None] + cols[None, :]
        dy1 = tl.load(dy_tile, mask=mask, other=0.0).to(tl.float32)
        dy2 = tl.load(dy_tile + QUARTER, mask=mask, other=0.0).to(tl.float32)
        x_tile = (x_ptr + tokens * x_token_stride + heads * (4 * QUARTER))[:, None] + cols[None, :]
        x1 = tl.load(x_tile, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_tile + QUARTER, mask=mask, other=0.0).to(tl.float32)
        if HAS_RANGE:
            passes1, passes2 = inside(x1, low, high), inside(x2, low, high)
            x1 = tl.where(mask, clipped(x1, low, high), 0.0)
            x2 = tl.where(mask, clipped(x2, low, high), 0.0)
        rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / (4 * QUARTER) + eps)
        x1 *= rstd[:, None]
        x2 *= rstd[:, None]
        if ROTATED:
            cos, sin = _rotation_of(
                cos_ptr, sin_ptr, tokens, tokens_per_batch,
                rope_batch_stride, rope_token_stride, cols, mask,
            )  # fmt: skip
            turned_back = dy1 * cos + dy2 * sin
            dy2 = dy2 * cos - dy1 * sin
            dy1 = turned_back
            if HAS_DW:
                dw1 += dy1 * x1
                dw2 += dy2 * x2
            w_tile = weight_ptr + cols
            dy1 *= tl.load(w_tile, mask=exists, other=0.0).to(tl.float32)[None, :]
            dy2 *= tl.load(w_tile + QUARTER, mask=exists, other=0.0).to(tl.float32)[None, :]
        if HAS_DX:
            along = tl.sum(dy1 * x1 + dy2 * x2, axis=1) / (4 * QUARTER)
            dx1 = (dy1 - x1 * along[:, None]) * rstd[:, None]
            dx2 = (dy2 - x2 * along[:, None]) * rstd[:, None]
            if HAS_RANGE:
                dx1 = tl.where(passes1, dx1, 0.0)
                dx2 = tl.where(passes2, dx2, 0.0)
            dx_tile = dx_ptr + rows[:, None] * (4 * QUARTER) + cols[None, :]
            tl.store(dx_tile, dx1.to(dx_ptr.dtype.element_ty), mask=mask)
            tl.store(dx_tile + QUARTER, dx2.to(dx_ptr.dtype.element_ty), mask=mask)

    if HAS_DW:
        dw_row = dw_ptr + program * (4 * QUARTER) + cols
        tl.store(dw_row, tl.sum(dw1, axis=0), mask=exists)
        tl.store(dw_row + QUARTER, tl.sum(dw2, axis=0), mask=exists)


@triton.jit(
    do_not_specialize=[
        "n_tokens",
        "tokens_per_batch",
        "q_programs",
        "k_programs",
        "q_rows_per_program",
        "k_rows_per_program",
    ]
)
def _vision_qkv_bwd_kernel(
    dq_out_ptr,
    dk_out_ptr,
    dv_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dq_weight_ptr,  # [q_programs, H]
    dk_weight_ptr,  # [k_programs, H]
    n_tokens,
    tokens_per_batch,
    q_programs,
    k_programs,
    q_rows_per_program,
    k_rows_per_program,
    dq_out_batch_stride,
    dq_out_token_stride,
    dq_out_head_stride,
    dk_out_batch_stride,
    dk_out_token_stride,
    dk_out_head_stride,
    dv_out_batch_stride,
    dv_out_token_stride,
    dv_out_head_stride,
    q_token_stride,
    k_token_stride,
    v_token_stride,
    rope_batch_stride,
    rope_token_stride,
    eps,
    q_low,
    q_high,
    k_low,
    k_high,
    v_low,
    v_high,
    N: tl.constexpr,
    K: tl.constexpr,
    QUARTER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HAS_RANGE: tl.constexpr,
    HAS_Q: tl.constexpr,  # a gradient arrives and something of q wants one
    HAS_K: tl.constexpr,
    HAS_V: tl.constexpr,
    HAS_DQ: tl.constexpr,
    HAS_DK: tl.constexpr,
    HAS_DQ_WEIGHT: tl.constexpr,
    HAS_DK_WEIGHT: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)  # of q, then of k, then of v
    if HAS_Q:  # noqa: SIM102  decided when compiling, the inner one when running
        if program < q_programs:
            _backward_tiles(
                dq_out_ptr, dq_out_batch_stride, dq_out_token_stride, dq_out_head_stride,
                q_ptr, q_token_stride, q_weight_ptr,
                cos_ptr, sin_ptr, rope_batch_stride, rope_token_stride, dq_ptr, dq_weight_ptr,
                program, q_rows_per_program, n_tokens, tokens_per_batch, eps, q_low, q_high,
                N, QUARTER, BLOCK_R, BLOCK_HALF, HAS_RANGE, True, HAS_DQ, HAS_DQ_WEIGHT,
            )  # fmt: skip
    program -= q_programs
    if HAS_K:  # noqa: SIM102
        if (program >= 0) & (program < k_programs):
            _backward_tiles(
                dk_out_ptr, dk_out_batch_stride, dk_out_token_stride, dk_out_head_stride,
                k_ptr, k_token_stride, k_weight_ptr,
                cos_ptr, sin_ptr, rope_batch_stride, rope_token_stride, dk_ptr, dk_weight_ptr,
                program, k_rows_per_program, n_tokens, tokens_per_batch, eps, k_low, k_high,
                K, QUARTER, BLOCK_R, BLOCK_HALF, HAS_RANGE, True, HAS_DK, HAS_DK_WEIGHT,
            )  # fmt: skip
    program -= k_programs
    if HAS_V:  # noqa: SIM102
        if program >= 0:
            _backward_tiles(
                dv_out_ptr, dv_out_batch_stride, dv_out_token_stride, dv_out_head_stride,
                v_ptr, v_token_stride, None,
                cos_ptr, sin_ptr, rope_batch_stride, rope_token_stride, dv_ptr, None,
                program, BLOCK_R, n_tokens, tokens_per_batch, eps, v_low, v_high,
                K, QUARTER, BLOCK_R, BLOCK_HALF, HAS_RANGE, False, True, False,
            )  # fmt: skip


def vision_qkv_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    ranges: tuple[Range, Range, Range],
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, n_heads, size = q.shape
    k_heads = k.shape[2]
    contiguous = torch.contiguous_format
    outs = [torch.empty_like(x, memory_format=contiguous) for x in (q, k, v)]
    rows, strides = zip(*map(_token_rows, (q, k, v)), strict=True)
    block_r, block_half, num_warps = head_tile(size)
    q_programs = triton.cdiv(batch * tokens * n_heads, block_r)
    k_programs = triton.cdiv(batch * tokens * k_heads, block_r)
    cos, sin, *rope_strides = _rotation(cos, sin)
    _vision_qkv_fwd_kernel[(q_programs + 2 * k_programs,)](
        *rows,
        q_weight,
        k_weight,
        cos,
        sin,
        *outs,
        batch * tokens,
        tokens,
        q_programs,
        k_programs,
        *strides,
        *rope_strides,
        eps,
        *(end for to in ranges for end in to),
        N=n_heads,
        K=k_heads,
        QUARTER=size // 4,
        BLOCK_R=block_r,
        BLOCK_HALF=block_half,
        HAS_RANGE=any(to.bounded for to in ranges),
        num_warps=num_warps,
    )
    return outs[0], outs[1], outs[2]


def vision_qkv_bwd(
    dq_out: Tensor | None,
    dk_out: Tensor | None,
    dv_out: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    ranges: tuple[Range, Range, Range],
    *,
    needs: tuple[bool, ...] = (True, True, True, False, False),
) -> tuple[Tensor | None, ...]:
    """Gradients of ``q, k, v, q_weight, k_weight``, those that ``needs`` asks for.

    Any of the incoming gradients may be None: nothing flows back from it then.
    """
    arrives = [dy is not None for dy in (dq_out, dk_out, dv_out, dq_out, dk_out)]
    needs = tuple(need and there for need, there in zip(needs, arrives, strict=True))
    needs_dq, needs_dk, needs_dv, needs_dqw, needs_dkw = needs
    has_q, has_k = needs_dq or needs_dqw, needs_dk or needs_dkw
    if not any(needs):
        return None, None, None, None, None
    batch, tokens, n_heads, size = q.shape
    n_tokens, k_heads = batch * tokens, k.shape[2]
    block_r, block_half, num_warps = head_tile(size)
    q_share, q_programs = share_rows(n_tokens * n_heads * has_q, block_r, needs_dqw)
    k_share, k_programs = share_rows(n_tokens * k_heads * has_k, block_r, needs_dkw)
    v_programs = triton.cdiv(n_tokens * k_heads * needs_dv, block_r)
    contiguous = torch.contiguous_format
    dq, dk, dv = (
        torch.empty_like(x, memory_format=contiguous) if needed else None
        for x, needed in zip((q, k, v), needs, strict=False)
    )
    dqw_sums, dkw_sums = (
        torch.empty(programs, size, dtype=torch.float32, device=q.device) if needed else None
        for programs, needed in ((q_programs, needs_dqw), (k_programs, needs_dkw))
    )
    incoming = [
        dy if dy is None or dy.stride(3) == 1 else dy.contiguous()
        for dy in (dq_out, dk_out, dv_out)
    ]
    rows, strides = zip(*map(_token_rows, (q, k, v)), strict=True)
    cos, sin, *rope_strides = _rotation(cos, sin)
    _vision_qkv_bwd_kernel[(q_programs + k_programs + v_programs,)](
        *incoming,
        *rows,
        q_weight,
        k_weight,
        cos,
        sin,
        dq,
        dk,
        dv,
        dqw_sums,
        dkw_sums,
        n_tokens,
        tokens,
        q_programs,
        k_programs,
        q_share,
        k_share,
        *(s for dy in incoming for s in ((0, 0, 0) if dy is None else dy.stride()[:3])),
        *strides,
        *rope_strides,
        eps,
        *(end for to in ranges for end in to),
        N=n_heads,
        K=k_heads,
        QUARTER=size // 4,
        BLOCK_R=block_r,
        BLOCK_HALF=block_half,
        HAS_RANGE=any(to.bounded for to in ranges),
        HAS_Q=has_q,
        HAS_K=has_k,
        HAS_V=needs_dv,
        HAS_DQ=needs_dq,
        HAS_DK=needs_dk,
        HAS_DQ_WEIGHT=needs_dqw,
        HAS_DK_WEIGHT=needs_dkw,
        num_warps=num_warps,
    )
    return dq, dk, dv, weight_grad(dqw_sums, q_weight), weight_grad(dkw_sums, k_weight)


class VisionQKVFunction(torch.autograd.Function):
    """Saves its inputs. Gradients for q, k, v and the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        ranges: tuple[Range, Range, Range],
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, q_weight, k_weight, cos, sin)
        ctx.eps, ctx.ranges = eps, ranges
        return vision_qkv_fwd(q, k, v, q_weight, k_weight, cos, sin, eps, ranges)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        incoming = (dq, dk, dv, *ctx.saved_tensors, ctx.eps, ctx.ranges)
        grads = vision_qkv_bwd(*incoming, needs=ctx.needs_input_grad[:5])
        return *grads, None, None, None, None


def vision_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    q_range: Range = EVERYTHING,
    k_range: Range = EVERYTHING,
    v_range: Range = EVERYTHING,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clamp and norm of q, k and v by head, then two-dimensional RoPE of q and k.

    Replaces:
        ``q = rms_norm(torch.clamp(q, *q_range), q_weight)``, k likewise
        ``q = apply_multidimensional_rope(q, cos, sin, position_ids)``, k likewise
        ``v = rms_norm(torch.clamp(v, *v_range))``
    Shapes:
        ``q`` [B, T, N, H], ``k``, ``v`` [B, T, K, H]; one token stride and contiguous heads are
        read in place. ``cos``, ``sin`` [B or 1, T, H]: by quarters of H column, column, row, row,
        of which the first and the third are read. Returns q, k, v in their own shape and dtype,
        contiguous. Saved: the inputs.
    Numerics:
        float32 throughout, one rounding (stock rounds after the norm, each product and the sum).
        Gradients pass a clamp where ``torch.clamp`` lets them. Weight gradients are summed in
        float32 in a fixed order: a repeated run is bitwise the same.
    Raises:
        ValueError: shapes or devices do not match; H is no multiple of 4; heads are wider than
            8192 (kernel only).
        TypeError: an input is not float32, bfloat16 or float16 (kernel only).
    Source:
        Written from the formula.
    """
    _check(q, k, v, q_weight, k_weight, cos, sin)
    ranges = (q_range, k_range, v_range)
    if use_kernel(q):
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_rows("vision_qkv", x, name)
        return VisionQKVFunction.apply(q, k, v, q_weight, k_weight, cos, sin, eps, ranges)
    names = ("q_range", "k_range", "v_range")
    named = dict(zip(names, ranges, strict=True))
    return vision_qkv_ref(q, k, v, q_weight, k_weight, cos, sin, eps=eps, **named)


def _check(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> None:
    if q.dim() != 4 or q.shape[-1] % 4:
        raise ValueError(
            f"vision_qkv: q must have shape [B, T, N, H], H a multiple of 4, got {tuple(q.shape)}. "
            "View the projection's output by head."
        )
    expected = (*q.shape[:2], k.shape[2] if k.dim() == 4 else -1, q.shape[3])
    if k.shape != expected or v.shape != expected or {k.device, v.device} != {q.device}:
        raise ValueError(
            f"vision_qkv: k and v must have shape [B, T, K, H] = {expected} on {q.device}, got "
            f"{tuple(k.shape)} and {tuple(v.shape)} on {k.device} and {v.device}. "
            "View the projections' outputs by head."
        )
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check_weight("vision_qkv", weight, q, name)
    shape = (*q.shape[:2], q.shape[3])
    if cos.shape != sin.shape or cos.shape[1:] != shape[1:] or cos.shape[0] not in (1, shape[0]):
        raise ValueError(
            f"vision_qkv: cos and sin must have shape [B or 1, T, H] = {shape}, got "
            f"{tuple(cos.shape)} and {tuple(sin.shape)}. Pass the tower's position embeddings."
        )
