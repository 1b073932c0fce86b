"Lesson 03: the activation in the wrong place, dropout in the wrong place, and counts that forget something."

UP, DOWN = "hidden = self.activation(self.up(x))", "return self.dropout(self.down(hidden))"


def expert(square, body):
    "The whole cell with another `squared_relu` and another `forward`."
    return f"""
def squared_relu(x):
{square}


ACTIVATIONS = {{"relu": F.relu, "gelu": F.gelu, "squared_relu": squared_relu}}


class Expert(nn.Module):
    def __init__(self, n_embd, n_hidden, activation="relu", bias=True, dropout=0.0):
        super().__init__()
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation is {{activation!r}}, but must be one of {{known}}")
        self.up = nn.Linear(n_embd, n_hidden, bias=bias)
        self.down = nn.Linear(n_hidden, n_embd, bias=bias)
        self.activation = ACTIVATIONS[activation]
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
{body}
"""


ANSWERS = {
    "expert": {
        "right: products written out, in steps": expert(
            "    return x * x * (x > 0)",
            """\
        y = x @ self.up.weight.T
        if self.up.bias is not None:
            y = y + self.up.bias
        y = self.activation(y) @ self.down.weight.T
        if self.down.bias is not None:
            y = y + self.down.bias
        return F.dropout(y, self.dropout.p, self.training)
""",
        ),
        "right: all tokens in one row, and back": expert(
            "    return x.clamp(min=0).pow(2)",
            """\
        tokens = x.reshape(-1, x.shape[-1])
        answers = nn.Sequential(self.up, nn.Identity(), self.down)
        answers = answers[2](self.activation(answers[0](tokens)))
        return self.dropout(answers).reshape(x.shape)
""",
        ),
        "squared without relu": [("F.relu(x).square()", "x.square()")],
        "the input changed on the way": [("F.relu(x).square()", "F.relu(x.data, inplace=True).square()")],
        "no gradient through the square": [("F.relu(x).square()", "F.relu(x).detach().square() + 0 * x")],
        "the activation forgotten": [(UP, "hidden = self.up(x)")],
        "always relu": [(UP, "hidden = F.relu(self.up(x))")],
        "the token added": [(DOWN, "return x + self.dropout(self.down(hidden))")],
        "dropout on the hidden units": [(DOWN, "return self.down(self.dropout(hidden))")],
        "dropout twice": [(DOWN, "return self.dropout(self.down(self.dropout(hidden)))")],
        "dropout of half the rate": [(DOWN, "return F.dropout(self.down(hidden), self.dropout.p / 2, self.training)")],
        "dropout drops whole tokens": [
            (
                DOWN,
                "y = self.down(hidden)\n        return y * self.dropout(y.new_ones(y.shape[:-1]))[..., None]",
            )
        ],
        "dropout in evaluation too": [(DOWN, "return F.dropout(self.down(hidden), self.dropout.p)")],
        "dropout only where there are gradients": [
            (
                DOWN,
                "answer = self.down(hidden)\n        return self.dropout(answer) if answer.requires_grad else answer",
            )
        ],
        "needs batch and time": [(UP, "B, T, C = x.shape\n        hidden = self.activation(self.up(x))")],
        "no gradient in evaluation": [
            (UP, "hidden = self.activation(self.up(x))\n        hidden = hidden if self.training else hidden.detach()")
        ],
        "always float32": [(DOWN, "return self.dropout(self.down(hidden)).float()")],
    },
    "layer_parameters": {
        "right: part by part": """
def layer_parameters(n_embd, n_hidden, num_experts, top_k):
    def with_experts(n):
        attention = sum(n_embd * n_embd for _ in "qkvo")
        router = num_experts * n_embd
        return attention + router + n * (n_embd * n_hidden + n_hidden * n_embd)

    return with_experts(num_experts), with_experts(top_k)
""",
        "right: the total, then less those that wait": [
            (
                "return shared + num_experts * expert, shared + top_k * expert",
                "total = shared + num_experts * expert\n    return [total, total - (num_experts - top_k) * expert]",
            ),
        ],
        "everything times E, as in 8x7B": [
            (
                "return shared + num_experts * expert, shared + top_k * expert",
                "return num_experts * (shared + expert), top_k * (shared + expert)",
            )
        ],
        "k of E of the total": [("shared + top_k * expert", "(shared + num_experts * expert) * top_k // num_experts")],
        "the router's chosen columns only": [
            ("shared + top_k * expert", "shared - n_embd * (num_experts - top_k) + top_k * expert")
        ],
        "the router forgotten": [(" + n_embd * num_experts", "")],
        "three matrices of attention": [("4 * n_embd**2", "3 * n_embd**2")],
        "biases counted": [("2 * n_embd * n_hidden", "2 * n_embd * n_hidden + n_hidden + n_embd")],
        "experts always four times as wide": [("2 * n_embd * n_hidden", "8 * n_embd**2")],
        "always two experts": [("top_k * expert", "2 * expert")],
        "active first": [
            (
                "return shared + num_experts * expert, shared + top_k * expert",
                "return shared + top_k * expert, shared + num_experts * expert",
            )
        ],
    },
    "strongest_units": {
        "right: a mask over all units": """
def strongest_units(expert, x, n):
    hidden = expert.activation(expert.up(x))
    loudness = hidden.abs() * expert.down.weight.square().sum(dim=0).sqrt()
    units = loudness.argsort(dim=-1, descending=True)[..., :n]
    mask = torch.zeros_like(hidden).scatter(-1, units, 1.0)
    return units, expert.down(hidden * mask)
""",
        "right: what each unit writes, token by token": """
def strongest_units(expert, x, n):
    units, answers = [], []
    for token in x.reshape(-1, x.shape[-1]):
        written = expert.activation(expert.up(token))[:, None] * expert.down.weight.T  # (F, C)
        best = written.norm(dim=1).topk(n).indices
        units.append(best)
        answers.append(written[best].sum(dim=0) + expert.down.bias)
    return torch.stack(units).view(*x.shape[:-1], n), torch.stack(answers).view(x.shape)
""",
        "large activations, whatever they write": [(" * values.norm(dim=-1)", "")],
        "gelu's negative units are never strong": [("hidden.abs()", "hidden")],
        "the length by absolute values": [("values.norm(dim=-1)", "values.abs().sum(dim=-1)")],
        "the lengths of the keys": [("* values.norm(dim=-1)", "* expert.up.weight.norm(dim=-1)")],
        "rows of down for columns, where that fits": [
            (
                "values = expert.down.weight.T",
                "values = expert.down.weight\n    values = values if len(values) == len(values.T) else values.T",
            )
        ],
        "before the activation": [("expert.activation(expert.up(x))", "expert.up(x)")],
        "always relu": [("expert.activation(expert.up(x))", "expert.up(x).relu()")],
        "the last bias forgotten": [(" + expert.down.bias", "")],
        "in the order of their numbers": [("topk(n, dim=-1).indices", "topk(n, dim=-1).indices.sort(dim=-1).values")],
        "gradients off for everybody from here on": [
            ("    hidden =", "    torch.set_grad_enabled(False)\n    hidden =")
        ],
        "the answer without a gradient": [("    hidden =", "    x = x.detach()\n    hidden =")],
        "numbers of 32 bits": [("return units, ", "return units.int(), ")],
        "in a batch, the first sequence for all": [
            (
                "return units, written.sum(dim=-2) + expert.down.bias",
                "units = units if x.dim() < 3 else units[:1].expand_as(units)\n"
                "    return units, written.sum(dim=-2) + expert.down.bias",
            )
        ],
    },
}
