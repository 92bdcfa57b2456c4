"""The vision tower, stock against applied: features and every gradient, and when to step aside."""

from __future__ import annotations

import statistics
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionEncoderLayer

import gemma_accel
from gemma_accel.patches.clipped import held, prepare_for_peft
from gemma_accel.patches.seams import Fused
from tests import media, tiny
from tests.media import total_error, tower_gradients

IMAGES = {
    k: v for k, v in media.inputs(images=2).items() if k in ("pixel_values", "image_position_ids")
}
PATCHES = ["vision_clipped_linear", "vision_attention", "vision_mlp", "vision_layer", "vision_lora"]


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
            targets = r".*vision_tower.*_proj"
            config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
            model = get_peft_model(model, config, autocast_adapter_dtype=False)
        if applied:
            gemma_accel.apply(model, patches=patches)
        made.append(model)
    return made


def tower(model):
    return getattr(model, "get_base_model", lambda: model)().model.vision_tower


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def assert_same(got, want, tolerance=1e-4):
    assert got.keys() == want.keys() and len(got) > 1
    worst = max((relative(got[n], want[n]), n) for n in want)
    assert worst[0] < tolerance, worst


def small_images():
    """Six soft tokens of nine patches, padded to seven, and two: the interpreter is slow."""
    positions = torch.full((2, 63, 2), -1)
    for row, (width, height) in zip(positions, ((9, 6), (3, 6)), strict=True):
        grid = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
        row[: width * height] = torch.stack(grid, -1).reshape(-1, 2)
    pixels = torch.rand(2, 63, 48, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "image_position_ids": positions}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("way", ["references", "kernels"])
def test_features_and_gradients_agree(way, lora, request):
    if way == "references":
        request.getfixturevalue("references")
    stock, ours = pair(lora=lora)
    images = IMAGES if way == "references" else small_images()
    want, got = tower_gradients(stock, images), tower_gradients(ours, images)
    assert_same(got, want)
    assert any("vision_tower" in n and ("lora_A" in n) == lora for n in got)
    assert all(isinstance(layer, Fused) for layer in tower(ours).encoder.layers)


