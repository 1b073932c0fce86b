"""Checks of lesson 26, soft_moe."""

import copy

import torch

from makemoe.checks import check, close, refuses, same, same_gradients, unchanged


def dispatch_by_loop(logits):
    "Both matrices of logits (T, S), in float64: one slot after another, then one token after another."
    exact = logits.double()
    dispatch = torch.stack([(slot - slot.logsumexp(dim=0)).exp() for slot in exact.T], dim=1)
    combine = torch.stack([(token - token.logsumexp(dim=0)).exp() for token in exact])
    return dispatch.to(logits.dtype), combine.to(logits.dtype)


def soft_by_loop(layer, x):
    "y of one sequence x (T, C) by single products: slot after slot, then token after token (eq. 1 to 3)."
    T, (_, E, P) = len(x), layer.phi.shape
    slots = [(e, layer.phi[:, e, p]) for e in range(E) for p in range(P)]  # (its expert, its column of Phi)
    if layer.normalize:
        cosine = [[x[t] @ phi / (x[t].norm() * phi.norm()) for _, phi in slots] for t in range(T)]
        logits = layer.scale * torch.stack([torch.stack(row) for row in cosine])
    else:
        logits = torch.stack([torch.stack([x[t] @ phi for _, phi in slots]) for t in range(T)])
    dispatch, combine = logits.softmax(dim=0), logits.softmax(dim=1)
    answers = [layer.experts[e](sum(dispatch[t, s] * x[t] for t in range(T))) for s, (e, _) in enumerate(slots)]
    return torch.stack([sum(combine[t, s] * answers[s] for s in range(E * P)) for t in range(T)])


def inputs_of(layer, x):
    "What the experts read, (E, rows, C), and how often each of them ran."
    read = [[] for _ in layer.experts]
    hooks = [
        expert.register_forward_pre_hook(lambda _, args, e=e: read[e].append(args[0].detach()))
        for e, expert in enumerate(layer.experts)
    ]
    layer(x)
    for hook in hooks:
        hook.remove()
    return [torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in batches]) for batches in read]


def sources(layer, x):
    "What a gradient should reach, by name."
    return {"x": x} | dict(layer.named_parameters())


@check
def check_soft_dispatch(soft_dispatch):
    logits = 2 * torch.randn(5, 6, requires_grad=True)  # (T, S)
    yield "the shares of each slot sum to 1 over the tokens, those of each token over the slots"
    with unchanged(logits=logits):
        answer = soft_dispatch(logits)
    assert type(answer) is tuple and len(answer) == 2, "should return (dispatch, combine)"
    dispatch, combine = answer
    close(dispatch.sum(dim=-2), torch.ones(6), "the sum of dispatch over the tokens")
    close(combine.sum(dim=-1), torch.ones(5), "the sum of combine over the slots")
    yield "both are softmaxes of the same matrix"
    want = dispatch_by_loop(logits)
    close(dispatch, want[0], "dispatch")
    close(combine, want[1], "combine")
    yield "the gradient of both reaches the logits"
    same_gradients(dispatch, want[0], {"logits": logits}, "dispatch")
    same_gradients(combine, want[1], {"logits": logits}, "combine")
    yield "a sequence does not depend on the others in its batch, and logits may have any shape (..., T, S)"
    for shape in (1, 5, 6), (3, 5, 6), (2, 2, 4, 3), (3, 1, 1):
        some = torch.randn(shape)
        rows = some.reshape(-1, *shape[-2:])
        for name, got, each in zip(["dispatch", "combine"], soft_dispatch(some), (0, 1)):
            alone = torch.stack([dispatch_by_loop(row)[each] for row in rows]).view(shape)
            close(got, alone, f"{name} of logits of shape {shape}")
    yield "logits of any size, and of any type"
    for dtype, size in (torch.float32, 1e4), (torch.float64, 1.0), (torch.float64, 1e-9):
        some = size * torch.randn(4, 3, dtype=dtype)
        for name, got, wanted in zip(["dispatch", "combine"], soft_dispatch(some), dispatch_by_loop(some)):
            close(got, wanted, f"{name} of {dtype} logits of size {size}")


