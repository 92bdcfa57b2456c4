"""The joints of a decoder layer: ``h = (residual + rms_norm(x, weight)) * scale; n = rms_norm(h)``.

Stock runs the post-norm, the residual sum, the layer's scalar and the next pre-norm one after the
other, each reading what the one before it wrote. Here ``x`` and ``residual`` are read once, ``h``
and its norm written once. Backward likewise joins the two gradients that meet at ``h``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_accel.kernels._triton import tl, triton, use_kernel
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


def norm_add_ref(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    scale: Tensor | None = None,
    next_weight: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    h = widen(residual) + rms_norm_ref(widen(x), weight, eps)
    if scale is not None:
        h = h * widen(scale)
    h = h.to(torch.promote_types(x.dtype, residual.dtype))
    return h if next_weight is None else (h, rms_norm_ref(h, next_weight, eps))


@triton.jit(do_not_specialize=["n_rows"])
def _norm_add_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    scale_ptr,
    next_weight_ptr,
    h_ptr,
    n_ptr,
    rstd_ptr,  # [1 or 2, R]: of x, of h
    n_rows,
    x_row_stride,
    residual_row_stride,
    eps,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_NEXT: tl.constexpr,
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
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)

    h = residual.to(tl.float32) + x * rstd[:, None] * weight[None, :]
    if HAS_SCALE:
        h *= tl.load(scale_ptr).to(tl.float32)
    h = h.to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + rows[:, None] * D + cols[None, :], h, mask=mask)

    if HAS_NEXT:
        h = h.to(tl.float32)  # the rounded h: backward reads that one
        next_weight = tl.load(next_weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(h * h, axis=1) / D + eps)
        tl.store(rstd_ptr + n_rows + rows, rstd, mask=rows < n_rows)
        n = (h * rstd[:, None] * next_weight[None, :]).to(n_ptr.dtype.element_ty)
        tl.store(n_ptr + rows[:, None] * D + cols[None, :], n, mask=mask)


@triton.jit(do_not_specialize=["n_rows", "rows_per_program"])
def _norm_add_bwd_kernel(
    dh_ptr,
    dn_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
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
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_SCALE: tl.constexpr,
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
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)
    if HAS_DW:
        dw = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    if HAS_DNEXT:
        dnext = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)

    for start in range(first, last, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        mask = (rows < n_rows)[:, None] & (cols < D)[None, :]
        grad = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)  # what arrives at h, then at the sum
        if HAS_DH:
            dh = tl.load(
                dh_ptr + rows[:, None] * dh_row_stride + cols[None, :], mask=mask, other=0.0
            )
            grad += dh.to(tl.float32)
        if HAS_DN:
            dn = tl.load(
                dn_ptr + rows[:, None] * dn_row_stride + cols[None, :], mask=mask, other=0.0
            )
            h = tl.load(h_ptr + rows[:, None] * D + cols[None, :], mask=mask, other=0.0)
            rstd = tl.load(rstd_ptr + n_rows + rows, mask=rows < n_rows, other=0.0)
            # the weights stay in cache: held across rows they would crowd out the running sums
            next_weight = tl.load(next_weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
            dn = dn.to(tl.float32)
            h_hat = h.to(tl.float32) * rstd[:, None]
            if HAS_DNEXT:
                dnext += dn * h_hat
            grad += norm_input_grad(dn * next_weight[None, :], h_hat, rstd, D)
        if HAS_SCALE:
            grad *= scale
        if HAS_DRESIDUAL:
            dresidual = grad.to(dresidual_ptr.dtype.element_ty)
            tl.store(dresidual_ptr + rows[:, None] * D + cols[None, :], dresidual, mask=mask)
        if HAS_DX or HAS_DW:
            x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0)
            rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
            x_hat = x.to(tl.float32) * rstd[:, None]
            if HAS_DW:
                dw += grad * x_hat
            if HAS_DX:
                weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
                dx = norm_input_grad(grad * weight[None, :], x_hat, rstd, D)
                dx = dx.to(dx_ptr.dtype.element_ty)
                tl.store(dx_ptr + rows[:, None] * D + cols[None, :], dx, mask=mask)

    if HAS_DW:
        tl.store(dw_ptr + program * D + cols, tl.sum(dw, axis=0), mask=cols < D)
    if HAS_DNEXT:
        tl.store(dnext_ptr + program * D + cols, tl.sum(dnext, axis=0), mask=cols < D)


def norm_add_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    next_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``h``, its norm if ``next_weight`` is given, and ``rstd`` [1 or 2, R] of ``x`` and ``h``."""
    has_next = next_weight is not None
    dtype = torch.promote_types(x.dtype, residual.dtype)
    # in their final shape: a view made here could not be written in place by the caller
    h = torch.empty(x.shape, dtype=dtype, device=x.device)
    n = torch.empty(x.shape, dtype=dtype, device=x.device) if has_next else None
    n_rows, width = row_count(x), x.shape[-1]
    rstd = torch.empty(1 + has_next, n_rows, dtype=torch.float32, device=x.device)
    x, x_row_stride = strided_rows(x)
    residual, residual_row_stride = strided_rows(residual)
    block_r, block_d, num_warps = row_tile(width)
    _norm_add_fwd_kernel[(triton.cdiv(n_rows, block_r),)](
        x,
        residual,
        weight,
        scale,
        next_weight,
        h,
        n,
        rstd,
        n_rows,
        x_row_stride,
        residual_row_stride,
        eps,
        D=width,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        HAS_SCALE=scale is not None,
        HAS_NEXT=has_next,
        num_warps=num_warps,
    )
    return h, n, rstd


