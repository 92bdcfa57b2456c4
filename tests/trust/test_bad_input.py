"""Bad input by the thousand: it is either an error that says what is wrong, or the right answer.

Drawn by hypothesis, the same every time. `EXAMPLES` is how many.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from gemma_accel.kernels._triton import interpreting
from gemma_accel.kernels.attention import attention, attention_ref
from gemma_accel.kernels.chunked_attention import (
    Chunks,
    chunked_attention,
    chunked_attention_ref,
)
from gemma_accel.kernels.clip import Range, clip, clip_ref
from gemma_accel.kernels.clip_geglu import clip_geglu, clip_geglu_ref
from gemma_accel.kernels.clip_norm import clip_norm, clip_norm_ref
from gemma_accel.kernels.clip_norm_add import clip_norm_add, clip_norm_add_ref
from gemma_accel.kernels.clip_silu import clip_silu, clip_silu_ref
from gemma_accel.kernels.geglu import geglu, geglu_ref
from gemma_accel.kernels.light_conv import light_conv, light_conv_ref
from gemma_accel.kernels.lora import Projection, project, project_ref
from gemma_accel.kernels.mlp import gated_mlp, gated_mlp_ref
from gemma_accel.kernels.norm_add import norm_add, norm_add_ref
from gemma_accel.kernels.ple import gather_rows, gather_rows_ref, ple_gate, ple_gate_ref
from gemma_accel.kernels.qk_norm_rope import qkv_norm_rope, qkv_norm_rope_ref
from gemma_accel.kernels.rms_norm import rms_norm, rms_norm_ref
from gemma_accel.kernels.vision_attention import vision_attention, vision_attention_ref
from gemma_accel.kernels.vision_qkv import vision_qkv, vision_qkv_ref

EXAMPLES = 0
"""How many inputs all tests of this file draw."""


def examples(count: int, times: int = 1):
    """Settings for ``count`` inputs in each of ``times`` cases, counted."""
    global EXAMPLES
    EXAMPLES += count * times
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


interpreted = pytest.mark.skipif(
    not interpreting(), reason="drawn in the interpreter: a card would compile for minutes"
)


# --- the ops --------------------------------------------------------------------------------------
#
# A case is made that fits, and then, most of the time, spoilt in one place: a shape, a dtype, a
# layout, a device.

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WRONG_DTYPES = (torch.float64, torch.int64, torch.bool)
LOOSE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


class Op(NamedTuple):
    run: Any
    reference: Any
    inputs: Any  # sizes -> the tensors' shapes by argument, and other arguments
    dtypes: tuple[torch.dtype, ...] = DTYPES


def heads(sizes, size=None):
    """Shape [B, T, N, H]."""
    return sizes["B"], sizes["T"], sizes["N"], size or sizes["H"]


def rows(sizes):
    return sizes["B"], sizes["T"], sizes["D"]


RANGE = Range(-0.75, 0.875)  # exact in every dtype
FAR = Range(-64.0, 64.0)  # for what is clamped after a rounding: no gradient hangs on its last bit
CHUNKS = Chunks(4, 3, 0, 0.5, 50.0)


def projected(x, weight, bias, lora_a, lora_b, other):
    return project(x, Projection(weight, bias, lora_a, lora_b, 0.5), Projection(other))


def projected_ref(x, weight, bias, lora_a, lora_b, other):
    return project_ref(x, Projection(weight, bias, lora_a, lora_b, 0.5), Projection(other))


def mlp(x, gate, up, down):
    return gated_mlp(x, Projection(gate), Projection(up), Projection(down), keep=False, tile=3)


def mlp_ref(x, gate, up, down):
    return gated_mlp_ref(x, Projection(gate), Projection(up), Projection(down))


DOTS = (torch.float32, torch.float16)  # the interpreter's products of bfloat16 are wrong

OPS = {
    "rms_norm": Op(rms_norm, rms_norm_ref, lambda s: dict(x=rows(s), weight=(s["D"],))),
    "norm_add": Op(
        norm_add,
        norm_add_ref,
        lambda s: dict(
            x=rows(s), residual=rows(s), weight=(s["D"],), scale=(1,), next_weight=(s["D"],)
        ),
    ),
    "geglu": Op(geglu, geglu_ref, lambda s: dict(gate=rows(s), up=rows(s))),
    "qkv_norm_rope": Op(
        qkv_norm_rope,
        qkv_norm_rope_ref,
        lambda s: dict(
            q=heads(s),
            k=(s["B"], s["T"], s["K"], s["H"]),
            v=(s["B"], s["T"], s["K"], s["H"]),
            q_weight=(s["H"],),
            k_weight=(s["H"],),
            cos=(1, s["T"], s["H"]),
            sin=(1, s["T"], s["H"]),
        ),
    ),
    "ple_gate": Op(
        ple_gate,
        ple_gate_ref,
        lambda s: dict(
            gate=rows(s),
            projection=rows(s),
            rows=rows(s),
            norm_weight=(s["D"],),
            projection_scale=0.3,
            rows_scale=4.0,
            input_scale=0.7,
        ),
    ),
    "attention": Op(
        attention,
        attention_ref,
        lambda s: dict(
            q=(s["B"], s["N"], s["T"], 16),
            k=(s["B"], s["K"], s["T"], 16),
            v=(s["B"], s["K"], s["T"], 16),
            window=3,
        ),
        DOTS,
    ),
    "project": Op(
        projected,
        projected_ref,
        lambda s: dict(
            x=rows(s),
            weight=(5, s["D"]),
            bias=(5,),
            lora_a=(2, s["D"]),
            lora_b=(5, 2),
            other=(3, s["D"]),
        ),
        DOTS,
    ),
    "gated_mlp": Op(
        mlp,
        mlp_ref,
        lambda s: dict(x=rows(s), gate=(6, s["D"]), up=(6, s["D"]), down=(s["D"], 6)),
        DOTS,
    ),
    "clip": Op(clip, clip_ref, lambda s: dict(x=rows(s), to=RANGE)),
    "clip_silu": Op(clip_silu, clip_silu_ref, lambda s: dict(x=rows(s), before=RANGE)),
    "clip_geglu": Op(
        clip_geglu, clip_geglu_ref, lambda s: dict(gate=rows(s), up=rows(s), after=FAR)
    ),
    "clip_norm": Op(
        clip_norm, clip_norm_ref, lambda s: dict(x=rows(s), weight=(s["D"],), before=RANGE)
    ),
    "clip_norm_add": Op(
        clip_norm_add,
        clip_norm_add_ref,
        lambda s: dict(x=rows(s), residual=rows(s), weight=(s["D"],), next_weight=(s["D"],)),
    ),
    "light_conv": Op(
        light_conv,
        light_conv_ref,
        lambda s: dict(
            x=(s["B"], s["T"], 2 * s["D"]), conv=(s["D"], 1, 3), weight=(s["D"],), after=FAR
        ),
    ),
    "chunked_attention": Op(
        chunked_attention,
        chunked_attention_ref,
        lambda s: dict(
            q=heads(s, 8),
            k=heads(s, 8),
            v=heads(s, 8),
            relative=(5, s["N"], 8),
            q_scale=(8,),
            mask=None,
            chunks=CHUNKS,
        ),
        DOTS,
    ),
    "vision_attention": Op(
        vision_attention,
        vision_attention_ref,
        lambda s: dict(q=heads(s, 16), k=heads(s, 16), v=heads(s, 16)),
        DOTS,
    ),
    "vision_qkv": Op(
        vision_qkv,
        vision_qkv_ref,
        lambda s: dict(
            q=heads(s, 8),
            k=(s["B"], s["T"], s["K"], 8),
            v=(s["B"], s["T"], s["K"], 8),
            q_weight=(8,),
            k_weight=(8,),
            cos=(1, s["T"], 8),
            sin=(1, s["T"], 8),
        ),
    ),
}

SIZES = st.fixed_dictionaries(
    dict(
        B=st.integers(0, 2),
        T=st.integers(0, 5),
        D=st.sampled_from((0, 1, 3, 8, 33)),
        N=st.sampled_from((1, 2, 4)),
        K=st.sampled_from((1, 2)),
        H=st.sampled_from((2, 6, 16, 3)),
    )
)
SPOILT = ("nothing", "shape", "dtype", "layout", "device")


def laid_out(x: Tensor, how: str) -> Tensor:
    """The same values, in another way."""
    if how == "backwards" and x.dim() > 1:
        order = list(range(x.dim()))[::-1]
        return x.permute(order).contiguous().permute(order)
    if how == "every other":
        wide = torch.full((*x.shape[:-1], x.shape[-1] * 2), 7.0).to(x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if how == "a part of more":
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), 7.0).to(x.dtype)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]
    if how == "expanded":
        return x[:1].expand(x.shape) if x.shape[0] else x
    return x


CONSTANTS = {"scale", "cos", "sin"}  # ops give these no gradient, and say so
LAYOUTS = ("backwards", "every other", "a part of more", "expanded")


def tensors(draw, op: Op) -> dict[str, Any]:
    sizes = draw(SIZES)
    dtype = draw(st.sampled_from(op.dtypes))
    wanted = op.inputs(sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    made = {
        name: torch.randn(shape, generator=generator).to(dtype)
        if isinstance(shape, tuple) and not isinstance(shape, (Range, Chunks))
        else shape
        for name, shape in wanted.items()
    }
    named = [name for name, value in made.items() if isinstance(value, Tensor)]
    spoilt, name = draw(st.sampled_from(SPOILT)), draw(st.sampled_from(named))
    x = made[name]
    if spoilt == "shape":
        shape = list(x.shape)
        where = draw(st.integers(0, len(shape) - 1))
        change = draw(st.sampled_from(("longer", "shorter", "gone", "more", "none")))
        if change == "none" and op.run in (projected, mlp):
            change = "more"  # a layer without outputs has no gradient to speak of
        if change in ("longer", "shorter"):
            shape[where] = max(0, shape[where] + (1 if change == "longer" else -1))
        elif change == "gone" and len(shape) > 1:
            del shape[where]
        elif change == "more":
            shape.insert(where, 1)
        else:
            shape[where] = 0
        made[name] = torch.randn(shape, generator=generator).to(dtype)
    elif spoilt == "dtype":
        made[name] = x.to(draw(st.sampled_from((*WRONG_DTYPES, *op.dtypes))))
    elif spoilt == "layout":
        made[name] = laid_out(x, draw(st.sampled_from(LAYOUTS)))
    elif spoilt == "device":
        made[name] = x.to("meta")
    note(f"{spoilt} of {name}: " + described(made))
    return made


def described(made: dict[str, Any]) -> str:
    return ", ".join(
        f"{n} {tuple(v.shape)} {v.dtype} {v.stride()} {v.device}"
        for n, v in made.items()
        if isinstance(v, Tensor)
    )


def ran(function, made: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What it gives, and the gradients of what takes one."""
    leaves = {
        name: value.detach().requires_grad_(value.is_floating_point() and name not in CONSTANTS)
        for name, value in made.items()
        if isinstance(value, Tensor)
    }
    out = function(**{**made, **leaves})
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
    loss = torch.zeros(())
    for o in outs:
        if o.device.type != "meta":
            loss = loss + (o.float().flatten() * torch.linspace(0.5, 1.5, o.numel())).sum()
    if loss.requires_grad:
        loss.backward()
    grads = {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}
    return [o.detach() for o in outs], grads


