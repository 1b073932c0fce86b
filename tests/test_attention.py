"""Lesson 02: the checks, and what is too heavy for them: all sizes, PyTorch's own layer, causality, and a cache.

A cache is whatever has a length and `append`; the real one is written in lesson 12.
"""

import cmath
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from classroom.hidden import attention as hidden
from makemoe.attention import Head, MultiHeadAttention, rotate
from makemoe.checks import attention as checks


class Cache(list):
    "Keys and values of one token after another."

    def append(self, keys, values):
        self.extend(zip(keys.unbind(-2), values.unbind(-2)))
        return tuple(torch.stack(part, dim=-2) for part in zip(*self))


def attention_in_plain_numbers(q, k, v):
    "One head, one sequence, lists of lists: no tensors, no mask, no softmax function."
    out = []
    for t, query in enumerate(q):
        weights = [math.exp(sum(a * b for a, b in zip(query, k[s])) / math.sqrt(len(query))) for s in range(t + 1)]
        out.append([sum(w * v[s][d] for s, w in enumerate(weights)) / sum(weights) for d in range(len(v[0]))])
    return out


def read_in_pieces(layer, x, sizes):
    cache = Cache()
    y = torch.cat([layer(piece, cache) for piece in x.split(sizes, dim=1)], dim=1)
    assert len(cache) == x.shape[1]
    return y


@pytest.mark.parametrize("module", [checks, hidden])
def test_the_module_passes_the_checks_of_its_lesson(module):
    module.check_head(Head)
    module.check_rotate(rotate)
    module.check_multi_head_attention(MultiHeadAttention)


@given(B=st.integers(1, 3), T=st.integers(1, 6), C=st.integers(1, 6), D=st.integers(1, 5))
def test_head_equals_the_triple_loop(B, T, C, D):
    head, x = Head(C, D).double(), 3 * torch.randn(B, T, C, dtype=torch.float64)
    rows = zip(head.query(x).tolist(), head.key(x).tolist(), head.value(x).tolist())
    expected = torch.tensor([attention_in_plain_numbers(*row) for row in rows], dtype=torch.float64)
    assert_close(head(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("H", [1, 3, 4])
def test_fused_layer_equals_that_of_pytorch(H, bias):
    ours, x = MultiHeadAttention(24, H, bias=bias), torch.randn(2, 7, 24)
    theirs = nn.MultiheadAttention(24, H, bias=True, batch_first=True)  # its input bias starts at zero
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.out_proj.weight.copy_(ours.proj.weight)
        theirs.out_proj.bias.copy_(ours.proj.bias if bias else torch.zeros(24))
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1)  # True: do not look
    expected = theirs(x, x, x, attn_mask=mask, need_weights=False)[0]
    for length in 2, 7, 1:
        assert_close(ours(x[:, :length]), expected[:, :length])


@given(B=st.integers(1, 3), T=st.integers(1, 7), H=st.integers(1, 4), D=st.integers(1, 5))
def test_fused_layer_equals_its_heads_side_by_side(B, T, H, D):
    heads, x = [Head(H * D, D) for _ in range(H)], torch.randn(B, T, H * D)
    layer = MultiHeadAttention(H * D, H)
    weights = [getattr(head, name).weight for name in ("query", "key", "value") for head in heads]
    layer.load_state_dict(
        {"qkv.weight": torch.cat(weights), "proj.weight": torch.eye(H * D), "proj.bias": torch.zeros(H * D)}
    )
    assert_close(layer(x), torch.cat([head(x) for head in heads], dim=-1))


@given(B=st.integers(1, 2), T=st.integers(2, 12), data=st.data())
def test_no_output_depends_on_the_future(B, T, data):
    cut = data.draw(st.integers(1, T - 1))
    x = torch.randn(B, T, 12)
    changed = torch.cat([x[:, :cut], 9 * torch.randn(B, T - cut, 12)], dim=1)
    for layer in Head(12, 4), MultiHeadAttention(12, 3), MultiHeadAttention(12, 3, rotary=True):
        assert_close(layer(changed)[:, :cut], layer(x)[:, :cut])
        assert not torch.allclose(layer(changed)[:, cut:], layer(x)[:, cut:])


def test_every_earlier_token_counts_and_no_other_sequence():
    x = torch.randn(2, 6, 12, requires_grad=True)
    for layer in Head(12, 4), MultiHeadAttention(12, 3), MultiHeadAttention(12, 3, rotary=True):
        (grad,) = torch.autograd.grad(layer(x)[0, 3].square().sum(), x)
        assert (grad[0].abs().sum(dim=-1) > 0).tolist() == [True, True, True, True, False, False]
        assert not grad[1].any()


def test_order_is_seen_with_rotary_only():
    x = torch.randn(1, 6, 12)
    shuffled = x[:, [3, 0, 4, 2, 1, 5]]
    for layer in Head(12, 4), MultiHeadAttention(12, 3):
        assert_close(layer(shuffled)[:, -1], layer(x)[:, -1])
    layer = MultiHeadAttention(12, 3, rotary=True)
    assert (layer(shuffled)[:, -1] - layer(x)[:, -1]).abs().max() > 1e-3


@given(
    shape=st.lists(st.integers(1, 3), max_size=2),
    pairs=st.integers(1, 5),
    positions=st.lists(st.integers(0, 50), min_size=1, max_size=5),
)
def test_rotate_multiplies_by_complex_numbers(shape, pairs, positions):
    x = torch.randn(*shape, len(positions), 2 * pairs, dtype=torch.float64)
    expected = x.clone()
    for t, position in enumerate(positions):
        for i in range(pairs):
            turn = cmath.exp(1j * position * 10000 ** (-i / pairs))
            plane = torch.complex(x[..., t, i], x[..., t, i + pairs]) * turn
            expected[..., t, i], expected[..., t, i + pairs] = plane.real, plane.imag
    assert_close(rotate(x, torch.tensor(positions)), expected, rtol=0, atol=2e-5)  # the angles are float32


@given(m=st.integers(0, 20), n=st.integers(0, 20), shift=st.integers(0, 40))
def test_scores_of_rotated_vectors_depend_on_the_distance(m, n, shift):
    q, k = torch.randn(2, 1, 8, dtype=torch.float64)

    def score(m, n):
        return rotate(q, torch.tensor([m])) @ rotate(k, torch.tensor([n])).T

    assert_close(score(m + shift, n + shift), score(m, n), rtol=0, atol=5e-5)
    if m != n:
        assert abs(score(m, n) - score(n, m)) > 1e-6  # which of them comes first matters


@given(B=st.integers(1, 2), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6), rotary=st.booleans())
def test_reading_in_pieces_equals_reading_at_once(B, sizes, rotary):
    layer, x = MultiHeadAttention(12, 3, rotary=rotary), torch.randn(B, sum(sizes), 12)
    assert_close(read_in_pieces(layer, x, sizes), layer(x))


