from __future__ import annotations

import itertools

import pytest
import torch

from gemma_accel.kernels import qk_norm_rope as module
from gemma_accel.kernels import rms_norm as shared
from gemma_accel.kernels.qk_norm_rope import head_tile, qkv_norm_rope, qkv_norm_rope_ref
from tests.accuracy import assert_no_less_accurate, assert_same_but_for_rounding
from tests.kernels import crosscompile
from tests.kernels.test_rms_norm import stock as stock_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, T, N, K, H, rotary pairs: the sliding and the full layers of the models, and odd ones
CASES = {
    "E2B sliding": (1, 3, 8, 1, 256, None),
    "E2B full": (1, 2, 8, 1, 512, 64),
    "E4B sliding": (2, 2, 8, 2, 256, None),
    "one token": (1, 1, 1, 1, 8, None),
    "not powers of two": (3, 5, 3, 2, 24, 5),
    "no pair turns": (2, 3, 2, 2, 16, 0),
    "many heads": (2, 4, 16, 8, 16, 3),
}
NAMES = ("q", "k", "v", "q_weight", "k_weight")
TENSORS = (*NAMES, "cos", "sin")


def rotate(x, cos, sin):
    """apply_rotary_pos_emb with unsqueeze_dim=2."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    x1, x2 = x.chunk(2, -1)
    return (x * cos) + (torch.cat((-x2, x1), dim=-1) * sin)


def stock(q, k, v, q_weight, k_weight, cos, sin):
    """The lines of Gemma4TextAttention.forward between projections and attention."""
    q = rotate(stock_norm(q, q_weight), cos, sin)
    if k is None:
        return q, None, None
    return q, rotate(stock_norm(k, k_weight), cos, sin), stock_norm(v, None)


def make(case, dtype, device, *, rope_batch=None, shared_kv=False):
    """Inputs by name, the number of pairs, and a gradient for each output."""
    batch, tokens, n_heads, k_heads, size, pairs = case
    half = size // 2
    turning = half if pairs is None else pairs
    inputs = {
        name: torch.randn(batch, tokens, heads, size)
        * 10.0 ** torch.randint(-2, 3, (batch, tokens, heads, 1))
        for name, heads in (("q", n_heads), ("k", k_heads), ("v", k_heads))
    }
    inputs |= {name: torch.randn(size) + 0.5 for name in ("q_weight", "k_weight")}
    angles = torch.rand(batch if rope_batch is None else rope_batch, tokens, half) * 6.3
    angles[..., turning:] = 0
    angles = torch.cat((angles, angles), -1)
    inputs |= {"cos": angles.cos(), "sin": angles.sin()}
    grads = [torch.randn(inputs[name].shape).to(device, dtype) for name in "qkv"]
    inputs = {name: x.to(device, dtype) for name, x in inputs.items()}
    if shared_kv:
        inputs |= dict.fromkeys(("k", "v", "k_weight"))
    return inputs, pairs, grads


def run(op, inputs, grads, dtype=None, *, wanted=NAMES, outputs=(0, 1, 2), **options):
    inputs = {
        name: None if x is None else x.detach().to(dtype or x.dtype) for name, x in inputs.items()
    }
    for name in wanted:
        if inputs[name] is not None:
            inputs[name].requires_grad_()
    outs = op(**inputs, **options)
    used = [i for i in outputs if outs[i] is not None and outs[i].requires_grad]
    torch.autograd.backward([outs[i] for i in used], [grads[i].to(outs[i].dtype) for i in used])
    result = {name: out for name, out in zip("qkv", outs, strict=True) if out is not None}
    return result | {f"d{n}": inputs[n].grad for n in wanted if inputs[n] is not None}


def assert_accurate(ours, eager, truth, reduced):
    assert ours.keys() == eager.keys() == truth.keys()
    for what in truth:
        assert_no_less_accurate(ours[what], eager[what], truth[what], what=what, reduced=reduced)


def compare(inputs, pairs, grads):
    ours = run(qkv_norm_rope, inputs, grads, rotary_pairs=pairs)
    eager, truth = run(stock, inputs, grads), run(stock, inputs, grads, torch.float64)
    assert_accurate(ours, eager, truth, max(inputs["q"].shape[-1], inputs["q"].shape[:3].numel()))
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_less_accurate_than_stock(case, dtype, device, poisoned):
    ours = compare(*make(case, dtype, device))
    assert all(ours[name].is_contiguous() for name in "qkv")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_that_share_keys_and_values(dtype, device, poisoned):
    ours = compare(*make(CASES["not powers of two"], dtype, device, shared_kv=True))
    assert set(ours) == {"q", "dq", "dq_weight"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_that_are_the_values_too(dtype, device, poisoned):
    """Models without a v_proj take the raw keys for values: one tensor, left as it was."""
    inputs, pairs, grads = make(CASES["not powers of two"], dtype, device)
    del inputs["v"]
    keys = inputs["k"].clone()
    wanted = ("q", "k", "q_weight", "k_weight")
    ours, eager, truth = (
        run(lambda k, op=op, **kw: op(k=k, v=k, **kw), inputs, grads, to, wanted=wanted, **options)
        for op, to, options in (
            (qkv_norm_rope, None, {"rotary_pairs": pairs}),
            (stock, None, {}),
            (stock, torch.float64, {}),
        )
    )
    assert_accurate(ours, eager, truth, 64)
    assert torch.equal(inputs["k"], keys)


def test_one_rotation_serves_every_batch(device, poisoned):
    inputs, pairs, grads = make(CASES["not powers of two"], torch.float32, device, rope_batch=1)
    compare(inputs, pairs, grads)
    expanded = inputs | {n: inputs[n].expand(3, -1, -1) for n in ("cos", "sin")}
    got, want = (run(qkv_norm_rope, i, grads, rotary_pairs=pairs) for i in (expanded, inputs))
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_pairs_that_do_not_turn_are_the_norm_alone(device):
    inputs, pairs, _ = make(CASES["not powers of two"], torch.float32, device)
    q, k, _ = qkv_norm_rope(**inputs, rotary_pairs=pairs)
    for got, name in ((q, "q"), (k, "k")):
        norm = stock_norm(inputs[name], inputs[f"{name}_weight"])
        torch.testing.assert_close(got[..., pairs:12], norm[..., pairs:12])
        torch.testing.assert_close(got[..., 12 + pairs :], norm[..., 12 + pairs :])
        assert not torch.allclose(got[..., :pairs], norm[..., :pairs])


def test_stock_modules_and_rotary_embeddings(device):
    """The real modules, and what this op assumes of their cos and sin."""
    modeling = pytest.importorskip("transformers.models.gemma4.modeling_gemma4")
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig

    config = Gemma4TextConfig(
        hidden_size=32,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        head_dim=16,
        global_head_dim=32,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1e6,
                "partial_rotary_factor": 0.25,
            },
        },
    )
    embedding = modeling.Gemma4TextRotaryEmbedding(config).to(device)
    positions = torch.arange(5, device=device)[None]
    for layer_type, size, pairs in (("sliding_attention", 16, 8), ("full_attention", 32, 4)):
        inputs, _, _ = make((1, 5, 2, 1, size, None), torch.float32, device)
        cos, sin = embedding(inputs["q"], positions, layer_type)
        assert torch.equal(cos.chunk(2, -1)[0], cos.chunk(2, -1)[1])
        assert torch.equal(cos[..., pairs : size // 2], torch.ones(1, 5, size // 2 - pairs).to(cos))
        inputs |= {"cos": cos, "sin": sin}
        norm = modeling.Gemma4RMSNorm(size).to(device)
        norm.weight.data.copy_(inputs["q_weight"])
        expected = modeling.apply_rotary_pos_emb(norm(inputs["q"]), cos, sin, unsqueeze_dim=2)
        got = qkv_norm_rope(**inputs, rotary_pairs=pairs)
        torch.testing.assert_close(got[0], expected)
        torch.testing.assert_close(
            got[2], modeling.Gemma4RMSNorm(size, with_scale=False)(inputs["v"])
        )
        assert all(map(torch.equal, got, qkv_norm_rope(**inputs)))


def fused(inputs):
    """q, k, v as columns of one projection's output, with columns of something else beside."""
    q = inputs["q"]
    batch, tokens = q.shape[:2]
    flat = [inputs[n].reshape(batch, tokens, -1) for n in "qkv"]
    wide = torch.cat([*flat, torch.full_like(flat[1], float("nan"))], -1)
    parts = wide.split([f.shape[-1] for f in (*flat, flat[1])], -1)
    return {n: p.unflatten(-1, (-1, q.shape[-1])) for n, p in zip("qkv", parts, strict=False)}


