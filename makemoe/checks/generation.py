"""Checks of lesson 12, generation."""

import math

import torch

from makemoe.attention import MultiHeadAttention
from makemoe.checks import check, close, refuses, same, unchanged
from makemoe.model import MoEConfig, SparseMoELanguageModel


def probs_by_lists(logits, temperature=1.0, top_k=None, top_p=None):
    "Probabilities of one row of logits, a list, in Python's double precision: the best first, until a rule says stop."
    best_first = sorted(range(len(logits)), key=lambda i: -logits[i])
    if temperature == 0:
        return [float(i == best_first[0]) for i in range(len(logits))]
    weights = [math.exp((score - max(logits)) / temperature) for score in logits]
    probs, kept, reached = [weight / sum(weights) for weight in weights], [], 0.0
    for i in best_first:
        if len(kept) == top_k or top_p is not None and top_p < 1 and reached >= top_p:
            break
        kept.append(i)
        reached += probs[i]
    return [probs[i] / reached if i in kept else 0.0 for i in range(len(probs))]


def rows_by_lists(logits, **settings):
    "The same for logits (..., V)."
    rows = [probs_by_lists(row, **settings) for row in logits.reshape(-1, logits.shape[-1]).tolist()]
    return torch.tensor(rows).view(logits.shape)


def small_model(block_size=8, **settings):
    "A small model with large weights, so that its logits differ by several units."
    sizes = dict(vocab_size=12, n_embd=16, n_head=2, n_layer=2, num_experts=3, n_hidden=16)
    model = SparseMoELanguageModel(MoEConfig(block_size=block_size, **sizes, **settings))
    for weight in model.parameters():
        weight.data.add_(0.3 * torch.randn_like(weight))
    return model


@torch.no_grad()
def written_slowly(model, ids, num_tokens, seed, **settings):
    "New tokens (B, num_tokens) without a cache: the window is read again for each, its newer half when it is too long."
    size, generator, new = model.config.block_size, torch.Generator().manual_seed(seed), []
    window = ids[:, -size:]
    for _ in range(num_tokens):
        if window.shape[1] == size + 1:
            window = window[:, size + 1 - math.ceil(size / 2) :]
        probs = rows_by_lists(model(window).logits[:, -1], **settings)
        new.append(torch.multinomial(probs, 1, generator=generator))
        window = torch.cat([window, new[-1]], dim=1)
    return torch.cat(new, dim=1)


def tokens_of(pairs):
    "The tokens of a stream side by side, (B, N)."
    return torch.stack([token for token, _ in pairs], dim=1)


def passes(model, work):
    "How many tokens of each text are read in each pass of `model` while `work()` runs."
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda _, words, named: lengths.append((words[0] if words else named["ids"]).shape[1]), with_kwargs=True
    )
    try:
        work()
    finally:
        hook.remove()
    return lengths


