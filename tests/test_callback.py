"""Gradient accumulation: a step's gradient is that of the mean over its labelled tokens."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import gemma_accel
import gemma_accel.callback as callback_module
from gemma_accel.accumulation import accept_loss_kwargs, steps_by_itself
from gemma_accel.callback import GradientAccumulationCallback
from gemma_accel.report import Report
from tests.tiny import VOCAB, tiny_model

pytestmark = pytest.mark.usefixtures("references", "trl_on_the_cpu")

LABELLED = (3, 60, 8, 40)
"""Tokens that each of the four rows contributes to the loss."""

SMALL = dict(
    towers=False,
    hidden_size=32,
    intermediate_size=64,
    hidden_size_per_layer_input=8,
    num_hidden_layers=3,
    num_kv_shared_layers=1,
    layer_types=["sliding_attention", "full_attention", "full_attention"],
)


# ---- what is trained on, and the truth


def rows():
    """Prompt and completion; the second row's first token is labelled, and predicted by none."""
    generator = torch.Generator().manual_seed(5)
    out = []
    for index, labelled in enumerate(LABELLED):
        prompt = 1 if index == 1 else 2 + index
        ids = torch.randint(3, VOCAB - 10, (prompt + labelled,), generator=generator)
        labels = ids.clone()
        labels[: 0 if index == 1 else prompt] = -100
        out.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return out


def collate(batch):
    padding = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        key: torch.nn.utils.rnn.pad_sequence([row[key] for row in batch], True, value)
        for key, value in padding.items()
    }


def model_of(kind, lora=False):
    model = tiny_model(kind, **SMALL)
    if lora:
        torch.manual_seed(1)
        config = LoraConfig(
            r=4,
            init_lora_weights=False,
            target_modules=r".*layers\..*\.(q_proj|v_proj|down_proj)",
        )
        model = get_peft_model(model, config)
    return model


def token_losses(logits, labels):
    """The loss of each token, zero where there is no label."""
    logits, labels = logits[..., :-1, :].float(), labels[..., 1:]
    losses = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="none"
    )
    return losses.view(labels.shape)


@functools.cache
def true_gradient(kind, lora, loss_type="nll"):
    model, batch = model_of(kind, lora), collate(rows())
    losses = token_losses(
        model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"]
    )
    if loss_type == "dft":
        losses = losses * (-losses).exp().detach()
    (losses.sum() / sum(LABELLED)).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


class Grab(TrainerCallback):
    """Keeps the first optimizer step's gradient."""

    def __init__(self):
        self.gradient = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradient is None:
            self.gradient = {
                n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
            }


def arguments(cls=TrainingArguments, size=1, steps=4, **changes):
    return cls(
        **{
            **dict(
                output_dir="out",
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                max_steps=1,
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                optim="sgd",
                max_grad_norm=0.0,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                disable_tqdm=True,
                remove_unused_columns=False,
            ),
            **changes,
        }
    )


def tokenizer():
    words = {f"w{i}": i for i in range(VOCAB - 10)} | {"<unk>": VOCAB - 10}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="w0",
        eos_token="w1",
        bos_token="w2",
    )


def build(cls, model, size=1, steps=4, loss_type="nll", callbacks=(), options=None, **changes):
    """A trainer of ``cls`` on the four rows, and the callback that keeps its gradient."""
    grab = Grab()
    common = dict(
        model=model,
        train_dataset=rows(),
        data_collator=collate,
        callbacks=[*callbacks, grab],
        **(options or {}),
    )
    if issubclass(cls, SFTTrainer):
        from datasets import Dataset

        common["train_dataset"] = Dataset.from_list(
            [{k: v.tolist() for k, v in row.items()} for row in rows()]
        ).with_format("torch")
        args = arguments(
            SFTConfig,
            size,
            steps,
            loss_type=loss_type,
            dataset_kwargs={"skip_prepare_dataset": True},
            **changes,
        )
        return cls(args=args, processing_class=tokenizer(), **common), grab
    return cls(args=arguments(TrainingArguments, size, steps, **changes), **common), grab


