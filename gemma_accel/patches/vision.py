"""The vision modality: what is replaced, in the order of installation."""

from __future__ import annotations

from gemma_accel.hookspecs import Patch, hookimpl
from gemma_accel.patches.clipped import clipped_adapters_patch

__all__ = ["gemma_accel_patches"]


@hookimpl
def gemma_accel_patches() -> list[Patch]:
    return [clipped_adapters_patch]
