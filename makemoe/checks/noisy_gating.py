"Checks of lesson 05, noisy gating. Random numbers, from a fixed seed, are compared within their standard errors."

import copy

import torch
from torch import nn
from torch.nn import functional as F

from makemoe.checks import check, close, refuses, same, same_gradients, unchanged
from makemoe.gating import TopkRouter, top_k_gating

N = 20_000


def within(z, what, limit=5):
    "Assert that all `z`, in standard errors, are below `limit`. By chance alone, 5 is exceeded once in two million."
    worst = z.abs().max()
    assert worst < limit, f"{what}: {worst:.1f} standard errors off"


def clean_scores(router, x):
    return F.linear(x, router.linear.weight, router.linear.bias)


def deviations(router, x):
    return F.softplus(F.linear(x, router.noise_linear.weight, router.noise_linear.bias))


def read_noise(router, x, gates):
    "The noise (N, E) behind the gates of a router with k = E whose expert 0 has none, divided by its deviation."
    noise = gates.log() - clean_scores(router, x)
    return ((noise - noise[..., :1]) / deviations(router, x)).detach()


def loud_router(NoisyTopkRouter, n_embd=6, num_experts=4):
    "A router with k = E, deviations from small to large, and no noise at expert 0."
    router = NoisyTopkRouter(n_embd, num_experts, num_experts)
    nn.init.normal_(router.noise_linear.weight, std=0.5)
    nn.init.zeros_(router.noise_linear.weight[0])
    nn.init.constant_(router.noise_linear.bias[0], -100.0)  # softplus(-100) = 4e-44
    return router


