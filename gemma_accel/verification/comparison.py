"""The runs of one `verify`, in their order: stock, nudged, patch by patch, all together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemma_accel.hookspecs import Patch
from gemma_accel.memory import Mode as MemoryMode
from gemma_accel.models import text_model
from gemma_accel.patches.checkpointing import checkpointing_patch, graphs_patch
from gemma_accel.patches.graphs import STEADY
from gemma_accel.patches.lm_head import lm_head_patch
from gemma_accel.verification.batches import modality_of
from gemma_accel.verification.borrowing import attributes_kept, memory_modes
from gemma_accel.verification.installation import CORRECTIONS, Installation, Place
from gemma_accel.verification.judgement import SORTS, Judge, Precision, worst_of
from gemma_accel.verification.result import EVERYTHING, Measure, Row, VerificationError
from gemma_accel.verification.runs import Mode, Probe, Run
from gemma_accel.verification.stations import Stations, layers_in_between

__all__ = ["Comparison"]

DRAWS = 2
"""Nudged runs. Each gives a number a layer; layers of a kind are pooled."""

Found = list[tuple[str, Measure]]


class Comparison:
    """Compares a model with itself as stock, by the probes."""

    def __init__(
        self, model: Any, installation: Installation, probes: list[Probe], rtol: float | None
    ) -> None:
        self.installation, self.probes = installation, probes
        self.text: Any = text_model(installation.base)
        self.stations = Stations(installation.base)
        self.precision = Precision(installation.base)
        self.judge = Judge(self.precision, rtol)
        self.spared = layers_in_between(self.text)
        self.trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]

    def rows(self) -> list[Row]:
        self.installation.take_out()
        self._record()
        self._measure_noise()
        rows = self._one_by_one()
        if not all(row.ok for row in rows):
            return rows
        self.installation.put_back()
        places = len(self.installation.places)
        together = self._attempt(EVERYTHING, "", places, lambda: self._found(self.probes))
        if together.ok or not self.spared:
            return [*rows, together]
        self.spared = []
        self.installation.take_out()
        rows = self._one_by_one()
        return rows if not all(row.ok for row in rows) else [*rows, together]

    # -- stock --

    def _record(self) -> None:
        """The stock runs, which everything else is compared with."""
        odd = self._run_stock()
        if odd is not None and self.precision.loss_scale > 1:
            self.precision.loss_scale = 1.0
            odd = self._run_stock()
        if odd is not None:
            raise VerificationError(
                f"the stock model's own {odd.not_finite()} is not finite, on {odd.name}: there is "
                "nothing to compare with. Check the weights, or use bfloat16."
            )

    def _run_stock(self) -> Probe | None:
        """Returns the first batch that gave something that is not finite."""
        for probe in self.probes:
            probe.tape.clear()
            self._run(probe, "record")
            if probe.not_finite():
                return probe
        return None

    def _measure_noise(self) -> None:
        modes: tuple[Mode, ...] = ("free", "held")
        for draw in range(DRAWS):
            for probe in self.probes:
                for mode in modes:
                    self.judge.learn(self._run(probe, mode, nudge=draw + 1), probe.name)

    # -- patched --

    def _one_by_one(self) -> list[Row]:
        rows = []
        bad: list[str] = []
        for patch in self.installation.in_order():
            row = self._try(patch, bad)
            if not row.ok:
                bad.append(patch.name)
            rows.append(row)
        return rows

    def _try(self, patch: Patch, bad: list[str]) -> Row:
        places = self.installation.of(patch)
        about = patch.name, patch.modality, len(places)
        needs = {patch.needs(place.module) for place in places}
        if needed := [name for name in bad if name in needs]:
            return Row(*about, reason=f"not tried: it needs {needed[0]!r}", tried=False)
        if patch.name in CORRECTIONS:
            return Row(*about, note="not compared: it mends stock", tried=False)
        probes = self._probes_for(patch, places)
        if not probes:
            return Row(*about, note="not tried: see below", tried=False)
        row = self._attempt(*about, lambda: self._found_with(patch, probes))
        if not row.ok:
            self.installation.put_out(patch)
        elif patch is graphs_patch and not (graphs := self.text.layers[0].graphs).captured:
            why = f"not tried: nothing was captured ({graphs.idle})"
            return Row(*about, note=why, tried=False)
        return row

    def _probes_for(self, patch: Patch, places: list[Place]) -> list[Probe]:
        """Those that reach the places. The labelled one is for the head, while layers are spared,
        and never for graphs, which do not serve a shallow batch.
        """
        concerned = {modality_of(place.path) for place in places}
        deep = patch is graphs_patch or (self.spared and patch is not lm_head_patch)
        return [p for p in self.probes if p.modality in concerned and not (deep and p.shallow)]

    def _attempt(self, name: str, modality: str, places: int, find: Callable[[], Found]) -> Row:
        try:
            found = find()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            return Row(name, modality, places, reason=reason)
        loss, output, gradient = (worst_of(found, sort) for sort in SORTS)
        return Row(name, modality, places, loss=loss, output=output, gradient=gradient)

    def _found_with(self, patch: Patch, probes: list[Probe]) -> Found:
        """How the model compares with ``patch`` in, too."""
        self.installation.put_in(patch)
        if patch is graphs_patch:
            return self._found(probes)
        with self.stations.spare(self.spared):
            found = self._held(probes)
        if patch is checkpointing_patch:
            found += self._found_in_modes(probes)
        return found

    def _found(self, probes: list[Probe]) -> Found:
        """How the model as it is now compares, left to itself too, and with graphs if it has
        any.
        """
        found = []
        steady = any(getattr(layer, "graphs", None) is not None for layer in self.text.layers)
        for probe in probes:
            # before graphs are captured, which would run past the stations
            found += self._compare(probe, "held")
            # batches that have kept their shape are captured: then the last of several runs counts
            captured = steady and probe.modality == "text" and not probe.shallow
            for _ in range(STEADY if captured else 0):
                self._run(probe, "free")
            found += self._compare(probe, "free")
        return found

    def _found_in_modes(self, probes: list[Probe]) -> Found:
        """Every way in which a layer may pay for its backward, whatever this batch's would be."""
        found = []
        modes = list(MemoryMode)
        for shift in (0, len(modes) // 2):
            by_turns = [*modes[shift:], *modes[:shift]]
            with attributes_kept(self.text), memory_modes(self.text, by_turns):
                found += self._held(probes)
        return found

    def _held(self, probes: list[Probe]) -> Found:
        return [measure for probe in probes for measure in self._compare(probe, "held")]

    def _compare(self, probe: Probe, mode: Mode) -> Found:
        errors = self._run(probe, mode)
        return [self.judge.measure(key, error, probe.name) for key, error in errors.items()]

    def _run(self, probe: Probe, mode: Mode, *, nudge: int = 0) -> dict[str, Tensor]:
        """One pass; the errors of what it met, by name."""
        torch.manual_seed(0)  # the same dropout in every run
        torch.clear_autocast_cache()
        is_spared = functools.partial(self.stations.is_spared, probe)
        run = Run(probe, mode, nudge, self.precision, is_spared)
        try:
            with self.stations.watched(run):
                with torch.set_grad_enabled(bool(self.trained)):
                    loss = probe.forward(run)
                    run.loss(loss)
                if loss.requires_grad:
                    (loss * self.precision.loss_scale).backward()
                    run.gradients(self.trained)
                return run.seen()
        finally:
            for _, parameter in self.trained:
                parameter.grad = None
