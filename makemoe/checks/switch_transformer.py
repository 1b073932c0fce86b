"Checks of lesson 29, switch_transformer. Buckets and layouts are compared with numbers of T5 and of Flaxformer."

import math

import torch

from makemoe.capacity import limit_to_capacity
from makemoe.checks import check, close, refuses, same, same_gradients, unchanged
from makemoe.gating import Routing
from makemoe.switch import switch_gating

FIELDS = "gates", "logits", "chosen", "kept"
MARKS, FIRST = 32, 34  # marks are 2 to 33, a character has its id plus 34

T5 = {  # (num_buckets, max_distance, two_sided): the first distance, then (bucket, how many distances in a row)
    (32, 128, True): (-20, [(10, 5), (9, 4), (8, 4), (7, 1), (6, 1), (5, 1), (4, 1), (3, 1), (2, 1), (1, 1), (0, 1),
                            (17, 1), (18, 1), (19, 1), (20, 1), (21, 1), (22, 1), (23, 1), (24, 4), (25, 4), (26, 5)]),
    (32, 128, False): (-20, [(17, 2), (16, 3), *((b, 1) for b in range(15, 0, -1)), (0, 3)]),
    (8, 16, True): (-20, [(3, 15), (2, 4), (1, 1), (0, 1), (5, 1), (6, 4), (7, 15)]),
    (8, 16, False): (-20, [(7, 9), (6, 4), (5, 2), (4, 2), (3, 1), (2, 1), (1, 1), (0, 3)]),
}  # fmt: skip


def bucket(distance, two_sided, num_buckets=32, max_distance=128):
    "The bucket of one distance, a Python number."
    far, offset = max(-distance, 0), 0
    if two_sided:
        num_buckets //= 2
        far, offset = abs(distance), num_buckets if distance > 0 else 0
    near = num_buckets // 2
    if far < near:
        return offset + far
    wide = near + int(math.log(far / near) / math.log(max_distance / near) * (num_buckets - near))
    return offset + min(wide, num_buckets - 1)


def buckets_follow(relative_buckets, distances, *settings):
    "Assert that the buckets of `distances` are those that `bucket` gives to each."
    want = torch.tensor([bucket(d, *settings) for d in distances])
    same(relative_buckets(torch.tensor(distances), *settings), want, f"buckets with two_sided, ... = {settings}")


