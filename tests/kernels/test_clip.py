from __future__ import annotations

import math

import pytest
import torch

from gemma_accel.kernels import clip as module
from gemma_accel.kernels.clip import EVERYTHING, Range, clip, clip_ref
from tests.kernels import crosscompile

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (3, 5, 7), (2049,), (4, 64)]
RANGES = [Range(-0.5, 0.75), Range(-math.inf, 0.25), Range(-1.0, math.inf), Range(0.5, 0.5)]


def rounded(to: Range, dtype) -> Range:
    return Range(*(torch.tensor(end).to(dtype).item() for end in to))


def make(shape, dtype, device, to):
    """Values inside, outside and exactly on the ends."""
    x = torch.randn(shape).to(dtype)
    for i, end in enumerate(to):
        if math.isfinite(end):
            x.view(-1)[i::5] = end
    return x.to(device), torch.randn(shape).to(device, dtype)


def run(op, x, dy):
    x = x.detach().requires_grad_()
    y = op(x)
    y.backward(dy)
    return y, x.grad


def stock(x, to):
    """Gemma4ClippableLinear's clamps: the ends are tensors of one element."""
    low, high = (torch.tensor(end, device=x.device, dtype=x.dtype) for end in to)
    return torch.clamp(x, low, high)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("to", RANGES, ids=str)
def test_equals_torch_clamp_bitwise(shape, dtype, to, device, poisoned):
    to = rounded(to, dtype)
    x, dy = make(shape, dtype, device, to)
    for got, want in zip(
        run(lambda x: clip(x, to), x, dy), run(lambda x: stock(x, to), x, dy), strict=True
    ):
        assert got.dtype == want.dtype and torch.equal(got, want)


def test_nan_and_infinities(device):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0], device=device)
    y, dx = run(lambda x: clip(x, Range(-1, 2)), x, torch.ones_like(x))
    assert y.isnan().tolist() == [True, False, False, False] and y[1:].tolist() == [2, -1, 0]
    want = run(lambda x: stock(x, Range(-1, 2)), x, torch.ones_like(x))[1]
    assert torch.equal(dx, want)


def test_strides(device):
    x, dy = make((6, 10), torch.float32, device, RANGES[0])
    got = run(lambda x: clip(x.t(), RANGES[0]), x, dy.t())
    assert torch.equal(got[0], x.t().clamp(*RANGES[0])) and got[0].is_contiguous()
    assert torch.equal(got[1], run(lambda x: stock(x, RANGES[0]), x, dy)[1])


def test_no_range_is_no_op(device):
    x = torch.randn(3, device=device)
    assert clip(x, EVERYTHING) is x and clip_ref(x, EVERYTHING) is x


def test_nothing_is_kept_where_nothing_is_trained(device):
    assert clip(torch.randn(3, device=device), RANGES[0]).grad_fn is None


def test_no_elements(device):
    y, dx = run(lambda x: clip(x, RANGES[0]), *(torch.empty(0, 4, device=device),) * 2)
    assert y.shape == dx.shape == (0, 4)


def test_repeat_run_is_bitwise_the_same(device):
    x, dy = make((500,), torch.float32, device, RANGES[0])
    first, second = (run(lambda x: clip(x, RANGES[0]), x, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_reference_gradients():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: clip_ref(x, RANGES[0]), x)


def test_reference_stands_in_without_a_card(references):
    x = torch.randn(4, dtype=torch.float64)
    assert torch.equal(clip(x, RANGES[0]), x.clamp(*RANGES[0]))


def test_errors(device):
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16, got torch.int64"):
        clip(torch.arange(4, device=device), RANGES[0])


def cross_compile_cases() -> list[crosscompile.Case]:
    scalars = {"n": "i32", "low": "fp32", "high": "fp32"}
    return [
        crosscompile.Case(
            name,
            getattr(module, f"_{name}_kernel"),
            dict.fromkeys(pointers, "*bf16") | scalars,
            {"BLOCK": module.BLOCK},
            aligned=("n",),
        )
        for name, pointers in (
            ("clip_fwd", ("x_ptr", "y_ptr")),
            ("clip_bwd", ("dy_ptr", "x_ptr", "dx_ptr")),
        )
    ]


def test_compiles_for_every_card_without_spills():
    rows = crosscompile.check(__name__)
    assert {row.capability for row in rows} == set(crosscompile.SHARED_KIB)
    assert [row for row in rows if not row.fits or row.spill_bytes] == []
