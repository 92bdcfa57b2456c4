"""Shared fixtures. CUDA tests run where there is a card; elsewhere the same kernels run under
Triton's interpreter.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys

import pytest
import torch

import gemma_accel.kernels

# Before Triton is imported anywhere: without a card, kernels run on the CPU in the interpreter. Ops
# then send CPU tensors through the very kernels; tests of whole models that want the PyTorch
# references ask for the `references` fixture.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Kernels are decided to be interpreted or compiled when they are defined: define them all now,
# before a fixture changes the variable.
for _module in pkgutil.iter_modules(gemma_accel.kernels.__path__):
    importlib.import_module(f"gemma_accel.kernels.{_module.name}")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def references(monkeypatch):
    """CPU tensors take the PyTorch references, as they do for a user without a GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch):
    """Fills what the package allocates with ``torch.empty`` with NaN: an element no kernel wrote is
    then a failure.
    """
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poison(*args, _original=original, **kwargs):
            out = _original(*args, **kwargs)
            if (
                sys._getframe(1).f_globals.get("__name__", "").startswith("gemma_accel")
                and out.is_floating_point()
            ):
                out.fill_(float("nan"))
            return out

        monkeypatch.setattr(torch, name, poison)
