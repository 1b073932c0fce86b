"""Checks of lesson 25, smooth choice."""

import math

import torch
from torch.nn import functional as F

from makemoe.checks import check, close, same, same_gradients, unchanged


def descent_by_loop(row, k, iterations, epsilon, start=None, decay=0.7):
    "Weights of a list of scores: the equations for a, for every b, and for epsilon, one after another."
    now = max(start or epsilon, epsilon)
    b = [-s for s in row]
    for _ in range(iterations):
        z = [(s + b_i) / now for s, b_i in zip(row, b)]
        a = now * (math.log(k) - max(z) - math.log(sum(math.exp(z_i - max(z)) for z_i in z)))
        b = [-max(s + a, 0.0) for s in row]
        now = max(now * decay, epsilon)
    return [math.exp((s + a + b_i) / now) for s, b_i in zip(row, b)]


def exact_by_loop(scores, k, epsilon):
    "The optimum for scores (..., n) with its gradient, row by row: 0, 1, 2, ... weights at their limit until it fits."
    rows = []
    for row in scores.reshape(-1, scores.shape[-1]):
        order = row.argsort(descending=True)
        full = 0
        while True:
            rest = row[order[full:]]
            share = (k - full) * F.softmax(rest / epsilon, dim=0)
            if share[0] <= 1 or full == k - 1:
                break
            full += 1
        weights = torch.ones_like(row)
        weights[order[full:]] = share
        rows.append(weights)
    return torch.stack(rows).reshape(scores.shape)


def best(logits, k):
    "Mask (..., E) of the k largest."
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(k, dim=-1).indices, True)


def weights_by_loop(scores, *settings):
    return torch.tensor([descent_by_loop(row, *settings) for row in scores.double().tolist()]).to(scores.dtype)


@check
def check_coordinate_descent(coordinate_descent):
    scores = torch.randn(6, 5, dtype=torch.float64)
    yield "the weights are those of the two equations, taken in turn"
    for k, iterations, epsilon in ((2, 1, 1.0), (1, 2, 0.5), (3, 7, 0.1), (2.25, 4, 1.0)):
        with unchanged(scores=scores):
            weights = coordinate_descent(scores, k, iterations, epsilon)
        what = f"weights for k = {k}, {iterations} iterations, epsilon = {epsilon}"
        close(weights, weights_by_loop(scores, k, iterations, epsilon), what)
    yield "epsilon falls from its start to its end, and once more before the last exponential"
    for iterations in 1, 3, 40:
        weights = coordinate_descent(scores, 2, iterations, epsilon=0.3, epsilon_start=4.0, decay=0.7)
        want = weights_by_loop(scores, 2, iterations, 0.3, 4.0, 0.7)
        close(weights, want, f"weights after {iterations} iterations from 4 to 0.3")
    yield "a start below epsilon counts as epsilon, and decay 1 leaves the start as it is"
    low = coordinate_descent(scores, 2, 5, epsilon=0.5, epsilon_start=0.1)
    close(low, weights_by_loop(scores, 2, 5, 0.5), "weights for a start of 0.1 and epsilon = 0.5")
    still = coordinate_descent(scores, 2, 5, epsilon=0.1, epsilon_start=2.0, decay=1.0)
    close(still, weights_by_loop(scores, 2, 5, 2.0), "weights for epsilon that stays at 2")
    yield "the gradient reaches every score, through every iteration"
    few, point = scores[:2, :4].clone().requires_grad_(), 1e-6
    slope = torch.autograd.grad(coordinate_descent(few, 2, 4)[:, 1].sum(), few)[0]
    for j in range(4):
        nudge = point * F.one_hot(torch.tensor(j), 4)
        up, down = (coordinate_descent(few.detach() + sign * nudge, 2, 4)[:, 1] for sign in (1, -1))
        close(slope[:, j], (up - down) / (2 * point), f"the derivative by score {j}", rtol=1e-4)
    yield "large scores and a small epsilon do not overflow, and no weight is above 1"
    large = 1e4 * torch.randn(20, 8)
    for moved in large, large - 1e5:
        weights = coordinate_descent(moved, 2, 20, epsilon=0.01)
        assert weights.isfinite().all() and (weights <= 1).all(), f"weights from {weights.min()} to {weights.max()}"
    yield "scores may have any shape (..., n), and k may be n"
    for shape, k in ((2, 3), 2), ((1, 6), 5), ((6, 1), 1):
        some = coordinate_descent(scores.view(*shape, 5), k, 3)
        close(some, weights_by_loop(scores, k, 3, 1.0).view(*shape, 5), f"weights of scores of shape {(*shape, 5)}")
    close(coordinate_descent(scores[0], 2, 3), weights_by_loop(scores[:1], 2, 3, 1.0)[0], "weights of scores (5,)")
    yield "the weights have the type of the scores"
    for dtype in torch.float32, torch.bfloat16:
        same(coordinate_descent(scores.to(dtype), 2, 3).dtype, dtype, "the type of the weights")


