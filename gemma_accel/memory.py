"""What a decoder layer keeps for backward, what its backward needs on top, and which layer should
keep what.

Pure arithmetic on shapes, in bytes: the planner predicts with it and the memory policy decides with
it, so the two cannot disagree. The counts follow the code (`patches/decoder.py` and the Functions
it calls): a change there that saves another tensor belongs here too, and a test compares both with
what autograd really holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

__all__ = [
    "AWAY",
    "HALF",
    "HEAD_TILE",
    "Arrangement",
    "Itemsize",
    "LayerShape",
    "Mode",
    "TowerShape",
    "arrange",
    "between_layers_bytes",
    "choose_modes",
    "evaluation_bytes",
    "graph_bytes",
    "head_groups",
    "head_tile",
    "kept_bytes",
    "layer_shapes",
    "loss_bytes",
    "mlp_schedule",
    "peak_bytes",
    "sound_front_bytes",
    "tower_kept_bytes",
    "tower_shapes",
    "tower_transient_bytes",
    "transient_bytes",
]


class Itemsize(NamedTuple):
    """Bytes an element. A model in float32 that trains under autocast has two kinds of them."""

    stream: int
    """of the residual stream, of what is added to it, of its gradient"""
    inner: int
    """of what projections, attention and the MLP make"""

    @classmethod
    def throughout(cls, width: int) -> Itemsize:
        """As if all were as wide as the stream, which is what the policy reckons with: too much in
        float32 under autocast.
        """
        return cls(width, width)


HALF = Itemsize.throughout(2)
"""bfloat16 or float16 throughout"""


class Mode(Enum):
    """How a layer pays for its backward, cheapest in time first."""

    KEEP = "keep"
    """everything is kept; only elementwise products are made again"""
    RECOMPUTE_MLP = "recompute MLP"
    """gate and up, half of what a layer keeps, are computed again"""
    RECOMPUTE = "recompute"
    """only the layer's input is kept"""
    OFFLOAD = "offload"
    """and the input waits in host memory; copies overlap, so this costs next to no time"""
    RECOMPUTE_TILED = "recompute in tiles"
    """as `RECOMPUTE`, and the MLP runs a few tokens at a time"""
    OFFLOAD_TILED = "offload, in tiles"
    """both"""
    RECOMPUTE_IN_PARTS = "recompute in parts"
    """as `RECOMPUTE_TILED`, and it is replayed half by half, its query heads a few at a time"""
    OFFLOAD_IN_PARTS = "offload, in parts"
    """and its input waits in host memory"""


AWAY = frozenset({Mode.OFFLOAD, Mode.OFFLOAD_TILED, Mode.OFFLOAD_IN_PARTS})
"""Modes whose layer keeps nothing on the device from its forward to its backward."""
_IN_PARTS = frozenset({Mode.RECOMPUTE_IN_PARTS, Mode.OFFLOAD_IN_PARTS})
_RAISES = (
    (Mode.OFFLOAD_IN_PARTS, Mode.OFFLOAD_TILED),
    (Mode.OFFLOAD_TILED, Mode.OFFLOAD),
    (Mode.OFFLOAD, Mode.RECOMPUTE),
    (Mode.RECOMPUTE, Mode.RECOMPUTE_MLP),
    (Mode.RECOMPUTE_MLP, Mode.KEEP),
    # what is left over spares host memory
    (Mode.OFFLOAD_TILED, Mode.RECOMPUTE_TILED),
    (Mode.OFFLOAD_IN_PARTS, Mode.RECOMPUTE_IN_PARTS),
)


