"""Hidden cases for lesson 10: other sizes and choices than students can see."""

import math

import torch

from makemoe.checks import check, close, same
from makemoe.checks.model import SIZES, block_by_hand, count_by_hand, same_counts, same_output, shaken, stand_in
from makemoe.dropless import GroupedExperts


@check
def check_block(Block, MoEConfig):
    yield "another factor, layer norm, biases, the loop of experts, one token"
    block = shaken(
        Block(MoEConfig(**SIZES | dict(top_k=3), norm="layer", bias=True, experts="loop", routed_scaling_factor=0.5))
    )
    x = torch.randn(1, 1, 16)
    close(block(x)[0], block_by_hand(block, x, 0.5)[0], "the stream")


@check
def check_language_model(SparseMoELanguageModel, MoEConfig):
    yield "one block, many heads, noisy router at rest, a full context, targets of character 0"
    sizes = SIZES | dict(n_layer=1, n_head=8, block_size=9, num_experts=5, vocab_size=7)
    model = shaken(
        SparseMoELanguageModel(MoEConfig(**sizes, router="noisy", activation="gelu", bias=True)), std=0.4
    ).eval()
    ids = torch.randint(7, (3, 9))
    same_output(model, ids, torch.zeros_like(ids), "targets of 0")
    yield "the first loss is ln V"
    torch.manual_seed(3)
    model = SparseMoELanguageModel(MoEConfig(**SIZES | dict(vocab_size=97)))
    loss = model(*torch.randint(97, (2, 64, 12))).lm_loss.item()
    close(loss, math.log(97), "the first loss", rtol=0, atol=0.1)


@check
def check_count_parameters(count_parameters):
    yield "other sizes"
    same_counts(
        count_parameters(stand_in(GroupedExperts, 7, 3, C=4, H=9)), count_by_hand(7, 3, C=4, H=9), "3 of 7 experts"
    )


@check
def check_mixtral_parameters(mixtral_parameters):
    yield "Mixtral 8x22B: 141 billion parameters, 39 billion of them active"
    total, active = mixtral_parameters(dim=6144, n_layers=56, hidden_dim=16384, n_heads=48, vocab_size=32768)
    same((round(total / 1e9), round(active / 1e9)), (141, 39), "(total, active) in billions")
