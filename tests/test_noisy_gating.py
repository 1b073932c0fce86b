"""Lesson 05: the checks, and what is too heavy for them.

With k = E the gates are a softmax of the noisy scores, so that the noise can be read back and measured. Statistics
compare with their exact standard error: |z| < 5 fails a right router with probability 6e-7, and seeds are fixed.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import classroom.hidden.noisy_gating as hidden
from makemoe.checks.noisy_gating import check_noisy_topk_router
from makemoe.gating import TopkRouter
from makemoe.noisy_gating import NoisyTopkRouter

N = 40_000


def noise_differences(router, x):
    "Noise of experts 1, 2, ... minus that of expert 0, (..., E - 1), read back from the gates of a router with k = E."
    noise = router(x).gates.log() - router.linear(x)  # up to a constant per token
    return (noise[..., 1:] - noise[..., :1]).detach()


def z_of_variance(sample, variance=1.0):
    "Standard errors between the variance of a normal sample (N, ...) and the one it should have."
    return (sample.double().var(dim=0) / variance - 1) * math.sqrt(len(sample) / 2)


@pytest.mark.parametrize("check", [check_noisy_topk_router, hidden.check_noisy_topk_router])
def test_checks(check):
    check(NoisyTopkRouter)


def test_training_repeats_with_its_seed():
    router, x = NoisyTopkRouter(16, 8, top_k=2), torch.randn(50, 16)
    torch.manual_seed(1)
    first = router(x)
    torch.manual_seed(1)
    assert torch.equal(first.gates, router(x).gates)


def test_one_number_is_drawn_for_each_score_in_their_order():
    router, x = NoisyTopkRouter(6, 5, top_k=5), torch.randn(3, 4, 6)
    torch.manual_seed(1)
    gates = router(x).gates
    torch.manual_seed(1)
    eps = torch.randn(3, 4, 5)  # a trained model repeats itself only if this stays as it is
    noisy = router.linear(x) + eps * torch.log1p(torch.exp(router.noise_linear(x)))
    assert_close(gates, noisy.softmax(dim=-1))


@given(shape=st.lists(st.integers(1, 4), max_size=3), E=st.integers(1, 8), data=st.data())
def test_training_chooses_exactly_k_with_sum_one_for_any_leading_shape(shape, E, data):
    k = data.draw(st.integers(1, E))
    routing = NoisyTopkRouter(4, E, k)(torch.randn(*shape, 4))
    assert routing.gates.shape == routing.logits.shape == routing.chosen.shape == routing.kept.shape == (*shape, E)
    assert (routing.chosen.sum(-1) == k).all()
    assert_close(routing.gates.sum(-1), torch.ones(shape))
    assert torch.equal(routing.gates > 0, routing.chosen)


@pytest.mark.parametrize("bias", [-3.0, 0.0, 4.0])
def test_deviation_of_each_expert_alone(bias):
    router = NoisyTopkRouter(2, 3, top_k=3)
    nn.init.zeros_(router.noise_linear.weight)
    router.noise_linear.bias.data = torch.tensor([-100.0, bias, 1.0])  # expert 0 is quiet: the difference is the noise
    variance = torch.log(1 + torch.exp(torch.tensor([bias, 1.0], dtype=torch.float64))) ** 2
    assert z_of_variance(noise_differences(router, torch.randn(N, 2)), variance).abs().max() < 5


def test_experts_tokens_and_rows_draw_their_noise_alone():
    router = NoisyTopkRouter(2, 5, top_k=5)
    nn.init.zeros_(router.noise_linear.weight)
    router.noise_linear.bias.data = torch.tensor([-100.0, 0.0, 1.0, 2.0, 3.0])
    noise = noise_differences(router, torch.randn(N, 2, 2, 2)).flatten(1)  # (N, 2 * 2 * 4): row, token, expert
    correlation = torch.corrcoef(noise.T) - torch.eye(16)
    assert correlation.abs().max() * math.sqrt(N) < 6  # 120 pairs at 6 standard errors: fails with probability 3e-7


def test_clear_choices_stand_and_close_calls_flip():
    router = NoisyTopkRouter(1, 4, top_k=1)
    for parameter in router.parameters():
        nn.init.zeros_(parameter)
    router.linear.bias.data = torch.tensor([0.1, 0.0, -50.0, -50.0])
    share = router(torch.zeros(N, 1)).chosen.float().mean(dim=0)
    p = torch.special.ndtr(torch.tensor(0.1 / (math.sqrt(2) * math.log(2)))).item()
    assert abs(share[0] - p) / math.sqrt(p * (1 - p) / N) < 5
    assert share[2:].sum() == 0  # a clear case: 50 is 51 deviations of the difference


def test_gradient_equals_finite_differences_for_the_same_noise():
    router, x = NoisyTopkRouter(3, 4, top_k=4), torch.randn(5, 3, requires_grad=True)
    mix = torch.randn(5, 4)

    def loss():
        torch.manual_seed(2)
        return (router(x).gates.double() * mix).sum()

    loss().backward()
    for parameter in x, *router.parameters():
        place = tuple(0 for _ in parameter.shape)
        slope, step = parameter.grad[place].item(), 1e-2
        with torch.no_grad():
            parameter[place] += step
            up = loss().item()
            parameter[place] -= 2 * step
            down = loss().item()
            parameter[place] += step
        assert (up - down) / (2 * step) == pytest.approx(slope, abs=1e-3, rel=1e-2)
        assert abs(slope) > 5e-3  # else the comparison would say nothing


def test_a_loss_on_the_logits_leaves_the_noise_layer_alone():
    router, x = NoisyTopkRouter(16, 8, top_k=2), torch.randn(100, 16, requires_grad=True)
    router(x).logits.logsumexp(-1).square().mean().backward()
    assert router.linear.weight.grad.any() and x.grad.any()
    assert router.noise_linear.weight.grad is None or not router.noise_linear.weight.grad.any()


def test_relabelling_experts_permutes_evaluation_and_the_deviations():
    router, order, x = NoisyTopkRouter(6, 5, top_k=2), torch.tensor([3, 0, 4, 1, 2]), torch.randn(50, 6)
    twin = NoisyTopkRouter(6, 5, top_k=2)
    twin.load_state_dict({name: value[order] for name, value in router.state_dict().items()})
    assert_close(twin.eval()(x).gates, router.eval()(x).gates[:, order])
    shares = [r.train()(x[:1].expand(N, 6)).chosen.float().mean(dim=0) for r in (twin, router)]
    assert ((shares[0] - shares[1][order]) / math.sqrt(0.5 / N)).abs().max() < 5  # 0.5: twice the largest p (1 - p)


def test_state_has_the_two_layers():
    router = NoisyTopkRouter(6, 5, top_k=2)
    shapes = {name: tuple(value.shape) for name, value in router.state_dict().items()}
    layers = {"linear.weight": (5, 6), "linear.bias": (5,), "noise_linear.weight": (5, 6), "noise_linear.bias": (5,)}
    assert shapes == layers
    assert isinstance(router, TopkRouter)
