"""verify(): a healthy model passes, a planted fault is caught and named, nothing is left behind.

Faults are planted where a patch takes its op from: that is what a kernel that computes something
else looks like from the model. Some are planted in launchers, beneath kernels in the interpreter.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import gemma_accel
from gemma_accel import Verification, verification, verify
from gemma_accel.memory import Mode
from gemma_accel.models import base_model
from gemma_accel.patches.lm_head import _head_runs_on
from gemma_accel.patches.per_layer import HostPerLayerEmbedding, _send_away
from gemma_accel.patches.seams import Fused
from gemma_accel.patches.towers import watch_towers
from gemma_accel.patching import report_of
from gemma_accel.verification import EVERYTHING, VerificationError, verify_before_training
from gemma_accel.verification.comparison import Comparison
from gemma_accel.verification.judgement import Judge
from gemma_accel.verification.runs import Probe
from tests.tiny import LANGUAGE, batch, tiny_model

references = pytest.mark.usefixtures("references")

# two layers, one of each kind: what most tests need
SMALL = dict(
    num_hidden_layers=2,
    layer_types=["sliding_attention", "full_attention"],
    num_kv_shared_layers=0,
)
# the patches that must be there for a patch to do its work
TEXT = ["qk_norm_rope", "geglu", "decoder_layer", "per_layer_embeddings", "lora"]
VISION = ["vision_attention", "vision_mlp", "vision_layer"]
AUDIO = ["audio_attention", "audio_feed_forward", "audio_light_conv", "audio_layer"]


def small(kind="causal", *, patches=None, lora=False, seed=0, **changes):
    """A small model, applied with ``patches`` (() leaves it stock)."""
    changes = {**SMALL, "towers": kind == "conditional", **changes}
    model = tiny_model(kind, seed=seed, **changes)
    if lora:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE))
    if patches != ():
        gemma_accel.apply(model, patches=patches)
    return model


def text(model):
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    return getattr(model.model, "language_model", model.model)


# --- faults -------------------------------------------------------------------------------------


class Bent(torch.autograd.Function):
    """Its input, times one factor on the way there and another on the way back."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return x * there

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.back, None, None


def through(change, value):
    if isinstance(value, tuple):
        return tuple(through(change, part) for part in value)
    is_number = isinstance(value, torch.Tensor) and value.is_floating_point()
    return change(value) if is_number else value


def bent(name, there, back):
    def fault(op):
        bend = lambda x: Bent.apply(x, there, back)  # noqa: E731
        return lambda *args, **kwargs: through(bend, op(*args, **kwargs))

    fault.__name__ = name
    return fault


too_large = bent("too_large", 1.01, 1.01)
gradient_flipped = bent("gradient_flipped", 1.0, -1.0)
gradient_too_small = bent("gradient_too_small", 1.0, 0.98)
not_a_number = bent("not_a_number", float("nan"), 1.0)


def no_gradient(op):
    return lambda *args, **kwargs: through(torch.Tensor.detach, op(*args, **kwargs))


def column_unwritten(op):
    """A mask too short by one: the last column is never written."""

    def cut(x):
        x = x.clone()
        x[..., -1] = 0
        return x

    return lambda *args, **kwargs: through(cut, op(*args, **kwargs))


def first_too_large(op):
    def wrong(*args, **kwargs):
        first, *rest = op(*args, **kwargs)
        return first * 1.01, *rest

    return wrong


def residual_lost(op):
    return lambda x, residual, *args, **kw: op(x, torch.zeros_like(residual), *args, **kw)


def raises(op):
    def wrong(*args, **kwargs):
        raise RuntimeError("this card has no such instruction")

    return wrong


def given(**values):
    """Works with other arguments than it was given."""

    def fault(op):
        return lambda *args, **kwargs: op(*args, **{**kwargs, **values})

    fault.__name__ = "_".join(values)
    return fault


def window_wider(op):
    def wrong(*args, window=None, **kwargs):
        return op(*args, window=None if window is None else window + 1, **kwargs)

    return wrong


def rows_shifted(op):
    return lambda table, ids, *args: op(table, (ids + 1) % 100, *args)


