from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from gemma_accel.kernels import light_conv as module
from gemma_accel.kernels import rms_norm as shared
from gemma_accel.kernels.clip import EVERYTHING, Range
from gemma_accel.kernels.light_conv import light_conv, light_conv_ref
from tests.accuracy import assert_no_less_accurate, assert_same_but_for_rounding
from tests.kernels import crosscompile
from tests.kernels.test_rms_norm import stock as stock_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (B, T, D, K)
SHAPES = {
    "one": (1, 1, 8, 5),
    "short": (2, 3, 24, 5),
    "rows": (2, 13, 40, 5),
    "taps": (1, 9, 16, 3),
    "wide": (1, 6, 1024, 5),
}
WAYS = {
    "all": dict(before=Range(-1.5, 1.25), middle=Range(-1.0, 1.5), after=Range(-0.125, 0.75)),
    "conformer": dict(before=Range(0.125, 1.5), middle=Range(-1e10, 1e10), after=Range(-0.25, 1.0)),
    "none": {},
}
NAMES = ("x", "conv", "weight")


def stock(x, conv, weight, *, before=EVERYTHING, middle=EVERYTHING, after=EVERYTHING):
    """Gemma4AudioLightConv1d.forward between its products."""
    g = F.glu(torch.clamp(x, *before), dim=-1).transpose(1, 2)
    c = F.conv1d(F.pad(g, (conv.shape[-1] - 1, 0)), conv, groups=conv.shape[0]).transpose(1, 2)
    largest = torch.finfo(c.dtype).max
    middle = (max(middle.low, -largest), min(middle.high, largest))
    y = stock_norm(torch.clamp(c, *middle), weight)
    return torch.clamp(F.silu(y), *after)


def make(shape, dtype, device, way):
    """Values on both sides of each range and on its ends. No gradient arrives at what rounding
    alone decides: whether a value next to the later clamps' ends is inside."""
    batch, tokens, width, taps = shape
    x = (torch.randn(batch, tokens, 2 * width) * 1.5).to(dtype)
    for i, end in enumerate(way.get("before", ())):
        x.view(-1)[i::7] = end
    conv = torch.randn(width, 1, taps).to(dtype)
    weight = (torch.randn(width) + 0.5).to(dtype)
    dy = torch.randn(batch, tokens, width).to(dtype)
    loose = [t.double() for t in (x, conv, weight)]
    y = stock(*loose, **{**way, "after": EVERYTHING})
    for end in way.get("after", ()):
        dy[(y - end).abs() < 0.05] = 0
    if "middle" in way and way["middle"].high < 100:
        g = F.glu(torch.clamp(loose[0], *way["before"]), dim=-1).transpose(1, 2)
        c = F.conv1d(F.pad(g, (taps - 1, 0)), loose[1], groups=width).transpose(1, 2)
        near = torch.stack([(c - end).abs() < 0.02 for end in way["middle"]]).any(0)
        dy[near.any(-1)] = 0  # a norm spreads over the row
    return {"x": x.to(device), "conv": conv.to(device), "weight": weight.to(device)}, dy.to(device)


def run(op, inputs, dy, way, dtype=None, *, wanted=NAMES):
    inputs = {k: v.detach().to(dtype or v.dtype) for k, v in inputs.items()}
    leaves = {k: inputs[k].requires_grad_() for k in wanted}
    y = op(**inputs, **way)
    y.backward(dy.to(y.dtype))
    return {"y": y} | {f"d{k}": v.grad for k, v in leaves.items()}


def all_three(inputs, dy, way):
    return (
        run(op, inputs, dy, way, to)
        for op, to in ((light_conv, None), (stock, None), (stock, torch.float64))
    )


def assert_accurate(ours, eager, truth, reduced):
    for what in truth:
        assert_no_less_accurate(ours[what], eager[what], truth[what], what=what, reduced=reduced)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_no_less_accurate_than_stock(shape, dtype, way, device, poisoned):
    inputs, dy = make(shape, dtype, device, way)
    ours, eager, truth = all_three(inputs, dy, way)
    assert_accurate(ours, eager, truth, max(shape[2], shape[0] * shape[1]) * shape[3])
    assert ours["y"].is_contiguous() and ours["dx"].shape == inputs["x"].shape


def test_rows_of_a_batch_do_not_see_each_other(device):
    inputs, dy = make((2, 6, 8, 5), torch.float32, device, WAYS["none"])
    both = run(light_conv, inputs, dy, {})
    for row in range(2):
        alone = run(light_conv, {**inputs, "x": inputs["x"][row : row + 1]}, dy[row : row + 1], {})
        assert torch.equal(alone["y"][0], both["y"][row])
        assert torch.equal(alone["dx"][0], both["dx"][row])


def test_no_row_sees_a_later_one(device):
    inputs, _ = make((1, 9, 8, 5), torch.float32, device, WAYS["none"])
    before = light_conv(**inputs)
    inputs["x"][:, 5:] = 7.0
    assert torch.equal(light_conv(**inputs)[:, :5], before[:, :5])


@pytest.mark.parametrize("wanted", [c for n in (1, 2) for c in itertools.combinations(NAMES, n)])
def test_gradients_alone_and_in_pairs(wanted, device, poisoned):
    inputs, dy = make((2, 50, 8, 5), torch.float32, device, WAYS["all"])
    every = run(light_conv, inputs, dy, WAYS["all"])
    some = run(light_conv, inputs, dy, WAYS["all"], wanted=wanted)
    for name in wanted:
        assert_same_but_for_rounding(some[f"d{name}"], every[f"d{name}"], what=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype, device, poisoned):
    inputs, dy = make((2, 5, 24, 5), dtype, device, WAYS["all"])
    want = run(light_conv, inputs, dy, WAYS["all"])

    def padded(t):
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 9), float("nan"), dtype=dtype)
        wide = wide.to(device)
        wide[..., 4:-5] = t
        return wide[..., 4:-5]

    conv = inputs["conv"].transpose(0, 2).contiguous().transpose(0, 2)
    for change in (padded, lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2)):
        changed = {**inputs, "x": change(inputs["x"]), "conv": conv}
        got = run(light_conv, changed, change(dy), WAYS["all"])
        assert all(torch.equal(got[k], want[k]) for k in want)


