"""Lesson 07. The oracle is a queue of people: a sorted list of (token, expert), walked down one by one."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from makemoe.capacity import PRIORITIES, CapacityRouter, expert_capacity, limit_to_capacity
from makemoe.gating import Routing, TopkRouter, top_k_gating
from makemoe.noisy_gating import NoisyTopkRouter
from makemoe.sparse_moe import Experts, SparseMoE

each_priority = pytest.mark.parametrize("priority", PRIORITIES)
FIELDS = "gates", "logits", "chosen", "kept"


def part(routing, index):
    "The same record with `index` applied to every field."
    return Routing(*(getattr(routing, name)[index] for name in FIELDS))


def seats_of_one_sequence(routing, capacity, priority):
    "kept (T, E) of a routing with fields (T, E), by walking down the queue."
    requests = []
    for t, (wants, gates, probs) in enumerate(zip(routing.kept, routing.gates.tolist(), routing.probs.tolist())):
        experts = sorted(wants.nonzero().flatten().tolist(), key=lambda e: -gates[e])
        for rank, e in enumerate(experts):
            turn = {"position": (t, rank), "choice": (rank, t), "probability": (rank, -max(probs), t)}[priority]
            requests.append((*turn, t, e))
    kept, free = torch.zeros_like(routing.kept), [capacity] * routing.kept.shape[-1]
    for *_, t, e in sorted(requests):
        if free[e]:
            free[e] -= 1
            kept[t, e] = True
    return kept


def crowded(*shape, k, favour=1.0):
    "Top-k of random logits of `shape` (..., T, E), in which expert 0 is favoured."
    logits = torch.randn(shape)
    logits[..., 0] += favour
    return top_k_gating(logits, k)


def test_binary_fractions_add_no_seat():
    for cents in range(1, 400):  # 1.1 * 100 / 10 is 11.000000000000002
        assert expert_capacity(100, 10, 1, cents / 100, minimum=1) == -(-cents // 10)


def test_capacity_beside_the_formulas_of_other_systems():
    def flaxformer(cf, T, E):
        return max(round(cf * T / E), 4)

    def st_moe(cf, T, E):
        return max(min(T, int(cf * T / E)), 4)

    def makemoe_part_2(cf, T, B, E, k):
        return int(B * T * k / E * cf)

    # 100 tokens, 8 experts, 2 for each token, factor 1.25; a batch of 16
    assert expert_capacity(100, 8, 2, 1.25) == 32
    assert (flaxformer(1.25, 100, 8), st_moe(1.25, 100, 8), makemoe_part_2(1.25, 100, 16, 8, 2)) == (16, 15, 500)
    for T, E, cf in (64, 8, 1.0), (64, 8, 1.25), (8, 8, 1.0), (256, 16, 2.0):  # shares that are whole numbers, k = 1
        assert expert_capacity(T, E, 1, cf) == flaxformer(cf, T, E) == st_moe(cf, T, E)
        assert 16 * expert_capacity(T, E, 2, cf, minimum=1) == makemoe_part_2(cf, T, 16, E, 2)


@given(B=st.integers(1, 3), T=st.integers(1, 12), E=st.integers(1, 6), favour=st.sampled_from([0.0, 1.0, 100.0]),
       priority=st.sampled_from(PRIORITIES), data=st.data())
def test_seats_equal_the_queue(B, T, E, favour, priority, data):
    k, capacity = data.draw(st.integers(1, E)), data.draw(st.integers(0, T + 2))
    routing = crowded(B, T, E, k=k, favour=favour)
    limited = limit_to_capacity(routing, capacity, priority)
    expected = torch.stack([seats_of_one_sequence(part(routing, b), capacity, priority) for b in range(B)])
    assert torch.equal(limited.kept, expected)
    assert torch.equal(limited.gates, torch.where(expected, routing.gates, 0))
    assert (limited.kept.sum(-2) <= capacity).all()
    assert not (limited.kept & ~limited.chosen).any()
    assert torch.equal(limited.kept.sum(-2), routing.chosen.sum(-2).clamp(max=capacity))  # no seat stays idle


@each_priority
def test_what_was_dropped_before_stays_dropped_and_takes_no_seat(priority):
    routing = crowded(40, 10, 4, k=3)
    kept = routing.kept & (torch.rand(40, 10, 4) > 0.4)
    fewer = replace(routing, gates=routing.gates * kept, kept=kept)
    limited = limit_to_capacity(fewer, 3, priority)
    expected = torch.stack([seats_of_one_sequence(part(fewer, b), 3, priority) for b in range(40)])
    assert torch.equal(limited.kept, expected)


@each_priority
def test_more_choices_than_tokens(priority):
    routing = crowded(40, 2, 8, k=6)
    expected = torch.stack([seats_of_one_sequence(part(routing, b), 1, priority) for b in range(40)])
    assert torch.equal(limit_to_capacity(routing, 1, priority).kept, expected)


@each_priority
def test_to_limit_twice_is_to_limit_once(priority):
    once = limit_to_capacity(crowded(20, 10, 4, k=2), 3, priority)
    assert torch.equal(limit_to_capacity(once, 3, priority).kept, once.kept)


@each_priority
def test_with_enough_seats_nothing_is_dropped(priority):
    routing = crowded(3, 10, 4, k=2, favour=100.0)
    for capacity in 10, 1000:
        limited = limit_to_capacity(routing, capacity, priority)
        assert torch.equal(limited.kept, routing.chosen) and torch.equal(limited.gates, routing.gates)
        assert limited.dropped == 0


@each_priority
def test_without_seats_everything_is_dropped(priority):
    limited = limit_to_capacity(crowded(3, 10, 4, k=2), 0, priority)
    assert not limited.kept.any() and not limited.gates.any() and limited.dropped == 1


@each_priority
def test_the_wish_stays_and_the_given_record_is_untouched(priority):
    routing = crowded(3, 10, 4, k=2)
    before = {name: getattr(routing, name).clone() for name in FIELDS}
    limited = limit_to_capacity(routing, 2, priority)
    assert limited.dropped > 0
    assert torch.equal(limited.chosen, routing.chosen) and torch.equal(limited.logits, routing.logits)
    for name in FIELDS:
        assert torch.equal(getattr(routing, name), before[name]), name


@each_priority
def test_any_leading_shape(priority):
    routing = crowded(2, 3, 10, 4, k=2)  # (A, B, T, E)
    limited = limit_to_capacity(routing, 3, priority)
    for a in range(2):
        for b in range(3):
            alone = limit_to_capacity(part(routing, (a, b)), 3, priority)  # (T, E)
            for name in FIELDS:
                assert torch.equal(getattr(limited, name)[a, b], getattr(alone, name)), name


@each_priority
def test_an_empty_batch(priority):
    assert limit_to_capacity(top_k_gating(torch.zeros(0, 5, 4), 2), 3, priority).kept.shape == (0, 5, 4)


@each_priority
def test_rows_do_not_see_each_other(priority):
    routing, others = crowded(4, 12, 4, k=2), crowded(4, 12, 4, k=2, favour=3.0)
    mixed = Routing(*(torch.cat([getattr(routing, name)[:2], getattr(others, name)[2:]]) for name in FIELDS))
    order = torch.tensor([2, 0, 3, 1])
    limited = limit_to_capacity(routing, 3, priority)
    assert torch.equal(limit_to_capacity(mixed, 3, priority).kept[:2], limited.kept[:2])
    assert torch.equal(limit_to_capacity(part(routing, order), 3, priority).kept, limited.kept[order])


@each_priority
def test_relabelling_experts_permutes_the_seats(priority):
    routing, order = crowded(4, 12, 5, k=3), torch.randperm(5)
    expected = limit_to_capacity(routing, 4, priority).kept[..., order]
    assert torch.equal(limit_to_capacity(part(routing, (..., order)), 4, priority).kept, expected)


def changed_before(cut, priority, capacity=4):
    "In which of 500 sequences of 16 tokens the seats before `cut` change, when all from `cut` on are replaced."
    logits = torch.randn(500, 16, 4)
    other = logits.clone()
    other[:, cut:] = torch.randn(500, 16 - cut, 4)
    one, two = (limit_to_capacity(top_k_gating(l, 2), capacity, priority) for l in (logits, other))
    return (one.gates != two.gates)[:, :cut].any(-1).any(-1)


@pytest.mark.parametrize("cut", range(1, 16))
def test_position_is_causal(cut):
    assert not changed_before(cut, "position").any()


def test_by_position_with_the_same_seats_a_beginning_is_seated_as_in_the_whole():
    routing = crowded(20, 16, 4, k=2)
    whole = limit_to_capacity(routing, 4)
    for cut in range(1, 16):
        assert torch.equal(limit_to_capacity(part(routing, (slice(None), slice(cut))), 4).kept, whole.kept[:, :cut])


@pytest.mark.parametrize("priority", ["choice", "probability"])
def test_choice_and_probability_leak_the_future_as_the_lesson_says(priority):
    assert changed_before(8, priority).float().mean() > 0.5
    assert changed_before(15, priority).any(), "already the last token alone"


def test_a_later_first_choice_takes_the_seat_of_an_earlier_second_one():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0]])  # token 0 wants experts 0, 1; token 1 wants 1, 2
    routing = top_k_gating(logits, 2)
    assert limit_to_capacity(routing, 1, "position").kept.tolist() == [[True, True, False], [False, False, True]]
    assert limit_to_capacity(routing, 1, "choice").kept.tolist() == [[True, False, False], [False, True, True]]


def test_the_more_certain_sits_but_never_with_a_second_choice_before_a_first():
    logits = torch.tensor([[1.0, 0.0, 0.0], [9.0, 0.0, 0.1]])  # both want 0 first; token 1 is certain
    assert limit_to_capacity(top_k_gating(logits, 1), 1, "probability").kept[:, 0].tolist() == [False, True]
    logits = torch.tensor([[1.0, 0.9, 0.0], [0.0, 1.0, 9.0]])  # token 1, certain, wants 1 second; so does token 0
    assert limit_to_capacity(top_k_gating(logits, 2), 1, "probability").kept[:, 1].tolist() == [False, True]
    logits = torch.tensor([[0.0, 1.0, 0.9], [0.0, 1.0, 9.0]])  # token 0, uncertain, wants 1 first: that counts more
    assert limit_to_capacity(top_k_gating(logits, 2), 1, "probability").kept[:, 1].tolist() == [True, False]


def test_among_equals_the_earlier_one_sits():
    routing = top_k_gating(torch.zeros(50, 4), 1)  # all choose the same expert and are equally certain
    favourite = routing.chosen[0].nonzero().item()
    for priority in PRIORITIES:
        kept = limit_to_capacity(routing, 20, priority).kept[:, favourite]
        assert kept.nonzero().flatten().tolist() == list(range(20))


@pytest.mark.parametrize("priority", ["choice", "probability"])
def test_under_noise_the_gates_say_which_choice_is_the_first(priority):
    asked, clean = torch.randn(40, 10, 4), torch.randn(40, 10, 4)
    noisy = replace(top_k_gating(asked, 3), logits=clean)
    expected = torch.stack([seats_of_one_sequence(part(noisy, b), 3, priority) for b in range(40)])
    assert torch.equal(limit_to_capacity(noisy, 3, priority).kept, expected)


def test_a_choice_whose_gate_has_run_out_of_digits_is_still_a_choice():
    routing = top_k_gating(torch.tensor([[0.0, 0.0, 1.0, 300.0], [0.0, 2.0, 1.9, 0.0]]), 2)
    assert routing.chosen[0, 2] and routing.gates[0, 2] == 0
    kept = limit_to_capacity(routing, 1, "choice").kept  # expert 2: second choice of both, the earlier one sits
    assert kept[:, 2].tolist() == [True, False]


def test_a_dropped_token_leaves_the_layer_with_exactly_zero():
    router = TopkRouter(8, 4, top_k=2)
    x = torch.randn(3, 40, 8) + torch.randn(8)
    for priority in PRIORITIES:
        layer = SparseMoE(CapacityRouter(router, 0.25, priority=priority), Experts(4, 8, 16))
        y, routing = layer(x)
        gone = ~routing.kept.any(-1)
        assert gone.any() and (y[gone] == 0).all() and (y[~gone] != 0).any(-1).all()


def test_a_token_that_loses_one_of_two_keeps_the_other_as_it_was():
    router, experts = TopkRouter(8, 4, top_k=2), Experts(4, 8, 16)
    x = torch.randn(1, 40, 8)
    plain, (y, limited) = router(x), SparseMoE(CapacityRouter(router, 0.5), experts)(x)
    half = (limited.kept.sum(-1) == 1)[0].nonzero().flatten().tolist()
    assert half
    for t in half:
        e = limited.kept[0, t].nonzero().item()
        assert limited.gates[0, t].sum() < 1
        assert_close(y[0, t], plain.gates[0, t, e] * experts[e](x[0, t]))


@each_priority
def test_gradient_flows_through_the_kept_gates_only(priority):
    logits = torch.randn(5, 10, 4, requires_grad=True)
    routing = top_k_gating(logits, 2)
    gates = routing.gates.detach().requires_grad_()
    limited = limit_to_capacity(replace(routing, gates=gates), 3, priority)
    weights = torch.randn(5, 10, 4)
    (limited.gates * weights).sum().backward()
    assert limited.dropped > 0
    assert_close(gates.grad, weights * limited.kept, rtol=0, atol=0)
    (limit_to_capacity(routing, 3, priority).gates * weights).sum().backward(retain_graph=True)
    assert torch.equal(logits.grad.any(-1), limited.kept.any(-1)), "only who has a seat teaches the router"
    losses, = torch.autograd.grad((limit_to_capacity(routing, 3, priority).logits * weights).sum(), logits)
    assert torch.equal(losses, weights), "losses on the logits pass, seat or no seat"


@given(T=st.integers(0, 300), E=st.integers(1, 64), cents=st.integers(1, 400), data=st.data())
def test_capacity_is_the_exact_share_rounded_up(T, E, cents, data):
    k, minimum = data.draw(st.integers(1, E)), data.draw(st.integers(1, 9))
    exact = math.ceil(Fraction(cents, 100) * k * T / E)  # without the noise of binary fractions
    seats = expert_capacity(T, E, k, cents / 100, minimum)
    assert seats == max(exact, minimum) and isinstance(seats, int)


@given(T=st.integers(1, 100), E=st.integers(1, 32), data=st.data())
def test_a_factor_of_all_experts_over_top_k_seats_everybody(T, E, data):
    k = data.draw(st.integers(1, E))
    assert expert_capacity(T, E, k, E / k, minimum=1) == T


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_router_counts_its_own_seats_in_training_and_evaluation(top_k):
    inner = TopkRouter(8, 4, top_k)
    router, x = CapacityRouter(inner, 0.5, 0.75), torch.randn(3, 40, 8) + 2 * torch.randn(8)
    for mode, factor in (router.train, 0.5), (router.eval, 0.75):
        mode()
        routing, seats = router(x), expert_capacity(40, 4, top_k, factor)
        expected = limit_to_capacity(inner(x), seats)
        assert routing.kept.sum(-2).max() == seats
        for name in FIELDS:
            assert torch.equal(getattr(routing, name), getattr(expected, name)), name


@each_priority
def test_router_hands_on_priority_and_minimum(priority):
    inner, x = TopkRouter(8, 4, 2), torch.randn(3, 20, 8)
    routing = CapacityRouter(inner, 0.5, priority=priority, minimum=7)(x)
    assert torch.equal(routing.kept, limit_to_capacity(inner(x), 7, priority).kept)


def test_router_has_the_defaults_that_the_lesson_names():
    router = CapacityRouter(TopkRouter(8, 4, 2))
    assert (router.capacity_factor, router.eval_capacity_factor) == (1.25, 2.0)
    assert (router.priority, router.minimum) == ("position", 4)
    assert router.top_k == 2  # so that it can be wrapped like any other router


@each_priority
def test_router_treats_each_sequence_alone(priority):
    router, x = CapacityRouter(TopkRouter(8, 4, 2), 0.5, priority=priority), torch.randn(5, 20, 8)
    alone = torch.stack([router(row).kept for row in x])
    assert torch.equal(router(x).kept, alone)


def test_layer_is_causal_by_position_and_not_by_choice_or_probability():
    inner, experts, x = TopkRouter(8, 4, 2), Experts(4, 8, 16), torch.randn(50, 20, 8)
    other = x.clone()
    other[:, 12:] = torch.randn(50, 8, 8)
    change = {}
    for priority in PRIORITIES:
        layer = SparseMoE(CapacityRouter(inner, 1.0, priority=priority), experts)
        change[priority] = (layer(x)[0] - layer(other)[0])[:, :12].abs().max().item()
    assert change["position"] < 1e-6
    assert change["choice"] > 1e-3 and change["probability"] > 1e-3  # they leak, and the lesson says so


def test_one_token_at_a_time_nothing_is_dropped():
    router, x = CapacityRouter(TopkRouter(8, 4, 2), 0.5, 0.5), torch.randn(2, 30, 8)
    assert router(x).dropped > 0
    assert all(router(x[:, t : t + 1]).dropped == 0 for t in range(30))
    assert CapacityRouter(router.router, 4 / 2)(x).dropped == 0  # factor E / k


def test_noise_is_drawn_once_and_only_in_training():
    router, x = CapacityRouter(NoisyTopkRouter(8, 4, 2), 1.0, 2.0), torch.randn(3, 20, 8)
    assert not torch.equal(router(x).chosen, router(x).chosen)
    torch.manual_seed(1)
    limited, after = router(x), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(limited.chosen, router.router(x).chosen) and torch.equal(torch.rand(1), after)
    assert router.router.training
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


def test_nonsense_is_refused():
    routing = crowded(2, 5, 4, k=2)
    known = "must be one of position, choice, probability"
    with pytest.raises(ValueError, match=f"priority is 'random', but {known}"):
        limit_to_capacity(routing, 2, "random")
    with pytest.raises(ValueError, match=f"priority is 'first', but {known}"):
        CapacityRouter(TopkRouter(8, 4, 2), priority="first")
    for capacity in -1, 2.5, math.inf:
        with pytest.raises(ValueError, match=f"capacity is {capacity}, but must be a whole number of seats, 0 or more"):
            limit_to_capacity(routing, capacity)
    with pytest.raises(ValueError, match=r"a queue needs fields \(..., T, E\), but they are \(4,\)"):
        limit_to_capacity(top_k_gating(torch.randn(4), 2), 2)


@pytest.mark.parametrize("factor", [0, -1.0, math.inf, math.nan])
def test_an_impossible_factor_is_refused_when_the_router_is_built(factor):
    message = f"capacity_factor is {factor}, but must be above 0 and finite"
    with pytest.raises(ValueError, match=message):
        expert_capacity(10, 4, 2, factor)
    for factors in {"capacity_factor": factor}, {"eval_capacity_factor": factor}:
        with pytest.raises(ValueError, match=message):
            CapacityRouter(TopkRouter(8, 4, 2), **factors)


def test_impossible_numbers_of_seats_and_experts_are_refused():
    with pytest.raises(ValueError, match="minimum is 0, but an expert needs at least 1 seat"):
        expert_capacity(10, 4, 2, 1.0, minimum=0)
    with pytest.raises(ValueError, match="minimum is 0, but an expert needs at least 1 seat"):
        CapacityRouter(TopkRouter(8, 4, 2), minimum=0)
    for top_k in 0, 5:
        with pytest.raises(ValueError, match=f"top_k is {top_k}, but must lie between 1 and num_experts = 4"):
            expert_capacity(10, 4, top_k, 1.0)
    with pytest.raises(AttributeError, match="top_k"):
        CapacityRouter(nn.Linear(8, 4))
