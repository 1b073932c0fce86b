"Lesson 04. What goes wrong here: the softmax before the choice, ties, the batch in front, masks read off the weights."

RECORD = '''
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
'''

LOAD = "self.kept.reshape(-1, self.kept.shape[-1]).sum(dim=0)"
DROPPED = "1 - self.kept.sum() / self.chosen.sum()"
ENTROPY = "-(log_probs.exp() * log_probs).sum(dim=-1).mean()"

INDICES = "logits.topk(k, dim=-1).indices"
CHOSEN = "torch.zeros_like(logits, dtype=torch.bool).scatter(-1, indices, True)"
GATES = "logits.masked_fill(~chosen, -math.inf).softmax(dim=-1)"
RETURN = "return Routing(gates, logits, chosen, kept=chosen)"

ROUTER = '''
class TopkRouter(nn.Module):
    def __init__(self, n_embd, num_experts, top_k):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}, but must lie between 1 and num_experts = {num_experts}")
        self.linear = nn.Linear(n_embd, num_experts)
        self.top_k = top_k
'''

SCORE = "self.linear(x.float())"
CALL = "return top_k_gating(logits, self.top_k)"
GUARD = "with torch.autocast(x.device.type, enabled=False):"

SWITCH_GATES = "logits.softmax(dim=-1) * routing.chosen"
SWITCH_RETURN = "return Routing(gates, logits, routing.chosen, routing.kept)"

NEEDED = "needed = probs.cumsum(dim=-1) - probs < p"
PLACED = "torch.zeros_like(needed).scatter(-1, order, needed)"

