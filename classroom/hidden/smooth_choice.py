"""Cases of lesson 25 that students are not given."""

import torch

from makemoe.checks import check, close, refuses, same, same_gradients
from makemoe.checks.smooth_choice import exact_by_loop, expected, weights_by_loop


@check
def check_coordinate_descent(coordinate_descent):
    scores = 3 * torch.randn(40, 9, dtype=torch.float64)
    yield "nine scores, other settings"
    for settings in (4, 11, 0.7), (1, 3, 2.0, 5.0, 0.9), (8.5, 6, 0.2, 1.0, 0.5):
        k, iterations, epsilon, start, decay = (*settings, None, 0.7)[:5]
        got = coordinate_descent(scores, k, iterations, epsilon, epsilon_start=start, decay=decay)
        close(got, weights_by_loop(scores, k, iterations, epsilon, start, decay), f"weights for {settings}")
    yield "settings that make no sense are refused"
    for k, words in ((0, ["k", 0]), (10, ["k", 10])):
        refuses(ValueError, lambda: coordinate_descent(scores, k, 3), *words)
    for wrong in dict(iterations=0), dict(epsilon=0.0), dict(epsilon=-1.0), dict(decay=0.0), dict(decay=1.5):
        settings = dict(iterations=3) | wrong
        refuses(ValueError, lambda: coordinate_descent(scores, 2, **settings), *wrong)


@check
def check_straight_through(straight_through):
    yield "other shapes, other numbers"
    for shape in (), (3,), (2, 3, 4):
        hard, smooth = torch.randn(shape), torch.randn(shape, requires_grad=True)
        same(straight_through(hard, smooth), hard, f"gates of shape {shape}")
        same_gradients(straight_through(hard, smooth.exp()), smooth.exp(), {"smooth": smooth}, "gates")


@check
def check_coordinate_descent_router(CoordinateDescentRouter):
    x = torch.randn(2, 5, 12)
    yield "nine experts, k = 1 and k = E"
    for k in 1, 9:
        router = CoordinateDescentRouter(12, 9, k, iterations=40, epsilon=0.5)
        close(router(x).gates, expected(router, x.view(10, 12), k, 0.5)[2].view(2, 5, 9), f"gates, k = {k}", atol=1e-4)
    yield "settings that make no sense are refused when the router is made"
    for wrong in dict(iterations=0), dict(epsilon=0.0), dict(decay=2.0):
        refuses(ValueError, lambda: CoordinateDescentRouter(12, 9, 2, **wrong), *wrong)
    refuses(ValueError, lambda: CoordinateDescentRouter(12, 9, 10), "top_k", 10)
    yield "calls leave nothing behind"
    same(sorted(router.state_dict()), ["linear.bias", "linear.weight"], "names in the state_dict")


@check
def check_exact_weights(exact_weights):
    yield "many scores, every k"
    scores = torch.randn(4, 16, dtype=torch.float64)
    for k in 1, 3, 8, 15, 16:
        close(exact_weights(scores, k, 0.2), exact_by_loop(scores, k, 0.2), f"weights for k = {k}")
    yield "a single token, two equal ones"
    pair = torch.tensor([1.0, 1.0, 0.0])
    close(exact_weights(pair, 2, 0.01), torch.tensor([1.0, 1.0, 0.0]), "weights (n,)")
