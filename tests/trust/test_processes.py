"""Several processes, and what an applied model does not mix with.

Two real processes, over gloo or on two GPUs, run a stock script with one line more; one stock
process sees the same tokens in one batch a step, which is what the gradient has to be.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from trl.kernels import chunked_logprob

import gemma_accel
from gemma_accel import guards
from gemma_accel.errors import UnsupportedTrainingError
from gemma_accel.guards import why_not_train
from gemma_accel.models import text_model
from tests.test_callback import collate
from tests.tiny import LANGUAGE, batch, tiny_model

pytestmark = pytest.mark.usefixtures("references")

ROOT = Path(__file__).parents[2]
SFT_ON_CPU = hasattr(chunked_logprob, "_use_triton")  # TRL 1.15 folds its loss on a card alone

SCRIPT = r"""
import os, re, sys
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer
from tests.leave import leave
from tests.test_callback import collate, tokenizer
from tests.tiny import LANGUAGE

out, size, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
generator = torch.Generator().manual_seed(5)
lengths = (5, 60, 9, 40, 7, 33, 21, 12, 3, 30)  # eight in the first step, two in the second
rows = [{"input_ids": torch.randint(3, 150, (n,), generator=generator)} for n in lengths]
rows = [{**r, "labels": r["input_ids"], "attention_mask": r["input_ids"] * 0 + 1} for r in rows]
data = Dataset.from_list([{k: v.tolist() for k, v in r.items()} for r in rows]).with_format("torch")


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        names = {n.removeprefix("module."): p for n, p in model.named_parameters()}
        self.steps.append({n: p.grad.clone() for n, p in names.items() if p.grad is not None})


def run(name, cls, lora):
    model = AutoModelForImageTextToText.from_pretrained("model")
    if lora:
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=LANGUAGE, init_lora_weights=False)
        model = get_peft_model(model, config)
    else:
        for part in ("vision_tower", "audio_tower", "embed_vision", "embed_audio"):
            getattr(model.model, part).requires_grad_(False)
    arguments = dict(
        output_dir="out", per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        num_train_epochs=1, optim="sgd", learning_rate=0.05, lr_scheduler_type="constant",
        max_grad_norm=1.0, report_to="none", use_cpu=os.environ["DEVICE"] == "cpu", bf16=False,
        save_strategy="no", logging_steps=1, gradient_checkpointing=lora, disable_tqdm=True,
        remove_unused_columns=False,
    )
    gradients = Gradients()
    if cls is SFTTrainer:
        args = SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, **arguments)
    else:
        args = TrainingArguments(**arguments)
    trainer = cls(
        model=model, args=args, train_dataset=data, data_collator=collate,
        processing_class=tokenizer(), callbacks=[gradients],
    )
    trainer.train()
    trained = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    base = model.get_base_model() if lora else model
    report = vars(base).get("_gemma_accel_report")
    return trainer, {
        "gradients": gradients.steps,
        "trained": trained,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "notes": report.notes if report else None,
        "table": table(base.get_per_layer_input_embeddings().weight),
    }


def table(weight):
    # where the table's pages are: read all of them, then find their mapping
    weight.detach().sum()
    inside = None
    for line in open("/proc/self/smaps"):
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ (\S+) (\d+)\s*(.*)", line):
            start, end = (int(x, 16) for x in match.groups()[:2])
            here = start <= weight.data_ptr() < end
            inside = {"file": match.group(5), "inode": int(match.group(4))} if here else None
        elif inside is not None:
            key, value = line.split(":")
            inside[key] = value.strip()
            if key == "Anonymous":
                return inside


results = {}
for name in os.environ["RUNS"].split(","):
    cls = SFTTrainer if "sft" in name else Trainer
    trainer, results[name] = run(name, cls, "lora" in name)
    processes = trainer.accelerator.num_processes
