"""Causal attention for wide heads, sliding windows and packed batches, one pass over the keys a query can see:

    out[t] = sum_s softmax_s(scale * q[t].k[s]) v[s],   max(first[t], t - window + 1) <= s <= t

Worth a kernel because nothing fused covers it: FlashAttention stops at head_dim 256 where Gemma 4's global layers have 512,
and a dense mask makes a sliding layer's work and memory quadratic. Here no T x T tensor exists at any length, and blocks of
keys outside the window or in another document are never visited, forward or backward.

Three ideas carry the file.
- The query heads that share a key/value head are folded into the rows of a tile: row = (position, head). One K/V tile then
  serves all of them, a tile of 64 rows spans only 8 positions (so it visits few keys beyond a window's edge), and dK and dV
  are summed over the group inside one program, in a fixed order: deterministic without atomics.
- A span of blocks splits into those at its edges (the diagonal, the window's end, a document's border), which need a mask,
  and those inside, which do not: two loops over the same body.
- dK and dV are separate programs of one launch where one program's registers cannot hold both (``split``): S is then computed
  once more, but twice as many programs fill a large card.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from gemma_accel.kernels._triton import tl, triton, use_kernel
from gemma_accel.kernels.segments import Segments

__all__ = ["attention", "attention_ref", "attention_fwd", "attention_bwd", "supported"]

LOG2E = 1.0 / math.log(2.0)
MAX_GROUP = 16  # query heads of a key/value head; they share a tile, and the smallest tile has 16 rows


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float = 1.0,
    window: int | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """The specification, with the mask written out. Scores and softmax in float32, as the kernels have them."""
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
    # a query that sees nothing has a row of -inf: its softmax is NaN, its output (and every gradient) zero
    blind = ~sees.any(-1)[:, None, :, None]
    p = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    return (p @ v.to(accumulate)).to(v.dtype).transpose(1, 2).contiguous()


# ---------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _span(lo, full_lo, full_hi, hi, STEP: tl.constexpr, EDGES: tl.constexpr):
    """Splits [lo, hi) into blocks of STEP: those within [full_lo, full_hi) need no mask, those left and right of it do.

    Returns the first block, the unmasked run's begin and length in blocks, and how many masked blocks lie right of it and in
    all.
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
    right = tl.maximum(tl.cdiv(hi - full_end, STEP), 0)
    return begin, full_begin, (full_end - full_begin) // STEP, right, right + (full_begin - begin) // STEP


@triton.jit
def _start(i, begin, full_begin, full, right, STEP: tl.constexpr, MASKED: tl.constexpr):
    """Where the i-th unmasked block starts, or the i-th masked one: right edge (the diagonal's, forward), then the left."""
    if MASKED:
        return tl.where(i < right, full_begin + (full + i) * STEP, begin + (i - right) * STEP)
    else:
        return full_begin + i * STEP


