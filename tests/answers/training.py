"Lesson 11: losses measured on the wrong text or in the wrong mode, schedules that are off by one, loops that forget or repeat a part."

COUNT = "count = min(blocks or fit, fit)"
STARTS = "starts = torch.arange(count) * fit // count * T"
FIT = "fit = (len(ids) - 1) // T"
TOTAL = "total += output.lm_loss.item() * len(window)"
LOAD = "load = load + torch.stack([routing.load for routing in output.routings])"
BACK = "    finally:\n        model.train(was_training)\n"
MEASURED = "return total / count, load.tolist()"
REFUSED = '''    if fit < 1:
        raise ValueError(f"a text of {len(ids)} tokens is too short for a block of {T} "
                         "and its next token")
'''

UP = "config.lr * (step + 1) / config.warmup"
DONE = "done = (step - config.warmup) / max(config.steps - config.warmup, 1)"
DOWN = "return config.lr * (1 - done * (1 - config.final_lr))"

STATE = "state = state or TrainingState(model, config)"
DUE = "due = state.step % config.eval_every == 0 or state.step == config.steps"
NEW = 'if due and state.step not in [record["step"] for record in state.history]:'
EVALUATE = "state.evaluate(train_ids, val_ids, speed)"
ON_EVAL = "                    if on_eval:\n                        on_eval(state.history[-1])\n"
LAP = "                    lap_step, lap = state.step, time.perf_counter()\n"
STOP = "            if state.stop or state.step == config.steps:\n                break\n"
RATE = '            for group in state.optimizer.param_groups:\n                group["lr"] = learning_rate(state.step, config)\n'
BATCH = "x, y = get_batch(train_ids, config.batch_size, T, state.order)"
ZERO = "            state.optimizer.zero_grad()\n"
BACKWARD = "            output.loss.backward()\n"
CLIP = ("            if config.clip < math.inf:\n"
        "                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)\n")
STEP = "            state.optimizer.step()\n"
ROUTINGS = "            state.routings = output.routings\n"
LAST_LOOK = "    state.read_losses()  # those of the last steps must be finite, too\n"
END = "    model.eval()\n    return state.history"

HEIGHT = "height = (1 + math.cos(math.pi * done)) / 2"
CURVED = "return config.lr * (config.final_lr + (1 - config.final_lr) * height)"

PIECES = "zip(x.chunk(pieces), y.chunk(pieces))"
PIECE_BACK = "(loss * len(part_x) / len(x)).backward()"

LERP = "mean.lerp_(p, 1 - self.decay)"
COPY = "p.copy_(mean / (1 - self.decay**self.updates))"
MEANS = "self.means = [torch.zeros_like(p) for p in model.parameters()]"

