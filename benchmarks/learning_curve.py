"""A small Gemma 4 learns real text from nothing: stock TRL, and the same with one line more.

    python -m benchmarks.learning_curve --out results.json
    python -m benchmarks.learning_curve --check results.json

Every architectural branch of E2B is on: per-layer embeddings, layers that share keys and values, a
double-wide MLP in those, sliding and full attention with head sizes of their own. The text is
Python's own documentation, the tokenizer is trained on it on the spot, every weight is trained.
Each stack and seed is a process of its own and all run side by side. A seed fixes weights and the
order of the rows, so that two stacks of one seed see the same; different seeds show what chance
alone does. What has to hold: the largest gap between the stacks' means, at any step, is within
stock's own spread (`benchmarks.losses`), for the loss of each step and for that of held-out text.

The curves of one seed part in the third digit after some ten steps, as two of stock's attention
implementations do: what differs in the last bit, Adam makes a step of. ``--control`` runs stock
with eager attention too, and shows how far rounding alone goes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import say, where
from benchmarks.losses import compare
from benchmarks.works import CONFIGS

STACKS = ("trl", "gemma_accel")
CONTROL = "trl, eager attention"


@dataclass(frozen=True)
class Size:
    """A model, its text in rows, and how long it trains."""

    hidden_size: int = 256
    hidden_size_per_layer_input: int = 64
    intermediate_size: int = 512
    layers: int = 6
    shared: int = 2  # the last ones, which reuse keys and values, and have the double-wide MLP
    heads: int = 4
    head_dim: int = 64
    global_head_dim: int = 128
    sliding_window: int = 64
    vocabulary: int = 1024
    length: int = 256
    batch_size: int = 8
    steps: int = 300
    eval_steps: int = 25
    eval_rows: int = 64
    learning_rate: float = 2e-3


SIZES = {
    "small": Size(),
    "tiny": Size(  # for tests
        hidden_size=64,
        hidden_size_per_layer_input=16,
        intermediate_size=128,
        heads=2,
        head_dim=16,
        global_head_dim=32,
        sliding_window=16,
        vocabulary=300,
        length=48,
        batch_size=4,
        steps=4,
        eval_steps=2,
        eval_rows=4,
    ),
}


def config_of(size: Size, attention: str = "sdpa"):
    """E2B's own text config at this size; every third layer is a full one."""
    from transformers import Gemma4TextConfig

    e2b = json.loads((CONFIGS / "e2b.json").read_text())["text_config"]
    kinds = ["full_attention" if n % 3 == 2 else "sliding_attention" for n in range(size.layers)]
    changes = {
        "vocab_size": size.vocabulary,
        "vocab_size_per_layer_input": size.vocabulary,
        "hidden_size": size.hidden_size,
        "hidden_size_per_layer_input": size.hidden_size_per_layer_input,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.layers,
        "layer_types": kinds,
        "num_kv_shared_layers": size.shared,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads // 2,
        "head_dim": size.head_dim,
        "global_head_dim": size.global_head_dim,
        "sliding_window": size.sliding_window,
        "max_position_embeddings": size.length,
    }
    return Gemma4TextConfig(**e2b | changes, attn_implementation=attention)


def text() -> tuple[str, str]:
    """Python's documentation to train on, and the last tenth of it, held out.

    Topics quote each other at length: each paragraph is taken once, or what is held out would have
    been learnt elsewhere.
    """
    from pydoc_data.topics import topics

    every = (p.strip("\n") for topic in topics.values() for p in re.split(r"\n\s*\n", topic))
    paragraphs = list(dict.fromkeys(filter(None, every)))
    border = len(paragraphs) * 9 // 10
    return "\n\n".join(paragraphs[:border]), "\n\n".join(paragraphs[border:])


