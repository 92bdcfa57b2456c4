"""The allocator's settings: asked for where they can be trusted, and taken back."""

from __future__ import annotations

import platform
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

from gemma_accel import allocator


@pytest.fixture
def settings(monkeypatch):
    """What the allocator is told, on a machine that has none."""
    told = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(allocator, "_set", told.append)
    monkeypatch.setattr(allocator, "_growing", set())
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-45-generic")
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    return told


def test_segments_expand_until_the_last_who_asked_takes_it_back(settings):
    undo, again = allocator.expand_segments(), allocator.expand_segments()
    assert settings == ["expandable_segments:True"]
    undo()
    undo()  # a second time is none
    assert settings == ["expandable_segments:True"]
    again()
    assert settings == ["expandable_segments:True", "expandable_segments:False"]


@pytest.fixture
def card(monkeypatch):
    """The fraction of its memory that an 8 GiB card's allocator may have, by device."""
    fractions = {0: 1.0, 1: 0.5}
    monkeypatch.setattr(allocator, "_caps", {})
    for name, function in {
        "current_device": lambda: 1,
        "get_device_properties": lambda index: SimpleNamespace(total_memory=(8 >> index) * 2**30),
        "get_per_process_memory_fraction": lambda index: fractions[index],
        "set_per_process_memory_fraction": lambda value, index: fractions.update({index: value}),
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return fractions


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_limits_the_least_holds_while_it_is_asked_for(card, order):
    device = torch.device("cuda", 0)
    limits = 3.0, 2.0
    undos = [allocator.hold_to(gib, device) for gib in limits]
    assert card[0] == 2 / 8
    first, second = order
    undos[first]()
    undos[first]()
    assert card[0] == limits[second] / 8
    undos[second]()
    assert card[0] == 1.0 and not allocator._caps


def test_a_limit_of_somebody_elses_stays_if_it_is_less(card):
    undo = allocator.hold_to(3.0, torch.device("cpu"))  # the current card's: half of 4 GiB
    assert card == {0: 1.0, 1: 0.5}
    undo()
    assert card == {0: 1.0, 1: 0.5}


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_what_the_user_set_up_stays(settings, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:512")
    allocator.expand_segments()()
    assert settings == []


def test_not_on_wsl2_nor_outside_linux(settings, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(platform, "release", lambda: "6.6.87.2-microsoft-standard-WSL2")
        allocator.expand_segments()()
    monkeypatch.setattr(sys, "platform", "win32")
    allocator.expand_segments()()
    assert settings == []


@pytest.mark.gpu
def test_segments_really_expand():
    script = """
        import torch
        from gemma_accel.allocator import expand_segments

        def expandable():
            torch.cuda.empty_cache()
            kept = torch.empty(64 << 20, device="cuda")
            return [s["is_expandable"] for s in torch.cuda.memory_snapshot() if s["total_size"]]

        undo = expand_segments()
        assert expandable() and all(expandable())
        undo()
        assert not any(expandable())
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
