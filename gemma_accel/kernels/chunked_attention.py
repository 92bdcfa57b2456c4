"""The audio encoder's attention: chunks of queries over a context of keys, by relative position.

Query ``i`` of a chunk of C sees the keys ``j`` of its chunk and of the ``past`` before it (and the
``future`` after it, if any): ``s[i, j] = q_i . (k_j + r[j - i])`` for ``0 <= j - i < P``, else
``q_i . k_j``; then ``cap * tanh(s / cap)``, the mask, a softmax and the sum of values. All of it is
float32. Stock unfolds keys and values into overlapping windows and launches about forty kernels on
them; a chunk is small enough for one program, which reads the projections' output in place.

Backward recomputes a chunk likewise. A key lies in the context of more than one chunk: each writes
what it gives to its context apart, and a second kernel folds that together in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_accel.kernels._triton import tl, triton, use_kernel
from gemma_accel.kernels.clip import EVERYTHING, Range, clip_ref, clipped, inside
from gemma_accel.kernels.rms_norm import FLOATS


class Chunks(NamedTuple):
    """The shape of a chunk's view, and what is done to its scores."""

    size: int  # queries of a chunk
    past: int  # keys before it
    future: int  # keys after it
    k_scale: float
    cap: float
    invalid: float = -1e9  # what a masked score becomes

    @property
    def context(self) -> int:
        return self.past + self.size + self.future

    def count(self, tokens: int) -> int:
        return -(-tokens // self.size)


def chunked_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative: Tensor,
    q_scale: Tensor,
    mask: Tensor | None,
    chunks: Chunks,
    *,
    q_range: Range = EVERYTHING,
    k_range: Range = EVERYTHING,
    v_range: Range = EVERYTHING,
    after: Range = EVERYTHING,
) -> Tensor:
    dtype, (batch, tokens, heads, size) = q.dtype, q.shape
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = (clip_ref(x, to).to(wide) for x, to in ((q, q_range), (k, k_range), (v, v_range)))
    count, (past, future) = chunks.count(tokens), (chunks.past, chunks.future)
    q = F.pad(q * q_scale.to(wide), (0, 0, 0, 0, 0, count * chunks.size - tokens))
    q = q.view(batch, count, chunks.size, heads, size).permute(0, 3, 1, 2, 4)  # [B, N, n, C, D]
    end = (0, 0, 0, 0, past, future + chunks.size - 1)
    windows = [
        F.pad(x, end).unfold(1, chunks.context, chunks.size).permute(0, 2, 1, 3, 4)
        for x in (k * chunks.k_scale, v)
    ]  # [B, N, n, D, X]
    scores = q @ windows[0]
    shifted = q @ relative.to(wide).permute(1, 2, 0)[:, None]  # [B, N, n, C, P]
    shift = torch.arange(chunks.context, device=q.device)
    shift = shift - torch.arange(chunks.size, device=q.device)[:, None]  # [C, X]
    known = (shift >= 0) & (shift < relative.shape[0])
    shift = shift.clamp(0, relative.shape[0] - 1).expand(*scores.shape)
    scores = scores + shifted.gather(-1, shift) * known
    scores = (scores / chunks.cap).tanh() * chunks.cap
    if mask is not None:
        scores = scores.masked_fill(~_kept(mask), chunks.invalid)
    out = scores.softmax(-1) @ windows[1].transpose(-1, -2)  # [B, N, n, C, D]
    out = out.permute(0, 2, 3, 1, 4).reshape(batch, -1, heads, size)[:, :tokens]
    return clip_ref(out.to(dtype), after)


def _kept(mask: Tensor) -> Tensor:
    """A mask as True where a key is seen: it may come additive, 0 there."""
    return mask if mask.dtype == torch.bool else mask == 0


@triton.jit
def _tanh(x):
    """tanh of float32 values to its last place; the exponential alone loses small ones."""
    t = x * x
    small = t * (-0.3333333333 + t * (0.1333333333 + t * (-0.0539682540 + t * 0.0218694885)))
    small += t * t * t * t * t * -0.0088632355
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(t < 0.0625, x + x * small, tl.where(x < 0, -large, large))


