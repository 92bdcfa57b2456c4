from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gemma_accel.kernels import clip_silu as module
from gemma_accel.kernels.clip import BLOCK, EVERYTHING, Range
from gemma_accel.kernels.clip_silu import clip_silu, clip_silu_ref
from tests.accuracy import assert_no_less_accurate
from tests.kernels import crosscompile

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (3, 5, 40), (2049,), (2, 1100)]
WAYS = {
    "both": dict(before=Range(-1.5, 2.0), after=Range(-0.125, 0.75)),
    "before": dict(before=Range(0.25, 1.5)),
    "after": dict(after=Range(-0.25, 0.5)),
    "none": {},
}


def stock(x, *, before=EVERYTHING, after=EVERYTHING):
    """Gemma4AudioFeedForward.forward between its products."""
    return torch.clamp(F.silu(torch.clamp(x, *before)), *after)


def make(shape, dtype, device, way):
    """Values on both sides of each range and on its ends. No gradient arrives at what rounding
    alone decides: whether a value next to the second clamp's end is inside."""
    x = (torch.randn(shape) * 2).to(dtype)
    for i, end in enumerate(way.get("before", ())):
        x.view(-1)[i::7] = end
    dy = torch.randn(shape).to(dtype)
    y = stock(x.double(), before=way.get("before", EVERYTHING))
    for end in way.get("after", ()):
        dy[(y - end).abs() < 8 * torch.finfo(dtype).eps * abs(end)] = 0
    return x.to(device), dy.to(device)


def run(op, x, dy, way, dtype=None):
    x = x.detach().to(dtype or x.dtype).requires_grad_()
    y = op(x, **way)
    y.backward(dy.to(y.dtype))
    return {"y": y, "dx": x.grad}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_no_less_accurate_than_stock(shape, dtype, way, device, poisoned):
    inputs = make(shape, dtype, device, way)
    ours, eager = (run(op, *inputs, way) for op in (clip_silu, stock))
    truth = run(stock, *inputs, way, torch.float64)
    for what in truth:
        assert_no_less_accurate(ours[what], eager[what], truth[what], what=what)


def test_huge_values_do_not_overflow(device):
    x = torch.tensor([-3e38, -1e4, 1e4, 3e38], device=device)
    got = run(clip_silu, x, torch.ones_like(x), {})
    assert torch.equal(got["y"], torch.where(x > 0, x, 0)) and got["dx"].tolist() == [0, 0, 1, 1]


def test_strides(device, poisoned):
    x, dy = make((6, 10), torch.float32, device, WAYS["both"])
    got, want = run(clip_silu, x.t(), dy.t(), WAYS["both"]), run(clip_silu, x, dy, WAYS["both"])
    assert all(torch.equal(got[k].t(), want[k]) for k in want)


def test_nothing_is_kept_where_nothing_is_trained(device):
    assert clip_silu(torch.randn(3, device=device)).grad_fn is None


def test_no_elements(device):
    got = run(clip_silu, *(torch.empty(0, 4, device=device) for _ in range(2)), WAYS["both"])
    assert got["y"].shape == got["dx"].shape == (0, 4)


def test_repeat_run_is_bitwise_the_same(device):
    inputs = make((500,), torch.float32, device, WAYS["both"])
    first, second = (run(clip_silu, *inputs, WAYS["both"]) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_kernel_equals_reference(way, device):
    inputs = make((4, 48), torch.float32, device, way)
    ours, reference = (run(op, *inputs, way) for op in (clip_silu, clip_silu_ref))
    for what in ours:
        torch.testing.assert_close(ours[what], reference[what])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_reference_gradients(way):
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: clip_silu_ref(x, **way), x)


def test_reference_stands_in_without_a_card(references):
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(clip_silu(x), clip_silu_ref(x))


def test_errors(device):
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16, got torch.int64"):
        clip_silu(torch.arange(4, device=device))


def cross_compile_cases() -> list[crosscompile.Case]:
    floats = ("before_low", "before_high", "after_low", "after_high")
    return [
        crosscompile.Case(
            name,
            getattr(module, f"_{name}_kernel"),
            dict.fromkeys(pointers, "*bf16") | {"n": "i32"} | dict.fromkeys(floats, "fp32"),
            {"BLOCK": BLOCK},
            aligned=("n",),
        )
        for name, pointers in (
            ("clip_silu_fwd", ("x_ptr", "y_ptr")),
            ("clip_silu_bwd", ("dy_ptr", "x_ptr", "dx_ptr")),
        )
    ]


def test_compiles_for_every_card_without_spills():
    rows = crosscompile.check(__name__)
    assert {row.capability for row in rows} == set(crosscompile.SHARED_KIB)
    assert [row for row in rows if not row.fits or row.spill_bytes] == []
