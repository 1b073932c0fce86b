"""Hidden cases for lesson 22: other sizes, k = E, large scores, rates of many tokens, groups inside a layer."""

import torch

from makemoe.capacity import CapacityRouter
from makemoe.checks import check, close, same
from makemoe.checks.capacity import favoured, kept_by_queue
from makemoe.checks.second_expert import INF, OwnScores, balance_by_loop, follows, taken_by_loop
from makemoe.gating import top_k_gating


@check
def check_threshold_gating(threshold_gating):
    yield "other sizes, k = E, four thresholds"
    logits, draws = 2 * torch.randn(60, 5), torch.rand(60, 5)
    thresholds = (0.1, 0.3, 0.02, 0.15)
    follows(threshold_gating(logits, 5, thresholds, draws), logits, *taken_by_loop(logits, thresholds, draws), "k = E")
    yield "a threshold of inf for one choice leaves the others as they are"
    routing = threshold_gating(logits, 3, (INF, 0.2), draws[:, :3])
    follows(routing, logits, *taken_by_loop(logits, (INF, 0.2), draws[:, :3]), "for thresholds (inf, 0.2)")
    yield "scores of 10,000 and -10,000"
    far = torch.tensor([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4]])
    routing = threshold_gating(far, 2, 0.2, torch.full((2, 2), 0.5))
    same(routing.gates.tolist(), [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], "gates")
    yield "all is computed on the device of the logits"
    there = threshold_gating(torch.zeros(3, 5, device="meta"), 2, 0.2, torch.zeros(3, 2, device="meta"))
    same(there.gates.device.type + there.kept.device.type, "metameta", "the devices")
    yield "k = 1 has no further choice"
    same(threshold_gating(logits, 1, 0.2).gates, top_k_gating(logits, 1).gates, "gates")


@check
def check_threshold_router(ThresholdRouter):
    yield "many tokens are taken as often as their probabilities say"
    router, x = ThresholdRouter(8, 6, 2, thresholds=0.8), torch.randn(20_000, 8)
    routing = router(x)
    p = (routing.logits.detach().topk(2).values.softmax(dim=-1)[:, 1] / 0.8).double()
    z = (routing.chosen.sum() - 20_000 - p.sum()) / (p * (1 - p)).sum().sqrt()
    assert abs(z) < 5, f"{routing.chosen.sum() - 20_000} second experts, but should be {p.sum():.0f}"
    yield "the smallest batch keeps its shape"
    same(tuple(router(x[None, :1]).gates.shape), (1, 1, 6), "the shape of the gates of a single token")


@check
def check_grouped_router(GroupedRouter):
    yield "other sizes, and a queue for each group"
    x = favoured(6, 10, 7, k=3).logits
    router = GroupedRouter(CapacityRouter(OwnScores(3), 0.5, minimum=1), 15)
    want = kept_by_queue(top_k_gating(x.reshape(4, 15, 7), 3), 4, "position").reshape(6, 10, 7)
    same(router(x).kept, want, "kept")
    yield "an empty batch"
    same(tuple(GroupedRouter(OwnScores(2), 5)(torch.zeros(0, 10, 7)).kept.shape), (0, 10, 7), "the shape of kept")


@check
def check_group_balance_loss(group_balance_loss):
    yield "other sizes"
    logits = 2 * torch.randn(5, 7, 9)
    close(group_balance_loss(top_k_gating(logits, 4)), balance_by_loop(logits), "the loss")
    yield "more dimensions in front"
    close(group_balance_loss(top_k_gating(logits[None], 4)), balance_by_loop(logits), "the loss of (1, 5, 7, 9)")
