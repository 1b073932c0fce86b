"""Hidden cases for lesson 26: other sizes, devices, dropout."""

import torch

from makemoe.checks import check, close, same
from makemoe.checks.soft_moe import dispatch_by_loop, soft_by_loop


@check
def check_soft_dispatch(soft_dispatch):
    yield "more slots than tokens, more tokens than slots"
    for shape in (3, 20), (20, 3):
        logits = 5 * torch.randn(shape)
        for name, got, want in zip(["dispatch", "combine"], soft_dispatch(logits), dispatch_by_loop(logits)):
            close(got, want, name)
    yield "it works on the device of the logits"
    for name, matrix in zip(["dispatch", "combine"], soft_dispatch(torch.empty(2, 5, 4, device="meta"))):
        same(matrix.device.type, "meta", f"the device of {name}")


@check
def check_soft_moe(SoftMoE):
    yield "one expert, one slot, one token; and more slots than tokens"
    for C, E, P, T in (3, 1, 1, 1), (4, 5, 3, 2), (5, 2, 4, 9):
        for normalize in True, False:
            layer, x = SoftMoE(C, E, P, activation="gelu", normalize=normalize), torch.randn(T, C)
            close(layer(x), soft_by_loop(layer, x), f"y with C, E, P, T = {C, E, P, T}", atol=1e-5)
    yield "calls leave nothing behind, and the same call gives the same answer"
    layer, x = SoftMoE(4, 2, 2), torch.randn(2, 3, 4)
    names = sorted(layer.state_dict())
    same(layer(x), layer(x), "y of a second call")
    same(sorted(layer.state_dict()), names, "names in the state_dict")


@check
def check_padded_dispatch(padded_dispatch):
    yield "a single real token fills every slot"
    logits, real = torch.randn(4, 3), torch.tensor([False, True, False, False])
    same(padded_dispatch(logits, real)[0], real[:, None].float().expand(4, 3).contiguous(), "dispatch")
    yield "it works on the device of the logits"
    real = torch.ones(2, 5, dtype=torch.bool, device="meta")
    same(padded_dispatch(torch.empty(2, 5, 4, device="meta"), real)[0].device.type, "meta", "the device")
