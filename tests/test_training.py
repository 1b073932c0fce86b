"""Lesson 11. The oracles: loops over single blocks, a schedule in fractions, and AdamW by its equations."""

import functools
import importlib.util
import json
import math
import os
import random
import sys
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from makemoe import training
from makemoe.data import CharTokenizer, get_batch
from makemoe.lab import seed_everything
from makemoe.model import MoEConfig, SparseMoELanguageModel
from makemoe.training import (
    TrainConfig, TrainingState, describe, estimate_loss, imbalance, learning_rate, live_plots, load_checkpoint, mlflow_run,
    save_checkpoint, train,
)

TINY = MoEConfig(vocab_size=11, block_size=8, n_embd=16, n_head=2, n_layer=2, num_experts=4, top_k=2, n_hidden=16)
SHORT = TrainConfig(steps=7, batch_size=4, lr=0.01, warmup=2, eval_every=3, eval_blocks=4)
RESTLESS = replace(TINY, router="noisy", dropout=0.3)  # random wherever it may be


def tiny_model(config=TINY):
    seed_everything(1337)
    return SparseMoELanguageModel(config)


def stream(length, vocab_size=11):
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(length))


# ---- the schedule


def schedule_by_fractions(step, steps, warmup, final):
    "In units of lr, and exact: the lower of the way up and the way down."
    if step < warmup:
        return Fraction(step + 1, warmup)
    return final + (1 - final) * Fraction(steps - step, steps - warmup)


@given(st.integers(1, 50), st.integers(0, 60), st.integers(0, 4))
def test_schedule_equals_fractions_at_every_step(steps, warmup, quarters):
    config = TrainConfig(steps=steps, warmup=warmup, lr=3e-3, final_lr=quarters / 4)
    for step in range(steps):
        expected = 3e-3 * schedule_by_fractions(step, steps, warmup, Fraction(quarters, 4))
        assert learning_rate(step, config) == pytest.approx(float(expected), rel=1e-12)


def test_schedule_at_its_corners():
    config = TrainConfig(steps=1000, warmup=100, lr=1.0, final_lr=0.0)
    corners = {0: 0.01, 99: 1.0, 100: 1.0, 550: 0.5, 999: 1 / 900, 1000: 0.0}
    for step, expected in corners.items():
        assert learning_rate(step, config) == pytest.approx(expected)


@given(st.integers(1, 200), st.integers(0, 200))
def test_every_step_moves_and_none_exceeds_lr(steps, warmup):
    config = TrainConfig(steps=steps, warmup=warmup)
    rates = [learning_rate(step, config) for step in range(steps)]
    assert all(0 < rate <= config.lr * (1 + 1e-12) for rate in rates)
    assert warmup > steps or max(rates) == pytest.approx(config.lr)


def test_constant_learning_rate_of_the_article():
    assert [learning_rate(step, TrainConfig.blog()) for step in range(0, 5000, 70)] == pytest.approx([1e-3] * 72)


# ---- the settings


@pytest.mark.parametrize("changes, message", [
    (dict(steps=0), "steps is 0, but must be at least 1"),
    (dict(batch_size=-1), "batch_size is -1, but must be at least 1"),
    (dict(eval_every=0), "eval_every is 0, but must be at least 1"),
    (dict(eval_blocks=0), "eval_blocks is 0, but must be at least 1"),
    (dict(warmup=-1), "warmup is -1, but must be at least 0"),
    (dict(final_lr=-0.1), "final_lr is -0.1, but must be at least 0"),
    (dict(weight_decay=-1), "weight_decay is -1, but must be at least 0"),
    (dict(lr=0), "lr is 0, but must be above 0"),
    (dict(lr=math.nan), "lr is nan, but must be above 0"),
    (dict(clip=0), "clip is 0, but must be above 0"),
    (dict(beta2=1.0), "beta2 is 1.0, but must be below 1"),
    (dict(beta2=math.nan), "beta2 is nan, but must be at least 0"),
    (dict(optimizer="sgd"), "optimizer is 'sgd', but must be one of adamw, muon"),
])
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_presets_take_changes():
    for preset in TrainConfig.laptop, TrainConfig.gpu, TrainConfig.blog:
        assert preset(steps=3, lr=0.5) == replace(preset(), steps=3, lr=0.5)


# ---- the estimate


def loss_by_loop(model, ids, numbers):
    "Mean over single blocks, one at a time, cross-entropy written out; and the loads."
    T, losses, load = model.config.block_size, [], 0
    with torch.no_grad():
        for i in numbers:
            output = model(ids[None, i * T : i * T + T])
            log_probs = output.logits[0].log_softmax(-1)
            losses += [-log_probs[t, ids[i * T + t + 1]].item() for t in range(T)]
            load = load + torch.stack([routing.kept.sum((0, 1)) for routing in output.routings])
    return sum(losses) / len(losses), load.tolist()


