"Hidden cases for lesson 27: other sizes and settings than students can see."

import torch

from makemoe.checks import check, close, same
from makemoe.checks.bias_balancing import agrees, biased_router, plain_gates, routed, scores
from makemoe.experts import Expert
from makemoe.gating import top_k_gating
from makemoe.sparse_moe import Experts


@check
def check_sigmoid_gating(sigmoid_gating):
    yield "15 experts in 5 groups, large scores and biases"
    logits, bias = 6 * torch.randn(30, 15), 2 * torch.randn(15)
    routing = sigmoid_gating(logits, 4, bias, 5, 3, 0.5)
    agrees(routing, logits, bias, 4, "with 3 of 5 groups", groups=5, groups_kept=3, scale=0.5)


@check
def check_bias_balanced_router(BiasBalancedRouter):
    yield "ten steps, each of another batch"
    router = biased_router(BiasBalancedRouter, 5, 9, 3, bias_rate=0.02, groups=3, groups_kept=2)
    expected = router.bias.clone()
    for _ in range(10):
        x = torch.randn(4, 7, 5) + torch.randn(5)
        settings = dict(groups=3, groups_kept=2)
        flat = scores(router, x).flatten(0, 1).detach()
        routing = router(x)
        close(routing.gates.detach(), plain_gates(scores(router, x), routing.chosen).detach(), "gates")
        agrees(
            type(routing)(*(field.flatten(0, 1) for field in vars(routing).values())), flat, expected, 3, "", **settings
        )
        load = routing.chosen.flatten(0, 1).sum(dim=0).float()
        sign = (load.mean() - load).sign()
        expected = expected + 0.02 * (sign - sign.mean())
        router.after_step()
        close(router.bias, expected, "the bias")


@check
def check_shared_experts(SharedExperts):
    yield "wide shared experts, one routed expert per token"
    experts, shared, x = Experts(3, 4, 2), Expert(4, 32, "gelu"), torch.randn(11, 4)
    routing = top_k_gating(torch.randn(11, 3), 1)
    close(SharedExperts(experts, shared)(x, routing), experts(x, routing) + shared(x), "the answer")


@check
def check_hash_router(HashRouter):
    yield "ten experts, four for each id, seed 7"
    router, ids = HashRouter(4, 10, 4, seed=7), torch.arange(5000).view(2, 2500)
    routing = routed(router, ids)
    same(routing.chosen.sum(dim=-1), torch.full((2, 2500), 4), "the number of experts per token")
    same(routed(router, ids.flip(1)).chosen, routing.chosen.flip(1), "chosen in another order")
    share = routing.chosen.flatten(0, 1).float().mean(dim=0)
    assert (share - 0.4).abs().max() < 0.035, f"an expert has {share.max():.3f} of the ids, not about 0.4"
