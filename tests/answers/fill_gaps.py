"Lesson 30: padding that stays behind, marks in another order, letters of the next gap, experts one place off."

SWAP = "output = model.eval()(source.roll(1, dims=0), labels=labels, real=real.roll(1, dims=0))"
ALONE = """    if len(source) < 2:
        raise ValueError("one text has no other source: give at least 2")
"""
BACK = "    model.train(was_training)\n"

LEFT = "tokenizer.encode(before[-side:]) + FIRST"
RIGHT = "right += [mark, *(tokenizer.encode(piece[:side]) + FIRST).tolist()]"
LOOP = "for mark, piece in enumerate(after[:MARKS], start=2):"
CUT = "torch.tensor(right[: side + 1])"

SIDE = "side = model.eval().transformer, model.config.block_size // 2"
GENERATE = "ids = transformer.generate(source, num_tokens + 1, **settings)"
NEW = "new = list(takewhile(lambda i: i >= FIRST, ids[0, 2:].tolist()))"
ROUTING = "routing = transformer(source, ids[:, :-1]).decoder_routings[-1]"
EXPERTS = "experts = routing.chosen[0, 1:].float().argmax(dim=-1).tolist()"
READ = "        before += filled + rest"

ANSWERS = {
    "swapped_loss": {
        "right: rows by index, the loss by hand": """
def swapped_loss(model, source, labels, real):
    n = source.shape[0]
    if n <= 1:
        raise ValueError("needs two texts")
    index = torch.arange(-1, n - 1)
    mode = model.training
    model.eval()
    try:
        with torch.inference_mode():
            logits = model(source[index], labels=labels, real=real[index]).logits
            real_labels = labels != -100
            return nn.functional.cross_entropy(logits[real_labels], labels[real_labels]).item()
    finally:
        model.train(mode)
""",
        "right: the other texts' labels are moved instead": """
@torch.no_grad()
def swapped_loss(model, source, labels, real):
    if len(labels) == 1:
        raise ValueError("one text only")
    mode = model.training
    model.eval()
    loss = model(source, labels=torch.cat([labels[1:], labels[:1]]), real=real).lm_loss
    model.train(mode)
    return float(loss)
""",
        "the padding stays behind": [("real=real.roll(1, dims=0)", "real=real")],
        "no padding at all": [(", real=real.roll(1, dims=0)", "")],
        "labels move along: it is their own source": [("labels=labels", "labels=labels.roll(1, dims=0)")],
        "characters move, not texts": [("source.roll(1, dims=0)", "source.roll(1, dims=1)")],
        "the whole tensor rolls, flattened": [("source.roll(1, dims=0)", "source.roll(1)")],
        "the next text's source": [(SWAP, SWAP.replace("roll(1", "roll(-1"))],
        "a random order, in which a text may keep its own": [
            (SWAP, SWAP.replace("source.roll(1, dims=0)", "source[torch.randperm(len(source))]"))
        ],
        "with the balance loss": [("output.lm_loss", "output.loss")],
        "jitter and dropout stay on": [("model.eval()(", "model("), (BACK, "")],
        "the mode is not put back": [(BACK, "")],
        "always in training afterwards": [(BACK, "    model.train()\n")],
        "a tensor": [(".lm_loss.item()", ".lm_loss")],
        "one text is swapped with itself": [(ALONE, "")],
        "changes the source in place": [
            ("    was_training", "    source.copy_(source.roll(1, dims=0))\n    was_training"),
            ("source.roll(1, dims=0)", "source"),
        ],
    },
    "gap_source": {
        "right: one id after another": """
def gap_source(tokenizer, before, after, side):
    ids = []
    for c in before[len(before) - min(side, len(before)):]:
        ids.append(tokenizer.encode(c).item() + FIRST)
    tail = [2]
    for number, piece in enumerate(after[:MARKS]):
        tail.extend([2 + number] if number else [])
        tail.extend(tokenizer.encode(c).item() + FIRST for c in piece)
    return torch.tensor(ids + tail[:side + 1], dtype=torch.int64)
""",
        "right: tensors put together": """
def gap_source(tokenizer, before, after, side):
    parts = [(tokenizer.encode(before) + FIRST)[-side:]]
    pieces = []
    for mark in range(2, 2 + min(len(after), 32)):
        pieces += [torch.tensor([mark]), tokenizer.encode(after[mark - 2]) + 34]
    return torch.cat(parts + [torch.cat(pieces)[:side + 1]])
""",
        "characters keep their ids": [(LEFT, LEFT.replace(" + FIRST", "")), (RIGHT, RIGHT.replace(" + FIRST", ""))],
        "marks from the other end": [(LOOP, "for mark, piece in zip(range(FIRST - 1, 1, -1), after):")],
        "marks begin with the end id": [("start=2", "start=1")],
        "all gaps have the same mark": [("right += [mark,", "right += [2,")],
        "later gaps have no mark": [("right += [mark,", "right += [mark] * (mark == 2) + [")],
        "the beginning of the text before": [("before[-side:]", "before[:side]")],
        "all of the text before": [("before[-side:]", "before")],
        "all of the text after": [(CUT, "torch.tensor(right)")],
        "the mark takes a place of the right side": [("side + 1]", "side]")],
        "only the text up to the next gap": [("after[:MARKS]", "after[:1]")],
        "more marks than there are": [("after[:MARKS]", "after")],
        "fewer marks than there are": [("after[:MARKS]", "after[:MARKS - 1]")],
        "the text after comes first": [(f"[{LEFT}, {CUT}]", f"[{CUT}, {LEFT}]")],
        "an unknown character is left out": [
            ("    right = []", '    before = "".join(c for c in before if c in tokenizer.characters)\n    right = []'),
        ],
    },
    "fill": {
        "right: a list first, experts by index": """
@torch.no_grad()
def fill(model, tokenizer, text, num_tokens=32, **settings):
    model.eval()
    parts = text.split("___")
    done, answer = parts[0], [(c, None) for c in parts[0]]
    for number in range(1, len(parts)):
        source = gap_source(tokenizer, done, parts[number:], model.config.block_size // 2).unsqueeze(0)
        ids = model.transformer.generate(source, 1 + num_tokens, **settings)
        chosen = model.transformer(source, ids).decoder_routings[-1].chosen[0]
        for at, token in enumerate(ids[0].tolist()):
            if at < 2:
                continue
            if token < FIRST:
                break
            letter = tokenizer.characters[token - FIRST]
            done += letter
            answer.append((letter, chosen[at - 1].nonzero().item()))
        done += parts[number]
        answer += [(c, None) for c in parts[number]]
    for pair in answer:
        yield pair
""",
        "right: more is generated than needed, and cut": """
def fill(model, tokenizer, text, num_tokens=32, **settings):
    transformer = model.eval().transformer
    before, *after = text.split(GAP)
    yield from zip(before, [None] * len(before))
    for i in range(len(after)):
        with torch.no_grad():
            source = gap_source(tokenizer, before, after[i:], model.config.block_size // 2)[None]
            ids = transformer.generate(source, num_tokens + 1, **settings)[:, :num_tokens + 2]
            routing = transformer(source, decoder_ids=ids).decoder_routings[-1]
        for k, token in enumerate(ids[0, 2:].tolist(), start=1):
            if token < 34:
                break
            before += tokenizer.decode([token - 34])
            yield before[-1], routing.logits[0, k].argmax().item()
        before += after[i]
        yield from zip(after[i], [None] * len(after[i]))
""",
        "reads a whole block on each side": [("block_size // 2", "block_size")],
        "the next gap does not see what was written": [(READ, "        before += rest")],
        "64 tokens": [("num_tokens=32", "num_tokens=64")],
        "the settings get lost": [(", **settings)  #", ")  #")],
        "marks of later gaps are skipped, their letters taken": [
            (NEW, "new = [i for i in ids[0, 2:].tolist() if i >= FIRST]")
        ],
        "the expert of the next step": [
            (ROUTING, ROUTING.replace("ids[:, :-1]", "ids")),
            (EXPERTS, EXPERTS.replace("1:]", "2:]")),
        ],
        "the expert of the step before": [(EXPERTS, EXPERTS.replace("1:]", ":]"))],
        "the first sparse layer": [("decoder_routings[-1]", "decoder_routings[0]")],
        "the encoder's experts": [("decoder_routings[-1]", "encoder_routings[-1]")],
        "given characters have an expert, too": [
            ("(character, None) for character in rest", "(character, 0) for character in rest")
        ],
        "the text before the first gap is missing": [
            ("    yield from ((character, None) for character in before)\n", "")
        ],
        "jitter stays on": [("model.eval().transformer", "model.transformer")],
        "only the first gap": [("    while after:", "    if after:")],
        "all gaps from the end": [("text.split(GAP)", "text.rsplit(GAP, 1)")],
    },
}
