"""Checks of lesson 23, st_moe."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from makemoe.checks import check, close, refuses, same, same_gradients, unchanged
from makemoe.experts import Expert
from makemoe.gating import TopkRouter
from makemoe.sparse_moe import Experts, SparseMoE

GATES = {"geglu": F.gelu, "swiglu": F.silu}
SLOW = {
    "geglu": lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2,
    "swiglu": lambda z: z / (1 + math.exp(-z)),
}


def gated_by_loop(name, x):
    "What a gated unit should answer for rows x (N, 2F), number by number in plain Python: (N, F)."
    half = x.shape[-1] // 2
    return torch.tensor([[SLOW[name](row[f]) * row[half + f] for f in range(half)] for row in x.tolist()])


def gated(expert, x, name):
    "What a gated expert without dropout should answer: (gate function(x W + b) * (x V + c)) W_2 + d."
    F_ = expert.down.weight.shape[1]
    b, c = (None, None) if expert.up.bias is None else (expert.up.bias[:F_], expert.up.bias[F_:])
    hidden = GATES[name](F.linear(x, expert.up.weight[:F_], b)) * F.linear(x, expert.up.weight[F_:], c)
    return F.linear(hidden, expert.down.weight, expert.down.bias)


def weights_of(module):
    "Its parameters by name, as sources of gradients."
    return {f"`{name}`": parameter for name, parameter in module.named_parameters()}


def mixture(C, E=4, k=2, F_=6):
    return SparseMoE(TopkRouter(C, E, k), Experts(E, C, F_, "gelu"))


def in_turn(x, moe, ff_before=None, ff_after=None):
    "What a fresh block should answer: (x, routing). Its norms still have weights of 1."
    def norm(x):
        return x * (x.square().mean(dim=-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt()

    if ff_before:
        x = x + ff_before(norm(x))
    y, routing = moe(norm(x))
    x = x + y
    return (x + ff_after(norm(x)) if ff_after else x), routing


@check
def check_gated_units(geglu, swiglu):
    units = {"geglu": geglu, "swiglu": swiglu}
    yield "it is the function of the first half times the second half"
    for name, unit in units.items():
        for F_ in 1, 3, 4:
            x = 2 * torch.randn(5, 2 * F_)
            with unchanged(x=x):
                close(unit(x), gated_by_loop(name, x), f"{name} of x (5, {2 * F_})", atol=1e-5)
    yield "x may have any shape (..., 2F)"
    for name, unit in units.items():
        for shape in (6,), (0, 6), (2, 1, 3, 6):
            x = torch.randn(shape)
            want = gated_by_loop(name, x.reshape(-1, 6)).view(*shape[:-1], 3)
            close(unit(x), want, f"{name} of x {shape}", atol=1e-5)
    yield "both halves get their gradient"
    for name, unit in units.items():
        x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        same_gradients(unit(x), GATES[name](x[:, :3]) * x[:, 3:], {"x": x}, name)
    yield "the answer has the type of x"
    for name, unit in units.items():
        same(unit(torch.randn(2, 6).bfloat16()).dtype, torch.bfloat16, f"the type of {name}")
    yield "gates of 1,000 and -1,000 give no nan"
    for name, unit in units.items():
        close(unit(torch.tensor([1e3, -1e3, 2.0, 2.0])), torch.tensor([2e3, 0.0]), f"{name} of large gates")


@check
def check_gated_expert(GatedExpert):
    yield "`up` has 2F rows and `down` has F columns"
    shapes = {"up.weight": (14, 5), "up.bias": (14,), "down.weight": (5, 7), "down.bias": (5,)}
    found = {name: tuple(weight.shape) for name, weight in GatedExpert(5, 7).named_parameters()}
    same(found, shapes, "the weights of GatedExpert(5, 7)")
    yield "F gate rows stand before F value rows; it is GEGLU unless told otherwise"
    expert, x = GatedExpert(5, 7), torch.randn(2, 3, 5, requires_grad=True)
    with unchanged(x=x, weight=expert.up.weight):
        y = expert(x)
    close(y, gated(expert, x, "geglu"), "the answer", atol=1e-5)
    yield "the activation is the one that was asked for, with biases and without"
    for name in GATES:
        for bias in True, False:
            other, some = GatedExpert(6, 4, activation=name, bias=bias), 2 * torch.randn(3, 6)
            same(other.up.bias is not None, bias, f"a bias in `up` with bias={bias}")
            same(other.down.bias is not None, bias, f"a bias in `down` with bias={bias}")
            close(other(some), gated(other, some, name), f"the answer with {name}, bias {bias}", atol=1e-5)
    yield "the gradient reaches x and all weights, in training and in evaluation"
    for mode in True, False:
        sources = {"x": x, **weights_of(expert)}
        want = gated(expert, x, "geglu")
        same_gradients(expert.train(mode)(x), want, sources, f"the answer, training {mode},", atol=1e-5)
    yield "all weights can learn: none is frozen, and no matrix starts at 0"
    for name, weight in weights_of(expert).items():
        assert weight.requires_grad and (weight.dim() < 2 or weight.detach().any()), f"{name} is frozen or 0"
    yield "dropout sets single numbers of the answer to zero, in training only, and scales up the rest"
    sleepy, wide = GatedExpert(16, 20, dropout=0.25), torch.randn(200, 16)
    full, dropped = gated(sleepy, wide, "geglu"), sleepy(wide)
    gone = dropped == 0
    share = gone.float().mean().item()
    assert 0.2 < share < 0.3, f"with dropout=0.25 a share of {share:.2f} of the answer is dropped in training"
    assert not gone.all(dim=0).any() and not gone.all(dim=1).any(), "whole tokens or channels are dropped"
    close(dropped, torch.where(gone, 0, full / 0.75), "what dropout leaves", atol=1e-5)
    close(sleepy.eval()(wide), full, "the answer in evaluation", atol=1e-5)
    yield "an activation without a gate, and an unknown one, are refused"
    for name in "gelu", "gegelu":
        refuses(ValueError, lambda name=name: GatedExpert(4, 6, activation=name), name, "geglu", "swiglu")


@check
def check_pack_expert(pack_expert):
    gate, value, down = nn.Linear(5, 7, bias=False), nn.Linear(5, 7, bias=False), nn.Linear(7, 5, bias=False)
    x = torch.randn(3, 5)
    yield "without biases, as in most models: the answer is down(silu(gate(x)) * value(x))"
    with unchanged(gate=gate.weight, value=value.weight, down=down.weight):
        expert = pack_expert(gate, value, down)
    close(expert(x), down(F.silu(gate(x)) * value(x)), "the answer", atol=1e-5)
    same(sorted(dict(expert.named_parameters())), ["down.weight", "up.weight"], "the parameters")
    yield "with biases, in another type, where F = C, and with another activation"
    for C, F_ in (4, 4), (6, 3):
        layers = nn.Linear(C, F_), nn.Linear(C, F_), nn.Linear(F_, C)
        gate, value, down = (layer.double() for layer in layers)
        some = torch.randn(2, C, dtype=torch.float64)
        got = pack_expert(gate, value, down, activation="geglu")(some)
        close(got, down(F.gelu(gate(some)) * value(some)), f"the answer for C = {C}, F = {F_}", atol=1e-5)
    yield "the weights are copies that can be trained"
    expert = pack_expert(gate, value, down)
    for name, weight in expert.named_parameters():
        assert weight.is_leaf and weight.requires_grad, f"`{name}` cannot be trained"
    before = expert(some).detach()
    with torch.no_grad():
        for layer in gate, value, down:
            layer.weight.zero_()
            layer.bias.zero_()
    same(expert(some).detach(), before, "the answer after the three layers were set to 0")


@check
def check_sparse_moe_block(SparseMoEBlock):
    C = 8
    x = torch.randn(2, 5, C)

    def layers():
        return mixture(C), Expert(C, 6, "gelu"), Expert(C, 12, "gelu")

    yield "with both dense layers: each of the three reads through a norm and adds to x, in turn"
    moe, before, after = layers()
    block = SparseMoEBlock(C, moe, before, after)
    with unchanged(x=x):
        y, routing = block(x)
    want, route = in_turn(x, moe, before, after)
    close(y, want, "the answer", atol=1e-5)
    yield "the routing is that of the mixture"
    close(routing.gates, route.gates, "its gates", atol=1e-5)
    yield "one dense layer, or none"
    for name, given in ("before", dict(ff_before=before)), ("after", dict(ff_after=after)), ("none", {}):
        close(SparseMoEBlock(C, moe, **given)(x)[0], in_turn(x, moe, **given)[0], f"the answer, {name}", atol=1e-5)
    yield "its weights are those of the layers, and a norm of C numbers for each layer"
    for given in {}, dict(ff_before=before), dict(ff_before=before, ff_after=after):
        inside = sum(weight.numel() for layer in (moe, *given.values()) for weight in layer.parameters())
        total = sum(weight.numel() for weight in SparseMoEBlock(C, moe, **given).parameters())
        same(total - inside, C * (1 + len(given)), f"weights of the norms with {' and '.join(given) or 'none'}")
    yield "the gradient reaches x, all layers and all norms, in training and in evaluation"
    x.requires_grad_()
    for mode in True, False:
        sources = {"x": x, **weights_of(moe), **weights_of(before), **weights_of(after)}
        got, want = block.train(mode)(x)[0], in_turn(x, moe, before, after)[0]
        same_gradients(got, want, sources, f"the answer, training {mode},", atol=1e-5)
        gradients = torch.autograd.grad(got.square().sum(), list(block.parameters()), allow_unused=True)
        lost = [name for (name, _), g in zip(block.named_parameters(), gradients) if g is None]
        assert not lost, f"no gradient reaches {', '.join(lost)}"
    yield "nothing is random: two calls give the same numbers"
    for mode in True, False:
        block.train(mode)
        same(block(x)[0], block(x)[0], f"the second answer, training {mode},")
    yield "x may have any shape (..., C), and its type is kept"
    for shape in (C,), (0, C), (2, 1, 3, C):
        some = torch.randn(shape)
        close(block(some)[0], in_turn(some, moe, before, after)[0], f"the answer to {shape}", atol=1e-5)
    double = SparseMoEBlock(C, mixture(C), Expert(C, 6)).double()
    same(double(x.double())[0].dtype, torch.float64, "the type of the answer")
