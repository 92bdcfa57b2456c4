"""Adapters on the towers' clipped linears: by name, by pattern, by "all-linear", and back into
stock PEFT."""

from __future__ import annotations

import inspect
import json
from weakref import WeakKeyDictionary

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner

import gemma_accel
from gemma_accel.patches import clipped
from gemma_accel.patches.clipped import prepare_for_peft
from tests import media
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("references")

STOCK_INJECT = inspect.unwrap(BaseTuner.inject_adapter)


@pytest.fixture(autouse=True)
def _no_other_model(monkeypatch):
    """Models of other tests may still be prepared."""
    monkeypatch.setattr(BaseTuner, "inject_adapter", STOCK_INJECT)
    monkeypatch.setattr(clipped, "_stock_inject", None)
    monkeypatch.setattr(clipped, "_prepared", WeakKeyDictionary())


@pytest.fixture
def model():
    made = media.model()
    undo = prepare_for_peft(made)
    yield made
    undo()
    assert BaseTuner.inject_adapter is STOCK_INJECT


def adapted(model) -> set[str]:
    """Modules that hold adapters, as the base model names them."""
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def test_names_reach_the_towers(model):
    found = adapted(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])))
    assert "model.language_model.layers.0.self_attn.q_proj" in found
    assert "model.vision_tower.encoder.layers.1.self_attn.v_proj.linear" in found
    assert "model.audio_tower.layers.0.self_attn.q_proj.linear" in found
    # every module of those names there is, and nothing else (the sharing layers have no v_proj)
    assert len(found) == (5 + 3) + 4 + 4
    assert all(name.removesuffix(".linear").endswith(("q_proj", "v_proj")) for name in found)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (dict(target_modules=r".*vision_tower.*\.(q|k)_proj"), 4),
        (dict(target_modules=r".*\.q_proj(\.linear)?"), 5 + 2 + 2),
        (dict(target_modules=["q_proj.linear"]), 4),
        (dict(target_modules=["q_proj", "q_proj.linear"]), 5 + 4),
        (dict(target_modules=["model.vision_tower.encoder.layers.0.mlp.down_proj"]), 1),
        (dict(target_modules=["q_proj"], layers_to_transform=[1]), 3),
        (dict(target_modules=["q_proj"], exclude_modules=r".*(audio_tower|layers\.0).*"), 4 + 1),
        (dict(target_modules=["q_proj"], exclude_modules=r".*audio_tower.*\.linear"), 5 + 2),
        (dict(target_modules=["ffw_layer_1", "linear_end"]), 6),
        (
            dict(target_modules=None, task_type="CAUSAL_LM"),
            8,
        ),  # PEFT's default: the text model alone
    ],
    ids=str,
)
def test_every_way_of_naming(model, config, expected):
    if config["target_modules"] is None:
        config = {"task_type": "CAUSAL_LM"}
    assert len(adapted(get_peft_model(model, LoraConfig(r=2, **config)))) == expected


def test_all_linear_is_what_stock_makes_of_it(model):
    stock = adapted(get_peft_model(media.model(), LoraConfig(r=2, target_modules="all-linear")))
    ours = adapted(get_peft_model(model, LoraConfig(r=2, target_modules="All-Linear")))
    assert ours == stock and any(name.endswith(".linear") for name in ours)


def test_rank_and_alpha_patterns_follow(model):
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 3, r"language_model.layers.\d.self_attn.v_proj": 5},
        alpha_pattern={r"vision_tower.*v_proj": 8},
    )
    peft = get_peft_model(model, config)
    rank = {n: m.r["default"] for n, m in peft.named_modules() if hasattr(m, "lora_A")}
    alpha = {n: m.lora_alpha["default"] for n, m in peft.named_modules() if hasattr(m, "lora_A")}
    for name, r in rank.items():
        expected = 3 if "q_proj" in name else 5 if "language_model" in name else 2
        assert r == expected, name
        assert alpha[name] == (8 if "vision_tower" in name and "v_proj" in name else 4), name
    assert not config.alpha_pattern.keys() & config.rank_pattern.keys()


def test_a_second_adapter(model):
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    peft.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    inner = peft.base_model.model.model.vision_tower.encoder.layers[0].self_attn.q_proj.linear
    assert set(inner.lora_A) == {"default", "other"} and inner.r["other"] == 3
    assert hasattr(
        peft.base_model.model.model.vision_tower.encoder.layers[0].mlp.up_proj.linear, "lora_A"
    )


def test_injection_without_a_wrapper_model(model):
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    assert len(adapted(model)) == 5 + 4


def test_saved_adapters_load_in_stock_peft_on_a_stock_model(model, tmp_path):
    peft = get_peft_model(
        model,
        LoraConfig(
            r=2, target_modules=["q_proj", "down_proj", "ffw_layer_2"], init_lora_weights=False
        ),
    )
    inputs = media.inputs(images=1, sounds=1)
    expected = peft.eval()(**inputs).logits
    peft.save_pretrained(tmp_path)
    assert all(
        isinstance(t, str)
        for t in json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    )

    stock = media.model().eval()
    assert not torch.allclose(stock(**inputs).logits, expected, atol=1e-4)
    loaded = PeftModel.from_pretrained(stock, tmp_path)
    assert adapted(loaded) == adapted(peft)
    torch.testing.assert_close(loaded(**inputs).logits, expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


def test_other_models_are_passed_by(model):
    with pytest.raises(ValueError, match="Gemma4ClippableLinear"):
        get_peft_model(media.model(), LoraConfig(r=2, target_modules=["q_proj"]))
    causal = get_peft_model(tiny_model("causal"), LoraConfig(r=2, target_modules=["q_proj"]))
    assert causal.peft_config["default"].target_modules == {"q_proj"}


def test_a_configuration_without_clipped_linears_stays_as_it_is(model):
    config = LoraConfig(
        r=2, target_modules=["o_proj", "per_layer_input_gate"], exclude_modules=r".*vision_tower.*"
    )
    get_peft_model(model, config)
    assert config.target_modules == {"o_proj", "per_layer_input_gate"}


def test_ia3_is_left_to_peft(model):
    with pytest.raises(ValueError, match="Gemma4ClippableLinear"):
        get_peft_model(
            model, IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"])
        )


def test_apply_prepares_and_restore_undoes():
    model = media.model()
    report = gemma_accel.apply(model)
    assert any(record.patch == "clipped_adapters" for record in report.applied)
    config = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(model, config)
    assert len(adapted(model)) == 5 + 4
    report.restore()
    assert BaseTuner.inject_adapter is STOCK_INJECT
    with pytest.raises(ValueError, match="Gemma4ClippableLinear"):
        get_peft_model(media.model(), LoraConfig(r=2, target_modules=["q_proj"]))


def test_undoing_twice_is_once():
    first, second = media.model(), media.model()
    undo, other = prepare_for_peft(first), prepare_for_peft(second)
    undo()
    undo()
    assert len(adapted(get_peft_model(second, LoraConfig(r=2, target_modules=["q_proj"])))) == 9
    other()
    assert BaseTuner.inject_adapter is STOCK_INJECT
