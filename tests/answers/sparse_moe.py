"Lesson 06. What goes wrong here: work that nobody asked for, answers written over each other, the wrong mask, a lost gradient."

TOKENS = "tokens = x.reshape(-1, x.shape[-1])  # (N, C)"
GATES = "gates = routing.gates.reshape(-1, len(self))  # (N, E)"
ROWS = "rows = kept[:, e].nonzero().squeeze(-1)  # the tokens of expert e"
WEIGHED = "gates[rows, e, None] * expert(tokens[rows])"
ADD = "y.index_add_(0, rows, weighed.to(y.dtype))"

EXPERTS = '''
class Experts(nn.ModuleList):
    def __init__(self, num_experts, n_embd, n_hidden, activation="relu", bias=True, dropout=0.0):
        super().__init__(Expert(n_embd, n_hidden, activation, bias, dropout) for _ in range(num_experts))

    def forward(self, x, routing):
        given, needed = tuple(routing.gates.shape), (*x.shape[:-1], len(self))
        if given != needed:
            raise ValueError(f"the routing is of shape {given}, these tokens and experts need {needed}")
'''

GLUE = """routing = self.router(x)
        return self.experts(x, routing), routing"""

SHARED = "return self.experts(x, routing) + self.shared(x), routing"
UP_BIAS = "torch.cat([expert.up.bias for expert in experts])"
DOWN_BIAS = "sum(expert.down.bias for expert in experts)"
SHARED_MOE = '''
class SharedMoE(nn.Module):
    def __init__(self, router, experts, shared):
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared

    def forward(self, x):
        routing = self.router(x)
        y = self.shared(x)
        return y + self.experts(x, routing), routing


'''

PAIRS = "e, rows = kept.T.nonzero(as_tuple=True)"
TOGETHER = "return torch.zeros_like(tokens).index_add(0, rows, gates[rows, e, None] * answers).view_as(x)"

