"""Projections that share an input, their low-rank adapters included, as one step of autograd.

    y_i = x W_i^T + bias_i + scaling_i (x A_i^T) B_i^T

``W_i`` is dense or NF4, ``A_i`` is ``[r_i, K]``, ``B_i`` is ``[N_i, r_i]``. There is no kernel
here: the products are cuBLAS', and what is saved lies between them. A scaling is a product's alpha
and a sum its beta, so nothing elementwise is launched. The ``A_i`` of a group are stacked, so ``x``
is read once for all adapters, and the way back through them is one product for ``x`` and one for
all ``A_i``. The input is kept once for the group; an NF4 weight is decoded again in backward.

Launches of P projections (adapters in x's dtype, nested NF4 base, all gradients of QLoRA)::

               a projection           a group                    P = 1, 2, 3   stock PEFT
    forward    decode, B, base        A, stack if P > 1          4, 8, 11      9 P
    backward   decode, base, dxA, dB  dA, dx, stack if P > 1     6, 11, 15     11 P - 1

Stock forward: three to decode, base, clone, A, B, scale, add. Stock backward: three to decode,
base, scale, two products each for A and B, a sum for x, and P - 1 more sums over the group. On a
dense base ours are P fewer each way; stock's are 5 P and 8 P - 1.

The adapter's product, usually the smaller, is written first and the base product is added onto it
in the accumulator of its GEMM: y is rounded once at full size, where stock rounds base, adapter,
scaled adapter and sum. dx over a group likewise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_accel.kernels.nf4 import NF4Weight, nf4_dequantize, nf4_dequantize_ref

__all__ = [
    "Gradients",
    "Needs",
    "Projection",
    "autocast_dtype",
    "outside_autocast",
    "project",
    "project_backward",
    "project_forward",
    "project_ref",
]


class Projection(NamedTuple):
    """One output of a group. ``rows`` takes only those rows of weight, bias and ``lora_b``,
    ``columns`` only those columns of weight and ``lora_a``; each is (start, stop).
    """

    weight: Tensor | NF4Weight  # [N, K]
    bias: Tensor | None = None  # [N]
    lora_a: Tensor | None = None  # [r, K]
    lora_b: Tensor | None = None  # [N, r]
    scaling: float = 1.0
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None


class Gradients(NamedTuple):
    """One entry a parameter of a projection: its gradient, or in ``Needs`` whether it is wanted."""

    weight: Any = None
    bias: Any = None
    lora_a: Any = None
    lora_b: Any = None


class Needs(NamedTuple):
    """Which gradients ``project_backward`` computes."""

    x: bool
    each: Sequence[Gradients]


def project_ref(x: Tensor, *projections: Projection) -> tuple[Tensor, ...]:
    """The formula in plain PyTorch; adapters work in their own dtype, the sum is rounded to x's."""
    outs = []
    for weight, bias, lora_a, lora_b, scaling, rows, columns in projections:
        taken, read = _span(rows), _span(columns)
        if isinstance(weight, NF4Weight):
            weight = nf4_dequantize_ref(weight, dtype=x.dtype)
        y = F.linear(x, weight[taken, read], None if bias is None else bias[taken])
        if lora_a is not None and lora_b is not None:
            delta = F.linear(F.linear(x.to(lora_a.dtype), lora_a[:, read]), lora_b[taken])
            y = (y + scaling * delta).to(x.dtype)
        outs.append(y)
    return tuple(outs)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would compute a product of ``x`` in; None where it is off, or x is float64."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(kind)
    return None


# --- operands ---


def _adapter_dtype(x: Tensor, projections: Sequence[Projection], cast: bool) -> torch.dtype | None:
    """The dtype in which the adapters of the group work; None if there are none."""
    dtype = None
    for p in projections:
        if p.lora_a is None:
            continue
        if cast:
            return x.dtype
        assert p.lora_b is not None
        dtype = dtype or p.lora_a.dtype
        if p.lora_a.dtype is not dtype or p.lora_b.dtype is not dtype:
            raise TypeError(
                f"project: adapters of one call must share a dtype, {dtype} here, got lora_a in "
                f"{p.lora_a.dtype} and lora_b in {p.lora_b.dtype}. Cast them, or call it for each."
            )
    return dtype


