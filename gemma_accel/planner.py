"""Will it fit? What a fine-tuning run has in GPU memory, in the host's, and what the memory policy will choose: from a config alone.

A plan adds up four things. What stays all run: weights, adapters, their gradients, the optimizer's moments (`_resident`). What a step has at its
highest moment: the same arithmetic the policy decides with (`gemma_accel.memory`), and beside it what passes between layers (`_between_layers`).
What the caching allocator loses for being in pieces. And what Transformers reserves while it loads (`_load_peak`). Parameters are counted on a
model built of meta tensors, so the count follows the installed Transformers and no weight is read.

Bytes inside, GiB outside. CUDA's own context (0.3 to 0.5 GiB) is no allocation and in no figure here.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gemma_accel.errors import UnsupportedModelError
from gemma_accel.memory import (
    LayerShape,
    Mode,
    choose_modes,
    kept_bytes,
    layer_shapes,
    loss_bytes,
    mlp_schedule,
    transient_bytes,
)

__all__ = ["Plan", "plan", "plan_for_model"]

GIB = 2**30
ITEMSIZE = (
    2  # bfloat16, in which everything that is not quantised is loaded and every activation computed
)
NF4 = (
    0.5 + 1 / 64 + 4 / (64 * 256)
)  # bytes a parameter: codes, an int8 scale a block of 64, a float32 for 256 of these
ADAM_8BIT = 2 * (
    1 + 4 / 256
)  # bytes a parameter: two moments, each with a float32 scale a block of 256
TIDY = 0.02  # of what is allocated: the pieces left once the allocator has given back what it can
EVAL_BATCH = 8  # transformers' default per_device_eval_batch_size
PROCESS = 2.0  # GiB of host memory: Python, torch, CUDA's libraries (assumed)

_ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_TOWERS = ("vision_tower", "audio_tower", "embed_vision", "embed_audio")
_KINDS = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
_RECOMPUTING = (Mode.RECOMPUTE, Mode.RECOMPUTE_TILED, Mode.OFFLOAD)


# -- what a user sees --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What will be where, and the peaks it predicts. Print it, or ask `to_dict` for JSON. Every size is in GiB.

    Attributes:
        components: what is on the GPU at training's highest moment, by name; the names ending in "(host)" are not.
        load_peak_gib: the most that loading reserves.
        eval_peak_gib: the most that an evaluation reserves, at Transformers' default of 8 sequences a batch.
        choices: "layers" (mode -> how many of them), where "table" and "towers" live, and "alternatives" (name -> peak with it instead).
        longest_sequence: tokens that fit at this batch size; 0 where none do.
        largest_batch: sequences of this length that fit; 0 where none do.
        remedies: where it does not fit, what would.
        notes: what the figures take for granted.
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
    process_gib: float
    choices: dict[str, Any]
    longest_sequence: int
    largest_batch: int
    remedies: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def peak_gib(self) -> float:
        """Training's peak: everything on the GPU."""
        return sum(size for name, size in self.components.items() if not name.endswith("(host)"))

    @property
    def host_gib(self) -> float:
        """Host memory, the process itself included."""
        return self.process_gib + sum(
            size for name, size in self.components.items() if name.endswith("(host)")
        )

    @property
    def fits(self) -> bool:
        """Whether loading and training stay within ``vram_gib`` (an evaluation is the user's to size)."""
        return self.vram_gib is None or max(self.peak_gib, self.load_peak_gib) <= self.vram_gib

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        sums = {"peak_gib": self.peak_gib, "host_gib": self.host_gib, "fits": self.fits}
        return {**asdict(self), **sums}

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=110, force_terminal=False).print(self)
        return out.getvalue().rstrip()

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield from _render(self)


def plan(
    model_or_config: Any,
    *,
    vram_gib: float | None,
    batch_size: int,
    sequence_length: int,
    quantization: str | None = "nf4",
    lora_rank: int = 16,
) -> Plan:
    """Predict where everything will be and the peaks of loading, training and evaluation. No GPU is needed, and no weights.

    Args:
        model_or_config: a Gemma 4 config, a model, a directory with a ``config.json``, a JSON file, or a name `AutoConfig` resolves.
        vram_gib: the GPU memory to live in, as `apply` takes it; None for no limit (every layer is then checkpointed).
        batch_size: sequences a step holds at once (``per_device_train_batch_size``).
        sequence_length: tokens of each.
        quantization: ``"nf4"`` (bitsandbytes, double quantisation) or None (bfloat16).
        lora_rank: of adapters on the language model's q, k, v, o, gate, up and down; 0 trains every weight.

    Raises:
        UnsupportedModelError: not a Gemma 4 config.
        ValueError: a size that is not positive, an unknown quantization, or 4-bit weights to be trained.
    """
    _check(vram_gib, batch_size, sequence_length, quantization, lora_rank)
    run = _Run(_counts(_config_of(model_or_config)), vram_gib, quantization, lora_rank)
    return _plan(run, batch_size, sequence_length)


