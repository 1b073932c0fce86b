"Lesson 14. What goes wrong here: corrections forgotten, decay in the wrong place, the wrong dimensions."

HATS = "m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)"
MOVE = "w = w - lr * decay * w - lr * m_hat / (v_hat.sqrt() + eps)"

NORM = "x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)"
FACTOR = "factor = 3.4445 * one - 4.7750 * square + 2.0315 * square @ square"

LERP = "mean.lerp_(p, 1 - self.decay)"
COPY = "p.copy_(mean / (1 - self.decay**self.updates))"
MEANS = "self.means = [torch.zeros_like(p) for p in model.parameters()]"

ANSWERS = {
    "adamw_step": {
        "right: decay first, as PyTorch does it": """
def adamw_step(w, g, m, v, t, lr, betas=(0.9, 0.999), eps=1e-8, decay=0.0):
    b1, b2 = betas
    w = w * (1 - lr * decay)
    m, v = torch.lerp(m, g, 1 - b1), v * b2 + g * g * (1 - b2)
    root = v.sqrt() / (1 - b2**t) ** 0.5 + eps
    return w - lr / (1 - b1**t) * m / root, m, v
""",
        "right: number by number": """
def adamw_step(w, g, m, v, t, lr, betas=(0.9, 0.999), eps=1e-8, decay=0.0):
    w, m, v = w.clone(), m.clone(), v.clone()
    for i in range(w.numel()):
        at = w.view(-1), g.reshape(-1), m.view(-1), v.view(-1)
        at[2][i] = betas[0] * at[2][i] + (1 - betas[0]) * at[1][i]
        at[3][i] = betas[1] * at[3][i] + (1 - betas[1]) * at[1][i] ** 2
        step = at[2][i] / (1 - betas[0] ** t) / ((at[3][i] / (1 - betas[1] ** t)) ** 0.5 + eps)
        at[0][i] -= lr * (step + decay * at[0][i])
    return w, m, v
""",
        "not corrected": [(HATS, "m_hat, v_hat = m, v")],
        "corrected as if it were the first step": [(HATS, HATS.replace(" ** t", ""))],
        "the corrected means are kept": [
            (HATS, "m, v = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)\n    m_hat, v_hat = m, v")
        ],
        "the betas exchanged": [("m = betas[0] * m + (1 - betas[0]) * g", "m = betas[1] * m + (1 - betas[1]) * g")],
        "Adam: decay is added to the gradient": [
            ("    m = betas[0]", "    g = g + decay * w\n    m = betas[0]"),
            ("w - lr * decay * w - lr", "w - lr"),
        ],
        "Algorithm 2 of the paper: decay without lr": [("lr * decay * w", "decay * w")],
        "eps inside the root": [("(v_hat.sqrt() + eps)", "(v_hat + eps).sqrt()")],
        "eps fixed": [("+ eps)", "+ 1e-8)")],
        "the size of the gradient instead of its square": [("g**2", "g.abs()")],
        "w changed in place": [(MOVE, "w.sub_(lr * decay * w + lr * m_hat / (v_hat.sqrt() + eps))")],
        "m changed in place": [
            ("m = betas[0] * m + (1 - betas[0]) * g", "m = m.mul_(betas[0]).add_((1 - betas[0]) * g)")
        ],
        "decay after the move": [(MOVE, "w = w - lr * m_hat / (v_hat.sqrt() + eps)\n    w = w - lr * decay * w")],
    },
    "orthogonalize": {
        "right: the loop on x itself": """
def orthogonalize(x, steps=5):
    x = x / x.flatten(-2).norm(dim=-1)[..., None, None].clamp(min=1e-7)
    for _ in range(steps):
        a = x @ x.transpose(-1, -2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x
""",
        "right: Horner's rule, the other square": """
def orthogonalize(x, steps=5):
    size = x.square().sum(dim=(-2, -1), keepdim=True).sqrt()
    x = torch.where(size > 0, x / size.clamp(min=1e-30), 0 * x)
    for _ in range(steps):
        b = x.mT @ x
        x = x @ (3.4445 * torch.eye(x.shape[-1]).to(b) + b @ (2.0315 * b - 4.7750 * torch.eye(x.shape[-1]).to(b)))
    return x
""",
        "not divided by the norm": [(NORM, "pass")],
        "divided by the norm of the whole stack": [(NORM, "x = x / x.norm().clamp(min=1e-7)")],
        "zeros become nan": [(".clamp(min=1e-7)", "")],
        "a small matrix stays small": [("clamp(min=1e-7)", "clamp(min=1.0)")],
        "the cubic polynomial of Newton and Schulz": [(FACTOR, "factor = 1.5 * one - 0.5 * square")],
        "the sign of the middle term": [("one - 4.7750", "one + 4.7750")],
        "always five rounds": [("range(steps)", "range(5)")],
        "one round less": [("range(steps)", "range(steps - 1)")],
        "transposed wrongly: all dimensions turned": [
            ("return orthogonalize(x.mT, steps).mT", "return orthogonalize(x.transpose(0, -1), steps).transpose(0, -1)")
        ],
        "a tall matrix comes back wide": [("orthogonalize(x.mT, steps).mT", "orthogonalize(x.mT, steps)")],
        "the rounds in float32, whatever x is": [
            ("dtype=x.dtype, ", ""),
            (NORM, "x = x.float() / x.float().norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)"),
        ],
        "the identity on the CPU": [(", device=x.device", "")],
        "an exact decomposition instead of five rounds": """
def orthogonalize(x, steps=5):
    U, _, V = torch.linalg.svd(x, full_matrices=False)
    return U @ V
""",
        "x changed in place": [(NORM, "x /= x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)")],
    },
    "WeightAverage": {
        "right: sums of weights and of shares, by name": """
class WeightAverage:
    def __init__(self, model, decay):
        self.decay, self.updates = decay, 0
        self.sums, self.shares = {}, 0.0

    @torch.no_grad()
    def update(self, model):
        self.updates += 1
        for name, weight in model.named_parameters():
            self.sums[name] = self.decay * self.sums.get(name, 0.0) + weight
        self.shares = self.decay * self.shares + 1

    @torch.no_grad()
    def copy_to(self, model):
        for name, weight in model.named_parameters():
            weight.copy_(self.sums[name] / self.shares)
""",
        "right: corrected at every update": """
class WeightAverage:
    def __init__(self, model, decay):
        self.decay, self.updates = decay, 0
        self.average = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model):
        self.updates += 1
        share = (1 - self.decay) / (1 - self.decay**self.updates)  # of the newest
        for mean, p in zip(self.average, model.parameters()):
            mean += share * (p - mean)

    @torch.no_grad()
    def copy_to(self, model):
        for mean, p in zip(self.average, model.parameters()):
            p.data[:] = mean
""",
        "not corrected": [(COPY, "p.copy_(mean)")],
        "corrected by one update too many": [("self.decay**self.updates", "self.decay**(self.updates + 1)")],
        "corrected in place": [(COPY, "p.copy_(mean.div_(1 - self.decay**self.updates))")],
        "the decay the wrong way round": [(LERP, "mean.lerp_(p, self.decay)")],
        "the decay fixed": [(LERP, "mean.lerp_(p, 0.1)"), ("self.decay**self.updates", "0.9**self.updates")],
        "from the first weights, and not corrected": [
            (MEANS, "self.means = [p.detach().clone() for p in model.parameters()]"),
            (COPY, "p.copy_(mean)"),
        ],
        "the plain mean of all": [(LERP, "mean.lerp_(p, 1 / self.updates)"), (COPY, "p.copy_(mean)")],
        "the weights themselves instead of copies": [(MEANS, "self.means = [p.detach() for p in model.parameters()]")],
        "matrices only": [("            " + COPY, "            if p.dim() > 1:\n                " + COPY)],
        "the average given away": [(COPY, "p.data = mean.div_(1 - self.decay**self.updates)")],
        "one average for all objects": [
            ("    def __init__", "    means = []\n\n    def __init__"),
            (MEANS, "self.means += [torch.zeros_like(p) for p in model.parameters()][len(self.means):]"),
        ],
    },
}
