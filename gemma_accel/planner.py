"""Will it fit? What a run takes in GPU and host memory, and what the memory policy will choose.

A config is enough. A plan adds up four things. What stays all run: weights, adapters, gradients,
the optimizer's moments (`_resident`). What a step has at its highest moment: the arithmetic that
the policy itself decides with (`gemma_accel.memory`), and what passes between layers
(`_between_layers`). What the caching allocator loses for being in pieces (`_reserved`). And what
Transformers reserves while it loads (`_load_peak`). Parameters are counted by `gemma_accel.counts`.

Bytes inside, GiB outside. CUDA's own context (0.3 to 0.5 GiB) is no allocation and in no figure.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple

from gemma_accel.counts import Counts, Tower, config_of, count
from gemma_accel.memory import (
    AWAY,
    HEAD_TILE,
    Arrangement,
    Itemsize,
    LayerShape,
    Mode,
    TowerShape,
    arrange,
    between_layers_bytes,
    evaluation_bytes,
    graph_bytes,
    kept_bytes,
    loss_bytes,
    sound_front_bytes,
    tower_kept_bytes,
    tower_transient_bytes,
    transient_bytes,
)
from gemma_accel.models import text_model

__all__ = ["Plan", "plan", "plan_for_model", "require_gib"]

GIB = 2**30
ITEMSIZES = {"bfloat16": 2, "float32": 4}
NARROW = ITEMSIZES["bfloat16"]  # of released checkpoints, and of what autocast computes
# bytes a parameter in NF4: codes, an int8 scale a block of 64, a float32 for 256 of these
NF4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)
# bytes a parameter for 8-bit Adam: two moments, each with a float32 scale a block of 256
ADAM_8BIT = 2 * (1 + 4 / 256)
ADAM_32BIT = 8  # what Trainer has bitsandbytes use for embeddings
# of what comes and goes in a step: reserved beyond it for being in pieces (measured, see the
# tests). Ours is small because segments grow (`gemma_accel.allocator`); on WSL2 it is 0.25
PIECES, STOCK_PIECES = 0.03, 0.33
STOCK_PIECES_MOST = 2 * GIB  # however long its rows (measured at 65,536 tokens)
TIDY = 0.02  # of all allocations: the pieces that stay once the allocator has given back others
EVAL_BATCH = 8  # transformers' per_device_eval_batch_size
IMAGE_TOKENS = 280  # soft tokens of an image, unless the processor is told otherwise
SOUND_TOKENS = 25  # of a second of sound
PROCESS = 1.35  # GiB of host memory that Python, torch and CUDA's libraries hold (measured)

_HOST = " (host)"
_BFLOAT16 = "dtype='bfloat16', by name SFTConfig(model_init_kwargs={'dtype': 'bfloat16'})"


# --- what a user sees ---


@dataclass(frozen=True)
class Plan:
    """What will be where and the peaks it predicts, in GiB. Print it, or take `to_dict` for JSON.

    Attributes:
        components: what is on the GPU at training's highest moment, by name; names that end in
            "(host)" are in host memory.
        load_peak_gib: the most that loading reserves.
        eval_peak_gib: the most that an evaluation reserves, at Transformers' default of 8
            sequences a batch and TRL's loss without logits.
        choices: "layers" (mode -> how many), "graphs" (whether the layers are captured), where
            "table" and "towers" live, and "alternatives" (name -> training's peak with it).
        longest_sequence: tokens a sequence that fit at this batch size; 0 where none do.
        largest_batch: sequences of this length that fit; 0 where none do.
        remedies: where it does not fit, what would.
        notes: what the figures take for granted.
        images, sound_seconds: the media of each sequence.
        dtype: of the weights that are not quantised; "bfloat16" stands for float16 too.
    """

    model: str
    vram_gib: float | None
    batch_size: int
    sequence_length: int
    quantization: str | None
    lora_rank: int
    components: dict[str, float]
    load_peak_gib: float
    eval_peak_gib: float
    choices: dict[str, Any]
    longest_sequence: int
    largest_batch: int
    remedies: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    images: int = 0
    sound_seconds: float = 0.0
    dtype: str = "bfloat16"

    @property
    def peak_gib(self) -> float:
        """Training's peak: all components on the GPU."""
        return sum(size for name, size in self.components.items() if not name.endswith(_HOST))

    @property
    def host_gib(self) -> float:
        """Host memory: all components there."""
        return sum(size for name, size in self.components.items() if name.endswith(_HOST))

    @property
    def fits(self) -> bool:
        """Whether loading and training stay within ``vram_gib``; an evaluation may still not."""
        return _within(self.vram_gib, max(self.peak_gib, self.load_peak_gib))

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        sums = {"peak_gib": self.peak_gib, "host_gib": self.host_gib, "fits": self.fits}
        return {**dataclasses.asdict(self), **sums}

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=100, force_terminal=False, force_jupyter=False).print(self)
        return out.getvalue().rstrip()

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        yield _places_table(self)
        yield _choices_table(self)
        yield from _sentences(self)