def plan_for_model(
    base_model: Any, budget_gib: float | None, batch_size: int, sequence_length: int
) -> Plan:
    """The plan of a model that is there: its own quantisation and adapters (rank 16 is taken where it has none yet)."""
    ranks = [p.shape[0] for name, p in base_model.named_parameters() if ".lora_A." in name]
    quantization = "nf4" if getattr(base_model, "is_loaded_in_4bit", False) else None
    return plan(
        base_model,
        vram_gib=budget_gib,
        batch_size=batch_size,
        sequence_length=sequence_length,
        quantization=quantization,
        lora_rank=max(ranks, default=16),
    )


def _check(
    vram_gib: float | None, batch_size: int, length: int, quantization: str | None, rank: int
) -> None:
    if vram_gib is not None and not vram_gib > 0:
        raise ValueError(f"plan: vram_gib must be a positive number of GiB, got {vram_gib!r}")
    if batch_size < 1 or length < 1:
        raise ValueError(
            f"plan: batch_size and sequence_length must be at least 1, got {batch_size} and {length}"
        )
    if quantization not in ("nf4", None):
        raise ValueError(f"plan: quantization must be 'nf4' or None, got {quantization!r}")
    if rank < 0:
        raise ValueError(
            f"plan: lora_rank must be at least 0 (0: every weight is trained), got {rank}"
        )
    if rank == 0 and quantization is not None:
        raise ValueError(
            "plan: lora_rank=0 trains every weight, which 4-bit weights cannot be. Pass quantization=None."
        )


# -- the model, counted ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Counts:
    """Parameters of a model by where they live and how they are stored, and its decoder layers' shapes."""

    kind: str
    text: Any  # the text config
    layers: tuple[LayerShape, ...]
    linears: int
    """of the text stack's nn.Linear: what bitsandbytes quantises"""
    embedding: int
    experts: int
    table: int
    norms: int
    tower_linears: int
    tower_rest: int
    largest_linear: int
    adapter_per_rank: int
    """(inputs + outputs) over the adapted projections"""


def _config_of(source: Any) -> Any:
    """The config that ``source`` is, has, or names."""
    config = source
    if isinstance(source, (str, Path)):
        from transformers import AutoConfig

        path = Path(source)
        config = (
            _from_json(path)
            if path.suffix == ".json" and path.is_file()
            else AutoConfig.from_pretrained(source)
        )
    elif not hasattr(source, "model_type") and hasattr(source, "config"):
        config = source.config
    if getattr(config, "model_type", None) not in _KINDS:
        raise UnsupportedModelError(
            f"gemma_accel.plan takes a Gemma 4 config or model ({', '.join(_KINDS)}), got "
            f"{type(source).__name__} with model_type {getattr(config, 'model_type', None)!r}."
        )
    return config


def _from_json(path: Path) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = json.loads(path.read_text())
    kind = values.get("model_type")
    return CONFIG_MAPPING[kind].from_dict(values) if kind in _KINDS else _Foreign(kind)


class _Foreign(NamedTuple):
    model_type: str | None


def _counts(config: Any) -> _Counts:
    """Build the model of meta tensors and count; once a config."""
    return _counted(json.dumps(config.to_dict(), sort_keys=True, default=str), _Holder(config))


