"""Checks of lesson 17, page."""

import copy

import torch

from makemoe.checks import check, close, refuses, same, unchanged
from makemoe.model import MoEConfig, SparseMoELanguageModel


def draw_by_loop(probs, uniform):
    "The token of one row of probabilities on which the number `uniform` falls."
    total, last = 0.0, 0
    for token, p in enumerate(probs.tolist()):
        if p > 0:
            last = token
        total += p
        if uniform < total:
            break
    return last


@check
def check_draw(draw):
    probs = torch.tensor([[0.125, 0.5, 0.0, 0.375], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 1.0, 0.0]])  # exact in binary
    uniform = torch.tensor([0.7, 0.3, 0.0])
    yield "a number falls on the token whose stretch it lies in"
    with unchanged(probs=probs, uniform=uniform):
        same(draw(probs, uniform), torch.tensor([3, 1, 2]), "tokens")
    for u in (0.0, 0.1, 0.13, 0.6, 0.63, 0.99):
        wanted = torch.tensor([draw_by_loop(row, u) for row in probs])
        same(draw(probs, torch.full((3,), u)), wanted, f"tokens for {u}")
    yield "a stretch begins where the one before it ends"
    same(draw(probs[0], torch.tensor(0.125)), torch.tensor(1), "the token for 0.125")
    same(draw(probs[0], torch.tensor(0.625)), torch.tensor(3), "the token for 0.625, after a token of probability 0")
    yield "rounding finds the last token that can be drawn"
    short = torch.tensor([0.25, 0.5, 0.125, 0.0, 0.0])
    same(draw(short, torch.tensor(0.96875)), torch.tensor(2), "the token beyond the last sum")
    yield "any shape may stand in front, a single row too"
    many = torch.softmax(3 * torch.randn(2, 3, 7), dim=-1)
    numbers = torch.rand(2, 3)
    rows = [draw_by_loop(row, u) for row, u in zip(many.flatten(0, 1), numbers.flatten().tolist())]
    same(draw(many, numbers), torch.tensor(rows).view(2, 3), "tokens of a batch (2, 3)")
    yield "tokens come as often as is likely"
    wide = torch.tensor([0.1, 0.6, 0.0, 0.3])
    counts = draw(wide.expand(1000, 4), torch.arange(1000) / 1000 + 0.0005).bincount(minlength=4)
    close(counts / 1000, wide, "the shares of 1000 draws", atol=0.0021)
    yield "two texts may have different numbers, and float64 will do"
    same(draw(wide.double().expand(2, 4), torch.tensor([0.05, 0.95]).double()), torch.tensor([0, 3]), "tokens")


@check
def check_quantize(quantize):
    weight = torch.randn(5, 16) * torch.tensor([[0.01], [1.0], [30.0], [2e-6], [4e5]])
    yield "the numbers are int8 and fill their range row by row"
    with unchanged(weight=weight):
        numbers, scale = quantize(weight)
    same(numbers.dtype, torch.int8, "the type of the numbers")
    same(tuple(numbers.shape), (5, 16), "the shape of the numbers")
    same(numbers.int().abs().amax(dim=-1).tolist(), 5 * [127], "the largest magnitude of each row")
    yield "there is a scale for each row, in the weight's type"
    close(scale, weight.abs().amax(dim=-1, keepdim=True) / 127, "scale", atol=0)
    yield "numbers times scale is the weight, rounded to the nearest step"
    off = ((numbers * scale - weight) / scale).abs()
    assert off.max() <= 0.5001, f"a weight moves by {off.max():.3f} steps, but should by at most half a step"
    close((numbers * scale - weight).mean() / scale.mean(), 0.0, "the mean movement in steps", atol=0.1)
    yield "both signs are treated alike"
    same(quantize(-weight)[0], -numbers, "numbers of -weight")
    skewed = torch.tensor([[-1.0, 0.5, 0.1], [0.3, 1.0, -0.9]])
    same(quantize(skewed)[0].tolist(), [[-127, 64, 13], [38, 127, -114]], "numbers of a skewed row")
    yield "a row of zeros gives zeros, and no other row changes"
    holed = weight.clone()
    holed[1] = 0
    zeros, its_scale = quantize(holed)
    same(zeros[1], torch.zeros(16, dtype=torch.int8), "numbers of the row of zeros")
    assert (its_scale > 0).all(), f"scales must be above 0, but are {its_scale.flatten().tolist()}"
    same(zeros[[0, 2, 3, 4]], numbers[[0, 2, 3, 4]], "numbers of the other rows")
    yield "any shape may stand in front"
    stacked, scales = quantize(weight.view(5, 4, 4))
    same(tuple(scales.shape), (5, 4, 1), "the shape of the scales")
    assert ((stacked * scales - weight.view(5, 4, 4)) / scales).abs().max() <= 0.5001, "each row has its own scale"


def small_model(**changes):
    "A tiny language model in evaluation mode whose routers and experts differ from layer to layer."
    sizes = dict(vocab_size=11, block_size=8, n_embd=8, n_head=2, n_layer=2, num_experts=4, top_k=2, n_hidden=8)
    model = SparseMoELanguageModel(MoEConfig(**sizes | changes)).eval()
    for weight in model.parameters():
        weight.data = 0.5 * torch.randn_like(weight)
    return model


def cut(model, layer, experts):
    "A copy of `model` whose `experts` of block `layer` answer 0: their weights into the residual stream are 0."
    other = copy.deepcopy(model)
    stacked = other.blocks[layer].moe.experts
    for e in experts:
        stacked.down.data[e] = 0
        if stacked.down_bias is not None:
            stacked.down_bias.data[e] = 0
    return other


@check
def check_knock_out(knock_out):
    ids = torch.randint(11, (3, 8))
    with torch.no_grad():
        for bias in False, True:
            model = small_model(bias=bias)
            plain = model(ids)
            for layer, experts in (0, [2]), (1, [0, 3]), (1, range(4)):
                yield f"experts {list(experts)} of layer {layer} add nothing, {'with' if bias else 'without'} biases"
                with knock_out(model, layer, experts):
                    inside = model(ids)
                wanted = cut(model, layer, experts)(ids)
                close(inside.logits, wanted.logits, "logits", atol=1e-5)
                close(inside.routings[layer].logits, wanted.routings[layer].logits, "the router's logits", atol=1e-5)
                same(inside.routings[layer].chosen, wanted.routings[layer].chosen, "what the router chose")
        yield "afterwards all is as it was, also after an error"
        same(model(ids).logits, plain.logits, "logits after the end")

        def stumble():
            with knock_out(model, 0, [1]):
                raise KeyError("stumbled")

        refuses(KeyError, stumble)
        same(model(ids).logits, plain.logits, "logits after an error")
        yield "several may be open, in any order, and the inner one ends alone"
        with knock_out(model, 0, [1]):
            with knock_out(model, 1, [0]), knock_out(model, 1, [2]):
                close(model(ids).logits, cut(cut(model, 0, [1]), 1, [0, 2])(ids).logits, "logits of three", atol=1e-5)
            close(model(ids).logits, cut(model, 0, [1])(ids).logits, "logits after the inner ones", atol=1e-5)
        yield "nobody silenced changes nothing"
        with knock_out(model, 0, []):
            same(model(ids).logits, plain.logits, "logits")
        yield "no other model and no mode is touched"
        other = copy.deepcopy(model)
        with knock_out(model, 0, range(4)):
            same(other(ids).logits, plain.logits, "logits of a copy")
        assert not model.training, "the model was in evaluation mode"
