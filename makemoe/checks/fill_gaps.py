"Checks of lesson 30, fill_gaps. Sources are put together one id after another, answers come from `generate`."

import random
from types import SimpleNamespace

import torch
from torch import nn

from makemoe.checks import check, close, refuses, same, unchanged
from makemoe.data import CharTokenizer
from makemoe.switch_transformer import SwitchTransformer, SwitchTransformerConfig

MARKS, FIRST, GAP = 32, 34, "___"  # marks are 2 to 33, a character has its id plus 34
LETTERS = CharTokenizer("To be, or not to be: that\n")


def a_transformer(**settings):
    "A small random model that writes more letters than marks, in training mode, where jitter and dropout are large."
    sizes = dict(n_embd=16, n_head=2, head_size=8, n_hidden=16, encoder_layers=1, decoder_layers=2, num_experts=3)
    sizes |= dict(encoder_sparse=(0,), decoder_sparse=(0, 1), expert_capacity=200, jitter=0.5, dropout=0.3, tied=False)
    model = SwitchTransformer(SwitchTransformerConfig(vocab_size=FIRST + LETTERS.vocab_size, **sizes | settings))
    nn.init.normal_(model.lm_head.weight)
    model.lm_head.weight.data[:FIRST] *= 0.2
    for block in model.decoder.blocks:
        block.cross.query.weight.data *= 4
        block.cross.proj.weight.data *= 6
    return model


def a_model(block_size=12, quick=True, **settings):
    "What `fill` needs of a model: a transformer (a `quick` one makes its text up), a config with a `block_size`."
    model = nn.Module()
    model.transformer, model.config = a_transformer(**settings), SimpleNamespace(block_size=block_size)
    if quick:
        model.transformer.generate = make_up
    return model


def make_up(ids, num_tokens, real=None, temperature=0.0, top_k=None, top_p=None, seed=None):
    "In place of `generate`: another text for each source and each setting, and without a seed each time."
    chance = torch.randint(10**6, ()).item() if temperature and seed is None else seed
    kind = ids[0].tolist(), temperature, top_k, top_p, chance
    draw = random.Random(repr(kind))
    gaps = [[mark, *draw.choices(range(FIRST, FIRST + LETTERS.vocab_size), k=draw.randint(1, 6))] for mark in (2, 3)]
    if draw.random() < 0.2:
        gaps[0] = [2] + [FIRST + 5] * 50  # a gap that does not end
    return torch.tensor([[0, *gaps[0], *gaps[1], 1][: num_tokens + 1]])


def some_pairs(rows=5):
    "Random source ids and labels of different lengths, as from `pad_pairs`."
    source, labels = torch.randint(2, 40, (rows, 9)), torch.randint(1, 40, (rows, 7))
    real = torch.ones(rows, 9, dtype=torch.bool)
    for row in range(rows):
        real[row, 9 - row % 4 :] = False
        labels[row, 7 - row % 3 :] = -100
    return source.masked_fill(~real, 0), labels, real


@check
def check_swapped_loss(swapped_loss):
    yield "each text has the source of the text before it, the first that of the last, with its padding"
    for rows in 2, 5:
        model, (source, labels, real) = a_transformer(balance_coef=5.0).eval(), some_pairs(rows)
        before = [row - 1 for row in range(rows)]
        want = model(torch.stack([source[row] for row in before]), labels=labels, real=real[before]).lm_loss.item()
        with unchanged(source=source, labels=labels, real=real):
            got = swapped_loss(model, source, labels, real)
        close(got, want, f"the loss of {rows} texts, without balance loss and z-loss")
    yield "it is a Python number, and no gradient is left behind"
    assert type(got) is float, f"{got!r} should be a float"
    assert all(weight.grad is None for weight in model.parameters()), "a weight has a gradient now"
    yield "no jitter and no dropout, also for a model in training, and the mode is put back"
    state = torch.get_rng_state()
    for training in True, False:
        close(swapped_loss(model.train(training), source, labels, real), want, f"the loss with training={training}")
        same(model.training, training, "model.training afterwards")
    same(torch.get_rng_state(), state, "the state of the random numbers")
    yield "one text alone has no other: a ValueError says so"
    refuses(ValueError, lambda: swapped_loss(model, source[:1], labels[:1], real[:1]))


def source_by_hand(before, after, side):
    "The source of a gap as a list, one id after another."
    left = [LETTERS.characters.index(c) + FIRST for c in before]
    right, mark = [], 2
    for piece in after[:MARKS]:
        right += [mark, *(LETTERS.characters.index(c) + FIRST for c in piece)]
        mark += 1
    return left[max(len(left) - side, 0) :] + right[: side + 1]


def right_source(gap_source, before, after, side):
    got = gap_source(LETTERS, before, after, side)
    same(got, torch.tensor(source_by_hand(before, after, side)), f"the source of {before!r}, {after}, {side}")


