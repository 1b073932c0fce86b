"Lesson 28. What goes wrong here: scores before the choice, sums not taken, gates at the wrong end, layers pooled."

RANKED = "logits if bias is None and groups == 1 else log_scores.exp() + (0 if bias is None else bias)"
GATES = "log_scores.softmax(dim=-1) if settings.normalise else log_scores.exp()"
BEST = "ranked.topk(min(2, E // groups), dim=-1).values.sum(dim=-1)"
PAIRS = "routing.gates.reshape(-1, E)[rows, chosen, None] * tokens[rows]"
CUT = "routings = [Routing(*rows) for routing in routings for rows in zip(*vars(routing).values())]"
MEAN = "torch.stack([load_balancing_loss(routing) for routing in routings]).mean()"
SORTED = "torch.cat([rows[:, ::2], rows[:, 1::2]], dim=1)"
EACH = "sparse * (E * C + 3 * C * F_shared)"

ANSWERS = {
    "open_gating": {
        "right: double precision, group by group": """
def open_gating(logits, k, settings, bias=None):
    E, G = logits.shape[-1], settings.groups
    if E % G:
        raise ValueError(f"groups = {G} do not divide {E} experts")
    if not 1 <= settings.groups_kept <= G or settings.groups_kept * (E // G) < k:
        raise ValueError(f"groups_kept = {settings.groups_kept} cannot be")
    wide = logits.double()
    s = {"softmax": wide.softmax(-1), "sigmoid": wide.sigmoid(),
         "sqrt_softplus": torch.log1p(wide.exp()).clamp(min=1e-300).sqrt()}[settings.score]
    if bias is None and G == 1:
        order = logits.sort(dim=-1, descending=True).indices[..., :k]
    else:
        with torch.no_grad():
            b = s if bias is None else s + bias
            parts = torch.stack([part.sort(-1, descending=True).values[..., :2].sum(-1) for part in b.chunk(G, -1)], -1)
            opened = torch.zeros_like(parts).scatter(-1, parts.topk(settings.groups_kept).indices, 1.0)
            opened = opened.repeat_interleave(E // G, dim=-1).bool()
            order = torch.where(opened, b, float("-inf")).argsort(dim=-1, descending=True)[..., :k]
    picked = s.gather(-1, order)
    if settings.normalise:
        picked = picked / picked.sum(dim=-1, keepdim=True)
    gates = torch.zeros_like(logits).scatter(-1, order, (settings.scale * picked).to(logits.dtype))
    chosen = torch.zeros_like(logits).scatter(-1, order, 1.0).bool()
    return Routing(gates, logits, chosen, chosen)
""",
        "right: a wall that is added": [
            (
                "ranked = ranked.masked_fill(closed[..., None], -torch.inf).flatten(-2)",
                "ranked = torch.where(closed[..., None], -torch.inf, ranked).reshape(logits.shape)",
            ),
            ("settings.scale * gates", "gates * settings.scale"),
        ],
        "chosen by scores: a softmax loses the order of large logits": [(RANKED, RANKED.split("groups == 1 else ")[1])],
        "raw logits where nothing is divided (sglang #35160)": [
            (GATES, "log_scores.softmax(dim=-1) if settings.normalise else logits * chosen")
        ],
        "scale only where the sum is divided (sglang-jax #1282)": [
            ("settings.scale * gates", "(settings.scale if settings.normalise else 1) * gates")
        ],
        "always divided by the sum": [(GATES, "log_scores.softmax(dim=-1)")],
        "never divided by the sum": [(GATES, "log_scores.exp()")],
        "a softmax over the chosen logits, whatever the score": [
            (
                GATES,
                "logits.masked_fill(~chosen, -torch.inf).softmax(dim=-1) if settings.normalise else log_scores.exp()",
            )
        ],
        "the bias in the gates": [
            (
                "    log_scores = log_scores.masked_fill(~chosen, -torch.inf)",
                "    if bias is not None:\n        log_scores = (log_scores.exp() + "
                "bias.detach()).clamp(min=1e-9).log()\n"
                "    log_scores = log_scores.masked_fill(~chosen, -torch.inf)",
            )
        ],
        "the bias added to the logits": [(RANKED, RANKED.split(" if")[0] + " + (0 if bias is None else bias)")],
        "s / sum of s, which is 0 / 0 for small scores": [
            (
                GATES,
                "log_scores.exp() / log_scores.exp().sum(dim=-1, keepdim=True) if "
                "settings.normalise else log_scores.exp()",
            )
        ],
        "a group as good as its best expert": [("min(2, E // groups)", "1")],
        "two best asked of groups of one": [("min(2, E // groups)", "2 if groups > 1 else 1")],
        "closed groups filled with 0": [("closed[..., None], -torch.inf", "closed[..., None], 0.0")],
        "groups judged only where there is a bias": [
            ("settings.groups\n    require", "settings.groups if bias is not None else 1\n    require"),
        ],
        "gradient cut": [("LOG_SCORES[settings.score](logits)", "LOG_SCORES[settings.score](logits.detach())")],
        "nothing refused": [("    require_groups(E, k, groups, settings.groups_kept)\n", "")],
    },
    "gate_first": {
        "right: expert by expert, with a routing of one": [
            (
                "        tokens, E = x.reshape(-1, x.shape[-1]), routing.gates.shape[-1]  # (N, C)",
                """        E, y = routing.gates.shape[-1], torch.zeros_like(x)
        for e in range(E):
            mine = routing.kept[..., e]
            one = F.one_hot(torch.full((int(mine.sum()),), e), E).bool()
            given = (routing.gates[mine][:, e, None] * x[mine]).to(x.dtype)
            answers = self.experts(given, Routing(one.float(), one.float(), one, one))
            y = y.index_put((mine,), answers, accumulate=True)
            if e == 0:
                seen = []
            seen.append(one)
        if hasattr(self.experts, "routing"):
            self.experts.routing = Routing(*[torch.cat(seen).float()] * 2, *[torch.cat(seen)] * 2)
        return y
        tokens, E = x.reshape(-1, x.shape[-1]), routing.gates.shape[-1]""",
            )
        ],
        "right: a row for each token and expert": [
            (
                "        tokens, E = x.reshape(-1, x.shape[-1]), routing.gates.shape[-1]  # (N, C)",
                """        E = routing.gates.shape[-1]
        one = torch.eye(E, dtype=torch.bool) & routing.kept[..., None, :]
        given = (routing.gates[..., None] * x[..., None, :]).to(x.dtype)
        return self.experts(given, Routing(one.float(), one.float(), one, one)).sum(dim=-2)
        tokens, E = x.reshape(-1, x.shape[-1]), routing.gates.shape[-1]""",
            )
        ],
        "the gate at the answer, as everywhere else (llm-compressor #1907)": [
            ("rows, chosen = routing.kept", "return self.experts(x, routing)\n        rows, chosen = routing.kept")
        ],
        "the gate at both ends": [
            ("Routing(one.float(),", "Routing(one * routing.gates.reshape(-1, E)[rows],"),
        ],
        "no gate at all": [(PAIRS, "tokens[rows]")],
        "dropped choices are carried out": [("routing.kept.reshape", "routing.chosen.reshape")],
        "only experts with a gate above 0": [("routing.kept.reshape", "(routing.gates > 0).reshape")],
        "the sum of a token's gates at once": [
            (PAIRS, "routing.gates.reshape(-1, E).sum(-1)[rows, None] * tokens[rows]")
        ],
        "one expert for each token": [
            ("routing.kept.reshape(-1, E)", "F.one_hot(routing.gates.reshape(-1, E).argmax(-1), E)"),
        ],
        "the gate does not learn": [(PAIRS, PAIRS.replace("routing.gates", "routing.gates.detach()"))],
        "the tokens do not learn": [(PAIRS, PAIRS.replace("tokens[rows]", "tokens[rows].detach()"))],
        "the last answer of a token wins": [("index_add(0, rows, answers)", "index_copy(0, rows, answers)")],
        "flat tokens come back": [(".view_as(x)", "")],
        "pairs like the gates": [
            ("pairs.to(x.dtype)", "pairs"),
            ("torch.zeros_like(tokens)", "torch.zeros(tokens.shape)"),
        ],
    },
    "balance_loss": {
        "right: all sums at once": """
def balance_loss(routings, scope="batch"):
    if scope not in {"batch", "sequence"}:
        raise ValueError(f"no scope {scope}: batch or sequence")
    chosen = torch.stack([r.chosen for r in routings]).float()
    probs = torch.stack([r.logits for r in routings]).softmax(dim=-1)
    dims = (2,) if scope == "sequence" else (1, 2)
    f, P = chosen.mean(dim=dims), probs.mean(dim=dims)
    return (f * P).sum(dim=-1).mean() * f.shape[-1] / chosen.sum(dim=-1).mean()
""",
        "right: sum and len": [(MEAN, "sum(map(load_balancing_loss, routings)) / len(routings)")],
        "layers pooled, and not divided by k (transformers #28255)": [
            (
                MEAN,
                "len(routings[0].gates[0, 0]) * (torch.cat([r.chosen.flatten(0, -2) for r in routings]).float().mean(0)"
                " * torch.cat([r.probs.flatten(0, -2) for r in routings]).mean(0)).sum()"
                ' if scope == "batch" else ' + MEAN,
            )
        ],
        "layers pooled": [
            (
                MEAN,
                "load_balancing_loss(Routing(*(torch.cat(field) for field in zip(*(vars(r).values() "
                "for r in routings)))))",
            )
        ],
        "not divided by k": [(MEAN, MEAN + " * routings[0].chosen[..., :].sum(dim=-1).float().mean()")],
        "summed over the layers": [(".mean()", ".sum()")],
        "the scope is ignored": [('    if scope == "sequence":\n        ' + CUT + "\n", "")],
        "the first layer only": [(MEAN, "load_balancing_loss(routings[0])")],
        "the first sequence only": [(CUT, "routings = [Routing(*(v[0] for v in vars(r).values())) for r in routings]")],
        "cut along the positions": [
            (CUT, CUT.replace("vars(routing).values()", "(v.transpose(0, 1) for v in vars(routing).values())"))
        ],
        "what is kept counts": [
            (
                MEAN,
                "torch.stack([load_balancing_loss(Routing(r.gates, r.logits, r.kept, r.kept)) for r in routings])"
                ".nan_to_num(0).mean()",
            )
        ],
        "no gradient": [(MEAN, MEAN + ".detach()")],
        "any scope": [("if scope not in", "if not isinstance(scope, str) and scope not in")],
    },
    "gates_then_values": {
        "right: unflatten, transpose": [(SORTED, "rows.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)")],
        "right: by indices": [
            (SORTED, "rows[:, [*range(0, rows.shape[1], 2), *range(1, rows.shape[1], 2)]]"),
        ],
        "left as they are (vllm #29273)": [(SORTED, "rows")],
        "values first": [(SORTED, "torch.cat([rows[:, 1::2], rows[:, ::2]], dim=1)")],
        "the other way round: halves are interleaved": [
            (SORTED, "torch.stack(rows.chunk(2, dim=1), dim=2).flatten(1, 2)"),
        ],
        "along the last dimension": [(SORTED, "torch.cat([rows[..., ::2], rows[..., 1::2]], dim=-1)")],
        "float32 in any case": [(SORTED, SORTED + ".float()")],
        "sorted in place": [(SORTED, "rows.copy_(" + SORTED + ")")],
    },
    "count_weights": {
        "right: layer by layer": """
def count_weights(V, C, L, attention, E, k, F, F_shared=0, dense=0, F_dense=0):
    total, active = 2 * V * C, V * C
    for layer in range(L):
        total, active = total + attention, active + attention
        if layer < dense:
            total, active = total + 3 * C * F_dense, active + 3 * C * F_dense
        else:
            routed = E * C + 3 * C * F_shared
            total, active = total + routed + 3 * C * F * E, active + routed + 3 * C * F * k
    return total, active
""",
        "right: total minus what sleeps": [
            (
                "return V * C + always + sparse * E * expert, always + sparse * k * expert",
                "total = V * C + always + sparse * E * expert\n    return total, total - V * C - "
                "sparse * (E - k) * expert",
            )
        ],
        "experts of two matrices": [("expert = L - dense, 3 * C * F", "expert = L - dense, 2 * C * F")],
        "8 x 7 billion: everything E times": [
            ("V * C + always + sparse * E * expert", "E * (always + sparse * expert)")
        ],
        "one matrix for input and output": [("return V * C + always", "return always")],
        "the embedding is active, too": [(", always + sparse * k", ", V * C + always + sparse * k")],
        "no router": [(EACH, "sparse * (3 * C * F_shared)")],
        "no shared expert": [(EACH, "sparse * (E * C)")],
        "the shared expert counts as one of the k": [("sparse * k * expert", "sparse * (k - (F_shared > 0)) * expert")],
        "experts in the dense layers, too": [("L - dense, 3 * C * F", "L, 3 * C * F")],
        "dense layers on top of all others": [("L * attention", "(L + dense) * attention")],
    },
}
