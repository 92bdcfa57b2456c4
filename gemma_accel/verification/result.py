"""What `verify` found: a row a patch, three measures a row, printed as a table."""

from __future__ import annotations

import dataclasses
import io
from typing import Any, NamedTuple

from gemma_accel.errors import GemmaAccelError

__all__ = ["EVERYTHING", "NOTHING", "Measure", "Row", "Verification", "VerificationError"]

EVERYTHING = "all together"
"""Stands for a patch's name in the last row, where all of them are in."""


class VerificationError(GemmaAccelError):
    """The patched model does not train as the stock model does, or that cannot be found out."""


class Measure(NamedTuple):
    """The quantity that came closest to its budget, or went furthest over it."""

    error: float
    budget: float
    where: str

    @property
    def ok(self) -> bool:
        return self.error <= self.budget


NOTHING = Measure(0.0, 0.0, "")


@dataclasses.dataclass(frozen=True)
class Row:
    """One patch, tried on top of those before it that were found good.

    Attributes:
        places: in how many modules it sits.
        loss: relative difference of the loss; with all patches in, of a run left to itself too.
        output: worst relative difference of a layer's or block's output, from stock's input.
        gradient: worst relative difference of a gradient, from stock's input and gradient.
        reason: why it failed or could not be tried, where the numbers do not say it.
        note: why it was not compared, where that is as it should be.
    """

    patch: str
    modality: str
    places: int
    loss: Measure = NOTHING
    output: Measure = NOTHING
    gradient: Measure = NOTHING
    reason: str = ""
    note: str = ""
    tried: bool = True

    @property
    def loss_error(self) -> float:
        return self.loss.error

    @property
    def gradient_error(self) -> float:
        return self.gradient.error

    @property
    def budget(self) -> float:
        """The budget of the worst gradient."""
        return self.gradient.budget

    @property
    def ok(self) -> bool:
        return not self.reason and self.loss.ok and self.output.ok and self.gradient.ok


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found: print it.

    Attributes:
        rows: one a patch, in the order of installation, and a last one for all of them together.
        notes: what was not looked at, and why.
    """

    rows: list[Row]
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def guilty(self) -> list[str]:
        """The patches with which the model no longer does what stock does, the first one first."""
        return [row.patch for row in self.rows if row.tried and not row.ok]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and dictionaries, ready for JSON."""
        rows = []
        for row in self.rows:
            entry = {**dataclasses.asdict(row), "ok": row.ok}
            for name in ("loss", "output", "gradient"):
                entry[name] = getattr(row, name)._asdict()
            rows.append(entry)
        return {"ok": self.ok, "guilty": self.guilty, "rows": rows, "notes": self.notes}

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=120, force_terminal=False, force_jupyter=False).print(self)
        return out.getvalue().rstrip()

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from rich.table import Table

        table = Table(title="patched against stock", title_justify="left")
        for column in ("patch", "places", "loss", "outputs", "gradients", ""):
            table.add_column(column, justify="right" if column == "places" else "left")
        for row in self.rows:
            if not row.tried:
                table.add_row(row.patch, str(row.places), "", "", "", row.reason or row.note)
                continue
            cells = [_cell(m) for m in (row.loss, row.output, row.gradient)]
            verdict = "ok" if row.ok else f"WRONG: {row.reason or _worst(row).where}"
            table.add_row(row.patch, str(row.places), *cells, verdict)
        yield table
        yield "each cell: relative difference / what rounding alone may do"
        yield from self.notes


def _cell(measure: Measure) -> str:
    return f"{measure.error:.1e} / {measure.budget:.1e}" if measure.where else "-"


def _worst(row: Row) -> Measure:
    return next((m for m in (row.output, row.gradient, row.loss) if not m.ok), row.output)
