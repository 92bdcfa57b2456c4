"""LoRA on NF4 or dense weights as one autograd step a group: the projections' seam of the fused
attention, MLP and decoder layer.

PEFT runs base, A, B, scale and add as launches of their own and keeps their inputs. What a layer's
linears really compute is read from them at call time (`projections`); a group that cannot be read
runs module by module as stock does, and `stepped_aside` gives the reason for the report.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4TextAttention,
    Gemma4TextDecoderLayer,
    Gemma4TextMLP,
    Gemma4TextModel,
)

from gemma_accel.hookspecs import Patch
from gemma_accel.kernels.lora import Projection
from gemma_accel.kernels.mlp import gated_mlp
from gemma_accel.patches.decoder import FusedGemma4TextMLP, Projector
from gemma_accel.patches.projections import (
    as_projection,
    project_modules,
    read_all,
    several_dtypes,
)
from gemma_accel.patches.seams import Fused, Undoing, set_attribute

__all__ = ["FusedProjector", "lora_patch", "stepped_aside"]


class FusedProjector(Projector):
    """Runs linear layers as one step where all of them can be read, else each by its own
    forward.
    """

    def __call__(self, x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
        return project_modules(x, *linears)

    def gated_mlp(self, mlp: FusedGemma4TextMLP, x: Tensor) -> Tensor:
        projections = read_all((mlp.gate_proj, mlp.up_proj, mlp.down_proj), x)
        if projections is None:
            return super().gated_mlp(mlp, x)
        return gated_mlp(x, *projections, keep=mlp.keep, tile=mlp.tile)


_GROUPS = {
    Gemma4TextAttention: ("qk_norm_rope", ("q_proj", "k_proj", "v_proj", "o_proj")),
    Gemma4TextMLP: ("geglu", ("gate_proj", "up_proj", "down_proj")),
    Gemma4TextDecoderLayer: ("decoder_layer", ("per_layer_input_gate", "per_layer_projection")),
}


def _group(module: nn.Module) -> tuple[str, tuple[str, ...]] | None:
    return _GROUPS.get(type(module).stock if isinstance(module, Fused) else type(module))


class LoraPatch(Patch):
    """Sets the projections' seam of the fused attention, MLP and decoder layer."""

    name, modality, seam = "lora", "text", "project"

    def matches(self, path: str, module: nn.Module) -> bool:
        return _group(module) is not None

    def needs(self, module: nn.Module) -> str | None:
        group = _group(module)
        return group[0] if group else None

    def install(self, module: nn.Module) -> Undoing:
        return set_attribute(module, "project", _projector)


_projector = FusedProjector()
lora_patch = LoraPatch()


def stepped_aside(base: nn.Module, x: Tensor | None = None) -> Iterator[tuple[str, str]]:
    """Paths of linear layers that the fused step would call as they are now, each with the
    reason; for inputs of ``x``'s dtype where it is given.
    """
    for path, module in base.named_modules():
        if isinstance(vars(module).get("project"), FusedProjector):
            group = _group(module)
            names = group[1] if group else ()
        elif isinstance(module, Fused) and type(module).stock is Gemma4TextModel:
            names = ("per_layer_model_projection",)
        else:
            continue
        linears = {n: each for n in names if (each := getattr(module, n, None)) is not None}
        seen = {name: as_projection(linear, x) for name, linear in linears.items()}
        refused = {name: reason for name, reason in seen.items() if isinstance(reason, str)}
        readable = [
            projection for projection in seen.values() if isinstance(projection, Projection)
        ]
        if x is not None and not refused and several_dtypes(readable):
            refused = dict.fromkeys(seen, "adapters of one input differ in dtype")
        for name, reason in refused.items():
            yield f"{path}.{name}", reason
