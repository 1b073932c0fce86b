"""Lesson 26: the checks, and what is too heavy for them. Oracles: soft-mixture-of-experts and soft-moe-pytorch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import classroom.hidden.soft_moe as hidden
import makemoe.checks.soft_moe as checks
from makemoe.generation import generate
from makemoe.model import MoEConfig, SparseMoELanguageModel
from makemoe.soft_moe import SoftMoE, soft_dispatch


@pytest.mark.parametrize("place", [checks, hidden])
def test_the_module_passes_the_checks_of_the_lesson(place):
    place.check_soft_dispatch(soft_dispatch)
    place.check_soft_moe(SoftMoE)


# ---- the rule


@given(st.integers(1, 6), st.integers(1, 7), st.sampled_from([1e-3, 1.0, 1e4]), st.integers(0, 1000))
def test_both_matrices_are_shares(T, S, size, seed):
    logits = size * torch.randn(2, T, S, generator=torch.Generator().manual_seed(seed))
    dispatch, combine = soft_dispatch(logits)
    assert_close(dispatch.sum(dim=-2), torch.ones(2, S))
    assert_close(combine.sum(dim=-1), torch.ones(2, T))
    assert (dispatch >= 0).all() and (combine >= 0).all()


def test_gradients_equal_finite_differences():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(soft_dispatch, logits)


# ---- the layer


def layer_and_tokens(normalize=True, T=7):
    torch.manual_seed(1)
    return SoftMoE(8, 3, 2, n_hidden=12, normalize=normalize, scale=4.0), torch.randn(2, T, 8)


@pytest.mark.parametrize("normalize", [True, False])
def test_shuffling_tokens_shuffles_the_answers(normalize):
    layer, x = layer_and_tokens(normalize)
    order = torch.randperm(7)
    assert_close(layer(x[:, order]), layer(x)[:, order])


def test_relabelling_experts_with_their_columns_changes_nothing():
    layer, x = layer_and_tokens()
    other, order = layer_and_tokens()[0], [2, 0, 1]
    other.phi.data = layer.phi.data[:, order]
    for e, old in enumerate(order):
        other.experts[e].load_state_dict(layer.experts[old].state_dict())
    assert_close(other(x), layer(x))


def test_the_length_of_tokens_moves_the_slots_and_not_the_scores():
    layer, x = layer_and_tokens()
    assert_close(layer.logits(9 * x), layer.logits(x))
    slots = soft_dispatch(layer.logits(x))[0].mT @ x
    for factor in 1, 9:
        assert_close(torch.cat(checks.inputs_of(layer, factor * x[0])), factor * slots[0])


def test_a_sequence_ignores_its_neighbours_and_a_token_ignores_nobody():
    layer, x = layer_and_tokens()
    assert_close(layer(x)[1], layer(x[1]))
    changed = x.clone()
    changed[0, -1] += 1
    moved = (layer(changed) - layer(x)).abs().amax(dim=-1)
    assert (moved[0] > 1e-6).all() and not moved[1].any()


def test_a_token_of_zeros_has_a_finite_gradient():
    layer, x = layer_and_tokens()
    x[0, 0] = 0
    layer(x.requires_grad_()).sum().backward()
    assert x.grad.isfinite().all()


def test_every_weight_gets_a_gradient_also_with_fewer_tokens_than_experts():
    layer, x = layer_and_tokens(T=2)
    layer(x).square().sum().backward()
    assert all(weight.grad.any() for weight in layer.parameters())


def test_dropout_only_in_training():
    layer = SoftMoE(8, 3, 2, dropout=0.5)
    x = torch.randn(4, 8)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_a_model_with_it_refuses_to_generate():
    model = SparseMoELanguageModel(MoEConfig.laptop(vocab_size=9, n_layer=1, n_embd=16, n_head=2, n_hidden=16))
    model.blocks[0].moe = SoftMoE(16, 2, 2)
    with pytest.raises(ValueError, match="SoftMoE needs later tokens"):
        generate(model, torch.zeros(1, 3, dtype=torch.long), 2)


# ---- the packages


class LinearExpert(nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x):
        return x @ self.weight + self.bias


def linear_pair(package, normalize):
    "Our layer and the package's, with the same linear experts: it has no hidden layer."
    torch.manual_seed(1)
    theirs, ours = package(8, 8, 3, 2), SoftMoE(8, 3, 2, normalize=normalize, scale=3.0)
    ours.experts = nn.ModuleList(map(LinearExpert, theirs.experts.weight, theirs.experts.bias))
    return ours, theirs


def test_it_equals_soft_mixture_of_experts():
    package = pytest.importorskip("soft_mixture_of_experts.soft_moe", reason="pip install .[dev]").SoftMoE
    ours, theirs = linear_pair(package, normalize=False)
    theirs.phi.data, x = ours.phi.data, torch.randn(2, 7, 8)
    assert_close(ours(x), theirs(x))


def test_on_tokens_of_length_one_the_normalised_layer_equals_soft_mixture_of_experts():
    package = pytest.importorskip("soft_mixture_of_experts.soft_moe", reason="pip install .[dev]").SoftMoE
    ours, theirs = linear_pair(package, normalize=True)
    theirs.phi.data, x = 3 * F.normalize(ours.phi.data, dim=0), F.normalize(torch.randn(2, 7, 8), dim=-1)
    assert_close(ours(x), theirs(x))


def test_it_equals_soft_moe_pytorch_on_tokens_that_are_normed_before():
    package = pytest.importorskip("soft_moe_pytorch", reason="pip install .[dev]").SoftMoE
    torch.manual_seed(1)
    theirs, x = package(dim=8, num_experts=3, num_slots=2), torch.randn(2, 7, 8)
    theirs.norm.gamma.data, theirs.slot_norm.gamma.data = torch.rand(8) + 0.5, torch.rand(8) + 0.5
    ours = SoftMoE(8, 3, 2, activation="gelu", normalize=False)
    ours.phi.data = theirs.slot_norm(theirs.slot_embeds).permute(2, 0, 1).detach()  # (C, E, P)
    for mine, its in zip(ours.experts, theirs.experts.experts):
        mine.up.load_state_dict(its[0].state_dict())
        mine.down.load_state_dict(its[3].state_dict())
    assert_close(ours(theirs.norm(x)), theirs(x))


def test_what_soft_moe_pytorch_does_without_slots():
    package = pytest.importorskip("soft_moe_pytorch", reason="pip install .[dev]").SoftMoE
    assert not package(dim=8, seq_len=6, num_experts=8)(torch.randn(2, 6, 8)).any()
    with pytest.raises(ValueError, match="slots is 0"):
        SoftMoE(8, 8, slots=6 // 8)
