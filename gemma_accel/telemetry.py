"""Model FLOP utilisation for the Trainer's logs: the arithmetic that the training steps had to do,
over what the card could have done in the same time.

``mfu = FLOPs a token * tokens a second / peak``. What has to be done, in FLOPs a token:

    4 W        W weights of frozen linear layers: forward, and the input's gradient
    6 A        A weights of adapters, or of linear layers that are trained: the weights' too
    4 V D      the LM head (6 where it is trained)
    14 N H p   attention of N heads of H: two products forward and five backward, 2 N H each, for
               the p (query, key) pairs that see each other: causal, inside the window, in one
               document

Layers below the lowest trained weight have no backward and count for their forward alone. What is
computed a second time by checkpointing does not count, so that a step that recomputes less has the
higher utilisation. Nor do the towers: with images or sounds the figure is too low.

All of it is counted on the host, from the batch's shape. Only where documents are packed does it
depend on numbers that are on the device: they are summed there, and read when the Trainer logs,
which has just waited for the device to read the loss.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma_accel.memory import layer_shapes

__all__ = ["Arithmetic", "Utilisation", "arithmetic", "lora_weights", "peak_tflops", "trained"]

# Dense bfloat16 products with float32 accumulation, TFLOP/s, as NVIDIA's documents give them: for
# the GeForce cards the appendices of the architecture whitepapers (GA102, Ada, RTX Blackwell), or,
# where those leave a card out, twice its float32 rate, which is what they give for every other; for
# the others their data sheets, halved where the sheet says "with sparsity". By exact name: a laptop
# card runs as fast as its maker lets it, a slice of a card (MIG) has a share of it.
_PEAK = {
    "GeForce RTX 3060": 25.5,
    "GeForce RTX 3060 Ti": 32.4,
    "GeForce RTX 3070": 40.6,
    "GeForce RTX 3070 Ti": 43.5,
    "GeForce RTX 3080": 59.5,
    "GeForce RTX 3080 Ti": 68.2,
    "GeForce RTX 3090": 71.2,
    "GeForce RTX 3090 Ti": 80.0,
    "GeForce RTX 4060": 30.2,
    "GeForce RTX 4060 Ti": 44.1,
    "GeForce RTX 4070": 58.3,
    "GeForce RTX 4070 SUPER": 71.0,
    "GeForce RTX 4070 Ti": 80.2,
    "GeForce RTX 4070 Ti SUPER": 88.2,
    "GeForce RTX 4080": 97.5,
    "GeForce RTX 4080 SUPER": 104.4,
    "GeForce RTX 4090": 165.2,
    "GeForce RTX 5050": 26.3,
    "GeForce RTX 5060": 38.4,
    "GeForce RTX 5060 Ti": 47.4,
    "GeForce RTX 5070": 61.7,
    "GeForce RTX 5070 Ti": 87.9,
    "GeForce RTX 5080": 112.6,
    "GeForce RTX 5090": 209.5,
    "RTX A4000": 76.7,
    "RTX A5000": 111.1,
    "RTX A6000": 154.8,
    "RTX 6000 Ada Generation": 364.2,
    "A10": 125.0,
    "A30": 165.0,
    "A40": 149.7,
    "A100-SXM4-40GB": 312.0,
    "A100-SXM4-80GB": 312.0,
    "A100-PCIE-40GB": 312.0,
    "A100 80GB PCIe": 312.0,
    "L4": 121.0,
    "L40": 181.0,
    "L40S": 362.0,
    "H100 80GB HBM3": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H200": 989.4,
    "H200 NVL": 835.5,
    "B200": 2250.0,
}


def peak_tflops(name: str) -> float | None:
    """A card's peak by the name that `torch.cuda.get_device_name` gives; None for one unknown."""
    return _PEAK.get(name.removeprefix("NVIDIA "))


# ---- the arithmetic


class _Layer(NamedTuple):
    projections: list[tuple[int, int]]
    """In and out of the linear layers that adapters go on: of attention, and of the MLP."""
    others: int
    """Weights of the others that a token passes: per-layer embedding, router, chosen experts."""
    pair: int
    """FLOPs forward of a query and a key that see each other."""
    window: int | None


def _layers(config: Any) -> list[_Layer]:
    layers = []
    for shape in layer_shapes(config):
        hidden, queries, wide = shape.hidden, shape.queries, shape.mlp
        projections = [(hidden, queries), (queries, hidden)]
        projections += [(hidden, wide), (hidden, wide), (wide, hidden)]
        if shape.keys:
            one_for_both = config.attention_k_eq_v and not shape.sliding
            projections += [(hidden, shape.keys)] * (1 if one_for_both else 2)
        others = 3 * hidden * shape.per_layer
        if config.enable_moe_block:
            chosen = config.top_k_experts * 3 * config.moe_intermediate_size
            others += hidden * (config.num_experts + chosen)
        window = config.sliding_window if shape.sliding else None
        layers.append(_Layer(projections, others, 4 * queries, window))
    return layers


def lora_weights(config: Any, rank: int) -> int:
    """Weights of adapters of one rank on all linear layers of the decoder layers."""
    return sum(rank * (a + b) for layer in _layers(config) for a, b in layer.projections)


