"""Hidden cases for lesson 13."""

import torch

from makemoe.checks import check, close, same
from makemoe.model import MoEConfig


@check
def check_dense_twin(dense_twin):
    yield "it also follows a config with biases, layer norm and learned positions"
    config = MoEConfig(
        vocab_size=7,
        block_size=5,
        n_embd=6,
        n_head=2,
        n_layer=3,
        num_experts=3,
        top_k=1,
        n_hidden=10,
        router="noisy",
        positions="learned",
        norm="layer",
        activation="relu",
        bias=True,
        dropout=0.5,
    )
    twin = dense_twin(config, 9)
    same(sum(weight.numel() for weight in twin.blocks[2].moe.parameters()), 2 * 6 * 9 + 9 + 6, "weights of an MLP")
    ids = torch.randint(7, (4, 5))
    close(twin.eval()(ids).logits, twin(ids).logits, "logits in evaluation")
    x, layer = torch.randn(4, 5, 6), twin.blocks[0].moe.train()
    assert not torch.equal(layer(x)[0], layer(x)[0]), "in training the MLP lacks the dropout of the config"


@check
def check_paired_interval(paired_interval):
    yield "ten gaps use the last value of t"
    mean, low, high = paired_interval([-0.01 * i for i in range(10)])
    close(high - mean, 2.262 * 0.0302765 / 10**0.5, "reach", rtol=1e-4)
    close(mean - low, high - mean, "the reach to the other side")
