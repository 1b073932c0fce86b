"""Checks of lesson 09, dropless."""

from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from makemoe.checks import check, close, refuses, same, same_gradients, unchanged
from makemoe.gating import Routing, top_k_gating
from makemoe.sparse_moe import Experts

WEIGHTS = {"up": "up.weight", "up_bias": "up.bias", "down": "down.weight", "down_bias": "down.bias"}


def draw(E, n_hidden, C, bias, dtype=torch.float32):
    "Random stacked weights: up, up_bias, down, down_bias."
    shapes = (E, n_hidden, C), (E, n_hidden) if bias else None, (E, C, n_hidden), (E, C) if bias else None
    return tuple(shape and torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


def pairs_by_loop(tokens, kept, weights, act):
    "(experts, rows, answers) of all that is kept, one pair after another."
    up, up_bias, down, down_bias = weights
    e, rows, answers = [], [], []
    for expert in range(kept.shape[1]):
        for row in range(kept.shape[0]):
            if kept[row, expert]:
                hidden = up[expert] @ tokens[row] + (0 if up_bias is None else up_bias[expert])
                answers.append(down[expert] @ act(hidden) + (0 if down_bias is None else down_bias[expert]))
                e.append(expert)
                rows.append(row)
    return torch.tensor(e, dtype=torch.long), torch.tensor(rows, dtype=torch.long), torch.stack(answers)


def same_pairs(run, tokens, kept, weights, act, rtol=1e-5, atol=1e-5):
    "The list, the answers and all gradients against the loop; filling after the pairs has the answer 0."
    given = {name: weight for name, weight in zip(WEIGHTS, weights) if weight is not None}
    with unchanged(tokens=tokens, kept=kept, **given):
        e, rows, answers = run(tokens, kept, weights, act)
    e_loop, rows_loop, answers_loop = pairs_by_loop(tokens, kept, weights, act)
    listed = len(e_loop)
    assert len(e) == len(rows) == len(answers), f"{len(e)} experts, {len(rows)} rows and {len(answers)} answers"
    same(e[:listed], e_loop, "the experts of the pairs")
    same(rows[:listed], rows_loop, "the rows of the pairs")
    answers_loop = F.pad(answers_loop, (0, 0, 0, len(answers) - listed))
    close(answers, answers_loop, "answers", rtol, atol)
    same_gradients(answers, answers_loop, {"tokens": tokens, **given}, "answers", rtol=1e-4, atol=1e-4)


def gaps(kept):
    "The same, but token 2 has lost all its experts and expert 1 all its tokens."
    kept = kept.clone()
    kept[2] = kept[:, 1] = False
    return kept


def at_home(call):
    "What `call()` returns, while new tensors go to another device by default. It must be on the CPU all the same."
    with torch.device("meta"):
        answers = call()
    places = {answer.device.type for answer in (answers if isinstance(answers, tuple) else (answers,))}
    assert places == {"cpu"}, "new tensors should be made on the device of the old ones"
    return answers


class Heard(TorchDispatchMode):
    "The operations inside a `with` block for which a CPU would wait for a GPU."

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, indices = func.name(), args[1] if func.name() == "aten::index.Tensor" else ()
        masks = any(index is not None and index.dtype == torch.bool for index in indices)
        if masks or name in ("aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select"):
            self.waits.append("a mask as an index" if masks else name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


class OnGPU(torch.Tensor):
    "A tensor that says it is on a GPU."

    is_cuda = True

    def tolist(self):
        raise AssertionError("the CPU would wait for the GPU: tolist")


class Undefined(torch.autograd.Function):
    "F.grouped_mm with nan in the rows after the last end, forward and backward, as a GPU may leave them."

    product = staticmethod(F.grouped_mm)

    @staticmethod
    def forward(ctx, rows, weight, ends):
        ctx.save_for_backward(rows, weight, ends)
        return Undefined.product(rows, weight, offs=ends).index_fill(0, torch.arange(ends[-1], len(rows)), torch.nan)

    @staticmethod
    def backward(ctx, grad):
        rows, weight, ends = ctx.saved_tensors
        back = Undefined.product(grad, weight.mT, offs=ends)
        back = back.index_fill(0, torch.arange(ends[-1], len(rows)), torch.nan)
        return back, Undefined.product(rows.mT, grad, offs=ends), None


@contextmanager
def undefined_rows():
    "Inside, F.grouped_mm is `Undefined`."
    F.grouped_mm = lambda rows, weight, offs: Undefined.apply(rows, weight, offs)
    try:
        yield
    finally:
        F.grouped_mm = Undefined.product


@check
def check_answers_by_group(answers_by_group):
    tokens, weights, biased = torch.randn(7, 8, requires_grad=True), draw(4, 12, 8, False), draw(4, 12, 8, True)
    kept = top_k_gating(torch.randn(7, 4), 2).kept
    yield "pairs sorted by expert, their answers, and gradients in tokens and weights"
    same_pairs(answers_by_group, tokens, kept, weights, F.gelu)
    yield "biases; a token without experts and an expert without tokens"
    same_pairs(answers_by_group, tokens, gaps(kept), biased, F.relu)
    yield "only the rows of the pairs are multiplied"
    with FlopCounterMode(display=False) as counter:
        answers_by_group(tokens, gaps(kept), weights, F.relu)
    rows = counter.get_total_flops() / (4 * 12 * 8)
    assert rows <= gaps(kept).sum(), f"{gaps(kept).sum()} rows are to be multiplied, but {rows:g} were"
    yield "nothing is kept: no pairs, no answers"
    e, rows, answers = answers_by_group(tokens, torch.zeros_like(kept), biased, F.relu)
    same(answers.detach(), torch.zeros(0, 8), "answers where nothing is kept")
    assert len(e) == len(rows) == 0, f"{len(e)} pairs where nothing is kept"
    yield "more experts than tokens, in float64, new tensors on the device of the old ones"
    few, kept = tokens[:2].double(), top_k_gating(torch.randn(2, 9), 3).kept
    few, weights = few.detach().requires_grad_(), draw(9, 5, 8, True, torch.float64)
    same_pairs(lambda *work: at_home(lambda: answers_by_group(*work)), few, kept, weights, F.gelu)


def twins(GroupedExperts, *sizes, **settings):
    "Grouped experts, and the loop of lesson 06 with the same weights."
    state = torch.get_rng_state()
    grouped = GroupedExperts(*sizes, **settings)
    torch.set_rng_state(state)
    settings.pop("top_k", None)
    return grouped, Experts(*sizes, **settings)


def same_mixture(grouped, loop, x, routing, what="y", atol=1e-5):
    "Values, and gradients in x, gates and all weights, of grouped experts and the loop."
    x, gates = x.detach().requires_grad_(), routing.gates.detach().requires_grad_()
    with unchanged(x=x, gates=gates, kept=routing.kept):
        y = grouped(x, replace(routing, gates=gates))
    y_loop = loop(x, replace(routing, gates=gates))
    close(y, y_loop, what, atol=atol)
    assert y.requires_grad, f"no gradient reaches x from {what}"
    direction = torch.randn_like(y_loop)
    sources = {"x": x, "gates": gates, **dict(grouped.named_parameters())}
    ours = torch.autograd.grad(y, list(sources.values()), direction, allow_unused=True)
    of_loop = torch.autograd.grad(y_loop, [x, gates, *loop.parameters()], direction, allow_unused=True)
    of_loop = dict(zip(["x", "gates", *dict(loop.named_parameters())], of_loop))
    for (name, source), gradient in zip(sources.items(), ours):
        wanted = (
            of_loop[name]
            if name in of_loop
            else torch.stack([of_loop[f"{e}.{WEIGHTS[name]}"] for e in range(len(loop))])
        )
        gradient = torch.zeros_like(source) if gradient is None else gradient
        close(gradient, wanted, f"the gradient of {what} with respect to {name}", rtol=1e-4, atol=1e-5)


@check
def check_grouped_experts(GroupedExperts):
    grouped, loop = twins(GroupedExperts, 4, 8, 12, "gelu")
    x, routing = torch.randn(2, 6, 8), top_k_gating(torch.randn(2, 6, 4), 2)
    yield "the same as the loop of lesson 06, in values and all gradients"
    same_mixture(grouped, loop, x, routing)
    yield "the same in evaluation mode, gradients too"
    same_mixture(grouped.eval(), loop.eval(), x, routing)
    yield "what is not kept is not computed, and a gate of 0 or below counts like any other"
    kept = routing.kept.clone()
    kept[0, 2] = kept[1, 4, -1] = kept[..., 1] = False
    gates = torch.randn(2, 6, 4) * kept
    gates[1, 0] = 0
    same_mixture(grouped, loop, x, replace(routing, gates=gates, kept=kept))
    yield "new tensors are made on the device of the old ones"
    at_home(lambda: grouped(x, routing))
    yield "nothing is kept: zeros"
    nothing = replace(routing, gates=0 * gates, kept=torch.zeros_like(kept))
    same(grouped(x, nothing).detach(), torch.zeros_like(x), "y where nothing is kept")
    yield "more experts than tokens, no batch, any number of hidden units"
    same_mixture(
        *twins(GroupedExperts, 9, 5, 3, "squared_relu", bias=False),
        torch.randn(2, 5),
        top_k_gating(torch.randn(2, 9), 3),
    )
    yield "y has the type of x, also where the gates are float32"
    low = grouped.bfloat16()(x.bfloat16(), routing)
    close(low, loop(x, routing).bfloat16(), "y of bfloat16 tokens", rtol=0.1, atol=0.1)
    yield "dropout acts on each channel of each answer, in training only, at its rate"
    dropped, loop = twins(GroupedExperts, 2, 16, 8, dropout=0.25)
    x, both = torch.randn(600, 16), top_k_gating(torch.randn(600, 2), 2)
    close(dropped.eval()(x, both), loop.eval()(x, both), "y in evaluation")
    alone = [loop(x, replace(both, gates=both.gates * mine, kept=both.kept & mine)) / 0.75 for mine in torch.eye(2) > 0]
    y = dropped.train()(x, both)
    for kind, chance in (torch.zeros_like(x), 0.0625), (alone[0], 0.1875), (alone[1], 0.1875), (sum(alone), 0.5625):
        share = (y - kind).abs() < 1e-5
        assert abs(share.float().mean() - chance) < 0.035 and share.all(dim=-1).float().mean() < 0.01, (
            "with two experts and a rate of 0.25, each channel should have lost both answers, one, or none "
            "with chances 0.0625, 0.1875, 0.1875 and 0.5625"
        )
    yield "more choices than top_k promises, or a routing of another shape, are refused"
    refuses(ValueError, lambda: GroupedExperts(4, 8, 16, top_k=1)(torch.randn(2, 6, 8), routing), "top_k")
    refuses(ValueError, lambda: GroupedExperts(4, 8, 16)(torch.randn(3, 6, 8), routing), "shape")


@check
def check_answers_in_one_call(answers_in_one_call):
    def run(tokens, kept, weights, act):
        e, rows, answers = answers_in_one_call(tokens, kept, weights, act, top_k=2)
        assert len(answers) == 2 * len(tokens), f"{len(answers)} answers of {len(tokens)} tokens with top_k = 2"
        return e, rows, answers

    tokens, weights, biased = torch.randn(7, 8, requires_grad=True), draw(4, 16, 8, False), draw(4, 16, 8, True)
    kept = top_k_gating(torch.randn(7, 4), 2).kept
    yield "pairs sorted by expert, their answers, and gradients in tokens and weights"
    same_pairs(run, tokens, kept, weights, F.gelu)
    yield "dropped choices: the list keeps its length, and the filling has the answer 0"
    same_pairs(run, tokens, gaps(kept), weights, F.relu)
    yield "a bias on both layers"
    same_pairs(run, tokens, gaps(kept), biased, F.gelu)
    yield "what a GPU leaves after the last end reaches neither answers nor gradients"
    with undefined_rows():
        same_pairs(run, tokens, gaps(kept), biased, F.gelu)
    yield "the CPU never waits for a GPU"
    with Heard() as heard:
        run(tokens, gaps(kept).as_subclass(OnGPU), weights, F.relu)
    assert not heard.waits, f"the CPU would wait for the GPU: {', '.join(heard.waits)}"
    yield "new tensors are made on the device of the old ones"
    at_home(lambda: run(tokens, gaps(kept), biased, F.relu))
    yield "no more rows are multiplied than the list has entries"
    with FlopCounterMode(display=False) as counter:
        run(tokens, gaps(kept), weights, F.relu)
    assert counter.get_total_flops() <= 14 * 4 * 16 * 8, "rows are multiplied that are not in the list"
    yield "any top_k, and more experts than tokens"
    three = top_k_gating(torch.randn(2, 9), 3).kept
    same_pairs(
        lambda *work: answers_in_one_call(*work, top_k=3),
        tokens[:2].detach().requires_grad_(),
        three,
        draw(9, 4, 8, True),
        F.relu,
    )
    yield "under autocast products are computed in bfloat16"
    with torch.autocast("cpu", torch.bfloat16):
        low = run(tokens, kept, biased, F.gelu)[2]
    assert torch.equal(low.bfloat16().to(low.dtype), low), (
        "under bfloat16 autocast the answers should have the digits of bfloat16"
    )
    close(low.float(), run(tokens, kept, biased, F.gelu)[2], "answers under autocast", rtol=0.1, atol=0.5)


@check
def check_sort_by_expert(sort_by_expert, send_back):
    yield "sorted by expert, equal ones in the given order, and back again"
    for pairs, experts in (10, 3), (60, 8), (7, 1):
        owners = torch.randint(experts, (pairs,))
        with unchanged(owners=owners):
            order, inverse = at_home(lambda: sort_by_expert(owners))
        want = sorted(range(pairs), key=lambda pair: owners[pair].item())  # Python's sort is stable
        same(order, torch.tensor(want), "order")
        same(inverse, torch.tensor(want).argsort(), "inverse")
    yield "the answers go back to their tokens and are added up, k for each"
    for k in 3, 1, 2:
        answers = torch.randn(6 * k, 2, requires_grad=True)  # token by token
        order, inverse = sort_by_expert(torch.randint(4, (6 * k,)))
        with unchanged(answers=answers):
            sums = at_home(lambda k=k: send_back(answers[order], inverse, k))
        want = torch.stack([answers[n * k : (n + 1) * k].sum(dim=0) for n in range(6)])
        close(sums, want, f"sums of {k} answers")
        same_gradients(sums, want, {"answers": answers}, "the sums")


def masks(*rows):
    "A `Routing` that chose every expert, and keeps the choices that are 1 in `rows`."
    kept = torch.tensor(rows) > 0
    return Routing(kept.float(), torch.zeros(kept.shape), torch.ones_like(kept), kept)


@check
def check_padding_factor(padding_factor):
    five = masks([1, 0, 1], [0, 1, 1], [1, 0, 1], [1, 0, 1], [1, 0, 1])  # loads 4, 1, 5
    yield "as many rows for each expert as the fullest one needs"
    factor = padding_factor(five)
    assert isinstance(factor, float), f"the factor should be a float, not a {type(factor).__name__}"
    close(factor, 1.5, "10 pairs padded to 3 x 5: the factor")
    yield "only kept rows are useful, and an expert without tokens is padded too"
    close(padding_factor(masks([1, 0, 0], [1, 0, 0], [1, 0, 1])), 9 / 4, "4 pairs padded to 3 x 3: the factor")
    yield "with slots, more than needed or just enough"
    close(padding_factor(five, 8), 2.4, "10 pairs padded to 3 x 8: the factor")
    close(padding_factor(five, 5), 1.5, "10 pairs padded to 3 x 5: the factor")
    yield "too few slots are refused, 0 too"
    refuses(ValueError, lambda: padding_factor(five, 4))
    refuses(ValueError, lambda: padding_factor(five, 0))
    yield "a batch (B, T, E) is padded as a whole"
    close(padding_factor(masks([[1, 0], [1, 1]], [[1, 0], [0, 0]])), 6 / 4, "4 pairs padded to 2 x 3: the factor")
