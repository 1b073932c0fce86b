"Checks of lesson 28, today's open models."

import math

import torch
from torch.nn import functional as F

from makemoe.checks import check, close, refuses, same, same_gradients, unchanged
from makemoe.gating import Routing, top_k_gating
from makemoe.losses import load_balancing_loss
from makemoe.sparse_moe import Experts
from makemoe.st_moe import GatedExpert


def scores_of(row, score):
    "The scores of one token, E numbers in plain Python."
    if score == "softmax":
        parts = [math.exp(z - max(row)) for z in row]
        return [part / sum(parts) for part in parts]
    return [1 / (1 + math.exp(-z)) if score == "sigmoid" else math.sqrt(math.log1p(math.exp(z))) for z in row]


def route_by_loop(logits, k, settings, bias=None):
    "Gates and choices (N, E) of logits (N, E), token by token in plain Python."
    E = logits.shape[-1]
    size, rows, choices = E // settings.groups, [], []
    for row in logits.tolist():
        s = scores_of(row, settings.score)
        ranked = [s[e] + (0 if bias is None else bias[e].item()) for e in range(E)]
        worth = [sum(sorted(ranked[g * size : (g + 1) * size])[-2:]) for g in range(settings.groups)]
        kept = sorted(range(settings.groups), key=lambda g: -worth[g])[: settings.groups_kept]
        best = sorted([e for e in range(E) if e // size in kept], key=lambda e: -ranked[e])[:k]
        total = sum(s[e] for e in best) if settings.normalise else 1
        rows.append([settings.scale * s[e] / total if e in best else 0.0 for e in range(E)])
        choices.append([e in best for e in range(E)])
    return torch.tensor(rows), torch.tensor(choices)


def agrees(routing, logits, k, settings, bias, what):
    "Assert that a routing of logits (N, E) is that of the loop."
    gates, chosen = route_by_loop(logits.detach(), k, settings, bias)
    same(routing.chosen, chosen, f"chosen {what}")
    same(routing.kept, chosen, f"kept {what}")
    close(routing.gates.detach(), gates, f"gates {what}")
    same(routing.logits.detach(), logits.detach(), f"logits {what}")


def plain_gates(logits, chosen, settings):
    "The gates of given choices, to compare gradients with."
    s = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(), "sqrt_softplus": F.softplus(logits).sqrt()}
    gates = s[settings.score] * chosen
    return settings.scale * (gates / gates.sum(dim=-1, keepdim=True) if settings.normalise else gates)


@check
def check_open_gating(open_gating, RouterSettings):
    logits, bias = 2 * torch.randn(30, 8), 0.4 * torch.randn(8)
    yield "each score, with gates that are divided by their sum after the choice, or not"
    for score in "softmax", "sigmoid", "sqrt_softplus":
        for normalise in True, False:
            settings = RouterSettings(score, normalise=normalise)
            with unchanged(logits=logits):
                for k in 1, 3, 8:
                    what = f"with {score}, normalise {normalise}, k = {k}"
                    agrees(open_gating(logits, k, settings), logits, k, settings, None, what)
    yield "the bias is added to the score, and only for the choice"
    for score in "softmax", "sigmoid", "sqrt_softplus":
        settings = RouterSettings(score, bias=True)
        with unchanged(logits=logits, bias=bias):
            agrees(open_gating(logits, 3, settings, bias), logits, 3, settings, bias, f"with {score} and a bias")
    yield "only the best groups are open, by the sum of the two best of each, with a bias and without"
    for groups, kept in (4, 2), (2, 1), (4, 4), (8, 5):
        settings = RouterSettings("sigmoid", groups=groups, groups_kept=kept)
        for b in None, bias, bias - 3:
            agrees(open_gating(logits, 3, settings, b), logits, 3, settings, b, f"with {kept} of {groups} groups")
    yield "scale multiplies the gates, whether they are divided by their sum or not"
    for normalise in True, False:
        settings = RouterSettings("sigmoid", normalise=normalise, scale=2.5)
        agrees(open_gating(logits, 2, settings), logits, 2, settings, None, f"with scale, normalise {normalise}")
    yield "logits far apart keep their order, though their scores are rounded to 0 and 1"
    for row, k, best in ([200.0, 0.0, -5.0, -9.0], 2, [0, 1]), ([-8.0, -3.0, 300.0, -300.0], 3, [0, 1, 2]):
        for settings in RouterSettings(), RouterSettings(normalise=False):
            routing = open_gating(torch.tensor([row]), k, settings)
            same(routing.chosen[0].nonzero()[:, 0].tolist(), best, f"the choice for logits {row}, k = {k},")
    routing = open_gating(torch.tensor([[40.0, 60.0, 80.0, 5.0]]), 2, RouterSettings("sigmoid"))
    same(routing.chosen[0].nonzero()[:, 0].tolist(), [1, 2], "the choice for sigmoids that are all rounded to 1")
    yield "gates that are divided by their sum are numbers for very small scores, too"
    for score in "softmax", "sigmoid", "sqrt_softplus":
        routing = open_gating(torch.tensor([[-200.0, -201.0, -300.0]]), 2, RouterSettings(score))
        close(routing.gates.sum(), 1.0, f"the sum of gates of very small {score} scores")
    yield "the gradient of the gates reaches the logits as the formula says, and none reaches the bias"
    for settings in RouterSettings(), RouterSettings(normalise=False), RouterSettings("sqrt_softplus", scale=1.5):
        logits = (2 * torch.randn(20, 8)).requires_grad_()
        b = torch.nn.Parameter(0.3 * torch.randn(8))
        for given in None, b:
            routing = open_gating(logits, 3, settings, given)
            formula = plain_gates(logits, routing.chosen, settings)
            same_gradients(routing.gates, formula, {"logits": logits}, f"gates with {settings.score}")
        reached = torch.autograd.grad(routing.gates.square().sum(), b, allow_unused=True)[0]
        assert reached is None or not reached.any(), "a gradient reaches the bias"
    yield "any dimensions may come before E"
    settings, batch = RouterSettings("sigmoid", groups=4, groups_kept=2), torch.randn(2, 3, 5, 8)
    flat = open_gating(batch.view(-1, 8), 3, settings, bias)
    close(open_gating(batch, 3, settings, bias).gates, flat.gates.view(2, 3, 5, 8), "gates of (2, 3, 5, 8)")
    yield "groups that cannot be are refused in one line"
    for groups, kept, k, word in (3, 1, 2, "groups"), (4, 1, 3, "groups_kept"), (4, 5, 2, "groups_kept"):
        impossible = RouterSettings(groups=groups, groups_kept=kept)
        refuses(ValueError, lambda: open_gating(torch.zeros(2, 8), k, impossible), word)


class Witness(torch.nn.Module):
    "Experts that remember the rows and the routing of their last call."

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x, routing):
        self.x, self.routing = x, routing
        return self.experts(x, routing)


