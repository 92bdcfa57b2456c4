from __future__ import annotations

import itertools

import pytest
import torch

from gemma_accel.kernels import clip_norm_add as module
from gemma_accel.kernels import rms_norm as shared
from gemma_accel.kernels.clip import EVERYTHING, Range
from gemma_accel.kernels.clip_norm_add import clip_norm_add, clip_norm_add_ref
from gemma_accel.kernels.rms_norm import row_tile
from tests.accuracy import assert_no_less_accurate
from tests.kernels import crosscompile
from tests.kernels.test_rms_norm import stock as stock_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 64), (3, 5, 40), (7, 8), (2, 1024)]
NEXT = {"next": True}
JOINTS = {
    "plain": {},
    "before": dict(before=Range(-0.75, 1.5)),
    "next": NEXT,
    "vision": NEXT | dict(before=Range(0.25, 1.5), after=Range(-0.5, 0.25)),  # 0 lies outside
    "audio": dict(before=Range(-0.75, 1.5), scale=0.5),
    "all": NEXT | dict(before=Range(-1.0, 0.5), after=Range(-0.5, 0.75), scale=0.5),
}
NAMES = ("x", "residual", "weight", "next_weight")


def options(joint):
    return {k: v for k, v in joint.items() if k != "next"}


def stock(x, residual, weight, next_weight=None, *, before=EVERYTHING, after=EVERYTHING, scale=1.0):
    """The towers' lines around a post-norm: Gemma4VisionEncoderLayer, Gemma4AudioFeedForward."""
    h = stock_norm(torch.clamp(x, *before), weight)
    if scale != 1.0:
        h = h * scale
    h = h + residual
    if next_weight is None:
        return h
    return h, torch.clamp(stock_norm(h, next_weight), *after)


def make(shape, dtype, device, joint):
    """Values on both sides of a range and on its ends. No gradient arrives at what rounding alone
    decides: whether a value next to the next clamp's end is inside."""
    inputs = {
        "x": torch.randn(shape),
        "residual": torch.randn(shape) * 3,
        "weight": torch.randn(shape[-1]) + 0.5,
    }
    if "next" in joint:
        inputs["next_weight"] = torch.randn(shape[-1]) - 0.5
    inputs = {k: v.to(dtype) for k, v in inputs.items()}
    for i, end in enumerate(joint.get("before", ())):
        inputs["x"].view(-1)[i::7] = end
    grads = [torch.randn(shape).to(dtype) for _ in range(2)]
    if "after" in joint:
        loose = {k: v.double() for k, v in inputs.items()}
        _, n = stock(**loose, **{**options(joint), "after": EVERYTHING})
        for end in joint["after"]:
            grads[1][
                (n - end).abs() < 0.05 if dtype != torch.float32 else (n - end).abs() < 1e-5
            ] = 0
    return {k: v.to(device) for k, v in inputs.items()}, [g.to(device) for g in grads]


def run(op, inputs, grads, joint, dtype=None, *, wanted=NAMES, outputs=(True, True)):
    inputs = {k: v.detach().to(dtype or v.dtype) for k, v in inputs.items()}
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if k in wanted}
    out = op(**inputs, **options(joint))
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


