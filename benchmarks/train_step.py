"""Whole training steps, each stack in a process of its own, on one card, step by step in turn.

    python -m benchmarks.train_step --works W1 W2 --stacks trl gemma_accel --out results.json

A parent starts one worker a stack. Every worker is the same stock TRL script; what differs is one
import (Unsloth, where it is installed, loads and adapts the model its own way). A worker waits for
its turn before each optimizer step, so that the stacks' steps alternate on the same card in the
same minute, and reports time, memory and, for one more step under the profiler, launches and
GPU-busy time. A card that cannot hold the stacks side by side takes them one after the other with
``--apart``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.works import ADAPTED, WORKS, nf4, random_rows, train_flops
from gemma_accel.telemetry import peak_tflops

# -- the worker: a stock TRL script
# -----------------------------------------------------------------------------------


def worker(spec: dict) -> None:
    import torch

    work, stack = WORKS[spec["work"]], spec["stack"]
    if spec["cap_gib"]:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(spec["cap_gib"] * 2**30 / total)
    torch.cuda.reset_peak_memory_stats()
    if stack == "gemma_accel":
        if spec["vram_gib"]:
            import functools

            from gemma_accel import patching

            patching.apply = functools.partial(patching.apply, vram_gib=spec["vram_gib"])
        import gemma_accel.auto  # noqa: F401 - the one line
    if stack == "unsloth":
        _prepare_unsloth(spec)
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    kwargs = {}
    if work.quantised:
        kwargs["quantization_config"] = nf4()
    if not spec.get("float32"):
        kwargs["dtype"] = torch.bfloat16
    start = time.time()
    path = spec["checkpoint"]
    rows = random_rows(work.batch_size * spec["steps"] * 2, work.sequence_length, seed=spec["seed"])
    arguments = SFTConfig(
        output_dir=spec["output_dir"],
        per_device_train_batch_size=work.batch_size,
        max_steps=spec["steps"],
        max_length=None,
        bf16=True,
        optim="adamw_8bit",
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=spec["seed"],
        disable_tqdm=True,
        dataloader_pin_memory=True,
        use_liger_kernel=stack == "liger",
    )
    adapters = LoraConfig(r=work.lora_rank, lora_alpha=work.lora_rank, target_modules=ADAPTED)
    if stack == "unsloth":
        model, adapters = _load_unsloth(path, work), None
    elif spec.get("float32"):
        model = path  # TRL's own way for a model given by name
        arguments.model_init_kwargs = kwargs
    else:
        model = AutoModelForCausalLM.from_pretrained(path, device_map={"": 0}, **kwargs)
    torch.cuda.synchronize()
    load = torch.cuda.max_memory_reserved()
    measure = _measure_class()(spec)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=adapters,
        callbacks=[measure],
    )
    if spec.get("float32"):
        load = torch.cuda.max_memory_reserved()
    built = time.time() - start
    # the peak must not be reset: it counts from the first allocation to the last, loading included
    with _profiled(spec):
        trainer.train()
    torch.cuda.synchronize()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    out = {
        "load_peak_gib": load / 2**30,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "seconds_to_first_step": built,
        "losses": losses,
        "host_gib": _host_gib(),
        **measure.results(),
    }
    if stack == "gemma_accel":
        from gemma_accel.patching import report_of

        out["report"] = report_of(trainer.model).to_dict()["notes"]
        from gemma_accel.models import base_model, text_model

        out["modes"] = text_model(base_model(trainer.model)).memory.summary()
        out["skipped"] = report_of(trainer.model).to_dict()["skipped"][:20]
    _say({"result": out})


def _prepare_unsloth(spec: dict) -> None:
    """Unsloth wants to be imported before what it patches. Its `torch.compile` had not got through
    the first step after five minutes on the machine that was tried: off, unless asked for.
    """
    os.environ.setdefault("UNSLOTH_COMPILE_DISABLE", "1")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(spec["output_dir"]) / "unsloth"))
    import unsloth  # noqa: F401


def _load_unsloth(path: str, work):
    """The model with its adapters, as Unsloth's documentation loads Gemma for text."""
    import torch
    from unsloth import FastModel

    model, _ = FastModel.from_pretrained(
        path,
        max_seq_length=work.sequence_length,
        dtype=torch.bfloat16,
        load_in_4bit=work.quantised,
        offload_embedding=True,
        use_gradient_checkpointing="unsloth",
    )
    return FastModel.get_peft_model(
        model,
        finetune_vision_layers=False,
        finetune_language_layers=True,
        finetune_attention_modules=True,
        finetune_mlp_modules=True,
        r=work.lora_rank,
        lora_alpha=work.lora_rank,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
    )


@contextlib.contextmanager
def _profiled(spec: dict):
    """With BENCH_PROFILE=1: where Python's time goes, into the worker's log."""
    if os.environ.get("BENCH_PROFILE") != "1":
        yield
        return
    import cProfile
    import pstats

    profile = cProfile.Profile()
    profile.enable()
    yield
    profile.disable()
    pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(60)


