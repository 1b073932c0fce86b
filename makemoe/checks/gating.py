"""Checks of lesson 04, gating."""

import torch

from makemoe.checks import check, close, refuses, same, same_gradients, unchanged


def gates_by_loop(logits, k):
    "Gates (T, E) of logits (T, E), one token after another: the k best share one unit of weight by a softmax."
    gates = torch.zeros_like(logits)
    for t in range(len(logits)):
        best = logits[t].topk(k).indices
        gates[t, best] = logits[t, best].softmax(dim=-1)
    return gates


@check
def check_top_k_gating(top_k_gating):
    logits = 2 * torch.randn(6, 5, requires_grad=True)
    with unchanged(logits=logits):
        routing = top_k_gating(logits, 2)
    yield "every token chooses exactly k experts"
    same(routing.chosen.sum(dim=-1), torch.full((6,), 2), "the number of experts per token")
    same(routing.kept, routing.chosen, "kept")
    yield "the chosen share one unit of weight by a softmax, the others get 0"
    close(routing.gates, gates_by_loop(logits, 2), "gates")
    yield "the gradient reaches the scores of the chosen"
    same_gradients(routing.gates, gates_by_loop(logits, 2), {"logits": logits}, "gates")
    yield "the logits are recorded as they came"
    same(routing.logits, logits, "logits")
    yield "any shape may stand in front, and k may be 1 or E"
    for k in 1, 5:
        batch = top_k_gating(logits.view(2, 3, 5), k)
        close(batch.gates, gates_by_loop(logits, k).view(2, 3, 5), f"gates of (2, 3, 5) logits with k = {k}")
    yield "exactly k are chosen where scores are equal"
    same(top_k_gating(torch.zeros(4, 6), 3).chosen.sum(dim=-1), torch.full((4,), 3), "experts per token")
