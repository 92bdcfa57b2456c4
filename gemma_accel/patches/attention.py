"""The text model's attention, through Transformers' own registries: an attention function and a
mask function of one name.

Stock builds a [1, 1, S, S] mask for every sliding layer longer than its window and for every packed
batch, repeats keys and values for the query heads, and runs head_dim 512 on PyTorch's slowest fused
path. Here the mask function describes what may be seen in two int32 vectors (or nothing), and the
attention function hands both to the kernel.

Whether the kernel serves a batch is decided in the mask function, once a forward: an attention
function that was given no mask could not fall back any more, since the window and the documents'
borders would be lost. What it does not serve gets stock's own mask, and the attention function
knows that by its dtype.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextAttention, Gemma4TextModel

from gemma_accel.hookspecs import Patch
from gemma_accel.kernels.attention import HEAD_SIZES, MAX_GROUP, attention, supported
from gemma_accel.kernels.segments import (
    Segments,
    segments_from_attention_mask,
    segments_from_position_ids,
)
from gemma_accel.memory import layer_shapes
from gemma_accel.patches.seams import Fused, Undoing

__all__ = [
    "NAME",
    "attention_patch",
    "belongs_to_trainer",
    "trained_on",
    "unpack",
    "warn_of_stock",
]


class _Name(str):
    """The registered name, which a pickled config does not keep: without this package there is no
    such attention.
    """

    def __reduce__(self) -> Any:
        return str, ("sdpa",)

    def __deepcopy__(self, memo: Any) -> _Name:
        return self


NAME = _Name("gemma_accel")
_labels: ContextVar[Tensor | None] = ContextVar("labels", default=None)
_padding_is_read: ContextVar[bool | None] = ContextVar("padding_is_read", default=None)
_trainers: dict[int, Callable[[], Any]] = {}
"""By the ids of their configs, the text models that a Trainer has."""


@contextlib.contextmanager
def trained_on(labels: Tensor | None, *, reads_padding: bool | None = None) -> Iterator[None]:
    """A forward whose loss is that of ``labels`` [B, T]; and whether what padding predicts may be
    read, where that is known.
    """
    tokens = _labels.set(labels), _padding_is_read.set(reads_padding)
    try:
        yield
    finally:
        _labels.reset(tokens[0])
        _padding_is_read.reset(tokens[1])


def belongs_to_trainer(text: nn.Module) -> None:
    """From here on nobody reads what padding predicts in train mode, unless told: TRL's
    log-probabilities come from the backbone of ``text``, past the forward that knows.
    """
    _trainers[id(text.config)] = weakref.ref(text)


def _may_read_padding(config: Any) -> bool:
    if (told := _padding_is_read.get()) is not None:
        return told
    known = _trainers.get(id(config))
    text = known() if known is not None else None
    return text is None or text.config is not config or not text.training


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    mask_function: Any,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    config: Any = None,
    device: Any = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What the kernel needs to know of a batch, int32 [B, 2, T, 1] (first and last of `Segments`),
    None, or stock's boolean mask.

    The shape lets Transformers 5.23 drop query positions (`mask[:, :, slice, :]`) as it does with a
    dense mask.
    """
    fits = attention_mask is None or attention_mask.shape[1] == kv_length
    padding = reason = None
    if attention_mask is not None and fits:
        padding = _padding(attention_mask, _labels.get())
    if use_vmap:
        reason = "the mask function is somebody's own"
    elif q_length != kv_length:
        reason = "a cache is being read"
    elif not fits:
        reason = "the attention mask is not as long as the row (stock cuts it off, or fills it up)"
    elif config is not None:
        reason = _config_refused(config, torch.device(device), kwargs.get("dtype"))
    if reason is None and padding is not None and not padding.none:
        reason = padding.refused(q_length, _may_read_padding(config))
    if reason is not None:
        if torch.is_grad_enabled():
            warn_of_stock(reason)
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            # without a mask `attend` takes a batch for one of its own, where the last queries are
            # the last keys': of a cache that is longer than what is in it they are not
            allow_is_causal_skip=allow_is_causal_skip and q_length in (1, kv_length),
            use_vmap=use_vmap,
            config=config,
            device=device,
            **kwargs,
        )
    segments = None
    if attention_mask is not None and padding is not None and not padding.none:
        segments = segments_from_attention_mask(attention_mask)
    if not allow_is_causal_skip:  # several documents in a row
        positions = _positions(mask_function, batch_size, q_length, device)
        segments = segments_from_position_ids(positions, attention_mask)
    if segments is None:
        return None
    packed = torch.stack((segments.first, segments.last)).permute(1, 0, 2).unsqueeze(-1)
    unpack(packed)
    return packed


