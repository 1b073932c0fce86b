"Lesson 05. What goes wrong here: noise of the wrong size, in the wrong place, or at the wrong time, and a lost gradient."

CLEAN = "logits = self.linear(x.float())  # (..., E)"
DEVIATION = "F.softplus(self.noise_linear(x.float()))"
NOISY = "noisy = logits + deviation * torch.randn_like(logits)"
RETURN = "return replace(top_k_gating(noisy, self.top_k), logits=logits)"
EPS = "torch.randn_like(logits)"
GUARD = "with torch.autocast(x.device.type, enabled=False):"
ONLY_IN_TRAINING = """        if not self.training:
            return super().forward(x)
"""

ROUTER = '''
class NoisyTopkRouter(TopkRouter):
    def __init__(self, n_embd, num_experts, top_k):
        super().__init__(n_embd, num_experts, top_k)
        self.noise_linear = nn.Linear(n_embd, num_experts)
'''

JITTER = "x = x * (1 + self.jitter * (2 * torch.rand_like(x) - 1))  # a new tensor"
GUMBEL = "noise = -(-torch.rand_like(logits).log()).log()  # (..., E)"
OTHERS = "torch.where(noisy >= kth, next_one, kth)"
PROBABILITY = "torch.special.ndtr((logits - others) / deviation)"

