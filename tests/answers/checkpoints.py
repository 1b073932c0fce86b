"Lesson 15. What goes wrong here: bytes in the wrong order, parts left out of the checksum, state shared."

LENGTH = 'length = int.from_bytes(file.read(8), "little")'
HEADER = "header = json.loads(file.read(length))"
META = 'metadata = header.pop("__metadata__", {})'

LINE = 'digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())'
BITS = "digest.update(tensor.reshape(-1).view(torch.uint8).numpy())"

LOWER = """        if record["val_loss"] < best:
            save()
            best = record["val_loss"]
"""

ANSWERS = {
    "read_header": {
        "right: struct and two dicts": """
def read_header(path):
    import struct

    with Path(path).open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        known = json.loads(file.read(size).decode("utf-8"))
    return {k: v for k, v in known.items() if k != "__metadata__"}, known.get("__metadata__") or {}
""",
        "right: the library, which reads no numbers either": """
def read_header(path):
    names = {torch.float32: "F32", torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16"}
    header = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            part = file.get_slice(name)
            header[name] = dict(dtype=part.get_dtype(), shape=list(part.get_shape()))
        return header, file.metadata() or {}
""",
        "the most important byte first": [('"little"', '"big"')],
        "four bytes of length": [
            ("file.read(8)", "file.read(4)"),
            (HEADER, "file.read(4)\n        header = json.loads(file.read(length % 2**16))"),
        ],
        "one byte of length": [(LENGTH, "length = file.read(8)[0]")],
        "the whole file read": [
            (LENGTH, 'content = file.read()\n        length = int.from_bytes(content[:8], "little")'),
            (HEADER, "header = json.loads(content[8 : 8 + length])"),
        ],
        "the metadata left in": [(META, 'metadata = header.get("__metadata__", {})')],
        "None without metadata": [(META, 'metadata = header.pop("__metadata__", None)')],
        "the pair in the other order": [("return header, metadata", "return metadata, header")],
        "only what is ours": [(META, META + '\n    metadata = {"makemoe": metadata["makemoe"]} if metadata else {}')],
        "latin letters only": [(HEADER, 'header = json.loads(file.read(length).decode("latin-1"))')],
    },
    "checksum": {
        "right: one long text of bytes": """
def checksum(header, tensors):
    parts = [header.encode()]
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        about = repr((name, str(tensor.dtype), tuple(tensor.shape))).encode()
        parts += [about, bytes(tensor.flatten().view(torch.uint8).tolist())]
    return hashlib.sha256(b"\\0".join(parts)).hexdigest()
""",
        "right: a hash of hashes, blake2b": """
def checksum(header, tensors):
    def of(tensor):
        return hashlib.blake2b(tensor.clone().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()

    lines = [f"{name!r}: {tensor.dtype}, {tensor.size()}, {of(tensor)}" for name, tensor in tensors.items()]
    return hashlib.blake2b("\\n".join([header, *sorted(lines)]).encode()).hexdigest()[:32]
""",
        "in the order of the dict": [("sorted(tensors.items())", "tensors.items()")],
        "the header left out": [("hashlib.sha256(header.encode())", "hashlib.sha256()")],
        "names left out": [("{name} {tensor.dtype}", "{tensor.dtype}")],
        "types left out": [("{tensor.dtype} ", "")],
        "shapes left out": [(" {list(tensor.shape)}", "")],
        "names and shapes only": [(BITS, "pass")],
        "the sum of the numbers": [(BITS, "digest.update(str(tensor.double().sum().item()).encode())")],
        "a long tensor as it is printed": [(BITS, "digest.update(str(tensor.flatten()).encode())")],
        "every byte's sum": [(BITS, "digest.update(str(tensor.reshape(-1).view(torch.uint8).sum().item()).encode())")],
        "scalars crash": [("tensor.reshape(-1).view", "tensor.view")],
        "through numpy, which has no bfloat16": [(BITS, "digest.update(tensor.numpy().tobytes())")],
        "Python's hash, another one in each process": """
def checksum(header, tensors):
    return hash((header, *((name, tensor) for name, tensor in sorted(tensors.items()))))
""",
    },
    "keep_best": {
        "right: a list with one number": """
def keep_best(save, best=math.inf):
    lowest = [best]

    def hear(record):
        loss = record["val_loss"]
        if loss < lowest[0]:
            save()
            lowest[0] = loss

    return hear
""",
        "right: a class": """
class Keeper:
    def __init__(self, save, best):
        self.save, self.best = save, best

    def __call__(self, record):
        if not record["val_loss"] < self.best:
            return
        self.save()
        self.best = record["val_loss"]


def keep_best(save, best=math.inf):
    return Keeper(save, best)
""",
        "equal ones as well": [("< best", "<= best")],
        "lower than the one before": [
            (LOWER, '        if record["val_loss"] < best:\n            save()\n        best = record["val_loss"]\n')
        ],
        "the highest": [("< best", "> best"), ("best=math.inf", "best=-math.inf")],
        "the training loss": [("val_loss", "train_loss")],
        "saves every record": [(LOWER, "        save()\n")],
        "never the first": [
            (
                LOWER,
                '        if best == math.inf:\n            best = record["val_loss"]\n'
                '        elif record["val_loss"] < best:\n            save()\n            best = record["val_loss"]\n',
            )
        ],
        "counts before it has saved": [
            (
                LOWER,
                '        if record["val_loss"] < best:\n            best = record["val_loss"]\n            save()\n',
            )
        ],
        "errors of save swallowed": [
            ("            save()\n", "            with suppress(Exception):\n                save()\n")
        ],
        "nan counts as low": [
            (
                LOWER,
                '        if not record["val_loss"] >= best:\n            save()\n'
                '            best = record["val_loss"]\n',
            )
        ],
        "one memory for all": """
LOWEST = {}

def keep_best(save, best=math.inf):
    def on_eval(record):
        if record["val_loss"] < LOWEST.get("best", best):
            save()
            LOWEST["best"] = record["val_loss"]

    return on_eval
""",
    },
}
