"""Lesson 10. The oracles: a loop over the model's own parts, and parameter counts from a formula of the sizes."""

import itertools
import math
from dataclasses import FrozenInstanceError, asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from makemoe.attention import KVCache
from makemoe.experts import ACTIVATIONS
from makemoe.gating import Routing
from makemoe.losses import importance_loss, load_balancing_loss, router_z_loss
from makemoe.model import Block, LMOutput, MoEConfig, SparseMoELanguageModel, count_parameters
from makemoe.sparse_moe import Experts

SIZES = dict(vocab_size=13, block_size=12, n_embd=16, n_head=2, n_layer=3, num_experts=4, n_hidden=8)
KINDS = [
    dict(router=router, positions=positions, norm=norm, bias=norm == "layer", activation=activation, experts=experts)
    for (router, positions, norm), activation, experts in zip(
        itertools.product(("topk", "noisy"), ("rotary", "learned"), ("rms", "layer")),
        itertools.cycle(("relu", "gelu", "squared_relu")),
        itertools.cycle(("loop", "loop", "grouped", "grouped", "grouped")),
    )
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))


def random_model(seed=0, std=0.4, **changes):
    "A small model whose every parameter is random, so that no norm is 1, no bias 0 and no logit small by accident."
    model = SparseMoELanguageModel(MoEConfig(**SIZES | changes))
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        nn.init.normal_(weight, std=std, generator=generator)
    return model.eval()


def gradients(experts):
    "For each expert of a layer, of either kind, the gradients of its weights."
    if isinstance(experts, Experts):
        return [[weight.grad for weight in expert.parameters()] for expert in experts]
    return [[weight.grad[e] for weight in experts.parameters()] for e in range(len(experts.up))]


def relabel(experts, order):
    "Give the experts of a layer, of either kind, other numbers."
    if isinstance(experts, Experts):
        originals = list(experts)
        for place, e in enumerate(order.tolist()):
            experts[place] = originals[e]
    else:
        for weight in experts.parameters():
            weight.data = weight.data[order]


def by_hand(model, ids):
    "(logits, gates of each layer), written out without Block.forward."
    x = model.token_embedding.weight[ids]
    if model.config.positions == "learned":
        x = x + model.position_embedding.weight[: ids.shape[1]]
    gates = []
    for block in model.blocks:
        x = x + block.attention(block.norm1(x))
        routing = block.moe.router(block.norm2(x))
        x = x + block.moe.experts(block.norm2(x), routing)
        gates.append(routing.gates)
    return model.norm(x) @ model.lm_head.weight.T + model.lm_head.bias, gates


# -- the block


@every_kind
def test_block_adds_what_attention_and_experts_say_about_the_normed_stream(kind):
    block, x = random_model(**kind).blocks[1], torch.randn(2, 7, 16)
    middle = x + block.attention(block.norm1(x))
    routing = block.moe.router(block.norm2(middle))
    after, answer = block(x)
    assert isinstance(answer, Routing)
    assert_close(after, middle + block.moe.experts(block.norm2(middle), routing))
    assert_close(answer.gates, routing.gates)
    assert_close(answer.logits, routing.logits)


def test_block_does_not_write_into_its_input():
    block, x = random_model().blocks[0], torch.randn(2, 7, 16)
    before = x.clone()
    block(x)
    assert torch.equal(x, before)


def test_block_returns_the_routing_that_it_carried_out():
    "A noisy router draws anew whenever it is asked."
    block, x = random_model(router="noisy").blocks[0].train(), torch.randn(2, 7, 16)
    after, routing = block(x)
    middle = x + block.attention(block.norm1(x))
    assert_close(after, middle + block.moe.experts(block.norm2(middle), routing))


def test_block_leaves_the_stream_alone_if_nobody_writes():
    block, x = random_model().blocks[0], torch.randn(2, 7, 16)
    for name, weight in block.named_parameters():
        if "proj" in name or "down" in name:
            nn.init.zeros_(weight)
    assert torch.equal(block(x)[0], x)


