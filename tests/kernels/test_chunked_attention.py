from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma4AudioConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4AudioAttention

from gemma_accel.kernels import chunked_attention as module
from gemma_accel.kernels.chunked_attention import (
    Chunks,
    chunked_attention,
    chunked_attention_ref,
)
from gemma_accel.kernels.clip import EVERYTHING, Range
from tests.accuracy import assert_no_less_accurate
from tests.kernels import crosscompile

DTYPES = [torch.float32, torch.float16]  # the interpreter's products of bfloat16 are broken
OFFICIAL = Chunks(size=12, past=12, future=0, k_scale=1.9, cap=50.0)
# (B, T, N, D), chunks
SHAPES = {
    "one token": ((1, 1, 1, 16), OFFICIAL),
    "one chunk": ((1, 12, 2, 16), OFFICIAL),
    "ragged": ((2, 29, 2, 16), OFFICIAL),
    "narrow": ((1, 25, 1, 12), OFFICIAL),
    "far past": ((1, 19, 1, 16), Chunks(size=4, past=9, future=0, k_scale=1.0, cap=8.0)),
    "future": ((1, 19, 2, 16), Chunks(size=4, past=3, future=5, k_scale=1.5, cap=8.0)),
}
RANGES = {
    "held": dict(
        q_range=Range(-1.0, 1.25), k_range=Range(0.125, 1.5), v_range=Range(-1.0, -0.25),
        after=Range(-0.75, -0.375),
    ),
    "free": {},
}  # fmt: skip
LEAVES = ("q", "k", "v", "relative", "q_scale")


def positions(chunks: Chunks) -> int:
    return chunks.context // 2 + 1


def stock(
    q, k, v, relative, q_scale, mask, chunks,
    *, q_range=EVERYTHING, k_range=EVERYTHING, v_range=EVERYTHING, after=EVERYTHING,
):  # fmt: skip
    """Gemma4AudioAttention.forward between its projections, by its own methods."""
    batch, tokens, heads, size = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    attention = Gemma4AudioAttention.__new__(Gemma4AudioAttention)
    torch.nn.Module.__init__(attention)
    attention.chunk_size, attention.context_size = chunks.size, chunks.context
    attention.max_past_horizon, attention.max_future_horizon = chunks.past, chunks.future
    q = torch.clamp(q, *q_range).to(wide) * q_scale.to(wide)
    q = attention._convert_to_block(q)
    k = attention._extract_block_context(torch.clamp(k, *k_range).to(wide) * chunks.k_scale)
    v = attention._extract_block_context(torch.clamp(v, *v_range).to(wide))
    count = q.shape[1]
    queries = q.permute(0, 3, 1, 2, 4)
    scores = queries @ k.permute(0, 3, 1, 4, 2)
    shifted = queries.reshape(batch, heads, -1, size) @ relative.to(wide).permute(1, 2, 0)
    shifted = shifted.reshape(batch, heads, count, chunks.size, -1)
    scores = torch.tanh((scores + attention._rel_shift(shifted)) / chunks.cap) * chunks.cap
    if mask is not None:
        scores = scores.masked_fill(~mask, chunks.invalid)
    out = F.softmax(scores, dim=-1) @ v.permute(0, 3, 1, 2, 4)
    out = out.permute(0, 2, 3, 1, 4).reshape(batch, count * chunks.size, heads, size)[:, :tokens]
    return torch.clamp(out.to(q_scale.dtype if wide == torch.float64 else stock.dtype), *after)


def make_mask(shape, chunks, lengths=None):
    """Causal within a window, padding unseen: a padded row's queries see nothing at all."""
    batch, tokens = shape[:2]
    count = chunks.count(tokens)
    query = torch.arange(count * chunks.size).view(count, chunks.size, 1)
    key = torch.arange(count)[:, None, None] * chunks.size - chunks.past
    key = key + torch.arange(chunks.context)
    far = query - key
    seen = ((far >= 0) & (far < max(chunks.past, 1))) | ((far < 0) & (-far < chunks.future))
    lengths = lengths or [tokens - 5 * row for row in range(batch)]
    rows = [seen & (key >= 0) & (key < n) & (query < n) for n in lengths]
    return torch.stack(rows)[:, None]


def make(case, dtype, device, ranges=None):
    shape, chunks = case
    batch, tokens, heads, size = shape
    torch.manual_seed(0)
    inputs = {name: torch.randn(shape).to(dtype) for name in "qkv"}
    inputs["relative"] = torch.randn(positions(chunks), heads, size).to(dtype)
    inputs["q_scale"] = torch.rand(size) * 3  # float32, as softplus of a float32 parameter
    for name in "qkv":
        for i, end in enumerate((ranges or {}).get(f"{name}_range", ())):
            inputs[name].view(-1)[i::7] = end
    do = torch.randn(shape).to(dtype)
    mask = make_mask(shape, chunks)
    if ranges and "after" in ranges:
        out = chunked_attention_ref(
            *(inputs[n].double() for n in LEAVES), mask, chunks,
            **{**ranges, "after": EVERYTHING},
        )  # fmt: skip
        for end in ranges["after"]:
            do[(out - end).abs() < 8 * torch.finfo(dtype).eps * abs(end)] = 0
    inputs = {k: v.to(device) for k, v in inputs.items()}
    return inputs, mask.to(device), chunks, do.to(device)


