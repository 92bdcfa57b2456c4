"""What goes wrong in a run: each time a clear error or a named fallback, the model and the last
saved checkpoint intact, and training that can go on.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import pkgutil
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.modeling_utils import safe_save_file
from trl import SFTConfig, SFTTrainer

import gemma_accel
from gemma_accel import failures, hostmemory, kernels, patching, wiring
from gemma_accel.errors import KernelError
from gemma_accel.hostmemory import FileSlice, HostTable, StaleFileError
from gemma_accel.kernels import geglu as geglu_module
from gemma_accel.kernels import norm_add as norm_add_module
from gemma_accel.kernels._triton import tl, triton
from gemma_accel.loading import find_tensors, install_load_path
from gemma_accel.patches.per_layer import HostPerLayerEmbedding, settle_table
from gemma_accel.report import Report
from tests import trl_on_cpu
from tests.test_callback import SMALL
from tests.test_wiring import auto, tokenizer  # noqa: F401 - fixtures
from tests.tiny import LANGUAGE, batch, tiny_model

pytestmark = pytest.mark.usefixtures("references", "trl_on_the_cpu")

ROOT = Path(__file__).parent.parent.parent
STEPS = 6


def small_model(kind="causal"):
    return tiny_model(kind, **SMALL)


def lora(model):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE, init_lora_weights=False))


def rows(n=12):
    ids = [batch((7 + i % 5,), seed=i)["input_ids"][0].tolist() for i in range(n)]
    return Dataset.from_list([{"input_ids": row} for row in ids])


def trainer_of(model, output, tokenizer, *, peft=True, callbacks=(), **options):  # noqa: F811
    options = {"save_strategy": "no", "max_steps": STEPS, **options}
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(output),
            use_cpu=True,
            bf16=False,
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
            max_length=16,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            **options,
        ),
        train_dataset=rows(),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        peft_config=LoraConfig(r=4, target_modules=LANGUAGE) if peft else None,
    )


def losses(trainer):
    return {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def digest(directory):
    """Name and content of every file below a directory."""
    files = sorted(file for file in Path(directory).rglob("*") if file.is_file())
    return {
        str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files
    }


@pytest.fixture
def checkpoint(tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def load_path():
    undo = install_load_path()
    yield
    undo()


# ---- an exception in the middle of a step


class Fault:
    """Raises once, when armed, from inside a layer's forward or backward."""

    def __init__(self, layer, where, error):
        self.where, self.error, self.armed = where, error, False
        layer.register_forward_hook(self.hook)

    def hook(self, module, args, out):
        if self.armed and self.where == "forward":
            self.fire()
        if self.armed and self.where == "backward":
            out.register_hook(lambda _: self.fire())

    def fire(self):
        if self.armed:
            self.armed = False
            raise self.error