def gated_experts(E, C, n_hidden):
    return Experts(E, C, n_hidden, "swiglu")


def gate_first_by_loop(experts, x, routing):
    "The sum over the kept experts of expert(gate * token)."
    total = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        gate = routing.gates[..., e, None]
        total = total + routing.kept[..., e, None] * expert(gate * x)
    return total


@check
def check_gate_first(GateFirst):
    experts, x = gated_experts(5, 6, 8), torch.randn(2, 9, 6)
    yield "the gate multiplies the expert's input, and the answers are added as they are"
    for k in 1, 2, 5:
        routing = top_k_gating(torch.randn(2, 9, 5), k)
        with unchanged(x=x, gates=routing.gates):
            y = GateFirst(experts)(x, routing)
        close(y, gate_first_by_loop(experts, x, routing), f"the answer with k = {k}")
    yield "a choice that is dropped adds nothing, and a token without experts gets zeros"
    routing = top_k_gating(torch.randn(40, 5), 3)
    kept = routing.chosen & (torch.rand(40, 5) < 0.5)
    for gates in routing.gates * kept, routing.gates:
        dropped, x = Routing(gates, routing.logits, routing.chosen, kept), torch.randn(40, 6)
        close(GateFirst(experts)(x, dropped), gate_first_by_loop(experts, x, dropped), "the answer with drops")
    empty = Routing(0 * gates, routing.logits, routing.chosen, kept & False)
    close(GateFirst(experts)(x, empty), torch.zeros(40, 6), "the answer where nothing is kept")
    yield "the experts work on the kept pairs only, each pair with a gate of 1"
    witness = Witness(experts)
    GateFirst(witness)(x, dropped)
    same(int(witness.routing.kept.sum()), int(kept.sum()), "the number of pairs that the experts get")
    handed = witness.routing.gates[witness.routing.kept]
    close(handed, torch.ones_like(handed), "the gates that the experts get")
    yield "a gate of 0 counts like any other: an expert with biases answers 0 * token, too"
    zero = Routing(torch.zeros(40, 5), routing.logits, routing.chosen, routing.chosen)
    close(GateFirst(experts)(x, zero), gate_first_by_loop(experts, x, zero), "the answer with gates of 0")
    yield "gradients reach tokens, gates and experts, in training and evaluation"
    x, logits = torch.randn(20, 6, requires_grad=True), torch.randn(20, 5, requires_grad=True)
    for training in True, False:
        layer, routing = GateFirst(experts).train(training), top_k_gating(logits, 2)
        sources = {"x": x, "logits": logits} | dict(experts.named_parameters())
        same_gradients(layer(x, routing), gate_first_by_loop(experts, x, routing), sources, "the answer")
    yield "the answer has the type and the dimensions of x"
    low = x.detach().bfloat16().view(4, 5, 6)
    y = GateFirst(experts.to(torch.bfloat16))(low, top_k_gating(torch.randn(4, 5, 5), 2))
    assert (y.shape, y.dtype) == ((4, 5, 6), torch.bfloat16), f"an answer of {tuple(y.shape)} and {y.dtype}"


