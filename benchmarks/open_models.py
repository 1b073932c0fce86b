"""The routing of today's open models in the laptop model: loss after equal steps, imbalance, and the time of a step.

    python -m benchmarks.open_models [--out FOLDER] [--device cuda]

All contenders have as many active weights in a layer's experts: three matrices of 4 x 170 hidden units (the preset has
two of 2 x 512). A shared expert counts as one of the four; Llama 4 has one chosen and one shared expert of twice the
width. Mixtral stands for Qwen3-MoE, which routes alike. Writes open-models-DEVICE.json after every run and goes on from
there, as `benchmarks.routers` does.
"""

from dataclasses import asdict, replace
from pathlib import Path

import tyro

from benchmarks.race import SEEDS, kept, open_results, say, text_for_race
from benchmarks.timing import TrainingStep, alternate, compare, save
from makemoe.lab import seed_everything
from makemoe.losses import imbalance
from makemoe.model import MoEConfig, SparseMoELanguageModel
from makemoe.open_models import OPEN_MODELS, clamped_swiglu, open_layer
from makemoe.training import TrainConfig, estimate_loss, train

CONTENDERS = [name for name in OPEN_MODELS if name != "Qwen3-MoE"]


def open_model(name, config):
    "The model of `config` with the routing of the open model `name`: 16 experts, or 8 for Llama 4."
    settings = OPEN_MODELS[name]
    if settings.groups > 1:  # 8 groups of 32 experts there
        settings = replace(settings, groups=4, groups_kept=2)
    config = replace(config, routed_scaling_factor=1.0, balance_coef=0.0 if settings.bias else config.balance_coef)
    E, k, n_hidden = (8, 1, 340) if name == "Llama 4" else (16, 4 - (settings.shared != "none"), 170)
    activation = clamped_swiglu() if name == "gpt-oss" else "swiglu"
    model = SparseMoELanguageModel(config)
    for block in model.blocks:
        block.moe = open_layer(
            config.n_embd, E, k, n_hidden, settings, activation=activation, bias=name == "gpt-oss", bias_rate=0.01
        )
        block.scale = 1.0 if settings.scale > 1 else 2.0  # those without a scale of their own get the preset's
    model.init_weights()
    return model


def main(
    out: Path = Path("runs/bench"),
    device: str = "cpu",
    seeds: tuple[int, ...] = SEEDS,
    text: str = "shakespeare",
    model: MoEConfig = MoEConfig.laptop(),
    recipe: TrainConfig = TrainConfig.laptop(steps=300, warmup=50, eval_blocks=512),
):
    """Train the laptop model with the routing of each open model.

    Args:
        out: folder for the results.
        device: cpu or cuda.
        seeds: one run each.
        text: 'shakespeare', 'tinyshakespeare' or the path of a text file.
        model: the sizes.
        recipe: the training of all of them.
    """
    train_ids, val_ids, vocab_size = text_for_race(text)
    model = replace(model, vocab_size=vocab_size)
    routing = {name: asdict(OPEN_MODELS[name]) for name in CONTENDERS}
    path = out / f"open-models-{device}.json"
    results = open_results(path, dict(text=text, model=asdict(model), recipe=asdict(recipe), routing=routing), device)

    def build(name, seed):
        seed_everything(seed)
        return open_model(name, model).to(device)

    done = {(run["name"], run["seed"]) for run in results["runs"]}
    for seed in seeds:
        for name in CONTENDERS:
            if (name, seed) in done:
                continue
            contender = build(name, seed)
            history = train(contender, train_ids, val_ids, replace(recipe, seed=seed), on_eval=say(f"{name}, {seed}"))
            final, load = estimate_loss(contender, val_ids)
            run = dict(name=name, seed=seed, final=final, imbalance=imbalance(load), history=kept(history))
            results["runs"].append(run)
            save(path, results)
    if "step" not in results:
        steps = {name: TrainingStep(build(name, recipe.seed), train_ids, recipe, device) for name in CONTENDERS}
        results["step"] = compare(alternate(steps, 15, device=device), CONTENDERS[0])
        save(path, results)


if __name__ == "__main__":
    tyro.cli(main)
