"Lesson 23: the halves in the wrong order or place, widths that are off, norms and residuals that are missing."

UNITS = """
def geglu(x):
    {first}
    return {geglu}


def swiglu(x):
    {first}
    return {swiglu}


GATED = {{"geglu": geglu, "swiglu": swiglu}}
ACTIVATIONS.update(GATED)
"""


def units(geglu, swiglu, first="gate, value = x.chunk(2, dim=-1)"):
    return UNITS.format(first=first, geglu=geglu, swiglu=swiglu)


BEFORE = "x = x + self.ff_before(self.norm_before(x))"
MIXTURE = "y, routing = self.moe(self.norm(x))\n        x = x + y"
AFTER = "x = x + self.ff_after(self.norm_after(x))"

ANSWERS = {
    "gated_units": {
        "right: halves by slicing, gelu by its formula": units(
            "gate * (1 + torch.erf(gate / 2**0.5)) / 2 * value",
            "gate * torch.sigmoid(gate) * value",
            "F_ = x.shape[-1] // 2\n    gate, value = x[..., :F_], x[..., F_:]",
        ),
        "right: unflatten, and PyTorch's glu with the halves turned round": """
def geglu(x):
    gate, value = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.mul(value, nn.functional.gelu(gate))


def swiglu(x):
    gate, value = x.unflatten(-1, (2, -1)).unbind(-2)
    return F.glu(torch.cat([value, gate], dim=-1)) * gate


GATED = {"geglu": geglu, "swiglu": swiglu}
ACTIVATIONS.update(GATED)
""",
        "the halves swapped (mlx-lm #767)": units("gate * F.gelu(value)", "gate * F.silu(value)"),
        "the bracket round the product (breakdown-minimind #3)": units("F.gelu(gate * value)", "F.silu(gate * value)"),
        "the function of both halves (trident #101)": units(
            "F.gelu(gate) * F.gelu(value)", "F.silu(gate) * F.silu(value)"
        ),
        "gate and value in turns (the layout of gpt-oss)": units(
            "F.gelu(gate) * value", "F.silu(gate) * value", "gate, value = x[..., ::2], x[..., 1::2]"
        ),
        "split along the tokens": units(
            "F.gelu(gate) * value",
            "F.silu(gate) * value",
            "gate, value = x.chunk(2, dim=1) if x.dim() > 2 else x.chunk(2, dim=-1)",
        ),
        "two dimensions only": units("F.gelu(gate) * value", "F.silu(gate) * value", "gate, value = x.chunk(2, dim=1)"),
        "gelu by tanh": units("F.gelu(gate, approximate='tanh') * value", "F.silu(gate) * value"),
        "a sum for the product": units("F.gelu(gate) + value", "F.silu(gate) + value"),
        "sigmoid in swiglu": units("F.gelu(gate) * value", "gate.sigmoid() * value"),
        "exponentials that overflow": units("F.gelu(gate) * value", "gate * gate.exp() / (1 + gate.exp()) * value"),
        "no gradient for the gate": units("F.gelu(gate).detach() * value", "F.silu(gate).detach() * value"),
        "the gate written into x": units("F.gelu(gate) * value", "F.silu(gate, inplace=True) * value"),
        "always float32": units("(F.gelu(gate) * value).float()", "(F.silu(gate) * value).float()"),
    },
    "gated_expert": {
        "right: on its own, in steps": """
class GatedExpert(nn.Module):
    def __init__(self, n_embd, n_hidden, activation="geglu", bias=True, dropout=0.0):
        nn.Module.__init__(self)
        if activation not in ("geglu", "swiglu"):
            raise ValueError(f"{activation} is not geglu or swiglu")
        self.width, self.p = n_hidden, dropout
        self.act = F.gelu if activation == "geglu" else F.silu
        self.up = nn.Linear(n_embd, n_hidden + n_hidden, bias)
        self.down = nn.Linear(n_hidden, n_embd, bias)

    def forward(self, x):
        both = self.up(x)
        hidden = self.act(both[..., : self.width]) * both[..., self.width :]
        return F.dropout(self.down(hidden), self.p, self.training)


EXPERTS.update(dict.fromkeys(GATED, GatedExpert))
""",
        "right: another `up` for a plain expert": [
            (
                "        super().__init__(n_embd, 2 * n_hidden, activation, bias, dropout)  # up: gate rows, "
                "value rows\n"
                "        self.down = nn.Linear(n_hidden, n_embd, bias=bias)",
                "        super().__init__(n_embd, n_hidden, activation, bias=bias, dropout=dropout)\n"
                "        self.up = nn.Linear(in_features=n_embd, out_features=n_hidden * 2, bias=bias)",
            )
        ],
        "two thirds of the width": [
            ("2 * n_hidden,", "2 * (2 * n_hidden // 3),"),
            ("Linear(n_hidden,", "Linear(2 * n_hidden // 3,"),
        ],
        "two matrices beside `up`": [
            ("        self.down =", "        self.value = nn.Linear(n_embd, n_hidden, bias=bias)\n        self.down =")
        ],
        "`down` always with a bias": [("n_embd, bias=bias)", "n_embd)")],
        "never a bias": [
            ("activation, bias, dropout)", "activation, False, dropout)"),
            ("n_embd, bias=bias)", "n_embd, bias=False)"),
        ],
        "dropout not passed on": [("activation, bias, dropout)", "activation, bias)")],
        "always geglu": [("2 * n_hidden, activation,", "2 * n_hidden, 'geglu',")],
        "any activation will do": [("if activation not in GATED:", "if activation not in ACTIVATIONS:")],
        "swiglu unless told otherwise": [('activation="geglu", bias', 'activation="swiglu", bias')],
        "value rows before gate rows (st-moe-pytorch's order)": [
            (
                "        self.down =",
                "        act, turn = self.activation, lambda z: z.roll(z.shape[-1] // 2, dims=-1)\n"
                "        self.activation = lambda z: act(turn(z))\n        self.down =",
            )
        ],
        "dropout on the hidden units": [
            (
                "        self.down =",
                "        act, drop = self.activation, self.dropout\n        self.dropout = nn.Identity()\n"
                "        self.activation = lambda z: drop(act(z))\n        self.down =",
            )
        ],
        "`down` starts at 0": [("n_embd, bias=bias)", "n_embd, bias=bias)\n        nn.init.zeros_(self.down.weight)")],
        "`up` frozen": [("        self.down =", "        self.up.weight.requires_grad_(False)\n        self.down =")],
    },
    "sparse_moe_block": {
        "right: a list of steps": """
class SparseMoEBlock(nn.Module):
    def __init__(self, n_embd, moe, ff_before=None, ff_after=None):
        super().__init__()
        layers = [layer for layer in (ff_before, moe, ff_after) if layer is not None]
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList([nn.RMSNorm(n_embd) for _ in layers])
        self.place = layers.index(moe)

    def forward(self, x):
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms)):
            y = layer(norm(x))
            if i == self.place:
                y, routing = y
            x = x + y
        return x, routing
""",
        "right: by a helper, nothing is None": """
def nothing(x):
    return 0


class SparseMoEBlock(nn.Module):
    def __init__(self, n_embd, moe, ff_before=None, ff_after=None):
        super().__init__()
        self.first = nn.Sequential(nn.RMSNorm(n_embd), ff_before) if ff_before else nothing
        self.last = nn.Sequential(nn.RMSNorm(n_embd), ff_after) if ff_after else nothing
        self.inner = nn.RMSNorm(n_embd)
        self.mixture = moe

    def forward(self, x):
        x = self.first(x) + x
        answer, decision = self.mixture(self.inner(x))
        x = answer + x
        return self.last(x) + x, decision
""",
        "no norm before the dense layers": [("self.norm_before(x))", "x)"), ("self.norm_after(x))", "x)")],
        "the norm after the layer": [(BEFORE, "x = x + self.norm_before(self.ff_before(x))")],
        "the stream itself is normed": [
            (MIXTURE, "x = self.norm(x)\n        y, routing = self.moe(x)\n        x = x + y")
        ],
        "the mixture's answer replaces x": [("x = x + y", "x = y")],
        "the dense layer after it reads what the mixture read": [
            (MIXTURE, "old = x\n        " + MIXTURE),
            (AFTER, "x = x + self.ff_after(self.norm_after(old))"),
        ],
        "before and after change places": [
            (
                "self.ff_before, self.moe, self.ff_after = ff_before, moe, ff_after",
                "self.ff_before, self.moe, self.ff_after = ff_after, moe, ff_before",
            ),
            ("(ff_before, moe, ff_after)", "(ff_after, moe, ff_before)"),
        ],
        "one norm for all layers": [
            ("(self.norm_before(x))", "(self.norm(x))"),
            ("(self.norm_after(x))", "(self.norm(x))"),
        ],
        "norms also for layers that are left out": [("if layer is not None else None", "")],
        "a norm that subtracts the mean": [("nn.RMSNorm", "nn.LayerNorm")],
        "needs both dense layers": [("if self.ff_after is not None:", "if True:")],
        "added to x in place": [(AFTER, AFTER.replace("x = x +", "x +=")), (BEFORE, BEFORE.replace("x = x +", "x +="))],
        "noise also in evaluation (as st-moe-pytorch's noise_gates)": [
            ("self.moe(self.norm(x))", "self.moe(self.norm(x) + 1e-7 * torch.randn_like(x))")
        ],
        "the routing is forgotten": [("return x, routing", "return x, None")],
        "no gradient through the mixture in evaluation": [
            ("x = x + y", "x = x + (y if self.training else y.detach())")
        ],
        "needs batch and time": [
            ("if self.ff_before is not None:", "B, T, C = x.shape\n        if self.ff_before is not None:")
        ],
    },
    "pack_expert": {
        "right: a state dict": """
def pack_expert(gate, value, down, activation="swiglu"):
    n_hidden, n_embd = gate.weight.shape
    expert = GatedExpert(n_embd, n_hidden, activation, gate.bias is not None)
    names = ["weight"] + ["bias"] * (gate.bias is not None)
    state = {f"up.{name}": torch.cat([getattr(gate, name), getattr(value, name)]) for name in names}
    state |= {f"down.{name}": getattr(down, name) for name in names}
    expert = expert.to(gate.weight.dtype)
    expert.load_state_dict(state)
    return expert
""",
        "right: half by half": """
def pack_expert(gate, value, down, activation="swiglu"):
    F_ = gate.out_features
    expert = GatedExpert(gate.in_features, F_, activation, bias=down.bias is not None).to(down.weight)
    for name in ("weight",) if down.bias is None else ("weight", "bias"):
        getattr(expert.up, name).data[:F_] = getattr(gate, name).data
        getattr(expert.up, name).data[F_:] = getattr(value, name).data
        getattr(expert.down, name).data.copy_(getattr(down, name).data)
    return expert
""",
        "value rows first": [("torch.cat([mine, other])", "torch.cat([other, mine])")],
        "in turns": [("torch.cat([mine, other])", "torch.stack([mine, other], dim=1).flatten(0, 1)")],
        "the biases forgotten (Megatron-LM #346)": [
            (
                "zip(gate.parameters(), value.parameters(), expert.up.parameters())",
                "[(gate.weight, value.weight, expert.up.weight)]",
            ),
        ],
        "the bias of the gate twice": [
            ("torch.cat([mine, other])", "torch.cat([mine, other if mine.dim() > 1 else mine])")
        ],
        "the bias of `down` forgotten": [
            ("expert.down.load_state_dict(down.state_dict())", "expert.down.weight.copy_(down.weight)")
        ],
        "always swiglu": [("GatedExpert(C, F_, activation,", "GatedExpert(C, F_, 'swiglu',")],
        "always biases": [("bias=gate.bias is not None", "bias=True")],
        "always float32": [(".to(gate.weight)", "")],
        "not a copy": [("expert.down.load_state_dict(down.state_dict())", "expert.down = down")],
        "`down` the other way round where it fits": [
            (
                "expert.down.load_state_dict(down.state_dict())",
                "expert.down.load_state_dict(down.state_dict())\n        if C == F_:\n"
                "            expert.down.weight.copy_(down.weight.T)",
            )
        ],
        "weights that do not learn": [("    return expert", "    return expert.requires_grad_(False)")],
        "computed weights in place of parameters": [
            (
                "    return expert",
                "    up = torch.cat([gate.weight, value.weight])\n    del expert.up.weight\n"
                "    expert.up.weight = up\n    return expert",
            )
        ],
    },
}