@check
def check_soft_moe(SoftMoE):
    layer, x = SoftMoE(6, 3, 2, n_hidden=7), torch.randn(4, 6)  # 3 experts with 2 slots each
    layer.scale.data.fill_(3.0)
    x = (x * torch.tensor([[0.5], [1.0], [2.0], [4.0]])).requires_grad_()  # tokens of different lengths
    yield "the logits are scale times the cosine of token and slot, in float32"
    columns = layer.phi.detach().reshape(6, 6)
    cosine = torch.nn.functional.cosine_similarity(x.detach()[:, None], columns.T[None], dim=-1)  # (T, S)
    with unchanged(x=x, **dict(layer.named_parameters())):
        logits = layer.logits(x)
        y = layer(x)
    close(logits, 3 * cosine, "logits", atol=1e-5)
    yield "the slots are averages of the tokens as they came, whatever their length"
    slots = logits.detach().softmax(dim=0).T @ x.detach()  # (S, C)
    for e, rows in enumerate(inputs_of(layer, x)):
        same(len(rows), 2, f"the number of rows that expert {e} reads")
        close(rows, slots[2 * e : 2 * e + 2], f"what expert {e} reads", atol=1e-5)
    yield "y equals that of a loop over tokens and slots, with its gradients, in training and in evaluation"
    want = soft_by_loop(layer, x)
    for mode in True, False:
        y = layer.train(mode)(x)
        close(y, want, f"y, training = {mode},", atol=1e-5)
        same_gradients(y, want, sources(layer, x), f"y, training = {mode},", atol=1e-5)
    yield "without normalize the logits are x times phi"
    plain = SoftMoE(6, 3, 2, n_hidden=7, normalize=False)
    close(plain.logits(x), x.detach() @ plain.phi.detach().reshape(6, 6), "logits", atol=1e-5)
    close(plain(x), soft_by_loop(plain, x), "y", atol=1e-5)
    yield "each sequence of a batch is mixed by itself"
    batch = torch.randn(2, 3, 5, 6)  # (..., T, C)
    rows = torch.stack([soft_by_loop(layer, sequence) for sequence in batch.view(6, 5, 6)])
    close(layer(batch), rows.view_as(batch), "y of a batch", atol=1e-5)
    yield "the logits are float32 also under autocast and for other types, and y has the type of x"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(layer(x).dtype, torch.float32, "the type of y under autocast")
        close(layer.logits(x), 3 * cosine, "logits under autocast", atol=1e-5)
        assert torch.is_autocast_enabled("cpu"), "autocast is off for all code that runs after it"
    for dtype in torch.bfloat16, torch.float64:
        other, low = copy.deepcopy(layer).to(dtype), x.detach().to(dtype)
        same(other(low).dtype, dtype, f"the type of y of {dtype}")
        same(other.logits(low).dtype, torch.float32, f"the type of the logits of {dtype}")
        close(other(low).float(), want, f"y of {dtype}", rtol=0.05, atol=0.08)
    yield "a layer without experts or without slots is refused"
    refuses(ValueError, lambda: SoftMoE(6, 0, 2), 0)
    refuses(ValueError, lambda: SoftMoE(6, 3, 0), 0)


@check
def check_padded_dispatch(padded_dispatch):
    logits, real = torch.randn(3, 5, 4, requires_grad=True), torch.ones(3, 5, dtype=torch.bool)
    real[0, 3:] = real[1, 1:] = real[2, 0] = False
    yield "the real tokens get what they would get without the padding"
    with unchanged(logits=logits, real=real):
        dispatch, combine = padded_dispatch(logits, real)
    for b in range(3):
        alone = dispatch_by_loop(logits[b, real[b]])
        for name, got, want in zip(["dispatch", "combine"], (dispatch, combine), alone):
            close(got[b, real[b]], want, f"{name} of sequence {b}")
    yield "padding has exactly no part in any slot"
    same(dispatch[~real].detach(), torch.zeros(7, 4), "dispatch of the padding")
    yield "everything is finite, the rows of the padding too, and so are the gradients"
    assert combine.isfinite().all(), "combine is not finite"
    (gradient,) = torch.autograd.grad((dispatch * torch.randn(3, 5, 4)).sum() + combine.square().sum(), logits)
    assert gradient.isfinite().all(), "the gradient of the logits is not finite"
    yield "without padding it is the same as without the mask, for any shape and size of logits"
    for shape, size in ((5, 4), 1.0), ((2, 2, 3, 4), 1.0), ((2, 3, 4), 1e5):
        some = size * torch.randn(shape)
        answer = padded_dispatch(some, torch.ones(shape[:-1], dtype=torch.bool))
        for name, got, each in zip(["dispatch", "combine"], answer, (0, 1)):
            alone = torch.stack([dispatch_by_loop(row)[each] for row in some.reshape(-1, *shape[-2:])])
            close(got, alone.view(shape), f"{name} of logits of shape {shape}")
    yield "padding with very large scores has no part either"
    lifted = torch.where(real[..., None], logits - 1e5, 1e5).detach()
    same(padded_dispatch(lifted, real)[0][~real], torch.zeros(7, 4), "dispatch of the padding")
