"""Hidden cases for lesson 29: other sizes, settings and devices."""

import torch

from makemoe.checks import check, close, refuses, same
from makemoe.checks.switch_transformer import buckets_follow, join, some_routing, sparse_by_rule, well_hidden


@check
def check_relative_buckets(relative_buckets):
    yield "other settings"
    for settings in (4, 5), (12, 30), (48, 500), (128, 256):
        for two_sided in True, False:
            buckets_follow(relative_buckets, [*range(-90, 91), -2000, 2000], two_sided, *settings)
    yield "no distance, and int32"
    same(relative_buckets(torch.zeros(0, 3, dtype=torch.long), True).shape, torch.Size([0, 3]), "the shape of nothing")
    same(
        relative_buckets(torch.arange(-9, 9, dtype=torch.int32), True).tolist(),
        relative_buckets(torch.arange(-9, 9), True).tolist(),
        "buckets of int32",
    )


@check
def check_sparse_layers(sparse_layers):
    yield "24 layers"
    for layout in "bottom", "middle", "mixed", "top":
        for number in 1, 2, 3, 8, 12, 24:
            want = sparse_by_rule(24, number, layout)
            same(sparse_layers(24, number, layout), want, f"{number} of 24 layers, {layout}")
    yield "no layer at all"
    same(sparse_layers(0, 0, "top"), [], "0 of 0 layers")
    refuses(ValueError, lambda: sparse_layers(0, 1, "top"), 1, 0)


@check
def check_without_padding(without_padding):
    yield "three dimensions of tokens, and another type"
    routing, _ = some_routing(2, 3, 4)
    real = torch.rand(2, 3, 4) > 0.4
    got = without_padding(routing, real)
    close(got.gates.sum(dim=-1), routing.gates.sum(dim=-1) * real, "gates")
    same(got.chosen.any(dim=-1), real, "chosen")


@check
def check_span_corruption(span_corruption):
    yield "other lengths and settings"
    for N, rate, mean, hide, spans in (
        (37, 0.2, 2.0, 7, 4),
        (257, 0.15, 3.0, 39, 13),
        (3, 0.5, 1.0, 2, 2),
        (50, 0.7, 1.4, 35, 16),
    ):
        ids = torch.randint(200, (N,))
        for _ in range(5):
            well_hidden(ids, span_corruption(ids, rate, mean), hide, spans)


@check
def check_join_spans(join_spans):
    yield "characters with large ids"
    join(join_spans, [5000, 2, 33], [2, 4000, 33, 4001, 1], [4966, 3966, 3967], "large ids, first and last mark")
    yield "only marks"
    join(join_spans, [3, 2], [2, 34, 35, 3, 36, 1], [2, 0, 1], "only marks")
    join(join_spans, [2], [1], [], "nothing")
