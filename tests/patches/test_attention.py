"""The attention patch on whole tiny models: padding, packing, generation, and what goes to stock
instead.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments
from transformers.integrations import sdpa_attention

import gemma_accel
from gemma_accel.patches import attention as patch
from tests.tiny import VOCAB, batch, text_config, tiny_model

pytestmark = pytest.mark.usefixtures("references")


def pair(kind="conditional", **changes):
    stock, ours = (tiny_model(kind, towers=False, **changes) for _ in range(2))
    gemma_accel.apply(ours)
    return stock, ours


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def gradients(model, inputs):
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def stock_calls(monkeypatch):
    """How often a layer's attention went to stock sdpa."""
    calls = []

    def counting(*args, **kwargs):
        calls.append(1)
        return sdpa_attention.sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setattr(patch, "sdpa_attention_forward", counting)
    return calls


def agree(stock, ours, inputs, where=None):
    expected, expected_grads = gradients(stock, inputs)
    out, grads = gradients(ours, inputs)
    where = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if where is None else where
    assert relative(out.logits[where], expected.logits[where]) < 1e-5
    assert torch.isfinite(out.logits).all()
    assert relative(out.loss, expected.loss) < 1e-6
    worst = max((relative(grads[n], expected_grads[n]), n) for n in expected_grads)
    assert grads.keys() == expected_grads.keys() and worst[0] < 1e-4, worst


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lengths", [(23, 23), (23, 9), (5, 2)])
def test_padded_batches(side, lengths, stock_calls):
    inputs = batch(lengths, side=side)
    agree(*pair(), inputs, inputs["attention_mask"].bool())
    assert not stock_calls


def test_a_row_of_nothing_but_padding_is_finite(stock_calls):
    _, ours = pair()
    inputs = batch((12, 12))
    inputs["attention_mask"][1] = 0
    inputs["labels"][1] = -100
    out, grads = gradients(ours, inputs)
    assert torch.isfinite(out.logits).all() and torch.isfinite(out.loss)
    assert all(torch.isfinite(g).all() for g in grads.values())


def packed(lengths=(9, 14, 1, 11)):
    ids = torch.randint(3, VOCAB - 10, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.clone()
    labels[positions == 0] = -100
    # with a cache, even an empty one, Transformers does not look for documents
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "use_cache": False}


@pytest.mark.parametrize("kind", ["causal", "conditional"])
def test_packed_documents_do_not_see_each_other(kind, stock_calls):
    stock, ours = pair(kind)
    inputs = packed()
    agree(stock, ours, inputs)
    assert not stock_calls
    # the second document alone gives the same logits
    with torch.no_grad():
        together = ours(**inputs).logits[:, 9:23]
        alone = ours(input_ids=inputs["input_ids"][:, 9:23], use_cache=False).logits
    assert relative(together, alone) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_keys_and_values_get_every_readers_gradient(checkpointing):
    stock, ours = pair(num_kv_shared_layers=3)
    if checkpointing:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = batch()
    agree(stock, ours, inputs, inputs["attention_mask"].bool())


class TestStockInstead:
    def test_a_mask_with_holes(self, stock_calls):
        inputs = batch((20, 20))
        inputs["attention_mask"][0, 7:9] = 0
        patch.warn_of_stock.cache_clear()
        with pytest.warns(UserWarning, match="stock's attention .* holes in the middle"):
            agree(*pair(), inputs, inputs["attention_mask"].bool())
        assert stock_calls

    @pytest.mark.parametrize("side", ["right", "left"])
    @pytest.mark.parametrize("kind", ["causal", "conditional"])
    def test_labels_on_padding(self, kind, side, stock_calls):
        """`padding="max_length"` and ``labels = input_ids``: stock lets padding see the row."""
        stock, ours = pair(kind)
        inputs = batch((23, 9), side=side)
        inputs["labels"] = inputs["input_ids"].clone()
        patch.warn_of_stock.cache_clear()
        with pytest.warns(UserWarning, match="set them to -100"):
            agree(stock, ours, inputs)
        assert stock_calls

    def test_a_four_dimensional_mask(self, stock_calls):
        stock, ours = pair("causal")
        inputs = batch((12, 12))
        inputs["attention_mask"] = torch.ones(12, 12).tril().bool()[None, None].expand(2, 1, 12, 12)
        agree(stock, ours, inputs)
        assert stock_calls

    def test_decoding_with_a_cache(self, stock_calls):
        _, ours = pair()
        ours.eval().generate(
            **{k: v for k, v in batch().items() if k != "labels"}, max_new_tokens=3, do_sample=False
        )
        assert stock_calls

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (dict(attention_dropout=0.1), "attention_dropout is 0.1"),
            (dict(use_bidirectional_attention="vision"), "'vision'"),
            (dict(head_dim=24), "head_dim is 24"),
        ],
    )
    def test_configs_it_does_not_serve(self, change, reason):
        model = tiny_model("causal", **change)
        report = gemma_accel.apply(model)
        (skip,) = [r for r in report.skipped if r.patch == "attention"]
        assert reason in skip.reason
        model(**batch()).loss.backward()

    def test_heads_that_no_tile_of_the_card_holds_get_stocks_mask(self, monkeypatch):
        """float32 at head_dim 512 fits no card's shared memory; autocast's bfloat16 does."""
        asked = []

        def refused(device, dtype, heads, size):
            asked.append((dtype, size))
            return dtype is torch.float32 and size == 32

        monkeypatch.setattr(patch, "_heads_refused", refused)
        config, card = text_config(), torch.device("cuda", 0)
        assert patch._config_refused(config, card, torch.float32)
        assert not patch._config_refused(config, card, torch.bfloat16)
        with torch.autocast("cuda", torch.bfloat16):
            if torch.is_autocast_enabled("cuda"):
                assert not patch._config_refused(config, card, torch.float32)
        assert {size for _, size in asked} == {16, 32}
        assert not patch._config_refused(config, torch.device("cpu"), torch.float32)

    def test_eager_stays_eager(self):
        model = tiny_model("causal")
        model.set_attn_implementation("eager")
        report = gemma_accel.apply(model)
        assert any("'eager'" in r.reason for r in report.skipped if r.patch == "attention")
        out = model(**batch(), output_attentions=True)
        assert out.attentions[0] is not None