def test_estimate_of_ten_blocks_and_of_three_of_them():
    model, ids = tiny_model().eval(), stream(85)
    for blocks, numbers in (None, range(10)), (3, (0, 3, 6)):
        loss, load = estimate_loss(model, ids, 4, blocks)
        expected, expected_load = loss_by_loop(model, ids, numbers)
        assert loss == pytest.approx(expected, abs=1e-5) and load == expected_load


@given(st.integers(9, 90), st.integers(1, 7))
@settings(max_examples=15)
def test_estimate_equals_a_loop_over_all_blocks(length, batch_size):
    model, ids = tiny_model().eval(), stream(length)
    loss, load = estimate_loss(model, ids, batch_size)
    expected, expected_load = loss_by_loop(model, ids, range((length - 1) // 8))
    assert loss == pytest.approx(expected, abs=1e-5)
    assert load == expected_load


@given(st.integers(1, 14), st.integers(1, 20), st.integers(1, 5))
@settings(max_examples=15)
def test_estimate_of_some_blocks_takes_them_evenly_spread(fit, blocks, batch_size):
    model, ids = tiny_model().eval(), stream(8 * fit + 5)
    count = min(blocks, fit)
    numbers = [math.floor(Fraction(i * fit, count)) for i in range(count)]
    assert len(set(numbers)) == count and numbers[0] == 0
    loss, load = estimate_loss(model, ids, batch_size, blocks)
    expected, expected_load = loss_by_loop(model, ids, numbers)
    assert loss == pytest.approx(expected, abs=1e-5)
    assert load == expected_load


def test_estimate_of_the_shortest_stream_and_of_one_that_is_too_short():
    model = tiny_model().eval()
    ids = stream(9)
    assert estimate_loss(model, ids)[0] == pytest.approx(model(ids[None, :8], ids[None, 1:]).lm_loss.item(), abs=1e-6)
    for length in 8, 1, 0:
        with pytest.raises(ValueError, match=f"a text of {length} tokens is too short for a block of 8 and its next"):
            estimate_loss(model, ids[:length])


def test_estimate_reads_no_more_blocks_at_a_time_than_it_may():
    model, sizes = tiny_model(), []
    model.lm_head.register_forward_hook(lambda head, inputs, logits: sizes.append(len(logits)))
    for batch_size in 1, 3, 40:
        sizes.clear()
        estimate_loss(model, stream(8 * 40 + 1), batch_size)
        assert max(sizes) <= batch_size and sum(sizes) == 40


def test_estimate_counts_what_was_carried_out_and_not_what_was_chosen():
    model = tiny_model(replace(TINY, capacity_factor=4.0, eval_capacity_factor=0.5))
    _, load = estimate_loss(model, stream(81), batch_size=3)
    assert load == loss_by_loop(model.eval(), stream(81), range(10))[1]
    assert sum(load[0]) < 10 * 8 * 2


@pytest.mark.parametrize("mode", [True, False])
def test_estimate_disturbs_nothing(mode):
    model, ids = tiny_model(RESTLESS), stream(100)
    model(ids[None, :8], ids[None, 1:9]).loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.train(mode)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    state, pythons = torch.get_rng_state(), random.getstate()
    first = estimate_loss(model, ids, batch_size=5)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == pythons
    assert all(module.training == mode for module in model.modules())
    assert estimate_loss(model, ids, batch_size=5) == first  # no noise, whatever the mode outside
    assert all(torch.equal(p.grad, before) for p, before in zip(model.parameters(), gradients))
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert isinstance(first[0], float) and all(isinstance(count, int) for layer in first[1] for count in layer)


def test_only_the_steps_of_a_training_keep_gradients_and_make_noise():
    model, seen = tiny_model(RESTLESS).eval(), []
    model.lm_head.register_forward_hook(lambda head, _, output: seen.append((output.requires_grad, head.training)))
    estimate_loss(model, stream(50))
    assert set(seen) == {(False, False)}
    train(model, stream(200), stream(90), SHORT)
    assert seen.count((True, True)) == SHORT.steps and set(seen) == {(False, False), (True, True)}


def test_estimate_puts_the_mode_back_when_it_is_interrupted():
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        estimate_loss(model, stream(50))
    assert model.training


def test_estimate_counts_every_choice():
    _, load = estimate_loss(tiny_model(), stream(8 * 6 + 1), batch_size=4)
    assert [len(layer) for layer in load] == [4, 4]
    assert [sum(layer) for layer in load] == [6 * 8 * 2] * 2


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


@pytest.mark.parametrize("changes", [
    {}, dict(clip=0.05, weight_decay=3.0, beta2=0.5), dict(warmup=0, final_lr=1.0, clip=math.inf),
], ids=["plain", "strong", "constant"])
def test_training_equals_adamw_by_hand(changes):
    config = replace(SHORT, steps=5, **changes)
    sizes = replace(TINY, bias=True, norm="layer")  # more vectors
    ours, expected = (tiny_model(sizes) for _ in range(2))
    train(ours, stream(200), stream(90), config)
    by_hand(expected, stream(200), config)
    for (name, w), theirs in zip(ours.named_parameters(), expected.parameters()):
        assert_close(w, theirs, rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")


def test_training_learns_a_repetitive_text():
    text = "to be or not to be, " * 60
    tokenizer = CharTokenizer(text)
    ids = tokenizer.encode(text)
    model = tiny_model(replace(TINY, vocab_size=tokenizer.vocab_size))
    config = TrainConfig(steps=80, batch_size=8, lr=0.02, warmup=10, eval_every=80, eval_blocks=8)
    history = train(model, ids[:1000], ids[1000:], config)
    assert history[0]["val_loss"] == pytest.approx(math.log(tokenizer.vocab_size), abs=0.1)
    assert history[-1]["val_loss"] < 0.5 < math.log(tokenizer.vocab_size) / 4


@pytest.mark.parametrize("steps, every, expected", [
    (7, 3, [0, 3, 6, 7]), (6, 3, [0, 3, 6]), (1, 100, [0, 1]), (2, 1, [0, 1, 2]),
])
def test_records_come_at_the_start_regularly_and_at_the_end(steps, every, expected):
    model, seen, at = tiny_model(), [], []
    config = replace(SHORT, steps=steps, eval_every=every)
    state = TrainingState(model, config)
    history = train(model, stream(200), stream(90), config, lambda record: [seen.append(dict(record)), at.append(state.step)], state)
    assert [record["step"] for record in history] == at == expected  # each was made and called with when it was due
    assert seen == history
    for record in history:
        assert set(record) == {"step", "seconds", "tokens_per_second", "train_loss", "val_loss", "load", "imbalance", "dropped"}
        assert [len(layer) for layer in record["load"]] == [4, 4]
        loads = torch.tensor(record["load"], dtype=torch.double)
        assert record["imbalance"] == pytest.approx((loads.amax(-1) / loads.mean(-1)).tolist())
        assert record["dropped"] == [0.0, 0.0]  # nobody's seats are limited
        assert (record["tokens_per_second"] > 0) == (record["step"] > 0)
        assert [sum(layer) for layer in record["load"]] == [4 * 8 * 2] * 2
    assert history == json.loads(json.dumps(history))  # plain data
    assert sorted(record["seconds"] for record in history) == [record["seconds"] for record in history]


def test_a_record_tells_training_text_from_held_out_text_and_hears_no_noise():
    model = tiny_model(RESTLESS)
    ours, held_out = stream(200) % 3, stream(90)  # very different texts
    records = train(model, ours, held_out, SHORT)
    assert not model.training
    model.train()  # noise outside must not matter
    train_loss, _ = estimate_loss(model, ours, 4, 4)
    val_loss, load = estimate_loss(model, held_out, 4, 4)
    assert (records[-1]["train_loss"], records[-1]["val_loss"], records[-1]["load"]) == (train_loss, val_loss, load)
    assert train_loss < val_loss - 0.01


@pytest.mark.parametrize("load, expected", [([[3, 3, 3]], [1]), ([[8, 0, 0, 0], [2, 1, 1, 0]], [4, 2])])
def test_imbalance_of_loads_by_hand(load, expected):
    assert imbalance(load) == expected


def test_dropped_is_what_the_last_batch_lost_in_training_whatever_evaluation_would_drop():
    model, seen = tiny_model(replace(TINY, block_size=16, capacity_factor=0.5, eval_capacity_factor=4.0)), []
    for block in model.blocks:
        block.moe.router.register_forward_hook(
            lambda router, _, routing: seen.append(1 - routing.kept.sum().item() / routing.chosen.sum().item()) if router.training else None)
    for record in train(model, stream(200), stream(90), replace(SHORT, eval_every=1)):
        step = record["step"]
        assert record["dropped"] == pytest.approx(seen[2 * step - 2 : 2 * step] or [0.0, 0.0], abs=1e-6)
    assert min(record["dropped"]) > 0.2


def test_tokens_per_second_are_those_of_the_steps_alone(monkeypatch):
    "A clock by hand: a step takes 1 second, an evaluation 50, what is done with a record 70."
    now = [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    model = tiny_model()
    model.register_forward_pre_hook(lambda module, _: spend(1) if module.training else None)
    now[0] = 3.0
    monkeypatch.setattr(training, "estimate_loss", lambda *_, **__: [spend(25), (1.0, [[1, 1]])][1])  # of each text
    history = train(model, stream(200), stream(90), SHORT, on_eval=lambda record: spend(70))
    speeds = [record["tokens_per_second"] for record in history[1:]]
    assert speeds == pytest.approx([4 * 8] * 3)  # batch_size * block_size
    assert [record["seconds"] for record in history] == [50, 173, 296, 417]


def test_a_record_in_short():
    record = dict(train_loss=1.0, val_loss=2.0, imbalance=[1.25, 3.5, 2.0], dropped=[0.0, 0.125])
    assert describe(record) == "val 2.000, imbalance 3.50, dropped 12.5%"


def test_evaluating_more_often_changes_nothing():
    runs = []
    for every in 1, 7:
        model = tiny_model(RESTLESS)
        runs.append((train(model, stream(200), stream(90), replace(SHORT, eval_every=every))[-1], model.state_dict()))
    (one, weights), (other, other_weights) = runs
    assert one["val_loss"] == other["val_loss"]
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_same_seed_same_numbers_and_another_seed_others():
    def run(seed):
        model = tiny_model(RESTLESS)
        history = train(model, stream(200), stream(90), replace(SHORT, seed=seed))
        return [(record["train_loss"], record["val_loss"], record["load"]) for record in history], model.state_dict()

    (history, weights), (again, same), (_, other) = run(3), run(3), run(4)
    assert history == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert not all(torch.equal(weights[name], other[name]) for name in weights)


def test_training_works_in_place():
    model = tiny_model()
    weights = list(model.parameters())
    before = [w.detach().clone() for w in weights]
    train(model, stream(200), stream(90), SHORT)
    assert all(a is b for a, b in zip(model.parameters(), weights))
    assert all(not torch.equal(w, old) for w, old in zip(weights, before))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_matrices_decay_and_the_schedule_is_followed(monkeypatch, optimizer):
    seen = []

    class Spy(training.Muon):
        def step(self, *arguments, **settings):
            seen.append([(g["lr"], g["weight_decay"], {id(p) for p in g["params"]}) for g in self.param_groups])
            return super().step(*arguments, **settings)

    monkeypatch.setattr(training, "Muon", Spy)
    model = tiny_model(replace(TINY, bias=True))
    train(model, stream(200), stream(90), replace(SHORT, optimizer=optimizer))
    biases = {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    vectors = biases | {id(p) for p in model.parameters() if p.dim() == 1}
    matrices = {id(p) for p in model.parameters()} - vectors
    qkv = {id(block.attention.qkv.weight) for block in model.blocks if optimizer == "muon"}
    hidden = {id(p) for block in model.blocks for p in (block.attention.proj.weight, *block.moe.experts.parameters())
              if optimizer == "muon"} - vectors
    assert any(p.dim() == 2 and id(p) in biases for p in model.parameters()), "stacked experts have stacked biases"
    rates = [learning_rate(step, SHORT) for step in range(SHORT.steps)]
    decay = SHORT.weight_decay
    assert seen == [[(rate, decay, matrices - hidden - qkv), (rate, 0.0, vectors), (rate, decay, hidden), (rate, decay, qkv)]
                    for rate in rates]


# ---- Muon


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24), (3, 12, 5), (2, 3, 5, 12)])
def test_orthogonalizing_keeps_the_directions_and_evens_out_the_singular_values(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.double)
    U, s, V = torch.linalg.svd(x, full_matrices=False)
    expected = s / s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    found = training.orthogonalize(x)
    assert_close(found, U @ torch.diag_embed(expected) @ V)
    assert_close(training.orthogonalize(1e-5 * x), found, rtol=1e-6, atol=1e-9)
    assert_close(training.orthogonalize(x.float()), found.float(), rtol=1e-4, atol=1e-4)
    assert 0.6 < expected.median() < 1.3


def test_nothing_is_made_of_nothing():
    assert torch.equal(training.orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 64)])
