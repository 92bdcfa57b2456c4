"""CUDA graphs of the decoder stack: the numbers of the layers run one by one, whatever comes
between two steps.
"""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

import gemma_accel
from gemma_accel.memory import HEAD_TILE, Arrangement, Mode
from gemma_accel.patches.decoder import FusedGemma4TextMLP
from gemma_accel.patches.graphs import CAPTURES, STEADY, _Watch
from gemma_accel.patches.towers import watch_towers
from gemma_accel.patching import report_of
from tests.tiny import LANGUAGE, TEXT, batch, full_config, tiny_model

pytestmark = pytest.mark.gpu


def adapted(checkpointing=True, **changes):
    model = tiny_model("conditional", towers=False, **changes).cuda()
    torch.manual_seed(1)
    peft = get_peft_model(
        model, LoraConfig(r=4, target_modules=LANGUAGE, init_lora_weights=False)
    ).cuda()
    gemma_accel.apply(peft, vram_gib=4.0)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return peft


def text(peft):
    return peft.get_base_model().model.language_model


MODES = {
    "kept": None,
    "recomputed": [Mode.RECOMPUTE, Mode.KEEP, Mode.RECOMPUTE_MLP, Mode.RECOMPUTE, Mode.KEEP],
    "offloaded": [Mode.OFFLOAD, Mode.OFFLOAD, Mode.RECOMPUTE, Mode.OFFLOAD, Mode.OFFLOAD],
    "in tiles": [
        Mode.OFFLOAD_TILED,
        Mode.OFFLOAD_IN_PARTS,
        Mode.RECOMPUTE_TILED,
        Mode.RECOMPUTE_IN_PARTS,
        Mode.OFFLOAD_TILED,
    ],
}


@pytest.fixture(params=MODES)
def pair(request):
    """Two models of the same weights: one that may capture, one that never does."""
    modes = MODES[request.param]
    eager, graphed = adapted(modes is not None), adapted(modes is not None)
    for layer in text(eager).layers:
        layer.graphs = None
    if modes is not None:
        for peft in (eager, graphed):
            text(peft).memory.forced = Arrangement(modes, graphed=True, head_tile=HEAD_TILE)
    return eager, graphed


def step(peft, seed, lengths=(24, 24), zero=True, **kwargs):
    if zero:
        peft.zero_grad()
    inputs = {k: v.cuda() for k, v in batch(lengths, seed=seed).items()}
    loss = peft(**inputs, use_cache=False, **kwargs).loss
    loss.backward()
    return loss.item(), {
        n: p.grad.clone() for n, p in peft.named_parameters() if p.grad is not None
    }


def captured(peft):
    graphs = text(peft).layers[0].graphs
    assert graphs.captured == (graphs._captured is not None)
    return graphs._captured


def warm(pair, lengths=(24, 24)):
    for seed in range(STEADY + 1):
        for peft in pair:
            step(peft, seed, lengths)
    assert captured(pair[1]) is not None, text(pair[1]).layers[0].graphs.off


def same(a, b):
    assert a[0] == pytest.approx(b[0], rel=1e-6)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        assert torch.allclose(a[1][name], b[1][name], rtol=1e-4, atol=1e-7), name


def test_replays_give_the_same_losses_and_gradients(pair):
    warm(pair)
    for seed in range(10, 14):
        same(step(pair[1], seed), step(pair[0], seed))


def test_gradients_accumulate_over_replays(pair):
    warm(pair)
    for peft in pair:
        step(peft, 20)
    same(step(pair[1], 21, zero=False), step(pair[0], 21, zero=False))


def test_weights_updated_in_place_are_seen(pair):
    warm(pair)
    for peft in pair:
        step(peft, 5)
        torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=0.1).step()
    same(step(pair[1], 6), step(pair[0], 6))


def test_padding_and_positions_are_inputs(pair):
    warm(pair, (24, 17))
    for lengths in ((24, 9), (24, 24), (24, 3)):
        same(step(pair[1], 7, lengths), step(pair[0], 7, lengths))


def test_two_forwards_before_a_backward(pair):
    warm(pair)
    results = []
    for peft in pair:
        peft.zero_grad()
        losses = [
            peft(**{k: v.cuda() for k, v in batch((24, 24), seed=s).items()}, use_cache=False).loss
            for s in (30, 31)
        ]
        (losses[0] - 0.5 * losses[1]).backward()
        results.append(
            (
                losses[0].item(),
                {n: p.grad for n, p in peft.named_parameters() if p.grad is not None},
            )
        )
    same(*results)


def test_a_second_backward_is_an_error(pair):
    warm(pair)
    inputs = {k: v.cuda() for k, v in batch((24, 24)).items()}
    loss = pair[1](**inputs, use_cache=False).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_other_shapes_run_layer_by_layer_and_evaluation_does_too(pair):
    warm(pair)
    same(step(pair[1], 8, (30, 11)), step(pair[0], 8, (30, 11)))
    with torch.no_grad():
        inputs = {k: v.cuda() for k, v in batch((24, 24)).items()}
        assert torch.allclose(pair[1](**inputs).logits, pair[0](**inputs).logits, atol=1e-4)
    for n in range(CAPTURES + 1):
        for seed in range(STEADY + 1):
            step(pair[1], seed, (12 + n, 12))
    assert "shape changed" in text(pair[1]).layers[0].graphs.off
    same(step(pair[1], 9), step(pair[0], 9))


