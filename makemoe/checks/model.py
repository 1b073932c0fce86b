"""Checks of lesson 10, model."""

import math
from types import SimpleNamespace

import torch
from torch import nn

from makemoe.checks import check, close, refuses, same, same_gradients, unchanged
from makemoe.dropless import GroupedExperts
from makemoe.gating import Routing, TopkRouter
from makemoe.losses import load_balancing_loss, router_z_loss
from makemoe.sparse_moe import Experts, SparseMoE

SIZES = dict(vocab_size=11, block_size=12, n_embd=16, n_head=2, n_layer=2, num_experts=3, top_k=2, n_hidden=8)


def shaken(module, std=0.5):
    "Random numbers in every parameter, norms and biases too: nothing is 1 or 0 by accident."
    for weight in module.parameters():
        nn.init.normal_(weight, std=std)
    return module


def same_routing(got, want, what="the routing"):
    assert isinstance(got, Routing), f"{what} is a {type(got).__name__}, but should be a Routing"
    for field in "gates", "logits", "chosen", "kept":
        close(getattr(got, field), getattr(want, field), f"{field} of {what}")


class Memory:
    "What attention asks of a cache: its length, and to append keys and values (B, H, T, D)."

    def __init__(self):
        self.parts = []

    def __len__(self):
        return sum(keys.shape[-2] for keys, _ in self.parts)

    def append(self, keys, values):
        self.parts.append((keys, values))
        return tuple(torch.cat(tensors, dim=-2) for tensors in zip(*self.parts))


def block_by_hand(block, x, scale=1.0):
    "(stream after the block, its routing), from the parts of the block."
    middle = x + block.attention(block.norm1(x))
    routing = block.moe.router(block.norm2(middle))
    return middle + scale * block.moe.experts(block.norm2(middle), routing), routing


def model_by_hand(model, ids):
    "(logits, routings), from the parts of the model."
    x = model.token_embedding.weight[ids]
    if model.config.positions == "learned":
        x = x + model.position_embedding.weight[: ids.shape[1]]
    routings = []
    for block in model.blocks:
        x, routing = block_by_hand(block, x, model.config.routed_scaling_factor)
        routings.append(routing)
    return model.norm(x) @ model.lm_head.weight.T + model.lm_head.bias, routings


def losses_by_hand(config, logits, targets, routings):
    "(lm_loss, aux_loss)"
    log_probs = logits.float().log_softmax(dim=-1)
    lm_loss = -torch.stack(
        [log_probs[b, t, targets[b, t]] for b, t in torch.cartesian_prod(*map(torch.arange, targets.shape))]
    ).mean()
    per_block = [config.balance_coef * load_balancing_loss(r) + config.z_coef * router_z_loss(r) for r in routings]
    return lm_loss, sum(per_block) / len(per_block)


@check
def check_block(Block, MoEConfig):
    block, x = shaken(Block(MoEConfig(**SIZES))), torch.randn(2, 6, 16, requires_grad=True)
    yield "attention and mixture each read through a norm and add to the residual stream; the routing is returned"
    for mode in "training", "evaluation":
        block.train(mode == "training")
        after, routing = block_by_hand(block, x)
        with unchanged(x=x):
            answer = block(x)
        assert isinstance(answer, tuple) and len(answer) == 2, (
            f"a block returns (x, routing), not a {type(answer).__name__}"
        )
        close(answer[0], after, f"the stream after the block in {mode} mode")
        same_routing(answer[1], routing)
        same_gradients(
            answer[0],
            after,
            {"x": x, **dict(block.named_parameters())},
            f"the stream in {mode} mode",
            rtol=1e-3,
            atol=1e-4,
        )
        same_gradients(answer[1].logits, routing.logits, {"x": x}, "the logits of the routing", rtol=1e-3, atol=1e-4)
    yield "the factor multiplies only the mixture's answer"
    for norm in "rms", "layer":
        loud = shaken(Block(MoEConfig(**SIZES, routed_scaling_factor=3.0, norm=norm)))
        close(loud(x)[0], block_by_hand(loud, x, 3.0)[0], "the stream with a factor of 3")
    yield "the routing is the one that was used, also when a noisy router would decide differently a second time"
    noisy = shaken(Block(MoEConfig(**SIZES, router="noisy")))
    after, routing = noisy(x)
    middle = x + noisy.attention(noisy.norm1(x))
    close(
        after, middle + noisy.moe.experts(noisy.norm2(middle), routing), "the stream by the routing that was returned"
    )
    yield "if attention and experts answer 0, the stream does not change"
    silent = Block(MoEConfig(**SIZES, bias=True))
    for name, weight in silent.named_parameters():
        if "proj" in name or "down" in name:
            nn.init.zeros_(weight)
    same(silent(x)[0].detach(), x.detach(), "the stream after answers of 0")
    yield "dropout acts only inside attention and experts"
    lossy = shaken(Block(MoEConfig(**SIZES, dropout=0.5)))
    streams = []
    for run in block_by_hand, Block.__call__:
        torch.manual_seed(1)
        streams.append(run(lossy, x)[0])
    close(streams[1], streams[0], "the stream in training, drawn with the same seed")
    yield "read in pieces with a cache, it returns the same"
    memory = Memory()
    pieces = [block.eval()(piece, memory)[0] for piece in x.split([4, 1, 1], dim=1)]
    close(torch.cat(pieces, dim=1), block(x)[0], "the stream in pieces of 4, 1 and 1 tokens")
    assert len(memory) == 6, f"the cache should have 6 tokens, not {len(memory)}"


