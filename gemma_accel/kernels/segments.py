"""Which keys a query may see, without a mask: two int32 vectors instead of a T x T tensor.

A packed row (documents end to end) and a padded row (one document, padding at its ends) have one
thing in common: what a causal query sees is a run of keys. So each query carries the first key it
sees, and each key the last query that sees it:

    query t sees key s   <=>   first[t] <= s <= t   <=>   s <= t <= last[s]

Padding sees nothing and is seen by nothing: ``first[t] = t + 1`` and ``last[s] = s - 1``. Both
vectors come from a handful of launches on the batch, none of which the host waits for, and serve
every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Segments",
    "is_end_padding",
    "segments_from_attention_mask",
    "segments_from_position_ids",
]


@dataclass(frozen=True, eq=False)
class Segments:
    """``first[b, t]``: first key that query t sees; ``last[b, s]``: last query that sees key s.

    int32 [B, T] each. Build it once a batch and hand the same object to every layer: what a layer
    works out about it stays with it.
    """

    first: Tensor
    last: Tensor
    _orders: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def longest_first(self, block: int) -> Tensor:
        """Blocks of ``block`` keys by how many queries see them, most first: int32 [B * blocks].

        A large card runs all key blocks of a batch in two waves or so. Started in the order of the
        row, long ones that come late keep a few multiprocessors busy while the rest are done. Any
        order gives the same gradients, so one that has grown old (vectors rewritten in place, as
        under a CUDA graph) costs time at most.
        """
        if block not in self._orders:
            tokens = self.last.shape[1]
            ends = F.pad(self.last, (0, -tokens % block), value=-1)
            ends = ends.unflatten(1, (-1, block)).amax(-1)
            starts = torch.arange(0, tokens, block, dtype=torch.int32, device=ends.device)
            self._orders[block] = (ends - starts).flatten().argsort(descending=True).int()
        return self._orders[block]


def segments_from_position_ids(
    position_ids: Tensor, attention_mask: Tensor | None = None
) -> Segments:
    """A document begins where a position is not its predecessor plus one, as in Transformers.

    ``position_ids`` [B, T] (or [1, T] with a mask of [B, T]); ``attention_mask`` [B, T], zero on
    padding, which must lie at the ends of a row (``is_end_padding``).
    """
    if position_ids.dim() != 2:
        raise ValueError(
            "segments_from_position_ids: position_ids must have shape [B, T], "
            f"got {list(position_ids.shape)}. Give a batch of one its first dimension."
        )
    batch, tokens = position_ids.shape
    t = torch.arange(tokens, dtype=torch.int32, device=position_ids.device)
    starts = torch.ones(batch, tokens + 1, dtype=torch.bool, device=position_ids.device)
    torch.ne(position_ids[:, 1:], position_ids[:, :-1] + 1, out=starts[:, 1:-1])
    first = torch.where(starts[:, :-1], t, 0).cummax(-1).values
    # the end of a document is found from behind: one before the next start
    last = torch.where(starts[:, 1:], t, tokens).flip(-1).cummin(-1).values.flip(-1)
    documents = Segments(first.int(), last.int())
    if attention_mask is None:
        return documents
    padding = segments_from_attention_mask(attention_mask)
    return Segments(
        torch.maximum(documents.first, padding.first), torch.minimum(documents.last, padding.last)
    )


def segments_from_attention_mask(mask: Tensor) -> Segments:
    """One document a row, from its first unmasked token to its last. ``mask`` [B, T].

    Zero (or False) is padding, and must lie at the ends of a row: left, right or both. A mask with
    holes is not what this says it is, and is not noticed here, since looking would make the host
    wait: ask ``is_end_padding`` first.
    """
    if mask.dim() != 2:
        raise ValueError(
            f"segments_from_attention_mask: mask must have shape [B, T], got {list(mask.shape)}. "
            "A 4-D mask cannot be expressed by segments."
        )
    tokens = mask.shape[1]
    valid = mask != 0
    t = torch.arange(tokens, dtype=torch.int32, device=mask.device)
    begin = torch.where(valid, t, tokens).amin(-1, keepdim=True)
    end = torch.where(valid, t, -1).amax(-1, keepdim=True)
    return Segments(torch.where(valid, begin, t + 1).int(), torch.where(valid, end, t - 1).int())


def is_end_padding(mask: Tensor) -> bool:
    """Whether each row of ``mask`` [B, T] is padding, tokens, padding. Waits for the device.

    Any of the three may be empty.
    """
    valid = mask != 0
    edges = valid[:, 1:] != valid[:, :-1]
    # one way into the tokens and one out; a row that begins with tokens has only the way out
    return bool((edges.sum(-1) + valid[:, 0].int() <= 2).all())
