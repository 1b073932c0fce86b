"Lesson 09. What goes wrong here: order and inverse, blocks that shift, rows that nobody computed, gates that belong to another pair."

PAIRS = "e, rows = kept.T.nonzero(as_tuple=True)"
PIECES = "pieces = tokens.index_select(0, rows).split(kept.sum(dim=0).tolist())"
UP = "F.linear(piece, up, up_bias)"
ZIP = "zip(pieces, *per_expert)"

STATIC = "torch.nonzero_static(kept.T, size=size, fill_value=0).unbind(dim=1)"
ENDS = "kept.sum(dim=0).cumsum(dim=0, dtype=torch.int32)"
BIAS = "out + bias[e].masked_fill(filling, 0).to(dtype)"
GATHERED = "tokens.index_select(0, rows).masked_fill(filling, 0)"
DOWN = "product(hidden, down, down_bias).masked_fill(filling, 0)"

CHOICE = "if fast and self.top_k:"
BLOCKS = "answers_in_blocks(*work)"
CHECK = "if self.top_k and len(rows) > self.top_k * len(tokens):"
GATES = "routing.gates.reshape(-1, E)[rows, e, None]"
WEIGHED = "weighed = gates * self.dropout(answers)"
BACK = "torch.zeros_like(tokens).index_add(0, rows, weighed.to(x.dtype)).view_as(x)"

LINK = "routing.load.cumsum(dim=0, dtype=torch.int32)"

ORDER = "order = owners.argsort(stable=True)"
INVERSE = "torch.empty_like(order).scatter(0, order, places)"
SUMS = "answers[inverse].view(-1, k, answers.shape[-1]).sum(dim=1)"

FACTOR = "return len(load) * (longest if seats is None else seats) / load.sum().item()"

