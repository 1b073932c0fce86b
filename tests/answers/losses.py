"What learners hand in for lesson 08."

BALANCE = "def load_balancing_loss(routing):\n"
METRICS = "def routing_metrics(routing):\n"

ANSWERS = {
    "losses-load-balancing": {
        "right: expert by expert": BALANCE + '''
    E = routing.logits.shape[-1]
    N = routing.logits[..., 0].numel()
    exponentials = (routing.logits - routing.logits.amax(dim=-1, keepdim=True)).exp()
    total, k = 0, 0
    for e in range(E):
        f = routing.chosen[..., e].sum().item() / N
        P = (exponentials[..., e] / exponentials.sum(dim=-1)).sum() / N
        total, k = total + f * P, k + f
    return total * E / k
''',
        "right: sums, and one division at the end": BALANCE + '''
    chosen, probs = routing.chosen.flatten(0, -2), torch.softmax(routing.logits, dim=-1).flatten(0, -2)
    N, E = chosen.shape
    k = chosen.sum() / N
    counts = chosen.sum(dim=0).to(probs)
    return (counts * probs).sum() * E / (k * N * N)
''',
        "right: a mean over everything but the experts": BALANCE + '''
    tokens = tuple(range(routing.logits.dim() - 1))
    f = routing.chosen.to(routing.logits.dtype).mean(dim=tokens)
    P = routing.logits.log_softmax(dim=-1).exp().mean(dim=tokens)
    return torch.dot((f / f.mean()).double(), P.double()).to(P.dtype)
''',
        "f from what was kept": [("routing.chosen", "routing.kept")],
        "f from the gates that are not 0": [("routing.chosen", "(routing.gates > 0)")],
        "f from the gates": [("routing.chosen", "routing.gates")],
        "f from the first choice alone": [("routing.chosen", "torch.zeros_like(routing.chosen).scatter(-1, routing.gates.argmax(-1, keepdim=True), True)")],
        "f chosen again from the clean logits": [("routing.chosen", '''torch.zeros_like(routing.chosen).scatter(
        -1, routing.logits.topk(int(routing.chosen.sum(-1).max()), dim=-1).indices, True)''')],
        "P in both places": [("(f * P)", "(f.sum() * P * P)")],
        "f in both places": [("(f * P)", "(f * f / f.sum())")],
        "softmax of the softmax": [("routing.probs", "routing.probs.softmax(dim=-1)")],
        "softmax of the gates": [("routing.probs", "routing.gates.softmax(dim=-1)")],
        "P from the gates": [("routing.probs", "routing.gates")],
        "P from the probabilities of the chosen": [("routing.probs", "(routing.probs * routing.chosen)")],
        "softmax over the tokens": [("routing.probs.reshape(-1, E)", "routing.logits.reshape(-1, E).softmax(dim=0)")],
        "softmax of the mean logits": [("routing.probs.reshape(-1, E).mean(dim=0)", "routing.logits.reshape(-1, E).mean(dim=0).softmax(dim=-1)")],
        "sigmoid for softmax": [("routing.probs", "routing.logits.sigmoid()")],
        "gradient cut at P": [("    return", "    P = P.detach()\n    return")],
        "made anew from a number": [("return E / f.sum() * (f * P).sum()", "return torch.tensor((E / f.sum() * (f * P).sum()).item(), requires_grad=True)")],
        "not divided by k": [("E / f.sum()", "E")],
        "divided by k of the lesson": [("E / f.sum()", "E / 2")],
        "E of the lesson": [("    return E", "    return 4")],
        "not times E": [("E / f.sum()", "1 / f.sum()")],
        "times E twice": [("E / f.sum()", "E * E / f.sum()")],
        "the mean of the products for their sum": [("(f * P).sum()", "(f * P).mean()")],
        "multiplied token by token": [("(f * P).sum()", "(routing.chosen * routing.probs).sum(dim=-1).mean()")],
        "counted over the first dimension only": [(".reshape(-1, E)", "")],
        "every sequence by itself": [(".reshape(-1, E).float().mean(dim=0)", ".float().mean(dim=-2)"), (".reshape(-1, E).mean(dim=0)", ".mean(dim=-2)"),
                                     ("E / f.sum() * (f * P).sum()", "(E / f.sum(dim=-1) * (f * P).sum(dim=-1)).mean()")],
        "fair is 0": [("(f * P).sum()", "(f * P).sum() - 1")],
        "squared distance from an equal share": [("(f * P).sum()", "((P - 1 / E) ** 2).sum() + 1")],
        "rewards the favourite": [("    return", "    return 2 -")],
        "a product of matrices, which autocast rounds": [("(f * P).sum()", "(f @ P)")],
        "integers for shares": [(".float().mean(dim=0)", ".sum(dim=0) // len(routing.chosen.reshape(-1, E))")],
        "P rounded to float16": [("routing.probs.reshape(-1, E)", "routing.probs.reshape(-1, E).half()")],
        "a number for each expert": [("(f * P).sum()", "(f * P)")],
    },
    "losses-importance": {
        "right: plain sums": '''
def importance_loss(routing):
    E = routing.gates.shape[-1]
    importance = [routing.gates[..., e].sum() for e in range(E)]
    mean = sum(importance) / E
    return sum((number - mean) ** 2 for number in importance) / E / mean**2
''',
        "right: mean of the squares less one": '''
def importance_loss(routing):
    share = routing.gates.flatten(0, -2).mean(dim=0)
    share = share / share.mean()
    return (share - 1).pow(2).mean()
''',
        "sample variance": [("correction=0", "correction=1")],
        "coefficient of variation, not squared": [("importance.var(correction=0) / importance.mean() ** 2", "importance.std(correction=0) / importance.mean()")],
        "variance over mean": [(" ** 2", "")],
        "variance alone": [(" / importance.mean() ** 2", "")],
        "mean over standard deviation": [("importance.var(correction=0) / importance.mean() ** 2", "importance.mean() ** 2 / (importance.var(correction=0) + 1e-10)")],
        "squares of the deviations not averaged": [("importance.var(correction=0)", "(importance - importance.mean()).square().sum()")],
        "importance of the probabilities": [("routing.gates.reshape", "routing.probs.reshape")],
        "importance of the load": [("routing.gates.reshape(-1, routing.gates.shape[-1]).sum(dim=0)", "routing.load.float()")],
        "the wishes counted": [("routing.gates.reshape(", "routing.chosen.float().reshape(")],
        "over the experts of each token": [("importance.var(correction=0) / importance.mean() ** 2",
                                            "(routing.gates.var(dim=-1, correction=0) / routing.gates.mean(dim=-1) ** 2).mean()")],
        "the first dimension only": [(".reshape(-1, routing.gates.shape[-1])", "")],
        "every sequence by itself": [("    return", "    importance = routing.gates.sum(dim=-2)\n    return (importance.var(dim=-1, correction=0) / importance.mean(dim=-1) ** 2).mean()\n    return")],
        "gradient cut": [("routing.gates.reshape", "routing.gates.detach().reshape")],
        "E of the lesson": [("routing.gates.shape[-1]", "4")],
        "gates of the dropped made up again": [("routing.gates.reshape(", "(routing.gates / routing.gates.sum(dim=-1, keepdim=True).clamp(min=1e-9)).reshape(")],
        "a softmax of the logits that were chosen": [("routing.gates.reshape(", "routing.logits.masked_fill(~routing.chosen, -1e9).softmax(-1).reshape(")],
    },
    "losses-z": {
        "right: largest first": '''
def router_z_loss(routing):
    top = routing.logits.amax(dim=-1, keepdim=True).detach()
    z = (routing.logits - top).exp().sum(dim=-1).log() + top.squeeze(-1)
    return (z * z).mean()
''',
        "right: from the log-softmax": '''
def router_z_loss(routing):
    z = (routing.logits - torch.log_softmax(routing.logits, dim=-1))[..., 0]
    return sum(number**2 for number in z.flatten()) / z.numel()
''',
        "as the formula stands, which overflows": [(".logsumexp(dim=-1)", ".exp().sum(dim=-1).log()")],
        "saved from overflow by a limit": [(".logsumexp(dim=-1)", ".clamp(max=80).exp().sum(dim=-1).log()")],
        "saved from overflow by nan_to_num": [(".logsumexp(dim=-1)", ".exp().sum(dim=-1).log().nan_to_num(posinf=1e4)")],
        "saved from underflow by a small number": [(".logsumexp(dim=-1)", ".double().exp().sum(dim=-1).add(1e-6).log().float()")],
        "computed in double precision, and overflows later": [(".logsumexp(dim=-1)", ".double().exp().sum(dim=-1).log()")],
        "largest subtracted, and not added again": [(".logsumexp(dim=-1)", ".sub(routing.logits.amax(dim=-1, keepdim=True)).logsumexp(dim=-1)")],
        "not squared": [(".square()", "")],
        "absolute value": [(".square()", ".abs()")],
        "mean before the square": [(".square().mean()", ".mean().square()")],
        "sum over the tokens": [(".mean()", ".sum()")],
        "sum over a sequence, mean over the batch": [(".mean()", ".sum(dim=-1).mean()")],
        "along the tokens": [("dim=-1", "dim=0")],
        "all logits in one sum": [("routing.logits.logsumexp(dim=-1)", "routing.logits.flatten().logsumexp(dim=-1)")],
        "of the probabilities": [("routing.logits", "routing.probs.log()")],
        "of the log of the gates": [("routing.logits", "routing.gates.clamp(min=1e-9).log()")],
        "squares of the logits": [(".logsumexp(dim=-1)", "")],
        "the largest logit alone": [("logsumexp", "amax")],
        "the logits of the chosen alone": [("routing.logits", "routing.logits.masked_fill(~routing.chosen, -torch.inf)")],
        "logits without their common part": [("routing.logits", "(routing.logits - routing.logits.mean(dim=-1, keepdim=True))")],
        "gradient cut": [("routing.logits", "routing.logits.detach()")],
        "with the coefficient in it": [("    return ", "    return 0.001 * ")],
    },
    "losses-metrics": {
        "right: counted token by token": METRICS + '''
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
''',
        "right: in another order": METRICS + '''
    watch = {name: float(getattr(routing, name)) for name in ("entropy", "confidence", "dropped")}
    watch["imbalance"] = float(routing.load.max() * len(routing.load) / routing.load.sum())
    return watch
''',
        "load of what was chosen": [("routing.load.float()", "routing.chosen.reshape(-1, routing.chosen.shape[-1]).sum(dim=0).float()")],
        "tensors": [("value.item()", "value")],
        "largest over smallest": [("load.mean()", "load.min().clamp(min=1e-9)")],
        "largest share of the tokens": [("load.max() / load.mean()", "load.max() / load.sum()")],
        "standard deviation over mean": [("load.max()", "load.std()")],
        "the mean over the experts that are used": [("load.mean()", "load[load > 0].mean()")],
        "the loss for the imbalance": [("load.max() / load.mean()", "load.square().mean() / load.mean() ** 2")],
        "load over the first dimension only": [("routing.load.float()", "routing.kept.float().sum(dim=0)")],
        "load of the gates": [("routing.load.float()", "routing.gates.reshape(-1, routing.gates.shape[-1]).sum(dim=0)")],
        "dropped as a count": [("dropped=routing.dropped", "dropped=(routing.chosen & ~routing.kept).sum().float()")],
        "dropped as a share of all places": [("dropped=routing.dropped", "dropped=(routing.chosen & ~routing.kept).float().mean()")],
        "dropped as a share of the tokens": [("dropped=routing.dropped", "dropped=1 - routing.kept.any(dim=-1).float().mean()")],
        "kept instead of dropped": [("dropped=routing.dropped", "dropped=1 - routing.dropped")],
        "confidence of the gates": [("confidence=routing.confidence", "confidence=routing.gates.amax(dim=-1).mean()")],
        "confidence and entropy exchanged": [("confidence=routing.confidence, entropy=routing.entropy", "confidence=routing.entropy, entropy=routing.confidence")],
        "entropy in bits": [("entropy=routing.entropy", "entropy=routing.entropy / 0.6931471805599453")],
        "entropy of the load": [("entropy=routing.entropy", "entropy=torch.special.entr(load / load.sum()).sum()")],
        "entropy that dies of a probability of 0": [("entropy=routing.entropy", "entropy=-(routing.probs * routing.probs.log()).sum(dim=-1).mean()")],
        "confidence of the whole batch": [("confidence=routing.confidence", "confidence=routing.probs.amax()")],
        "one is missing": [("confidence=routing.confidence, ", "")],
        "rounded for the eye": [("value.item()", "round(value.item(), 2)")],
    },
    "losses-gini": {
        "right: two loops": '''
def gini(load):
    numbers = load.tolist()
    total = sum(abs(mine - theirs) for mine in numbers for theirs in numbers)
    return total / (2 * len(numbers) * sum(numbers))
''',
        "right: sorted, with ranks for weights": '''
def gini(load):
    E, numbers = len(load), load.double().sort().values
    weights = 2 * torch.arange(1, E + 1) - E - 1
    return float((weights * numbers).sum() / (E * numbers.sum()))
''',
        "every pair once, and the 2 too": [("(load[:, None] - load[None, :]).abs().sum()", "(load[:, None] - load[None, :]).clamp(min=0).sum()")],
        "no 2": [("2 * len(load)", "len(load)")],
        "no absolute value": [(".abs()", "")],
        "squares": [(".abs()", ".square()")],
        "neighbours only": [("(load[:, None] - load[None, :])", "load.diff()")],
        "E twice": [("len(load) *", "len(load) ** 2 *")],
        "E left out": [("2 * len(load) *", "2 *")],
        "lifted so that the worst is 1": [("len(load) *", "(len(load) - 1) *")],
        "distance from the mean": [("(load[:, None] - load[None, :])", "(2 * (load - load.mean()))")],
        "the largest for the total": [("load.sum()", "load.max()")],
        "one less the mean over the largest": [("return (differences / (2 * len(load) * load.sum()))", "return (1 - load.mean() / load.max())")],
        "a tensor": [(".item()", "")],
        "E of the lesson": [("len(load)", "4")],
        "half precision": [("load.float()", "load.half()")],
    },
    "losses-sequence": {
        "right: sequence by sequence": '''
def sequence_balancing_loss(routing):
    T, E = routing.logits.shape[-2:]
    rows = zip(*(getattr(routing, name).reshape(-1, T, E) for name in ("gates", "logits", "chosen", "kept")))
    return torch.stack([load_balancing_loss(Routing(*row)) for row in rows]).mean()
''',
        "right: one einsum": '''
def sequence_balancing_loss(routing):
    T, E = routing.logits.shape[-2:]
    chosen = routing.chosen.reshape(-1, T, E).float()
    probs = routing.logits.softmax(dim=-1).reshape(-1, T, E)
    k = chosen.sum() / chosen[..., 0].numel()
    return E / k * torch.einsum("bte,bse->", chosen, probs) / T**2 / len(chosen)
''',
        "the batch pooled": [("    E = ", "    return load_balancing_loss(routing)\n    E = ")],
        "across the batch, position by position": [("dim=-2", "dim=0")],
        "f by sequence, P pooled": [("routing.probs.mean(dim=-2)", "routing.probs.reshape(-1, E).mean(dim=0)")],
        "P by sequence, f pooled": [("routing.chosen.float().mean(dim=-2)", "routing.chosen.float().reshape(-1, E).mean(dim=0)")],
        "f from what was kept": [("routing.chosen", "routing.kept")],
        "P from the gates": [("routing.probs", "routing.gates")],
        "not divided by k": [("E / f.sum(dim=-1)", "E")],
        "divided by k of the lesson": [("E / f.sum(dim=-1)", "E / 2")],
        "k summed over the sequences": [("f.sum(dim=-1)", "f.sum()")],
        "sum over the sequences": [(".mean()\n", ".sum()\n")],
        "the worst sequence": [(".mean()\n", ".max()\n")],
        "one number a sequence": [(".mean()\n", "\n")],
        "works with a batch only": [("dim=-2", "dim=1")],
        "token by token": [("(f * P).sum(dim=-1)", "(routing.chosen * routing.probs).sum(dim=-1).mean(dim=-1)")],
        "gradient cut": [("routing.probs", "routing.probs.detach()")],
    },
    "losses-smooth-load": {
        "right: expert by expert": '''
def smooth_load(logits, noisy, deviation, k):
    loads = []
    for e in range(logits.shape[-1]):
        others = torch.cat([noisy[..., :e], noisy[..., e + 1:]], dim=-1)
        hurdle = others.sort(dim=-1, descending=True).values[..., k - 1]
        normal = torch.distributions.Normal(logits[..., e], deviation[..., e])
        loads.append((1 - normal.cdf(hurdle)).sum())
    return torch.stack(loads)
''',
        "right: oneself struck out": '''
def smooth_load(logits, noisy, deviation, k):
    E = logits.shape[-1]
    others = noisy[..., None, :].expand(*noisy.shape, E).masked_fill(torch.eye(E, dtype=torch.bool), -torch.inf)
    hurdle = others.topk(k, dim=-1).values.amin(dim=-1)
    z = (logits - hurdle) / deviation
    return (0.5 * (1 + torch.erf(z / 2**0.5))).flatten(0, -2).sum(dim=0)
''',
        "oneself among the others": [("torch.where(noisy > first_out, first_out, last_in)", "last_in")],
        "always the first who is out": [("torch.where(noisy > first_out, first_out, last_in)", "first_out")],
        "in and out exchanged": [("first_out, last_in)", "last_in, first_out)")],
        "noisy scores above the hurdle": [("logits - hurdle", "noisy - hurdle")],
        "hurdle of the clean scores": [("best = noisy", "best = logits"), ("noisy > first_out", "logits > first_out")],
        "who is in, by the clean scores": [("noisy > first_out", "logits > first_out")],
        "noise not divided by its deviation": [(") / deviation)", "))")],
        "divided by the variance": [("/ deviation)", "/ deviation**2)")],
        "multiplied by the deviation": [("/ deviation)", "* deviation)")],
        "one deviation for all": [("/ deviation)", "/ deviation.mean())")],
        "sigmoid for the normal distribution": [("torch.special.ndtr", "torch.sigmoid")],
        "density for distribution": [("torch.special.ndtr((logits - hurdle) / deviation)", "(-((logits - hurdle) / deviation) ** 2 / 2).exp() / (2 * torch.pi) ** 0.5")],
        "probability to be left out": [("(logits - hurdle)", "(hurdle - logits)")],
        "the plain load": [("    return", "    return top_k_gating(noisy, k).load.float()\n    return")],
        "mean over the tokens": [("probability.reshape(-1, logits.shape[-1]).sum(dim=0)", "probability.reshape(-1, logits.shape[-1]).mean(dim=0)")],
        "the first dimension only": [(".reshape(-1, logits.shape[-1])", "")],
        "k of the lesson": [("    best = ", "    k = 2\n    best = ")],
        "gradient cut": [("(logits - hurdle)", "(logits.detach() - hurdle.detach())")],
        "gradient through a count": [("torch.special.ndtr((logits - hurdle) / deviation)", "(logits > hurdle).float() + 0 * logits")],
    },
}
