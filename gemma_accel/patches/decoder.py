"""The text decoder layer: attention's norms and RoPE, the gated MLP, and the joints where a norm
meets a residual.

A stock layer launches about forty elementwise kernels, most of them the seven RMSNorms at five
passes each. Here the q, k and v norms and the rotation are one launch, the activation and its
product another, and each joint (post-norm, residual add, layer scalar, next pre-norm) one more.
Projections and attention itself are called through two seams of their own, `project` and
Transformers' attention registry, so that their patches need not know this one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4RMSNorm,
    Gemma4TextAttention,
    Gemma4TextDecoderLayer,
    Gemma4TextMLP,
    eager_attention_forward,
)

from gemma_accel.kernels.geglu import geglu
from gemma_accel.kernels.norm_add import norm_add
from gemma_accel.kernels.qk_norm_rope import qkv_norm_rope
from gemma_accel.kernels.rms_norm import rms_norm
from gemma_accel.patches.activations import why_not_gelu
from gemma_accel.patches.dropout import draws
from gemma_accel.patches.dtypes import why_not_dtype
from gemma_accel.patches.head_groups import attend_in_groups, readable_by_heads, rotary_pairs
from gemma_accel.patches.norms import are_norms
from gemma_accel.patches.per_layer import LayerInput
from gemma_accel.patches.seams import ClassSwap, Fused

__all__ = [
    "FusedGemma4TextAttention",
    "FusedGemma4TextDecoderLayer",
    "FusedGemma4TextMLP",
    "Projector",
    "decoder_layer_patch",
    "geglu_patch",
    "left_to_stock",
    "qk_norm_rope_patch",
]

CACHE = (
    "cache"
    if "cache" in inspect.signature(Gemma4TextAttention.forward).parameters
    else "past_key_values"
)
"""What stock calls the argument: the former since transformers 5.24."""


_NORMS = "a norm is wrapped (by PEFT's modules_to_save, LN tuning), another class, or watched"


class Projector:
    """How a fused module runs its linear layers: as stock does, one module call each. The `lora`
    patch sets another.
    """

    def __call__(self, x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
        """``linear(x)`` of projections that share an input."""
        return tuple(linear(x) for linear in linears)

    def gated_mlp(self, mlp: FusedGemma4TextMLP, x: Tensor) -> Tensor:
        """``down(gelu(gate(x)) * up(x))``."""
        return mlp.down_proj(geglu(mlp.gate_proj(x), mlp.up_proj(x)))


class FusedGemma4TextAttention(Fused, Gemma4TextAttention):
    """``groups`` is the memory policy's: in how many groups the query heads pass through."""

    project = Projector()
    groups = 1

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any,  # (cos, sin); stock says Tensor
        attention_mask: Tensor | None,
        shared_kv_states: Any,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cache = kwargs.pop("past_key_values", cache)
        if self.why_stock() is not None:
            return super().forward(
                hidden_states,
                position_embeddings,
                attention_mask,
                shared_kv_states,
                cache,
                **kwargs,
            )
        if self.groups > 1 and cache is None:
            read = readable_by_heads(self, hidden_states)
            if read is not None:
                keys = self._keys(hidden_states, position_embeddings, shared_kv_states)
                return attend_in_groups(
                    self, read, hidden_states, keys, position_embeddings, attention_mask, **kwargs
                ), None
        query, key, value = self._qkv(hidden_states, *position_embeddings)
        query = query.transpose(1, 2)
        if key is None or value is None:  # another layer's
            key, value = shared_kv_states[self.layer_type]
        else:
            key, value = key.transpose(1, 2), value.transpose(1, 2)
            if cache is not None:
                more = {"kwargs": kwargs} if CACHE == "cache" else {}
                key, value = cache.update(key, value, self.layer_idx, **more)
        self._share((key, value), shared_kv_states)

        interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out, weights = interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        (out,) = self.project(out.reshape(*hidden_states.shape[:-1], -1), self.o_proj)
        return out, weights

    def _keys(
        self, hidden_states: Tensor, positions: tuple[Tensor, Tensor], shared_kv_states: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, K, T, H] alone, for queries that come a few heads at a time."""
        if self.is_kv_shared_layer:
            return shared_kv_states[self.layer_type]
        linears = (self.k_proj,) if self.v_proj is None else (self.k_proj, self.v_proj)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        raw = [x.view(shape) for x in self.project(hidden_states, *linears)]
        key, _, _ = qkv_norm_rope(
            raw[0],
            None,
            None,
            self.k_norm.weight,
            None,
            *positions,
            eps=self.k_norm.eps,
            rotary_pairs=rotary_pairs(self),
        )
        keys = key.transpose(1, 2), rms_norm(raw[-1], None, self.v_norm.eps).transpose(1, 2)
        self._share(keys, shared_kv_states)
        return keys

    def _share(self, keys: tuple[Tensor, Tensor], shared_kv_states: Any) -> None:
        """Leave keys and values for the layers that reuse them, where this is one of the two that
        do.

        Not in a checkpoint's replay: what it computes hangs on all that it replays, which would
        stay until the whole backward is through.
        """
        is_replay = (
            self.training and torch.is_grad_enabled() and self.layer_type in shared_kv_states
        )
        if self.store_full_length_kv and not is_replay:
            shared_kv_states[self.layer_type] = keys

    def why_stock(self) -> str | None:
        """Why its own forward has to run now, if so."""
        shared = self.is_kv_shared_layer
        norms = (self.q_norm,) if shared else (self.q_norm, self.k_norm, self.v_norm)
        return None if are_norms(*norms) else _NORMS

    def _qkv(
        self, hidden_states: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Projected, normed and rotated queries [B, T, N, H], and keys and values [B, T, K, H]
        where the layer has its own.
        """
        linears: tuple[nn.Module, ...]
        if self.is_kv_shared_layer:
            linears = (self.q_proj,)
        elif self.v_proj is None:  # k_eq_v: the value is the key before its norm
            linears = (self.q_proj, self.k_proj)
        else:
            linears = (self.q_proj, self.k_proj, self.v_proj)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, *rest = (x.view(shape) for x in self.project(hidden_states, *linears))
        key = rest[0] if rest else None
        return qkv_norm_rope(
            query,
            key,
            rest[-1] if rest else None,
            self.q_norm.weight,
            self.k_norm.weight if key is not None else None,
            cos,
            sin,
            eps=self.q_norm.eps,
            rotary_pairs=rotary_pairs(self),
        )


