"Lesson 17. What goes wrong here: edges and zeros in a draw; one scale for all rows; a model that stays changed."

DRAW = "(probs.cumsum(dim=-1) <= uniform[..., None]).sum(dim=-1)"
MINIMUM = "return torch.minimum(passed, last)"
SCALE = "scale = weight.abs().amax(dim=-1, keepdim=True) / 127"
CLAMP = "scale = scale.clamp(min=torch.finfo(weight.dtype).tiny)  # a row of zeros"
QUANTIZED = "return (weight / scale).round().to(torch.int8), scale"
SILENCE = "gates[..., list(experts)], kept[..., list(experts)] = 0, False"
FINALLY = """    try:
        yield
    finally:
        hook.remove()"""

ANSWERS = {
    "draw": {
        "right: searchsorted": '''
def draw(probs, uniform):
    edges = probs.cumsum(dim=-1)
    found = torch.searchsorted(edges, uniform[..., None].contiguous(), right=True)[..., 0]
    last = probs.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(found, last)
''',
        "right: row by row": '''
def draw(probs, uniform):
    found = []
    for row, u in zip(probs.reshape(-1, probs.shape[-1]).tolist(), uniform.reshape(-1).tolist()):
        total, last = 0.0, 0
        for token, p in enumerate(row):
            last = token if p > 0 else last
            total += p
            if u < total:
                break
        found.append(last)
    return torch.tensor(found).view(uniform.shape)
''',
        "the edge belongs to the token before it": [("<= uniform", "< uniform")],
        "beyond the last sum lies no token": [(MINIMUM, "return passed")],
        "beyond the last sum the last of all": [(MINIMUM, "return passed.clamp(max=probs.shape[-1] - 1)")],
        "the likeliest, whatever the number": [(MINIMUM, "return probs.argmax(dim=-1)")],
        "drawn anew": [
            (MINIMUM, "return torch.multinomial(probs.reshape(-1, probs.shape[-1]), 1).view(uniform.shape)"),
        ],
        "sorted by probability": [(DRAW, "(probs.sort(dim=-1, descending=True).values" + DRAW[len("(probs") :])],
        "the sum of all rows": [("probs.cumsum(dim=-1)", "probs.cumsum(dim=0)")],
        "numbers as floats": [(MINIMUM, "return torch.minimum(passed, last).float()")],
        "the probabilities are summed in place": [("probs.cumsum(dim=-1)", "probs.cumsum_(dim=-1)")],
    },
    "quantize": {
        "right: row by row": '''
def quantize(weight):
    rows = weight.reshape(-1, weight.shape[-1])
    numbers, scales = torch.empty(rows.shape, dtype=torch.int8), torch.empty(len(rows), 1, dtype=weight.dtype)
    for i, row in enumerate(rows):
        scales[i] = row.abs().max() / 127 if row.any() else 1
        numbers[i] = torch.round(row / scales[i])
    return numbers.view(weight.shape), scales.view(*weight.shape[:-1], 1)
''',
        "right: norm, and where": '''
def quantize(weight):
    scale = torch.linalg.vector_norm(weight, float("inf"), dim=-1, keepdim=True) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.clamp(torch.round(weight / scale), -127, 127).to(dtype=torch.int8), scale
''',
        "one scale for all": [(SCALE, "scale = (weight.abs().amax() / 127).expand(*weight.shape[:-1], 1)")],
        "a scale for each column": [(SCALE, "scale = weight.abs().amax(dim=0, keepdim=True) / 127")],
        "cut off instead of rounded": [(".round().to", ".to")],
        "rounded down": [(".round()", ".floor()")],
        "largest value, not magnitude": [(SCALE, "scale = weight.amax(dim=-1, keepdim=True).abs() / 127")],
        "seven bits": [("/ 127", "/ 63")],
        "zeros divide by zero": [(CLAMP, "")],
        "kept from zero far too early": [("torch.finfo(weight.dtype).tiny", "1e-4")],
        "int16": [("torch.int8", "torch.int16")],
        "scales without their axis": [(QUANTIZED, "return (weight / scale).round().to(torch.int8), scale[..., 0]")],
        "the weight is divided in place": [("(weight / scale)", "weight.div_(scale)")],
        "from the smallest to the largest": [
            (QUANTIZED, "low = weight.amin(dim=-1, keepdim=True)\n"
             "    scale = (weight.amax(dim=-1, keepdim=True) - low).clamp(min=1e-30) / 255\n"
             "    return ((weight - low) / scale - 128).round().to(torch.int8), scale"),
        ],
    },
    "knock_out": {
        "right: the weights into the residual stream are 0 for a while": '''
@contextmanager
def knock_out(model, layer, experts):
    stacked, saved = model.blocks[layer].moe.experts, {}
    chosen = list(experts)
    with torch.no_grad():
        for name, weight in stacked.named_parameters():
            if name.startswith("down"):
                saved[name] = weight.clone()
                weight[chosen] = 0
            elif name.split(".")[0].isdigit() and int(name.split(".")[0]) in chosen and ".down." in name:
                saved[name] = weight.clone()
                weight.zero_()
    try:
        yield model
    finally:
        with torch.no_grad():
            for name, weight in saved.items():
                stacked.get_parameter(name).copy_(weight)
''',
        "right: another forward of the router": '''
class knock_out:
    def __init__(self, model, layer, experts):
        self.router, self.experts = model.blocks[layer].moe.router, torch.tensor(list(experts), dtype=torch.long)

    def __enter__(self):
        before = self.before = self.router.forward
        def forward(x):
            routing = before(x)
            return replace(routing, gates=routing.gates.index_fill(-1, self.experts, 0.0))
        self.router.forward = forward

    def __exit__(self, *error):
        self.router.forward = self.before
''',
        "the others get more": [
            ("return replace(routing, gates=gates, kept=kept)",
             "return replace(routing, gates=gates / gates.sum(dim=-1, keepdim=True).clamp(min=1e-9), kept=kept)"),
        ],
        "the next best comes in": [
            ("return replace(routing, gates=gates, kept=kept)",
             "logits = routing.logits.clone()\n"
             "        logits[..., list(experts)] = -1e9\n"
             "        return top_k_gating(logits, router.top_k)"),
        ],
        "in every layer": [
            ("hook = model.blocks[layer].moe.router.register_forward_hook(silence)",
             "hooks = [block.moe.router.register_forward_hook(silence) for block in model.blocks]"),
            ("hook.remove()", "[hook.remove() for hook in hooks]"),
        ],
        "it stays": [(FINALLY, "    yield")],
        "it stays after an error": [(FINALLY, "    yield\n    hook.remove()")],
        "only the first of them": [(SILENCE, "gates[..., list(experts)[:1]] = 0")],
        "the whole layer": [(SILENCE, "gates[:] = 0")],
        "only for the last token": [(SILENCE, "gates[:, -1, list(experts)] = 0")],
        "the router forgets its choice": [
            ("return replace(routing, gates=gates, kept=kept)",
             "return replace(routing, gates=gates, kept=kept, chosen=kept)"),
        ],
        "the router's weights are gone": [
            (FINALLY, "    model.blocks[layer].moe.router.linear.weight.data[list(experts)] = -100\n" + FINALLY),
        ],
        "half as loud": [(SILENCE, "gates[..., list(experts)] /= 2")],
        "the hook sees no gradient": [("def silence(", "@torch.no_grad()\n    def silence(")],
        "the ones that are left": [
            (SILENCE, "gates[..., [e for e in range(gates.shape[-1]) if e not in list(experts)]] = 0"),
        ],
    },
}
