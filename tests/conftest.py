"""Every test starts from the same seed and with one thread, and hypothesis draws the same examples in every run."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is loaded: tests are so small that threads only wait

import hypothesis
import matplotlib
import pytest

from makemoe import bias_balancing, expert_choice, fill_gaps, second_expert, smooth_choice, st_moe, switch  # noqa: F401
from makemoe.experts import ACTIVATIONS, EXPERTS  # those add to the tables, so that they hold the same in every process
from makemoe.lab import seed_everything
from makemoe.model import MODELS, ROUTERS
from makemoe.shakespeare import PRESETS

matplotlib.use("agg")
hypothesis.settings.register_profile("makemoe", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("makemoe")


@pytest.fixture(autouse=True)
def seed():
    seed_everything(1337)


@pytest.fixture(autouse=True)
def tables():
    "What a lesson or an answer registers under a name is gone after its test."
    known = ROUTERS, MODELS, PRESETS, ACTIVATIONS, EXPERTS, st_moe.GATED
    before = [dict(table) for table in known]
    yield
    for table, entries in zip(known, before):
        table.clear()
        table.update(entries)
