"""The joints of a tower's layer: ``h = residual + scale * rms_norm(clip(x), weight)`` and, where
another norm follows, ``n = clip(rms_norm(h, next_weight))``.

As ``norm_add``, with the clamps that surround a tower's projections: that of the product ``x``
before its norm, that of the next product's input after its own. Stock runs five passes here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_accel.kernels._triton import tl, triton, use_kernel
from gemma_accel.kernels.clip import EVERYTHING, Range, clip_ref, clipped, inside
from gemma_accel.kernels.rms_norm import (
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


def clip_norm_add_ref(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    next_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    scale: float = 1.0,
    before: Range = EVERYTHING,
    after: Range = EVERYTHING,
) -> Tensor | tuple[Tensor, Tensor]:
    h = widen(residual) + scale * rms_norm_ref(widen(clip_ref(x, before)), weight, eps)
    h = h.to(torch.promote_types(x.dtype, residual.dtype))
    if next_weight is None:
        return h
    return h, clip_ref(rms_norm_ref(h, next_weight, eps), after)


@triton.jit(do_not_specialize=["n_rows"])
def _clip_norm_add_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    next_weight_ptr,
    h_ptr,
    n_ptr,
    rstd_ptr,  # [1 or 2, R]: of the clamped x, of h
    n_rows,
    x_row_stride,
    residual_row_stride,
    eps,
    scale,
    before_low,
    before_high,
    after_low,
    after_high,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_NEXT: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    HAS_AFTER: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < n_rows)[:, None] & (cols < D)[None, :]

    x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0)
    residual = tl.load(
        residual_ptr + rows[:, None] * residual_row_stride + cols[None, :], mask=mask, other=0.0
    )
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    x = x.to(tl.float32)
    if HAS_BEFORE:
        x = tl.where(mask, clipped(x, before_low, before_high), 0.0)  # 0 may lie outside
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)

    h = residual.to(tl.float32) + x * rstd[:, None] * weight[None, :] * scale
    h = h.to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + rows[:, None] * D + cols[None, :], h, mask=mask)

    if HAS_NEXT:
        h = h.to(tl.float32)  # the rounded h: backward reads that one
        next_weight = tl.load(next_weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(h * h, axis=1) / D + eps)
        tl.store(rstd_ptr + n_rows + rows, rstd, mask=rows < n_rows)
        n = (h * rstd[:, None] * next_weight[None, :]).to(n_ptr.dtype.element_ty)
        if HAS_AFTER:
            n = clipped(n.to(tl.float32), after_low, after_high).to(n_ptr.dtype.element_ty)
        tl.store(n_ptr + rows[:, None] * D + cols[None, :], n, mask=mask)


@triton.jit(do_not_specialize=["n_rows", "rows_per_program"])
def _clip_norm_add_bwd_kernel(
    dh_ptr,
    dn_ptr,
    x_ptr,
    weight_ptr,
    h_ptr,
    next_weight_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    dw_ptr,
    dnext_ptr,
    n_rows,
    rows_per_program,
    dh_row_stride,
    dn_row_stride,
    x_row_stride,
    scale,
    before_low,
    before_high,
    after_low,
    after_high,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    HAS_AFTER: tl.constexpr,
    HAS_DH: tl.constexpr,
    HAS_DN: tl.constexpr,
    HAS_DX: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr,
    HAS_DW: tl.constexpr,
    HAS_DNEXT: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, n_rows)
    cols = tl.arange(0, BLOCK_D)
    if HAS_DW:
        dw = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    if HAS_DNEXT:
        dnext = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)

    for start in range(first, last, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        mask = (rows < n_rows)[:, None] & (cols < D)[None, :]
        here = rows[:, None] * D + cols[None, :]
        dh = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
        if HAS_DH:
            at = dh_ptr + rows[:, None] * dh_row_stride + cols[None, :]
            dh += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if HAS_DN:
            at = dn_ptr + rows[:, None] * dn_row_stride + cols[None, :]
            dn = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            h = tl.load(h_ptr + here, mask=mask, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + n_rows + rows, mask=rows < n_rows, other=0.0)
            h_hat = h * rstd[:, None]
            weight = tl.load(next_weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
            if HAS_AFTER:  # the rounded value was clamped
                n = (h_hat * weight[None, :]).to(h_ptr.dtype.element_ty).to(tl.float32)
                dn = tl.where(inside(n, after_low, after_high), dn, 0.0)
            if HAS_DNEXT:
                dnext += dn * h_hat
            dh += norm_input_grad(dn * weight[None, :], h_hat, rstd, D)
        if HAS_DRESIDUAL:
            tl.store(dresidual_ptr + here, dh.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if HAS_DX or HAS_DW:
            at = x_ptr + rows[:, None] * x_row_stride + cols[None, :]
            x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
            dh *= scale
            if HAS_BEFORE:
                x_hat = tl.where(mask, clipped(x, before_low, before_high), 0.0) * rstd[:, None]
            else:
                x_hat = x * rstd[:, None]
            if HAS_DW:
                dw += dh * x_hat
            if HAS_DX:
                weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
                dx = norm_input_grad(dh * weight[None, :], x_hat, rstd, D)
                if HAS_BEFORE:
                    dx = tl.where(inside(x, before_low, before_high), dx, 0.0)
                tl.store(dx_ptr + here, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    if HAS_DW:
        tl.store(dw_ptr + program * D + cols, tl.sum(dw, axis=0), mask=cols < D)
    if HAS_DNEXT:
        tl.store(dnext_ptr + program * D + cols, tl.sum(dnext, axis=0), mask=cols < D)


def clip_norm_add_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    next_weight: Tensor | None,
    eps: float,
    scale: float,
    before: Range,
    after: Range,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``h``, ``n`` if there is a next weight, and ``rstd`` [1 or 2, R] in float32."""
    has_next = next_weight is not None
    dtype = torch.promote_types(x.dtype, residual.dtype)
    h = torch.empty(x.shape, dtype=dtype, device=x.device)
    n = torch.empty(x.shape, dtype=dtype, device=x.device) if has_next else None
    n_rows, width = row_count(x), x.shape[-1]
    rstd = torch.empty(1 + has_next, n_rows, dtype=torch.float32, device=x.device)
    x, x_row_stride = strided_rows(x)
    residual, residual_row_stride = strided_rows(residual)
    block_r, block_d, num_warps = row_tile(width)
    _clip_norm_add_fwd_kernel[(triton.cdiv(n_rows, block_r),)](
        x,
        residual,
        weight,
        next_weight,
        h,
        n,
        rstd,
        n_rows,
        x_row_stride,
        residual_row_stride,
        eps,
        scale,
        *before,
        *after,
        D=width,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        HAS_NEXT=has_next,
        HAS_BEFORE=before.bounded,
        HAS_AFTER=after.bounded,
        num_warps=num_warps,
    )
    return h, n, rstd


