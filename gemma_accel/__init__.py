"""Fine-tune Gemma 4 on the GPU you already own.

    from gemma_accel import apply report = apply(model)            # before the trainer is built;
    everything else stays a stock script

Importing this package changes nothing and loads nothing heavy: names are resolved when they are
first used (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "GradientAccumulationCallback": "gemma_accel.callback",
    "Patch": "gemma_accel.hookspecs",
    "Plan": "gemma_accel.planner",
    "Report": "gemma_accel.report",
    "Verification": "gemma_accel.verification",
    "UnsupportedModelError": "gemma_accel.errors",
    "apply": "gemma_accel.patching",
    "hookimpl": "gemma_accel.hookspecs",
    "plan": "gemma_accel.planner",
    "verify": "gemma_accel.verification",
}

__all__ = [*_HOME, "hookspecs"]  # noqa: F822 - resolved by __getattr__

if TYPE_CHECKING:
    from gemma_accel import hookspecs as hookspecs
    from gemma_accel.callback import GradientAccumulationCallback as GradientAccumulationCallback
    from gemma_accel.errors import UnsupportedModelError as UnsupportedModelError
    from gemma_accel.hookspecs import Patch as Patch
    from gemma_accel.hookspecs import hookimpl as hookimpl
    from gemma_accel.patching import apply as apply
    from gemma_accel.planner import Plan as Plan
    from gemma_accel.planner import plan as plan
    from gemma_accel.report import Report as Report
    from gemma_accel.verification import Verification as Verification
    from gemma_accel.verification import verify as verify


def __getattr__(name: str) -> Any:
    import importlib

    if name == "hookspecs":
        return importlib.import_module("gemma_accel.hookspecs")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
