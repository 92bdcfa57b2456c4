"""The memory policy: every mode gives the same gradients, keeps what the arithmetic says, and none
is chosen that does not fit.
"""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint

import gemma_accel
from gemma_accel.kernels.nf4 import NF4Weight
from gemma_accel.memory import (
    HEAD_TILE,
    Arrangement,
    Itemsize,
    Mode,
    choose_modes,
    head_tile,
    kept_bytes,
    layer_shapes,
    loss_bytes,
    peak_bytes,
)
from tests.tiny import LANGUAGE, batch, text_config, tiny_model

IN_PARTS = {Mode.RECOMPUTE_IN_PARTS, Mode.OFFLOAD_IN_PARTS}


def adapted(kind="causal", *, applied=True, **changes):
    model = tiny_model(kind, towers=False, **changes)
    torch.manual_seed(1)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE, init_lora_weights=False))
    if applied:
        gemma_accel.apply(peft, vram_gib=1.0)
    return model, peft


def text(model):
    return getattr(model.model, "language_model", model.model)


def force(model, modes):
    text(model).memory.forced = Arrangement(modes, graphed=False, head_tile=HEAD_TILE)


def gradients(peft, inputs):
    peft.zero_grad()
    out = peft(**inputs)
    out.loss.backward()
    return out.loss.item(), {
        n: p.grad.clone() for n, p in peft.named_parameters() if p.grad is not None
    }


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


@pytest.fixture
def executions(monkeypatch):
    """How often each layer's forward ran."""
    from gemma_accel.patches import decoder

    counts = [0] * 5
    original = decoder.FusedGemma4TextAttention.forward

    def counting(self, *args, **kwargs):
        counts[self.layer_idx] += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(decoder.FusedGemma4TextAttention, "forward", counting)
    return counts


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("sharing", [0, 2])
@pytest.mark.parametrize("mode", Mode)
def test_every_mode_gives_stocks_gradients(mode, sharing, executions):
    changes = dict(num_kv_shared_layers=sharing)
    stock_loss, stock = gradients(adapted(applied=False, **changes)[1], batch())
    _, expected = gradients(adapted(**changes)[1], batch())
    executions[:] = [0] * 5
    model, peft = adapted(**changes)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    force(model, [mode] * 5)
    loss, grads = gradients(peft, batch())
    assert loss == pytest.approx(stock_loss, rel=1e-6)
    assert grads.keys() == expected.keys() == stock.keys()
    # recomputation adds nothing of its own; heads in groups are another order of summation
    own = 1e-3 if mode in IN_PARTS else 1e-6
    assert max(relative(grads[n], expected[n]) for n in grads) < own
    assert (
        max(relative(grads[n], stock[n]) for n in grads) < 1e-3
    )  # two float32 computations, see test_parity
    # in parts, a layer is replayed for its second half, and its first half again for its own
    times = {Mode.KEEP: 1, Mode.RECOMPUTE_MLP: 1, **dict.fromkeys(IN_PARTS, 3)}.get(mode, 2)
    assert executions == [times] * 5


@pytest.mark.usefixtures("references")
def test_modes_may_differ_from_layer_to_layer(executions):
    _, expected = gradients(adapted(applied=False)[1], batch())
    model, peft = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    force(model, [Mode.OFFLOAD_TILED, Mode.OFFLOAD, Mode.RECOMPUTE, Mode.RECOMPUTE_MLP, Mode.KEEP])
    _, grads = gradients(peft, batch())
    assert max(relative(grads[n], expected[n]) for n in grads) < 1e-4
    assert executions == [2, 2, 2, 1, 1]


