"""What an answer must satisfy. Lessons call these checks, so do the tests of the package, and so does grading.

There is one module for each lesson and one function for each exercise. A check is a generator that yields each claim
before the assertions that prove it:

    @check
    def check_double(double):
        yield "twice three is six"
        same(double(3), 6, "double(3)")

`check_double(double)` then prints `double: 1 check`, or it raises an AssertionError that names the claim and says how
far off the answer was. A check draws its own random numbers and leaves those of the caller as they were.
"""

import functools
import random
from contextlib import contextmanager

import torch


def check(claims):
    "Turn a generator of claims into a check that can be called. `claims` is named `check_` and then the exercise."
    name = claims.__name__.removeprefix("check_")

    @functools.wraps(claims)
    def run(*answers):
        count, claim = 0, "it can be used"
        try:
            with undisturbed():
                for count, claim in enumerate(claims(*answers), start=1):
                    pass
        except NotImplementedError:
            raise NotImplementedError(f"{name} is not written yet") from None
        except AssertionError as error:
            raise AssertionError(f"{name}: {claim}: {error}") from None
        except Exception as error:  # the answer itself failed: its own traceback stands above this message
            raise AssertionError(f"{name}: {claim}: {type(error).__name__}: {error}") from error
        print(f"{name}: {count} check{'s' * (count != 1)}")

    return run


def global_settings():
    "What code can change for everybody that runs after it in the same process."
    return {
        "whether gradients are computed": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "the default type": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
    }


@contextmanager
def undisturbed():
    "Random numbers from a fixed seed, afterwards the caller's again. PyTorch's settings must stay as they are."
    numbers = random.getstate()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        before = global_settings()
        random.seed(1337)
        torch.manual_seed(1337)
        try:
            yield
            after = global_settings()
        finally:
            random.setstate(numbers)
            torch.set_autocast_enabled("cpu", before["autocast"])
            torch.set_default_dtype(before["the default type"])
            torch.set_num_threads(before["the number of threads"])
    changed = [what for what in before if after[what] != before[what]]
    assert not changed, f"the answer changes {', '.join(changed)} for all code that runs after it"


def close(got, want, what="the answer", rtol=1e-5, atol=1e-6):
    """Assert that `got` is a number or tensor equal to `want` within |got - want| <= atol + rtol * |want|.

    Tensors must also have the same type of number, shape and device. The message says where the difference is largest.
    """
    if not isinstance(want, torch.Tensor):
        assert isinstance(got, (int, float)) or isinstance(got, torch.Tensor) and got.numel() == 1, (
            f"{what}: {short(got)}, but should be a number"
        )
        got, want = (torch.as_tensor(number).detach().double().reshape(()) for number in (got, want))
    assert type(got) in (torch.Tensor, torch.nn.Parameter), f"{what}: {short(got)}, but should be a tensor"
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, but should be {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{what}: {got.dtype}, but should be {want.dtype}"
    assert got.device == want.device, f"{what}: on {got.device}, but should be on {want.device}"
    got, want = got.detach(), want.detach()
    wrong = ~torch.isclose(got, want, rtol=rtol, atol=atol, equal_nan=True)
    if wrong.any():
        off = (got.double() - want.double()).abs().nan_to_num(torch.inf).where(wrong, 0.0)
        place = [index.item() for index in torch.unravel_index(off.argmax(), off.shape)] if off.dim() else []
        where = f" at {place}" if place else ""
        assert False, f"{what}: {got[tuple(place)].item():.6g}{where}, but should be {want[tuple(place)].item():.6g}"


def same(got, want, what="the answer"):
    "Assert that `got` and `want` are equal to the last bit and of the same type; tensors also in shape and device."
    if isinstance(want, torch.Tensor):
        close(got, want, what, rtol=0, atol=0)
    else:
        assert type(got) is type(want) and got == want, f"{what}: {short(got)}, but should be {short(want)}"


def same_gradients(got, want, sources, what="the answer", rtol=1e-4, atol=1e-6):
    "Assert that two tensors that were computed from the tensors in the dict `sources` have the same gradients there."
    assert got.requires_grad, f"no gradient reaches {', '.join(sources)} from {what}"
    direction = torch.randn_like(want)
    pairs = [
        torch.autograd.grad((y * direction).sum(), list(sources.values()), retain_graph=True, allow_unused=True)
        for y in (got, want)
    ]
    for name, ours, theirs in zip(sources, *pairs):
        zeros = torch.zeros_like(sources[name])
        ours, theirs = (zeros if gradient is None else gradient for gradient in (ours, theirs))
        close(ours, theirs, f"the gradient of {what} with respect to {name}", rtol, atol)


def refuses(error, call, *words):
    "Assert that `call()` raises `error` with a message of one line in which all `words` occur."
    try:
        call()
    except error as problem:
        message = str(problem)
    else:
        assert False, f"a {error.__name__} should be raised that mentions {', '.join(map(str, words)) or 'the reason'}"
    assert "\n" not in message, f"the error message has more than one line: {message!r}"
    missing = [word for word in map(str, words) if word not in message]
    assert not missing, f"the message {message!r} should mention {', '.join(missing)}"


@contextmanager
def unchanged(**tensors):
    "Assert that what runs inside leaves these tensors as they are: `with unchanged(x=x): answer(x)`."
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    yield
    for name, tensor in tensors.items():
        same(tensor.detach(), before[name], f"{name}, which the answer may not change in place,")


def short(value):
    "A value as `repr` writes it, of a long one the beginning."
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
