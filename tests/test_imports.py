"""Importing changes nothing, is quick, and points one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gemma_accel"


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def loaded_by(statement: str) -> set[str]:
    return set(python(f"import sys\n{statement}\nprint(*sys.modules)").split())


def test_import_loads_nothing_heavy():
    heavy = {"torch", "transformers", "triton", "pluggy", "trl"}
    assert loaded_by("import gemma_accel") & heavy == set()


def test_import_takes_under_a_third_of_a_second():
    # the fastest of three, so that a busy machine does not fail it: what is bounded is the work,
    # not the weather
    code = (
        "import time; t = time.perf_counter(); import gemma_accel; print(time.perf_counter() - t)"
    )
    assert min(float(python(code)) for _ in range(3)) < 0.3


def test_kernels_load_neither_transformers_nor_pluggy():
    loaded = loaded_by("import gemma_accel.kernels, gemma_accel.kernels.rms_norm")
    assert loaded & {"transformers", "pluggy", "peft"} == set()


def test_importing_the_package_and_its_parts_changes_no_class():
    code = """
import transformers
from transformers.models.gemma4 import modeling_gemma4 as m
before = {n: dict(vars(c)) for n, c in vars(m).items() if isinstance(c, type)}
init, train = transformers.Trainer.__init__, transformers.Trainer.train
from gemma_accel import patching, loading, wiring, callback
after = {n: dict(vars(c)) for n, c in vars(m).items() if isinstance(c, type)}
same = init is transformers.Trainer.__init__ and train is transformers.Trainer.train
print(before == after and same)
"""
    assert python(code).strip() == "True"


def test_every_public_name_resolves():
    code = "import gemma_accel as g; print([n for n in g.__all__ if getattr(g, n, None) is None])"
    assert python(code).strip() == "[]"


def test_no_submodule_bears_the_name_of_a_public_function():
    import gemma_accel

    assert not {path.stem for path in PACKAGE.iterdir()} & (
        set(gemma_accel.__all__) - {"hookspecs"}
    )


# what each may import of the package; everything else of it is forbidden
MAY = {
    "kernels": {"kernels"},
    "hookspecs": {"report"},  # for its annotations only
    "registry": {"errors", "hookspecs"},
    "report": {"errors"},
    "patches": {
        "patches",
        "kernels",
        "hookspecs",
        "errors",
        "hostmemory",
        "memory",
        "report",
        "models",
    },
    "memory": set(),
    "hostmemory": {"kernels"},
    "errors": set(),
}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "gemma_accel"
                else [node.module]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {n.split(".")[1] for n in names if n and n.startswith("gemma_accel.")}
    return found


@pytest.mark.parametrize("part", MAY)
def test_imports_point_one_way(part):
    files = (PACKAGE / part).glob("*.py") if (PACKAGE / part).is_dir() else [PACKAGE / f"{part}.py"]
    for path in files:
        assert imported(path) <= MAY[part], path


def test_kernels_import_torch_and_triton_only():
    for path in (PACKAGE / "kernels").glob("*.py"):
        tree = ast.parse(path.read_text())
        tops = {
            a.name.split(".")[0]
            for n in ast.walk(tree)
            if isinstance(n, ast.Import)
            for a in n.names
        }
        tops |= {
            n.module.split(".")[0]
            for n in ast.walk(tree)
            if isinstance(n, ast.ImportFrom) and n.module
        }
        assert not tops & {"transformers", "pluggy", "peft", "trl", "bitsandbytes", "accelerate"}, (
            path
        )
