"""The audio tower, stock against applied: features and every gradient, and when to step aside."""

from __future__ import annotations

import statistics

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.models.gemma4.modeling_gemma4 import Gemma4AudioModel

import gemma_accel
from gemma_accel.patches.clipped import prepare_for_peft
from gemma_accel.patches.seams import Fused
from tests import media, tiny
from tests.media import total_error, tower_gradients

SOUNDS = {k: v for k, v in media.inputs(sounds=2).items() if k.startswith("input_features")}
PATCHES = [
    "audio_clipped_linear",
    "audio_attention",
    "audio_feed_forward",
    "audio_light_conv",
    "audio_layer",
    "audio_lora",
]
OLD = Gemma4AudioModel._supports_sdpa  # transformers 5.17: a boolean mask


def pair(*, dtype=torch.float32, lora=False, change=None, patches=None, **how):
    """The same model twice, stock and applied, in train mode."""
    made = []
    for applied in (False, True):
        model = media.model(dtype=dtype, **how)
        if change is not None:
            change(model)
        if lora:
            prepare_for_peft(model)
            torch.manual_seed(1)
            targets = r".*audio_tower.layers.*(_proj|post|ffw_layer_.|linear_(start|end))"
            config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
            model = get_peft_model(model, config, autocast_adapter_dtype=False)
        if applied:
            gemma_accel.apply(model, patches=patches)
        made.append(model)
    return made


def tower(model):
    return getattr(model, "get_base_model", lambda: model)().model.audio_tower


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def assert_same(got, want, tolerance=1e-4):
    assert got.keys() == want.keys() and len(got) > 1
    worst = max((relative(got[n], want[n]), n) for n in want)
    assert worst[0] < tolerance, worst


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("way", ["references", "kernels"])
def test_features_and_gradients_agree(way, lora, request):
    if way == "references":
        request.getfixturevalue("references")
    stock, ours = pair(lora=lora)
    want, got = tower_gradients(stock, SOUNDS), tower_gradients(ours, SOUNDS)
    assert_same(got, want)
    assert sum("lora_A" in n for n in got) == (2 * 11 if lora else 0)
    assert all(isinstance(layer, Fused) for layer in tower(ours).layers)


