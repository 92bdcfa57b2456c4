"""attention against a float64 truth; SDPA, called as transformers calls it, sets the budget.

Where there is no card the kernels run in Triton's interpreter, which is slow: the shapes there are
small, and cross tile borders because the interpreter's tiles are small too.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gemma_accel.kernels import attention as module
from gemma_accel.kernels.attention import Tile, Tiles, attention, attention_ref
from gemma_accel.kernels.segments import (
    Segments,
    is_end_padding,
    segments_from_attention_mask,
    segments_from_position_ids,
)
from tests.accuracy import assert_no_less_accurate
from tests.conftest import DEVICE
from tests.kernels import crosscompile

DTYPES = [torch.float32, torch.float16]
if DEVICE == "cuda":
    DTYPES.append(torch.bfloat16)  # tl.dot on bfloat16 is broken in the interpreter


def make(B, N, K, T, H, dtype, scale_v=1.0):
    """q and k as they leave Gemma 4's norms, views of [B, T, heads, H] as the model has them.

    Unit root mean square per head times a weight near one: at scale 1 the softmax is sharp.
    """

    def normed(heads):
        x = torch.randn(B, T, heads, H, device=DEVICE)
        weight = 1 + 0.1 * torch.randn(H, device=DEVICE)
        x = x * x.square().mean(-1, keepdim=True).rsqrt() * weight
        return x.to(dtype).transpose(1, 2)

    q, k = normed(N), normed(K)
    v = (torch.randn(B, T, K, H, device=DEVICE) * scale_v).to(dtype).transpose(1, 2)
    return q, k, v


def dense(T, window, segments):
    """The mask in full, [B or 1, 1, T, T], and which queries see anything."""
    t = torch.arange(T, device=DEVICE)
    sees = (t[None, :] <= t[:, None])[None]
    if window is not None:
        sees = sees & (t[None, :] > t[:, None] - window)
    if segments is not None:
        sees = sees & (t[None, None, :] >= segments.first[:, :, None])
        sees = sees & (t[None, :, None] <= segments.last[:, None, :])
    return sees[:, None], sees.any(-1)


def stock(q, k, v, window, segments, scale):
    """transformers' sdpa_attention_forward: grouped if unmasked up to head_dim 256, else repeated.

    On the CPU SDPA keeps float32 inside whatever the inputs, so half precision is held to
    eager_attention_forward there.
    """
    T, group = q.shape[2], q.shape[1] // k.shape[1]
    if DEVICE == "cpu" and q.dtype != torch.float32:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        mask, sees = dense(T, window, segments)
        scores = (q @ k.transpose(2, 3)) * scale
        scores = scores + torch.where(mask, 0, torch.finfo(q.dtype).min).to(q.dtype)
        p = scores.softmax(-1, dtype=torch.float32).to(q.dtype) * sees[:, None, :, None]
        return (p @ v).transpose(1, 2).contiguous()
    plain = segments is None and (window is None or window >= T)
    if plain and q.shape[3] <= 256:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).contiguous()
    k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (k, v))
    mask, sees = dense(T, window, segments)
    mask = mask | ~sees[:, None, :, None]  # a row without keys would be NaN, and is not compared
    mask = None if plain else mask
    causal = plain and T > 1
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return out.transpose(1, 2).contiguous()


def gradients(fn, inputs, dout, dtype=None):
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = fn(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))


def compare(B, N, K, T, H, dtype, *, window=None, segments=None, scale=1.0):
    q, k, v = make(B, N, K, T, H, dtype)
    dout = torch.randn(B, T, N, H, device=DEVICE).to(dtype)
    sees = dense(T, window, segments)[1].expand(B, T)
    dout = dout * sees[:, :, None, None]
    options = {"scale": scale, "window": window, "segments": segments}
    ours = gradients(lambda *x: attention(*x, **options), (q, k, v), dout)
    eager = gradients(lambda *x: stock(*x, window, segments, scale), (q, k, v), dout)
    exact = gradients(lambda *x: attention_ref(*x, **options), (q, k, v), dout, torch.float64)
    assert ours[0].shape == (B, T, N, H) and ours[0].is_contiguous()
    assert (ours[0][~sees] == 0).all(), "a row that sees nothing must be zero"
    eager = (torch.where(sees[:, :, None, None], eager[0], 0), *eager[1:])
    # float32 only: scores reach about 4 sqrt(H), and the backward's exponent is a difference of two
    # numbers 1.44 times that size, each rounded: an error of up to 8 sqrt(H) units in a
    # probability, however exact the sums are
    for what, a, b, c in zip(("out", "dq", "dk", "dv"), ours, eager, exact, strict=True):
        if 1 in (T, window) and what in ("dq", "dk"):
            # one key: the softmax is 1, its gradient a difference of equal sums
            assert a.abs().max() <= 1e-2 * dout.abs().max() * v.abs().max() * math.sqrt(H)
        else:
            assert_no_less_accurate(a, b, c, what=what, reduced=64 * max(H, T))


CASES = [  # B, N, K, T, H, window
    pytest.param(1, 2, 1, 1, 16, None, id="one token"),
    pytest.param(2, 2, 2, 17, 16, None, id="no groups"),
    pytest.param(1, 3, 1, 41, 32, None, id="three heads a group"),
    pytest.param(1, 8, 1, 37, 64, 9, id="sliding, window shorter than a tile"),
    pytest.param(1, 4, 2, 70, 32, 33, id="sliding, two groups"),
    pytest.param(1, 2, 1, 40, 32, 40, id="window as long as the row"),
    pytest.param(1, 2, 1, 20, 16, 1, id="window of one"),
    pytest.param(1, 2, 1, 33, 256, None, id="sliding layer's head"),
    pytest.param(1, 2, 1, 20, 512, None, id="global layer's head"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, N, K, T, H, window", CASES)
def test_forward_and_gradients(B, N, K, T, H, window, dtype, poisoned):
    if DEVICE == "cuda" and H == 512 and dtype == torch.float32:
        pytest.skip("float32 at head size 512 fits no card's shared memory")
    compare(B, N, K, T, H, dtype, window=window)


# What the launchers choose on one card or another
TILES = {
    "two loops": Tile(32, 16, 4, 1),
    "one loop": Tile(16, 32, 4, 1, edges=False),
    "unchain": Tile(32, 16, 4, 1, unchain=True),
    "parts": Tile(32, 16, 4, 1, parts=2),
    "flip": Tile(32, 16, 4, 1, flip=True),
    "flip, unchain, one loop": Tile(32, 16, 4, 1, edges=False, unchain=True, flip=True),
}


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_every_shape_of_tile(tile, monkeypatch, poisoned):
    monkeypatch.setattr(module, "_tiles_on", lambda *_: Tiles(tile, tile, tile))
    position_ids = torch.cat([torch.arange(n, device=DEVICE) for n in (3, 30, 1, 1, 20)])[None]
    compare(
        1, 4, 1, 55, 32, torch.float32, window=19, segments=segments_from_position_ids(position_ids)
    )


PADS = {  # left and right, a row each
    "left": [(5, 0), (0, 0)],
    "right": [(0, 9), (0, 1)],
    "both": [(3, 7), (0, 0)],
    "nothing but padding": [(45, 0), (2, 0)],
}


@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("pads", PADS.values(), ids=PADS)
def test_padding(pads, window, poisoned):
    T = 45
    mask = torch.ones(len(pads), T, dtype=torch.long, device=DEVICE)
    for row, (left, right) in zip(mask, pads, strict=True):
        row[:left] = 0
        row[T - right :] = 0
    assert is_end_padding(mask)
    segments = segments_from_attention_mask(mask)
    compare(2, 4, 2, T, 32, torch.float32, window=window, segments=segments)
    q, k, v = make(2, 4, 2, T, 32, torch.float32)
    dout = torch.ones(2, T, 4, 32, device=DEVICE)
    grads = gradients(lambda *x: attention(*x, window=window, segments=segments), (q, k, v), dout)
    for what, x in zip(("out", "dq", "dk", "dv"), grads, strict=True):
        x = x if what == "out" else x.transpose(1, 2)
        assert (x[mask == 0] == 0).all(), f"{what} must be zero on padding, whatever arrives there"


@pytest.mark.parametrize("window", [None, 8])
def test_packed_documents_equal_documents_alone(window, poisoned):
    lengths = (13, 1, 40, 2, 17)
    q, k, v = make(1, 4, 1, sum(lengths), 32, torch.float32)
    dout = torch.randn(1, sum(lengths), 4, 32, device=DEVICE)
    position_ids = torch.cat([torch.arange(n, device=DEVICE) for n in lengths])[None]
    segments = segments_from_position_ids(position_ids)
    packed = gradients(lambda *x: attention(*x, window=window, segments=segments), (q, k, v), dout)
    start = 0
    for n in lengths:
        of = slice(start, start + n)
        document = [x[:, :, of] for x in (q, k, v)]
        alone = gradients(lambda *x: attention(*x, window=window), document, dout[:, of])
        torch.testing.assert_close(packed[0][:, of], alone[0], rtol=1e-5, atol=1e-5)
        for a, b in zip(packed[1:], alone[1:], strict=True):
            torch.testing.assert_close(a[:, :, of], b, rtol=1e-4, atol=1e-4)
        start += n


def test_a_document_never_sees_another(poisoned):
    """Not by a rounding error's breadth: changing one leaves the others bitwise as they were."""
    position_ids = torch.cat([torch.arange(n, device=DEVICE) for n in (10, 30, 12)])[None]
    segments = segments_from_position_ids(position_ids)
    q, k, v = make(1, 2, 1, 52, 16, torch.float32)
    dout = torch.randn(1, 52, 2, 16, device=DEVICE)
    before = gradients(lambda *x: attention(*x, segments=segments), (q, k, v), dout)
    q2, k2, v2 = (x.clone() for x in (q, k, v))
    for x in (q2, k2, v2):
        x[:, :, 10:40] *= -3.0
    after = gradients(lambda *x: attention(*x, segments=segments), (q2, k2, v2), dout)
    for what, a, b in zip(("out", "dq", "dk", "dv"), before, after, strict=True):
        a, b = (x if what == "out" else x.transpose(1, 2) for x in (a, b))
        for of in (slice(0, 10), slice(40, 52)):
            assert torch.equal(a[:, of], b[:, of]), what
        assert not torch.equal(a[:, 10:40], b[:, 10:40])


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "strided last dimension", "broadcast"])
def test_any_layout(layout, poisoned):
    B, N, K, T, H = 1, 2, 1, 40, 32
    q, k, v = make(B, N, K, T, H, torch.float32)
    dout = torch.randn(B, T, N, H, device=DEVICE)
    if layout == "contiguous":
        views = [x.contiguous() for x in (q, k, v)]
    elif layout == "sliced":
        views = [F.pad(x, (8, 8, 3, 5))[:, :, 3 : 3 + T, 8 : 8 + H] for x in (q, k, v)]
        dout = F.pad(dout, (8, 8))[..., 8 : 8 + H]
    elif layout == "strided last dimension":
        views = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
        dout = dout.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        q = q[:, :1].expand(B, N, T, H)
        dout = dout[:, :, :1].expand(B, T, N, H)
        views = [q, k, v]
    expected = gradients(attention, [x.contiguous() for x in (q, k, v)], dout.contiguous())
    for a, b in zip(gradients(attention, views, dout), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("which", ["q", "k", "v", "qk", "kv", "qv"])
def test_each_gradient_alone(which, poisoned):
    q, k, v = make(1, 4, 2, 40, 32, torch.float32)
    dout = torch.randn(1, 40, 4, 32, device=DEVICE)
    _, *grads = gradients(lambda *x: attention(*x, window=12), (q, k, v), dout)
    everything = dict(zip("qkv", grads, strict=True))
    inputs = {
        n: x.detach().requires_grad_(n in which) for n, x in zip("qkv", (q, k, v), strict=True)
    }
    out = attention(*inputs.values(), window=12)
    grads = torch.autograd.grad(out, [inputs[n] for n in which], dout)
    for n, g in zip(which, grads, strict=True):
        torch.testing.assert_close(g, everything[n], rtol=1e-6, atol=1e-6)


def test_twice_is_bitwise_the_same(poisoned):
    q, k, v = make(2, 4, 1, 45, 32, torch.float32)
    dout = torch.randn(2, 45, 4, 32, device=DEVICE)
    once, again = (gradients(attention, (q, k, v), dout) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_gradients_keep_the_layout_of_their_inputs(poisoned):
    q, k, v = (x.requires_grad_() for x in make(1, 4, 2, 20, 16, torch.float32))
    out = attention(q, k, v)
    for x, g in zip(
        (q, k, v), torch.autograd.grad(out, (q, k, v), torch.ones_like(out)), strict=True
    ):
        assert g.stride() == x.stride()


def test_saves_inputs_output_and_one_number_a_row():
    saved = []
    q, k, v = (x.requires_grad_() for x in make(1, 4, 2, 24, 16, torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = attention(q, k, v)
    others = [x for x in saved if x.data_ptr() not in {t.data_ptr() for t in (q, k, v, out)}]
    assert len(saved) == 5 and [tuple(x.shape) for x in others] == [(1, 24, 4)]


def test_reference_gradcheck():
    q, k, v = (x.double().requires_grad_() for x in make(1, 2, 1, 7, 4, torch.float64))
    segments = segments_from_position_ids(torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=DEVICE))
    fn = lambda *x: attention_ref(*x, scale=0.5, window=3, segments=segments)  # noqa: E731
    assert torch.autograd.gradcheck(fn, (q, k, v))


def test_reference_stands_in_on_the_cpu(references):
    q, k, v = (
        x.cpu() for x in make(1, 2, 1, 9, 20, torch.float32)
    )  # 20: no kernel has this head size
    torch.testing.assert_close(attention(q, k, v, window=4), attention_ref(q, k, v, window=4))


def floats():
    return Segments(*[torch.zeros(1, 8, device=DEVICE)] * 2)


@pytest.mark.parametrize(
    "change, error, text",
    [
        (lambda a: a.update(q=a["q"][0]), ValueError, r"q must have shape \[B, N, T, H\]"),
        (lambda a: a.update(k=a["k"][:, :, :5]), ValueError, "k must have shape"),
        (lambda a: a.update(v=a["v"].repeat(1, 2, 1, 1)), ValueError, "v must have shape"),
        (lambda a: a.update(v=a["v"].double()), TypeError, "v must be torch.float32"),
        (lambda a: a.update(q=a["q"][:, :3]), ValueError, "multiple of k's, got 3 and 2"),
        (lambda a: a.update(scale=0.0), ValueError, "scale must be positive"),
        (lambda a: a.update(window=0), ValueError, "window must be at least 1"),
        (lambda a: a.update(segments=floats()), ValueError, "first must be int32"),
        (lambda a: a.update({n: x[..., :12] for n, x in a.items()}), ValueError, "head_dim is 12"),
        (lambda a: a.update({n: x.double() for n, x in a.items()}), ValueError, "is torch.float64"),
    ],
)
def test_clear_errors(change, error, text):
    q, k, v = make(1, 4, 2, 8, 16, torch.float32)
    arguments = {"q": q, "k": k, "v": v}
    change(arguments)
    with pytest.raises(error, match=text):
        attention(**arguments)


# ----------------------------------------------------------------------------------------- segments


def visible(segments, T):
    t = torch.arange(T, device=segments.first.device)
    by_query = (t[None, None, :] >= segments.first[:, :, None]) & (t[None, :] <= t[:, None])
    by_key = (t[None, :, None] <= segments.last[:, None, :]) & (t[None, :] <= t[:, None])
    return by_query, by_key


def test_segments_agree_with_the_definition_from_both_ends():
    rows = [0, 1, 2, 0, 1, 0, 0, 1, 2, 3], list(range(10)), [5, 6, 7, 0, 1, 2, 9, 10, 0, 0]
    position_ids = torch.tensor(rows)
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[0, 8:], mask[1, :2], mask[2] = 0, 0, 0
    # as transformers finds them
    document = (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)
    causal = torch.ones(10, 10, dtype=torch.bool).tril()
    same = (document[:, :, None] == document[:, None, :]) & causal
    valid = (mask[:, :, None] != 0) & (mask[:, None, :] != 0) & causal
    for segments, expected in (
        (segments_from_position_ids(position_ids), same),
        (segments_from_attention_mask(mask), valid),
        (segments_from_position_ids(position_ids, mask), same & valid),
    ):
        assert segments.first.dtype == segments.last.dtype == torch.int32
        for seen in visible(segments, 10):
            assert torch.equal(seen, expected)


@pytest.mark.parametrize(
    "rows, ends",
    [
        ([[1, 1, 1]], True), ([[0, 1, 1]], True), ([[1, 1, 0]], True), ([[0, 1, 0]], True),
        ([[0, 0, 0]], True),
        ([[1, 0, 1]], False), ([[0, 1, 0, 1]], False), ([[1, 1, 1], [1, 0, 1]], False),
    ],
)  # fmt: skip
def test_is_end_padding(rows, ends):
    assert is_end_padding(torch.tensor(rows)) is ends


def test_segments_refuse_what_they_cannot_express():
    with pytest.raises(ValueError, match="4-D mask cannot"):
        segments_from_attention_mask(torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="position_ids must have shape"):
        segments_from_position_ids(torch.arange(4))


@pytest.mark.parametrize("T, block", [(10, 4), (12, 4), (3, 8)])
def test_longest_first_orders_every_block(T, block):
    position_ids = torch.stack([torch.arange(T), torch.arange(T) % 3])
    segments = segments_from_position_ids(position_ids)
    blocks = -(-T // block)
    order = segments.longest_first(block)
    assert order.dtype == torch.int32 and sorted(order.tolist()) == list(range(2 * blocks))
    seen = []
    for item in order.tolist():
        row, start = item // blocks, item % blocks * block
        seen.append(int(segments.last[row, start : start + block].max()) - start)
    assert seen == sorted(seen, reverse=True)
    assert segments.longest_first(block) is order, "worked out once a batch"


# --------------------------------------------------------------------------------------------- card


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1, 17, 511, 512, 513, 2048, 4097])
@pytest.mark.parametrize(
    "N, K, H, window",
    [
        (8, 1, 512, None),
        (8, 1, 256, 512),
        (8, 2, 512, None),
        (8, 2, 256, 512),
        (8, 1, 256, None),
        (4, 4, 128, 300),
    ],
)
def test_real_heads(N, K, H, window, T, dtype, poisoned):
    compare(2 if T < 2048 else 1, N, K, T, H, dtype, window=window)


@pytest.mark.gpu
@pytest.mark.parametrize("H", [128, 256])
@pytest.mark.parametrize("T", [33, 300])
def test_real_heads_float32(H, T, poisoned):
    compare(1, 8, 1, T, H, torch.float32, window=100)


@pytest.mark.gpu
@pytest.mark.parametrize("H, window", [(512, None), (256, 512)])
def test_real_heads_packed_and_padded(H, window, poisoned):
    lengths = (700, 3, 1, 512, 513, 64, 1500)
    position_ids = torch.cat([torch.arange(n, device=DEVICE) for n in lengths])[None]
    segments = segments_from_position_ids(position_ids)
    compare(1, 8, 1, sum(lengths), H, torch.bfloat16, window=window, segments=segments)
    mask = torch.ones(3, 1100, dtype=torch.long, device=DEVICE)
    mask[0, :333], mask[1, 1000:], mask[2] = 0, 0, 0
    segments = segments_from_attention_mask(mask)
    compare(3, 8, 2, 1100, H, torch.bfloat16, window=window, segments=segments)


@pytest.mark.gpu
@pytest.mark.parametrize("H, window", [(512, None), (256, 512)])
def test_real_heads_twice_is_bitwise_the_same(H, window):
    q, k, v = make(1, 8, 1, 3000, H, torch.bfloat16)
    dout = torch.randn(1, 3000, 8, H, device=DEVICE).bfloat16()
    run = lambda: gradients(lambda *x: attention(*x, window=window), (q, k, v), dout)  # noqa: E731
    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.gpu
def test_workspace_is_small():
    """Beyond inputs, output and gradients: a log-sum-exp and a delta a row."""
    q, k, v = (x.requires_grad_() for x in make(1, 8, 1, 8192, 512, torch.bfloat16))
    inputs = sum(x.numel() * x.element_size() for x in (q, k, v))
    dout = torch.randn(1, 8192, 8, 512, device=DEVICE).bfloat16()
    attention(q, k, v).backward(dout)  # compile
    q.grad = k.grad = v.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = attention(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    returned = sum(x.numel() * x.element_size() for x in (out, *grads))
    extra = torch.cuda.max_memory_allocated() - before - returned
    assert extra <= 0.02 * (inputs + out.numel() * out.element_size())


# -------------------------------------------------------------------------------------- other cards

POINTERS = {"lse_ptr": "*fp32", "delta_ptr": "*fp32"} | {
    name: "*i32" for name in ("first_ptr", "last_ptr", "order_ptr")
}


def case(which: str, capability: int, size: int) -> crosscompile.Case:
    """One kernel as its launcher launches it on one card, for 8 heads over one, packed."""
    tile = getattr(module.tiles(capability, size, 2), which)
    kernel = getattr(module, f"_attention_{which}_kernel")
    constants = {
        "K": 1, "GROUP": 8, "GROUP_PAD": 8, "H": size, "HV": size // tile.parts,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "HAS_SEGMENTS": True,
        "WANT_DQ": True, "WANT_DK": True, "WANT_DV": True,
        "EDGES": tile.edges, "FLIP": tile.flip, "UNCHAIN": tile.unchain, "PRECISION": "tf32",
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*bf16")
        elif name not in constants:
            signature[name] = "fp32" if name.startswith("scale") else "i32"
    return crosscompile.Case(
        f"{which} H={size}", kernel, signature, constants, tile.num_warps, tile.num_stages,
        tuple(name for name in signature if name.endswith("_stride")), (capability,),
    )  # fmt: skip


def cross_compile_cases() -> list[crosscompile.Case]:
    kernels = ("fwd", "dq", "dkv")
    cases = [
        case(which, capability, size)
        for capability in crosscompile.SHARED_KIB
        for size in (256, 512)
        for which in kernels
    ]
    return cases + [case(which, 86, 128) for which in kernels]


@pytest.mark.slow
def test_configurations_fit_every_card():
    rows = crosscompile.check(__name__)
    assert len(rows) == 33
    for row in rows:
        assert row.fits, row
        # A loop that takes all 255 registers may park a few words that it only reads; how many is
        # the compiler's mood (versions differ by tens of bytes). On Hopper these are the 64 matrix
        # descriptors of 8 bytes that a product over 512 columns has. A spilled tile is kilobytes.
        assert row.spill_bytes <= (512 if row.capability == 90 else 96), row


def stale_descriptors(sass: str) -> tuple[list[str], int]:
    """Matrix descriptors whose upper half is not added to zero, and how many were looked at.

    A descriptor is a base address (32 bits, so its upper half is zero) plus a constant. ptxas 12.8
    sometimes adds the constant's upper half to a register that holds something else, and the
    product reads what lies there: wrong gradients, or a fault.
    """
    lines = [re.sub(r" +", " ", line) for line in sass.splitlines()]
    pattern = r"IADD3\.X (R\d+), (R\d+|RZ), (-?0x[0-9a-f]+), RZ, !?U?P"
    bad, seen = [], 0
    for i, line in enumerate(lines):
        found = re.search(pattern, line)
        # the swizzle's code in the top two bits, the stride in the lowest: no address has these
        if not found or int(found[3], 16) & 0xFFFFFF00 not in (0x40000000, 0x80000000, 0xC0000000):
            continue
        seen += 1
        if found[2] == "RZ":
            continue
        register = int(found[2][1:])
        writers = (rf"\*/ (@!?U?P\d )?\S+ R{register}, ", rf"CS2R R{register & ~1}, ")
        last = next(x for x in reversed(lines[:i]) if any(re.search(w, x) for w in writers))
        if not re.search(r"RZ, RZ, RZ|SRZ|, RZ ;", last):
            bad.append(f"{line.strip()} after {last.strip()}")
    return bad, seen


def main() -> None:
    """In a process that compiles: the stale descriptors of every Hopper kernel, as JSON."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    bad, seen, cubins = [], 0, []
    crosscompile._resources = lambda cubin: (cubins.append(cubin), (0, 0))[1]  # all it is asked for
    for size in (256, 512):
        for which in ("fwd", "dq", "dkv"):
            crosscompile.compile_case(case(which, 90, size), 90)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(cubins[-1])
                file.flush()
                command = [tool, "-c", file.name]
                text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found, looked_at = stale_descriptors(text)
            bad, seen = bad + found, seen + looked_at
    print(json.dumps([bad, seen]))


@pytest.mark.slow
def test_no_hopper_kernel_has_a_stale_descriptor():
    child = subprocess.run(
        [sys.executable, "-m", __name__],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    bad, seen = json.loads(child.stdout.splitlines()[-1])
    assert not bad, bad


def test_the_search_for_stale_descriptors_finds_one():
    stale = """
        /*0e80*/                   IMAD.IADD R0, R228, 0x1, R57 ;
        /*15d0*/                   IADD3 R5, P0, R0, 0x40, RZ ;
        /*16f0*/                   IADD3.X R6, R0, -0x7fffffe0, RZ, P0, !PT ;"""
    assert stale_descriptors(stale)[1] == 1 and len(stale_descriptors(stale)[0]) == 1
    sound = stale.replace("IMAD.IADD R0, R228, 0x1, R57", "IMAD.MOV.U32 R0, RZ, RZ, RZ")
    assert stale_descriptors(sound) == ([], 1)


if __name__ == "__main__":
    main()