def test_block_hears_no_loudness():
    "What a block adds depends on the direction of a token, not on its length: norms stand in front of both readers."
    block, x = random_model().blocks[0], 10 * torch.randn(2, 7, 16)
    for name, weight in block.named_parameters():
        if "proj" in name:
            nn.init.zeros_(weight)  # the second step reads x itself
    assert_close(block(1000 * x)[0] - 1000 * x, block(x)[0] - x, rtol=0, atol=0.01)


def test_block_has_the_parts_that_the_config_names():
    block = Block(MoEConfig(**SIZES, router="noisy", norm="layer", top_k=3, bias=True))
    assert type(block.moe.router).__name__ == "NoisyTopkRouter" and block.moe.router.top_k == 3
    assert isinstance(block.norm1, nn.LayerNorm) and isinstance(block.norm2, nn.LayerNorm)
    assert block.norm1 is not block.norm2
    for name, activation in ACTIVATIONS.items():
        experts = Block(MoEConfig(**SIZES, activation=name, experts="loop")).moe.experts
        assert all(expert.activation is activation for expert in experts)
    assert block.attention.proj.bias is not None and block.moe.experts.up_bias is not None
    plain = Block(MoEConfig(**SIZES))
    assert plain.attention.rotary and not Block(MoEConfig(**SIZES, positions="learned")).attention.rotary
    assert type(plain.moe.router).__name__ == "TopkRouter" and isinstance(plain.norm1, nn.RMSNorm)
    assert plain.attention.proj.bias is None and plain.moe.experts.up_bias is None


# -- the model


@every_kind
def test_model_equals_the_loop_by_hand(kind):
    model, ids = random_model(**kind), torch.randint(13, (2, 9))
    output = model(ids)
    logits, gates = by_hand(model, ids)
    assert isinstance(output, LMOutput) and output.loss is None
    assert_close(output.logits, logits)
    assert isinstance(output.routings, tuple) and len(output.routings) == 3
    for routing, expected in zip(output.routings, gates):
        assert routing.gates.shape == (2, 9, 4)
        assert_close(routing.gates, expected)
    weights = list(model.parameters())
    ours, theirs = (torch.autograd.grad(out.square().mean(), weights, allow_unused=True) for out in (output.logits, logits))
    for one, other in zip(ours, theirs):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


@every_kind
def test_loss_is_the_cross_entropy_of_the_targets_as_they_are(kind):
    model, (ids, targets) = random_model(**kind), torch.randint(13, (2, 3, 8))
    output = model(ids, targets)
    by_token = [-output.logits[b, t].log_softmax(-1)[targets[b, t]] for b in range(3) for t in range(8)]
    assert_close(output.lm_loss, torch.stack(by_token).mean())
    assert_close(output.lm_loss, F.cross_entropy(output.logits.transpose(1, 2), targets))
    assert_close(output.loss, output.lm_loss + output.aux_loss)
    assert_close(output.logits, model(ids).logits)  # targets only add the loss


@every_kind
def test_rows_of_a_batch_do_not_touch(kind):
    model, ids = random_model(**kind), torch.randint(13, (4, 9))
    together, alone = model(ids), [model(row[None]) for row in ids]
    assert_close(together.logits, torch.cat([output.logits for output in alone]))
    for layer, routing in enumerate(together.routings):
        assert_close(routing.gates, torch.cat([output.routings[layer].gates for output in alone]))


