from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gemma_accel.kernels import clip_geglu as module
from gemma_accel.kernels.clip import EVERYTHING, Range
from gemma_accel.kernels.clip_geglu import clip_geglu, clip_geglu_bwd, clip_geglu_ref
from gemma_accel.kernels.geglu import geglu, tile
from tests.accuracy import assert_no_less_accurate
from tests.kernels import crosscompile

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 64), (3, 5, 40), (5, 1), (70, 8), (2, 1100)]
WAYS = {
    "all": dict(gate_range=Range(-1.5, 2.0), up_range=Range(0.25, 1.5), after=Range(-0.25, 0.75)),
    "inputs": dict(gate_range=Range(-1.5, 2.0), up_range=Range(-0.5, 1.5)),
    "result": dict(after=Range(-0.125, 0.5)),
    "none": {},
}


def stock(gate, up, *, gate_range=EVERYTHING, up_range=EVERYTHING, after=EVERYTHING):
    """Gemma4VisionMLP.forward between its products, their clamps included."""
    gate, up = torch.clamp(gate, *gate_range), torch.clamp(up, *up_range)
    return torch.clamp(F.gelu(gate, approximate="tanh") * up, *after)


def make(shape, dtype, device, way):
    """Values on both sides of each range and on its ends. No gradient arrives at what rounding
    alone decides: whether a product next to the last clamp's end is inside."""
    gate, up = ((torch.randn(shape) * 2).to(dtype) for _ in range(2))
    for x, name in ((gate, "gate_range"), (up, "up_range")):
        for i, end in enumerate(way.get(name, ())):
            x.view(-1)[i::7] = end
    dy = torch.randn(shape).to(dtype)
    y = stock(gate.double(), up.double(), **{**way, "after": EVERYTHING})
    for end in way.get("after", ()):
        dy[(y - end).abs() < 8 * torch.finfo(dtype).eps * abs(end)] = 0
    return [t.to(device) for t in (gate, up, dy)]


def run(op, gate, up, dy, way, dtype=None):
    gate, up = (t.detach().to(dtype or t.dtype).requires_grad_() for t in (gate, up))
    y = op(gate, up, **way)
    y.backward(dy.to(y.dtype))
    return {"y": y, "dgate": gate.grad, "dup": up.grad}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_no_less_accurate_than_stock(shape, dtype, way, device, poisoned):
    inputs = make(shape, dtype, device, way)
    ours, eager = (run(op, *inputs, way) for op in (clip_geglu, stock))
    truth = run(stock, *inputs, way, torch.float64)
    for what in truth:
        assert_no_less_accurate(ours[what], eager[what], truth[what], what=what)
    assert ours["y"].is_contiguous()


def test_without_ranges_it_is_geglu(device):
    inputs = make((6, 40), torch.float16, device, {})
    ours, plain = (run(op, *inputs, {}) for op in (clip_geglu, geglu))
    assert all(torch.equal(ours[k], plain[k]) for k in plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["halves", "columns"])
def test_strides(layout, dtype, device, poisoned):
    way = WAYS["all"]
    gate, up, dy = make((4, 3, 24), dtype, device, way)
    change = {
        "halves": lambda a, b: torch.cat((a, b), -1).chunk(2, -1),
        "columns": lambda *ts: [t.transpose(1, 2).contiguous().transpose(1, 2) for t in ts],
    }[layout]
    strided = (*change(gate, up), change(dy, dy)[1])
    assert not any(t.is_contiguous() for t in strided)
    got, want = run(clip_geglu, *strided, way), run(clip_geglu, gate, up, dy, way)
    assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize("wanted", ["gate", "up"])
def test_each_gradient_alone(wanted, device, poisoned):
    way = WAYS["all"]
    gate, up, dy = make((5, 40), torch.float32, device, way)
    every = run(clip_geglu, gate, up, dy, way)
    leaves = {"gate": gate, "up": up}
    leaves[wanted].requires_grad_()
    clip_geglu(gate, up, **way).backward(dy)
    assert torch.equal(leaves[wanted].grad, every[f"d{wanted}"])


def test_only_needed_gradients_are_computed(device):
    gate, up, dy = make((3, 16), torch.float32, device, {})
    ranges = (EVERYTHING,) * 3
    assert clip_geglu_bwd(dy, gate, up, *ranges, needs_dgate=False)[0] is None
    assert clip_geglu_bwd(dy, gate, up, *ranges, needs_dup=False)[1] is None


def test_mixed_dtypes(device):
    gate, up, dy = make((3, 16), torch.float32, device, {})
    got = run(clip_geglu, gate.bfloat16(), up, dy, WAYS["all"])
    assert [t.dtype for t in got.values()] == [torch.float32, torch.bfloat16, torch.float32]


def test_no_rows(device):
    got = run(clip_geglu, *(torch.empty(0, 16, device=device) for _ in range(3)), WAYS["all"])
    assert all(t.shape == (0, 16) for t in got.values())


def test_repeat_run_is_bitwise_the_same(device):
    inputs = make((7, 300), torch.float32, device, WAYS["all"])
    first, second = (run(clip_geglu, *inputs, WAYS["all"]) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_kernel_equals_reference(way, device):
    inputs = make((4, 48), torch.float32, device, way)
    ours, reference = (run(op, *inputs, way) for op in (clip_geglu, clip_geglu_ref))
    for what in ours:
        torch.testing.assert_close(ours[what], reference[what])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_reference_gradients(way):
    gate, up = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *args: clip_geglu_ref(*args, **way), (gate, up))


def test_reference_stands_in_without_a_card(references):
    gate, up = torch.randn(2, 3, 8, dtype=torch.float64)
    way = WAYS["all"]
    assert torch.equal(clip_geglu(gate, up, **way), clip_geglu_ref(gate, up, **way))


def test_errors(device):
    gate = torch.randn(2, 16, device=device)
    with pytest.raises(ValueError, match=r"clip_geglu: up must be like gate, \(2, 16\) on .*"):
        clip_geglu(gate, gate[:, :8])
    with pytest.raises(TypeError, match="up must be float32, bfloat16 or float16, got torch.int64"):
        clip_geglu(gate, gate.long())


def cross_compile_cases() -> list[crosscompile.Case]:
    floats = [f"{what}_{end}" for what in ("gate", "up", "after") for end in ("low", "high")]
    block_r, block_f, _ = tile(5040, 3072)
    blocks = {"BLOCK_R": block_r, "BLOCK_F": block_f}
    forward = ("gate_row_stride", "up_row_stride")
    backward = ("dy_row_stride", *forward)
    inputs = ("gate_ptr", "up_ptr")
    return [
        crosscompile.Case(
            name,
            kernel,
            dict.fromkeys((*inputs, *others), "*bf16")
            | dict.fromkeys(("n_rows", "width", *strides), "i32")
            | dict.fromkeys(floats, "fp32"),
            blocks | flags,
            aligned=("width", *strides),
        )
        for name, kernel, others, strides, flags in (
            ("clip_geglu_fwd", module._clip_geglu_fwd_kernel, ("y_ptr",), forward, {}),
            (
                "clip_geglu_bwd",
                module._clip_geglu_bwd_kernel,
                ("dy_ptr", "dgate_ptr", "dup_ptr"),
                backward,
                dict.fromkeys(("HAS_DGATE", "HAS_DUP"), True),
            ),
        )
    ]


def test_compiles_for_every_card_without_spills():
    rows = crosscompile.check(__name__)
    assert {row.capability for row in rows} == set(crosscompile.SHARED_KIB)
    assert [row for row in rows if not row.fits or row.spill_bytes] == []