def norm_add_bwd(
    dh: Tensor | None,
    dn: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    h: Tensor | None,
    next_weight: Tensor | None,
    rstd: Tensor,
    *,
    residual_dtype: torch.dtype,
    needs: tuple[bool, bool, bool, bool] = (True, True, False, False),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``x, residual, weight, next_weight``, those that ``needs`` asks for.

    ``dh`` and ``dn`` may each be None. Without a scale and without ``dn`` the residual's gradient
    is ``dh`` itself, not a copy.
    """
    needs_dx, needs_dresidual, needs_dw, needs_dnext = needs
    needs_dnext = needs_dnext and dn is not None
    if dh is None and dn is None:
        return None, None, None, None
    passes_through = dh is not None and dn is None and scale is None and dh.dtype == residual_dtype
    dresidual = dh if needs_dresidual and passes_through else None
    needs_dresidual = needs_dresidual and not passes_through
    if not (needs_dx or needs_dresidual or needs_dw or needs_dnext):
        return None, dresidual, None, None

    n_rows, width = rstd.shape[1], x.shape[-1]
    block_r, block_d, num_warps = row_tile(width)
    rows_per_program, programs = share_rows(n_rows, block_r, needs_dw or needs_dnext)
    device = x.device
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else None
    if needs_dresidual:
        dresidual = torch.empty(x.shape, dtype=residual_dtype, device=device)
    dw_sums, dnext_sums = (
        torch.empty(programs, width, dtype=torch.float32, device=device) if needed else None
        for needed in (needs_dw, needs_dnext)
    )
    dh_rows, dh_row_stride = (None, 0) if dh is None else strided_rows(dh)
    dn_rows, dn_row_stride = (None, 0) if dn is None else strided_rows(dn)
    x, x_row_stride = strided_rows(x)
    _norm_add_bwd_kernel[(programs,)](
        dh_rows,
        dn_rows,
        x,
        weight,
        scale,
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
        D=width,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        HAS_SCALE=scale is not None,
        HAS_DH=dh is not None,
        HAS_DN=dn is not None,
        HAS_DX=needs_dx,
        HAS_DRESIDUAL=needs_dresidual,
        HAS_DW=needs_dw,
        HAS_DNEXT=needs_dnext,
        num_warps=num_warps,
    )
    return dx, dresidual, weight_grad(dw_sums, weight), weight_grad(dnext_sums, next_weight)


class NormAddFunction(torch.autograd.Function):
    """Saves ``x``, the weights, ``rstd`` and, only where its norm is taken too, ``h``.

    No gradient for ``scale`` and ``eps``. Either output may go unused.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        next_weight: Tensor | None,
        eps: float,
    ) -> Tensor | tuple[Tensor, Tensor]:
        h, n, rstd = norm_add_fwd(x, residual, weight, scale, next_weight, eps)
        ctx.set_materialize_grads(False)
        ctx.residual_dtype = residual.dtype
        ctx.save_for_backward(x, weight, scale, None if n is None else h, next_weight, rstd)
        return h if n is None else (h, n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor | None, dn: Tensor | None = None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        dx, dresidual, dw, dnext = norm_add_bwd(
            dh,
            dn,
            *ctx.saved_tensors,
            residual_dtype=ctx.residual_dtype,
            needs=(needs[0], needs[1], needs[2], needs[4]),
        )
        return dx, dresidual, dw, None, dnext, None


def norm_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    scale: Tensor | None = None,
    next_weight: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Post-norm, residual sum, the layer's scalar, and the pre-norm of what comes next.

    Replaces:
        ``h = (residual + rms_norm(x, weight)) * scale; n = rms_norm(h, next_weight)``
    Shapes:
        ``x``, ``residual`` [..., D], any row stride; weights [D]; ``scale`` one element, read by
        the kernel and never by the host. Returns ``h``, or ``(h, n)`` if ``next_weight`` is given,
        contiguous in the promoted dtype of ``x`` and ``residual``. Saved: ``x``, the weights,
        ``rstd`` [1 or 2, R] float32, and ``h`` if ``next_weight`` is given. Without it ``h`` may be
        changed in place by the caller.
    Numerics:
        float32 throughout; ``h`` is rounded once (stock rounds the norm, the sum and the product),
        ``n`` is the norm of the rounded ``h``. Weight gradients are summed in float32 in a fixed
        order: a repeated run is bitwise the same.
    Raises:
        ValueError: shapes or devices do not match; ``scale`` has more than one element or requires
            a gradient; rows are wider than 8192 (kernel only).
        TypeError: an input is not float32, bfloat16 or float16 (kernel only).
    Source:
        Written from the formula.
    """
    _check(x, residual, weight, scale, next_weight)
    if use_kernel(x):
        check_rows("norm_add", x)
        check_rows("norm_add", residual, "residual")
        return NormAddFunction.apply(x, residual, weight, scale, next_weight, eps)
    return norm_add_ref(x, residual, weight, eps=eps, scale=scale, next_weight=next_weight)


def _check(
    x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor | None, next_weight: Tensor | None
) -> None:
    if residual.shape != x.shape:
        raise ValueError(
            f"norm_add: residual must have the shape of x, {tuple(x.shape)}, "
            f"got {tuple(residual.shape)}. Expand it, or add it outside."
        )
    check_weight("norm_add", weight, x)
    if next_weight is not None:
        check_weight("norm_add", next_weight, x, "next_weight")
    if scale is None:
        return
    if scale.numel() != 1 or scale.device != x.device:
        raise ValueError(
            f"norm_add: scale must be one element on {x.device}, got {tuple(scale.shape)} on "
            f"{scale.device}. Pass the layer's own layer_scalar buffer."
        )
    if scale.requires_grad:
        raise ValueError(
            "norm_add: scale must not require a gradient, for none is computed. "
            "Pass scale.detach(), or multiply outside."
        )
