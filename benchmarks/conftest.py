"""`pytest benchmarks/`: how a call is timed, the gate before it, and the table after all of them.

    pytest benchmarks/test_kernels.py benchmarks/test_attention.py --save-results benchmarks/results
    pytest benchmarks/test_train_step.py -k W1 --save-results benchmarks/results
    pytest benchmarks/ --benchmark-json all.json

Without a CUDA device a few small cases run on the CPU, on the PyTorch references, and the rest is
skipped by name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.harness import device_ms, table, where

HERE = Path(__file__).parent
ROWS = pytest.StashKey[dict]()
"""What the kernels' cases measured, by case."""
STEPS = pytest.StashKey[dict]()
"""The rows of `benchmarks.train_step` and `benchmarks.bench_media`, by work."""
ROUNDS, WARM_UP = 30, 5


def pytest_addoption(parser):
    parser.addoption(
        "--save-results",
        metavar="DIR",
        help="write what was measured to DIR, a JSON file for this card, with versions and commit",
    )


def pytest_configure(config):
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("these need pytest-benchmark: pip install -e '.[bench]'")
    config.stash[ROWS], config.stash[STEPS] = {}, {}


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords and item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason=f"{item.name}: needs a CUDA device"))


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(where())


@pytest.fixture(autouse=True)
def references(monkeypatch):
    """CPU tensors take the PyTorch references, as they do for a user without a GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


# ---- one call


@pytest.fixture(scope="session")
def gate(request):
    """What is wrong with a case, or None. Every case that is about to be timed goes through it
    before the first is.
    """
    from benchmarks.correctness import Case, fault

    verdicts = {}

    def verdict(case):
        if case.name not in verdicts:
            verdicts[case.name] = fault(case)
            free()
        return verdicts[case.name]

    for item in request.session.items:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        if isinstance(case, Case) and (case.device == "cpu" or torch.cuda.is_available()):
            verdict(case)
    return verdict


def free():
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def timed(benchmark, gate, request):
    """Times a stack's call of a case, if ours is right on it."""

    def time_it(case, stack):
        row = rows_of(request.config, case)
        if wrong := gate(case):
            row["error"] = wrong
            pytest.fail(f"no time for a wrong result: {wrong}", pytrace=False)
        if stack == "liger":
            pytest.importorskip("liger_kernel", reason=f"{case}: liger_kernel is not installed")
        run = case.calls()[stack]

        def target():
            run()
            if case.device == "cuda":
                torch.cuda.synchronize()

        benchmark.group = case.name
        benchmark.pedantic(target, rounds=ROUNDS, warmup_rounds=WARM_UP)
        benchmark.extra_info.update(op=case.op, shape=case.shape, stack=stack)
        if benchmark.stats is not None:  # it is None under --benchmark-disable
            row[f"{stack}_us"] = benchmark.stats.stats.median * 1e6
            if case.device == "cuda":
                row[f"{stack}_gpu_us"] = device_ms(run) * 1e3
                benchmark.extra_info.update(rates(case, row[f"{stack}_gpu_us"]))

    yield time_it
    free()


def rows_of(config, case):
    row = config.stash[ROWS].setdefault(case.name, {"op": case.op, "shape": case.shape})
    row["dtype"], row["device"] = str(case.dtype).removeprefix("torch."), case.device
    return row


def rates(case, us):
    info = {"gpu_us": us}
    if case.moved:
        info |= {"moved_bytes": case.moved, "gb_per_s": case.moved / us / 1e3}
    if case.flops:
        info |= {"flops": case.flops, "tflop_per_s": case.flops / us / 1e6}
    return info


# ---- the table and the file


def pytest_terminal_summary(terminalreporter, config):
    kernels, steps = finished(config), [r for rows in config.stash[STEPS].values() for r in rows]
    for title, rows, lines in (
        ("ours against stock, microseconds a call, forward and backward", kernels, kernel_table),
        ("training steps", steps, table),
    ):
        if rows:
            terminalreporter.section(title)
            for line in lines(rows):
                terminalreporter.write_line(line)
    if directory := config.getoption("--save-results"):
        for kind, rows in (("kernels", kernels), *config.stash[STEPS].items()):
            if rows:
                terminalreporter.write_line(f"written: {save(directory, kind, rows)}")


def finished(config):
    """The rows with both times, and those that the gate stopped."""
    rows = []
    for row in config.stash[ROWS].values():
        if "error" in row:
            rows.append({k: row[k] for k in ("op", "shape", "dtype", "device", "error")})
        elif "stock_us" in row and "ours_us" in row:
            row["speedup"] = row["stock_us"] / row["ours_us"]
            if "ours_gpu_us" in row:
                row["gpu_speedup"] = row["stock_gpu_us"] / row["ours_gpu_us"]
            rows.append(row)
    return rows


def kernel_table(rows):
    name = max(len(f"{row['op']} {row['shape']}") for row in rows) + 2
    on_gpu = any("ours_gpu_us" in row for row in rows)
    head = f"{'':{name}}{'stock':>10}{'ours':>10}{'x':>8}{'liger':>10}"
    if on_gpu:
        head += f"{'GPU: stock':>14}{'ours':>10}{'x':>8}{'liger':>10}"
    yield head
    for row in rows:
        line = f"{row['op'] + ' ' + row['shape']:{name}}"
        if "error" in row:
            yield f"{line}  not timed: {row['error']}"
            continue
        line += cells(row, "us", "speedup", 10)
        if "ours_gpu_us" in row:
            line += cells(row, "gpu_us", "gpu_speedup", 14)
        yield line


def cells(row, unit, ratio, first):
    liger = row.get(f"liger_{unit}")
    return f"{row[f'stock_{unit}']:{first}.1f}{row[f'ours_{unit}']:10.1f}{row[ratio]:8.2f}" + (
        f"{liger:10.1f}" if liger else " " * 10
    )


def save(directory, kind, rows):
    """Under the card's own name, so that cards do not overwrite each other: one file for the
    kernels, one for each work.
    """
    about = where()
    card = about["card"] if torch.cuda.is_available() else "cpu"
    name = f"{card} {kind}".lower().replace("nvidia", "").replace("geforce", "")
    path = Path(directory) / f"{re.sub(r'[^a-z0-9]+', '-', name).strip('-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    return path