def plant(monkeypatch, place, fault):
    module, name = place.rsplit(".", 1)
    module = importlib.import_module(f"gemma_accel.{module}")
    monkeypatch.setattr(module, name, fault(getattr(module, name)))


def names_of(fault):
    return getattr(fault, "__name__", None)


TEXT_FAULTS = {
    "rms_norm": [
        ("norms.rms_norm", too_large),
        ("norms.rms_norm", gradient_flipped),
        ("norms.rms_norm", column_unwritten),
    ],
    "qk_norm_rope": [
        ("decoder.qkv_norm_rope", first_too_large),
        ("decoder.qkv_norm_rope", gradient_flipped),
        ("decoder.qkv_norm_rope", given(rotary_pairs=2)),
    ],
    "geglu": [
        ("decoder.geglu", too_large),  # a norm follows: the layer's output does not change
        ("decoder.geglu", gradient_flipped),
        ("decoder.geglu", no_gradient),
        ("decoder.geglu", not_a_number),
        ("decoder.geglu", raises),
    ],
    "decoder_layer": [
        ("decoder.norm_add", too_large),
        ("decoder.norm_add", residual_lost),
        ("decoder.norm_add", gradient_too_small),
        ("decoder.norm_add", no_gradient),
    ],
    "per_layer_embeddings": [
        ("per_layer.ple_gate", too_large),
        ("per_layer.ple_gate", given(input_scale=0.5)),
        ("per_layer.gather_rows", rows_shifted),
    ],
    "lora": [
        ("lora.project_modules", too_large),
        ("lora.project_modules", gradient_flipped),
        ("lora.gated_mlp", too_large),
        ("lora.gated_mlp", column_unwritten),
    ],
    "attention": [
        ("attention.attention", too_large),
        ("attention.attention", gradient_flipped),
        ("attention.attention", given(scale=0.9)),
        ("attention.attention", window_wider),
    ],
}
TEXT_FAULTS = [(place, fault, patch) for patch, of in TEXT_FAULTS.items() for place, fault in of]


@references
@pytest.mark.parametrize(("place", "fault", "patch"), TEXT_FAULTS, ids=names_of)
def test_a_fault_in_the_text_model_is_caught_and_its_patch_named(monkeypatch, place, fault, patch):
    plant(monkeypatch, f"patches.{place}", fault)
    patches = TEXT if patch in TEXT else [patch]
    frozen = patch == "lora" or fault is rows_shifted
    result = verify(small(patches=patches, lora=frozen))
    assert not result.ok
    assert result.guilty[0] == patch, str(result)


TOWER_FAULTS = [
    ("vision.vision_qkv", first_too_large, "vision_attention"),
    ("vision.vision_qkv", gradient_flipped, "vision_attention"),
    ("vision.clip_geglu", gradient_flipped, "vision_mlp"),
    ("vision.clip_geglu", column_unwritten, "vision_mlp"),
    ("vision.clip_norm_add", too_large, "vision_layer"),
    ("vision.clip_norm_add", residual_lost, "vision_layer"),
    ("vision.clip_norm", column_unwritten, "vision_layer"),
    ("vision.clip", gradient_flipped, "vision_attention"),
    ("audio.chunked_attention", gradient_flipped, "audio_attention"),
    ("audio.chunked_attention", column_unwritten, "audio_attention"),
    ("audio.clip_silu", gradient_flipped, "audio_feed_forward"),
    ("audio.clip_norm_add", too_large, "audio_feed_forward"),
    ("audio.clip_norm", column_unwritten, "audio_feed_forward"),
    ("audio.light_conv", too_large, "audio_light_conv"),
    ("audio.light_conv", gradient_too_small, "audio_light_conv"),
    ("clipped.project_modules", too_large, "vision_lora"),
]


@references
@pytest.mark.parametrize(("place", "fault", "patch"), TOWER_FAULTS, ids=names_of)
def test_a_fault_in_a_tower_is_caught_and_its_patch_named(monkeypatch, place, fault, patch):
    plant(monkeypatch, f"patches.{place}", fault)
    patches = [*VISION, "vision_lora"] if patch in (*VISION, "vision_lora") else AUDIO
    result = verify(small("conditional", patches=patches))
    assert not result.ok
    assert result.guilty[0] == patch, str(result)