def _adapters(projections: Sequence[Projection], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The ``A_i`` stacked, ``[sum r, K]``, and the ``B_i``, in ``dtype``: at most one launch."""
    a, b = [], []
    for p in projections:
        assert p.lora_a is not None and p.lora_b is not None
        a.append(_read(p.lora_a, p))
        b.append(_taken(p.lora_b, p))
    if all(t.dtype is dtype for t in (*a, *b)):
        return a[0] if len(a) == 1 else torch.cat(a), b
    ranks = [t.shape[0] for t in a]
    stacked = torch.empty((sum(ranks), a[0].shape[1]), dtype=dtype, device=a[0].device)
    copies = [torch.empty(t.shape, dtype=dtype, device=t.device) for t in b]
    torch._foreach_copy_([*stacked.split(ranks), *copies], [*a, *b])  # stacks and casts
    return stacked, copies


def _columns(projections: Sequence[Projection]) -> list[slice]:
    """Where each adapter's part lies among the columns of ``xa``; empty without an adapter."""
    columns, start = [], 0
    for p in projections:
        stop = start + (0 if p.lora_a is None else p.lora_a.shape[0])
        columns.append(slice(start, stop))
        start = stop
    return columns


def _span(part: tuple[int, int] | None) -> slice:
    return slice(None) if part is None else slice(*part)


def _taken(parameter: Tensor, p: Projection) -> Tensor:
    return parameter if p.rows is None else parameter[_span(p.rows)]


def _read(parameter: Tensor, p: Projection) -> Tensor:
    return parameter if p.columns is None else parameter[:, _span(p.columns)]


def _whole(grad: Tensor, parameter: Tensor | NF4Weight, *parts: tuple[int, int] | None) -> Tensor:
    """The gradient of a whole parameter, given that of a part, by rows and by columns."""
    if all(part is None for part in parts):
        return grad
    full = torch.zeros(parameter.shape, dtype=grad.dtype, device=grad.device)
    full[tuple(map(_span, parts))] = grad
    return full


def _dense_shape(p: Projection) -> tuple[int, int]:
    """Of what is decoded at once: all columns of the rows."""
    n_rows, columns = p.weight.shape
    return (n_rows if p.rows is None else p.rows[1] - p.rows[0]), columns


def _scratch(like: Tensor, projections: Sequence[Projection]) -> Tensor | None:
    """One buffer for the NF4 weights of a group, which are needed one after another."""
    shapes = [_dense_shape(p) for p in projections if type(p.weight) is NF4Weight]
    if len(shapes) < 2:
        return None
    return torch.empty(max(n * k for n, k in shapes), dtype=like.dtype, device=like.device)


def _dense(p: Projection, like: Tensor, cast: bool, scratch: Tensor | None) -> Tensor:
    """The part of the weight that the projection takes, dense, in the dtype of ``like``."""
    if type(p.weight) is not NF4Weight:
        weight = _read(_taken(p.weight, p), p)
        return weight.to(like.dtype) if cast else weight
    if scratch is not None:
        n, k = _dense_shape(p)
        scratch = scratch[: n * k].view(n, k)
    return _read(nf4_dequantize(p.weight, rows=p.rows, dtype=like.dtype, out=scratch), p)


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a b`` in ``dtype``: for float32 out of narrower operands straight from the accumulator."""
    if a.dtype is dtype:
        return torch.mm(a, b)
    if dtype is torch.float32 and a.dtype in (torch.bfloat16, torch.float16):
        if a.is_cuda:
            return torch.mm(a, b, out_dtype=dtype)
        return torch.mm(a.float(), b.float())
    return torch.mm(a, b).to(dtype)


# --- both directions, outside autograd ---


def project_forward(
    x: Tensor, projections: Sequence[Projection], *, cast: bool = False
) -> tuple[list[Tensor], Tensor | None]:
    """``(outs, xa)``: the ``y_i`` ``[M, N_i]`` of ``x`` ``[M, K]``, and ``xa`` for the way back.

    ``xa`` holds ``scaling_i x A_i^T`` side by side, ``[M, sum r]``; None without adapters. Outside
    autograd: for callers with gradients disabled. ``cast`` is what autocast does: weights and
    adapters are cast to x's dtype. Without it dense weights are in x's dtype, and adapters in
    another dtype work in theirs.
    """
    dtype = _adapter_dtype(x, projections, cast)
    xa: Tensor | None = None
    up: Iterator[Tensor] = iter(())
    if dtype is not None:
        adapted = [p for p in projections if p.lora_a is not None]
        stacked, matrices = _adapters(adapted, dtype)
        xa, up = _down(x.to(dtype), stacked, adapted), iter(matrices)
    scratch = _scratch(x, projections)
    outs = []
    for p, columns in zip(projections, _columns(projections), strict=True):
        bias = None if p.bias is None else _taken(p.bias, p).to(x.dtype)
        if xa is None or p.lora_a is None:
            y = F.linear(x, _dense(p, x, cast, scratch), bias)
        elif dtype is x.dtype:
            part, b = xa[:, columns], next(up).t()
            y = torch.mm(part, b) if bias is None else torch.addmm(bias, part, b)
            y.addmm_(x, _dense(p, x, cast, scratch).t())
        else:
            y = F.linear(x, _dense(p, x, cast, scratch), bias)
            y.add_(torch.mm(xa[:, columns], next(up).t()))
        outs.append(y)
    return outs, xa


def _down(x: Tensor, stacked: Tensor, adapted: Sequence[Projection]) -> Tensor:
    """``scaling_i x A_i^T`` side by side: one launch unless the scalings differ."""
    xa = torch.empty((x.shape[0], stacked.shape[0]), dtype=x.dtype, device=x.device)
    scaling = adapted[0].scaling
    if all(p.scaling == scaling for p in adapted):
        return xa.addmm_(x, stacked.t(), beta=0, alpha=scaling)
    for p, columns in zip(adapted, _columns(adapted), strict=True):
        xa[:, columns].addmm_(x, stacked[columns].t(), beta=0, alpha=p.scaling)
    return xa


def project_backward(
    x: Tensor | None,
    xa: Tensor | None,
    dys: Sequence[Tensor | None],
    projections: Sequence[Projection],
    needs: Needs,
    *,
    cast: bool = False,
    out: Tensor | None = None,
    wide: torch.dtype | None = None,
) -> tuple[Tensor | None, list[Gradients]]:
    """``(dx, gradients of each projection)`` from ``dys`` ``[M, N_i]``, where None counts as zero.

    ``x`` is read for the gradients of weights and of ``lora_a``, ``xa`` for those of ``lora_b``
    (where it is None it is computed again, from ``x``). ``dx`` is in the dtype of the dys, in
    ``out`` where that is given, and None where no dy is. Gradients of parameters are in their
    dtypes (in ``wide`` where that is given, for a caller who sums over tiles) and whole. Outside
    autograd, and ``cast`` as in ``project_forward``.
    """
    grads: list[list[Tensor | None]] = [[None] * 4 for _ in projections]
    live = [(i, dy) for i, dy in enumerate(dys) if dy is not None]
    if not live:
        return None, [Gradients() for _ in projections]
    like = live[0][1]
    dx = _adapters_backward(x, xa, dys, projections, needs, cast, grads, out, wide)
    late = None
    if dx is not None and dx.dtype is not like.dtype:
        late, dx = dx, None
    scratch = _scratch(like, [projections[i] for i, _ in live]) if needs.x else None
    for i, dy in live:
        p, need = projections[i], needs.each[i]
        if needs.x:
            weight = _dense(p, dy, cast, scratch)
            dx = torch.mm(dy, weight, out=out) if dx is None else dx.addmm_(dy, weight)
        if need.weight:
            assert x is not None
            dw = _mm(dy.t(), x, wide or p.weight.dtype)
            grads[i][0] = _whole(dw, p.weight, p.rows, p.columns)
        if need.bias:
            assert p.bias is not None
            grads[i][1] = _whole(dy.sum(0, dtype=wide or p.bias.dtype), p.bias, p.rows)
    if late is not None:
        assert dx is not None
        dx.add_(late)  # in the wider dtype, rounded once
    return dx, [Gradients(*g) for g in grads]


def _adapters_backward(
    x: Tensor | None,
    xa: Tensor | None,
    dys: Sequence[Tensor | None],
    projections: Sequence[Projection],
    needs: Needs,
    cast: bool,
    grads: list[list[Tensor | None]],
    out: Tensor | None,
    wide: torch.dtype | None,
) -> Tensor | None:
    """Fills in the gradients of adapters; returns their part of dx, in the dtype they work in."""
    live = [
        (i, dy)
        for i, (p, dy, need) in enumerate(zip(projections, dys, needs.each, strict=True))
        if p.lora_a is not None and dy is not None and (needs.x or need.lora_a or need.lora_b)
    ]
    if not live:
        return None
    like, adapted = live[0][1], [projections[i] for i, _ in live]
    dtype = _adapter_dtype(like, projections, cast)
    assert dtype is not None
    stacked, matrices = _adapters(adapted, dtype)
    if xa is None and any(needs.each[i].lora_b for i, _ in live):
        assert x is not None
        everyone = [p for p in projections if p.lora_a is not None]
        xa = _down(x.to(dtype), _adapters(everyone, dtype)[0], everyone)

    down = needs.x or any(needs.each[i].lora_a for i, _ in live)
    # scaling_i dy_i B_i, side by side as in xa
    dxa = torch.empty((like.shape[0], stacked.shape[0]), dtype=dtype, device=like.device)
    of_xa, of_dxa = _columns(projections), _columns(adapted)
    for (i, dy), p, b, columns in zip(live, adapted, matrices, of_dxa, strict=True):
        dy = dy.to(dtype)
        if needs.each[i].lora_b:
            assert xa is not None and p.lora_b is not None
            db = _mm(dy.t(), xa[:, of_xa[i]], wide or p.lora_b.dtype)
            grads[i][3] = _whole(db, p.lora_b, p.rows)
        if down:
            dxa[:, columns].addmm_(dy, b, beta=0, alpha=p.scaling)

    wanted = [needs.each[i].lora_a for i, _ in live]
    if any(wanted):
        assert x is not None
        dtypes = {p.lora_a.dtype for p in adapted if p.lora_a is not None}
        if all(wanted) and len(dtypes) == 1:
            da = _mm(dxa.t(), x.to(dtype), wide or dtypes.pop())
            for (i, _), p, columns in zip(live, adapted, of_dxa, strict=True):
                assert p.lora_a is not None
                grads[i][2] = _whole(da[columns], p.lora_a, None, p.columns)
        else:
            for (i, _), p, columns in zip(live, adapted, of_dxa, strict=True):
                if needs.each[i].lora_a:
                    assert p.lora_a is not None
                    one = _mm(dxa[:, columns].t(), x.to(dtype), wide or p.lora_a.dtype)
                    grads[i][2] = _whole(one, p.lora_a, None, p.columns)
    if not needs.x:
        return None
    return torch.mm(dxa, stacked, out=out if dtype is like.dtype else None)


# --- autograd ---


@contextmanager
def outside_autocast(kind: str) -> Iterator[None]:
    """Products in the dtypes they have, also where backward is called under autocast."""
    enabled = torch.is_autocast_enabled(kind)
    torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(kind, enabled)


class ProjectFunction(torch.autograd.Function):
    """Saves ``x``, in the dtype it was used in, and the small ``xa``, where a gradient reads them.

    Parameters are kept on ``ctx`` as they are. They outlive the step anyway, and hooks on saved
    tensors (offloading, checkpointing) then see activations only; that nobody has written to them
    since is checked here, as autograd would.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        projections: tuple[Projection, ...],
        dtype: torch.dtype | None,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        used = x if dtype is None else x.to(dtype)
        outs, xa = project_forward(
            used.reshape(-1, x.shape[-1]), projections, cast=dtype is not None
        )
        flags = ctx.needs_input_grad
        each = [Gradients(*flags[i : i + 4]) for i in range(3, len(flags), 4)]
        reads_x = any(need.weight or need.lora_a for need in each)
        reads_xa = any(need.lora_b for need in each)
        ctx.save_for_backward(used if reads_x else None, xa if reads_xa else None)
        ctx.needs, ctx.projections, ctx.cast = Needs(flags[0], each), projections, dtype is not None
        ctx.parameters = parameters
        ctx.versions = [None if t is None else t._version for t in parameters]
        ctx.shape, ctx.dtype, ctx.device = x.shape, x.dtype, x.device.type
        ctx.set_materialize_grads(False)
        outs = [y.view(*x.shape[:-1], y.shape[-1]) for y in outs]
        if not flags[0]:  # what is frozen, on a frozen input, is no part of the graph
            frozen = [y for y, need in zip(outs, each, strict=True) if not any(need)]
            ctx.mark_non_differentiable(*frozen)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.versions != [None if t is None else t._version for t in ctx.parameters]:
            raise RuntimeError(
                "project: a parameter was modified in place between forward and backward. Call "
                "backward before the optimizer's step."
            )
        x, xa = ctx.saved_tensors
        with outside_autocast(ctx.device):
            dx, grads = project_backward(
                None if x is None else x.reshape(-1, x.shape[-1]),
                xa,
                [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys],
                ctx.projections,
                ctx.needs,
                cast=ctx.cast,
            )
        if dx is not None:
            dx = dx.view(ctx.shape).to(ctx.dtype)
        return dx, None, None, *(gradient for each in grads for gradient in each)


def project(x: Tensor, *projections: Projection) -> tuple[Tensor, ...]:
    """The projections of ``x``, adapters included, as one step of autograd.

    Replaces:
        ``base(x) + lora_B(lora_A(x)) * scaling`` for each of several layers, where ``base`` is
        ``nn.Linear`` or bitsandbytes' ``Linear4bit``

    Shapes:
        ``x`` ``[..., K]``, or as wide as the ``columns`` given; returns ``[..., N_i]`` for each
        projection, only its ``rows`` where given. Saved: x once, and ``[M, sum r]``. Gradients of
        parameters are whole.

    Numerics:
        Products accumulate in float32.

        Adapters in x's dtype: the adapter product is rounded, the base product is added to it, y is
        rounded. dx likewise, with one rounding more for each further projection.

        Adapters in another dtype (PEFT keeps float32 on a bfloat16 base), no autocast: as stock
        does, x is cast to theirs and both their products are in it; so are their gradients. Their
        sum is added to the rounded base product in one further pass, which rounds to x's dtype.

        Autocast: x, dense weights, biases and adapters are cast to its dtype (the adapters of a
        group in one launch), again in backward, and everything is computed in it. y is in
        autocast's dtype, for an NF4 base too, dx in x's, gradients of parameters in theirs; where
        these are float32, CUDA takes them from the accumulator unrounded. Backward computes what
        forward's autocast asked for, whatever autocast surrounds it.

        NF4 weights are decoded straight to the dtype of the product, in both directions;
        bitsandbytes rounds to the dtype they were quantised from first in backward. A
        ``Linear4bit`` computes in its ``compute_dtype``: cast x to it first where it differs.

        Deterministic where cuBLAS is.

    Raises:
        ``ValueError`` for shapes that do not fit, rows out of range, or half an adapter.
        ``TypeError`` for a dense weight that is not in x's dtype (without autocast) and for
        adapters in several dtypes. In backward ``RuntimeError`` where a parameter has been written
        to since, and for gradients of gradients, which are not provided.

    Source:
        Written from the formula: LoRA, arXiv:2106.09685; on NF4, arXiv:2305.14314.
    """
    check_projections(projections)
    dtype = autocast_dtype(x)
    try:
        if torch.is_grad_enabled():
            parameters = [
                t
                for p in projections
                for t in (None if type(p.weight) is NF4Weight else p.weight, *p[1:4])
            ]
            return ProjectFunction.apply(x, projections, dtype, *parameters)
        rows = x.reshape(-1, x.shape[-1])
        if dtype is not None:
            rows = rows.to(dtype)
        outs, _ = project_forward(rows, projections, cast=dtype is not None)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outs)
    except RuntimeError as error:
        if (complaint := _complaint(x, projections, dtype)) is None:
            raise
        raise complaint from error


