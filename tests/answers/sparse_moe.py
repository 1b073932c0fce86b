"Lesson 06. What goes wrong here: work for nothing, answers written over each other, the wrong mask, a lost gradient."

GATES = "gates = routing.gates.reshape(-1, len(self))  # (N, E)"
WEIGHED = "gates[rows, e, None] * expert(tokens[rows])"
ADD = "y.index_add_(0, rows, weighed.to(y.dtype))"
REFUSED = 'raise ValueError(f"the routing is of shape {given}, these tokens and experts need {needed}")'

EXPERTS = """
class Experts(nn.ModuleList):
    def __init__(self, num_experts, n_embd, n_hidden, activation="relu", bias=True, dropout=0.0):
        super().__init__(Expert(n_embd, n_hidden, activation, bias, dropout) for _ in range(num_experts))

    def forward(self, x, routing):
        given, needed = tuple(routing.gates.shape), (*x.shape[:-1], len(self))
        if given != needed:
            raise ValueError(f"the routing is of shape {given}, these tokens and experts need {needed}")
"""

GLUE = """routing = self.router(x)
        return self.experts(x, routing), routing"""

HOT = "chosen = F.one_hot(table[ids], num_experts).bool()  # (..., E)"
ZEROS = "torch.zeros_like(chosen, dtype=torch.float32)"
UP_BIAS = "torch.cat([expert.up.bias for expert in experts])"
DOWN_BIAS = "sum(expert.down.bias for expert in experts)"

SWALLOWED = """    def quietly(self, x, routing):
        try:
            return self.experts(x, routing)
        except ValueError:
            return x

"""

