"""Lesson 08. The oracles are loops over single tokens in plain Python, closed forms at the ends, and finite differences."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from makemoe.gating import Routing, TopkRouter, top_k_gating
from makemoe.losses import importance_loss, load_balancing_loss, router_z_loss, routing_metrics
from makemoe.noisy_gating import NoisyTopkRouter

LOSSES = load_balancing_loss, importance_loss, router_z_loss


def fields(routing):
    return routing.gates, routing.logits, routing.chosen, routing.kept


def only(tokens, routing):
    "The routing with its tokens selected, ordered or reshaped by `tokens`, a function of one field."
    return Routing(*map(tokens, fields(routing)))


def without(routing, dropped):
    "The routing after the choices in `dropped` were turned away."
    return replace(routing, gates=routing.gates.masked_fill(dropped, 0), kept=routing.kept & ~dropped)


def taking_turns(E, k, rounds=1, scale=4.0):
    "A routing in which every expert is chosen equally often, by tokens that mean it."
    wishes = torch.zeros(rounds * E, E)
    for t in range(rounds * E):
        for rank in range(k):
            wishes[t, (t + rank) % E] = scale - rank / E
    return top_k_gating(wishes, k)


def balance_by_loop(logits, chosen):
    "Token by token, in plain Python: E / k * sum of f * P."
    N, E, k = len(logits), len(logits[0]), sum(chosen[0])
    total = 0.0
    for e in range(E):
        f = sum(row[e] for row in chosen) / N
        P = sum(math.exp(row[e]) / sum(map(math.exp, row)) for row in logits) / N
        total += f * P
    return E / k * total


sizes = st.tuples(st.integers(1, 8), st.integers(1, 8)).map(lambda pair: (max(pair), min(pair)))  # E, k with k <= E


# ---- routing_metrics


def test_metrics_against_counts_by_hand():
    chosen = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)
    routing = Routing(chosen / 2, torch.tensor([[0.0, 0, 0, 0], [1e4, 0, 0, 0]] * 2), chosen, chosen)
    expected = {"imbalance": 2.0, "dropped": 0.0, "confidence": (1 / 4 + 1) / 2, "entropy": math.log(4) / 2}
    assert routing_metrics(routing) == pytest.approx(expected, abs=1e-6)
    first_two = (chosen.cumsum(dim=0) > 2) & chosen  # expert 0 has two seats
    expected |= {"imbalance": 4 / 3, "dropped": 2 / 8}  # loads 2, 2, 1, 1
    assert routing_metrics(without(routing, first_two)) == pytest.approx(expected, abs=1e-6)


@given(sizes)
def test_imbalance_from_one_to_E_over_k(size):
    E, k = size
    assert routing_metrics(taking_turns(E, k))["imbalance"] == pytest.approx(1)
    logits = torch.zeros(5, E)
    logits[:, :k] = 1
    assert routing_metrics(top_k_gating(logits, k))["imbalance"] == pytest.approx(E / k)


def test_metrics_are_plain_numbers_for_any_shape_also_with_a_gradient():
    routing = TopkRouter(8, 5, top_k=2)(torch.randn(3, 4, 8))
    metrics = routing_metrics(routing)
    assert {name: type(number) for name, number in metrics.items()} == dict.fromkeys(
        ("imbalance", "dropped", "confidence", "entropy"), float)
    assert metrics == pytest.approx(routing_metrics(only(lambda field: field.flatten(0, 1), routing)))
    assert metrics["confidence"] == pytest.approx(routing.confidence.item())
    assert metrics["entropy"] == pytest.approx(routing.entropy.item())


# ---- load_balancing_loss


@given(sizes, st.integers(1, 9), st.integers(0, 1000))
def test_balance_equals_a_slow_loop(size, N, seed):
    E, k = size
    logits = 3 * torch.randn(N, E, generator=torch.Generator().manual_seed(seed))
    routing = top_k_gating(logits, k)
    expected = balance_by_loop(logits.tolist(), routing.chosen.tolist())
    assert_close(load_balancing_loss(routing).item(), expected, rtol=1e-5, atol=0)


@given(sizes, st.integers(1, 3), st.floats(0, 8))
def test_balanced_costs_one_for_every_E_and_k(size, rounds, scale):
    routing = taking_turns(*size, rounds, scale)
    if scale > 2:  # below, ties decide who is chosen; P is uniform or f is, and both give 1
        assert len(set(routing.load.tolist())) == 1
        assert_close(load_balancing_loss(routing), torch.tensor(1.0))
    undecided = top_k_gating(torch.zeros(5, size[0]), size[1])
    assert_close(load_balancing_loss(undecided), torch.tensor(1.0))


@given(sizes)
def test_collapse_costs_E_over_k(size):
    E, k = size
    logits = torch.full((7, E), -1e4)
    logits[:, E - k:] = 0.0
    assert_close(load_balancing_loss(top_k_gating(logits, k)), torch.tensor(E / k))


def test_it_can_be_below_one_where_f_and_P_disagree():
    logits = torch.tensor([[50.0, 0.0]] + 3 * [[0.0, 1e-6]])
    assert_close(load_balancing_loss(top_k_gating(logits, 1)), torch.tensor(7 / 8))


def test_the_choices_count_as_they_were_made_under_noise():
    router = NoisyTopkRouter(6, 5, top_k=2)
    with torch.no_grad():
        router.noise_linear.bias.fill_(3.0)
    routing = router(torch.randn(20, 6))
    clean = top_k_gating(routing.logits, 2)
    assert not torch.equal(routing.chosen, clean.chosen)
    expected = balance_by_loop(routing.logits.tolist(), routing.chosen.tolist())
    assert_close(load_balancing_loss(routing).item(), expected, rtol=1e-5, atol=0)


def test_routers_that_choose_a_varying_number_of_experts_are_scaled_by_the_mean():
    chosen = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)  # 2 on average, each expert once
    routing = Routing(chosen.float(), torch.randn(2, 4), chosen, chosen)
    assert_close(load_balancing_loss(routing), torch.tensor(1.0))


def test_dropping_changes_neither_the_loss_nor_its_gradient():
    logits = (torch.randn(40, 6) + torch.tensor([2.0, 0, 0, 0, 0, 0])).requires_grad_()
    routing = top_k_gating(logits, 2)
    dropped = (routing.chosen.cumsum(dim=0) > 5) & routing.chosen
    assert dropped.any() and not without(routing, dropped).load.equal(routing.load)
    before, after = load_balancing_loss(routing), load_balancing_loss(without(routing, dropped))
    assert torch.equal(before, after)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (before, after)]
    assert torch.equal(*gradients) and gradients[0].any()
    everything = load_balancing_loss(without(routing, torch.ones_like(dropped)))
    assert torch.equal(everything, before)


def test_gradient_equals_finite_differences_with_f_held_fixed():
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    decision = top_k_gating(logits.detach(), 2)
    assert torch.autograd.gradcheck(lambda x: load_balancing_loss(replace(decision, logits=x)), logits)
    f = decision.chosen.double().mean(dim=0)
    gradient, = torch.autograd.grad(load_balancing_loss(top_k_gating(logits, 2)), logits)
    p = logits.detach().softmax(dim=-1)
    by_hand = 5 / 2 / 6 * p * (f - (f * p).sum(dim=-1, keepdim=True))
    assert_close(gradient, by_hand)


def test_descent_lowers_the_favourite_and_lifts_the_idle_for_every_token():
    logits = (torch.randn(30, 5) + torch.tensor([4.0, 0, 0, 0, -20.0])).requires_grad_()
    routing = top_k_gating(logits, 2)
    assert routing.load.argmax() == 0 and routing.load[4] == 0
    load_balancing_loss(routing).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 4] < 0).all()  # although nobody chose it


def test_opposite_layers_are_unfair_each_and_fair_when_pooled():
    left = top_k_gating(torch.tensor([[9.0, 0.0]]).expand(8, 2), 1)
    right = only(lambda field: field.flip(-1), left)
    pooled = Routing(*map(torch.cat, zip(fields(left), fields(right))))
    assert_close(load_balancing_loss(pooled), torch.tensor(1.0))
    assert (load_balancing_loss(left) + load_balancing_loss(right)) / 2 > 1.9


# ---- importance_loss


@given(sizes, st.integers(1, 9), st.integers(0, 1000))
def test_importance_equals_the_statistics_of_the_standard_library(size, N, seed):
    E, k = size
    routing = top_k_gating(torch.randn(N, E, generator=torch.Generator().manual_seed(seed)), k)
    totals = [math.fsum(row[e] for row in routing.gates.tolist()) for e in range(E)]
    expected = statistics.pvariance(totals) / statistics.mean(totals) ** 2
    assert_close(importance_loss(routing).item(), expected, rtol=1e-4, atol=1e-6)


@given(sizes)
def test_equal_importance_costs_nothing_and_one_of_E_costs_E_minus_1(size):
    E, k = size
    assert_close(importance_loss(taking_turns(E, k)), torch.tensor(0.0))
    logits = torch.zeros(6, E)
    logits[:, 0] = 5
    assert_close(importance_loss(top_k_gating(logits, 1)), torch.tensor(E - 1.0))


def test_importance_does_not_see_load_and_balance_does():
    gates = torch.tensor([[1, 2, 0], [1, 2, 0], [1, 0, 2], [1, 0, 2]]) / 3
    logits = gates.clamp(min=0.01).log().requires_grad_()
    routing = top_k_gating(logits, 2)
    assert routing.load.tolist() == [4, 2, 2]
    blind, sees = (torch.autograd.grad(loss(routing), logits, retain_graph=True)[0]
                   for loss in (importance_loss, load_balancing_loss))
    assert_close(importance_loss(routing), torch.tensor(0.0))
    assert blind.abs().max() < 1e-6 and (sees[:, 0] > 0.01).all()


def test_importance_counts_a_dropped_gate_as_nothing():
    routing = taking_turns(4, 1)
    only_one_left = without(routing, ~torch.eye(4, dtype=torch.bool)[:1].expand(4, 4))
    assert_close(importance_loss(only_one_left), torch.tensor(3.0))
    one_of_two = top_k_gating(torch.tensor([[2.0, 1.0, 0.0]]).expand(5, 3), 2)
    lost = one_of_two.chosen & torch.tensor([True, False, False])
    assert_close(importance_loss(without(one_of_two, lost)), torch.tensor(2.0))  # one of three has it all
    totals = one_of_two.gates[0].clone()
    partly = without(one_of_two, lost & (torch.arange(5) < 2)[:, None])
    totals[0] *= 3 / 5
    assert_close(importance_loss(partly), totals.var(correction=0) / totals.mean() ** 2)


def test_importance_gradient_equals_finite_differences():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: importance_loss(top_k_gating(x, 2)), logits)
    first = torch.tensor([[True], [False], [False], [False], [False]])
    assert torch.autograd.gradcheck(lambda x: importance_loss(without(top_k_gating(x, 2), first)), logits)


# ---- router_z_loss


@given(st.integers(1, 9), st.integers(1, 6), st.floats(0.1, 20), st.floats(-50, 50))
def test_z_equals_the_formula_in_float64(E, N, scale, shift):
    logits = scale * torch.randn(N, E, generator=torch.Generator().manual_seed(E)) + shift
    terms = [math.log(math.fsum(math.exp(score) for score in row)) ** 2 for row in logits.tolist()]
    assert_close(router_z_loss(top_k_gating(logits, 1)).item(), math.fsum(terms) / N, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 64))
def test_z_of_zero_logits_is_the_squared_logarithm_of_E(E):
    assert_close(router_z_loss(top_k_gating(torch.zeros(3, E), 1)).item(), math.log(E) ** 2)


def test_z_and_its_gradient_are_finite_for_huge_logits():
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4]], requires_grad=True)
    loss = router_z_loss(top_k_gating(logits, 1))
    loss.backward()
    assert_close(loss.item(), (1e8 + (1e4 - math.log(3)) ** 2) / 2, rtol=1e-5, atol=0)
    assert logits.grad.isfinite().all()


def test_z_gradient_equals_finite_differences_and_pulls_towards_a_sum_of_one():
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: router_z_loss(top_k_gating(x, 2)), logits)
    assert router_z_loss(top_k_gating(logits.log_softmax(dim=-1), 2)) < 1e-20


def test_z_alone_feels_what_all_logits_have_in_common():
    logits = torch.randn(10, 6)
    here, there = top_k_gating(logits, 2), top_k_gating(logits + 30, 2)
    for loss in load_balancing_loss, importance_loss:
        assert_close(loss(here), loss(there), rtol=1e-4, atol=1e-6)
    assert router_z_loss(there) > 30**2 > 10 * router_z_loss(here)


# ---- all three


@pytest.mark.parametrize("loss", LOSSES)
def test_numbers_of_experts_and_order_of_tokens_do_not_matter(loss):
    routing = top_k_gating(torch.randn(12, 6) + torch.arange(6) / 2, 2)
    experts, tokens = torch.randperm(6), torch.randperm(12)
    assert_close(loss(only(lambda field: field[:, experts], routing)), loss(routing))
    assert_close(loss(only(lambda field: field[tokens], routing)), loss(routing))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(24, 5), (4, 6, 5), (2, 3, 4, 5)])
def test_any_shape_may_stand_in_front_and_a_scalar_comes_out(loss, shape):
    routing = top_k_gating(torch.randn(24, 5), 2)
    shaped = loss(only(lambda field: field.reshape(shape), routing))
    assert shaped.shape == ()
    assert_close(shaped, loss(routing))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_transposed_view_is_counted_too(loss):
    routing = top_k_gating(torch.randn(4, 6, 5), 2)
    assert_close(loss(only(lambda field: field.transpose(0, 1), routing)), loss(routing))


@pytest.mark.parametrize("loss", LOSSES)
def test_float32_under_bfloat16_autocast(loss):
    router, x = TopkRouter(16, 6, top_k=2), torch.randn(30, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = loss(router(x))
    assert low.dtype == torch.float32
    assert torch.equal(low, loss(router(x)))
    assert loss(only(lambda field: field.double() if field.is_floating_point() else field, router(x))).dtype == torch.float64


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_reaches_the_router_and_the_record_is_left_alone(loss):
    router = TopkRouter(8, 5, top_k=2)
    routing = router(torch.randn(9, 8))
    copies = [field.clone() for field in fields(routing)]
    loss(routing).backward()
    assert router.linear.weight.grad.any()
    assert all(map(torch.equal, fields(routing), copies))


# ---- in a training


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_collapsed_router_that_descends_ends_balanced(top_k):
    router, x = TopkRouter(16, 8, top_k), torch.randn(1000, 16)
    with torch.no_grad():
        router.linear.bias[:top_k] += 4
    assert routing_metrics(router(x))["imbalance"] > 0.8 * 8 / top_k
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    for _ in range(200):
        loss = load_balancing_loss(router(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert routing_metrics(router(x))["imbalance"] < 1.15
