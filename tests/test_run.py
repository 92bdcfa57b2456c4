"""`gemma_accel.run` in real processes: as Python runs a program, and what launchers start."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trl.kernels import chunked_logprob

from gemma_accel import demo
from gemma_accel import run as runner

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "sft_text.py"


def python(*arguments, cwd, **variables):
    """Run this Python with the package importable from anywhere, as installed."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRITON_INTERPRET": "0",
        **variables,
    }
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The demo's tiny model and data, as a user would have them: a directory each."""
    directory = tmp_path_factory.mktemp("tiny")
    demo.write_tokenizer(directory / "model", 496)
    demo.write_tiny_checkpoint(directory / "model")
    (directory / "data").mkdir()
    demo.write_dataset(directory / "data" / "data.jsonl", "tiny")
    return directory


def report_in(output):
    return json.loads((output / "checkpoint-2" / "gemma_accel_report.json").read_text())


# -- as Python would ------------------------------------------------------------------------------

PROGRAM = """
import os, pickle, sys

class Local:
    pass

def end(how):
    if how == "raise":
        raise ValueError("boom")
    if how == "chain":
        try:
            end("raise")
        except ValueError as error:
            raise RuntimeError("worse") from error
    if how == "code":
        sys.exit(7)
    if how == "text":
        sys.exit("goodbye")
    if how == "interrupt":
        raise KeyboardInterrupt

assert sys.modules["__main__"].__dict__ is globals()
print(type(__builtins__), "__cached__" in globals())
assert type(pickle.loads(pickle.dumps(Local()))) is Local
print(__name__, __file__, getattr(__spec__, "name", None))
print(sys.argv, sys.path[0], os.getcwd())
end(sys.argv[1])
"""