def test_muon_is_that_of_pytorch(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = (training.Muon([dict(params=[ours], momentum=0.95, parts=1)], lr=0.1, weight_decay=0.3),
                  torch.optim.Muon([theirs], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"))
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        # PyTorch computes in bfloat16: errors of some 1 % of a step, whose numbers are about 0.02
        assert (ours - theirs).square().mean().sqrt() < 0.02 * (ours - start).square().mean().sqrt()


def test_stacked_matrices_are_many_and_the_rest_is_left_to_adamw():
    torch.manual_seed(0)
    stacked, tall, vector = (torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 8, 4), (15, 5), (5,)))
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in (*stacked.data, *tall.data.split(5))]
    same = torch.nn.Parameter(vector.data.clone())
    groups = [dict(params=[vector]), dict(params=[stacked], momentum=0.9, parts=1), dict(params=[tall], momentum=0.9, parts=3)]
    one, many = training.Muon(groups, lr=0.1), training.Muon([dict(params=alone, momentum=0.9, parts=1)], lr=0.1)
    adamw = torch.optim.AdamW([same], lr=0.1)
    for _ in range(3):
        for weight in stacked, tall, vector:
            weight.grad = torch.randn_like(weight)
        for weight, gradient in zip([*alone, same], [*stacked.grad, *tall.grad.split(5), vector.grad]):
            weight.grad = gradient.clone()
        for optimizer in one, many, adamw:
            optimizer.step()
    assert_close(stacked.data, torch.stack([weight.data for weight in alone[:3]]))
    assert_close(tall.data, torch.cat([weight.data for weight in alone[3:]]))
    assert torch.equal(vector, same)


