"""How fast is a step, a layer, a character; and what do more experts cost?

    python -m benchmarks.speed [--out FOLDER] [--device cuda] [--sections abcd]

writes FOLDER/speed-DEVICE.json. In each section all contenders take turns; ms and ratios are medians and quartiles.

    a  a training step of `MoEConfig.blog()` against the article's algorithm written plainly
    b  one mixture, forward and backward, against st-moe-pytorch and the Mixtral block of Hugging Face
    c  generation, with a cache, against running the model again for every character
    d  a training step with 8, 16, 32 and 64 experts
"""

import warnings
from pathlib import Path

import torch
import tyro

from benchmarks.plain import PlainModel, plain_step
from benchmarks.timing import TrainingStep, alternate, autocast, compare, describe, load, machine, peak_memory, save
from makemoe.capacity import CapacityRouter
from makemoe.data import CharTokenizer, load_text
from makemoe.dropless import GroupedExperts
from makemoe.gating import TopkRouter
from makemoe.generation import next_token_probs, stream
from makemoe.lab import seed_everything
from makemoe.model import MoEConfig, SparseMoELanguageModel, count_parameters
from makemoe.sparse_moe import Experts, SparseMoE
from makemoe.training import TrainConfig


# a: a training step

def plain_contender(config, ids, batch_size, device):
    "One step of the article's training, as a function."
    model = PlainModel(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step():
        with autocast(device):
            return plain_step(model, optimizer, ids, batch_size)

    return step


def training_step(device, ids, rounds=30):
    config = MoEConfig.blog()
    ours = TrainingStep(SparseMoELanguageModel(config), ids, TrainConfig.blog(), device)
    contenders = {"ours": ours, "the article's algorithm, plainly": plain_contender(config, ids, 16, device)}
    found = compare(alternate(contenders, rounds, device=device), "ours")
    if device == "cuda":
        found["ours"]["synchronisations"] = synchronisations(ours)
    return [dict(section="a", case="16 x 32 characters", name=name, **facts) for name, facts in found.items()]


def synchronisations(step):
    "How often the CPU waits for the GPU in a step, as PyTorch sees it; the batch is on the GPU already."
    x, y = step.batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step.update(x, y)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


# b: one mixture, and that of others

def our_layer(C, H, E, k, capacity_factor=None):
    "`SparseMoE` with two matrices an expert, dropless or with seats."
    router = TopkRouter(C, E, k)
    torch.nn.init.zeros_(router.linear.bias)  # the others have none
    router = router if capacity_factor is None else CapacityRouter(router, capacity_factor)
    return SparseMoE(router, GroupedExperts(E, C, H, "squared_relu", bias=False, top_k=k))


def mixtral_layer(C, H, E, k, implementation):
    "The sparse block of Mixtral, with three matrices an expert, of width 2/3 H: as many multiplications as ours."
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=C, intermediate_size=2 * H // 3, num_local_experts=E, num_experts_per_tok=k,
                           experts_implementation=implementation)
    layer = MixtralSparseMoeBlock(config)
    for weight in layer.parameters():  # it comes without numbers
        torch.nn.init.normal_(weight, std=0.02)
    return layer


def st_moe_layer(C, H, E, k, **settings):
    "The mixture of st-moe-pytorch; an expert has three matrices of width 2/3 H, and biases."
    from st_moe_pytorch import MoE

    return MoE(C, num_experts=E, gating_top_n=k, expert_hidden_mult=H / C, **settings)


PEERS = {
    "ours": (our_layer, {}),
    "ours, as few seats as st-moe-pytorch": (our_layer, dict(capacity_factor=1.25 / 2)),  # of T tokens, not of k T
    "Mixtral, eager": (mixtral_layer, dict(implementation="eager")),
    "Mixtral, batched_mm": (mixtral_layer, dict(implementation="batched_mm")),
    "Mixtral, grouped_mm": (mixtral_layer, dict(implementation="grouped_mm")),
    "st-moe-pytorch, as many seats as ours": (st_moe_layer, dict(capacity_factor_train=2.0, threshold_train=0.0)),
    "st-moe-pytorch, its defaults": (st_moe_layer, {}),
}
NOTES = {
    "ours, as few seats as st-moe-pytorch": "drops as the last one does",
    "Mixtral, batched_mm": "copies an expert's weights for every token that visits it",
    "st-moe-pytorch, as many seats as ours": "pads, drops who finds no seat; two losses on top",
    "st-moe-pytorch, its defaults": "pads, drops more, at random too: less work for the experts; two losses on top",
}


