"""attention against a float64 truth, with torch's SDPA, called as transformers calls it, as the measure of accuracy.

Where there is no card the kernels run in Triton's interpreter, which is slow: the shapes there are small, and cross tile
borders because the interpreter's tiles are small too.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gemma_accel.kernels import attention as module
from gemma_accel.kernels._triton import HAS_TRITON, triton
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
ONES = 10**6  # a padding mask that is all ones


@pytest.fixture(autouse=True)
def _interpreter_of_triton_3_6(monkeypatch):
    """Triton 3.6's interpreter turns a one-element array into a loop bound in a way that numpy 2.4 refuses."""
    if DEVICE == "cuda" or not HAS_TRITON or tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6):
        return
    import triton.runtime.interpreter as interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def make(B, N, K, T, H, dtype, scale_v=1.0):
    """q and k as they leave Gemma 4's norms: unit root mean square per head times a weight near one, so that at scale 1 the
    softmax is sharp. Views of [B, T, heads, H], as the model hands them over."""

    def normed(heads):
        x = torch.randn(B, T, heads, H, device=DEVICE)
        x = x * x.square().mean(-1, keepdim=True).rsqrt() * (1 + 0.1 * torch.randn(H, device=DEVICE))
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
        sees = sees & (t[None, None, :] >= segments.first[:, :, None]) & (t[None, :, None] <= segments.last[:, None, :])
    return sees[:, None], sees.any(-1)


def stock(q, k, v, window, segments, scale):
    """On the card transformers' sdpa_attention_forward: causal and grouped without a mask up to head_dim 256, else repeated
    keys. On the CPU SDPA keeps float32 inside whatever the inputs, so half precision is held to eager_attention_forward."""
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
    mask = mask | ~sees[:, None, :, None]  # a row without keys would be NaN; what it gives is not compared
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if plain else mask, is_causal=plain and T > 1, scale=scale)
    return out.transpose(1, 2).contiguous()


def truth(q, k, v, window, segments, scale):
    return attention_ref(q, k, v, scale=scale, window=window, segments=segments)


def gradients(fn, inputs, dout, dtype=None):
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = fn(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))


def compare(B, N, K, T, H, dtype, *, window=None, segments=None, scale=1.0):
    q, k, v = make(B, N, K, T, H, dtype)
    dout = torch.randn(B, T, N, H, device=DEVICE).to(dtype)
    sees = dense(T, window, segments)[1].expand(B, T)
    dout = dout * sees[:, :, None, None]
    ours = gradients(lambda *x: attention(*x, scale=scale, window=window, segments=segments), (q, k, v), dout)
    eager = gradients(lambda *x: stock(*x, window, segments, scale), (q, k, v), dout)
    exact = gradients(lambda *x: truth(*x, window, segments, scale), (q, k, v), dout, torch.float64)
    assert ours[0].shape == (B, T, N, H) and ours[0].is_contiguous()
    assert (ours[0][~sees] == 0).all(), "a row that sees nothing must be zero"
    eager = (torch.where(sees[:, :, None, None], eager[0], 0), *eager[1:])
    # float32 only: scores reach about 4 sqrt(H), and the backward's exponent is a difference of two numbers 1.44 times that
    # size, each rounded: an error of up to 8 sqrt(H) units in a probability, however exact the sums are
    for what, a, b, c in zip(("out", "dq", "dk", "dv"), ours, eager, exact, strict=True):
        if 1 in (T, window) and what in ("dq", "dk"):  # one key: the softmax is 1 and its gradient a difference of equal sums
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


# What the launchers choose on one card or another, on a shape that crosses every border
TILES = {
    "two loops": Tile(32, 16, 4, 1),
    "one loop": Tile(16, 32, 4, 1, edges=False),
    "unchain": Tile(32, 16, 4, 1, unchain=True),
    "parts": Tile(32, 16, 4, 1, parts=2),
    "flip": Tile(32, 16, 4, 1, flip=True),
    "split": Tile(16, 32, 4, 1, split=True),
}


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_every_shape_of_tile(tile, monkeypatch, poisoned):
    monkeypatch.setattr(module, "_tiles_on", lambda *_: Tiles(tile, tile, tile))
    position_ids = torch.cat([torch.arange(n, device=DEVICE) for n in (3, 30, 1, 1, 20)])[None]
    compare(1, 4, 1, 55, 32, torch.float32, window=19, segments=segments_from_position_ids(position_ids))


LENGTHS = {"left": [(5, 0), (0, 0)], "right": [(0, 9), (0, 1)], "both": [(3, 7), (0, 0)], "nothing but padding": [(45, 0), (2, 0)]}


