"""Every kernel, forward and backward, against the lines of stock that it replaces, on the same
inputs: the shapes of E2B training on 2 x 2048 tokens, two pictures, and thirty seconds of sound.

    pytest benchmarks/test_kernels.py -k "geglu or norm"

Weights of norms are frozen, as they are under LoRA. A time is that of one call and its backward,
launched from Python, with the device waited for; "GPU" is the device's part of it.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.correctness import Case, call, calls
from gemma_accel.kernels.chunked_attention import chunked_attention
from gemma_accel.kernels.clip import Range, clip
from gemma_accel.kernels.clip_geglu import clip_geglu
from gemma_accel.kernels.clip_norm import clip_norm
from gemma_accel.kernels.clip_norm_add import clip_norm_add
from gemma_accel.kernels.clip_silu import clip_silu
from gemma_accel.kernels.geglu import geglu
from gemma_accel.kernels.light_conv import light_conv
from gemma_accel.kernels.lora import project, project_ref
from gemma_accel.kernels.mlp import gated_mlp, gated_mlp_ref
from gemma_accel.kernels.nf4 import nf4_dequantize, nf4_weight
from gemma_accel.kernels.norm_add import norm_add
from gemma_accel.kernels.ple import gather_rows, ple_gate
from gemma_accel.kernels.qk_norm_rope import qkv_norm_rope
from gemma_accel.kernels.rms_norm import rms_norm
from gemma_accel.kernels.vision_attention import vision_attention
from gemma_accel.kernels.vision_qkv import vision_qkv
from tests.kernels import (
    test_chunked_attention,
    test_clip,
    test_clip_geglu,
    test_clip_norm,
    test_clip_norm_add,
    test_clip_silu,
    test_geglu,
    test_light_conv,
    test_lora,
    test_nf4,
    test_norm_add,
    test_qk_norm_rope,
    test_rms_norm,
    test_vision_attention,
    test_vision_qkv,
)

B, T, D = 2, 2048, 1536
PATCHES, FRAMES = (2, 2520), (1, 750)
NUMBER = 2  # bytes of a bfloat16


def size(*shape: int) -> int:
    return NUMBER * torch.Size(shape).numel()


# ---- text


def rms_norm_calls(device, dtype, shape=(B, T, D)):
    x, weight, dy = test_rms_norm.make(shape, dtype, device)

    def liger(x, weight):
        from liger_kernel.transformers.functional import liger_rms_norm

        # in place it would write into the gradient that the next round reads
        return liger_rms_norm(x, weight, eps=1e-6, casting_mode="gemma", in_place=False)

    inputs = {"x": x, "weight": weight}
    return calls(inputs, [dy], ("x",), stock=test_rms_norm.stock, ours=rms_norm, liger=liger)


def norm_add_calls(device, dtype, shape=(B, T, D)):
    inputs, grads = test_norm_add.make(shape, dtype, device, ("next_weight",))
    wanted = ("x", "residual")
    return calls(inputs, grads, wanted, stock=test_norm_add.stock, ours=norm_add)


def geglu_calls(device, dtype, shape=(B, T, 6144)):
    gate, up, dy = test_geglu.make(shape, dtype, device)

    def liger(gate, up):
        from liger_kernel.transformers.functional import liger_geglu

        return liger_geglu(gate, up)

    inputs, wanted = {"gate": gate, "up": up}, ("gate", "up")
    return calls(inputs, [dy], wanted, stock=test_geglu.stock, ours=geglu, liger=liger)


def rope_calls(device, dtype, shape=(B, T, 8, 1, 256, None)):
    inputs, pairs, grads = test_qk_norm_rope.make(shape, dtype, device)
    ours = functools.partial(qkv_norm_rope, rotary_pairs=pairs)
    return calls(inputs, grads, ("q", "k", "v"), stock=test_qk_norm_rope.stock, ours=ours)


def gather_calls(device, dtype, rows=32768, layers=35, width=256):
    """All layers' columns; the table on the device in both, so that the kernel is what differs."""
    table = torch.randn(rows, layers * width, device=device).to(dtype)
    ids = torch.randint(0, rows, (B, T), device=device)

    def stock(table, ids):
        return tuple(F.embedding(ids, table).view(*ids.shape, layers, width).unbind(2))

    def ours(table, ids):
        return tuple(gather_rows(table, ids, i * width, width) for i in range(layers))

    made = {"table": table, "ids": ids}
    return {"stock": lambda: numbered(stock(**made)), "ours": lambda: numbered(ours(**made))}


def numbered(outs):
    return {f"y{i}": y for i, y in enumerate(outs)}


