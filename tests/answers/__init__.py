"""The bank: what learners hand in for each exercise, right and wrong. One file per lesson, named like its module.

    ANSWERS = {
        "gating-top-k": {  # id of the solution cell
            "right: scatter, then softmax": '''...the whole cell, as handed in...''',
            "softmax over all, not renormalised": [("part of our solution", "what stands there instead"), ...],
        },
    }

An answer is the text of the whole cell, or our own solution with parts replaced. Names that begin with "right" are
other right answers. All else is wrong: it must lose points in the cells that grade it, and fail the tests of its module
if the cell is exported.
"""

import ast
import contextlib
import io
import json
import shutil
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@cache
def lesson(module):
    "(path of the lesson, its code cells as dicts of id, source and kind: 'solution', 'test' or None)."
    path = next((ROOT / "notebooks").glob(f"[0-9][0-9]_{module}.ipynb"))
    cells = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            mark = cell["metadata"].get("nbgrader")
            kind = mark and ("solution" if mark["solution"] else "test")
            cells.append(dict(id=cell["id"], source="".join(cell["source"]), kind=kind))
    return path, cells


def handed_in(source, answer):
    "The text of the solution cell `source` in which `answer` was written."
    directives = "".join(line for line in source.splitlines(keepends=True) if line.startswith("#|"))
    if isinstance(answer, str):
        return directives + answer.strip().removeprefix(directives.strip()) + "\n"
    for ours, theirs in answer:
        assert ours in source, f"our solution has no {ours!r} any more: bring this answer up to date"
        source = source.replace(ours, theirs)
    return source


def names(source):
    "(names that a cell binds, names that it reads before it has bound them)."
    bound, read = set(), set()

    def visit(node):
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load):
                read.update({node.id} - bound)
            else:
                bound.add(node.id)
        elif isinstance(node, ast.alias):
            bound.add(node.asname or node.name.split(".")[0])
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.GeneratorExp, ast.ListComp, ast.SetComp, ast.DictComp)):
            inside = {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load)}
            own = {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
            own |= {name.arg for name in ast.walk(node) if isinstance(name, ast.arg)}
            read.update(inside - own - bound)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                bound.add(node.name)
        else:  # what is computed comes before the name that it is bound to
            fields = sorted(ast.iter_fields(node), key=lambda field: field[0] not in ("value", "iter", "items"))
            for _, value in fields:
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        visit(child)

    visit(ast.parse(source))
    return bound, read


@cache
def steps(module, solution, wanted=frozenset()):
    """What to run to grade an exercise, in order, as code cells.

    The solution, the graded cells after it up to the next solution, and of all cells before those only the ones that
    bind a name which these need or which is `wanted`: that takes milliseconds where a whole lesson takes seconds.
    """
    _, cells = lesson(module)
    start = [cell["id"] for cell in cells].index(solution)
    later = [cell for cell in cells[start + 1:] if cell["kind"]]
    kinds = [cell["kind"] for cell in later] + ["solution"]
    graded = later[:kinds.index("solution")]
    needed, kept = set(wanted), []
    for cell in reversed(cells[:cells.index(graded[-1]) + 1]):
        bound, read = names(cell["source"])
        if cell in graded or cell["id"] == solution or needed & bound:
            needed = (needed - bound if cells.index(cell) < start else needed) | read
            kept.insert(0, cell)
    return kept


def lost_in(module, solution, answer):
    "(graded cell, error) of the first points that `answer` loses, or None if it gets full marks."
    namespace, handed = {"__name__": "__main__"}, False
    ours = next(cell["source"] for cell in lesson(module)[1] if cell["id"] == solution)
    theirs = handed_in(ours, answer)
    for cell in steps(module, solution, frozenset(names(theirs)[1])):
        source = cell["source"]
        if cell["id"] == solution:
            source, handed = theirs, True
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(source, cell["id"], "exec"), namespace)
        except Exception as error:
            if not handed:
                raise
            return cell["id"], error


def make_tree(folder, module, solution, answer):
    "A copy of the project in `folder` in which the exported module holds `answer`."
    from nbdev.export import nb_export

    path, _ = lesson(module)
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cell = next(cell for cell in notebook["cells"] if cell["id"] == solution)
    cell["source"] = handed_in("".join(cell["source"]), answer)
    for name in "makemoe", "notebooks", "tests":
        (folder / name).mkdir(parents=True)
    for file in [*(ROOT / "makemoe").glob("*.py"), ROOT / "tests" / "conftest.py", ROOT / "tests" / f"test_{module}.py", ROOT / "pyproject.toml"]:
        shutil.copy(file, folder / file.relative_to(ROOT))
    (folder / "data").symlink_to(ROOT / "data", target_is_directory=True)
    (folder / "notebooks" / path.name).write_text(json.dumps(notebook), encoding="utf-8")
    nb_export(folder / "notebooks" / path.name, lib_path=folder / "makemoe")


def run_tests(folder, module):
    "(exit status, output) of the tests of `module` in the tree `folder`. For a process of its own."
    import os

    import pytest
    import torch

    torch.set_num_threads(1)  # others run beside this one
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = pytest.main(["-x", "-p", "no:cacheprovider", "-W", "ignore", f"tests/test_{module}.py"])
    return int(status), output.getvalue()