ANSWERS = {
    "sparse-moe-experts": {
        "right: masks in place of row numbers": EXPERTS + '''
        y = torch.zeros_like(x)
        for e, expert in enumerate(self):
            mine = routing.kept[..., e]
            y[mine] += (routing.gates[..., e][mine].unsqueeze(-1) * expert(x[mine])).to(y.dtype)
        return y
''',
        "right: sorted once, all added at once": EXPERTS + '''
        tokens = x.flatten(0, -2) if x.dim() > 1 else x[None]
        rows, e = routing.kept.reshape(-1, len(self)).nonzero(as_tuple=True)
        order = e.argsort()
        rows, e = rows[order], e[order]
        pieces = tokens[rows].split(e.bincount(minlength=len(self)).tolist())
        answers = torch.cat([expert(piece) for expert, piece in zip(self, pieces)])
        weights = routing.gates.reshape(-1, len(self))[rows, e]
        y = torch.zeros_like(tokens).index_add(0, rows, (weights[:, None] * answers).to(x.dtype))
        return y.reshape(x.shape)
''',
        "right: the last expert first, scatter_add": [
            ("for e, expert in enumerate(self):", "for e, expert in reversed(list(enumerate(self))):"),
            (ADD, "y.scatter_add_(0, rows[:, None].expand_as(weighed), weighed.to(y.dtype))"),
        ],
        "every expert on every token": EXPERTS + '''
        answers = torch.stack([expert(x) for expert in self], dim=-1)
        return torch.einsum("...e,...ce->...c", routing.gates * routing.kept, answers)
''',
        "every expert on every token, masked afterwards": [
            (WEIGHED, "gates[rows, e, None] * expert(tokens)[rows]"),
        ],
        "token by token": EXPERTS + '''
        y = torch.zeros_like(x)
        rows, gates, kept = y.view(-1, x.shape[-1]), routing.gates.view(-1, len(self)), routing.kept.view(-1, len(self))
        tokens = x.reshape(-1, x.shape[-1])
        for t in range(len(tokens)):
            for e in kept[t].nonzero().flatten().tolist():
                rows[t] += gates[t, e] * self[e](tokens[t])
        return y
''',
        "sequence by sequence": EXPERTS + '''
        if x.dim() > 2:
            parts = [type(routing)(*fields) for fields in zip(routing.gates, routing.logits, routing.chosen, routing.kept)]
            return torch.stack([self(one, part) for one, part in zip(x, parts)])
        y = torch.zeros_like(x)
        for e, expert in enumerate(self):
            mine = routing.kept[..., e]
            y[mine] += routing.gates[..., e][mine][..., None] * expert(x[mine])
        return y
''',
        "chosen instead of kept": [("routing.kept", "routing.chosen")],
        "who works is read off the weights": [("kept[:, e].nonzero()", "(gates[:, e] > 0).nonzero()")],
        "who works is read off the weights, of any sign": [("kept[:, e].nonzero()", "(gates[:, e] != 0).nonzero()")],
        "only each token's best expert": [("kept[:, e].nonzero()", "(kept[:, e] & (gates.argmax(dim=-1) == e)).nonzero()")],
        "only the experts of the first token": [("for e, expert in enumerate(self):", "for e in kept[0].nonzero().flatten().tolist():\n            expert = self[e]")],
        "no gates": [(WEIGHED, "expert(tokens[rows])")],
        "gates on the token before the expert": [(WEIGHED, "expert(gates[rows, e, None] * tokens[rows])")],
        "gates of the first tokens instead of its own": [(WEIGHED, "gates[:len(rows), e, None] * expert(tokens[rows])")],
        "gates shared among the channels": [(WEIGHED, "gates[rows, e].mean() * expert(tokens[rows])")],
        "gates made to sum to one again": [(GATES, GATES.replace("  #", " / routing.gates.sum(dim=-1).clamp_min(1e-9).reshape(-1, 1)  #"))],
        "written instead of added": [(ADD, "y[rows] = weighed.to(y.dtype)")],
        "averaged over the experts": [("return y.view_as(x)", "return y.view_as(x) / kept.sum(dim=-1).clamp_min(1).view(*x.shape[:-1], 1)")],
        "the token passed through, too": [("torch.zeros_like(tokens)", "tokens.clone()")],
        "dropped tokens passed through: the residual does that already": [
            ("return y.view_as(x)", "return torch.where(kept.any(dim=-1, keepdim=True), y, tokens).view_as(x)"),
        ],
        "the tokens overwritten": [("torch.zeros_like(tokens)", "tokens")],
        "left as a list of tokens": [("return y.view_as(x)", "return y")],
        "batch and time swapped": [("x.reshape(-1", "(x.transpose(0, 1) if x.dim() == 3 else x).reshape(-1")],
        "view: fails when the memory is in another order": [("x.reshape(-1", "x.view(-1")],
        "a batch is needed in front": [(TOKENS, "B, T, C = x.shape\n        tokens = x.reshape(B * T, C)")],
        "idle experts skipped: their gradient is None": [("            weighed =", "            if len(rows) == 0:\n                continue\n            weighed =")],
        "idle experts skipped, their gradient of 0 added by hand": [
            ("            weighed =", "            if len(rows) == 0:\n                y = y + 0 * sum(weight.sum() for weight in expert.parameters())\n                continue\n            weighed ="),
        ],
        "always four experts": [(GATES, GATES.replace("len(self)", "4"))],
        "gates below 0 raised to 0": [(WEIGHED, "gates[rows, e, None].clamp(min=0) * expert(tokens[rows])")],
        "a single row loses its dimension": [("nonzero().squeeze(-1)", "nonzero().squeeze()")],
        "gates cut off from the gradient": [("routing.gates.reshape", "routing.gates.detach().reshape")],
        "tokens cut off from the gradient": [("expert(tokens[rows])", "expert(tokens[rows].detach())")],
        "everything cut off from the gradient": [("weighed.to(y.dtype)", "weighed.detach().to(y.dtype)")],
        "float32 whatever the tokens are": [("torch.zeros_like(tokens)", "torch.zeros(tokens.shape)")],
        "float32 gates added to bfloat16": [(".to(y.dtype)", "")],
        "an expert for two": [("expert(tokens[rows])", "self[e // 2](tokens[rows])")],
    },
    "sparse-moe-layer": {
        "right: two names, and the modules called by keyword": '''
class SparseMoE(nn.Module):
    def __init__(self, router, experts):
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, x):
        decision = self.router(x)
        answer = self.experts(x, routing=decision)
        return (answer, decision)
''',
        "the router asked twice": [(GLUE, "return self.experts(x, self.router(x)), self.router(x)")],
        "the answer alone": [("), routing", ")")],
        "in the other order": [("self.experts(x, routing), routing", "routing, self.experts(x, routing)")],
        "a list": [("return self.experts(x, routing), routing", "return [self.experts(x, routing), routing]")],
        "the gates instead of the record": [("), routing", "), routing.gates")],
        "the residual added here": [("return self.experts", "return x + self.experts")],
        "the gates multiplied once more": [("self.experts(x, routing),", "self.experts(x, routing) * routing.gates.sum(dim=-1, keepdim=True) / len(x),")],
        "no gradient to the router": [(GLUE, "with torch.no_grad():\n            routing = self.router(x)\n        return self.experts(x, routing), routing")],
        "the token cut off from the router": [("self.router(x)", "self.router(x.detach())")],
        "the token cut off from the experts": [("self.experts(x, routing)", "self.experts(x.detach(), routing)")],
        "the record of the answer": [(GLUE, "y = self.experts(x, self.router(x))\n        return y, self.router(y)")],
        "dropped choices carried out after all": [
            ("self.experts(x, routing)", "self.experts(x, type(routing)(routing.gates, routing.logits, routing.chosen, routing.chosen))"),
        ],
        "weights without a gradient": [
            ("self.experts(x, routing)", "self.experts(x, type(routing)(routing.gates.detach(), routing.logits, routing.chosen, routing.kept))"),
        ],
        "float32 whatever the experts answer in": [("self.experts(x, routing),", "self.experts(x, routing).float(),")],
        "the answer halved while it trains": [("self.experts(x, routing),", "self.experts(x, routing) * (0.5 if self.training else 1.0),")],
    },
    "sparse-moe-hash": {
        "right: compared with all numbers": '''
def hash_routing(ids, table, num_experts):
    chosen = table[ids].unsqueeze(-1) == torch.arange(num_experts)
    return Routing(gates=chosen.float(), logits=torch.zeros(*ids.shape, num_experts), chosen=chosen, kept=chosen)
''',
        "right: rows of an identity": '''
def hash_routing(ids, table, num_experts):
    gates = torch.eye(num_experts)[table[ids]]
    return Routing(gates, torch.zeros_like(gates), gates == 1, gates.clone().bool())
''',
        "remainder instead of the table": [("table[ids]", "ids % num_experts")],
        "by the place in the text instead of the character": [("table[ids]", "table[torch.arange(ids.shape[-1])].expand_as(ids)")],
        "a new table in every call": [("table[ids]", "torch.randint(num_experts, table.shape)[ids]")],
        "the table looked up backwards": [("table[ids]", "table.argsort()[ids] % num_experts")],
        "as many experts as the table shows": [("F.one_hot(table[ids], num_experts)", "F.one_hot(table[ids], int(table.max()) + 1)")],
        "always eight experts": [("F.one_hot(table[ids], num_experts)", "F.one_hot(table[ids], 8)")],
        "masks of ones and zeros, not bool": [("num_experts).bool()", "num_experts)")],
        "whole numbers as gates": [("Routing(chosen.float()", "Routing(chosen.long()")],
        "everything kept": [("kept=chosen", "kept=torch.ones_like(chosen)")],
        "equal gates for all experts": [("Routing(chosen.float()", "Routing(torch.full(chosen.shape, 1 / num_experts)")],
        "a softmax over the one-hot": [("Routing(chosen.float()", "Routing(chosen.float().softmax(dim=-1)")],
        "logits of the chosen are 1": [("torch.zeros(chosen.shape)", "chosen.float()")],
        "batch and time flattened": [("table[ids]", "table[ids.flatten()]")],
        "everything to the expert of the first character": [("table[ids]", "table[ids[..., :1]].expand_as(ids)")],
    },
    "sparse-moe-shared": {
        "right: piece by piece into the wide one": SHARED_MOE + '''
def merge_experts(experts):
    H, C = experts[0].up.weight.shape
    wide = Expert(C, H * len(experts))
    for s, expert in enumerate(experts):
        part = slice(s * H, (s + 1) * H)
        wide.up.weight.data[part] = expert.up.weight.data
        wide.up.bias.data[part] = expert.up.bias.data
        wide.down.weight.data[:, part] = expert.down.weight.data
    wide.down.bias.data = torch.stack([expert.down.bias.data for expert in experts]).sum(dim=0)
    return wide
''',
        "right: a state dict": SHARED_MOE + '''
def merge_experts(experts):
    states = [expert.state_dict() for expert in experts]
    merged = {
        "up.weight": torch.cat([state["up.weight"] for state in states]),
        "up.bias": torch.cat([state["up.bias"] for state in states]),
        "down.weight": torch.cat([state["down.weight"] for state in states], dim=-1),
        "down.bias": sum(state["down.bias"] for state in states),
    }
    wide = Expert(merged["up.weight"].shape[1], len(merged["up.bias"]))
    wide.load_state_dict(merged)
    return wide
''',
        "layer: the shared expert weighted by the gates": [(SHARED, SHARED.replace("self.shared(x)", "routing.gates.amax(dim=-1, keepdim=True) * self.shared(x)"))],
        "layer: the average of both": [(SHARED, "return (self.experts(x, routing) + self.shared(x)) / 2, routing")],
        "layer: one after the other": [(SHARED, "return self.shared(self.experts(x, routing)), routing")],
        "layer: the residual added here": [(SHARED, SHARED.replace("return", "return x +"))],
        "layer: only for tokens that somebody kept": [(SHARED, SHARED.replace("self.shared(x)", "routing.kept.any(dim=-1, keepdim=True) * self.shared(x)"))],
        "layer: only for tokens that nobody kept": [(SHARED, SHARED.replace("self.shared(x)", "~routing.kept.any(dim=-1, keepdim=True) * self.shared(x)"))],
        "layer: the router asked twice": [(SHARED, SHARED.replace("(x, routing)", "(x, self.router(x))"))],
        "layer: the shared expert without a gradient": [(SHARED, SHARED.replace("self.shared(x)", "self.shared(x).detach()"))],
        "layer: the answer alone": [(SHARED, SHARED.removesuffix(", routing"))],
        "layer: shared sees each sequence alone": [(SHARED, SHARED.replace("self.shared(x)", "torch.stack([self.shared(row) for row in x])"))],
        "layer: the shared expert for every kept choice": [(SHARED, SHARED.replace("self.shared(x)", "routing.kept.sum(dim=-1, keepdim=True) * self.shared(x)"))],
        "merge: weights averaged": SHARED_MOE + '''
def merge_experts(experts):
    wide = Expert(experts[0].up.in_features, experts[0].up.out_features)
    states = [expert.state_dict() for expert in experts]
    wide.load_state_dict({name: sum(state[name] for state in states) / len(states) for name in states[0]})
    return wide
''',
        "merge: down put together along the wrong side": [("for expert in experts], dim=1)", "for expert in experts]).view(wide.down.weight.shape)")],
        "merge: down bias of the first only": [(DOWN_BIAS, "experts[0].down.bias")],
        "merge: down bias averaged": [(DOWN_BIAS, DOWN_BIAS + " / len(experts)")],
        "merge: up bias forgotten": [(f"wide.up.bias.copy_({UP_BIAS})", "pass")],
        "merge: always three": [("sum(expert.up.out_features for expert in experts)", "3 * experts[0].up.out_features")],
        "merge: the first expert is changed": [
            ("wide = Expert(experts[0].up.in_features, sum(expert.up.out_features for expert in experts))",
             "wide = experts[0]"),
            ("wide.up.weight.copy_(", "wide.up.weight = nn.Parameter("), ("wide.up.bias.copy_(", "wide.up.bias = nn.Parameter("),
            ("wide.down.weight.copy_(", "wide.down.weight = nn.Parameter("), ("wide.down.bias.copy_(", "wide.down.bias = nn.Parameter("),
        ],
    },
    "sparse-moe-sorted": {
        "right: argsort, slices": '''
def sorted_mixture(experts, x, routing):
    E, tokens = len(experts), x.reshape(-1, x.shape[-1])
    rows, e = routing.kept.reshape(-1, E).nonzero(as_tuple=True)
    order = e.argsort()
    gathered, answers, start = tokens[rows[order]], [], 0
    for expert, size in zip(experts, routing.load.tolist()):
        answers.append(expert(gathered[start:start + size]))
        start += size
    weights = routing.gates.reshape(-1, E)[rows[order], e[order]].unsqueeze(1)
    y = torch.zeros_like(tokens)
    y.index_add_(0, rows[order], weights * torch.cat(answers))
    return y.reshape(x.shape)
''',
        "right: flat numbers of the pairs, scatter_add": '''
def sorted_mixture(experts, x, routing):
    C, E = x.shape[-1], len(experts)
    by_expert = routing.kept.reshape(-1, E).T.reshape(-1)  # (E * N,)
    N = len(by_expert) // E
    pairs = by_expert.nonzero().squeeze(1)
    rows = pairs % N
    sizes = by_expert.view(E, N).sum(dim=1).tolist()
    pieces = torch.split(x.reshape(-1, C)[rows], sizes)
    answers = torch.cat([f(piece) for f, piece in zip(experts, pieces)])
    weights = routing.gates.reshape(-1, E).T.reshape(-1)[pairs]
    weighed = answers * weights[:, None]
    return torch.zeros(N, C, dtype=x.dtype).scatter_add(0, rows[:, None].expand(-1, C), weighed).reshape(x.shape)
''',
        "a gather and an add for every expert": '''
def sorted_mixture(experts, x, routing):
    E, tokens = len(experts), x.reshape(-1, x.shape[-1])
    gates, kept, y = routing.gates.reshape(-1, E), routing.kept.reshape(-1, E), torch.zeros_like(tokens)
    for e, expert in enumerate(experts):
        rows = kept[:, e].nonzero().squeeze(-1)
        y = y.index_add(0, rows, gates[rows, e, None] * expert(tokens[rows]))
    return y.view_as(x)
''',
        "one gather, but an add for every expert": '''
def sorted_mixture(experts, x, routing):
    E, tokens = len(experts), x.reshape(-1, x.shape[-1])
    e, rows = routing.kept.reshape(-1, E).T.nonzero(as_tuple=True)
    sizes, y = routing.load.tolist(), torch.zeros_like(tokens)
    weights = routing.gates.reshape(-1, E)[rows, e, None]
    for expert, r, piece, w in zip(experts, rows.split(sizes), tokens[rows].split(sizes), weights.split(sizes)):
        y = y.index_add(0, r, w * expert(piece))
    return y.view_as(x)
''',
        "every expert on every token": "def sorted_mixture(experts, x, routing):\n    return dense_mixture(experts, x, routing)",
        "the pairs token by token": [(PAIRS, "rows, e = kept.nonzero(as_tuple=True)")],
        "chosen instead of kept": [("routing.kept", "routing.chosen")],
        "pieces of equal size": [(".split(kept.sum(dim=0).tolist())", ".tensor_split(len(experts))")],
        "sizes counted per token": [("kept.sum(dim=0)", "kept.sum(dim=1)")],
        "the answers of k experts collide: += counts a row once": [
            (TOGETHER, "y = torch.zeros_like(tokens)\n    y[rows] += gates[rows, e, None] * answers\n    return y.view_as(x)"),
        ],
        "no gates": [("gates[rows, e, None] * answers", "answers")],
        "gates in the order of the tokens": [("gates[rows, e, None]", "gates[kept][:, None]")],
        "put back in the wrong order": [("index_add(0, rows,", "index_add(0, rows.sort().values,")],
        "two experts per token taken for granted": [
            (TOGETHER, "back = rows.argsort(stable=True)\n    return (gates[rows, e, None] * answers)[back].view(len(tokens), 2, -1).sum(dim=1).view_as(x)"),
        ],
        "idle experts skipped: their gradient is None": [("zip(experts, pieces)]", "zip(experts, pieces) if len(piece)]")],
        "gates cut off from the gradient": [("gates[rows, e, None]", "gates[rows, e, None].detach()")],
        "tokens cut off from the gradient": [("tokens[rows].split", "tokens[rows].detach().split")],
        "left as a list of tokens": [(".view_as(x)", "")],
        "a batch is needed in front": [("tokens = x.reshape(-1, x.shape[-1])", "B, T, C = x.shape\n    tokens = x.reshape(B * T, C)")],
    },
}
