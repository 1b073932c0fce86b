"Lesson 02. What goes wrong here: the scale, the mask, the batch in front, the halves that turn, where dropout falls."

HEAD = """
class Head(nn.Module):
    def __init__(self, n_embd, head_size):
        super().__init__()
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)

    def forward(self, x):
"""

MASKED = "scores.masked_fill(future, -torch.inf).softmax(dim=-1)"

ROTATE = """
def rotate(x, positions):
    D = x.shape[-1]
    if D % 2:
        raise ValueError(f"channels turn in pairs: their number must be even, but it is {D}")
"""

TURN = "a, b = x.chunk(2, dim=-1)"
CAT = "torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)"

MULTI = """
class MultiHeadAttention(nn.Module):
    def __init__(self, n_embd, n_head, rotary=False, bias=True, dropout=0.0):
        super().__init__()
        head_size, rest = divmod(n_embd, n_head)
        if rest:
            raise ValueError(f"n_embd = {n_embd} channels cannot be divided among n_head = {n_head} heads")
        if rotary and head_size % 2:
            raise ValueError(f"rotary positions turn pairs of channels, but a head has {head_size}")
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.n_head, self.rotary, self.dropout = n_head, rotary, dropout

    def forward(self, x, cache=None):
"""

VIEW = "unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)"
RATE = "dropout = self.dropout if self.training else 0.0"
END = "return F.dropout(y, self.dropout, self.training)"

