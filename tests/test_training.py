"""Lesson 11. The oracles: loops over single contexts, a schedule in fractions, and AdamW by its equations."""

import json
import math
import random
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from classroom.hidden import training as hidden
from makemoe import training
from makemoe.checks import training as checks
from makemoe.checks.training import loss_by_loop
from makemoe.data import CharTokenizer, get_batch
from makemoe.lab import seed_everything
from makemoe.model import MoEConfig, SparseMoELanguageModel
from makemoe.training import TrainConfig, TrainState, adamw, estimate_loss, learning_rate, train

TINY = MoEConfig(vocab_size=11, block_size=8, n_embd=16, n_head=2, n_layer=2, num_experts=4, top_k=2, n_hidden=16)
SHORT = TrainConfig(steps=7, batch_size=4, lr=0.01, warmup=2, eval_every=3, eval_blocks=4)
RESTLESS = replace(TINY, router="noisy", dropout=0.3)  # random wherever it may be


def tiny_model(config=TINY):
    seed_everything(1337)
    return SparseMoELanguageModel(config)


def text(length, vocab_size=11):
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("of", [checks, hidden])
def test_checks(of):
    of.check_estimate_loss(estimate_loss)
    of.check_learning_rate(learning_rate)
    of.check_train(train, TrainConfig, TrainState)


# ---- the schedule


def schedule_by_fractions(step, steps, warmup, final):
    "In units of lr, and exact: the lower of the way up and the way down."
    if step < warmup:
        return Fraction(step + 1, warmup)
    return final + (1 - final) * Fraction(steps - step, steps - warmup)


@given(st.integers(1, 50), st.integers(0, 60), st.integers(0, 4))
def test_schedule_equals_fractions_at_every_step(steps, warmup, quarters):
    config = TrainConfig(steps=steps, warmup=warmup, lr=3e-3, final_lr=quarters / 4)
    rates = [learning_rate(step, config) for step in range(steps)]
    expected = [3e-3 * schedule_by_fractions(step, steps, warmup, Fraction(quarters, 4)) for step in range(steps)]
    assert rates == pytest.approx([float(rate) for rate in expected], rel=1e-12)
    assert all(0 < rate <= config.lr * (1 + 1e-12) for rate in rates)


def test_constant_learning_rate_of_the_article():
    assert [learning_rate(step, TrainConfig.blog()) for step in range(0, 5000, 70)] == pytest.approx([1e-3] * 72)


