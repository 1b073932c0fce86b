"Lesson 08. What goes wrong here: kept for chosen, gates for probabilities, k, the batch in front, gradients cut."

BALANCE = "def load_balancing_loss(routing):\n"
METRICS = "def routing_metrics(routing):\n"

CHOSEN = "routing.chosen.reshape"
P = "routing.probs.reshape(-1, E)"
DIVISOR = "E / f.sum()"
SUM = "(f * P).sum()"

GATES = "routing.gates.reshape("
CV2 = "importance.var(correction=0) / importance.mean() ** 2"

IMBALANCE = "imbalance([routing.load.tolist()])[0]"
DROPPED = "routing.dropped.item()"
CONFIDENCE = "routing.confidence.item()"
ENTROPY = "routing.entropy.item()"

ANSWERS = {
    "load_balancing_loss": {
        "right: expert by expert": BALANCE
        + """
    E = routing.logits.shape[-1]
    N = routing.logits[..., 0].numel()
    exponentials = (routing.logits - routing.logits.amax(dim=-1, keepdim=True)).exp()
    total, k = 0, 0
    for e in range(E):
        f = routing.chosen[..., e].sum().item() / N
        P = (exponentials[..., e] / exponentials.sum(dim=-1)).sum() / N
        total, k = total + f * P, k + f
    return total * E / k
""",
        "right: sums, and one division at the end": BALANCE
        + """
    chosen, probs = routing.chosen.flatten(0, -2), torch.softmax(routing.logits, dim=-1).flatten(0, -2)
    N, E = chosen.shape
    k = chosen.sum() / N
    counts = chosen.sum(dim=0).to(probs)
    return (counts * probs).sum() * E / (k * N * N)
""",
        "f from what was kept": [("routing.chosen", "routing.kept")],
        "f from the gates": [("routing.chosen", "routing.gates")],
        "f chosen again from the logits, without the noise": [
            (
                "routing.chosen",
                """torch.zeros_like(routing.chosen).scatter(
        -1, routing.logits.topk(int(routing.chosen.sum(-1).max()), dim=-1).indices, True)""",
            )
        ],
        "P in both places": [(SUM, "(f.sum() * P * P).sum()")],
        "P from the gates": [("routing.probs", "routing.gates")],
        "softmax of the softmax": [("routing.probs", "routing.probs.softmax(dim=-1)")],
        "gradient cut at P": [("    return", "    P = P.detach()\n    return")],
        "only the chosen get a gradient": [
            ("routing.probs", "torch.where(routing.chosen, routing.probs, routing.probs.detach())")
        ],
        "not divided by k": [(DIVISOR, "E")],
        "E and k of the lesson": [(DIVISOR, "4 / 2")],
        "multiplied token by token": [(SUM, "(routing.chosen * routing.probs).reshape(-1, E).sum(dim=-1).mean()")],
        "every sequence by itself": [
            (".reshape(-1, E).float().mean(dim=0)", ".float().mean(dim=-2)"),
            (".reshape(-1, E).mean(dim=0)", ".mean(dim=-2)"),
            (f"{DIVISOR} * {SUM}", "(E / f.sum(dim=-1) * (f * P).sum(dim=-1)).mean()"),
        ],
        "fair is 0": [("    return E", "    return -1 + E")],
        "a product of matrices, which autocast rounds": [(SUM, "(f @ P)")],
        "a plain number": [(SUM, "(f * P).sum().item()"), ("    return E", "    return 1.0 * E")],
    },
    "importance_loss": {
        "right: plain sums": """
def importance_loss(routing):
    E = routing.gates.shape[-1]
    importance = [routing.gates[..., e].sum() for e in range(E)]
    mean = sum(importance) / E
    return sum((number - mean) ** 2 for number in importance) / E / mean**2
""",
        "right: shares of the mean": """
def importance_loss(routing):
    share = routing.gates.flatten(0, -2).mean(dim=0)
    share = share / share.mean()
    return (share - 1).pow(2).mean()
""",
        "sample variance": [("correction=0", "correction=1")],
        "coefficient of variation, not squared": [(CV2, "importance.std(correction=0) / importance.mean()")],
        "variance over mean": [(" ** 2", "")],
        "the square of a square root: nan where all are equal": [
            (CV2, "((importance - importance.mean()).square().mean().sqrt() / importance.mean()).square()")
        ],
        "the mean cut off from the gradient": [("importance.mean() ** 2", "importance.mean().detach() ** 2")],
        "gradient cut": [(GATES, "routing.gates.detach().reshape(")],
        "importance of the probabilities": [(GATES, "routing.probs.reshape(")],
        "importance of the load": [
            ("routing.gates.reshape(-1, routing.gates.shape[-1]).sum(dim=0)", "routing.load.float()")
        ],
        "the first dimension only": [(".reshape(-1, routing.gates.shape[-1])", "")],
        "E of the lesson": [("routing.gates.shape[-1]", "4")],
        "gates of the dropped shared out again": [
            (GATES, "(routing.gates / routing.gates.sum(dim=-1, keepdim=True).clamp(min=1e-9)).reshape(")
        ],
    },
    "router_z_loss": {
        "right: largest first": """
def router_z_loss(routing):
    top = routing.logits.amax(dim=-1, keepdim=True).detach()
    z = (routing.logits - top).exp().sum(dim=-1).log() + top.squeeze(-1)
    return (z * z).mean()
""",
        "right: from the log-softmax": """
def router_z_loss(routing):
    z = (routing.logits - torch.log_softmax(routing.logits, dim=-1)).mean(dim=-1)
    return sum(number**2 for number in z.flatten()) / z.numel()
""",
        "as the formula stands, which overflows": [(".logsumexp(dim=-1)", ".exp().sum(dim=-1).log()")],
        "saved from underflow by a small number": [
            (".logsumexp(dim=-1)", ".double().exp().sum(dim=-1).add(1e-6).log().float()")
        ],
        "largest subtracted, and not added again": [
            (".logsumexp(dim=-1)", ".sub(routing.logits.amax(dim=-1, keepdim=True)).logsumexp(dim=-1)")
        ],
        "not squared": [(".square()", "")],
        "mean before the square": [(".square().mean()", ".mean().square()")],
        "sum over the tokens": [(".mean()", ".sum()")],
        "sum over a sequence, mean over the batch": [(".mean()", ".sum(dim=-1).mean()")],
        "along the tokens": [("dim=-1", "dim=0")],
        "of the probabilities": [("routing.logits", "routing.probs.log()")],
        "squares of the logits": [(".logsumexp(dim=-1)", "")],
        "the logits of the chosen alone": [
            ("routing.logits", "routing.logits.masked_fill(~routing.chosen, -torch.inf)")
        ],
        "gradient cut": [("routing.logits", "routing.logits.detach()")],
        "logits clipped at 50": [("routing.logits", "routing.logits.clamp(-50, 50)")],
        "with the coefficient in it": [("    return ", "    return 0.001 * ")],
    },
    "routing_metrics": {
        "right: counted token by token": METRICS
        + """
    E = routing.kept.shape[-1]
    kept, chosen = routing.kept.reshape(-1, E).tolist(), routing.chosen.reshape(-1, E).tolist()
    probs = routing.logits.detach().double().reshape(-1, E).softmax(dim=-1)
    load = [sum(row[e] for row in kept) for e in range(E)]
    wanted, carried = sum(map(sum, chosen)), sum(map(sum, kept))
    return {
        "imbalance": max(load) / (carried / E),
        "dropped": (wanted - carried) / wanted,
        "confidence": sum(max(row) for row in probs.tolist()) / len(probs),
        "entropy": torch.special.entr(probs).sum().item() / len(probs),
    }
""",
        "right: in another order": METRICS
        + """
    watch = {name: getattr(routing, name).item() for name in ("entropy", "confidence", "dropped")}
    watch["imbalance"] = float(routing.load.max() * len(routing.load) / routing.load.sum())
    return watch
""",
        "load of what was chosen": [
            ("routing.load.tolist()", "routing.chosen.reshape(-1, routing.chosen.shape[-1]).sum(dim=0).tolist()")
        ],
        "tensors": [(CONFIDENCE, "routing.confidence"), (ENTROPY, "routing.entropy")],
        "the loads of all layers asked, and one list given back": [(IMBALANCE, "imbalance([routing.load.tolist()])")],
        "largest share of the tokens": [(IMBALANCE, "(routing.load.max() / routing.load.sum()).item()")],
        "standard deviation over mean": [
            (IMBALANCE, "(routing.load.float().std() / routing.load.float().mean()).item()")
        ],
        "the mean over the experts that are used": [
            (IMBALANCE, "imbalance([[n for n in routing.load.tolist() if n]])[0]")
        ],
        "load over the first dimension only": [
            (IMBALANCE, "(routing.kept.float().sum(dim=0).max() / routing.kept.float().sum(dim=0).mean()).item()")
        ],
        "dropped as a count": [(DROPPED, "float((routing.chosen & ~routing.kept).sum())")],
        "dropped as a share of the tokens": [(DROPPED, "1 - routing.kept.any(dim=-1).float().mean().item()")],
        "confidence of kept tokens only": [(CONFIDENCE, "routing.probs.amax(-1)[routing.kept.any(-1)].mean().item()")],
        "confidence of the gates": [(CONFIDENCE, "routing.gates.amax(dim=-1).mean().item()")],
        "entropy in bits": [(ENTROPY, "routing.entropy.item() / 0.6931471805599453")],
        "entropy that is nan at a probability of 0": [
            (ENTROPY, "-(routing.probs * routing.probs.log()).sum(dim=-1).mean().item()")
        ],
        "one is missing": [(f"confidence={CONFIDENCE}, ", "")],
        "rounded for the eye": [(ENTROPY, f"round({ENTROPY}, 2)")],
    },
    "sequence_balancing_loss": {
        "right: sequence by sequence": """
def sequence_balancing_loss(routing):
    T, E = routing.logits.shape[-2:]
    rows = zip(*(getattr(routing, name).reshape(-1, T, E) for name in ("gates", "logits", "chosen", "kept")))
    return torch.stack([load_balancing_loss(type(routing)(*row)) for row in rows]).mean()
""",
        "right: one einsum": """
def sequence_balancing_loss(routing):
    T, E = routing.logits.shape[-2:]
    chosen = routing.chosen.reshape(-1, T, E).float()
    probs = routing.logits.softmax(dim=-1).reshape(-1, T, E)
    k = chosen.sum() / chosen[..., 0].numel()
    return E / k * torch.einsum("bte,bse->", chosen, probs) / T**2 / len(chosen)
""",
        "the batch pooled": [("    E = ", "    return load_balancing_loss(routing)\n    E = ")],
        "across the batch, position by position": [("dim=-2", "dim=0")],
        "f by sequence, P pooled": [("routing.probs.mean(dim=-2)", "routing.probs.reshape(-1, E).mean(dim=0)")],
        "f from what was kept": [("routing.chosen", "routing.kept")],
        "P from the gates": [("routing.probs", "routing.gates")],
        "not divided by k": [("E / f.sum(dim=-1)", "E")],
        "k summed over the sequences": [("f.sum(dim=-1)", "f.sum()")],
        "sum over the sequences": [(".sum(dim=-1)).mean()", ".sum(dim=-1)).sum()")],
        "one number a sequence": [(".sum(dim=-1)).mean()", ".sum(dim=-1))")],
        "works with a batch only": [("dim=-2", "dim=1")],
        "gradient cut": [("routing.probs", "routing.probs.detach()")],
    },
}
