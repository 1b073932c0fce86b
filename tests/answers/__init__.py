"""The bank: what learners hand in for each exercise, right and wrong. One file per lesson, named like its module.

    ANSWERS = {
        "top_k_gating": {  # name of the exercise, that of its check
            "right: scatter, then softmax": '''...the whole cell, as handed in...''',
            "softmax over all, not renormalised": [("part of our solution", "what stands there instead"), ...],
        },
    }

An answer is the text of the whole cell, or our own solution with parts replaced. Names that begin with "right" are
right answers in another style, two for each exercise. All else is wrong, and differs in kind from the others: one
answer for each claim of a check that would let it through.

    python -m tests.answers gating      prints which claim catches which answer
"""

import contextlib
import importlib
import io
from functools import cache

from classroom.lessons import exercises, find_lessons, read_cells
from classroom.submission import build, verdict


@cache
def lesson(module):
    "(cells of the lesson, {exercise: Exercise})."
    cells = read_cells(find_lessons([module])[0])
    return cells, {exercise.name: exercise for exercise in exercises(cells)}


def checks(module, name):
    "The check of an exercise, and the hidden one if there is one."
    check = getattr(importlib.import_module(f"makemoe.checks.{module}"), f"check_{name}")
    hidden = importlib.import_module(f"classroom.hidden.{module}")
    return list(filter(None, [check, getattr(hidden, f"check_{name}", None)]))


def handed_in(source, answer):
    "The text of the cell `source` in which `answer` was written."
    directives = "".join(line for line in source.splitlines(keepends=True) if line.startswith("#|"))
    if isinstance(answer, str):
        return directives + answer.strip().removeprefix(directives.strip()) + "\n"
    for ours, theirs in answer:
        assert ours in source, f"our solution has no {ours!r} any more: bring this answer up to date"
        source = source.replace(ours, theirs)
    return source


def marks(module, name, answer=()):
    "What `classroom grade` says to an answer: the reason why it fails, or None. By default our own answer."
    cells, known = lesson(module)
    theirs = [
        cell | {"source": handed_in(cell["source"], answer)} if cell["id"] == known[name].cell else cell
        for cell in cells
    ]
    names = {part.split(".")[0] for exercise in known.values() for part in exercise.write}
    with contextlib.redirect_stdout(io.StringIO()):
        built, problems = build(theirs, {cell["source"].strip() for cell in cells}, names)
        reasons = (verdict(check, built, problems) for check in checks(module, name))
        return next((reason for reason in reasons if reason), None)
