"""What a Trainer built on an applied model finds: the table settled, the towers parked, the
callback there.
"""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import gemma_accel
from gemma_accel import patching, wiring
from gemma_accel.callback import GradientAccumulationCallback
from gemma_accel.loading import install_load_path
from gemma_accel.patches.per_layer import HostPerLayerEmbedding
from tests.tiny import LANGUAGE, VOCAB, batch, tiny_model

pytestmark = pytest.mark.usefixtures("references", "trl_on_the_cpu")

NF4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
)


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    words |= {f"w{i}": i for i in range(4, VOCAB - 10)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )


@pytest.fixture
def auto(monkeypatch):
    """`import gemma_accel.auto`, undone afterwards."""
    undo = install_load_path()
    monkeypatch.setattr(wiring, "_automatic", True)
    let_go = wiring.hold_trainer_wrappers()
    yield
    let_go()
    undo()


@pytest.fixture(params=["causal", "conditional"])
def checkpoint(request, tmp_path):
    # 64 wide: bitsandbytes' CPU decoder is wrong below (bitsandbytes 0.50.2, AVX-512, 16 columns)
    tiny_model(request.param, hidden_size_per_layer_input=64).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rows(n=8):
    return Dataset.from_list(
        [{"input_ids": batch((9 + i,), seed=i)["input_ids"][0].tolist()} for i in range(n)]
    )


def config(tmp_path, cls=SFTConfig, **kwargs):
    kwargs = {"max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 2, **kwargs}
    if cls is SFTConfig:
        kwargs.setdefault("max_length", 32)
    return cls(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        **kwargs,
    )


def sft(model, tmp_path, tokenizer, *, peft=True, **kwargs):
    return SFTTrainer(
        model=model,
        args=config(tmp_path, **kwargs),
        train_dataset=rows(),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=LANGUAGE) if peft else None,
    )


def losses(trainer):
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


class TestAutomatic:
    @pytest.mark.parametrize("quantised", [False, True])
    def test_a_stock_script_trains_as_stock_and_is_applied(
        self, checkpoint, tmp_path, tokenizer, quantised, request
    ):
        kwargs = {"quantization_config": NF4} if quantised else {}
        expected = losses(sft(load(checkpoint, **kwargs), tmp_path, tokenizer))
        request.getfixturevalue("auto")
        trainer = sft(load(checkpoint, **kwargs), tmp_path, tokenizer)
        report = patching.report_of(trainer.model)
        assert {"decoder_layer", "lora", "per_layer_embeddings"} <= {
            r.patch for r in report.applied
        }
        assert "frozen: read from the checkpoint file" in report.notes["per-layer table"]
        assert losses(trainer) == pytest.approx(expected, rel=2e-4)

    def test_a_model_given_by_name(self, checkpoint, tmp_path, tokenizer, auto):
        trainer = sft(str(checkpoint), tmp_path, tokenizer)
        assert patching.report_of(trainer.model) is not None
        losses(trainer)

    def test_other_models_are_none_of_its_business(self, auto, tmp_path):
        Trainer(model=torch.nn.Linear(2, 2), args=config(tmp_path, TrainingArguments))


class TestTable:
    def test_full_fine_tuning_trains_it_as_stock_does(
        self, checkpoint, tmp_path, tokenizer, request
    ):
        trained = []
        for applied in (False, True):
            if applied:
                request.getfixturevalue("auto")
            trainer = sft(load(checkpoint), tmp_path, tokenizer, peft=False, optim="sgd")
            losses(trainer)
            table = trainer.model.get_per_layer_input_embeddings()
            assert type(table) is not HostPerLayerEmbedding
            trained.append(table.weight.detach().clone())
        start = load(checkpoint).get_per_layer_input_embeddings().weight
        assert not torch.equal(trained[1], start)
        moved = (trained[0] - start).norm()
        assert (trained[1] - trained[0]).norm() < 1e-3 * moved

    def test_an_optimizer_made_before_the_trainer_trains_it_too(self, checkpoint, tmp_path, auto):
        model = load(checkpoint)
        start = model.get_per_layer_input_embeddings().weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Trainer(
            model=model,
            args=config(tmp_path, TrainingArguments, max_steps=1),
            train_dataset=[{k: v[0] for k, v in batch((9,), seed=i).items()} for i in range(2)],
            optimizers=(optimizer, None),
        )
        trainer.train()
        table = model.get_per_layer_input_embeddings().weight
        assert any(table is p for group in optimizer.param_groups for p in group["params"])
        assert not torch.equal(table, start)

    def test_modules_to_save_trains_a_copy_and_leaves_the_original(
        self, checkpoint, tmp_path, tokenizer, auto
    ):
        model = load(checkpoint)
        start = model.get_per_layer_input_embeddings().weight.detach().clone()
        trainer = SFTTrainer(
            model=model,
            args=config(tmp_path, optim="sgd", learning_rate=1.0),
            train_dataset=rows(),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=4, target_modules=LANGUAGE, modules_to_save=["embed_tokens_per_layer"]
            ),
        )
        losses(trainer)
        wrapper = model.get_per_layer_input_embeddings()
        assert not torch.equal(wrapper.modules_to_save["default"].weight, start)
        assert torch.equal(wrapper.original_module.weight, start)
        assert "trained" in patching.report_of(model).notes["per-layer table"]

    def test_a_table_frozen_by_hand_stays_in_the_file(self, checkpoint, tmp_path, tokenizer, auto):
        model = load(checkpoint)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.0.mlp" in name)
        trainer = sft(model, tmp_path, tokenizer, peft=False)
        losses(trainer)
        assert type(model.get_per_layer_input_embeddings()) is HostPerLayerEmbedding


