"""What a Gemma 4 config makes: its parameters, counted by where they live and how they are stored,
and its layers' shapes.

The model is made of meta tensors, so the count follows the installed Transformers and no weight is
read.
"""

from __future__ import annotations

import copy
import functools
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gemma_accel.errors import UnsupportedModelError
from gemma_accel.memory import LayerShape, TowerShape, layer_shapes, tower_shapes

__all__ = ["TOWERS", "Counts", "Tower", "config_of", "count"]

TOWERS = {
    "vision_tower": "vision",
    "embed_vision": "vision",
    "audio_tower": "audio",
    "embed_audio": "audio",
}
"""A tower's modules, and what they are of."""
_ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "linear")
"""of the language model's, and in towers what a clipped linear holds"""
_KINDS = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")


class Tower(NamedTuple):
    """A tower with its embedder: parameters as `Counts` has them, and its layers."""

    linears: int
    rest: int
    adapter_per_rank: int
    shape: TowerShape | None
    """None of the unified model, whose layers read patches and sounds themselves"""
    inputs_per_token: int
    """how many vectors pass its layers for each soft token"""


@dataclass(frozen=True)
class Counts:
    """A model's parameters by where they live and how they are stored, and its layers' shapes."""

    kind: str
    text: Any  # the text config
    layers: tuple[LayerShape, ...]
    largest_linear: int
    adapter_per_rank: int  # inputs + outputs of all adapted projections
    linears: int  # of the text stack's nn.Linear, which is what bitsandbytes quantises
    embedding: int  # and the head, where it is not the same
    experts: int
    table: int
    norms: int
    towers: dict[str, Tower]

    @property
    def tower_linears(self) -> int:
        return sum(tower.linears for tower in self.towers.values())

    @property
    def tower_rest(self) -> int:
        return sum(tower.rest for tower in self.towers.values())

    @property
    def total(self) -> int:
        places = sum(getattr(self, place) for place in _PLACES)
        return places + self.tower_linears + self.tower_rest


_PLACES = ("linears", "embedding", "experts", "table", "norms")


def config_of(source: Any) -> Any:
    """The config that ``source`` is, has, or names.

    Raises:
        UnsupportedModelError: it is none of a Gemma 4.
    """
    if isinstance(source, (str, Path)):
        config = _read_config(Path(source))
    else:
        config = source if hasattr(source, "model_type") else getattr(source, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in _KINDS:
        raise UnsupportedModelError(
            f"gemma_accel.plan takes a Gemma 4 model or config ({', '.join(_KINDS)}), got "
            f"{source if isinstance(source, (str, Path)) else type(source).__name__}"
            f"{f' of model_type {kind!r}' if kind else ''}."
        )
    return config


def _read_config(path: Path) -> Any:
    from transformers import AutoConfig, PreTrainedConfig

    if not path.is_file():
        return AutoConfig.from_pretrained(str(path))
    values = json.loads(path.read_text())
    kind = values.get("model_type")
    return _config_from(kind, values) if kind in _KINDS else PreTrainedConfig.from_dict(values)


def _config_from(kind: str, values: dict[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[kind].from_dict(values)


def count(config: Any) -> Counts:
    """The parameters and layers of the model that ``config`` describes.

    Raises:
        UnsupportedModelError: it describes none.
    """
    return _counts_of(config.model_type, config.to_json_string(use_diff=False))


@functools.lru_cache(maxsize=16)
def _counts_of(kind: str, values: str) -> Counts:
    """Build the model of meta tensors and count."""
    import torch

    config = _config_from(kind, json.loads(values))
    model, layers = _built(config)
    linears = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    sizes: Counter[str] = Counter()
    per_rank: Counter[str] = Counter()
    largest = 0
    for name, parameter in model.named_parameters():
        place = _place(name, name in linears)
        sizes[place] += parameter.numel()
        if place.endswith("linears"):
            largest = max(largest, parameter.numel())
            if name.split(".")[-2] in _ADAPTED:
                per_rank[place] += sum(parameter.shape)
    places = {place: sizes[place] for place in _PLACES}
    towers = {name: _tower(name, sizes, per_rank, config) for name in ("vision", "audio")}
    towers = {name: tower for name, tower in towers.items() if tower.linears + tower.rest}
    text = _text_config(config)
    return Counts(kind, text, layers, largest, per_rank["linears"], **places, towers=towers)


def _place(name: str, is_linear: bool) -> str:
    """Which of `_PLACES` a parameter belongs to, or of which tower it is what."""
    parts = name.split(".")
    for part in parts:
        if part in TOWERS:
            return f"{TOWERS[part]} {'linears' if is_linear else 'rest'}"
    if "embed_tokens_per_layer" in parts:
        return "table"
    if "embed_tokens" in parts or "lm_head" in parts:
        return "embedding"
    if "experts" in parts:
        return "experts"
    return "linears" if is_linear else "norms"


def _tower(name: str, sizes: Counter[str], per_rank: Counter[str], config: Any) -> Tower:
    shape = tower_shapes(config).get(f"{name}_tower")
    pooled = 1 if shape is None or shape.is_audio else config.vision_config.pooling_kernel_size**2
    linears = f"{name} linears"
    return Tower(sizes[linears], sizes[f"{name} rest"], per_rank[linears], shape, pooled)


def _built(config: Any) -> tuple[Any, tuple[LayerShape, ...]]:
    """The model of meta tensors and its layers' shapes, or one clear error for a config that has no
    model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        layers = tuple(layer_shapes(_text_config(config)))
        if any(min(one.hidden, one.queries, one.heads, one.mlp) < 1 for one in layers):
            raise ValueError("a layer has a size that is not positive")
        return model, layers
    except Exception as error:  # whatever a size of zero or an unknown name runs into
        raise UnsupportedModelError(
            f"gemma_accel.plan cannot make a model of this {config.model_type} config "
            f"({type(error).__name__}: {error}). Compare its fields with a released config.json."
        ) from error


def _text_config(config: Any) -> Any:
    """The text config; the unified model's, which knows no per-layer embeddings, says so here."""
    text = copy.deepcopy(config.get_text_config())
    if not hasattr(text, "hidden_size_per_layer_input"):
        text.hidden_size_per_layer_input = 0
    return text