@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("pads", LENGTHS.values(), ids=LENGTHS)
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
    grads = gradients(lambda *x: attention(*x, window=window, segments=segments), (q, k, v), torch.ones(2, T, 4, 32, device=DEVICE))
    for what, x in zip(("out", "dq", "dk", "dv"), grads, strict=True):
        x = x if what == "out" else x.transpose(1, 2)
        assert (x[mask == 0] == 0).all(), f"{what}: padding must be exactly zero, whatever gradient arrives there"


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
        alone = gradients(lambda *x: attention(*x, window=window), [x[:, :, of] for x in (q, k, v)], dout[:, of])
        torch.testing.assert_close(packed[0][:, of], alone[0], rtol=1e-5, atol=1e-5)
        for a, b in zip(packed[1:], alone[1:], strict=True):
            torch.testing.assert_close(a[:, :, of], b, rtol=1e-4, atol=1e-4)
        start += n


def test_a_document_never_sees_another(poisoned):
    """Not by a rounding error's breadth either: NaN in one document leaves the others as they were."""
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
    everything = dict(zip("qkv", gradients(lambda *x: attention(*x, window=12), (q, k, v), dout)[1:], strict=True))
    inputs = {n: x.detach().requires_grad_(n in which) for n, x in zip("qkv", (q, k, v), strict=True)}
    out = attention(*inputs.values(), window=12)
    grads = torch.autograd.grad(out, [inputs[n] for n in which], dout)
    for n, g in zip(which, grads, strict=True):
        torch.testing.assert_close(g, everything[n], rtol=1e-6, atol=1e-6)


def test_twice_is_bitwise_the_same(poisoned):
    q, k, v = make(2, 4, 1, 45, 32, torch.float32)
    dout = torch.randn(2, 45, 4, 32, device=DEVICE)
    for a, b in zip(gradients(attention, (q, k, v), dout), gradients(attention, (q, k, v), dout), strict=True):
        assert torch.equal(a, b)


def test_gradients_keep_the_layout_of_their_inputs(poisoned):
    q, k, v = (x.requires_grad_() for x in make(1, 4, 2, 20, 16, torch.float32))
    out = attention(q, k, v)
    for x, g in zip((q, k, v), torch.autograd.grad(out, (q, k, v), torch.ones_like(out)), strict=True):
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
    q, k, v = (x.cpu() for x in make(1, 2, 1, 9, 20, torch.float32))  # 20: no kernel has this head size
    torch.testing.assert_close(attention(q, k, v, window=4), attention_ref(q, k, v, window=4))


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
        (lambda a: a.update(segments=Segments(*[torch.zeros(1, 8, device=DEVICE)] * 2)), ValueError, "segments.first must be int32"),
        (lambda a: a.update({n: a[n][..., :12] for n in "qkv"}), ValueError, "head_dim is 12"),
        (lambda a: a.update({n: a[n].double() for n in "qkv"}), ValueError, "dtype is torch.float64"),
    ],
    ids=["3-D", "cache", "repeated", "dtype", "heads", "scale", "window", "segments", "head size", "float64"],
)  # fmt: skip
def test_clear_errors(change, error, text):
    q, k, v = make(1, 4, 2, 8, 16, torch.float32)
    arguments = {"q": q, "k": k, "v": v}
    change(arguments)
    with pytest.raises(error, match=text):
        attention(**arguments)


# ------------------------------------------------------------------------------------------------------------- segments


def visible(segments, T):
    t = torch.arange(T, device=segments.first.device)
    by_query = (t[None, None, :] >= segments.first[:, :, None]) & (t[None, :] <= t[:, None])
    by_key = (t[None, :, None] <= segments.last[:, None, :]) & (t[None, :] <= t[:, None])
    return by_query, by_key


def test_segments_agree_with_the_definition_from_both_ends():
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 6, 7, 0, 1, 2, 9, 10, 0, 0]])
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[0, 8:], mask[1, :2], mask[2] = 0, 0, 0
    document = (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)  # as transformers finds them
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
        ([[1, 1, 1]], True), ([[0, 1, 1]], True), ([[1, 1, 0]], True), ([[0, 1, 0]], True), ([[0, 0, 0]], True),
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


# ------------------------------------------------------------------------------------------------------------------ card


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1, 17, 511, 512, 513, 2048, 4097])
@pytest.mark.parametrize(
    "N, K, H, window",
    [(8, 1, 512, None), (8, 1, 256, 512), (8, 2, 512, None), (8, 2, 256, 512), (8, 1, 256, None), (4, 4, 128, 300)],
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
    compare(1, 8, 1, sum(lengths), H, torch.bfloat16, window=window, segments=segments_from_position_ids(position_ids))
    mask = torch.ones(3, 1100, dtype=torch.long, device=DEVICE)
    mask[0, :333], mask[1, 1000:], mask[2] = 0, 0, 0
    compare(3, 8, 2, 1100, H, torch.bfloat16, window=window, segments=segments_from_attention_mask(mask))


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