def test_muon_passes_over_a_matrix_without_gradient():
    matrix = torch.nn.Parameter(torch.ones(2, 2))
    training.Muon([dict(params=[matrix], momentum=0.9, parts=1)], lr=0.1).step()
    assert torch.equal(matrix, torch.ones(2, 2))


def test_training_without_cuda_never_asks_for_it(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("touched CUDA")

    for name in "_lazy_init", "is_bf16_supported", "current_device", "synchronize":
        monkeypatch.setattr(torch.cuda, name, refuse)
    dtypes = set()
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    train(model, stream(200), stream(90), SHORT)
    assert dtypes == {torch.float32}


def test_a_text_that_is_too_short_is_refused_before_anything_is_learned():
    for ours, held_out in ((stream(8), stream(90)), (stream(90), stream(8))):
        model = tiny_model()
        before = model.lm_head.weight.clone()
        with pytest.raises(ValueError, match="a text of 8 tokens is too short"):
            train(model, ours, held_out, SHORT)
        assert torch.equal(model.lm_head.weight, before)


def test_no_progress_bar_where_nobody_looks(capfd):
    train(tiny_model(), stream(200), stream(90), SHORT)
    assert capfd.readouterr() == ("", "")


def test_the_bar_in_a_terminal_has_one_line_with_step_loss_and_time(monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(training, "tqdm", functools.partial(training.tqdm, mininterval=0))  # draw every step
    monkeypatch.setenv("COLUMNS", "110")
    train(tiny_model(), stream(200), stream(90), replace(SHORT, steps=12))
    bar = capfd.readouterr().err
    assert bar.endswith("\n") and bar.count("\n") == 1
    last = bar.split("\r")[-1]
    for piece in "100%", "12/12", "val ", "imbalance ", "dropped 0.0%":
        assert piece in last
    assert any("/12 [" in line and "loss " in line for line in bar.split("\r"))  # that of the last batch


def test_an_interrupted_training_leaves_a_model_that_has_learned():
    def stop(record):
        if record["step"] == 3:
            raise KeyboardInterrupt

    model = tiny_model()
    before = model.lm_head.weight.clone()
    with pytest.raises(KeyboardInterrupt):
        train(model, stream(200), stream(90), SHORT, on_eval=stop)
    assert not torch.equal(model.lm_head.weight, before)


def test_a_loss_that_is_not_finite_stops_with_its_step_and_learning_rate():
    seen = []
    model = tiny_model()
    with pytest.raises(FloatingPointError, match=r"^the loss of step \d+ is (nan|inf) \(learning rate .*\)$") as caught:
        train(model, stream(200), stream(90), replace(SHORT, lr=1e30, warmup=0, final_lr=1.0), on_eval=seen.append)
    assert "learning rate 1e+30" in str(caught.value)
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
    rate = f"{learning_rate(bad, SHORT):.3g}"
    with pytest.raises(FloatingPointError) as caught:
        train(model, stream(200), stream(90), SHORT)
    assert str(caught.value) == f"the loss of step {bad} is nan (learning rate {rate})"


def test_an_evaluation_that_is_not_finite_stops_before_anything_is_saved():
    model, seen = tiny_model(), []
    model.lm_head.register_forward_hook(lambda head, _, logits: None if head.training or len(seen) < 2 else logits * math.nan)
    with pytest.raises(FloatingPointError, match="the loss of step 6 is nan"):
        train(model, stream(200), stream(90), SHORT, on_eval=seen.append)
    assert len(seen) == 2


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_training_asked_to_stop_ends_after_the_step_at_hand(at):
    model = tiny_model()
    state = TrainingState(model, SHORT)
    steps = []
    model.register_forward_pre_hook(lambda module, _: steps.append(state.step) if module.training else None)
    model.lm_head.register_forward_hook(lambda *_: setattr(state, "stop", len(steps) == at))  # in the middle of step `at`
    history = train(model, stream(200), stream(90), SHORT, state=state)
    assert state.step == at == len(steps)
    assert history == state.history and [record["step"] for record in history] == [s for s in (0, 3, 6) if s <= at]
    assert not model.training


def test_stopping_and_going_on_changes_nothing_however_much_is_random():
    runs = []
    for pauses in (), (1, 3, 5):
        model = tiny_model(RESTLESS)  # random numbers begin anew, too
        state = TrainingState(model, SHORT)
        model.register_forward_pre_hook(
            lambda module, _: setattr(state, "stop", state.stop or module.training and state.step + 1 in pauses))
        for _ in (*pauses, "to the end"):
            state.stop = False
            history = train(model, stream(200), stream(90), SHORT, state=state)
        runs.append(([(record["step"], record["val_loss"]) for record in history], model.state_dict()))
    (one, weights), (other, other_weights) = runs
    assert one == other
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_a_training_asked_to_stop_at_a_bad_step_still_says_so():
    model = tiny_model()
    state = TrainingState(model, SHORT)

    def spoil(module, inputs, output):
        if module.training and state.step == 4:
            state.stop = True
            return replace(output, loss=output.loss * math.nan)

    model.register_forward_hook(spoil)
    with pytest.raises(FloatingPointError, match="the loss of step 4 is nan"):
        train(model, stream(200), stream(90), SHORT, state=state)


# ---- watching it in a notebook


def test_live_pictures_show_the_history_so_far_and_replace_each_other(monkeypatch):
    import IPython.display
    import matplotlib.pyplot as plt

    seen = []
    monkeypatch.setattr(IPython.display, "clear_output", lambda wait: seen.append(f"clear, wait={wait}"))
    monkeypatch.setattr(IPython.display, "display", lambda figure: seen.append(figure))
    train(tiny_model(), stream(200), stream(90), SHORT, on_eval=live_plots())
    assert seen[::3] == ["clear, wait=True"] * 4
    lines = [len(figure.axes[0].lines[0].get_xdata()) for figure in seen[1::3]]
    assert lines == [1, 2, 3, 4]
    assert all(len(figure.axes) == 2 for figure in seen[2::3])  # a panel for each layer
    assert plt.get_fignums() == []


# ---- MLflow


def test_mlflow_is_not_imported_unless_asked_for(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mlflow", None)  # from here on its import fails
    spec = importlib.util.find_spec("makemoe.training")
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert len(fresh.train(tiny_model(), stream(200), stream(90), fresh.TrainConfig(steps=1, eval_blocks=4))) == 2
    with pytest.raises(ImportError, match="mlflow"), fresh.mlflow_run({}, tmp_path):
        pass


def test_mlflow_gives_back_what_was_logged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "not made yet"
    params = {"data": "shakespeare", **asdict(TINY), **asdict(SHORT)}
    with mlflow_run(params, folder, name="first") as log:
        history = train(tiny_model(), stream(200), stream(90), SHORT, on_eval=log)
    (tmp_path / "note.txt").write_text("to be")
    with pytest.raises(KeyboardInterrupt), mlflow_run({}, folder, name="second") as log:  # the experiment is there already
        log.file(tmp_path / "note.txt")
        raise KeyboardInterrupt
    with mlflow_run({"other": 1}, folder, name="second", resume=True) as log:  # goes on
        log(history[-1])
    with mlflow_run({}, folder, name="third", resume=True):  # there is none of this name: a new one
        pass

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder.as_posix()}/mlflow.db")
    experiment = client.get_experiment_by_name("makemoe")
    assert experiment.artifact_location == (folder / "mlruns").as_uri()
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(("first", "second", "third"), "FINISHED")
    assert len(client.search_runs([experiment.experiment_id])) == 3
    assert runs["second"].data.metrics["val_loss"] == history[-1]["val_loss"]
    assert (folder / "mlruns" / runs["second"].info.run_id / "artifacts" / "note.txt").read_text() == "to be"
    run = runs["first"]
    assert run.data.params == {key: str(value) for key, value in params.items()}
    for name in "train_loss", "val_loss", "seconds", "tokens_per_second":
        points = client.get_metric_history(run.info.run_id, name)
        assert [(point.step, point.value) for point in points] == [(r["step"], r[name]) for r in history]
    for layer in range(2):
        points = client.get_metric_history(run.info.run_id, f"dropped_{layer}")
        assert [point.value for point in points] == [r["dropped"][layer] for r in history]
        points = client.get_metric_history(run.info.run_id, f"imbalance_{layer}")
        expected = [torch.tensor(r["load"][layer], dtype=torch.double) for r in history]
        assert [point.value for point in points] == pytest.approx([(e.max() / e.mean()).item() for e in expected])
    assert {path.name for path in tmp_path.iterdir()} == {"not made yet", "note.txt"}  # nothing beside the folder


def test_mlflow_logs_into_the_project_by_default_whatever_the_current_folder(tmp_path, monkeypatch):
    import mlflow

    class Reached(Exception):
        pass

    def stop_here(uri):
        raise Reached(uri)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mlflow, "set_tracking_uri", stop_here)
    with pytest.raises(Reached) as caught, mlflow_run({}):
        pass
    assert str(caught.value) == f"sqlite:///{Path(training.__file__).parents[1].as_posix()}/mlflow.db"


# ---- checkpoints


@pytest.mark.parametrize("preset", ["laptop", "gpu", "blog"])
def test_checkpoint_gives_back_the_same_model_bit_for_bit(tmp_path, preset):
    text = "Größe, \"wörtlich\"\n\u2029 ☃ to be"  # characters outside ASCII too
    tokenizer = CharTokenizer(text)
    small = dict(vocab_size=tokenizer.vocab_size, block_size=8, n_embd=24, n_layer=2, n_hidden=16)
    config = getattr(MoEConfig, preset)(**(small | ({"n_head": 4} if preset == "blog" else {})))
    model = SparseMoELanguageModel(config)
    history = [dict(step=0, seconds=0.1, train_loss=1 / 3, val_loss=math.inf, load=[[1, 2]])]
    path = tmp_path / "new folder" / "model.v1.5"
    save_checkpoint(path, model, tokenizer, history)
    assert model.training  # saving changes nothing
    loaded, same, again = load_checkpoint(path)
    assert not loaded.training and loaded.config == config
    assert same.characters == tokenizer.characters and same.decode(same.encode(text)) == text
    assert again == history
    ids = tokenizer.encode(text)[None, :8]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_checkpoint_after_training_is_the_trained_model(tmp_path):
    model = tiny_model()
    history = train(model, stream(200), stream(90), SHORT)
    save_checkpoint(tmp_path / "m", model, CharTokenizer("abcdefghijk"), history)
    loaded, _, again = load_checkpoint(str(tmp_path / "m"))
    assert estimate_loss(loaded, stream(90), 4, 4)[0] == history[-1]["val_loss"]
    assert again == history


def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, tiny_model(), CharTokenizer("abcdefghijk"), [])
    return path


