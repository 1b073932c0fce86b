"""What holds for every router that the model takes by name, and where one is the exception."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from makemoe import bias_balancing, expert_choice, second_expert, smooth_choice, switch  # noqa: F401  they add routers
from makemoe.capacity import CapacityRouter
from makemoe.checkpoints import load_checkpoint, save_checkpoint
from makemoe.data import CharTokenizer
from makemoe.dropless import GroupedExperts
from makemoe.generation import generate
from makemoe.lab import seed_everything
from makemoe.losses import load_balancing_loss, router_z_loss
from makemoe.model import ROUTERS, MoEConfig, SparseMoELanguageModel
from makemoe.training import TrainConfig, TrainState, train

C, E, K = 12, 6, 3

# name: (sum of the gates of a token: from, to; experts per token: from, to)
FACTS = {
    "topk": (1, 1, K, K),
    "noisy": (1, 1, K, K),
    "switch": (0, 1, K, K),
    "threshold": (0, 1, 1, K),
    "expert_choice": (0, 1, 0, E),
    "coordinate": (0, K, K, K),
    "bias_balanced": (1, 1, K, K),
    "hash": (1, 1, K, K),
    "frozen": (1, 1, K, K),
}
NOT_CAUSAL = {"expert_choice"}
NOT_LEARNED = {"hash", "frozen"}
RANDOM = {"noisy", "threshold"}  # in training

every = pytest.mark.parametrize("name", FACTS)
causal = pytest.mark.parametrize("name", sorted(set(FACTS) - NOT_CAUSAL))


def make(name, num_experts=E, top_k=K, training=False, n_embd=C):
    return ROUTERS[name](n_embd, num_experts, top_k).train(training)


def route(router, x, ids=None):
    if hasattr(router, "ids"):
        router.ids = torch.arange(x[..., 0].numel()).view(x.shape[:-1]) if ids is None else ids
    return router(x)


def test_every_router_is_listed_here():
    assert set(ROUTERS) == set(FACTS)


@every
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_gates_and_choices_are_in_range(name, training, size):
    low, high, fewest, most = FACTS[name]
    routing = route(make(name, training=training), size * torch.randn(4, 9, C))
    for field in routing.gates, routing.logits, routing.chosen, routing.kept:
        assert field.shape == (4, 9, E)
    assert routing.gates.dtype == routing.logits.dtype == torch.float32
    assert routing.chosen.dtype == routing.kept.dtype == torch.bool
    assert routing.gates.isfinite().all() and (routing.gates >= 0).all()
    assert not (routing.gates.bool() & ~routing.kept).any() and not (routing.kept & ~routing.chosen).any()
    total, count = routing.gates.sum(dim=-1), routing.chosen.sum(dim=-1)
    assert (total > low - 1e-5).all() and (total < high + 1e-5).all()
    assert (count >= fewest).all() and (count <= most).all()


@every
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 1), (2, 7)])
@pytest.mark.parametrize("num_experts, top_k", [(1, 1), (4, 1), (5, 5)])
def test_other_shapes_one_token_all_experts(name, shape, num_experts, top_k):
    routing = route(make(name, num_experts, top_k), torch.randn(*shape, C))
    assert routing.gates.shape == (*shape, num_experts) and routing.gates.isfinite().all()
    if name != "expert_choice" and top_k == num_experts:
        assert routing.chosen.all() or name == "threshold"


@every
def test_equal_tokens_are_routed(name):
    router = make(name)
    for weight in router.parameters():
        torch.nn.init.zeros_(weight)  # all scores are equal
    routing = route(router, torch.ones(2, 8, C))
    low, high, fewest, most = FACTS[name]
    assert routing.gates.isfinite().all()
    assert (routing.chosen.sum(dim=-1) >= fewest).all() and (routing.chosen.sum(dim=-1) <= most).all()


@every
def test_evaluation_is_still_and_draws_nothing(name):
    router, x = make(name), torch.randn(2, 8, C)
    before = torch.get_rng_state()
    first, second = route(router, x), route(router, x)
    assert torch.equal(first.gates, second.gates) and torch.equal(before, torch.get_rng_state())


@every
def test_training_is_random_only_where_it_says_so(name):
    router, x = make(name, training=True), torch.randn(2, 50, C)
    first, second = route(router, x), route(router, x)
    assert torch.equal(first.gates, second.gates) is (name not in RANDOM)


@every
def test_scores_are_float32_under_autocast_and_for_other_types(name):
    router, x = make(name), torch.randn(2, 8, C)
    wanted = route(router, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = route(router, x)
    assert found.logits.dtype == found.gates.dtype == torch.float32
    assert torch.equal(found.logits, wanted.logits) and torch.equal(found.gates, wanted.gates)
    assert route(router.bfloat16(), x.bfloat16()).logits.dtype == torch.float32


@every
def test_x_is_left_as_it_is(name):
    x = torch.randn(2, 8, C)
    before = x.clone()
    route(make(name, training=True), x)
    assert torch.equal(x, before)


@every
def test_the_gradient_reaches_the_scores_that_it_should(name):
    router = make(name, training=True)
    routing = route(router, torch.randn(2, 20, C))
    if name == "hash":
        assert not routing.gates.requires_grad and not list(router.parameters())
        return
    if name == "frozen":
        assert not list(router.parameters())
        return
    (routing.gates * torch.randn(E)).sum().backward()
    assert router.linear.weight.grad.abs().max() > 1e-6


@every
def test_relabelling_the_experts_permutes_the_answer(name):
    if name == "hash":
        pytest.skip("a hash belongs to the numbers of the experts")
    router, x, order = make(name), torch.randn(2, 8, C), torch.randperm(E)
    other = copy.deepcopy(router)
    for tensor in [*other.parameters(), *other.buffers()]:
        if tensor.dim() and len(tensor) == E:
            tensor.data = tensor.data[order]
    first, second = route(router, x), route(other, x)
    assert torch.equal(first.chosen[..., order], second.chosen)
    torch.testing.assert_close(first.gates[..., order], second.gates)


@every
def test_a_row_does_not_depend_on_its_neighbours(name):
    router, x, ids = make(name), torch.randn(3, 8, C), torch.randint(50, (3, 8))
    together, alone = route(router, x, ids), route(router, x[1:2], ids[1:2])
    torch.testing.assert_close(together.gates[1:2], alone.gates)


@every
def test_only_those_leak_that_say_so(name):
    router, x, ids = make(name), torch.randn(40, 8, C), torch.randint(50, (40, 8))
    changed, other = x.clone(), ids.clone()
    changed[:, 5:], other[:, 5:] = torch.randn(40, 3, C), torch.randint(50, (40, 3))
    before, after = route(router, x, ids).gates[:, :5], route(router, changed, other).gates[:, :5]
    moved = not torch.allclose(before, after, atol=1e-6)
    assert moved is (name in NOT_CAUSAL) and getattr(router, "causal", True) is not moved


@every
def test_loop_and_groups_agree(name):
    routing = route(make(name), torch.randn(2, 8, C))
    x, groups = torch.randn(2, 8, C), GroupedExperts(E, C, 16, top_k=K)
    torch.testing.assert_close(groups(x, routing), groups.to_loop()(x, routing))


@causal
@given(seed=st.integers(0, 10**6), factor=st.sampled_from([0.25, 0.5, 1.0, 4.0]))
def test_capacity_on_top(name, seed, factor):
    torch.manual_seed(seed)
    router, x = CapacityRouter(make(name), factor, factor, minimum=1), torch.randn(2, 9, C)
    if hasattr(router.router, "ids"):
        router.router.ids = torch.randint(30, (2, 9))
    plain, limited = router.router(x), router.eval()(x)
    slots = max(-(-round(factor * K * 9, 6) // E), 1)
    assert (limited.kept.sum(dim=1) <= slots).all() and torch.equal(limited.chosen, plain.chosen)
    assert not (limited.kept & ~plain.kept).any()


def tiny(name, **changes):
    sizes = dict(vocab_size=20, block_size=16, n_embd=16, n_head=2, n_layer=2, num_experts=4, top_k=2, n_hidden=16)
    seed_everything(1337)
    return SparseMoELanguageModel(MoEConfig(router=name, **sizes | changes))


@every
def test_the_model_trains_with_it_saves_it_and_loads_it_again(name, tmp_path):
    tokenizer = CharTokenizer("abcdefghijklmnopqrst")
    ids = tokenizer.encode("abcdefghijklmnopqrst" * 30)
    model, config = tiny(name), TrainConfig(steps=12, batch_size=8, lr=1e-2, warmup=2, eval_every=6, eval_blocks=4)
    history = train(model, ids, ids, config)
    assert history[-1]["val_loss"] < history[0]["val_loss"] - 0.3
    save_checkpoint(tmp_path / "model.safetensors", model, tokenizer, history)
    loaded, _, _ = load_checkpoint(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    assert torch.equal(loaded(ids[None, :16]).logits, model(ids[None, :16]).logits)


@every
def test_it_writes_as_it_reads_or_refuses(name):
    model, ids = tiny(name).eval(), torch.randint(20, (2, 5))
    if name in NOT_CAUSAL:
        with pytest.raises(ValueError, match="needs later tokens"):
            generate(model, ids, 3)
        with pytest.raises(ValueError, match="capacity_factor must be None"):
            tiny(name, capacity_factor=1.25)
        return
    written = generate(model, ids, 8, temperature=0)
    for t in range(5, 13):  # without a cache
        assert torch.equal(model(written[:, :t]).logits[:, -1].argmax(dim=-1), written[:, t])


@every
def test_losses_of_lesson_08_take_its_routing(name):
    routing = tiny(name).train()(torch.randint(20, (3, 16))).routings[0]
    balance = load_balancing_loss(routing).item()
    assert 0.5 < balance <= 4 / 2 + 1e-5 and router_z_loss(routing).isfinite()


def test_a_bias_moves_once_for_each_step_of_the_optimizer():
    model = tiny("bias_balanced").train()
    router, ids = model.blocks[0].moe.router, torch.randint(20, (4, 16))
    state = TrainState(model, TrainConfig())
    for _ in range(3):
        loss = model(ids, ids).loss
    assert not router.bias.any()
    loss.backward()
    state.optimizer.step()
    moved = router.bias.clone()
    assert moved.any()
    model.eval()(ids)
    assert torch.equal(router.bias, moved)


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("switch", {"jitter": 2.0}, ["jitter"]),
        ("threshold", {"thresholds": -1.0}, ["threshold"]),
        ("bias_balanced", {"groups": 3}, ["groups"]),
        ("hash", {"seed": -1}, ["seed"]),
        ("topk", {"jitter": 0.1}, ["router_settings", "topk"]),
        ("switch", {"colour": 1}, ["colour", "jitter"]),
    ],
)
def test_settings_of_a_router_are_refused_in_one_line(name, settings, words):
    with pytest.raises(ValueError) as caught:
        tiny(name, router_settings=settings)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)
