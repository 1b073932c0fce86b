"""Checks of lesson 20, local experts."""

import math

import torch

from makemoe.checks import check, close, same, same_gradients, unchanged

SIZES = (7, 4, 3), (5, 1, 2), (4, 4, 4), (6, 3, 1), (1, 2, 5)  # N, E, D


def case(*shape, D=2, spread=1.0, requires_grad=False):
    "Random gates (..., E), answers (..., E, D) and targets (..., D) for a shape (..., E)."
    gates, answers = torch.randn(shape).softmax(dim=-1), spread * torch.randn(*shape, D)
    targets = torch.randn(*shape[:-1], D)
    return [tensor.requires_grad_(requires_grad) for tensor in (gates, answers, targets)]


def named(gates, answers, targets):
    "The three by name, for `unchanged` and `same_gradients`."
    return {"gates": gates, "answers": answers, "targets": targets}


def distance(target, answer):
    "Squared distance of two lists of numbers."
    return sum((d - o) ** 2 for d, o in zip(target, answer))


def by_loop(value, gates, answers, targets):
    "The mean of `value(p, o, d)` over cases, each of them plain lists: gates, answers, target."
    cases = list(zip(*(tensor.double().tolist() for tensor in (gates, answers, targets))))
    return sum(value(*one) for one in cases) / len(cases)


def blend_error(p, o, d):
    "Eq. 1.1 for one case."
    return distance(d, [sum(p[i] * o[i][k] for i in range(len(p))) for k in range(len(d))])


def expected_error(p, o, d):
    "Eq. 1.2 for one case."
    return sum(p[i] * distance(d, o[i]) for i in range(len(p)))


def mixture_error(p, o, d):
    "Eq. 1.3 for one case, as it stands."
    return -math.log(sum(p[i] * math.exp(-distance(d, o[i]) / 2) for i in range(len(p))))


def posterior(gates, answers, targets):
    "Responsibilities in float64 by Bayes' rule, as the formula stands."
    squares = ((targets[..., None, :] - answers) ** 2).double().sum(dim=-1)
    weights = gates.double() * torch.exp(-squares / 2)
    return (weights / weights.sum(dim=-1, keepdim=True)).to(answers.dtype)


def mean_loss(kind, gates, answers, targets):
    "Eq. 1.1, 1.2 or 1.3 in float64, averaged over cases, so that it can be differentiated."
    gates, answers, targets = gates.double(), answers.double(), targets.double()
    if kind == "1.1":
        return ((targets - torch.einsum("...e,...ed->...d", gates, answers)) ** 2).sum(dim=-1).mean()
    squares = ((targets[..., None, :] - answers) ** 2).sum(dim=-1)
    if kind == "1.2":
        return torch.einsum("...e,...e->...", gates, squares).mean()
    return -torch.log((gates * torch.exp(-squares / 2)).sum(dim=-1)).mean()


@check
def check_cooperative_loss(cooperative_loss):
    yield "opposite answers cancel"
    half, opposite = torch.tensor([[0.5, 0.5]]), torch.tensor([[[3.0], [-3.0]]])
    close(cooperative_loss(half, opposite, torch.zeros(1, 1)), 0, "the loss of answers 3 and -3 for the target 0")
    yield "it is the squared distance of the blend from the target, averaged over the cases"
    for N, E, D in SIZES:
        given = case(N, E, D=D)
        with unchanged(**named(*given)):
            loss = cooperative_loss(*given)
        close(loss, torch.tensor(by_loop(blend_error, *given)).float(), f"the loss with N, E, D = {N, E, D}")
    yield "gates are used as they are, also if they do not sum to 1"
    gates, answers, targets = case(6, 3)
    close(cooperative_loss(gates / 2, answers, targets), by_loop(blend_error, gates / 2, answers, targets), "the loss")
    yield "any dimensions may come before E"
    for shape in (3, 4, 5), (2, 1, 3, 4), (4,):
        given = case(*shape)
        close(cooperative_loss(*given), mean_loss("1.1", *given).float(), f"the loss of gates {shape}")
    yield "the gradient reaches gates, answers and targets"
    given = case(6, 3, requires_grad=True)
    same_gradients(cooperative_loss(*given), mean_loss("1.1", *given).float(), named(*given), "the loss")
    yield "the loss has the type of the answers"
    same(cooperative_loss(*(tensor.double() for tensor in case(6, 3))).dtype, torch.float64, "the type of the loss")


@check
def check_responsibilities(responsibilities):
    yield "they are the gates times the Gaussians of the experts, divided by their sum"
    for N, E, D in SIZES:
        given = case(N, E, D=D)
        with unchanged(**named(*given)):
            r = responsibilities(*given)
        close(r, posterior(*given), f"the responsibilities with N, E, D = {N, E, D}")
    yield "any dimensions may come before E"
    for shape in (3, 4, 5), (2, 1, 3, 4), (4,):
        given = case(*shape)
        close(responsibilities(*given), posterior(*given), f"the responsibilities for gates {shape}")
    yield "the gradient reaches gates, answers and targets"
    given = case(6, 3, requires_grad=True)
    same_gradients(responsibilities(*given), posterior(*given), named(*given), "the responsibilities")
    yield "answers that are far from the target do not underflow: the closest expert is responsible"
    far = torch.tensor([[[40.0], [60.0], [-50.0]]])
    close(responsibilities(torch.full((1, 3), 1 / 3), far, torch.zeros(1, 1)), torch.tensor([[1.0, 0.0, 0.0]]), "those")
    yield "an expert whose gate is 0 gets exactly 0, however good its answer, and no gradient becomes nan"
    gates = torch.tensor([[0.5, 0.0, 0.5]], requires_grad=True)
    answers = torch.tensor([[[10.0], [0.0], [10.5]]], requires_grad=True)
    r = responsibilities(gates, answers, torch.zeros(1, 1))
    wanted = posterior(gates, answers, torch.zeros(1, 1))
    same(r[0, 1].item(), 0.0, "the responsibility at gate 0")
    close(r, wanted, "the responsibilities")
    for got, want in zip(torch.autograd.grad(r[0, 0], [gates, answers]),
                         torch.autograd.grad(wanted[0, 0], [gates, answers])):
        close(got[0, ::2], want[0, ::2], "the gradient at the two experts whose gates are not 0", rtol=1e-3)
        assert got.isfinite().all(), f"a gradient is {got}"
    yield "they have the type of the answers"
    given = [tensor.double() for tensor in case(6, 3)]
    close(responsibilities(*given), posterior(*given), "the responsibilities of float64", rtol=1e-12, atol=1e-15)