KERNEL_FAULTS = [  # (launcher, fault, patches in, guilty, model)
    ("rms_norm.rms_norm_fwd", first_too_large, ["rms_norm"], "causal"),
    ("rms_norm.rms_norm_bwd", first_too_large, ["rms_norm"], "causal"),
    ("geglu.geglu_fwd", too_large, ["geglu"], "causal"),
    ("geglu.geglu_bwd", first_too_large, ["geglu"], "causal"),
    ("qk_norm_rope.qkv_norm_rope_bwd", first_too_large, ["qk_norm_rope"], "causal"),
    ("clip_geglu.clip_geglu_bwd", first_too_large, ["vision_mlp"], "conditional"),
    ("clip_silu.clip_silu_bwd", too_large, ["audio_feed_forward"], "conditional"),
]


@pytest.mark.parametrize(("launcher", "fault", "patches", "kind"), KERNEL_FAULTS, ids=names_of)
def test_a_fault_in_a_kernel_is_caught(monkeypatch, launcher, fault, patches, kind):
    if torch.cuda.is_available():
        pytest.skip("the same faults run on the card below")
    plant(monkeypatch, f"kernels.{launcher}", fault)
    assert verify(small(kind, patches=patches)).guilty == patches


@pytest.mark.parametrize(
    ("patches", "kind"), [(["geglu"], "causal"), (["vision_mlp"], "conditional")]
)
def test_kernels_pass(patches, kind):
    result = verify(small(kind, patches=patches))
    assert result.ok, str(result)


@pytest.mark.gpu
@pytest.mark.parametrize(("launcher", "fault", "patches", "kind"), KERNEL_FAULTS, ids=names_of)
def test_a_fault_in_a_kernel_on_the_card_is_caught(monkeypatch, launcher, fault, patches, kind):
    model = small(kind, patches=()).cuda()
    gemma_accel.apply(model, patches=patches)
    assert verify(model).ok
    plant(monkeypatch, f"kernels.{launcher}", fault)
    assert verify(model).guilty == patches


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_healthy_model_on_the_card_passes(dtype, lora):
    model = tiny_model("conditional", dtype=dtype).cuda()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE))
    report = gemma_accel.apply(model)
    before = snapshot(model)
    result = verify(model)
    assert result.ok, str(result)
    rows = {row.patch: row for row in result.rows}
    assert rows.keys() > {"cuda_graphs", EVERYTHING}
    # a table that is trained keeps graphs away
    assert rows["cuda_graphs"].tried == lora, rows["cuda_graphs"].note
    assert_same(model, before)
    report.restore()
    assert not [m for m in model.modules() if isinstance(m, Fused)]


