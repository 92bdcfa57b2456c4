"""The audio modality: the conformer's layers, and the table of contents of its patches.

Thirty seconds of sound are 750 tokens, too few to keep a card busy: stock launches about a hundred
and eighty kernels a layer, most of them clamps, norms and the windows of its attention, and the
host cannot launch them as fast as they run. Here a layer's elementwise work is ten launches and its
attention one. What a product takes is clamped by whoever made it, what it gives by whoever takes
it; the clamps that keep a float16 from overflowing ride along.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4AudioAttention,
    Gemma4AudioCausalConv1d,
    Gemma4AudioFeedForward,
    Gemma4AudioLayer,
    Gemma4AudioLightConv1d,
    Gemma4AudioModel,
)

from gemma_accel.hookspecs import Patch, hookimpl
from gemma_accel.kernels.chunked_attention import Chunks, chunked_attention
from gemma_accel.kernels.clip import EVERYTHING, Range, clip
from gemma_accel.kernels.clip_norm import clip_norm
from gemma_accel.kernels.clip_norm_add import clip_norm_add
from gemma_accel.kernels.clip_silu import clip_silu
from gemma_accel.kernels.light_conv import light_conv
from gemma_accel.patches.activations import why_not_silu
from gemma_accel.patches.clipped import (
    FusedGemma4ClippableLinear,
    TowerLora,
    TowerSwap,
    call_each,
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
    "FusedGemma4AudioAttention",
    "FusedGemma4AudioFeedForward",
    "FusedGemma4AudioLayer",
    "FusedGemma4AudioLightConv1d",
    "FusedGemma4AudioModel",
    "gemma_accel_patches",
]


def _bounds(module: Any, x: Tensor) -> Range:
    """The conformer's own clamp against overflow, in the dtype of ``x``."""
    limit = min(module.gradient_clipping, torch.finfo(x.dtype).max)
    return Range(-limit, limit)


def _within(first: Range, second: Range) -> Range:
    """One clamp for two, one after the other, whose ranges overlap."""
    return Range(max(first.low, second.low), min(first.high, second.high))


class FusedGemma4AudioAttention(Fused, Gemma4AudioAttention):
    project = staticmethod(call_each)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Tensor,
        attention_mask: Tensor | None = None,
        *,
        joined: bool = False,
    ) -> tuple[Tensor, None]:
        if not joined and not self.joins():
            return super().forward(hidden_states, position_embeddings, attention_mask)
        own = self._own()
        ranges = held(self, own, hidden_states.dtype)
        products = project_held(self.project, hidden_states, own[:3], ranges[:3], is_held=joined)
        if products[0].dtype != hidden_states.dtype:  # under autocast
            ranges = held(self, own, products[0].dtype)
        by_head = (self.num_heads, self.head_dim)
        query, key, value = (product.unflatten(-1, by_head) for product in products)
        relative = self.relative_k_proj(position_embeddings)
        out = chunked_attention(
            query,
            key,
            value,
            relative.view(-1, *by_head),
            self.q_scale * F.softplus(self.per_dim_scale.float()),
            attention_mask,
            self._chunks(),
            q_range=ranges[0].output,
            k_range=ranges[1].output,
            v_range=ranges[2].output,
            after=ranges[3].input,
        )
        (out,) = self.project(out.flatten(2), own[3].linear)
        return (out if joined else clip(out, self.gives(out))), None

    def joins(self) -> bool:
        """Whether the modules inside are what their op stands in for, and no one wants weights."""
        return not self._forward_hooks and not watched(*self._own())

    def takes(self, x: Tensor) -> Range:
        """Where a layer is to hold this block's input, in the dtype of ``x``."""
        return shared_input(*self._held(x)[:3]) or EVERYTHING

    def gives(self, x: Tensor) -> Range:
        """Where a layer is to hold this block's output ``x``."""
        return self._held(x)[3].output

    def _own(self) -> tuple[Any, ...]:
        return self.q_proj, self.k_proj, self.v_proj, self.post

    def _held(self, x: Tensor) -> Any:
        return held(self, self._own(), x.dtype)

    def _chunks(self) -> Chunks:
        return Chunks(
            self.chunk_size,
            self.max_past_horizon,
            self.max_future_horizon,
            self.k_scale,
            self.attention_logits_soft_cap,
            self.config.attention_invalid_logits_value,
        )


class FusedGemma4AudioFeedForward(Fused, Gemma4AudioFeedForward):
    project = staticmethod(call_each)

    def forward(self, hidden_states: Tensor) -> Any:
        own = self.ffw_layer_1, self.ffw_layer_2
        before, after = self.pre_layer_norm, self.post_layer_norm
        if watched(*own) or not are_norms(before, after) or why_not_silu(self.act_fn) is not None:
            return super().forward(hidden_states)
        first, second = held(self, own, hidden_states.dtype)
        x = clip_norm(
            hidden_states,
            before.weight,
            eps=before.eps,
            before=_bounds(self, hidden_states),
            after=first.input,
        )
        (x,) = self.project(x, own[0].linear)
        if x.dtype != hidden_states.dtype:  # under autocast
            first, second = held(self, own, x.dtype)
        x = clip_silu(x, before=first.output, after=second.input)
        (x,) = self.project(x, own[1].linear)
        return clip_norm_add(
            x,
            hidden_states,
            after.weight,
            eps=after.eps,
            scale=self.post_layer_scale,
            before=_within(second.output, _bounds(self, x)),
        )


