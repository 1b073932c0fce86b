"Lesson 26. What goes wrong here: the wrong dimension, slots of what was normalised, orders mixed up, no slots at all."

BOTH = "return logits.softmax(dim=-2), logits.softmax(dim=-1)"
LOGITS = "return x @ phi  # (..., T, S)"
MIX = "dispatch, combine = soft_dispatch(self.logits(x))  # (..., T, S) each"
SLOTS = "slots = dispatch.to(x.dtype).mT @ x  # (..., S, C)"
PARTS = "slots.chunk(len(self.experts), dim=-2)"
ANSWERS_ = "answers = [expert(part) for expert, part in zip(self.experts, parts)]"
Y = "return (combine.to(answers.dtype) @ answers).to(x.dtype)"
GUARD = "with torch.autocast(x.device.type, enabled=False):"
REFUSED = "if num_experts < 1 or slots < 1:"
MASKED = "logits.masked_fill(~real[..., None], -torch.inf)"

INIT = """
class SoftMoE(nn.Module):
    causal = False

    def __init__(self, n_embd, num_experts, slots, n_hidden=None, activation="relu", bias=True, dropout=0.0,
                 normalize=True, scale=1.0):
        super().__init__()
        if num_experts < 1 or slots < 1:
            raise ValueError(f"num_experts is {num_experts} and slots is {slots}, but both must be at least 1")
        self.phi = nn.Parameter(torch.randn(n_embd, num_experts, slots) * n_embd**-0.5)
        self.scale = nn.Parameter(torch.full((1,), float(scale)))
        self.experts = Experts(num_experts, n_embd, n_hidden or 4 * n_embd, activation, bias, dropout)
        self.normalize = normalize
"""