@references
@pytest.mark.parametrize(
    ("place", "fault", "patch"),
    [
        ("decoder.geglu", too_large, "geglu"),
        ("decoder.norm_add", too_large, "decoder_layer"),
        ("attention.attention", too_large, "attention"),
        ("attention.attention", window_wider, "attention"),
    ],
    ids=names_of,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_hundredth_too_much_shows_among_the_roundings(monkeypatch, dtype, place, fault, patch):
    plant(monkeypatch, f"patches.{place}", fault)
    patches = TEXT if patch in TEXT else [patch]
    # tokens enough for roundings to average out
    result = verify(small(patches=patches, dtype=dtype, sliding_window=64))
    assert result.guilty[:1] == [patch], str(result)


@references
@pytest.mark.parametrize("mode", [Mode.RECOMPUTE_MLP, Mode.RECOMPUTE, Mode.OFFLOAD_IN_PARTS])
def test_a_fault_in_one_memory_mode_is_caught_whatever_this_batch_would_choose(monkeypatch, mode):
    from gemma_accel.patches.checkpointing import MemoryPolicy

    right = MemoryPolicy.run

    def wrong(self, layer, stock, forward, hidden, *rest):
        out = right(self, layer, stock, forward, hidden, *rest)
        return Bent.apply(out, 1.0, 1.01) if self.modes(hidden)[layer.layer_idx] is mode else out

    monkeypatch.setattr(MemoryPolicy, "run", wrong)
    model = tiny_model("causal")
    gemma_accel.apply(model, patches=[*TEXT, "checkpointing"])
    assert verify(model).guilty == ["checkpointing"]


@references
@pytest.mark.skipif(not _head_runs_on("cpu"), reason="this TRL's head needs a GPU")
def test_a_wrong_loss_is_caught(monkeypatch):
    plant(
        monkeypatch,
        "patches.lm_head._LossOutput",
        lambda made: lambda known: made({**known, "loss": known["loss"] * 1.001}),
    )
    assert verify(small(patches=["lm_head"])).guilty == ["lm_head"]


@references
def test_a_table_read_wrong_is_caught(monkeypatch):
    """A table that is not on the device is compared with plain reads of its Parameter."""
    model = small(patches=())
    _send_away(text(model).embed_tokens_per_layer)
    gemma_accel.apply(model)
    assert verify(model).ok
    fetch = HostPerLayerEmbedding.fetch
    monkeypatch.setattr(HostPerLayerEmbedding, "fetch", lambda self, ids: fetch(self, ids.flip(1)))
    assert verify(model).guilty == ["per_layer_embeddings"]


@references
def test_what_needs_a_guilty_patch_is_not_tried_and_the_others_are(monkeypatch):
    plant(monkeypatch, "patches.decoder.geglu", gradient_flipped)
    result = verify(small(patches=["rms_norm", *TEXT, "attention"], lora=True))
    rows = {row.patch: row for row in result.rows}
    # the layer takes the same op for what no patch of its own has: it is as wrong
    assert result.guilty == ["geglu", "decoder_layer"]
    assert rows["lora"].reason == "not tried: it needs 'geglu'"
    assert not rows["lora"].tried and not rows["lora"].ok
    assert rows["rms_norm"].ok and rows["qk_norm_rope"].ok and rows["attention"].ok
    assert EVERYTHING not in rows


@references
def test_what_raises_is_guilty_and_says_what(monkeypatch):
    plant(monkeypatch, "patches.norms.rms_norm", raises)
    result = verify(small(patches=["rms_norm", "geglu"]))
    assert result.guilty == ["rms_norm"]
    assert result.rows[0].reason == "RuntimeError: this card has no such instruction"
    assert "RuntimeError" in str(result)


# --- healthy models -----------------------------------------------------------------------------


@references
@pytest.mark.parametrize(
    ("kind", "lora", "applied", "dtype"),
    [
        ("causal", False, False, torch.float32),
        ("causal", True, True, torch.bfloat16),
        ("conditional", True, False, torch.float16),
        ("conditional", False, True, torch.bfloat16),
    ],
)
def test_a_healthy_model_passes(kind, lora, applied, dtype):
    """All of E2B's branches; checkpointed where it is applied."""
    model = tiny_model(kind, dtype=dtype)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE))
    if applied:
        report = gemma_accel.apply(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    result = verify(model)
    assert isinstance(result, Verification)
    assert result.ok and result.guilty == [], str(result)
    if not applied:
        report = gemma_accel.apply(model)
    expected = list(dict.fromkeys(record.patch for record in report.applied))
    assert [row.patch for row in result.rows] == [*expected, EVERYTHING]
    assert all(row.output.where for row in result.rows if row.tried)
    reached = [row for row in result.rows if row.tried and (row.modality == "text" or not lora)]
    assert reached and all(row.gradient.where for row in reached)


@references
@pytest.mark.parametrize(
    "changes",
    [
        dict(hidden_size_per_layer_input=0, num_kv_shared_layers=0),
        dict(hidden_size=72, intermediate_size=88, hidden_size_per_layer_input=8),
    ],
    ids=["no per-layer embeddings", "odd widths"],
)
def test_other_branches_pass(changes):
    model = tiny_model("causal", dtype=torch.bfloat16, **changes)
    result = verify(model)
    assert result.ok, str(result)


@references
def test_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        result = verify(small(lora=True))
    assert result.ok, str(result)
    assert result.rows[0].loss.budget > 1e-3


@references
def test_an_adapter_with_dropout_draws_the_same_masks():
    model = small(patches=())
    config = LoraConfig(r=4, target_modules=LANGUAGE, lora_dropout=0.3)
    result = verify(get_peft_model(model, config))
    assert result.ok, str(result)


@references
def test_nf4(tmp_path):
    tiny_model("causal", hidden_size_per_layer_input=64, **SMALL).save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4)
    assert type(text(model).layers[0].mlp.gate_proj).__name__ == "Linear4bit"
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE))
    gemma_accel.apply(peft)
    result = verify(peft)
    assert result.ok, str(result)


