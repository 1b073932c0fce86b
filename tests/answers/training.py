"Lesson 11. What goes wrong here: the wrong text or mode, schedules off by one, loops that forget a part."

STARTS = "starts = torch.arange(count) * fit // count * T"
BACK = "    finally:\n        model.train(was_training)\n"
REFUSED = """    if fit < 1:
        raise ValueError(f"a text of {len(ids)} tokens is too short for a context of {T} and its next token")
"""

UP = "config.lr * (step + 1) / config.warmup"
DOWN = "return config.lr * (1 - done * (1 - config.final_lr))"

STATE = "state, losses, routings = state or TrainState(model, config), [], ()\n"
BEGAN = "began, lap_step, lap = time.perf_counter() - state.seconds, state.step, time.perf_counter()"
DUE = "due = state.step % config.eval_every == 0 or state.step >= config.steps"
FINITE = "            require_finite(losses, state.step, config)\n"
LAP = "            lap_step, lap = state.step, time.perf_counter()\n"
EVALUATE = "evaluate(model, train_ids, val_ids, config, routings)"
ZERO = "        state.optimizer.zero_grad()\n"
CLIP = "        state.clip(model.parameters(), config.clip)\n"
STEP = "        state.optimizer.step()\n"

PIECES = "zip(x.chunk(pieces), y.chunk(pieces))"

