"""Lesson 05. With k = E the gates are a softmax of the noisy scores, so that the noise can be read back and measured.

Statistics compare with their exact standard error: |z| < 5 fails a right router with probability 6e-7, and seeds are fixed.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from makemoe.gating import TopkRouter, top_k_gating
from makemoe.noisy_gating import NoisyTopkRouter

N = 40_000


def softplus(z):
    "Written out, so that the module's choice of function is checked too."
    return torch.log(1 + torch.exp(z))


def deviations(router, x):
    return softplus(x @ router.noise_linear.weight.T + router.noise_linear.bias)


def noise_differences(router, x):
    "Noise of experts 1, 2, ... minus that of expert 0, (..., E - 1), read back from the gates of a router with k = E."
    noise = router(x).gates.log() - (x @ router.linear.weight.T + router.linear.bias)  # up to a constant per token
    return (noise[..., 1:] - noise[..., :1]).detach()


def standardised(router, x):
    deviation = deviations(router, x).detach()
    return noise_differences(router, x) / (deviation[..., 1:].square() + deviation[..., :1].square()).sqrt()


def z_of_variance(sample, variance=1.0):
    "Standard errors between the variance of a normal sample (N, ...) and the one it should have."
    return (sample.double().var(dim=0) / variance - 1) * math.sqrt(len(sample) / 2)


def with_weights_of(router, top_k):
    twin = TopkRouter(router.linear.in_features, router.linear.out_features, top_k)
    twin.linear.load_state_dict(router.linear.state_dict())
    return twin


def test_evaluation_equals_a_top_k_router_with_the_same_weights():
    router, x = NoisyTopkRouter(16, 8, top_k=2).eval(), torch.randn(3, 5, 16)
    ours, theirs = router(x), with_weights_of(router, 2)(x)
    for field in "gates", "logits", "chosen", "kept":
        assert_close(getattr(ours, field), getattr(theirs, field))


def test_evaluation_repeats_itself_and_draws_no_random_number():
    router, x = NoisyTopkRouter(16, 8, top_k=2).eval(), torch.randn(3, 5, 16)
    state = torch.get_rng_state()
    assert torch.equal(router(x).gates, router(x).gates)
    assert torch.equal(torch.get_rng_state(), state)


def test_training_differs_from_pass_to_pass_but_repeats_with_its_seed():
    router, x = NoisyTopkRouter(16, 8, top_k=2), torch.randn(50, 16)
    torch.manual_seed(1)
    first, second = router(x), router(x)
    torch.manual_seed(1)
    again = router(x)
    assert not torch.equal(first.chosen, second.chosen)
    assert torch.equal(first.gates, again.gates)


@given(shape=st.lists(st.integers(1, 4), max_size=3), E=st.integers(1, 8), data=st.data())
def test_training_chooses_exactly_k_with_sum_one_for_any_leading_shape(shape, E, data):
    k = data.draw(st.integers(1, E))
    routing = NoisyTopkRouter(4, E, k)(torch.randn(*shape, 4))
    assert routing.gates.shape == routing.logits.shape == routing.chosen.shape == routing.kept.shape == (*shape, E)
    assert (routing.chosen.sum(-1) == k).all()
    assert_close(routing.gates.sum(-1), torch.ones(shape))
    assert torch.equal(routing.gates > 0, routing.chosen)
    assert torch.equal(routing.kept, routing.chosen)


def test_logits_are_those_before_the_noise():
    router, x = NoisyTopkRouter(16, 8, top_k=2), torch.randn(3, 5, 16)
    trained, evaluated = router(x), router.eval()(x)
    assert_close(trained.logits, torch.einsum("btc,ec->bte", x, router.linear.weight) + router.linear.bias)
    assert_close(trained.logits, evaluated.logits)


def test_choice_and_gates_come_from_the_noisy_scores():
    router, x = NoisyTopkRouter(16, 8, top_k=2), torch.randn(500, 16)
    routing, clean = router(x), top_k_gating(router.linear(x), 2)
    assert (routing.chosen != clean.chosen).any(dim=-1).sum() > 50
    same = (routing.chosen == clean.chosen).all(dim=-1)
    assert same.any() and not torch.isclose(routing.gates[same], clean.gates[same]).all(dim=-1).any()


def test_without_deviation_training_equals_evaluation():
    router, x = NoisyTopkRouter(16, 8, top_k=2), torch.randn(50, 16)
    nn.init.zeros_(router.noise_linear.weight)
    nn.init.constant_(router.noise_linear.bias, -100.0)  # softplus(-100) = 4e-44
    assert_close(router(x).gates, router.eval()(x).gates)


def test_a_silent_noise_layer_deviates_by_ln_2():
    router = NoisyTopkRouter(3, 4, top_k=4)
    nn.init.zeros_(router.noise_linear.weight)
    nn.init.zeros_(router.noise_linear.bias)
    z = z_of_variance(noise_differences(router, torch.randn(N, 3)), 2 * math.log(2) ** 2)
    assert z.abs().max() < 5  # three of them: fails with probability 2e-6


def test_noise_is_normal_with_mean_zero_and_the_deviation_of_its_own_layer():
    router = NoisyTopkRouter(6, 5, top_k=5)
    nn.init.normal_(router.noise_linear.weight)  # deviations from nearly 0 to several, by token and by expert
    z = standardised(router, torch.randn(N, 6))  # (N, 4), standard normal
    assert (z.mean(dim=0) * math.sqrt(N)).abs().max() < 5
    assert z_of_variance(z).abs().max() < 5
    assert (((z**4).mean(dim=0) - 3) / math.sqrt(96 / N)).abs().max() < 5


@pytest.mark.parametrize("bias", [-3.0, 0.0, 4.0])
def test_deviation_of_each_expert_alone(bias):
    router = NoisyTopkRouter(2, 3, top_k=3)
    nn.init.zeros_(router.noise_linear.weight)
    router.noise_linear.bias.data = torch.tensor([-100.0, bias, 1.0])  # expert 0 is quiet: the difference is the noise
    z = z_of_variance(noise_differences(router, torch.randn(N, 2)), softplus(torch.tensor([bias, 1.0])).double() ** 2)
    assert z.abs().max() < 5


def test_deviation_of_each_token_alone():
    router = NoisyTopkRouter(1, 2, top_k=2)
    router.noise_linear.weight.data = torch.tensor([[2.0], [-1.0]])
    x = torch.tensor([-1.0, 0.0, 1.5]).view(3, 1).expand(N, 3, 1)
    variance = deviations(router, x[0]).square().sum(dim=-1, keepdim=True).detach().double()  # (3, 1)
    assert z_of_variance(noise_differences(router, x), variance).abs().max() < 5


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


def test_gradient_reaches_both_layers_in_training():
    router = NoisyTopkRouter(16, 8, top_k=2)
    (router(torch.randn(100, 16)).gates * torch.randn(8)).sum().backward()
    for name, parameter in router.named_parameters():
        assert (parameter.grad != 0).any(dim=-1).all(), f"an expert without gradient in {name}"


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


def test_the_noise_layer_gets_no_gradient_in_evaluation():
    router = NoisyTopkRouter(16, 8, top_k=2).eval()
    (router(torch.randn(100, 16)).gates * torch.randn(8)).sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in router.noise_linear.parameters())
    assert all(parameter.grad.any() for parameter in router.linear.parameters())


def test_a_loss_on_the_logits_leaves_the_noise_layer_alone():
    router, x = NoisyTopkRouter(16, 8, top_k=2), torch.randn(100, 16, requires_grad=True)
    router(x).logits.logsumexp(-1).square().mean().backward()
    assert router.linear.weight.grad.any() and x.grad.any()
    assert router.noise_linear.weight.grad is None or not router.noise_linear.weight.grad.any()


@pytest.mark.parametrize("training", [True, False])
def test_router_keeps_float32_under_bfloat16_autocast(training):
    router, x = NoisyTopkRouter(64, 8, top_k=2).train(training), torch.randn(500, 64).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(3)
        low = router(x)
    torch.manual_seed(3)
    full = router(x.float())
    assert low.logits.dtype == low.gates.dtype == torch.float32
    assert torch.equal(low.logits, full.logits)
    assert torch.equal(low.gates, full.gates)  # so the deviations were computed in float32 too


def test_relabelling_experts_permutes_evaluation_and_the_deviations():
    router, order, x = NoisyTopkRouter(6, 5, top_k=2), torch.tensor([3, 0, 4, 1, 2]), torch.randn(50, 6)
    twin = NoisyTopkRouter(6, 5, top_k=2)
    twin.load_state_dict({name: value[order] for name, value in router.state_dict().items()})
    assert_close(twin.eval()(x).gates, router.eval()(x).gates[:, order])
    shares = [r.train()(x[:1].expand(N, 6)).chosen.float().mean(dim=0) for r in (twin, router)]
    assert ((shares[0] - shares[1][order]) / math.sqrt(0.5 / N)).abs().max() < 5  # 0.5: twice the largest p (1 - p)


def test_state_has_the_two_layers_and_a_top_k_router_can_be_loaded_from_it():
    router = NoisyTopkRouter(6, 5, top_k=2)
    shapes = {name: tuple(value.shape) for name, value in router.state_dict().items()}
    assert shapes == {"linear.weight": (5, 6), "linear.bias": (5,),
                      "noise_linear.weight": (5, 6), "noise_linear.bias": (5,)}
    assert isinstance(router, TopkRouter)


def test_input_is_not_changed():
    x = torch.randn(10, 6)
    before = x.clone()
    NoisyTopkRouter(6, 5, top_k=2)(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("top_k", [0, 9])
def test_impossible_top_k_is_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k is {top_k}, but must lie between 1 and num_experts = 8"):
        NoisyTopkRouter(16, 8, top_k)
