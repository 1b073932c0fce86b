"""Checks of lesson 08, losses."""

import math
from dataclasses import replace

import torch

from makemoe.checks import check, close, same, same_gradients, unchanged
from makemoe.gating import Routing, top_k_gating


def balance_by_loop(logits, chosen):
    "E / k * sum of f * P for logits and chosen (N, E), token by token in plain Python."
    N, E = logits.shape
    f, P = [0.0] * E, [0.0] * E
    for scores, mine in zip(logits.tolist(), chosen.tolist()):
        largest = max(scores)
        exponentials = [math.exp(score - largest) for score in scores]
        for e in range(E):
            f[e] += mine[e] / N
            P[e] += exponentials[e] / sum(exponentials) / N
    return E / sum(f) * sum(f[e] * P[e] for e in range(E))


def balance(logits, chosen):
    "The same from tensors (N, E), so that it can be differentiated; f is a constant."
    f = chosen.double().mean(dim=0)
    return (logits.shape[-1] / f.sum() * (f * logits.double().softmax(dim=-1).mean(dim=0)).sum()).float()


def squared_variation(gates):
    "(standard deviation / mean)**2 of the summed gates (N, E), as a mean of squares."
    importance = gates.double().sum(dim=0)
    return ((importance / importance.mean() - 1) ** 2).mean().float()


def record(routing):
    "The tensors of a routing by name, for `unchanged`."
    return dict(gates=routing.gates, logits=routing.logits, chosen=routing.chosen, kept=routing.kept)


def without(routing, dropped):
    "The routing without the choices in `dropped`."
    return replace(routing, gates=routing.gates.masked_fill(dropped, 0), kept=routing.kept & ~dropped)


def leaning(*shape, k, requires_grad=False):
    "A routing of random logits of this shape, (..., E), in which many tokens prefer expert 0."
    logits = torch.randn(shape)
    logits[..., 0] += 1.5
    return top_k_gating(logits.requires_grad_(requires_grad), k)


