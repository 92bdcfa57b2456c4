"""The load path: real safetensors files, real NF4, the table left where it is."""

from __future__ import annotations

import copy
import json
import pickle
import struct
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma4ForConditionalGeneration,
)
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel

import gemma_accel
from gemma_accel import hostmemory
from gemma_accel.errors import ForeignPatchError, RestoreError
from gemma_accel.hostmemory import FileSlice, HostTable, StaleFileError
from gemma_accel.loading import find_tensors, install_load_path
from gemma_accel.patches.per_layer import HostPerLayerEmbedding
from gemma_accel.patches.seams import Fused
from tests.tiny import LANGUAGE, batch, tiny_model

pytestmark = pytest.mark.usefixtures("references")

NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


TABLE = {
    "Gemma4ForCausalLM": "model.embed_tokens_per_layer.weight",
    "Gemma4ForConditionalGeneration": "model.language_model.embed_tokens_per_layer.weight",
}


@pytest.fixture
def load_path():
    undo = install_load_path()
    yield
    undo()


@pytest.fixture(params=["causal", "conditional"])
def checkpoint(request, tmp_path):
    tiny_model(request.param).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def table_of(model):
    return model.get_per_layer_input_embeddings()


def logits(model):
    with torch.no_grad():
        return model(**batch()).logits