def test_new_cache_is_empty_and_one_for_each_layer():
    cache = random_model().new_cache()
    assert len(cache) == 3 and len(set(map(id, cache))) == 3
    assert all(isinstance(layer, KVCache) and len(layer) == 0 for layer in cache)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_tokens_beyond_the_block_are_refused(positions):
    model = random_model(positions=positions)
    model(torch.zeros(1, 12, dtype=torch.long))  # exactly a block is fine
    with pytest.raises(ValueError):
        model(torch.zeros(1, 13, dtype=torch.long))
    cache = model.new_cache()
    model(torch.zeros(1, 10, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError):
        model(torch.zeros(1, 3, dtype=torch.long), cache=cache)
    assert [len(layer) for layer in cache] == [10] * 3  # refused before anything was written


@every_kind
def test_order_of_tokens_matters(kind):
    "In a single layer without positions the last token could not tell in which order the others came."
    model, ids = random_model(n_layer=1, **kind), torch.arange(6)[None]
    swapped = ids[:, [2, 0, 1, 4, 3, 5]]
    assert not torch.allclose(model(ids).logits[0, -1], model(swapped).logits[0, -1], atol=1e-3)


@every_kind
def test_relabelling_experts_changes_no_logit(kind):
    model, ids = random_model(**kind), torch.randint(13, (2, 9))
    before = model(ids)
    orders = [torch.randperm(4) for _ in model.blocks]
    for block, order in zip(model.blocks, orders):
        for layer in (module for module in block.moe.router.modules() if isinstance(module, nn.Linear)):
            layer.weight.data, layer.bias.data = layer.weight.data[order], layer.bias.data[order]
        relabel(block.moe.experts, order)
    after = model(ids)
    assert_close(after.logits, before.logits)
    for old, new, order in zip(before.routings, after.routings, orders):
        assert_close(new.gates, old.gates[..., order])


@every_kind
@pytest.mark.parametrize("shape", [(1, 1), (4, 12)], ids=["one token", "48 tokens"])
def test_gradients_reach_everything_but_experts_that_nobody_chose(kind, shape):
    model, (ids, targets) = random_model(std=0.2, **kind).train(), torch.randint(13, (2, *shape))
    output = model(ids, targets)
    output.loss.backward()
    loads = [load for routing in output.routings for load in routing.load.tolist()]
    experts = [weights for block in model.blocks for weights in gradients(block.moe.experts)]
    for weights, load in zip(experts, loads, strict=True):
        assert all((grad is not None and bool(grad.any())) == (load > 0) for grad in weights)
    for name, weight in model.named_parameters():
        if ".experts." not in name:
            assert weight.grad is not None and weight.grad.any(), name


def test_dropout_and_noise_rest_in_evaluation():
    model = random_model(dropout=0.5, router="noisy")
    ids = torch.randint(13, (2, 9))
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.allclose(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("silent", ["proj", "down"])
def test_dropout_falls_on_attention_and_on_experts(silent):
    block, x = random_model(dropout=0.5).blocks[0].train(), torch.randn(2, 7, 16)
    for name, weight in block.named_parameters():
        if silent in name:
            nn.init.zeros_(weight)
    assert not torch.allclose(block(x)[0], block(x)[0])


def test_loss_is_float32_under_bfloat16_autocast():
    model, (ids, targets) = random_model(), torch.randint(13, (2, 3, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, targets)
    assert output.loss.dtype == torch.float32
    assert_close(output.lm_loss, F.cross_entropy(output.logits.float().transpose(1, 2), targets))


def test_weights_go_through_a_state_dict():
    model, ids = random_model(**KINDS[-1]), torch.randint(13, (2, 9))
    copy = SparseMoELanguageModel(model.config)
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.eval()(ids).logits, model(ids).logits)


# -- initialisation


@every_kind
def test_initial_weights(kind):
    "Of n >= 768 normal numbers, mean and deviation are off by more than 6 sigma with probability < 1e-8 a matrix."
    n_layer = 8 if kind["experts"] == "grouped" else 2
    config = MoEConfig(vocab_size=50, block_size=48, n_embd=48, n_hidden=48, num_experts=16, n_layer=n_layer, **kind)
    model = SparseMoELanguageModel(config)
    for weight in model.parameters():
        nn.init.constant_(weight, 7.0)
    model.init_weights()  # sets every parameter, whatever was there
    for name, weight in model.named_parameters():
        if weight.dim() == 1 or name.endswith("bias"):
            assert (weight == (0 if name.endswith("bias") else 1)).all(), name
        else:
            writes = "attention.proj" in name or "down" in name
            std = 0.02 / {8: 4, 2: 2}[n_layer] if writes else 0.02  # sqrt(2 * layers)
            assert abs(weight.std() - std) < 6 * std / math.sqrt(2 * weight.numel()), name
            assert abs(weight.mean()) < 6 * std / math.sqrt(weight.numel()), name
            assert weight.abs().max() > 2 * std, name  # not uniform: then nothing would be beyond 1.74


def test_experts_and_layers_start_out_different():
    model = SparseMoELanguageModel(MoEConfig(**SIZES))
    matrices = [matrix for weight in model.parameters() if weight.dim() > 1 for matrix in (weight if weight.dim() == 3 else [weight])]
    for one, other in itertools.combinations(matrices, 2):
        assert one.shape != other.shape or not torch.equal(one, other)


@pytest.mark.parametrize("n_layer", [1, 4, 16])
def test_the_stream_hardly_grows_at_any_depth(n_layer):
    model = SparseMoELanguageModel(MoEConfig(n_embd=64, n_hidden=128, n_layer=n_layer))
    x = start = model.token_embedding(torch.randint(64, (8, 32)))
    with torch.no_grad():
        for block in model.blocks:
            x, _ = block(x)
    assert 1 < x.std() / start.std() < 1.3


def test_same_seed_same_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return SparseMoELanguageModel(MoEConfig(**SIZES)).state_dict()

    one, again, other = weights(3), weights(3), weights(4)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


# -- parameters


def formula(c):
    "(total, active) from the sizes alone."
    C, H, E, bias = c.n_embd, c.n_hidden, c.num_experts, int(c.bias)
    norm = C if c.norm == "rms" else 2 * C
    attention = 4 * C * C + bias * C
    router = (C + 1) * E * (2 if c.router == "noisy" else 1)
    expert = 2 * C * H + bias * (H + C)
    ends = c.vocab_size * C + (c.positions == "learned") * c.block_size * C + norm + (C + 1) * c.vocab_size
    return tuple(ends + c.n_layer * (attention + router + n * expert + 2 * norm) for n in (E, c.top_k))


def test_with_all_experts_at_work_everything_is_active():
    total, active = count_parameters(random_model(top_k=4))
    assert total == active


@pytest.mark.parametrize("kind", KINDS[::3], ids=lambda kind: "-".join(map(str, kind.values())))
def test_counts_of_small_models(kind):
    for top_k in 1, 3:
        model = random_model(top_k=top_k, **kind)
        assert count_parameters(model) == formula(model.config)


def test_shared_parameters_count_once_and_frozen_ones_like_others():
    model = random_model()
    total, active = count_parameters(model)
    model.requires_grad_(False)
    model.lm_head.weight = model.token_embedding.weight
    assert count_parameters(model) == (total - 13 * 16, active - 13 * 16)


# -- the factor on the mixture's answer


def test_the_factor_multiplies_what_the_mixture_says_and_nothing_else():
    quiet, loud = random_model(n_layer=1), random_model(n_layer=1, routed_scaling_factor=2.5)  # the same weights
    x = torch.randn(2, 5, 16)
    stream = x + quiet.blocks[0].attention(quiet.blocks[0].norm1(x))
    (y, routing), (z, same) = quiet.blocks[0](x), loud.blocks[0](x)
    torch.testing.assert_close(z - stream, 2.5 * (y - stream))
    torch.testing.assert_close(same.gates, routing.gates)


def test_with_the_factor_k_two_experts_with_equal_gates_are_one_wide_layer():
    model = random_model(n_layer=1, num_experts=2, top_k=2, routed_scaling_factor=2.0)
    block, x = model.blocks[0], torch.randn(3, 4, 16)
    nn.init.zeros_(block.moe.router.linear.weight)
    nn.init.zeros_(block.moe.router.linear.bias)
    stream = x + block.attention(block.norm1(x))
    answers = [expert(block.norm2(stream)) for expert in block.moe.experts.to_loop()]
    torch.testing.assert_close(block(x)[0], stream + sum(answers))


# -- config


def test_presets():
    assert MoEConfig.laptop() == MoEConfig(routed_scaling_factor=2.0, balance_coef=0.02)
    blog = asdict(MoEConfig.blog())
    sizes = dict(vocab_size=65, block_size=32, n_embd=128, n_head=8, n_layer=8, num_experts=8, top_k=2, n_hidden=512)
    choices = dict(router="noisy", positions="learned", norm="layer", activation="relu", bias=True, dropout=0.1)
    assert sizes.items() | choices.items() <= blog.items()
    for preset in MoEConfig.laptop, MoEConfig.gpu, MoEConfig.blog:
        assert asdict(preset(n_layer=3, vocab_size=50)) == asdict(preset()) | dict(n_layer=3, vocab_size=50)


def test_config_cannot_be_changed_afterwards():
    with pytest.raises(FrozenInstanceError):
        MoEConfig().n_layer = 3


@pytest.mark.parametrize(
    "name", ["vocab_size", "block_size", "n_embd", "n_head", "n_layer", "num_experts", "top_k", "n_hidden"]
)
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_must_be_positive(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}, but must be at least 1$"):
        MoEConfig(**{name: value})


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(router="top2"), "router is 'top2', but must be one of topk, noisy"),
        (dict(positions="sine"), "positions is 'sine', but must be one of rotary, learned"),
        (dict(norm="batch"), "norm is 'batch', but must be one of rms, layer"),
        (dict(activation="tanh"), "activation is 'tanh', but must be one of relu, gelu, squared_relu"),
        (dict(top_k=9), "top_k = 9 experts per token, but there are only num_experts = 8"),
        (dict(n_embd=130), "n_embd = 130 channels cannot be divided among n_head = 4 heads"),
        (dict(n_embd=132), "rotary positions turn pairs of channels, but a head has n_embd / n_head = 33: choose an"),
        (dict(dropout=1.0), "dropout is 1.0, but must be at least 0 and below 1"),
        (dict(dropout=-0.1), "dropout is -0.1, but must be at least 0 and below 1"),
    ],
)
def test_what_cannot_work_is_refused_in_words(changes, message):
    with pytest.raises(ValueError) as caught:
        MoEConfig(**changes)
    assert str(caught.value).startswith(message)


