"""Hard to kill: whatever stops the command, and wherever, what goes on from its file ends with the same bits."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from makemoe.checkpoints import load_checkpoint
from makemoe.shakespeare import hold, stop_by_signal

ROOT = Path(__file__).parent.parent


class State:
    stop = False


def timeless(history):
    "The records without what a clock measured."
    return [
        {key: value for key, value in record.items() if key not in ("seconds", "tokens_per_second")}
        for record in history
    ]


def rewrite(path, change):
    "The file with other tensors or facts: `change` works on both in place."
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    facts, tensors = json.loads(metadata["makemoe"]), load_file(path)
    change(tensors, facts)
    save_file(tensors, path, metadata=metadata | {"makemoe": json.dumps(facts)})


@pytest.fixture
def usual_ctrl_c():
    "Ctrl-C raises KeyboardInterrupt, whatever was left by others: in the background it is ignored."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_signal_waits_for_the_step_and_the_second_does_not(usual_ctrl_c):
    for number in signal.SIGINT, signal.SIGTERM:
        state, before = State(), [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        with pytest.raises(KeyboardInterrupt), stop_by_signal(state):
            signal.raise_signal(number)
            assert state.stop == number
            signal.raise_signal(number)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_in_another_thread_where_no_signal_comes_nothing_is_changed():
    before, inside = signal.getsignal(signal.SIGINT), []

    def run():
        with stop_by_signal(State()):
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert inside == [before]


# ---- processes: the command itself, started many times. A parent that has imported everything forks one per command,
# so that a start costs milliseconds and not seconds.

PARENT = """
import io, json, os, signal, sys
import makemoe.checkpoints, makemoe.shakespeare
import matplotlib.pyplot as plt
import torch
import torch._dynamo  # what every optimizer imports, in seconds
torch.set_num_threads(1)
plt.figure().savefig(io.BytesIO())  # finds the fonts
plt.close()
makemoe.shakespeare.draw_history = lambda _, folder: [(folder / f"{name}.png").touch() for name in ("loss", "load")]
real_write = makemoe.shakespeare.write
makemoe.shakespeare.write = lambda *four, **settings: real_write(*four[:3], min(four[3], 200), **settings)

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def die_in_save(where, number, share):
    "Be killed in the save of this number, from 1: in the middle of writing, or around flushing and renaming."
    calls = []
    def now():
        calls.append(1)
        return len(calls) == number
    if where == "write":
        def half(path, mode):
            file = open(path, mode)
            if mode == "wb" and now():
                write = file.write
                file.write = lambda content: [write(content[: int(share * len(content))]), file.flush(), die()]
            return file
        makemoe.checkpoints.open = half
    else:
        real = getattr(os, where)
        def spoiled(*arguments):
            hit = now()
            if hit and share < 0.5:
                die()
            real(*arguments)
            if hit:
                die()
        setattr(os, where, spoiled)

for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(order["folder"])
        for number, name in (1, "out.txt"), (2, "err.txt"):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        if order["limit"]:
            import resource
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
        if order["die"]:
            die_in_save(*order["die"])
        sys.argv = ["makemoe", *order["words"]]
        status = 0
        try:
            makemoe.shakespeare.main()
        except SystemExit as leave:
            status = leave.code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)  # without the seconds of tidying up what the parent imported
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="forks processes and kills them, which this system cannot"
)
MODEL = (
    "--n-layer 1 --n-embd 16 --n-head 2 --n-hidden 16 --num-experts 4 --block-size 16 --router noisy --dropout 0.2 "
    "--capacity-factor 1 --experts grouped --device cpu"
).split()
SETTINGS = "--data play.txt --steps 100 --eval-every 2 --batch-size 4 --eval-blocks 4 --warmup 10 --lr 0.01".split()
COMMAND = ["train", "laptop", *MODEL, *SETTINGS]
CHECKPOINT = Path("runs/laptop/model.safetensors")


class Life:
    "One process of the command."

    def __init__(self, parent, folder, words, die=None, limit=0):
        self.parent, self.folder = parent, folder
        for name in "out.txt", "err.txt":
            (folder / name).write_text("")
        print(json.dumps(dict(folder=str(folder), words=words, die=die, limit=limit)), file=parent.stdin, flush=True)
        self.pid = int(parent.stdout.readline())

    def wait(self):
        "(exit status, what it said, what it complained of); a status below 0 is a signal."
        status = int(self.parent.stdout.readline())
        return status, *[(self.folder / name).read_text(encoding="utf-8") for name in ("out.txt", "err.txt")]

    def steps(self):
        "How many evaluations it has reported so far."
        return (self.folder / "out.txt").read_text(encoding="utf-8").count("\nstep ")

    def kill_after(self, reports, seconds, number=signal.SIGKILL):
        "Send a signal some moments after so many reports. ProcessLookupError if it ended before."
        while self.steps() < reports:
            os.kill(self.pid, 0)  # is it still there?
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            pass
        os.kill(self.pid, number)
        return self.wait()


