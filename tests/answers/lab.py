"Lesson 00: half of the dice, text that a browser misreads, and the first or the last run."

SPANS = '''spans = "".join(html.escape(c) if e is None else f'<span class="e{e}" title="expert {e}">{html.escape(c)}</span>'
                    for c, e in zip(text, experts))'''


def page(lines):
    "The whole cell with `lines` in place of our way to make `spans`."
    return [(SPANS, lines.strip())]


ANSWERS = {
    "lab-seed-everything": {
        "right: the other way round": '''
def seed_everything(seed=1337):
    torch.random.manual_seed(seed)
    random.seed(a=seed)
''',
        "right: all devices by name": [("    torch.manual_seed(seed)", "    torch.manual_seed(seed)\n    torch.cuda.manual_seed_all(seed)")],
        "PyTorch only": [("    random.seed(seed)\n", "")],
        "Python only": [("    torch.manual_seed(seed)\n", "")],
        "always 1337": [("random.seed(seed)", "random.seed(1337)"), ("torch.manual_seed(seed)", "torch.manual_seed(1337)")],
        "always 1337 for Python": [("random.seed(seed)", "random.seed(1337)")],
        "always 1337 for PyTorch": [("torch.manual_seed(seed)", "torch.manual_seed(1337)")],
        "another default": [("seed=1337", "seed=42")],
        "the default whenever the seed is 0": [("    random.seed(seed)", "    seed = seed or 1337\n    random.seed(seed)")],
        "a seed from the clock": [("random.seed(seed)", "random.seed()"), ("torch.manual_seed(seed)", "torch.seed()")],
        "Python forgets which": [("random.seed(seed)", "random.seed()")],
        "a generator of its own, seeded and thrown away": [("torch.manual_seed(seed)", "torch.Generator().manual_seed(seed)")],
        "seeded once, then never again": [("    torch.manual_seed(seed)", "    if not hasattr(seed_everything, 'done'):\n        torch.manual_seed(seed)\n    seed_everything.done = True")],
        "the GPU only": [("torch.manual_seed(seed)", "torch.cuda.manual_seed_all(seed)")],
        "the number of the call added": [("    random.seed(seed)", "    seed += getattr(seed_everything, 'calls', 0)\n    seed_everything.calls = getattr(seed_everything, 'calls', 0) + 1\n    random.seed(seed)")],
        "a text for Python, which another process hashes differently": [("random.seed(seed)", "random.seed(hash(str(seed)))")],
        "another seed for Python": [("random.seed(seed)", "random.seed(seed + 1)")],
        "one of 32 seeds": [("    random.seed(seed)", "    seed %= 32\n    random.seed(seed)")],
        "the first number drawn already": [("    torch.manual_seed(seed)", "    torch.manual_seed(seed)\n    random.random()")],
        "PyTorch's seed drawn by Python": [("torch.manual_seed(seed)", "torch.manual_seed(random.randrange(2**32))")],
    },
    "lab-text-to-html": {
        "right: a run in one span": page('''
    from itertools import groupby
    spans, place = "", 0
    for e, run in groupby(experts):
        length = len(list(run))
        piece = html.escape(text[place : place + length], quote=False)
        spans += piece if e is None else f"<span title='expert {e}' class='e{e}'>{piece}</span>"
        place += length
'''),
        "right: a list of pieces": page('''
    pieces = []
    for place in range(len(text)):
        piece = text[place].replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        if experts[place] is not None:
            piece = '<span class="e%d" title="expert %d">' % (experts[place], experts[place]) + piece + "</span>"
        pieces.append(piece)
    spans = "".join(pieces)
'''),
        "not escaped": page('''
    spans = "".join(c if e is None else f'<span class="e{e}" title="expert {e}">{c}</span>' for c, e in zip(text, experts))
'''),
        "escaped in colour only": [("html.escape(c) if e is None", "c if e is None")],
        "escaped in the prompt only": [(">{html.escape(c)}<", ">{c}<")],
        "only < and > escaped": page('''
    def escape(c):
        return c.replace("<", "&lt;").replace(">", "&gt;")
    spans = "".join(escape(c) if e is None else f'<span class="e{e}" title="expert {e}">{escape(c)}</span>'
                    for c, e in zip(text, experts))
'''),
        "& escaped last": page('''
    def escape(c):
        return c.replace("<", "&lt;").replace(">", "&gt;").replace("&", "&amp;")
    spans = "".join(escape(c) if e is None else f'<span class="e{e}" title="expert {e}">{escape(c)}</span>'
                    for c, e in zip(text, experts))
'''),
        "the text escaped first, so that places move": [("for c, e in zip(text, experts)", "for c, e in zip(html.escape(text), experts)")],
        "the spans escaped too": [("for c, e in zip(text, experts))", "for c, e in zip(text, experts))\n    spans = html.escape(spans)")],
        "escaped twice": [("for c, e in zip(text, experts)", "for c, e in zip(map(html.escape, text), experts)")],
        "expert 0 taken for none": [("if e is None", "if not e")],
        "a span for nobody": [("html.escape(c) if e is None else ", "")],
        "characters of nobody left out": [("html.escape(c) if e is None", '"" if e is None')],
        "experts counted from 1": [('class="e{e}" title="expert {e}"', 'class="e{e + 1}" title="expert {e + 1}"')],
        "no title": [(' title="expert {e}"', "")],
        "the number alone as the title": [('title="expert {e}"', 'title="{e}"')],
        "no class": [(' class="e{e}"', "")],
        "the class without its letter": [('class="e{e}"', 'class="{e}"')],
        "one digit for the class": [('class="e{e}"', 'class="e{e % 10}"')],
        "the span not closed": [("{html.escape(c)}</span>'", "{html.escape(c)}'")],
        "new lines as <br>": [("for c, e in zip(text, experts))", "for c, e in zip(text, experts)).replace('\\n', '<br>')")],
        "new lines lost": [("for c, e in zip(text, experts)", "for c, e in zip(text, experts) if c != '\\n'")],
        "a space after each character": [('"".join(html', '" ".join(html')],
        "white space at the ends lost": [("for c, e in zip(text, experts))", "for c, e in zip(text, experts)).strip()")],
        "small letters": [(">{html.escape(c)}<", ">{html.escape(c.lower())}<")],
        "div instead of span": [("<span ", "<div "), ("</span>'", "</div>'")],
        "hard spaces": [("for c, e in zip(text, experts))", "for c, e in zip(text, experts)).replace('> <', '>&nbsp;<')")],
        "accents lost": [("for c, e in zip(text, experts))", "for c, e in zip(text, experts)).encode('ascii', 'ignore').decode()")],
        "a question mark for each accent": [("for c, e in zip(text, experts))", "for c, e in zip(text, experts)).encode('ascii', 'replace').decode()")],
        "a blank for each tab": [("zip(text, experts)", "zip(text.replace('\\t', ' '), experts)")],
        "white space belongs to nobody": [("if e is None", "if e is None or c.isspace()")],
        "nobody's characters to the last expert": page('''
    spans, last = "", None
    for c, e in zip(text, experts):
        last = last if e is None else e
        spans += html.escape(c) if last is None else f'<span class="e{last}" title="expert {last}">{html.escape(c)}</span>'
'''),
        "the last run forgotten": page('''
    spans = run = ""
    last = None
    for c, e in zip(text, experts):
        if e != last:
            spans += run if last is None else f'<span class="e{last}" title="expert {last}">{run}</span>'
            run, last = "", e
        run += html.escape(c)
'''),
        "each run under the name of the next": page('''
    spans = run = ""
    last = None
    for c, e in [*zip(text, experts), ("", -1)]:
        if e != last:
            spans += run if e is None or not run else f'<span class="e{e}" title="expert {e}">{run}</span>'
            run, last = "", e
        run += html.escape(c)
'''),
        "all that an expert wrote in one place": page('''
    spans = "".join(html.escape("".join(c for c, who in zip(text, experts) if who == e)) if e is None else
                    f'<span class="e{e}" title="expert {e}">{html.escape("".join(c for c, who in zip(text, experts) if who == e))}</span>'
                    for e in dict.fromkeys(experts))
'''),
    },
    "lab-shares": {
        "right: one after the other": '''
def shares(written):
    found = {}
    for _, expert in written:
        found[expert] = found.get(expert, 0) + 1 / len(written)
    return found
''',
        "right: a Counter": '''
def shares(written):
    from collections import Counter
    counts = Counter(expert for _, expert in written)
    total = counts.total()
    return {expert: n / total for expert, n in sorted(counts.items())}
''',
        "counts": [("experts.count(expert) / len(experts)", "experts.count(expert)")],
        "percent": [("experts.count(expert) / len(experts)", "100 * experts.count(expert) / len(experts)")],
        "whole numbers": [("experts.count(expert) / len(experts)", "experts.count(expert) // len(experts)")],
        "rounded": [("experts.count(expert) / len(experts)", "round(experts.count(expert) / len(experts), 2)")],
        "equal shares for all who wrote": [("experts.count(expert) / len(experts)", "1 / len(set(experts))")],
        "divided by the number of experts": [("/ len(experts)", "/ len(set(experts))")],
        "with those that wrote nothing": [("in set(experts)", "in range(max(experts) + 1)")],
        "eight experts, whoever they are": [("in set(experts)", "in range(8)")],
        "experts counted from 0 in order": [("return {expert:", "return {sorted(set(experts)).index(expert):")],
        "the characters' shares": [("[expert for _, expert in written]", "[character for character, _ in written]")],
        "each pair once": [("in written]", "in set(written)]")],
        "white space left out": [("[expert for _, expert in written]", "[expert for character, expert in written if not character.isspace()]")],
        "names instead of numbers": [("return {expert:", 'return {f"expert {expert}":')],
        "counted as text, where 1 is in 11": [("experts.count(expert)", "str(experts).count(str(expert))")],
        "a list": [("{expert: experts.count(expert) / len(experts) for expert in set(experts)}", "[experts.count(expert) / len(experts) for expert in sorted(set(experts))]")],
        "share of expert 0 for all": [("experts.count(expert)", "experts.count(experts[0])")],
        "the last run of each": '''
def shares(written):
    from itertools import groupby
    return {expert: len(list(run)) / len(written) for expert, run in groupby(written, key=lambda pair: pair[1])}
''',
        "shares of the runs": '''
def shares(written):
    from itertools import groupby
    experts = [expert for expert, _ in groupby(expert for _, expert in written)]
    return {expert: experts.count(expert) / len(experts) for expert in set(experts)}
''',
        "the caller's list emptied": [("    return", "    written.clear()\n    return")],
    },
    "lab-runs": {
        "right: groupby": '''
def runs(written):
    from itertools import groupby
    return [sum(1 for _ in run) for _, run in groupby(written, key=lambda pair: pair[1])]
''',
        "right: places where the expert changes": '''
def runs(written):
    experts = [expert for _, expert in written]
    starts = [i for i in range(len(experts)) if i == 0 or experts[i] != experts[i - 1]] + [len(experts)]
    return [b - a for a, b in zip(starts, starts[1:])]
''',
        "the last run forgotten": '''
def runs(written):
    lengths, length, last = [], 0, None
    for _, expert in written:
        if length and expert != last:
            lengths.append(length)
            length = 0
        length, last = length + 1, expert
    return lengths
''',
        "the first run forgotten": [("    return lengths", "    return lengths[1:]")],
        "a run of 0 at the beginning": '''
def runs(written):
    lengths, length, last = [], 0, None
    for _, expert in written:
        if expert != last:
            lengths.append(length)
            length = 0
        length, last = length + 1, expert
    return lengths + [length]
''',
        "no text has one run of 0": '''
def runs(written):
    lengths, last = [0], written[0][1] if written else None
    for _, expert in written:
        if expert != last:
            lengths.append(0)
        lengths[-1] += 1
        last = expert
    return lengths
''',
        "no text is an error": '''
def runs(written):
    lengths, last = [0], written[0][1]
    for _, expert in written:
        if expert != last:
            lengths.append(0)
        lengths[-1] += 1
        last = expert
    return lengths
''',
        "begins as if expert 0 had written before": [("if lengths and expert == last", "if expert == last"), ("lengths, last = [], None", "lengths, last = [0], 0")],
        "runs of the same character": [("for _, expert in written", "for expert, _ in written")],
        "runs of the same pair": [("for _, expert in written", "for expert in written")],
        "how much each expert wrote": '''
def runs(written):
    experts = [expert for _, expert in written]
    return [experts.count(expert) for expert in dict.fromkeys(experts)]
''',
        "sorted before grouping": '''
def runs(written):
    from itertools import groupby
    return [len(list(run)) for _, run in groupby(sorted(expert for _, expert in written))]
''',
        "written as text, where 11 is a run of 1": '''
def runs(written):
    import re
    experts = "".join(str(expert) for _, expert in written)
    return [len(run.group()) for run in re.finditer(r"(.)\\1*", experts)]
''',
        "a new line ends a run": [("for _, expert", "for character, expert"), ("expert == last", "expert == last and character != '\\n'")],
        "compared with the first of all": [("        last = expert", "        last = written[0][1]")],
        "counts changes, not characters": [("lengths.append(1)", "lengths.append(0)")],
        "only runs of two or more": [("    return lengths", "    return [length for length in lengths if length > 1]")],
        "the number of runs": [("    return lengths", "    return len(lengths)")],
        "the longest first": [("    return lengths", "    return sorted(lengths, reverse=True)")],
        "with the experts": [("    return lengths", "    return [(length, last) for length in lengths]")],
        "the last run of each expert": '''
def runs(written):
    from itertools import groupby
    return list({expert: len(list(run)) for expert, run in groupby(written, key=lambda pair: pair[1])}.values())
''',
        "where runs end": '''
def runs(written):
    experts = [expert for _, expert in written]
    return [i for i in range(1, len(experts) + 1) if i == len(experts) or experts[i] != experts[i - 1]]
''',
        "nine at most": [("lengths[-1] += 1", "lengths[-1] = min(lengths[-1] + 1, 9)")],
        "the caller's list emptied": [("    return lengths", "    written.clear()\n    return lengths")],
    },
}
