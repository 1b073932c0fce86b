"""Lesson 02. The oracles: a triple loop over plain numbers, complex numbers, and PyTorch's own attention."""

import cmath
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from makemoe.attention import Head, KVCache, MultiHeadAttention, rotate


def attention_in_plain_numbers(q, k, v):
    "One head, one sequence, lists of lists: no tensors, no mask, no softmax function."
    out = []
    for t, query in enumerate(q):
        weights = [math.exp(sum(a * b for a, b in zip(query, k[s])) / math.sqrt(len(query))) for s in range(t + 1)]
        out.append([sum(w * v[s][d] for s, w in enumerate(weights)) / sum(weights) for d in range(len(v[0]))])
    return out


def layer_from_heads(heads, n_embd):
    "A fused layer with the weights of single heads, and a projection that changes nothing."
    layer = MultiHeadAttention(n_embd, len(heads))
    weights = [getattr(head, name).weight for name in ("query", "key", "value") for head in heads]
    layer.load_state_dict({"qkv.weight": torch.cat(weights), "proj.weight": torch.eye(n_embd),
                           "proj.bias": torch.zeros(n_embd)})
    return layer


def read_in_pieces(layer, x, sizes):
    cache = KVCache()
    y = torch.cat([layer(piece, cache) for piece in x.split(sizes, dim=1)], dim=1)
    assert len(cache) == x.shape[1]
    return y


# ---- all of it on a few shapes: quick to fail


@pytest.mark.parametrize("B, T, C, D", [(2, 7, 12, 5), (1, 1, 3, 1), (3, 30, 4, 8)])
def test_head_equals_that_of_pytorch(B, T, C, D):
    head, x = Head(C, D), torch.randn(B, T, C)
    expected = F.scaled_dot_product_attention(head.query(x), head.key(x), head.value(x), is_causal=True)
    for length in T, 1, T:  # a head serves texts of any length
        assert_close(head(x[:, :length]), expected[:, :length])
    assert_close(head(torch.cat([x, x], dim=1))[:, :T], expected)


def test_an_arrow_turns_by_one_radian_a_step_and_the_next_by_a_hundredth():
    turned = rotate(torch.tensor([1.0, 0.0, 0.0, 2.0]).expand(3, 4), torch.tensor([0, 1, 5]))
    expected = [[math.cos(t), -2 * math.sin(t / 100), math.sin(t), 2 * math.cos(t / 100)] for t in (0, 1, 5)]
    assert_close(turned, torch.tensor(expected))


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


def test_rotary_layer_equals_the_loop_on_rotated_vectors():
    layer, x = MultiHeadAttention(12, 3, rotary=True), torch.randn(1, 6, 12)
    heads = []
    for q, k, v in zip(*(part.split(4, dim=-1) for part in layer.qkv(x).chunk(3, dim=-1))):
        turns = torch.tensor([[cmath.exp(1j * t * speed) for speed in (1, 0.01)] for t in range(6)])
        q, k = (torch.complex(part[0, :, :2], part[0, :, 2:]) * turns for part in (q, k))
        q, k = (torch.cat([part.real, part.imag], dim=-1).tolist() for part in (q, k))
        heads.append(torch.tensor(attention_in_plain_numbers(q, k, v[0].tolist())))
    assert_close(layer(x)[0], layer.proj(torch.cat(heads, dim=-1)))


@pytest.mark.parametrize("rotary", [False, True])
def test_reading_one_by_one_equals_reading_at_once(rotary):
    layer, x = MultiHeadAttention(12, 3, rotary=rotary), torch.randn(2, 40, 12)
    assert_close(read_in_pieces(layer, x, 1), layer(x))


# ---- Head


@given(B=st.integers(1, 3), T=st.integers(1, 6), C=st.integers(1, 6), D=st.integers(1, 5))
def test_head_equals_the_triple_loop(B, T, C, D):
    head, x = Head(C, D).double(), 3 * torch.randn(B, T, C, dtype=torch.float64)
    rows = zip(head.query(x).tolist(), head.key(x).tolist(), head.value(x).tolist())
    expected = torch.tensor([attention_in_plain_numbers(*row) for row in rows], dtype=torch.float64)
    assert_close(head(x), expected, rtol=0, atol=1e-12)


def test_head_takes_a_single_sequence_and_any_leading_shape():
    head, x = Head(8, 4), torch.randn(2, 3, 5, 8)
    assert_close(head(x)[1, 2], head(x[1, 2]))


def test_head_of_equal_scores_is_the_running_mean():
    head, x = Head(6, 4), torch.randn(2, 7, 6)
    nn.init.zeros_(head.query.weight)
    mean = head.value(x).cumsum(dim=1) / torch.arange(1, 8)[:, None]
    assert_close(head(x), mean)


def test_head_survives_huge_scores():
    head, x = Head(6, 4), 1e4 * torch.randn(2, 7, 6)
    assert head(x).isfinite().all()


