"""Several processes against one: weak scaling, and what sending tokens to their experts costs.

    torchrun --standalone --nproc-per-node=2 -m benchmarks.parallel [--out FOLDER] [--device cuda] [--rows 16]

Every process has `rows` sequences, so W processes do W times the work of one, which does its step while the others
wait. The contenders take turns. Writes parallel-DEVICE-W.json. With --device cuda each process takes a GPU of its own
and nccl; that has not been run.
"""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

from benchmarks.timing import autocast, compare, machine, save
from makemoe import expert_parallel
from makemoe.data import CharTokenizer, compact_ids, get_batch, load_text
from makemoe.lab import seed_everything
from makemoe.model import MoEConfig, SparseMoELanguageModel
from makemoe.training import TrainConfig, TrainState

SPENT = {"exchange": 0.0, "all_reduce": 0.0}  # seconds in collectives, waiting included


def timed(kind, collective):
    "`collective`, but the seconds that it takes are added to SPENT."

    def call(*arguments, **keywords):
        start = time.perf_counter()
        result = collective(*arguments, **keywords)
        SPENT[kind] += time.perf_counter() - start
        return result

    return call


def contender(config, ids, rows, device, how):
    "A function that makes one step of a fresh model: alone, or in all processes by expert or data parallelism."
    seed_everything(1337)
    model = SparseMoELanguageModel(config).to(device).train()
    state = TrainState(model, TrainConfig.laptop(lr=1e-5))  # loads stay what they are while we measure
    if how != "alone":
        expert_parallel.parallelize(model, state, how == "expert")

    def step():
        x, y = get_batch(ids, rows, config.block_size, state.order)
        with autocast(device):
            loss = model(x.to(device), y.to(device)).loss
        state.optimizer.zero_grad()
        loss.backward()
        state.clip(model.parameters(), 1.0)
        state.optimizer.step()

    return step


def main(out: Path = Path("runs/bench"), device: str = "cpu", rows: int = 16, rounds: int = 20):
    """Measure it.

    Args:
        out: folder for the results.
        device: cpu or cuda.
        rows: sequences of each process.
        rounds: how often each contender takes its turn.
    """
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    rank, W = dist.get_rank(), dist.get_world_size()
    dist.all_to_all_single = timed("exchange", dist.all_to_all_single)
    dist.all_reduce = timed("all_reduce", dist.all_reduce)
    text = load_text()[:1_000_000]
    tokenizer = CharTokenizer(text)
    ids, config = compact_ids(tokenizer, text), MoEConfig.laptop(vocab_size=tokenizer.vocab_size)
    steps = {
        "one process": contender(config, ids, rows, device, "alone"),
        "one process, all rows": contender(config, ids, W * rows, device, "alone"),
        "expert parallel": contender(config, ids, W * rows, device, "expert"),
        "data parallel": contender(config, ids, W * rows, device, "data"),
    }
    seconds, shares = {name: [] for name in steps}, {name: [] for name in steps}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for turn in range(2 + rounds):
        for name, step in list(steps.items())[:: -1 if turn % 2 else 1]:
            dist.barrier()
            SPENT.update(dict.fromkeys(SPENT, 0.0))
            start = time.perf_counter()
            if rank == 0 or "parallel" in name:
                step()
                wait()
            took = time.perf_counter() - start
            if turn >= 2:
                seconds[name].append(took)
                shares[name].append({kind: spent / took for kind, spent in SPENT.items()})
    if rank == 0:
        result = compare(seconds, "one process")
        for name, entry in result.items():
            for kind in SPENT:
                entry[kind] = sorted(share[kind] for share in shares[name])[rounds // 2]
            entry["fastest"] = 1e3 * min(seconds[name])  # other work on the machine can only add to this
            print(f"{name:22} median {entry['ms'][1]:5.0f} ms, {entry['ratio'][1]:.2f} times one process; "
                  f"fastest {entry['fastest']:5.0f} ms, {min(seconds[name]) / min(seconds['one process']):.2f} times; "
                  f"{entry['exchange']:.0%} exchanging, {entry['all_reduce']:.0%} adding up")
        name = f"parallel-{device}-{W}.json"
        save(out / name, dict(machine=machine(device), processes=W, rows=rows, contenders=result))
    dist.destroy_process_group()


if __name__ == "__main__":
    tyro.cli(main)