def run_steps(model, fault=None, at=2, device="cpu"):
    """Losses of `STEPS` optimizer steps; step ``at`` fails first and is then taken again."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for step in range(STEPS):
        inputs = {k: v.to(device) for k, v in batch((11, 8), seed=step).items()}
        if fault is not None and step == at:
            fault.armed = True
            with pytest.raises(type(fault.error)):
                model(**inputs).loss.backward()
            assert not fault.armed
            optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def applied_model(checkpointing, device="cpu", vram_gib=None):
    model = lora(small_model().to(device))
    gemma_accel.apply(model, vram_gib=vram_gib)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.get_base_model().model.memory.set_budget(1 << 16)  # nothing fits: all in parts
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), KeyboardInterrupt()])
def test_a_step_that_fails_can_be_taken_again(error, where, checkpointing):
    model = applied_model(checkpointing)
    expected = run_steps(model)
    weights = trained(model)
    model = applied_model(checkpointing)
    fault = Fault(model.get_base_model().model.layers[1], where, error)
    assert run_steps(model, fault) == expected
    assert all(torch.equal(p, weights[n]) for n, p in trained(model).items())


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_fails_on_a_gpu_can_be_taken_again(where):
    """Layers whose inputs are away in host memory: what waits there must not be mixed up."""

    expected = run_steps(applied_model(True, "cuda"), device="cuda")
    model = applied_model(True, "cuda")
    fault = Fault(model.get_base_model().model.layers[1], where, torch.OutOfMemoryError())
    assert run_steps(model, fault, device="cuda") == pytest.approx(expected, rel=1e-5)


def test_out_of_memory_in_a_trainer_that_halves_its_batches(tmp_path, tokenizer):  # noqa: F811
    """`auto_find_batch_size` starts training again inside `train`: what the callback wrapped is
    wrapped once, and the losses are stock's.
    """

    found = []
    for applied in (False, True):
        model = small_model()
        if applied:
            gemma_accel.apply(model)
        fault = Fault(
            model.model.layers[1], "backward", torch.OutOfMemoryError("CUDA out of memory.")
        )
        fault.armed = True
        trainer = trainer_of(model, tmp_path, tokenizer, auto_find_batch_size=True)
        trainer.train()
        assert not fault.armed and trainer._train_batch_size < 2
        found.append(losses(trainer))
    assert found[1].keys() == found[0].keys() and len(found[1]) == STEPS
    assert list(found[1].values()) == pytest.approx(list(found[0].values()), rel=1e-4)


def test_a_tower_that_does_not_fit_back_stays_where_it_was(monkeypatch, tmp_path, tokenizer):  # noqa: F811
    model = tiny_model("conditional")
    gemma_accel.apply(model)
    trainer_of(model, tmp_path, tokenizer)
    tower = model.model.vision_tower
    pixels = torch.rand(1, 36, 48)
    places = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="xy"), -1)
    to, moves = type(tower).to, []

    def no_room(self, device):
        moves.append(str(device))
        if len(moves) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return to(self, device)

    monkeypatch.setattr(type(tower), "to", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        tower(pixels, places.view(1, 36, 2))
    assert tower._gemma_accel_parked is not None and "_apply" in vars(tower)
    tower(pixels, places.view(1, 36, 2))  # and now there is room
    assert tower._gemma_accel_parked is None and "_apply" not in vars(tower)


# ---- a kernel that does not build or launch


def broken(*args, **kwargs):
    raise RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376")


interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are not interpreted beside a card"
)


class TestKernels:
    @interpreted
    def test_the_error_names_kernel_card_and_remedy_and_the_remedy_works(
        self,
        monkeypatch,
        tmp_path,
        tokenizer,  # noqa: F811
    ):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(norm_add_module, "norm_add_fwd", broken)
        model = small_model()
        gemma_accel.apply(model)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        with pytest.raises(KernelError) as caught:
            trainer_of(model, tmp_path, tokenizer, peft=False, max_steps=1).train()
        text = str(caught.value)
        assert "'forward' of gemma_accel.kernels.norm_add failed on" in text
        assert "this machine's CPU" in text
        assert "RuntimeError: out of resource: shared memory" in text
        assert "Leave the patch 'decoder_layer' out" in text
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())

        patching.report_of(model).restore()
        names = text.split("patches=[")[1].split("]")[0].replace("'", "").split(", ")
        assert "decoder_layer" not in names and "rms_norm" in names
        gemma_accel.apply(model, patches=names)
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        trainer_of(model, tmp_path, tokenizer, peft=False, max_steps=1).train()

    @interpreted
    def test_a_backward_kernel_is_named_too(self, monkeypatch, tmp_path, tokenizer):  # noqa: F811
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(norm_add_module, "norm_add_bwd", broken)
        model = small_model()
        gemma_accel.apply(model)
        with pytest.raises(KernelError, match="'backward' of gemma_accel.kernels.norm_add"):
            trainer_of(model, tmp_path, tokenizer, peft=False, max_steps=1).train()

    @interpreted
    def test_one_that_only_an_evaluation_needs(self, monkeypatch, tmp_path, tokenizer):  # noqa: F811
        class Breaks(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                monkeypatch.setattr(norm_add_module, "norm_add_ref", broken)
                trainer.evaluate(rows(2))

        model = small_model()
        gemma_accel.apply(model)
        trainer = trainer_of(model, tmp_path, tokenizer, callbacks=[Breaks()], max_steps=1)
        with pytest.raises(KernelError, match="Leave the patch 'decoder_layer' out"):
            trainer.train()

    def test_other_errors_keep_their_type_and_text(self):
        def explain(error, function):
            try:
                function()
            except type(error) as caught:
                return failures.kernel_failure(caught, None)
            raise AssertionError("nothing was raised")

        wrong = torch.ones(2, 4), torch.ones(2, 3)
        assert explain(ValueError(), lambda: geglu_module.geglu(*wrong)) is None  # our own guard
        assert explain(RuntimeError(), lambda: geglu_module.geglu_ref(*wrong)) is None  # torch's
        assert explain(RuntimeError(), broken) is None  # no kernel of ours

    def test_every_kernel_module_leads_to_a_patch_that_there_is(self):
        modules = {m.name for m in pkgutil.iter_modules(kernels.__path__)} - {"_triton"}
        assert modules == failures._PATCHES_OF.keys()
        names = [patch.name for patch in patching.registry().patches()]
        for uses in failures._PATCHES_OF.values():
            assert all(any(name.startswith(use) for name in names) for use in uses), uses

    @pytest.mark.gpu
    @pytest.mark.parametrize("way", ["fwd", "bwd"])
    def test_a_kernel_that_the_compiler_refuses(self, monkeypatch, way):
        class Refused:
            def __getitem__(self, grid):
                return lambda *args, **kwargs: _refused_kernel[(1,)](args[0])

        model = small_model().cuda()
        report = gemma_accel.apply(model)
        inputs = {k: v.cuda() for k, v in batch().items()}
        model(**inputs).loss.backward()
        monkeypatch.setattr(norm_add_module, f"_norm_add_{way}_kernel", Refused())
        with pytest.raises(Exception) as caught:  # noqa: B017 - whatever Triton raises
            model(**inputs).loss.backward()
        text = failures.kernel_failure(caught.value, report)
        assert f"'norm_add_{way}' of gemma_accel.kernels.norm_add failed on" in text
        assert "sm_" in text and "Leave the patch 'decoder_layer' out" in text


@triton.jit
def _refused_kernel(x_ptr):
    tl.static_assert(False, "refused")


# ---- the checkpoint file that the table is read from


@pytest.fixture
def half(tmp_path):
    """A checkpoint that is converted as it loads: of all weights only the table stays in the file.

    On a GPU it always is the only one; on a CPU, stock Transformers leaves all of them there, and
    the process would not survive a file cut short whatever we do.
    """
    tiny_model(dtype=torch.bfloat16, **SMALL).save_pretrained(tmp_path / "half")
    return tmp_path / "half"


def frozen_table(checkpoint):
    """An applied float32 model whose table is in the file, with adapters beside it."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model = lora(model.train())
    gemma_accel.apply(model)
    table = model.get_base_model().get_per_layer_input_embeddings()
    assert type(table) is HostPerLayerEmbedding and isinstance(table.host.source, FileSlice)
    return model


