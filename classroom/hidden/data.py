"""Hidden cases for lesson 01: other texts, sizes and streams than students can see."""

import torch

from makemoe.checks import check, close, refuses, same
from makemoe.checks.data import loss_by_dictionary, seeded


@check
def check_tokenizer(CharTokenizer):
    yield "another text"
    tokenizer = CharTokenizer("wherefore art thou?\n")
    same(tokenizer.characters, "\n ?aefhortuw", "characters")
    same(tokenizer.encode("what?\n"), torch.tensor([11, 6, 3, 9, 2, 0]), "ids")
    refuses(ValueError, lambda: tokenizer.encode("O\t"), "'O'", r"'\t'")


@check
def check_get_batch(get_batch):
    yield "another stream"
    stream = torch.randperm(40)
    place = stream.argsort()
    x, y = get_batch(stream, 500, 7, generator=seeded(2))
    same(place[x], place[x[:, :1]] + torch.arange(7), "places of x in the stream")
    same(place[y], place[x] + 1, "places of y in the stream")
    same(place[x[:, 0]].unique(), torch.arange(33), "the starts")


@check
def check_split(split):
    yield "another share"
    train, valid = split(torch.arange(1000), 0.3)
    same((len(train), len(valid), int(valid[0])), (700, 300, 700), "both lengths, and where validation begins")


@check
def check_ngram(ngram_loss):
    yield "context = 3, V = 6"
    train, valid = (torch.randint(3, (n,)).cumsum(0) % 5 for n in (50, 200))
    want = loss_by_dictionary(train.tolist(), valid.tolist(), 3, 6)
    close(ngram_loss(train, valid, 3, 6), want, "the loss")
