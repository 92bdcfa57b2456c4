"""A checkpointed layer's input, kept in host memory from its forward to its backward.

Transformers' own offload (5.23) copies on the compute stream, so the step waits for every copy.
Here copies run on a stream of their own: out while the layer computes, back in while the layer
above it is still in backward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemma_accel.hostmemory import locked_empty

__all__ = ["OffloadedInputs"]


class _Slot:
    """One input that is away: its bytes in host memory and, once asked for, its copy on the
    device.
    """

    def __init__(self, owner: OffloadedInputs, tensor: Tensor, below: _Slot | None) -> None:
        self.owner, self.below = owner, below
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.host: Tensor | None = owner.take(tensor.nbytes)
        self.copy: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None
        owner.send(tensor, self._view())

    def _view(self) -> Tensor:
        assert self.host is not None
        return self.host.view(self.dtype).view(self.shape)

    def fetch(self) -> None:
        """Start the way back, if it has not begun."""
        if self.copy is not None or self.host is None:
            return
        self.copy = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        stream = self.owner.stream(self.device)
        # the new tensor's memory may still be in use there
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.copy.copy_(self._view(), non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record(stream)
        if not torch.cuda.is_current_stream_capturing():
            # a step that dies before it waits for the copy must not leave it writing into memory
            # that is somebody else's by then
            self.copy.record_stream(stream)
        self.owner.give(
            self.host
        )  # the next write into it runs on the same stream, after this read
        self.host = None

    def tensor(self) -> Tensor:
        """The input, back on the device; the one below starts to come back too."""
        self.fetch()
        assert self.copy is not None and self.arrived is not None
        torch.cuda.current_stream(self.device).wait_event(self.arrived)
        if self.below is not None:
            self.below.fetch()
        self.below = None
        if self.owner._last is self:
            self.owner._last = None  # it would keep this copy until the next forward
        return self.copy


class OffloadedInputs:
    """Runs checkpointed layers with their inputs away. Host buffers are kept for the next step.

    Everything here can be captured in a CUDA graph: an input that is on its way is held until the
    compute stream has waited for the copy (`record_stream` would hold it until the capture ends),
    and host buffers are there from the steps before.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._last: _Slot | None = None
        self._leaving: tuple[Tensor, torch.cuda.Event] | None = None

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def take(self, nbytes: int) -> Tensor:
        free = self._free[nbytes]
        return free.pop() if free else locked_empty(nbytes)

    def give(self, host: Tensor) -> None:
        self._free[host.nbytes].append(host)

    def send(self, tensor: Tensor, host: Tensor) -> None:
        """Start to copy ``tensor`` out; it is let go of at the next input's turn, a layer on."""
        stream = self.stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
            sent = torch.cuda.Event()
            sent.record(stream)
        self.settle()
        self._leaving = tensor, sent

    def settle(self) -> None:
        """Let go of the input that is on its way out, once the copy is through."""
        if self._leaving is not None:
            tensor, sent = self._leaving
            torch.cuda.current_stream(tensor.device).wait_event(sent)
            self._leaving = None

    def join(self) -> None:
        """Make the current stream's capture wait for the copies in it: one that ends without them
        fails.
        """
        for stream in self._streams.values():
            with torch.cuda.stream(stream):
                capturing = torch.cuda.is_current_stream_capturing()
            if capturing:
                torch.cuda.current_stream(stream.device).wait_stream(stream)

    def let_go(self) -> None:
        """Of the last input that came by, which knows its owner: what refers to itself stays until
        Python collects it, and locked memory with it.
        """
        self._last = self._leaving = None

    def begin(self) -> None:
        """A forward starts: its inputs have none below them."""
        self._last = None

    def run(
        self,
        stock: Callable[..., Any],
        forward: Callable[..., Any],
        hidden: Tensor,
        *rest: Any,
        ahead: bool,
    ) -> Any:
        """``stock(forward, hidden, *rest)``, a non-reentrant checkpoint, with ``hidden`` away until
        backward. ``ahead``: in this layer's backward the input of the one below starts to come.
        """
        pack = self._pack(hidden.data_ptr(), ahead)
        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            return stock(forward, hidden, *rest)

    def _pack(self, pointer: int, ahead: bool) -> Callable[[Tensor], Any]:
        """A hook that sends away what lies at ``pointer``. It must not hold the tensor itself:
        autograd keeps the hook until backward.
        """

        def pack(tensor: Tensor) -> Any:
            if tensor.data_ptr() != pointer or not tensor.is_cuda or not tensor.is_contiguous():
                return tensor
            self._last = _Slot(self, tensor, self._last if ahead else None)
            return self._last

        return pack


def _unpack(packed: Any) -> Tensor:
    return packed.tensor() if isinstance(packed, _Slot) else packed