@triton.jit
def _chunk(
    q_ptr, k_ptr, v_ptr, relative_ptr, q_scale_ptr, chunk, head, batch, tokens,
    q_batch_stride, k_batch_stride, v_batch_stride,
    q_token_stride, k_token_stride, v_token_stride,
    relative_stride,
    k_scale, q_low, q_high, k_low, k_high, v_low, v_high,
    C: tl.constexpr, PAST: tl.constexpr, X: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A chunk's queries [C, D], keys and values [X, D] and positions [P, D]: held, not yet scaled,
    0 where there is none; with the raw queries, to tell where they were held."""
    i, j = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_X)
    p, d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    queries = chunk * C + i
    keys = chunk * C - PAST + j
    q_mask = ((i < C) & (queries < tokens))[:, None] & (d < D)[None, :]
    k_mask = ((j < X) & (keys >= 0) & (keys < tokens))[:, None] & (d < D)[None, :]

    q_at = batch * q_batch_stride + queries.to(tl.int64)[:, None] * q_token_stride + head * D
    raw = tl.load(q_ptr + q_at + d[None, :], mask=q_mask, other=0.0).to(tl.float32)
    q = tl.where(q_mask, clipped(raw, q_low, q_high), 0.0)
    k_at = batch * k_batch_stride + keys.to(tl.int64)[:, None] * k_token_stride + head * D
    k = tl.load(k_ptr + k_at + d[None, :], mask=k_mask, other=0.0).to(tl.float32)
    k = tl.where(k_mask, clipped(k, k_low, k_high), 0.0) * k_scale
    v_at = batch * v_batch_stride + keys.to(tl.int64)[:, None] * v_token_stride + head * D
    v = tl.load(v_ptr + v_at + d[None, :], mask=k_mask, other=0.0).to(tl.float32)
    v = tl.where(k_mask, clipped(v, v_low, v_high), 0.0)
    r_at = p[:, None] * relative_stride + head * D + d[None, :]
    r_mask = (p < P)[:, None] & (d < D)[None, :]
    r = tl.load(relative_ptr + r_at, mask=r_mask, other=0.0).to(tl.float32)
    q_scale = tl.load(q_scale_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    return raw, q, q_scale, k, v, r


@triton.jit
def _weights(
    q, k, r, mask_ptr, chunk, batch, n_chunks, cap, invalid,
    C: tl.constexpr, X: tl.constexpr, P: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_P: tl.constexpr,
    HAS_MASK: tl.constexpr, ADDITIVE: tl.constexpr,
):  # fmt: skip
    """Softmax of a chunk's scores, the scores' tanh, and which of them are kept."""
    i, j, p = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_X), tl.arange(0, BLOCK_P)
    shift = j[None, :] - i[:, None]
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    shifted = tl.dot(q, tl.trans(r), input_precision="ieee")  # [C, P]
    for n in tl.static_range(P):
        column = tl.sum(tl.where((p == n)[None, :], shifted, 0.0), axis=1)
        scores += tl.where(shift == n, column[:, None], 0.0)
    tanh = _tanh(scores / cap)
    scores = tanh * cap
    exists = (i < C)[:, None] & (j < X)[None, :]
    kept = exists
    if HAS_MASK:
        at = ((batch * n_chunks + chunk) * C + i[:, None]) * X + j[None, :]
        mask = tl.load(mask_ptr + at, mask=exists, other=0)
        kept = exists & ((mask == 0) if ADDITIVE else (mask != 0))
        scores = tl.where(kept, scores, invalid)
    scores = tl.where((j < X)[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None], tanh, kept


@triton.jit(do_not_specialize=["tokens", "n_chunks"])
def _chunked_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, relative_ptr, q_scale_ptr, mask_ptr, out_ptr, tokens, n_chunks,
    q_batch_stride, k_batch_stride, v_batch_stride,
    q_token_stride, k_token_stride, v_token_stride,
    relative_stride, k_scale, cap, invalid,
    q_low, q_high, k_low, k_high, v_low, v_high, after_low, after_high,
    N: tl.constexpr, C: tl.constexpr, PAST: tl.constexpr, X: tl.constexpr, P: tl.constexpr,
    D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, ADDITIVE: tl.constexpr,
):  # fmt: skip
    chunk, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    _, q, q_scale, k, v, r = _chunk(
        q_ptr, k_ptr, v_ptr, relative_ptr, q_scale_ptr, chunk, head, batch, tokens,
        q_batch_stride, k_batch_stride, v_batch_stride,
        q_token_stride, k_token_stride, v_token_stride,
        relative_stride, k_scale, q_low, q_high, k_low, k_high, v_low, v_high,
        C, PAST, X, P, D, BLOCK_C, BLOCK_X, BLOCK_P, BLOCK_D,
    )  # fmt: skip
    weights, _, _ = _weights(
        q * q_scale[None, :], k, r, mask_ptr, chunk, batch, n_chunks, cap, invalid,
        C, X, P, BLOCK_C, BLOCK_X, BLOCK_P, HAS_MASK, ADDITIVE,
    )  # fmt: skip
    out = tl.dot(weights, v, input_precision="ieee").to(out_ptr.dtype.element_ty).to(tl.float32)
    out = clipped(out, after_low, after_high).to(out_ptr.dtype.element_ty)
    i, d = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    queries = chunk * C + i
    at = ((batch * tokens + queries)[:, None] * N + head) * D + d[None, :]
    tl.store(out_ptr + at, out, mask=((i < C) & (queries < tokens))[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["tokens", "n_chunks"])
def _chunked_attention_bwd_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, relative_ptr, q_scale_ptr, mask_ptr,
    dq_ptr,  # [B, T, N, D]
    dk_ptr, dv_ptr,  # [B, n, N, X, D] float32: what each chunk gives to its context
    dr_ptr,  # [B * n, P, N, D] float32
    ds_ptr,  # [B * n * N, D] float32: of q_scale
    tokens, n_chunks, do_batch_stride, do_token_stride, do_head_stride,
    q_batch_stride, k_batch_stride, v_batch_stride,
    q_token_stride, k_token_stride, v_token_stride,
    relative_stride, k_scale, cap, invalid,
    q_low, q_high, k_low, k_high, v_low, v_high, after_low, after_high,
    N: tl.constexpr, C: tl.constexpr, PAST: tl.constexpr, X: tl.constexpr, P: tl.constexpr,
    D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, ADDITIVE: tl.constexpr,
    HAS_DQ: tl.constexpr, HAS_DK: tl.constexpr, HAS_DV: tl.constexpr, HAS_DR: tl.constexpr,
    HAS_DS: tl.constexpr,
):  # fmt: skip
    chunk, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    raw, q, q_scale, k, v, r = _chunk(
        q_ptr, k_ptr, v_ptr, relative_ptr, q_scale_ptr, chunk, head, batch, tokens,
        q_batch_stride, k_batch_stride, v_batch_stride,
        q_token_stride, k_token_stride, v_token_stride,
        relative_stride, k_scale, q_low, q_high, k_low, k_high, v_low, v_high,
        C, PAST, X, P, D, BLOCK_C, BLOCK_X, BLOCK_P, BLOCK_D,
    )  # fmt: skip
    scaled = q * q_scale[None, :]
    weights, tanh, kept = _weights(
        scaled, k, r, mask_ptr, chunk, batch, n_chunks, cap, invalid,
        C, X, P, BLOCK_C, BLOCK_X, BLOCK_P, HAS_MASK, ADDITIVE,
    )  # fmt: skip
    i, j = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_X)
    p, d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    queries = chunk * C + i
    q_mask = ((i < C) & (queries < tokens))[:, None] & (d < D)[None, :]
    at = batch * do_batch_stride + queries.to(tl.int64) * do_token_stride + head * do_head_stride
    do = tl.load(do_ptr + at[:, None] + d[None, :], mask=q_mask, other=0.0).to(tl.float32)
    out = tl.dot(weights, v, input_precision="ieee")  # what forward rounded and held
    out = out.to(q_ptr.dtype.element_ty).to(tl.float32)
    do = tl.where(inside(out, after_low, after_high), do, 0.0)

    context = ((batch * n_chunks + chunk) * N + head) * X
    context = (context + j)[:, None] * D + d[None, :]
    context_mask = (j < X)[:, None] & (d < D)[None, :]
    if HAS_DV:
        dv = tl.dot(tl.trans(weights), do, input_precision="ieee")
        tl.store(dv_ptr + context, dv, mask=context_mask)
    if HAS_DQ or HAS_DK or HAS_DR or HAS_DS:
        dw = tl.dot(do, tl.trans(v), input_precision="ieee")
        dx = weights * (dw - tl.sum(weights * dw, axis=1)[:, None])
        dx = tl.where(kept, dx * (1.0 - tanh * tanh), 0.0)
        if HAS_DK:
            dk = tl.dot(tl.trans(dx), scaled, input_precision="ieee") * k_scale
            tl.store(dk_ptr + context, dk, mask=context_mask)
        shift = j[None, :] - i[:, None]
        dshifted = tl.zeros([BLOCK_C, BLOCK_P], dtype=tl.float32)
        for n in tl.static_range(P):
            column = tl.sum(tl.where(shift == n, dx, 0.0), axis=1)
            dshifted += tl.where((p == n)[None, :], column[:, None], 0.0)
        if HAS_DR:
            dr = tl.dot(tl.trans(dshifted), scaled, input_precision="ieee")
            at = (((batch * n_chunks + chunk) * P + p)[:, None] * N + head) * D + d[None, :]
            tl.store(dr_ptr + at, dr, mask=(p < P)[:, None] & (d < D)[None, :])
        if HAS_DQ or HAS_DS:
            dq = tl.dot(dx, k, input_precision="ieee")
            dq += tl.dot(dshifted, r, input_precision="ieee")
            if HAS_DS:
                at = ((batch * n_chunks + chunk) * N + head) * D + d
                tl.store(ds_ptr + at, tl.sum(dq * q, axis=0), mask=d < D)
            if HAS_DQ:
                dq = tl.where(inside(raw, q_low, q_high), dq * q_scale[None, :], 0.0)
                at = ((batch * tokens + queries)[:, None] * N + head) * D + d[None, :]
                tl.store(dq_ptr + at, dq.to(dq_ptr.dtype.element_ty), mask=q_mask)


@triton.jit(do_not_specialize=["tokens", "n_chunks"])
def _fold_kernel(
    given_ptr, x_ptr, dx_ptr, tokens, n_chunks, x_batch_stride, x_token_stride, low, high,
    C: tl.constexpr, PAST: tl.constexpr, X: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A key's gradient from the chunks that see it, nearest to last; 0 where it was held."""
    token, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < WIDTH
    own, place = token // C + 0 * cols, PAST + token % C + 0 * cols  # a mask must be a vector
    dx = tl.zeros([BLOCK], dtype=tl.float32)
    FIRST: tl.constexpr = -((X - PAST - 1) // C)
    for away in tl.static_range(FIRST, (PAST + C - 1) // C + 1):
        chunk = own + away
        j = place - away * C
        there = (chunk >= 0) & (chunk < n_chunks) & (j >= 0) & (j < X)
        at = (batch * n_chunks + chunk) * (WIDTH // D) + cols // D
        at = (at * X + j) * D + cols % D
        dx += tl.load(given_ptr + at, mask=mask & there, other=0.0)
    x_at = batch * x_batch_stride + token.to(tl.int64) * x_token_stride + cols
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    dx = tl.where(inside(x, low, high), dx, 0.0).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + (batch * tokens + token) * WIDTH + cols, dx, mask=mask)


def _blocks(size: int, positions: int, chunks: Chunks) -> dict[str, int]:
    """A product's sides must be at least 16."""
    sides = {"C": chunks.size, "X": chunks.context, "P": positions, "D": size}
    return {f"BLOCK_{k}": max(16, triton.next_power_of_2(n)) for k, n in sides.items()}


def _strides(x: Tensor) -> tuple[Tensor, int, int]:
    """``x`` [B, T, N, D] with contiguous heads, and its batch and token strides."""
    if x.stride(3) != 1 or (x.shape[2] > 1 and x.stride(2) != x.shape[3]):
        x = x.contiguous()
    return x, x.stride(0), x.stride(1)


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, relative: Tensor, q_scale: Tensor, mask: Tensor | None
) -> tuple[list[Any], list[int]]:
    """What both kernels take first, and the strides that come after the counts."""
    tensors, batch_strides, token_strides = zip(*map(_strides, (q, k, v)), strict=True)
    relative = relative.contiguous()
    first = [*tensors, relative, q_scale, None if mask is None else mask.contiguous()]
    return first, [*batch_strides, *token_strides, relative.stride(0)]


def _constants(q: Tensor, relative: Tensor, mask: Tensor | None, chunks: Chunks) -> dict[str, Any]:
    heads, size, positions = q.shape[2], q.shape[3], relative.shape[0]
    return dict(
        N=heads,
        C=chunks.size,
        PAST=chunks.past,
        X=chunks.context,
        P=positions,
        D=size,
        HAS_MASK=mask is not None,
        ADDITIVE=mask is not None and mask.dtype != torch.bool,
        num_warps=8 if size > 64 else 4,
        **_blocks(size, positions, chunks),
    )


def chunked_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative: Tensor,
    q_scale: Tensor,
    mask: Tensor | None,
    chunks: Chunks,
    ranges: tuple[Range, Range, Range, Range],
) -> Tensor:
    batch, tokens, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    count = chunks.count(tokens)
    first, strides = _inputs(q, k, v, relative, q_scale, mask)
    if out.numel():
        _chunked_attention_fwd_kernel[(count, heads, batch)](
            *first,
            out,
            tokens,
            count,
            *strides,
            chunks.k_scale,
            chunks.cap,
            chunks.invalid,
            *(end for to in ranges for end in to),
            **_constants(q, relative, mask, chunks),
        )
    return out


def chunked_attention_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative: Tensor,
    q_scale: Tensor,
    mask: Tensor | None,
    chunks: Chunks,
    ranges: tuple[Range, Range, Range, Range],
    *,
    needs: tuple[bool, ...] = (True, True, True, False, False),
) -> tuple[Tensor | None, ...]:
    """Gradients of ``q, k, v, relative, q_scale``, those that ``needs`` asks for."""
    batch, tokens, heads, size = q.shape
    count, positions = chunks.count(tokens), relative.shape[0]
    shapes = [
        q.shape,
        (batch, count, heads, chunks.context, size),
        (batch, count, heads, chunks.context, size),
        (batch * count, positions, heads, size),
        (batch * count * heads, size),
    ]
    dtypes = [q.dtype, *[torch.float32] * 4]
    results = [
        torch.empty(shape, dtype=dtype, device=q.device) if needed else None
        for shape, dtype, needed in zip(shapes, dtypes, needs, strict=True)
    ]
    if do.stride(3) != 1:
        do = do.contiguous()
    first, strides = _inputs(q, k, v, relative, q_scale, mask)
    if q.numel():
        _chunked_attention_bwd_kernel[(count, heads, batch)](
            do,
            *first,
            *results,
            tokens,
            count,
            *do.stride()[:3],
            *strides,
            chunks.k_scale,
            chunks.cap,
            chunks.invalid,
            *(end for to in ranges for end in to),
            **{f"HAS_D{x}": needed for x, needed in zip("QKVRS", needs, strict=True)},
            **_constants(q, relative, mask, chunks),
        )
    dq, dk, dv, dr, ds = results
    dk = None if dk is None else _fold(dk, k, chunks, ranges[1])
    dv = None if dv is None else _fold(dv, v, chunks, ranges[2])
    dr = None if dr is None else dr.sum(0).to(relative.dtype)
    return dq, dk, dv, dr, None if ds is None else ds.sum(0).to(q_scale.dtype)