def some_layers(count, B, T, E, k):
    "Routings (B, T, E) whose preferences differ from layer to layer and from sequence to sequence."
    return [top_k_gating(torch.randn(B, T, E) + 2 * torch.randn(B, 1, E) + torch.randn(E), k) for _ in range(count)]


def layer_loss(routing):
    "E / k * sum_e f_e P_e of one routing (N, E)."
    E, k = routing.logits.shape[-1], routing.chosen.sum().item() / len(routing.chosen)
    f = [routing.chosen[:, e].float().mean() for e in range(E)]
    return E / k * sum(f[e] * routing.logits.softmax(-1)[:, e].mean() for e in range(E))


def sequences(routing):
    return [Routing(*(field[b] for field in vars(routing).values())) for b in range(len(routing.gates))]


def flat(routing):
    return Routing(*(field.flatten(0, 1) for field in vars(routing).values()))


@check
def check_balance_loss(balance_loss):
    yield "one layer, the whole batch: the loss of lesson 08"
    layers = some_layers(3, 4, 6, 5, 2)
    for routing in layers:
        close(balance_loss([routing]), load_balancing_loss(routing), "the loss of one layer")
    yield "each layer by itself, then the mean over the layers"
    close(balance_loss(layers), sum(layer_loss(flat(r)) for r in layers) / 3, "the loss of three layers")
    crossed = [top_k_gating(torch.tensor(row).expand(2, 4, 2), 1) for row in ([9.0, 0.0], [0.0, 9.0])]
    close(balance_loss(crossed), 2.0, "the loss of two layers, each with a favourite of its own", rtol=1e-3)
    yield "it is divided by k: a balanced load has a loss of 1"
    for k in 1, 2, 4:
        even = top_k_gating(torch.eye(4).roll(1, 0)[None] + torch.eye(4)[None] * 2, k)
        close(balance_loss([Routing(even.gates, 0 * even.logits, even.chosen, even.kept)] * 2), 1.0, f"with k = {k}")
    yield "by sequence: each sequence of each layer by itself, then the mean"
    want = sum(layer_loss(row) for r in layers for row in sequences(r)) / 12
    close(balance_loss(layers, "sequence"), want, "the loss by sequence")
    close(balance_loss(layers, scope="batch"), balance_loss(layers), "the loss of the batch")
    yield "choices count, also those that are dropped later"
    full = [Routing(r.gates * 0, r.logits, r.chosen, r.kept & False) for r in layers]
    for scope in "batch", "sequence":
        close(balance_loss(full, scope), balance_loss(layers, scope), f"the loss by {scope}, all choices dropped")
    yield "its gradient pushes the logits as the formula does"
    raw = torch.randn(2, 3, 7, 5, requires_grad=True)
    layers = [top_k_gating(x, 2) for x in raw]
    pieces = [row for r in layers for row in sequences(r)]
    same_gradients(balance_loss(layers, "sequence"), sum(map(layer_loss, pieces)) / 6, {"logits": raw}, "the loss")
    same_gradients(balance_loss(layers), sum(layer_loss(flat(r)) for r in layers) / 2, {"logits": raw}, "the loss")
    yield "an unknown scope is refused in one line"
    refuses(ValueError, lambda: balance_loss(layers, "layer"), "layer", "batch", "sequence")


