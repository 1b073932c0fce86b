"""Checks of lesson 06, sparse_moe."""

import copy
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from makemoe.checks import check, close, refuses, same, same_gradients, unchanged
from makemoe.experts import Expert
from makemoe.gating import top_k_gating
from makemoe.noisy_gating import NoisyTopkRouter


def mixture_by_loop(experts, x, routing):
    "One token and one expert after another: y = the sum of gate * answer over the experts that keep the token."
    gates, kept = (field.reshape(-1, len(experts)) for field in (routing.gates, routing.kept))
    rows = []
    for token, weights, mine in zip(x.reshape(-1, x.shape[-1]), gates, kept):
        parts = [weight * expert(token) for weight, expert, here in zip(weights, experts, mine) if here]
        rows.append(sum(parts, torch.zeros_like(token)))
    return torch.stack(rows).view_as(x)


def drop(routing, kept):
    return replace(routing, gates=routing.gates * kept, kept=kept)


def check_mixture(experts, x, routing, case):
    "Compare values, gradients, and the tokens of each expert with the loop."
    x, gates = x.detach().requires_grad_(), routing.gates.detach().requires_grad_()
    routing, calls = replace(routing, gates=gates), [[] for _ in experts]
    with unchanged(x=x, gates=gates, kept=routing.kept):
        hooks = [
            expert.register_forward_pre_hook(lambda _, args, e=e: calls[e].append(args[0].detach()))
            for e, expert in enumerate(experts)
        ]
        y = experts(x, routing)
        for hook in hooks:
            hook.remove()
    want = mixture_by_loop(experts, x, routing)
    close(y, want, f"y, {case},", atol=1e-5)
    same_gradients(y, want, {"x": x, "gates": gates} | dict(experts.named_parameters()), f"y, {case},", atol=1e-5)
    runs = [len(batches) for batches in calls]
    assert set(runs) == {1}, f"{case}: the experts ran {runs} times, each should run once"
    for e, (batch,) in enumerate(calls):
        mine = x.detach()[routing.kept[..., e]]
        seen = batch.reshape(-1, x.shape[-1])
        assert sorted(seen.tolist()) == sorted(mine.tolist()), (
            f"{case}: expert {e} works on {len(seen)} tokens, but should work on the {len(mine)} that it keeps"
        )


@check
def check_experts(Experts):
    experts, x = Experts(4, 8, 16), torch.randn(2, 5, 8)  # (B, T, C)
    routing = top_k_gating(torch.randn(2, 5, 4), 2)
    yield "values and gradients equal those of a loop, and each expert runs once, on its own tokens"
    check_mixture(experts, x, routing, "two experts per token")
    yield "an expert works on the tokens in kept, whatever chosen is and however large a gate is"
    kept = routing.kept.clone()
    kept[0, 1:3] = kept[:, :, 3] = False
    fewer = drop(routing, kept)
    check_mixture(experts, x, fewer, "some are dropped")
    signed = -2 * routing.gates
    signed[1] = 0
    check_mixture(experts, x, replace(routing, gates=signed), "gates below and at 0")
    yield "a token that no expert keeps gets exactly 0, and an expert without tokens gets a gradient of 0, not None"
    y = experts(x, fewer)
    same(y[0, 1:3].detach(), torch.zeros(2, 8), "y of two tokens that no expert keeps")
    y.square().sum().backward()
    for name, weight in experts[3].named_parameters():
        assert weight.grad is not None, f"the gradient of {name} of an expert without tokens is None"
        same(weight.grad, torch.zeros_like(weight), f"the gradient of {name} of an expert without tokens")
    yield "all this holds in evaluation mode, and for any shape, memory layout and number of experts"
    check_mixture(experts.eval(), x, routing, "evaluation")
    check_mixture(experts, x[0], top_k_gating(torch.randn(5, 4), 4), "no batch, k = E")
    check_mixture(experts, x.mT.contiguous().mT, routing, "another layout in memory")
    check_mixture(Experts(6, 3, 7), torch.randn(1, 1, 3), top_k_gating(torch.randn(1, 1, 6), 1), "one token")
    none = experts(x[:0], top_k_gating(torch.randn(0, 5, 4), 2))
    same(tuple(none.shape), (0, 5, 8), "the shape of y without tokens")
    yield "y has the type of x, also when gates are float32 and x is bfloat16"
    low = copy.deepcopy(experts).bfloat16()(x.bfloat16(), routing)
    close(low.float(), experts(x, routing), "y in bfloat16", rtol=0.05, atol=0.03)
    same(low.dtype, torch.bfloat16, "the type of y")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(experts(x, routing).dtype, torch.float32, "the type of y of float32 tokens under autocast")
    yield "a routing for other tokens or another number of experts is refused"
    for shape in (2, 5, 3), (5, 2, 4), (10, 4):
        other = top_k_gating(torch.randn(shape), 1)
        refuses(ValueError, lambda other=other: experts(x, other), shape, (2, 5, 4))


