"""Lesson 08: what its checks do not cover. Any size, finite differences, other systems' numbers, a training."""

import math
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from classroom.hidden import losses as hidden
from makemoe.checks import losses as checks
from makemoe.checks.losses import balance_by_loop, without
from makemoe.gating import Routing, TopkRouter, top_k_gating
from makemoe.losses import imbalance, importance_loss, load_balancing_loss, router_z_loss, routing_metrics
from makemoe.noisy_gating import NoisyTopkRouter

each_loss = pytest.mark.parametrize("loss", [load_balancing_loss, importance_loss, router_z_loss])
sizes = st.tuples(st.integers(1, 8), st.integers(1, 8)).map(lambda pair: (max(pair), min(pair)))  # E, k with k <= E


@pytest.mark.parametrize("those", [checks, hidden], ids=["visible", "hidden"])
def test_checks(those):
    those.check_load_balancing_loss(load_balancing_loss)
    those.check_importance_loss(importance_loss)
    those.check_router_z_loss(router_z_loss)
    those.check_routing_metrics(routing_metrics)


def only(tokens, routing):
    "The routing with its tokens selected, ordered or reshaped by `tokens`, a function of one field."
    return Routing(*map(tokens, (routing.gates, routing.logits, routing.chosen, routing.kept)))


def taking_turns(E, k, rounds=1, scale=4.0):
    "A routing in which every expert is chosen equally often, by tokens that mean it."
    wishes = torch.zeros(rounds * E, E)
    for t in range(rounds * E):
        for rank in range(k):
            wishes[t, (t + rank) % E] = scale - rank / E
    return top_k_gating(wishes, k)


# ---- imbalance and routing_metrics


@pytest.mark.parametrize("load, expected", [
    ([[3, 3, 3]], [1]), ([[8, 0, 0, 0], [2, 1, 1, 0]], [4, 2]), ([[0, 0]], [0]), ([[1, 2, 0]], [2]), ([], [])])
def test_imbalance_of_loads_by_hand(load, expected):
    assert imbalance(load) == expected


@given(sizes)
def test_imbalance_from_one_to_E_over_k(size):
    E, k = size
    assert routing_metrics(taking_turns(E, k))["imbalance"] == 1
    logits = torch.zeros(5, E)
    logits[:, :k] = 1
    assert routing_metrics(top_k_gating(logits, k))["imbalance"] == pytest.approx(E / k)


# ---- load_balancing_loss


@given(sizes, st.integers(1, 9), st.integers(0, 1000))
def test_balance_equals_a_slow_loop(size, N, seed):
    E, k = size
    routing = top_k_gating(3 * torch.randn(N, E, generator=torch.Generator().manual_seed(seed)), k)
    expected = balance_by_loop(routing.logits, routing.chosen)
    assert_close(load_balancing_loss(routing).item(), expected, rtol=1e-5, atol=0)


@given(sizes, st.integers(1, 3), st.floats(0, 8))
def test_balanced_costs_one_and_collapse_E_over_k(size, rounds, scale):
    E, k = size
    if scale > 2:  # below, ties decide who is chosen; P is uniform or f is, and both give 1
        assert_close(load_balancing_loss(taking_turns(E, k, rounds, scale)), torch.tensor(1.0))
    assert_close(load_balancing_loss(top_k_gating(torch.zeros(5, E), k)), torch.tensor(1.0))
    logits = torch.full((7, E), -1e4)
    logits[:, E - k:] = 0.0
    assert_close(load_balancing_loss(top_k_gating(logits, k)), torch.tensor(E / k))


def test_it_can_be_below_one_where_f_and_P_disagree():
    logits = torch.tensor([[50.0, 0.0]] + 3 * [[0.0, 1e-6]])
    assert_close(load_balancing_loss(top_k_gating(logits, 1)), torch.tensor(7 / 8))


def test_the_choices_of_a_noisy_router_count_as_they_were_made():
    router = NoisyTopkRouter(6, 5, top_k=2)
    with torch.no_grad():
        router.noise_linear.bias.fill_(3.0)
    routing = router(torch.randn(20, 6))
    assert not torch.equal(routing.chosen, top_k_gating(routing.logits, 2).chosen)
    expected = balance_by_loop(routing.logits, routing.chosen)
    assert_close(load_balancing_loss(routing).item(), expected, rtol=1e-5, atol=0)


def test_gradient_equals_finite_differences_with_f_held_fixed():
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    decision = top_k_gating(logits.detach(), 2)
    assert torch.autograd.gradcheck(lambda x: load_balancing_loss(replace(decision, logits=x)), logits)
    f = decision.chosen.double().mean(dim=0)
    gradient, = torch.autograd.grad(load_balancing_loss(top_k_gating(logits, 2)), logits)
    p = logits.detach().softmax(dim=-1)
    assert_close(gradient, 5 / 2 / 6 * p * (f - (f * p).sum(dim=-1, keepdim=True)))


def test_descent_lowers_the_busiest_and_lifts_the_idle_for_every_token():
    logits = (torch.randn(30, 5) + torch.tensor([4.0, 0, 0, 0, -20.0])).requires_grad_()
    routing = top_k_gating(logits, 2)
    assert routing.load.argmax() == 0 and routing.load[4] == 0
    load_balancing_loss(routing).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 4] < 0).all()


# ---- importance_loss


@given(sizes, st.integers(1, 9), st.integers(0, 1000))
def test_importance_equals_the_statistics_of_the_standard_library(size, N, seed):
    E, k = size
    routing = top_k_gating(torch.randn(N, E, generator=torch.Generator().manual_seed(seed)), k)
    totals = [math.fsum(row[e] for row in routing.gates.tolist()) for e in range(E)]
    expected = statistics.pvariance(totals) / statistics.mean(totals) ** 2
    assert_close(importance_loss(routing).item(), expected, rtol=1e-4, atol=1e-6)


