"""`pytest tests/test_gating.py` tests what your notebook says, as it was last saved. `pytest` alone tests all notebooks.

The cells that begin with `#| export` are written to mine/gating.py, which then takes the place of makemoe/gating.py.
Modules whose tests were not asked for are the finished ones, so that no lesson fails for a mistake in another.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent


def export(module):
    "Write mine/`module`.py from the lesson's notebook, or stop: without it the tests would pass on our module."
    notebooks = sorted((ROOT / "notebooks").glob(f"[0-9][0-9]_{module}.ipynb"))
    if not notebooks:
        pytest.exit(f"notebooks/ holds no lesson called NN_{module}.ipynb: has it been renamed?", returncode=2)
    try:
        cells = json.loads(notebooks[0].read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError):
        pytest.exit(f"{notebooks[0].name} is not a notebook any more", returncode=2)
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    text = "\n\n\n".join(source for source in code if source.startswith("#| export"))
    (ROOT / "mine" / f"{module}.py").write_text(text + "\n", encoding="utf-8")


def pytest_configure(config):
    asked = re.findall(r"test_(\w+)\.py", " ".join(config.args))
    shutil.rmtree(ROOT / "mine", ignore_errors=True)
    (ROOT / "mine").mkdir()
    for module in asked or [path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")]:
        export(module)
    os.environ["MAKEMOE_MINE"] = str(ROOT / "mine")  # in the environment, as some tests start a command
    for name in [name for name in sys.modules if name.split(".")[0] == "makemoe"]:
        del sys.modules[name]  # was imported before we knew
