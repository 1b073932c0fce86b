"Lesson 21: gates that are renormalised, ties, jitter in the wrong place or at the wrong time, a wrong fan-in."

BEST = "logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]"
CHOSEN = "torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, True)"
GATES = "logits.softmax(dim=-1).masked_fill(~chosen, 0)"
RETURN = "return Routing(gates, logits, chosen, kept=chosen)"

REFUSE = """        if not 0 <= jitter < 1:
            raise ValueError(f"jitter is {jitter}, but must be at least 0 and below 1")
"""
ACTIVE = "if self.training and self.jitter:"
FACTORS = "torch.empty_like(x, dtype=torch.float32).uniform_(1 - self.jitter, 1 + self.jitter)"
DRAWN = f"factors = {FACTORS}"
NOISY = "F.linear(x.float() * factors, weight, bias)"
RECORD = "routing = replace(noisy, logits=routing.logits)"
GUARD = "with torch.autocast(x.device.type, enabled=False):"

INIT = """
class SwitchRouter(TopkRouter):
    def __init__(self, n_embd, num_experts, top_k=1, jitter=0.0):
        super().__init__(n_embd, num_experts, top_k)
        if jitter < 0 or jitter >= 1 or jitter != jitter:
            raise ValueError(f"jitter should be in [0, 1), but it is {jitter}")
        self.jitter = jitter
"""

DEVIATION = "(scale / weight.shape[-1]) ** 0.5"
DRAW = "nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)"

