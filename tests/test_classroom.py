"""What learners and students are given, and what becomes of what they hand in.

Submissions are for a lesson of two small exercises, in a project of its own. They are all graded in one call.
"""

import ast
import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from classroom import collecting, grading, handout, lessons, workplace
from classroom.handout import learn, lesson_to_solve, needed_modules, release
from classroom.lessons import ROOT, exercises, find_lessons, module_of, read_cells, stub

LESSONS = find_lessons()
each_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)


# what is given


def answers_of(lesson):
    "(exercise, the cell that answers it) of a lesson."
    cells = {cell["id"]: cell for cell in read_cells(lesson)}
    return [(exercise, cells[exercise.cell]) for exercise in exercises(cells.values())]


def body_of(source, name):
    "The statements of a function or method, without its docstring, as text."
    nodes = ast.parse(source).body
    for part in name.split("."):
        node = next(node for node in nodes if getattr(node, "name", None) == part)
        nodes = node.body
    return [ast.unparse(statement) for statement in nodes[ast.get_docstring(node) is not None :]]


@each_lesson
def test_a_stub_keeps_what_is_given_and_nothing_of_the_answer(lesson):
    for exercise, cell in answers_of(lesson):
        text = stub(cell["source"], exercise)
        for name in exercise.write:
            given = exercise.given.get(name, 0)
            assert body_of(text, name) == body_of(cell["source"], name)[:given] + ["raise NotImplementedError"]
        assert len(exercise.hint.split()) > 3 and 1 <= exercise.stars <= 3 and exercise.minutes > 0


@each_lesson
def test_a_lesson_gives_10_to_20_points_and_names_no_exercise_twice(lesson):
    known = [exercise for exercise, _ in answers_of(lesson)]
    assert 10 <= sum(exercise.points for exercise in known) <= 20
    assert len({exercise.name for exercise in known}) == len(known)


@each_lesson
def test_a_learner_gets_hints_answers_and_pictures_and_a_student_no_answers(lesson):
    mine, theirs = (
        lesson_to_solve(lesson, answers=True, finished=True),
        lesson_to_solve(lesson, answers=False, finished=False),
    )
    pictures = [
        sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
        for cells in (read_cells(lesson), mine["cells"], theirs["cells"])
    ]
    assert pictures[0] > 0 and len(set(pictures)) == 1
    texts = ["".join(part for cell in notebook["cells"] for part in cell["source"]) for notebook in (mine, theirs)]
    for exercise, cell in answers_of(lesson):
        answer = cell["source"].removeprefix("#| export\n")
        assert answer in texts[0] and answer not in texts[1]
        assert exercise.hint in texts[0] and exercise.hint in texts[1]
    ids = [cell["id"] for cell in mine["cells"]]
    assert len(ids) == len(set(ids))


def test_learn_never_writes_over_what_is_there(tmp_path, capsys):
    learn(tmp_path / "learn")
    assert sorted(path.name for path in (tmp_path / "learn").iterdir()) == [path.name for path in LESSONS]
    (tmp_path / "learn" / LESSONS[0].name).write_text("mine")
    (tmp_path / "learn" / LESSONS[1].name).unlink()
    learn(tmp_path / "learn")
    assert (tmp_path / "learn" / LESSONS[0].name).read_text() == "mine" and (
        tmp_path / "learn" / LESSONS[1].name
    ).exists()
    assert f"1 new lessons, {len(LESSONS) - 1} that were there" in capsys.readouterr().out


@each_lesson
def test_one_lesson_ships_modules_of_earlier_ones_only(lesson):
    earlier = {module_of(path) for path in LESSONS[: LESSONS.index(lesson)]} | {"lab"}
    if module_of(lesson) not in ("lab", "generation"):  # these two show the finished model
        assert needed_modules([lesson]) <= earlier


def test_a_release_stands_alone_and_holds_nothing_of_the_teacher(tmp_path):
    out = tmp_path / "week4"
    release(out, ("04",))
    assert (
        not (out / "makemoe" / "gating.py").exists()
        and not list(out.rglob("hidden"))
        and not list(out.rglob("answers"))
    )
    code = "import makemoe.checks.gating, makemoe.experts; print(makemoe.checks.__file__)"
    where = subprocess.run([sys.executable, "-c", code], cwd=out, capture_output=True, text=True, check=True).stdout
    assert where.startswith(str(out))
    with pytest.raises(FileExistsError, match="exists already"):
        release(out, ("04",))