LATE = """
import atexit, pickle, sys, threading, time

class Local:
    pass

def late(who):
    if who == "thread":
        time.sleep(0.2)
    print(who, type(pickle.loads(pickle.dumps(Local()))) is Local)

atexit.register(late, "exit")
threading.Thread(target=late, args=["thread"]).start()
print(sys.argv, __file__, type(__loader__).__name__, __spec__)
"""
"""What goes on when the last line has run."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("programs")
    (directory / "package").mkdir()
    (directory / "package" / "program.py").write_text(PROGRAM)
    (directory / "package" / "__init__.py").touch()
    (directory / "package" / "__main__.py").write_text(PROGRAM)
    (directory / "package" / "broken.py").write_text("x = = 1\n")
    (directory / "late.py").write_text(LATE)
    (directory / "link.py").symlink_to(directory / "package" / "program.py")
    return directory


@pytest.mark.parametrize(
    "arguments",
    [
        ["package/program.py", "return", "--help", "-m", "--", "run"],
        ["package/program.py", "raise"],
        ["package/program.py", "chain"],
        ["package/program.py", "code"],
        ["package/program.py", "text"],
        ["package/program.py", "interrupt"],
        ["package/broken.py"],
        ["link.py", "return"],
        ["late.py"],
        ["./late.py", "relative"],
        ["package", "return"],
        ["-m", "package.program", "return", "--help"],
        ["-m", "package.program", "raise"],
    ],
    ids=" ".join,
)
def test_a_program_sees_what_python_gives_it(folder, arguments):
    """Output, traceback and exit code are those of plain Python, to the letter."""
    if not arguments[0].startswith(("-m", "./")):
        arguments = [folder / arguments[0], *arguments[1:]]
    variables = {"GEMMA_ACCEL_DISABLE": "1", "PYTHONWARNINGS": "ignore"}  # for speed alone
    stock = python(*arguments, cwd=folder, **variables)
    ours = python("-m", "gemma_accel.run", *arguments, cwd=folder, **variables)
    assert stock.stdout or stock.stderr
    assert ours.stdout == stock.stdout
    # runpy's own two frames are in a stock traceback of -m, and of no use to anybody
    assert ours.stderr == without_runpy(stock.stderr)
    assert ours.returncode == stock.returncode


def without_runpy(text):
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if "<frozen runpy>" not in line)


def test_the_import_has_acted_before_the_program_starts(tmp_path):
    (tmp_path / "program.py").write_text(
        "from transformers.models.gemma4.modeling_gemma4 import Gemma4PreTrainedModel as model\n"
        "print('from_pretrained' in vars(model))\n"
    )
    assert python("program.py", cwd=tmp_path).stdout == "False\n"
    assert python("-m", "gemma_accel.run", "program.py", cwd=tmp_path).stdout == "True\n"


def test_importing_it_runs_nothing(tmp_path):
    code = "import sys, gemma_accel.run; print({'torch', 'gemma_accel.auto'} & set(sys.modules))"
    assert python("-c", code, cwd=tmp_path).stdout == "set()\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: gemma-accel run"),
        (["-m"], "usage: gemma-accel run"),
        (["absent.py"], "there is no file 'absent.py'"),
        (["python3", "train.py"], "Leave python3 out"),
        (["torchrun", "train.py"], "torchrun -m gemma_accel.run train.py"),
        (["-m", "torch.distributed.run", "x.py"], "torch.distributed.run -m gemma_accel.run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_run_is_said_with_the_remedy(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        runner.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        runner.main(["--help"])
    assert exit.value.code == 0
    assert "usage: gemma-accel run" in capsys.readouterr().out


# -- children -------------------------------------------------------------------------------------


def launch(script, *arguments, module=False, no_python=False):
    return argparse.Namespace(
        training_script=script,
        training_script_args=list(arguments),
        module=module,
        no_python=no_python,
    )


def test_a_launched_script_becomes_an_argument_of_the_runner():
    args = launch("sft.py", "--lr", "1")
    runner._rewrite(args)
    assert args == launch("gemma_accel.run", "sft.py", "--lr", "1", module=True)
    runner._rewrite(args)  # one that is accelerated already
    assert args == launch("gemma_accel.run", "sft.py", "--lr", "1", module=True)


def test_a_launched_module_stays_a_module():
    args = launch("package.train", "--lr", "1", module=True)
    runner._rewrite(args)
    assert args == launch("gemma_accel.run", "-m", "package.train", "--lr", "1", module=True)


def test_a_launched_executable_is_left_alone_aloud():
    args = launch("./train", no_python=True)
    with pytest.warns(UserWarning, match="without gemma_accel"):
        runner._rewrite(args)
    assert args == launch("./train", no_python=True)


TRAINS = torch.cuda.is_available() or hasattr(chunked_logprob, "_use_triton")
needs_training = pytest.mark.skipif(not TRAINS, reason="this TRL computes its loss on a GPU only")


@pytest.mark.slow
@needs_training
def test_trl_sft_trains_an_accelerated_child(checkpoint, tmp_path):
    arguments = [
        "--model_name_or_path",
        checkpoint / "model",
        "--dataset_name",
        checkpoint / "data",
    ]
    arguments += ["--output_dir", "out", "--use_peft", "--max_steps", 2, "--max_length", 32]
    arguments += ["--report_to", "none", "--use_cpu", "--bf16", "false", "--dtype", "float32"]
    done = python("-m", "gemma_accel", "run", "trl", "sft", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    report = report_in(tmp_path / "out")
    assert {record["patch"] for record in report["applied"]} >= {"rms_norm", "decoder_layer"}


@pytest.mark.slow
@needs_training
def test_accelerate_launch_starts_the_runner(checkpoint, tmp_path):
    arguments = ["--model", checkpoint / "model", "--dataset", checkpoint / "data" / "data.jsonl"]
    arguments += ["--output-dir", "out", "--max-steps", 2, "--max-length", 32]
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "-m", "gemma_accel.run"]
    done = python(*launcher, EXAMPLE, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    report = report_in(tmp_path / "out")
    assert report["notes"]["per-layer table"].startswith("frozen: read from the checkpoint file")


def test_a_failing_child_fails_the_launch(tmp_path):
    (tmp_path / "program.py").write_text(
        "import sys\n"
        "from transformers.models.gemma4.modeling_gemma4 import Gemma4PreTrainedModel as model\n"
        "print('from_pretrained' in vars(model), sys.argv[1:])\n"
        "sys.exit(3)\n"
    )
    launcher = ["-m", "gemma_accel", "run", "accelerate", "launch", "--cpu", "--quiet"]
    done = python(*launcher, "program.py", "--flag", cwd=tmp_path)
    assert done.stdout == "True ['--flag']\n"
    assert done.returncode == 1  # what accelerate makes of any failure
