"""Exact and hard to kill: whatever stops a training, and wherever, what goes on from its file ends with the same bits."""

import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from makemoe import training
from makemoe.data import CharTokenizer
from makemoe.lab import seed_everything
from makemoe.model import MoEConfig, SparseMoELanguageModel
from makemoe.shakespeare import stop_by_signal
from makemoe.training import TrainConfig, TrainingState, load_checkpoint, load_training, save_checkpoint, save_training, train

ROOT = Path(__file__).parent.parent
TOKENIZER = CharTokenizer("abcdefghijk")
TINY = MoEConfig(vocab_size=11, block_size=8, n_embd=16, n_head=2, n_layer=2, num_experts=4, top_k=2, n_hidden=16)
RESTLESS = replace(TINY, router="noisy", dropout=0.3)  # random wherever it may be
SHORT = TrainConfig(steps=7, batch_size=4, lr=0.01, warmup=2, eval_every=3, eval_blocks=4)
TEXTS = [torch.randint(11, (length,), generator=torch.Generator().manual_seed(length)) for length in (200, 90)]


def new_state(config=RESTLESS, settings=SHORT):
    seed_everything(1337)
    return TrainingState(SparseMoELanguageModel(config), settings)


def timeless(history):
    "The records without what a clock measured."
    return [{key: value for key, value in record.items() if key not in ("seconds", "tokens_per_second")} for record in history]


def stop_in(state, step):
    "Ask for a stop in the middle of step number `step`."
    state.model.lm_head.register_forward_pre_hook(
        lambda module, _: setattr(state, "stop", True) if module.training and state.step == step else None)


# ---- in one process


@pytest.mark.parametrize("changes", [
    {}, dict(experts="loop"), dict(capacity_factor=0.7), dict(bias=True, norm="layer", positions="learned", balance_coef=0.0),
], ids=["grouped", "loop", "capacity", "bias"])
@pytest.mark.parametrize("optimizer, last", [*(("adamw", last) for last in range(7)), ("muon", 0), ("muon", 4)])
def test_a_training_that_goes_on_from_its_file_ends_with_the_same_bits(tmp_path, changes, optimizer, last):
    config, settings = replace(RESTLESS, **changes), replace(SHORT, optimizer=optimizer)
    whole = new_state(config, settings)
    train(whole.model, *TEXTS, settings, state=whole)
    afterwards = torch.rand(3)

    state = new_state(config, settings)
    stop_in(state, last)
    train(state.model, *TEXTS, settings, state=state)
    assert state.step == last + 1
    save_training(tmp_path / "m", state, TOKENIZER)
    seed_everything(99)  # another process has other random numbers
    again, tokenizer = load_training(tmp_path / "m")
    assert tokenizer.characters == TOKENIZER.characters and again.config == settings
    train(again.model, *TEXTS, again.config, state=again)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters()))
    assert timeless(again.history) == timeless(whole.history)
    assert torch.equal(torch.rand(3), afterwards)


def test_saving_disturbs_nothing(tmp_path):
    runs = []
    for on_eval in None, lambda record: save_training(tmp_path / "m", state, TOKENIZER):
        state = new_state()
        train(state.model, *TEXTS, SHORT, on_eval=on_eval, state=state)
        runs.append((state, torch.rand(3)))
    (one, numbers), (other, same) = runs
    assert torch.equal(numbers, same) and timeless(one.history) == timeless(other.history)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters()))


def test_everything_comes_back(tmp_path):
    state = new_state()
    state.notes = {"text": "Größe", "number": math.inf}
    stop_in(state, 4)
    train(state.model, *TEXTS, SHORT, state=state)
    random.seed(3)
    random.gauss(0, 1)  # leaves a number for the next call
    save_training(tmp_path / "m", state, TOKENIZER)
    expected = random.gauss(0, 1), random.random(), torch.rand(2), torch.rand(2, generator=state.order)
    random.seed(4)
    again, _ = load_training(tmp_path / "m")
    found = random.gauss(0, 1), random.random(), torch.rand(2), torch.rand(2, generator=again.order)
    assert found[:2] == expected[:2] and torch.equal(found[2], expected[2]) and torch.equal(found[3], expected[3])
    assert (again.step, again.history, again.notes, again.stop) == (5, state.history, state.notes, False)
    for ours, theirs in zip(state.model.parameters(), again.model.parameters()):
        memory, copy = state.optimizer.state[ours], again.optimizer.state[theirs]
        assert set(memory) == set(copy) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(memory[key], copy[key]) and memory[key].dtype == copy[key].dtype for key in memory)


