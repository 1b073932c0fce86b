"Checks of lesson 27, balance by bias."

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F

from makemoe.checks import check, close, refuses, same, same_gradients, unchanged
from makemoe.experts import Expert
from makemoe.gating import top_k_gating
from makemoe.sparse_moe import Experts


def route_by_loop(logits, bias, k, groups=1, groups_kept=1, scale=1.0):
    "Gates and choices (N, E) of scores (N, E), token by token in plain Python."
    E = logits.shape[-1]
    size, rows, choices = E // groups, [], []
    for scores in logits.tolist():
        s = [math.exp(min(z, 0)) / (1 + math.exp(-abs(z))) for z in scores]
        biased = [s[e] + bias[e].item() for e in range(E)]
        worth = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        kept = sorted(range(groups), key=lambda g: -worth[g])[:groups_kept]
        allowed = [e for e in range(E) if e // size in kept]
        best = sorted(allowed, key=lambda e: -biased[e])[:k]
        total = sum(s[e] for e in best)
        rows.append([scale * s[e] / total if e in best else 0.0 for e in range(E)])
        choices.append([e in best for e in range(E)])
    return torch.tensor(rows), torch.tensor(choices)


def agrees(routing, logits, bias, k, what, **settings):
    "Assert that a routing of logits (N, E) is that of the loop."
    gates, chosen = route_by_loop(logits.detach(), bias, k, **settings)
    same(routing.chosen, chosen, f"chosen {what}")
    same(routing.kept, chosen, f"kept {what}")
    close(routing.gates, gates, f"gates {what}")
    same(routing.logits.detach(), logits.detach(), f"logits {what}")


def plain_gates(logits, chosen, scale=1.0):
    "s / (sum of the chosen s), to compare gradients with."
    s = logits.sigmoid() * chosen
    return scale * s / s.sum(dim=-1, keepdim=True)


@check
def check_sigmoid_gating(sigmoid_gating):
    yield "without a bias it chooses the largest scores and weighs them by their sigmoids, which then sum to 1"
    logits, none = 2 * torch.randn(30, 6), torch.zeros(6)
    with unchanged(logits=logits):
        for k in 1, 2, 6:
            agrees(sigmoid_gating(logits, k), logits, none, k, f"with k = {k}")
    yield "the bias is added to the sigmoid, and only for the choice"
    bias = torch.tensor([0.4, -0.3, 0.0, 0.2, -0.1, -0.4])
    with unchanged(logits=logits, bias=bias):
        routing = sigmoid_gating(logits, 2, bias)
    agrees(routing, logits, bias, 2, "with a bias")
    moved = sigmoid_gating(logits, 2, bias + 7)
    same(moved.chosen, routing.chosen, "chosen after 7 was added to all biases")
    close(moved.gates, routing.gates, "gates after 7 was added to all biases")
    yield "only the experts of the best groups are open, by the two best of each group"
    logits, bias = 2 * torch.randn(40, 12), torch.rand(12)
    for groups, kept in (3, 1), (4, 2), (6, 3), (3, 3), (2, 1):
        routing = sigmoid_gating(logits, 3, bias, groups=groups, groups_kept=kept)
        agrees(routing, logits, bias, 3, f"with {kept} of {groups} groups", groups=groups, groups_kept=kept)
    yield "groups of one expert"
    agrees(sigmoid_gating(logits, 2, bias, 12, 5), logits, bias, 2, "with 5 of 12", groups=12, groups_kept=5)
    yield "closed experts stay closed where all biased scores are negative"
    routing = sigmoid_gating(logits, 3, bias - 3, groups=4, groups_kept=2)
    agrees(routing, logits, bias - 3, 3, "with large negative biases", groups=4, groups_kept=2)
    yield "the gates are multiplied by scale, after they were made to sum to 1"
    agrees(sigmoid_gating(logits, 3, bias, scale=2.5), logits, bias, 3, "with scale 2.5", scale=2.5)
    yield "exactly k experts are chosen, also where scores are equal"
    for equal in torch.zeros(5, 8), torch.full((5, 8), 40.0):
        routing = sigmoid_gating(equal, 3, groups=4, groups_kept=2)
        same(routing.chosen.sum(dim=-1), torch.full((5,), 3), "the number of experts per token")
        close(routing.gates.sum(dim=-1), torch.ones(5), "the sum of the gates")
    yield "the gates sum to 1 also where all sigmoids are too small for float32"
    tiny = torch.tensor([[-200.0, -201.0, -300.0]])
    close(sigmoid_gating(tiny, 2).gates, torch.tensor([[0.7310586, 0.2689414, 0.0]]), "gates of very small scores")
    yield "the gradient of the gates reaches the scores as the formula says, and none reaches the bias"
    for training in True, False:
        logits = (2 * torch.randn(20, 8)).requires_grad_()
        bias = nn.Parameter(0.3 * torch.randn(8))
        routing = sigmoid_gating(logits, 3, bias, 4, 2, 1.5)
        same_gradients(routing.gates, plain_gates(logits, routing.chosen, 1.5), {"logits": logits}, "the gates")
        reached = torch.autograd.grad(routing.gates.sum(), bias, allow_unused=True)[0]
        assert reached is None or not reached.any(), "a gradient reaches the bias"
    yield "any dimensions may come before E, and the type stays"
    batch = torch.randn(2, 3, 4, 8)
    flat = sigmoid_gating(batch.view(-1, 8), 3, bias, 4, 2)
    close(sigmoid_gating(batch, 3, bias, 4, 2).gates, flat.gates.view(2, 3, 4, 8), "gates of (2, 3, 4, 8)")
    routing = sigmoid_gating(batch[0].to(torch.bfloat16), 3, bias.detach())
    assert routing.gates.dtype == torch.bfloat16, f"gates of bfloat16 scores are {routing.gates.dtype}"
    yield "groups that cannot be are refused in one line"
    refuses(ValueError, lambda: sigmoid_gating(torch.zeros(2, 8), 2, groups=3), "groups", "3", "8")
    refuses(ValueError, lambda: sigmoid_gating(torch.zeros(2, 8), 3, groups=4, groups_kept=1), "groups_kept", "3")
    refuses(ValueError, lambda: sigmoid_gating(torch.zeros(2, 8), 2, groups=4, groups_kept=5), "groups_kept", "5")


def scores(router, x):
    return F.linear(x.float(), router.linear.weight.float(), router.linear.bias.float())


def biased_router(BiasBalancedRouter, *sizes, **settings):
    "A router with biases of different sizes."
    router = BiasBalancedRouter(*sizes, **settings)
    router.bias.data.copy_(torch.linspace(-0.3, 0.3, sizes[1])[torch.randperm(sizes[1])])
    return router


@check
def check_bias_balanced_router(BiasBalancedRouter):
    yield "the bias is a buffer that is saved: zeros at first, no parameter, no gradient"
    router, x = BiasBalancedRouter(6, 8, 2), torch.randn(40, 6)
    close(router.bias, torch.zeros(8), "the bias at first")
    assert "bias" not in dict(router.named_parameters()), "the bias is a parameter: the optimizer would move it"
    assert "bias" in router.state_dict(), "the bias is not saved: it is not in state_dict()"
    router.bias.copy_(torch.linspace(-0.4, 0.4, 8))
    again = BiasBalancedRouter(6, 8, 2)
    again.load_state_dict(copy.deepcopy(router.state_dict()))
    same(again.eval()(x).chosen, router.eval()(x).chosen, "chosen by a router that was saved and loaded")
    yield "it routes by the sigmoids of its linear scores; the bias takes part in the choice alone"
    router = biased_router(BiasBalancedRouter, 6, 8, 2)
    for training in True, False:
        with unchanged(x=x, bias=router.bias):
            routing = router.train(training)(x)
        agrees(routing, scores(router, x), router.bias, 2, f"with training = {training}")
    yield "groups, groups_kept and scale have their effect"
    settings = dict(groups=4, groups_kept=2, scale=2.5)
    grouped = biased_router(BiasBalancedRouter, 6, 8, 3, **settings)
    agrees(grouped(x), scores(grouped, x), grouped.bias, 3, "with groups", **settings)
    yield "after_step adds bias_rate times the sign of the load error, minus the mean of the signs"
    router = biased_router(BiasBalancedRouter, 6, 8, 2, bias_rate=0.05)
    router.linear.weight.data.zero_()
    router.linear.bias.data = torch.tensor([4.0, 3.0] + [-1.0] * 6)  # all tokens choose experts 0 and 1
    before = router.bias.clone()
    router(torch.randn(50, 6))
    close(router.bias, before, "the bias after a forward pass and before after_step")
    router.after_step()
    expected = before + 0.05 * torch.tensor([-1.5, -1.5] + [0.5] * 6)
    close(router.bias, expected, "the bias after a step")
    yield "a step without tokens, and a step of balanced loads, move nothing"
    router.after_step()
    close(router.bias, expected, "the bias after a second step with no forward pass")
    fair = BiasBalancedRouter(4, 4, 1, bias_rate=0.1)
    fair.linear.weight.data, fair.linear.bias.data = torch.eye(4), torch.zeros(4)
    fair(torch.eye(4))
    fair.after_step()
    close(fair.bias, torch.zeros(4), "the bias after balanced loads")
    yield "all forward passes of a step count together, those of evaluation do not"
    router = biased_router(BiasBalancedRouter, 6, 8, 2, bias_rate=0.05)
    batches = torch.randn(3, 10, 6) + torch.tensor([3.0, -3.0, 1.0])[:, None, None] * torch.randn(3, 1, 6)
    before, counts = router.bias.clone(), sum(router(x).chosen.sum(dim=0) for x in batches).float()
    router.eval()(torch.randn(500, 6) + 2 * torch.randn(6))
    router.train().after_step()
    sign = (counts.mean() - counts).sign()
    close(router.bias, before + 0.05 * (sign - sign.mean()), "the bias after a step of three batches")
    yield "tokens (B, T) count like tokens (N,)"
    twins = BiasBalancedRouter(6, 8, 2), BiasBalancedRouter(6, 8, 2)
    twins[1].load_state_dict(twins[0].state_dict())
    for twin, x in zip(twins, (batches, batches.flatten(0, 1))):
        twin(x)
        twin.after_step()
    close(twins[0].bias, twins[1].bias, "the bias after tokens (B, T)")
    yield "the gradient reaches tokens and weights as the formula says, also in evaluation"
    for training in True, False:
        router = biased_router(BiasBalancedRouter, 6, 8, 2).train(training)
        x = torch.randn(30, 6, requires_grad=True)
        routing = router(x)
        formula = plain_gates(scores(router, x), routing.chosen)
        same_gradients(routing.gates, formula, {"x": x} | dict(router.named_parameters()), "the gates")
    yield "it computes in float32, also under autocast and for tokens and weights of another type"
    for dtype in torch.bfloat16, torch.float64:
        cast = copy.deepcopy(router).to(dtype)
        full, tokens = copy.deepcopy(cast).float(), x.detach().to(dtype)
        close(cast.train()(tokens).gates, full(tokens.float()).gates, f"gates in {dtype}")
        cast.after_step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = router(x)
    close(low.gates, router(x).gates, "gates under autocast")


@check
def check_shared_experts(SharedExperts):
    yield "the answer of the shared expert is added to that of the routed experts"
    routed, shared, x = Experts(5, 6, 8), Expert(6, 12), torch.randn(2, 9, 6)
    routing, layer = top_k_gating(torch.randn(2, 9, 5), 2), SharedExperts(routed, shared)
    with unchanged(x=x, gates=routing.gates):
        y = layer(x, routing)
    close(y, routed(x, routing) + shared(x), "the answer")
    yield "it does not depend on the gates: a token that no expert keeps gets the shared answer alone"
    nobody = top_k_gating(torch.randn(2, 9, 5), 2)
    nobody = type(nobody)(nobody.gates * 0, nobody.logits, nobody.chosen, nobody.kept & False)
    close(layer(x, nobody), shared(x), "the answer where nothing is kept")
    yield "gradients reach the tokens and both kinds of experts"
    x = x.requires_grad_()
    for training in True, False:
        layer.train(training)
        sources = {"x": x} | {f"experts.{name}": w for name, w in routed.named_parameters()}
        sources |= {f"shared.{name}": w for name, w in shared.named_parameters()}
        same_gradients(layer(x, routing), routed(x, routing) + shared(x), sources, "the answer")


def routed(router, ids):
    "The routing of a router that goes by ids, for tokens that are all different."
    router.ids = ids
    return router(torch.randn(*ids.shape, 4))


@check
def check_hash_router(HashRouter):
    yield "the id alone decides: not the token's vector, its place, its neighbours, the mode, or earlier calls"
    router, ids = HashRouter(4, 8, 2), torch.randint(60, (3, 20))
    first = routed(router, ids)
    for again in routed(router, ids), routed(router.eval(), ids), routed(HashRouter(4, 8, 2), ids):
        same(again.chosen, first.chosen, "chosen in a second call")
    order = torch.randperm(20)
    same(routed(router, ids[:, order]).chosen, first.chosen[:, order], "chosen in another order")
    same(routed(router, ids[1, 4:9]).chosen, first.chosen[1, 4:9], "chosen for five tokens alone")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state = torch.get_rng_state()
        router(torch.zeros(5, 4))
        same(torch.get_rng_state(), state, "the state of the random numbers")
    yield "top_k different experts with gates of 1 / top_k, nothing dropped, logits of 0"
    for E, k in (8, 2), (8, 1), (5, 3), (4, 4):
        routing = routed(HashRouter(4, E, k), ids)
        same(routing.chosen.sum(dim=-1), torch.full((3, 20), k), "the number of experts per token")
        close(routing.gates, routing.chosen.float() / k, "gates")
        same(routing.kept, routing.chosen, "kept")
        same(routing.logits, torch.zeros(3, 20, E), "logits")
    yield "it works for any vocabulary, and each expert gets about the same share of the ids"
    many = torch.cat([torch.arange(3000), 10**9 + torch.arange(3000)])
    for E, k in (8, 2), (6, 1):
        for half in routed(HashRouter(4, E, k), many).chosen.float().split(3000):
            share = half.mean(dim=0)
            error = ((share - k / E) / (k / E * (1 - k / E) / 3000) ** 0.5).abs().max()
            assert error < 5, f"an expert has {share.max():.3f} or {share.min():.3f} of the ids, not about {k / E:.3f}"
    yield "the experts of an id are independent: every pair of experts occurs about as often"
    pairs = routed(HashRouter(4, 6, 2), many).chosen.float()
    together = (pairs.T @ pairs)[torch.triu(torch.ones(6, 6), 1) == 1] / len(many)  # 15 pairs
    error = ((together - 1 / 15) / (14 / 225 / len(many)) ** 0.5).abs().max()
    assert error < 5, f"two experts share {together.max():.3f} or {together.min():.3f} of the ids, not about 0.067"
    yield "another seed gives another map"
    maps = [routed(HashRouter(4, 8, 2, seed=seed), many).chosen for seed in (0, 1, 2, 10**6)]
    for other in maps[1:]:
        alike = (maps[0] == other).all(dim=-1).float().mean()
        assert 0.01 < alike < 0.08, f"two seeds agree about {alike:.3f} of the ids; by chance it is 1 / 28 = 0.036"
    yield "it has no weights, and float32 gates whatever the type of x"
    assert not list(router.parameters()), "it has parameters"
    router.ids = ids
    close(router(torch.randn(3, 20, 4, dtype=torch.bfloat16)).gates, first.gates, "gates for x in bfloat16")
    router.ids = ids.int()
    same(router(torch.randn(3, 20, 4)).chosen, first.chosen, "chosen for ids of int32")
    yield "it refuses tokens without their ids, and settings out of range, in one line"
    refuses(ValueError, lambda: HashRouter(4, 8, 2)(torch.randn(3, 4)), "ids")
    router = HashRouter(4, 8, 2)
    router.ids = ids
    refuses(ValueError, lambda: router(torch.randn(3, 21, 4)), "ids", 21, 20)
    refuses(ValueError, lambda: HashRouter(4, 8, 9), "top_k", 9)
    refuses(ValueError, lambda: HashRouter(4, 8, 2, seed=-1), "seed", -1)