@check
def check_load_balancing_loss(load_balancing_loss):
    yield "it is E / k times the sum of f times P, a number of type float32"
    for E, k in (6, 1), (6, 2), (5, 3), (4, 4):
        routing = leaning(12, E, k=k)
        with unchanged(**record(routing)):
            loss = load_balancing_loss(routing)
        close(loss, torch.tensor(balance_by_loop(routing.logits, routing.chosen)), f"the loss with E = {E}, k = {k}")
    yield "all tokens (B, T) count together"
    routing = leaning(2, 5, 6, k=2)
    flat = routing.logits.flatten(0, 1), routing.chosen.flatten(0, 1)
    close(load_balancing_loss(routing), balance_by_loop(*flat), "the loss of (2, 5, 6)")
    yield "the loss is 1 if the load is balanced, and E / k if k experts get everything"
    fair = torch.stack([torch.eye(6).roll(turn, dims=1) for turn in range(6)])
    close(load_balancing_loss(top_k_gating(9 * fair, 1)), 1, "the loss of a balanced batch")
    alone = top_k_gating(90 * torch.eye(4)[0].expand(7, 4), 1)
    close(load_balancing_loss(alone), 4, "the loss where all have one expert")
    yield "choices that are dropped afterwards still count"
    routing = leaning(20, 5, k=2)
    some = routing.chosen & (torch.rand(20, 5) < 0.5)
    before = balance_by_loop(routing.logits, routing.chosen)
    close(load_balancing_loss(without(routing, some)), before, "the loss after dropping")
    close(load_balancing_loss(without(routing, routing.chosen)), before, "the loss after all was dropped")
    yield "under noise, f comes from what was chosen and P from the logits"
    noisy = replace(routing, logits=torch.randn(20, 5))
    close(load_balancing_loss(noisy), balance_by_loop(noisy.logits, noisy.chosen), "the loss under noise")
    yield "k is the mean number of chosen experts per token"
    chosen = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    close(load_balancing_loss(Routing(chosen.float(), torch.randn(2, 4), chosen, chosen)), 1, "3 experts, then 1")
    yield "the gradient flows through P alone, to the logits of all experts"
    for k in 1, 2, 5:
        routing = leaning(9, 5, k=k, requires_grad=True)
        expected = balance(routing.logits, routing.chosen)
        same_gradients(load_balancing_loss(routing), expected, {"logits": routing.logits}, "the loss")
    yield "the loss is the same under autocast"
    routing = leaning(9, 5, k=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = load_balancing_loss(routing)
    same(rounded, load_balancing_loss(routing), "the loss under autocast")


@check
def check_importance_loss(importance_loss):
    yield "it is the variance of the summed gates over their squared mean"
    for E, k in (6, 2), (4, 1), (5, 3):
        routing = leaning(12, E, k=k)
        with unchanged(**record(routing)):
            loss = importance_loss(routing)
        close(loss, squared_variation(routing.gates), f"the loss with E = {E}, k = {k}")
    yield "all tokens (B, T) count together"
    routing = leaning(3, 7, 6, k=2)
    close(importance_loss(routing), squared_variation(routing.gates.flatten(0, 1)), "the loss of (3, 7, 6)")
    yield "if one of 5 experts gets everything, the loss is 4"
    close(importance_loss(top_k_gating(torch.tensor([[9.0, 0, 0, 0, 0]]).expand(8, 5), 1)), 4, "the loss")
    yield "the gate of a dropped choice counts as 0"
    routing = leaning(20, 5, k=2)
    fewer = without(routing, routing.chosen & (torch.rand(20, 5) < 0.4))
    close(importance_loss(fewer), squared_variation(fewer.gates), "the loss after dropping")
    yield "the gradient is that of variance over squared mean, also after dropping"
    routing = leaning(9, 5, k=2, requires_grad=True)
    for one in routing, without(routing, routing.chosen & (torch.rand(9, 5) < 0.4)):
        expected = squared_variation(one.gates)
        same_gradients(importance_loss(one), expected, {"logits": routing.logits}, "the loss")
    yield "if all experts are equally important, the loss is 0, and the gradient is 0 and not nan"
    for E in 1, 4:
        logits = torch.zeros(6, E, requires_grad=True)
        loss = importance_loss(top_k_gating(logits, E))
        close(loss, torch.tensor(0.0), f"the loss of {E} equal experts")
        gradient, = torch.autograd.grad(loss, logits)
        close(gradient, torch.zeros(6, E), f"the gradient at {E} equal experts")


@check
def check_router_z_loss(router_z_loss):
    def z(logits):
        return logits.double().exp().sum(dim=-1).log().square().mean().float()

    yield "it is the mean of the squared logarithm of the summed exponentials"
    for shape in (6, 4), (9, 1), (2, 4, 5):
        routing = top_k_gating(3 * torch.randn(shape) - 1, 1)
        with unchanged(**record(routing)):
            loss = router_z_loss(routing)
        close(loss, z(routing.logits), f"the loss of {shape}")
    yield "if all logits are 0, the loss is (ln E)**2"
    close(router_z_loss(top_k_gating(torch.zeros(3, 6), 2)), math.log(6) ** 2, "the loss")
    yield "a number that is added to all logits of a token changes the loss"
    routing = top_k_gating(torch.randn(8, 5) - 30, 2)
    close(router_z_loss(routing), z(routing.logits), "the loss of logits around -30")
    yield "logits of 10,000 do not overflow, and logits of -10,000 do not underflow"
    close(router_z_loss(top_k_gating(torch.tensor([[1e4, 0.0, 0.0]]), 1)), 1e8, "the loss of a logit of 1e4")
    low = router_z_loss(top_k_gating(torch.full((2, 3), -1e4), 1))
    close(low, (1e4 - math.log(3)) ** 2, "the loss of logits of -1e4")
    yield "the gradient reaches all logits, and it is finite for huge ones"
    logits = (2 * torch.randn(7, 5)).requires_grad_()
    same_gradients(router_z_loss(top_k_gating(logits, 2)), z(logits), {"logits": logits}, "the loss")
    logits = torch.tensor([[2e4, 0.0]], requires_grad=True)
    gradient, = torch.autograd.grad(router_z_loss(top_k_gating(logits, 1)), logits)
    close(gradient, torch.tensor([[4e4, 0.0]]), "the gradient at a logit of 2e4")


@check
def check_routing_metrics(routing_metrics):
    chosen = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)
    logits = torch.tensor([[0.0, 0, 0, 0], [1e4, 0, 0, 0]] * 2, requires_grad=True)
    routing = Routing(chosen / 2, logits, chosen, chosen.clone())
    yield "it is a dict of four plain numbers with the right names"
    with unchanged(**record(routing)):
        metrics = routing_metrics(routing)
    same(sorted(metrics), ["confidence", "dropped", "entropy", "imbalance"], "the names")
    for name, value in metrics.items():
        assert type(value) is float, f"{name} is {value!r}, but should be a plain float"
    yield "loads of 4, 2, 1, 1 have an imbalance of 2"
    close(metrics["imbalance"], 2, "imbalance")
    yield "confidence and entropy are means over the tokens, also if a probability is 0"
    close(metrics["confidence"], (1 / 4 + 1) / 2, "confidence")
    close(metrics["entropy"], math.log(4) / 2, "entropy")
    yield "after dropping, the load is what is kept, and dropped is a share of the choices"
    lost = torch.tensor([[False] * 4, [False] * 4, [True, True, False, False], [True, False, False, False]])
    fewer = without(routing, lost)
    metrics = routing_metrics(fewer)  # loads 2, 1, 1, 1: token 2 loses both of its experts
    close(metrics["imbalance"], 8 / 5, "imbalance after dropping")
    close(metrics["dropped"], 3 / 8, "dropped")
    yield "tokens that lost all their experts count for confidence and entropy as before"
    all_of = without(routing, chosen & torch.tensor([[True], [False], [True], [False]]))
    close(routing_metrics(all_of)["confidence"], (1 / 4 + 1) / 2, "confidence after dropping")
    close(routing_metrics(all_of)["entropy"], math.log(4) / 2, "entropy after dropping")
    yield "all tokens (B, T) count together"
    batch = top_k_gating(200 * torch.eye(4)[torch.tensor([[0, 0, 1], [0, 1, 2]])], 1)
    close(routing_metrics(batch)["imbalance"], 2, "imbalance of loads 3, 2, 1, 0")
    close(routing_metrics(batch)["entropy"], 0, "entropy of tokens that are certain")