@triton.jit
def _dot_t(a, b, T, UNCHAIN: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b.T in float32.

    Triton gives a dot whose result feeds another dot a layout with every warp along the rows. With two warpgroups and 64
    rows, both then compute the same thing. It does not look through a branch: UNCHAIN hides the chain behind one that is
    always taken.
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
    """First key each row sees, and the span of key blocks its tile visits."""
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
    acc, l, m, q, t, lo, k_base, v_base, k_row_stride, v_row_stride, k_tile, v_tile, blocks,
    begin, full_begin, full, right, T, scale_log2,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, UNCHAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over ``blocks`` blocks of keys; ``m`` is the row maximum in base-2 units, ``l`` the sum."""
    for i in range(blocks):
        start = _start(i, begin, full_begin, full, right, BLOCK_N, MASKED)
        k = _keys(k_base, start, k_row_stride, k_tile, T, BLOCK_N, MASKED)
        scores = _dot_t(q, k, T, UNCHAIN, PRECISION)
        if MASKED:
            s = start + tl.arange(0, BLOCK_N)
            scores = tl.where((s[None, :] >= lo[:, None]) & (s[None, :] <= t[:, None]), scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1) * scale_log2)
        # a row that has seen nothing yet keeps m = -inf; subtracting that from -inf would be NaN
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
        p = tl.math.exp2(scores * scale_log2 - m_safe[:, None])
        alpha = tl.math.exp2(m - m_safe)
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v = _keys(v_base, start, v_row_stride, v_tile, T, BLOCK_N, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        m = m_new
    return acc, l, m


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
    PARTS: tl.constexpr = H // HV  # programs that share a block, each with its own columns of V and of the output
    pid, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    blocks = tl.cdiv(T, POSITIONS)
    heads = tl.num_programs(0) // (PARTS * blocks)  # B * K
    block = blocks - 1 - pid // heads  # the last rows see the most keys: start them first
    b = (pid % heads // K).to(tl.int64)
    kv = (pid % K).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    t = block * POSITIONS + row // GROUP_PAD
    n = kv * GROUP + row % GROUP_PAD
    row_ok = (t < T) & (row % GROUP_PAD < GROUP)
    cols = tl.arange(0, H)
    q_rows = b * q_batch_stride + t.to(tl.int64) * q_row_stride + n * q_head_stride
    q = tl.load(q_ptr + q_rows[:, None] + cols[None, :], mask=row_ok[:, None], other=0.0)

    lo, begin, full_begin, full, right, masked = _key_span(
        first_ptr + b * T, t, row_ok, block * POSITIONS, T, window, HAS_SEGMENTS, POSITIONS, BLOCK_N, EDGES
    )
    k_base = k_ptr + b * k_batch_stride + kv * k_head_stride
    v_base = v_ptr + b * v_batch_stride + kv * v_head_stride
    k_tile = tl.arange(0, BLOCK_N)[:, None] * k_row_stride + cols[None, :]
    v_cols = part * HV + tl.arange(0, HV)
    v_tile = tl.arange(0, BLOCK_N)[:, None] * v_row_stride + v_cols[None, :]
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HV], tl.float32)
    acc, l, m = _fwd_loop(
        acc, l, m, q, t, lo, k_base, v_base, k_row_stride, v_row_stride, k_tile, v_tile, masked,
        begin, full_begin, full, right, T, scale_log2, BLOCK_N, True, UNCHAIN, PRECISION,
    )  # fmt: skip
    if EDGES:
        acc, l, m = _fwd_loop(
            acc, l, m, q, t, lo, k_base, v_base, k_row_stride, v_row_stride, k_tile, v_tile, full,
            begin, full_begin, full, right, T, scale_log2, BLOCK_N, False, UNCHAIN, PRECISION,
        )  # fmt: skip

    seen = l > 0
    l = tl.where(seen, l, 1.0)
    acc = acc * (1.0 / l)[:, None]
    out_rows = (b * T + t) * (K * GROUP) + n
    tl.store(
        o_ptr + out_rows[:, None] * H + v_cols[None, :], acc.to(o_ptr.dtype.element_ty), mask=row_ok[:, None]
    )
    # +inf for a row that saw nothing: the backward's exp2(score - lse) is then 0, never NaN
    if part == 0:
        tl.store(lse_ptr + out_rows, tl.where(seen, m + tl.math.log2(l), float("inf")), mask=row_ok)


@triton.jit
def _dq_loop(
    dq, q, do, lse, delta, t, lo, k_base, v_base, k_row_stride, v_row_stride, k_tile, v_tile, blocks,
    begin, full_begin, full, right, T, scale_log2,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, UNCHAIN: tl.constexpr, PRECISION: tl.constexpr,
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
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SEGMENTS: tl.constexpr, WANT_DQ: tl.constexpr,
    EDGES: tl.constexpr, UNCHAIN: tl.constexpr, PRECISION: tl.constexpr,
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
            first_ptr + b * T, t, row_ok, block * POSITIONS, T, window, HAS_SEGMENTS, POSITIONS, BLOCK_N, EDGES
        )
        k_base = k_ptr + b * k_batch_stride + kv * k_head_stride
        v_base = v_ptr + b * v_batch_stride + kv * v_head_stride
        k_tile = tl.arange(0, BLOCK_N)[:, None] * k_row_stride + cols[None, :]
        v_tile = tl.arange(0, BLOCK_N)[:, None] * v_row_stride + cols[None, :]
        dq = tl.zeros([BLOCK_M, H], tl.float32)
        dq = _dq_loop(
            dq, q, do, lse, delta, t, lo, k_base, v_base, k_row_stride, v_row_stride, k_tile, v_tile, masked,
            begin, full_begin, full, right, T, scale_log2, BLOCK_N, True, UNCHAIN, PRECISION,
        )  # fmt: skip
        if EDGES:
            dq = _dq_loop(
                dq, q, do, lse, delta, t, lo, k_base, v_base, k_row_stride, v_row_stride, k_tile, v_tile, full,
                begin, full_begin, full, right, T, scale_log2, BLOCK_N, False, UNCHAIN, PRECISION,
            )  # fmt: skip
        dq_rows = b * dq_batch_stride + t.to(tl.int64) * dq_row_stride + n * dq_head_stride
        tl.store(
            dq_ptr + dq_rows[:, None] + cols[None, :], (dq * scale).to(dq_ptr.dtype.element_ty), mask=row_ok[:, None]
        )


@triton.jit
def _rows(
    base, start, row_stride, tile, T, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of Q or dO: BLOCK_M // GROUP_PAD positions from ``start``, each with its group's heads."""
    ptrs = base + tl.cast(start, tl.int64) * row_stride + tile
    if MASKED or GROUP != GROUP_PAD:
        row = tl.arange(0, BLOCK_M)
        row_ok = (start + row // GROUP_PAD < T) & (row % GROUP_PAD < GROUP)
        return tl.load(ptrs, mask=row_ok[:, None], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _dkv_loop(
    dk, dv, k, v, s, hi, q_base, do_base, lse_base, delta_base, q_row_stride, do_row_stride, stat_row_stride,
    q_tile, do_tile, blocks, begin, full_begin, full, right, T, scale_log2,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    WANT_DK: tl.constexpr, WANT_DV: tl.constexpr, MASKED: tl.constexpr, FLIP: tl.constexpr,
    UNCHAIN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``blocks`` tiles of query rows into a block's dK and dV.

    Scores are [keys, rows], so that both products take them as the left operand, from registers; with FLIP they are
    [rows, keys] and the accumulators are transposed, [H, keys], so that a block may have fewer keys than a warpgroup's
    instruction has rows.
    """
    POSITIONS: tl.constexpr = BLOCK_M // GROUP_PAD
    row = tl.arange(0, BLOCK_M)
    for i in tl.range(0, blocks, num_stages=STAGES):
        start = _start(i, begin, full_begin, full, right, POSITIONS, MASKED)
        t = start + row // GROUP_PAD
        row_ok = (t < T) & (row % GROUP_PAD < GROUP)
        stats = tl.cast(start, tl.int64) * stat_row_stride + row // GROUP_PAD * stat_row_stride + row % GROUP_PAD
        # +inf makes p zero, so rows beyond the end need no other care
        lse = tl.load(lse_base + stats, mask=row_ok, other=float("inf"))
        if WANT_DK:
            delta = tl.load(delta_base + stats, mask=row_ok, other=0.0)
            do = _rows(do_base, start, do_row_stride, do_tile, T, BLOCK_M, GROUP, GROUP_PAD, MASKED)
            dp = _dot_t(do, v, T, UNCHAIN, PRECISION) if FLIP else _dot_t(v, do, T, UNCHAIN, PRECISION)
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
        # dS is rounded before dV's product, so that it finds its place in shared memory while dO still holds its own: were
        # it to take dO's, ptxas 12.8 mixes up the two matrix descriptors that then start alike (seen: dK wrong at H 512)
        if WANT_DK:
            ds = (p * (dp - (delta[:, None] if FLIP else delta[None, :]))).to(q.dtype)
        if WANT_DV:
            if not WANT_DK:
                do = _rows(do_base, start, do_row_stride, do_tile, T, BLOCK_M, GROUP, GROUP_PAD, MASKED)
            if FLIP:
                dv = tl.dot(tl.trans(do), p.to(do.dtype), dv, input_precision=PRECISION)
            else:
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        if WANT_DK:
            if FLIP:
                dk = tl.dot(tl.trans(q), ds, dk, input_precision=PRECISION)
            else:
                dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _dkv_block(
    q_base, k_ptrs, v_ptrs, do_base, lse_base, delta_base, dk_ptrs, dv_ptrs, s, hi,
    begin, full_begin, full, right, masked,
    q_row_stride, q_tile, do_row_stride, do_tile, stat_row_stride, T, scale, scale_log2,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WANT_DK: tl.constexpr, WANT_DV: tl.constexpr, EDGES: tl.constexpr, FLIP: tl.constexpr, UNCHAIN: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK, dV or both of one block of keys, over every row that sees it."""
    k = tl.load(k_ptrs, mask=(s < T)[:, None], other=0.0)
    v = k
    dk = 0.0
    dv = 0.0
    if WANT_DK:
        v = tl.load(v_ptrs, mask=(s < T)[:, None], other=0.0)
        dk = tl.zeros([H, BLOCK_N] if FLIP else [BLOCK_N, H], tl.float32)
    if WANT_DV:
        dv = tl.zeros([H, BLOCK_N] if FLIP else [BLOCK_N, H], tl.float32)
    dk, dv = _dkv_loop(
        dk, dv, k, v, s, hi, q_base, do_base, lse_base, delta_base, q_row_stride, do_row_stride, stat_row_stride,
        q_tile, do_tile, masked, begin, full_begin, full, right, T, scale_log2,
        GROUP, GROUP_PAD, BLOCK_M, WANT_DK, WANT_DV, True, FLIP, UNCHAIN, STAGES, PRECISION,
    )  # fmt: skip
    if EDGES:
        dk, dv = _dkv_loop(
            dk, dv, k, v, s, hi, q_base, do_base, lse_base, delta_base, q_row_stride, do_row_stride, stat_row_stride,
            q_tile, do_tile, full, begin, full_begin, full, right, T, scale_log2,
            GROUP, GROUP_PAD, BLOCK_M, WANT_DK, WANT_DV, False, FLIP, UNCHAIN, STAGES, PRECISION,
        )  # fmt: skip
    if FLIP:
        dk = tl.trans(dk) if WANT_DK else dk
        dv = tl.trans(dv) if WANT_DV else dv
    if WANT_DK:
        tl.store(dk_ptrs, (dk * scale).to(dk_ptrs.dtype.element_ty), mask=(s < T)[:, None])
    if WANT_DV:
        tl.store(dv_ptrs, dv.to(dv_ptrs.dtype.element_ty), mask=(s < T)[:, None])


@triton.jit(do_not_specialize=["T", "window"])
def _attention_dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, last_ptr,
    q_batch_stride, q_head_stride, q_row_stride,
    k_batch_stride, k_head_stride, k_row_stride,
    v_batch_stride, v_head_stride, v_row_stride,
    do_batch_stride, do_row_stride, do_head_stride,
    dk_batch_stride, dk_head_stride, dk_row_stride,
    dv_batch_stride, dv_head_stride, dv_row_stride,
    T, window, scale, scale_log2,
    K: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    WANT_DK: tl.constexpr, WANT_DV: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, DV_STAGES: tl.constexpr, DV_UNCHAIN: tl.constexpr,
    EDGES: tl.constexpr, FLIP: tl.constexpr, UNCHAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    POSITIONS: tl.constexpr = BLOCK_M // GROUP_PAD
    pid = tl.program_id(0)
    role = 0
    if SPLIT:
        role = pid % 2
        pid = pid // 2
    heads = tl.num_programs(0) // (tl.cdiv(T, BLOCK_N) * (2 if SPLIT else 1))
    block = pid // heads  # the first keys are seen by the most rows: they start first
    b = (pid % heads // K).to(tl.int64)
    kv = (pid % K).to(tl.int64)
    s = block * BLOCK_N + tl.arange(0, BLOCK_N)
    hi = tl.minimum(s + window, T) - 1
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
    cols = tl.arange(0, H)
    n = kv * GROUP
    q_base = q_ptr + b * q_batch_stride + n * q_head_stride
    do_base = do_ptr + b * do_batch_stride + n * do_head_stride
    stat_row_stride = K * GROUP
    lse_base = lse_ptr + b * T * stat_row_stride + n
    delta_base = delta_ptr + b * T * stat_row_stride + n
    q_tile = (row // GROUP_PAD * q_row_stride + row % GROUP_PAD * q_head_stride)[:, None] + cols[None, :]
    do_tile = (row // GROUP_PAD * do_row_stride + row % GROUP_PAD * do_head_stride)[:, None] + cols[None, :]
    rows = s.to(tl.int64)[:, None]
    k_ptrs = k_ptr + b * k_batch_stride + kv * k_head_stride + rows * k_row_stride + cols[None, :]
    v_ptrs = v_ptr + b * v_batch_stride + kv * v_head_stride + rows * v_row_stride + cols[None, :]
    dk_ptrs = dk_ptr + b * dk_batch_stride + kv * dk_head_stride + rows * dk_row_stride + cols[None, :]
    dv_ptrs = dv_ptr + b * dv_batch_stride + kv * dv_head_stride + rows * dv_row_stride + cols[None, :]
    if SPLIT:
        if role == 0:
            _dkv_block(
                q_base, k_ptrs, v_ptrs, do_base, lse_base, delta_base, dk_ptrs, dv_ptrs, s, hi,
                begin, full_begin, full, right, masked,
                q_row_stride, q_tile, do_row_stride, do_tile, stat_row_stride, T, scale, scale_log2,
                GROUP, GROUP_PAD, H, BLOCK_M, BLOCK_N, True, False, EDGES, FLIP, UNCHAIN, STAGES, PRECISION,
            )  # fmt: skip
        else:
            _dkv_block(
                q_base, k_ptrs, v_ptrs, do_base, lse_base, delta_base, dk_ptrs, dv_ptrs, s, hi,
                begin, full_begin, full, right, masked,
                q_row_stride, q_tile, do_row_stride, do_tile, stat_row_stride, T, scale, scale_log2,
                GROUP, GROUP_PAD, H, BLOCK_M, BLOCK_N, False, True, EDGES, FLIP, DV_UNCHAIN, DV_STAGES, PRECISION,
            )  # fmt: skip
    else:
        _dkv_block(
            q_base, k_ptrs, v_ptrs, do_base, lse_base, delta_base, dk_ptrs, dv_ptrs, s, hi,
            begin, full_begin, full, right, masked,
            q_row_stride, q_tile, do_row_stride, do_tile, stat_row_stride, T, scale, scale_log2,
            GROUP, GROUP_PAD, H, BLOCK_M, BLOCK_N, WANT_DK, WANT_DV, EDGES, FLIP, UNCHAIN, STAGES, PRECISION,
        )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- launchers


class Tile(NamedTuple):
    """One kernel's configuration."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    edges: bool = True
    unchain: bool = False
    parts: int = 1
    flip: bool = False
    split: bool = False
    dv_stages: int = 1
    dv_unchain: bool = False


class Tiles(NamedTuple):
    fwd: Tile
    dq: Tile
    dkv: Tile


HEAD_SIZES = (16, 32, 64, 128, 256, 512)


def tiles(capability: int, head_size: int, itemsize: int) -> Tiles | None:
    if itemsize == 4:
        return None if head_size > 256 else Tiles(*[Tile(16, 16, 4, 1)] * 3)
    if capability // 10 == 9:
        if head_size == 512:
            return Tiles(
                Tile(128, 32, 8, 2, parts=2),
                Tile(64, 32, 8, 1, edges=False, unchain=True),
                Tile(64, 32, 8, 1, edges=False, unchain=True, flip=True),
            )
        if head_size == 256:
            return Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 3), Tile(64, 32, 8, 2, unchain=True, flip=True))
    if head_size == 512:
        return Tiles(
            Tile(32, 32, 8, 2, edges=False), Tile(32, 16, 4, 2, edges=False), Tile(16, 16, 4, 2, edges=False)
        )
    if head_size == 256:
        return Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2, edges=False))
    return Tiles(*[Tile(32, 32, 4, 2, edges=False)] * 3)


@functools.lru_cache(maxsize=None)
def _tiles_on(device: torch.device, head_size: int, itemsize: int) -> Tiles | None:
    if device.type != "cuda":  # the interpreter: small tiles, so that small tests cross block borders
        return Tiles(*[Tile(32, 16, 4, 1, head_size < 32, parts=2, flip=head_size < 32)] * 3)
    major, minor = torch.cuda.get_device_capability(device)
    return tiles(10 * major + minor, head_size, itemsize)


def supported(q: Tensor, k: Tensor) -> str | None:
    """Why the kernels cannot serve these tensors, or None if they can."""
    if q.shape[-1] not in HEAD_SIZES:
        return f"head_dim is {q.shape[-1]}; the kernels cover {', '.join(map(str, HEAD_SIZES))}"
    if q.shape[1] // k.shape[1] > MAX_GROUP:
        return f"{q.shape[1] // k.shape[1]} query heads share a key/value head; the kernels cover {MAX_GROUP}"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype is {q.dtype}; the kernels cover float32, bfloat16 and float16"
    if _tiles_on(q.device, q.shape[-1], q.element_size()) is None:
        return f"no configuration for head_dim {q.shape[-1]} in {q.dtype} on this card"
    return None


def _group_pad(group: int) -> int:
    return 1 << (group - 1).bit_length()


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    """``out`` [B, T, N, H] and the base-2 log-sum-exp [B, T, N] of each row's scaled scores."""
    batch, heads, tokens, size = q.shape
    kv_heads = k.shape[1]
    tile = _tiles_on(q.device, size, q.element_size()).fwd
    group, pad = heads // kv_heads, _group_pad(heads // kv_heads)
    out = torch.empty((batch, tokens, heads, size), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, tokens, heads), dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(tokens, tile.block_m // pad) * batch * kv_heads * tile.parts,)
    _attention_fwd_kernel[grid](
        q, k, v, out, lse, lse if segments is None else segments.first,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        tokens, window, scale * LOG2E,
        K=kv_heads, GROUP=group, GROUP_PAD=pad, H=size, HV=size // tile.parts, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        HAS_SEGMENTS=segments is not None, PRECISION=_precision(q),
        EDGES=tile.edges, UNCHAIN=tile.unchain,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out, lse


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    scale: float, window: int, segments: Segments | None, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dq, dk and dv, laid out as q, k and v; each None where ``needs`` does not ask for it."""
    batch, heads, tokens, size = q.shape
    kv_heads = k.shape[1]
    _, tile, dkv = _tiles_on(q.device, size, q.element_size())
    group, pad = heads // kv_heads, _group_pad(heads // kv_heads)
    if dout.stride(3) != 1:
        dout = dout.contiguous()
    delta = torch.empty_like(lse)
    dq = torch.empty_like(q) if needs[0] else None
    dk = torch.empty_like(k) if needs[1] else None
    dv = torch.empty_like(v) if needs[2] else None
    shared = dict(
        K=kv_heads, GROUP=group, GROUP_PAD=pad, H=size,
        HAS_SEGMENTS=segments is not None, PRECISION=_precision(q),
    )  # fmt: skip
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    if needs[0] or needs[1]:  # delta enters dq and dk
        target = q if dq is None else dq
        grid = (triton.cdiv(tokens, tile.block_m // pad) * batch * kv_heads,)
        _attention_dq_kernel[grid](
            q, k, v, out, dout, lse, delta, target, lse if segments is None else segments.first,
            *strides, *target.stride()[:3], tokens, window, scale, scale * LOG2E,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, WANT_DQ=needs[0],
            EDGES=tile.edges, UNCHAIN=tile.unchain,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **shared,
        )  # fmt: skip
    if needs[1] or needs[2]:
        split = dkv.split and needs[1] and needs[2]
        target_k, target_v = k if dk is None else dk, v if dv is None else dv
        grid = (triton.cdiv(tokens, dkv.block_n) * batch * kv_heads * (2 if split else 1),)
        _attention_dkv_kernel[grid](
            q, k, v, dout, lse, delta, target_k, target_v, lse if segments is None else segments.last,
            *strides, *target_k.stride()[:3], *target_v.stride()[:3], tokens, window, scale, scale * LOG2E,
            BLOCK_M=dkv.block_m, BLOCK_N=dkv.block_n, WANT_DK=needs[1], WANT_DV=needs[2], SPLIT=split,
            EDGES=dkv.edges, STAGES=dkv.num_stages, DV_STAGES=dkv.dv_stages, DV_UNCHAIN=dkv.dv_unchain,
         FLIP=dkv.flip, UNCHAIN=dkv.unchain,
        num_warps=dkv.num_warps, num_stages=dkv.num_stages, **shared,
        )  # fmt: skip
    return dq, dk, dv


def _precision(q: Tensor) -> str:
    return "ieee" if q.dtype == torch.float32 else "tf32"  # 16-bit operands ignore it


# --------------------------------------------------------------------------------------------------------- Function and op


class AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, segments: Segments | None
    ) -> Tensor:
        out, lse = attention_fwd(q, k, v, scale, window, segments)
        ctx.save_for_backward(q, k, v, out, lse, *(segments or ()))
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *segments = ctx.saved_tensors
        gradients = attention_bwd(
            dout, q, k, v, out, lse, ctx.scale, ctx.window,
            Segments(*segments) if segments else None, ctx.needs_input_grad[:3],
        )  # fmt: skip
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
    """Causal self-attention with grouped heads, a sliding window and packed or padded rows.

    *Replaces* ``scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), mask, scale=scale).transpose(1, 2).contiguous()``.
    *Shapes*: q [B, N, T, H], k and v [B, K, T, H], N a multiple of K, any strides but a contiguous last dimension (else it is
    copied); ``window`` counts the query itself; ``segments`` int32 [B, T] each. Out [B, T, N, H]. Saved: q, k, v, out and a
    float32 [B, T, N].
    """
    _check(q, k, v, scale, window, segments)
    if not use_kernel(q):
        return attention_ref(q, k, v, scale=scale, window=window, segments=segments)
    if why := supported(q, k):
        raise ValueError(f"attention: {why}. Use torch's scaled_dot_product_attention for these tensors.")
    if q.numel() == 0:
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    if segments is not None:
        segments = Segments(*(x.contiguous() for x in segments))
    return AttentionFunction.apply(q, k, v, scale, q.shape[2] if window is None else window, segments)


def _check(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, segments: Segments | None
) -> None:
    if q.dim() != 4:
        raise ValueError(f"attention: q must have shape [B, N, T, H], got {tuple(q.shape)}.")
    batch, heads, tokens, size = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 4 or x.shape[0] != batch or x.shape[2:] != q.shape[2:] or x.shape != k.shape:
            raise ValueError(
                f"attention: {name} must have shape [B, K, T, H] = [{batch}, K, {tokens}, {size}], got {tuple(x.shape)}. "
                "Keys and values are not repeated, and a cache (more keys than queries) is stock's business."
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise TypeError(
                f"attention: {name} must be {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}. Cast it first."
            )
    if heads % k.shape[1]:
        raise ValueError(
            f"attention: q's heads must be a multiple of k's, got {heads} and {k.shape[1]}. Pass k and v unrepeated."
        )
    if not scale > 0:
        raise ValueError(f"attention: scale must be positive, got {scale}. Fold a sign into q.")
    if window is not None and window < 1:
        raise ValueError(
            f"attention: window must be at least 1 (it counts the query itself), got {window}. None means no window."
        )
    for name, x in zip(Segments._fields, segments or (), strict=False):
        if x.shape != (batch, tokens) or x.dtype != torch.int32 or x.device != q.device:
            raise ValueError(
                f"attention: segments.{name} must be int32 [B, T] = [{batch}, {tokens}] on {q.device}, "
                f"got {x.dtype} {list(x.shape)} on {x.device}. Build it with segments_from_position_ids or "
                "segments_from_attention_mask."
            )