ANSWERS = {
    "head": {
        "right: einsum, and a large negative number added": HEAD
        + """
        T, D = x.size(-2), self.key.out_features
        scores = torch.einsum("...td,...sd->...ts", self.query(x) / D**0.5, self.key(x))
        mask = torch.full((T, T), -1e9, device=x.device).triu(diagonal=1).to(scores)
        weights = F.softmax(scores + mask, dim=-1)
        return torch.einsum("...ts,...sd->...td", weights, self.value(x))
""",
        "right: PyTorch's own": HEAD
        + """
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x), is_causal=True)
""",
        "right: token by token": HEAD
        + """
        out = []
        for t in range(x.shape[-2]):
            past = x[..., :t + 1, :]
            q = self.query(x[..., t:t + 1, :])
            scores = (q * self.key(past)).sum(dim=-1) / self.query.out_features ** 0.5
            weights = torch.softmax(scores, dim=-1)
            out.append((weights[..., None] * self.value(past)).sum(dim=-2))
        return torch.stack(out, dim=-2)
""",
        "scaled by the embedding size, as in makeMoE": [("q.shape[-1] ** -0.5", "x.shape[-1] ** -0.5")],
        "softmax first, the future zeroed": [(MASKED, "scores.softmax(dim=-1).masked_fill(future, 0)")],
        "softmax first, zeroed and divided, which fails for large scores": [
            (
                MASKED,
                "scores.softmax(dim=-1).masked_fill(future, 0)\n"
                "        weights = weights / weights.sum(dim=-1, keepdim=True)",
            )
        ],
        "a softmax by hand that overflows": [
            (
                MASKED,
                "scores.masked_fill(future, -torch.inf).exp()\n"
                "        weights = weights / weights.sum(dim=-1, keepdim=True)",
            )
        ],
        "one token of the future seen": [(".triu(1)", ".triu(2)")],
        "softmax over the tokens that look": [("softmax(dim=-1)", "softmax(dim=-2)")],
        "works with a batch only": [("k.transpose(-2, -1)", "k.transpose(1, 2)")],
        "the mask is made once, for the first text": [
            (
                "        future = ",
                """        if not hasattr(self, "mask"):
            self.mask = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        future = self.mask[:T, :T]
        unused = """,
            )
        ],
        "a mask of 256": [
            (
                "torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)",
                "torch.ones(256, 256, dtype=torch.bool, device=x.device).triu(1)[:T, :T]",
            )
        ],
        "a buffer registered in forward: the checkpoint has one tensor too many": [
            ("        weights =", "        self.register_buffer('future', future)\n        weights =")
        ],
        "the mask on the CPU, wherever x is": [(", device=x.device", "")],
        "weights cut off from the gradient": [("return weights @ v", "return weights.detach() @ v")],
        "no gradient in evaluation mode": [
            ("return weights @ v", "return weights @ v if self.training else (weights @ v).detach()")
        ],
        "what came in is scaled in place": [
            ("        q, k, v =", "        x.data.mul_(self.query.out_features ** -0.25)\n        q, k, v ="),
            (" * q.shape[-1] ** -0.5", ""),
        ],
    },
    "rotate": {
        "right: complex numbers": ROTATE
        + """
    a, b = x.double().chunk(2, dim=-1)
    angles = positions[:, None].double() * 10000.0 ** (-torch.arange(D // 2, device=x.device) / (D // 2))
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)
""",
        "right: a half of minus b and a, as in LLaMA": ROTATE
        + """
    speeds = 1.0 / 10000 ** (torch.arange(0, D, 2, device=x.device).float() / D)
    angles = torch.outer(positions.float(), speeds).repeat(1, 2)  # (T, D)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    half = torch.cat([-x[..., D // 2:], x[..., :D // 2]], dim=-1)
    return x * cos + half * sin
""",
        "neighbours for pairs, as in the paper": [
            (TURN, "a, b = x[..., ::2], x[..., 1::2]"),
            (CAT, "torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)"),
        ],
        "turned the other way round": [
            ("a * cos - b * sin, a * sin + b * cos", "a * cos + b * sin, b * cos - a * sin")
        ],
        "the new a in the second line": [
            ("    return torch.cat([a * cos - b * sin,", "    a = a * cos - b * sin\n    return torch.cat([a,")
        ],
        "steps of i instead of 2i": [
            ("torch.arange(0, D, 2, device=x.device)", "torch.arange(D // 2, device=x.device)")
        ],
        "positions counted from 1": [("positions[:, None]", "(positions[:, None] + 1)")],
        "positions counted anew": [("positions[:, None]", "torch.arange(x.shape[-2], device=x.device)[:, None]")],
        "a table of 512 positions": [
            (
                "    angles = positions[:, None] * speeds",
                "    table = torch.arange(512, device=x.device)[:, None] * speeds\n    angles = table[positions]",
            )
        ],
        "float32 whatever comes in": [(".to(x.dtype)", ".float()")],
        "angles in the type of x": [
            ("positions[:, None] * speeds", "positions[:, None].to(x.dtype) * speeds.to(x.dtype)")
        ],
        "speeds on the CPU, wherever x is": [(", device=x.device", "")],
        "written into x": [
            ("    return " + CAT, "    new = " + CAT + ".to(x.dtype)\n    x.data.copy_(new)\n    return new")
        ],
        "gradient cut": [("x.chunk(2", "x.detach().chunk(2")],
    },
    "multi_head_attention": {
        "right: head by head, and no cache yet": MULTI
        + """
        B, T, C = x.shape
        D = C // self.n_head
        parts = self.qkv(x).split(C, dim=-1)
        q, k, v = (torch.stack(part.split(D, dim=-1), dim=1) for part in parts)
        if self.rotary:
            q, k = (rotate(part, torch.arange(T, device=x.device)) for part in (q, k))
        future = torch.ones(T, T, device=x.device).triu(1).bool()
        out = []
        for head in range(self.n_head):
            scores = q[:, head] @ k[:, head].mT / D**0.5
            weights = torch.where(future, -torch.inf, scores).softmax(dim=-1).to(v.dtype)
            out.append(F.dropout(weights, self.dropout, self.training) @ v[:, head])
        y = self.proj(torch.cat(out, dim=-1))
        return F.dropout(y, p=self.dropout, training=self.training)
""",
        "right: always a mask of its own": MULTI
        + """
        B, T, C = x.shape
        H, p = self.n_head, self.dropout * self.training
        past = len(cache) if cache is not None else 0
        q, k, v = [part.view(B, T, H, C // H).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2)]
        if self.rotary:
            where = torch.arange(T, device=x.device) + past
            q, k = rotate(q, where), rotate(k, where)
        if cache is not None:
            k, v = cache.append(k, v)
        mask = torch.full((T, past + T), -torch.inf, dtype=q.dtype, device=q.device).triu(past + 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        y = torch.einsum("bhtd->bthd", y).flatten(2)
        return F.dropout(self.proj(y), p)
""",
        "a view straight to the wanted shape": [
            ("." + VIEW, ".chunk(3, dim=-1)"),
            (
                "        if self.rotary:",
                "        q, k, v = (part.reshape(B, self.n_head, T, -1) for part in (q, k, v))\n"
                "        if self.rotary:",
            ),
            ("qkv[:2]", "torch.stack([q, k])"),
        ],
        "query, key and value side by side in each head": [
            (VIEW, "view(B, T, self.n_head, 3, -1).permute(3, 0, 2, 1, 4)")
        ],
        "heads laid side by side without a transpose": [("y.transpose(1, 2).reshape", "y.reshape")],
        "values turned too": [("q, k = rotate(qkv[:2],", "q, k, v = rotate(qkv,")],
        "no mask": [("is_causal=not past", "is_causal=False")],
        "dropout of the weights at evaluation": [(RATE, "dropout = self.dropout")],
        "no dropout of the weights": [(RATE, "dropout = 0.0")],
        "dropout of half the rate on the weights": [(RATE, "dropout = self.dropout / 2 if self.training else 0.0")],
        "dropout on the values instead of the weights": [
            (RATE, "v, dropout = F.dropout(v, self.dropout, self.training), 0.0")
        ],
        "dropout on what comes in instead of the weights": [
            ("self.qkv(x)", "self.qkv(F.dropout(x, self.dropout, self.training))"),
            (RATE, "dropout = 0.0"),
        ],
        "dropout on whole heads instead of weights": [
            (
                RATE,
                "dropout = 0.0\n"
                "        v = v * F.dropout(torch.ones_like(v[:, :, :1, :1]), self.dropout, self.training)",
            )
        ],
        "dropout on the output twice": [
            (END, "return F.dropout(F.dropout(y, self.dropout, self.training), self.dropout, self.training)"),
            (RATE, "dropout = 0.0"),
        ],
        "dropout before the projection": [
            ("y = self.proj(y.transpose(1, 2).reshape(B, T, C))", "y = F.dropout(y, self.dropout, self.training)"),
            (END, "return self.proj(y.transpose(1, 2).reshape(B, T, C))"),
        ],
        "positions on the CPU, wherever x is": [("past + T, device=x.device)", "past + T)")],
        "no gradient in evaluation mode": [(END, "y = y if self.training else y.detach()\n        " + END)],
    },
    "attention_entropy": {
        "right: xlogy": """
def attention_entropy(weights):
    return torch.special.xlogy(weights, weights).sum(dim=-1) * -1
""",
        "right: only where there is weight": """
def attention_entropy(weights):
    logs = torch.zeros_like(weights)
    logs[weights > 0] = weights[weights > 0].log()
    return torch.einsum("...ts,...ts->...t", weights, logs).neg() if weights.dim() > 1 else -(weights * logs).sum()
""",
        "0 log 0 is not a number": [("torch.special.entr(weights)", "-(weights * weights.log())")],
        "in bits": [(".sum(dim=-1)", ".sum(dim=-1) / 0.6931471805599453")],
        "columns for rows": [("dim=-1", "dim=-2")],
        "one number for all rows": [(".sum(dim=-1)", ".sum(dim=-1).mean()")],
        "a softmax once more": [("entr(weights)", "entr(weights.softmax(dim=-1))")],
        "a 0 hidden by too large a number": [("torch.special.entr(weights)", "-(weights * (weights + 0.01).log())")],
        "float32 whatever comes in": [("entr(weights)", "entr(weights.float())")],
        "the caller's zeros overwritten with ones": """
def attention_entropy(weights):
    weights[weights == 0] = 1
    return -(weights * weights.log()).sum(dim=-1)
""",
    },
    "grouped_attention": {
        "right: a dimension for the groups": """
def grouped_attention(q, k, v):
    (B, H, T, D), G = q.shape, k.shape[1]
    q = q.reshape(B, G, H // G, T, D)
    scores = torch.einsum("bgntd,bgsd->bgnts", q, k) / D**0.5
    scores = scores + torch.full((T, T), -torch.inf, device=q.device).triu(1)
    return torch.einsum("bgnts,bgsd->bgntd", scores.softmax(dim=-1), v).flatten(1, 2)
""",
        "right: PyTorch's own": """
def grouped_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
""",
        "groups taken in turns": [("part.repeat_interleave(shared, dim=1)", "part.repeat(1, shared, 1, 1)")],
        "the first key for all": [("part.repeat_interleave(shared, dim=1)", "part[:, :1].expand_as(q)")],
        "queries averaged in each group": [
            (
                "return F",
                "q = q.unflatten(1, (-1, shared)).mean(dim=2, keepdim=True)\n"
                "    q = q.expand(-1, -1, shared, -1, -1).flatten(1, 2)\n"
                "    return F",
            )
        ],
        "the future seen": [("is_causal=True", "is_causal=False")],
        "no mask where nothing is shared, G = H": [
            (
                "    shared =",
                "    if q.shape[1] == k.shape[1]:\n"
                "        return F.scaled_dot_product_attention(q, k, v)\n"
                "    shared =",
            )
        ],
        "two to a group": [("q.shape[1] // k.shape[1]", "2 if k.shape[1] > 1 else q.shape[1]")],
        "values without a gradient": [
            ("return F", "v = v.detach()\n    return F"),
        ],
    },
}
