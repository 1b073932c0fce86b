"""Checks of lesson 13, twins."""

from dataclasses import replace

import torch

from makemoe.checks import check, close, refuses, same
from makemoe.lab import seed_everything
from makemoe.model import MoEConfig, SparseMoELanguageModel, count_parameters
from makemoe.training import TrainConfig

SMALL = MoEConfig(vocab_size=11, block_size=6, n_embd=8, n_head=2, n_layer=2, num_experts=4, top_k=2, n_hidden=12,
                  routed_scaling_factor=2.0, capacity_factor=1.0, balance_coef=0.5)


def attention_and_rest(model):
    "Shapes of all weights outside of the mixtures."
    return {name: tuple(weight.shape) for name, weight in model.named_parameters() if ".moe." not in name}


@check
def check_dense_twin(dense_twin):
    twin, mixture = dense_twin(SMALL, 20), SparseMoELanguageModel(SMALL)
    yield "all but the mixtures is as the config says"
    same(attention_and_rest(twin), attention_and_rest(mixture), "the other weights")
    yield "each mixture is one MLP of the given width, without biases where the config has none"
    sizes = [sum(weight.numel() for weight in block.moe.parameters()) for block in twin.blocks]
    same(sizes, [2 * 8 * 20] * 2, "the weights in place of each mixture")
    same(count_parameters(twin)[0], count_parameters(twin)[1], "active parameters")
    yield "its answer counts once, whatever the factor of the mixture"
    ids = torch.randint(11, (3, 6))
    x = twin.token_embedding(ids)
    block = twin.blocks[0]
    middle = x + block.attention(block.norm1(x))
    close(block(x)[0], middle + block.moe(block.norm2(middle))[0], "a block's answer")
    yield "nothing is asked for besides the text"
    output = twin(ids, torch.randint(11, (3, 6)))
    close(output.loss, output.lm_loss, "loss")
    yield "its one expert carries every token"
    same([routing.load.tolist() for routing in output.routings], [[18], [18]], "loads")
    yield "the weights are drawn from the distributions of the model"
    wide = dense_twin(replace(SMALL, n_embd=64, n_layer=8), 256)
    weights = {name: weight for name, weight in wide.named_parameters() if ".moe." in name and weight.dim() > 1}
    for name, weight in weights.items():
        expected = torch.tensor(0.02 / 4 if "down" in name else 0.02)
        close(weight.std(), expected, f"standard deviation of {name}", rtol=0.1)
    x, y = torch.randint(11, (2, 8, 6))
    close(wide(x, y).loss, torch.tensor(11.0).log(), "first loss", rtol=0.1)
    yield "the config that was passed in, and what else it says, stays"
    same((SMALL.num_experts, SMALL.n_hidden, twin.config.n_embd, twin.config.block_size), (4, 12, 8, 6), "the config")


@check
def check_compare(compare):
    recipe = TrainConfig(steps=2, batch_size=2, warmup=1, eval_every=1, eval_blocks=2)
    ids, made = torch.randint(11, (60,)), []

    def make(name, n_layer):
        def model():
            made.append((name, torch.initial_seed()))
            return SparseMoELanguageModel(replace(SMALL, n_layer=n_layer))

        return model

    seen = []
    contenders = {"one": make("one", 1), "two": make("two", 2)}
    runs = compare(contenders, ids[:40], ids[40:], recipe, seeds=(5, 6), on_eval=seen.append)
    yield "every contender runs once with every seed, and its records come back in the order of the seeds"
    same({name: [[record["step"] for record in run] for run in each] for name, each in runs.items()},
         {"one": [[0, 1, 2]] * 2, "two": [[0, 1, 2]] * 2}, "steps")
    yield "the seed is set before each model is made"
    same(sorted(made), [("one", 5), ("one", 6), ("two", 5), ("two", 6)], "contenders and seeds")
    yield "on_eval is called with every record"
    same(len(seen), 12, "calls of on_eval")
    yield "a run depends on its seed, and on nothing that ran before it"
    alone = compare({"two": contenders["two"]}, ids[:40], ids[40:], recipe, seeds=(6,))["two"][0]
    same([record["val_loss"] for record in alone], [record["val_loss"] for record in runs["two"][1]], "losses")
    assert runs["two"][0][-1]["val_loss"] != runs["two"][1][-1]["val_loss"], "two seeds give the same losses"
    yield "the seed decides about the order of the batches, too"
    constant = {"same": lambda: seed_everything(1) or SparseMoELanguageModel(replace(SMALL, n_layer=1))}
    first, second = compare(constant, ids[:40], ids[40:], recipe, seeds=(5, 6))["same"]
    close(first[0]["val_loss"], second[0]["val_loss"], "the first loss, where the weights do not depend on the seed")
    assert first[-1]["val_loss"] != second[-1]["val_loss"], "the seed of the recipe was not replaced"


@check
def check_paired_interval(paired_interval):
    yield "the first number is the mean"
    mean, low, high = paired_interval([0.1, 0.2, 0.6])
    close(mean, 0.3, "mean")
    yield "the interval reaches t * s / sqrt(n) to both sides, s with n - 1"
    reach = 4.303 * 0.2645751 / 3**0.5
    close((low, high)[0], 0.3 - reach, "low", rtol=1e-4)
    close(high, 0.3 + reach, "high", rtol=1e-4)
    yield "two gaps that are alike leave no doubt, and t depends on how many there are"
    close(paired_interval([0.5, 0.5])[1], 0.5, "low")
    close(paired_interval([0.0, 1.0, 0.0, 1.0])[2], 0.5 + 3.182 * 3**-0.5 / 2, "high", rtol=1e-4)
    yield "fewer than two and more than ten gaps are refused"
    for gaps in [], [0.1], [0.1] * 11:
        refuses(ValueError, lambda gaps=gaps: paired_interval(gaps), len(gaps))
