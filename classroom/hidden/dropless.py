"""Hidden cases for lesson 09: other loads, sizes and layouts than students can see."""

import torch
from torch.nn import functional as F

from makemoe.checks import check, close, refuses, same
from makemoe.checks.dropless import draw, masks, same_mixture, same_pairs, twins, undefined_rows
from makemoe.gating import top_k_gating


@check
def check_answers_by_group(answers_by_group):
    yield "everybody at one expert, everybody at all experts"
    tokens, kept = torch.randn(5, 6, requires_grad=True), torch.zeros(5, 4, dtype=torch.bool)
    kept[:, 2] = True
    for case in kept, torch.ones_like(kept):
        same_pairs(answers_by_group, tokens, case, draw(4, 9, 6, True), F.gelu)


@check
def check_grouped_experts(GroupedExperts):
    yield "another layout in memory, and 1 or all experts per token"
    for k in 1, 5:
        grouped, loop = twins(GroupedExperts, 5, 6, 9, "squared_relu", bias=False, top_k=k)
        x = torch.randn(3, 6, 7).mT  # (B, T, C)
        same_mixture(grouped, loop, x, top_k_gating(torch.randn(3, 7, 5), k), f"y with k = {k}")


@check
def check_answers_in_one_call(answers_in_one_call):
    yield "everybody at one expert, three experts per token, undefined rows"
    tokens, kept = torch.randn(6, 8, requires_grad=True), torch.zeros(6, 4, dtype=torch.bool)
    kept[:, 1] = True
    with undefined_rows():
        same_pairs(lambda *work: answers_in_one_call(*work, top_k=3), tokens, kept, draw(4, 8, 8, True), F.gelu)


@check
def check_sort_by_expert(sort_by_expert, send_back):
    yield "a cycle of three is not its own inverse"
    order, inverse = sort_by_expert(torch.tensor([2, 0, 1]))
    same(order, torch.tensor([1, 2, 0]), "order")
    same(inverse, torch.tensor([2, 0, 1]), "inverse")
    yield "twelve experts"
    owners = torch.arange(12).flip(0)
    close(
        send_back(torch.arange(12.0)[:, None], sort_by_expert(owners)[1], 4)[:, 0],
        torch.tensor([38.0, 22.0, 6.0]),
        "sums",
    )


@check
def check_padding_factor(padding_factor):
    yield "other loads"
    routing = masks(*[[1, 1, 0, 1]] * 7, [1, 0, 0, 0])
    close(padding_factor(routing), 32 / 22, "the factor")
    close(padding_factor(routing, 11), 2.0, "the factor with 11 slots")
    refuses(ValueError, lambda: padding_factor(routing, 7))
