"""Attention, forward and backward, against SDPA as transformers calls it, mask and all, at the
shapes of `bench_attention`, which has the tables of tiles and the shares of the card's peak.

    pytest benchmarks/test_attention.py -k sliding

Packed rows count their `segments` in ours, which a model makes once a batch.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.bench_attention import CASES as SHAPES
from benchmarks.bench_attention import stock_forward
from benchmarks.correctness import Case, call
from gemma_accel.kernels.attention import attention, attention_ref
from gemma_accel.kernels.segments import segments_from_position_ids

TIMED = (
    "global 2x2048",
    "sliding 2x2048",
    "global 1x8192",
    "sliding 1x8192",
    "E4B global 1x8192",
    "global packed 16x512",
    "sliding packed 16x512",
)


def attention_calls(shape):
    def make(device, dtype):
        q, k, v = (x.detach() for x in shape.inputs())
        positions = shape.position_ids() if shape.documents > 1 else None

        def segments():
            return None if positions is None else segments_from_position_ids(positions)

        def ours(q, k, v):
            return attention(q, k, v, window=shape.window, segments=segments())

        inputs, grads, wanted = {"q": q, "k": k, "v": v}, [shape.dout()], ("q", "k", "v")
        return {
            "stock": call(stock_forward(shape), inputs, grads, wanted),
            "ours": call(ours, inputs, grads, wanted),
            "truth": lambda: truth(q, k, v, grads[0], window=shape.window, segments=segments()),
        }

    return make


def truth(q, k, v, dout, **options):
    """The reference in float32, a query head at a time: its scores are T x T."""
    group = q.shape[1] // k.shape[1]
    out, dq = (torch.empty(x.shape, device=x.device) for x in (dout, q))
    dk, dv = (torch.zeros(x.shape, device=x.device) for x in (k, v))
    for head in range(q.shape[1]):
        mine, shared = slice(head, head + 1), slice(head // group, head // group + 1)
        parts = [x.float().requires_grad_() for x in (q[:, mine], k[:, shared], v[:, shared])]
        o = attention_ref(*parts, **options)
        grads = torch.autograd.grad(o, parts, dout[:, :, mine].float())
        out[:, :, mine], dq[:, mine] = o.detach(), grads[0]
        dk[:, shared] += grads[1]
        dv[:, shared] += grads[2]
    return {"y0": out, "dq": dq, "dk": dk, "dv": dv}


CASES = [
    Case(
        "attention",
        shape.name,
        attention_calls(shape),
        flops=3.5 * shape.flops,
        reduced=64 * max(shape.T, shape.H),
    )
    for shape in SHAPES
    if shape.name in TIMED
]


def small_calls(device, dtype, T=128, window=32):
    def normed(heads):
        x = torch.randn(2, T, heads, 32, device=device)
        return (x * x.square().mean(-1, keepdim=True).rsqrt()).to(dtype).transpose(1, 2)

    q, k, v, dout = normed(4), normed(1), normed(1), torch.randn(2, T, 4, 32)
    t = torch.arange(T)
    mask = (t[None] <= t[:, None]) & (t[None] > t[:, None] - window)

    def stock(q, k, v):
        k, v = (x.expand(-1, 4, -1, -1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, scale=1.0).transpose(1, 2)

    def ours(q, k, v):
        return attention(q, k, v, window=window)

    inputs, wanted = {"q": q, "k": k, "v": v}, ("q", "k", "v")
    return {
        "stock": call(stock, inputs, [dout], wanted),
        "ours": call(ours, inputs, [dout], wanted),
        "truth": call(stock, inputs, [dout], wanted, torch.float64),
    }


SMALL = [
    Case(
        "attention",
        "small, sliding 2x128",
        small_calls,
        dtype=torch.float32,
        device="cpu",
        reduced=64 * 128,
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "stack"), [(c, s) for c in CASES for s in c.stacks], ids=str)
def test_kernel(case, stack, timed):
    timed(case, stack)


@pytest.mark.parametrize(("case", "stack"), [(c, s) for c in SMALL for s in c.stacks], ids=str)
def test_small(case, stack, timed):
    timed(case, stack)


def test_every_shape_is_one_that_bench_attention_has():
    assert [case.shape for case in CASES] == [s.name for s in SHAPES if s.name in TIMED]
    assert len(CASES) == len(TIMED)


def test_the_truth_is_the_reference():
    """A head at a time as all together."""
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    dout = torch.randn(2, 9, 4, 8)
    parts = [x.requires_grad_() for x in (q, k, v)]
    out = attention_ref(*parts, window=4)
    grads = torch.autograd.grad(out, parts, dout)
    got = truth(*(x.detach() for x in parts), dout, window=4)
    for a, b in zip(got.values(), (out, *grads), strict=True):
        torch.testing.assert_close(a, b)