def permuted(*order):
    """The same values in memory of another order, as attention's backward returns gradients."""

    def change(x):
        return x.permute(order).contiguous().permute([order.index(i) for i in range(4)])

    return lambda inputs: {n: change(inputs[n]) for n in "qkv"}


LAYOUTS = {
    "fused": fused,
    "heads first": permuted(0, 2, 1, 3),
    "tokens first": permuted(1, 0, 2, 3),
    "last not contiguous": permuted(0, 1, 3, 2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(layout, dtype, device, poisoned):
    inputs, pairs, grads = make(CASES["not powers of two"], dtype, device)
    want = run(qkv_norm_rope, inputs, grads, rotary_pairs=pairs)
    changed = layout(inputs)
    assert not any(x.is_contiguous() for x in changed.values())
    strided_grads = layout(dict(zip("qkv", grads, strict=True)))
    got = run(qkv_norm_rope, inputs | changed, list(strided_grads.values()), rotary_pairs=pairs)
    assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_fused_projection_is_not_copied(batch, tokens, device, monkeypatch):
    inputs, _, _ = make((batch, tokens, 3, 2, 8, None), torch.float32, device)
    inputs |= fused(inputs)
    want = qkv_norm_rope_ref(**inputs)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda *a, **k: pytest.fail("copied"))
    for a, b in zip(qkv_norm_rope(**inputs), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batch", [1, 2])
def test_backward_into_the_columns_of_one_buffer(batch, device, poisoned):
    inputs, _, grads = make((batch, 3, 3, 2, 8, None), torch.float32, device)
    want = run(qkv_norm_rope, inputs, grads)
    buffer = fused({n: torch.full_like(inputs[n], float("nan")) for n in "qkv"})
    arguments = (*grads, *(inputs[n] for n in TENSORS), 1e-6, 4)
    got = module.qkv_norm_rope_bwd(*arguments, **{f"d{n}": x for n, x in buffer.items()})
    for name, grad in zip("qkv", got, strict=False):
        assert grad is buffer[name] and torch.equal(grad, want[f"d{name}"])
    with pytest.raises(ValueError, match=r"dk must have shape .* contiguous heads"):
        module.qkv_norm_rope_bwd(*arguments, dk=buffer["k"].transpose(1, 2))


@pytest.mark.parametrize("wanted", [c for k in (1, 2) for c in itertools.combinations(NAMES, k)])
def test_gradients_alone_and_in_pairs(wanted, device, poisoned):
    inputs, pairs, grads = make((2, 20, 3, 2, 8, 2), torch.float32, device)
    every = run(qkv_norm_rope, inputs, grads, rotary_pairs=pairs)
    some = run(qkv_norm_rope, inputs, grads, wanted=wanted, rotary_pairs=pairs)
    for name in wanted:
        assert_same_but_for_rounding(some[f"d{name}"], every[f"d{name}"], what=name)


@pytest.mark.parametrize(
    "outputs", [c for k in (1, 2) for c in itertools.combinations(range(3), k)]
)
def test_outputs_may_go_unused(outputs, device, poisoned):
    inputs, pairs, grads = make((2, 5, 3, 2, 8, 2), torch.float32, device)
    every = run(qkv_norm_rope, inputs, grads, rotary_pairs=pairs)
    some = run(qkv_norm_rope, inputs, grads, outputs=outputs, rotary_pairs=pairs)
    for name in NAMES:
        if "qkv".index(name[0]) in outputs:
            assert_same_but_for_rounding(some[f"d{name}"], every[f"d{name}"], what=name)
        else:
            assert some[f"d{name}"] is None


def test_weight_gradients_over_more_tiles_than_partial_sums(device, monkeypatch, poisoned):
    monkeypatch.setattr(shared, "PARTIAL_SUMS", 3)
    inputs, pairs, grads = make((2, 401, 3, 2, 8, None), torch.float32, device)
    block_r, _, _ = head_tile(8)
    assert shared.share_rows(2 * 401 * 3, block_r, True)[1] == 3
    compare(inputs, pairs, grads)


def test_no_tokens(device):
    inputs, pairs, grads = make((1, 0, 2, 1, 8, None), torch.float32, device)
    got = run(qkv_norm_rope, inputs, grads)
    assert got["q"].shape == got["dq"].shape == (1, 0, 2, 8)
    assert got["dq_weight"].count_nonzero() == 0


def test_repeat_run_is_bitwise_the_same(device):
    inputs, pairs, grads = make((2, 200, 3, 2, 8, 2), torch.float32, device)
    first, second = (run(qkv_norm_rope, inputs, grads, rotary_pairs=pairs) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_one_launch_a_direction(device, monkeypatch):
    launches = []
    for name in ("_qkv_norm_rope_fwd_kernel", "_qkv_norm_rope_bwd_kernel"):
        kernel = getattr(module, name)

        class Counted:
            def __getitem__(self, grid, kernel=kernel, name=name):
                launches.append(name)
                return kernel[grid]

        monkeypatch.setattr(module, name, Counted())
    inputs, pairs, grads = make(CASES["not powers of two"], torch.float32, device)
    run(qkv_norm_rope, inputs, grads, rotary_pairs=pairs)
    assert launches == ["_qkv_norm_rope_fwd_kernel", "_qkv_norm_rope_bwd_kernel"]


def test_kernel_equals_reference(device):
    inputs, pairs, grads = make(CASES["not powers of two"], torch.float32, device)
    ours, reference = (
        run(op, inputs, grads, rotary_pairs=pairs) for op in (qkv_norm_rope, qkv_norm_rope_ref)
    )
    for what in ours:
        torch.testing.assert_close(ours[what], reference[what])


def test_reference_gradients():
    inputs, pairs, _ = make((2, 2, 2, 1, 6, 2), torch.float64, "cpu")
    for name in "qkv":
        inputs[name] = torch.randn_like(inputs[name])

    def op(*values):
        return qkv_norm_rope_ref(
            **{**inputs, **dict(zip(NAMES, values, strict=True))}, rotary_pairs=pairs
        )

    assert torch.autograd.gradcheck(op, [inputs[n].requires_grad_() for n in NAMES])


def test_reference_stands_in_without_a_card(references):
    inputs, pairs, _ = make(CASES["not powers of two"], torch.float64, "cpu")
    for a, b in zip(
        qkv_norm_rope(**inputs, rotary_pairs=pairs),
        qkv_norm_rope_ref(**inputs, rotary_pairs=pairs),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda i: {"q": i["q"][0]}, ValueError, r"q must be \[B, T, heads, H\]"),
        (lambda i: {"q": i["q"][..., :7]}, ValueError, "with an even H"),
        (lambda i: {"q_weight": i["q_weight"][:4]}, ValueError, r"q_weight must have shape \(D,\)"),
        (lambda i: {"k_weight": i["q_weight"][:4]}, ValueError, "k_weight must have shape"),
        (lambda i: {"v": None}, ValueError, "go together, got only k and k_weight"),
        (lambda i: {"v": i["q"]}, ValueError, r"k and v must be \[B, T, heads, H\] like q"),
        (lambda i: {"cos": i["cos"][..., :4]}, ValueError, r"\[B or 1, T, H\] = \(2, 3, 8\), got"),
        (lambda i: {"sin": i["sin"].to("meta")}, ValueError, "got .* and meta"),
        (lambda i: {"rotary_pairs": 5}, ValueError, r"in 0\.\.H/2 = 4, got 5"),
        (lambda i: {"v": i["v"].double()}, TypeError, "v must be float32, bfloat16 or float16"),
    ],
)
def test_errors(change, error, message, device):
    inputs, _, _ = make((2, 3, 2, 1, 8, None), torch.float32, device)
    with pytest.raises(error, match=message):
        qkv_norm_rope(**{**inputs, **change(inputs)})


def cross_compile_cases() -> list[crosscompile.Case]:
    cases = []
    shapes = ((8, 1, 256, None), (8, 2, 512, 64), (32, 16, 256, None))
    for (n_heads, k_heads, size, pairs), capabilities in zip(
        shapes, ((86, 89, 120), (80, 86, 90), (89,)), strict=True
    ):
        block_r, block_half, num_warps = head_tile(size)
        constants = {
            "N": n_heads,
            "K": k_heads,
            "HALF": size // 2,
            "PAIRS": pairs or size // 2,
            "BLOCK_R": block_r,
            "BLOCK_HALF": block_half,
        }
        name = f"N={n_heads} K={k_heads} H={size}"
        heads, rope = ("q", "k", "v"), ("rope_batch_stride", "rope_token_stride")
        weights = ("q_weight_ptr", "k_weight_ptr", "cos_ptr", "sin_ptr")
        counts = ("n_tokens", "tokens_per_batch", "q_programs", "k_programs")
        strides = (*(f"{x}_token_stride" for x in heads), *rope)
        pointers = (*(f"{x}_ptr" for x in heads), *(f"{x}_out_ptr" for x in heads), *weights)
        cases.append(
            crosscompile.Case(
                f"qkv_norm_rope_fwd {name}",
                module._qkv_norm_rope_fwd_kernel,
                dict.fromkeys(pointers, "*bf16")
                | dict.fromkeys((*counts, *strides), "i32")
                | {"eps": "fp32"},
                constants,
                num_warps=num_warps,
                aligned=strides,
                capabilities=capabilities,
            )
        )
        counts += ("q_rows_per_program", "k_rows_per_program")
        strides += tuple(f"d{x}_token_stride" for x in heads)
        strides += tuple(
            f"d{x}_out_{axis}_stride" for x in heads for axis in ("batch", "token", "head")
        )
        pointers = (*(f"{x}_ptr" for x in heads), *(f"d{x}_out_ptr" for x in heads), *weights)
        pointers += tuple(f"d{x}_ptr" for x in heads)
        flags = dict.fromkeys(("HAS_Q", "HAS_K", "HAS_V", "HAS_DQ", "HAS_DK"), True)
        for trained in (False, True):
            flags |= dict.fromkeys(("HAS_DQ_WEIGHT", "HAS_DK_WEIGHT"), trained)
            sums = ("dq_weight_ptr", "dk_weight_ptr")
            cases.append(
                crosscompile.Case(
                    f"qkv_norm_rope_bwd {name}{' dw' * trained}",
                    module._qkv_norm_rope_bwd_kernel,
                    dict.fromkeys(pointers, "*bf16")
                    | dict.fromkeys((*counts, *strides), "i32")
                    | dict.fromkeys(sums if trained else (), "*fp32")
                    | {"eps": "fp32"},
                    constants | flags | dict.fromkeys(() if trained else sums),
                    num_warps=num_warps,
                    aligned=strides,
                    capabilities=capabilities,
                )
            )
    return cases


def test_compiles_for_every_card_without_spills():
    rows = crosscompile.check(__name__)
    assert {row.capability for row in rows} == set(crosscompile.SHARED_KIB)
    assert [row for row in rows if not row.fits or row.spill_bytes] == []
