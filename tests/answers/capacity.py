"What learners hand in for lesson 07."

SEATS = '''
def expert_capacity(tokens, num_experts, top_k, capacity_factor, minimum=4):
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}, but must lie between 1 and num_experts = {num_experts}")
    if not 0 < capacity_factor < math.inf:
        raise ValueError(f"capacity_factor is {capacity_factor}, but must be above 0 and finite")
    if minimum < 1:
        raise ValueError(f"minimum is {minimum}, but an expert needs at least 1 seat to learn anything")
'''

LIMIT = '''
PRIORITIES = "position", "choice", "probability"


def limit_to_capacity(routing, capacity, priority="position"):
    if priority not in PRIORITIES:
        raise ValueError(f"priority is {priority!r}, but must be one of {', '.join(PRIORITIES)}")
    if capacity < 0 or capacity % 1:
        raise ValueError(f"capacity is {capacity}, but must be a whole number of seats, 0 or more")
    if routing.kept.dim() < 2:
        raise ValueError(f"a queue needs fields (..., T, E), but they are {tuple(routing.kept.shape)}")
'''

BY_TURN = '''    wanted, (T, E) = routing.kept, routing.kept.shape[-2:]
    arrival = torch.arange(T, device=wanted.device).expand(wanted.shape[:-1])  # (..., T)
    if priority == "probability":
        certainty = routing.probs.amax(dim=-1)
        arrival = certainty.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    turn = arrival[..., None].expand_as(wanted)  # (..., T, E): who is lower comes first
    if priority != "position":
        gates = routing.gates.masked_fill(~wanted, -math.inf)  # even a gate of 0 is a wish
        best_first = gates.argsort(dim=-1, descending=True, stable=True)
        turn = best_first.argsort(dim=-1) * T + turn
    place = turn.masked_fill(~wanted, E * T).argsort(dim=-2).argsort(dim=-2)  # in each queue
    kept = wanted & (place < capacity)
'''

