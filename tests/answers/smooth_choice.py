"Lesson 25: the order of the two equations, epsilon at the wrong time, a gradient that is lost, doubled or rounded."

A = "a = now * (math.log(k) - ((scores + b) / now).logsumexp(dim=-1, keepdim=True))"
B = "b = -(scores + a).relu()"
DECAY = "        now = max(now * decay, epsilon)\n"
START = "now = max(epsilon if epsilon_start is None else epsilon_start, epsilon)"
WEIGHTS = "return ((scores + a + b) / now).exp()"

STRAIGHT = "return hard.detach().to(smooth.dtype) + (smooth - smooth.detach())"

MOVED = "scores = routing.logits - routing.logits.topk(k, dim=-1).values[..., -1:]"
GATES = "gates = coordinate_descent(scores, k, **self.settings) * routing.chosen / k"
HARD = "gates = straight_through(routing.chosen / k, gates)"
GUARD = "with torch.autocast(x.device.type, enabled=False):"

ROUTER = """
class CoordinateDescentRouter(TopkRouter):
    def __init__(self, n_embd, num_experts, top_k, iterations=20, epsilon=1.0, epsilon_start=None,
                 decay=0.7, hard=False):
        super().__init__(n_embd, num_experts, top_k)
        self.settings = dict(iterations=iterations, epsilon=epsilon, epsilon_start=epsilon_start, decay=decay)
        coordinate_descent(torch.zeros(num_experts), top_k, **self.settings)
        self.hard = hard
"""

LEFT = "left = k - full.sum(dim=-1, keepdim=True)"
SHARES = "shares = left * (scores / epsilon).masked_fill(full, -math.inf).softmax(dim=-1)"
EXACT = "return torch.where(full, 1.0, shares)"