def all_three(inputs, grads, joint, **how):
    return (
        run(op, inputs, grads, joint, to, **how)
        for op, to in ((clip_norm_add, None), (stock, None), (stock, torch.float64))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("joint", JOINTS.values(), ids=JOINTS)
def test_no_less_accurate_than_stock(shape, dtype, joint, device, poisoned):
    inputs, grads = make(shape, dtype, device, joint)
    ours, eager, truth = all_three(inputs, grads, joint)
    assert_accurate(ours, eager, truth, max(shape[-1], inputs["x"].numel() // shape[-1]))
    assert ours["h"].is_contiguous()


@pytest.mark.parametrize("outputs", [(True, False), (False, True)], ids=["h", "n"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_either_output_may_go_unused(outputs, dtype, device, poisoned):
    joint = JOINTS["all"]
    inputs, grads = make((5, 48), dtype, device, joint)
    ours, eager, truth = all_three(inputs, grads, joint, outputs=outputs)
    assert_accurate(ours, eager, truth, 48)
    assert (ours["dnext_weight"] is None) == (not outputs[1])


@pytest.mark.parametrize("wanted", [c for n in (1, 2) for c in itertools.combinations(NAMES, n)])
def test_gradients_alone_and_in_pairs(wanted, device, poisoned):
    joint = JOINTS["all"]
    inputs, grads = make((300, 16), torch.float32, device, joint)
    every = run(clip_norm_add, inputs, grads, joint)
    some = run(clip_norm_add, inputs, grads, joint, wanted=wanted)
    for name in wanted:
        assert torch.equal(some[f"d{name}"], every[f"d{name}"]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype, device, poisoned):
    joint = JOINTS["all"]
    inputs, grads = make((4, 3, 24), dtype, device, joint)
    want = run(clip_norm_add, inputs, grads, joint)

    def padded(t):
        wide = torch.full((*t.shape[:-1], 40), float("nan"), dtype=dtype, device=device)
        wide[..., 8:32] = t
        return wide[..., 8:32]

    for change in (padded, lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2)):
        changed = {k: change(v) if k in ("x", "residual") else v for k, v in inputs.items()}
        got = run(clip_norm_add, changed, [change(g) for g in grads], joint)
        assert all(torch.equal(got[k], want[k]) for k in want)


def test_residual_gradient_is_not_copied_where_it_passes_through(device):
    joint = JOINTS["audio"]
    inputs, grads = make((3, 16), torch.float32, device, joint)
    how = (joint["scale"], joint["before"], EVERYTHING)
    _, _, rstd = module.clip_norm_add_fwd(*inputs.values(), None, 1e-6, *how)
    x, weight = inputs["x"], inputs["weight"]
    dx, dresidual, *_ = module.clip_norm_add_bwd(
        grads[0], None, x, weight, None, None, rstd, *how, residual_dtype=torch.float32
    )
    assert dresidual is grads[0] and dx is not None


@pytest.mark.parametrize("joint", JOINTS.values(), ids=JOINTS)
def test_mixed_dtypes(joint, device, poisoned):
    """Under autocast a float32 model's linears give bfloat16 and its residual stays float32."""
    inputs, grads = make((6, 32), torch.float32, device, joint)
    inputs["x"] = inputs["x"].bfloat16()
    ours, eager, truth = all_three(inputs, grads, joint)
    assert_accurate(ours, eager, truth, 32)
    assert (ours["h"].dtype, ours["dx"].dtype) == (torch.float32, torch.bfloat16)


def test_weight_gradients_over_more_tiles_than_partial_sums(device, monkeypatch, poisoned):
    monkeypatch.setattr(shared, "PARTIAL_SUMS", 3)
    joint = JOINTS["all"]
    inputs, grads = make((4 * 256 + 9, 8), torch.float32, device, joint)
    ours, eager, truth = all_three(inputs, grads, joint)
    assert_accurate(ours, eager, truth, len(inputs["x"]))


def test_no_rows(device):
    inputs, grads = make((0, 16), torch.float32, device, JOINTS["all"])
    out = run(clip_norm_add, inputs, grads, JOINTS["all"])
    assert out["h"].shape == out["n"].shape == out["dx"].shape == (0, 16)


def test_repeat_run_is_bitwise_the_same(device):
    inputs, grads = make((700, 8), torch.float32, device, JOINTS["all"])
    first, second = (run(clip_norm_add, inputs, grads, JOINTS["all"]) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("joint", JOINTS.values(), ids=JOINTS)
def test_kernel_equals_reference(joint, device):
    inputs, grads = make((4, 48), torch.float32, device, joint)
    ours, reference = (run(op, inputs, grads, joint) for op in (clip_norm_add, clip_norm_add_ref))
    for what in ours:
        torch.testing.assert_close(ours[what], reference[what])


@pytest.mark.parametrize("joint", JOINTS.values(), ids=JOINTS)
def test_reference_gradients(joint):
    inputs, _ = make((3, 7), torch.float64, "cpu", joint)
    inputs["x"], inputs["residual"] = (torch.randn(3, 7, dtype=torch.float64) for _ in range(2))

    def op(*values):
        named = dict(zip(inputs, values, strict=True))
        return clip_norm_add_ref(**named, **options(joint))

    assert torch.autograd.gradcheck(op, [v.requires_grad_() for v in inputs.values()])


def test_reference_stands_in_without_a_card(references):
    inputs, _ = make((3, 8), torch.float64, "cpu", {})
    assert torch.equal(clip_norm_add(**inputs), clip_norm_add_ref(**inputs))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda i: {"residual": i["residual"][:1]}, ValueError, r"shape of x, \(3, 16\), got \(1,"),
        (lambda i: {"weight": torch.ones(8)}, ValueError, r"weight must have shape \(D,\) = \(16"),
        (lambda i: {"next_weight": torch.ones(8)}, ValueError, "next_weight must have shape"),
        (lambda i: {"x": i["x"].double()}, TypeError, "x must be float32, bfloat16 or float16"),
        (lambda i: {"residual": i["residual"].long()}, TypeError, "residual must be float32"),
    ],
)
def test_errors(change, error, message, device):
    inputs, _ = make((3, 16), torch.float32, device, {})
    with pytest.raises(error, match=message):
        clip_norm_add(**{**inputs, **change(inputs)})


def cross_compile_cases() -> list[crosscompile.Case]:
    cases = []
    floats = ("scale", "before_low", "before_high", "after_low", "after_high")
    for width, capabilities in ((768, (80, 86, 89)), (1024, (86, 90, 120)), (1152, (89,))):
        block_r, block_d, num_warps = row_tile(width)
        tile = {"D": width, "BLOCK_R": block_r, "BLOCK_D": block_d}
        tile |= {"HAS_BEFORE": True, "HAS_AFTER": True}
        pointers = ("x_ptr", "residual_ptr", "weight_ptr", "next_weight_ptr", "h_ptr", "n_ptr")
        strides = ("x_row_stride", "residual_row_stride")
        how = dict(num_warps=num_warps, capabilities=capabilities)
        cases.append(
            crosscompile.Case(
                f"clip_norm_add_fwd D={width}",
                module._clip_norm_add_fwd_kernel,
                dict.fromkeys(pointers, "*bf16")
                | dict.fromkeys(("n_rows", *strides), "i32")
                | {"rstd_ptr": "*fp32"}
                | dict.fromkeys(("eps", *floats), "fp32"),
                {**tile, "HAS_NEXT": True},
                aligned=strides,
                **how,
            )
        )
        strides = ("dh_row_stride", "dn_row_stride", "x_row_stride")
        pointers = ("dh_ptr", "dn_ptr", "x_ptr", "weight_ptr", "h_ptr", "next_weight_ptr")
        pointers += ("dx_ptr", "dresidual_ptr")
        for sums in ((), ("dw", "dnext")):
            flags = dict.fromkeys(("HAS_DH", "HAS_DN", "HAS_DX", "HAS_DRESIDUAL"), True)
            flags |= {"HAS_DW": bool(sums), "HAS_DNEXT": bool(sums)}
            absent = {} if sums else {"dw_ptr": None, "dnext_ptr": None}
            cases.append(
                crosscompile.Case(
                    f"clip_norm_add_bwd D={width} {' '.join(sums)}",
                    module._clip_norm_add_bwd_kernel,
                    dict.fromkeys(pointers, "*bf16")
                    | dict.fromkeys(("rstd_ptr", *(f"{name}_ptr" for name in sums)), "*fp32")
                    | dict.fromkeys(("n_rows", "rows_per_program", *strides), "i32")
                    | dict.fromkeys(floats, "fp32"),
                    {**tile, **flags, **absent},
                    aligned=strides,
                    **how,
                )
            )
    return cases


def test_compiles_for_every_card_without_spills():
    rows = crosscompile.check(__name__)
    assert {row.capability for row in rows} == set(crosscompile.SHARED_KIB)
    assert [row for row in rows if not row.fits or row.spill_bytes] == []