@given(B=st.integers(1, 2), T=st.integers(2, 12), data=st.data())
def test_no_output_depends_on_the_future(B, T, data):
    cut = data.draw(st.integers(1, T - 1))
    x = torch.randn(B, T, 12)
    changed = torch.cat([x[:, :cut], 9 * torch.randn(B, T - cut, 12)], dim=1)
    for layer in Head(12, 4), MultiHeadAttention(12, 3), MultiHeadAttention(12, 3, rotary=True):
        assert_close(layer(changed)[:, :cut], layer(x)[:, :cut])
        assert not torch.allclose(layer(changed)[:, cut:], layer(x)[:, cut:])


def test_every_earlier_token_counts():
    x = torch.randn(1, 6, 12, requires_grad=True)
    for layer in Head(12, 4), MultiHeadAttention(12, 3), MultiHeadAttention(12, 3, rotary=True):
        (grad,) = torch.autograd.grad(layer(x)[0, 3].square().sum(), x)
        assert (grad[0].abs().sum(dim=-1) > 0).tolist() == [True, True, True, True, False, False]


def test_sequences_of_a_batch_do_not_see_each_other():
    x, others = torch.randn(3, 5, 12), torch.randn(3, 5, 12)
    others[1] = x[1]
    for layer in Head(12, 4), MultiHeadAttention(12, 3), MultiHeadAttention(12, 3, rotary=True):
        assert_close(layer(others)[1], layer(x)[1])
        assert_close(layer(x[1:2])[0], layer(x)[1])


def test_order_is_seen_with_rotary_only():
    x = torch.randn(1, 6, 12)
    shuffled = x[:, [3, 0, 4, 2, 1, 5]]
    for layer in Head(12, 4), MultiHeadAttention(12, 3):
        assert_close(layer(shuffled)[:, -1], layer(x)[:, -1])
    layer = MultiHeadAttention(12, 3, rotary=True)
    assert (layer(shuffled)[:, -1] - layer(x)[:, -1]).abs().max() > 1e-3


# ---- rotate


@given(shape=st.lists(st.integers(1, 3), max_size=2), pairs=st.integers(1, 5),
       positions=st.lists(st.integers(0, 50), min_size=1, max_size=5))
def test_rotate_multiplies_by_complex_numbers(shape, pairs, positions):
    x = torch.randn(*shape, len(positions), 2 * pairs, dtype=torch.float64)
    expected = x.clone()
    for t, position in enumerate(positions):
        for i in range(pairs):
            turn = cmath.exp(1j * position * 10000 ** (-i / pairs))
            plane = torch.complex(x[..., t, i], x[..., t, i + pairs]) * turn
            expected[..., t, i], expected[..., t, i + pairs] = plane.real, plane.imag
    assert_close(rotate(x, torch.tensor(positions)), expected, rtol=0, atol=2e-5)  # the angles are float32


def test_rotate_keeps_norms_and_leaves_position_zero_alone():
    x = torch.randn(2, 3, 6, 8)
    turned = rotate(x, torch.arange(6))
    assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[..., 0, :], x[..., 0, :])
    assert not torch.allclose(turned[..., 1, :], x[..., 1, :])


@given(m=st.integers(0, 20), n=st.integers(0, 20), shift=st.integers(0, 40))
def test_scores_of_rotated_vectors_depend_on_the_distance(m, n, shift):
    q, k = torch.randn(2, 1, 8, dtype=torch.float64)

    def score(m, n):
        return rotate(q, torch.tensor([m])) @ rotate(k, torch.tensor([n])).T

    assert_close(score(m + shift, n + shift), score(m, n), rtol=0, atol=5e-5)
    if m != n:
        assert abs(score(m, n) - score(n, m)) > 1e-6  # which of them comes first matters