class _Holder:
    """Carries a config past the cache: the JSON beside it is the key, so any two holders are alike."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Holder)

    def __hash__(self) -> int:
        return 0


@functools.lru_cache(maxsize=8)
def _counted(key: str, holder: _Holder) -> _Counts:
    import torch
    from transformers import AutoModelForCausalLM

    config = holder.config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    sizes: Counter[str] = Counter()
    per_rank = largest = 0
    for name, parameter in model.named_parameters():
        where = _where(name, name in linears)
        sizes[where] += parameter.numel()
        if where.endswith("linears"):
            largest = max(largest, parameter.numel())
        if where == "linears" and name.split(".")[-2] in _ADAPTED:
            per_rank += sum(parameter.shape)
    text = _text_config(config)
    return _Counts(
        kind=config.model_type,
        text=text,
        layers=tuple(layer_shapes(text)),
        largest_linear=largest,
        adapter_per_rank=per_rank,
        **{name: sizes[name] for name in _PLACES},
    )


def _text_config(config: Any) -> Any:
    """The text config; the unified model's, which has no per-layer embeddings, says so here."""
    text = copy.deepcopy(config.get_text_config())
    if not hasattr(text, "hidden_size_per_layer_input"):
        text.hidden_size_per_layer_input = 0
    return text


_PLACES = ("linears", "embedding", "experts", "table", "norms", "tower_linears", "tower_rest")


def _where(name: str, is_linear: bool) -> str:
    """Which of `_PLACES` a parameter of this name belongs to."""
    parts = name.split(".")
    if any(tower in parts for tower in _TOWERS):
        return "tower_linears" if is_linear else "tower_rest"
    if "embed_tokens_per_layer" in parts:
        return "table"
    if "embed_tokens" in parts or "lm_head" in parts:  # bitsandbytes leaves the head alone
        return "embedding"
    if "experts" in parts:
        return "experts"
    return "linears" if is_linear else "norms"


# -- bytes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """A model and how it is trained: all of a plan but the batch."""

    counts: _Counts
    vram_gib: float | None
    quantization: str | None
    lora_rank: int

    @property
    def stored(self) -> float:
        """Bytes a parameter of an nn.Linear."""
        return NF4 if self.quantization else ITEMSIZE

    @property
    def adapters(self) -> int:
        return self.counts.adapter_per_rank * self.lora_rank

    @property
    def adapter_itemsize(self) -> int:
        """PEFT makes adapters float32; TRL turns those of a quantised model to bfloat16."""
        return 2 if self.quantization else 4

    @property
    def towers(self) -> float:
        return self.counts.tower_linears * self.stored + self.counts.tower_rest * ITEMSIZE


class _Moment(NamedTuple):
    """Bytes of activations at a step's highest moment."""

    kept: int
    workspace: int
    loss: int


def _weights(run: _Run) -> dict[str, float]:
    """Bytes of the weights that stay on the GPU, by name; towers and table of an adapter run do not."""
    counts = run.counts
    found = {
        "text linears": counts.linears * run.stored,
        "experts": counts.experts * ITEMSIZE,
        "embedding": counts.embedding * ITEMSIZE,
        "norms": counts.norms * ITEMSIZE,
    }
    if run.lora_rank == 0:
        found |= {"per-layer table": counts.table * ITEMSIZE, "towers": run.towers}
    return {name: size for name, size in found.items() if size}


def _trained(run: _Run) -> dict[str, float]:
    """Bytes of adapters, gradients and the optimizer's moments (8-bit Adam)."""
    if run.lora_rank == 0:
        counts = run.counts
        trained = counts.linears + counts.experts + counts.embedding + counts.norms + counts.table
        return {"gradients": trained * ITEMSIZE, "optimizer state": trained * ADAM_8BIT}
    size = run.adapters * run.adapter_itemsize
    return {"adapters": size, "gradients": size, "optimizer state": run.adapters * ADAM_8BIT}


def _resident(run: _Run) -> float:
    return sum(_weights(run).values()) + sum(_trained(run).values())


def _held(run: _Run) -> float:
    """What the policy takes as given, its way (`wiring._tell_policy`): parameters, and three times those that are trained."""
    weights = sum(_weights(run).values())
    if run.quantization:
        weights -= run.counts.linears * (NF4 - 0.5)  # scales are no parameters
    trained = run.adapters * run.adapter_itemsize if run.lora_rank else weights
    return weights + trained * (4 if run.lora_rank else 3)


def _modes(run: _Run, batch_size: int, length: int) -> list[Mode]:
    """What the policy will choose."""
    from gemma_accel.patches.checkpointing import SLACK

    layers = run.counts.layers
    if run.vram_gib is None or _is_mixture(run):
        return [Mode.RECOMPUTE] * len(layers)
    tokens = batch_size * length
    available = int(run.vram_gib * GIB * (1 - SLACK) - _held(run))
    return choose_modes(layers, tokens, available, _loss(run, tokens), ITEMSIZE)