def plan(
    model_or_config: Any,
    *,
    vram_gib: float | None,
    batch_size: int,
    sequence_length: int,
    quantization: str | None = "nf4",
    lora_rank: int = 16,
    images: int = 0,
    sound_seconds: float = 0.0,
    dtype: str = "bfloat16",
) -> Plan:
    """Predict where everything will be, and the peaks of loading, training and evaluation.

    Neither a GPU nor weights are needed. The run computes in bfloat16, with ``adamw_8bit``.

    Args:
        model_or_config: a Gemma 4 config, a model, a directory with a ``config.json``, a JSON
            file, or a name that `AutoConfig` resolves.
        vram_gib: the GPU memory to live in, in GiB, as `apply` takes it; None for no limit, where
            every layer is checkpointed as stock does.
        batch_size: sequences in a step at once (``per_device_train_batch_size``).
        sequence_length: tokens of each, its media's soft tokens included.
        quantization: "nf4" (bitsandbytes, with double quantisation) or None (all in ``dtype``).
        lora_rank: of adapters on the language model's projections (q, k, v, o, gate, up, down);
            0 trains every weight.
        images: images in each sequence, 280 soft tokens apiece. There are adapters in the vision
            tower too, then.
        sound_seconds: seconds of sound in each sequence, 25 soft tokens apiece; likewise.
        dtype: of the weights that are not quantised: "bfloat16", or "float32", in which TRL loads
            a model given by name unless told; autocast (``bf16=True``) computes in bfloat16 then.
            The per-layer table is taken to stay in the checkpoint file, in bfloat16; a model that
            was float32 before `apply` has it in float32 in host memory.

    Raises:
        UnsupportedModelError: not a Gemma 4 config or model.
        ValueError: a size that is not positive or not finite, an unknown quantization or dtype,
            4-bit weights to train, media that the model has no tower for or the sequence no room.
    """
    _check_sizes(vram_gib, batch_size, sequence_length, lora_rank, images)
    _check_seconds(sound_seconds)
    _check_weights(quantization, lora_rank, dtype)
    counts = count(config_of(model_or_config))
    run = _Run(counts, vram_gib, quantization, lora_rank, images, float(sound_seconds), dtype)
    _check_room(run, sequence_length)
    return _plan(run, batch_size, sequence_length)


def plan_for_model(
    base_model: Any,
    budget_gib: float | None,
    batch_size: int,
    sequence_length: int,
    **media: Any,
) -> Plan:
    """The plan of a model that is there: its own quantisation and dtype, and its adapters where it
    has any.

    A model without adapters is taken as one that gets some of rank 16, PEFT coming after `apply`.
    """
    wide = text_model(base_model).norm.weight.dtype.itemsize > NARROW  # which nothing quantises
    ranks = [p.shape[0] for name, p in base_model.named_parameters() if ".lora_A." in name]
    return plan(
        base_model,
        vram_gib=budget_gib,
        batch_size=batch_size,
        sequence_length=sequence_length,
        quantization="nf4" if getattr(base_model, "is_loaded_in_4bit", False) else None,
        lora_rank=max(ranks, default=16),
        dtype="float32" if wide else "bfloat16",
        **media,
    )


def require_gib(name: str, value: Any) -> None:
    """Raise a ValueError for what is no amount of memory."""
    if (
        not isinstance(value, Real)
        or isinstance(value, bool)
        or not math.isfinite(value)
        or not 0 < float(value) < 2**20
    ):
        raise ValueError(
            f"{name} must be a positive, finite number of GiB, got {value!r}. Give what the card "
            "has free: 7.0 on one of 8 GB."
        )


def _check_sizes(
    vram_gib: float | None, batch_size: int, length: int, rank: int, images: int
) -> None:
    if vram_gib is not None:
        require_gib("plan: vram_gib", vram_gib)
    sizes = (
        ("batch_size", batch_size, 1),
        ("sequence_length", length, 1),
        ("lora_rank", rank, 0),
        ("images", images, 0),
    )
    for name, value, least in sizes:
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"plan: {name} must be a whole number from {least} up, got {value!r}")


