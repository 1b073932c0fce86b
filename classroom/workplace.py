"""Where students' code runs: a folder without answers, and a process in it that is ended when it hangs."""

import json
import os
import queue
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from classroom.handout import copy_package, needed_modules
from classroom.lessons import ROOT, module_of


def workplace(folder, path):
    "Fill `folder` with what an answer to the lesson `path` may use: the modules before it, its check, the data."
    copy_package(folder, needed_modules([path]) - {module_of(path)}, [module_of(path)])
    for name in "worker.py", "submission.py":
        shutil.copy(Path(__file__).parent / name, folder)


class Worker:
    "The process that judges answers to one lesson in the folder `place`, see worker.py. A lost one is replaced."

    def __init__(self, place, module):
        self.place, self.process = place, None
        hidden = ROOT / "classroom" / "hidden" / f"{module}.py"
        self.lesson = dict(module=module, hidden=hidden.read_text(encoding="utf-8"))

    def start(self):
        keep = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
        place = str(self.place)
        environment = keep | {
            "PYTHONPATH": place,
            "HOME": place,
            "TMPDIR": place,
            "MPLCONFIGDIR": place,
            "MPLBACKEND": "agg",
            "PYTHONUTF8": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "MAKEMOE_FAST": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "worker.py"],
            cwd=place,
            env=environment,
            text=True,
            encoding="utf-8",
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.lines = queue.Queue()
        threading.Thread(target=self.read, args=(self.process.stdout, self.lines), daemon=True).start()
        self.send(self.lesson)
        if self.lines.get(timeout=300) is None:  # to import PyTorch may take long, and is nobody's fault
            raise RuntimeError(f"the process for answers to lesson {self.lesson['module']} does not start")

    @staticmethod
    def read(output, lines):
        for line in output:
            lines.put(line)
        lines.put(None)

    def send(self, facts):
        with suppress(OSError):  # if it is dead, that shows when nothing comes back
            self.process.stdin.write(json.dumps(facts) + "\n")
            self.process.stdin.flush()

    def ask(self, task, seconds):
        "Yields (exercise, why it fails, or None) one by one; (None, reason) when nothing comes for `seconds`."
        if not self.process:
            self.start()
        secret = secrets.token_hex(16)
        self.send(task | {"secret": secret})
        try:
            while line := self.lines.get(timeout=seconds):
                mark, _, said = line.partition(" ")
                if mark == secret:
                    exercise, reason = json.loads(said)
                    if exercise == "end":
                        return
                    yield exercise, reason
        except queue.Empty:
            yield None, "stopped, as it took too long"
        self.stop()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stop()

    def stop(self):
        if self.process:
            with suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL) if os.name == "posix" else self.process.kill()
            self.process.wait()
            self.process = None
