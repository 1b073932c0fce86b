"""Checks of lesson 16, shakespeare."""

import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Barrier, Thread

import torch

from makemoe.checks import check, close, refuses, same
from makemoe.data import CharTokenizer
from makemoe.generation import stream
from makemoe.model import MoEConfig, SparseMoELanguageModel

LETTERS = CharTokenizer("To be, or not to be\n")


def a_model(**changes):
    "An untrained model of three small layers, in training mode, that likes some letters better than others."
    sizes = dict(block_size=12, n_embd=16, n_head=2, n_layer=3, num_experts=3, n_hidden=16, dropout=0.2)
    model = SparseMoELanguageModel(MoEConfig(LETTERS.vocab_size, **(sizes | changes)))
    model.lm_head.weight.data *= 50
    return model


def compare_with_stream(write, model, prompt, num_tokens, **settings):
    "Assert that `write` gives characters and experts as a loop over `stream` does."
    state = torch.get_rng_state()
    pairs = list(write(model, LETTERS, prompt, num_tokens, **settings))
    torch.set_rng_state(state)
    passes = list(stream(model, LETTERS.encode(prompt)[None], num_tokens, **settings))
    how = f"after {prompt!r} with {settings}"
    same([character for character, _ in pairs], [LETTERS.characters[token.item()] for token, _ in passes], how)
    for (_, expert), (_, routings) in zip(pairs, passes):
        assert type(expert) is int, f"{how}: the expert is {expert!r}, but should be an int"
        gates = routings[-1].gates[0, -1]
        assert 0 <= expert < 3 and gates[expert] == gates.max(), (
            f"{how}: expert {expert} is not the largest of {gates.tolist()}"
        )


@check
def check_write(write):
    yield "the characters are those of `stream` with the same seed, the experts have the largest gate in the last layer"
    model = a_model()
    compare_with_stream(write, model, "To be", 30, seed=5)
    yield "gates count, not scores: an expert that dropped the token was not asked"
    compare_with_stream(
        write, a_model(capacity_factor=0.1, eval_capacity_factor=0.1), "To be, or not to be", 30, seed=5
    )
    yield "all settings reach `stream`, and an unknown one is an error"
    for settings in dict(temperature=0), dict(temperature=0.5, seed=1), dict(top_k=2, seed=1), dict(top_p=0.5, seed=1):
        compare_with_stream(write, model, "o\n", 15, **settings)
    refuses(TypeError, lambda: list(write(model, LETTERS, "To be", 3, temprature=0)))
    yield "without a seed the common random numbers are used, with one they stay as they are"
    compare_with_stream(write, model, "or not", 15)
    state = torch.get_rng_state()
    list(write(model, LETTERS, "To be", 5, seed=5))
    same(torch.get_rng_state(), state, "the state of the common random numbers")
    yield "the model is afterwards in the mode in which it was"
    for mode in True, False:
        model.train(mode)
        list(write(model, LETTERS, "To be", 3, seed=5))
        same(model.training, mode, "model.training")
    yield "each character comes as soon as it is there"
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    next(iter(write(model, LETTERS, "To be", 20)))
    same(len(passes), 1, "the number of forward passes before the first character")
    yield "no characters asked, none written, and a prompt that cannot be read is refused"
    same(list(write(model, LETTERS, "To be", 0)), [], "what was written")
    refuses(ValueError, lambda: list(write(model, LETTERS, "To be xor not", 1)), "'x'")


@contextmanager
def in_empty_folder():
    "The current folder is an empty one that goes away again."
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        try:
            yield
        finally:
            os.chdir(here)


