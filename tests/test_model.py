"""Lesson 10. The oracles: the model's own parts in a loop (makemoe.checks.model), and a formula of the sizes."""

import itertools
import json
import math
from dataclasses import FrozenInstanceError, asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from classroom.hidden import model as hidden
from makemoe.checks import model as checks
from makemoe.checks.model import Memory, same_output, shaken
from makemoe.dropless import LOOP_NAMES
from makemoe.experts import ACTIVATIONS
from makemoe.gating import TopkRouter
from makemoe.losses import load_balancing_loss, router_z_loss
from makemoe.model import ROUTERS, Block, MoEConfig, SparseMoELanguageModel, count_parameters

SIZES = dict(vocab_size=13, block_size=12, n_embd=16, n_head=2, n_layer=3, num_experts=4, n_hidden=8)
KINDS = [
    dict(router="topk", positions="rotary", norm="rms", bias=False, activation="squared_relu", experts="grouped"),
    dict(router="noisy", positions="learned", norm="layer", bias=True, activation="relu", experts="loop"),
    dict(router="noisy", positions="rotary", norm="layer", bias=True, activation="gelu", experts="grouped"),
    dict(router="topk", positions="learned", norm="rms", bias=False, activation="relu", experts="loop"),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))


def random_model(seed=0, std=0.4, **changes):
    "A small model in evaluation mode whose every parameter is random."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return shaken(SparseMoELanguageModel(MoEConfig(**SIZES | changes)), std).eval()


@pytest.mark.parametrize("these", [checks, hidden], ids=["visible", "hidden"])
def test_checks(these):
    these.check_block(Block, MoEConfig)
    these.check_language_model(SparseMoELanguageModel, MoEConfig)
    these.check_count_parameters(count_parameters)


# -- the model


@every_kind
def test_model_equals_its_parts_by_hand_in_values_and_gradients(kind):
    ids, targets = torch.randint(13, (2, 3, 9))
    same_output(random_model(**kind), ids, targets, "a model of this kind")
    quiet = random_model(**kind | dict(router="topk"), balance_coef=0.5, z_coef=2.0).train()
    same_output(quiet, ids, targets, "training")


@every_kind
@given(T=st.integers(2, 12), data=st.data())
@settings(max_examples=5)
def test_no_token_sees_the_future(kind, T, data):
    t = data.draw(st.integers(1, T - 1))
    model, ids = random_model(**kind), torch.randint(13, (2, T))
    changed = torch.cat([ids[:, :t], (ids[:, t:] + torch.randint(1, 13, (2, T - t))) % 13], dim=1)
    before, after = model(ids).logits, model(changed).logits
    assert_close(after[:, :t], before[:, :t])
    assert ((after[:, t] - before[:, t]).abs().amax(-1) > 1e-3).all()  # and it does look at itself


@every_kind
def test_rows_of_a_batch_do_not_touch(kind):
    model, ids = random_model(**kind), torch.randint(13, (4, 9))
    assert_close(model(ids).logits, torch.cat([model(row[None]).logits for row in ids]))


@every_kind
def test_order_of_tokens_matters(kind):
    "In a single block without positions the last token could not tell in which order the others came."
    model, ids = random_model(n_layer=1, **kind), torch.arange(6)[None]
    assert not torch.allclose(model(ids).logits[0, -1], model(ids[:, [2, 0, 1, 4, 3, 5]]).logits[0, -1], atol=1e-3)


@every_kind
@given(pieces=st.lists(st.integers(1, 5), min_size=1, max_size=4).filter(lambda pieces: sum(pieces) <= 12))
@settings(max_examples=5)
def test_read_in_pieces_with_a_cache_equals_read_at_once(kind, pieces):
    model = random_model(**kind)
    ids, cache = torch.randint(13, (2, sum(pieces))), [Memory() for _ in model.blocks]
    outputs = [model(piece, cache=cache) for piece in ids.split(pieces, dim=1)]
    whole = model(ids)
    assert_close(torch.cat([output.logits for output in outputs], dim=1), whole.logits)
    for layer, routing in enumerate(whole.routings):
        assert_close(torch.cat([output.routings[layer].gates for output in outputs], dim=1), routing.gates)