def run(op, inputs, mask, chunks, do, ranges, dtype=None, *, wanted=LEAVES):
    inputs = {k: v.detach().to(dtype or v.dtype) for k, v in inputs.items()}
    leaves = {k: inputs[k].requires_grad_() for k in wanted}
    stock.dtype = inputs["q"].dtype
    out = op(**inputs, mask=mask, chunks=chunks, **ranges)
    out.backward(do.to(out.dtype))
    return {"out": out} | {f"d{k}": v.grad for k, v in leaves.items()}


def all_three(*args, **how):
    return (
        run(op, *args, to, **how)
        for op, to in ((chunked_attention, None), (stock, None), (stock, torch.float64))
    )


def assert_accurate(ours, eager, truth, reduced):
    for what in truth:
        assert_no_less_accurate(ours[what], eager[what], truth[what], what=what, reduced=reduced)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_no_less_accurate_than_stock(case, dtype, ranges, device, poisoned):
    args = make(case, dtype, device, ranges)
    ours, eager, truth = all_three(*args, ranges)
    # scores up to the cap's size reach the softmax with an error of their own
    reduced = 64 * max(case[0][3], case[0][0] * case[0][1])
    assert_accurate(ours, eager, truth, reduced)
    assert ours["out"].is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_real_shape(dtype, device):
    args = make(((1, 750, 8, 128), OFFICIAL), dtype, device, RANGES["held"])
    ours, eager, truth = all_three(*args, RANGES["held"])
    assert_accurate(ours, eager, truth, 64 * 750)


@pytest.mark.parametrize("case", ["ragged", "future"])
def test_without_a_mask(case, device, poisoned):
    """Then the zeros that stock pads with are seen too."""
    inputs, _, chunks, do = make(SHAPES[case], torch.float32, device)
    ours, eager, truth = all_three(inputs, None, chunks, do, {})
    assert_accurate(ours, eager, truth, 64 * 32)


def test_masks_of_either_kind(device):
    inputs, mask, chunks, do = make(SHAPES["ragged"], torch.float32, device)
    boolean = run(chunked_attention, inputs, mask, chunks, do, {})
    for lowest in (torch.finfo(torch.float32).min, -math.inf):
        additive = torch.where(mask, 0.0, lowest)
        got = run(chunked_attention, inputs, additive, chunks, do, {})
        assert all(torch.equal(got[k], boolean[k]) for k in boolean)


def test_queries_that_see_nothing(device):
    """A padded row's queries see no key: stock gives them all keys alike, and so do we."""
    inputs, _, chunks, do = make(SHAPES["ragged"], torch.float32, device)
    mask = make_mask(SHAPES["ragged"][0], chunks, [29, 3]).to(device)
    ours, eager, truth = all_three(inputs, mask, chunks, do, {})
    assert torch.isfinite(ours["out"]).all()
    assert_accurate(ours, eager, truth, 64 * 32)


def test_scores_beyond_the_cap(device):
    inputs, mask, chunks, do = make(SHAPES["ragged"], torch.float32, device)
    inputs["q"] = inputs["q"] * 300
    ours, eager, truth = all_three(inputs, mask, chunks, do, {})
    assert torch.isfinite(ours["dq"]).all()
    assert_accurate({"out": ours["out"]}, eager, {"out": truth["out"]}, 64 * 512)


def test_tanh_is_as_good_as_torch(device):
    """Small values too, which the exponential's form alone loses."""
    x = torch.cat([torch.linspace(1, 2, 65) * 2.0**e for e in range(-20, 4)])
    x = torch.cat((x, -x)).to(device)
    torch.testing.assert_close(_tanh_of(x), x.tanh(), rtol=3e-7, atol=0)


def _tanh_of(x):
    from gemma_accel.kernels._triton import tl, triton

    @triton.jit
    def kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(y_ptr + at, module._tanh(tl.load(x_ptr + at, mask=at < n)), mask=at < n)

    y = torch.empty_like(x)
    kernel[(1,)](x, y, x.numel(), BLOCK=4096)
    return y


