from __future__ import annotations

import itertools

import pytest
import torch

from gemma_accel.kernels import norm_add as module
from gemma_accel.kernels import rms_norm as shared
from gemma_accel.kernels.norm_add import norm_add, norm_add_ref
from gemma_accel.kernels.rms_norm import row_tile
from tests.accuracy import assert_no_less_accurate
from tests.kernels import crosscompile
from tests.kernels.test_rms_norm import stock as stock_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 64), (3, 5, 40), (7, 8), (2, 1536)]
JOINTS = {
    "plain": (),
    "next": ("next_weight",),
    "scale": ("scale",),
    "both": ("scale", "next_weight"),
}
NAMES = ("x", "residual", "weight", "next_weight")


def stock(x, residual, weight, *, scale=None, next_weight=None):
    """The lines of Gemma4TextDecoderLayer.forward around a norm and a residual sum."""
    h = residual + stock_norm(x, weight)
    if scale is not None:
        h *= scale
    return h if next_weight is None else (h, stock_norm(h, next_weight))


def make(shape, dtype, device, joint=()):
    """Inputs and gradients; the residual is far larger than the norm, as in a deep layer."""
    width = shape[-1]
    sizes = 10.0 ** torch.randint(-2, 3, (*shape[:-1], 1))
    inputs = {
        "x": torch.randn(shape) * sizes,
        "residual": torch.randn(shape) * sizes.flip(0) * 10,
        "weight": torch.randn(width) + 0.5,
        "next_weight": torch.randn(width) - 0.5,
        "scale": torch.tensor([0.37]),
    }
    inputs = {
        name: value.to(device, dtype)
        for name, value in inputs.items()
        if name in joint or name in ("x", "residual", "weight")
    }
    return inputs, [torch.randn(shape).to(device, dtype) for _ in range(2)]


def run(op, inputs, grads, dtype=None, *, wanted=NAMES, outputs=(True, True)):
    """Outputs and gradients by name; ``outputs`` says which outputs a gradient arrives at."""
    inputs = {k: v.detach().to(dtype or v.dtype) for k, v in inputs.items()}
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if k in wanted}
    out = op(**inputs)
    out = out if isinstance(out, tuple) else (out,)
    used = [(o, g.to(o.dtype)) for o, g, use in zip(out, grads, outputs, strict=False) if use]
    torch.autograd.backward([o for o, _ in used], [g for _, g in used])
    return dict(zip("hn", out, strict=False)) | {f"d{k}": v.grad for k, v in leaves.items()}


def assert_accurate(ours, eager, truth, reduced):
    assert ours.keys() == eager.keys() == truth.keys()
    for what in ours:
        if truth[what] is None:
            assert ours[what] is None
            continue
        assert_no_less_accurate(ours[what], eager[what], truth[what], what=what, reduced=reduced)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("joint", JOINTS.values(), ids=JOINTS)
