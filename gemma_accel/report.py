"""What `apply` did, what it left alone and why, and the way back."""

from __future__ import annotations

import functools
import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Applied", "Report", "Skipped"]


@dataclass(frozen=True)
class Applied:
    """One patch in one place."""

    patch: str
    modality: str
    path: str


@dataclass(frozen=True)
class Skipped:
    """One patch that was not installed in one place (``path`` is empty where it matched nothing),
    and the reason.
    """

    patch: str
    modality: str
    path: str
    reason: str


@dataclass
class Report:
    """The outcome of `apply`: print it, write it down, ask it what a step would do, or take
    everything back.

    Attributes:
        applied: a record for each patch in each place. skipped: a record for each place a patch had
        to leave stock, with the reason. notes: what happened to the model besides patches (where
        the per-layer table lives, which towers left the GPU), by topic. restored: whether all of it
        has been taken back.
    """

    applied: list[Applied] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    restored: bool = field(default=False, repr=False)
    _undos: list[Callable[[], None]] = field(default_factory=list, repr=False)
    _checks: list[Callable[[], str | None]] = field(default_factory=list, repr=False)
    _plan: Callable[..., Any] | None = field(default=None, repr=False)
    _cap: Callable[[], None] | None = field(default=None, repr=False)
    _way_back: Any = field(default=None, repr=False)

    def note(self, topic: str, text: str) -> None:
        """Set down what happened to ``topic``; a later note on it replaces the earlier."""
        self.notes[topic] = text

    def skip(self, patch: str, modality: str, path: str, reason: str) -> None:
        """Add a skip found after `apply` (once PEFT has wrapped the model, say); the same one twice
        is one record.
        """
        record = Skipped(patch, modality, path, reason)
        if record not in self.skipped:
            self.skipped.append(record)

    def plan(
        self,
        batch_size: int,
        sequence_length: int,
        *,
        images: int = 0,
        sound_seconds: float = 0.0,
    ) -> Any:
        """What a training step of this model on that batch would keep, recompute and offload, and
        its peak (`Plan`); the arguments are those of `gemma_accel.plan`.
        """
        if self._plan is None:
            raise RuntimeError(
                "this report belongs to no applied model: it was restored, or read from a file"
            )
        return self._plan(
            batch_size=batch_size,
            sequence_length=sequence_length,
            images=images,
            sound_seconds=sound_seconds,
        )

    def obstacles(self) -> list[str]:
        """Why patches cannot be taken out: a sentence for each place that somebody has wrapped
        since.
        """
        return [reason for check in self._checks if (reason := check())]

    def undos(self) -> list[Callable[[], None]]:
        """What takes out each of `applied`, in its order."""
        return self._undos[self._patches]

    def exchange_undos(self, undos: list[Callable[[], None]]) -> None:
        """For who has called all of `undos`, and installed the same patches again."""
        self._undos[self._patches] = undos
        self._checks[:] = [
            functools.partial(_named, record.path, obstacle)
            for record, undo in zip(self.applied, undos, strict=True)
            if (obstacle := getattr(undo, "obstacle", None))
        ]

    @property
    def _patches(self) -> slice:
        """Of the undos: the first lets go of the report, those at the end undo what is no patch."""
        return slice(1, 1 + len(self.applied))

    def restore(self, device: Any = None) -> None:
        """Give the stock model back: same classes, bitwise-same outputs. Twice is the same as once.

        Args:
            device: where the per-layer embedding table is to be if it is in host memory now. None:
                a Parameter on the CPU where it was loaded from a checkpoint's file (the model
                then runs once it is moved to one device), and else where it came from.

        Raises:
            RestoreError: somebody has wrapped a patched module since. Nothing is undone then.
        """
        from gemma_accel.errors import RestoreError

        obstacles = self.obstacles()
        if self._way_back is not None and (reason := self._way_back.obstacle()):
            obstacles.append(reason)
        if obstacles:
            raise RestoreError(
                "cannot restore, nothing was changed: "
                + "; ".join(obstacles[:3])
                + (f" (and {len(obstacles) - 3} more)" if len(obstacles) > 3 else "")
                + ". Undo that first, then call restore() again."
            )
        while self._undos:
            self._undos.pop()()
        self._checks.clear()
        self._plan, self.restored = None, True
        if self._way_back is not None:
            self._way_back(device)
            _unfuse_copies(self._way_back._base())
            self._way_back = None

    def _uncap(self) -> None:
        """Give the allocator its own limit back, if it was held to another."""
        if self._cap is not None:
            self._cap()
            self._cap = None

    def __reduce__(self) -> Any:
        """A copied or pickled model is not the one that this report can restore: it goes
        without.
        """
        return type(None), ()

    def to_dict(self) -> dict[str, Any]:
        """The records and notes as plain lists and dictionaries, ready for JSON."""
        return {
            "applied": [asdict(record) for record in self.applied],
            "skipped": [asdict(record) for record in self.skipped],
            "notes": dict(self.notes),
            "versions": dict(self.versions),
        }

    def write(self, directory: str | Path) -> Path:
        """Write the report as ``gemma_accel_report.json`` into a directory (a checkpoint's) and
        return its path.
        """
        path = Path(directory) / "gemma_accel_report.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        return path

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=110, force_terminal=False, force_jupyter=False).print(self)
        return out.getvalue().rstrip()

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from rich.table import Table

        table = Table(title="gemma_accel", title_justify="left", expand=False)
        for column, justify in (
            ("patch", "left"),
            ("modality", "left"),
            ("places", "right"),
            ("", "left"),
        ):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        done = Counter((record.patch, record.modality) for record in self.applied)
        for (patch, modality), places in done.items():
            table.add_row(patch, modality, str(places), "applied")
        left = Counter((record.patch, record.modality, record.reason) for record in self.skipped)
        for (patch, modality, reason), places in left.items():
            table.add_row(patch, modality, str(places), f"skipped: {reason}")
        yield table
        for topic, text in self.notes.items():
            yield f"{topic}: {text}"


def _unfuse_copies(model: Any) -> None:
    """PEFT's copies of patched modules (`modules_to_save`), which no undo knows."""
    for module in model.modules() if model is not None else ():
        stock = getattr(type(module), "stock", None)
        if isinstance(stock, type) and issubclass(type(module), stock):
            module.__class__ = stock


def _named(path: str, obstacle: Callable[[], str | None]) -> str | None:
    return f"{path}: {reason}" if (reason := obstacle()) else None
