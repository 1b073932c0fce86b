"""Lesson 25: the checks, other people's code, and what is too heavy for a check.

CoLT5-attention 0.11.2 and st-moe-pytorch 0.1.8 are test dependencies only: `pip install .[dev]`.
"""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import classroom.hidden.smooth_choice as hidden
import makemoe.checks.smooth_choice as visible
from makemoe.gating import TopkRouter, top_k_gating
from makemoe.model import ROUTERS, MoEConfig, SparseMoELanguageModel
from makemoe.smooth_choice import CoordinateDescentRouter, coordinate_descent, straight_through

EXPORTED = {
    "coordinate_descent": coordinate_descent,
    "straight_through": straight_through,
    "coordinate_descent_router": CoordinateDescentRouter,
}


def optimum(scores, k, epsilon):
    "min(1, exp((s + a) / epsilon)) that sum to k, by bisection of a."
    low, high = -scores.amax(-1, True) - epsilon * math.log(scores.shape[-1]), -scores.amin(-1, True)
    for _ in range(100):
        a = (low + high) / 2
        above = ((scores + a) / epsilon).clamp(max=0).exp().sum(-1, True) > k
        low, high = torch.where(above, low, a), torch.where(above, a, high)
    return ((scores + low) / epsilon).clamp(max=0).exp()


@pytest.mark.parametrize("checks", [visible, hidden])
@pytest.mark.parametrize("name", EXPORTED)
def test_checks(checks, name):
    getattr(checks, f"check_{name}")(EXPORTED[name])


@pytest.mark.parametrize("k, iterations, epsilon, start, decay", [
    (2, 20, 0.1, None, 1.0), (2, 50, 0.1, None, 1.0), (3, 20, 0.03, 4.0, 0.7), (4, 200, 0.01, None, 1.0),
    (2.25, 20, 1.0, None, 1.0), (3, 7, 0.01, 4.0, 0.9), (2, 5, 1.0, 0.5, 0.7),
])
def test_weights_and_gradients_equal_those_of_colt5_attention(k, iterations, epsilon, start, decay):
    theirs = pytest.importorskip("colt5_attention.coor_descent", reason="pip install .[dev]").coor_descent
    scores = torch.randn(4, 6, 12, dtype=torch.float64, requires_grad=True)
    ours = coordinate_descent(scores, k, iterations, epsilon, start, decay)
    want = theirs(scores, n_iters=iterations, k=k, eps=epsilon, eps_init=start, eps_decay=decay)
    assert_close(ours, want, atol=1e-10, rtol=0)
    direction = torch.randn(12, dtype=torch.float64)
    gradients = [torch.autograd.grad((weights * direction).sum(), scores)[0] for weights in (ours, want)]
    assert_close(*gradients, atol=1e-8, rtol=1e-8)
    low = coordinate_descent(scores.float(), k, iterations, epsilon, start, decay)
    assert_close(low.double(), want, atol=2e-5, rtol=0)


def test_straight_through_is_what_colt5_attention_calls_gates():
    topk = pytest.importorskip("colt5_attention", reason="pip install .[dev]").topk
    scores = torch.randn(30, 12, dtype=torch.float64, requires_grad=True)
    theirs = topk(scores, 3, coor_descent_k_ratio=1.0, n_iters=20, eps=0.5)
    chosen = top_k_gating(scores, 3).chosen
    ours = straight_through(chosen, coordinate_descent(scores, 3, 20, 0.5) * chosen)
    assert_close(ours.gather(-1, theirs.indices), theirs.gates, rtol=0, atol=0)
    direction = torch.randn(30, 3, dtype=torch.float64)
    want = torch.autograd.grad((theirs.gates * direction).sum(), scores)[0]
    spread = torch.zeros_like(scores).scatter(-1, theirs.indices, direction)
    assert_close(torch.autograd.grad((ours * spread).sum(), scores)[0], want)


@pytest.mark.parametrize("straight, fine", [(False, True), (True, False)])
def test_st_moe_pytorch_has_the_wrong_gradient_where_it_goes_straight_through(straight, fine):
    MoE = pytest.importorskip("st_moe_pytorch", reason="pip install .[dev]").MoE
    layer = MoE(8, num_experts=4, gating_top_n=2, threshold_train=0.0, threshold_eval=0.0, capacity_factor_train=4.0,
                capacity_factor_eval=4.0, straight_through_dispatch_tensor=straight).double()
    x, direction = torch.randn(2, 2, 6, 8, dtype=torch.float64)
    weight = layer.gate.to_gates.weight
    slope = torch.autograd.grad((layer(x)[0] * direction).sum(), weight)[0]
    measured, start = torch.zeros_like(slope), weight.detach().clone()
    with torch.no_grad():
        for place in range(weight.numel()):
            for sign in (1, -1):
                weight.copy_(start).view(-1)[place] += sign * 1e-6
                measured.view(-1)[place] += sign * (layer(x)[0] * direction).sum() / 2e-6
    error = (slope - measured).norm() / measured.norm()
    assert (error < 1e-6) == fine and (fine or error > 0.05)