def delete(file):
    file.unlink()


def replace(file):
    file.with_suffix(".new").write_bytes(bytes(file.stat().st_size))
    os.replace(file.with_suffix(".new"), file)


def truncate(file):
    os.truncate(file, 100)


def overwrite(file):
    with open(file, "r+b") as stream:
        stream.seek(-1000, os.SEEK_END)
        stream.write(bytes(1000))
    os.utime(file, ns=(1, 1))  # on file systems whose clock is coarse


class During:
    """Does something to the checkpoint once, before a forward."""

    def __init__(self, model, act, at):
        self.act, self.left = act, at
        model.register_forward_pre_hook(self.hook)

    def hook(self, *_):
        if self.left == 0:
            self.act()
        self.left -= 1


@pytest.mark.usefixtures("load_path")
class TestFile:
    @pytest.mark.parametrize("how", [delete, replace])
    def test_gone_or_replaced_the_open_file_serves_on(self, half, tmp_path, how):
        expected = run_steps(frozen_table(half))
        model = frozen_table(half)
        During(model, lambda: how(half / "model.safetensors"), at=2)
        assert run_steps(model) == expected
        with pytest.warns(UserWarning, match="goes on with the file that it opened"):
            model.save_pretrained(tmp_path / "adapters")
        assert (tmp_path / "adapters" / "adapter_model.safetensors").exists()
        with pytest.raises(StaleFileError, match="in use by a running model"):
            model.get_base_model().save_pretrained(tmp_path / "whole")

    @pytest.mark.parametrize(("how", "what"), [(truncate, "cut short"), (overwrite, "written to")])
    def test_cut_short_or_written_to_the_run_stops(self, half, tmp_path, how, what):
        """Never a signal, never on with other numbers, never into a checkpoint."""
        model = frozen_table(half)
        model.save_pretrained(tmp_path / "last")
        saved = digest(tmp_path / "last")
        During(model, lambda: how(half / "model.safetensors"), at=2)
        with pytest.raises(StaleFileError, match=f"{what}.*resume from the last checkpoint"):
            run_steps(model)
        for save in (model.save_pretrained, model.get_base_model().save_pretrained):
            with pytest.raises(StaleFileError, match=what):
                save(tmp_path / "last")
        assert {k: v for k, v in digest(tmp_path / "last").items() if k in saved} == saved

    @pytest.mark.parametrize("how", [delete, replace, truncate, overwrite])
    def test_a_table_in_memory_is_unaffected(self, half, tmp_path, how):
        state = AutoModelForCausalLM.from_pretrained(half).state_dict()
        torch.save(state, half / "pytorch_model.bin")
        (half / "model.safetensors").unlink()

        def load():
            model = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32)
            model = lora(model.train())
            gemma_accel.apply(model)
            table = model.get_base_model().get_per_layer_input_embeddings()
            assert isinstance(table.host.source, torch.Tensor)
            return model

        expected = run_steps(load())
        model = load()
        During(model, lambda: how(half / "pytorch_model.bin"), at=2)
        assert run_steps(model) == expected
        model.save_pretrained(tmp_path / "adapters")

    def test_changed_between_finding_and_binding(self, half):
        file = half / "model.safetensors"
        (source,) = find_tensors(file, suffix="embed_tokens_per_layer.weight")
        truncate(half / "model.safetensors")
        with pytest.raises(StaleFileError, match="changed on disk"):
            HostTable(source)

    @pytest.mark.parametrize("how", [delete, replace, truncate, overwrite])
    def test_checked_when_training_begins_or_goes_on(self, half, tmp_path, tokenizer, how):  # noqa: F811
        model = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32)
        gemma_accel.apply(model)
        trainer = trainer_of(
            model, tmp_path / "out", tokenizer, save_strategy="steps", save_steps=2, max_steps=2
        )
        trainer.train()
        how(half / "model.safetensors")
        trainer.args.max_steps = 4
        with pytest.raises(StaleFileError):
            trainer.train(resume_from_checkpoint=True)

    def test_a_trained_table_is_not_taken_from_a_file_that_was_cut_short(
        self,
        half,
        tmp_path,
        tokenizer,  # noqa: F811
    ):
        model = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32)
        gemma_accel.apply(model)
        truncate(half / "model.safetensors")
        with pytest.raises(StaleFileError, match="cut short"):
            trainer_of(model, tmp_path / "out", tokenizer, peft=False)

    @pytest.mark.gpu
    @pytest.mark.parametrize("way", ["mapped", "pinned"])
    @pytest.mark.parametrize("how", [delete, replace, lambda file: os.truncate(file, 0)])
    def test_a_page_locked_table_is_unaffected(self, half, way, how, monkeypatch):
        if way == "pinned":
            monkeypatch.setattr(HostTable, "_map", lambda self: "not this time")
        file = half / "model.safetensors"
        (source,) = find_tensors(file, suffix="embed_tokens_per_layer.weight")
        table = HostTable(source)
        expected = table.tensor().clone()
        ids = torch.arange(source.rows, device="cuda")
        table.fetch(ids)
        if table.way != way:
            pytest.skip(table.why)
        how(file)
        rows = table.fetch(ids).columns(0, source.columns).cpu()
        assert torch.equal(rows, expected)
        table.close()


