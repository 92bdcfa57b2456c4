"""The vision modality: the encoder's layers, and the table of contents of its patches.

A stock layer launches about ninety elementwise kernels: fourteen clamps around its seven products,
seven norms, two rotations in two dimensions. Here there are six: the pre-norm with the clamp of
what it feeds; q, k and v's clamps, norms and rotation; attention's clamp; each joint with the
clamps on its two sides; the gated activation with its three. What a product takes is held by
whoever made it, what it gives by whoever takes it, so no clamp is a pass of its own. Attention is
told which patches are there, where SDPA needs a mask of patches by patches.

A frozen tower needs no patch to stay out of autograd: its pixels want no gradient and its ops keep
nothing then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4VisionAttention,
    Gemma4VisionEncoderLayer,
    Gemma4VisionMLP,
    eager_attention_forward,
)

from gemma_accel.hookspecs import Patch, hookimpl
from gemma_accel.kernels._triton import use_kernel
from gemma_accel.kernels.clip import EVERYTHING, Range, clip
from gemma_accel.kernels.clip_geglu import clip_geglu
from gemma_accel.kernels.clip_norm import clip_norm
from gemma_accel.kernels.clip_norm_add import clip_norm_add
from gemma_accel.kernels.vision_attention import supported, vision_attention
from gemma_accel.kernels.vision_qkv import vision_qkv
from gemma_accel.patches.activations import why_not_gelu
from gemma_accel.patches.attention import warn_of_stock
from gemma_accel.patches.clipped import (
    FusedGemma4ClippableLinear,
    TowerLora,
    TowerSwap,
    call_each,
    clipped_adapters_patch,
    held,
    project_held,
    shared_input,
    watched,
)
from gemma_accel.patches.dtypes import why_not_dtype
from gemma_accel.patches.norms import are_norms
from gemma_accel.patches.seams import ClassSwap, Fused
from gemma_accel.patches.towers import note_media

__all__ = [
    "FusedGemma4VisionAttention",
    "FusedGemma4VisionEncoderLayer",
    "FusedGemma4VisionMLP",
    "gemma_accel_patches",
]


class FusedGemma4VisionAttention(Fused, Gemma4VisionAttention):
    project = staticmethod(call_each)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Any = None,
        *,
        joined: bool = False,
        **kwargs: Any,
    ) -> Any:
        if not joined and not self.joins():
            return super().forward(
                hidden_states, position_embeddings, attention_mask, position_ids, **kwargs
            )
        (query, key, value), ranges = self._qkv(hidden_states, *position_embeddings, joined=joined)
        out, weights = self._attend(query, key, value, attention_mask, **kwargs)
        out = out.reshape(*hidden_states.shape[:-1], -1)
        out = clip(out, ranges[3].input)
        (out,) = self.project(out, self.o_proj.linear)
        return (out if joined else clip(out, self.gives(out))), weights

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, N, H] from the kernel where it fits, else from whichever attention is set."""
        if use_kernel(query):
            reason = self._refusal(query, key, mask)
            if reason is None:
                # the encoder's mask is the same for every query: which patches are there
                seen = None if mask is None else mask[:, 0, 0]
                return vision_attention(query, key, value, seen), None
            if self.training:
                warn_of_stock(f"in the vision tower, {reason}")
        dropout = self.attention_dropout if self.training else 0.0
        implementation = self.config._attn_implementation
        return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)(
            self,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            mask,
            dropout=dropout,
            scaling=self.scaling,
            **kwargs,
        )

    def _refusal(self, query: Tensor, key: Tensor, mask: Tensor | None) -> str | None:
        """Why the kernel cannot serve these [B, T, N, H]."""
        if (implementation := self.config._attn_implementation) != "sdpa":
            return f"the attention that was asked for is {implementation!r}"
        if mask is not None and mask.dtype != torch.bool:
            return f"the mask's dtype is {mask.dtype}"
        if self.training and self.attention_dropout:
            return f"attention_dropout is {self.attention_dropout}"
        if self.scaling != 1.0:
            return f"the scale is {self.scaling}"
        return supported(query, key)

    def joins(self) -> bool:
        """Whether the modules inside are what their ops stand in for: PEFT and hooks may differ."""
        norms = self.q_norm, self.k_norm, self.v_norm
        return are_norms(*norms) and not watched(*self._own())

    def takes(self, x: Tensor) -> Range:
        """Where a layer is to hold this block's input, in the dtype of ``x``."""
        return shared_input(*self._held(x)[:3]) or EVERYTHING

    def gives(self, x: Tensor) -> Range:
        """Where a layer is to hold this block's output ``x``."""
        return self._held(x)[3].output

    def _own(self) -> tuple[Any, ...]:
        return self.q_proj, self.k_proj, self.v_proj, self.o_proj

    def _held(self, x: Tensor) -> Any:
        return held(self, self._own(), x.dtype)

    def _qkv(self, x: Tensor, cos: Tensor, sin: Tensor, *, joined: bool) -> tuple[Any, Any]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], normed, and the first two turned;
        and the ranges in their dtype."""
        own = self._own()
        ranges = held(self, own, x.dtype)
        products = project_held(self.project, x, own[:3], ranges[:3], is_held=joined)
        if products[0].dtype != x.dtype:  # under autocast
            ranges = held(self, own, products[0].dtype)
        shape = (*x.shape[:-1], -1, self.head_dim)
        query, key, value = (product.view(shape) for product in products)
        turned = vision_qkv(
            query,
            key,
            value,
            self.q_norm.weight,
            self.k_norm.weight,
            cos,
            sin,
            eps=self.q_norm.eps,
            q_range=ranges[0].output,
            k_range=ranges[1].output,
            v_range=ranges[2].output,
        )
        return turned, ranges


class FusedGemma4VisionMLP(Fused, Gemma4VisionMLP):
    project = staticmethod(call_each)

    def forward(self, x: Tensor, *, joined: bool = False) -> Tensor:
        if not joined and not self.joins():
            return super().forward(x)
        own = self._own()
        ranges = held(self, own, x.dtype)
        gate, up = project_held(self.project, x, own[:2], ranges[:2], is_held=joined)
        if gate.dtype != x.dtype:  # under autocast
            ranges = held(self, own, gate.dtype)
        x = clip_geglu(
            gate,
            up,
            gate_range=ranges[0].output,
            up_range=ranges[1].output,
            after=ranges[2].input,
        )
        (x,) = self.project(x, own[2].linear)
        return x if joined else clip(x, self.gives(x))

    def joins(self) -> bool:
        return not watched(*self._own()) and why_not_gelu(self.act_fn) is None

    def takes(self, x: Tensor) -> Range:
        return shared_input(*self._held(x)[:2]) or EVERYTHING

    def gives(self, x: Tensor) -> Range:
        return self._held(x)[2].output

    def _own(self) -> tuple[Any, ...]:
        return self.gate_proj, self.up_proj, self.down_proj

    def _held(self, x: Tensor) -> Any:
        return held(self, self._own(), x.dtype)


class FusedGemma4VisionEncoderLayer(Fused, Gemma4VisionEncoderLayer):
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        note_media(self, hidden_states)
        attention: Any = self.self_attn
        mlp: Any = self.mlp
        if not self._joins(attention, mlp):
            return super().forward(
                hidden_states, position_embeddings, attention_mask, position_ids, **kwargs
            )
        first, second = self.input_layernorm, self.pre_feedforward_layernorm
        attended, _ = attention(
            hidden_states=clip_norm(
                hidden_states,
                first.weight,
                eps=first.eps,
                after=attention.takes(hidden_states),
            ),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            joined=True,
            **kwargs,
        )
        norm = self.post_attention_layernorm
        hidden_states, normed = clip_norm_add(
            attended,
            hidden_states,
            norm.weight,
            second.weight,
            eps=norm.eps,
            before=attention.gives(attended),
            after=mlp.takes(hidden_states),
        )
        out = mlp(normed, joined=True)
        norm = self.post_feedforward_layernorm
        return clip_norm_add(out, hidden_states, norm.weight, eps=norm.eps, before=mlp.gives(out))

    def _joins(self, attention: Any, mlp: Any) -> bool:
        norms = (
            self.input_layernorm,
            self.post_attention_layernorm,
            self.pre_feedforward_layernorm,
            self.post_feedforward_layernorm,
        )
        return (
            isinstance(attention, FusedGemma4VisionAttention)
            and isinstance(mlp, FusedGemma4VisionMLP)
            and attention.joins()
            and mlp.joins()
            and are_norms(*norms)
        )


def _why_not_attention(attention: Gemma4VisionAttention) -> str | None:
    if attention.head_dim % 4:
        return f"heads are {attention.head_dim} wide; the kernel turns them by quarters"
    return why_not_dtype(attention.q_norm.weight)


def _why_not_mlp(mlp: Gemma4VisionMLP) -> str | None:
    return why_not_gelu(mlp.act_fn)


def _why_not_layer(layer: Gemma4VisionEncoderLayer) -> str | None:
    return why_not_dtype(layer.input_layernorm.weight)


@hookimpl
def gemma_accel_patches() -> list[Patch]:
    return [
        clipped_adapters_patch,
        TowerSwap("vision_clipped_linear", "vision", "vision_tower", FusedGemma4ClippableLinear),
        ClassSwap("vision_attention", "vision", FusedGemma4VisionAttention, _why_not_attention),
        ClassSwap("vision_mlp", "vision", FusedGemma4VisionMLP, _why_not_mlp),
        ClassSwap("vision_layer", "vision", FusedGemma4VisionEncoderLayer, _why_not_layer),
        TowerLora(
            "vision_lora",
            "vision",
            {Gemma4VisionAttention: "vision_attention", Gemma4VisionMLP: "vision_mlp"},
        ),
    ]
