"""A layer's query heads a few at a time: projection, norm and rotation, attention, and their part
of the output projection.

A full layer of E2B at 65,536 tokens has 512 MiB each of raw queries, rotated queries, attention's
output and their gradients. Heads do not depend on one another before the output projection sums
them up, so a group of them can be taken all the way and forgotten: each group is a checkpoint of
its own, in whose backward alone its tensors exist.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4TextAttention,
    eager_attention_forward,
)

from gemma_accel.kernels.lora import Projection, project
from gemma_accel.kernels.qk_norm_rope import qkv_norm_rope
from gemma_accel.patches.dropout import draws
from gemma_accel.patches.projections import as_projection

__all__ = ["attend_in_groups", "readable_by_heads", "rotary_pairs"]


def rotary_pairs(attention: Any) -> int | None:
    """How many leading pairs (d, d + H/2) really rotate: "proportional" RoPE leaves the others at
    angle zero.
    """
    rope = attention.config.rope_parameters[attention.layer_type]
    if rope is None or rope.get("rope_type") != "proportional":
        return None
    return int(rope.get("partial_rotary_factor", 1.0) * attention.head_dim // 2)


def readable_by_heads(attention: Any, x: Tensor) -> tuple[Projection, Projection] | None:
    """q_proj and o_proj as projections whose rows and columns can be taken apart; None where
    they cannot.
    """
    query, out = as_projection(attention.q_proj, x), as_projection(attention.o_proj, x)
    if isinstance(query, str) or isinstance(out, str):
        return None
    for projection in (query, out):
        if projection.bias is not None:
            return None
        if isinstance(projection.weight, Tensor) and projection.weight.requires_grad:
            return None  # each slice would leave a gradient of the whole weight's size
    return query, out


def attend_in_groups(
    attention: Any,
    read: tuple[Projection, Projection],
    hidden_states: Tensor,
    keys: tuple[Tensor, Tensor],
    positions: tuple[Tensor, Tensor],
    mask: Tensor | None,
    **kwargs: Any,
) -> Tensor:
    """The attention block's output [B, T, D] from its normed input and finished keys and values
    [B, K, T, H].
    """
    heads = attention.config.num_attention_heads
    each, random = heads // attention.groups, draws(attention)
    total = None
    for first in range(0, heads, each):

        def group(x: Tensor, key: Tensor, value: Tensor, first: int = first) -> Tensor:
            return _group(
                attention, read, x, key, value, positions, mask, slice(first, first + each), kwargs
            )

        part = checkpoint(
            group, hidden_states, *keys, use_reentrant=False, preserve_rng_state=random
        )
        total = part if total is None else total + part
    assert total is not None
    return total


def _group(
    attention: Any,
    read: tuple[Projection, Projection],
    x: Tensor,
    key: Tensor,
    value: Tensor,
    positions: tuple[Tensor, Tensor],
    mask: Tensor | None,
    heads: slice,
    kwargs: dict[str, Any],
) -> Tensor:
    size, shape = attention.head_dim, x.shape[:-1]
    columns = heads.start * size, heads.stop * size
    (query,) = project(x, read[0]._replace(rows=columns))
    query, _, _ = qkv_norm_rope(
        query.view(*shape, -1, size),
        None,
        None,
        attention.q_norm.weight,
        None,
        *positions,
        eps=attention.q_norm.eps,
        rotary_pairs=rotary_pairs(attention),
    )
    # the keys that these heads read: one of several heads, or a run of heads with theirs
    per_key = attention.num_key_value_groups
    own = slice(heads.start // per_key, -(-heads.stop // per_key))
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, eager_attention_forward
    )
    out, _ = interface(
        _OneGroup(attention, (heads.stop - heads.start) // (own.stop - own.start)),
        query.transpose(1, 2),
        key[:, own],
        value[:, own],
        mask,
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
        sliding_window=attention.sliding_window,
        **kwargs,
    )
    out = out.reshape(*shape, -1)
    return project(out, read[1]._replace(columns=columns))[0]


class _OneGroup:
    """The attention module as an attention function sees it, with a group's share of heads."""

    def __init__(self, attention: Gemma4TextAttention, num_key_value_groups: int) -> None:
        self._attention, self.num_key_value_groups = attention, num_key_value_groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)
