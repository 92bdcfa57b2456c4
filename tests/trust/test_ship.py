"""What leaves a run, and what happens in the middle of one: merged models in a process without this
package, evaluation, prediction and generation between steps, early stopping, the best model.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import gemma_accel
from gemma_accel import patching
from gemma_accel.hostmemory import FileSlice
from gemma_accel.loading import find_tensors
from gemma_accel.patches.per_layer import HostPerLayerEmbedding
from tests.test_callback import SMALL
from tests.test_wiring import auto, tokenizer  # noqa: F401 - fixtures
from tests.tiny import LANGUAGE, batch, tiny_model

pytestmark = pytest.mark.usefixtures("references", "trl_on_the_cpu")

STEPS = 5


def rows(n, seed=0):
    ids = [batch((7 + i % 5,), seed=seed + i)["input_ids"][0].tolist() for i in range(n)]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def options(output, **changes):
    return dict(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
        max_steps=STEPS,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        **changes,
    )


def sft(model, output, tokenizer, *, peft=True, callbacks=(), **changes):  # noqa: F811
    changes = {"max_length": 16, **changes}
    return SFTTrainer(
        model=model,
        args=SFTConfig(**{**options(output), **changes}),
        train_dataset=rows(10).remove_columns("labels"),
        eval_dataset=rows(4, seed=50).remove_columns("labels"),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        peft_config=LoraConfig(r=4, target_modules=LANGUAGE) if peft else None,
    )


def plain(model, output, tokenizer, *, callbacks=(), **changes):  # noqa: F811
    def collate(items):
        from tests.test_callback import collate

        tensors = [{k: torch.tensor(item[k]) for k in ("input_ids", "labels")} for item in items]
        return collate([{**t, "attention_mask": torch.ones_like(t["input_ids"])} for t in tensors])

    return Trainer(
        model=model,
        args=TrainingArguments(**{**options(output), "optim": "sgd", **changes}),
        train_dataset=rows(10),
        eval_dataset=rows(4, seed=50),
        data_collator=collate,
        callbacks=list(callbacks),
    )


def logged(trainer, key="loss"):
    return {row["step"]: row[key] for row in trainer.state.log_history if key in row}


def small_model(kind="conditional", **changes):
    return tiny_model(kind, **{**SMALL, **changes})


# ---- shipping


STOCK = """
import sys
sys.modules["gemma_accel"] = None  # importing it, from wherever, is an error
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
folder = sys.argv[1]
inputs = torch.load(f"{folder}/inputs.pt")

def logits(model):
    with torch.no_grad():
        return model.eval()(**inputs).logits

def load(name):
    return AutoModelForCausalLM.from_pretrained(f"{folder}/{name}")

