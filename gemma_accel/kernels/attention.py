"""Causal attention for wide heads, sliding windows and packed batches.

    out[t] = sum_s softmax_s(scale q[t].k[s]) v[s],    max(first[t], t - window + 1) <= s <= t

Worth a kernel because nothing fused covers it: FlashAttention stops at head size 256 where Gemma
4's global layers have 512, and a dense mask makes a sliding layer's work and memory quadratic. Here
no T x T tensor exists at any length, and blocks of keys outside the window or in another document
are never visited, forward or backward.

Four ideas carry the file.
- The query heads that share a key/value head are folded into the rows of a tile: row = (position,
  head). One K/V tile then serves all of them, a tile of 64 rows spans only 8 positions (so it
  visits few keys beyond a window's edge), and dK and dV are summed over the group inside one
  program, in a fixed order: deterministic without atomics.
- A span of blocks splits into those at its edges (the diagonal, the window's end, a document's
  border), which need a mask, and those inside, which do not: two loops over one body. Where the
  second loop would not fit the registers, one masked loop does for all (``edges=False``).
- Head size 512 leaves no room for 128 rows of output, so two programs share a tile of rows, each
  with half of V's columns (``parts``). Scores are then computed twice, and it still wins
  over 64 rows with all columns (benchmarks/LOG.md).
- dK and dV accumulate transposed (``flip``) on Hopper, whose matrix instruction wants 64 rows: a
  block may then have 32 keys, which makes twice the programs, and their number is what limited that
  launch.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_accel.kernels._triton import tl, triton, use_kernel
from gemma_accel.kernels.segments import Segments

__all__ = ["attention", "attention_bwd", "attention_fwd", "attention_ref", "supported", "tiles"]

LOG2E = 1.0 / math.log(2.0)
HEAD_SIZES = (16, 32, 64, 128, 256, 512)
MAX_GROUP = 16  # query heads of a key/value head: they share a tile, and the smallest has 16 rows


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float = 1.0,
    window: int | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """The specification, its mask written out. Scores and softmax in float32, as the kernels."""
    group, tokens = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    t = torch.arange(tokens, device=q.device)
    first = torch.zeros_like(t)[None] if segments is None else segments.first
    if window is not None:
        first = torch.maximum(first, t - window + 1)
    sees = (first[:, :, None] <= t) & (t <= t[:, None])  # [B or 1, T queries, T keys]
    accumulate = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(accumulate) @ k.to(accumulate).transpose(2, 3) * scale
    scores = scores.masked_fill(~sees[:, None], -math.inf)
    # a query that sees nothing has a row of -inf: its softmax would be NaN, its output is zero
    blind = ~sees.any(-1)[:, None, :, None]
    p = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    return (p @ v.to(accumulate)).to(v.dtype).transpose(1, 2).contiguous()


# ------------------------------------------------------------------------------------------ kernels


@triton.jit
def _span(lo, full_lo, full_hi, hi, STEP: tl.constexpr, EDGES: tl.constexpr):
    """Blocks of STEP that cover [lo, hi): those within [full_lo, full_hi) need no mask.

    Returns the first block, where the unmasked run begins and how many blocks it has, how many
    masked blocks lie right of it, and how many on both sides. Without EDGES all are masked.
    """
    begin = lo // STEP * STEP
    full_begin = begin
    full_end = begin
    if EDGES:
        full_begin = tl.cdiv(full_lo, STEP) * STEP
        full_end = full_hi // STEP * STEP
        has_full = full_begin < full_end
        full_begin = tl.where(has_full, full_begin, begin)
        full_end = tl.where(has_full, full_end, begin)
    full = (full_end - full_begin) // STEP
    right = tl.maximum(tl.cdiv(hi - full_end, STEP), 0)
    return begin, full_begin, full, right, right + (full_begin - begin) // STEP


@triton.jit
def _start(i, begin, full_begin, full, right, STEP: tl.constexpr, MASKED: tl.constexpr):
    """Where the i-th unmasked block starts, or the i-th masked: the right edge, then the left."""
    if MASKED:
        return tl.where(i < right, full_begin + (full + i) * STEP, begin + (i - right) * STEP)
    else:
        return full_begin + i * STEP


@triton.jit
def _dot_t(a, b, T, UNCHAIN: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b.T in float32.

    Triton gives a product that feeds another one a layout with all warps along the rows; with two
    warpgroups and 64 rows both then compute the same. It does not look through a branch: UNCHAIN
    hides the chain behind one that is always taken, which halves the matrix instructions there.
    """
    if UNCHAIN:
        c = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
        if T > 0:
            c = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    else:
        c = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    return c