# ---- saving into the directory that the table is read from


def in_place(tensors, filename, metadata=None):
    """A writer that cuts the file it finds and fills it again, as older safetensors do."""
    if os.path.exists(filename):
        assert not Path(filename).samefile(in_place.in_use), "the file in use would be cut short"
    safe_save_file(tensors, str(filename) + ".tmp", metadata=metadata)
    Path(filename).write_bytes(Path(str(filename) + ".tmp").read_bytes())
    os.unlink(str(filename) + ".tmp")


@pytest.mark.usefixtures("load_path")
class TestSavingOverItself:
    def logits(self, model):
        with torch.no_grad():
            return model(**batch()).logits

    def test_again_and_again(self, checkpoint, monkeypatch):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        expected = self.logits(model)
        table = model.get_per_layer_input_embeddings()
        before = digest(checkpoint)
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", in_place)
        for _ in range(2):
            in_place.in_use = table.host.source.path
            inode = os.stat(in_place.in_use).st_ino
            model.save_pretrained(checkpoint)
            assert os.stat(table.host.source.path).st_ino != inode
            table.host.check()
            assert torch.equal(self.logits(model), expected)
            assert digest(checkpoint).keys() == before.keys()
        again = AutoModelForCausalLM.from_pretrained(checkpoint)
        assert torch.equal(self.logits(again), expected)

    def test_through_a_link_and_in_other_shards(self, checkpoint, tmp_path):
        """As in a cache of the hub: the name in the directory is a link to the file."""
        (checkpoint / "model.safetensors").rename(tmp_path / "blob")
        (checkpoint / "model.safetensors").symlink_to(tmp_path / "blob")
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        expected = self.logits(model)
        blob = (tmp_path / "blob").read_bytes()
        model.save_pretrained(checkpoint, max_shard_size="40KB")
        assert len(list(checkpoint.glob("model-*-of-*.safetensors"))) > 1
        assert not (checkpoint / "model.safetensors").exists()  # it would be loaded instead
        model.save_pretrained(checkpoint)
        assert [f.name for f in checkpoint.glob("*.safetensors*")] == ["model.safetensors"]
        assert (tmp_path / "blob").read_bytes() == blob
        for again in (model, AutoModelForCausalLM.from_pretrained(checkpoint)):
            assert torch.equal(self.logits(again), expected)

    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
    def test_a_save_that_fails_half_way_leaves_the_checkpoint_as_it_was(
        self, checkpoint, monkeypatch, error
    ):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        expected, before = self.logits(model), digest(checkpoint)

        def half(tensors, filename, metadata=None):
            Path(filename).write_bytes(b"half")
            raise error

        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", half)
        with pytest.raises(type(error)):
            model.save_pretrained(checkpoint)
        assert digest(checkpoint) == before and not list(checkpoint.glob(".saving-*"))
        assert torch.equal(self.logits(model), expected)

    def test_another_directory_is_none_of_its_business(self, checkpoint, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        source = model.get_per_layer_input_embeddings().host.source
        model.save_pretrained(tmp_path / "other")
        assert model.get_per_layer_input_embeddings().host.source is source
        assert digest(tmp_path / "other").keys() == digest(checkpoint).keys()


# ---- locked memory


class FakeDriver:
    """Registers what the process may lock, by the limit that the system set."""

    def cuDeviceGetAttribute(self, value, attribute, device):  # noqa: N802 - the driver's names
        ctypes.cast(value, ctypes.POINTER(ctypes.c_int))[0] = 1
        return 0

    def cuMemHostRegister_v2(self, address, length, flags):  # noqa: N802
        return 2 if length.value > resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] else 0

    def cuMemHostGetDevicePointer_v2(self, pointer, address, flags):  # noqa: N802
        ctypes.cast(pointer, ctypes.POINTER(ctypes.c_uint64))[0] = address.value
        return 0

    def cuMemHostUnregister(self, address):  # noqa: N802
        return 0

    def cuGetErrorName(self, code, name):  # noqa: N802
        ctypes.cast(name, ctypes.POINTER(ctypes.c_char_p))[0] = b"CUDA_ERROR_OUT_OF_MEMORY"


