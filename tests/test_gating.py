"""Lesson 04. The oracle is a loop over single tokens, written without topk, scatter or masks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from makemoe.gating import Routing, TopkRouter, top_k_gating


def gates_of_one_token(logits, k):
    winners = sorted(range(len(logits)), key=lambda e: logits[e], reverse=True)[:k]
    total = sum(math.exp(logits[e]) for e in winners)
    return [math.exp(logits[e]) / total if e in winners else 0.0 for e in range(len(logits))]


@given(T=st.integers(1, 6), E=st.integers(1, 9), data=st.data())
def test_gates_equal_the_loop(T, E, data):
    k = data.draw(st.integers(1, E))
    logits = 3 * torch.randn(T, E, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 1000))))
    expected = torch.tensor([gates_of_one_token(row, k) for row in logits.tolist()])
    assert_close(top_k_gating(logits, k).gates, expected)


@given(shape=st.lists(st.integers(1, 4), max_size=3), E=st.integers(1, 8), data=st.data())
def test_exactly_k_and_sum_to_one_for_any_leading_shape(shape, E, data):
    k = data.draw(st.integers(1, E))
    logits = torch.randn(*shape, E)
    routing = top_k_gating(logits, k)
    assert routing.gates.shape == routing.chosen.shape == routing.kept.shape == logits.shape
    assert (routing.chosen.sum(-1) == k).all()
    assert_close(routing.gates.sum(-1), torch.ones(shape))
    assert torch.equal(routing.gates > 0, routing.chosen)
    assert torch.equal(routing.kept, routing.chosen)
    assert torch.equal(routing.logits, logits)


def test_ties_still_choose_exactly_k():
    routing = top_k_gating(torch.zeros(50, 8), 3)
    assert (routing.chosen.sum(-1) == 3).all()
    assert_close(routing.gates[routing.chosen], torch.full((150,), 1 / 3))


def test_an_expert_may_be_chosen_and_weigh_nothing():
    routing = top_k_gating(torch.tensor([[300.0, 0.0, -300.0], [-300.0, -600.0, 0.0], [-300.0, 0.0, 300.0], [300.0, -300.0, 0.0]]), 2)
    assert routing.chosen.tolist() == [[True, True, False], [True, False, True], [False, True, True], [True, False, True]]
    assert torch.equal(routing.kept, routing.chosen)
    assert_close(routing.gates, torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 1], [1, 0, 0]]))


def test_the_smallest_difference_decides():
    assert top_k_gating(1 + 2**-23 * torch.arange(8), 2).chosen.tolist() == [False] * 6 + [True] * 2


def test_logits_are_left_alone_and_masks_are_bool():
    logits = torch.randn(2, 5, 6)
    before = logits.clone()
    routing = top_k_gating(logits, 2)
    assert torch.equal(logits, before)
    assert routing.chosen.dtype == routing.kept.dtype == torch.bool


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gates_are_of_the_type_of_the_logits(dtype):
    assert top_k_gating(torch.randn(5, 6).to(dtype), 2).gates.dtype == dtype


def test_huge_logits_stay_finite():
    gates = top_k_gating(torch.tensor([[1e30, 1e30, -1e30], [-1e30, -1e30, -1e30]]), 2).gates
    assert_close(gates.sum(-1), torch.ones(2))


def test_gates_ignore_a_constant_added_to_all_logits():
    logits = torch.randn(10, 8, dtype=torch.float64)
    for constant in 5, 1e6, -1e6, -1e6 * torch.arange(10)[:, None]:
        assert_close(top_k_gating(logits + constant, 2).gates, top_k_gating(logits, 2).gates)


def test_relabelling_experts_permutes_the_answer():
    logits, order = torch.randn(10, 8), torch.randperm(8)
    assert_close(top_k_gating(logits[:, order], 3).gates, top_k_gating(logits, 3).gates[:, order])


def test_gradient_reaches_the_logits_of_the_chosen_only():
    logits = torch.randn(20, 6, requires_grad=True)
    routing = top_k_gating(logits, 2)
    (routing.gates * torch.randn(20, 6)).sum().backward()
    assert torch.equal(logits.grad.abs() > 1e-6, routing.chosen)


def test_a_loss_on_the_logits_of_the_record_has_a_gradient():
    logits = torch.randn(20, 6, requires_grad=True)
    top_k_gating(logits, 2).logits.sum().backward()
    assert (logits.grad == 1).all()


def test_gradient_equals_finite_differences():
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: top_k_gating(x, 3).gates, logits)


def test_with_one_expert_per_token_no_gradient_flows():
    logits = torch.randn(20, 6, requires_grad=True)
    gates = top_k_gating(logits, 1).gates
    assert_close(gates, nn.functional.one_hot(logits.argmax(-1), 6).float())
    (gates * torch.randn(20, 6)).sum().backward()
    assert_close(logits.grad, torch.zeros(20, 6), rtol=0, atol=1e-6)


def test_routing_counts_loads_and_drops_over_all_leading_dimensions():
    chosen = torch.tensor([[[1, 1, 0], [1, 0, 1]], [[1, 1, 1], [0, 0, 1]]], dtype=torch.bool)  # (2, 2, 3)
    kept = chosen.clone()
    kept[1, 0, 0] = False
    routing = Routing(chosen.float(), torch.zeros(2, 2, 3), chosen, kept)
    assert routing.load.tolist() == [2, 2, 3] and not routing.load.is_floating_point()
    assert_close(routing.dropped, torch.tensor(1 / 8))
    assert Routing(chosen.float(), torch.zeros(2, 2, 3), chosen, chosen).dropped == 0
    kept[..., 2] = False
    assert Routing(chosen.float(), torch.zeros(2, 2, 3), chosen, kept).load.tolist() == [2, 2, 0]
    many = chosen.expand(2, 100, 2, 2, 3)
    routing = Routing(torch.zeros(many.shape), torch.zeros(many.shape), many, many)
    assert routing.load.tolist() == [600, 400, 600], "also of tokens whose gate was rounded to 0"
    assert_close(routing.entropy, torch.tensor(math.log(3)))
    alone = Routing(*(field[1, 0] for field in (chosen.float(), torch.zeros(2, 2, 3), chosen, chosen)))
    assert alone.load.tolist() == [1, 1, 1] and alone.dropped == 0


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


def test_router_is_a_linear_layer_and_top_k_gating():
    router = TopkRouter(16, 8, top_k=2)
    x = torch.randn(2, 5, 16)
    routing = router(x)
    expected = torch.einsum("btc,ec->bte", x, router.linear.weight) + router.linear.bias
    assert_close(routing.logits, expected)
    assert_close(routing.gates, top_k_gating(expected, 2).gates)


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_router_chooses_as_many_experts_as_it_was_told(top_k):
    assert (TopkRouter(16, 8, top_k)(torch.randn(5, 16)).chosen.sum(-1) == top_k).all()


@pytest.mark.parametrize("shape", [(16,), (1, 16), (1, 1, 16), (2, 1, 5, 16)])
def test_router_keeps_any_leading_shape_and_evaluation_is_no_different(shape):
    router, x = TopkRouter(16, 8, top_k=2), torch.randn(shape)
    routing, evaluated = router(x), router.eval()(x)
    assert routing.gates.shape == routing.logits.shape == (*shape[:-1], 8)
    assert torch.equal(routing.gates, evaluated.gates)


def test_router_treats_each_token_alone():
    router = TopkRouter(16, 8, top_k=2)
    x = torch.randn(2, 5, 16)
    alone = torch.stack([torch.stack([router(token).gates for token in row]) for row in x])
    assert_close(router(x).gates, alone)


def test_router_learns_for_k_of_two_and_so_does_what_comes_before_it():
    router, x = TopkRouter(16, 8, top_k=2), torch.randn(3, 4, 16, requires_grad=True)
    (router(x).gates * torch.randn(8)).sum().backward()
    assert router.linear.weight.grad.any() and router.linear.bias.grad.any()
    assert x.grad.any(dim=-1).all()


def test_router_keeps_float32_under_bfloat16_autocast():
    router, x = TopkRouter(64, 8, top_k=2), torch.randn(50, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x.bfloat16())
    assert routing.logits.dtype == routing.gates.dtype == torch.float32
    assert_close(routing.logits, router(x.bfloat16().float()).logits, rtol=0, atol=0)


@pytest.mark.parametrize("top_k", [0, 9])
def test_impossible_top_k_is_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k is {top_k}, but must lie between 1 and num_experts = 8"):
        TopkRouter(16, 8, top_k)