class TestTowers:
    def test_a_text_only_run_parks_them_and_media_brings_them_back(self, tmp_path, tokenizer):
        model = tiny_model("conditional")
        report = gemma_accel.apply(model)
        sft(model, tmp_path, tokenizer)
        assert "vision_tower" in report.notes["towers"] and "parked" in report.notes["towers"]
        tower = model.model.vision_tower
        assert tower._gemma_accel_parked is not None
        pixels = torch.rand(1, 36, 48)
        where = torch.stack(
            torch.meshgrid(torch.arange(6), torch.arange(6), indexing="xy"), -1
        ).view(1, 36, 2)
        tower(pixels, where)
        assert tower._gemma_accel_parked is None and "_apply" not in vars(tower)

    def test_restore_brings_them_back(self, tmp_path, tokenizer):
        model = tiny_model("conditional")
        report = gemma_accel.apply(model)
        sft(model, tmp_path, tokenizer)
        tower = model.model.vision_tower
        assert tower._gemma_accel_parked is not None
        report.restore()
        assert tower._gemma_accel_parked is None
        assert "_apply" not in vars(tower) and not tower._forward_pre_hooks

    def test_only_the_tower_that_has_media_stays(self, tmp_path):
        model = tiny_model("conditional")
        report = gemma_accel.apply(model)
        data = Dataset.from_list([{"input_ids": [1, 2], "pixel_values": [0.0]}])
        args = config(tmp_path, TrainingArguments)
        model.model.requires_grad_(False)
        model.model.language_model.norm.requires_grad_(True)
        Trainer(model=model, args=args, train_dataset=data)
        parked = {
            name
            for name, tower in model.model.named_children()
            if getattr(tower, "_gemma_accel_parked", None) is not None
        }
        assert parked == {"audio_tower", "embed_audio"}
        assert "vision_tower kept: the dataset has pixel_values" in report.notes["towers"]

    def test_trained_towers_stay(self, tmp_path, tokenizer):
        model = tiny_model("conditional")
        report = gemma_accel.apply(model)
        sft(model, tmp_path, tokenizer, peft=False)
        assert "trained" in report.notes["towers"]
        assert not hasattr(model.model.vision_tower, "_gemma_accel_parked")


class TestWrappers:
    def test_the_last_restore_takes_them_off(self):
        gc.collect()
        init, train = Trainer.__init__, Trainer.train
        first, second = (gemma_accel.apply(tiny_model()) for _ in range(2))
        assert Trainer.__init__ is not init and Trainer.train is not train
        first.restore()
        assert Trainer.__init__ is not init
        second.restore()
        assert Trainer.__init__ is init and Trainer.train is train

    def test_every_trainer_on_an_applied_model_carries_the_callback_once(self, tmp_path, tokenizer):
        model = tiny_model()
        gemma_accel.apply(model)
        trainer = Trainer(
            model=model,
            args=config(tmp_path, TrainingArguments),
            train_dataset=rows(),
            callbacks=[GradientAccumulationCallback()],
        )
        found = [
            c
            for c in trainer.callback_handler.callbacks
            if isinstance(c, GradientAccumulationCallback)
        ]
        assert len(found) == 1
        trainer = sft(model, tmp_path, tokenizer)
        found = [
            c
            for c in trainer.callback_handler.callbacks
            if isinstance(c, GradientAccumulationCallback)
        ]
        assert len(found) == 1

    def test_reentrant_checkpointing_is_switched_off_with_a_warning(self, tmp_path, tokenizer):
        model = tiny_model()
        gemma_accel.apply(model)
        with pytest.warns(UserWarning, match="silently wrong gradients"):
            trainer = sft(
                model,
                tmp_path,
                tokenizer,
                gradient_checkpointing=True,
                gradient_checkpointing_kwargs={"use_reentrant": True},
            )
        assert trainer.args.gradient_checkpointing_kwargs["use_reentrant"] is False

    def test_what_the_fused_step_leaves_to_peft_is_in_the_report(self, tmp_path, tokenizer):
        model = tiny_model()
        report = gemma_accel.apply(model)
        SFTTrainer(
            model=model,
            args=config(tmp_path),
            train_dataset=rows(),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules=LANGUAGE, lora_dropout=0.1),
        )
        reasons = {r.reason for r in report.skipped if r.patch == "lora"}
        assert reasons == {"lora_dropout is 0.1"}

    def test_the_report_is_written_beside_each_checkpoint(self, tmp_path, tokenizer):
        model = tiny_model()
        gemma_accel.apply(model)
        trainer = sft(model, tmp_path, tokenizer)
        trainer.args.save_strategy, trainer.args.save_steps = "steps", 1
        trainer.train()
        written = sorted((tmp_path / "out").glob("checkpoint-*/gemma_accel_report.json"))
        assert written
        assert json.loads(written[0].read_text())["applied"]