def test_another_adapter_is_noticed(pair):
    warm(pair)
    for peft in pair:
        torch.manual_seed(4)
        peft.add_adapter(
            "second", LoraConfig(r=4, target_modules=LANGUAGE, init_lora_weights=False)
        )
        peft.set_adapter("second")
        peft.cuda()
    same(step(pair[1], 3), step(pair[0], 3))


def test_a_deep_copy_captures_for_itself(pair):
    warm(pair)
    twin = copy.deepcopy(pair[1])
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert step(twin, 1)[0] != pytest.approx(step(pair[1], 1)[0])


def test_offloaded_inputs_leave_the_gpu_under_capture_too():
    """What the graphs hold is what the allocator has gained by the capture."""
    held = {}
    for mode in (Mode.RECOMPUTE, Mode.OFFLOAD):
        peft = adapted(num_hidden_layers=15, layer_types=3 * TEXT["layer_types"])
        text(peft).memory.forced = Arrangement([mode] * 15, graphed=True, head_tile=HEAD_TILE)
        for seed in range(STEADY):
            step(peft, seed, (8192, 8192))
        gc.collect()  # as a capture does first
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        step(peft, STEADY, (8192, 8192))
        assert captured(peft) is not None
        torch.cuda.empty_cache()
        held[mode] = torch.cuda.memory_reserved() - before
        del peft
        gc.collect()
    of_inputs = 14 * 2 * 8192 * 64 * 4  # the first layer's is the graphs' own
    assert held[Mode.RECOMPUTE] - held[Mode.OFFLOAD] > of_inputs / 2, held


def test_graphs_that_leave_too_little_for_the_loss_are_captured_anew(pair):
    """In a budget that the arithmetic believes in and the card does not."""
    peft = pair[1]
    policy = text(peft).memory
    policy.forced = text(pair[0]).memory.forced = None
    asked = []
    believed = policy.shortfall

    def shortfall(hidden):
        asked.append(hidden.shape)
        return believed(hidden) if len(asked) > 1 else 1 << 20

    policy.shortfall = shortfall
    for seed in range(STEADY + 2):
        same(step(peft, seed), step(pair[0], seed))
    assert len(asked) == 2 and policy.withheld == 1 << 20
    assert captured(peft) is not None


def test_a_capture_that_runs_out_of_memory_is_tried_again_with_less(pair, monkeypatch):
    peft = pair[1]
    policy = text(peft).memory
    failing = fail_in_a_capture(
        monkeypatch, lambda: torch.empty(1 << 50, device="cuda", dtype=torch.uint8)
    )
    for seed in range(STEADY + 2):
        same(step(peft, seed), step(pair[0], seed))
    assert not failing
    assert policy.withheld > 0 and captured(peft) is not None
    assert not text(peft).layers[0].graphs.off
    assert_as_if_nothing_had_been()


def fail_in_a_capture(monkeypatch, fail):
    """In the first MLP that is captured; returns a list that is empty once it has. By the class: a
    module with a forward of its own is not captured.
    """
    stock, failing = FusedGemma4TextMLP.forward, [True]

    def forward(self, x):
        if torch.cuda.is_current_stream_capturing() and failing:
            failing.clear()
            fail()
        return stock(self, x)

    monkeypatch.setattr(FusedGemma4TextMLP, "forward", forward)
    return failing


def assert_as_if_nothing_had_been():
    """After a capture that failed: the stream is the usual one, and cached memory can go."""
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    block = torch.empty(256 << 20, device="cuda", dtype=torch.uint8)
    side = torch.cuda.Stream()
    block.record_stream(side)
    held = torch.cuda.memory_reserved()
    del block
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert held - torch.cuda.memory_reserved() >= 256 << 20


