"""Hidden cases for lesson 05: other sizes, no noise at all, and large scores."""

import torch
from torch import nn

from makemoe.checks import check, close, same
from makemoe.checks.noisy_gating import probability_by_loop
from makemoe.gating import top_k_gating


@check
def check_noisy_topk_router(NoisyTopkRouter):
    yield "without deviation, training equals evaluation"
    router, x = NoisyTopkRouter(3, 7, 3), torch.randn(2, 9, 3)
    nn.init.zeros_(router.noise_linear.weight)
    nn.init.constant_(router.noise_linear.bias, -100.0)
    close(router(x).gates, router.eval()(x).gates, "gates")
    yield "the smallest batch keeps its shape"
    same(tuple(router.train()(x[:1, :1]).logits.shape), (1, 1, 7), "the shape of the logits of a single token")


@check
def check_gumbel_choice(gumbel_choice):
    yield "what is drawn follows the softmax"
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    drawn = gumbel_choice(logits.expand(40_000, 4), torch.rand(40_000, 4))
    counts, p = torch.bincount(drawn, minlength=4), logits.softmax(dim=-1)
    z = ((counts - 40_000 * p) / (40_000 * p * (1 - p)).sqrt()).abs().max()
    assert z < 5, f"frequencies {counts / 40_000}, but should be {p}"
    yield "large scores"
    same(gumbel_choice(torch.tensor([[1e4, 0.0, -1e4]]), torch.rand(1, 3)), torch.tensor([0]), "the expert")


@check
def check_choice_probability(choice_probability):
    yield "other sizes"
    logits, deviation = 3 * torch.randn(8, 9), 0.1 + torch.rand(8, 9)
    noisy = logits + deviation * torch.randn(8, 9)
    close(choice_probability(logits, noisy, deviation, 3), probability_by_loop(logits, noisy, deviation, 3), "P")
    yield "drawn again, expert 3 is chosen that often"
    again = noisy[0].repeat(20_000, 1)
    again[:, 3] = logits[0, 3] + deviation[0, 3] * torch.randn(20_000)
    share = top_k_gating(again, 5).chosen[:, 3].float().mean()
    p = choice_probability(logits, noisy, deviation, 5)[0, 3]
    assert abs(share - p) < 5 * (p * (1 - p) / 20_000).sqrt() + 1e-6, f"{p:.3f}, but it is chosen in {share:.3f}"
