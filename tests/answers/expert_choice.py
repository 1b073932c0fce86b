"Lesson 24. What goes wrong here: softmax over tokens, rows for columns, ties, sequences pooled, rounding, the future."

GATING = """
def expert_choice_gating(logits, capacity):
    if logits.dim() < 2:
        raise ValueError(f"sequences need logits (..., T, E), but they are {tuple(logits.shape)}")
    if not 0 <= capacity <= logits.shape[-2] or capacity % 1:
        raise ValueError(f"capacity is {capacity}, but must be a whole number from 0 to T = {logits.shape[-2]}")
"""
CHOSEN = "places(-S, dim=-2) < capacity"
GATES = "S.masked_fill(~chosen, 0)"
SHARE = "min(max(T * self.top_k // E, 1), T)"
LAST = "[model(ids[:, :t + 1]).logits[:, -1] for t in range(ids.shape[1])]"
RUNNING = "def running_choice(logits, top_k):\n"

ANSWERS = {
    "expert_choice_gating": {
        "right: one expert after another": GATING
        + """
    S = torch.softmax(logits, dim=-1)
    chosen = torch.zeros_like(S).bool()
    for e in range(S.shape[-1]):
        best = torch.sort(S[..., e], dim=-1, descending=True, stable=True).indices[..., :capacity]
        chosen[..., e].scatter_(-1, best, True)
    return Routing(gates=torch.where(chosen, S, torch.zeros_like(S)), logits=logits, chosen=chosen, kept=chosen.clone())
""",
        "right: G, I and P as in the paper": GATING
        + """
    S = (logits - logits.logsumexp(dim=-1, keepdim=True)).exp() if capacity == 0 else logits.softmax(-1)
    T = S.shape[-2]
    G, I = S.mT.sort(dim=-1, descending=True, stable=True)  # (..., E, T)
    P = F.one_hot(I[..., :capacity], max(T, 1))[..., :T]  # (..., E, capacity, T)
    chosen = P.sum(dim=-2).mT.bool()
    return Routing(torch.einsum("...ec,...ect->...te", G[..., :capacity], P.to(G)), logits, chosen, chosen)
""",
        "softmax over the tokens, as llm-random began": [("logits.softmax(dim=-1)", "logits.softmax(dim=-2)")],
        "largest logits, softmax over the tokens taken (pytorch-mixtures)": [
            (CHOSEN, "places(-logits, dim=-2) < capacity"),
            (GATES, "logits.masked_fill(~chosen, -1e9).softmax(dim=-2).masked_fill(~chosen, 0)"),
        ],
        "at least one token each": [(CHOSEN, "places(-S, dim=-2) < max(capacity, 1)")],
        "tokens choose": [(CHOSEN, "places(-S, dim=-1) < capacity")],
        "gates of a token made to sum to 1": [
            (GATES, f"({GATES} / {GATES}.sum(dim=-1, keepdim=True).clamp(min=1e-9))")
        ],
        "the batch is one long sequence": [
            (
                CHOSEN,
                """(places(-S.reshape(-1, S.shape[-1]), dim=0)
              < capacity * (S[..., 0].numel() // max(S.shape[-2], 1))).view(S.shape)""",
            )
        ],
        "of equals the later one": [(CHOSEN, "places(S, dim=-2) >= S.shape[-2] - capacity")],
        "topk, which takes any of equals": [
            (
                CHOSEN,
                """torch.zeros_like(S, dtype=torch.bool).scatter(
        -2, S.topk(int(capacity), dim=-2).indices, True)""",
            )
        ],
        "all that reach the smallest S taken": [
            (
                CHOSEN,
                """S >= (S.sort(dim=-2, descending=True).values[..., capacity - 1 : capacity, :]
                   if capacity else torch.inf)""",
            )
        ],
        "each token at most once": [
            (
                CHOSEN,
                """torch.zeros_like(S, dtype=torch.bool)
    for e in range(S.shape[-1]):
        free = S[..., e].masked_fill(chosen.any(dim=-1), -1.0)
        chosen[..., e] = (places(-free, dim=-1) < capacity) & (free >= 0)""",
            )
        ],
        "a gate of 0 taken for nothing taken": [(", chosen, kept=chosen)", ", S * chosen > 0, kept=chosen)")],
        "gates without a gradient": [(GATES, f"{GATES}.detach()")],
        "S in the place of the logits": [("0), logits, chosen", "0), S, chosen")],
        "always float32": [("logits.softmax(dim=-1)", "logits.float().softmax(dim=-1)")],
        "too large a capacity is silently T": [
            ("if not 0 <= capacity <= logits.shape[-2] or capacity % 1", "if capacity < 0 or capacity % 1")
        ],
    },
    "expert_choice_router": {
        "right: floor of a share": [
            (
                f"return expert_choice_gating(logits, {SHARE})",
                """share = self.top_k * T / E
        capacity = int(share) if share >= 1 else min(1, T)
        return expert_choice_gating(logits, capacity=capacity)""",
            )
        ],
        "right: its own linear layer": [
            (
                "logits = super().forward(x).logits  # (..., T, E)",
                """with torch.autocast(x.device.type, enabled=False):
            logits = x.float() @ self.linear.weight.float().T + self.linear.bias.float()""",
            )
        ],
        "rounded up": [(SHARE, "-(-T * self.top_k // E)")],
        "rounded to the nearest": [(SHARE, "min(max(round(T * self.top_k / E), 1), T)")],
        "no slot for short sequences": [(SHARE, "T * self.top_k // E")],
        "at least four slots": [(SHARE, "min(max(T * self.top_k // E, 4), T)")],
        "no k, as in Switch": [(SHARE, "min(max(T // E, 1), T)")],
        "share of all tokens of the batch": [(SHARE, "min(x[..., 0].numel() * self.top_k // E, T)")],
        "the batch is one long sequence": [
            (
                f"return expert_choice_gating(logits, {SHARE})",
                """N = logits[..., 0].numel()
        whole = expert_choice_gating(logits.reshape(-1, E), max(T * self.top_k // E, 1) * (N // T))
        return Routing(*(getattr(whole, name).view(logits.shape) for name in ("gates", "logits", "chosen", "kept")))""",
            )
        ],
        "always with a batch": [("T, E = logits.shape[-2:]", "B, T, E = logits.shape")],
        "top_k for the capacity": [(SHARE, "min(self.top_k, T)")],
        "tokens choose in evaluation": [
            (
                "return expert_choice_gating",
                """if not self.training:
            return super().forward(x)
        return expert_choice_gating""",
            )
        ],
        "scores in the type of x": [("super().forward(x).logits", "self.linear(x)")],
        "nothing is said about the future": [("    causal = False  # `stream` refuses it\n", "    causal = True\n")],
        "a capacity factor is let through": [("takes_capacity = False", "takes_capacity = True")],
        "the gradient ends at the logits": [("super().forward(x).logits ", "super().forward(x).logits.detach() ")],
    },
    "prefix_losses": {
        "right: row by row, no cross_entropy": """
def prefix_losses(model, ids, targets):
    losses = torch.empty(ids.shape)
    with torch.no_grad():
        for t in range(ids.shape[1]):
            for b in range(len(ids)):
                logits = model(ids[b, None, : t + 1]).logits[0, t]
                losses[b, t] = logits.logsumexp(0) - logits[targets[b, t]]
    return losses
""",
        "right: a list of losses": """
@torch.no_grad()
def prefix_losses(model, ids, targets):
    losses = []
    for end in range(1, ids.size(1) + 1):
        output = model(ids[:, :end])
        losses.append(F.cross_entropy(output.logits[:, end - 1], targets[:, end - 1], reduction="none"))
    return torch.stack(losses).T
""",
        "the whole context is read": [(LAST, "list(model(ids).logits.unbind(dim=1))")],
        "one token too few": [
            (LAST, "[model(ids[:, :max(t, 1)]).logits[:, -1] for t in range(ids.shape[1])]")
        ],
        "one token too many": [(LAST, "[model(ids[:, :t + 2]).logits[:, t] for t in range(ids.shape[1])]")],
        "only the token itself": [(LAST, "[model(ids[:, t:t + 1]).logits[:, -1] for t in range(ids.shape[1])]")],
        "from the end": [(LAST, "[model(ids[:, -t - 1:]).logits[:, -1] for t in range(ids.shape[1])]")],
        "the first position's logits": [(".logits[:, -1]", ".logits[:, 0]")],
        "the rest of the text replaced by zeros, which are read too": [
            (LAST, """[model(ids * (torch.arange(ids.shape[1]) <= t)).logits[:, t] for t in range(ids.shape[1])]""")
        ],
        "the loss of the ids instead of the targets": [("targets.flatten()", "ids.flatten()")],
        "rows and positions mixed up": [("dim=1)  # (B, T, V)", "dim=0)")],
        "one mean": [('reduction="none").view(targets.shape)', 'reduction="mean")')],
        "in bits": [("view(targets.shape)", "view(targets.shape) / 0.6931")],
        "sizes of 1 lost": [("dim=1)  # (B, T, V)", "dim=1).squeeze()  # (B, T, V)")],
        "with the graph of the model": [("@torch.no_grad()\n", "")],
    },
    "running_choice": {
        "right: prefix by prefix": RUNNING
        + """
    S, E, chosen = logits.softmax(dim=-1), logits.shape[-1], []
    for t in range(logits.shape[-2]):
        place = places(-S[..., : t + 1, :], dim=-2)[..., -1, :]
        chosen.append(place < max(1, top_k * (t + 1) // E))
    chosen = torch.stack(chosen, dim=-2)
    return Routing(S * chosen, logits, chosen, chosen)
""",
        "right: a lower triangle": RUNNING
        + """
    S = torch.softmax(logits, -1)
    T, E = S.shape[-2:]
    columns = S.mT  # (..., E, T)
    not_worse = (columns.unsqueeze(-2) >= columns.unsqueeze(-1)).tril(diagonal=-1)  # (..., E, t, s)
    share = torch.arange(1, T + 1, device=S.device).mul(top_k).div(E, rounding_mode="floor").clamp(min=1)
    chosen = (not_worse.sum(dim=-1) < share).mT
    return Routing(torch.where(chosen, S, 0.0 * S), logits, chosen, chosen)
""",
        "the future counts too": [("ahead & (t < t[:, None])[..., None]", "ahead & (t != t[:, None])[..., None]")],
        "the past is what comes after": [("(t < t[:, None])", "(t > t[:, None])")],
        "the whole share from the first token on": [("((t + 1) * top_k // E)", "(T * top_k // E + 0 * t)")],
        "the share of t tokens": [("((t + 1) *", "(t *")],
        "rounded up": [("((t + 1) * top_k // E)", "-(-(t + 1) * top_k // E)")],
        "no slot at the beginning": [(".clamp(min=1)", "")],
        "of equals the later one first": [("S[..., None, :, :] >= S", "S[..., None, :, :] > S")],
        "the token counts itself": [("(t < t[:, None])", "(t <= t[:, None])")],
        "logits are compared": [
            ("S[..., None, :, :] >= S[..., :, None, :]", "logits[..., None, :, :] >= logits[..., :, None, :]")
        ],
        "softmax over the tokens": [("logits.softmax(dim=-1)", "logits.softmax(dim=-2)")],
        "one sequence only": [("ahead.sum(dim=-2)", "ahead.sum(dim=1)")],
        "gates without a gradient": [(GATES, f"{GATES}.detach()")],
        "expert choice on the whole": RUNNING
        + """
    T, E = logits.shape[-2:]
    return expert_choice_gating(logits, max(T * top_k // E, 1))
""",
    },
}