ANSWERS = {
    "capacity-expert-capacity": {
        "right: with fractions": "from fractions import Fraction\n\n" + SEATS + '''
    share = Fraction(top_k * tokens, num_experts)
    seats = math.ceil(Fraction(str(capacity_factor)).limit_denominator(10**6) * share)
    return seats if seats > minimum else minimum
''',
        "right: a hair less, then up": SEATS + '''
    choices = top_k * tokens
    seats = int(capacity_factor * choices / num_experts - 1e-9)
    if seats < capacity_factor * choices / num_experts - 1e-9:
        seats += 1
    return max(minimum, seats)
''',
        "rounded down, as makeMoE does": [("math.ceil(round(seats, 6))", "int(seats)")],
        "rounded to the nearest, as Flaxformer does": [("math.ceil(round(seats, 6))", "round(seats)")],
        "up without a thought for binary fractions": [("math.ceil(round(seats, 6))", "math.ceil(seats)")],
        "one more than rounded down, even where it is whole": [("math.ceil(round(seats, 6))", "int(round(seats, 6)) + 1")],
        "rounded so hard that a small rest is lost": [("round(seats, 6)", "round(seats, 1)")],
        "no k, as in Switch": [("capacity_factor * top_k * tokens", "capacity_factor * tokens")],
        "k below the line": [("* top_k * tokens / num_experts", "* tokens / (top_k * num_experts)")],
        "k of the lesson": [("* top_k *", "* 2 *")],
        "share rounded before the factor": [
            ("capacity_factor * top_k * tokens / num_experts", "capacity_factor * math.ceil(top_k * tokens / num_experts)")],
        "whole tokens an expert first": [
            ("capacity_factor * top_k * tokens / num_experts", "capacity_factor * top_k * (tokens // num_experts)")],
        "no minimum": [("max(math.ceil(round(seats, 6)), minimum)", "math.ceil(round(seats, 6))")],
        "minimum taken for a maximum": [("max(", "min(")],
        "always at least 4": [(", minimum)  #", ", 4)  #")],
        "minimum on top": [("max(math.ceil(round(seats, 6)), minimum)", "math.ceil(round(seats, 6)) + minimum")],
        "never more seats than tokens": [("max(math.ceil(round(seats, 6)), minimum)", "min(tokens, max(math.ceil(round(seats, 6)), minimum))")],
        "share cut off at the tokens, as in ST-MoE": [("math.ceil(round(seats, 6))", "min(tokens, math.ceil(round(seats, 6)))")],
        "a float": [("max(math.ceil(round(seats, 6)), minimum)", "max(float(math.ceil(round(seats, 6))), minimum)")],
        "a factor below 1 lifted to 1": [("seats = capacity_factor", "seats = max(capacity_factor, 1)")],
    },
    "capacity-limit": {
        "right: a walk down the queue": LIMIT + '''
    shape = routing.kept.shape
    wanted, gates, probs = (field.detach().reshape(-1, *shape[-2:]) for field in (routing.kept, routing.gates, routing.probs))
    kept = torch.zeros_like(wanted)
    for b in range(len(wanted)):
        queue = []
        for t, e in wanted[b].nonzero().tolist():
            better = sum(gates[b, t, other] > gates[b, t, e] for other in range(shape[-1]))
            turn = {"position": t, "choice": (better, t), "probability": (better, -probs[b, t].max().item(), t)}
            queue.append((turn[priority], t, e))
        taken = dict.fromkeys(range(shape[-1]), 0)
        for _, t, e in sorted(queue):
            if taken[e] != capacity:
                taken[e] += 1
                kept[b, t, e] = True
    kept = kept.reshape(shape)
    return type(routing)(torch.where(kept, routing.gates, 0.0), routing.logits, routing.chosen.clone(), kept)
''',
        "right: running sums, one rank after the other (GShard)": LIMIT + '''
    wanted, gates = routing.kept, routing.gates
    order = torch.arange(wanted.shape[-2]).expand(wanted.shape[:-1])
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
        seated = kept.sum(dim=-2, keepdim=True)
        kept = kept | now & (now.cumsum(dim=-2) + seated <= capacity)
        left = left & ~now
    kept = torch.zeros_like(kept).scatter(-2, order, kept)
    return replace(routing, kept=kept, gates=gates * kept)
''',
        "right: pairs compared with pairs": LIMIT + '''
    wanted, T = routing.kept, routing.kept.shape[-2]
    t = torch.arange(T)
    ahead = (t[None, :] < t[:, None]).expand(*wanted.shape[:-2], T, T)  # (..., T, T): s is before t
    if priority == "probability":
        sure = routing.probs.amax(dim=-1)
        mine, theirs = sure[..., :, None], sure[..., None, :]
        ahead = (theirs > mine) | (theirs == mine) & ahead
    ahead = ahead[..., None]  # (..., T, T, 1)
    if priority != "position":
        gates = routing.gates.masked_fill(~wanted, -1)
        rank = (gates[..., None, :] > gates[..., :, None]).sum(dim=-1)  # (..., T, E)
        mine, theirs = rank[..., :, None, :], rank[..., None, :, :]
        ahead = (theirs < mine) | (theirs == mine) & ahead
    before_me = (ahead & wanted[..., None, :, :]).sum(dim=-2)  # (..., T, E)
    kept = wanted & (before_me < capacity)
    return replace(routing, gates=routing.gates.where(kept, torch.zeros(())), kept=kept)
''',
        "one seat too many": [("place < capacity", "place <= capacity")],
        "one seat too few": [("place < capacity", "place + 1 < capacity")],
        "capacity counted over the batch": [(BY_TURN, '''    wanted = routing.kept.reshape(-1, routing.kept.shape[-1])
    kept = (wanted & (wanted.cumsum(dim=0) <= capacity * (len(wanted) // routing.kept.shape[-2]))).view_as(routing.kept)
''')],
        "one queue for the batch, seats of one sequence": [(BY_TURN, '''    wanted = routing.kept.reshape(-1, routing.kept.shape[-1])
    kept = (wanted & (wanted.cumsum(dim=0) <= capacity)).view_as(routing.kept)
''')],
        "by position whatever was asked for": [(BY_TURN, '''    kept = routing.kept & (routing.kept.cumsum(dim=-2) <= capacity)
''')],
        "the sum runs along the first dimension": [(BY_TURN, '''    kept = routing.kept & (routing.kept.cumsum(dim=0) <= capacity)
''')],
        "the sum runs along the experts": [("    kept = wanted &", '''    if priority == "position":
        place = wanted.cumsum(dim=-1) - 1
    kept = wanted &''')],
        "last come, first served": [("torch.arange(T, device=wanted.device)", "torch.arange(T - 1, -1, -1, device=wanted.device)")],
        "the largest gates sit": [("    kept = wanted &", '''    if priority == "position":
        place = routing.gates.argsort(dim=-2, descending=True).argsort(dim=-2)
    kept = wanted &''')],
        "those who did not ask stand in the queue": [("turn.masked_fill(~wanted, E * T)", "turn")],
        "those who did not ask stand in front of late choices": [("(~wanted, E * T)", "(~wanted, T * T)")],
        "those who did not ask stand in front": [("turn.masked_fill(~wanted, E * T)", "turn.masked_fill(~wanted, -1)")],
        "an order taken for places": [(".argsort(dim=-2).argsort(dim=-2)", ".argsort(dim=-2)")],
        "survivors scaled up to a sum of one": [("    return replace(", '''    gates = routing.gates * kept
    return replace(routing, gates=gates / gates.sum(dim=-1, keepdim=True).clamp(min=1e-9), kept=kept)
    return replace(''')],
        "gates of the dropped left as they were": [("gates=routing.gates.masked_fill(~kept, 0), ", "")],
        "gates changed, kept as it was": [(", kept=kept)", ")")],
        "dropping takes the wish away too": [(", kept=kept)", ", chosen=kept, kept=kept)")],
        "logits of the dropped erased": [(", kept=kept)", ", kept=kept, logits=routing.logits.masked_fill(~kept, -math.inf))")],
        "logits without their gradient": [(", kept=kept)", ", kept=kept, logits=routing.logits.detach())")],
        "gates without their gradient": [("routing.gates.masked_fill(~kept, 0)", "routing.gates.detach().masked_fill(~kept, 0)")],
        "gates written to in place": [("    return replace(", "    routing.gates.data[~kept] = 0\n    return replace(")],
        "kept written to in place": [("    return replace(", "    routing.kept.logical_and_(kept)\n    return replace(")],
        "one full expert drops the whole token": [("    return replace(", "    kept = kept & (kept == wanted).all(dim=-1, keepdim=True)\n    return replace(")],
        "queue of the chosen, so that dropped ones take seats": [("wanted, (T, E) = routing.kept,", "wanted, (T, E) = routing.chosen,")],
        "dropped choices stay in the queue": [("turn.masked_fill(~wanted, E * T)", "turn.masked_fill(~routing.chosen, E * T)")],
        "a gate of 0 taken for no wish": [("wanted, (T, E) = routing.kept,", "wanted, (T, E) = routing.gates > 0,")],
        "a gate of 0 ranked among the experts not asked": [("masked_fill(~wanted, -math.inf)", "masked_fill(~wanted, 0)")],
        "least wanted experts first": [("gates.argsort(dim=-1, descending=True, stable=True)", "gates.argsort(dim=-1)")],
        "expert numbers taken for ranks": [("best_first.argsort(dim=-1) * T", "best_first * T")],
        "ranks in order of the experts' numbers": [("best_first.argsort(dim=-1) * T", "(wanted.cumsum(dim=-1) - 1) * T")],
        "ranks by logits, although noise chose": [("routing.gates.masked_fill(~wanted, -math.inf)", "routing.logits.masked_fill(~wanted, -math.inf)")],
        "ranks counted among what was dropped too": [("routing.gates.masked_fill(~wanted, -math.inf)", "routing.logits.masked_fill(~routing.chosen, -math.inf)")],
        "rank and position simply added": [("* T + turn", "+ turn")],
        "position before rank": [("best_first.argsort(dim=-1) * T + turn", "best_first.argsort(dim=-1) + turn * E")],
        "only first and other choices": [("best_first.argsort(dim=-1) * T", "best_first.argsort(dim=-1).clamp(max=1) * T")],
        "each rank has seats of its own": [("    kept = wanted &", '''    if priority != "position":
        rank = best_first.argsort(dim=-1)
        place = torch.stack([((rank == rank[..., t:t + 1, :]) & wanted & (turn < turn[..., t:t + 1, :])).sum(dim=-2)
                             for t in range(T)], dim=-2)
    kept = wanted &''')],
        "the least certain first": [("certainty.argsort(dim=-1, descending=True, stable=True)", "certainty.argsort(dim=-1)")],
        "the order of the certain taken for their places": [("stable=True).argsort(dim=-1)\n    turn", "stable=True)\n    turn")],
        "certainty read off the gates": [("routing.probs.amax(dim=-1)", "routing.gates.amax(dim=-1)")],
        "certainty read off the logits": [("routing.probs.amax(dim=-1)", "routing.logits.amax(dim=-1)")],
        "certainty without regard to first and second choice": [('if priority != "position":', 'if priority == "choice":')],
        "certainty of this expert instead of the largest": [("    kept = wanted &", '''    if priority == "probability":
        rank = best_first.argsort(dim=-1)
        place = (rank - routing.probs).masked_fill(~wanted, E).argsort(dim=-2).argsort(dim=-2)
    kept = wanted &''')],
        "certainty compared across the batch": [("certainty.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)",
                                                 "certainty.argsort(dim=0, descending=True, stable=True).argsort(dim=0)")],
        "probability takes the order of choice": [('if priority == "probability":', "if False:")],
        "places drawn by lot": [("torch.arange(T, device=wanted.device)", "torch.randperm(T)")],
        "equals seated by lot": [("routing.probs.amax(dim=-1)", "routing.probs.amax(dim=-1)\n        certainty = certainty + 1e-6 * torch.rand_like(certainty)")],
        "number of experts for that of tokens": [("best_first.argsort(dim=-1) * T", "best_first.argsort(dim=-1) * E")],
        "works with a batch only": [(".expand(wanted.shape[:-1])", ".expand(len(wanted), wanted.shape[1])")],
        "the first tokens found by topk, of which there must be enough": [("    kept = wanted &", '''    first = turn.masked_fill(~wanted, E * T).topk(int(capacity), dim=-2, largest=False).indices
    place = torch.full_like(turn, E * T).scatter(-2, first, 0)
    kept = wanted &''')],
        "capacity of at least one": [("place < capacity", "place < max(capacity, 1)")],
    },
    "capacity-router": {
        "right: the tokens' own shape": [('''        T, E = routing.kept.shape[-2:]
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        capacity = expert_capacity(T, E, self.top_k, factor, self.minimum)
        return limit_to_capacity(routing, capacity, self.priority)
''', '''        factors = {True: self.capacity_factor, False: self.eval_capacity_factor}
        seats = expert_capacity(
            tokens=x.size(-2), num_experts=routing.logits.size(-1), top_k=self.router.top_k,
            capacity_factor=factors[self.training], minimum=self.minimum)
        return limit_to_capacity(routing, seats, priority=self.priority)
''')],
        "right: a queue for each sequence, in a loop": [('''        return limit_to_capacity(routing, capacity, self.priority)
''', '''        if x.dim() == 2:
            return limit_to_capacity(routing, capacity, self.priority)
        fields = [[field.reshape(-1, T, E)[b] for field in vars(routing).values()] for b in range(x[..., 0, 0].numel())]
        seated = [limit_to_capacity(type(routing)(*row), capacity, self.priority) for row in fields]
        shape = routing.kept.shape
        return replace(routing, gates=torch.stack([one.gates for one in seated]).view(shape),
                       kept=torch.stack([one.kept for one in seated]).view(shape))
''')],
        "capacity counted over the batch": [("expert_capacity(T, E", "expert_capacity(x[..., 0].numel(), E")],
        "the batch flattened into one queue": [("routing = self.router(x)", "routing = self.router(x.reshape(-1, x.shape[-1]))"),
                                               ("return limit_to_capacity(routing, capacity, self.priority)", '''routing = limit_to_capacity(routing, capacity, self.priority)
        return type(routing)(*(field.view(*x.shape[:-1], E) for field in vars(routing).values()))''')],
        "length of the batch for that of the sequence": [("expert_capacity(T, E", "expert_capacity(len(x), E")],
        "works with a batch only": [("expert_capacity(T, E", "expert_capacity(x.shape[1], E")],
        "channels taken for experts": [("expert_capacity(T, E", "expert_capacity(T, x.shape[-1]")],
        "factors the wrong way round": [("if self.training", "if not self.training")],
        "factor of training in evaluation too": [("self.capacity_factor if self.training else self.eval_capacity_factor", "self.capacity_factor")],
        "in evaluation everybody sits": [("        return limit_to", "        if not self.training:\n            return routing\n        return limit_to")],
        "priority forgotten": [("capacity, self.priority)", "capacity)")],
        "minimum forgotten": [("factor, self.minimum)", "factor)")],
        "k forgotten": [("self.top_k, factor", "1, factor")],
        "k of the lesson": [("self.top_k, factor", "2, factor")],
        "seats from the requests that there are": [("expert_capacity(T, E, self.top_k, factor, self.minimum)",
                                                    "max(self.minimum, int(factor * routing.load.sum() / E))")],
        "no gradient through the queue": [("        return limit_to", "        with torch.no_grad():\n            return limit_to_capacity(routing, capacity, self.priority)\n        return limit_to")],
        "the router asked twice": [("return limit_to_capacity(routing,", "return limit_to_capacity(self.router(x),")],
        "the router left in evaluation mode": [("routing = self.router(x)", "routing = self.router.eval()(x)")],
        "gates instead of a routing": [("return limit_to_capacity(routing, capacity, self.priority)", "return limit_to_capacity(routing, capacity, self.priority).gates")],
        "seats of the first text remembered": [("capacity = expert_capacity(T, E, self.top_k, factor, self.minimum)", '''if not hasattr(self, "seats"):
            self.seats = expert_capacity(T, E, self.top_k, factor, self.minimum)
        capacity = self.seats''')],
    },
    "capacity-flops": {
        "right: sequence by sequence": '''
def seat_flops(routing, capacity, n_embd, n_hidden):
    T, E = routing.kept.shape[-2:]
    total = filled = 0
    for sequence in routing.kept.reshape(-1, T, E):
        for e in range(E):
            total += capacity * (2 * n_embd * n_hidden + 2 * n_hidden * n_embd)
            filled += int(sequence[:, e].sum()) * 4 * n_embd * n_hidden
    return total, filled
''',
        "right: load and shape": '''
def seat_flops(routing, capacity, n_embd, n_hidden):
    flops, T = 4 * n_embd * n_hidden, routing.kept.shape[-2]
    return routing.kept.numel() // T * capacity * flops, flops * routing.load.sum()
''',
        "multiplications alone": [("one = 2 * 2", "one = 2")],
        "up, and never down": [("one = 2 * 2", "one = 2")],
        "a gate of its own, as in SwiGLU": [("one = 2 * 2", "one = 2 * 3")],
        "one sequence instead of all": [("routing.kept[..., 0, :].numel()", "routing.kept.shape[-1]")],
        "the first dimension is the batch": [("routing.kept[..., 0, :].numel()", "len(routing.kept) * routing.kept.shape[-1]")],
        "tokens instead of queues": [("routing.kept[..., 0, :].numel()", "routing.kept[..., 0].numel()")],
        "what was wanted, not what sits": [("routing.kept.sum()", "routing.chosen.sum()")],
        "every token once, however many experts": [("routing.kept.sum()", "routing.kept.any(dim=-1).sum()")],
        "weighted by the gates": [("routing.kept.sum()", "routing.gates.sum()")],
        "hidden size of the lesson": [("* n_hidden", "* 4 * n_embd")],
        "filled and all exchanged": [("return queues * capacity * one, routing.kept.sum().item() * one", "return routing.kept.sum().item() * one, queues * capacity * one")],
        "the fullest expert decides": [("queues * capacity", "queues * routing.kept.sum(dim=-2).max().item()")],
    },
    "capacity-left": {
        "right: plain lists": '''
def no_token_left_behind(logits, capacity):
    T, E = logits.shape
    kept, chosen, free = torch.zeros(T, E).bool(), torch.zeros(T, E).bool(), [capacity] * E
    for t in range(T):
        wishes = sorted(range(E), key=lambda e: logits[t, e].item(), reverse=True)
        open_ones = [e for e in wishes if free[e] > 0]
        seat = open_ones[0] if open_ones else None
        chosen[t, wishes[0] if seat is None else seat] = True
        if seat is not None:
            free[seat] -= 1
            kept[t, seat] = True
    gates = torch.where(kept, torch.softmax(logits, dim=-1), 0)
    return Routing(gates=gates, logits=logits, chosen=chosen, kept=kept)
''',
        "right: full experts closed for all later tokens": '''
def no_token_left_behind(logits, capacity):
    open_logits, seats = logits.detach().clone(), []
    for t in range(len(logits)):
        seat = open_logits[t].argmax().item() if open_logits[t].isfinite().any() and capacity else None
        seats.append(seat)
        if seat is not None and seats.count(seat) == capacity:
            open_logits[t + 1:, seat] = -torch.inf
    kept = torch.zeros_like(logits, dtype=torch.bool)
    chosen = kept.clone()
    for t, seat in enumerate(seats):
        if seat is None:
            chosen[t, logits[t].argmax()] = True
        else:
            chosen[t, seat] = kept[t, seat] = True
    return Routing(kept * logits.softmax(dim=1), logits, chosen, kept)
''',
        "one seat too many": [("< capacity", "<= capacity")],
        "only the second choice is tried": [("e = row.masked_fill(~free, -math.inf).argmax()", '''best = row.topk(2).indices
            e = best[0] if free[best[0]] else best[1]''')],
        "any free seat, not the best": [("row.masked_fill(~free, -math.inf).argmax()", "row.argmax() if free[row.argmax()] else free.int().argmax()")],
        "the emptiest expert": [("row.masked_fill(~free, -math.inf).argmax()", "row.argmax() if free[row.argmax()] else kept.sum(dim=0).argmin()")],
        "full experts hidden by a zero": [("row.masked_fill(~free, -math.inf).argmax()", "(row * free).argmax()")],
        "probabilities of the free experts alone": [("e = row.masked_fill", "logits = logits.clone()\n            logits[t] = row.masked_fill(~free, -math.inf)\n            e = row.masked_fill")],
        "gate of 1 for the only expert": [("logits.softmax(dim=-1) * kept", "1.0 * kept")],
        "gate of the favourite carried along": [("logits.softmax(dim=-1) * kept", "logits.softmax(dim=-1).amax(dim=-1, keepdim=True) * kept")],
        "chosen is always the favourite": [("return Routing(", "chosen = torch.zeros_like(kept).scatter(-1, logits.argmax(dim=-1, keepdim=True), True)\n    return Routing(")],
        "who stands has chosen nothing": [("chosen[t, row.argmax()] = True", "pass")],
        "who stands is kept": [("logits, chosen, kept)", "logits, chosen, chosen)")],
        "who stands keeps a gate": [("logits.softmax(dim=-1) * kept", "logits.softmax(dim=-1) * chosen")],
        "favourites of all tokens seated first": [("    for t, row in enumerate(logits):\n", '''    first = logits.argmax(dim=-1)
    for e in range(logits.shape[-1]):
        for t in (first == e).nonzero().flatten()[:capacity].tolist():
            kept[t, e] = chosen[t, e] = True
    for t, row in enumerate(logits):
        if kept[t].any():
            continue
''')],
        "logits with full experts erased": [("e = row.masked_fill(~free, -math.inf).argmax()", "e = row.masked_fill_(~free, -1e9).argmax()")],
        "no gradient to the logits": [("logits.softmax(dim=-1) * kept", "logits.detach().softmax(dim=-1) * kept")],
        "seated although there are no seats": [("if free.any():", "if free.any() or t == 0:")],
        "probabilities over the tokens": [("logits.softmax(dim=-1)", "logits.softmax(dim=0)")],
    },
    "capacity-leaks": {
        "right: all replacements as one batch": '''
def influence(router, x, other):
    T = len(x)
    own = torch.eye(T, dtype=torch.bool)[..., None]  # (T, T, 1)
    changed = torch.where(own, other, x)  # (s, t, C): copy s has token s replaced
    gates = torch.stack([router(copy).gates for copy in changed])  # (s, T, E)
    return (gates != router(x).gates).any(dim=-1).T
''',
        "right: entry by entry": '''
def influence(router, x, other):
    T, before = len(x), router(x).gates.tolist()
    answer = []
    for s in range(T):
        after = router(torch.cat([x[:s], other[s:s + 1], x[s + 1:]])).gates.tolist()
        answer.append([after[t] != before[t] for t in range(T)])
    return torch.tensor(answer).t()
''',
        "rows and columns exchanged": [("moved[:, s]", "moved[s]")],
        "x written to in place": [("x.clone()", "x")],
        "replacements pile up": [("    for s in range(len(x)):\n        changed = x.clone()\n", "    changed = x.clone()\n    for s in range(len(x)):\n")],
        "all later tokens replaced": [("changed[s] = other[s]", "changed[s:] = other[s:]")],
        "the same token of other for all": [("changed[s] = other[s]", "changed[s] = other[0]")],
        "a zero instead of the other token": [("changed[s] = other[s]", "changed[s] = 0")],
        "only tokens that lost everything": [("(router(changed).gates != before).any(dim=-1)", "(router(changed).gates != before).all(dim=-1)")],
        "sums of gates compared": [("(router(changed).gates != before).any(dim=-1)", "router(changed).gates.sum(dim=-1) != before.sum(dim=-1)")],
        "the present left out": [("    return moved", "    return moved & ~torch.eye(len(x), dtype=torch.bool)")],
        "only the future": [("    return moved", "    return moved.triu()")],
        "only the past": [("    return moved", "    return moved.tril()")],
        "loads compared instead of gates": [("(router(changed).gates != before).any(dim=-1)", "(router(changed).load != router(x).load).any()")],
        "what was wanted compared": [("router(x).gates", "router(x).chosen"), ("router(changed).gates", "router(changed).chosen")],
        "what is kept compared": [("router(x).gates", "router(x).kept"), ("router(changed).gates", "router(changed).kept")],
        "differences as numbers": [("dtype=torch.bool)", "dtype=torch.float)")],
        "compared with the other sequence": [("before = router(x).gates", "before = router(other).gates")],
    },
}
