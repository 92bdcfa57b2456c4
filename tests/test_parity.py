"""Whole tiny models, stock against applied: loss, logits, every gradient, and 30 steps of
training.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import gemma_accel
from tests.tiny import LANGUAGE, batch, tiny_model

pytestmark = pytest.mark.usefixtures("references")


BRANCHES = {
    "everything": {},
    "no per-layer embeddings": dict(hidden_size_per_layer_input=0, num_kv_shared_layers=0),
    "no sharing": dict(num_kv_shared_layers=0),
    "single-wide MLP": dict(use_double_wide_mlp=False),
    "sliding only": dict(
        layer_types=["sliding_attention"] * 4 + ["full_attention"], num_kv_shared_layers=0
    ),
    "keys are values": dict(
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
    ),
    "odd widths": dict(hidden_size=72, intermediate_size=88, hidden_size_per_layer_input=8),
}


def pair(kind, **changes):
    """The same model twice, the second applied."""
    stock, ours = tiny_model(kind, **changes), tiny_model(kind, **changes)
    report = gemma_accel.apply(ours)
    return stock, ours, report


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def gradients(model, inputs):
    """Outputs (logits of the tokens only: padding may see what it likes) and gradients."""
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    out.logits = out.logits[inputs["attention_mask"].bool()]
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("kind", ["causal", "conditional"])
def test_loss_logits_and_every_gradient_in_full_fine_tuning(kind, branch):
    """Against float64 truth, beside float32 stock's own error, the mean of three draws: both are
    the last few bits grown through the network, so a single tensor's may still differ by 4, all of
    them together by 1.5. A wrong term would be off by thousands.
    """
    errors = []
    for seed in range(3):
        truth, truth_grads = gradients(
            tiny_model(kind, seed=seed, **BRANCHES[branch]).double(), batch(seed=seed)
        )
        rows = []
        for model in pair(kind, seed=seed, **BRANCHES[branch])[:2]:
            out, grads = gradients(model, batch(seed=seed))
            assert relative(out.loss, truth.loss) < 1e-6
            assert relative(out.logits, truth.logits) < 3e-5
            assert grads.keys() == truth_grads.keys()
            rows.append([relative(grads[n], truth_grads[n]) for n in truth_grads])
        errors.append(rows)
    stock, ours = torch.tensor(errors).mean(0).clamp_min(1e-5)
    worst = (ours / stock).argmax()
    assert ours[worst] <= 4 * stock[worst], list(truth_grads)[worst]
    assert ours.norm() <= 1.5 * stock.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("wrapped", ["before", "after"])
@pytest.mark.parametrize("kind", ["causal", "conditional"])
def test_adapter_gradients(kind, wrapped, checkpointing):
    results = []
    for applied in (False, True):
        model = tiny_model(kind)
        if applied and wrapped == "after":
            gemma_accel.apply(model)
        torch.manual_seed(1)
        peft = get_peft_model(
            model, LoraConfig(r=4, target_modules=LANGUAGE, init_lora_weights=False)
        )
        if applied and wrapped == "before":
            gemma_accel.apply(peft)
        if applied and wrapped == "after":
            peft.get_base_model().model  # noqa: B018 - wrapped after apply: the table is settled by a Trainer, here it is frozen already
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        results.append(gradients(peft, batch()))
    (expected, expected_grads), (out, grads) = results
    assert relative(out.loss, expected.loss) < 1e-6
    assert grads.keys() == expected_grads.keys() and grads
    worst = max((relative(grads[n], expected_grads[n]), n) for n in grads)
    assert worst[0] < 1e-4, worst


def test_checkpointing_really_recomputes_applied_layers():
    """A class swap keeps checkpointing; an instance forward would lose it silently on transformers
    5.23.
    """
    counts = []
    for checkpointing in (False, True):
        model = tiny_model()
        gemma_accel.apply(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        calls = []
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(**batch()).loss.backward()
        counts.append(len(calls))
    assert counts == [5, 10]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_no_less_accurate_than_stock(dtype):
    """Against float32 truth, in the gradients of the whole model."""
    errors = []
    for seed in range(
        6
    ):  # a whole network's error is one draw; the mean over several is what is compared
        truth, truth_grads = gradients(
            tiny_model("causal", dtype=dtype, seed=seed).float(), batch(seed=seed)
        )
        stock, ours, _ = pair("causal", dtype=dtype, seed=seed)
        row = []
        for model in (stock, ours):
            out, grads = gradients(model, batch(seed=seed))
            assert out.logits.dtype == dtype
            row += [relative(out.logits, truth.logits)]
            row += [
                torch.tensor([relative(grads[n], truth_grads[n]) for n in truth_grads])
                .norm()
                .item()
            ]
        errors.append(row)
    stock_logits, stock_grads, our_logits, our_grads = torch.tensor(errors).mean(0).tolist()
    assert our_logits <= stock_logits * 1.1, (our_logits, stock_logits)
    assert our_grads <= stock_grads * 1.1, (our_grads, stock_grads)


def thirty_steps(*, lora, applied, nudge=0):
    """Losses and final trained weights; ``nudge`` seeds a change of every weight by half a unit in
    float32's last place.
    """
    model = tiny_model("conditional", towers=False)
    if nudge:
        torch.manual_seed(nudge)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + torch.finfo(torch.float32).eps / 2 * torch.randn_like(parameter))
    if lora:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE))
    if applied:
        gemma_accel.apply(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    # plain momentum: Adam divides by the gradient's size and would blow up the last bits of a
    # gradient of nearly nothing
    optimizer = torch.optim.SGD(trained, lr=0.05 if lora else 0.002, momentum=0.9)
    losses = []
    for step in range(30):
        out = model(**batch((21, 13), seed=step % 5))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    return torch.tensor(losses), torch.cat([p.detach().flatten() for p in trained])


@pytest.mark.parametrize("lora", [False, True])
def test_thirty_steps_end_where_stock_ends(lora):
    """Training is chaotic: a last-bit change grows. The applied run may leave the stock run no
    further than stock leaves itself when its weights are nudged by half a unit in the last place
    (the largest of three nudges; a factor of 4 for drawing only three).
    """
    expected, expected_weights = thirty_steps(lora=lora, applied=False)
    losses, weights = thirty_steps(lora=lora, applied=True)
    assert expected[-5:].mean() < expected[:5].mean() - 0.05
    nudged = [thirty_steps(lora=lora, applied=False, nudge=n) for n in (1, 2, 3)]
    spread = max((n - expected).abs().max() for n, _ in nudged)
    assert (losses - expected).abs().max() <= 4 * spread
    spread = max(relative(w, expected_weights) for _, w in nudged)
    assert relative(weights, expected_weights) <= 4 * spread


@pytest.mark.parametrize("lengths", [(9,), (9, 5)], ids=["one row", "padded"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_generates_the_same_tokens(side, cache, lengths):
    """Past the sliding window, padded either side, with a cache that grows or one that is there
    from the beginning, and without.
    """
    stock, ours, _ = pair("conditional", towers=False)
    prompt = batch(lengths, side=side)
    prompt.pop("labels")
    kept = {"cache_implementation": cache} if cache else {"use_cache": False}
    tokens = [
        model.eval().generate(**prompt, max_new_tokens=14, do_sample=False, **kept)
        for model in (stock, ours)
    ]
    assert torch.equal(*tokens)


def test_per_layer_inputs_given_by_the_caller_are_used():
    stock, ours, _ = pair("causal")
    ids = batch()["input_ids"]
    outs = []
    for model in (stock, ours):
        given = torch.randn(*ids.shape, 5, 16, generator=torch.Generator().manual_seed(3))
        outs.append(
            model(inputs_embeds=model.model.embed_tokens(ids), per_layer_inputs=given).logits
        )
    assert relative(outs[1], outs[0]) < 1e-5


def test_norms_that_peft_wraps_run_their_own_forward():
    """`modules_to_save` on norms: the wrapped copies are trained, so no fused op may take the
    original's weight.
    """
    results = []
    for applied in (False, True):
        torch.manual_seed(1)
        model = get_peft_model(
            tiny_model("causal"),
            LoraConfig(
                r=4,
                target_modules=LANGUAGE,
                init_lora_weights=False,
                modules_to_save=["post_attention_layernorm", "q_norm", "per_layer_projection_norm"],
            ),
        )
        if applied:
            gemma_accel.apply(model)
        results.append(gradients(model, batch()))
    (expected, expected_grads), (out, grads) = results
    assert relative(out.loss, expected.loss) < 1e-6
    assert grads.keys() == expected_grads.keys()
    assert any("post_attention_layernorm" in n for n in grads)
    worst = max((relative(grads[n], expected_grads[n]), n) for n in grads)
    assert worst[0] < 1e-4, worst


def test_autocast_is_no_less_accurate_than_stock():
    errors = []
    for seed in range(6):
        truth = gradients(tiny_model("conditional", towers=False, seed=seed), batch(seed=seed))[1]
        row = []
        for model in pair("conditional", towers=False, seed=seed)[:2]:
            with torch.autocast("cpu", torch.bfloat16):
                out = model(**batch(seed=seed))
            out.loss.backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            assert grads.keys() == truth.keys()
            row.append(torch.tensor([relative(grads[n], truth[n]) for n in truth]).norm().item())
        errors.append(row)
    stock, ours = torch.tensor(errors).mean(0).tolist()
    assert ours <= stock * 1.1, (ours, stock)


def _relu(name):
    def change(model):
        model.get_submodule(name).act_fn = nn.ReLU()

    return change


def _by_a_hook(name):
    def change(model):
        model.get_submodule(name).register_forward_hook(lambda *hook: 0.5 * hook[-1] + 0.1)

    return change


def _head_bound_over(model):
    head = model.lm_head
    head.forward = lambda x: 0.5 * nn.Linear.forward(head, x)


def _window(length):
    def change(model):
        model.config.get_text_config().sliding_window = length

    return change


OF_ONES_OWN = {
    "ReLU in the MLP": _relu("model.layers.1.mlp"),
    "ReLU in the per-layer gate": _relu("model.layers.1"),
    "a hook on the MLP's activation": _by_a_hook("model.layers.0.mlp.act_fn"),
    "a hook on the gate's activation": _by_a_hook("model.layers.0.act_fn"),
    "a hook on the values' norm": _by_a_hook("model.layers.0.self_attn.v_norm"),
    "a hook on the per-layer table": _by_a_hook("model.embed_tokens_per_layer"),
    "a hook on the head": _by_a_hook("lm_head"),
    "a forward over the head's": _head_bound_over,
    "a shorter window": _window(3),
    "a longer window": _window(64),
    "float64": lambda model: model.double(),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", OF_ONES_OWN.values(), ids=OF_ONES_OWN.keys())
def test_what_somebody_changed_is_what_runs(change, when):
    """Trained and evaluated, whatever the config says of it."""
    stock, ours = (tiny_model("causal", num_kv_shared_layers=1) for _ in range(2))
    unchanged = gradients(stock, batch())[0].loss
    for model in (stock, ours):
        model.get_per_layer_input_embeddings().requires_grad_(False)
    if when == "after":
        gemma_accel.apply(ours)
    change(stock)
    change(ours)
    if when == "before" and ours.dtype is not torch.float64:
        gemma_accel.apply(ours)
    expected, of_stock = gradients(stock, batch())
    out, of_ours = gradients(ours, batch())
    assert abs(expected.loss - unchanged) > 1e-4 or ours.dtype is torch.float64
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=0.0)
    assert of_ours.keys() == of_stock.keys()
    assert all(relative(of_ours[n], of_stock[n]) < 1e-3 for n in of_stock)
    with torch.no_grad():
        got, want = (model.eval()(**batch()).loss for model in (ours, stock))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0.0)


def test_dropout_set_on_the_attention_modules_is_drawn():
    for applied in (False, True):
        model = tiny_model("causal")
        if applied:
            gemma_accel.apply(model)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        model.train()
        assert model(**batch()).loss != model(**batch()).loss
