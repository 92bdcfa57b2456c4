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
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import (
    Worker,
    adapt_unsloth,
    begin,
    build_apart,
    host_gib,
    load_unsloth,
    measure_class,
    prepare_unsloth,
    reserved_gib,
    run_work,
    say,
    table,
    where,
)
from benchmarks.works import ADAPTED, WORKS, Work, nf4, random_rows, train_flops

MODULE = "benchmarks.train_step"

# -- the worker: a stock TRL script ---------------------------------------------------------------


def worker(spec: dict) -> None:
    import torch

    begin(spec)
    _import_stack(spec)  # before anything that it patches
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    work, path, start = WORKS[spec["work"]], spec["checkpoint"], time.time()
    rows = random_rows(work.batch_size * spec["steps"] * 2, work.sequence_length, seed=spec["seed"])
    arguments = _arguments(spec, work)
    model, adapters = _model(spec, work, arguments)
    load = reserved_gib()
    measure = measure_class()(spec)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=adapters,
        callbacks=[measure],
    )
    if isinstance(model, str):
        load = reserved_gib()
    built = time.time() - start
    # the peak must not be reset: it counts from the first allocation to the last, loading included
    with _profiled():
        trainer.train()
    out = {
        "load_peak_gib": load,
        "peak_reserved_gib": reserved_gib(),
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "seconds_to_first_step": built,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "host_gib": host_gib(),
        **measure.results(),
    }
    if spec["stack"] == "gemma_accel":
        out |= _our_report(trainer.model)
    say({"result": out})


def _import_stack(spec: dict) -> None:
    if spec["stack"] == "gemma_accel":
        if spec["vram_gib"]:
            import functools

            from gemma_accel import patching

            patching.apply = functools.partial(patching.apply, vram_gib=spec["vram_gib"])
        import gemma_accel.auto  # noqa: F401 - the one line
    if spec["stack"] == "unsloth":
        prepare_unsloth(spec)


def _arguments(spec: dict, work: Work):
    from trl import SFTConfig

    return SFTConfig(
        output_dir=spec["output_dir"],
        per_device_train_batch_size=work.batch_size,
        gradient_accumulation_steps=1,  # Unsloth's default is 2
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
        use_liger_kernel=spec["stack"] == "liger",
    )


def _model(spec: dict, work: Work, arguments):
    """A loaded model, or its path for TRL to load, and the adapters that it shall get."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    path = spec["checkpoint"]
    if spec["stack"] == "unsloth":
        model = load_unsloth(path, work.sequence_length, quantised=work.quantised)
        return adapt_unsloth(model, work.lora_rank), None
    adapters = LoraConfig(r=work.lora_rank, lora_alpha=work.lora_rank, target_modules=ADAPTED)
    kwargs = {"quantization_config": nf4()} if work.quantised else {}
    if spec["float32"]:  # TRL's own way for a model given by name
        arguments.model_init_kwargs = kwargs
        return path, adapters
    kwargs |= {"device_map": {"": 0}, "dtype": torch.bfloat16}
    return AutoModelForCausalLM.from_pretrained(path, **kwargs), adapters


def _our_report(model) -> dict:
    from gemma_accel.models import base_model, text_model
    from gemma_accel.patching import report_of

    report = report_of(model).to_dict()
    modes = text_model(base_model(model)).memory.summary()
    return {"report": report["notes"], "modes": modes, "skipped": report["skipped"][:20]}


@contextlib.contextmanager
def _profiled():
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


# -- the parent -----------------------------------------------------------------------------------


def main() -> None:
    options = _options()
    if options.worker:
        worker(json.loads(options.worker))
        return
    results: dict[int, list[dict]] = {}
    for place, workers in _through(options):
        there = where()
        rows = [_row(w, timed=not options.together) for w in workers]
        _compare(rows, there["peak_tflops"])
        results[place] = rows
        print(*table(rows), sep="\n", flush=True)
        document = {**there, "rows": list(itertools.chain(*results.values()))}
        Path(options.out).write_text(json.dumps(document, indent=1) + "\n")


def _options() -> argparse.Namespace:
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
    parser.add_argument("--warmup", type=int, default=5)
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
    return parser.parse_args()


def _through(options: argparse.Namespace) -> Iterator[tuple[int, list[Worker]]]:
    """Each entry of ``--works``, by its place there, with its workers that are through. All of all
    works load side by side, and then wait for their turn; ``--apart``, each is through before the
    next one starts, and a run that is cut short has what it did.
    """
    logs = Path(options.directory) / "logs"
    logs.mkdir(exist_ok=True)
    count = itertools.count()
    jobs: list[list[Worker]] = [[] for _ in options.works]
    for place, (job, workers) in enumerate(zip(options.works, jobs, strict=True)):
        name, _, own = job.partition("=")
        path = build_apart(WORKS[name].model, options.directory)
        stacks = own.split(",") if own else options.stacks
        for stack, seed in itertools.product(stacks, options.seeds):
            spec = _spec(options, name, stack, path, seed)
            log = logs / f"{next(count):02}-{name}-{spec['stack']}.log"
            workers.append(Worker(MODULE, spec, log))
            if options.apart:
                run_work(workers[-1:])
                yield place, workers
    if not options.apart:
        for place, workers in enumerate(jobs):
            run_work(workers, together=options.together)
            yield place, workers


def _compare(rows: list[dict], peak_tflops: float | None) -> None:
    """Put beside each row's time what it is of stock's with the same seed, and of the card's
    peak.
    """
    timed = [row for row in rows if "step_s" in row]
    stock = {row["seed"]: row["step_s"] for row in timed if row["stack"] == "trl"}
    for row in timed:
        if row["seed"] in stock:
            row["speedup_over_trl"] = stock[row["seed"]] / row["step_s"]
        if peak_tflops:
            row["mfu"] = row["train_tflop"] / row["step_s"] / peak_tflops


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


def _row(worker_: Worker, *, timed: bool) -> dict:
    work = WORKS[worker_.spec["work"]]
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


if __name__ == "__main__":
    main()