@pytest.mark.parametrize("wanted", [*((name,) for name in LEAVES), ("k", "q_scale")])
def test_gradients_alone_and_in_pairs(wanted, device, poisoned):
    args = make(SHAPES["future"], torch.float32, device, RANGES["held"])
    every = run(chunked_attention, *args, RANGES["held"])
    some = run(chunked_attention, *args, RANGES["held"], wanted=wanted)
    for name in wanted:
        assert torch.equal(some[f"d{name}"], every[f"d{name}"]), name


def test_strides(device, poisoned):
    inputs, mask, chunks, do = make(SHAPES["ragged"], torch.float32, device, RANGES["held"])
    want = run(chunked_attention, inputs, mask, chunks, do, RANGES["held"])
    both = torch.cat([inputs[n].flatten(2) for n in "qkv"], -1)
    fused = {n: x.unflatten(-1, (2, 16)) for n, x in zip("qkv", both.chunk(3, -1), strict=True)}
    moved = {n: inputs[n].transpose(1, 2).contiguous().transpose(1, 2) for n in "qkv"}
    for changed in (fused, moved):
        assert not changed["q"].is_contiguous()
        turned = do.transpose(1, 2).contiguous().transpose(1, 2)
        got = run(chunked_attention, {**inputs, **changed}, mask, chunks, turned, RANGES["held"])
        assert all(torch.equal(got[k], want[k]) for k in want)


def test_autocast_does_not_reach_it(device):
    inputs, mask, chunks, do = make(SHAPES["ragged"], torch.float32, device)
    plain = run(chunked_attention, inputs, mask, chunks, do, {})
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(torch.device(device).type, dtype):
            got = run(chunked_attention, inputs, mask, chunks, do, {})
        assert all(torch.equal(got[k], plain[k]) for k in plain)


def test_the_reference_too_stays_out_of_autocast(references):
    inputs, mask, chunks, _ = make(SHAPES["ragged"], torch.float32, "cpu")
    plain = chunked_attention(**inputs, mask=mask, chunks=chunks)
    with torch.autocast("cpu", torch.float16):  # stock: "value cannot be converted to Half"
        got = chunked_attention(**inputs, mask=mask, chunks=chunks)
    assert torch.equal(got, plain)


def test_no_tokens(device):
    inputs, _, chunks, do = make(SHAPES["one chunk"], torch.float32, device)
    none = {k: v[:, :0] if k in "qkv" else v for k, v in inputs.items()}
    out = run(chunked_attention, none, None, chunks, do[:, :0], {})
    assert out["out"].shape == out["dk"].shape == (1, 0, 2, 16)
    assert out["drelative"].count_nonzero() == 0


def test_repeat_run_is_bitwise_the_same(device):
    args = make(SHAPES["ragged"], torch.float32, device, RANGES["held"])
    first, second = (run(chunked_attention, *args, RANGES["held"]) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_kernel_equals_reference(case, device):
    args = make(case, torch.float32, device, RANGES["held"])
    ours, reference = (
        run(op, *args, RANGES["held"]) for op in (chunked_attention, chunked_attention_ref)
    )
    for what in ours:
        torch.testing.assert_close(ours[what], reference[what], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_reference_gradients(ranges):
    chunks = Chunks(size=2, past=2, future=1, k_scale=1.2, cap=3.0)
    inputs, mask, _, _ = make(((1, 5, 1, 3), chunks), torch.float64, "cpu")
    leaves = [inputs[name].double().requires_grad_() for name in LEAVES]

    def op(*values):
        return chunked_attention_ref(*values, mask, chunks, **ranges)

    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("way", ["references", "kernels"])
def test_equals_the_stock_module(way, device, request):
    """The whole of Gemma4AudioAttention, its own projections, horizons and scales."""
    if way == "references":
        request.getfixturevalue("references")
    config = Gemma4AudioConfig(hidden_size=32, num_attention_heads=2, use_clipped_linears=False)
    config._attn_implementation = "eager"
    attention = Gemma4AudioAttention(config, 0).to(device)
    with torch.no_grad():
        attention.per_dim_scale.normal_()
    chunks = Chunks(
        attention.chunk_size,
        attention.max_past_horizon,
        attention.max_future_horizon,
        attention.k_scale,
        attention.attention_logits_soft_cap,
    )
    assert chunks.context == attention.context_size == 24
    x, embeddings = torch.randn(1, 31, 32, device=device), torch.randn(1, 13, 32, device=device)
    mask = make_mask((1, 31), chunks).to(device)
    # 5.23 takes an additive mask, 5.17 a boolean one
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    additive = additive if not getattr(type(attention), "_takes_booleans", _booleans()) else mask
    expected, _ = attention(x, embeddings, additive)
    shape = (1, 31, 2, 16)
    out = chunked_attention(
        *(getattr(attention, f"{n}_proj")(x).view(shape) for n in "qkv"),
        attention.relative_k_proj(embeddings).view(13, 2, 16),
        attention.q_scale * F.softplus(attention.per_dim_scale),
        mask,
        chunks,
    )
    got = attention.post(out.reshape(1, 31, 32))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def _booleans() -> bool:
    from transformers.models.gemma4.modeling_gemma4 import Gemma4AudioModel

    return Gemma4AudioModel._supports_sdpa


def test_reference_stands_in_without_a_card(references):
    inputs, mask, chunks, _ = make(SHAPES["one chunk"], torch.float64, "cpu")
    args = (*inputs.values(), mask, chunks)
    assert torch.equal(chunked_attention(*args), chunked_attention_ref(*args))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda i: {"k": i["k"][:, :3]}, ValueError, r"q, k and v must have one shape \[B, T, N"),
        (lambda i: {"relative": i["relative"][:, :1]}, ValueError, r"\[P, N, D\] = \(P, 2, 16\)"),
        (lambda i: {"q_scale": torch.ones(3)}, ValueError, r"q_scale \[D\], got .* and \(3,\)"),
        (lambda i: {"mask": torch.ones(1, 1, 1, 12, 20) > 0}, ValueError, r"\(1, 1, 1, 12, 24\)"),
        (lambda i: {"v": i["v"].double()}, TypeError, "v must be float32, bfloat16 or float16"),
    ],
)
def test_errors(change, error, message, device):
    inputs, mask, chunks, _ = make(SHAPES["one chunk"], torch.float32, device)
    with pytest.raises(error, match=message):
        chunked_attention(**{**inputs, "mask": mask, "chunks": chunks, **change(inputs)})


