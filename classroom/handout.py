"""What learners and students get: the lessons with stubs in the place of answers, and all that these stand on."""

import ast
import json
import re
import shutil
from pathlib import Path

import tyro

from classroom.lessons import ROOT, exercises, find_lessons, module_of, read_cells, stub


def markdown(name, text):
    "A new cell of prose."
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": text}


def code(name, text):
    "A new cell of code."
    return {"cell_type": "code", "id": name, "metadata": {}, "source": text, "outputs": [], "execution_count": None}


def announcement(exercise):
    "The cell that stands before a stub."
    *others, last = (f"`{name}`" for name in exercise.write)
    names = f"{', '.join(others)} and {last}" if others else last
    lines = f"each of the {len(exercise.write)} lines" if others else "the line"
    return markdown(
        f"{exercise.cell}-exercise",
        f"#### ✎ Your turn: {names} ({exercise.points} points)\n\n"
        f"In the next cell, replace {lines} `raise NotImplementedError` by your code: it should do what the "
        "docstring says. Run that cell, then the check below it. The check prints how many claims hold, or stops "
        "and names the first that fails.",
    )


def folded(title, text):
    "Text that a reader unfolds with a click."
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def help_for(exercise, answer):
    "The cell below a stub: a hint, and the `answer` where it is given, both folded."
    parts = [folded("A hint", exercise.hint)]
    if answer:
        parts.append(folded("The answer, to copy into the cell above", f"```python\n{answer}\n```"))
    return markdown(f"{exercise.cell}-help", "\n".join(parts))


def go_on(exercise, module, source):
    "The cell below the check of an exported exercise, for readers who go on without having solved it."
    names = [node.name for node in ast.parse(source).body if hasattr(node, "name")]
    return code(
        f"{exercise.cell}-go-on",
        "# To go on without an answer of your own, delete the # in front of the next line and run this cell.\n"
        f"#from makemoe.{module} import {', '.join(names)}",
    )


def lesson_to_solve(path, answers, finished):
    """The notebook of a lesson with stubs, its prose and pictures kept, as a dict.

    `answers`: fold our answers in; `finished`: the module of the lesson can be imported.
    """
    notebook, cells = json.loads(path.read_text(encoding="utf-8")), read_cells(path)
    known = {exercise.cell: exercise for exercise in exercises(cells)}
    checked = {exercise.check: exercise for exercise in known.values()}
    sources = {cell["id"]: cell["source"] for cell in cells}
    result = []
    for cell in cells:
        if exercise := known.get(cell["id"]):
            answer = cell["source"].removeprefix("#| export\n")
            result += [
                announcement(exercise),
                cell | {"source": stub(cell["source"], exercise), "outputs": []},
                help_for(exercise, answer if answers else ""),
            ]
        elif exercise := checked.get(cell["id"]):
            result.append(cell | {"outputs": []})
            if finished and sources[exercise.cell].startswith("#| export"):
                result.append(go_on(exercise, module_of(path), sources[exercise.cell]))
        else:
            result.append(cell)
    return notebook | {"cells": [cell | {"source": cell["source"].splitlines(keepends=True)} for cell in result]}


def write_notebook(path, notebook):
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def learn(out: tyro.conf.Positional[Path] = Path("learn")):
    """Write the lessons to learn with: stubs, folded hints and answers. What is there already stays as it is.

    Args:
        out: a folder, new or one that an earlier call has made
    """
    out.mkdir(parents=True, exist_ok=True)
    there = {path.name for path in out.glob("*.ipynb")}
    new = [path for path in find_lessons() if path.name not in there]
    for path in new:
        write_notebook(out / path.name, lesson_to_solve(path, answers=True, finished=True))
    kept = f", {len(there)} that were there stay as they are" if there else ""
    print(f"{out}: {len(new)} new lessons{kept}. To open them: jupyter lab {out}")


def imported_modules(text):
    "Names of the modules of the package that a text of code imports."
    ways = r"(?:from|import) makemoe\.(\w+)", r"from makemoe import (\w+)", r"from \.(\w+) import"
    return {name for way in ways for name in re.findall(way, text)} - {"checks"}


def needed_modules(lessons):
    """Names of the modules that the `lessons` (paths) and their checks import, and these in their turn.

    A lesson's own module is among them only if another one needs it.
    """
    found, waiting = set(), {"lab"}
    for path in lessons:
        check = (ROOT / "makemoe" / "checks" / f"{module_of(path)}.py").read_text(encoding="utf-8")
        code = "\n".join(cell["source"] for cell in read_cells(path) if cell["cell_type"] == "code")
        waiting |= (imported_modules(code) | imported_modules(check)) - {module_of(path)}
    while waiting := waiting - found:
        found |= waiting
        waiting = set().union(
            *(imported_modules((ROOT / "makemoe" / f"{name}.py").read_text(encoding="utf-8")) for name in waiting)
        )
    return found


def copy_package(out, modules, checks):
    "Copy these modules of the package and these checks into `out`, with the data that lessons read."
    (out / "makemoe" / "checks").mkdir(parents=True)
    names = [
        "__init__.py",
        *(f"{name}.py" for name in modules),
        "checks/__init__.py",
        *(f"checks/{name}.py" for name in checks),
    ]
    if "page" in checks:
        names += ["page.html", "page.js", "engine.js"]
    for name in names:
        shutil.copy(ROOT / "makemoe" / name, out / "makemoe" / name)
    for name in "data", "benchmarks/results":
        shutil.copytree(ROOT / name, out / name)


def release(out: tyro.conf.Positional[Path], lessons: tyro.conf.Positional[tuple[str, ...]] = ()):
    """Write a tree for students: lessons without answers, the modules and checks that these stand on, the data.

    Args:
        out: a new folder
        lessons: which, such as 04 or gating; all if you name none
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already: remove it, or name another folder")
    chosen = find_lessons(lessons)
    modules = sorted(needed_modules(chosen))
    shutil.copytree(Path(__file__).parent / "students", out)
    copy_package(out, modules, [module_of(path) for path in chosen])
    shutil.copy(ROOT / "requirements.txt", out)
    (out / "notebooks").mkdir()
    for path in chosen:
        write_notebook(
            out / "notebooks" / path.name, lesson_to_solve(path, answers=False, finished=module_of(path) in modules)
        )
    print(f"{out}: {', '.join(path.stem for path in chosen)}")
    print(f"finished modules in it: {', '.join(modules)}")


def samples(out: tyro.conf.Positional[Path], lessons: tyro.conf.Positional[tuple[str, ...]] = ("04",)):
    """Write three made-up submissions to try grading with: full, half and empty.

    Args:
        out: a folder, to which one folder per student is added
        lessons: which, such as 04 or gating
    """
    for path in find_lessons(lessons):
        cells = read_cells(path)
        solved = {cell["id"]: cell["source"] for cell in cells}
        known = [exercise.cell for exercise in exercises(cells)]
        for student, share in ("full", 1), ("half", 1 / 2), ("empty", 0):
            notebook = lesson_to_solve(path, answers=False, finished=False)
            for cell in notebook["cells"]:
                if cell["id"] in known[: int(share * len(known))]:
                    cell["source"] = solved[cell["id"]].splitlines(keepends=True)
            (out / student).mkdir(parents=True, exist_ok=True)
            write_notebook(out / student / path.name, notebook)
    print(f"{out}: full, half, empty")
