"Checks of lesson 21, switch. Random numbers, from a fixed seed, are compared within their standard errors."

import copy

import torch
from torch import nn
from torch.nn import functional as F

from makemoe.checks import check, close, refuses, same, same_gradients, unchanged
from makemoe.checks.gating import follows
from makemoe.gating import TopkRouter

FIELDS = "gates", "logits", "chosen", "kept"


def switch_by_loop(logits, k=1):
    "Gates (T, E) of logits (T, E): the probabilities among all experts of each token's `k` best, 0 for the others."
    gates = torch.zeros_like(logits)
    for t, row in enumerate(logits):
        for e in sorted(range(len(row)), key=lambda e: -row[e].item())[:k]:  # of equals, the lower number first
            gates[t, e] = (row[e] - row.logsumexp(dim=-1)).exp()
    return gates


def scores(router, x):
    return F.linear(x, router.linear.weight, router.linear.bias)


def open_router(SwitchRouter, jitter):
    """A router from 4 channels to 5 experts, k = 5, that lets the jitter be read back from its gates.

    Expert 0 has score 0, and expert i + 1 has the score x[i] * jitter of channel i."""
    router = SwitchRouter(4, 5, 5, jitter=jitter)
    router.linear.weight.data = torch.eye(5)[:, 1:].contiguous()
    router.linear.bias.data.zero_()
    return router


def read_factors(x, gates):
    "What each channel of x (..., 4) was multiplied by, from the gates (..., 5) of an `open_router`."
    return ((gates[..., 1:].log() - gates[..., :1].log()) / x).detach()


def within(z, what, limit=5):
    "Assert that all `z`, in standard errors, are below `limit`. By chance alone, 5 is exceeded once in two million."
    assert z.abs().max() < limit, f"{what}: {z.abs().max():.1f} standard errors off"


@check
def check_switch_gating(switch_gating):
    logits = torch.randn(8, 5, requires_grad=True)
    yield "by default the most probable expert is chosen, and its gate is its probability among all"
    with unchanged(logits=logits):
        routing = switch_gating(logits)
    follows(routing, logits, switch_by_loop(logits))
    yield "with k experts each gate is a probability among all, and none is renormalised"
    for k in range(1, 6):
        follows(switch_gating(logits, k), logits, switch_by_loop(logits, k), f"gates with k = {k}")
    yield "the gradient reaches all logits, also those of experts that were not chosen"
    for k in 1, 3:
        sources = {"logits": logits}
        same_gradients(switch_gating(logits, k).gates, switch_by_loop(logits, k), sources, f"gates with k = {k}")
    same_gradients(routing.logits, logits * 1, {"logits": logits}, "the record's logits")
    yield "logits may have any shape (..., E)"
    for shape in (2, 4), (1, 8), (8, 1), (2, 1, 4):
        some, gates = logits.view(*shape, 5), switch_by_loop(logits, 2).view(*shape, 5)
        follows(switch_gating(some, 2), some, gates, f"gates of logits of shape {(*shape, 5)}")
    follows(switch_gating(logits[0]), logits[0], switch_by_loop(logits[:1])[0], "gates of a single token (E,)")
    yield "of equal logits the lower expert number comes first"
    ties = torch.tensor([[1.0, 2.0, 0.0, 2.0, 2.0], [0.0] * 5]).repeat(10, 1)
    for k in 1, 2, 3:
        follows(switch_gating(ties, k), ties, switch_by_loop(ties, k), f"gates with k = {k}")
    yield "large logits do not overflow, and an expert whose gate is rounded to 0 is still chosen and kept"
    large = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4]])
    routing = switch_gating(large, 2)
    close(routing.gates, (large == 1e4).float(), "gates")
    same(routing.chosen, large >= 0, "chosen")
    same(routing.kept, large >= 0, "kept")
    yield "the gates have the type of the logits"
    for dtype in torch.float64, torch.bfloat16:
        same(switch_gating(logits.detach().to(dtype)).gates.dtype, dtype, "the type of the gates")