@pytest.mark.usefixtures("references")
def test_two_forwards_before_a_backward():
    """DPO's and GRPO's shape: chosen and rejected, policy and old policy."""
    _, reference = adapted(applied=False)
    model, peft = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    force(model, [Mode.OFFLOAD_TILED, Mode.OFFLOAD, Mode.RECOMPUTE, Mode.RECOMPUTE_MLP, Mode.KEEP])
    results = []
    for m in (reference, peft):
        m.zero_grad()
        (m(**batch(seed=1)).loss - 0.5 * m(**batch((12, 9), seed=2)).loss).backward()
        results.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert max(relative(results[1][n], results[0][n]) for n in results[0]) < 1e-4


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("mode", [Mode.RECOMPUTE, Mode.OFFLOAD_TILED, Mode.OFFLOAD_IN_PARTS])
def test_a_replay_leaves_the_shared_keys_of_the_forward(mode, monkeypatch):
    """Its own would hold all that it replays until the whole backward is through."""
    from gemma_accel.patches import decoder

    model, peft = adapted(num_kv_shared_layers=2)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    force(model, [mode] * 5)
    seen = []
    original = decoder.FusedGemma4TextAttention._share

    def watch(self, keys, shared):
        seen.append(shared)
        original(self, keys, shared)

    monkeypatch.setattr(decoder.FusedGemma4TextAttention, "_share", watch)
    loss = peft(**batch()).loss
    shared = seen[-1]
    before = {kind: tuple(map(id, keys)) for kind, keys in shared.items()}
    assert len(before) == 2 and len({id(one) for one in seen}) == 1
    calls = len(seen)
    loss.backward()
    assert len(seen) > calls  # layers were replayed
    assert {kind: tuple(map(id, keys)) for kind, keys in shared.items()} == before