def in_double(made: dict[str, Any]) -> dict[str, Any]:
    return {n: v.double() if isinstance(v, Tensor) else v for n, v in made.items()}


def close(got: Tensor, expected: Tensor, loose: float, what: str) -> None:
    assert got.shape == expected.shape, what
    if got.numel() == 0:
        return
    a, b = got.double(), expected.double()
    assert torch.equal(a.isfinite(), b.isfinite()), what
    a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
    assert (a - b).norm() <= loose * (b.norm() + 0.5 * a.numel() ** 0.5), what


@interpreted
@pytest.mark.parametrize("name", OPS)
@given(data=st.data())
@examples(80, times=len(OPS))
def test_an_op_is_right_or_says_what_is_wrong(name, data):
    op = OPS[name]
    made = tensors(data.draw, op)
    given_tensors = [value for value in made.values() if isinstance(value, Tensor)]
    elsewhere = any(x.device.type == "meta" for x in given_tensors)
    try:
        outs, grads = ran(op.run, made)
    except (TypeError, ValueError) as error:
        message = str(error)
        assert message.startswith((f"{name}:", "project:")), repr(error)
        assert len(message) > 40 and message.endswith("."), message
        return
    except RuntimeError:
        # PyTorch's own word, where plain PyTorch refuses the same, or a tensor has no data
        if not elsewhere:
            with pytest.raises(RuntimeError):
                ran(op.reference, made)
        return
    if elsewhere:
        return
    if not any(out.numel() for out in outs):
        assert not any(grad.count_nonzero() for grad in grads.values())
        return
    expected, expected_grads = ran(op.reference, in_double(made))
    loose = max(LOOSE.get(x.dtype, 0.0) for x in given_tensors)
    for got, want in zip(outs, expected, strict=True):
        close(got, want, loose, f"{name}'s result")
    if not all(x.is_floating_point() for x in given_tensors):
        return
    assert grads.keys() == expected_grads.keys()
    for which, grad in grads.items():
        assert grad.dtype == made[which].dtype
        close(grad, expected_grads[which], loose, f"{name}'s gradient of {which}")


