"""Hidden cases for lesson 07: other sizes, other routers and ties."""

import math
from dataclasses import replace
from fractions import Fraction
from functools import partial

import torch

from makemoe.checks import check, close, same
from makemoe.checks.capacity import PRIORITIES, OwnScores, favoured, fields, kept_by_queue, same_slots
from makemoe.gating import top_k_gating


def made_elsewhere(call, what):
    "Assert that `call`, given tensors of another device, leaves them there. Code that reads values cannot be tried."
    try:
        return call()
    except NotImplementedError:  # a tensor of the device 'meta' has no values
        return None
    except RuntimeError as error:
        assert "device" not in str(error) or "item()" in str(error), f"{what} mixes devices: {error}"
        return None


@check
def check_expert_capacity(expert_capacity):
    yield "the exact share, rounded up"
    for T, E, k, cents in (7, 6, 3, 200), (30, 6, 3, 200), (101, 6, 3, 200), (100, 10, 1, 29), (333, 7, 3, 115):
        exact = math.ceil(Fraction(cents, 100) * k * T / E)
        same(expert_capacity(T, E, k, cents / 100, minimum=1), exact, f"slots for {(T, E, k, cents / 100)}")


@check
def check_limit_to_capacity(limit_to_capacity):
    for priority in PRIORITIES:
        yield f"{priority}: k = E, fewer tokens than choices, and all equally certain"
        same_slots(limit_to_capacity, favoured(2, 9, 5, k=5), 4, priority, "k = E")
        same_slots(limit_to_capacity, favoured(20, 2, 8, k=6), 1, priority, "T < k")
        same_slots(limit_to_capacity, top_k_gating(torch.zeros(2, 30, 5), 1), 4, priority, "all equal")
        same_slots(limit_to_capacity, favoured(1, 40, 3, k=1), 9, priority, "T = 40")
        yield f"{priority}: all is computed where the routing is"
        there = fields(favoured(2, 9, 5, k=2), lambda x: x.to("meta"))
        limited = made_elsewhere(partial(limit_to_capacity, there, 3, priority), priority)
        assert limited is None or limited.kept.is_meta, f"kept is on {limited.kept.device}"


@check
def check_capacity_router(CapacityRouter):
    yield "k = 3 of 6 experts, 50 tokens"
    x = torch.randn(50, 6)
    routing = top_k_gating(x, 3)
    same(CapacityRouter(OwnScores(3), 0.7)(x).kept, kept_by_queue(routing, 18, "position"), "kept")
    yield "by default 1.25 in training and 2 in evaluation"
    router = CapacityRouter(OwnScores(1))
    one = top_k_gating(x + torch.tensor([3.0, 0, 0, 0, 0, 0]), 1)
    same(router(one.logits).kept, kept_by_queue(one, 11, "position"), "kept in training")
    same(router.eval()(one.logits).kept, kept_by_queue(one, 17, "position"), "kept in evaluation")


@check
def check_slot_flops(slot_flops):
    yield "another shape in front, and a width of its own"
    routing = favoured(2, 3, 10, 5, k=2)
    limited = replace(routing, kept=kept_by_queue(routing, 2, "position"))
    all_slots, useful = slot_flops(limited, 2, 6, 7)
    close(all_slots, 2 * 3 * 5 * 2 * 4 * 6 * 7, "FLOPs of all slots")
    close(useful, limited.kept.sum().item() * 4 * 6 * 7, "useful FLOPs")


@check
def check_influence(influence):
    yield "by position nothing flows back, by choice something does"
    one, two = torch.randn(2, 16, 4)
    for priority in "position", "choice":

        def router(x, priority=priority):
            routing = top_k_gating(x, 2)
            return replace(routing, gates=routing.gates * kept_by_queue(routing, 8, priority))

        found = influence(router, one, two)
        expected = torch.zeros(16, 16, dtype=torch.bool)
        for s in range(16):
            changed = torch.cat([one[:s], two[s : s + 1], one[s + 1 :]])
            expected[:, s] = (router(changed).gates != router(one).gates).any(dim=-1)
        same(found, expected, f"influence by {priority}")