def _check_weights(quantization: str | None, rank: int, dtype: str) -> None:
    if quantization not in ("nf4", None):
        raise ValueError(
            f"plan: quantization must be 'nf4' or None, got {quantization!r} (--quantization nf4 "
            "or none)"
        )
    if rank == 0 and quantization is not None:
        raise ValueError(
            f"plan: lora_rank=0 trains every weight, which those in {quantization!r} cannot be. "
            "Pass quantization=None (--quantization none), or a rank."
        )
    if dtype not in ITEMSIZES:
        raise ValueError(
            f"plan: dtype must be {' or '.join(map(repr, ITEMSIZES))}, got {dtype!r}. Plan "
            "'bfloat16' for float16, which is as wide."
        )


def _check_seconds(sound_seconds: float) -> None:
    if (
        not isinstance(sound_seconds, Real)
        or isinstance(sound_seconds, bool)
        or not 0 <= float(sound_seconds) < 1e6
    ):
        raise ValueError(f"plan: sound_seconds must be a number from 0 up, got {sound_seconds!r}")


def _check_room(run: _Run, length: int) -> None:
    for name in run.soft_tokens:
        if run.is_stock:
            raise ValueError("plan: the unified model's media are not planned. Plan its text.")
        if name not in run.counts.towers:
            raise ValueError(
                f"plan: this config has no {name} tower, so that its sequences hold no "
                f"{'images' if name == 'vision' else 'sound'}. Plan a text-only run."
            )
    if (taken := sum(run.soft_tokens.values())) > length:
        raise ValueError(
            f"plan: a sequence of {length:,} tokens has no room for its media, which take "
            f"{taken:,}. sequence_length counts them in."
        )


def _within(vram_gib: float | None, gib: float) -> bool:
    return vram_gib is None or gib <= vram_gib + 1e-6  # a sum that fills the limit may round over


# --- bytes that stay ---


@dataclass(frozen=True)
class _Run:
    """A model and how it is trained: all of a plan but the batch."""

    counts: Counts
    vram_gib: float | None
    quantization: str | None
    lora_rank: int
    images: int = 0
    sound_seconds: float = 0.0
    dtype: str = "bfloat16"

    @property
    def itemsize(self) -> int:
        """Bytes of a weight that is not quantised."""
        return ITEMSIZES[self.dtype]

    @property
    def activations(self) -> Itemsize:
        """Bytes an element: float32 weights train under autocast."""
        return Itemsize(stream=self.itemsize, inner=NARROW)

    @property
    def soft_tokens(self) -> dict[str, int]:
        """Of a sequence's media, by the tower that makes them."""
        media = {
            "vision": self.images * IMAGE_TOKENS,
            "audio": math.ceil(self.sound_seconds * SOUND_TOKENS),
        }
        return {name: tokens for name, tokens in media.items() if tokens}

    @property
    def used(self) -> list[Tower]:
        """The towers that there are media for."""
        return [self.counts.towers[name] for name in self.soft_tokens]

    def media(self, batch_size: int) -> list[tuple[TowerShape, int]]:
        """What passes through the layers of each of these."""
        return [
            (tower.shape, batch_size * tokens * tower.inputs_per_token)
            for tower, tokens in zip(self.used, self.soft_tokens.values(), strict=True)
            if tower.shape is not None
        ]

    @property
    def per_linear_parameter(self) -> float:
        """Bytes."""
        return NF4 if self.quantization else self.itemsize

    @property
    def towers(self) -> float:
        """Bytes."""
        return self._bytes_of(self.counts.towers.values())

    @property
    def used_towers(self) -> float:
        """Bytes."""
        return self._bytes_of(self.used)

    def _bytes_of(self, towers: Iterable[Tower]) -> float:
        return sum(t.linears * self.per_linear_parameter + t.rest * self.itemsize for t in towers)

    @property
    def table(self) -> int:
        """Bytes, as it is loaded."""
        return self.counts.table * self.itemsize

    @property
    def adapters(self) -> int:
        """Bytes. PEFT makes adapters float32; TRL turns those of a 4-bit model to bfloat16."""
        return self.adapter_weights * (2 if self.quantization else 4)

    @property
    def adapter_weights(self) -> int:
        per_rank = self.counts.adapter_per_rank + sum(t.adapter_per_rank for t in self.used)
        return per_rank * self.lora_rank

    @property
    def is_mixture(self) -> bool:
        return bool(getattr(self.counts.text, "enable_moe_block", False))

    @property
    def is_stock(self) -> bool:
        """Whether no patch covers the model's classes: it is trained as it comes."""
        return "unified" in self.counts.kind

    def loss(self, tokens: int, tile: int = HEAD_TILE) -> int:
        """Bytes of TRL's chunked head."""
        return loss_bytes(tokens, self.counts.text.hidden_size, self.counts.text.vocab_size, tile)


