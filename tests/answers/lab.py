"Lesson 00: half of the random numbers, text that a browser misreads, and the first or the last run."

PIECE = "piece = html.escape(character)"
EACH = """        spans += piece if e is None else f'<span class="e{e}" title="expert {e}">{piece}</span>\'"""

ANSWERS = {
    "seed_everything": {
        "right: the other way round": """
def seed_everything(seed=1337):
    torch.random.manual_seed(seed)
    random.seed(a=seed)
""",
        "right: all devices by name": [
            ("    torch.manual_seed(seed)", "    torch.manual_seed(seed)\n    torch.cuda.manual_seed_all(seed)")
        ],
        "PyTorch only": [("    random.seed(seed)\n", "")],
        "Python only": [("    torch.manual_seed(seed)", "")],
        "always 1337 for PyTorch": [("torch.manual_seed(seed)", "torch.manual_seed(1337)")],
        "another default": [("seed=1337", "seed=42")],
        "the default whenever the seed is 0": [
            ("    random.seed(seed)", "    seed = seed or 1337\n    random.seed(seed)")
        ],
        "a generator of its own, seeded and thrown away": [
            ("torch.manual_seed(seed)", "torch.Generator().manual_seed(seed)")
        ],
        "seeded once, then never again": [
            (
                "    torch.manual_seed(seed)",
                "    if not hasattr(seed_everything, 'done'):\n        torch.manual_seed(seed)\n"
                "    seed_everything.done = True",
            )
        ],
        "a text for Python, which another process hashes differently": [
            ("random.seed(seed)", "random.seed(hash(str(seed)))")
        ],
        "the first number drawn already": [
            ("    torch.manual_seed(seed)", "    torch.manual_seed(seed)\n    random.random()")
        ],
        "gradients switched off for everybody": [
            ("    random.seed(seed)", "    torch.set_grad_enabled(False)\n    random.seed(seed)")
        ],
    },
    "text_to_spans": {
        "right: a run in one span": """
def text_to_spans(text, experts):
    from itertools import groupby
    spans, place = "", 0
    for e, run in groupby(experts):
        length = len(list(run))
        piece = html.escape(text[place : place + length], quote=False)
        spans += piece if e is None else f"<span title='expert {e}' class='e{e}'>{piece}</span>"
        place += length
    return spans
""",
        "right: a list of pieces, escaped by hand": """
def text_to_spans(text, experts):
    pieces = []
    for place in range(len(text)):
        piece = text[place].replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        if experts[place] is not None:
            piece = '<span class="e%d" title="expert %d">' % (experts[place], experts[place]) + piece + "</span>"
        pieces.append(piece)
    return "".join(pieces)
""",
        "not escaped": [(PIECE, "piece = character")],
        "& escaped last": [
            (PIECE, 'piece = character.replace("<", "&lt;").replace(">", "&gt;").replace("&", "&amp;")')
        ],
        "the text escaped first, so that places move": [
            ("in zip(text, experts)", "in zip(html.escape(text), experts)")
        ],
        "escaped in colour only": [("spans += piece if", "spans += character if")],
        "expert 0 taken for none": [("if e is None", "if not e")],
        "experts counted from 1": [('class="e{e}" title="expert {e}"', 'class="e{e + 1}" title="expert {e + 1}"')],
        "no title": [(' title="expert {e}"', "")],
        "one digit for the class": [('class="e{e}"', 'class="e{e % 10}"')],
        "the span not closed": [("{piece}</span>", "{piece}")],
        "new lines as <br>": [(PIECE, PIECE + '.replace("\\n", "<br>")')],
        "white space at the ends lost": [("return spans", "return spans.strip()")],
        "characters beyond Latin-1 lost": [
            ("return spans", "return spans.encode('latin-1', 'ignore').decode('latin-1')")
        ],
        "nobody's characters to the last expert": """
def text_to_spans(text, experts):
    spans, last = "", None
    for c, e in zip(text, experts):
        last = last if e is None else e
        span = f'<span class="e{last}" title="expert {last}">{html.escape(c)}</span>'
        spans += html.escape(c) if last is None else span
    return spans
""",
        "the last run forgotten": """
def text_to_spans(text, experts):
    spans = run = ""
    last = None
    for c, e in zip(text, experts):
        if e != last:
            spans += run if last is None else f'<span class="e{last}" title="expert {last}">{run}</span>'
            run, last = "", e
        run += html.escape(c)
    return spans
""",
        "after a gap the same expert gets no span again": """
def text_to_spans(text, experts):
    spans, last, inside = "", None, False
    for c, e in zip(text, experts):
        if inside and e != last:
            spans, inside = spans + "</span>", False
        if e is not None and e != last:
            spans, inside = spans + f'<span class="e{e}" title="expert {e}">', True
            last = e
        spans += html.escape(c)
    if inside:
        spans += "</span>"
    return spans
""",
    },
    "shares": {
        "right: one after the other": """
def shares(written):
    found = {}
    for _, expert in written:
        found[expert] = found.get(expert, 0) + 1 / len(written)
    return found
""",
        "right: a bincount, in float32": """
def shares(written):
    counts = torch.bincount(torch.tensor([expert for _, expert in written]))
    return {e: (counts[e] / len(written)).item() for e in range(len(counts)) if counts[e]}
""",
        "counts": [("experts.count(expert) / len(experts)", "experts.count(expert)")],
        "percent": [("experts.count(expert) / len(experts)", "100 * experts.count(expert) / len(experts)")],
        "rounded": [("experts.count(expert) / len(experts)", "round(experts.count(expert) / len(experts), 2)")],
        "equal shares for all who wrote": [("experts.count(expert) / len(experts)", "1 / len(set(experts))")],
        "with those that wrote nothing": [("in set(experts)", "in range(max(experts) + 1)")],
        "the characters' shares": [("[expert for _, expert in written]", "[character for character, _ in written]")],
        "each pair once": [("in written]", "in set(written)]")],
        "white space left out": [
            (
                "[expert for _, expert in written]",
                "[expert for character, expert in written if not character.isspace()]",
            )
        ],
        "counted as text, where 1 is in 11": [("experts.count(expert)", "str(experts).count(str(expert))")],
        "a list": [
            (
                "{expert: experts.count(expert) / len(experts) for expert in set(experts)}",
                "[experts.count(expert) / len(experts) for expert in sorted(set(experts))]",
            )
        ],
        "the last run of each": """
def shares(written):
    from itertools import groupby
    return {expert: len(list(run)) / len(written) for expert, run in groupby(written, key=lambda pair: pair[1])}
""",
        "the caller's list emptied": [("    return", "    written.clear()\n    return")],
    },
    "runs": {
        "right: groupby": """
def runs(written):
    from itertools import groupby
    return [sum(1 for _ in run) for _, run in groupby(written, key=lambda pair: pair[1])]
""",
        "right: places where the expert changes": """
def runs(written):
    experts = [expert for _, expert in written]
    starts = [i for i in range(len(experts)) if i == 0 or experts[i] != experts[i - 1]] + [len(experts)]
    return [b - a for a, b in zip(starts, starts[1:])]
""",
        "the last run forgotten": """
def runs(written):
    lengths, length, last = [], 0, None
    for _, expert in written:
        if length and expert != last:
            lengths.append(length)
            length = 0
        length, last = length + 1, expert
    return lengths
""",
        "a run of 0 at the beginning": """
def runs(written):
    lengths, length, last = [], 0, None
    for _, expert in written:
        if expert != last:
            lengths.append(length)
            length = 0
        length, last = length + 1, expert
    return lengths + [length]
""",
        "no text has one run of 0": """
def runs(written):
    lengths, last = [0], written[0][1] if written else None
    for _, expert in written:
        if expert != last:
            lengths.append(0)
        lengths[-1] += 1
        last = expert
    return lengths
""",
        "begins as if expert 0 had written before": [
            ("if lengths and expert == last", "if expert == last"),
            ("lengths, last = [], None", "lengths, last = [0], 0"),
        ],
        "runs of the same pair": [("for _, expert in written", "for expert in written")],
        "how much each expert wrote": """
def runs(written):
    experts = [expert for _, expert in written]
    return [experts.count(expert) for expert in dict.fromkeys(experts)]
""",
        "written as text, where 11 is a run of 1": """
def runs(written):
    import re
    experts = "".join(str(expert) for _, expert in written)
    return [len(run.group()) for run in re.finditer(r"(.)\\1*", experts)]
""",
        "compared with the first of all": [("        last = expert", "        last = written[0][1]")],
        "only runs of two or more": [("    return lengths", "    return [length for length in lengths if length > 1]")],
        "the longest first": [("    return lengths", "    return sorted(lengths, reverse=True)")],
        "nine at most": [("lengths[-1] += 1", "lengths[-1] = min(lengths[-1] + 1, 9)")],
    },
}