@pytest.fixture
def fake_cuda(monkeypatch):
    """As much of a card as it takes to lock memory, and the limit on locked memory to play with."""
    monkeypatch.setattr(hostmemory, "_driver", FakeDriver)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(synchronize=int))
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_MEMLOCK, before)


@pytest.mark.usefixtures("load_path")
class TestLockedMemory:
    def settled(self, checkpoint):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        table = model.get_per_layer_input_embeddings()
        table.weight.requires_grad_(False)
        report = Report()
        report.note("per-layer table", settle_table(model.model, torch.device("cuda")))
        return table.host, str(report)

    def test_enough(self, checkpoint, fake_cuda):
        host, report = self.settled(checkpoint)
        assert host.way == "mapped" and "way 'mapped'" in report
        host.close()

    def test_too_little_is_named_in_the_report(self, checkpoint, fake_cuda):
        fake_cuda(4096)
        host, report = self.settled(checkpoint)
        assert host.way == "read"
        report = " ".join(report.split())
        assert "way 'read'" in report and "CUDA_ERROR_OUT_OF_MEMORY" in report
        assert "the limit on locked memory is 4 KiB, `ulimit -l` raises it" in report

    def test_memory_that_cannot_be_had_is_a_fallback_too(self, checkpoint, fake_cuda, monkeypatch):
        fake_cuda(4096)

        def refuse(*args):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

        monkeypatch.setattr(hostmemory, "host_empty", refuse)
        host, report = self.settled(checkpoint)
        assert host.way == "read" and "Cannot allocate memory" in " ".join(report.split())

    def test_offloading_to_pageable_memory_is_said_once(self, monkeypatch):
        monkeypatch.setattr(hostmemory, "_driver", lambda: "the driver refuses")
        monkeypatch.setattr(hostmemory, "_told_of_pageable", False)
        with pytest.warns(UserWarning, match="pageable memory.*the driver refuses") as caught:
            assert hostmemory.locked_empty(100).nbytes == 100
            hostmemory.locked_empty(100)
        assert len(caught) == 1

    @pytest.mark.gpu
    def test_on_a_gpu_under_a_real_limit(self, checkpoint):
        """Whether the driver counts against the limit is its own affair; rows come all the same."""
        before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, before[1]))
        try:
            host, _ = self.settled(checkpoint)
            ids = torch.arange(host.shape[0], device="cuda")
            rows = host.fetch(ids).columns(0, host.shape[1]).cpu()
        finally:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, before)
        assert torch.equal(rows, host.tensor())
        assert host.way in ("mapped", "pinned") or "ulimit -l" in host.why
        host.close()