def _weights(run: _Run) -> dict[str, float]:
    """Bytes of the weights that stay on the GPU: of an adapter run all but the table and the towers
    that there are no media for.
    """
    counts = run.counts
    found = {
        "text linears": counts.linears * run.per_linear_parameter,
        "experts": counts.experts * run.itemsize,
        "embedding": counts.embedding * run.itemsize,
        "norms": counts.norms * run.itemsize,
    }
    if run.lora_rank == 0:
        return found | {"per-layer table": run.table, "towers": run.towers}
    return found | ({"towers": run.used_towers} if run.used else {})


def _trained(run: _Run) -> dict[str, float]:
    """Bytes of adapters, gradients and moments. A tower without media gets no gradient."""
    counts = run.counts
    if run.lora_rank:
        moments = run.adapter_weights * ADAM_8BIT
        return {"adapters": run.adapters, "gradients": run.adapters, "optimizer state": moments}
    embeddings = counts.embedding + counts.table
    others = counts.linears + counts.experts + counts.norms
    others += sum(tower.linears + tower.rest for tower in run.used)
    return {
        "gradients": (embeddings + others) * run.itemsize,
        "optimizer state": embeddings * ADAM_32BIT + others * ADAM_8BIT,
    }


def _resident(run: _Run) -> float:
    """Bytes on the GPU all through training."""
    return sum(_weights(run).values()) + sum(_trained(run).values())


# --- bytes of a step ---


class _Moment(NamedTuple):
    """Bytes of activations at a step's highest moment."""

    kept: int
    workspace: int
    outside: int
    """of the decoder: the loss or, where graphs leave it no other memory, a tower's backward"""


def _choose(run: _Run, batch_size: int, length: int) -> Arrangement:
    """`MemoryPolicy.arrangement`, without a tensor to ask about, and with a host that is slower
    than its card.
    """
    from gemma_accel.patches.checkpointing import SLACK

    layers = run.counts.layers
    if run.vram_gib is None or run.is_mixture or run.is_stock:
        return Arrangement([Mode.RECOMPUTE] * len(layers), False, HEAD_TILE)
    itemsize = Itemsize.throughout(run.itemsize)
    held = _held(run, batch_size, length, itemsize)
    available = int(run.vram_gib * GIB * (1 - SLACK) - held)
    trained = int(run.adapters) if _captures() else None
    vocabulary = run.counts.text.vocab_size
    towers = _towers_backward(run, batch_size, itemsize)
    return arrange(
        layers, batch_size * length, available, vocabulary, trained, itemsize, towers=towers
    )


def _held(run: _Run, batch_size: int, length: int, itemsize: Itemsize) -> float:
    """What is taken before layers get theirs: what `wiring._tell_policy` says, or is there now."""
    weights = sum(_weights(run).values())
    trained = run.adapters if run.lora_rank else weights
    later = weights + run.adapters + 3 * trained
    embeddings = batch_size * length * run.counts.text.hidden_size * itemsize.stream
    now = weights + run.adapters + embeddings + _inputs(run, batch_size, length)
    later += _between_layers(run, _all(run, Mode.OFFLOAD_IN_PARTS), batch_size, length, itemsize)
    return max(later, now) + _towers_kept(run, batch_size, itemsize)


def _towers_kept(run: _Run, batch_size: int, itemsize: Itemsize) -> int:
    media = run.media(batch_size)
    kept = sum(tower_kept_bytes(*one, itemsize) for one in media)
    if run.lora_rank == 0:  # convolutions in front that are trained keep what they make
        kept += sum(sound_front_bytes(n, itemsize) for tower, n in media if tower.is_audio)
    return kept


def _towers_backward(run: _Run, batch_size: int, itemsize: Itemsize) -> int:
    """One after the other, when the decoder's is through."""
    needs = [tower_transient_bytes(*media, itemsize) for media in run.media(batch_size)]
    return max(needs, default=0)


@functools.cache
def _captures() -> bool:
    """Whether there is a patch that captures the layers in CUDA graphs."""
    from gemma_accel.patching import registry

    return any(patch.name == "cuda_graphs" for patch in registry().patches())


def _highest(run: _Run, choice: Arrangement, batch_size: int, length: int) -> _Moment:
    """`memory.peak_bytes` in its parts: some layer's backward, the loss, or a tower's backward."""
    tokens, itemsize = batch_size * length, run.activations
    loss, tower = run.loss(tokens, choice.head_tile), _towers_backward(run, batch_size, itemsize)
    extra = _experts_bytes(run, tokens, backward=True)
    kept = _towers_kept(run, batch_size, itemsize)
    moments = [_Moment(kept, tower, 0)]
    for layer, mode in zip(run.counts.layers, choice.modes, strict=True):
        kept += tokens * kept_bytes(layer, mode, itemsize)
        moments.append(_Moment(kept, transient_bytes(layer, mode, tokens, itemsize) + extra, 0))
    if choice.graphed:  # memory of their own, which neither loss nor tower can use
        highest = max(moments[1:], key=sum)
        own = graph_bytes(tokens, run.counts.text.hidden_size, int(run.adapters), itemsize)
        return _Moment(highest.kept, highest.workspace + own, max(loss, tower))
    return max(*moments, _Moment(kept, 0, loss), key=sum)