def same_router(layer, weight):
    "Let `layer` route by the matrix `weight` (E, C), as all others do."
    gate = getattr(layer, "gate", None)
    router = getattr(layer, "router", None)
    theirs = getattr(router, "router", router).linear if gate is None else getattr(gate, "to_gates", gate)
    with torch.no_grad():
        theirs.weight.copy_(weight)
    return layer


def carried(name, layer, x, k):
    "Share of the choices of x (B, T, C) that are carried out. Mixtral never drops."
    with torch.no_grad():
        if name.startswith("ours"):
            return 1 - layer.router(x).dropped.item()
        if name.startswith("Mixtral"):
            return 1.0
        dispatch, *_ = layer.gate(x)  # (B, T, E, seats)
    return (dispatch.count_nonzero() / (k * x.shape[0] * x.shape[1])).item()


def multiplications(name, layer, T, C, H, E, k):
    "Multiplications of one token on its way forward, whoever is dropped."
    if not name.startswith("st-moe"):
        return C * E + k * 2 * C * H
    seats = max(min(T, int(T * layer.gate.capacity_factor_train / E)), 4)
    carrying = 2 * E * seats * C  # of rows to seats and back, by einsum
    return C * E + E * seats * 2 * C * H // T + carrying


class LayerStep:
    "Forward and backward of one layer on tokens x (B, T, C), from a random gradient."

    def __init__(self, layer, x, device):
        self.layer, self.device = layer, device
        self.x, self.gradient = x.clone().requires_grad_(), torch.randn_like(x)

    def __call__(self):
        self.layer.zero_grad()
        self.x.grad = None
        with autocast(self.device):
            y = self.layer(self.x)
        y = y if torch.is_tensor(y) else y[0]
        y.backward(self.gradient.to(y.dtype))


def layer_rows(device, B, T, C=128, H=768, E=8, k=2, rounds=30, most_copied=2e9):
    "Section b for B sequences of T tokens. A peer that cannot run is reported, not hidden."
    seed_everything(1337)
    x, router = torch.randn(B, T, C, device=device), torch.randn(E, C) * 0.02
    contenders, facts, absent = {}, {}, {}
    for name, (build, settings) in PEERS.items():
        copied = B * T * k * 2 * C * H * 4  # bytes
        if "batched" in name and copied > most_copied:
            absent[name] = f"not run: would copy {copied / 1e9:.1f} GB of weights"
            continue
        try:
            layer = same_router(build(C, H, E, k, **settings), router).to(device)
            tokens = x
            if device == "cuda" and "Mixtral" in name:  # as it is used: its products do not follow autocast
                layer, tokens = layer.bfloat16(), x.bfloat16()
            step = LayerStep(layer, tokens, device)
            step()
        except (ImportError, RuntimeError, NotImplementedError) as error:
            absent[name] = f"not run: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
            continue
        contenders[name] = step
        facts[name] = dict(multiplications=multiplications(name, layer, T, C, H, E, k),
                           carried=carried(name, layer, x, k))
    slow = contenders.pop("Mixtral, batched_mm", None)
    found = compare(alternate(contenders, rounds, device=device), "ours")
    if slow:  # by itself: it takes so long, and so much memory, that it would disturb the others
        pair = {"ours": contenders["ours"], "Mixtral, batched_mm": slow}
        beside = compare(alternate(pair, 5, warmup=1, device=device), "ours")
        found["Mixtral, batched_mm"] = beside["Mixtral, batched_mm"]
    case = f"{B} x {T} tokens"
    rows = [dict(section="b", case=case, name=name, note=NOTES.get(name, ""), **facts[name], **found[name])
            for name in found]
    return rows + [dict(section="b", case=case, name=name, note=note) for name, note in absent.items()]


def layers(device):
    if device == "cuda":
        return layer_rows(device, 64, 256, C=384)
    return layer_rows(device, 16, 32) + layer_rows(device, 64, 64)


# c: generation

@torch.no_grad()
def rerun(model, ids):
    "The next tokens (B, 1) after ids (B, T), as in the article: all of the context is read again."
    window = ids[:, -model.config.block_size:]
    return torch.multinomial(next_token_probs(model(window).logits[:, -1]), 1)


