"""Hidden cases for lesson 21: other sizes and scores, the ends of the jitter, another device."""

import torch
from torch import nn

from classroom.hidden.gating import on_its_device
from makemoe.checks import check, close, same
from makemoe.checks.gating import follows
from makemoe.checks.switch import FIELDS, open_router, read_factors, switch_by_loop


@check
def check_switch_gating(switch_gating):
    yield "nine experts, small and large scores"
    for scale in 1e-3, 1.0, 30.0:
        logits = scale * torch.randn(40, 9)
        follows(switch_gating(logits), logits, switch_by_loop(logits))
        follows(switch_gating(logits[:5], 4), logits[:5], switch_by_loop(logits[:5], 4), "gates with k = 4")
    yield "with k = E the gates are the plain softmax"
    close(switch_gating(logits, 9).gates, logits.softmax(dim=-1), "gates")
    yield "no token, and the same again"
    same(switch_gating(torch.zeros(0, 4)).gates.shape, torch.Size([0, 4]), "the shape of no tokens")
    same(switch_gating(logits).gates, switch_gating(logits).gates, "gates of a second call")
    yield "many equal experts"
    same(switch_gating(torch.zeros(3, 70), 5).chosen[:, :5].sum().item(), 15, "choices among the first five experts")
    yield "it works on the device of the logits"
    on_its_device(switch_gating, logits)


@check
def check_switch_router(SwitchRouter):
    yield "a large jitter reaches both ends, and no further"
    tokens = torch.randn(4000, 4).sign()
    factors = read_factors(tokens, open_router(SwitchRouter, 0.9)(tokens).gates)
    assert factors.min() < 0.12 and factors.max() > 1.88, f"factors from {factors.min():.2f} to {factors.max():.2f}"
    yield "a training step in between changes nothing about evaluation"
    router, x = SwitchRouter(12, 9, 2, jitter=0.2).eval(), torch.randn(3, 4, 12)
    before = router(x)
    router.train()(x)
    for field in FIELDS:
        same(getattr(router.eval()(x), field), getattr(before, field), field)
    yield "relabelling the experts permutes the gates"
    order, twin = torch.randperm(9), SwitchRouter(12, 9, 2, jitter=0.2)
    twin.load_state_dict({name: value[order] for name, value in router.state_dict().items()})
    close(twin.eval()(x).gates, before.gates[..., order], "gates")
    yield "its weights are those of a TopkRouter"
    same(sorted(router.state_dict()), ["linear.bias", "linear.weight"], "names in the state_dict")


@check
def check_switch_init(switch_init):
    yield "one value has a fan-in of one"
    for _ in range(20):
        weight = nn.Parameter(torch.empty(1, 1))
        switch_init(weight, 0.01)
        assert weight.abs() <= 0.2001, f"{weight.item()}, but two deviations are 0.2"
    yield "experts differ"
    weight = nn.Parameter(torch.empty(4, 16, 24))
    switch_init(weight)
    assert not (weight[1:] == weight[:1]).any(), "two experts have the same weights"
