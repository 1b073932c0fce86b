"""Lesson 07: what its checks do not cover. Seeds, causality, other systems' numbers, whole layers."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from classroom.hidden import capacity as hidden
from makemoe.capacity import PRIORITIES, CapacityRouter, expert_capacity, limit_to_capacity
from makemoe.checks import capacity as checks
from makemoe.checks.capacity import favoured, fields, kept_by_queue
from makemoe.gating import Routing, TopkRouter, top_k_gating
from makemoe.noisy_gating import NoisyTopkRouter
from makemoe.sparse_moe import Experts, SparseMoE

each_priority = pytest.mark.parametrize("priority", PRIORITIES)


@pytest.mark.parametrize("those", [checks, hidden], ids=["visible", "hidden"])
def test_checks(those):
    those.check_expert_capacity(expert_capacity)
    those.check_limit_to_capacity(limit_to_capacity)
    those.check_capacity_router(CapacityRouter)


# ---- expert_capacity


@given(T=st.integers(0, 300), E=st.integers(1, 64), cents=st.integers(1, 400), data=st.data())
def test_capacity_is_the_exact_share_rounded_up(T, E, cents, data):
    k, minimum = data.draw(st.integers(1, E)), data.draw(st.integers(1, 9))
    exact = math.ceil(Fraction(cents, 100) * k * T / E)  # without the rounding of binary fractions
    assert expert_capacity(T, E, k, cents / 100, minimum) == max(exact, minimum)


def test_capacity_beside_the_formulas_of_other_systems():
    for T, E, cf in (64, 8, 1.0), (64, 8, 1.25), (8, 8, 1.0), (256, 16, 2.0):  # shares that are whole numbers, k = 1
        flaxformer, st_moe = max(round(cf * T / E), 4), max(min(T, int(cf * T / E)), 4)
        assert expert_capacity(T, E, 1, cf) == expert_capacity(T, E, 2, cf / 2) == flaxformer == st_moe
        assert 16 * expert_capacity(T, E, 2, cf, minimum=1) == int(16 * T * 2 / E * cf)  # makeMoE, a batch of 16


def test_broken_settings_are_refused_in_one_line():
    for factor in 0, -1.0, math.inf, math.nan:
        for factors in {"capacity_factor": factor}, {"eval_capacity_factor": factor}:
            with pytest.raises(ValueError, match=f"^capacity_factor is {factor}, but must be above 0 and finite$"):
                CapacityRouter(TopkRouter(8, 4, 2), **factors)
    with pytest.raises(ValueError, match="^minimum is 0, but an expert needs at least 1 slot to learn anything$"):
        CapacityRouter(TopkRouter(8, 4, 2), minimum=0)
    for top_k in 0, 5:
        with pytest.raises(ValueError, match=f"^top_k is {top_k}, but must lie between 1 and num_experts = 4$"):
            expert_capacity(10, 4, top_k, 1.0)
    with pytest.raises(ValueError, match="^priority is 'first', but must be one of position, choice, probability$"):
        CapacityRouter(TopkRouter(8, 4, 2), priority="first")
    with pytest.raises(ValueError, match=r"^sequences need fields \(..., T, E\), but they are \(4,\)$"):
        limit_to_capacity(top_k_gating(torch.randn(4), 2), 2)
    with pytest.raises(AttributeError, match="top_k"):
        CapacityRouter(nn.Linear(8, 4))


@pytest.mark.parametrize("factor", [1e30, 1e308])
def test_enormous_factors_drop_nothing(factor):
    assert CapacityRouter(TopkRouter(8, 4, 2), factor, factor)(torch.randn(2, 40, 8)).dropped == 0


# ---- limit_to_capacity


@given(B=st.integers(1, 3), T=st.integers(1, 12), E=st.integers(1, 6), favour=st.sampled_from([0.0, 1.0, 100.0]),
       priority=st.sampled_from(PRIORITIES), data=st.data())
def test_slots_equal_the_queue(B, T, E, favour, priority, data):
    k, capacity = data.draw(st.integers(1, E)), data.draw(st.integers(0, T + 2))
    logits = torch.randn(B, T, E)
    logits[..., 0] += favour
    routing = top_k_gating(logits, k)
    limited = limit_to_capacity(routing, capacity, priority)
    assert torch.equal(limited.kept, kept_by_queue(routing, capacity, priority))
    assert torch.equal(limited.gates, torch.where(limited.kept, routing.gates, 0))
    assert torch.equal(limited.kept.sum(-2), routing.chosen.sum(-2).clamp(max=capacity))  # no slot stays empty
    assert torch.equal(limit_to_capacity(limited, capacity, priority).kept, limited.kept)  # twice is once


class Given(Routing):
    "A record whose probabilities were given, and stand in the field of the logits."

    @property
    def probs(self):
        return self.logits


# google/flaxformer, architectures/moe/routing_test.py: (k, slots, with batch prioritized routing?, router_probs * 1024
# of each group, experts that keep each token). They are rounded to bfloat16; among equals the lowest expert is first.
TWO = [[[520, 502], [510, 516], [512, 512]], [[516, 510], [506, 520], [512, 510]]]
THREE = [[[340, 338, 344], [340, 344, 342], [342, 340, 344], [340, 344, 342]],
         [[338, 350, 334], [340, 336, 344], [340, 344, 342], [338, 350, 336]]]
FOUR = [[[252, 256, 260, 258], [249, 252, 260, 264], [250, 253, 262, 260], [256, 256, 258, 256]],
        [[253, 254, 255, 264], [251, 254, 260, 260], [251, 252, 260, 262], [249, 254, 262, 262]]]
FLAXFORMER = [
    (1, 1, "probability", TWO, [[[0], [1], []], [[0], [1], []]]),
    (1, 1, "choice", TWO, [[[0], [1], []], [[0], [1], []]]),
    (1, 2, "probability", THREE, [[[2], [1], [2], [1]], [[1], [2], [], [1]]]),
    (2, 1, "probability", THREE, [[[0, 2], [1], [], []], [[0, 1], [2], [], []]]),
    (1, 2, "probability", FOUR, [[[2], [3], [2], []], [[3], [2], [3], [2]]]),
    (1, 2, "choice", FOUR, [[[2], [3], [2], []], [[3], [2], [3], [2]]]),
    (2, 2, "probability", FOUR, [[[2], [3], [2, 3], [0]], [[3], [2], [3], [2]]]),
]


@pytest.mark.parametrize("k, capacity, priority, probs, kept", FLAXFORMER)
def test_flaxformer_keeps_the_same(k, capacity, priority, probs, kept):
    probs = torch.tensor(probs) / 1024  # (G, T, E)
    best = probs.argsort(dim=-1, descending=True, stable=True)[..., :k]
    chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, best, True)
    limited = limit_to_capacity(Given(probs * chosen, probs, chosen, chosen), capacity, priority)
    assert [[row.nonzero().flatten().tolist() for row in group] for group in limited.kept] == kept


@each_priority
def test_relabelling_experts_and_reordering_sequences_permutes_what_is_kept(priority):
    routing, experts, rows = favoured(4, 12, 5, k=3), torch.randperm(5), torch.tensor([2, 0, 3, 1])
    kept = limit_to_capacity(routing, 4, priority).kept
    relabelled = fields(routing, lambda field: field[rows][..., experts])
    assert torch.equal(limit_to_capacity(relabelled, 4, priority).kept, kept[rows][..., experts])


@each_priority
def test_an_empty_batch(priority):
    assert limit_to_capacity(top_k_gating(torch.zeros(0, 5, 4), 2), 3, priority).kept.shape == (0, 5, 4)


def changed_before(cut, priority, capacity=4):
    "In which of 500 sequences of 16 tokens the gates before `cut` change when all from `cut` on are replaced."
    logits = torch.randn(500, 16, 4)
    other = logits.clone()
    other[:, cut:] = torch.randn(500, 16 - cut, 4)
    one, two = (limit_to_capacity(top_k_gating(scores, 2), capacity, priority) for scores in (logits, other))
    return (one.gates != two.gates)[:, :cut].any(-1).any(-1)


def test_position_is_causal_and_the_others_leak_as_the_lesson_says():
    for cut in range(1, 16):
        assert not changed_before(cut, "position").any()
    for priority in "choice", "probability":
        assert changed_before(8, priority).float().mean() > 0.5
        assert changed_before(15, priority).any(), "already the last token alone"


def test_by_position_a_beginning_keeps_what_it_keeps_in_the_whole():
    routing = favoured(20, 16, 4, k=2)
    whole = limit_to_capacity(routing, 4)
    for cut in range(1, 16):
        beginning = fields(routing, lambda x, cut=cut: x[:, :cut])
        assert torch.equal(limit_to_capacity(beginning, 4).kept, whole.kept[:, :cut])


# ---- the router and whole layers


def test_a_dropped_token_leaves_the_layer_with_exactly_zero_and_one_of_two_stays_as_it_was():
    router, experts = TopkRouter(8, 4, top_k=2), Experts(4, 8, 16)
    x = torch.randn(1, 40, 8) + torch.randn(8)
    plain = router(x)
    for priority in PRIORITIES:
        y, limited = SparseMoE(CapacityRouter(router, 0.25, priority=priority), experts)(x)
        gone, half = (limited.kept.sum(-1) == n for n in (0, 1))
        assert gone.any() and (y[gone] == 0).all() and (y[~gone] != 0).any(-1).all() and half.any()
        for t in half[0].nonzero().flatten().tolist():
            e = limited.kept[0, t].nonzero().item()
            assert_close(y[0, t], plain.gates[0, t, e] * experts[e](x[0, t]))


def test_layer_is_causal_by_position_and_not_by_choice_or_probability():
    inner, experts, x = TopkRouter(8, 4, 2), Experts(4, 8, 16), torch.randn(50, 20, 8)
    other = torch.cat([x[:, :12], torch.randn(50, 8, 8)], dim=1)
    change = {}
    for priority in PRIORITIES:
        layer = SparseMoE(CapacityRouter(inner, 1.0, priority=priority), experts)
        change[priority] = (layer(x)[0] - layer(other)[0])[:, :12].abs().max().item()
    assert change["position"] < 1e-6
    assert change["choice"] > 1e-3 and change["probability"] > 1e-3


def test_one_token_at_a_time_nothing_is_dropped():
    router, x = CapacityRouter(TopkRouter(8, 4, 2), 0.5, 0.5), torch.randn(2, 30, 8)
    assert router(x).dropped > 0
    assert all(router(x[:, t : t + 1]).dropped == 0 for t in range(30))
    assert CapacityRouter(router.router, 4 / 2)(x).dropped == 0  # factor E / k


def test_noise_is_drawn_once_and_only_in_training():
    router, x = CapacityRouter(NoisyTopkRouter(8, 4, 2), 1.0, 2.0), torch.randn(3, 20, 8)
    torch.manual_seed(1)
    limited, after = router(x), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(limited.chosen, router.router(x).chosen) and torch.equal(torch.rand(1), after)
    router.eval()
    assert not router.router.training and torch.equal(router(x).gates, router(x).gates)
    assert len(list(router.parameters())) == 4  # those of the router inside, and none of its own


def test_router_learns_under_autocast_too():
    layer = SparseMoE(CapacityRouter(TopkRouter(8, 4, 2), 0.5), Experts(4, 8, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = layer(torch.randn(2, 20, 8))
    y.float().square().mean().backward()
    assert routing.gates.dtype == torch.float32
    assert layer.router.router.linear.weight.grad.abs().sum() > 0


def test_noise_decides_the_order_of_choices():
    asked, clean = torch.randn(40, 10, 4), torch.randn(40, 10, 4)
    noisy = replace(top_k_gating(asked, 3), logits=clean)
    for priority in PRIORITIES:
        assert torch.equal(limit_to_capacity(noisy, 3, priority).kept, kept_by_queue(noisy, 3, priority))
