"""Attention of an image's patches to each other: ``softmax(q k^T) v``, no patch seeing the padding.

An image is padded to a fixed number of patches, so stock hands SDPA a mask of patches by patches,
which bars it from FlashAttention and is turned into as many numbers again in every layer. Here one
number a patch says whether it is there. Scores stay on the chip; backward recomputes them from the
row's log-sum-exp, once for the queries and once for the keys and values, without atomics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_accel.kernels._triton import tl, triton, use_kernel
from gemma_accel.kernels.rms_norm import FLOATS

LOG2E = 1.4426950408889634


def vision_attention_ref(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if seen is None else seen[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    return out.transpose(1, 2).contiguous()


@triton.jit
def _rows(ptr, rows, row_stride, tokens, D: tl.constexpr):
    """A tile [rows, D] of one head, 0 beyond the last token."""
    cols = tl.arange(0, D)
    at = ptr + rows.to(tl.int64)[:, None] * row_stride + cols[None, :]
    return tl.load(at, mask=(rows < tokens)[:, None], other=0.0)


@triton.jit
def _store_rows(ptr, x, rows, row_stride, tokens, D: tl.constexpr):
    cols = tl.arange(0, D)
    at = ptr + rows.to(tl.int64)[:, None] * row_stride + cols[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=(rows < tokens)[:, None])


@triton.jit
def _are_seen(seen_ptr, batch, seen_batch_stride, keys, tokens, HAS_SEEN: tl.constexpr):
    there = keys < tokens
    if HAS_SEEN:
        at = seen_ptr + batch * seen_batch_stride + keys
        there = there & (tl.load(at, mask=there, other=0) != 0)
    return there


@triton.jit(do_not_specialize=["tokens"])
def _vision_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, seen_ptr, out_ptr, lse_ptr, tokens, log2e,
    q_batch_stride, k_batch_stride, v_batch_stride,
    q_token_stride, k_token_stride, v_token_stride,
    q_head_stride, k_head_stride, v_head_stride, seen_batch_stride,
    N: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SEEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // N).to(tl.int64)
    head = (tl.program_id(1) % N).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += batch * q_batch_stride + head * q_head_stride
    k_ptr += batch * k_batch_stride + head * k_head_stride
    v_ptr += batch * v_batch_stride + head * v_head_stride
    q = _rows(q_ptr, rows, q_token_stride, tokens, D)

    top = tl.full([BLOCK_M], -1e30, dtype=tl.float32)  # of the scores so far, times log2(e)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    out = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    for start in range(0, tokens, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        there = _are_seen(seen_ptr, batch, seen_batch_stride, keys, tokens, HAS_SEEN)
        k = _rows(k_ptr, keys, k_token_stride, tokens, D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * log2e
        scores = tl.where(there[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_top[:, None])
        shrunk = tl.exp2(top - new_top)
        total = total * shrunk + tl.sum(weights, axis=1)
        v = _rows(v_ptr, keys, v_token_stride, tokens, D)
        out = out * shrunk[:, None]
        out = tl.dot(weights.to(v.dtype), v, out, input_precision=PRECISION)
        top = new_top

    out = out / total[:, None]
    out_ptr += (batch * tokens * N + head) * D
    _store_rows(out_ptr, out, rows, N * D, tokens, D)
    lse = top + tl.log2(total)
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * tokens + rows, lse, mask=rows < tokens)


@triton.jit(do_not_specialize=["tokens"])
def _vision_attention_dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, seen_ptr, out_ptr, lse_ptr, dq_ptr, delta_ptr, tokens, log2e,
    do_batch_stride, q_batch_stride, k_batch_stride, v_batch_stride,
    do_token_stride, q_token_stride, k_token_stride, v_token_stride,
    do_head_stride, q_head_stride, k_head_stride, v_head_stride, seen_batch_stride,
    N: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SEEN: tl.constexpr, HAS_DQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries; and ``sum(do * out)`` of its rows, for the keys' kernel."""
    batch = (tl.program_id(1) // N).to(tl.int64)
    head = (tl.program_id(1) % N).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    do_ptr += batch * do_batch_stride + head * do_head_stride
    k_ptr += batch * k_batch_stride + head * k_head_stride
    v_ptr += batch * v_batch_stride + head * v_head_stride
    here = (batch * tokens * N + head) * D
    do = _rows(do_ptr, rows, do_token_stride, tokens, D)
    out = _rows(out_ptr + here, rows, N * D, tokens, D)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), axis=1)
    at = tl.program_id(1).to(tl.int64) * tokens + rows
    tl.store(delta_ptr + at, delta, mask=rows < tokens)
    if HAS_DQ:
        q_ptr += batch * q_batch_stride + head * q_head_stride
        q = _rows(q_ptr, rows, q_token_stride, tokens, D)
        lse = tl.load(lse_ptr + at, mask=rows < tokens, other=0.0)
        dq = tl.zeros([BLOCK_M, D], dtype=tl.float32)
        for start in range(0, tokens, BLOCK_N):
            keys = start + tl.arange(0, BLOCK_N)
            there = _are_seen(seen_ptr, batch, seen_batch_stride, keys, tokens, HAS_SEEN)
            k = _rows(k_ptr, keys, k_token_stride, tokens, D)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * log2e
            weights = tl.exp2(scores - lse[:, None])
            v = _rows(v_ptr, keys, v_token_stride, tokens, D)
            dw = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            ds = tl.where(there[None, :], weights * (dw - delta[:, None]), 0.0)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        _store_rows(dq_ptr + here, dq, rows, N * D, tokens, D)


