"Lesson 07. What goes wrong here: rounding, k, the order of the choices, ties, sequences pooled, gradients cut."

GUARDS = """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}, but must lie between 1 and num_experts = {num_experts}")
    if not 0 < capacity_factor < math.inf:
        raise ValueError(f"capacity_factor is {capacity_factor}, but must be above 0 and finite")
"""

LIMIT = """
PRIORITIES = "position", "choice", "probability"


def limit_to_capacity(routing, capacity, priority="position"):
    if priority not in PRIORITIES:
        raise ValueError(f"priority is {priority!r}, but must be one of {', '.join(PRIORITIES)}")
    if capacity < 0 or capacity % 1:
        raise ValueError(f"capacity is {capacity}, but must be a whole number of slots, 0 or more")
"""

TURN = "    turn = torch.arange(T, device=wanted.device)[:, None].expand_as(wanted)  # (..., T, E)\n"
KEPT = "kept = wanted & (place < min(capacity, T))"
RETURN = "    return replace("
CEIL = "max(math.ceil(round(slots, 6)), minimum)"

ANSWERS = {
    "expert_capacity": {
        "right: with fractions": """
from fractions import Fraction


def expert_capacity(tokens, num_experts, top_k, capacity_factor, minimum=4):"""
        + GUARDS
        + """
    slots = Fraction(str(capacity_factor)).limit_denominator(10**6) * Fraction(top_k * tokens, num_experts)
    return min(max(math.ceil(slots), minimum), 2**53)
""",
        "right: a little less, then up": """
def expert_capacity(tokens, num_experts, top_k, capacity_factor, minimum=4):"""
        + GUARDS
        + """
    slots = capacity_factor * (top_k * tokens / num_experts) - 1e-7
    if slots > 2**53:
        return 2**53
    return max(minimum, int(slots) + (slots > int(slots)))
""",
        "rounded down, as makeMoE does": [("math.ceil(round(slots, 6))", "int(slots)")],
        "rounded to the nearest, as Flaxformer does": [("math.ceil(round(slots, 6))", "round(slots)")],
        "up without a thought for binary fractions": [("math.ceil(round(slots, 6))", "math.ceil(slots)")],
        "one more than rounded down, even where it is whole": [
            ("math.ceil(round(slots, 6))", "int(round(slots, 6)) + 1")
        ],
        "rounded so hard that a small rest is lost": [("round(slots, 6)", "round(slots, 1)")],
        "no k, as in Switch": [("capacity_factor * top_k * tokens", "capacity_factor * tokens")],
        "k of the lesson": [("* top_k *", "* 2 *")],
        "always at least 4": [(", minimum)  #", ", 4)  #")],
        "minimum taken for a maximum": [("return max(", "return min(")],
        "never more slots than tokens, as in ST-MoE": [(CEIL, f"min(tokens, {CEIL})")],
        "a float": [(CEIL, f"float({CEIL})")],
        "a factor below 1 lifted to 1": [("min(capacity_factor", "min(max(capacity_factor, 1)")],
        "an error for an enormous factor": [
            (
                "min(capacity_factor * top_k * tokens / num_experts, 2.0**53)",
                "capacity_factor * top_k * tokens / num_experts",
            )
        ],
        "broken factors accepted": [("if not 0 < capacity_factor < math.inf", "if capacity_factor == 0")],
    },
    "limit_to_capacity": {
        "right: one choice after another": LIMIT
        + """
    shape = routing.kept.shape
    fields = routing.kept, routing.gates, routing.probs
    wanted, gates, probs = (field.detach().reshape(-1, *shape[-2:]) for field in fields)
    kept = torch.zeros_like(wanted)
    for b in range(len(wanted)):
        queue = []
        for t, e in wanted[b].nonzero().tolist():
            better = sum(gates[b, t, other] > gates[b, t, e] for other in range(shape[-1]))
            turn = {"position": t, "choice": (better, t), "probability": (better, -probs[b, t].max().item(), t)}
            queue.append((turn[priority], t, e))
        used = dict.fromkeys(range(shape[-1]), 0)
        for _, t, e in sorted(queue):
            if used[e] != capacity:
                used[e] += 1
                kept[b, t, e] = True
    kept = kept.reshape(shape)
    return type(routing)(torch.where(kept, routing.gates, 0.0), routing.logits, routing.chosen.clone(), kept)
""",
        "right: running sums, one rank after the other (GShard)": LIMIT
        + """
    wanted, gates = routing.kept, routing.gates
    capacity = min(capacity, wanted.shape[-2])
    order = torch.arange(wanted.shape[-2], device=wanted.device).expand(wanted.shape[:-1])
    if priority == "probability":
        order = routing.probs.max(dim=-1).values.sort(dim=-1, descending=True, stable=True).indices
    order = order.unsqueeze(-1).expand_as(wanted)
    left, kept = wanted.gather(-2, order), torch.zeros_like(wanted)
    sorted_gates = gates.detach().gather(-2, order)
    while left.any():
        now = left.clone()
        if priority != "position":
            best = sorted_gates.masked_fill(~left, -1.0).argmax(dim=-1, keepdim=True)
            now = torch.zeros_like(left).scatter(-1, best, True) & left
        used = kept.sum(dim=-2, keepdim=True)
        kept = kept | now & (now.cumsum(dim=-2) + used <= capacity)
        left = left & ~now
    kept = torch.zeros_like(kept).scatter(-2, order, kept)
    return replace(routing, kept=kept, gates=gates * kept)
""",
        "one slot too many": [("place < min", "place <= min")],
        "slots counted over the batch": [
            (
                TURN,
                """    flat = wanted.reshape(-1, E)
    kept = (flat & (flat.cumsum(dim=0) <= min(capacity, T) * (len(flat) // T))).view_as(wanted)
    return replace(routing, gates=routing.gates * kept, kept=kept)
"""
                + TURN,
            )
        ],
        "by position whatever was asked for": [(KEPT, "kept = wanted & (wanted.cumsum(dim=-2) <= min(capacity, T))")],
        "probability takes the order of choice": [('if priority == "probability":', "if False:")],
        "certainty read off the gates": [("routing.probs.amax", "routing.gates.amax")],
        "certainty before first and second choice": [('if priority != "position":', 'if priority == "choice":')],
        "a gate of 0 taken for no choice": [("wanted, (T, E) = routing.kept,", "wanted, (T, E) = routing.gates > 0,")],
        "ranks by logits, although noise chose": [
            ("gates = routing.gates.masked_fill", "gates = routing.logits.masked_fill")
        ],
        "what was dropped before takes slots": [("wanted, (T, E) = routing.kept,", "wanted, (T, E) = routing.chosen,")],
        "gates that remain scaled up to a sum of one": [
            (
                RETURN,
                """    gates = routing.gates * kept
    return replace(routing, gates=gates / gates.sum(dim=-1, keepdim=True).clamp(min=1e-9), kept=kept)
    return replace(""",
            )
        ],
        "chosen shrinks with kept": [(", kept=kept)", ", chosen=kept, kept=kept)")],
        "logits without their gradient": [(", kept=kept)", ", kept=kept, logits=routing.logits.detach())")],
        "kept and chosen written to in place": [(RETURN, "    routing.kept.logical_and_(kept)\n    return replace(")],
        "works with a batch only": [(".expand_as(wanted)", ".expand(len(wanted), wanted.shape[1], E)")],
        "a capacity beyond 64 bits fails": [("min(capacity, T)", "capacity")],
    },
    "capacity_router": {
        "right: sizes of x and of the logits": [
            (
                """        T, E = routing.kept.shape[-2:]
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        capacity = expert_capacity(T, E, self.top_k, factor, self.minimum)
        return limit_to_capacity(routing, capacity, self.priority)""",
                """        factors = {True: self.capacity_factor, False: self.eval_capacity_factor}
        slots = expert_capacity(
            tokens=x.size(-2), num_experts=routing.logits.size(-1), top_k=self.router.top_k,
            capacity_factor=factors[self.training], minimum=self.minimum)
        return limit_to_capacity(routing, slots, priority=self.priority)
""",
            )
        ],
        "right: sequence by sequence": [
            (
                """        return limit_to_capacity(routing, capacity, self.priority)""",
                """        if x.dim() == 2:
            return limit_to_capacity(routing, capacity, self.priority)
        fields = [[field.reshape(-1, T, E)[b] for field in vars(routing).values()] for b in range(x[..., 0, 0].numel())]
        limited = [limit_to_capacity(type(routing)(*row), capacity, self.priority) for row in fields]
        shape = routing.kept.shape
        return replace(routing, gates=torch.stack([one.gates for one in limited]).view(shape),
                       kept=torch.stack([one.kept for one in limited]).view(shape))
""",
            )
        ],
        "the number of experts read off router.linear": [
            ("T, E = routing.kept.shape[-2:]", "T, E = x.shape[-2], self.router.linear.out_features")
        ],
        "channels taken for experts": [("expert_capacity(T, E", "expert_capacity(T, x.shape[-1]")],
        "length of the batch for that of the sequence": [("expert_capacity(T, E", "expert_capacity(len(x), E")],
        "slots for all tokens of the batch": [("expert_capacity(T, E", "expert_capacity(x[..., 0].numel(), E")],
        "factors the wrong way round": [("if self.training", "if not self.training")],
        "everything is kept in evaluation": [
            (
                "        return limit_to",
                "        if not self.training:\n            return routing\n        return limit_to",
            )
        ],
        "priority forgotten": [("capacity, self.priority)", "capacity)")],
        "minimum forgotten": [("factor, self.minimum)", "factor)")],
        "k of the lesson": [("self.top_k, factor", "2, factor")],
        "no gradient in evaluation": [
            (
                "        return limit_to",
                """        if not self.training:
            with torch.no_grad():
                return limit_to_capacity(routing, capacity, self.priority)
        return limit_to""",
            )
        ],
        "no gradient through the logits": [
            (
                "return limit_to_capacity(routing,",
                "return limit_to_capacity(replace(routing, logits=routing.logits.detach()),",
            )
        ],
        "the router asked twice": [("return limit_to_capacity(routing,", "return limit_to_capacity(self.router(x),")],
        "slots of the first text remembered": [
            (
                "capacity = expert_capacity(T, E, self.top_k, factor, self.minimum)",
                """if not hasattr(self, "slots"):
            self.slots = expert_capacity(T, E, self.top_k, factor, self.minimum)
        capacity = self.slots""",
            )
        ],
    },
    "slot_flops": {
        "right: sequence by sequence": """
def slot_flops(routing, capacity, n_embd, n_hidden):
    T, E = routing.kept.shape[-2:]
    total = used = 0
    for sequence in routing.kept.reshape(-1, T, E):
        for e in range(E):
            total += capacity * (2 * n_embd * n_hidden + 2 * n_hidden * n_embd)
            used += int(sequence[:, e].sum()) * 4 * n_embd * n_hidden
    return total, used
""",
        "right: load and shape": """
def slot_flops(routing, capacity, n_embd, n_hidden):
    flops, T = 4 * n_embd * n_hidden, routing.kept.shape[-2]
    return routing.kept.numel() // T * capacity * flops, flops * routing.load.sum()
""",
        "multiplications alone": [("one = 2 * 2", "one = 2")],
        "a gate of its own, as in SwiGLU": [("one = 2 * 2", "one = 2 * 3")],
        "one sequence instead of all": [("routing.kept[..., 0, :].numel()", "routing.kept.shape[-1]")],
        "the first dimension is the batch": [
            ("routing.kept[..., 0, :].numel()", "len(routing.kept) * routing.kept.shape[-1]")
        ],
        "slots that exist only where somebody is kept": [
            ("batches * capacity * one", "int(routing.kept.any(dim=-2).sum()) * capacity * one")
        ],
        "the fullest expert decides": [("batches * capacity", "batches * routing.kept.sum(dim=-2).max().item()")],
        "what was chosen, not what is kept": [("routing.kept.sum()", "routing.chosen.sum()")],
        "every token once, however many experts": [("routing.kept.sum()", "routing.kept.any(dim=-1).sum()")],
        "hidden units of the lesson": [("* n_hidden", "* 4 * n_embd")],
    },
    "influence": {
        "right: all replacements at once": """
def influence(router, x, other):
    own = torch.eye(len(x), dtype=torch.bool)[..., None]  # (T, T, 1)
    changed = torch.where(own, other, x)  # (s, t, C): copy s has token s replaced
    gates = torch.stack([router(copy).gates for copy in changed])  # (s, T, E)
    return (gates != router(x).gates).any(dim=-1).T
""",
        "right: entry by entry": """
def influence(router, x, other):
    T, before = len(x), router(x).gates.tolist()
    answer = []
    for s in range(T):
        after = router(torch.cat([x[:s], other[s:s + 1], x[s + 1:]])).gates.tolist()
        answer.append([after[t] != before[t] for t in range(T)])
    return torch.tensor(answer).t()
""",
        "rows and columns exchanged": [("moved[:, s]", "moved[s]")],
        "x written to in place": [("x.clone()", "x")],
        "replacements pile up": [
            (
                "    for s in range(len(x)):\n        changed = x.clone()\n",
                "    changed = x.clone()\n    for s in range(len(x)):\n",
            )
        ],
        "all later tokens replaced": [("changed[s] = other[s]", "changed[s:] = other[s:]")],
        "a zero instead of the other token": [("changed[s] = other[s]", "changed[s] = 0")],
        "sums of gates compared": [
            ("(router(changed).gates != before).any(dim=-1)", "router(changed).gates.sum(dim=-1) != before.sum(dim=-1)")
        ],
        "only the past": [("    return moved", "    return moved.tril()")],
        "the present left out": [("    return moved", "    return moved & ~torch.eye(len(x), dtype=torch.bool)")],
        "what was chosen compared": [
            ("router(x).gates", "router(x).chosen"),
            ("router(changed).gates", "router(changed).chosen"),
        ],
        "differences as numbers": [("dtype=torch.bool)", "dtype=torch.float)")],
    },
}
