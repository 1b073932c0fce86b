"""Checks of lesson 04, gating."""

import math

import torch
from torch.nn import functional as F

from makemoe.checks import check, close, same, same_gradients, unchanged

GAP = 300.0 * torch.tensor([[1, 0, -1], [1, -1, 0], [-1, 0, 1], [0, -1, 1]])  # one of the two chosen has the gate 0


def gates_by_loop(logits, k):
    "Gates (T, E) of logits (T, E), one token after another: a softmax over the k best, 0 for the others."
    gates = torch.zeros_like(logits)
    for t in range(len(logits)):
        best = logits[t].topk(k).indices
        gates[t, best] = logits[t, best].softmax(dim=-1)
    return gates


def switch_by_loop(logits):
    "Gates (T, E) of logits (T, E): the probability of each token's best expert among all, 0 for the others."
    gates = torch.zeros_like(logits)
    for t in range(len(logits)):
        best = logits[t].argmax()
        gates[t, best] = (logits[t, best] - logits[t].logsumexp(dim=-1)).exp()
    return gates


def fewest(row, p):
    "Numbers of the fewest experts whose probabilities reach `p`: the best one is taken again and again."
    probs, taken = row.double().softmax(dim=-1).tolist(), []
    while sum(probs[e] for e in taken) < p and len(taken) < len(probs):
        taken.append(max((e for e in range(len(probs)) if e not in taken), key=lambda e: probs[e]))
    return sorted(taken)


def entropy_by_loop(logits):
    "Average over tokens of the sum of -p ln p, for logits of shape (..., E)."
    rows = [row.double().softmax(dim=-1).tolist() for row in logits.reshape(-1, logits.shape[-1])]
    return sum(-sum(p * math.log(p) for p in row if p > 0) for row in rows) / len(rows)


def follows(routing, logits, gates, what="gates"):
    "Assert that all four fields are those of a decision with these `gates` in which nothing is dropped."
    close(routing.gates, gates, what)
    same(routing.chosen, gates != 0, "chosen")
    same(routing.kept, routing.chosen, "kept")
    same(routing.logits, logits, "the record's logits")


@check
def check_routing(Routing):
    logits = torch.tensor([[2.0, 1.0, 0.1, -1.0], [0.5, 2.5, 0.0, 2.0], [-1.0, 0.2, 1.5, 0.3], [1.0, 1.2, 3.0, 0.0]])
    chosen = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1], [0, 1, 1, 0]], dtype=torch.bool)
    kept = chosen.clone()
    kept[:, 2] = False
    routing = Routing(chosen / 2, logits, chosen, kept)
    yield "the load counts the kept tokens of each expert, whatever their gates"
    assert not routing.load.is_floating_point(), f"load should be integers, but is {routing.load}"
    same(routing.load.tolist(), [1, 3, 0, 2], "load")
    same(Routing(0.0 * logits, logits, chosen, kept).load.tolist(), [1, 3, 0, 2], "load where all gates are 0")
    yield "dropped is the share of the choices that are not kept"
    close(routing.dropped, 2 / 8, "dropped")
    close(Routing(chosen / 2, logits, chosen, chosen).dropped, 0, "dropped where all are kept")
    yield "entropy is that of the probabilities, averaged over the tokens"
    close(routing.entropy, entropy_by_loop(logits), "entropy")
    yield "the fields may have any shape (..., E)"
    most = torch.ones(4, 4, dtype=torch.bool)
    most[0, 0] = False
    pair = Routing(torch.zeros(2, 4, 4), torch.stack([logits, 4 * logits]), torch.stack([chosen, most | True]),
                   torch.stack([kept, most]))  # (2, T, E): the tokens above, and tokens that choose all
    same(pair.load.tolist(), [4, 7, 4, 6], "load of a batch")
    close(pair.dropped, 3 / 24, "dropped of a batch")
    close(pair.entropy, (entropy_by_loop(logits) + entropy_by_loop(4 * logits)) / 2, "entropy of a batch")
    alone = Routing(chosen[0] / 2, logits[0], chosen[0], kept[0])
    same(alone.load.tolist(), [1, 1, 0, 0], "load of a single token (E,)")
    close(alone.entropy, entropy_by_loop(logits[:1]), "entropy of a single token (E,)")
    yield "a certain router has entropy 0"
    close(Routing(chosen / 2, torch.tensor([[1e4, 0.0, 0.0, 0.0]]), chosen, chosen).entropy, 0, "entropy")
    yield "dropped is 0 if no expert was chosen"
    nobody = torch.zeros(4, 4, dtype=torch.bool)
    close(Routing(nobody.float(), logits, nobody, nobody).dropped, 0, "dropped")