@check
def check_new_folder(new_folder):
    with in_empty_folder():
        yield "the first is runs/a, then runs/a-2, a-3, ..., and all are made"
        names = ["a", *(f"a-{number}" for number in range(2, 12))]
        same([new_folder("a") for _ in range(11)], [Path("runs", name) for name in names], "the folders")
        same(sorted(path.name for path in Path("runs").glob("*/")), sorted(names), "what is in runs")
        yield "what is there stays, whatever it is, and gaps are used"
        Path("runs/a/model").write_text("the work of a night")
        Path("runs/a-3").rmdir()
        Path("runs/file").write_text("in the way")
        for name, folder in (
            ("a", "a-3"),
            ("a", "a-12"),
            ("file", "file-2"),
            ("v1.5", "v1.5"),
            ("v1.5", "v1.5-2"),
            ("[a]", "[a]"),
        ):
            same(new_folder(name), Path("runs", folder), f"the folder for {name}")
        same(Path("runs/a/model").read_text(), "the work of a night", "what was in runs/a")
        yield "a number at the end of a name belongs to the name, and a folder may be in a folder"
        for name, folder in ("a-2", "a-2-2"), ("exp/lr1", "exp/lr1"), ("exp/lr1", "exp/lr1-2"):
            same(new_folder(name), Path("runs", folder), f"the folder for {name}")
        assert Path("runs/exp/lr1-2").is_dir(), "runs/exp/lr1-2 is not there"
        yield "each of several calls at the same moment gets a folder of its own"
        barrier, made = Barrier(8), []

        def call():
            barrier.wait()
            with suppress(OSError):
                made.append(new_folder("b"))

        for _ in range(5):
            threads = [Thread(target=call) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        same(len(set(made)), 40, "the number of different folders")
        yield "a link to nowhere is a name that is taken"
        if os.name == "posix":
            Path("runs/c").symlink_to("nowhere")
            same(new_folder("c"), Path("runs/c-2"), "the folder for c")


@torch.no_grad()
def mean_loss(model, ids, numbers):
    "The mean loss of contexts number `numbers` of `ids`, in one pass."
    T = model.config.block_size
    windows = torch.stack([ids[i * T : (i + 1) * T + 1] for i in numbers])
    return model.eval()(windows[:, :-1], windows[:, 1:]).lm_loss.item()


@check
def check_held_out_loss(held_out_loss):
    model = a_model(n_layer=1, block_size=3, dropout=0.0)
    ids = torch.randint(LETTERS.vocab_size, (3 * 600 + 3,))  # 600 contexts, the target after them and two more tokens
    yield "every context counts the same, those of a smaller last piece, too"
    loss, contexts = held_out_loss(model, ids)
    same(contexts, 600, "the number of contexts")
    close(loss, mean_loss(model, ids, range(600)), "the loss", rtol=1e-5)
    yield "any length will do"
    for length, fit in (4, 1), (3 * 255, 254), (3 * 256, 255), (3 * 256 + 1, 256), (3 * 257 + 1, 257):
        loss, contexts = held_out_loss(model, ids[:length])
        same(contexts, fit, f"the number of contexts of {length} tokens")
        close(loss, mean_loss(model, ids, range(fit)), f"the loss of {length} tokens", rtol=1e-5)
    yield "of more than `most` contexts every n-th piece is read"
    loss, contexts = held_out_loss(model, ids, most=512)
    same(contexts, 256 + 88, "the number of contexts of pieces 0 and 2 of 3")
    close(loss, mean_loss(model, ids, [*range(256), *range(512, 600)]), "the loss with most=512", rtol=1e-5)
    yield "`progress` goes round the loop"
    seen = []
    held_out_loss(model, ids, progress=lambda pieces: (seen.append(piece) or piece for piece in pieces))
    same(len(seen), 3, "the number of pieces that `progress` saw")


@check
def check_real_words(real_words):
    yield "3 of these 4 words occur"
    close(real_words("The king, thwe king!", "God save the King."), 0.75)
    yield "apostrophes belong to words"
    close(real_words("O'er o'er 'tis brabble", "'Tis o'er"), 0.75)
    close(real_words("oer er o'", "o'er"), 0.0, "the share of other words than o'er")
    yield "a part of a word is not a word"
    close(real_words("kin king kingdom", "king"), 1 / 3)
    yield "all that is no letter stands between words"
    close(real_words("SELF-love_1\nking--queen;3rd\tRD", "Self love\nKING:queen 1 rd"), 1.0)
    yield "repeated words of the sample count, those of the text do not"
    close(real_words("a b a e", "a a a b c d"), 0.75)
    yield "no words, no share"
    for sample, text in ("", "word"), ("?! ...", "word"), ("word", ""):
        close(real_words(sample, text), 0.0, f"the share for {sample!r} in {text!r}")