def test_a_loaded_model_can_be_trained_and_saved_over_its_own_file(tmp_path):
    path = saved(tmp_path)
    model, tokenizer, history = load_checkpoint(path)
    train(model, stream(200), stream(90), SHORT)
    save_checkpoint(path, model, tokenizer, history)
    assert torch.equal(load_checkpoint(path)[0].lm_head.weight, model.lm_head.weight)


def test_a_crash_at_any_byte_of_a_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    "Every write ends after some bytes, as the power fails: then nothing else happens, not even tidying up."
    path = saved(tmp_path)
    before = path.read_bytes()
    for cut in [0, 1, 7, 8, 9, 500, len(before) // 2, len(before) - 1, len(before), None]:
        with monkeypatch.context() as power:
            def open_until_the_cut(name, mode, cut=cut):
                file = open(name, mode)
                file.write, whole = (lambda content: [whole(content[:cut]), file.close(), fail()]), file.write
                return file

            def fail(*_):
                raise SystemExit("power cut")

            if cut is None:
                power.setattr(training.os, "replace", fail)
            else:
                power.setattr(training, "open", open_until_the_cut, raising=False)
            with pytest.raises(SystemExit, match="power cut"):
                save_checkpoint(path, tiny_model(RESTLESS), CharTokenizer("abcdefghijk"))
        assert path.read_bytes() == before
    save_checkpoint(path, tiny_model(RESTLESS), CharTokenizer("abcdefghijk"))  # and after all that it still works
    assert load_checkpoint(path)[0].config == RESTLESS
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_new_file_is_flushed_to_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    path, seen = saved(tmp_path), []
    size = path.stat().st_size
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: [seen.append(("sync", os.fstat(number).st_size)), sync(number)])
    monkeypatch.setattr(os, "replace", lambda a, b: [seen.append(("replace", Path(a).stat().st_size)), rename(a, b)])
    save_checkpoint(path, tiny_model(), CharTokenizer("abcdefghijk"), [])
    assert seen[:2] == [("sync", size), ("replace", size)]
    assert os.name != "posix" or [what for what, _ in seen[2:]] == ["sync"], "the folder, too"


