"""Lesson 09. The oracle is the loop of lesson 06 with the same weights, in values and in every gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from classroom.hidden import dropless as hidden
from makemoe import dropless
from makemoe.capacity import CapacityRouter
from makemoe.checks import dropless as checks
from makemoe.checks.dropless import Heard, OnGPU, same_mixture, undefined_rows
from makemoe.dropless import LOOP_NAMES, GroupedExperts, answers_by_group, answers_in_one_call, stack_weights
from makemoe.experts import ACTIVATIONS
from makemoe.gating import Routing, TopkRouter
from makemoe.sparse_moe import Experts, SparseMoE


def routed(*shape, k, drop=0.0, lean=0.0, dtype=torch.float32):
    "A decision (..., E): k experts per token at random, each choice dropped with chance `drop`; `lean` lifts expert 0."
    scores = torch.rand(shape)
    scores[..., 0] += lean
    chosen = scores >= scores.topk(k, dim=-1).values[..., -1:]
    kept = chosen & (torch.rand(shape) >= drop)
    return Routing(gates=torch.rand(shape, dtype=dtype) * kept, logits=scores, chosen=chosen, kept=kept)


def assert_same(grouped, x, routing):
    same_mixture(grouped, grouped.to_loop(), x, routing)


@pytest.fixture
def in_one_call(monkeypatch):
    "Makes every `GroupedExperts` work in one call, on whatever device."

    def with_top_k(k):
        monkeypatch.setattr(dropless, "answers_by_group", lambda *work: answers_in_one_call(*work, top_k=k))

    return with_top_k


@pytest.mark.parametrize("these", [checks, hidden], ids=["visible", "hidden"])
def test_checks(these):
    these.check_answers_by_group(answers_by_group)
    these.check_grouped_experts(GroupedExperts)
    these.check_answers_in_one_call(answers_in_one_call)


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
    k = data.draw(st.integers(1, E))
    assert_same(
        GroupedExperts(E, C, H, activation, bias), torch.randn(*shape, C), routed(*shape, E, k=k, drop=drop, lean=lean)
    )


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
def test_one_call_equals_the_loop_whatever_a_gpu_leaves_behind_the_end(
    shape, E, C, H, activation, bias, drop, lean, data
):
    k = data.draw(st.integers(1, E))
    top_k = data.draw(st.integers(k, E))  # more room than needed is fine
    with pytest.MonkeyPatch.context() as patch, undefined_rows():
        patch.setattr(dropless, "answers_by_group", lambda *work: answers_in_one_call(*work, top_k=top_k))
        assert_same(
            GroupedExperts(E, C, H, activation, bias),
            torch.randn(*shape, C),
            routed(*shape, E, k=k, drop=drop, lean=lean),
        )


def test_more_pairs_than_promised_stay_within_the_list():
    "A GPU does not check the promise; but it may not read or write beyond the list."
    weights = torch.randn(3, 8, 8), None, torch.randn(3, 8, 8), None
    answers = answers_in_one_call(torch.randn(5, 8), torch.ones(5, 3, dtype=torch.bool), weights, F.relu, top_k=2)[2]
    assert answers.shape == (10, 8) and answers.isfinite().all()


def test_one_call_makes_everything_on_the_device_of_its_input(monkeypatch):
    monkeypatch.setattr(dropless, "product_dtype", lambda x: torch.bfloat16)
    with torch.device("meta"):
        work = (
            torch.randn(6, 8),
            torch.ones(6, 3).bool(),
            (torch.randn(3, 16, 8), torch.randn(3, 16), torch.randn(3, 8, 16), None),
        )
    e, rows, answers = answers_in_one_call(*work, F.gelu, top_k=2)
    assert e.is_meta and rows.is_meta and answers.is_meta and answers.shape == (12, 8)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_bfloat16_on_a_gpu_works_in_one_call_and_nobody_waits(monkeypatch, activation):
    grouped, x = GroupedExperts(4, 8, 16, activation, top_k=2), torch.randn(3, 7, 8)
    routing = routed(3, 7, 4, k=2, drop=0.4)
    exact = grouped.to_loop()(x, routing)
    monkeypatch.setattr(dropless, "answers_by_group", None)
    with torch.autocast("cpu", torch.bfloat16), Heard() as heard:
        y = grouped(x.as_subclass(OnGPU), routing).as_subclass(torch.Tensor)
    assert not heard.waits
    assert_close(y, exact, rtol=0, atol=0.02 * exact.abs().max().item())


@pytest.mark.parametrize(
    "why, C, H, top_k, dtype",
    [
        ("no top_k", 8, 16, None, torch.bfloat16),
        ("odd sizes", 8, 12, 2, torch.bfloat16),
        ("float32", 8, 16, 2, torch.float32),
    ],
)
def test_all_else_on_a_gpu_works_group_by_group(monkeypatch, why, C, H, top_k, dtype):
    monkeypatch.setattr(dropless, "answers_in_one_call", None)
    grouped, x = GroupedExperts(4, C, H, top_k=top_k).to(dtype), torch.randn(5, C, dtype=dtype)
    grouped(x.as_subclass(OnGPU), routed(5, 4, k=2))


@pytest.mark.parametrize("one_call", [False, True])
def test_half_precision_by_autocast_or_by_type_stays_close(in_one_call, one_call):
    if one_call:
        in_one_call(2)
    grouped, x = GroupedExperts(8, 32, 128, bias=False), torch.randn(4, 16, 32)
    routing = routed(4, 16, 8, k=2, drop=0.2)
    exact = grouped.to_loop()(x, routing)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = grouped(x, routing)
    mixed.square().mean().backward()
    assert all(weight.grad.isfinite().all() and weight.grad.dtype == torch.float32 for weight in grouped.parameters())
    low = grouped.bfloat16()(x.bfloat16(), routing)
    assert mixed.dtype == torch.float32 and low.dtype == torch.bfloat16
    for y in mixed, low.float():  # bfloat16 rounds to 8 bits, 0.4 %, of x and two matrices
        assert_close(y, exact, rtol=0, atol=0.02 * exact.abs().max().item())
        assert (y - exact).abs().max() > 1e-5  # it did compute in bfloat16


def test_no_tokens_at_all(in_one_call):
    grouped, x = GroupedExperts(4, 8, 16), torch.zeros(0, 5, 8)
    assert grouped(x, routed(0, 5, 4, k=2)).shape == (0, 5, 8)
    in_one_call(2)
    assert grouped(x, routed(0, 5, 4, k=2)).shape == (0, 5, 8)


@pytest.mark.parametrize("layout", [lambda x: x.transpose(0, 1), lambda x: x.mT.contiguous().mT, lambda x: x[..., ::2]])
def test_any_layout_in_memory(in_one_call, layout):
    x = layout(torch.randn(4, 6, 8))
    grouped, routing = GroupedExperts(4, x.shape[-1], 16), routed(*x.shape[:-1], 4, k=2)
    assert_same(grouped, x, routing)
    in_one_call(2)
    assert_same(grouped, x, routing)


def test_experts_without_tokens_get_a_gradient_of_zero_and_not_none():
    grouped, kept = GroupedExperts(4, 3, 5), torch.tensor([True, False, False, True]).expand(6, 4)
    grouped(torch.randn(6, 3), Routing(kept.float(), torch.zeros(6, 4), kept, kept)).square().sum().backward()
    for weight in grouped.parameters():
        assert torch.equal(weight.grad.flatten(1).any(dim=1), kept[0])


def test_order_of_the_tokens_does_not_matter():
    grouped, x, order = GroupedExperts(4, 8, 16), torch.randn(9, 8), torch.randperm(9)
    routing = routed(9, 4, k=2)
    shuffled = Routing(*(field[order] for field in (routing.gates, routing.logits, routing.chosen, routing.kept)))
    assert_close(grouped(x[order], shuffled), grouped(x, routing)[order], rtol=0, atol=1e-6)


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
    stacked = stack_weights(Experts(3, 4, 7, "gelu", bias))
    assert list(stacked) == list(grouped.state_dict())
    assert all(torch.equal(weight, stacked[name]) for name, weight in grouped.named_parameters())
    assert all(weight.is_leaf and weight.is_contiguous() for weight in grouped.parameters())


@pytest.mark.parametrize("bias", [False, True])
def test_weights_go_to_the_loop_and_back(bias):
    grouped = GroupedExperts(4, 3, 5, "gelu", bias, dropout=0.25).double().eval()
    loop = grouped.to_loop()
    assert not loop.training and loop[0].dropout.p == 0.25 and loop[0].activation is ACTIVATIONS["gelu"]
    shapes = {name: tuple(weight.shape) for name, weight in grouped.named_parameters()}
    assert shapes == {"up": (4, 5, 3), "down": (4, 3, 5)} | ({"up_bias": (4, 5), "down_bias": (4, 3)} if bias else {})
    again = GroupedExperts(4, 3, 5, "gelu", bias).double()
    again.load_state_dict(stack_weights(loop))
    assert all(torch.equal(again.get_parameter(name), weight) for name, weight in grouped.named_parameters())
    x, routing = torch.randn(6, 3, dtype=torch.float64), routed(6, 4, k=2, dtype=torch.float64)
    assert_close(grouped(x, routing), loop(x, routing), rtol=0, atol=1e-12)
    with torch.no_grad():  # a copy, not a view
        loop[0].up.weight.zero_()
    assert grouped.up[0].all()


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 5, 2), (5, 2, 4), (10, 4)])
def test_a_routing_for_other_tokens_or_experts_is_refused(shape):
    with pytest.raises(ValueError) as caught:
        GroupedExperts(4, 8, 16)(torch.randn(2, 5, 8), routed(*shape, k=1))
    assert str(caught.value) == f"the routing is of shape {shape}, these tokens and experts need (2, 5, 4)"


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
