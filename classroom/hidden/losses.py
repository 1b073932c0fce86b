"""Hidden cases for lesson 08: other sizes and scores than students can see."""

import torch

from makemoe.checks import check, close
from makemoe.checks.losses import balance_by_loop, leaning, squared_variation
from makemoe.gating import top_k_gating


@check
def check_load_balancing_loss(load_balancing_loss):
    yield "9 experts, 3 of them for each token, and large scores"
    routing = top_k_gating(100 * torch.randn(2, 3, 4, 9), 3)
    flat = routing.logits.reshape(-1, 9), routing.chosen.reshape(-1, 9)
    close(load_balancing_loss(routing), balance_by_loop(*flat), "the loss")


@check
def check_importance_loss(importance_loss):
    yield "9 experts, 3 of them for each token"
    routing = leaning(2, 3, 4, 9, k=3)
    close(importance_loss(routing), squared_variation(routing.gates.reshape(-1, 9)), "the loss")


@check
def check_router_z_loss(router_z_loss):
    yield "every token counts once, whatever the shape"
    logits = 3 * torch.randn(2, 3, 4, 7) - 6
    expected = logits.double().exp().sum(dim=-1).log().square().mean().item()
    close(router_z_loss(top_k_gating(logits, 2)), expected, "the loss")


@check
def check_routing_metrics(routing_metrics):
    yield "a large batch"
    routing = leaning(3, 40, 7, k=2)
    metrics, load = routing_metrics(routing), routing.load.tolist()
    close(metrics["imbalance"], max(load) * 7 / sum(load), "imbalance")
    close(metrics["dropped"], 0, "dropped")
    close(metrics["confidence"], routing.probs.amax(dim=-1).mean().item(), "confidence")
    close(metrics["entropy"], torch.special.entr(routing.probs).sum(dim=-1).mean().item(), "entropy")


@check
def check_sequence_balancing_loss(sequence_balancing_loss):
    yield "four sequences of different scores, k = 3"
    routing = leaning(4, 11, 6, k=3)
    rows = [balance_by_loop(*row) for row in zip(routing.logits, routing.chosen)]
    close(sequence_balancing_loss(routing), sum(rows) / 4, "the loss")