def unpack(packed: Tensor) -> Segments:
    """The `Segments` of a mask [B, 2, T, 1], the same object for every layer: what is worked out
    about it stays with it.
    """
    segments = getattr(packed, "_gemma_accel_segments", None)
    if segments is None:
        segments = Segments(packed[:, 0, :, 0], packed[:, 1, :, 0])
        packed._gemma_accel_segments = segments  # type: ignore[attr-defined]
    return segments


@functools.cache
def warn_of_stock(reason: str) -> None:
    """Once for each reason: what a training step pays for should not be silent."""
    warnings.warn(
        f"gemma_accel: stock's attention runs in place of the kernel, at least for now: {reason}",
        UserWarning,
        stacklevel=3,
    )


def _config_refused(config: Any, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why the kernel cannot serve this model's heads on this card, in the dtype they will have."""
    if config.attention_dropout:
        return f"attention_dropout is {config.attention_dropout}"
    if device.type != "cuda" or dtype is None:
        return None
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    known = _HEADS.get(id(config))
    if known is None or known[0]() is not config:
        heads = tuple({(s.heads, s.queries // s.heads) for s in layer_shapes(config)})
        known = _HEADS[id(config)] = weakref.ref(config), heads
    return next(filter(None, (_heads_refused(device, dtype, *heads) for heads in known[1])), None)


_HEADS: dict[int, tuple[Any, tuple[tuple[int, int], ...]]] = {}


@functools.cache
def _heads_refused(device: torch.device, dtype: torch.dtype, heads: int, size: int) -> str | None:
    one = torch.empty(1, heads, 1, size, dtype=dtype, device=device)
    return supported(one, one)


class _Padding(NamedTuple):
    """What the host has to know of a 2-D mask."""

    none: bool
    at_ends: bool
    last_is_token: bool
    labelled: bool

    def refused(self, length: int, is_read: bool) -> str | None:
        """Why segments do not describe it.

        `generate` from right-padded prompts reads what a padding position predicts, as stock
        computes it, and an evaluation may; segments let padding see nothing. So where it may be
        read (``is_read``) and no gradient is asked for, right padding gets stock's mask, up to the
        length where that mask costs more than it is worth (16 MiB a row at 4,096). Elsewhere
        without a gradient, log-probabilities of a reference or of an earlier policy have to come
        the way the trained ones do.
        """
        if not self.at_ends:
            return "the attention mask has holes in the middle of a row"
        if self.labelled:  # stock lets padding see the row's tokens
            return "padding has labels, and is trained on; set them to -100 if that is not meant"
        if self.last_is_token or torch.is_grad_enabled() or not is_read or length > 4096:
            return None
        return "padding on the right, and what it predicts may be read"


def _padding(mask: Tensor, labels: Tensor | None) -> _Padding:
    """Looks at a mask [B, T] and its labels in one wait for the device (stock waits too, to see
    whether all is ones).
    """
    valid = mask != 0
    borders = (valid[:, 1:] != valid[:, :-1]).sum(-1) + valid[:, 0].int()
    found = [valid.all(), (borders <= 2).all(), valid[:, -1].all()]
    if labels is not None and labels.shape == mask.shape:
        found.append((~valid & (labels.to(mask.device) != -100)).any())
    else:
        found.append(torch.zeros_like(found[0]))
    return _Padding(*torch.stack(found).tolist())


def _positions(mask_function: Any, batch_size: int, length: int, device: Any) -> Tensor:
    """Position ids [B, T] that step by one inside a document and by two where one begins.

    The documents are inside ``mask_function``: a token belongs to its predecessor's if it may see
    it.
    """
    rows = torch.arange(batch_size, device=device)[:, None]
    queries = torch.arange(1, length, device=device)[None, :]
    same = mask_function(rows, 0, queries, queries - 1).expand(batch_size, length - 1)
    steps = torch.ones(batch_size, length, dtype=torch.long, device=device)
    steps[:, 1:] = 2 - same.long()
    return steps.cumsum(-1)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query [B, N, T, H], key and value [B, K, S, H] -> out [B, T, N, H]; stock's attention where
    it has stock's mask.
    """
    ours = attention_mask is None or attention_mask.dtype == torch.int32
    if not ours:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    segments = None if attention_mask is None else unpack(attention_mask)
    if sliding_window is not None:  # as stock's mask has it, and not as it was at the beginning
        sliding_window = module.config.sliding_window
    if query.shape[2] != key.shape[2] or dropout:
        # generation, or `logits_to_keep`, needs the last positions only of the layers that share
        # keys; and the kernel drops nothing
        dense = _dense(query.shape[2], key.shape[2], sliding_window, segments, query.device)
        return sdpa_attention_forward(
            module, query, key, value, dense, dropout=dropout, scaling=scaling, **kwargs
        )
    if not query.dtype == key.dtype == value.dtype:  # autocast, where stock's norms made them
        kind = query.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
        query, key, value = (x.to(dtype) for x in (query, key, value))
    scale = module.scaling if scaling is None else scaling
    return attention(query, key, value, scale=scale, window=sliding_window, segments=segments), None


def _dense(
    queries: int, keys: int, window: int | None, segments: Segments | None, device: torch.device
) -> Tensor:
    """The boolean mask [B or 1, 1, queries, keys] of the last ``queries`` positions."""
    t = torch.arange(keys - queries, keys, device=device)[:, None]
    s = torch.arange(keys, device=device)[None, :]
    seen = s <= t
    if window is not None:
        seen = seen & (s > t - window)
    if segments is None:
        return seen[None, None]
    return (seen & (s >= segments.first[:, :, None]))[:, None]


class AttentionPatch(Patch):
    """Chooses the registered attention for one text model's config."""

    name, modality, seam = "attention", "text", "_attn_implementation"

    def matches(self, path: str, module: nn.Module) -> bool:
        kind = type(module).stock if isinstance(module, Fused) else type(module)
        return kind is Gemma4TextModel

    def why_not(self, module: Any) -> str | None:
        config = module.config
        if config._attn_implementation not in ("sdpa", NAME):
            return f"the model was loaded with attn_implementation={config._attn_implementation!r}"
        if config.use_bidirectional_attention is not None:
            kind = config.use_bidirectional_attention
            return f"use_bidirectional_attention is {kind!r}; the kernel is causal"
        if config.attention_dropout:
            return f"attention_dropout is {config.attention_dropout}; the kernel has none"
        for layer in module.layers:
            size, group = layer.self_attn.head_dim, layer.self_attn.num_key_value_groups
            if size not in HEAD_SIZES:
                return f"head_dim is {size}; the kernel covers {', '.join(map(str, HEAD_SIZES))}"
            if group > MAX_GROUP:
                return f"{group} query heads share a key; the kernel covers {MAX_GROUP}"
        return None

    def install(self, module: Any) -> Undoing:
        ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)
        configs = _configs(module)
        for config in configs:
            config._attn_implementation_internal = NAME

        def obstacle() -> str | None:
            for config in configs:
                if (now := config._attn_implementation_internal) not in (NAME, "sdpa"):
                    return f"attn_implementation was set to {now!r} since"
            return None

        def run() -> None:
            for config in configs:
                config._attn_implementation_internal = "sdpa"

        return Undoing(run, obstacle)


def _configs(text: Any) -> list[Any]:
    """The text model's, and those of copies that PEFT has made of a layer or its attention
    (`modules_to_save`).
    """
    attentions = (m for m in text.modules() if isinstance(m, Gemma4TextAttention))
    return list({id(m.config): m.config for m in (text, *attentions)}.values())


attention_patch = AttentionPatch()