def test_importance_does_not_see_load_and_balance_does():
    gates = torch.tensor([[1, 2, 0], [1, 2, 0], [1, 0, 2], [1, 0, 2]]) / 3
    logits = gates.clamp(min=0.01).log().requires_grad_()
    routing = top_k_gating(logits, 2)
    assert routing.load.tolist() == [4, 2, 2]
    blind, sees = (torch.autograd.grad(loss(routing), logits, retain_graph=True)[0]
                   for loss in (importance_loss, load_balancing_loss))
    assert_close(importance_loss(routing), torch.tensor(0.0))
    assert blind.abs().max() < 1e-6 and (sees[:, 0] > 0.01).all()


def test_importance_gradient_equals_finite_differences_also_after_dropping():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: importance_loss(top_k_gating(x, 2)), logits)
    best = torch.zeros(5, 4, dtype=torch.bool)
    best[0, logits[0].argmax()] = True  # one of the two choices of token 0
    assert torch.autograd.gradcheck(lambda x: importance_loss(without(top_k_gating(x, 2), best)), logits)


# ---- router_z_loss


@given(st.integers(1, 9), st.integers(1, 6), st.floats(0.1, 20), st.floats(-50, 50))
def test_z_equals_the_formula_in_float64(E, N, scale, shift):
    logits = scale * torch.randn(N, E, generator=torch.Generator().manual_seed(E)) + shift
    terms = [math.log(math.fsum(math.exp(score) for score in row)) ** 2 for row in logits.tolist()]
    assert_close(router_z_loss(top_k_gating(logits, 1)).item(), math.fsum(terms) / N, rtol=1e-4, atol=1e-5)


def test_z_gradient_equals_finite_differences_and_rests_where_exponentials_sum_to_one():
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: router_z_loss(top_k_gating(x, 2)), logits)
    assert router_z_loss(top_k_gating(logits.log_softmax(dim=-1), 2)) < 1e-20


def test_z_alone_depends_on_what_all_logits_have_in_common():
    logits = torch.randn(10, 6)
    here, there = top_k_gating(logits, 2), top_k_gating(logits + 30, 2)
    for loss in load_balancing_loss, importance_loss:
        assert_close(loss(here), loss(there), rtol=1e-4, atol=1e-6)
    assert router_z_loss(there) > 30**2 > 10 * router_z_loss(here)


# ---- numbers of google/flaxformer, architectures/moe/routing_test.py


def test_balance_of_flaxformer():
    probs = torch.tensor([[0.35490513, 0.60419905], [0.4275843, 0.23061597], [0.32985854, 0.43953657],
                          [0.25099766, 0.27730572], [0.7678207, 0.71474564]])  # they do not sum to 1
    chosen = torch.tensor([[True, False], [False, True], [False, True], [True, False], [True, False]])
    record = SimpleNamespace(logits=probs, probs=probs, chosen=chosen)
    assert_close(load_balancing_loss(record), torch.tensor(0.8741045))


def test_z_of_flaxformer():
    logits = torch.tensor([
        [-4.2124424, 3.891939, -3.6481273, 1.8849981], [0.32625437, 2.918651, 0.84758997, -4.556842],
        [-3.32062, 4.6977115, -0.15439987, 0.44086337], [3.4467149, 4.3436565, -4.7224274, -4.264637],
        [-2.224406, -2.5318158, -1.3832569, 1.1891162], [-2.320062, -0.44705987, 4.289819, -0.0066268444],
        [0.99470854, -0.6992364, 0.25503993, 4.2952085], [3.5937333, -3.2408535, -4.298278, 4.426601],
        [0.7669008, 2.6588762, 2.4505413, 4.6051874], [0.23330331, -3.0845237, 0.6262374, -2.9865491],
        [0.7595146, -2.1099675, -4.155346, -2.8326452], [2.3771453, 1.004138, -3.1781673, 0.7581556]])
    assert_close(router_z_loss(top_k_gating(logits, 1)), torch.tensor(13.786719))


# ---- all three


@each_loss
def test_numbers_of_experts_order_and_shape_of_tokens_do_not_matter(loss):
    routing = top_k_gating(torch.randn(12, 6) + torch.arange(6) / 2, 2)
    experts, tokens = torch.randperm(6), torch.randperm(12)
    assert_close(loss(only(lambda field: field[tokens][:, experts], routing)), loss(routing))
    for shape in (3, 4, 6), (2, 3, 2, 6):
        assert_close(loss(only(lambda field, shape=shape: field.reshape(shape), routing)), loss(routing))
    batch = only(lambda field: field.view(3, 4, 6), routing)
    assert_close(loss(only(lambda field: field.transpose(0, 1), batch)), loss(routing))


@each_loss
def test_float32_under_bfloat16_autocast_and_a_gradient_for_the_router(loss):
    router, x = TopkRouter(16, 6, top_k=2), torch.randn(30, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = loss(router(x))
    assert low.dtype == torch.float32 and torch.equal(low, loss(router(x)))
    low.backward()
    assert router.linear.weight.grad.any()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_collapsed_router_that_descends_ends_balanced(top_k):
    router, x = TopkRouter(16, 8, top_k), torch.randn(400, 16)
    with torch.no_grad():
        router.linear.bias[:top_k] += 4
    assert routing_metrics(router(x))["imbalance"] > 0.8 * 8 / top_k
    optimizer = torch.optim.Adam(router.parameters(), lr=0.03)
    for _ in range(120):
        optimizer.zero_grad()
        load_balancing_loss(router(x)).backward()
        optimizer.step()
    assert routing_metrics(router(x))["imbalance"] < 1.15