def same_output(model, ids, targets, what):
    "All outputs of the model, and all gradients, against its parts."
    logits, routings = model_by_hand(model, ids)
    lm_loss, aux_loss = losses_by_hand(model.config, logits, targets, routings)
    with unchanged(ids=ids, targets=targets):
        output = model(ids, targets)
    close(output.logits, logits, f"logits, {what}", rtol=1e-4, atol=1e-5)
    close(output.lm_loss, lm_loss, f"lm_loss, {what}", rtol=1e-4)
    close(output.aux_loss, aux_loss, f"aux_loss, {what}", rtol=1e-4)
    close(output.loss, lm_loss + aux_loss, f"loss, {what}", rtol=1e-4)
    assert isinstance(output.routings, tuple), f"routings are a {type(output.routings).__name__}, but should be a tuple"
    assert len(output.routings) == len(routings), f"{len(output.routings)} routings of {len(routings)} blocks"
    for layer, (routing, other) in enumerate(zip(output.routings, routings)):
        same_routing(routing, other, f"routing {layer}, {what}")
    same_gradients(
        output.loss, lm_loss + aux_loss, dict(model.named_parameters()), f"loss, {what}", rtol=1e-3, atol=1e-5
    )


@check
def check_language_model(SparseMoELanguageModel, MoEConfig):
    yield "init_weights: norms 1, biases 0, matrices normal with 0.02, writers with 0.02 / sqrt(2 L)"
    wide = dict(
        vocab_size=40,
        block_size=16,
        n_embd=32,
        n_hidden=48,
        num_experts=2,
        norm="layer",
        positions="learned",
        bias=True,
    )
    for experts, n_layer in ("loop", 1), ("grouped", 4):
        fresh = SparseMoELanguageModel(MoEConfig(**wide, experts=experts, n_layer=n_layer))
        for weight in fresh.parameters():
            nn.init.constant_(weight, 7.0)
        fresh.init_weights()
        for name, weight in fresh.named_parameters():
            if weight.dim() == 1 or name.endswith("bias"):
                same(weight.detach(), torch.full_like(weight, 0.0 if name.endswith("bias") else 1.0), name)
                continue
            std = 0.02 / math.sqrt(2 * n_layer) if name.endswith(("proj.weight", "down", "down.weight")) else 0.02
            n = weight.numel()
            assert abs(weight.std() / std - 1) < 6 / math.sqrt(2 * n), (
                f"{name}: deviation {weight.std():.4f}, but should be {std:.4f}"
            )
            assert abs(weight.mean()) < 6 * std / math.sqrt(n), f"{name}: mean {weight.mean():.4f}, but should be 0"
            assert n < 1000 or weight.abs().max() > 2.5 * std, (
                f"{name} is not normal: nothing lies beyond 2.5 deviations"
            )
    down = fresh.blocks[0].moe.experts.down.detach().clone()
    assert not torch.equal(down[0], down[1]), "two experts start with the same weights"
    fresh.init_weights()
    assert not torch.equal(down, fresh.blocks[0].moe.experts.down), (
        "each call should draw other numbers: do not set the seed"
    )
    yield "the same as its parts, run by hand, in all outputs and gradients"
    ids, targets = torch.randint(11, (2, 2, 7))
    for settings in (
        dict(positions="rotary"),
        dict(positions="learned", z_coef=0.5, routed_scaling_factor=2.0, norm="layer"),
    ):
        model = shaken(SparseMoELanguageModel(MoEConfig(**SIZES, **settings)), std=0.4)
        same_output(model, ids, targets, f"{settings['positions']} positions, training mode")
        same_output(model.eval(), ids, targets, f"{settings['positions']} positions, evaluation mode")
        assert not model.training, "forward has changed the mode of the model"
    yield "dropout acts only inside the blocks, and the loss in training is the cross-entropy"
    lossy, outputs = shaken(SparseMoELanguageModel(MoEConfig(**SIZES, dropout=0.5)), std=0.4), []
    for run in model_by_hand, SparseMoELanguageModel.__call__:
        torch.manual_seed(1)
        outputs.append(run(lossy, ids))
    close(outputs[1].logits, outputs[0][0], "logits in training, drawn with the same seed", rtol=1e-4, atol=1e-5)
    output = lossy(ids, targets)
    close(
        output.lm_loss,
        losses_by_hand(lossy.config, output.logits, targets, output.routings)[0],
        "lm_loss in training",
        rtol=1e-4,
    )
    yield "without targets there is no loss"
    output = model(ids)
    assert output.loss is output.lm_loss is output.aux_loss is None, "without targets all three losses should be None"
    yield "read in pieces with a cache for each block, it returns the same"
    memory = [Memory() for _ in model.blocks]
    pieces = [model(piece, cache=memory).logits for piece in ids.split([4, 1, 2], dim=1)]
    close(torch.cat(pieces, dim=1), model(ids).logits, "logits in pieces of 4, 1 and 2 tokens", rtol=1e-4, atol=1e-5)
    assert [len(part) for part in memory] == [7] * 2, "each block should have a cache of its own with all 7 tokens"
    yield "a full context is accepted; more is refused, and the caches do not change"
    model(torch.randint(11, (1, 12)))
    refuses(ValueError, lambda: model(torch.randint(11, (1, 13))), 13, 12)
    refuses(ValueError, lambda: model(torch.randint(11, (2, 6)), cache=memory), 13, 12)
    assert [len(part) for part in memory] == [7] * 2, "a refused call should leave the caches as they were"
    yield "new tensors are made on the device of the ids, and the loss is float32 under autocast too"
    with torch.device("meta"):
        answer = model(ids, targets)
    assert answer.logits.device.type == answer.loss.device.type == "cpu", "something was made on another device"
    close(answer.logits, model(ids).logits, "logits")
    with torch.autocast("cpu", torch.bfloat16):
        low = model(ids, targets)
    assert low.lm_loss.dtype == low.loss.dtype == torch.float32, f"lm_loss is {low.lm_loss.dtype} under autocast"


