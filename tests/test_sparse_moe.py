"""Lesson 06: the checks, and what is too heavy for them. The oracle of the checks is a loop over tokens and experts."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import classroom.hidden.sparse_moe as hidden
from makemoe.checks.sparse_moe import check_experts, check_sparse_moe, mixture_by_loop
from makemoe.experts import Expert
from makemoe.gating import Routing, TopkRouter, top_k_gating
from makemoe.noisy_gating import NoisyTopkRouter
from makemoe.sparse_moe import Experts, SparseMoE


def random_routing(*shape, k, drop=0.0, bias=0.0, dtype=torch.float32):
    "Top-k of random logits (..., E), expert 0 preferred by `bias`, a share `drop` of the choices dropped."
    logits = torch.randn(*shape, dtype=dtype)
    logits[..., 0] += bias
    routing = top_k_gating(logits, k)
    kept = routing.chosen & (torch.rand(shape) >= drop)
    return replace(routing, gates=routing.gates * kept, kept=kept)


@pytest.mark.parametrize("check", [check_experts, hidden.check_experts])
def test_checks_of_experts(check):
    check(Experts)


def test_check_of_the_layer():
    check_sparse_moe(SparseMoE)


@given(
    shape=st.lists(st.integers(1, 4), max_size=2),
    E=st.integers(1, 6),
    data=st.data(),
    drop=st.sampled_from([0.0, 0.5, 1.0]),
    bias=st.sampled_from([-100.0, 0.0, 100.0]),
)
def test_experts_equal_the_loop_in_values_and_gradients(shape, E, data, drop, bias):
    k = data.draw(st.integers(1, E))
    experts = Experts(E, 3, 5).double()
    routing = random_routing(*shape, E, k=k, drop=drop, bias=bias, dtype=torch.float64)
    x = torch.randn(*shape, 3, dtype=torch.float64, requires_grad=True)
    gates = routing.gates.requires_grad_()
    routing = replace(routing, gates=gates)
    ours, theirs = experts(x, routing), mixture_by_loop(experts, x, routing)
    assert_close(ours, theirs, rtol=0, atol=1e-12)
    sources, probe = [x, gates, *experts.parameters()], torch.randn_like(x)
    our_grads = torch.autograd.grad((ours * probe).sum(), sources)
    theirs = theirs + 0 * sum(source.sum() for source in sources)  # where nobody works the gradient is 0, not None
    for one, other in zip(our_grads, torch.autograd.grad((theirs * probe).sum(), sources)):
        assert_close(one, other, rtol=0, atol=1e-12)


@given(B=st.integers(1, 3), T=st.integers(1, 5), E=st.integers(1, 6), data=st.data())
@example(B=1, T=1, E=1, data=None)
def test_layer_equals_the_dense_mixture_down_to_the_router(B, T, E, data):
    k = data.draw(st.integers(1, E)) if data else 1
    layer, x = SparseMoE(TopkRouter(4, E, k), Experts(E, 4, 8)), torch.randn(B, T, 4, requires_grad=True)
    gates = layer.router(x).gates
    expected = sum(gates[..., e, None] * expert(x) for e, expert in enumerate(layer.experts))  # all answer all tokens
    y, _ = layer(x)
    assert_close(y, expected, rtol=0, atol=1e-6)
    sources = [x, *layer.parameters()]
    ours = torch.autograd.grad(y.square().mean(), sources)
    for one, other in zip(ours, torch.autograd.grad(expected.square().mean(), sources)):
        assert_close(one, other, rtol=0, atol=1e-6)


def test_gradients_equal_finite_differences():
    experts = Experts(3, 2, 4, activation="gelu").double()
    router = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    names, weights = zip(*experts.named_parameters())

    def mixture(x, router, *weights):
        routing = top_k_gating(x @ router, 2)
        return torch.func.functional_call(experts, dict(zip(names, weights)), (x, routing))

    assert torch.autograd.gradcheck(mixture, (x, router, *weights))


def test_gradients_reach_the_router_and_the_chosen_experts_only():
    layer = SparseMoE(TopkRouter(8, 6, 2), Experts(6, 8, 16))
    y, routing = layer(torch.randn(1, 1, 8))
    y.square().sum().backward()
    for e, expert in enumerate(layer.experts):
        assert all(weight.grad.any() == routing.kept[0, 0, e] for weight in expert.parameters())
        assert layer.router.linear.weight.grad[e].any() == routing.kept[0, 0, e]


def test_relabelling_the_experts_leaves_the_answer_and_permutes_the_load():
    layer = SparseMoE(TopkRouter(8, 6, 2), Experts(6, 8, 16))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = SparseMoE(TopkRouter(8, 6, 2), Experts(6, 8, 16))
    shuffled.router.load_state_dict({name: value[order] for name, value in layer.router.state_dict().items()})
    for new, old in enumerate(order.tolist()):
        shuffled.experts[new].load_state_dict(layer.experts[old].state_dict())
    x = torch.randn(3, 7, 8)
    (y, routing), (shuffled_y, shuffled_routing) = layer(x), shuffled(x)
    assert_close(shuffled_y, y, rtol=0, atol=1e-6)
    assert torch.equal(shuffled_routing.load, routing.load[order])


@pytest.mark.parametrize("router", [TopkRouter, NoisyTopkRouter])
def test_a_sequence_does_not_feel_its_neighbours_nor_a_token_its_future(router):
    layer = SparseMoE(router(8, 4, 2), Experts(4, 8, 16, dropout=0.3)).eval()
    x = torch.randn(3, 6, 8)
    y, _ = layer(x)
    for b in range(3):
        assert_close(layer(x[b : b + 1])[0][0], y[b], rtol=0, atol=1e-6)
    changed = torch.cat([x[:, :4], torch.randn(3, 2, 8)], dim=1)
    assert_close(layer(changed)[0][:, :4], y[:, :4], rtol=0, atol=1e-6)


def test_equal_experts_are_one_expert_for_any_gates_that_sum_to_one():
    experts, x = Experts(5, 8, 16), torch.randn(2, 5, 8)
    for expert in experts:
        expert.load_state_dict(experts[0].state_dict())
    for k in 1, 3, 5:
        assert_close(experts(x, random_routing(2, 5, 5, k=k)), experts[0](x), rtol=0, atol=1e-6)


def test_any_router_will_do():
    def to_the_last(x):
        chosen = torch.zeros(*x.shape[:-1], 4, dtype=torch.bool)
        chosen[..., 3] = True
        return Routing(chosen.float(), torch.zeros(chosen.shape), chosen, chosen)

    x, experts = torch.randn(2, 5, 8), Experts(4, 8, 16)
    assert_close(SparseMoE(to_the_last, experts)(x)[0], experts[3](x), rtol=0, atol=1e-6)


def test_experts_are_a_list_of_experts_built_as_told():
    experts = Experts(4, 8, 16, activation="squared_relu", bias=False, dropout=0.25)
    alone = Expert(8, 16, "squared_relu", False, 0.25)
    assert isinstance(experts, nn.ModuleList) and len(experts) == 4
    for expert in experts:
        assert isinstance(expert, Expert)
        assert expert.up.weight.shape == (16, 8) and expert.up.bias is None and expert.down.bias is None
        assert expert.activation is alone.activation and expert.dropout.p == 0.25
    assert list(experts.state_dict()) == [f"{e}.{part}.weight" for e in range(4) for part in ("up", "down")]
    assert not torch.equal(experts[0].up.weight, experts[1].up.weight)


def test_bfloat16_autocast_keeps_the_type_of_x_and_stays_close():
    layer, x = SparseMoE(TopkRouter(32, 8, 2), Experts(8, 32, 128)), torch.randn(4, 16, 32)
    exact, exact_routing = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = layer(x)
    assert y.dtype == torch.float32
    assert torch.equal(routing.gates, exact_routing.gates)  # the router does not feel it
    # bfloat16 rounds to 8 bits, 0.4 %: of x and two weight matrices, summed at random over 32 and 128 channels
    assert_close(y, exact, rtol=0, atol=0.02 * exact.abs().max().item())
    y.square().mean().backward()
    assert all(weight.grad.isfinite().all() for weight in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("router", [TopkRouter, NoisyTopkRouter])
def test_a_layer_of_another_type_works(router, dtype):
    layer, x = SparseMoE(router(8, 4, 2), Experts(4, 8, 16)).to(dtype), torch.randn(2, 5, 8, dtype=dtype)
    y, routing = layer(x)
    assert y.dtype == dtype and routing.logits.dtype == torch.float32
    y.float().square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in layer.parameters())
