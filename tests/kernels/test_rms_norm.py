from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gemma_accel.kernels import rms_norm as module
from gemma_accel.kernels.rms_norm import rms_norm, rms_norm_ref, row_tile
from tests.accuracy import assert_no_less_accurate
from tests.kernels import crosscompile

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 64), (3, 5, 40), (2, 3, 2, 256), (7, 8), (600, 8), (2, 1536), (1, 8192)]


def stock(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """Gemma4RMSNorm.forward; a float64 input stays float64, for the truth."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    y = y * torch.pow(y.pow(2).mean(-1, keepdim=True) + eps, -0.5)
    if weight is not None:
        y = y * weight.to(wide)
    return y.type_as(x)


def make(shape, dtype, device):
    """Rows whose sizes differ by powers of ten, a row of zeros, a weight on both sides of zero."""
    x = torch.randn(shape) * 10.0 ** torch.randint(-3, 3, (*shape[:-1], 1))
    if x.numel() > 2 * shape[-1]:
        x.view(-1, shape[-1])[1] = 0
    weight = torch.randn(shape[-1]) + 0.5
    return x.to(device, dtype), weight.to(device, dtype), torch.randn(shape).to(device, dtype)


def run(op, x, weight, dy, dtype):
    """Output and gradients of ``op`` at ``dtype``."""
    x = x.detach().to(dtype).requires_grad_()
    weight = None if weight is None else weight.detach().to(dtype).requires_grad_()
    y = op(x, weight)
    y.backward(dy.to(dtype))
    return y, x.grad, None if weight is None else weight.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scaled", [True, False], ids=["weight", "plain"])
def test_no_less_accurate_than_stock(shape, dtype, scaled, device, poisoned):
    x, weight, dy = make(shape, dtype, device)
    weight = weight if scaled else None
    ours = run(rms_norm, x, weight, dy, dtype)
    eager = run(stock, x, weight, dy, dtype)
    truth = run(stock, x, weight, dy, torch.float64)
    rows = x.numel() // shape[-1]
    for what, reduced, *triple in zip(
        ("y", "dx", "dw"), (shape[-1], shape[-1], rows), ours, eager, truth, strict=True
    ):
        if triple[0] is not None:
            assert_no_less_accurate(*triple, what=what, reduced=reduced)
    assert ours[0].is_contiguous()


def test_small_rows_are_judged_on_their_own(device):
    """The norm removes the size of a row, so tiny rows weigh as much as the others."""
    x = torch.tensor([1e-3, 1.0, 1e4], device=device)[:, None] * torch.randn(3, 32, device=device)
    torch.testing.assert_close(rms_norm(x), stock(x, None))
    assert rms_norm(x)[0].norm() > 1  # 1e-3 is far above eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["slice", "layer", "columns", "transposed", "expanded"])
def test_strides(layout, dtype, device, poisoned):
    base, weight, _ = make((4, 6, 3, 24), dtype, device)
    x = {
        "slice": base[..., 8:20],  # a row stride that is not the width
        "layer": base[:, :, 1, :],  # one layer of a per-layer tensor
        "columns": base.transpose(2, 3),  # the last dimension itself is strided
        "transposed": base.transpose(0, 1),  # leading dimensions without a common stride
        "expanded": base[:, :1].expand(4, 5, 3, 24),
    }[layout]
    weight = weight[: x.shape[-1]] if layout != "columns" else weight[:3]
    dy = torch.randn(x.shape).to(x)
    assert not x.is_contiguous()
    got = run(rms_norm, x, weight, dy, dtype)
    want = run(rms_norm, x.contiguous(), weight, dy, dtype)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_strided_and_broadcast_gradients(device, poisoned):
    x, weight, dy = make((5, 24), torch.float32, device)
    wide = torch.stack([dy, dy], -1)
    for incoming in (wide[..., 0], dy[:1].expand(5, 24), dy[:1, :1].expand(5, 24)):
        got = run(rms_norm, x, weight, incoming, torch.float32)
        want = run(rms_norm, x, weight, incoming.contiguous(), torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_each_gradient_alone(wanted, device, poisoned):
    x, weight, dy = make((300, 16), torch.float32, device)
    both = run(rms_norm, x, weight, dy, torch.float32)
    x = x.clone().requires_grad_(wanted == "x")
    weight = weight.clone().requires_grad_(wanted == "weight")
    rms_norm(x, weight).backward(dy)
    grads = {"x": x.grad, "weight": weight.grad}
    expected = dict(zip(("x", "weight"), both[1:], strict=True))
    assert torch.equal(grads[wanted], expected[wanted])
    assert all(g is None for name, g in grads.items() if name != wanted)


def test_only_needed_gradients_are_computed(device, monkeypatch):
    asked = []
    original = module.rms_norm_bwd
    monkeypatch.setattr(
        module, "rms_norm_bwd", lambda *a, **k: (asked.append(k), original(*a, **k))[1]
    )
    x, weight, dy = make((3, 16), torch.float32, device)
    rms_norm(x.requires_grad_(), weight).backward(dy)
    assert asked == [{"needs_dx": True, "needs_dw": False}]


def test_weight_gradient_over_more_tiles_than_partial_sums(device, monkeypatch, poisoned):
    """Programs then take several tiles each, the last one fewer, the last tile not full."""
    monkeypatch.setattr(module, "PARTIAL_SUMS", 3)
    x, weight, dy = make((4 * 256 + 9, 8), torch.float32, device)
    block_r, _, _ = row_tile(8)
    assert module.share_rows(x.shape[0], block_r, True)[1] <= 3
    ours = run(rms_norm, x, weight, dy, torch.float32)
    eager = run(stock, x, weight, dy, torch.float32)
    truth = run(stock, x, weight, dy, torch.float64)
    for what, *triple in zip(("y", "dx", "dw"), ours, eager, truth, strict=True):
        assert_no_less_accurate(*triple, what=what, reduced=x.shape[0])


def test_mixed_dtypes(device):
    """A float32 weight on bfloat16 rows: the output follows x, each gradient its own input."""
    x, weight, dy = make((6, 32), torch.bfloat16, device)
    weight = weight.float().requires_grad_()
    x.requires_grad_()
    y = rms_norm(x, weight)
    y.backward(dy)
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )


def test_eps_counts(device):
    x = torch.full((2, 16), 1e-3, device=device)
    torch.testing.assert_close(rms_norm(x, eps=1e-2), stock(x, None, 1e-2))
    assert not torch.allclose(rms_norm(x, eps=1e-2), rms_norm(x))


def test_no_rows(device):
    x = torch.empty(0, 5, 16, device=device, requires_grad=True)
    weight = torch.ones(16, device=device, requires_grad=True)
    y = rms_norm(x, weight)
    y.sum().backward()
    assert y.shape == x.shape and x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_repeat_run_is_bitwise_the_same(device):
    x, weight, dy = make((700, 8), torch.float32, device)
    first, second = (run(rms_norm, x, weight, dy, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_double_backward_is_refused(device):
    x = torch.randn(2, 8, device=device, requires_grad=True)
    dy = torch.randn(2, 8, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(rms_norm(x), x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_kernel_equals_reference(device):
    x, weight, dy = make((4, 48), torch.float32, device)
    for a, b in zip(
        run(rms_norm, x, weight, dy, torch.float32),
        run(rms_norm_ref, x, weight, dy, torch.float32),
        strict=True,
    ):
        # a card's rsqrt is good to two units, and dx is a difference of two numbers of x's size
        torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-5)


def test_reference_gradients():
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rms_norm_ref, (x, weight))
    assert torch.autograd.gradcheck(rms_norm_ref, (x,))


def test_reference_stands_in_without_a_card(references):
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(rms_norm(x), rms_norm_ref(x))


def test_errors(device):
    x = torch.randn(2, 16, device=device)
    with pytest.raises(ValueError, match=r"shape \(D,\) = \(16,\), got \(8,\)\. Pass"):
        rms_norm(x, torch.ones(8, device=device))
    with pytest.raises(ValueError, match="weight must be on .*, got meta"):
        rms_norm(x, torch.ones(16, device="meta"))
    with pytest.raises(TypeError, match="float32, bfloat16 or float16, got torch.float64"):
        rms_norm(x.double())
    with pytest.raises(ValueError, match="at most 8192 wide, got 8193"):
        rms_norm(torch.empty(1, 8193, device=device))


def cross_compile_cases() -> list[crosscompile.Case]:
    cases = []
    for width, capabilities in (
        (256, (86, 120)),
        (1536, (89,)),
        (2560, (80, 90)),
        (5376, (86, 90)),
        (8192, (89,)),
    ):
        block_r, block_d, num_warps = row_tile(width)
        tile = {"D": width, "BLOCK_R": block_r, "BLOCK_D": block_d, "HAS_WEIGHT": True}
        forward = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "y_ptr": "*bf16", "rstd_ptr": "*fp32"}
        cases.append(
            crosscompile.Case(
                f"rms_norm_fwd D={width}",
                module._rms_norm_fwd_kernel,
                {**forward, "n_rows": "i32", "x_row_stride": "i32", "eps": "fp32"},
                tile,
                num_warps=num_warps,
                aligned=("x_row_stride",),
                capabilities=capabilities,
            )
        )
        for has_dw in (False, True):
            pointers = ("dy_ptr", "x_ptr", "weight_ptr", "dx_ptr")
            signature = {name: "*bf16" for name in pointers} | {"rstd_ptr": "*fp32"}
            signature |= {"dw_ptr": "*fp32"} if has_dw else {}
            integers = ("n_rows", "rows_per_program", "dy_row_stride", "x_row_stride")
            cases.append(
                crosscompile.Case(
                    f"rms_norm_bwd D={width}{' dw' * has_dw}",
                    module._rms_norm_bwd_kernel,
                    signature | {name: "i32" for name in integers},
                    {**tile, "HAS_DX": True, "HAS_DW": has_dw}
                    | ({} if has_dw else {"dw_ptr": None}),
                    num_warps=num_warps,
                    aligned=integers[2:],
                    capabilities=capabilities,
                )
            )
    return cases


def test_compiles_for_every_card_without_spills():
    rows = crosscompile.check(__name__)
    assert {row.capability for row in rows} == set(crosscompile.SHARED_KIB)
    assert [row for row in rows if not row.fits or row.spill_bytes] == []