def test_bounds_that_are_fine():
    MoEConfig(top_k=8, num_experts=8, dropout=0.0)
    MoEConfig(n_embd=132, positions="learned")  # only rotary needs pairs
    MoEConfig(n_embd=1, n_head=1, n_layer=1, vocab_size=1, block_size=1, n_hidden=1, positions="learned")


# -- what lessons 07 to 09 bring in


def test_grouped_experts_and_the_loop_are_the_same_model():
    grouped, loop = random_model(), random_model(experts="loop")
    weights = grouped.state_dict()
    for layer, block in enumerate(grouped.blocks):
        for name in [name for name in weights if name.startswith(f"blocks.{layer}.moe.experts.")]:
            del weights[name]
        for name, weight in block.moe.experts.to_loop().state_dict().items():
            weights[f"blocks.{layer}.moe.experts.{name}"] = weight
    loop.load_state_dict(weights)
    ids, targets = torch.randint(13, (2, 4, 12))
    ours, theirs = grouped(ids, targets), loop(ids, targets)
    assert_close(ours.logits, theirs.logits)
    assert_close(ours.loss, theirs.loss)
    assert count_parameters(grouped) == count_parameters(loop)


def test_aux_loss_is_taken_per_layer_weighted_and_averaged():
    model = random_model(balance_coef=0.5, importance_coef=0.25, z_coef=2.0)
    for mode in True, False:
        output = model.train(mode)(*torch.randint(13, (2, 3, 9)))
        by_layer = [0.5 * load_balancing_loss(r) + 0.25 * importance_loss(r) + 2.0 * router_z_loss(r) for r in output.routings]
        assert_close(output.aux_loss, sum(by_layer) / 3)
        assert_close(output.loss, output.lm_loss + output.aux_loss)


