"""Lesson 90: what students are given, and what becomes of what they hand in.

Most submissions are for a lesson of two exercises that needs no torch: its kernel starts in a second.
"""

import ast
import contextlib
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from answers import names
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from makemoe import classroom
from makemoe.classroom import collect, exported, find_lessons, grade, mark, needed_modules, recognise, release, restore, samples

LESSONS = find_lessons()
each_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)


def table(folder):
    "{student: line of grades.csv as a dict} for a folder of submissions that was graded."
    with open(folder.with_name(folder.name + "-grades") / "grades.csv", encoding="utf-8-sig", newline="") as file:
        return {line["student"]: line for line in csv.DictReader(file)}


# ---- what students are given


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "A release of all lessons."
    tree = tmp_path_factory.mktemp("release") / "assignments"
    release(tree)
    return tree


def test_a_release_holds_all_lessons_and_no_solution(tree):
    assert sorted(path.name for path in (tree / "notebooks").iterdir()) == [path.name for path in LESSONS]
    for path in (tree / "notebooks").iterdir():
        text = path.read_text(encoding="utf-8")
        assert "NotImplementedError" in text and not re.search("(BEGIN|END) (SOLUTION|HIDDEN)", text)
    assert not [path for path in tree.rglob("*") if path.name in ("classroom.py", "90_teaching.ipynb", "answers", "_modidx.py")]


def test_a_release_says_what_to_install(tree):
    lines = (tree / "requirements.txt").read_text(encoding="utf-8").splitlines()
    named = [re.match(r"[a-z-]+", line)[0] for line in lines if line and line[0] != "#"]
    assert {"torch", "jupyter", "nbgrader", "pytest", "hypothesis"} <= set(named) and len(named) == len(set(named))
    for name in "README.md", "LICENSE", "pyproject.toml", "makemoe/__main__.py", "data/shakespeare.txt", "data/lab.safetensors":
        assert (tree / name).is_file(), name


def test_a_release_is_never_written_over_another(tree):
    with pytest.raises(FileExistsError, match="exists already"):
        release(tree)


@each_lesson
def test_one_lesson_ships_modules_of_earlier_ones_only(lesson):
    earlier = {path.stem[3:] for path in LESSONS[: LESSONS.index(lesson)]}
    if lesson.stem == "00_lab":
        pytest.skip("lesson 00 shows the finished model: it alone looks ahead")
    assert needed_modules([lesson]) <= earlier | {"lab"}


@each_lesson
def test_what_a_lesson_exports_is_its_module(lesson):
    def code(text):
        body = [ast.unparse(node) for node in ast.parse(text).body]
        return [re.sub(r"from \.(\w+) import", r"from makemoe.\1 import", node) for node in body]

    ours = code((classroom.ROOT / "makemoe" / f"{lesson.stem[3:]}.py").read_text(encoding="utf-8"))
    assert ours[0].startswith(("'", '"')) and ours[1].startswith("__all__")
    assert code(exported(nbformat.read(lesson, 4))) == ours[2:]


def test_the_tests_of_a_student_test_her_notebook_and_nothing_else_of_hers(tree):
    "Lesson 04 is not solved and red, though makemoe/gating.py is there. Lesson 05 is solved and green, though her gating is not."
    samples(tree / "solved", ["05"])
    shutil.copy(tree / "solved" / "full" / "05_noisy_gating.ipynb", tree / "notebooks")
    for lesson, expected in ("gating", 1), ("noisy_gating", 0):
        command = [sys.executable, "-m", "pytest", "--color=no", "-x", f"tests/test_{lesson}.py"]
        run = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=300)
        assert run.returncode == expected, run.stdout + run.stderr
        assert ("NotImplementedError" in run.stdout) == bool(expected)
        assert [path.name for path in (tree / "mine").glob("*.py")] == [f"{lesson}.py"]


def test_without_her_notebook_nothing_is_tested(tree):
    code = (tree / "conftest.py").read_text(encoding="utf-8")
    conftest = {"__file__": str(tree / "conftest.py")}
    exec(compile(code, "conftest.py", "exec"), conftest)
    given = tree / "notebooks" / "06_sparse_moe.ipynb"
    given.rename(tree / "kept")
    with pytest.raises(pytest.exit.Exception, match="has it been renamed"):
        conftest["export"]("sparse_moe")
    given.write_text("")
    with pytest.raises(pytest.exit.Exception, match="not a notebook any more"):
        conftest["export"]("sparse_moe")
    (tree / "kept").replace(given)


# ---- full marks and none, in this process, for every lesson


