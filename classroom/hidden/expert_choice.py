"""Hidden cases for lesson 24: other sizes, extreme scores, other devices."""

import torch

from classroom.hidden.gating import on_its_device
from makemoe.checks import check, close, same
from makemoe.checks.expert_choice import Peeking, follows, prefix_losses_by_loop, running_by_loop, taken


@check
def check_expert_choice_gating(expert_choice_gating):
    yield "sixteen experts, 50 tokens"
    logits = 2 * torch.randn(2, 50, 16)
    for capacity in 1, 17, 49:
        follows(expert_choice_gating(logits, capacity), logits, *taken(logits, capacity))
    yield "extreme scores, a single expert, a single token, no token"
    for some, capacity in (1e4 * logits, 5), (logits[..., :1], 7), (logits[:, :1], 1), (torch.zeros(2, 6, 3), 4):
        follows(expert_choice_gating(some, capacity), some, *taken(some, capacity))
    same(expert_choice_gating(torch.zeros(2, 0, 3), 0).gates.shape, torch.Size([2, 0, 3]), "the shape of no tokens")
    yield "float64, and the device of the logits"
    follows(expert_choice_gating(logits.double(), 9), logits.double(), *taken(logits.double(), 9))
    on_its_device(expert_choice_gating, logits, 9)


@check
def check_expert_choice_router(ExpertChoiceRouter):
    yield "six experts, k = 5, 22 tokens: 18 for each"
    router, x = ExpertChoiceRouter(8, 6, top_k=5), torch.randn(3, 22, 8)
    found = router(x)
    logits = x @ router.linear.weight.T + router.linear.bias
    close(found.logits, logits, "logits")
    follows(found, found.logits, *taken(logits, 18))
    yield "no token at all, and nothing left behind"
    same(router(x[:, :0]).gates.shape, torch.Size([3, 0, 6]), "the shape of the gates of no tokens")
    same(sorted(router.state_dict()), ["linear.bias", "linear.weight"], "names in the state_dict")


@check
def check_prefix_losses(prefix_losses):
    yield "nine characters, twelve positions"
    model, ids, targets = Peeking(9), torch.randint(9, (2, 12)), torch.randint(9, (2, 12))
    close(prefix_losses(model, ids, targets), prefix_losses_by_loop(model, ids, targets), "losses")


@check
def check_running_choice(running_choice):
    yield "seven experts, 30 tokens, extreme scores"
    logits = torch.randn(2, 30, 7)
    for some, k in (logits, 3), (1e4 * logits, 2), (logits, 7):
        follows(running_choice(some, k), some, some.softmax(dim=-1), running_by_loop(some, k))
    yield "it works on the device of the logits"
    on_its_device(running_choice, logits, 2)
