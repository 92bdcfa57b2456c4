"""The allocator's settings: asked for where they can be trusted, and taken back."""

from __future__ import annotations

import platform
import subprocess
import sys
import textwrap

import pytest
import torch

from gemma_accel import allocator


@pytest.fixture
def settings(monkeypatch):
    """What the allocator is told, on a machine that has none."""
    told = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(allocator, "_set", told.append)
    monkeypatch.setattr(allocator, "_expanding", False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-45-generic")
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    return told


def test_segments_expand_once_and_the_one_who_asked_takes_it_back(settings):
    undo = allocator.expand_segments()
    again = allocator.expand_segments()
    assert settings == ["expandable_segments:True"]
    again()
    assert settings == ["expandable_segments:True"]
    undo()
    assert settings == ["expandable_segments:True", "expandable_segments:False"]


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