def stock(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


class TestLoading:
    def test_the_table_stays_in_the_file_and_outputs_are_bitwise_stock(self, checkpoint, request):
        expected = logits(stock(checkpoint))
        request.getfixturevalue("load_path")
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        assert type(table_of(model)) is HostPerLayerEmbedding
        assert isinstance(table_of(model).host.source, FileSlice)
        assert torch.equal(logits(model), expected)

    def test_restore_makes_the_table_a_parameter_again(self, checkpoint, load_path):
        model = stock(checkpoint)
        expected = logits(model)
        report = gemma_accel.apply(model)
        report.restore()
        assert not [m for m in model.modules() if isinstance(m, Fused)]
        assert isinstance(table_of(model).weight, torch.nn.Parameter)
        (checkpoint / "model.safetensors").unlink()  # it is the model's own now
        assert torch.equal(logits(model), expected)

    def test_restore_refuses_where_the_tables_file_has_changed(self, checkpoint, load_path):
        model = stock(checkpoint)
        report = gemma_accel.apply(model)
        classes = [type(m) for m in model.modules()]
        (checkpoint / "model.safetensors").touch()
        with pytest.raises(RestoreError, match="model.safetensors was written to"):
            report.restore()
        assert [type(m) for m in model.modules()] == classes

    def test_undo_brings_the_stock_path_back(self, checkpoint):
        install_load_path()()
        assert type(table_of(stock(checkpoint))) is not HostPerLayerEmbedding

    def test_no_missing_and_no_unexpected_keys(self, checkpoint, load_path):
        _, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_converted_at_load(self, checkpoint, dtype, request):
        expected = logits(stock(checkpoint, dtype=dtype))
        request.getfixturevalue("load_path")
        assert torch.equal(logits(stock(checkpoint, dtype=dtype)), expected)

    def test_shards(self, tmp_path, request):
        tiny_model("conditional").save_pretrained(tmp_path, max_shard_size="200KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        expected = logits(stock(tmp_path))
        request.getfixturevalue("load_path")
        model = stock(tmp_path)
        assert isinstance(table_of(model).host.source, FileSlice)
        assert torch.equal(logits(model), expected)

    def test_nf4_quantised_at_load(self, checkpoint, request):
        config = BitsAndBytesConfig(**NF4)
        expected = logits(stock(checkpoint, quantization_config=config).train())
        request.getfixturevalue("load_path")
        model = stock(checkpoint, quantization_config=config).train()
        assert isinstance(table_of(model).host.source, FileSlice)
        assert torch.equal(logits(model), expected)

    def test_checkpoint_that_is_already_in_four_bits(self, checkpoint, tmp_path, request):
        stock(checkpoint, quantization_config=BitsAndBytesConfig(**NF4)).save_pretrained(
            tmp_path / "nf4"
        )
        expected = logits(stock(tmp_path / "nf4").train())
        request.getfixturevalue("load_path")
        model = stock(tmp_path / "nf4").train()
        assert isinstance(table_of(model).host.source, FileSlice)
        assert torch.equal(logits(model), expected)

    def test_not_safetensors_falls_back_to_host_memory(self, checkpoint, request):
        state = load_file(checkpoint / "model.safetensors")
        torch.save(state, checkpoint / "pytorch_model.bin")
        (checkpoint / "model.safetensors").unlink()
        expected = logits(stock(checkpoint))
        request.getfixturevalue("load_path")
        for device_map in (None, {"": "cpu"}):
            model = stock(checkpoint, device_map=device_map)
            assert isinstance(table_of(model).host.source, torch.Tensor)
            assert torch.equal(logits(model), expected)

    def test_loads_in_threads_do_not_meet(self, checkpoint, request):
        expected = logits(stock(checkpoint))
        request.getfixturevalue("load_path")
        made = Gemma4TextModel.__init__
        with ThreadPoolExecutor(3) as pool:
            models = list(pool.map(stock, [checkpoint] * 3))
        assert Gemma4TextModel.__init__ is made
        assert all(torch.equal(logits(model), expected) for model in models)

    def test_offloaded_to_disk_it_is_left_to_accelerate(self, tmp_path, request):
        tiny_model("causal").save_pretrained(tmp_path / "model")

        def load(name):
            kwargs = {"device_map": {"": "disk"}, "offload_folder": tmp_path / name}
            return stock(tmp_path / "model", **kwargs)

        expected = logits(load("stock"))
        request.getfixturevalue("load_path")
        model = load("ours")
        assert torch.equal(logits(model), expected)
        with pytest.raises(ForeignPatchError, match="spans the CPU, the disk"):
            gemma_accel.apply(model)

    def test_a_class_that_apply_does_not_take_loads_the_stock_way(self, checkpoint, load_path):
        whole = stock(checkpoint)
        model = AutoModel.from_pretrained(checkpoint)  # Gemma4Model, Gemma4TextModel
        assert type(table_of(model)) is not HostPerLayerEmbedding
        ids = batch()["input_ids"]
        with torch.no_grad():
            expected = whole.model(input_ids=ids).last_hidden_state
            assert torch.equal(model(input_ids=ids).last_hidden_state, expected)

    @pytest.mark.parametrize(
        "adapted",
        [
            dict(target_modules=r".*layers\.0\.mlp\.up_proj"),
            dict(target_modules=r".*embed_tokens_per_layer"),
            dict(target_modules=LANGUAGE, modules_to_save=["embed_tokens_per_layer"]),
        ],
        ids=["layers", "the table", "a copy of the table"],
    )
    def test_an_adapters_directory(self, tmp_path, adapted, request):
        tiny_model().save_pretrained(tmp_path / "model")
        config = LoraConfig(r=2, init_lora_weights=False, **adapted)
        get_peft_model(stock(tmp_path / "model"), config).save_pretrained(tmp_path / "adapters")
        expected = logits(stock(tmp_path / "adapters"))
        request.getfixturevalue("load_path")
        model = stock(tmp_path / "adapters")
        assert [m for m in model.modules() if isinstance(m, HostPerLayerEmbedding)]
        assert torch.equal(logits(model), expected)

    def test_from_config_is_untouched(self, checkpoint, load_path):
        model = AutoModelForCausalLM.from_config(stock(checkpoint).config)
        assert type(table_of(model)) is not HostPerLayerEmbedding
        assert isinstance(table_of(model).weight, torch.nn.Parameter)

    def test_a_load_that_raises_leaves_no_trace(self, checkpoint, load_path):
        from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel

        init = Gemma4TextModel.__init__
        with pytest.raises(Exception):  # noqa: B017 - whatever transformers raises
            AutoModelForCausalLM.from_pretrained(
                checkpoint, no_such_argument=1, device_map="nowhere"
            )
        assert Gemma4TextModel.__init__ is init
        assert type(table_of(stock(checkpoint))) is HostPerLayerEmbedding

    def test_float32_is_pointed_out_with_the_remedy(self, tmp_path, load_path):
        tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match='model_init_kwargs={"dtype": "bfloat16"}'):
            stock(tmp_path, dtype=torch.float32)

    def test_importing_auto_installs_it_and_disable_turns_it_off(self, checkpoint):
        script = textwrap.dedent(
            f"""
            import warnings
            warnings.simplefilter("ignore")
            import gemma_accel.auto
            from transformers import AutoModelForCausalLM
            model = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r})
            print(hasattr(model.get_per_layer_input_embeddings(), "host"))
            """
        )
        for disable, expected in (("0", "True"), ("1", "False")):
            out = subprocess.run(
                [sys.executable, "-c", script],
                capture_output=True,
                text=True,
                check=True,
                env={**__import__("os").environ, "GEMMA_ACCEL_DISABLE": disable},
            ).stdout
            assert out.split()[-1] == expected


@pytest.fixture
def model(checkpoint, load_path):
    return stock(checkpoint)


class TestTable:
    def test_saves_and_reloads_in_stock(self, model, tmp_path):
        expected = logits(model)
        model.save_pretrained(tmp_path / "saved")
        install_load_path()()
        from transformers.models.gemma4.modeling_gemma4 import Gemma4PreTrainedModel

        for name in ("from_pretrained", "_load_pretrained_model"):
            if name in vars(Gemma4PreTrainedModel):
                delattr(Gemma4PreTrainedModel, name)
        again = stock(tmp_path / "saved")
        assert type(table_of(again)) is not HostPerLayerEmbedding
        assert torch.equal(logits(again), expected)

    @pytest.mark.parametrize("how", ["asked for at load", "converted later"])
    def test_another_dtype_is_saved_as_stock_saves_it(self, checkpoint, how, tmp_path, request):
        def saved(name):
            model = stock(checkpoint, dtype=torch.bfloat16 if how == "asked for at load" else None)
            model = model.to(torch.bfloat16)
            model.load_state_dict(model.state_dict())
            model.save_pretrained(tmp_path / name)
            return model, load_file(tmp_path / name / "model.safetensors")

        _, expected = saved("stock")
        request.getfixturevalue("load_path")
        model, ours = saved("ours")
        assert isinstance(table_of(model).host.source, FileSlice)  # its own state changed nothing
        assert ours.keys() == expected.keys()
        for name, tensor in expected.items():
            assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)
        pickled = table_of(pickle.loads(pickle.dumps(model))).weight
        assert torch.equal(pickled, model.state_dict()[TABLE[type(model).__name__]])

    def test_state_in_the_files_dtype_is_no_copy(self, model):
        state = model.state_dict()[TABLE[type(model).__name__]]
        assert state.data_ptr() == table_of(model).weight.data_ptr()

    def test_a_pickle_holds_the_table_and_leaves_the_file_alone(self, model, checkpoint):
        expected = logits(model)
        twin = pickle.loads(pickle.dumps(model))
        table = table_of(twin)
        assert type(table) is HostPerLayerEmbedding.stock and "host" not in vars(table)
        del twin, table
        assert torch.equal(logits(model), expected)
        pickled = pickle.dumps(model)
        del model
        (checkpoint / "model.safetensors").unlink()
        assert torch.equal(logits(pickle.loads(pickled)), expected)

    def test_strict_state_dict_round_trip(self, model):
        expected = logits(model)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(state)
        assert torch.equal(logits(model), expected)
        key = next(k for k in state if "embed_tokens_per_layer" in k)
        state[key] = state[key] + 1
        model.load_state_dict(state)
        assert not torch.equal(logits(model), expected)
        assert torch.equal(model.state_dict()[key], state[key])

    def test_a_write_to_the_parameter_is_seen_and_never_reaches_the_file(self, model, checkpoint):
        expected = logits(model)
        before = (checkpoint / "model.safetensors").read_bytes()
        with torch.no_grad():
            table_of(model).weight.add_(1.0)
        assert not torch.equal(logits(model), expected)
        assert (checkpoint / "model.safetensors").read_bytes() == before

    def test_resized_vocabulary(self, model, checkpoint):
        other = tiny_model(
            "causal" if type(model).__name__ == "Gemma4ForCausalLM" else "conditional"
        )
        for m in (model, other):
            m.resize_token_embeddings(170, mean_resizing=False)
        assert table_of(model).weight.shape == table_of(other).weight.shape == (170, 80)
        assert torch.equal(table_of(model).weight[:160], table_of(other).weight[:160])
        logits(model)

    def test_half_and_to_change_what_comes_out(self, model):
        ids = batch()["input_ids"]
        assert table_of(model)(ids).dtype == torch.float32
        model.half()
        assert table_of(model)(ids).dtype == torch.float16
        model.to(torch.bfloat16)
        assert table_of(model)(ids).dtype == torch.bfloat16
        logits(model)

    def test_on_meta_nothing_is_left_of_it(self, model):
        host = table_of(model).host
        model.to("meta")
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert type(table_of(model)) is HostPerLayerEmbedding.stock
        assert host._opened is None  # the file

    def test_freezing_by_name_reaches_it(self, model):
        for name, parameter in model.named_parameters():
            if "embed_tokens_per_layer" in name:
                parameter.requires_grad_(False)
        assert not table_of(model).weight.requires_grad

    @pytest.mark.parametrize("applied", [False, True])
    def test_training_it_without_a_trainer_is_refused_with_the_remedy(self, model, applied):
        if applied:
            gemma_accel.apply(model)
        for mode in (model.eval, model.train):  # a loop of one's own may leave out `.train()`
            loss = mode()(**batch()).loss  # as may who only looks leave out `no_grad`
            with pytest.raises(RuntimeError, match="requires_grad_"):
                loss.backward()
        table_of(model).requires_grad_(False)
        model(**batch()).loss.backward()

    def test_a_replaced_file_is_noticed_when_saving(self, model, checkpoint, tmp_path):
        data = (checkpoint / "model.safetensors").read_bytes()
        (checkpoint / "model.safetensors").unlink()
        (checkpoint / "model.safetensors").write_bytes(data)
        with pytest.raises(StaleFileError, match="changed on disk"):
            model.save_pretrained(tmp_path / "saved")