def clip_norm_add_bwd(
    dh: Tensor | None,
    dn: Tensor | None,
    x: Tensor,
    weight: Tensor,
    h: Tensor | None,
    next_weight: Tensor | None,
    rstd: Tensor,
    scale: float,
    before: Range,
    after: Range,
    *,
    residual_dtype: torch.dtype,
    needs: tuple[bool, bool, bool, bool] = (True, True, False, False),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``x, residual, weight, next_weight``, those that ``needs`` asks for.

    ``dh`` and ``dn`` may each be None. Without ``dn`` the residual's gradient is ``dh`` itself.
    """
    needs_dx, needs_dresidual, needs_dw, needs_dnext = needs
    needs_dnext = needs_dnext and dn is not None
    if dh is None and dn is None:
        return None, None, None, None
    passes_through = dh is not None and dn is None and dh.dtype == residual_dtype
    dresidual = dh if needs_dresidual and passes_through else None
    needs_dresidual = needs_dresidual and not passes_through
    if not (needs_dx or needs_dresidual or needs_dw or needs_dnext):
        return None, dresidual, None, None

    n_rows, width = rstd.shape[1], x.shape[-1]
    block_r, block_d, num_warps = row_tile(width)
    rows_per_program, programs = share_rows(n_rows, block_r, needs_dw or needs_dnext)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else None
    if needs_dresidual:
        dresidual = torch.empty(x.shape, dtype=residual_dtype, device=x.device)
    dw_sums, dnext_sums = (
        torch.empty(programs, width, dtype=torch.float32, device=x.device) if needed else None
        for needed in (needs_dw, needs_dnext)
    )
    dh_rows, dh_row_stride = (None, 0) if dh is None else strided_rows(dh)
    dn_rows, dn_row_stride = (None, 0) if dn is None else strided_rows(dn)
    x, x_row_stride = strided_rows(x)
    _clip_norm_add_bwd_kernel[(programs,)](
        dh_rows,
        dn_rows,
        x,
        weight,
        h,
        next_weight,
        rstd,
        dx,
        dresidual,
        dw_sums,
        dnext_sums,
        n_rows,
        rows_per_program,
        dh_row_stride,
        dn_row_stride,
        x_row_stride,
        scale,
        *before,
        *after,
        D=width,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        HAS_BEFORE=before.bounded,
        HAS_AFTER=after.bounded,
        HAS_DH=dh is not None,
        HAS_DN=dn is not None,
        HAS_DX=needs_dx,
        HAS_DRESIDUAL=needs_dresidual,
        HAS_DW=needs_dw,
        HAS_DNEXT=needs_dnext,
        num_warps=num_warps,
    )
    return dx, dresidual, weight_grad(dw_sums, weight), weight_grad(dnext_sums, next_weight)


class ClipNormAddFunction(torch.autograd.Function):
    """Saves ``x``, the weights, ``rstd`` and, only where its norm is taken too, ``h``.

    Gradients for ``x``, ``residual`` and the weights. Either output may go unused.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        next_weight: Tensor | None,
        eps: float,
        scale: float,
        before: Range,
        after: Range,
    ) -> Tensor | tuple[Tensor, Tensor]:
        h, n, rstd = clip_norm_add_fwd(x, residual, weight, next_weight, eps, scale, before, after)
        ctx.set_materialize_grads(False)
        ctx.residual_dtype, ctx.how = residual.dtype, (scale, before, after)
        ctx.save_for_backward(x, weight, None if n is None else h, next_weight, rstd)
        return h if n is None else (h, n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor | None, dn: Tensor | None = None) -> tuple[Any, ...]:
        grads = clip_norm_add_bwd(
            dh,
            dn,
            *ctx.saved_tensors,
            *ctx.how,
            residual_dtype=ctx.residual_dtype,
            needs=ctx.needs_input_grad[:4],
        )
        return *grads, None, None, None, None


