"Lesson 04. What goes wrong here: the softmax before the choice, ties, the batch in front, masks read off the weights."

RECORD = """
@dataclass(frozen=True)
class Routing:
    gates: torch.Tensor
    logits: torch.Tensor
    chosen: torch.Tensor
    kept: torch.Tensor

    @property
    def probs(self):
        return self.logits.softmax(dim=-1)

    @property
    def load(self):
        {load}

    @property
    def dropped(self):
        {dropped}

    @property
    def confidence(self):
        return self.probs.amax(dim=-1).mean()

    @property
    def entropy(self):
        {entropy}
"""

LOAD = "self.kept.reshape(-1, self.kept.shape[-1]).sum(dim=0)"
DROPPED = "lost.sum() / self.chosen.sum().clamp(min=1)"
ENTROPY = "-(log_probs.exp() * log_probs).sum(dim=-1).mean()"

INDICES = "logits.topk(k, dim=-1).indices"
CHOSEN = "torch.zeros_like(logits, dtype=torch.bool).scatter(-1, indices, True)"
GATES = "logits.masked_fill(~chosen, -math.inf).softmax(dim=-1)"
RETURN = "return Routing(gates, logits, chosen, kept=chosen)"

ROUTER = """
class TopkRouter(nn.Module):
    def __init__(self, n_embd, num_experts, top_k):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}, but must lie between 1 and num_experts = {num_experts}")
        self.linear = nn.Linear(n_embd, num_experts)
        self.top_k = top_k
"""

SCORE = "F.linear(x.float(), self.linear.weight.float(), self.linear.bias.float())"
CALL = "return top_k_gating(logits, self.top_k)"
GUARD = "with torch.autocast(x.device.type, enabled=False):"

SWITCH_GATES = "logits.softmax(dim=-1) * routing.chosen"
SWITCH_RETURN = "return Routing(gates, logits, routing.chosen, routing.kept)"

NEEDED = "needed = probs.cumsum(dim=-1) - probs < p"
PLACED = "torch.zeros_like(needed).scatter(-1, order, needed)"
SHARED = "logits.masked_fill(~chosen, -math.inf).softmax(dim=-1)"

