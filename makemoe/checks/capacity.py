"""Checks of lesson 07, capacity."""

from dataclasses import replace
from functools import partial

import torch

from makemoe.checks import check, close, refuses, same, same_gradients, unchanged
from makemoe.gating import Routing, TopkRouter, top_k_gating

PRIORITIES = "position", "choice", "probability"


def fields(routing, change):
    "The routing with the function `change` applied to its four tensors."
    return Routing(*map(change, (routing.gates, routing.logits, routing.chosen, routing.kept)))


def kept_by_queue(routing, capacity, priority):
    "What is kept (..., T, E) if the choices of each sequence are served one by one, in the order of `priority`."
    T, E = routing.kept.shape[-2:]
    rows = [field.detach().reshape(-1, T, E).tolist() for field in (routing.kept, routing.gates, routing.probs)]
    kept = torch.zeros(len(rows[0]), T, E, dtype=torch.bool)
    for b, (wanted, gates, probs) in enumerate(zip(*rows)):
        queue, used = [], [0] * E
        for t in range(T):
            best_first = sorted((e for e in range(E) if wanted[t][e]), key=lambda e: -gates[t][e])
            for rank, e in enumerate(best_first):
                turns = {"position": (t,), "choice": (rank, t), "probability": (rank, -max(probs[t]), t)}
                queue.append((*turns[priority], t, e))
        for *_, t, e in sorted(queue):
            kept[b, t, e] = used[e] < capacity
            used[e] += used[e] < capacity
    return kept.view(routing.kept.shape)


def same_slots(limit_to_capacity, routing, capacity, priority, case):
    expected = kept_by_queue(routing, capacity, priority)
    with unchanged(gates=routing.gates, logits=routing.logits, chosen=routing.chosen, kept=routing.kept):
        limited = limit_to_capacity(routing, capacity, priority)
    same(limited.kept, expected, f"kept by {priority}, {case}")


def favoured(*shape, k):
    "A routing with fields of this shape, (..., T, E), in which many tokens choose expert 0."
    logits = torch.randn(shape)
    logits[..., 0] += 1
    return top_k_gating(logits, k)


@check
def check_expert_capacity(expert_capacity):
    yield "factor 1 gives an equal share of all choices, and the factor multiplies it"
    for case, slots in {(64, 8, 2, 1.0): 16, (64, 8, 2, 1.25): 20, (64, 8, 1, 1.25): 10, (20, 4, 2, 0.5): 5}.items():
        same(expert_capacity(*case), slots, f"slots for {case}")
    yield "a share that is not whole is rounded up"
    for case, slots in {(50, 8, 2, 1.0): 13, (601, 100, 1, 1.0): 7}.items():
        same(expert_capacity(*case), slots, f"slots for {case}")
    yield "1.1 * 100 / 10 counts as 11, although a computer calculates 11.000000000000002"
    same(expert_capacity(100, 10, 1, 1.1), 11, "slots for (100, 10, 1, 1.1)")
    yield "an expert has `minimum` slots or more, by default 4"
    same(expert_capacity(3, 8, 2, 1.0), 4, "slots for 3 tokens")
    same(expert_capacity(3, 8, 2, 1.0, minimum=1), 1, "slots for 3 tokens with minimum 1")
    same(expert_capacity(40, 4, 2, 1.0, minimum=30), 30, "slots for a share of 20 with minimum 30")
    yield "a large factor gives more slots than there are tokens"
    same(expert_capacity(10, 2, 2, 3.0), 30, "slots for (10, 2, 2, 3.0)")
    yield "a huge factor gives 2**53 slots and no error"
    for factor in 1e30, 1e308:
        same(expert_capacity(100, 8, 2, factor), 2**53, f"slots for factor {factor}")
    yield "factors that are not positive and finite are refused"
    for factor in 0, -1.0, float("nan"), float("inf"):
        refuses(ValueError, partial(expert_capacity, 10, 4, 2, factor), "capacity_factor", factor)


