"""Lesson 29. The checks, the model of the library transformers, padding, caches, and spans of any length."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import classroom.hidden.switch_transformer as hidden
import makemoe.checks.switch_transformer as checks
import makemoe.switch_transformer as ours
from makemoe.losses import load_balancing_loss, router_z_loss
from makemoe.switch_transformer import (
    RelativeAttention,
    SwitchTransformer,
    SwitchTransformerConfig,
    join_spans,
    pad_pairs,
    relative_buckets,
    span_corruption,
    sparse_by_step,
    sparse_layers,
)

EXERCISES = "relative_buckets", "sparse_layers", "without_padding", "span_corruption", "join_spans"


@pytest.mark.parametrize("place", [checks, hidden])
def test_the_module_passes_the_checks_of_the_lesson(place):
    for name in EXERCISES:
        getattr(place, f"check_{name}")(getattr(ours, name))


@given(st.lists(st.integers(0, 300), min_size=2, max_size=300), st.floats(0.01, 0.99), st.floats(1, 9), st.integers())
def test_spans_join_to_the_text_again(ids, rate, mean_span, seed):
    ids, generator = torch.tensor(ids), torch.Generator().manual_seed(seed % 2**31)
    source, target = span_corruption(ids, rate, mean_span, generator)
    assert torch.equal(join_spans(source, target), ids)
    assert len(source) + len(target) == len(ids) + 2 * int((source < 34).sum()) + 1


def small(seed=0, **settings):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 40, "n_embd": 16, "n_head": 2, "head_size": 6, "n_hidden": 12,
        "encoder_layers": 3, "decoder_layers": 2,
        "encoder_sparse": (0, 2), "decoder_sparse": (1,), "num_experts": 4, "expert_capacity": 3, "jitter": 0.0,
        "num_buckets": 8, "max_distance": 16,
    }  # fmt: skip
    return SwitchTransformer(SwitchTransformerConfig(**sizes | settings))


def example(seed=0, T=13, U=9, B=3):
    draw = torch.Generator().manual_seed(seed)
    return (torch.randint(2, 40, (B, n), generator=draw) for n in (T, U))


@pytest.mark.parametrize("where", ["front", "behind", "both"])
def test_padding_changes_nothing_but_itself(where):
    model, (ids, labels) = small(), example()
    front, behind = 4 * (where != "behind"), 3 * (where != "front")
    noise = torch.randint(2, 40, (3, front + behind))
    padded = torch.cat([noise[:, :front], ids, noise[:, front:]], dim=1)
    real = torch.zeros(3, 13 + front + behind, dtype=torch.bool)
    real[:, front : front + 13] = True
    more = torch.cat([labels, torch.full((3, 5), -100)], dim=1)
    short, long = model(ids, labels=labels), model(padded, labels=more, real=real)
    assert_close(long.logits[:, :9], short.logits)
    for name in "loss", "lm_loss", "aux_loss":
        assert_close(getattr(long, name), getattr(short, name))
    for side in "encoder_routings", "decoder_routings":
        for a, b in zip(getattr(short, side), getattr(long, side), strict=True):
            assert torch.equal(a.load, b.load) and a.load.sum() > 0 and torch.equal(a.dropped, b.dropped)
    routing = short.encoder_routings[0]
    assert routing.dropped > 0  # slots are scarce here, so that padding could take some
    assert_close(long.encoder_routings[0].gates[real].view(3, 13, 4), routing.gates)
    long.loss.backward()
    gradients = [w.grad.clone() for w in model.parameters()]
    model.zero_grad()
    model(ids, labels=labels).loss.backward()
    for a, w in zip(gradients, model.parameters()):
        assert_close(a, w.grad, atol=1e-6, rtol=1e-4)
    assert_close(model.generate(padded, 8, real=real), model.generate(ids, 8))


def test_a_row_of_padding_alone_gives_numbers():
    model, (ids, labels) = small(), example()
    real = torch.ones(3, 13, dtype=torch.bool)
    real[1] = False
    output = model(ids, labels=labels, real=real)
    output.loss.backward()
    assert output.logits.isfinite().all() and all(w.grad.isfinite().all() for w in model.parameters())


def test_the_decoder_sees_only_what_is_written_and_the_encoder_everything():
    model, (ids, written) = small(expert_capacity=20).eval(), example()
    before = model(ids, written).logits
    written[:, 5] = (written[:, 5] + 1) % 40
    after = model(ids, written).logits
    assert_close(after[:, :5], before[:, :5])
    assert (after[:, 5:] != before[:, 5:]).any(-1).all()
    ids[:, -1] = (ids[:, -1] + 1) % 40
    assert (model(ids, written).logits[:, 0] != after[:, 0]).any(-1).all()


def test_attention_is_the_softmax_of_scores_plus_bias_without_scaling():
    attention, x, source, bias = (
        RelativeAttention(16, 2, 6),
        torch.randn(2, 5, 16),
        torch.randn(2, 7, 16),
        torch.randn(1, 2, 5, 7),
    )

    def heads(y):
        return y.view(2, -1, 2, 6).transpose(1, 2)

    q, k, v = heads(attention.query(x)), heads(attention.key(source)), heads(attention.value(source))
    answer = (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v
    assert_close(attention(x, bias, source), attention.proj(answer.transpose(1, 2).reshape(2, 5, 12)))


@pytest.mark.parametrize("settings", [{}, {"tied": False}, {"decoder_sparse": ()}, {"encoder_sparse": (0, 1, 2)}])
def test_the_cache_writes_what_reading_all_again_writes(settings):
    model, (ids, _) = small(expert_capacity=50, **settings).eval(), example()
    written = torch.zeros(3, 1, dtype=torch.long)
    done = torch.zeros(3, 1, dtype=torch.bool)
    for _ in range(10):
        new = model(ids, written).logits[:, -1:].argmax(-1).masked_fill(done, 0)
        written, done = torch.cat([written, new], dim=1), done | (new == 1)
    got = model.generate(ids, 10)
    assert torch.equal(got, written[:, : got.shape[1]])


def test_generation_reads_once_stops_at_the_end_repeats_with_a_seed_and_leaves_the_mode():
    model, (ids, _) = small().train(), example()
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    first = model.generate(ids, 12, temperature=1.0, seed=3)
    assert torch.equal(first, model.generate(ids, 12, temperature=1.0, seed=3)) and len(calls) == 2 and model.training
    assert not torch.equal(first, model.generate(ids, 12, temperature=1.0, seed=4))
    many = model.generate(ids.repeat(20, 1), 60, temperature=1.5, seed=1)
    assert (many[:, 0] == 0).all() and (many == 1).any()
    for row in many[(many == 1).any(1)].tolist():
        assert set(row[row.index(1) + 1 :]) <= {0}
    assert model.generate(ids, 0).tolist() == [[0]] * 3


def test_losses_are_the_mean_of_each_layers_and_gradients_reach_all_weights():
    model, (ids, labels) = small(expert_capacity=20), example()
    labels[0, 5:] = -100
    output, real = model(ids, labels=labels), labels != -100

    def of(routings, real):
        parts = [type(r)(r.gates[real], r.logits[real], r.chosen[real], r.kept[real]) for r in routings]
        return sum(0.001 * (load_balancing_loss(p) + router_z_loss(p)) for p in parts) / len(parts)

    everybody = torch.ones_like(ids, dtype=torch.bool)
    assert_close(output.aux_loss, of(output.encoder_routings, everybody) + of(output.decoder_routings, real))
    assert_close(output.lm_loss, torch.nn.functional.cross_entropy(output.logits[real], labels[real]))
    output.loss.backward()
    assert all(w.grad is not None and w.grad.any() for w in model.parameters() if w.dim() > 1)


def test_an_encoder_alone_scores_its_own_tokens():
    model, (ids, _) = small(decoder_layers=0, decoder_sparse=()), example()
    output = model(ids, labels=ids)
    assert output.logits.shape == (3, 13, 40) and output.decoder_routings == () and output.loss > 0
    with pytest.raises(ValueError, match="decoder_layers"):
        model.generate(ids, 3)


@pytest.mark.parametrize(
    "wrong",
    [{"n_head": 0}, {"encoder_sparse": (3,)}, {"decoder_sparse": (-1,)}, {"num_buckets": 2}, {"max_distance": 4},
     {"num_experts": 0}, {"activation": "tanh"}, {"jitter": 1.0}],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_in_one_line(wrong):
    with pytest.raises(ValueError) as problem:
        small(**wrong)
    assert "\n" not in str(problem.value) and next(iter(wrong)) in str(problem.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, (ids, labels) = small(), example()
    real = torch.ones(3, 13, dtype=torch.bool)
    real[0, 10:] = False
    want = model.eval()(ids, labels=labels, real=real)
    with torch.autocast("cpu", dtype):
        got = model(ids, labels=labels, real=real)
    assert_close(got.logits.float(), want.logits, atol=0.1, rtol=0.1)
    assert got.encoder_routings[0].logits.dtype == torch.float32


def test_pairs_are_padded():
    pairs = [span_corruption(torch.arange(20)), span_corruption(torch.arange(9))]
    ids, labels, real = pad_pairs(pairs)
    for i, (source, target) in enumerate(pairs):
        assert torch.equal(ids[i][real[i]], source) and torch.equal(labels[i][labels[i] != -100], target)


@pytest.mark.parametrize(
    "layers, sparse, want",
    [(2, 1, [1]), (2, 2, [0, 1]), (3, 2, [0, 1, 2]), (4, 1, [1]), (12, 6, [1, 3, 5, 7, 9, 11]), (12, 0, [1]),
     (4, 2, [1, 3]), (4, 3, [0, 1, 2, 3]), (5, 2, [1, 3]), (2, 0, [1]), (1, 0, [0])],
)  # fmt: skip
def test_the_rule_by_step_is_that_of_transformers_oddities_included(layers, sparse, want):
    assert sparse_by_step(layers, sparse) == want


# The library transformers


def theirs(seed=0, **settings):
    "A small random model of the library, in evaluation mode."
    library = pytest.importorskip("transformers", reason="pip install .[dev]")
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 40, "d_model": 16, "d_kv": 5, "d_ff": 24, "num_heads": 3,
        "num_layers": 2, "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4, "expert_capacity": 64,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "dropout_rate": 0.0,
        "router_jitter_noise": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    model = library.SwitchTransformersForConditionalGeneration(library.SwitchTransformersConfig(**sizes | settings))
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.3)
    return model.eval()


SETTINGS = [
    {}, {"tie_word_embeddings": False}, {"router_bias": True}, {"expert_capacity": 2}, {"dense_act_fn": "gelu"},
    {"seed": 5, "num_layers": 4, "num_decoder_layers": 3, "num_sparse_encoder_layers": 2, "num_experts": 7},
    {"num_layers": 3, "num_sparse_encoder_layers": 3, "num_sparse_decoder_layers": 2},
    {"num_layers": 5, "num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0, "layer_norm_epsilon": 1e-2},
    {"seed": 9, "d_model": 24, "d_kv": 8, "num_heads": 2, "d_ff": 20, "relative_attention_num_buckets": 32,
     "relative_attention_max_distance": 128, "vocab_size": 90, "num_layers": 6, "num_sparse_encoder_layers": 4},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("padding", [False, True])
def test_logits_routers_and_greedy_generation_are_theirs(settings, padding):
    model = theirs(**settings)
    same, (ids, written) = SwitchTransformer.from_transformers(model), example(7, 30, 11)
    real = torch.ones(3, 30, dtype=torch.bool)
    if padding and "expert_capacity" not in settings:  # theirs gives slots to padding
        real[1, 22:] = real[2, 25:] = False
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=real.long(), decoder_input_ids=written, output_router_logits=True)
        got = same(ids, written, real=real)
    assert_close(got.logits, want.logits, atol=2e-5, rtol=1e-4)
    for routings, logits, tokens in (
        (got.encoder_routings, want.encoder_router_logits, real),
        (got.decoder_routings, want.decoder_router_logits, torch.ones_like(written, dtype=torch.bool)),
    ):
        assert len(routings) == len(logits) > 0
        for routing, scores in zip(routings, logits):
            assert_close(routing.logits[tokens], scores[tokens], atol=2e-5, rtol=1e-4)
    ids_there = model.generate(
        input_ids=ids, attention_mask=real.long(), max_new_tokens=10, do_sample=False, num_beams=1
    )
    assert torch.equal(same.generate(ids, 10, real=real)[:, : ids_there.shape[1]], ids_there)
    c = model.config
    assert list(same.config.encoder_sparse) == sparse_by_step(c.num_layers, c.num_sparse_encoder_layers)
    assert list(same.config.decoder_sparse) == sparse_by_step(c.num_decoder_layers, c.num_sparse_decoder_layers)


def test_losses_and_gradients_are_theirs_for_one_sequence_and_one_sparse_layer():
    model, (ids, labels) = theirs(), example(1, B=1)
    labels[:, 7:] = -100
    same, want = SwitchTransformer.from_transformers(model), model(input_ids=ids, labels=labels)
    got = same(ids, labels=labels)
    assert_close(got.lm_loss, want.loss)
    full = example(1, B=1)
    labels = list(full)[1]
    want = model(input_ids=ids, labels=labels, output_router_logits=True)
    got = same(ids, labels=labels)
    assert_close(got.loss, want.loss)
    got.loss.backward()
    want.loss.backward()
    assert_close(same.embedding.weight.grad, model.shared.weight.grad, atol=1e-5, rtol=1e-4)
    table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert_close(same.encoder.positions.table.weight.grad, table.grad, atol=1e-5, rtol=1e-4)
    router = model.decoder.block[1].layer[2].mlp.router.classifier.weight
    assert_close(same.decoder.blocks[1].moe.router.linear.weight.grad, router.grad, atol=1e-5, rtol=1e-4)


def test_where_theirs_is_wrong_ours_is_not():
    (ids, labels), everywhere = example(2, B=1), {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2}
    model = theirs(**everywhere)
    same = SwitchTransformer.from_transformers(model)
    with torch.no_grad():
        want = model(input_ids=ids, labels=labels, output_router_logits=True)
        assert want.encoder_aux_loss == want.encoder_z_loss == 0  # all layers are sparse
        assert same(ids, labels=labels).aux_loss > 0.003
        model = theirs(num_layers=4, num_sparse_encoder_layers=2)
        same = SwitchTransformer.from_transformers(model)
        want = model(input_ids=ids, labels=labels, output_router_logits=True)
        mine = same(ids, labels=labels).encoder_routings
        assert_close(sum(map(router_z_loss, mine)) / 2, want.encoder_z_loss)  # a mean of means of equal size
        assert sum(map(load_balancing_loss, mine)) / 2 - want.encoder_aux_loss > 1e-4  # theirs pools the layers
        tight, real = theirs(expert_capacity=1, router_ignore_padding_tokens=True), torch.ones(1, 16).long()
        same, real[:, :3] = SwitchTransformer.from_transformers(tight), 0
        padded = [torch.cat([torch.full((1, 3), i), ids], dim=1) for i in (3, 17)]
        one, two = (tight(input_ids=p, attention_mask=real, decoder_input_ids=labels).logits for p in padded)
        assert (one - two).abs().max() > 0.01  # padding takes their slots
        one, two = (same(p, labels, real=real).logits for p in padded)
        assert_close(one, two)
        assert_close(one, same(ids, labels).logits)
    assert sparse_layers(5, 0) == [] and sparse_by_step(5, 0) == [1]


def test_other_models_are_refused_in_one_line():
    pytest.importorskip("transformers", reason="pip install .[dev]")
    with pytest.raises(ValueError, match="Linear"):
        SwitchTransformer.from_transformers(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="SwitchTransformersStack"):
        SwitchTransformer.from_transformers(theirs().encoder)


def test_buckets_are_theirs():
    library = pytest.importorskip("transformers.models.switch_transformers.modeling_switch_transformers")
    attention, distance = library.SwitchTransformersAttention, torch.arange(-700, 701)
    for settings in (32, 128), (8, 16), (10, 100), (6, 50), (64, 1000):
        for two_sided in True, False:
            want = attention._relative_position_bucket(distance, two_sided, *settings)
            assert torch.equal(relative_buckets(distance, two_sided, *settings), want)
