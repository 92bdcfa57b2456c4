"""Whether two stacks' loss curves lie on each other, seed by seed of the data's order.

    python -m benchmarks.train_step --works W1 --stacks trl gemma_accel@7 --seeds 0 1 2 \
        --steps 20 --no-profile --together --out losses.json
    python -m benchmarks.losses losses.json

The largest gap at any step between the means over the seeds has to be within stock's own spread:
the largest distance of one of its seeds from its mean. Weights are random, so this shows little
more than that both train; gradients are compared in the tests.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def curves(rows: list[dict], stack: str) -> list[list[float]]:
    """The losses of every seed of ``stack``, step by step."""
    return [row["losses"] for row in rows if row["stack"] == stack and "losses" in row]


def compare(stock: list[list[float]], ours: list[list[float]]) -> tuple[float, float]:
    """The largest gap between the means, and stock's own spread."""
    steps = min(map(len, stock + ours))

    def mean(runs: list[list[float]], step: int) -> float:
        return sum(run[step] for run in runs) / len(runs)

    gap = max(abs(mean(stock, step) - mean(ours, step)) for step in range(steps))
    spread = max(abs(run[step] - mean(stock, step)) for run in stock for step in range(steps))
    return gap, spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    rows = json.loads(parser.parse_args().results.read_text())["rows"]
    stock, ours = curves(rows, "trl"), curves(rows, "gemma_accel")
    if len(stock) < 2 or not ours:
        raise SystemExit("two seeds of trl and one of gemma_accel are needed at least")
    gap, spread = compare(stock, ours)
    verdict = "within" if gap <= spread else "BEYOND"
    print(f"largest gap of the means {gap:.4f}, stock's own spread {spread:.4f}: {verdict} it")
    raise SystemExit(0 if gap <= spread else 1)


if __name__ == "__main__":
    main()
