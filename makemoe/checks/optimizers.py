"""Checks of lesson 14, optimizers."""

import torch
from torch import nn

from makemoe.checks import check, close, same, unchanged


@check
def check_adamw_step(adamw_step):
    for decay, betas, eps, claim in (
        (0.0, (0.9, 0.999), 1e-8, "five steps are those of torch.optim.AdamW"),
        (0.5, (0.9, 0.999), 1e-8, "with weight decay"),
        (0.5, (0.5, 0.8), 0.1, "with other betas and another eps"),
    ):
        yield claim
        theirs = nn.Parameter(torch.randn(4, 3))
        optimizer = torch.optim.AdamW([theirs], lr=0.1, betas=betas, eps=eps, weight_decay=decay)
        w, m, v = theirs.detach().clone(), torch.zeros(4, 3), torch.zeros(4, 3)
        for t in range(1, 6):
            theirs.grad = torch.randn(4, 3)
            old = dict(w=w, g=theirs.grad, m=m, v=v)
            with unchanged(**old):
                w, m, v = adamw_step(*old.values(), t, 0.1, betas, eps, decay)
            optimizer.step()
            close(w, theirs.detach(), f"w after step {t}")
            close(m, optimizer.state[theirs]["exp_avg"], f"m after step {t}")
            close(v, optimizer.state[theirs]["exp_avg_sq"], f"v after step {t}")


def by_svd(x, steps):
    "What `orthogonalize` promises: the polynomial on each singular value."
    U, s, V = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return U @ torch.diag_embed(s) @ V


@check
def check_orthogonalize(orthogonalize):
    for shape, steps, claim in (
        ((4, 4), 5, "a square matrix: directions kept, singular values lifted"),
        ((4, 4), 1, "steps counts the rounds"),
        ((3, 7), 5, "a wide matrix"),
        ((9, 4), 5, "a tall matrix"),
        ((2, 3, 6, 5), 5, "stacks of matrices, each by itself"),
    ):
        yield claim
        x = torch.randn(shape, dtype=torch.double)
        with unchanged(x=x):
            close(orthogonalize(x, steps), by_svd(x, steps), f"{shape} in {steps} rounds", 1e-5, 1e-8)
    yield "five rounds by default, in the type of x, whatever its size"
    close(orthogonalize(x.float()), by_svd(x, 5).float(), "float32", 1e-3, 1e-4)
    close(orthogonalize(1e-4 * x), by_svd(x, 5), "x / 10,000", 1e-4, 1e-6)
    yield "nothing is made of nothing"
    same(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4), "of zeros")
    yield "it computes where x is"
    assert orthogonalize(torch.zeros(5, 2, 3, device="meta")).device.type == "meta", "the device of x is not kept"


@check
def check_WeightAverage(WeightAverage):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    average, seen = WeightAverage(source, decay=0.9), []
    yield "after each update it is the mean with shares that fall by the decay"
    for n in range(1, 5):
        nn.init.normal_(source.weight)
        seen.append(source.weight.detach().clone())
        with unchanged(weight=source.weight, bias=source.bias):
            average.update(source)
            average.copy_to(target)
        shares = torch.tensor([0.9**age for age in reversed(range(n))])  # the newest has 1
        expected = sum(share * w for share, w in zip(shares / shares.sum(), seen))
        close(target.weight.detach(), expected, f"after {n} updates")
    close(target.bias.detach(), source.bias.detach(), "a weight that never moves")
    yield "it lives outside the models, and its copies are made in place"
    target.weight.data.zero_()
    kept = target.weight
    average.copy_to(target)
    assert target.weight is kept and kept.requires_grad and kept.grad_fn is None, "copy into the weights in place"
    close(kept.detach(), expected, "copied once more")
    yield "two averages do not disturb each other"
    short_memory = WeightAverage(source, decay=0.5)
    for weights in seen[:2]:
        source.weight.data.copy_(weights)
        short_memory.update(source)
    short_memory.copy_to(target)
    close(kept.detach(), (seen[0] + 2 * seen[1]) / 3, "decay 0.5")
    average.copy_to(target)
    close(kept.detach(), expected, "the first one again")
