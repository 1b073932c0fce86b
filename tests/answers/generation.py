"Lesson 12. What goes wrong here: cuts in the wrong place, caches that remember too much or too little, and traces."

SORT = "ranked, order = logits.float().sort(dim=-1, descending=True, stable=True)"
SOFTMAX = "((ranked - ranked[..., :1]) / temperature).softmax(dim=-1)"
TOP_K = "keep[..., :top_k] = True"
BACK = "return torch.zeros_like(kept).scatter(-1, order, kept / kept.sum(dim=-1, keepdim=True))"
ZERO = "    if temperature == 0:\n        temperature, top_k = 1.0, 1\n"
FINITE = "if not ranked[..., 0].isfinite().all():"
HALF = "window = unread = window[:, -((size + 1) // 2):]"
NEW = "cache = [KVCache() for _ in model.blocks]"
SEED = "None if seed is None else torch.Generator(ids.device).manual_seed(seed)"
DRAW = "torch.multinomial(probs, 1, generator=generator)"
GIVEN = """
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}, but must be 0 or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, but must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, but must be above 0 and at most 1")
"""
PROBS = "def next_token_probs(logits, temperature=1.0, top_k=None, top_p=None):" + GIVEN
STREAM = """
@torch.no_grad()
def stream(model, ids, num_tokens, temperature=1.0, top_k=None, top_p=None, seed=None):
    if ids.dim() != 2:
        raise ValueError(f"ids are {tuple(ids.shape)}, but must be (B, T): for one text, give ids[None]")
    if ids.shape[1] < 1:
        raise ValueError("the prompt is empty: give at least one character, for example a new line")
    if num_tokens < 0:
        raise ValueError(f"num_tokens is {num_tokens}, but must be 0 or more")
"""
CACHE = """
class KVCache:
    def __init__(self):
        self.keys = self.values = None

    def __len__(self):
        return 0 if self.keys is None else self.keys.shape[-2]

    def append(self, keys, values):
"""