def test_aux_loss_reaches_the_routers_and_zero_coefficients_cost_nothing():
    ids, targets = torch.randint(13, (2, 3, 9))
    model = random_model()
    assert MoEConfig().balance_coef == 0.01 and MoEConfig.blog().balance_coef == 0
    model(ids, targets).aux_loss.backward()
    assert all(block.moe.router.linear.weight.grad.any() for block in model.blocks)
    free = random_model(balance_coef=0.0)(ids, targets)
    assert free.aux_loss == 0 and free.loss == free.lm_loss
    silent = random_model()(ids)
    assert silent.loss is silent.lm_loss is silent.aux_loss is None


def test_capacity_drops_in_training_and_spares_evaluation():
    model, ids = random_model(capacity_factor=0.5, block_size=48), torch.randint(13, (2, 48))
    assert all(routing.dropped == 0 for routing in model.eval()(ids).routings)
    output = model.train()(ids)
    assert all(routing.dropped > 0 for routing in output.routings)
    assert all((routing.load <= 2 * 12).all() for routing in output.routings)  # 2 rows, 0.5 * 2 * 48 / 4 seats
    assert all(routing.dropped == 0 for routing in random_model().train()(ids[:, :12]).routings)


LEAKS = {"position": False, "choice": True, "probability": True}