def test_a_capture_that_ends_with_copies_under_way_leaves_no_trace(pair, monkeypatch):
    peft = pair[1]

    def interrupt():
        raise KeyboardInterrupt

    for seed in range(STEADY):
        step(peft, seed)
    fail_in_a_capture(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        step(peft, STEADY)
    assert_as_if_nothing_had_been()
    for seed in range(2):
        same(step(peft, seed), step(pair[0], seed))
    assert captured(peft) is not None


def test_what_changes_after_a_capture_is_noticed(pair):
    warm(pair)
    seen = []
    for peft in pair:
        norm = text(peft).layers[1].input_layernorm.weight
        norm.requires_grad_(True)
    mine, other = step(pair[1], 3), step(pair[0], 3)
    assert any("layers.1.input_layernorm" in name for name in mine[1])
    same(mine, other)
    hook = text(pair[1]).layers[2].mlp.register_forward_hook(lambda *_: seen.append(1))
    step(pair[1], 4)
    hook.remove()
    assert seen


def test_an_evaluation_that_does_not_fit_beside_the_graphs_runs_without_them(pair, monkeypatch):
    warm(pair)
    peft = pair[1]
    graphs, held = text(peft).layers[0].graphs, torch.cuda.memory_reserved()
    captures = graphs._captures
    monkeypatch.setattr(text(peft).memory, "evaluation_fits", lambda *_: False)
    with torch.no_grad():
        peft.eval()(**{k: v.cuda() for k, v in batch((24, 24)).items()})
    peft.train()
    assert captured(peft) is None and torch.cuda.memory_reserved() < held
    same(step(peft, 8), step(pair[0], 8))
    assert captured(peft) is not None and graphs._captures == captures


def test_an_eager_step_between_a_captured_forward_and_its_backward_has_buffers_of_its_own(pair):
    warm(pair)
    results = []
    for peft in pair:
        peft.zero_grad()
        first = peft(**{k: v.cuda() for k, v in batch((24, 24), seed=40).items()}, use_cache=False)
        peft(
            **{k: v.cuda() for k, v in batch((24, 24), seed=41).items()}, use_cache=False
        ).loss.backward()
        peft.zero_grad()
        first.loss.backward()
        named = peft.named_parameters()
        results.append(
            (first.loss.item(), {n: p.grad.clone() for n, p in named if p.grad is not None})
        )
    same(*results)


class TestWhoWaits:
    """Layers are cut into tiles for the sake of graphs only where the host is the slower one."""

    def test_a_card_that_is_done_before_the_host_is_seen(self):
        watch = _Watch()
        watch.begin(5)
        watch.pass_layer(4)  # the event's layer is the last: nothing to tell by
        assert watch.host_bound
        watch.begin(10)
        for index in range(1, 9):
            watch.pass_layer(index)
        torch.cuda.synchronize()
        watch.pass_layer(9)
        assert watch.host_bound

    def test_a_card_that_is_behind_is_seen(self):
        watch = _Watch()
        watch.begin(10)
        torch.cuda._sleep(int(2e9))  # a second or so
        for index in range(1, 10):
            watch.pass_layer(index)
        assert not watch.host_bound
        watch.begin(0)  # and a forward that is none of its own changes nothing
        for index in range(1, 10):
            watch.pass_layer(index)
        assert not watch.host_bound
        torch.cuda.synchronize()


IMAGES = 8  # of 280 soft tokens, two a row


def seeing(vram_gib):
    """Adapters in the vision tower at its real shape, and in a decoder with E2B's widths."""
    config = full_config(
        hidden_size=1536,
        hidden_size_per_layer_input=256,
        intermediate_size=6144,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        global_head_dim=512,
        num_hidden_layers=12,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 4,
        num_kv_shared_layers=6,
        sliding_window=512,
        max_position_embeddings=4096,
    ).to_dict()
    config["vision_config"] |= dict(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=16,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=64,
        patch_size=16,
    )
    with torch.device("cuda"):
        model = Gemma4ForConditionalGeneration._from_config(
            Gemma4Config.from_dict(config), dtype=torch.bfloat16
        ).train()
    gemma_accel.apply(model, vram_gib=vram_gib)
    in_tower = ".*vision_tower.*(q_proj|v_proj|down_proj)"
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=f"{in_tower}|{LANGUAGE}")).cuda()
    for parameter in peft.parameters():
        parameter.data = parameter.data.bfloat16()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return peft


def seen():
    """Four rows of two images and some text."""
    config = full_config()
    row = torch.full((600,), 7)
    for start in (10, 310):
        row[start : start + 280] = config.image_token_id
    grid = torch.meshgrid(torch.arange(60), torch.arange(42), indexing="xy")
    positions = torch.stack(grid, -1).reshape(1, -1, 2).expand(IMAGES, -1, -1)
    ids = row[None].repeat(IMAGES // 2, 1).cuda()
    return {
        "input_ids": ids,
        "labels": ids,
        "pixel_values": torch.rand(IMAGES, 2520, 768, device="cuda", dtype=torch.bfloat16),
        "image_position_ids": positions.contiguous().cuda(),
    }


@pytest.mark.parametrize("told", [True, False])
def test_a_towers_backward_has_room_beside_the_graphs(told):
    """It takes 0.95 GiB here, after the decoder's, out of memory that no graph holds."""
    gc.collect()
    torch.cuda.empty_cache()
    peft, inputs = seeing(vram_gib=4.2), seen()
    base = peft.get_base_model()
    policy = text(peft).memory
    if told:  # as the Trainer's set-up does
        watch_towers(base, policy)

    def steps():
        for _ in range(STEADY + 3):
            peft.zero_grad()
            peft(**inputs, use_cache=False).loss.backward()

    try:
        if told:
            steps()
            assert captured(peft) is not None
            (vectors,) = policy.media.values()
            assert vectors == IMAGES * 2520
        else:
            with pytest.raises(torch.OutOfMemoryError):
                steps()
    finally:
        report_of(base).restore()
