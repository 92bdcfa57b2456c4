"""Which keys a query may see, without a mask: two int32 vectors instead of a T x T tensor.

A packed row (documents end to end) and a padded row (one document and padding at its ends) have one thing in common: what
a causal query sees is a run of keys. So each query carries the first key it sees, and each key the last query that sees it:

    query t sees key s   <=>   first[t] <= s <= t   <=>   s <= t <= last[s]

Padding sees nothing and is seen by nothing: ``first[t] = t + 1`` and ``last[s] = s - 1``. Both vectors come from a handful of
launches on the batch, none of which the host waits for, and serve every layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Segments",
    "is_end_padding",
    "segments_from_attention_mask",
    "segments_from_position_ids",
]


class Segments(NamedTuple):
    """``first[b, t]``: first key that query t sees; ``last[b, s]``: last query that sees key s. int32 [B, T]."""

    first: Tensor
    last: Tensor


def segments_from_position_ids(
    position_ids: Tensor, attention_mask: Tensor | None = None
) -> Segments:
    """Documents begin wherever a position is not its predecessor plus one; padding, where there is a mask, sees nothing.

    ``position_ids`` [B, T] (or [1, T] with a mask of [B, T]); ``attention_mask`` [B, T], zero on padding, which must lie at
    the ends of a row (``is_end_padding``).
    """
    if position_ids.dim() != 2:
        raise ValueError(
            f"segments_from_position_ids: position_ids must have shape [B, T], got {tuple(position_ids.shape)}."
        )
    batch, tokens = position_ids.shape
    t = torch.arange(tokens, dtype=torch.int32, device=position_ids.device)
    starts = torch.ones(batch, tokens + 1, dtype=torch.bool, device=position_ids.device)
    torch.ne(position_ids[:, 1:], position_ids[:, :-1] + 1, out=starts[:, 1:-1])
    first = torch.where(starts[:, :-1], t, 0).cummax(-1).values
    # the end of a document is found from behind: one column left of the next start
    last = torch.where(starts[:, 1:], t, tokens).flip(-1).cummin(-1).values.flip(-1)
    documents = Segments(first.int(), last.int())
    if attention_mask is None:
        return documents
    padding = segments_from_attention_mask(attention_mask)
    return Segments(
        torch.maximum(documents.first, padding.first), torch.minimum(documents.last, padding.last)
    )


def segments_from_attention_mask(mask: Tensor) -> Segments:
    """One document a row, from its first unmasked token to its last. ``mask`` [B, T], zero (or False) on padding.

    Padding must lie at the ends of a row: left, right or both. A mask with holes is not what this says it is, and is not
    noticed here, since looking would make the host wait: ask ``is_end_padding`` first.
    """
    if mask.dim() != 2:
        raise ValueError(
            f"segments_from_attention_mask: mask must have shape [B, T], got {tuple(mask.shape)}. "
            "A 4-D mask cannot be expressed by segments."
        )
    tokens = mask.shape[1]
    valid = mask != 0
    t = torch.arange(tokens, dtype=torch.int32, device=mask.device)
    begin = torch.where(valid, t, tokens).amin(-1, keepdim=True)
    end = torch.where(valid, t, -1).amax(-1, keepdim=True)
    return Segments(torch.where(valid, begin, t + 1).int(), torch.where(valid, end, t - 1).int())


def is_end_padding(mask: Tensor) -> bool:
    """Whether every row of ``mask`` [B, T] is padding, tokens, padding (each may be empty). Waits for the device."""
    valid = mask != 0
    edges = valid[:, 1:] != valid[:, :-1]
    # at most one way into the tokens and one way out; a row that begins with tokens has only the way out
    return bool((edges.sum(-1) + valid[:, 0].int() <= 2).all())