def ple_calls(device, dtype, shape=(B, T, 256)):
    names = ("gate", "projection", "rows")
    inputs = {name: torch.randn(shape).to(device, dtype) for name in names}
    inputs["norm_weight"] = (torch.randn(shape[-1]) + 0.5).to(device, dtype)
    scales = dict(projection_scale=D**-0.5, rows_scale=16.0, input_scale=2**-0.5)

    def stock(gate, projection, rows, norm_weight):
        """project_per_layer_inputs and the decoder layer's gate, one layer's share of each."""
        context = test_rms_norm.stock(projection * scales["projection_scale"], norm_weight)
        ple = (context + rows * scales["rows_scale"]) * scales["input_scale"]
        return F.gelu(gate, approximate="tanh") * ple

    grads = [torch.randn(shape).to(device, dtype)]
    ours = functools.partial(ple_gate, **scales)
    return calls(inputs, grads, ("gate", "projection"), stock=stock, ours=ours)


def nf4_calls(device, dtype, shape=(6144, D)):
    import bitsandbytes.functional as bnb

    param = test_nf4.quantised(shape, dtype, device=device)
    return {
        "stock": lambda: {"w": bnb.dequantize_4bit(param.data, param.quant_state)},
        "ours": lambda: {"w": nf4_dequantize(nf4_weight(param))},
    }


class Layers(nn.Module):
    """Linear layers in NF4 with adapters of rank 16, as PEFT builds them."""

    def __init__(self, shapes, device, dtype, *, quantised, rank=16):
        super().__init__()
        from bitsandbytes.nn import Linear4bit
        from peft import LoraConfig, inject_adapter_in_model

        for name, (width, out) in shapes.items():
            if quantised:
                layer = Linear4bit(width, out, bias=False, quant_type="nf4", compute_dtype=dtype)
            else:
                layer = nn.Linear(width, out, bias=False)
            setattr(self, name, layer.to(dtype))
        self.is_loaded_in_4bit = quantised
        self.to(device).requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=rank, target_modules=list(shapes)), self)
        self.to(device).train()
        for name, parameter in self.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter.data, dtype=dtype)
                parameter.data *= (1.0 if "lora_A" in name else 0.15) / parameter.shape[1] ** 0.5
        self.projections = [test_lora.projection_of(getattr(self, name)) for name in shapes]

    def trained(self, projections=None):
        return {
            f"{name}{i}": getattr(p, name)
            for i, p in enumerate(projections or self.projections)
            for name in ("lora_a", "lora_b")
        }


def adapted_calls(shapes, device, dtype, rows, *, stock, ours, truth, quantised):
    """Calls of PEFT's layers and of an op on their parameters; the truth in float64."""
    layers = Layers(shapes, device, dtype, quantised=quantised)
    width = next(iter(shapes.values()))[0]
    x = torch.randn(*rows, width, device=device).to(dtype)
    outs = list(shapes.values()) if stock is project_stock else list(shapes.values())[-1:]
    grads = [torch.randn(*rows, out, device=device).to(dtype) for _, out in outs]
    exact = [test_lora.in_float64(p) for p in layers.projections]

    def of(function, projections, to=None):
        more = layers.trained(projections)
        return call(function, {"x": x}, grads, ("x",), to, more)

    return {
        "stock": of(lambda x: stock(layers, x), layers.projections),
        "ours": of(lambda x: ours(x, *layers.projections), layers.projections),
        "truth": of(lambda x: truth(x, *exact), exact, torch.float64),
    }


def project_stock(layers, x):
    return tuple(getattr(layers, name)(x) for name in ("q_proj", "k_proj", "v_proj"))


def mlp_stock(layers, x):
    hidden = F.gelu(layers.gate_proj(x), approximate="tanh") * layers.up_proj(x)
    return layers.down_proj(hidden)


def lora_calls(device, dtype, rows=(B, T), width=D, outs=(2048, 256, 256), quantised=True):
    shapes = dict(zip(("q_proj", "k_proj", "v_proj"), ((width, n) for n in outs), strict=True))
    how = dict(stock=project_stock, ours=project, truth=project_ref, quantised=quantised)
    return adapted_calls(shapes, device, dtype, rows, **how)


def mlp_calls(device, dtype, rows=(B, T), width=D, wide=6144, quantised=True):
    shapes = {"gate_proj": (width, wide), "up_proj": (width, wide), "down_proj": (wide, width)}
    how = dict(stock=mlp_stock, ours=gated_mlp, truth=gated_mlp_ref, quantised=quantised)
    return adapted_calls(shapes, device, dtype, rows, **how)


# ---- towers

HELD = Range(-3.0, 3.0)


