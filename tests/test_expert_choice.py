"""Lesson 24: what its checks do not cover: brute force, Flaxformer's numbers, whole models, promises of the router."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from classroom.hidden import expert_choice as hidden
from makemoe.checks import expert_choice as checks
from makemoe.checks.expert_choice import taken
from makemoe.dropless import GroupedExperts, stack_weights
from makemoe.expert_choice import ExpertChoiceRouter, expert_choice_gating
from makemoe.gating import TopkRouter
from makemoe.generation import generate
from makemoe.losses import load_balancing_loss
from makemoe.model import ROUTERS, MoEConfig, SparseMoELanguageModel
from makemoe.sparse_moe import Experts, SparseMoE


@pytest.mark.parametrize("those", [checks, hidden], ids=["visible", "hidden"])
def test_checks(those):
    those.check_expert_choice_gating(expert_choice_gating)
    those.check_expert_choice_router(ExpertChoiceRouter)


@given(B=st.integers(1, 3), T=st.integers(1, 12), E=st.integers(1, 6), grid=st.booleans(), data=st.data())
def test_no_token_is_left_out_that_is_better_than_one_taken(B, T, E, grid, data):
    capacity = data.draw(st.integers(0, T))
    logits = torch.randn(B, T, E)
    logits = logits.round() if grid else logits  # whole numbers: many equals
    routing = expert_choice_gating(logits, capacity)
    S = logits.softmax(dim=-1)
    assert (routing.chosen.sum(dim=-2) == capacity).all()
    assert torch.equal(routing.gates, torch.where(routing.chosen, S, 0))
    worst = S.masked_fill(~routing.chosen, math.inf).amin(dim=-2)  # (B, E)
    best_left = S.masked_fill(routing.chosen, -1).amax(dim=-2)
    assert (worst >= best_left).all()
    assert torch.equal(routing.chosen, taken(logits, capacity)[1])


class Given(torch.Tensor):
    "Probabilities that stand where a softmax would put them."

    def softmax(self, dim):
        return self.as_subclass(torch.Tensor)


# google/flaxformer, architectures/moe/routing_test.py, test_experts_choose_mask_router: (slots, router_probs * 2048 of
# each group, experts that take each token). They are rounded to bfloat16; of equals the lowest token is taken.
FLAXFORMER = [
    (2, [[[1016, 1032], [1012, 1032], [1020, 1032], [1012, 1032]],
         [[1020, 1032], [1012, 1032], [1012, 1040], [1008, 1040]]],
     [[[0, 1], [1], [0], []], [[0], [0], [1], [1]]]),
    # test_routers_ignore_padding: probabilities of padding are multiplied by 0
    (1, [[[0, 0], [1032, 1020], [1032, 1020], [0, 0], [1032, 1020], [1032, 1020]],
         [[0, 0], [1032, 1012], [1032, 1020], [0, 0], [1032, 1012], [0, 0]]],
     [[[], [0, 1], [], [], [], []], [[], [0], [1], [], [], []]]),
]


@pytest.mark.parametrize("capacity, probs, experts", FLAXFORMER)
def test_flaxformer_takes_the_same(capacity, probs, experts):
    probs = torch.tensor(probs) / 2048  # (G, T, E)
    routing = expert_choice_gating(probs.as_subclass(Given), capacity)
    assert [[row.nonzero().flatten().tolist() for row in group] for group in routing.kept] == experts
    assert torch.equal(routing.gates, torch.where(routing.kept, probs, 0))


def test_gradient_equals_finite_differences():
    logits = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: expert_choice_gating(x, 3).gates, logits)


def test_relabelling_experts_and_reordering_tokens_permutes_the_answer():
    logits, experts, tokens = torch.randn(3, 10, 5), torch.randperm(5), torch.randperm(10)
    gates = expert_choice_gating(logits, 4).gates
    assert_close(expert_choice_gating(logits[:, tokens][..., experts], 4).gates, gates[:, tokens][..., experts])


def test_one_token_can_have_all_experts_and_another_none_only_if_they_are_equal():
    assert expert_choice_gating(torch.zeros(3, 4), 1).chosen.sum(dim=-1).tolist() == [4, 0, 0]
    counts = expert_choice_gating(torch.randn(2000, 4, 3), 2).chosen.sum(dim=-1)
    assert not ((counts == 3).any(dim=-1) & (counts == 0).any(dim=-1)).any()


@given(T=st.integers(1, 40), E=st.integers(1, 9), data=st.data())
def test_tokens_have_at_most_top_k_experts_on_average_unless_there_are_too_few(T, E, data):
    k = data.draw(st.integers(1, E))
    routing = ExpertChoiceRouter(4, E, k)(torch.randn(2, T, 4))
    share = max(T * k // E, 1)
    assert routing.load.tolist() == [2 * share] * E
    assert routing.kept.sum() <= 2 * T * k or T * k < E


@pytest.mark.parametrize("T", [4, 5, 7, 30])
def test_loop_and_grouped_experts_agree(T):
    loop, grouped = Experts(8, 6, 12), GroupedExperts(8, 6, 12, top_k=2)
    grouped.load_state_dict(stack_weights(loop))
    router, x = ExpertChoiceRouter(6, 8, 2), torch.randn(3, T, 6)
    (one, routing), (two, _) = (SparseMoE(router, experts)(x) for experts in (loop, grouped))
    assert_close(one, two)
    none = ~routing.kept.any(dim=-1)
    assert (one[none] == 0).all() and (T < 30 or none.any() and (routing.kept.sum(dim=-1) > 2).any())


def test_the_balance_loss_is_one_and_has_no_gradient():
    logits = torch.randn(2, 12, 4, requires_grad=True)
    loss = load_balancing_loss(expert_choice_gating(logits, 6))
    assert_close(loss, torch.tensor(1.0))
    assert_close(torch.autograd.grad(loss, logits)[0], torch.zeros(2, 12, 4))


@pytest.mark.parametrize("top_k", [0, 5])
def test_impossible_top_k_is_refused(top_k):
    with pytest.raises(ValueError, match=f"^top_k is {top_k}, but must lie between 1 and num_experts = 4$"):
        ExpertChoiceRouter(8, 4, top_k)


def test_sequences_do_not_see_each_other_but_tokens_see_later_ones():
    router, x = ExpertChoiceRouter(8, 4, 2), torch.randn(50, 12, 8)
    assert torch.equal(router(x).gates[:7], router(x[:7]).gates)
    other = torch.cat([x[:, :-1], torch.randn(50, 1, 8)], dim=1)
    changed = (router(x).chosen != router(other).chosen)[:, :-1].any(dim=-1)
    assert changed.any(dim=0).all(), "the last token moves choices at every earlier position"


def test_the_model_takes_it_by_name_learns_and_refuses_to_write():
    assert ROUTERS["expert_choice"] is ExpertChoiceRouter and issubclass(ExpertChoiceRouter, TopkRouter)
    config = MoEConfig.laptop(vocab_size=9, block_size=8, n_embd=16, n_head=2, n_layer=2, n_hidden=8, num_experts=4,
                              router="expert_choice")
    model, ids = SparseMoELanguageModel(config), torch.randint(9, (3, 9))
    output = model(ids[:, :-1], ids[:, 1:])
    output.loss.backward()
    assert all(block.moe.router.linear.weight.grad.any() for block in model.blocks)
    assert all(routing.load.tolist() == [12] * 4 for routing in output.routings)
    assert model(ids[:, :1]).routings[0].kept.all(), "a single token: each of four experts takes it, k = 2 or not"
    with pytest.raises(ValueError, match="^ExpertChoiceRouter .*$"):
        generate(model, ids[:, :4], 2)
    with pytest.raises(ValueError, match="^.*expert_choice.*capacity_factor.*$"):
        MoEConfig(router="expert_choice", capacity_factor=1.25)
