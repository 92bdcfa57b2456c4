"""The decoder stack as two CUDA graphs: one launch forward, one backward.

A step of E2B is some five thousand launches, which the host may take two or three times as long to
make as the card to run (benchmarks/LOG.md). Where batches have one shape (packing,
`pad_to_multiple_of`, rows of one length) the launches are the same at every step: after a few steps
of one shape the stack, its recomputation and its backward are captured and replayed. Embeddings,
final norm, LM head, loss and optimizer stay outside, in the trainer's hands.

What is captured reads fixed addresses, so the graphs step aside, and the layers run one by one as
ever, whenever something could have moved: another shape, another adapter, a second forward before
the first one's backward, hooks, a cache, distributed training. The memory the graphs hold comes out
of the same budget; the policy in `checkpointing` decides whether there is enough.
"""

from __future__ import annotations

import contextlib
import gc
import operator
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gemma_accel.patches.per_layer import HostPerLayerEmbedding, LayerInput, PerLayerInputs
from gemma_accel.patches.projections import as_projection
from gemma_accel.patches.seams import are_watched

__all__ = ["StackGraphs"]

STEADY = 3  # steps of one shape, one after the other, before it is worth capturing
_CONTEXT = ("per_layer_model_projection", "per_layer_projection_norm")
_NO_ROOM = "they do not fit beside the layers, or would not pay"
CAPTURES = 4  # where shapes keep changing, capturing them all would cost more than it saves


class _Token:
    """Lives as long as a forward waits for its backward."""


class _Captured:
    """One shape's graphs and the fixed tensors they read and write."""

    def __init__(
        self,
        graphs: StackGraphs,
        text: Any,
        hidden: Tensor,
        rest: tuple[Tensor | None, ...],
        parameters: dict[nn.Parameter, nn.Parameter],
    ) -> None:
        self.parameters = list(parameters)
        self.hidden = hidden.detach().clone().requires_grad_(hidden.requires_grad)
        self.rest = tuple(None if t is None else t.clone() for t in rest)
        self.waiting: Any = None
        device, aside = hidden.device, graphs.stream(hidden.device)
        wanted = [*parameters.values(), *([self.hidden] if hidden.requires_grad else [])]

        def forward() -> Tensor:
            return graphs.eager(text, self.hidden, *self.rest)

        def backward(out: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(out, wanted, grad, allow_unused=True)

        # once on a stream of its own, as capturing wants it: libraries make their handles there.
        # Memory is cached a stream: what the steps until now left behind goes first
        _empty()
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            out = forward()
            backward(out, torch.zeros_like(out))
            del out
        torch.cuda.current_stream(device).wait_stream(aside)
        torch.cuda.synchronize(device)
        _empty()

        pool, join = torch.cuda.graph_pool_handle(), text.memory.join_inputs
        held = torch.cuda.memory_reserved(device)
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _capturing(self.forward_graph, pool, aside, join):
            out = forward()
        self.grad_out = torch.empty_like(out)
        with _capturing(self.backward_graph, pool, aside, join):
            grads = backward(out, self.grad_out)
            of_parameters = grads[: len(self.parameters)]
            self.shapes = [
                p.shape if g is not None else None
                for p, g in zip(self.parameters, of_parameters, strict=True)
            ]
            # one buffer a dtype for all gradients: what leaves the graph is one copy of it, not
            # hundreds
            self.flat = {}
            for dtype in {g.dtype for g in of_parameters if g is not None}:
                several = [g for g in of_parameters if g is not None and g.dtype is dtype]
                flat = torch.empty(sum(g.numel() for g in several), dtype=dtype, device=device)
                torch._foreach_copy_(
                    list(flat.split([g.numel() for g in several])), [g.reshape(-1) for g in several]
                )
                self.flat[dtype] = flat
        self.grad_hidden = grads[-1] if hidden.requires_grad else None
        self.out = out.detach()
        self.offloaded = text.memory.part_with_inputs()  # host memory that the graphs copy to
        self.nbytes = torch.cuda.memory_reserved(device) - held

    def gradients(self) -> list[Tensor | None]:
        """The parameters' gradients of the backward that just ran, in memory of their own."""
        parts = {dtype: iter(self._split(dtype, flat.clone())) for dtype, flat in self.flat.items()}
        return [
            None if shape is None else next(parts[p.dtype]).view(shape)
            for p, shape in zip(self.parameters, self.shapes, strict=True)
        ]

    def _split(self, dtype: torch.dtype, flat: Tensor) -> tuple[Tensor, ...]:
        sizes = [
            p.numel()
            for p, shape in zip(self.parameters, self.shapes, strict=True)
            if shape is not None and p.dtype is dtype
        ]
        return flat.split(sizes)


def _empty() -> None:
    """Give cached memory back, cuBLAS's workspaces too: they are made anew where they are needed,
    within a capture in the graphs' own memory.
    """
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


@contextlib.contextmanager
def _capturing(
    graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream, join: Callable[[], None]
) -> Iterator[None]:
    """`torch.cuda.graph`, but one after whose failure the process goes on as if nothing had been.

    That one leaves the capture's stream current, and PyTorch's allocator, where the capture's end
    fails too, for good convinced that a capture is under way: it then keeps what it has cached, and
    every block that another stream has used. ``join`` makes ``stream`` wait for the others.
    """
    torch.cuda.synchronize(stream.device)
    torch.cuda.empty_cache()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            yield
        except BaseException:
            with contextlib.suppress(RuntimeError):
                join()
                graph.capture_end()
            _abandon(graph, pool, stream.device_index)
            raise
        try:
            graph.capture_end()
        except RuntimeError:
            _abandon(graph, pool, stream.device_index)
            raise


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any, device: int) -> None:
    """Do what `CUDAGraph.capture_end` has not got to, if it failed."""
    with contextlib.suppress(RuntimeError):  # an error where it did get there
        torch._C._cuda_endAllocateToPool(device, pool)
    try:
        graph.pool()  # an ended capture gives its pool back when the graph goes
    except RuntimeError:
        torch._C._cuda_releasePool(device, pool)