def stand_in(experts, E, k, C=6, H=8):
    "A model with as many parts as `count_parameters` needs."

    def block():
        return nn.ModuleDict(
            dict(attention=nn.Linear(C, C), norm=nn.RMSNorm(C), moe=SparseMoE(TopkRouter(C, E, k), experts(E, C, H)))
        )

    model = nn.Module()
    model.token_embedding, model.lm_head = nn.Embedding(9, C), nn.Linear(C, 9)
    model.blocks, model.config = nn.ModuleList(block() for _ in range(3)), SimpleNamespace(num_experts=E, top_k=k)
    return model


def count_by_hand(E, k, C=6, H=8, tied=False):
    per_expert = C * H + H + H * C + C
    ends = 9 * C * (1 if tied else 2) + 9
    return tuple(ends + 3 * (C * C + C + C + (C + 1) * E + n * per_expert) for n in (E, k))


def same_counts(got, want, what):
    "Both numbers, each of them an int."
    for number, right, name in zip(got, want, ("total", "active")):
        same(number, right, f"{name} with {what}")


@check
def check_count_parameters(count_parameters):
    yield "all parameters, and those that work for one token"
    for experts in GroupedExperts, Experts:
        for E, k in (4, 2), (3, 3):
            same_counts(count_parameters(stand_in(experts, E, k)), count_by_hand(E, k), f"{k} of {E} experts")
    yield "a parameter used in two places counts once; one that is not trained counts too"
    tied = stand_in(GroupedExperts, 4, 2).requires_grad_(False)
    tied.lm_head.weight = tied.token_embedding.weight
    same_counts(count_parameters(tied), count_by_hand(4, 2, tied=True), "a shared, frozen matrix")


@check
def check_tie_weights(tie_weights):
    model = shaken(stand_in(GroupedExperts, 4, 2))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    tied = tie_weights(model)
    yield "one parameter in two places, and the same model is returned"
    assert tied is model, "the model that was handed in should be returned"
    assert model.lm_head.weight is model.token_embedding.weight, "head and embedding do not hold the same parameter"
    same(
        sum(weight.numel() for weight in model.parameters()),
        count_by_hand(4, 2, tied=True)[0],
        "the number of parameters",
    )
    yield "the embedding, the bias and everything else keep their values"
    for name, weight in model.named_parameters():
        same(weight.detach(), before[name], name)
    assert model.lm_head.bias is not None, "the head has lost its bias"
    yield "the head computes with it, and gradients reach it"
    h = torch.randn(2, 6)
    logits = model.lm_head(h)
    close(logits, h @ before["token_embedding.weight"].T + before["lm_head.bias"], "logits")
    logits.square().sum().backward()
    gradient = model.token_embedding.weight.grad
    assert gradient is not None and gradient.abs().sum(dim=-1).all(), (
        "through the head every character should get a gradient"
    )


@check
def check_mixtral_parameters(mixtral_parameters):
    yield "Mixtral 8x7B has 46.7 billion parameters, and 12.9 billion of them are active"
    same_counts(mixtral_parameters(), (46_702_792_704, 12_879_925_248), "the sizes of Mixtral 8x7B")
    yield "other sizes: attention 144, router 30, norms 12 and 180 an expert in each of 3 blocks, and 90 at the ends"
    small = dict(dim=6, n_layers=3, head_dim=4, hidden_dim=10, n_heads=2, n_kv_heads=1, vocab_size=7)
    same_counts(mixtral_parameters(**small, num_experts=5, top_k=3), (3348, 2268), "3 of 5 experts")
    same_counts(mixtral_parameters(**small, num_experts=1, top_k=1), (1116, 1116), "one expert")
