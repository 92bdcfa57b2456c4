"""A fault in any kernel module is caught by verify(), and the patch that uses it is named.

Faults are planted where kernels are launched: what a wrong kernel looks like from above. On the CPU
they run in the interpreter, on a card for real. `FAULTS` is how many.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4ClippableLinear

import gemma_accel
from gemma_accel import verify
from gemma_accel.kernels._triton import interpreting
from gemma_accel.kernels.segments import Segments
from tests import tiny
from tests.test_verification import (
    SMALL,
    VISION,
    bent,
    column_unwritten,
    first_too_large,
    plant,
    small,
    too_large,
)
from tests.tiny import LANGUAGE, tiny_model

KERNELS = Path(gemma_accel.__file__).parent / "kernels"
CLIPPED = [*VISION, "vision_clipped_linear"]


class Fault(NamedTuple):
    place: str  # module of kernels, and name in it
    fault: object
    patches: list[str]  # the last is the guilty one
    kind: str = "causal"
    lora: bool = False
    on_card: torch.dtype = torch.float32
    changes: dict = {}


def last_gradient_lost(launcher):
    """The last gradient that was asked for is zero: a program too few."""

    def wrong(*args, **kwargs):
        grads = list(launcher(*args, **kwargs))
        at = max(i for i, grad in enumerate(grads) if grad is not None)
        grads[at] = torch.zeros_like(grads[at])
        return tuple(grads)

    return wrong


def first_row_wrong(launcher):
    """The first row adds a neighbour's."""

    def bend(x):
        x = x.clone()
        x[0, 0] += x[0, 1]
        return x

    def wrong(*args, **kwargs):
        out = launcher(*args, **kwargs)
        return (bend(out[0]), *out[1:]) if isinstance(out, tuple) else bend(out)

    return wrong


def all_too_large(launcher):
    """Whatever it gives, however it is nested."""

    def wrong(*args, **kwargs):
        return bend(launcher(*args, **kwargs))

    def bend(x):
        if isinstance(x, torch.Tensor):
            return x * 1.05
        if isinstance(x, list):
            return [bend(item) for item in x]
        if isinstance(x, tuple):
            items = [bend(item) for item in x]
            return type(x)(*items) if hasattr(x, "_fields") else tuple(items)
        return x

    return wrong


def one_key_too_few(segments):
    """A document's first key is nobody's."""

    def wrong(*args, **kwargs):
        found = segments(*args, **kwargs)
        return Segments(found.first.clamp(min=1), found.last)

    return wrong


def keys_seen_by_nobody(segments):
    """Backward is told that no query sees a key: blocks of them are skipped."""

    def wrong(*args, **kwargs):
        found = segments(*args, **kwargs)
        return Segments(found.first, torch.full_like(found.last, -1))

    return wrong


def decoded_with_the_next_scale(launcher):
    """Every block of 64 takes its neighbour's scale."""

    def wrong(w, first, out):
        return launcher(w._replace(absmax=w.absmax.roll(1)), first, out)

    return wrong


def high_and_low_changed_over(launcher):
    """The two codes of a byte."""

    def wrong(w, first, out):
        packed = (w.packed >> 4) | (w.packed << 4)
        return launcher(w._replace(packed=packed), first, out)

    return wrong


SEGMENT_FAULTS = [one_key_too_few, keys_seen_by_nobody]
NF4_FAULTS = [decoded_with_the_next_scale, high_and_low_changed_over]


def of_next_rows(launcher):
    return lambda table, ids, *args: launcher(table, (ids + 1) % 100, *args)


small_part_wrong = bent("small_part_wrong", 1.02, 1.0)

PLE = ["decoder_layer", "per_layer_embeddings"]
MLP = ["geglu", "lora"]
TOWER = dict(kind="conditional")
# on a card this kernel leaves float32 to SDPA
HALF = dict(kind="conditional", on_card=torch.bfloat16)
ONE_LAYER = dict(num_hidden_layers=1, layer_types=["full_attention"])

