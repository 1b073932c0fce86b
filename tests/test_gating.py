"""Lesson 04. The checks, and properties for any size; the oracle is a loop over single tokens without topk or masks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import classroom.hidden.gating as hidden
import makemoe.checks.gating as checks
from makemoe.experts import Expert
from makemoe.gating import Routing, TopkRouter, top_k_gating


@pytest.mark.parametrize("place", [checks, hidden])
def test_the_module_passes_the_checks_of_the_lesson(place):
    place.check_routing(Routing)
    place.check_top_k_gating(top_k_gating)
    place.check_topk_router(TopkRouter)


def gates_of_one_token(logits, k):
    winners = sorted(range(len(logits)), key=lambda e: logits[e], reverse=True)[:k]
    total = sum(math.exp(logits[e]) for e in winners)
    return [math.exp(logits[e]) / total if e in winners else 0.0 for e in range(len(logits))]


@given(shape=st.lists(st.integers(1, 4), max_size=3), E=st.integers(1, 9), data=st.data())
def test_gates_equal_the_loop_for_any_shape(shape, E, data):
    k = data.draw(st.integers(1, E))
    logits = 3 * torch.randn(*shape, E, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 1000))))
    routing = top_k_gating(logits, k)
    expected = torch.tensor([gates_of_one_token(row, k) for row in logits.view(-1, E).tolist()])
    assert_close(routing.gates, expected.view(*shape, E))
    assert (routing.chosen.sum(-1) == k).all()
    assert torch.equal(routing.gates > 0, routing.chosen)


def test_huge_logits_stay_finite():
    gates = top_k_gating(torch.tensor([[1e30, 1e30, -1e30], [-1e30, -1e30, -1e30]]), 2).gates
    assert_close(gates.sum(-1), torch.ones(2))


def test_relabelling_experts_permutes_the_answer():
    logits, order = torch.randn(10, 8), torch.randperm(8)
    assert_close(top_k_gating(logits[:, order], 3).gates, top_k_gating(logits, 3).gates[:, order])


def test_gradient_equals_finite_differences():
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: top_k_gating(x, 3).gates, logits)


def test_with_one_expert_per_token_the_gradient_is_exactly_zero():
    logits = torch.randn(20, 6, requires_grad=True)
    (top_k_gating(logits, 1).gates * torch.randn(20, 6)).sum().backward()
    assert not logits.grad.any()


def test_confidence_and_entropy_at_their_ends():
    nothing = torch.zeros(4, 8, dtype=torch.bool)
    undecided = Routing(nothing.float(), torch.zeros(4, 8), nothing, nothing)
    certain = Routing(nothing.float(), 1e4 * torch.eye(8)[:4], nothing, nothing)
    assert_close(undecided.confidence, torch.tensor(1 / 8))
    assert_close(undecided.entropy, torch.tensor(math.log(8)))
    assert_close(certain.confidence, torch.tensor(1.0))
    assert_close(certain.entropy, torch.tensor(0.0))


def test_entropy_equals_that_of_torch_distributions():
    logits = 4 * torch.randn(3, 4, 5)
    routing = top_k_gating(logits, 2)
    assert_close(routing.entropy, torch.distributions.Categorical(logits=logits).entropy().mean())
    assert_close(routing.probs, logits.softmax(-1))


def test_a_decision_cannot_be_edited():
    with pytest.raises(AttributeError):
        top_k_gating(torch.randn(2, 3), 1).kept = None


def test_router_treats_each_token_alone():
    router, x = TopkRouter(16, 8, top_k=2), torch.randn(2, 5, 16)
    alone = torch.stack([torch.stack([router(token).gates for token in row]) for row in x])
    assert_close(router(x).gates, alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_router_of_any_type_is_trained_and_its_gates_weigh_answers_of_that_type(dtype):
    router, expert, x = TopkRouter(16, 8, top_k=2).to(dtype), Expert(16, 8).to(dtype), torch.randn(5, 16).to(dtype)
    routing = router(x)
    assert routing.logits.dtype == routing.gates.dtype == torch.float32
    (routing.gates * torch.arange(8) * expert(x).sum(-1, keepdim=True)).sum().backward()
    assert router.linear.weight.grad.dtype == dtype and router.linear.weight.grad.any()


@pytest.mark.parametrize("top_k", [0, 9])
def test_impossible_top_k_is_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k is {top_k}, but must lie between 1 and num_experts = 8"):
        TopkRouter(16, 8, top_k)