torch.save({"processes": processes, **results}, f"{out}.{os.environ.get('RANK', 0)}")
leave()
"""

EVERY_RUN = ["sft lora", "sft full", "trainer lora"]
RUNS = [run for run in EVERY_RUN if SFT_ON_CPU or "sft" not in run]


def launched(folder, script, *arguments, processes, **variables):
    """Run a script as `accelerate launch` does."""
    command = [sys.executable, "-W", "ignore"]
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
        command += ["--num_processes", str(processes), "--main_process_port", "0"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "0",
        "HF_HUB_OFFLINE": "1",
        "CI": "1",
        "HF_HOME": str(folder),  # a launcher's configuration there is not this test's
        **variables,
    }
    done = subprocess.run(
        [*command, script, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def train(folder, device):
    """Of one stock process, and of each of two applied ones: what they saved."""
    tiny_model("conditional").save_pretrained(folder / "model")
    (folder / "stock.py").write_text(SCRIPT)
    (folder / "ours.py").write_text("import gemma_accel.auto\n" + SCRIPT)
    variables = {"DEVICE": device, "RUNS": ",".join(RUNS if device == "cpu" else EVERY_RUN)}
    one = {"CUDA_VISIBLE_DEVICES": "0"} if device == "cuda" else {}
    launched(folder, "stock.py", "stock", 8, 1, processes=1, **variables, **one)
    launched(folder, "ours.py", "ours", 1, 4, processes=2, **variables)
    names = ("stock.0", "ours.0", "ours.1")
    stock, *ours = (torch.load(folder / name, map_location="cpu") for name in names)
    return stock, ours


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("processes"), "cpu")


def error(ours, stock):
    """Norm of the difference of all tensors over the norm of stock's."""
    assert ours.keys() == stock.keys() and stock
    difference = sum((ours[n].double() - stock[n].double()).norm() ** 2 for n in stock)
    return (difference / sum(stock[n].double().norm() ** 2 for n in stock)).sqrt().item()


def agree(stock, ours, run):
    assert stock["processes"] == 1 and len(stock[run]["gradients"]) == 2
    for rank in ours:
        assert rank["processes"] == 2 and len(rank[run]["gradients"]) == 2
        for step, gradients in enumerate(rank[run]["gradients"]):
            assert error(gradients, stock[run]["gradients"][step]) < (2e-4, 2e-3)[step]
        assert error(rank[run]["trained"], stock[run]["trained"]) < 2e-5
        assert rank[run]["losses"] == pytest.approx(stock[run]["losses"], rel=1e-5)


class TestTwoProcesses:
    @pytest.mark.parametrize("run", RUNS)
    def test_gradients_are_those_of_one_process_with_the_same_tokens(self, trained, run):
        """Both optimizer steps: four micro-batches a process, then a short window of one.

        Off by the last bits of float32, which the network grows and the first update grows again;
        micro-batches or processes weighed wrongly are off by more than a tenth.
        """
        agree(*trained, run)

    @pytest.mark.parametrize("run", RUNS)
    def test_both_processes_end_with_the_same_weights_to_the_bit(self, trained, run):
        first, second = (rank[run]["trained"] for rank in trained[1])
        assert all(torch.equal(first[n], second[n]) for n in first)

    @pytest.mark.parametrize("run", [run for run in RUNS if "lora" in run])
    def test_a_host_holds_one_copy_of_the_frozen_table(self, trained, run):
        """Every page of it is the checkpoint file's, none a process's own."""
        tables = [rank[run]["table"] for rank in trained[1]]
        assert tables[0]["inode"] == tables[1]["inode"] > 0
        for table in tables:
            assert table["file"].endswith("model.safetensors")
            assert int(table["Rss"].split()[0]) > 0  # they were read
            assert table["Anonymous"] == "0 kB"
        for rank in trained[1]:
            assert "the checkpoint file" in rank[run]["notes"]["per-layer table"]
            assert "DDP passes by" in rank[run]["notes"]["processes"]

    def test_stock_was_stock_and_ours_was_applied(self, trained):
        stock, ours = trained
        for run in RUNS:
            assert stock[run]["notes"] is None
            assert all("weighs the same" in r[run]["notes"]["gradient accumulation"] for r in ours)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_give_the_gradients_of_one_with_the_same_tokens(tmp_path):
    stock, ours = train(tmp_path, "cuda")
    for run in EVERY_RUN:
        agree(stock, ours, run)
        first, second = (rank[run]["trained"] for rank in ours)
        assert all(torch.equal(first[n], second[n]) for n in first)


# ---- sharding

SHARDED = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments
import gemma_accel
from gemma_accel.errors import UnsupportedTrainingError
from gemma_accel.models import text_model
from tests.leave import leave
from tests.tiny import batch, tiny_model

common = dict(output_dir="out", use_cpu=True, bf16=False, report_to="none")
arguments = TrainingArguments(**common)
rank = dist.get_rank()
truth = tiny_model("conditional", towers=False)
truth(**batch((23, 23))).loss.backward()

model = tiny_model("conditional", towers=False)
gemma_accel.apply(model)
mesh = init_device_mesh("cpu", (2,))
for layer in text_model(model).layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
model(**{k: v[rank : rank + 1] for k, v in batch((23, 23)).items()}).loss.backward()
off = scale = 0.0
for ours, stock in zip(model.parameters(), truth.parameters(), strict=True):
    off += (ours.grad.full_tensor().double() - stock.grad.double()).norm() ** 2
    scale += stock.grad.double().norm() ** 2
assert (off / scale).sqrt() < 1e-3, (off / scale).sqrt()
print("same gradients", flush=True)

