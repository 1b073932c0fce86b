"""Hidden cases for lesson 03: other sizes, rates and types than students can see."""

import torch

from makemoe.checks import check, close, same
from makemoe.checks.experts import PlainExpert, formula, strongest_by_loop


@check
def check_expert(squared_relu, Expert):
    expert, x = Expert(9, 3, dropout=0.6), torch.randn(400, 9)
    yield "an expert narrower than the token, with more dropout"
    share = (expert(x) == 0).float().mean().item()
    assert 0.55 < share < 0.65, f"with dropout=0.6 a share of {share:.2f} of the answer is dropped in training"
    close(expert.eval()(x), formula(expert, x), "the answer in evaluation")
    yield "large numbers"
    close(squared_relu(torch.tensor([-1e4, 1e4])), torch.tensor([0.0, 1e8]), "squared_relu(z)")
    plain = Expert(4, 8)
    close(plain(1e3 * x[:, :4]), formula(plain, 1e3 * x[:, :4]), "the answer to large tokens", rtol=1e-4, atol=1e-3)
    yield "calls leave nothing behind"
    same(list(plain.state_dict()), ["up.weight", "up.bias", "down.weight", "down.bias"], "names in the state_dict")
    yield "it works on the device of its weights"
    same(plain.to("meta")(torch.zeros(2, 4, device="meta")).device.type, "meta", "the device of the answer")


@check
def check_layer_parameters(layer_parameters):
    yield "the sizes of a large model"
    shared, expert = 4 * 4096**2 + 4096 * 8, 2 * 4096 * 14336
    total, active = layer_parameters(4096, 14336, 8, 2)
    close(total, shared + 8 * expert, "total", rtol=0, atol=0)
    close(active, shared + 2 * expert, "active", rtol=0, atol=0)


@check
def check_strongest_units(strongest_units):
    yield "other sizes, float64"
    expert, x = PlainExpert(8, 20, "gelu").double(), torch.randn(4, 1, 8, dtype=torch.float64)
    units, answer = strongest_units(expert, x, 5)
    for t in range(4):
        best, wanted = strongest_by_loop(expert, x[t, 0], 5)
        same(units[t, 0], best, f"units of token {t}")
        close(answer[t, 0], wanted, f"the answer of token {t}")
