"""The exercises: what students are given holds no solution, and every solution is followed by cells that grade it."""

import ast

import nbformat
import pytest

from makemoe.classroom import find_lessons, without_solutions

LESSONS = find_lessons()
each_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)


def kinds(notebook):
    "('solution' or 'test', cell) of the cells that nbgrader knows, in order."
    for cell in notebook.cells:
        if mark := cell.metadata.get("nbgrader"):
            yield "solution" if mark["solution"] else "test", cell


@each_lesson
def test_the_release_holds_no_solution(lesson):
    for kind, cell in kinds(without_solutions(lesson)):
        assert "SOLUTION" not in cell.source and "HIDDEN" not in cell.source
        if kind == "solution":
            assert "raise NotImplementedError()" in cell.source, f"{cell.id} has no region between BEGIN and END SOLUTION"
            compile(cell.source, cell.id, "exec")


@each_lesson
def test_every_solution_is_graded(lesson):
    order = [kind for kind, _ in kinds(nbformat.read(lesson, 4))]
    assert order.count("solution") >= 1 and order[-1:] == ["test"]
    assert "solution" not in [a for a, b in zip(order, order[1:] + ["end"]) if a == b], "a solution without a graded cell after it"


@each_lesson
def test_graded_cells_end_in_an_assertion_and_give_points(lesson):
    points = 0
    for kind, cell in kinds(nbformat.read(lesson, 4)):
        if kind == "test":
            points += cell.metadata.nbgrader.points
            source = cell.source.removesuffix("### END HIDDEN TESTS").rstrip()
            last = ast.parse(source).body[-1]
            assert "assert" in ast.unparse(last), f"{cell.id} ends in a value, which nbgrader could take for the score"
    assert 10 <= points <= 20, f"{lesson.stem} gives {points} points"


def test_ids_are_unique_in_the_whole_course():
    seen = [cell.metadata.nbgrader.grade_id for lesson in LESSONS for _, cell in kinds(nbformat.read(lesson, 4))]
    assert len(seen) == len(set(seen)), sorted(name for name in set(seen) if seen.count(name) > 1)
    for lesson in LESSONS:
        ids = [cell.id for cell in nbformat.read(lesson, 4).cells]
        assert len(ids) == len(set(ids))
