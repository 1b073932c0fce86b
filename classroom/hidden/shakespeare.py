"""Hidden cases for lesson 16: other prompts, numbers of pieces and words than students can see."""

import torch

from makemoe.checks import check, close, same
from makemoe.checks.shakespeare import a_model, compare_with_stream, mean_loss


@check
def check_write(write):
    yield "a prompt longer than the context, and one layer"
    compare_with_stream(write, a_model(n_layer=1), "not to be, or not to be, or not to", 20, temperature=0.7, seed=9)


@check
def check_held_out_loss(held_out_loss):
    yield "every third piece of five"
    model = a_model(n_layer=1, block_size=2, dropout=0.0)
    ids = torch.randint(5, (2 * 1100 + 1,))
    loss, contexts = held_out_loss(model, ids, most=600)
    same(contexts, 256 + 256, "the number of contexts")
    close(loss, mean_loss(model, ids, [*range(256), *range(768, 1024)]), "the loss", rtol=1e-5)


@check
def check_real_words(real_words):
    yield "other words"
    close(real_words("Alas, poor Yorick! I knewe him", "alas poor yorick: i knew HIM, Horatio"), 5 / 6)
