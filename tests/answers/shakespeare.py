"Lesson 16. What goes wrong here: settings that get lost, looking before making, a mean of means, words cut in pieces."

WHO = "routings[-1].gates[0, -1].argmax().item()"
STREAM = "stream(model, ids[None], num_tokens, **settings)"
LOOP = "    for token"

MADE = "folder.mkdir()"
ASK = "with suppress(FileExistsError):"
PARENT = "    first.parent.mkdir(parents=True, exist_ok=True)\n"

FIND = """re.findall(r"[a-z']+", part.lower())"""
SHARE = "sum(word in known for word in words) / len(words)"

WRITE = """
def write(model, tokenizer, prompt, num_tokens, **settings):
    device = next(model.parameters()).device
    ids = tokenizer.encode(prompt).to(device)
"""

ANSWERS = {
    "write": {
        "right: view, max over the dict of gates": WRITE
        + """
    writing = stream(model, ids.view(1, -1), num_tokens, **settings)
    while (step := next(writing, None)) is not None:
        token, routings = step
        gates = routings[-1].gates[0, -1].tolist()
        yield tokenizer.characters[int(token)], gates.index(max(gates))
""",
        "right: generator expression": """
def write(model, tokenizer, prompt, num_tokens, **settings):
    device = next(model.parameters()).device
    steps = stream(model, tokenizer.encode(prompt)[None].to(device), num_tokens, **settings)
    return ((tokenizer.decode(token), int(torch.argmax(routings[-1].gates[:, -1]))) for token, routings in steps)
""",
        "the expert of the first layer": [("routings[-1]", "routings[0]")],
        "the expert of the first token that was read": [("[0, -1]", "[0, 0]")],
        "the largest score instead of the largest gate": [(".gates", ".logits")],
        "a tensor instead of an int": [(".argmax().item()", ".argmax()")],
        "a list, when all is done": [
            ("yield ", "written.append(("),
            (".argmax().item()", ".argmax().item()))\n    return written"),
            (LOOP, "    written = []\n    for token"),
        ],
        "the settings forgotten": [(STREAM, 'stream(model, ids[None], num_tokens, seed=settings.get("seed"))')],
        "an unknown setting is left out": [
            (
                "tokens, **settings):\n        yield",
                """tokens, **{key: settings[key] for key in settings if key[:3] in ("top", "see") or
                                                         key == "temperature"}):\n        yield""",
            )
        ],
        "a temperature of 0 taken for none": [
            (LOOP, '    settings["temperature"] = settings.get("temperature") or 1.0\n    for token')
        ],
        "all random numbers seeded": [
            (
                LOOP,
                '    import torch\n    if "seed" in settings:\n'
                '        torch.manual_seed(settings.pop("seed"))\n    for token',
            )
        ],
        "a new line after the prompt": [("encode(prompt)", 'encode(prompt + "\\n")')],
        "unknown characters of the prompt left out": [
            ("encode(prompt)", 'encode("".join(c for c in prompt if c in tokenizer.characters))')
        ],
        "one character too many": [("None], num_tokens", "None], num_tokens + 1")],
        "left in evaluation mode": [(LOOP, "    model.eval()\n    for token")],
        "all that was written so far, each time": [
            (LOOP, '    text = ""\n    for token'),
            ("yield tokenizer.decode(token.tolist())", "text += tokenizer.decode(token)\n        yield text"),
        ],
    },
    "new_folder": {
        "right: try, except, else": """
def new_folder(name):
    path, number = Path("runs", name), 1
    os.makedirs(path.parent, exist_ok=True)
    while True:
        try:
            os.mkdir(path)
        except FileExistsError:
            number += 1
            path = Path(f"runs/{name}-{number}")
        else:
            return path
""",
        "right: recursion": """
def new_folder(name, number=1):
    path = Path(f"runs/{name}" + (f"-{number}" if number > 1 else ""))
    try:
        path.mkdir(parents=True)
        return path
    except FileExistsError:
        return new_folder(name, number + 1)
""",
        "looked first, then made": [
            (ASK, "if not folder.exists():"),
            (MADE, "import time; time.sleep(0.001); folder.mkdir()"),
        ],
        "looked first, and shared when two are equally fast": [
            (ASK, "if not folder.exists():"),
            (MADE, "folder.mkdir(exist_ok=True)"),
        ],
        "what is there is used again": [(MADE, "folder.mkdir(exist_ok=True)")],
        "refuses a name that is taken": [(ASK, "if True:")],
        "not made": [(MADE, "if folder.exists(): continue")],
        "runs is taken for granted": [(PARENT, "")],
        "only runs is made, not what is between": [(PARENT, '    Path("runs").mkdir(exist_ok=True)\n')],
        "text instead of a path": [("return folder", "return str(folder)")],
        "the second is -1": [('{number}")', '{number - 1}")')],
        "what follows a dot is cut off": [("first.name}-", "first.stem}-")],
        "endings pile up": """
def new_folder(name):
    folder, number = Path("runs") / name, 2
    folder.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            folder, number = folder.with_name(f"{folder.name}-{number}"), number + 1
""",
        "after the highest number": """
def new_folder(name):
    base = Path("runs") / name
    base.parent.mkdir(parents=True, exist_ok=True)
    while True:
        numbers = [int(found[1] or 1) for path in os.listdir(base.parent)
                   if (found := re.fullmatch(re.escape(base.name) + r"(?:-(\\d+))?", path))]
        folder = base.with_name(f"{base.name}-{max(numbers) + 1}") if numbers else base
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
""",
        "nine at most": [("count(1)", "range(1, 10)")],
    },
    "held_out_loss": {
        "right: a list of pieces, weighted at the end": """
def held_out_loss(model, ids, most=8192, progress=iter):
    T = model.config.block_size
    contexts = (len(ids) - 1) // T
    pieces = [(first, min(first + 256, contexts)) for first in range(0, contexts, 256)]
    step = 1
    while len(pieces[::step]) * 256 > max(most, 256):
        step += 1
    done = [(estimate_loss(model, ids[first * T : last * T + 1])[0], last - first)
            for first, last in progress(pieces[::step])]
    number = sum(size for _, size in done)
    return sum(loss * size for loss, size in done) / number, number
""",
        "right: running mean, batches of another size": """
def held_out_loss(model, ids, most=8192, progress=iter):
    size, mean, seen = model.config.block_size, 0.0, 0
    number = -(-((len(ids) - 1) // size) // 256)
    stride = max(1, -(-number // (most // 256)))
    for i in progress([i for i in range(number) if i % stride == 0]):
        part = ids[i * 256 * size :][: 256 * size + 1]
        here = (len(part) - 1) // size
        loss, _ = estimate_loss(model, part, batch_size=64)
        mean, seen = (mean * seen + loss * here) / (seen + here), seen + here
    return mean, seen
""",
        "a mean of means": [("[0] * fit", "[0]"), ("total / contexts,", "total / len(starts),")],
        "the target after a piece is missing": [("(start + 256) * T + 1]", "(start + 256) * T]")],
        "every piece counts 256": [("fit = (len(piece) - 1) // T", "fit = 256")],
        "pieces one token too far": [("ids[start * T :", "ids[start * T + 1 :"), ("* T + 1]", "* T + 2]")],
        "most is forgotten": [("    starts = starts[:: -(-len(starts) // max(most // 256, 1))]\n", "")],
        "the first pieces instead of every n-th": [
            ("starts[:: -(-len(starts) // max(most // 256, 1))]", "starts[: max(most // 256, 1)]")
        ],
        "rounded down": [("-(-len(starts) // max(most // 256, 1))", "max(len(starts) // max(most // 256, 1), 1)")],
        "progress is not called": [("progress(starts)", "starts")],
        "the smaller last piece is left out": [
            ("range(0, (len(ids) - 1) // T, 256)", "range(0, max((len(ids) - 1) // T - 255, 1), 256)")
        ],
        "all in one piece": [("range(0, (len(ids) - 1) // T, 256)", "range(1)"), ("(start + 256)", "len(ids)")],
        "tokens instead of contexts": [("return total / contexts, contexts", "return total / contexts, contexts * T")],
        "the number of pieces": [("return total / contexts, contexts", "return total / contexts, len(starts)")],
    },
    "real_words": {
        "right: character by character": """
def real_words(sample, text):
    def words(part):
        clean = "".join(c if c in "abcdefghijklmnopqrstuvwxyz'" else " " for c in part.lower())
        return clean.split()
    found, known = words(sample), words(text)
    if not found:
        return 0
    return len([word for word in found if word in known]) / len(found)
""",
        "right: a Counter, and split at all else": """
def real_words(sample, text):
    from collections import Counter
    counts, known = (Counter(filter(None, re.split(r"[^A-Z']", part.upper()))) for part in (sample, text))
    return sum(n for word, n in counts.items() if word in known) / max(sum(counts.values()), 1)
""",
        "split at white space, punctuation stripped": [
            (FIND, """[w.strip(".,;:!?'-") for w in part.lower().split() if w.strip(".,;:!?'-")]""")
        ],
        "capitals matter": [("part.lower()", "part"), ("[a-z']", "[A-Za-z']")],
        "capitals cut off": [("part.lower()", "part")],
        "apostrophes end a word": [("[a-z']", "[a-z]")],
        "apostrophes left out": [("part.lower()", """part.lower().replace("'", "")""")],
        "digits and low lines are letters": [("[a-z']", r"[\\w']".replace("\\\\", "\\"))],
        "each word once": [(SHARE, "len(set(words) & known) / len(set(words))")],
        "parts of words": [("word in known", "word in text.lower()")],
        "the other way round": [("in (sample, text)", "in (text, sample)")],
        "percent": [(SHARE, "100 * " + SHARE)],
        "divided by the pieces between blanks": [("/ len(words)", "/ len(sample.split())")],
        "no words, an error": [(" if words else 0.0", "")],
        "no words, all real": [("else 0.0", "else 1.0")],
    },
}