# --- token ids ------------------------------------------------------------------------------------


@interpreted
@given(
    ids=st.lists(st.integers(-3, 40) | st.sampled_from((2**31 - 1, -(2**31), 2**62)), max_size=12),
    rows=st.integers(1, 37),
    start=st.integers(-2, 6),
    width=st.integers(-1, 9),
)
@examples(250)
def test_ids_outside_a_table_read_nothing_beside_it(ids, rows, start, width):
    """The kernel, which cannot raise, gives NaN there; plain PyTorch names the id."""
    wide = torch.arange(50 * 8, dtype=torch.float32).view(50, 8)
    table, ids = wide[5 : 5 + rows], torch.tensor(ids, dtype=torch.int64)
    if start < 0 or width < 1 or start + width > 8:
        with pytest.raises(ValueError, match="gather_rows: columns"):
            gather_rows(table, ids, start, width)
        return
    known = (ids >= 0) & (ids < rows)
    got = gather_rows(table, ids, start, width)
    expected = table[ids[known], start : start + width]
    assert torch.equal(got[known], expected)
    assert got[~known].isnan().all()
    if known.all():
        assert torch.equal(gather_rows_ref(table, ids, start, width), expected)
        return
    with pytest.raises(IndexError, match=rf"token id {ids[~known][0]} .*{rows} rows.*resize"):
        gather_rows_ref(table, ids, start, width)


