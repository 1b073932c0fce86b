"Lesson 22. What goes wrong: gates taken at the wrong moment, draws of the wrong size or time, groups, first choices."

SOFTMAX = "g = best.softmax(dim=-1)"
TAKEN = "taken = (draws < g / limits) | (limits == 0)"
GATES = "gates = torch.zeros_like(logits, dtype=g.dtype).scatter(-1, experts, g * taken)  # (..., E)"
RETURN = "return Routing(gates, logits, chosen, kept=chosen)"
HALF = "draws = torch.full_like(g, 0.5)"
LIMITS = "limits = g.new_tensor([0, *limits[1:]])"
BELOW = "not all(limit >= 0 for limit in limits)"

GUARDS = """
def threshold_gating(logits, k, thresholds, draws=None):
    many = isinstance(thresholds, (list, tuple))
    further = list(thresholds) if many else (k - 1) * [thresholds]
    bad = [limit for limit in [thresholds, *further][many:] if not limit >= 0]
    if bad or len(further) != k - 1:
        raise ValueError(f"threshold {thresholds} for {k - 1} further choices")
    if draws is not None and draws.shape != (*logits.shape[:-1], k):
        raise ValueError(f"draws are {tuple(draws.shape)}")
"""

DRAW = "draws = torch.rand(*logits.shape[:-1], self.top_k, device=logits.device) if self.training else None"
TRY = "threshold_gating(torch.zeros(num_experts), top_k, thresholds)  # broken ones raise here"
SCORES = "logits = super().forward(x).logits  # (..., E)"
SHARE = "return threshold_gating(logits, self.top_k, self.thresholds, draws)"

INSIDE = "routing = self.router(x.reshape(-1, self.group_size, x.shape[-1]))  # fields (G, group_size, E)"
STORE = "self.router, self.group_size, self.top_k = router, int(group_size), router.top_k"
TOKENS = "if tokens % self.group_size:"

F_LINE = "f = F.one_hot(routing.logits.argmax(dim=-1), E).float().mean(dim=-2)  # (..., E)"
LOSS = "return E * (f * P).sum(dim=-1).mean()"