@check
def check_limit_to_capacity(limit_to_capacity):
    yield "'position': the earlier token comes first"
    for k, capacity in (1, 2), (2, 3), (3, 5):
        same_slots(limit_to_capacity, favoured(3, 12, 4, k=k), capacity, "position", f"k = {k}, {capacity} slots")
    yield "'position' is the default"
    routing = favoured(2, 12, 4, k=2)
    same(limit_to_capacity(routing, 3).kept, kept_by_queue(routing, 3, "position"), "kept")
    yield "'choice': first choices before second ones, then the earlier token"
    for k, capacity in (1, 2), (2, 3), (3, 5):
        same_slots(limit_to_capacity, favoured(3, 12, 4, k=k), capacity, "choice", f"k = {k}, {capacity} slots")
    yield "'probability': first choices before second ones, then the token with the largest probability"
    for k, capacity in (1, 2), (2, 3), (3, 5):
        same_slots(limit_to_capacity, favoured(3, 12, 4, k=k), capacity, "probability", f"k = {k}, {capacity} slots")
    yield "dropped choices get gate 0, the other gates stay as they are"
    for priority in PRIORITIES:
        limited = limit_to_capacity(routing, 3, priority)
        close(limited.gates, routing.gates * kept_by_queue(routing, 3, priority), "gates", rtol=0, atol=0)
    yield "`chosen` and `logits` stay as they are"
    same(limited.chosen, routing.chosen, "chosen")
    same(limited.logits, routing.logits, "logits")
    yield "gradients pass through the gates that remain and through all logits"
    logits = torch.randn(9, 5, requires_grad=True)
    for priority in PRIORITIES:
        scored = top_k_gating(logits, 2)
        limited = limit_to_capacity(scored, 2, priority)
        same_gradients(limited.gates, scored.gates * kept_by_queue(scored, 2, priority), {"logits": logits}, "gates")
        same_gradients(limited.logits, logits * 1, {"logits": logits}, "the recorded logits")
    yield "every sequence is limited by itself, with any shape in front of (T, E)"
    whole = favoured(2, 3, 8, 4, k=2)
    for priority in PRIORITIES:
        same_slots(limit_to_capacity, whole, 3, priority, "fields (2, 3, 8, 4)")
        same_slots(limit_to_capacity, fields(whole, lambda x: x[0, 0]), 3, priority, "fields (8, 4)")
    yield "choices that were dropped before take no slot"
    for priority in PRIORITIES:
        before = favoured(20, 8, 4, k=3)
        kept = before.kept & (torch.rand(20, 8, 4) > 0.4)
        before = replace(before, gates=before.gates * kept, kept=kept)
        same_slots(limit_to_capacity, before, 3, priority, "after some were dropped")
    yield "a kept choice with a gate of exactly 0 still takes a slot"
    sharp = top_k_gating(torch.tensor([[0.0, 0, 1, 300], [0, 2, 1.9, 0]]), 2)  # token 0 gives expert 2 a gate of 0
    for priority in PRIORITIES:
        kept = limit_to_capacity(sharp, 1, priority).kept[:, 2]
        same(kept.tolist(), [True, False], f"tokens that expert 2 keeps by {priority}")
    yield "the first choice is the one with the largest gate, not with the largest logit"
    for priority in PRIORITIES:
        noisy = replace(favoured(3, 12, 4, k=3), logits=torch.randn(3, 12, 4))
        same_slots(limit_to_capacity, noisy, 3, priority, "choices made under noise")
    yield "every whole number of slots works: 0, more than there are tokens, more than 64 bits"
    for capacity in 0, 20, 10**30:
        same_slots(limit_to_capacity, routing, capacity, "choice", f"{capacity} slots")
    yield "unknown priorities, and capacities that are not whole numbers, are refused"
    refuses(ValueError, partial(limit_to_capacity, routing, 3, "random"), "random", *PRIORITIES)
    for capacity in -1, 2.5, float("inf"):
        refuses(ValueError, partial(limit_to_capacity, routing, capacity), capacity)


class OwnScores(torch.nn.Module):
    "A router without weights: the channels of a token are its logits. It counts how often it is called."

    def __init__(self, top_k):
        super().__init__()
        self.top_k, self.modes = top_k, []

    def forward(self, x):
        self.modes.append(self.training)
        return top_k_gating(x, self.top_k)


