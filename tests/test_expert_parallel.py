"""Lesson 31. Real processes: `python -m tests.test_expert_parallel FOLDER` runs all cases in groups of 2 and 4 that it
forks, before it has used any thread, and writes into FOLDER what went wrong. A start costs seconds, a case little."""

import contextlib
import io
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import classroom.hidden.expert_parallel as hidden
import makemoe.checks.expert_parallel as checks
from makemoe import bias_balancing, expert_choice, expert_parallel, shakespeare, st_moe  # noqa: F401
from makemoe.checkpoints import load_checkpoint, load_training, read_facts, save_training
from makemoe.data import CharTokenizer
from makemoe.dropless import GroupedExperts
from makemoe.expert_parallel import AllToAll, ExpertParallelExperts, gather, parallelize, traffic
from makemoe.gating import TopkRouter, top_k_gating
from makemoe.lab import seed_everything
from makemoe.model import MoEConfig, SparseMoELanguageModel
from makemoe.noisy_gating import NoisyTopkRouter
from makemoe.optimizers import OPTIMIZERS
from makemoe.sparse_moe import Experts
from makemoe.training import TrainConfig, TrainState, train

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = CharTokenizer("abcdefghijklmnopqrst")
IDS = torch.randint(20, (3000,), generator=torch.Generator().manual_seed(3))
SMALL = dict(vocab_size=20, block_size=16, n_embd=32, n_head=2, n_layer=2, num_experts=8, n_hidden=48)
RUN = TrainConfig(steps=5, batch_size=5, warmup=2, eval_every=3, eval_blocks=7, clip=0.3, lr=1e-3)

EXPERTS = {
    "loop": lambda: Experts(8, 6, 5, "gelu"),
    "grouped": lambda: GroupedExperts(8, 6, 5, "squared_relu", bias=False, top_k=2),
    "gated": lambda: Experts(8, 6, 5, "swiglu"),
    "gated, grouped": lambda: GroupedExperts(8, 6, 5, "geglu"),
}
TRAININGS = {  # model, optimizer, expert parallel?
    "top-k": ({}, "adamw", True),
    "a loop": (dict(experts="loop"), "adamw", True),
    "gated": (dict(activation="swiglu"), "adamw", True),
    "a gated loop with biases, Muon": (dict(activation="swiglu", experts="loop", bias=True), "muon", True),
    "capacity, z-loss, Muon": (dict(capacity_factor=1.0, z_coef=0.01), "muon", True),
    "expert choice": (dict(router="expert_choice"), "adamw", True),
    "balance by bias": (dict(router="bias_balanced"), "adamw", True),
    "hash": (dict(router="hash"), "adamw", True),
    "data parallel": ({}, "adamw", False),
}


def near(ours, theirs, what, most=1e-5):
    off = (ours - theirs).abs().max().item() if ours.numel() else 0.0
    assert ours.shape == theirs.shape and off <= most, f"{what}: off by {off}"


def layer_case(kind, router, parts):
    "y and all gradients of a layer whose tokens are shared out in `parts`, against one process, in float32."
    W, rank = dist.get_world_size(), dist.get_rank()
    seed_everything(5)
    alone, x, direction = EXPERTS[kind](), torch.randn(sum(parts), 6, requires_grad=True), torch.randn(sum(parts), 6)
    routing = router(6, 8, 2)(x.detach())  # noise: the same draws in all processes
    gates = routing.gates.detach().requires_grad_()
    y = alone(x, replace(routing, gates=gates))
    (y * direction).sum().backward()
    seed_everything(5)
    layer = ExpertParallelExperts(EXPERTS[kind]())
    mine, own_gates = (t.detach().split(parts)[rank].clone().requires_grad_() for t in (x, gates))
    fields = {name: field.detach().split(parts)[rank] for name, field in vars(routing).items()}
    ours = layer(mine, type(routing)(**fields | dict(gates=own_gates)))
    (ours * direction.split(parts)[rank]).sum().backward()
    near(ours, y.split(parts)[rank], "y")
    near(mine.grad, x.grad.split(parts)[rank], "the gradient of x")
    near(own_gates.grad, gates.grad.split(parts)[rank], "the gradient of the gates")
    theirs = dict(alone.named_parameters())
    for name, weight in layer.local.named_parameters():
        if kind in ("loop", "gated"):
            number, _, leaf = name.partition(".")
            wanted = theirs[f"{rank * 8 // W + int(number)}.{leaf}"].grad
        else:
            wanted = theirs[name].grad.chunk(W)[rank]
        near(weight.grad, wanted, f"the gradient of {name}")