def _fold(given: Tensor, x: Tensor, chunks: Chunks, to: Range) -> Tensor:
    batch, tokens, heads, size = x.shape
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, batch_stride, token_stride = _strides(x)
    if dx.numel():
        _fold_kernel[(tokens, batch)](
            given,
            x,
            dx,
            tokens,
            given.shape[1],
            batch_stride,
            token_stride,
            *to,
            C=chunks.size,
            PAST=chunks.past,
            X=chunks.context,
            D=size,
            WIDTH=heads * size,
            BLOCK=triton.next_power_of_2(heads * size),
            num_warps=4,
        )
    return dx


class ChunkedAttentionFunction(torch.autograd.Function):
    """Saves its inputs. No gradient for the mask."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        relative: Tensor,
        q_scale: Tensor,
        mask: Tensor | None,
        chunks: Chunks,
        ranges: tuple[Range, Range, Range, Range],
    ) -> Tensor:
        ctx.how = chunks, ranges
        ctx.save_for_backward(q, k, v, relative, q_scale, mask)
        return chunked_attention_fwd(q, k, v, relative, q_scale, mask, chunks, ranges)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:5]
        grads = chunked_attention_bwd(do, *ctx.saved_tensors, *ctx.how, needs=needs)
        return *grads, None, None, None


def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative: Tensor,
    q_scale: Tensor,
    mask: Tensor | None,
    chunks: Chunks,
    *,
    q_range: Range = EVERYTHING,
    k_range: Range = EVERYTHING,
    v_range: Range = EVERYTHING,
    after: Range = EVERYTHING,
) -> Tensor:
    """Chunked local attention with relative positions and capped scores.

    Replaces:
        ``Gemma4AudioAttention.forward`` between its projections, with their clamps
    Shapes:
        ``q``, ``k``, ``v`` [B, T, N, D], read in place where heads are contiguous; ``relative``
        [P, N, D], the key of each distance from the context's start; ``q_scale`` [D]; ``mask``
        [B, 1, n, C, X] over the n chunks, True or additive 0 where a key is seen, or None. Returns
        [B, T, N, D] contiguous in ``q``'s dtype. Saved: the inputs.
    Numerics:
        float32 throughout, products included, rounded once, then clamped: autocast does not reach
        it, so the masked score never meets a float16. Gradients pass a clamp where ``torch.clamp``
        lets them, and are summed in a fixed order: a repeated run is bitwise the same.
    Raises:
        ValueError: shapes do not match.
        TypeError: an input is not float32, bfloat16 or float16 (kernel only).
    Source:
        Written from the formula; the shift by relative position is appendix B of Transformer-XL
        (arXiv 1901.02860).
    """
    _check(q, k, v, relative, q_scale, mask, chunks)
    ranges = (q_range, k_range, v_range, after)
    if use_kernel(q):
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.dtype not in FLOATS:
                raise TypeError(
                    f"chunked_attention: {name} must be float32, bfloat16 or float16, got "
                    f"{x.dtype}. Cast it, or call chunked_attention_ref."
                )
        return ChunkedAttentionFunction.apply(q, k, v, relative, q_scale, mask, chunks, ranges)
    names = ("q_range", "k_range", "v_range", "after")
    named = dict(zip(names, ranges, strict=True))
    with torch.autocast(q.device.type, enabled=False):
        return chunked_attention_ref(q, k, v, relative, q_scale, mask, chunks, **named)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative: Tensor,
    q_scale: Tensor,
    mask: Tensor | None,
    chunks: Chunks,
) -> None:
    if q.dim() != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"chunked_attention: q, k and v must have one shape [B, T, N, D], got {tuple(q.shape)},"
            f" {tuple(k.shape)} and {tuple(v.shape)}. View the projections' outputs by head."
        )
    if not relative.numel():
        raise ValueError(
            "chunked_attention: there must be heads and distances, got relative of shape "
            f"{tuple(relative.shape)}. Pass a key for each distance."
        )
    if relative.shape[1:] != q.shape[2:] or q_scale.shape != q.shape[3:]:
        raise ValueError(
            f"chunked_attention: relative must have shape [P, N, D] = (P, {q.shape[2]}, "
            f"{q.shape[3]}) and q_scale [D], got {tuple(relative.shape)} and "
            f"{tuple(q_scale.shape)}. View the position projection's output by head."
        )
    if not q_scale.is_contiguous():
        raise ValueError(
            f"chunked_attention: q_scale must be contiguous, got a stride of {q_scale.stride(0)}. "
            "Call .contiguous() on it once."
        )
    expected = (q.shape[0], 1, chunks.count(q.shape[1]), chunks.size, chunks.context)
    if mask is not None and tuple(mask.shape) != expected:
        raise ValueError(
            f"chunked_attention: mask must have shape [B, 1, n, C, X] = {expected}, got "
            f"{tuple(mask.shape)}. Pass the tower's blocked mask."
        )
