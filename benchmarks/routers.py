"""Every router in the same model: loss per step and per second, imbalance, dropped choices, causality, gradient.

    python -m benchmarks.routers [--out FOLDER] [--device cuda]

Writes routers-DEVICE.json after every run and goes on from there. As in `benchmarks.race`, losses depend on the seed
alone and seconds are measured apart, in turns, so run that part on an idle machine.
"""

from dataclasses import asdict, replace
from pathlib import Path

import torch
import tyro

from benchmarks.race import SEEDS, kept, open_results, say, text_for_race
from benchmarks.timing import TrainingStep, alternate, compare, save
from makemoe import bias_balancing, expert_choice, second_expert, smooth_choice, switch  # noqa: F401  they add routers
from makemoe.data import get_batch
from makemoe.lab import seed_everything
from makemoe.losses import imbalance
from makemoe.model import MoEConfig, SparseMoELanguageModel
from makemoe.training import TrainConfig, estimate_loss, train

CONTENDERS = {  # name: what differs from the laptop preset
    "top-2": dict(),
    "top-2, no balance loss": dict(balance_coef=0.0),
    "noisy top-2": dict(router="noisy"),
    "Switch, top-1": dict(router="switch", top_k=1, routed_scaling_factor=1.0),
    "Switch, top-1, capacity 1.25": dict(router="switch", top_k=1, routed_scaling_factor=1.0, capacity_factor=1.25),
    "softmax over all, top-2": dict(router="switch"),
    "threshold 0.2": dict(router="threshold"),
    "expert choice": dict(router="expert_choice"),
    "coordinate descent": dict(router="coordinate"),
    "bias balancing": dict(router="bias_balanced", balance_coef=0.0),
    "hash": dict(router="hash", balance_coef=0.0),
    "frozen random": dict(router="frozen", balance_coef=0.0),
}


def sees_the_future(model, ids):
    "Do earlier logits move when later tokens of ids (B, T) change?"
    changed, half = ids.clone(), ids.shape[1] // 2
    changed[:, half:] = (changed[:, half:] + 1) % model.config.vocab_size
    with torch.no_grad():
        before, after = (model(each).logits[:, :half] for each in (ids, changed))
    return (before - after).abs().max().item() > 1e-4


def router_learns(model, x, y):
    "Does the loss of the next token, without any balance loss, move a weight of a router?"
    model.zero_grad()
    model(x, y).lm_loss.backward()
    weights = [weight for block in model.blocks for weight in block.moe.router.parameters()]
    return any(weight.grad is not None and weight.grad.abs().max().item() > 1e-9 for weight in weights)


@torch.no_grad()
def loss_as_a_writer(model, ids, contexts=64):
    "Mean loss where each token is predicted from those before it alone, as in generation, on some contexts."
    T = model.config.block_size
    starts = torch.arange(contexts) * ((len(ids) - 1) // T // contexts) * T
    windows = ids[starts[:, None] + torch.arange(T + 1)]  # (contexts, T + 1)
    losses = []
    for t in range(1, T + 1):
        log_probs = model(windows[:, :t]).logits[:, -1].log_softmax(dim=-1)
        losses.append(-log_probs.gather(1, windows[:, t, None]).mean().item())
    return sum(losses) / T


def main(
    out: Path = Path("runs/bench"),
    device: str = "cpu",
    seeds: tuple[int, ...] = SEEDS,
    text: str = "shakespeare",
    model: MoEConfig = MoEConfig.laptop(),
    recipe: TrainConfig = TrainConfig.laptop(steps=300, warmup=50, eval_blocks=512),
):
    """Train the same model with every router.

    Args:
        out: folder for the results.
        device: cpu or cuda.
        seeds: one run each.
        text: 'shakespeare', 'tinyshakespeare' or the path of a text file.
        model: what the contenders change.
        recipe: the training of all of them.
    """
    train_ids, val_ids, vocab_size = text_for_race(text)
    model = replace(model, vocab_size=vocab_size)
    contenders = {name: replace(model, **changes) for name, changes in CONTENDERS.items()}
    settings = dict(text=text, recipe=asdict(recipe), models={name: asdict(c) for name, c in contenders.items()})
    path = out / f"routers-{device}.json"
    results = open_results(path, settings, device)

    def build(name, seed):
        seed_everything(seed)
        return SparseMoELanguageModel(contenders[name]).to(device)

    if "step" not in results:
        steps = {name: TrainingStep(build(name, recipe.seed), train_ids, recipe, device) for name in contenders}
        results["step"] = compare(alternate(steps, 15, device=device), next(iter(contenders)))
        save(path, results)
    done = {(run["name"], run["seed"]) for run in results["runs"]}
    for seed in seeds:
        for name in contenders:
            if (name, seed) in done:
                continue
            contender = build(name, seed)
            history = train(contender, train_ids, val_ids, replace(recipe, seed=seed), on_eval=say(f"{name}, {seed}"))
            final, load = estimate_loss(contender, val_ids)
            batch = get_batch(val_ids, 8, model.block_size, torch.Generator().manual_seed(0))
            x, y = (part.to(device) for part in batch)
            run = dict(name=name, seed=seed, final=final, imbalance=imbalance(load), dropped=history[-1]["dropped"])
            run |= dict(sees_the_future=sees_the_future(contender, x), router_learns=router_learns(contender, x, y))
            run |= dict(as_a_writer=loss_as_a_writer(contender, val_ids.to(device)), history=kept(history))
            results["runs"].append(run)
            save(path, results)



if __name__ == "__main__":
    tyro.cli(main)
