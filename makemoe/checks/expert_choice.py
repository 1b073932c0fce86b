"""Checks of lesson 24, expert_choice."""

from functools import partial
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from makemoe.checks import check, close, refuses, same, same_gradients, unchanged


def taken_by_loop(S, capacity):
    "What the experts take (T, E): each sorts the tokens by S, from the largest down, the earlier of equals first."
    taken = torch.zeros(S.shape, dtype=torch.bool)
    for e, column in enumerate(S.detach().T.tolist()):
        best = sorted(range(len(column)), key=lambda t: (-column[t], t))
        for t in best[:capacity]:
            taken[t, e] = True
    return taken


def taken(logits, capacity):
    "(S, what is taken) for logits (..., T, E), one sequence after another."
    S = F.softmax(logits, dim=-1)
    rows = [taken_by_loop(sequence, capacity) for sequence in S.reshape(-1, *S.shape[-2:])]
    return S, torch.stack(rows).view(S.shape)


def follows(routing, logits, S, chosen, what=""):
    "Assert that all four fields are those of a decision with the gates S where `chosen`, and nothing dropped."
    same(routing.chosen, chosen, f"chosen{what}")
    same(routing.kept, chosen, f"kept{what}")
    close(routing.gates, S * chosen, f"gates{what}")
    same(routing.logits, logits, f"the record's logits{what}")


