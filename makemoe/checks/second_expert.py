"""Checks of lesson 22. Rates are compared within 5 standard errors: by chance, one in 1.7 million lies outside."""

import copy

import torch
from torch import nn

from makemoe.capacity import CapacityRouter
from makemoe.checks import check, close, refuses, same, same_gradients, unchanged
from makemoe.checks.capacity import favoured, kept_by_queue
from makemoe.checks.gating import GAP, gates_by_loop
from makemoe.gating import Routing, TopkRouter, top_k_gating

INF = float("inf")


def taken_by_loop(logits, thresholds, draws):
    "(gates, chosen), both (T, E), of logits (T, E): one token and one choice after another, best choices first."
    gates, chosen = torch.zeros_like(logits), torch.zeros(logits.shape, dtype=torch.bool)
    k = len(thresholds) + 1
    for t in range(len(logits)):
        best = logits[t].topk(k).indices.tolist()
        share = logits[t, best].softmax(dim=-1)
        for i, e in enumerate(best):
            sure = i == 0 or thresholds[i - 1] == 0
            if sure or draws[t, i] < share[i] / thresholds[i - 1]:
                gates[t, e], chosen[t, e] = share[i], True
    return gates, chosen


def follows(routing, logits, gates, chosen, what):
    close(routing.gates, gates, f"gates {what}")
    same(routing.chosen, chosen, f"chosen {what}")
    same(routing.kept, chosen, f"kept {what}")
    same(routing.logits, logits, "the record's logits")


@check
def check_threshold_gating(threshold_gating):
    logits, draws = 2 * torch.randn(40, 5, requires_grad=True), torch.rand(40, 3)
    yield "the best is always taken, the second if its draw is below gate / threshold; gates are not scaled up again"
    for threshold in 0.5, 0.2, 1.0, 3:
        gates, chosen = taken_by_loop(logits, [threshold], draws)
        with unchanged(logits=logits, draws=draws):
            routing = threshold_gating(logits, 2, threshold, draws[:, :2])
        follows(routing, logits, gates, chosen, f"for threshold {threshold}")
    second = gates_by_loop(logits, 2).topk(2, dim=-1).values[:, 1]
    close(
        threshold_gating(logits, 2, 0.5, draws[:, :2]).kept.sum(dim=-1),
        1 + (2 * second > draws[:, 1]).long(),
        "taken: 2 * g_2 > draw",
    )
    yield "every further choice can have a threshold of its own, in the order of the scores, or one counts for all"
    for thresholds in [0.2, 0.4], (0.5, 0.1):
        follows(
            threshold_gating(logits, 3, thresholds, draws),
            logits,
            *taken_by_loop(logits, thresholds, draws),
            f"for thresholds {thresholds}",
        )
    follows(threshold_gating(logits, 3, 0.4, draws), logits, *taken_by_loop(logits, [0.4] * 2, draws), "for 0.4")
    yield "a gate equal to the threshold is always taken, a draw equal to gate / threshold is not enough"
    even = torch.zeros(6, 2)
    for threshold, draw, number in (0.5, 0.999999, 2), (1.0, 0.5, 1), (1.0, 0.499999, 2):
        count = threshold_gating(even, 2, threshold, torch.full((6, 2), draw)).chosen.sum(dim=-1)
        same(count, torch.full((6,), number), f"experts for gates 0.5, threshold {threshold} and draw {draw}")
    yield "threshold 0 takes all, inf takes none but the best, whatever the draws"
    high, low = torch.full((40, 3), 0.999999), torch.zeros(40, 3)
    everyone = gates_by_loop(logits, 3)
    follows(threshold_gating(logits, 3, 0.0, high), logits, everyone, everyone > 0, "for threshold 0")
    alone = everyone * (everyone == everyone.amax(dim=-1, keepdim=True))
    follows(threshold_gating(logits, 3, INF, low), logits, alone, alone > 0, "for threshold inf")
    same(threshold_gating(GAP, 2, 0, high[:4, :2]).chosen, GAP >= 0, "chosen for threshold 0, with a gate of exactly 0")
    yield "without draws every draw is 1/2, and no random number is drawn"
    state = torch.get_rng_state()
    for thresholds in [0.2, 0.4], [0.5, 0.5], [0.0, INF]:
        half = torch.full((40, 3), 0.5)
        follows(
            threshold_gating(logits, 3, thresholds), logits, *taken_by_loop(logits, thresholds, half), "without draws"
        )
    same(torch.get_rng_state(), state, "the state of the random numbers")
    yield "the gradient of the gates reaches all k logits, also those of choices that were not taken"
    for given in draws, None:
        gates, _ = taken_by_loop(logits, [0.6, 0.6], half if given is None else given)
        same_gradients(threshold_gating(logits, 3, 0.6, given).gates, gates, {"logits": logits}, "gates")
    same_gradients(threshold_gating(logits, 2, 0.6).logits, logits * 1, {"logits": logits}, "the record's logits")
    yield "any dimensions may come before E"
    for shape in (4, 10), (40, 1), (2, 5, 4):
        routing = threshold_gating(logits.view(*shape, 5), 3, 0.6, draws.view(*shape, 3))
        gates, chosen = taken_by_loop(logits, [0.6, 0.6], draws)
        follows(routing, logits.view(*shape, 5), gates.view(*shape, 5), chosen.view(*shape, 5), f"of shape {shape}")
    yield "gates have the type of the logits"
    for dtype in torch.float64, torch.bfloat16:
        same(threshold_gating(logits.detach().to(dtype), 2, 0.2, draws[:, :2]).gates.dtype, dtype, "the type")
    yield "negative thresholds, nan, too few or too many of them, and draws of another shape are refused"
    for thresholds in -0.1, float("nan"), [0.2], [0.2] * 3, [0.2, -0.1]:
        refuses(ValueError, lambda thresholds=thresholds: threshold_gating(logits, 3, thresholds, draws), "threshold")
    for shape in (40, 5), (40, 1), (3,):
        refuses(ValueError, lambda shape=shape: threshold_gating(logits, 3, 0.2, torch.rand(shape)), shape)


