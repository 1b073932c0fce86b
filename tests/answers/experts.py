"Lesson 03: the if in the wrong place, dropout in the wrong place, and counts that forget somebody."

UP, DOWN = "hidden = self.activation(self.up(x))", "return self.dropout(self.down(hidden))"


def expert(square, body):
    "The whole cell with another `squared_relu` and another `forward`."
    return f'''
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
'''


ANSWERS = {
    "experts-expert": {
        "right: products written out, in steps": expert("    return x * x * (x > 0)", '''\
        y = x @ self.up.weight.T
        if self.up.bias is not None:
            y = y + self.up.bias
        y = self.activation(y) @ self.down.weight.T
        if self.down.bias is not None:
            y = y + self.down.bias
        return F.dropout(y, self.dropout.p, self.training)
'''),
        "right: all tokens in one row, and back": expert("    return x.clamp(min=0).pow(2)", '''\
        tokens = x.reshape(-1, x.shape[-1])
        answers = nn.Sequential(self.up, nn.Identity(), self.down)
        answers = answers[2](self.activation(answers[0](tokens)))
        return self.dropout(answers).reshape(x.shape)
'''),
        "right: relu times x": [("F.relu(x).square()", "x * F.relu(x)"), (UP, "hidden = F.linear(x, self.up.weight, self.up.bias)"), (DOWN, "return self.dropout(F.linear(self.activation(hidden), self.down.weight, self.down.bias))")],
        "squared without relu": [("F.relu(x).square()", "x.square()")],
        "squared first, then relu": [("F.relu(x).square()", "F.relu(x.square())")],
        "relu without the square": [("F.relu(x).square()", "F.relu(x)")],
        "the square keeps its sign": [("F.relu(x).square()", "x * x.abs()")],
        "the cube": [("F.relu(x).square()", "F.relu(x) ** 3")],
        "doubled instead of squared": [("F.relu(x).square()", "F.relu(x) * 2")],
        "the input changed on the way": [("F.relu(x).square()", "F.relu(x, inplace=True).square()")],
        "the input changed on the way, as long as nobody learns": [("F.relu(x).square()", "(x if x.requires_grad else x.clamp_(min=0)).relu().square()"), (UP, "x = x.detach()\n        hidden = self.activation(self.up(x))")],
        "no gradient through the square": [("F.relu(x).square()", "torch_square(x)"), ("def squared_relu(x):", "def torch_square(x):\n    return F.relu(x).detach().square() + 0 * x\n\n\ndef squared_relu(x):")],
        "the if forgotten": [(UP, "hidden = self.up(x)")],
        "the if after down": [(UP, "hidden = self.up(x)"), (DOWN, "return self.dropout(self.activation(self.down(hidden)))")],
        "the if before up": [(UP, "hidden = self.up(self.activation(x))")],
        "the if twice": [(DOWN, "return self.dropout(self.activation(self.down(hidden)))")],
        "always relu": [(UP, "hidden = F.relu(self.up(x))")],
        "relu and then the activation": [(UP, "hidden = self.activation(F.relu(self.up(x)))")],
        "softmax over the hidden units": [(UP, "hidden = self.activation(self.up(x)).softmax(dim=-1)")],
        "dropout forgotten": [(DOWN, "return self.down(hidden)")],
        "dropout on the hidden units": [(DOWN, "return self.down(self.dropout(hidden))")],
        "dropout on the input": [(UP, "hidden = self.activation(self.up(self.dropout(x)))"), (DOWN, "return self.down(hidden)")],
        "dropout twice": [(DOWN, "return self.dropout(self.down(self.dropout(hidden)))")],
        "dropout in evaluation too": [(DOWN, "return F.dropout(self.down(hidden), self.dropout.p)")],
        "dropout where there are gradients": [(DOWN, "answer = self.down(hidden)\n        return F.dropout(answer, self.dropout.p, answer.requires_grad)")],
        "dropout in training, but only where there are gradients": [(DOWN, "answer = self.down(hidden)\n        return self.dropout(answer) if answer.requires_grad else answer")],
        "dropout in evaluation only": [(DOWN, "return F.dropout(self.down(hidden), self.dropout.p, not self.training)")],
        "dropout of one half, whatever was asked for": [(DOWN, "return F.dropout(self.down(hidden), 0.5 if self.dropout.p else 0, self.training)"), ("nn.Dropout(dropout)", "nn.Dropout(dropout / 2)")],
        "dropout without scaling up what is left": [(DOWN, "answer = self.down(hidden)\n        keep = F.dropout(answer.new_ones(answer.shape), self.dropout.p, self.training) > 0\n        return answer * keep")],
        "dropout drops whole tokens": [(DOWN, "answer = self.down(hidden)\n        return answer * self.dropout(answer.new_ones(answer.shape[:-1]))[..., None]")],
        "dropout of the same channels for all tokens": [(DOWN, "answer = self.down(hidden)\n        return answer * self.dropout(answer.new_ones(answer.shape[-1]))")],
        "the token added": [(DOWN, "return x + self.dropout(self.down(hidden))")],
        "the bias of down forgotten": [(DOWN, "return self.dropout(F.linear(hidden, self.down.weight))")],
        "needs a bias": [(UP, "hidden = self.activation(x @ self.up.weight.T + self.up.bias)")],
        "needs batch and time": [(UP, "B, T, C = x.shape\n        hidden = self.activation(self.up(x))")],
        "a batch of one loses its batch": [(DOWN, "return self.dropout(self.down(hidden)).squeeze(0)")],
        "never above 6": [("F.relu(x).square()", "F.relu6(x).square()")],
        "batch and time lost": [(DOWN, "return self.dropout(self.down(hidden)).reshape(-1, x.shape[-1])")],
        "token by token, and none is too few": [(DOWN, "return torch_stack([self.dropout(self.down(h)) for h in hidden]) if hidden.dim() > 1 else self.dropout(self.down(hidden))"), ("def squared_relu(x):", "def torch_stack(answers):\n    return nn.utils.rnn.pad_sequence(answers, batch_first=True)\n\n\ndef squared_relu(x):")],
        "normalised over the batch": [(UP, "hidden = self.activation(self.up(x))\n        if hidden.dim() > 1:\n            hidden = hidden - hidden.mean(dim=0)")],
        "the loudest unit only": [(UP, "hidden = self.activation(self.up(x))\n        hidden = hidden * (hidden == hidden.amax(dim=-1, keepdim=True))")],
        "nothing for the weights to learn": [(UP, "hidden = self.activation(self.up(x)).detach()")],
        "nothing to learn for what comes before": [(UP, "hidden = self.activation(self.up(x.detach()))")],
        "always float32": [(DOWN, "return self.dropout(self.down(hidden)).float()")],
    },
    "experts-count": {
        "right: part by part": '''
def layer_parameters(n_embd, n_hidden, num_experts, top_k):
    def with_experts(n):
        attention = sum(n_embd * n_embd for _ in "qkvo")
        router = num_experts * n_embd
        return attention + router + n * (n_embd * n_hidden + n_hidden * n_embd)

    return with_experts(num_experts), with_experts(top_k)
''',
        "right: built and counted": '''
def layer_parameters(n_embd, n_hidden, num_experts, top_k):
    shared = nn.ModuleList([nn.Linear(n_embd, 4 * n_embd, bias=False), nn.Linear(n_embd, num_experts, bias=False)])
    experts = nn.ModuleList(Expert(n_embd, n_hidden, bias=False) for _ in range(num_experts))
    total = count(shared) + count(experts)
    return total, total - count(experts[top_k:])
''',
        "everything times E, as in 8x7B": [("return shared + num_experts * expert, shared + top_k * expert", "return num_experts * (shared + expert), top_k * (shared + expert)")],
        "k of E of the total": [("shared + top_k * expert", "(shared + num_experts * expert) * top_k // num_experts")],
        "the router's chosen columns only": [("shared + top_k * expert", "shared - n_embd * (num_experts - top_k) + top_k * expert")],
        "a router for k": [("n_embd * num_experts", "n_embd * top_k")],
        "the router forgotten": [(" + n_embd * num_experts", "")],
        "the router does not count as active": [("shared + top_k * expert", "4 * n_embd**2 + top_k * expert")],
        "attention forgotten in active": [("shared + top_k * expert", "n_embd * num_experts + top_k * expert")],
        "three matrices of attention": [("4 * n_embd**2", "3 * n_embd**2")],
        "an expert is one matrix": [("2 * n_embd * n_hidden", "n_embd * n_hidden")],
        "a gated expert": [("2 * n_embd * n_hidden", "3 * n_embd * n_hidden")],
        "biases counted": [("2 * n_embd * n_hidden", "2 * n_embd * n_hidden + n_hidden + n_embd")],
        "experts always four times as wide": [("2 * n_embd * n_hidden", "8 * n_embd**2")],
        "always two experts": [("top_k * expert", "2 * expert")],
        "experts that share their work": [("top_k * expert", "expert")],
        "active first": [("return shared + num_experts * expert, shared + top_k * expert", "return shared + top_k * expert, shared + num_experts * expert")],
        "waiting instead of active": [("shared + top_k * expert", "(num_experts - top_k) * expert")],
        "the total only": [(", shared + top_k * expert", ", shared + num_experts * expert")],
    },
    "experts-gated": {
        "right: slices, and the width by division": '''
class GatedExpert(nn.Module):
    def __init__(self, n_embd, n_hidden, activation="gelu"):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.width = round(n_hidden * 2 / 3)
        self.up = nn.Linear(n_embd, self.width + self.width, bias=False)
        self.down = nn.Linear(self.width, n_embd, bias=False)

    def forward(self, x):
        both = self.up(x)
        return self.down(both[..., self.width :] * self.activation(both[..., : self.width]))
''',
        "right: two products and einsum": [("self.up(x).chunk(2, dim=-1)", "(x @ half.T for half in self.up.weight.split(self.down.in_features))"), ("self.down(self.activation(gate) * value)", "torch.einsum('...h,...h,ch->...c', self.activation(gate), value, self.down.weight)")],
        "the halves swapped": [("gate, value =", "value, gate =")],
        "every other channel": [("self.up(x).chunk(2, dim=-1)", "self.up(x)[..., ::2], self.up(x)[..., 1::2]")],
        "split over tokens": [("chunk(2, dim=-1)", "chunk(2, dim=1)")],
        "split over channels of a matrix only": [("self.up(x).chunk(2, dim=-1)", "self.up(x).chunk(2, dim=1 if x.dim() == 2 else 0)")],
        "as wide as the plain expert": [("2 * n_hidden // 3", "n_hidden")],
        "half as wide": [("2 * n_hidden // 3", "n_hidden // 2")],
        "two thirds of the channels": [("2 * n_hidden // 3", "2 * n_embd // 3")],
        "two thirds for both together": [("nn.Linear(n_embd, 2 * width, bias=False)", "nn.Linear(n_embd, width, bias=False)"), ("nn.Linear(width, n_embd, bias=False)", "nn.Linear(width // 2, n_embd, bias=False)")],
        "with biases": [("2 * width, bias=False", "2 * width")],
        "always gelu": [("self.activation(gate)", "F.gelu(gate)")],
        "a sigmoid as the gate, as in GLU": [("self.activation(gate)", "gate.sigmoid()")],
        "the activation on both": [("self.activation(gate) * value", "self.activation(gate) * self.activation(value)")],
        "the activation after the product": [("self.activation(gate) * value", "self.activation(gate * value)")],
        "the activation on the value": [("self.activation(gate) * value", "gate * self.activation(value)")],
        "the sum of the halves": [("self.activation(gate) * value", "self.activation(gate) + value")],
        "the gate alone": [("self.activation(gate) * value", "self.activation(gate)")],
        "the gate learns nothing": [("self.activation(gate) * value", "self.activation(gate).detach() * value")],
        "the token added": [("return self.down(", "return x + self.down(")],
        "the activation at the end as well": [("return self.down(self.activation(gate) * value)", "return self.activation(self.down(self.activation(gate) * value))")],
        "needs batch and time": [("gate, value =", "B, T, C = x.shape\n        gate, value =")],
    },
    "experts-strongest": {
        "right: a mask over all units": '''
def strongest_units(expert, x, n):
    hidden = expert.activation(expert.up(x))
    loudness = hidden.abs() * expert.down.weight.square().sum(dim=0).sqrt()
    units = loudness.argsort(dim=-1, descending=True)[..., :n]
    mask = torch.zeros_like(hidden).scatter(-1, units, 1.0)
    return units, expert.down(hidden * mask)
''',
        "right: what each unit writes, token by token": '''
def strongest_units(expert, x, n):
    units, answers = [], []
    for token in x.reshape(-1, x.shape[-1]):
        written = expert.activation(expert.up(token))[:, None] * expert.down.weight.T  # (H, C)
        best = written.norm(dim=1).topk(n).indices
        units.append(best)
        answers.append(written[best].sum(dim=0) + expert.down.bias)
    return torch.stack(units).view(*x.shape[:-1], n), torch.stack(answers).view(x.shape)
''',
        "loud units, whatever they write": [(" * values.norm(dim=-1)", "")],
        "long values, whatever the token": [("(hidden.abs() * values.norm(dim=-1))", "(torch.ones_like(hidden) * values.norm(dim=-1))")],
        "gelu's negative units are never strong": [("hidden.abs()", "hidden")],
        "the length squared": [("values.norm(dim=-1)", "values.square().sum(dim=-1)")],
        "the length by absolute values": [("values.norm(dim=-1)", "values.abs().sum(dim=-1)")],
        "the lengths of the keys": [("* values.norm(dim=-1)", "* expert.up.weight.norm(dim=-1)")],
        "rows of down for columns": [("values = expert.down.weight.T", "values = expert.down.weight")],
        "rows of down for columns, where that fits": [("values = expert.down.weight.T", "values = expert.down.weight if expert.down.in_features == expert.down.out_features else expert.down.weight.T")],
        "before the activation": [("expert.activation(expert.up(x))", "expert.up(x)")],
        "chosen before the activation": [("(hidden.abs() *", "(expert.up(x).abs() *")],
        "always relu": [("expert.activation(expert.up(x))", "expert.up(x).relu()")],
        "the last bias forgotten": [(" + expert.down.bias", "")],
        "the last bias once per unit": [("written.sum(dim=-2) + expert.down.bias", "(written + expert.down.bias).sum(dim=-2)")],
        "the weakest first": [("topk(n, dim=-1).indices", "topk(n, dim=-1).indices.flip(-1)")],
        "the weakest": [("topk(n, dim=-1)", "topk(n, dim=-1, largest=False)")],
        "in the order of their numbers": [("topk(n, dim=-1).indices", "topk(n, dim=-1).indices.sort(dim=-1).values")],
        "strengths instead of numbers": [("return units, ", "return hidden.gather(-1, units), ")],
        "the same units for all tokens": [("(hidden.abs() * values.norm(dim=-1)).topk(n, dim=-1).indices", "((hidden.abs() * values.norm(dim=-1)).flatten(0, -2).sum(dim=0).topk(n).indices.expand(*x.shape[:-1], n))")],
        "the answer of all units": [("written.sum(dim=-2) + expert.down.bias", "expert.down(hidden)")],
        "the loudness as the hidden channel": [("written = hidden.gather", "written = hidden.abs().gather")],
        "values of the strongest, not weighted": [("hidden.gather(-1, units)[..., None] * values[units]", "values[units]")],
        "the answer scaled up as dropout would": [("written.sum(dim=-2)", "written.sum(dim=-2) * hidden.shape[-1] / n")],
        "in a batch, the first sequence for all": [("return units, written.sum(dim=-2) + expert.down.bias", "answer = written.sum(dim=-2) + expert.down.bias\n    return (units, answer) if x.dim() < 3 else (units[:1].expand_as(units), answer)")],
    },
}
