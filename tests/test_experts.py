"""Lesson 03. The checks, and properties for any size; the oracle is a loop over hidden units in plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import classroom.hidden.experts as hidden
import makemoe.checks.experts as checks
from makemoe.experts import ACTIVATIONS, Expert, squared_relu

FORMULAS = {
    "relu": lambda z: max(z, 0.0),
    "gelu": lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2,
    "squared_relu": lambda z: max(z, 0.0) ** 2,
}


@pytest.mark.parametrize("place", [checks, hidden])
def test_the_module_passes_the_checks_of_the_lesson(place):
    place.check_expert(squared_relu, Expert)


def answer_by_loop(expert, token, formula):
    "The answer of one token, one hidden unit after the other: (C,) as a list."
    answer = expert.down.bias.tolist()
    for f, (key, b) in enumerate(zip(expert.up.weight.tolist(), expert.up.bias.tolist())):
        strength = formula(sum(w * x for w, x in zip(key, token)) + b)
        for c, value in enumerate(expert.down.weight[:, f].tolist()):
            answer[c] += strength * value
    return answer


@pytest.mark.parametrize("name", FORMULAS)
def test_activations_equal_their_formulas(name):
    z = torch.cat([torch.linspace(-6, 6, 241, dtype=torch.float64), torch.tensor([-50.0, 50.0], dtype=torch.float64)])
    expected = torch.tensor([FORMULAS[name](v) for v in z.tolist()], dtype=torch.float64)
    assert_close(ACTIVATIONS[name](z), expected, rtol=1e-12, atol=1e-12)


def test_these_are_all_activations():
    assert set(FORMULAS) == set(ACTIVATIONS) - {"geglu", "swiglu"}  # lesson 23 adds these
    assert ACTIVATIONS["squared_relu"] is squared_relu


@pytest.mark.parametrize("name", FORMULAS)
def test_expert_equals_the_loop_over_hidden_units(name):
    expert = Expert(4, 7, activation=name).double()
    x = 2 * torch.randn(5, 4, dtype=torch.float64)
    expected = [answer_by_loop(expert, token, FORMULAS[name]) for token in x.tolist()]
    assert_close(expert(x), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@given(shape=st.lists(st.integers(0, 4), max_size=3), C=st.integers(1, 6), F=st.integers(1, 9),
       name=st.sampled_from(sorted(FORMULAS)))
def test_each_token_alone_for_any_leading_shape(shape, C, F, name):
    expert = Expert(C, F, activation=name)
    x = torch.randn(*shape, C)
    y = expert(x)
    assert y.shape == x.shape
    for token, answer in zip(x.reshape(-1, C), y.reshape(-1, C)):
        assert_close(expert(token), answer)


def test_changing_one_token_changes_its_answer_only():
    expert = Expert(8, 32)
    x = torch.randn(3, 5, 8)
    y = x.clone()
    y[1, 2] = torch.randn(8)
    changed = (expert(x) - expert(y)).abs().amax(dim=-1) > 1e-6
    assert changed.nonzero().tolist() == [[1, 2]]


def test_relabelling_hidden_units_changes_nothing():
    expert, other, order = Expert(8, 32), Expert(8, 32), torch.randperm(32)
    other.up.weight.data, other.up.bias.data = expert.up.weight.data[order], expert.up.bias.data[order]
    other.down.weight.data, other.down.bias.data = expert.down.weight.data[:, order], expert.down.bias.data
    x = torch.randn(10, 8)
    assert_close(other(x), expert(x))


@given(C=st.integers(1, 9), F=st.integers(1, 9), bias=st.booleans())
def test_number_of_parameters(C, F, bias):
    size = sum(parameter.numel() for parameter in Expert(C, F, bias=bias).parameters())
    assert size == 2 * C * F + (F + C if bias else 0)


def test_without_bias_nothing_comes_from_nothing():
    assert not Expert(4, 8, bias=False)(torch.zeros(3, 4)).any()
    assert Expert(4, 8)(torch.zeros(3, 4)).all()


def test_rate_and_place_of_dropout():
    p, expert = 0.25, Expert(16, 64, dropout=0.25)
    x = torch.randn(1000, 16)
    dropped, full = expert(x), expert.eval()(x)
    gone = dropped == 0
    assert_close(dropped, torch.where(gone, 0, full / (1 - p)))
    # 16,000 coins: six standard deviations are 0.0205, passed by chance less than once in 10**8 runs
    assert abs(gone.float().mean() - p) < 6 * math.sqrt(p * (1 - p) / gone.numel())


@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_equal_finite_differences(name):
    expert = Expert(3, 5, activation=name).double()
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    names, weights = zip(*expert.named_parameters())

    def run(x, *weights):
        return torch.func.functional_call(expert, dict(zip(names, weights)), x)

    assert torch.autograd.gradcheck(run, (x, *weights))


def test_an_unknown_activation_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ValueError, match="activation is 'rleu', but must be one of relu, gelu, squared_relu"):
        Expert(4, 8, activation="rleu")


def test_a_wrong_number_of_channels_is_refused():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Expert(4, 8)(torch.randn(2, 8))