ANSWERS = {
    "estimate_loss": {
        "right: one context at a time, cross-entropy by hand": """
@torch.no_grad()
def estimate_loss(model, ids, batch_size=32, blocks=None):
    T, mode = model.config.block_size, model.training
    fit = (len(ids) - 1) // T
    if fit <= 0:
        raise ValueError(f"a text of {len(ids)} tokens is too short for a context of {T} and its next token")
    numbers = range(fit) if blocks is None or blocks > fit else [i * fit // blocks for i in range(blocks)]
    log_probs, loads = [], None
    try:
        model.train(False)
        for i in numbers:
            x, y = ids[i * T:(i + 1) * T], ids[i * T + 1:(i + 1) * T + 1]
            output = model(x[None])
            log_probs += output.logits[0].log_softmax(dim=-1)[torch.arange(T), y].tolist()
            counts = [routing.kept[0].sum(dim=0).tolist() for routing in output.routings]
            loads = counts if loads is None else [[a + b for a, b in zip(*rows)] for rows in zip(loads, counts)]
    finally:
        if mode:
            model.train()
    return -sum(log_probs) / len(log_probs), loads
""",
        "right: the text in rows of T, the sum of all losses": """
def estimate_loss(model, ids, batch_size=32, blocks=None):
    device, T = next(model.parameters()).device, model.config.block_size
    fit = (len(ids) - 1) // T
    if fit < 1:
        raise ValueError(f"a text of {len(ids)} tokens is too short for a context of {T} and its next token")
    count = fit if blocks is None else min(fit, blocks)
    rows = torch.tensor([i * fit // count for i in range(count)])
    inputs, targets = ids[:fit * T].view(fit, T)[rows], ids[1:fit * T + 1].view(fit, T)[rows]
    was_training, sums, load = model.training, [], []
    model.eval()
    try:
        with torch.no_grad():
            for x, y in zip(inputs.split(batch_size), targets.split(batch_size)):
                output = model(x.to(device), y.to(device))
                sums.append(output.lm_loss * y.numel())
                load.append(torch.stack([routing.load for routing in output.routings]))
    finally:
        model.train(was_training)
    return (sum(sums) / targets.numel()).item(), torch.stack(load).sum(dim=0).tolist()
""",
        "noise left on, and the random numbers put back": [
            ("    model.eval()\n", "    state = torch.get_rng_state()\n"),
            (BACK, BACK + "        torch.set_rng_state(state)\n"),
        ],
        "never back to training mode": [(BACK, "    finally:\n        pass\n")],
        "back to training mode unless it is interrupted": [
            ("    try:\n", "    if True:\n"),
            (BACK, "    model.train(was_training)\n"),
        ],
        "gradients kept": [("@torch.no_grad()\n", "")],
        "old gradients thrown away": [("    model.eval()\n", "    model.eval()\n    model.zero_grad()\n")],
        "random contexts": [(STARTS, "starts = torch.randint(fit, (count,)) * T")],
        "the first contexts instead of spread ones": [(STARTS, "starts = torch.arange(count) * T")],
        "the same contexts again if too many are asked for": [
            ("count = min(blocks or fit, fit)", "count = blocks or fit"),
        ],
        "the mean of the means": [
            ("output.lm_loss.item() * len(window)", "output.lm_loss.item()"),
            ("return total / count", "return total / len(windows.split(batch_size))"),
        ],
        "with the balance loss": [("output.lm_loss.item()", "output.loss.item()")],
        "a tensor instead of a number": [("output.lm_loss.item()", "output.lm_loss")],
        "all contexts at once": [("windows.split(batch_size)", "windows.split(len(windows))")],
        "what was chosen, dropped or not": [
            ("routing.load for", "routing.chosen.flatten(0, -2).sum(dim=0) for"),
        ],
        "the load of the last batch": [("load = load + torch", "load = torch")],
        "a text that is too short gives nan": [(REFUSED, "    if fit < 1:\n        return math.nan, []\n")],
    },
    "learning_rate": {
        "right: the way left, and a mixture of both ends": """
def learning_rate(step, config):
    if step + 1 <= config.warmup:
        return (step + 1) * (config.lr / config.warmup)
    left = (config.steps - step) / (config.steps - config.warmup)
    return left * config.lr + (1 - left) * config.final_lr * config.lr
""",
        "right: the lower of two lines": """
def learning_rate(step, config):
    up = (step + 1) / config.warmup if config.warmup else math.inf
    down = math.inf
    if step >= config.warmup:
        slope = (config.final_lr - 1) / (config.steps - config.warmup or 1)
        down = 1 + slope * (step - config.warmup)
    return config.lr * min(up, max(down, 1) if config.final_lr > 1 else down)
""",
        "the first step with rate 0": [("(step + 1) / config.warmup", "step / config.warmup")],
        "the top one step late": [("(step + 1) / config.warmup", "(step + 1) / (config.warmup + 1)")],
        "the way down ends a step early": [
            ("max(config.steps - config.warmup, 1)", "max(config.steps - 1 - config.warmup, 1)"),
        ],
        "the way down begins a step lower": [
            ("done = (step - config.warmup) /", "done = (step - config.warmup + 1) /")
        ],
        "the way down as if there was no warm-up": [
            ("(step - config.warmup) / max(config.steps - config.warmup, 1)", "step / config.steps"),
        ],
        "final_lr as a rate instead of a share": [(DOWN, "return config.lr - done * (config.lr - config.final_lr)")],
        "final_lr as the least": [(DOWN, "return config.lr * max(1 - done, config.final_lr)")],
        "no way down": [(DOWN, "return config.lr")],
        "half a cosine": [
            (
                DOWN,
                "height = (1 + math.cos(math.pi * done)) / 2\n"
                "    return config.lr * (config.final_lr + (1 - config.final_lr) * height)",
            ),
        ],
        "the warm-up squeezed into a short run": [
            ("    if step <", "    warmup = min(config.warmup, config.steps)\n    if step <"),
            ("< config.warmup", "< warmup"),
            (UP, "config.lr * (step + 1) / warmup"),
        ],
        "crashes without warm-up": [
            (
                "    if step < config.warmup:\n        return " + UP + "\n",
                "    up = " + UP + "\n    if step < config.warmup:\n        return up\n",
            ),
        ],
    },
    "train": {
        "right: a for loop, a function for each look": """
def train(model, train_ids, val_ids, config=TrainConfig(), on_step=None, on_eval=None, state=None):
    if state is None:
        state = TrainState(model, config)
    T, device, routings = model.config.block_size, next(model.parameters()).device, None
    spent, since, start = 0.0, state.step, time.perf_counter() - state.seconds

    def look():
        nonlocal spent, since
        at = state.step
        if (at % config.eval_every and at < config.steps) or any(record["step"] == at for record in state.history):
            return
        tokens = (at - since) * config.batch_size * T
        found = evaluate(model, train_ids, val_ids, config)
        require_finite([found["val_loss"] * found["train_loss"]], at + 1, config)
        found["step"], found["seconds"] = at, time.perf_counter() - start
        found["tokens_per_second"] = tokens / spent if spent else 0.0
        found["dropped"] = [r.dropped.item() for r in routings] if routings else [0.0 for _ in found["load"]]
        state.history.append(found)
        if on_eval is not None:
            on_eval(found)
        spent, since = 0.0, at

    look()
    for step in range(state.step, config.steps):
        if state.stop:
            break
        began = time.perf_counter()
        model.train()
        x, y = (t.to(device) for t in get_batch(train_ids, config.batch_size, T, state.order))
        with autocast(model):
            output = model(x, y)
        model.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        rate = learning_rate(step, config)
        for i in range(len(state.optimizer.param_groups)):
            state.optimizer.param_groups[i]["lr"] = rate
        state.optimizer.step()
        state.step, routings = step + 1, output.routings
        require_finite([output.loss.item()], step + 1, config)
        spent += time.perf_counter() - began
        state.seconds = time.perf_counter() - start
        if on_step is not None:
            on_step(state, output.loss.detach())
        look()
    model.train(False)
    return state.history
""",
        "right: the gradient cleared at the end, clipped by hand, losses read at every step": [
            (ZERO, ""),
            (STEP, STEP + "        model.zero_grad(set_to_none=True)\n"),
            (
                CLIP,
                """        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        length = torch.cat([g.flatten() for g in gradients]).norm()
        if length > config.clip:
            for g in gradients:
                g *= config.clip / length
""",
            ),
            ("len(losses) == 10", "len(losses) == 1"),
        ],
        "gradients never cleared": [(ZERO, "")],
        "each tensor clipped by itself": [
            (
                CLIP,
                "        for p in model.parameters():\n            torch.nn.utils.clip_grad_norm_(p, config.clip)\n",
            ),
        ],
        "the rate of the next step": [
            ("learning_rate(state.step, config)", "learning_rate(state.step + 1, config)"),
        ],
        "evaluation mode from the second evaluation on": [
            (LAP, LAP + "            if state.step:\n                model.eval()\n"),
        ],
        "no record at the end": [(DUE, "due = state.step % config.eval_every == 0")],
        "one record for all": [
            (
                "state.history.append(record)",
                "state.history.append(record)\n"
                "            for one in state.history:\n                one.update(record)",
            ),
        ],
        "errors of on_eval swallowed": [
            (
                "                on_eval(record)\n",
                "                try:\n                    on_eval(record)\n"
                "                except BaseException:\n                    pass\n",
            ),
        ],
        "seconds from the start of this call": [(BEGAN, BEGAN.replace(" - state.seconds", ""))],
        "the two texts swapped": [(EVALUATE, "evaluate(model, val_ids, train_ids, config, routings)")],
        "the order of the batches begins anew when it goes on": [
            (STATE, STATE + "    state.order.manual_seed(config.seed)\n"),
        ],
        "a record twice when it goes on": [
            ('if due and state.step not in [record["step"] for record in state.history[-1:]]:', "if due:"),
        ],
        "stop looked at only when a record is due": [
            ("if state.stop or state.step >=", "if due and state.stop or state.step >="),
        ],
        "without the balance loss": [("output.loss.backward()", "output.lm_loss.backward()")],
        "only the last loss looked at": [
            (FINITE, "            require_finite(losses[-1:], state.step, config)\n            losses = []\n")
        ],
        "speed with the evaluations": [(LAP, "            lap_step = state.step\n")],
    },
    "accumulate_gradients": {
        "right: autograd.grad, added up": """
def accumulate_gradients(model, x, y, pieces):
    weights = list(model.parameters())
    total = [torch.zeros_like(w) for w in weights]
    for ids, targets in zip(x.chunk(pieces), y.chunk(pieces)):
        share = ids.numel() / x.numel()
        for sum_so_far, gradient in zip(total, torch.autograd.grad(model(ids, targets).lm_loss, weights)):
            sum_so_far += share * gradient
    for weight, gradient in zip(weights, total):
        weight.grad = gradient
""",
        "right: gradients of sums, divided at the end": """
def accumulate_gradients(model, x, y, pieces):
    for p in model.parameters():
        p.grad = None
    size = -(-len(x) // pieces)
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        (model(x[part], y[part]).lm_loss * y[part].numel()).backward()
    for p in model.parameters():
        p.grad /= y.numel()
""",
        "in evaluation mode": [("    model.zero_grad()\n", "    model.zero_grad()\n    model.eval()\n")],
        "every piece counted alike": [("len(part_x) / len(x)", "1 / len(x.chunk(pieces))")],
        "the sum of the means": [("(loss * len(part_x) / len(x))", "loss")],
        "old gradients left in": [("    model.zero_grad()\n", "")],
        "cleared by hand, which crashes where there is none": [
            ("    model.zero_grad()\n", "    for p in model.parameters():\n        p.grad.zero_()\n"),
        ],
        "with the balance loss": [(".lm_loss", ".loss")],
        "the whole batch at once": [(PIECES, "[(x, y)]")],
        "pieces as equal as possible": [(PIECES, "zip(x.tensor_split(pieces), y.tensor_split(pieces))")],
        "all pieces forward, then all back": """
def accumulate_gradients(model, x, y, pieces):
    model.zero_grad()
    losses = [model(a, b).lm_loss * len(a) / len(x) for a, b in zip(x.chunk(pieces), y.chunk(pieces))]
    for loss in losses:
        loss.backward()
""",
        "a step for every piece": [
            (
                "/ len(x)).backward()",
                "/ len(x)).backward()\n        with torch.no_grad():\n"
                "            for p in model.parameters():\n                p -= 0.1 * p.grad",
            ),
        ],
    },
}
