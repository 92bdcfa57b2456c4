"""One pass of a small batch through the model, and what it meets on the way there and back."""

from __future__ import annotations

import dataclasses
import functools
import weakref
import zlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gemma_accel.verification.judgement import (
    EVERY_GRADIENT,
    INFINITE,
    Precision,
    relative_errors,
)

__all__ = ["INPUT", "Mode", "Probe", "Run"]

INPUT = " input"
"""Ends the name of what enters a layer."""

Mode = Literal["record", "held", "free"]

_SAMPLE = 1 << 21  # elements of a gradient that are kept and compared: spread over all of it
_ROWS = 64  # tokens of a block's output


@dataclasses.dataclass
class Probe:
    """A small batch, how to run it, and what the stock run gave.

    Attributes:
        modality: whose patches it reaches.
        forward: the loss of the model as it is now.
        mask: of the layers' inputs [B, T], false where they are padding.
        shallow: it takes the first and the last text layer of each kind alone, in stock's run too.
        tape: what the stock run gave, by name, on the CPU (locked there, where a device reads it).
    """

    name: str
    modality: str
    forward: Callable[[Run], Tensor]
    mask: Tensor | None = None
    shallow: bool = False
    tape: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def tokens(self) -> Tensor | None:
        """Which of the batch's tokens, counted through, are no padding."""
        return None if self.mask is None else self.mask.flatten().nonzero().squeeze(-1)

    def not_finite(self) -> str:
        """The name of the first thing on the tape that is not finite, "" where all is."""
        return next((key for key, x in self.tape.items() if not torch.isfinite(x).all()), "")