@check
def check_switch_router(SwitchRouter):
    yield "without jitter it is the rule on linear scores, in training and evaluation, without random numbers"
    x = torch.randn(7, 6, requires_grad=True)
    for arguments, k in ((6, 5), 1), ((6, 5, 3), 3):
        router = SwitchRouter(*arguments)
        gates = switch_by_loop(scores(router, x), k)
        for mode in True, False:
            state = torch.get_rng_state()
            with unchanged(x=x, weight=router.linear.weight, bias=router.linear.bias):
                routing = router.train(mode)(x)
            same(torch.get_rng_state(), state, "the state of the random numbers")
            close(routing.logits, scores(router, x), f"logits, training {mode},")
            follows(routing, routing.logits, gates, f"gates with top_k = {k}, training {mode},")
            sources = {"x": x, "the weight": router.linear.weight, "the bias": router.linear.bias}
            same_gradients(routing.gates, gates, sources, f"gates, training {mode},")
    assert isinstance(router, TopkRouter) and router.top_k == 3, "it should be a TopkRouter with its top_k"

    yield "evaluation has no jitter and draws no random numbers"
    shaky = SwitchRouter(6, 5, jitter=0.5).eval()
    state = torch.get_rng_state()
    close(shaky(x).gates, switch_by_loop(scores(shaky, x)), "gates")
    same(torch.get_rng_state(), state, "the state of the random numbers after evaluation")

    yield "in training it leaves the caller's tokens as they are"
    shaky.train()
    for tokens in x.detach(), x, x.detach().double():
        with unchanged(x=tokens):
            shaky(tokens)

    yield "each channel of each token is multiplied by its own number, uniform from 1 - jitter to 1 + jitter"
    tokens = torch.randn(2, 1000, 4).sign()  # (B, T, C)
    for jitter in 0.05, 0.4:
        router = open_router(SwitchRouter, jitter)
        first, second = (read_factors(tokens, router(tokens).gates).double() - 1 for _ in range(2))  # (B, T, C)
        assert first.abs().max() < jitter + 1e-4, f"with jitter {jitter} a factor is off by {first.abs().max():.3f}"
        for u in first.flatten() / jitter, second.flatten() / jitter:  # uniform from -1 to 1
            within(u.mean() * (3 * len(u)) ** 0.5, "the mean of the factors")
            within((u.square().mean() - 1 / 3) * (len(u) * 45 / 4) ** 0.5, "the variance of the factors")
            within(((u.square() < 0.25).double().mean() - 0.5) * 2 * len(u) ** 0.5, "the middle half of the factors")
        pairs = {"two channels": first.roll(1, dims=-1), "two rows of a batch": first.flip(0), "two calls": second}
        pairs["two tokens"] = first.roll(1, dims=1)
        for what, other in pairs.items():
            within((first * other).mean() * 3 / jitter**2 * 4000**0.5, f"the correlation of {what}")

    yield "choice and gates come from the scores with jitter; the record's logits are without, with their gradient"
    shaky, many = SwitchRouter(6, 5, 2, jitter=0.5), torch.randn(500, 6, requires_grad=True)
    routing = shaky(many)
    close(routing.logits, scores(shaky, many), "logits")
    same_gradients(routing.logits, scores(shaky, many), {"x": many, "the weight": shaky.linear.weight}, "logits")
    same(routing.chosen.sum(dim=-1), torch.full((500,), 2), "the number of experts per token")
    same(routing.gates > 0, routing.chosen, "where the gates are above 0")
    same(routing.kept, routing.chosen, "kept")
    calm = switch_by_loop(routing.logits, 2)
    moved = (routing.chosen != (calm > 0)).any(dim=-1)
    assert 50 < moved.sum() < 450, f"jitter changes the choice of {moved.sum()} of 500 tokens"
    stayed = torch.isclose(routing.gates, calm).all(dim=-1)
    assert not stayed.any(), f"{stayed.sum()} of 500 tokens have the gates of the scores without jitter"

    yield "with jitter the gradient reaches tokens and weights through the jittered copy"
    router, tokens = open_router(SwitchRouter, 0.4), torch.randn(2, 30, 4).sign().requires_grad_()
    gates = router(tokens).gates
    formula = scores(router, tokens * read_factors(tokens, gates)).softmax(dim=-1)
    sources = {"x": tokens} | dict(router.named_parameters())
    same_gradients(gates, formula, sources, "the gates", rtol=1e-3, atol=1e-4)

    yield "it computes in float32, also under autocast and for weights and tokens of another type"
    for jitter in 0.0, 0.3:
        router = SwitchRouter(6, 5, 2, jitter=jitter)
        for dtype in torch.bfloat16, torch.float64:
            cast, tokens = copy.deepcopy(router).to(dtype), many.detach()[:50].to(dtype)
            torch.manual_seed(2)
            low = cast(tokens)
            torch.manual_seed(2)
            exact = copy.deepcopy(cast).float()(tokens.float())
            for field in "logits", "gates":
                close(getattr(low, field), getattr(exact, field), f"{field} in {dtype} with jitter {jitter}")
            same(cast.linear.weight.dtype, dtype, "the type of the weight after a call")
        torch.manual_seed(2)
        exact = router(many.detach())
        torch.manual_seed(2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = router(many.detach())
        for field in "logits", "gates":
            close(getattr(low, field), getattr(exact, field), f"{field} under autocast with jitter {jitter}")

    yield "a jitter that is not from [0, 1) is refused, and so is a top_k that is too large"
    for jitter in -0.1, 1.0, float("nan"):
        refuses(ValueError, lambda jitter=jitter: SwitchRouter(6, 5, jitter=jitter), "jitter", jitter)
    refuses(ValueError, lambda: SwitchRouter(6, 5, 6), "top_k", "6")


@check
def check_switch_init(switch_init):
    yield "the values are normal with deviation sqrt(scale / fan-in), cut off at two deviations"
    for shape, fan_in, scale in ((400, 50), 50, 0.1), ((50, 400), 400, 1.0), ((8, 30, 90), 90, 0.1):
        weight = nn.Parameter(torch.full(shape, 7.0))
        switch_init(weight, scale)
        z = weight.detach().double().flatten() / (scale / fan_in) ** 0.5  # a standard normal number, cut off at 2
        what = f"of a weight of shape {shape} with scale {scale}"
        assert 1.95 < z.abs().max() < 2.001, f"the largest value {what} is {z.abs().max():.2f} deviations"
        within(z.mean() * len(z) ** 0.5 / 0.88, f"the mean {what}")
        within((z.square().mean() - 0.7737) * (len(z) / 0.82) ** 0.5, f"the mean square {what}")
        within(((z.abs() < 0.5).double().mean() - 0.4012) * len(z) ** 0.5 / 0.49, f"the middle {what}")
    yield "the scale is 0.1 by default"
    torch.manual_seed(3)
    default = nn.Parameter(torch.empty(40, 30))
    switch_init(default)
    torch.manual_seed(3)
    given = nn.Parameter(torch.empty(40, 30))
    switch_init(given, 0.1)
    same(default.detach(), given.detach(), "the weight")
    yield "the weight is still a leaf that takes gradients, and two calls draw different numbers"
    assert default.is_leaf and default.requires_grad, "the weight no longer takes gradients"
    before = default.detach().clone()
    switch_init(default)
    assert not (default == before).any(), "the second call drew numbers of the first"