def shapes_case():
    "Other batch sizes and lengths in each process, and no warning on the way."
    rank, experts = dist.get_rank(), Experts(8, 6, 5)
    dist.broadcast_object_list(state := [experts.state_dict()])
    experts.load_state_dict(state[0])
    alone = Experts(8, 6, 5)
    alone.load_state_dict(state[0])
    layer, x = ExpertParallelExperts(experts), torch.randn(1 + rank, 7 - rank, 6)
    routing = top_k_gating(torch.randn(1 + rank, 7 - rank, 8), 3)
    near(layer(x, routing), alone(x, routing), "y")
    with pytest.raises(ValueError, match="3 experts cannot be shared out"):
        ExpertParallelExperts(Experts(3, 6, 5))


def fresh(changes, optimizer, train_config=RUN):
    seed_everything(1)
    model = SparseMoELanguageModel(MoEConfig(**SMALL | changes))
    return model, TrainState(model, train_config, OPTIMIZERS[optimizer](model, train_config))


def run_on(model, state, train_config=RUN):
    losses = []
    history = train(
        model, IDS[:-500], IDS[-500:], train_config, lambda _, loss: losses.append(loss.item()), None, state
    )
    return losses, history


def same_training(one, other, what=""):
    "Weights and the optimizer's memory of (model, state) and (model, state)."
    (model, state), (ours, our_state) = one, other
    assert list(model.state_dict()) == list(ours.state_dict())
    for (name, weight), our_weight in zip(model.state_dict().items(), ours.state_dict().values()):
        near(our_weight, weight, f"{what}{name}")
    for (name, weight), our_weight in zip(model.named_parameters(), ours.parameters()):
        memory, our_memory = state.optimizer.state[weight], our_state.optimizer.state[our_weight]
        assert set(memory) == set(our_memory)
        for kind in memory:
            near(our_memory[kind], memory[kind], f"{what}{kind} of {name}")


def training_case(changes, optimizer, experts):
    "Five steps, with evaluation and clipping: losses, loads, weights and memory are those of one process."
    model, state = fresh(changes, optimizer)
    parallelize(model, state, experts)
    losses, history = run_on(model, state)
    gathered = gather(model, state)
    if dist.get_rank():
        assert gathered == (None, None)
        return
    alone = fresh(changes, optimizer)
    sizes = [sum(w.numel() for name, w in m.named_parameters() if ".experts." in name) for m in (alone[0], model)]
    assert sizes[0] == sizes[1] * (dist.get_world_size() if experts else 1)
    wanted_losses, wanted_history = run_on(*alone)
    near(torch.tensor(losses), torch.tensor(wanted_losses), "the losses")
    for record, wanted in zip(history, wanted_history, strict=True):
        for name in "train_loss", "val_loss", "dropped", "imbalance":
            near(torch.tensor(record[name]), torch.tensor(wanted[name]), name)
        assert record["load"] == wanted["load"]
    same_training(alone, gathered)


def noise_case():
    "With noise or dropout, the processes still agree about shared weights, and evaluation is that of one process."
    model, state = fresh(dict(router="noisy", dropout=0.1), "adamw")
    x, y = IDS[:80].view(5, 16), IDS[1:81].view(5, 16)
    wanted = model.eval()(x, y).loss.item()
    parallelize(model, state)
    near(model(x, y).loss, torch.tensor(wanted), "the loss in evaluation")
    run_on(model, state)
    for name, weight in model.named_parameters():
        if ".experts." not in name:
            first = weight.detach().clone()
            dist.broadcast(first, 0)
            assert torch.equal(first, weight), name


def write_case(folder):
    "Three of five steps, and a checkpoint by all processes."
    for kind in "loop", "grouped":
        model, state = fresh(dict(experts=kind), "adamw")
        parallelize(model, state)
        run_on(model, state, replace(RUN, steps=3))
        gathered = gather(model, state)
        if dist.get_rank() == 0:
            notes = dict(train=asdict(RUN), optimizer="adamw")
            save_training(folder / f"{kind} by {dist.get_world_size()}", *gathered, TOKENIZER, notes)
        dist.barrier()


def read_case(folder, writers):
    "What `writers` processes have written goes on here, and ends where three and two steps in one process do."
    for kind in "loop", "grouped":
        model, state, _, _ = load_training(folder / f"{kind} by {writers}")
        if dist.is_initialized():
            parallelize(model, state)
        run_on(model, state)
        found = gather(model, state) if dist.is_initialized() else (model, state)
        if found[0]:
            wanted = fresh(dict(experts=kind), "adamw")
            run_on(*wanted, replace(RUN, steps=3))
            run_on(*wanted)
            same_training(wanted, found)


