"""The options that people mix: adapters, weights, trainers and batches, each with each.

One optimizer step of real trainers, stock beside applied: same seeds, same tokens, gradients
compared. What the package leaves to PEFT or Transformers has to be in the report.
"""

from __future__ import annotations

import copy
import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from tokenizers import pre_tokenizers
from torch.utils.checkpoint import CheckpointError
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import gemma_accel
from gemma_accel.memory import HEAD_TILE, Arrangement, Mode
from gemma_accel.models import base_model, text_model
from tests.test_callback import Grab, collate, tokenizer
from tests.tiny import LANGUAGE, tiny_model

pytestmark = pytest.mark.usefixtures("references", "trl_on_the_cpu", "quick_collections")


# ---- what is combined

ADAPTERS = {
    "full": None,
    "lora": {},
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
    "dropout": dict(lora_dropout=0.2),
    "modules_to_save": dict(modules_to_save=["embed_tokens_per_layer", "post_attention_layernorm"]),
    "several": {},
    "trainable tokens": dict(trainable_token_indices=[5, 9, 17, 40]),
}
WEIGHTS = {
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "8-bit": BitsAndBytesConfig(load_in_8bit=True),
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
TRAININGS = ("SFT padded", "SFT packed", "DPO", "GRPO", "Trainer padded", "Trainer packed")
"""TRL's DPO has no packing (its ``padding_free`` is switched off), and GRPO never had."""


FAILS_IN_STOCK = {
    # quantised weights are not trained themselves
    ("full", "nf4", "*"): "purely quantized",
    ("full", "8-bit", "*"): "purely quantized",
    # TRL's head reads `lm_head.bias`, which PEFT's wrapper of a tied embedding has not
    ("trainable tokens", "*", "SFT"): "bias",
    ("trainable tokens", "*", "DPO"): "bias",
    ("trainable tokens", "*", "GRPO"): "bias",
    # the reference's forward leaves one adapter active, with which the layers are then recomputed
    ("several", "*", "DPO"): "number of tensors",
    # PEFT dequantises for the norm of the weights after bitsandbytes has let go of their scales
    ("dora", "8-bit", "SFT"): "unsqueeze",
    ("dora", "8-bit", "DPO"): "unsqueeze",
    ("dora", "8-bit", "GRPO"): "unsqueeze",
}
"""What stock PEFT, TRL and Transformers cannot do, and a word of what they say."""


def goes_together(adapter, weights, training):
    keys = itertools.product((adapter,), ("*", weights), ("*", training.split()[0]))
    return not any(key in FAILS_IN_STOCK for key in keys)


def combinations():
    """A combination for every pair of values of two axes that go together; greedily few."""
    product = [c for c in itertools.product(ADAPTERS, WEIGHTS, TRAININGS) if goes_together(*c)]

    def pairs(combination):
        return set(itertools.combinations(enumerate(combination), 2))

    open_pairs = set().union(*map(pairs, product))
    chosen = []
    while open_pairs:
        best = max(product, key=lambda c: len(pairs(c) & open_pairs))
        chosen.append(best)
        open_pairs -= pairs(best)
    return chosen


COMBINATIONS = combinations()

LEFT_TO_PEFT = {
    "dora": "the adapter is a LoRA variant (DoRA, aLoRA, ...)",
    "dropout": "lora_dropout is 0.2",
    "several": "several adapters are active at once",
}
LEFT_TO_BNB = "Linear8bitLt is quantised in a way the fused step does not read"


# ---- models

SMALL = dict(
    towers=False,
    num_hidden_layers=3,
    num_kv_shared_layers=1,
    layer_types=["sliding_attention", "full_attention", "full_attention"],
    hidden_size_per_layer_input=64,  # bitsandbytes' CPU decoder is wrong at narrower ones
    head_dim=32,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of values that bfloat16 holds, so that every dtype starts from the same weights."""
    folder = tmp_path_factory.mktemp("options") / "model"
    model = tiny_model("conditional", dtype=torch.bfloat16, **SMALL).float()
    for name, parameter in model.named_parameters():
        if "q_norm" in name:  # sharp attention would make much of the last bits
            parameter.data *= 0.25
    model.save_pretrained(folder)
    return str(folder)


def load(checkpoint, weights, dtype=None):
    kind = WEIGHTS[weights]
    if isinstance(kind, torch.dtype):
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype or kind)
    else:
        kind = copy.deepcopy(kind)
        if kind.load_in_4bit and dtype is not None:
            kind.bnb_4bit_compute_dtype = dtype
        model = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=dtype or torch.bfloat16, quantization_config=kind
        )
    return model.train()


def adapt(model, adapter):
    options = ADAPTERS[adapter]
    if options is None:
        return model
    config = LoraConfig(r=4, target_modules=LANGUAGE, init_lora_weights=False, **options)
    torch.manual_seed(1)
    peft = get_peft_model(model, copy.deepcopy(config))
    if adapter == "several":
        peft.add_adapter("second", copy.deepcopy(config))
        peft.base_model.set_adapter(["default", "second"])
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.25
    return peft


# ---- trainers

LENGTHS = (23, 9, 14, 5)


def rows():
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, 140, (n,), generator=generator) for n in LENGTHS]
    return [{"input_ids": x, "labels": x, "attention_mask": torch.ones_like(x)} for x in ids]


def word_tokenizer():
    words = tokenizer()
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return words


def words(ids):
    return " ".join(f"w{i}" for i in ids)


def sum_reward(completions, completion_ids, **kwargs):
    return [float(sum(ids) % 17) for ids in completion_ids]


def fixed_completions(prompt_ids, *args, **kwargs):
    """In the place of sampling, which a last bit could send another way."""
    generator = torch.Generator().manual_seed(7)
    sizes = [3 + i % 4 for i in range(len(prompt_ids))]
    return [torch.randint(3, 140, (n,), generator=generator).tolist() for n in sizes], None


def build(training, model, *, data=None, evaluates=False, **changes):
    """A trainer of the kind, and the callback that keeps its first gradient."""
    grab = Grab()
    name, _, form = training.partition(" ")
    common = dict(
        output_dir="out",
        per_device_train_batch_size=4,
        max_steps=1,
        optim="sgd",
        learning_rate=1e-6,
        max_grad_norm=0.0,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=name != "Trainer",
    )
    common |= changes
    given = dict(model=model, processing_class=word_tokenizer(), callbacks=[grab])
    texts = [words(row["input_ids"].tolist()) for row in rows()]
    if name == "SFT":
        ids = [{"input_ids": row["input_ids"].tolist()} for row in rows()]
        args = SFTConfig(max_length=32, packing=form == "packed", **common)
        data = data or Dataset.from_list(ids)
        return SFTTrainer(args=args, train_dataset=data, **given), grab
    if name == "DPO":
        pairs = [{"prompt": "w5 w6", "chosen": t, "rejected": f"{t} w9 w7"} for t in texts]
        data = Dataset.from_list(pairs)
        return DPOTrainer(args=DPOConfig(**common), train_dataset=data, **given), grab
    if name == "GRPO":
        args = GRPOConfig(num_generations=2, max_completion_length=8, beta=0.1, **common)
        data = Dataset.from_list([{"prompt": text} for text in texts])
        trainer = GRPOTrainer(args=args, train_dataset=data, reward_funcs=sum_reward, **given)
        trainer._generate_single_turn = fixed_completions
        return trainer, grab
    packed = form == "packed"
    data = data or [
        {k: v for k, v in row.items() if not (packed and k == "attention_mask")} for row in rows()
    ]
    trainer = Trainer(
        args=TrainingArguments(remove_unused_columns=False, **common),
        train_dataset=data,
        eval_dataset=data[:2] if evaluates else None,
        data_collator=flatten if packed else pad,
        **given,
    )
    return trainer, grab


def flatten(batch):
    return DataCollatorWithFlattening()([{k: v.tolist() for k, v in row.items()} for row in batch])


def pad(batch):
    return collate([{k: torch.as_tensor(v) for k, v in row.items()} for row in batch])


def gradient(checkpoint, adapter, weights, training, *, applied, dtype=None):
    """The first step's gradient, all in one vector, by stock or applied; and the report."""
    model = adapt(load(checkpoint, weights, dtype), adapter)
    report = gemma_accel.apply(model, vram_gib=1.0) if applied else None
    trainer, grab = build(training, model)
    if applied and trainer.args.gradient_checkpointing:
        policy = text_model(base_model(model)).memory
        policy.forced = Arrangement(
            [Mode.OFFLOAD, Mode.RECOMPUTE, Mode.KEEP], graphed=False, head_tile=HEAD_TILE
        )
    torch.manual_seed(3)
    trainer.train()
    return {n: g.double() for n, g in grab.gradient.items()}, report


@functools.cache
def stock_gradient(*case, dtype=None):
    return gradient(*case, applied=False, dtype=dtype)[0]


def error(ours, truth):
    """Norm of the difference of all gradients over the norm of the true ones."""
    assert ours.keys() == truth.keys() and truth
    difference = sum((ours[n] - truth[n]).norm() ** 2 for n in truth)
    return (difference / sum(truth[n].norm() ** 2 for n in truth)).sqrt().item()


@pytest.mark.parametrize(
    "adapter, weights, training", COMBINATIONS, ids=[" ".join(c) for c in COMBINATIONS]
)
def test_gradients_are_stocks(checkpoint, adapter, weights, training):
    """In float32 to the last bits. In other dtypes against the float32 gradient of the same
    (quantised) weights, from which stock has a distance of its own: ours may be as far, and half
    as far again, for being one other draw of rounding errors.
    """
    ours, report = gradient(checkpoint, adapter, weights, training, applied=True)
    stock = stock_gradient(checkpoint, adapter, weights, training)
    if weights == "fp32":
        assert error(ours, stock) < 3e-5
    else:
        of = "fp32" if isinstance(WEIGHTS[weights], torch.dtype) else weights
        truth = stock_gradient(checkpoint, adapter, of, training, dtype=torch.float32)
        assert error(stock, truth) < 0.1  # else the comparison would say nothing
        assert error(ours, truth) <= 1.5 * error(stock, truth)
    reasons = {record.reason for record in report.skipped if record.patch == "lora"}
    expected = {LEFT_TO_PEFT.get(adapter)} - {None}
    assert reasons == ({LEFT_TO_BNB} if weights == "8-bit" else expected)


def test_what_the_combinations_cover():
    """Every value twice and more, every pair of two axes' values once, but what stock cannot do."""
    for axis, values in enumerate((ADAPTERS, WEIGHTS, TRAININGS)):
        for value in values:
            assert sum(c[axis] == value for c in COMBINATIONS) >= 2
    left_out = {
        (adapter, weights)
        for adapter, weights in itertools.product(ADAPTERS, WEIGHTS)
        if not any(c[:2] == (adapter, weights) for c in COMBINATIONS)
    }
    assert left_out == {("full", "nf4"), ("full", "8-bit")}
    for batch in ("padded", "packed"):
        assert sum(c[2].endswith(batch) for c in COMBINATIONS) >= 2
    assert len(set(COMBINATIONS)) == len(COMBINATIONS)


@pytest.mark.parametrize("case", FAILS_IN_STOCK, ids=" ".join)
def test_what_does_not_go_together_fails_in_stock(checkpoint, case):
    adapter, weights, training = case
    weights = "fp32" if weights == "*" else weights
    training = {"*": "Trainer padded", "SFT": "SFT padded"}.get(training, training)
    with pytest.raises((ValueError, AttributeError, CheckpointError), match=FAILS_IN_STOCK[case]):
        gradient(checkpoint, adapter, weights, training, applied=False)


def test_four_bits_that_compute_in_another_dtype_are_reported(checkpoint):
    """bitsandbytes computes in float32 unless told: a bfloat16 model's projections are then left to
    it, correct and slow.
    """
    kind = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=torch.bfloat16, quantization_config=kind
    )
    model = adapt(model.train(), "lora")
    report = gemma_accel.apply(model)
    build("Trainer padded", model)
    assert any("compute_dtype" in record.reason for record in report.skipped)


# ---- other options, a few steps each


def steps(checkpoint, training, applied, *, adapter="lora", data=None, steps=3, **changes):
    """Losses, evaluations and the trained weights at the end."""
    model = adapt(load(checkpoint, "fp32"), adapter)
    report = gemma_accel.apply(model) if applied else None
    changes = dict(max_steps=steps, learning_rate=0.05, logging_steps=1) | changes
    evaluates = "eval_strategy" in changes
    trainer, _ = build(training, model, data=data, evaluates=evaluates, **changes)
    trainer.train()
    history = trainer.state.log_history
    logged = [row[key] for row in history for key in ("loss", "eval_loss") if key in row]
    trained = {n: p.detach().double() for n, p in model.named_parameters() if p.requires_grad}
    return SimpleNamespace(logged=logged, trained=trained, report=report, trainer=trainer)


def assert_same_course(stock, ours):
    assert ours.logged == pytest.approx(stock.logged, rel=1e-5)
    assert error(ours.trained, stock.trained) < 1e-5


@pytest.mark.parametrize("training", ["SFT packed", "Trainer padded"])
def test_neftune(checkpoint, training):
    plain, stock, ours = (
        steps(checkpoint, training, applied, neftune_noise_alpha=alpha)
        for applied, alpha in ((False, None), (False, 20.0), (True, 20.0))
    )
    assert_same_course(stock, ours)
    assert stock.logged != pytest.approx(plain.logged, rel=1e-4)


@pytest.mark.parametrize("adapter", ["full", "lora", "modules_to_save"])
def test_load_best_model_at_end(checkpoint, adapter):
    """The best is told to be the worst, which is the first: it has to be loaded back."""
    stock, ours = (
        steps(
            checkpoint,
            "Trainer padded",
            applied,
            adapter=adapter,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,
            output_dir="ours" if applied else "stock",
        )
        for applied in (False, True)
    )
    assert_same_course(stock, ours)
    assert len(ours.logged) == 6
    assert ours.trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    again = ours.trainer.evaluate()["eval_loss"]
    assert again == pytest.approx(ours.logged[1], rel=1e-6) and again != ours.logged[-1]


@pytest.mark.parametrize("training", ["SFT padded", "Trainer padded"])
def test_streaming(checkpoint, training):
    def stream():
        for row in rows():
            row = {k: v.tolist() for k, v in row.items()}
            yield row if training.startswith("Trainer") else {"input_ids": row["input_ids"]}

    stock, ours = (
        steps(checkpoint, training, applied, data=IterableDataset.from_generator(stream))
        for applied in (False, True)
    )
    assert_same_course(stock, ours)


@pytest.mark.parametrize("training", ["SFT packed", "Trainer padded"])
def test_dataloader_workers(checkpoint, training):
    stock, ours = (
        steps(
            checkpoint,
            training,
            applied,
            dataloader_num_workers=2 if applied else 0,
            dataloader_persistent_workers=applied,
            per_device_train_batch_size=1,
        )
        for applied in (False, True)
    )
    assert_same_course(stock, ours)