@pytest.fixture
def _references(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")


only_references = pytest.mark.usefixtures("_references")


@only_references
@pytest.mark.parametrize("patches", [*([p] for p in PATCHES[:-1]), ["rms_norm", *PATCHES]], ids=str)
def test_each_patch_alone(patches):
    stock, ours = pair(lora=True, patches=patches)
    assert_same(tower_gradients(ours, SOUNDS), tower_gradients(stock, SOUNDS))


@only_references
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_is_no_less_accurate_than_stock(dtype, lora):
    """A whole tower without clamps: they are tested block by block, for the reason given there."""
    stock_error = our_error = 0.0
    for seed in range(4):
        how = dict(lora=lora, clipped=False, seed=seed)
        truth = tower_gradients(pair(**how)[0], SOUNDS)
        stock, ours = pair(dtype=dtype, **how)
        want, got = tower_gradients(stock, SOUNDS), tower_gradients(ours, SOUNDS)
        assert all(got[n].dtype == want[n].dtype for n in want)
        stock_error += total_error(want, truth)
        our_error += total_error(got, truth)
    assert our_error <= 1.1 * stock_error


@only_references
def test_clipped_blocks_are_no_less_accurate_than_stock():
    batch, ratios = media.inputs(sounds=1), []
    for blocks in ("Gemma4AudioAttention", "Gemma4AudioFeedForward", "Gemma4AudioLightConv1d"):
        for dtype in (torch.bfloat16, torch.float16):
            for seed in range(3):
                ratios += media.block_ratios(gemma_accel.apply, batch, blocks, dtype, seed)
    assert statistics.median(ratios) <= 1.02


@only_references
def test_autocast_to_bfloat16_is_no_less_accurate_than_stock():
    stock, ours = pair(lora=True)
    truth = tower_gradients(stock, SOUNDS)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = tower_gradients(stock, SOUNDS), tower_gradients(ours, SOUNDS)
    assert total_error(got, truth) <= 1.1 * total_error(want, truth)


@only_references
def test_autocast_to_float16_does_not_overflow():
    """Stock cannot: its masked score of -1e9 and its clamp at 1e10 do not go into a float16."""
    stock, ours = pair(lora=True)
    truth = tower_gradients(stock, SOUNDS)
    with torch.autocast("cpu", torch.float16):
        with pytest.raises(RuntimeError, match="cannot be converted .* without overflow"):
            tower_gradients(stock, SOUNDS)
        got = tower_gradients(ours, SOUNDS)
    assert all(torch.isfinite(g).all() for g in got.values())
    assert total_error(got, truth) < 0.05 * len(truth)


@only_references
def test_ranges_that_differ_between_projections():
    def differ(model):
        for layer in model.model.audio_tower.layers:
            layer.self_attn.k_proj.input_max.fill_(0.9)
            layer.self_attn.v_proj.input_min.fill_(-0.7)

    stock, ours = pair(change=differ)
    assert_same(tower_gradients(ours, SOUNDS), tower_gradients(stock, SOUNDS))


@only_references
@pytest.mark.parametrize(
    "audio",
    [
        dict(use_clipped_linears=False),
        dict(attention_chunk_size=4, attention_context_left=6, attention_context_right=2),
        dict(conv_kernel_size=3, residual_weight=0.3, attention_logit_cap=5.0),
        dict(gradient_clipping=0.75),
    ],
    ids=str,
)
def test_other_towers(audio, monkeypatch):
    monkeypatch.setattr(tiny, "AUDIO", {**tiny.AUDIO, **audio})
    stock, ours = pair()
    assert_same(tower_gradients(ours, SOUNDS), tower_gradients(stock, SOUNDS))


@only_references
@pytest.mark.skipif(not OLD, reason="newer transformers take the additive mask alone")
def test_the_inverted_eager_mask_is_mended():
    """With eager attention, transformers 5.17 sees what is masked; applied, it is as without."""

    def eager(model):
        model.model.audio_tower.config._attn_implementation = "eager"

    right = pair()[0]
    wrong, ours = pair(change=eager)
    want = tower_gradients(right, SOUNDS)
    assert relative(tower_gradients(wrong, SOUNDS)["features"], want["features"]) > 1e-2
    assert_same(tower_gradients(ours, SOUNDS), want)
    alone = pair(change=eager, patches=["audio_eager_mask"])[1]
    assert_same(tower_gradients(alone, SOUNDS), want)


@only_references
def test_a_hook_still_runs():
    stock, ours = pair()
    for model in (stock, ours):
        layer = tower(model).layers[0]
        layer.feed_forward1.ffw_layer_1.register_forward_hook(lambda m, args, out: out * 0.5)
        layer.lconv1d.linear_end.register_forward_hook(lambda m, args, out: out * 0.7)
        layer = tower(model).layers[1]
        layer.self_attn.q_proj.register_forward_pre_hook(lambda m, args: (args[0] * 0.5,))
    assert_same(tower_gradients(ours, SOUNDS), tower_gradients(stock, SOUNDS))


@only_references
def test_attention_weights_are_there_for_who_watches():
    stock, ours = pair()
    seen = []
    for model in (stock, ours):
        hook = (
            tower(model)
            .layers[0]
            .self_attn.register_forward_hook(lambda module, args, out: seen.append(out[1]))
        )
        tower_gradients(model, SOUNDS)
        hook.remove()
    assert relative(seen[1], seen[0]) < 1e-4


@only_references
def test_norms_and_projections_that_peft_copies_run_their_own_forward():
    made = []
    for applied in (False, True):
        torch.manual_seed(1)
        model = media.model()
        prepare_for_peft(model)
        config = LoraConfig(
            r=2,
            target_modules=r".*audio_tower.*ffw_layer_1",
            modules_to_save=["norm_post_attn", "conv_norm", "linear_end", "depthwise_conv1d"],
            init_lora_weights=False,
        )
        peft = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "modules_to_save" in name:
                    parameter.mul_(1.5)
        if applied:
            gemma_accel.apply(peft)
        made.append(peft)
    stock, ours = made
    got = tower_gradients(ours, SOUNDS)
    assert_same(got, tower_gradients(stock, SOUNDS))
    assert any("modules_to_save" in n for n in got)


@only_references
def test_a_frozen_tower_keeps_nothing():
    _, ours = pair()
    ours.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        got = tower_gradients(ours, SOUNDS)
    assert not saved and got.keys() == {"features"}


@only_references
def test_restore_gives_stock_back():
    stock, model = media.model(), media.model()
    report = gemma_accel.apply(model)
    applied = {record.patch for record in report.applied if record.modality == "audio"}
    assert applied == {*PATCHES, *(["audio_eager_mask"] if OLD else [])}
    names = {type(m).__name__ for m in stock.modules()}
    assert {type(m).__name__ for m in model.modules()} == names
    report.restore()
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    got, want = tower_gradients(model, SOUNDS), tower_gradients(stock, SOUNDS)
    assert all(torch.equal(got[n], want[n]) for n in want)


@only_references
def test_what_the_kernels_do_not_compute_is_left_alone(monkeypatch):
    monkeypatch.setattr(tiny, "AUDIO", {**tiny.AUDIO, "hidden_act": "gelu"})
    model = media.model()
    report = gemma_accel.apply(model)
    reasons = {(r.patch, r.reason) for r in report.skipped if r.modality == "audio"}
    assert {p for p, r in reasons if "GELU" in r} == {
        "audio_feed_forward",
        "audio_light_conv",
    }
    stock = media.model()
    assert_same(tower_gradients(model, SOUNDS), tower_gradients(stock, SOUNDS))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_real_shapes(dtype, monkeypatch):
    """Two layers of the real tower, thirty seconds and twenty."""
    real = dict(hidden_size=1024, num_attention_heads=8, output_proj_dims=1536)
    real |= dict(subsampling_conv_channels=[128, 32])
    monkeypatch.setattr(tiny, "AUDIO", {**tiny.AUDIO, **real})
    monkeypatch.setattr(
        media, "clip", lambda model: model
    )  # a tiny processor's features are narrow
    torch.manual_seed(3)
    mask = torch.ones(2, 2998, dtype=torch.bool)
    mask[1, 2000:] = False
    sounds = {"input_features": torch.randn(2, 2998, 128) * mask[..., None]}
    sounds = {k: v.cuda() for k, v in {**sounds, "input_features_mask": mask}.items()}

    def clip_and_move(model):
        for linear in model.modules():
            if type(linear).__name__ == "Gemma4ClippableLinear":
                for end, value in zip(media.RANGES, (-2.0, 2.0, -1.5, 1.5), strict=True):
                    getattr(linear, end).fill_(value)
        model.cuda()

    truth = tower_gradients(pair(lora=True, change=clip_and_move)[0], sounds)
    stock, ours = pair(dtype=dtype, lora=True, change=clip_and_move)
    want, got = tower_gradients(stock, sounds), tower_gradients(ours, sounds)
    assert total_error(got, truth) <= 1.1 * total_error(want, truth)
