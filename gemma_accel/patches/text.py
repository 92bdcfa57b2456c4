"""The text modality: what is replaced, in the order of installation."""

from __future__ import annotations

from gemma_accel.hookspecs import Patch, hookimpl
from gemma_accel.patches.attention import attention_patch
from gemma_accel.patches.checkpointing import checkpointing_patch, graphs_patch
from gemma_accel.patches.decoder import decoder_layer_patch, geglu_patch, qk_norm_rope_patch
from gemma_accel.patches.lm_head import lm_head_patch
from gemma_accel.patches.lora import lora_patch
from gemma_accel.patches.norms import rms_norm_patch
from gemma_accel.patches.per_layer import per_layer_patch

__all__ = ["gemma_accel_patches"]


@hookimpl
def gemma_accel_patches() -> list[Patch]:
    return [
        rms_norm_patch,
        qk_norm_rope_patch,
        geglu_patch,
        decoder_layer_patch,
        per_layer_patch,
        lora_patch,
        attention_patch,
        checkpointing_patch,
        graphs_patch,
        lm_head_patch,
    ]
