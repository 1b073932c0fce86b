"""Hidden cases for lesson 04: other sizes and scores than students can see."""

import math

import torch

from makemoe.checks import check, close, same, same_gradients
from makemoe.checks.gating import entropy_by_loop, fewest, follows, gates_by_loop, switch_by_loop


def without_values(call, *arguments):
    "What `call` returns for tensors that have a shape, but no values and no memory; None if it needs to see values."
    try:
        return call(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
    except (RuntimeError, NotImplementedError) as error:  # a loop over tokens is a right answer, too
        if any(reason in str(error) for reason in ("on meta tensors", "data-independent", "no data")):
            return None
        raise AssertionError(f"a tensor is made on another device than that of the logits: {error}") from error


def on_its_device(gating, *arguments):
    "Assert that what `gating` returns lies on the device of the logits."
    routing = without_values(gating, *arguments)
    for field in ("gates", "chosen", "kept") if routing else ():
        same(getattr(routing, field).device.type, "meta", f"the device of {field}")


@check
def check_routing(Routing):
    chosen = torch.eye(6, dtype=torch.bool)[:2].repeat(300, 1).view(2, 3, 100, 6)  # four of six experts are idle
    kept = chosen.clone()
    kept[1, 2] = False
    routing = Routing(0.0 * chosen, 0.0 * chosen, chosen, kept)
    yield "600 tokens in four dimensions"
    same(routing.load.tolist(), [250, 250, 0, 0, 0, 0], "load")
    same(Routing(0.0 * chosen, 0.0 * chosen, chosen, chosen).load.tolist(), [300, 300, 0, 0, 0, 0], "load")
    close(routing.dropped, 1 / 6, "dropped")
    close(routing.entropy, math.log(6), "entropy of an undecided router")
    yield "tokens with different numbers of choices"
    uneven = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    some = uneven & torch.tensor([False, True, True])
    close(Routing(uneven / 2, torch.zeros(2, 3), uneven, some).dropped, 0.5, "dropped")
    logits = torch.tensor([[-1.0, 3.0, 0.0], [0.0, 0.0, -9.0]])
    close(Routing(uneven / 2, logits, uneven, uneven).entropy, entropy_by_loop(logits), "entropy")


@check
def check_top_k_gating(top_k_gating):
    yield "large scores do not overflow"
    logits = 1e4 * torch.randn(7, 9)
    close(top_k_gating(logits, 4).gates, gates_by_loop(logits, 4), "gates")
    yield "the smallest difference decides"
    near = (1 + 2**-23 * torch.arange(8)).repeat(20, 1)
    same(top_k_gating(near, 2).chosen.tolist(), [[False] * 6 + [True] * 2] * 20, "chosen")
    yield "tokens of very different size, float64"
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    lowered = logits - 1e6 * torch.arange(5)[:, None]
    close(top_k_gating(lowered, 3).gates, gates_by_loop(logits, 3), "gates of logits lowered by 1e6 t")
    same_gradients(top_k_gating(logits, 3).gates, gates_by_loop(logits, 3), {"logits": logits}, "gates")
    yield "a single token, a single expert, no token"
    close(top_k_gating(near[0], 2).gates, gates_by_loop(near[:1], 2)[0], "gates of logits (E,)")
    close(top_k_gating(torch.randn(3, 1), 1).gates, torch.ones(3, 1), "gates of one expert")
    same(top_k_gating(torch.zeros(0, 4), 2).gates.shape, torch.Size([0, 4]), "the shape of no tokens")
    yield "it works on the device of the logits"
    on_its_device(top_k_gating, logits.detach(), 2)


@check
def check_topk_router(TopkRouter):
    router, x = TopkRouter(16, 9, top_k=4), torch.randn(3, 4, 16)
    yield "nine experts"
    logits = x @ router.linear.weight.T + router.linear.bias
    follows(router(x), router(x).logits, gates_by_loop(logits.view(12, 9), 4).view(3, 4, 9))
    yield "with k = E all experts are chosen"
    close(TopkRouter(4, 3, 3)(x[..., :4]).gates.sum(dim=-1), torch.ones(3, 4), "the sum of the gates")
    yield "calls leave nothing behind"
    same(sorted(router.state_dict()), ["linear.bias", "linear.weight"], "names in the state_dict")


@check
def check_switch_gating(switch_gating):
    yield "nine experts, large and small scores"
    for scale in 1e-3, 1.0, 30.0:
        logits = scale * torch.randn(40, 9)
        follows(switch_gating(logits), logits, switch_by_loop(logits))
    yield "the same again"
    same(switch_gating(logits).gates, switch_gating(logits).gates, "gates of a second call")
    yield "it works on the device of the logits"
    on_its_device(switch_gating, logits)


@check
def check_top_p_gating(top_p_gating):
    logits = 3 * torch.randn(30, 9)
    yield "nine experts"
    for p in 0.05, 0.75, 0.97:
        found = [chosen.nonzero().flatten().tolist() for chosen in top_p_gating(logits, p).chosen]
        same(found, [fewest(row, p) for row in logits], f"chosen for p = {p}")
    yield "it works on the device of the logits"
    on_its_device(top_p_gating, logits, 0.5)