# ---- resuming


@pytest.mark.parametrize("kind", ["adapters", "everything", "all but the table"])
def test_resuming_gives_the_losses_of_an_unbroken_run_bitwise(
    kind,
    checkpoint,
    tmp_path,
    tokenizer,  # noqa: F811
    auto,  # noqa: F811
):
    def trainer():
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        if kind == "all but the table":
            model.get_per_layer_input_embeddings().requires_grad_(False)
        return trainer_of(
            model,
            tmp_path / "out",
            tokenizer,
            peft=kind == "adapters",
            save_strategy="steps",
            save_steps=3,
        )

    unbroken = trainer()
    unbroken.train()
    assert patching.report_of(unbroken.model) is not None
    table = unbroken.accelerator.unwrap_model(unbroken.model).get_per_layer_input_embeddings()
    assert (type(table) is HostPerLayerEmbedding) == (kind != "everything")
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    expected, found = losses(unbroken), losses(resumed)
    assert found == expected and len(found) == STEPS
    weights = trained(unbroken.model)
    assert any("embed_tokens_per_layer" in n for n in weights) == (kind == "everything")
    for name, parameter in trained(resumed.model).items():
        assert torch.equal(parameter, weights[name]), name
    assert len({round(x, 6) for x in found.values()}) == STEPS  # it does train


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path, tokenizer, monkeypatch):  # noqa: F811
    def full(self, directory):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Report, "write", full)
    model = small_model()
    gemma_accel.apply(model)
    trainer = trainer_of(model, tmp_path, tokenizer, save_strategy="steps", save_steps=3)
    with pytest.warns(UserWarning, match="report could not be written.*No space left"):
        trainer.train()
    assert len(losses(trainer)) == STEPS


