"""Ratios on noisy machines: all contenders take turns in one run, so that a busy moment hits every one of them."""

import json
import math
import os
import platform
import statistics
import time
from contextlib import nullcontext
from datetime import date
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler has nothing to say to our readers

import torch
from torch.profiler import ProfilerActivity, profile

from makemoe.data import get_batch
from makemoe.optimizers import OPTIMIZERS


def machine(device):
    "Where and when something was measured."
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return dict(processor=names[0] if names else platform.processor() or platform.machine(), cores=os.cpu_count(),
                threads=torch.get_num_threads(), device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
                precision="bfloat16 autocast" if device == "cuda" else "float32", python=platform.python_version(),
                torch=torch.__version__, date=date.today().isoformat(),
                busy=round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None)  # processes that want to run


def describe(facts):
    "The same in one line."
    where = facts["device"] if facts["device"] != "cpu" else f"{facts['processor']} CPU, {facts['threads']} threads"
    return f"{where}, {facts['precision']}, PyTorch {facts['torch']}, Python {facts['python']}, {facts['date']}"


def autocast(device):
    "As `makemoe.training.train` computes: bfloat16 on a GPU, float32 elsewhere."
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def alternate(contenders, rounds, warmup=2, device="cpu"):
    """Call each of `contenders`, a dict of functions, in every round: their seconds, a dict of lists.

    Every other round goes backwards, so that nobody always follows the same neighbour.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = {name: [] for name in contenders}
    for i in range(warmup + rounds):
        for name, contender in list(contenders.items())[:: -1 if i % 2 else 1]:
            wait()
            start = time.perf_counter()
            contender()
            wait()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def quartiles(values):
    "(first, median, third) of at least one value."
    return tuple(statistics.quantiles(values, n=4, method="inclusive")) if len(values) > 1 else tuple(values) * 3


def compare(seconds, base):
    """Per contender: ms and ratio, each as (first quartile, median, third quartile).

    The ratio is taken round by round: how many times as long as `base` did it take?
    """
    ratios = {name: [a / b for a, b in zip(each, seconds[base])] for name, each in seconds.items()}
    return {name: dict(ms=[1e3 * s for s in quartiles(each)], ratio=quartiles(ratios[name]))
            for name, each in seconds.items()}


class TrainingStep:
    """Call it to make one whole step of `recipe` as `train` does: batch, forward, backward, clipping, optimizer.

    The learning rate is small, so that the loads of the experts stay what they are while we measure.
    """

    def __init__(self, model, ids, recipe, device="cpu", optimizer="adamw"):
        self.model, self.ids, self.recipe, self.device = model.to(device).train(), ids, recipe, device
        self.optimizer, self.order = OPTIMIZERS[optimizer](model, recipe), torch.Generator().manual_seed(1337)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-5

    def __call__(self):
        self.update(*self.batch())

    def batch(self):
        x, y = get_batch(self.ids, self.recipe.batch_size, self.model.config.block_size, self.order)
        return x.to(self.device), y.to(self.device)

    def update(self, x, y):
        with autocast(self.device):
            loss = self.model(x, y).loss
        self.optimizer.zero_grad()
        loss.backward()
        if self.recipe.clip < math.inf:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()


def peak_memory(step):
    """Bytes at the fullest moment of a `TrainingStep`: weights, gradients, moments, activations and the rest.

    On a CPU that is the record of the profiler, the same in every run; on a GPU the allocator's own record, which
    counts whatever else is on the device: measure one contender at a time there.
    """
    step()  # from now on the optimizer has its moments
    step.optimizer.zero_grad()
    if step.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    moments = [m for state in step.optimizer.state.values() for m in state.values() if torch.is_tensor(m)]
    held = sum(tensor.nbytes for tensor in [*step.model.parameters(), *moments])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return held + peak


def save(path, results):
    "Write `results` as JSON, whole or not at all."
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def load(path):
    "What `save` wrote, or None if there is no such file."
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
