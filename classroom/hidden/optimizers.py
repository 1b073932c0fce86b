"""Hidden cases for lesson 14: other sizes than students can see."""

import torch
from torch import nn

from makemoe.checks import check, close
from makemoe.checks.optimizers import by_svd


@check
def check_adamw_step(adamw_step):
    yield "two hundred steps, one number"
    theirs = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    w, m, v = torch.ones(()), torch.zeros(()), torch.zeros(())
    for t in range(1, 201):
        theirs.grad = 2 * w.clone() - 0.5
        w, m, v = adamw_step(w, theirs.grad, m, v, t, 0.01, decay=0.1)
        optimizer.step()
    close(w, theirs.detach(), "w after 200 steps", 1e-3, 1e-4)


@check
def check_orthogonalize(orthogonalize):
    yield "a single row, and tall matrices in a stack"
    for shape in (1, 8), (4, 11, 3):
        x = torch.randn(shape, dtype=torch.double)
        close(orthogonalize(x), by_svd(x, 5), f"{shape}", 1e-5, 1e-8)


@check
def check_WeightAverage(WeightAverage):
    yield "weights of several shapes"
    model, other = (nn.Sequential(nn.Linear(2, 5), nn.LayerNorm(5)) for _ in range(2))
    average = WeightAverage(model, 0.99)
    average.update(model)
    average.copy_to(other)
    for (name, ours), theirs in zip(other.named_parameters(), model.parameters()):
        close(ours.detach(), theirs.detach(), name)
