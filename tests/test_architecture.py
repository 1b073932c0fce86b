"""The house: one stem for lesson, module, check and test; imports only backwards; modules as lessons export them."""

import ast
import json
import re
import subprocess
import sys

import pytest
from nbdev.export import nb_export

from classroom.lessons import ROOT, find_lessons, module_of
from tests.outputs import code_of

LESSONS = find_lessons()
MODULES = [module_of(lesson) for lesson in LESSONS]  # in the order of the course
SOURCES = [
    path
    for folder in ("makemoe", "classroom", "tests", "benchmarks", "data")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def imports(path):
    "(module, names, at the top level of the file?) of all imports in a file of the package."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            name = "makemoe." * bool(node.level) + (node.module or "")
            yield name, [alias.name for alias in node.names], node in tree.body
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, [], node in tree.body


def stems(folder):
    return {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__", "__main__", "_modidx"}


def test_lesson_module_check_and_test_share_one_stem():
    assert stems("makemoe") == set(MODULES), "a module without a lesson, or a lesson without a module"
    assert stems("makemoe/checks") == set(MODULES) and stems("classroom/hidden") <= set(MODULES)
    assert {f"test_{module}" for module in set(MODULES)} <= stems("tests")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "makemoe").rglob("[a-z]*.py")), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_a_module_and_its_checks_import_only_from_lessons_before_it(path):
    earlier = {"checks"} | set(MODULES[: MODULES.index(path.stem)])
    for name, names, _ in imports(path):
        assert "*" not in names, f"{path.stem} imports * from {name}"
        if name.startswith("makemoe."):
            assert name.split(".")[1] in earlier, f"{path.stem} imports {name}, which does not come before it"


@pytest.mark.parametrize("module", sorted(stems("makemoe")))
def test_heavy_libraries_only_where_they_are_needed(module):
    at_the_top = {name.split(".")[0] for name, _, top in imports(ROOT / "makemoe" / f"{module}.py") if top}
    assert "mlflow" not in at_the_top, "mlflow takes seconds to import: only when asked for"
    assert not at_the_top & {"nbdev", "fastcore"}, "a learner has none of these"
    if module not in ("checkpoints", "shakespeare"):
        assert not at_the_top & {"tqdm", "tyro", "safetensors"}


def test_importing_the_command_leaves_mlflow_alone():
    code = "import sys, makemoe.shakespeare; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "lesson", LESSONS, ids=module_of
)
def test_the_module_is_what_the_lesson_exports(lesson, tmp_path):
    (tmp_path / "notebooks").mkdir()
    copy = tmp_path / "notebooks" / lesson.name
    copy.write_bytes(lesson.read_bytes())
    nb_export(copy, lib_path=tmp_path / "makemoe")
    exported = (tmp_path / "makemoe" / f"{module_of(lesson)}.py").read_text(encoding="utf-8")
    committed = (ROOT / "makemoe" / f"{module_of(lesson)}.py").read_text(encoding="utf-8")
    assert committed == exported, f"makemoe/{module_of(lesson)}.py is not what {lesson.name} exports: run `make export`"


def newer_than_3_10(text):
    "What a text of code holds that Python 3.10 does not know and `feature_version` lets through."
    tree = ast.parse(text, feature_version=(3, 10))
    starred = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Tuple)
        and any(isinstance(part, ast.Starred) for part in node.slice.elts)
    ]
    modern = {"tomllib", "Self", "StrEnum", "ExceptionGroup", "override", "batched", "UTC"}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {
        alias.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names
    }
    return [ast.unparse(node) for node in starred] + sorted(names & modern)


def test_code_is_for_python_3_10():
    assert (
        newer_than_3_10("rank[*pair]")
        and newer_than_3_10("from typing import Self")
        and not newer_than_3_10("f(*pair)")
    )
    for path in SOURCES:
        assert not newer_than_3_10(path.read_text(encoding="utf-8")), path
    for lesson in LESSONS:
        assert not newer_than_3_10(code_of(lesson)), lesson


def test_lines_fit_on_a_screen():
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in SOURCES
        if path.parent.name != "makemoe" or path.stem in ("__init__", "__main__")  # the others come from lessons
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if len(line) > 120
    ]
    assert not long, long


def test_the_package_stays_small():
    lines = [
        line
        for module in MODULES
        if module in stems("makemoe") and LESSONS[MODULES.index(module)].stem < "20"  # Part I
        for line in (ROOT / "makemoe" / f"{module}.py").read_text(encoding="utf-8").splitlines()
    ]
    assert len(lines) < 2430  # may only go down
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 80


def test_links_between_files_lead_somewhere():
    texts = {path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *ROOT.glob("[bcd]*/*.md")]}
    for lesson in [*LESSONS, *(ROOT / "notebooks").glob("9*.ipynb")]:
        cells = json.loads(lesson.read_text(encoding="utf-8"))["cells"]
        texts[lesson] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for path, text in texts.items():
        for target in re.findall(r"\]\(([^)#\s]+)\)", text):
            assert "://" in target or (path.parent / target).exists(), f"{path.name} links to {target}"


def test_requirements_are_bounded_and_the_only_list_of_dependencies():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [re.match(r"[a-z-]+", line)[0] for line in lines if line and not line.startswith("#")]
    assert {"torch", "jupyter", "matplotlib", "mlflow", "tqdm"} <= set(names)
    assert "torch>=2.10,<2.14" in lines
    assert 'dynamic = ["dependencies"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