class Run:
    """One pass of a probe.

    Modes: ``record`` puts what comes by on the probe's tape; ``held`` compares with the tape and
    passes on what the tape has; ``free`` leaves the model alone (nudged or not) and compares what
    comes out. ``nudge`` is the seed of the nudges, 0 for none.
    """

    def __init__(
        self,
        probe: Probe,
        mode: Mode,
        nudge: int,
        precision: Precision,
        is_spared: Callable[[str], bool],
    ) -> None:
        self.probe, self.mode, self.nudge, self.precision = probe, mode, nudge, precision
        self._is_spared = is_spared
        self._seen: dict[str, Tensor] = {}

    def seen(self) -> dict[str, Tensor]:
        """The errors, by name. A layer, or its gradient, that never came by is infinitely off."""
        if self.mode == "held":
            for key in self.probe.tape:
                missed = key.endswith(INPUT) and key not in self._seen
                if missed and not self._is_spared(key):
                    self._seen[key] = INFINITE
        # in one go: each by itself would make the host wait for the device
        waiting = [key for key, error in self._seen.items() if error.device.type != "cpu"]
        if waiting:
            together = torch.stack([self._seen[key] for key in waiting]).cpu()
            self._seen.update(zip(waiting, together, strict=True))
        return self._seen

    # -- within the model --

    def station(self, x: Tensor, key: str, *, hold: bool) -> Tensor:
        """A point of the model's graph, which ``x`` passes on the way there and its gradient on
        the way back. In a held run, ``hold`` gives both the stock run's values.
        """
        passed: Tensor = _Station.apply(x, self, key, hold)
        return passed

    def meet(self, key: str, x: Tensor, hold: bool) -> Tensor:
        """Record or compare ``x``; returns what goes on from here."""
        if self.mode == "record":
            if torch.is_autocast_enabled(x.device.type):  # a trainer's, perhaps, inside the model
                self.precision.meet(torch.get_autocast_dtype(x.device.type))
            self._record(key, x if hold else self._rows_of(x))
        elif self.mode == "held" and key in self.probe.tape:
            stock = self._stock(key, x)
            # a checkpointed layer comes by twice
            if key not in self._seen and not self._is_spared(key):
                ours, theirs = (x, stock) if hold else (self._rows_of(x), stock)
                if hold:
                    ours, theirs = self._tokens_of(ours), self._tokens_of(theirs)
                self._compare(key, ours, theirs, activations=True)
            if hold:
                x = stock.to(x.dtype)
        return self._nudged(key, x) if hold and self.nudge else x.clone()

    def _nudged(self, key: str, x: Tensor) -> Tensor:
        # seeded by place: a recomputed layer is nudged as it was before
        generator = torch.Generator(x.device).manual_seed(zlib.crc32(key.encode()) + self.nudge)
        unit = self.precision.unit
        half = (torch.rand(x.shape, generator=generator, device=x.device) - 0.5) * unit
        return (x.float() * (1 + half)).to(x.dtype)

    def _tokens_of(self, x: Tensor) -> Tensor:
        """Without padding, which may see what it likes."""
        mask, tokens = self.probe.mask, self.probe.tokens
        if mask is None or tokens is None or x.shape[:2] != mask.shape:
            return x
        return x.flatten(0, 1)[tokens.to(x.device)]

    def _rows_of(self, x: Tensor) -> Tensor:
        rows = self._tokens_of(x).flatten(0, -2) if x.dim() > 1 else x
        return rows[:: max(len(rows) // _ROWS, 1)]

    # -- what comes out of it --

    def observe(self, key: str, x: Tensor) -> None:
        """Record or compare a result [rows, columns]."""
        x = x.detach()[:: max(len(x) // 16, 1)]
        if self.mode == "record":
            self._record(key, x)
        elif self.mode == "held":
            self._compare(key, x, self._stock(key, x))

    def loss(self, loss: Tensor) -> None:
        """Record or compare it."""
        if self.mode == "record":
            self._record("loss", loss.double())
        else:
            self._compare("loss", loss.double(), self._stock("loss", loss))

    def gradients(self, trained: list[tuple[str, nn.Parameter]]) -> None:
        """Record or compare every parameter's; in a free run all of them as one."""
        pairs = []
        for name, parameter in trained:
            key = f"gradient of {name}"
            if self._is_spared(key):
                continue
            ours = None if parameter.grad is None else _sampled(parameter.grad)
            recorded = key in self.probe.tape
            if self.mode == "record":
                if ours is not None:
                    self._record(key, ours)
            elif ours is None or not recorded:
                if ours is not None or recorded:
                    self._seen[key] = INFINITE
            elif self.mode == "held":
                self._compare(key, ours, self._stock(key, ours))
            else:
                pairs.append((ours, self._stock(key, ours)))
        if pairs:
            self._seen[EVERY_GRADIENT] = _error_as_one(pairs)

    def _record(self, key: str, x: Tensor) -> None:
        if key not in self.probe.tape:
            there = x.detach().to("cpu", copy=True)
            self.probe.tape[key] = there.pin_memory() if x.is_cuda else there

    def _stock(self, key: str, like: Tensor) -> Tensor:
        return self.probe.tape[key].to(like.device, non_blocking=True)

    def _compare(self, key: str, ours: Tensor, stock: Tensor, *, activations: bool = False) -> None:
        if ours.shape != stock.shape:
            self._seen[key] = INFINITE
        else:
            self._seen[key] = relative_errors(ours.detach(), stock, activations=activations)


class _Station(torch.autograd.Function):
    """Hands what passes, there and back, to `Run.meet`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Run, key: str, hold: bool) -> Tensor:
        # weakly: a graph that a failed run leaves behind would hold the model, out of the
        # collector's sight
        ctx.about = weakref.ref(run), key, hold
        return run.meet(key, x, hold)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        reference, key, hold = ctx.about
        run = reference()
        if run is not None:
            dy = run.meet(f"gradient of {key}", dy, hold)
        return dy, None, None, None


def _sampled(gradient: Tensor) -> Tensor:
    flat = gradient.detach().flatten()
    return flat[:: (len(flat) // _SAMPLE) | 1] if len(flat) > _SAMPLE else flat


def _error_as_one(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Of vectors and stock's, laid end to end: the 2-norm alone."""
    device = pairs[0][0].device
    difference = size = torch.zeros((), dtype=torch.float64, device=device)
    for ours, stock in pairs:
        s = stock.double()
        difference = difference + (ours.double() - s).square().sum().to(device)
        size = size + s.square().sum().to(device)
    total = (difference / size.masked_fill(size == 0, 1.0)).sqrt()
    return torch.stack((total, total * 0, total * 0))