@check
def check_competitive_loss(competitive_loss):
    kinds = {"1.2": {"mixture": False}, "1.3": {"mixture": True}}
    oracles = {"1.2": expected_error, "1.3": mixture_error}
    yield "with mixture=False it is eq. 1.2, with mixture=True eq. 1.3, averaged over the cases"
    for N, E, D in SIZES:
        for kind, settings in kinds.items():
            given = case(N, E, D=D)
            with unchanged(**named(*given)):
                loss = competitive_loss(*given, **settings)
            wanted = torch.tensor(by_loop(oracles[kind], *given)).float()
            close(loss, wanted, f"the loss of eq. {kind} with N, E, D = {N, E, D}")
    yield "eq. 1.3 is the default"
    given = case(6, 3)
    close(competitive_loss(*given), by_loop(mixture_error, *given), "the loss")
    yield "any dimensions may come before E"
    for shape in (3, 4, 5), (2, 1, 3, 4), (4,):
        given = case(*shape)
        for kind, settings in kinds.items():
            wanted = mean_loss(kind, *given).float()
            close(competitive_loss(*given, **settings), wanted, f"the loss of eq. {kind} for gates {shape}")
    yield "the gradient reaches gates, answers and targets"
    for kind, settings in kinds.items():
        given = case(6, 3, requires_grad=True)
        wanted = mean_loss(kind, *given).float()
        same_gradients(competitive_loss(*given, **settings), wanted, named(*given), f"the loss of eq. {kind}")
    yield "under eq. 1.3, errors of 40 and more still give the right loss and gradient"
    far = torch.tensor([[[40.0], [-80.0]]], requires_grad=True)
    loss = competitive_loss(torch.full((1, 2), 0.5), far, torch.zeros(1, 1))
    close(loss, 800 + math.log(2), "the loss of answers 40 and -80 for the target 0")
    close(torch.autograd.grad(loss, far)[0], torch.tensor([[[40.0], [0.0]]]), "the gradient at these answers")
    yield "an expert whose gate is 0 changes nothing, and no gradient becomes nan"
    gates = torch.tensor([[0.5, 0.0, 0.5]], requires_grad=True)
    answers = torch.tensor([[[20.0], [0.0], [20.5]]], requires_grad=True)
    for kind, settings in kinds.items():
        loss = competitive_loss(gates, answers, torch.zeros(1, 1), **settings)
        wanted = mean_loss(kind, gates[:, ::2], answers[:, ::2], torch.zeros(1, 1)).float()
        close(loss, wanted, f"the loss of eq. {kind}")
        for got, want in zip(torch.autograd.grad(loss, [gates, answers]),
                             torch.autograd.grad(wanted, [gates, answers])):
            close(got[0, ::2], want[0, ::2], f"the gradient of eq. {kind} where the gates are not 0", rtol=1e-4)
            assert got.isfinite().all(), f"a gradient of eq. {kind} is {got}"
    yield "the loss has the type of the answers"
    for kind, settings in kinds.items():
        given = [tensor.double() for tensor in case(6, 3)]
        close(competitive_loss(*given, **settings), mean_loss(kind, *given), f"eq. {kind} of float64", rtol=1e-12)


@check
def check_weighted_fit(weighted_fit):
    def normal_equations(inputs, targets, weights):
        "X' R X w = X' R t for each expert, in float64."
        X, t = inputs.double(), targets.double()
        fits = [torch.linalg.solve(X.T @ (r[:, None] * X), X.T @ (r[:, None] * t)) for r in weights.T.double()]
        return torch.stack(fits).to(inputs.dtype)

    yield "it solves the normal equations of each expert"
    for N, C, D, E in (20, 3, 2, 4), (30, 2, 1, 1), (12, 3, 3, 3):
        inputs, targets, weights = torch.randn(N, C), torch.randn(N, D), torch.rand(N, E)
        with unchanged(inputs=inputs, targets=targets, weights=weights):
            fit = weighted_fit(inputs, targets, weights)
        wanted = normal_equations(inputs, targets, weights)
        close(fit, wanted, f"the fit with N, C, D, E = {N, C, D, E}", rtol=1e-3, atol=1e-4)
    yield "only the proportions of the weights matter"
    inputs, targets, weights = torch.randn(20, 3), torch.randn(20, 1), torch.rand(20, 2)
    tiny = weighted_fit(inputs, targets, weights * torch.tensor([1.0, 1e-4]))
    close(tiny, normal_equations(inputs, targets, weights), "the fit", rtol=1e-3, atol=1e-4)
    yield "an expert without weight gets zeros"
    nothing = weighted_fit(inputs, targets, weights * torch.tensor([1.0, 0.0]))
    close(nothing[0], normal_equations(inputs, targets, weights)[0], "the fit of expert 0", rtol=1e-3, atol=1e-4)
    close(nothing[1], torch.zeros(3, 1), "the fit of expert 1")