def prepare(directory: Path, size: Size) -> dict[str, Any]:
    """Write a tokenizer and the rows of token ids; returns what describes the text."""
    from transformers import AutoTokenizer

    from gemma_accel.demo import write_tokenizer

    write_tokenizer(directory, size.vocabulary)
    tokenizer, (train, held_out) = AutoTokenizer.from_pretrained(directory), text()
    rows, tokens = {}, {}
    for name, part in (("train", train), ("held_out", held_out)):
        ids = tokenizer(part, verbose=False)["input_ids"]
        tokens[name] = len(ids)
        whole = range(0, len(ids) - size.length + 1, size.length)
        rows[name] = [ids[start : start + size.length] for start in whole]
    every = max(1, len(rows["held_out"]) // size.eval_rows)  # from all over it
    rows["held_out"] = rows["held_out"][::every][: size.eval_rows]
    (directory / "rows.json").write_text(json.dumps(rows))
    whole_text = (train + held_out).encode()
    return {
        "source": "pydoc_data.topics, each paragraph once; the last tenth is held out",
        "bytes": len(whole_text),
        "sha256": hashlib.sha256(whole_text).hexdigest(),
        "tokens": tokens,
        "held_out_rows": len(rows["held_out"]),
    }


# -- the worker: a stock TRL script ---------------------------------------------------------------


def worker(spec: dict[str, Any]) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, Gemma4ForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    size, cuda, directory = Size(**spec["size"]), torch.cuda.is_available(), Path(spec["directory"])
    torch.manual_seed(spec["seed"])
    attention = "eager" if spec["stack"] == CONTROL else "sdpa"
    model = Gemma4ForCausalLM(config_of(size, attention)).to(getattr(torch, spec["dtype"]))
    if cuda:
        model = model.cuda()
    report = None
    if spec["stack"] == "gemma_accel":
        from gemma_accel import apply

        report = apply(model)  # the one line

    class Progress(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            say({"step": state.global_step})

    rows = json.loads((directory / "rows.json").read_text())
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=spec["output_dir"],
            per_device_train_batch_size=size.batch_size,
            per_device_eval_batch_size=size.batch_size,
            max_steps=size.steps,
            max_length=None,
            learning_rate=size.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=size.steps // 10,
            bf16=cuda,
            use_cpu=not cuda,
            dataloader_pin_memory=cuda,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=size.eval_steps,
            eval_on_start=True,
            save_strategy="no",
            report_to="none",
            seed=spec["seed"],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows["train"]}),
        eval_dataset=Dataset.from_dict({"input_ids": rows["held_out"]}),
        processing_class=AutoTokenizer.from_pretrained(directory),
        callbacks=[Progress()],
    )
    start = time.perf_counter()
    trainer.train()
    history = trainer.state.log_history
    out = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - start,
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "eval_steps": [entry["step"] for entry in history if "eval_loss" in entry],
        "eval_losses": [entry["eval_loss"] for entry in history if "eval_loss" in entry],
    }
    if report is not None:
        from gemma_accel.models import base_model, text_model

        written = report.to_dict()
        out["applied"] = sorted({record["patch"] for record in written["applied"]})
        out["skipped"] = [r for r in written["skipped"] if r["modality"] == "text"][:20]
        out["modes"] = text_model(base_model(trainer.model)).memory.summary()
    say({"result": out})


# -- the parent -----------------------------------------------------------------------------------


class Run:
    """One stack and seed in a process of its own, and the thread that reads what it says."""

    def __init__(self, spec: dict[str, Any], log: Path) -> None:
        self.spec, self.step, self.result, self.log = spec, 0, None, log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.learning_curve", "--worker", json.dumps(spec)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={
                    "OMP_NUM_THREADS": "2",
                    **os.environ,
                    "HF_HUB_OFFLINE": "1",
                    "TOKENIZERS_PARALLELISM": "false",
                },
            )
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.startswith("@"):
                message = json.loads(line[1:])
                self.step = message.get("step", self.step)
                self.result = message.get("result", self.result)
        self.process.wait()

    @property
    def error(self) -> str | None:
        if self.process.returncode == 0 and self.result is not None:
            return None
        tail = self.log.read_text().splitlines()[-12:]
        return f"exit {self.process.returncode}: " + " | ".join(tail)[-2000:]

    def row(self) -> dict[str, Any]:
        row = {"work": "curve", **{k: self.spec[k] for k in ("stack", "seed", "dtype")}}
        return row | (self.result if self.error is None else {"error": self.error})


