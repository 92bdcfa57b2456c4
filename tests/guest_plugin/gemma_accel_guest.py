"""A guest of gemma_accel: pools an image's patches by adding them up, and leaves audio stock.

A plugin is a module (or an object) whose functions bear `@hookimpl`. Installing the distribution
that names it under the entry-point group ``gemma_accel`` is all it takes; uninstalling it takes it
away.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionPooler

from gemma_accel import Patch, hookimpl


class AddingPooler(Gemma4VisionPooler):
    """Stock multiplies with a matrix of ones and zeros, patches by soft tokens; this adds."""

    def _avg_pool_by_positions(
        self, hidden_states: Tensor, pixel_position_ids: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        k = int((hidden_states.shape[1] // length) ** 0.5)
        places = pixel_position_ids.clamp(min=0)
        width = places[..., 0].amax(-1, keepdim=True) + 1
        places = places.div(k, rounding_mode="floor")
        places = places[..., 0] + width // k * places[..., 1]
        batch, _, size = hidden_states.shape
        pooled = torch.zeros(batch, length, size, device=hidden_states.device)
        patches = hidden_states.float() / k**2
        pooled = pooled.scatter_add(1, places[..., None].expand_as(patches), patches)
        seen = torch.zeros(batch, length, dtype=torch.bool, device=hidden_states.device)
        return pooled.to(hidden_states.dtype), seen.scatter(1, places, True)


class AddingPoolerPatch(Patch):
    """Joins the seam, the pooler's class, to what goes there, and knows the way back."""

    name, modality = "guest_pooler", "vision"

    def matches(self, path: str, module: nn.Module) -> bool:
        return type(module) is Gemma4VisionPooler

    def why_not(self, module: nn.Module) -> str | None:
        return "another library bound its own forward here" if "forward" in vars(module) else None

    def install(self, module: nn.Module) -> Any:
        module.__class__ = AddingPooler

        def undo() -> None:
            module.__class__ = Gemma4VisionPooler

        return undo


@hookimpl
def gemma_accel_patches() -> list[Patch]:
    return [AddingPoolerPatch()]


@hookimpl
def gemma_accel_select(patch: Patch, path: str, module: nn.Module) -> bool | None:
    return False if patch.modality == "audio" else None


@hookimpl
def gemma_accel_applied(model: nn.Module, report: Any) -> None:
    report.note("guest", f"pooled by addition in {_places(report)} place(s), audio left alone")


def _places(report: Any) -> int:
    return sum(record.patch == AddingPoolerPatch.name for record in report.applied)
