"""Where in the model a run looks: at every layer's input, behind the text layers' attention and
MLP, and which text layers are passed by.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4AudioLayer,
    Gemma4TextDecoderLayer,
    Gemma4VisionEncoderLayer,
)

from gemma_accel.memory import layer_shapes
from gemma_accel.models import text_model
from gemma_accel.verification.runs import INPUT, Probe, Run

__all__ = ["Stations", "layers_in_between"]

_IN_FRONT = (
    "embed_tokens",
    "embed_tokens_per_layer",
    "per_layer_model_projection",
    "per_layer_projection_norm",
)


class Stations:
    """A model's; their hooks sit in it while a run is watched."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        # walked once: patches change classes, not modules
        self._modules = list(base.named_modules())
        self._paths = {id(module): re.escape(path) for path, module in self._modules}
        self._in_between = layers_in_between(text_model(base))
        self._spared: list[nn.Module] = []
        self._not_looked_at: re.Pattern[str] | None = None

    @contextlib.contextmanager
    def watched(self, run: Run) -> Iterator[None]:
        """``run`` meets what passes the stations. A free run goes by itself, unless nudged."""
        handles = []
        passed_by = self._in_between if run.probe.shallow else self._spared
        try:
            for layer in passed_by:
                vars(layer)["forward"] = _hand_on
            if run.mode != "free" or run.nudge:
                handles += [_before(run, path, module) for path, module in self._layers()]
                handles += [_behind(run, path, module) for path, module in self._blocks()]
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer in passed_by:
                vars(layer).pop("forward", None)

    def _layers(self) -> Iterator[tuple[str, nn.Module]]:
        """And what the last text layer's output enters."""
        layers = (Gemma4TextDecoderLayer, Gemma4VisionEncoderLayer, Gemma4AudioLayer)
        for path, module in self._modules:
            if isinstance(module, layers):
                yield path, module
        yield "norm", text_model(self.base).norm

    def _blocks(self) -> Iterator[tuple[str, nn.Module]]:
        for path, module in self._modules:
            if isinstance(module, Gemma4TextDecoderLayer):
                yield f"{path}.self_attn", module.self_attn
                yield f"{path}.mlp", module.mlp

    # -- layers that are passed by --

    @contextlib.contextmanager
    def spare(self, layers: list[nn.Module]) -> Iterator[None]:
        """These text layers hand on what they get, and are not looked at. Nor is what sums over
        layers: the gradients of parameters in front of them, and those of keys and values that
        several share. A shallow batch has its own: stock passed by the same ones.
        """
        self._spared = layers
        self._not_looked_at = self._keys_without(layers) if layers else None
        try:
            yield
        finally:
            self._spared, self._not_looked_at = [], None

    def is_spared(self, probe: Probe, key: str) -> bool:
        pattern = None if probe.shallow else self._not_looked_at
        return pattern is not None and pattern.search(key) is not None

    def _keys_without(self, layers: list[nn.Module]) -> re.Pattern[str]:
        """The quantities that are others where these layers do nothing."""
        paths, every = self._paths, list(text_model(self.base).layers)
        parts = [rf"gradient of (?!.*_tower).*\.(?:{'|'.join(_IN_FRONT)})\."]
        for layer in layers:
            path, index = paths[id(layer)], every.index(layer)
            # what a layer hands on is seen where the next one begins
            after = paths[id(every[index + 1])] if index + 1 < len(every) else "norm"
            parts += [rf"{path}\.", rf"gradient of {path}{INPUT}$", rf"^{after}{INPUT}$"]
        for layer in every:
            if getattr(layer.self_attn, "store_full_length_kv", False):
                behind = rf"{INPUT}$|\.self_attn\.|\.input_layernorm\."
                parts.append(rf"gradient of .*{paths[id(layer)]}(?:{behind})")
        return re.compile("|".join(parts))


def layers_in_between(text: Any) -> list[nn.Module]:
    """The decoder layers that are neither the first nor the last of their kind."""
    kinds: dict[Any, list[int]] = {}
    for index, (layer, shape) in enumerate(
        zip(text.layers, layer_shapes(text.config), strict=True)
    ):
        gives = getattr(layer.self_attn, "store_full_length_kv", False)
        kinds.setdefault((shape, gives), []).append(index)
    return [text.layers[index] for indices in kinds.values() for index in indices[1:-1]]


def _hand_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _before(run: Run, path: str, module: nn.Module) -> RemovableHandle:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (run.station(args[0], f"{path}{INPUT}", hold=True), *args[1:]), kwargs
        held = run.station(kwargs["hidden_states"], f"{path}{INPUT}", hold=True)
        return args, {**kwargs, "hidden_states": held}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _behind(run: Run, path: str, module: nn.Module) -> RemovableHandle:
    def hook(_: nn.Module, args: Any, out: Any) -> Any:
        first = out[0] if isinstance(out, tuple) else out
        first = run.station(first, path, hold=False)
        return (first, *out[1:]) if isinstance(out, tuple) else first

    return module.register_forward_hook(hook)