ANSWERS = {
    "next_token_probs": {
        "right: masks, in the order of the vocabulary": PROBS
        + """
    scores = logits.float()
    top = scores.amax(dim=-1, keepdim=True)
    if not torch.isfinite(top).all():
        raise ValueError("not finite")
    if temperature == 0:
        return torch.nn.functional.one_hot(scores.argmax(dim=-1), scores.shape[-1]).float()
    probs = ((scores - top) / min(max(temperature, 1e-36), 1e36)).softmax(dim=-1)
    rank = probs.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)  # place of each token
    keep = rank >= 0
    if top_k is not None:
        keep = keep & (rank < top_k)
    if top_p is not None and top_p < 1:
        better = rank[..., None, :] < rank[..., :, None]  # (..., V, V)
        keep = keep & ((better * probs[..., None, :]).sum(dim=-1) < top_p)
    probs = probs.masked_fill(~keep, 0)
    return probs / probs.sum(dim=-1, keepdim=True)
""",
        "right: a loop over rows and candidates": PROBS
        + """
    V = logits.shape[-1]
    answers = []
    for row in logits.float().reshape(-1, V):
        if not row.max().isfinite():
            raise ValueError(f"the largest score is {row.max()}: the weights of the model are not finite")
        if temperature == 0:
            answers.append(torch.eye(V)[row.argmax()])
            continue
        probs = torch.softmax((row - row.max()).double() / temperature, 0).float()
        reached, answer = 0.0, torch.zeros(V)
        for place, i in enumerate(row.argsort(descending=True, stable=True)):
            if place == top_k or top_p is not None and top_p < 1 and reached >= top_p:
                break
            answer[i] = probs[i]
            reached += probs[i]
        answers.append(answer / answer.sum())
    return torch.stack(answers).view(logits.shape)
""",
        "the temperature on probabilities": [
            (SOFTMAX, "((ranked - ranked[..., :1]).softmax(dim=-1) / temperature).softmax(dim=-1)")
        ],
        "the temperature after the cut": [
            (SOFTMAX, "ranked.softmax(dim=-1)"),
            ("kept = probs * keep", "kept = ((ranked - ranked[..., :1]) / temperature).softmax(dim=-1) * keep"),
        ],
        "temperature 0 shares among equals": [
            (
                ZERO,
                "    if temperature == 0:\n"
                "        likeliest = (logits == logits.amax(dim=-1, keepdim=True)).float()\n"
                "        return likeliest / likeliest.sum(dim=-1, keepdim=True)\n"
                "",
            )
        ],
        "a small temperature overflows": [(SOFTMAX, "(ranked / temperature).softmax(dim=-1)")],
        "all that tie with the k-th": [
            (TOP_K, "keep |= ranked >= ranked[..., min(top_k or 99, ranked.shape[-1]) - 1, None]")
        ],
        "crashes if k exceeds V": [
            (TOP_K, "keep = keep.scatter(-1, probs.topk(top_k or probs.shape[-1]).indices, True)")
        ],
        "p cuts off who crosses it": [
            (
                "probs.cumsum(dim=-1) - probs < top_p",
                "(probs.cumsum(dim=-1) <= top_p) | (torch.arange(probs.shape[-1]) == 0)",
            )
        ],
        "p reached exactly takes one more": [("- probs < top_p", "- probs <= top_p")],
        "p of 1 loses the last in rounding": [(" and top_p < 1", "")],
        "p of what top-k left": [
            (
                "    if top_p is not None and top_p < 1:",
                "    probs = probs * keep / (probs * keep).sum(dim=-1, keepdim=True)\n"
                "    if top_p is not None and top_p < 1:",
            )
        ],
        "not scaled up": [("kept / kept.sum(dim=-1, keepdim=True)", "kept")],
        "put back by gather": [(BACK, "return (kept / kept.sum(dim=-1, keepdim=True)).gather(-1, order)")],
        "the caller's logits divided": [(SORT, "logits /= temperature\n    temperature = 1.0\n    " + SORT)],
        "half precision stays half": [("logits.float()", "logits")],
        "scores that are not finite go on to the draw": [(FINITE, "if False:")],
    },
    "kv_cache": {
        "right: padded lists of one token": CACHE
        + """
        old = [] if self.keys is None else [self.keys]
        self.keys = torch.cat(old + [keys], dim=2)
        self.values = torch.cat(([] if self.values is None else [self.values]) + [values], dim=2)
        return self.keys, self.values
""",
        "right: an empty beginning": CACHE
        + """
        if self.keys is None:
            self.keys, self.values = keys[..., :0, :], values[..., :0, :]
        self.keys = torch.concatenate((self.keys, keys), -2)
        self.values = torch.concatenate((self.values, values), -2)
        return self.keys, self.values
""",
        "new ones in front": [
            ("[self.keys, keys]", "[keys, self.keys]"),
            ("[self.values, values]", "[values, self.values]"),
        ],
        "joined along the channels": [
            ("[self.keys, keys], dim=-2", "[self.keys, keys], dim=-1"),
            ("[self.values, values], dim=-2", "[self.values, values], dim=-1"),
        ],
        "returned, but not kept": [
            (
                "        self.keys, self.values = keys, values\n",
                "        if self.keys is None:\n            self.keys, self.values = keys, values\n",
            )
        ],
        "kept, but only the new ones returned": [
            ("        if self.keys is not None:", "        new = keys, values\n        if self.keys is not None:"),
            ("return keys, values", "return new"),
        ],
        "keys and values exchanged": [("return keys, values", "return values, keys")],
        "one cache for all": [
            (
                "        if self.keys is not None:",
                "        self = KVCache\n        if getattr(self, 'keys', None) is not None:",
            )
        ],
        "cut off from the gradient": [
            (
                "self.keys, self.values = keys, values",
                "keys, values = keys.detach(), values.detach()\n        self.keys, self.values = keys, values",
            )
        ],
    },
    "stream": {
        "right: reads are told by the length of the cache": STREAM
        + """
    size, text, mode = model.config.block_size, ids, model.training
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    begin = max(text.shape[1] - size, 0)  # where the window begins
    cache, known = [KVCache() for _ in range(len(model.blocks))], begin  # what lies before `known` has been read
    model.train(False)
    try:
        for _ in range(num_tokens):
            if text.shape[1] - begin == size + 1:
                begin = known = text.shape[1] - (size - size // 2)
                cache = [KVCache() for _ in range(len(model.blocks))]
            logits, routings = (lambda o: (o.logits, o.routings))(model(text[:, known:], cache=cache))
            known = text.shape[1]
            probs = next_token_probs(logits[:, -1, :], temperature, top_k, top_p)
            new = torch.multinomial(probs, 1, generator=generator)
            text = torch.cat((text, new), dim=-1)
            yield new.squeeze(1), routings
    finally:
        if mode:
            model.train()
""",
        "right: a list of tokens, rows of windows": STREAM
        + """
    was_training = model.training
    settings = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    draw = {} if seed is None else {"generator": torch.Generator(device=ids.device).manual_seed(seed)}
    size = model.config.block_size
    try:
        model.eval()
        window = list(ids[:, -size:].unbind(1))
        cache, unread = [KVCache() for _ in model.blocks], window
        while num_tokens > 0:
            if len(window) > size:
                window = window[size // 2 + 1:]
                cache, unread = [KVCache() for _ in model.blocks], window
            output = model(torch.stack(unread, dim=1), cache=cache)
            token = torch.multinomial(next_token_probs(output.logits[:, -1], **settings), 1, **draw)[:, 0]
            window, unread = window + [token], [token]
            num_tokens -= 1
            yield token, output.routings
    finally:
        model.train(was_training)
""",
        "evaluation mode forgotten": [("    model.eval()\n", "")],
        "back to training mode only at the end": [
            ("    try:\n", "    if True:\n"),
            ("    finally:\n        model.train(was_training)", "    model.train(was_training)"),
        ],
        "back to training mode unless there was an error": [
            (
                "    finally:\n        model.train(was_training)",
                "    except GeneratorExit:\n"
                "        model.train(was_training)\n"
                "        raise\n"
                "    model.train(was_training)",
            )
        ],
        "back to training mode without its parts": [("model.train(was_training)", "model.training = was_training")],
        "gradients off for whoever reads": [
            ("@torch.no_grad()\n", ""),
            ("    size, was", "    torch.set_grad_enabled(False)\n    size, was"),
        ],
        "half a context rounded down": [("-((size + 1) // 2)", "-max(size // 2, 1)")],
        "the window slides by one, all read again": [(HALF, "window = unread = window[:, -size:]")],
        "the oldest dropped from a full cache": [
            (
                HALF + "\n                " + NEW,
                "window = window[:, 1:]\n"
                "                for layer in cache:\n"
                "                    layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]",
            )
        ],
        "no cache": [("model(unread, cache=cache)", "model(window)")],
        "one draw for all texts": [(DRAW, "torch.multinomial(probs[:1], 1, generator=generator).expand(len(ids), 1)")],
        "everybody's random numbers seeded": [
            (
                "    generator = " + SEED,
                "    generator = None\n    if seed is not None:\n        torch.manual_seed(seed)",
            )
        ],
        "seed 0 is no seed": [("None if seed is None", "None if not seed")],
        "settings in the wrong order": [("temperature, top_k, top_p)  #", "temperature, top_p, top_k)  #")],
        "the last layer's routing only": [("output.routings", "output.routings[-1:]")],
        "all at once, as a list": [
            (
                "            yield unread[:, 0], output.routings",
                "            pairs.append((unread[:, 0], output.routings))",
            ),
            ("    try:\n", "    pairs = []\n    try:\n"),
            ("        model.train(was_training)", "        model.train(was_training)\n    yield from pairs"),
        ],
    },
    "until": {
        "right: the end compared as a slice": """
def until(characters, stop):
    text = ""
    while text[-len(stop):] != stop:
        character = next(characters, None)
        if character is None:
            break
        text = text + character
    return text
""",
        "right: a list, joined at the end": """
def until(characters, stop):
    found = []
    for character in characters:
        found.append(character)
        if found[-len(stop):] == list(stop):
            return "".join(found)
    return "".join(found)
""",
        "the last character of stop is enough": [("text.endswith(stop)", "character == stop[-1]")],
        "stop left out": [("    return text", "    return text.removesuffix(stop)")],
        "everything read, then cut": """
def until(characters, stop):
    text = "".join(characters)
    return text[:text.index(stop) + len(stop)] if stop in text else text
""",
        "one character more taken, and lost": """
def until(characters, stop):
    text = ""
    for character in characters:
        if text.endswith(stop):
            break
        text += character
    return text
""",
        "a match that fails begins at nothing": """
def until(characters, stop):
    text, matched = "", 0
    for character in characters:
        text += character
        matched = matched + 1 if character == stop[matched] else 0
        if matched == len(stop):
            break
    return text
""",
        "an error if stop never comes": """
def until(characters, stop):
    text = ""
    while not text.endswith(stop):
        text += next(characters)
    return text
""",
        "white space at the ends stripped": [("    return text", "    return text.strip()")],
    },
    "log_probs": {
        "right: each window, and only what no window had before": """
def log_probs(model, ids):
    size, mode = model.config.block_size, model.training
    model.eval()
    answer = torch.full((len(ids) - 1,), torch.nan)
    for start in range(0, len(ids), max(size // 2, 1)):
        x, y = ids[start:-1][:size], ids[start + 1:][:size]
        if len(x):
            with torch.no_grad():
                mine = -torch.nn.functional.cross_entropy(model(x[None]).logits[0], y, reduction="none")
            place = slice(start, start + len(x))
            answer[place] = torch.where(answer[place].isnan(), mine, answer[place])
    model.train(mode)
    return answer
""",
        "right: one pass for each token": """
@torch.no_grad()
def log_probs(model, ids):
    was_training, size = model.training, model.config.block_size
    step = max(size // 2, 1)
    model.eval()
    answer = []
    for n in range(1, len(ids)):
        start = max(0, -(-(n - size) // step)) * step  # the first window that reaches n
        probs = model(ids[start:n].unsqueeze(0)).logits[0, -1].softmax(dim=0)
        answer.append(probs[ids[n]].log())
    model.train(was_training)
    return torch.stack(answer)
""",
        "evaluation mode forgotten": [("    model.eval()\n", "")],
        "never back to training mode": [("    model.train(was_training)\n", "")],
        "gradients kept": [("with torch.no_grad():", "if True:")],
        "gradients off for everybody from here on": [
            ("    with torch.no_grad():", "    torch.set_grad_enabled(False)\n    if True:")
        ],
        "windows side by side": [("start + max(size // 2, 1)", "start + size")],
        "half of an odd context rounded up": [("max(size // 2, 1)", "(size + 1) // 2")],
        "the token itself instead of the next": [("window[1:, None]", "window[:-1, None]")],
        "the window before each token, sliding": """
@torch.no_grad()
def log_probs(model, ids):
    size, was_training = model.config.block_size, model.training
    model.eval()
    windows = [ids[None, max(0, n - size):n] for n in range(1, len(ids))]
    answer = [model(window).logits[0, -1].log_softmax(dim=-1)[n] for window, n in zip(windows, ids[1:])]
    model.train(was_training)
    return torch.stack(answer)
""",
        "the rest at the end left out": [("while done < len(ids) - 1:", "while not found or start + size < len(ids):")],
        "normalised over time": [("log_softmax(dim=-1)", "log_softmax(dim=0)")],
        "losses": [("return torch.cat(found)", "return -torch.cat(found)")],
    },
}
