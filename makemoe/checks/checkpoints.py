"""Checks of lesson 15, checkpoints."""

import json
import math
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save

from makemoe.checks import check, same, unchanged


class Counting:
    "A file that counts the bytes that are read from it."

    count, real = 0, open

    def __init__(self, *arguments, **settings):
        self.file = Counting.real(*arguments, **settings)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def read(self, size=-1):
        content = self.file.read(size)
        Counting.count += len(content)
        return content

    def __getattr__(self, name):
        return getattr(self.file, name)


@check
def check_read_header(read_header):
    tensors = {"w": torch.randn(300, 40), "a.b": torch.ones(5, dtype=torch.long)}
    notes = {"makemoe": json.dumps({"characters": "Größe \u2029"}), "who": "Größe"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        yield "names, types, shapes and places of all tensors, and the metadata apart"
        path.write_bytes(save(tensors, metadata=notes))
        header, metadata = read_header(path)
        same(metadata, notes, "the metadata")
        same(set(header), {"w", "a.b"}, "the names in the header")
        same(header["w"]["shape"], [300, 40], "the shape of w")
        same((header["w"]["dtype"], header["a.b"]["dtype"]), ("F32", "I64"), "the types")
        yield "without metadata an empty dict"
        path.write_bytes(save(tensors))
        same(read_header(str(path))[1], {}, "the metadata")
        yield "the numbers are not read, and the file is closed"
        size = path.stat().st_size
        names = getattr(read_header, "__globals__", {})
        before = names.get("open")
        names["open"], Counting.count = Counting, 0
        try:
            read_header(path)
        finally:
            names.pop("open") if before is None else names.update(open=before)
        assert Counting.count < size / 10, f"{Counting.count} of {size} bytes were read"


@check
def check_checksum(checksum):
    header = '{"note": "é"}'
    tensors = {"w": torch.randn(3, 4), "n": torch.tensor(7), "h": torch.ones(2, dtype=torch.bfloat16)}
    yield "the same for equal content, whatever the order of the names"
    with unchanged(**tensors):
        first = checksum(header, tensors)
    again = dict(reversed([(name, tensor.clone()) for name, tensor in tensors.items()]))
    same(checksum(header, again), first, "the checksum of a copy")
    assert isinstance(first, str) and len(first) >= 16, f"it should be a text of at least 16 characters, got {first!r}"
    yield "another one if any bit, shape, type, name or the header differs"
    w, zeros = tensors["w"], {"w": torch.zeros(4)}
    lowest = w.clone().view(torch.int32)
    lowest[1, 2] ^= 1
    others = {
        "the lowest bit of a weight": (header, tensors | {"w": lowest.view(torch.float32)}),
        "the last weight": (header, tensors | {"w": torch.cat([w.flatten()[:-1], torch.ones(1)]).view(3, 4)}),
        "the order of the numbers": (header, tensors | {"w": w.flatten().flip(0).view(3, 4)}),
        "the shape": (header, tensors | {"w": w.view(4, 3)}),
        "the name": (header, {"v" if name == "w" else name: tensor for name, tensor in tensors.items()}),
        "the names, exchanged": (header, tensors | {"w": tensors["h"], "h": w}),
        "a tensor less": (header, {"w": w}),
        "the header": (header.replace("note", "nota"), tensors),
    }
    for what, content in others.items():
        assert checksum(*content) != first, f"{what} is another one, and the checksum is the same"
    as_int = {"w": torch.zeros(4, dtype=torch.int32)}
    assert checksum("", zeros) != checksum("", as_int), "the type is another one, and the checksum is the same"
    yield "zero and minus zero are other bits, and nan is always the same"
    assert checksum("", zeros) != checksum("", {"w": -torch.zeros(4)}), "0 and -0 have the same checksum"
    nan = {"w": torch.tensor([math.nan])}
    same(checksum("", nan), checksum("", {"w": nan["w"].clone()}), "the checksum of nan")


@check
def check_keep_best(keep_best):
    saved = []
    on_eval = keep_best(lambda: saved.append(step))
    yield "saves what is lower than all before, and then only"
    for step, loss in enumerate([3.0, 2.5, 2.7, 2.5, 2.4, math.nan, 2.45, 2.39]):
        on_eval(dict(step=step, val_loss=loss, train_loss=9 - loss))
    same(saved, [0, 1, 4, 7], "the records that were saved")
    yield "another one begins anew, and may begin below infinity"
    other = []
    for best, expected in (math.inf, [3.0, 2.0]), (2.5, [2.0]):
        other.clear()
        hear = keep_best(lambda: other.append(loss), best) if best < math.inf else keep_best(lambda: other.append(loss))
        for loss in 3.0, 2.0:
            hear(dict(val_loss=loss))
        same(list(other), expected, f"what was saved, from {best} on")
    yield "an error of save comes out, and a record that was not saved does not count"
    broken = [True]

    def save():
        if broken:
            raise OSError("the disk is full")
        saved.append("saved")

    on_eval = keep_best(save)
    try:
        on_eval(dict(val_loss=1.0))
    except OSError:
        broken.clear()
    assert not broken, "the error of save was swallowed"
    on_eval(dict(val_loss=1.5))
    same(saved[-1], "saved", "the next record, as nothing was saved so far,")
