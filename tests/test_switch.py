"""Lesson 21: the checks, Hugging Face's router and layer, numbers of Flaxformer's tests, properties for any size."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import classroom.hidden.switch as hidden
import makemoe.checks.switch as checks
from makemoe.capacity import CapacityRouter, limit_to_capacity
from makemoe.experts import Expert
from makemoe.gating import TopkRouter, top_k_gating
from makemoe.losses import load_balancing_loss
from makemoe.model import ROUTERS, MoEConfig, SparseMoELanguageModel
from makemoe.sparse_moe import Experts, SparseMoE
from makemoe.switch import SwitchRouter, switch_gating


@pytest.mark.parametrize("place", [checks, hidden])
def test_the_module_passes_the_checks_of_the_lesson(place):
    place.check_switch_gating(switch_gating)
    place.check_switch_router(SwitchRouter)


@given(shape=st.lists(st.integers(1, 4), max_size=3), E=st.integers(1, 9), data=st.data())
def test_gates_are_the_largest_probabilities_for_any_shape(shape, E, data):
    k = data.draw(st.integers(1, E))
    logits = 3 * torch.randn(*shape, E, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 1000))))
    routing, probs = switch_gating(logits, k), logits.softmax(-1)
    assert (routing.chosen.sum(-1) == k).all() and torch.equal(routing.chosen, top_k_gating(logits, k).chosen)
    assert_close(routing.gates.sort(descending=True).values[..., :k], probs.topk(k).values)
    assert (routing.gates[~routing.chosen] == 0).all()


def test_gradient_equals_finite_differences():
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    for k in 1, 3:
        assert torch.autograd.gradcheck(lambda x, k=k: switch_gating(x, k).gates, logits)


def test_huge_logits_stay_finite():
    gates = switch_gating(torch.tensor([[1e30, -1e30, 0.0], [-1e30, -1e30, -1e30]])).gates
    assert_close(gates, torch.tensor([[1.0, 0.0, 0.0], [1 / 3, 0.0, 0.0]]))


def test_relabelling_experts_permutes_the_answer():
    logits, order = torch.randn(10, 8), torch.randperm(8)
    assert_close(switch_gating(logits[:, order], 2).gates, switch_gating(logits, 2).gates[:, order])


def test_the_jitter_repeats_with_its_seed_and_draws_one_number_for_each_channel_in_their_order():
    router, x = SwitchRouter(6, 5, 5, jitter=0.3), torch.randn(3, 4, 6)
    torch.manual_seed(1)
    gates = router(x).gates
    torch.manual_seed(1)
    factors = torch.empty(3, 4, 6).uniform_(0.7, 1.3)  # a trained model repeats itself only if this stays as it is
    assert_close(gates, router.linear(factors * x).softmax(-1))


@pytest.mark.parametrize("jitter", [0.0, 0.2])
def test_the_router_learns_from_the_answers_of_one_expert(jitter):
    router, experts = SwitchRouter(6, 4, jitter=jitter), Experts(4, 6, 8)
    y, _ = SparseMoE(router, experts)(torch.randn(30, 6))
    y.square().sum().backward()
    assert router.linear.weight.grad.any(dim=1).all() and router.linear.bias.grad.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_router_of_any_type_is_trained(dtype):
    router, x = SwitchRouter(16, 8, jitter=0.1).to(dtype), torch.randn(5, 16).to(dtype)
    routing = router(x)
    assert routing.logits.dtype == routing.gates.dtype == torch.float32
    (routing.gates * Expert(16, 8).to(dtype)(x).sum(-1, keepdim=True)).sum().backward()
    assert router.linear.weight.grad.dtype == dtype and router.linear.weight.grad.any()


def test_the_model_takes_it_by_name_with_its_setting_and_slots():
    config = MoEConfig(
        vocab_size=20, block_size=16, n_embd=16, n_head=2, n_layer=2, n_hidden=8, num_experts=4,
        router="switch", top_k=1, router_settings={"jitter": 0.01}, capacity_factor=1.0,
    )  # fmt: skip
    model = SparseMoELanguageModel(config)
    router = model.blocks[1].moe.router
    assert ROUTERS["switch"] is SwitchRouter and issubclass(SwitchRouter, TopkRouter)
    assert isinstance(router, CapacityRouter) and router.router.jitter == 0.01
    ids = torch.randint(20, (3, 16))
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)
    output = model(ids, ids)
    output.loss.backward()
    assert all(block.moe.router.router.linear.weight.grad.any() for block in model.blocks)
    assert SwitchRouter.__doc__.splitlines()[0].strip()  # shown by `python -m makemoe train --help`


# Hugging Face: transformers 5


def theirs(tokens=13, slots=4, jitter=0.0, E=6, C=12, F=8):
    "(Their layer, our experts and router with the same weights.)"
    switch = pytest.importorskip("transformers", reason="pip install .[dev]")
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    config = switch.SwitchTransformersConfig(
        d_model=C, d_ff=F, num_experts=E, expert_capacity=slots, router_jitter_noise=jitter, dropout_rate=0.0
    )
    layer = SwitchTransformersSparseMLP(config)
    for weight in layer.parameters():  # their layers, built alone, hold whatever was in the memory
        torch.nn.init.normal_(weight, std=0.5)
    router, experts = SwitchRouter(C, E, jitter=jitter), Experts(E, C, F, bias=False)
    router.linear.weight.data = layer.router.classifier.weight.data.clone()
    router.linear.bias.data.zero_()
    for e, expert in enumerate(experts):
        expert.up.weight.data = getattr(layer.experts, f"expert_{e}").wi.weight.data.clone()
        expert.down.weight.data = getattr(layer.experts, f"expert_{e}").wo.weight.data.clone()
    return layer, router, experts


@pytest.mark.parametrize("slots", [1, 2, 4, 13])
def test_gates_kept_and_answers_are_those_of_hugging_face(slots):
    layer, router, experts = theirs(slots=slots)
    x = torch.randn(3, 13, 12)
    kept, gate, logits = layer.router(x.clone())
    ours = limit_to_capacity(router(x), slots)
    assert torch.equal(ours.kept, kept.bool()) and ours.kept.any() and (slots > 2 or ours.dropped > 0)
    assert_close(ours.logits, logits)
    assert_close(ours.gates, gate * kept)
    answer = layer(x.clone())
    answer = answer[0] if isinstance(answer, tuple) else answer  # 4.57 returns a pair
    assert_close(experts(x, ours), answer, atol=1e-6, rtol=1e-5)


def test_gradients_are_those_of_hugging_face():
    layer, router, experts = theirs()
    x, mix = torch.randn(2, 13, 12), torch.randn(2, 13, 12)
    answer = layer(x.clone())
    ((answer[0] if isinstance(answer, tuple) else answer) * mix).sum().backward()
    (experts(x, limit_to_capacity(router(x), 4)) * mix).sum().backward()
    assert_close(router.linear.weight.grad, layer.router.classifier.weight.grad, atol=1e-5, rtol=1e-4)
    for e, expert in enumerate(experts):
        given = getattr(layer.experts, f"expert_{e}").wi.weight.grad
        assert_close(expert.up.weight.grad, torch.zeros(8, 12) if given is None else given, atol=1e-5, rtol=1e-4)


def test_the_jitter_draws_the_numbers_of_hugging_face_but_leaves_the_tokens_alone():
    layer, router, _ = theirs(jitter=0.3)
    x = torch.randn(2, 13, 12)
    changed, before = x.clone(), x.clone()
    torch.manual_seed(5)
    _, gate, _ = layer.router.train()(changed)
    torch.manual_seed(5)
    routing = router.train()(x)
    assert_close(routing.gates.sum(-1, keepdim=True), gate)
    assert torch.equal(x, before) and not torch.equal(changed, before)  # theirs: issue 33969


# Flaxformer: google/flaxformer, flaxformer/architectures/moe/routing_test.py. Its probabilities are rounded to
# bfloat16, so that some tie, and do not sum to 1 exactly: our gates times their sum are its gates.

SCATTER = [  # test_scatter_and_mask_dispatch_equal, one expert per token, slots by probability
    [[0.33203125, 0.33007812, 0.3359375], [0.33203125, 0.3359375, 0.33398438],
     [0.33398438, 0.33203125, 0.3359375], [0.33203125, 0.3359375, 0.33398438]],
    [[0.33007812, 0.34179688, 0.32617188], [0.33203125, 0.328125, 0.3359375],
     [0.33203125, 0.3359375, 0.33398438], [0.33007812, 0.34179688, 0.328125]],
]  # fmt: skip
ONE_SLOT = [  # test_tokens_choose_one_expert_mask_router, with and without slots by probability
    [[0.5078125, 0.49023438], [0.49804688, 0.50390625], [0.5, 0.5]],
    [[0.50390625, 0.49804688], [0.49414062, 0.5078125], [0.5, 0.49804688]],
]
FOUR = [  # test_tokens_choose_one_expert_scatter_router: two slots; two experts tie for the third token
    [[0.24609375, 0.25, 0.25390625, 0.25195312], [0.24316406, 0.24609375, 0.25390625, 0.2578125],
     [0.24414062, 0.24707031, 0.25585938, 0.25390625], [0.25, 0.25, 0.25195312, 0.25]],
    [[0.24707031, 0.24804688, 0.24902344, 0.2578125], [0.24511719, 0.24804688, 0.25390625, 0.25390625],
     [0.24511719, 0.24609375, 0.25390625, 0.25585938], [0.24316406, 0.24804688, 0.25585938, 0.25585938]],
]  # fmt: skip


@pytest.mark.parametrize(
    "probs, capacity, priority, experts, weights, balance",
    [
        (SCATTER, 2, "probability", [[2, 1, 2, 1], [1, 2, None, 1]],
         [[0.3359375] * 4, [0.34179688, 0.3359375, 0.0, 0.34179688]], 1.0045166),
        (ONE_SLOT, 1, "probability", [[0, 1, None], [0, 1, None]],
         [[0.5078125, 0.50390625, 0.0], [0.50390625, 0.5078125, 0.0]], 1.0006511),
        (ONE_SLOT, 1, "position", [[0, 1, None], [0, 1, None]],
         [[0.5078125, 0.50390625, 0.0], [0.50390625, 0.5078125, 0.0]], 1.0006511),
        (FOUR, 2, "probability", [[2, 3, 2, None], [3, 2, 3, 2]],
         [[0.25390625, 0.2578125, 0.25585938, 0.0], [0.2578125, 0.25390625, 0.25585938, 0.25585938]], 1.0166016),
        (FOUR, 2, "position", [[2, 3, 2, None], [3, 2, 3, 2]],
         [[0.25390625, 0.2578125, 0.25585938, 0.0], [0.2578125, 0.25390625, 0.25585938, 0.25585938]], 1.0166016),
    ],
)  # fmt: skip
def test_numbers_of_flaxformer(probs, capacity, priority, experts, weights, balance):
    probs = torch.tensor(probs)  # (groups, T, E)
    routing = switch_gating(probs.log())
    limited = limit_to_capacity(routing, capacity, priority)
    chosen = [[kept.nonzero().flatten().tolist() for kept in group] for group in limited.kept]
    assert chosen == [[[] if e is None else [e] for e in group] for group in experts]
    assert_close((limited.gates * probs.sum(-1, keepdim=True)).sum(-1), torch.tensor(weights), atol=1e-6, rtol=1e-5)
    raw = [SimpleNamespace(logits=p.log(), probs=p, chosen=c) for p, c in zip(probs, routing.chosen)]
    assert sum(map(load_balancing_loss, raw)).item() / 2 == pytest.approx(balance, abs=1e-5)


def test_the_balance_loss_of_flaxformer():
    probs = torch.tensor([[0.35490513, 0.60419905], [0.4275843, 0.23061597], [0.32985854, 0.43953657],
                          [0.25099766, 0.27730572], [0.7678207, 0.71474564]])  # fmt: skip
    chosen = torch.nn.functional.one_hot(torch.tensor([0, 1, 1, 0, 0])).bool()
    record = SimpleNamespace(logits=probs.log(), probs=probs, chosen=chosen)  # these do not sum to 1
    assert load_balancing_loss(record).item() == pytest.approx(0.8741045, abs=1e-6)  # test_load_balancing_loss