ANSWERS = {
    "soft_dispatch": {
        "right: minus logsumexp": """
def soft_dispatch(logits):
    by_slot = logits.logsumexp(dim=-2, keepdim=True)
    by_token = logits.logsumexp(dim=-1, keepdim=True)
    return torch.exp(logits - by_slot), torch.exp(logits - by_token)
""",
        "right: turned, one softmax for both": """
def soft_dispatch(logits):
    def shares(matrix):
        return F.softmax(matrix, dim=-1)
    return shares(logits.transpose(-1, -2)).transpose(-1, -2), shares(logits)
""",
        "in the other order": [(BOTH, "return logits.softmax(dim=-1), logits.softmax(dim=-2)")],
        "the softmax over the batch, as fkodom's package had it": [("logits.softmax(dim=-2)", "logits.softmax(dim=0)")],
        "a batch is needed in front": [("dim=-2", "dim=1")],
        "one softmax over everything": [
            (BOTH, "shares = logits.flatten(-2).softmax(dim=-1).view_as(logits)\n    return shares, shares")
        ],
        "the combine weights in both places": [("dim=-2", "dim=-1")],
        "dispatch turned, slots first": [("logits.softmax(dim=-2)", "logits.softmax(dim=-2).mT")],
        "a temperature, as in attention": [
            ("    return", "    logits = logits * logits.shape[-1] ** -0.5\n    return")
        ],
        "exp by hand": [
            (
                "    return logits.softmax(dim=-2), logits.softmax(dim=-1)",
                """    shares = logits.exp()
    return shares / shares.sum(dim=-2, keepdim=True), shares / shares.sum(dim=-1, keepdim=True)""",
            )
        ],
        "dispatch without a gradient": [("logits.softmax(dim=-2)", "logits.detach().softmax(dim=-2)")],
        "only the best slot answers": [
            (
                "logits.softmax(dim=-1)",
                "torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0) * logits.softmax(-1)",
            )
        ],
        "always float32": [("logits.softmax(dim=-1)", "logits.softmax(dim=-1, dtype=torch.float32)")],
        "the logits shifted in place": [("    return", "    logits -= logits.max().item()\n    return")],
        "a list": [(BOTH, "return [logits.softmax(dim=-2), logits.softmax(dim=-1)]")],
    },
    "soft_moe": {
        "right: einsum, experts and slots as dimensions": INIT
        + """
    def logits(self, x):
        with torch.autocast(x.device.type, enabled=False):
            phi, x = self.phi.float(), x.float()
            if self.normalize:
                phi = phi / phi.norm(dim=0, keepdim=True) * self.scale.float()
                x = x / x.norm(dim=-1, keepdim=True)
            return torch.einsum("...td,dep->...tep", x, phi).flatten(-2)

    def forward(self, x):
        logits = self.logits(x)
        dispatch, combine = (m.unflatten(-1, self.phi.shape[1:]).to(x.dtype) for m in soft_dispatch(logits))
        slots = torch.einsum("...tep,...td->...epd", dispatch, x)
        answers = torch.stack([f(slots[..., e, :, :]) for e, f in enumerate(self.experts)], dim=-3)
        return torch.einsum("...tep,...epd->...td", combine.to(answers.dtype), answers).to(x.dtype)
""",
        "right: the answers added expert by expert": INIT
        + """
    def logits(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x, phi = x.float(), self.phi.float().reshape(x.shape[-1], -1)
            if not self.normalize:
                return torch.matmul(x, phi)
            return self.scale.float() * (F.normalize(x, dim=-1) @ F.normalize(phi, dim=0))

    def forward(self, x):
        dispatch, combine = soft_dispatch(self.logits(x))
        P, y = self.phi.shape[-1], 0
        for e, expert in enumerate(self.experts):
            mine = slice(e * P, (e + 1) * P)
            answer = expert(dispatch[..., mine].to(x).mT @ x)
            y = y + combine[..., mine].to(answer) @ answer
        return y.to(x)
""",
        "slots of normalised tokens, as in the package soft-moe": [
            (SLOTS, "slots = dispatch.to(x.dtype).mT @ (F.normalize(x, dim=-1) if self.normalize else x)")
        ],
        "no slots, no message, as in soft-moe-pytorch": [(REFUSED, "if num_experts < 1:")],
        "the whole batch in one sequence": [
            (
                "def forward(self, x):",
                "def forward(self, x, flat=None):\n        shape, x = x.shape, x.reshape(-1, x.shape[-1])",
            ),
            (Y, Y.replace(".to(x.dtype)", ".to(x.dtype).view(shape)")),
        ],
        "columns not normalised": [("F.normalize(phi, dim=0, eps=1e-6)", "phi")],
        "columns normalised over the slots": [("F.normalize(phi, dim=0", "F.normalize(phi, dim=-1")],
        "no scale": [("self.scale.float() * F", "F")],
        "always normalised": [("if self.normalize:", "if True:")],
        "every E-th slot to an expert": [
            (PARTS, "[slots[..., e :: len(self.experts), :] for e in range(len(self.experts))]")
        ],
        "experts on the tokens: a dense mixture": [
            (
                ANSWERS_,
                """shares = dispatch.to(x.dtype).mT.chunk(len(self.experts), dim=-2)
        answers = [share @ expert(x) for share, expert in zip(shares, self.experts)]""",
            )
        ],
        "the residual added here": [(Y, Y.replace("return ", "return x + "))],
        "dispatch without a gradient": [(MIX, MIX.split("  #")[0] + "\n        dispatch = dispatch.detach()")],
        "scores in bfloat16 under autocast": [(GUARD, "if True:")],
        "no gradient in evaluation mode": [
            (MIX, "dispatch, combine = (m if self.training else m.detach() for m in soft_dispatch(self.logits(x)))")
        ],
        "y in the type of the scores": [
            ("dispatch.to(x.dtype).mT", "dispatch.mT"),
            ("@ x  # (..., S, C)", "@ x.float()"),
            ("expert(part)", "expert(part.to(x.dtype)).float()"),
            (Y, "return combine @ answers"),
        ],
    },
    "padded_dispatch": {
        "right: masked afterwards, and divided again": """
def padded_dispatch(logits, real):
    best = logits.masked_fill(~real.unsqueeze(-1), -torch.inf).amax(dim=-2, keepdim=True).detach()
    shares = torch.where(real.unsqueeze(-1), logits - best, -torch.inf).exp()
    return shares / shares.sum(dim=-2, keepdim=True), logits.softmax(dim=-1)
""",
        "right: torch.where, and a very large number": """
def padded_dispatch(logits, real):
    lowest = torch.finfo(logits.dtype).min
    masked = torch.where(real[..., None].expand_as(logits), logits, lowest)
    return masked.softmax(-2), logits.softmax(-1)
""",
        "masked in both: rows of nan": [
            (", _ = soft_dispatch", ", combine = soft_dispatch"),
            ("soft_dispatch(logits)[1]", "combine"),
        ],
        "no mask": [(MASKED, "logits")],
        "the mask turned round": [("~real", "real")],
        "padding gets the score 0": [(MASKED, "logits * real[..., None]")],
        "masked afterwards, not divided again": [
            (
                f"dispatch, _ = soft_dispatch({MASKED})",
                "dispatch = soft_dispatch(logits)[0] * real[..., None]",
            )
        ],
        "minus 1000 is not enough": [("-torch.inf", "-1000.0")],
        "a fixed number added": [(MASKED, "logits - 1e4 * (~real[..., None]).float()")],
        "masked in place": [("logits.masked_fill(", "logits.data.masked_fill_(")],
        "masked for tokens, and padding keeps its share": [
            ("return dispatch,", "return torch.where(real[..., None], dispatch, soft_dispatch(logits)[0]),")
        ],
        "no gradient": [("    dispatch, _ =", "    logits = logits.detach()\n    dispatch, _ =")],
        "a batch is needed in front": [("real[..., None]", "real[:, :, None]")],
    },
}
