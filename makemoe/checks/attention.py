"""Checks of lesson 02, attention."""

import torch

from makemoe.checks import check, close, refuses, same, same_gradients, unchanged


def attend_slowly(q, k, v):
    "Causal attention (..., T, D) by the formula, one token after the other: no mask, and no later tokens to hide."
    rows = []
    for t in range(q.shape[-2]):
        scores = (q[..., t : t + 1, :] * k[..., : t + 1, :]).sum(dim=-1) / q.shape[-1] ** 0.5  # (..., t + 1)
        rows.append((scores.softmax(dim=-1)[..., None] * v[..., : t + 1, :]).sum(dim=-2))
    return torch.stack(rows, dim=-2)


def rotate_as_complex(x, positions):
    "x (..., T, D): channels i and i + D/2 are a complex number that turns by position * 10000**(-2i/D), in float64."
    half = x.shape[-1] // 2
    angles = positions.double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    turned = torch.complex(*x.double().split(half, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def attend_by_heads(layer, x, n_head, rotary):
    "What a `MultiHeadAttention` should answer in evaluation, head by head, from its two linear layers."
    q, k, v = (part.unflatten(-1, (n_head, -1)).transpose(1, 2) for part in layer.qkv(x).chunk(3, dim=-1))
    if rotary:
        q, k = (rotate_as_complex(part, torch.arange(x.shape[1])) for part in (q, k))
    return layer.proj(attend_slowly(q, k, v).transpose(1, 2).flatten(2))  # (B, T, C)


def parameters_and(module, **others):
    "The tensors that gradients should reach, by name."
    return {**dict(module.named_parameters()), **others}


@check
def check_head(Head):
    head, x = Head(12, 5), torch.randn(2, 7, 12, requires_grad=True)
    names = list(head.state_dict())
    want = attend_slowly(head.query(x), head.key(x), head.value(x))
    yield "x and the weights stay as they are"
    with unchanged(x=x, **dict(head.named_parameters())):
        got = head(x)
    yield "it is softmax(q k^T / sqrt(head size)) v over the past, as computed token by token"
    close(got, want, "the output")
    yield "nothing depends on a later token"
    other = torch.cat([x[:, :4], torch.randn(2, 3, 12)], dim=1)
    close(head(other)[:, :4], got[:, :4], "the first 4 outputs when the last 3 tokens change")
    yield "the gradient reaches x and all three layers, in evaluation mode too"
    same_gradients(got, want, parameters_and(head, x=x), "the output")
    same_gradients(head.eval()(x), want, parameters_and(head, x=x), "the output in evaluation mode")
    yield "sequences may have any length, with any number of axes before T"
    close(head(x[:, :3]), want[:, :3], "the output of the first 3 tokens alone")
    close(head(x[1]), want[1], "the output of a sequence without a batch")
    close(head(x[None, :, :1]), want[None, :, :1], "the output of (1, 2, 1, 12) tokens")
    long = torch.randn(300, 12)
    close(
        head(long),
        attend_slowly(head.query(long), head.key(long), head.value(long)),
        "the output of 300 tokens",
        1e-4,
        1e-5,
    )
    yield "large scores give numbers, not nan"
    assert head(1e4 * x).isfinite().all(), "some outputs are not finite where x is 10,000 times as large"
    yield "the output has the dtype and the device of x, and forward adds nothing to state_dict()"
    same(list(head.state_dict()), names, "the names in state_dict()")
    same(Head(12, 5).bfloat16()(x.bfloat16()).dtype, torch.bfloat16, "the dtype of the output for bfloat16")
    same(Head(12, 5).to("meta")(x.to("meta")).device.type, "meta", "the device of the output")


@check
def check_rotate(rotate):
    x, positions = torch.randn(2, 3, 5, 8, requires_grad=True), torch.tensor([0, 4, 5, 30, 9])
    yield "x and positions stay as they are"
    with unchanged(x=x, positions=positions):
        got = rotate(x, positions)
    yield "position 0 turns nothing, and turning keeps lengths"
    close(got[..., 0, :], x[..., 0, :], "the vectors at position 0")
    close(got.norm(dim=-1), x.norm(dim=-1), "the lengths")
    yield "channels (i, i + D/2) turn by position * 10000**(-2i/D)"
    close(
        rotate(torch.tensor([[1.0, 0.0]]), torch.tensor([1])),
        torch.tensor([[0.540302, 0.841471]]),
        "(1, 0) at position 1",
    )
    close(got, rotate_as_complex(x, positions), "D = 8 at the positions 0, 4, 5, 30, 9", 1e-4, 1e-5)
    yield "positions may be large, and D = 2 is one pair"
    close(
        rotate(x, 3000 + positions), rotate_as_complex(x, 3000 + positions), "D = 8 from position 3000 on", 1e-3, 3e-3
    )
    close(rotate(x[..., :2], positions), rotate_as_complex(x[..., :2], positions), "D = 2", 1e-4, 1e-5)
    yield "the gradient reaches x"
    same_gradients(got, rotate_as_complex(x, positions), {"x": x}, "the turned vectors", 1e-3, 1e-5)
    yield "the result has the dtype and the device of x, and angles are float32 even if x is not"
    low = rotate(x.bfloat16(), 300 + positions)
    close(low, rotate_as_complex(x.bfloat16(), 300 + positions), "bfloat16 at the positions from 300 on", 0.05, 0.05)
    same(rotate(x.double(), positions).dtype, torch.float64, "the dtype of the result for float64")
    same(rotate(x.to("meta"), positions.to("meta")).device.type, "meta", "the device of the result")
    yield "an odd number of channels is refused"
    refuses(ValueError, lambda: rotate(x[..., :5], positions), "even", 5)


@check
def check_multi_head_attention(MultiHeadAttention):
    layers = {
        (n_head, rotary): MultiHeadAttention(12, n_head, rotary=rotary)
        for n_head, rotary in [(3, False), (3, True), (1, True)]
    }
    x = torch.randn(2, 5, 12, requires_grad=True)
    names = list(layers[3, True].state_dict())
    for (n_head, rotary), layer in layers.items():
        what = f"the output of {n_head} head{'s' * (n_head > 1)}{', rotary' * rotary}"
        want = attend_by_heads(layer, x, n_head, rotary)
        yield f"{what}: the outputs of the heads side by side, then proj"
        with unchanged(x=x, **dict(layer.named_parameters())):
            got = layer(x)
        close(got, want, what, 1e-4, 1e-5)
        yield f"{what}: the gradient reaches x and all weights, in evaluation mode too"
        same_gradients(got, want, parameters_and(layer, x=x), what, 1e-3, 1e-5)
        same_gradients(layer.eval()(x), want, parameters_and(layer, x=x), what, 1e-3, 1e-5)
    yield "sequences may have any length"
    layer, long = layers[3, True], torch.randn(1, 300, 12)
    close(layer(x[:, :1]), attend_by_heads(layer, x[:, :1], 3, True), "the output of a single token", 1e-4, 1e-5)
    close(layer(long), attend_by_heads(layer, long, 3, True), "the output of 300 tokens", 1e-3, 1e-4)
    yield "without bias, proj has none"
    layer = MultiHeadAttention(8, 2, bias=False)
    close(layer(x[..., :8]), attend_by_heads(layer, x[..., :8], 2, False), "the output without bias", 1e-4, 1e-5)
    yield "the output has the dtype and the device of x, and forward adds nothing to state_dict()"
    same(list(layers[3, True].state_dict()), names, "the names in state_dict()")
    same(
        MultiHeadAttention(12, 3, True).bfloat16()(x.bfloat16()).dtype,
        torch.bfloat16,
        "the dtype of the output for bfloat16",
    )
    same(MultiHeadAttention(12, 3, True).to("meta")(x.to("meta")).device.type, "meta", "the device of the output")
    yield from dropout_is_as_promised(MultiHeadAttention)


def share(bools, want, what):
    "Assert that about `want` of the `bools` are true."
    got = bools.double().mean().item()
    assert abs(got - want) < 0.03, f"{what}: {got:.3f}, but should be about {want:.3f}"


def dropout_is_as_promised(MultiHeadAttention):
    """Dropout of p = 0.4, measured where the weights can be read off the output.

    Queries are zero, so that token t gives 1 / (t + 1) to each token that it sees; values are one-hot, so that
    channel s of each head is the weight of token s; and proj changes nothing.
    """
    p, T, H, B = 0.4, 12, 2, 64
    layer, x = MultiHeadAttention(H * T, H, bias=False, dropout=p), torch.zeros(B, T, H * T)
    x[:, :, :T] = torch.eye(T)
    with torch.no_grad():
        layer.qkv.weight.zero_()
        layer.proj.weight.copy_(torch.eye(H * T))
        for head in range(H):
            layer.qkv.weight[2 * H * T + head * T :][:T, :T] = torch.eye(T)
    past = torch.ones(T, T).tril().bool()
    whole = past / torch.arange(1.0, T + 1)[:, None]  # (T, T) the weights in evaluation

    def weights():
        return layer(x).unflatten(-1, (H, T)).transpose(1, 2).detach()  # (B, H, T, T)

    yield "in training, dropout is applied to the attention weights and to the output, each with probability p"
    once = weights()
    kept = once != 0
    share(kept[..., past], (1 - p) ** 2, "the share of weights that both dropouts of 0.4 keep")
    scaled = (whole / (1 - p) ** 2).expand_as(once)
    close(once[kept], scaled[kept], "the weights that are kept, divided by 0.6 twice")
    yield "each weight is set to zero independently, not whole tokens, channels, heads or sequences"
    neighbours = {
        "tokens that look at the same one": (kept[..., :-1, :], kept[..., 1:, :], past[:-1]),
        "tokens that are looked at by the same one": (kept[..., :-1], kept[..., 1:], past[:, 1:]),
        "heads": (kept[:, :-1], kept[:, 1:], past),
        "sequences": (kept[:-1], kept[1:], past),
    }
    for name, (one, other, where) in neighbours.items():
        share((one & other)[..., where], (1 - p) ** 4, f"the share of weights kept with their neighbour ({name})")
    yield "the second dropout comes after proj"
    with torch.no_grad():
        layer.proj.weight.copy_(torch.rand(H * T, H * T) + 0.1)
    share((layer(x)[:, T // 2 :] == 0), p, "the share of zeros in the output")
    yield "in evaluation mode, or with dropout 0, nothing is set to zero"
    plain = MultiHeadAttention(H * T, H, bias=False)
    plain.load_state_dict(layer.state_dict())
    same(layer.eval()(x), plain.eval()(x), "the output in evaluation")
    same(plain.train()(x), plain.eval()(x), "the output in training without dropout")


@check
def check_attention_entropy(attention_entropy):
    even = torch.ones(6, 6).tril() / torch.arange(1, 7)[:, None]
    yield "a row that is spread evenly over n tokens has entropy ln n, and weights stay as they are"
    with unchanged(weights=even):
        got = attention_entropy(even)
    close(got, torch.arange(1, 7).log(), "plain averages of 1 to 6 tokens")
    yield "a row with all its weight on one token has entropy 0"
    close(attention_entropy(torch.eye(6)), torch.zeros(6), "all weight on one token")
    yield "any row has entropy -sum w log w, with any number of axes before it"
    scores = 3 * torch.randn(2, 3, 5, 5)
    close(
        attention_entropy(scores.softmax(dim=-1)),
        torch.distributions.Categorical(logits=scores).entropy(),
        "random rows",
        1e-4,
    )
    close(
        attention_entropy(torch.full((4, 4), 0.25).double()),
        torch.full((4,), 4.0).double().log(),
        "float64",
        1e-9,
        1e-9,
    )


@check
def check_grouped_attention(grouped_attention):
    q = torch.randn(2, 6, 5, 4, requires_grad=True)
    for G in 3, 2, 1, 6:
        k, v = torch.randn(2, 2, G, 5, 4, requires_grad=True)
        yield f"6 query heads share {G} keys and values, neighbouring heads the same ones"
        with unchanged(q=q, k=k, v=v):
            got = grouped_attention(q, k, v)
        group = [head * G // 6 for head in range(6)]
        want = attend_slowly(q, k[:, group], v[:, group])
        close(got, want, f"H = 6, G = {G}", 1e-4, 1e-5)
        same_gradients(got, want, {"q": q, "k": k, "v": v}, f"H = 6, G = {G}", 1e-3, 1e-5)
    yield "nothing depends on a later token, and the result is on the device of q"
    q, k, v = torch.randn(1, 4, 7, 8), torch.randn(1, 4, 7, 8), torch.randn(1, 4, 7, 8)
    later = torch.cat([k[:, :, :3], torch.randn(1, 4, 4, 8)], dim=2)
    close(
        grouped_attention(q, later, v)[:, :, :3],
        grouped_attention(q, k, v)[:, :, :3],
        "the first 3 outputs when later keys change",
    )
    same(grouped_attention(q.to("meta"), k.to("meta"), v.to("meta")).device.type, "meta", "the device of the result")
