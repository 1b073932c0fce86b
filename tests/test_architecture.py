"""The house: one stem for lesson, module and test; imports only backwards; the package is what the lessons export."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from nbdev.export import nb_export

from makemoe._export import strip_solution_markers

ROOT = Path(__file__).parent.parent
LESSONS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
MODULES = [{"90_teaching": "classroom"}.get(lesson.stem, lesson.stem[3:]) for lesson in LESSONS]  # in the order of the course
BY_HAND = {"__init__", "__main__", "_export", "_modidx"}


def imports(module):
    "(module, names, at the top level of the file?) of all imports in a module of the package."
    tree = ast.parse((ROOT / "makemoe" / f"{module}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            name = "makemoe." * bool(node.level) + (node.module or "")
            yield name, [alias.name for alias in node.names], node in tree.body
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, [], node in tree.body


def test_lesson_module_and_test_share_one_stem():
    files = {path.stem for path in (ROOT / "makemoe").glob("*.py")} - BY_HAND
    assert files == set(MODULES), "a module without a lesson, or a lesson without a module"
    missing = [module for module in MODULES if not (ROOT / "tests" / f"test_{module}.py").exists()]
    assert not missing, f"lessons without tests: {missing}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_lessons_before_it(module):
    earlier = MODULES[: MODULES.index(module)]
    for name, names, _ in imports(module):
        assert "*" not in names, f"{module} imports * from {name}"
        if name.startswith("makemoe."):
            assert name.removeprefix("makemoe.") in earlier, f"{module} imports {name}, which comes later"


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_only_where_they_are_needed(module):
    at_the_top = {name.split(".")[0] for name, _, top in imports(module) if top}
    assert "mlflow" not in at_the_top, "mlflow takes seconds to import: only when asked for"
    assert not at_the_top & {"nbdev", "fastcore", "nbgrader"}, "a learner has none of these"
    if module not in ("training", "shakespeare", "classroom"):
        assert not at_the_top & {"tqdm", "tyro", "safetensors"}


def test_importing_the_command_leaves_mlflow_alone():
    code = "import sys, makemoe.shakespeare; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("lesson, module", list(zip(LESSONS, MODULES)), ids=MODULES)
def test_the_module_is_what_the_lesson_exports(lesson, module, tmp_path):
    (tmp_path / "notebooks").mkdir()
    copy = tmp_path / "notebooks" / lesson.name
    copy.write_bytes(lesson.read_bytes())
    nb_export(copy, lib_path=tmp_path / "makemoe", procs=[strip_solution_markers])
    exported = (tmp_path / "makemoe" / f"{module}.py").read_text(encoding="utf-8")
    committed = (ROOT / "makemoe" / f"{module}.py").read_text(encoding="utf-8")
    assert committed == exported, f"makemoe/{module}.py is not what {lesson.name} exports: run `make export`"
    assert "SOLUTION" not in committed


def test_requirements_are_bounded_and_the_only_list_of_dependencies():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [re.match(r"[a-z-]+", line)[0] for line in lines if line and not line.startswith("#")]
    assert {"torch", "jupyter", "matplotlib", "mlflow", "tqdm"} <= set(names)
    assert "torch>=2.10,<2.14" in lines
    assert 'dynamic = ["dependencies"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