@check
def check_sparse_moe(SparseMoE):
    router, x = NoisyTopkRouter(8, 4, 2), torch.randn(2, 5, 8, requires_grad=True)
    workers, decisions = nn.ModuleList(Expert(8, 16) for _ in range(4)), []

    def listening(x):
        decisions.append(router(x))
        return decisions[-1]

    def carrying_out(x, routing):
        handed.append(routing)
        return mixture_by_loop(workers, x, routing)

    handed = []
    yield "the router is called once, and its own record is given to the experts and returned"
    with unchanged(x=x):
        answer = SparseMoE(listening, carrying_out)(x)
    same(len(decisions), 1, "how often the router is called")
    assert type(answer) is tuple and len(answer) == 2, (
        f"should return (y, routing), but returns a {type(answer).__name__}"
    )
    assert len(handed) == 1 and handed[0] is decisions[0], "the experts should be given the router's own record"
    assert answer[1] is decisions[0], "should return the router's own record"
    yield "y is exactly what the experts return, also in its type"
    close(answer[0], mixture_by_loop(workers, x, decisions[0]), "y")
    half = SparseMoE(lambda x: decisions[0], lambda x, routing: x.bfloat16() / 2)
    for mode in True, False:
        same(half.train(mode)(x)[0], x.bfloat16() / 2, f"y, training = {mode},")
    yield "the gradient reaches x, router and experts"
    sources = {"x": x} | dict(router.named_parameters()) | {f"expert {n}": w for n, w in workers.named_parameters()}
    same_gradients(answer[0], mixture_by_loop(workers, x, decisions[0]), sources, "y")
    through_router = SparseMoE(router.eval(), lambda x, routing: routing.gates)(x)[0]
    same_gradients(through_router, router(x).gates, {"x": x}, "the gates, in evaluation")
    yield "an error in the router or in the experts is not hidden"

    def fail(*_, **__):
        raise ValueError("this does not fit")

    refuses(ValueError, lambda: SparseMoE(fail, carrying_out)(x), "does not fit")
    refuses(ValueError, lambda: SparseMoE(router, fail)(x), "does not fit")


@check
def check_hash_routing(hash_routing):
    table, ids = torch.randint(6, (20,)), torch.randint(20, (3, 7))
    with unchanged(table=table, ids=ids):
        routing = hash_routing(ids, table, 6)
    yield "each token goes to the expert in the table, with gate 1"
    same(routing.gates.shape, torch.Size((3, 7, 6)), "the shape of gates")
    same(routing.gates, F.one_hot(table[ids], 6).float(), "gates")
    yield "chosen and kept are that expert alone, as bool"
    same(routing.chosen, F.one_hot(table[ids], 6).bool(), "chosen")
    same(routing.kept, routing.chosen, "kept")
    yield "the logits are 0, in float32"
    same(routing.logits, torch.zeros(3, 7, 6), "logits")
    close(routing.probs, torch.full((3, 7, 6), 1 / 6), "probs")
    yield "experts that are not in the table have a column, too"
    same(hash_routing(torch.tensor([0, 1]), torch.tensor([2, 0]), 5).load, torch.tensor([1, 0, 1, 0, 0]), "load")


@check
def check_merge_experts(merge_experts):
    for widths, C in ((16, 16, 16), 8), ((4, 7), 5):
        yield f"the answer is the sum of those of {len(widths)} experts with {widths} hidden units"
        experts, x = [Expert(C, width) for width in widths], torch.randn(2, 5, C)
        before = [{name: value.clone() for name, value in expert.state_dict().items()} for expert in experts]
        wide = merge_experts(experts)
        assert isinstance(wide, Expert), f"should be an Expert, but is a {type(wide).__name__}"
        same(wide.up.out_features, sum(widths), "the number of hidden units")
        want = sum(expert(x) for expert in experts)
        close(wide(x), want, "the answer")
    yield "it has parameters of its own that can be trained"
    for name, parameter in wide.named_parameters():
        assert parameter.requires_grad and parameter.is_leaf, f"{name} is not a parameter that can be trained"
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.zero_()
    for expert, values in zip(experts, before):
        for name, value in expert.state_dict().items():
            same(value, values[name], f"{name} of an expert")