def test_a_full_disk_and_a_folder_that_cannot_be_written_are_one_line_and_lose_nothing(tmp_path, monkeypatch):
    path = saved(tmp_path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(training.os, "fsync", full)
        with pytest.raises(OSError) as caught:
            save_checkpoint(path, tiny_model(RESTLESS), CharTokenizer("abcdefghijk"))
    assert str(caught.value) == f"cannot save {path} (No space left on device); what was saved there before is whole"
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(OSError, match=r"cannot save .*\((Not a directory|File exists)\)"):
        save_checkpoint(path / "below a file" / "m", tiny_model(), CharTokenizer("abcdefghijk"))
    assert path.read_bytes() == before


def test_files_without_a_version_still_load_and_those_of_a_later_one_say_so(tmp_path):
    path, written = saved(tmp_path), []
    rewrite(path, lambda facts: [facts, written.append(facts["version"])][0])
    assert written == [training.VERSION]
    rewrite(path, lambda facts: {key: value for key, value in facts.items() if key != "version"})
    load_checkpoint(path)
    rewrite(path, lambda facts: dict(config="of another shape", version=training.VERSION + 1))
    refused(path, "was saved by a newer version of makemoe: update makemoe to load it")
    rewrite(path, lambda facts: dict(facts, version="newest"))
    refused(path, "does not fit this version of makemoe")


def test_the_model_that_comes_with_the_project_loads():
    model, tokenizer, history = load_checkpoint(Path(__file__).parent.parent / "data" / "lab.safetensors")
    assert model.config.vocab_size == tokenizer.vocab_size == 64 and len(history) > 2


def rewrite(path, change_facts=lambda facts: facts, change_weights=lambda weights: weights):
    "The checkpoint with other facts or weights."
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["makemoe"])
    save_file(change_weights(load_file(path)), path, metadata={"makemoe": json.dumps(change_facts(facts))})


