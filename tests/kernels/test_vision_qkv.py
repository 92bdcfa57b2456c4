from __future__ import annotations

import pytest
import torch
from transformers.models.gemma4.modeling_gemma4 import apply_multidimensional_rope

from gemma_accel.kernels import rms_norm as shared
from gemma_accel.kernels import vision_qkv as module
from gemma_accel.kernels.clip import EVERYTHING, Range
from gemma_accel.kernels.qk_norm_rope import head_tile
from gemma_accel.kernels.vision_qkv import vision_qkv, vision_qkv_ref
from tests.accuracy import assert_no_less_accurate
from tests.kernels import crosscompile
from tests.kernels.test_rms_norm import stock as stock_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (B, T, N, K, H)
SHAPES = {
    "one": (1, 1, 1, 1, 4),
    "tower": (2, 9, 3, 3, 64),
    "wide": (1, 7, 2, 2, 72),
    "grouped": (2, 5, 4, 2, 16),
}
RANGES = {
    "held": dict(q_range=Range(-0.75, 1.5), k_range=Range(0.25, 1.5), v_range=Range(-1.0, -0.25)),
    "one held": dict(k_range=Range(-0.75, 1.5)),
    "free": {},
}
OUT = ("q", "k", "v")
LEAVES = (*OUT, "q_weight", "k_weight")


def stock(
    q, k, v, q_weight, k_weight, cos, sin,
    *, q_range=EVERYTHING, k_range=EVERYTHING, v_range=EVERYTHING,
):  # fmt: skip
    """Gemma4VisionAttention.forward between its projections and its attention."""
    positions = torch.zeros(*q.shape[:2], 2, device=q.device)  # only its last dimension is read
    q = stock_norm(torch.clamp(q, *q_range), q_weight)
    k = stock_norm(torch.clamp(k, *k_range), k_weight)
    return (
        apply_multidimensional_rope(q, cos, sin, positions),
        apply_multidimensional_rope(k, cos, sin, positions),
        stock_norm(torch.clamp(v, *v_range), None),
    )