def check_projections(projections: Sequence[Projection]) -> None:
    """What PyTorch would accept, or refuse in backward only."""
    for i, p in enumerate(projections):
        if len(p.weight.shape) != 2:
            raise ValueError(
                f"project: the weight of projection {i} must be a matrix, got shape "
                f"{tuple(p.weight.shape)}. Pass the weight of a linear layer."
            )
        if (p.lora_a is None) is not (p.lora_b is None):
            raise ValueError(
                f"project: projection {i} has one of lora_a and lora_b. Pass both, or neither."
            )
        if p.bias is not None and p.bias.dim() != 1:
            raise ValueError(
                f"project: the bias of projection {i} must have shape (N,), got "
                f"{tuple(p.bias.shape)}. Pass this layer's own bias."
            )
        for name, part, size in zip(
            ("rows", "columns"), (p.rows, p.columns), p.weight.shape, strict=True
        ):
            if part is not None and not 0 <= part[0] < part[1] <= size:
                raise ValueError(
                    f"project: {name} of projection {i} must be (start, stop) with 0 <= start < "
                    f"stop <= {size}, got {part}. Pass the range of the weight's {name} that is "
                    "wanted."
                )


def _complaint(
    x: Tensor, projections: Sequence[Projection], dtype: torch.dtype | None
) -> Exception | None:
    """What does not fit together, looked for only once torch has refused it."""
    if not x.shape[-1]:
        return ValueError(
            f"project: x must have columns, got shape {tuple(x.shape)}. Pass the layer's input."
        )
    for i, p in enumerate(projections):
        n, k = p.weight.shape
        width = k if p.columns is None else p.columns[1] - p.columns[0]
        if width != x.shape[-1]:
            return ValueError(
                f"project: the weight of projection {i} takes {width} columns, x has "
                f"{x.shape[-1]}. Projections of one call share their input."
            )
        if dtype is None and type(p.weight) is not NF4Weight and p.weight.dtype is not x.dtype:
            return TypeError(
                f"project: the weight of projection {i} must be in x's dtype, {x.dtype}, got "
                f"{p.weight.dtype}. Cast one of them, or run under autocast."
            )
        if p.bias is not None and p.bias.shape != (n,):
            return ValueError(
                f"project: the bias of projection {i} must have shape ({n},), got "
                f"{tuple(p.bias.shape)}. Pass this layer's own bias."
            )
        if p.lora_a is not None and p.lora_b is not None:
            r = p.lora_a.shape[0]
            if p.lora_a.shape != (r, k) or p.lora_b.shape != (n, r):
                return ValueError(
                    f"project: adapters of projection {i} must be [r, {k}] and [{n}, r], got "
                    f"{tuple(p.lora_a.shape)} and {tuple(p.lora_b.shape)}. Pass the weights of "
                    "this layer's own lora_A and lora_B."
                )
    return None