@check
def check_next_token_probs(next_token_probs):
    five, many = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0]), 2 * torch.randn(3, 4, 7)
    cases = [{}, dict(temperature=0.5), dict(temperature=3.0)]
    cases += [dict(top_k=k) for k in (1, 2, 5, 9)] + [dict(top_p=p) for p in (0.01, 0.3, 0.6, 0.75, 0.95, 1.0)]
    cases += [dict(temperature=0.7, top_k=3), dict(temperature=0.7, top_p=0.55), dict(temperature=0)]
    yield "temperature, top_k and top_p keep what they should, and what they keep sums to 1"
    for settings in cases:
        with unchanged(logits=five):
            probs = next_token_probs(five, **settings)
        close(probs, rows_by_lists(five, **settings), f"{settings or 'no settings'} on 5 logits")
    yield "each row of (..., V) logits is treated by itself"
    for settings in cases:
        close(
            next_token_probs(many, **settings),
            rows_by_lists(many, **settings),
            f"{settings or 'no settings'} on (3, 4, 7) logits",
        )
    yield "with both top_k and top_p, a token passes both, each on the probabilities after the temperature"
    for k, p, count in (4, 0.95, 4), (6, 0.3, 3):
        got = (next_token_probs(torch.zeros(8), top_k=k, top_p=p) > 0).sum().item()
        same(got, count, f"how many of eight equals pass top_k = {k} and top_p = {p}")
    peaked = torch.tensor([0.55, 0.25, 0.12, 0.08]).log()  # of the first two, 0.55 is 0.69
    close(
        next_token_probs(peaked, top_k=2, top_p=0.6),
        torch.tensor([0.55, 0.25, 0, 0]) / 0.8,
        "top_k = 2 and top_p = 0.6",
    )
    yield "of equal logits, exactly k are kept, and at temperature 0 the first"
    same(
        [(next_token_probs(torch.zeros(6), top_k=k) > 0).sum().item() for k in (1, 4, 9)],
        [1, 4, 6],
        "kept of 6 equals by top_k 1, 4, 9",
    )
    tied = torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, 2.0]])
    for settings in {}, dict(top_k=2), dict(top_p=0.9):
        close(
            next_token_probs(tied, temperature=0, **settings),
            torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
            f"temperature 0, {settings}",
        )
    yield "tokens that reach p exactly need no further one, and top_p = 1 keeps everything"
    halves = torch.tensor([0.125, 0.5, 0.125, 0.25]).log2() * math.log(2)  # sums that are exact in binary
    sizes = [(next_token_probs(halves, top_p=p) > 0).sum().item() for p in (0.5, 0.51, 0.75, 0.875)]
    same(sizes, [1, 2, 2, 3], "kept of 1/2, 1/4, 1/8, 1/8 by top_p 0.5, 0.51, 0.75, 0.875")
    same((next_token_probs(torch.tensor([40.0, 0.0, 0.0]), top_p=1.0) > 0).sum().item(), 3, "kept by top_p = 1")
    yield "extreme numbers: tiny and huge temperatures, large logits, and logits of minus infinity"
    for temperature in 1e-37, 1e-300:
        close(
            next_token_probs(50 * five, temperature),
            torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0]),
            f"temperature {temperature}",
        )
    close(next_token_probs(five, 1e39), torch.full((5,), 0.2), "temperature 1e39")
    close(next_token_probs(1e30 * five), torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0]), "logits of 1e30")
    close(
        next_token_probs(torch.tensor([1.0, -math.inf, 1.0])),
        torch.tensor([0.5, 0.0, 0.5]),
        "a logit of minus infinity",
    )
    yield "half precision is computed in float32"
    close(
        next_token_probs(five.bfloat16(), 0.7),
        rows_by_lists(five.bfloat16().float(), temperature=0.7),
        "bfloat16 logits at 0.7",
    )
    yield "logits that are nan or inf raise ValueError"
    for wrong in math.nan, math.inf:
        refuses(ValueError, lambda: next_token_probs(torch.tensor([[0.0, 1.0], [0.0, wrong]])), "finite")
        refuses(ValueError, lambda: next_token_probs(torch.tensor([0.0, wrong]), temperature=0, top_k=1), "finite")
    yield "settings out of range raise ValueError"
    for name, value in dict(temperature=-1, top_k=0, top_p=0).items():
        refuses(ValueError, lambda: next_token_probs(five, **{name: value}), name, value)
    refuses(ValueError, lambda: next_token_probs(five, top_p=1.5), "top_p", 1.5)