def make(shape, dtype, device, ranges):
    batch, tokens, n_heads, k_heads, size = shape
    inputs = {
        "q": torch.randn(batch, tokens, n_heads, size),
        "k": torch.randn(batch, tokens, k_heads, size),
        "v": torch.randn(batch, tokens, k_heads, size),
        "q_weight": torch.randn(size) + 0.5,
        "k_weight": torch.randn(size) - 0.5,
    }
    angles = torch.randn(batch, tokens, 2, size // 4) * 3
    angles = torch.cat([angles[:, :, 0]] * 2 + [angles[:, :, 1]] * 2, -1)
    inputs |= {"cos": angles.cos(), "sin": angles.sin()}
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    for name in OUT:  # values on the ends
        for i, end in enumerate(ranges.get(f"{name}_range", ())):
            inputs[name].view(-1)[i::7] = end
    grads = [torch.randn_like(inputs[name]) for name in OUT]
    return {k: v.to(device) for k, v in inputs.items()}, [g.to(device) for g in grads]


def run(op, inputs, grads, ranges, dtype=None, *, wanted=LEAVES, outputs=(True, True, True)):
    inputs = {k: v.detach().to(dtype or v.dtype) for k, v in inputs.items()}
    leaves = {k: inputs[k].requires_grad_() for k in LEAVES if k in wanted}
    out = op(**inputs, **ranges)
    used = [(o, g.to(o.dtype)) for o, g, u in zip(out, grads, outputs, strict=True) if u]
    used = [(o, g) for o, g in used if o.requires_grad]
    torch.autograd.backward([o for o, _ in used], [g for _, g in used])
    return dict(zip(OUT, out, strict=True)) | {f"d{k}": v.grad for k, v in leaves.items()}


def all_three(inputs, grads, ranges, **how):
    return (
        run(op, inputs, grads, ranges, to, **how)
        for op, to in ((vision_qkv, None), (stock, None), (stock, torch.float64))
    )


def assert_accurate(ours, eager, truth, reduced):
    assert ours.keys() == truth.keys()
    for what in truth:
        if truth[what] is None:
            assert ours[what] is None
            continue
        assert_no_less_accurate(ours[what], eager[what], truth[what], what=what, reduced=reduced)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_no_less_accurate_than_stock(shape, dtype, ranges, device, poisoned):
    inputs, grads = make(shape, dtype, device, ranges)
    ours, eager, truth = all_three(inputs, grads, ranges)
    assert_accurate(ours, eager, truth, shape[-1] * shape[1])
    assert all(ours[name].is_contiguous() for name in OUT)


@pytest.mark.parametrize("outputs", [(True, False, False), (False, True, False), (False, False, 1)])
def test_outputs_may_go_unused(outputs, device, poisoned):
    ranges = RANGES["held"]
    inputs, grads = make(SHAPES["grouped"], torch.float16, device, ranges)
    ours, eager, truth = all_three(inputs, grads, ranges, outputs=outputs)
    assert_accurate(ours, eager, truth, 16)


@pytest.mark.parametrize("wanted", LEAVES)
def test_each_gradient_alone(wanted, device, poisoned):
    ranges = RANGES["held"]
    inputs, grads = make(SHAPES["grouped"], torch.float32, device, ranges)
    every = run(vision_qkv, inputs, grads, ranges)
    one = run(vision_qkv, inputs, grads, ranges, wanted=(wanted,))
    assert torch.equal(one[f"d{wanted}"], every[f"d{wanted}"])


@pytest.mark.parametrize("layout", ["fused", "transposed", "sliced"])
def test_strides(layout, device, poisoned):
    """Views of one projection's output, gradients as attention returns them."""
    ranges = RANGES["held"]
    inputs, grads = make(SHAPES["tower"], torch.float32, device, ranges)
    want = run(vision_qkv, inputs, grads, ranges)
    if layout == "fused":
        both = torch.cat([inputs[name].flatten(2) for name in OUT], -1)
        parts = both.chunk(3, -1)
        changed = {n: p.unflatten(-1, (3, 64)) for n, p in zip(OUT, parts, strict=True)}
    elif layout == "transposed":
        changed = {n: inputs[n].transpose(1, 2).contiguous().transpose(1, 2) for n in OUT}
    else:
        changed = {n: torch.cat((inputs[n], inputs[n]), -1)[..., :64] for n in OUT}
    assert not changed["q"].is_contiguous()
    moved = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in grads]
    got = run(vision_qkv, {**inputs, **changed}, moved, ranges)
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_one_rotation_for_every_row(device, poisoned):
    inputs, grads = make(SHAPES["tower"], torch.float32, device, {})
    for name in ("cos", "sin"):
        inputs[name] = inputs[name][:1]
    ours, eager, truth = all_three(inputs, grads, {})
    assert_accurate(ours, eager, truth, 64)


def test_weight_gradients_over_more_tiles_than_partial_sums(device, monkeypatch, poisoned):
    monkeypatch.setattr(shared, "PARTIAL_SUMS", 3)
    inputs, grads = make((2, 200, 4, 2, 8), torch.float32, device, RANGES["held"])
    ours, eager, truth = all_three(inputs, grads, RANGES["held"])
    assert_accurate(ours, eager, truth, 1600)


def test_no_tokens(device):
    inputs, grads = make((1, 0, 2, 2, 8), torch.float32, device, {})
    out = run(vision_qkv, inputs, grads, {})
    assert out["q"].shape == out["dq"].shape == (1, 0, 2, 8)