def scores(router, x):
    return (x @ router.linear.weight.T + router.linear.bias).detach()


@check
def check_threshold_router(ThresholdRouter):
    yield "in evaluation a further choice is taken if gate / threshold is above 1/2, the same every time"
    x, half = torch.randn(60, 6, requires_grad=True), torch.full((60, 3), 0.5)
    for thresholds in 0.4, (0.5, 0.2):
        router = ThresholdRouter(6, 5, 3, thresholds=thresholds).eval()
        limits = [thresholds] * 2 if thresholds == 0.4 else thresholds
        state = torch.get_rng_state()
        with unchanged(x=x):
            routing = router(x)
        same(torch.get_rng_state(), state, "the state of the random numbers after evaluation")
        close(routing.logits, scores(router, x), "logits")
        gates, chosen = taken_by_loop(routing.logits, limits, half)
        follows(routing, routing.logits, gates, chosen, f"in evaluation, thresholds {thresholds}")
    yield "without more settings two experts are scored, with threshold 0.2"
    router = ThresholdRouter(6, 5).eval()
    same(router.top_k, 2, "top_k")
    routing = router(4 * x)
    follows(routing, routing.logits, *taken_by_loop(routing.logits, [0.2], half), "by default")

    yield "in training choice i of a token is taken with probability min(1, gate_i / threshold_i)"
    N = 8_000
    router, token = ThresholdRouter(6, 5, 3, thresholds=(0.9, 0.3)), torch.randn(6)
    routing = router(token.expand(2, N // 2, 6))
    best = scores(router, token).topk(3)
    share = best.values.softmax(dim=-1)
    taken = routing.chosen.reshape(N, 5)[:, best.indices].double()  # (N, 3)
    p = torch.tensor([1.0, share[1] / 0.9, share[2] / 0.3]).clamp(max=1).double()
    z = (taken.mean(dim=0) - p) / (p * (1 - p) / N).sqrt().clamp(min=1e-9)
    assert z.abs().max() < 5, f"choices are taken at rates {taken.mean(dim=0).tolist()}, but should be at {p.tolist()}"
    yield "every token, choice, row and pass has a draw of its own"
    both = (taken[:, 1:] - p[1:]).prod(dim=-1).mean() / (p * (1 - p))[1:].prod().sqrt().clamp(min=1e-9)
    assert abs(both) * N**0.5 < 5, f"choices 2 and 3 are drawn together: correlation {both:.2f}"
    again = router(token.expand(2, N // 2, 6)).chosen
    for one, other, what in (again, routing.chosen, "passes"), (again[0], again[1], "rows"):
        assert (one != other).any(), f"two {what} have the same draws"
    yield "the gates are those of top-k gating where a choice is taken; threshold 0 takes all, inf the best alone"
    router = ThresholdRouter(6, 5, 2, thresholds=0.7)
    routing = router(x)
    clean = top_k_gating(routing.logits, 2)
    follows(routing, routing.logits, clean.gates * routing.chosen, routing.chosen & clean.chosen, "in training")
    close(routing.logits, scores(router, x), "logits in training")
    assert not routing.chosen.all(dim=-1).any() and 60 < routing.chosen.sum() < 120, "no choice is taken by chance"
    for threshold, number in (0.0, 2), (INF, 1):
        routing = ThresholdRouter(6, 5, 2, threshold)(x)
        same(routing.chosen.sum(dim=-1), torch.full((60,), number), f"experts per token for threshold {threshold}")
    yield "the gradient reaches tokens, weights and biases, in training and in evaluation"
    for mode in True, False:
        routing = router.train(mode)(x)
        logits = x @ router.linear.weight.T + router.linear.bias
        sources = {"x": x} | dict(router.named_parameters())
        same_gradients(routing.gates, gates_by_loop(logits, 2) * routing.chosen, sources, f"gates, training {mode},")
        same_gradients(routing.logits, logits, sources, f"logits, training {mode},")
    yield "it computes in float32, also under autocast and for other types"
    for dtype in torch.bfloat16, torch.float64:
        low = copy.deepcopy(router).to(dtype)
        close(low(x.to(dtype)).logits, scores(copy.deepcopy(low).float(), x.to(dtype).float()), f"logits in {dtype}")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = router(x)
    close(low.logits, scores(router, x), "logits under autocast")
    close(low.gates, gates_by_loop(low.logits, 2) * low.chosen, "gates under autocast")
    yield "settings that cannot work are refused when the router is made"
    for thresholds in -0.1, float("nan"), (0.2, 0.2), ():
        refuses(ValueError, lambda thresholds=thresholds: ThresholdRouter(6, 5, 2, thresholds), "threshold")
    refuses(ValueError, lambda: ThresholdRouter(6, 5, 6), "top_k", "6")


class OwnScores(nn.Module):
    "A router without a linear layer: the channels of a token are its logits. It remembers what it was called with."

    def __init__(self, top_k):
        super().__init__()
        self.top_k, self.shapes, self.modes = top_k, [], []
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        self.modes.append(self.training)
        return top_k_gating(self.scale * x, self.top_k)


@check
def check_grouped_router(GroupedRouter):
    x = favoured(4, 6, 5, k=2).logits
    yield "the router inside sees groups of group_size tokens, across the rows, in order, and is called once"
    for size, shape in (8, (3, 8, 5)), (3, (8, 3, 5)), (24, (1, 24, 5)), (1, (24, 1, 5)):
        inner = OwnScores(2)
        with unchanged(x=x):
            GroupedRouter(inner, size)(x)
        same(inner.shapes, [shape], f"the shapes of x inside, group_size {size}")
    yield "the four fields come back in the shape (B, T, E)"
    for size in 8, 3, 24:
        routing, plain = GroupedRouter(OwnScores(2), size)(x), top_k_gating(x, 2)
        for field in "gates", "logits", "chosen", "kept":
            same(getattr(routing, field), getattr(plain, field), f"{field}, group_size {size}")
    yield "with a CapacityRouter inside, every group has its own queue"
    for size, slots in (8, 2), (12, 3):
        for priority in "position", "choice":
            router = GroupedRouter(CapacityRouter(OwnScores(2), slots * 2.5 / size, priority=priority, minimum=1), size)
            cut = top_k_gating(torch.stack(x.reshape(-1, 5).split(size)), 2)
            want = kept_by_queue(cut, slots, priority).reshape(4, 6, 5)
            routing = router(x)
            same(routing.kept, want, f"kept by {priority}, group_size {size}")
            same(routing.chosen, top_k_gating(x, 2).chosen, "chosen")
            close(routing.gates, top_k_gating(x, 2).gates * want, "gates")
    yield "x may have any shape (..., C), and need not lie in one piece of memory"
    for shape in (24,), (2, 3, 4), (1, 24):
        some = x.reshape(*shape, 5)
        same(GroupedRouter(OwnScores(2), 8)(some).gates, top_k_gating(some, 2).gates, f"gates of x {shape}")
    turned = x.transpose(0, 1)
    same(GroupedRouter(OwnScores(2), 8)(turned).gates, top_k_gating(turned, 2).gates, "gates of a transposed x")
    yield "it has the top_k of the router inside, so that it can stand inside a CapacityRouter itself"
    same(GroupedRouter(OwnScores(3), 8).top_k, 3, "top_k")
    same(CapacityRouter(GroupedRouter(OwnScores(2), 12), 5.0)(x).chosen, top_k_gating(x, 2).chosen, "chosen")
    yield "number of experts and of channels may differ, and gradients reach tokens and weights"
    inner, tokens = TopkRouter(7, 4, 2), torch.randn(2, 6, 7, requires_grad=True)
    router, sources = GroupedRouter(inner, 4), {"x": tokens} | dict(inner.named_parameters())
    for mode in True, False:
        router.train(mode)
        same_gradients(router(tokens).gates, inner(tokens).gates, sources, "gates")
        same_gradients(router(tokens).logits, inner(tokens).logits, sources, "logits")
    yield "weights and mode of the router inside are its own: it is a submodule"
    same(len(list(router.parameters())), 2, "the number of parameters")
    inner = OwnScores(2)
    GroupedRouter(inner, 8).eval()(x)
    same(inner.modes, [False], "the training mode inside after eval()")
    yield "tokens that do not divide into groups are refused, and so is a group_size that is not a whole number above 0"
    refuses(ValueError, lambda: GroupedRouter(OwnScores(2), 7)(x), 24, 7)
    refuses(ValueError, lambda: GroupedRouter(OwnScores(2), 48)(x), 24, 48)
    for size in 0, -2, 2.5:
        refuses(ValueError, lambda size=size: GroupedRouter(OwnScores(2), size), "group_size", size)


def balance_by_loop(logits):
    "The loss of logits (G, S, E): E * sum of f_e P_e for each group, f from first choices; the mean over the groups."
    losses = []
    for group in logits:
        S, E = group.shape
        best, probs = group.argmax(dim=-1).tolist(), group.exp() / group.exp().sum(dim=-1, keepdim=True)
        losses.append(sum(E * best.count(e) / S * probs[:, e].mean() for e in range(E)))
    return torch.stack(losses).mean()


@check
def check_group_balance_loss(group_balance_loss):
    logits = torch.randn(3, 12, 4) + torch.tensor([1.0, 0, 0, 0])
    logits[1, :, 0] -= 3
    logits.requires_grad_()
    routing, want = top_k_gating(logits, 1), balance_by_loop(logits)
    yield "in each group f is the share of the first choices, P the mean probability; the mean over the groups counts"
    with unchanged(gates=routing.gates, chosen=routing.chosen, kept=routing.kept):
        close(group_balance_loss(routing), want, "the loss")
    yield "second choices do not count"
    for k in 2, 3, 4:
        routing = top_k_gating(logits, k)
        close(group_balance_loss(routing), want, f"the loss with k = {k}")
    yield "choices that are dropped count as before"
    for kept in torch.rand(3, 12, 4) > 0.5, torch.zeros(3, 12, 4, dtype=torch.bool):
        dropped = Routing(routing.gates * kept, logits, routing.chosen, routing.chosen & kept)
        close(group_balance_loss(dropped), want, "the loss after dropping")
    yield "the gradient passes through P"
    same_gradients(group_balance_loss(routing), want, {"logits": logits}, "the loss")
    yield "a single group of shape (S, E), and large logits"
    single = top_k_gating(logits[0], 2)
    close(group_balance_loss(single), balance_by_loop(logits[:1]), "the loss of fields (S, E)")
    huge = group_balance_loss(top_k_gating(torch.tensor([[1e4, 0.0], [0.0, -1e4]]), 1))
    close(huge, 2.0, "the loss of logits of 10,000")
