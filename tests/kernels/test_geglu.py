from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gemma_accel.kernels import geglu as module
from gemma_accel.kernels.geglu import geglu, geglu_bwd, geglu_fwd, geglu_ref
from tests.accuracy import assert_no_less_accurate
from tests.kernels import crosscompile

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 64), (3, 5, 40), (5, 1), (130, 8), (2, 1100), (1, 2048)]


def stock(gate, up):
    """Gemma4TextMLP.forward between its projections."""
    return F.gelu(gate, approximate="tanh") * up


def make(shape, dtype, device):
    """Gates from the flat to the saturated ends of the activation, exact zeros among them."""
    gate = torch.randn(shape) * 10.0 ** torch.randint(-3, 2, shape)
    gate.view(-1)[::7] = 0
    return [t.to(device, dtype) for t in (gate, torch.randn(shape), torch.randn(shape))]


def run(op, gate, up, dy, dtype=None):
    gate, up = (t.detach().to(dtype or t.dtype).requires_grad_() for t in (gate, up))
    y = op(gate, up)
    y.backward(dy.to(y.dtype))
    return {"y": y, "dgate": gate.grad, "dup": up.grad}


def assert_accurate(ours, eager, truth):
    for what in truth:
        assert_no_less_accurate(ours[what], eager[what], truth[what], what=what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_less_accurate_than_stock(shape, dtype, device, poisoned):
    inputs = make(shape, dtype, device)
    ours = run(geglu, *inputs)
    assert_accurate(ours, run(stock, *inputs), run(stock, *inputs, torch.float64))
    assert ours["y"].is_contiguous()


@pytest.mark.parametrize("sign", [1, -1])
def test_every_size_of_gate(sign, device):
    """Each binade on its own, so that the small values count: no more wrong than float32 can be."""
    for exponent in range(-30, 4):
        gate = sign * torch.linspace(1, 2, 65, device=device) * 2.0**exponent
        ones = torch.ones_like(gate)
        ours, eager = run(geglu, gate, ones, ones), run(stock, gate, ones, ones)
        truth = run(stock, gate, ones, ones, torch.float64)
        assert_accurate(ours, eager, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_gates_neither_overflow_nor_make_nan(dtype, device):
    huge = torch.finfo(dtype).max
    gate = torch.tensor([-huge, -1e4, -40.0, 40.0, 1e4, huge], device=device, dtype=dtype)
    got = run(geglu, gate, torch.ones_like(gate), torch.ones_like(gate))
    expected = torch.where(gate > 0, gate, 0)
    assert torch.equal(got["y"], expected) and torch.equal(got["dup"], expected)
    assert torch.equal(got["dgate"], (gate > 0).to(dtype))


def test_nan_stays_nan(device):
    gate = torch.tensor([float("nan"), 1.0], device=device)
    got = run(geglu, gate, torch.ones_like(gate), torch.ones_like(gate))
    assert [t.isnan().tolist() for t in (got["y"], got["dgate"])] == [[True, False]] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["halves", "columns", "transposed"])
def test_strides(layout, dtype, device, poisoned):
    gate, up, dy = make((4, 3, 24), dtype, device)
    change = {
        "halves": lambda a, b: torch.cat((a, b), -1).chunk(2, -1),
        "columns": lambda *ts: [t.transpose(1, 2).contiguous().transpose(1, 2) for t in ts],
        "transposed": lambda *ts: [t.transpose(0, 1).contiguous().transpose(0, 1) for t in ts],
    }[layout]
    strided = (*change(gate, up), change(dy, dy)[1])
    assert not any(t.is_contiguous() for t in strided)
    got, want = run(geglu, *strided), run(geglu, gate, up, dy)
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_halves_are_not_copied(device, monkeypatch):
    both = torch.randn(3, 5, 32, device=device)
    for name in ("contiguous", "clone", "copy_"):
        monkeypatch.setattr(torch.Tensor, name, lambda *a, **k: pytest.fail("copied"))
    gate, up = both.chunk(2, -1)
    geglu_bwd(geglu_fwd(gate, up), gate, up)


@pytest.mark.parametrize("wanted", ["gate", "up"])
def test_each_gradient_alone(wanted, device, poisoned):
    gate, up, dy = make((5, 40), torch.float32, device)
    every = run(geglu, gate, up, dy)
    leaves = {"gate": gate, "up": up}
    leaves[wanted].requires_grad_()
    geglu(gate, up).backward(dy)
    assert torch.equal(leaves[wanted].grad, every[f"d{wanted}"])


def test_only_needed_gradients_are_computed(device):
    gate, up, dy = make((3, 16), torch.float32, device)
    assert geglu_bwd(dy, gate, up, needs_dgate=False)[0] is None
    assert geglu_bwd(dy, gate, up, needs_dup=False)[1] is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", ["halves", "swapped", "product over dy", "only the product"])
def test_backward_in_place(place, dtype, device, poisoned):
    gate, up, dy = make((5, 48), dtype, device)
    want, product = run(geglu, gate, up, dy), geglu(gate, up)
    both = torch.cat((gate, up), -1)
    g, u = both.chunk(2, -1)
    buffers = {
        "halves": {"dgate": g, "dup": u, "out": torch.empty_like(dy)},
        "swapped": {"dgate": u, "dup": g, "out": torch.empty_like(dy)},
        "product over dy": {"dgate": g, "dup": u, "out": dy},
        "only the product": {"out": u, "needs_dgate": False, "needs_dup": False},
    }[place]
    dgate, dup = geglu_bwd(dy, g, u, **buffers)
    assert torch.equal(buffers["out"], product)
    if "dgate" in buffers:
        assert dgate is buffers["dgate"] and dup is buffers["dup"]
        assert torch.equal(dgate, want["dgate"]) and torch.equal(dup, want["dup"])


def test_a_result_that_would_be_copied_is_refused(device):
    gate, up, dy = make((4, 6), torch.float32, device)
    with pytest.raises(ValueError, match="rows one stride apart, got strides"):
        geglu_bwd(dy, gate, up, dgate=torch.empty(6, 4, device=device).t())


def test_mixed_dtypes(device):
    gate, up, dy = make((3, 16), torch.float32, device)
    got = run(geglu, gate.bfloat16(), up, dy)
    assert [t.dtype for t in got.values()] == [torch.float32, torch.bfloat16, torch.float32]


def test_no_rows(device):
    got = run(geglu, *(torch.empty(0, 16, device=device) for _ in range(3)))
    assert all(t.shape == (0, 16) for t in got.values())


def test_repeat_run_is_bitwise_the_same(device):
    inputs = make((7, 300), torch.float32, device)
    first, second = (run(geglu, *inputs) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_kernel_equals_reference(device):
    inputs = make((4, 48), torch.float32, device)
    ours, reference = run(geglu, *inputs), run(geglu_ref, *inputs)
    for what in ours:
        torch.testing.assert_close(ours[what], reference[what])


def test_reference_gradients():
    gate, up = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(geglu_ref, (gate, up))


def test_reference_stands_in_without_a_card(references):
    gate, up = torch.randn(2, 3, 8, dtype=torch.float64)
    assert torch.equal(geglu(gate, up), geglu_ref(gate, up))


def test_errors(device):
    gate = torch.randn(2, 16, device=device)
    with pytest.raises(ValueError, match=r"up must be like gate, \(2, 16\) on .*, got \(2, 8\)"):
        geglu(gate, gate[:, :8])
    with pytest.raises(ValueError, match="on meta"):
        geglu(gate, gate.to("meta"))
    with pytest.raises(TypeError, match="up must be float32, bfloat16 or float16, got torch.int64"):
        geglu(gate, gate.long())


def cross_compile_cases() -> list[crosscompile.Case]:
    forward = ("gate_row_stride", "up_row_stride")
    backward = ("dy_row_stride", *forward, "dgate_row_stride", "dup_row_stride", "out_row_stride")
    inputs, results = ("gate_ptr", "up_ptr"), ("dgate_ptr", "dup_ptr", "out_ptr")
    block_r, block_f, _ = module.tile(4096, 6144)
    blocks = {"BLOCK_R": block_r, "BLOCK_F": block_f}
    return [
        crosscompile.Case(
            "geglu_fwd",
            module._geglu_fwd_kernel,
            dict.fromkeys((*inputs, "y_ptr"), "*bf16")
            | dict.fromkeys(("n_rows", "width", *forward), "i32"),
            blocks,
            aligned=("width", *forward),
        ),
        crosscompile.Case(
            "geglu_bwd",
            module._geglu_bwd_kernel,
            dict.fromkeys(("dy_ptr", *inputs, *results), "*bf16")
            | dict.fromkeys(("n_rows", "width", *backward), "i32"),
            blocks | dict.fromkeys(("HAS_DGATE", "HAS_DUP", "HAS_OUT", "IN_PLACE"), True),
            aligned=("width", *backward),
        ),
    ]


def test_compiles_for_every_card_without_spills():
    rows = crosscompile.check(__name__)
    assert {row.capability for row in rows} == set(crosscompile.SHARED_KIB)
    assert [row for row in rows if not row.fits or row.spill_bytes] == []
