"""What surrounds a capture of the decoder stack, where no card is needed to see it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gemma_accel.patches.graphs import _fresh, _is_out_of_memory, _Watch


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.other.weight = self.one.weight
        self.one.bias.requires_grad_(False)


class TestFreshParameters:
    def test_share_the_memory_and_take_the_gradients(self):
        model = Tied()
        weight, bias = model.one.weight, model.other.bias
        with _fresh(model.modules()) as fresh:
            assert list(fresh) == [weight, bias]  # a tied one once, a frozen one not
            assert model.one.weight is model.other.weight is fresh[weight] is not weight
            assert all(new.data_ptr() == old.data_ptr() for old, new in fresh.items())
            model.other(model.one(torch.ones(2, 3))).sum().backward()
            assert all(new.grad is not None for new in fresh.values())
        assert weight.grad is None and bias.grad is None
        assert model.one.weight is model.other.weight is weight and model.other.bias is bias

    def test_the_old_ones_are_back_after_an_error(self):
        model = Tied()
        before = dict(model.named_parameters())
        with pytest.raises(RuntimeError, match="capture"), _fresh(model.modules()):
            raise RuntimeError("a capture failed")
        assert all(p is before[name] for name, p in model.named_parameters())


class TestOutOfMemory:
    def test_is_seen_behind_the_error_that_it_led_to(self):
        try:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        except RuntimeError as error:
            assert _is_out_of_memory(error)

    def test_another_error_is_not(self):
        assert not _is_out_of_memory(RuntimeError("operation not permitted"))
        assert not _is_out_of_memory(None)


class _Event:
    passed = True

    def record(self):
        pass

    def query(self):
        return self.passed


@pytest.mark.parametrize("passed", [True, False])
def test_who_waits_for_whom_is_seen_from_an_event_near_the_end(monkeypatch, passed):
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(_Event, "passed", passed)
    watch = _Watch()
    assert watch.host_bound  # until something else is seen
    watch.begin(10)
    for index in range(1, 9):
        watch.pass_layer(index)
    watch.begin(0)  # an evaluation comes between: nothing was seen
    for index in range(1, 10):
        watch.pass_layer(index)
    assert watch.host_bound
    watch.begin(10)
    for index in range(1, 10):
        watch.pass_layer(index)
    assert watch.host_bound is passed
