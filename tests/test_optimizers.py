"""Lesson 14. The oracles: PyTorch's AdamW and Muon, singular values, and many matrices against one stack of them."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from classroom.hidden import optimizers as hidden
from makemoe.checks import optimizers as checks
from makemoe.lab import seed_everything
from makemoe.model import MoEConfig, SparseMoELanguageModel
from makemoe.optimizers import OPTIMIZERS, Muon, Together, muon, orthogonalize
from makemoe.training import TrainConfig, TrainState, learning_rate, train

SIZES = dict(vocab_size=11, block_size=8, n_embd=16, n_head=2, n_layer=2, num_experts=4, top_k=2, n_hidden=16)
TINY = MoEConfig(**SIZES, bias=True)
SHORT = TrainConfig(steps=7, batch_size=4, lr=0.01, warmup=2, eval_every=3, eval_blocks=4)
TEXTS = [torch.randint(11, (length,), generator=torch.Generator().manual_seed(length)) for length in (200, 90)]


def tiny_model(config=TINY):
    seed_everything(1337)
    return SparseMoELanguageModel(config)


@pytest.mark.parametrize("of", [checks, hidden])
def test_checks(of):
    of.check_orthogonalize(orthogonalize)


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (4, 24, 48)])
def test_singular_values_that_are_not_tiny_end_between_068_and_121(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.double)
    before = torch.linalg.svdvals(x) / x.norm(dim=(-2, -1))[..., None]
    after = torch.linalg.svdvals(orthogonalize(x))[before.flip(-1).cummax(-1).values.flip(-1) > 0.002]
    assert after.min() > 0.68 and after.max() < 1.21


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 64)])
def test_muon_is_that_of_pytorch(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = (
        Muon([ours], lr=0.1, weight_decay=0.3),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        # PyTorch computes in bfloat16: errors of some 1 % of a step, whose numbers are about 0.02
        assert (ours - theirs).square().mean().sqrt() < 0.02 * (ours - start).square().mean().sqrt()


def test_stacked_matrices_are_many_and_gradients_stay_where_they_are():
    torch.manual_seed(0)
    stacked, tall = (nn.Parameter(torch.randn(shape)) for shape in ((3, 8, 4), (15, 5)))
    alone = [nn.Parameter(matrix.clone()) for matrix in (*stacked.data, *tall.data.split(5))]
    one = Muon([dict(params=[stacked]), dict(params=[tall], parts=3)], lr=0.1, momentum=0.9)
    many = Muon(alone, lr=0.1, momentum=0.9)
    for _ in range(3):
        stacked.grad, tall.grad = torch.randn_like(stacked), torch.randn_like(tall)
        before = stacked.grad.clone(), tall.grad.clone()
        for weight, gradient in zip(alone, [*stacked.grad, *tall.grad.split(5)]):
            weight.grad = gradient.clone()
        one.step()
        many.step()
        assert torch.equal(stacked.grad, before[0]) and torch.equal(tall.grad, before[1])
    assert_close(stacked.data, torch.stack([weight.data for weight in alone[:3]]))
    assert_close(tall.data, torch.cat([weight.data for weight in alone[3:]]))


def test_a_matrix_without_gradient_stays_as_it_is():
    matrix = nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([matrix], lr=0.1)
    optimizer.step()
    assert torch.equal(matrix, torch.ones(2, 2)) and not optimizer.state


def test_the_matrices_in_the_blocks_get_muon_and_all_else_adamw_as_ever():
    model = tiny_model()
    both, alone = muon(model, SHORT), OPTIMIZERS["adamw"](model, SHORT)
    names = {weight: name for name, weight in model.named_parameters()}
    rest, vectors, hidden, qkv = ([names[weight] for weight in group["params"]] for group in both.param_groups)
    assert sorted([*rest, *vectors, *hidden, *qkv]) == sorted(names.values())
    assert qkv == [f"blocks.{i}.attention.qkv.weight" for i in range(2)]
    assert {name.split(".", 2)[2] for name in hidden} == {"attention.proj.weight", "moe.experts.up", "moe.experts.down"}
    assert vectors == [names[weight] for weight in alone.param_groups[1]["params"]]
    assert [group["weight_decay"] for group in both.param_groups] == [0.1, 0.0, 0.1, 0.1]
    assert both.param_groups[3]["parts"] == 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_schedule_reaches_every_group(name):
    model, seen = tiny_model(), []
    state = TrainState(model, SHORT, OPTIMIZERS[name](model, SHORT))
    for part in getattr(state.optimizer, "optimizers", [state.optimizer]):
        part.register_step_post_hook(lambda part, *_: seen.append({group["lr"] for group in part.param_groups}))
    train(model, *TEXTS, SHORT, state=state)
    rates = [{learning_rate(step, SHORT)} for step in range(SHORT.steps)]
    assert seen == [rate for rate in rates for _ in range(len(seen) // SHORT.steps)]


def test_together_is_each_of_them_alone():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(4, 4)) for _ in range(2)]
    copies = [nn.Parameter(weight.detach().clone()) for weight in weights]
    together = Together(torch.optim.AdamW(weights[:1], lr=0.1), Muon(weights[1:], lr=0.2))
    alone = torch.optim.AdamW(copies[:1], lr=0.1), Muon(copies[1:], lr=0.2)
    for _ in range(3):
        for weight, copy in zip(weights, copies):
            weight.grad = torch.randn(4, 4)
            copy.grad = weight.grad.clone()
        together.step()
        for optimizer in alone:
            optimizer.step()
    assert all(torch.equal(weight, copy) for weight, copy in zip(weights, copies))
    assert set(together.state) == set(weights)


def test_its_state_can_be_moved_to_another_one_as_pytorch_does_it():
    runs = []
    for moved in False, True:
        model = tiny_model()
        optimizer = muon(model, SHORT)
        for step in range(4):
            if moved and step == 2:
                saved = optimizer.state_dict()
                optimizer = muon(model, SHORT)
                optimizer.load_state_dict(saved)
            optimizer.zero_grad()
            model(TEXTS[0][None, :8], TEXTS[0][None, 1:9]).loss.backward()
            optimizer.step()
        runs.append(model)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in runs)))


@pytest.mark.parametrize("experts", ["grouped", "loop"])
def test_muon_learns(experts):
    model = tiny_model(replace(TINY, experts=experts))
    config = replace(SHORT, steps=30, eval_every=30)
    history = train(model, TEXTS[0] % 3, TEXTS[1] % 3, config, state=TrainState(model, config, muon(model, config)))
    assert history[-1]["train_loss"] < history[0]["train_loss"] - 0.5