class TestWrites:
    """The table is the parameter's, whoever wrote into it and how."""

    @pytest.mark.parametrize("how", ["no_grad", "data", "in place of data"])
    def test_show_in_outputs_and_in_what_is_saved(self, model, tmp_path, how):
        before, weight = logits(model), table_of(model).weight
        with torch.no_grad():
            if how == "no_grad":
                weight[3:60] += 1
            elif how == "data":
                weight.data[3:60] = weight.data[3:60] + 1
            else:
                weight.data += 1
        after = logits(model)
        assert not torch.equal(after, before)
        model.save_pretrained(tmp_path / "written")
        assert torch.equal(logits(stock(tmp_path / "written")), after)

    def test_peft_merges_into_it(self, model):
        config = LoraConfig(r=4, target_modules=["embed_tokens_per_layer"], init_lora_weights=False)
        peft = get_peft_model(model, config).eval()
        adapted = logits(peft)
        merged = logits(peft.merge_and_unload())
        assert (merged - adapted).norm() < 1e-4 * adapted.norm()

    @pytest.mark.parametrize("how", ["no_grad", "data"])
    @pytest.mark.parametrize("written_before", [False, True])
    def test_do_not_reach_a_copy(self, model, written_before, how):
        weight = table_of(model).weight
        if written_before:
            with torch.no_grad():
                weight += 0.5
            logits(model)
        twin = copy.deepcopy(model)
        before = logits(twin)
        with torch.no_grad():
            (weight.data if how == "data" else weight).mul_(2)
        assert not torch.equal(logits(model), before)
        assert torch.equal(logits(twin), before)

    def test_a_copy_outlives_the_file_and_the_originals_table(self, model, checkpoint):
        expected = logits(model)
        (checkpoint / "model.safetensors").unlink()
        twin = copy.deepcopy(model)
        model.resize_token_embeddings(table_of(model).weight.shape[0] + 8)
        logits(model)
        assert torch.equal(logits(twin), expected)

    def test_a_resized_table_is_saved_though_the_file_is_gone(self, model, checkpoint, tmp_path):
        model.resize_token_embeddings(model.config.get_text_config().vocab_size + 8)
        (checkpoint / "model.safetensors").unlink()
        with torch.no_grad():
            table_of(model).weight.data.mul_(1.5)
        model.save_pretrained(tmp_path / "resized")
        assert torch.equal(logits(stock(tmp_path / "resized")), logits(model))