class TestCollator:
    def test_attributes_and_class_are_the_collators_own(self, tmp_path, tokenizer):
        model = tiny_model("causal", towers=False)
        gemma_accel.apply(model)
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        args = config(tmp_path, TrainingArguments)
        trainer = Trainer(model=model, args=args, train_dataset=rows(), data_collator=collator)
        assert isinstance(trainer.data_collator, DataCollatorForLanguageModeling)
        trainer.data_collator.pad_to_multiple_of = 16
        assert collator.pad_to_multiple_of == 16
        assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[1] == 16

    def test_one_that_another_trainer_had_looks_by_this_ones_model(self, tmp_path):
        row = {k: v[0] for k, v in batch((9,)).items()}
        small, large = tiny_model("conditional"), tiny_model("conditional")
        large.resize_token_embeddings(VOCAB + 10)
        row["input_ids"][4] = row["labels"][4] = VOCAB + 5
        collator = None
        for model in (small, large):
            gemma_accel.apply(model)
            trainer = Trainer(
                model=model,
                args=config(tmp_path, TrainingArguments, max_steps=1),
                train_dataset=[row] * 2,
                data_collator=collator,
            )
            collator = trainer.data_collator
            if model is small:
                with pytest.raises(ValueError, match=f"vocabulary has {VOCAB}"):
                    trainer.train()
        trainer.train()

    def test_an_evaluation_without_labels_is_refused_as_by_trl(self, tmp_path, tokenizer):
        model = tiny_model("causal", towers=False)
        gemma_accel.apply(model)
        trainer = SFTTrainer(
            model=model,
            args=config(tmp_path, dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=rows(2).add_column("labels", [row[:] for row in rows(2)["input_ids"]]),
            processing_class=tokenizer,
        )
        masked = Dataset.from_list([{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}])
        with pytest.raises(ValueError, match="no 'labels'"):
            trainer.evaluate(masked)

    @pytest.mark.parametrize("kind", ["causal", "conditional"])
    def test_a_vocabulary_resized_after_the_trainer_was_built(self, tmp_path, kind):
        model = tiny_model(kind, towers=False)
        gemma_accel.apply(model)
        trainer = Trainer(model=model, args=config(tmp_path, TrainingArguments, max_steps=1))
        model.resize_token_embeddings(VOCAB + 10, mean_resizing=False)
        row = torch.tensor([5, VOCAB + 5])
        trainer.data_collator([{"input_ids": row, "labels": row}])
        with pytest.raises(ValueError, match=f"vocabulary has {VOCAB + 10}"):
            trainer.data_collator([{"input_ids": row + 5}])


@pytest.mark.usefixtures("auto")
def test_a_model_that_train_makes_anew_is_applied_too(tmp_path):
    made = []

    def model_init():
        made.append(tiny_model("conditional", seed=0))
        return made[-1]

    trainer = Trainer(
        model_init=model_init,
        args=config(tmp_path, TrainingArguments, gradient_accumulation_steps=2, max_steps=1),
        train_dataset=[{k: v[0] for k, v in batch((9,), seed=i).items()} for i in range(4)],
    )
    first = trainer.model
    trainer.train()
    assert trainer.model is made[-1] is not first
    reports = [patching.report_of(model) for model in (first, trainer.model)]
    assert all(reports) and reports[0] is not reports[1]
    assert reports[1].notes.keys() >= {"per-layer table", "towers", "gradient accumulation"}


@pytest.mark.usefixtures("auto")
def test_a_model_that_is_replaced_is_not_held(tmp_path):
    made, alive = [], []

    def model_init():
        model = tiny_model("conditional", seed=0)
        made.append(weakref.ref(model))
        return model

    class Look(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            gc.collect()
            alive.extend(ref() is not None for ref in made)

    Trainer(
        model_init=model_init,
        args=config(tmp_path, TrainingArguments, max_steps=1),
        train_dataset=[{k: v[0] for k, v in batch((9,), seed=i).items()} for i in range(2)],
        callbacks=[Look()],
    ).train()
    assert alive == [False, True]


def test_a_compiled_model_has_its_trainer_seen_to(tmp_path):
    model = tiny_model("conditional")
    report = gemma_accel.apply(model)
    Trainer(
        model=torch.compile(model, backend="eager"),
        args=config(tmp_path, TrainingArguments),
        train_dataset=[{k: v[0] for k, v in batch((9,)).items()}],
    )
    assert report.notes.keys() >= {"per-layer table", "towers"}