model = tiny_model("conditional", towers=False)
gemma_accel.apply(model)
try:
    Trainer(model=model, args=TrainingArguments(fsdp=True, **common))
except UnsupportedTrainingError as error:
    assert "FSDP" in str(error) and "accelerate launch --multi_gpu" in str(error)
    print("refused", flush=True)
leave()
"""


def test_fsdp_is_refused_when_the_trainer_is_built_and_by_hand_is_not_wrong(tmp_path):
    """Trainer's FSDP wants a card; there it would move the table. PyTorch's `fully_shard` by hand,
    on a table that is a plain parameter, is not refused, and its gradients are stock's.
    """
    (tmp_path / "sharded.py").write_text(SHARDED)
    out = launched(tmp_path, "sharded.py", processes=2)
    assert out.count("same gradients") == 2 and out.count("refused") == 2


def trainer_like(kind=DistributedType.NO, state=None, **changes):
    parallel = changes.pop("parallel", None)
    args = SimpleNamespace(**{"deepspeed": None, "fsdp": None, "n_gpu": 0, **changes})
    accelerator = SimpleNamespace(
        distributed_type=kind,
        state=SimpleNamespace(**(state or {})),
        parallelism_config=parallel and SimpleNamespace(**parallel),
    )
    return SimpleNamespace(args=args, accelerator=accelerator)


REFUSED = {
    "deepspeed by launcher": (dict(kind=DistributedType.DEEPSPEED), "DeepSpeed"),
    "deepspeed by argument": (dict(deepspeed="zero3.json"), "DeepSpeed"),
    "deepspeed by plugin": (dict(state={"deepspeed_plugin": object()}), "DeepSpeed"),
    "fsdp by launcher": (dict(kind=DistributedType.FSDP), "FSDP"),
    "fsdp by argument": (dict(fsdp=True), "FSDP"),
    "fsdp by plugin": (dict(state={"fsdp_plugin": object()}), "FSDP"),
    "megatron": (dict(kind=DistributedType.MEGATRON_LM), "MEGATRON_LM"),
    "xla": (dict(kind=DistributedType.XLA), "XLA"),
    "tensor parallel": (dict(parallel={"tp_enabled": True}), "tensor parallelism"),
    "context parallel": (dict(parallel={"cp_enabled": True}), "context parallelism"),
    "sequence parallel": (dict(parallel={"sp_enabled": True}), "sequence parallelism"),
    "data parallel threads": (dict(n_gpu=2), "DataParallel.*CUDA_VISIBLE_DEVICES=0"),
}


class TestRefusals:
    @pytest.mark.parametrize("case", REFUSED)
    def test_each_is_refused_with_what_to_do_instead(self, case):
        changes, named = REFUSED[case]
        reason = why_not_train(trainer_like(**changes))
        with pytest.raises(UnsupportedTrainingError, match=named):
            guards.check_trainer(trainer_like(**changes), None)
        assert "one process a GPU" in reason and "report.restore()" in reason

    @pytest.mark.parametrize(
        "kind", [DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU]
    )
    def test_one_process_a_device_is_not(self, kind):
        assert why_not_train(trainer_like(kind, n_gpu=1)) is None
        parallel = {"tp_enabled": False, "cp_enabled": False, "sp_enabled": False}
        assert why_not_train(trainer_like(kind, parallel=parallel)) is None

    @pytest.mark.parametrize("applied", [False, True])
    def test_a_real_trainer_is_refused_only_on_an_applied_model(self, tmp_path, applied):
        model = tiny_model("causal")
        if applied:
            report = gemma_accel.apply(model)
        args = arguments(tmp_path)
        assert args.n_gpu < 2
        args._n_gpu = 2  # as where one process sees two GPUs
        if not applied:
            Trainer(model=model, args=args)
            return
        with pytest.raises(UnsupportedTrainingError, match="one process a GPU"):
            Trainer(model=model, args=args)
        report.restore()  # what the sentence offers
        Trainer(model=model, args=args)

    def test_apply_under_zero3_leaves_the_model_stock(self, monkeypatch):
        monkeypatch.setattr(guards, "is_deepspeed_zero3_enabled", lambda: True)
        model = tiny_model("causal")
        classes = [type(module) for module in model.modules()]
        with pytest.raises(UnsupportedTrainingError, match="DeepSpeed"):
            gemma_accel.apply(model)
        assert classes == [type(module) for module in model.modules()]


class TestWhatDdpPassesBy:
    def test_parked_towers_and_the_table_in_host_memory_and_nothing_that_is_trained(
        self, tmp_path, monkeypatch
    ):
        from transformers import AutoModelForImageTextToText

        from gemma_accel.loading import install_load_path

        tiny_model("conditional").save_pretrained(tmp_path / "model")
        undo = install_load_path()
        try:
            model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
        finally:
            undo()
        gemma_accel.apply(model)
        peft = get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE))
        args = arguments(tmp_path)
        monkeypatch.setattr(type(args), "world_size", 2)
        Trainer(model=peft, args=args, train_dataset=Rows())
        passed = set(peft._ddp_params_and_buffers_to_ignore)
        tensors = dict(peft.named_parameters()) | dict(peft.named_buffers())
        assert passed <= tensors.keys()  # as DDP will call them
        assert not any(tensors[name].requires_grad for name in passed)
        table = {name for name in passed if name.endswith("embed_tokens_per_layer.weight")}
        towers = {n for n in tensors if ".vision_tower." in n or ".audio_tower." in n}
        assert len(table) == 1 and towers and towers <= passed
        text = {n for n in passed if ".language_model." in n}
        assert text == table


class Rows(torch.utils.data.Dataset):
    """Of text alone."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {name: row[0] for name, row in batch((5 + 2 * index,), seed=index).items()}