@check
def check_straight_through(straight_through):
    smooth = torch.rand(200, 7, requires_grad=True)
    hard = torch.where(smooth > 0.5, 1 / 3, 0.0).detach()
    yield "forwards it is the hard tensor, to the last bit"
    with unchanged(hard=hard, smooth=smooth):
        gates = straight_through(hard, smooth)
    same(gates, hard, "gates of 1/3 and 0")
    same(straight_through((hard > 0).float(), 100 * smooth), (hard > 0).float(), "gates of 1 and 0, smooth ones of 100")
    yield "backwards it has the gradient of the smooth tensor"
    same_gradients(straight_through(hard, smooth.square()), smooth.square(), {"smooth": smooth}, "gates")
    yield "no gradient reaches the hard tensor"
    source = torch.rand(200, 7, requires_grad=True)
    gates = straight_through(source * 2, smooth)
    same_gradients(gates, smooth * 1 + 0 * source, {"smooth": smooth, "hard": source}, "gates")
    yield "hard may be a mask, and the result has the type of smooth"
    same(straight_through(hard > 0, smooth), (hard > 0).float(), "gates of a mask")
    low = torch.rand(200, 7, dtype=torch.bfloat16)
    same(straight_through(hard, low), hard.bfloat16(), "gates for smooth ones in bfloat16")


def expected(router, x, k, epsilon=1.0):
    "(logits, chosen, gates) of a router on tokens (T, C), by the exact weights."
    logits = F.linear(x.float(), router.linear.weight.float(), router.linear.bias.float())
    chosen = best(logits, k)
    return logits, chosen, exact_by_loop(logits, k, epsilon) * chosen / k