@pytest.mark.parametrize("keep", [1, 5])
def test_logits_to_keep_in_training(keep):
    """GRPO asks for the completion's logits only; 5.23 then drops the other queries in the sharing
    layers.
    """
    stock, ours = pair("causal")
    inputs = batch((20, 13), side="left")
    inputs.pop("labels")
    results = []
    for model in (stock, ours):
        logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits
        logits.square().mean().backward()
        results.append((logits, model.model.layers[0].self_attn.q_proj.weight.grad))
    assert results[0][0].shape == results[1][0].shape
    for a, b in zip(*results, strict=True):
        assert relative(b, a) < 1e-4


def test_autocast_with_stocks_norms():
    """Without `qk_norm_rope`, stock's rotation leaves float32 queries beside bfloat16 values."""
    model = tiny_model("causal")
    gemma_accel.apply(model, patches=["attention"])
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch()).loss.backward()


def test_restore_puts_sdpa_back_and_other_towers_never_lose_theirs():
    model = tiny_model("conditional")
    others = {
        n: m.config._attn_implementation for n, m in model.named_modules() if n.endswith("tower")
    }
    report = gemma_accel.apply(model)
    assert model.model.language_model.config._attn_implementation == patch.NAME
    now = {
        n: m.config._attn_implementation for n, m in model.named_modules() if n.endswith("tower")
    }
    assert now == others
    report.restore()
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert patch.NAME not in str(model.config.to_dict())


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("part", ["self_attn", "layers.1"])
@pytest.mark.parametrize("lengths", [(23, 23), (23, 17)])
def test_a_copy_that_peft_made_before_attends_alike(part, lengths):
    """`modules_to_save` copies a module, and its config with it."""
    results = []
    for applied in (False, True):
        model = tiny_model("causal", towers=False)
        config = LoraConfig(r=4, target_modules=["down_proj"], modules_to_save=[part])
        peft = get_peft_model(model, config)
        if applied:
            report = gemma_accel.apply(peft)
        peft(**batch(lengths)).loss.backward()
        results.append({n: p.grad for n, p in peft.named_parameters() if p.grad is not None})
    stock, ours = results
    assert stock.keys() == ours.keys()
    assert all((ours[n] - g).norm() < 1e-3 * g.norm() for n, g in stock.items() if g.any())
    report.restore()
    kinds = {
        m.config._attn_implementation
        for m in peft.modules()
        if hasattr(m, "layer_idx") and hasattr(m, "config")
    }
    assert kinds == {"sdpa"}


@pytest.mark.usefixtures("references", "trl_on_the_cpu")
def test_padding_that_trl_trains_on_sees_the_row_as_in_stock(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.test_callback import tokenizer

    def labelled(rows):
        ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], True, 0)
        mask = pad_sequence([torch.ones(len(row["input_ids"])) for row in rows], True, 0).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}

    losses = []
    for applied in (False, True):
        model = tiny_model("conditional", towers=False)
        if applied:
            gemma_accel.apply(model)
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=str(tmp_path),
                max_steps=1,
                use_cpu=True,
                bf16=False,
                report_to="none",
                logging_steps=1,
                per_device_train_batch_size=2,
                remove_unused_columns=False,
                dataset_kwargs={"skip_prepare_dataset": True},
                disable_tqdm=True,
            ),
            data_collator=labelled,
            train_dataset=Dataset.from_list(
                [{"input_ids": list(range(3, 3 + n))} for n in (30, 5)]
            ),
            processing_class=tokenizer(),
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.usefixtures("references")
def test_a_pickled_model_attends_as_stock():
    model = tiny_model("causal", towers=False)
    gemma_accel.apply(model)
    pickled = pickle.dumps(model)
    assert pickle.loads(pickled).config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == copy.deepcopy(model).config._attn_implementation
    assert model.config._attn_implementation == "gemma_accel"


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("head", [True, False])
def test_right_padded_rows_are_the_same_with_and_without_a_gradient(head, tmp_path):
    """In 16 bits two attentions would differ, and by its log-probabilities a policy would have left
    itself before its first step; a trainer's may come from the backbone alone.
    """
    model = tiny_model("conditional", towers=False).bfloat16().train()
    gemma_accel.apply(model)
    inputs = batch((9, 30), side="right")
    inputs.pop("labels")
    if not head:
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        Trainer(model=model, args=arguments)

    def run():
        out = (model if head else model.model)(**inputs, use_cache=False)
        return out.logits if head else out.last_hidden_state

    with torch.no_grad():
        without = run()
    assert torch.equal(run(), without)