def score(notebook):
    "Points of a notebook of our own, run in this process: graded cells, and of all others those that bind what they need."
    needed, kept = set(), []
    for cell in reversed([cell for cell in notebook.cells if cell.cell_type == "code"]):
        if not re.search(r"^\s*[!%]", cell.source, re.MULTILINE):
            bound, read = names(cell.source)
            if mark(cell) or needed & bound:
                needed = needed - bound | read
                kept.insert(0, cell)
    points, namespace = 0, {"__name__": "__main__"}
    for cell in kept:
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                exec(compile(cell.source, cell.id, "exec"), namespace)
                points += mark(cell).get("points", 0)
            except Exception as error:
                last = error
    return points, locals().get("last")


def most(lesson):
    return sum(mark(cell).get("points", 0) for cell in nbformat.read(lesson, 4).cells)


@pytest.fixture
def in_notebooks(monkeypatch):
    monkeypatch.setenv("MAKEMOE_FAST", "1")
    monkeypatch.setattr("makemoe.lab.FAST", True)
    monkeypatch.chdir(classroom.ROOT / "notebooks")


@each_lesson
def test_our_solution_gets_full_marks_and_what_students_are_given_none(lesson, in_notebooks):
    points, error = score(nbformat.read(lesson, 4))
    assert points == most(lesson), repr(error)
    assert score(classroom.without_solutions(lesson))[0] == 0


# ---- the same through nbgrader: one real lesson here, another one in lesson 90 itself


def test_a_real_lesson_through_nbgrader(tmp_path):
    samples(tmp_path / "class", ["03"])
    shutil.rmtree(tmp_path / "class" / "half")
    grade(tmp_path / "class")
    marks = table(tmp_path / "class")
    assert marks["full"]["score"] == marks["full"]["max"] == str(most(find_lessons(["03"])[0]))
    assert marks["empty"]["score"] == "0" and "not solved" in marks["empty"]["message"]


# ---- a small lesson, and what can be handed in for it

DOUBLE = "#| export\ndef double(x):\n    ### BEGIN SOLUTION\n    return 2 * x\n    ### END SOLUTION"
TRIPLE = "#| export\ndef triple(x):\n    ### BEGIN SOLUTION\n    return 3 * x\n    ### END SOLUTION"
CHECKS = {
    "toy-double-check": "assert isclose(double(2), 4), 'two times two'\n### BEGIN HIDDEN TESTS\nassert double(3) == 6\n### END HIDDEN TESTS",
    "toy-triple-check": "assert isclose(triple(1), three), f'three, not {triple(1)}'",
}


def small_lesson():
    def cell(name, source, points=None):
        solution = points is None
        about = dict(grade_id=name, schema_version=3, solution=solution, grade=not solution, locked=not solution, task=False)
        return new_code_cell(source, id=name, metadata={"nbgrader": about if solution else about | dict(points=points)})

    cells = [new_markdown_cell("# Toy", id="title"), new_code_cell("#| default_exp toy", id="default-exp"),
             new_code_cell("#| export\nfrom math import isclose", id="imports"), cell("toy-double", DOUBLE),
             cell("toy-double-check", CHECKS["toy-double-check"], 2), new_code_cell("three = 3", id="three"),
             cell("toy-triple", TRIPLE), cell("toy-triple-check", CHECKS["toy-triple-check"], 3)]
    return new_notebook(cells=cells, metadata={"kernelspec": dict(name="python3", language="python", display_name="Python 3")})


def small_project(root):
    for name in "makemoe", "notebooks", "data", "benchmarks":
        (root / name).mkdir(parents=True)
    (root / "makemoe" / "__init__.py").touch()
    (root / "makemoe" / "toy.py").write_text("from math import isclose\ndef double(x): return 2 * x\ndef triple(x): return 3 * x\n")
    nbformat.write(small_lesson(), root / "notebooks" / "04_toy.ipynb")


def body(text):
    return "#| export\ndef triple(x):\n    " + text.replace("\n", "\n    ")


def solved(**changes):
    "The small lesson as a good student hands it in, but for `changes`: {cell, with _ for -: source}."
    notebook = small_lesson()
    for cell in notebook.cells:
        cell.source = changes.get(cell.id.replace("-", "_"), re.sub(r"### BEGIN HIDDEN.*", "", cell.source, flags=re.DOTALL))
    return notebook


def without(notebook, *ids):
    notebook.cells = [cell for cell in notebook.cells if cell.id not in ids]
    return notebook


def bare():
    "All metadata and all ids lost, as some tools do."
    notebook = solved()
    for cell in notebook.cells:
        cell.metadata = {}
        del cell["id"]
    return notebook | dict(nbformat_minor=4)


def other_kernel():
    return solved() | dict(metadata={"kernelspec": dict(name="julia-1.9", language="julia", display_name="Julia")})


def with_helper_below():
    "Her helper stands below the solution that calls it, and the cell that grades it is gone."
    notebook = without(solved(toy_triple=body("return helper(x) * x")), "toy-triple-check")
    notebook.cells.append(new_code_cell("def helper(x):\n    return 3"))
    return notebook