def test_gradient_equals_finite_differences():
    scores = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    for settings in ((2, 8, 0.5), (3, 6, 0.3, 2.0, 0.7)):
        assert torch.autograd.gradcheck(lambda s: coordinate_descent(s, *settings), scores)


@pytest.mark.parametrize("epsilon, iterations", [(1.0, 40), (0.3, 60)])
def test_the_iterations_find_the_optimum(epsilon, iterations):
    scores = torch.randn(300, 8, dtype=torch.float64)
    moved = scores - scores.topk(2).values[:, -1:]
    assert_close(coordinate_descent(moved, 2, iterations, epsilon), optimum(scores, 2, epsilon), atol=1e-8, rtol=0)


def test_the_limit_is_hard_top_k():
    scores = torch.randn(300, 8, dtype=torch.float64)
    hard = top_k_gating(scores, 3).chosen.double()
    moved = scores - scores.topk(3).values[:, -1:]
    off = [(coordinate_descent(moved, 3, 60, eps) - hard).abs().mean() for eps in (1.0, 0.1, 0.01, 0.001)]
    assert off == sorted(off, reverse=True) and off[-1] < 1e-3


def test_with_one_expert_the_gates_are_those_of_switch():
    scores = torch.randn(50, 8, dtype=torch.float64)
    moved = scores - scores.amax(dim=-1, keepdim=True)
    assert_close(coordinate_descent(moved, 1, 20, 0.5), (scores / 0.5).softmax(dim=-1))


def test_fifty_iterations_at_a_small_epsilon_sum_to_four_instead_of_three():
    scores = torch.randn(12, generator=torch.Generator().manual_seed(1))
    assert_close(coordinate_descent(scores, 3, 50, epsilon=0.01).sum(), torch.tensor(4.0), atol=0.01, rtol=0)
    scaled = coordinate_descent(scores, 3, 100, epsilon=0.01, epsilon_start=4.0, decay=0.9)
    assert_close(scaled.sum(), torch.tensor(3.0), atol=1e-3, rtol=0)


def test_extreme_scores():
    router = CoordinateDescentRouter(4, 8, 2)
    nn.init.zeros_(router.linear.weight)
    for bias in (1e4 * torch.randn(8), torch.full((8,), 1e4), torch.full((8,), -1e4), torch.zeros(8)):
        router.linear.bias.data = bias
        routing = router(torch.randn(3, 4))
        assert (routing.chosen.sum(-1) == 2).all()
        assert routing.gates.isfinite().all() and (routing.gates.sum(-1) <= 1 + 1e-6).all()


def test_relabelling_the_experts_permutes_the_gates():
    router, other, order = CoordinateDescentRouter(6, 8, 3), CoordinateDescentRouter(6, 8, 3), torch.randperm(8)
    other.linear.weight.data, other.linear.bias.data = router.linear.weight.data[order], router.linear.bias.data[order]
    x = torch.randn(20, 6)
    assert_close(other(x).gates, router(x).gates[:, order])


@pytest.mark.parametrize("experts", ["loop", "grouped"])
@pytest.mark.parametrize("settings", [{}, {"hard": True}, {"epsilon": 0.1, "epsilon_start": 2.0, "iterations": 30}])
def test_the_model_takes_it_and_stays_causal(experts, settings):
    assert issubclass(ROUTERS["coordinate"], TopkRouter)
    config = MoEConfig(n_layer=1, n_embd=16, n_head=2, n_hidden=16, block_size=8, router="coordinate",
                       router_settings=settings, experts=experts, balance_coef=0.0)
    model, ids = SparseMoELanguageModel(config), torch.randint(64, (2, 8))
    before = model(ids, ids)
    before.loss.backward()
    assert model.blocks[0].moe.router.linear.weight.grad.abs().amax(dim=1).count_nonzero() == 8  # every expert's row
    changed = torch.cat([ids[:, :5], (ids[:, 5:] + 1) % 64], dim=1)
    assert_close(model(changed).logits[:, :5], before.logits[:, :5])


def test_the_model_refuses_settings_that_make_no_sense():
    config = MoEConfig(n_embd=16, n_head=2, router="coordinate", router_settings={"epsilon": 0.0})
    with pytest.raises(ValueError, match="epsilon"):
        SparseMoELanguageModel(config)
