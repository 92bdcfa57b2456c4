"""Checkpointing by budget: each layer keeps, recomputes or offloads as the memory at hand allows.

The seam is the function with which Transformers checkpoints a layer
(`_gradient_checkpointing_func`, which turning checkpointing on sets on every layer, the same in
every version): the fused layer hands out one that asks the policy first. So
``gradient_checkpointing=False`` means what it says, never recompute, and ``True`` is the permission
to.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel

from gemma_accel.hookspecs import Patch
from gemma_accel.memory import (
    AWAY,
    HEAD_TILE,
    Arrangement,
    Itemsize,
    Mode,
    TowerShape,
    arrange,
    between_layers_bytes,
    evaluation_bytes,
    head_groups,
    layer_shapes,
    loss_bytes,
    mlp_schedule,
    tower_kept_bytes,
    tower_transient_bytes,
)
from gemma_accel.patches.dropout import draws
from gemma_accel.patches.graphs import StackGraphs
from gemma_accel.patches.lm_head import set_head_tile
from gemma_accel.patches.offload import OffloadedInputs
from gemma_accel.patches.per_layer import LayerInput
from gemma_accel.patches.seams import Fused, Undoing

__all__ = ["MemoryPolicy", "checkpointing_patch", "graphs_patch"]

GIB = 2**30
# of the budget: what the caching allocator cannot use for being in pieces, and what no arithmetic
# names
SLACK = 0.05


class MemoryPolicy:
    """One text model's: chooses a batch's modes once a shape, and runs its layers by them.

    ``budget`` is what `apply` was given, in bytes; without one (no GPU) layers are checkpointed as
    stock would. ``fixed`` is what weights, adapters, their gradients and the optimizer take on the
    device, once it is known.
    """

    def __init__(self, text: Any) -> None:
        self.shapes = layer_shapes(text.config)
        self.vocabulary = text.config.vocab_size
        self.budget: int | None = None
        self.fixed = self.trained = self.withheld = 0
        self.graphs: StackGraphs | None = None  # where the `cuda_graphs` patch may capture
        self.tell: Callable[[str, str], None] | None = None  # hears what was chosen, by topic
        self.media: dict[TowerShape, int] = {}
        """the most that went through a tower at once in training, in patches or soft tokens"""
        self.chosen: dict[tuple[int, ...], Arrangement] = {}
        self._in_tiles: dict[tuple[int, ...], Arrangement] = {}  # with graphs, if that pays
        self.forced: Arrangement | None = None  # to verify and to test by
        self._inputs = OffloadedInputs()

    def __deepcopy__(self, memo: Any) -> MemoryPolicy:
        twin = object.__new__(MemoryPolicy)
        twin.__dict__.update(
            self.__dict__,
            media={},
            chosen={},
            _in_tiles={},
            graphs=None,
            tell=None,
            _inputs=OffloadedInputs(),
        )
        return twin

    def set_budget(self, nbytes: int) -> None:
        """Live in ``nbytes`` from the next forward on."""
        self.budget = nbytes
        self._choose_anew()

    def set_fixed(self, fixed: int, trained: int) -> None:
        """What of it is taken whatever the batch, and how much of that are trained parameters, in
        bytes.
        """
        if (fixed, trained) != (self.fixed, self.trained):
            self.fixed, self.trained = fixed, trained
            self._choose_anew()

    def expect_media(self, tower: TowerShape, vectors: int) -> None:
        """So many patches of images, or soft tokens of sound, are about to go through a tower in a
        training step.
        """
        if vectors > self.media.get(tower, 0):
            others = {t: n for t, n in self.media.items() if t.is_audio != tower.is_audio}
            self.set_media(others | {tower: vectors})

    def set_media(self, media: dict[TowerShape, int]) -> None:
        """From now on this is the most that goes through the towers."""
        self.media = media
        self._choose_anew(at_once=True)

    def take(self, nbytes: int) -> None:
        """So much more is about to be taken for good."""
        self.fixed += nbytes
        self._choose_anew(at_once=True)

    def evaluate_media(self, tower: TowerShape, hidden: Tensor) -> None:
        """``hidden`` [B, T, D] is about to go through a tower, and no backward follows."""
        graphs = self.graphs
        if graphs is None or not graphs.captured or not hidden.is_cuda:
            return
        vectors = hidden.shape[0] * hidden.shape[1]
        needed = tower_transient_bytes(tower, vectors, Itemsize.throughout(hidden.element_size()))
        if not self._fits_beside(graphs.nbytes, needed, hidden):
            graphs.make_room()

    def allow_graphs(self, graphs: StackGraphs) -> None:
        """Layers may be captured from now on."""
        self.graphs = graphs
        self._choose_anew()

    def give_up_graphs(self) -> None:
        """No layers will be captured any more."""
        self.graphs = None
        self._choose_anew()

    def withhold(self, nbytes: int) -> None:
        """So much less for graphs from now on: they turned out to take more than reckoned."""
        self.withheld += nbytes
        self._choose_anew()

    def _choose_anew(self, *, at_once: bool = False) -> None:
        """From the next forward of the layers on; ``at_once``, graphs go before that."""
        self.chosen.clear()
        self._in_tiles.clear()
        if at_once and self.graphs is not None:
            self.graphs.make_room()

    def arrangement(self, hidden: Tensor) -> Arrangement:
        """What is chosen for hidden states [B, T, D] of this shape, when they enter the stack."""
        if self.forced is not None:
            return self.forced
        key = _key(hidden)
        if key not in self.chosen:
            chosen = self._arranged(hidden, captures=self.graphs is not None and hidden.is_cuda)
            if chosen.graphed and chosen.in_tiles:
                # slower than whole layers one by one, unless the host is: eager steps will tell
                self._in_tiles[key] = chosen
                chosen = self._arranged(hidden, captures=False)
            self._set(key, chosen)
        return self.chosen[key]

    def _arranged(self, hidden: Tensor, *, captures: bool) -> Arrangement:
        assert self.budget is not None
        batch, length, itemsize = *hidden.shape[:2], Itemsize.throughout(hidden.element_size())
        held = torch.cuda.memory_allocated(hidden.device) if hidden.is_cuda else 0
        passing = between_layers_bytes(
            self.shapes,
            [Mode.OFFLOAD_IN_PARTS] * len(self.shapes),
            batch,
            length,
            itemsize,
            input_gradient=hidden.requires_grad,
        )
        passing += sum(tower_kept_bytes(*media, itemsize) for media in self.media.items())
        return arrange(
            self.shapes,
            batch * length,
            int(self.budget * (1 - SLACK)) - max(self.fixed + passing, held),
            self.vocabulary,
            self.trained + self.withheld if captures else None,
            itemsize,
            towers=self._towers_backward(itemsize),
        )

    def _towers_backward(self, itemsize: Itemsize) -> int:
        """Bytes: one tower's after the other."""
        needs = [tower_transient_bytes(*media, itemsize) for media in self.media.items()]
        return max(needs, default=0)

    def _set(self, key: tuple[int, ...], chosen: Arrangement) -> None:
        self.chosen[key] = chosen
        self.note("layers", self.summary())

    def note(self, topic: str, text: str) -> None:
        """For the report, where there is one."""
        if self.tell is not None:
            self.tell(topic, text)

    def graphs_fit(self, hidden: Tensor, *, host_bound: bool) -> bool:
        """Whether to capture a batch of this shape: graphs fit beside everything else, and if that
        takes layers in tiles, then only where the host is what a step waits for (``host_bound``).
        """
        if self.budget is None:
            return False
        chosen = self.arrangement(hidden)
        tiled = self._in_tiles.pop(_key(hidden), None)
        if tiled is not None and host_bound:
            chosen = tiled
            self._set(_key(hidden), chosen)
        set_head_tile(chosen.head_tile)
        return chosen.graphed

    def shortfall(self, hidden: Tensor) -> int:
        """By how many bytes the loss, or a tower's backward, does not fit beside what is held now,
        graphs included.
        """
        assert self.budget is not None
        tokens, width = hidden.shape[0] * hidden.shape[1], hidden.shape[2]
        tile = self.arrangement(hidden).head_tile
        loss = loss_bytes(tokens, width, self.vocabulary, tile)
        outside = max(loss, self._towers_backward(Itemsize.throughout(hidden.element_size())))
        held = torch.cuda.memory_reserved(hidden.device)
        return held + outside + self.trained - self.budget

    def evaluation_fits(self, hidden: Tensor, captured: Tensor, graphs: int) -> bool:
        """Whether a forward without gradients, of ``hidden`` [B, T, D], fits beside the graphs of a
        batch like ``captured``, which hold so many bytes.
        """
        chosen = self.arrangement(captured)
        needed = evaluation_bytes(
            self.shapes,
            chosen,
            captured.shape[0] * captured.shape[1],
            (hidden.shape[0], hidden.shape[1]),
            self.vocabulary,
            Itemsize.throughout(hidden.element_size()),
        )
        return self._fits_beside(graphs, needed, hidden)

    def _fits_beside(self, graphs: int, needed: int, hidden: Tensor) -> bool:
        assert self.budget is not None
        held = max(self.fixed, torch.cuda.memory_allocated(hidden.device))
        return held + graphs + needed <= self.budget * (1 - SLACK)

    def join_inputs(self) -> None:
        """Before a capture ends early: copies that are under way in it end there too."""
        self._inputs.join()

    def part_with_inputs(self) -> OffloadedInputs:
        """The host buffers, for graphs that were just captured with them; the next eager step makes
        its own.
        """
        mine, self._inputs = self._inputs, OffloadedInputs()
        mine.let_go()
        return mine

    def summary(self) -> str:
        """What was chosen, for the report: a line a batch shape."""
        lines = []
        for key, chosen in self.chosen.items():
            counts = Counter(mode.value for mode in chosen.modes)
            text = ", ".join(f"{n} {mode}" for mode, n in counts.items())
            lines.append(
                f"{key[0]} x {key[1]}: {text}"
                + (", with room for CUDA graphs" if chosen.graphed else "")
            )
        return "; ".join(lines)

    def run(
        self,
        layer: Any,
        stock: Callable[..., Any],
        forward: Callable[..., Any],
        *inputs: Any,
    ) -> Any:
        """``forward(hidden, *rest)`` of ``layer`` in the mode chosen for it; ``stock`` is
        Transformers' checkpoint function.
        """
        if self.budget is None or not inputs or not _is_plain(stock):
            return stock(forward, *inputs)
        hidden, *rest = inputs
        chosen = self.arrangement(hidden)
        mode = chosen.modes[layer.layer_idx]
        if layer.layer_idx == 0:
            set_head_tile(chosen.head_tile)
            self._inputs.begin()
        forward = self._scheduled(layer, forward, mode, hidden.shape[0] * hidden.shape[1])
        kept = mode in (Mode.KEEP, Mode.RECOMPUTE_MLP) or not _has_backward(layer, hidden)
        # no random numbers are drawn in a layer without dropout: their state need not be saved and
        # put back around every one
        again = functools.partial(stock, preserve_rng_state=not kept and draws(layer))
        if kept:
            out = forward(hidden, *rest)
        elif mode in AWAY and hidden.is_cuda and not _stays(hidden, *rest):
            # where there is no room for a second input, a layer waits for its own: it is long
            ahead = mode is not Mode.OFFLOAD_IN_PARTS
            out = self._inputs.run(again, forward, hidden, *rest, ahead=ahead)
        else:
            out = again(forward, hidden, *rest)
        if layer.layer_idx == len(self.shapes) - 1:
            self._inputs.settle()
        return out

    def _scheduled(
        self, layer: Any, forward: Callable[..., Any], mode: Mode, tokens: int
    ) -> Callable[..., Any]:
        """``forward`` as this mode has the layer's blocks run; in its replay too, whatever batch
        went through the layer meanwhile.
        """
        keep, tile = mlp_schedule(mode, tokens)
        groups = head_groups(mode, self.shapes[layer.layer_idx].heads)

        def run(*inputs: Any) -> Any:
            layer.mlp.keep, layer.mlp.tile = keep, tile
            layer.self_attn.groups = groups
            return forward(*inputs)

        return run


