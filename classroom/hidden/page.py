"""Hidden cases of lesson 17, page."""

import torch

from makemoe.checks import check, close, same
from makemoe.checks.page import cut, draw_by_loop, small_model


@check
def check_draw(draw):
    yield "many tokens, many rows"
    probs, uniform = torch.softmax(4 * torch.randn(40, 300), dim=-1), torch.rand(40)
    wanted = [draw_by_loop(row, u) for row, u in zip(probs, uniform.tolist())]
    assert (draw(probs, uniform) != torch.tensor(wanted)).sum() <= 1, "tokens of 40 rows"  # one may lie on an edge
    yield "zeros in front are never drawn"
    same(draw(torch.tensor([0.0, 0.0, 0.25, 0.75]), torch.tensor(0.0)), torch.tensor(2), "the token for 0")


@check
def check_quantize(quantize):
    yield "one large weight makes only its own row coarse"
    weight = 0.01 * torch.randn(6, 32)
    weight[2, 5] = 100.0
    numbers, scale = quantize(weight)
    close(numbers * scale, weight, "the other rows", rtol=0, atol=100 / 127 / 2 + 1e-4)
    rest = [0, 1, 3, 4, 5]
    assert ((numbers * scale - weight)[rest].abs() < 3e-4).all(), "the rows without the large weight"
    yield "a row of one number is kept exactly"
    single, factor = quantize(torch.tensor([[-3.0], [0.0], [7.0]]))
    same(single.flatten().tolist(), [-127, 0, 127], "numbers")
    close(single * factor, torch.tensor([[-3.0], [0.0], [7.0]]), "numbers times scale")


@check
def check_knock_out(knock_out):
    yield "with experts in a loop and a noisy router, given as a tuple"
    model, ids = small_model(experts="loop", router="noisy", top_k=3), torch.randint(11, (2, 8))
    with torch.no_grad():
        plain = model(ids).logits
        with knock_out(model, 1, (1, 3)):
            inside = model(ids).logits
        for e in 1, 3:
            model.blocks[1].moe.experts[e].down.weight.data.zero_()
        close(inside, model(ids).logits, "logits", atol=1e-5)
        assert not torch.allclose(inside, plain, atol=1e-3), "the silenced experts still answer"
    yield "the gradient still reaches the router and all others"
    model = small_model()
    other = cut(model, 0, [0])
    with knock_out(model, 0, [0]):
        model(ids).logits.square().sum().backward()
    other(ids).logits.square().sum().backward()
    ours, theirs = (
        [each.blocks[0].moe.router.linear.weight.grad, each.blocks[0].moe.experts.up.grad[1:]]
        for each in (model, other)
    )
    for got, want, name in zip(ours, theirs, ("the router's weight", "the other experts' weights")):
        assert got is not None, f"no gradient reaches {name}"
        close(got, want, f"the gradient of {name}", rtol=1e-3, atol=1e-3)
