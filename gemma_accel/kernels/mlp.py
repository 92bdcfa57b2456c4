"""The gated MLP, its three projections and their adapters, as one step of autograd that decides
what to keep.

    y = down(gelu_tanh(gate(x)) * up(x))

Stock keeps four tensors of [tokens, F] for backward (gate, its gelu, up, the product): 96 MiB a
layer for 2,048 tokens of E2B's narrow layers, twice that of the wide ones, half of everything a
layer keeps. Here ``keep`` keeps gate and up, and the product is made again from them, which costs
one elementwise pass; without it nothing of that width is kept and backward runs the two products
again. Either way both directions can go through the tokens in tiles, so that what is alive at a
time does not grow with the sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_accel.kernels._triton import use_kernel
from gemma_accel.kernels.geglu import geglu_bwd, geglu_fwd, geglu_ref
from gemma_accel.kernels.lora import (
    Gradients,
    Needs,
    Projection,
    _complaint,
    autocast_dtype,
    check_projections,
    outside_autocast,
    project,
    project_backward,
    project_forward,
)
from gemma_accel.kernels.nf4 import NF4Weight

__all__ = ["gated_mlp", "gated_mlp_ref"]


def gated_mlp_ref(x: Tensor, gate: Projection, up: Projection, down: Projection) -> Tensor:
    """The formula, one step after the other."""
    return project(geglu_ref(*project(x, gate, up)), down)[0]


class _Saved(NamedTuple):
    """Where a tile's intermediates come from in backward; None: computed again."""

    gate: Tensor | None
    up: Tensor | None
    gate_up_a: Tensor | None  # x A^T of gate and up, small
    down_a: Tensor | None


def _tiles(rows: int, tile: int | None) -> list[slice]:
    if tile is None or tile >= rows:
        return [slice(0, rows)]
    return [slice(start, min(start + tile, rows)) for start in range(0, rows, tile)]


