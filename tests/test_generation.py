"""Lesson 12. The oracles: probabilities from plain lists, and a loop that reads its window again for each token."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from makemoe.generation import generate, next_token_probs, stream
from makemoe.model import MoEConfig, SparseMoELanguageModel

V = 11  # vocabulary of the small models


def small_model(block_size=8, seed=0, **changes):
    "A model with opinions: its weights are large enough for logits that differ by several units."
    torch.manual_seed(seed)
    sizes = dict(vocab_size=V, block_size=block_size, n_embd=16, n_head=2, n_layer=2, num_experts=3, n_hidden=16)
    model = SparseMoELanguageModel(MoEConfig(**sizes, **changes))
    for weight in model.parameters():
        weight.data.add_(0.3 * torch.randn_like(weight))
    return model.eval()


def prompt_of(T, B=1, seed=1):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def written_slowly(model, ids, num_tokens, seed=0, **settings):
    "Without a cache: read the window again for each token; when it is longer than a block, only its newer half stays."
    size, dice, new = model.config.block_size, torch.Generator().manual_seed(seed), []
    window = ids[:, -size:]
    for _ in range(num_tokens):
        if window.shape[1] == size + 1:
            window = window[:, size + 1 - math.ceil(size / 2):]
        logits = model(window).logits[:, -1]
        new.append(torch.multinomial(next_token_probs(logits, **settings), 1, generator=dice))
        window = torch.cat([window, new[-1]], dim=1)
    return torch.cat(new, dim=1)


def softmax(scores):
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


def probs_by_lists(logits, temperature, top_k, top_p):
    "The definition for one row, in Python's double precision. Returns (probabilities, is the cut a close call?)."
    probs = softmax([score / temperature for score in logits])
    best_first = sorted(range(len(probs)), key=lambda i: -logits[i])
    kept, reached, close = [], 0.0, False
    for place, i in enumerate(best_first):
        if place == top_k or top_p < 1 and reached >= top_p:
            break
        kept.append(i)
        reached += probs[i]
        close = close or abs(reached - top_p) < 1e-5
    next_best = [logits[i] for i in best_first[len(kept):][:1]]
    close = close or any(logits[kept[-1]] - score < 1e-3 for score in next_best)  # which of equals stays is left open
    return [probs[i] / reached if i in kept else 0.0 for i in range(len(probs))], close


# next_token_probs

logit_rows = st.lists(st.floats(-6, 6, width=32), min_size=1, max_size=9)


@given(logits=logit_rows, temperature=st.floats(0.1, 10), top_k=st.integers(1, 10), top_p=st.floats(0.01, 1))
def test_probabilities_equal_those_of_the_definition(logits, temperature, top_k, top_p):
    expected, close = probs_by_lists(logits, temperature, top_k, top_p)
    if close:  # float32 may see the sum on the other side of p, or equals in another order
        return
    probs = next_token_probs(torch.tensor(logits), temperature, top_k, top_p)
    assert_close(probs, torch.tensor(expected), rtol=1e-4, atol=1e-6)


@given(logits=logit_rows, temperature=st.floats(0.1, 10))
def test_without_cuts_it_is_a_softmax(logits, temperature):
    row = torch.tensor(logits)
    expected = (row / temperature).softmax(-1)
    assert_close(next_token_probs(row, temperature), expected)
    assert_close(next_token_probs(row, temperature, top_k=len(logits), top_p=1.0), expected)


@given(shape=st.lists(st.integers(1, 3), max_size=3), V=st.integers(1, 8), data=st.data())
def test_any_leading_shape_is_rows_apart_and_sums_to_one(shape, V, data):
    choices = dict(temperature=[0, 0.5, 1, 2], top_k=[None, 1, 3], top_p=[None, 0.1, 0.8, 1.0])
    settings = {name: data.draw(st.sampled_from(values)) for name, values in choices.items()}
    logits = 3 * torch.randn(*shape, V)
    probs = next_token_probs(logits, **settings)
    assert probs.shape == logits.shape and probs.dtype == torch.float32
    assert_close(probs.sum(-1), torch.ones(shape))
    rows = torch.stack([next_token_probs(row, **settings) for row in logits.view(-1, V)])
    assert_close(probs.view(-1, V), rows)


@given(V=st.integers(1, 20), top_k=st.integers(1, 25))
def test_top_k_keeps_k_even_when_all_are_equal(V, top_k):
    probs = next_token_probs(torch.zeros(5, V), top_k=top_k)
    n = min(top_k, V)
    assert ((probs > 0).sum(-1) == n).all()
    assert_close(probs[probs > 0], torch.full((5 * n,), 1 / n))


@pytest.mark.parametrize("top_p, size", [
    (0.1, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.875, 3), (0.9, 4), (1.0, 4),
])
def test_the_nucleus_holds_the_token_that_crosses_p_and_no_more(top_p, size):
    probs = torch.tensor([0.125, 0.5, 0.125, 0.25])  # halves are exact in binary
    kept = next_token_probs(probs.log2() * math.log(2), top_p=top_p)
    assert (kept > 0).sum() == size
    assert_close(kept[kept > 0], probs[kept > 0] / probs[kept > 0].sum())


def test_a_token_that_exceeds_p_alone_stays_alone():
    assert next_token_probs(torch.tensor([0.0, 9.0, 0.0]), top_p=0.3).tolist() == [0, 1, 0]


def test_top_p_of_one_cuts_nothing_off():
    assert (next_token_probs(torch.tensor([40.0, 0.0, -40.0]), top_p=1.0) > 0).all()


def test_both_cuts_keep_what_each_of_them_keeps():
    logits = 2 * torch.randn(200, 12)
    apart = (next_token_probs(logits, top_k=4) > 0) & (next_token_probs(logits, top_p=0.8) > 0)
    assert torch.equal(next_token_probs(logits, top_k=4, top_p=0.8) > 0, apart)
    assert (apart.sum(-1) < 4).any() and (apart.sum(-1) == 4).any()  # each of them decides somewhere


def test_temperature_zero_is_the_argmax():
    logits = torch.randn(100, 7).round()  # with many ties
    one_hot = torch.nn.functional.one_hot(logits.argmax(-1), 7).float()
    assert (logits == logits.amax(-1, keepdim=True)).sum() > 110
    assert torch.equal(next_token_probs(logits, temperature=0), one_hot)
    assert torch.equal(next_token_probs(logits, temperature=0, top_k=5, top_p=0.9), one_hot)


@given(logits=logit_rows, cold=st.floats(0.1, 3), warmer=st.floats(1.01, 3))
def test_colder_never_gives_less_to_the_likeliest(logits, cold, warmer):
    row = torch.tensor(logits)
    assert next_token_probs(row, cold).max() >= next_token_probs(row, cold * warmer).max() - 1e-6


def test_extreme_temperatures_and_logits_stay_finite():
    logits = torch.tensor([1e4, 0.0, 1e4 - 1, -1e30])
    assert next_token_probs(logits, temperature=1e-37).tolist() == [1, 0, 0, 0]
    assert_close(next_token_probs(logits[:3], temperature=1e30), torch.full((3,), 1 / 3))
    assert_close(next_token_probs(torch.tensor([0.0, -math.inf]), 0.5), torch.tensor([1.0, 0.0]))


def test_half_precision_is_computed_in_float32():
    logits = torch.randn(4, 50).bfloat16()
    expected = next_token_probs(logits.float(), 0.7, top_p=0.9)
    assert torch.equal(next_token_probs(logits, 0.7, top_p=0.9), expected)


def test_the_logits_stay_as_they_are():
    logits = torch.randn(5, 6)
    before = logits.clone()
    for temperature in 0, 0.8:
        next_token_probs(logits, temperature, top_k=3, top_p=0.9)
        assert torch.equal(logits, before)


@pytest.mark.parametrize("wrong, message", [
    (dict(temperature=-0.1), "temperature is -0.1, but must be 0 or more"),
    (dict(temperature=math.nan), "temperature is nan"),
    (dict(top_k=0), "top_k is 0, but must be at least 1"),
    (dict(top_p=0.0), "top_p is 0.0, but must be above 0 and at most 1"),
    (dict(top_p=1.1), "top_p is 1.1, but must be above 0 and at most 1"),
])
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        next_token_probs(torch.zeros(3), **wrong)
    with pytest.raises(ValueError, match=message):
        generate(small_model(), prompt_of(3), 1, **wrong)


# seeds and dice


def test_same_seed_same_text_and_another_seed_another():
    model, ids = small_model(), prompt_of(3)
    text = generate(model, ids, 40, seed=1)
    torch.rand(7)  # whatever happens in between
    assert torch.equal(generate(model, ids, 40, seed=1), text)
    assert not torch.equal(generate(model, ids, 40, seed=2), text)


def test_with_a_seed_the_public_dice_are_not_touched():
    model, ids = small_model(dropout=0.5, router="noisy").train(), prompt_of(3)
    state = torch.get_rng_state()
    generate(model, ids, 20, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_with_a_seed_the_public_dice_are_not_touched_in_between():
    model, ids = small_model(), prompt_of(3)
    state = torch.get_rng_state()
    expected = [torch.rand(()) for _ in range(20)]
    torch.set_rng_state(state)
    assert [torch.rand(()) for _ in stream(model, ids, 20, seed=1)] == expected


def test_without_a_seed_the_public_dice_decide():
    model, ids = small_model(), prompt_of(3)
    torch.manual_seed(3)
    one, two = generate(model, ids, 40), generate(model, ids, 40)
    torch.manual_seed(3)
    assert torch.equal(generate(model, ids, 40), one) and not torch.equal(one, two)


def test_two_streams_at_once_do_not_share_dice_or_cache():
    model, ids = small_model(), prompt_of(3)
    pairs = list(zip(stream(model, ids, 20, seed=1), stream(model, ids, 20, seed=2)))
    for which, seed in (0, 1), (1, 2):
        new = torch.stack([pair[which][0] for pair in pairs], dim=1)
        assert torch.equal(new, generate(model, ids, 20, seed=seed)[:, 3:])


# no traces


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_is_put_back(mode):
    model, ids = small_model(dropout=0.1).train(mode), prompt_of(3)
    generate(model, ids, 3)
    assert all(module.training == mode for module in model.modules())
    for _ in stream(model, ids, 10):
        break
    assert all(module.training == mode for module in model.modules())
    writer = stream(model, ids, 10)
    assert model.training == mode  # nothing happens before the first token is asked for
    next(writer)
    writer.close()
    assert model.training == mode
    with pytest.raises(ValueError):
        generate(model, ids, 3, temperature=-1)
    assert model.training == mode
    with pytest.raises(KeyError):
        for _ in stream(model, ids, 10):
            raise KeyError
    assert model.training == mode


def test_a_model_in_training_mode_writes_without_dropout_and_noise():
    model, ids = small_model(dropout=0.5, router="noisy"), prompt_of(3)
    expected = generate(model, ids, 30, seed=4)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)  # there is noise to be switched off
    assert torch.equal(generate(model, ids, 30, seed=4), expected)


def test_no_gradients_inside_and_no_change_of_the_mode_outside():
    model, ids = small_model(), prompt_of(3)
    for token, routings in stream(model, ids, 3):
        assert torch.is_grad_enabled()
        assert not any(field.requires_grad for r in routings for field in (r.gates, r.logits))
    assert all(weight.grad is None for weight in model.parameters())


def test_the_prompt_stays_as_it_is():
    model, ids = small_model(), prompt_of(12, B=2)
    before = ids.clone()
    text = generate(model, ids, 20, seed=0)
    assert torch.equal(ids, before) and torch.equal(text[:, :12], before)
    text.zero_()
    assert torch.equal(ids, before)


def test_no_tokens_asked_for():
    model, ids = small_model().train(), prompt_of(5, B=2)
    assert list(stream(model, ids, 0)) == []
    text = generate(model, ids, 0)
    assert torch.equal(text, ids) and text.data_ptr() != ids.data_ptr()  # the caller may write into it
    assert model.training


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="the prompt is empty: give at least one character"):
        generate(small_model(), torch.zeros(1, 0, dtype=torch.long), 3)


def test_ids_without_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"ids are \(4,\), but must be \(B, T\): for one text, give ids\[None\]"):
        generate(small_model(), prompt_of(4)[0], 3)


# stream and generate: the same tokens as without a cache


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("router", ["topk", "noisy"])
@pytest.mark.parametrize("T", [1, 8, 9, 20])
def test_the_cache_changes_nothing_far_beyond_the_block(positions, router, T):
    model = small_model(positions=positions, router=router)
    ids = prompt_of(T, B=3)
    for settings in dict(temperature=0), dict(temperature=1.3), dict(top_k=4, top_p=0.95):
        new = generate(model, ids, 30, seed=5, **settings)[:, T:]
        assert torch.equal(new, written_slowly(model, ids, 30, seed=5, **settings))


@given(block_size=st.integers(1, 9), T=st.integers(1, 12), num_tokens=st.integers(0, 25), seed=st.integers(0, 5))
def test_any_block_size_even_and_odd(block_size, T, num_tokens, seed):
    model, ids = small_model(block_size), prompt_of(T)
    expected = torch.cat([ids, written_slowly(model, ids, num_tokens, seed)] if num_tokens else [ids], dim=1)
    assert torch.equal(generate(model, ids, num_tokens, seed=seed), expected)


@pytest.mark.parametrize("block_size, T", [(8, 5), (7, 7), (2, 1)])
def test_a_token_sees_half_a_block_and_each_is_read_about_twice(block_size, T):
    model, read = small_model(block_size), []
    model.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0].shape[1]))
    generate(model, prompt_of(T), 100)
    half = math.ceil(block_size / 2)
    start = block_size - T + 1  # passes until the block is full
    cycle = [half] + (block_size - half) * [1]
    assert read == ([T] + (start - 1) * [1] + 100 * cycle)[:100]
    assert sum(cycle) / len(cycle) <= 2


def test_what_is_beyond_the_block_is_forgotten():
    model = small_model()
    ids = prompt_of(20)
    other = ids.clone()
    other[:, :12] = (other[:, :12] + 1) % V  # all but the last 8, a block
    assert torch.equal(generate(model, ids, 30, seed=2)[:, 20:], generate(model, other, 30, seed=2)[:, 20:])
    other[:, 12] = (other[:, 12] + 1) % V
    read = [next(stream(model, x, 1))[1][-1].logits[:, -1] for x in (ids, other)]
    assert not torch.equal(*read)  # ... and no more than that


def test_routings_are_those_of_the_tokens_just_read():
    model, ids = small_model(), prompt_of(5, B=2)
    routings, window = [], ids
    for token, layers in stream(model, ids, 4, seed=0):
        whole = model(window).routings
        T = 5 if not routings else 1
        for ours, theirs in zip(layers, whole, strict=True):
            assert ours.gates.shape == (2, T, 3)
            assert_close(ours.gates, theirs.gates[:, -T:])
            assert_close(ours.logits, theirs.logits[:, -T:], rtol=1e-4, atol=1e-5)
        routings.append(layers)
        window = torch.cat([window, token[:, None]], dim=1)


def test_stream_yields_what_generate_collects():
    model, ids = small_model(), prompt_of(4, B=2)
    tokens = [token for token, _ in stream(model, ids, 12, temperature=0.9, top_k=5, top_p=0.9, seed=3)]
    assert all(token.shape == (2,) and token.dtype == torch.long for token in tokens)
    collected = generate(model, ids, 12, temperature=0.9, top_k=5, top_p=0.9, seed=3)
    assert torch.equal(collected, torch.cat([ids, torch.stack(tokens, dim=1)], dim=1))


def test_a_row_alone_is_the_row_in_a_batch():
    model, ids = small_model(), prompt_of(6, B=4)
    alone = torch.cat([generate(model, row[None], 30, temperature=0) for row in ids])
    assert torch.equal(generate(model, ids, 30, temperature=0), alone)


def test_greedy_needs_no_seed():
    model, ids = small_model(), prompt_of(3)
    assert torch.equal(generate(model, ids, 20, temperature=0), generate(model, ids, 20, temperature=0, seed=9))


def test_settings_reach_the_draws():
    model, ids = small_model(), prompt_of(3)
    greedy = generate(model, ids, 20, temperature=0)
    for settings in dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-6):
        assert torch.equal(generate(model, ids, 20, seed=1, **settings), greedy)
    assert not torch.equal(generate(model, ids, 20, seed=1, temperature=5.0), greedy)


def test_draws_have_the_frequencies_of_the_probabilities():
    """20,000 rows draw one token each. By Hoeffding's inequality the probability that a frequency is off by 0.021 is
    below 2 exp(-2 * 20000 * 0.021**2) = 4.4e-8, and one of eleven below 5e-7: a fair drawer fails once in two million.
    """
    model, ids, n = small_model(), prompt_of(4), 20_000
    settings = dict(temperature=1.5, top_p=0.9)
    probs = next_token_probs(model(ids).logits[0, -1], **settings).detach()
    tokens, _ = next(stream(model, ids.expand(n, -1), 1, seed=0, **settings))
    frequencies = tokens.bincount(minlength=V) / n
    assert (frequencies - probs).abs().max() < 0.021
    assert not frequencies[probs == 0].any() and (probs > 0.05).sum() > 2  # a test that a constant would not pass