@pytest.fixture
def _references(request, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")


only_references = pytest.mark.usefixtures("_references")


@only_references
@pytest.mark.parametrize("patches", [*([p] for p in PATCHES[:-1]), ["rms_norm", *PATCHES]], ids=str)
def test_each_patch_alone(patches):
    stock, ours = pair(lora=True, patches=patches)
    assert_same(tower_gradients(ours, IMAGES), tower_gradients(stock, IMAGES))


@only_references
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_is_no_less_accurate_than_stock(dtype, lora):
    """A whole tower without clamps: they are tested block by block, for the reason given there."""
    stock_error = our_error = 0.0
    for seed in range(4):
        how = dict(lora=lora, clipped=False, seed=seed)
        truth = tower_gradients(pair(**how)[0], IMAGES)
        stock, ours = pair(dtype=dtype, **how)
        want, got = tower_gradients(stock, IMAGES), tower_gradients(ours, IMAGES)
        assert all(got[n].dtype == want[n].dtype for n in want)
        stock_error += total_error(want, truth)
        our_error += total_error(got, truth)
    assert our_error <= 1.1 * stock_error


@only_references
def test_clipped_blocks_are_no_less_accurate_than_stock():
    batch, ratios = media.inputs(images=1), []
    for blocks in ("Gemma4VisionAttention", "Gemma4VisionMLP"):
        for dtype in (torch.bfloat16, torch.float16):
            for seed in range(3):
                ratios += media.block_ratios(gemma_accel.apply, batch, blocks, dtype, seed)
    assert statistics.median(ratios) <= 1.02


@only_references
def test_autocast_agrees_with_stock():
    stock, ours = pair(lora=True)
    truth = tower_gradients(stock, IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = tower_gradients(stock, IMAGES), tower_gradients(ours, IMAGES)
    assert total_error(got, truth) <= 1.1 * total_error(want, truth)


def _differ(model):
    """Input ranges of projections that share an input, each another."""
    for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
        for layer in model.model.vision_tower.encoder.layers:
            getattr(layer.self_attn, name).input_max.fill_(0.8 + 0.3 * i)
            layer.mlp.up_proj.input_min.fill_(-0.7)


@only_references
def test_ranges_that_differ_between_projections():
    stock, ours = pair(change=_differ)
    assert_same(tower_gradients(ours, IMAGES), tower_gradients(stock, IMAGES))


@only_references
@pytest.mark.parametrize(
    "vision",
    [dict(use_clipped_linears=False), dict(num_key_value_heads=1), dict(head_dim=12)],
    ids=str,
)
def test_other_towers(vision, monkeypatch):
    monkeypatch.setattr(tiny, "VISION", {**tiny.VISION, **vision})
    stock, ours = pair()
    assert_same(tower_gradients(ours, IMAGES), tower_gradients(stock, IMAGES))


@only_references
def test_eager_attention():
    def eager(model):
        model.model.vision_tower.set_attn_implementation("eager")

    stock, ours = pair(change=eager)
    assert_same(tower_gradients(ours, IMAGES), tower_gradients(stock, IMAGES))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands in for a card")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tower: tower.set_attn_implementation("eager"), "'eager'"),
        (lambda tower: setattr(tower.encoder.layers[0].self_attn, "scaling", 0.25), "0.25"),
    ],
    ids=["eager", "scaled"],
)
def test_training_without_the_attention_kernel_is_said_once(change, reason):
    from gemma_accel.patches.attention import warn_of_stock

    warn_of_stock.cache_clear()
    model = media.model(clipped=False)
    gemma_accel.apply(model)
    change(tower(model))
    attention = tower(model).encoder.layers[0].self_attn.train()
    query = torch.randn(1, 6, attention.config.num_attention_heads, attention.head_dim)
    with pytest.warns(UserWarning, match=f"in the vision tower, .*{reason}"):
        attention._attend(query, query, query, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention._attend(query, query, query, None)


@only_references
@pytest.mark.parametrize(
    "write",
    [
        lambda linear: linear.input_max.fill_(0.01),
        lambda linear: setattr(linear, "output_max", torch.nn.Buffer(torch.tensor(0.01))),
        lambda linear: linear.load_state_dict(
            {**linear.state_dict(), "output_min": torch.tensor(-0.01)}
        ),
    ],
    ids=["in place", "another buffer", "load_state_dict"],
)
def test_ranges_written_later_are_read_again(write):
    stock, ours = pair()
    before = tower_gradients(ours, IMAGES)
    for model in (stock, ours):
        write(tower(model).encoder.layers[0].mlp.down_proj)
        write(tower(model).encoder.layers[1].self_attn.v_proj)
    got = tower_gradients(ours, IMAGES)
    assert relative(got["features"], before["features"]) > 1e-3
    assert_same(got, tower_gradients(stock, IMAGES))


def test_ranges_are_rounded_to_the_activations():
    linear = tower(media.model()).encoder.layers[0].mlp.down_proj
    linear.input_min.fill_(-0.3)
    (ranges,) = held(linear, (linear,), torch.bfloat16)
    assert ranges.input.low == torch.tensor(-0.3).bfloat16().item() != linear.input_min.item()
    clamped = torch.clamp(torch.tensor([-1.0, -1.0]).bfloat16(), linear.input_min, linear.input_max)
    assert clamped[0].item() == ranges.input.low


@only_references
def test_reading_the_ranges_waits_for_the_device_once(monkeypatch):
    ours = pair()[1]
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: (reads.append(t.dtype), tolist(t))[1])
    layer = tower(ours).encoder.layers[0]
    x = torch.randn(1, 4, 32)
    for _ in range(3):
        layer.mlp(x)
    assert reads == [torch.float32, torch.float64]  # the buffers, and once rounded on the CPU


@only_references
def test_a_hook_on_a_clipped_linear_still_runs():
    stock, ours = pair()
    for model in (stock, ours):
        linear = tower(model).encoder.layers[0].self_attn.q_proj
        linear.register_forward_hook(lambda module, args, out: out * 0.5)
    assert_same(tower_gradients(ours, IMAGES), tower_gradients(stock, IMAGES))


