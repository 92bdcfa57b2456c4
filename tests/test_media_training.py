"""Stock TRL on tiny models with towers: the same losses and adapters, stock and applied."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, Gemma4ForConditionalGeneration
from trl import SFTConfig, SFTTrainer

import gemma_accel
import gemma_accel.loading
from gemma_accel.collators import DataCollatorForMultimodalLanguageModeling
from gemma_accel.memory import tower_shapes
from gemma_accel.patches.clipped import prepare_for_peft
from tests import media, tiny
from tests.media import chat, picture, sound

pytestmark = pytest.mark.usefixtures("references", "trl_on_the_cpu")

IMAGES = [
    {"messages": chat("What is it?", "A disc.", images=1), "images": [picture()]},
    {"messages": chat("Compare.", "Alike.", images=2),
     "images": [picture(60, 60, seed=1), picture(seed=2)]},
    {"messages": chat("No picture?", "None."), "images": []},
    {"messages": chat("And this?", "A line.", images=1), "images": [picture(40, 90, seed=3)]},
]  # fmt: skip
SOUNDS = [
    {"messages": chat("What is it?", "A tone.", sounds=1), "audio": [sound(0.4).tolist()]},
    {"messages": chat("No sound?", "None."), "audio": None},
    {"messages": chat("Two?", "Two.", sounds=2),
     "audio": [sound(0.3).tolist(), sound(0.7, pitch=300).tolist()]},
    {"messages": chat("Again?", "A tone.", sounds=1), "audio": [sound(0.5, pitch=150).tolist()]},
]  # fmt: skip
BOTH = [
    {**IMAGES[0], "audio": None},
    {"messages": chat("Both?", "Both.", images=1, sounds=1), "images": [picture(seed=4)],
     "audio": [sound(0.5).tolist()]},
    {**SOUNDS[0], "images": []},
    {"messages": chat("Neither?", "Neither."), "images": [], "audio": None},
]  # fmt: skip
DATA = {"images": IMAGES, "sounds": SOUNDS, "both": BOTH}

# what ["q_proj", "down_proj", "ffw_layer_1"] means once it is spelled out; stock PEFT needs it so
SPELLED_OUT = (
    r".*language_model\..*\.(q_proj|down_proj)|.*_tower\..*\.(q_proj|down_proj|ffw_layer_1)\.linear"
)
NAMES = ["q_proj", "down_proj", "ffw_layer_1"]


def trainer(kind, tmp_path, *, applied, targets, model=None, **options):
    model = model or media.model()
    report = gemma_accel.apply(model) if applied else None
    collator = None
    if kind != "images":
        collator = DataCollatorForMultimodalLanguageModeling(media.processor(), max_length=1024)
    torch.manual_seed(0)
    made = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=3,
            learning_rate=3e-3,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            remove_unused_columns=kind == "images",
            dataset_kwargs={"skip_prepare_dataset": True},
            disable_tqdm=True,
            **options,
        ),
        data_collator=collator,
        train_dataset=Dataset.from_list(DATA[kind]),
        processing_class=media.processor(),
        peft_config=LoraConfig(r=2, target_modules=targets) if targets else None,
    )
    return made, report


def trained(made) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in made.model.named_parameters() if p.requires_grad}


def losses(made) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", DATA)
def test_stock_and_applied_end_in_the_same_place(kind, tmp_path):
    results = []
    for applied in (False, True):
        made, _ = trainer(
            kind, tmp_path, applied=applied, targets=NAMES if applied else SPELLED_OUT
        )
        made.train()
        results.append((losses(made), trained(made)))
    (expected, expected_weights), (got, weights) = results
    assert len(got) == 3 and got == pytest.approx(expected, rel=1e-4)
    assert weights.keys() == expected_weights.keys()
    for tower, used in (("vision_tower", kind != "sounds"), ("audio_tower", kind != "images")):
        moved = [n for n, w in weights.items() if tower in n and "lora_B" in n and w.any()]
        assert bool(moved) == used, tower
    # together: Adam makes whole steps of what is nearly nothing, in whichever direction it rounds
    got, expected = (
        torch.cat([w[n].flatten() for n in weights]) for w in (weights, expected_weights)
    )
    assert (got - expected).norm() < 3e-3 * expected.norm()


def test_full_fine_tuning_with_images(tmp_path):
    results = []
    for applied in (False, True):
        made, _ = trainer("images", tmp_path, applied=applied, targets=None)
        made.train()
        results.append(losses(made))
    assert results[1] == pytest.approx(results[0], rel=1e-3)


def test_a_frozen_tower_stays_out_of_autograd(tmp_path):
    """Adapters in the language model alone: nothing of a tower is kept for backward."""
    made, _ = trainer("both", tmp_path, applied=True, targets=r".*language_model.*\.q_proj")
    outputs = []
    base = made.model.get_base_model().model
    for tower in (base.vision_tower, base.audio_tower):
        tower.register_forward_hook(lambda *args: outputs.append(args[2].last_hidden_state))
    made.train()
    assert len(outputs) >= 4 and not any(out.requires_grad for out in outputs)


def test_the_memory_policy_hears_what_passes_the_towers(tmp_path):
    targets = r".*(vision_tower|language_model)\..*\.q_proj"
    made, _ = trainer("both", tmp_path, applied=True, targets=targets)
    collator, patches = made.data_collator, []

    def watched(rows):
        batch = collator(rows)
        patches.append(batch["pixel_values"].shape[:2].numel() if "pixel_values" in batch else 0)
        return batch

    made.data_collator = watched
    made.train()
    base = made.model.get_base_model()
    vision, audio = tower_shapes(base.config).values()
    heard = base.model.language_model.memory.media
    assert heard[vision] == max(patches) > 0
    assert set(heard) == {vision, dataclasses.replace(audio, trained=False)}  # no adapters in it


def test_adapters_go_back_to_stock(tmp_path):
    made, report = trainer("both", tmp_path, applied=True, targets=NAMES)
    made.train()
    inputs = media.inputs(images=1, sounds=1)
    made.model.save_pretrained(tmp_path)
    attended = inputs["attention_mask"].bool()  # padding gives what it gives
    expected = made.model.eval()(**inputs).logits[attended]
    report.restore()
    stock = PeftModel.from_pretrained(media.model().eval(), tmp_path)
    got = stock(**inputs).logits[attended]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_a_text_only_run_leaves_the_towers_alone(tmp_path):
    data = Dataset.from_list([{"messages": row["messages"]} for row in IMAGES[2:3] * 2])
    model = media.model()
    report = gemma_accel.apply(model)
    SFTTrainer(
        model=model,
        args=SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_steps=1),
        train_dataset=data,
        processing_class=media.processor(),
        peft_config=LoraConfig(r=2),
    )
    assert "vision_tower" in report.notes["towers"] and "parked" in report.notes["towers"]


# -- the example scripts, each in a process of its own --

DRIVER = """
import runpy, sys
from transformers import AutoProcessor
from gemma_accel.patches.clipped import prepare_for_peft
from tests import media, tiny
from tests import trl_on_cpu

