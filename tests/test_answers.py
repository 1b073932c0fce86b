"""The graders, tried on what learners hand in: every wrong answer of the bank is caught, every right one passes."""

import importlib
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from classroom.lessons import find_lessons, module_of
from tests.answers import lesson, marks

BANK = sorted(path.stem for path in (Path(__file__).parent / "answers").glob("[a-z]*.py"))
ANSWERS = {module: importlib.import_module(f"tests.answers.{module}").ANSWERS for module in BANK}
ALL = [
    (module, exercise, name) for module in BANK for exercise in ANSWERS[module] for name in ANSWERS[module][exercise]
]


def test_every_lesson_has_a_bank():
    assert BANK == sorted(module_of(path) for path in find_lessons())


@pytest.mark.parametrize("module", BANK)
def test_every_exercise_has_right_and_wrong_answers(module):
    assert set(ANSWERS[module]) == set(lesson(module)[1])
    for exercise, answers in ANSWERS[module].items():
        right = sum(name.startswith("right") for name in answers)
        assert right >= 2 and 5 <= len(answers) - right <= 15, (
            f"{exercise}: {right} right, {len(answers) - right} wrong"
        )
        assert marks(module, exercise) is None


@pytest.mark.parametrize("module, exercise, name", ALL, ids=[f"{exercise}: {name}" for _, exercise, name in ALL])
def test_it_is_marked(module, exercise, name):
    reason = marks(module, exercise, ANSWERS[module][exercise][name])
    plt.close("all")
    if name.startswith("right"):
        assert reason is None, f"lost its points: {reason}"
    else:
        assert reason is not None, "full marks for a wrong answer"
        slips = "is not Python", "is not defined", "not defined: "
        assert not any(slip in reason for slip in slips), f"a slip in the bank rather than in the answer: {reason}"
