from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from gemma_accel.kernels import vision_attention as module
from gemma_accel.kernels.vision_attention import (
    supported,
    vision_attention,
    vision_attention_ref,
)
from tests.accuracy import assert_no_less_accurate
from tests.kernels import crosscompile

DTYPES = [torch.float32, torch.float16]  # the interpreter's products of bfloat16 are broken
# (B, T, N, D), patches that are there in each row, or None
SHAPES = {
    "one": ((1, 1, 1, 16), None),
    "ragged": ((2, 37, 2, 16), [37, 20]),
    "tiles": ((1, 150, 1, 64), [131]),
    "full": ((1, 70, 2, 32), None),
    "nearly nothing": ((2, 40, 1, 16), [1, 33]),
}
LEAVES = ("q", "k", "v")


def stock(q, k, v, seen):
    """transformers' sdpa_attention_forward, with the mask that the vision encoder builds.

    On the CPU SDPA keeps float32 inside whatever the inputs, so half precision is held to
    eager_attention_forward there.
    """
    mask = None if seen is None else seen[:, None, None].expand(-1, 1, q.shape[1], -1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.dtype.itemsize == 2 and not q.is_cuda:
        scores = q @ k.transpose(2, 3)
        if mask is not None:
            scores = scores + torch.where(mask, 0, torch.finfo(q.dtype).min).to(q.dtype)
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return (weights @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0).transpose(1, 2)


def make(case, dtype, device):
    shape, lengths = case
    inputs = {name: torch.randn(shape) for name in LEAVES}
    inputs["q"] *= 0.5
    # a few keys that a query strongly prefers: the softmax is not flat
    inputs["k"][:, ::9] = inputs["q"][:, ::9] * 4
    seen = None
    if lengths is not None:
        seen = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).to(device)
    do = torch.randn(shape)
    return {k: v.to(device, dtype) for k, v in inputs.items()}, seen, do.to(device, dtype)


def run(op, inputs, seen, do, dtype=None, *, wanted=LEAVES):
    inputs = {k: v.detach().to(dtype or v.dtype) for k, v in inputs.items()}
    leaves = {k: inputs[k].requires_grad_() for k in wanted}
    out = op(**inputs, seen=seen)
    out.backward(do.to(out.dtype))
    return {"out": out} | {f"d{k}": v.grad for k, v in leaves.items()}


def all_three(*args):
    return (
        run(op, *args, to)
        for op, to in ((vision_attention, None), (stock, None), (stock, torch.float64))
    )


def assert_accurate(ours, eager, truth, reduced):
    for what in truth:
        assert_no_less_accurate(ours[what], eager[what], truth[what], what=what, reduced=reduced)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_no_less_accurate_than_stock(case, dtype, device, poisoned):
    args = make(case, dtype, device)
    ours, eager, truth = all_three(*args)
    if case[0][1] == 1:  # a softmax of one score is 1, its gradient a difference of equal sums
        for what in ("dq", "dk"):
            assert ours.pop(what).abs().max() < 1e-2
            truth.pop(what)
    assert_accurate(ours, eager, truth, 64 * case[0][1])
    assert ours["out"].is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [64, 128])
def test_real_shapes(dtype, size, device):
    args = make(((2, 2520, 12, size), [2520, 2394]), dtype, device)
    ours, eager, truth = all_three(*args)
    assert_accurate(ours, eager, truth, 2520)


def test_padding_is_not_seen(device, poisoned):
    inputs, seen, do = make(SHAPES["ragged"], torch.float32, device)
    before = run(vision_attention, inputs, seen, do)
    for name in ("k", "v"):
        inputs[name] = torch.where(seen[..., None, None], inputs[name], 1e4)
    after = run(vision_attention, inputs, seen, do)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert not before["dk"][~seen].any() and not before["dv"][~seen].any()


def test_padding_anywhere(device, poisoned):
    inputs, _, do = make(SHAPES["full"], torch.float32, device)
    seen = (torch.arange(70) % 3 > 0).to(device)[None]
    ours, eager, truth = all_three(inputs, seen, do)
    assert_accurate(ours, eager, truth, 64 * 70)


def test_large_scores(device):
    inputs, seen, do = make(SHAPES["ragged"], torch.float32, device)
    inputs["q"] *= 1e4
    out = run(vision_attention, inputs, seen, do)
    assert all(torch.isfinite(x).all() for x in out.values())


@pytest.mark.parametrize("wanted", [c for n in (1, 2) for c in itertools.combinations(LEAVES, n)])
def test_gradients_alone_and_in_pairs(wanted, device, poisoned):
    args = make(SHAPES["ragged"], torch.float32, device)
    every, some = run(vision_attention, *args), run(vision_attention, *args, wanted=wanted)
    for name in wanted:
        assert torch.equal(some[f"d{name}"], every[f"d{name}"]), name


