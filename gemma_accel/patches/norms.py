"""Gemma4RMSNorm on one kernel, wherever it stands alone: text, vision tower, multimodal embedders.

Where a norm stands beside a residual or a rotation, the decoder-layer and attention patches take
its weight instead and this class's forward does not run.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

from gemma_accel.kernels.rms_norm import rms_norm
from gemma_accel.patches.dtypes import why_not_dtype
from gemma_accel.patches.seams import ClassSwap, Fused, is_watched

__all__ = ["FusedGemma4RMSNorm", "are_norms", "rms_norm_patch"]


class FusedGemma4RMSNorm(Fused, Gemma4RMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight if self.with_scale else None, self.eps)


def are_norms(*norms: nn.Module) -> bool:
    """Whether all are stock's norm and no more, so that an op may take their weights: not wrapped
    by PEFT, no subclass of somebody's, not watched.
    """
    return all(
        type(norm) in (Gemma4RMSNorm, FusedGemma4RMSNorm) and not is_watched(norm) for norm in norms
    )


def _why_not(norm: Gemma4RMSNorm) -> str | None:
    return why_not_dtype(norm.weight) if norm.with_scale else None


rms_norm_patch = ClassSwap("rms_norm", "text", FusedGemma4RMSNorm, _why_not)
