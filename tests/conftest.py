"""Every test starts from the same seed and with one thread, and hypothesis draws the same examples in every run."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is loaded: tests are so small that threads only wait

import hypothesis
import matplotlib
import pytest

from makemoe.lab import seed_everything

matplotlib.use("agg")
hypothesis.settings.register_profile("makemoe", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("makemoe")


@pytest.fixture(autouse=True)
def seed():
    seed_everything(1337)
