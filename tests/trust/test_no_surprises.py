"""A run opens no connection, writes where it was told to, and does not grow."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import gemma_accel
from tests.test_callback import SMALL
from tests.tiny import LANGUAGE, batch, tiny_model

ROOT = Path(__file__).parent.parent.parent
STEPS, WARM = 500, 100

TINIEST = dict(
    hidden_size=16,
    intermediate_size=16,
    hidden_size_per_layer_input=8,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    global_head_dim=16,
    num_hidden_layers=2,
    num_kv_shared_layers=1,
    layer_types=["full_attention", "full_attention"],
)


# ---- in a process of its own, as a user's script


AUDIT = """
import os, sys

class Audit:
    'Everything that the process connects to or writes; made before anything else is imported.'

    def __init__(self):
        self.sockets, self.written = [], set()
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo"):
            self.sockets.append(f"{event} {args[1:]!r}")
        elif event == "open":
            path, mode, flags = args
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and isinstance(path, (str, bytes)):
                self.add(path)
        elif event in ("os.mkdir", "os.truncate", "os.utime"):
            self.add(args[0])
        elif event in ("os.rename", "os.link", "os.symlink"):
            self.add(args[1])

    def add(self, path):
        if isinstance(path, (str, bytes, os.PathLike)):
            self.written.add(os.path.realpath(os.fsdecode(path)))

audit = Audit()
"""


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def child(directory, audit):
    """`import gemma_accel.auto` and a stock script of `STEPS` steps; what was seen as JSON."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    import gemma_accel.auto  # noqa: F401
    from gemma_accel.patching import report_of
    from tests import trl_on_cpu
    from tests.test_wiring import tokenizer as fixture

    trl_on_cpu.install()

    measured = {}

    class Measure(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (WARM, STEPS):
                gc.collect()
                kinds = {}
                for thing in gc.get_objects():
                    kinds[type(thing).__name__] = kinds.get(type(thing).__name__, 0) + 1
                measured[state.global_step] = resident(), kinds

    words = fixture.__wrapped__() if hasattr(fixture, "__wrapped__") else None
    words = words or fixture._get_wrapped_function()()
    directory = Path(directory)
    ids = [batch((12,), seed=i)["input_ids"][0].tolist() for i in range(40)]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(directory / "model"),
        args=SFTConfig(
            output_dir=str(directory / "out"),
            use_cpu=True,
            bf16=False,
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            max_length=16,
            max_steps=STEPS,
            per_device_train_batch_size=1,
            save_steps=STEPS,
        ),
        train_dataset=Dataset.from_list([{"input_ids": row} for row in ids]),
        processing_class=words,
        peft_config=LoraConfig(r=2, target_modules=LANGUAGE),
        callbacks=[Measure()],
    )
    trainer.train()
    before, after = (measured[step][1] for step in (WARM, STEPS))
    grown = {k: n - before.get(k, 0) for k, n in after.items() if n > before.get(k, 0)}
    results = {
        "patches": len(report_of(trainer.model).applied),
        "sockets": audit.sockets,
        "written": sorted(audit.written),
        "resident": [measured[step][0] for step in (WARM, STEPS)],
        "objects": [sum(kinds.values()) for kinds in (before, after)],
        "grown": dict(sorted(grown.items(), key=lambda item: -item[1])[:8]),
    }
    (directory / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    directory = tmp_path_factory.mktemp("script")
    tiny_model("conditional", towers=False, **TINIEST).save_pretrained(directory / "model")
    environment = {
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_INTERPRET": "0",
        # TRL counts its users and PEFT asks the hub for a base model's config: neither is ours
        "HF_HUB_OFFLINE": "1",
        # caches of others, each of which is then to be seen apart
        "HOME": str(directory / "home"),
        "TMPDIR": str(directory / "tmp"),
        "HF_HOME": str(directory / "huggingface"),
        "TRITON_HOME": str(directory / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(directory / "inductor"),
    }
    for name in ("home", "tmp", "cwd"):
        (directory / name).mkdir()
    program = AUDIT + "from tests.trust.test_no_surprises import child\nchild(sys.argv[1], audit)\n"
    done = subprocess.run(
        [sys.executable, "-c", program, str(directory)],
        cwd=directory / "cwd",
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((directory / "results.json").read_text())
    assert results["patches"] > 5
    return directory, results


def test_it_opens_no_connection(seen):
    _, results = seen
    assert results["sockets"] == []


def test_it_writes_to_its_output_directory_and_to_caches_alone(seen):
    """The caches: Hugging Face's (datasets), Triton's, torch's, and temporary files."""
    directory, results = seen
    allowed = [directory / name for name in ("out", "tmp", "huggingface", "triton", "inductor")]
    allowed += [Path("/dev"), Path("/proc/self"), directory / "results.json"]
    strays = [
        path
        for path in results["written"]
        if not any(Path(path).is_relative_to(place.resolve()) for place in allowed)
    ]
    assert strays == []
    assert any(Path(path).is_relative_to(directory / "out") for path in results["written"])
    left = sorted(p.name for name in ("home", "cwd") for p in (directory / name).rglob("*"))
    assert left == []  # what native code wrote, which no hook sees
    assert sorted(p.name for p in (directory / "model").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_the_host_does_not_fill_up(seen):
    """From step 100 to step 500: no object a step, and less than two pages a step."""
    _, results = seen
    before, after = results["objects"]
    assert after - before < 100, results["grown"]
    before, after = results["resident"]
    assert after - before < (STEPS - WARM) * 8192, f"{(after - before) / 2**20:.1f} MiB"


def test_the_audit_sees_a_connection_and_a_write(tmp_path):
    """Without which the tests above would prove nothing."""
    program = f"""{AUDIT}
import pathlib, socket
try:
    socket.create_connection(("127.0.0.1", 9), timeout=0.1)
except OSError:
    pass
open({str(tmp_path / "a")!r}, "w").close()
os.close(os.open({str(tmp_path / "b")!r}, os.O_CREAT | os.O_RDWR))
open({str(tmp_path / "a")!r}).close()
open({str(tmp_path / "a")!r}, "rb").close()
pathlib.Path({str(tmp_path / "c")!r}).mkdir()
assert any("socket.connect" in s for s in audit.sockets), audit.sockets
names = {{os.path.basename(p) for p in audit.written}}
assert names == {{"a", "b", "c"}}, names
print("seen")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "seen", done.stderr


# ---- on a card


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [None, 1 << 16], ids=["graphs", "offloaded"])
def test_the_device_does_not_fill_up(budget):
    """Allocated and reserved memory, and Python's objects, from step 100 to step 500."""
    model = get_peft_model(
        tiny_model("causal", **SMALL).cuda(), LoraConfig(r=4, target_modules=LANGUAGE)
    )
    gemma_accel.apply(model)
    if budget is not None:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.get_base_model().model.memory.set_budget(budget)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batches = [{k: v.cuda() for k, v in batch((16, 16), seed=i).items()} for i in range(4)]
    seen = {}
    for step in range(1, STEPS + 1):
        model(**batches[step % 4]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (WARM, STEPS):
            gc.collect()
            torch.cuda.synchronize()
            seen[step] = (
                torch.cuda.memory_allocated(),
                torch.cuda.memory_reserved(),
                len(gc.get_objects()),
            )
    allocated, reserved, objects = (
        after - before for before, after in zip(seen[WARM], seen[STEPS], strict=True)
    )
    assert allocated <= 0 and reserved <= 0 and objects < 100