@references
def test_a_model_that_is_not_trained_is_compared_by_what_it_gives(monkeypatch):
    model = small().requires_grad_(False)
    result = verify(model)
    assert result.ok, str(result)
    assert all(row.gradient.where == "" and row.output.where for row in result.rows if row.tried)
    plant(monkeypatch, "patches.norms.rms_norm", too_large)
    assert verify(model).guilty == ["rms_norm"]


@references
def test_a_fresh_adapters_zeros_hide_nothing(monkeypatch):
    """B is zero: without more, an adapter that is left out altogether would look right."""
    model = small(patches=TEXT, lora=True)
    from gemma_accel.patches import projections

    adapted = projections._adapted
    monkeypatch.setattr(projections, "_adapted", lambda *args: adapted(*args)._replace(scaling=0.0))
    assert "lora" in verify(model).guilty
    zeros = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert zeros and not any(p.any() for p in zeros)


@references
def test_towers_that_wait_elsewhere_are_left_there():
    model = small("conditional")
    tower = model.model.audio_tower
    tower._gemma_accel_parked = object()
    result = verify(model)
    assert result.ok, str(result)
    assert any("audio not looked at" in note for note in result.notes)
    row = next(row for row in result.rows if row.patch == "audio_attention")
    assert not row.tried and row.ok


@references
def test_a_tolerance_of_ones_own():
    model = small(patches=["attention"])
    assert not verify(model, rtol=1e-12).ok
    assert verify(model, rtol=1e-3).ok


@references
@pytest.mark.parametrize("autocast", [False, True])
def test_a_loss_scale_that_is_too_much_for_one_batch_is_given_up_for_all(monkeypatch, autocast):
    """Float16's gradients may overflow: then all batches run unscaled, those before it again."""
    not_finite, learn = Probe.not_finite, Judge.learn
    overflows, noise = [], []

    def overflowing(probe):
        if probe.name == "labels" and probe.scaled:
            overflows.append(probe)
            return "gradient"
        return not_finite(probe)

    def run(self, probe, *args, **kwargs):
        errors = original(self, probe, *args, **kwargs)
        probe.scaled = self.precision.loss_scale > 1
        return errors

    def learned(self, errors, probe):
        noise.extend(errors.values())
        learn(self, errors, probe)

    original = Comparison._run
    monkeypatch.setattr(Comparison, "_run", run)
    monkeypatch.setattr(Probe, "not_finite", overflowing)
    monkeypatch.setattr(Judge, "learn", learned)
    dtype = torch.float32 if autocast else torch.float16
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        result = verify(small(patches=["geglu"], dtype=dtype))
    assert result.ok, str(result)
    assert len(overflows) == 1
    # scaled by 128 and unscaled, a gradient would differ by nearly all of itself
    assert torch.stack(noise).max() < 0.5


@references
def test_stock_itself_is_not_finite():
    model = small()
    with torch.no_grad():
        text(model).layers[0].mlp.gate_proj.weight[0, 0] = float("inf")
    before = snapshot(model)
    with pytest.raises(VerificationError, match="stock model's own .* is not finite"):
        verify(model)
    assert_same(model, before)


# --- nothing is left behind ---------------------------------------------------------------------


