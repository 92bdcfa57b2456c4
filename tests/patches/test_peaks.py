"""The memory that a step really takes, mode by mode, against the arithmetic the policy trusts.

Launchers allocate, kernels do not: with the launches left out, and products and convolutions, for
which each kind of CPU takes time and workspaces of its own, everything that a step holds is
allocated and freed as on a card, at shapes that an interpreter would not get through, and PyTorch's
profiler sees every block of it.
"""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import Gemma4Config, Gemma4ForConditionalGeneration
from transformers.models.gemma4.modeling_gemma4 import Gemma4ClippableLinear

import gemma_accel
from gemma_accel import memory
from gemma_accel.memory import (
    AWAY,
    HALF,
    HEAD_TILE,
    Arrangement,
    Itemsize,
    Mode,
    between_layers_bytes,
    layer_shapes,
    peak_bytes,
    tower_kept_bytes,
    tower_shapes,
    tower_transient_bytes,
)
from gemma_accel.patches import checkpointing
from gemma_accel.patches.towers import watch_towers
from tests.tiny import LANGUAGE, batch, full_config, tiny_model

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="reads the CPU allocator, launching nothing"
)

E2B_BY_FOUR = dict(
    hidden_size=384,
    hidden_size_per_layer_input=64,
    intermediate_size=1536,
    num_attention_heads=8,
    num_key_value_heads=1,
    head_dim=64,
    global_head_dim=128,
)
ITEMSIZES = {torch.bfloat16: HALF, torch.float32: Itemsize(stream=4, inner=2)}
"""Of a model's dtype; float32 trains under autocast."""
MIXED = [Mode.OFFLOAD_TILED, Mode.OFFLOAD_IN_PARTS, Mode.RECOMPUTE_TILED, Mode.RECOMPUTE, Mode.KEEP]


@pytest.fixture
def launch_nothing(monkeypatch):
    from triton.runtime.interpreter import GridExecutor

    from gemma_accel.kernels import lora

    def product(a, b, dtype=None, out=None):
        return a.new_empty(a.shape[0], b.shape[1], dtype=dtype) if out is None else out

    def convolution(x, weight, *rest):
        if weight.requires_grad:
            return convolve(x, weight, *rest)
        like = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in (x, weight, *rest)]
        return torch.empty_like(convolve(*like), device=x.device)

    convolve = torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", convolution)
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(lora, "_mm", product)
    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda self, *args, **kwargs: self)


def _allocations(events):
    """(time, bytes, address) of every block taken (positive) and given back (negative)."""
    for event in events:
        if event.name == "[memory]":
            yield event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.ptr
        yield from _allocations(event.children)


