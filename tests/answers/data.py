"Lesson 01: shifts by one, places at the ends, and unknown characters."

TOKENIZER = """
class CharTokenizer:
    def __init__(self, text):
        characters = []
        for character in text:
            if character not in characters:
                characters.append(character)
        characters.sort()
        self.characters = "".join(characters)

    @property
    def vocab_size(self):
        return len(self.characters)

    def encode(self, text):
        ids = torch.empty(len(text), dtype=torch.int64)
        strangers = []
        for place, character in enumerate(text):
            ids[place] = self.characters.find(character)
            if ids[place] < 0 and character not in strangers:
                strangers.append(character)
        if strangers:
            raise ValueError(f"I have never seen {strangers}")
        return ids

    def decode(self, ids):
        text = ""
        for i in ids:
            text += self.characters[int(i)]
        return text
"""
SEARCH = "torch.searchsorted(code_points(self.characters), code_points(text))"
LOOP = "torch.tensor([self.characters.index(character) for character in text], dtype=torch.long)"
STARTS = "torch.randint(len(ids) - block_size, (batch_size, 1), generator=generator)"
BOTH = "return ids[positions].long(), ids[positions + 1].long()"
CUT = "n = round(len(ids) * (1 - held_out))\n    return ids[:n], ids[n:]"

