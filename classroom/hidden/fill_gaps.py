"""Hidden cases for lesson 30: other texts, windows and sizes than students can see."""

import torch

from makemoe.checks import check, close
from makemoe.checks.fill_gaps import a_model, a_transformer, right_filling, right_source, some_pairs


@check
def check_swapped_loss(swapped_loss):
    yield "three texts, all layers sparse"
    model, (source, labels, real) = a_transformer(encoder_layers=2, encoder_sparse=(0, 1)).eval(), some_pairs(3)
    want = model(source[[2, 0, 1]], labels=labels, real=real[[2, 0, 1]]).lm_loss.item()
    with torch.no_grad():
        close(swapped_loss(model, source, labels, real), want, "the loss")


@check
def check_gap_source(gap_source):
    yield "other texts and sides"
    for side in 1, 2, 5, 33:
        right_source(gap_source, "that to be or that", ["", "t", "be: that", "", "o"], side)
    right_source(gap_source, "b" * 50, ["e" * 50] * 33, 1000)


@check
def check_fill(fill):
    yield "other texts, windows and settings"
    model = a_model(9, decoder_sparse=(0,), num_experts=2)
    for text in "that ___ be, or ___", "___", "\n___\n":
        right_filling(fill, model, text, 4, temperature=1.0, top_p=0.9, seed=11)