def test_a_weight_that_has_had_no_gradient_has_no_memory_and_that_is_fine(tmp_path):
    state = new_state()
    save_training(tmp_path / "m", state, TOKENIZER)  # before the first step none has
    assert not any(load_training(tmp_path / "m")[0].optimizer.state.values())
    state.model.lm_head.bias.requires_grad_(False)
    train(state.model, *TEXTS, SHORT, state=state)
    save_training(tmp_path / "m", state, TOKENIZER)
    again, _ = load_training(tmp_path / "m")
    assert [name for name, weight in again.model.named_parameters() if not again.optimizer.state[weight]] == ["lm_head.bias"]


def test_the_seconds_go_on(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    state = new_state()
    now[0] += 30
    save_training(tmp_path / "m", state, TOKENIZER)
    now[0] += 1000  # nobody worked
    again, _ = load_training(tmp_path / "m")
    now[0] += 2
    assert again.seconds == 32


def test_the_file_of_an_unfinished_training_is_a_model_like_any_other(tmp_path):
    state = new_state()
    train(state.model, *TEXTS, SHORT, state=state)
    save_training(tmp_path / "m", state, TOKENIZER)
    model, _, history = load_checkpoint(tmp_path / "m")
    assert history == state.history
    assert torch.equal(model(TEXTS[0][None, :8]).logits, state.model(TEXTS[0][None, :8]).logits)


def test_weights_that_are_not_finite_are_not_saved_over_good_ones(tmp_path):
    state, path = new_state(), tmp_path / "m"
    save_training(path, state, TOKENIZER)
    before = path.read_bytes()
    with torch.no_grad():
        state.model.lm_head.weight[3, 3] = math.inf
    with pytest.raises(FloatingPointError, match=r"a weight of step 0 is not finite \(learning rate 0.005\)"):
        save_training(path, state, TOKENIZER)
    assert path.read_bytes() == before


def saved(path):
    state = new_state()
    stop_in(state, 2)
    train(state.model, *TEXTS, SHORT, state=state)
    save_training(path, state, TOKENIZER)


def rewrite(path, change):
    "The file with other tensors or facts: `change` works on both in place."
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["makemoe"])
    tensors = load_file(path)
    change(tensors, facts)
    save_file(tensors, path, metadata={"makemoe": json.dumps(facts)})


