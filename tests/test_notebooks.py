"""The lessons: each one runs from top to bottom, and is saved the way a reader wants to find it."""

import json
import os
import re
import signal
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from nbdev.test import test_nb as run_notebook  # renamed, or pytest takes it for a test

ROOT = Path(__file__).parent.parent
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)


def read(lesson):
    return json.loads(lesson.read_text(encoding="utf-8"))


def code_cells(lesson):
    return [(cell, "".join(cell["source"])) for cell in read(lesson)["cells"] if cell["cell_type"] == "code"]


@each_lesson
def test_it_runs(lesson, monkeypatch):
    monkeypatch.setenv("MAKEMOE_FAST", "1")
    monkeypatch.setattr("makemoe.lab.FAST", True)  # the lab may have been imported before
    monkeypatch.setenv("MPLBACKEND", "agg")
    threads, ctrl_c = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    ok, _ = run_notebook(lesson, basepath=ROOT, cell_timeout=300)
    plt.close("all")
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, ctrl_c)  # nbdev leaves a handler of its own, which ends the process
    assert ok, "the traceback stands above, with the number of the cell"


@each_lesson
def test_it_is_clean(lesson):
    notebook = read(lesson)
    assert "widgets" not in notebook["metadata"], "widget state stops some pages from showing the notebook"
    for cell, source in code_cells(lesson):
        assert cell["execution_count"] is None, f"execution count in cell {cell['id']}: run `make export`"
        assert set(cell["metadata"]) <= {"nbgrader", "tags"}, f"metadata of cell {cell['id']}: run `make export`"
        for output in cell["outputs"]:
            assert output["output_type"] != "error", f"cell {cell['id']} was saved with an error"
            assert output.get("name") != "stderr", f"cell {cell['id']} was saved with a warning or a progress bar"
            assert "widget" not in " ".join(output.get("data", {})), f"cell {cell['id']} was saved with a widget"
    assert lesson.stat().st_size <= 400 * 1024, "over 400 KB: fewer or smaller pictures"


@each_lesson
def test_it_was_saved_with_outputs(lesson):
    def ends_in_a_value(source):
        last = source.strip().splitlines()[-1]
        return re.fullmatch(r"[a-z_.]+(, [a-z_.]+)*", last) is not None

    lost = [cell["id"] for cell, source in code_cells(lesson) if source.strip() and ends_in_a_value(source) and not cell["outputs"]]
    assert not lost, f"cells that end in a value and were saved without it: {lost}"
    assert any(output.get("data", {}).get("image/png") for cell, _ in code_cells(lesson) for output in cell["outputs"])


@each_lesson
def test_it_never_imports_its_own_module(lesson):
    own = re.compile(rf"makemoe\.{lesson.stem[3:]}\b|from makemoe import .*\b{lesson.stem[3:]}\b")
    guilty = [cell["id"] for cell, source in code_cells(lesson) if own.search(source) and "import" in source]
    assert not guilty, f"{guilty}: a graded cell would then test the shipped solution"


@pytest.mark.skipif(os.environ.get("MAKEMOE_KERNEL") != "1", reason="slow: set MAKEMOE_KERNEL=1")
@each_lesson
def test_it_runs_in_a_kernel_of_its_own(lesson, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("MAKEMOE_FAST", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    NotebookClient(nbformat.read(lesson, 4), timeout=300, resources={"metadata": {"path": str(lesson.parent)}}).execute()