ANSWERS = {
    "dropless-blocks": {
        "right: each expert looks for its own rows": '''
def answers_in_blocks(tokens, kept, weights, act):
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
''',
        "right: sorted by a stable argsort, slices from start to end": '''
def answers_in_blocks(tokens, kept, weights, act):
    rows, e = kept.nonzero().unbind(1)
    order = torch.argsort(e, stable=True)
    rows, e = rows[order], e[order]
    gathered = tokens[rows]
    ends = e.bincount(minlength=kept.shape[1]).cumsum(0).tolist()
    blocks, start = [], 0
    for expert, end in enumerate(ends):
        up, up_bias, down, down_bias = (w if w is None else w[expert] for w in weights)
        blocks.append(F.linear(act(F.linear(gathered[start:end], up, up_bias)), down, down_bias))
        start = end
    return e, rows, torch.cat(blocks)
''',
        "right: all up, then one activation, then all down": '''
def answers_in_blocks(tokens, kept, weights, act):
    loads = kept.sum(0).tolist()
    e, rows = torch.where(kept.T)
    up, up_bias, down, down_bias = weights

    def each(blocks, stack, bias):
        out = torch.cat([block @ matrix.mT for block, matrix in zip(blocks.split(loads), stack)])
        return out if bias is None else out + bias[e]

    return e, rows, each(act(each(tokens[rows], up, up_bias)), down, down_bias)
''',
        "right: einsum by block": [
            (UP, "torch.einsum('nc,hc->nh', piece, up) + (0 if up_bias is None else up_bias)"),
        ],
        "sorted by token, not by expert": [(PAIRS, "rows, e = kept.nonzero(as_tuple=True)")],
        "pairs by token, blocks by expert": [
            (PIECES, "pieces = tokens.index_select(0, kept.nonzero()[:, 0]).split(kept.sum(dim=0).tolist())"),
        ],
        "experts and rows exchanged in nonzero": [(PAIRS, "rows, e = kept.T.nonzero(as_tuple=True)")],
        "two experts for every token": [
            (PAIRS, "top = kept.int().topk(2, dim=1).indices\n    e, order = top.flatten().sort(stable=True)\n    rows = order // 2"),
            ("kept.sum(dim=0).tolist()", "e.bincount(minlength=kept.shape[1]).tolist()"),
        ],
        "blocks of equal length": [(".split(kept.sum(dim=0).tolist())", ".tensor_split(kept.shape[1])")],
        "split at the ends instead of by the lengths": [
            (".split(kept.sum(dim=0).tolist())", ".tensor_split(kept.sum(dim=0).cumsum(dim=0).tolist())[1:]"),
        ],
        "loads counted by token": [(".split(kept.sum(dim=0).tolist())", ".split(kept.sum(dim=1).tolist())")],
        "experts without tokens left out, the others move up": [(ZIP, "zip([piece for piece in pieces if len(piece) or not len(rows)], *per_expert)")],
        "experts without tokens skipped: nothing to join when nobody is kept": [(" or not len(rows)", "")],
        "every expert runs on every token": '''
def answers_in_blocks(tokens, kept, weights, act):
    e, rows = kept.T.nonzero(as_tuple=True)
    up, up_bias, down, down_bias = weights
    hidden = torch.einsum("nc,ehc->enh", tokens, up)
    if up_bias is not None:
        hidden = hidden + up_bias[:, None]
    answers = torch.einsum("enh,ech->enc", act(hidden), down)
    if down_bias is not None:
        answers = answers + down_bias[:, None]
    return e, rows, answers[e, rows]
''',
        "every token goes up in every expert, only the kept come down": '''
def answers_in_blocks(tokens, kept, weights, act):
    e, rows = kept.T.nonzero(as_tuple=True)
    up, up_bias, down, down_bias = weights
    hidden = torch.einsum("nc,ehc->enh", tokens, up)[e, rows]
    hidden = act(hidden if up_bias is None else hidden + up_bias[e])
    pieces = hidden.split(kept.sum(dim=0).tolist())
    answers = torch.cat([F.linear(piece, matrix) for piece, matrix in zip(pieces, down)])
    return e, rows, answers if down_bias is None else answers + down_bias[e]
''',
        "a box as long as the fullest expert": '''
def answers_in_blocks(tokens, kept, weights, act):
    load = kept.sum(dim=0)
    e, rows = kept.T.nonzero(as_tuple=True)
    place = torch.arange(len(rows)) - (load.cumsum(dim=0) - load)[e]
    up, up_bias, down, down_bias = weights
    longest = load.max() if load.sum() else 1
    box = tokens.new_zeros(len(load), longest, tokens.shape[1]).index_put((e, place), tokens[rows])
    hidden = torch.bmm(box, up.mT)
    hidden = act(hidden if up_bias is None else hidden + up_bias[:, None])
    answers = torch.bmm(hidden, down.mT)
    return e, rows, (answers if down_bias is None else answers + down_bias[:, None])[e, place]
''',
        "no gathering: the first rows": [("tokens.index_select(0, rows)", "tokens.repeat(kept.shape[1], 1)[:len(rows)]")],
        "bias of up forgotten": [(UP, "F.linear(piece, up)")],
        "bias of down forgotten": [("down, down_bias)\n               for", "down)\n               for")],
        "bias of the first expert for all": [("up_bias)), down", "up_bias if up_bias is None else weights[1][0])), down")],
        "bias before the weights: added to the answer of the wrong place": [
            (UP, "F.linear(piece, up) + (0 if up_bias is None else up_bias.flip(0))"),
        ],
        "no activation": [(f"act({UP})", UP)],
        "activation after down, too": [("F.linear(act(", "act(F.linear(act("), ("down, down_bias)\n", "down, down_bias))\n")],
        "always ReLU": [(f"act({UP})", f"F.relu({UP})")],
        "all in float32": [
            ("tokens.index_select", "tokens.float().index_select"),
            (ZIP, "zip(pieces, *([None if w is None else w.float() for w in stacked] for stacked in per_expert))"),
        ],
        "weights detached": [("F.linear(piece, up, up_bias)", "F.linear(piece, up.detach(), up_bias)")],
        "tokens detached": [("tokens.index_select", "tokens.detach().index_select")],
        "answers weighed by the size of the block": [("for piece, up", "/ max(len(piece), 1) for piece, up")],
        "answers in the order of the tokens": [("torch.cat(answers)", "torch.cat(answers)[rows.argsort(stable=True)]")],
        "rows of an expert from the last to the first": [
            (PAIRS, "e, rows = kept.T.flip(1).nonzero(as_tuple=True)\n    rows = len(tokens) - 1 - rows"),
        ],
        "the experts named by their block, empty ones not counted": [
            ("return e, rows,", "e = e.unique(return_inverse=True)[1]\n    return e, rows,"),
        ],
        "answers added up per token already": [
            ("return e, rows, torch.cat(answers)", "return e, rows, torch.zeros_like(tokens).index_add(0, rows, torch.cat(answers))"),
        ],
    },
    "dropless-call": {
        "right: sorted by kept instead of nonzero_static": [
            (f"e, rows = {STATIC}", '''jobs = kept.T.reshape(-1).int().argsort(stable=True, descending=True)[:size]
    e, rows = jobs // len(tokens), jobs % len(tokens)'''),
        ],
        "right: places by a running sum, written with scatter": '''
def answers_in_one_call(tokens, kept, weights, act, top_k):
    N, E = kept.shape
    P = N * top_k
    flat = kept.T.reshape(-1)
    place = torch.where(flat, flat.cumsum(0) - 1, P)  # all that is not kept goes behind the list
    jobs = flat.new_zeros(P + 1, dtype=torch.long).scatter(0, place, torch.arange(E * N, device=flat.device))[:P]
    e, rows = jobs.div(max(N, 1), rounding_mode="floor"), jobs.remainder(max(N, 1))
    ends = kept.sum(0).cumsum(0).int()
    real = (torch.arange(P, device=flat.device) < ends[-1]).unsqueeze(-1)
    zero = tokens.new_zeros(())
    dtype = product_dtype(tokens)
    up, up_bias, down, down_bias = weights
    x = torch.where(real, tokens[rows], zero).to(dtype)
    hidden = F.grouped_mm(x, up.transpose(1, 2).to(dtype), offs=ends)
    if up_bias is not None:
        hidden = hidden + torch.where(real, up_bias[e], zero).to(dtype)
    answers = F.grouped_mm(act(hidden).to(dtype), down.transpose(1, 2).to(dtype), offs=ends)
    if down_bias is not None:
        answers = answers + down_bias[e].to(dtype)
    return e, rows, torch.where(real, answers, zero.to(answers.dtype))
''',
        "right: masks on the hidden channels, too": [
            ("hidden = act(product(gathered, up, up_bias))", "hidden = act(product(gathered, up, up_bias).masked_fill(filling, 0)).masked_fill(filling, 0)"),
        ],
        "right: written into the filling by a mask": [
            (f"return e, rows, {DOWN}", "answers = product(hidden, down, down_bias)\n    answers[filling[:, 0]] = 0\n    return e, rows, answers"),
        ],
        "waits: nonzero, then filled up": [(STATIC, "F.pad(kept.T.nonzero(), (0, 0, 0, size - int(kept.sum()))).unbind(dim=1)")],
        "waits: answers in blocks, then filled up": '''
def answers_in_one_call(tokens, kept, weights, act, top_k):
    e, rows, answers = answers_in_blocks(tokens, kept, weights, act)
    rest = len(tokens) * top_k - len(rows)
    return F.pad(e, (0, rest)), F.pad(rows, (0, rest)), F.pad(answers, (0, 0, 0, rest))
''',
        "waits: the list cut by loads that are read": [
            (STATIC, STATIC + """
    loads = kept.sum(dim=0).tolist()"""),
            ("out = F.grouped_mm(rows.to(dtype), weight.mT.to(dtype), offs=ends)", """blocks = rows.to(dtype)[:sum(loads)].split(loads)
        out = torch.cat([F.linear(block, matrix.to(dtype)) for block, matrix in zip(blocks, weight)])
        out = F.pad(out, (0, 0, 0, size - len(out)))"""),
        ],
        "waits: a mask as an index": [(f"return e, rows, {DOWN}", '''answers = product(hidden, down, down_bias)
    return e, rows, torch.zeros_like(answers).masked_scatter(~filling, answers[~filling[:, 0]])''')],
        "waits: the end read as a number": [(">= ends[-1])", ">= ends[-1].item())")],
        "the list only as long as it has to be": [(f"return e, rows, {DOWN}", f'''n = int(kept.sum())
    return e[:n], rows[:n], {DOWN}[:n]''')],
        "every expert runs on every token": '''
def answers_in_one_call(tokens, kept, weights, act, top_k):
    size, dtype = len(tokens) * top_k, product_dtype(tokens)
    up, up_bias, down, down_bias = (None if w is None else w.to(dtype) for w in weights)
    e, rows = torch.nonzero_static(kept.T, size=size, fill_value=0).unbind(dim=1)
    filling = (torch.arange(size) >= kept.sum())[:, None]
    hidden = torch.einsum("nc,ehc->enh", tokens.to(dtype), up)
    hidden = act(hidden if up_bias is None else hidden + up_bias[:, None])
    answers = torch.einsum("enh,ech->enc", hidden, down)
    answers = answers if down_bias is None else answers + down_bias[:, None]
    return e, rows, answers[e, rows].masked_fill(filling, 0)
''',
        "sorted by token": [(STATIC, "torch.nonzero_static(kept, size=size, fill_value=0).flip(1).unbind(dim=1)")],
        "list sorted by token, blocks by expert": [("tokens.index_select(0, rows)", "tokens.index_select(0, torch.nonzero_static(kept, size=size, fill_value=0)[:, 0])")],
        "fill value left at -1: the last token": [("fill_value=0", "fill_value=-1")],
        "starts instead of ends": [(ENDS, "(kept.sum(dim=0).cumsum(dim=0) - kept.sum(dim=0)).int()")],
        "ends off by one": [(ENDS, ENDS + " - 1")],
        "lengths instead of ends": [(ENDS, "kept.sum(dim=0, dtype=torch.int32)")],
        "ends of equal blocks": [(ENDS, "(size * torch.arange(1, kept.shape[1] + 1) // kept.shape[1]).int()")],
        "filling from one row too late": [(">= ends[-1]", "> ends[-1]")],
        "filling is where the row is 0": [("(torch.arange(size, device=kept.device) >= ends[-1])[:, None]", "(rows == 0)[:, None]")],
        "answers not masked": [(DOWN, "product(hidden, down, down_bias)")],
        "answers times zero instead of masked: nan stays nan": [(DOWN, "product(hidden, down, down_bias) * ~filling")],
        "nan turned into zeros: what else lay there stays": [(DOWN, "product(hidden, down, down_bias).nan_to_num()")],
        "tokens not masked: filling comes back as a gradient": [(GATHERED, "tokens.index_select(0, rows)")],
        "tokens times zero instead of masked": [(GATHERED, "tokens.index_select(0, rows) * ~filling")],
        "biases forgotten": [(f"return out if bias is None else {BIAS}", "return out")],
        "biases not masked: filling teaches expert 0": [(BIAS, "out + bias[e].to(dtype)")],
        "bias by token instead of by expert": [("bias[e]", "bias[rows % len(bias)]")],
        "bias of the first expert for all": [("bias[e]", "bias[:1].expand(len(e), -1)")],
        "weights not turned": [("weight.mT.to(dtype)", "weight.to(dtype)")],
        "matrices reshaped instead of turned": [
            ("weight.mT.to(dtype)", "weight.reshape(len(weight), weight.shape[2], weight.shape[1]).to(dtype)"),
        ],
        "autocast ignored in the products": [("rows.to(dtype), weight.mT.to(dtype)", "rows.to(tokens.dtype), weight.mT.to(tokens.dtype)")],
        "autocast ignored": [("rows.to(dtype), weight.mT.to(dtype)", "rows, weight.mT"), (".masked_fill(filling, 0).to(dtype)", ".masked_fill(filling, 0)")],
        "always bfloat16": [("def product(rows", "dtype = torch.bfloat16\n\n    def product(rows")],
        "no activation": [("act(product(gathered, up, up_bias))", "product(gathered, up, up_bias)")],
        "always two experts": [
            ("    e, rows = torch.nonzero_static", "    size = len(tokens) * 2\n    e, rows = torch.nonzero_static"),
        ],
        "weights detached": [("weight.mT.to(dtype)", "weight.detach().mT.to(dtype)")],
    },
    "dropless-grouped": {
        "right: scatter_add, k checked token by token": [
            (CHECK, "if self.top_k and not (fast or kept.sum(dim=-1).max() <= self.top_k if len(kept) else True):"),
            (BACK, "torch.zeros_like(tokens).scatter_add(0, rows[:, None].expand(-1, C), weighed.to(x.dtype)).reshape(x.shape)"),
        ],
        "right: an array (N, E, C) and einsum": [
            (f"gates = {GATES}  # (P, 1)\n        {WEIGHED}\n        return {BACK}", '''answers = self.dropout(answers).to(x.dtype)
        placed = answers.new_zeros(len(tokens), E, C).index_put((rows, e), answers, accumulate=True)
        gates = routing.gates.reshape(-1, E).to(x.dtype)
        return torch.einsum("ne,nec->nc", gates, placed).to(x.dtype).reshape(x.shape)'''),
        ],
        "right: checked first, index_add_ into float32": [
            (f"        {CHECK}", "        if False:"),
            (f"        {CHOICE}", '''        if self.top_k and not fast and kept.sum() > self.top_k * len(tokens):
            raise ValueError(f"top_k is {self.top_k}, but there are {kept.sum()} pairs of {len(tokens)} tokens")
        if fast and self.top_k is not None:'''),
            (BACK, "torch.zeros(tokens.shape, device=x.device, dtype=weighed.dtype).index_add_(0, rows, weighed).to(x.dtype).view(x.shape)"),
        ],
        "written instead of added": [(BACK, "torch.zeros_like(tokens).index_put((rows,), weighed.to(x.dtype)).view_as(x)")],
        "an array (N, E, C) in which filling overwrites": [
            (f"gates = {GATES}  # (P, 1)\n        {WEIGHED}\n        return {BACK}", '''placed = answers.new_zeros(len(tokens), E, C).index_put((rows, e), self.dropout(answers))
        return (routing.gates.reshape(-1, E, 1) * placed).sum(dim=1).to(x.dtype).view_as(x)'''),
        ],
        "in the order of the list, k by k": [(BACK, "weighed.view(len(tokens), -1, C).sum(dim=1).to(x.dtype).view_as(x)")],
        "order used as its inverse": [(BACK, "torch.zeros_like(tokens).index_add(0, rows, weighed[rows.argsort(stable=True)].to(x.dtype)).view_as(x)")],
        "added to x: the residual twice": [("torch.zeros_like(tokens).index_add", "tokens.index_add")],
        "added into x itself": [("torch.zeros_like(tokens).index_add(", "tokens.detach().zero_().index_add_(")],
        "a token without experts passes through": [
            (f"return {BACK}", "y = torch.zeros_like(tokens).index_add(0, rows, weighed.to(x.dtype))\n"
             "        return torch.where(kept.any(dim=1, keepdim=True), y, tokens).view_as(x)"),
        ],
        "when nobody is kept, x comes back": [(f"        gates = {GATES}", f"        if not len(rows):\n            return x\n        gates = {GATES}")],
        "not weighed": [(WEIGHED, "weighed = self.dropout(answers)")],
        "weighed before the experts: an MLP is not linear": [
            (BLOCKS, "answers_in_blocks(tokens * routing.gates.reshape(-1, E).sum(dim=1, keepdim=True), *work[1:])"),
        ],
        "gates in the order of the tokens": [(GATES, "routing.gates[routing.kept][:, None]")],
        "gates by row and expert exchanged": [(GATES, "routing.gates.reshape(E, -1)[e, rows, None]")],
        "largest gate of the token for all of its experts": [(GATES, "routing.gates.reshape(-1, E).amax(dim=1)[rows, None]")],
        "gates made to sum to one again": [(WEIGHED, WEIGHED + " / routing.gates.reshape(-1, E).sum(dim=1)[rows, None].clamp_min(1e-9)")],
        "gates detached": [(GATES, GATES + ".detach()")],
        "absolute gates": [(GATES, GATES + ".abs()")],
        "chosen instead of kept": [(BLOCKS, "answers_in_blocks(tokens, routing.chosen.reshape(-1, E), *work[2:])")],
        "kept read off the gates": [(BLOCKS, "answers_in_blocks(tokens, routing.gates.reshape(-1, E) > 0, *work[2:])")],
        "no shape back": [(".view_as(x)", "")],
        "answer of the wrong type": [("weighed.to(x.dtype)", "weighed"), ("torch.zeros_like(tokens)", "torch.zeros(tokens.shape)")],
        "no dropout": [("self.dropout(answers)", "answers")],
        "dropout in evaluation, too": [("self.dropout(answers)", "F.dropout(answers, self.dropout.p)")],
        "dropout on the sum of the answers": [
            (WEIGHED, "weighed = gates * answers"), (BACK, BACK.replace("torch.zeros_like", "self.dropout(torch.zeros_like").replace(".view_as", ").view_as")),
        ],
        "dropout of whole answers instead of channels": [("self.dropout(answers)", "answers * self.dropout(torch.ones_like(answers[:, :1]))")],
        "dropout on what goes in": [("*work)", "self.dropout(tokens), *work[1:])"), ("gates * self.dropout(answers)", "gates * answers")],
        "too many pairs go unnoticed": [(CHECK, "if False:")],
        "full is taken for too full": [(CHECK, CHECK.replace(">", ">="))],
        "fewer pairs than places are refused": [(CHECK, CHECK.replace(">", "!="))],
        "checked on a GPU, too: it is waited for": [(f"{CHECK}\n", "if self.top_k and kept.sum() > self.top_k * len(tokens):\n")],
        "one call wherever top_k is known": [(CHOICE, "if self.top_k:")],
        "one call never used": [(CHOICE, "if False:")],
        "one call without top_k": [(CHOICE, "if fast:"), ("*work, self.top_k", "*work, self.top_k or 1")],
        "both ways exchanged": [(CHOICE, "if not (fast and self.top_k):"), ("*work, self.top_k", "*work, self.top_k or E")],
    },
    "dropless-offsets": {
        "right: counted in Python": '''
def block_ends(routing):
    ends, total = [], 0
    for e in range(routing.kept.shape[-1]):
        total += int(routing.kept[..., e].sum())
        ends.append(total)
    return torch.tensor(ends, dtype=torch.int32)
''',
        "right: a triangle of ones": '''
def block_ends(routing):
    load = routing.kept.flatten(0, -2).sum(dim=0) if routing.kept.dim() > 1 else routing.kept
    return (torch.ones(len(load), len(load)).tril() @ load.float()).int()
''',
        "right: searched in the sorted list": '''
def block_ends(routing):
    E = routing.kept.shape[-1]
    owners = routing.kept.reshape(-1, E).nonzero()[:, 1].sort().values
    return torch.searchsorted(owners, torch.arange(E), right=True).to(torch.int32)
''',
        "starts": [(LINK, "(routing.load.cumsum(dim=0) - routing.load).int()")],
        "int64": [(LINK, "routing.load.cumsum(dim=0)")],
        "a zero in front": [(LINK, "F.pad(routing.load.cumsum(dim=0), (1, 0)).int()")],
        "the last place instead of the end": [(LINK, LINK + " - 1")],
        "lengths": [(LINK, "routing.load.int()")],
        "from chosen": [(LINK, "routing.chosen.reshape(-1, routing.chosen.shape[-1]).sum(dim=0).cumsum(dim=0, dtype=torch.int32)")],
        "of the first sequence": [(LINK, "routing.kept[0].sum(dim=0).cumsum(dim=0, dtype=torch.int32)")],
        "sequence by sequence": [(LINK, "routing.kept.sum(dim=-2).cumsum(dim=-1, dtype=torch.int32)")],
        "one dimension for the tokens": [(LINK, "routing.kept.sum(dim=0).cumsum(dim=0, dtype=torch.int32)")],
        "running sum over the tokens": [(LINK, "routing.kept.reshape(-1, routing.kept.shape[-1]).cumsum(dim=0, dtype=torch.int32)[:, -1]")],
        "experts without tokens left out": [(LINK, "routing.load[routing.load > 0].cumsum(dim=0, dtype=torch.int32)")],
        "where the expert changes in the sorted list": [(LINK, '''(lambda owners: torch.cat([
        (owners.diff() > 0).nonzero().flatten() + 1, torch.tensor([len(owners)])]).int())(
            routing.kept.reshape(-1, routing.kept.shape[-1]).nonzero()[:, 1].sort().values)''')],
    },
    "dropless-permutation": {
        "right: counting sort and a loop": '''
def sort_by_expert(owners):
    order = [job for e in sorted(set(owners.tolist())) for job, owner in enumerate(owners.tolist()) if owner == e]
    inverse = [0] * len(order)
    for place, job in enumerate(order):
        inverse[job] = place
    return torch.tensor(order), torch.tensor(inverse)


def send_back(answers, inverse, k):
    return torch.stack([answers[inverse[n:n + k]].sum(dim=0) for n in range(0, len(inverse), k)])
''',
        "right: sort twice, index_add": '''
def sort_by_expert(owners):
    order = torch.sort(owners, stable=True).indices
    return order, order.argsort()


def send_back(answers, inverse, k):
    order = inverse.argsort()
    return answers.new_zeros(len(inverse) // k, answers.shape[1]).index_add(0, order // k, answers)
''',
        "right: keys that are never equal, einsum": '''
def sort_by_expert(owners):
    jobs = torch.arange(len(owners))
    order = (owners * len(owners) + jobs).argsort()
    inverse = torch.zeros_like(order)
    inverse[order] = jobs
    return order, inverse


def send_back(answers, inverse, k):
    return torch.einsum("nkc->nc", answers[inverse].unflatten(0, (-1, k)))
''',
        "inverse is order": [(f"return order, {INVERSE}", "return order, order")],
        "inverse from the last to the first": [(f"return order, {INVERSE}", "return order, order.flip(0)")],
        "gather instead of scatter": [(INVERSE, "places.gather(0, order)")],
        "inverse of the experts instead of the jobs": [(INVERSE, "owners[order].argsort(stable=True)")],
        "order exchanged with inverse": [(f"return order, {INVERSE}", f"return {INVERSE}, order")],
        "the sorted experts instead of the order": [(ORDER, "order = owners.sort().values")],
        "from the last expert to the first": [(ORDER, "order = owners.argsort(stable=True, descending=True)")],
        "equal ones from the last to the first": [(ORDER, "order = len(owners) - 1 - owners.flip(0).argsort(stable=True)")],
        "three experts at most": [(ORDER, "order = torch.cat([(owners == e).nonzero().flatten() for e in range(3)])")],
        "sent the wrong way": [("answers[inverse]", "torch.empty_like(answers).index_copy(0, inverse, answers)")],
        "not sent back at all": [("answers[inverse]", "answers")],
        "k and tokens exchanged": [(SUMS, "answers[inverse].view(k, -1, answers.shape[-1]).sum(dim=0)")],
        "mean instead of sum": [(SUMS, SUMS.replace(".sum(", ".mean("))],
        "always two": [(".view(-1, k,", ".view(-1, 2,")],
        "summed over the channels": [(SUMS, SUMS.replace("sum(dim=1)", "sum(dim=2)"))],
        "every k-th answer": [(SUMS, "sum(answers[inverse][n * (len(inverse) // k):(n + 1) * (len(inverse) // k)] for n in range(k))")],
        "only the first two answers": [(SUMS, "answers[inverse][0::k] + (answers[inverse][1::k] if k > 1 else 0)")],
    },
    "dropless-padding": {
        "right: from the masks": '''
def padding_factor(routing, seats=None):
    kept = routing.kept.reshape(-1, routing.kept.shape[-1])
    if seats is None:
        seats = int(kept.sum(dim=0).max())
    if (kept.sum(dim=0) > seats).any():
        raise ValueError(f"{kept.sum(dim=0).max()} tokens at one expert, but only {seats} seats")
    return float(kept.shape[1] * seats / kept.sum())
''',
        "right: by lists": '''
def padding_factor(routing, seats=None):
    load = routing.load.tolist()
    shelf = max(load) if seats is None else seats
    if max(load) > shelf:
        raise ValueError("too few seats")
    return sum(shelf for _ in load) / sum(load)
''',
        "from chosen": [("load = routing.load", "load = routing.chosen.reshape(-1, routing.chosen.shape[-1]).sum(dim=0)")],
        "useful is what was chosen": [("load.sum().item()", "routing.chosen.sum().item()")],
        "upside down": [(FACTOR, "return load.sum().item() / (len(load) * (longest if seats is None else seats))")],
        "share of the waste instead of the factor": [(FACTOR, FACTOR + " - 1")],
        "seats ignored": [("(longest if seats is None else seats)", "longest")],
        "seats for all experts together": [("len(load) * (longest if seats is None else seats)", "(len(load) * longest if seats is None else seats)")],
        "fullest by emptiest": [(FACTOR, "return (longest if seats is None else seats) / max(load.min().item(), 1)")],
        "fullest by the mean of those at work": [
            (FACTOR, "return (longest if seats is None else seats) / load[load > 0].float().mean().item()"),
        ],
        "experts without tokens have no shelf": [("len(load) *", "int((load > 0).sum()) *")],
        "of the first sequence": [("load = routing.load", "load = (routing.kept if routing.kept.dim() < 3 else routing.kept[0]).sum(dim=0)")],
        "too few seats go unnoticed": [("if seats is not None and seats < longest:", "if False:")],
        "no seats taken for no number of seats": [("seats is not None and seats", "seats and seats")],
        "too few seats made up for": [("if seats is not None and seats < longest:", "seats = seats and max(seats, longest)\n    if False:")],
        "exactly enough seats are refused": [("seats < longest", "seats <= longest")],
        "rounded to whole rows": [(FACTOR, FACTOR.replace(" / ", " // "))],
        "reads the lesson's toy": [("load = routing.load", "load = toy.load")],
    },
}