# ---- the settings


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(steps=0), "steps is 0, but must be at least 1"),
        (dict(batch_size=-1), "batch_size is -1, but must be at least 1"),
        (dict(eval_every=0), "eval_every is 0, but must be at least 1"),
        (dict(eval_blocks=0), "eval_blocks is 0, but must be at least 1"),
        (dict(warmup=-1), "warmup is -1, but must be at least 0"),
        (dict(final_lr=-0.1), "final_lr is -0.1, but must be at least 0"),
        (dict(weight_decay=-1), "weight_decay is -1, but must be at least 0"),
        (dict(lr=0), "lr is 0, but must be above 0"),
        (dict(lr=math.nan), "lr is nan, but must be at least 0 and finite"),
        (dict(lr=math.inf), "lr is inf, but must be at least 0 and finite"),
        (dict(clip=0.0), "clip is 0, but must be above 0"),
        (dict(clip=math.nan), "clip is nan"),
        (dict(beta2=1.0), "beta2 is 1.0, but must be below 1"),
        (dict(seed=-1), "seed is -1, but must be at least 0"),
        (dict(steps=2.5), "steps is 2.5, but must be a whole number"),
        (dict(steps=True), "steps is True, but must be a whole number"),
        (dict(lr="fast"), "lr is 'fast', but must be a number"),
        (dict(lr=None), "lr is None, but must be a number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_presets_take_changes_and_whole_numbers_will_do():
    for preset in TrainConfig.laptop, TrainConfig.gpu, TrainConfig.blog:
        assert preset(steps=3, lr=1) == replace(preset(), steps=3, lr=1)


# ---- the estimate


@given(st.integers(1, 14), st.one_of(st.none(), st.integers(1, 20)), st.integers(1, 5), st.integers(1, 8))
@settings(max_examples=15)
def test_estimate_equals_a_loop_over_contexts_that_are_evenly_spread(fit, blocks, batch_size, extra):
    model, ids = tiny_model().eval(), text(8 * fit + extra)
    count = min(blocks or fit, fit)
    numbers = [math.floor(Fraction(i * fit, count)) for i in range(count)]
    loss, load = estimate_loss(model, ids, batch_size, blocks)
    expected, expected_load = loss_by_loop(model, ids, numbers)
    assert loss == pytest.approx(expected, abs=1e-5) and load == expected_load


def test_only_the_steps_of_a_training_keep_gradients_and_make_noise():
    model, seen = tiny_model(RESTLESS).eval(), []
    model.lm_head.register_forward_hook(lambda head, _, output: seen.append((output.requires_grad, head.training)))
    estimate_loss(model, text(50))
    assert set(seen) == {(False, False)}
    train(model, text(200), text(90), SHORT)
    assert seen.count((True, True)) == SHORT.steps and set(seen) == {(False, False), (True, True)}


# ---- the training


def by_hand(model, ids, config):
    "The same training without torch.optim: AdamW by its equations, the gradient clipped by a norm computed here."
    order = torch.Generator().manual_seed(config.seed)
    weights = list(model.parameters())
    m, v = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    for step in range(config.steps):
        x, y = get_batch(ids, config.batch_size, model.config.block_size, order)
        gradients = torch.autograd.grad(model(x, y).loss, weights)
        norm = sum(g.square().sum() for g in gradients).sqrt().item()
        lr = float(config.lr * schedule_by_fractions(step, config.steps, config.warmup, Fraction(config.final_lr)))
        with torch.no_grad():
            for i, ((name, w), g) in enumerate(zip(model.named_parameters(), gradients)):
                g = g * min(1.0, config.clip / norm)
                m[i] = 0.9 * m[i] + 0.1 * g
                v[i] = config.beta2 * v[i] + (1 - config.beta2) * g**2
                if w.dim() > 1 and not name.endswith("bias"):
                    w -= lr * config.weight_decay * w
                moved = m[i] / (1 - 0.9 ** (step + 1)) / ((v[i] / (1 - config.beta2 ** (step + 1))).sqrt() + 1e-8)
                w -= lr * moved


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(clip=0.05, weight_decay=3.0, beta2=0.5),
        dict(warmup=0, final_lr=1.0, clip=math.inf),
    ],
    ids=["plain", "strong", "constant"],
)
def test_training_equals_adamw_by_hand(changes):
    config = replace(SHORT, steps=5, **changes)
    sizes = replace(TINY, bias=True, norm="layer")  # more vectors
    ours, expected = (tiny_model(sizes) for _ in range(2))
    before = list(ours.parameters())
    train(ours, text(200), text(90), config)
    by_hand(expected, text(200), config)
    assert all(a is b for a, b in zip(ours.parameters(), before)), "in place"
    for (name, w), theirs in zip(ours.named_parameters(), expected.parameters()):
        assert_close(w, theirs, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_only_matrices_decay():
    model = tiny_model(replace(TINY, bias=True, experts="grouped"))
    matrices, vectors = adamw(model, SHORT).param_groups
    names = {weight: name for name, weight in model.named_parameters()}
    assert matrices["weight_decay"] == SHORT.weight_decay and vectors["weight_decay"] == 0
    assert {names[w] for w in vectors["params"]} == {n for w, n in names.items() if n.endswith("bias") or w.dim() == 1}
    assert any(w.dim() == 2 for w in vectors["params"]), "stacked experts have stacked biases"
    assert {*vectors["params"], *matrices["params"]} == set(names)


def test_training_learns_a_repetitive_text():
    words = "to be or not to be, " * 60
    tokenizer = CharTokenizer(words)
    ids = tokenizer.encode(words)
    model = tiny_model(replace(TINY, vocab_size=tokenizer.vocab_size))
    config = TrainConfig(steps=80, batch_size=8, lr=0.02, warmup=10, eval_every=80, eval_blocks=8)
    history = train(model, ids[:1000], ids[1000:], config)
    assert history[0]["val_loss"] == pytest.approx(math.log(tokenizer.vocab_size), abs=0.1)
    assert history[-1]["val_loss"] < 0.5 < math.log(tokenizer.vocab_size) / 4


@pytest.mark.parametrize(
    "steps, every, expected",
    [
        (7, 3, [0, 3, 6, 7]),
        (6, 3, [0, 3, 6]),
        (1, 100, [0, 1]),
        (2, 1, [0, 1, 2]),
    ],
)
def test_records_are_plain_data(steps, every, expected):
    history = train(tiny_model(), text(200), text(90), replace(SHORT, steps=steps, eval_every=every))
    assert [record["step"] for record in history] == expected
    for record in history:
        assert set(record) == {
            "step",
            "seconds",
            "tokens_per_second",
            "train_loss",
            "val_loss",
            "load",
            "imbalance",
            "dropped",
        }
        assert [sum(layer) for layer in record["load"]] == [4 * 8 * 2] * 2
        assert record["dropped"] == [0.0, 0.0]  # no capacity is limited
        assert (record["tokens_per_second"] > 0) == (record["step"] > 0)
    assert history == json.loads(json.dumps(history))
    assert sorted(record["seconds"] for record in history) == [record["seconds"] for record in history]


def test_seconds_go_on_from_those_of_the_state(monkeypatch):
    now = [3.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    model = tiny_model()
    model.register_forward_pre_hook(lambda module, _: now.append(now.pop() + 1) if module.training else None)
    state = TrainState(model, SHORT)
    for stop in 2, None:
        state.stop = False
        history = train(
            model,
            text(200),
            text(90),
            SHORT,
            state=state,
            on_step=lambda state, _, stop=stop: setattr(state, "stop", state.step == stop),
        )
        assert state.seconds == state.step
        now[0] += 1000  # nobody works
    assert [record["seconds"] for record in history] == [0, 3, 6, 7]


def test_same_seed_same_numbers_and_another_seed_others():
    def run(seed):
        model, pythons = tiny_model(RESTLESS), random.getstate()
        history = train(model, text(200), text(90), replace(SHORT, seed=seed))
        assert random.getstate() == pythons
        return [(record["train_loss"], record["val_loss"], record["load"]) for record in history], model.state_dict()

    (history, weights), (again, same), (_, other) = run(3), run(3), run(4)
    assert history == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert not all(torch.equal(weights[name], other[name]) for name in weights)


def test_training_without_cuda_never_asks_for_it(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("touched CUDA")

    for name in "_lazy_init", "is_bf16_supported", "current_device", "synchronize":
        monkeypatch.setattr(torch.cuda, name, refuse)
    types = set()
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
    train(model, text(200), text(90), SHORT)
    assert types == {torch.float32}


def test_a_text_that_is_too_short_is_refused_before_anything_is_learned():
    for ours, held_out in ((text(8), text(90)), (text(90), text(8))):
        model = tiny_model()
        before = model.lm_head.weight.clone()
        with pytest.raises(ValueError, match="a text of 8 tokens is too short"):
            train(model, ours, held_out, SHORT)
        assert torch.equal(model.lm_head.weight, before)


def test_nothing_is_printed(capfd):
    train(tiny_model(), text(200), text(90), SHORT)
    assert capfd.readouterr() == ("", "")


def test_a_loss_that_is_not_finite_stops_with_its_step_and_learning_rate():
    seen = []
    with pytest.raises(FloatingPointError, match=r"^the loss of step \d+ is (nan|inf) \(learning rate 1e\+30\)$"):
        train(tiny_model(), text(200), text(90), replace(SHORT, lr=1e30, warmup=0, final_lr=1.0), on_eval=seen.append)
    assert [record["step"] for record in seen] == [0], "the record of bad weights must not get out"


@pytest.mark.parametrize("bad", range(7))
def test_the_first_bad_step_is_named_wherever_it_comes(bad):
    model, steps = tiny_model(), []

    def spoil(module, inputs, output):
        if module.training:
            steps.append(len(steps))
            if steps[-1] == bad:
                return replace(output, loss=output.loss * math.nan)

    model.register_forward_hook(spoil)
    with pytest.raises(FloatingPointError) as caught:
        train(model, text(200), text(90), SHORT)
    assert str(caught.value) == f"the loss of step {bad} is nan (learning rate {learning_rate(bad, SHORT):.3g})"


def test_losses_are_read_every_ten_steps_and_not_at_each():
    model = tiny_model()
    config = replace(SHORT, steps=35, eval_every=35)
    model.register_forward_hook(
        lambda module, _, output: replace(output, loss=output.loss * math.nan) if module.training else None
    )
    steps = []
    with pytest.raises(FloatingPointError, match="the loss of step 0 is nan"):
        train(model, text(200), text(90), config, on_step=lambda state, loss: steps.append(state.step))
    assert steps == list(range(1, 11))


def test_an_evaluation_that_is_not_finite_stops_before_anything_is_recorded():
    model, seen = tiny_model(), []
    model.lm_head.register_forward_hook(
        lambda head, _, logits: None if head.training or len(seen) < 2 else logits * math.nan
    )
    with pytest.raises(FloatingPointError, match="the loss of step 6 is nan"):
        train(model, text(200), text(90), SHORT, on_eval=seen.append)
    assert len(seen) == 2


def test_stopping_and_going_on_changes_nothing_however_much_is_random():
    runs = []
    for pauses in (), (1, 3, 5):
        model = tiny_model(RESTLESS)  # random numbers begin anew, too
        state = TrainState(model, SHORT)
        for stop in (*pauses, None):
            state.stop = False
            history = train(
                model,
                text(200),
                text(90),
                SHORT,
                state=state,
                on_step=lambda state, _, stop=stop: setattr(state, "stop", state.step == stop),
            )
        runs.append(([(record["step"], record["val_loss"]) for record in history], model.state_dict()))
    (one, weights), (other, other_weights) = runs
    assert one == other
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_a_state_that_has_stopped_or_is_done_takes_no_step():
    model = tiny_model()
    state = TrainState(model, SHORT)
    train(model, text(200), text(90), SHORT, state=state)
    before = model.lm_head.weight.clone()
    assert len(train(model, text(200), text(90), SHORT, state=state)) == 4
    state.step, state.stop = 2, True
    train(model, text(200), text(90), SHORT, state=state)
    assert torch.equal(model.lm_head.weight, before) and state.step == 2