ANSWERS = {
    "noisy-gating-router": {
        "right: the record of TopkRouter, noise by rsample": ROUTER + '''
    def forward(self, x):
        routing = super().forward(x)
        if self.training:
            with torch.autocast(x.device.type, enabled=False):
                spread = torch.nn.Softplus()(self.noise_linear(x.float()))
                noisy = torch.distributions.Normal(routing.logits, spread).rsample()
            routing = replace(top_k_gating(noisy, self.top_k), logits=routing.logits)
        return routing
''',
        "right: the two layers as one product": ROUTER + '''
    def forward(self, x):
        weight = torch.cat([self.linear.weight, self.noise_linear.weight])
        bias = torch.cat([self.linear.bias, self.noise_linear.bias])
        with torch.autocast(x.device.type, enabled=False):
            clean, z = F.linear(x.float(), weight, bias).chunk(2, dim=-1)
        if not self.training:
            return top_k_gating(clean, self.top_k)
        return replace(top_k_gating(torch.randn(clean.shape) * F.softplus(z) + clean, self.top_k), logits=clean)
''',
        "noise left on in evaluation": [(ONLY_IN_TRAINING, "")],
        "noise in evaluation only": [("if not self.training", "if self.training")],
        "dice thrown in evaluation, too, and multiplied by 0": [
            (ONLY_IN_TRAINING, ""), (NOISY, "noisy = logits + self.training * deviation * torch.randn_like(logits)"),
        ],
        "evaluation returns scores": [("return super().forward(x)", "return self.linear(x)")],
        "evaluation asks all experts": [("return super().forward(x)", "return top_k_gating(self.linear(x.float()), self.linear.out_features)")],
        "evaluation without a gradient": [("return super().forward(x)", "with torch.no_grad():\n                return super().forward(x)")],
        "evaluation leaves autocast on": [("return super().forward(x)", "return top_k_gating(self.linear(x), self.top_k)")],
        "no noise at all": [(NOISY, "noisy = logits")],
        "deviation from the wrong linear layer": [("self.noise_linear(x.float())", "self.linear(x.float())")],
        "the deviation may be negative": [(DEVIATION, "self.noise_linear(x.float())")],
        "deviation by exp": [(DEVIATION, "self.noise_linear(x.float()).exp()")],
        "deviation by ReLU": [(DEVIATION, "self.noise_linear(x.float()).relu()")],
        "deviation by sigmoid": [(DEVIATION, "self.noise_linear(x.float()).sigmoid()")],
        "softplus taken for a variance": [(DEVIATION, DEVIATION + ".sqrt()")],
        "softplus around the noise, too": [(NOISY, "noisy = logits + F.softplus(self.noise_linear(x.float()) * torch.randn_like(logits))")],
        "noise of deviation 1": [(NOISY, "noisy = logits + torch.randn_like(logits)")],
        "uniform noise": [("randn_like", "rand_like")],
        "uniform noise of the right mean and variance": [(EPS, "(torch.rand_like(logits) - 0.5) * 12**0.5")],
        "noise that only adds": [(EPS, "torch.randn_like(logits).abs()")],
        "a floor under the deviation": [(DEVIATION, DEVIATION + " + 0.01")],
        "one draw for all experts": [(EPS, "torch.randn_like(logits[..., :1])")],
        "one draw for all tokens": [(EPS, "torch.randn(logits.shape[-1])")],
        "one draw for all rows of the batch": [(EPS, "torch.randn(logits.shape[-2:])")],
        "one deviation for all experts": [(DEVIATION, DEVIATION + ".mean(dim=-1, keepdim=True)")],
        "the same dice in every call": [(NOISY, "torch.manual_seed(0)\n            " + NOISY)],
        "scores multiplied by noise": [(NOISY, "noisy = logits * (1 + deviation * torch.randn_like(logits))")],
        "noise on the token instead of the scores": [(NOISY, "noisy = self.linear(x.float() + torch.randn_like(x.float()))")],
        "torch.normal: no gradient to the deviation": [(NOISY, "noisy = torch.normal(logits, deviation)")],
        "the scores cut off from the gradient": [(NOISY, NOISY.replace("logits +", "logits.detach() +"))],
        "the token cut off from the gradient": [(CLEAN, "x = x.detach()\n            " + CLEAN)],
        "the noise tells the token nothing": [("self.noise_linear(x.float())", "self.noise_linear(x.float().detach())")],
        "a single token loses its leading shape": [("self.linear(x.float())", "self.linear(x.float()).squeeze()")],
        "the record gets noisy logits": [(RETURN, "return top_k_gating(noisy, self.top_k)")],
        "the record's logits are cut off from the gradient": [(RETURN, RETURN.replace("=logits", "=logits.detach()"))],
        "choice and gates without the noise": [(RETURN, "return top_k_gating(logits, self.top_k)")],
        "noisy choice, clean weights": [
            (RETURN, "r = top_k_gating(noisy, self.top_k)\n"
                     "            return replace(r, logits=logits, gates=logits.masked_fill(~r.chosen, -torch.inf).softmax(dim=-1))"),
        ],
        "clean choice, noisy weights": [
            (RETURN, "r = top_k_gating(logits, self.top_k)\n"
                     "            return replace(r, gates=noisy.masked_fill(~r.chosen, -torch.inf).softmax(dim=-1))"),
        ],
        "noise added to the gates": [
            (RETURN, "r = top_k_gating(logits, self.top_k)\n            return replace(r, gates=r.gates + deviation * torch.randn_like(logits))"),
        ],
        "kept without the noise": [(RETURN, RETURN.replace("logits=logits", "logits=logits, kept=top_k_gating(logits, self.top_k).kept"))],
        "all experts while it trains": [(RETURN, RETURN.replace("self.top_k", "logits.shape[-1]"))],
        "the lesson's k = 2 instead of the argument": [(RETURN, RETURN.replace("self.top_k", "2"))],
        "autocast left on": [(GUARD, "if True:")],
        "autocast left on for the deviation": [
            (GUARD + "\n            " + CLEAN, GUARD + "\n            " + CLEAN + "\n        if True:"),
        ],
    },
    "noisy-gating-jitter": {
        "right: uniform_ between the two ends": [(JITTER, "x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)")],
        "right: a little of the token added": [(JITTER, "x = x + x * self.jitter * torch.distributions.Uniform(-1, 1).sample(x.shape)")],
        "the token itself is changed": [(JITTER, "x *= 1 + self.jitter * (2 * torch.rand_like(x) - 1)")],
        "jitter left on in evaluation": [("if self.training", "if True")],
        "jitter in evaluation only": [("if self.training", "if not self.training")],
        "added instead of multiplied": [(JITTER, "x = x + self.jitter * (2 * torch.rand_like(x) - 1)")],
        "normal instead of uniform": [(JITTER, "x = x * (1 + self.jitter * torch.randn_like(x))")],
        "only upwards": [(JITTER, "x = x * (1 + self.jitter * torch.rand_like(x))")],
        "half as wide": [(JITTER, "x = x * (1 + self.jitter * (torch.rand_like(x) - 0.5))")],
        "one factor per token": [(JITTER, "x = x * (1 + self.jitter * (2 * torch.rand_like(x[..., :1]) - 1))")],
        "one factor per channel": [(JITTER, "x = x * (1 + self.jitter * (2 * torch.rand(x.shape[-1]) - 1))")],
        "the rows of a batch share their factors": [(JITTER, "x = x * (1 + self.jitter * (2 * torch.rand(x.shape[-2:]) - 1))")],
        "the same factors in every call": [(JITTER, "torch.manual_seed(0)\n            " + JITTER)],
        "either 1 - jitter or 1 + jitter": [(JITTER, "x = x * (1 + self.jitter * (2 * torch.randint(0, 2, x.shape) - 1))")],
        "always 0.1": [("self.jitter * (2", "0.1 * (2")],
        "the logits are shaken, not the token": [
            (JITTER, "logits = self.linear(x)\n"
                     "            return top_k_gating(logits * (1 + self.jitter * (2 * torch.rand_like(logits) - 1)), self.top_k)"),
        ],
        "the token cut off from the gradient": [(JITTER, JITTER.replace("x = x", "x = x.detach()"))],
        "the record gets the logits of the quiet token": [
            (JITTER, "quiet = self.linear(x)\n            " + JITTER + "\n            return replace(super().forward(x), logits=quiet)"),
        ],
    },
    "noisy-gating-gumbel": {
        "right: minus the logarithm of exponential numbers": [(GUMBEL, "noise = -torch.empty_like(logits).exponential_().log()")],
        "right: torch's own Gumbel distribution": [(GUMBEL, "noise = torch.distributions.Gumbel(0.0, 1.0).sample(logits.shape)")],
        "right: the first of several clocks to ring": '''
def gumbel_choice(logits):
    return (torch.rand(logits.shape).log() / logits.softmax(dim=-1)).argmax(dim=-1)
''',
        "the largest score, no chance": [("logits + noise", "logits")],
        "normal noise": [(GUMBEL, "noise = torch.randn_like(logits)")],
        "normal noise of Gumbel's variance": [(GUMBEL, "noise = torch.randn_like(logits) * math.pi / 6**0.5")],
        "uniform noise": [(GUMBEL, "noise = torch.rand_like(logits)")],
        "one logarithm forgotten": [(GUMBEL, "noise = -torch.rand_like(logits).log()")],
        "the outer minus forgotten": [("-(-torch", "(-torch")],
        "added to the probabilities": [("(logits + noise)", "(logits.softmax(dim=-1) + noise)")],
        "the smallest wins": [("argmax", "argmin")],
        "one draw for all tokens": [("torch.rand_like(logits)", "torch.rand(logits.shape[-1])")],
        "one draw for all tokens of a row": [("torch.rand_like(logits)", "torch.rand_like(logits[..., :1, :])")],
        "one draw for all experts": [("torch.rand_like(logits)", "torch.rand_like(logits[..., :1])")],
        "half the noise": [("logits + noise", "logits + noise / 2")],
        "the best token instead of the best expert": [("argmax(dim=-1)", "argmax(dim=0)")],
        "a last dimension left over": [("argmax(dim=-1)", "argmax(dim=-1, keepdim=True)")],
    },
    "noisy-gating-smooth": {
        "right: leave each out in turn": '''
def choice_probability(logits, noisy, deviation, k):
    columns = []
    for i in range(logits.shape[-1]):
        others = torch.cat([noisy[..., :i], noisy[..., i + 1:]], dim=-1)
        bar = others.sort(dim=-1, descending=True).values[..., k - 1]
        columns.append(torch.distributions.Normal(bar, deviation[..., i]).cdf(logits[..., i]))
    return torch.stack(columns, dim=-1)
''',
        "right: all left out at once by a diagonal of minus infinity": '''
def choice_probability(logits, noisy, deviation, k):
    E = logits.shape[-1]
    others = noisy[..., None, :].expand(*noisy.shape, E).masked_fill(torch.eye(E, dtype=torch.bool), -torch.inf)
    bar = others.topk(k, dim=-1).values[..., -1]
    return 0.5 * (1 + torch.erf((logits - bar) / (deviation * 2**0.5)))
''',
        "the k-th best of all, nobody left out": [(OTHERS, "kth")],
        "the next one for everybody": [(OTHERS, "next_one")],
        "the two cases swapped": [("next_one, kth)", "kth, next_one)")],
        "the k-th best itself taken for a loser": [("noisy >= kth", "noisy > kth")],
        "the best of the others instead of the k-th": [("k - 1 : k]", "0:1]")],
        "the noisy score asked instead of the clean one": [("(logits - others)", "(noisy - others)")],
        "the clean scores of the others": [("best = noisy", "best = logits"), ("noisy >= kth", "logits >= kth")],
        "not divided by the deviation": [(" / deviation", "")],
        "divided by the variance": [("/ deviation", "/ deviation**2")],
        "a sigmoid instead of the normal distribution": [("torch.special.ndtr", "torch.sigmoid")],
        "erf instead of the normal distribution": [("torch.special.ndtr", "torch.special.erf")],
        "how probable it is to lose": [("logits - others", "others - logits")],
        "the scores cut off from the gradient": [("(logits - others)", "(logits.detach() - others)")],
        "the deviation cut off from the gradient": [("/ deviation", "/ deviation.detach()")],
        "0 or 1: a count, without a gradient": [(PROBABILITY, "(logits > others).to(logits.dtype)")],
        "already summed to a load": [(PROBABILITY, PROBABILITY + ".sum(dim=0)")],
    },
}