def test_two_caches_do_not_mix_and_none_leaves_no_trace():
    layer, x, other = MultiHeadAttention(12, 3, rotary=True), torch.randn(1, 6, 12), torch.randn(1, 6, 12)
    mine, theirs = Cache(), Cache()
    for t in range(6):
        ours = layer(x[:, t : t + 1], mine)
        layer(other[:, t : t + 1], theirs)
        layer(other)
    assert_close(ours, layer(x)[:, -1:])
    assert len(mine) == len(theirs) == 6


def test_autocast_runs_with_rotary_and_cache():
    layer, x = MultiHeadAttention(12, 3, rotary=True), torch.randn(2, 5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole, pieces = layer(x), read_in_pieces(layer, x, [2, 1, 2])
    assert whole.dtype == torch.bfloat16
    assert_close(pieces, whole, rtol=0.02, atol=0.02)
    assert_close(whole.float(), layer(x), rtol=0.05, atol=0.02)


def test_number_of_parameters():
    assert sum(p.numel() for p in MultiHeadAttention(128, 8).parameters()) == 4 * 128 * 128 + 128
    assert sum(p.numel() for p in MultiHeadAttention(128, 8, rotary=True, bias=False).parameters()) == 4 * 128 * 128
    assert sum(p.numel() for p in Head(128, 16).parameters()) == 3 * 128 * 16


def test_sizes_that_do_not_fit_are_refused():
    for n_embd, n_head in (10, 3), (8, 16):
        with pytest.raises(
            ValueError, match=f"n_embd = {n_embd} channels cannot be divided among n_head = {n_head} heads"
        ):
            MultiHeadAttention(n_embd, n_head)
    with pytest.raises(ValueError, match="rotary positions turn pairs of channels, but a head has 5"):
        MultiHeadAttention(15, 3, rotary=True)
    assert MultiHeadAttention(15, 3)(torch.randn(1, 2, 15)).shape == (1, 2, 15)
