"""What benchmarks of whole steps share: a process for each stack, which take their steps in turn on
one card, what a step is measured by, and the record of where that was.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from gemma_accel.telemetry import peak_tflops

# -- in a stack's process -------------------------------------------------------------------------


def begin(spec: dict) -> None:
    """Cap the allocator, where the stack has a cap, and count memory from here."""
    import torch

    if spec["cap_gib"]:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(spec["cap_gib"] * 2**30 / total)
    torch.cuda.reset_peak_memory_stats()


def reserved_gib() -> float:
    """The most that the allocator has reserved so far, when the device is through."""
    import torch

    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved() / 2**30


def host_gib() -> dict:
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


def prepare_unsloth(spec: dict) -> None:
    """Unsloth wants to be imported before what it patches. Its `torch.compile` had not got through
    the first step after five minutes on the machine that was tried: off, unless asked for.
    """
    os.environ.setdefault("UNSLOTH_COMPILE_DISABLE", "1")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(spec["output_dir"]) / "unsloth"))
    import unsloth  # noqa: F401


def load_unsloth(path: str, length: int, *, quantised: bool = True):
    """The model, as Unsloth's documentation loads Gemma."""
    import torch
    from unsloth import FastModel

    model, _ = FastModel.from_pretrained(
        path,
        max_seq_length=length,
        dtype=torch.bfloat16,
        load_in_4bit=quantised,
        offload_embedding=True,
        use_gradient_checkpointing="unsloth",
    )
    return model


def adapt_unsloth(model, rank: int, *, towers: bool = False):
    """Adapters as Unsloth's documentation gives them to Gemma; its trainer takes no others."""
    from unsloth import FastModel

    return FastModel.get_peft_model(
        model,
        finetune_vision_layers=towers,
        finetune_language_layers=True,
        finetune_attention_modules=True,
        finetune_mlp_modules=True,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
    )


def measure_class():
    """The callback that measures; a function, so that the parent imports no torch for it."""
    import torch
    from transformers import TrainerCallback

    class Measure(TrainerCallback):
        """Takes turns, times steps, profiles the last one."""

        def __init__(self, spec):
            self.spec, self.times, self.profile, self.step = spec, [], None, 0
            self.profiler = None

        def on_step_begin(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            say({"ready": self.step})
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
                self.profile = device_events(self.profiler)
            else:
                self.times.append(elapsed)
            say({"done": elapsed, "reserved": torch.cuda.max_memory_reserved() / 2**30})

        def results(self):
            timed = self.times[self.spec["warmup"] :]
            return {
                "step_s": statistics.median(timed),
                "step_s_all": self.times,
                **(self.profile or {}),
            }

    return Measure


def device_events(profiler) -> dict:
    """Launches (kernels, copies, memsets) of the profiled step, and the time the device was busy,
    overlaps counted once.
    """
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


def say(message: dict) -> None:
    print("@" + json.dumps(message), flush=True)


def device_ms(call: Callable[[], object], calls: int = 5) -> float:
    """The device's time for a call, milliseconds: the median of ``calls``, each from a cold L2.

    The device is kept busy with nothing until the host has queued all of them, so that it waits
    for none of their launches (few calls: the queue holds about a thousand launches).
    """
    import torch

    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")  # no L2 is as large

    def queued() -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
        spans = []
        for _ in range(calls):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            spans.append((start, end))
        return spans

    call()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    queued()
    host = time.perf_counter() - begun
    torch.cuda.synchronize()
    torch.cuda._sleep(int(4e9 * host))  # cycles; cards clock at 1.5 to 3 GHz
    spans = queued()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in spans)


# -- the parent ---------------------------------------------------------------------------------


class Worker:
    """A stack's process, which runs ``module``'s worker; its lines that start with @ are for us,
    the rest goes to its log.
    """

    def __init__(self, module: str, spec: dict, log: Path) -> None:
        self.spec, self.result, self.error = spec, None, None
        self.log = log.open("w")
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--worker", json.dumps(spec)],
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
        self.log.close()
        if code and self.result is None:
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


def build_apart(model: str, directory: str) -> str:
    """In a child process, so that the parent holds no GPU memory."""
    code = (
        f"from benchmarks.works import build_checkpoint; build_checkpoint({model!r}, {directory!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    return str(Path(directory) / f"gemma4-{model}-random")


PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "liger-kernel",
    "unsloth",
)


def where() -> dict:
    """Card, versions, commit and command: what a results file begins with."""
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "card": card,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": dict(_versions()),
        "commit": os.environ.get("BENCH_COMMIT") or _commit(),
        "command": _command(),
        "weights": "random bf16 at the real shapes",
        "peak_tflops": peak_tflops(card),  # the vendor's, dense bfloat16
    }


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _command() -> str:
    """As typed, but for this machine's folders."""
    module = sys.modules["__main__"].__spec__
    program = ["python", "-m", module.name] if module else [Path(sys.argv[0]).name]
    arguments = [Path(a).name if os.path.isabs(a) else a for a in sys.argv[1:]]
    return shlex.join(program + arguments)


def table(rows: Iterable[dict]) -> Iterator[str]:
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
