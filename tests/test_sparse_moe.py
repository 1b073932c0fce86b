"""Lesson 06. The oracle is the dense mixture, one token and one expert at a time, written without masks or indexing."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from makemoe.experts import Expert
from makemoe.gating import Routing, TopkRouter, top_k_gating
from makemoe.noisy_gating import NoisyTopkRouter
from makemoe.sparse_moe import Experts, SparseMoE


def dense(experts, x, gates):
    "Every expert answers every token, and the gates weigh: x (..., C), gates (..., E) -> (..., C)."
    rows = []
    for token, weights in zip(x.reshape(-1, x.shape[-1]), gates.reshape(-1, gates.shape[-1])):
        rows.append(sum(weight * expert(token) for weight, expert in zip(weights, experts)))
    return torch.stack(rows).reshape(x.shape) if rows else x * 0


def record(experts, calls):
    "Hooks that append (expert, rows of its batch) to the list `calls` whenever an expert runs."
    for e, expert in enumerate(experts):
        expert.register_forward_pre_hook(lambda _, args, e=e: calls.append((e, args[0].clone())))


def random_routing(*shape, k, drop=0.0, bias=0.0, dtype=torch.float32):
    "Top-k of random logits (..., E), expert 0 preferred by `bias`, a share `drop` of the choices dropped."
    logits = torch.randn(*shape, dtype=dtype)
    logits[..., 0] += bias
    routing = top_k_gating(logits, k)
    kept = routing.chosen & (torch.rand(shape) >= drop)
    return replace(routing, gates=routing.gates * kept, kept=kept)


@given(
    shape=st.lists(st.integers(1, 4), max_size=2),
    E=st.integers(1, 6),
    data=st.data(),
    drop=st.sampled_from([0.0, 0.5, 1.0]),
    bias=st.sampled_from([-100.0, 0.0, 100.0]),
)
def test_experts_equal_the_dense_mixture_in_values_and_gradients(shape, E, data, drop, bias):
    k = data.draw(st.integers(1, E))
    experts = Experts(E, 3, 5).double()
    routing = random_routing(*shape, E, k=k, drop=drop, bias=bias, dtype=torch.float64)
    x = torch.randn(*shape, 3, dtype=torch.float64, requires_grad=True)
    gates = routing.gates.requires_grad_()
    routing = replace(routing, gates=gates)
    ours, theirs = experts(x, routing), dense(experts, x, gates)
    assert_close(ours, theirs, rtol=0, atol=1e-12)
    probe = torch.randn_like(x)
    sources = [x, gates, *experts.parameters()]
    our_grads = torch.autograd.grad((ours * probe).sum(), sources)
    their_grads = list(torch.autograd.grad((theirs * probe).sum(), sources))
    their_grads[1] = their_grads[1] * routing.kept  # a gate that is 0 because nobody works is no wire for gradient
    for one, other in zip(our_grads, their_grads):
        assert_close(one, other, rtol=0, atol=1e-12)


@given(B=st.integers(1, 3), T=st.integers(1, 5), E=st.integers(1, 6), data=st.data())
@example(B=1, T=1, E=1, data=None)
def test_layer_equals_the_dense_mixture_down_to_the_router(B, T, E, data):
    k = data.draw(st.integers(1, E)) if data else 1
    layer = SparseMoE(TopkRouter(4, E, k), Experts(E, 4, 8))
    x = torch.randn(B, T, 4, requires_grad=True)
    y, _ = layer(x)
    expected = dense(layer.experts, x, layer.router(x).gates)
    assert_close(y, expected, rtol=0, atol=1e-6)
    sources = [x, *layer.parameters()]
    ours = torch.autograd.grad(y.square().mean(), sources)
    theirs = torch.autograd.grad(expected.square().mean(), sources)
    for one, other in zip(ours, theirs):
        assert_close(one, other, rtol=0, atol=1e-6)


@given(B=st.integers(1, 3), T=st.integers(1, 5), E=st.integers(1, 6), data=st.data(), drop=st.sampled_from([0.0, 0.4]))
def test_each_expert_runs_once_on_exactly_the_tokens_it_keeps(B, T, E, data, drop):
    experts, x = Experts(E, 3, 5), torch.randn(B, T, 3)
    routing = random_routing(B, T, E, k=data.draw(st.integers(1, E)), drop=drop)
    calls = []
    record(experts, calls)
    experts(x, routing)
    assert sorted(e for e, _ in calls) == list(range(E))
    for e, batch in calls:  # in any order
        assert sorted(batch.tolist()) == sorted(x[routing.kept[..., e]].tolist())


def test_kept_decides_and_not_chosen_and_not_the_size_of_a_gate():
    experts = Experts(4, 3, 5)
    x = torch.randn(6, 3)
    routing = random_routing(6, 4, k=2)
    kept = routing.chosen.clone()
    kept[:, 1] = False
    gates = torch.randn(6, 4) * kept  # weights of any sign ...
    gates[0] = 0  # ... and of no size: the work is done all the same
    calls = []
    record(experts, calls)
    y = experts(x, replace(routing, gates=gates, kept=kept))
    assert [len(batch) for _, batch in sorted(calls, key=lambda call: call[0])] == kept.sum(0).tolist()
    assert_close(y, dense(experts, x, gates), rtol=0, atol=1e-6)


def test_a_token_without_experts_gets_exactly_zero_and_the_others_what_they_had():
    layer = SparseMoE(TopkRouter(8, 4, 2), Experts(4, 8, 16))
    x = torch.randn(2, 5, 8, requires_grad=True)
    y, routing = layer(x)
    kept = routing.kept.clone()
    kept[0, 3] = False
    dropped = layer.experts(x, replace(routing, gates=routing.gates * kept, kept=kept))
    assert not dropped[0, 3].any()
    others = kept.any(-1)
    assert_close(dropped[others], y[others], rtol=0, atol=1e-6)
    gradient = torch.autograd.grad(dropped.sum(), x)[0]
    assert not gradient[0, 3].any() and gradient[others].any(-1).all()


def test_an_expert_without_tokens_gets_a_gradient_of_zero():
    experts = Experts(3, 4, 8)
    logits = torch.tensor([3.0, 2.0, -9.0]).expand(5, 3)
    experts(torch.randn(5, 4), top_k_gating(logits, 2)).square().sum().backward()
    for e, expert in enumerate(experts):
        for weight in expert.parameters():
            assert weight.grad is not None
            assert weight.grad.any() == (e < 2)


def test_gradients_reach_the_router_and_the_chosen_experts_only():
    layer = SparseMoE(TopkRouter(8, 6, 2), Experts(6, 8, 16))
    x = torch.randn(1, 1, 8)
    y, routing = layer(x)
    y.square().sum().backward()
    for e, expert in enumerate(layer.experts):
        assert all(weight.grad.any() == routing.kept[0, 0, e] for weight in expert.parameters())
        assert layer.router.linear.weight.grad[e].any() == routing.kept[0, 0, e]


def test_no_tokens_at_all():
    layer = SparseMoE(TopkRouter(8, 4, 2), Experts(4, 8, 16))
    y, routing = layer(torch.zeros(0, 5, 8))
    assert y.shape == (0, 5, 8) and routing.load.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 5, 8), (2, 3, 5, 8)])
def test_any_leading_shape(shape):
    layer, x = SparseMoE(TopkRouter(8, 4, 2), Experts(4, 8, 16)), torch.randn(shape)
    y, routing = layer(x)
    assert y.shape == x.shape and routing.gates.shape == (*shape[:-1], 4)
    assert_close(y, dense(layer.experts, x, routing.gates), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", [lambda x: x.transpose(0, 1), lambda x: x.mT.contiguous().mT, lambda x: x[..., ::2]])
def test_any_layout_in_memory_and_x_is_left_alone(layout):
    x = layout(torch.randn(4, 6, 8))
    layer = SparseMoE(TopkRouter(x.shape[-1], 4, 2), Experts(4, x.shape[-1], 16))
    before = x.clone()
    assert_close(layer(x)[0], layer(x.contiguous())[0], rtol=0, atol=1e-6)
    assert torch.equal(x, before)


def test_gradients_equal_finite_differences():
    experts = Experts(3, 2, 4, activation="gelu").double()
    router = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    names, weights = zip(*experts.named_parameters())

    def mixture(x, router, *weights):
        routing = top_k_gating(x @ router, 2)
        return torch.func.functional_call(experts, dict(zip(names, weights)), (x, routing))

    assert torch.autograd.gradcheck(mixture, (x, router, *weights))


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


def test_permuting_the_tokens_permutes_the_answers():
    layer, x, order = SparseMoE(TopkRouter(8, 4, 2), Experts(4, 8, 16)), torch.randn(9, 8), torch.randperm(9)
    assert_close(layer(x[order])[0], layer(x)[0][order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("router", [TopkRouter, NoisyTopkRouter])
def test_a_sequence_does_not_feel_its_neighbours_nor_a_token_its_future(router):
    layer = SparseMoE(router(8, 4, 2), Experts(4, 8, 16, dropout=0.3)).eval()
    x = torch.randn(3, 6, 8)
    y, _ = layer(x)
    for b in range(3):
        assert_close(layer(x[b : b + 1])[0][0], y[b], rtol=0, atol=1e-6)
    changed = torch.cat([x[:, :4], torch.randn(3, 2, 8)], dim=1)
    assert_close(layer(changed)[0][:, :4], y[:, :4], rtol=0, atol=1e-6)


def test_one_expert_is_that_expert_alone():
    layer, x = SparseMoE(TopkRouter(8, 1, 1), Experts(1, 8, 16)), torch.randn(2, 5, 8)
    assert_close(layer(x)[0], layer.experts[0](x), rtol=0, atol=1e-6)


def test_equal_experts_are_one_expert_for_any_gates_that_sum_to_one():
    experts, x = Experts(5, 8, 16), torch.randn(2, 5, 8)
    for expert in experts:
        expert.load_state_dict(experts[0].state_dict())
    for k in 1, 3, 5:
        assert_close(experts(x, random_routing(2, 5, 5, k=k)), experts[0](x), rtol=0, atol=1e-6)


def test_the_router_is_asked_once_and_its_own_record_is_returned():
    asked, noisy = [], NoisyTopkRouter(8, 4, 2)

    def router(x):
        asked.append(noisy(x))
        return asked[-1]

    def experts(x, routing):
        handed.append(routing)
        return workers(x, routing)

    handed, workers, x = [], Experts(4, 8, 16), torch.randn(2, 50, 8)
    answer = SparseMoE(router, experts)(x)
    assert type(answer) is tuple
    y, routing = answer
    assert len(asked) == len(handed) == 1 and routing is asked[0] and handed[0] is asked[0]
    assert_close(y, dense(workers, x, routing.gates), rtol=0, atol=1e-6)


def test_any_router_and_any_experts_that_keep_to_the_seam_will_do():
    def to_the_last(x):
        chosen = torch.zeros(*x.shape[:-1], 4, dtype=torch.bool)
        chosen[..., 3] = True
        return Routing(chosen.float(), torch.zeros(chosen.shape), chosen, chosen)

    x, experts = torch.randn(2, 5, 8), Experts(4, 8, 16)
    assert_close(SparseMoE(to_the_last, experts)(x)[0], experts[3](x), rtol=0, atol=1e-6)
    assert torch.equal(SparseMoE(to_the_last, lambda x, routing: x * routing.load[3])(x)[0], 10 * x)
    assert SparseMoE(to_the_last, lambda x, routing: x)(x.bfloat16())[0].dtype == torch.bfloat16


def test_experts_are_a_list_of_experts_built_as_told():
    experts = Experts(4, 8, 16, activation="squared_relu", bias=False, dropout=0.25)
    alone = Expert(8, 16, "squared_relu", False, 0.25)
    assert len(experts) == 4 and all(isinstance(expert, Expert) for expert in experts)
    for expert in experts:
        assert expert.up.weight.shape == (16, 8) and expert.up.bias is None and expert.down.bias is None
        assert expert.activation is alone.activation and expert.dropout.p == 0.25
    assert list(experts.state_dict()) == [f"{e}.{part}.weight" for e in range(4) for part in ("up", "down")]
    first, second = experts[0].up.weight, experts[1].up.weight
    assert not torch.equal(first, second)
    assert isinstance(experts, nn.ModuleList)


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


def test_bfloat16_tokens_are_accepted():
    experts, x = Experts(4, 8, 16).bfloat16(), torch.randn(2, 5, 8)
    routing = random_routing(2, 5, 4, k=2)
    y = experts(x.bfloat16(), routing)
    assert y.dtype == torch.bfloat16
    exact = experts.float()(x, routing)
    assert_close(y.float(), exact, rtol=0, atol=0.02 * exact.abs().max().item())


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 5, 2), (5, 2, 4), (10, 4)])
def test_a_routing_for_other_tokens_or_experts_is_refused(shape):
    experts, routing = Experts(4, 8, 16), random_routing(*shape, k=1)
    with pytest.raises(ValueError) as caught:
        experts(torch.randn(2, 5, 8), routing)
    assert str(caught.value) == f"the routing is of shape {shape}, these tokens and experts need (2, 5, 4)"
