"""Lesson 09. The oracle is the loop of lesson 06 with the same weights, in values and in every gradient."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from makemoe import dropless
from makemoe.capacity import CapacityRouter
from makemoe.dropless import LOOP_NAMES, GroupedExperts, answers_in_blocks, answers_in_one_call, stack_weights
from makemoe.experts import ACTIVATIONS
from makemoe.gating import Routing, TopkRouter
from makemoe.sparse_moe import Experts, SparseMoE


def routed(*shape, k, drop=0.0, lean=0.0, dtype=torch.float32):
    "A decision (..., E): k experts per token at random, each choice dropped with chance `drop`; `lean` lifts expert 0."
    wishes = torch.rand(shape)
    wishes[..., 0] += lean
    chosen = wishes >= wishes.topk(k, dim=-1).values[..., -1:]
    kept = chosen & (torch.rand(shape) >= drop)
    return Routing(gates=torch.rand(shape, dtype=dtype) * kept, logits=wishes, chosen=chosen, kept=kept)


def run(experts, x, routing):
    "y, and the gradients of x, the gates and the stacked weights, of a sum of y with fixed random signs."
    x, gates = x.detach().requires_grad_(), routing.gates.detach().requires_grad_()
    y = experts(x, replace(routing, gates=gates))
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    names, weights = zip(*experts.named_parameters())
    of_x, of_gates, *of_weights = torch.autograd.grad((y * probe).sum(), [x, gates, *weights])
    return y, of_x, of_gates, dict(zip(names, of_weights))


def assert_same(grouped, x, routing, atol=1e-5):
    "The same as the loop, in values and all gradients."
    y, of_x, of_gates, of_weights = run(grouped, x, routing)
    loop = grouped.to_loop()
    y_loop, of_x_loop, of_gates_loop, of_loop = run(loop, x, routing)
    assert_close(y, y_loop, rtol=0, atol=atol)
    assert_close(of_x, of_x_loop, rtol=0, atol=atol)
    assert_close(of_gates, of_gates_loop, rtol=0, atol=atol)
    for name, gradient in of_weights.items():
        alone = torch.stack([of_loop[f"{e}.{LOOP_NAMES[name]}"] for e in range(len(loop))])
        assert_close(gradient, alone, rtol=0, atol=atol)


@pytest.fixture
def in_one_call(monkeypatch):
    "Makes every `GroupedExperts` work in one call, on whatever device."
    def with_top_k(k):
        monkeypatch.setattr(dropless, "answers_in_blocks", lambda *work: answers_in_one_call(*work, top_k=k))
    return with_top_k


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("one_call", [False, True])
def test_a_batch_in_which_some_are_dropped_equals_the_loop(in_one_call, one_call, bias):
    if one_call:
        in_one_call(3)
    assert_same(GroupedExperts(5, 8, 12, "gelu", bias), torch.randn(3, 7, 8), routed(3, 7, 5, k=3, drop=0.4))


class Undefined(torch.autograd.Function):
    "F.grouped_mm that writes nan into the rows it leaves undefined, on the way forward and back."

    product = staticmethod(F.grouped_mm)

    @staticmethod
    def forward(ctx, rows, weights, offs):
        ctx.save_for_backward(rows, weights, offs)
        out = Undefined.product(rows, weights, offs=offs)
        out[offs[-1]:] = torch.nan
        return out

    @staticmethod
    def backward(ctx, grad):
        rows, weights, offs = ctx.saved_tensors
        of_rows = Undefined.product(grad, weights.mT, offs=offs)
        of_rows[offs[-1]:] = torch.nan
        return of_rows, Undefined.product(rows.mT, grad, offs=offs), None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_undefined_rows_reach_neither_answers_nor_gradients(monkeypatch, in_one_call, activation, bias):
    monkeypatch.setattr(dropless.F, "grouped_mm", lambda rows, weights, offs: Undefined.apply(rows, weights, offs))
    in_one_call(2)
    grouped = GroupedExperts(5, 8, 12, activation, bias)
    assert_same(grouped, torch.randn(3, 7, 8), routed(3, 7, 5, k=2, drop=0.4))


@given(N=st.integers(1, 12), E=st.integers(1, 6), data=st.data(), drop=st.sampled_from([0.0, 0.5]))
def test_both_ways_list_the_kept_pairs_sorted_by_expert(N, E, data, drop):
    k = data.draw(st.integers(1, E))
    kept = routed(N, E, k=k, drop=drop).kept
    expected = sorted((e, n) for n in range(N) for e in range(E) if kept[n, e])
    weights = torch.randn(E, 4, 4), None, torch.randn(E, 4, 4), None
    tokens = torch.randn(N, 4)
    e, rows, answers = answers_in_blocks(tokens, kept, weights, F.relu)
    assert list(zip(e.tolist(), rows.tolist())) == expected
    assert answers.shape == (len(expected), 4)
    e, rows, filled = answers_in_one_call(tokens, kept, weights, F.relu, top_k=k)
    assert list(zip(e.tolist(), rows.tolist()))[: len(expected)] == expected
    assert filled.shape == (N * k, 4) and not filled[len(expected):].any()
    assert_close(filled[: len(expected)], answers, rtol=0, atol=1e-5)


def test_an_expert_works_on_its_own_tokens_only_and_nothing_is_padded():
    seen = []

    def act(hidden):
        seen.append(hidden[..., 0].numel())
        return hidden

    routing = routed(50, 6, k=2, drop=0.3, lean=0.5)
    weights = torch.randn(6, 5, 3), None, torch.randn(6, 3, 5), None
    with FlopCounterMode(display=False) as counter:
        answers_in_blocks(torch.randn(50, 3), routing.kept, weights, act)
    rows = routing.load.sum()
    assert sum(seen) == rows
    assert counter.get_total_flops() == rows * 2 * (3 * 5 + 5 * 3)


def test_experts_without_tokens_get_a_gradient_of_zero_and_not_none():
    grouped = GroupedExperts(4, 3, 5)
    for kept in ([True, False, False, True], [False] * 4):
        kept = torch.tensor(kept).expand(6, 4)
        grouped.zero_grad()
        grouped(torch.randn(6, 3), Routing(kept.float(), torch.zeros(6, 4), kept, kept)).square().sum().backward()
        for weight in grouped.parameters():
            assert torch.equal(weight.grad.flatten(1).any(dim=1), kept[0])


def test_kept_decides_and_not_chosen_and_not_the_size_of_a_gate():
    grouped, x = GroupedExperts(4, 3, 5), torch.randn(6, 3)
    routing = routed(6, 4, k=2)
    kept = routing.chosen.clone()
    kept[:, 1] = False
    gates = torch.randn(6, 4) * kept
    gates[0] = 0
    assert_same(grouped, x, replace(routing, gates=gates, kept=kept))
    nobody = replace(routing, gates=gates * 0, kept=kept & False)
    assert torch.equal(grouped(x, nobody), torch.zeros_like(x))


def test_order_of_the_tokens_does_not_matter():
    grouped, x, order = GroupedExperts(4, 8, 16), torch.randn(9, 8), torch.randperm(9)
    routing = routed(9, 4, k=2)
    shuffled = Routing(*(field[order] for field in (routing.gates, routing.logits, routing.chosen, routing.kept)))
    assert_close(grouped(x[order], shuffled), grouped(x, routing)[order], rtol=0, atol=1e-6)


def test_extreme_imbalance_is_one_dense_expert():
    grouped, x = GroupedExperts(8, 16, 32, "squared_relu"), torch.randn(300, 16)
    kept = torch.zeros(300, 8, dtype=torch.bool)
    kept[:, 5] = True
    routing = Routing(kept.float(), torch.zeros(300, 8), kept, kept)
    assert_close(grouped(x, routing), grouped.to_loop()[5](x), rtol=0, atol=1e-5)
    assert_same(grouped, x, routing, atol=1e-4)  # sums over 300 tokens


def test_no_tokens_at_all(in_one_call):
    grouped, x = GroupedExperts(4, 8, 16), torch.zeros(0, 5, 8)
    assert grouped(x, routed(0, 5, 4, k=2)).shape == (0, 5, 8)
    in_one_call(2)
    assert grouped(x, routed(0, 5, 4, k=2)).shape == (0, 5, 8)


@pytest.mark.parametrize("layout", [lambda x: x.transpose(0, 1), lambda x: x.mT.contiguous().mT, lambda x: x[..., ::2]])
@pytest.mark.parametrize("one_call", [False, True])
def test_any_layout_in_memory_and_x_is_left_alone(in_one_call, layout, one_call):
    if one_call:
        in_one_call(2)
    x = layout(torch.randn(4, 6, 8))
    grouped, before = GroupedExperts(4, x.shape[-1], 16), x.clone()
    assert_same(grouped, x, routed(*x.shape[:-1], 4, k=2))
    assert torch.equal(x, before)


def test_a_layer_with_capacity_equals_the_loop_in_it():
    router = CapacityRouter(TopkRouter(8, 4, 2), capacity_factor=0.5, minimum=1)
    grouped, x = GroupedExperts(4, 8, 16, top_k=2), torch.randn(3, 12, 8)
    y, routing = SparseMoE(router, grouped)(x)
    assert routing.dropped > 0.2
    assert_close(y, SparseMoE(router, grouped.to_loop())(x)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_same_seed_same_weights_as_the_loop(bias):
    torch.manual_seed(5)
    grouped = GroupedExperts(3, 4, 7, "gelu", bias)
    torch.manual_seed(5)
    loop = Experts(3, 4, 7, "gelu", bias)
    for e, expert in enumerate(loop):  # and with that nn.Linear's own initialisation
        assert torch.equal(grouped.up[e], expert.up.weight) and torch.equal(grouped.down[e], expert.down.weight)
        if bias:
            assert torch.equal(grouped.up_bias[e], expert.up.bias)
            assert torch.equal(grouped.down_bias[e], expert.down.bias)


def test_names_and_shapes_of_the_parameters():
    shapes = {name: tuple(weight.shape) for name, weight in GroupedExperts(3, 4, 7).named_parameters()}
    assert shapes == {"up": (3, 7, 4), "up_bias": (3, 7), "down": (3, 4, 7), "down_bias": (3, 4)}
    plain = GroupedExperts(3, 4, 7, bias=False)
    assert [name for name, _ in plain.named_parameters()] == ["up", "down"]
    assert plain.up_bias is plain.down_bias is None
    assert all(weight.is_leaf and weight.is_contiguous() for weight in GroupedExperts(3, 4, 7).parameters())


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("bias", [False, True])
def test_from_loop_and_to_loop_undo_each_other(activation, bias):
    loop = Experts(4, 3, 5, activation, bias, dropout=0.25).double().eval()
    grouped = GroupedExperts.from_loop(loop, top_k=3)
    assert (grouped.activation, grouped.dropout.p, grouped.top_k, grouped.training) == (activation, 0.25, 3, False)
    assert grouped.up.dtype == torch.float64
    again = grouped.to_loop()
    assert not again.training and again[0].dropout.p == 0.25 and again[0].activation is loop[0].activation
    assert list(again.state_dict()) == list(loop.state_dict())
    for name, weight in loop.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    x, routing = torch.randn(6, 3, dtype=torch.float64), routed(6, 4, k=2, dtype=torch.float64)
    assert_close(grouped(x, routing), loop(x, routing), rtol=0, atol=1e-12)
    with torch.no_grad():  # a copy, not a view
        loop[0].up.weight.zero_()
        again[1].up.weight.zero_()
    assert grouped.up[:2].all()


def test_stack_weights_keeps_the_order_of_the_experts():
    loop = Experts(3, 4, 7)
    stacked = stack_weights(loop)
    assert list(stacked) == ["up", "up_bias", "down", "down_bias"]
    assert torch.equal(stacked["down"][2], loop[2].down.weight)
    assert torch.equal(stacked["up_bias"][1], loop[1].up.bias)


def test_state_dict_can_be_saved_and_loaded():
    one, other = GroupedExperts(3, 4, 8), GroupedExperts(3, 4, 8)
    other.load_state_dict(one.state_dict())
    x, routing = torch.randn(5, 4), routed(5, 3, k=2)
    assert torch.equal(one(x, routing), other(x, routing))


def test_dropout_falls_on_each_answer_in_training_only():
    grouped, x = GroupedExperts(2, 16, 8, dropout=0.25), torch.randn(1000, 16)
    routing = routed(1000, 2, k=2)
    alone = [replace(routing, gates=routing.gates * mine, kept=routing.kept & mine) for mine in torch.eye(2) > 0]
    one, other = (grouped.eval()(x, decision) / 0.75 for decision in alone)
    noisy = grouped.train()(x, routing)
    for kind, chance in (torch.zeros_like(x), 0.0625), (one, 0.1875), (other, 0.1875), (one + other, 0.5625):
        same = torch.isclose(noisy, kind, rtol=0, atol=1e-6)
        # of 16,000 draws; 0.025 are more than 6 standard deviations, a chance below 1e-8
        assert abs(same.float().mean() - chance) < 0.025
        assert same.all(dim=-1).float().mean() < 0.01  # each channel draws for itself


@pytest.mark.parametrize("one_call", [False, True])
def test_bfloat16_autocast_keeps_the_type_of_x_and_stays_close(in_one_call, one_call):
    if one_call:
        in_one_call(2)
    grouped, x = GroupedExperts(8, 32, 128, bias=False), torch.randn(4, 16, 32)
    routing = routed(4, 16, 8, k=2, drop=0.2)
    exact = grouped.to_loop()(x, routing)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped(x, routing)
    assert y.dtype == torch.float32
    # bfloat16 rounds to 8 bits, 0.4 %: of x and two weight matrices, summed at random over 32 and 128 channels
    assert_close(y, exact, rtol=0, atol=0.02 * exact.abs().max().item())
    assert (y - exact).abs().max() > 1e-5  # it did compute in bfloat16
    y.square().mean().backward()
    assert all(weight.grad.isfinite().all() and weight.grad.dtype == torch.float32 for weight in grouped.parameters())


@pytest.mark.parametrize("one_call", [False, True])
def test_bfloat16_tokens_and_weights_are_accepted(in_one_call, one_call):
    if one_call:
        in_one_call(2)
    grouped, x = GroupedExperts(4, 8, 16).bfloat16(), torch.randn(2, 5, 8)
    routing = routed(2, 5, 4, k=2)
    y = grouped(x.bfloat16(), routing)
    assert y.dtype == torch.bfloat16
    exact = grouped.float().to_loop()(x, routing)
    assert_close(y.float(), exact, rtol=0, atol=0.02 * exact.abs().max().item())


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 5, 2), (5, 2, 4), (10, 4)])
def test_a_routing_for_other_tokens_or_experts_is_refused(shape):
    grouped, routing = GroupedExperts(4, 8, 16), routed(*shape, k=1)
    with pytest.raises(ValueError) as caught:
        grouped(torch.randn(2, 5, 8), routing)
    assert str(caught.value) == f"the routing is of shape {shape}, these tokens and experts need (2, 5, 4)"


def test_more_pairs_than_top_k_allows_are_refused():
    grouped, x = GroupedExperts(4, 8, 16, top_k=2), torch.randn(5, 8)
    grouped(x, routed(5, 4, k=2))
    with pytest.raises(ValueError):
        grouped(x, routed(5, 4, k=3))


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation is 'swish'"):
        GroupedExperts(4, 8, 16, activation="swish")


class OnGPU(torch.Tensor):
    "A tensor that says it is on a GPU: it chooses the way to work, and is computed here."
    is_cuda = True

    def tolist(self):
        raise AssertionError("a GPU would be waited for")  # a profile of a processor does not hear this one


def waits(profile):
    "What would make a GPU be waited for: item, an if, nonzero, an index of booleans."
    return [event.name for event in profile.events()
            if event.name in ("aten::nonzero", "aten::masked_select", "aten::is_nonzero")
            or event.name == "aten::item" and not event.cpu_parent]


def test_one_call_never_asks_for_a_number():
    grouped, x, kept = GroupedExperts(5, 8, 12), torch.randn(21, 8), routed(21, 5, k=2, drop=0.4).kept
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        weights = grouped.up, grouped.up_bias, grouped.down, None
        answers = answers_in_one_call(x, kept.as_subclass(OnGPU), weights, F.relu, top_k=2)[2]
    assert answers.shape == (42, 8)
    assert not waits(profile)
    with FlopCounterMode(display=False) as counter:  # it does not count grouped_mm, but all others
        answers_in_one_call(x, kept, (grouped.up, None, grouped.down, None), F.relu, top_k=2)
    assert counter.get_total_flops() <= 42 * 2 * (8 * 12 + 12 * 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        x[kept[:, 0]], kept.sum().item()  # this does hear
    assert {"aten::nonzero", "aten::item"} <= set(waits(profile))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_bfloat16_on_a_gpu_works_in_one_call_and_nobody_waits(monkeypatch, activation):
    grouped, x = GroupedExperts(4, 8, 16, activation, top_k=2), torch.randn(3, 7, 8)
    routing = routed(3, 7, 4, k=2, drop=0.4)
    exact = grouped.to_loop()(x, routing)
    monkeypatch.setattr(dropless, "answers_in_blocks", None)
    with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = grouped(x.as_subclass(OnGPU), routing).as_subclass(torch.Tensor)
    assert not waits(profile)
    assert_close(y, exact, rtol=0, atol=0.02 * exact.abs().max().item())


@pytest.mark.parametrize("why, C, H, top_k, dtype", [
    ("no top_k", 8, 16, None, torch.bfloat16), ("odd sizes", 8, 12, 2, torch.bfloat16), ("float32", 8, 16, 2, torch.float32),
])
def test_all_else_on_a_gpu_works_in_blocks(monkeypatch, why, C, H, top_k, dtype):
    monkeypatch.setattr(dropless, "answers_in_one_call", None)
    grouped, x = GroupedExperts(4, C, H, top_k=top_k).to(dtype), torch.randn(5, C, dtype=dtype)
    grouped(x.as_subclass(OnGPU), routed(5, 4, k=2))


@given(
    shape=st.lists(st.integers(1, 5), max_size=2),
    E=st.integers(1, 7),
    C=st.integers(1, 6),
    H=st.integers(1, 9),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    drop=st.sampled_from([0.0, 0.5, 1.0]),
    lean=st.sampled_from([-1.0, 0.0, 1.0]),
    data=st.data(),
)
def test_equals_the_loop_in_values_and_all_gradients(shape, E, C, H, activation, bias, drop, lean, data):
    grouped = GroupedExperts(E, C, H, activation, bias)
    k = data.draw(st.integers(1, E))
    assert_same(grouped, torch.randn(*shape, C), routed(*shape, E, k=k, drop=drop, lean=lean))


@given(
    shape=st.lists(st.integers(1, 5), max_size=2),
    E=st.integers(1, 7),
    C=st.sampled_from([4, 8, 12]),
    H=st.sampled_from([4, 16, 20]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    drop=st.sampled_from([0.0, 0.5, 1.0]),
    lean=st.sampled_from([-1.0, 0.0, 1.0]),
    data=st.data(),
)
def test_one_call_equals_the_loop_in_values_and_all_gradients(shape, E, C, H, activation, bias, drop, lean, data):
    k = data.draw(st.integers(1, E))
    top_k = data.draw(st.integers(k, E))  # more room than needed is fine
    grouped = GroupedExperts(E, C, H, activation, bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dropless, "answers_in_blocks", lambda *work: answers_in_one_call(*work, top_k=top_k))
        assert_same(grouped, torch.randn(*shape, C), routed(*shape, E, k=k, drop=drop, lean=lean))


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_cuda
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_cuda_never_waits_and_equals_the_loop(bias, drop):
    grouped = GroupedExperts(8, 64, 128, "squared_relu", bias, top_k=2).cuda()
    x, routing = torch.randn(4, 32, 64), routed(4, 32, 8, k=2, drop=drop)
    x, fields = x.cuda(), (routing.gates, routing.logits, routing.chosen, routing.kept)
    routing = Routing(*(field.cuda() for field in fields))
    with torch.autocast("cuda", torch.bfloat16):
        run_on_gpu(grouped, x, routing)  # the first call may load kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours = run_on_gpu(grouped, x, routing)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    loop = grouped.to_loop()
    theirs = run_on_gpu(loop, x, routing)  # in float32
    assert_close(ours[0], theirs[0], rtol=0, atol=0.02 * theirs[0].abs().max().item())
    assert_close(ours[1], theirs[1], rtol=0, atol=0.02 * theirs[1].abs().max().item())
    for name in ("up", "down"):
        alone = torch.stack([expert.get_parameter(LOOP_NAMES[name]).grad for expert in loop])
        assert_close(grouped.get_parameter(name).grad, alone, rtol=0, atol=0.03 * alone.abs().max().item())


def run_on_gpu(experts, x, routing):
    "y and the gradient of x, and gradients in the parameters; draws nothing at random."
    experts.zero_grad()
    x = x.detach().requires_grad_()
    y = experts(x, routing)
    y.float().square().sum().backward()
    return y, x.grad


@needs_cuda
def test_cuda_in_float32_equals_the_processor():
    grouped, x, routing = GroupedExperts(8, 64, 128, top_k=2), torch.randn(4, 32, 64), routed(4, 32, 8, k=2)
    expected = grouped(x, routing)
    fields = routing.gates, routing.logits, routing.chosen, routing.kept
    y = grouped.cuda()(x.cuda(), Routing(*(field.cuda() for field in fields)))
    assert_close(y.cpu(), expected, rtol=0, atol=1e-3)  # a GPU may round products to TF32