def cases(W, folder):
    "(name, function) of all cases for W processes."
    parts = {2: ([7, 5], [12, 0]), 4: ([2, 5, 0, 5], [0, 0, 0, 3])}[W]
    for kind in EXPERTS:
        for router in TopkRouter, NoisyTopkRouter:
            for part in parts:
                yield f"layer: {kind}, {router.__name__}, {part}", partial(layer_case, kind, router, part)
    yield "shapes", shapes_case
    for name, settings in TRAININGS.items():
        if W == 4 and name in ("a loop", "gated", "expert choice", "hash", "balance by bias"):
            continue  # with 2 only, for time
        yield f"training: {name}", partial(training_case, *settings)
    yield "noise", noise_case
    yield "write", partial(write_case, folder)
    if W == 2:
        yield "read what 4 wrote", partial(read_case, folder, 4)


def work(rank, W, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{W}", rank=rank, world_size=W, timeout=timedelta(seconds=60)
    )
    for name, case in cases(W, folder):
        with open(folder / f"{W}.{rank}.jsonl", "a") as file:
            began = time.perf_counter()
            try:
                case()
                problem = ""
            except BaseException:
                problem = traceback.format_exc()
            file.write(json.dumps([name, problem, time.perf_counter() - began]) + "\n")
        if problem:
            os._exit(1)  # the others would wait for it
    dist.destroy_process_group()


def be_command(rank, W, port, folder, arguments, crash):
    "One of W processes of the command, without torchrun."
    torch.set_num_threads(1)
    for number, name in (1, "out"), (2, "err"):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(W), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.chdir(folder)
    sys.argv = ["makemoe", *arguments]
    if crash and rank == 1:
        expert_parallel.stop_by_signal = None  # a TypeError, when the training begins
    try:
        runpy.run_module("makemoe", run_name="__main__")
    except Exception:
        traceback.print_exc()
        raise


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main(folder):
    import torch._dynamo  # noqa: F401  the first optimizer imports it, which takes seconds: once, not in each process

    for W in 4, 2:
        with contextlib.suppress(Exception):  # a case that failed has been written down
            mp.start_processes(work, (W, folder), nprocs=W, start_method="fork")
    for name, W, crash in ("crash", 2, True), ("three", 3, False):
        (folder / name).mkdir()
        began = time.perf_counter()
        arguments = ["train", "laptop", "--data", str(folder / "text.txt"), *TINY, "--steps", "100000"]
        context = mp.start_processes(
            be_command,
            (W, free_port(), folder / name, arguments, crash),
            nprocs=W,
            join=False,
            start_method="fork",
        )
        for process in context.processes:
            process.join(30)
        codes = [process.exitcode for process in context.processes]
        for process in context.processes:
            process.kill()
        (folder / name / "codes").write_text(json.dumps([codes, time.perf_counter() - began]))


TINY = "--n-layer 1 --n-embd 16 --n-head 2 --n-hidden 16 --block-size 32 --batch-size 4 --eval-every 10".split()
TINY += "--eval-blocks 4 --device cpu".split()
TEXT = "".join(chr(97 + i * i % 26) for i in range(6000))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "The folder in which all cases have run."
    if sys.platform != "linux":
        pytest.skip("these processes are forks")
    folder = tmp_path_factory.mktemp("processes")
    (folder / "text.txt").write_text(TEXT)
    environment = dict(os.environ, OMP_NUM_THREADS="1", MPLBACKEND="agg", PYTHONPATH=str(ROOT), TMPDIR=str(folder))
    result = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-m", "tests.test_expert_parallel", folder],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    (folder / "log").write_text(result.stdout + result.stderr)
    return folder


@pytest.mark.parametrize("module", [checks, hidden], ids=["visible", "hidden"])
def test_checks(module):
    module.check_traffic(traffic)
    module.check_all_to_all(AllToAll)
    module.check_expert_parallel_experts(ExpertParallelExperts)


@pytest.mark.parametrize("W", [2, 4])
def test_several_processes_are_one(folder, W):
    wanted = [name for name, _ in cases(W, folder)]
    for rank in range(W):
        lines = [json.loads(line) for line in (folder / f"{W}.{rank}.jsonl").read_text().splitlines()]
        for name, problem, _ in lines:
            assert not problem, f"{name}, process {rank} of {W}: {problem}"
        assert [name for name, *_ in lines] == wanted, (folder / "log").read_text()[-2000:]


def test_one_process_goes_on_with_what_several_wrote(folder):
    for writers in 2, 4:
        read_case(folder, writers)


def test_a_process_that_crashes_ends_all(folder):
    codes, seconds = json.loads((folder / "crash" / "codes").read_text())
    assert all(codes) and None not in codes and seconds < 30
    said = [(folder / "crash" / f"err{rank}").read_text() for rank in range(2)]
    assert "TypeError" in said[1] and "makemoe:" not in said[0]  # the reason once, by the one that failed
    assert load_checkpoint(folder / "crash" / "runs" / "laptop")