@pytest.fixture(scope="module")
def parent():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "COLUMNS": "200"}
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.stdin.close()
    process.wait()
    process.stdout.close()


@pytest.fixture
def start(parent, tmp_path):
    (tmp_path / "play.txt").write_text("KING:\nTo be, or not to be, that is the question.\n\n" * 60, encoding="utf-8")
    return lambda words, **how: Life(parent, tmp_path, words, **how)


@pytest.fixture(scope="module")
def uninterrupted(parent, tmp_path_factory):
    "What the run leaves when nobody disturbs it."
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "play.txt").write_text("KING:\nTo be, or not to be, that is the question.\n\n" * 60, encoding="utf-8")
    status, _, complaint = Life(parent, folder, COMMAND).wait()
    assert status == 0, complaint
    return results(folder)


def results(folder):
    "(weights, history without times, sample) of the finished run in `folder`."
    _, _, history = load_checkpoint(folder / CHECKPOINT)
    weights = {name: tensor for name, tensor in load_file(folder / CHECKPOINT).items() if name != "history"}
    return weights, timeless(history), (folder / "runs/laptop/sample.txt").read_text(encoding="utf-8")


def assert_same(found, expected):
    assert found[0].keys() == expected[0].keys()
    assert all(torch.equal(found[0][name], expected[0][name]) for name in expected[0])
    assert found[1:] == expected[1:]


def saved_step(folder):
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        return json.loads(file.metadata()["makemoe"])["training"]["step"]


@needs_fork
def test_killed_at_many_moments_it_ends_as_if_it_had_never_been(start, tmp_path, uninterrupted):
    dice, words, places, halves = random.Random(2024), COMMAND, [], 0
    kills = [
        [where, dice.randint(2, 3), dice.random()] for where in ("write", "fsync", "replace") for _ in range(2)
    ] + [None] * 6
    dice.shuffle(kills)
    for die in kills:
        if die:
            status, _, complaint = start(words, die=die).wait()
        else:
            status, _, complaint = start(words).kill_after(dice.randint(1, 3), dice.random() / 50)
        assert status == -signal.SIGKILL, complaint
        if (tmp_path / CHECKPOINT).exists():
            words = [*COMMAND, "--resume"]
            places.append(saved_step(tmp_path))
        halves += any((tmp_path / "runs/laptop").glob("*.unfinished"))
    assert places == sorted(places) and len(set(places)) >= 6, "it should have gone on from many places"
    assert halves >= 1, "some kills should have left half a file"
    status, said, complaint = start(words).wait()
    assert status == 0, complaint
    assert f"going on with {CHECKPOINT.parent} at step {places[-1]}" in said
    assert_same(results(tmp_path), uninterrupted)
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert not list((tmp_path / "runs/laptop").glob("*.unfinished")), "what the killed ones left is cleared away"


@needs_fork
@pytest.mark.parametrize("share", [0, 1], ids=["before", "after"])
def test_killed_around_the_last_save_of_all_it_has_finished_or_finishes(start, tmp_path, share):
    "Saves of four steps: at 0, 2 and 4, and at the very end that of the finished model."
    words = [*COMMAND, "--steps", "4"]
    status, said, _ = start(words, die=["replace", 4, share]).wait()
    assert status == -signal.SIGKILL and "loss on the whole held-out tenth" in said
    model, _, history = load_checkpoint(tmp_path / CHECKPOINT)
    status, said, complaint = start([*words, "--resume"]).wait()
    if share == 1:
        assert status == 2 and complaint == "makemoe: runs/laptop is finished: there is nothing to go on with\n"
    else:
        assert status == 0 and "at step 4\n" in said, complaint
    found = results(tmp_path)
    assert all(torch.equal(found[0][name], weight) for name, weight in model.state_dict().items())
    assert found[1] == timeless(history) and len(found[2]) == 201