def clip_calls(device, dtype, shape=(*PATCHES, 768)):
    x, dy = test_clip.make(shape, dtype, device, HELD)

    def stock(x, low, high):
        return torch.clamp(x, low, high)

    def ours(x, low, high):
        return clip(x, HELD)

    ends = {k: torch.tensor(v, device=device, dtype=dtype) for k, v in HELD._asdict().items()}
    return calls({"x": x, **ends}, [dy], ("x",), stock=stock, ours=ours)


def clip_geglu_calls(device, dtype, shape=(*PATCHES, 3072)):
    way = dict(gate_range=HELD, up_range=HELD, after=HELD)
    gate, up, dy = test_clip_geglu.make(shape, dtype, device, way)
    stock, ours = (functools.partial(f, **way) for f in (test_clip_geglu.stock, clip_geglu))
    return calls({"gate": gate, "up": up}, [dy], ("gate", "up"), stock=stock, ours=ours)


def clip_norm_calls(device, dtype, shape=(*FRAMES, 1024)):
    way = dict(before=HELD, after=HELD)
    x, weight, dy = test_clip_norm.make(shape, dtype, device, way)
    stock, ours = (functools.partial(f, **way) for f in (test_clip_norm.stock, clip_norm))
    return calls({"x": x, "weight": weight}, [dy], ("x",), stock=stock, ours=ours)


def clip_norm_add_calls(device, dtype, shape=(*PATCHES, 768)):
    joint = test_clip_norm_add.NEXT | dict(before=HELD, after=HELD)
    inputs, grads = test_clip_norm_add.make(shape, dtype, device, joint)
    way = test_clip_norm_add.options(joint)
    stock, ours = (functools.partial(f, **way) for f in (test_clip_norm_add.stock, clip_norm_add))
    return calls(inputs, grads, ("x", "residual"), stock=stock, ours=ours)


def clip_silu_calls(device, dtype, shape=(*FRAMES, 4096)):
    way = dict(before=HELD, after=HELD)
    x, dy = test_clip_silu.make(shape, dtype, device, way)
    stock, ours = (functools.partial(f, **way) for f in (test_clip_silu.stock, clip_silu))
    return calls({"x": x}, [dy], ("x",), stock=stock, ours=ours)


def vision_qkv_calls(device, dtype, shape=(*PATCHES, 12, 12, 64)):
    way = dict(q_range=HELD, k_range=HELD, v_range=HELD)
    inputs, grads = test_vision_qkv.make(shape, dtype, device, way)
    stock, ours = (functools.partial(f, **way) for f in (test_vision_qkv.stock, vision_qkv))
    return calls(inputs, grads, ("q", "k", "v"), stock=stock, ours=ours)


def vision_attention_calls(device, dtype, shape=(*PATCHES, 12, 64), lengths=(2520, 2394)):
    inputs, seen, do = test_vision_attention.make((shape, list(lengths)), dtype, device)
    stock, ours = (
        functools.partial(f, seen=seen) for f in (test_vision_attention.stock, vision_attention)
    )
    return calls(inputs, [do], ("q", "k", "v"), stock=stock, ours=ours)


def light_conv_calls(device, dtype, shape=(*FRAMES, 1024, 5)):
    way = dict(before=HELD, middle=Range(-1e10, 1e10), after=HELD)
    inputs, dy = test_light_conv.make(shape, dtype, device, way)
    stock, ours = (functools.partial(f, **way) for f in (test_light_conv.stock, light_conv))
    return calls(inputs, [dy], ("x",), stock=stock, ours=ours)


def chunked_attention_calls(device, dtype, shape=(*FRAMES, 8, 128)):
    way = dict(q_range=HELD, k_range=HELD, v_range=HELD, after=HELD)
    case = (shape, test_chunked_attention.OFFICIAL)
    inputs, mask, chunks, do = test_chunked_attention.make(case, dtype, device, way)

    def stock(**inputs):
        test_chunked_attention.stock.dtype = inputs["q"].dtype
        return test_chunked_attention.stock(**inputs, mask=mask, chunks=chunks, **way)

    ours = functools.partial(chunked_attention, mask=mask, chunks=chunks, **way)
    return calls(inputs, [do], ("q", "k", "v"), stock=stock, ours=ours)


# ---- the table

HIDDEN, NARROW, VISION = size(B, T, D), size(B, T, 6144), size(*PATCHES, 768)

