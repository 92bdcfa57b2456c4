"""Shared fixtures. CUDA tests run where there is a card; elsewhere the same kernels run under
Triton's interpreter.
"""

from __future__ import annotations

import functools
import gc
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


def _untraced(execute):
    """Of the interpreter's: run a kernel without the tracer of coverage, which leaves the bodies of
    kernels out but is asked about each of their millions of calls.
    """

    @functools.wraps(execute)
    def run(*args, **kwargs):
        tracer = sys.gettrace()
        sys.settrace(None)
        try:
            return execute(*args, **kwargs)
        finally:
            sys.settrace(tracer)

    return run


if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime.interpreter import GridExecutor

    GridExecutor.__call__ = _untraced(GridExecutor.__call__)

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


@pytest.fixture
def trl_on_the_cpu(monkeypatch, tmp_path):
    """TRL's trainers without a card, in a directory of their own; nothing is sent anywhere."""
    from tests import trl_on_cpu

    monkeypatch.setenv("CI", "1")  # TRL's telemetry stays off there
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.chdir(tmp_path)
    trl_on_cpu.install(monkeypatch.setattr)


@pytest.fixture(scope="module")
def quick_collections():
    """Trainer collects garbage when it begins, among millions of objects of imported modules. For
    files that train much and do not look at what is collected.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


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


@pytest.fixture(autouse=True)
def sound_interpreter(monkeypatch):
    """Mends two faults of Triton's interpreter, so that it computes what a card would.

    It truncates float32 to bfloat16 (3.6 to 3.9) where the hardware rounds to nearest even, and
    in 3.6 a loop bound read at run time needs a NumPy older than 2.4.
    """
    from gemma_accel.kernels._triton import interpreting

    if not interpreting():
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast, patch_tensor = builder.cast_impl, interpreter._patch_lang_tensor

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(np.array(src.data)).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(rounded.view(np.uint16), dst_type.scalar)

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(builder, "cast_impl", cast_impl)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)