@contextlib.contextmanager
def _fresh(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """In place of the modules' trained parameters, others that share their memory; by the former.

    Autograd ties a parameter to the stream it was first used on for as long as anything of that
    graph is alive (a loss that a training loop keeps, say), and a capture that meets another stream
    fails.
    """
    fresh: dict[nn.Parameter, nn.Parameter] = {}
    places = [
        (module._parameters, name, parameter)
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    try:
        for owner, name, parameter in places:
            if parameter not in fresh:
                fresh[parameter] = nn.Parameter(parameter.detach())
            owner[name] = fresh[parameter]
        yield fresh
    finally:
        for owner, name, parameter in places:
            owner[name] = parameter


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, captured: _Captured, hidden: Tensor, rest: tuple[Tensor | None, ...], *_: Tensor
    ) -> Tensor:
        captured.hidden.detach().copy_(hidden)
        for fixed, given in zip(captured.rest, rest, strict=True):
            if fixed is not None and given is not None:
                fixed.copy_(given)
        captured.forward_graph.replay()
        ctx.captured, ctx.token = captured, _Token()
        captured.waiting = weakref.ref(ctx.token)
        return captured.out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        captured = ctx.captured
        if captured.waiting is None or captured.waiting() is not ctx.token:
            raise RuntimeError(
                "gemma_accel: a second backward through one forward of the decoder stack. The "
                "first one's intermediates are gone; run the "
                "forward again, or turn graphs off with apply(patches=[...]) without 'cuda_graphs'."
            )
        captured.grad_out.copy_(grad)
        captured.backward_graph.replay()
        captured.waiting = None
        hidden = captured.grad_hidden
        return None, None if hidden is None else hidden.clone(), None, *captured.gradients()


class _Watch:
    """Sees in eager steps who waits for whom.

    An event is recorded when four fifths of the layers are launched. Where the card has passed it
    by the time the host has launched the rest, the card has been waiting for the host.
    """

    def __init__(self) -> None:
        self.host_bound = True
        """of the last eager forward"""
        self._at = self._last = 0
        self._event: torch.cuda.Event | None = None

    def begin(self, layers: int) -> None:
        """A forward through so many layers starts; none to look away from it."""
        self._at, self._last, self._event = layers * 4 // 5, layers - 1, None

    def pass_layer(self, index: int) -> None:
        """Layer ``index`` is about to be launched."""
        if 0 < index == self._at < self._last:
            self._event = torch.cuda.Event()
            self._event.record()
        elif index == self._last and self._event is not None:
            self.host_bound = self._event.query()
            self._event = None


class _Modules:
    """All modules whose forward a capture holds, as they were found.

    To walk them takes milliseconds at every step, on a slow host tens of them; to look whether all
    are still there and what their numbers are now, a tenth of that.
    """

    def __init__(self, text: Any) -> None:
        modules = list(_captured_modules(text))
        self.token = object()
        self._owners = [owner for m in modules for owner in (m._modules, m._parameters)]
        self._sizes = [len(owner) for owner in self._owners]
        self._places = [(owner, name) for owner in self._owners for name in owner]
        self._members = [owner[name] for owner, name in self._places]
        self._all = modules
        self._parameters = [p for p in self._members if isinstance(p, nn.Parameter)]
        self._adapted = [m for m in modules if isinstance(m, LoraLayer)]
        self._dropouts = [m for m in modules if isinstance(m, nn.Dropout)]

    def are_there(self) -> bool:
        """Whether none has come, gone or been replaced since."""
        return [len(owner) for owner in self._owners] == self._sizes and all(
            map(operator.is_, [o.get(name) for o, name in self._places], self._members)
        )

    def state(self) -> tuple[Any, ...]:
        """Where the parameters are and which are trained, and which adapters act how."""
        return (
            [p.data_ptr() for p in self._parameters],
            [p.requires_grad for p in self._parameters],
            [
                (m.active_adapters, m.disable_adapters, m.merged, dict(m.scaling))
                for m in self._adapted
            ],
            [m.p for m in self._dropouts],
        )

    def hooked(self) -> bool:
        """Whether somebody watches one, or runs something else in place of its forward."""
        return are_watched(self._all)


_found: weakref.WeakKeyDictionary[nn.Module, _Modules] = weakref.WeakKeyDictionary()
"""By text model. Not in its `StackGraphs`, which its layers hold: that circle would keep a model
that is dropped until Python collects it.
"""


class _Key(NamedTuple):
    """Everything that a captured graph takes for granted."""

    hidden: tuple[torch.Size, torch.dtype, bool]
    inputs: tuple[tuple[torch.Size, torch.dtype] | None, ...]
    autocast: tuple[bool, torch.dtype]
    modules: object
    state: tuple[Any, ...]
    hooked: bool
    checkpointing: tuple[bool, ...]
    window: int | None
    table: Any
    budget: tuple[int | None, int, Any]


class StackGraphs:
    """One text model's: decides at its first layer whether a forward is replayed."""

    def __init__(self, text: Any) -> None:
        self._text: Callable[[], Any] = weakref.ref(text)  # it outlives its layers' calls
        self.off = ""
        """why graphs are not used any more in this run, if so"""
        self.idle = ""
        """why they did not serve the last training forward, if it is one that they never will"""
        self._key: Any = None
        self._seen = self._captures = 0
        self._captured: _Captured | None = None
        self._watch = _Watch()
        self._stream: torch.cuda.Stream | None = None
        self._serving = self._inside = False

    def __deepcopy__(self, memo: Any) -> None:
        return None

    @property
    def captured(self) -> bool:
        """Whether there are graphs now."""
        return self._captured is not None

    def serve(
        self, layer: Any, hidden: Tensor, per_layer_input: Any = None, **kwargs: Any
    ) -> Tensor | None:
        """The whole stack's output at its first layer, that same tensor at the others; None where
        the layer has to run itself.
        """
        if self._inside:
            return None
        if layer.layer_idx:
            return self._serve_another(layer.layer_idx, hidden)
        self._serving = False
        self._watch.begin(0)
        if self.off or not hidden.is_cuda:
            return None
        text = self._text()
        if not (layer.training and torch.is_grad_enabled()):
            self._make_room_for(text, hidden)
            return None
        rest = self._inputs(text, per_layer_input, kwargs)
        if isinstance(rest, str):
            self._stay_idle(text, rest)
            return None
        if self._captured is not None and self._is_waiting():
            return None
        key = self._key_of(text, hidden, rest)
        if key != self._key:
            self.drop()
            self._key = key
        self._seen += 1
        steady = self._seen > STEADY
        if not steady or not text.memory.graphs_fit(hidden, host_bound=self._watch.host_bound):
            if steady:
                self._stay_idle(text, _NO_ROOM)
            self._watch.begin(len(text.layers))
            return None
        if self._captured is None and not self._capture(text, hidden, rest):
            return None
        captured = self._captured
        assert captured is not None
        self._serving = len(text.layers) > 1
        return _Replay.apply(captured, hidden, rest, *captured.parameters)

    def _serve_another(self, index: int, hidden: Tensor) -> Tensor | None:
        if not self._serving:
            self._watch.pass_layer(index)
            return None
        self._serving = index < len(self._text().layers) - 1
        return hidden

    def _stay_idle(self, text: Any, reason: str) -> None:
        """Set down why the layers run one by one, for the report too."""
        if reason != self.idle:
            self.idle = reason
            text.memory.note("CUDA graphs", f"not used: {reason}")

    def _turn_off(self, reason: str) -> None:
        """Capture no more in this run, and say so once."""
        text = self._text()
        self.off = reason
        self._stay_idle(text, reason)
        text.memory.give_up_graphs()
        warnings.warn(
            f"gemma_accel runs the layers one by one from here on, without CUDA graphs: {reason}",
            UserWarning,
            stacklevel=2,
        )

    def drop(self) -> None:
        """Give the graphs' memory back."""
        if self._captured is not None:
            self._release()
        self._key, self._seen = None, 0

    def _release(self) -> None:
        with contextlib.suppress(RuntimeError):
            # the last replay may still be running, on memory that goes with its owner
            torch.cuda.synchronize()
        self._captured = None
        _empty()

    def _make_room_for(self, text: Any, hidden: Tensor) -> None:
        """For an evaluation of ``hidden``, where it does not fit beside the graphs."""
        captured = self._captured
        if captured is not None and not text.memory.evaluation_fits(
            hidden, captured.hidden, captured.nbytes
        ):
            self.make_room()

    @property
    def nbytes(self) -> int:
        """What the graphs hold."""
        return 0 if self._captured is None else self._captured.nbytes

    def make_room(self) -> None:
        """For what does not fit beside the graphs; steady steps capture them again."""
        if self._captured is not None and not self._is_waiting():
            self._release()
            self._captures -= 1  # it was none that something changed for

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream that captures run on: one, for libraries keep workspaces a stream."""
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)
        return self._stream

    # -- what may be replayed --

    def _is_waiting(self) -> bool:
        waiting = self._captured.waiting if self._captured is not None else None
        return waiting is not None and waiting() is not None

    def _inputs(
        self, text: Any, per_layer_input: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor | None, ...] | str:
        """Token ids, mask and positions that the layers read; a reason where a forward is not one
        that graphs serve.
        """
        mask = kwargs.get("attention_mask")
        if kwargs.get("cache", kwargs.get("past_key_values")) is not None:
            return "a cache of keys and values is filled"
        if mask is not None and mask.dtype != torch.int32:
            return "attention is stock's, or its mask somebody's own"
        if any(layer.self_attn.attention_dropout for layer in text.layers):
            return "attention has dropout"
        for name in ("output_attentions", "output_hidden_states", "return_shared_kv_states"):
            if kwargs.get(name):
                return f"{name} is asked for"
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            return "somebody's hooks take what autograd saves (activation offloading)"
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return "several processes train together"
        positions = kwargs.get("position_ids")
        if per_layer_input is None:
            return None, mask, positions
        if not isinstance(per_layer_input, LayerInput):
            return "the layers take a per-layer input that is a tensor"
        ids = per_layer_input.graph_ids()
        return ids if isinstance(ids, str) else (ids, mask, positions)

    def _key_of(self, text: Any, hidden: Tensor, rest: tuple[Tensor | None, ...]) -> _Key:
        modules = _found.get(text)
        if modules is None or not modules.are_there():
            modules = _found[text] = _Modules(text)
        return _Key(
            hidden=(hidden.shape, hidden.dtype, hidden.requires_grad),
            inputs=tuple(None if t is None else (t.shape, t.dtype) for t in rest),
            autocast=(torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")),
            modules=modules.token,
            state=modules.state(),
            hooked=modules.hooked(),
            checkpointing=tuple(layer.gradient_checkpointing for layer in text.layers),
            window=text.config.sliding_window,
            table=_identity_of_table(getattr(text, "embed_tokens_per_layer", None)),
            budget=(text.memory.budget, text.memory.fixed, tuple(text.memory.media.items())),
        )

    def _capture(self, text: Any, hidden: Tensor, rest: tuple[Tensor | None, ...]) -> bool:
        """Capture, again with less memory where it turns out to be too little; whether it is
        done.
        """
        if self._key.hooked or not all(map(_is_read, _linears(text))):
            self._turn_off("a layer is watched by a hook, or is not read by the fused step")
            return False
        while text.memory.graphs_fit(hidden, host_bound=self._watch.host_bound):
            if self._captures >= CAPTURES:
                self._turn_off(
                    f"the batches' shape changed, or the memory was too little, {CAPTURES} times"
                )
                return False
            self._captures += 1
            failed, short = "", text.memory.budget // 16
            try:
                self._captured = self._capture_once(text, hidden, rest)
                short = text.memory.shortfall(hidden)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    failed = f"capturing failed: {str(error).splitlines()[0]}"
            if short <= 0:
                self.idle = ""
                shape = f"{hidden.shape[0]} x {hidden.shape[1]}"
                text.memory.note("CUDA graphs", f"captured, for batches of {shape}")
                return True
            gc.collect()  # what failed may lie about in circles, and would count as taken
            self._release()
            if failed:
                self._turn_off(failed)
                return False
            text.memory.withhold(short)
        self._stay_idle(text, _NO_ROOM)
        return False

    def _capture_once(
        self, text: Any, hidden: Tensor, rest: tuple[Tensor | None, ...]
    ) -> _Captured:
        enabled, dtype = self._key.autocast
        # what the collector would free in the middle of a capture (another model's locked memory)
        # may not be freed there
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()
        self._inside = True
        try:
            with (
                torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False),
                _fresh(_captured_modules(text)) as parameters,
            ):
                return _Captured(self, text, hidden, rest, parameters)
        except BaseException:
            text.memory.part_with_inputs()  # in whatever state the capture left it
            raise
        finally:
            self._inside = False
            if collecting:
                gc.enable()

    def eager(
        self,
        text: Any,
        hidden: Tensor,
        ids: Tensor | None,
        mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> Tensor:
        """The layers one after the other, on what they would be handed by the text model's
        forward.
        """
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        positions = {
            kind: text.rotary_emb(hidden, position_ids, kind) for kind in text.unique_layer_types
        }
        inputs = None
        if ids is not None:
            made: Any = text.get_per_layer_inputs(ids, None)
            assert isinstance(made, PerLayerInputs)
            inputs = made.with_embeds(hidden)
        shared: dict[str, Any] = {}
        for index, layer in enumerate(text.layers):
            hidden = layer(
                hidden,
                None if inputs is None else inputs[:, :, index, :],
                shared_kv_states=shared,
                position_embeddings=positions[text.config.layer_types[index]],
                attention_mask=mask,
                position_ids=position_ids,
            )
        return hidden


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether that is what it began with: the end of a capture fails too, then."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error is not None


def _captured_modules(text: Any) -> Iterator[nn.Module]:
    """All whose forward a capture holds."""
    found = [getattr(text, name, None) for name in ("layers", *_CONTEXT)]
    while found:
        module = found.pop()
        if module is not None:
            yield module
            found.extend(module._modules.values())


def _linears(text: Any) -> Iterator[nn.Module]:
    for layer in text.layers:
        for owner, names in (
            (layer.self_attn, ("q_proj", "k_proj", "v_proj", "o_proj")),
            (layer.mlp, ("gate_proj", "up_proj", "down_proj")),
            (layer, ("per_layer_input_gate", "per_layer_projection")),
        ):
            yield from (
                linear for name in names if (linear := getattr(owner, name, None)) is not None
            )


def _is_read(linear: nn.Module) -> bool:
    """Whether the fused step reads it: its own forward may do what a capture does not see."""
    return not isinstance(as_projection(linear), str)


def _identity_of_table(table: Any) -> Any:
    """Where the per-layer embedding table lies: the captured gather reads that very memory."""
    if table is None:
        return None
    if isinstance(table, HostPerLayerEmbedding) and table.host is not None:
        return weakref.ref(table.host)
    return table.weight.data_ptr()
