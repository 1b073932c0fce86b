"""The process in which students' code runs. It is told what to check on standard input, and knows no answers.

Before their code runs, this process gives up what an answer does not need: reading files outside of the workplace
and of Python itself, writing, starting programs, the network, foreign functions. That is done with an audit hook of
Python, which stops what students are known to try; code that is written to break out of Python will break out.
"""

import builtins
import importlib
import json
import os
import sys
import tempfile
import types
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  loaded before files are out of reach, as some answers draw
import submission  # copied beside this file
import torch
from submission import build, verdict

FORBIDDEN = (
    "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "os.fork", "os.kill", "pty.",
    "socket.", "ctypes.", "os.putenv", "sys.setprofile", "sys.settrace", "gc.get_", "sys._current_frames",
)  # fmt: skip
FILES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown",
         "os.truncate", "shutil.")  # fmt: skip


def guard(readable, closed, scratch):
    """From now on, only files below the folders `readable`, but not below `closed`, can be read.

    Files can only be written below `scratch`.
    """
    folders = tuple(os.path.realpath(folder) + os.sep for folder in (*readable, scratch))
    closed, scratch = (os.path.realpath(folder) + os.sep for folder in (closed, scratch))

    def place(path):
        return os.path.realpath(os.fsdecode(path)) + os.sep

    def watch(event, arguments):
        if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = place(arguments[0])
            writes = event == "open" and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            inside = path.startswith(folders) and not path.startswith(closed)
            if path != os.devnull + os.sep and not (path.startswith(scratch) if writes else inside):
                raise PermissionError(f"an answer may not {'write' if writes else 'read'} files here")
        elif event.startswith(FILES):
            paths = [path for path in arguments if isinstance(path, (str, bytes, os.PathLike))]
            if not all(place(path).startswith(scratch) for path in paths):
                raise PermissionError("an answer may not write files here")
        elif event == "sys._getframe":
            try:
                raise ValueError
            except ValueError as error:  # the way to the caller's frame that does not call this again
                caller = error.__traceback__.tb_frame.f_back
            if caller.f_code.co_filename.startswith("<cell"):
                raise PermissionError("an answer may not look at who calls it")
        elif event.startswith(FORBIDDEN):
            raise PermissionError(f"an answer may not use {event.split('/')[0]}")

    sys.addaudithook(watch)


def fingerprint(modules):
    "What a check relies on: {(place, name): identity} of all functions and classes there."
    places = [builtins, torch, torch.nn, torch.nn.functional, torch.testing, torch.Tensor, torch.autograd, *modules]
    found = {(place, name): id(value) for place in places for name, value in vars(place).items() if callable(value)}
    code = [value for place in modules for value in vars(place).values() if isinstance(value, types.FunctionType)]
    found |= {(function, "code"): (id(function.__code__), id(function.__defaults__)) for function in code}
    return found | {(torch.Tensor, "attributes"): tuple(sorted(vars(torch.Tensor)))}


def judge(task, modules, say):
    "Build the answers of one submission and check them. After that this process cannot be trusted any more."
    shown, hidden = modules[:2]
    before = fingerprint(modules)
    here = Path(__file__).resolve().parent
    system = [path for path in ("/usr", "/lib", "/proc/self", "/dev/shm") if os.path.exists(path)]
    scratch = tempfile.tempdir = tempfile.mkdtemp(dir=here)
    os.chdir(scratch)
    guard([here, sys.prefix, sys.base_prefix, *system], here / "makemoe" / "checks", scratch)
    for name in [name for name in sys.modules if name.startswith("makemoe.checks")]:
        sys.modules[name] = None  # an answer cannot import the checks, in which there are answers

    names, problems = build(task["cells"], set(task["released"]), set(task["names"]))
    say("ready", None)

    def stubbed(*arguments, **settings):
        raise NotImplementedError

    for exercise in task["exercises"]:
        checks = [
            getattr(module, f"check_{exercise}") for module in (shown, hidden) if hasattr(module, f"check_{exercise}")
        ]
        reason = next(filter(None, (verdict(check, names, problems) for check in checks)), None)
        after = fingerprint(modules)
        changed = [
            f"{getattr(where, '__name__', where)}.{name}"
            for where, name in before
            if after.get((where, name)) != before[where, name]
        ]
        if changed:
            reason = f"the code changes {', '.join(changed[:3])}, which the check relies on"
        elif any(verdict(check, dict.fromkeys(names, stubbed)) is None for check in checks):
            reason = "after this answer the check passes whatever it is given"
        say(exercise, reason)


def warm_up():
    "Do what makes PyTorch load more of itself and look for a temporary folder: later it may not read files."
    weight = torch.zeros(2, device="meta", requires_grad=True)
    weight.masked_fill(weight > 0, 0.0).softmax(dim=0).sum().backward()
    torch.optim.AdamW([torch.zeros(2, requires_grad=True)])
    tempfile.gettempdir()


def main():
    "Load what all answers to a lesson need, once; then judge each submission in a copy of this process."
    lesson = json.loads(sys.stdin.readline())
    replies = os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.set_num_threads(1)
    warm_up()
    sys.meta_path[:] = [
        finder for finder in sys.meta_path if "__editable__" not in repr(finder)
    ]  # the teacher's package
    shown = importlib.import_module(f"makemoe.checks.{lesson['module']}")
    hidden = types.ModuleType("hidden")
    exec(compile(lesson["hidden"], "<hidden>", "exec"), hidden.__dict__)
    modules = [shown, hidden, importlib.import_module("makemoe.checks"), submission]
    print("loaded", file=replies, flush=True)

    for line in sys.stdin:
        task = json.loads(line)

        def say(exercise, reason):
            print(task["secret"], json.dumps([exercise, reason]), file=replies, flush=True)

        child = os.fork() if hasattr(os, "fork") else 0  # Windows cannot: there a process judges one submission
        if not child:
            judge(task, modules, say)
            os._exit(0)
        os.waitpid(child, 0)
        say("end", None)


if __name__ == "__main__":
    main()
