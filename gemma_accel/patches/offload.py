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
        stream = owner.stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self._view().copy_(tensor, non_blocking=True)
        tensor.record_stream(
            stream
        )  # its memory is not handed out again before the copy is through

    def _view(self) -> Tensor:
        assert self.host is not None
        return self.host.view(self.dtype).view(self.shape)

    def fetch(self) -> None:
        """Start the way back, if it has not begun."""
        if self.copy is not None or self.host is None:
            return
        self.copy = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        stream = self.owner.stream(self.device)
        stream.wait_stream(
            torch.cuda.current_stream(self.device)
        )  # the new tensor's memory may still be in use there
        with torch.cuda.stream(stream):
            self.copy.copy_(self._view(), non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record(stream)
        self.owner.give(
            self.host
        )  # the next write into it runs on the same stream, after this read
        self.host = None

    def tensor(self) -> Tensor:
        """The input, back on the device; the layer below starts to come back too."""
        self.fetch()
        assert self.copy is not None and self.arrived is not None
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self.arrived)
        self.copy.record_stream(current)
        if self.below is not None:
            self.below.fetch()
        self.below = None
        return self.copy


class OffloadedInputs:
    """Runs checkpointed layers with their inputs away. Host buffers are kept for the next step."""

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._last: _Slot | None = None

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def take(self, nbytes: int) -> Tensor:
        free = self._free[nbytes]
        return free.pop() if free else locked_empty(nbytes)

    def give(self, host: Tensor) -> None:
        self._free[host.nbytes].append(host)

    def run(
        self,
        stock: Callable[..., Any],
        forward: Callable[..., Any],
        hidden: Tensor,
        *rest: Any,
        first: bool,
    ) -> Any:
        """``stock(forward, hidden, *rest)``, a non-reentrant checkpoint, with ``hidden`` away until
        backward. ``first``: layer 0.
        """
        if first:
            self._last = None

        with torch.autograd.graph.saved_tensors_hooks(self._pack(hidden.data_ptr()), _unpack):
            return stock(forward, hidden, *rest)

    def _pack(self, pointer: int) -> Callable[[Tensor], Any]:
        """A hook that sends away what lies at ``pointer``. It must not hold the tensor itself:
        autograd keeps the hook until backward.
        """

        def pack(tensor: Tensor) -> Any:
            if tensor.data_ptr() != pointer or not tensor.is_cuda or not tensor.is_contiguous():
                return tensor
            self._last = _Slot(self, tensor, self._last)
            return self._last

        return pack


def _unpack(packed: Any) -> Tensor:
    return packed.tensor() if isinstance(packed, _Slot) else packed