def pasted_twice():
    "A solution cell that was copied, mark and all: in Jupyter the later one counts."
    notebook = solved(toy_triple=body("return 0"))
    again = nbformat.from_dict(notebook.cells[6] | dict(id="again", source=TRIPLE))
    notebook.cells.insert(7, again)
    return notebook


HANDED_IN = {  # student: (what is handed in, under which name, points, a part of the message)
    "Anna [1] Ünal": (solved(), "homework final (2).ipynb", 5, "read from homework final (2).ipynb"),
    "other kernel": (other_kernel(), "04_toy.ipynb", 5, ""),
    "marks lost": (bare(), "04_toy(1).ipynb", 5, "read from 04_toy(1).ipynb"),
    "tests deleted": (without(solved(toy_triple=body("return 4")), "toy-double-check", "toy-triple-check"), "04_toy.ipynb", 2,
                      "put back as they were: toy-double-check, toy-triple-check; toy-triple: three, not 4"),
    "tests overwritten": (solved(toy_double="double = None", toy_double_check="pass", toy_triple_check="assert True"), "04_toy.ipynb", 3,
                          "put back as they were"),
    "only the visible": (solved(toy_double="def double(x): return 4"), "04_toy.ipynb", 3, "toy-double: an assertion failed"),
    "solution deleted": (without(solved(), "toy-double", "toy-double-check"), "04_toy.ipynb", 3, "toy-double: not solved"),
    "helper below": (with_helper_below(), "04_toy.ipynb", 5, "put back as they were: toy-triple-check"),
    "pasted twice": (pasted_twice(), "04_toy.ipynb", 5, ""),
    "syntax error": (solved(toy_triple="def triple(x:\n"), "04_toy.ipynb", 2, "toy-triple: SyntaxError"),
    "warning": (solved(toy_triple=body("import warnings\nwarnings.warn('careful')\nreturn 3 * x")), "04_toy.ipynb", 5, ""),
    "our module": (solved(toy_double="from makemoe.toy import *", toy_triple="pass"), "04_toy.ipynb", 0, "toy-double: not solved"),
    "own isclose": (solved(toy_double="isclose = lambda a, b: True\ndef double(x): return 6", toy_triple="triple = abs"), "04_toy.ipynb", 0,
                    "toy-double: two times two"),
    "sys.exit": (solved(toy_triple=body("import sys\nsys.exit()")), "04_toy.ipynb", 2, "toy-triple: SystemExit"),
    "os._exit": (solved(toy_triple=body("import os\nos._exit(0)")), "04_toy.ipynb", 2,
                 "toy-triple: NotRun: the kernel was lost in cell toy-triple-check"),
    "os._exit at once": (solved(toy_double="import os\nos._exit(0)"), "04_toy.ipynb", 0, "toy-triple: NotRun"),
    "endless": (solved(toy_triple=body("while True:\n    pass")), "04_toy.ipynb", 2, "toy-triple: stopped, as it took too long"),
    "endless and deaf": (solved(toy_triple=body("import signal\nsignal.signal(2, signal.SIG_IGN)\nwhile True:\n    pass")), "04_toy.ipynb", 2,
                         "toy-triple: NotRun: the kernel was lost"),
    "endless printing": (solved(toy_triple=body("while True:\n    print('x' * 99)")), "04_toy.ipynb", 2, "toy-triple: stopped"),
    "not JSON": ("hello", "04_toy.ipynb", 0, "04_toy.ipynb cannot be graded: NotJSONError"),
    "empty file": ("", "toy.ipynb", 0, "toy.ipynb cannot be graded: NotJSONError"),
    "odd JSON": ("[1, 2]", "04.ipynb", 0, "04.ipynb cannot be graded"),
    "zipped": ("PK", "04_toy.zip", 0, "nothing to grade, only 04_toy.zip"),
}