# ---- torch.compile


def arguments(tmp_path, **changes):
    common = dict(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        max_steps=2,
        optim="sgd",
        learning_rate=0.05,
        per_device_train_batch_size=2,
        disable_tqdm=True,
    )
    return TrainingArguments(**{**common, **changes})


def gradients(called, model):
    model.zero_grad()
    out = called(**batch())
    out.loss.backward()
    return out.loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(kind):
    model = tiny_model(kind, towers=False)
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=LANGUAGE, init_lora_weights=False)
    return get_peft_model(model, config)


@pytest.mark.usefixtures("dynamo")
class TestCompile:
    @pytest.mark.parametrize(
        "kind, how", [("causal", "torch.compile"), ("conditional", "model.compile")]
    )
    def test_a_compiled_model_computes_the_same_and_kernels_stay_out(self, kind, how):
        model = adapted(kind)
        report = gemma_accel.apply(model)
        expected = gradients(model, model)
        traced = []

        def backend(graph, example):
            traced.extend(node.stack_trace or "" for node in graph.graph.nodes)
            return graph

        if how == "torch.compile":
            called = torch.compile(model, backend=backend)
        else:
            model.compile(backend=backend)
            called = model
        loss, grads = gradients(called, model)
        assert loss == pytest.approx(expected[0], rel=1e-6)
        assert error(grads, expected[1]) < 1e-6
        head = "_fused_forward" if SFT_ON_CPU else "ForCausalLMLoss"
        assert any(head in trace for trace in traced)  # it was compiled
        below = ("gemma_accel/kernels", "decoder_layer(", "self_attn(", "rotary_emb(", "_mask(")
        assert not any(part in trace for trace in traced for part in below)
        assert "steps around" in report.notes["torch.compile"]

    def test_a_trainer_that_compiles_trains_as_one_that_does_not(self, tmp_path):
        ends = []
        for compiled, applied in ((False, False), (True, True)):
            torch._dynamo.reset()
            model = adapted("conditional")
            if applied:
                gemma_accel.apply(model)
            options = dict(torch_compile_backend="eager") if compiled else {}
            trainer = Trainer(
                model=model,
                args=arguments(tmp_path, torch_compile=compiled, **options),
                train_dataset=Rows(),
                data_collator=collate,
            )
            trainer.train()
            ends.append({n: p for n, p in model.named_parameters() if p.requires_grad})
        assert error(ends[1], ends[0]) < 1e-5

    def test_a_model_that_was_compiled_before_its_trainer(self, tmp_path):
        """Accumulating over rows of several lengths."""
        ends = []
        for compiled in (False, True):
            model = adapted("conditional")
            gemma_accel.apply(model)
            trainer = Trainer(
                model=torch.compile(model, backend="eager") if compiled else model,
                args=arguments(
                    tmp_path,
                    per_device_train_batch_size=1,
                    gradient_accumulation_steps=2,
                    remove_unused_columns=False,  # it would read a compiled model's signature
                ),
                train_dataset=Rows(),
            )
            trainer.train()
            ends.append({n: p for n, p in model.named_parameters() if p.requires_grad})
        assert error(ends[1], ends[0]) < 1e-6

    def test_a_copy_calls_itself_and_restore_takes_it_off(self):
        model = tiny_model("causal")
        report = gemma_accel.apply(model)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            text_model(twin).norm.weight.zero_()
            out = text_model(twin)(batch()["input_ids"]).last_hidden_state
            assert out.abs().max() == 0
            assert text_model(model)(batch()["input_ids"]).last_hidden_state.abs().max() > 0
        assert text_model(model)._compiled_call_impl is not None
        report.restore()
        assert all(module._compiled_call_impl is None for module in model.modules())
