"""Plain Trainer and hand-written loops: the loss without logits, and the logits for whoever
asks.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._pytree import tree_map
from transformers import Trainer, TrainingArguments

import gemma_accel
from gemma_accel.patches import lm_head
from tests.tiny import LANGUAGE, batch, tiny_model

pytestmark = pytest.mark.usefixtures("references")


@pytest.fixture(params=["causal", "conditional"])
def pair(request):
    if not lm_head._head_runs_on("cpu"):
        pytest.skip("TRL's head runs on the CPU since TRL 1.16")
    stock, ours = (tiny_model(request.param, towers=False) for _ in range(2))
    gemma_accel.apply(ours)
    return stock, ours


@pytest.fixture
def head_calls(monkeypatch):
    """Calls of the real LM head: what materialises logits."""
    calls = []

    def watch(model):
        forward, head = nn.Linear.forward, model.get_output_embeddings()

        def counting(self, x):  # not by a hook, which would make the head one that must run
            if self is head:
                calls.append(1)
            return forward(self, x)

        monkeypatch.setattr(nn.Linear, "forward", counting)

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


ASK = {
    "attribute": lambda o: o.logits,
    "key": lambda o: o["logits"],
    "get": lambda o: o.get("logits"),
    "position": lambda o: o[1],
    "tuple": lambda o: o.to_tuple()[1],
    "dict": lambda o: dict(o)["logits"],
    "keywords": lambda o: dict(**o)["logits"],
    "values": lambda o: torch.clone(list(o.values())[1])[:],
    "items": lambda o: dict(o.items())["logits"].clone(),
    "pickle": lambda o: pickle.loads(pickle.dumps(o)).logits,
    "copy": lambda o: tree_map(lambda each: each, o).logits,  # as DDP does
}


@pytest.mark.parametrize("ask", ASK.values(), ids=ASK)
def test_logits_are_there_when_asked_for(pair, head_calls, ask):
    calls, watch = head_calls
    stock, ours = pair
    watch(ours)
    logits = ask(ours(**batch()))
    assert calls == [1]
    tokens = batch()["attention_mask"].bool()
    assert torch.allclose(logits[tokens], stock(**batch()).logits[tokens], atol=1e-4)


def test_positions_that_begin_again_tell_documents_apart_where_stock_does(pair):
    stock, ours = pair
    ids = batch((16,))["input_ids"]
    positions = torch.cat((torch.arange(9), torch.arange(7)))[None]
    inputs = {"input_ids": ids, "labels": ids, "position_ids": positions}
    losses = []
    for kwargs in ({}, {"use_cache": False}):
        expected, out = stock(**inputs, **kwargs), ours(**inputs, **kwargs)
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=0.0)
        assert (out.past_key_values is None) == (expected.past_key_values is None)
        losses.append(out.loss.item())
    if type(stock).__name__ == "Gemma4ForCausalLM":  # the other makes its masks before its cache
        assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_who_asks_for_the_loss_or_the_keys_does_not_pay_for_logits(pair, head_calls):
    calls, watch = head_calls
    stock, ours = pair
    watch(ours)
    out = ours(**batch(), use_cache=False)
    assert list(out) == list(stock(**batch(), use_cache=False))
    assert out[0] is out["loss"] is out.get("loss") is out.loss
    assert not calls


@pytest.fixture
def nobody_before():
    """Accelerate keeps its first precision for the process; an earlier trainer's may be another."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("nobody_before")
def test_mixed_precision_by_accelerate_takes_the_logits_along_unread(pair, head_calls):
    calls, watch = head_calls
    watch(pair[1])
    stock, ours = (Accelerator(mixed_precision="bf16", cpu=True).prepare(m) for m in pair)
    expected, out = stock(**batch()), ours(**batch())
    assert not calls
    assert out.logits.dtype == expected.logits.dtype == torch.float32
    tokens = batch()["attention_mask"].bool()
    error = (out.logits - expected.logits)[tokens].norm() / expected.logits[tokens].norm()
    assert error < 0.15
    assert torch.equal(out.logits, out.logits.bfloat16().float())  # under its autocast


def test_loss_and_logits_are_of_one_dropout_mask(pair):
    _, ours = pair
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=LANGUAGE, init_lora_weights=False)
    out = get_peft_model(ours, config).train()(**batch())
    with torch.no_grad():
        logits = out.logits
    assert logits.requires_grad
    loss = ours.loss_function(logits, batch()["labels"], logits.shape[-1])
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5)


def test_hidden_states_and_a_cache_are_there_where_they_are_wanted(pair):
    for model in pair:
        model.config.get_text_config().output_hidden_states = True
    tokens = batch()["attention_mask"].bool()
    expected, out = (model(**batch(), use_cache=True) for model in pair)
    assert list(out) == list(expected)
    assert type(out.past_key_values) is type(expected.past_key_values)
    for a, b in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert torch.allclose(a[tokens], b[tokens], atol=1e-4)


def test_return_dict_false_gives_a_tuple(pair):
    expected, out = (m(**batch(), return_dict=False, use_cache=False) for m in pair)
    assert type(out) is tuple
    assert [type(each) for each in out] == [type(each) for each in expected]


def test_a_loss_function_of_the_users_own_is_the_one_that_counts(pair):
    for model in pair:
        model.loss_function = lambda *args, own=model.loss_function: 3 * own(*args)
    expected, out = (model(**batch()).loss.item() for model in pair)
    assert out == pytest.approx(expected, rel=1e-5)


def test_ignore_index_is_honoured(pair):
    inputs = batch()
    inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == -100, 7)
    expected, out = (model(**inputs, ignore_index=7).loss.item() for model in pair)
    assert out == pytest.approx(expected, rel=1e-5)


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


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
def test_a_copy_can_be_applied_and_restored_itself(head_calls, copied):
    calls, watch = head_calls
    model = tiny_model("causal", towers=False)
    gemma_accel.apply(model)
    expected = model(**batch()).loss.item()
    twin = copied(model)
    report = gemma_accel.apply(twin)
    watch(twin)
    assert twin(**batch()).loss.item() == pytest.approx(expected, rel=1e-5)
    assert bool(calls) is not lm_head._head_runs_on("cpu")
    assert twin.eval()(**batch()).loss.item() == pytest.approx(expected, rel=1e-5)
    report.restore()
    assert twin(**batch()).loss.item() == pytest.approx(expected, rel=1e-5)
    assert copied is by_pickle or "forward" not in vars(twin)


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
    calls.clear()
    Trainer(model=ours, args=args, train_dataset=rows).train()  # and nobody after it
    assert not calls


OPERATORS = {
    "half": lambda x: x / 2,
    "one more": lambda x: 1 + x,
    "negative": lambda x: -x,
    "positive": lambda x: x > 0,
    "same": lambda x: x == x,
    "rows": lambda x: torch.tensor(len(x)),
    "first": lambda x: x[0],
    "iterated": lambda x: torch.stack(list(x)),
    "product": lambda x: x @ torch.ones(x.shape[-1]),
}


@pytest.mark.parametrize("ask", OPERATORS.values(), ids=OPERATORS.keys())
def test_values_of_the_output_compute_with_like_tensors(pair, ask):
    _, ours = pair
    out = ours(**batch())
    values = dict(out.items())
    assert torch.equal(ask(values["logits"]), ask(out.logits))


def test_logits_of_a_head_that_has_changed_since_are_an_error(pair):
    _, ours = pair
    out = ours(**batch())
    out.loss.backward()
    torch.optim.SGD(ours.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="head that makes them was changed"):
        out.logits.mean()
