"""What surrounds a capture of the decoder stack, where no card is needed to see it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import gemma_accel
from gemma_accel.memory import HEAD_TILE, Arrangement, Mode, TowerShape
from gemma_accel.patches.graphs import (
    StackGraphs,
    _capturing,
    _fresh,
    _is_out_of_memory,
    _Modules,
    _Watch,
)
from gemma_accel.patches.per_layer import _send_away
from tests.tiny import LANGUAGE, batch, tiny_model


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.other.weight = self.one.weight
        self.one.bias.requires_grad_(False)


class TestFreshParameters:
    def test_share_the_memory_and_take_the_gradients(self):
        model = Tied()
        weight, bias = model.one.weight, model.other.bias
        with _fresh(model.modules()) as fresh:
            assert list(fresh) == [weight, bias]  # a tied one once, a frozen one not
            assert model.one.weight is model.other.weight is fresh[weight] is not weight
            assert all(new.data_ptr() == old.data_ptr() for old, new in fresh.items())
            model.other(model.one(torch.ones(2, 3))).sum().backward()
            assert all(new.grad is not None for new in fresh.values())
        assert weight.grad is None and bias.grad is None
        assert model.one.weight is model.other.weight is weight and model.other.bias is bias

    def test_the_old_ones_are_back_after_an_error(self):
        model = Tied()
        before = dict(model.named_parameters())
        with pytest.raises(RuntimeError, match="capture"), _fresh(model.modules()):
            raise RuntimeError("a capture failed")
        assert all(p is before[name] for name, p in model.named_parameters())


class TestOutOfMemory:
    def test_is_seen_behind_the_error_that_it_led_to(self):
        try:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        except RuntimeError as error:
            assert _is_out_of_memory(error)

    def test_another_error_is_not(self):
        assert not _is_out_of_memory(RuntimeError("operation not permitted"))
        assert not _is_out_of_memory(None)


class _Event:
    passed = True

    def record(self):
        pass

    def query(self):
        return self.passed


@pytest.mark.parametrize("passed", [True, False])
def test_who_waits_for_whom_is_seen_from_an_event_near_the_end(monkeypatch, passed):
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(_Event, "passed", passed)
    watch = _Watch()
    assert watch.host_bound  # until something else is seen
    watch.begin(10)
    for index in range(1, 9):
        watch.pass_layer(index)
    watch.begin(0)  # an evaluation comes between: nothing was seen
    for index in range(1, 10):
        watch.pass_layer(index)
    assert watch.host_bound
    watch.begin(10)
    for index in range(1, 10):
        watch.pass_layer(index)
    assert watch.host_bound is passed


class _Graph:
    """A `CUDAGraph` whose end may fail; ``pool`` answers once it has ended, as torch's does."""

    def __init__(self, log, fails):
        self.log, self.fails, self.ended = log, fails, False

    def capture_begin(self, pool, capture_error_mode):
        self.log.append("begin")

    def capture_end(self):
        self.log.append("end")
        if self.fails:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.ended = True

    def pool(self):
        if not self.ended:
            raise RuntimeError("no preceding successful capture")
        return (0, 1)


class TestCapturing:
    @pytest.fixture
    def log(self, monkeypatch):
        """What is done, on a machine that can do none of it."""
        log = []

        @contextlib.contextmanager
        def stream(stream):
            log.append("stream in")
            try:
                yield
            finally:
                log.append("stream out")

        def end_allocate(device, pool):
            if "end" in log and not self.fails:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            log.append("end allocate")

        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocate)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *_: log.append("release"))
        return log

    def capture(self, log, error=None, fails=False):
        self.fails = fails
        stream = SimpleNamespace(device="cuda:0", device_index=0)
        with _capturing(_Graph(log, fails), (0, 1), stream, lambda: log.append("join")):
            log.append("body")
            if error is not None:
                raise error

    def test_ends_and_leaves_the_stream(self, log):
        self.capture(log)
        assert log == ["stream in", "begin", "body", "end", "stream out"]

    @pytest.mark.parametrize("error", [torch.OutOfMemoryError("too little"), KeyboardInterrupt()])
    def test_joins_the_copies_and_ends_where_the_body_fails(self, log, error):
        with pytest.raises(type(error)):
            self.capture(log, error)
        assert log == ["stream in", "begin", "body", "join", "end", "stream out"]

    @pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("too little")])
    def test_does_what_an_end_that_fails_leaves_undone(self, log, error):
        with pytest.raises(type(error) if error else RuntimeError):
            self.capture(log, error, fails=True)
        assert log[-3:] == ["end allocate", "release", "stream out"]


