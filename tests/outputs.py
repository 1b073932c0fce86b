"""Run lessons and save them with what they show, stamped with the code that showed it.

    python tests/outputs.py [04 gating ...]     all lessons, or those named; `make outputs` does the same

A stamp is a hash of the code of a lesson and of all modules of the package that it imports, and theirs; comments,
docstrings and prose do not count. `tests/test_notebooks.py` fails where a stamp does not fit the code any more.
"""

import ast
import base64
import hashlib
import io
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def code_of(lesson):
    "The code cells of a notebook, as one text that Python can parse: magics are left out."
    cells = [cell for cell in json.loads(lesson.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    lines = "\n".join("".join(cell["source"]) for cell in cells).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def shape(node):
    "A syntax tree as nested tuples, without positions and docstrings, the same in every version of Python."
    if isinstance(node, list):
        return tuple(shape(item) for item in node)
    if not isinstance(node, ast.AST):
        return node
    fields = dict(ast.iter_fields(node))
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:]
    return type(node).__name__, *((name, shape(value)) for name, value in fields.items() if value not in (None, []))


def imported(tree):
    "The files of the package that a syntax tree imports."
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            start = "makemoe." * bool(node.level) + (node.module or "")
            names |= {start, *(f"{start}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    parts = [name.split(".") for name in names if name.split(".")[0] == "makemoe"]
    files = [ROOT.joinpath(*part).with_suffix(".py") for part in parts] + [
        ROOT.joinpath(*part, "__init__.py") for part in parts
    ]
    return {file for file in files if file.is_file()}


def stamp(lesson):
    "The stamp that fits the code of a lesson as it is now."
    tree = ast.parse(code_of(lesson))
    shapes, waiting, found = [shape(tree)], imported(tree), set()
    while waiting:
        found |= waiting
        trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(waiting)}
        waiting = set().union(*map(imported, trees.values())) - found
    for file in sorted(found):
        shapes.append((file.relative_to(ROOT).as_posix(), shape(ast.parse(file.read_text(encoding="utf-8")))))
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]


def smaller(picture):
    "A PNG, base64, with at most 256 colours: a third of the size, and nothing that an eye would miss."
    from PIL import Image

    packed = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(packed, "PNG", optimize=True)
    return min(picture, base64.b64encode(packed.getvalue()).decode() + "\n", key=len)


def run(lesson):
    "Execute a lesson in a kernel of its own and save it with its outputs and its stamp."
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(lesson, 4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(lesson.parent)}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.metadata.pop("execution", None)
            for output in cell.outputs:
                output.pop("execution_count", None) if output.output_type != "execute_result" else output.update(
                    execution_count=None
                )
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = smaller(output.data["image/png"])
    notebook.metadata = {
        "kernelspec": notebook.metadata.kernelspec,
        "language_info": {"name": "python"},
        "stamp": stamp(lesson),
    }
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    lesson.write_text(nbformat.writes(nbformat.from_dict(json.loads(text))) + "\n", encoding="utf-8")


def main(names):
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ.pop("MAKEMOE_FAST", None)
    for lesson in LESSONS:
        if not names or {lesson.stem, lesson.stem[:2], lesson.stem[3:]} & set(names):
            start = time.perf_counter()
            run(lesson)
            print(f"{lesson.name}: {time.perf_counter() - start:.0f} s, {lesson.stat().st_size // 1024} KB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