def peak_of_a_step(modes, tokens, dtype):
    """Bytes at the highest moment of a forward and backward through the stack, and the shapes."""
    model = tiny_model("causal", dtype=dtype, **E2B_BY_FOUR, max_position_embeddings=tokens)
    peft = with_adapters(model, LANGUAGE)
    gemma_accel.apply(peft, vram_gib=1.0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # as a Trainer of ours does
    policy = model.model.memory
    policy.forced = Arrangement(modes, graphed=False, head_tile=HEAD_TILE)
    away, run = set(), policy.run

    def watched(layer, stock, forward, hidden, *rest):
        if modes[layer.layer_idx] in AWAY:
            away.add(hidden.data_ptr())
        return run(layer, stock, forward, hidden, *rest)

    policy.run = watched
    ids = batch((tokens,))["input_ids"]
    blocks = _blocks_of(lambda: peft.model.model(input_ids=ids, use_cache=False)[0], dtype)
    assert len(blocks) > 700
    hidden = tokens * model.config.hidden_size * dtype.itemsize
    there = 1 if Mode.OFFLOAD_IN_PARTS in modes[:1] else 2
    return _peak(blocks, away, hidden, there), layer_shapes(model.config)


def with_adapters(model, targets):
    """Adapters in bfloat16, as TRL has them where the rest is in 4 bits."""
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return peft


MARK = 999_983  # bytes of a block that stands where the backward begins


def _blocks_of(forward, dtype=torch.bfloat16):
    """The blocks of a forward and its backward, in their order; of float32 under autocast."""
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
        record_function("step"),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
            out = forward()
        turn = torch.empty(MARK, dtype=torch.uint8)
        out.backward(torch.empty_like(out))
        del turn
    return sorted(_allocations(profiled.profiler.kineto_results.experimental_event_tree()))


def _peak(blocks, away, hidden, there):
    """The highest moment of the backward, as a card would see it.

    What was there before and goes meanwhile (an earlier test's models, when Python gets to them) is
    not the step's: only blocks that the step took count, and their going. Inputs that would be
    ``away`` are here; ``there`` one is, and the next on its way if the layer is not in parts, and
    the embeddings, which the first one is a copy of. The stack's output and its gradient belong to
    the loss.
    """
    sizes, backward, peak = {}, False, 0
    for _, nbytes, address in blocks:
        if nbytes > 0:
            backward = backward or nbytes == MARK
            sizes[address] = nbytes
        elif sizes.pop(address, None) and backward:
            away.discard(address)
        if backward:
            here = sum(address in sizes for address in away)
            inputs = min(here, there) + bool(here) - here
            peak = max(peak, sum(sizes.values()) + (inputs - 2) * hidden)
    return peak


def compare(modes, tokens, dtype=torch.bfloat16):
    peak, shapes = peak_of_a_step(modes, tokens, dtype)
    itemsize = ITEMSIZES[dtype]
    said = peak_bytes(shapes, modes, tokens, 0, itemsize)
    said += between_layers_bytes(shapes, modes, 1, tokens, itemsize, input_gradient=False)
    assert 0.8 * said <= peak <= said, peak / said


IDS = [mode.value for mode in Mode] + ["mixed"]


@pytest.mark.usefixtures("launch_nothing")
@pytest.mark.parametrize("dtype", ITEMSIZES, ids=str)
@pytest.mark.parametrize("modes", [*([mode] * 5 for mode in Mode), MIXED], ids=IDS)
def test_a_step_takes_no_more_than_the_arithmetic_says_and_not_much_less(modes, dtype):
    compare(modes, 2048, dtype)


@pytest.mark.usefixtures("launch_nothing")
@pytest.mark.parametrize("mode", list(Mode)[-4:])
def test_nor_does_a_long_row_whose_tiles_are_a_small_part_of_it(mode, monkeypatch):
    """As of 65,536 tokens, a sixteenth each."""
    for module in (memory, checkpointing):
        monkeypatch.setattr(module, "mlp_schedule", lambda mode, tokens: (False, tokens // 16))
    compare([mode] * 5, 4096)


# -- towers --

# half as wide as the released ones
VISION = dict(
    hidden_size=384, intermediate_size=1536, num_attention_heads=6, num_key_value_heads=6,
    head_dim=64, num_hidden_layers=4,
)  # fmt: skip
AUDIO = dict(
    hidden_size=512, num_attention_heads=8, num_hidden_layers=4, subsampling_conv_channels=[128, 32]
)


def trained_tower(kind, dtype=torch.bfloat16):
    """A model with adapters in one tower."""
    config = full_config().to_dict()
    config["vision_config"] |= VISION
    config["audio_config"] |= AUDIO
    model = Gemma4ForConditionalGeneration._from_config(
        Gemma4Config.from_dict(config), dtype=dtype
    ).train()
    gemma_accel.apply(model, vram_gib=1.0)
    linears = [n for n, m in model.named_modules() if isinstance(m, Gemma4ClippableLinear)]
    with_adapters(model, [name for name in linears if re.match(rf".*{kind}_tower\.", name)])
    model.disable_input_require_grads()
    return model


def features(model, kind):
    """Of two images of 70 soft tokens each, or twenty seconds of sound."""
    if kind == "audio":
        frames = torch.randn(1, 2000, 128).to(model.dtype)
        out = model.model.get_audio_features(frames, torch.ones(1, 2000, dtype=torch.bool))
        return out.pooler_output[out.attention_mask]
    grid = torch.meshgrid(torch.arange(30), torch.arange(21), indexing="xy")
    positions = torch.stack(grid, -1).reshape(1, -1, 2).expand(2, -1, -1).contiguous()
    pixels = torch.rand(2, 630, model.config.vision_config.patch_size**2 * 3).to(model.dtype)
    return torch.cat(list(model.model.get_image_features(pixels, positions).pooler_output))


@pytest.mark.usefixtures("launch_nothing")
@pytest.mark.parametrize("dtype", ITEMSIZES, ids=str)
@pytest.mark.parametrize("replayed", [True, False])
@pytest.mark.parametrize("kind", ["vision", "audio"])
def test_nor_does_a_tower(kind, replayed, dtype):
    model = trained_tower(kind, dtype)
    if replayed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = model.model.language_model.memory
    watch_towers(model, policy)
    blocks = _blocks_of(lambda: features(model, kind), dtype)
    assert len(blocks) > 700
    ((shape, vectors),) = policy.media.items()
    assert vectors == {"vision": 2 * 630, "audio": 500}[kind]
    if replayed:  # as the planner takes it to be
        assert shape == tower_shapes(model.config)[f"{kind}_tower"]
    peak = _peak(blocks, set(), 0, 0)
    itemsize = ITEMSIZES[dtype]
    said = tower_kept_bytes(shape, vectors, itemsize)
    said += tower_transient_bytes(shape, vectors, itemsize)
    assert 0.8 * said <= peak <= said, peak / said


@pytest.mark.usefixtures("launch_nothing")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    # not sound in float32: a CPU's autocast leaves the layer norms in front as they are
    [("vision", torch.bfloat16), ("vision", torch.float32), ("audio", torch.bfloat16)],
)
def test_nor_does_a_tower_without_a_backward(kind, dtype):
    model = trained_tower("vision" if kind == "audio" else "audio", dtype)
    policy = model.model.language_model.memory
    watch_towers(model, policy)
    blocks = _before_the_turn(_blocks_of(lambda: features(model, kind).requires_grad_(), dtype))
    ((shape, vectors),) = policy.media.items()
    assert not shape.trained and tower_kept_bytes(shape, vectors) == 0
    peak = _peak([(0, MARK, None), *blocks], set(), 0, 0) - MARK
    said = tower_transient_bytes(shape, vectors, ITEMSIZES[dtype])
    assert 0.8 * said <= peak <= 1.1 * said, peak / said


def _before_the_turn(blocks):
    turn = next(i for i, (_, nbytes, _) in enumerate(blocks) if nbytes == MARK)
    assert turn > 300
    return blocks[:turn]


@pytest.mark.usefixtures("launch_nothing")
def test_an_audio_tower_that_is_trained_whole_keeps_what_its_convolutions_make():
    model = trained_tower("audio").requires_grad_(True)
    kept = {}
    for _, nbytes, address in _before_the_turn(_blocks_of(lambda: features(model, "audio"))):
        if nbytes > 0:
            kept[address] = nbytes
        else:
            kept.pop(address, None)
    said = tower_kept_bytes(tower_shapes(model.config)["audio_tower"], 500)
    said += memory.sound_front_bytes(500)
    assert 0.8 * said <= sum(kept.values()) <= 1.05 * said, sum(kept.values()) / said
