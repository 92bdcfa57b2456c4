"""What of PEFT's and bitsandbytes' layers can be read, and what is left to their own forward."""

from __future__ import annotations

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model

import gemma_accel
from gemma_accel.patches.lora import stepped_aside
from tests.tiny import LANGUAGE, batch, tiny_model

pytestmark = pytest.mark.usefixtures("references")


def test_adalora_runs_its_own_forward_with_the_reason():
    results = []
    for applied in (False, True):
        model = tiny_model("causal")
        if applied:
            gemma_accel.apply(model)
        config = AdaLoraConfig(
            init_r=4, total_step=9, target_modules=LANGUAGE, init_lora_weights=False
        )
        torch.manual_seed(1)
        peft = get_peft_model(model, config)
        peft(**batch()).loss.backward()
        results.append({n: p.grad for n, p in peft.named_parameters() if p.requires_grad})
    reasons = {reason for path, reason in stepped_aside(model) if path.endswith("q_proj")}
    assert reasons == {"the adapter's factors are Parameter"}
    stock, ours = results
    for name, gradient in stock.items():
        assert (ours[name] - gradient).norm() < 1e-2 * gradient.norm(), name