def _experts_bytes(run: _Run, tokens: int, *, backward: bool) -> int:
    """A mixture's block: each token's row for each of its experts, gate, up, their product; out."""
    if not run.is_mixture:
        return 0
    text = run.counts.text
    row = 3 * text.hidden_size + 4 * text.moe_intermediate_size
    once = tokens * text.top_k_experts * row * run.itemsize
    return once * 3 // 2 if backward else once


def _inputs(run: _Run, batch_size: int, length: int) -> int:
    """Ids, labels and mask."""
    return batch_size * length * 3 * 8


def _between_layers(
    run: _Run, choice: Arrangement, batch_size: int, length: int, itemsize: Itemsize
) -> int:
    """What passes between layers, and a batch's ids, labels and mask."""
    passing = between_layers_bytes(
        run.counts.layers,
        choice.modes,
        batch_size,
        length,
        itemsize,
        input_gradient=not run.lora_rank,
    )
    return passing + _inputs(run, batch_size, length)


def _reserved(run: _Run, resident: float, passing: float) -> float:
    """What the allocator reserves: some more than ``passing``, but near the limit it tidies up.

    The limit is one that it meets: `apply` holds it to ``vram_gib``, and a card has its own.
    """
    freely = resident + passing * (1 + PIECES)
    if run.vram_gib is None:
        return freely
    return min(freely, max(run.vram_gib * GIB, (resident + passing) * (1 + TIDY)))


def _train_peak(run: _Run, choice: Arrangement, batch_size: int, length: int) -> float:
    if run.is_stock:
        return _stock_train_peak(run, batch_size, length)
    moment = _highest(run, choice, batch_size, length)
    between = _between_layers(run, choice, batch_size, length, run.activations)
    passing = sum(moment) + between
    return _reserved(run, _resident(run), passing)


def _load_peak(run: _Run) -> float:
    """Bytes reserved up front, the scales of 4-bit weights, and weights on the way to NF4."""
    counts = run.counts
    rest = counts.embedding + counts.experts + counts.norms + counts.tower_rest
    if run.lora_rank == 0:
        rest += counts.table
    linears = counts.linears + counts.tower_linears
    on_the_way = counts.largest_linear * run.itemsize * (3 if run.quantization else 1)
    return linears * run.per_linear_parameter + rest * run.itemsize + on_the_way


def _eval_peak(run: _Run, choice: Arrangement, length: int, train_tokens: int) -> float:
    """Captured graphs are not counted: they go where an evaluation does not fit beside them."""
    counts, shape = run.counts, (EVAL_BATCH, length)
    passing = evaluation_bytes(
        counts.layers, choice, train_tokens, shape, counts.text.vocab_size, run.activations
    )
    passing += _experts_bytes(run, EVAL_BATCH * length, backward=False)
    for tower, vectors in run.media(EVAL_BATCH):  # before that
        frozen = dataclasses.replace(tower, trained=False)
        passing = max(passing, tower_transient_bytes(frozen, vectors, run.activations))
    return _reserved(run, _resident(run) - _trained(run)["gradients"], passing)


# --- stock, for comparison ---


def _stock_train_peak(run: _Run, batch_size: int, length: int) -> float:
    """Stock TRL: table and towers on the GPU, layers checkpointed, one of them replayed.

    In float32 layers in 4 bits answer in their input's dtype, others as autocast has it. (Of
    float32 NF4 alone has been measured.)
    """
    tokens, layers = batch_size * length, run.counts.layers
    inner = run.itemsize if run.quantization else NARROW
    table_width = len(layers) * (run.counts.text.hidden_size_per_layer_input or 0)
    checkpoints = len(layers) * run.counts.text.hidden_size * run.itemsize
    rows = table_width * 8  # the norm's float32 copy, rows or projection, and a gradient
    replayed = max(_stock_kept(layer, inner) + 4 * layer.mlp for layer in layers)
    per_token = checkpoints + rows + replayed
    loss = run.loss(tokens)
    if run.lora_rank == 0 and run.itemsize > NARROW:
        loss += run.counts.linears * NARROW  # autocast's copies, until the forward is through
    passing = max(tokens * per_token, tokens * (checkpoints + rows) + loss)
    passing += _experts_bytes(run, tokens, backward=True)
    media = run.media(batch_size)
    towers = [_stock_tower(shape, vectors, run.itemsize) for shape, vectors in media]
    needs = [needed for _, needed in towers]
    passing = max(passing, *needs) if needs else passing
    passing += sum(kept for kept, _ in towers)
    resident = _resident(run)
    if run.lora_rank:
        resident += run.table + run.towers - run.used_towers
    pieces = min(passing * STOCK_PIECES, STOCK_PIECES_MOST)
    return resident + passing + pieces + _stock_mask(run, batch_size, length)


