"""The arithmetic behind ``mfu``, and that it reaches the Trainer's logs without a wait."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import trl
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma4Config, Gemma4ForCausalLM, Trainer

from gemma_accel import apply, telemetry
from gemma_accel.models import base_model, text_model
from gemma_accel.telemetry import Utilisation, arithmetic, lora_weights, peak_tflops, trained
from tests.test_callback import Reporter, arguments, build, model_of
from tests.tiny import LANGUAGE, batch, text_config, tiny_model

pytestmark = pytest.mark.usefixtures("references", "trl_on_the_cpu")

CONFIGS = Path(__file__).parent.parent / "benchmarks/configs"
SOME_CARD = 1e-6  # TFLOP/s: what makes the tiny models' utilisation a number of some digits


@pytest.fixture
def known_card(monkeypatch):
    monkeypatch.setattr(telemetry, "_peak_of", lambda trainer: SOME_CARD if trainer else None)


# ---- the arithmetic


def linear_weights(model) -> int:
    text = text_model(base_model(model))
    return sum(m.weight.numel() for m in text.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("name", ["e2b", "e4b", "31b", "26b-a4b"])
def test_the_formula_knows_the_weights_of_the_real_models(name):
    settings = json.loads((CONFIGS / f"{name}.json").read_text())
    settings["text_config"].update(num_hidden_layers=12)
    del settings["text_config"]["layer_types"][12:]
    if settings["text_config"]["num_kv_shared_layers"]:
        settings["text_config"]["num_kv_shared_layers"] = 2
    text = Gemma4Config.from_dict(settings).get_text_config()
    with torch.device("meta"):
        model = Gemma4ForCausalLM(text)
    expected = linear_weights(model)
    for module in model.modules():
        if type(module).__name__ == "Gemma4TextExperts":
            share = text.top_k_experts / text.num_experts
            expected += share * sum(p.numel() for p in module.parameters())
    token = arithmetic(text).token
    assert token == 4 * expected + 4 * text.vocab_size * text.hidden_size


def test_adapters_are_those_that_peft_makes():
    model = get_peft_model(tiny_model(), LoraConfig(r=3, target_modules=LANGUAGE))
    config = text_config()
    adapters, own, lowest = trained(model, config)
    assert (adapters, own, lowest) == (lora_weights(config, 3), 0, 0)
    assert adapters == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("how", ["full", "lora", "top layers"])
def test_products_are_as_many_as_torch_counts(how):
    """Linear layers and head; what reaches further down than anything trained is not to be done,
    and torch's own count says how much of that stock does all the same.
    """
    model, config = tiny_model(), text_config()
    if how != "full":
        where = LANGUAGE.replace(r"\.layers\.", r"\.layers\.[34]\.") if "top" in how else LANGUAGE
        model = get_peft_model(model, LoraConfig(r=4, target_modules=where))
    if how == "lora":
        model.enable_input_require_grads()  # else nothing goes below the lowest adapter
    inputs = batch((16, 16))
    counter = FlopCounterMode(display=False)
    with counter:
        model(**inputs).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    counted = sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    adapters, own, lowest = trained(model, config)
    assert lowest == (3 if how == "top layers" else 0)
    expected = arithmetic(config, adapters=adapters, trained=own, lowest=lowest).token * 32
    if how == "top layers":  # nothing goes to the lowest adapters' input: their A, and q's base
        assert 0 < expected - counted < 0.05 * expected
    else:
        assert counted == expected


def brute_force(length: int, window: int | None) -> int:
    t = torch.arange(length)
    behind = t[:, None] - t[None, :]
    return int(((behind >= 0) & (behind < (window or length))).sum())


@pytest.mark.parametrize("length", [1, 7, 8, 9, 40])
def test_attention_is_counted_where_a_query_sees_a_key(length):
    cost, expected = arithmetic(text_config()), 0
    for layer in tiny_model().model.layers:
        pairs = brute_force(length, layer.self_attn.sliding_window)
        expected += 14 * layer.self_attn.q_proj.out_features * pairs
    assert cost.rows(2, length) == 2 * (length * cost.token + expected)


def test_packed_documents_cost_what_they_would_alone():
    cost = arithmetic(text_config(), adapters=1000)
    lengths = (1, 5, 30, 12)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    assert cost.packed(positions).item() == pytest.approx(sum(cost.rows(1, n) for n in lengths))
    assert cost.packed(positions).item() < cost.rows(1, sum(lengths))


def test_what_is_trained_of_other_kinds():
    config = text_config()
    full = tiny_model("conditional")
    table = full.get_input_embeddings().weight.numel()
    per_layer = text_model(full).embed_tokens_per_layer.weight.numel()
    matrices = sum(p.numel() for n, p in text_model(full).named_parameters() if p.ndim > 1)
    assert trained(full, config) == (0, matrices - per_layer, 0)

    full.requires_grad_(False)
    assert trained(full, config) == (0, 0, config.num_hidden_layers)
    text_model(full).norm.weight.requires_grad_()
    assert trained(full, config).lowest == config.num_hidden_layers
    text_model(full).embed_tokens.weight.requires_grad_()
    assert trained(full, config) == (0, table, 0)

    full.requires_grad_(False)
    next(full.model.vision_tower.parameters()).requires_grad_()  # reaches in by the soft tokens
    assert trained(full, config) == (0, 0, 0)


# ---- the cards


def test_cards_are_known_by_their_exact_names():
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.4
    assert peak_tflops("NVIDIA GeForce RTX 4060") == 30.2
    assert peak_tflops("GeForce RTX 3070") == 40.6  # as older drivers say
    for unknown in ("NVIDIA GeForce RTX 4060 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", ""):
        assert peak_tflops(unknown) is None


# ---- in a run


def run(cls, model, size=2, **changes):
    reporter = Reporter()
    trainer, _ = build(cls, model, size, 1, max_steps=4, callbacks=[reporter], **changes)
    report = apply(model)
    try:
        trainer.train()
    finally:
        report.restore()
    return trainer, reporter.seen


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("cls", [Trainer, trl.SFTTrainer])
def test_mfu_reaches_the_history_and_the_reporters(cls, every, known_card):
    model = model_of("conditional", lora=True)
    trainer, seen = run(cls, model, logging_steps=every)
    for logs in (trainer.state.log_history, seen):
        steps = [entry for entry in logs if "loss" in entry]
        assert len(steps) == 4 // every
        assert all(entry["mfu"] > 0 for entry in [*steps, logs[-1]])
        assert "train_runtime" in logs[-1]


def test_mfu_is_the_arithmetic_over_the_time(known_card):
    """Rows are 5, 61, 12 and 45 tokens long, two make a batch as wide as the longer."""
    model = model_of("conditional", lora=True)
    config = base_model(model).config.get_text_config()
    adapters, own, lowest = trained(model, config)
    cost = arithmetic(config, adapters=adapters, trained=own, lowest=lowest)
    trainer, _ = run(Trainer, model, data_seed=1)
    widths = []
    for entry in trainer.state.log_history[:-1]:
        flops_a_token = entry["mfu"] * SOME_CARD * 1e12 / entry["tokens_per_second"]
        near = {n: cost.rows(2, n) / (2 * n) for n in (12, 45, 61)}
        widths.append(min(near, key=lambda n: abs(near[n] - flops_a_token)))
        assert flops_a_token == pytest.approx(near[widths[-1]], rel=1e-3)
    total = trainer.state.log_history[-1]
    assert total["mfu"] * SOME_CARD * 1e12 / total["tokens_per_second"] == pytest.approx(
        sum(cost.rows(2, n) for n in widths) / sum(2 * n for n in widths), rel=1e-3
    )


@pytest.mark.parametrize("cls", [Trainer, trl.SFTTrainer])
def test_without_a_card_that_is_known_there_is_no_mfu(cls):
    trainer, seen = run(cls, model_of("conditional", lora=True))
    for entry in (*trainer.state.log_history, *seen):
        assert not {"mfu", "gpu_peak_gib"} & entry.keys()
    assert "tokens_per_second" in trainer.state.log_history[0]


def test_a_model_of_another_kind_has_none(known_card):
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=200)
    trainer = Trainer(transformers.GPT2LMHeadModel(config), arguments())
    counting = Utilisation(trainer)
    counting.add({"input_ids": torch.ones(2, 5, dtype=torch.long)})
    assert counting.report(100.0, whole_run=False) == {}


def counting_of(model) -> Utilisation:
    args = SimpleNamespace(device=torch.device("cpu"))
    accelerator = SimpleNamespace(unwrap_model=lambda m: m)
    return Utilisation(SimpleNamespace(model=model, args=args, accelerator=accelerator))


def test_counting_reads_nothing_from_the_device(known_card):
    """Tensors on the meta device have no numbers: what asks for one raises."""
    counting = counting_of(tiny_model())
    ids = torch.ones(1, 40, dtype=torch.long, device="meta")
    with pytest.raises(RuntimeError):
        ids.sum().item()
    counting.add({"input_ids": ids})
    counting.add({"input_ids": ids, "position_ids": ids})


def test_packed_rows_count_their_documents(known_card):
    model = tiny_model()
    cost = arithmetic(text_config(), trained=trained(model, text_config()).own)
    counting = counting_of(model)
    ids = torch.ones(1, 40, dtype=torch.long)
    positions = torch.cat([torch.arange(30), torch.arange(10)])[None]
    counting.add({"input_ids": ids, "position_ids": positions})
    mfu = counting.report(1000.0, whole_run=False)["mfu"]
    expected = (cost.rows(1, 30) + cost.rows(1, 10)) / 40 * 1000 / (SOME_CARD * 1e12)
    assert mfu == pytest.approx(expected, rel=1e-4)
    assert counting.report(1000.0, whole_run=False) == {}  # nothing since
    assert counting.report(1000.0, whole_run=True)["mfu"] == mfu


@pytest.mark.gpu
def test_on_a_card_no_step_waits_for_the_count():
    if peak_tflops(torch.cuda.get_device_name()) is None:
        pytest.skip(f"no peak is known for {torch.cuda.get_device_name()}")
    model = tiny_model().cuda()
    args = SimpleNamespace(device=torch.device("cuda"))
    accelerator = SimpleNamespace(unwrap_model=lambda m: m)
    counting = Utilisation(SimpleNamespace(model=model, args=args, accelerator=accelerator))
    ids = torch.ones(1, 40, dtype=torch.long, device="cuda")
    positions = torch.arange(40, device="cuda")[None]
    torch.cuda.set_sync_debug_mode("error")
    try:
        counting.add({"input_ids": ids})
        counting.add({"input_ids": ids, "position_ids": positions})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counting.report(1e9, whole_run=False)["mfu"] > 0
