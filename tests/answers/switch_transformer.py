"Lesson 29: buckets off by one, layouts by step, padding that takes slots, spans that touch, text that is lost."

ONE_SIDED = "far, offset = -distance.clamp(max=0), 0"
TWO_SIDED = "far, offset = distance.abs(), num_buckets * (distance > 0)"
NEAR = "near = num_buckets // 2"
SHARE = "share = (far.clamp(min=near) / near).log() / math.log(max_distance / near)"
WIDE = "wide = near + (share * (num_buckets - near)).long()"
CHOOSE = "torch.where(far < near, far, wide.clamp(max=num_buckets - 1))"

MIXED = "return list(range(step - 1, num_layers, step)) if num_sparse else []"
START = '{"bottom": 0, "middle": (dense + 1) // 2, "top": dense}'
KNOWN = """    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, but must be one of {', '.join(LAYOUTS)}")
"""
WITHIN = """    if not 0 <= num_sparse <= num_layers:
        raise ValueError(f"num_sparse is {num_sparse}, but must lie between 0 and num_layers = {num_layers}")
"""
DIVIDES = 'if layout == "mixed" and num_sparse and num_layers % num_sparse:'

GATES, CHOSEN, KEPT = "routing.gates.masked_fill(~real, 0)", "routing.chosen & real", "routing.kept & real"

HIDE = "hide = min(max(round(N * rate), 1), N - 1)"
SPANS = "spans = min(max(round(hide / mean_span), 1), N - hide + 1, MARKS)"
GONE, LEFT = "gone = parts(hide, spans, generator)", "left = parts(N - hide + 2, spans + 1, generator)"
ENDS = "    left[0], left[-1] = left[0] - 1, left[-1] - 1  # the first and the last may be empty\n"
MARKED = "marks = torch.arange(2, 2 + spans)[:, None]"
END = " + [torch.tensor([1])]"

JOIN = "ids = [i for mark in source.tolist() for i in spans.get(mark, [mark]) if i >= FIRST]"

