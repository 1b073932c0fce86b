"""The model that fills gaps: against a dense twin per step and per second, and what makes its decoder read.

    python -m benchmarks.gaps [--out FOLDER] [--device cuda]

Each run is judged by its own loss, and by the loss with the source of another text (`swapped`): a decoder that does not
read has the same for both. Writes gaps-DEVICE.json after every run and goes on from there. As in `benchmarks.race`,
losses depend on the seed alone and seconds are measured apart, in turns, so run that part on an idle machine.
"""

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import tyro
from torch import nn

from benchmarks.race import ACTIVE, MIXTURE, kept, open_results, say, text_for_race
from benchmarks.timing import TrainingStep, alternate, compare, save
from makemoe.fill_gaps import GapConfig, GapFiller, GapRun, head_start, swapped_loss
from makemoe.lab import seed_everything
from makemoe.model import count_parameters
from makemoe.optimizers import OPTIMIZERS
from makemoe.switch_transformer import SwitchTransformer
from makemoe.training import TrainConfig, TrainState, estimate_loss, train

EQUAL_TIME = f"{ACTIVE}, equal time"
RATES = dict(muon=1e-2, adamw=3e-3)
T5 = dict(rate=0.15, mean_span=3.0)  # the gaps of Raffel et al. 2020
CONTROLS = [  # (optimizer, with the head start, with half of the text hidden): each alone off, and alone on
    [optimizer, start, half] for optimizer in RATES for start in (True, False) for half in (True, False)
]


class DenseFiller(GapFiller):
    "The same, with a dense layer of the size of one expert where a layer had experts."

    def __init__(self, config):
        super().__init__(config)
        dense = replace(config.transformer(), encoder_sparse=(), decoder_sparse=())
        self.transformer = SwitchTransformer(dense)
        head_start(self.transformer)

    def forward(self, ids, targets=None):
        output = super().forward(ids)
        nobody = SimpleNamespace(load=torch.ones(1), dropped=torch.zeros(()))
        return SimpleNamespace(loss=output.loss, lm_loss=output.lm_loss, routings=[nobody])


def judge(model, ids, texts=256):
    "Loss on `texts` texts of `ids`, with their own sources (own), and with those of other texts (swapped)."
    T = model.config.block_size
    starts = (torch.arange(texts) * (len(ids) - 1) // texts).clamp(max=len(ids) - T)
    device = next(model.parameters()).device
    source, labels, real = model.eval().cut(ids[starts[:, None] + torch.arange(T)].to(device))
    with torch.no_grad():
        own = model.transformer(source, labels=labels, real=real).lm_loss.item()
    return dict(own=own, swapped=swapped_loss(model.transformer, source, labels, real))


def main(
    out: Path = Path("runs/bench"),
    device: str = "cpu",
    seeds: tuple[int, ...] = (1, 2, 3),
    text: str = "shakespeare",
    model: GapConfig = GapConfig(),
    recipe: TrainConfig = replace(GapRun().train, steps=550, eval_blocks=512),
    small: GapConfig = GapConfig(n_embd=64, n_hidden=128),
    control: TrainConfig = TrainConfig(steps=500, eval_every=500, eval_blocks=64),
):
    """Train the model that fills gaps, its dense twin, and the controls.

    Args:
        out: folder for the results.
        device: cpu or cuda.
        seeds: one run each.
        text: 'shakespeare', 'tinyshakespeare' or the path of a text file.
        model: the sizes.
        recipe: the training of the model and of its twin.
        small: the sizes of the controls.
        control: their training, but for the learning rate, which is that of the optimizer.
    """
    train_ids, val_ids, vocab_size = text_for_race(text)
    model, small = (replace(config, vocab_size=vocab_size) for config in (model, small))
    settings = dict(text=text, model=asdict(model), recipe=asdict(recipe), rates=RATES, t5=T5)
    path = out / f"gaps-{device}.json"
    results = open_results(path, settings | dict(small=asdict(small), control=asdict(control)), device)
    results.setdefault("controls", [])

    def build(name, seed):
        seed_everything(seed)
        return (GapFiller if name == MIXTURE else DenseFiller)(model).to(device)

    def fit(model, optimizer, recipe, name):
        state = TrainState(model, recipe, OPTIMIZERS[optimizer](model, recipe))
        return train(model, train_ids, val_ids, recipe, on_eval=say(f"{name}, {recipe.seed}"), state=state)

    if "step" not in results:
        steps = {name: TrainingStep(build(name, 1337), train_ids, recipe, device, "muon") for name in (MIXTURE, ACTIVE)}
        results["step"] = compare(alternate(steps, 15, device=device), ACTIVE)
        results["sizes"] = {name: count_parameters(step.model) for name, step in steps.items()}
        save(path, results)
    longer = round(recipe.steps * results["step"][MIXTURE]["ratio"][1])
    runs = {MIXTURE: recipe, ACTIVE: recipe, EQUAL_TIME: replace(recipe, steps=longer)}
    for seed in seeds:
        for name, how in runs.items():
            if (name, seed) in {(run["name"], run["seed"]) for run in results["runs"]}:
                continue
            contender = build(name, seed)
            history = fit(contender, "muon", replace(how, seed=seed), name)
            run = dict(name=name, seed=seed, steps=how.steps, final=estimate_loss(contender, val_ids)[0])
            results["runs"].append(run | dict(history=kept(history)))
            save(path, results)
        for optimizer, start, half in CONTROLS:
            run = dict(optimizer=optimizer, start=start, half=half, seed=seed)
            if any(run.items() <= finished.items() for finished in results["controls"]):
                continue
            seed_everything(seed)
            contender = GapFiller(small if half else replace(small, **T5))
            if not start:
                seed_everything(seed)
                contender.transformer = SwitchTransformer(contender.config.transformer())
                nn.init.normal_(contender.transformer.lm_head.weight, std=0.02)
            fit(contender.to(device), optimizer, replace(control, lr=RATES[optimizer], seed=seed), str((start, half)))
            results["controls"].append(run | judge(contender, val_ids))
            save(path, results)


if __name__ == "__main__":
    tyro.cli(main)