@pytest.mark.parametrize("change, message", [
    (lambda tensors, facts: tensors.pop("training.order"), "training.order"),
    (lambda tensors, facts: tensors.pop("training.random.cpu"), "training.random.cpu"),
    (lambda tensors, facts: tensors.pop("training.exp_avg.lm_head.weight"), "training.exp_avg.lm_head.weight"),
    (lambda tensors, facts: tensors.update({"training.exp_avg_sq.norm.weight": torch.zeros(3)}), "RuntimeError"),
    (lambda tensors, facts: tensors.update({"training.order": torch.zeros(3)}), "training|TypeError|RuntimeError"),
    (lambda tensors, facts: facts["training"].pop("step"), "KeyError: 'step'"),
    (lambda tensors, facts: facts["training"].update(random=None), "TypeError"),
    (lambda tensors, facts: facts["training"]["config"].update(lr=-1), "lr is -1"),
    (lambda tensors, facts: facts["training"]["config"].update(future=1), "future"),
    (lambda tensors, facts: facts.update(characters="abc"), "3 characters for 11 tokens"),
])
def test_a_file_with_something_missing_or_foreign_is_refused_in_one_line(tmp_path, change, message):
    saved(tmp_path / "m")
    rewrite(tmp_path / "m", change)
    with pytest.raises(ValueError, match=f"does not fit this version of makemoe .*({message})") as caught:
        load_training(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_finished_newer_and_truncated_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "m"
    save_checkpoint(path, new_state().model, TOKENIZER)
    with pytest.raises(ValueError, match="is of a finished training: there is nothing to go on with"):
        load_training(path)
    saved(path)
    whole = path.read_bytes()
    for length in 0, 100, len(whole) // 2, len(whole) - 1:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not a safetensors file, or not all of one"):
            load_training(path)
    path.write_bytes(whole)
    rewrite(path, lambda tensors, facts: facts.update(version=training.VERSION + 1))
    with pytest.raises(ValueError, match="was saved by a newer version of makemoe"):
        load_training(path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_its_random_numbers_and_the_memory_come_back_to_it(tmp_path):
    seed_everything(1337)
    state = TrainingState(SparseMoELanguageModel(RESTLESS).cuda(), SHORT)
    stop_in(state, 4)
    train(state.model, *TEXTS, SHORT, state=state)
    save_training(tmp_path / "m", state, TOKENIZER)
    expected = torch.rand(3, device="cuda")
    seed_everything(99)
    again, _ = load_training(tmp_path / "m", "cuda")
    assert torch.equal(torch.rand(3, device="cuda"), expected)
    for ours, theirs in zip(state.model.parameters(), again.model.parameters()):
        memory, copy = state.optimizer.state[ours], again.optimizer.state[theirs]
        assert all(torch.equal(memory[key], copy[key]) and memory[key].device == copy[key].device for key in memory)
    assert [record["step"] for record in train(again.model, *TEXTS, SHORT, state=again)] == [0, 3, 6, 7]


@pytest.fixture
def usual_ctrl_c():
    "Ctrl-C raises KeyboardInterrupt, whatever was left by others: in the background it is ignored."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_signal_waits_for_the_step_and_the_second_does_not(usual_ctrl_c):
    state = new_state()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), stop_by_signal(state):
        signal.raise_signal(signal.SIGINT)
        assert state.stop == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_in_another_thread_where_no_signal_comes_nothing_is_changed():
    before, inside = signal.getsignal(signal.SIGINT), []

    def run():
        with stop_by_signal(new_state()):
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert inside == [before]


# ---- processes: the command itself, started many times. A parent that has imported everything forks one per command,
# so that a start costs milliseconds and not seconds.

PARENT = """
import io, json, os, signal, sys
import makemoe.shakespeare, makemoe.training
import matplotlib.pyplot as plt
import torch
import torch._dynamo  # what every optimizer imports, in seconds
torch.set_num_threads(1)
plt.figure().savefig(io.BytesIO())  # finds the fonts
plt.close()

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
            write = file.write
            if now():
                file.write = lambda content: [write(content[: int(share * len(content))]), file.flush(), die()]
            return file
        makemoe.training.open = half
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
        sys.argv = sys.orig_argv = ["makemoe", *order["words"]]
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

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes and kills them, which this system cannot")
MODEL = ("--n-layer 1 --n-embd 16 --n-head 2 --n-hidden 16 --num-experts 4 --block-size 16 --router noisy --dropout 0.2 "
         "--capacity-factor 1 --experts grouped --device cpu").split()
SETTINGS = "--data play.txt --steps 200 --eval-every 2 --batch-size 4 --eval-blocks 4 --warmup 10 --lr 0.01".split()
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
    process = subprocess.Popen([sys.executable, "-c", PARENT], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
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
    return load_file(folder / CHECKPOINT), timeless(history), (folder / "runs/laptop/sample.txt").read_text(encoding="utf-8")


def assert_same(found, expected):
    assert found[0].keys() == expected[0].keys()
    assert all(torch.equal(found[0][name], expected[0][name]) for name in expected[0])
    assert found[1:] == expected[1:]


def saved_step(folder):
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        return json.loads(file.metadata()["makemoe"])["training"]["step"]


@needs_fork
def test_killed_at_thirty_random_moments_it_ends_as_if_it_had_never_been(start, tmp_path, uninterrupted):
    dice, words, places, halves = random.Random(2024), COMMAND, [], 0
    in_a_save = [[where, dice.randint(1, 3), dice.random()] for where in ("write", "fsync", "replace") for _ in range(4)]
    kills = in_a_save + [None] * 18
    dice.shuffle(kills)
    for die in kills:
        if die:
            status, _, complaint = start(words, die=die).wait()
        else:
            status, _, complaint = start(words).kill_after(dice.randint(0, 3), dice.random() / 50)
        assert status == -signal.SIGKILL, complaint
        if (tmp_path / CHECKPOINT).exists():
            words = [*COMMAND, "--resume"]
            places.append(saved_step(tmp_path))
        halves += (tmp_path / CHECKPOINT).with_name("model.safetensors.unfinished").exists()
    assert places == sorted(places) and len(set(places)) >= 12, "it should have gone on from many places"
    assert halves >= 4, "some kills should have left half a file"
    status, said, complaint = start(words).wait()
    assert status == 0, complaint
    assert f"going on with {CHECKPOINT.parent} at step {places[-1]}" in said
    assert_same(results(tmp_path), uninterrupted)
    assert len(list((tmp_path / "runs").iterdir())) == 1


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
    assert found[1] == timeless(history) and len(found[2]) == 1001


@needs_fork
def test_ctrl_c_and_sigterm_save_and_end_with_their_status_and_nothing_is_lost(start, tmp_path, uninterrupted):
    words, done = COMMAND, 0
    for number, expected in (signal.SIGINT, 130), (signal.SIGTERM, 143):
        status, said, complaint = start(words).kill_after(3, 0.007, number)
        assert status == expected and complaint == ""
        step, again = re.search(rf"stopped at step (\d+); everything is saved in {CHECKPOINT}\nto go on: makemoe (.*)\n", said).groups()
        assert saved_step(tmp_path) == int(step) > done
        assert again == shlex.join([*COMMAND, "--resume"]) and said.endswith(again + "\n")
        assert done == 0 or f"going on with runs/laptop at step {done}\n" in said
        for name in "loss.png", "load.png":
            assert (tmp_path / "runs/laptop" / name).stat().st_size > 0
        words, done = shlex.split(again), int(step)
    assert start(words).wait()[0] == 0
    assert_same(results(tmp_path), uninterrupted)


def complaint_of(life):
    status, _, complaint = life.wait()
    assert status == 2 and complaint.startswith("makemoe: ") and complaint.count("\n") == 1
    return complaint


def leave_unfinished(start, words=COMMAND):
    assert start(words).kill_after(2, 0)[0] == -signal.SIGKILL


@needs_fork
def test_a_full_disk_is_one_line_and_loses_nothing(start, tmp_path):
    complaint = complaint_of(start(COMMAND, limit=20_000))  # no file may be longer: not even the first is saved
    assert f"cannot save {CHECKPOINT} (File too large); what was saved there before is whole" in complaint
    assert list((tmp_path / "runs/laptop").iterdir()) == []
    (tmp_path / "runs/laptop").rmdir()
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
    found = re.fullmatch(r"makemoe: the loss of step (\d+) is (?:nan|inf) \(learning rate 1e\+30\); "
                         rf"the last good checkpoint is {CHECKPOINT}, of step (\d+); a smaller --lr may help\n", complaint)
    assert found, complaint
    assert int(found[2]) == saved_step(tmp_path) < int(found[1]) + 1
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / CHECKPOINT).values())


@needs_fork
def test_what_cannot_be_resumed_is_one_line(start, tmp_path):
    resume = [*COMMAND, "--resume"]
    assert "there is no run runs/laptop to go on with: train without --resume" in complaint_of(start(resume))
    leave_unfinished(start)
    before = (tmp_path / CHECKPOINT).read_bytes()

    assert "runs/laptop has other settings: batch_size was 4, is 5" in complaint_of(start([*resume, "--batch-size", "5"]))
    assert "n_embd was 16, is 32; lr was 0.01, is 0.5" in complaint_of(start([*resume, "--n-embd", "32", "--lr", "0.5"]))
    (tmp_path / "other.txt").write_text("QUEEN:\nOf another text there are other characters?\n" * 60, encoding="utf-8")
    complaint = complaint_of(start([*resume, "--data", "other.txt"]))
    assert re.search(r"text was 3000 characters \(sha256 [0-9a-f]{12}\), is 3060 characters .*; vocab_size was 22, is 20", complaint), complaint
    assert "there is no run runs/lap to go on with" in complaint_of(start([*resume, "--name", "lap"]))

    (tmp_path / CHECKPOINT).write_bytes(before[:-1])
    assert f"{CHECKPOINT} is not a safetensors file, or not all of one" in complaint_of(start(resume))
    (tmp_path / CHECKPOINT).write_bytes(before)
    rewrite(tmp_path / CHECKPOINT, lambda tensors, facts: facts.update(version=99))
    assert f"{CHECKPOINT} was saved by a newer version of makemoe" in complaint_of(start(resume))
    save_file({"weight": torch.zeros(2)}, tmp_path / CHECKPOINT)
    assert f"{CHECKPOINT} is a safetensors file, but not a checkpoint of makemoe" in complaint_of(start(resume))


@needs_fork
def test_of_several_runs_the_newest_with_the_same_settings_goes_on(start, tmp_path):
    others = [[*COMMAND, "--seed", "1"], COMMAND, COMMAND, [*COMMAND, "--seed", "2"], [*COMMAND, "--name", "laptop-x"]]
    for words in others:
        leave_unfinished(start, words)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"laptop", "laptop-2", "laptop-3", "laptop-4", "laptop-x"}
    for words, name in ([*COMMAND], "laptop-3"), ([*COMMAND, "--seed", "1"], "laptop"):
        status, said, _ = start([*words, "--resume"]).kill_after(1, 0)
        assert status == -signal.SIGKILL and f"going on with runs/{name} at step" in said