ANSWERS = {
    "coordinate_descent": {
        "right: softmax for a, minimum for b": """
def coordinate_descent(scores, k, iterations, epsilon=1.0, epsilon_start=None, decay=0.7):
    if not 0 < k <= scores.shape[-1]:
        raise ValueError(f"k = {k} is impossible for {scores.shape[-1]} scores")
    for name, value, fine in (("iterations", iterations, iterations >= 1), ("epsilon", epsilon, epsilon > 0),
                              ("decay", decay, 0 < decay <= 1)):
        if not fine:
            raise ValueError(f"{name} = {value} is impossible")
    eps = epsilon if epsilon_start is None else max(epsilon, epsilon_start)
    b = torch.zeros_like(scores) - scores
    for _ in range(iterations):
        z = (scores + b) / eps
        top = z.max(dim=-1, keepdim=True).values
        a = eps * math.log(k) - eps * (top + (z - top).exp().sum(-1, keepdim=True).log())
        b = torch.minimum(-(scores + a), torch.zeros_like(scores))
        eps = max(eps * decay, epsilon)
    return torch.exp((scores + a + b) / eps)
""",
        "right: one list of epsilons, weights by minimum": """
def coordinate_descent(scores, k, iterations, epsilon=1.0, epsilon_start=None, decay=0.7):
    n = scores.size(-1)
    if k <= 0 or k > n:
        raise ValueError(f"k is {k}; there are {n} scores")
    if iterations < 1 or epsilon <= 0 or decay <= 0 or decay > 1:
        raise ValueError(f"iterations {iterations}, epsilon {epsilon} or decay {decay}")
    first = max(epsilon_start or epsilon, epsilon)
    used = [max(first * decay**i, epsilon) for i in range(iterations + 1)]
    a = used[0] * (math.log(k) - math.log(n)) * torch.ones_like(scores[..., :1])
    for now in used[1:-1]:
        a = -now * (torch.logsumexp(torch.minimum(scores, -a) / now, -1, True) - math.log(k))
    return ((scores + a) / used[-1]).clamp(max=0).exp()
""",
        "softmax over dim 1, wrong for (B, T, n)": [(A, A.replace("dim=-1", "dim=1"))],
        "exp and log by hand": [
            (A, A.replace(".logsumexp(dim=-1, keepdim=True)", ".exp().sum(-1, keepdim=True).log()"))
        ],
        "b starts at 0": [("b = -scores", "b = 0 * scores")],
        "the last exponential with the epsilon of the last round": [
            (A, "used = now\n        " + A), (WEIGHTS, WEIGHTS.replace("now", "used"))
        ],
        "epsilon never falls": [(DECAY, "")],
        "epsilon falls below its end": [(DECAY, "        now = now * decay\n")],
        "the start may lie below epsilon": [(START, "now = epsilon if epsilon_start is None else epsilon_start")],
        "one iteration too many": [("range(iterations)", "range(iterations + 1)")],
        "divided by the sum, so that it is k": [
            (WEIGHTS, "w = ((scores + a + b) / now).exp()\n    return k * w / w.sum(dim=-1, keepdim=True)")
        ],
        "stops when the sum is k": [
            ("for _ in", "for i in"),
            (A, "if i and abs(((scores + a + b) / now).exp().sum() / scores.shape[0] - k) < .1:\n            break\n"
                "        " + A),
        ],
        "the optimum at once": """
def coordinate_descent(scores, k, iterations, epsilon=1.0, epsilon_start=None, decay=0.7):
    low, high = -scores.amax(-1, True) - 99 * epsilon, -scores.amin(-1, True)
    for _ in range(100):
        a = (low + high) / 2
        above = ((scores + a) / epsilon).clamp(max=0).exp().sum(-1, True) > k
        low, high = torch.where(above, low, a), torch.where(above, a, high)
    return ((scores + low) / epsilon).clamp(max=0).exp()
""",
        "gradient of the last round only": [(B, "a = a.detach()\n        " + B)],
        "float64 throughout": [("b = -scores", "scores = scores.double()\n    b = -scores")],
        "scores changed in place": [
            (WEIGHTS, "with torch.no_grad():\n        scores -= scores.mean()\n    " + WEIGHTS)
        ],
    },
    "straight_through": {
        "right: a function of its own": """
class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hard, smooth):
        return hard.detach().to(smooth.dtype).clone()

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient

def straight_through(hard, smooth):
    return Through.apply(hard, smooth)
""",
        "right: a zero with a gradient": """
def straight_through(hard, smooth):
    with torch.no_grad():
        front = torch.empty_like(smooth).copy_(hard)
        back = smooth.clone()
    return front + (smooth - back)
""",
        "the line of st-moe-pytorch: hard + smooth - smooth.detach()": [
            (STRAIGHT, "return hard.detach().to(smooth.dtype) + smooth - smooth.detach()")
        ],
        "smooth plus the difference": [
            (STRAIGHT, "return smooth + (hard.detach().to(smooth.dtype) - smooth).detach()")
        ],
        "the gradient of hard is added": [(STRAIGHT, STRAIGHT.replace("hard.detach()", "hard"))],
        "no gradient at all": [(STRAIGHT, "return hard.detach().to(smooth.dtype)")],
        "smooth forwards": [(STRAIGHT, "return smooth + (hard.to(smooth.dtype) - hard.to(smooth.dtype)).detach()")],
        "the gradient only where hard is not 0": [
            (STRAIGHT, STRAIGHT.replace("(smooth - smooth.detach())", "hard.detach() * (smooth - smooth.detach())"))
        ],
        "the gradient has the wrong sign": [
            (STRAIGHT, STRAIGHT.replace("smooth - smooth.detach()", "smooth.detach() - smooth"))
        ],
        "a mask stays a mask": [(STRAIGHT, "return hard if hard.dtype == torch.bool else " + STRAIGHT[7:])],
        "the type of hard": [(STRAIGHT, STRAIGHT.replace(".to(smooth.dtype)", "* 1.0"))],
    },
    "coordinate_descent_router": {
        "right: scores by hand, gates by where": ROUTER
        + """
    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        routing = TopkRouter.forward(self, x)
        kth = routing.logits.sort(dim=-1, descending=True).values[..., self.top_k - 1].unsqueeze(-1)
        weights = coordinate_descent(routing.logits - kth, self.top_k, **self.settings)
        gates = torch.where(routing.chosen, weights / self.top_k, torch.zeros_like(weights))
        if self.hard:
            gates = straight_through(torch.where(routing.chosen, 1 / self.top_k, 0.0), gates)
        return type(routing)(gates, routing.logits, routing.chosen, routing.kept)
""",
        "right: the k-th score by kthvalue, gates by masked_fill": [
            (MOVED, "scores = routing.logits - routing.logits.kthvalue(routing.logits.shape[-1] - k + 1, "
                    "keepdim=True).values"),
            (GATES, "weights = coordinate_descent(scores, k, **self.settings)\n"
                    "            gates = (weights / k).masked_fill(~routing.chosen, 0)"),
        ],
        "scores that are not moved": [(MOVED, "scores = routing.logits")],
        "as CoLT5-attention ships it: 20 rounds, epsilon 0.1": [
            (GATES, "gates = coordinate_descent(routing.logits, k, 20, epsilon=0.1) * routing.chosen / k")
        ],
        "probabilities in place of scores, as in st-moe-pytorch": [(MOVED, "scores = routing.probs")],
        "divided by their sum": [
            (GATES, GATES.removesuffix(" / k") + "\n            gates = gates / gates.sum(dim=-1, keepdim=True)")
        ],
        "the others keep their weights": [(GATES, GATES.replace(" * routing.chosen", ""))],
        "chosen by the largest weights": [
            (GATES, "gates = coordinate_descent(scores, k, **self.settings) / k\n            gates = gates * (gates >= "
                    "gates.topk(k, dim=-1).values[..., -1:])\n            routing = replace(routing, chosen=gates > 0, "
                    "kept=gates > 0)"),
        ],
        "start and decay are not passed on": [
            (GATES, GATES.replace("**self.settings", 'self.settings["iterations"], self.settings["epsilon"]'))
        ],
        "epsilon falls from call to call": [
            (GATES, GATES + "\n            self.settings['epsilon'] *= 0.9999")
        ],
        "the k-th score for (T, E) only": [
            (MOVED, "scores = routing.logits - routing.logits.topk(k, dim=1).values[:, -1:]")
        ],
        "the moved scores in the record": [("return replace(routing, ", "return replace(routing, logits=scores, ")],
        "hard without a gradient": [(HARD, "gates = routing.chosen / k")],
        "a gradient in training only": [
            (GATES, GATES + "\n            gates = gates if self.training else gates.detach()")
        ],
        "no gradient to scores that were not chosen": [
            (MOVED, MOVED + "\n            scores = torch.where(routing.chosen, scores, scores.detach())")
        ],
        "autocast switched off for everybody": [
            (GUARD, "torch.set_autocast_enabled(x.device.type, False)\n        if True:")
        ],
        "tokens chosen for each expert, as in CoLT5": [
            (GATES, "gates = coordinate_descent(scores.mT, k, **self.settings).mT * routing.chosen / k")
        ],
    },
    "exact_weights": {
        "right: sorted, m from k - 1 down": """
def exact_weights(scores, k, epsilon):
    ordered = scores.sort(dim=-1, descending=True).values
    for m in reversed(range(k)):
        a = epsilon * (math.log(k - m) - (ordered[..., m:] / epsilon).logsumexp(dim=-1, keepdim=True))
        found = a if m == k - 1 else torch.where(ordered[..., m : m + 1] + a <= 0, a, found)
    return ((scores + found) / epsilon).clamp(max=0).exp()
""",
        "right: all m at once": """
def exact_weights(scores, k, epsilon):
    ordered = scores.sort(dim=-1, descending=True).values
    tails = (ordered.flip(-1) / epsilon).logcumsumexp(dim=-1).flip(-1)[..., :k]
    left = torch.arange(k, 0, -1, device=scores.device, dtype=scores.dtype)
    a = epsilon * (left.log() - tails)
    fits = ordered[..., :k] + a <= 0
    fits[..., -1] = True
    first = fits.int().argmax(dim=-1, keepdim=True)
    return ((scores + a.gather(-1, first)) / epsilon).clamp(max=0).exp()
""",
        "k times a softmax, cut at 1": [("range(k)", "range(1)")],
        "the rest shared once only": [("range(k)", "range(min(k, 2))")],
        "the others share k, not what is left": [(LEFT, "left = k")],
        "what is left, counted over all tokens": [(LEFT, "left = k - full.sum() / full[..., 0].numel()")],
        "only the last round is remembered": [("full = full | (shares > 1)", "full = shares > 1")],
        "masked with 0 instead of minus infinity": [(SHARES, SHARES.replace("-math.inf", "0.0"))],
        "epsilon multiplies": [(SHARES, SHARES.replace("scores / epsilon", "scores * epsilon"))],
        "exp by hand": [(SHARES, "shares = (scores / epsilon).exp() * ~full\n"
                                 "        shares = left * shares / shares.sum(dim=-1, keepdim=True)")],
        "softmax over dim 1": [(SHARES, SHARES.replace("dim=-1", "dim=1"))],
        "the sum without its gradient": [
            (SHARES, "z = (scores / epsilon).masked_fill(full, -math.inf)\n"
                     "        shares = left * (z - z.logsumexp(dim=-1, keepdim=True).detach()).exp()")
        ],
        "by iterations": [(EXACT, "return coordinate_descent(scores, k, 20, epsilon)")],
        "always float64": [(SHARES, SHARES.replace("(scores /", "(scores.double() /"))],
    },
}