# what is handed in

LESSON = {
    "imports": "#| export\nimport torch",
    "helper": "def loop_double(x):\n    return torch.stack([2 * one for one in x])",
    "double": '#| export\ndef double(x):\n    "Twice x, a tensor."\n    return 2 * x',
    "double-check": "check_double(double)",
    "train": "assert False, 'nothing here is run when answers are graded'",
    "triple": '#| export\ndef triple(x):\n    "Three times x, a tensor."\n    return double(x) + x',
    "triple-check": "check_triple(triple)",
}
CHECK = """
import torch
from makemoe.checks import check, close

@check
def check_{name}({name}):
    yield "it is {times} times as much"
    close({name}(torch.tensor([{value}])), torch.tensor([{times} * {value}]))
"""


def notebook(sources):
    "A notebook as JSON: {id: source}, where the ids of prose begin with text."
    cells = [
        dict(cell_type="markdown" if name.startswith("text") else "code", id=name, metadata={}, source=source)
        for name, source in sources.items()
    ]
    for cell in cells:
        if cell["cell_type"] == "code":
            cell |= dict(outputs=[], execution_count=None)
        if cell["id"] in ("double", "triple"):
            points = {"double": 2, "triple": 3}[cell["id"]]
            cell["metadata"] = {
                "exercise": dict(write=[cell["id"]], points=points, stars=1, minutes=5, hint="Think of a product.")
            }
    return dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A project with one lesson, on which all of `classroom` works while the tests of this file run."
    root = tmp_path_factory.mktemp("project")
    for name in "notebooks", "data", "benchmarks/results", "makemoe/checks", "classroom/hidden":
        (root / name).mkdir(parents=True)
    (root / "notebooks" / "04_toy.ipynb").write_text(json.dumps(notebook(LESSON)))
    for name in "makemoe/__init__.py", "makemoe/lab.py":
        (root / name).write_text("")
    shutil.copy(ROOT / "makemoe/checks/__init__.py", root / "makemoe/checks")
    for folder, values in ("makemoe/checks", (1.0, 5.0)), ("classroom/hidden", (2.0, 4.0)):
        text = "".join(
            CHECK.format(name=name, times=times, value=value)
            for (name, times), value in zip((("double", 2), ("triple", 3)), values)
        )
        (root / folder / "toy.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        for module in lessons, handout, workplace, grading:
            patch.setattr(module, "ROOT", root)
        yield root


def solved(**changes):
    "The lesson as a good student hands it in, but for `changes`: {id, with _ for -: source, or None if it is gone}."
    changes = {name.replace("_", "-"): source for name, source in changes.items()}
    return json.dumps(notebook({name: source for name, source in {**LESSON, **changes}.items() if source is not None}))


def triple(body):
    "The lesson with another body of `triple`."
    return solved(triple="def triple(x):\n" + "".join(f"    {line}\n" for line in body.split("\n")))


def old_version():
    "As a tool of 2014 would write it: version 3, no ids."
    cells = [
        dict(cell_type="code", input=source, outputs=[], language="python", metadata={}) for source in LESSON.values()
    ]
    return json.dumps(dict(nbformat=3, nbformat_minor=0, metadata={}, worksheets=[dict(cells=cells, metadata={})]))


def without_ids():
    "As Colab hands it out: no ids, no metadata of ours."
    made = notebook(LESSON)
    made["cells"] = [
        {name: value for name, value in cell.items() if name != "id"} | {"metadata": {"id": "x"}}
        for cell in made["cells"]
    ]
    return json.dumps(made | {"nbformat_minor": 0})


SLEEP = "import time\nwhile True: time.sleep(1)"
HANDED_IN = {  # student: (what is handed in, points, words of the message)
    "full": (solved(), 5, ""),
    "empty": (
        solved(
            double="def double(x):\n    raise NotImplementedError",
            triple="def triple(x):\n    raise NotImplementedError",
        ),
        0,
        "not written yet",
    ),
    "wrong": (triple("return 4 * x"), 2, "triple: it is 3 times as much"),
    "only what can be seen": (
        solved(double="def double(x): return torch.tensor([2.0])"),
        0,
        "double: it is 2 times as much",
    ),
    "version 3": (old_version(), 5, ""),
    "no ids": (without_ids(), 5, ""),
    "mark at the front": ("\ufeff" + solved(), 5, ""),
    "windows": (solved().replace("\\n", "\\r\\n"), 5, ""),
    "stub pasted below": (solved(again="def triple(x):\n    raise NotImplementedError"), 5, ""),
    "helper added": (
        solved(mine="FACTOR = 3\ndef times(x): return FACTOR * x", triple="def triple(x): return times(x)"),
        5,
        "",
    ),
    "checks deleted": (solved(double_check=None, triple_check="check_triple = print"), 5, ""),
    "syntax error": (solved(triple="def triple(x:\n"), 2, "triple: cell 6 is not Python"),
    "magic": (solved(triple="%time\n!pip install nothing\ndef triple(x): return 3 * x"), 5, ""),
    "the lesson's loop": (solved(double="def double(x): return loop_double(x)"), 0, "loop_double"),
    "exit": (triple("import sys; sys.exit()"), 2, "triple:"),
    "os exit": (triple("import os; os._exit(0)"), 2, "the process ended"),
    "os exit at once": (solved(double="import os\nos._exit(0)\ndef double(x): return 2 * x"), 0, "the process ended"),
    "endless": (triple(SLEEP), 2, "stopped, as it took too long"),
    "endless printing": (triple("while True: print('x' * 10_000)"), 2, "stopped, as it took too long"),
    "imports ours": (solved(triple="from makemoe.toy import triple"), 2, "triple:"),
    "searches the disk": (triple("text = open(ROOT).read()\nexec(text)\nreturn 3 * x"), 2, "may not read"),
    "lists the disk": (triple("import os; os.listdir('/')\nreturn 3 * x"), 2, "may not read"),
    "writes": (triple("open('/tmp/note.txt', 'w')\nreturn 3 * x"), 2, "may not write"),
    "a program": (triple("import subprocess; subprocess.run(['true'])\nreturn 3 * x"), 2, "may not use"),
    "a foreign function": (triple("import ctypes; ctypes.CDLL(None)\nreturn 3 * x"), 2, "may not"),
    "looks at the caller": (triple("import sys; sys._getframe(1)\nreturn 3 * x"), 2, "may not look"),
    "imports the check": (triple("import makemoe.checks.toy\nreturn 3 * x"), 2, "triple:"),
    "reads the check": (
        triple("import makemoe\nopen(makemoe.__path__[0] + '/checks/toy.py')\nreturn 3 * x"),
        2,
        "may not read",
    ),
    "isclose patched": (
        triple("torch.isclose = lambda a, b, **_: torch.ones(1) > 0\nreturn x"),
        2,
        "the code changes torch.isclose",
    ),
    "any patched": (triple("torch.Tensor.any = lambda self: False\nreturn x"), 2, "the code changes Tensor.attributes"),
    "builtin patched": (
        triple("import builtins; builtins.float = lambda x: 1.0\nreturn x"),
        2,
        "the code changes builtins.float",
    ),
    "equal to everything": (
        triple("class Yes(torch.Tensor):\n    __eq__ = lambda *_: True\nreturn torch.zeros(1).as_subclass(Yes)"),
        2,
        "should be a tensor",
    ),
    "script": (
        solved(text="<script>alert(1)</script>", triple="def triple(x): return 'x</pre><script>alert(2)</script>'"),
        2,
        "<script>",
    ),
    "deep": ("[" * 200_000, 0, "cannot be read as a notebook"),
    "empty file": ("", 0, "cannot be read as a notebook"),
    "odd": ("[1, 2]", 0, "cannot be read as a notebook"),
    "=1+1": (solved(), 5, ""),
    "[a]*?": (solved(), 5, ""),
    "Ünal\nAnna": (solved(), 5, ""),
    os.fsdecode(b"not \xff utf-8"): (solved(), 5, ""),
}


def grades(folder):
    "{student: line of grades.csv as a dict}"
    with open(folder.with_name(folder.name + "-grades") / "grades.csv", encoding="utf-8-sig", newline="") as file:
        return {line["student"]: line for line in csv.DictReader(file)}


@pytest.fixture(scope="module")
def graded(project, tmp_path_factory):
    "The folder of all these submissions, graded."
    folder = tmp_path_factory.mktemp("class") / "submissions"
    for student, (text, _, _) in HANDED_IN.items():
        (folder / student).mkdir(parents=True)
        path = folder / student / "04_toy.ipynb"
        path.write_text(
            text.replace("ROOT", repr(str(project / "notebooks" / "04_toy.ipynb"))[1:-1].join(["'"] * 2)),
            encoding="utf-8",
        )
    for student in "link", "nothing", "two", "zip":
        (folder / student).mkdir()
    (folder / "link" / "04_toy.ipynb").symlink_to(folder / "full" / "04_toy.ipynb")
    (folder / "zip" / "04_toy.zip").write_text("PK")
    for name in "a.ipynb", "b.ipynb":
        (folder / "two" / name).write_text(solved())
    grading.grade(folder, seconds=4)
    return folder


@pytest.mark.parametrize("student", HANDED_IN, ids=ascii)
def test_what_is_handed_in_earns(student, graded):
    _, points, words = HANDED_IN[student]
    shown = {"=1+1": "'=1+1", "Ünal\nAnna": "Ünal Anna", os.fsdecode(b"not \xff utf-8"): "not ? utf-8"}.get(
        student, student
    )
    line = grades(graded)[shown]
    assert (line["score"], line["max"]) == (str(points), "5"), line["message"]
    assert words in line["message"]
    page = (graded.with_name("submissions-grades") / "feedback" / student / "04_toy.html").read_text(encoding="utf-8")
    assert f"{points} of 5" in page and "<script" not in page


def test_links_and_doubles_earn_nothing_and_are_told_so(graded):
    found = grades(graded)
    assert all(found[student]["score"] == "0" for student in ("link", "nothing", "two", "zip"))
    assert "more than one notebook" in found["two"]["message"] and "04_toy.zip" in found["zip"]["message"]


def test_a_second_call_grades_only_what_has_changed(graded, monkeypatch):
    asked = []
    monkeypatch.setattr(
        grading, "lost_points", lambda worker, path, cells, seconds: asked.append(cells) or {"double": "changed"}
    )
    before = grades(graded)
    (graded / "wrong" / "04_toy.ipynb").write_text(triple("return 5 * x"))
    grading.grade(graded)
    after = grades(graded)
    assert len(asked) == 1 and after["wrong"]["message"] == "double: changed"
    assert {name: line for name, line in after.items() if name != "wrong"} == {
        name: line for name, line in before.items() if name != "wrong"
    }


def test_our_answers_to_a_real_lesson_get_full_marks_and_half_of_them_half(tmp_path):
    for command in "samples", "grade":  # in processes of their own, which see the real project
        subprocess.run([sys.executable, "-m", "classroom", command, tmp_path / "class"], cwd=ROOT, check=True)
    found = {student: int(line["score"]) / int(line["max"]) for student, line in grades(tmp_path / "class").items()}
    assert found["full"] == 1 and found["empty"] == 0 < found["half"] < 1


@pytest.mark.skipif(os.name != "posix", reason="sends the signal of Ctrl-C")
def test_ctrl_c_keeps_the_marks_so_far(tmp_path):
    subprocess.run([sys.executable, "-m", "classroom", "samples", tmp_path / "class"], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "classroom", "grade", str(tmp_path / "class")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "empty" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode in (0, 130)  # 0 if all were graded before the signal came
    if process.returncode:
        assert len(said.splitlines()) == 1 and "the same command goes on" in said
    assert "empty" in grades(tmp_path / "class")


def test_errors_are_one_line_and_status_2(tmp_path):
    for words, message in (
        (["grade", "nowhere"], "no folder nowhere"),
        (["release", str(tmp_path / "x"), "99"], "there is no lesson '99'"),
        (["release", str(tmp_path)], "exists already"),
        (["grade", str(tmp_path)], "found no lesson"),
    ):
        said = subprocess.run([sys.executable, "-m", "classroom", *words], cwd=ROOT, capture_output=True, text=True)
        assert said.returncode == 2 and message in said.stderr and len(said.stderr.splitlines()) == 1, said.stderr


@each_lesson
def test_a_lesson_is_recognised_under_any_name(lesson, tmp_path):
    known = {path: collecting.signs(lesson_to_solve(path, answers=False, finished=False)["cells"]) for path in LESSONS}
    file = tmp_path / "homework.ipynb"
    handout.write_notebook(file, lesson_to_solve(lesson, answers=True, finished=True))
    assert collecting.recognise(file, known) == lesson