# moved: what forward reads and writes, then what backward does
CASES = [
    Case("rms_norm", "2x2048x1536", rms_norm_calls, moved=5 * HIDDEN, liger=True, reduced=D),
    Case("norm_add", "2x2048x1536", norm_add_calls, moved=10 * HIDDEN, reduced=D),
    Case(
        "qk_norm_rope", "2x2048, 8+1+1 heads of 256", rope_calls,
        moved=5 * size(B, T, 10, 256), reduced=256,
    ),
    Case(
        "qk_norm_rope", "2x2048, 8+1+1 heads of 512",
        functools.partial(rope_calls, shape=(B, T, 8, 1, 512, 64)),
        moved=5 * size(B, T, 10, 512), reduced=512,
    ),
    Case("geglu", "2x2048x6144", geglu_calls, moved=8 * NARROW, liger=True),
    Case(
        "ple", "gather 2x2048, 35 layers", gather_calls,
        moved=2 * size(B, T, 35, 256), to_the_bit=True,
    ),
    Case("ple", "gate 2x2048x256", ple_calls, moved=10 * size(B, T, 256), reduced=256),
    Case("nf4", "6144x1536", nf4_calls, moved=6144 * D // 2 + size(6144, D), to_the_bit=True),
    Case(
        "lora", "q k v 2x2048, NF4, r16", lora_calls, reduced=B * T,
        flops=4 * B * T * D * 2560 + 6 * B * T * 16 * (3 * D + 2560),
    ),
    Case(
        "mlp", "2x2048x6144, NF4, r16", mlp_calls, reduced=6144,
        flops=4 * B * T * 3 * D * 6144 + 6 * B * T * 16 * 3 * (D + 6144),
    ),
    Case("clip", "2x2520x768", clip_calls, moved=5 * VISION),
    Case("clip_geglu", "2x2520x3072", clip_geglu_calls, moved=8 * size(*PATCHES, 3072)),
    Case("clip_norm", "750x1024", clip_norm_calls, moved=5 * size(*FRAMES, 1024), reduced=1024),
    Case("clip_norm_add", "2x2520x768", clip_norm_add_calls, moved=10 * VISION, reduced=768),
    Case("clip_silu", "750x4096", clip_silu_calls, moved=5 * size(*FRAMES, 4096)),
    Case("vision_qkv", "2x2520, 12 heads of 64", vision_qkv_calls, moved=15 * VISION, reduced=64),
    Case(
        "vision_attention", "2x2520, 12 heads of 64, padded", vision_attention_calls,
        flops=14 * PATCHES[0] * PATCHES[1] ** 2 * 768, reduced=2520,
    ),
    Case(
        "light_conv", "750x1024", light_conv_calls,
        moved=8 * size(*FRAMES, 1024), reduced=5 * 1024,
    ),
    Case("chunked_attention", "750, 8 heads of 128", chunked_attention_calls, reduced=128 * 24),
]  # fmt: skip


def small(op, shape, make, **how):
    how = dict(dtype=torch.float32, device="cpu") | how
    return Case(op, f"small, {shape}", make, **how)


# what a machine without a card has to show: the references, which `apply` installs there
SMALL = [
    small(
        "rms_norm", "64x256", functools.partial(rms_norm_calls, shape=(64, 256)), reduced=256
    ),
    small(
        "norm_add", "64x256", functools.partial(norm_add_calls, shape=(64, 256)), reduced=256
    ),
    small("geglu", "64x512", functools.partial(geglu_calls, shape=(64, 512))),
    small(
        "qk_norm_rope", "2x32, 4+1+1 heads of 64",
        functools.partial(rope_calls, shape=(2, 32, 4, 1, 64, None)), reduced=64,
    ),
    small(
        "lora", "q k v 2x32, r16",
        functools.partial(lora_calls, rows=(2, 32), width=128, outs=(128, 64, 64), quantised=False),
        reduced=512,
    ),
    small(
        "mlp", "2x32x256, r16",
        functools.partial(mlp_calls, rows=(2, 32), width=64, wide=256, quantised=False),
        reduced=512,
    ),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "stack"), [(c, s) for c in CASES for s in c.stacks], ids=str)
def test_kernel(case, stack, timed):
    timed(case, stack)


@pytest.mark.parametrize(("case", "stack"), [(c, s) for c in SMALL for s in c.stacks], ids=str)
def test_small(case, stack, timed):
    timed(case, stack)


def test_the_gate_sees_a_wrong_result(gate):
    """An op whose gradient is off by one per cent is not timed."""

    def broken(device, dtype):
        made = rms_norm_calls(device, dtype, shape=(64, 256))
        right = made["ours"]
        made["ours"] = lambda: {k: v * 1.01 if k == "dx" else v for k, v in right().items()}
        return made

    assert (
        gate(small("rms_norm", "right", functools.partial(rms_norm_calls, shape=(4, 64)))) is None
    )
    assert "dx" in gate(small("rms_norm", "broken", broken))


def test_every_kernel_file_has_a_case():
    """`segments` is timed with attention, in test_attention.py."""
    import pkgutil

    from gemma_accel import kernels

    files = {module.name for module in pkgutil.iter_modules(kernels.__path__)}
    timed_here = {case.op for case in CASES}
    assert files - {"_triton"} == timed_here | {"attention", "segments"}
