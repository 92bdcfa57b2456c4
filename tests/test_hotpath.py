"""What is remembered while a training runs, and when it is not."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from gemma_accel.hotpath import remembered
from tests.tiny import LANGUAGE, tiny_model


@pytest.fixture
def peft():
    return get_peft_model(
        tiny_model("causal", towers=False), LoraConfig(r=4, target_modules=LANGUAGE)
    )


@pytest.fixture
def walks(monkeypatch):
    """How often a model's parameters were looked for, and its modules set to a mode."""
    counts = {"_named_members": 0, "train": 0}
    for name in counts:
        original = getattr(nn.Module, name)

        def counting(self, *args, name=name, original=original, **kwargs):
            counts[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(nn.Module, name, counting)
    return counts


def same(ours, stock):
    return [id(p) for p in ours] == [id(p) for p in stock]


def test_parameters_are_found_once(peft, walks):
    stock = list(peft.parameters())
    with remembered(peft):
        walks["_named_members"] = 0
        for _ in range(3):
            assert same(peft.parameters(), stock)
            peft.zero_grad()
        assert walks["_named_members"] == 1
        assert same(peft.parameters(recurse=False), [])
    assert "parameters" not in vars(peft)


def test_one_that_is_registered_is_seen(peft):
    with remembered(peft):
        list(peft.parameters())
        peft.add_adapter("second", LoraConfig(r=2, target_modules=LANGUAGE))
        assert same(peft.parameters(), nn.Module.parameters(peft))
        layer = peft.get_base_model().model.layers[0]
        layer.mlp.own = nn.Parameter(torch.ones(3))
        assert same(peft.parameters(), nn.Module.parameters(peft))


def test_one_that_was_replaced_is_not_held(peft):
    linear = peft.get_base_model().model.layers[0].mlp.down_proj.base_layer
    with remembered(peft):
        list(peft.parameters())
        gone = weakref.ref(linear.weight)
        linear._parameters["weight"] = nn.Parameter(linear.weight.detach().clone())  # as `to` may
        gc.collect()
        assert gone() is None
        assert same(peft.parameters(), nn.Module.parameters(peft))


def test_modes_are_set_when_they_change(peft, walks):
    peft.train()
    with remembered(peft):
        peft.train()
        walks["train"] = 0
        assert peft.train() is peft
        assert walks["train"] == 0
        peft.eval()
        assert walks["train"] > 0 and not peft.get_base_model().model.layers[0].training
        peft.get_base_model().train()  # behind the wrapper's back
        peft.eval()
        assert not peft.get_base_model().training


def test_parameters_are_counted_once(peft, walks):
    base = peft.get_base_model()
    stock = base.num_parameters(only_trainable=True), base.num_parameters()
    with remembered(peft):
        for _ in range(2):
            assert (base.num_parameters(only_trainable=True), base.num_parameters()) == stock
        walks["_named_members"] = 0
        base.num_parameters()
        assert walks["_named_members"] == 0


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_methods_of_its_own(peft, how):
    with remembered(peft):
        list(peft.parameters())
        if how == "deepcopy":
            twin = copy.deepcopy(peft)
        else:
            file = io.BytesIO()
            torch.save(peft, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        assert same(twin.parameters(), nn.Module.parameters(twin))
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in peft.parameters()}
        twin.eval()
        assert peft.training and not twin.get_base_model().training
        assert twin.get_base_model().num_parameters() == peft.get_base_model().num_parameters()
    assert same(twin.parameters(), nn.Module.parameters(twin))


def test_dropout_is_set_at_every_step(peft):
    """Somebody may have changed its mode alone, and it computes something else then."""
    model = tiny_model("causal", towers=False)
    wet = get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE, lora_dropout=0.1))
    with remembered(wet):
        wet.train()
        dropout = next(m for m in wet.modules() if isinstance(m, nn.Dropout))
        dropout.eval()
        wet.train()
        assert dropout.training


def test_how_many_are_trained_is_counted_each_time(peft):
    base = peft.get_base_model()
    with remembered(peft):
        before = base.num_parameters(only_trainable=True)
        base.model.layers[0].requires_grad_(False)
        assert base.num_parameters(only_trainable=True) < before


def test_a_text_model_in_another_mode_is_set_right(peft):
    base = peft.get_base_model()
    with remembered(peft):
        peft.train()
        base.model.eval()
        peft.train()
        assert all(module.training for module in peft.modules())


def test_a_model_pickled_meanwhile_loads_without_this_package(peft):
    with remembered(peft):
        peft.train()
        pickled = pickle.dumps(peft)
    assert b"gemma_accel" not in pickled
    assert len(list(pickle.loads(pickled).parameters())) == len(list(peft.parameters()))