@check
def check_gates_then_values(gates_then_values):
    yield "even rows first, then odd rows"
    rows = torch.arange(2 * 6 * 3.0).view(2, 6, 3)
    with unchanged(rows=rows):
        same(gates_then_values(rows), rows[:, [0, 2, 4, 1, 3, 5]], "rows (2, 6, 3)")
    yield "biases (E, 2F) are sorted in the same way"
    bias = torch.tensor([[1.0, -1.0, 2.0, -2.0], [3.0, -3.0, 4.0, -4.0]])
    same(gates_then_values(bias), torch.tensor([[1.0, 2.0, -1.0, -2.0], [3.0, 4.0, -3.0, -4.0]]), "biases (2, 4)")
    yield "an expert with sorted rows answers like one with pairs"
    expert, x = GatedExpert(6, 5, "swiglu"), torch.randn(7, 6)
    pairs, bias = torch.randn(1, 10, 6), torch.randn(1, 10)
    hidden = x @ pairs[0].T + bias[0]
    want = expert.down(F.silu(hidden[:, ::2]) * hidden[:, 1::2])
    expert.up.weight.data, expert.up.bias.data = gates_then_values(pairs)[0], gates_then_values(bias)[0]
    close(expert(x), want, "the answer")
    yield "the type stays"
    got = gates_then_values(torch.zeros(3, 8, 2, dtype=torch.bfloat16))
    same(got, torch.zeros(3, 8, 2, dtype=torch.bfloat16), "rows in bfloat16")


MIXTRAL = dict(V=32000, C=4096, L=32, attention=41_943_040, E=8, k=2, F=14336)
DEEPSEEK = dict(V=129280, C=7168, L=61, attention=187_105_280, E=256, k=8, F=2048)
DEEPSEEK |= dict(F_shared=2048, dense=3, F_dense=18432)


@check
def check_count_weights(count_weights):
    yield "a model small enough to count on paper"
    total, active = count_weights(V=10, C=2, L=1, attention=7, E=3, k=1, F=5)
    same((total, active), (20 + 20 + 7 + 6 + 3 * 30, 20 + 7 + 6 + 30), "(total, active)")
    yield "all layers, each with its attention, router and experts"
    total, active = count_weights(V=10, C=2, L=4, attention=7, E=3, k=2, F=5)
    same((total, active), (40 + 4 * 103, 20 + 4 * 73), "(total, active)")
    yield "a shared expert works on every token"
    total, active = count_weights(V=10, C=2, L=4, attention=7, E=3, k=2, F=5, F_shared=4)
    same((total, active), (40 + 4 * 127, 20 + 4 * 97), "(total, active)")
    yield "dense layers have neither router nor experts"
    total, active = count_weights(V=10, C=2, L=4, attention=7, E=3, k=2, F=5, F_shared=4, dense=3, F_dense=8)
    same((total, active), (40 + 127 + 3 * 55, 20 + 97 + 3 * 55), "(total, active)")
    yield "Mixtral and DeepSeek-V3, but for norms and biases"
    published = ("Mixtral", MIXTRAL, 46.702526, 12.748587), ("DeepSeek-V3", DEEPSEEK, 671.025398, 36.624597)
    for name, sizes, total, active in published:
        got = count_weights(**sizes)
        close(got[0] / 1e9, total, f"billions of parameters of {name}")
        close(got[1] / 1e9, active, f"billions of active parameters of {name}")
