"""Lesson 20: what its checks do not cover. PyTorch's mixtures, finite differences, relations, a small training."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.nn import functional as F
from torch.testing import assert_close

from classroom.hidden import local_experts as hidden
from makemoe.checks import local_experts as checks
from makemoe.checks.local_experts import case
from makemoe.gating import TopkRouter, top_k_gating
from makemoe.local_experts import competitive_loss, cooperative_loss, log_joint, responsibilities
from makemoe.sparse_moe import Experts, SparseMoE

sizes = st.tuples(st.integers(1, 7), st.integers(1, 6), st.integers(1, 4))  # N, E, D


def expected_loss(gates, answers, targets):
    return competitive_loss(gates, answers, targets, mixture=False)


each = pytest.mark.parametrize("loss", [cooperative_loss, expected_loss, competitive_loss])


@pytest.mark.parametrize("those", [checks, hidden], ids=["visible", "hidden"])
def test_checks(those):
    those.check_cooperative_loss(cooperative_loss)
    those.check_responsibilities(responsibilities)
    those.check_competitive_loss(competitive_loss)


# ---- independent oracles


@given(sizes)
def test_density_and_posterior_of_pytorchs_mixture(size):
    N, E, D = size
    gates, answers, targets = (tensor.double() for tensor in case(N, E, D=D))
    gaussians = Independent(Normal(answers, 1.0), 1)
    mixture = MixtureSameFamily(Categorical(gates), gaussians)
    constant = D / 2 * torch.tensor(2 * torch.pi).log().double()
    assert_close(competitive_loss(gates, answers, targets), -mixture.log_prob(targets).mean() - constant)
    joint = gates * gaussians.log_prob(targets.unsqueeze(-2)).exp()
    assert_close(responsibilities(gates, answers, targets), joint / joint.sum(dim=-1, keepdim=True))
    assert_close(log_joint(gates, answers, targets), joint.log() + constant)


@each
def test_finite_differences(loss):
    given = [tensor.detach().double().requires_grad_() for tensor in case(3, 4)]
    assert torch.autograd.gradcheck(loss, given)


def test_finite_differences_of_responsibilities():
    given = [tensor.detach().double().requires_grad_() for tensor in case(3, 4)]
    assert torch.autograd.gradcheck(responsibilities, given)


def test_the_papers_derivatives():
    gates, answers, targets = case(6, 4)
    answers.requires_grad_()
    off, r = targets.unsqueeze(-2) - answers, responsibilities(gates, answers, targets)
    together = (targets - (gates.unsqueeze(-1) * answers).sum(dim=-2)).unsqueeze(-2)
    for loss, wanted in [(cooperative_loss, -2 * gates.unsqueeze(-1) * together),
                         (expected_loss, -2 * gates.unsqueeze(-1) * off),  # eq. 1.4
                         (competitive_loss, -r.unsqueeze(-1) * off)]:  # eq. 1.5
        gradient, = torch.autograd.grad(6 * loss(gates, answers, targets), answers)
        assert_close(gradient, wanted)


# ---- relations


@given(sizes)
def test_spread_and_order_of_the_three(size):
    N, E, D = size
    gates, answers, targets = (tensor.double() for tensor in case(N, E, D=D, spread=3.0))
    first, second, third = (loss(gates, answers, targets) for loss in (cooperative_loss, expected_loss,
                                                                       competitive_loss))
    blend = (gates.unsqueeze(-1) * answers).sum(dim=-2, keepdim=True)
    assert_close(second - first, (gates * (answers - blend).square().sum(dim=-1)).sum(dim=-1).mean())
    assert third <= second / 2 + 1e-9


@given(sizes)
def test_one_gate_of_1_leaves_no_difference(size):
    N, E, D = size
    gates, answers, targets = case(N, E, D=D)
    single = F.one_hot(gates.argmax(dim=-1), E).float()
    first = cooperative_loss(single, answers, targets)
    assert_close(expected_loss(single, answers, targets), first)
    assert_close(2 * competitive_loss(single, answers, targets), first)


@each
def test_numbers_of_experts_and_order_of_cases_do_not_matter(loss):
    gates, answers, targets = case(9, 5)
    experts, cases = torch.randperm(5), torch.randperm(9)
    moved = gates[cases][:, experts], answers[cases][:, experts], targets[cases]
    assert_close(loss(*moved), loss(gates, answers, targets))


@each
def test_topk_gates_count_the_chosen_alone_and_the_router_learns(loss):
    logits = torch.randn(8, 6, requires_grad=True)
    routing = top_k_gating(logits, 2)
    _, answers, targets = case(8, 6)
    answers[~routing.chosen] = 1e6  # nobody asks these
    both = routing.chosen.nonzero()[:, 1].view(8, 2)
    alone = loss(routing.gates.gather(1, both), answers[torch.arange(8)[:, None], both], targets)
    together = loss(routing.gates, answers, targets)
    assert_close(together, alone)
    gradient, = torch.autograd.grad(together, logits)
    assert gradient.isfinite().all() and gradient[routing.chosen].any() and not gradient[~routing.chosen].any()


def test_the_sparse_layer_trains_by_the_cooperative_loss():
    moe, x, targets = SparseMoE(TopkRouter(6, 4, 2), Experts(4, 6, 8)), torch.randn(10, 6), torch.randn(10, 6)
    y, routing = moe(x)
    ours = (targets - y).square().sum(dim=-1).mean()
    answers = torch.stack([expert(x) for expert in moe.experts], dim=-2)
    theirs = cooperative_loss(routing.gates, answers, targets)
    assert_close(ours, theirs)
    weights = list(moe.parameters())
    for one, other in zip(*(torch.autograd.grad(loss, weights, retain_graph=True) for loss in (ours, theirs))):
        assert_close(one, other)


def test_with_equal_gates_only_the_mixture_divides():
    x = torch.linspace(-2, 2, 40)[:, None]
    targets, gates = 2 * x.abs(), torch.full((40, 2), 0.5)
    apart, nearest = {}, {}
    for loss in cooperative_loss, expected_loss, competitive_loss:
        experts = torch.tensor([[0.3, -0.3], [0.1, 0.0]], requires_grad=True)  # slopes and biases of two experts
        optimizer = torch.optim.Adam([experts], lr=0.05)
        for _ in range(150):
            answers = (F.pad(x, (0, 1), value=1.0) @ experts).unsqueeze(-1)
            optimizer.zero_grad()
            loss(gates, answers, targets).backward()
            optimizer.step()
        apart[loss] = (experts[0, 0] - experts[0, 1]).abs().item()
        nearest[loss] = (targets.unsqueeze(-2) - answers).square().amin(dim=-2).mean().item()
    assert apart[expected_loss] < 0.05 and abs(apart[cooperative_loss] - 0.6) < 0.01 < apart[competitive_loss] - 2
    assert nearest[competitive_loss] < 0.2 * min(nearest[expected_loss], nearest[cooperative_loss])