@pytest.fixture
def stack():
    """A text model with adapters, and graphs of it that nothing was captured for."""
    model = tiny_model("causal")
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE))
    gemma_accel.apply(peft, vram_gib=1.0)
    return model.model, StackGraphs(model.model)


HIDDEN = torch.zeros(2, 8, 16)
TOWER = TowerShape(hidden=768, mlp=3072, layers=16, is_audio=False, replayed=True)


class TestWhatAGraphTakesForGranted:
    def test_is_the_same_at_the_next_step(self, stack):
        text, graphs = stack
        assert graphs._key_of(text, HIDDEN, ()) == graphs._key_of(text, HIDDEN, ())

    @pytest.mark.parametrize(
        "module", [lambda text: text.layers[1].mlp, lambda text: text.per_layer_projection_norm]
    )
    def test_no_hook(self, stack, module):
        text, graphs = stack
        before = graphs._key_of(text, HIDDEN, ())
        hook = module(text).register_forward_hook(lambda *_: None)
        assert graphs._key_of(text, HIDDEN, ()) != before
        hook.remove()
        assert graphs._key_of(text, HIDDEN, ()) == before

    @pytest.mark.parametrize(
        "name",
        [
            "layers.2.mlp.down_proj.base_layer",
            "layers.0.input_layernorm",
            "per_layer_model_projection",
        ],
    )
    def test_what_is_trained(self, stack, name):
        text, graphs = stack
        before = graphs._key_of(text, HIDDEN, ())
        text.get_submodule(name).weight.requires_grad_(True)
        assert graphs._key_of(text, HIDDEN, ()) != before

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda p: p.weight.data.copy_(p.weight.data.clone()), id="nothing moved"),
            pytest.param(lambda p: setattr(p.weight, "data", p.weight.data.clone()), id="moved"),
            pytest.param(
                lambda p: setattr(p, "weight", torch.nn.Parameter(p.weight.data)), id="replaced"
            ),
            pytest.param(lambda p: p.register_module("more", torch.nn.Identity()), id="more"),
            pytest.param(lambda p: setattr(p, "forward", p.forward), id="another forward"),
        ],
    )
    def test_where_its_parameters_lie(self, stack, change, request):
        text, graphs = stack
        before = graphs._key_of(text, HIDDEN, ())
        change(text.layers[3].self_attn.o_proj.base_layer)
        same = request.node.callspec.id == "nothing moved"
        assert (graphs._key_of(text, HIDDEN, ()) == before) is same

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: layer.set_scale("default", 3.0),
            lambda layer: layer.enable_adapters(False),
            lambda layer: layer.merge(),
            lambda layer: layer.set_adapter([]),
        ],
        ids=["scaling", "disabled", "merged", "switched"],
    )
    def test_which_adapters_act(self, stack, change):
        text, graphs = stack
        before = graphs._key_of(text, HIDDEN, ())
        change(text.layers[3].self_attn.o_proj)
        assert graphs._key_of(text, HIDDEN, ()) != before

    def test_layers_hold_graphs_which_do_not_hold_layers(self, stack):
        """In that circle a dropped model would stay until Python collects it."""
        text, graphs = stack
        graphs._key = graphs._key_of(text, HIDDEN, ())
        held = [*vars(graphs).values(), *graphs._key]
        assert not [x for x in held if isinstance(x, nn.Module | _Modules)]

    def test_the_memory_to_live_in(self, stack):
        text, graphs = stack
        before = graphs._key_of(text, HIDDEN, ())
        text.memory.set_budget(1 << 29)
        assert graphs._key_of(text, HIDDEN, ()) != before


