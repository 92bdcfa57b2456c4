"""Towers that a run does not use need not sit in GPU memory.

A text-only run's vision and audio towers (0.25 GiB in NF4, 0.9 in bf16), and the audio tower of a
run on images, move to the CPU when the Trainer is built. They stay part of the model: saved with
it, found by name. If an image or a sound does arrive, the tower moves to its input and runs as
ever.

The others tell the language model's memory policy what passes through them: what they keep lies
beside the layers' activations, and their forward and backward beside captured graphs.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from gemma_accel.memory import TowerShape, tower_shapes

__all__ = ["bring_towers_back", "note_media", "settle_towers", "watch_towers"]

_TOWERS = {
    "vision_tower": "image",
    "embed_vision": "image",
    "audio_tower": "audio",
    "embed_audio": "audio",
}
_COLUMNS = {
    "image": {"image", "images", "pixel_values", "video", "videos", "pixel_values_videos"},
    "audio": {"audio", "audios", "input_features"},
}


def settle_towers(base: nn.Module, trainer: Any, dataset: Any) -> str:
    """Park the towers that a run has no media for on the CPU; returns what was done, for the
    report.
    """
    inner = base.model
    towers = {name: tower for name in _TOWERS if (tower := getattr(inner, name, None)) is not None}
    if not towers:
        return "the model has none"
    media = _media_in(trainer, dataset)
    if media is None:
        return "kept: the dataset does not say whether it holds images or sounds"
    parked, said = [], []
    for name, tower in towers.items():
        if columns := media.get(_TOWERS[name]):
            said.append(f"{name} kept: the dataset has {columns}")
        elif any(parameter.requires_grad for parameter in tower.parameters()):
            said.append(f"{name} kept: trained")
        else:
            _park(tower)
            parked.append(name)
    if parked:
        run = "text-only run" if not media else "nothing for them to do"
        said.insert(0, f"{run}: {', '.join(parked)} parked on the CPU")
    return "; ".join(said)


_watched: weakref.WeakKeyDictionary[nn.Module, tuple[TowerShape, Any]] = weakref.WeakKeyDictionary()
"""A tower's first layer, what it is, and a weak reference to the policy that hears what enters it.
"""


def watch_towers(base: nn.Module, policy: Any) -> None:
    """Let the memory ``policy`` know what passes through the towers, from nothing on."""
    if policy.media:
        policy.set_media({})
    for name, shape in tower_shapes(base.config).items():
        tower: Any = getattr(base.model, name, None)
        if tower is None:
            continue
        trained = any(parameter.requires_grad for parameter in tower.parameters())
        shape = dataclasses.replace(shape, trained=trained)
        _watched[_first_layer(tower)] = shape, weakref.ref(policy)


def _first_layer(tower: Any) -> Any:
    """None of an embedder."""
    layers = getattr(getattr(tower, "encoder", tower), "layers", None)
    return None if layers is None else layers[0]


def _heard(layer: Any) -> tuple[TowerShape | None, Any]:
    """What ``layer`` is the first one of, and the policy that hears of it, if one does."""
    shape, policy = (layer is not None and _watched.get(layer)) or (None, lambda: None)
    return shape, policy()


def note_media(layer: nn.Module, hidden: torch.Tensor) -> None:
    """A tower's ``layer`` is about to take ``hidden`` [B, T, D]."""
    shape, policy = _heard(layer)
    if shape is None or policy is None or not hidden.shape[0]:
        return
    if not (layer.training and torch.is_grad_enabled()):
        policy.evaluate_media(dataclasses.replace(shape, trained=False), hidden)
        return
    replayed = bool(getattr(layer, "gradient_checkpointing", False))  # no audio layer's
    shape = dataclasses.replace(shape, replayed=replayed)
    policy.expect_media(shape, hidden.shape[0] * hidden.shape[1])


def _media_in(trainer: Any, dataset: Any) -> dict[str, str] | None:
    """A dataset's columns of each kind of media that it has; None where nobody can tell."""
    columns = getattr(dataset, "column_names", None)
    if (
        columns is None
        and isinstance(dataset, torch.utils.data.Dataset)
        and hasattr(dataset, "__getitem__")
    ):
        try:
            row = dataset[0]
        except Exception:
            row = None
        columns = list(row) if isinstance(row, Mapping) else None
    is_vision = getattr(trainer, "_is_vision_dataset", False)  # TRL has looked into it
    if columns is None and not is_vision:
        return None
    found = {
        kind: ", ".join(sorted(names.intersection(columns or ())))
        for kind, names in _COLUMNS.items()
    }
    if is_vision:
        found["image"] = found["image"] or "images"
    return {kind: names for kind, names in found.items() if names}


def _park(tower: Any) -> None:
    if getattr(tower, "_gemma_accel_parked", None) is not None:
        return
    tower.to("cpu")
    tower._gemma_accel_parked = _PARKED
    # methods, so that a deep copy has its own; and by the class's own names, so that a pickled
    # tower has the class's
    tower._apply = MethodType(_apply, tower)
    tower._call_impl = MethodType(_call_impl, tower)


class _Parked:
    """Says of a tower that it is parked; a pickled one is not."""

    def __reduce__(self) -> Any:
        return type(None), ()

    def __deepcopy__(self, memo: Any) -> _Parked:
        return self


_PARKED = _Parked()


def _apply(tower: Any, fn: Any, recurse: bool = True) -> nn.Module:
    """`model.to(device)` passes a parked tower by; a change of dtype does not."""
    probe = fn(torch.empty(0, device="cpu", dtype=next(tower.parameters()).dtype))
    if probe.device.type in ("cpu", "meta"):
        return type(tower)._apply(tower, fn, recurse)
    return type(tower)._apply(tower, lambda x: _cast(x, probe.dtype), recurse)


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _call_impl(tower: Any, *args: Any, **kwargs: Any) -> Any:
    """Where its input is."""
    device = next(v.device for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
    _bring_back(tower, device)
    return tower._call_impl(*args, **kwargs)


def bring_towers_back(base: nn.Module, device: torch.device) -> None:
    """Parked towers to ``device``, as ordinary modules."""
    for name in _TOWERS:
        tower = getattr(base.model, name, None)
        if getattr(tower, "_gemma_accel_parked", None) is not None:
            _bring_back(tower, device)


def _bring_back(tower: Any, device: torch.device) -> None:
    stay = vars(tower).pop("_apply")
    _, policy = _heard(_first_layer(tower)) if device.type == "cuda" else (None, None)
    nbytes = sum(parameter.nbytes for parameter in tower.parameters())
    if policy is not None:
        policy.take(nbytes)  # before it is there, for graphs may fill the memory
    try:
        tower.to(device)
    except BaseException:  # out of memory half way: back to where it was, parked as before
        tower.to("cpu")
        tower._apply = stay
        if policy is not None:
            policy.take(-nbytes)
        raise
    del tower._call_impl
    tower._gemma_accel_parked = None