# AutoProcessor wants torchvision; and TRL 1.15 wants a card for its LM head
AutoProcessor.from_pretrained = lambda *args, **kwargs: media.processor()
trl_on_cpu.install()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(
    "prepare_for_peft" not in inspect.getsource(gemma_accel.loading),
    reason="the load path does not prepare a model for PEFT",
)
@pytest.mark.parametrize("script", ["sft_vision.py", "sft_audio.py"])
def test_examples(script, tmp_path):
    root = Path(__file__).parent.parent
    model = media.model()
    model.save_pretrained(tmp_path / "model")
    rows = []
    for index, row in enumerate(IMAGES if script == "sft_vision.py" else SOUNDS):
        row = dict(row)
        for number, image in enumerate(row.get("images", ())):
            image.save(tmp_path / f"{index}-{number}.png")
        if "images" in row:
            row["images"] = [f"{index}-{number}.png" for number in range(len(row["images"]))]
        rows.append(json.dumps(row))
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    extra = ["--soft-tokens", "70"] if script == "sft_vision.py" else []
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DRIVER, str(root / "examples" / script)]
        + ["--model", "model", "--dataset", "data.jsonl", "--max-steps", "2", *extra],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(root),
            "TRITON_INTERPRET": "0",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    output = tmp_path / script.removesuffix(".py").replace("_", "-")
    stock = PeftModel.from_pretrained(media.model(), output)
    tower, other = ("vision", "audio") if script == "sft_vision.py" else ("audio", "vision")
    adapted = {n for n, m in stock.named_modules() if hasattr(m, "lora_A")}
    assert any(f"{tower}_tower" in n for n in adapted)
    assert not any(f"{other}_tower" in n for n in adapted)


def test_nf4_towers(tmp_path, monkeypatch):
    """Quantised inner linears with adapters, clipped, against stock on the same quantised model."""
    # bitsandbytes on the CPU wants widths that are multiples of 64
    wide = dict(head_dim=64, global_head_dim=64, num_attention_heads=2)
    monkeypatch.setattr(tiny, "TEXT", {**tiny.TEXT, **wide, "hidden_size_per_layer_input": 64})
    monkeypatch.setattr(tiny, "VISION", {**tiny.VISION, "hidden_size": 64, "head_dim": 32})
    monkeypatch.setattr(tiny, "AUDIO", {**tiny.AUDIO, "hidden_size": 64, "output_proj_dims": 64})
    media.model().save_pretrained(tmp_path)
    inputs, results = media.inputs(images=1, sounds=1), []
    for applied in (False, True):
        model = Gemma4ForConditionalGeneration.from_pretrained(
            tmp_path,
            dtype=torch.float32,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
            ),
        ).train()
        prepare_for_peft(model)
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=NAMES, init_lora_weights=False)
        peft = get_peft_model(model, config)
        if applied:
            gemma_accel.apply(peft)
        loss = peft(**inputs).loss
        loss.backward()
        grads = {n: p.grad for n, p in peft.named_parameters() if p.grad is not None}
        results.append((loss.item(), grads))
    linear = model.model.audio_tower.layers[0].feed_forward1.ffw_layer_1.linear
    assert type(linear.base_layer).__name__ == "Linear4bit"
    (expected, expected_grads), (got, grads) = results
    assert got == pytest.approx(expected, rel=1e-5) and grads.keys() == expected_grads.keys()
    for name, gradient in expected_grads.items():
        assert (grads[name] - gradient).norm() < 1e-3 * gradient.norm(), name