def clip_norm_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    next_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    scale: float = 1.0,
    before: Range = EVERYTHING,
    after: Range = EVERYTHING,
) -> Tensor | tuple[Tensor, Tensor]:
    """A product's clamp, its post-norm, the residual sum, the next pre-norm and its clamp.

    Replaces:
        ``h = residual + scale * rms_norm(torch.clamp(x, *before), weight)``
        ``n = torch.clamp(rms_norm(h, next_weight), *after)``
    Shapes:
        ``x``, ``residual`` [..., D], any row stride; weights [D]. Returns ``h``, or ``(h, n)`` if
        ``next_weight`` is given, contiguous in the promoted dtype of ``x`` and ``residual``.
        Saved: ``x``, the weights, ``rstd`` [1 or 2, R] float32, and ``h`` if ``next_weight`` is
        given. Without it ``h`` may be changed in place by the caller.
    Numerics:
        float32 throughout; ``h`` is rounded once, ``n`` is the norm of the rounded ``h``, rounded
        and then clamped. Gradients pass a clamp where ``torch.clamp`` lets them. The weights' are
        summed in float32 in a fixed order: a repeated run is bitwise the same.
    Raises:
        ValueError: shapes or devices do not match; rows are wider than 8192 (kernel only).
        TypeError: an input is not float32, bfloat16 or float16 (kernel only).
    Source:
        Written from the formula.
    """
    if residual.shape != x.shape:
        raise ValueError(
            f"clip_norm_add: residual must have the shape of x, {tuple(x.shape)}, "
            f"got {tuple(residual.shape)}. Expand it, or add it outside."
        )
    check_weight("clip_norm_add", weight, x)
    if next_weight is not None:
        check_weight("clip_norm_add", next_weight, x, "next_weight")
    if use_kernel(x):
        check_rows("clip_norm_add", x)
        check_rows("clip_norm_add", residual, "residual")
        return ClipNormAddFunction.apply(
            x, residual, weight, next_weight, eps, scale, before, after
        )
    return clip_norm_add_ref(
        x, residual, weight, next_weight, eps=eps, scale=scale, before=before, after=after
    )
