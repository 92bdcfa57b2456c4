"""Which towers a run has no use for, as far as its dataset says."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

import gemma_accel
from gemma_accel.memory import tower_shapes
from gemma_accel.patches import towers
from gemma_accel.patches.towers import _park, settle_towers, watch_towers
from tests.tiny import tiny_model


class _Rows(torch.utils.data.Dataset):
    def __init__(self, row):
        self.row = row

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.row


@pytest.mark.parametrize(
    ("row", "parked"),
    [
        ((np.arange(3), np.arange(3)), False),
        ([[3, 4], [3, 4]], False),
        (torch.arange(3), False),
        ({"input_ids": [3, 4]}, True),
        (BatchEncoding({"input_ids": [3, 4]}), True),
    ],
    ids=["tuple", "list", "tensor", "dict", "encoding"],
)
def test_rows_without_names_do_not_say_what_they_hold(row, parked):
    model = tiny_model("conditional").requires_grad_(False)
    said = settle_towers(model, None, _Rows(row))
    assert ("parked on the CPU" if parked else "the dataset does not say") in said
    tower = model.model.vision_tower
    assert (getattr(tower, "_gemma_accel_parked", None) is not None) is parked


def test_a_parked_tower_takes_a_dtype_though_it_stays():
    model = tiny_model("conditional")
    tower = model.model.vision_tower
    _park(tower)
    card = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    tower._apply(lambda x: card)  # as `model.to("cuda", torch.bfloat16)` asks what becomes of it
    weight = next(tower.parameters())
    assert weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    model.to("meta")  # so a model is let go of
    assert next(tower.parameters()).is_meta


class TestMemory:
    """What the language model's policy hears of the towers."""

    @pytest.fixture
    def heard(self):
        model = tiny_model("conditional")
        report = gemma_accel.apply(model, vram_gib=1.0)
        policy = model.model.language_model.memory
        watch_towers(model, policy)
        return model, policy, report

    def test_another_trainer_begins_from_nothing(self, heard):
        model, policy, _ = heard
        policy.expect_media(tower_shapes(model.config)["vision_tower"], 90)
        chosen = policy.chosen[1,] = object()
        watch_towers(model, policy)
        assert not policy.media and chosen not in policy.chosen.values()

    def test_a_tower_is_one_however_it_is_run(self, heard):
        model, policy, _ = heard
        vision, audio = tower_shapes(model.config).values()
        policy.expect_media(dataclasses.replace(vision, replayed=False), 90)
        policy.expect_media(audio, 20)
        policy.expect_media(vision, 50)
        assert policy.media == {vision: 50, audio: 20}

    def test_a_restored_model_lets_go_of_the_policy_and_so_of_graphs(self):
        model = tiny_model("conditional")
        report = gemma_accel.apply(model, vram_gib=1.0)
        watch_towers(model, model.model.language_model.memory)
        alive = weakref.ref(model.model.language_model.memory)
        report.restore()
        gc.collect()
        assert alive() is None
        towers.note_media(model.model.vision_tower.encoder.layers[0], torch.zeros(1, 9, 32))

    @pytest.mark.parametrize("fits", [True, False])
    def test_a_parked_tower_that_comes_back_is_counted(self, heard, fits, monkeypatch):
        model, policy, _ = heard
        tower = model.model.vision_tower
        nbytes = sum(parameter.nbytes for parameter in tower.parameters())
        _park(tower)
        policy.set_fixed(100, 0)

        def to(device):
            if not fits and device != "cpu":
                assert policy.fixed == 100 + nbytes  # before it is there
                raise torch.OutOfMemoryError

        monkeypatch.setattr(tower, "to", to)
        if fits:
            towers._bring_back(tower, torch.device("cuda"))
        else:
            with pytest.raises(torch.OutOfMemoryError):
                towers._bring_back(tower, torch.device("cuda"))
        assert policy.fixed == 100 + nbytes * fits

    def test_an_embedder_has_no_layers_to_hear_of(self, heard):
        embedder = heard[0].model.embed_vision
        _park(embedder)
        towers._bring_back(embedder, torch.device("cpu"))