@every_kind
@pytest.mark.parametrize("shape", [(1, 1), (4, 12)], ids=["one token", "48 tokens"])
def test_gradients_reach_everything_but_experts_that_nobody_chose(kind, shape):
    model, (ids, targets) = random_model(std=0.2, **kind).train(), torch.randint(13, (2, *shape))
    output = model(ids, targets)
    output.loss.backward()
    for block, routing in zip(model.blocks, output.routings, strict=True):
        experts = block.moe.experts
        grads = experts.up.grad if kind["experts"] == "grouped" else [expert.up.weight.grad for expert in experts]
        assert [grad is not None and bool(grad.any()) for grad in grads] == (routing.load > 0).tolist()
    for name, weight in model.named_parameters():
        if ".experts." not in name:
            assert weight.grad is not None and weight.grad.any(), name


def test_grouped_experts_and_the_loop_are_the_same_model():
    grouped, loop = random_model(), random_model(experts="loop")
    weights = grouped.state_dict()
    for name in [name for name in weights if ".experts." in name]:
        start, ours = name.rsplit(".", 1)
        weights |= {f"{start}.{e}.{LOOP_NAMES[ours]}": weight for e, weight in enumerate(weights.pop(name))}
    loop.load_state_dict(weights)
    ids, targets = torch.randint(13, (2, 4, 12))
    assert_close(grouped(ids, targets).logits, loop(ids, targets).logits)
    assert_close(grouped(ids, targets).loss, loop(ids, targets).loss)
    assert count_parameters(grouped) == count_parameters(loop)


def test_with_the_factor_k_two_experts_with_equal_gates_are_one_wide_layer():
    model = random_model(n_layer=1, num_experts=2, top_k=2, routed_scaling_factor=2.0)
    block, x = model.blocks[0], torch.randn(3, 4, 16)
    nn.init.zeros_(block.moe.router.linear.weight)
    nn.init.zeros_(block.moe.router.linear.bias)
    stream = x + block.attention(block.norm1(x))
    assert_close(block(x)[0], stream + sum(expert(block.norm2(stream)) for expert in block.moe.experts.to_loop()))


def test_capacity_drops_in_training_and_spares_evaluation():
    model, ids = random_model(capacity_factor=0.5, block_size=48), torch.randint(13, (2, 48))
    assert all(routing.dropped == 0 for routing in model.eval()(ids).routings)
    output = model.train()(ids)
    assert all(routing.dropped > 0 for routing in output.routings)
    assert all((routing.load <= 2 * 12).all() for routing in output.routings)  # 2 rows, 0.5 * 2 * 48 / 4 slots


@pytest.mark.parametrize("router", ["topk", "noisy"])
def test_a_model_with_capacity_stays_causal_and_its_rows_apart(router):
    model = random_model(router=router, block_size=48, capacity_factor=0.5, eval_capacity_factor=0.5)
    ids = torch.randint(13, (8, 48))
    other = torch.cat([ids[:, :40], torch.randint(13, (8, 8))], dim=1)
    assert_close(model(ids).logits[:, :40], model(other).logits[:, :40])
    assert_close(torch.cat([model(row[None]).logits for row in ids]), model(ids).logits)


def test_aux_loss_reaches_the_routers_and_zero_coefficients_cost_nothing():
    ids, targets = torch.randint(13, (2, 3, 9))
    model = random_model(balance_coef=0.5, z_coef=2.0)
    output = model(ids, targets)
    by_block = [0.5 * load_balancing_loss(r) + 2.0 * router_z_loss(r) for r in output.routings]
    assert_close(output.aux_loss, sum(by_block) / 3)
    output.aux_loss.backward()
    assert all(block.moe.router.linear.weight.grad.any() for block in model.blocks)
    free = random_model(balance_coef=0.0)(ids, targets)
    assert free.aux_loss == 0 and free.loss == free.lm_loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@every_kind
def test_the_whole_model_in_another_type(kind, dtype):
    ids, targets = torch.randint(13, (2, 2, 9))
    model = random_model(**kind, std=0.2)
    exact = model(ids, targets)
    output = model.to(dtype)(ids, targets)
    assert output.logits.dtype == dtype and output.lm_loss.dtype == torch.float32
    assert abs(output.lm_loss - exact.lm_loss) < (0.1 if dtype != torch.float64 else 1e-5)
    output.loss.backward()
    assert all(weight.grad is None or weight.grad.dtype == dtype for weight in model.parameters())