@check
def check_capacity_router(CapacityRouter):
    x = torch.randn(3, 24, 4) + torch.tensor([1.0, 0, 0, 0])
    yield "in training the slots come from capacity_factor"
    router = CapacityRouter(OwnScores(2), 0.5, 0.75, minimum=2)
    close(router(x).gates, top_k_gating(x, 2).gates * kept_by_queue(top_k_gating(x, 2), 6, "position"), "gates")
    yield "in evaluation they come from eval_capacity_factor"
    same(router.eval()(x).kept, kept_by_queue(top_k_gating(x, 2), 9, "position"), "kept")
    yield "any router with a top_k will do, and k counts"
    same(CapacityRouter(OwnScores(1), 0.5, minimum=1)(x).kept, kept_by_queue(top_k_gating(x, 1), 3, "position"), "kept")
    inner, channels = TopkRouter(7, 4, top_k=2), torch.randn(2, 24, 7)
    same(CapacityRouter(inner, 0.5)(channels).kept, kept_by_queue(inner(channels), 6, "position"), "kept")
    yield "`priority` and `minimum` are passed on"
    for priority in PRIORITIES:
        routing = CapacityRouter(OwnScores(2), 0.25, priority=priority, minimum=5)(x)
        same(routing.kept, kept_by_queue(top_k_gating(x, 2), 5, priority), f"kept by {priority}")
    yield "slots are counted for one sequence, of whatever length, batch or not"
    for shape in (24, 4), (1, 12, 4), (2, 3, 40, 4):
        tokens = torch.randn(shape)
        routing = top_k_gating(tokens, 2)
        slots = {24: 6, 12: 3, 40: 10}[shape[-2]]
        same(router.train()(tokens).kept, kept_by_queue(routing, slots, "position"), f"kept of x {shape}")
    yield "the inner router is called once, in training or evaluation mode as set"
    asked = OwnScores(2)
    router = CapacityRouter(asked)
    router(x), router.eval()(x)
    same(asked.modes, [True, False], "its training modes when it was called")
    yield "gradients reach the tokens, in training and in evaluation"
    x.requires_grad_()
    for mode, slots in (True, 6), (False, 9):
        router = CapacityRouter(OwnScores(2), 0.5, 0.75).train(mode)
        routing = top_k_gating(x, 2)
        same_gradients(router(x).gates, routing.gates * kept_by_queue(routing, slots, "position"), {"x": x}, "gates")
        same_gradients(router(x).logits, x * 1, {"x": x}, "the logits")


@check
def check_slot_flops(slot_flops):
    routing = favoured(3, 10, 4, k=2)
    limited = replace(routing, kept=kept_by_queue(routing, 6, "position"))
    used = limited.kept.sum().item()
    yield "4 experts with 6 slots for each of 3 sequences, and 2 * 2 * C * F FLOPs per slot"
    close(slot_flops(limited, 6, 8, 16)[0], 4 * 6 * 3 * 2 * 2 * 8 * 16, "FLOPs of all slots")
    yield "the useful FLOPs are those of slots that hold a kept token"
    close(slot_flops(limited, 6, 8, 16)[1], used * 2 * 2 * 8 * 16, "useful FLOPs")
    yield "more slots cost more, and the useful FLOPs stay the same"
    close(slot_flops(limited, 12, 8, 16)[0], 4 * 12 * 3 * 2 * 2 * 8 * 16, "FLOPs of twice the slots")
    close(slot_flops(limited, 12, 8, 16)[1], used * 2 * 2 * 8 * 16, "useful FLOPs")
    yield "the slots of an expert that keeps no token count too"
    alone = top_k_gating(torch.tensor([[9.0, 0, 0, 0, 0]]).expand(7, 5), 1)
    close(slot_flops(alone, 2, 3, 4)[0], 5 * 2 * 2 * 2 * 3 * 4, "FLOPs if all tokens choose expert 0, fields (7, 5)")


def unlimited(x):
    return top_k_gating(x, 2)


@check
def check_influence(influence):
    one, two = torch.randn(2, 12, 4)
    yield "without a capacity, a token changes its own gates and no others"
    with unchanged(x=one, other=two):
        found = influence(unlimited, one, two)
    same(found, torch.eye(12, dtype=torch.bool), "influence")
    yield "rows are the tokens that change, columns the replaced ones: a router in which all depend on token 5"
    found = influence(lambda x: top_k_gating(x + x[5], 2), one, two)
    expected = torch.eye(12, dtype=torch.bool)
    expected[:, 5] = True
    same(found, expected, "influence")
    yield "only one token is replaced at a time: a router in which each token depends on the one before"
    found = influence(lambda x: top_k_gating(x + x.roll(1, 0), 2), one, two)
    same(found, torch.eye(12, dtype=torch.bool) | torch.eye(12, dtype=torch.bool).roll(1, 0), "influence")
    yield "a change of a gate counts, even if the experts stay the same"
    same(influence(unlimited, one, one * 0.9), torch.eye(12, dtype=torch.bool), "influence of smaller tokens")
    yield "a token replaced by itself changes nothing"
    same(influence(unlimited, one, one), torch.zeros(12, 12, dtype=torch.bool), "influence")