@pytest.mark.parametrize("priority", LEAKS)
@pytest.mark.parametrize("router", ["topk", "noisy"])
def test_only_position_keeps_a_model_with_capacity_causal(router, priority):
    "The other two are expected to leak: a later token may take the seat of an earlier one."
    model = random_model(router=router, block_size=48, capacity_factor=0.5, eval_capacity_factor=0.5, priority=priority)
    ids = torch.randint(13, (20, 48))
    other = torch.cat([ids[:, :40], torch.randint(13, (20, 8))], dim=1)
    same = torch.allclose(model(ids).logits[:, :40], model(other).logits[:, :40], atol=1e-5)
    assert same is not LEAKS[priority]


@pytest.mark.parametrize("priority", LEAKS)
@pytest.mark.parametrize("router", ["topk", "noisy"])
def test_rows_do_not_disturb_each_other_even_with_capacity(router, priority):
    model = random_model(router=router, capacity_factor=0.5, eval_capacity_factor=0.5, priority=priority)
    ids = torch.randint(13, (4, 12))
    assert_close(torch.cat([model(row[None]).logits for row in ids]), model(ids).logits)


@pytest.mark.parametrize("wrong", [
    dict(experts="many"), dict(priority="chance"), dict(balance_coef=-0.1), dict(z_coef=float("nan")), dict(capacity_factor=0.0),
    dict(routed_scaling_factor=0.0),
])
def test_nonsense_in_the_new_fields_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MoEConfig(**wrong)


# -- what takes longer


@pytest.fixture(scope="module", params=["blog", "laptop", "gpu"])
def preset_model(request):
    torch.manual_seed(1337)
    return SparseMoELanguageModel(getattr(MoEConfig, request.param)()).eval()


def test_counts_of_the_presets(preset_model):
    total, active = count_parameters(preset_model)
    assert type(total) is type(active) is int
    assert (total, active) == formula(preset_model.config)
    known = {MoEConfig.blog(): (8_996_545, 2_674_369), MoEConfig.gpu(): (31_923_184, 10_689_520)}
    assert (total, active) == known.get(preset_model.config, (4_478_176, 1_332_448))