class FusedGemma4AudioLightConv1d(Fused, Gemma4AudioLightConv1d):
    project = staticmethod(call_each)

    def forward(self, hidden_states: Tensor, *, normed: Tensor | None = None) -> Tensor:
        if normed is None:
            if not self.joins():
                return super().forward(hidden_states)
            norm = self.pre_layer_norm
            normed = clip_norm(
                hidden_states, norm.weight, eps=norm.eps, after=self.takes(hidden_states)
            )
        (x,) = self.project(normed, self.linear_start.linear)
        start, end = self._held(x)
        x = light_conv(
            x,
            self.depthwise_conv1d.weight,
            self.conv_norm.weight,
            eps=self.conv_norm.eps,
            before=start.output,
            middle=_bounds(self, x),
            after=end.input,
        )
        (x,) = self.project(x, self.linear_end.linear)
        return hidden_states + clip(x, end.output)

    def joins(self) -> bool:
        return (
            type(self.depthwise_conv1d) is Gemma4AudioCausalConv1d
            and not self.depthwise_conv1d._forward_hooks
            and are_norms(self.pre_layer_norm, self.conv_norm)
            and why_not_silu(self.act_fn) is None
            and not watched(*self._own())
        )

    def takes(self, x: Tensor) -> Range:
        return self._held(x)[0].input

    def _own(self) -> tuple[Any, ...]:
        return self.linear_start, self.linear_end

    def _held(self, x: Tensor) -> Any:
        return held(self, self._own(), x.dtype)


class FusedGemma4AudioLayer(Fused, Gemma4AudioLayer):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any,
        position_embeddings: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        note_media(self, hidden_states)
        attention: Any = self.self_attn
        conv: Any = self.lconv1d
        if not self._joins(attention, conv):
            return super().forward(hidden_states, attention_mask, position_embeddings, **kwargs)
        hidden_states = self.feed_forward1(hidden_states)
        norm = self.norm_pre_attn
        attended, _ = attention(
            hidden_states=clip_norm(
                hidden_states,
                norm.weight,
                eps=norm.eps,
                before=_bounds(self, hidden_states),
                after=attention.takes(hidden_states),
            ),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            joined=True,
        )
        norm = self.norm_post_attn
        hidden_states, normed = clip_norm_add(
            attended,
            hidden_states,
            norm.weight,
            conv.pre_layer_norm.weight,
            eps=norm.eps,
            before=_within(attention.gives(attended), _bounds(self, attended)),
            after=conv.takes(hidden_states),
        )
        hidden_states = self.feed_forward2(conv(hidden_states, normed=normed))
        norm = self.norm_out
        bounds = _bounds(self, hidden_states)
        return clip_norm(hidden_states, norm.weight, eps=norm.eps, before=bounds)

    def _joins(self, attention: Any, conv: Any) -> bool:
        norms = self.norm_pre_attn, self.norm_post_attn, self.norm_out
        return (
            isinstance(attention, FusedGemma4AudioAttention)
            and isinstance(conv, FusedGemma4AudioLightConv1d)
            and attention.joins()
            and conv.joins()
            and are_norms(*norms)
            and self.norm_post_attn.eps == conv.pre_layer_norm.eps  # one launch takes both
        )


class FusedGemma4AudioModel(Fused, Gemma4AudioModel):
    """Transformers 5.17 reads its blocked mask as booleans, but with ``eager`` attention the mask
    comes additive, so that everything masked is seen and nothing else. Here it comes as booleans
    either way; the losses of such a run differ from stock's, which are wrong."""

    def _convert_4d_mask_to_blocked_5d(self, mask_4d: Tensor) -> Tensor:
        if mask_4d.is_floating_point():
            mask_4d = mask_4d == 0
        return super()._convert_4d_mask_to_blocked_5d(mask_4d)


def _why_not_attention(attention: Gemma4AudioAttention) -> str | None:
    return why_not_dtype(attention.per_dim_scale)


def _why_not_feed_forward(module: Any) -> str | None:
    return why_not_silu(module.act_fn) or why_not_dtype(module.pre_layer_norm.weight)


def _why_not_conv(module: Gemma4AudioLightConv1d) -> str | None:
    conv = module.depthwise_conv1d
    if conv.bias is not None or conv.stride != (1,) or conv.dilation != (1,):
        return "the convolution has a bias, a stride or a dilation; the kernel's has none"
    return _why_not_feed_forward(module)


def _why_not_layer(layer: Gemma4AudioLayer) -> str | None:
    return why_not_dtype(layer.norm_pre_attn.weight)


def _mask_patches() -> list[Patch]:
    """Needed where stock reads booleans: newer versions take the additive mask alone."""
    if not Gemma4AudioModel._supports_sdpa:
        return []
    return [ClassSwap("audio_eager_mask", "audio", FusedGemma4AudioModel)]


@hookimpl
def gemma_accel_patches() -> list[Patch]:
    return [
        *_mask_patches(),
        TowerSwap("audio_clipped_linear", "audio", "audio_tower", FusedGemma4ClippableLinear),
        ClassSwap("audio_attention", "audio", FusedGemma4AudioAttention, _why_not_attention),
        ClassSwap(
            "audio_feed_forward", "audio", FusedGemma4AudioFeedForward, _why_not_feed_forward
        ),
        ClassSwap("audio_light_conv", "audio", FusedGemma4AudioLightConv1d, _why_not_conv),
        ClassSwap("audio_layer", "audio", FusedGemma4AudioLayer, _why_not_layer),
        TowerLora(
            "audio_lora",
            "audio",
            {
                Gemma4AudioAttention: "audio_attention",
                Gemma4AudioFeedForward: "audio_feed_forward",
                Gemma4AudioLightConv1d: "audio_light_conv",
            },
        ),
    ]
