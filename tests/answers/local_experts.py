"Lesson 20. What goes wrong here: the blend, sums for means, underflow, gates of 0, gates and errors in wrong places."

COOPERATIVE = "def cooperative_loss(gates, answers, targets):\n"
RESPONSIBILITIES = "def responsibilities(gates, answers, targets):\n"
COMPETITIVE = "def competitive_loss(gates, answers, targets, mixture=True):\n"
FIT = "def weighted_fit(inputs, targets, weights):\n"

BLEND = "(gates.unsqueeze(-1) * answers).sum(dim=-2)"
SQUARE = "(targets - blend).square().sum(dim=-1).mean()"
JOINT = "log_joint(gates, answers, targets)"
ERRORS = "(targets.unsqueeze(-2) - answers).square().sum(dim=-1)"
EXPECTED = "(gates * errors).sum(dim=-1).mean()"
LSTSQ = 'torch.linalg.lstsq(root * inputs, root * targets, driver="gelsd").solution'
SQUARES, PRODUCTS = "(root * inputs).mT @ (root * inputs)", "(root * inputs).mT @ (root * targets)"

ANSWERS = {
    "cooperative_loss": {
        "right: einsum": COOPERATIVE
        + """
    blend = torch.einsum("...e,...ed->...d", gates, answers)
    return ((blend - targets) ** 2).sum(-1).mean()
""",
        "right: expert by expert": COOPERATIVE
        + """
    rest = targets
    for e in range(gates.shape[-1]):
        rest = rest - gates[..., e, None] * answers[..., e, :]
    return (rest * rest).sum() / targets[..., 0].numel()
""",
        "right: a product of matrices": COOPERATIVE
        + """
    blend = (gates.unsqueeze(-2) @ answers).squeeze(-2)
    return torch.linalg.vector_norm(targets - blend, dim=-1).pow(2).mean()
""",
        "a blend in log space (davidmrau/mixture-of-experts, issue 21)": [
            (BLEND, "(gates.unsqueeze(-1) * answers.exp()).sum(dim=-2).log()")
        ],
        "each expert by itself": [(SQUARE, f"(gates * {ERRORS}).sum(dim=-1).mean()")],
        "a plain average of the experts": [(BLEND, "answers.mean(dim=-2)")],
        "gates normalised again": [(BLEND, f"{BLEND} / gates.sum(dim=-1, keepdim=True)")],
        "mean over D": [(".sum(dim=-1).mean()", ".mean()")],
        "sum over the cases": [(".sum(dim=-1).mean()", ".sum()")],
        "the distance, not squared": [(SQUARE, "(targets - blend).square().sum(dim=-1).sqrt().mean()")],
        "gates cut off from the gradient": [("gates.unsqueeze", "gates.detach().unsqueeze")],
        "answers weighted in place": [(BLEND, "answers.mul_(gates.unsqueeze(-1)).sum(dim=-2)")],
        "a blend that begins on the CPU": COOPERATIVE
        + """
    blend = torch.zeros(targets.shape, dtype=targets.dtype)
    for e in range(gates.shape[-1]):
        blend = blend + gates[..., e, None] * answers[..., e, :]
    return (targets - blend).square().sum(dim=-1).mean()
""",
        "only (N, E)": [(BLEND, "(gates[:, :, None] * answers).sum(dim=1)")],
        "float32 only": [("targets - blend", "targets.float() - blend.float()")],
    },
    "responsibilities": {
        "right: the largest first": RESPONSIBILITIES
        + """
    squares = ((targets[..., None, :] - answers) ** 2).sum(-1)
    nearest = squares.masked_fill(gates == 0, float("inf")).amin(-1, keepdim=True).detach()
    likelihood = (-(squares - nearest) / 2).clamp(max=80).exp()
    weights = torch.where(gates > 0, gates * likelihood, 0.0)
    return weights / weights.sum(-1, keepdim=True)
""",
        "right: exp of log-softmax": RESPONSIBILITIES
        + """
    scores = log_joint(gates, answers, targets)
    return (scores - scores.logsumexp(dim=-1, keepdim=True)).exp()
""",
        "Bayes' rule as it stands, which underflows": RESPONSIBILITIES
        + """
    weights = gates * (-(targets.unsqueeze(-2) - answers).square().sum(dim=-1) / 2).exp()
    return weights / weights.sum(dim=-1, keepdim=True)
""",
        "with a small number in the denominator": RESPONSIBILITIES
        + """
    weights = gates * (-(targets.unsqueeze(-2) - answers).square().sum(dim=-1) / 2).exp()
    return weights / (weights.sum(dim=-1, keepdim=True) + 1e-8)
""",
        "the logarithm of a gate of 0": [(JOINT, f"(gates.log() - {ERRORS} / 2)")],
        "a small number instead of a gate of 0": [(JOINT, f"(gates.clamp(min=1e-8).log() - {ERRORS} / 2)")],
        "without the gates": [(JOINT, f"(-{ERRORS} / 2)")],
        "gates instead of their logarithm": [(JOINT, f"(gates - {ERRORS} / 2)")],
        "without the half": [(JOINT, f"({JOINT} - {ERRORS} / 2)")],
        "along the cases": [(".softmax(dim=-1)", ".softmax(dim=0)")],
        "gradient cut": [(JOINT, f"{JOINT}.detach()")],
        "along dimension 1": [(".softmax(dim=-1)", ".softmax(dim=1)")],
        "float32 only": [(JOINT, f"{JOINT}.float()")],
        "not a posterior: gate times likelihood": [(f"{JOINT}.softmax(dim=-1)", f"{JOINT}.exp()")],
    },
    "competitive_loss": {
        "right: the nearest first": COMPETITIVE
        + """
    squares = ((targets[..., None, :] - answers) ** 2).sum(-1)
    if not mixture:
        return torch.einsum("...e,...e->...", gates, squares).mean()
    low = squares.masked_fill(gates == 0, float("inf")).amin(-1, keepdim=True).detach()
    total = torch.where(gates > 0, gates * ((low - squares) / 2).clamp(max=80).exp(), 0.0).sum(-1)
    return (low.squeeze(-1) / 2 - total.log()).mean()
""",
        "right: expert by expert": COMPETITIVE
        + """
    if not mixture:
        each = [gates[..., e] * (targets - answers[..., e, :]).pow(2).sum(-1) for e in range(gates.shape[-1])]
        return sum(each).mean()
    return torch.logsumexp(log_joint(gates, answers, targets), -1).neg().mean()
""",
        "eq. 1.3 as it stands, plus 1e-8 (Kongdataif/MoE-toy-implementation)": [
            (f"-{JOINT}.logsumexp(dim=-1)", f"-((gates * (-{ERRORS} / 2).exp()).sum(dim=-1) + 1e-8).log()")
        ],
        "the logarithm of a gate of 0": [(JOINT, f"(gates.log() - {ERRORS} / 2)")],
        "eq. 1.2 by default": [("mixture=True", "mixture=False")],
        "a mixture of logarithms": [
            (f"-{JOINT}.logsumexp(dim=-1)", f"-(gates * {JOINT}.clamp(min=-1e30)).sum(dim=-1)")
        ],
        "with the constant of the Gaussian": [
            (f"{JOINT}.logsumexp(dim=-1).mean()", f"{JOINT}.logsumexp(dim=-1).mean() + 0.9189385 * answers.shape[-1]")
        ],
        "the sign forgotten": [(f"-{JOINT}", JOINT)],
        "mean over D": [(".square().sum(dim=-1)", ".square().mean(dim=-1)")],
        "mean over the experts": [(EXPECTED, "(gates * errors).mean()")],
        "the blend under eq. 1.2": [
            (EXPECTED, "(targets - (gates.unsqueeze(-1) * answers).sum(dim=-2)).square().sum(dim=-1).mean()")
        ],
        "sum over the cases": [(".logsumexp(dim=-1).mean()", ".logsumexp(dim=-1).sum()")],
        "gates cut off from the gradient": [(EXPECTED, EXPECTED.replace("gates", "gates.detach()"))],
        "the responsibilities as constant weights": COMPETITIVE
        + """
    errors = (targets.unsqueeze(-2) - answers).square().sum(dim=-1)
    weights = log_joint(gates, answers, targets).softmax(dim=-1).detach() / 2 if mixture else gates
    return (weights * errors).sum(dim=-1).mean()
""",
        "only (N, E)": [(ERRORS, "(targets[:, None] - answers).square().sum(dim=2)")],
        "float32 only": [(EXPECTED, EXPECTED.replace("errors", "errors.float()").replace("gates", "gates.float()"))],
    },
    "weighted_fit": {
        "right: normal equations": FIT
        + """
    weighed = weights.T.unsqueeze(-1).double() * inputs.double()  # (E, N, C)
    solved = torch.linalg.pinv(weighed.mT @ inputs.double()) @ (weighed.mT @ targets.double())
    return solved.to(inputs.dtype)
""",
        "right: expert by expert": FIT
        + """
    fits = []
    for column in weights.T:
        root = column.sqrt()[:, None]
        fits.append(torch.linalg.pinv(root * inputs) @ (root * targets))
    return torch.stack(fits)
""",
        "weights instead of their roots: they count twice": [("weights.T.sqrt()", "weights.T")],
        "only the inputs weighted": [("root * targets", "targets.expand(len(root), -1, -1)")],
        "no weights": [("weights.T.sqrt()", "torch.ones_like(weights.T)")],
        "weights made into zeros and ones": [("weights.T.sqrt()", "(weights.T > 0.5).to(inputs.dtype)")],
        "a ridge for safety": [
            (LSTSQ, f"torch.linalg.solve({SQUARES} + 1e-5 * torch.eye(inputs.shape[-1]), {PRODUCTS})")
        ],
        "a solver that fails where there is no weight": [
            (LSTSQ, f"torch.linalg.solve({SQUARES}, {PRODUCTS})")
        ],
        "transposed": [(".solution", ".solution.mT")],
        "weights normalised per case": [
            ("weights.T.sqrt()", "(weights / weights.sum(dim=-1, keepdim=True)).T.sqrt()")
        ],
        "inputs weighted in place": [("root * inputs", "inputs.mul_(root[0])")],
    },
}
