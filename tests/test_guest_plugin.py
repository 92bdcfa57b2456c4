"""A plugin of somebody else's, installed as a distribution, seen from a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SCRIPT = """
import json, torch
import gemma_accel
from tests import media

batch = media.inputs(images=1, sounds=1)
image = {k: v for k, v in batch.items() if k in ("pixel_values", "image_position_ids")}
stock, model = media.model(), media.model()
expected = media.tower_gradients(stock, image)
report = gemma_accel.apply(model)
got = media.tower_gradients(model, image)
worst = max(((got[n] - want).norm() / want.norm()).item() for n, want in expected.items())
pooler = type(model.model.vision_tower.pooler).__name__
report.restore()
restored = media.tower_gradients(model, image)
print(json.dumps({
    "worst": worst,
    "pooler": pooler,
    "again": type(model.model.vision_tower.pooler).__name__,
    "bitwise": all(torch.equal(restored[n], want) for n, want in expected.items()),
    "report": report.to_dict(),
}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The guest, installed by pip from a copy of its sources: a build leaves files beside them."""
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "guest"
    shutil.copytree(ROOT / "tests/guest_plugin", source)
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    command += ["--no-index", "--quiet", "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def run(script: str, *path: Path, **environment: str) -> subprocess.CompletedProcess:
    places = [str(p) for p in (*path, ROOT)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    return subprocess.run(
        command, env={**env, **environment}, cwd=path[0] if path else ROOT,
        capture_output=True, text=True,
    )  # fmt: skip


def result(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_guest_adds_a_patch_and_deselects_a_modality(site):
    seen = result(run(SCRIPT, site))
    assert seen["pooler"] == "AddingPooler" and seen["again"] == "Gemma4VisionPooler"
    assert seen["worst"] < 1e-4 and seen["bitwise"]
    applied = {(r["patch"], r["modality"]) for r in seen["report"]["applied"]}
    assert ("guest_pooler", "vision") in applied and ("vision_layer", "vision") in applied
    assert not any(modality == "audio" for _, modality in applied)
    reasons = {r["reason"] for r in seen["report"]["skipped"] if r["modality"] == "audio"}
    assert "a plugin deselected it" in reasons
    assert seen["report"]["notes"]["guest"] == "pooled by addition in 1 place(s), audio left alone"


def test_without_the_guest_nothing_of_it_is_there(tmp_path):
    seen = result(run(SCRIPT, tmp_path))
    applied = {(r["patch"], r["modality"]) for r in seen["report"]["applied"]}
    assert not any(patch == "guest_pooler" for patch, _ in applied)
    assert ("audio_layer", "audio") in applied and "guest" not in seen["report"]["notes"]


def test_a_guest_that_does_not_import_is_named(site, tmp_path):
    """The distribution is there, its module is broken: an error that says so, not a silent loss."""
    for entry in site.iterdir():
        (shutil.copytree if entry.is_dir() else shutil.copy)(entry, tmp_path / entry.name)
    (tmp_path / "gemma_accel_guest.py").write_text("raise RuntimeError('broken guest')\n")
    done = run(
        "import gemma_accel; from tests.tiny import tiny_model; gemma_accel.apply(tiny_model())",
        tmp_path,
    )
    assert done.returncode != 0
    assert "PluginError" in done.stderr and "broken guest" in done.stderr
