"""Lesson 22: threshold gating and groups, against other people's code, as statistics, in a model, and in properties.

Rates are compared within 6 standard errors. By chance alone one comparison in 500 million fails; there are about 60.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from classroom.hidden import second_expert as hidden
from makemoe.capacity import CapacityRouter, limit_to_capacity
from makemoe.checkpoints import load_checkpoint, save_checkpoint
from makemoe.checks import second_expert as checks
from makemoe.checks.second_expert import OwnScores, balance_by_loop, taken_by_loop
from makemoe.data import CharTokenizer
from makemoe.dropless import GroupedExperts
from makemoe.gating import Routing, TopkRouter, top_k_gating
from makemoe.generation import generate
from makemoe.losses import load_balancing_loss, router_z_loss
from makemoe.model import ROUTERS, MoEConfig, SparseMoELanguageModel
from makemoe.second_expert import GroupedRouter, ThresholdRouter, threshold_gating
from makemoe.sparse_moe import Experts, SparseMoE


@pytest.mark.parametrize("those", [checks, hidden], ids=["visible", "hidden"])
def test_checks(those):
    those.check_threshold_gating(threshold_gating)
    those.check_threshold_router(ThresholdRouter)
    those.check_grouped_router(GroupedRouter)


# ---- the rule


@given(T=st.integers(1, 9), E=st.integers(1, 6), scale=st.sampled_from([0.1, 2.0, 50.0]), data=st.data())
def test_rule_equals_the_loop_and_a_larger_threshold_only_takes_away(T, E, scale, data):
    k = data.draw(st.integers(1, E))
    thresholds = data.draw(st.lists(st.floats(0.01, 2), min_size=k - 1, max_size=k - 1))
    logits, draws = scale * torch.randn(T, E), torch.rand(T, k)
    routing = threshold_gating(logits, k, thresholds, draws)
    gates, chosen = taken_by_loop(logits, torch.tensor(thresholds), draws)
    assert_close(routing.gates, gates)
    assert torch.equal(routing.chosen, chosen) and routing.dropped == 0
    assert routing.chosen.any(-1).all() and (routing.gates.sum(-1) < 1 + 1e-5).all()
    stricter = threshold_gating(logits, k, [1.5 * limit for limit in thresholds], draws)
    assert (stricter.chosen <= routing.chosen).all()


@pytest.mark.parametrize("k, thresholds", [(2, 0.5), (2, 0.2), (3, (0.9, 0.3)), (4, (0.2, 1.0, 0.1))])
def test_rates_are_the_probabilities(k, thresholds):
    router, N = ThresholdRouter(6, 8, k, thresholds), 20_000
    tokens = 2 * torch.randn(4, 6)
    chosen = router(tokens.repeat(N, 1)).chosen.view(N, 4, 8)
    best = router(tokens).logits.topk(k)
    limits = torch.tensor(thresholds if isinstance(thresholds, tuple) else [thresholds] * (k - 1))
    p = (best.values.softmax(-1)[:, 1:] / limits).clamp(max=1).double()
    rate = chosen.double().mean(0).gather(-1, best.indices)[:, 1:]
    assert ((rate - p).abs() <= 6 * (p * (1 - p) / N).sqrt() + 1e-12).all()


def test_relabelling_experts_permutes_the_answer():
    logits, draws, order = torch.randn(30, 6), torch.rand(30, 3), torch.randperm(6)
    one, two = (threshold_gating(scores, 3, 0.5, draws) for scores in (logits, logits[:, order]))
    assert torch.equal(one.gates[:, order], two.gates) and torch.equal(one.chosen[:, order], two.chosen)


def test_thresholds_0_and_inf_in_training():
    x = torch.randn(50, 6)
    for thresholds, k in (0.0, 2), (math.inf, 1):
        router = ThresholdRouter(6, 5, 2, thresholds)
        assert (router(x).chosen.sum(-1) == k).all() and torch.equal(router(x).gates, router.eval()(x).gates)
    plain = TopkRouter(6, 5, 2)
    router = ThresholdRouter(6, 5, 2, 0.0)
    router.load_state_dict(plain.state_dict())
    assert torch.equal(router(x).gates, plain(x).gates)


def test_losses_see_what_was_asked_for():
    routing = threshold_gating(torch.randn(64, 8), 2, 0.5, torch.rand(64, 2))
    f, P = routing.chosen.float().mean(0), routing.probs.mean(0)
    assert 1 < f.sum() < 2
    assert_close(load_balancing_loss(routing), 8 / f.sum() * (f * P).sum())


def test_choices_not_taken_take_no_slot():
    logits = torch.tensor([[4.0, 3.9, 0, 0], [4.0, 0, 3.9, 0], [4.0, 3.9, 0, 0], [3.9, 4.0, 0, 0]])[None]
    draws = torch.tensor([[0.5, 0.9], [0.5, 0.9], [0.5, 0.9], [0.5, 0.1]])[None]
    everyone = limit_to_capacity(threshold_gating(logits, 2, 0.0), 2)
    few = limit_to_capacity(threshold_gating(logits, 2, 1.0, draws), 2)
    assert not everyone.kept[0, 3, 1] and few.kept[0, 3, 1]  # expert 1 is the first choice of the last token
    assert (everyone.chosen & ~everyone.kept).sum() == 3 and (few.chosen & ~few.kept).sum() == 2


def test_loop_and_grouped_experts_agree():
    x, router = torch.randn(2, 30, 8), ThresholdRouter(8, 4, 3, (0.6, 0.3))
    routing, grouped = router(x), GroupedExperts(4, 8, 16, "relu", True, 0.0, top_k=3)
    assert (routing.kept.sum(-1) == 1).any() and (routing.kept.sum(-1) == 3).any()
    assert_close(grouped.to_loop()(x, routing), grouped(x, routing), rtol=1e-4, atol=1e-5)


# ---- in the model


def small(**changes):
    return MoEConfig(
        vocab_size=12, n_embd=16, n_head=2, n_layer=2, n_hidden=16, block_size=16, router="threshold", **changes
    )


def test_a_model_trains_writes_and_comes_back_from_its_file(tmp_path):
    assert ROUTERS["threshold"] is ThresholdRouter
    model = SparseMoELanguageModel(small(router_settings={"thresholds": 1.0}))
    assert all(block.moe.router.thresholds == 1.0 for block in model.blocks)
    ids = torch.randint(12, (2, 16))
    out = model(ids, ids)
    out.loss.backward()
    assert all(block.moe.router.linear.weight.grad.any() for block in model.blocks)
    assert any((r.kept.sum(-1) == 1).any() and (r.kept.sum(-1) == 2).any() for r in out.routings)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert generate(model, ids[:, :3], 5, seed=1).shape == (2, 8)
    save_checkpoint(tmp_path / "m.safetensors", model, CharTokenizer("abcdefghijkl"), [])
    again = load_checkpoint(tmp_path / "m.safetensors")[0]
    assert again.config == model.config and torch.equal(again(ids).logits, model(ids).logits)


def test_with_capacity_and_without_sense():
    model = SparseMoELanguageModel(small(capacity_factor=1.0, router_settings={"thresholds": 0.2}))
    assert model(torch.randint(12, (2, 16))).logits.isfinite().all()
    with pytest.raises(ValueError, match="^thresholds -1 should be a number of at least 0, or 1 of them$"):
        SparseMoELanguageModel(small(router_settings={"thresholds": -1}))
    with pytest.raises(ValueError, match="router_settings"):
        small(router_settings={"threshold": 0.2})


# ---- groups


def test_neighbours_matter_and_the_own_future_does_not():
    router = GroupedRouter(CapacityRouter(OwnScores(2), 0.5, minimum=1), 32)
    x = torch.randn(4, 16, 4) + torch.tensor([1.0, 0, 0, 0])
    other = x.clone()
    other[0] = torch.randn(16, 4)
    moved = (router(x).gates != router(other).gates).any(-1).any(-1).tolist()
    assert moved == [True, True, False, False]  # rows 0 and 1 are one group
    other = x.clone()
    other[:, 10:] = torch.randn(4, 6, 4)
    moved = (router(x).gates != router(other).gates).any(-1)  # (B, T)
    assert not moved[0, :10].any() and not moved[2, :10].any(), "the first row of a group sees no later token"
    assert moved[1, :10].any() or moved[3, :10].any(), "the next row sees the end of the one before"
    rows = GroupedRouter(CapacityRouter(OwnScores(2), 0.5, minimum=1), 16)
    assert torch.equal(rows(x).kept, rows.router(x).kept)


def test_one_token_at_a_time_is_refused_in_one_line():
    router = GroupedRouter(OwnScores(2), 8)
    with pytest.raises(ValueError, match="^1 tokens cannot be divided into groups of 8$"):
        router(torch.randn(1, 1, 4))


class Given(nn.Module):
    "Rounded probabilities of google/flaxformer's routing_test.py: they are the channels, and the gates of the best k."

    def __init__(self, top_k):
        super().__init__()
        self.top_k = top_k

    def forward(self, x):
        best = x.argsort(dim=-1, descending=True, stable=True)[..., : self.top_k]
        chosen = torch.zeros_like(x, dtype=torch.bool).scatter(-1, best, True)
        return Routing(x * chosen, x.log(), chosen, chosen)


def test_flaxformers_groups_keep_the_same():
    # google/flaxformer, architectures/moe/routing_test.py: two groups of four tokens, two slots,
    # k = 1; router_probs * 1024, and the experts that keep each token.
    probs = [
        [[252, 256, 260, 258], [249, 252, 260, 264], [250, 253, 262, 260], [256, 256, 258, 256]],
        [[253, 254, 255, 264], [251, 254, 260, 260], [251, 252, 260, 262], [249, 254, 262, 262]],
    ]
    kept = [[2], [3], [2], [], [3], [2], [3], [2]]
    x = torch.tensor(probs) / 1024
    one = GroupedRouter(CapacityRouter(Given(1), 2.0, priority="choice", minimum=1), 4)  # 2.0 * 1 * 4 / 4 = 2 slots
    for shape in (2, 4), (1, 8), (4, 2), (8,):
        rows = one(x.reshape(*shape, 4)).kept.reshape(8, 4)
        assert [row.nonzero().flatten().tolist() for row in rows] == kept


# ---- other people's code


def seeded(seed, *shape):
    torch.manual_seed(seed)
    return torch.rand(shape)


@pytest.mark.parametrize("k, thresholds", [(2, 0.2), (2, 0.5), (2, 0.0), (2, math.inf), (3, (0.3, 0.1))])
def test_st_moe_pytorch_takes_the_same_with_the_same_seed(k, thresholds):
    st_moe = pytest.importorskip("st_moe_pytorch.st_moe_pytorch", reason="pip install .[dev]")
    B, T, C, E = 3, 24, 8, 6
    for factor, slots in [(float(E), T), (1.0, 4), (1.5, 6)] if k == 2 else [(float(E), T)]:
        # with k = 3 and few slots theirs differs: a third choice waits behind all second ones, also behind those that
        # were not taken; for us it is then the second choice of its token
        gate = st_moe.TopNGating(
            C,
            E,
            top_n=k,
            threshold_train=thresholds,
            threshold_eval=thresholds,
            capacity_factor_train=factor,
            straight_through_dispatch_tensor=False,
        )
        x = 2 * torch.randn(B, T, C)
        logits = x @ gate.to_gates.weight.T
        torch.manual_seed(7)
        _, combine, balance, z = gate(x)
        routing = threshold_gating(logits, k, thresholds, seeded(7, B, T, k))
        limited = limit_to_capacity(routing, slots, "choice")
        assert_close(combine.sum(-1), limited.gates, atol=1e-6, rtol=1e-5)
        assert_close(z, router_z_loss(routing))
        # its balance loss is aliased: `mask_1` is a view, and loses the first choices that were dropped
        best = torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
        aliased = E * ((best * limited.kept).mean(-2) * routing.probs.mean(-2)).sum(-1).mean()
        assert_close(balance, aliased)
        if factor == E:
            assert_close(balance, balance_by_loop(logits))


def test_a_threshold_router_draws_as_st_moe_pytorch_does():
    st_moe = pytest.importorskip("st_moe_pytorch.st_moe_pytorch", reason="pip install .[dev]")
    gate = st_moe.TopNGating(8, 6, top_n=2, capacity_factor_train=6.0)
    router = ThresholdRouter(8, 6)  # 0.2 on both sides
    with torch.no_grad():
        router.linear.weight.copy_(gate.to_gates.weight), router.linear.bias.zero_()
    x = 3 * torch.randn(2, 20, 8)
    torch.manual_seed(3)
    theirs = gate(x)[1].sum(-1)
    torch.manual_seed(3)
    assert_close(router(x).gates, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("threshold", [0.2, 0.5])
def test_mixture_of_experts_takes_the_same_with_the_same_seed(threshold):
    theirs = pytest.importorskip("mixture_of_experts.mixture_of_experts", reason="pip install .[dev]")
    B, T, C, E = 3, 24, 8, 6
    for factor, slots in (float(E), T), (1.5, 6):
        gate = theirs.Top2Gating(C, E, second_threshold_train=threshold, capacity_factor_train=factor)
        x = torch.randn(B, T, C)
        torch.manual_seed(7)
        _, combine, balance = gate(x)
        logits, draw = x @ gate.w_gating, seeded(7, B, T)
        routing = threshold_gating(logits, 2, threshold, torch.stack([draw, draw], dim=-1))
        limited = limit_to_capacity(routing, slots, "choice")
        assert_close(combine.sum(-1), limited.gates, atol=1e-6, rtol=1e-5)
        assert_close(balance, balance_by_loop(logits))  # before dropping, as it should be
    gate.second_policy_train = "threshold"  # should take second gates above the threshold, but crashes
    with pytest.raises(RuntimeError, match="size of tensor"):
        gate(x)


def nllb(**settings):
    theirs = pytest.importorskip("transformers.models.nllb_moe.modeling_nllb_moe", reason="pip install .[dev]")
    import transformers

    if transformers.__version__ != "5.24.0":
        pytest.skip("what is said here is about transformers 5.24.0")
    config = theirs.NllbMoeConfig(
        d_model=8,
        num_experts=5,
        expert_capacity=64,
        router_bias=False,
        moe_eval_capacity_token_fraction=-1.0,
        moe_token_dropout=0.0,
        activation_dropout=0.0,
        normalize_router_prob_before_dropping=True,
        **settings,
    )
    return theirs, config


def test_nllb_router_weighs_the_random_second_expert_without_normalising():
    theirs, config = nllb(second_expert_policy="random")
    router, x = theirs.NllbMoeTop2Router(config), torch.randn(40, 8)
    logits = x @ router.classifier.weight.T
    torch.manual_seed(5)
    gates = router(x)[1]
    p = logits.softmax(-1).topk(2)
    draw = seeded(5, 40)
    full = top_k_gating(logits, 2).gates
    first = torch.zeros_like(full).scatter(-1, p.indices[:, :1], 1.0)
    taken = 2 * p.values[:, 1] > draw
    shipped = (
        full * first + logits.softmax(-1) * torch.zeros_like(full).scatter(-1, p.indices[:, 1:], 1.0) * taken[:, None]
    )
    assert_close(gates, shipped)
    ours = threshold_gating(logits, 2, 0.5, torch.stack([draw, draw], dim=-1))
    assert not torch.allclose(gates, ours.gates, atol=0.01)
    assert ours.load.sum() > (gates > 0).sum()  # normalised second gates are larger, and are taken more often


def test_nllb_layer_lets_two_experts_do_all_the_work():
    theirs, config = nllb(second_expert_policy="all")
    layer, x = theirs.NllbMoeSparseMLP(config, ffn_dim=12), torch.randn(2, 20, 8)
    y = layer(x)
    y.square().sum().backward()
    experts = [layer.experts[f"expert_{e}"] for e in range(5)]
    working = [any(w.grad is not None for w in expert.parameters()) for expert in experts]
    assert working == [True, True, False, False, False]
    routing = top_k_gating(layer.router(x.flatten(0, 1))[2], 2)
    first = (routing.gates * (routing.gates == routing.gates.amax(-1, keepdim=True))).sum(-1, keepdim=True)
    zero, one = (expert(x.flatten(0, 1)) for expert in experts[:2])
    assert_close(y.flatten(0, 1), first * one + (1 - first) * zero)
    right = sum(routing.gates[:, e, None] * expert(x.flatten(0, 1)) for e, expert in enumerate(experts))
    assert (y.flatten(0, 1) - right).abs().max() > 0.01


def test_a_layer_with_threshold_router_gives_every_expert_a_gradient():
    layer, x = SparseMoE(ThresholdRouter(8, 5, 2, 0.5), Experts(5, 8, 12)), torch.randn(4, 40, 8)
    layer(x)[0].square().sum().backward()
    assert all(expert.up.weight.grad.any() for expert in layer.experts)
