"""Hidden cases for lesson 20: other sizes and numbers than students can see."""

import math

import torch

from makemoe.checks import check, close, same
from makemoe.checks.local_experts import blend_error, by_loop, case, expected_error, mixture_error, posterior


def on_its_device(answer, *given, **settings):
    "Assert that what `answer` returns lies on the device of its arguments. A tensor on `meta` has no values."
    try:
        result = answer(*(tensor.to("meta") for tensor in given), **settings)
    except (RuntimeError, NotImplementedError) as error:  # a loop over cases is a right answer, too
        if any(reason in str(error) for reason in ("on meta tensors", "data-independent", "no data")):
            return
        raise AssertionError(f"a tensor is made on another device than that of the arguments: {error}") from error
    same(result.device.type, "meta", "the device of the result")


@check
def check_cooperative_loss(cooperative_loss):
    yield "nine experts, targets of 7 numbers"
    given = case(11, 9, D=7, spread=5.0)
    close(cooperative_loss(*given), by_loop(blend_error, *given), "the loss")
    on_its_device(cooperative_loss, *given)


@check
def check_responsibilities(responsibilities):
    yield "nine experts, targets of 7 numbers"
    given = case(11, 9, D=7)
    close(responsibilities(*given), posterior(*given), "the responsibilities")
    on_its_device(responsibilities, *given)
    yield "errors of 1e4"
    far = torch.tensor([[[1e4], [1e4 + 1]]])
    close(responsibilities(torch.tensor([[0.1, 0.9]]), far, torch.zeros(1, 1)), torch.tensor([[1.0, 0.0]]), "those")


@check
def check_competitive_loss(competitive_loss):
    yield "nine experts, targets of 7 numbers"
    given = case(11, 9, D=7)
    close(competitive_loss(*given), by_loop(mixture_error, *given), "the loss of eq. 1.3")
    close(competitive_loss(*given, mixture=False), by_loop(expected_error, *given), "the loss of eq. 1.2")
    on_its_device(competitive_loss, *given)
    on_its_device(competitive_loss, *given, mixture=False)
    yield "errors of 300"
    far = torch.tensor([[[300.0], [400.0]]])
    close(competitive_loss(torch.tensor([[0.25, 0.75]]), far, torch.zeros(1, 1)), 45000 + math.log(4), "the loss")


@check
def check_weighted_fit(weighted_fit):
    yield "three rules, each exact in its own third of 60 cases"
    inputs, rules = torch.randn(60, 4), torch.randn(3, 4, 2)
    owner = torch.arange(60) % 3
    targets = torch.einsum("nc,ncd->nd", inputs, rules[owner])
    close(weighted_fit(inputs, targets, torch.eye(3)[owner]), rules, "the fit", rtol=1e-3, atol=1e-4)