def _stock_mask(run: _Run, batch_size: int, length: int) -> int:
    """Of the sliding layers: length by length booleans, and SDPA's copy in the layers' dtype."""
    sliding = any(layer.sliding for layer in run.counts.layers)
    if not sliding or length <= run.counts.text.sliding_window:
        return 0
    return batch_size * length**2 * (1 + run.itemsize)


def _stock_tower(tower: TowerShape, vectors: int, itemsize: int) -> tuple[int, int]:
    """What a stock tower keeps for its backward, and what that needs beyond: bytes, after what a
    CPU's allocator saw of one.
    """
    if tower.is_audio:  # float32 copies in norms and clamps, no checkpointing, a narrow stream
        kept = tower.layers * (56 * tower.hidden + 10 * tower.mlp)
        return vectors * kept * NARROW, vectors * 4 * tower.mlp * NARROW
    kept = (tower.layers + 1) * tower.hidden
    return vectors * kept * itemsize, vectors * (30 * tower.hidden + 10 * tower.mlp) * itemsize


def _stock_kept(layer: LayerShape, itemsize: int) -> int:
    """Bytes a token that a stock layer keeps: float32 copies in norms, four times F in the MLP."""
    norms = 5 if layer.per_layer else 4
    wide = norms * layer.hidden + layer.queries + 2 * layer.keys
    narrow = 4 * layer.mlp + 2 * layer.hidden + 2 * layer.queries + 2 * layer.keys
    return 4 * wide + itemsize * (narrow + 3 * layer.per_layer)


# --- the plan ---


def _plan(run: _Run, batch_size: int, length: int) -> Plan:
    choice = _choose(run, batch_size, length)
    made = Plan(
        model=f"{run.counts.kind}, {run.counts.total / 1e9:.2f}B parameters",
        vram_gib=run.vram_gib,
        batch_size=batch_size,
        sequence_length=length,
        quantization=run.quantization,
        lora_rank=run.lora_rank,
        components=_components(run, choice, batch_size, length),
        load_peak_gib=_load_peak(run) / GIB,
        eval_peak_gib=_eval_peak(run, choice, length, batch_size * length) / GIB,
        choices=_choices(run, choice, batch_size, length),
        longest_sequence=_longest(run, batch_size),
        largest_batch=_largest(run, length),
        images=run.images,
        sound_seconds=run.sound_seconds,
        dtype=run.dtype,
    )
    made.notes.extend(_notes(run, length))
    if not made.fits:
        made.remedies.extend(_remedies(run, made))
    return made


def _components(run: _Run, choice: Arrangement, batch_size: int, length: int) -> dict[str, float]:
    """GiB by name."""
    moment = _highest(run, choice, batch_size, length)
    between = _between_layers(run, choice, batch_size, length, run.activations)
    resident, passing = _resident(run), sum(moment) + between
    found: dict[str, float] = {**_weights(run), **_trained(run), "kept activations": moment.kept}
    if run.is_stock:
        found["towers"] = run.towers
        here = sum(found.values())
        found["workspace"] = _stock_train_peak(run, batch_size, length) - here
    else:
        found["workspace"] = moment.workspace + between
        tower = _towers_backward(run, batch_size, run.activations)
        found["towers' backward" if moment.outside == tower else "loss"] = moment.outside
        found["allocator slack"] = _reserved(run, resident, passing) - resident - passing
    if run.lora_rank and not run.is_stock:
        parked = run.towers - run.used_towers
        table = run.counts.table * NARROW  # as the checkpoint has it
        found |= {"per-layer table" + _HOST: table, "towers" + _HOST: parked}
    input_bytes = batch_size * length * run.counts.text.hidden_size * run.itemsize
    # the first layer's input is the embeddings, which all layers read where it has a per-layer one
    first = 1 if run.counts.text.hidden_size_per_layer_input else 0
    away = sum(mode in AWAY for mode in choice.modes[first:])
    found["offloaded inputs" + _HOST] = input_bytes * away
    found["Python and libraries" + _HOST] = PROCESS * GIB
    return {name: size / GIB for name, size in found.items() if size}


