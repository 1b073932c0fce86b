"Lesson 12: cuts in the wrong place, caches that remember too much or too little, and traces left behind."

SORT = "ranked, order = logits.float().sort(dim=-1, descending=True, stable=True)"
SOFTMAX = "((ranked - ranked[..., :1]) / temperature).softmax(dim=-1)"
BACK = "return torch.zeros_like(kept).scatter(-1, order, kept / kept.sum(dim=-1, keepdim=True))"
HALF = "window = unread = window[:, -((size + 1) // 2):]"
DICE = "None if seed is None else torch.Generator(ids.device).manual_seed(seed)"
DRAW = "torch.multinomial(probs, 1, generator=generator)"
CHECKS = '''
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}, but must be 0 or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, but must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, but must be above 0 and at most 1")
'''
STREAM_CHECKS = '''
    if ids.dim() != 2:
        raise ValueError(f"ids are {tuple(ids.shape)}, but must be (B, T): for one text, give ids[None]")
    if ids.shape[1] < 1:
        raise ValueError("the prompt is empty: give at least one character, for example a new line")
'''

ANSWERS = {
    "generation-next-token-probs": {
        "right: masks, in the order of the vocabulary": "def next_token_probs(logits, temperature=1.0, top_k=None, top_p=None):" + CHECKS + '''
    scores = logits.float()
    if temperature == 0:
        return torch.nn.functional.one_hot(scores.argmax(dim=-1), scores.shape[-1]).float()
    probs = ((scores - scores.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)
    rank = probs.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)  # place of each token
    keep = rank >= 0
    if top_k is not None:
        keep = keep & (rank < top_k)
    if top_p is not None and top_p < 1:
        better = rank[..., None, :] < rank[..., :, None]  # (..., V, V)
        keep = keep & ((better * probs[..., None, :]).sum(dim=-1) < top_p)
    probs = probs.masked_fill(~keep, 0)
    return probs / probs.sum(dim=-1, keepdim=True)
''',
        "right: a loop over rows and candidates": "def next_token_probs(logits, temperature=1.0, top_k=None, top_p=None):" + CHECKS + '''
    V = logits.shape[-1]
    answers = []
    for row in logits.float().reshape(-1, V):
        if temperature == 0:
            answers.append(torch.eye(V)[row.argmax()])
            continue
        probs = torch.softmax((row - row.max()) / temperature, 0)
        reached, answer = 0.0, torch.zeros(V)
        for place, i in enumerate(row.argsort(descending=True, stable=True)):
            if place == top_k or top_p is not None and top_p < 1 and reached >= top_p:
                break
            answer[i] = probs[i]
            reached += probs[i]
        answers.append(answer / answer.sum())
    return torch.stack(answers).view(logits.shape)
''',
        "right: cut scores become minus infinity before the softmax": [("keep = torch.ones_like(probs, dtype=torch.bool)", "keep = probs >= 0"), ("kept = probs * keep", "kept = ((ranked - ranked[..., :1]) / temperature).masked_fill(~keep, -torch.inf).softmax(dim=-1)"), (BACK, "return kept.gather(-1, order.argsort(dim=-1))")],
        "multiplied by the temperature": [("/ temperature).softmax", "* temperature).softmax")],
        "the temperature on probabilities": [(SOFTMAX, "((ranked - ranked[..., :1]).softmax(dim=-1) / temperature).softmax(dim=-1)")],
        "the temperature forgotten": [("/ temperature).softmax", ").softmax")],
        "the temperature after the cut": [(SOFTMAX, "ranked.softmax(dim=-1)"), ("kept = probs * keep", "kept = ((ranked - ranked[..., :1]) / temperature).softmax(dim=-1) * keep")],
        "temperature 0 is a small temperature": [("temperature, top_k = 1.0, 1", "temperature = 1e-3")],
        "temperature 0 is nan": [("    if temperature == 0:\n        temperature, top_k = 1.0, 1\n", "")],
        "temperature 0 shares among equals": [("    if temperature == 0:\n        temperature, top_k = 1.0, 1\n", "    if temperature == 0:\n        likeliest = (logits == logits.amax(dim=-1, keepdim=True)).float()\n        return likeliest / likeliest.sum(dim=-1, keepdim=True)\n")],
        "temperature 0 shares among k": [("temperature, top_k = 1.0, 1", "temperature, top_k = 1e-30, top_k or 1")],
        "temperature 0 gives whole numbers": [("    if temperature == 0:\n        temperature, top_k = 1.0, 1\n", "    if temperature == 0:\n        return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1])\n")],
        "of equals the last": [(SORT, "ranked, order = (t.flip(-1) for t in logits.float().sort(dim=-1, stable=True))")],
        "a small temperature overflows": [(SOFTMAX, "(ranked / temperature).softmax(dim=-1)")],
        "no temperature below a half": [(SOFTMAX, "((ranked - ranked[..., :1]) / max(temperature, 0.6)).softmax(dim=-1)")],
        "k + 1 kept": [("keep[..., top_k:]", "keep[..., top_k + 1:]")],
        "k - 1 kept": [("keep[..., top_k:]", "keep[..., max(top_k - 1, 1):]")],
        "the k least likely": [("keep[..., top_k:] = False", "keep[..., :-top_k] = False")],
        "all that tie with the k-th": [("keep[..., top_k:] = False", "keep &= ranked >= ranked[..., min(top_k, ranked.shape[-1]) - 1, None]")],
        "crashes if k exceeds V": [("keep[..., top_k:] = False", "keep = torch.zeros_like(keep).scatter(-1, probs.topk(top_k).indices, True)")],
        "p cuts off who crosses it": [("probs.cumsum(dim=-1) - probs < top_p", "probs.cumsum(dim=-1) <= top_p")],
        "p cuts off who crosses it, but not the first": [("probs.cumsum(dim=-1) - probs < top_p", "(probs.cumsum(dim=-1) <= top_p) | (torch.arange(probs.shape[-1]) == 0)")],
        "p reached exactly takes one more": [("- probs < top_p", "- probs <= top_p")],
        "p keeps one too many": [("probs.cumsum(dim=-1) - probs < top_p", "(probs.cumsum(dim=-1) - probs).roll(1, -1).index_fill(-1, torch.tensor([0]), 0) < top_p")],
        "whoever has p alone": [("probs.cumsum(dim=-1) - probs < top_p", "(probs > 1 - top_p) | (torch.arange(probs.shape[-1]) == 0)")],
        "p of 1 loses the last in rounding": [(" and top_p < 1", "")],
        "p of what top-k left": [("    if top_p is not None and top_p < 1:", "    probs = probs * keep / (probs * keep).sum(dim=-1, keepdim=True)\n    if top_p is not None and top_p < 1:")],
        "p only without k": [("    if top_p is not None and top_p < 1:", "    elif top_p is not None and top_p < 1:")],
        "k only without p": [("    if top_k is not None:\n        keep", "    if top_k is not None and (top_p is None or temperature == 0):\n        keep")],
        "either cut is enough": [("keep &= probs.cumsum", "keep = (keep if top_k is not None else torch.zeros_like(keep)) | (probs.cumsum"), ("- probs < top_p  #", "- probs < top_p)  #")],
        "p not used": [("top_p is not None and top_p < 1:", "False:")],
        "not scaled up": [("kept / kept.sum(dim=-1, keepdim=True)", "kept")],
        "equal chances for all that stay": [("kept = probs * keep", "kept = keep.float()")],
        "softmax of what stays, zeros and all": [("kept / kept.sum(dim=-1, keepdim=True)", "kept.softmax(dim=-1)")],
        "softmax twice": [("kept = probs * keep", "kept = probs.softmax(dim=-1) * keep")],
        "scaled by the sum of the batch": [("kept.sum(dim=-1, keepdim=True)", "kept.sum()")],
        "left in the order of likelihood": [(BACK, "return kept / kept.sum(dim=-1, keepdim=True)")],
        "put back by gather": [(BACK, "return (kept / kept.sum(dim=-1, keepdim=True)).gather(-1, order)")],
        "the first row's order for all": [(BACK, "order = order.flatten(0, -2)[0].expand_as(order) if order.dim() > 1 else order\n    return torch.zeros_like(kept).scatter(-1, order, kept / kept.sum(dim=-1, keepdim=True))")],
        "the caller's logits divided": [(SORT, "logits /= temperature\n    temperature = 1.0\n    " + SORT)],
        "half precision stays half": [("logits.float()", "logits")],
        "log-probabilities": [("kept / kept.sum(dim=-1, keepdim=True))", "(kept / kept.sum(dim=-1, keepdim=True)).log())")],
        "minus infinity made finite": [("logits.float()", "logits.float().nan_to_num(neginf=-1.0)")],
        "checks removed": [("not temperature >= 0", "False"), ("top_k is not None and top_k < 1", "False"), ("top_p is not None and not 0 < top_p <= 1", "False")],
    },
    "generation-stream": {
        "right: reads are told by the length of the cache": "@torch.no_grad()\ndef stream(model, ids, num_tokens, temperature=1.0, top_k=None, top_p=None, seed=None):" + STREAM_CHECKS + '''
    size, text, mode = model.config.block_size, ids, model.training
    dice = torch.Generator().manual_seed(seed) if seed is not None else None
    begin = max(text.shape[1] - size, 0)  # where the window begins
    cache, known = model.new_cache(), begin  # what lies before `known` has been read
    model.train(False)
    try:
        for _ in range(num_tokens):
            if text.shape[1] - begin == size + 1:
                begin = known = text.shape[1] - (size - size // 2)
                cache = model.new_cache()
            logits, routings = (lambda o: (o.logits, o.routings))(model(text[:, known:], cache=cache))
            known = text.shape[1]
            new = torch.multinomial(next_token_probs(logits[:, -1, :], temperature, top_k, top_p), 1, generator=dice)
            text = torch.cat((text, new), dim=-1)
            yield new.squeeze(1), routings
    finally:
        if mode:
            model.train()
''',
        "right: a list of tokens, rows of blocks": "@torch.no_grad()\ndef stream(model, ids, num_tokens, temperature=1.0, top_k=None, top_p=None, seed=None):" + STREAM_CHECKS + '''
    was_training = model.training
    settings = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    draw = {} if seed is None else {"generator": torch.Generator(device=ids.device).manual_seed(seed)}
    size = model.config.block_size
    try:
        model.eval()
        window = list(ids[:, -size:].unbind(1))
        cache, unread = model.new_cache(), window
        while num_tokens > 0:
            if len(window) > size:
                window = window[size // 2 + 1:]
                cache, unread = model.new_cache(), window
            output = model(torch.stack(unread, dim=1), cache=cache)
            token = torch.multinomial(next_token_probs(output.logits[:, -1], **settings), 1, **draw)[:, 0]
            window, unread = window + [token], [token]
            num_tokens -= 1
            yield token, output.routings
    finally:
        model.train(was_training)
''',
        "evaluation mode forgotten": [("    model.eval()\n", "")],
        "never back to training mode": [("model.train(was_training)", "pass")],
        "always back to training mode": [("model.train(was_training)", "model.train()")],
        "back to training mode only at the end": [("    try:\n", "    if True:\n"), ("    finally:\n        model.train(was_training)", "    model.train(was_training)")],
        "the mode put back between two tokens": [("            yield unread[:, 0], output.routings", "            model.train(was_training)\n            yield unread[:, 0], output.routings")],
        "back to training mode unless there was an error": [("    finally:\n        model.train(was_training)", "    except GeneratorExit:\n        model.train(was_training)\n        raise\n    model.train(was_training)")],
        "back to training mode without its parts": [("model.train(was_training)", "model.training = was_training")],
        "gradients kept": [("@torch.no_grad()\n", "")],
        "no gradients for whoever reads": [("@torch.no_grad()\n", ""), ("    try:\n", "    torch.set_grad_enabled(False)\n    try:\n"), ("model.train(was_training)", "torch.set_grad_enabled(True)\n        model.train(was_training)")],
        "the first position instead of the last": [("output.logits[:, -1]", "output.logits[:, 0]")],
        "the last but one": [("output.logits[:, -1]", "output.logits[:, max(output.logits.shape[1] - 2, 0)]")],
        "the beginning of a long prompt": [("ids[:, -size:]", "ids[:, :size]")],
        "a long prompt not cut": [("ids[:, -size:]", "ids")],
        "the older half": [(HALF, "window = unread = window[:, :(size + 1) // 2]")],
        "the newer half without the newest": [(HALF, "window = unread = window[:, -((size + 1) // 2) - 1:-1]")],
        "a quarter instead of a half": [("-((size + 1) // 2)", "-(size // 4)")],
        "three quarters instead of a half": [("-((size + 1) // 2)", "-(3 * size // 4)")],
        "half a block rounded down": [("-((size + 1) // 2)", "-max(size // 2, 1)")],
        "starts over one token early": [("window.shape[1] > size", "window.shape[1] >= size")],
        "the window slides by one, all read again": [(HALF, "window = unread = window[:, -size:]")],
        "the oldest dropped from a full cache": [(HALF + "\n                cache = model.new_cache()", "window = window[:, 1:]\n                for layer in cache:\n                    layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]")],
        "the full cache read on": [("                cache = model.new_cache()\n", "")],
        "no room made in a full block": [(HALF, "pass"), ("                cache = model.new_cache()\n", "")],
        "no cache": [("model(unread, cache=cache)", "model(window)")],
        "a cache that is thrown away each time": [("model(unread, cache=cache)", "model(window, cache=model.new_cache())")],
        "everything read into the cache again": [("model(unread, cache=cache)", "model(window, cache=cache)")],
        "reads one token more than it needs": [("            yield unread[:, 0], output.routings", "            yield unread[:, 0], output.routings\n        model(window[:, -size:])")],
        "the likeliest instead of a draw": [(DRAW, "probs.argmax(dim=-1, keepdim=True)")],
        "one draw for all rows": [(DRAW, "torch.multinomial(probs[:1], 1, generator=generator).expand(len(ids), 1)")],
        "settings not passed on": [("next_token_probs(output.logits[:, -1], temperature, top_k, top_p)", "next_token_probs(output.logits[:, -1])")],
        "top-p not passed on": [("temperature, top_k, top_p)  #", "temperature, top_k)  #")],
        "the temperature not passed on": [("output.logits[:, -1], temperature, top_k, top_p)", "output.logits[:, -1], 1.0, top_k, top_p)")],
        "top-k and top-p swapped": [("temperature, top_k, top_p)  #", "temperature, top_p, top_k)  #")],
        "the seed not used": [(DICE, "None")],
        "everybody's dice seeded": [("    generator = " + DICE, "    generator = None\n    if seed is not None:\n        torch.manual_seed(seed)")],
        "everybody's dice seeded, and put back at the end": [("    generator = " + DICE, "    generator, public = None, torch.get_rng_state()\n    if seed is not None:\n        torch.manual_seed(seed)"), ("        model.train(was_training)", "        model.train(was_training)\n        if seed is not None:\n            torch.set_rng_state(public)")],
        "the same seed for each token": [("            output = model", "            generator = " + DICE + "\n            output = model")],
        "the same seed for each block": [(HALF, HALF + "\n                generator = " + DICE)],
        "seed 0 is no seed": [("None if seed is None", "None if not seed")],
        "without a seed always the same text": [(DICE, "torch.Generator(ids.device).manual_seed(seed or 0)")],
        "at least one token": [("range(num_tokens)", "range(max(num_tokens, 1))")],
        "no axis for a single row": [("yield unread[:, 0]", "yield unread.squeeze()")],
        "routings in the opposite order": [("output.routings", "output.routings[::-1]")],
        "the temperature twice": [("temperature, top_k, top_p)  #", "temperature * temperature, top_k, top_p)  #")],
        "one token too many": [("range(num_tokens)", "range(num_tokens + 1)")],
        "tokens with a time axis": [("yield unread[:, 0]", "yield unread")],
        "the first row only": [("yield unread[:, 0]", "yield unread[0]")],
        "the token just read instead of the new one": [("yield unread[:, 0], output", "yield window[:, -2], output")],
        "the whole text each time": [("yield unread[:, 0], output", "yield window, output")],
        "the last layer's routing only": [("output.routings", "output.routings[-1]")],
        "tokens without routings": [("yield unread[:, 0], output.routings", "yield unread[:, 0]")],
        "routings of the whole window": [("yield unread[:, 0], output.routings", "yield unread[:, 0], model(window[:, :-1][:, -size:]).routings")],
        "the prompt written over": [("            window = torch.cat([window, unread], dim=1)", "            ids[:, -1:] = unread\n            window = torch.cat([window, unread], dim=1)")],
        "an empty prompt let through": [("ids.shape[1] < 1", "False")],
        "all at once, as a list": [("            yield unread[:, 0], output.routings", "            pairs.append((unread[:, 0], output.routings))"), ("    try:\n", "    pairs = []\n    try:\n"), ("        model.train(was_training)", "        model.train(was_training)\n    return pairs")],
    },
    "generation-until": {
        "right: the end compared as a slice": '''
def until(characters, stop):
    text = ""
    while text[-len(stop):] != stop:
        character = next(characters, None)
        if character is None:
            break
        text = text + character
    return text
''',
        "right: a list, joined at the end": '''
def until(characters, stop):
    found = []
    for character in characters:
        found.append(character)
        if found[-len(stop):] == list(stop):
            return "".join(found)
    return "".join(found)
''',
        "the last character of stop is enough": [("text.endswith(stop)", "character == stop[-1]")],
        "the first character of stop is enough": [("text.endswith(stop)", "character == stop[0]")],
        "any character of stop": [("text.endswith(stop)", "character in stop")],
        "only if stop is a single character": [("text.endswith(stop)", "character == stop")],
        "stop left out": [("    return text", "    return text.removesuffix(stop)")],
        "everything read, then cut": '''
def until(characters, stop):
    text = "".join(characters)
    return text[:text.index(stop) + len(stop)] if stop in text else text
''',
        "split at stop": '''
def until(characters, stop):
    return "".join(characters).split(stop)[0] + stop
''',
        "one character more taken, and lost": '''
def until(characters, stop):
    text = ""
    for character in characters:
        if text.endswith(stop):
            break
        text += character
    return text
''',
        "a match that fails begins at nothing": '''
def until(characters, stop):
    text, matched = "", 0
    for character in characters:
        text += character
        matched = matched + 1 if character == stop[matched] else 0
        if matched == len(stop):
            break
    return text
''',
        "pieces as long as stop": '''
def until(characters, stop):
    text = piece = ""
    for character in characters:
        text, piece = text + character, piece + character
        if piece == stop:
            break
        if len(piece) == len(stop):
            piece = ""
    return text
''',
        "nothing if stop never comes": [("    return text", "    return text if text.endswith(stop) else ''")],
        "an error if stop never comes": '''
def until(characters, stop):
    text = ""
    while not text.endswith(stop):
        text += next(characters)
    return text
''',
        "on to the last stop": [("            break", "            found = text"), ('text = ""', 'text = found = ""'), ("return text", "return found or text")],
        "a list of characters": [("    return text", "    return list(text)")],
    },
    "generation-min-p": {
        "right: compared as logarithms": '''
def min_p_probs(logits, min_p, temperature=1.0):
    scores = logits / temperature
    least = scores.max(dim=-1, keepdim=True).values + math.log(min_p)
    return scores.masked_fill(scores < least, -math.inf).softmax(dim=-1)
''',
        "right: row by row": '''
def min_p_probs(logits, min_p, temperature=1.0):
    answers = []
    for row in logits.reshape(-1, logits.shape[-1]):
        weights = ((row - row.max()) / temperature).exp()  # the likeliest has 1
        weights = torch.where(weights < min_p, 0.0, weights)
        answers.append(weights / weights.sum())
    return torch.stack(answers).reshape(logits.shape)
''',
        "at least min_p itself": [("min_p * probs.amax(dim=-1, keepdim=True)", "min_p")],
        "more than, so that the likeliest may go": [("probs >= min_p", "probs > min_p")],
        "the unlikely instead": [("probs >= min_p", "probs <= min_p")],
        "compared with the mean": [("probs.amax(dim=-1, keepdim=True)", "probs.mean(dim=-1, keepdim=True)")],
        "compared with the likeliest of the batch": [("probs.amax(dim=-1, keepdim=True)", "probs.max()")],
        "less than min_p below the likeliest": [("probs >= min_p * probs.amax(dim=-1, keepdim=True)", "probs >= probs.amax(dim=-1, keepdim=True) - min_p")],
        "scores compared instead of probabilities": [("(probs >= min_p * probs.amax(dim=-1, keepdim=True))", "(logits >= min_p * logits.amax(dim=-1, keepdim=True))")],
        "top-p": [("(probs >= min_p * probs.amax(dim=-1, keepdim=True))", "(probs.sort(dim=-1, descending=True).values.cumsum(dim=-1) <= min_p)")],
        "not scaled up": [("return kept / kept.sum(dim=-1, keepdim=True)", "return kept")],
        "scaled by the sum of the batch": [("kept.sum(dim=-1, keepdim=True)", "kept.sum()")],
        "softmax of what stays, zeros and all": [("kept / kept.sum(dim=-1, keepdim=True)", "kept.softmax(dim=-1)")],
        "the temperature forgotten": [("logits / temperature", "logits")],
        "multiplied by the temperature": [("logits / temperature", "logits * temperature")],
        "the temperature after the cut": '''
def min_p_probs(logits, min_p, temperature=1.0):
    probs = logits.softmax(dim=-1)
    keep = probs >= min_p * probs.amax(dim=-1, keepdim=True)
    return (logits / temperature).masked_fill(~keep, -math.inf).softmax(dim=-1)
''',
        "the caller's logits divided": [("(logits / temperature)", "logits.div_(temperature)")],
        "the first axis instead of the last": [("softmax(dim=-1)", "softmax(dim=0)"), ("amax(dim=-1, keepdim=True)", "amax(dim=0, keepdim=True)"), ("kept.sum(dim=-1, keepdim=True)", "kept.sum(dim=0, keepdim=True)")],
        "a matrix at most": [("softmax(dim=-1)", "softmax(dim=logits.dim() - 1 if logits.dim() < 3 else 1)")],
    },
    "generation-score": {
        "right: each window, and only what no window had before": '''
def log_probs(model, ids):
    size, mode = model.config.block_size, model.training
    model.eval()
    answer = torch.full((len(ids) - 1,), math.nan)
    for start in range(0, len(ids), max(size // 2, 1)):
        x, y = ids[start:-1][:size], ids[start + 1:][:size]
        if len(x):
            with torch.no_grad():
                mine = -torch.nn.functional.cross_entropy(model(x[None]).logits[0], y, reduction="none")
            place = slice(start, start + len(x))
            answer[place] = torch.where(answer[place].isnan(), mine, answer[place])
    model.train(mode)
    return answer
''',
        "right: one pass for each token": '''
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
''',
        "evaluation mode forgotten": [("    model.eval()\n", "")],
        "never back to training mode": [("    model.train(was_training)\n", "")],
        "always back to training mode": [("model.train(was_training)", "model.train()")],
        "gradients kept": [("with torch.no_grad():", "if True:")],
        "windows side by side": [("start + max(size // 2, 1)", "start + size")],
        "windows at every place": [("start + max(size // 2, 1)", "start + 1")],
        "half of an odd block rounded up": [("max(size // 2, 1)", "(size + 1) // 2")],
        "the token itself instead of the next": [("window[1:, None]", "window[:-1, None]")],
        "the last window instead of the first": '''
@torch.no_grad()
def log_probs(model, ids):
    size, was_training, answer = model.config.block_size, model.training, torch.zeros(len(ids) - 1)
    model.eval()
    for start in range(0, len(ids) - 1, size // 2):
        window = ids[start:start + size + 1]
        scores = model(window[None, :-1]).logits[0].log_softmax(dim=-1)
        answer[start:start + size] = scores.gather(-1, window[1:, None])[:, 0]
    model.train(was_training)
    return answer
''',
        "the window before each token, sliding": '''
@torch.no_grad()
def log_probs(model, ids):
    size, was_training = model.config.block_size, model.training
    model.eval()
    answer = [model(ids[None, max(0, n - size):n]).logits[0, -1].log_softmax(dim=-1)[ids[n]] for n in range(1, len(ids))]
    model.train(was_training)
    return torch.stack(answer)
''',
        "windows that begin with their first question": '''
@torch.no_grad()
def log_probs(model, ids):
    size, was_training, answer = model.config.block_size, model.training, []
    model.eval()
    for start in range(0, len(ids) - 1, size // 2):
        window = ids[start:start + size // 2 + 1]
        scores = model(window[None, :-1]).logits[0].log_softmax(dim=-1)
        answer.append(scores.gather(-1, window[1:, None])[:, 0])
    model.train(was_training)
    return torch.cat(answer)
''',
        "the first block only": [("while done < len(ids) - 1:", "while not found:")],
        "the rest at the end left out": [("while done < len(ids) - 1:", "while start + size < len(ids):")],
        "a text longer than a block at once": [("window = ids[start:start + size + 1]", "window = ids")],
        "probabilities": [("log_softmax(dim=-1)", "softmax(dim=-1)")],
        "scores": [(".log_softmax(dim=-1)", "")],
        "normalised over time": [("log_softmax(dim=-1)", "log_softmax(dim=0)")],
        "losses": [("return torch.cat(found)", "return -torch.cat(found)")],
        "the sum": [("return torch.cat(found)", "return torch.cat(found).sum()")],
        "the likeliest token's, not the right one's": [("scores.gather(-1, window[1:, None])[done - start:, 0]", "scores.amax(dim=-1)[done - start:]")],
        "a number for the first token as well": [("return torch.cat(found)", "return torch.cat([torch.zeros(1), *found])")],
    },
}
