"""Checks of lesson 11, training."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import torch

from makemoe.checks import check, close, refuses, same, unchanged
from makemoe.data import get_batch
from makemoe.model import MoEConfig, SparseMoELanguageModel

TINY = MoEConfig(vocab_size=7, block_size=4, n_embd=8, n_head=2, n_layer=2, num_experts=4, top_k=2, n_hidden=8)
RESTLESS = replace(TINY, router="noisy", dropout=0.3)  # random wherever it may be


def loss_by_loop(model, ids, numbers):
    "(mean lm_loss, loads) of the contexts with these numbers, one at a time."
    T, was_training = model.config.block_size, model.training
    model.eval()
    with torch.no_grad():
        outputs = [model(ids[None, i * T : i * T + T], ids[None, i * T + 1 : i * T + T + 1]) for i in numbers]
    model.train(was_training)
    load = [sum(output.routings[layer].load for output in outputs).tolist() for layer in range(len(model.blocks))]
    return sum(output.lm_loss.item() for output in outputs) / len(numbers), load


def interrupt(*_):
    raise KeyboardInterrupt


@check
def check_estimate_loss(estimate_loss):
    T = 16
    model = SparseMoELanguageModel(
        replace(RESTLESS, block_size=T, capacity_factor=0.5, eval_capacity_factor=0.5, balance_coef=1.0)
    )
    ids = torch.randint(7, (5 * T + 3,))  # five contexts, and two tokens that fill no sixth
    weights = {name.replace(".", "_"): weight for name, weight in model.named_parameters()}
    yield "nobody's random numbers are drawn, gradients and weights stay as they are"
    model(ids[None, :T], ids[None, 1 : T + 1]).loss.backward()
    gradients = {name: weight.grad for name, weight in weights.items()}
    before = torch.get_rng_state()
    with unchanged(ids=ids, **weights), unchanged(**gradients):
        loss, load = estimate_loss(model, ids, batch_size=2)
    same(torch.get_rng_state(), before, "the state of the random numbers")
    assert all(model.get_parameter(name).grad is not None for name, _ in model.named_parameters()), "gradients are gone"
    yield "the mean lm_loss of all five contexts, and what each expert carried"
    expected, expected_load = loss_by_loop(model, ids, range(5))
    close(loss, expected, "the loss")
    same(load, expected_load, "the load")
    assert isinstance(loss, float), f"the loss should be a plain number, got {loss!r}"
    yield "some contexts, spread evenly"
    for length, blocks, numbers in (5 * T + 3, 3, (0, 1, 3)), (5 * T, None, (0, 1, 2, 3)), (T + 1, 100, (0,)):
        loss, load = estimate_loss(model, ids[:length], batch_size=2, blocks=blocks)
        expected, expected_load = loss_by_loop(model, ids, numbers)
        close(loss, expected, f"the loss of {blocks or 'all'} contexts of {length} tokens")
        same(load, expected_load, f"the load of {blocks or 'all'} contexts of {length} tokens")
    yield "at most batch_size contexts at a time, without gradients"
    seen = []
    watch = model.lm_head.register_forward_hook(
        lambda head, _, logits: seen.append((len(logits), logits.requires_grad))
    )
    for batch_size in 1, 3:
        seen.clear()
        estimate_loss(model, ids, batch_size)
        assert max(seen)[0] <= batch_size, f"{max(seen)[0]} at a time, but batch_size is {batch_size}"
        assert not any(needs for _, needs in seen), "measuring should not prepare for a backward pass"
    watch.remove()
    yield "the mode is as it was, also after an error"
    for mode in True, False:
        model.train(mode)
        estimate_loss(model, ids)
        assert all(part.training == mode for part in model.modules()), (
            f"training was {mode} before, and is not any more"
        )
    model.train().lm_head.register_forward_pre_hook(interrupt)
    try:
        estimate_loss(model, ids)
    except KeyboardInterrupt:
        pass
    assert all(part.training for part in model.modules()), "interrupted in the middle, it should put the mode back"
    yield "a text without a context and its next token is refused"
    for length in T, 0:
        refuses(ValueError, lambda length=length: estimate_loss(model, ids[:length]), length)


def schedule(steps, warmup, lr=1.0, final_lr=0.0):
    return SimpleNamespace(steps=steps, warmup=warmup, lr=lr, final_lr=final_lr)


@check
def check_learning_rate(learning_rate):
    yield "up in four steps to all of lr, then straight down, never 0 while there are steps"
    rates = [learning_rate(step, schedule(10, 4)) for step in range(10)]
    close(
        torch.tensor(rates), torch.tensor([1 / 4, 2 / 4, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]), "ten rates"
    )
    close(learning_rate(10, schedule(10, 4)), 0, "the rate that step 10 would have")
    yield "lr and final_lr, which is a share of it"
    rates = [learning_rate(step, schedule(110, 10, 0.2, 0.5)) for step in (4, 10, 60, 110)]
    close(torch.tensor(rates), torch.tensor([0.1, 0.2, 0.15, 0.1]), "lr 0.2, final_lr 0.5, steps 4, 10, 60 and 110")
    yield "a constant rate, without warm-up"
    rates = [learning_rate(step, schedule(5, 0, 0.3, 1.0)) for step in range(5)]
    close(torch.tensor(rates), torch.full((5,), 0.3), "five rates")
    yield "a run that is as short as its warm-up, or shorter, only rises"
    close(learning_rate(1, schedule(2, 100)), 0.02, "step 1 of 2, with a warm-up of 100")
    close(learning_rate(3, schedule(4, 4)), 1.0, "step 3 of 4, with a warm-up of 4")


def groups_by_hand(model, decay):
    "Matrices that decay, and the rest."
    named = [(name, weight, weight.dim() < 2 or name.endswith("bias")) for name, weight in model.named_parameters()]
    return [
        dict(params=[weight for _, weight, vector in named if not vector], weight_decay=decay),
        dict(params=[weight for _, weight, vector in named if vector], weight_decay=0.0),
    ]


def equal_weights(ours, theirs, what, rtol=0, atol=0):
    for (name, weight), other in zip(ours.named_parameters(), theirs.parameters()):
        close(weight, other, f"{name} {what}", rtol, atol)


def timeless(record):
    return {key: value for key, value in record.items() if key not in ("seconds", "tokens_per_second")}


def stop_in(state, step):
    "A hook that asks for a stop in the middle of this step."
    return lambda module, _: setattr(state, "stop", state.stop or module.training and state.step == step)


@check
def check_train(train, TrainConfig, TrainState):
    ours, held_out = torch.randint(7, (60,)) % 3, torch.randint(7, (40,))  # very different texts
    config = TrainConfig(
        steps=5,
        batch_size=3,
        lr=0.02,
        warmup=2,
        final_lr=0.1,
        weight_decay=2.0,
        beta2=0.9,
        clip=0.5,
        eval_every=2,
        eval_blocks=3,
        seed=5,
    )

    yield "records at the start, every eval_every steps and at the end; callbacks at the right moments"
    model, calls = SparseMoELanguageModel(RESTLESS), []
    state = TrainState(model, config)
    history = train(
        model,
        ours,
        held_out,
        config,
        state=state,
        on_step=lambda state, loss: calls.append(("step", state.step, float(loss))),
        on_eval=lambda record: calls.append(("eval", state.step, record)),
    )
    order = [call[:2] for call in calls]
    want = [
        ("eval", 0),
        ("step", 1),
        ("step", 2),
        ("eval", 2),
        ("step", 3),
        ("step", 4),
        ("eval", 4),
        ("step", 5),
        ("eval", 5),
    ]
    same(order, want, "the calls of on_eval and on_step, each with the steps done")
    records = [record for kind, _, record in calls if kind == "eval"]
    same([record["step"] for record in history], [0, 2, 4, 5], "the steps of the records")
    assert history == records == state.history, "the list of all records is in state.history, and comes back"
    assert not any(part.training for part in model.modules()), "the model should be left in evaluation mode"

    yield "a record says how the model is doing on both texts, in evaluation mode"
    for name, ids in ("train_loss", ours), ("val_loss", held_out):
        fit = (len(ids) - 1) // 4
        expected, load = loss_by_loop(model, ids, [i * fit // 3 for i in range(3)])
        close(history[-1][name], expected, f"the last {name}")
    same(history[-1]["load"], load, "the load, on held-out text,")
    close(history[-1]["imbalance"][1], 4 * max(load[1]) / sum(load[1]), "the imbalance of layer 1")

    yield "the weights are those of AdamW with clipping and the learning rates by hand, whatever on_eval costs"
    quiet = replace(TINY, balance_coef=1.0, bias=True, norm="layer")
    for clip in 0.3, 2.0, math.inf:  # shorter and longer than gradients are
        model = SparseMoELanguageModel(quiet)
        expected, order = copy.deepcopy(model), torch.Generator().manual_seed(5)
        optimizer = torch.optim.AdamW(groups_by_hand(expected, 2.0), betas=(0.9, 0.9))
        for rate in 0.01, 0.02, 0.02, 0.014, 0.008:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            expected(*get_batch(ours, 3, 4, order)).loss.backward()
            torch.nn.utils.clip_grad_norm_(expected.parameters(), clip)
            optimizer.step()
        train(model, ours, held_out, replace(config, clip=clip))
        equal_weights(model, expected, f"after five steps, clip={clip}", 1e-3, 1e-4)

    yield "stopped after a step, once between two evaluations and once at one, it goes on as if it had not"
    one, other = (SparseMoELanguageModel(RESTLESS) for _ in range(2))
    other.load_state_dict(one.state_dict())
    torch.manual_seed(12)
    whole = train(one, ours, held_out, replace(config, eval_every=1))  # looking more often changes nothing
    torch.manual_seed(12)
    state, seconds = TrainState(other, config), 0.0
    for stop in 2, 3, None:
        hook, state.stop = other.register_forward_pre_hook(stop_in(state, stop)), False
        history = train(other, ours, held_out, config, state=state)
        hook.remove()
        same(state.step, 5 if stop is None else stop + 1, "the steps done")
        assert not other.training, "a training that was stopped should leave evaluation mode, too"
        assert state.seconds > seconds, f"seconds should go on from {seconds}, but are {state.seconds}"
        seconds = state.seconds
    equal_weights(other, one, "should be the same")
    assert [timeless(r) for r in history] == [timeless(whole[i]) for i in (0, 2, 4, 5)], (
        "the records should be the same"
    )

    yield "tokens per second are those of the steps alone; dropped is a share of the last batch"
    clock, carried = [7.0], []

    def tick(router, _, routing):  # a step takes 1 second, each batch of an evaluation 100
        clock[0] += 1 if router.training else 100
        if router.training:
            carried.append((routing.kept.sum() / routing.chosen.sum()).item())

    model = SparseMoELanguageModel(replace(TINY, capacity_factor=0.5))
    model.blocks[1].moe.router.register_forward_hook(tick)
    with patch("time.perf_counter", lambda: clock[0]), patch("time.time", lambda: clock[0]):
        for record in train(model, ours, held_out, config, on_eval=lambda record: clock.append(clock.pop() + 1000))[1:]:
            close(record["tokens_per_second"], 12, "12 tokens a step, a step a second: tokens_per_second")
            close(record["dropped"][1], 1 - carried[record["step"] - 1], f"dropped in layer 1 at step {record['step']}")

    yield "the first loss that is not finite ends it with the number of its step, also if that is the last one"
    for bad, stop in (1, False), (4, True):
        model = SparseMoELanguageModel(TINY)
        state = TrainState(model, config)

        def spoil(module, _, output, state=state, bad=bad, stop=stop):
            if module.training and state.step == bad:
                state.stop = stop
                return replace(output, loss=output.loss * math.nan)

        model.register_forward_hook(spoil)
        refuses(
            FloatingPointError,
            lambda model=model, state=state: train(model, ours, held_out, replace(config, eval_every=5), state=state),
            f"step {bad} ",
        )

    yield "an error in on_eval or on_step comes out"
    for name in "on_eval", "on_step":
        try:
            train(SparseMoELanguageModel(TINY), ours, held_out, config, **{name: interrupt})
        except KeyboardInterrupt:
            continue
        assert False, f"an error of {name} was swallowed"


@check
def check_accumulate_gradients(accumulate_gradients):
    model = SparseMoELanguageModel(TINY)
    ids = torch.randint(7, (60,))
    x, y = get_batch(ids, 7, 4)
    model(x, y).lm_loss.backward()
    whole = [weight.grad.clone() for weight in model.parameters()]
    yield "the gradient of the whole batch, in one piece, in three and in seven"
    for pieces in 1, 3, 7:  # 7 sequences in 3 pieces: 3, 3 and 1
        model(x[:2], y[:2]).lm_loss.backward()  # leaves gradients that do not belong here
        with unchanged(x=x, y=y, weight=model.lm_head.weight):
            accumulate_gradients(model, x, y, pieces)
        for (name, weight), expected in zip(model.named_parameters(), whole):
            close(weight.grad, expected, f"the gradient of {name} in {pieces} pieces", 1e-4, 1e-6)
    yield "each piece goes forward and back before the next, and the mode stays"
    calls = []
    model.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    model.lm_head.weight.register_hook(lambda gradient: calls.append("back"))
    for pieces, expected in (2, [4, "back", 3, "back"]), (3, [3, "back", 3, "back", 1, "back"]):
        calls.clear()
        model.zero_grad()  # this time there is no gradient before
        accumulate_gradients(model, x, y, pieces)
        same(calls, expected, "sequences forward, and back")
    assert model.training, "the model should be left in training mode"
