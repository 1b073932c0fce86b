"Lesson 13: the wrong layer, the wrong token, settings lost on the way, and folders that are counted instead of looked for."

STREAM = "stream(model, ids[None], num_tokens, **settings)"
WHO = "routings[-1].gates[0, -1].argmax().item()"
YIELD = "yield tokenizer.decode(token.tolist()), " + WHO
WRITE = '''
def write(model, tokenizer, prompt, num_tokens, **settings):
    ids = tokenizer.encode(prompt).to(next(model.parameters()).device)
'''

FOLDER = 'Path("runs") / (name if number == 1 else f"{name}-{number}")'
FREE = "if not folder.exists():"
MAKE = "folder.mkdir(parents=True)"

FIND = '''re.findall(r"[a-z']+", part.lower())'''
SHARE = "sum(word in known for word in words) / len(words)"

ANSWERS = {
    "shakespeare-write": {
        "right: a generator that is returned, the expert by topk": WRITE + '''
    steps = stream(model, ids.unsqueeze(0), num_tokens, **settings)
    return ((tokenizer.decode(token), int(routings[-1].gates[:, -1].topk(1).indices)) for token, routings in steps)
''',
        "right: with next, and a loop over the gates": '''
def write(model, tokenizer, prompt, num_tokens, **settings):
    ids = tokenizer.encode(prompt).reshape(1, -1).to(model.lm_head.weight.device)
    steps = iter(stream(model, ids, num_tokens, **settings))
    while (step := next(steps, None)) is not None:
        (token,), layers = step
        gates = layers[len(layers) - 1].gates.squeeze(0)[-1].tolist()
        best = 0
        for e, gate in enumerate(gates):
            if gate > gates[best]:
                best = e
        yield tokenizer.characters[token], best
''',
        "the first layer": [("routings[-1]", "routings[0]")],
        "the second layer, which is the last of two": [("routings[-1]", "routings[min(1, len(routings) - 1)]")],
        "the layer before the last": [("routings[-1]", "routings[max(len(routings) - 2, 0)]")],
        "gates added over the layers": [(WHO, "sum(routing.gates[0, -1] for routing in routings).argmax().item()")],
        "the largest gate of any layer": [(WHO, "max(routings, key=lambda routing: routing.gates[0, -1].max()).gates[0, -1].argmax().item()")],
        "the first token of what was read": [("gates[0, -1]", "gates[0, 0]")],
        "gates added over the tokens read": [("gates[0, -1]", "gates[0].sum(dim=0)")],
        "the largest gate of any token read": [("gates[0, -1].argmax().item()", "gates[0].amax(dim=0).argmax().item()")],
        "a place among all tokens and experts": [("gates[0, -1].argmax()", "gates[0].argmax()")],
        "the busiest expert": [(WHO, "routings[-1].load.argmax().item()")],
        "the smallest gate": [("argmax()", "argmin()")],
        "the second of the two": [("argmax().item()", "topk(2).indices[-1].item()")],
        "the first of the chosen by number": [("gates[0, -1].argmax()", "chosen[0, -1].int().argmax()")],
        "the gate instead of the expert": [("argmax().item()", "max().item()")],
        "all experts at work": [("argmax().item()", "nonzero()[:, 0].tolist()")],
        "experts counted from 1": [(".item()", ".item() + 1")],
        "a tensor instead of a number": [(".item()", "")],
        "the number as text": [(WHO, f"str({WHO})")],
        "the router's favourite, whose seats are taken": [("gates[0, -1]", "logits[0, -1]")],
        "the most probable expert, whose seats are taken": [("gates[0, -1]", "probs[0, -1]")],
        "the expert of the character before": WRITE + '''
    before = None
    for token, routings in stream(model, ids[None], num_tokens, **settings):
        expert = routings[-1].gates[0, -1].argmax().item()
        yield tokenizer.decode(token.tolist()), expert if before is None else before
        before = expert
''',
        "the expert that read the character, not the one that wrote it": WRITE + '''
    last = None
    for token, routings in stream(model, ids[None], num_tokens + 1, **settings):
        expert = routings[-1].gates[0, -1].argmax().item()
        if last is not None:
            yield last, expert
        last = tokenizer.decode(token.tolist())
''',
        "the expert that read the character, and nobody for the last": WRITE + '''
    characters, experts = [], []
    for token, routings in stream(model, ids[None], num_tokens, **settings):
        characters.append(tokenizer.decode(token))
        experts.append(routings[-1].gates[0, -1].argmax().item())
    yield from zip(characters, experts[1:] + [0])
''',
        "expert before character": [(YIELD, f"yield {WHO}, tokenizer.decode(token.tolist())")],
        "ids instead of characters": [("tokenizer.decode(token.tolist())", "token.item()")],
        "no experts": [(YIELD, "yield tokenizer.decode(token.tolist())")],
        "the prompt comes out again": [("    for token", "    for character in prompt:\n        yield character, None\n    for token")],
        "all that was written so far, each time": [("    for token", "    text = \"\"\n    for token"), (YIELD, f"text += tokenizer.decode(token.tolist())\n        yield text, {WHO}")],
        "a list, when all is done": WRITE + '''
    written = []
    for token, routings in stream(model, ids[None], num_tokens, **settings):
        written.append((tokenizer.decode(token.tolist()), routings[-1].gates[0, -1].argmax().item()))
    return written
''',
        "handed out one by one, when all is done": [(STREAM, f"list({STREAM})")],
        "the settings forgotten": [(STREAM, "stream(model, ids[None], num_tokens)")],
        "only the seed": [(STREAM, 'stream(model, ids[None], num_tokens, seed=settings.get("seed"))')],
        "only temperature and seed": [(STREAM, 'stream(model, ids[None], num_tokens, settings.get("temperature", 1.0), seed=settings.get("seed"))')],
        "no top_p": [("    for token", '    settings.pop("top_p", None)\n    for token')],
        "temperature 0.8 unless told": [("    for token", '    settings.setdefault("temperature", 0.8)\n    for token')],
        "a temperature of 0 taken for none": [("    for token", '    settings["temperature"] = settings.get("temperature") or 1.0\n    for token')],
        "seed 1337 unless told": [("    for token", '    settings.setdefault("seed", 1337)\n    for token')],
        "all dice of the house seeded": [("    for token", '    import torch\n    if "seed" in settings:\n        torch.manual_seed(settings.pop("seed"))\n    for token')],
        "always the likeliest": [(STREAM, "stream(model, ids[None], num_tokens, temperature=0)")],
        "white space of the prompt stripped": [("encode(prompt)", "encode(prompt.strip())")],
        "a new line after the prompt": [("encode(prompt)", 'encode(prompt + "\\n")')],
        "a new line before the prompt": [("encode(prompt)", 'encode("\\n" + prompt)')],
        "a prompt in small letters": [("encode(prompt)", "encode(prompt.lower().replace('t', 'T', 1) if 'T' in tokenizer.characters else prompt)")],
        "only the last character of the prompt": [("ids[None]", "ids[None, -1:]")],
        "only half a block of the prompt": [("ids[None]", "ids[None, -model.config.block_size // 2:]")],
        "the first block of a long prompt": [("ids[None]", "ids[None, :model.config.block_size]")],
        "unknown characters of the prompt left out": [("encode(prompt)", 'encode("".join(c for c in prompt if c in "Tobe, rnt\\n"))')],
        "one character too many": [("ids[None], num_tokens", "ids[None], num_tokens + 1")],
        "one character too few": [("ids[None], num_tokens", "ids[None], max(num_tokens - 1, 0)")],
        "at least one character": [("ids[None], num_tokens", "ids[None], max(num_tokens, 1)")],
        "never more than a block": [("ids[None], num_tokens", "ids[None], min(num_tokens, model.config.block_size)")],
        "a stream of its own for each character": WRITE + '''
    import torch
    for _ in range(num_tokens):
        token, routings = next(stream(model, ids[None], 1, **settings))
        ids = torch.cat([ids, token])
        yield tokenizer.decode(token.tolist()), routings[-1].gates[0, -1].argmax().item()
''',
        "the whole window read again for the experts": WRITE + '''
    import torch
    for token, _ in stream(model, ids[None], num_tokens, **settings):
        gates = model(ids[None, -model.config.block_size:]).routings[-1].gates
        ids = torch.cat([ids, token])
        yield tokenizer.decode(token.tolist()), gates[0, -1].argmax().item()
''',
        "left in evaluation mode": [("    for token", "    model.eval()\n    for token")],
        "left in training mode": [("    for token", "    model.eval()\n    for token"), (WHO, WHO + "\n    model.train()")],
        "never in evaluation mode": WRITE + '''
    import torch
    settings = {"temperature": 1.0, "top_k": None, "top_p": None, "seed": None} | settings
    seed = settings.pop("seed")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    from makemoe.generation import next_token_probs
    for _ in range(num_tokens):
        output = model(ids[None, -model.config.block_size:])
        token = torch.multinomial(next_token_probs(output.logits[0, -1], **settings), 1, generator=generator)
        ids = torch.cat([ids, token])
        yield tokenizer.decode(token.tolist()), output.routings[-1].gates[0, -1].argmax().item()
''',
    },
    "shakespeare-new-folder": {
        "right: try to make it, and see": '''
def new_folder(name):
    path, number = Path("runs", name), 1
    while True:
        try:
            os.makedirs(path)
        except FileExistsError:
            number += 1
            path = Path(f"runs/{name}-{number}")
        else:
            return path
''',
        "right: the first of all names that is free": '''
def new_folder(name):
    names = (name + ending for ending in ["", *(f"-{number}" for number in range(2, 10000))])
    folder = next(path for path in map(Path("runs").joinpath, names) if not os.path.exists(path))
    Path("runs").mkdir(exist_ok=True)
    folder.mkdir()
    return folder
''',
        "what is there is used again": [(FREE, "if True:"), (MAKE, "folder.mkdir(parents=True, exist_ok=True)")],
        "what is there is cleared away": [("    for", "    import shutil\n    shutil.rmtree(Path(\"runs\") / name, ignore_errors=True)\n    for")],
        "what is there gets the new name": '''
def new_folder(name):
    folder = Path("runs") / name
    if folder.exists():
        number = next(n for n in count(2) if not Path(f"runs/{name}-{n}").exists())
        folder.rename(f"runs/{name}-{number}")
    folder.mkdir(parents=True)
    return folder
''',
        "refuses a name that is taken": [(FREE, "if True:")],
        "empty folders used again": [(FREE, "if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):"), (MAKE, "folder.mkdir(parents=True, exist_ok=True)")],
        "not made": [(f"            {MAKE}\n", "")],
        "only runs made": [(MAKE, "folder.parent.mkdir(exist_ok=True)")],
        "runs is taken for granted": [("parents=True", "")],
        "a runs that is there is an error": [(f"            {MAKE}", "            Path(\"runs\").mkdir()\n            folder.mkdir()")],
        "not below runs": [('Path("runs") / (', 'Path("") / (')],
        "the name instead of the path": [("return folder", "return folder.name")],
        "text instead of a path": [("return folder", "return str(folder)")],
        "from the root of the disk": [("return folder", "return folder.resolve()")],
        "nothing returned": [("            return folder\n", "            break\n")],
        "the second is -1": [('f"{name}-{number}"', 'f"{name}-{number - 1}"')],
        "the first has a number, too": [("name if number == 1 else ", "")],
        "the second is -3": [("count(1)", "count(1, 2)")],
        "a low line instead of a hyphen": [('{name}-{number}', '{name}_{number}')],
        "no hyphen": [('{name}-{number}', '{name}{number}')],
        "numbers in brackets": [('{name}-{number}', '{name} ({number})')],
        "numbers of two digits": [('{name}-{number}', '{name}-{number:02}')],
        "endings pile up": '''
def new_folder(name):
    folder, number = Path("runs") / name, 2
    while folder.exists():
        folder = Path(f"{folder}-{number}")
        number += 1
    folder.mkdir(parents=True)
    return folder
''',
        "-2 is added again and again": '''
def new_folder(name):
    folder = Path("runs") / name
    while folder.exists():
        folder = folder.with_name(folder.name + "-2")
    folder.mkdir(parents=True)
    return folder
''',
        "no third": '''
def new_folder(name):
    folder = Path("runs") / name
    if folder.exists():
        folder = Path("runs") / f"{name}-2"
    folder.mkdir(parents=True)
    return folder
''',
        "nine at most": [("count(1)", "range(1, 10)")],
        "one more than there are": '''
def new_folder(name):
    Path("runs").mkdir(exist_ok=True)
    taken = [path for path in os.listdir("runs") if path == name or re.fullmatch(re.escape(name) + r"-\\d+", path)]
    folder = Path("runs") / (f"{name}-{len(taken) + 1}" if taken else name)
    folder.mkdir()
    return folder
''',
        "all that begin like it are counted": '''
def new_folder(name):
    Path("runs").mkdir(exist_ok=True)
    taken = sum(path.startswith(name) for path in os.listdir("runs"))
    folder = Path("runs") / (f"{name}-{taken + 1}" if taken else name)
    folder.mkdir()
    return folder
''',
        "after the highest number": '''
def new_folder(name):
    Path("runs").mkdir(exist_ok=True)
    numbers = [int(found[1] or 1) for path in os.listdir("runs") if (found := re.fullmatch(re.escape(name) + r"(?:-(\\d+))?", path))]
    folder = Path("runs") / (f"{name}-{max(numbers) + 1}" if numbers else name)
    folder.mkdir()
    return folder
''',
        "after the last in the order of the alphabet": '''
def new_folder(name):
    Path("runs").mkdir(exist_ok=True)
    taken = sorted(path for path in os.listdir("runs") if re.fullmatch(re.escape(name) + r"(-\\d+)?", path))
    last = taken[-1] if taken else None
    folder = Path("runs") / (name if not taken else f"{name}-2" if last == name else f"{name}-{int(last[len(name) + 1:]) + 1}")
    folder.mkdir()
    return folder
''',
        "looked for as a pattern": [(FREE, 'if not list(Path("runs").glob(folder.name)):')],
        "a number that belongs to the name goes up": '''
def new_folder(name):
    folder = Path("runs") / name
    while folder.exists():
        found = re.fullmatch(r"(.*)-(\\d+)", folder.name)
        folder = Path("runs") / (f"{found[1]}-{int(found[2]) + 1}" if found else f"{folder.name}-2")
    folder.mkdir(parents=True)
    return folder
''',
        "what follows a dot is cut off": [(FOLDER, '(Path("runs") / name).with_stem(Path(name).stem if number == 1 else f"{Path(name).stem}-{number}")')],
        "the name before its dot": [(FOLDER, 'Path("runs") / (name if number == 1 else f"{name.split(chr(46))[0]}-{number}")')],
        "only folders are in the way": [("folder.exists()", "folder.is_dir()")],
        "only files are in the way": [("folder.exists()", "folder.is_file()")],
        "counted in memory": '''
def new_folder(name):
    calls = new_folder.__dict__
    calls[name] = calls.get(name, 0) + 1
    folder = Path("runs") / (name if calls[name] == 1 else f"{name}-{calls[name]}")
    folder.mkdir(parents=True)
    return folder
''',
        "looked for in the folder above": [(FREE, "if not Path(folder.name).exists():")],
        "the one after the one that was made": [("return folder", 'return Path("runs") / f"{name}-{number + 1}"')],
        "the next one made as well": [(MAKE, MAKE + '\n            Path("runs", f"{name}-{number + 1}").mkdir(exist_ok=True)')],
        "small letters": [("    for", "    name = name.upper()\n    for")],
    },
    "shakespeare-real-words": {
        "right: character by character": '''
def real_words(sample, text):
    def words(part):
        clean = "".join(c if c.isalpha() or c == "'" else " " for c in part)
        return clean.casefold().split()
    found, known = words(sample), words(text)
    if not found:
        return 0
    return len([word for word in found if word in known]) / len(found)
''',
        "right: a Counter, and split at all else": '''
def real_words(sample, text):
    from collections import Counter
    counts, known = (Counter(filter(None, re.split(r"[^a-zA-Z']", part.upper()))) for part in (sample, text))
    return sum(n for word, n in counts.items() if word in known) / max(sum(counts.values()), 1)
''',
        "split at white space": [(FIND, "part.lower().split()")],
        "split at white space, punctuation stripped": [(FIND, '[w.strip(".,;:!?\'-") for w in part.lower().split() if w.strip(".,;:!?\'-")]')],
        "split at blanks only": [(FIND, """re.sub(r"[^a-z' \\n\\t]", " ", part.lower()).replace("\\t", "").split(" ")""")],
        "capitals matter": [("part.lower()", "part"), ("[a-z']", "[A-Za-z']")],
        "capitals cut off": [("part.lower()", "part")],
        "only the sample in small letters": [(FIND, """re.findall(r"[A-Za-z']+", part.lower() if part is sample else part)""")],
        "only the text in small letters": [(FIND, """re.findall(r"[A-Za-z']+", part.lower() if part is text else part)""")],
        "apostrophes end a word": [("[a-z']", "[a-z]")],
        "apostrophes left out": [("part.lower()", """part.lower().replace("'", "")""")],
        "digits and low lines are letters": [("[a-z']+", "[\\\\w']+".replace("\\\\", "\\"))],
        "digits are letters": [("[a-z']", "[a-z0-9']")],
        "hyphens belong to words": [("[a-z']", "[a-z'-]")],
        "letters instead of words": [("[a-z']+", "[a-z']")],
        "words of two letters or more": [("[a-z']+", "[a-z']{2,}")],
        "each word once": [(SHARE, "len(set(words) & known) / len(set(words))")],
        "each word once, out of all": [(SHARE, "len(set(words) & known) / len(words)")],
        "each word as often as the text has it": [
            ("    known = set(known)\n", "    from collections import Counter\n    words, known = Counter(words), Counter(known)\n"),
            (SHARE, "(words & known).total() / words.total()"),
        ],
        "counted in the text": [("    known = set(known)\n", ""), (SHARE, "sum(known.count(word) for word in set(words)) / len(words)")],
        "parts of words": [("word in known", "word in text.lower()")],
        "beginnings of words": [("word in known", "any(other.startswith(word) for other in known)")],
        "the other way round": [("in (sample, text)", "in (text, sample)")],
        "the text's words that occur": [(SHARE, "len(known & set(words)) / len(known)")],
        "the share of the unknown": [("word in known", "word not in known")],
        "the number": [(" / len(words) if", " if")],
        "percent": [(SHARE, "100 * " + SHARE)],
        "rounded": [(SHARE, f"round({SHARE}, 2)")],
        "whole numbers": [(") / len(words)", ") // len(words)")],
        "divided by the characters": [("/ len(words)", "/ len(sample)")],
        "divided by the pieces between blanks": [("/ len(words)", "/ len(sample.split())")],
        "characters in real words": [(SHARE, 'sum(len(word) for word in words if word in known) / len("".join(words))')],
        "no words, an error": [(" if words else 0.0", "")],
        "no words, all real": [("else 0.0", "else 1.0")],
        "no words, not a number": [("else 0.0", 'else float("nan")')],
        "no words, nothing": [("else 0.0", "else None")],
        "a word too many in the denominator": [("/ len(words)", "/ (len(words) + 1)")],
        "the words of the first text, for ever": [("    known = set(known)\n", "    known = real_words.__dict__.setdefault('known', set(known))\n")],
        "the plays instead of the text": [("in (sample, text)", "in (sample, load_text())")],
    },
}