class TestAnEvaluation:
    @pytest.fixture
    def graphs(self, stack, monkeypatch):
        text, graphs = stack
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        text.memory.forced = Arrangement([Mode.KEEP] * 5, graphed=True, head_tile=HEAD_TILE)
        graphs._captured = SimpleNamespace(hidden=HIDDEN, nbytes=1 << 20, waiting=None)
        graphs._captures = 1
        return graphs

    def fill(self, text, hidden):
        """Leave just too little for ``hidden`` beside the graphs."""
        memory = text.memory
        for power in range(10, 40):
            memory.set_budget(1 << power)
            if memory.evaluation_fits(hidden, HIDDEN, 1 << 20):
                memory.set_budget(1 << (power - 1))
                return

    def test_of_the_training_batchs_size_runs_beside_the_graphs(self, stack, graphs):
        graphs._make_room_for(stack[0], HIDDEN)
        assert graphs._captured is not None

    def test_that_does_not_fit_beside_them_sends_them_away_until_the_next_step(self, stack, graphs):
        hidden = torch.empty(64, 512, 16)
        self.fill(stack[0], hidden)
        graphs._make_room_for(stack[0], hidden)
        assert graphs._captured is None and graphs._captures == 0 and not graphs.off

    def test_leaves_graphs_alone_that_wait_for_their_backward(self, stack, graphs):
        hidden = torch.empty(64, 512, 16)
        self.fill(stack[0], hidden)
        graphs._captured.waiting = lambda: self
        graphs._make_room_for(stack[0], hidden)
        assert graphs._captured is not None

    @pytest.mark.parametrize("vectors", [8, 1 << 14])
    def test_whose_images_do_not_fit_beside_them_sends_them_away_before(
        self, stack, graphs, vectors
    ):
        memory = stack[0].memory
        memory.allow_graphs(graphs)
        memory.set_budget(64 << 20)
        frozen = dataclasses.replace(TOWER, trained=False)
        pixels = torch.empty(1, vectors, 8)
        memory.evaluate_media(frozen, pixels)  # a model that has gone to the CPU meanwhile
        assert graphs._captured is not None
        on_a_card = SimpleNamespace(
            shape=pixels.shape, is_cuda=True, device="cuda", element_size=pixels.element_size
        )
        memory.evaluate_media(frozen, on_a_card)
        assert (graphs._captured is None) == (vectors > 8)

    def test_a_step_with_more_images_than_ever_sends_them_away_before_its_tower_runs(
        self, stack, graphs
    ):
        memory, captured = stack[0].memory, graphs._captured
        memory.expect_media(TOWER, 100)
        memory.allow_graphs(graphs)
        memory.expect_media(TOWER, 99)
        assert graphs._captured is captured
        memory.expect_media(TOWER, 101)
        assert graphs._captured is None and graphs._captures == 0
        assert memory.media == {TOWER: 101}

    def test_a_copy_of_the_model_has_neither_graphs_nor_media(self, stack, graphs):
        memory = stack[0].memory
        memory.allow_graphs(graphs)
        memory.expect_media(TOWER, 101)
        twin = copy.deepcopy(memory)
        assert twin.graphs is None and not twin.media


class TestAForwardThatGraphsDoNotServe:
    """The report says why, for layers one by one are what a run without a word would be."""

    def why(self, model, **changes):
        """What the report says of the stack's graphs after a training forward, as on a card."""
        text, seen = model.model.language_model, []
        handle = text.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        model.train()(**batch((9, 5)), use_cache=False)
        handle.remove()
        (_, *inputs), kwargs = seen[0]
        if kwargs.get("attention_mask") is not None:  # the kernel's kind, which a card would get
            kwargs["attention_mask"] = kwargs["attention_mask"].to(torch.int32)
        said = []
        text.memory.tell = lambda topic, what: said.append(f"{topic}: {what}")
        layer, hidden = SimpleNamespace(layer_idx=0, training=True), SimpleNamespace(is_cuda=True)
        graphs = StackGraphs(text)
        for _ in range(2):  # said once
            assert graphs.serve(layer, hidden, *inputs, **(kwargs | changes)) is None
        (only,) = said
        assert only == f"CUDA graphs: not used: {graphs.idle}"
        return graphs.idle

    @pytest.fixture
    def model(self):
        model = tiny_model("conditional", towers=False)
        model.get_per_layer_input_embeddings().requires_grad_(False)
        model.model.language_model.per_layer_model_projection.requires_grad_(False)
        gemma_accel.apply(model)
        return model

    def test_of_rows_that_the_cpu_reads(self, model):
        table = model.get_per_layer_input_embeddings()
        _send_away(table)
        assert self.why(model) == "the CPU reads the per-layer table's rows"

    def test_of_a_table_that_is_trained(self, model):
        model.get_per_layer_input_embeddings().requires_grad_(True)
        assert self.why(model) == "the per-layer table is trained, PEFT's, or watched"

    def test_of_a_projection_that_is_not_read(self, model):
        model.model.language_model.per_layer_model_projection.requires_grad_(True)
        assert self.why(model) == "the context projection is stock's (it is trained)"
        watched = model.model.language_model.per_layer_model_projection
        watched.requires_grad_(False).register_forward_hook(lambda *_: None)
        assert "hook" in self.why(model)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"cache": object()}, "a cache of keys and values is filled"),
            ({"attention_mask": torch.ones(2, 9)}, "its mask somebody's own"),
            ({"output_hidden_states": True}, "output_hidden_states is asked for"),
        ],
    )
    def test_of_what_is_asked_for(self, model, changes, reason):
        assert reason in self.why(model, **changes)

    def test_with_saved_tensors_hooks_of_somebody(self, model):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            assert "activation offloading" in self.why(model)