@triton.jit(do_not_specialize=["tokens"])
def _vision_attention_dkv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, seen_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, tokens, log2e,
    do_batch_stride, q_batch_stride, k_batch_stride, v_batch_stride,
    do_token_stride, q_token_stride, k_token_stride, v_token_stride,
    do_head_stride, q_head_stride, k_head_stride, v_head_stride, seen_batch_stride,
    N: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SEEN: tl.constexpr, HAS_DK: tl.constexpr, HAS_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values."""
    batch = (tl.program_id(1) // N).to(tl.int64)
    head = (tl.program_id(1) % N).to(tl.int64)
    keys = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    do_ptr += batch * do_batch_stride + head * do_head_stride
    q_ptr += batch * q_batch_stride + head * q_head_stride
    k_ptr += batch * k_batch_stride + head * k_head_stride
    v_ptr += batch * v_batch_stride + head * v_head_stride
    there = _are_seen(seen_ptr, batch, seen_batch_stride, keys, tokens, HAS_SEEN)
    k = _rows(k_ptr, keys, k_token_stride, tokens, D)
    v = _rows(v_ptr, keys, v_token_stride, tokens, D)
    dk = tl.zeros([BLOCK_N, D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, D], dtype=tl.float32)
    for start in range(0, tokens, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        at = tl.program_id(1).to(tl.int64) * tokens + rows
        q = _rows(q_ptr, rows, q_token_stride, tokens, D)
        do = _rows(do_ptr, rows, do_token_stride, tokens, D)
        # a row that does not exist weighs nothing
        lse = tl.load(lse_ptr + at, mask=rows < tokens, other=float("inf"))
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * log2e  # [keys, rows]
        weights = tl.where(there[:, None], tl.exp2(scores - lse[None, :]), 0.0)
        if HAS_DV:
            dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=PRECISION)
        if HAS_DK:
            delta = tl.load(delta_ptr + at, mask=rows < tokens, other=0.0)
            dw = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            ds = weights * (dw - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    here = (batch * tokens * N + head) * D
    if HAS_DK:
        _store_rows(dk_ptr + here, dk, keys, N * D, tokens, D)
    if HAS_DV:
        _store_rows(dv_ptr + here, dv, keys, N * D, tokens, D)


class Tile(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def tiles(size: int, itemsize: int) -> tuple[Tile, Tile, Tile]:
    """Forward, queries' and keys' tiles: within 99 KiB, and no register spilled."""
    if itemsize == 4:
        return (Tile(32, 32, 4, 1),) * 3
    if size <= 64:
        return Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(32, 128, 8, 2)
    return Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 1)


def supported(q: Tensor, k: Tensor) -> str | None:
    """Why the kernel does not take these, or None where it does."""
    if (size := q.shape[-1]) not in (16, 32, 64, 128):
        return f"heads are {size} wide; the kernel takes 16, 32, 64 and 128"
    if k.shape != q.shape:
        return "keys are shared between query heads"
    if q.dtype == torch.float32 and q.is_cuda:
        return "in float32 SDPA is faster"
    return None


def _strides(*tensors: Tensor) -> list[int]:
    """By batch, by token, by head: each of all tensors."""
    return [x.stride(dim) for dim in range(3) for x in tensors]


def _launch(
    kernel: Any,
    tile: Tile,
    over: int,
    q: Tensor,
    seen: Tensor | None,
    args: list[Any],
    **flags: Any,
) -> None:
    batch, tokens, heads, size = q.shape
    grid = (triton.cdiv(tokens, over), batch * heads)
    kernel[grid](
        *args,
        0 if seen is None else seen.stride(0),
        N=heads,
        D=size,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        HAS_SEEN=seen is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **flags,
    )


def vision_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The result like ``q``, contiguous, and the rows' log-sum-exp in base 2 [B * N, T]."""
    batch, tokens, heads, size = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(batch * heads, tokens, dtype=torch.float32, device=q.device)
    tile = tiles(size, q.element_size())[0]
    args = [q, k, v, seen, out, lse, tokens, LOG2E, *_strides(q, k, v)]
    if out.numel():
        _launch(_vision_attention_fwd_kernel, tile, tile.block_m, q, seen, args)
    return out, lse


