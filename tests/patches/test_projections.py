"""What of PEFT's and bitsandbytes' layers can be read, and what is left to their own forward."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model

import gemma_accel
from gemma_accel.patches.decoder import left_to_stock
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


# ---- what somebody put on a module is not passed by


def halved(self, x):
    return type(self).forward(self, x) * 0.5


def bound(path):
    """Another forward on the module."""

    def put(model):
        module = model.get_submodule(path)
        module.forward = MethodType(halved, module)

    return put


def hooked(path, kind):
    def put(model):
        module = model.get_submodule(path)
        if kind == "forward":
            module.register_forward_hook(lambda m, x, out: out * 0.5)
        else:
            module.register_full_backward_hook(lambda m, dx, dy: tuple(g * 0.5 for g in dx))

    return put


def subclassed(path):
    """A class of the user's own."""

    def put(model):
        module = model.get_submodule(path)
        stock = type(module)
        module.__class__ = type(
            "Own", (stock,), {"forward": lambda m, x: stock.forward(m, x) * 0.5}
        )

    return put


LAYER = "base_model.model.model.layers.1"
PUT = {
    "forward on a LoRA layer": bound(f"{LAYER}.mlp.down_proj"),
    "forward on its B": bound(f"{LAYER}.self_attn.q_proj.lora_B.default"),
    "hook on its A": hooked(f"{LAYER}.mlp.gate_proj.lora_A.default", "forward"),
    "backward hook on a linear": hooked(f"{LAYER}.self_attn.o_proj", "backward"),
    "backward hook on its base": hooked(f"{LAYER}.mlp.up_proj.base_layer", "backward"),
    "forward on a norm": bound(f"{LAYER}.post_feedforward_layernorm"),
    "hook on the queries' norm": hooked(f"{LAYER}.self_attn.q_norm", "forward"),
    "backward hook on a norm": hooked(f"{LAYER}.post_attention_layernorm", "backward"),
    "a subclass of the norm": subclassed(f"{LAYER}.pre_feedforward_layernorm"),
    "hook on the activation": hooked(f"{LAYER}.mlp.act_fn", "forward"),
}


@pytest.mark.parametrize("put", PUT.values(), ids=PUT.keys())
def test_what_was_put_on_a_module_runs(put):
    results = []
    for how in ("plain", "stock", "applied"):
        model = tiny_model("causal")
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=LANGUAGE, init_lora_weights=False)
        peft = get_peft_model(model, config)
        if how == "applied":
            gemma_accel.apply(peft)
        if how != "plain":
            put(peft)
        peft(**batch()).loss.backward()
        results.append({n: p.grad for n, p in peft.named_parameters() if p.requires_grad})
    plain, stock, ours = results
    moved, off = (
        max((other[n] - g).norm() / g.norm() for n, g in stock.items()) for other in (plain, ours)
    )
    assert moved > 1e-3 and off < 0.1 * moved  # it does something, and here too


def test_adapters_of_several_dtypes_are_cast_by_peft():
    results = []
    for applied in (False, True):
        model = tiny_model("causal", dtype=torch.bfloat16)
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=LANGUAGE, init_lora_weights=False)
        peft = get_peft_model(model, config, autocast_adapter_dtype=False)
        for name, module in peft.named_modules():
            if name.endswith("q_proj"):
                module.lora_A.float(), module.lora_B.float()
        if applied:
            gemma_accel.apply(peft)
        results.append(peft(**batch()).loss.item())
    assert results[1] == pytest.approx(results[0], rel=1e-2)
    told = dict(stepped_aside(model, model.model.embed_tokens.weight))
    assert told["model.layers.0.self_attn.k_proj"] == "adapters of one input differ in dtype"


def test_a_layer_scalar_that_is_trained():
    results = []
    for applied in (False, True):
        model = tiny_model("causal")
        if applied:
            gemma_accel.apply(model)
        for layer in model.model.layers:
            layer.layer_scalar.requires_grad_(True)
        model(**batch()).loss.backward()
        results.append(torch.stack([layer.layer_scalar.grad for layer in model.model.layers]))
    assert (results[1] - results[0]).norm() < 1e-3 * results[0].norm()
    assert {patch for patch, _, _ in left_to_stock(model)} == {"decoder_layer"}


def test_norms_that_peft_wraps_are_told():
    model = tiny_model("causal")
    gemma_accel.apply(model)
    assert list(left_to_stock(model)) == []
    config = LoraConfig(target_modules=["down_proj"], modules_to_save=["q_norm"])
    get_peft_model(model, config)
    told = {path: reason for patch, path, reason in left_to_stock(model)}
    assert told.keys() == {f"model.layers.{n}.self_attn" for n in range(5)}
    assert "wrapped" in told["model.layers.0.self_attn"]


def test_the_4_bit_layers_of_other_methods_are_left_to_them():
    bnb = pytest.importorskip("bitsandbytes")
    results = []
    for applied in (False, True):
        model = tiny_model("causal")
        for layer in model.model.layers:
            dense = layer.mlp.down_proj
            four = bnb.nn.Linear4bit(dense.in_features, dense.out_features, bias=False)
            four.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False)
            layer.mlp.down_proj = four.to("cpu")
        config = IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])
        peft = get_peft_model(model, config)
        if applied:
            gemma_accel.apply(peft)
        peft(**batch()).loss.backward()
        results.append({n: p.grad for n, p in peft.named_parameters() if p.requires_grad})
    stock, ours = results
    assert stock and all((ours[n] - g).norm() < 1e-3 * g.norm() for n, g in stock.items())
