"""Checks of lesson 00, lab."""

import html
import random
from html.parser import HTMLParser

import torch

from makemoe.checks import check, close, same


def starts_from(seed):
    "Assert that the random numbers that come next are those of `seed`."
    ours = torch.rand(3), random.random()
    torch.manual_seed(seed)
    random.seed(seed)
    same(ours[0], torch.rand(3), "torch.rand(3)")
    same(ours[1], random.random(), "random.random()")


@check
def check_seed_everything(seed_everything):
    for seed in 7, 0, 123456:
        yield f"after the seed {seed}, PyTorch and Python both start from {seed}"
        seed_everything(seed)
        starts_from(seed)
    yield "a seed can be set again"
    seed_everything(7)
    starts_from(7)
    yield "the default seed is 1337"
    seed_everything()
    starts_from(1337)


@check
def check_shares(shares):
    yield "of four characters expert 0 wrote one and expert 1 three"
    equal_shares(shares([("a", 1), ("b", 0), ("c", 1), ("d", 1)]), {0: 1 / 4, 1: 3 / 4})
    yield "white space counts, equal pairs count twice, and experts that wrote nothing are left out"
    written = [(" ", 3), ("\n", 7), (" ", 3), (".", 7), ("b", 1), ("a", 3), ("a", 11)]
    before = list(written)
    equal_shares(shares(written), {1: 1 / 7, 3: 3 / 7, 7: 2 / 7, 11: 1 / 7})
    same(written, before, "the list of pairs, which is the caller's,")


def equal_shares(got, want):
    assert isinstance(got, dict), f"the shares should be a dict, not {got!r}"
    same(sorted(got), sorted(want), "the experts with a share")
    for expert, share in want.items():
        close(got[expert], share, f"the share of expert {expert}")


@check
def check_runs(runs):
    cases = [("0 0 3 0", [2, 1, 1]), ("1 2 2 1 1", [1, 2, 2]), ("11 1 1 12", [1, 2, 1]), ("4 " * 12, [12]), ("", [])]
    for experts, want in cases:
        yield f"the runs of the experts {experts or '(none)'}"
        written = [("a\n"[place % 2], int(e)) for place, e in enumerate(experts.split())]
        before = list(written)
        got = runs(written)
        same(list(got) if isinstance(got, tuple) else got, want, "the lengths of the runs")
        same(written, before, "the list of pairs, which is the caller's,")


class Reader(HTMLParser):
    "What a browser sees: a list of (character, class, title)."

    def __init__(self, source):
        super().__init__(convert_charrefs=False)
        self.characters, self.spans = [], []
        assert isinstance(source, str), f"the HTML should be a string, not {type(source).__name__}"
        self.feed(source)
        self.close()
        assert not self.spans, "a span is not closed"

    def handle_starttag(self, tag, attributes):
        assert tag == "span", f"there should be no tags but span, but there is <{tag}>"
        self.spans.append(dict(attributes))

    def handle_endtag(self, tag):
        assert self.spans, f"</{tag}> closes nothing"
        self.spans.pop()

    def handle_entityref(self, name):
        self.handle_data(html.unescape(f"&{name};"), escaped=True)

    def handle_charref(self, name):
        self.handle_entityref("#" + name)

    def handle_data(self, data, escaped=False):
        assert escaped or not {"<", "&"} & set(data), f"not escaped: {data!r}"
        span = self.spans[-1] if self.spans else {}
        self.characters += [(character, span.get("class"), span.get("title")) for character in data]


def reads_as(source, text, experts):
    "Assert that a browser sees each character of `text` with the class and title of its expert."
    want = [(c, None, None) if e is None else (c, f"e{e}", f"expert {e}") for c, e in zip(text, experts)]
    got = Reader(source).characters
    same("".join(c for c, _, _ in got), text, "the text that a browser shows")
    for ours, right in zip(got, want):
        same(ours, right, "(character, class, title)")


@check
def check_text_to_spans(text_to_spans):
    cases = {
        "a character without an expert is in no span": ("ab", [None, 2]),
        "expert 0 is an expert, and 12 has two digits": ("abc", [0, 12, 0]),
        "< and & are escaped, with an expert and without": ("<&lt;<&lt;", [1] * 5 + [None] * 5),
        "new lines, tabs and spaces stay, also at the ends": ("\t\n  \n ", [None, None, 1, 1, 0, None]),
        "the same expert again, after a gap or after another": ("abcdefg", [3, 3, None, 3, 1, 3, 3]),
        "quotation marks and letters beyond ASCII stay": ("\"é'—“”ß", [1, None, 0, 0, None, 2, 2]),
    }
    for claim, (text, experts) in cases.items():
        yield claim
        reads_as(text_to_spans(text, experts), text, experts)
    yield "an empty text gives an empty string"
    same(text_to_spans("", []), "")