def _is_mixture(run: _Run) -> bool:
    return bool(getattr(run.counts.text, "enable_moe_block", False))


def _loss(run: _Run, tokens: int) -> int:
    return loss_bytes(tokens, run.counts.text.hidden_size, run.counts.text.vocab_size)


def _highest(run: _Run, modes: Sequence[Mode], tokens: int) -> _Moment:
    """`memory.peak_bytes`, in its parts: some layer's backward, or the loss."""
    moments = []
    kept = 0
    for layer, mode in zip(run.counts.layers, modes, strict=True):
        kept += tokens * kept_bytes(layer, mode, ITEMSIZE)
        workspace = transient_bytes(layer, mode, tokens, ITEMSIZE) + _experts_bytes(run, tokens)
        moments.append(_Moment(kept, workspace, 0))
    return max(*moments, _Moment(kept, 0, _loss(run, tokens)), key=sum)


def _experts_bytes(run: _Run, tokens: int) -> int:
    """A mixture's recomputed block: rows gathered for each expert chosen, gate and up, activation, product, and the way out; then gradients."""
    text = run.counts.text
    if not _is_mixture(run):
        return 0
    chosen, width, hidden = text.top_k_experts, text.moe_intermediate_size, text.hidden_size
    return tokens * chosen * (3 * hidden + 4 * width) * ITEMSIZE * 3 // 2