def test_no_less_accurate_than_stock(shape, dtype, joint, device, poisoned):
    inputs, grads = make(shape, dtype, device, joint)
    ours = run(norm_add, inputs, grads)
    eager = run(stock, inputs, grads)
    truth = run(stock, inputs, grads, torch.float64)
    assert_accurate(ours, eager, truth, max(shape[-1], inputs["x"].numel() // shape[-1]))
    assert ours["h"].is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("outputs", [(True, False), (False, True)], ids=["h", "n"])
def test_either_output_may_go_unused(outputs, scaled, dtype, device, poisoned):
    joint = JOINTS["both" if scaled else "next"]
    inputs, grads = make((5, 48), dtype, device, joint)
    ours, eager, truth = (
        run(op, inputs, grads, to, outputs=outputs)
        for op, to in ((norm_add, None), (stock, None), (stock, torch.float64))
    )
    assert_accurate(ours, eager, truth, 48)
    assert (ours["dnext_weight"] is None) == (not outputs[1])


def gradients_alone_and_in_pairs():
    for joint, extra in JOINTS.items():
        names = [n for n in NAMES if n != "next_weight" or n in extra]
        for count in (1, 2):
            for wanted in itertools.combinations(names, count):
                yield pytest.param(extra, wanted, id=f"{joint}-{'-'.join(wanted)}")


@pytest.mark.parametrize(("joint", "wanted"), list(gradients_alone_and_in_pairs()))
def test_gradients_alone_and_in_pairs(joint, wanted, device, poisoned):
    inputs, grads = make((300, 16), torch.float32, device, joint)
    every = run(norm_add, inputs, grads)
    some = run(norm_add, inputs, grads, wanted=wanted)
    for name in wanted:
        assert torch.equal(some[f"d{name}"], every[f"d{name}"]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype, device, poisoned):
    inputs, grads = make((4, 3, 24), dtype, device, JOINTS["both"])
    want = run(norm_add, inputs, grads)

    def padded(t):
        wide = torch.full((*t.shape[:-1], 40), float("nan"), dtype=dtype, device=device)
        wide[..., 8:32] = t
        return wide[..., 8:32]

    def columns(t):
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)

    for change in (padded, columns):
        changed = {k: change(v) if k in ("x", "residual") else v for k, v in inputs.items()}
        assert not changed["x"].is_contiguous()
        got = run(
            lambda x, residual, **kw: norm_add(x, residual, **kw), changed, map(change, grads)
        )
        assert all(torch.equal(got[k], want[k]) for k in want)


def test_in_place_product_on_the_result(device):
    """Stock multiplies the layer's result by its scalar in place; without a next norm one may."""
    inputs, grads = make((3, 16), torch.float32, device)
    scale = torch.tensor([0.5], device=device)

    def in_place(op):
        def layer(**kw):
            h = op(**kw)
            h *= scale
            return h

        return layer

    ours, eager = (run(in_place(op), inputs, grads) for op in (norm_add, stock))
    for what in ours:
        torch.testing.assert_close(ours[what], eager[what])


def test_in_place_product_on_a_saved_result_is_refused_by_autograd(device):
    inputs, grads = make((3, 16), torch.float32, device, JOINTS["next"])
    inputs["x"].requires_grad_()
    h, n = norm_add(**inputs)
    h *= 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        n.backward(grads[1])


def test_residual_gradient_is_not_copied_where_it_passes_through(device):
    inputs, grads = make((3, 16), torch.float32, device)
    h, _, rstd = module.norm_add_fwd(*inputs.values(), None, None, 1e-6)
    dx, dresidual, *_ = module.norm_add_bwd(
        grads[0],
        None,
        inputs["x"],
        inputs["weight"],
        None,
        None,
        None,
        rstd,
        residual_dtype=torch.float32,
    )
    assert dresidual is grads[0] and dx is not None


@pytest.mark.parametrize("joint", JOINTS.values(), ids=JOINTS)
def test_mixed_dtypes(joint, device, poisoned):
    """Under autocast a float32 model's linears give bfloat16 and its residual stays float32."""
    inputs, grads = make((6, 32), torch.float32, device, joint)
    inputs["x"] = inputs["x"].bfloat16()
    ours, eager, truth = (
        run(op, inputs, grads, to)
        for op, to in ((norm_add, None), (stock, None), (stock, torch.float64))
    )
    assert_accurate(ours, eager, truth, 32)
    assert (ours["h"].dtype, ours["dx"].dtype) == (torch.float32, torch.bfloat16)


def test_scale_is_read_on_the_device(device, monkeypatch):
    inputs, _ = make((2, 16), torch.float32, device, JOINTS["scale"])
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("the host read a tensor"))
    monkeypatch.setattr(
        torch.Tensor, "__float__", lambda self: pytest.fail("the host read a tensor")
    )
    norm_add(**inputs)


def test_weight_gradients_over_more_tiles_than_partial_sums(device, monkeypatch, poisoned):
    monkeypatch.setattr(shared, "PARTIAL_SUMS", 3)
    inputs, grads = make((4 * 256 + 9, 8), torch.float32, device, JOINTS["both"])
    ours, eager, truth = (
        run(op, inputs, grads, to)
        for op, to in ((norm_add, None), (stock, None), (stock, torch.float64))
    )
    assert_accurate(ours, eager, truth, len(inputs["x"]))


def test_no_rows(device):
    inputs, grads = make((0, 16), torch.float32, device, JOINTS["both"])
    out = run(norm_add, inputs, grads)
    assert out["h"].shape == out["n"].shape == out["dx"].shape == (0, 16)
    assert out["dweight"].count_nonzero() == 0 == out["dnext_weight"].count_nonzero()