@check
def check_top_k_gating(top_k_gating):
    logits = 2 * torch.randn(6, 5, requires_grad=True)
    yield "every token chooses exactly k experts, and all of them are kept"
    with unchanged(logits=logits):
        routing = top_k_gating(logits, 2)
    same(routing.chosen.sum(dim=-1), torch.full((6,), 2), "the number of experts per token")
    same(routing.kept, routing.chosen, "kept")
    yield "the gates of the chosen are a softmax over their logits, the other gates are 0"
    close(routing.gates, gates_by_loop(logits, 2), "gates")
    yield "the gradient of the gates reaches the logits of the chosen"
    same_gradients(routing.gates, gates_by_loop(logits, 2), {"logits": logits}, "gates")
    yield "the record has the logits as they came, and a loss on them has a gradient"
    same(routing.logits, logits, "the record's logits")
    same_gradients(routing.logits, logits * 1, {"logits": logits}, "the record's logits")
    yield "logits may have any shape (..., E), and k may be 1 or E"
    for shape, k in ((2, 3), 1), ((1, 6), 5), ((6, 1), 3), ((2, 1, 3), 4):
        some, gates = logits.view(*shape, 5), gates_by_loop(logits, k).view(*shape, 5)
        follows(top_k_gating(some, k), some, gates, f"gates of logits of shape {(*shape, 5)} with k = {k}")
    yield "exactly k experts are chosen where logits are equal"
    same(top_k_gating(torch.zeros(50, 6), 3).chosen.sum(dim=-1), torch.full((50,), 3), "experts per token")
    yield "an expert whose gate is rounded to 0 is still chosen and kept"
    routing = top_k_gating(GAP, 2)
    same(routing.chosen, GAP >= 0, "chosen")
    same(routing.kept, GAP >= 0, "kept")
    yield "the gates have the type of the logits"
    for dtype in torch.float64, torch.bfloat16:
        same(top_k_gating(logits.detach().to(dtype), 2).gates.dtype, dtype, "the type of the gates")


@check
def check_topk_router(TopkRouter):
    router, x = TopkRouter(6, 5, top_k=2), torch.randn(7, 6, requires_grad=True)
    weight, bias = router.linear.weight, router.linear.bias
    logits = x @ weight.T + bias  # (T, E)
    yield "the scores are a linear function of the token"
    with unchanged(x=x, weight=weight, bias=bias):
        routing = router(x)
    close(routing.logits, logits, "logits")
    yield "the gates are those of top-k gating"
    follows(routing, routing.logits, gates_by_loop(logits, 2))
    close(TopkRouter(6, 5, 3)(x).gates.count_nonzero(dim=-1), torch.full((7,), 3), "experts per token with top_k = 3")
    yield "the gradient reaches the token, the weight and the bias, in training and in evaluation"
    for mode in True, False:
        sources = {"x": x, "the weight": weight, "the bias": bias}
        same_gradients(router.train(mode)(x).gates, gates_by_loop(logits, 2), sources, f"gates, training {mode},")
    yield "the gates are the same in training, in evaluation and in a second call"
    same(router.eval()(x).gates, routing.gates, "gates in evaluation")
    same(router.train()(x).gates, routing.gates, "gates of a second call")
    yield "x may have any shape (..., C)"
    for shape in (), (1,), (1, 1), (2, 1, 3):
        some = torch.randn(*shape, 6)
        wanted = gates_by_loop((some @ weight.T + bias).reshape(-1, 5), 2).view(*shape, 5)
        close(router(some).gates, wanted, f"gates of x of shape {(*shape, 6)}")
    yield "large logits are not changed"
    close(router(1000 * x).logits, 1000 * x @ weight.T + bias, "logits of 1000 x", atol=1e-3)
    yield "it computes in float32 under autocast, and autocast is still on afterwards"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = router(x.bfloat16())
        assert torch.is_autocast_enabled("cpu"), "autocast is off for all code that runs after it"
    rounded = x.bfloat16().float() @ weight.T + bias
    close(low.logits, rounded, "logits under autocast")
    close(low.gates, gates_by_loop(rounded, 2), "gates under autocast")
    yield "it computes in float32 whatever the type of x and of the weights"
    for dtype in torch.bfloat16, torch.float16, torch.float64:
        other = TopkRouter(6, 5, top_k=2).to(dtype)
        rounded = F.linear(x.to(dtype).float(), other.linear.weight.float(), other.linear.bias.float())
        close(other(x.to(dtype)).logits, rounded, f"logits of a router of type {dtype}")
        close(other(x.to(dtype)).gates, gates_by_loop(rounded, 2), f"gates of a router of type {dtype}")
        same(other.linear.weight.dtype, dtype, "the type of the weight after a call")


