"""The graders, tried on what learners hand in: every wrong answer of the bank is caught twice, every right one passes.

The second time, by the tests of the module, costs about a second for each of a thousand answers. So that is done for the
right ones and the first three wrong ones of an exercise, and for all of them where MAKEMOE_BANK=all is set.
"""

import importlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from answers import lesson, lost_in, make_tree, run_tests

BANK = sorted(path.stem for path in (Path(__file__).parent / "answers").glob("[a-z]*.py"))
ANSWERS = {module: importlib.import_module(f"answers.{module}").ANSWERS for module in BANK}
ALL = [(module, solution, name) for module in BANK for solution in ANSWERS[module] for name in ANSWERS[module][solution]]
each_answer = pytest.mark.parametrize("module, solution, name", ALL, ids=[f"{solution}: {name}" for _, solution, name in ALL])
exported = {(module, cell["id"]) for module in BANK for cell in lesson(module)[1] if cell["source"].startswith("#| export")}


def in_short(module, solution):
    "Names of the answers that are tried on the tests of the module in any case."
    wrong = [name for name in ANSWERS[module][solution] if not name.startswith("right")]
    return set(ANSWERS[module][solution]) - set(wrong[3:])


in_modules = [(module, solution, name) for module, solution, name in ALL if (module, solution) in exported
              and (os.environ.get("MAKEMOE_BANK") == "all" or name in in_short(module, solution))]


def test_every_lesson_has_a_bank():
    notebooks = (Path(__file__).parent.parent / "notebooks").glob("[0-8]*.ipynb")  # 90 is for teachers
    assert BANK == sorted(path.stem.partition("_")[2] for path in notebooks)


@pytest.mark.parametrize("module", BANK)
def test_every_exercise_has_wrong_answers(module):
    solutions = {cell["id"] for cell in lesson(module)[1] if cell["kind"] == "solution"}
    assert set(ANSWERS[module]) == solutions
    few = [solution for solution, answers in ANSWERS[module].items() if sum(not name.startswith("right") for name in answers) < 5]
    none = [solution for solution, answers in ANSWERS[module].items() if not any(name.startswith("right") for name in answers)]
    assert not few and not none, f"fewer than five wrong answers: {few}; no right one: {none}"


@each_answer
def test_the_graded_cells(module, solution, name):
    lost = lost_in(module, solution, ANSWERS[module][solution][name])
    plt.close("all")
    if name.startswith("right"):
        assert lost is None, f"lost points in {lost}"
    else:
        assert lost is not None, "full marks for a wrong answer"
        assert not isinstance(lost[1], (NameError, SyntaxError)), f"a slip in the bank rather than in the answer: {lost}"


@pytest.fixture(scope="module")
def verdicts(request, tmp_path_factory):
    "The tests of the module with each answer in it: two at a time, each in a process that has only to import makemoe."
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(["torch", "torch._dynamo", "matplotlib.pyplot", "pytest", "hypothesis", "tyro", "safetensors.torch", "answers"])
    wanted = [item.callspec.params for item in request.session.items if item.function is test_the_tests_of_the_module]
    with ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as pool:
        futures = {}
        for one in wanted:
            module, solution, name = answer = one["module"], one["solution"], one["name"]
            folder = tmp_path_factory.mktemp("answer")
            make_tree(folder, module, solution, ANSWERS[module][solution][name])
            futures[answer] = pool.submit(run_tests, folder, module)
        yield futures


@pytest.mark.parametrize("module, solution, name", in_modules, ids=[f"{solution}: {name}" for _, solution, name in in_modules])
def test_the_tests_of_the_module(module, solution, name, verdicts):
    status, output = verdicts[module, solution, name].result()
    if name.startswith("right"):
        assert status == 0, output[-3000:]
    else:
        assert status == 1, f"exit status {status}, but a test should fail (1)\n{output[-3000:]}"