def mlp_schedule(mode: Mode, tokens: int) -> tuple[bool, int | None]:
    """Whether a layer's MLP keeps gate and up (in the replay, where the layer is recomputed), and
    its tokens in flight.
    """
    if mode in (Mode.KEEP, Mode.RECOMPUTE, Mode.OFFLOAD):
        return True, None
    if mode is Mode.RECOMPUTE_MLP:
        return False, 4096
    return False, min(max(tokens // 4, 1024), 4096)


def head_groups(mode: Mode, heads: int) -> int:
    """In how many groups a layer's query heads pass through projection, attention and
    projection.
    """
    return min(heads, 8) if mode in _IN_PARTS else 1


WORKSPACES = 64 * 2**20
"""cuBLAS's, one for the forward's thread and one for the backward's: 32 MiB each on Hopper (8 on
other cards).
"""
HEAD_TILE = 4096
"""Tokens that TRL's chunked LM head takes at a time unless told otherwise."""


HOST_BOUND = 16384
"""Tokens beyond which a layer should keep even a large card busy for longer than a host takes to
launch it (reckoned, not measured): doing work twice to make room for graphs is then a loss.
"""


def head_tile(tokens: int, hidden: int, vocabulary: int, available: int) -> int:
    """How many tokens the LM head should take at a time: fewer than TRL's own `HEAD_TILE` where the
    loss would be more than a quarter of the ``available`` bytes.
    """
    tile = HEAD_TILE
    while tile > 1024 and loss_bytes(tokens, hidden, vocabulary, tile) > available / 4:
        tile //= 2
    return tile


def loss_bytes(tokens: int, hidden: int, vocabulary: int, tile: int = HEAD_TILE) -> int:
    """TRL's chunked head: a tile of logits, the labelled rows, their gradient in float32 and in the
    model's dtype.
    """
    return min(tokens, tile) * min(vocabulary, 32768) * 2 + tokens * hidden * 12


def graph_bytes(tokens: int, hidden: int, trained: int, itemsize: Itemsize = HALF) -> int:
    """What CUDA graphs of the stack hold besides its activations: its input, its output, their
    gradients, those of the ``trained`` bytes of parameters, and cuBLAS's workspaces.
    """
    return 4 * tokens * hidden * itemsize.stream + trained + WORKSPACES


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer's widths; ``keys`` is 0 where it reuses another layer's keys and values."""

    sliding: bool
    hidden: int
    queries: int
    """heads x head_dim"""
    keys: int
    """key/value heads x head_dim, of its own"""
    reads: int
    """the same of those that it reads, its own or another's"""
    heads: int
    mlp: int
    per_layer: int


def layer_shapes(text: Any) -> list[LayerShape]:
    """The decoder layers of a `Gemma4TextConfig`."""
    count, shared = text.num_hidden_layers, getattr(text, "num_kv_shared_layers", 0) or 0
    shapes = []
    for index, kind in enumerate(text.layer_types):
        sliding = kind == "sliding_attention"
        size, heads = _head_size_and_keys(text, index, sliding)
        reuses = shared > 0 and index >= count - shared
        shapes.append(
            LayerShape(
                sliding=sliding,
                hidden=text.hidden_size,
                queries=text.num_attention_heads * size,
                keys=0 if reuses else heads * size,
                reads=heads * size,
                heads=text.num_attention_heads,
                mlp=text.intermediate_size * (2 if text.use_double_wide_mlp and reuses else 1),
                per_layer=text.hidden_size_per_layer_input or 0,
            )
        )
    return shapes


def _head_size_and_keys(text: Any, index: int, sliding: bool) -> tuple[int, int]:
    """head_dim and key/value heads of a layer, which transformers 5.23 gives layer by layer and
    5.17 by kind.
    """
    by_layer = getattr(text, "per_layer_config", None)
    if by_layer is not None:
        return by_layer[index].head_dim, by_layer[index].num_key_value_heads
    size = text.head_dim if sliding or not text.global_head_dim else text.global_head_dim
    by_kind = not sliding and text.attention_k_eq_v
    return size, text.num_global_key_value_heads if by_kind else text.num_key_value_heads


def kept_bytes(layer: LayerShape, mode: Mode, itemsize: Itemsize = HALF) -> int:
    """Bytes a token of ``layer`` keeps from its forward to its backward."""
    if mode in AWAY:
        return 0
    if mode in (Mode.RECOMPUTE, Mode.RECOMPUTE_TILED, Mode.RECOMPUTE_IN_PARTS):
        return layer.hidden * itemsize.stream
    # layer input, o_proj's output, the sum, the MLP's output
    stream = 4 * layer.hidden
    # norms of input and sum; raw and rotated queries, attention's output; raw and normed keys and
    # values
    inner = 2 * layer.hidden + 3 * layer.queries + 4 * layer.keys
    if layer.per_layer:
        # the second sum, the projection's output; gate, projected context, table rows, gated
        # product
        stream += 2 * layer.hidden
        inner += 4 * layer.per_layer
    if mode is Mode.KEEP:
        inner += 2 * layer.mlp
    # and attention's log-sum-exp
    return stream * itemsize.stream + inner * itemsize.inner + 4 * layer.heads


def transient_bytes(layer: LayerShape, mode: Mode, tokens: int, itemsize: Itemsize = HALF) -> int:
    """Bytes that ``layer``'s backward needs beyond what is kept, at its highest point."""
    keeps, tile = mlp_schedule(mode, tokens)
    # product and its gradient; gate and up too where they are made again a tile at a time
    mlp = min(tokens, tile or tokens) * layer.mlp * (2 if keeps else 4) * itemsize.inner
    # one dequantised weight
    weight = max(layer.mlp, layer.queries) * layer.hidden * itemsize.inner
    inputs = tokens * layer.hidden * itemsize.stream
    if mode in _IN_PARTS:
        own = inputs if mode in AWAY else 0  # its input, which has come back
        return own + _in_parts(layer, tokens, mlp, itemsize) + weight
    # gradients of queries, attention's output, keys and values; by then what the second half and
    # the joint before it kept has gone
    attention = tokens * (2 * layer.queries + 2 * layer.keys - layer.hidden) * itemsize.inner
    attention -= 3 * inputs
    if layer.per_layer:
        attention -= 2 * inputs + tokens * 4 * layer.per_layer * itemsize.inner
    flow = 3 * inputs  # gradients of the residual stream and of a branch
    replayed = 0
    if mode not in (Mode.KEEP, Mode.RECOMPUTE_MLP):
        as_if = Mode.KEEP if keeps else Mode.RECOMPUTE_MLP
        replayed = tokens * kept_bytes(layer, as_if, itemsize) - inputs
    if mode in AWAY:
        replayed += 2 * inputs  # its input, and the next one on its way
    return max(mlp, attention) + flow + weight + replayed


def _in_parts(layer: LayerShape, tokens: int, mlp: int, itemsize: Itemsize) -> int:
    """Bytes that a layer in parts holds besides its input, at the highest of three points of its
    backward.
    """
    always = layer.hidden * itemsize.stream  # the stream's gradient
    # the normed input, its gradient, that of attention's output; a group's raw and rotated queries,
    # output and two gradients; keys and values raw, normed, their gradients from this group
    groups = head_groups(Mode.OFFLOAD_IN_PARTS, layer.heads)  # of either mode in parts
    keys = 6 * layer.keys if layer.keys else 2 * layer.reads
    attention = 3 * layer.hidden + 5 * layer.queries // groups + keys
    attention *= itemsize.inner
    # the sum between the halves, its norm, gradients of the second sum and of the MLP's output
    feed = tokens * 4 * layer.hidden * itemsize.stream + mlp
    if layer.per_layer:
        # before that: the MLP's output, the second sum, the projection's output and its gradient,
        # and what makes the per-layer input
        inner = 4 * layer.per_layer * itemsize.inner
        feed = max(feed, tokens * (6 * layer.hidden * itemsize.stream + inner))
    return tokens * always + max(tokens * attention, feed)


def between_layers_bytes(
    layers: Sequence[LayerShape],
    modes: Sequence[Mode],
    batch: int,
    length: int,
    itemsize: Itemsize = HALF,
    *,
    input_gradient: bool,
) -> int:
    """Bytes that pass between layers for as long as the stack runs.

    Cosines and sines of each head size (one row for all sequences), the embeddings that every
    layer reads and, with ``input_gradient``, theirs, and the keys and values that layers share,
    with their gradients.
    """
    tokens = batch * length
    sizes = {layer.queries // layer.heads for layer in layers}
    total = sum(2 * length * size * itemsize.stream for size in sizes)
    if layers[0].per_layer:
        # layer 0 may keep the embeddings anyway: they are its input
        copies = input_gradient + (modes[0] in AWAY)
        total += copies * tokens * layers[0].hidden * itemsize.stream
    for index in _sharing(layers):
        kept = modes[index] in (Mode.KEEP, Mode.RECOMPUTE_MLP)
        total += (1 if kept else 2) * tokens * 2 * layers[index].keys * itemsize.inner
    return total


def _sharing(layers: Sequence[LayerShape]) -> list[int]:
    """The layers whose keys and values others use: the last of each kind with its own."""
    if all(layer.keys for layer in layers):
        return []
    return sorted({layer.sliding: i for i, layer in enumerate(layers) if layer.keys}.values())


def peak_bytes(
    layers: Sequence[LayerShape],
    modes: Sequence[Mode],
    tokens: int,
    loss: int,
    itemsize: Itemsize = HALF,
) -> int:
    """The most that activations take at any moment of a step: at the loss, or in some layer's
    backward.
    """
    pairs = zip(layers, modes, strict=True)
    return _highest((_cost(layer, mode, tokens, itemsize) for layer, mode in pairs), loss)


def _cost(layer: LayerShape, mode: Mode, tokens: int, itemsize: Itemsize) -> tuple[int, int]:
    """Bytes that a layer keeps, and that its backward needs beyond."""
    kept = tokens * kept_bytes(layer, mode, itemsize)
    return kept, transient_bytes(layer, mode, tokens, itemsize)


def _highest(costs: Iterable[tuple[int, int]], loss: int) -> int:
    kept = peak = 0
    for keeps, needs in costs:
        kept += keeps
        peak = max(peak, kept + needs)
    return max(peak, kept + loss)


def choose_modes(
    layers: Sequence[LayerShape],
    tokens: int,
    available: int,
    loss: int,
    itemsize: Itemsize = HALF,
) -> list[Mode]:
    """The cheapest modes that fit ``available`` bytes; all in parts where nothing does.

    Backward frees the last layers' activations first, so what they keep is out of the way when an
    early layer is recomputed: layers are raised from the last to the first, a grade at a time, as
    long as the step's highest point fits. An input goes to host memory before an MLP is cut into
    tiles: the copies overlap, while tiles dequantise every weight again and again.
    """
    # reckoned once: thousands of combinations are tried
    costs = [{mode: _cost(layer, mode, tokens, itemsize) for mode in Mode} for layer in layers]
    modes = [Mode.OFFLOAD_IN_PARTS] * len(layers)
    for below, grade in _RAISES:
        for index in reversed(range(len(layers))):
            if modes[index] is not below:
                continue
            modes[index] = grade
            chosen = (cost[mode] for cost, mode in zip(costs, modes, strict=True))
            if _highest(chosen, loss) > available:
                modes[index] = below
    return modes


@dataclass(frozen=True)
class Arrangement:
    """How a batch goes through the model."""

    modes: list[Mode]
    graphed: bool
    """whether there is room for CUDA graphs of the layers so run"""
    head_tile: int
    """tokens that the LM head takes at a time"""

    @property
    def in_tiles(self) -> bool:
        """Whether layers do the same work twice to take less memory: dear where the card, and not
        the host, is what a step waits for.
        """
        return bool({Mode.RECOMPUTE_TILED, Mode.OFFLOAD_TILED, *_IN_PARTS} & set(self.modes))


def arrange(
    layers: Sequence[LayerShape],
    tokens: int,
    available: int,
    vocabulary: int,
    trained: int | None,
    itemsize: Itemsize = HALF,
    *,
    towers: int = 0,
) -> Arrangement:
    """The cheapest way through ``available`` bytes, with CUDA graphs of the layers where they fit.

    Graphs have memory of their own, which neither the loss nor the ``towers``' backward, which
    takes so many bytes, can use; without them all of these take turns. ``trained`` is the bytes of
    what gets a gradient; None for no graphs.
    """
    hidden = layers[0].hidden
    tile = head_tile(tokens, hidden, vocabulary, available)
    loss = loss_bytes(tokens, hidden, vocabulary, tile)
    if trained is not None:
        outside = max(loss, towers)
        beside = available - outside - graph_bytes(tokens, hidden, trained, itemsize)
        modes = choose_modes(layers, tokens, beside, 0, itemsize)
        captured = Arrangement(modes, True, tile)
        worth_it = tokens <= HOST_BOUND or not captured.in_tiles
        if worth_it and peak_bytes(layers, modes, tokens, 0, itemsize) <= beside:
            return captured
    return Arrangement(choose_modes(layers, tokens, available, loss, itemsize), False, tile)


def evaluation_bytes(
    layers: Sequence[LayerShape],
    chosen: Arrangement,
    train_tokens: int,
    shape: tuple[int, int],
    vocabulary: int,
    itemsize: Itemsize = HALF,
) -> int:
    """The most that activations take in a forward without gradients, of a batch of ``shape`` (rows,
    length): one layer's at a time, or the LM head's, beside the keys and values that are shared.

    ``chosen`` is how batches of ``train_tokens`` are trained: a module stays as that left it.
    """
    tokens, hidden = shape[0] * shape[1], layers[0].hidden
    stream = tokens * hidden * itemsize.stream
    widest = 0
    for layer, mode in zip(layers, chosen.modes, strict=True):
        _, tile = mlp_schedule(mode, train_tokens)
        mlp = 3 * min(tokens, tile or tokens) * layer.mlp
        widest = max(widest, mlp, tokens * (3 * layer.queries + 4 * layer.keys))
    layer_work = widest * itemsize.inner + 5 * stream  # embeddings too, which every layer reads
    head = min(tokens, chosen.head_tile) * min(vocabulary, 32768) * itemsize.inner + stream
    keeping = [Mode.KEEP] * len(layers)  # no gradients of shared keys and values
    between = between_layers_bytes(layers, keeping, *shape, itemsize, input_gradient=False)
    return max(layer_work, head) + between


@dataclass(frozen=True)
class TowerShape:
    """A vision or audio tower, and how it is run."""

    hidden: int
    mlp: int
    layers: int
    is_audio: bool
    replayed: bool
    """whether its layers keep their inputs alone: stock's checkpointing reaches the vision tower's
    """
    trained: bool = True
    """whether there is a backward to keep anything for"""


def tower_shapes(config: Any) -> dict[str, TowerShape]:
    """The towers of a `Gemma4Config`, by the name of the module, as they run where they are
    trained; the unified model has none.
    """
    found: dict[str, TowerShape] = {}
    if config.model_type != "gemma4":
        return found
    if vision := getattr(config, "vision_config", None):
        widths = vision.hidden_size, vision.intermediate_size
        found["vision_tower"] = TowerShape(*widths, vision.num_hidden_layers, False, True)
    if audio := getattr(config, "audio_config", None):
        widths = audio.hidden_size, 4 * audio.hidden_size
        found["audio_tower"] = TowerShape(*widths, audio.num_hidden_layers, True, False)
    return found


def tower_kept_bytes(tower: TowerShape, vectors: int, itemsize: Itemsize = HALF) -> int:
    """Bytes that a tower keeps of ``vectors`` (patches of images, or soft tokens of sound) from its
    forward to its backward, which is the language model's time.
    """
    if not tower.trained:
        return 0
    hidden = tower.hidden * itemsize.stream
    if tower.is_audio:
        # a feed-forward's input, its norm, both sides of the activation, its output, twice;
        # attention's input, its norm, queries, keys, values, output, its projection; the
        # convolution's input, its norm, both halves of the gate, its output, its projection; the
        # last norm's input. The stream is what a projection in front made.
        layer = (20 * tower.hidden + 4 * tower.mlp) * itemsize.inner
    else:
        layer = hidden if tower.replayed else _vision_layer(tower, itemsize)
    # the pooler's weights and the rotation come to about one more input
    return vectors * (tower.layers * layer + hidden)


def sound_front_bytes(vectors: int, itemsize: Itemsize = HALF) -> int:
    """Bytes of the first convolution's output for so many soft tokens of sound, half of 128
    frequencies in 128 channels at twice the tokens' rate, of its norm, and of its activation.
    """
    # the norm is in float32 under autocast, and so is what follows it
    return vectors * 2 * 64 * 128 * (itemsize.inner + 2 * itemsize.stream)


def tower_transient_bytes(tower: TowerShape, vectors: int, itemsize: Itemsize = HALF) -> int:
    """Bytes that a tower needs beyond what is kept, at its highest point: of the backward, or of a
    forward that none follows.
    """
    stream, inner = itemsize
    if not tower.trained:
        if tower.is_audio:
            return sound_front_bytes(vectors, itemsize)
        # a layer's norms and sums; gate, up, their product
        return vectors * (7 * tower.hidden * stream + 3 * tower.mlp * inner)
    if tower.is_audio:  # gradients of one side of the activation
        return vectors * tower.mlp * inner
    # gradients of gate, up and the residual stream
    needed = 2 * tower.mlp * inner + tower.hidden * stream
    if tower.replayed:
        needed += _vision_layer(tower, itemsize) - tower.hidden * stream
    return vectors * needed


def _vision_layer(tower: TowerShape, itemsize: Itemsize) -> int:
    """Bytes a patch: a layer's input, their sum and the outputs of attention and MLP; two norms,
    queries, keys and values before and after theirs, attention's values; gate, up and their
    product.
    """
    inner = 9 * tower.hidden + 3 * tower.mlp
    return 4 * tower.hidden * itemsize.stream + inner * itemsize.inner