def _choices(run: _Run, choice: Arrangement, batch_size: int, length: int) -> dict[str, Any]:
    counted = Counter(choice.modes)
    where = "host memory" if run.lora_rank else "GPU memory: trained"
    others = _alternatives(run, choice, batch_size, length)
    return {
        "layers": {mode.value: counted[mode] for mode in Mode if counted[mode]},
        "graphs": choice.graphed,
        "table": where if run.table else "the model has none",
        "towers": _where_towers_are(run),
        "alternatives": {name: size / GIB for name, size in others.items()},
    }


def _where_towers_are(run: _Run) -> str:
    if not run.towers:
        return "the model has none"
    if run.lora_rank == 0:
        return "GPU memory: trained"
    others = "host memory" if len(run.used) < len(run.counts.towers) else ""
    used = f"{' and '.join(run.soft_tokens)} in GPU memory" if run.used else ""
    return ", the other in ".join(filter(None, (used, others)))


def _alternatives(run: _Run, choice: Arrangement, batch_size: int, length: int) -> dict[str, float]:
    """Training's peak in bytes, were one thing otherwise."""
    peak = _train_peak(run, choice, batch_size, length)
    found = {
        f"every layer: {mode.value}": _train_peak(run, _all(run, mode), batch_size, length)
        for mode in _modes_of(run)
    }
    if run.lora_rank:
        found |= {"per-layer table on the GPU": peak + run.table} if run.table else {}
        parked = 0 if run.is_stock else run.towers - run.used_towers
        found |= {"towers on the GPU": peak + parked} if parked else {}
        other = dataclasses.replace(run, quantization=None if run.quantization else "nf4")
        name = f"{'NF4' if other.quantization else run.dtype} weights, same layers"
        found[name] = _train_peak(other, choice, batch_size, length)
    if run.dtype == "float32":
        narrow = _narrowed(run)
        found["all in bfloat16, same layers"] = _train_peak(narrow, choice, batch_size, length)
    found["stock TRL, training"] = _stock_train_peak(run, batch_size, length)
    found["stock TRL, loading"] = _load_peak(run) + (run.table if run.lora_rank else 0)
    return found


def _narrowed(run: _Run) -> _Run:
    return dataclasses.replace(run, dtype="bfloat16")


def _modes_of(run: _Run) -> Sequence[Mode]:
    """Layers with a mixture of experts, or of a stock model, have stock's checkpointing."""
    return (Mode.RECOMPUTE,) if run.is_mixture or run.is_stock else tuple(Mode)


def _all(run: _Run, mode: Mode) -> Arrangement:
    return Arrangement([mode] * len(run.counts.layers), False, HEAD_TILE)


def _fits(run: _Run, batch_size: int, length: int) -> bool:
    """Whether it does with what the policy would choose."""
    if run.vram_gib is None:
        return True
    peak = _train_peak(run, _choose(run, batch_size, length), batch_size, length)
    return _within(run.vram_gib, max(peak, _load_peak(run)) / GIB)