def cross_compile_cases() -> list[crosscompile.Case]:
    size, heads = 128, 8
    counts = ("tokens", "n_chunks")
    strides = [f"{x}_{s}_stride" for s in ("batch", "token") for x in "qkv"]
    floats = ["k_scale", "cap", "invalid"]
    floats += [f"{x}_{end}" for x in ("q", "k", "v", "after") for end in ("low", "high")]
    shape = {"N": heads, "C": 12, "PAST": 12, "X": 24, "P": 13, "D": size}
    shape |= module._blocks(size, 13, OFFICIAL) | {"HAS_MASK": True, "ADDITIVE": True}
    inputs = ("q_ptr", "k_ptr", "v_ptr", "relative_ptr")
    signature = dict.fromkeys(inputs, "*bf16") | {"q_scale_ptr": "*fp32", "mask_ptr": "*bf16"}
    signature |= dict.fromkeys((*counts, *strides, "relative_stride"), "i32")
    signature |= dict.fromkeys(floats, "fp32")
    do_strides = [f"do_{s}_stride" for s in ("batch", "token", "head")]
    outs = ("dk_ptr", "dv_ptr", "dr_ptr", "ds_ptr")
    return [
        crosscompile.Case(
            "chunked_attention_fwd",
            module._chunked_attention_fwd_kernel,
            signature | {"out_ptr": "*bf16"},
            shape,
            aligned=(*strides, "relative_stride"),
            num_warps=8,
        ),
        crosscompile.Case(
            "chunked_attention_fwd booleans",
            module._chunked_attention_fwd_kernel,
            signature | {"out_ptr": "*bf16", "mask_ptr": "*i1"},
            shape | {"ADDITIVE": False},
            aligned=(*strides, "relative_stride"),
            num_warps=8,
            capabilities=(89,),
        ),
        *(
            crosscompile.Case(
                f"chunked_attention_bwd trained={trained}",
                module._chunked_attention_bwd_kernel,
                signature
                | dict.fromkeys(("do_ptr", "dq_ptr"), "*bf16")
                | dict.fromkeys(outs if trained else outs[:2], "*fp32")
                | dict.fromkeys(do_strides, "i32"),
                shape
                | dict.fromkeys(("HAS_DQ", "HAS_DK", "HAS_DV"), True)
                | dict.fromkeys(("HAS_DR", "HAS_DS"), trained)
                | ({} if trained else dict.fromkeys(outs[2:])),
                aligned=(*strides, *do_strides, "relative_stride"),
                num_warps=8,
            )
            for trained in (False, True)
        ),
        crosscompile.Case(
            "fold",
            module._fold_kernel,
            {"given_ptr": "*fp32", "x_ptr": "*bf16", "dx_ptr": "*bf16"}
            | dict.fromkeys((*counts, "x_batch_stride", "x_token_stride"), "i32")
            | dict.fromkeys(("low", "high"), "fp32"),
            {"C": 12, "PAST": 12, "X": 24, "D": size, "WIDTH": 1024, "BLOCK": 1024},
            aligned=("x_batch_stride", "x_token_stride"),
        ),
    ]


def test_compiles_for_every_card_without_spills():
    rows = crosscompile.check(__name__)
    assert {row.capability for row in rows} == set(crosscompile.SHARED_KIB)
    assert [row for row in rows if not row.fits or row.spill_bytes] == []
