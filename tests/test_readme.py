"""Every figure in the README's measured tables is one of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.losses import compare, curves
from gemma_accel.telemetry import peak_tflops

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks/results"
MEASURED = re.search(r"<!-- measured: (.+) -->\n(.*?)<!-- /measured -->", README, re.S)
ATTENTION = re.search(r"<!-- attention: (.+) -->\n(.*?)<!-- /attention -->", README, re.S)

MEDIA = re.search(r"<!-- media: (.+) -->\n(.*?)<!-- /media -->", README, re.S)
MEDIA_WORKS = {"images": "two images of 280 soft tokens, 512 tokens of text"}


def results(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def rows_of(table: str) -> list[list[str]]:
    lines = [line for line in table.strip().splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def quoted(row: dict, stock: dict | None) -> list[str]:
    work = row["model"].upper() + (" in bf16" if row["work"] == "W5" else "")
    stack = "gemma_accel, all of 7 GiB"
    if row["stack"] == "trl":
        stack = "TRL"
    elif row["vram_gib"]:
        stack = f"gemma_accel, `vram_gib={row['vram_gib']:g}`"
    peak = peak_tflops("NVIDIA H100 80GB HBM3")
    return [
        f"{work}, {row['batch_size']} x {row['sequence_length']:,}",
        stack,
        f"{row['load_peak_gib']:.2f}",
        f"{row['peak_reserved_gib']:.2f}",
        f"{row['step_s']:.3f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['train_tflop'] / row['step_s'] / peak:.1%}",
        f"{row['launches']:,}",
        f"{row['gpu_busy_ms']:.0f}",
        f"{stock['step_s'] / row['step_s']:.2f}" if stock else "not measured",
    ]


def test_the_table_of_steps_quotes_its_files():
    files, table = MEASURED.groups()
    expected = []
    for name in files.split():
        rows = results(name)["rows"]
        stock = next((row for row in rows if row["stack"] == "trl"), None)
        expected += [quoted(row, stock) for row in rows]
    assert rows_of(table) == expected


def test_the_table_of_media_quotes_its_file():
    file, table = MEDIA.groups()
    rows = results(file)["rows"]
    stock = {row["work"]: row for row in rows if row["stack"] == "trl"}
    expected = [
        [
            MEDIA_WORKS[row["work"]],
            "TRL"
            if row["stack"] == "trl"
            else "gemma_accel, " + ("all of 7 GiB" if row["cap_gib"] else "no cap"),
            f"{row['load_peak_gib']:.2f}",
            f"{row['peak_reserved_gib']:.2f}",
            f"{row['step_s']:.3f}",
            f"{row['launches']:,}",
            f"{row['gpu_busy_ms']:.0f}",
            f"{stock[row['work']]['step_s'] / row['step_s']:.2f}",
        ]
        for row in rows
    ]
    assert rows_of(table) == expected


def test_the_table_of_attention_quotes_its_file():
    file, table = ATTENTION.groups()
    cases = {row["case"]: row for row in results(file)["rows"]}
    for name, stock, ours, times in rows_of(table):
        row = cases[name]
        expected = f"{row['stock_ms']:.2f}", f"{row['ours_ms']:.2f}", f"{row['speedup']:.1f}"
        assert (stock, ours, times) == expected, name


def test_the_versions_and_the_card_are_the_files():
    for name in MEASURED[1].split():
        run = results(name)
        assert run["card"] in README
        for package in ("transformers", "trl", "peft", "bitsandbytes", "torch", "triton"):
            assert run["versions"][package] in README


def test_losses_float32_and_newest_versions_are_the_files():
    text = " ".join(README.split())
    rows = results("h100-losses.json")["rows"]
    gap, spread = compare(curves(rows, "trl"), curves(rows, "gemma_accel"))
    assert f"is {gap:.4f}, within stock's own spread of {spread:.4f}" in text and gap <= spread
    (wide,) = results("h100-w1-float32.json")["rows"]
    load, train = wide["load_peak_gib"], wide["peak_reserved_gib"]
    assert f"loads in {load:.2f} GiB and trains in {train:.2f}" in text
    newest = results("h100-w1-newest.json")
    stock, ours = sorted(newest["rows"], key=lambda row: row["stack"] != "trl")
    versions = newest["versions"]
    assert f"transformers {versions['transformers']} and TRL {versions['trl']}" in text
    assert (
        f"loads in {ours['load_peak_gib']:.2f} and trains in {ours['peak_reserved_gib']:.2f} GiB, "
        f"stock in {stock['load_peak_gib']:.2f} and {stock['peak_reserved_gib']:.2f}" in text
    )


def test_the_learning_curve_is_the_file():
    run = results("cpu-learning-curve.json")
    held = run["summary"]["held_out"]
    assert held["within"] and run["summary"]["training"]["within"]
    text = " ".join(README.split())
    millions = run["rows"][0]["parameters"] / 1e6
    steps = run["size"]["steps"]
    assert f"A Gemma 4 of {millions:.1f} million parameters" in text
    assert (
        f"over {steps} steps held-out loss falls from {held['first']:.2f} to {held['last']:.2f}, "
        f"and the means part by {held['largest_gap_of_means']:.3f} at most, where stock's own "
        f"seeds spread by {held['stock_spread']:.3f}" in text
    )


def test_the_counts_are_the_tests():
    from tests.trust.test_bad_input import EXAMPLES
    from tests.trust.test_options import COMBINATIONS
    from tests.trust.test_planted_faults import FAULTS

    assert f"**{len(COMBINATIONS)} combinations**" in README
    assert f"**{FAULTS} faults**" in README
    assert f"**{EXAMPLES:,} bad inputs**" in README


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#]+)\)", README))
def test_what_is_linked_is_there(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(
    "hook", ["gemma_accel_patches", "gemma_accel_select", "gemma_accel_applied"]
)
def test_every_hook_has_a_heading(hook):
    assert f"### `{hook}`" in README
