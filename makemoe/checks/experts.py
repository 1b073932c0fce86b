"""Checks of lesson 03, experts."""

import torch
from torch import nn
from torch.nn import functional as F

from makemoe.checks import check, close, same, same_gradients, unchanged

FORMULAS = {"relu": F.relu, "gelu": F.gelu, "squared_relu": lambda z: z.clamp(min=0) ** 2}


class PlainExpert(nn.Module):
    "Up, activation, down, with the names of the lesson's `Expert`."

    def __init__(self, n_embd, n_hidden, activation):
        super().__init__()
        self.up, self.down = nn.Linear(n_embd, n_hidden), nn.Linear(n_hidden, n_embd)
        self.activation, self.dropout = FORMULAS[activation], nn.Dropout(0.0)

    def forward(self, x):
        return self.dropout(self.down(self.activation(self.up(x))))


def formula(expert, x, activation="relu"):
    "What an expert without dropout should answer: two products and an activation."
    hidden = FORMULAS[activation](F.linear(x, expert.up.weight, expert.up.bias))
    return F.linear(hidden, expert.down.weight, expert.down.bias)


def strongest_by_loop(expert, token, n):
    "(units, answer) of one token: a vector for each hidden unit, and the n longest added up."
    pairs = zip(expert.up.weight, expert.up.bias, expert.down.weight.unbind(1))
    written = torch.stack([expert.activation(key @ token + b) * value for key, b, value in pairs])  # (F, C)
    best = written.norm(dim=-1).argsort(descending=True)[:n]
    return best, written[best].sum(dim=0) + expert.down.bias


def weights_of(module):
    "Its parameters by name, as sources of gradients."
    return {f"`{name}`": parameter for name, parameter in module.named_parameters()}


@check
def check_expert(squared_relu, Expert):
    yield "squared_relu is 0 below zero and the square above, and its gradient is right"
    z = torch.tensor([-3.0, 0.0, 0.5, 20.0])
    with unchanged(z=z):
        close(squared_relu(z), torch.tensor([0.0, 0.0, 0.25, 400.0]), "squared_relu(z)")
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    close(squared_relu(z), FORMULAS["squared_relu"](z), "squared_relu(z)")
    same_gradients(squared_relu(z), FORMULAS["squared_relu"](z), {"z": z}, "squared_relu(z)")
    yield "an Expert is up, relu and down"
    expert, x = Expert(6, 10), torch.randn(2, 3, 6, requires_grad=True)
    with unchanged(x=x, weight=expert.up.weight):
        y = expert(x)
    close(y, formula(expert, x), "the answer")
    yield "the gradient reaches x and all weights, in training and in evaluation"
    for mode in True, False:
        sources = {"x": x, **weights_of(expert)}
        same_gradients(expert.train(mode)(x), formula(expert, x), sources, f"the answer, training {mode},")
    yield "the activation is the one that was asked for, with biases and without"
    for name in FORMULAS:
        for bias in True, False:
            other, some = Expert(5, 7, activation=name, bias=bias), 2 * torch.randn(4, 5)
            close(other(some), formula(other, some, name), f"the answer with {name}, bias {bias}")
    yield "x may have any shape (..., C)"
    for shape in (), (0,), (1,), (1, 1), (2, 1, 3):
        some = torch.randn(*shape, 6)
        close(expert(some), formula(expert, some), f"the answer to x of shape {(*shape, 6)}")
    yield "the answer has the type of x"
    for dtype in torch.float64, torch.bfloat16:
        other = Expert(4, 8, activation="squared_relu").to(dtype)
        same(other(torch.randn(2, 4).to(dtype)).dtype, dtype, "the type of the answer")
    yield "dropout sets single numbers of the answer to zero, and scales up the rest"
    sleepy, wide = Expert(16, 20, dropout=0.25), torch.randn(200, 16)
    full = formula(sleepy, wide)
    with torch.no_grad():  # dropout depends on training or evaluation, not on gradients
        dropped = sleepy(wide)
    gone = dropped == 0
    share = gone.float().mean().item()
    assert 0.2 < share < 0.3, f"with dropout=0.25 a share of {share:.2f} of the answer is dropped in training"
    assert not gone.all(dim=0).any() and not gone.all(dim=1).any(), "whole tokens or channels are dropped"
    close(dropped, torch.where(gone, 0, full / 0.75), "what dropout leaves")
    assert not torch.equal(sleepy(wide), sleepy(wide)), "two calls in training drop the same numbers"
    yield "in evaluation there is no dropout"
    close(sleepy.eval()(wide), full, "the answer in evaluation")


@check
def check_layer_parameters(layer_parameters):
    def built(C, width, E, k):
        shared = [nn.Linear(C, C, bias=False) for _ in range(4)] + [nn.Linear(C, E, bias=False)]
        expert = [nn.Linear(C, width, bias=False), nn.Linear(width, C, bias=False)]
        return tuple(sum(part.weight.numel() for part in shared + expert * n) for n in (E, k))

    yield "total and active are those of a block that was built and counted"
    for sizes in (16, 64, 8, 2), (12, 20, 5, 3), (8, 32, 4, 4), (8, 24, 6, 1):
        for name, ours, theirs in zip(("total", "active"), layer_parameters(*sizes), built(*sizes), strict=True):
            close(ours, theirs, f"{name} for C, F, E, k = {sizes}", rtol=0, atol=0)


@check
def check_strongest_units(strongest_units):
    expert, x = PlainExpert(5, 12, "gelu"), torch.randn(7, 5, requires_grad=True)
    yield "the units are those that write most, the strongest first, and the answer is what they write together"
    for n in 1, 3, 12:
        with unchanged(x=x, weight=expert.down.weight):
            units, answer = strongest_units(expert, x, n)
        found = [strongest_by_loop(expert, token, n) for token in x]
        same(units, torch.stack([best for best, _ in found]), f"units for n = {n}")
        close(answer, torch.stack([wanted for _, wanted in found]), f"the answer of {n} units")
    yield "the gradient of the answer reaches x and all weights"
    answer = strongest_units(expert, x, 3)[1]
    wanted = torch.stack([strongest_by_loop(expert, token, 3)[1] for token in x])
    same_gradients(answer, wanted, {"x": x, **weights_of(expert)}, "the answer")
    yield "all units together are the expert, also where F = C, in a batch (B, T, C)"
    square, batch = PlainExpert(6, 6, "squared_relu"), torch.randn(2, 3, 6)
    close(strongest_units(square, batch, 6)[1], square(batch), "the answer of all units")
    units, answer = strongest_units(square, batch, 2)
    best, wanted = strongest_by_loop(square, batch[1, 2], 2)
    same(units[1, 2], best, "units of the last token")
    close(answer[1, 2], wanted, "the answer of the last token")
    yield "a single token (C,)"
    units, answer = strongest_units(expert, x[0], 4)
    best, wanted = strongest_by_loop(expert, x[0], 4)
    same(units, best, "units")
    close(answer, wanted, "the answer")