def _between_layers(run: _Run, modes: Sequence[Mode], batch_size: int, length: int) -> int:
    """What passes between layers: embeddings and their gradient, rotations, the keys and values that later layers share, ids and labels."""
    tokens, text, layers = batch_size * length, run.counts.text, run.counts.layers
    total = tokens * 3 * 8
    for size in {layer.queries // text.num_attention_heads for layer in layers}:
        total += 2 * length * size * ITEMSIZE  # cosines and sines, the same for all of a batch
    if text.hidden_size_per_layer_input:
        embeds = tokens * text.hidden_size * ITEMSIZE
        total += embeds * (
            2 if modes[0] is Mode.OFFLOAD else 1
        )  # their gradient; themselves, where layer 0 does not keep them
    for index in _shared(layers):
        pair = tokens * 2 * layers[index].keys * ITEMSIZE
        total += pair * (2 if modes[index] in _RECOMPUTING else 1)
    return total


def _shared(layers: Sequence[LayerShape]) -> list[int]:
    """The layers whose keys and values others use: the last of each kind that has its own."""
    if all(layer.keys for layer in layers):
        return []
    last = {layer.sliding: index for index, layer in enumerate(layers) if layer.keys}
    return sorted(last.values())


def _reserved(run: _Run, allocated: float) -> float:
    """What the allocator reserves for ``allocated`` bytes: the policy's slack, less where the limit is near and it has to tidy up first."""
    from gemma_accel.patches.checkpointing import SLACK

    freely = allocated / (1 - SLACK)
    if run.vram_gib is None:
        return freely
    return min(freely, max(run.vram_gib * GIB, allocated * (1 + TIDY)))


def _train_bytes(run: _Run, modes: Sequence[Mode], batch_size: int, length: int) -> float:
    moment = _highest(run, modes, batch_size * length)
    return _reserved(
        run, _resident(run) + sum(moment) + _between_layers(run, modes, batch_size, length)
    )


def _load_peak(run: _Run) -> float:
    """What Transformers reserves up front (half a byte for each parameter to be quantised), the scales, and bf16 weights on their way to NF4."""
    counts = run.counts
    linears, rest = (
        counts.linears + counts.tower_linears,
        counts.embedding + counts.experts + counts.norms + counts.tower_rest,
    )
    table = counts.table if run.lora_rank == 0 else 0
    on_the_way = counts.largest_linear * ITEMSIZE * (3 if run.quantization else 1)
    return linears * run.stored + (rest + table) * ITEMSIZE + on_the_way


def _eval_bytes(
    run: _Run, modes: Sequence[Mode], batch_size: int, length: int, train_tokens: int
) -> float:
    """An evaluation: one layer's forward at a time, the shared keys and values, the head in chunks; no gradients."""
    tokens, text = batch_size * length, run.counts.text
    highest = 0
    for layer, mode in zip(run.counts.layers, modes, strict=True):
        _, tile = mlp_schedule(mode, train_tokens)  # a module keeps what training told it
        mlp = 3 * min(tokens, tile or tokens) * layer.mlp
        attention = tokens * (3 * layer.queries + 4 * layer.keys)
        highest = max(highest, mlp, attention)
    hidden = tokens * text.hidden_size
    head = min(tokens, 4096) * min(text.vocab_size, 32768) * ITEMSIZE + hidden * ITEMSIZE
    work = (highest + 4 * hidden) * ITEMSIZE + _experts_bytes(run, tokens)
    fixed = _resident(run) - _trained(run)["gradients"]
    return _reserved(run, fixed + max(work, head) + _between_layers(run, modes, batch_size, length))


def _offloaded(run: _Run, modes: Sequence[Mode], tokens: int) -> int:
    return (
        tokens
        * run.counts.text.hidden_size
        * ITEMSIZE
        * sum(mode is Mode.OFFLOAD for mode in modes)
    )


# -- the plan ----------------------------------------------------------------------------------------------------------


def _plan(run: _Run, batch_size: int, length: int) -> Plan:
    modes = _modes(run, batch_size, length)
    load = _load_peak(run)
    made = Plan(
        model=_name(run.counts),
        vram_gib=run.vram_gib,
        batch_size=batch_size,
        sequence_length=length,
        quantization=run.quantization,
        lora_rank=run.lora_rank,
        components=_components(run, modes, batch_size, length),
        load_peak_gib=load / GIB,
        eval_peak_gib=_eval_bytes(run, modes, EVAL_BATCH, length, batch_size * length) / GIB,
        process_gib=PROCESS,
        choices=_choices(run, modes, batch_size, length),
        longest_sequence=_longest(run, batch_size),
        largest_batch=_largest(run, length),
        notes=_notes(run),
    )
    made.remedies.extend([] if made.fits else _remedies(run, made))
    return made


def _components(run: _Run, modes: Sequence[Mode], batch_size: int, length: int) -> dict[str, float]:
    moment = _highest(run, modes, batch_size * length)
    found = {**_weights(run), **_trained(run)}
    found |= {
        "kept activations": moment.kept,
        "workspace": moment.workspace + _between_layers(run, modes, batch_size, length),
        "loss": moment.loss,
    }
    allocated = sum(found.values())
    found["allocator slack"] = _reserved(run, allocated) - allocated
    if run.lora_rank:
        found |= {
            "per-layer table (host)": run.counts.table * ITEMSIZE,
            "towers (host)": run.towers,
        }
    found["offloaded inputs (host)"] = _offloaded(run, modes, batch_size * length)
    return {name: size / GIB for name, size in found.items() if size}


def _choices(run: _Run, modes: Sequence[Mode], batch_size: int, length: int) -> dict[str, Any]:
    place = "host memory" if run.lora_rank else "GPU: trained"
    peak = _train_bytes(run, modes, batch_size, length)
    others = {
        f"every layer: {m.value}": _train_bytes(run, [m] * len(modes), batch_size, length)
        for m in _offered(run)
    }
    if run.lora_rank:
        if run.counts.table:
            others["per-layer table on the GPU"] = peak + run.counts.table * ITEMSIZE
        if run.towers:
            others["towers on the GPU"] = peak + run.towers
        other = _Run(run.counts, run.vram_gib, None if run.quantization else "nf4", run.lora_rank)
        others["bfloat16 base" if run.quantization else "NF4 base"] = _train_bytes(
            other, modes, batch_size, length
        )
    counted = Counter(mode.value for mode in modes)
    return {
        "layers": {mode.value: counted[mode.value] for mode in Mode if counted[mode.value]},
        "table": place if run.counts.table else "the model has none",
        "towers": place if run.towers else "the model has none",
        "alternatives": {name: size / GIB for name, size in others.items()},
    }


def _offered(run: _Run) -> Sequence[Mode]:
    return (Mode.RECOMPUTE,) if _is_mixture(run) else tuple(Mode)


def _fits(run: _Run, batch_size: int, length: int) -> bool:
    """Whether the run fits with that batch in some arrangement."""
    if run.vram_gib is None:
        return True
    return max(_load_peak(run), _least(run, batch_size, length)) <= run.vram_gib * GIB


def _least(run: _Run, batch_size: int, length: int) -> float:
    """Bytes of the arrangement that takes least."""
    count = len(run.counts.layers)
    return min(_train_bytes(run, [mode] * count, batch_size, length) for mode in _offered(run))


def _last(fits: Callable[[int], bool], most: int) -> int:
    """The largest n in 1..most that fits, 0 where none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _longest(run: _Run, batch_size: int) -> int:
    """In steps of 64 tokens, up to what the model was made for."""
    most = run.counts.text.max_position_embeddings
    steps = _last(lambda n: _fits(run, batch_size, 64 * n), most // 64)
    return 64 * steps if steps else _last(lambda n: _fits(run, batch_size, n), 63)


def _largest(run: _Run, length: int) -> int:
    return _last(lambda n: _fits(run, n, length), 4096)


def _remedies(run: _Run, made: Plan) -> list[str]:
    """What would fit, the least painful first."""
    found = []
    batch_size, length = made.batch_size, made.sequence_length
    if run.quantization is None and run.lora_rank:
        other = _Run(run.counts, run.vram_gib, "nf4", run.lora_rank)
        if _fits(other, batch_size, length):
            found.append('load the model in 4 bits: quantization="nf4"')
    if made.largest_batch:
        steps = math.ceil(batch_size / made.largest_batch)
        found.append(
            f"per_device_train_batch_size={made.largest_batch}, with gradient_accumulation_steps={steps}"
        )
    if made.longest_sequence:
        found.append(f"sequences of at most {made.longest_sequence:,} tokens")
    if run.lora_rank == 0:
        found.append("adapters in place of every weight: lora_rank=16")
    needed = max(_least(run, batch_size, length), _load_peak(run)) / GIB
    found.append(f"{math.ceil(needed * 10) / 10:.1f} GiB of GPU memory")
    return found


def _notes(run: _Run) -> list[str]:
    notes = ["a text-only run; CUDA's own context (0.3 to 0.5 GiB) comes on top of every figure"]
    if _is_mixture(run):
        notes.append(
            "experts are no nn.Linear: bitsandbytes leaves them in bfloat16; layers with them are checkpointed as stock does"
        )
    if "unified" in run.counts.kind:
        notes.append(
            "no patch covers the unified model's classes yet: the figures are what its text stack would take with them"
        )
    return notes


def _name(counts: _Counts) -> str:
    total = sum(getattr(counts, place) for place in _PLACES)
    return f"{counts.kind}, {total / 1e9:.2f}B parameters"


def _render(made: Plan) -> Any:
    from rich.table import Table

    base = "NF4" if made.quantization else "bfloat16"
    how = f"LoRA rank {made.lora_rank}" if made.lora_rank else "every weight trained"
    title = f"{made.model}: {base}, {how}, {made.batch_size} x {made.sequence_length:,} tokens"
    table = Table(title=title, title_justify="left", expand=False)
    for column in ("GiB", "GPU", "host"):
        table.add_column(column, justify="left" if column == "GiB" else "right")
    for name, size in made.components.items():
        on_host = name.endswith("(host)")
        table.add_row(
            name.removesuffix(" (host)"),
            "" if on_host else f"{size:.2f}",
            f"{size:.2f}" if on_host else "",
        )
    table.add_row("Python and libraries", "", f"{made.process_gib:.2f}", end_section=True)
    table.add_row("training", f"{made.peak_gib:.2f}", f"{made.host_gib:.2f}")
    table.add_row("loading", f"{made.load_peak_gib:.2f}", "")
    table.add_row(
        f"evaluation, {EVAL_BATCH} x {made.sequence_length:,}", f"{made.eval_peak_gib:.2f}", ""
    )
    yield table
    yield "layers: " + ", ".join(
        f"{count} {mode}" for mode, count in made.choices["layers"].items()
    )
    yield "instead: " + "; ".join(
        f"{name} {size:.2f}" for name, size in made.choices["alternatives"].items()
    )
    if made.vram_gib is not None:
        yield f"fits {made.vram_gib:g} GiB" if made.fits else f"does not fit {made.vram_gib:g} GiB"
        yield f"longest sequence at batch {made.batch_size}: {made.longest_sequence:,}; largest batch at {made.sequence_length:,}: {made.largest_batch}"
    for remedy in made.remedies:
        yield f"would fit: {remedy}"
    for note in made.notes:
        yield f"note: {note}"
