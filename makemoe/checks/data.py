"""Checks of lesson 01, data."""

import math
from collections import Counter

import torch

from makemoe.checks import check, close, refuses, same, unchanged


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@check
def check_tokenizer(CharTokenizer):
    yield "the vocabulary is the sorted set of the characters"
    night = CharTokenizer("Good night, good night!")
    same(night.characters, " !,Gdghinot", "characters")
    same(night.vocab_size, 11, "vocab_size")
    yield "an id is the place in the vocabulary, and ids are long"
    same(night.encode("good!"), torch.tensor([5, 9, 9, 4, 1]), "the ids of 'good!'")
    yield "decode undoes encode, for a tensor and for a list"
    same(night.decode(night.encode("hot dog!")), "hot dog!", "decode(encode('hot dog!'))")
    same(night.decode([5, 9, 9, 4]), "good", "decode([5, 9, 9, 4])")
    yield "tokenizers do not share their vocabularies"
    same(CharTokenizer("xy").decode([1, 0]) + night.decode([0, 1]), "yx !", "two decoded texts")
    yield "white space, capitals and letters beyond ASCII are characters like any other"
    odd = CharTokenizer(" \tÉé ²ß€𝄞\n")
    same(odd.characters, "\t\n ²Éßé€𝄞", "characters")
    same(odd.decode(odd.encode("\tß𝄞€\n é²É")), "\tß𝄞€\n é²É", "decode(encode(...))")
    yield "an empty text gives no ids, of type long"
    same(night.encode(""), torch.empty(0, dtype=torch.long), "encode('')")
    same(night.decode([]) + night.decode(night.encode("")), "", "decode of no ids")
    yield "a vocabulary may be larger than 256 and than 512"
    many = CharTokenizer(map(chr, range(1000, 1700)))
    same(many.encode(chr(1699) + chr(1000)), torch.tensor([699, 0]), "ids")
    yield "an unknown character is a ValueError of one line that names it"
    refuses(ValueError, lambda: night.encode("good Z"), "'Z'")
    refuses(ValueError, lambda: night.encode("\n"), r"'\n'")
    yield "each unknown character is named once, and known ones are not named"
    try:
        night.encode("7G77o" + 99 * "7" + "x")
    except ValueError as error:
        for name, times in ("'7'", 1), ("'x'", 1), ("'G'", 0), ("'o'", 0):
            same(str(error).count(name), times, f"how often the message {str(error)!r} has {name}")
    yield "an error leaves the vocabulary as it was"
    same(night.characters, " !,Gdghinot", "characters")


@check
def check_get_batch(get_batch):
    stream = 100 + torch.arange(11)  # an id tells its place
    yield "x and y are long, of shape (B, T), with neighbouring tokens, and y is one place further"
    for B, T in (40, 5), (1, 5), (3, 1), (1, 1):
        with unchanged(ids=stream):
            x, y = get_batch(stream, B, T, generator=seeded(1))
        same(x, x[:, :1] + torch.arange(T).expand(B, T), f"x for B = {B}, T = {T}, from its own first column on,")
        same(y, x + 1, f"y for B = {B}, T = {T}")
    yield "all N - T starts are drawn, equally often"
    x, _ = get_batch(stream, 6000, 5, generator=seeded(3))
    shares = (x[:, 0] - 100).bincount(minlength=6) / 6000
    close(shares, torch.full((6,), 1 / 6), "shares of the starts", atol=0.03)
    yield "each row draws its own start"
    pairs = (x[0::2, 0] == x[1::2, 0]).double().mean()
    close(pairs, 1 / 6, "how often two rows start at the same place", atol=0.05)
    yield "for T = N - 1 there is exactly one start"
    same(get_batch(stream, 3, 10)[0], stream[:10].expand(3, 10), "x")
    yield "the starts depend on the generator alone, which goes on from batch to batch"
    dice, state = seeded(5), torch.get_rng_state()
    batches = [get_batch(stream, 400, 5, generator=dice)[0] for _ in range(2)]
    assert not torch.equal(*batches), "the next batch from the same generator should be another one"
    same(torch.get_rng_state(), state, "the state of PyTorch's own random numbers")
    torch.rand(9)
    same(get_batch(stream, 400, 5, generator=seeded(5))[0], batches[0], "x from an equal generator")
    yield "without a generator, the starts depend on PyTorch's own random numbers"
    torch.manual_seed(6)
    batches = [get_batch(stream, 400, 5)[0] for _ in range(2)]
    assert not torch.equal(*batches), "the next batch should be another one"
    torch.manual_seed(6)
    same(get_batch(stream, 400, 5)[0], batches[0], "x after the same seed")
    yield "a ValueError is raised if there are no more than T ids"
    for length in 0, 4, 5:
        refuses(ValueError, lambda: get_batch(stream[:length], 2, 5))
    yield "ids of type uint8 give a batch of type long"
    x, y = get_batch(stream.to(torch.uint8), 4, 5, generator=seeded(1))
    same(y, x.long() + 1, "y")
    same(x.dtype, torch.long, "the type of x")


@check
def check_split(split):
    stream = 100 + torch.arange(50)
    yield "the last tenth is for validation"
    for part, want in zip(split(stream), (stream[:45], stream[45:])):
        same(part, want, "a part")
    yield "any share may be held out"
    for held_out, n in (0.25, 150), (0.5, 100), (0.02, 196):
        train, valid = split(torch.arange(200), held_out=held_out)
        same(train, torch.arange(n), f"the training part with held_out = {held_out}")
        same(valid, torch.arange(n, 200), f"the validation part with held_out = {held_out}")
    yield "held_out may be 0 or 1"
    for held_out, n in (0, 50), (1, 0):
        same(tuple(map(len, split(stream, held_out))), (n, 50 - n), f"the lengths with held_out = {held_out}")
    yield "a ValueError is raised if held_out is below 0 or above 1"
    for wrong in 10, 1.1, -0.1:
        refuses(ValueError, lambda: split(stream, wrong))


def loss_by_dictionary(train, valid, context, vocab_size):
    runs = Counter(tuple(train[i : i + context + 1]) for i in range(len(train) - context))
    seen = Counter(tuple(train[i : i + context]) for i in range(len(train) - context))
    asked = [tuple(valid[i : i + context + 1]) for i in range(len(valid) - context)]
    return sum(-math.log((runs[run] + 1) / (seen[run[:-1]] + vocab_size)) for run in asked) / len(asked)


@check
def check_ngram(ngram_loss):
    train, valid = (torch.randint(2, (n,), generator=seeded(n)).cumsum(0) % 5 for n in (300, 60))
    for context, V in (0, 5), (1, 5), (2, 5), (2, 7):
        yield f"context = {context}, V = {V}"
        with unchanged(train=train, valid=valid):
            loss = ngram_loss(train, valid, context, V)
        close(loss, loss_by_dictionary(train.tolist(), valid.tolist(), context, V), "the loss")
