"""The turns that the stacks' processes take, with processes that need no card."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import bench_media, train_step
from benchmarks.harness import run_work

WORKER = """
import json, sys

spec = json.loads(sys.argv[2])


def say(message):
    print("@" + json.dumps(message), flush=True)


if spec["stack"] == "liger":
    sys.exit("torch.OutOfMemoryError: too little")
times = [0.5 if spec["stack"] == "trl" else 0.25] * spec["steps"]
for step, time in enumerate(times):
    say({"ready": step})
    sys.stdin.readline()
    with open(spec["output_dir"], "a") as order:
        order.write(f"{spec['work']} {spec['stack']} {step}\\n")
    say({"done": time})
print("a line of its own")
losses = {"losses": times, "load_peak_gib": 1.0, "peak_reserved_gib": 2.0}
say({"result": {**losses, "step_s": times[-1], "step_s_all": times}})
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    (tmp_path / "stand_in.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for module in (train_step, bench_media):
        monkeypatch.setattr(module, "MODULE", "stand_in")
        monkeypatch.setattr(module, "build_apart", lambda model, directory: "")
    return tmp_path


def run(monkeypatch, folder, *arguments):
    command = ["train_step", *arguments, "--directory", str(folder), "--out", str(folder / "o")]
    monkeypatch.setattr(sys, "argv", command)
    train_step.main()
    order = (folder / "out").read_text().splitlines()
    return json.loads((folder / "o").read_text()), order


def test_stacks_take_their_steps_in_turn(monkeypatch, stand_in, capsys):
    stacks = "trl,liger,gemma_accel:3.0@7"
    out, order = run(monkeypatch, stand_in, "--works", f"W1={stacks}", "W3", "--steps", "2")
    expected = [
        f"{work} {stack} {step}"
        for work in ("W1", "W3")
        for step in range(2)
        for stack in ("trl", "gemma_accel")
    ]
    assert order == expected
    rows = {(row["work"], row["label"]): row for row in out["rows"]}
    ours = rows["W1", "gemma_accel:3.0@7"]
    assert (ours["vram_gib"], ours["cap_gib"], ours["speedup_over_trl"]) == (3.0, 7.0, 2.0)
    assert ours["tokens_per_second"] == 2 * 2048 / 0.25
    assert "OutOfMemoryError" in rows["W1", "liger"]["error"]
    assert "speedup_over_trl" not in rows["W1", "liger"]
    assert "out of memory" in capsys.readouterr().out
    log = stand_in / "logs" / "00-W1-trl.log"
    assert log.read_text() == "a line of its own\n"


def test_a_work_that_is_named_twice_is_done_twice(monkeypatch, stand_in):
    out, _ = run(monkeypatch, stand_in, "--works", "W1=trl", "W1=trl", "--steps", "2")
    assert [row["stack"] for row in out["rows"]] == ["trl", "trl"]


def test_one_after_the_other_where_they_do_not_fit(monkeypatch, stand_in):
    _, order = run(monkeypatch, stand_in, "--apart", "--steps", "2")
    assert order == [f"W1 {stack} {step}" for stack in ("trl", "gemma_accel") for step in range(2)]


def test_a_run_that_is_cut_short_has_what_it_did(monkeypatch, stand_in):
    def cut(workers):
        if workers[0].spec["stack"] == "unsloth":
            raise KeyboardInterrupt
        return run_work(workers)

    monkeypatch.setattr(train_step, "run_work", cut)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, stand_in, "--apart", "--stacks", "trl", "gemma_accel", "unsloth")
    rows = json.loads((stand_in / "o").read_text())["rows"]
    assert [(row["stack"], row["speedup_over_trl"]) for row in rows] == [
        ("trl", 1.0),
        ("gemma_accel", 2.0),
    ]


def test_seeds_are_compared_with_their_own(monkeypatch, stand_in):
    out, _ = run(monkeypatch, stand_in, "--seeds", "0", "1", "--steps", "2")
    seen = [(row["stack"], row["seed"], row["speedup_over_trl"]) for row in out["rows"]]
    assert seen == [(s, seed, x) for s, x in (("trl", 1), ("gemma_accel", 2)) for seed in (0, 1)]


def test_no_time_is_given_where_all_step_at_once(monkeypatch, stand_in):
    out, _ = run(monkeypatch, stand_in, "--together", "--steps", "2")
    assert not any("step_s" in row or "tokens_per_second" in row for row in out["rows"])


def test_media(stand_in):
    rows = bench_media.main(str(stand_in / "m"), works=("sound",), directory=str(stand_in))
    assert [row["speedup_over_trl"] for row in rows[1:]] == [2.0, 2.0]
    assert json.loads((stand_in / "m").read_text())["rows"] == rows


def test_a_file_says_how_it_was_made(monkeypatch, stand_in):
    out, _ = run(monkeypatch, stand_in, "--steps", "2")
    assert out["command"].endswith(f"--steps 2 --directory {stand_in.name} --out o")
    assert out["commit"] and out["versions"]["torch"] and out["card"]