ANSWERS = {
    "training-estimate-loss": {
        "right: one block at a time, cross-entropy by hand": '''
@torch.no_grad()
def estimate_loss(model, ids, batch_size=32, blocks=None):
    T, mode = model.config.block_size, model.training
    fit = (len(ids) - 1) // T
    if fit <= 0:
        raise ValueError(f"a text of {len(ids)} tokens is too short for a block of {T} and its next token")
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
''',
        "right: the stream in rows of T, the sum of all losses": '''
def estimate_loss(model, ids, batch_size=32, blocks=None):
    device, T = next(model.parameters()).device, model.config.block_size
    fit = (len(ids) - 1) // T
    if fit < 1:
        raise ValueError(f"a text of {len(ids)} tokens is too short for a block of {T} and its next token")
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
''',
        "evaluation mode forgotten": [("    model.eval()\n", "")],
        "evaluation mode for the top module alone": [("    model.eval()\n", "    model.training = False\n")],
        "noise left on, and the random numbers put back": [("    model.eval()\n", "    state = torch.get_rng_state()\n"), (BACK, BACK + "        torch.set_rng_state(state)\n")],
        "never back to training mode": [(BACK, "    finally:\n        pass\n")],
        "always back to training mode": [("model.train(was_training)", "model.train()")],
        "back to training mode without its parts": [("model.train(was_training)", "model.training = was_training")],
        "back to training mode unless it is interrupted": [("    try:\n", "    if True:\n"), (BACK, "    model.train(was_training)\n")],
        "the mode read after it was changed": [("    was_training = model.training\n    model.eval()\n", "    model.eval()\n    was_training = model.training\n")],
        "gradients kept": [("@torch.no_grad()\n", "")],
        "old gradients thrown away": [("    model.eval()\n", "    model.eval()\n    model.zero_grad()\n")],
        "random blocks": [(STARTS, "starts = torch.randint(fit, (count,)) * T")],
        "random batches": [("window in windows.split(batch_size)", "_ in range(-(-count // batch_size))"), ("window = window.to(device)", "x, y = get_batch(ids, batch_size, T)\n            window = torch.cat([x, y[:, -1:]], dim=1).to(device)")],
        "everybody's dice seeded": [("    model.eval()\n", "    model.eval()\n    torch.manual_seed(1337)\n")],
        "the first blocks instead of spread ones": [(STARTS, "starts = torch.arange(count) * T")],
        "a whole number of blocks between two": [(STARTS, "starts = torch.arange(count) * (fit // count) * T")],
        "from the first to the last block": [(STARTS, "starts = torch.linspace(0, fit - 1, count).long() * T")],
        "spread, but not at the borders of blocks": [(STARTS, "starts = torch.arange(count) * fit * T // count")],
        "rounded to the nearest block": [(STARTS, "starts = (torch.arange(count) * fit / count).round().long() * T")],
        "windows side by side": [(STARTS, "starts = torch.arange(count) * fit // count * (T + 1)"), (FIT, "fit = len(ids) // (T + 1)")],
        "a window at every token": [(FIT, "fit = len(ids) - T"), (STARTS, "starts = torch.arange(count) * fit // count")],
        "blocks without the token after": [(FIT, "fit = len(ids) // T"), (STARTS, "starts = torch.arange(count) * fit // count * T\n    ids = torch.cat([ids, ids[:1]])")],
        "the last block left out": [(FIT, "fit = max((len(ids) - 1) // T - 1, min((len(ids) - 1) // T, 1))")],
        "all blocks, however many are asked for": [(COUNT, "count = fit")],
        "the same blocks again if too many are asked for": [(COUNT, "count = blocks or fit")],
        "batches are asked for, not blocks": [(COUNT, "count = min((blocks or fit) * batch_size, fit)")],
        "the mean of the means": [(TOTAL, "total += output.lm_loss.item()"), (MEASURED, "return total / len(windows.split(batch_size)), load.tolist()")],
        "each batch counted as a full one": [("len(window)  #", "batch_size  #")],
        "the last, smaller batch left out": [("for window in windows.split(batch_size):", "for window in [w for w in windows.split(batch_size) if len(w) == min(batch_size, count)]:")],
        "with the balance loss": [("output.lm_loss.item()", "output.loss.item()")],
        "per block instead of per token": [(MEASURED, "return total / count * T, load.tolist()")],
        "the sum": [(MEASURED, "return total, load.tolist()")],
        "in bits": [(MEASURED, "return total / count / math.log(2), load.tolist()")],
        "the token itself as the target": [("model(window[:, :-1], window[:, 1:])", "model(window[:, :-1], window[:, :-1])")],
        "a tensor instead of a number": [("output.lm_loss.item()", "output.lm_loss")],
        "all blocks at once": [("windows.split(batch_size)", "windows.split(len(windows))")],
        "the size of a batch fixed": [("windows.split(batch_size)", "windows.split(32)")],
        "the load of the last batch": [("load = load + torch", "load = torch")],
        "what was chosen, dropped or not": [("routing.load for", "routing.chosen.flatten(0, -2).sum(dim=0) for")],
        "all layers' loads in one": [("load.tolist()", "load.sum(dim=0).tolist()")],
        "the load in fractions": [("load.tolist()", "load.float().tolist()")],
        "the load as shares": [("load.tolist()", "(load / load.sum(dim=-1, keepdim=True)).tolist()")],
        "the load per batch": [("load.tolist()", "(load / len(windows.split(batch_size))).tolist()")],
        "the load as a tensor": [("load.tolist()", "load")],
        "the layers in opposite order": [("in output.routings]", "in output.routings[::-1]]")],
        "a text that is too short gives nan": [(REFUSED, "    if fit < 1:\n        return math.nan, []\n")],
        "an empty text crashes": [("if fit < 1:", "if fit == 0:")],
        "a text that is too short crashes": [(REFUSED, "")],
        "the lesson's block instead of the model's": [("T, device = model.config.block_size,", "T, device = config.block_size,")],
        "the pair in the wrong order": [(MEASURED, "return load.tolist(), total / count")],
    },
    "training-learning-rate": {
        "right: the way left, and a mixture of both ends": '''
def learning_rate(step, config):
    if step + 1 <= config.warmup:
        return (step + 1) * (config.lr / config.warmup)
    left = (config.steps - step) / (config.steps - config.warmup)
    return left * config.lr + (1 - left) * config.final_lr * config.lr
''',
        "right: the lower of two lines": '''
def learning_rate(step, config):
    up = (step + 1) / config.warmup if config.warmup else math.inf
    down = math.inf
    if step >= config.warmup:
        slope = (config.final_lr - 1) / (config.steps - config.warmup or 1)
        down = 1 + slope * (step - config.warmup)
    return config.lr * min(up, down)
''',
        "the first step with rate 0": [("(step + 1) / config.warmup", "step / config.warmup")],
        "the top one step late": [("(step + 1) / config.warmup", "(step + 1) / (config.warmup + 1)")],
        "one step of warm-up too many": [("if step < config.warmup", "if step <= config.warmup"), (UP, "config.lr * (step + 1) / (config.warmup + 1)")],
        "one step above the top": [("if step < config.warmup", "if step <= config.warmup and config.warmup")],
        "steps counted from 1": [("    if step <", "    step = step + 1\n    if step <"), (UP, "config.lr * step / config.warmup")],
        "the way down ends a step early": [("max(config.steps - config.warmup, 1)", "max(config.steps - 1 - config.warmup, 1)")],
        "the way down begins a step early": [("(step - config.warmup) / max(config.steps - config.warmup, 1)", "(step - config.warmup + 1) / max(config.steps - config.warmup + 1, 1)")],
        "the way down begins a step lower": [("done = (step - config.warmup) /", "done = (step - config.warmup + 1) /")],
        "the way down as if there was no warm-up": [(DONE, "done = step / config.steps")],
        "both at once, up times down": '''
def learning_rate(step, config):
    up = min((step + 1) / config.warmup, 1) if config.warmup else 1
    done = step / config.steps
    return config.lr * up * (1 - done * (1 - config.final_lr))
''',
        "the way down as long as the whole run": [("max(config.steps - config.warmup, 1)", "config.steps")],
        "final_lr as a rate instead of a share": [(DOWN, "return config.lr - done * (config.lr - config.final_lr)")],
        "final_lr not used": [(DOWN, "return config.lr * (1 - done)")],
        "final_lr as the least": [(DOWN, "return config.lr * max(1 - done, config.final_lr)")],
        "down by final_lr instead of to it": [(DOWN, "return config.lr * (1 - done * config.final_lr)")],
        "no way down": [(DOWN, "return config.lr")],
        "no warm-up": [("    if step < config.warmup:\n        return " + UP + "\n", "")],
        "never quite zero": [(DOWN, DOWN.replace("return ", "return max(") + ", 1e-5)")],
        "lr not used": [("return config.lr * (step", "return (step"), (DOWN, "return 1 - done * (1 - config.final_lr)")],
        "lr only on the way up": [(DOWN, "return 1 - done * (1 - config.final_lr)")],
        "the default's lr instead of the setting's": [("config.lr *", "TrainConfig.lr *")],
        "half a cosine": [(DOWN, "height = (1 + math.cos(math.pi * done)) / 2\n    return config.lr * (config.final_lr + (1 - config.final_lr) * height)")],
        "a curve instead of a line": [(DOWN, "return config.lr * (1 - done) ** 2 + config.lr * config.final_lr * done")],
        "falling by a factor": [(DOWN, "return config.lr * max(config.final_lr, 0.01) ** done")],
        "the inverse square root": [(DOWN, "return config.lr * (max(config.warmup, 1) / max(step, 1)) ** 0.5")],
        "in whole numbers": [(DONE, "done = (step - config.warmup) // max(config.steps - config.warmup, 1)")],
        "the warm-up squeezed into a short run": [("    if step <", "    warmup = min(config.warmup, config.steps)\n    if step <"), ("< config.warmup", "< warmup"), (UP, "config.lr * (step + 1) / warmup")],
        "crashes without warm-up": [("    if step < config.warmup:\n        return " + UP + "\n", "    up = " + UP + "\n    if step < config.warmup:\n        return up\n")],
        "warm-up from the final rate": [(UP, "config.lr * (config.final_lr + (1 - config.final_lr) * (step + 1) / config.warmup)")],
        "rounded": [(DOWN, DOWN.replace("return ", "return round(") + ", 3)"), ("return " + UP, "return round(" + UP + ", 3)")],
        "a tenth of the run is warm-up": [("config.warmup", "(config.steps // 10)")],
    },
    "training-train": {
        "right: a plain loop over steps, a function for each look": """
def train(model, train_ids, val_ids, config=TrainConfig(), on_eval=None, state=None):
    if state is None:
        state = TrainingState(model, config)
    T, device, spent, since = model.config.block_size, next(model.parameters()).device, 0.0, state.step

    def look(bar):
        nonlocal spent, since
        loss = "".join(f"loss {loss:.3f}, " for loss in state.read_losses()[-1:])
        at = state.step
        if (at % config.eval_every == 0 or at == config.steps) and (not state.history or state.history[-1]["step"] < at):
            tokens = (at - since) * config.batch_size * T
            state.evaluate(train_ids, val_ids, tokens / spent if spent else 0.0)
            spent, since = 0.0, at
            if on_eval is not None:
                on_eval(state.history[-1])
        if state.history:
            bar.set_postfix_str(loss + describe(state.history[-1]))

    with tqdm(total=config.steps, initial=state.step, disable=None) as bar:
        look(bar)
        for step in range(state.step, config.steps):
            if state.stop:
                break
            began = time.perf_counter()
            model.train()
            x, y = (t.to(device) for t in get_batch(train_ids, config.batch_size, T, state.order))
            output = model(x, y)
            model.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            rate = learning_rate(step, config)
            for i in range(len(state.optimizer.param_groups)):
                state.optimizer.param_groups[i]["lr"] = rate
            state.optimizer.step()
            state.require_finite(output.loss.item(), step)
            state.losses, state.routings, state.step = [output.loss.detach()], output.routings, step + 1
            bar.update(1)
            spent += time.perf_counter() - began
            look(bar)
            state.losses = []
    model.train(False)
    return list(state.history)
""",
        "right: the gradient cleared at the end, clipped by hand, looks at every step": [
            (ZERO, ""),
            (STEP, STEP + "            model.zero_grad(set_to_none=True)\n"),
            (CLIP, """            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            length = torch.cat([g.flatten() for g in gradients]).norm()
            if length > config.clip:
                for g in gradients:
                    g *= config.clip / length
"""),
            ("if due or state.step % 10 == 0:", "if True:"),
        ],
        "gradients never cleared": [(ZERO, "")],
        "gradients cleared before the step uses them": [(ZERO, ""), (BACKWARD, BACKWARD + ZERO)],
        "gradients cleared once per evaluation": [(ZERO, "            if due:\n                state.optimizer.zero_grad()\n")],
        "no clipping": [(CLIP, "")],
        "clipped after the step": [(CLIP, ""), (STEP, STEP + CLIP)],
        "clipped before backward": [(CLIP, ""), (BACKWARD, CLIP + BACKWARD)],
        "each number clipped by itself": [("clip_grad_norm_(model.parameters(), config.clip)", "clip_grad_value_(model.parameters(), config.clip)")],
        "each tensor clipped by itself": [(CLIP, "            for p in model.parameters():\n                torch.nn.utils.clip_grad_norm_(p, config.clip)\n")],
        "clipped to 1 whatever the setting": [("config.clip", "1.0")],
        "every gradient stretched to the limit": [(CLIP, CLIP + "            length = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()\n            for p in model.parameters():\n                p.grad *= min(config.clip, 1e6) / length\n")],
        "the schedule never used": [(RATE, "")],
        "a constant rate": [("learning_rate(state.step, config)", "config.lr")],
        "the rate set after the step": [(RATE, ""), (STEP, STEP + RATE.replace("            for", "            for", 1))],
        "the rate of the next step": [("learning_rate(state.step, config)", "learning_rate(state.step + 1, config)")],
        "the schedule only for the first group": [("in state.optimizer.param_groups:", "in state.optimizer.param_groups[:1]:")],
        "the schedule counted since going on": [(STATE, STATE + "\n    first = state.step"), ("learning_rate(state.step, config)", "learning_rate(state.step - first, config)")],
        "steps in evaluation mode": [("    model.train()\n", "")],
        "evaluation mode from the second evaluation on": [(LAP, LAP + "                    if state.step:\n                        model.eval()\n")],
        "left in training mode": [("    model.eval()\n", "")],
        "evaluation mode only at the very end": [(END, "    if state.step == config.steps:\n        model.eval()\n    return state.history")],
        "no record at the start": [(DUE, "due = state.step and state.step % config.eval_every == 0 or state.step == config.steps"), ("bar.set_postfix_str(loss + describe(state.history[-1]), refresh=due)", "pass")],
        "no record at the end": [(DUE, "due = state.step % config.eval_every == 0")],
        "the last record twice": [(NEW, 'if due and (state.step == config.steps or state.step not in [record["step"] for record in state.history]):'), (LAST_LOOK, LAST_LOOK + "    if state.step == config.steps and state.step % config.eval_every == 0:\n        state.evaluate(train_ids, val_ids, 0.0)\n")],
        "a record twice when it goes on": [(NEW, "if due:")],
        "records one step late": [(DUE, "due = state.step % config.eval_every == 1 or state.step in (0, config.steps)")],
        "records every ten steps": [("config.eval_every", "10")],
        "records at fixed tens only": [("if due or state.step % 10 == 0:", "if state.step % 10 == 0 or state.step == config.steps:")],
        "on_eval without the last record": [("                    if on_eval:", "                    if on_eval and state.step < config.steps:")],
        "on_eval gets the whole list": [("on_eval(state.history[-1])", "on_eval(state.history)")],
        "on_eval is a must": [("                    if on_eval:\n                        on_eval", "                    on_eval")],
        "on_eval never called": [(ON_EVAL, "")],
        "on_eval after the training": [(ON_EVAL, ""), (END, "    for record in state.history:\n        if on_eval:\n            on_eval(record)\n" + END)],
        "both losses of the held-out text": [(EVALUATE, "state.evaluate(val_ids, val_ids, speed)")],
        "both losses of the training text": [(EVALUATE, "state.evaluate(train_ids, train_ids, speed)")],
        "the two texts swapped": [(EVALUATE, "state.evaluate(val_ids, train_ids, speed)")],
        "learns from the held-out text": [("get_batch(train_ids,", "get_batch(val_ids,")],
        "batches in everybody's order": [("T, state.order)", "T)")],
        "the order begins anew when it goes on": [(STATE, STATE + "\n    state.order.manual_seed(config.seed)")],
        "the same batch at every step": [("T, state.order)", "T, torch.Generator().manual_seed(config.seed))")],
        "the seed not used": [("T, state.order)", "T, order)"), (STATE, STATE + "\n    order = torch.Generator().manual_seed(1337 + state.step)")],
        "everybody's dice seeded": [(STATE, STATE + "\n    torch.manual_seed(config.seed)")],
        "the size of a batch fixed": [("get_batch(train_ids, config.batch_size,", "get_batch(train_ids, 32,")],
        "the state not used": [(STATE, "state = TrainingState(model, config)")],
        "the state's steps done again": [(STATE, STATE + "\n    state.step = 0")],
        "the history begins anew": [(STATE, STATE + "\n    state.history = []")],
        "only the records of this call": [(STATE, STATE + "\n    first = len(state.history)"), ("return state.history", "return state.history[first:]")],
        "an optimizer of its own": [(STATE, STATE + "\n    state.optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, config.beta2), weight_decay=config.weight_decay)")],
        "an optimizer with the usual memory": [(STATE, STATE + "\n    for group in state.optimizer.param_groups:\n        group['betas'] = 0.9, 0.999")],
        "a new optimizer at every step": [(ZERO, "            state.optimizer = TrainingState(model, config).optimizer\n" + RATE + ZERO)],
        "a new optimizer after each evaluation": [(LAP, LAP + "                    state.optimizer = TrainingState(model, config).optimizer\n")],
        "plain descent": [(STEP, "            with torch.no_grad():\n                for p in model.parameters():\n                    p -= learning_rate(state.step, config) * p.grad\n")],
        "the step before backward": [(STEP, ""), (BACKWARD, STEP + BACKWARD)],
        "two steps with each gradient": [(STEP, STEP + STEP)],
        "without the balance loss": [("output.loss.backward()", "output.lm_loss.backward()")],
        "the loss divided by the batch": [("output.loss.backward()", "(output.loss / config.batch_size).backward()")],
        "the last batch only learned if it is due": [(STEP, "            if state.step + 1 < config.steps:\n                state.optimizer.step()\n")],
        "a copy is trained": [(STATE, "state = state or TrainingState(model, config)\n    import copy\n    given, model = model, copy.deepcopy(model)")],
        "stop not looked at": [("if state.stop or state.step", "if state.step")],
        "stop looked at only when a record is due": [("if state.stop or state.step", "if due and state.stop or state.step")],
        "one step more after stop": [(STOP, "            if stopping or state.step == config.steps:\n                break\n            stopping = state.stop\n"), (STATE, STATE + "\n    stopping = False")],
        "no record where it stops": [(NEW, NEW.replace("if due", "if due and not state.stop"))],
        "an additional record where it stops": [(DUE, DUE + " or state.stop")],
        "losses never read": [("losses = state.read_losses()", "losses = []"), (LAST_LOOK, "")],
        "only the last loss looked at": [("losses = state.read_losses()", "losses, state.losses = state.losses[-1:], []\n                for last in losses:\n                    state.require_finite(last.item(), state.step)")],
        "a bad loss skipped": [(BACKWARD, BACKWARD + "            if not output.loss.isfinite():\n                state.step += 1\n                continue\n")],
        "a bad loss ends it quietly": [(BACKWARD, BACKWARD + "            if not output.loss.isfinite():\n                break\n")],
        "a bad loss as another error": [(STATE, STATE + "\n    FloatingPointError = ValueError"), (BACKWARD, BACKWARD + "            if not output.loss.isfinite():\n                raise FloatingPointError(f'the loss of step {state.step} is {output.loss.item()}')\n")],
        "a bad loss one step too late": [(BACKWARD, BACKWARD + "            if state.losses and not state.losses[-1].isfinite():\n                raise FloatingPointError(f'the loss of step {state.step} is {output.loss.item()} (learning rate 1)')\n"), ("losses = state.read_losses()", "losses = []")],
        "routings not kept": [(ROUTINGS, "")],
        "the routings of the first batch": [(ROUTINGS, "            state.routings = state.routings or output.routings\n")],
        "the routings of the first layer": [("state.routings = output.routings", "state.routings = output.routings[:1]")],
        "the last losses not looked at where it stops": [(LAST_LOOK, "")],
        "a random number for each record": [(LAP, LAP + "                    torch.rand(1)\n")],
        "speed with the evaluations": [(LAP, "                    lap_step = state.step\n"), (EVALUATE, EVALUATE + "\n                    lap = time.perf_counter()"), (NEW, NEW + "\n                    estimate_loss(model, val_ids, config.batch_size, config.eval_blocks)")],
        "speed with on_eval and the evaluation": [("                    with autocast:\n                        " + EVALUATE, LAP + "                    with autocast:\n                        " + EVALUATE), (ON_EVAL + LAP, ON_EVAL)],
        "speed since the start": [(LAP, "")],
        "tokens of all steps, time since the last record": [(LAP, "                    lap = time.perf_counter()\n")],
        "sequences per second": [("* config.batch_size * T", "* config.batch_size")],
        "steps per second": [("tokens = (state.step - lap_step) * config.batch_size * T", "tokens = state.step - lap_step")],
        "seconds per token": [("speed = tokens / max(time.perf_counter() - lap, 1e-9)", "speed = (time.perf_counter() - lap) / max(tokens, 1)")],
        "one step too few": [("state.step == config.steps:\n                break", "state.step == config.steps - 1:\n                break")],
        "nothing comes back": [("    return state.history", "")],
        "the model comes back": [("    return state.history", "    return model")],
        "the last record comes back": [("    return state.history", "    return state.history[-1]")],
        "without gradients": [("            with autocast:\n                output", "            with autocast, torch.no_grad():\n                output"), (BACKWARD, "            output.loss.requires_grad_().backward()\n"), (CLIP, ""), (STEP, "")],
    },
    "training-cosine": {
        "right: the square of a cosine, after learning_rate": '''
def cosine_learning_rate(step, config):
    if step < config.warmup:
        return learning_rate(step, config)
    angle = math.pi / 2 * (step - config.warmup) / (config.steps - config.warmup)
    end = config.final_lr * config.lr
    return end + (config.lr - end) * math.cos(angle) ** 2
''',
        "right: a cosine between the mean and the ends": '''
def cosine_learning_rate(step, config):
    if step + 1 <= config.warmup:
        return (step + 1) / config.warmup * config.lr
    middle, swing = config.lr * (1 + config.final_lr) / 2, config.lr * (1 - config.final_lr) / 2
    return middle - swing * math.cos(math.pi * (config.steps - step) / max(config.steps - config.warmup, 1))
''',
        "the straight line": [(HEIGHT, "height = 1 - done")],
        "a quarter of a cosine": [(HEIGHT, "height = math.cos(math.pi / 2 * done)")],
        "the other quarter": [(HEIGHT, "height = 1 - math.sin(math.pi / 2 * done)")],
        "a whole cosine": [("math.pi * done", "2 * math.pi * done")],
        "a cosine without pi": [("math.pi * done", "done")],
        "degrees for radians": [("math.pi * done", "180 * done")],
        "not halved": [("(1 + math.cos(math.pi * done)) / 2", "1 + math.cos(math.pi * done)")],
        "below zero": [("(1 + math.cos(math.pi * done)) / 2", "math.cos(math.pi * done)")],
        "up instead of down": [("1 + math.cos", "1 - math.cos")],
        "final_lr not used": [(CURVED, "return config.lr * height")],
        "final_lr added": [(CURVED, "return config.lr * (config.final_lr + height)")],
        "final_lr as the least": [(CURVED, "return config.lr * max(config.final_lr, height)")],
        "final_lr as a rate instead of a share": [(CURVED, "return config.final_lr + (config.lr - config.final_lr) * height")],
        "from lr down by final_lr": [(CURVED, "return config.lr * (1 - config.final_lr * (1 - height))")],
        "lr not used": [(CURVED, "return config.final_lr + (1 - config.final_lr) * height")],
        "no warm-up": [("    if step < config.warmup:\n        return config.lr * (step + 1) / config.warmup\n", "")],
        "the warm-up along the cosine as well": [("(step + 1) / config.warmup", "(1 - math.cos(math.pi * (step + 1) / config.warmup)) / 2")],
        "the first step with rate 0": [("(step + 1) / config.warmup", "step / config.warmup")],
        "the way down as if there was no warm-up": [("(step - config.warmup) / max(config.steps - config.warmup, 1)", "step / config.steps")],
        "the way down ends a step early": [("max(config.steps - config.warmup, 1)", "max(config.steps - config.warmup - 1, 1)")],
        "a smooth curve that is no cosine": [(HEIGHT, "height = 1 - done * done * (3 - 2 * done)")],
        "the cosine on top of the line": [("return config.lr * (config.final_lr", "return learning_rate(step, config) * (config.final_lr")],
        "crashes without warm-up": [("    if step < config.warmup:\n        return config.lr * (step + 1) / config.warmup\n", "    up = config.lr * (step + 1) / config.warmup\n    if step < config.warmup:\n        return up\n")],
    },
    "training-accumulate": {
        "right: autograd.grad, added up": '''
def accumulate_gradients(model, x, y, pieces):
    weights = list(model.parameters())
    total = [torch.zeros_like(w) for w in weights]
    for ids, targets in zip(x.chunk(pieces), y.chunk(pieces)):
        share = ids.numel() / x.numel()
        for sum_so_far, gradient in zip(total, torch.autograd.grad(model(ids, targets).lm_loss, weights)):
            sum_so_far += share * gradient
    for weight, gradient in zip(weights, total):
        weight.grad = gradient
''',
        "right: gradients of sums, divided at the end": '''
def accumulate_gradients(model, x, y, pieces):
    for p in model.parameters():
        p.grad = None
    size = -(-len(x) // pieces)
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        (model(x[part], y[part]).lm_loss * y[part].numel()).backward()
    for p in model.parameters():
        p.grad /= y.numel()
''',
        "in evaluation mode": [("    model.zero_grad()\n", "    model.zero_grad()\n    model.eval()\n")],
        "every piece counted alike": [("len(part_x) / len(x)", "1 / len(x.chunk(pieces))")],
        "divided by the pieces asked for": [("len(part_x) / len(x)", "1 / pieces")],
        "the sum of the means": [("(loss * len(part_x) / len(x))", "loss")],
        "the sum over sequences": [("loss * len(part_x) / len(x)", "loss * len(part_x)")],
        "old gradients left in": [("    model.zero_grad()\n", "")],
        "cleared before every piece": [("        loss = model", "        model.zero_grad()\n        loss = model")],
        "cleared at the end": [("/ len(x)).backward()", "/ len(x)).backward()\n    model.zero_grad()")],
        "cleared by hand, which crashes where there is none": [("    model.zero_grad()\n", "    for p in model.parameters():\n        p.grad.zero_()\n")],
        "with the balance loss": [(".lm_loss", ".loss")],
        "the whole batch at once": [(PIECES, "[(x, y)]")],
        "one sequence at a time": [(PIECES, "zip(x.split(1), y.split(1))")],
        "pieces of that size": [(PIECES, "zip(x.split(pieces), y.split(pieces))")],
        "pieces as equal as possible": [(PIECES, "zip(x.tensor_split(pieces), y.tensor_split(pieces))")],
        "cut along time": [(PIECES, "zip(x.chunk(pieces, dim=1), y.chunk(pieces, dim=1))"), ("len(part_x) / len(x)", "part_x.numel() / x.numel()")],
        "the smaller piece left out": [(PIECES, "zip(x[:len(x) // pieces * pieces].chunk(pieces), y.chunk(pieces))")],
        "always the first targets": [("model(part_x, part_y)", "model(part_x, y[:len(part_x)])")],
        "one backward pass for all at the end": '''
def accumulate_gradients(model, x, y, pieces):
    model.zero_grad()
    total = 0
    for part_x, part_y in zip(x.chunk(pieces), y.chunk(pieces)):
        total = total + model(part_x, part_y).lm_loss * len(part_x) / len(x)
    total.backward()
''',
        "all pieces forward, then all back": '''
def accumulate_gradients(model, x, y, pieces):
    model.zero_grad()
    losses = [model(a, b).lm_loss * len(a) / len(x) for a, b in zip(x.chunk(pieces), y.chunk(pieces))]
    for loss in losses:
        loss.backward()
''',
        "every piece forward twice": [("        loss = model", "        model(part_x)\n        loss = model")],
        "a step for every piece": [("/ len(x)).backward()", "/ len(x)).backward()\n        with torch.no_grad():\n            for p in model.parameters():\n                p -= 0.1 * p.grad")],
        "gradients come back instead of staying": '''
def accumulate_gradients(model, x, y, pieces):
    total = 0
    for part_x, part_y in zip(x.chunk(pieces), y.chunk(pieces)):
        loss = model(part_x, part_y).lm_loss * len(part_x) / len(x)
        total = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]) + total
    return total
''',
    },
    "training-average": {
        "right: sums of weights and of shares, by name": '''
class WeightAverage:
    def __init__(self, model, decay):
        self.decay, self.updates = decay, 0
        self.sums, self.shares = {}, 0.0

    @torch.no_grad()
    def update(self, model):
        self.updates += 1
        for name, weight in model.named_parameters():
            self.sums[name] = self.decay * self.sums.get(name, 0.0) + weight
        self.shares = self.decay * self.shares + 1

    @torch.no_grad()
    def copy_to(self, model):
        for name, weight in model.named_parameters():
            weight.copy_(self.sums[name] / self.shares)
''',
        "right: corrected at every update": '''
class WeightAverage:
    def __init__(self, model, decay):
        self.decay, self.updates = decay, 0
        self.average = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model):
        self.updates += 1
        share = (1 - self.decay) / (1 - self.decay**self.updates)  # of the newest
        for mean, p in zip(self.average, model.parameters()):
            mean += share * (p - mean)

    @torch.no_grad()
    def copy_to(self, model):
        for mean, p in zip(self.average, model.parameters()):
            p.data[:] = mean
''',
        "not corrected": [(COPY, "p.copy_(mean)")],
        "corrected by one update too few": [("self.decay**self.updates", "self.decay**(self.updates - 1) * (self.updates > 1)")],
        "corrected by one update too many": [("self.decay**self.updates", "self.decay**(self.updates + 1)")],
        "corrected by the wrong power": [("self.decay**self.updates", "self.decay*self.updates")],
        "corrected as if after the first update": [("self.decay**self.updates", "self.decay")],
        "multiplied by the correction": [("mean / (1", "mean * (1")],
        "corrected in place": [(COPY, "p.copy_(mean.div_(1 - self.decay**self.updates))")],
        "corrected at every update, from there on": [(LERP, LERP + "\n            mean /= 1 - self.decay**self.updates"), (COPY, "p.copy_(mean)")],
        "the decay the wrong way round": [(LERP, "mean.lerp_(p, self.decay)")],
        "the decay fixed": [(LERP, "mean.lerp_(p, 0.1)"), ("self.decay**self.updates", "0.9**self.updates")],
        "from the first weights instead of zero": [(MEANS, "self.means = [p.detach().clone() for p in model.parameters()]")],
        "from the first weights, and not corrected": [(MEANS, "self.means = [p.detach().clone() for p in model.parameters()]"), (COPY, "p.copy_(mean)")],
        "the plain mean of all": [(LERP, "mean.lerp_(p, 1 / self.updates)"), (COPY, "p.copy_(mean)")],
        "the last weights": [(LERP, "mean.copy_(p)"), (COPY, "p.copy_(mean)")],
        "the weights themselves instead of copies": [(MEANS, "self.means = [p.detach() for p in model.parameters()]")],
        "updates not counted": [("        self.updates += 1\n", ""), (COPY, "p.copy_(mean / (1 - self.decay**max(self.updates, 1)))")],
        "a copy counts as an update": [("        for mean, p in zip(self.means, model.parameters()):\n            " + COPY, "        self.updates += 1\n        for mean, p in zip(self.means, model.parameters()):\n            " + COPY)],
        "matrices only": [("            " + COPY, "            if p.dim() > 1:\n                " + COPY)],
        "the first weight only": [(MEANS, "self.means = [torch.zeros_like(next(model.parameters()))]")],
        "the model becomes its average": [(LERP, LERP + "\n            p.copy_(mean / (1 - self.decay**self.updates))")],
        "the average given away": [(COPY, "p.data = mean.div_(1 - self.decay**self.updates)")],
        "new weights in place of the old ones": [("        for mean, p in zip(self.means, model.parameters()):\n            " + COPY, "        names = [name for name, _ in model.named_parameters()]\n        for mean, name in zip(self.means, names):\n            owner, _, leaf = name.rpartition('.')\n            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(mean / (1 - self.decay**self.updates)))")],
        "one average for all objects": [("    def __init__", "    means = []\n\n    def __init__"), (MEANS, "self.means += [torch.zeros_like(p) for p in model.parameters()][len(self.means):]")],
        "the order of the weights reversed": [("self.means = [torch.zeros_like(p) for p in model.parameters()]", "self.means = [torch.zeros_like(p) for p in list(model.parameters())[::-1]]")],
    },
}
