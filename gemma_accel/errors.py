"""What can go wrong, by name. Every message says what was expected, what was there, and what to
do.
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "ForeignPatchError",
    "GemmaAccelError",
    "KernelError",
    "PatchConflictError",
    "PatchError",
    "PluginError",
    "RestoreError",
    "SkippedPatchError",
    "UnsupportedModelError",
    "UnsupportedTrainingError",
]


class GemmaAccelError(Exception):
    """The base of everything this package raises on purpose."""


class UnsupportedModelError(GemmaAccelError, TypeError):
    """`apply` was given something that is not a Gemma 4 model it knows."""


class UnsupportedTrainingError(GemmaAccelError):
    """A Trainer would run an applied model in a way that is not known to compute the same."""


class ForeignPatchError(GemmaAccelError):
    """Somebody else (Liger, Unsloth, accelerate's offloading) already changed the modules that
    would be patched.
    """


class PatchConflictError(GemmaAccelError):
    """Two patches want the same seam of the same module."""


class PluginError(GemmaAccelError):
    """A plugin's hook raised, or offered something that is not a patch."""


class PatchError(GemmaAccelError):
    """A patch failed while it was being installed; the model is stock again."""


class KernelError(GemmaAccelError, RuntimeError):
    """A kernel could not be built or launched on this card."""


class SkippedPatchError(GemmaAccelError):
    """`strict=True` and a patch would have been skipped on a CUDA device."""


class RestoreError(GemmaAccelError):
    """Somebody wrapped a patched module since; undoing the patch would throw their change away."""


class BudgetError(GemmaAccelError, ValueError):
    """No arrangement of the model fits the memory it was given."""