# --- masks and packed rows ------------------------------------------------------------------------


def described_mask(mask):
    return ["".join("#" if seen else "." for seen in row) for row in mask.tolist()]


@st.composite
def masks(draw, tokens):
    """Padding left, right, both, everywhere, in the middle, or anyhow; of another length too."""
    batch = draw(st.integers(1, 3))
    length = max(0, tokens + draw(st.sampled_from((0, 0, 0, 0, 0, 0, -2, 3))))
    mask = torch.zeros(batch, length, dtype=torch.bool)
    for row in mask:
        kind = draw(st.sampled_from(("run", "run", "run", "all", "none", "anyhow")))
        if kind == "run":
            begin = draw(st.integers(0, length))
            row[begin : draw(st.integers(begin, length))] = True
        elif kind == "all":
            row[:] = True
        elif kind == "anyhow":
            row[:] = torch.tensor(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    return mask


class Attention:
    """What attention functions read of the module."""

    num_key_value_groups, scaling, is_causal, layer_idx = 2, 1.0, True, 0

    def __init__(self, window):
        self.config = SimpleNamespace(sliding_window=window)


def both_attentions(tokens, batch, mask, function, window, skip):
    """Ours and stock's results [B, T, N, H] on the same numbers."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    from gemma_accel.patches import attention as patch

    generator = torch.Generator().manual_seed(tokens)
    query = torch.randn(batch, 2, tokens, 16, generator=generator)
    key, value = (torch.randn(batch, 1, tokens, 16, generator=generator) for _ in range(2))
    arguments = dict(
        mask_function=function,
        attention_mask=mask,
        allow_is_causal_skip=skip,
        config=SimpleNamespace(attention_dropout=0.0),
    )
    ours = patch.mask(batch, tokens, tokens, **arguments)
    module = Attention(window)
    out, _ = patch.attend(module, query, key, value, ours, scaling=1.0, sliding_window=window)
    stock = sdpa_mask(batch, tokens, tokens, **{**arguments, "allow_is_causal_skip": False})
    expected, _ = sdpa_attention_forward(module, query, key, value, stock, scaling=1.0)
    return out, expected


@pytest.mark.usefixtures("references")
@given(data=st.data(), tokens=st.integers(1, 13), window=st.sampled_from((None, 1, 3, 50)))
@examples(300)
def test_any_padding_is_stocks_attention(data, tokens, window):
    from transformers.masking_utils import (
        causal_mask_function,
        sliding_window_causal_mask_function,
    )

    mask = data.draw(masks(tokens))
    note(described_mask(mask))
    function = causal_mask_function
    if window is not None:
        function = sliding_window_causal_mask_function(window)
    with torch.set_grad_enabled(data.draw(st.booleans())):
        out, expected = both_attentions(tokens, len(mask), mask, function, window, True)
    assert out.isfinite().all()
    known = F.pad(mask, (0, max(0, tokens - mask.shape[1])))[:, :tokens]
    # a token sees itself: of padding, which sees nothing or anything, nobody reads the output
    assert torch.allclose(out[known], expected[known], atol=1e-5)


@pytest.mark.usefixtures("references")
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=7).filter(sum),
    window=st.sampled_from((None, 2, 50)),
)
@examples(200)
def test_packed_documents_of_any_length_also_none_see_themselves_alone(lengths, window):
    from transformers.masking_utils import (
        and_masks,
        causal_mask_function,
        find_packed_sequence_indices,
        packed_sequence_mask_function,
        sliding_window_causal_mask_function,
    )

    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    function = causal_mask_function
    if window is not None:
        function = sliding_window_causal_mask_function(window)
    packed = find_packed_sequence_indices(positions)
    tokens = positions.shape[1]
    if packed is not None:
        function = and_masks(function, packed_sequence_mask_function(packed))
    out, expected = both_attentions(tokens, 1, None, function, window, packed is None)
    assert torch.allclose(out, expected, atol=1e-5)


@given(
    positions=st.lists(st.integers(-2, 5), min_size=1, max_size=12),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
)
@examples(300)
def test_documents_begin_where_positions_do_not_go_on(positions, padding):
    """Whatever the positions: each query sees the keys of its run that are there, up to itself."""
    from gemma_accel.kernels.segments import segments_from_position_ids

    tokens = len(positions)
    mask = torch.ones(1, tokens, dtype=torch.long)
    mask[:, : padding[0]] = 0
    mask[:, max(0, tokens - padding[1]) :] = 0
    segments = segments_from_position_ids(torch.tensor([positions]), mask)
    document = [0]
    for before, here in zip(positions, positions[1:], strict=False):
        document.append(document[-1] + (here != before + 1))
    for t in range(tokens):
        for s in range(tokens):
            expected = s <= t and document[s] == document[t] and bool(mask[0, s] and mask[0, t])
            assert bool(segments.first[0, t] <= s <= t) is expected
            assert bool(s <= t <= segments.last[0, s]) is expected


# --- whole models ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    """A stock model and the same applied; references, whatever the interpreter is set to."""
    import gemma_accel
    from tests.tiny import tiny_model

    small = dict(
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=0,
    )
    stock, model = tiny_model(**small), tiny_model(**small)
    gemma_accel.apply(model)
    return stock, model


def trained(model, **inputs):
    model.zero_grad()
    out = model(**inputs)
    if out.loss.requires_grad:
        out.loss.backward()
    return out.loss.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.usefixtures("references")
@given(data=st.data())
@examples(60)
def test_labels_of_any_kind_train_as_stock_does(pair, data):
    """None that counts, one that counts, the first alone (nobody predicts it), all of them."""
    stock, model = pair
    ids = torch.randint(3, 150, (2, 7), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    kind = data.draw(st.sampled_from(("none", "first", "a row", "some")))
    if kind == "none":
        labels[:] = -100
    elif kind == "first":
        labels[:, 1:] = -100
    elif kind == "a row":
        labels[data.draw(st.integers(0, 1))] = -100
    else:
        kept = data.draw(st.lists(st.booleans(), min_size=14, max_size=14))
        labels[~torch.tensor(kept).view(2, 7)] = -100
    inputs = dict(input_ids=ids, labels=labels)
    if data.draw(st.booleans()):
        # a Trainer's count: of this batch, or of several
        inputs["num_items_in_batch"] = torch.tensor(data.draw(st.integers(1, 30)))
    loss, grads = trained(model, **inputs)
    expected, expected_grads = trained(stock, **inputs)
    note(f"{kind}: {loss.item()} and {expected.item()}")
    if expected.isnan():
        # stock divides nothing by no labels, and writes NaN into every weight
        assert kind in ("none", "first", "some") and (loss == 0 or loss.isnan())
        if loss == 0:
            assert not any(grad.count_nonzero() for grad in grads.values() if grad is not None)
        return
    assert torch.allclose(loss, expected, rtol=1e-5, equal_nan=True)
    for name, grad in grads.items():
        want = expected_grads[name]
        want = torch.zeros_like(grad) if want is None and grad is not None else want
        if grad is None:
            assert want is None or not want.count_nonzero(), name
            continue
        assert torch.equal(grad.isnan(), want.isnan()), name
        grad, want = grad.nan_to_num(), want.nan_to_num()
        assert (grad - want).norm() <= 1e-4 * want.norm() + 1e-6, name


@pytest.mark.usefixtures("references")
@given(
    lengths=st.lists(st.integers(0, 5), min_size=2, max_size=6).filter(sum), marked=st.booleans()
)
@examples(40)
def test_empty_documents_in_a_packed_row_change_nothing(pair, lengths, marked):
    """Also where a collator says where documents begin, an empty one twice."""
    stock, model = pair
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ids = torch.randint(3, 150, positions.shape, generator=torch.Generator().manual_seed(2))
    # a cache would make it one document, for stock too
    inputs: dict[str, Any] = dict(input_ids=ids, position_ids=positions, use_cache=False)
    if marked:
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        inputs |= dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends)
        inputs |= dict(max_length_q=max(lengths), max_length_k=max(lengths))
    with torch.no_grad():
        out, expected = model(**inputs).logits, stock(**inputs).logits
        assert (out - expected).norm() <= 1e-5 * expected.norm()
        begin = 0
        for length in filter(None, lengths):
            alone = stock(input_ids=ids[:, begin : begin + length]).logits
            part = out[:, begin : begin + length]
            assert (part - alone).norm() <= 1e-5 * alone.norm()
            begin += length


@pytest.mark.usefixtures("references")
@given(token=st.integers(160, 10**6) | st.integers(-(10**6), -1), where=st.integers(0, 5))
@examples(40)
def test_a_token_id_out_of_range_is_an_error_and_the_model_goes_on(pair, token, where):
    _, model = pair
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        ids[0, where] = token
        with pytest.raises(IndexError):
            model(input_ids=ids)
        ids[0, where] = 3 + where
        assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.usefixtures("references", "trl_on_the_cpu")
@pytest.mark.parametrize("wrong", [-1, 160, 2**31])
def test_a_label_out_of_range_is_named(pair, wrong):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": [5, 6], "labels": labels} for labels in ([-100, 6], [5, wrong])]
    args = TrainingArguments("out", use_cpu=True, report_to="none", max_steps=1)
    trainer = Trainer(model=pair[1], args=args, train_dataset=rows)
    with pytest.raises(ValueError, match=rf"label {wrong}; .* vocabulary has 160.* label -100"):
        trainer.train()


@pytest.mark.usefixtures("references", "trl_on_the_cpu")
@pytest.mark.parametrize("wrong", [4711, -3])
def test_a_token_id_out_of_range_is_named(pair, wrong):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids, "labels": [5, 6]} for ids in ([5, 6], [5, wrong])]
    args = TrainingArguments("out", use_cpu=True, report_to="none", max_steps=1)
    trainer = Trainer(model=pair[1], args=args, train_dataset=rows)
    with pytest.raises(ValueError, match=rf"token id {wrong}; .* vocabulary has 160"):
        trainer.train()
    assert trainer.data_collator.collator is not None
    with pytest.raises(ValueError, match=rf"token id {wrong}; .* vocabulary has 160"):
        pickle.loads(pickle.dumps(trainer.data_collator))(rows)  # in a worker


# --- configs --------------------------------------------------------------------------------------


FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "global_head_dim",
    "intermediate_size",
    "vocab_size",
    "vocab_size_per_layer_input",
    "hidden_size_per_layer_input",
    "num_kv_shared_layers",
    "layer_types",
    "sliding_window",
    "rope_parameters",
)


@given(
    field=st.sampled_from(FIELDS),
    value=st.sampled_from(("gone", None, "many", 2.5)),
    sizes=st.tuples(st.integers(-1, 2), st.integers(-1, 300)),
    gib=st.sampled_from((None, 8.0, 0.0, -1.0, math.nan)),
)
@examples(200)
def test_a_plan_for_a_config_with_a_hole_is_a_plan_or_says_so(field, value, sizes, gib):
    from huggingface_hub.errors import StrictDataclassError

    from gemma_accel.errors import GemmaAccelError
    from gemma_accel.planner import plan
    from tests.tiny import text_config

    config = text_config()
    if value == "gone":
        vars(config).pop(field, None)
    else:
        vars(config)[field] = value
    try:
        found = plan(config, vram_gib=gib, batch_size=sizes[0], sequence_length=sizes[1])
    except (ValueError, TypeError, AttributeError, GemmaAccelError, StrictDataclassError) as error:
        assert len(str(error)) > 20
        return
    assert sizes[0] > 0 and sizes[1] > 0 and (gib is None or gib > 0)
    assert math.isfinite(found.peak_gib)


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize(
    "field", [*FIELDS, "hidden_activation", "rms_norm_eps", "enable_moe_block"]
)
def test_a_config_with_a_hole_is_applied_or_the_patch_says_what_it_misses(field):
    import gemma_accel
    from gemma_accel.errors import GemmaAccelError, PatchError
    from gemma_accel.patches.seams import Fused
    from tests.tiny import tiny_model

    model = tiny_model()
    vars(model.config).pop(field, None)  # where a class has a default, that is what it reads
    try:
        report = gemma_accel.apply(model)
    except GemmaAccelError as error:
        assert isinstance(error, PatchError) or field in str(error)
        if isinstance(error, PatchError):
            assert "patch '" in str(error) and "The model is" in str(error)
    else:
        assert report.applied
        report.restore()
    assert not any(isinstance(module, Fused) for module in model.modules())


# --- safetensors headers --------------------------------------------------------------------------


NAME = "model.language_model.embed_tokens_per_layer.weight"
SUFFIX = "embed_tokens_per_layer.weight"
HUGE = 2**63
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-HUGE, HUGE)
    | st.floats(allow_nan=True)
    | st.text(max_size=4)
    | st.sampled_from(("F32", "BF16", "I64")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
NUMBERS = st.integers(-3, 80) | st.sampled_from((HUGE, -HUGE, 2**64, 2**32, 10**30, True, 1.0))


@st.composite
def entries(draw):
    """A tensor's entry, sound or nearly so, or anything at all."""
    rows, columns, begin = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(0, 8))
    entry: Any = dict(
        dtype="F32", shape=[rows, columns], data_offsets=[begin, begin + 4 * rows * columns]
    )
    spoilt = draw(st.sampled_from(("nothing", "number", "dtype", "shape", "value", "key", "all")))
    if spoilt == "number":
        numbers = entry[draw(st.sampled_from(("shape", "data_offsets")))]
        numbers[draw(st.integers(0, 1))] = draw(NUMBERS)
    elif spoilt == "dtype":
        entry["dtype"] = draw(st.sampled_from(("BF16", "F16", "I64", "F64", "", "f32")) | JSON)
    elif spoilt == "shape":
        entry["shape"] = draw(st.lists(NUMBERS, max_size=4) | JSON)
    elif spoilt == "value":
        entry[draw(st.sampled_from(sorted(entry)))] = draw(JSON)
    elif spoilt == "key":
        del entry[draw(st.sampled_from(sorted(entry)))]
    elif spoilt == "all":
        entry = draw(JSON)
    return entry