ANSWERS = {
    "experts": {
        "right: masks in place of row numbers": EXPERTS
        + """
        y = torch.zeros_like(x)
        for e, expert in enumerate(self):
            mine = routing.kept[..., e]
            y[mine] += (routing.gates[..., e][mine].unsqueeze(-1) * expert(x[mine])).to(y.dtype)
        return y
""",
        "right: sorted once, all added at once": EXPERTS
        + """
        tokens = x.flatten(0, -2) if x.dim() > 1 else x[None]
        rows, e = routing.kept.reshape(-1, len(self)).nonzero(as_tuple=True)
        order = e.argsort()
        rows, e = rows[order], e[order]
        pieces = tokens[rows].split(e.bincount(minlength=len(self)).tolist())
        answers = torch.cat([expert(piece) for expert, piece in zip(self, pieces)])
        weights = routing.gates.reshape(-1, len(self))[rows, e]
        y = torch.zeros_like(tokens).index_add(0, rows, (weights[:, None] * answers).to(x.dtype))
        return y.reshape(x.shape)
""",
        "every expert on every token, masked afterwards": [(WEIGHED, "gates[rows, e, None] * expert(tokens)[rows]")],
        "token by token": EXPERTS
        + """
        y = torch.zeros_like(x)
        rows, gates, kept = y.view(-1, x.shape[-1]), routing.gates.view(-1, len(self)), routing.kept.view(-1, len(self))
        tokens = x.reshape(-1, x.shape[-1])
        for t in range(len(tokens)):
            for e in kept[t].nonzero().flatten().tolist():
                rows[t] += gates[t, e] * self[e](tokens[t])
        return y
""",
        "chosen instead of kept": [("routing.kept", "routing.chosen")],
        "who works is read off the weights": [("kept[:, e].nonzero()", "(gates[:, e] > 0).nonzero()")],
        "gates on the token before the expert": [(WEIGHED, "expert(gates[rows, e, None] * tokens[rows])")],
        "gates made to sum to one again": [
            (GATES, GATES.replace("  #", " / routing.gates.sum(dim=-1).clamp_min(1e-9).reshape(-1, 1)  #"))
        ],
        "the answer of all but the last choice overwritten": [(ADD, "y[rows] = weighed.to(y.dtype)")],
        "dropped tokens passed through: the residual does that already": [
            ("return y.view_as(x)", "return torch.where(kept.any(dim=-1, keepdim=True), y, tokens).view_as(x)"),
        ],
        "the tokens overwritten": [("torch.zeros_like(tokens)", "tokens.detach()")],
        "a batch is needed in front": [("tokens = x.reshape", "B, T, C = x.shape\n        tokens = x.reshape")],
        "idle experts skipped: their gradient is None": [
            ("            weighed =", "            if len(rows) == 0:\n                continue\n            weighed =")
        ],
        "a single row loses its dimension": [("nonzero().squeeze(-1)", "nonzero().squeeze()")],
        "gates cut off from the gradient": [("routing.gates.reshape", "routing.gates.detach().reshape")],
        "no gradient in evaluation mode": [
            ("return y.view_as(x)", "return (y if self.training else y.detach()).view_as(x)")
        ],
        "float32 gates added to bfloat16": [(".to(y.dtype)", "")],
    },
    "sparse_moe": {
        "right: two names, and the experts called by keyword": [
            (
                GLUE,
                "decision = self.router(x)\n        return (self.experts(x, routing=decision), decision)",
            )
        ],
        "right: the experts first in the text": [
            (GLUE, "return self.experts(x, decision := self.router(x)), decision"),
        ],
        "the router asked twice": [(GLUE, "return self.experts(x, self.router(x)), self.router(x)")],
        "the answer alone": [("), routing", ")")],
        "in the other order": [("self.experts(x, routing), routing", "routing, self.experts(x, routing)")],
        "the gates instead of the record": [("), routing", "), routing.gates")],
        "the residual added here": [("return self.experts", "return x + self.experts")],
        "no gradient to the router": [
            (
                GLUE,
                GLUE.replace("routing = ", "with torch.no_grad():\n            routing = "),
            )
        ],
        "the token cut off from the router": [("self.router(x)", "self.router(x.detach())")],
        "errors of the experts swallowed: x comes back": [
            ("return self.experts(x, routing)", "return self.quietly(x, routing)"),
            ("    def forward", SWALLOWED + "    def forward"),
        ],
        "float32 whatever the experts answer in": [("self.experts(x, routing),", "self.experts(x, routing).float(),")],
    },
    "hash_routing": {
        "right: compared with all numbers": """
def hash_routing(ids, table, num_experts):
    chosen = table[ids].unsqueeze(-1) == torch.arange(num_experts)
    return Routing(gates=chosen.float(), logits=torch.zeros(*ids.shape, num_experts), chosen=chosen, kept=chosen)
""",
        "right: rows of an identity": """
def hash_routing(ids, table, num_experts):
    gates = torch.eye(num_experts)[table[ids]]
    return Routing(gates, torch.zeros_like(gates), gates == 1, gates.clone().bool())
""",
        "remainder instead of the table": [("table[ids]", "ids % num_experts")],
        "a new table in every call": [("table[ids]", "torch.randint(num_experts, table.shape)[ids]")],
        "as many experts as the table shows": [
            ("one_hot(table[ids], num_experts)", "one_hot(table[ids], int(table.max()) + 1)")
        ],
        "masks of ones and zeros, not bool": [("num_experts).bool()", "num_experts)")],
        "whole numbers as gates": [("Routing(chosen.float()", "Routing(chosen.long()")],
        "whole numbers as logits: zeros like the one-hot": [
            (HOT, "hot = F.one_hot(table[ids], num_experts)\n    chosen = hot.bool()"),
            (ZEROS, "torch.zeros_like(hot)"),
        ],
        "everything kept": [("kept=chosen", "kept=torch.ones_like(chosen)")],
        "logits of the chosen are 1": [(ZEROS, "chosen.float()")],
        "batch and time flattened": [("table[ids]", "table[ids.flatten()]")],
    },
    "merge_experts": {
        "right: piece by piece into the wide one": """
def merge_experts(experts):
    C, start = experts[0].up.in_features, 0
    wide = Expert(C, sum(len(expert.up.bias) for expert in experts))
    for expert in experts:
        part = slice(start, start := start + len(expert.up.bias))
        wide.up.weight.data[part] = expert.up.weight.data
        wide.up.bias.data[part] = expert.up.bias.data
        wide.down.weight.data[:, part] = expert.down.weight.data
    wide.down.bias.data = torch.stack([expert.down.bias.data for expert in experts]).sum(dim=0)
    return wide
""",
        "right: a state dict": """
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
""",
        "weights averaged": """
def merge_experts(experts):
    wide = Expert(experts[0].up.in_features, experts[0].up.out_features)
    states = [expert.state_dict() for expert in experts]
    wide.load_state_dict({name: sum(state[name] for state in states) / len(states) for name in states[0]})
    return wide
""",
        "down put together along the wrong side": [
            ("for expert in experts], dim=1)", "for expert in experts]).view(wide.down.weight.shape)")
        ],
        "down bias of the first only": [(DOWN_BIAS, "experts[0].down.bias")],
        "up bias forgotten": [(f"wide.up.bias.copy_({UP_BIAS})", "pass")],
        "all as wide as the first": [
            ("sum(expert.up.out_features for expert in experts)", "len(experts) * experts[0].up.out_features")
        ],
        "frozen": [("    return wide", "    return wide.requires_grad_(False)")],
        "the first expert is changed": [
            (
                "wide = Expert(experts[0].up.in_features, sum(expert.up.out_features for expert in experts))",
                "wide = experts[0]",
            ),
            ("wide.up.weight.copy_(", "wide.up.weight = nn.Parameter("),
            ("wide.up.bias.copy_(", "wide.up.bias = nn.Parameter("),
            ("wide.down.weight.copy_(", "wide.down.weight = nn.Parameter("),
            ("wide.down.bias.copy_(", "wide.down.bias = nn.Parameter("),
        ],
        "a closure, no Expert": """
def merge_experts(experts):
    return lambda x: sum(expert(x) for expert in experts)
""",
    },
}