@needs_fork
def test_ctrl_c_and_sigterm_save_and_end_with_their_status_and_nothing_is_lost(start, tmp_path, uninterrupted):
    words, done = COMMAND, 0
    for number, expected in (signal.SIGINT, 130), (signal.SIGTERM, 143):
        status, said, complaint = start(words).kill_after(3, 0.007, number)
        assert status == expected and complaint == ""
        assert f"stopped; {CHECKPOINT} is saved: the same command with --resume goes on\n" in said
        step = saved_step(tmp_path)
        assert step > done and (done == 0 or f"going on with runs/laptop at step {done}\n" in said)
        assert (tmp_path / "runs/laptop/loss.png").exists() and (tmp_path / "runs/laptop/load.png").exists()
        words, done = [*COMMAND, "--resume"], step
    assert start(words).wait()[0] == 0
    assert_same(results(tmp_path), uninterrupted)


@needs_fork
def test_two_ctrl_c_within_moments_leave_no_unfinished_file(start, tmp_path):
    for attempt in range(4):
        life = start(COMMAND if attempt == 0 else [*COMMAND, "--resume"])
        while life.steps() < 1:
            os.kill(life.pid, 0)
        for _ in range(2):
            os.kill(life.pid, signal.SIGINT if attempt % 2 else signal.SIGTERM)
            time.sleep(0.001 * attempt)
        status, said, complaint = life.wait()
        assert status == (130 if attempt % 2 else 143) and complaint == "" and "--resume goes on" in said, complaint
        assert not list((tmp_path / "runs/laptop").glob("*.unfinished"))
        load_checkpoint(tmp_path / CHECKPOINT)


@needs_fork
def test_ctrl_c_after_the_last_step_says_how_to_go_on(start, tmp_path):
    words = [*COMMAND, "--steps", "4"]
    life = start(words)
    while "the held-out text" not in (tmp_path / "out.txt").read_text(encoding="utf-8"):
        os.kill(life.pid, 0)
    os.kill(life.pid, signal.SIGINT)
    status, said, complaint = life.wait()
    assert status == 130 and "--resume goes on" in said and complaint == ""
    status, said, complaint = start([*words, "--resume"]).wait()
    assert status == 0 and "going on with runs/laptop at step 4\n" in said, complaint


def complaint_of(life):
    status, _, complaint = life.wait()
    assert status == 2 and complaint.startswith("makemoe: ") and complaint.count("\n") == 1, (status, complaint)
    return complaint


def leave_unfinished(start, words=COMMAND, reports=2):
    assert start(words).kill_after(reports, 0)[0] == -signal.SIGKILL


@needs_fork
def test_a_full_disk_is_one_line_and_loses_nothing(start, tmp_path):
    complaint = complaint_of(start(COMMAND, limit=20_000))  # no file may be longer: not even the first is saved
    assert f"cannot save {CHECKPOINT} (File too large); what was saved there before is whole" in complaint
    assert list((tmp_path / "runs").iterdir()) == [], "an empty folder would only be in the way"
    leave_unfinished(start)
    before = (tmp_path / CHECKPOINT).read_bytes()
    complaint_of(start([*COMMAND, "--resume"], limit=20_000))
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert list((tmp_path / CHECKPOINT).parent.iterdir()) == [tmp_path / CHECKPOINT]


@needs_fork
def test_a_place_that_cannot_be_written_is_one_line(start, tmp_path):
    (tmp_path / "runs").write_text("not a folder")
    assert re.search(r"(Not a directory|File exists): 'runs", complaint_of(start(COMMAND)))


@needs_fork
def test_a_loss_that_is_not_finite_names_step_rate_and_the_last_good_checkpoint(start, tmp_path):
    words = [*COMMAND[:-1], "1e30", "--final-lr", "1", "--warmup", "0", "--eval-every", "1"]
    complaint = complaint_of(start(words))
    found = re.fullmatch(
        r"makemoe: .*(not finite|is nan|is inf).*; "
        rf"{CHECKPOINT} is of the last good evaluation; a smaller --lr may help\n",
        complaint,
    )
    assert found, complaint
    assert all(
        tensor.isfinite().all() for tensor in load_file(tmp_path / CHECKPOINT).values() if tensor.is_floating_point()
    )


