from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gemma_accel.kernels import clip_norm as module
from gemma_accel.kernels import rms_norm as shared
from gemma_accel.kernels.clip import EVERYTHING, Range
from gemma_accel.kernels.clip_norm import clip_norm, clip_norm_ref
from gemma_accel.kernels.rms_norm import row_tile
from tests.accuracy import assert_no_less_accurate
from tests.kernels import crosscompile
from tests.kernels.test_rms_norm import stock as stock_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 64), (3, 5, 40), (7, 8), (2, 1024)]
WAYS = {
    "before": dict(before=Range(-0.75, 1.5)),
    "after": dict(after=Range(-0.5, 0.75)),
    "both": dict(before=Range(0.25, 1.5), after=Range(-0.5, 0.25)),  # 0 lies outside
    "silu": dict(silu=True),
    "all": dict(before=Range(-1.0, 1.5), after=Range(-0.125, 0.75), silu=True),
    "neither": {},
}


def stock(x, weight, *, before=EVERYTHING, after=EVERYTHING, silu=False):
    """The conformer's lines around a norm."""
    y = stock_norm(torch.clamp(x, *before), weight)
    return torch.clamp(F.silu(y) if silu else y, *after)


def make(shape, dtype, device, way):
    """Inputs on both sides of the range and on its ends. No gradient arrives at what rounding alone
    decides: whether a value next to the upper clamp's end is inside differs from dtype to dtype."""
    x = torch.randn(shape).to(dtype)
    for i, end in enumerate(way.get("before", ())):
        x.view(-1)[i::7] = end
    weight = (torch.randn(shape[-1]) + 0.5).to(dtype)
    dy = torch.randn(shape).to(dtype)
    y = stock(x.double(), weight.double(), **{**way, "after": EVERYTHING})
    for end in way.get("after", ()):
        dy[(y - end).abs() < 8 * torch.finfo(dtype).eps * abs(end)] = 0
    return [t.to(device) for t in (x, weight, dy)]


def run(op, x, weight, dy, way, dtype=None, *, wanted=("x", "weight")):
    x, weight = (None if t is None else t.detach().to(dtype or t.dtype) for t in (x, weight))
    leaves = {"x": x, "weight": weight}
    leaves = {k: v.requires_grad_() for k, v in leaves.items() if k in wanted and v is not None}
    y = op(x, weight, **way)
    y.backward(dy.to(y.dtype))
    return {"y": y} | {f"d{k}": v.grad for k, v in leaves.items()}