@st.composite
def headers(draw) -> bytes:
    """A header's bytes: of entries, of the same name twice, of other JSON, nested deeply, of no
    JSON."""
    kind = draw(st.sampled_from(("entries",) * 5 + ("twice", "other", "deep", "bytes")))
    if kind == "bytes":
        return draw(st.binary(max_size=60))
    if kind == "deep":
        depth = draw(st.sampled_from((3, 500, 100_000)))
        return b"[" * depth + b"]" * draw(st.sampled_from((0, depth)))
    if kind == "other":
        return json.dumps(draw(JSON)).encode()
    names = draw(
        st.lists(st.sampled_from((NAME, SUFFIX, "other.weight", "__metadata__", "")), max_size=3)
    )
    if kind == "twice":
        names = [NAME, NAME]
    pairs = (f"{json.dumps(name)}: {json.dumps(draw(entries()))}" for name in names)
    return ("{" + ", ".join(pairs) + "}").encode()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("headers") / "model.safetensors"


@given(header=headers(), data=st.data())
@examples(1000)
def test_a_table_is_found_inside_its_file_or_not_at_all(file, header, data):
    from gemma_accel.hostmemory import HostTable
    from gemma_accel.loading import find_tensors

    length = len(header) + data.draw(st.sampled_from((0, 0, 0, 0, 1, -1, 50, HUGE, 2**40)))
    content = struct.pack("<Q", max(0, length)) + header + bytes(range(100))
    cut = data.draw(st.sampled_from((None, None, None, 0, 3, 8, 9, -1, -90)))
    content = content[:cut]
    file.write_bytes(content)
    try:
        places = find_tensors(file, suffix=SUFFIX)
    except ValueError as error:
        assert str(file) in str(error)
        return
    for found in places:
        assert found.offset >= 8 + len(header)
        assert found.rows >= 0 and found.columns >= 0
        assert found.offset + found.nbytes <= len(content)
        if found.nbytes:
            inside = content[found.offset : found.offset + found.nbytes]
            read = HostTable(found).tensor().contiguous().view(torch.uint8)
            assert bytes(read.flatten().tolist()) == inside


def test_two_thousand_and_more_are_drawn():
    assert EXAMPLES >= 2000
