"""Dequantisation of an NF4 weight in one kernel, its nested absmax included.

The ``N * K`` elements of a weight are 4-bit codes, two a byte, the first in the high nibble, flat
in row order and in blocks of 64 that share a scale::

    w[e]      = code[nibble e] * absmax[e // 64]                  rounded once, to the dtype of w
    absmax[b] = the stored float32                                single quantisation
              = code2[absmax8[b]] * absmax2[b // 256] + offset    nested, absmax8 is uint8

Worth a kernel: stock decodes a nested weight in three launches, with the float32 absmax written in
between, and a step of QLoRA decodes every weight at least twice. One pass reads half a byte an
element and writes the element.
"""

from __future__ import annotations

from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from gemma_accel.kernels._triton import tl, triton, use_kernel

__all__ = ["NF4Weight", "nf4_dequantize", "nf4_dequantize_ref", "nf4_refusal", "nf4_weight"]

BLOCK_W = 512  # words of eight codes a program: four a thread, each one 16-byte store of bfloat16


@final  # so that `type(w) is NF4Weight` tells it from a tensor
class NF4Weight(NamedTuple):
    """The parts of one quantised weight: tensors of the parameter that owns them, never copies."""

    packed: Tensor  # uint8, two codes a byte
    absmax: Tensor  # float32 [blocks], or uint8 [blocks] where nested
    code: Tensor  # float32 [16]
    absmax2: Tensor | None  # float32 [blocks / blocksize2], nested only
    code2: Tensor | None  # float32 [256], nested only
    offset: Tensor | None  # float32 without dimensions, nested only
    shape: tuple[int, int]  # (N, K)
    dtype: torch.dtype  # of the weight before it was quantised
    blocksize: int = 64
    blocksize2: int = 256


def nf4_refusal(param: Any) -> str | None:
    """Why ``nf4_weight`` cannot take ``param``, as a sentence; None where it can."""
    state = getattr(param, "quant_state", None)
    if state is None:
        return "the weight has no quant_state: not quantised yet, or not by bitsandbytes"
    if state.quant_type != "nf4":
        return f"the weight is quantised as {state.quant_type!r}; the kernel decodes 'nf4'"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has repacked the weight in place for inference on the CPU"
    if state.shape is None or len(state.shape) != 2:
        return f"the weight has shape {state.shape}; the kernel decodes matrices"
    return None


def nf4_weight(param: Any) -> NF4Weight:
    """The parts of a bitsandbytes ``Params4bit``, which is known by its ``quant_state`` alone.

    Made for every forward: a dozen attribute reads (1.2 us), no launch, no synchronisation.
    Nothing is cached, since moving and merging replace parameters and their states.

    Raises ``ValueError`` with ``nf4_refusal``'s sentence for FP4, for other quantisers, and for a
    weight that the CPU backend has repacked in place: the caller steps aside.
    """
    state = getattr(param, "quant_state", None)
    # vars: for a missing attribute getattr would run QuantState.__getattr__, at many times the cost
    if state is None or state.quant_type != "nf4" or vars(state).get("packing_format_for_cpu"):
        raise ValueError(f"nf4_weight: {nf4_refusal(param)}. Use the stock forward for it.")
    # a plain tensor: every read of a Params4bit's dtype or address goes through its
    # __torch_function__, in Python
    with torch._C.DisableTorchFunctionSubclass():
        packed = param.detach()
    if packed.dtype is not torch.uint8:  # quant_storage: sharding keeps the bytes as another dtype
        packed = packed.view(torch.uint8)
    absmax, code, inner = state.absmax, state.code, state.state2
    n_rows, columns = state.shape
    shape = (n_rows, columns)
    if inner is None:
        return NF4Weight(
            packed, absmax, code, None, None, None, shape, state.dtype, state.blocksize
        )
    return NF4Weight(
        packed,
        absmax,
        code,
        inner.absmax,
        inner.code,
        state.offset,
        shape,
        state.dtype,
        state.blocksize,
        inner.blocksize,
    )


