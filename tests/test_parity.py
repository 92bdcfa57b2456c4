"""Whole tiny models, stock against applied: loss, logits, every gradient, and 30 steps of
training.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

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
