"""The exercises of a lesson: what is written there, and what students get instead."""

import ast
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Exercise:
    "One exercise of a lesson, as the metadata of its cell and the check in the next one describe it."

    name: str  # that of its check: top_k_gating is checked by check_top_k_gating
    cell: str  # id of the cell with the answer
    check: str  # id of the cell that checks it
    write: tuple  # names of the functions and methods that students write, such as Routing.load
    points: int
    stars: int  # how hard it is, from 1 to 3
    minutes: int
    hint: str
    given: dict = field(default_factory=dict)  # {name: how many statements at the start of its body students are given}


def find_lessons(names=()):
    """Paths of the lessons called `names`, of all if there are none.

    A name is '04', 'gating' or '04_gating'; a ValueError lists them where it is none of these.
    """
    paths = sorted((ROOT / "notebooks").glob("[0-8][0-9]_*.ipynb"))  # from 90 on they are for teachers
    known = {path: {path.stem, path.stem[:2], path.stem[3:]} for path in paths}
    for name in names:
        if not any(name in others for others in known.values()):
            raise ValueError(f"there is no lesson {name!r}: choose from {', '.join(path.stem for path in paths)}")
    return [path for path in paths if not names or known[path] & set(names)]


def module_of(path):
    "The name of the module that a lesson exports: notebooks/04_gating.ipynb gives 'gating'."
    return Path(path).stem[3:]


def read_cells(path):
    "The cells of a notebook: dicts with `id`, `cell_type`, `metadata`, `outputs` and `source`, a string."
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def exercises(cells):
    "The exercises among the cells of a lesson, in order."
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    found = []
    for cell, following in zip(code, code[1:]):
        if facts := cell["metadata"].get("exercise"):
            name = re.match(r"check_(\w+)\(", following["source"])
            if not name:
                raise ValueError(f"the cell after the exercise {cell['id']} should begin with a call of its check")
            found.append(Exercise(name[1], cell["id"], following["id"], **{**facts, "write": tuple(facts["write"])}))
    return found


def stub(source, exercise):
    "What students get in the place of the answer `source`: signatures and docstrings, and NotImplementedError below."
    lines = source.splitlines()
    functions = {}
    for node in ast.parse(source).body:
        functions[getattr(node, "name", None)] = node
        for method in node.body if isinstance(node, ast.ClassDef) else []:
            functions[f"{node.name}.{getattr(method, 'name', None)}"] = method
    for name in sorted(
        exercise.write, key=lambda name: -functions[name].lineno
    ):  # from below, so that lines keep their numbers
        function = functions[name]
        given = (ast.get_docstring(function) is not None) + exercise.given.get(name, 0)
        first = function.body[given].lineno - 1 if given == 0 else function.body[given - 1].end_lineno
        indent = " " * function.body[0].col_offset
        lines[first : function.end_lineno] = [f"{indent}raise NotImplementedError"]
    return "\n".join(lines)
