"Answers to the exercises of lesson 31, right and wrong."

PARTS = "kept.view(processes, B // processes * T, processes, E // processes)"
MOVE = "dist.all_to_all_single(arrived, rows.contiguous(), receives, sends, group=group)"
BACK = "return AllToAll.apply(gradient, *ctx.way_back), None, None, None"
PAIRS = "e, rows = kept.T.nonzero(as_tuple=True)"
COUNTS = "dist.all_to_all_single(theirs, counts, group=self.group)"
MINE = "torch.arange(E // W, device=x.device).repeat(W).repeat_interleave(theirs.flatten())"
HOME = "answers = AllToAll.apply(answers, receives, sends, self.group)"
WEIGHED = "weighed = gates[rows, e, None] * answers"
TRAVEL = "travel = 2 * size / bandwidth * (processes - 1) / processes"
WORK = "work = 2 * matrices * n_hidden / speed"

ANSWERS = {
    "traffic": {
        "right: a loop over senders and receivers": """
def traffic(kept, processes):
    rows = [part.chunk(processes, dim=2) for part in kept.chunk(processes)]
    return torch.tensor([[piece.sum() for piece in pieces] for pieces in rows])
""",
        "right: counts per sender and expert, then experts joined": """
def traffic(kept, processes):
    loads = torch.stack([part.flatten(0, 1).sum(dim=0) for part in kept.tensor_split(processes)])
    return loads.unflatten(1, (processes, -1)).sum(dim=2)
""",
        "transposed": [("return parts.sum(dim=(1, 3))", "return parts.sum(dim=(1, 3)).T")],
        "experts dealt out like cards": [
            (PARTS, "kept.view(processes, -1, E // processes, processes).transpose(2, 3)"),
        ],
        "sequences dealt out like cards": [
            (PARTS, "kept.view(B // processes, processes, T, processes, E // processes).movedim(1, 0).flatten(1, 2)"),
        ],
        "processes that hear from each other, not rows": [("parts.sum(dim=(1, 3))", "parts.any(dim=3).sum(dim=1)")],
        "a share instead of a count": [("parts.sum(dim=(1, 3))", "parts.float().mean(dim=(1, 3))")],
    },
    "all_to_all": {
        "right: pieces put together, backward written out": """
class AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, sends, receives, group=None):
        ctx.sends, ctx.receives, ctx.group = sends, receives, group
        out = torch.empty((sum(receives),) + tuple(rows.shape[1:]), dtype=rows.dtype, device=rows.device)
        dist.all_to_all_single(out, rows.clone(memory_format=torch.contiguous_format), output_split_sizes=receives,
                               input_split_sizes=sends, group=group)
        return out

    @staticmethod
    def backward(ctx, gradient):
        back = gradient.new_zeros(sum(ctx.sends), *gradient.shape[1:])
        dist.all_to_all_single(back, gradient.contiguous(), ctx.sends, ctx.receives, group=ctx.group)
        return back, None, None, None
""",
        "right: setup_context": """
def exchange(rows, sends, receives, group):
    arrived = rows.new_empty([sum(receives), *rows.shape[1:]])
    dist.all_to_all_single(arrived, rows.contiguous(), receives, sends, group=group)
    return arrived


class AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(rows, sends, receives, group=None):
        return exchange(rows, sends, receives, group)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.sends, ctx.receives, ctx.group = inputs

    @staticmethod
    def backward(ctx, gradient):
        return exchange(gradient, ctx.receives, ctx.sends, ctx.group), None, None, None
""",
        "the two lists exchanged": [("rows.contiguous(), receives, sends", "rows.contiguous(), sends, receives")],
        "equal parts": [("rows.contiguous(), receives, sends, ", "rows.contiguous(), ")],
        "the gradient goes forward once more": [("*ctx.way_back)", "*ctx.way_back[1::-1], ctx.way_back[2])")],
        "the gradient stays where it is": [(BACK, "return gradient, None, None, None")],
        "a gradient of zeros": [
            (BACK, "return gradient.new_zeros(sum(ctx.way_back[1]), *gradient.shape[1:]), None, None, None"),
        ],
        "only float32": [
            ("rows.new_empty(sum(receives), *rows.shape[1:])", "torch.empty(sum(receives), *rows.shape[1:])")
        ],
        "only matrices": [
            ("rows.new_empty(sum(receives), *rows.shape[1:])", "rows.new_empty(sum(receives), rows.shape[-1])"),
        ],
        "rows as they lie in memory": [("rows.contiguous()", "rows")],
        "a gradient divided by the processes": [
            (BACK, BACK.replace("*ctx.way_back)", "*ctx.way_back) / dist.get_world_size()")),
        ],
    },
    "expert_parallel_experts": {
        "right: one expert of a time, gates as a product at the end": [
            (
                PAIRS,
                "order = [kept[:, n].nonzero().squeeze(1) for n in range(E)]\n"
                "        rows, e = torch.cat(order), torch.arange(E).repeat_interleave(kept.sum(dim=0))",
            ),
            (WEIGHED, "weighed = gates.index_select(0, rows).gather(1, e[:, None]) * answers"),
        ],
        "right: experts of the rows sent along": [
            (MINE, "AllToAll.apply(e % (E // W), sends, receives, self.group)"),
        ],
        "right: room for the answers first": [
            (
                "torch.zeros_like(tokens).index_add(0, rows, weighed.to(x.dtype)).view_as(x)",
                "tokens.new_zeros(tokens.shape).scatter_add(0, rows[:, None].expand_as(weighed), "
                "weighed.to(x.dtype)).reshape(x.shape)",
            ),
        ],
        "sorted by token, not by expert": [(PAIRS, "rows, e = kept.nonzero(as_tuple=True)")],
        "the rows that arrive taken for sorted by expert": [
            (MINE, "torch.arange(E // W).repeat_interleave(theirs.sum(dim=0))"),
        ],
        "the gates forgotten": [(WEIGHED, "weighed = answers")],
        "gates of the first pairs": [(WEIGHED, "weighed = gates[gates > 0][: len(rows), None] * answers")],
        "what was chosen, not what is kept": [("routing.kept.reshape", "routing.chosen.reshape")],
        "answers overwrite each other": [
            ("index_add(0, rows, weighed.to(x.dtype))", "index_copy(0, rows, weighed.to(x.dtype))")
        ],
        "answers not sent back in the other direction": [(HOME, HOME.replace("receives, sends", "sends, receives"))],
        "an exchange without gradients": [
            (
                HOME,
                "home = torch.empty_like(tokens.index_select(0, rows))\n"
                "        dist.all_to_all_single(home, answers.contiguous(), sends, receives)\n        answers = home",
            ),
        ],
        "no exchange where nothing is sent": [
            ("arrived = AllToAll.apply(", "arrived = tokens[:0] if not len(rows) else AllToAll.apply("),
        ],
        "every process sees all tokens": [
            (
                "sends, receives = counts.sum(dim=1).tolist(), theirs.sum(dim=1).tolist()",
                "sends, receives = counts.sum(dim=1).tolist(), theirs.sum(dim=1).tolist()\n"
                "        AllToAll.apply(tokens.repeat(W, 1), [len(tokens)] * W, "
                "AllToAll.apply(torch.full((W,), len(tokens)), [1] * W, [1] * W, self.group).tolist(), self.group)",
            ),
        ],
        "y flat": [(".view_as(x)", "")],
        "float32 whatever x is": [
            (
                "torch.zeros_like(tokens).index_add(0, rows, weighed.to(x.dtype))",
                "torch.zeros_like(tokens.float()).index_add(0, rows, weighed.float())",
            )
        ],
        "no check of the shape": [("        if given != needed:", "        if False:")],
    },
    "time_ratio": {
        "right: times for one token and 64 channels": """
def time_ratio(n_hidden, speed, bandwidth, processes, size=2, matrices=3):
    channels = 64
    seconds_travel = (1 - 1 / processes) * 2 * channels * size / bandwidth
    seconds_work = 2 * matrices * channels * n_hidden / speed
    return seconds_travel / seconds_work
""",
        "right: one fraction": """
def time_ratio(n_hidden, speed, bandwidth, processes, size=2, matrices=3):
    return size * speed * (processes - 1) / (bandwidth * processes * matrices * n_hidden)
""",
        "only the way there": [(TRAVEL, TRAVEL.replace("2 * size", "size"))],
        "one operation for a weight": [(WORK, WORK.replace("2 * ", ""))],
        "everything travels": [(TRAVEL, TRAVEL.replace(" * (processes - 1) / processes", ""))],
        "all W processes instead of the others": [(TRAVEL, TRAVEL.replace(" / processes", ""))],
        "upside down": [("return travel / work", "return work / travel")],
        "always 2 bytes": [(TRAVEL, TRAVEL.replace("2 * size", "4"))],
        "always three matrices": [(WORK, WORK.replace("matrices", "3"))],
    },
}