def train(trainer, grab, **kwargs):
    trainer.train(**kwargs)
    return grab.gradient


def attached(trainer, report=None):
    GradientAccumulationCallback().attach(trainer, report=report)
    return trainer


def error(gradient, truth):
    """Norm of the difference of all gradients over the norm of the true ones."""
    assert gradient.keys() == truth.keys() and truth
    difference = sum((gradient[n].double() - truth[n].double()).norm() ** 2 for n in truth) ** 0.5
    return (difference / sum(truth[n].double().norm() ** 2 for n in truth) ** 0.5).item()


# ---- the library's own losses


@pytest.mark.parametrize("size, steps", [(1, 4), (2, 2)])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["causal", "conditional"])
@pytest.mark.parametrize(
    "cls, loss_type", [(Trainer, "nll"), (SFTTrainer, "nll"), (SFTTrainer, "dft")]
)
def test_every_token_weighs_the_same(cls, loss_type, kind, lora, size, steps):
    trainer, grab = build(cls, model_of(kind, lora), size, steps, loss_type)
    gradient = train(attached(trainer), grab)
    assert error(gradient, true_gradient(kind, lora, loss_type)) < 1e-4


@pytest.mark.parametrize("cls", [Trainer, SFTTrainer])
def test_without_it_they_do_not(cls):
    """The control: what the tests here measure goes wrong in stock."""
    trainer, grab = build(cls, model_of("conditional"))
    assert error(train(trainer, grab), true_gradient("conditional", False)) > 0.3


def test_label_smoothing_and_the_logged_loss_follow_the_tokens():
    losses = []
    for size, steps in ((4, 1), (1, 4)):
        trainer, _ = build(
            Trainer, model_of("conditional"), size, steps, label_smoothing_factor=0.1
        )
        attached(trainer).train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_attaching_twice_or_beside_another_changes_nothing_more():
    trainer, grab = build(Trainer, model_of("conditional"))
    first = GradientAccumulationCallback()
    report = Report()
    first.attach(trainer, report=report)
    first.attach(trainer)
    attached(trainer)
    ours = [
        c for c in trainer.callback_handler.callbacks if isinstance(c, GradientAccumulationCallback)
    ]
    assert len(ours) == 1 and ours[0]._report is report
    assert error(train(trainer, grab), true_gradient("conditional", False)) < 1e-4


def test_the_trainer_has_its_own_methods_again_after_training():
    trainer, _ = build(
        Trainer, model_of("conditional"), options=dict(compute_loss_func=token_mean_loss)
    )
    before = dict(vars(trainer))
    attached(trainer).train()
    for name in ("training_step", "log", "compute_loss"):
        assert name not in before and name not in vars(trainer)


