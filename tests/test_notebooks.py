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

from classroom.lessons import exercises, read_cells
from tests.outputs import LESSONS, ROOT, stamp

each_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)


def code_cells(lesson):
    return [cell for cell in read_cells(lesson) if cell["cell_type"] == "code"]


@each_lesson
def test_it_runs(lesson, monkeypatch):
    if lesson.stem == "31_expert_parallel" and not hasattr(os, "fork"):
        pytest.skip("its processes are forks, which Windows does not have")
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
def test_it_shows_what_its_code_shows_today(lesson):
    saved = json.loads(lesson.read_text(encoding="utf-8"))["metadata"].get("stamp")
    assert saved == stamp(lesson), (
        f"the code has changed since {lesson.name} was run: make outputs LESSONS={lesson.stem[:2]}"
    )


@each_lesson
def test_it_is_clean(lesson):
    assert "widgets" not in json.loads(lesson.read_text(encoding="utf-8"))["metadata"], (
        "widget state stops some pages from showing it"
    )
    for cell in code_cells(lesson):
        assert cell["execution_count"] is None, f"execution count in cell {cell['id']}: run `make export`"
        assert set(cell["metadata"]) <= {"exercise", "tags"}, f"metadata of cell {cell['id']}: run `make export`"
        assert max(map(len, cell["source"].splitlines()), default=0) <= 120, f"a line of cell {cell['id']} is too long"
        assert not re.search(r"SOLUTION|HIDDEN|(Path|open)\([\"']\.\./", cell["source"]), (
            f"cell {cell['id']} holds a marker or a relative path"
        )
        for output in cell["outputs"]:
            assert output["output_type"] != "error", f"cell {cell['id']} was saved with an error"
            assert output.get("name") != "stderr", f"cell {cell['id']} was saved with a warning or a progress bar"
            assert "widget" not in " ".join(output.get("data", {})), f"cell {cell['id']} was saved with a widget"
    assert lesson.stat().st_size <= 300 * 1024, "over 300 KB: fewer or smaller pictures"


@each_lesson
def test_it_was_saved_with_outputs(lesson):
    cells = code_cells(lesson)
    ends_in_a_value = re.compile(r"[a-z_.]+(, [a-z_.]+)*")
    lost = [
        cell["id"]
        for cell in cells
        if cell["source"].strip()
        and not cell["outputs"]
        and ends_in_a_value.fullmatch(cell["source"].strip().splitlines()[-1])
    ]
    assert not lost, f"cells that end in a value and were saved without it: {lost}"
    if lesson.stem != "90_teaching":
        assert any(output.get("data", {}).get("image/png") for cell in cells for output in cell["outputs"])


@each_lesson
def test_each_exercise_is_checked_in_one_line_by_the_next_cell(lesson):
    cells = {cell["id"]: cell["source"] for cell in read_cells(lesson)}
    for exercise in exercises(read_cells(lesson)):
        assert re.fullmatch(rf"check_{exercise.name}\([\w, ]+\)", cells[exercise.check]), cells[exercise.check]


@each_lesson
def test_it_never_imports_its_own_module(lesson):
    own = re.compile(
        r"import .*\bmakemoe\.NAME\b|from makemoe\.NAME |from makemoe import .*\bNAME\b".replace(
            "NAME", lesson.stem[3:]
        )
    )
    assert not [cell["id"] for cell in code_cells(lesson) if own.search(cell["source"])], (
        "what a reader writes should be what is used"
    )


@pytest.mark.skipif(os.environ.get("MAKEMOE_KERNEL") != "1", reason="slow: set MAKEMOE_KERNEL=1")
@each_lesson
def test_it_runs_in_a_kernel_of_its_own_from_the_folder_of_the_project(lesson, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("MAKEMOE_FAST", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    NotebookClient(nbformat.read(lesson, 4), timeout=300, resources={"metadata": {"path": str(Path(ROOT))}}).execute()
