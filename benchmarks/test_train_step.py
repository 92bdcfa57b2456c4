"""Whole training steps, each stack in a process of its own, through `benchmarks.train_step` (W1 to
W5) and `benchmarks.bench_media` (W6), short.

    pytest benchmarks/test_train_step.py -k W1
    pytest benchmarks/test_train_step.py --save-results benchmarks/results

All stacks of a work take their steps in turn in one run, as far as the card can hold them side by
side. What pytest-benchmark shows are the steps' own times. Before any of them `gemma-accel verify`
compares loss and gradients, patched against stock, on this card; where they do not agree nothing is
timed.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.conftest import STEPS
from benchmarks.works import WORKS

STACKS = ("trl", "liger", "unsloth", "gemma_accel@7")
NEEDS = {"liger": "liger_kernel", "unsloth": "unsloth"}
MEDIA = {"W6 images": "images", "W6 photos": "photos", "W6 sound": "sound"}
LENGTH = {"W4": (4, 1)}
"""Steps, and how many of them warm up; the others have ten and five: the fourth captures graphs."""
SIDE_BY_SIDE_GIB = 40
"""What three or four loaded stacks take together."""
FIRST_LOSS = 5e-3
"""How far the first loss of two stacks may differ: same weights, same rows, adapters that add
nothing yet. Random weights make this a coarse test; `verify` is the fine one.
"""

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


class Clock:
    """Gives pytest-benchmark times that were measured elsewhere."""

    now = 0.0

    def __call__(self):
        return self.now


CLOCK = Clock()


def installed(stack):
    module = NEEDS.get(stack)
    return module is None or importlib.util.find_spec(module) is not None


@pytest.fixture(scope="session")
def verified():
    """What `gemma-accel verify` finds wrong on this card, or None."""
    command = [sys.executable, "-m", "gemma_accel", "verify"]
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stdout or done.stderr)[-2000:]


@pytest.fixture(scope="session")
def measured(verified, pytestconfig, tmp_path_factory):
    """A work's rows by stack, measured when first asked for."""
    works = pytestconfig.stash[STEPS]

    def rows(work):
        if verified is not None:
            pytest.fail(f"no step is timed, for verify is red:\n{verified}", pytrace=False)
        if work not in works:
            works[work] = run(work, tmp_path_factory.mktemp("steps") / "rows.json")
            judge(works[work])
        return {row["label"]: row for row in works[work]}

    return rows


def run(work, out):
    """The benchmark in a process of its own, so that this one holds no GPU memory."""
    directory = "/dev/shm" if Path("/dev/shm").is_dir() else str(out.parent)
    steps, warm_up = LENGTH.get(work, (10, 5))
    how = ["--steps", steps, "--warmup", warm_up, "--directory", directory]
    stacks = [stack for stack in STACKS if installed(stack)]
    if work in MEDIA:
        command = ["benchmarks.bench_media", out, "--works", MEDIA[work], "--stacks", *stacks]
    else:
        command = ["benchmarks.train_step", "--out", out, "--works", work, "--stacks", *stacks]
        if torch.cuda.get_device_properties(0).total_memory < SIDE_BY_SIDE_GIB * 2**30:
            how.append("--apart")
    command = [sys.executable, "-m", *map(str, [*command, *how])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    rows = json.loads(out.read_text())["rows"]
    return [{**row, "work": work} for row in rows]


def judge(rows):
    """Take the ratio from a stack whose first loss is not stock's, and say so in its row."""
    base = next((row for row in rows if row["stack"] == "trl" and "losses" in row), None)
    for row in rows:
        if base is None or "losses" not in row:
            continue
        mine, stock = row["losses"][0], base["losses"][0]
        if abs(mine - stock) > FIRST_LOSS * abs(stock):
            row.pop("speedup_over_trl", None)
            row["wrong"] = f"the first loss is {mine:.4f}, stock's {stock:.4f}"


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("work", [*(w for w in WORKS if w.startswith("W")), *MEDIA])
def test_step(work, stack, benchmark, measured):
    if not installed(stack):
        pytest.skip(f"{work}: {NEEDS[stack]} is not installed")
    row = measured(work)[stack]
    if "error" in row:
        what = "out of memory" if "OutOfMemory" in row["error"] else row["error"]
        (pytest.fail if stack.startswith("gemma_accel") else pytest.skip)(
            f"{work}, {stack}: {what}"
        )
    if "wrong" in row:
        pytest.fail(f"no speedup for a wrong result: {row['wrong']}", pytrace=False)
    timed = row["step_s_all"][LENGTH.get(work, (8, 3))[1] :]
    times = iter(timed)
    benchmark.group = work
    benchmark.extra_info.update(
        {k: v for k, v in row.items() if isinstance(v, (int, float, str)) or v is None}
    )

    def replay():
        CLOCK.now += next(times)

    benchmark.pedantic(replay, rounds=len(timed))