merged = load("merged")
adapted = PeftModel.from_pretrained(load("model"), f"{folder}/adapters")
torch.save(
    {
        "merged": logits(merged),
        "state": merged.state_dict(),
        "adapted": logits(adapted),
        "base": logits(load("model")),
        "modules": sorted(name for name in sys.modules if name.startswith("gemma_accel")),
        "classes": [type(m).__module__ for m in merged.modules()],
    },
    f"{folder}/stock.pt",
)
"""


def table_bytes(directory):
    file = directory / "model.safetensors"
    (source,) = find_tensors(file, suffix="embed_tokens_per_layer.weight")
    with open(source.path, "rb") as file:
        file.seek(source.offset)
        return file.read(source.nbytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_and_adapters_without_this_package(
    dtype,
    tmp_path,
    tokenizer,  # noqa: F811
    auto,  # noqa: F811
):
    """The merged model's weights and, its patches taken off, its logits to the bit; the table's
    bytes; the adapters on the stock model.
    """
    small_model(dtype=dtype).save_pretrained(tmp_path / "model")
    trainer = sft(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path, tokenizer)
    trainer.train()
    report = patching.report_of(trainer.model)
    trainer.save_model(tmp_path / "adapters")
    merged = trainer.model.merge_and_unload()
    table = merged.get_per_layer_input_embeddings()
    assert type(table) is HostPerLayerEmbedding and isinstance(table.host.source, FileSlice)
    merged.save_pretrained(tmp_path / "merged")
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    torch.save(inputs, tmp_path / "inputs.pt")

    subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path)],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    stock = torch.load(tmp_path / "stock.pt", weights_only=False)
    assert stock["modules"] == ["gemma_accel"]  # the None that forbids it
    assert not any("gemma_accel" in name for name in stock["classes"])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        ours = merged.eval()(**inputs).logits
        report.restore()
        restored = merged(**inputs).logits
    torch.set_num_threads(threads)

    state = merged.state_dict()
    assert stock["state"].keys() == state.keys()
    assert all(torch.equal(stock["state"][name], state[name]) for name in state)
    assert table_bytes(tmp_path / "merged") == table_bytes(tmp_path / "model")
    assert torch.equal(restored, stock["merged"])

    real = inputs["attention_mask"].bool()
    rounding = 1e-5 if dtype == torch.float32 else 6e-2

    def distance(a, b):
        return ((a[real].float() - b[real].float()).norm() / b[real].float().norm()).item()

    assert distance(ours, stock["merged"]) < rounding
    assert distance(stock["adapted"], stock["merged"]) < rounding
    assert distance(stock["base"], stock["merged"]) > 3 * rounding  # the adapters do something


# ---- between the steps of a run


class Between(TrainerCallback):
    """Evaluates, predicts or generates after every step."""

    def __init__(self, *what):
        self.what, self.trainer, self.found = what, None, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if "generate" in self.what:
            prompt = {k: v for k, v in batch((9, 5), side="left").items() if k != "labels"}
            model.eval()
            tokens = model.generate(**prompt, max_new_tokens=6, do_sample=False)
            model.train()
            self.found.append(tokens)
        if "predict" in self.what:
            self.found.append(torch.from_numpy(self.trainer.predict(rows(2, seed=70)).predictions))
        if "evaluate" in self.what:
            self.found.append(torch.tensor(self.trainer.evaluate()["eval_loss"]))


def run(make, output, tokenizer, *what, applied=True, **changes):  # noqa: F811
    model = small_model()
    if applied:
        gemma_accel.apply(model)
    between = Between(*what)
    trainer = make(model, output, tokenizer, callbacks=[between], **changes)
    between.trainer, stock_step, losses = trainer, trainer.training_step, []

    def step(*args, **kwargs):  # an evaluation in a callback cancels the step's own log
        loss = stock_step(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.training_step = step
    trainer.train()
    assert len(losses) == STEPS
    return losses, between.found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("make", "what"),
    [(sft, ["generate"]), (sft, ["evaluate"]), (plain, ["predict", "evaluate", "generate"])],
    ids=["sft generate", "sft evaluate", "plain all"],
)
def test_what_comes_between_steps_leaves_training_as_it_was(
    make,
    what,
    checkpointing,
    tmp_path,
    tokenizer,  # noqa: F811
):
    changes = {"gradient_checkpointing": checkpointing}
    expected, _ = run(make, tmp_path, tokenizer, **changes)
    losses, found = run(make, tmp_path, tokenizer, *what, **changes)
    assert losses == expected
    stock, theirs = run(make, tmp_path, tokenizer, *what, applied=False, **changes)
    assert losses == pytest.approx(stock, rel=1e-4)
    assert len(found) == len(theirs) == STEPS * len(what)
    for ours, expected in zip(found, theirs, strict=True):
        if ours.is_floating_point():
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
        else:
            assert torch.equal(ours, expected)


class LeavesItInEval(TrainerCallback):
    def __init__(self, inner):
        self.inner, self.modes = inner, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.inner and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        model.eval()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.modes.append(all(module.training for module in model.modules()))


@pytest.mark.parametrize(
    "inner",
    [
        False,
        True,
    ],
)
def test_a_model_left_in_eval_mode_trains_on_in_train_mode(inner, tmp_path, tokenizer):  # noqa: F811
    """As with stock, whose `training_step` puts it back: else checkpointing would be off."""
    callback = LeavesItInEval(inner)
    model = small_model()
    gemma_accel.apply(model)
    sft(model, tmp_path, tokenizer, callbacks=[callback]).train()
    assert callback.modes == [True] * STEPS


@pytest.mark.gpu
def test_between_steps_on_a_gpu_with_graphs():
    """Captured graphs are left alone by evaluation and generation."""
    import gc

    from peft import get_peft_model

    gc.collect()  # an earlier test's model may hold the allocator to a memory of its own

    def one(disturbed):
        torch.manual_seed(1)
        model = get_peft_model(
            small_model("causal").cuda(), LoraConfig(r=4, target_modules=LANGUAGE)
        )
        gemma_accel.apply(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        prompt = {k: v.cuda() for k, v in batch((9, 5), side="left").items() if k != "labels"}
        losses = []
        alive = []  # a loop that keeps its losses, and all that hangs on them
        for step in range(8):
            loss = model(**{k: v.cuda() for k, v in batch((16, 16), seed=step).items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            alive.append(loss)
            if disturbed:
                model.eval()
                with torch.no_grad():
                    model(**{k: v.cuda() for k, v in batch((16, 16), seed=99).items()})
                    model.generate(**prompt, max_new_tokens=4, do_sample=False)
                model.train()
        text = model.get_base_model().model
        graphs = text.layers[0].graphs
        assert graphs.captured, (graphs.off, text.memory.budget, text.memory.summary())
        return losses

    assert one(True) == pytest.approx(one(False), rel=1e-4)


# ---- early stopping and the best model


def weights_in(directory):
    (file,) = list(directory.glob("*model.safetensors"))
    return load_file(file)


@pytest.mark.parametrize("kind", ["adapters", "everything", "all but the table"])
def test_early_stopping_and_the_best_model_as_in_stock(
    kind,
    tmp_path,
    tokenizer,  # noqa: F811
    request,
):
    """Learning random rows by heart makes others worse: the best model is an early one, and it is
    what is in the model at the end, whatever was trained since.
    """
    small_model().save_pretrained(tmp_path / "model")
    runs = []
    for applied in (False, True):
        if applied:
            request.getfixturevalue("auto")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        if kind == "all but the table":
            model.get_per_layer_input_embeddings().requires_grad_(False)
        trainer = sft(
            model,
            tmp_path / f"out-{applied}",
            tokenizer,
            peft=kind == "adapters",
            callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
            max_steps=12,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            # Adam would grow the last bits of a gradient of nearly nothing
            **({} if kind == "adapters" else {"optim": "sgd", "learning_rate": 0.1}),
            metric_for_best_model="eval_loss",
        )
        trainer.train()
        runs.append(trainer)
    stock, ours = runs
    assert (patching.report_of(ours.model) is not None) and ours.state.global_step < 12
    assert ours.state.best_global_step <= ours.state.global_step - 2
    for what in ("global_step", "best_global_step"):
        assert getattr(ours.state, what) == getattr(stock.state, what)
    assert list(logged(ours, "eval_loss").values()) == pytest.approx(
        list(logged(stock, "eval_loss").values()), rel=1e-4
    )

    best = tmp_path / "out-True" / f"checkpoint-{ours.state.best_global_step}"
    saved = weights_in(best)
    model = ours.accelerator.unwrap_model(ours.model)
    held = get_peft_model_state_dict(model) if kind == "adapters" else model.state_dict()
    assert saved and all(torch.equal(held[name], tensor) for name, tensor in saved.items())
    with torch.no_grad():
        pair = [
            trainer.model.eval()(**{k: v for k, v in batch().items() if k != "labels"}).logits
            for trainer in runs
        ]
    real = batch()["attention_mask"].bool()
    torch.testing.assert_close(pair[1][real], pair[0][real], rtol=1e-3, atol=1e-3)
    assert ours.evaluate()["eval_loss"] == pytest.approx(ours.state.best_metric, rel=1e-5)

    inner = model.get_base_model() if kind == "adapters" else model
    table = inner.get_per_layer_input_embeddings()
    if kind == "everything":
        assert type(table) is not HostPerLayerEmbedding
    else:  # what came back with the checkpoint is what the file holds: no copy of it in memory
        assert isinstance(table.host.source, FileSlice)
