"""Hidden cases for lesson 12: other sizes, settings and seeds than students can see."""

import torch

from makemoe.checks import check, close, same
from makemoe.checks.generation import rows_by_lists, scores_by_loop, small_model, tokens_of, written_slowly


@check
def check_next_token_probs(next_token_probs):
    yield "other sizes and settings"
    logits = 3 * torch.randn(2, 3, 2, 11)
    for settings in dict(temperature=1.3, top_k=4), dict(temperature=0.4, top_p=0.85), dict(temperature=0):
        close(next_token_probs(logits, **settings), rows_by_lists(logits, **settings), f"{settings}", 1e-4)


@check
def check_kv_cache(KVCache):
    yield "keys and values of many tokens, one at a time"
    cache, keys = KVCache(), torch.randn(1, 2, 9, 3)
    for t in range(9):
        got, _ = cache.append(keys[:, :, t : t + 1], keys[:, :, t : t + 1])
    same(got, keys, "the keys of 9 tokens")


@check
def check_stream(stream):
    yield "learned positions, another context and three texts"
    model, ids = small_model(block_size=5, positions="learned").eval(), torch.randint(12, (3, 6))
    same(
        tokens_of(stream(model, ids, 9, temperature=1.2, seed=11)),
        written_slowly(model, ids, 9, seed=11, temperature=1.2),
        "9 tokens",
    )


@check
def check_until(until):
    yield "other texts"
    same(until(iter("Who's there?\n\nNay"), "?\n"), "Who's there?\n", "until '?\\n'")


@check
def check_log_probs(log_probs):
    yield "another context"
    model, ids = small_model(block_size=6).eval(), torch.randint(12, (20,))
    close(log_probs(model, ids), scores_by_loop(model, ids), "20 tokens, with a context of 6", 1e-4, 1e-5)