ANSWERS = {
    "tokenizer": {
        "right: places in a list, one character after the other": TOKENIZER,
        "right: a dictionary, unknown characters found in it, decode by map": [
            (
                'self.characters = "".join(sorted(set(text)))',
                'self.characters = "".join(sorted(set(text)))\n'
                "        self.ids = dict(zip(self.characters, range(10**6)))",
            ),
            (
                "unknown = sorted(set(text) - set(self.characters))",
                "unknown = [c for c in dict.fromkeys(text) if c not in self.ids]",
            ),
            (SEARCH, "torch.LongTensor(list(map(self.ids.get, text)))"),
            (
                '"".join(self.characters[i] for i in torch.as_tensor(ids).tolist())',
                '"".join(map(self.characters.__getitem__, ids))',
            ),
        ],
        "the set unsorted": [("sorted(set(text))", "set(text)")],
        "sorted without capitals": [("sorted(set(text))", "sorted(set(text), key=str.lower)")],
        "spaces at the ends stripped": [("sorted(set(text))", "sorted(set(''.join(text).strip()))")],
        "code points instead of ids": [(SEARCH, "code_points(text).long()")],
        "encode gives int32": [(SEARCH, SEARCH + ".int()")],
        "ids of 8 bits": [(SEARCH, SEARCH + ".to(torch.uint8).long()")],
        "the type left to torch.tensor, so that no text is float": [
            ("        if not text:\n            return torch.empty(0, dtype=torch.long)\n", ""),
            (SEARCH, LOOP.replace(", dtype=torch.long", "")),
        ],
        "unknown characters left out in silence": [
            ("if unknown:", "if False:"),
            (SEARCH, LOOP.replace("in text]", "in text if character in self.characters]")),
        ],
        "unknown characters read as their neighbours": [("if unknown:", "if False:")],
        "unknown characters are a KeyError": [("raise ValueError(", "raise KeyError(")],
        "the vocabulary named as unknown": [("unknown[:5]", "self.characters")],
        "an unknown character named each time it comes": [
            (
                "unknown = sorted(set(text) - set(self.characters))",
                "unknown = [c for c in text if c not in self.characters]",
            )
        ],
        "unknown characters as they are, new lines and all": [
            ("map(repr, unknown[:5])", """f"'{c}'" for c in unknown[:5]""")
        ],
        "unknown characters learned on the way": [
            ("if unknown:", 'self.characters = "".join(sorted(self.characters + "".join(unknown)))\n        if False:')
        ],
        "decode for tensors only": [("torch.as_tensor(ids).tolist()", "ids.tolist()")],
    },
    "get_batch": {
        "right: slices in a loop": """
def get_batch(ids, batch_size, block_size, generator=None):
    last = ids.numel() - block_size - 1
    if last < 0:
        raise ValueError("too short")
    x, y = [], []
    for _ in range(batch_size):
        start = torch.randint(0, last + 1, (1,), generator=generator).item()
        x.append(ids[start : start + block_size])
        y.append(ids[start + 1 : start + block_size + 1])
    return torch.stack(x).long(), torch.stack(y).long()
""",
        "right: all windows unfolded, one of T + 1 for both": """
def get_batch(ids, batch_size, block_size, generator=None):
    if len(ids) < block_size + 1:
        raise ValueError(f"{len(ids)} tokens for a context of {block_size}")
    windows = ids.unfold(0, block_size + 1, 1)  # (N - T, T + 1)
    chosen = windows[torch.randint(len(windows), (batch_size,), generator=generator)].to(torch.int64)
    return chosen[:, :-1], chosen[:, 1:]
""",
        "targets are the inputs": [("ids[positions + 1]", "ids[positions]")],
        "targets rolled inside the window": [("ids[positions + 1].long()", "ids[positions].long().roll(-1, dims=1)")],
        "targets rolled in the stream, one start too many": [
            ("torch.randint(len(ids) - block_size,", "torch.randint(len(ids) - block_size + 1,"),
            ("ids[positions + 1]", "ids.roll(-1)[positions]"),
        ],
        "only the last target": [("ids[positions + 1]", "ids[positions[:, -1:] + 1]")],
        "the last start left out": [
            ("torch.randint(len(ids) - block_size,", "torch.randint(max(len(ids) - block_size - 1, 1),")
        ],
        "one start for the whole batch": [
            ("(batch_size, 1)", "(1, 1)"),
            ("+ torch.arange(block_size)", "+ torch.arange(block_size).expand(batch_size, -1)"),
        ],
        "starts without repeats": [
            (
                STARTS,
                "torch.randperm(len(ids) - block_size, generator=generator)"
                "[torch.arange(batch_size) % (len(ids) - block_size), None]",
            )
        ],
        "starts crowd in the middle": [
            (
                STARTS,
                "torch.randint(len(ids) - block_size, (batch_size, 2), generator=generator)"
                ".float().mean(1, keepdim=True).long()",
            )
        ],
        "time before batch": [(BOTH, "return ids[positions].long().T, ids[positions + 1].long().T")],
        "the generator forgotten": [(", generator=generator)", ")")],
        "the generator wound back each time": [
            (
                "    starts =",
                "    if generator is not None:\n        generator.manual_seed(generator.initial_seed())\n    starts =",
            )
        ],
        "a fresh seed inside, always the same batch": [
            ("generator=generator)", "generator=generator or torch.Generator().manual_seed(1337))")
        ],
        "Python's own random numbers": [
            (
                STARTS,
                "torch.tensor([[__import__('random').randrange(len(ids) - block_size)] for _ in range(batch_size)])",
            )
        ],
        "too short by one let through": [
            ("len(ids) <= block_size", "len(ids) < block_size"),
            ("len(ids) - block_size,", "max(len(ids) - block_size, 1),"),
            ("ids[positions + 1]", "ids[(positions + 1) % len(ids)]"),
        ],
        "bytes stay bytes": [(BOTH, "return ids[positions], ids[positions + 1]")],
    },
    "split": {
        "right: what is held out cut off with int": """
def split(ids, held_out=0.1):
    if held_out < 0 or held_out > 1:
        raise ValueError("a share, please")
    n = len(ids) - int(len(ids) * held_out)
    return ids[:n], ids[n:]
""",
        "right: tensor_split at nine tenths": """
def split(ids, held_out=0.1):
    if not (0 <= held_out and held_out <= 1):
        raise ValueError(f"{held_out} is not between 0 and 1")
    train, valid = ids.tensor_split([round(len(ids) * (1 - held_out))])
    return train, valid
""",
        "the first tenth validates": [(CUT, "n = round(len(ids) * held_out)\n    return ids[n:], ids[:n]")],
        "the share is what trains": [("(1 - held_out)", "held_out")],
        "always a tenth": [("(1 - held_out)", "0.9")],
        "counted from the end, where nothing is everything": [
            ("n = round(len(ids) * (1 - held_out))", "n = -round(len(ids) * held_out)")
        ],
        "shuffled first": [("    n =", "    ids = ids[torch.randperm(len(ids))]\n    n =")],
        "one token in both": [("ids[n:]", "ids[max(n - 1, 0):]")],
        "percent": [("(1 - held_out)", "(1 - held_out / 100)"), ("<= 1:", "<= 100:")],
        "a negative share let through": [("not 0 <= held_out <= 1", "held_out > 1")],
        "0 and 1 refused": [("not 0 <= held_out <= 1", "not 0 < held_out < 1")],
        "forced between 0 and 1": [
            (
                '        raise ValueError(f"held_out is {held_out}, but must be a share between 0 and 1")',
                "        held_out = min(max(held_out, 0), 1)",
            )
        ],
        "lists instead of streams": [("return ids[:n], ids[n:]", "return ids[:n].tolist(), ids[n:].tolist()")],
    },
    "ngram": {
        "right: dictionaries": """
def ngram_loss(train, valid, context, vocab_size):
    from math import log
    table = {}
    train, valid = train.tolist(), valid.tolist()
    for i in range(context, len(train)):
        row = table.setdefault(tuple(train[i - context : i]), [1] * vocab_size)
        row[train[i]] += 1
    total = 0.0
    for i in range(context, len(valid)):
        row = table.get(tuple(valid[i - context : i]), [1] * vocab_size)
        total -= log(row[valid[i]] / sum(row))
    return total / (len(valid) - context)
""",
        "right: a table with an axis for each character": """
def ngram_loss(train, valid, context, vocab_size):
    runs = train.unfold(0, context + 1, 1)
    counts = torch.ones([vocab_size] * (context + 1), dtype=torch.double)
    counts.index_put_(tuple(runs.T), torch.tensor(1.0, dtype=torch.double), accumulate=True)
    probs = counts / counts.sum(-1, keepdim=True)
    return -probs[tuple(valid.unfold(0, context + 1, 1).T)].log().mean()
""",
        "nothing added": [(".view(-1, vocab_size) + 1", ".view(-1, vocab_size)")],
        "one for pairs never seen only": [(".view(-1, vocab_size) + 1", ".view(-1, vocab_size).clamp(min=1)")],
        "normalised over what came before": [("counts.sum(dim=1, keepdim=True)", "counts.sum(dim=0, keepdim=True)")],
        "probability of the run, not of its end": [("counts.sum(dim=1, keepdim=True)", "counts.sum()")],
        "the target first": [
            (
                "places = [stream[i : len(stream) - context + i] for i in range(context + 1)]",
                "places = [stream[i : len(stream) - context + i] for i in range(context + 1)][::-1]",
            )
        ],
        "one character, whatever was asked for": [("    counts =", "    context = min(context, 1)\n    counts =")],
        "a gap: the character `context` before only": [
            ("range(context + 1)]", "(0, context)]"),
            ("vocab_size ** (context - i)", "vocab_size ** (1 - i)"),
            ("vocab_size ** (context + 1))", "vocab_size ** 2)"),
        ],
        "V counted in the text": [("    def codes", "    vocab_size = int(train.max()) + 1\n    def codes")],
        "counted on both parts": [("torch.bincount(codes(train)", "torch.bincount(codes(torch.cat([train, valid]))")],
        "bits": [(".log()", ".log2()")],
        "divided by all, the first ones too": [("[codes(valid)].mean()", "[codes(valid)].sum() / len(valid)")],
        "the logarithm of the mean": [
            ("(counts / counts.sum(dim=1, keepdim=True)).log()", "counts / counts.sum(dim=1, keepdim=True)"),
            ("-log_probs.flatten()[codes(valid)].mean()", "-log_probs.flatten()[codes(valid)].mean().log()"),
        ],
        "contexts never seen are skipped": [
            (
                "return -log_probs.flatten()[codes(valid)].mean()",
                "known = (counts.sum(1) > vocab_size)[codes(valid) // vocab_size]\n"
                "    return -log_probs.flatten()[codes(valid)][known].mean()",
            )
        ],
    },
}
