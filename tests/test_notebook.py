"""The notebook, executed from top to bottom the offline way, in a Jupyter kernel."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
import trl
from packaging.version import Version

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "gemma4_8gb.ipynb"
LEFT_BEHIND = """
from transformers import PreTrainedModel
print([type(o).__name__ for o in gc.get_objects() if isinstance(o, PreTrainedModel)])
"""  # put after the cell that lets go of the first model


def read():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_it_is_committed_without_outputs():
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert cells
    assert not any(cell.outputs or cell.execution_count for cell in cells)


def test_it_names_the_real_checkpoints_and_two_lines():
    source = "\n".join(cell.source for cell in read().cells)
    assert "google/gemma-4-E2B-it" in source and "google/gemma-4-E4B-it" in source
    assert source.count("# the first line") == source.count("# the second line") == 1


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """What each code cell showed as text, by the heading above it."""
    if not torch.cuda.is_available() and Version(trl.__version__) < Version("1.16"):
        pytest.skip("TRL before 1.16 computes its loss on a GPU only")
    notebook, directory = read(), tmp_path_factory.mktemp("notebook")
    (position,) = (n for n, cell in enumerate(notebook.cells) if cell.source.count("del trainer"))
    notebook.cells.insert(position + 1, nbformat.v4.new_code_cell(LEFT_BEHIND))
    client = nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": directory}}
    )
    environment = {
        **os.environ,
        "GEMMA_ACCEL_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "TRITON_INTERPRET": "0",  # the references, as without a GPU
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "IPYTHONDIR": str(directory / "ipython"),  # nobody's history, nobody's settings
    }
    client.execute(env=environment)
    printed, heading = {}, ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = re.match(r"#+ (.*)", cell.source)[1]
        else:
            printed.setdefault(heading, []).append("".join(map(shown, cell.outputs)))
    return printed


def shown(output):
    if output.output_type == "display_data":  # rich, which knows a notebook when it sees one
        return re.sub(r"\x1b\[[\d;]*m", "", output.data.get("text/plain", ""))  # without colours
    return output.text if output.get("name") == "stdout" else ""


def test_it_says_whether_it_fits(executed):
    assert "fits 7 GiB" in executed["Will it fit?"][0]


def test_it_trains_an_applied_model(executed):
    (text,) = executed["Train"]
    assert re.search(r"decoder_layer +│ text +│ +6 │ applied", text)
    assert re.search(r"lora +│ text +│ +18 │ applied", text)


def test_it_shows_the_memory(executed):
    (text,) = executed["The memory"]
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", text)]
    assert len(losses) == 8 and losses[-1] < losses[0] / 5
    assert "tokens_per_second" in text and "GiB planned" in text


def test_it_learns_saves_and_reloads(executed):
    answer = "Isbel Crane has kept it since the winter of 1987."
    assert answer not in executed["Something to learn"][0]
    assert f"after:    {answer}" in executed["Before and after"][0]
    saved, left_behind, again = executed["Save, and reload"]
    assert "adapter_model.safetensors" in saved
    assert left_behind.strip() == "[]"  # the second model is loaded where the first one was
    assert again.strip() == answer