@only_references
def test_norms_and_projections_that_peft_copies_run_their_own_forward():
    made = []
    for applied in (False, True):
        torch.manual_seed(1)
        model = media.model()
        prepare_for_peft(model)
        config = LoraConfig(
            r=2,
            target_modules=r".*vision_tower.*up_proj",
            modules_to_save=["post_attention_layernorm", "q_norm", "down_proj"],
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
    got = tower_gradients(ours, IMAGES)
    assert_same(got, tower_gradients(stock, IMAGES))
    assert any("modules_to_save" in n for n in got)


@only_references
@pytest.mark.parametrize("lora", [False, True])
def test_checkpointing_recomputes_and_agrees(lora):
    stock, ours = pair(lora=lora)
    counts = []
    for model in (stock, ours):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        calls = []
        for layer in tower(model).encoder.layers:
            layer.mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        counts.append(calls)
    # with adapters alone, the patch embeddings want no gradient: the layers recompute all the same
    assert_same(tower_gradients(ours, IMAGES), tower_gradients(stock, IMAGES))
    assert [len(calls) for calls in counts] == [4, 4]


@only_references
def test_a_frozen_tower_keeps_nothing():
    _, ours = pair()
    ours.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        got = tower_gradients(ours, IMAGES)
    assert not saved and got.keys() == {"features"}


@only_references
def test_hidden_states_and_attentions_can_be_recorded():
    stock, ours = pair()
    outs = [
        tower(model)(
            IMAGES["pixel_values"], IMAGES["image_position_ids"], output_hidden_states=True
        )
        for model in (stock, ours)
    ]
    assert len(outs[0].hidden_states) == len(outs[1].hidden_states) == 3
    for got, want in zip(outs[1].hidden_states, outs[0].hidden_states, strict=True):
        assert relative(got, want) < 2e-5


@only_references
def test_restore_gives_stock_back():
    stock, model = media.model(), media.model()
    report = gemma_accel.apply(model)
    applied = {record.patch for record in report.applied if record.modality == "vision"}
    assert applied == {"clipped_adapters", *PATCHES}
    assert {type(m).__name__ for m in model.modules()} == {
        type(m).__name__ for m in stock.modules()
    }
    report.restore()
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    got, want = tower_gradients(model, IMAGES), tower_gradients(stock, IMAGES)
    assert all(torch.equal(got[n], want[n]) for n in want)


@only_references
def test_what_the_kernels_do_not_compute_is_left_alone(monkeypatch):
    monkeypatch.setattr(tiny, "VISION", {**tiny.VISION, "hidden_activation": "silu"})
    model = media.model()
    report = gemma_accel.apply(model)
    reasons = {(r.patch, r.reason) for r in report.skipped if r.modality == "vision"}
    assert any(p == "vision_mlp" and "SiLUActivation" in r for p, r in reasons)
    layer = model.model.vision_tower.encoder.layers[0]
    assert type(layer.mlp).__name__ == "Gemma4VisionMLP" and not isinstance(layer.mlp, Fused)
    # the layer then runs its own forward, around what is fused inside
    assert isinstance(layer, Gemma4VisionEncoderLayer)
    stock = media.model()
    assert_same(tower_gradients(model, IMAGES), tower_gradients(stock, IMAGES))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_real_shapes(dtype, monkeypatch):
    """Two layers of E2B's tower, two images of 280 soft tokens, one of them padded."""
    real = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    real |= dict(num_key_value_heads=12, head_dim=64, patch_size=16, position_embedding_size=10240)
    monkeypatch.setattr(tiny, "VISION", {**tiny.VISION, **real})
    # a tiny processor's patches are small
    monkeypatch.setattr(media, "clip", lambda model: model)
    torch.manual_seed(3)
    grid = torch.stack(torch.meshgrid(torch.arange(60), torch.arange(42), indexing="xy"), -1)
    positions = grid.reshape(1, -1, 2).repeat(2, 1, 1)
    positions[1, 33 * 60 :] = -1  # eleven rows of soft tokens
    images = {"pixel_values": torch.rand(2, 2520, 768), "image_position_ids": positions}
    images = {k: v.cuda() for k, v in images.items()}

    def clip_and_move(model):
        for linear in model.modules():
            if type(linear).__name__ == "Gemma4ClippableLinear":
                for end, value in zip(media.RANGES, (-2.0, 2.0, -1.5, 1.5), strict=True):
                    getattr(linear, end).fill_(value)
        model.cuda()

    truth = tower_gradients(pair(lora=True, change=clip_and_move)[0], images)
    stock, ours = pair(dtype=dtype, lora=True, change=clip_and_move)
    want, got = tower_gradients(stock, images), tower_gradients(ours, images)
    assert total_error(got, truth) <= 1.1 * total_error(want, truth)
