"""Which towers a run has no use for, as far as its dataset says."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from gemma_accel.patches.towers import _park, settle_towers
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