ANSWERS = {
    "routing": {
        "right: einsum, the share of the kept, torch.distributions": RECORD.format(
            load='return torch.einsum("...e->e", self.kept.long())',
            dropped="return 1 - self.kept.sum() / self.chosen.sum() if self.chosen.any() else 0.0",
            entropy="return torch.distributions.Categorical(logits=self.logits).entropy().mean()",
        ),
        "right: nonzero and bincount, mean of the products": RECORD.format(
            load="return self.kept.nonzero()[:, -1].bincount(minlength=self.kept.shape[-1])",
            dropped="return torch.nan_to_num((self.chosen.sum() - self.kept.sum()) / self.chosen.sum())",
            entropy="return torch.special.entr(self.probs).mean() * self.probs.shape[-1]",
        ),
        "load: from chosen instead of kept": [("self.kept.reshape(", "self.chosen.reshape(")],
        "load: only of those that weigh something": [
            (LOAD, "(self.kept & (self.gates > 0)).reshape(-1, self.kept.shape[-1]).sum(dim=0)")
        ],
        "load: sum over the first dimension only, wrong for (B, T, E)": [(LOAD, "self.kept.sum(dim=0)")],
        "load: idle experts at the end are missing": [(LOAD, "self.kept.nonzero()[:, -1].bincount()")],
        "load: counted in 8 bits": [
            (LOAD, "self.kept.to(torch.uint8).reshape(-1, self.kept.shape[-1]).sum(dim=0, dtype=torch.uint8)")
        ],
        "load: fails for a single token": [(LOAD, "self.kept.flatten(0, -2).sum(dim=0)")],
        "dropped: of all places instead of the choices": [(DROPPED, "lost.float().mean()")],
        "dropped: averaged token by token": [(DROPPED, "(1 - self.kept.sum(dim=-1) / self.chosen.sum(dim=-1)).mean()")],
        "dropped: nobody chosen is not a number": [(DROPPED, "lost.sum() / self.chosen.sum()")],
        "dropped: nobody chosen counts as all dropped": [
            (DROPPED, "1 - self.kept.sum() / self.chosen.sum().clamp(min=1)")
        ],
        "entropy: 0 * log(0) is not a number": [(ENTROPY, "-(self.probs * self.probs.log()).sum(dim=-1).mean()")],
        "entropy: in bits": [(ENTROPY, ENTROPY + " / math.log(2)")],
        "entropy: averaged over experts, too": [(ENTROPY, "-(log_probs.exp() * log_probs).mean()")],
        "entropy: one per sequence for (B, T, E)": [(ENTROPY, ENTROPY.replace("mean()", "mean(dim=-1)"))],
        "entropy: of the average probabilities": [
            (ENTROPY, "torch.special.entr(self.probs.reshape(-1, self.probs.shape[-1]).mean(dim=0)).sum()"),
        ],
    },
    "top_k_gating": {
        "right: softmax over the k values, then scattered": """
def top_k_gating(logits, k):
    values, indices = torch.topk(logits, k)
    gates = torch.zeros_like(logits)
    gates.scatter_(-1, indices, nn.functional.softmax(values, dim=-1))
    chosen = nn.functional.one_hot(indices, logits.shape[-1]).sum(dim=-2).bool()
    return Routing(gates=gates, logits=logits, chosen=chosen, kept=chosen.clone())
""",
        "right: ranks by sorting twice": [
            (INDICES, "logits.argsort(dim=-1, descending=True).argsort(dim=-1)"),
            (CHOSEN, "indices < k"),
        ],
        "right: a loop over tokens": """
def top_k_gating(logits, k):
    rows = logits.reshape(-1, logits.shape[-1])
    gates = torch.zeros_like(rows)
    chosen = torch.zeros_like(rows, dtype=torch.bool)
    for t in range(len(rows)):
        best = sorted(range(rows.shape[1]), key=lambda e: -rows[t, e].item())[:k]
        gates[t, best] = rows[t, best].softmax(dim=0)
        chosen[t, best] = True
    gates, chosen = gates.reshape(logits.shape), chosen.reshape(logits.shape)
    return Routing(gates, logits, chosen, chosen)
""",
        "softmax before the choice, not renormalised": [(GATES, "logits.softmax(dim=-1) * chosen")],
        "a threshold lets ties in": [(CHOSEN, "logits >= logits.topk(k, dim=-1).values[..., -1:]")],
        "softmax over dim 1, wrong for (B, T, E)": [(GATES, GATES.replace("dim=-1", "dim=1"))],
        "masked with 0 instead of minus infinity": [(GATES, GATES.replace("-math.inf", "0.0"))],
        "sorted once: places taken for ranks": [(CHOSEN, "logits.argsort(dim=-1, descending=True) < k")],
        "the exponential of what is left of the largest logit of all tokens": [
            (GATES, "(logits - logits.max()).exp() * chosen"),
            (RETURN, "gates = gates / gates.sum(dim=-1, keepdim=True)\n    " + RETURN),
        ],
        "ties broken by a little noise": [
            (INDICES, "(logits + 1e-6 * torch.randn_like(logits)).topk(k, dim=-1).indices")
        ],
        "chosen read off the weights: one too few when a weight is rounded to 0": [
            (RETURN, "return Routing(gates, logits, gates > 0, kept=gates > 0)")
        ],
        "masks of ones and zeros, not bool": [
            (RETURN, "return Routing(gates, logits, chosen.float(), kept=chosen.float())")
        ],
        "the caller's logits are overwritten": [
            (GATES, "logits.data.masked_fill_(~chosen, -math.inf).softmax(dim=-1)")
        ],
        "the record's logits are cut off from the gradient": [
            (RETURN, "return Routing(gates, logits.detach(), chosen, kept=chosen)")
        ],
        "the sum that renormalises cut off from the gradient": [
            (GATES, "logits.softmax(dim=-1) * chosen"),
            (RETURN, "gates = gates / gates.sum(dim=-1, keepdim=True).detach()\n    " + RETURN),
        ],
        "always float32, whatever the logits are": [(GATES, GATES.replace("logits.masked", "logits.float().masked"))],
        "the batch dimension squeezed away when it is 1": [(CHOSEN, CHOSEN + ".squeeze()")],
        "on the CPU, wherever the logits are": [
            (CHOSEN, "torch.zeros(logits.shape, dtype=torch.bool).scatter(-1, indices, True)")
        ],
    },
    "topk_router": {
        "right: a sum of products, which autocast leaves alone": ROUTER
        + """
    def forward(self, x):
        logits = (x.float()[..., None, :] * self.linear.weight.float()).sum(dim=-1) + self.linear.bias.float()
        return top_k_gating(logits, self.top_k)
""",
        "right: token by token": ROUTER
        + """
    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        weight, bias = (parameter.to(torch.float32) for parameter in (self.linear.weight, self.linear.bias))
        tokens = x.to(torch.float32).reshape(-1, x.shape[-1])
        scores = torch.stack([torch.mv(weight, token) + bias for token in tokens])
        return top_k_gating(scores.reshape(*x.shape[:-1], -1), k=self.top_k)
""",
        "autocast left on": [(GUARD, "if True:")],
        "autocast switched off for everybody from here on": [
            (GUARD, "torch.set_autocast_enabled(x.device.type, False)\n        if True:")
        ],
        "float32 for x only: a model in bfloat16 cannot be called": [(SCORE, "self.linear(x.float())")],
        "the layer itself turned into float32": [(SCORE, "self.linear.float()(x.float())")],
        "in the type of the weights, float32 only afterwards": [
            (SCORE, "self.linear(x.to(self.linear.weight.dtype)).float()")
        ],
        "large logits clipped at 10": [(SCORE, SCORE + ".clamp(-10, 10)")],
        "always two experts": [(CALL, "return top_k_gating(logits, 2)")],
        "the bias forgotten": [(SCORE, "x.float() @ self.linear.weight.float().T")],
        "a new layer in every call": [(SCORE, "nn.Linear(x.shape[-1], self.linear.out_features)(x.float())")],
        "no gradient to the layer": [
            (SCORE, "F.linear(x.float(), self.linear.weight.data.float(), self.linear.bias.data.float())")
        ],
        "no gradient in evaluation": [
            (CALL, "logits = logits if self.training else logits.detach()\n            " + CALL)
        ],
        "noise while it trains": [
            (CALL, "logits = logits + 0.01 * torch.randn_like(logits) * self.training\n            " + CALL)
        ],
        "a single token loses its leading shape": [(SCORE, SCORE + ".squeeze()")],
        "the scores kept in a buffer": [(CALL, "self.register_buffer('scores', logits.detach())\n            " + CALL)],
    },
    "switch_gating": {
        "right: the winner scattered": """
def switch_gating(logits):
    probs = torch.softmax(logits, dim=-1)
    value, winner = probs.max(dim=-1, keepdim=True)
    gates = torch.zeros_like(probs).scatter(-1, winner, value)
    chosen = torch.zeros_like(probs).scatter(-1, winner, 1).bool()
    return Routing(gates, logits, chosen, chosen)
""",
        "right: one-hot and exp of the log-probability": """
def switch_gating(logits):
    chosen = nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).bool()
    gates = torch.where(chosen, logits.log_softmax(dim=-1).exp(), 0.0)
    return Routing(gates, logits, chosen, kept=chosen)
""",
        "the gate is always 1": [(SWITCH_GATES, "routing.gates")],
        "the gate is 1, the gradient that of the probability": [
            (SWITCH_GATES, "(1 + logits.softmax(dim=-1) - logits.softmax(dim=-1).detach()) * routing.chosen"),
        ],
        "every expert keeps its probability": [(SWITCH_GATES, "logits.softmax(dim=-1)")],
        "the losers without a gradient": [
            (SWITCH_GATES, "logits.exp() / logits.exp().sum(dim=-1, keepdim=True).detach() * routing.chosen"),
        ],
        "exp by hand": [(SWITCH_GATES, "logits.exp() / logits.exp().sum(dim=-1, keepdim=True) * routing.chosen")],
        "several winners when logits are equal": """
def switch_gating(logits):
    probs = logits.softmax(dim=-1)
    chosen = probs == probs.amax(dim=-1, keepdim=True)
    return Routing(probs * chosen, logits, chosen, chosen)
""",
        "one_hot without the number of experts": """
def switch_gating(logits):
    chosen = torch.nn.functional.one_hot(logits.argmax(dim=-1)).bool()
    return Routing(logits.softmax(dim=-1) * chosen, logits, chosen, kept=chosen)
""",
        "the winner drawn by chance": """
def switch_gating(logits):
    probs = logits.softmax(dim=-1)
    winner = torch.distributions.Categorical(probs).sample()
    chosen = nn.functional.one_hot(winner, logits.shape[-1]).bool()
    return Routing(probs * chosen, logits, chosen, chosen)
""",
        "the record gets log-probabilities as logits": [
            (SWITCH_RETURN, SWITCH_RETURN.replace("logits", "logits.log_softmax(dim=-1)"))
        ],
        "masks of ones and zeros, not bool": [
            (
                SWITCH_RETURN,
                SWITCH_RETURN.replace("routing.chosen, routing.kept", "routing.chosen.float(), routing.kept.float()"),
            )
        ],
        "softmax over the tokens": [(SWITCH_GATES, "logits.softmax(dim=-2) * routing.chosen")],
    },
    "top_p_gating": {
        "right: the best one taken again and again": """
def top_p_gating(logits, p):
    probs = logits.softmax(dim=-1)
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    for _ in range(logits.shape[-1]):
        short = (probs * chosen).sum(dim=-1, keepdim=True) < p
        best = probs.masked_fill(chosen, -1).argmax(dim=-1, keepdim=True)
        chosen = chosen | torch.zeros_like(chosen).scatter(-1, best, True) & short
    gates = probs * chosen / (probs * chosen).sum(dim=-1, keepdim=True)
    return Routing(gates, logits, chosen, chosen)
""",
        "right: how many are needed, then their ranks": """
def top_p_gating(logits, p):
    order = logits.argsort(dim=-1, descending=True)
    sums = logits.softmax(dim=-1).gather(-1, order).cumsum(dim=-1)
    count = (sums < p).sum(dim=-1, keepdim=True) + 1
    chosen = order.argsort(dim=-1) < count
    gates = torch.where(chosen, logits, -torch.inf).softmax(dim=-1)
    return Routing(gates, logits, chosen, chosen.clone())
""",
        "only the best is safe, the one that crosses p is left out": [
            (NEEDED, "needed = probs.cumsum(dim=-1) <= p\n    needed[..., 0] = True")
        ],
        "one too many when p is reached exactly": [(NEEDED, NEEDED.replace("<", "<="))],
        "not put back in the order of the experts": [(PLACED, "needed")],
        "put back with gather instead of scatter": [(PLACED, "needed.gather(-1, order)")],
        "every expert above p": [(PLACED, "logits.softmax(dim=-1) > p")],
        "as many for every token as the most demanding needs": [
            (
                PLACED,
                PLACED.replace("order, needed", "order, needed | needed.reshape(-1, needed.shape[-1]).any(dim=0)"),
            ),
        ],
        "added up over the tokens": [(NEEDED, NEEDED.replace("dim=-1", "dim=0"))],
        "weights not renormalised": [(SHARED, "logits.softmax(dim=-1) * chosen")],
        "the sum that renormalises cut off from the gradient": [
            (SHARED, "logits.softmax(dim=-1) * chosen\n    gates = gates / gates.sum(dim=-1, keepdim=True).detach()"),
        ],
        "the record gets masked logits": [("gates, logits,", "gates, logits.masked_fill(~chosen, -math.inf),")],
        "the record's logits without a gradient": [("gates, logits,", "gates, logits.detach(),")],
        "the first place that reaches p by argmax: if rounding stays below 1, only the best": """
def top_p_gating(logits, p):
    probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    last = (probs.cumsum(dim=-1) >= p).float().argmax(dim=-1, keepdim=True)
    needed = torch.arange(logits.shape[-1], device=logits.device) <= last
    chosen = torch.zeros_like(needed).scatter(-1, order, needed)
    gates = logits.masked_fill(~chosen, -math.inf).softmax(dim=-1)
    return Routing(gates, logits, chosen, kept=chosen)
""",
        "the place that reaches p looked up: off the end where rounding stays below 1": """
def top_p_gating(logits, p):
    probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    sums = probs.cumsum(dim=-1)
    n = (sums < p).sum(dim=-1, keepdim=True)
    limit = sums.gather(-1, n)
    needed = sums <= limit
    chosen = torch.zeros_like(needed).scatter(-1, order, needed)
    return Routing(logits.masked_fill(~chosen, -math.inf).softmax(dim=-1), logits, chosen, kept=chosen)
""",
    },
}
