"""Lesson 13: the opponents of a mixture, and the race between them."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from classroom.hidden import twins as hidden
from makemoe.checks import twins as checks
from makemoe.model import MoEConfig, SparseMoELanguageModel, count_parameters
from makemoe.twins import DenseMLP, compare, dense_twin
from tests.answers import lesson

SMALL = MoEConfig(vocab_size=20, block_size=8, n_embd=16, n_head=2, n_layer=2, num_experts=4, top_k=2, n_hidden=24)


def test_checks():
    checks.check_dense_twin(dense_twin)
    hidden.check_dense_twin(dense_twin)
    checks.check_compare(compare)


def test_a_twin_is_a_mixture_of_one_expert():
    one = SparseMoELanguageModel(replace(SMALL, num_experts=1, top_k=1, n_hidden=48, experts="loop", balance_coef=0.0))
    twin = dense_twin(SMALL, 48)
    weights = {name.replace("experts.0.", "experts."): weight for name, weight in one.state_dict().items()}
    twin.load_state_dict({name: weight for name, weight in weights.items() if ".router." not in name})
    x, y = torch.randint(20, (2, 3, 8))
    assert_close(twin(x, y).loss, one(x, y).loss)


@pytest.mark.parametrize("preset", ["laptop", "gpu", "blog"])
def test_twins_of_the_presets_differ_from_the_mixture_by_the_routers_and_the_biases_of_idle_experts(preset):
    config = getattr(MoEConfig, preset)()
    total, active = count_parameters(SparseMoELanguageModel(config))
    noisy = config.router == "noisy"
    router = config.n_layer * (config.n_embd + 1) * config.num_experts * (1 + noisy)
    biases = config.n_layer * config.n_embd * config.bias  # of the way down: a dense layer has one, k experts have k
    assert (
        count_parameters(dense_twin(config, config.top_k * config.n_hidden))[0]
        == active - router - (config.top_k - 1) * biases
    )
    assert (
        count_parameters(dense_twin(config, config.num_experts * config.n_hidden))[0]
        == total - router - (config.num_experts - 1) * biases
    )


def test_a_layer_treats_every_token_alike():
    layer = DenseMLP(6, 10, "relu", bias=True, dropout=0.0)
    x = torch.randn(2, 3, 6)
    y, routing = layer(x)
    assert_close(y[1, 2], layer(x[1, 2])[0])
    assert routing.dropped == 0 and routing.load.tolist() == [6]


def test_the_table_of_t_is_students():
    stats = pytest.importorskip("scipy.stats", reason="comes with mlflow")
    cells, known = lesson("twins")
    names = {}
    exec(next(cell["source"] for cell in cells if cell["id"] == known["paired_interval"].cell).splitlines()[0], names)
    assert list(names["T_95"]) == pytest.approx([stats.t.ppf(0.975, n - 1) for n in range(2, 11)], abs=5e-4)