@triton.jit
def _keys(base, start, row_stride, tile, T, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """A tile of K or V. Only a masked block can reach beyond the last key."""
    ptrs = base + tl.cast(start, tl.int64) * row_stride + tile
    if MASKED:
        return tl.load(ptrs, mask=(start + tl.arange(0, BLOCK_N) < T)[:, None], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _key_span(
    first_ptr, t, row_ok, first_row, T, window, HAS_SEGMENTS: tl.constexpr,
    POSITIONS: tl.constexpr, BLOCK_N: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """The first key each row sees, and the span of key blocks its tile visits."""
    lo = tl.maximum(t - window + 1, 0)
    if HAS_SEGMENTS:
        lo = tl.maximum(lo, tl.load(first_ptr + t, mask=t < T, other=0))
    begin, full_begin, full, right, masked = _span(
        tl.min(tl.where(row_ok, lo, T)),
        tl.max(tl.where(row_ok, lo, 0)),
        first_row + 1,
        tl.minimum(first_row + POSITIONS, T),
        BLOCK_N,
        EDGES,
    )
    return lo, begin, full_begin, full, right, masked


@triton.jit
def _fwd_loop(
    acc, total, top, q, t, lo, k_base, v_base, k_row_stride, v_row_stride, k_tile, v_tile,
    blocks, begin, full_begin, full, right, T, scale_log2, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    UNCHAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over ``blocks`` blocks of keys; ``top`` is the largest score, base 2."""
    for i in range(blocks):
        start = _start(i, begin, full_begin, full, right, BLOCK_N, MASKED)
        k = _keys(k_base, start, k_row_stride, k_tile, T, BLOCK_N, MASKED)
        scores = _dot_t(q, k, T, UNCHAIN, PRECISION)
        if MASKED:
            s = start + tl.arange(0, BLOCK_N)
            seen = (s[None, :] >= lo[:, None]) & (s[None, :] <= t[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        # a row that has seen nothing yet keeps -inf, and -inf minus -inf would be NaN
        shift = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
        p = tl.math.exp2(scores * scale_log2 - shift[:, None])
        alpha = tl.math.exp2(top - shift)
        total = total * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v = _keys(v_base, start, v_row_stride, v_tile, T, BLOCK_N, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=["T", "window"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, first_ptr,
    q_batch_stride, q_head_stride, q_row_stride,
    k_batch_stride, k_head_stride, k_row_stride,
    v_batch_stride, v_head_stride, v_row_stride,
    T, window, scale_log2,
    K: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, H: tl.constexpr,
    HV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    EDGES: tl.constexpr, UNCHAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    POSITIONS: tl.constexpr = BLOCK_M // GROUP_PAD
    PARTS: tl.constexpr = H // HV  # programs of one tile of rows, each with its columns of V
    pid = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    blocks = tl.cdiv(T, POSITIONS)
    heads = tl.num_programs(0) // (PARTS * blocks)  # B * K
    block = blocks - 1 - pid // heads  # the last rows see the most keys: they start first
    b = (pid % heads // K).to(tl.int64)
    kv = (pid % K).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    t = block * POSITIONS + row // GROUP_PAD
    n = kv * GROUP + row % GROUP_PAD
    row_ok = (t < T) & (row % GROUP_PAD < GROUP)
    cols = tl.arange(0, H)
    v_cols = part * HV + tl.arange(0, HV)
    q_rows = b * q_batch_stride + t.to(tl.int64) * q_row_stride + n * q_head_stride
    q = tl.load(q_ptr + q_rows[:, None] + cols[None, :], mask=row_ok[:, None], other=0.0)
    lo, begin, full_begin, full, right, masked = _key_span(
        first_ptr + b * T, t, row_ok, block * POSITIONS, T, window,
        HAS_SEGMENTS, POSITIONS, BLOCK_N, EDGES,
    )  # fmt: skip

    k_base = k_ptr + b * k_batch_stride + kv * k_head_stride
    v_base = v_ptr + b * v_batch_stride + kv * v_head_stride
    k_tile = tl.arange(0, BLOCK_N)[:, None] * k_row_stride + cols[None, :]
    v_tile = tl.arange(0, BLOCK_N)[:, None] * v_row_stride + v_cols[None, :]
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HV], tl.float32)
    acc, total, top = _fwd_loop(
        acc, total, top, q, t, lo, k_base, v_base, k_row_stride, v_row_stride, k_tile, v_tile,
        masked, begin, full_begin, full, right, T, scale_log2, BLOCK_N, True, UNCHAIN, PRECISION,
    )  # fmt: skip
    if EDGES:
        acc, total, top = _fwd_loop(
            acc, total, top, q, t, lo, k_base, v_base, k_row_stride, v_row_stride, k_tile, v_tile,
            full, begin, full_begin, full, right, T, scale_log2,
            BLOCK_N, False, UNCHAIN, PRECISION,
        )  # fmt: skip

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    acc = acc * (1.0 / total)[:, None]
    out_rows = (b * T + t) * (K * GROUP) + n
    o_ptrs = o_ptr + out_rows[:, None] * H + v_cols[None, :]
    tl.store(o_ptrs, acc.to(o_ptr.dtype.element_ty), mask=row_ok[:, None])
    if part == 0:
        # +inf where nothing was seen: the backward's exp2(score - lse) is then 0, never NaN
        lse = tl.where(seen, top + tl.math.log2(total), float("inf"))
        tl.store(lse_ptr + out_rows, lse, mask=row_ok)


@triton.jit
def _dq_loop(
    dq, q, do, lse, delta, t, lo, k_base, v_base, k_row_stride, v_row_stride, k_tile, v_tile,
    blocks, begin, full_begin, full, right, T, scale_log2, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    UNCHAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for i in range(blocks):
        start = _start(i, begin, full_begin, full, right, BLOCK_N, MASKED)
        k = _keys(k_base, start, k_row_stride, k_tile, T, BLOCK_N, MASKED)
        v = _keys(v_base, start, v_row_stride, v_tile, T, BLOCK_N, MASKED)
        scores = _dot_t(q, k, T, UNCHAIN, PRECISION)
        dp = _dot_t(do, v, T, UNCHAIN, PRECISION)
        p = tl.math.exp2(scores * scale_log2 - lse[:, None])
        if MASKED:
            s = start + tl.arange(0, BLOCK_N)
            p = tl.where((s[None, :] >= lo[:, None]) & (s[None, :] <= t[:, None]), p, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["T", "window"])
def _attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, first_ptr,
    q_batch_stride, q_head_stride, q_row_stride,
    k_batch_stride, k_head_stride, k_row_stride,
    v_batch_stride, v_head_stride, v_row_stride,
    do_batch_stride, do_row_stride, do_head_stride,
    dq_batch_stride, dq_head_stride, dq_row_stride,
    T, window, scale, scale_log2,
    K: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    WANT_DQ: tl.constexpr, EDGES: tl.constexpr, UNCHAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, and delta = rowsum(dO * O) on the way, which the dK/dV launch after this one reads."""
    POSITIONS: tl.constexpr = BLOCK_M // GROUP_PAD
    blocks = tl.cdiv(T, POSITIONS)
    heads = tl.num_programs(0) // blocks
    block = blocks - 1 - tl.program_id(0) // heads
    b = (tl.program_id(0) % heads // K).to(tl.int64)
    kv = (tl.program_id(0) % K).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    t = block * POSITIONS + row // GROUP_PAD
    n = kv * GROUP + row % GROUP_PAD
    row_ok = (t < T) & (row % GROUP_PAD < GROUP)
    cols = tl.arange(0, H)
    out_rows = (b * T + t) * (K * GROUP) + n
    do_rows = b * do_batch_stride + t.to(tl.int64) * do_row_stride + n * do_head_stride
    do = tl.load(do_ptr + do_rows[:, None] + cols[None, :], mask=row_ok[:, None], other=0.0)
    o = tl.load(o_ptr + out_rows[:, None] * H + cols[None, :], mask=row_ok[:, None], other=0.0)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + out_rows, delta, mask=row_ok)
    if WANT_DQ:
        lse = tl.load(lse_ptr + out_rows, mask=row_ok, other=float("inf"))
        q_rows = b * q_batch_stride + t.to(tl.int64) * q_row_stride + n * q_head_stride
        q = tl.load(q_ptr + q_rows[:, None] + cols[None, :], mask=row_ok[:, None], other=0.0)
        lo, begin, full_begin, full, right, masked = _key_span(
            first_ptr + b * T, t, row_ok, block * POSITIONS, T, window,
            HAS_SEGMENTS, POSITIONS, BLOCK_N, EDGES,
        )  # fmt: skip
        k_base = k_ptr + b * k_batch_stride + kv * k_head_stride
        v_base = v_ptr + b * v_batch_stride + kv * v_head_stride
        k_tile = tl.arange(0, BLOCK_N)[:, None] * k_row_stride + cols[None, :]
        v_tile = tl.arange(0, BLOCK_N)[:, None] * v_row_stride + cols[None, :]
        dq = tl.zeros([BLOCK_M, H], tl.float32)
        dq = _dq_loop(
            dq, q, do, lse, delta, t, lo, k_base, v_base, k_row_stride, v_row_stride,
            k_tile, v_tile, masked, begin, full_begin, full, right, T, scale_log2,
            BLOCK_N, True, UNCHAIN, PRECISION,
        )  # fmt: skip
        if EDGES:
            dq = _dq_loop(
                dq, q, do, lse, delta, t, lo, k_base, v_base, k_row_stride, v_row_stride,
                k_tile, v_tile, full, begin, full_begin, full, right, T, scale_log2,
                BLOCK_N, False, UNCHAIN, PRECISION,
            )  # fmt: skip
        dq_rows = b * dq_batch_stride + t.to(tl.int64) * dq_row_stride + n * dq_head_stride
        dq_ptrs = dq_ptr + dq_rows[:, None] + cols[None, :]
        tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=row_ok[:, None])


@triton.jit
def _rows(
    base, start, row_stride, tile, T, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of Q or dO: BLOCK_M // GROUP_PAD positions from ``start``, each with its heads."""
    ptrs = base + tl.cast(start, tl.int64) * row_stride + tile
    if MASKED or GROUP != GROUP_PAD:
        row = tl.arange(0, BLOCK_M)
        row_ok = (start + row // GROUP_PAD < T) & (row % GROUP_PAD < GROUP)
        return tl.load(ptrs, mask=row_ok[:, None], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _dkv_loop(
    dk, dv, k, v, s, hi, q_base, do_base, lse_base, delta_base, q_row_stride, do_row_stride,
    stat_row_stride, q_tile, do_tile, blocks, begin, full_begin, full, right, T, scale_log2,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, BLOCK_M: tl.constexpr, WANT_DK: tl.constexpr,
    WANT_DV: tl.constexpr, MASKED: tl.constexpr, FLIP: tl.constexpr, UNCHAIN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``blocks`` tiles of query rows into a block's dK and dV.

    Scores are [keys, rows], so that both products take them as the left operand, from registers;
    with FLIP they are [rows, keys], and the accumulators transposed, [H, keys].
    """
    POSITIONS: tl.constexpr = BLOCK_M // GROUP_PAD
    row = tl.arange(0, BLOCK_M)
    stat_tile = row // GROUP_PAD * stat_row_stride + row % GROUP_PAD
    for i in range(blocks):
        start = _start(i, begin, full_begin, full, right, POSITIONS, MASKED)
        t = start + row // GROUP_PAD
        row_ok = (t < T) & (row % GROUP_PAD < GROUP)
        stats = tl.cast(start, tl.int64) * stat_row_stride + stat_tile
        # +inf makes p zero: rows beyond the end need no other care
        lse = tl.load(lse_base + stats, mask=row_ok, other=float("inf"))
        if WANT_DK:
            delta = tl.load(delta_base + stats, mask=row_ok, other=0.0)
            do = _rows(do_base, start, do_row_stride, do_tile, T, BLOCK_M, GROUP, GROUP_PAD, MASKED)
            if FLIP:
                dp = _dot_t(do, v, T, UNCHAIN, PRECISION)
            else:
                dp = _dot_t(v, do, T, UNCHAIN, PRECISION)
        q = _rows(q_base, start, q_row_stride, q_tile, T, BLOCK_M, GROUP, GROUP_PAD, MASKED)
        if FLIP:
            scores = _dot_t(q, k, T, UNCHAIN, PRECISION)
            p = tl.math.exp2(scores * scale_log2 - lse[:, None])
            if MASKED:
                p = tl.where((t[:, None] >= s[None, :]) & (t[:, None] <= hi[None, :]), p, 0.0)
        else:
            scores = _dot_t(k, q, T, UNCHAIN, PRECISION)
            p = tl.math.exp2(scores * scale_log2 - lse[None, :])
            if MASKED:
                p = tl.where((t[None, :] >= s[:, None]) & (t[None, :] <= hi[:, None]), p, 0.0)
        if WANT_DK and FLIP:
            # Rounded before dV's product, so that it finds its place in shared memory while dO
            # still holds its own. Were it to take dO's, ptxas 12.8 mixes up the two matrix
            # descriptors that then start alike (seen at head size 512: dK wrong, or a fault).
            ds = (p * (dp - delta[:, None])).to(q.dtype)
        if WANT_DV:
            if not WANT_DK:
                do = _rows(
                    do_base, start, do_row_stride, do_tile, T, BLOCK_M, GROUP, GROUP_PAD, MASKED
                )
            if FLIP:
                dv = tl.dot(tl.trans(do), p.to(do.dtype), dv, input_precision=PRECISION)
            else:
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        if WANT_DK:
            if FLIP:
                dk = tl.dot(tl.trans(q), ds, dk, input_precision=PRECISION)
            else:
                ds = p * (dp - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["T", "window"])
def _attention_dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, last_ptr, order_ptr,
    q_batch_stride, q_head_stride, q_row_stride,
    k_batch_stride, k_head_stride, k_row_stride,
    v_batch_stride, v_head_stride, v_row_stride,
    do_batch_stride, do_row_stride, do_head_stride,
    dk_batch_stride, dk_head_stride, dk_row_stride,
    dv_batch_stride, dv_head_stride, dv_row_stride,
    T, window, scale, scale_log2,
    K: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    WANT_DK: tl.constexpr, WANT_DV: tl.constexpr, EDGES: tl.constexpr, FLIP: tl.constexpr,
    UNCHAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK, dV or both of one block of keys, over every row that sees it."""
    POSITIONS: tl.constexpr = BLOCK_M // GROUP_PAD
    blocks = tl.cdiv(T, BLOCK_N)
    pid = tl.program_id(0)
    kv = (pid % K).to(tl.int64)
    if HAS_SEGMENTS:
        item = tl.load(order_ptr + pid // K)
        block = item % blocks
        b = (item // blocks).to(tl.int64)
    else:
        heads = tl.num_programs(0) // blocks
        block = pid // heads  # the first keys are seen by the most rows: they start first
        b = (pid % heads // K).to(tl.int64)
    s = block * BLOCK_N + tl.arange(0, BLOCK_N)
    hi = tl.minimum(s + window, T) - 1  # the last row that sees each key
    if HAS_SEGMENTS:
        hi = tl.minimum(hi, tl.load(last_ptr + b * T + s, mask=s < T, other=-1))
    begin, full_begin, full, right, masked = _span(
        block * BLOCK_N,
        tl.minimum((block + 1) * BLOCK_N, T) - 1,
        tl.min(tl.where(s < T, hi, T)) + 1,
        tl.max(tl.where(s < T, hi, -1)) + 1,
        POSITIONS,
        EDGES,
    )
    row = tl.arange(0, BLOCK_M)
    position = row // GROUP_PAD
    head = row % GROUP_PAD
    cols = tl.arange(0, H)
    n = kv * GROUP
    q_base = q_ptr + b * q_batch_stride + n * q_head_stride
    do_base = do_ptr + b * do_batch_stride + n * do_head_stride
    q_tile = (position * q_row_stride + head * q_head_stride)[:, None] + cols[None, :]
    do_tile = (position * do_row_stride + head * do_head_stride)[:, None] + cols[None, :]
    stat_row_stride = K * GROUP
    lse_base = lse_ptr + b * T * stat_row_stride + n
    delta_base = delta_ptr + b * T * stat_row_stride + n
    rows = s.to(tl.int64)[:, None]
    k_base = k_ptr + b * k_batch_stride + kv * k_head_stride
    v_base = v_ptr + b * v_batch_stride + kv * v_head_stride
    dk_base = dk_ptr + b * dk_batch_stride + kv * dk_head_stride
    dv_base = dv_ptr + b * dv_batch_stride + kv * dv_head_stride
    key_ok = (s < T)[:, None]

    k = tl.load(k_base + rows * k_row_stride + cols[None, :], mask=key_ok, other=0.0)
    v = k
    dk = 0.0
    dv = 0.0
    if WANT_DK:
        v = tl.load(v_base + rows * v_row_stride + cols[None, :], mask=key_ok, other=0.0)
        dk = tl.zeros([H, BLOCK_N] if FLIP else [BLOCK_N, H], tl.float32)
    if WANT_DV:
        dv = tl.zeros([H, BLOCK_N] if FLIP else [BLOCK_N, H], tl.float32)
    dk, dv = _dkv_loop(
        dk, dv, k, v, s, hi, q_base, do_base, lse_base, delta_base, q_row_stride, do_row_stride,
        stat_row_stride, q_tile, do_tile, masked, begin, full_begin, full, right, T, scale_log2,
        GROUP, GROUP_PAD, BLOCK_M, WANT_DK, WANT_DV, True, FLIP, UNCHAIN, PRECISION,
    )  # fmt: skip
    if EDGES:
        dk, dv = _dkv_loop(
            dk, dv, k, v, s, hi, q_base, do_base, lse_base, delta_base, q_row_stride, do_row_stride,
            stat_row_stride, q_tile, do_tile, full, begin, full_begin, full, right, T, scale_log2,
            GROUP, GROUP_PAD, BLOCK_M, WANT_DK, WANT_DV, False, FLIP, UNCHAIN, PRECISION,
        )  # fmt: skip
    if WANT_DK:
        dk = tl.trans(dk) if FLIP else dk
        dk_ptrs = dk_base + rows * dk_row_stride + cols[None, :]
        tl.store(dk_ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=key_ok)
    if WANT_DV:
        dv = tl.trans(dv) if FLIP else dv
        dv_ptrs = dv_base + rows * dv_row_stride + cols[None, :]
        tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=key_ok)


# ---------------------------------------------------------------------------------------- launchers


class Tile(NamedTuple):
    """One kernel's configuration: rows (positions times heads), keys, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    edges: bool = True  # a loop of its own for blocks that need no mask
    unchain: bool = False  # see _dot_t
    parts: int = 1  # programs that share a tile of rows (forward)
    flip: bool = False  # transposed accumulators (dK/dV)


class Tiles(NamedTuple):
    fwd: Tile
    dq: Tile
    dkv: Tile


_NARROW = Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2))
_FLOAT32 = Tiles(*[Tile(16, 16, 4, 1)] * 3)
_TABLE = {
    (80, 256): Tiles(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
    (80, 512): Tiles(
        Tile(32, 32, 4, 3, edges=False), Tile(32, 32, 4, 2), Tile(64, 16, 8, 2, edges=False)
    ),
    (86, 256): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (86, 512): Tiles(Tile(32, 32, 4, 2), Tile(16, 32, 4, 2), Tile(32, 16, 4, 2, edges=False)),
    (90, 256): Tiles(
        Tile(128, 64, 8, 2), Tile(128, 32, 8, 3), Tile(64, 32, 8, 2, unchain=True, flip=True)
    ),
    (90, 512): Tiles(
        Tile(128, 32, 8, 2, parts=2),
        Tile(64, 32, 8, 1, edges=False, unchain=True),
        Tile(64, 32, 8, 1, edges=False, unchain=True, flip=True),
    ),
}


def tiles(capability: int, head_size: int, itemsize: int) -> Tiles | None:
    """The configuration for a card (``10 * major + minor``), or None if there is none.

    How the table was chosen. For 90, by ``benchmarks.bench_attention --sweep`` on an H100, among
    candidates whose registers and spills had been read from the cubin. For 80 and for 86 (which
    also serves 89, 120 and cards without an entry: 99 KiB of shared memory), from the cubin alone:
    what fits, computes no score twice (the matrix instructions of a loop are the tile's products),
    stores nothing to local memory inside a loop, and of those the tile that reads the fewest bytes
    of K, V, Q and dO a product. The sweep redoes the choice on any card.
    """
    if capability < 80:
        return None
    if itemsize == 4:  # exact float32 products: no matrix unit, and at 512 four tiles do not fit
        return _FLOAT32 if head_size <= 256 else None
    if head_size <= 128:
        return _NARROW
    return _TABLE[capability if capability in (80, 90) else 86, head_size]


@functools.cache
def _tiles_on(device: torch.device, head_size: int, itemsize: int) -> Tiles | None:
    if device.type != "cuda":
        # the interpreter: small tiles, so that small tests cross their borders, and every option
        narrow = head_size < 32
        return Tiles(*[Tile(32, 16, 4, 1, edges=narrow, parts=2, flip=narrow)] * 3)
    major, minor = torch.cuda.get_device_capability(device)
    return tiles(10 * major + minor, head_size, itemsize)


def supported(q: Tensor, k: Tensor) -> str | None:
    """Why the kernels cannot serve these tensors, or None if they can."""
    size, group = q.shape[-1], q.shape[1] // k.shape[1]
    if size not in HEAD_SIZES:
        return f"head_dim is {size}; the kernels cover {', '.join(map(str, HEAD_SIZES))}"
    if group > MAX_GROUP:
        return f"{group} query heads share a key/value head; the kernels cover {MAX_GROUP}"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype is {q.dtype}; the kernels cover float32, bfloat16 and float16"
    if _tiles_on(q.device, size, q.element_size()) is None:
        return f"there is no configuration for head_dim {size} in {q.dtype} on this card"
    return None


def _shape(q: Tensor, k: Tensor) -> dict[str, Any]:
    """Compile-time arguments that all three kernels share."""
    group = q.shape[1] // k.shape[1]
    return {
        "K": k.shape[1],
        "GROUP": group,
        "GROUP_PAD": 1 << (group - 1).bit_length(),
        "H": q.shape[3],
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",  # 16-bit products ignore it
    }


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    """``out`` [B, T, N, H], and the base-2 log-sum-exp [B, T, N] of each row's scaled scores."""
    batch, heads, tokens, size = q.shape
    chosen = _tiles_on(q.device, size, q.element_size())
    assert chosen is not None  # `supported` was asked
    tile = chosen.fwd
    shape = _shape(q, k)
    out = torch.empty((batch, tokens, heads, size), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, tokens, heads), dtype=torch.float32, device=q.device)
    blocks = triton.cdiv(tokens, tile.block_m // shape["GROUP_PAD"])
    _attention_fwd_kernel[(blocks * batch * k.shape[1] * tile.parts,)](
        q, k, v, out, lse, lse if segments is None else segments.first,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        tokens, window, scale * LOG2E,
        HV=size // tile.parts, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        HAS_SEGMENTS=segments is not None, EDGES=tile.edges, UNCHAIN=tile.unchain,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **shape,
    )  # fmt: skip
    return out, lse


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    scale: float, window: int, segments: Segments | None, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dq, dk and dv, laid out as q, k and v; each None where ``needs`` does not ask for it."""
    batch, _, tokens, size = q.shape
    kv_heads = k.shape[1]
    chosen = _tiles_on(q.device, size, q.element_size())
    assert chosen is not None  # `supported` was asked
    _, tile, dkv = chosen
    shape = _shape(q, k)
    if dout.stride(3) != 1:
        dout = dout.contiguous()
    delta = torch.empty_like(lse)
    dq = torch.empty_like(q) if needs[0] else None
    dk = torch.empty_like(k) if needs[1] else None
    dv = torch.empty_like(v) if needs[2] else None
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    numbers = (tokens, window, scale, scale * LOG2E)
    if needs[0] or needs[1]:  # delta enters dq and dk
        target = q if dq is None else dq
        blocks = triton.cdiv(tokens, tile.block_m // shape["GROUP_PAD"])
        _attention_dq_kernel[(blocks * batch * kv_heads,)](
            q, k, v, out, dout, lse, delta, target, lse if segments is None else segments.first,
            *strides, *target.stride()[:3], *numbers,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, HAS_SEGMENTS=segments is not None,
            WANT_DQ=needs[0], EDGES=tile.edges, UNCHAIN=tile.unchain,
            num_warps=tile.num_warps, num_stages=tile.num_stages, **shape,
        )  # fmt: skip
    if needs[1] or needs[2]:
        target_k, target_v = k if dk is None else dk, v if dv is None else dv
        last = lse if segments is None else segments.last
        order = lse if segments is None else segments.longest_first(dkv.block_n)
        _attention_dkv_kernel[(triton.cdiv(tokens, dkv.block_n) * batch * kv_heads,)](
            q, k, v, dout, lse, delta, target_k, target_v, last, order,
            *strides, *target_k.stride()[:3], *target_v.stride()[:3], *numbers,
            BLOCK_M=dkv.block_m, BLOCK_N=dkv.block_n, HAS_SEGMENTS=segments is not None,
            WANT_DK=needs[1], WANT_DV=needs[2],
            EDGES=dkv.edges, FLIP=dkv.flip, UNCHAIN=dkv.unchain,
            num_warps=dkv.num_warps, num_stages=dkv.num_stages, **shape,
        )  # fmt: skip
    return dq, dk, dv


# --------------------------------------------------------------------------------- Function and op


class AttentionFunction(torch.autograd.Function):
    """Saves q, k, v, the output and one float32 a row. Only q, k and v have gradients."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, segments: Segments | None
    ) -> Tensor:
        out, lse = attention_fwd(q, k, v, scale, window, segments)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.window, ctx.segments = scale, window, segments
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        gradients = attention_bwd(
            dout, q, k, v, out, lse, ctx.scale, ctx.window, ctx.segments, ctx.needs_input_grad[:3]
        )
        return *gradients, None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float = 1.0,
    window: int | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """Causal self-attention with grouped heads, a sliding window, and packed or padded rows.

    *Replaces* the mask and ``sdpa(q, repeat_kv(k), repeat_kv(v), mask, scale=scale)``, transposed
    to [B, T, N, H].

    *Shapes*: q [B, N, T, H]; k and v [B, K, T, H], N a multiple of K, unrepeated; any strides, but
    a last dimension that is not contiguous is copied. ``window`` counts the query itself;
    ``segments`` holds two int32 [B, T]. Out [B, T, N, H], contiguous; gradients are laid out as
    their inputs. Saved: q, k, v, out and a float32 [B, T, N]; backward allocates another of those.

    *Numerics*: products accumulate in float32 (exact products for float32 inputs), softmax in
    float32, base 2; probabilities and dS are rounded to the input dtype before the products they
    enter, the output once, dK and dV after their sum over the group's heads. A row that sees no key
    is 0 and gives no gradient. Deterministic: bitwise the same twice on one card.

    *Raises*: ValueError for shapes, scale, window or segments that do not fit, and on the kernel's
    path for a head size, group, dtype or card that ``supported`` names a reason for; TypeError
    where k's or v's dtype or device is not q's.

    *Source*: written from the formulas of the online softmax (Milakov and Gimelshein, 2018) and of
    its tiled backward (Dao et al., FlashAttention, 2022).
    """
    _check(q, k, v, scale, window, segments)
    if not use_kernel(q):
        return attention_ref(q, k, v, scale=scale, window=window, segments=segments)
    if why := supported(q, k):
        raise ValueError(f"attention: {why}. Use torch's scaled_dot_product_attention for these.")
    if q.numel() == 0:
        return q.transpose(1, 2).contiguous()
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    if segments is not None and not (
        segments.first.is_contiguous() and segments.last.is_contiguous()
    ):
        segments = Segments(segments.first.contiguous(), segments.last.contiguous())
    window = q.shape[2] if window is None else window
    return AttentionFunction.apply(q, k, v, scale, window, segments)


def _check(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, segments: Segments | None
) -> None:
    if q.dim() != 4:
        raise ValueError(
            f"attention: q must have shape [B, N, T, H], got {list(q.shape)}. Split its heads."
        )
    batch, heads, tokens, size = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 4 or x.shape != k.shape or x.shape[0] != batch or x.shape[2:] != q.shape[2:]:
            raise ValueError(
                f"attention: {name} must have shape [B, K, T, H] = [{batch}, K, {tokens}, {size}], "
                f"got {list(x.shape)}. With a cache, or other lengths, use torch's "
                "scaled_dot_product_attention."
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise TypeError(
                f"attention: {name} must be {q.dtype} on {q.device} like q, "
                f"got {x.dtype} on {x.device}. Cast it first."
            )
    if not k.shape[1] or heads % k.shape[1]:
        raise ValueError(
            f"attention: q's heads must be a multiple of k's, got {heads} and {k.shape[1]}. "
            "Pass k and v with the heads the model projects."
        )
    if not scale > 0:
        raise ValueError(f"attention: scale must be positive, got {scale}. Fold its sign into q.")
    if window is not None and window < 1:
        raise ValueError(
            f"attention: window must be at least 1, as it counts the query itself, got {window}. "
            "None means no window."
        )
    for name in ("first", "last") if segments is not None else ():
        x = getattr(segments, name)
        if x.shape != (batch, tokens) or x.dtype != torch.int32 or x.device != q.device:
            raise ValueError(
                f"attention: segments.{name} must be int32 [B, T] = [{batch}, {tokens}] on "
                f"{q.device}, got {x.dtype} {list(x.shape)} on {x.device}. Build it with "
                "segments_from_position_ids or segments_from_attention_mask."
            )