def test_a_wrapper_that_came_later_stays():
    trainer, grab = build(Trainer, model_of("conditional"))

    class Late(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            inner = trainer.log
            trainer.log = lambda *a, **k: inner(*a, **k)

    attached(trainer).add_callback(Late())
    trainer.train()
    assert "log" in vars(trainer) and "training_step" not in vars(trainer)


def test_accept_loss_kwargs_and_its_undo():
    conditional, causal = model_of("conditional"), model_of("causal")
    undo = accept_loss_kwargs(conditional)
    assert conditional.accepts_loss_kwargs and not type(conditional).accepts_loss_kwargs
    again = accept_loss_kwargs(conditional)
    again()
    assert conditional.accepts_loss_kwargs  # somebody else's True is not ours to take back
    undo()
    assert "accepts_loss_kwargs" not in vars(conditional)
    accept_loss_kwargs(causal)()
    assert not hasattr(causal, "accepts_loss_kwargs")


# ---- losses of the user's own


def token_mean_loss(outputs, labels, num_items_in_batch=None):
    losses = token_losses(outputs.logits, labels)
    return losses.sum() / (labels[..., 1:] != -100).sum()


def honest_loss(outputs, labels, num_items_in_batch=None):
    items = num_items_in_batch
    return token_losses(outputs.logits, labels).sum() / (
        (labels[..., 1:] != -100).sum() if items is None else items
    )


def by_value_loss(outputs, labels, num_items_in_batch):
    return token_losses(outputs.logits, labels).sum() / float(num_items_in_batch)


def row_mean_loss(outputs, labels, num_items_in_batch=None):
    losses, counts = token_losses(outputs.logits, labels), (labels[..., 1:] != -100).sum(-1)
    return (losses.sum(-1) / counts.clamp(min=1)).mean()


def mixed_loss(outputs, labels, num_items_in_batch=None):
    return (
        honest_loss(outputs, labels, num_items_in_batch)
        + token_mean_loss(outputs, labels)
        + outputs.logits.pow(2).mean()
    )


def overriding(function, base=Trainer, **attributes):
    """A trainer class whose `compute_loss` is the user's, as ``compute_loss_func`` is."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = function(outputs, labels, num_items_in_batch=num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    return type("Overriding", (base,), {"compute_loss": compute_loss, **attributes})


def own_loss_trainer(how, function, kind="conditional", **changes):
    if how == "compute_loss_func":
        return build(Trainer, model_of(kind), options=dict(compute_loss_func=function), **changes)
    return build(overriding(function), model_of(kind), **changes)


WAYS = ["compute_loss_func", "override"]


@pytest.mark.parametrize("size, steps", [(1, 4), (2, 2)])
@pytest.mark.parametrize("kind", ["causal", "conditional"])
@pytest.mark.parametrize("how", WAYS)
def test_a_token_mean_is_proven_and_weighed(how, kind, size, steps, caplog):
    trainer, grab = own_loss_trainer(how, token_mean_loss, kind, size=size, steps=steps)
    report = Report()
    gradient = train(attached(trainer, report), grab)
    assert error(gradient, true_gradient(kind, False)) < 1e-4
    assert "weighed by their tokens" in caplog.text
    assert "weighed by their tokens" in report.notes["gradient accumulation"]


@pytest.mark.parametrize("how", WAYS)
def test_without_it_a_token_mean_is_too_large(how):
    trainer, grab = own_loss_trainer(how, token_mean_loss, "causal")
    assert error(train(trainer, grab), true_gradient("causal", False)) > 1


@pytest.mark.parametrize("function", [honest_loss, by_value_loss])
@pytest.mark.parametrize("how", WAYS)
def test_a_loss_that_honours_the_count_is_left_alone(how, function, recwarn):
    trainer, grab = own_loss_trainer(how, function)
    gradient = train(attached(trainer), grab)
    assert error(gradient, true_gradient("conditional", False)) < 1e-4
    assert not [w for w in recwarn if "num_items_in_batch" in str(w.message)]


def mean_of_micro_batches(function, kind="conditional"):
    """The gradient of the mean of the micro-batches' losses."""
    model = model_of(kind)
    for row in rows():
        batch = collate([row])
        labels = batch.pop("labels")
        (function(model(**batch), labels) / len(LABELLED)).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def squared_mean_loss(outputs, labels, num_items_in_batch=None):
    return token_mean_loss(outputs, labels) ** 2


@pytest.mark.parametrize("how", WAYS)
def test_another_mean_gets_the_right_scale_and_a_warning(how):
    trainer, grab = own_loss_trainer(how, squared_mean_loss)
    with pytest.warns(UserWarning, match="does not show to be a mean over tokens") as caught:
        gradient = train(attached(trainer), grab)
    assert any("loss_is_scaled_for_ga = False" in str(w.message) for w in caught)
    assert error(gradient, mean_of_micro_batches(squared_mean_loss)) < 1e-4


def test_a_mean_of_row_means_is_not_taken_for_a_token_mean():
    trainer, _ = own_loss_trainer("compute_loss_func", row_mean_loss, size=2, steps=2)
    with pytest.warns(UserWarning, match="does not show to be a mean over tokens"):
        attached(trainer).train()


@pytest.mark.parametrize("how", WAYS)
def test_what_cannot_be_proven_is_left_as_stock_leaves_it_with_a_warning(how):
    stock, grab = own_loss_trainer(how, mixed_loss)
    expected = train(stock, grab)
    trainer, grab = own_loss_trainer(how, mixed_loss)
    accept_loss_kwargs(trainer.model)
    with pytest.warns(UserWarning, match="neither follows num_items_in_batch nor ignores it"):
        gradient = train(attached(trainer), grab)
    assert error(gradient, expected) < 1e-6


def test_a_loss_that_cannot_be_tried_out_is_reported(caplog):
    calls = []

    def fussy(outputs, labels, num_items_in_batch):
        calls.append(num_items_in_batch)
        if num_items_in_batch != sum(LABELLED):
            raise RuntimeError("not this number")
        return honest_loss(outputs, labels, num_items_in_batch)

    trainer, grab = own_loss_trainer("compute_loss_func", fussy)
    with pytest.warns(UserWarning, match="left as it is"):
        gradient = train(attached(trainer), grab)
    assert "not this number" in caplog.text and len(calls) == 6
    assert error(gradient, true_gradient("conditional", False)) < 1e-4


def test_an_override_that_asks_the_model_and_one_that_asks_super():
    class AsksModel(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    class AsksSuper(SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    class ForgetsTheCount(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, return_outputs)

    truth = true_gradient("conditional", False)
    for cls in (AsksModel, AsksSuper, ForgetsTheCount):
        trainer, grab = build(cls, model_of("conditional"))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            gradient = train(attached(trainer), grab)
        assert error(gradient, truth) < 1e-4, cls.__name__
    expected, _ = build(SFTTrainer, model_of("conditional"))
    expected.train()
    tokens = [t.state.log_history[0]["num_tokens"] for t in (trainer, expected)]
    assert tokens[0] == tokens[1]  # trying the loss out leaves TRL's counters alone


TWO_PROCESSES = """
from tests import trl_on_cpu
from tests.leave import leave
from tests.test_callback import *
trl_on_cpu.install()
for cls, function in (
    (Trainer, None), (SFTTrainer, None), (Trainer, token_mean_loss), (Trainer, honest_loss),
    (Trainer, by_value_loss), (overriding(token_mean_loss), None), (overriding(honest_loss), None),
):
    options = dict(compute_loss_func=function) if function else None
    trainer, grab = build(cls, model_of("conditional"), 1, 2, options=options)
    value = error(train(attached(trainer), grab), true_gradient("conditional", False))
    assert value < 1e-4, (cls, function, value)
    print("exact", flush=True)
leave()
"""


@pytest.mark.slow
def test_two_processes_weigh_all_their_tokens_the_same(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            script,
        ],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("exact") == 14


@pytest.mark.parametrize("scaled", [True, False])
def test_a_declared_scale_is_trusted(scaled):
    function = honest_loss if scaled else token_mean_loss
    cls = overriding(function, loss_is_scaled_for_ga=scaled)
    trainer, grab = build(cls, model_of("causal"))
    gradient = train(attached(trainer), grab)
    expected = (
        true_gradient("causal", False)
        if scaled
        else mean_of_micro_batches(token_mean_loss, "causal")
    )
    assert error(gradient, expected) < 1e-4


def test_a_micro_batch_without_labels_adds_nothing():
    def without(batch):
        out = collate(batch)
        if int((out["labels"] != -100).sum()) == LABELLED[0]:
            out["labels"][:] = -100
        return out

    trainer, grab = own_loss_trainer(
        "compute_loss_func", token_mean_loss, logging_nan_inf_filter=False
    )
    trainer.data_collator = without
    gradient = train(attached(trainer), grab)
    assert all(g.isfinite().all() for g in gradient.values())
    model = model_of("conditional")
    batch = without(rows()) | {"labels": collate(rows())["labels"]}
    batch["labels"][0] = -100
    losses = token_losses(
        model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"]
    )
    loss = losses.sum() / sum(LABELLED[1:])
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert error(gradient, {n: p.grad for n, p in model.named_parameters()}) < 1e-4


def test_dropout_draws_the_numbers_that_it_would_have_drawn():
    gradients = []
    for function, callback in ((honest_loss, False), (honest_loss, True)):
        model = model_of("causal")
        model.model.layers[0].mlp.register_forward_hook(
            lambda module, args, out: F.dropout(out, 0.3, module.training)
        )
        trainer, grab = build(Trainer, model, options=dict(compute_loss_func=function))
        gradients.append(train(attached(trainer) if callback else trainer, grab))
    assert error(*gradients) == 0


# ---- trainers with a normalisation of their own


def preference_trainer():
    from datasets import Dataset

    data = [
        {"prompt": "w5 w6", "chosen": " ".join(f"w{i + n}" for i in range(n)), "rejected": "w9 w8"}
        for n in LABELLED
    ]
    grab = Grab()
    trainer = DPOTrainer(
        model=model_of("conditional", lora=True),
        args=arguments(DPOConfig, remove_unused_columns=True),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer(),
        callbacks=[grab],
    )
    return trainer, grab


def test_dpo_is_not_disturbed():
    gradients = []
    for callback in (False, True):
        trainer, grab = preference_trainer()
        accepted = trainer.model_accepts_loss_kwargs
        if callback:
            attached(trainer)
        gradients.append(train(trainer, grab))
        assert trainer.model_accepts_loss_kwargs == accepted
    assert error(*gradients) == 0


# ---- what it says


def test_alone_in_callbacks_it_warns_and_names_the_remedy():
    trainer, _ = build(Trainer, model_of("conditional"), callbacks=[GradientAccumulationCallback()])
    with pytest.warns(UserWarning, match=r"was not given its trainer.*gemma_accel.apply\(model\)"):
        trainer.train()


@pytest.mark.parametrize("kind, steps", [("causal", 4), ("conditional", 1)])
def test_alone_in_callbacks_it_is_silent_where_nothing_is_wrong(kind, steps, recwarn):
    trainer, _ = build(
        Trainer, model_of(kind), steps=steps, callbacks=[GradientAccumulationCallback()]
    )
    trainer.train()
    assert not [w for w in recwarn if "micro-batch" in str(w.message)]


def test_batches_without_labels_are_reported():
    class Counts(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            assert num_items_in_batch is None
            return model(input_ids=inputs["input_ids"], labels=inputs["targets"]).loss

    trainer, _ = build(Counts, model_of("conditional"))
    trainer.data_collator = lambda batch: {
        {"labels": "targets"}.get(k, k): v for k, v in collate(batch).items()
    }
    with pytest.warns(UserWarning, match="carry no 'labels'"):
        attached(trainer).train()


def test_a_count_that_is_not_the_labels_is_reported():
    class Miscounts(Trainer):
        def get_batch_samples(self, *args):
            batches, items = super().get_batch_samples(*args)
            return batches, items + 1

    trainer, _ = build(Miscounts, model_of("conditional"))
    with pytest.warns(UserWarning, match=f"{sum(LABELLED) + 1} tokens.*hold {sum(LABELLED)}"):
        attached(trainer).train()


def test_processes_that_average_for_themselves_are_reported(monkeypatch):
    trainer, _ = build(Trainer, model_of("conditional"), average_tokens_across_devices=False)
    attached(trainer)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    callback = trainer.callback_handler.callbacks[-1]
    with pytest.warns(UserWarning, match="average_tokens_across_devices=False"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)


# ---- the logs, the report, resuming


class Reporter(TrainerCallback):
    """Stands where TensorBoard's callback stands: before the others."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.mark.parametrize("cls", [Trainer, SFTTrainer])
def test_telemetry_reaches_the_history_and_the_reporters(cls, monkeypatch):
    monkeypatch.setattr(callback_module, "_gpu_peak", lambda device: {"gpu_peak_gib": 1.5})
    reporter = Reporter()
    trainer, _ = build(
        cls,
        model_of("conditional"),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        options=dict(eval_dataset=rows()[:1]),
        callbacks=[reporter],
    )
    output = attached(trainer).train()
    for logs in (trainer.state.log_history, reporter.seen):
        training = [entry for entry in logs if "loss" in entry]
        evaluation = [entry for entry in logs if "eval_loss" in entry]
        assert len(training) == 2 and len(evaluation) == 2
        assert all(e["gpu_peak_gib"] == 1.5 and e["tokens_per_second"] > 0 for e in training)
        assert not any("tokens_per_second" in entry for entry in evaluation)
        assert "tokens_per_second" in logs[-1]
    assert output.metrics["tokens_per_second"] > 0


def test_without_a_card_there_is_no_peak():
    trainer, _ = build(Trainer, model_of("conditional"))
    attached(trainer).train()
    assert "tokens_per_second" in trainer.state.log_history[0]
    assert "gpu_peak_gib" not in trainer.state.log_history[0]


def test_tokens_are_those_of_the_inputs_and_pauses_do_not_count(monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(callback_module.time, "perf_counter", lambda: float(next(clock)))
    pace = callback_module._Pace()  # 0
    pace.begin()  # 10
    pace.tokens += 600
    pace.step_ended()  # 20
    assert pace.report(whole_run=False) == {"tokens_per_second": 30.0}  # 30
    pace.leave_out()  # 40: an evaluation of ten seconds
    pace.tokens += 100
    assert pace.report(whole_run=False) == {"tokens_per_second": 10.0}  # 50
    assert pace.report(whole_run=True) == {"tokens_per_second": 17.5}  # 60


def written_report(step):
    return json.loads(Path(f"out/checkpoint-{step}/gemma_accel_report.json").read_text())


def test_the_report_lies_in_each_checkpoint_and_training_resumes():
    report = Report()
    options = dict(save_strategy="steps", save_steps=1, max_steps=2)
    trainer, grab = build(Trainer, model_of("conditional"), **options)
    attached(trainer, report).train()
    for step in (1, 2):
        written = written_report(step)
        assert "weighs the same" in written["notes"]["gradient accumulation"]
    end = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}

    options["restore_callback_states_from_checkpoint"] = True
    resumed, _ = build(Trainer, model_of("conditional"), **options)
    attached(resumed, report).train(resume_from_checkpoint="out/checkpoint-1")
    assert resumed.state.global_step == 2
    assert resumed.state.log_history[-1]["tokens_per_second"] > 0
    assert error(dict(resumed.model.named_parameters()), end) < 1e-6


# ---- backward below the lowest adapter


def top_lora():
    torch.manual_seed(1)
    return get_peft_model(
        tiny_model("conditional", **SMALL),
        LoraConfig(r=4, target_modules=r".*layers\.2\.mlp\.down_proj", init_lora_weights=False),
    )


@pytest.mark.parametrize("cls", [Trainer, SFTTrainer])
def test_no_gradient_of_the_frozen_bottom_is_computed(cls):
    gradients, reached = [], []
    for report in (None, Report()):
        model = top_lora()
        trainer, grab = build(cls, model, gradient_checkpointing=True)
        below = model.get_base_model().model.language_model.layers[0]
        seen = []
        below.mlp.register_forward_hook(
            lambda module, args, out, seen=seen: seen.append(out.requires_grad)
        )
        hooks = []
        embedding = model.get_input_embeddings()
        trainer.add_callback(Hooks(embedding, hooks))
        gradients.append(train(attached(trainer, report), grab))
        reached.append(any(seen))
        assert (hooks[0] == 0) == (report is not None)
        assert len(embedding._forward_hooks) > 0  # as they were, after training
    assert reached == [True, False]
    assert "input gradients" in report.notes
    assert error(*gradients) == 0


def test_nor_on_an_applied_model():
    hooks, model = [], top_lora()
    report = gemma_accel.apply(model, vram_gib=1.0)
    trainer, _ = build(Trainer, model, gradient_checkpointing=True)
    trainer.add_callback(Hooks(model.get_input_embeddings(), hooks))
    trainer.train()
    assert hooks[0] == 0 and "input gradients" in report.notes


class Hooks(TrainerCallback):
    def __init__(self, module, counts):
        self.module, self.counts = module, counts

    def on_step_begin(self, *args, **kwargs):
        self.counts.append(len(self.module._forward_hooks))


def test_a_loss_that_counts_its_calls_counts_no_trials():
    class Loss:
        calls = 0

        def of(self, outputs, labels, num_items_in_batch=None):
            self.calls += 1
            logits = outputs.logits[:, :-1].flatten(0, 1).float()
            return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())

    counts = []
    for correct in (False, True):
        loss = Loss()
        options = {"compute_loss_func": loss.of}
        trainer, _ = build(Trainer, model_of("conditional"), options=options)
        (attached(trainer) if correct else trainer).train()
        counts.append(loss.calls)
    assert counts[0] == counts[1] > 1


class Saliency(Trainer):
    """Reads a gradient at the embeddings, for which the user has asked for one there."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        seen = []
        module = model.get_input_embeddings()
        handle = module.register_forward_hook(lambda *hook: seen.append(hook[-1]))
        loss = model(**inputs).loss
        handle.remove()
        seen[0].retain_grad()
        return loss


@pytest.mark.parametrize("how", ["own loss", "own hook"])
def test_gradients_at_the_embeddings_that_somebody_reads_are_there(how):
    import gemma_accel

    model = tiny_model("causal", **SMALL)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=r".*\.down_proj"))
    gemma_accel.apply(model)
    model.enable_input_require_grads()
    seen = []
    if how == "own hook":
        model.get_input_embeddings().register_forward_hook(
            lambda *hook: seen.append(hook[-1].requires_grad)
        )
    trainer, _ = build(Saliency if how == "own loss" else Trainer, model, steps=1)
    trainer.train()  # the loss of one's own would raise
    assert all(seen) and bool(seen) == (how == "own hook")


def test_reentrant_checkpointing_keeps_its_hooks():
    model = tiny_model("causal", **{**SMALL, "num_kv_shared_layers": 0})
    model = get_peft_model(model, LoraConfig(r=4, target_modules=r".*\.down_proj"))
    counts = []
    trainer, _ = build(
        Trainer,
        model,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
        callbacks=[Hooks(model.get_input_embeddings(), counts)],
    )
    attached(trainer, Report()).train()
    assert counts[0] > 0


# ---- by apply


@pytest.mark.parametrize("cls", [Trainer, SFTTrainer])
@pytest.mark.parametrize("built", ["before", "after"])
def test_a_trainer_of_an_applied_model_carries_it(cls, built):
    import gemma_accel

    model = model_of("conditional")
    if built == "after":
        report = gemma_accel.apply(model)
    trainer, grab = build(cls, model, save_strategy="steps", save_steps=1)
    if built == "before":
        report = gemma_accel.apply(model)
    try:
        assert error(train(trainer, grab), true_gradient("conditional", False)) < 1e-4
        assert trainer.state.log_history[0]["tokens_per_second"] > 0
        assert written_report(1)["applied"]
    finally:
        report.restore()


def test_a_callback_of_the_users_own_is_the_one_that_apply_attaches():
    import gemma_accel

    model = model_of("conditional", lora=True)
    report = gemma_accel.apply(model)
    try:
        callback = GradientAccumulationCallback()
        trainer, grab = build(SFTTrainer, model, callbacks=[callback])
        ours = [
            c
            for c in trainer.callback_handler.callbacks
            if isinstance(c, GradientAccumulationCallback)
        ]
        assert ours == [callback]
        assert error(train(trainer, grab), true_gradient("conditional", True)) < 1e-4
    finally:
        report.restore()


def test_dpo_on_an_applied_model_is_scaled_as_without():
    import gemma_accel

    trainer, grab = preference_trainer()
    expected = train(trainer, grab)
    trainer, grab = preference_trainer()
    report = gemma_accel.apply(trainer.model)
    try:
        assert error(train(trainer, grab), expected) < 1e-4
    finally:
        report.restore()


# ---- losses that tell nothing yet, and steps of the user's own


class Gradients(TrainerCallback):
    """Keeps every optimizer step's gradient."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.steps.append({n: p.grad.clone() for n, p in named if p.grad is not None})


@pytest.mark.parametrize("how", ["compute_loss_func", "compute_loss"])
def test_a_loss_that_is_zero_at_first_is_asked_again(how):
    """A weight that is warmed up: the gradient of the first step is nothing, and says nothing."""
    gradients = Gradients()

    def warmed(outputs, labels, num_items_in_batch=None):
        return token_mean_loss(outputs, labels) * min(1, len(gradients.steps))

    trainer, _ = own_loss_trainer(how, warmed, max_steps=2, callbacks=[gradients])
    attached(trainer).train()
    nothing, whole = gradients.steps
    assert not any(g.any() for g in nothing.values())
    assert error(whole, true_gradient("conditional", False)) < 1e-4


def test_a_micro_batch_without_labels_adds_nothing_to_a_mean_of_masked_losses():
    trainer, grab = own_loss_trainer("compute_loss_func", token_mean_loss)
    unlabelled = rows()
    unlabelled[1]["labels"][:] = -100
    trainer.train_dataset = unlabelled
    gradient = train(attached(trainer), grab)
    model, batch = model_of("conditional"), collate(unlabelled)
    labels = batch.pop("labels")
    losses = token_losses(model(**batch).logits, labels)
    (losses.sum() / (labels[..., 1:] != -100).sum()).backward()
    assert error(gradient, {n: p.grad for n, p in model.named_parameters()}) < 1e-4


class Dividing(Trainer):
    """Its own step, written for a model that takes no count."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        loss = loss / self.args.gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class Delegating(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        self.stepped = True
        return super().training_step(model, inputs, num_items_in_batch)


@pytest.mark.parametrize("applied_first", [False, True])
def test_a_training_step_of_ones_own_gets_no_count_and_a_warning(applied_first):
    stock, grab = build(Dividing, model_of("conditional"))
    expected = train(stock, grab)
    model = model_of("conditional")
    if applied_first:
        gemma_accel.apply(model)
    trainer, grab = build(Dividing, model)
    with pytest.warns(UserWarning, match=r"training_step of its own.*loss_is_scaled_for_ga"):
        gradient = train(attached(trainer), grab)
    assert error(gradient, expected) < 1e-3


def test_one_that_ends_in_the_trainers_is_corrected():
    trainer, grab = build(Delegating, model_of("conditional"))
    assert error(train(attached(trainer), grab), true_gradient("conditional", False)) < 1e-4


def test_a_step_of_trls_that_may_replace_the_labels_gets_no_count():
    gkd = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    steps = {
        cls: steps_by_itself(object.__new__(cls))
        for cls in (Trainer, SFTTrainer, gkd, Dividing, Delegating)
    }
    assert [cls for cls, own in steps.items() if own] == [gkd, Dividing]


def test_labels_that_a_step_replaces_are_seen():
    class Replacing(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            labels = inputs["labels"].clone()
            labels[:, : labels.shape[1] // 2] = -100
            return super().training_step(model, {**inputs, "labels": labels}, num_items_in_batch)

    trainer, _ = build(Replacing, model_of("conditional"))
    with pytest.warns(UserWarning, match="divided by 111 tokens, but its micro-batches hold"):
        attached(trainer).train()


def test_arguments_of_an_own_loss_reach_it():
    seen = []

    class Weighed(Delegating):
        def compute_loss(self, model, inputs, num_items_in_batch=None, alpha=1.0, **kwargs):
            seen.append(alpha)
            return model(**inputs, num_items_in_batch=num_items_in_batch).loss * alpha

        def training_step(self, model, inputs, num_items_in_batch=None):
            self.compute_loss(model, dict(inputs), num_items_in_batch=4, alpha=0.5)
            return super().training_step(model, inputs, num_items_in_batch)

    trainer, _ = build(Weighed, model_of("conditional"))
    with warnings.catch_warnings():  # no token is counted twice, either
        warnings.filterwarnings("error", "the first optimizer step's loss")
        attached(trainer).train()
    assert set(seen) == {0.5, 1.0}


def test_a_restored_models_checkpoints_have_no_report():
    model = model_of("conditional")
    report = gemma_accel.apply(model)
    trainer, _ = build(Trainer, model, save_strategy="steps", save_steps=1)
    report.restore()
    trainer.train()
    assert (Path("out") / "checkpoint-1").is_dir()
    assert not list(Path("out").rglob("gemma_accel_report.json"))
