"""What is only tried leaves no trace."""

from __future__ import annotations

from collections import defaultdict, deque

import pytest
import torch

from gemma_accel.trials import untouched


class Tally:
    shared: list[float] = []

    def __init__(self):
        self.calls = 0
        self.metrics = {"train": defaultdict(list)}
        self.recent = deque([1, 2], maxlen=2)
        self.seen = {1}
        self.mean = torch.zeros(2)
        self.data = list(range(5000))

    def count(self):
        self.calls += 1
        self.metrics["train"]["loss"].append(1.0)
        self.metrics["eval"] = {}
        self.recent.append(3)
        self.seen.add(2)
        self.mean += 1
        self.shared.append(1.0)
        self.data[0] = -1
        self.new = 1


def test_counts_lists_and_small_tensors_are_put_back():
    tally, loss = Tally(), lambda: None
    loss.calls = 0
    train = tally.metrics["train"]
    with pytest.raises(RuntimeError), untouched(tally, loss, None):
        tally.count()
        loss.calls += 1
        raise RuntimeError("and after an error too")
    assert tally.calls == loss.calls == 0 and not hasattr(tally, "new")
    assert tally.metrics == {"train": {}} and tally.metrics["train"] is train
    assert list(tally.recent) == [1, 2] and tally.seen == {1} and not Tally.shared
    assert tally.mean.tolist() == [0, 0]
    assert tally.data[0] == -1  # five thousand entries are no tally
