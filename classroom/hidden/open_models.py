"Hidden cases for lesson 28: other sizes and settings than students can see."

import torch

from makemoe.checks import check, close, same
from makemoe.checks.open_models import (
    agrees,
    flat,
    gate_first_by_loop,
    gated_experts,
    layer_loss,
    sequences,
    some_layers,
)
from makemoe.gating import top_k_gating


@check
def check_open_gating(open_gating, RouterSettings):
    yield "fifteen experts in five groups, all switches at once"
    logits, bias = 3 * torch.randn(25, 15), torch.randn(15)
    for score in "softmax", "sigmoid", "sqrt_softplus":
        settings = RouterSettings(score, normalise=False, bias=True, groups=5, groups_kept=3, scale=0.5)
        agrees(open_gating(logits, 4, settings, bias), logits, 4, settings, bias, f"with {score}")


@check
def check_gate_first(GateFirst):
    yield "twelve experts, four of them for each token"
    experts, x = gated_experts(12, 4, 3), torch.randn(3, 5, 2, 4)
    routing = top_k_gating(torch.randn(3, 5, 2, 12), 4)
    close(GateFirst(experts)(x, routing), gate_first_by_loop(experts, x, routing), "the answer")


@check
def check_balance_loss(balance_loss):
    yield "five layers of other sizes"
    layers = some_layers(5, 3, 11, 7, 3)
    close(balance_loss(layers), sum(layer_loss(flat(r)) for r in layers) / 5, "the loss of the batch")
    want = sum(layer_loss(row) for r in layers for row in sequences(r)) / 15
    close(balance_loss(layers, "sequence"), want, "the loss by sequence")


@check
def check_gates_then_values(gates_then_values):
    yield "one pair, and many"
    for pairs in 1, 9:
        rows = torch.randn(4, 2 * pairs, 5)
        same(gates_then_values(rows), rows.unflatten(1, (pairs, 2)).transpose(1, 2).flatten(1, 2), "the rows")


@check
def check_count_weights(count_weights):
    yield "a model with everything"
    total, active = count_weights(V=7, C=3, L=9, attention=11, E=6, k=4, F=2, F_shared=5, dense=4, F_dense=13)
    always = 21 + 9 * 11 + 4 * 9 * 13 + 5 * (18 + 45)
    same((total, active), (always + 21 + 5 * 6 * 18, always + 5 * 4 * 18), "(total, active)")
