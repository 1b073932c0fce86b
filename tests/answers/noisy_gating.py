"Lesson 05: noise of the wrong size, in the wrong place or at the wrong time, and a lost gradient."

FIRST = "routing = super().forward(x)  # the scores without noise, and their choice"
ONLY_IN_TRAINING = """        if not self.training:
            return routing
"""
GUARD = "with torch.autocast(x.device.type, enabled=False):"
Z = "z = F.linear(x.float(), self.noise_linear.weight.float(), self.noise_linear.bias.float())"
NOISY = "noisy = routing.logits + F.softplus(z) * torch.randn_like(routing.logits)"
RETURN = "return replace(top_k_gating(noisy, self.top_k), logits=routing.logits)"
EPS = "torch.randn_like(routing.logits)"

ROUTER = """
class NoisyTopkRouter(TopkRouter):
    def __init__(self, n_embd, num_experts, top_k):
        super().__init__(n_embd, num_experts, top_k)
        self.noise_linear = nn.Linear(n_embd, num_experts)
"""

NOISE = "(-u.log()).log()"
OTHERS = "torch.where(noisy >= kth, following, kth)"
PROBABILITY = "torch.special.ndtr((logits - others) / deviation)"

ANSWERS = {
    "noisy_topk_router": {
        "right: noise by rsample": [
            (NOISY, "noisy = torch.distributions.Normal(routing.logits, torch.nn.Softplus()(z)).rsample()"),
        ],
        "right: the two layers as one product": ROUTER
        + """
    def forward(self, x):
        weight = torch.cat([self.linear.weight, self.noise_linear.weight])
        bias = torch.cat([self.linear.bias, self.noise_linear.bias])
        with torch.autocast(x.device.type, enabled=False):
            clean, z = F.linear(x.float(), weight.float(), bias.float()).chunk(2, dim=-1)
        if not self.training:
            return top_k_gating(clean, self.top_k)
        return replace(top_k_gating(torch.randn_like(clean) * F.softplus(z) + clean, self.top_k), logits=clean)
""",
        "noise left on in evaluation, as in makeMoE": [(ONLY_IN_TRAINING, "")],
        "random numbers drawn in evaluation, too, and multiplied by 0": [
            (ONLY_IN_TRAINING, ""),
            (NOISY, "noisy = routing.logits + self.training * F.softplus(z) * torch.randn_like(routing.logits)"),
        ],
        "evaluation without a gradient": [(FIRST, "with torch.set_grad_enabled(self.training):\n            " + FIRST)],
        "deviation from the wrong linear layer": [("self.noise_linear.weight.float()", "self.linear.weight.float()")],
        "the deviation by exp": [("F.softplus(z)", "z.exp()")],
        "uniform noise of the right mean and variance": [(EPS, "(torch.rand_like(routing.logits) - 0.5) * 12**0.5")],
        "one draw for all experts": [(EPS, "torch.randn_like(routing.logits[..., :1])")],
        "one draw for all rows of the batch": [(EPS, "torch.randn(routing.logits.shape[-2:])")],
        "the same random numbers in every call": [(NOISY, "torch.manual_seed(0)\n            " + NOISY)],
        "torch.normal: no gradient to the deviation": [(NOISY, "noisy = torch.normal(routing.logits, F.softplus(z))")],
        "the record gets noisy logits": [(RETURN, "return top_k_gating(noisy, self.top_k)")],
        "the record's logits are cut off from the gradient": [
            (RETURN, RETURN.replace("=routing.logits", "=routing.logits.detach()"))
        ],
        "clean choice, noisy weights": [
            (RETURN, "return replace(routing, gates=noisy.masked_fill(~routing.chosen, -torch.inf).softmax(dim=-1))"),
        ],
        "weights of another type refused": [(Z, "z = self.noise_linear(x.float())")],
        "autocast left on for the deviation": [(GUARD, "if True:"), (Z, "z = self.noise_linear(x).float()")],
    },
    "gumbel_choice": {
        "right: step by step, max instead of argmax": """
def gumbel_choice(logits, u):
    noise = -torch.log(-torch.log(u))
    return torch.max(logits + noise, dim=-1).indices
""",
        "right: the first of several exponential clocks": """
def gumbel_choice(logits, u):
    return (-u.log() / logits.softmax(dim=-1)).argmin(dim=-1)
""",
        "multinomial": """
def gumbel_choice(logits, u):
    flat = logits.softmax(dim=-1).reshape(-1, logits.shape[-1])
    return torch.multinomial(flat, 1).reshape(logits.shape[:-1])
""",
        "numbers of its own, from a seed": [
            ("    return", "    torch.manual_seed(0)\n    return"),
            ("u.log()", "torch.rand_like(u).log()"),
        ],
        "u overwritten": [("u.log()", "u.log_()")],
        "one logarithm forgotten": [(NOISE, "u.log()")],
        "the outer minus forgotten": [("logits - (-u", "logits + (-u")],
        "added to the probabilities": [("logits -", "logits.softmax(dim=-1) -")],
        "normal noise": [(f"- {NOISE}", "+ torch.special.ndtri(u)")],
        "the cumulated softmax compared with one number": [
            (f"(logits - {NOISE}).argmax(dim=-1)", "(logits.softmax(dim=-1).cumsum(dim=-1) < u[..., :1]).sum(dim=-1)")
        ],
        "the best token instead of the best expert": [("argmax(dim=-1)", "argmax(dim=0)")],
        "a last dimension left over": [("argmax(dim=-1)", "argmax(dim=-1, keepdim=True)")],
    },
    "choice_probability": {
        "right: leave each out in turn": """
def choice_probability(logits, noisy, deviation, k):
    columns = []
    for i in range(logits.shape[-1]):
        others = torch.cat([noisy[..., :i], noisy[..., i + 1:]], dim=-1)
        bar = others.sort(dim=-1, descending=True).values[..., k - 1]
        columns.append(torch.distributions.Normal(bar, deviation[..., i]).cdf(logits[..., i]))
    return torch.stack(columns, dim=-1)
""",
        "right: all left out at once by a diagonal of minus infinity": """
def choice_probability(logits, noisy, deviation, k):
    E = logits.shape[-1]
    others = noisy[..., None, :].expand(*noisy.shape, E).masked_fill(torch.eye(E, dtype=torch.bool), -torch.inf)
    bar = others.topk(k, dim=-1).values[..., -1]
    return 0.5 * (1 + torch.erf((logits - bar) / (deviation * 2**0.5)))
""",
        "the k-th best of all, nobody left out": [(OTHERS, "kth")],
        "the next one for everybody": [(OTHERS, "following")],
        "the k-th best itself taken for a loser": [("noisy >= kth", "noisy > kth")],
        "the best of the others instead of the k-th": [("k - 1 : k]", "0:1]")],
        "the noisy score asked instead of the clean one": [("(logits - others)", "(noisy - others)")],
        "the clean scores of the others": [("best = noisy", "best = logits"), ("noisy >= kth", "logits >= kth")],
        "divided by the variance": [("/ deviation", "/ deviation**2")],
        "a sigmoid instead of the normal distribution": [("torch.special.ndtr", "torch.sigmoid")],
        "the deviation cut off from the gradient": [("/ deviation", "/ deviation.detach()")],
        "the other scores cut off from the gradient": [("(logits - others)", "(logits - others.detach())")],
        "0 or 1: a count": [(PROBABILITY, "(logits > others).to(logits.dtype)")],
        "already summed to a load": [(PROBABILITY, PROBABILITY + ".sum(dim=0)")],
    },
}