def _host_gib() -> dict:
    """Resident memory of this process: its own, pages of files (the kernel may take those back
    unless they are locked), shared ones (files on a tmpfs), and the peak of all.
    """
    wanted = {
        "RssAnon": "anonymous",
        "RssFile": "of_files",
        "RssShmem": "shared",
        "VmHWM": "resident_peak",
    }
    out = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in wanted:
            out[wanted[name]] = int(value.split()[0]) / 2**20
    return out


def _measure_class():
    import torch
    from transformers import TrainerCallback

    class Measure(TrainerCallback):
        """Takes turns, times steps, profiles the last one."""

        def __init__(self, spec):
            self.spec, self.times, self.profile, self.step = spec, [], None, 0
            self.profiler = None

        def on_step_begin(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            _say({"ready": self.step})
            sys.stdin.readline()
            self.step += 1
            if self.spec["profile"] and self.step == self.spec["steps"]:
                self.profiler = torch.profiler.profile(
                    activities=[torch.profiler.ProfilerActivity.CUDA]
                )
                self.profiler.__enter__()
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            elapsed = time.perf_counter() - self.start
            if self.profiler is not None:
                self.profiler.__exit__(None, None, None)
                self.profile = _device_events(self.profiler)
            else:
                self.times.append(elapsed)
            _say({"done": elapsed, "reserved": torch.cuda.max_memory_reserved() / 2**30})

        def results(self):
            timed = self.times[self.spec["warmup"] :]
            return {
                "step_s": statistics.median(timed),
                "step_s_all": self.times,
                **(self.profile or {}),
            }

    return Measure


def _device_events(profiler) -> dict:
    """Launches (kernels, copies, memsets) of the profiled step, and the time the device was busy,
    overlaps counted once.
    """
    from collections import defaultdict

    spans, names = [], defaultdict(lambda: [0, 0.0])
    for event in profiler.profiler.kineto_results.events():
        if event.device_type().name != "CUDA" or event.duration_ns() <= 0:
            continue
        if str(event.name()).startswith(("ProfilerStep", "Optimizer.")):
            continue
        begin = event.start_ns()
        spans.append((begin, begin + event.duration_ns()))
        entry = names[event.name()]
        entry[0] += 1
        entry[1] += event.duration_ns() / 1e6
    busy, end = 0, 0
    for begin, stop in sorted(spans):
        if stop > end:
            busy += stop - max(begin, end)
            end = stop
    top = sorted(names.items(), key=lambda kv: -kv[1][1])[:40]
    return {
        "launches": len(spans),
        "gpu_busy_ms": busy / 1e6,
        "top_kernels": [{"name": n[:110], "count": c, "ms": round(ms, 3)} for n, (c, ms) in top],
    }


def _say(message: dict) -> None:
    print("@" + json.dumps(message), flush=True)


# -- the parent: turns
# --------------------------------------------------------------------------------------------------


class Worker:
    """A stack's process; its lines that start with @ are for us, the rest goes to its log."""

    def __init__(self, spec: dict, log: Path) -> None:
        self.spec, self.result, self.error = spec, None, None
        self.log = log.open("w")
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train_step", "--worker", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )

    def read(self) -> dict | None:
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
            self.log.write(line)
        return None

    def until(self, key: str) -> bool:
        """Read on until a message with ``key`` or the end; True where it came."""
        while (message := self.read()) is not None:
            if "result" in message:
                self.result = message["result"]
            if key in message:
                return True
        code = self.process.wait()
        if code and self.result is None:
            self.log.flush()
            tail = Path(self.log.name).read_text().splitlines()[-12:]
            self.error = f"exit {code}: " + " | ".join(tail)[-1500:]
        return False

    def begin_step(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def finish_step(self) -> bool:
        return self.until("done") and self.until("ready")


def run_work(workers: list[Worker], *, together: bool = False) -> None:
    """Wait until every stack's worker is loaded, then give them steps in turn until all are
    through; ``together``, all at once, where no time is asked for.
    """
    for w in workers:
        w.alive = w.until("ready")
    while alive := [w for w in workers if w.alive]:
        for group in [alive] if together else [[w] for w in alive]:
            for w in group:
                w.begin_step()
            for w in group:
                w.alive = w.finish_step()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument(
        "--works",
        nargs="+",
        default=["W1"],
        help="W1, or W1=trl,gemma_accel@7 for stacks of its own",
    )
    parser.add_argument(
        "--stacks",
        nargs="+",
        default=["trl", "gemma_accel"],
        help="trl, liger, unsloth, gemma_accel; gemma_accel:3.0 sets vram_gib, @7 caps the "
        "allocator: gemma_accel:3.0@7",
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--float32", action="store_true", help="TRL's default for a model given by name"
    )
    parser.add_argument("--no-profile", dest="profile", action="store_false")
    parser.add_argument(
        "--together",
        action="store_true",
        help="all workers step at once: for losses and memory, times then mean nothing",
    )
    parser.add_argument(
        "--apart",
        action="store_true",
        help="one stack after the other, for a card that cannot hold them side by side",
    )
    parser.add_argument("--directory", default="/dev/shm")
    parser.add_argument("--out", default="results.json")
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
        return
    logs = Path(options.directory) / "logs"
    logs.mkdir(exist_ok=True)
    results = []
    # all workers of all works start and load side by side, and wait; the works' steps then run one
    # work after the other
    jobs = []
    for job in options.works:
        name, _, stacks = job.partition("=")
        path = _build_apart(WORKS[name].model, options.directory)
        workers = []
        for stack in stacks.split(",") if stacks else options.stacks:
            for seed in options.seeds:
                spec = _spec(options, name, stack, path, seed)
                number = sum(len(others) for _, others in jobs) + len(workers)
                workers.append(Worker(spec, logs / f"{number:02}-{name}-{spec['stack']}.log"))
                if options.apart:
                    run_work(workers[-1:])
        jobs.append((name, workers))
    for name, workers in jobs:
        if not options.apart:
            run_work(workers, together=options.together)
        rows = [_row(WORKS[name], w, timed=not options.together) for w in workers]
        where = _where()
        for row in rows:
            base = next(
                (
                    r
                    for r in rows
                    if r["stack"] == "trl" and r["seed"] == row["seed"] and "step_s" in r
                ),
                None,
            )
            if base and "step_s" in row:
                row["speedup_over_trl"] = base["step_s"] / row["step_s"]
            if where["peak_tflops"] and "step_s" in row:
                row["mfu"] = row["train_tflop"] / row["step_s"] / where["peak_tflops"]
        results += rows
        print(*table(rows), sep="\n", flush=True)
        Path(options.out).write_text(json.dumps({**where, "rows": results}, indent=1) + "\n")


def _build_apart(model: str, directory: str) -> str:
    """In a child process, so that the parent holds no GPU memory."""
    code = (
        f"from benchmarks.works import build_checkpoint; build_checkpoint({model!r}, {directory!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    return str(Path(directory) / f"gemma4-{model}-random")


def _spec(options, name: str, stack: str, path: str, seed: int) -> dict:
    label = stack
    stack, _, cap = stack.partition("@")
    stack, _, vram = stack.partition(":")
    return {
        "work": name,
        "stack": stack,
        "label": label,
        "vram_gib": float(vram) if vram else None,
        "cap_gib": float(cap) if cap else None,
        "checkpoint": path,
        "steps": options.steps,
        "warmup": options.warmup,
        "seed": seed,
        "float32": options.float32,
        "profile": options.profile,
        "output_dir": str(Path(options.directory) / "out"),
    }


def _row(work, worker_: Worker, *, timed: bool) -> dict:
    row = {
        k: worker_.spec[k]
        for k in ("work", "stack", "label", "vram_gib", "cap_gib", "seed", "float32")
    }
    row |= {
        "model": work.model,
        "batch_size": work.batch_size,
        "sequence_length": work.sequence_length,
    }
    if worker_.result is None:
        return {**row, "error": worker_.error or "no result"}
    row |= worker_.result
    if timed:
        row["tokens_per_second"] = work.tokens / row["step_s"]
    else:
        del row["step_s"], row["step_s_all"]
    row["train_tflop"] = train_flops(work) / 1e12
    return row


def _where() -> dict:
    import importlib.metadata as metadata

    names = [
        "torch",
        "triton",
        "transformers",
        "trl",
        "peft",
        "bitsandbytes",
        "accelerate",
        "liger-kernel",
        "unsloth",
    ]
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    commit = (
        os.environ.get("BENCH_COMMIT")
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
    )
    return {
        "card": card,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
        "weights": "random bf16 at the real shapes",
        "peak_tflops": peak_tflops(card),  # the vendor's, dense bfloat16
    }


def table(rows: list[dict]) -> Iterator[str]:
    """Lines of a table of rows, those of `benchmarks.bench_media` too."""
    yield (
        f"{'work':12}{'stack':20}{'load GiB':>9}{'train':>7}{'step ms':>9}{'tokens/s':>10}{'x':>7}"
        f"{'launches':>10}{'GPU ms':>8}{'MFU':>7}"
    )
    for row in rows:
        line = f"{row['work']:12}{row['label']:20}"
        if "error" in row:
            short = "out of memory" if "OutOfMemory" in row["error"] else row["error"][-200:]
            yield f"{line}  {short}"
            continue
        line += f"{row['load_peak_gib']:9.2f}{row['peak_reserved_gib']:7.2f}"
        if "step_s" in row:
            line += f"{row['step_s'] * 1e3:9.1f}"
            line += _cell(row, "tokens_per_second", "10.0f") + _cell(
                row, "speedup_over_trl", "7.2f"
            )
            line += _cell(row, "launches", "10d") + _cell(row, "gpu_busy_ms", "8.0f")
            line += _cell(row, "mfu", "7.1%")
            line += f"  {row['wrong']}" if "wrong" in row else ""
        elif row.get("losses"):
            line += f"  losses {row['losses'][0]:.4f} to {row['losses'][-1]:.4f}"
        yield line.rstrip()


def _cell(row: dict, name: str, form: str) -> str:
    width = int(re.match(r"\d+", form)[0])
    return f"{row[name]:{form}}" if name in row else " " * width


if __name__ == "__main__":
    main()