@pytest.fixture(scope="module")
def handed_in(tmp_path_factory):
    "All of these, graded."
    folder = tmp_path_factory.mktemp("small")
    small_project(folder / "project")
    for student, (what, name, _, _) in HANDED_IN.items():
        file = folder / "class" / student / name
        file.parent.mkdir(parents=True)
        file.write_text(what if isinstance(what, str) else json.dumps(what), encoding="utf-8")
    (folder / "class" / "nobody").mkdir()
    shutil.copytree(folder / "class" / "Anna [1] Ünal", folder / "class" / "twice")
    shutil.copy(folder / "class" / "twice" / "homework final (2).ipynb", folder / "class" / "twice" / "04_toy.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classroom, "ROOT", folder / "project")
        grade(folder / "class", seconds=10)
    return folder / "class"


@pytest.mark.parametrize("student", HANDED_IN)
def test_what_is_handed_in(student, handed_in):
    _, _, points, message = HANDED_IN[student]
    line = table(handed_in)[student]
    assert (line["score"], line["max"]) == (str(points), "5"), line["message"]
    assert message in line["message"]
    if points == 5 and not message:
        assert line["message"] == ""


def test_every_student_has_a_line_and_a_page(handed_in):
    students = sorted([*HANDED_IN, "nobody", "twice"])
    assert list(table(handed_in)) == students
    pages = handed_in.with_name("class-grades") / "feedback"
    for student in students:
        page = (pages / student / "04_toy.html").read_text(encoding="utf-8")
        assert student in page and "toy-double" in page
        assert page.count("</html>") <= 1 and len(page) < 2e6
    assert "three, not 4" in (pages / "tests deleted" / "04_toy.html").read_text(encoding="utf-8")


def test_nothing_and_too_much(handed_in):
    lines = table(handed_in)
    assert (lines["nobody"]["score"], lines["nobody"]["message"]) == ("0", "nothing to grade")
    assert lines["twice"]["score"] == "0" and "more than one notebook is this lesson" in lines["twice"]["message"]


def test_points_stand_in_columns(handed_in):
    line = table(handed_in)["syntax error"]
    assert list(line) == ["student", "lesson", "toy-double", "toy-triple", "score", "max", "message"]
    assert (line["lesson"], line["toy-double"], line["toy-triple"]) == ("04_toy", "2", "0")


# ---- recognising and restoring, without a kernel


@each_lesson
def test_a_lesson_is_recognised_under_any_name(lesson, tmp_path):
    exercises = {path: classroom.names_in(path)[0] for path in LESSONS}
    nbformat.write(classroom.without_solutions(lesson), tmp_path / "99_x.ipynb")
    assert recognise(tmp_path / "99_x.ipynb", exercises) == lesson


def test_a_file_that_could_be_any_lesson_is_none(tmp_path):
    exercises = {path: classroom.names_in(path)[0] for path in LESSONS}
    for name in "homework.ipynb", "0_gating.ipynb", "my 04.ipynb":
        (tmp_path / name).write_text("{}")
        assert recognise(tmp_path / name, exercises) is None


def test_folders_of_tools_are_not_submissions(tmp_path):
    for folder in "anna/.ipynb_checkpoints", "anna/__MACOSX", ".git":
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(LESSONS[0], tmp_path / folder)
    assert collect(tmp_path) == {tmp_path / "anna": {}}


@each_lesson
def test_an_untouched_lesson_is_restored_to_itself(lesson):
    notebook, restored = restore(classroom.without_solutions(lesson), lesson)
    ours = nbformat.read(lesson, 4)
    assert not restored and [cell.id for cell in notebook.cells] == [cell.id for cell in ours.cells]
    for cell, original in zip(notebook.cells, ours.cells):
        assert cell.source == original.source or mark(cell).get("solution")


def test_cells_are_known_by_their_mark_whatever_their_ids(tmp_path):
    "Jupyter draws an id for a new cell, and some tools draw new ones on saving."
    small_project(tmp_path)
    ours, theirs = small_lesson(), solved(toy_double="def double(x): return x + x")
    for number, (cell, other) in enumerate(zip(ours.cells, theirs.cells)):
        cell.id, other.id = f"ours-{number}", f"theirs-{number}"
    nbformat.write(ours, tmp_path / "notebooks" / "04_toy.ipynb")
    notebook, restored = restore(theirs, tmp_path / "notebooks" / "04_toy.ipynb")
    assert not restored and [cell.id for cell in notebook.cells] == [cell.id for cell in ours.cells]
    assert notebook.cells[3].source == "def double(x): return x + x" and "HIDDEN" in notebook.cells[4].source


# ---- the command


def status(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["classroom", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        classroom.main()
    return end.value.code, capsys.readouterr().err


def test_errors_are_one_line_and_status_2(monkeypatch, capsys, tmp_path):
    code, text = status(monkeypatch, capsys, "release", tmp_path / "new", "41")
    assert code == 2 and text.startswith("makemoe.classroom: there is no lesson '41'") and text.count("\n") == 1
    code, text = status(monkeypatch, capsys, "grade", tmp_path / "missing")
    assert code == 2 and "there is no folder" in text
    code, text = status(monkeypatch, capsys, "grade", tmp_path)
    assert code == 2 and "found no lesson" in text
    assert not list(tmp_path.iterdir())


def test_without_nbgrader_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "nbgrader", None)
    code, text = status(monkeypatch, capsys, "samples", tmp_path / "new")
    assert code == 2 and text == "makemoe.classroom: nbgrader is missing: pip install -e '.[dev]'\n"