def snapshot(model):
    modules = {
        path: (type(module), {k: v for k, v in vars(module).items() if k != "forward"})
        for path, module in model.named_modules()
    }
    return {
        "modules": {path: (kind, dict(attributes)) for path, (kind, attributes) in modules.items()},
        "hooks": {
            path: (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
            for path, m in model.named_modules()
        },
        "parameters": {
            name: (p, p.data_ptr(), p.detach().clone(), p.requires_grad, p.grad)
            for name, p in model.named_parameters()
        },
        "grads": {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        "rng": torch.get_rng_state(),
        "attention": text(model).config._attn_implementation,
        "report": report_of(model),
    }


def assert_same(model, before):
    after = snapshot(model)
    assert after["modules"].keys() == before["modules"].keys()
    for path, (kind, attributes) in after["modules"].items():
        expected_kind, expected = before["modules"][path]
        assert kind is expected_kind, path
        assert attributes.keys() == expected.keys(), path
        assert all(value is expected[name] for name, value in attributes.items()), path
    assert after["hooks"] == before["hooks"]
    for name, (p, address, value, trained, grad) in after["parameters"].items():
        expected = before["parameters"][name]
        assert p is expected[0] and address == expected[1], name
        assert torch.equal(value, expected[2]), name
        assert trained is expected[3] and grad is expected[4], name
    for name, grad in after["grads"].items():
        assert torch.equal(grad, before["grads"][name])
    assert torch.equal(after["rng"], before["rng"])
    assert after["attention"] == before["attention"]
    assert after["report"] is before["report"]


@references
@pytest.mark.parametrize("faulty", [False, True])
@pytest.mark.parametrize("applied", [False, True])
def test_the_model_is_left_as_it_was(monkeypatch, applied, faulty):
    model = small("conditional", patches=None if applied else (), lora=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.eval()
    text(model).layers[0].train()  # a mode of its own
    model(**batch()).loss.backward()  # a gradient that is there, and what a run leaves
    if applied:
        report = report_of(model)
        records, skipped = list(report.applied), list(report.skipped)
        count = len(report._undos), len(report._checks)
    if faulty:
        plant(monkeypatch, "patches.decoder.norm_add", raises)
    before = snapshot(model)
    assert verify(model).ok is not faulty
    assert_same(model, before)
    if applied:
        assert (report.applied, report.skipped) == (records, skipped)
        assert (len(report._undos), len(report._checks)) == count


@references
def test_what_passes_the_towers_meanwhile_is_not_the_runs():
    model = small("conditional", lora=True)
    policy = text(model).memory
    watch_towers(base_model(model), policy)
    heard = []
    expect = policy.expect_media
    policy.expect_media = lambda *media: heard.append(media) or expect(*media)
    assert verify(model).ok
    assert heard and text(model).memory is policy and not policy.media


@references
def test_restore_still_gives_the_stock_model_back():
    stock, model = small("conditional", patches=()), small("conditional")
    report = report_of(model)
    verify(model)
    verify(model)
    report.restore()
    assert report_of(model) is None
    assert not [m for m in model.modules() if isinstance(m, Fused)]
    inputs = batch()
    assert torch.equal(model(**inputs).logits, stock(**inputs).logits)


@references
def test_a_wrapper_put_around_afterwards_is_still_seen_by_restore():
    from gemma_accel.errors import RestoreError

    model = small()
    verify(model)
    text(model).layers[0].mlp.forward = lambda x: x
    with pytest.raises(RestoreError, match=r"layers\.0\.mlp"):
        report_of(model).restore()


@references
def test_what_a_trainer_bound_to_the_model_is_stepped_around_and_kept():
    """TRL binds a forward of its own after `apply`; accelerate may too."""
    stock, model = small(patches=()), small()
    inner = model.forward
    model.forward = bound = lambda *args, **kwargs: inner(*args, **kwargs)
    for _ in range(2):
        result = verify(model)
        assert result.ok, str(result)
        assert vars(model)["forward"] is bound
    report_of(model).restore()
    assert not [m for m in model.modules() if isinstance(m, Fused)]
    assert torch.equal(model(**batch()).logits, stock(**batch()).logits)


@references
def test_training_goes_on_as_if_nothing_had_been():
    """Also where somebody has put a `train` on the model that remembers its mode."""

    def losses(*, verified):
        model = small(lora=True)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.eval()
        model.train = lambda mode=True: pytest.fail("the model's mode is not verify's to set")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for step in range(3):
            model(**batch(seed=step)).loss.backward()
            if verified:
                assert verify(model).ok
            optimizer.step()
            optimizer.zero_grad()
            found.append(model(**batch(seed=step)).loss.item())
        return found

    assert losses(verified=True) == losses(verified=False)


@references
def test_autocast_inside_the_model_is_seen():
    """accelerate enters it in the forward that it binds."""
    model = small(lora=True)
    inner = model.forward

    def forward(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return inner(*args, **kwargs)

    model.forward = forward
    result = verify(model)
    assert result.ok, str(result)
    assert result.rows[0].loss.budget > 1e-3


@references
def test_a_wrapper_in_the_way_is_refused_and_nothing_is_touched():
    model = small()
    text(model).layers[0].mlp.forward = lambda x: x
    before = snapshot(model)
    with pytest.raises(VerificationError, match=r"layers\.0\.mlp.*Undo that first"):
        verify(model)
    assert_same(model, before)


@references
def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch):
    model = small()
    before = snapshot(model)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("gemma_accel.patches.decoder.norm_add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        verify(model)
    assert_same(model, before)


@references
def test_copies_that_peft_made_of_patched_modules_are_compared_too(monkeypatch):
    model = small(patches=["rms_norm"])
    model = get_peft_model(
        model,
        LoraConfig(r=4, target_modules=LANGUAGE, modules_to_save=["post_attention_layernorm"]),
    )
    copies = [m for p, m in model.named_modules() if p.endswith("modules_to_save.default")]
    assert copies and all(isinstance(copy, Fused) for copy in copies)
    before = snapshot(model)
    assert verify(model).ok
    assert_same(model, before)
    plant(monkeypatch, "patches.norms.rms_norm", too_large)
    assert verify(model).guilty == ["rms_norm"]


@references
def test_the_memory_policy_keeps_what_it_knew():
    model = small(patches=())
    gemma_accel.apply(model, vram_gib=1.0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = text(model).memory
    policy.fixed, policy.trained = 123, 45
    model(**batch()).loss.backward()
    known = copy.copy(vars(policy)), dict(policy.chosen)
    assert known[1]
    model.zero_grad()
    assert verify(model).ok
    assert text(model).memory is policy
    assert all(layer.memory is policy for layer in text(model).layers)
    assert (vars(policy), policy.chosen) == known


@references
def test_a_table_in_the_file_that_would_be_trained_is_looked_at_frozen():
    model = small(patches=())
    table = text(model).embed_tokens_per_layer
    _send_away(table)
    assert table.weight.requires_grad
    before = snapshot(model)
    assert verify(model).ok
    assert_same(model, before)


# --- what comes out -----------------------------------------------------------------------------


@references
def test_a_person_and_a_program_can_read_it(monkeypatch):
    plant(monkeypatch, "patches.norms.rms_norm", too_large)
    result = verify(small(patches=["rms_norm", "attention"]))
    out = io.StringIO()
    Console(file=out, width=120).print(result)
    for printed in (out.getvalue(), str(result)):
        assert "WRONG" in printed and "rms_norm" in printed and "rounding alone" in printed
    told = json.loads(json.dumps(result.to_dict()))
    assert told["ok"] is False and told["guilty"] == ["rms_norm"]
    row = result.rows[0]
    assert row.loss_error > row.loss.budget and row.gradient_error > row.budget
    assert told["rows"][0]["patch"] == "rms_norm" and told["rows"][0]["ok"] is False
    assert told["rows"][0]["gradient"]["error"] == row.gradient_error
    assert told["rows"][1]["ok"] is True


def test_what_is_no_gemma_is_refused():
    with pytest.raises(gemma_accel.UnsupportedModelError, match="Linear"):
        verify(nn.Linear(2, 2))


@references
class TestBeforeTraining:
    def trainer(self, **kwargs):
        return SimpleNamespace(model=small(**kwargs))

    def test_does_nothing_unless_asked(self, monkeypatch):
        monkeypatch.delenv("GEMMA_ACCEL_VERIFY", raising=False)
        monkeypatch.setattr(verification, "verify", None)
        assert verify_before_training(self.trainer()) is None
        monkeypatch.setenv("GEMMA_ACCEL_VERIFY", "0")
        assert verify_before_training(self.trainer()) is None

    def test_is_noted_in_the_report(self, monkeypatch):
        monkeypatch.setenv("GEMMA_ACCEL_VERIFY", "1")
        trainer = self.trainer(patches=["geglu", "rms_norm"])
        assert verify_before_training(trainer).ok
        assert report_of(trainer.model).notes["verified"].startswith("3 comparisons")

    def test_raises_and_names_the_patch(self, monkeypatch):
        monkeypatch.setenv("GEMMA_ACCEL_VERIFY", "1")
        plant(monkeypatch, "patches.norms.rms_norm", gradient_flipped)
        trainer = self.trainer(patches=["geglu", "rms_norm"])
        with pytest.raises(
            VerificationError, match="with 'rms_norm' the model .*Leave out 'rms_norm'"
        ):
            verify_before_training(trainer)
        assert "verified" not in report_of(trainer.model).notes


@references
@pytest.mark.parametrize("faulty", [False, True])
def test_the_command_exits_with_what_it_found(monkeypatch, capsys, faulty):
    import typer

    from gemma_accel import cli

    if faulty:
        plant(monkeypatch, "patches.decoder.norm_add", too_large)
    monkeypatch.setattr(cli, "_tiny_model", lambda: small(patches=()))
    with pytest.raises(typer.Exit) as exit:
        cli.verify(model=None, load_in_4bit=False, as_json=True)
    assert exit.value.exit_code == int(faulty)
    told = json.loads(capsys.readouterr().out)
    assert told["guilty"] == (["decoder_layer"] if faulty else [])


# --- layers of a kind ---------------------------------------------------------------------------

# neither the first nor the last of their kind: 1 of the sliding layers with keys of their own (4
# gives others its own, which is another kind), 7 and 9 of those without
DEEP = dict(
    num_hidden_layers=12,
    layer_types=[
        *["sliding_attention", "sliding_attention", "full_attention"] * 4,
    ],
    num_kv_shared_layers=6,
)


@references
@pytest.mark.parametrize("lora", [False, True])
def test_layers_of_a_kind_are_tried_once_and_all_of_them_together(monkeypatch, lora):
    from gemma_accel.patches.decoder import FusedGemma4TextMLP

    ran = []
    original = FusedGemma4TextMLP.forward

    def counted(self, x):
        ran.append(next(i for i, layer in enumerate(layers) if layer.mlp is self))
        return original(self, x)

    monkeypatch.setattr(FusedGemma4TextMLP, "forward", counted)
    model = small(patches=["geglu", "rms_norm"], lora=lora, **DEEP)
    layers = text(model).layers
    result = verify(model)
    assert result.ok, str(result)
    assert [row.patch for row in result.rows][-1] == EVERYTHING
    counts = [ran.count(index) for index in range(12)]
    kept = {index for index in range(12) if counts[index] > min(counts)}
    assert set(range(12)) - kept == {1, 7, 9}
    assert min(counts) > 0
    assert not [layer for layer in layers if "forward" in vars(layer)]


@references
def test_a_fault_in_one_of_many_layers_of_a_kind_is_named_too(monkeypatch):
    from gemma_accel.patches.decoder import FusedGemma4TextMLP

    model = small(patches=["geglu", "rms_norm"], **DEEP)
    target = text(model).layers[7].mlp
    original = FusedGemma4TextMLP.forward
    monkeypatch.setattr(
        FusedGemma4TextMLP,
        "forward",
        lambda self, x: original(self, x) * (1.01 if self is target else 1.0),
    )
    result = verify(model)
    assert result.guilty == ["geglu"], str(result)
    assert "layers.7" in str(result)
    monkeypatch.setattr(FusedGemma4TextMLP, "forward", original)
    assert verify(model).ok
