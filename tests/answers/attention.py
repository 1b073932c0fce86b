"What learners hand in for lesson 02."

HEAD = '''
class Head(nn.Module):
    def __init__(self, n_embd, head_size):
        super().__init__()
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)

    def forward(self, x):
'''

ROTATE = '''
def rotate(x, positions):
    D = x.shape[-1]
    if D % 2:
        raise ValueError(f"channels turn in pairs: their number must be even, but it is {D}")
'''

MULTI = '''
class MultiHeadAttention(nn.Module):
    def __init__(self, n_embd, n_head, rotary=False, bias=True, dropout=0.0):
        super().__init__()
        head_size, rest = divmod(n_embd, n_head)
        if rest:
            raise ValueError(f"n_embd = {n_embd} channels cannot be divided among "
                             f"n_head = {n_head} heads")
        if rotary and head_size % 2:
            raise ValueError(f"rotary positions turn pairs of channels, but a head has {head_size}")
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.n_head, self.rotary, self.dropout = n_head, rotary, dropout

    def forward(self, x, cache=None):
'''

ANSWERS = {
    "attention-head": {
        "right: PyTorch's own": HEAD + '''
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x), is_causal=True)
''',
        "right: einsum, and a large negative number added": HEAD + '''
        T, D = x.size(-2), self.key.out_features
        scores = torch.einsum("...td,...sd->...ts", self.query(x) / D**0.5, self.key(x))
        mask = torch.full((T, T), -1e9).triu(diagonal=1).to(scores)
        weights = F.softmax(scores + mask, dim=-1)
        return torch.einsum("...ts,...sd->...td", weights, self.value(x))
''',
        "right: token by token": HEAD + '''
        out = []
        for t in range(x.shape[-2]):
            past = x[..., :t + 1, :]
            q = self.query(x[..., t:t + 1, :])
            scores = (q * self.key(past)).sum(dim=-1) / self.query.out_features ** 0.5
            weights = torch.softmax(scores, dim=-1)
            out.append((weights[..., None] * self.value(past)).sum(dim=-2))
        return torch.stack(out, dim=-2)
''',
        "scaled by the embedding size, as in makeMoE": [("q.shape[-1] ** -0.5", "x.shape[-1] ** -0.5")],
        "not scaled": [(" * q.shape[-1] ** -0.5", "")],
        "divided by the head size, not its root": [("** -0.5", "** -1.0")],
        "multiplied by the root": [("** -0.5", "** 0.5")],
        "scaled by the number of tokens": [("q.shape[-1]", "q.shape[-2]")],
        "scaled after the softmax": [(" * q.shape[-1] ** -0.5", ""), (".softmax(dim=-1)", ".softmax(dim=-1) * q.shape[-1] ** -0.5")],
        "softmax first, the future zeroed": [("scores.masked_fill(future, -torch.inf).softmax(dim=-1)", "scores.softmax(dim=-1).masked_fill(future, 0)")],
        "softmax first, zeroed and divided, which fails for large scores": [
            ("weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)",
             "weights = scores.softmax(dim=-1).masked_fill(future, 0)\n        weights = weights / weights.sum(dim=-1, keepdim=True)")],
        "a softmax by hand that overflows": [
            ("weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)",
             "weights = scores.masked_fill(future, -torch.inf).exp()\n        weights = weights / weights.sum(dim=-1, keepdim=True)")],
        "masked with 0": [("-torch.inf", "0")],
        "masked with -10": [("-torch.inf", "-10")],
        "no mask": [(".masked_fill(future, -torch.inf)", "")],
        "the past masked": [(".triu(1)", ".tril(-1)")],
        "oneself masked too": [(".triu(1)", ".triu()")],
        "one token of the future seen": [(".triu(1)", ".triu(2)")],
        "a mask that blinds: True where to look": [(".triu(1)", ".tril()")],
        "softmax over the tokens that look": [("softmax(dim=-1)", "softmax(dim=-2)")],
        "softmax over the batch": [("softmax(dim=-1)", "softmax(dim=0)")],
        "keys look, queries are looked at": [("q @ k.transpose", "k @ q.transpose")],
        "works with a batch only": [("k.transpose(-2, -1)", "k.transpose(1, 2)")],
        "length of the batch for that of the text": [("T = x.shape[-2]", "T = len(x)")],
        "the mask is made once, for the first text": [("        future = ", '''        if not hasattr(self, "mask"):
            self.mask = torch.ones(T, T, dtype=torch.bool).triu(1)
        future = self.mask[:T, :T]
        unused = ''')],
        "what was put in instead of values": [("weights @ v", "weights @ x[..., :v.shape[-1]]")],
        "keys for values": [("weights @ v", "weights @ k")],
        "queries for keys": [("self.key(x), self", "self.query(x), self")],
        "values outside the average": [("weights @ v", "weights.sum(dim=-1, keepdim=True) * v")],
        "the token added again": [("return weights @ v", "return weights @ v + v")],
        "weights cut off from the gradient": [("return weights @ v", "return weights.detach() @ v")],
        "only one sequence of a batch": [("return weights @ v", "return (weights[:1] @ v[:1]).expand_as(v) if x.dim() > 2 else weights @ v")],
    },
    "attention-rotate": {
        "right: complex numbers": ROTATE + '''
    a, b = x.double().chunk(2, dim=-1)
    angles = positions[:, None].double() * 10000.0 ** (-torch.arange(D // 2) / (D // 2))
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)
''',
        "right: a half of minus b and a, as in LLaMA": ROTATE + '''
    speeds = 1.0 / 10000 ** (torch.arange(0, D, 2).float() / D)
    angles = torch.outer(positions.float(), speeds).repeat(1, 2)  # (T, D)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    half = torch.cat([-x[..., D // 2:], x[..., :D // 2]], dim=-1)
    return x * cos + half * sin
''',
        "neighbours for pairs, as in the paper": [
            ("a, b = x.chunk(2, dim=-1)", "a, b = x[..., ::2], x[..., 1::2]"),
            ("torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)", "torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)")],
        "pairs of neighbours laid side by side": [("a, b = x.chunk(2, dim=-1)", "a, b = x[..., ::2], x[..., 1::2]")],
        "turned the other way round": [("a * cos - b * sin, a * sin + b * cos", "a * cos + b * sin, b * cos - a * sin")],
        "a plus for the minus": [("a * cos - b * sin", "a * cos + b * sin")],
        "the new a in the second line": [("    return torch.cat([a * cos - b * sin,", "    a = a * cos - b * sin\n    return torch.cat([a,")],
        "halves exchanged": [("a * cos - b * sin, a * sin + b * cos", "a * sin + b * cos, a * cos - b * sin")],
        "speeds that grow": [("10000 ** (-torch", "10000 ** (torch")],
        "steps of i instead of 2i": [("torch.arange(0, D, 2, device=x.device)", "torch.arange(D // 2, device=x.device)")],
        "base 1000": [("10000 **", "1000 **")],
        "all arrows at one speed": [("10000 **", "1.0 **")],
        "angles in degrees": [("positions[:, None] * speeds", "positions[:, None] * speeds * torch.pi / 180")],
        "positions counted from 1": [("positions[:, None]", "(positions[:, None] + 1)")],
        "positions counted anew": [("positions[:, None]", "torch.arange(x.shape[-2])[:, None]")],
        "positions from the first on": [("positions[:, None]", "(positions - positions[0])[:, None]")],
        "positions along the channels": [("angles = positions[:, None] * speeds", "angles = (positions.float().mean() * speeds).expand(len(positions), -1)")],
        "float32 whatever comes in": [(".to(x.dtype)", ".float()")],
        "angles in the type of x": [("positions[:, None] * speeds", "positions[:, None].to(x.dtype) * speeds.to(x.dtype)")],
        "the first half of the channels only": [("a * sin + b * cos], dim=-1)", "b], dim=-1)")],
        "lengths not kept": [("cos, sin = angles.cos(), angles.sin()", "cos, sin = 1 + angles.cos(), angles.sin()")],
        "angles added, as position vectors are": [("a * cos - b * sin, a * sin + b * cos", "a + sin, b + cos")],
        "written into x": [("    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)",
                            "    new = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)\n    x.data.copy_(new)\n    return new")],
        "gradient cut": [("x.chunk(2", "x.detach().chunk(2")],
    },
    "attention-multi-head": {
        "right: head by head, keys turned after the cache": MULTI + '''
        (B, T, C), past = x.shape, 0 if cache is None else len(cache)
        D = C // self.n_head
        parts = self.qkv(x).split(C, dim=-1)
        q, k, v = (torch.stack(part.split(D, dim=-1), dim=1) for part in parts)
        if cache is not None:
            k, v = cache.append(k, v)
        if self.rotary:
            q, k = rotate(q, past + torch.arange(T)), rotate(k, torch.arange(past + T))
        out = []
        for head in range(self.n_head):
            scores = q[:, head] @ k[:, head].mT / D**0.5
            future = torch.arange(past + T) > torch.arange(past, past + T)[:, None]
            weights = torch.where(future, -torch.inf, scores).softmax(dim=-1).to(v.dtype)
            out.append(F.dropout(weights, self.dropout, self.training) @ v[:, head])
        y = self.proj(torch.cat(out, dim=-1))
        return F.dropout(y, p=self.dropout, training=self.training)
''',
        "right: always a mask of its own": MULTI + '''
        B, T, C = x.shape
        H, p = self.n_head, self.dropout * self.training
        past = len(cache) if cache is not None else 0
        q, k, v = [part.view(B, T, H, C // H).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2)]
        if self.rotary:
            where = torch.arange(T) + past
            q, k = rotate(q, where), rotate(k, where)
        if cache is not None:
            k, v = cache.append(k, v)
        mask = torch.full((T, past + T), -torch.inf, dtype=q.dtype).triu(past + 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        y = torch.einsum("bhtd->bthd", y).flatten(2)
        return F.dropout(self.proj(y), p)
''',
        "a view straight to the wanted shape": [(".view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)", ".chunk(3, dim=-1)"),
                                                ("        if self.rotary:", "        q, k, v = (part.reshape(B, self.n_head, T, -1) for part in (q, k, v))\n        if self.rotary:")],
        "query, key and value side by side in each head": [("view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)", "view(B, T, self.n_head, 3, -1).permute(3, 0, 2, 1, 4)")],
        "channels of a head not next to each other": [("view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)", "view(B, T, 3, -1, self.n_head).permute(2, 0, 4, 1, 3)")],
        "keys before queries": [("permute(2, 0, 3, 1, 4)", "permute(2, 0, 3, 1, 4)[[1, 0, 2]]")],
        "heads laid side by side without a transpose": [("y.transpose(1, 2).reshape", "y.reshape")],
        "no projection": [("y = self.proj(y.transpose(1, 2).reshape(B, T, C))", "y = y.transpose(1, 2).reshape(B, T, C)")],
        "scaled by the embedding size": [("is_causal=not past)", "is_causal=not past, scale=C ** -0.5)")],
        "not scaled": [("is_causal=not past)", "is_causal=not past, scale=1.0)")],
        "no mask": [("is_causal=not past)", "is_causal=False)")],
        "is_causal with a cache too": [("        visible = None\n", "        visible = None\n        past = 0\n")],
        "is_causal for every piece of several tokens": [("if past and T > 1:", "if False:"), ("is_causal=not past", "is_causal=T > 1")],
        "no mask as soon as there is a cache": [("if past and T > 1:", "if False:"), ("is_causal=not past", "is_causal=cache is None")],
        "a pair of new tokens taken for a single one": [("if past and T > 1:", "if past and T > 2:")],
        "new tokens see each other's future": [(".tril(past)", ".tril(past + T)")],
        "new tokens do not see themselves": [(".tril(past)", ".tril(past - 1)")],
        "triangle in the upper left corner": [(".tril(past)", ".tril()")],
        "mask the wrong way round": [(".tril(past)", ".triu(past + 1)")],
        "an empty cache taken for none": [("if cache is not None:", "if cache:")],
        "the cache filled, but not asked": [("k, v = cache.append(k, v)", "cache.append(k, v)"), ("past + T, dtype", "T, dtype"), (".tril(past)", ".tril()")],
        "keys and values exchanged in the cache": [("k, v = cache.append(k, v)", "v, k = cache.append(v, k)"), ("        visible = None", "        k, v = (v, k) if past else (k, v)\n        visible = None")],
        "one cache for all texts": [("        past = 0", '''        if cache is not None:
            self.kept = getattr(self, "kept", cache)
            if self.kept is not cache:
                cache.keys, cache.values = self.kept.keys, self.kept.values
        past = 0''')],
        "every call remembered": [("        past = 0", "        if cache is None:\n            cache = self.kept = getattr(self, 'kept', None) or KVCache()\n        past = 0")],
        "with a cache, positions begin at 0 again": [("torch.arange(past, past + T, device=x.device)", "torch.arange(T, device=x.device)")],
        "positions counted after the cache has grown": [("torch.arange(past, past + T, device=x.device)", "torch.arange(past + T, past + 2 * T, device=x.device) if past else torch.arange(T)")],
        "cached keys turned again": [("            k, v = cache.append(k, v)  # each (B, H, past + T, D)", '''            k, v = cache.append(k, v)
            if self.rotary:
                k = rotate(k, torch.arange(past + T))''')],
        "queries turned and keys not": [("q, k = rotate(qkv[:2],", "q = rotate(q,")],
        "keys turned and queries not": [("q, k = rotate(qkv[:2],", "k = rotate(k,")],
        "values turned too": [("q, k = rotate(qkv[:2],", "q, k, v = rotate(qkv,")],
        "turned before the heads are apart": [("self.qkv(x).view", "(self.qkv(rotate(x, torch.arange(past, past + T))) if self.rotary and C % 2 == 0 else self.qkv(x)).view"),
                                              ("if self.rotary:", "if False:")],
        "turned whether wanted or not": [("if self.rotary:", "if C // self.n_head % 2 == 0:")],
        "never turned": [("if self.rotary:", "if False:")],
        "dropout of the weights at evaluation": [("dropout = self.dropout if self.training else 0.0", "dropout = self.dropout")],
        "dropout of the output at evaluation": [("F.dropout(y, self.dropout, self.training)", "F.dropout(y, self.dropout)")],
        "no dropout of the weights": [("dropout = self.dropout if self.training else 0.0", "dropout = 0.0")],
        "no dropout of the output": [("return F.dropout(y, self.dropout, self.training)", "return y")],
        "dropout before the projection": [("y = self.proj(y.transpose(1, 2).reshape(B, T, C))", "y = F.dropout(y, self.dropout, self.training)"),
                                          ("return F.dropout(y, self.dropout, self.training)", "return self.proj(y.transpose(1, 2).reshape(B, T, C))")],
        "what came in added": [("return F.dropout(y, self.dropout, self.training)", "return x + F.dropout(y, self.dropout, self.training)")],
        "queries, keys and values without a gradient": [("        qkv = self", "        with torch.no_grad():\n          qkv = self")],
        "heads of the lesson": [("self.n_head, -1", "C // 4, -1")],
    },
    "attention-entropy": {
        "right: 0 log 0 made 0": '''
def attention_entropy(weights):
    return -(weights * weights.log()).nan_to_num(0.0).sum(-1)
''',
        "right: xlogy": '''
def attention_entropy(weights):
    return torch.special.xlogy(weights, weights).sum(dim=-1) * -1
''',
        "right: only where there is weight": '''
def attention_entropy(weights):
    logs = torch.zeros_like(weights)
    logs[weights > 0] = weights[weights > 0].log()
    return torch.einsum("...ts,...ts->...t", weights, logs).neg()
''',
        "0 log 0 is not a number": [("torch.special.entr(weights)", "-(weights * weights.log())")],
        "minus forgotten": [("torch.special.entr(weights)", "torch.special.xlogy(weights, weights)")],
        "in bits": [(".sum(dim=-1)", ".sum(dim=-1) / 0.6931471805599453")],
        "columns for rows": [("dim=-1", "dim=-2")],
        "mean for sum": [(".sum(", ".mean(")],
        "one number for all rows": [(".sum(dim=-1)", ".sum(dim=-1).mean()")],
        "a softmax once more": [("entr(weights)", "entr(weights.softmax(dim=-1))")],
        "share of the largest possible": [(".sum(dim=-1)", ".sum(dim=-1) / torch.tensor(weights.shape[-1]).log()")],
        "its exponential": [(".sum(dim=-1)", ".sum(dim=-1).exp()")],
        "logarithm without the weight": [("torch.special.entr(weights)", "-weights.clamp(min=1e-9).log()")],
        "a 0 hidden by too large a number": [("torch.special.entr(weights)", "-(weights * (weights + 0.01).log())")],
        "heads averaged": [(".sum(dim=-1)", ".sum(dim=-1).reshape(-1, weights.shape[-2]).mean(dim=0)")],
        "small weights left out": [("entr(weights)", "entr(weights.where(weights > 0.1, 0))")],
    },
    "attention-window": {
        "right: a triangle less a triangle": '''
def window_mask(T, window):
    ones = torch.ones(T, T, dtype=torch.bool)
    return ones.tril() & ~ones.tril(-window)
''',
        "right: row by row": '''
def window_mask(T, window):
    mask = torch.zeros(T, T).bool()
    for t in range(T):
        mask[t, max(0, t - window + 1):t + 1] = True
    return mask
''',
        "one token too many": [("distance < window", "distance <= window")],
        "one token too few": [("distance < window", "distance < window - 1")],
        "itself not included": [("distance >= 0", "distance > 0")],
        "the future seen": [("(distance >= 0) & ", "")],
        "as far ahead as back": [("(distance >= 0) & (distance < window)", "distance.abs() < window")],
        "True where it must not look": [("return (", "return ~(")  , (") & (distance", ") | (distance")],
        "rows and columns exchanged": [("torch.arange(T)[:, None] - torch.arange(T)", "torch.arange(T) - torch.arange(T)[:, None]")],
        "the first tokens instead of the last": [("(distance < window)", "(torch.arange(T) < window)")],
        "blocks": [("(distance < window)", "(torch.arange(T)[:, None] // window == torch.arange(T) // window)")],
        "numbers for truth": [("(distance < window)", "(distance < window).int()")],
        "the early rows are empty": [("(distance < window)", "(distance < window) & (torch.arange(T)[:, None] >= window - 1)")],
        "a plain triangle": [(" & (distance < window)", "")],
        "window of the check": [("distance < window", "distance < (2 if window < T else T)")],
    },
    "attention-grouped": {
        "right: a dimension for the groups": '''
def grouped_attention(q, k, v):
    (B, H, T, D), G = q.shape, k.shape[1]
    q = q.reshape(B, G, H // G, T, D)
    scores = torch.einsum("bgntd,bgsd->bgnts", q, k) / D**0.5
    scores = scores + torch.full((T, T), -torch.inf).triu(1)
    return torch.einsum("bgnts,bgsd->bgntd", scores.softmax(dim=-1), v).flatten(1, 2)


def cache_bytes(T, n_layer, n_head, n_embd, groups, bytes_per_number=2):
    head_size = n_embd / n_head
    per_token = (groups * head_size + groups * head_size) * n_layer
    return int(per_token * T * bytes_per_number)
''',
        "right: PyTorch's own": '''
def grouped_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def cache_bytes(T, n_layer, n_head, n_embd, groups, bytes_per_number=2):
    channels = n_embd * groups // n_head
    return sum(2 * T * channels * bytes_per_number for _ in range(n_layer))
''',
        "groups taken in turns": [("part.repeat_interleave(shared, dim=1)", "part.repeat(1, shared, 1, 1)")],
        "repeated along the tokens": [("repeat_interleave(shared, dim=1)", "repeat_interleave(shared, dim=2)[:, :1].expand(-1, q.shape[1], -1, -1)")],
        "the first key for all": [("part.repeat_interleave(shared, dim=1)", "part[:, :1].expand_as(q)")],
        "values not shared": [("return F", "v = v[:, torch.arange(q.shape[1]) % (v.shape[1] // shared)]\n    return F")],
        "queries averaged in each group": [("return F", "q = q.unflatten(1, (-1, shared)).mean(dim=2, keepdim=True).expand(-1, -1, shared, -1, -1).flatten(1, 2)\n    return F")],
        "the future seen": [("is_causal=True", "is_causal=False")],
        "not scaled": [("is_causal=True", "is_causal=True, scale=1.0")],
        "two to a group, as in the check": [("q.shape[1] // k.shape[1]", "2")],
        "the first heads only": [("return F.scaled_dot_product_attention(q, k, v", "return F.scaled_dot_product_attention(q[:, ::shared], k[:, ::shared], v[:, ::shared]")],
        "keys only": [("return 2 * n_layer", "return n_layer")],
        "one layer": [("2 * n_layer *", "2 *")],
        "as many as query heads": [("* groups *", "* n_head *")],
        "channels divided among the groups": [("n_embd // n_head", "n_embd // groups")],
        "all channels in each group": [("(n_embd // n_head)", "n_embd")],
        "always two bytes": [("* bytes_per_number", "* 2")],
        "bits": [("* bytes_per_number", "* bytes_per_number * 8")],
        "queries kept too": [("return 2 *", "return 3 *")],
        "query heads over groups": [("* groups *", "* (n_head // groups) *")],
    },
}