def test_repeat_run_is_bitwise_the_same(device):
    inputs, grads = make(SHAPES["tower"], torch.float32, device, RANGES["held"])
    first, second = (run(vision_qkv, inputs, grads, RANGES["held"]) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_kernel_equals_reference(ranges, device):
    inputs, grads = make(SHAPES["wide"], torch.float32, device, ranges)
    ours, reference = (run(op, inputs, grads, ranges) for op in (vision_qkv, vision_qkv_ref))
    for what in ours:
        torch.testing.assert_close(ours[what], reference[what])


def test_reference_gradients():
    inputs, _ = make((1, 2, 2, 1, 8), torch.float64, "cpu", {})
    leaves = [inputs[name].requires_grad_() for name in LEAVES]

    def op(*values):
        named = dict(zip(LEAVES, values, strict=True))
        return vision_qkv_ref(**{**inputs, **named}, **RANGES["held"])

    assert torch.autograd.gradcheck(op, leaves)


def test_reference_stands_in_without_a_card(references):
    inputs, _ = make(SHAPES["one"], torch.float64, "cpu", {})
    assert torch.equal(vision_qkv(**inputs)[0], vision_qkv_ref(**inputs)[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda i: {"q": i["q"][..., :6]}, ValueError, "H a multiple of 4, got"),
        (lambda i: {"k": i["k"][:, :2]}, ValueError, r"k and v must have shape \[B, T, K, H\]"),
        (lambda i: {"v": i["v"].to("meta")}, ValueError, "on cpu and meta|on cuda:0 and meta"),
        (lambda i: {"q_weight": torch.ones(3)}, ValueError, "q_weight must have shape"),
        (lambda i: {"cos": i["cos"][:, :2]}, ValueError, "cos and sin must have shape"),
        (lambda i: {"k": i["k"].double()}, TypeError, "k must be float32, bfloat16 or float16"),
    ],
)
def test_errors(change, error, message, device):
    inputs, _ = make(SHAPES["grouped"], torch.float32, device, {})
    with pytest.raises(error, match=message):
        vision_qkv(**{**inputs, **change(inputs)})


def cross_compile_cases() -> list[crosscompile.Case]:
    cases = []
    ends = [f"{what}_{end}" for what in "qkv" for end in ("low", "high")]
    outs = ("q_out_ptr", "k_out_ptr", "v_out_ptr")
    inputs = ("q_ptr", "k_ptr", "v_ptr", "q_weight_ptr", "k_weight_ptr", "cos_ptr", "sin_ptr")
    counts = ("n_tokens", "tokens_per_batch", "q_programs", "k_programs")
    strides = tuple(f"{what}_token_stride" for what in "qkv")
    strides += ("rope_batch_stride", "rope_token_stride")
    incoming = tuple(f"d{w}_out_{s}_stride" for w in "qkv" for s in ("batch", "token", "head"))
    for heads, size in ((12, 64), (16, 72)):
        block_r, block_half, num_warps = head_tile(size)
        tile = {"N": heads, "K": heads, "QUARTER": size // 4, "HAS_RANGE": True}
        tile |= {"BLOCK_R": block_r, "BLOCK_HALF": block_half}
        cases.append(
            crosscompile.Case(
                f"vision_qkv_fwd H={size}",
                module._vision_qkv_fwd_kernel,
                dict.fromkeys((*inputs, *outs), "*bf16")
                | dict.fromkeys((*counts, *strides), "i32")
                | dict.fromkeys(("eps", *ends), "fp32"),
                tile,
                aligned=strides,
                num_warps=num_warps,
            )
        )
        for weights in (False, True):
            sums = {f"d{w}_weight_ptr": "*fp32" for w in "qk"}
            shares = ("q_rows_per_program", "k_rows_per_program")
            flags = dict.fromkeys(("HAS_Q", "HAS_K", "HAS_V", "HAS_DQ", "HAS_DK"), True)
            flags |= {"HAS_DQ_WEIGHT": weights, "HAS_DK_WEIGHT": weights}
            pointers = (*(f"d{o}" for o in outs), *inputs, "dq_ptr", "dk_ptr", "dv_ptr")
            cases.append(
                crosscompile.Case(
                    f"vision_qkv_bwd H={size} weights={weights}",
                    module._vision_qkv_bwd_kernel,
                    dict.fromkeys(pointers, "*bf16")
                    | (sums if weights else {})
                    | dict.fromkeys((*counts, *shares, *incoming, *strides), "i32")
                    | dict.fromkeys(("eps", *ends), "fp32"),
                    tile | flags | ({} if weights else dict.fromkeys(sums)),
                    aligned=(*incoming, *strides),
                    num_warps=num_warps,
                    capabilities=(86, 89, 90) if size == 64 else (80, 120),
                )
            )
    return cases


def test_compiles_for_every_card_without_spills():
    rows = crosscompile.check(__name__)
    assert {row.capability for row in rows} == set(crosscompile.SHARED_KIB)
    assert [row for row in rows if not row.fits or row.spill_bytes] == []