def _key(hidden: Tensor) -> tuple[int, ...]:
    return (*hidden.shape, hidden.element_size())


def _has_backward(layer: Any, hidden: Tensor) -> bool:
    """False below everything that is trained."""
    return hidden.requires_grad or any(p.requires_grad for p in layer.parameters())


def _stays(hidden: Tensor, per_layer_input: Any = None, *_: Any) -> bool:
    """Whether a layer's input is the embeddings, which every layer reads: on the device anyway."""
    return isinstance(per_layer_input, LayerInput) and per_layer_input.reads(hidden)


def _is_plain(stock: Any) -> bool:
    """Whether this is torch's checkpoint as Transformers sets it up by default: TRL's selective
    mode or an offload of somebody's own stay.
    """
    return getattr(stock, "func", None) is checkpoint and set(stock.keywords) <= {
        "use_reentrant",
        "preserve_rng_state",
    }


class CheckpointingPatch(Patch):
    """Gives a text model's layers a common memory policy."""

    name, modality, seam = "checkpointing", "text", "memory"

    def matches(self, path: str, module: nn.Module) -> bool:
        return (
            type(module).stock if isinstance(module, Fused) else type(module)
        ) is Gemma4TextModel

    def why_not(self, module: Any) -> str | None:
        if module.config.enable_moe_block:
            return "layers with a mixture-of-experts block are checkpointed as stock does"
        return None

    def install(self, module: Any) -> Undoing:
        policy = MemoryPolicy(module)
        holders: list[Any] = [module, *module.layers]
        for holder in holders:
            holder.memory = policy

        def run() -> None:
            set_head_tile(HEAD_TILE)
            for holder in holders:
                vars(holder).pop("memory", None)
                vars(getattr(holder, "self_attn", holder)).pop("groups", None)
                for name in ("keep", "tile"):
                    vars(getattr(holder, "mlp", holder)).pop(name, None)

        return Undoing(run, lambda: None)


class GraphsPatch(Patch):
    """Lets a text model's layers be captured; needs the policy, which knows whether there is memory
    for it.
    """

    name, modality, seam = "cuda_graphs", "text", "graphs"

    def matches(self, path: str, module: nn.Module) -> bool:
        return checkpointing_patch.matches(path, module)

    def needs(self, module: nn.Module) -> str | None:
        return "checkpointing"

    def why_not(self, module: nn.Module) -> str | None:
        if not torch.cuda.is_available():
            return "no CUDA device"
        return None

    def install(self, module: Any) -> Undoing:
        graphs = StackGraphs(module)
        module.memory.allow_graphs(graphs)
        for layer in module.layers:
            layer.graphs = graphs

        def run() -> None:
            graphs.drop()
            for layer in module.layers:
                vars(layer).pop("graphs", None)

        return Undoing(run, lambda: None)


checkpointing_patch = CheckpointingPatch()
graphs_patch = GraphsPatch()
