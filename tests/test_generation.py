"""Lesson 12: the checks, and what is too heavy for them: all sizes and settings, frequencies, two streams at once."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from classroom.hidden import generation as hidden
from makemoe.checks import generation as checks
from makemoe.checks.generation import passes, probs_by_lists, small_model, written_slowly
from makemoe.generation import KVCache, generate, next_token_probs, stream

V = 12  # vocabulary of the small models


def prompt_of(T, B=1, seed=1):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("module", [checks, hidden])
def test_the_module_passes_the_checks_of_its_lesson(module):
    module.check_next_token_probs(next_token_probs)
    module.check_kv_cache(KVCache)
    module.check_stream(stream)


# next_token_probs

logit_rows = st.lists(st.floats(-6, 6, width=32), min_size=1, max_size=9)


def is_a_close_call(logits, temperature, top_k, top_p):
    "Whether float32 may see a running sum on the other side of p, or equals in another order."
    whole = sorted(probs_by_lists(logits, temperature), reverse=True)
    reached = [sum(whole[:n]) for n in range(1, len(whole))]
    ranked = sorted(logits, reverse=True)
    return any(abs(total - top_p) < 1e-5 for total in reached) or any(a - b < 1e-3 for a, b in zip(ranked, ranked[1:]))


@given(logits=logit_rows, temperature=st.floats(0.1, 10), top_k=st.integers(1, 10), top_p=st.floats(0.01, 1))
def test_probabilities_equal_those_of_the_definition(logits, temperature, top_k, top_p):
    if not is_a_close_call(logits, temperature, top_k, top_p):
        expected = torch.tensor(probs_by_lists(logits, temperature, top_k, top_p))
        assert_close(next_token_probs(torch.tensor(logits), temperature, top_k, top_p), expected, rtol=1e-4, atol=1e-6)


@given(shape=st.lists(st.integers(1, 3), max_size=3), V=st.integers(1, 8), data=st.data())
def test_any_leading_shape_is_rows_apart_and_sums_to_one(shape, V, data):
    choices = dict(temperature=[0, 0.5, 1, 2], top_k=[None, 1, 3], top_p=[None, 0.1, 0.8, 1.0])
    chosen = {name: data.draw(st.sampled_from(values)) for name, values in choices.items()}
    logits = 3 * torch.randn(*shape, V)
    probs = next_token_probs(logits, **chosen)
    assert probs.shape == logits.shape and probs.dtype == torch.float32
    assert_close(probs.sum(-1), torch.ones(shape))
    assert_close(probs.view(-1, V), torch.stack([next_token_probs(row, **chosen) for row in logits.view(-1, V)]))


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


@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-37, 1.0, 1e39, math.inf])
def test_any_temperature_gives_probabilities(temperature):
    for logits in [1e4, 0.0, 1e4 - 1, -1e30], [3.0, 1.0, -math.inf, 0.0]:
        probs = next_token_probs(torch.tensor(logits), temperature)
        assert_close(probs.sum(), torch.tensor(1.0))
        assert temperature > 1e-30 or probs.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(temperature=-0.1), "temperature is -0.1, but must be 0 or more"),
        (dict(temperature=math.nan), "temperature is nan"),
        (dict(top_k=0), "top_k is 0, but must be at least 1"),
        (dict(top_p=0.0), "top_p is 0.0, but must be above 0 and at most 1"),
        (dict(num_tokens=-1), "num_tokens is -1, but must be 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        generate(small_model(), prompt_of(3), **{"num_tokens": 1, **wrong})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named_in_one_line(value):
    model = small_model()
    for weight in model.token_embedding.weight, model.blocks[0].moe.router.linear.weight, model.lm_head.bias:
        broken = small_model()
        broken.load_state_dict(model.state_dict())
        dict(broken.named_parameters())[next(name for name, w in model.named_parameters() if w is weight)].data.fill_(
            value
        )
        with pytest.raises(ValueError, match="^the logits are not finite .*weights$"):
            generate(broken, prompt_of(3), 1)


# stream and generate


@settings(max_examples=25)
@given(
    block_size=st.integers(1, 9),
    T=st.integers(1, 12),
    num_tokens=st.integers(1, 25),
    seed=st.integers(0, 5),
    positions=st.sampled_from(["rotary", "learned"]),
)
def test_the_cache_changes_nothing_for_any_context(block_size, T, num_tokens, seed, positions):
    model, ids = small_model(block_size, positions=positions).eval(), prompt_of(T, B=2)
    expected = torch.cat([ids, written_slowly(model, ids, num_tokens, seed, temperature=1.3)], dim=1)
    assert torch.equal(generate(model, ids, num_tokens, seed=seed, temperature=1.3), expected)


@pytest.mark.parametrize("block_size, T", [(8, 5), (7, 7), (2, 1)])
def test_a_token_sees_half_a_context_and_each_is_read_about_twice(block_size, T):
    model = small_model(block_size)
    read = passes(model, lambda: generate(model, prompt_of(T), 60))
    half = math.ceil(block_size / 2)
    start = block_size - T + 1  # passes until the context is full
    cycle = [half] + (block_size - half) * [1]
    assert read == ([T] + (start - 1) * [1] + 60 * cycle)[:60]
    assert sum(cycle) / len(cycle) <= 2


def test_what_is_beyond_the_context_is_forgotten():
    model, ids = small_model().eval(), prompt_of(20)
    other = ids.clone()
    other[:, :12] = (other[:, :12] + 1) % V  # all but the last 8, a context
    assert torch.equal(generate(model, ids, 20, seed=2)[:, 20:], generate(model, other, 20, seed=2)[:, 20:])
    other[:, 12] = (other[:, 12] + 1) % V
    read = [next(stream(model, x, 1))[1][-1].logits[:, -1] for x in (ids, other)]
    assert not torch.equal(*read)  # ... and no more than that


def test_two_streams_at_once_do_not_share_random_numbers_or_caches():
    model, ids = small_model(), prompt_of(3)
    pairs = list(zip(stream(model, ids, 20, seed=1), stream(model, ids, 20, seed=2)))
    for which, seed in (0, 1), (1, 2):
        new = torch.stack([pair[which][0] for pair in pairs], dim=1)
        assert torch.equal(new, generate(model, ids, 20, seed=seed)[:, 3:])


def test_nothing_happens_before_the_first_token_is_asked_for():
    model, ids = small_model().train(), prompt_of(3)
    writer = stream(model, ids, 10)
    assert model.training
    next(writer)
    writer.close()
    assert model.training
    with pytest.raises(KeyError):
        for _ in stream(model, ids, 10):
            raise KeyError
    assert model.training and all(weight.grad is None for weight in model.parameters())


def test_generate_collects_what_the_stream_yields_and_may_be_written_into():
    model, ids = small_model(), prompt_of(4, B=2)
    chosen = dict(temperature=0.9, top_k=5, top_p=0.9, seed=3)
    new = torch.stack([token for token, _ in stream(model, ids, 12, **chosen)], dim=1)
    text = generate(model, ids, 12, **chosen)
    assert torch.equal(text, torch.cat([ids, new], dim=1))
    text.zero_()
    assert torch.equal(ids, prompt_of(4, B=2))
    assert torch.equal(generate(model, ids, 0), ids)


def test_a_text_alone_is_the_text_in_a_batch():
    model, ids = small_model(), prompt_of(6, B=4)
    alone = torch.cat([generate(model, row[None], 20, temperature=0) for row in ids])
    assert torch.equal(generate(model, ids, 20, temperature=0), alone)


def test_draws_have_the_frequencies_of_the_probabilities():
    """20,000 texts draw one token each. By Hoeffding's inequality the probability that a frequency is off by 0.021 is
    below 2 exp(-2 * 20000 * 0.021**2) = 4.4e-8, and one of twelve below 6e-7: a fair drawer fails once in two million.
    """
    model, ids, n = small_model().eval(), prompt_of(4), 20_000
    chosen = dict(temperature=1.5, top_p=0.9)
    probs = next_token_probs(model(ids).logits[0, -1], **chosen).detach()
    tokens, _ = next(stream(model, ids.expand(n, -1), 1, seed=0, **chosen))
    frequencies = tokens.bincount(minlength=V) / n
    assert (frequencies - probs).abs().max() < 0.021
    assert not frequencies[probs == 0].any() and (probs > 0.05).sum() > 2  # a test that a constant would not pass
