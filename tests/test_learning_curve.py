"""The learning curve: its text, its model, its verdict, and the whole way in miniature."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import trl
from packaging.version import Version
from transformers import Gemma4ForCausalLM

from benchmarks import learning_curve
from benchmarks.learning_curve import CONTROL, SIZES, Run, config_of, main, summary, text
from gemma_accel.kernels.attention import HEAD_SIZES

pytest.importorskip("pydoc_data.topics")


def test_held_out_text_was_not_learnt_elsewhere():
    train, held_out = (part.split("\n\n") for part in text())
    assert len(held_out) > 100 and not set(train) & set(held_out)


def test_every_branch_is_on_in_a_few_million_parameters():
    with torch.device("meta"):
        model = Gemma4ForCausalLM(config_of(SIZES["small"]))
    config, layers = model.config, model.model.layers
    assert config.hidden_size_per_layer_input and config.num_kv_shared_layers
    assert layers[-1].mlp.up_proj.out_features == 2 * layers[0].mlp.up_proj.out_features
    own, sharing = (set(config.layer_types[part]) for part in (slice(-2), slice(-2, None)))
    assert own == sharing == {"sliding_attention", "full_attention"}  # both kinds share
    sizes = {layer.self_attn.head_dim for layer in layers}
    assert len(sizes) == 2 and sizes <= set(HEAD_SIZES)
    assert config.sliding_window < SIZES["small"].length  # or no window would be seen


def row(stack, seed, losses):
    return {"stack": stack, "seed": seed, "losses": losses, "eval_losses": losses}


class TestVerdict:
    STOCK = [row("trl", 0, [3.0, 2.0]), row("trl", 1, [3.2, 2.1])]

    def test_within(self):
        ours = [row("gemma_accel", 0, [3.01, 2.0]), row("gemma_accel", 1, [3.2, 2.12])]
        found = summary(self.STOCK + ours)
        assert found["training"]["within"] and found["held_out"]["within"]
        assert found["training"]["stock_spread"] == pytest.approx(0.1)
        assert found["training"]["largest_gap_of_means"] == pytest.approx(0.01)

    def test_beyond(self):
        ours = [row("gemma_accel", 0, [3.1, 2.3]), row("gemma_accel", 1, [3.1, 2.3])]
        assert not summary(self.STOCK + ours)["training"]["within"]

    def test_control_is_beside_it(self):
        ours = [{**r, "stack": "gemma_accel"} for r in self.STOCK]
        found = summary(self.STOCK + ours + [row(CONTROL, 0, [3.1, 2.0])])
        assert found["training"]["largest_gap_of_means"] == 0
        assert found["training"]["largest_gap_of_eager_attention"] == pytest.approx(0.05)

    def test_a_failed_run_is_no_verdict(self):
        with pytest.raises(ValueError, match="gemma_accel, seed 1: exit 1"):
            summary([*self.STOCK, {"stack": "gemma_accel", "seed": 1, "error": "exit 1: boom"}])

    def test_one_seed_is_no_spread(self):
        with pytest.raises(ValueError, match="two seeds"):
            summary([self.STOCK[0], row("gemma_accel", 0, [3.0, 2.0])])


def test_a_process_that_dies_is_a_row_with_its_last_words(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho out of memory >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    run = Run({"stack": "trl", "seed": 0, "dtype": "float32"}, tmp_path / "log")
    run.thread.join()
    assert run.row()["error"] == "exit 3: out of memory"


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cuda.is_available() and Version(trl.__version__) < Version("1.16"),
    reason="TRL before 1.16 computes its loss on a GPU only",
)
def test_the_whole_way(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the references, as without a GPU
    monkeypatch.setenv("BENCH_COMMIT", "abc1234")
    file = tmp_path / "results" / "curve.json"
    arguments = ["--size", "tiny", "--seeds", "0", "1", "--parallel", "2", "--out", str(file)]
    assert main(arguments) == 0
    results = json.loads(file.read_text())
    assert results["commit"] == "abc1234" and results["versions"]["trl"] == trl.__version__
    assert len(results["rows"]) == 4
    for one in results["rows"]:
        assert len(one["losses"]) == SIZES["tiny"].steps
        assert one["eval_steps"] == [0, 2, 4]
        assert one["eval_losses"][-1] < one["eval_losses"][0] - 0.05
    stock, ours = results["rows"][:2]
    assert (stock["stack"], ours["stack"], stock["seed"]) == ("trl", "gemma_accel", ours["seed"])
    assert {"attention", "decoder_layer", "per_layer_embeddings"} <= set(ours["applied"])
    assert ours["losses"][0] == pytest.approx(stock["losses"][0], abs=2e-3)
    assert ours["losses"] != results["rows"][3]["losses"]  # another seed is another run

    assert main(["--check", str(file)]) == 0
    assert "within it" in capsys.readouterr().out
    for one in results["rows"]:
        if one["stack"] == "gemma_accel":
            one["eval_losses"] = [loss + 1 for loss in one["eval_losses"]]
    file.write_text(json.dumps(results))
    assert main(["--check", str(file)]) == 1
    assert "BEYOND" in capsys.readouterr().out


def test_nothing_to_do_is_an_error(capsys):
    with pytest.raises(SystemExit):
        learning_curve.main([])
    assert "--out or --check" in capsys.readouterr().err