PLANTED = [
    Fault("rms_norm.rms_norm_fwd", first_too_large, ["rms_norm"]),
    Fault("rms_norm.rms_norm_bwd", last_gradient_lost, ["rms_norm"]),
    Fault("norm_add.norm_add_fwd", first_row_wrong, ["decoder_layer"]),
    Fault("norm_add.norm_add_bwd", last_gradient_lost, ["decoder_layer"]),
    Fault("geglu.geglu_fwd", column_unwritten, ["geglu"]),
    Fault("geglu.geglu_bwd", last_gradient_lost, ["geglu"]),
    Fault("qk_norm_rope.qkv_norm_rope_fwd", first_too_large, ["qk_norm_rope"]),
    Fault("qk_norm_rope.qkv_norm_rope_bwd", last_gradient_lost, ["qk_norm_rope"]),
    Fault("ple.gather_rows_fwd", of_next_rows, ["per_layer_embeddings"], lora=True),
    Fault("ple.ple_gate_fwd", small_part_wrong, PLE),
    Fault("ple.ple_gate_bwd", first_too_large, PLE),
    Fault("attention.attention_fwd", first_row_wrong, ["attention"], changes=ONE_LAYER),
    Fault("attention.attention_bwd", last_gradient_lost, ["attention"], changes=ONE_LAYER),
    Fault("lora.project_forward", all_too_large, ["decoder_layer", "lora"], lora=True),
    Fault("lora.project_backward", all_too_large, ["decoder_layer", "lora"], lora=True),
    Fault("mlp.project_forward", all_too_large, MLP, lora=True),
    Fault("mlp.geglu_fwd", small_part_wrong, MLP, lora=True),
    Fault("mlp.geglu_bwd", last_gradient_lost, MLP, lora=True),
    Fault("mlp.project_backward", all_too_large, MLP, lora=True),
    Fault("clip.clip_fwd", too_large, ["vision_clipped_linear"], **TOWER),
    Fault("clip.clip_bwd", too_large, ["vision_clipped_linear"], **TOWER),
    Fault("clip_geglu.clip_geglu_fwd", column_unwritten, ["vision_mlp"], **TOWER),
    Fault("clip_geglu.clip_geglu_bwd", last_gradient_lost, ["vision_mlp"], **TOWER),
    Fault("clip_norm.clip_norm_fwd", first_too_large, ["audio_feed_forward"], **TOWER),
    Fault("clip_norm.clip_norm_bwd", first_too_large, ["audio_feed_forward"], **TOWER),
    Fault("clip_norm_add.clip_norm_add_fwd", too_large, ["audio_feed_forward"], **TOWER),
    Fault("clip_norm_add.clip_norm_add_bwd", too_large, ["audio_feed_forward"], **TOWER),
    Fault("clip_silu.clip_silu_fwd", too_large, ["audio_feed_forward"], **TOWER),
    Fault("clip_silu.clip_silu_bwd", too_large, ["audio_feed_forward"], **TOWER),
    Fault("light_conv.light_conv_fwd", column_unwritten, ["audio_light_conv"], **TOWER),
    Fault("light_conv.light_conv_bwd", last_gradient_lost, ["audio_light_conv"], **TOWER),
    Fault("chunked_attention.chunked_attention_fwd", too_large, ["audio_attention"], **TOWER),
    Fault(
        "chunked_attention.chunked_attention_bwd", last_gradient_lost, ["audio_attention"], **TOWER
    ),
    Fault("vision_qkv.vision_qkv_fwd", first_too_large, ["vision_attention"], **TOWER),
    Fault("vision_qkv.vision_qkv_bwd", last_gradient_lost, ["vision_attention"], **TOWER),
    Fault("vision_attention.vision_attention_fwd", all_too_large, ["vision_attention"], **HALF),
    Fault(
        "vision_attention.vision_attention_bwd", last_gradient_lost, ["vision_attention"], **HALF
    ),
]
"""Faults in launchers. Those of `segments` and `nf4` have tests of their own below."""


def name_of(fault):
    return f"{fault.place}-{fault.fault.__name__}" if isinstance(fault, Fault) else None


@pytest.fixture(autouse=True)
def short_towers(monkeypatch):
    for tower in (tiny.VISION, tiny.AUDIO):
        monkeypatch.setitem(tower, "num_hidden_layers", 1)


def hold(model):
    """Ranges for the towers' clipped linears: a new model's are infinite, and no clamp is run."""
    for module in model.modules():
        if isinstance(module, Gemma4ClippableLinear):
            for name, bound in (("min", -2.0), ("max", 1.5)):
                getattr(module, f"input_{name}").fill_(bound)
                getattr(module, f"output_{name}").fill_(bound * 0.75)