def test_processes_that_do_not_divide_the_experts(folder):
    codes, _ = json.loads((folder / "three" / "codes").read_text())
    said = "".join((folder / "three" / f"err{rank}").read_text() for rank in range(3))
    assert codes == [2, 2, 2]
    assert said.count("8 experts cannot be shared out equally among 3 processes") == said.count("\n") == 1


def test_what_torchrun_does_not_say(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="WORLD_SIZE and MASTER_ADDR and MASTER_PORT not set.*torchrun"):
        expert_parallel.train_together(shakespeare.PRESETS["laptop"])


def test_a_busy_port(monkeypatch):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        place = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(busy.getsockname()[1]))
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            ConnectionError, match=f"process 0 of 2 cannot meet the others at 127.0.0.1:{place['MASTER_PORT']}"
        ):
            expert_parallel.train_together(shakespeare.PRESETS["laptop"])


def torchrun(W, folder, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={W}", "-m", "makemoe"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", MPLBACKEND="agg", PYTHONPATH=str(ROOT), TMPDIR=str(folder))
    return subprocess.Popen(
        [*command, "train", "laptop", "--data", "../text.txt", *TINY, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read_until(process, word):
    "What a process prints, up to the line that has `word`."
    lines = []
    for line in process.stdout:
        lines.append(line)
        if word in line:
            return "".join(lines)
    assert False, f"ended without {word!r}: {''.join(lines)}"


def workers(process):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def losses_of(text):
    return re.findall(r"step (\d+): .*train ([\d.]+), val ([\d.]+)", text)


@pytest.fixture
def place(folder, tmp_path_factory):
    path = folder / f"run{len(list(folder.glob('run*')))}"
    path.mkdir()
    return path


def test_the_command_prints_what_one_process_prints_and_can_be_killed_and_stopped(folder, place, monkeypatch):
    monkeypatch.chdir(place)
    alone, text = io.StringIO(), [*TINY, "--data", "../text.txt", "--steps", "20", "--name", "alone"]
    monkeypatch.setattr(sys, "argv", ["makemoe", "train", "laptop", *text])
    ctrl_c = signal.getsignal(signal.SIGINT)
    with contextlib.redirect_stdout(alone):
        alone.reconfigure = lambda **_: None
        monkeypatch.setattr(sys.stderr, "reconfigure", lambda **_: None, raising=False)
        shakespeare.main()
    signal.signal(signal.SIGINT, ctrl_c)
    run = torchrun(2, place, "--steps", "20")
    printed = run.communicate(timeout=100)[0]
    assert run.returncode == 0, printed
    ours, theirs = losses_of(printed), losses_of(alone.getvalue())
    assert len(ours) == len(theirs) == 3 and [line[0] for line in ours] == [line[0] for line in theirs]
    for line, wanted in zip(ours, theirs):
        assert all(abs(float(a) - float(b)) < 1.5e-3 for a, b in zip(line[1:], wanted[1:])), (line, wanted)
    assert printed.count("loss on the whole held-out tenth") == 1
    assert {path.name for path in place.glob("runs/*")} == {"alone", "laptop"}
    assert "training" not in read_facts(place / "runs" / "laptop")
    model, tokenizer, _ = load_checkpoint(place / "runs" / "laptop")
    assert len(list(shakespeare.write(model, tokenizer, "a", 5))) == 5


def test_a_killed_process_ends_all_and_the_run_goes_on_with_fewer_until_it_is_stopped(place):
    run = torchrun(4, place, "--steps", "1000000")
    try:
        read_until(run, "step 20")
        pids = workers(run)
        os.kill(pids[2], signal.SIGKILL)
        killed, rest = time.perf_counter(), run.communicate(timeout=30)[0]
        assert run.returncode and time.perf_counter() - killed < 15
        assert len(re.findall("^makemoe: .*has ended.*--resume goes on", rest, re.MULTILINE)) == 1, rest
        path = place / "runs" / "laptop" / "model.safetensors"
        reached = read_facts(path)["training"]["step"]
        assert reached >= 20 and load_training(path)
        run = torchrun(2, place, "--steps", "1000000", "--resume")
        assert f"going on with runs/laptop at step {reached}" in read_until(run, f"step {reached // 10 * 10 + 20}")
        pids += workers(run)
        run.send_signal(signal.SIGINT)
        rest = run.communicate(timeout=40)[0]
        assert run.returncode and rest.count("stopped; runs/laptop/model.safetensors is saved") == 1, rest
        assert "makemoe:" not in rest and read_facts(path)["training"]["step"] > reached
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.stdout.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