def test_weights_go_through_a_state_dict():
    model, ids = random_model(**KINDS[1]), torch.randint(13, (2, 9))
    copy = SparseMoELanguageModel(model.config)
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.eval()(ids).logits, model(ids).logits)


# -- initialisation


def test_experts_and_blocks_start_out_different():
    weights = SparseMoELanguageModel(MoEConfig(**SIZES)).parameters()
    matrices = [
        matrix for weight in weights if weight.dim() > 1 for matrix in (weight if weight.dim() == 3 else [weight])
    ]
    for one, other in itertools.combinations(matrices, 2):
        assert one.shape != other.shape or not torch.equal(one, other)


@pytest.mark.parametrize("n_layer", [1, 12])
def test_the_stream_hardly_grows_at_any_depth(n_layer):
    model = SparseMoELanguageModel(MoEConfig(n_embd=64, n_hidden=128, n_layer=n_layer))
    x = start = model.token_embedding(torch.randint(64, (8, 32)))
    with torch.no_grad():
        for block in model.blocks:
            x, _ = block(x)
    assert 1 < x.std() / start.std() < 1.3


def test_the_same_seed_draws_the_same_weights_as_ever():
    "Stored results of long races depend on it: numbers of the first edition."
    torch.manual_seed(1337)
    model = SparseMoELanguageModel(MoEConfig(**SIZES))
    torch.manual_seed(7)
    loss = model(*torch.randint(13, (2, 3, 9))).lm_loss
    assert_close(loss.item(), 2.575572, rtol=0, atol=1e-5)


# -- parameters


def formula(c):
    "(total, active) from the sizes alone."
    C, H, E, bias = c.n_embd, c.n_hidden, c.num_experts, int(c.bias)
    norm = C if c.norm == "rms" else 2 * C
    attention = 4 * C * C + bias * C
    router = (C + 1) * E * (2 if c.router == "noisy" else 1)
    expert = 2 * C * H + bias * (H + C)
    ends = c.vocab_size * C + (c.positions == "learned") * c.block_size * C + norm + (C + 1) * c.vocab_size
    return tuple(ends + c.n_layer * (attention + router + n * expert + 2 * norm) for n in (E, c.top_k))


configs = st.builds(
    lambda heads, pairs, experts, k, **rest: MoEConfig(
        n_embd=2 * heads * pairs, n_head=heads, num_experts=experts, top_k=min(k, experts), **rest
    ),
    heads=st.integers(1, 4),
    pairs=st.integers(1, 5),
    experts=st.integers(1, 7),
    k=st.integers(1, 7),
    vocab_size=st.integers(1, 90),
    block_size=st.integers(1, 40),
    n_layer=st.integers(1, 3),
    n_hidden=st.integers(1, 30),
    router=st.sampled_from(["topk", "noisy"]),
    positions=st.sampled_from(["rotary", "learned"]),
    norm=st.sampled_from(["rms", "layer"]),
    bias=st.booleans(),
)


@given(config=configs)
@settings(max_examples=8)
def test_counts_equal_the_formula(config):
    with torch.device("meta"):
        model = SparseMoELanguageModel(config)
    assert count_parameters(model) == formula(config)