class GatedMlpFunction(torch.autograd.Function):
    """Saves x and the adapters' small products; with ``keep`` gate and up too. Parameters stay on
    ``ctx`` (see `ProjectFunction`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        projections: tuple[Projection, Projection, Projection],
        dtype: torch.dtype | None,
        keep: bool,
        tile: int | None,
        *parameters: Tensor | None,
    ) -> Tensor:
        gate, up, down = projections
        used = (x if dtype is None else x.to(dtype)).reshape(-1, x.shape[-1])
        tiles, cast = _tiles(used.shape[0], tile), dtype is not None
        out: Tensor | None = None
        saved = []
        for rows in tiles:
            (g, u), gate_up_a = project_forward(used[rows], (gate, up), cast=cast)
            (y,), down_a = project_forward(geglu_fwd(g, u), (down,), cast=cast)
            saved.append(
                _Saved(g, u, gate_up_a, down_a) if keep else _Saved(None, None, gate_up_a, down_a)
            )
            if len(tiles) == 1:
                out = y
            else:
                out = y.new_empty((used.shape[0], y.shape[1])) if out is None else out
                out[rows] = y
        assert out is not None
        flags = ctx.needs_input_grad
        each = [Gradients(*flags[i : i + 4]) for i in range(5, len(flags), 4)]
        ctx.needs, ctx.projections, ctx.cast, ctx.tiles = (flags[0], each), projections, cast, tiles
        ctx.save_for_backward(used, *(t for s in saved for t in s))
        ctx.parameters = parameters
        ctx.versions = [None if t is None else t._version for t in parameters]
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return out.view(*x.shape[:-1], out.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        if ctx.versions != [None if t is None else t._version for t in ctx.parameters]:
            raise RuntimeError(
                "gated_mlp: a parameter was modified in place between forward and backward. Call "
                "backward before the "
                "optimizer's step."
            )
        x, *flat = ctx.saved_tensors
        saved = [_Saved(*flat[i : i + 4]) for i in range(0, len(flat), 4)]
        dy = dy.reshape(-1, dy.shape[-1])
        needs_x, each = ctx.needs
        dx = None
        total: list[Gradients] | None = None
        with outside_autocast(dy.device.type):
            for rows, kept in zip(ctx.tiles, saved, strict=True):
                out = None
                if needs_x and len(ctx.tiles) > 1:
                    dx = torch.empty_like(x, dtype=dy.dtype) if dx is None else dx
                    out = dx[rows]
                part, grads = _tile_backward(
                    ctx, x[rows], dy[rows], kept, Needs(needs_x, each), out
                )
                dx = part if len(ctx.tiles) == 1 else dx
                total = _add(total, grads)
        parameters = [
            None if g is None else g.to(t.dtype)
            for g, t in zip((g for one in total or () for g in one), ctx.parameters, strict=True)
        ]
        if dx is not None:
            dx = dx.view(ctx.shape).to(ctx.dtype)
        return dx, None, None, None, None, *parameters


def _tile_backward(
    ctx: Any, x: Tensor, dy: Tensor, kept: _Saved, needs: Needs, out: Tensor | None
) -> tuple[Tensor | None, list[Gradients]]:
    gate, up, down = ctx.projections
    how = {"cast": ctx.cast, "wide": torch.float32 if len(ctx.tiles) > 1 else None}
    g, u = kept.gate, kept.up
    if g is None or u is None:
        (g, u), _ = project_forward(x, (gate, up), cast=ctx.cast)
    product = geglu_fwd(g, u)
    dproduct, of_down = project_backward(
        product, kept.down_a, [dy], (down,), Needs(True, needs.each[2:]), **how
    )
    assert dproduct is not None
    # the gradients of gate and up take the place of the product and of its gradient
    dgate, dup = geglu_bwd(dproduct, g, u, dgate=dproduct, dup=product)
    del g, u
    dx, of_gate_up = project_backward(
        x, kept.gate_up_a, [dgate, dup], (gate, up), Needs(needs.x, needs.each[:2]), out=out, **how
    )
    return dx, [*of_gate_up, *of_down]


def _add(total: list[Gradients] | None, grads: list[Gradients]) -> list[Gradients]:
    if total is None:
        return grads
    for old, new in zip(total, grads, strict=True):
        for a, b in zip(old, new, strict=True):
            if a is not None:
                a.add_(b)
    return total


def gated_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    keep: bool = True,
    tile: int | None = None,
) -> Tensor:
    """``down(gelu_tanh(gate(x)) * up(x))`` with the adapters of all three, keeping as little as
    told.

    Replaces:
        ``Gemma4TextMLP.forward``: ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``.

    Shapes:
        x [..., D] -> [..., D']. Saved: x, the adapters' [tokens, sum r]; with ``keep`` gate and up
        [tokens, F]. ``tile`` bounds the tokens in flight; None takes all at once.

    Numerics:
        `project`'s and `geglu`'s, step by step. With tiles, gradients of parameters are summed in
        float32 and rounded at the end.

    Raises:
        What `project` raises. In backward RuntimeError where a parameter has been written to since.

    Source:
        Written from the formula. Recomputing the cheap part: Chen et al., arXiv:1604.06174.
    """
    if not use_kernel(x):
        return gated_mlp_ref(x, gate, up, down)
    projections = (gate, up, down)
    check_projections(projections)
    parameters = [
        t for p in projections for t in (None if type(p.weight) is NF4Weight else p.weight, *p[1:4])
    ]
    dtype = autocast_dtype(x)
    try:
        return GatedMlpFunction.apply(x, projections, dtype, keep, tile, *parameters)
    except RuntimeError as error:
        between = torch.empty(1, gate.weight.shape[0], dtype=x.dtype, device="meta")
        complaint = _complaint(x, (gate, up), dtype) or _complaint(between, (down,), dtype)
        if complaint is None:
            raise
        raise complaint from error