def running_by_loop(logits, k):
    "What `running_choice` takes: for each token, what it gets as the last one of its prefix."
    T, E = logits.shape[-2:]
    last = [taken(logits[..., : t + 1, :], max((t + 1) * k // E, 1))[1][..., -1, :] for t in range(T)]
    return torch.stack(last, dim=-2)


@check
def check_expert_choice_gating(expert_choice_gating):
    logits = torch.randn(8, 4, requires_grad=True)
    S, chosen = taken(logits, 3)
    yield "each expert takes its `capacity` tokens of largest S, a softmax over the experts"
    with unchanged(logits=logits):
        routing = expert_choice_gating(logits, 3)
    same(routing.chosen, chosen, "chosen")
    same(routing.kept, chosen, "kept")
    yield "the gates are S where a token was taken, and 0 elsewhere"
    close(routing.gates, S * chosen, "gates")
    yield "tokens can have different numbers of experts"
    typed = torch.log(torch.tensor([[0.40, 0.30, 0.30], [0.34, 0.33, 0.33], [0.05, 0.05, 0.90], [0.10, 0.80, 0.10]]))
    follows(expert_choice_gating(typed, 2), typed, *taken(typed, 2))
    same(expert_choice_gating(torch.zeros(3, 5), 1).chosen.sum(dim=-1).tolist(), [5, 0, 0], "experts of three equals")
    yield "of equal tokens the earlier one is taken"
    pair = torch.randn(2, 4).repeat(20, 1)
    for capacity in 1, 13, 29:
        follows(expert_choice_gating(pair, capacity), pair, *taken(pair, capacity), f", capacity {capacity}")
    yield "each sequence by itself, with any shape in front of (T, E)"
    for shape in (2, 4, 3), (1, 24, 1), (2, 2, 3, 2), (3, 2, 4):
        some = torch.randn(shape)
        follows(expert_choice_gating(some, 2), some, *taken(some, 2), f" of logits of shape {shape}")
    yield "capacity 0 takes nobody, capacity T everybody"
    for capacity in 0, 8:
        follows(expert_choice_gating(logits, capacity), logits, *taken(logits, capacity), f", capacity {capacity}")
    yield "a token is taken even if its gate is rounded to 0"
    sharp = 300.0 * torch.eye(3)
    follows(expert_choice_gating(sharp, 2), sharp, *taken(sharp, 2))
    yield "the gradient of the gates reaches the logits of all experts of a taken token; that of the record too"
    same_gradients(routing.gates, S * chosen, {"logits": logits}, "gates")
    same_gradients(routing.logits, logits * 1, {"logits": logits}, "the record's logits")
    yield "the gates have the type of the logits"
    for dtype in torch.float64, torch.bfloat16:
        same(expert_choice_gating(logits.detach().to(dtype), 2).gates.dtype, dtype, "the type of the gates")
    yield "other capacities are refused, and logits without T"
    for capacity in -1, 9, 2.5:
        refuses(ValueError, partial(expert_choice_gating, logits, capacity), capacity)
    refuses(ValueError, partial(expert_choice_gating, logits[0], 1))


@check
def check_expert_choice_router(ExpertChoiceRouter):
    router, x = ExpertChoiceRouter(6, 4, top_k=2), torch.randn(12, 6, requires_grad=True)
    weight, bias = router.linear.weight, router.linear.bias
    logits = x @ weight.T + bias  # (T, E)
    S, chosen = taken(logits, 6)
    yield "each expert takes T * k / E tokens"
    with unchanged(x=x, weight=weight, bias=bias):
        routing = router(x)
    close(routing.logits, logits, "logits")
    follows(routing, routing.logits, S, chosen)
    yield "the share is rounded down, and at least 1"
    for T, k, share in (5, 1, 1), (7, 1, 1), (7, 3, 5), (10, 3, 7), (3, 1, 1), (1, 1, 1), (1, 4, 1), (9, 4, 9):
        load = ExpertChoiceRouter(6, 4, top_k=k)(torch.randn(2, T, 6)).load
        same(load.tolist(), [2 * share] * 4, f"load of two sequences of {T} tokens with k = {k}")
    yield "each sequence by itself, of any length, batch or not"
    for shape in (8,), (1, 10), (3, 8), (2, 3, 4):
        some = torch.randn(*shape, 6)
        found = router(some)
        follows(found, found.logits, *taken(some @ weight.T + bias, shape[-1] // 2), f" of x {(*shape, 6)}")
    yield "the same in training, in evaluation and in a second call, with gradients"
    for mode in True, False:
        again = router.train(mode)(x)
        same(again.gates, routing.gates, f"gates, training {mode}")
        same_gradients(again.gates, S * chosen, {"x": x, "the weight": weight, "the bias": bias}, "gates")
    yield "it says that it is not causal, and that it takes no capacity factor"
    same(router.causal, False, "causal")
    same(router.takes_capacity, False, "takes_capacity")
    yield "it computes in float32, also under autocast and with other types"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = router(x.bfloat16())
    rounded = x.bfloat16().float() @ weight.T + bias
    close(low.logits, rounded, "logits under autocast")
    follows(low, low.logits, *taken(low.logits, 6), " under autocast")
    half = ExpertChoiceRouter(6, 4, top_k=2).bfloat16()
    same(half(x.bfloat16()).gates.dtype, torch.float32, "the type of the gates of a router in bfloat16")


class Peeking:
    "A model whose logits depend on all ids that it is given, also on later ones."

    def __init__(self, V):
        self.table = torch.randn(V, V, requires_grad=True)

    def __call__(self, ids, targets=None):
        seen = self.table[ids]  # (B, T, V)
        return SimpleNamespace(logits=seen.cumsum(dim=1) + 2 * seen.sum(dim=1, keepdim=True))


def prefix_losses_by_loop(model, ids, targets):
    losses = torch.zeros(ids.shape)
    for b, t in torch.cartesian_prod(*map(torch.arange, ids.shape)).tolist():
        log_probs = model(ids[b : b + 1, : t + 1]).logits[0, t].detach().log_softmax(dim=-1)
        losses[b, t] = -log_probs[targets[b, t]]
    return losses


@check
def check_prefix_losses(prefix_losses):
    model, ids, targets = Peeking(5), torch.randint(5, (3, 6)), torch.randint(5, (3, 6))
    wanted = prefix_losses_by_loop(model, ids, targets)
    yield "the loss of each token, read after its prefix alone"
    with unchanged(ids=ids, targets=targets):
        losses = prefix_losses(model, ids, targets)
    close(losses, wanted, "losses")
    yield "no gradient is computed"
    assert not losses.requires_grad, "the losses keep the graph of the model"
    yield "one sequence of one token"
    one = ids[:1, :1]
    close(prefix_losses(model, one, targets[:1, :1]), wanted[:1, :1], "losses")


@check
def check_running_choice(running_choice):
    logits = torch.randn(9, 4, requires_grad=True)
    yield "each token gets what expert choice gives to the last token of its prefix"
    for k in 1, 2, 3, 4:
        with unchanged(logits=logits):
            routing = running_choice(logits, k)
        follows(routing, logits, logits.softmax(dim=-1), running_by_loop(logits, k), f", k = {k}")
    yield "of equal tokens the earlier one comes first"
    pair = torch.randn(2, 4).repeat(6, 1)
    for some in pair, torch.zeros(12, 4):
        same(running_choice(some, 2).chosen, running_by_loop(some, 2), "chosen among equals")
    yield "each sequence by itself, with any shape in front of (T, E)"
    for shape in (2, 6, 3), (1, 7, 5), (2, 2, 5, 2):
        some = torch.randn(shape)
        follows(running_choice(some, 2), some, some.softmax(dim=-1), running_by_loop(some, 2), f" of shape {shape}")
    yield "gradients pass through the gates"
    gates = logits.softmax(dim=-1) * running_by_loop(logits, 2)
    same_gradients(running_choice(logits, 2).gates, gates, {"logits": logits}, "gates")
