"""Hidden cases for lesson 02: other sizes and scores than students can see."""

import torch
from torch.nn import functional as F

from makemoe.checks import check, close
from makemoe.checks.attention import attend_by_heads, attend_slowly, rotate_as_complex


@check
def check_head(Head):
    yield "other sizes, and scores that are far apart"
    head, x = Head(7, 9), 6 * torch.randn(3, 11, 7)
    q, k, v = head.query(x), head.key(x), head.value(x)
    close(head(x), F.scaled_dot_product_attention(q, k, v, is_causal=True), "the output", 1e-4, 1e-5)


@check
def check_rotate(rotate):
    yield "other sizes and positions"
    x, positions = torch.randn(3, 4, 20), torch.tensor([700, 2, 1, 5000])
    close(rotate(x, positions), rotate_as_complex(x, positions), "D = 20 at the positions 700, 2, 1, 5000", 1e-3, 5e-3)


@check
def check_multi_head_attention(MultiHeadAttention):
    for n_head in 2, 6:
        yield f"{n_head} heads of a wider token"
        layer, x = MultiHeadAttention(24, n_head, rotary=True), torch.randn(3, 9, 24)
        close(layer(x), attend_by_heads(layer, x, n_head, rotary=True), "the output", 1e-4, 1e-5)


@check
def check_attention_entropy(attention_entropy):
    yield "one row alone, and a batch of batches"
    weights = (4 * torch.randn(2, 2, 3, 8, 8)).softmax(dim=-1)
    want = -(weights * weights.log()).sum(dim=-1)
    close(attention_entropy(weights), want, "random rows", 1e-4)
    close(attention_entropy(weights[0, 0, 0, 0]), want[0, 0, 0, 0], "a single row", 1e-4)


@check
def check_grouped_attention(grouped_attention):
    yield "other numbers of heads"
    q, k, v = torch.randn(1, 12, 9, 2), torch.randn(1, 4, 9, 2), torch.randn(1, 4, 9, 2)
    group = [head // 3 for head in range(12)]
    close(grouped_attention(q, k, v), attend_slowly(q, k[:, group], v[:, group]), "H = 12, G = 4", 1e-4, 1e-5)