@check
def check_gap_source(gap_source):
    yield "mark 2 stands for the gap, between the text before and the text after"
    right_source(gap_source, "To be, ", ["not to be"], 20)
    yield "gaps that follow have the marks 3, 4, ..."
    right_source(gap_source, "To ", [", or ", " to ", "\n"], 30)
    yield "at most `side` ids stand on each side of the mark, the nearest ones, and a later mark is one of them"
    for side in range(1, 14):
        right_source(gap_source, "To be, or not", [" to", " b", "", ": that"], side)
    yield "a gap may stand at either end, touch another, or be all there is"
    for before, after in ("", ["be"]), ("To ", [""]), ("", [""]), ("", ["", "", "be"]), ("be", ["", ""]):
        right_source(gap_source, before, after, 8)
    yield "of many gaps only the first 32 have a mark, and nothing behind them is read"
    right_source(gap_source, "to", ["b"] * 40, 100)
    right_source(gap_source, "to", [""] * 40, 100)
    yield "a character that is not in the vocabulary is a ValueError of the tokenizer"
    refuses(ValueError, lambda: gap_source(LETTERS, "toë ", ["be"], 8), "ë")
    refuses(ValueError, lambda: gap_source(LETTERS, "to ", ["bé"], 8), "é")


@torch.no_grad()
def filled_by_hand(model, text, num_tokens, settings):
    "What `fill` should give: a list of (character, expert)."
    before, *after = text.split(GAP)
    pairs = [(c, None) for c in before]
    while after:
        source = torch.tensor([source_by_hand(before, after, model.config.block_size // 2)])
        written = model.transformer.generate(source, num_tokens + 1, **settings)[0].tolist()
        asked = model.transformer(source, torch.tensor([written])).decoder_routings[-1].chosen[0].tolist()
        for token, chosen in zip(written[2:], asked[1:]):
            if token < FIRST:
                break
            before += LETTERS.characters[token - FIRST]
            pairs.append((before[-1], chosen.index(True)))
        rest, *after = after
        before += rest
        pairs += [(c, None) for c in rest]
    return pairs


def right_filling(fill, model, text, num_tokens=10, **settings):
    "Assert that `fill` gives what it should, and return how many characters it wrote."
    model.eval()
    state = torch.get_rng_state()
    got = list(fill(model, LETTERS, text, num_tokens, **settings))
    torch.set_rng_state(state)
    want = filled_by_hand(model, text, num_tokens, settings)
    what = f"{text!r}, {num_tokens} tokens, {settings}: "
    given = [c for c, expert in got if expert is None]
    same(given, list(text.replace(GAP, "")), what + "the characters without an expert")
    same("".join(c for c, _ in got), "".join(c for c, _ in want), what + "the text")
    same([expert for _, expert in got], [expert for _, expert in want], what + "the experts")
    return len(got) - len(given)


@check
def check_fill(fill):
    yield "a gap gets what `generate` writes between its mark and the next mark, with the expert that was asked for it"
    real = a_model(40, quick=False)
    assert sum(right_filling(fill, real, text, 4) for text in ("To be, ___ not", "To ___")) > 2
    model = a_model(40)
    for text in "To be, ___ not", "___ be", "To ___":
        right_filling(fill, model, text, 10)
    yield "several gaps are filled from left to right, and the next one reads what was written"
    for text in "To ___, or ___ to ___", "t______e":
        right_filling(fill, model, text, 10, temperature=1.5, seed=4)
    yield "no gap gets more than `num_tokens` characters, by default 32"
    model.transformer.generate = lambda ids, num_tokens, **_: torch.tensor([([0, 2] + [FIRST] * 60)[: num_tokens + 1]])
    for number in 0, 1, 3, 32:
        right_filling(fill, model, "or ___", number)
    same(len(list(fill(model, LETTERS, "or ___"))), 3 + 32, "the characters where no number is given")
    yield "half of `block_size` is read on each side"
    for block_size in 4, 7, 12:
        right_filling(fill, a_model(block_size), "To be, or not ___ to be: that\n to be ___ be, or not to be", 3)
    yield "all settings reach `generate`, and an unknown one is an error"
    model = a_model(40)
    for settings in dict(temperature=0.7, seed=2), dict(top_k=3, temperature=1.0), dict(top_p=0.5, seed=1):
        right_filling(fill, model, "To ___ not", 10, **settings)
    refuses(TypeError, lambda: list(fill(model, LETTERS, "To ___", 3, temprature=0)))
    yield "a text without gaps stays what it is"
    for text in "To be", "":
        same(list(fill(model, LETTERS, text)), [(c, None) for c in text], f"{text!r} filled")
    yield "a model in training is put into evaluation mode, so that nothing is random"
    want = list(fill(model.eval(), LETTERS, "To ___, or ___", 10))
    same(list(fill(model.train(), LETTERS, "To ___, or ___", 10)), want, "the same text, twice")
    same(model.training, False, "model.training afterwards")