def _pairs(length: int, window: int | None) -> int:
    """(query, key) pairs of a row that see each other."""
    reach = min(window or length, length)
    return reach * length - reach * (reach - 1) // 2


@dataclass(frozen=True)
class Arithmetic:
    """FLOPs of training: of each token, and of each visible pair by the window it is seen in."""

    token: float
    pairs: dict[int | None, float]

    def rows(self, count: int, length: int) -> float:
        """Of rows that are one document each."""
        pairs = sum(_pairs(length, window) * flops for window, flops in self.pairs.items())
        return count * (length * self.token + pairs)

    def packed(self, position_ids: Tensor) -> Tensor:
        """Of packed rows, whose positions begin again with each document; on their device."""
        seen = position_ids + 1
        flops = torch.zeros((), dtype=torch.float64, device=seen.device)
        for window, each in self.pairs.items():
            flops += each * (seen if window is None else seen.clamp(max=window)).sum()
        return flops + position_ids.numel() * self.token


def arithmetic(config: Any, *, adapters: int = 0, trained: int = 0, lowest: int = 0) -> Arithmetic:
    """What training costs a model with the text config ``config``.

    Args:
        adapters: weights of adapters.
        trained: weights of the model's own linear layers (the head too) that are trained.
        lowest: the first layer with anything to train in it; those below have no backward.
    """
    token = 4.0 * config.vocab_size * config.hidden_size + 6.0 * adapters + 2.0 * trained
    pairs: Counter[int | None] = Counter()
    for index, layer in enumerate(_layers(config)):
        backward = index >= lowest
        weights = sum(a * b for a, b in layer.projections) + layer.others
        token += (4.0 if backward else 2.0) * weights
        pairs[layer.window] += layer.pair * 7 // 2 if backward else layer.pair
    return Arithmetic(token, dict(pairs))


class Trained(NamedTuple):
    adapters: int
    own: int
    lowest: int


_TOWERS = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.")


def trained(model: Any, config: Any) -> Trained:
    """What of ``model`` is trained, as `arithmetic` takes it."""
    adapters, own, lowest = 0, 0.0, config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tower = any(part in name for part in _TOWERS)
        layer = None if tower else re.search(r"\blayers\.(\d+)\.", name)
        lowest = min(lowest, int(layer[1]) if layer else _reach(name, config))
        if tower or parameter.ndim < 2 or "embed_tokens_per_layer" in name:
            continue  # the tables' rows are looked up
        if "lora_" in name:
            adapters += parameter.numel()
        elif ".experts." in name:
            own += parameter.numel() * config.top_k_experts / config.num_experts
        else:
            own += parameter.numel()
    return Trained(adapters, int(own), lowest)


def _reach(name: str, config: Any) -> int:
    """Down to which layer a weight outside the layers needs gradients."""
    above = "lm_head" in name or re.search(r"\bnorm\.", name)
    return config.num_hidden_layers if above else 0


# ---- in a run


class Utilisation:
    """Counts what a trainer's micro-batches cost. Does nothing without a card that is known, or on
    a model whose arithmetic is not.
    """

    def __init__(self, trainer: Any = None) -> None:
        self._arithmetic: Arithmetic | None = None
        self._peak = _peak_of(trainer)
        config = _text_config(trainer) if self._peak else None
        if config is not None:
            adapters, own, lowest = trained(trainer.model, config)
            self._arithmetic = arithmetic(config, adapters=adapters, trained=own, lowest=lowest)
        self._tokens = self._all_tokens = 0
        self._flops: Any = 0.0
        self._all_flops = 0.0

    def add(self, inputs: Mapping[str, Any]) -> None:
        """Count a micro-batch, without waiting for the device."""
        ids, positions = inputs.get("input_ids"), inputs.get("position_ids")
        if self._arithmetic is None or not isinstance(ids, Tensor) or ids.ndim != 2:
            return
        self._tokens += ids.numel()
        if isinstance(positions, Tensor) and positions.shape == ids.shape:
            self._flops = self._flops + self._arithmetic.packed(positions)
        else:
            self._flops = self._flops + self._arithmetic.rows(*ids.shape)

    def report(self, tokens_per_second: float | None, *, whole_run: bool) -> dict[str, float]:
        """``mfu`` since the last report, or of the whole run, at the pace that was measured."""
        tokens, flops = self._tokens, float(self._flops)
        self._all_tokens += tokens
        self._all_flops += flops
        self._tokens, self._flops = 0, 0.0
        if whole_run:
            tokens, flops = self._all_tokens, self._all_flops
        if not (tokens and tokens_per_second and self._peak):
            return {}
        return {"mfu": round(flops / tokens * tokens_per_second / (self._peak * 1e12), 4)}


def _peak_of(trainer: Any) -> float | None:
    if trainer is None or trainer.args.device.type != "cuda":
        return None
    return peak_tflops(torch.cuda.get_device_name(trainer.args.device))


def _text_config(trainer: Any) -> Any:
    """The text config of a Gemma 4 model; None for another."""
    config: Any = getattr(trainer.accelerator.unwrap_model(trainer.model), "config", None)
    known = str(getattr(config, "model_type", "")).startswith("gemma4")
    return config.get_text_config() if known else None
