"Which claim catches which answer: `python -m tests.answers gating [exercise]`."

import importlib
import sys

from tests.answers import marks

module, *wanted = sys.argv[1:]
bank = importlib.import_module(f"tests.answers.{module}").ANSWERS
for exercise in wanted or bank:
    print(f"{exercise}: ours: {marks(module, exercise)}")
    for name, answer in bank[exercise].items():
        print(f"    {name[:60]:60}  {marks(module, exercise, answer)}")
