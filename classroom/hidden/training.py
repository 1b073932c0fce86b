"""Hidden cases for lesson 11: other sizes than students can see."""

from dataclasses import replace

import torch

from makemoe.checks import check, close, same
from makemoe.checks.training import TINY, loss_by_loop, schedule
from makemoe.model import SparseMoELanguageModel


@check
def check_estimate_loss(estimate_loss):
    yield "another vocabulary, longer contexts, one layer, a batch larger than the text"
    model = SparseMoELanguageModel(replace(TINY, vocab_size=300, block_size=9, n_layer=1)).eval()
    ids = torch.randint(300, (8 * 9,))
    loss, load = estimate_loss(model, ids, batch_size=64, blocks=5)
    expected, expected_load = loss_by_loop(model, ids, [0, 1, 2, 4, 5])
    close(loss, expected, "the loss")
    same(load, expected_load, "the load")


@check
def check_learning_rate(learning_rate):
    yield "many steps, a way down that ends higher than it began"
    close(learning_rate(500, schedule(1000, 0, 2.0, 3.0)), 4.0, "half of the way from 2 to 6")


@check
def check_train(train, TrainConfig, TrainState):
    yield "one step, and more tokens a step than the text has"
    model, ids = SparseMoELanguageModel(TINY), torch.randint(7, (12,))
    history = train(model, ids, ids, TrainConfig(steps=1, batch_size=9, eval_every=100, eval_blocks=2))
    same([record["step"] for record in history], [0, 1], "the steps of the records")