def _nodes(node, seen):
    if node is not None and node not in seen:
        seen.add(node)
        for below, _ in node.next_functions:
            _nodes(below, seen)
    return seen


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("mode", [Mode.KEEP, Mode.OFFLOAD_IN_PARTS])
def test_a_projection_holds_parameters_alone(mode):
    """A decoded weight on its node would stay from forward to backward: a checkpoint lets go only
    of what is saved for backward.
    """
    import bitsandbytes as bnb

    model = tiny_model("causal", towers=False)
    for layer in model.model.layers:
        dense = layer.self_attn.o_proj
        four = bnb.nn.Linear4bit(dense.in_features, dense.out_features, bias=False)
        four.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4")
        layer.self_attn.o_proj = four.to("cpu")
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE, init_lora_weights=False))
    gemma_accel.apply(peft, vram_gib=1.0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    force(model, [mode] * 5)
    nodes = _nodes(peft(**batch()).loss.grad_fn, set())
    of_projections = [n for n in nodes if type(n).__name__ == "ProjectFunctionBackward"]
    quantised = 0
    for node in of_projections:
        assert all(isinstance(p, torch.nn.Parameter) for p in node.parameters if p is not None)
        quantised += sum(isinstance(p.weight, NF4Weight) for p in node.projections)
    heads = model.config.num_attention_heads
    assert quantised == 5 * (min(heads, 8) if mode is Mode.OFFLOAD_IN_PARTS else 1)


@pytest.mark.usefixtures("references")
class TestBounds:
    def test_without_checkpointing_nothing_is_recomputed(self, executions):
        model, peft = adapted()
        force(model, [Mode.OFFLOAD] * 5)
        gradients(peft, batch())
        assert executions == [1] * 5

    def test_without_a_budget_layers_are_checkpointed_as_stock(self, executions):
        model, peft = adapted()
        text(model).memory.budget = None
        model.gradient_checkpointing_enable({"use_reentrant": False})
        gradients(peft, batch())
        assert executions == [2] * 5

    def test_somebody_elses_checkpoint_function_is_left_alone(self, executions):
        model, peft = adapted()
        force(model, [Mode.KEEP] * 5)
        model.gradient_checkpointing_enable({"use_reentrant": False, "determinism_check": "none"})
        gradients(peft, batch())
        assert executions == [2] * 5

    def test_restore_leaves_stocks_function(self):
        model, peft = adapted()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        from gemma_accel.patching import report_of

        report_of(model).restore()
        layer = text(model).layers[0]
        assert layer._gradient_checkpointing_func.func is checkpoint
        assert not {"memory"} & set(vars(layer)) and not {"keep", "tile"} & set(vars(layer.mlp))

    def test_a_deep_copy_has_a_policy_of_its_own(self):
        model, _ = adapted()
        twin = copy.deepcopy(model)
        assert text(twin).memory is not text(model).memory
        assert text(twin).layers[0].memory is text(twin).memory


@pytest.mark.parametrize("mode", [Mode.KEEP, Mode.RECOMPUTE_MLP, Mode.RECOMPUTE])
def test_a_layer_keeps_the_bytes_that_the_arithmetic_says(device, mode):
    """Against autograd itself: the distinct storages that are held for backward, layer by layer."""
    model, peft = adapted(num_kv_shared_layers=2)
    peft.to(device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    force(model, [mode] * 5)
    inputs = {k: v.to(device) for k, v in batch((64,)).items()}
    held: dict[int, int] = {}
    stack = []

    def pack(tensor):
        stack.append(tensor)
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in peft.parameters()}
    layers = text(model).layers
    marks = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: marks.append(len(stack)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        peft(**inputs).loss  # noqa: B018 - the graph is what counts
    starts = [0, *marks[:-1]]
    for index, (start, stop) in enumerate(zip(starts, marks, strict=True)):
        seen = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in stack[start:stop]
        }
        own = {p: n for p, n in seen.items() if p not in parameters and p not in held}
        held.update(own)
        shape = layer_shapes(model.config.get_text_config())[index]
        expected = 64 * kept_bytes(shape, mode, Itemsize.throughout(4))
        # small change on top: adapters' products, norms' factors, positions; and layer 0 also holds
        # what all layers read
        slack = 64 * 4 * (6 * 4 + 16 + (4 * 64 + 4 * 32 if index == 0 else 0))
        assert expected * 0.9 - slack <= sum(own.values()) <= expected + slack, (
            index,
            sum(own.values()),
            expected,
        )


class TestHeadTile:
    @pytest.mark.usefixtures("references")  # the head is no kernel
    def test_the_lm_head_takes_fewer_tokens_at_a_time_and_trl_gets_its_own_back(self):
        from trl.kernels import chunked_logprob

        from gemma_accel.patching import report_of

        model, peft = adapted()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        found = {}
        for tile in (HEAD_TILE, 8):
            text(model).memory.forced = Arrangement([Mode.RECOMPUTE] * 5, False, tile)
            found[tile] = gradients(peft, batch())
            assert tile == chunked_logprob.TOKEN_CHUNK_SIZE
        assert found[8][0] == pytest.approx(found[HEAD_TILE][0], rel=1e-6)
        for name, expected in found[HEAD_TILE][1].items():
            assert relative(found[8][1][name], expected) < 1e-5, name
        report_of(model).restore()
        assert chunked_logprob.TOKEN_CHUNK_SIZE == HEAD_TILE

    def test_no_more_than_a_quarter_is_for_the_loss_where_that_can_be(self):
        for available in (1 << 40, 2 << 30, 1 << 30, 1 << 29, 0):
            tile = head_tile(4096, 1536, 262144, available)
            assert 1024 <= tile <= HEAD_TILE
            if tile > 1024:
                assert loss_bytes(4096, 1536, 262144, tile) <= available / 4
        assert head_tile(4096, 1536, 262144, 1 << 40) == HEAD_TILE


class TestChoice:
    shapes = layer_shapes(
        text_config(hidden_size=1536, intermediate_size=6144, num_hidden_layers=5)
    )

    def test_with_memory_to_spare_everything_is_kept(self):
        assert choose_modes(self.shapes, 4096, 1 << 40, 0) == [Mode.KEEP] * 5

    def test_with_none_everything_is_taken_in_parts(self):
        assert choose_modes(self.shapes, 4096, 0, 0) == [Mode.OFFLOAD_IN_PARTS] * 5

    def test_what_is_chosen_fits_and_more_memory_never_means_more_work(self):
        order = list(Mode)
        cost = None
        loss = loss_bytes(4096, 1536, 262144)
        for available in range(1 << 28, 4 << 30, 1 << 27):
            modes = choose_modes(self.shapes, 4096, available, loss)
            if set(modes) != {Mode.OFFLOAD_IN_PARTS}:
                assert peak_bytes(self.shapes, modes, 4096, loss) <= available
            grades = sum(order.index(mode) for mode in modes)
            assert cost is None or grades <= cost
            cost = grades


def on_the_gpu(mode):
    """A model all of whose layers run in ``mode``, and a batch for it."""
    model, peft = adapted(hidden_size=256)
    peft.cuda()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    force(model, [mode] * 5)
    return peft, {k: v.cuda() for k, v in batch((400, 400)).items()}


@pytest.mark.usefixtures("references")
def test_layers_below_all_adapters_keep_nothing(executions):
    model = tiny_model("causal")
    peft = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[3, 4])
    )
    gemma_accel.apply(peft, vram_gib=1.0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()
    force(model, [Mode.RECOMPUTE] * 5)
    kept = []
    hidden = 2 * 11 * model.config.hidden_size

    def keep(tensor):
        kept.append(tensor.numel() == hidden)
        return tensor

    inputs = batch((11, 11))["input_ids"]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = peft.model.model(input_ids=inputs, use_cache=False).last_hidden_state
    assert sum(kept) <= 2 + 2  # two layers' inputs, and the final norm's
    out.sum().backward()
    assert executions == [1, 1, 1, 2, 2]


@pytest.mark.usefixtures("references")
def test_another_figure_of_what_is_taken_chooses_anew():
    model, _ = adapted()
    memory = model.model.memory
    memory.chosen[(1,)] = Arrangement([Mode.KEEP] * 5, graphed=False, head_tile=HEAD_TILE)
    memory.set_fixed(memory.fixed, memory.trained)
    assert memory.chosen
    memory.set_fixed(memory.fixed + 1, memory.trained)
    assert not memory.chosen


@pytest.mark.gpu
def test_offloading_on_a_gpu_gives_the_same_gradients_and_holds_less():
    results = {}
    for mode in (Mode.RECOMPUTE, Mode.OFFLOAD):
        peft, inputs = on_the_gpu(mode)
        for _ in range(2):  # the second step reuses the host buffers
            _, grads = gradients(peft, inputs)
        results[mode] = grads
        # it would keep the last layer's input on the device
        assert text(peft.get_base_model()).memory._inputs._last is None
    for name, expected in results[Mode.RECOMPUTE].items():
        assert torch.equal(results[Mode.OFFLOAD][name], expected), name


@pytest.mark.gpu
def test_an_offloaded_input_leaves_the_gpu():
    held = {}
    for mode in (Mode.RECOMPUTE, Mode.OFFLOAD):
        peft, inputs = on_the_gpu(mode)
        for _ in range(2):
            loss = peft(**inputs).loss
            torch.cuda.synchronize()
            torch.empty(
                1, device="cuda"
            )  # the allocator takes back what other streams are done with
            held[mode] = torch.cuda.memory_allocated()
            loss.backward()
        del loss, peft
        gc.collect()
    of_four_layers = 4 * 2 * 400 * 256 * 4  # the first one's is what every layer reads: it stays
    assert held[Mode.RECOMPUTE] - held[Mode.OFFLOAD] >= 0.9 * of_four_layers


@pytest.mark.usefixtures("references")
class TestRandomness:
    """What is drawn in the forward is drawn again in a replay."""

    @pytest.mark.parametrize("mode", [m for m in Mode if m not in (Mode.KEEP, Mode.RECOMPUTE_MLP)])
    @pytest.mark.parametrize("where", ["adapters", "attention", "a second adapter"])
    def test_dropout(self, mode, where):
        changes = {"attention_dropout": 0.2} if where == "attention" else {}
        results = []
        for applied in (False, True):
            model = tiny_model("causal", towers=False, **changes)
            dropout = 0.2 if where == "adapters" else 0.0
            config = dict(r=4, target_modules=LANGUAGE, init_lora_weights=False)
            torch.manual_seed(1)
            peft = get_peft_model(model, LoraConfig(lora_dropout=dropout, **config))
            if applied:
                gemma_accel.apply(peft, vram_gib=1.0)
                model.gradient_checkpointing_enable({"use_reentrant": False})
                force(model, [mode] * 5)
            if where == "a second adapter":
                gradients(peft, batch())
                torch.manual_seed(2)
                peft.add_adapter("second", LoraConfig(lora_dropout=0.2, **config))
                peft.set_adapter("second")
            torch.manual_seed(3)
            results.append(gradients(peft.train(), batch()))
        (loss, expected), (ours, grads) = results
        if mode not in IN_PARTS:  # heads one by one draw in another order
            assert ours == pytest.approx(loss, rel=1e-5)
            assert max(relative(grads[n], expected[n]) for n in expected) < 1e-3
            return
        # the gradient is that of the loss which the same masks give: along it the loss falls
        again = {n: p for n, p in peft.named_parameters() if p.requires_grad}
        step = 1e-3 / sum(g.square().sum() for g in grads.values())  # the loss falls by 0.001
        with torch.no_grad():
            for name, gradient in grads.items():
                again[name] -= step * gradient
        torch.manual_seed(3)
        moved = gradients(peft, batch())[0]
        assert ours - moved == pytest.approx(1e-3, rel=0.05)

    def test_a_method_of_peft_that_draws_by_itself(self):
        config = LoHaConfig(r=4, target_modules=LANGUAGE, rank_dropout=0.3, init_weights=False)
        results = []
        for applied in (False, True):
            model = tiny_model("causal", towers=False)
            torch.manual_seed(1)
            peft = get_peft_model(model, config)
            if applied:
                gemma_accel.apply(peft, vram_gib=1.0)
                model.gradient_checkpointing_enable({"use_reentrant": False})
                force(model, [Mode.RECOMPUTE] * 5)
            torch.manual_seed(3)
            results.append(gradients(peft.train(), batch())[1])
        expected, grads = results
        assert max(relative(grads[n], expected[n]) for n in expected) < 1e-3


@pytest.mark.usefixtures("references")
def test_a_replay_runs_as_its_own_forward_did_whatever_came_between():
    """Two batches of different shapes, which the policy runs in different modes, and one
    backward.
    """
    _, reference = adapted(applied=False)
    model, peft = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = text(model).memory
    modes = {23: Mode.OFFLOAD_IN_PARTS, 9: Mode.RECOMPUTE_TILED}

    def arrangement(hidden):
        return Arrangement([modes[hidden.shape[1]]] * 5, graphed=False, head_tile=HEAD_TILE)

    policy.arrangement = arrangement
    results = []
    for m in (reference, peft):
        m.zero_grad()
        (m(**batch((23, 17))).loss + m(**batch((9, 9), seed=2)).loss).backward()
        results.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert max(relative(results[1][n], results[0][n]) for n in results[0]) < 1e-3


@pytest.mark.usefixtures("references")
def test_a_layer_called_by_keywords_alone():
    model, _ = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    inner = text(model)
    seen = []
    inner.layers[4].register_forward_hook(
        lambda _, args, kwargs, out: seen.append((args, kwargs)), with_kwargs=True
    )
    model(**batch())
    ((args, kwargs),) = seen
    hidden, per_layer = args
    inner.layers[4](hidden_states=hidden, per_layer_input=per_layer, **kwargs).sum().backward()