ANSWERS = {
    "threshold_gating": {
        "right: choice by choice, with top_k_gating": GUARDS
        + """
    full = top_k_gating(logits, k)
    order = logits.topk(k, dim=-1).indices
    chosen = torch.zeros_like(full.chosen)
    for i in range(k):
        e = order[..., i:i + 1]
        gate = full.gates.detach().gather(-1, e)
        draw = 0.5 if draws is None else draws[..., i:i + 1]
        sure = i == 0 or further[i - 1] == 0
        taken = torch.ones_like(gate, dtype=torch.bool) if sure else draw < gate / further[i - 1]
        chosen = chosen.scatter(-1, e, taken)
    return replace(full, gates=full.gates.masked_fill(~chosen, 0), chosen=chosen, kept=chosen)


from makemoe.gating import top_k_gating
""",
        "right: probabilities clamped, one-hot instead of scatter": GUARDS
        + """
    best, experts = logits.sort(dim=-1, descending=True)
    best, experts = best[..., :k], experts[..., :k]
    g = best.softmax(dim=-1)
    theta = torch.tensor([0.0, *further], dtype=g.dtype, device=g.device)
    p = torch.where(theta == 0, torch.ones_like(g), (g.detach() / theta.clamp(min=1e-30)).clamp(max=1))
    taken = p > 0.5 if draws is None else draws < p
    hot = nn.functional.one_hot(experts, logits.shape[-1]) * taken[..., None]  # (..., k, E)
    chosen = hot.sum(dim=-2).bool()
    return Routing((hot.to(g.dtype) * g[..., None]).sum(dim=-2), logits, chosen, chosen.clone())
""",
        "the second gate is not normalised, as in NllbMoeTop2Router with policy random": [
            (
                SOFTMAX,
                "g = torch.cat([best.softmax(-1)[..., :1], logits.softmax(-1).gather(-1, experts)[..., 1:]], -1)",
            ),
        ],
        "a mask handed on as numbers of experts, as in NllbMoeSparseMLP": [
            (RETURN, "chosen = torch.zeros_like(chosen).scatter(-1, chosen.long(), True)\n    " + RETURN)
        ],
        "scaled up again to a sum of 1": [(GATES, GATES + "\n    gates = gates / gates.sum(dim=-1, keepdim=True)")],
        "what was not drawn counts as chosen, and as dropped": [
            (
                RETURN,
                (
                    "asked = torch.zeros_like(chosen).scatter(-1, experts, True)\n    "
                    "return Routing(gates, logits, asked, kept=chosen)"
                ),
            )
        ],
        "the first has to be drawn, too": [(LIMITS, "limits = g.new_tensor([limits[-1], *limits[1:]])")],
        "thresholds are one choice late": [(LIMITS, "limits = g.new_tensor([0, *limits[2:], *limits[1:2]])")],
        "one threshold, for the second choice only": [("[thresholds] * k", "[0, thresholds] + [0] * (k - 2)")],
        "works with two dimensions only": [
            (GATES, "gates = logits.new_zeros(len(logits), logits.shape[1]).scatter(-1, experts, g * taken)")
        ],
        "gates in float32, whatever the logits are": [
            (
                GATES,
                GATES.replace(
                    "torch.zeros_like(logits, dtype=g.dtype)", "torch.zeros(logits.shape, device=logits.device)"
                ).replace("g * taken", "(g * taken).float()"),
            )
        ],
        "draws in the order of the experts": [
            ("(draws < g / limits)", "(draws.gather(-1, experts.argsort(dim=-1)) < g / limits)")
        ],
        "at least instead of above": [("draws < g / limits", "draws <= g / limits")],
        "random without draws": [(HALF, "draws = torch.rand_like(g)")],
        "threshold 0 forgets gates of 0": [(TAKEN, "taken = draws < g / limits\n    taken[..., 0] = True")],
        "the gradient of the gates stops at what was taken": [
            (
                SOFTMAX,
                (
                    "g = best.softmax(dim=-1)\n    part = best - best.logsumexp(dim=-1, keepdim=True).detach()\n"
                    "    g = part.exp()"
                ),
            )
        ],
        "nan and draws of other shapes accepted": [
            (BELOW, "any(limit < 0 for limit in limits)"),
            ("draws.shape != g.shape", "draws.dim() != g.dim()"),
        ],
    },
    "threshold_router": {
        "right: half as a draw, scores by hand": """
class ThresholdRouter(TopkRouter):
    def __init__(self, n_embd, num_experts, top_k=2, thresholds=0.2):
        super().__init__(n_embd, num_experts, top_k)
        self.limits = thresholds
        threshold_gating(torch.ones(2, num_experts), k=top_k, thresholds=self.limits)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            scores = x.float() @ self.linear.weight.float().T + self.linear.bias.float()
        u = torch.empty(scores.shape[:-1] + (self.top_k,), device=x.device).fill_(0.5)
        if self.training:
            u.uniform_()
        return threshold_gating(scores, self.top_k, self.limits, u)
""",
        "right: draws taken from a longer tensor": [
            (DRAW, "draws = torch.rand_like(logits)[..., :self.top_k] if self.training else None")
        ],
        "chance in evaluation, too, as in st-moe-pytorch": [(" if self.training else None", "")],
        "no chance at all": [(DRAW, "draws = None")],
        "scaled up to a sum of 1 in training": [
            (
                SHARE,
                (
                    "routing = threshold_gating(logits, self.top_k, self.thresholds, draws)\n"
                    "        total = routing.gates.sum(dim=-1, keepdim=True)\n"
                    "        return replace(routing, gates=routing.gates / total) if self.training else routing"
                ),
            )
        ],
        "random numbers drawn in evaluation and not used": [
            (
                DRAW,
                "draws = torch.rand(*logits.shape[:-1], self.top_k)\n        draws = draws if self.training else None",
            )
        ],
        "one draw for all choices": [
            ("self.top_k, device=logits.device)", "1).expand(*logits.shape[:-1], self.top_k)")
        ],
        "one draw for all rows": [
            (
                DRAW,
                (
                    "draws = torch.rand(logits.shape[-2], self.top_k).expand(*logits.shape[:-1], "
                    "self.top_k) if self.training else None"
                ),
            )
        ],
        "the same draws in every pass": [(SCORES, SCORES + "\n        torch.manual_seed(0)")],
        "normal instead of uniform draws": [("torch.rand(", "torch.randn(")],
        "the threshold of GShard by default": [("top_k=2, thresholds=0.2", "top_k=2, thresholds=0.5")],
        "one threshold, whatever was asked for": [(SHARE, SHARE.replace("self.thresholds", "0.2"))],
        "broken settings are found out in the first batch": [(TRY, "# threshold_gating tries them")],
        "scores without a gradient": [(SCORES, SCORES.replace(".logits", ".logits.detach()"))],
        "scores under autocast": [(SCORES, "logits = self.linear(x.to(self.linear.weight.dtype)).float()")],
        "no gradient in evaluation": [(SHARE, "with torch.set_grad_enabled(self.training):\n            " + SHARE)],
    },
    "grouped_router": {
        "right: view and split": """
class GroupedRouter(nn.Module):
    def __init__(self, router, group_size):
        super().__init__()
        if int(group_size) != group_size or group_size <= 0:
            raise ValueError(f"group_size = {group_size}")
        self.inner, self.size = router, int(group_size)

    @property
    def top_k(self):
        return self.inner.top_k

    def forward(self, x):
        flat = x.flatten(0, -2)
        if len(flat) % self.size != 0:
            raise ValueError(f"{len(flat)} tokens, groups of {self.size}")
        groups = flat.contiguous().view(len(flat) // self.size, self.size, x.shape[-1])
        r = self.inner(groups)
        back = [field.flatten(0, 1).view(*x.shape[:-1], -1) if len(flat) else field.new_zeros(*x.shape[:-1],
                field.shape[-1]) for field in (r.gates, r.logits, r.chosen, r.kept)]
        return Routing(*back)
""",
        "right: unflatten": [
            (
                INSIDE,
                "routing = self.router(x.flatten(0, -2).unflatten(0, (tokens // self.group_size, self.group_size)))",
            )
        ],
        "group_size taken for the number of groups": [
            (INSIDE, "routing = self.router(x.reshape(self.group_size, -1, x.shape[-1]))")
        ],
        "groups cut across time: every row gives one token after the other": [
            (
                INSIDE,
                (
                    "turned = x.transpose(0, -2) if x.dim() > 2 else x\n"
                    "        routing = self.router(turned.reshape(-1, self.group_size, x.shape[-1]))"
                ),
            )
        ],
        "what was dropped is not chosen any more": [("**fields)", '**fields | {"chosen": fields["kept"]})')],
        "the gradient is cut": [("field.reshape(", "field.detach().reshape(")],
        "rows stay as they are": [(INSIDE, "routing = self.router(x)")],
        "the shape of the groups comes back": [("return replace(routing, **fields)", "return routing")],
        "what does not fill a group is cut off": [
            (TOKENS, "if False:"),
            (
                INSIDE,
                (
                    "whole = x.flatten(0, -2)[: tokens // self.group_size * self.group_size]\n"
                    "        routing = self.router(whole.reshape(-1, self.group_size, x.shape[-1]))\n"
                    "        rest = (0, 0, 0, tokens - len(whole))\n"
                    "        routing = replace(routing, **{n: nn.functional.pad(f.flatten(0, 1), rest) "
                    "for n, f in vars(routing).items()})"
                ),
            ),
        ],
        "a smaller group size is tried instead of an error, as in Flaxformer": [
            (TOKENS, "size = next(s for s in range(self.group_size, 0, -1) if tokens % s == 0)\n        if False:"),
            (INSIDE, INSIDE.replace("self.group_size,", "size,")),
        ],
        "view instead of reshape": [(INSIDE, INSIDE.replace("reshape", "view"))],
        "only kept is brought back into shape": [
            ("return replace(routing, **fields)", 'return replace(routing, kept=fields["kept"])')
        ],
        "no top_k": [(STORE, "self.router, self.group_size = router, group_size")],
        "always two experts": [
            ("self.top_k = router, int(group_size), router.top_k", "self.top_k = router, group_size, 2")
        ],
        "the router is hidden from parameters and eval": [
            (
                STORE,
                ("self.group_size, self.top_k = group_size, router.top_k\n        self.__dict__['router'] = router"),
            )
        ],
        "called twice, once for the shape": [(INSIDE, "self.router(x)\n        " + INSIDE)],
        "any group_size accepted": [("if group_size < 1 or group_size % 1:", "if group_size == 0:")],
    },
    "group_balance_loss": {
        "right: a loop over groups": """
def group_balance_loss(routing):
    S, E = routing.logits.shape[-2:]
    losses = []
    for scores in routing.logits.reshape(-1, S, E):
        counts = torch.bincount(scores.detach().argmax(dim=-1), minlength=E)
        losses.append((counts.to(scores.dtype) @ scores.softmax(dim=-1).sum(dim=0)) * E / S**2)
    return sum(losses) / len(losses)
""",
        "right: one product": """
def group_balance_loss(routing):
    logits = routing.logits
    first = (logits == logits.max(dim=-1, keepdim=True).values).to(logits.dtype)
    P = torch.softmax(logits, -1)
    return (first.mean(-2) * P.mean(-2)).mean() * logits.shape[-1] ** 2
""",
        "f loses the first choices that were dropped, as in st-moe-pytorch": """
def group_balance_loss(routing):
    E = routing.logits.shape[-1]
    mask = F.one_hot(routing.logits.topk(1, dim=-1).indices, E).movedim(-2, 0).float()
    mask_1 = mask[0]
    mask[0] *= routing.kept
    return E * (mask_1.mean(dim=-2) * routing.probs.mean(dim=-2)).sum(dim=-1).mean()
""",
        "all choices count": [(F_LINE, "f = routing.chosen.float().mean(dim=-2)")],
        "all choices count, divided by their number": [
            (F_LINE, "f = routing.chosen.float().mean(dim=-2)\n    f = f / f.sum(dim=-1, keepdim=True)")
        ],
        "first choices by gates, which are 0 after dropping": [("routing.logits.argmax", "routing.gates.argmax")],
        "all groups are pooled": [(LOSS, "return E * (f.reshape(-1, E).mean(0) * P.reshape(-1, E).mean(0)).sum()")],
        "as printed in the paper, divided by E": [(LOSS, "return (f * P).sum(dim=-1).mean() / E")],
        "P from the gates": [("P = routing.probs", "P = routing.gates")],
        "P without a gradient": [("P = routing.probs.mean", "P = routing.probs.detach().mean")],
        "the sum over the groups": [(LOSS, "return E * (f * P).sum()")],
        "needs three dimensions": [(LOSS, "G, E = f.shape\n    return E * (f * P).sum() / G")],
        "softmax by hand": [
            (
                "P = routing.probs.mean",
                ("P = (routing.logits.exp() / routing.logits.exp().sum(dim=-1, keepdim=True)).mean"),
            )
        ],
    },
}
