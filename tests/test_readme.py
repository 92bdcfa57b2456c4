"""Every figure in the README is one of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.losses import compare, curves

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks/results"
FILES = [
    name for _, _, names, _ in tables.TABLE.findall(README) for name in names.split()
]  # that stand in a table


def results(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def test_the_tables_are_what_the_files_say():
    assert tables.render(README) == README
    assert {kind for _, kind, *_ in tables.TABLE.findall(README)} == set(tables.KINDS)


def test_a_table_is_written_from_its_files(tmp_path):
    ours = {
        "work": "W5",
        "model": "e2b",
        "batch_size": 1,
        "sequence_length": 2048,
        "stack": "gemma_accel",
        "vram_gib": None,
        "cap_gib": 7.0,
        "load_peak_gib": 5.229,
        "peak_reserved_gib": 6.976,
        "step_s": 0.25,
        "tokens_per_second": 8192.0,
        "train_tflop": 9.894,
        "launches": 4585,
        "gpu_busy_ms": 88.4,
    }
    stock = ours | {"stack": "trl", "cap_gib": None, "step_s": 0.5}
    failed = ours | {"stack": "liger", "error": "exit 1: torch.OutOfMemoryError"}
    run = {"card": "NVIDIA H100 80GB HBM3", "rows": [ours | {"vram_gib": 3.5}, failed, stock]}
    (tmp_path / "run.json").write_text(json.dumps(run))
    written = tables.render("a\n<!-- measured: run.json -->\nold\n<!-- /measured -->\nb", tmp_path)
    assert written.splitlines()[4:-2] == [
        "| E2B in bf16, 1 x 2,048 | gemma_accel, `vram_gib=3.5` | 5.23 | 6.98 | 0.250 | 8,192 "
        "| 4.0% | 4,585 | 88 | 2.00 |",
        "| E2B in bf16, 1 x 2,048 | TRL + Liger | out of memory |  |  |  |  |  |  |  |",
        "| E2B in bf16, 1 x 2,048 | TRL | 5.23 | 6.98 | 0.500 | 8,192 | 2.0% | 4,585 | 88 | 1.00 |",
    ]


def test_stock_that_ran_again_for_the_ratio_is_one_row_and_so_is_a_second_try(tmp_path):
    media = {"work": "sound", "load_peak_gib": 2.0, "peak_reserved_gib": 5.0, "cap_gib": None}
    for name, step, stack, others in (("one", 1.0, "unsloth", 0.8), ("two", 0.5, "liger", 0.25)):
        rows = [
            media | {"stack": "trl", "step_s": step},
            media | {"stack": stack, "step_s": others},
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps({"card": "any", "rows": rows}))
    failed = media | {"stack": "liger", "error": "exit 1"}
    (tmp_path / "zero.json").write_text(json.dumps({"card": "any", "rows": [failed]}))
    marked = "<!-- media: one.json zero.json two.json -->\n<!-- /media -->"
    written = tables.render(marked, tmp_path)
    shown = [[cell.strip() for cell in line.split("|")[2:]] for line in written.splitlines()[3:-1]]
    assert [(row[0], row[3], row[-2]) for row in shown] == [
        ("TRL", "1.000", "1.00"),
        ("Unsloth", "0.800", "1.25"),
        ("TRL + Liger", "0.250", "2.00"),
    ]


def test_the_versions_and_the_card_are_the_files():
    for name in FILES:
        run = results(name)
        assert run["card"] in README
        for package in ("transformers", "trl", "peft", "bitsandbytes", "torch", "triton"):
            assert run["versions"][package] in README


def test_losses_float32_and_newest_versions_are_the_files():
    text = " ".join(README.split())
    rows = results("h200-losses.json")["rows"]
    gap, spread = compare(curves(rows, "trl"), curves(rows, "gemma_accel"))
    assert f"is {gap:.4f}, within stock's own spread of {spread:.4f}" in text and gap <= spread
    stock, ours = results("h200-w1-float32.json")["rows"]
    assert (
        f"loads in {ours['load_peak_gib']:.2f} GiB and trains in {ours['peak_reserved_gib']:.2f}, "
        f"stock in {stock['load_peak_gib']:.2f} and {stock['peak_reserved_gib']:.2f} (" in text
    )
    newest = results("h200-w1-newest.json")
    stock, ours = newest["rows"]
    versions = newest["versions"]
    assert f"transformers {versions['transformers']} and TRL {versions['trl']}" in text
    assert (
        f"loads in {ours['load_peak_gib']:.2f} and trains in {ours['peak_reserved_gib']:.2f} GiB, "
        f"stock in {stock['load_peak_gib']:.2f} and {stock['peak_reserved_gib']:.2f}, "
        f"{stock['step_s'] / ours['step_s']:.2f} times as fast" in text
    )


def test_the_learning_curve_is_the_file():
    run, on_cpu = (results(f"{name}-learning-curve.json") for name in ("h200", "cpu"))
    held = run["summary"]["held_out"]
    for summary in (run["summary"], on_cpu["summary"]):
        assert summary["held_out"]["within"] and summary["training"]["within"]
    text = " ".join(README.split())
    millions = run["rows"][0]["parameters"] / 1e6
    steps = run["size"]["steps"]
    assert f"A Gemma 4 of {millions:.1f} million parameters" in text
    assert (
        f"over {steps} steps held-out loss falls from {held['first']:.2f} to {held['last']:.2f}, "
        f"and the means part by {held['largest_gap_of_means']:.3f} at most, where stock's own "
        f"seeds spread by {held['stock_spread']:.3f}" in text
    )


def test_the_host_memory_of_long_rows_is_the_files():
    text = " ".join(README.split())
    (_, long, _), (_, longest) = (
        results(f"{name}.json")["rows"] for name in ("h200-w4", "h100-long")
    )
    assert (long["sequence_length"], longest["sequence_length"]) == (65536, 131072)
    host, most = (
        row["host_gib"]["anonymous"] + row["host_gib"]["shared"] for row in (long, longest)
    )
    assert f"ours takes {host:.1f} GiB of host memory" in text
    assert f"131,072 tokens are all that the model was made for; they take {most:.1f} GiB" in text


def test_which_towers_have_adapters_is_the_files():
    for name in ("h200-images.json", "h200-sound.json"):
        for row in results(name)["rows"]:
            left_without = (row["work"], row["stack"]) == ("sound", "unsloth")
            assert (row["tower_adapters"] == 0) == left_without


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