def _why_not_attention(attention: Gemma4TextAttention) -> str | None:
    return why_not_dtype(attention.q_norm.weight)


class FusedGemma4TextMLP(Fused, Gemma4TextMLP):
    """``keep`` and ``tile`` are the memory policy's: whether gate and up are kept for backward, how
    many tokens are in flight.
    """

    project = Projector()
    keep = True
    tile: int | None = 8192

    def forward(self, x: Tensor) -> Tensor:
        own = why_not_gelu(self.act_fn) is not None
        return super().forward(x) if own else self.project.gated_mlp(self, x)


def _why_not_mlp(mlp: Gemma4TextMLP) -> str | None:
    return why_not_gelu(mlp.act_fn)


_LAYER_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


class FusedGemma4TextDecoderLayer(Fused, Gemma4TextDecoderLayer):
    self_attn: Any  # the stock module or the fused one, which has `groups`
    project = Projector()
    memory: Any = None  # the `checkpointing` patch's policy
    graphs: Any = None  # the `cuda_graphs` patch's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (
            self.graphs is not None
            and (out := self.graphs.serve(self, *args, **kwargs)) is not None
        ):
            return out
        return super().__call__(*args, **kwargs)

    @property
    def _gradient_checkpointing_func(self) -> Any:
        """Transformers' checkpoint function, or the memory policy in front of it."""
        stock = self.__dict__["_gradient_checkpointing_func"]
        return stock if self.memory is None else functools.partial(self.memory.run, self, stock)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, stock: Any) -> None:
        self.__dict__["_gradient_checkpointing_func"] = stock

    def forward(
        self,
        hidden_states: Tensor,
        per_layer_input: Tensor | LayerInput | None = None,
        shared_kv_states: Any = None,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        kwargs[CACHE] = kwargs.pop("past_key_values", cache)
        if self.why_stock() is not None:
            if isinstance(per_layer_input, LayerInput):
                per_layer_input = per_layer_input.tensor()
            return super().forward(
                hidden_states,
                per_layer_input,
                shared_kv_states=shared_kv_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **kwargs,
            )
        context = {
            "position_embeddings": position_embeddings,
            "attention_mask": attention_mask,
            "shared_kv_states": shared_kv_states,
            "position_ids": position_ids,
            **kwargs,
        }
        if getattr(self.self_attn, "groups", 1) > 1 and torch.is_grad_enabled():
            # in parts: each half is replayed when its own backward comes
            random = draws(self)
            again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=random)
            hidden_states = again(self._attended, hidden_states, context)
            return again(self._fed, hidden_states, None, per_layer_input)
        next_norm = self.pre_feedforward_layernorm.weight
        hidden_states, normed = self._attended(hidden_states, context, next_weight=next_norm)
        return self._fed(hidden_states, normed, per_layer_input)

    def _attended(self, hidden_states: Tensor, context: dict[str, Any], **joint: Any) -> Any:
        """The layer's first half: attention and its residual (and with ``next_weight`` the norm of
        the sum).
        """
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **context)
        return _joint(attended, hidden_states, self.post_attention_layernorm, **joint)

    def _fed(
        self,
        hidden_states: Tensor,
        normed: Tensor | None,
        per_layer_input: Tensor | LayerInput | None,
    ) -> Tensor:
        """Its second half: the MLP, the per-layer input, their residuals, the layer's scalar."""
        scale = {} if self.hidden_size_per_layer_input else {"scale": self.layer_scalar}
        # the norm and the MLP's output get no names, which would hold them for the rest of it
        hidden_states = _joint(
            self.mlp(self.pre_feedforward_layernorm(hidden_states) if normed is None else normed),
            hidden_states,
            self.post_feedforward_layernorm,
            **scale,
        )
        if not self.hidden_size_per_layer_input:
            return hidden_states

        (gate,) = self.project(hidden_states, self.per_layer_input_gate)
        if isinstance(per_layer_input, LayerInput):
            gated = per_layer_input.gated(gate)
        else:
            assert per_layer_input is not None
            gated = geglu(gate, per_layer_input)
        (out,) = self.project(gated, self.per_layer_projection)
        return _joint(out, hidden_states, self.post_per_layer_input_norm, scale=self.layer_scalar)

    def why_stock(self) -> str | None:
        """Why its own forward has to run now, if so."""
        if self.layer_scalar.requires_grad:
            return "the layer's scalar is trained"
        norms = [getattr(self, name) for name in _LAYER_NORMS]
        if self.hidden_size_per_layer_input:
            if (reason := why_not_gelu(self.act_fn)) is not None:
                return reason
            norms.append(self.post_per_layer_input_norm)
        return None if are_norms(*norms) else _NORMS


