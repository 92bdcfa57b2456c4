"""Towers that a run does not use need not sit in GPU memory.

A text-only run's vision and audio towers (0.25 GiB in NF4, 0.9 in bf16) move to the CPU when the
Trainer is built. They stay part of the model: saved with it, found by name. If an image or a sound
does arrive, the tower moves to its input and runs as ever.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

__all__ = ["settle_towers"]

_TOWERS = ("vision_tower", "embed_vision", "audio_tower", "embed_audio")
_MEDIA_COLUMNS = frozenset(
    [
        "image",
        "images",
        "pixel_values",
        "video",
        "videos",
        "pixel_values_videos",
        "audio",
        "audios",
        "input_features",
    ]
)


def settle_towers(base: nn.Module, trainer: Any, dataset: Any) -> str:
    """Park the towers of a text-only run on the CPU; returns what was done, for the report."""
    inner = base.model
    towers = {name: tower for name in _TOWERS if (tower := getattr(inner, name, None)) is not None}
    if not towers:
        return "the model has none"
    media = _media_in(trainer, dataset)
    if media is None:
        return "kept: the dataset does not say whether it holds images or sounds"
    if media:
        return f"kept: the dataset has {media}"
    parked = []
    for name, tower in towers.items():
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            _park(tower)
            parked.append(name)
    kept = [name for name in towers if name not in parked]
    text = f"text-only run: {', '.join(parked)} parked on the CPU" if parked else ""
    return "; ".join(filter(None, (text, f"{', '.join(kept)} kept: trained" if kept else "")))


def _media_in(trainer: Any, dataset: Any) -> str | None:
    """The media columns of a dataset by name, "" where it has none, None where nobody can tell."""
    if getattr(trainer, "_is_vision_dataset", False):
        return "images"
    columns = getattr(dataset, "column_names", None)
    if (
        columns is None
        and isinstance(dataset, torch.utils.data.Dataset)
        and hasattr(dataset, "__getitem__")
    ):
        try:
            columns = list(dataset[0])
        except Exception:
            return None
    if columns is None:
        return None
    return ", ".join(sorted(_MEDIA_COLUMNS.intersection(columns)))


def _park(tower: Any) -> None:
    if getattr(tower, "_gemma_accel_parked", None) is not None:
        return
    tower.to("cpu")
    hook = tower.register_forward_pre_hook(_unpark, with_kwargs=True, prepend=True)
    tower._gemma_accel_parked = hook.id
    tower._apply = MethodType(_stay, tower)  # a method, so that a deep copy has its own


def _stay(tower: Any, fn: Any, recurse: bool = True) -> nn.Module:
    """`model.to(device)` passes a parked tower by; a change of dtype does not."""
    probe = fn(torch.empty(0))
    return tower if probe.device.type != "cpu" else type(tower)._apply(tower, fn, recurse)


def _unpark(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    device = next(v.device for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
    stay = vars(tower).pop("_apply")
    try:
        tower.to(device)
    except BaseException:  # out of memory half way: back to where it was, parked as before
        tower.to("cpu")
        tower._apply = stay
        raise
    for hooks in (tower._forward_pre_hooks, tower._forward_pre_hooks_with_kwargs):
        hooks.pop(tower._gemma_accel_parked, None)
    tower._gemma_accel_parked = None
