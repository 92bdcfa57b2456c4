"""W6: a training step with images or sound, adapters in the language model and the tower.

    python -m benchmarks.bench_media OUT.json [--works images photos sound]

One row a step, E2B in NF4, rank 16. ``images``: two pictures of 280 soft tokens and 512 tokens of
text, no patch padded; ``photos``: two of 266 (three to four), padded as the processor pads them, so
that stock attention needs its mask; ``sound``: thirty seconds, 750 tokens, and 256 of text. Stacks
take their steps in turn, as in train_step, whose machinery this uses.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
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
from benchmarks.works import ADAPTED, PATCHES, POOLED, Media, nf4
from benchmarks.works import MEDIA_WORKS as WORKS

MODULE = "benchmarks.bench_media"
RANK = 16
CLIPPED = (
    r".*TOWER\.(encoder\.)?layers\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|"
    r"post|ffw_layer_\d|linear_(start|end))\.linear"
)


def collate(rows: list[dict], config, work: Media) -> dict:
    """One row as a processor would give it: text, then each medium between its two markers."""
    import torch

    generator = torch.Generator().manual_seed(rows[0]["seed"])
    ids = [torch.randint(10, 250_000, (work.text,), generator=generator)]
    batch = {}
    for width, height in work.grids:
        run = torch.full((width * height // POOLED,), config.image_token_id)
        ids += [torch.tensor([config.boi_token_id]), run, torch.tensor([config.eoi_token_id])]
    if work.grids:
        positions = torch.full((len(work.grids), PATCHES, 2), -1)
        for row, (width, height) in zip(positions, work.grids, strict=True):
            grid = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
            row[: width * height] = torch.stack(grid, -1).reshape(-1, 2)
        pixels = torch.rand(len(work.grids), PATCHES, 768, generator=generator)
        batch["pixel_values"] = pixels * (positions[..., :1] >= 0)
        batch["image_position_ids"] = positions
    if work.frames:
        run = torch.full((work.soft_tokens,), config.audio_token_id)
        ids += [torch.tensor([config.boa_token_id]), run, torch.tensor([config.eoa_token_index])]
        batch["input_features"] = torch.randn(1, work.frames, 128, generator=generator)
        batch["input_features_mask"] = torch.ones(1, work.frames, dtype=torch.bool)
    ids = torch.cat(ids)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, **batch}


def worker(spec: dict) -> None:
    begin(spec)
    if spec["stack"] == "gemma_accel":
        import gemma_accel.auto  # noqa: F401 - the one line
    if spec["stack"] == "unsloth":
        prepare_unsloth(spec)
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    work, path = WORKS[spec["work"]], spec["checkpoint"]
    model, adapters = _model_and_adapters(spec, work)
    load = reserved_gib()
    measure = measure_class()(spec)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=spec["output_dir"],
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,  # Unsloth's default is 2
            max_steps=spec["steps"],
            max_length=None,
            bf16=True,
            optim="adamw_8bit",
            learning_rate=1e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_liger_kernel=spec["stack"] == "liger",
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        data_collator=functools.partial(collate, config=model.config, work=work),
        train_dataset=Dataset.from_dict({"seed": list(range(spec["steps"]))}),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=adapters,
        callbacks=[measure],
    )
    trainer.train()
    out = {
        "load_peak_gib": load,
        "peak_reserved_gib": reserved_gib(),
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "tower_adapters": sum(work.tower in n and "lora_A" in n for n, _ in model.named_modules()),
        "host_gib": host_gib(),
        **measure.results(),
    }
    if spec["stack"] == "gemma_accel":
        from gemma_accel.patching import report_of

        report = report_of(trainer.model).to_dict()
        out["report"], out["skipped"] = report["notes"], report["skipped"][:20]
    say({"result": out})


def _model_and_adapters(spec: dict, work: Media):
    """The stack's own way; Unsloth's trainer takes adapters only in the model."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    path = spec["checkpoint"]
    if spec["stack"] == "unsloth":
        model = _clip(load_unsloth(path, work.text + work.soft_tokens))
        return adapt_unsloth(model, RANK, towers=True), None
    model = AutoModelForCausalLM.from_pretrained(
        path, device_map={"": 0}, dtype=torch.bfloat16, quantization_config=nf4()
    )
    targets = f"{ADAPTED}|{CLIPPED}".replace("TOWER", work.tower)
    return _clip(model), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)


def _clip(model):
    """With ranges that clip: a random checkpoint's are infinite, and cost nothing."""
    for module in model.modules():
        if type(module).__name__ == "Gemma4ClippableLinear":
            for end, value in (("min", -3.0), ("max", 3.0)):
                getattr(module, f"input_{end}").fill_(value)
                getattr(module, f"output_{end}").fill_(value)
    return model


def main(
    out_json: str,
    *,
    works: tuple[str, ...] = tuple(WORKS),
    stacks: tuple[str, ...] = ("trl", "gemma_accel", "gemma_accel@7"),
    steps: int = 10,
    warmup: int = 5,
    profile: bool = True,
    directory: str = "/dev/shm",
) -> list[dict]:
    """Run the works and write a row for each stack in each; stock first, for the ratios."""
    logs = Path(directory) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    path, rows = build_apart("e2b", directory), []
    for name in works:
        workers = []
        for stack in stacks:
            spec = {
                "work": name,
                "stack": stack.partition("@")[0],
                "label": stack,
                "cap_gib": float(stack.partition("@")[2] or 0) or None,
                "checkpoint": path,
                "steps": steps,
                "warmup": warmup,
                "profile": profile,
                "output_dir": str(Path(directory) / "out"),
            }
            workers.append(Worker(MODULE, spec, logs / f"media-{name}-{stack}.log"))
        run_work(workers)
        for one in workers:
            work = WORKS[name]
            row = {k: one.spec[k] for k in ("work", "stack", "label", "cap_gib")}
            row |= {"text_tokens": work.text, "soft_tokens": work.soft_tokens}
            row |= one.result if one.result is not None else {"error": one.error or "no result"}
            base = next((r for r in rows if r["work"] == name and r["stack"] == "trl"), None)
            if base and "step_s" in base and "step_s" in row and row["stack"] != "trl":
                row["speedup_over_trl"] = base["step_s"] / row["step_s"]
            rows.append(row)
        print(*table(r for r in rows if r["work"] == name), sep="\n", flush=True)
        Path(out_json).write_text(json.dumps({**where(), "rows": rows}, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(json.loads(sys.argv[2]))
        sys.exit()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out_json")
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=WORKS)
    parser.add_argument("--stacks", nargs="+", default=["trl", "gemma_accel", "gemma_accel@7"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--no-profile", dest="profile", action="store_false")
    parser.add_argument("--directory", default="/dev/shm")
    options = vars(parser.parse_args())
    main(options.pop("out_json"), **options)
