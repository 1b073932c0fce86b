"""Hidden cases for lesson 00: other seeds, texts and experts than students can see."""

import random

from makemoe.checks import check, same
from makemoe.checks.lab import equal_shares, reads_as, starts_from


@check
def check_seed_everything(seed_everything):
    yield "another seed"
    seed_everything(31)
    starts_from(31)


@check
def check_shares(shares):
    yield "all by one, and many experts"
    equal_shares(shares([("x", 5)] * 8), {5: 1.0})
    equal_shares(shares([("x", e) for e in range(30)]), {e: 1 / 30 for e in range(30)})


@check
def check_runs(runs):
    yield "runs of random lengths"
    lengths = [random.randint(1, 15) for _ in range(20)]
    got = runs([("x", place % 3) for place, length in enumerate(lengths) for _ in range(length)])
    same(list(got), lengths, "the lengths of the runs")


@check
def check_text_to_spans(text_to_spans):
    yield "random characters and experts"
    text = "".join(random.choice("<>&;'\" \n\tabé€—") for _ in range(80))
    experts = [random.choice([None, 0, 1, 2, 10, 63]) for _ in text]
    reads_as(text_to_spans(text, experts), text, experts)
