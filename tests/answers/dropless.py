"Lesson 09. What goes wrong here: groups that shift, gates of another pair, filling that is taken for tokens."

PAIRS = "e, rows = kept.T.nonzero(as_tuple=True)"
GROUPS = "tokens.index_select(0, rows).split(kept.sum(dim=0).tolist())"
UP = "F.linear(group, up[i], up_bias[i])"

STATIC = "torch.nonzero_static(kept.T, size=size, fill_value=0).unbind(dim=1)"
ENDS = "kept.sum(dim=0).cumsum(dim=0, dtype=torch.int32)"
FILLING = "(torch.arange(size, device=kept.device) >= ends[-1])[:, None]"
BIAS = "out + bias[e].masked_fill(filling, 0).to(dtype)"
GATHERED = "tokens.index_select(0, rows).masked_fill(filling, 0)"
DOWN = "product(hidden, down, down_bias).masked_fill(filling, 0)"

WORK = "answers_by_group(*work)"
WEIGHED = "gates[rows, e, None] * self.dropout(answers)"
BACK = "torch.zeros_like(tokens).index_add(0, rows, weighed.to(x.dtype)).view_as(x)"

INVERSE = "torch.empty_like(order).scatter(0, order, places)"
SUMS = "answers[inverse].view(-1, k, answers.shape[-1]).sum(dim=1)"
FACTOR = "return len(load) * (longest if slots is None else slots) / load.sum().item()"

