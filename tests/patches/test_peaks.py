"""The memory that a step really takes, mode by mode, against the arithmetic the policy trusts.

Launchers allocate, kernels do not: with the launches left out everything that a step holds is
allocated and freed as on a card, at shapes that an interpreter would not get through, and PyTorch's
profiler sees every block of it.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile, record_function

import gemma_accel
from gemma_accel.memory import (
    AWAY,
    HEAD_TILE,
    Arrangement,
    Mode,
    between_layers_bytes,
    layer_shapes,
    peak_bytes,
)
from tests.tiny import LANGUAGE, batch, tiny_model

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="reads the CPU allocator, launching nothing"
)

TOKENS = 2048
E2B_BY_FOUR = dict(
    hidden_size=384,
    hidden_size_per_layer_input=64,
    intermediate_size=1536,
    num_attention_heads=8,
    num_key_value_heads=1,
    head_dim=64,
    global_head_dim=128,
    max_position_embeddings=TOKENS,
)
MIXED = [Mode.OFFLOAD_TILED, Mode.TIGHT, Mode.RECOMPUTE_TILED, Mode.RECOMPUTE, Mode.KEEP]


@pytest.fixture
def launch_nothing(monkeypatch):
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: None)


def _allocations(events):
    """(time, bytes, address) of every block taken (positive) and given back (negative)."""
    for event in events:
        if event.name == "[memory]":
            yield event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.ptr
        yield from _allocations(event.children)


def peak_of_a_step(modes):
    """Bytes at the highest moment of a forward and backward through the stack, and the shapes."""
    model = tiny_model("causal", dtype=torch.bfloat16, **E2B_BY_FOUR)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE))
    for parameter in peft.parameters():
        parameter.data = parameter.data.bfloat16()
    gemma_accel.apply(peft, vram_gib=1.0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.model.memory.forced = Arrangement(modes, graphed=False, head_tile=HEAD_TILE)
    ids = batch((TOKENS,))["input_ids"]
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
        record_function("step"),
    ):
        out = peft.model.model(input_ids=ids, use_cache=False).last_hidden_state
        out.backward(torch.empty_like(out))
    # What was there before and goes meanwhile (an earlier test's models, when Python gets to them)
    # is not the step's: only blocks that the step took count, and their going.
    sizes, peak = {}, 0
    blocks = sorted(_allocations(profiled.profiler.kineto_results.experimental_event_tree()))
    assert len(blocks) > 1000
    for _, nbytes, address in blocks:
        if nbytes > 0:
            sizes[address] = nbytes
            peak = max(peak, sum(sizes.values()))
        else:
            sizes.pop(address, None)
    return peak, layer_shapes(model.config)


@pytest.mark.usefixtures("launch_nothing")
@pytest.mark.parametrize("modes", [*([mode] * 5 for mode in Mode), MIXED], ids=lambda m: m[0].value)
def test_a_step_takes_no_more_than_the_arithmetic_says_and_not_much_less(modes):
    peak, shapes = peak_of_a_step(modes)
    of_hidden = TOKENS * 384 * 2
    # the stack's output and its gradient, which belong to the loss; and inputs that would be away
    aside = (2 + sum(mode in AWAY for mode in modes)) * of_hidden
    said = peak_bytes(shapes, modes, TOKENS, 0) + between_layers_bytes(shapes, modes, 1, TOKENS)
    assert 0.8 * said <= peak - aside <= said, (peak - aside) / said