def generation(device, preset, batch_size, rounds=3):
    """Tokens per second in the long run, where the context is full.

    One turn with the cache is what `stream` repeats then: read half a block again, and go on token by token until the
    block is full. So it sees between half a block and a whole one, where running again always sees a whole one.
    """
    config = getattr(MoEConfig, preset)(block_size=256)
    model = SparseMoELanguageModel(config).to(device).eval()
    ids = torch.randint(config.vocab_size, (batch_size, config.block_size), device=device)
    endless = stream(model, ids, 10**9)
    next(endless)  # has now read the prompt, and the block is full
    turn, again = config.block_size // 2 + 1, 1 if batch_size > 1 else 8

    def cached():
        with autocast(device):
            for _ in range(turn):
                next(endless)

    def uncached():
        with autocast(device):
            for _ in range(again):
                rerun(model, ids)

    seconds = alternate({"ours": cached, "running again": uncached}, rounds, warmup=1, device=device)
    tokens = {"ours": turn, "running again": again}
    per_token = {name: [s / tokens[name] for s in each] for name, each in seconds.items()}
    found = compare(per_token, "ours")
    case = f"{preset} preset, 256 tokens of context, batch {batch_size}"
    return [dict(section="c", case=case, name=name, tokens_per_second=1e3 * batch_size / facts["ms"][1], **facts)
            for name, facts in found.items()]


def generations(device, ids):
    cases = [("gpu", 1), ("gpu", 64)] if device == "cuda" else [("laptop", 1), ("laptop", 64), ("gpu", 1)]
    return [row for case in cases for row in generation(device, *case)]


# d: more experts

class LayerTraining(LayerStep):
    "The same with AdamW."

    def __init__(self, layer, x, device):
        super().__init__(layer, x, device)
        self.optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-5, fused=True)

    def __call__(self):
        super().__call__()
        self.optimizer.step()


def expert_layers(device, experts=(8, 16, 32, 64), C=128, H=512, k=2, tokens=4096, rounds=15):
    seed_everything(1337)
    x = torch.randn(1, tokens, C, device=device)
    contenders = {}
    for E in experts:
        kinds = {"grouped": GroupedExperts(E, C, H, "squared_relu", bias=False, top_k=k),
                 "loop": Experts(E, C, H, "squared_relu", bias=False)}
        for kind, module in kinds.items():
            layer = SparseMoE(TopkRouter(C, E, k), module).to(device)
            contenders[f"{E} experts, {kind}"] = LayerTraining(layer, x, device)
    base = f"{experts[0]} experts, grouped"
    found = compare(alternate(contenders, rounds, device=device), base)
    return [dict(section="d", case=f"one layer, {tokens:,} tokens", name=name, experts=int(name.split()[0]),
                 parameters=sum(weight.numel() for weight in contenders[name].layer.parameters()), **facts)
            for name, facts in found.items()]


def expert_models(device, ids, batch_size, experts=(8, 16, 32, 64), rounds=9):
    "A whole step of training of the laptop preset with ever more experts, and the memory that it needs."
    def step(E):
        recipe = TrainConfig.laptop(batch_size=batch_size)
        return TrainingStep(SparseMoELanguageModel(MoEConfig.laptop(num_experts=E)), ids, recipe, device)

    memory, sizes = {}, {}
    for E in experts:  # one at a time: on a GPU what others hold would count
        alone = step(E)
        memory[E], sizes[E] = peak_memory(alone), count_parameters(alone.model)
        del alone
    contenders = {E: step(E) for E in experts}
    found = compare(alternate(contenders, rounds, device=device), experts[0])
    case = f"laptop preset, {batch_size * MoEConfig.laptop().block_size:,} tokens"
    return [dict(section="d", case=case, name=f"{E} experts", experts=E, parameters=sizes[E][0], active=sizes[E][1],
                 memory=memory[E], memory_ratio=memory[E] / memory[experts[0]], **facts) for E, facts in found.items()]


def more_experts(device, ids):
    batches = [64, 256] if device == "cuda" else [64, 128]
    return expert_layers(device) + [row for batch_size in batches for row in expert_models(device, ids, batch_size)]


def main(out: Path = Path("runs/bench"), device: str = "cpu", sections: str = "abcd"):
    """Measure steps, layers, generation and the cost of experts; the results go to OUT/speed-DEVICE.json.

    Args:
        out: folder for the results.
        device: cpu or cuda.
        sections: which of a, b, c, d; the others keep the numbers that are there.
    """
    text = load_text()
    ids = CharTokenizer(text).encode(text)
    work = {"a": lambda: training_step(device, ids), "b": lambda: layers(device), "c": lambda: generations(device, ids),
            "d": lambda: more_experts(device, ids)}
    path = out / f"speed-{device}.json"
    rows = [row for row in (load(path) or {"rows": []})["rows"] if row["section"] not in sections]
    print(describe(machine(device)), flush=True)
    for section in sections:
        seed_everything(1337)
        rows += work[section]()
        save(path, dict(machine=machine(device), rows=sorted(rows, key=lambda row: row["section"])))
        print(f"section {section} is done", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
