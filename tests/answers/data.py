"Lesson 01: shifts by one, places at the ends, and strangers."

TOKENIZER = '''
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
'''

ANSWERS = {
    "data-tokenizer": {
        "right: places in a list, one character after the other": TOKENIZER,
        "right: strangers found by KeyError, decode by map": [
            ("unknown = sorted(set(text) - set(self.characters))", "unknown = [c for c in dict.fromkeys(text) if c not in self.ids]"),
            ('names = ", ".join(map(repr, unknown[:5])) + ", ..." * (len(unknown) > 5)', 'names = " and ".join(map(repr, unknown[:9]))'),
            ('f"not among the {self.vocab_size} characters of the vocabulary: {names}; "', 'f"unknown: {names}. "'),
            ('"leave them out, or make the tokenizer from a text that has them"', '"Sorry."'),
            ("torch.tensor([self.ids[character] for character in text], dtype=torch.long)", "torch.LongTensor(list(map(self.ids.get, text)))"),
            ('"".join(self.characters[i] for i in torch.as_tensor(ids).tolist())', '"".join(map(self.characters.__getitem__, ids))'),
        ],
        "the set unsorted": [("sorted(set(text))", "set(text)")],
        "in the order of the text": [("sorted(set(text))", "dict.fromkeys(text)")],
        "each character as often as it comes": [("sorted(set(text))", "sorted(text)")],
        "sorted backwards": [("sorted(set(text))", "sorted(set(text), reverse=True)")],
        "sorted without capitals": [("sorted(set(text))", "sorted(set(text.lower()))")],
        "spaces at the ends stripped": [("sorted(set(text))", "sorted(set(text.strip()))")],
        "code points instead of ids": [("self.ids[character] for", "ord(character) for")],
        "ids from 1": [("enumerate(self.characters)}", "enumerate(self.characters, 1)}"), ("self.characters[i] for", "self.characters[i - 1] for")],
        "encode gives a list": [("torch.tensor([self.ids[character] for character in text], dtype=torch.long)", "[self.ids[character] for character in text]")],
        "encode gives int32": [("dtype=torch.long", "dtype=torch.int32")],
        "the type left to torch.tensor, so that no text is float": [(", dtype=torch.long", "")],
        "one row too many": [("torch.tensor([self.ids[character] for character in text]", "torch.tensor([[self.ids[character] for character in text]]")],
        "strangers left out in silence": [("if unknown:", "if False:"), ("for character in text], dtype", "for character in text if character in self.ids], dtype")],
        "strangers become the first id": [("if unknown:", "if False:"), ("self.ids[character] for", "self.ids.get(character, 0) for")],
        "strangers are a KeyError": [("if unknown:", "if False:")],
        "only the first stranger named": [("unknown[:5]", "unknown[:1]")],
        "the vocabulary named as the stranger": [("unknown[:5]", "self.characters")],
        "a stranger named each time it comes": [("unknown = sorted(set(text) - set(self.characters))", "unknown = [c for c in text if c not in self.ids]"), ("unknown[:5]", "unknown")],
        "strangers as they are, new lines and all": [("map(repr, unknown[:5])", """f"'{c}'" for c in unknown[:5]""")],
        "strangers learned on the way": [("if unknown:", 'self.characters += "".join(unknown)\n        self.ids.update((c, self.characters.index(c)) for c in unknown)\n        if False:')],
        "decode for tensors only": [("torch.as_tensor(ids).tolist()", "ids.tolist()")],
        "decode for lists only": [("self.characters[i] for i in torch.as_tensor(ids).tolist()", "dict(enumerate(self.characters))[i] for i in ids")],
        "decode with spaces between": [('return "".join(self', 'return " ".join(self')],
        "decode gives a list": [('"".join(self.characters[i] for i in torch.as_tensor(ids).tolist())', "[self.characters[i] for i in torch.as_tensor(ids).tolist()]")],
        "one vocabulary for all tokenizers": [("self.ids = {character", "CharTokenizer.characters = self.characters\n        del self.characters\n        self.ids = {character")],
    },
    "data-get-batch": {
        "right: slices in a loop": '''
def get_batch(ids, batch_size, block_size, generator=None):
    last = ids.numel() - block_size - 1
    if last < 0:
        raise ValueError("too short")
    x, y = [], []
    for _ in range(batch_size):
        start = torch.randint(0, last + 1, (1,), generator=generator).item()
        x.append(ids[start : start + block_size])
        y.append(ids[start + 1 : start + block_size + 1])
    return torch.stack(x), torch.stack(y)
''',
        "right: all windows unfolded, one of T + 1 for both": '''
def get_batch(ids, batch_size, block_size, generator=None):
    if len(ids) < block_size + 1:
        raise ValueError(f"{len(ids)} tokens for a block of {block_size}")
    windows = ids.unfold(0, block_size + 1, 1)  # (N - T, T + 1)
    chosen = windows[torch.randint(len(windows), (batch_size,), generator=generator)]
    return chosen[:, :-1], chosen[:, 1:]
''',
        "targets are the inputs": [("ids[positions + 1]", "ids[positions]")],
        "targets one back": [("ids[positions + 1]", "ids[positions - 1]")],
        "targets two further": [("len(ids) - block_size,", "max(len(ids) - block_size - 1, 1),"), ("ids[positions + 1]", "ids[positions + 2]")],
        "targets the next block": [("len(ids) - block_size,", "max(len(ids) - 2 * block_size, 1),"), ("ids[positions + 1]", "ids[positions + block_size]")],
        "targets rolled inside the window": [("ids[positions + 1]", "ids[positions].roll(-1, dims=1)")],
        "targets rolled in the stream, one start too many": [("torch.randint(len(ids) - block_size,", "torch.randint(len(ids) - block_size + 1,"), ("ids[positions + 1]", "ids.roll(-1)[positions]")],
        "inputs and targets swapped": [("return ids[positions], ids[positions + 1]", "return ids[positions + 1], ids[positions]")],
        "only the last target": [("ids[positions + 1]", "ids[positions[:, -1:] + 1]")],
        "the last start left out": [("torch.randint(len(ids) - block_size,", "torch.randint(max(len(ids) - block_size - 1, 1),")],
        "the first start left out": [("torch.randint(len(ids) - block_size,", "torch.randint(min(1, len(ids) - block_size - 1), len(ids) - block_size,")],
        "runs off the end": [("torch.randint(len(ids) - block_size,", "torch.randint(len(ids),")],
        "the end comes round to the beginning": [("torch.randint(len(ids) - block_size,", "torch.randint(len(ids),"), ("return ids[positions], ids[positions + 1]", "return ids[positions % len(ids)], ids[(positions + 1) % len(ids)]")],
        "one start for the whole batch": [("(batch_size, 1)", "(1, 1)"), ("+ torch.arange(block_size)", "+ torch.arange(block_size).expand(batch_size, -1)")],
        "starts without repeats": [("torch.randint(len(ids) - block_size, (batch_size, 1), generator=generator)", "torch.randperm(len(ids) - block_size, generator=generator)[:batch_size, None]")],
        "starts without repeats, as long as there are any": [("torch.randint(len(ids) - block_size, (batch_size, 1), generator=generator)", "(torch.randperm(len(ids) - block_size, generator=generator)[torch.arange(batch_size) % (len(ids) - block_size), None])")],
        "blocks side by side instead of any start": [("torch.randint(len(ids) - block_size, (batch_size, 1), generator=generator)", "block_size * torch.randint((len(ids) - 1) // block_size, (batch_size, 1), generator=generator)")],
        "one random place and the batch after it": [("torch.randint(len(ids) - block_size, (batch_size, 1), generator=generator)", "(torch.randint(len(ids) - block_size, (1, 1), generator=generator) + torch.arange(batch_size)[:, None]) % (len(ids) - block_size)")],
        "starts crowd in the middle": [("torch.randint(len(ids) - block_size, (batch_size, 1), generator=generator)", "torch.randint(len(ids) - block_size, (batch_size, 2), generator=generator).float().mean(1, keepdim=True).long()")],
        "each token from anywhere": [("(batch_size, 1), generator=generator)  # (B, 1)", "(batch_size, block_size), generator=generator)"), ("starts + torch.arange(block_size)", "starts")],
        "a batch of one loses its batch": [("return ids[positions], ids[positions + 1]", "return ids[positions].squeeze(0), ids[positions + 1].squeeze(0)")],
        "time before batch": [("return ids[positions], ids[positions + 1]", "return ids[positions].T, ids[positions + 1].T")],
        "the generator forgotten": [(", generator=generator)", ")")],
        "the generator's seed given to everybody": [("    starts =", "    if generator is not None:\n        torch.manual_seed(generator.initial_seed())\n    starts ="), (", generator=generator)", ")")],
        "the generator wound back each time": [("    starts =", "    if generator is not None:\n        generator.manual_seed(generator.initial_seed())\n    starts =")],
        "a fresh seed inside, always the same batch": [("generator=generator)", "generator=generator or torch.Generator().manual_seed(1337))")],
        "everybody's seed set inside": [("    starts =", "    if generator is None:\n        torch.manual_seed(1337)\n    starts =")],
        "Python's own dice": [("torch.randint(len(ids) - block_size, (batch_size, 1), generator=generator)", "torch.tensor([[__import__('random').randrange(len(ids) - block_size)] for _ in range(batch_size)])")],
        "too short by one let through": [("len(ids) <= block_size", "len(ids) < block_size")],
        "too short is an IndexError": [("raise ValueError", "raise IndexError")],
        "too short is cut short": [('        raise ValueError(f"a text of {len(ids)} tokens is too short for a block of {block_size} "\n                         "and the token after it: give a longer text or a smaller block_size")', "        block_size = len(ids) - 1")],
        "one token more than needed asked for": [("len(ids) <= block_size", "len(ids) <= block_size + 1")],
    },
    "data-split": {
        "right: what is held out cut off with int": '''
def split(ids, held_out=0.1):
    if held_out < 0 or held_out > 1:
        raise ValueError("a share, please")
    n = len(ids) - int(len(ids) * held_out)
    return ids[:n], ids[n:]
''',
        "right: tensor_split at nine tenths": '''
def split(ids, held_out=0.1):
    if not (0 <= held_out and held_out <= 1):
        raise ValueError(f"{held_out} is not between 0 and 1")
    train, valid = ids.tensor_split([int(len(ids) * (1 - held_out))])
    return train, valid
''',
        "the first tenth validates": [("n = round(len(ids) * (1 - held_out))\n    return ids[:n], ids[n:]", "n = round(len(ids) * held_out)\n    return ids[n:], ids[:n]")],
        "the parts swapped": [("return ids[:n], ids[n:]", "return ids[n:], ids[:n]")],
        "the share is what trains": [("(1 - held_out)", "held_out")],
        "always a tenth": [("(1 - held_out)", "0.9")],
        "counted from the end, where nothing is everything": [("n = round(len(ids) * (1 - held_out))", "n = -round(len(ids) * held_out)")],
        "counted from the end, where all is nothing": [("ids[:n], ids[n:]", "ids[:n], ids[-(len(ids) - n):]")],
        "shuffled first": [("    n =", "    ids = ids[torch.randperm(len(ids))]\n    n =")],
        "every tenth token": [("return ids[:n], ids[n:]", "chosen = torch.arange(len(ids)) % 10 == 9\n    return ids[~chosen], ids[chosen]")],
        "one token lost at the cut": [("ids[n:]", "ids[n + 1:]")],
        "one token in both": [("ids[n:]", "ids[max(n - 1, 0):]")],
        "the training part is everything": [("return ids[:n], ids[n:]", "return ids, ids[n:]")],
        "only the training part": [("return ids[:n], ids[n:]", "return ids[:n]")],
        "percent": [("(1 - held_out)", "(1 - held_out / 100)"), ("<= 1:", "<= 100:")],
        "not refused": [("not 0 <= held_out <= 1", "False")],
        "a negative share let through": [("not 0 <= held_out <= 1", "held_out > 1")],
        "too large a share let through": [("not 0 <= held_out <= 1", "held_out < 0")],
        "0 and 1 refused": [("not 0 <= held_out <= 1", "not 0 < held_out < 1")],
        "an AssertionError": [("if not 0 <= held_out <= 1:\n        raise ValueError(f\"held_out is {held_out}, but must be a share between 0 and 1\")", "assert 0 <= held_out <= 1, 'no share'")],
        "forced between 0 and 1": [("        raise ValueError(f\"held_out is {held_out}, but must be a share between 0 and 1\")", "        held_out = min(max(held_out, 0), 1)")],
        "lists instead of streams": [("return ids[:n], ids[n:]", "return ids[:n].tolist(), ids[n:].tolist()")],
    },
    "data-stand-in": {
        "right: one try after the other": '''
def encode_with_stand_in(tokenizer, text, stand_in="?"):
    ids = []
    for character in text:
        try:
            ids.append(tokenizer.encode(character))
        except ValueError:
            ids.append(tokenizer.encode(stand_in))
    return torch.cat(ids) if ids else tokenizer.encode("")
''',
        "right: strangers replaced one by one": '''
def encode_with_stand_in(tokenizer, text, stand_in="?"):
    for stranger in set(text).difference(tokenizer.characters):
        text = text.replace(stranger, stand_in)
    return tokenizer.encode(text)
''',
        "strangers left out": [(" else stand_in for character in text", ' else "" for character in text')],
        "always a question mark": [("else stand_in", 'else "?"')],
        "the stand-in for known ones": [("if character in known", "if character not in known")],
        "all or nothing": '''
def encode_with_stand_in(tokenizer, text, stand_in="?"):
    try:
        return tokenizer.encode(text)
    except ValueError:
        return tokenizer.encode(stand_in * len(text))
''',
        "only the first kind of stranger": '''
def encode_with_stand_in(tokenizer, text, stand_in="?"):
    for character in text:
        if character not in tokenizer.characters:
            return tokenizer.encode(text.replace(character, stand_in))
    return tokenizer.encode(text)
''',
        "a run of strangers as one": '''
def encode_with_stand_in(tokenizer, text, stand_in="?"):
    import re
    return tokenizer.encode(re.sub("[^" + re.escape(tokenizer.characters) + "]+", stand_in, text))
''',
        "a pattern with special characters": '''
def encode_with_stand_in(tokenizer, text, stand_in="?"):
    import re
    return tokenizer.encode(re.sub("[^" + tokenizer.characters + "]", stand_in, text))
''',
        "text instead of ids": [("tokenizer.encode(", "str(")],
        "an unknown stand-in becomes the first id": [("return tokenizer.encode(", "if stand_in not in known:\n        stand_in = tokenizer.characters[0]\n    return tokenizer.encode(")],
        "the vocabulary grows": '''
def encode_with_stand_in(tokenizer, text, stand_in="?"):
    for character in set(text) - set(tokenizer.characters):
        tokenizer.ids[character] = tokenizer.ids.get(stand_in)
        tokenizer.characters += character
    return tokenizer.encode(text)
''',
        "the stand-in always added to the vocabulary": [("    known =", "    tokenizer = CharTokenizer(tokenizer.characters + stand_in)\n    known =")],
    },
    "data-blocks": {
        "right: slices in a loop": '''
def neighbouring_blocks(ids, block_size):
    x, y = [], []
    start = 0
    while start + block_size < len(ids):
        x.append(ids[start : start + block_size])
        y.append(ids[start + 1 : start + block_size + 1])
        start += block_size
    return torch.stack(x), torch.stack(y)
''',
        "right: unfolded with overlapping windows of T + 1": '''
def neighbouring_blocks(ids, block_size):
    windows = ids.unfold(0, block_size + 1, block_size)
    return windows[..., :-1], windows[..., 1:]
''',
        "right: positions gathered": '''
def neighbouring_blocks(ids, block_size):
    starts = torch.arange(0, len(ids) - block_size, block_size)
    where = starts.unsqueeze(1) + torch.arange(block_size)
    return ids[where], ids[where + 1]
''',
        "no token left for the last target": [("(len(ids) - 1) // block_size", "len(ids) // block_size")],
        "one block fewer, to be safe": [("(len(ids) - 1) // block_size", "len(ids) // block_size - 1")],
        "gaps: blocks of T + 1 without overlap": '''
def neighbouring_blocks(ids, block_size):
    n = len(ids) // (block_size + 1)
    windows = ids[: n * (block_size + 1)].view(n, block_size + 1)
    return windows[:, :-1], windows[:, 1:]
''',
        "overlap: every start": '''
def neighbouring_blocks(ids, block_size):
    windows = ids.unfold(0, block_size + 1, 1)
    return windows[:, :-1], windows[:, 1:]
''',
        "targets rolled in the stream": '''
def neighbouring_blocks(ids, block_size):
    n = len(ids) // block_size
    return ids[: n * block_size].view(n, -1), ids.roll(-1)[: n * block_size].view(n, -1)
''',
        "targets rolled in the block": [("ids[1 : length + 1].view(n, block_size)", "ids[:length].view(n, block_size).roll(-1, 1)")],
        "targets not shifted": [("ids[1 : length + 1]", "ids[:length]")],
        "targets shifted back": [("return ids[:length].view(n, block_size), ids[1 : length + 1].view(n, block_size)", "return ids[1 : length + 1].view(n, block_size), ids[:length].view(n, block_size)")],
        "the rest left out in front": '''
def neighbouring_blocks(ids, block_size):
    length = (len(ids) - 1) // block_size * block_size
    return ids[-length - 1 : -1].view(-1, block_size), ids[-length:].view(-1, block_size)
''',
        "a column for each block": [("ids[:length].view(n, block_size), ids[1 : length + 1].view(n, block_size)", "ids[:length].view(n, block_size).T, ids[1 : length + 1].view(n, block_size).T")],
        "a stream for each row": [("ids[:length].view(n, block_size), ids[1 : length + 1].view(n, block_size)", "ids[:length].view(block_size, n).T, ids[1 : length + 1].view(block_size, n).T")],
        "the rest filled with zeros": '''
def neighbouring_blocks(ids, block_size):
    n = -(-(len(ids) - 1) // block_size)
    rest = torch.zeros(n * block_size + 1 - len(ids), dtype=ids.dtype)
    ids = torch.cat([ids, rest])
    return ids[:-1].view(n, block_size), ids[1:].view(n, block_size)
''',
        "blocks of 4 only": [("    n =", "    block_size = 4\n    n =")],
        "blocks drawn at random": '''
def neighbouring_blocks(ids, block_size):
    starts = torch.randint(len(ids) - block_size, ((len(ids) - 1) // block_size, 1))
    return ids[starts + torch.arange(block_size)], ids[starts + torch.arange(block_size) + 1]
''',
        "blocks in another order": [("ids[:length].view(n, block_size), ids[1 : length + 1].view(n, block_size)", "ids[:length].view(n, block_size).flip(0), ids[1 : length + 1].view(n, block_size).flip(0)")],
        "one block too many where the text just fits": '''
def neighbouring_blocks(ids, block_size):
    return ids.unfold(0, block_size, block_size), ids[1:].unfold(0, block_size, block_size)
''',
    },
    "data-ngram": {
        "right: dictionaries": '''
def ngram_loss(train, valid, context, vocab_size):
    table = {}
    train, valid = train.tolist(), valid.tolist()
    for i in range(context, len(train)):
        row = table.setdefault(tuple(train[i - context : i]), [1] * vocab_size)
        row[train[i]] += 1
    total = 0.0
    for i in range(context, len(valid)):
        row = table.get(tuple(valid[i - context : i]), [1] * vocab_size)
        total -= math.log(row[valid[i]] / sum(row))
    return total / (len(valid) - context)
''',
        "right: a table with an axis for each character": '''
def ngram_loss(train, valid, context, vocab_size):
    runs = train.unfold(0, context + 1, 1)
    counts = torch.ones([vocab_size] * (context + 1), dtype=torch.double)
    counts.index_put_(tuple(runs.T), torch.tensor(1.0, dtype=torch.double), accumulate=True)
    probs = counts / counts.sum(-1, keepdim=True)
    return -probs[tuple(valid.unfold(0, context + 1, 1).T)].log().mean()
''',
        "nothing added": [(".view(-1, vocab_size) + 1", ".view(-1, vocab_size)")],
        "one added to the counts but not to their sum": [("log_probs = (counts / counts.sum(dim=1, keepdim=True)).log()", "log_probs = (counts / (counts - 1).sum(dim=1, keepdim=True).clamp(min=1)).log()")],
        "one for pairs never seen only": [(".view(-1, vocab_size) + 1", ".view(-1, vocab_size).clamp(min=1)")],
        "normalised over what came before": [("counts.sum(dim=1, keepdim=True)", "counts.sum(dim=0, keepdim=True)")],
        "probability of the run, not of its end": [("counts.sum(dim=1, keepdim=True)", "counts.sum()")],
        "the target first": [("places = [stream[i : len(stream) - context + i] for i in range(context + 1)]", "places = [stream[i : len(stream) - context + i] for i in range(context + 1)][::-1]")],
        "digits of the two streams in another order": [("codes(valid)]", "codes(valid.flip(0))]")],
        "one character more than asked for": [("    counts =", "    context += 1\n    counts ="), ("vocab_size ** (context - i)", "vocab_size ** (context - i)")],
        "one character, whatever was asked for": [("    counts =", "    context = min(context, 1)\n    counts =")],
        "a gap: the character `context` before only": [("range(context + 1)]", "(0, context)]"), ("vocab_size ** (context - i)", "vocab_size ** (1 - i)"), ("vocab_size ** (context + 1))", "vocab_size ** 2)")],
        "V counted in the text": [("    def codes", "    vocab_size = int(train.max()) + 1\n    def codes")],
        "V is the number of different characters": [("    def codes", "    vocab_size = len(train.unique())\n    def codes")],
        "counted on the validation part": [("torch.bincount(codes(train)", "torch.bincount(codes(valid)")],
        "counted on both parts": [("torch.bincount(codes(train)", "torch.bincount(codes(torch.cat([train, valid]))")],
        "measured on the training part": [("[codes(valid)]", "[codes(train)]")],
        "bits": [(".log()", ".log2()")],
        "the sum, not the mean": [(".mean()", ".sum()")],
        "divided by all, the first ones too": [("[codes(valid)].mean()", "[codes(valid)].sum() / len(valid)")],
        "the sign forgotten": [("return -log_probs", "return log_probs")],
        "the logarithm of the mean": [("(counts / counts.sum(dim=1, keepdim=True)).log()", "counts / counts.sum(dim=1, keepdim=True)"), ("-log_probs.flatten()[codes(valid)].mean()", "-log_probs.flatten()[codes(valid)].mean().log()")],
        "the end comes round to the beginning": [("places = [stream[i : len(stream) - context + i] for i in range(context + 1)]", "places = [stream.roll(-i) for i in range(context + 1)]")],
        "contexts never seen are skipped": [("return -log_probs.flatten()[codes(valid)].mean()", "known = (counts.sum(1) > vocab_size)[codes(valid) // vocab_size]\n    return -log_probs.flatten()[codes(valid)][known].mean()")],
        "contexts that are averaged instead of joined": '''
def ngram_loss(train, valid, context, vocab_size):
    losses = []
    for back in range(1, context + 1):
        pairs = torch.bincount(train[:-back] * vocab_size + train[back:], minlength=vocab_size**2)
        counts = pairs.view(vocab_size, vocab_size) + 1
        losses.append((counts / counts.sum(1, keepdim=True)).log()[valid[context - back : len(valid) - back], valid[context:]])
    if not losses:
        counts = torch.bincount(train, minlength=vocab_size) + 1
        losses.append((counts / counts.sum()).log()[valid])
    return -torch.stack(losses).mean()
''',
    },
}