def test_sums_over_more_tiles_than_partial_sums(device, monkeypatch, poisoned):
    monkeypatch.setattr(shared, "PARTIAL_SUMS", 3)
    inputs, dy = make((2, 50, 64, 5), torch.float32, device, WAYS["conformer"])
    ours, eager, truth = all_three(inputs, dy, WAYS["conformer"])
    assert_accurate(ours, eager, truth, 100)


def test_no_tokens(device):
    inputs, dy = make((1, 2, 8, 5), torch.float32, device, {})
    out = run(light_conv, {**inputs, "x": inputs["x"][:, :0]}, dy[:, :0], {})
    assert out["y"].shape == (1, 0, 8) and out["dconv"].count_nonzero() == 0


def test_repeat_run_is_bitwise_the_same(device):
    inputs, dy = make((2, 60, 16, 5), torch.float32, device, WAYS["all"])
    first, second = (run(light_conv, inputs, dy, WAYS["all"]) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_kernel_equals_reference(way, device):
    inputs, dy = make((2, 7, 48, 5), torch.float32, device, way)
    ours, reference = (run(op, inputs, dy, way) for op in (light_conv, light_conv_ref))
    for what in ours:
        torch.testing.assert_close(ours[what], reference[what], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_reference_gradients(way):
    leaves = [torch.randn(s, dtype=torch.float64) for s in ((1, 4, 6), (3, 1, 5), (3,))]

    def op(*values):
        return light_conv_ref(*values, **way)

    assert torch.autograd.gradcheck(op, [t.requires_grad_() for t in leaves])


def test_reference_stands_in_without_a_card(references):
    inputs, _ = make((1, 4, 8, 5), torch.float64, "cpu", {})
    assert torch.equal(light_conv(**inputs), light_conv_ref(**inputs))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda i: {"x": i["x"][..., :7]}, ValueError, r"x must have shape \[B, T, 2D\]"),
        (lambda i: {"conv": i["conv"][:3]}, ValueError, r"conv \[D, 1, K\], got .*\(3, 1, 5\)"),
        (lambda i: {"weight": torch.ones(3)}, ValueError, "weight must have shape"),
        (lambda i: {"x": i["x"].double()}, TypeError, "x must be float32, bfloat16 or float16"),
    ],
)
def test_errors(change, error, message, device):
    inputs, _ = make((1, 4, 8, 5), torch.float32, device, {})
    with pytest.raises(error, match=message):
        light_conv(**{**inputs, **change(inputs)})


def cross_compile_cases() -> list[crosscompile.Case]:
    cases = []
    ends = [f"{what}_{e}" for what in ("before", "middle", "after") for e in ("low", "high")]
    counts = ("n_rows", "tokens_per_batch")
    width = 1024
    block_r, block_d, num_warps = module.tile(width)
    tile = {"D": width, "K": 5, "BLOCK_R": block_r, "BLOCK_D": block_d}
    inputs = ("x_ptr", "conv_ptr", "weight_ptr")
    cases.append(
        crosscompile.Case(
            "light_conv_fwd",
            module._light_conv_fwd_kernel,
            dict.fromkeys((*inputs, "y_ptr"), "*bf16")
            | dict.fromkeys((*counts, "x_row_stride"), "i32")
            | dict.fromkeys(("eps", *ends), "fp32"),
            tile,
            aligned=("x_row_stride",),
            num_warps=num_warps,
        )
    )
    strides = ("dy_row_stride", "x_row_stride")
    for trained in (False, True):
        cases.append(
            crosscompile.Case(
                f"light_conv_dc dw={trained}",
                module._light_conv_dc_kernel,
                dict.fromkeys((*inputs, "dy_ptr"), "*bf16")
                | {"dc_ptr": "*fp32"}
                | ({"dw_ptr": "*fp32"} if trained else {})
                | dict.fromkeys((*counts, "rows_per_program", *strides), "i32")
                | dict.fromkeys(("eps", *ends), "fp32"),
                tile | {"HAS_DW": trained} | ({} if trained else {"dw_ptr": None}),
                aligned=strides,
                num_warps=num_warps,
            )
        )
        cases.append(
            crosscompile.Case(
                f"light_conv_dx dconv={trained}",
                module._light_conv_dx_kernel,
                dict.fromkeys(("x_ptr", "conv_ptr", "dx_ptr"), "*bf16")
                | {"dc_ptr": "*fp32"}
                | ({"dconv_ptr": "*fp32"} if trained else {})
                | dict.fromkeys((*counts, "rows_per_program", "x_row_stride"), "i32")
                | dict.fromkeys(ends[:2], "fp32"),
                {"D": width, "K": 5, "BLOCK_K": 8, "BLOCK_D": 512}
                | {"HAS_DX": True, "HAS_DCONV": trained}
                | ({} if trained else {"dconv_ptr": None}),
                aligned=("x_row_stride",),
            )
        )
    return cases


def test_compiles_for_every_card_without_spills():
    rows = crosscompile.check(__name__)
    assert {row.capability for row in rows} == set(crosscompile.SHARED_KIB)
    assert [row for row in rows if not row.fits or row.spill_bytes] == []