def refused(path, match):
    with pytest.raises(ValueError, match=match) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path)) and len(message) < len(str(path)) + 300
    return message


def test_missing_checkpoint_says_how_to_make_one(tmp_path):
    for path in tmp_path / "none.safetensors", tmp_path:  # a folder is no checkpoint either
        with pytest.raises(FileNotFoundError, match="no checkpoint .*: train one with `python -m makemoe train`"):
            load_checkpoint(path)


def test_truncated_checkpoint_is_refused_wherever_it_was_cut(tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    for length in 0, 5, 8, 100, len(whole) // 2, len(whole) - 1:
        path.write_bytes(whole[:length])
        refused(path, "is not a safetensors file, or not all of one")


@pytest.mark.parametrize("content", [b"to be or not to be", b"PK\x03\x04" + bytes(100), b"\x80\x02}q\x00."])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused(path, "is not a safetensors file, or not all of one")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_of_somebody_else_are_refused(tmp_path, metadata):
    path = tmp_path / "bert.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
    refused(path, "is a safetensors file, but not a checkpoint of makemoe")


@pytest.mark.parametrize("change, match", [
    (lambda facts: facts["config"].update(n_layer=3), "Missing key"),
    (lambda facts: facts["config"].update(n_embd=32), "size mismatch"),
    (lambda facts: facts["config"].update(n_layer=0), "n_layer is 0, but must be at least 1"),
    (lambda facts: facts["config"].update(future_setting=1), "future_setting"),
    (lambda facts: facts["config"].update(n_embd="many"), "TypeError"),
    (lambda facts: facts.update(config=None), "TypeError"),
    (lambda facts: facts.update(characters="abc"), "3 characters for 11 tokens"),
    (lambda facts: facts.update(characters=7), "TypeError"),
    (lambda facts: facts.pop("config"), "KeyError: 'config'"),
    (lambda facts: facts.pop("characters"), "KeyError: 'characters'"),
    (lambda facts: facts.pop("history"), "KeyError: 'history'"),
])
def test_a_header_that_does_not_fit_is_refused(tmp_path, change, match):
    path = saved(tmp_path)
    rewrite(path, lambda facts: [facts, change(facts)][0])
    assert match in refused(path, "does not fit this version of makemoe")


@pytest.mark.parametrize("header", ["not json", "[1, 2]", "null", '"config"', '{"config": {'])
def test_a_header_that_is_no_object_is_refused(tmp_path, header):
    path = saved(tmp_path)
    save_file(load_file(path), path, metadata={"makemoe": header})
    refused(path, "does not fit this version of makemoe")


def test_weights_too_many_and_too_few_are_refused(tmp_path):
    path = saved(tmp_path)
    rewrite(path, change_weights=lambda weights: weights | {"extra": torch.zeros(1)})
    assert "extra" in refused(path, "does not fit")
    path = saved(tmp_path)
    rewrite(path, change_weights=lambda weights: {k: w for k, w in weights.items() if k != "norm.weight"})
    assert "norm.weight" in refused(path, "does not fit")


def test_nothing_is_pickled(tmp_path, monkeypatch):
    import pickle

    def refuse(*_, **__):
        raise AssertionError("pickle")

    for name in "load", "loads", "dump", "dumps", "Unpickler", "Pickler":
        monkeypatch.setattr(pickle, name, refuse)
    load_checkpoint(saved(tmp_path))