def model_for(fault, device):
    dtype = fault.on_card if device == "cuda" else torch.float32
    model = small(fault.kind, patches=(), lora=fault.lora, dtype=dtype, **fault.changes)
    hold(model.to(device))
    gemma_accel.apply(model, patches=fault.patches)
    return model


def caught(monkeypatch, fault, device):
    model = model_for(fault, device)
    plant(monkeypatch, f"kernels.{fault.place}", fault.fault)
    result = verify(model)
    assert not result.ok
    assert result.guilty[0] == fault.patches[-1], str(result)


interpreted = pytest.mark.skipif(not interpreting(), reason="the same faults run on the card below")


@interpreted
@pytest.mark.parametrize("fault", PLANTED, ids=name_of)
def test_a_fault_in_a_launcher_is_caught_and_its_patch_named(monkeypatch, fault):
    caught(monkeypatch, fault, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("fault", PLANTED, ids=name_of)
def test_a_fault_in_a_launcher_on_the_card_is_caught(monkeypatch, fault):
    caught(monkeypatch, fault, "cuda")


HELD = ("vision_clipped_linear", "vision_mlp", "audio_feed_forward", "audio_light_conv")
HEALTHY = {fault.patches[-1]: fault for fault in PLANTED if fault.patches[-1] in HELD}


@interpreted
@pytest.mark.parametrize("fault", HEALTHY.values(), ids=HEALTHY)
def test_without_the_fault_nobody_is_guilty(fault):
    """Of the rest, `tests/test_verification.py` has healthy models; these have ranges here."""
    result = verify(model_for(fault, "cpu"))
    assert result.ok, str(result)


@pytest.mark.gpu
@pytest.mark.parametrize("fault", {f.patches[-1]: f for f in PLANTED}.values(), ids=name_of)
def test_without_the_fault_nobody_is_guilty_on_the_card(fault):
    result = verify(model_for(fault, "cuda"))
    assert result.ok, str(result)


@interpreted
@pytest.mark.parametrize("fault", SEGMENT_FAULTS)
def test_a_fault_in_segments_is_caught(monkeypatch, fault):
    """What a row may see, worked out once a batch: `attention` is handed it."""
    model = small(patches=["attention"], **ONE_LAYER)
    plant(monkeypatch, "patches.attention.segments_from_attention_mask", fault)
    assert verify(model).guilty == ["attention"]


@pytest.fixture(scope="module")
def nf4(tmp_path_factory):
    """A model in four bits, adapted: stock decodes its weights, `lora` does with a kernel."""
    path = tmp_path_factory.mktemp("nf4")
    tiny_model("causal", hidden_size_per_layer_input=64, **SMALL).save_pretrained(path)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    return get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE))


@interpreted
@pytest.mark.parametrize("fault", NF4_FAULTS)
def test_a_fault_in_nf4_is_caught(monkeypatch, nf4, fault):
    report = gemma_accel.apply(nf4, patches=MLP)
    try:
        plant(monkeypatch, "kernels.nf4.nf4_dequantize_fwd", fault)
        assert verify(nf4).guilty == ["lora"]
    finally:
        report.restore()


FAULTS = len(PLANTED) + len(SEGMENT_FAULTS) + len(NF4_FAULTS)
"""Faults planted beneath the ops, all of them caught."""


def test_every_kernel_module_has_a_fault():
    planted = {fault.place.split(".")[0] for fault in PLANTED} | {"segments", "nf4"}
    modules = {path.stem for path in KERNELS.glob("*.py") if not path.stem.startswith("_")}
    assert planted == modules


def test_every_launcher_has_a_fault():
    """What launches a kernel is called `*_fwd` or `*_bwd`; a new one is missed here."""
    planted = {fault.place for fault in PLANTED} | {"nf4.nf4_dequantize_fwd"}
    for path in KERNELS.glob("[a-z]*.py"):
        names = (n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef))
        launchers = {n for n in names if n[0] != "_" and n.endswith(("_fwd", "_bwd"))}
        assert {f"{path.stem}.{name}" for name in launchers} <= planted


def test_faults_are_counted():
    assert FAULTS >= 40