def test_repeat_run_is_bitwise_the_same(device):
    inputs, grads = make((700, 8), torch.float32, device, JOINTS["both"])
    first, second = (run(norm_add, inputs, grads) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("joint", JOINTS.values(), ids=JOINTS)
def test_kernel_equals_reference(joint, device):
    inputs, grads = make((4, 48), torch.float32, device, joint)
    ours, reference = (run(op, inputs, grads) for op in (norm_add, norm_add_ref))
    for what in ours:
        torch.testing.assert_close(ours[what], reference[what])


@pytest.mark.parametrize("joint", JOINTS.values(), ids=JOINTS)
def test_reference_gradients(joint):
    inputs, _ = make((3, 7), torch.float64, "cpu", joint)
    inputs["x"], inputs["residual"] = (torch.randn(3, 7, dtype=torch.float64) for _ in range(2))
    names = [n for n in NAMES if n in inputs]

    def op(*values):
        return norm_add_ref(**{**inputs, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(op, [inputs[n].requires_grad_() for n in names])


def test_reference_stands_in_without_a_card(references):
    inputs, _ = make((3, 8), torch.float64, "cpu")
    assert torch.equal(norm_add(**inputs), norm_add_ref(**inputs))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda i: {"residual": i["residual"][:1]},
            ValueError,
            r"shape of x, \(3, 16\), got \(1, 16\)",
        ),
        (
            lambda i: {"weight": torch.ones(8)},
            ValueError,
            r"weight must have shape \(D,\) = \(16,\)",
        ),
        (lambda i: {"next_weight": torch.ones(8)}, ValueError, "next_weight must have shape"),
        (
            lambda i: {"scale": torch.ones(2)},
            ValueError,
            r"scale must be one element on .*got \(2,\)",
        ),
        (
            lambda i: {"scale": i["x"].new_ones(1).requires_grad_()},
            ValueError,
            "not require a grad",
        ),
        (lambda i: {"x": i["x"].double()}, TypeError, "x must be float32, bfloat16 or float16"),
        (lambda i: {"residual": i["residual"].long()}, TypeError, "residual must be float32"),
    ],
)
def test_errors(change, error, message, device):
    inputs, _ = make((3, 16), torch.float32, device)
    with pytest.raises(error, match=message):
        norm_add(**{**inputs, **change(inputs)})


def cross_compile_cases() -> list[crosscompile.Case]:
    cases = []
    for width, capabilities in (
        (1536, (86, 89)),
        (2560, (80, 120)),
        (5376, (86, 90)),
        (8192, (89,)),
    ):
        block_r, block_d, num_warps = row_tile(width)
        tile = {"D": width, "BLOCK_R": block_r, "BLOCK_D": block_d, "HAS_SCALE": True}
        pointers = ("x_ptr", "residual_ptr", "weight_ptr", "scale_ptr", "next_weight_ptr")
        strides = ("x_row_stride", "residual_row_stride")
        cases.append(
            crosscompile.Case(
                f"norm_add_fwd D={width}",
                module._norm_add_fwd_kernel,
                dict.fromkeys((*pointers, "h_ptr", "n_ptr"), "*bf16")
                | dict.fromkeys(("n_rows", *strides), "i32")
                | {"rstd_ptr": "*fp32", "eps": "fp32"},
                {**tile, "HAS_NEXT": True},
                aligned=strides,
                num_warps=num_warps,
                capabilities=capabilities,
            )
        )
        strides = ("dh_row_stride", "dn_row_stride", "x_row_stride")
        for sums in ((), ("dw",), ("dw", "dnext")):
            pointers = ("dh_ptr", "dn_ptr", "x_ptr", "weight_ptr", "scale_ptr", "h_ptr")
            pointers += ("next_weight_ptr", "dx_ptr", "dresidual_ptr")
            flags = ("HAS_DH", "HAS_DN", "HAS_DX", "HAS_DRESIDUAL")
            absent = {f"{name}_ptr": None for name in ("dw", "dnext") if name not in sums}
            cases.append(
                crosscompile.Case(
                    f"norm_add_bwd D={width} {' '.join(sums)}",
                    module._norm_add_bwd_kernel,
                    dict.fromkeys(pointers, "*bf16")
                    | dict.fromkeys(("rstd_ptr", *(f"{name}_ptr" for name in sums)), "*fp32")
                    | dict.fromkeys(("n_rows", "rows_per_program", *strides), "i32"),
                    {**tile, **dict.fromkeys(flags, True), **absent}
                    | {"HAS_DW": "dw" in sums, "HAS_DNEXT": "dnext" in sums},
                    aligned=strides,
                    num_warps=num_warps,
                    capabilities=capabilities,
                )
            )
    return cases


def test_compiles_for_every_card_without_spills():
    rows = crosscompile.check(__name__)
    assert {row.capability for row in rows} == set(crosscompile.SHARED_KIB)
    assert [row for row in rows if not row.fits or row.spill_bytes] == []
