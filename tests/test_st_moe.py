"""Lesson 23. The checks, PyTorch's own functions, both kinds of experts, and st-moe-pytorch as an outside oracle."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import classroom.hidden.st_moe as hidden
import makemoe.checks.st_moe as checks
from makemoe.dropless import GroupedExperts, stack_weights
from makemoe.experts import ACTIVATIONS, EXPERTS
from makemoe.gating import TopkRouter
from makemoe.losses import router_z_loss
from makemoe.model import MoEConfig, SparseMoELanguageModel, count_parameters
from makemoe.sparse_moe import Experts, SparseMoE
from makemoe.st_moe import GATED, GatedExpert, SparseMoEBlock, geglu, swiglu


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    "Other tests run lessons and answers in this process, and each of them registers units and experts of its own."
    for name in GATED:
        monkeypatch.setitem(ACTIVATIONS, name, GATED[name])
        monkeypatch.setitem(EXPERTS, name, GatedExpert)


@pytest.mark.parametrize("place", [checks, hidden])
def test_the_module_passes_the_checks_of_the_lesson(place):
    place.check_gated_units(geglu, swiglu)
    place.check_gated_expert(GatedExpert)
    place.check_sparse_moe_block(SparseMoEBlock)


@given(shape=st.lists(st.integers(0, 4), max_size=3), half=st.integers(1, 7))
def test_units_equal_functions_of_pytorch(shape, half):
    gate, value = torch.randn(2, *shape, half)
    x = torch.cat([gate, value], dim=-1)
    assert_close(geglu(x), F.gelu(gate) * value)
    assert_close(swiglu(x), F.silu(gate) * value)
    assert_close(swiglu(x), gate * F.glu(torch.cat([value, gate], dim=-1)))  # PyTorch's glu: the value stands first


@pytest.mark.parametrize("name", GATED)
def test_gradients_equal_finite_differences(name):
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(GATED[name], x)


def test_two_gated_units_multiply_exactly():
    expert = GatedExpert(2, 2, bias=False).double()
    with torch.no_grad():
        expert.up.weight.copy_(torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]]))
        expert.down.weight.copy_(torch.tensor([[1, 1], [0, 0]]))
    x = 5 * torch.randn(100, 2, dtype=torch.float64)
    assert_close(expert(x)[:, 0], x.prod(dim=-1))


@given(C=st.integers(1, 9), n_hidden=st.integers(1, 9), bias=st.booleans())
def test_number_of_parameters(C, n_hidden, bias):
    size = sum(weight.numel() for weight in GatedExpert(C, n_hidden, bias=bias).parameters())
    assert size == 3 * C * n_hidden + (2 * n_hidden + C if bias else 0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", GATED)
def test_loop_and_grouped_experts_agree(name, bias):
    loop = Experts(5, 8, 6, name, bias, dropout=0.0)
    grouped = GroupedExperts(5, 8, 6, name, bias)
    assert all(type(expert) is GatedExpert for expert in loop)
    grouped.load_state_dict(stack_weights(loop))
    x = torch.randn(3, 7, 8, requires_grad=True)
    routing = TopkRouter(8, 5, 2)(x)
    y, z, back = loop(x, routing), grouped(x, routing), grouped.to_loop()(x, routing)
    assert_close(y, z)
    assert_close(y, back)
    direction = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad((out * direction).sum(), x, retain_graph=True)[0] for out in (y, z))
    assert_close(ours, theirs)


@pytest.mark.parametrize("experts", ["grouped", "loop"])
@pytest.mark.parametrize("name", GATED)
def test_the_model_takes_gated_experts(name, experts):
    config = MoEConfig(vocab_size=11, block_size=8, n_embd=16, n_head=2, n_layer=2, n_hidden=12, num_experts=4,
                       activation=name, experts=experts, z_coef=0.001)
    model, ids = SparseMoELanguageModel(config), torch.randint(11, (2, 9))
    output = model(ids[:, :-1], ids[:, 1:])
    assert abs(output.lm_loss.item() - math.log(11)) < 0.1
    output.loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())
    total, active = count_parameters(model)
    assert total - active == 2 * 2 * 3 * 16 * 12  # two idle experts in each of two blocks, three matrices each


def test_the_block_in_the_loop_and_back_through_a_checkpoint():
    def block():
        moe = SparseMoE(TopkRouter(8, 4, 2), GroupedExperts(4, 8, 6, "swiglu"))
        return SparseMoEBlock(8, moe, ff_before=GatedExpert(8, 6), ff_after=GatedExpert(8, 6, "swiglu"))

    old, new, x = block(), block(), torch.randn(2, 3, 8)
    new.load_state_dict(old.state_dict())
    assert_close(new(x)[0], old(x)[0], rtol=0, atol=0)


def st_moe_pytorch():
    return pytest.importorskip("st_moe_pytorch", reason="pip install .[dev]")


def copy_expert(theirs, ours, norm=None):
    """Their expert's weights into ours. Their rows are value, then gate; ours are gate, then value.

    They multiply the hidden units by `mult_bias`, which our value rows take over.
    """
    layers = list(theirs.net)
    if norm is not None:
        norm.weight.data = layers.pop(0).gamma.data
    up, unit, down = layers
    for name in "weight", "bias":
        value, gate = getattr(up, name).data.chunk(2)
        scale = unit.mult_bias.data.view(-1, *[1] * (value.dim() - 1))
        getattr(ours.up, name).data = torch.cat([gate, scale * value])
        getattr(ours.down, name).data = getattr(down, name).data


def both_blocks(C=24, E=4, before=True, after=True):
    "Their block and ours with the same weights, all of them random. Nothing is dropped, and no choice is by chance."
    package = st_moe_pytorch()
    moe = package.MoE(C, num_experts=E, gating_top_n=2, threshold_train=0.0, threshold_eval=0.0,
                      capacity_factor_train=float(E), capacity_factor_eval=float(E),
                      straight_through_dispatch_tensor=False)
    theirs = package.SparseMoEBlock(moe, add_ff_before=before, add_ff_after=after)
    for name, weight in theirs.named_parameters():
        if name.endswith(("gamma", "mult_bias")):  # they start as ones
            weight.data += 0.3 * torch.randn_like(weight)
    n_hidden = int(C * 4 * 2 / 3)
    mixture = SparseMoE(TopkRouter(C, E, 2), Experts(E, C, n_hidden, "geglu"))
    dense = [GatedExpert(C, n_hidden) if wanted else None for wanted in (before, after)]
    ours = SparseMoEBlock(C, mixture, *dense)
    mixture.router.linear.weight.data, mixture.router.linear.bias.data = moe.gate.to_gates.weight.data, torch.zeros(E)
    ours.norm.weight.data = theirs.moe_prenorm.gamma.data
    for one, other in zip(moe.experts.experts, mixture.experts):
        copy_expert(one, other)
    for one, other, norm in (theirs.ff_before, ours.ff_before, ours.norm_before), (
            theirs.ff_after, ours.ff_after, ours.norm_after):
        if one is not None:
            copy_expert(one, other, norm)
    return theirs, ours


def test_expert_equals_that_of_st_moe_pytorch():
    theirs = st_moe_pytorch().st_moe_pytorch.Expert(12)
    ours = GatedExpert(12, 32)
    copy_expert(theirs, ours)
    x = torch.randn(5, 12)
    assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("before, after", [(False, False), (True, False), (False, True), (True, True)])
def test_block_equals_that_of_st_moe_pytorch(before, after):
    theirs, ours = both_blocks(before=before, after=after)
    x = torch.randn(2, 13, 24, requires_grad=True)
    want, (got, routing) = theirs(x), ours(x)
    assert_close(got, want.outputs, rtol=1e-5, atol=1e-5)
    assert_close(router_z_loss(routing), want.router_z_loss)
    direction = torch.randn_like(got)
    gradients = [torch.autograd.grad((y * direction).sum(), x)[0] for y in (got, want.outputs)]
    assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_noise_of_st_moe_pytorch_does_not_stop_in_evaluation():
    "The bug that the lesson names. Ours has no noise: two calls give the same numbers."
    theirs, ours = both_blocks()
    theirs.eval(), ours.eval()
    x = torch.randn(2, 13, 24)
    assert not torch.allclose(theirs(x, noise_gates=True).outputs, theirs(x, noise_gates=True).outputs, atol=1e-3)
    assert torch.equal(ours(x)[0], ours(x)[0])


def test_swiglu_expert_equals_that_of_mixtral():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="pip install .[dev]")
    config = mixtral.MixtralConfig(hidden_size=16, intermediate_size=12, num_local_experts=6, num_experts_per_tok=2)
    theirs = mixtral.MixtralExperts(config)
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.3)
    ours = Experts(6, 16, 12, "swiglu", bias=False)
    for e, expert in enumerate(ours):  # their rows, too, are gate, then value
        expert.up.weight.data, expert.down.weight.data = theirs.gate_up_proj[e].data, theirs.down_proj[e].data
    x = torch.randn(13, 16)
    routing = TopkRouter(16, 6, 2)(x)
    gates, chosen = routing.gates.topk(2, dim=-1)
    assert_close(ours(x, routing), theirs(x, chosen, gates), rtol=1e-5, atol=1e-5)