def test_rotate_refuses_an_odd_number_of_channels():
    with pytest.raises(ValueError, match="channels turn in pairs: their number must be even, but it is 5"):
        rotate(torch.randn(3, 5), torch.arange(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype):
    x = torch.randn(2, 5, 12, dtype=dtype)
    assert rotate(x, torch.arange(5)).dtype == dtype
    assert Head(12, 4).to(dtype)(x).dtype == dtype
    for rotary in False, True:
        layer, cache = MultiHeadAttention(12, 3, rotary=rotary).to(dtype), KVCache()
        assert layer(x, cache).dtype == layer(x[:, :1], cache).dtype == dtype
        assert cache.keys.dtype == cache.values.dtype == dtype


def test_angles_are_float32_also_for_bfloat16():
    x, positions = torch.randn(4, 400, 16).bfloat16(), torch.arange(400)
    assert_close(rotate(x, positions), rotate(x.float(), positions).bfloat16(), rtol=0, atol=0.06)


def test_autocast_runs_with_rotary_and_cache():
    layer, x = MultiHeadAttention(12, 3, rotary=True), torch.randn(2, 5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole, pieces = layer(x), read_in_pieces(layer, x, [2, 1, 2])
    assert whole.dtype == torch.bfloat16
    assert_close(pieces, whole, rtol=0.02, atol=0.02)
    assert_close(whole.float(), layer(x), rtol=0.05, atol=0.02)


# ---- MultiHeadAttention


@given(B=st.integers(1, 3), T=st.integers(1, 7), H=st.integers(1, 4), D=st.integers(1, 5))
def test_fused_layer_equals_its_heads_side_by_side(B, T, H, D):
    heads, x = [Head(H * D, D) for _ in range(H)], torch.randn(B, T, H * D)
    expected = torch.cat([head(x) for head in heads], dim=-1)
    assert_close(layer_from_heads(heads, H * D)(x), expected)


@given(B=st.integers(1, 2), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6), rotary=st.booleans())
def test_reading_in_pieces_equals_reading_at_once(B, sizes, rotary):
    layer, x = MultiHeadAttention(12, 3, rotary=rotary), torch.randn(B, sum(sizes), 12)
    assert_close(read_in_pieces(layer, x, sizes), layer(x))


def test_two_caches_do_not_mix_and_none_leaves_no_trace():
    layer, x, other = MultiHeadAttention(12, 3, rotary=True), torch.randn(1, 6, 12), torch.randn(1, 6, 12)
    mine, theirs = KVCache(), KVCache()
    for t in range(6):
        ours = layer(x[:, t:t + 1], mine)
        layer(other[:, t:t + 1], theirs)
        layer(other)
    assert_close(ours, layer(x)[:, -1:])
    assert len(mine) == len(theirs) == 6


def test_cache_starts_empty_and_grows_at_the_end():
    cache, keys, values = KVCache(), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    assert len(cache) == 0 and cache.keys is None and cache.values is None
    for t in range(5):
        all_keys, all_values = cache.append(keys[:, :, t:t + 1], values[:, :, t:t + 1])
        assert len(cache) == t + 1
    assert torch.equal(all_keys, keys) and torch.equal(all_values, values)
    assert cache.keys is all_keys and cache.values is all_values


@pytest.mark.parametrize("rotary", [False, True])
def test_gradient_equals_finite_differences(rotary):
    layer = MultiHeadAttention(8, 2, rotary=rotary).double()
    x = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    head = Head(8, 3).double()
    assert torch.autograd.gradcheck(head, (x,))


def test_gradient_reaches_every_weight():
    for layer in Head(12, 4), MultiHeadAttention(12, 3), MultiHeadAttention(12, 3, rotary=True):
        layer(torch.randn(2, 5, 12)).square().sum().backward()
        assert all(weight.grad.abs().sum() > 0 for weight in layer.parameters())


def test_number_of_parameters():
    assert sum(p.numel() for p in MultiHeadAttention(128, 8).parameters()) == 4 * 128 * 128 + 128
    assert sum(p.numel() for p in MultiHeadAttention(128, 8, rotary=True, bias=False).parameters()) == 4 * 128 * 128
    assert sum(p.numel() for p in Head(128, 16).parameters()) == 3 * 128 * 16


# ---- dropout


def test_no_dropout_at_evaluation():
    layer, x = MultiHeadAttention(12, 3, dropout=0.5), torch.randn(2, 5, 12)
    plain = MultiHeadAttention(12, 3)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), plain.train()(x))


def test_dropout_falls_on_the_output():
    layer = MultiHeadAttention(64, 4, dropout=0.25)
    dropped = (layer(torch.randn(4, 32, 64)) == 0).sum().item()
    n = 4 * 32 * 64  # binomial: 6 standard deviations are left with probability 2e-9
    assert abs(dropped - 0.25 * n) < 6 * math.sqrt(n * 0.25 * 0.75)


def test_dropout_falls_on_the_weights_too():
    layer, x = MultiHeadAttention(8, 2, dropout=0.5), torch.randn(4, 64, 8)
    with torch.no_grad():
        layer.proj.weight.copy_(torch.eye(8))
        layer.proj.bias.zero_()
    y, whole = layer(x), layer.eval()(x)
    survivors = y[y != 0] / 2  # the output's own dropout scales what it leaves by 1 / (1 - 0.5)
    # with weights left whole, these would equal those of evaluation; each differs unless chance keeps none or all
    assert ((survivors - whole[y != 0]).abs() > 1e-6).float().mean() > 0.9


# ---- errors


@pytest.mark.parametrize("n_embd, n_head", [(10, 3), (8, 16)])
def test_indivisible_heads_are_refused(n_embd, n_head):
    with pytest.raises(ValueError, match=f"n_embd = {n_embd} channels cannot be divided among n_head = {n_head} heads"):
        MultiHeadAttention(n_embd, n_head)


def test_odd_head_size_is_refused_with_rotary_only():
    with pytest.raises(ValueError, match="rotary positions turn pairs of channels, but a head has 5"):
        MultiHeadAttention(15, 3, rotary=True)
    assert MultiHeadAttention(15, 3)(torch.randn(1, 2, 15)).shape == (1, 2, 15)