def assert_accurate(ours, eager, truth, reduced):
    assert ours.keys() == truth.keys()
    for what in truth:
        assert_no_less_accurate(ours[what], eager[what], truth[what], what=what, reduced=reduced)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_no_less_accurate_than_stock(shape, dtype, way, device, poisoned):
    inputs = make(shape, dtype, device, way)
    ours, eager = (run(op, *inputs, way) for op in (clip_norm, stock))
    truth = run(stock, *inputs, way, torch.float64)
    assert_accurate(ours, eager, truth, max(shape[-1], inputs[0].numel() // shape[-1]))
    assert ours["y"].is_contiguous()


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_without_weight(way, device, poisoned):
    x, _, _ = make((5, 24), torch.float32, device, way)
    dy = torch.randn_like(x)
    ours, eager = (run(op, x, None, dy, way) for op in (clip_norm, stock))
    truth = run(stock, x, None, dy, way, torch.float64)
    assert_accurate(ours, eager, truth, 24)


@pytest.mark.parametrize("wanted", ["x", "weight"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_each_gradient_alone(wanted, way, device, poisoned):
    inputs = make((300, 16), torch.bfloat16, device, way)
    every, one = (run(clip_norm, *inputs, way, wanted=w) for w in (("x", "weight"), (wanted,)))
    assert torch.equal(one[f"d{wanted}"], every[f"d{wanted}"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype, device, poisoned):
    way = WAYS["all"]
    x, weight, dy = make((4, 3, 24), dtype, device, way)
    want = run(clip_norm, x, weight, dy, way)

    def padded(t):
        wide = torch.full((*t.shape[:-1], 40), float("nan"), dtype=dtype, device=device)
        wide[..., 8:32] = t
        return wide[..., 8:32]

    for change in (padded, lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2)):
        got = run(clip_norm, change(x), weight, change(dy), way)
        assert all(torch.equal(got[k], want[k]) for k in want)


def test_huge_values_are_held_before_they_are_squared(device):
    x = torch.tensor([[3e38, -3e38, 1.0, 0.0]], device=device)
    y = clip_norm(x, None, before=Range(-1e10, 1e10))
    assert torch.isfinite(y).all()


def test_weight_gradients_over_more_tiles_than_partial_sums(device, monkeypatch, poisoned):
    monkeypatch.setattr(shared, "PARTIAL_SUMS", 3)
    way = WAYS["both"]
    inputs = make((4 * 256 + 9, 8), torch.float32, device, way)
    ours, eager = (run(op, *inputs, way) for op in (clip_norm, stock))
    assert_accurate(ours, eager, run(stock, *inputs, way, torch.float64), len(inputs[0]))


def test_no_rows(device):
    out = run(clip_norm, *(torch.empty(*s, device=device) for s in ((0, 16), (16,), (0, 16))), {})
    assert out["y"].shape == out["dx"].shape == (0, 16) and out["dweight"].count_nonzero() == 0


def test_repeat_run_is_bitwise_the_same(device):
    inputs = make((700, 8), torch.float32, device, WAYS["all"])
    first, second = (run(clip_norm, *inputs, WAYS["all"]) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_kernel_equals_reference(way, device):
    inputs = make((4, 48), torch.float32, device, way)
    ours, reference = (run(op, *inputs, way) for op in (clip_norm, clip_norm_ref))
    for what in ours:
        torch.testing.assert_close(ours[what], reference[what])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_reference_gradients(way):
    x, weight = torch.randn(3, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    leaves = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda *args: clip_norm_ref(*args, **way), leaves)


def test_reference_stands_in_without_a_card(references):
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(clip_norm(x, **WAYS["all"]), clip_norm_ref(x, **WAYS["all"]))


def test_errors(device):
    x = torch.randn(2, 16, device=device)
    with pytest.raises(ValueError, match=r"clip_norm: weight must have shape \(D,\) = \(16,\)"):
        clip_norm(x, torch.ones(8, device=device))
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16"):
        clip_norm(x.double())
    with pytest.raises(ValueError, match="at most 8192 wide"):
        clip_norm(torch.empty(1, 9000, device=device))


def cross_compile_cases() -> list[crosscompile.Case]:
    cases = []
    floats = ("eps", "before_low", "before_high", "after_low", "after_high")
    for width, capabilities in ((768, (80, 86, 89)), (1024, (86, 90, 120)), (1152, (89,))):
        block_r, block_d, num_warps = row_tile(width)
        tile = {"D": width, "BLOCK_R": block_r, "BLOCK_D": block_d}
        flags = dict.fromkeys(("HAS_WEIGHT", "HAS_BEFORE", "HAS_AFTER", "SILU"), True)
        options = dict(num_warps=num_warps, capabilities=capabilities)
        cases.append(
            crosscompile.Case(
                f"clip_norm_fwd D={width}",
                module._clip_norm_fwd_kernel,
                dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr"), "*bf16")
                | {"rstd_ptr": "*fp32", "n_rows": "i32", "x_row_stride": "i32"}
                | dict.fromkeys(floats, "fp32"),
                tile | flags,
                aligned=("x_row_stride",),
                **options,
            )
        )
        strides = ("dy_row_stride", "x_row_stride")
        for has_dw in (False, True):
            cases.append(
                crosscompile.Case(
                    f"clip_norm_bwd D={width} dw={has_dw}",
                    module._clip_norm_bwd_kernel,
                    dict.fromkeys(("dy_ptr", "x_ptr", "weight_ptr", "dx_ptr"), "*bf16")
                    | {"rstd_ptr": "*fp32"}
                    | ({"dw_ptr": "*fp32"} if has_dw else {})
                    | dict.fromkeys(("n_rows", "rows_per_program", *strides), "i32")
                    | dict.fromkeys(floats[1:], "fp32"),
                    tile
                    | flags
                    | {"HAS_DX": True, "HAS_DW": has_dw}
                    | ({} if has_dw else {"dw_ptr": None}),
                    aligned=strides,
                    **options,
                )
            )
    return cases


def test_compiles_for_every_card_without_spills():
    rows = crosscompile.check(__name__)
    assert {row.capability for row in rows} == set(crosscompile.SHARED_KIB)
    assert [row for row in rows if not row.fits or row.spill_bytes] == []
