"""Every figure in the README's measured tables is one of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TABLES = re.findall(r"<!-- measured: (\S+) -->\n(.*?)<!-- /measured -->", README, re.S)


def rows_of(table: str) -> list[list[str]]:
    lines = [line for line in table.strip().splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def expected(row: dict, stock: dict) -> list[str]:
    return [
        f"{row['load_peak_gib']:.2f}",
        f"{row['peak_reserved_gib']:.2f}",
        f"{row['step_s']:.3f}",
        f"{row['launches']:,}",
        f"{row['gpu_busy_ms']:.0f}",
        f"{stock['step_s'] / row['step_s']:.2f}",
    ]


def test_there_are_measured_tables():
    assert TABLES


@pytest.mark.parametrize(("file", "table"), TABLES, ids=[file for file, _ in TABLES])
def test_a_table_quotes_its_file(file, table):
    results = json.loads((ROOT / "benchmarks/results" / file).read_text())
    stock = next(row for row in results["rows"] if row["stack"] == "trl")
    shown, measured = rows_of(table), [row for row in results["rows"] if "step_s" in row]
    assert len(shown) == len(measured)
    for cells, row in zip(shown, measured, strict=True):
        assert cells[1:] == expected(row, stock), row["label"]


def test_the_versions_and_the_card_are_the_files():
    results = json.loads((ROOT / "benchmarks/results" / TABLES[0][0]).read_text())
    assert results["card"] in README
    for name in ("transformers", "trl", "peft", "bitsandbytes", "torch", "triton"):
        assert results["versions"][name] in README
    alone = json.loads((ROOT / "benchmarks/results/h100-w1-alone.json").read_text())
    assert f"{alone['rows'][0]['step_s']:.3f} s" in README


@pytest.mark.parametrize(
    "hook", ["gemma_accel_patches", "gemma_accel_select", "gemma_accel_applied"]
)
def test_every_hook_has_a_heading(hook):
    assert f"### `{hook}`" in README
