"""Lesson 27: the checks, and what is too heavy for them.

Oracles: transformers' DeepSeek-V3 router and layer, and the slow loop of the checks. Then what belongs to the model:
training, checkpoints, generation.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import classroom.hidden.bias_balancing as hidden
import makemoe.checks.bias_balancing as checks
from makemoe.bias_balancing import (
    BiasBalancedRouter,
    FrozenRouter,
    HashRouter,
    SharedExperts,
    require_groups,
    scramble,
    sigmoid_gating,
)
from makemoe.capacity import CapacityRouter
from makemoe.checkpoints import load_checkpoint, save_checkpoint
from makemoe.checks.bias_balancing import route_by_loop
from makemoe.data import CharTokenizer
from makemoe.generation import generate
from makemoe.losses import imbalance, load_balancing_loss, router_z_loss
from makemoe.model import MoEConfig, SparseMoELanguageModel
from makemoe.training import TrainConfig, train

NAMES = "bias_balanced", "hash", "frozen"


@pytest.mark.parametrize("those", [checks, hidden], ids=["visible", "hidden"])
def test_checks(those):
    those.check_sigmoid_gating(sigmoid_gating)
    those.check_bias_balanced_router(BiasBalancedRouter)
    those.check_shared_experts(SharedExperts)
    those.check_hash_router(HashRouter)


# ---- sigmoid_gating


@given(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (6, 4), (12, 7)]), st.integers(1, 6), st.integers(0, 10**6))
def test_it_equals_the_slow_loop(groups, k, seed):
    groups, kept = groups
    generator = torch.Generator().manual_seed(seed)
    logits, bias = 3 * torch.randn(9, 12, generator=generator), torch.randn(12, generator=generator)
    routing = sigmoid_gating(logits, min(k, kept * 12 // groups), bias, groups, kept, 2.5)
    gates, chosen = route_by_loop(logits, bias, min(k, kept * 12 // groups), groups, kept, 2.5)
    assert torch.equal(routing.chosen, chosen)
    assert_close(routing.gates, gates)


def test_relabelling_experts_inside_groups_and_whole_groups_permutes_the_answer():
    logits, bias = torch.randn(50, 12), 0.3 * torch.randn(12)
    order = torch.tensor([8, 11, 9, 10, 1, 0, 3, 2, 6, 5, 4, 7])
    first, second = sigmoid_gating(logits, 3, bias, 3, 2), sigmoid_gating(logits[:, order], 3, bias[order], 3, 2)
    assert torch.equal(second.chosen, first.chosen[:, order])
    assert_close(second.gates, first.gates[:, order])


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e4])
def test_gates_are_shares_for_scores_of_any_size(size):
    logits = (size * torch.randn(40, 8)).requires_grad_()
    routing = sigmoid_gating(logits, 3, groups=4, groups_kept=3)
    assert_close(routing.gates.sum(dim=-1), torch.ones(40))
    assert (routing.gates[~routing.chosen] == 0).all() and (routing.chosen.sum(dim=-1) == 3).all()
    routing.gates.square().sum().backward()
    assert logits.grad.isfinite().all()


def test_gradients_equal_finite_differences():
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    bias = 0.1 * torch.randn(6)
    assert torch.autograd.gradcheck(lambda z: sigmoid_gating(z, 2, bias, 3, 2, 2.5).gates, logits)


@pytest.mark.parametrize(
    "sizes", [(8, 0, 1, 1), (8, 9, 1, 1), (8, 2, 3, 1), (8, 2, 0, 1), (8, 2, 2.5, 1), (8, 2, 4, 0), (8, 2, 4, 5),
              (8, 2, 4, 1.5), (8, 3, 4, 1), (8, 2, math.nan, 1), (8, 2.5, 1, 1)])  # fmt: skip
def test_impossible_groups_are_refused_in_one_line(sizes):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        require_groups(*sizes)


def test_whole_numbers_may_be_floats_as_the_command_line_gives_them():
    logits = torch.randn(9, 8)
    assert torch.equal(sigmoid_gating(logits, 2, None, 4.0, 2.0).chosen, sigmoid_gating(logits, 2, None, 4, 2).chosen)
    assert HashRouter(4, 8, 2, seed=3.0).seed == 3


# ---- transformers


def deepseek(E=8, k=3, groups=4, kept=2, scale=2.5):
    "A DeepSeek-V3 layer with random weights and biases, and its sizes."
    pytest.importorskip("transformers", reason="pip install .[dev]")
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=12, moe_intermediate_size=20, n_routed_experts=E, num_experts_per_tok=k, n_group=groups,
        topk_group=kept, n_shared_experts=2, routed_scaling_factor=scale, norm_topk_prob=True)  # fmt: skip
    config._experts_implementation = "eager"
    layer = DeepseekV3MoE(config).eval()
    for tensor in *layer.parameters(), layer.gate.e_score_correction_bias:
        torch.nn.init.normal_(tensor, std=0.5)
    return layer


def ours(layer, k=3, groups=4, kept=2, scale=2.5):
    "Our router with the weights of a DeepSeek-V3 layer."
    E, C = layer.gate.weight.shape
    router = BiasBalancedRouter(C, E, k, groups=groups, groups_kept=kept, scale=scale)
    router.linear.weight.data, router.linear.bias.data = layer.gate.weight.data, torch.zeros(E)
    router.bias.copy_(layer.gate.e_score_correction_bias)
    return router.eval()


@pytest.mark.parametrize("shift", [0.0, -2.0, 5.0])
@pytest.mark.parametrize("sizes", [(8, 3, 4, 2), (8, 2, 1, 1), (12, 4, 2, 1), (12, 4, 6, 4)])
def test_router_of_transformers(sizes, shift):
    layer = deepseek(*sizes)
    layer.gate.e_score_correction_bias += shift
    x = torch.randn(50, 12)
    with torch.no_grad():
        logits, weights, indices = layer.gate(x)
        routing = ours(layer, *sizes[1:])(x)
    assert_close(routing.logits, logits)
    assert torch.equal(routing.chosen, torch.zeros_like(routing.chosen).scatter(-1, indices, True))
    assert_close(routing.gates, torch.zeros_like(logits).scatter(-1, indices, weights), rtol=0, atol=1e-6)


class Gated(torch.nn.Module):
    "down(silu(gate x) * up x), from the stacked rows of a DeepSeek-V3 expert: first the gate, then the values."

    def __init__(self, rows, down):
        super().__init__()
        self.rows, self.down = rows, down

    def forward(self, x):
        gate, value = (x @ self.rows.T).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * value) @ self.down.T


def test_layer_of_transformers_with_shared_experts():
    layer = deepseek()
    pairs = zip(layer.experts.gate_up_proj, layer.experts.down_proj)
    many = torch.nn.ModuleList(Gated(rows, down) for rows, down in pairs)
    one = layer.shared_experts
    shared = Gated(torch.cat([one.gate_proj.weight, one.up_proj.weight]), one.down_proj.weight)

    def routed(x, routing):
        return sum(routing.gates[..., e, None] * expert(x) for e, expert in enumerate(many))

    x = torch.randn(2, 13, 12)
    with torch.no_grad():
        y = SharedExperts(routed, shared)(x, ours(layer)(x))
        assert_close(y, layer(x), rtol=1e-5, atol=2e-5)


# ---- the bias


def test_a_lopsided_router_is_balanced_by_its_bias_alone():
    router, x = BiasBalancedRouter(16, 8, 2, bias_rate=0.01), torch.randn(400, 16) + torch.randn(16)
    before = {name: weight.clone() for name, weight in router.named_parameters()}
    first = imbalance([router(x).load.tolist()])[0]
    for _ in range(150):
        router.after_step()
        last = imbalance([router(x).load.tolist()])[0]
    assert first > 1.8 and last < 1.15
    assert all(torch.equal(weight, before[name]) for name, weight in router.named_parameters())
    assert router.bias.mean().abs() < 1e-6


def test_losses_and_capacity_take_its_routing():
    router, x = BiasBalancedRouter(16, 8, 2), torch.randn(3, 20, 16)
    limited = CapacityRouter(router, capacity_factor=1.0, minimum=1)(x)
    assert limited.load.max() <= 15 and router.counts.sum() == 120  # what was asked for counts, not what was kept
    (load_balancing_loss(limited) + router_z_loss(limited)).backward()
    assert router.linear.weight.grad.any()


@pytest.mark.parametrize(
    "settings, word",
    [(dict(bias_rate=-0.1), "bias_rate"), (dict(bias_rate=math.inf), "bias_rate"), (dict(scale=0), "scale"),
     (dict(groups=3), "groups"), (dict(groups=4, groups_kept=0), "groups_kept"), (dict(top_k=9), "top_k")])  # fmt: skip
def test_settings_out_of_range_are_refused_in_one_line(settings, word):
    with pytest.raises(ValueError, match=rf"^[^\n]*{word}[^\n]*$"):
        BiasBalancedRouter(**dict(n_embd=6, num_experts=8, top_k=2) | settings)


def test_evaluation_moves_nothing_and_large_loads_are_counted_exactly():
    router, x = BiasBalancedRouter(4, 2, 1, bias_rate=0.1), torch.zeros(1, 4).expand(5000, 4)
    router.linear.bias.data = torch.tensor([0.0, 1.0])
    router.eval()(x)
    router.after_step()
    assert not router.bias.any()
    for _ in range(3):
        router.train().bfloat16()(x)
    assert router.counts.tolist() == [0, 15_000]
    router.float().after_step()
    assert_close(router.bias, torch.tensor([0.1, -0.1]))


# ---- the hash


def test_the_hash_never_changes():
    values = scramble(torch.tensor([0, 1, 2, 255, 2**32 - 1, 2**32, -1]))
    assert values.tolist() == [
        0,
        824515495,
        1722258072,
        602665863,
        539527247,
        0,
        539527247,
    ]  # a checkpoint of a hash router is worth nothing with another map
    router = HashRouter(4, 8, 2)
    router.ids = torch.arange(6)
    assert router(torch.zeros(6, 4)).chosen.nonzero()[:, 1].view(6, 2).tolist() == [
        [3, 7],
        [2, 6],
        [4, 6],
        [0, 1],
        [2, 5],
        [4, 7],
    ]


def test_the_hash_is_one_to_one():
    assert scramble(torch.arange(200_000)).unique().numel() == 200_000


# ---- in the model


def small(router, **changes):
    return MoEConfig(**dict(vocab_size=20, block_size=16, n_embd=16, n_head=2, n_layer=2, num_experts=4, n_hidden=16,
                            router=router) | changes)  # fmt: skip


@pytest.mark.parametrize("router", NAMES)
def test_a_model_trains_is_saved_and_writes(router, tmp_path):
    settings = dict(bias_rate=0.01) if router == "bias_balanced" else {}
    tokenizer = CharTokenizer("abcdefghijklmnopqrst")
    model, ids = SparseMoELanguageModel(small(router, router_settings=settings)), torch.randint(20, (2000,))
    held = {name: value.clone() for name, value in model.named_buffers()}
    history = train(model, ids, ids, TrainConfig(steps=12, batch_size=4, warmup=2, eval_every=6, eval_blocks=4))
    assert history[-1]["val_loss"] < history[0]["val_loss"]
    moved = {name for name, value in model.named_buffers() if not torch.equal(value, held[name])}
    assert moved == ({f"blocks.{i}.moe.router.bias" for i in range(2)} if router == "bias_balanced" else set())
    save_checkpoint(tmp_path / "model.safetensors", model, tokenizer, history)
    again, *_ = load_checkpoint(tmp_path / "model.safetensors")
    assert torch.equal(again(ids[None, :16]).logits, model(ids[None, :16]).logits)
    assert all(torch.equal(a, b) for a, b in zip(again.buffers(), model.buffers()))
    assert generate(model, ids[None, :5], 4, temperature=0).shape == (1, 9)


@pytest.mark.parametrize("router", NAMES)
def test_a_row_does_not_depend_on_later_tokens_or_on_other_rows(router):
    model = SparseMoELanguageModel(small(router, num_experts=8)).eval()
    ids = torch.randint(20, (3, 16))
    other = ids.clone()
    other[0, 9:], other[1] = torch.randint(20, (7,)), torch.randint(20, (16,))
    first, second = model(ids).logits, model(other).logits
    assert_close(first[0, :9], second[0, :9])
    assert_close(first[2], second[2])


@pytest.mark.parametrize("router", NAMES)
def test_loop_and_grouped_experts_agree(router):
    torch.manual_seed(0)
    grouped = SparseMoELanguageModel(small(router))
    loop = SparseMoELanguageModel(replace(grouped.config, experts="loop"))
    for ours, theirs in zip(grouped.blocks, loop.blocks):
        theirs.load_state_dict({name: value for name, value in ours.state_dict().items() if ".experts." not in name},
                               strict=False)  # fmt: skip
        theirs.moe.experts = ours.moe.experts.to_loop()
    for part in "token_embedding", "norm", "lm_head":
        getattr(loop, part).load_state_dict(getattr(grouped, part).state_dict())
    ids = torch.randint(20, (2, 16))
    assert_close(loop(ids).logits, grouped(ids).logits)


def test_a_frozen_router_decides_and_never_learns():
    router, x = FrozenRouter(16, 8, 2), torch.randn(500, 16, requires_grad=True)
    routing = router(x)
    assert (routing.load > 0).all() and routing.gates.amax(dim=-1).mean() > 0.6
    assert not list(router.parameters()) and "weight" in router.state_dict()
    routing.gates.square().sum().backward()
    assert x.grad.any()
    for dtype in torch.bfloat16, torch.float64:
        assert router.to(dtype)(x.detach().to(dtype)).gates.dtype == torch.float32
    with pytest.raises(ValueError, match="top_k"):
        FrozenRouter(16, 8, 9)


def test_gradient_accumulation_counts_all_parts_and_repeated_passes_move_nothing():
    router = BiasBalancedRouter(16, 8, 2)
    parts = torch.randn(4, 10, 16) + torch.randn(4, 1, 16)
    for part in parts:
        router(part)
    assert router.counts.sum() == 80 and not router.bias.any()
    router.after_step()
    once = BiasBalancedRouter(16, 8, 2)
    once.load_state_dict(router.state_dict() | {"bias": torch.zeros(8)})
    once(parts)
    once.after_step()
    assert torch.equal(once.bias, router.bias)