@check
def check_kv_cache(KVCache):
    cache, other, keys, values = KVCache(), KVCache(), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 6)
    yield "append returns all keys and values so far, and keeps them"
    done = 0
    for n in 2, 1, 2:
        new = keys[:, :, done : done + n], values[:, :, done : done + n]
        with unchanged(keys=keys, values=values):
            all_keys, all_values = cache.append(*new)
        done += n
        same(all_keys, keys[:, :, :done], f"the keys returned after {done} tokens")
        same(all_values, values[:, :, :done], f"the values returned after {done} tokens")
        same(cache.keys, keys[:, :, :done], f"cache.keys after {done} tokens")
        same(cache.values, values[:, :, :done], f"cache.values after {done} tokens")
        same(len(cache), done, "len(cache)")
    yield "another cache stays empty, and takes other dtypes and devices"
    same(len(other), 0, "the length of another cache")
    for part in other.append(
        keys[..., :1, :].to("meta", torch.bfloat16), values[..., :1, :].to("meta", torch.bfloat16)
    ):
        same((part.dtype, part.device.type), (torch.bfloat16, "meta"), "dtype and device")
    yield "attention that reads in pieces gives the same as attention that reads at once, gradients too"
    attention, x = MultiHeadAttention(8, 2, rotary=True), torch.randn(2, 7, 8, requires_grad=True)
    cache = KVCache()
    pieces = torch.cat([attention(piece, cache) for piece in x.split([3, 1, 2, 1], dim=1)], dim=1)
    close(pieces, attention(x), "pieces of 3, 1, 2 and 1 tokens", 1e-4, 1e-5)
    ours, whole = (torch.autograd.grad(y.square().sum(), x)[0] for y in (pieces, attention(x)))
    close(ours, whole, "the gradient of x", 1e-3, 1e-5)


@check
def check_stream(stream):
    model, start = small_model(router="noisy", dropout=0.3).train(), torch.randint(12, (2, 5))
    yield "a model in training mode writes as in evaluation mode, and is in training mode afterwards"
    with unchanged(ids=start):
        pairs = list(stream(model, start, 10, seed=3, top_k=6))
    assert all(module.training for module in model.modules()), "some part of the model is not in training mode"
    same(
        (len(pairs), tuple(pairs[0][0].shape), pairs[0][0].dtype),
        (10, (2,), torch.long),
        "pairs, and shape and type of the tokens",
    )
    model.eval()
    yield "the tokens are those that a slow version draws, beyond the context too"
    same(tokens_of(pairs), written_slowly(model, start, 10, seed=3, top_k=6), "10 tokens after 5, with a context of 8")
    assert not model.training, "a model in evaluation mode should be in evaluation mode afterwards"
    yield "with each token come the routings of the tokens just read, one for each layer"
    routings = pairs[0][1]
    same([tuple(layer.gates.shape) for layer in routings], [(2, 5, 3)] * 2, "shapes of the first gates")
    same(
        [tuple(layer.gates.shape) for layer in pairs[1][1]], [(2, 1, 3)] * 2, "shapes of the gates after one more token"
    )
    for ours, right in zip(routings, model(start).routings):
        close(ours.gates, right.gates, "the gates of the prompt")
        assert not ours.gates.requires_grad, "writing should need no gradients"
    yield "each token is read once, and when the context is full, its newer half again"
    same(
        passes(model, lambda: list(stream(model, start, 11))),
        [5, 1, 1, 1, 4, 1, 1, 1, 1, 4, 1],
        "tokens in each pass, context of 8",
    )
    same(passes(model, lambda: next(iter(stream(model, start, 11)))), [5], "tokens read for the first token")
    uneven = small_model(block_size=7)
    same(
        passes(uneven, lambda: list(stream(uneven, start, 9))),
        [5, 1, 1, 4, 1, 1, 1, 4, 1],
        "tokens in each pass, context of 7",
    )
    yield "the same seed gives the same tokens, another seed other tokens, and 0 is a seed like any other"
    for seed in 0, 4:
        same(
            tokens_of(stream(model, start, 4, seed=seed)),
            written_slowly(model, start, 4, seed=seed),
            f"the tokens of seed {seed}",
        )
    yield "with a seed, other random numbers stay what they were; without one, PyTorch's own generator draws"
    state = torch.get_rng_state()
    between = [torch.rand(1).item() for _ in stream(model, start, 3, seed=3)]
    torch.set_rng_state(state)
    same([torch.rand(1).item() for _ in range(3)], between, "random numbers drawn while the stream is read")
    one, two = tokens_of(stream(model, start, 6)), tokens_of(stream(model, start, 6))
    assert not torch.equal(one, two), "without a seed, the second text should differ from the first"
    yield "a prompt may be longer than the context, and temperature 0 takes the likeliest token"
    long = torch.randint(12, (1, 21))
    same(
        tokens_of(stream(model, long, 3, temperature=0)),
        written_slowly(model, long, 3, seed=0, temperature=0),
        "greedy after 21 tokens",
    )
    same(
        tokens_of(stream(model, long, 5, temperature=0.7, top_p=0.6, seed=1)),
        written_slowly(model, long, 5, seed=1, temperature=0.7, top_p=0.6),
        "temperature 0.7 and top_p 0.6",
    )
    yield "closed early or stopped by an error, it leaves the model in its mode; between tokens, gradients are on"
    model.train()
    for _ in stream(model, start, 5):
        assert torch.is_grad_enabled(), "code that reads the stream should still have gradients"
        break
    assert all(module.training for module in model.modules()), (
        "after an early end, all of the model should be in training mode again"
    )
    refuses(ValueError, lambda: list(stream(model, start, 2, temperature=-1)), "temperature")
    assert model.training, "after an error, the model should be in training mode again"
    yield "num_tokens = 0 yields nothing, and wrong arguments raise ValueError"
    same(list(stream(model, start, 0)), [], "a stream of 0 tokens")
    refuses(ValueError, lambda: list(stream(model, start, -1)), "num_tokens", -1)
    refuses(ValueError, lambda: list(stream(model, start[:, :0], 1)), "prompt")
    refuses(ValueError, lambda: list(stream(model, start[0], 1)), "(5,)")
    yield "weights that are not finite raise ValueError"
    model.lm_head.weight.data[0, 0] = math.nan
    refuses(ValueError, lambda: list(stream(model, start, 1)), "finite")