def test_of_two_tables_in_a_file_transformers_chooses(tmp_path, load_path):
    teacher, student = (tiny_model("conditional", seed=seed) for seed in (1, 0))
    tensors = {}
    for name, network in (("teacher", teacher), ("student", student)):
        network.save_pretrained(tmp_path)
        loaded = load_file(tmp_path / "model.safetensors")
        tensors |= {f"{name}.{key}": value for key, value in loaded.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    mapping = {r"^teacher\.": ""}
    model = Gemma4ForConditionalGeneration.from_pretrained(tmp_path, key_mapping=mapping)
    assert torch.equal(table_of(model).weight, table_of(teacher).weight)


@pytest.mark.parametrize(
    ("stat", "available"),
    [(f"anon 1\ninactive_file {9 << 30}\nactive_file {1 << 30}", 14), (None, 4)],
)
def test_pages_of_files_count_as_available_to_a_cgroup(monkeypatch, stat, available):
    """Of a limit of 16 GiB twelve are used, ten of these by pages of files, where that is known."""
    files = {
        "/proc/meminfo": f"MemAvailable: {60 << 20} kB",
        "/sys/fs/cgroup/memory.max": f"{16 << 30}",
        "/sys/fs/cgroup/memory.current": f"{12 << 30}",
        "/sys/fs/cgroup/memory.stat": stat,
    }

    def read_text(path):
        if files[str(path)] is None:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert hostmemory._available_memory() == available << 30


class TestHostTable:
    @pytest.fixture
    def table(self, tmp_path):
        weight = torch.randn(33, 24, dtype=torch.bfloat16)
        save_file(
            {"a": torch.ones(3), "x.embed_tokens_per_layer.weight": weight},
            tmp_path / "f.safetensors",
        )
        (found,) = find_tensors(tmp_path / "f.safetensors", suffix="embed_tokens_per_layer.weight")
        return weight, found

    def test_rows_by_columns_from_a_file(self, table):
        weight, source = table
        ids = torch.tensor([[0, 32, 5], [5, 5, 1]])
        rows = HostTable(source).fetch(ids)
        assert torch.equal(rows.columns(8, 16), weight[ids, 8:24])

    def test_from_a_tensor(self, table):
        weight, _ = table
        ids = torch.tensor([3, 1])
        assert torch.equal(HostTable(weight).fetch(ids).columns(0, 24), weight[ids])

    def test_id_out_of_range(self, table):
        with pytest.raises(IndexError, match="33 rows"):
            HostTable(table[1]).fetch(torch.tensor([33]))

    def test_cut_short_while_in_use(self, table):
        _, source = table
        host = HostTable(source)
        host.fetch(torch.tensor([0]))
        with open(source.path, "r+b") as file:
            file.truncate(source.offset + 10)
        with pytest.raises(StaleFileError, match="cut short"):
            host.fetch(torch.tensor([30]))

    @pytest.mark.gpu
    @pytest.mark.parametrize("way", ["mapped", "pinned", "read"])
    def test_every_way_on_a_gpu_is_bitwise_equal(self, table, way, monkeypatch):
        weight, source = table
        if way != "mapped":
            monkeypatch.setattr(HostTable, "_map", lambda self: "not this time")
        if way == "read":
            monkeypatch.setattr(HostTable, "_pin", lambda self: "nor this")
        ids = torch.tensor([[0, 32, 5], [5, 5, 1]], device="cuda")
        host = HostTable(source)
        rows = host.fetch(ids)
        assert host.way == way, host.why
        assert torch.equal(rows.columns(8, 16).cpu(), weight[ids.cpu(), 8:24])
        host.close()


class TestHeaders:
    def write(self, path, header, payload=b"\0" * 64):
        raw = json.dumps(header).encode() if not isinstance(header, bytes) else header
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + payload)
        return path

    @pytest.mark.parametrize(
        "entry",
        [
            {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 65]},
            {"dtype": "F32", "shape": [4, 4], "data_offsets": [16, 80]},
            {"dtype": "F32", "shape": [4, 4], "data_offsets": [-64, 0]},
            {"dtype": "F32", "shape": [-4, -4], "data_offsets": [0, 64]},
            {"dtype": "F32", "shape": [4.0, 4], "data_offsets": [0, 64]},
            {"dtype": "F32", "shape": [4, 4]},
            {"dtype": "F32", "shape": [4, 4], "data_offsets": [0]},
            "nonsense",
        ],
    )
    def test_places_outside_the_file_are_refused(self, tmp_path, entry):
        path = self.write(tmp_path / "f.safetensors", {"t.weight": entry})
        with pytest.raises(ValueError, match="damaged|malformed"):
            find_tensors(path, suffix="t.weight")

    @pytest.mark.parametrize("raw", [b"", b"{}", b"\xff" * 16, struct.pack("<Q", 2**62) + b"{}"])
    def test_what_is_no_safetensors_file_is_said_so(self, tmp_path, raw):
        path = tmp_path / "f.safetensors"
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="not a safetensors file"):
            find_tensors(path, suffix="t.weight")

    def test_absent_tensor(self, tmp_path):
        assert find_tensors(self.write(tmp_path / "f.safetensors", {}), suffix="t.weight") == []