def _joint(x: Tensor, residual: Tensor, norm: Gemma4RMSNorm, **extra: Any) -> Any:
    """Post-norm, residual add and what follows. Under autocast the branch may be narrower than the
    residual: it is widened.
    """
    if x.dtype != residual.dtype:
        x = x.to(residual.dtype)
    return norm_add(x, residual, norm.weight, eps=norm.eps, **extra)


def _why_not_layer(layer: Gemma4TextDecoderLayer) -> str | None:
    if layer.enable_moe_block:
        return "the layer has a mixture-of-experts block; its norms alone are fused"
    if layer.hidden_size_per_layer_input and (reason := why_not_gelu(layer.act_fn)) is not None:
        return reason
    return why_not_dtype(layer.input_layernorm.weight)


def left_to_stock(base: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Patch, path and reason of fused modules that run stock's forward as they are now."""
    for path, module in base.named_modules():
        if isinstance(module, FusedGemma4TextDecoderLayer):
            patch, reason = decoder_layer_patch, module.why_stock()
        elif isinstance(module, FusedGemma4TextAttention):
            patch, reason = qk_norm_rope_patch, module.why_stock()
        elif isinstance(module, FusedGemma4TextMLP):
            patch, reason = geglu_patch, why_not_gelu(module.act_fn)
        else:
            continue
        if reason is not None:
            yield patch.name, path, reason


qk_norm_rope_patch = ClassSwap("qk_norm_rope", "text", FusedGemma4TextAttention, _why_not_attention)
geglu_patch = ClassSwap("geglu", "text", FusedGemma4TextMLP, _why_not_mlp)
decoder_layer_patch = ClassSwap(
    "decoder_layer", "text", FusedGemma4TextDecoderLayer, _why_not_layer
)