@needs_fork
def test_what_cannot_be_resumed_is_one_line(start, tmp_path):
    resume = [*COMMAND, "--resume"]
    assert "there is no run runs/laptop to go on with: train without --resume" in complaint_of(start(resume))
    leave_unfinished(start)
    before = (tmp_path / CHECKPOINT).read_bytes()

    assert "runs/laptop has other settings: batch_size was 4, is 5" in complaint_of(
        start([*resume, "--batch-size", "5"])
    )
    assert "n_embd was 16, is 32; lr was 0.01, is 0.5" in complaint_of(
        start([*resume, "--n-embd", "32", "--lr", "0.5"])
    )
    assert "optimizer was adamw, is muon" in complaint_of(start([*resume, "--optimizer", "muon"]))
    (tmp_path / "other.txt").write_text("QUEEN:\nOf another text there are other characters?\n" * 60, encoding="utf-8")
    complaint = complaint_of(start([*resume, "--data", "other.txt"]))
    assert re.search(
        r"vocab_size was 22, is 20; text was 3000 characters, checksum [0-9a-f]{8}, is 3060 ", complaint
    ), complaint
    assert "there is no run runs/lap to go on with" in complaint_of(start([*resume, "--name", "lap"]))

    (tmp_path / CHECKPOINT).write_bytes(before[:-1])
    assert f"{CHECKPOINT} is not a safetensors file, or not all of one" in complaint_of(start(resume))
    (tmp_path / CHECKPOINT).write_bytes(before)
    rewrite(tmp_path / CHECKPOINT, lambda tensors, facts: facts.update(version=99))
    assert f"{CHECKPOINT} was saved by a newer version of makemoe" in complaint_of(start(resume))
    (tmp_path / CHECKPOINT).write_bytes(before)
    rewrite(tmp_path / CHECKPOINT, lambda tensors, facts: facts["training"].update(notes=7))
    assert f"{CHECKPOINT} does not fit" in complaint_of(start(resume))
    save_file({"weight": torch.zeros(2)}, tmp_path / CHECKPOINT)
    assert f"{CHECKPOINT} is a safetensors file, but not a checkpoint of makemoe" in complaint_of(start(resume))


@needs_fork
def test_of_several_runs_the_furthest_with_the_same_settings_goes_on_whatever_the_clock_says(start, tmp_path):
    for words, reports in (
        ([*COMMAND, "--seed", "1"], 1),
        (COMMAND, 6),
        (COMMAND, 1),
        (COMMAND, 9),
        ([*COMMAND, "--name", "laptop-x"], 1),
    ):
        leave_unfinished(start, words, reports)
    runs = tmp_path / "runs"
    assert {path.name for path in runs.iterdir()} == {"laptop", "laptop-2", "laptop-3", "laptop-4", "laptop-x"}
    os.utime(runs / "laptop-2/model.safetensors", (0, 0))  # the clock went back
    spoiled = bytearray((runs / "laptop-4/model.safetensors").read_bytes())
    spoiled[-9] ^= 1  # one bit of a weight: the newest, and the furthest, is damaged
    (runs / "laptop-4/model.safetensors").write_bytes(spoiled)
    (runs / "laptop-5").mkdir()
    (runs / "laptop-5/model.safetensors").write_text("torn")
    for words, name in (COMMAND, "laptop-2"), ([*COMMAND, "--seed", "1"], "laptop"):
        status, said, complaint = start([*words, "--resume"]).kill_after(1, 0)
        assert status == -signal.SIGKILL and f"going on with runs/{name} at step" in said, complaint


@needs_fork
def test_a_run_that_goes_on_elsewhere_is_not_joined(start, tmp_path):
    resume = [*COMMAND, "--resume"]
    life = start(COMMAND)
    assert life.kill_after(2, 0)[0] == -signal.SIGKILL
    before = (tmp_path / CHECKPOINT).read_bytes()
    with hold(tmp_path / "runs/laptop", "busy"):  # as the process that was killed did
        assert f"runs/laptop is being trained by process {life.pid}: stop that one first" in complaint_of(start(resume))
        assert (tmp_path / CHECKPOINT).read_bytes() == before
        status, *_ = start(COMMAND).kill_after(1, 0)  # a new run has a folder of its own
        assert status == -signal.SIGKILL and (tmp_path / "runs/laptop-2").is_dir()
    assert start(resume).kill_after(1, 0)[0] == -signal.SIGKILL, "the lock has ended"


@needs_fork
def test_a_name_such_as_exp_lr1_can_be_resumed(start, tmp_path):
    words = [*COMMAND, "--name", "exp/lr1"]
    leave_unfinished(start, words)
    status, said, _ = start([*words, "--resume"]).kill_after(1, 0)
    assert status == -signal.SIGKILL and "going on with runs/exp/lr1 at step" in said
