"""Hidden cases for lesson 23: other sizes and types than students can see."""

import torch
from torch import nn
from torch.nn import functional as F

from makemoe.checks import check, close, same
from makemoe.checks.st_moe import GATES, gated, gated_by_loop, in_turn, mixture


@check
def check_gated_units(geglu, swiglu):
    yield "a large batch, and float64"
    for name, unit in dict(geglu=geglu, swiglu=swiglu).items():
        x = 3 * torch.randn(20, 22)
        close(unit(x), gated_by_loop(name, x), name, atol=1e-5)
        same(unit(x.double()).dtype, torch.float64, f"the type of {name}")


@check
def check_gated_expert(GatedExpert):
    yield "one hidden unit, more channels than hidden units, large tokens, no tokens"
    for C, F_ in (9, 1), (20, 6), (3, 40):
        for name in GATES:
            expert, x = GatedExpert(C, F_, name), torch.randn(4, C)
            for some in x, 30 * x, x[:0], x[0]:
                close(expert(some), gated(expert, some, name), f"the answer with {name}", rtol=1e-4, atol=1e-3)
    yield "it works in the type of its weights"
    same(GatedExpert(4, 6).double()(torch.randn(2, 4).double()).dtype, torch.float64, "the type of the answer")


@check
def check_pack_expert(pack_expert):
    yield "a wide expert with biases"
    gate, value, down = nn.Linear(6, 30), nn.Linear(6, 30), nn.Linear(30, 6)
    x = torch.randn(2, 3, 6)
    close(pack_expert(gate, value, down)(x), down(F.silu(gate(x)) * value(x)), "the answer", atol=1e-5)


@check
def check_sparse_moe_block(SparseMoEBlock):
    yield "other sizes, small and large tokens"
    C = 12
    moe, before, after = mixture(C, E=5, k=3), nn.Linear(C, C), nn.Linear(C, C)
    for size in 1e-3, 1.0, 1e3:
        x = size * torch.randn(7, C)
        got, want = SparseMoEBlock(C, moe, before, after)(x)[0], in_turn(x, moe, before, after)[0]
        close(got, want, f"the answer to tokens of size {size}", rtol=1e-4, atol=1e-4)