ANSWERS = {
    "gating-routing": {
        "right: einsum, the dropped ones counted, torch.distributions": RECORD.format(
            load='return torch.einsum("...e->e", self.kept.long())',
            dropped="return (self.chosen & ~self.kept).sum() / self.chosen.sum()",
            entropy="return torch.distributions.Categorical(logits=self.logits).entropy().mean()",
        ),
        "right: nonzero and bincount, mean of the products": RECORD.format(
            load="return self.kept.nonzero()[:, -1].bincount(minlength=self.kept.shape[-1])",
            dropped="return (self.chosen.sum() - self.kept.sum()) / self.chosen.sum()",
            entropy="return torch.special.entr(self.probs).mean() * self.probs.shape[-1]",
        ),
        "load: from chosen instead of kept": [("self.kept.reshape(", "self.chosen.reshape(")],
        "load: from the weights instead of the mask": [(LOAD, "(self.gates > 0).reshape(-1, self.gates.shape[-1]).sum(dim=0)")],
        "load: the weights added up": [(LOAD, "self.gates.reshape(-1, self.gates.shape[-1]).sum(dim=0)")],
        "load: sum over the first dimension only, wrong for (B, T, E)": [(LOAD, "self.kept.sum(dim=0)")],
        "load: experts per token instead of tokens per expert": [(LOAD, "self.kept.sum(dim=-1)")],
        "load: idle experts at the end are missing": [(LOAD, "self.kept.nonzero()[:, -1].bincount()")],
        "load: for four experts only": [(LOAD, "self.kept.reshape(-1, 4).sum(dim=0)")],
        "load: a float, not a count": [(LOAD, LOAD.replace("self.kept", "self.kept.float()", 1))],
        "load: only of those that weigh something": [(LOAD, "(self.kept & (self.gates > 0)).reshape(-1, self.kept.shape[-1]).sum(dim=0)")],
        "load: counted in 8 bits": [(LOAD, "self.kept.to(torch.uint8).reshape(-1, self.kept.shape[-1]).sum(dim=0, dtype=torch.uint8)")],
        "load: three dimensions at most": [(LOAD, "self.kept.sum(dim=tuple(range(min(self.kept.dim() - 1, 2))))")],
        "dropped: the share that is kept": [(DROPPED, "self.kept.sum() / self.chosen.sum()")],
        "dropped: of all places instead of the choices": [(DROPPED, "(self.chosen & ~self.kept).float().mean()")],
        "dropped: a number of choices, not a share": [(DROPPED, "(self.chosen & ~self.kept).sum()")],
        "dropped: share of the tokens that lost something": [(DROPPED, "(self.chosen & ~self.kept).any(dim=-1).float().mean()")],
        "dropped: averaged token by token": [(DROPPED, "(1 - self.kept.sum(dim=-1) / self.chosen.sum(dim=-1)).mean()")],
        "dropped: averaged expert by expert": [(DROPPED, "(1 - self.kept.flatten(0, -2).sum(dim=0) / self.chosen.flatten(0, -2).sum(dim=0).clamp(min=1)).mean()")],
        "dropped: reads the lesson's global chosen": [(DROPPED, "1 - self.kept.sum() / chosen.sum()")],
        "entropy: 0 * log(0) is not a number": [(ENTROPY, "-(self.probs * self.probs.log()).sum(dim=-1).mean()")],
        "entropy: probabilities below 0.001 raised to it": [
            (ENTROPY, "-(self.probs * self.probs.clamp_min(1e-3).log()).sum(dim=-1).mean()"),
        ],
        "entropy: in bits": [(ENTROPY, ENTROPY + " / math.log(2)")],
        "entropy: the sign forgotten": [(ENTROPY, ENTROPY[1:])],
        "entropy: summed over the tokens": [(ENTROPY, ENTROPY.replace("mean", "sum"))],
        "entropy: averaged over experts, too": [(ENTROPY, "-(log_probs.exp() * log_probs).mean()")],
        "entropy: as if there were always four experts": [(ENTROPY, ENTROPY + " / math.log(self.logits.shape[-1]) * math.log(4)")],
        "entropy: divided by B and T, whatever else there is": [
            (ENTROPY, "-(log_probs.exp() * log_probs).sum() / math.prod(log_probs.shape[:min(2, log_probs.dim() - 1)])"),
        ],
        "entropy: one per sequence for (B, T, E)": [(ENTROPY, ENTROPY.replace("mean()", "mean(dim=-1)"))],
        "entropy: of the average probabilities": [
            (ENTROPY, "torch.special.entr(self.probs.reshape(-1, self.probs.shape[-1]).mean(dim=0)).sum()"),
        ],
        "entropy: of the gates": [(ENTROPY, "torch.special.entr(self.gates).sum(dim=-1).mean()")],
        "entropy: reads the lesson's global probs": [(ENTROPY, "torch.special.entr(probs).sum(dim=-1).mean()")],
    },
    "gating-top-k": {
        "right: values scattered into minus infinity": '''
def top_k_gating(logits, k):
    values, indices = logits.topk(k, dim=-1)
    sparse = torch.full_like(logits, float("-inf")).scatter(-1, indices, values)
    chosen = torch.zeros_like(logits).scatter(-1, indices, 1).bool()
    return Routing(sparse.softmax(dim=-1), logits, chosen, chosen.clone())
''',
        "right: softmax over the k values, then scattered": '''
def top_k_gating(logits, k):
    values, indices = torch.topk(logits, k)
    gates = torch.zeros_like(logits)
    gates.scatter_(-1, indices, nn.functional.softmax(values, dim=-1))
    chosen = nn.functional.one_hot(indices, logits.shape[-1]).sum(dim=-2).bool()
    return Routing(gates=gates, logits=logits, chosen=chosen, kept=chosen)
''',
        "right: softmax over all, divided by the sum of the chosen": '''
def top_k_gating(logits, k):
    probs = logits.softmax(dim=-1)
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(k).indices, True)
    gates = probs * chosen
    return Routing(gates / gates.sum(dim=-1, keepdim=True), logits, chosen, chosen)
''',
        "right: ranks by sorting twice": [
            (INDICES, "logits.argsort(dim=-1, descending=True).argsort(dim=-1)"),
            (CHOSEN, "indices < k"),
        ],
        "right: one-hot and einsum": '''
def top_k_gating(logits, k):
    values, indices = logits.topk(k)
    spread = nn.functional.one_hot(indices, logits.shape[-1]).to(logits.dtype)  # (..., k, E)
    gates = torch.einsum("...k,...ke->...e", values.softmax(dim=-1), spread)
    chosen = spread.sum(dim=-2) > 0
    return Routing(gates, logits, chosen, chosen)
''',
        "right: a loop over tokens": '''
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
''',
        "softmax before the choice, not renormalised": [(GATES, "logits.softmax(dim=-1) * chosen")],
        "a threshold lets ties in": [(CHOSEN, "logits >= logits.topk(k, dim=-1).values[..., -1:]")],
        "weights left as (..., k)": [(GATES, "logits.topk(k, dim=-1).values.softmax(dim=-1)")],
        "softmax over dim 1, wrong for (B, T, E)": [(GATES, GATES.replace("dim=-1", "dim=1"))],
        "masked with 0 instead of minus infinity": [(GATES, GATES.replace("-math.inf", "0.0"))],
        "masked with -100": [(GATES, GATES.replace("-math.inf", "-100.0"))],
        "logits times mask": [(GATES, "(logits * chosen).softmax(dim=-1)")],
        "equal weights for the chosen": [(GATES, "chosen / chosen.sum(dim=-1, keepdim=True)")],
        "logits divided by their sum instead of a softmax": [
            (GATES, "logits * chosen / (logits * chosen).sum(dim=-1, keepdim=True)"),
        ],
        "a sigmoid for each": [(GATES, "logits.sigmoid() * chosen / (logits.sigmoid() * chosen).sum(dim=-1, keepdim=True)")],
        "sorted once: places taken for ranks": [(CHOSEN, "logits.argsort(dim=-1, descending=True) < k")],
        "chosen by probability, where two that are rounded to 0 tie": [(INDICES, "logits.softmax(dim=-1).topk(k, dim=-1).indices")],
        "the exponential of what is left of the largest logit of all tokens": [
            (GATES, "(logits - logits.max()).exp() * chosen"),
            (RETURN, "gates = gates / gates.sum(dim=-1, keepdim=True)\n    " + RETURN),
        ],
        "always two experts": [("logits.topk(k, dim=-1)", "logits.topk(2, dim=-1)")],
        "the smallest logits": [(INDICES, "logits.topk(k, dim=-1, largest=False).indices")],
        "drawn by chance instead of chosen": [
            (INDICES, "torch.multinomial(logits.detach().softmax(dim=-1).reshape(-1, logits.shape[-1]), k).view(*logits.shape[:-1], k)"),
        ],
        "chosen read off the weights: one too few when a weight is rounded to 0": [
            ("return Routing(gates, logits, chosen, kept=chosen)", "return Routing(gates, logits, gates > 0, kept=gates > 0)"),
        ],
        "ties broken by a little noise": [(INDICES, "(logits + 1e-6 * torch.randn_like(logits)).topk(k, dim=-1).indices")],
        "the batch dimension squeezed away when it is 1": [(CHOSEN, CHOSEN + ".squeeze()")],
        "masks of ones and zeros, not bool": [(RETURN, "return Routing(gates, logits, chosen.float(), kept=chosen.float())")],
        "kept read off the weights": [(RETURN, "return Routing(gates, logits, chosen, kept=gates > 0)")],
        "kept: everyone": [(RETURN, "return Routing(gates, logits, chosen, kept=torch.ones_like(chosen))")],
        "kept: nobody": [(RETURN, "return Routing(gates, logits, chosen, kept=torch.zeros_like(chosen))")],
        "the caller's logits are overwritten": [(GATES, "logits.masked_fill_(~chosen, -math.inf).softmax(dim=-1)")],
        "the record gets masked logits": [(GATES, "(logits := logits.masked_fill(~chosen, -math.inf)).softmax(dim=-1)")],
        "the record gets probabilities": [(RETURN, "return Routing(gates, logits.softmax(dim=-1), chosen, kept=chosen)")],
        "the record's logits are cut off from the gradient": [(RETURN, "return Routing(gates, logits.detach(), chosen, kept=chosen)")],
        "the gates are cut off from the gradient": [(RETURN, "return Routing(gates.detach(), logits, chosen, kept=chosen)")],
        "Switch: k = 1 keeps its probability": [
            (RETURN, "gates = logits.softmax(dim=-1) * chosen if k == 1 else gates\n    " + RETURN),
        ],
        "always float32, whatever the logits are": [(GATES, GATES.replace("logits.masked", "logits.float().masked"))],
    },
    "gating-router": {
        "right: a sum of products, which autocast leaves alone": ROUTER + '''
    def forward(self, x):
        logits = (x.float()[..., None, :] * self.linear.weight).sum(dim=-1) + self.linear.bias
        return top_k_gating(logits, self.top_k)
''',
        "right: token by token": ROUTER + '''
    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        tokens = x.to(torch.float32).reshape(-1, x.shape[-1])
        scores = torch.stack([torch.mv(self.linear.weight, token) + self.linear.bias for token in tokens])
        return top_k_gating(scores.reshape(*x.shape[:-1], -1), k=self.top_k)
''',
        "autocast left on": [(GUARD, "if True:")],
        "autocast off for cuda only": [("torch.autocast(x.device.type,", 'torch.autocast("cuda",')],
        "float32 only after the linear layer": [(GUARD, "if True:"), (SCORE, "self.linear(x).float()")],
        "x itself not turned into float32": [(SCORE, "self.linear(x)")],
        "gates cast back to the type of x": [
            (CALL, "r = top_k_gating(logits, self.top_k)\n            return Routing(r.gates.to(x.dtype), r.logits, r.chosen, r.kept)"),
        ],
        "always two experts": [(CALL, "return top_k_gating(logits, 2)")],
        "a softmax before the choice": [(CALL, "return top_k_gating(logits.softmax(dim=-1), self.top_k)")],
        "a ReLU on the scores": [(SCORE, SCORE + ".relu()")],
        "the bias forgotten": [(SCORE, "x.float() @ self.linear.weight.T")],
        "a new layer in every call": [(SCORE, "nn.Linear(x.shape[-1], self.linear.out_features)(x.float())")],
        "only the gates": [(CALL, CALL + ".gates")],
        "scores scaled by the square root of C": [(SCORE, SCORE + " / x.shape[-1] ** 0.5")],
        "the token normalised first": [(SCORE, "self.linear(x.float() / x.float().norm(dim=-1, keepdim=True))")],
        "the batch flattened and left so": [(SCORE, "self.linear(x.float().reshape(-1, x.shape[-1]))")],
        "one decision for a whole sequence": [(SCORE, SCORE + ".mean(dim=-2, keepdim=True).expand(*x.shape[:-1], self.linear.out_features)")],
        "no gradient to the token": [(SCORE, "self.linear(x.float().detach())")],
        "no gradient to the layer": [(SCORE, "nn.functional.linear(x.float(), self.linear.weight.data, self.linear.bias.data)")],
        "one expert in evaluation": [(CALL, "return top_k_gating(logits, self.top_k if self.training else 1)")],
        "a single token loses its leading shape": [(SCORE, SCORE + ".squeeze()")],
        "noise while it trains": [(CALL, "logits = logits + 0.01 * torch.randn_like(logits) * self.training\n            " + CALL)],
    },
    "gating-switch": {
        "right: the winner scattered": '''
def switch_gating(logits):
    probs = torch.softmax(logits, dim=-1)
    value, winner = probs.max(dim=-1, keepdim=True)
    gates = torch.zeros_like(probs).scatter(-1, winner, value)
    chosen = torch.zeros_like(probs).scatter(-1, winner, 1).bool()
    return Routing(gates, logits, chosen, chosen)
''',
        "right: one-hot and exp of the log-probability": '''
def switch_gating(logits):
    chosen = nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).bool()
    gates = torch.where(chosen, logits.log_softmax(dim=-1).exp(), 0.0)
    return Routing(gates, logits, chosen, kept=chosen)
''',
        "the gate is always 1": [(SWITCH_GATES, "routing.gates")],
        "the gate is 1, the gradient that of the probability": [
            (SWITCH_GATES, "(1 + logits.softmax(dim=-1) - logits.softmax(dim=-1).detach()) * routing.chosen"),
        ],
        "every expert keeps its probability": [(SWITCH_GATES, "logits.softmax(dim=-1)")],
        "a sigmoid instead of a softmax": [(SWITCH_GATES, "logits.sigmoid() * routing.chosen")],
        "softmax over the tokens": [(SWITCH_GATES, "logits.softmax(dim=-2) * routing.chosen")],
        "probability without a gradient": [(SWITCH_GATES, "logits.detach().softmax(dim=-1) * routing.chosen")],
        "the losers without a gradient": [
            (SWITCH_GATES, "logits.exp() / logits.exp().sum(dim=-1, keepdim=True).detach() * routing.chosen"),
        ],
        "the gate is the logit": [(SWITCH_GATES, "logits * routing.chosen")],
        "several winners when logits are equal": '''
def switch_gating(logits):
    probs = logits.softmax(dim=-1)
    chosen = probs == probs.amax(dim=-1, keepdim=True)
    return Routing(probs * chosen, logits, chosen, chosen)
''',
        "the winner drawn by chance": '''
def switch_gating(logits):
    probs = logits.softmax(dim=-1)
    winner = torch.distributions.Categorical(probs).sample()
    chosen = nn.functional.one_hot(winner, logits.shape[-1]).bool()
    return Routing(probs * chosen, logits, chosen, chosen)
''',
        "the best two experts": [("top_k_gating(logits, 1)", "top_k_gating(logits, 2)")],
        "the record gets probabilities as logits": [(SWITCH_RETURN, SWITCH_RETURN.replace("logits", "logits.softmax(dim=-1)"))],
        "kept: everyone": [(SWITCH_RETURN, SWITCH_RETURN.replace("routing.kept", "torch.ones_like(routing.kept)"))],
        "masks of ones and zeros, not bool": [(SWITCH_RETURN, SWITCH_RETURN.replace("routing.chosen, routing.kept", "routing.chosen.float(), routing.kept.float()"))],
        "numbers of the winners instead of a mask": [(SWITCH_RETURN, SWITCH_RETURN.replace("routing.chosen, routing.kept", "logits.argmax(-1), logits.argmax(-1)"))],
    },
    "gating-top-p": {
        "right: the best one taken again and again": '''
def top_p_gating(logits, p):
    probs = logits.softmax(dim=-1)
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    for _ in range(logits.shape[-1]):
        short = (probs * chosen).sum(dim=-1, keepdim=True) < p
        best = probs.masked_fill(chosen, -1).argmax(dim=-1, keepdim=True)
        chosen = chosen | torch.zeros_like(chosen).scatter(-1, best, True) & short
    gates = probs * chosen / (probs * chosen).sum(dim=-1, keepdim=True)
    return Routing(gates, logits, chosen, chosen)
''',
        "right: how many are needed, then their ranks": '''
def top_p_gating(logits, p):
    order = logits.argsort(dim=-1, descending=True)
    sums = logits.softmax(dim=-1).gather(-1, order).cumsum(dim=-1)
    count = (sums < p).sum(dim=-1, keepdim=True) + 1
    chosen = order.argsort(dim=-1) < count
    gates = torch.where(chosen, logits, -torch.inf).softmax(dim=-1)
    return Routing(gates, logits, chosen, chosen.clone())
''',
        "the one that crosses p is left out": [(NEEDED, "needed = probs.cumsum(dim=-1) <= p")],
        "only the best is safe, the one that crosses p is left out": [
            (NEEDED, "needed = probs.cumsum(dim=-1) <= p\n    needed[..., 0] = True"),
        ],
        "one too many when p is reached exactly": [(NEEDED, NEEDED.replace("<", "<="))],
        "not put back in the order of the experts": [(PLACED, "needed")],
        "put back with gather instead of scatter": [(PLACED, "needed.gather(-1, order)")],
        "sorted upwards": [("descending=True", "descending=False")],
        "every expert above p": [(PLACED, "logits.softmax(dim=-1) > p")],
        "scores added up instead of probabilities": [("logits.softmax(dim=-1).sort", "logits.sort")],
        "as many for every token as the most demanding needs": [
            (PLACED, PLACED.replace("order, needed", "order, needed | needed.reshape(-1, needed.shape[-1]).any(dim=0)")),
        ],
        "added up over the tokens": [(NEEDED, NEEDED.replace("dim=-1", "dim=0"))],
        "weights not renormalised": [("logits.masked_fill(~chosen, -math.inf).softmax(dim=-1)", "logits.softmax(dim=-1) * chosen")],
        "equal weights": [("logits.masked_fill(~chosen, -math.inf).softmax(dim=-1)", "chosen / chosen.sum(dim=-1, keepdim=True)")],
        "weights without a gradient": [("Routing(gates,", "Routing(gates.detach(),")],
        "the record gets masked logits": [("gates, logits,", "gates, logits.masked_fill(~chosen, -math.inf),")],
        "kept: everyone": [("kept=chosen", "kept=torch.ones_like(chosen)")],
        "always 0.9": [("- probs < p", "- probs < 0.9")],
    },
}