# ---- a process of its own: Ctrl-C, a full disk


class Waits(TrainerCallback):
    """Sleeps inside the forward of step 3 until somebody sends SIGINT."""

    def __init__(self, model):
        self.step, self.waited = 0, False
        model.model.layers[1].register_forward_hook(self.hook)

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step + 1

    def hook(self, *_):
        if self.step == 3 and not self.waited:
            self.waited = True
            print("waiting", flush=True)
            time.sleep(60)


class FillsTheDisk(TrainerCallback):
    """No file may grow beyond a kilobyte once step 3 is through."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))


def child(directory):
    """An unbroken run, one that is interrupted, one whose disk fills up; results as JSON."""
    from tests.test_wiring import tokenizer as fixture

    directory = Path(directory)
    words = fixture.__wrapped__() if hasattr(fixture, "__wrapped__") else None
    words = words or fixture._get_wrapped_function()()
    trl_on_cpu.install()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write fails instead
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    install_load_path()
    wiring.apply_automatically()

    def trainer(name, with_callback=None, **options):
        model = AutoModelForCausalLM.from_pretrained(directory / "model")
        callbacks = [] if with_callback is None else [with_callback(model)]
        return trainer_of(model, directory / name, words, callbacks=callbacks, **options)

    unbroken = trainer("unbroken")
    unbroken.train()
    results = {"unbroken": losses(unbroken)}

    interrupted = trainer("interrupted", Waits, save_strategy="steps", save_steps=1)
    try:
        interrupted.train()
    except KeyboardInterrupt:
        results["interrupted at"] = interrupted.state.global_step
    results["finite"] = all(bool(p.isfinite().all()) for p in interrupted.model.parameters())
    interrupted.train(resume_from_checkpoint=True)
    results["interrupted"] = losses(interrupted)

    full = trainer("full", lambda _: FillsTheDisk(), save_strategy="steps", save_steps=2)
    before = digest(directory / "model")
    try:
        full.train()
    except Exception as error:
        results["full disk"] = f"{type(error).__name__}: {error}"
    saved = digest(directory / "full" / "checkpoint-2")
    merged = full.model.merge_and_unload()
    try:
        merged.save_pretrained(directory / "model")
    except Exception as error:
        results["saving over itself"] = f"{type(error).__name__}: {error}"
    results["model intact"] = digest(directory / "model") == before
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    again = trainer("full")
    again.train(resume_from_checkpoint=str(directory / "full" / "checkpoint-2"))
    results["full"] = losses(again)
    results["checkpoint intact"] = digest(directory / "full" / "checkpoint-2") == saved
    (directory / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("child")
    small_model().save_pretrained(directory / "model")
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from tests.trust.test_faults import child; child({str(directory)!r})",
        ],
        cwd=directory,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TRITON_INTERPRET": "0",
            "PYTHONWARNINGS": "ignore",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = []
    for line in process.stdout:
        output.append(line)
        if line.strip() == "waiting":
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0, "".join(output)
    yield json.loads((directory / "results.json").read_text())
    shutil.rmtree(directory)


class TestProcess:
    def test_interrupted_by_a_signal_it_resumes_as_if_it_had_not_been(self, results):
        assert results["interrupted at"] == 2 and results["finite"]
        assert results["interrupted"] == results["unbroken"]
        assert len(results["unbroken"]) == STEPS
        assert all(math.isfinite(loss) for loss in results["unbroken"].values())

    def test_a_full_disk_is_an_error_and_the_last_checkpoint_resumes(self, results):
        assert "File too large" in results["full disk"] or "os error 27" in results["full disk"]
        assert results["checkpoint intact"]
        assert results["full"] == results["unbroken"]

    def test_a_full_disk_leaves_the_checkpoint_in_use_as_it_was(self, results):
        assert results["saving over itself"]
        assert results["model intact"]