def _last(fits: Callable[[int], bool], most: int) -> int:
    """The largest n up to ``most`` that fits, given that all smaller ones do; 0 where none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _longest(run: _Run, batch_size: int) -> int:
    """In steps of 64 tokens, up to what the model was made for."""
    most = run.counts.text.max_position_embeddings
    steps = _last(lambda n: _fits(run, batch_size, 64 * n), most // 64)
    longest = 64 * steps or _last(lambda n: _fits(run, batch_size, n), min(most, 63))
    return longest if longest >= sum(run.soft_tokens.values()) else 0


def _largest(run: _Run, length: int) -> int:
    return _last(lambda n: _fits(run, n, length), 1024)


def _needed(run: _Run, batch_size: int, length: int) -> float:
    """GiB of GPU memory, in tenths, with which it would fit."""

    def fits(tenths: int) -> bool:
        return _fits(dataclasses.replace(run, vram_gib=tenths / 10), batch_size, length)

    assert run.vram_gib is not None
    low, high = math.floor(run.vram_gib * 10), math.ceil(run.vram_gib * 10) + 1
    while not fits(high):
        low, high = high, 2 * high
    return (low + 1 + _last(lambda n: not fits(low + n), high - low - 1)) / 10


def _remedies(run: _Run, made: Plan) -> list[str]:
    """What would fit, each on its own."""
    batch_size, length = made.batch_size, made.sequence_length
    found = []
    if run.dtype == "float32" and _fits(_narrowed(run), batch_size, length):
        found.append(f"loading in bfloat16 ({_BFLOAT16})")
    if made.largest_batch:
        steps = math.ceil(batch_size / made.largest_batch)
        found.append(
            f"per_device_train_batch_size={made.largest_batch} with "
            f"gradient_accumulation_steps={steps} in place of 1"
        )
    if made.longest_sequence:
        found.append(f"sequences of at most {made.longest_sequence:,} tokens")
    adapters = dataclasses.replace(run, lora_rank=16)
    if run.lora_rank == 0 and _fits(adapters, batch_size, length):
        found.append("adapters in place of training every weight (lora_rank=16)")
    elif run.quantization is None and _fits(
        dataclasses.replace(adapters, quantization="nf4"), batch_size, length
    ):
        found.append("adapters on 4-bit weights (quantization='nf4')")
    found.append(f"{_needed(run, batch_size, length):.1f} GiB of GPU memory")
    return found


def _notes(run: _Run, length: int) -> list[str]:
    notes = [
        f"{_media_text(run) or 'a text-only run'}, with adamw_8bit",
        "the limit is what PyTorch may allocate; CUDA's own context, 0.3 to 0.5 GiB, and a desktop "
        "come on top: a card of 8 GB leaves about 7",
        "the evaluation is TRL's; plain Trainer's makes logits of the whole batch",
    ]
    if run.dtype == "float32":
        notes.append(
            "what is not quantised is float32, in which TRL loads a model given by name, and to "
            "which prepare_model_for_kbit_training widens one, and autocast (bf16=True) computes; "
            f"loading in bfloat16 ({_BFLOAT16}) halves these weights"
        )
    if length > (most := run.counts.text.max_position_embeddings):
        notes.append(f"the model was made for rows of at most {most:,} tokens, these are longer")
    if run.is_mixture:
        notes.append(
            f"experts are not nn.Linear: bitsandbytes leaves them in {run.dtype}; layers with "
            "experts are checkpointed as stock does"
        )
    if run.is_stock:
        notes.append(
            "no patch covers the unified model's classes yet, and apply refuses it: the figures "
            "are stock TRL's"
        )
    return notes


def _media_text(made: _Run) -> str:
    """A sequence's media, in words."""
    images = f"{made.images} image{'s' if made.images > 1 else ''}" if made.images else ""
    sound = f"{made.sound_seconds:g} s of sound" if made.sound_seconds else ""
    media = " and ".join(filter(None, (images, sound)))
    towers = "towers" if images and sound else "tower"
    return f"{media} in each sequence, adapters in their {towers} too" if media else ""


# --- the tables ---


def _places_table(made: Plan) -> Any:
    from rich.table import Table

    weights = made.dtype
    if made.quantization:
        weights = "NF4" if made.dtype == "bfloat16" else f"NF4, the rest {made.dtype}"
    how = f"LoRA rank {made.lora_rank}" if made.lora_rank else "every weight trained"
    title = (
        f"{made.model}\n{weights}, {how}, {made.batch_size} x {made.sequence_length:,} tokens, GiB"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("what", min_width=28)
    table.add_column("GPU", justify="right")
    table.add_column("host", justify="right")
    for name, size in made.components.items():
        row = (_gib(size), "") if not name.endswith(_HOST) else ("", _gib(size))
        table.add_row(name.removesuffix(_HOST), *row)
    table.add_section()
    table.add_row("training", _gib(made.peak_gib), _gib(made.host_gib))
    table.add_row("loading", _gib(made.load_peak_gib), "")
    evaluation = f"evaluation, {EVAL_BATCH} x {made.sequence_length:,} tokens"
    table.add_row(evaluation, _gib(made.eval_peak_gib), "")
    return table


def _choices_table(made: Plan) -> Any:
    from rich.table import Table

    table = Table(title="instead, GiB", title_justify="left")
    table.add_column("with", min_width=28)
    table.add_column("GPU", justify="right")
    for name, size in made.choices["alternatives"].items():
        table.add_row(name, _gib(size))
    return table


def _gib(size: float) -> str:
    return f"{size:.2f}" if size >= 0.005 else "<0.01"


def _sentences(made: Plan) -> Iterator[str]:
    layers = ", ".join(f"{count} {mode}" for mode, count in made.choices["layers"].items())
    yield f"layers: {layers}" + (", captured in CUDA graphs" if made.choices["graphs"] else "")
    if made.vram_gib is not None:
        verdict = "fits" if made.fits else "does not fit"
        yield f"{verdict} {made.vram_gib:g} GiB"
        yield f"longest sequence at batch size {made.batch_size}: {made.longest_sequence:,} tokens"
        yield f"largest batch of {made.sequence_length:,} tokens: {made.largest_batch}"
        if made.fits and not _within(made.vram_gib, made.eval_peak_gib):
            yield "evaluation does not: set per_device_eval_batch_size lower"
    for remedy in made.remedies:
        yield f"would fit: {remedy}"
    for note in made.notes:
        yield f"note: {note}"