@pytest.mark.parametrize(
    "preset, counts, excess",
    [
        ("blog", (8_996_545, 2_674_369), 0.0256),
        ("laptop", (4_478_176, 1_332_448), 0.0256),
        ("gpu", (31_923_184, 10_689_520), 0.0768),
    ],
)
def test_presets_have_their_sizes_and_begin_at_the_logarithm_of_the_vocabulary(preset, counts, excess):
    config = getattr(MoEConfig, preset)()
    with torch.device("meta"):
        assert count_parameters(SparseMoELanguageModel(config)) == formula(config) == counts
    torch.manual_seed(1337)
    model = SparseMoELanguageModel(getattr(MoEConfig, preset)(n_layer=2)).eval()
    ids, targets = torch.randint(config.vocab_size, (2, 512 // config.block_size, config.block_size))
    with torch.no_grad():
        gap = model(ids, targets).lm_loss.item() - math.log(config.vocab_size)
    assert abs(gap - excess) < 0.06  # logits of variance C * 0.02**2 cost half of that


def test_active_parameters_are_the_work_of_a_token():
    "Counted by PyTorch: two operations for each active matrix weight, the embedding aside, as it is only looked up."
    from torch.utils.flop_counter import FlopCounterMode

    model, ids = random_model(), torch.randint(13, (2, 10))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    products = sum(
        flops for operation, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(operation)
    )
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert products == 2 * (count_parameters(model)[1] - vectors - model.token_embedding.weight.numel()) * ids.numel()


# -- config


def test_presets():
    assert MoEConfig.laptop() == MoEConfig(routed_scaling_factor=2.0, balance_coef=0.02)
    blog = asdict(MoEConfig.blog())
    sizes = dict(vocab_size=65, block_size=32, n_embd=128, n_head=8, n_layer=8, num_experts=8, top_k=2, n_hidden=512)
    choices = dict(router="noisy", positions="learned", norm="layer", activation="relu", bias=True, dropout=0.1)
    assert sizes.items() | choices.items() | dict(balance_coef=0.0).items() <= blog.items()
    for preset in MoEConfig.laptop, MoEConfig.gpu, MoEConfig.blog:
        assert asdict(preset(n_layer=3, vocab_size=50)) == asdict(preset()) | dict(n_layer=3, vocab_size=50)
        assert MoEConfig(**json.loads(json.dumps(asdict(preset())))) == preset()


def test_config_cannot_be_changed_afterwards():
    with pytest.raises(FrozenInstanceError):
        MoEConfig().n_layer = 3


NUMBERS = "vocab_size block_size n_embd n_head n_layer num_experts top_k n_hidden".split()
NONSENSE = [
    *[(name, value) for name in NUMBERS for value in (0, -1, 2.0, True, None, "8", 10**30)],
    *[("dropout", value) for value in (1.0, -0.1, math.nan, True, None, "0.1")],
    *[
        (name, value)
        for name in ("routed_scaling_factor", "eval_capacity_factor")
        for value in (0.0, -1.0, math.inf, math.nan, None, True)
    ],
    *[("capacity_factor", value) for value in (0.0, 1e30, math.nan, True, "1")],
    *[(name, value) for name in ("balance_coef", "z_coef") for value in (-0.1, math.nan, math.inf, None, False)],
    *[
        (name, value)
        for name in ("router", "positions", "norm", "activation", "experts")
        for value in ("other", None, [], 1)
    ],
    *[("bias", value) for value in (0, 1, None, "False")],
]


@pytest.mark.parametrize("name, value", NONSENSE, ids=lambda value: str(value)[:12])
def test_what_is_impossible_is_refused_in_one_line(name, value):
    with pytest.raises(ValueError) as caught:
        MoEConfig(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} is {value!r}, but must be ") and "\n" not in message


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(router="top2"), f"router is 'top2', but must be one of {', '.join(ROUTERS)}"),
        (dict(activation="tanh"), f"activation is 'tanh', but must be one of {', '.join(ACTIVATIONS)}"),
        (dict(top_k=9), "top_k = 9 experts per token, but there are only num_experts = 8"),
        (dict(n_embd=130), "n_embd = 130 channels cannot be divided among n_head = 4 heads"),
        (
            dict(n_embd=132),
            "rotary positions turn pairs of channels: n_embd / n_head = 33 is odd",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError) as caught:
        MoEConfig(**changes)
    assert str(caught.value) == message


def test_bounds_that_are_fine():
    MoEConfig(top_k=8, num_experts=8, dropout=0, balance_coef=0, capacity_factor=1)
    MoEConfig(n_embd=132, positions="learned")  # only rotary needs pairs
    MoEConfig(
        n_embd=1,
        n_head=1,
        n_layer=1,
        vocab_size=1,
        block_size=1,
        num_experts=1,
        top_k=1,
        n_hidden=1,
        positions="learned",
    )


def test_a_later_lesson_adds_a_router_by_name(monkeypatch):
    class LastRouter(TopkRouter):
        pass

    with pytest.raises(ValueError, match="router is 'last'"):
        MoEConfig(router="last")
    monkeypatch.setitem(ROUTERS, "last", LastRouter)
    model = SparseMoELanguageModel(MoEConfig(**SIZES, router="last"))
    assert type(model.blocks[0].moe.router) is LastRouter
