"""Hidden cases for lesson 06: other sizes."""

import torch

from makemoe.checks import check, close, same
from makemoe.checks.sparse_moe import check_mixture
from makemoe.experts import Expert
from makemoe.gating import top_k_gating


@check
def check_experts(Experts):
    yield "more experts than tokens, and expert 0 preferred"
    logits = torch.randn(3, 9)
    logits[:, 0] += 100
    check_mixture(Experts(9, 4, 6, "gelu"), torch.randn(3, 4), top_k_gating(logits, 3), "nine experts")


@check
def check_hash_routing(hash_routing):
    yield "other sizes"
    table = torch.arange(300) % 7
    same(hash_routing(torch.arange(300), table, 9).load.tolist(), [43] * 6 + [42, 0, 0], "load")


@check
def check_merge_experts(merge_experts):
    yield "a single expert, and four"
    for n in 1, 4:
        experts, x = [Expert(3, 2 + e) for e in range(n)], torch.randn(6, 3)
        close(merge_experts(experts)(x), sum(expert(x) for expert in experts), f"the answer of {n}")