@check
def check_sequence_balancing_loss(sequence_balancing_loss):
    yield "it is the mean of the losses of the sequences"
    routing = leaning(3, 8, 5, k=2)
    with unchanged(**record(routing)):
        loss = sequence_balancing_loss(routing)
    rows = [balance_by_loop(*row) for row in zip(routing.logits, routing.chosen)]
    close(loss, torch.tensor(sum(rows) / 3), "the loss of three sequences")
    yield "sequences that use one expert each are not balanced, even if the batch is"
    opposite = top_k_gating(20 * torch.eye(2)[:, None].expand(2, 8, 2), 1)
    close(sequence_balancing_loss(opposite), 2, "the loss of two sequences with one expert each")
    yield "any shape in front of (T, E), or none"
    close(sequence_balancing_loss(top_k_gating(routing.logits[0], 2)), rows[0], "the loss of one sequence (8, 5)")
    four = leaning(2, 2, 6, 4, k=1)
    flat = zip(four.logits.flatten(0, 1), four.chosen.flatten(0, 1))
    close(sequence_balancing_loss(four), sum(balance_by_loop(*row) for row in flat) / 4, "the loss of (2, 2, 6, 4)")
    yield "choices that are dropped afterwards still count"
    fewer = without(routing, routing.chosen & (torch.rand(3, 8, 5) < 0.4))
    close(sequence_balancing_loss(fewer), sum(rows) / 3, "the loss after dropping")
    yield "the gradient flows through every P"
    routing = leaning(3, 8, 5, k=2, requires_grad=True)
    expected = sum(balance(*row) for row in zip(routing.logits, routing.chosen)) / 3
    same_gradients(sequence_balancing_loss(routing), expected, {"logits": routing.logits}, "the loss")
