"""How much does a training step cost as experts grow, and which way of running them is the fastest?

    python benchmarks/experts.py [--out FILE.json] [--tokens 4096] [--threads N] ...

One `SparseMoE` layer: forward, backward and fused AdamW, k experts per token whatever their number. All variants take turns in
one run, so that a busy moment hits all of them; printed are medians, quartiles and ratios. On a GPU: bfloat16 autocast.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from makemoe.dropless import GroupedExperts
from makemoe.experts import ACTIVATIONS
from makemoe.gating import TopkRouter
from makemoe.lab import seed_everything
from makemoe.sparse_moe import Experts, SparseMoE


class PaddedExperts(GroupedExperts):
    "The same weights in a box: every expert gets as many rows as the fullest, and two `bmm` run them all. No biases."

    def forward(self, x, routing):
        tokens, E = x.reshape(-1, x.shape[-1]), len(self.up)
        kept, gates = routing.kept.reshape(-1, E), routing.gates.reshape(-1, E)
        load = kept.sum(dim=0)
        e, rows = kept.T.nonzero(as_tuple=True)
        place = torch.arange(len(rows), device=x.device) - (load.cumsum(dim=0) - load)[e]
        longest = load.max().item()
        slots = e * longest + place
        box = tokens.new_zeros(E * longest, x.shape[-1]).index_copy(0, slots, tokens.index_select(0, rows))
        hidden = ACTIVATIONS[self.activation](torch.bmm(box.view(E, longest, -1), self.up.mT))
        answers = torch.bmm(hidden, self.down.mT).flatten(0, 1).index_select(0, slots)
        weighed = gates[rows, e, None] * answers
        return torch.zeros_like(tokens).index_add(0, rows, weighed.to(x.dtype)).view_as(x)


KINDS = {"loop": Experts, "padded": PaddedExperts, "grouped": GroupedExperts}


class Step:
    "One training step of a layer on tokens of unit size; `parts` are the seconds of the last one."

    def __init__(self, kind, num_experts, args):
        seed_everything(args.seed)
        top_k = {"top_k": args.top_k} if kind == "grouped" else {}
        experts = KINDS[kind](num_experts, args.n_embd, args.n_hidden, "squared_relu", bias=False, **top_k)
        self.layer = SparseMoE(TopkRouter(args.n_embd, num_experts, args.top_k), experts).to(args.device)
        self.optimizer = torch.optim.AdamW(self.layer.parameters(), lr=1e-5, fused=True)
        self.x = torch.randn(1, args.tokens, args.n_embd, device=args.device, requires_grad=True)
        self.cuda = args.device == "cuda"
        load = self.layer.router(self.x).load.float()
        self.imbalance = (load.max() / load.mean()).item()
        self.parameters = sum(weight.numel() for weight in self.layer.parameters())

    def now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self):
        self.x.grad = None
        start = self.now()
        self.optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16) if self.cuda else nullcontext():
            y, _ = self.layer(self.x)
        y.float().square().mean().backward()
        middle = self.now()
        self.optimizer.step()
        end = self.now()
        return end - start, end - middle


def alternate(steps, rounds, warmup):
    "Seconds of each step, and of the optimizer in it, round by round: a dict of lists of pairs."
    seconds = {name: [] for name in steps}
    for i in range(warmup + rounds):
        for name, step in steps.items():
            pair = step()
            if i >= warmup:
                seconds[name].append(pair)
    return seconds


def summarise(seconds, steps, base):
    "Rows of the table: medians and quartiles in ms, and the median ratio to `base`, round by round."
    rows = []
    for (kind, E), pairs in seconds.items():
        whole = [1e3 * pair[0] for pair in pairs]
        quartiles = statistics.quantiles(whole, n=4)
        ratios = [a[0] / b[0] for a, b in zip(pairs, seconds[base])]
        rows.append(dict(kind=kind, experts=E, parameters=steps[kind, E].parameters, imbalance=steps[kind, E].imbalance,
                         step_ms=statistics.median(whole), q1_ms=quartiles[0], q3_ms=quartiles[2],
                         optimizer_ms=1e3 * statistics.median(pair[1] for pair in pairs),
                         ratio=statistics.median(ratios), ratio_of_minima=min(whole) / (1e3 * min(b[0] for b in seconds[base]))))
    return rows


def load_average():
    "How busy the machine is, in processes that want to run; None on Windows."
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="write the numbers there, as JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--n-embd", type=int, default=128)
    parser.add_argument("--n-hidden", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    first = args.experts[0]
    names = [("grouped", E) for E in args.experts] + [("loop", first), ("padded", first)]
    steps = {name: Step(*name, args) for name in names}
    seconds = alternate(steps, args.rounds, args.warmup)
    rows = summarise(seconds, steps, base=("grouped", first))
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{args.tokens} tokens, {args.n_embd} channels, {args.n_hidden} hidden, k = {args.top_k}, "
          f"{'bfloat16 autocast' if args.device == 'cuda' else 'float32'}, {where}, PyTorch {torch.__version__}, "
          f"{args.rounds} rounds, load average {load_average()}\n")
    print("| experts | run as  | parameters | step, ms (quartiles)  | AdamW, ms | ratio | of minima | max / mean load |")
    print("|---------|---------|------------|-----------------------|-----------|-------|-----------|-----------------|")
    for r in rows:
        spread = f"{r['step_ms']:.1f} ({r['q1_ms']:.1f} to {r['q3_ms']:.1f})"
        print(f"| {r['experts']:7} | {r['kind']:7} | {r['parameters']:10,} | {spread:21} | {r['optimizer_ms']:9.2f} "
              f"| {r['ratio']:5.2f} | {r['ratio_of_minima']:9.2f} | {r['imbalance']:15.2f} |")
    if args.out:
        record = dict(settings=vars(args), where=where, torch=torch.__version__, load_average=load_average(), rows=rows,
                      seconds={f"{kind}-{E}": pairs for (kind, E), pairs in seconds.items()})
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
