"""Hidden cases for lesson 15."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save

from makemoe.checks import check, same


@check
def check_read_header(read_header):
    yield "a header of more than 65,536 bytes"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "many"
        path.write_bytes(save({f"layers.{i}.weight": torch.zeros(1) for i in range(1000)}, metadata={"n": "1000"}))
        header, metadata = read_header(path)
    same(len(header), 1000, "the number of tensors")
    same(metadata, {"n": "1000"}, "the metadata")


@check
def check_checksum(checksum):
    yield "whole numbers and truth values, and tensors that are not contiguous"
    x = torch.arange(6).view(2, 3)
    assert checksum("", {"x": x.T.contiguous()}) != checksum("", {"x": x}), "another order has the same checksum"
    assert checksum("", {"x": x > 2}) != checksum("", {"x": x > 3}), "other truth values have the same checksum"