def nf4_dequantize_ref(
    w: NF4Weight, *, rows: tuple[int, int] | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The formula in plain PyTorch, on the quantisation blocks that ``rows`` touch."""
    columns, (start, stop) = w.shape[1], rows or (0, w.shape[0])
    first, last = start * columns, stop * columns  # elements
    first_block = first // w.blocksize
    absmax = w.absmax[first_block : -(-last // w.blocksize)]
    if w.absmax2 is not None:
        assert w.code2 is not None and w.offset is not None
        block = torch.arange(first_block, first_block + len(absmax), device=absmax.device)
        absmax = w.code2[absmax.int()] * w.absmax2[block // w.blocksize2] + w.offset
    packed = w.packed.reshape(-1)[first // 2 : -(-last // 2)]
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).reshape(-1)
    codes = codes[first % 2 :][: last - first]
    block = torch.arange(first, last, device=absmax.device) // w.blocksize - first_block
    values = w.code[codes.int()] * absmax.float()[block]
    return values.to(dtype or w.dtype).view(stop - start, columns)


@triton.jit
def _nf4_dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    absmax2_ptr,
    code2_ptr,
    offset_ptr,
    out_ptr,
    first_word,
    skip,
    n_elements,
    n_bytes,
    HAS_ABSMAX2: tl.constexpr,
    WORDS_PER_BLOCK: tl.constexpr,
    BLOCKSIZE2: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    # A word is four bytes, eight codes, counted from the start of the weight, so it never crosses
    # a quantisation block. Rows may begin inside one: its first `skip` codes are not stored.
    word = tl.program_id(0).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)
    source = first_word + word
    block = source // WORDS_PER_BLOCK
    mask = source * 4 < n_bytes

    absmax = tl.load(absmax_ptr + block, mask=mask, other=0)
    if HAS_ABSMAX2:
        absmax2 = tl.load(absmax2_ptr + block // BLOCKSIZE2, mask=mask, other=0.0)
        # two roundings, as in stock: the launcher forbids making them one fused operation
        absmax = tl.load(code2_ptr + absmax.to(tl.int32)) * absmax2 + tl.load(offset_ptr)

    byte = source[:, None] * 4 + tl.arange(0, 4)[None, :]  # [BLOCK_W, 4]
    pair = tl.load(packed_ptr + byte, mask=byte < n_bytes, other=0).to(tl.int32)
    codes = tl.reshape(tl.join(pair >> 4, pair & 15), (BLOCK_W, 8))
    # 16 values, half a line of the L1 cache. tl.gather takes 4 % fewer instructions, and a barrier.
    values = tl.load(code_ptr + codes, eviction_policy="evict_last")
    values = values * absmax[:, None].to(tl.float32)

    element = word[:, None] * 8 + tl.arange(0, 8)[None, :] - skip  # [BLOCK_W, 8]
    mask = (element >= 0) & (element < n_elements)
    tl.store(out_ptr + element, values.to(out_ptr.dtype.element_ty), mask=mask)


def nf4_dequantize_fwd(w: NF4Weight, first: int, out: Tensor) -> Tensor:
    """Fills contiguous ``out`` with elements of ``w`` from element ``first`` on."""
    n_elements = out.numel()
    first_word, skip = divmod(first, 8)
    _nf4_dequantize_kernel[(triton.cdiv(skip + n_elements, 8 * BLOCK_W),)](
        w.packed,
        w.absmax,
        w.code,
        w.absmax2,
        w.code2,
        w.offset,
        out,
        first_word,
        skip,
        n_elements,
        w.packed.numel(),
        HAS_ABSMAX2=w.absmax2 is not None,
        WORDS_PER_BLOCK=w.blocksize // 8,
        BLOCKSIZE2=w.blocksize2,
        BLOCK_W=BLOCK_W,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


def nf4_dequantize(
    w: NF4Weight,
    *,
    rows: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """An NF4 weight, or a range of its rows, as a dense matrix.

    Replaces:
        ``bitsandbytes.functional.dequantize_4bit(param, param.quant_state)[start:stop]``

    Shapes:
        ``w`` holds ``[N, K]``; returns ``[n, K]``, where ``n`` is ``stop - start`` of ``rows``, or
        ``N``. Rows may begin anywhere, inside a quantisation block too. ``out``, contiguous
        ``[n, K]``, is written and returned. Not differentiable: the weight is frozen.

    Numerics:
        float32 throughout, rounded once to the dtype of ``out``, else ``dtype``, else ``w.dtype``:
        float32, bfloat16 or float16. Bitwise what bitsandbytes gives, nested or not, on CUDA, and
        on the CPU where K is a multiple of 64 (for other K its AVX-512 code scales some blocks
        wrongly). Deterministic.

    Raises:
        ``ValueError`` where ``rows`` is no range within ``[0, N]``, or ``out`` is not contiguous
        ``[n, K]``.

    Source:
        Written from the formula (QLoRA, arXiv:2305.14314), for the layout in which bitsandbytes
        (MIT) keeps codes and statistics.
    """
    n_rows, columns = w.shape
    start, stop = (0, n_rows) if rows is None else rows
    if not 0 <= start <= stop <= n_rows:
        raise ValueError(
            f"nf4_dequantize: rows must be (start, stop) with 0 <= start <= stop <= {n_rows}, got "
            f"{rows}. Pass the range of output rows that is wanted, or None for all."
        )
    shape = (stop - start, columns)
    if out is not None and (out.shape != shape or not out.is_contiguous()):
        raise ValueError(
            f"nf4_dequantize: out must be contiguous with shape {shape}, got shape "
            f"{tuple(out.shape)} with strides {out.stride()}. Pass such a buffer, or None."
        )
    if not use_kernel(w.packed):
        dtype = dtype if out is None else out.dtype
        values = nf4_dequantize_ref(w, rows=(start, stop), dtype=dtype)
        return values if out is None else out.copy_(values)
    if out is None:
        out = torch.empty(shape, dtype=dtype or w.dtype, device=w.packed.device)
    return nf4_dequantize_fwd(w, start * columns, out) if stop > start else out