@check
def check_noisy_topk_router(NoisyTopkRouter):
    yield "in evaluation it does what a TopkRouter with the same weights does, and draws no random numbers"
    router, x = NoisyTopkRouter(6, 5, 2).eval(), torch.randn(40, 6, requires_grad=True)
    plain = TopkRouter(6, 5, 2)
    plain.linear.load_state_dict(router.linear.state_dict())
    state = torch.get_rng_state()
    with unchanged(x=x):
        ours, theirs = router(x), plain(x)
    same(torch.get_rng_state(), state, "the state of the random numbers after evaluation")
    for field in "gates", "logits", "chosen", "kept":
        close(getattr(ours, field), getattr(theirs, field), field)
    same_gradients(ours.gates, theirs.gates, {"x": x}, "gates")
    evaluated = torch.autograd.grad((ours.gates * torch.randn(5)).sum(), router.linear.weight, allow_unused=True)[0]
    assert evaluated is not None and evaluated.any(), "in evaluation no gradient reaches the weights of linear"

    yield "the noise of each expert is normal and independent, with mean 0 and deviation softplus(noise_linear(x))"
    loud, many = loud_router(NoisyTopkRouter), torch.randn(N, 6)
    noise = read_noise(loud, many, loud(many).gates)[:, 1:]  # (N, 3)
    usual = deviations(loud, many)[:, 1:] > 0.1  # smaller ones are lost when the gates are rounded
    for e in range(3):
        z = noise[usual[:, e], e].double()
        within(z.mean() * len(z) ** 0.5, f"the mean of the noise of expert {e + 1}")
        within((z.var() - 1) * (len(z) / 2) ** 0.5, f"the variance of the noise of expert {e + 1}")
        within(((z**4).mean() - 3) * (len(z) / 96) ** 0.5, f"the fourth moment of the noise of expert {e + 1}")
    both = noise[usual.all(dim=1)]
    within((torch.corrcoef(both.T) - torch.eye(3)) * len(both) ** 0.5, "the correlation of the noise of two experts")

    yield "every token, row of a batch and pass has its own noise"
    first, second = (loud(many[:50].expand(2, 50, 6)).gates for _ in range(2))
    assert first.shape == (2, 50, 4), f"gates of (2, 50, 6) tokens have the shape {tuple(first.shape)}"
    for one, other, what in (first[0], first[1], "rows"), (first, second, "passes"):
        assert not torch.isclose(one, other).all(dim=-1).any(), f"two {what} have the same noise"
    alike = loud(torch.ones(50, 6)).gates
    assert not torch.isclose(alike[0], alike[1:]).all(dim=-1).any(), "two tokens have the same noise"

    yield "the logits in the record are the scores without noise, with their gradient"
    router, x = NoisyTopkRouter(6, 5, 2), torch.randn(500, 6, requires_grad=True)
    routing = router(x)
    close(routing.logits, clean_scores(router, x), "logits")
    same_gradients(routing.logits, clean_scores(router, x), {"x": x, "linear.weight": router.linear.weight}, "logits")

    yield "choice and gates come from the noisy scores: k experts per token, nothing dropped"
    same(routing.chosen.sum(dim=-1), torch.full((500,), 2), "the number of experts per token")
    same(routing.kept, routing.chosen, "kept")
    same(routing.gates > 0, routing.chosen, "where the gates are above 0")
    clean = top_k_gating(routing.logits, 2)
    moved = (routing.chosen != clean.chosen).any(dim=-1)
    assert 50 < moved.sum() < 450, f"noise changes the choice of {moved.sum()} of 500 tokens"
    stayed = torch.isclose(routing.gates, clean.gates).all(dim=-1)
    assert not stayed.any(), f"{stayed.sum()} of 500 tokens have the gates of the scores without noise"

    yield "in training the gradient reaches tokens, scores and deviations as the formula says"
    x = torch.randn(30, 6, requires_grad=True)
    nn.init.zeros_(loud.noise_linear.weight[1:])  # deviations of ln 2 and the like, which can be read back well
    gates = loud(x).gates
    eps = read_noise(loud, x, gates)
    formula = (clean_scores(loud, x) + eps * deviations(loud, x)).softmax(dim=-1)
    sources = {"x": x} | dict(loud.named_parameters())
    same_gradients(gates, formula, sources, "the gates", rtol=1e-3, atol=1e-4)

    yield "it computes in float32, also under autocast and for weights and tokens of another type"
    loud = loud_router(NoisyTopkRouter)
    for training in True, False:
        loud.train(training)
        for dtype in torch.bfloat16, torch.float64:
            cast = copy.deepcopy(loud).to(dtype)
            tokens, full = many[:100].to(dtype), copy.deepcopy(cast).float()
            torch.manual_seed(2)
            low = cast(tokens)
            torch.manual_seed(2)
            exact = full(tokens.float())
            for field in "logits", "gates":
                close(getattr(low, field), getattr(exact, field), f"{field} in {dtype}, training = {training}")
        torch.manual_seed(2)
        exact = loud(many[:100])
        torch.manual_seed(2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = loud(many[:100])
        for field in "logits", "gates":
            close(getattr(low, field), getattr(exact, field), f"{field} under autocast, training = {training}")

    yield "a top_k that is too large is refused, as by TopkRouter"
    refuses(ValueError, lambda: NoisyTopkRouter(6, 5, 6), "top_k", "6")


@check
def check_gumbel_choice(gumbel_choice):
    logits, u = 2 * torch.randn(200, 5), torch.rand(200, 5)
    yield "the expert with the largest sum of score and Gumbel noise is chosen"
    sums = logits - torch.log(-torch.log(u))
    want = torch.tensor([max(range(5), key=lambda e: sums[t, e]) for t in range(200)])
    state = torch.get_rng_state()
    with unchanged(logits=logits, u=u):
        drawn = gumbel_choice(logits, u)
    close(drawn, want, "the experts")
    yield "it draws no random numbers itself"
    same(torch.get_rng_state(), state, "the state of the random numbers")
    same(gumbel_choice(logits, u), drawn, "the experts in a second call")
    yield "any dimensions may come before E"
    close(gumbel_choice(logits.view(4, 50, 5), u.view(4, 50, 5)), want.view(4, 50), "the experts of (4, 50, 5) scores")
    close(gumbel_choice(logits[0], u[0]), want[0], "the expert of a single token")


def probability_by_loop(logits, noisy, deviation, k):
    "Leave expert i out, sort the others, ask the normal distribution: all (T, E)."
    rows = []
    for t in range(len(logits)):
        for i in range(logits.shape[1]):
            others = torch.cat([noisy[t, :i], noisy[t, i + 1 :]]).sort(descending=True).values
            rows.append(torch.distributions.Normal(others[k - 1], deviation[t, i]).cdf(logits[t, i]))
    return torch.stack(rows).view_as(logits)


@check
def check_choice_probability(choice_probability):
    logits, deviation = torch.randn(6, 5), 0.2 + torch.rand(6, 5)
    noisy = logits + deviation * torch.randn(6, 5)
    for k in 1, 2, 4:
        yield f"it equals a loop over eq. 9, k = {k}"
        with unchanged(logits=logits, noisy=noisy, deviation=deviation):
            got = choice_probability(logits, noisy, deviation, k)
        close(got, probability_by_loop(logits, noisy, deviation, k), "P")
    yield "the gradient reaches scores, noisy scores and deviations"
    sources = {"logits": logits, "noisy": noisy, "deviation": deviation}
    sources = {name: tensor.clone().requires_grad_() for name, tensor in sources.items()}
    same_gradients(choice_probability(**sources, k=2), probability_by_loop(**sources, k=2), sources, "P")
    yield "any dimensions may come before E"
    batch = (tensor.view(2, 3, 5) for tensor in (logits, noisy, deviation))
    close(choice_probability(*batch, 2).view(6, 5), probability_by_loop(logits, noisy, deviation, 2), "P of (2, 3, 5)")