@check
def check_until(until):
    yield "up to and including the first stop, and nothing more is taken"
    characters = iter("to be, or not")
    same(until(characters, "be"), "to be", "until 'be'")
    same("".join(characters), ", or not", "what is left in the stream")
    yield "stop may begin twice, have several characters, be white space, or never come"
    for source, stop, expected in [
        ("aaab!", "aab", "aaab"),
        ("abc", "x", "abc"),
        ("a--b--", "--", "a--"),
        ("a-b--", "--", "a-b--"),
        ("\n a\n\nb", "\n\n", "\n a\n\n"),
        ("", "a", ""),
        ("xyz xy", "xy", "xy"),
    ]:
        same(until(iter(source), stop), expected, f"{source!r} until {stop!r}")


def scores_by_loop(model, ids):
    "What log_probs should return: one pass for each token, in the first window that reaches it."
    size, found = model.config.block_size, []
    for n in range(1, len(ids)):
        start = next(s for s in range(0, len(ids), size // 2) if s + size >= n)
        found.append(model(ids[None, start:n]).logits[0, -1].log_softmax(dim=-1)[ids[n]])
    return torch.stack(found).detach()


@check
def check_log_probs(log_probs):
    model = small_model(router="noisy", dropout=0.3).eval()
    for N in 8, 2, 9, 13, 23:
        yield f"a text of {N} tokens, with a context of 8"
        ids = torch.randint(12, (N,))
        with unchanged(ids=ids):
            got = log_probs(model, ids)
        close(got, scores_by_loop(model, ids), f"{N} tokens", 1e-4, 1e-5)
    assert not model.training, "a model in evaluation mode should be in evaluation mode afterwards"
    yield "a context of 7"
    uneven = small_model(block_size=7).eval()
    close(log_probs(uneven, ids), scores_by_loop(uneven, ids), "23 tokens", 1e-4, 1e-5)
    yield "a model in training mode reads without noise and gradients, and is in training mode afterwards"
    trained = log_probs(model.train(), ids)
    close(trained, got, "23 tokens, from a model in training mode", 1e-4, 1e-5)
    assert not trained.requires_grad, "reading should need no gradients"
    assert all(module.training for module in model.modules()), "all of the model should be in training mode again"