def sparse_by_rule(num_layers, num_sparse, layout):
    "Flaxformer's rule, asked for one layer after another."
    rules = {
        "bottom": lambda i: i < num_sparse,
        "middle": lambda i: num_layers - num_sparse <= 2 * i < num_layers + num_sparse,
        "mixed": lambda i: num_sparse and (i + 1) % (num_layers // num_sparse) == 0,
        "top": lambda i: num_layers - i <= num_sparse,
    }
    return [i for i in range(num_layers) if rules[layout](i)]


def some_routing(*shape, slots=None):
    "A `Routing` of random tokens, one of five experts each, with gates that have a gradient; and its logits."
    logits = torch.randn(*shape, 5, requires_grad=True)
    routing = switch_gating(logits)
    return routing if slots is None else limit_to_capacity(routing, slots), logits


def read_spans(source, target):
    "(pieces that stay, pieces that were hidden, their marks in the source, and in the target), characters as ids."
    stays, hidden, marks, named = [[]], [], [], []
    for i in source.tolist():
        if i < FIRST:
            marks.append(i)
            stays.append([])
        else:
            stays[-1].append(i - FIRST)
    for i in target.tolist()[:-1]:
        if i < FIRST:
            named.append(i)
            hidden.append([])
        else:
            hidden[-1].append(i - FIRST)
    return stays, hidden, marks, named


def well_hidden(ids, pair, hide, spans):
    "Assert that `pair` hides `hide` of the characters `ids` in `spans` spans, and loses none."
    source, target = pair
    for name, tensor in ("source", source), ("target", target):
        assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.long and tensor.dim() == 1, (
            f"the {name} should be one row of long integers"
        )
    assert target[-1] == 1, f"the target should end in 1, but ends in {target[-1]}"
    assert target[0] < FIRST, "the target should begin with a mark"
    stays, hidden, marks, named = read_spans(source, target)
    same(marks, list(range(2, 2 + spans)), "the marks in the source")
    same(named, marks, "the marks in the target")
    same(sum(map(len, hidden)), hide, "the number of hidden characters")
    assert all(hidden) and all(stays[1:-1]), "a span is empty, or two spans touch"
    joined = [i for stay, lost in zip(stays, [*hidden, []]) for i in stay + lost]
    same(joined, ids.tolist(), "the text joined again")
    return stays, hidden


@check
def check_relative_buckets(relative_buckets):
    yield "small and large distances have the buckets of T5"
    for (num_buckets, max_distance, two_sided), (first, runs) in T5.items():
        want = torch.tensor([b for b, times in runs for _ in range(times)])
        distances = torch.arange(first, first + len(want))
        got = relative_buckets(distances, two_sided, num_buckets, max_distance)
        same(got, want, f"{num_buckets} buckets, two_sided {two_sided}, distances from {first}")
    yield "without numbers there are 32 buckets, up to distance 128"
    for two_sided in True, False:
        buckets_follow(relative_buckets, list(range(-200, 201)), two_sided)
    yield "far away all distances share the last bucket, however far"
    far = torch.tensor([-(10**6), -5000, 5000, 10**6])
    same(relative_buckets(far, True, 32, 128), torch.tensor([15, 15, 31, 31]), "two-sided buckets")
    same(relative_buckets(far, False, 32, 128), torch.tensor([31, 31, 0, 0]), "one-sided buckets")
    yield "any number of buckets and any largest distance will do"
    for settings in (16, 64), (6, 10), (20, 100), (64, 40), (10, 1000):
        for two_sided in True, False:
            buckets_follow(relative_buckets, [*range(-150, 151), -900, 900], two_sided, *settings)
    yield "distances may have any shape and stay as they are"
    grid = torch.arange(12)[None, :] - torch.arange(9)[:, None]
    with unchanged(distance=grid):
        got = relative_buckets(grid, True, 8, 16)
    same(got, torch.tensor([[bucket(d, True, 8, 16) for d in row] for row in grid.tolist()]), "buckets (9, 12)")
    same(relative_buckets(torch.tensor(-3), False), torch.tensor(3), "the bucket of one distance")


@check
def check_sparse_layers(sparse_layers):
    yield "of 12 layers the same are sparse as in Flaxformer's own test"
    same(sparse_layers(12, 4, "bottom"), [0, 1, 2, 3], "4 at the bottom")
    same(sparse_layers(12, 2, "middle"), [5, 6], "2 in the middle")
    same(sparse_layers(12, 3, "mixed"), [3, 7, 11], "3 mixed")
    same(sparse_layers(12, 1, "top"), [11], "1 at the top")
    yield "and for 1 to 12 layers those of its rule"
    for layers in range(1, 13):
        for number in range(layers + 1):
            for layout in "bottom", "middle", "mixed", "top":
                if layout != "mixed" or not number or layers % number == 0:
                    want = sparse_by_rule(layers, number, layout)
                    same(sparse_layers(layers, number, layout), want, f"{number} of {layers} layers, {layout}")
    yield "the layout is mixed if none is named"
    same(sparse_layers(6, 2), [2, 5], "2 of 6 layers")
    yield "it refuses a number that does not divide, but only where it is mixed"
    refuses(ValueError, lambda: sparse_layers(12, 5), 5, 12)
    refuses(ValueError, lambda: sparse_layers(3, 2, "mixed"), 2, 3)
    yield "it refuses numbers and layouts that make no sense"
    for layout in "top", "middle", "mixed":
        refuses(ValueError, lambda layout=layout: sparse_layers(4, 5, layout), 5, 4)
        refuses(ValueError, lambda layout=layout: sparse_layers(4, -1, layout), -1)
    refuses(ValueError, lambda: sparse_layers(4, 2, "random"), "random")
    refuses(ValueError, lambda: sparse_layers(4, 0, "Top"), "Top")


@check
def check_without_padding(without_padding):
    yield "padding has no expert, no gate and no load, and all else is as it was"
    (routing, _), real = some_routing(3, 7), torch.ones(3, 7, dtype=torch.bool)
    real[0, 5:] = real[1, :3] = False
    before = {field: getattr(routing, field) for field in FIELDS}
    with unchanged(real=real, **before):
        got = without_padding(routing, real)
    for field in FIELDS:
        want = (
            before[field]
            if field == "logits"
            else torch.where(real[..., None], before[field], 0).to(before[field].dtype)
        )
        close(getattr(got, field).float(), want.float(), field)
        same(getattr(got, field).dtype, before[field].dtype, f"the type of {field}")
    same(got.load.sum().item(), 16, "the load of all experts")
    yield "real tokens have the slots that they would have without padding, also behind it"
    for slots in 1, 2:
        for row in range(3):
            alone = Routing(*(getattr(routing, field)[row][real[row]] for field in FIELDS))
            kept = limit_to_capacity(got, slots).kept[row][real[row]]
            same(kept, limit_to_capacity(alone, slots).kept, f"kept, with {slots} slots")
    yield "choices that were dropped before stay dropped"
    limited, _ = some_routing(2, 9, slots=1)
    same(without_padding(limited, torch.ones(2, 9, dtype=torch.bool)).kept, limited.kept, "kept")
    same(without_padding(limited, torch.ones(2, 9, dtype=torch.bool)).chosen, limited.chosen, "chosen")
    yield "the gradient of the gates is that of the real tokens' gates"
    routing, logits = some_routing(2, 4)
    real = torch.tensor([[True, True, False, True], [False, True, True, False]])
    want = routing.gates * real[..., None]
    same_gradients(without_padding(routing, real).gates, want, {"the logits": logits}, "the gates")
    yield "tokens may have any shape, also all of them may be padding"
    routing, _ = some_routing(6)
    same(without_padding(routing, torch.zeros(6, dtype=torch.bool)).chosen.sum().item(), 0, "choices")
    same(without_padding(routing, torch.arange(6) > 1).kept.sum(dim=-1), (torch.arange(6) > 1).long(), "kept")


@check
def check_span_corruption(span_corruption):
    ids = torch.randint(60, (100,))
    yield "15 of 100 characters are hidden in 5 spans, each has its mark, and nothing is lost"
    with unchanged(ids=ids):
        pair = span_corruption(ids)
    well_hidden(ids, pair, 15, 5)
    yield "rate and mean_span say how much is hidden, and in how many spans"
    for rate, mean, hide, spans in (0.5, 5.0, 50, 10), (0.3, 1.0, 30, 30), (0.04, 8.0, 4, 1), (0.9, 30.0, 90, 3):
        for _ in range(5):
            well_hidden(ids, span_corruption(ids, rate, mean), hide, spans)
    yield "at least one character is hidden, at least one stays, and there are at most 32 spans"
    for N, rate, mean, hide, spans in (
        (2, 0.01, 3.0, 1, 1), (2, 0.99, 1.0, 1, 1), (5, 0.99, 1.0, 4, 2), (9, 0.5, 1.0, 4, 4), (400, 0.5, 2.0, 200, 32),
    ):  # fmt: skip
        for _ in range(5):
            well_hidden(ids.repeat(4)[:N], span_corruption(ids.repeat(4)[:N], rate, mean), hide, spans)
    yield "spans have different lengths and lie anywhere: also at both ends, and inside everywhere equally often"
    lengths, hits, ends, text = [], torch.zeros(20), torch.zeros(2), torch.arange(20)
    for _ in range(400):
        stays, hidden = well_hidden(text, span_corruption(text, 0.3, 3.0), 6, 2)
        lengths += [len(hidden[0])]
        hits[torch.cat([torch.tensor(span) for span in hidden])] += 1
        ends += torch.tensor([not stays[0], not stays[-1]])
    shares = torch.tensor(lengths).bincount(minlength=6)[1:6] / 400
    assert (shares - 0.2).abs().max() < 0.1, f"the first of two spans has 1 to 5 characters in shares {shares.tolist()}"
    inner = hits[4:16] / 400  # about 0.33 each; near the ends it is less
    assert (inner - 0.33).abs().max() < 0.12, f"characters are hidden in shares of {inner.tolist()} of the cases"
    assert (ends / 400 - 0.125).abs().max() < 0.08, (
        f"a span begins or ends the text in {(ends / 400).tolist()} of cases"
    )
    yield "a generator alone decides, and goes on from call to call"
    generator, state = torch.Generator().manual_seed(3), torch.get_rng_state()
    first, second = (torch.cat(span_corruption(ids, generator=generator)).tolist() for _ in range(2))
    again = torch.cat(span_corruption(ids, generator=torch.Generator().manual_seed(3))).tolist()
    same(again, first, "the same seed")
    assert first != second, "two calls with one generator hide the same"
    same(torch.get_rng_state(), state, "the state of PyTorch's own random numbers")
    yield "ids may be bytes"
    small = torch.arange(200, 256, dtype=torch.uint8)
    well_hidden(small, span_corruption(small), 8, 3)
    yield "it refuses a text that is too short, and settings out of range"
    for arguments in (
        (ids[:1],),
        (ids[:0],),
        (ids, 0.0),
        (ids, 1.0),
        (ids, -0.1),
        (ids, 0.15, 0.5),
        (ids, 0.15, math.nan),
    ):
        refuses(ValueError, lambda arguments=arguments: span_corruption(*arguments))


def join(join_spans, source, target, want, what):
    source, target = torch.tensor(source, dtype=torch.long), torch.tensor(target, dtype=torch.long)
    with unchanged(source=source, target=target):
        got = join_spans(source, target)
    same(got, torch.tensor(want, dtype=torch.long), what)


@check
def check_join_spans(join_spans):
    yield "each hidden span is put in the place of its mark"
    join(join_spans, [34, 2, 36, 3], [2, 35, 35, 3, 37, 1], [0, 1, 1, 2, 3], "two spans")
    join(join_spans, [2, 40, 41, 3, 42], [2, 34, 3, 35, 36, 37, 1], [0, 6, 7, 1, 2, 3, 8], "a span at the start")
    join(join_spans, [34, 35], [1], [0, 1], "no span")
    yield "32 spans of a long text"
    source = [i for m in range(2, 34) for i in (m, 34 + m, 40)]
    target = [i for m in range(2, 34) for i in (m, *[60 + m] * (m % 4 + 1))]
    want = [i for m in range(2, 34) for i in (*[26 + m] * (m % 4 + 1), m, 6)]
    join(join_spans, source, [*target, 1], want, "32 spans")
    yield "what a model wrote may come in another order, or miss a span, or its end"
    join(join_spans, [34, 2, 36, 3], [3, 50, 2, 51, 1], [0, 17, 2, 16], "marks in another order")
    join(join_spans, [34, 2, 36, 3, 37], [3, 50], [0, 2, 16, 3], "mark 2 missing, and the end")
    join(join_spans, [34, 2, 36], [2, 1], [0, 2], "an empty span")
    join(join_spans, [34, 2, 36], [], [0, 2], "nothing written")
    join(join_spans, [34, 2, 36], [9, 50, 2, 51, 1], [0, 17, 2], "a mark that nobody asked for")
    yield "what follows the end or comes before the first mark does not count, and padding says nothing"
    join(join_spans, [34, 2, 36], [2, 50, 1, 51, 2, 52, 1], [0, 16, 2], "after the end")
    join(join_spans, [34, 2, 36], [0, 60, 2, 50, 0, 51, 1, 0, 0], [0, 16, 17, 2], "before the first mark, and padding")
    join(join_spans, [34, 2, 36, 0, 0], [2, 50, 1], [0, 16, 2], "padding in the source")