ANSWERS = {
    "switch_gating": {
        "right: sorted twice to places": """
def switch_gating(logits, k=1):
    probs = torch.softmax(logits, dim=-1)
    places = torch.argsort(-logits, dim=-1, stable=True).argsort(dim=-1)
    gates = torch.where(places < k, probs, torch.zeros_like(probs))
    return Routing(gates=gates, logits=logits, chosen=places < k, kept=places < k)
""",
        "right: argmax again and again, exp of the log-probability": """
def switch_gating(logits, k=1):
    left, chosen = logits.detach().clone(), torch.zeros_like(logits, dtype=torch.bool)
    for _ in range(k):
        best = nn.functional.one_hot(left.argmax(dim=-1), logits.shape[-1]).bool()
        chosen, left = chosen | best, left.masked_fill(best, -float("inf"))
    gates = logits.log_softmax(dim=-1).exp() * chosen
    return Routing(gates, logits, chosen, chosen.clone())
""",
        "renormalised, as in minimind: with k = 1 the gate is always 1": [
            (RETURN, "gates = gates / gates.sum(dim=-1, keepdim=True)\n    " + RETURN),
        ],
        "always one expert": [("[..., :k]", "[..., :1]")],
        "the gate a constant for the gradient": [(GATES, GATES.replace("logits.softmax", "logits.detach().softmax"))],
        "the gate is 1, and the gradient that of the probability": [
            (GATES, "((1 + logits.softmax(dim=-1) - logits.softmax(dim=-1).detach()) * chosen)"),
        ],
        "the losers without a gradient": [
            (GATES, "(logits - logits.logsumexp(dim=-1, keepdim=True).detach()).exp().masked_fill(~chosen, 0)"),
        ],
        "exp by hand": [(GATES, "logits.exp() / logits.exp().sum(dim=-1, keepdim=True) * chosen")],
        "topk, which takes any of equal logits": [(BEST, "logits.topk(k, dim=-1).indices")],
        "all that reach the k-th largest": [(CHOSEN, "logits >= logits.topk(k).values[..., -1:]")],
        "drawn from the probabilities": [
            (BEST, "(logits - (-torch.rand_like(logits).log()).log()).topk(k, dim=-1).indices"),
        ],
        "chosen read off the gates": [(RETURN, "return Routing(gates, logits, gates > 0, kept=gates > 0)")],
        "softmax over the tokens": [(GATES, GATES.replace("dim=-1", "dim=0"))],
        "the record gets log-probabilities as logits": [
            (RETURN, RETURN.replace("logits", "logits.log_softmax(dim=-1)"))
        ],
    },
    "switch_router": {
        "right: one product for both, the noise by rand": INIT
        + """
    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x, weight, bias = x.float(), self.linear.weight.float(), self.linear.bias.float()
            if not self.training or self.jitter == 0:
                return switch_gating(F.linear(x, weight, bias), self.top_k)
            factors = 1 + self.jitter * (2 * torch.rand_like(x) - 1)
            clean, noisy = F.linear(torch.stack([x, factors * x]), weight, bias)
            decision = switch_gating(noisy, self.top_k)
            return Routing(decision.gates, clean, decision.chosen, decision.kept)
""",
        "right: the parent's forward gives the scores": INIT
        + """
    def forward(self, x):
        logits = super().forward(x).logits
        with torch.autocast(x.device.type, enabled=False):
            noisy = logits
            if self.training and self.jitter > 0:
                low, high = torch.tensor(1 - self.jitter), torch.tensor(1 + self.jitter)
                factors = torch.distributions.Uniform(low, high).sample(x.shape)
                noisy = super().forward(x.float() * factors).logits
            return replace(switch_gating(noisy, self.top_k), logits=logits)
""",
        "jitter in place, as in Hugging Face's Switch: the experts see it": [
            (NOISY, "F.linear(x.detach().mul_(factors).float(), weight, bias)")
        ],
        "jitter also in evaluation, as in Hugging Face's Switch until 2023": [(ACTIVE, "if self.jitter:")],
        "random numbers drawn in evaluation, too, and not used": [
            ("routing = switch_gating(", f"{FACTORS}\n            routing = switch_gating(")
        ],
        "one factor for all channels of a token": [(FACTORS, FACTORS.replace("(x, ", "(x[..., :1], "))],
        "the same factors for all rows of the batch": [(FACTORS, FACTORS.replace("(x, ", "(x[:1], "))],
        "the same random numbers in every call": [(DRAWN, "torch.manual_seed(0)\n                " + DRAWN)],
        "added to the scores, as in the paper's listing": [
            (DRAWN, DRAWN.replace("(x, ", "(routing.logits, ")),
            (NOISY, "routing.logits + factors"),
        ],
        "uniform from 1 to 1 + jitter": [("uniform_(1 - self.jitter", "uniform_(1")],
        "normal instead of uniform": [
            ("uniform_(1 - self.jitter, 1 + self.jitter)", "normal_(1, self.jitter / 3**0.5)")
        ],
        "the record gets the logits with jitter": [(RECORD, "routing = noisy")],
        "clean choice, jittered gates": [
            (RECORD, "routing = replace(routing, gates=noisy.probs * routing.chosen)"),
        ],
        "the jittered copy cut off from the gradient": [(NOISY, NOISY.replace("x.float()", "x.detach().float()"))],
        "autocast left on, weights as they are": [
            (GUARD, "if True:"),
            ("self.linear.weight.float(), self.linear.bias.float()", "self.linear.weight, self.linear.bias"),
        ],
        "no setting refused": [(REFUSE, "")],
        "nan accepted": [("not 0 <= jitter < 1", "jitter < 0 or jitter >= 1")],
    },
    "switch_init": {
        "right: drawn again until all values fit": """
def switch_init(weight, scale=0.1):
    deviation = torch.tensor(scale / weight.size(-1)).sqrt().item()
    with torch.no_grad():
        weight.normal_(0, deviation)
        while (far := weight.abs() > 2 * deviation).any():
            weight[far] = deviation * torch.randn(int(far.sum()))
    return weight
""",
        "right: by the inverse of the distribution function": """
def switch_init(weight, scale=0.1):
    low, high = (torch.special.ndtr(torch.tensor(end)).item() for end in (-2.0, 2.0))
    u = low + (high - low) * torch.rand(weight.shape, dtype=torch.float64)
    weight.data.copy_(torch.special.ndtri(u) * (scale / weight.shape[-1]) ** 0.5)
""",
        "the square root forgotten": [(DEVIATION, "scale / weight.shape[-1]")],
        "the fan-out": [(DEVIATION, "(scale / weight.shape[-2]) ** 0.5")],
        "PyTorch's fan-in, which takes stacked experts for a convolution": [
            (DEVIATION, "(scale / nn.init._calculate_fan_in_and_fan_out(weight)[0]) ** 0.5")
        ],
        "not cut off": [(DRAW, "nn.init.normal_(weight, std=deviation)")],
        "clamped: many values at two deviations": [
            (DRAW, "nn.init.normal_(weight, std=deviation).data.clamp_(-2 * deviation, 2 * deviation)")
        ],
        "uniform": [(DRAW, "nn.init.uniform_(weight, -2 * deviation, 2 * deviation)")],
        "scaled up, so that the deviation after the cut is right": [
            ("    nn.init", "    deviation = deviation / 0.8796\n    nn.init")
        ],
        "the default scale is 1": [("scale=0.1", "scale=1.0")],
        "a new tensor, and the old one left": [(DRAW, DRAW.replace("(weight,", "(torch.empty_like(weight),"))],
        "seeded": [("    nn.init", "    torch.manual_seed(0)\n    nn.init")],
    },
}
