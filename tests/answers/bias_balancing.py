"Lesson 27. What goes wrong here: the bias in the gates, closed groups that open, counts that leak, sums of one batch."

BIASED = "logits.detach().sigmoid() + (0 if bias is None else bias.detach())"
BEST = "biased.topk(min(2, E // groups), dim=-1).values.sum(dim=-1)"
GATES = "F.logsigmoid(logits).masked_fill(~chosen, -math.inf).softmax(dim=-1)"
COUNT = "        if self.training:\n            self.counts += routing.load\n"
DIRECTION = "(self.counts.float().mean() - self.counts).sign()"
MOVE = "self.bias += self.bias_rate * (direction - direction.mean())"
DRAWN = "scramble(scramble(self.ids.long())[..., None] ^ scramble(experts))"
ADDED = "self.experts(x, routing) + self.shared(x)"

ANSWERS = {
    "sigmoid_gating": {
        "right: token by token over groups, gates by division in float64": """
def sigmoid_gating(logits, k, bias=None, groups=1, groups_kept=1, scale=1.0):
    E = logits.shape[-1]
    if E % groups:
        raise ValueError(f"groups = {groups} do not divide the {E} experts")
    if not 1 <= groups_kept <= groups or groups_kept * (E // groups) < k:
        raise ValueError(f"groups_kept = {groups_kept} of {groups} groups do not hold k = {k} experts")
    s = torch.sigmoid(logits.double())
    with torch.no_grad():
        b = torch.sigmoid(logits) if bias is None else torch.sigmoid(logits) + bias
        pieces = b.chunk(groups, dim=-1)
        worth = torch.stack([piece.sort(dim=-1, descending=True).values[..., :2].sum(-1) for piece in pieces], dim=-1)
        best = worth.argsort(dim=-1, descending=True)[..., :groups_kept]
        is_open = torch.stack([(best == g).any(dim=-1) for g in range(groups)], dim=-1)
        is_open = is_open.repeat_interleave(E // groups, dim=-1)
        order = torch.where(is_open, b, -math.inf).argsort(dim=-1, descending=True)[..., :k]
    chosen = F.one_hot(order, E).sum(dim=-2).bool()
    picked = s * chosen
    gates = picked / picked.sum(dim=-1, keepdim=True) * scale
    return Routing(gates.to(logits.dtype), logits, chosen, chosen.clone())
""",
        "right: a mask that is added, gathered scores": """
def sigmoid_gating(logits, k, bias=None, groups=1, groups_kept=1, scale=1.0):
    require_groups(logits.shape[-1], k, groups, groups_kept)
    size = logits.shape[-1] // groups
    b = logits.sigmoid() if bias is None else logits.sigmoid() + bias
    if groups_kept < groups:
        worth = b.reshape(*b.shape[:-1], groups, size).topk(min(size, 2)).values.sum(-1)
        wall = torch.full_like(worth, float("-inf")).scatter(-1, worth.topk(groups_kept).indices, 0.0)
        b = b + wall.repeat_interleave(size, dim=-1)
    indices = b.topk(k).indices
    shares = torch.softmax(F.logsigmoid(logits.gather(-1, indices)), dim=-1)
    gates = torch.zeros_like(logits).scatter(-1, indices, (scale * shares).to(logits.dtype))
    chosen = torch.zeros(logits.shape, dtype=torch.bool).scatter(-1, indices, True)
    return Routing(gates, logits, chosen, chosen)
""",
        "the bias ends up in the gates (transformers #41647)": [
            (GATES, "(biased.clamp(min=1e-9) * chosen / (biased.clamp(min=1e-9) * chosen).sum(dim=-1, keepdim=True))")
        ],
        "chosen without the bias, which is in the gates (LightLM)": [
            (BIASED, "logits.detach().sigmoid()"),
            ("F.logsigmoid(logits)", "F.logsigmoid(logits + (0 if bias is None else bias))"),
        ],
        "the bias added before the sigmoid (lossfreebalance #2)": [
            (BIASED, "(logits.detach() + (0 if bias is None else bias.detach())).sigmoid()")
        ],
        "closed groups filled with 0 (transformers #45440)": [
            ("closed[..., None], -math.inf", "closed[..., None], 0.0")
        ],
        "nothing refused": [("    require_groups(E, k, groups, groups_kept)\n", "")],
        "a group as good as its best expert": [("min(2, E // groups)", "1")],
        "the second dimension for the last one": [(".softmax(dim=-1)", ".softmax(dim=1)")],
        "two best asked of groups of one": [("min(2, E // groups)", "2 if groups_kept < groups else 1")],
        "groups judged without the bias": [
            (BEST, BEST.replace("biased", "logits.sigmoid().unflatten(-1, (groups, E // groups))"))
        ],
        "groups interleaved": [
            (
                "biased = biased.unflatten(-1, (groups, E // groups))",
                "biased = biased.unflatten(-1, (E // groups, groups)).mT",
            ),
        ],
        "scale lost: it cancels": [
            (
                GATES,
                "(logits.sigmoid() * chosen / (logits.sigmoid() * chosen).sum(dim=-1, keepdim=True) / scale)",
            )
        ],
        "s / sum of s, which is 0 / 0 for small scores": [
            (GATES, "(logits.sigmoid() * chosen / (logits.sigmoid() * chosen).sum(dim=-1, keepdim=True))")
        ],
        "a softmax over the chosen logits": [("F.logsigmoid(logits)", "logits")],
        "gradient cut": [("F.logsigmoid(logits)", "F.logsigmoid(logits.detach())")],
        "all that reach the k-th best": [
            (
                "torch.zeros_like(logits, dtype=torch.bool).scatter(-1, indices, True)",
                "biased >= biased.topk(k, dim=-1).values[..., -1:]",
            )
        ],
    },
    "bias_balanced_router": {
        "right: counted with bincount, moved without sign()": [
            (
                COUNT,
                """        if self.training:
            self.counts += routing.chosen.reshape(-1, routing.chosen.shape[-1]).nonzero()[:, 1].bincount(
                minlength=len(self.counts))
""",
            ),
            (
                DIRECTION,
                "1.0 * (self.counts * len(self.counts) < self.counts.sum())"
                " - 1.0 * (self.counts * len(self.counts) > self.counts.sum())",
            ),
        ],
        "right: a new tensor in place of the old one": [
            (MOVE, "step = self.bias_rate * direction\n        self.bias = self.bias + step - step.mean()"),
            ("self.counts.zero_()", "self.counts = torch.zeros_like(self.counts)"),
            ("self.counts += routing.load", "self.counts = self.counts + routing.load.detach()"),
        ],
        "moved the wrong way": [("self.bias +=", "self.bias -=")],
        "not centred": [(" - direction.mean())", ")")],
        "moved by the error, not by its sign": [(".sign()", " / self.counts.float().mean().clamp(min=1)")],
        "a rate of its own": [("self.bias_rate * (", "0.001 * (")],
        "moved in the forward pass": [
            ("self.counts += routing.load", "self.counts += routing.load\n            self.after_step()")
        ],
        "counts of the last batch only": [("self.counts += routing.load", "self.counts.copy_(routing.load)")],
        "counts never cleared": [("        self.counts.zero_()\n", "")],
        "evaluation is counted as well": [(COUNT, "        self.counts += routing.load\n")],
        "probabilities counted": [
            (
                COUNT,
                "        if self.training:\n"
                "            self.counts += (10 * routing.probs.detach()).flatten(0, -2).sum(dim=0).long()\n",
            )
        ],
        "cleared in evaluation, where nothing is counted": [
            ("        return routing", "        else:\n            self.counts.zero_()\n        return routing")
        ],
        "the first dimension only": [
            ("routing.load", "routing.chosen.sum(dim=0)" + ".reshape(-1, len(self.counts))[0]")
        ],
        "settings not handed on": [(", **self.settings", "")],
        "the bias not handed on": [("self.bias.float()", "None")],
        "autocast left on": [
            (
                "torch.autocast(x.device.type, enabled=False)",
                "torch.autocast(x.device.type, enabled=torch.is_autocast_enabled(x.device.type))",
            )
        ],
        "gradient cut at the tokens": [("F.linear(x.float()", "F.linear(x.detach().float()")],
    },
    "shared_experts": {
        "right: the other way round": [(ADDED, "torch.add(self.shared(x), self.experts(x, routing))")],
        "right: in two lines": [("return " + ADDED, "y = self.shared(x)\n        return y + self.experts(x, routing)")],
        "the mean of both": [(ADDED, f"({ADDED}) / 2")],
        "the shared expert alone": [(ADDED, "self.shared(x)")],
        "the routed experts alone": [(ADDED, "self.experts(x, routing)")],
        "shared after routed": [(ADDED, "self.shared(self.experts(x, routing))")],
        "weighed by what the gates leave over": [
            (ADDED, "self.experts(x, routing) + (1 - routing.gates.sum(dim=-1, keepdim=True)) * self.shared(x)")
        ],
        "the shared answer only where something is kept": [
            (ADDED, "self.experts(x, routing) + routing.kept.any(dim=-1, keepdim=True) * self.shared(x)")
        ],
        "the shared expert does not learn": [(ADDED, "self.experts(x, routing) + self.shared(x).detach()")],
        "the residual added as well": [(ADDED, f"x + {ADDED}")],
        "shared only in training": [(ADDED, "self.experts(x, routing) + (self.shared(x) if self.training else 0)")],
    },
    "hash_router": {
        "right: a generator for each id": [
            (
                "drawn = " + DRAWN,
                """drawn = torch.zeros(*self.ids.shape, self.num_experts)
        for i in self.ids.unique().tolist():
            generator = torch.Generator().manual_seed((i * 1_000_003 + self.seed * 7_368_787) % 2**62)
            drawn[self.ids == i] = torch.rand(self.num_experts, generator=generator)
""",
            )
        ],
        "right: another mixing of the same kind, sorted": [
            (DRAWN, "scramble(scramble(self.ids.long() + 977 * self.seed)[..., None] + scramble(experts + 5))"),
            ("drawn.topk(self.top_k).indices", "drawn.argsort(dim=-1)[..., : self.top_k]"),
        ],
        "the id modulo E, then its neighbours": [
            (DRAWN, "-(experts - self.num_experts * self.seed - self.ids[..., None]).remainder(self.num_experts)")
        ],
        "without the seed": [("self.num_experts * self.seed", "0")],
        "the seed only renames the experts: ids that share theirs always do": [
            ("+ self.num_experts * self.seed", ""),
            ("drawn = " + DRAWN, "drawn = " + DRAWN + "\n        drawn = drawn.roll(self.seed, dims=-1)"),
        ],
        "a random table of 64 ids": [
            (
                DRAWN,
                "torch.rand(64, self.num_experts, generator=torch.Generator().manual_seed(self.seed))[self.ids % 64]",
            )
        ],
        "drawn anew each time": [(DRAWN, "torch.rand(*self.ids.shape, self.num_experts)")],
        "hashed with the place": [
            (
                "scramble(self.ids.long())",
                "scramble(self.ids.long() + torch.arange(self.ids.shape[-1], device=x.device))",
            )
        ],
        "hashed with the vector of the token": [
            ("scramble(self.ids.long())", "scramble(self.ids.long() + (100 * x.float().sum(dim=-1)).long())")
        ],
        "gates of 1": [("chosen / self.top_k", "chosen.float()")],
        "gates like x": [("chosen / self.top_k", "(chosen / self.top_k).to(x.dtype)")],
        "two experts that may be the same": [
            (
                "drawn.topk(self.top_k).indices",
                "torch.stack([scramble(self.ids.long() + 99991 * (i + self.seed)) % self.num_experts\n"
                "                                      for i in range(self.top_k)], dim=-1)",
            )
        ],
        "the hash as logits": [
            ("return Routing(chosen / self.top_k, logits", "return Routing(chosen / self.top_k, drawn / 2**32")
        ],
        "no look at the ids' shape": [("if given != needed", "if given is None")],
        "plays with the global random numbers": [
            ("drawn = " + DRAWN, "torch.manual_seed(self.seed)\n        drawn = " + DRAWN)
        ],
        "the second expert always after the first": [
            (
                "drawn.topk(self.top_k).indices",
                "(drawn.topk(1).indices + torch.arange(self.top_k, device=x.device)) % self.num_experts",
            )
        ],
    },
}