@check
def check_coordinate_descent_router(CoordinateDescentRouter):
    x = 3 * torch.randn(8, 6, requires_grad=True)
    router = CoordinateDescentRouter(6, 5, top_k=2, iterations=40)
    weight, bias = router.linear.weight, router.linear.bias
    logits, chosen, gates = expected(router, x, 2)
    yield "the scores and the choice are those of a TopkRouter, and nothing is dropped"
    with unchanged(x=x, weight=weight, bias=bias):
        routing = router(x)
    close(routing.logits, logits, "logits")
    same(routing.chosen, chosen, "chosen")
    same(routing.kept, chosen, "kept")
    yield "the gates of the chosen are their weights divided by top_k, the others are 0"
    close(routing.gates, gates, "gates", atol=1e-4)
    yield "the gradient reaches the scores of all experts, also in evaluation"
    for mode in True, False:
        sources = {"x": x, "the weight": weight, "the bias": bias}
        what = f"the gates, training {mode},"
        same_gradients(router.train(mode)(x).gates, gates, sources, what, rtol=1e-3, atol=1e-3)
    yield "training, evaluation and a second call give the same gates"
    same(router.eval()(x).gates, routing.gates, "gates in evaluation")
    same(router.train()(x).gates, routing.gates, "gates of a second call")
    yield "few iterations are enough where all scores are large: the k-th largest is moved to 0"
    lifted = CoordinateDescentRouter(6, 5, top_k=2, epsilon=0.1)
    lifted.linear.bias.data += 100
    close(lifted(x).gates, expected(lifted, x, 2, 0.1)[2], "gates where 100 is added to all scores", atol=1e-3)
    yield "its settings are used"
    sharp = CoordinateDescentRouter(6, 5, 3, iterations=3, epsilon=0.2, epsilon_start=2.0, decay=0.5)
    scores, picked, _ = expected(sharp, x, 3, 0.2)
    moved = scores - scores.sort(dim=-1).values[:, 2:3]
    want = weights_by_loop(moved.detach(), 3, 3, 0.2, 2.0, 0.5) * picked / 3
    close(sharp(x).gates, want, "gates for 3 iterations from 2 to 0.2 with decay 0.5", atol=1e-4)
    yield "with hard the gates of the chosen are 1 / top_k, and the gradient stays"
    hard = CoordinateDescentRouter(6, 5, 2, iterations=40, hard=True)
    hard.load_state_dict(router.state_dict())
    same(hard(x).gates, chosen / 2, "hard gates")
    same(hard.eval()(x).gates, chosen / 2, "hard gates in evaluation")
    close(torch.autograd.grad(hard(x).gates[:, 0].sum(), x)[0],
          torch.autograd.grad(expected(hard, x, 2)[2][:, 0].sum(), x)[0], "the gradient of hard gates", 1e-3, 1e-3)
    yield "exactly k experts are chosen where scores are equal, all with the same gate"
    equal = CoordinateDescentRouter(6, 8, 2)
    equal.linear.weight.data.zero_()
    equal.linear.bias.data.zero_()
    routing = equal(x)
    same(routing.chosen.sum(dim=-1), torch.full((8,), 2), "experts per token")
    close(routing.gates.sum(dim=-1), torch.full((8,), 2 / 8), "the sum of the gates")
    yield "x may have any shape (..., C)"
    for shape in (), (1,), (2, 1, 4):
        some = x.detach().repeat(2, 1)[: math.prod(shape)].view(*shape, 6)
        want = expected(router, some.reshape(-1, 6), 2)[2].view(*shape, 5)
        close(router(some).gates, want, f"gates of x of shape {(*shape, 6)}", atol=1e-4)
    yield "it computes in float32 under autocast, and autocast is still on afterwards"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = router(x.bfloat16())
        assert torch.is_autocast_enabled("cpu"), "autocast is off for all code that runs after it"
    close(low.gates, expected(router, x.bfloat16(), 2)[2], "gates under autocast", atol=1e-4)


@check
def check_exact_weights(exact_weights):
    scores = 2 * torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    yield "the weights are min(1, exp((s + a) / epsilon)), and sum to k"
    for k, epsilon in ((1, 1.0), (2, 1.0), (4, 0.3), (6, 1.0)):
        with unchanged(scores=scores):
            weights = exact_weights(scores, k, epsilon)
        close(weights, exact_by_loop(scores, k, epsilon), f"weights for k = {k}, epsilon = {epsilon}")
        close(weights.sum(dim=-1), torch.full((12,), float(k), dtype=torch.float64), "the sum of the weights")
    yield "they have the exact gradient"
    same_gradients(exact_weights(scores, 3, 0.7), exact_by_loop(scores, 3, 0.7), {"scores": scores}, "weights")
    yield "scores may have any shape (..., n) and type"
    for shape in (2, 6), (12, 1), (1, 12):
        some = scores.view(*shape, 6)
        close(exact_weights(some, 2, 1.0), exact_by_loop(some, 2, 1.0), f"weights of scores of shape {(*shape, 6)}")
    close(exact_weights(scores.float(), 2, 1.0), exact_by_loop(scores, 2, 1.0).float(), "weights in float32", atol=1e-5)
    yield "large scores do not overflow"
    close(exact_weights(500 * scores, 2, 1.0), exact_by_loop(500 * scores, 2, 1.0), "weights of scores about 1000")
