"""What a patched model is once it has been pickled: stock, and none of this package's. And whom its
modules answer to: hooks of all modules, too.
"""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.modules.module import register_module_forward_hook
from transformers import Trainer, TrainingArguments

import gemma_accel
from tests.tiny import LANGUAGE, batch, tiny_model

pytestmark = pytest.mark.usefixtures("references")


class _Elsewhere(pickle.Unpickler):
    """Loads as where the package is absent."""

    def find_class(self, module, name):
        if module.partition(".")[0] == "gemma_accel":
            raise ModuleNotFoundError(f"{module}.{name}")
        return super().find_class(module, name)


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_a_pickled_model_loads_where_the_package_is_absent(tmp_path, protocol):
    model = tiny_model("conditional")
    gemma_accel.apply(model, vram_gib=7.0)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE))
    rows = [{"input_ids": list(range(3, 12)), "labels": list(range(3, 12))}]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1, save_strategy="no"
    )
    Trainer(model=peft, args=arguments, train_dataset=Dataset.from_list(rows * 8)).train()
    assert model.model.vision_tower._gemma_accel_parked is not None
    twin = _Elsewhere(io.BytesIO(pickle.dumps(peft, protocol))).load()
    tower = twin.get_base_model().model.vision_tower
    assert getattr(tower, "_gemma_accel_parked", None) is None
    tower.to("meta")  # it is not held on the CPU any more
    assert next(tower.parameters()).is_meta
    with torch.no_grad():
        expected, got = (m.eval()(**batch()).loss for m in (peft, twin))
    torch.testing.assert_close(got, expected)
    gemma_accel.apply(twin).restore()


def under_a_hook_of_all_modules(model):
    """Loss, gradients, and the modules that were called, where each Linear gives 0.9 of its own."""
    called = []

    def hook(module, args, output):
        called.append(type(module).__name__)
        return output * 0.9 if type(module) is torch.nn.Linear else None

    handle = register_module_forward_hook(hook)
    try:
        loss = model(**batch()).loss
        loss.backward()
    finally:
        handle.remove()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss, gradients, called


@pytest.mark.parametrize("kind", ["causal", "conditional"])
def test_a_hook_of_all_modules_sees_what_it_sees_in_stock(kind):
    stock, model = (tiny_model(kind, towers=False) for _ in range(2))
    gemma_accel.apply(model)
    (expected, truth, saw), (loss, gradients, sees) = map(
        under_a_hook_of_all_modules, (stock, model)
    )
    assert sees == saw and {"Linear", "Gemma4RMSNorm", "Gemma4TextMLP"} < set(saw)
    torch.testing.assert_close(loss, expected)
    assert gradients.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(gradients[name], truth[name], rtol=1e-3, atol=1e-5)
    free = model(**batch()).loss  # and nothing of it stays
    assert abs(free - loss) > 1e-3