def test_first_loss_is_the_logarithm_of_the_vocabulary(preset_model):
    config = preset_model.config
    ids, targets = torch.randint(config.vocab_size, (2, 512 // config.block_size, config.block_size))
    with torch.no_grad():
        excess = preset_model(ids, targets).lm_loss.item() - math.log(config.vocab_size)
    assert abs(excess) < 0.1
    assert abs(excess - config.n_embd * 0.02**2 / 2) < 0.06  # logits of variance C * 0.02**2 cost half of that


configs = st.builds(
    lambda heads, pairs, experts, k, **rest: MoEConfig(
        n_embd=2 * heads * pairs, n_head=heads, num_experts=experts, top_k=min(k, experts), **rest
    ),
    heads=st.integers(1, 4), pairs=st.integers(1, 5), experts=st.integers(1, 7), k=st.integers(1, 7),
    vocab_size=st.integers(1, 90), block_size=st.integers(1, 40), n_layer=st.integers(1, 3),
    n_hidden=st.integers(1, 30), router=st.sampled_from(["topk", "noisy"]),
    positions=st.sampled_from(["rotary", "learned"]), norm=st.sampled_from(["rms", "layer"]), bias=st.booleans(),
)


@given(config=configs)
@settings(max_examples=20)
def test_counts_equal_the_formula(config):
    assert count_parameters(SparseMoELanguageModel(config)) == formula(config)


def test_active_parameters_are_the_work_of_a_token():
    "Counted by PyTorch: two operations for each active matrix weight, the embedding aside, as it is only looked up."
    from torch.utils.flop_counter import FlopCounterMode

    model = random_model()
    ids = torch.randint(13, (2, 10))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    per_operation = counter.get_flop_counts()["Global"].items()
    products = sum(flops for operation, flops in per_operation if "attention" not in str(operation))
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    matrices = count_parameters(model)[1] - vectors - model.token_embedding.weight.numel()
    assert products == 2 * matrices * ids.numel()


@every_kind
@given(T=st.integers(2, 12), data=st.data())
@settings(max_examples=6)
def test_no_token_sees_the_future(kind, T, data):
    t = data.draw(st.integers(1, T - 1))
    model, ids = random_model(**kind), torch.randint(13, (2, T))
    changed = torch.cat([ids[:, :t], (ids[:, t:] + torch.randint(1, 13, (2, T - t))) % 13], dim=1)
    before, after = model(ids).logits, model(changed).logits
    assert_close(after[:, :t], before[:, :t])
    assert ((after[:, t] - before[:, t]).abs().amax(-1) > 1e-3).all()  # and it does look at itself


@every_kind
@given(pieces=st.lists(st.integers(1, 5), min_size=1, max_size=4).filter(lambda pieces: sum(pieces) <= 12))
@settings(max_examples=6)
def test_read_in_pieces_with_a_cache_equals_read_at_once(kind, pieces):
    model = random_model(**kind)
    ids, cache = torch.randint(13, (2, sum(pieces))), model.new_cache()
    outputs = [model(piece, cache=cache) for piece in ids.split(pieces, dim=1)]
    whole = model(ids)
    assert [len(layer) for layer in cache] == [sum(pieces)] * 3
    assert_close(torch.cat([output.logits for output in outputs], dim=1), whole.logits)
    for layer, routing in enumerate(whole.routings):
        assert_close(torch.cat([output.routings[layer].gates for output in outputs], dim=1), routing.gates)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]], ids=["ours", "article"])
def test_one_batch_is_learned_by_heart(kind):
    model = SparseMoELanguageModel(MoEConfig(**SIZES | dict(n_embd=32, n_hidden=64), balance_coef=0.0, **kind))
    text = torch.randint(13, (4, 13))
    text[:, 0] = torch.arange(4)  # four different beginnings, so that every next token can be known
    ids, targets = text[:, :-1], text[:, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model(ids, targets).loss.backward()
        optimizer.step()
    assert model.eval()(ids, targets).lm_loss < 0.5  # 0.01 to 0.15, depending on the seed; a shrug is 2.56