def vision_attention_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``q, k, v``, those that ``needs`` asks for."""
    dq, dk, dv = (
        torch.empty_like(q, memory_format=torch.contiguous_format) if needed else None
        for needed in needs
    )
    if not q.numel():
        return dq, dk, dv
    if do.stride(3) != 1:
        do = do.contiguous()
    delta = torch.empty_like(lse)
    _, tile, k_tile = tiles(q.shape[-1], q.element_size())
    end = [q.shape[1], LOG2E, *_strides(do, q, k, v)]
    args = [do, q, k, v, seen, out, lse, dq, delta, *end]
    _launch(_vision_attention_dq_kernel, tile, tile.block_m, q, seen, args, HAS_DQ=dq is not None)
    if dk is not None or dv is not None:
        args = [do, q, k, v, seen, lse, delta, dk, dv, *end]
        flags = {"HAS_DK": dk is not None, "HAS_DV": dv is not None}
        _launch(_vision_attention_dkv_kernel, k_tile, k_tile.block_n, q, seen, args, **flags)
    return dq, dk, dv


class VisionAttentionFunction(torch.autograd.Function):
    """Saves q, k, v, which patches are seen, the result and its log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        out, lse = vision_attention_fwd(q, k, v, seen)
        ctx.save_for_backward(q, k, v, seen, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        return *vision_attention_bwd(do, *ctx.saved_tensors, needs=needs), None


def vision_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """Attention of every patch to every patch that is there; scores are not scaled.

    Replaces:
        ``F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None], scale=1.0)``
    Shapes:
        ``q``, ``k``, ``v`` [B, T, N, D], any strides with contiguous D, where stock has [B, N, T,
        D]; ``seen`` [B, T] bool, True for a patch that is there, at least one in each row, or None;
        returns [B, T, N, D] contiguous. Saved: q, k, v, the result, and one float32 a row and head.
    Numerics:
        Scores, softmax and sums in float32, weights rounded to the inputs' dtype before they meet
        the values, as in FlashAttention. Backward sums in a fixed order: a repeated run is bitwise
        the same.
    Raises:
        ValueError: shapes do not match; D is not 16, 32, 64 or 128 (kernel only).
        TypeError: an input is not float32, bfloat16 or float16, or their dtypes differ (kernel
            only).
    Source:
        Written from the formula; the tiling is that of FlashAttention-2 (arXiv 2307.08691).
    """
    if q.dim() != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"vision_attention: q, k and v must have one shape [B, T, N, D], got {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}. Repeat keys that heads share, or call SDPA."
        )
    if seen is not None and (seen.shape != q.shape[:2] or seen.dtype != torch.bool):
        raise ValueError(
            f"vision_attention: seen must be bool of shape [B, T] = {tuple(q.shape[:2])}, got "
            f"{seen.dtype} of {tuple(seen.shape)}. Pass one row of the attention mask."
        )
    kernel = use_kernel(q)
    if not q.dtype == k.dtype == v.dtype or (kernel and q.dtype not in FLOATS):
        raise TypeError(
            "vision_attention: q, k and v must be float32, bfloat16 or float16, all the same, "
            f"got {q.dtype}, {k.dtype} and {v.dtype}. Cast them."
        )
    if kernel:
        if q.shape[-1] not in (16, 32, 64, 128):
            raise ValueError(f"vision_attention: {supported(q, k)}. Call SDPA instead.")
        return VisionAttentionFunction.apply(q, k, v, seen)
    return vision_attention_ref(q, k, v, seen)