ANSWERS = {
    "relative_buckets": {
        "right: one distance after another": """
def relative_buckets(distance, two_sided, num_buckets=32, max_distance=128):
    def one(d):
        n, offset, m = num_buckets, 0, max(0, -d)
        if two_sided:
            n, m = num_buckets // 2, abs(d)
            offset = n if d > 0 else 0
        half = n // 2
        if m >= half:
            m = min(n - 1, half + int(math.log(m / half) / math.log(max_distance / half) * (n - half)))
        return offset + m
    return torch.tensor([one(d) for d in distance.flatten().tolist()], dtype=torch.long).view(distance.shape)
""",
        "right: indexing in place of where, in float64": """
def relative_buckets(distance, two_sided, num_buckets=32, max_distance=128):
    result = torch.zeros_like(distance)
    if two_sided:
        num_buckets = num_buckets // 2
        result += (distance > 0).to(distance.dtype) * num_buckets
        m = torch.abs(distance)
    else:
        m = torch.clamp(-distance, min=0)
    exact = num_buckets // 2
    ratio = torch.log(m.double().clamp(min=1) / exact) / math.log(max_distance / exact)
    large = (exact + (ratio * (num_buckets - exact)).to(torch.long)).clamp(max=num_buckets - 1)
    return result + torch.where(m < exact, m, large)
""",
        "query minus key": [("    far, offset = -", "    distance = -distance\n    far, offset = -")],
        "later keys are near in a decoder, too": [(ONE_SIDED, "far, offset = distance.abs(), 0")],
        "two sides share their buckets": [(TWO_SIDED, "far, offset = distance.abs(), 0")],
        "distance 0 belongs to the later side": [("(distance > 0)", "(distance >= 0)")],
        "a bucket too many that are one distance wide": [
            ("far < near", "far <= near"),
            (WIDE, "wide = near + 1 + (share * (num_buckets - near - 1)).long()"),
        ],
        "near is half of all buckets, also with two sides": [
            (NEAR, "near = num_buckets // 2 if not two_sided else num_buckets"),
        ],
        "rounded instead of cut off": [
            (WIDE, WIDE.replace("(share * (num_buckets - near))", "(share * (num_buckets - near)).round()"))
        ],
        "no last bucket": [(CHOOSE, CHOOSE.replace(".clamp(max=num_buckets - 1)", ""))],
        "no logarithm: equal widths": [(SHARE, "share = (far.clamp(min=near) - near) / (max_distance - near)")],
        "the largest distance fixed": [("math.log(max_distance / near)", "math.log(128 / near)")],
        "changes the distances in place": [
            (TWO_SIDED, "offset = num_buckets * (distance > 0)\n        far = distance.abs_()")
        ],
    },
    "sparse_layers": {
        "right: Flaxformer's question for each layer": """
def sparse_layers(num_layers, num_sparse, layout="mixed"):
    if num_sparse < 0 or num_sparse > num_layers:
        raise ValueError(f"{num_sparse} sparse layers of {num_layers}?")
    if layout == "bottom":
        keep = lambda i: i < num_sparse
    elif layout == "middle":
        keep = lambda i: num_layers - num_sparse <= 2 * i < num_layers + num_sparse
    elif layout == "mixed":
        if num_sparse and num_layers % num_sparse != 0:
            raise ValueError(f"{num_sparse} does not divide {num_layers}")
        keep = lambda i: num_sparse > 0 and (i + 1) % (num_layers // num_sparse) == 0
    elif layout == "top":
        keep = lambda i: i >= num_layers - num_sparse
    else:
        raise ValueError(f"no layout {layout}")
    return list(filter(keep, range(num_layers)))
""",
        "right: slices": """
def sparse_layers(num_layers, num_sparse, layout="mixed"):
    layers = [i for i in range(num_layers)]
    if layout not in ("bottom", "middle", "mixed", "top"):
        raise ValueError(f"unknown layout: {layout}")
    if not num_sparse in range(num_layers + 1):
        raise ValueError(f"cannot have {num_sparse} of {num_layers}")
    if num_sparse == 0:
        return []
    if layout == "bottom":
        return layers[:num_sparse]
    if layout == "top":
        return layers[-num_sparse:]
    if layout == "middle":
        first = num_layers - num_sparse - (num_layers - num_sparse) // 2
        return layers[first:first + num_sparse]
    if num_layers % num_sparse:
        raise ValueError(f"{num_layers} / {num_sparse} is not whole")
    return layers[num_layers // num_sparse - 1::num_layers // num_sparse]
""",
        "by step, as in the library transformers": [(MIXED, "return sparse_by_step(num_layers, num_sparse)")],
        "0 sparse layers give one, as in transformers": [(" if num_sparse else []", "")],
        "mixed begins with a sparse layer": [(MIXED, MIXED.replace("step - 1", "0"))],
        "the middle leans to the bottom": [(START, START.replace("(dense + 1)", "dense"))],
        "bottom and top exchanged": [
            (START, START.replace("bottom", "x").replace("top", "bottom").replace("x", "top"))
        ],
        "top counts from the end, last layer first": [
            (
                "return list(range(start, start + num_sparse))",
                'found = list(range(start, start + num_sparse))\n    return found[::-1] if layout == "top" else found',
            ),
        ],
        "never refuses a number that does not divide": [(DIVIDES, "if False:")],
        "refuses a number that does not divide in all layouts": [
            (DIVIDES, "if num_sparse and num_layers % num_sparse:")
        ],
        "cannot have 0": [(WITHIN, WITHIN.replace("not 0 <= num_sparse", "not 0 < num_sparse"))],
        "too many accepted": [(WITHIN, "")],
        "an unknown layout is a KeyError": [(KNOWN, "")],
        "a range, no list": [
            ("return list(range(start, start + num_sparse))", "return range(start, start + num_sparse)")
        ],
        "the default is top": [('layout="mixed"', 'layout="top"')],
    },
    "without_padding": {
        "right: replace and where": """
def without_padding(routing, real):
    import dataclasses
    mask = real.unsqueeze(-1).expand_as(routing.chosen)
    gates = torch.where(mask, routing.gates, torch.zeros_like(routing.gates))
    return dataclasses.replace(routing, gates=gates, chosen=mask & routing.chosen, kept=mask & routing.kept)
""",
        "right: by multiplying": """
def without_padding(routing, real):
    r = real[..., None]
    return Routing(gates=routing.gates * r, logits=routing.logits, chosen=routing.chosen * r, kept=routing.kept * r)
""",
        "nothing happens, as with the flag of the library transformers": [
            (GATES, "routing.gates"),
            (CHOSEN, "routing.chosen"),
            (KEPT, "routing.kept"),
        ],
        "only the gates: padding keeps its slots": [(CHOSEN, "routing.chosen"), (KEPT, "routing.kept")],
        "only the losses: chosen, not kept": [(KEPT, "routing.kept")],
        "still chosen: counted as dropped": [(CHOSEN, "routing.chosen")],
        "the gates stay": [(GATES, "routing.gates")],
        "padding for real": [("real = real[..., None]", "real = ~real[..., None]")],
        "dropped choices come back": [(KEPT, "routing.chosen & real")],
        "the logits masked, too": [("routing.logits", "routing.logits.masked_fill(~real, 0)")],
        "in place": [(GATES, "routing.gates.detach().mul_(real)")],
        "the gates cut off from the gradient": [(GATES, GATES.replace("gates.", "gates.detach()."))],
        "only one row": [("real[..., None]", "real[:, None] if real.dim() == 1 else real[0][:, None]")],
    },
    "span_corruption": {
        "right: a walk along the text": """
MARKS, FIRST = 32, 34


def parts(total, pieces, generator=None):
    cuts = torch.randperm(total - 1, generator=generator)[: pieces - 1].sort().values + 1
    return torch.cat([cuts, torch.tensor([total])]).diff(prepend=torch.tensor([0])).tolist()


def span_corruption(ids, rate=0.15, mean_span=3.0, generator=None):
    N = ids.numel()
    if N < 2:
        raise ValueError("too short")
    if rate <= 0 or rate >= 1 or mean_span < 1 or mean_span != mean_span:
        raise ValueError("bad settings")
    hide = max(1, min(N - 1, round(rate * N)))
    count = max(1, min(round(hide / mean_span), N - hide + 1, 32))
    lost, stay = parts(hide, count, generator), parts(N - hide + 2, count + 1, generator)
    chars, source, target, at = [i + 34 for i in ids.tolist()], [], [], 0
    for j in range(count):
        n = stay[j] - (j == 0)
        source += chars[at:at + n] + [2 + j]
        target += [2 + j] + chars[at + n:at + n + lost[j]]
        at += n + lost[j]
    return torch.tensor(source + chars[at:]), torch.tensor(target + [1])
""",
        "right: a mask, and combinations drawn by sorting": """
MARKS, FIRST = 32, 34


def parts(total, pieces, generator=None):
    cuts = [0, *sorted(torch.rand(total - 1, generator=generator).argsort()[:pieces - 1].add(1).tolist()), total]
    return [b - a for a, b in zip(cuts, cuts[1:])]


def span_corruption(ids, rate=0.15, mean_span=3.0, generator=None):
    N = len(ids)
    if N < 2 or not (0 < rate < 1 and mean_span >= 1):
        raise ValueError("out of range")
    hide = min(max(round(N * rate), 1), N - 1)
    spans = min(max(round(hide / mean_span), 1), N - hide + 1, MARKS)
    stay, lost = parts(N - hide + 2, spans + 1, generator), parts(hide, spans, generator)
    lengths = [n for pair in zip(stay, lost) for n in pair]
    lengths[0] -= 1
    mask = torch.zeros(N, dtype=torch.long)
    start = 0
    for number, n in enumerate(lengths):
        if number % 2:
            mask[start:start + n] = 2 + number // 2
        start += n
    source, target, previous = [], [], 0
    for i, m in zip(ids.tolist(), mask.tolist()):
        if m and m != previous:
            source.append(m)
            target.append(m)
        (target if m else source).append(i + FIRST)
        previous = m
    return torch.tensor(source), torch.tensor(target + [1])
""",
        "no end": [(END, "")],
        "marks count down": [(MARKED, "marks = torch.arange(1 + spans, 1, -1)[:, None]")],
        "marks begin at 1": [(MARKED, MARKED.replace("(2, 2 + spans)", "(1, 1 + spans)"))],
        "one mark for all": [(MARKED, "marks = torch.full((spans, 1), 2)")],
        "bytes overflow": [("ids.long() + FIRST", "(ids + FIRST).long()")],
        "rounded up": [
            ("round(N * rate)", "math.ceil(N * rate)"),
            ("round(hide / mean_span)", "math.ceil(hide / mean_span)"),
        ],
        "all spans of the same length": [
            (GONE, "gone = [hide // spans] * (spans - 1) + [hide - hide // spans * (spans - 1)]")
        ],
        "never at the ends": [(LEFT, "left = parts(N - hide, spans + 1, generator)"), (ENDS, "")],
        "the text always begins with its own characters": [
            (LEFT, LEFT.replace("+ 2", "+ 1")),
            ("left[0], left[-1] = left[0] - 1, left[-1] - 1", "left[-1] = left[-1] - 1"),
        ],
        "any number of marks": [(", MARKS)", ")")],
        "spans that touch": [(LEFT, "left = [1 + n for n in [0] * spans + [N - hide]]")],
        "the generator forgotten": [(GONE, GONE.replace(", generator", "")), (LEFT, LEFT.replace(", generator", ""))],
        "seeded": [("    N = len(ids)", "    torch.manual_seed(0)\n    N = len(ids)")],
        "everything can be hidden": [(HIDE, "hide = min(max(round(N * rate), 1), N)")],
        "nothing refused": [("if N < 2 or not 0 < rate < 1 or not mean_span >= 1:", "if False:")],
    },
    "join_spans": {
        "right: a dict of slices": """
def join_spans(source, target):
    target = target.tolist()
    target = target[:target.index(1)] if 1 in target else target
    marks = [n for n, i in enumerate(target) if 2 <= i < FIRST] + [len(target)]
    spans = {target[a]: [i for i in target[a + 1:b] if i] for a, b in zip(marks, marks[1:])}
    out = []
    for i in source.tolist():
        if i >= FIRST:
            out.append(i - FIRST)
        elif i in spans:
            out.extend(j - FIRST for j in spans[i])
    return torch.tensor(out, dtype=torch.long)
""",
        "right: two loops": """
def join_spans(source, target):
    answers, mark = {}, None
    for token in target.tolist():
        if token == 1:
            break
        if 1 < token < 34:
            mark = token
            answers[mark] = []
        elif token >= 34 and mark is not None:
            answers[mark].append(token)
    ids = []
    for token in source.tolist():
        if token >= 34:
            ids += [token]
        else:
            ids += answers.get(token, [])
    return torch.tensor(ids).long() - 34
""",
        "in the order of the target": [
            (
                JOIN,
                "found = iter(spans.values())\n"
                "    ids = [i for mark in source.tolist() for i in ([mark] if mark >= FIRST else next(found, []))]",
            )
        ],
        "goes on after the end": [("            break", "            continue")],
        "padding is a character": [(" if i >= FIRST]", "]")],
        "a mark that is missing is an error": [
            (JOIN, "ids = [i for mark in source.tolist() for i in ([mark] if mark >= FIRST else spans[mark])]")
        ],
        "the target must end": [("for i in target.tolist():", "for i in target[: target.tolist().index(1)].tolist():")],
        "what comes before the first mark opens the text": [
            ("spans, now = {}, []", "spans, now = {}, []\n    spans[2] = now")
        ],
        "only one character for a mark": [("now.append(i)", "now[:] = [i]")],
        "model ids": [("dtype=torch.long) - FIRST", "dtype=torch.long)")],
        "the hidden characters alone": [(JOIN, JOIN.replace("[mark]", "[]"))],
        "an empty text is float": [(", dtype=torch.long) - FIRST", ") - FIRST")],
    },
}
