"""The README's tables, from the committed results alone.

    python -m benchmarks.tables

A table stands between ``<!-- kind: file.json ... -->`` and ``<!-- /kind -->``; what is between them
is written anew from the files under ``benchmarks/results`` that the first one names. A test holds
the README to what this writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.works import WORKS, plan_of
from gemma_accel.telemetry import peak_tflops

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
TABLE = re.compile(
    r"(<!-- (measured|memory|media|attention|kernels): ([^>]+) -->\n).*?(<!-- /\2 -->)", re.S
)

STACKS = {"trl": "TRL", "liger": "TRL + Liger", "unsloth": "Unsloth"}
MEDIA = {
    "images": "two images of 280 soft tokens, 512 tokens of text",
    "photos": "two padded photos of 266, 512 tokens of text",
    "sound": "30 s of sound, 256 tokens of text",
}

Row = dict[str, Any]


def render(readme: str, results: Path = HERE / "results") -> str:
    """``readme`` with every marked table written from its files."""

    def table(found: re.Match[str]) -> str:
        begin, kind, names, end = found.groups()
        files = [json.loads((results / name).read_text()) for name in names.split()]
        return begin + "".join(f"{line}\n" for line in KINDS[kind](files)) + end

    return TABLE.sub(table, readme)


def _lines(head: str, rows: list[list[str]]) -> Iterator[str]:
    yield f"| {head} |"
    yield "|---" * (head.count("|") + 1) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _rows(files: list[Row]) -> Iterator[tuple[Row, Row]]:
    """Each row with its file. Stock that ran again beside another stack, for the ratio, is one; and
    what has failed and succeeded has succeeded.
    """
    found: dict[Any, tuple[Row, Row]] = {}
    for file in files:
        for row in file["rows"]:
            key = _work(row), _stack(row), row.get("seed")
            if key not in found or "error" in found[key][0]:
                found[key] = row, file
    yield from found.values()


def _steps(files: list[Row]) -> Iterator[str]:
    head = "work | stack | load, GiB | training, GiB | step, s | tokens/s | MFU | launches"
    rows = [
        [_work(row), _stack(row), *_figures(row, _stock(row, file), file["card"])]
        for row, file in _rows(files)
    ]
    return _lines(f"{head} | GPU busy, ms | against stock", rows)


def _memory(files: list[Row]) -> Iterator[str]:
    """Of each row what was measured, with `plan`'s figure behind it where there is a plan."""
    head = "work | stack | reserved, GiB | planned | allocated | host | planned"
    rows = []
    for row in (row for row, _ in _rows(files) if "error" not in row):
        reserved, host = _planned(row)
        held = row["host_gib"]["anonymous"] + row["host_gib"]["shared"]
        figures = (row["peak_reserved_gib"], reserved, row.get("peak_allocated_gib"), held, host)
        cells = ["" if gib is None else f"{gib:.2f}" for gib in figures]
        rows.append([_work(row), _stack(row), *cells])
    return _lines(head, rows)


def _planned(row: Row) -> tuple[float | None, float | None]:
    """The GiB that `plan` says of the card and of the host, where it knows the stack and how much
    there is.
    """
    limit = row.get("vram_gib") or row["cap_gib"]
    made = plan_of(row["work"], limit, float32=row.get("float32", False))
    if row["stack"] == "trl":
        return made.choices["alternatives"]["stock TRL, training"], None
    if row["stack"] != "gemma_accel" or limit is None:
        return None, None
    return max(made.peak_gib, made.load_peak_gib), made.host_gib  # what loading took is kept


def _media(files: list[Row]) -> Iterator[str]:
    head = "work | stack | load, GiB | training, GiB | step, s | launches"
    rows = [
        [_work(row), _stack(row), *_figures(row, _stock(row, file))] for row, file in _rows(files)
    ]
    return _lines(f"{head} | GPU busy, ms | against stock", rows)


def _attention(files: list[Row]) -> Iterator[str]:
    rows = [
        [row["case"], f"{row['stock_ms']:.2f}", f"{row['ours_ms']:.2f}", f"{row['speedup']:.1f}"]
        for file in files
        for row in file["rows"]
    ]
    return _lines("layer | stock, ms | here, ms | times", rows)


def _kernels(files: list[Row]) -> Iterator[str]:
    rows = [
        [f"{row['op']} {row['shape']}"]
        + [_cell(row, f"{stack}_gpu_us", ",.0f") for stack in ("stock", "liger", "ours")]
        + [f"{row['gpu_speedup']:.1f}"]
        for file in files
        for row in file["rows"]
        if "gpu_speedup" in row
    ]
    return _lines("op | stock, us | Liger, us | here, us | times stock", rows)


KINDS = {
    "measured": _steps,
    "memory": _memory,
    "media": _media,
    "attention": _attention,
    "kernels": _kernels,
}


def _work(row: Row) -> str:
    if row["work"] in MEDIA:
        return MEDIA[row["work"]]
    weights = "" if WORKS[row["work"]].quantised else " in bf16"
    if row.get("float32"):
        weights = " loaded in float32"
    return f"{row['model'].upper()}{weights}, {row['batch_size']} x {row['sequence_length']:,}"


def _stack(row: Row) -> str:
    if row["stack"] in STACKS:
        return STACKS[row["stack"]]
    if row.get("vram_gib"):
        return f"gemma_accel, `vram_gib={row['vram_gib']:g}`"
    return "gemma_accel, " + (f"all of {row['cap_gib']:g} GiB" if row["cap_gib"] else "no cap")


def _stock(row: Row, file: Row) -> Row | None:
    """Stock's row of the same work in the same run."""
    rows = (r for r in file["rows"] if r["work"] == row["work"] and r["stack"] == "trl")
    return next((r for r in rows if "step_s" in r), None)


def _figures(row: Row, stock: Row | None, card: str | None = None) -> list[str]:
    """A row's numbers; those for each token and the MFU only where there is a ``card``."""
    tokens = card is not None
    if "error" in row:
        short = "out of memory" if "OutOfMemory" in row["error"] else "failed"
        return [short] + [""] * (7 if tokens else 5)
    figures = [f"{row['load_peak_gib']:.2f}", f"{row['peak_reserved_gib']:.2f}"]
    figures.append(_cell(row, "step_s", ".3f"))
    if tokens:
        figures.append(_cell(row, "tokens_per_second", ",.0f"))
        peak = peak_tflops(card)
        timed = peak and "step_s" in row
        figures.append(f"{row['train_tflop'] / row['step_s'] / peak:.1%}" if timed else "")
    figures += [_cell(row, "launches", ",d"), _cell(row, "gpu_busy_ms", ",.0f")]
    ratio = stock["step_s"] / row["step_s"] if stock and "step_s" in row else None
    return [*figures, f"{ratio:.2f}" if ratio else "not measured"]


def _cell(row: Row, name: str, form: str) -> str:
    return f"{row[name]:{form}}" if name in row else ""


def main() -> None:
    README.write_text(render(README.read_text()))
    print(f"{README.name}: {len(TABLE.findall(README.read_text()))} tables written")


if __name__ == "__main__":
    main()