@pytest.mark.parametrize("layout", ["by head", "fused", "columns"])
def test_strides(layout, device, poisoned):
    inputs, seen, do = make(SHAPES["ragged"], torch.float32, device)
    want = run(vision_attention, inputs, seen, do)
    fused = torch.cat([inputs[n].flatten(2) for n in LEAVES], -1).chunk(3, -1)
    change = {
        "by head": lambda n: inputs[n].transpose(1, 2).contiguous().transpose(1, 2),
        "fused": lambda n: fused[LEAVES.index(n)].unflatten(-1, (2, 16)),
        "columns": lambda n: inputs[n].transpose(2, 3).contiguous().transpose(2, 3),
    }[layout]
    changed = {n: change(n) for n in LEAVES}
    assert not changed["q"].is_contiguous()
    turned = do.transpose(1, 3).contiguous().transpose(1, 3)
    mask = seen[:, None, None].expand(-1, 1, 37, -1)[:, 0, 0]
    got = run(vision_attention, changed, mask, turned)
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_nothing_is_kept_where_nothing_is_trained(device):
    inputs, seen, _ = make(SHAPES["ragged"], torch.float32, device)
    assert vision_attention(**inputs, seen=seen).grad_fn is None


def test_no_patches(device):
    inputs = {n: torch.empty(1, 0, 2, 16, device=device) for n in LEAVES}
    out = run(vision_attention, inputs, None, torch.empty(1, 0, 2, 16, device=device))
    assert out["out"].shape == out["dk"].shape == (1, 0, 2, 16)


def test_repeat_run_is_bitwise_the_same(device):
    args = make(SHAPES["tiles"], torch.float32, device)
    first, second = (run(vision_attention, *args) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_kernel_equals_reference(case, device):
    args = make(case, torch.float32, device)
    ours, reference = (run(op, *args) for op in (vision_attention, vision_attention_ref))
    for what in ours:
        torch.testing.assert_close(ours[what], reference[what], rtol=1e-3, atol=1e-4)


def test_reference_gradients():
    inputs, seen, _ = make(((1, 4, 1, 3), [3]), torch.float64, "cpu")
    leaves = [inputs[n].requires_grad_() for n in LEAVES]
    assert torch.autograd.gradcheck(lambda *qkv: vision_attention_ref(*qkv, seen), leaves)


def test_reference_stands_in_without_a_card(references):
    inputs, seen, _ = make(SHAPES["ragged"], torch.float64, "cpu")
    assert torch.equal(
        vision_attention(**inputs, seen=seen), vision_attention_ref(**inputs, seen=seen)
    )


def test_what_it_takes(device):
    q = torch.empty(1, 2, 2, 64, dtype=torch.float16, device=device)
    assert supported(q, q) is None
    assert "72 wide" in supported(q.new_empty(1, 2, 2, 72), q)
    assert "shared" in supported(q, q[:, :, :1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda i: {"k": i["k"][:, :3]}, ValueError, r"one shape \[B, T, N, D\]"),
        (lambda i: {"seen": torch.ones(2, 3) > 0}, ValueError, r"\[B, T\] = \(2, 37\), got .*bool"),
        (lambda i: {"v": i["v"].double()}, TypeError, "all the same, got .*float64"),
        (
            lambda i: {n: torch.ones(1, 2, 1, 24, device=i[n].device) for n in LEAVES},
            ValueError,
            "heads are 24 wide",
        ),
    ],
)
def test_errors(change, error, message, device):
    inputs, _, _ = make(SHAPES["ragged"], torch.float32, device)
    with pytest.raises(error, match=message):
        vision_attention(**{**inputs, **change(inputs)})


def cross_compile_cases() -> list[crosscompile.Case]:
    cases = []
    for size, capabilities in ((64, tuple(crosscompile.SHARED_KIB)), (128, (86, 90))):
        for which, tile in zip(("fwd", "dq", "dkv"), module.tiles(size, 2), strict=True):
            names = {"fwd": "qkv", "dq": ["do", *"qkv"], "dkv": ["do", *"qkv"]}[which]
            strides = [f"{x}_{s}_stride" for s in ("batch", "token", "head") for x in names]
            half = {
                "fwd": ("out_ptr",),
                "dq": ("do_ptr", "out_ptr", "dq_ptr"),
                "dkv": ("do_ptr", "dk_ptr", "dv_ptr"),
            }[which]
            single = ("lse_ptr",) if which == "fwd" else ("lse_ptr", "delta_ptr")
            flags = {"fwd": (), "dq": ("HAS_DQ",), "dkv": ("HAS_DK", "HAS_DV")}[which]
            cases.append(
                crosscompile.Case(
                    f"vision_attention_{which} D={size}",
                    getattr(module, f"_vision_attention_{which}_kernel"),
                    dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", *half), "*bf16")
                    | dict.fromkeys(single, "*fp32")
                    | {"seen_ptr": "*i1", "log2e": "fp32", "tokens": "i32"}
                    | dict.fromkeys((*strides, "seen_batch_stride"), "i32"),
                    {"N": 12, "D": size, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
                    | {"HAS_SEEN": True, "PRECISION": "tf32", **dict.fromkeys(flags, True)},
                    aligned=tuple(strides),
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                    capabilities=capabilities,
                )
            )
    return cases


def test_compiles_for_every_card_without_spills():
    rows = crosscompile.check(__name__)
    assert {row.capability for row in rows} == set(crosscompile.SHARED_KIB)
    assert [row for row in rows if not row.fits or row.spill_bytes] == []
