"""Plain Trainer and hand-written loops: the loss without logits, and the logits for whoever
asks.
"""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

import gemma_accel
from gemma_accel.patches import lm_head
from tests.tiny import batch, tiny_model

pytestmark = [
    pytest.mark.usefixtures("references"),
    pytest.mark.skipif(
        not lm_head._head_runs_on("cpu"), reason="TRL's head runs on the CPU since TRL 1.16"
    ),
]


@pytest.fixture(params=["causal", "conditional"])
def pair(request):
    stock, ours = (tiny_model(request.param, towers=False) for _ in range(2))
    gemma_accel.apply(ours)
    return stock, ours


@pytest.fixture
def head_calls(monkeypatch):
    """Calls of the real LM head: what materialises logits."""
    calls = []

    def watch(model):
        model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))

    return calls, watch


def test_training_with_labels_never_runs_the_head_and_gives_stocks_gradients(pair, head_calls):
    calls, watch = head_calls
    stock, ours = pair
    watch(ours)
    expected, out = stock(**batch()), ours(**batch())
    assert not calls
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    for o in (expected, out):
        o.loss.backward()
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-3 * q.grad.norm(), name


@pytest.mark.parametrize("ask", [lambda o: o.logits, lambda o: o["logits"], lambda o: o[1]])
def test_logits_are_there_when_asked_for(pair, head_calls, ask):
    calls, watch = head_calls
    stock, ours = pair
    watch(ours)
    logits = ask(ours(**batch()))
    assert calls == [1]
    tokens = batch()["attention_mask"].bool()
    assert torch.allclose(logits[tokens], stock(**batch()).logits[tokens], atol=1e-4)


def test_num_items_in_batch_is_honoured(pair):
    stock, ours = pair
    losses = [m(**batch(), num_items_in_batch=torch.tensor(100)).loss.item() for m in pair]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("how", ["eval", "no_grad", "no_labels"])
def test_stock_runs_everywhere_else(pair, head_calls, how):
    calls, watch = head_calls
    _, ours = pair
    watch(ours)
    inputs = batch()
    if how == "eval":
        ours.eval()
    if how == "no_labels":
        inputs.pop("labels")
    with torch.set_grad_enabled(how != "no_grad"):
        assert "logits" in ours(**inputs)
    assert calls


def test_a_deep_copys_forward_is_its_own(pair):
    _, ours = pair
    ours(**batch())
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert twin(**batch()).loss.item() != pytest.approx(ours(**batch()).loss.item())


def test_restore_takes_it_off(pair):
    _, ours = pair
    from gemma_accel.patching import report_of

    ours(**batch())
    report_of(ours).restore()
    assert "forward" not in vars(ours)
    assert "logits" in ours(**batch())


def test_restored_and_applied_again_under_a_forward_that_trl_bound(pair, head_calls):
    from trl.trainer.utils import add_fused_lm_head

    from gemma_accel.patching import report_of

    calls, watch = head_calls
    stock, ours = pair
    add_fused_lm_head(ours)
    expected = stock(**batch()).loss.item()
    report_of(ours).restore()
    watch(ours)
    assert ours(**batch()).loss.item() == pytest.approx(expected, rel=1e-5)
    assert calls == [1]  # stock again: it makes logits
    for _ in range(2):
        gemma_accel.apply(ours)
        assert ours(**batch()).loss.item() == pytest.approx(expected, rel=1e-5)
        assert calls == [1]
        report_of(ours).restore()


def test_a_loss_of_the_users_own_gets_its_logits(pair, head_calls, tmp_path):
    calls, watch = head_calls

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            out = model(**inputs)
            loss = torch.nn.functional.cross_entropy(
                out.logits[:, :-1].flatten(0, 1).float(), inputs["labels"][:, 1:].flatten()
            )
            return (loss, out) if return_outputs else loss

    _, ours = pair
    watch(ours)
    rows = [{k: v[0] for k, v in batch((12,), seed=i).items()} for i in range(4)]
    args = TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, bf16=True, report_to="none", save_strategy="no"
    )
    Own(model=ours, args=args, train_dataset=rows).train()
    assert calls
