"""What attention does to its heads first: RMSNorm of q, k and v, and RoPE of q and k.

``n = x * (mean(x^2) + eps)^-0.5 * weight`` over a head of H; then each pair ``(d, d + H/2)`` turns,
``y1 = n1 cos - n2 sin`` and ``y2 = n2 cos + n1 sin``. v is normed without a weight and not turned.

Stock runs norm and rotation as a chain of small kernels for each tensor, with four roundings; here
it is one kernel a direction for all three, rounding once, which reads the projections' output where
it lies. Backward sums the squares again: it has to read the inputs anyway.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_accel.kernels._triton import tl, triton, use_kernel
from gemma_accel.kernels.rms_norm import (
    check_rows,
    check_weight,
    rms_norm_ref,
    share_rows,
    weight_grad,
    widen,
)


def qkv_norm_rope_ref(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    rotary_pairs: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    half = q.shape[-1] // 2
    pairs = half if rotary_pairs is None else rotary_pairs
    cos, sin = (widen(t[:, :, None, :pairs]) for t in (cos, sin))

    def norm_rope(x: Tensor, weight: Tensor) -> Tensor:
        n = rms_norm_ref(widen(x), weight, eps)
        n1, n2 = n[..., :pairs], n[..., half : half + pairs]
        y1, y2 = n1 * cos - n2 * sin, n2 * cos + n1 * sin
        return torch.cat((y1, n[..., pairs:half], y2, n[..., half + pairs :]), -1).to(x.dtype)

    if k is None or v is None or k_weight is None:
        return norm_rope(q, q_weight), None, None
    return norm_rope(q, q_weight), norm_rope(k, k_weight), rms_norm_ref(v, None, eps)


@triton.jit
def _load_rotation(
    cos_ptr,
    sin_ptr,
    tokens,
    tokens_per_batch,
    rope_batch_stride,
    rope_token_stride,
    inside,
    cols,
    PAIRS: tl.constexpr,
):
    """cos and sin of a tile's rows. Pairs from ``PAIRS`` on do not turn and are not read."""
    batch = tokens // tokens_per_batch
    token = tokens - batch * tokens_per_batch
    offsets = batch.to(tl.int64) * rope_batch_stride + token.to(tl.int64) * rope_token_stride
    offsets = offsets[:, None] + cols[None, :]
    mask = inside[:, None] & (cols < PAIRS)[None, :]
    cos = tl.load(cos_ptr + offsets, mask=mask, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def _norm_rope_tile(
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
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """Norms rows ``first`` to ``first + BLOCK_R`` of [B * T * HEADS, H]; turns if ``ROTATED``."""
    rows = first + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_HALF)
    tokens = rows // HEADS
    inside = tokens < n_tokens
    mask = inside[:, None] & (cols < HALF)[None, :]

    x_tile = x_ptr + tokens * x_token_stride + rows % HEADS * (2 * HALF)
    x_tile = x_tile[:, None] + cols[None, :]
    y1 = tl.load(x_tile, mask=mask, other=0.0).to(tl.float32)
    y2 = tl.load(x_tile + HALF, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(y1 * y1 + y2 * y2, axis=1) / (2 * HALF) + eps)
    y1 *= rstd[:, None]
    y2 *= rstd[:, None]
    if ROTATED:
        cos, sin = _load_rotation(
            cos_ptr, sin_ptr, tokens.to(tl.int32), tokens_per_batch,
            rope_batch_stride, rope_token_stride, inside, cols, PAIRS,
        )  # fmt: skip
        w_tile = weight_ptr + cols
        y1 *= tl.load(w_tile, mask=cols < HALF, other=0.0).to(tl.float32)[None, :]
        y2 *= tl.load(w_tile + HALF, mask=cols < HALF, other=0.0).to(tl.float32)[None, :]
        turned = y1 * cos - y2 * sin
        y2 = y2 * cos + y1 * sin
        y1 = turned

    y_tile = y_ptr + rows[:, None] * (2 * HALF) + cols[None, :]
    tl.store(y_tile, y1.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_tile + HALF, y2.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_tokens", "tokens_per_batch", "q_programs", "k_programs"])
def _qkv_norm_rope_fwd_kernel(
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
    N: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)  # of q, then of k, then of v
    if program < q_programs:
        _norm_rope_tile(
            q_ptr, q_token_stride, q_weight_ptr,
            cos_ptr, sin_ptr, rope_batch_stride, rope_token_stride, q_out_ptr,
            program * BLOCK_R, n_tokens, tokens_per_batch, eps,
            N, HALF, PAIRS, BLOCK_R, BLOCK_HALF, True,
        )  # fmt: skip
    if K > 0:
        program -= q_programs
        if (program >= 0) & (program < k_programs):
            _norm_rope_tile(
                k_ptr, k_token_stride, k_weight_ptr,
                cos_ptr, sin_ptr, rope_batch_stride, rope_token_stride, k_out_ptr,
                program * BLOCK_R, n_tokens, tokens_per_batch, eps,
                K, HALF, PAIRS, BLOCK_R, BLOCK_HALF, True,
            )  # fmt: skip
        program -= k_programs
        if program >= 0:
            _norm_rope_tile(
                v_ptr, v_token_stride, None,
                cos_ptr, sin_ptr, rope_batch_stride, rope_token_stride, v_out_ptr,
                program * BLOCK_R, n_tokens, tokens_per_batch, eps,
                K, HALF, PAIRS, BLOCK_R, BLOCK_HALF, False,
            )  # fmt: skip


@triton.jit
def _norm_rope_tiles_bwd(
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
    dx_token_stride,
    dw_ptr,
    program,
    rows_per_program,
    n_tokens,
    tokens_per_batch,
    eps,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    ROTATED: tl.constexpr,
    HAS_DX: tl.constexpr,
    HAS_DW: tl.constexpr,
):
    """Gradients of a program's rows of [B * T * HEADS, H], and its row of the partial sums."""
    cols = tl.arange(0, BLOCK_HALF)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, n_tokens.to(tl.int64) * HEADS)
    if HAS_DW:
        dw1 = tl.zeros([BLOCK_R, BLOCK_HALF], dtype=tl.float32)
        dw2 = tl.zeros([BLOCK_R, BLOCK_HALF], dtype=tl.float32)

    for start in range(first, last, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        heads = rows % HEADS
        tokens = rows // HEADS
        inside = tokens < n_tokens
        mask = inside[:, None] & (cols < HALF)[None, :]

        batch = tokens.to(tl.int32) // tokens_per_batch
        token = (tokens.to(tl.int32) - batch * tokens_per_batch).to(tl.int64)
        dy_tile = dy_ptr + batch.to(tl.int64) * dy_batch_stride + token * dy_token_stride
        dy_tile = (dy_tile + heads * dy_head_stride)[:, None] + cols[None, :]
        dy1 = tl.load(dy_tile, mask=mask, other=0.0).to(tl.float32)
        dy2 = tl.load(dy_tile + HALF, mask=mask, other=0.0).to(tl.float32)
        x_tile = (x_ptr + tokens * x_token_stride + heads * (2 * HALF))[:, None] + cols[None, :]
        x1 = tl.load(x_tile, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_tile + HALF, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * HALF) + eps)
        x1 *= rstd[:, None]
        x2 *= rstd[:, None]
        if ROTATED:
            cos, sin = _load_rotation(
                cos_ptr, sin_ptr, tokens.to(tl.int32), tokens_per_batch,
                rope_batch_stride, rope_token_stride, inside, cols, PAIRS,
            )  # fmt: skip
            turned_back = dy1 * cos + dy2 * sin
            dy2 = dy2 * cos - dy1 * sin
            dy1 = turned_back
            if HAS_DW:
                dw1 += dy1 * x1
                dw2 += dy2 * x2
            w_tile = weight_ptr + cols
            dy1 *= tl.load(w_tile, mask=cols < HALF, other=0.0).to(tl.float32)[None, :]
            dy2 *= tl.load(w_tile + HALF, mask=cols < HALF, other=0.0).to(tl.float32)[None, :]
        if HAS_DX:
            along = tl.sum(dy1 * x1 + dy2 * x2, axis=1) / (2 * HALF)
            dx1 = (dy1 - x1 * along[:, None]) * rstd[:, None]
            dx2 = (dy2 - x2 * along[:, None]) * rstd[:, None]
            dx_tile = dx_ptr + tokens * dx_token_stride + heads * (2 * HALF)
            dx_tile = dx_tile[:, None] + cols[None, :]
            tl.store(dx_tile, dx1.to(dx_ptr.dtype.element_ty), mask=mask)
            tl.store(dx_tile + HALF, dx2.to(dx_ptr.dtype.element_ty), mask=mask)

    if HAS_DW:
        dw_row = dw_ptr + program * (2 * HALF) + cols
        tl.store(dw_row, tl.sum(dw1, axis=0), mask=cols < HALF)
        tl.store(dw_row + HALF, tl.sum(dw2, axis=0), mask=cols < HALF)


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
def _qkv_norm_rope_bwd_kernel(
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
    dq_token_stride,
    dk_token_stride,
    dv_token_stride,
    rope_batch_stride,
    rope_token_stride,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
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
            _norm_rope_tiles_bwd(
                dq_out_ptr, dq_out_batch_stride, dq_out_token_stride, dq_out_head_stride,
                q_ptr, q_token_stride, q_weight_ptr,
                cos_ptr, sin_ptr, rope_batch_stride, rope_token_stride,
                dq_ptr, dq_token_stride, dq_weight_ptr,
                program, q_rows_per_program, n_tokens, tokens_per_batch, eps,
                N, HALF, PAIRS, BLOCK_R, BLOCK_HALF, True, HAS_DQ, HAS_DQ_WEIGHT,
            )  # fmt: skip
    program -= q_programs
    if HAS_K:  # noqa: SIM102
        if (program >= 0) & (program < k_programs):
            _norm_rope_tiles_bwd(
                dk_out_ptr, dk_out_batch_stride, dk_out_token_stride, dk_out_head_stride,
                k_ptr, k_token_stride, k_weight_ptr,
                cos_ptr, sin_ptr, rope_batch_stride, rope_token_stride,
                dk_ptr, dk_token_stride, dk_weight_ptr,
                program, k_rows_per_program, n_tokens, tokens_per_batch, eps,
                K, HALF, PAIRS, BLOCK_R, BLOCK_HALF, True, HAS_DK, HAS_DK_WEIGHT,
            )  # fmt: skip
    program -= k_programs
    if HAS_V:  # noqa: SIM102
        if program >= 0:
            _norm_rope_tiles_bwd(
                dv_out_ptr, dv_out_batch_stride, dv_out_token_stride, dv_out_head_stride,
                v_ptr, v_token_stride, None,
                cos_ptr, sin_ptr, rope_batch_stride, rope_token_stride,
                dv_ptr, dv_token_stride, None,
                program, BLOCK_R, n_tokens, tokens_per_batch, eps,
                K, HALF, PAIRS, BLOCK_R, BLOCK_HALF, False, True, False,
            )  # fmt: skip


@cache
def head_tile(size: int) -> tuple[int, int, int]:
    """``BLOCK_R, BLOCK_HALF, num_warps``: several heads a program, 16 elements a thread."""
    block_half = triton.next_power_of_2(size // 2)
    block_r = max(1, 1024 // block_half)
    return block_r, block_half, block_r * block_half // 256


def _token_stride(x: Tensor) -> int | None:
    """The stride between tokens of [B, T, heads, H], or None where one is not enough."""
    batch, tokens, heads, size = x.shape
    if x.is_contiguous():
        return heads * size
    batch_stride, token_stride, head_stride, stride = x.stride()
    if stride != 1 or (heads > 1 and head_stride != size):
        return None
    if tokens == 1:
        return batch_stride
    return token_stride if batch == 1 or batch_stride == tokens * token_stride else None


def _token_rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """``x`` and its token stride; a copy where one stride is not enough. Nothing for None."""
    if x is None:
        return None, 0
    stride = _token_stride(x)
    return (x, stride) if stride is not None else _token_rows(x.contiguous())


def _result(
    name: str, given: Tensor | None, x: Tensor | None, needed: bool
) -> tuple[Tensor | None, int]:
    """A gradient's buffer and its token stride: the one given, or a new one if needed."""
    if x is None or not needed:
        return None, 0
    if given is None:
        return _token_rows(torch.empty_like(x, memory_format=torch.contiguous_format))
    stride = _token_stride(given)
    if stride is None or given.shape != x.shape:
        raise ValueError(
            f"qkv_norm_rope_bwd: {name} must have shape {tuple(x.shape)} with contiguous heads and "
            f"one token stride, got {tuple(given.shape)} with strides {given.stride()}. "
            "Pass a contiguous tensor, or columns of one."
        )
    return given, stride


def _rotation(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """cos and sin with the strides they share, batch and token; a batch of one serves all."""
    if cos.stride(2) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1)


def qkv_norm_rope_fwd(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    rotary_pairs: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    batch, tokens, n_heads, size = q.shape
    k_heads = 0 if k is None else k.shape[2]
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    k_out, v_out = (
        None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (k, v)
    )
    (q_rows, q_stride), (k_rows, k_stride), (v_rows, v_stride) = map(_token_rows, (q, k, v))
    block_r, block_half, num_warps = head_tile(size)
    q_programs = triton.cdiv(batch * tokens * n_heads, block_r)
    k_programs = triton.cdiv(batch * tokens * k_heads, block_r)
    cos, sin, *rope_strides = _rotation(cos, sin)
    _qkv_norm_rope_fwd_kernel[(q_programs + 2 * k_programs,)](
        q_rows,
        k_rows,
        v_rows,
        q_weight,
        k_weight,
        cos,
        sin,
        q_out,
        k_out,
        v_out,
        batch * tokens,
        tokens,
        q_programs,
        k_programs,
        q_stride,
        k_stride,
        v_stride,
        *rope_strides,
        eps,
        N=n_heads,
        K=k_heads,
        HALF=size // 2,
        PAIRS=rotary_pairs,
        BLOCK_R=block_r,
        BLOCK_HALF=block_half,
        num_warps=num_warps,
    )
    return q_out, k_out, v_out


def qkv_norm_rope_bwd(
    dq_out: Tensor | None,
    dk_out: Tensor | None,
    dv_out: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    rotary_pairs: int,
    *,
    needs: tuple[bool, ...] = (True, True, True, False, False),
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``q, k, v, q_weight, k_weight``, those that ``needs`` asks for.

    Any of the incoming gradients may be None: nothing flows back from it then. ``dq, dk, dv`` are
    buffers to write into, such as the columns of a fused projection's gradient.
    """
    arrives = (dq_out is not None, dk_out is not None, dv_out is not None)
    needs_dq, needs_dk, needs_dv, needs_dqw, needs_dkw = (
        need and there for need, there in zip(needs, (*arrives, *arrives[:2]), strict=True)
    )
    has_q, has_k = needs_dq or needs_dqw, needs_dk or needs_dkw
    if not (has_q or has_k or needs_dv):
        return None, None, None, None, None
    batch, tokens, n_heads, size = q.shape
    n_tokens, k_heads = batch * tokens, 0 if k is None else k.shape[2]
    block_r, block_half, num_warps = head_tile(size)
    q_share, q_programs = share_rows(n_tokens * n_heads * has_q, block_r, needs_dqw)
    k_share, k_programs = share_rows(n_tokens * k_heads * has_k, block_r, needs_dkw)
    v_programs = triton.cdiv(n_tokens * k_heads * needs_dv, block_r)
    dq, dq_stride = _result("dq", dq, q, needs_dq)
    dk, dk_stride = _result("dk", dk, k, needs_dk)
    dv, dv_stride = _result("dv", dv, v, needs_dv)
    dqw_sums, dkw_sums = (
        torch.empty(programs, size, dtype=torch.float32, device=q.device) if needed else None
        for programs, needed in ((q_programs, needs_dqw), (k_programs, needs_dkw))
    )
    incoming = [
        dy if dy is None or dy.stride(3) == 1 else dy.contiguous()
        for dy in (dq_out, dk_out, dv_out)
    ]
    (q_rows, q_stride), (k_rows, k_stride), (v_rows, v_stride) = map(_token_rows, (q, k, v))
    cos, sin, *rope_strides = _rotation(cos, sin)
    _qkv_norm_rope_bwd_kernel[(q_programs + k_programs + v_programs,)](
        *incoming,
        q_rows,
        k_rows,
        v_rows,
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
        q_stride,
        k_stride,
        v_stride,
        dq_stride,
        dk_stride,
        dv_stride,
        *rope_strides,
        eps,
        N=n_heads,
        K=k_heads,
        HALF=size // 2,
        PAIRS=rotary_pairs,
        BLOCK_R=block_r,
        BLOCK_HALF=block_half,
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


class QKVNormRopeFunction(torch.autograd.Function):
    """Saves its inputs. No gradient for cos, sin, ``eps`` and ``rotary_pairs``."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        q_weight: Tensor,
        k_weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        rotary_pairs: int,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, q_weight, k_weight, cos, sin)
        ctx.eps, ctx.rotary_pairs = eps, rotary_pairs
        return qkv_norm_rope_fwd(q, k, v, q_weight, k_weight, cos, sin, eps, rotary_pairs)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        incoming = (dq, dk, dv, *ctx.saved_tensors, ctx.eps, ctx.rotary_pairs)
        grads = qkv_norm_rope_bwd(*incoming, needs=ctx.needs_input_grad[:5])
        return *grads, None, None, None, None


def qkv_norm_rope(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    rotary_pairs: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Norm of q, k and v by head, then RoPE of q and k.

    Replaces:
        ``q = apply_rotary_pos_emb(rms_norm(q, q_weight), cos, sin, unsqueeze_dim=2)``
        ``k = apply_rotary_pos_emb(rms_norm(k, k_weight), cos, sin, unsqueeze_dim=2)``
        ``v = rms_norm(v)``
    Shapes:
        ``q`` [B, T, N, H], ``k``, ``v`` [B, T, K, H] or both None (layers that share keys and
        values) and possibly the same tensor; one token stride and contiguous heads are read in
        place, such as views of a fused projection. ``cos``, ``sin`` [B or 1, T, H], the second half
        of H like the first; ``rotary_pairs`` says how many pairs turn at all (None: every one), and
        only so many columns are read. Returns q, k, v in their own shape and dtype, contiguous.
        Saved: the inputs.
    Numerics:
        float32 throughout, one rounding (stock rounds after the norm, each product and the sum).
        Weight gradients are summed in float32 in a fixed order: a repeated run is bitwise the same.
    Raises:
        ValueError: shapes or devices do not match; H is odd; ``rotary_pairs`` is not in 0..H/2;
            heads are wider than 8192 (kernel only).
        TypeError: an input is not float32, bfloat16 or float16 (kernel only).
    Source:
        Written from the formula.
    """
    pairs = q.shape[-1] // 2 if rotary_pairs is None else rotary_pairs
    _check(q, k, v, q_weight, k_weight, cos, sin, pairs)
    if use_kernel(q):
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x is not None:
                check_rows("qkv_norm_rope", x, name)
        return QKVNormRopeFunction.apply(q, k, v, q_weight, k_weight, cos, sin, eps, pairs)
    return qkv_norm_rope_ref(q, k, v, q_weight, k_weight, cos, sin, eps=eps, rotary_pairs=pairs)


def _check(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    pairs: int,
) -> None:
    if q.dim() != 4 or q.shape[-1] % 2:
        raise ValueError(
            f"qkv_norm_rope: q must be [B, T, heads, H] with an even H, got {tuple(q.shape)}. "
            "View the projection as heads first."
        )
    batch, tokens, _, size = q.shape
    check_weight("qkv_norm_rope", q_weight, q, "q_weight")
    if (k is None) != (v is None) or (k is None) != (k_weight is None):
        given = [n for n, x in (("k", k), ("v", v), ("k_weight", k_weight)) if x is not None]
        raise ValueError(
            f"qkv_norm_rope: k, v and k_weight go together, got only {' and '.join(given)}. "
            "Pass all three, or None for each in a layer that shares keys and values."
        )
    if k is not None and v is not None and k_weight is not None:
        check_weight("qkv_norm_rope", k_weight, k, "k_weight")
        if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[-1] != size:
            raise ValueError(
                f"qkv_norm_rope: k and v must be [B, T, heads, H] like q, {tuple(q.shape)}, got "
                f"{tuple(k.shape)} and {tuple(v.shape)}. View the projections as heads first."
            )
    if cos.shape != sin.shape or cos.shape not in ((batch, tokens, size), (1, tokens, size)):
        raise ValueError(
            f"qkv_norm_rope: cos and sin must be [B or 1, T, H] = {(batch, tokens, size)}, got "
            f"{tuple(cos.shape)} and {tuple(sin.shape)}. Pass this layer type's embeddings."
        )
    if cos.device != q.device or sin.device != q.device:
        raise ValueError(
            f"qkv_norm_rope: cos and sin must be on {q.device} like q, got {cos.device} and "
            f"{sin.device}. Move them there once, outside the layers."
        )
    if not 0 <= pairs <= size // 2:
        raise ValueError(
            f"qkv_norm_rope: rotary_pairs must be in 0..H/2 = {size // 2}, got {pairs}. "
            "It counts pairs, so a full rotation has half as many as the head has elements."
        )
