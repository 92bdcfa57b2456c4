"""The same model as stock, with some of its patches, and as it was."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gemma_accel.budget import memory_budget
from gemma_accel.errors import BudgetError
from gemma_accel.hookspecs import Patch, Undo
from gemma_accel.models import text_model
from gemma_accel.patches.per_layer import HostPerLayerEmbedding, per_layer_patch
from gemma_accel.patches.seams import Fused
from gemma_accel.patching import _candidates, _refuse_foreign, registry, report_of
from gemma_accel.report import Report
from gemma_accel.verification.result import VerificationError

__all__ = ["CORRECTIONS", "Installation", "Place"]

CORRECTIONS = frozenset({"audio_eager_mask"})
"""Patches that differ from stock on purpose, which is wrong there: they are in from the start."""


@dataclasses.dataclass
class Place:
    """One patch in one module; ``undo`` while it is in."""

    patch: Patch
    path: str
    module: nn.Module
    undo: Undo | None = None


class Installation:
    """Takes a model's patches out and puts them in; on leaving, all is as it was on entering.

    An applied model keeps its report, in which the undos are exchanged for the last installation's.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.report = report_of(base)
        self.places: list[Place] = []
        self._policy = getattr(text_model(base), "memory", None)
        self._bound: Any = None
        if self.report is None:
            _refuse_foreign(base)
            found = _candidates(base, registry().patches(), Report())
            self.places = [Place(*candidate) for candidate in found]
        else:
            self._read(self.report)

    def _read(self, report: Report) -> None:
        """An applied model's places: the report's records and, in the same order, its undos."""
        if obstacles := report.obstacles():
            raise VerificationError(
                f"the stock model cannot be had for comparison: {'; '.join(obstacles[:3])}. Undo "
                "that first, or verify before."
            )
        offered = {patch.name: patch for patch in registry().patches()}
        if gone := {record.patch for record in report.applied} - offered.keys():
            raise VerificationError(
                f"nobody offers {', '.join(map(repr, sorted(gone)))} any more: a plugin was "
                "unregistered after apply. Register it again, or restore() and apply again."
            )
        for record, undo in zip(report.applied, report.undos(), strict=True):
            module = _module_at(self.base, record.path)
            self.places.append(Place(offered[record.patch], record.path, module, undo))

    def __enter__(self) -> Installation:
        self._media = {} if self._policy is None else self._policy.media
        # copies that PEFT made of patched modules (`modules_to_save`): theirs whose class they have
        known = {id(place.module) for place in self.places}
        self._copies: list[tuple[nn.Module, type[Fused]]] = [
            (module, type(module))
            for module in self.base.modules()
            if isinstance(module, Fused) and not isinstance(module, HostPerLayerEmbedding)
            if id(module) not in known
        ]
        self._tables = [m for m in self.base.modules() if type(m) is HostPerLayerEmbedding]
        self._frozen = [t.weight for t in self._tables if t.weight.requires_grad]
        # such a table cannot be trained from where it is: a Trainer brings it back first
        for weight in self._frozen:
            weight.requires_grad_(False)
        return self

    def __exit__(self, *_: object) -> None:
        self._all_out()
        if self._bound is not None:
            vars(self.base)["forward"] = self._bound
        if self.report is not None:
            for place in self.places:
                _in(place)
            self.report.exchange_undos([p.undo for p in self.places if p.undo is not None])
        for layer in text_model(self.base).layers:
            if (graphs := getattr(layer, "graphs", None)) is not None:
                graphs.drop()  # captured for this comparison alone
        if self._policy is not None and self._policy.media is not self._media:
            self._policy.set_media(self._media)  # the comparison's own are no run's
        for module, fused in self._copies:
            _become(module, fused)
        for weight in self._frozen:
            weight.requires_grad_(True)

    def in_order(self) -> list[Patch]:
        return list({place.patch.name: place.patch for place in self.places}.values())

    def of(self, patch: Patch) -> list[Place]:
        return [place for place in self.places if place.patch is patch]

    def take_out(self) -> None:
        """To the stock model: without what a trainer bound to it, too."""
        self._all_out()
        self._bound = vars(self.base).pop("forward", None) or self._bound
        for place in self.places:
            if place.patch.name in CORRECTIONS:
                _in(place)
        for module, fused in self._copies:
            _become(module, fused.stock)
        self._look_tables_up()

    def put_in(self, patch: Patch) -> None:
        for place in self.of(patch):
            _in(place)
        if patch is per_layer_patch:
            self._read_tables()
        for module, fused in self._copies_of(patch):
            _become(module, fused)
        self._set_policy()

    def put_out(self, patch: Patch) -> None:
        for place in reversed(self.of(patch)):
            _out(place)
        if patch is per_layer_patch:
            self._look_tables_up()
        for module, fused in self._copies_of(patch):
            _become(module, fused.stock)

    def _copies_of(self, patch: Patch) -> list[tuple[nn.Module, type[Fused]]]:
        return [copy for copy in self._copies if getattr(patch, "fused", None) is copy[1]]

    def _all_out(self) -> None:
        """Newest first."""
        for place in reversed(self.places):
            _out(place)

    def put_back(self) -> None:
        """All of them."""
        for place in self.places:
            _in(place)
        for module, fused in self._copies:
            _become(module, fused)
        self._read_tables()
        self._set_policy()

    def _look_tables_up(self) -> None:
        """As stock does, wherever they are."""
        for table in self._tables:
            vars(table)["forward"] = _plain_lookup(table)

    def _read_tables(self) -> None:
        """As the patch does."""
        for table in self._tables:
            vars(table).pop("forward", None)

    def _set_policy(self) -> None:
        """The memory policy just installed decides as the one before it, or as `apply`'s would."""
        now: Any = getattr(text_model(self.base), "memory", None)
        if now is None or now is self._policy:
            return
        if self._policy is not None:
            for name in ("budget", "fixed", "trained"):
                setattr(now, name, getattr(self._policy, name))
            return
        with contextlib.suppress(BudgetError):
            gib = memory_budget(self.base, None)
            now.budget = None if gib is None else int(gib * 2**30)


def _become(module: nn.Module, kind: type) -> None:
    module.__class__ = kind


def _in(place: Place) -> None:
    if place.undo is None:
        place.undo = place.patch.install(place.module)


def _out(place: Place) -> None:
    undo, place.undo = place.undo, None
    if undo is not None:
        undo()


def _module_at(base: nn.Module, path: str) -> nn.Module:
    """The module that was at ``path``, whatever wrappers PEFT has put around it since."""
    module: Any = base
    for name in path.split(".") if path else ():
        for inside in ("", "original_module", "base_layer"):
            owner = getattr(module, inside, None) if inside else module
            if owner is not None and name in owner._modules:
                module = owner._modules[name]
                break
        else:
            raise VerificationError(
                f"there is no {path!r} any more, where a patch was installed. restore(), and apply "
                "again."
            )
    for inside in ("original_module", "base_layer"):
        module = module._modules.get(inside, module)
    return module


def _plain_lookup(table: Any) -> Callable[[Tensor], Tensor]:
    """Stock's arithmetic with the rows read by the CPU, for a table that is not on the device."""

    def forward(ids: Tensor) -> Tensor:
        rows = F.embedding(ids.cpu(), table.weight.detach()).to(ids.device, table._output_dtype)
        return rows * table.embed_scale.to(ids.device, table._output_dtype)

    return forward
