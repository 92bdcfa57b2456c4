"""The command line in real processes, and what the demo writes."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
)

from gemma_accel import demo
from tests.test_run import EXAMPLE, ROOT, TRAINS, needs_training, python
from tests.tiny import tiny_model

CONFIGS = ROOT / "benchmarks" / "configs"


def gemma_accel(*arguments, cwd, **variables):
    return python("-m", "gemma_accel", *arguments, cwd=cwd, **variables)


# -- the commands ---------------------------------------------------------------------------------


def test_help_names_every_command(tmp_path):
    done = gemma_accel("--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "run", "plan", "verify", "info"):
        assert f" {command} " in done.stdout


def test_the_command_line_imports_nothing_heavy(tmp_path):
    code = (
        "import sys, gemma_accel.cli; print({'torch', 'transformers', 'pluggy'} & set(sys.modules))"
    )
    assert python("-c", code, cwd=tmp_path).stdout == "set()\n"


@pytest.mark.parametrize("command", ["demo", "run", "plan", "verify", "info"])
def test_every_command_explains_itself(monkeypatch, capsys, command):
    from gemma_accel import cli

    monkeypatch.setattr(sys, "argv", ["gemma-accel", command, "--help"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 0
    assert "usage" in capsys.readouterr().out.lower()


def test_run_touches_no_argument(tmp_path):
    (tmp_path / "program.py").write_text("import sys; print(sys.argv[1:])")
    arguments = ["--help", "-h", "--", "--json", "run", "--unknown=1", "-m"]
    done = gemma_accel("run", "program.py", *arguments, cwd=tmp_path, GEMMA_ACCEL_DISABLE="1")
    assert done.stdout == f"{arguments}\n"


def test_info_tells_versions_and_patches(tmp_path):
    done = gemma_accel("info", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    facts = json.loads(done.stdout)
    assert facts["torch"] == torch.__version__
    assert facts["GPU"].startswith("none") != torch.cuda.is_available()
    applied = {record["patch"] for record in facts["patches"]["applied"]}
    assert applied >= {"rms_norm", "geglu", "decoder_layer", "per_layer_embeddings"}


def test_verify_gives_a_checkpoint_adapters(tmp_path):
    # 64 wide: see `tests.test_wiring.checkpoint`
    tiny_model("causal", hidden_size_per_layer_input=64).save_pretrained(tmp_path / "model")
    done = gemma_accel("verify", "model", "--load-in-4bit", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(row["ok"] for row in json.loads(done.stdout)["rows"])
    code = (
        "from gemma_accel.cli import _load; model = _load('model', False)\n"
        "print([n for n, p in model.named_parameters() if p.requires_grad])"
    )
    trained = ast.literal_eval(python("-c", code, cwd=tmp_path).stdout.splitlines()[-1])
    assert trained and all(".lora_" in name and "_proj" in name for name in trained)


def test_verify_takes_a_checkpoint_that_is_in_4_bits(tmp_path):
    tiny_model("causal", hidden_size_per_layer_input=64).save_pretrained(tmp_path / "whole")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", quantization_config=four
    ).save_pretrained(tmp_path / "model")
    # a table's box and ellipsis are not in every encoding
    variables = {"PYTHONIOENCODING": "latin-1", "COLUMNS": "60"}
    done = gemma_accel("verify", "model", cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "geglu" in done.stdout


def test_a_checkpoint_of_other_shapes_is_one_clear_error(tmp_path):
    tiny_model("causal").save_pretrained(tmp_path / "model")
    tiny_model("causal", hidden_size=32).config.save_pretrained(tmp_path / "model")
    done = gemma_accel("verify", "model", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "gemma-accel: expected a model's directory" in done.stderr


@pytest.mark.parametrize(("four_bits", "remedy"), [(False, "--load-in-4bit"), (True, "a GPU with")])
def test_a_model_too_large_for_the_gpu_is_one_clear_error(tmp_path, four_bits, remedy):
    tiny_model("causal").config.save_pretrained(tmp_path / "model")
    code = (  # in a process of its own: to load by `auto` is for good
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "from gemma_accel import cli\n"
        "def no_room(*args, **kwargs):\n"
        "    raise torch.OutOfMemoryError('CUDA out of memory.')\n"
        "AutoModelForCausalLM.from_pretrained = no_room\n"
        f"cli._load('model', {four_bits})"
    )
    told = python("-c", code, cwd=tmp_path).stderr.splitlines()[-1]
    assert "GemmaAccelError: 'model' does not fit the GPU" in told and remedy in told


def test_verify_in_4_bits_looks_at_the_fused_projections(tmp_path):
    tiny = tiny_model("causal", dtype=torch.bfloat16, hidden_size_per_layer_input=64)
    tiny.save_pretrained(tmp_path / "model")
    code = (
        "import torch\n"
        "from gemma_accel.cli import _load\n"
        "from gemma_accel.patches.projections import as_projection\n"
        "layer = _load('model', True).get_base_model().model.layers[0]\n"
        "x = torch.zeros(1, layer.hidden_size, dtype=torch.bfloat16)\n"
        "print(as_projection(layer.self_attn.q_proj, x))"
    )
    assert python("-c", code, cwd=tmp_path).stdout.startswith("Projection(")


def test_info_prints_a_table(monkeypatch, capsys, references):
    from gemma_accel import cli

    monkeypatch.setattr(sys, "argv", ["gemma-accel", "info"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert not exit.value.code
    text = capsys.readouterr().out
    assert torch.__version__ in text and "per_layer_embeddings" in text and "applied" in text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("plan", "e2b", "--vram-gib", "nan"), "vram_gib must be a positive, finite number"),
        (("plan", "e2b", "--vram-gib", "inf"), "vram_gib must be a positive, finite number"),
        (("plan", "e2b", "--quantization", "int8"), "got 'int8' (--quantization nf4 or none)"),
        (("plan", "e2b", "--lora-rank", "0"), "--quantization none"),
        (("plan", "e2b", "--dtype", "int8"), "'bfloat16' or 'float32', got 'int8'"),
        (("plan", "empty"), "expected a model's directory or a hub id"),
        (("plan", "unknown.json"), "got 'unknown.json'"),
        (("plan", "other.json"), "got 'other.json'"),
        (("verify", "/no/such/path"), "got '/no/such/path'"),
        (("verify", "bare"), "got 'bare'"),
    ],
)
def test_what_cannot_be_done_is_one_line(monkeypatch, capfd, tmp_path, arguments, reason):
    from gemma_accel import cli

    monkeypatch.setitem(sys.modules, "gemma_accel.auto", ModuleType("auto"))  # which would act
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gemma-accel", *arguments])
    Path("empty").mkdir()
    Path("unknown.json").write_text('{"model_type": "nonesuch"}')
    Path("other.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    demo.config_of("tiny").save_pretrained("bare")
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("gemma-accel:")]
    assert len(said) == 1 and reason in said[0]


# -- the demo -------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_training
def test_the_demo_learns_its_text(tmp_path):
    done = gemma_accel("demo", cwd=tmp_path)
    print(done.stdout, done.stderr)  # for a failure's report
    assert done.returncode == 0
    directory = tmp_path / "gemma-accel-demo"
    assert {path.name for path in tmp_path.iterdir()} == {directory.name}
    report, history = demo._results(directory / "output")
    assert {record.patch for record in report.applied} >= {"rms_norm", "per_layer_embeddings"}
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    _, _, end = done.stdout.partition("is continued, greedily")
    _, _, after = end.partition("after training:")
    topic = demo._documentation()["break"].splitlines()
    assert topic[0].endswith(demo._PROMPT)
    for line in topic[1:6]:  # learnt by heart
        assert line in after
    assert "\r" not in done.stdout  # no bar's states where nobody draws over them
    assert (directory / "train.log").stat().st_size > 0


@pytest.mark.skipif(TRAINS, reason="needs a TRL that computes its loss on a GPU only, and no GPU")
def test_a_demo_that_this_trl_cannot_train_is_refused(monkeypatch, capsys, tmp_path):
    text = refusal(monkeypatch, capsys, "--directory", str(tmp_path / "new"))
    assert "pip install --upgrade trl" in text


def test_a_demo_refuses_somebody_elses_directory(monkeypatch, capsys, tmp_path):
    (tmp_path / "thesis.txt").touch()
    assert "exists and is not an earlier demo's" in refusal(
        monkeypatch, capsys, "--directory", str(tmp_path)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("inside", ["a file", "no filesystem for files"])
def test_a_demo_that_cannot_write_says_so(monkeypatch, capsys, tmp_path, inside):
    (tmp_path / "file").touch()
    where = tmp_path / "file" / "x" if inside == "a file" else Path("/proc/x")
    text = refusal(monkeypatch, capsys, "--directory", str(where))
    assert "nothing can be written to" in text and "--directory NAME" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_real_size_without_a_gpu_is_refused_before_anything_is_written(
    monkeypatch, capsys, tmp_path
):
    text = refusal(monkeypatch, capsys, "--size", "e2b", "--directory", str(tmp_path / "new"))
    assert "needs an NVIDIA GPU" in text and "Without --size" in text
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    from collections import namedtuple

    from rich.console import Console

    usage = namedtuple("usage", "total used free")(10**12, 10**12, 2**30)
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(demo.DemoError, match="takes 9.5 GiB and .* has 1.0 GiB free"):
        demo._write_with_progress(Console(), demo.config_of("e2b"), tmp_path)
    assert not any(tmp_path.iterdir())


def refusal(monkeypatch, capsys, *arguments):
    from gemma_accel import cli

    monkeypatch.setattr(sys, "argv", ["gemma-accel", "demo", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    return " ".join(capsys.readouterr().err.split())


# -- what it writes -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["e2b", "e4b"])
def test_the_real_sizes_are_the_released_models_own(size):
    wanted = Gemma4Config.from_dict(json.loads((CONFIGS / f"{size}.json").read_text())).to_dict()
    got = demo.config_of(size).to_dict()
    for name in ("architectures", "dtype", "eos_token_id"):  # a checkpoint's, not a shape's
        wanted.pop(name, None), got.pop(name, None)
    assert got == wanted


def test_random_weights_are_written_as_save_pretrained_writes_them(tmp_path):
    from safetensors.torch import load_file

    config = demo.config_of("tiny")
    written = []
    demo.write_random_checkpoint(config, tmp_path / "ours", written.append)
    assert sum(written) == demo.checkpoint_bytes(config)
    model = Gemma4ForConditionalGeneration(demo.config_of("tiny")).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "stock")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    stock = load_file(tmp_path / "stock" / "model.safetensors")
    described = [{name: (t.shape, t.dtype) for name, t in f.items()} for f in (ours, stock)]
    assert described[0] == described[1]
    for name, tensor in ours.items():
        if len(stock[name].unique()) > 1:  # random in both, of the same distribution
            assert not torch.equal(tensor, stock[name]), name
            ratio = tensor.float().std() / stock[name].float().std()
            assert tensor.numel() < 200 or 0.7 < ratio < 1.4, name
        else:  # a norm's weight, a bound, a scale
            assert torch.equal(tensor, stock[name]), name
    loaded, notes = Gemma4ForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    assert loaded.dtype == torch.bfloat16
    ids = torch.arange(3, 40)[None]
    assert loaded(input_ids=ids, labels=ids).loss.isfinite()
    assert not list((tmp_path / "ours").glob("*.partial"))


def test_the_tokenizer_keeps_every_byte(tmp_path):
    from transformers import AutoProcessor

    demo.write_tokenizer(tmp_path, 496)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "naïve \t\n  λ → 𝔊 <break> 12"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert min(ids) >= 3 and max(ids) < 496 <= len(tokenizer) <= 496
    demo.config_of("tiny").save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is type(tokenizer)  # what TRL asks


def test_real_rows_fill_a_training_row(tmp_path):
    rows = demo.write_dataset(tmp_path / "data.jsonl", "e2b")
    lines = (tmp_path / "data.jsonl").read_text().splitlines()
    assert len(lines) == rows >= 16
    demo.write_tokenizer(tmp_path, 1024)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert all(len(tokenizer(json.loads(line)["text"]).input_ids) >= 2048 for line in lines)


def test_the_example_shown_is_the_one_that_is_installed():
    assert (
        EXAMPLE.resolve()
        == demo.EXAMPLE.resolve()
        == Path(demo.__file__).parent.joinpath("examples", "sft_text.py")
    )
    lines = EXAMPLE.read_text().splitlines()
    code = [
        line for line in lines if "gemma_accel" in line and "import" in line and "`" not in line
    ]
    assert code == ["import gemma_accel.auto  # noqa: F401 - the one line"]