ANSWERS = {
    "answers_by_group": {
        "right: each expert looks for its own rows": """
def answers_by_group(tokens, kept, weights, act):
    up, up_bias, down, down_bias = weights
    owners, places, answers = [], [], []
    for e in range(kept.shape[1]):
        mine = kept[:, e].nonzero().squeeze(1)
        hidden = tokens[mine] @ up[e].T
        if up_bias is not None:
            hidden = hidden + up_bias[e]
        answer = act(hidden) @ down[e].T
        if down_bias is not None:
            answer = answer + down_bias[e]
        owners.append(torch.full_like(mine, e))
        places.append(mine)
        answers.append(answer)
    return torch.cat(owners), torch.cat(places), torch.cat(answers)
""",
        "right: a stable argsort, slices from start to end, all up before all down": """
def answers_by_group(tokens, kept, weights, act):
    rows, e = kept.nonzero().unbind(1)
    order = torch.argsort(e, stable=True)
    rows, e = rows[order], e[order]
    ends = e.bincount(minlength=kept.shape[1]).cumsum(0).tolist()
    slices = [slice(start, end) for start, end in zip([0] + ends, ends)]
    up, up_bias, down, down_bias = weights

    def each(x, stack, bias):
        out = torch.cat([torch.einsum("nc,hc->nh", x[s], matrix) for s, matrix in zip(slices, stack)])
        return out if bias is None else out + bias[e]

    return e, rows, each(act(each(tokens[rows], up, up_bias)), down, down_bias)
""",
        "sorted by token, not by expert": [(PAIRS, "rows, e = kept.nonzero(as_tuple=True)")],
        "pairs by expert, but gathered by token": [(GROUPS, GROUPS.replace("0, rows", "0, kept.nonzero()[:, 0]"))],
        "experts without tokens left out, the others move up": [
            (
                "enumerate(groups) if len(group) or not len(rows)]",
                "enumerate(group for group in groups if len(group) or not len(rows))]",
            ),
        ],
        "nothing to join when nobody is kept": [(" or not len(rows)", "")],
        "every expert runs on every token": """
def answers_by_group(tokens, kept, weights, act):
    e, rows = kept.T.nonzero(as_tuple=True)
    up, up_bias, down, down_bias = weights
    hidden = torch.einsum("nc,ehc->enh", tokens, up) + (0 if up_bias is None else up_bias[:, None])
    answers = torch.einsum("enh,ech->enc", act(hidden), down) + (0 if down_bias is None else down_bias[:, None])
    return e, rows, answers[e, rows]
""",
        "places made on the CPU": """
def answers_by_group(tokens, kept, weights, act):
    e, rows = kept.T.nonzero(as_tuple=True)
    order = torch.arange(len(rows))
    groups = tokens[rows][order].split(kept.sum(dim=0).tolist())
    up, up_bias, down, down_bias = ([None] * len(groups) if w is None else w for w in weights)
    answers = [F.linear(act(F.linear(g, up[i], up_bias[i])), down[i], down_bias[i]) for i, g in enumerate(groups)]
    return e, rows, torch.cat(answers)
""",
        "bias of up forgotten": [(UP, "F.linear(group, up[i])")],
        "activation after down, too": [("F.linear(act(", "act(F.linear(act("), ("down_bias[i])\n", "down_bias[i]))\n")],
        "all in float32": [
            ("tokens.index_select", "tokens.float().index_select"),
            ("else w.unbind()", "else w.float().unbind()"),
        ],
        "weights detached": [("w.unbind()", "w.detach().unbind()")],
        "rows as int32": [("return e, rows,", "rows = rows.int()\n    return e, rows,")],
        "answers added up per token already": [
            ("torch.cat(answers)", "torch.zeros_like(tokens).index_add(0, rows, torch.cat(answers))"),
        ],
        "tokens divided in place": [(PAIRS, f"tokens.data /= 1.0001\n    {PAIRS}")],
    },
    "grouped_experts": {
        "right: scatter_add": [
            (
                BACK,
                "torch.zeros_like(tokens).scatter_add(0, rows[:, None].expand(-1, C), weighed.to(x.dtype)).view_as(x)",
            ),
        ],
        "right: an array (N, E, C) and einsum": [
            (
                f"weighed = {WEIGHED}  # (P, C)\n        return {BACK}",
                """answers = self.dropout(answers).to(x.dtype)
        placed = answers.new_zeros(len(tokens), E, C).index_put((rows, e), answers, accumulate=True)
        return torch.einsum("ne,nec->nc", gates.to(x.dtype), placed).to(x.dtype).reshape(x.shape)""",
            ),
        ],
        "written instead of added": [
            (BACK, "torch.zeros_like(tokens).index_put((rows,), weighed.to(x.dtype)).view_as(x)")
        ],
        "written into x": [("torch.zeros_like(tokens).index_add(", "tokens.detach().zero_().index_add_(")],
        "not weighed": [(WEIGHED, "self.dropout(answers)")],
        "gates in the order of the tokens": [("gates[rows, e, None]", "routing.gates[routing.kept][:, None]")],
        "gates made to sum to one again": [(WEIGHED, WEIGHED + " / gates.sum(dim=1)[rows, None].clamp_min(1e-9)")],
        "gates detached": [("gates[rows, e, None]", "gates[rows, e, None].detach()")],
        "no gradient in evaluation mode": [
            (
                f"weighed = {WEIGHED}",
                f"weighed = {WEIGHED}\n        weighed = weighed if self.training else weighed.detach()",
            )
        ],
        "no shape back": [(".view_as(x)", "")],
        "y of the type of the gates": [
            (BACK, "torch.zeros(tokens.shape).index_add(0, rows, weighed.float()).view_as(x)")
        ],
        "no dropout": [("self.dropout(answers)", "answers")],
        "dropout in evaluation, too": [("self.dropout(answers)", "F.dropout(answers, self.dropout.p)")],
        "dropout on the sum of the answers": [
            (WEIGHED, "gates[rows, e, None] * answers"),
            (".view_as(x)", ".view_as(x)\n        return self.dropout(y)"),
            ("return torch.zeros_like(tokens)", "y = torch.zeros_like(tokens)"),
        ],
        "dropout of whole answers": [
            ("self.dropout(answers)", "answers * self.dropout(torch.ones_like(answers[:, :1]))")
        ],
    },
    "answers_in_one_call": {
        "right: sorted by kept instead of nonzero_static": [
            (
                f"e, rows = {STATIC}",
                """pairs = kept.T.reshape(-1).int().argsort(stable=True, descending=True)[:size]
    e, rows = pairs // len(tokens), pairs % len(tokens)""",
            ),
        ],
        "right: torch.where instead of masked_fill": """
def answers_in_one_call(tokens, kept, weights, act, top_k):
    P, dtype = len(tokens) * top_k, product_dtype(tokens)
    up, up_bias, down, down_bias = weights
    pairs = torch.nonzero_static(kept.transpose(0, 1), size=P, fill_value=0)
    e, rows = pairs[:, 0], pairs[:, 1]
    ends = kept.sum(0).cumsum(0).int()
    real = (torch.arange(P, device=tokens.device) < ends[-1]).unsqueeze(-1)
    zero = tokens.new_zeros(())
    x = torch.where(real, tokens[rows], zero).to(dtype)
    hidden = F.grouped_mm(x, up.transpose(1, 2).to(dtype), offs=ends)
    if up_bias is not None:
        hidden = hidden + torch.where(real, up_bias[e], zero).to(dtype)
    answers = F.grouped_mm(act(hidden).to(dtype), down.transpose(1, 2).to(dtype), offs=ends)
    if down_bias is not None:
        answers = answers + down_bias[e].to(dtype)
    return e, rows, torch.where(real, answers, zero.to(answers.dtype))
""",
        "waits: nonzero, then filled up": [
            (STATIC, "F.pad(kept.T.nonzero(), (0, 0, 0, size - int(kept.sum()))).unbind(dim=1)")
        ],
        "waits: a mask as an index": [
            (
                f"return e, rows, {DOWN}",
                """answers = product(hidden, down, down_bias)
    return e, rows, torch.zeros_like(answers).masked_scatter(~filling, answers[~filling[:, 0]])""",
            )
        ],
        "filling made on the CPU": [(", device=kept.device", "")],
        "the list only as long as it has to be": [
            (
                f"return e, rows, {DOWN}",
                f"""n = int(kept.sum())
    return e[:n], rows[:n], {DOWN}[:n]""",
            )
        ],
        "every expert runs on every token": """
def answers_in_one_call(tokens, kept, weights, act, top_k):
    up, up_bias, down, down_bias = weights
    e, rows = torch.nonzero_static(kept.T, size=len(tokens) * top_k, fill_value=0).unbind(dim=1)
    filling = (torch.arange(len(e), device=e.device) >= kept.sum())[:, None]
    hidden = torch.einsum("nc,ehc->enh", tokens, up) + (0 if up_bias is None else up_bias[:, None])
    answers = torch.einsum("enh,ech->enc", act(hidden), down) + (0 if down_bias is None else down_bias[:, None])
    return e, rows, answers[e, rows].masked_fill(filling, 0)
""",
        "filling from one row too late": [(">= ends[-1]", "> ends[-1]")],
        "filling is where the row is 0": [(FILLING, "(rows == 0)[:, None]")],
        "answers times zero instead of masked: nan stays nan": [(DOWN, "product(hidden, down, down_bias) * ~filling")],
        "tokens not masked: filling comes back as a gradient": [(GATHERED, "tokens.index_select(0, rows)")],
        "biases not masked: filling teaches expert 0": [(BIAS, "out + bias[e].to(dtype)")],
        "weights reshaped instead of transposed": [
            ("weight.mT.to(dtype)", "weight.reshape(len(weight), weight.shape[2], weight.shape[1]).to(dtype)"),
        ],
        "autocast ignored": [
            ("rows.to(dtype), weight.mT.to(dtype)", "rows.to(tokens.dtype), weight.mT.to(tokens.dtype)"),
            (".masked_fill(filling, 0).to(dtype)", ".masked_fill(filling, 0)"),
        ],
        "always two experts": [
            ("e, rows = torch.nonzero_static", "size = len(tokens) * 2\n    e, rows = torch.nonzero_static")
        ],
        "weights detached": [("weight.mT.to(dtype)", "weight.detach().mT.to(dtype)")],
    },
    "sort_by_expert": {
        "right: a loop over the places": """
def sort_by_expert(owners):
    order = torch.cat([(owners == e).nonzero().squeeze(1) for e in owners.unique()])
    inverse = torch.zeros_like(order)
    for place, pair in enumerate(order):
        inverse[pair] = place
    return order, inverse


def send_back(answers, inverse, k):
    return torch.stack([answers[inverse[n:n + k]].sum(dim=0) for n in range(0, len(inverse), k)])
""",
        "right: sort twice, index_add": """
def sort_by_expert(owners):
    order = torch.sort(owners, stable=True).indices
    return order, order.argsort()


def send_back(answers, inverse, k):
    order = inverse.argsort()
    return answers.new_zeros(len(inverse) // k, answers.shape[1]).index_add(0, order // k, answers)
""",
        "inverse is order": [(f"return order, {INVERSE}", "return order, order")],
        "gather instead of scatter": [(INVERSE, "places.gather(0, order)")],
        "equal ones from the last to the first": [
            (
                "owners.argsort(stable=True)",
                "len(owners) - 1 - owners.flip(0).argsort(stable=True)",
            )
        ],
        "three experts at most": [
            ("owners.argsort(stable=True)", "torch.cat([(owners == e).nonzero().flatten() for e in range(3)])")
        ],
        "places made on the CPU": [(", device=order.device", "")],
        "places as int32": [
            ("device=order.device)", "device=order.device, dtype=torch.int32)"),
            ("torch.empty_like(order)", "torch.empty_like(places)"),
        ],
        "not sent back at all": [("answers[inverse]", "answers")],
        "k and tokens exchanged": [(SUMS, "answers[inverse].view(k, -1, answers.shape[-1]).sum(dim=0)")],
        "mean instead of sum": [(SUMS, SUMS.replace(".sum(", ".mean("))],
        "always two": [(".view(-1, k,", ".view(-1, 2,")],
        "without gradient": [("answers[inverse]", "answers.detach()[inverse]")],
    },
    "padding_factor": {
        "right: from the masks": """
def padding_factor(routing, slots=None):
    kept = routing.kept.reshape(-1, routing.kept.shape[-1])
    if slots is None:
        slots = int(kept.sum(dim=0).max())
    if (kept.sum(dim=0) > slots).any():
        raise ValueError(f"{kept.sum(dim=0).max()} tokens at one expert, but only {slots} slots")
    return float(kept.shape[1] * slots / kept.sum())
""",
        "right: by lists": """
def padding_factor(routing, slots=None):
    load = routing.load.tolist()
    shelf = max(load) if slots is None else slots
    if max(load) > shelf:
        raise ValueError("too few slots")
    return sum(shelf for _ in load) / sum(load)
""",
        "from chosen": [
            ("load = routing.load", "load = routing.chosen.reshape(-1, routing.chosen.shape[-1]).sum(dim=0)")
        ],
        "a tensor": [
            (
                ".item()\n",
                "\n",
            ),
            ("load.sum().item()", "load.sum()"),
        ],
        "upside down": [(FACTOR, "return load.sum().item() / (len(load) * (longest if slots is None else slots))")],
        "slots ignored": [("(longest if slots is None else slots)", "longest")],
        "experts without tokens have no shelf": [("len(load) *", "int((load > 0).sum()) *")],
        "too few slots go unnoticed": [("if slots is not None and slots < longest:", "if False:")],
        "no slots taken for no number of slots": [("slots is not None and slots", "slots and slots")],
        "exactly enough slots are refused": [("slots < longest", "slots <= longest")],
        "sequence by sequence": [("load = routing.load", "load = routing.kept.sum(dim=-2).flatten()")],
    },
}