@check
def check_switch_gating(switch_gating):
    logits = torch.randn(8, 4, requires_grad=True)
    yield "the expert with the largest logit is chosen, and its gate is its probability among all"
    with unchanged(logits=logits):
        routing = switch_gating(logits)
    follows(routing, logits, switch_by_loop(logits))
    yield "the gradient reaches all logits, also those of experts that were not chosen"
    same_gradients(routing.gates, switch_by_loop(logits), {"logits": logits}, "gates")
    same_gradients(routing.logits, logits * 1, {"logits": logits}, "the record's logits")
    yield "logits may have any shape (..., E)"
    for shape in (2, 4), (1, 8), (8, 1), (2, 1, 4):
        some, gates = logits.view(*shape, 4), switch_by_loop(logits).view(*shape, 4)
        follows(switch_gating(some), some, gates, f"gates of logits of shape {(*shape, 4)}")
    yield "experts that no token chose still have a column"
    first = torch.tensor([3.0, 0.0, 1.0, -1.0]).repeat(5, 1)
    follows(switch_gating(first), first, switch_by_loop(first))
    yield "one expert is chosen where logits are equal"
    same(switch_gating(torch.zeros(50, 4)).chosen.sum(dim=-1), torch.full((50,), 1), "experts per token")
    yield "large logits do not overflow"
    close(switch_gating(1e4 * first).gates, switch_by_loop(1e4 * first), "gates")
    yield "the gates have the type of the logits"
    same(switch_gating(logits.detach().double()).gates.dtype, torch.float64, "the type of the gates")


@check
def check_top_p_gating(top_p_gating):
    logits = 2 * torch.randn(20, 6, requires_grad=True)
    yield "the fewest experts whose probabilities reach p are chosen, and the gates are a softmax over them"
    for p in 0.3, 0.6, 0.9:
        gates = torch.zeros_like(logits)
        for t, row in enumerate(logits):
            best = fewest(row, p)
            gates[t, best] = row[best].softmax(dim=-1)
        with unchanged(logits=logits):
            routing = top_p_gating(logits, p)
        follows(routing, logits, gates, f"gates for p = {p}")
        same_gradients(routing.gates, gates, {"logits": logits}, f"gates for p = {p}")
    yield "a loss on the record's logits has a gradient"
    same_gradients(routing.logits, logits * 1, {"logits": logits}, "the record's logits")
    yield "logits may have any shape (..., E)"
    for shape in (4, 5), (1, 20), (20, 1), (2, 5, 2):
        some = logits.view(*shape, 6)
        follows(top_p_gating(some, 0.9), some, gates.view(*shape, 6), f"gates of logits of shape {(*shape, 6)}")
    yield "two of four equal experts reach 0.5"
    same(top_p_gating(torch.zeros(3, 4), 0.5).chosen.sum(dim=-1).tolist(), [2, 2, 2], "experts per token")
    yield "with p = 1 all experts are chosen, even if rounding keeps the sum below 1"
    many = torch.rand(500, 6)
    close(top_p_gating(many, 1.0).gates, many.softmax(dim=-1), "gates for p = 1")
    yield "if one probability is 1, one expert is chosen, whatever p is"
    certain = torch.tensor([[0.0, 1e4, 0.0, -1e4]])
    follows(top_p_gating(certain, 0.99), certain, torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
    yield "the gates have the type of the logits"
    same(top_p_gating(logits.detach().double(), 0.5).gates.dtype, torch.float64, "the type of the gates")