def run_all(
    size: Size,
    stacks: tuple[str, ...],
    seeds: list[int],
    dtype: str,
    directory: Path,
    parallel: int,
) -> list[dict[str, Any]]:
    """A row for each stack and seed; ``parallel`` of them at once."""
    waiting = [
        {
            "stack": stack,
            "seed": seed,
            "dtype": dtype,
            "size": asdict(size),
            "directory": str(directory),
            "output_dir": str(directory / "output"),  # nothing is saved
        }
        for seed in seeds
        for stack in stacks
    ]
    runs: list[Run] = []
    total = len(waiting)
    with _progress() as progress:
        bar = progress.add_task(f"{total} runs", total=total * size.steps)
        while waiting or any(run.thread.is_alive() for run in runs):
            if waiting and sum(run.thread.is_alive() for run in runs) < parallel:
                spec = waiting.pop(0)
                runs.append(Run(spec, directory / f"{len(runs)}.log"))
                continue
            progress.update(bar, completed=sum(run.step for run in runs))
            time.sleep(0.2)
        progress.update(bar, completed=sum(run.step for run in runs))
    return [run.row() for run in runs]


def _progress():
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
    )


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest gap of the means beside stock's own spread, for training and held-out loss.

    Raises:
        ValueError: a run failed, or there are too few to compare.
    """
    if failed := [row for row in rows if "error" in row]:
        raise ValueError("; ".join(f"{r['stack']}, seed {r['seed']}: {r['error']}" for r in failed))
    stock, ours = ([row for row in rows if row["stack"] == stack] for stack in STACKS)
    if len(stock) < 2 or len(ours) != len(stock):
        raise ValueError(
            f"two seeds of each stack at least, as many of both, got {len(stock)} of trl and "
            f"{len(ours)} of gemma_accel"
        )
    control = [row for row in rows if row["stack"] == CONTROL]
    found: dict[str, Any] = {}
    for name, key in (("training", "losses"), ("held_out", "eval_losses")):
        curves = [row[key] for row in stock]
        gap, spread = compare(curves, [row[key] for row in ours])
        first, last = ([row[key][end] for row in ours] for end in (0, -1))
        found[name] = {
            "largest_gap_of_means": gap,
            "stock_spread": spread,
            "within": gap <= spread,
            "first": sum(first) / len(first),
            "last": sum(last) / len(last),
        }
        if control:
            gap, _ = compare(curves, [row[key] for row in control])
            found[name]["largest_gap_of_eager_attention"] = gap
    return found


def _print(found: dict[str, Any]) -> bool:
    for name, one in found.items():
        verdict = "within it" if one["within"] else "BEYOND IT"
        print(
            f"{name.replace('_', '-')} loss {one['first']:.3f} to {one['last']:.3f}; largest gap "
            f"of the means {one['largest_gap_of_means']:.4f}, stock's own spread "
            f"{one['stock_spread']:.4f}: {verdict}"
        )
        if (gap := one.get("largest_gap_of_eager_attention")) is not None:
            print(f"    the same gap between stock and stock with eager attention: {gap:.4f}")
    return all(one["within"] for one in found.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="where the results go")
    parser.add_argument("--check", type=Path, metavar="RESULTS", help="judge these, train nothing")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, help="default: the size's own")
    parser.add_argument("--batch-size", type=int, help="default: the size's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--control", action="store_true", help="stock with eager attention too")
    parser.add_argument("--parallel", type=int, default=64, help="runs at once")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights; on a GPU the arithmetic is bfloat16 either way, as TRL has it",
    )
    options = parser.parse_args(arguments)
    if options.worker:
        worker(json.loads(options.worker))
        return 0
    if options.check:
        return 0 if _print(summary(json.loads(options.check.read_text())["rows"])) else 1
    if options.out is None:
        parser.error("--out or --check is needed")
    changes = {"steps": options.steps, "batch_size": options.batch_size}
    size = Size(**asdict(SIZES[options.size]) | {k: v for k, v in changes.items() if v})
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        about = prepare(Path(name), size)
        stacks = (*STACKS, CONTROL) if options.control else STACKS
        rows = run_all(size, stacks, options.seeds, options.dtype, Path(name), options.parallel)
    results = {
        **where(),
        "weights": "random at the start, every one trained",
        "text": about,
        "size": asdict(size),
        "config": config_of(size).to_dict(),
        "rows": rows,
    }
    results.pop("peak_tflops")
    try:
        results["summary"] = summary(rows)
    except ValueError as error:
        results["error"] = str(error)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{options.out}: {len(rows)} runs in {time.perf_counter() - start:.0f} s")
    if "error" in results:
        print(results["error"], file=sys.stderr)
        return 1
    return 0 if _print(results["summary"]) else 1


if __name__ == "__main__":
    sys.exit(main())
