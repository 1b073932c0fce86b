"""Who learns faster? Losses over steps and over seconds.

    python -m benchmarks.race article [--short] [--device cuda]   time to the article's last loss, against its algorithm
    python -m benchmarks.race twins [--short] [--device cuda]     mixture, with capacity, and two dense twins
    python -m benchmarks.race gpu                                 the gpu preset against nanoGPT's loss, on a GPU

Each writes a file NAME-DEVICE.json to --out after every run, and a later call goes on from there. The losses of a run
depend on its seed and not on the clock, so they may be collected on a busy machine. Seconds per step are measured
apart, first, in short turns of all contenders, and all that is said about seconds rests on them: run that part on an
idle machine.
"""

import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import tyro
from torch import nn

from benchmarks.plain import PlainModel, plain_step
from benchmarks.timing import TrainingStep, alternate, autocast, compare, describe, load, machine, peak_memory, save
from makemoe.data import CharTokenizer, load_text, split
from makemoe.lab import seed_everything
from makemoe.model import MoEConfig, SparseMoELanguageModel, count_parameters
from makemoe.optimizers import OPTIMIZERS
from makemoe.training import TrainConfig, TrainState, estimate_loss, train
from makemoe.twins import dense_twin

ARTICLE_LOSS = 1.7508  # makeMoE article (Sooriyarachchi 2024): step 4999, tiny Shakespeare
NANOGPT_LOSS = 1.4697  # README of karpathy/nanoGPT, train_shakespeare_char on one A100
SEEDS = 1337, 1338, 1339
SIX_SEEDS = *SEEDS, 1340, 1341, 1342


# contenders

MIXTURE, ACTIVE = "mixture", "dense, same active size"
TWINS = {  # name: function of a config that makes the model
    MIXTURE: SparseMoELanguageModel,
    ACTIVE: lambda c: dense_twin(c, c.top_k * c.n_hidden),
    "mixture, capacity 1.25": lambda c: SparseMoELanguageModel(replace(c, capacity_factor=1.25)),
    "dense, same total size": lambda c: dense_twin(c, c.num_experts * c.n_hidden),
}


class Judged(nn.Module):
    "A `PlainModel` that answers as ours do, so that `estimate_loss` can measure both alike."

    def __init__(self, plain):
        super().__init__()
        self.plain, self.config = plain, plain.config

    def forward(self, ids, targets):
        return SimpleNamespace(lm_loss=self.plain.loss(ids, targets), routings=[SimpleNamespace(load=torch.zeros(1))])


def train_plain(model, train_ids, val_ids, config, on_eval):
    "The article's training: AdamW as it comes, one learning rate, nothing clipped. Records like those of `train`."
    device = model.lm_head.weight.device
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    history = []
    for step in range(config.steps + 1):
        if step % config.eval_every == 0 or step == config.steps:
            with autocast(device.type):
                val_loss, _ = estimate_loss(Judged(model), val_ids, 64, config.eval_blocks)
            history.append(dict(step=step, val_loss=val_loss))
            on_eval(history[-1])
        if step < config.steps:
            model.train()
            with autocast(device.type):
                plain_step(model, optimizer, train_ids, config.batch_size, generator)
    model.eval()
    return history


# what all races share


def open_results(path, settings, device, short=False):
    "The results so far; in a short race always new ones. Raises ValueError if they were made with other settings."
    results = not short and load(path) or dict(machine=machine(device), settings=settings, runs=[])
    if results["settings"] != settings:
        raise ValueError(f"{path} was made with other settings: move it away, or give another --out")
    print(path, describe(results["machine"]), sep=": ", flush=True)
    return results


def text_for_race(name):
    "(training ids, held-out ids, number of different characters)."
    text = load_text(name)
    tokenizer = CharTokenizer(text)
    return *split(tokenizer.encode(text)), tokenizer.vocab_size


def say(name):
    "A function that prints one line for a record of `train`."
    return lambda record: print(f"{name}: step {record['step']}, {record['val_loss']:.4f}", flush=True)


def kept(history):
    "Of the records of `train`, what a race is about."
    keys = "step", "seconds", "train_loss", "val_loss"
    return [{key: record[key] for key in keys if key in record} for record in history]


# article: time to a loss

QUICK = TrainConfig.laptop(steps=360, lr=1e-2, warmup=40, eval_every=20)  # for Muon


def article(
    out: Path = Path("runs/bench"),
    device: str = "cpu",
    short: bool = False,
    seeds: tuple[int, ...] = SEEDS,
    model: MoEConfig = MoEConfig.laptop(num_experts=4),
    recipe: TrainConfig = QUICK,
):
    """Time to the article's last validation loss, 1.7508, on tiny Shakespeare.

    Args:
        out: folder for the results.
        device: cpu or cuda.
        short: a few minutes instead: time to a loss of 2.5, which both reach early.
        seeds: of our recipe; the article's algorithm runs once.
        model: our model; its vocabulary comes from the text.
        recipe: our training.
    """
    train_ids, val_ids, vocab_size = text_for_race("tinyshakespeare")
    model, target, blog = replace(model, vocab_size=vocab_size), ARTICLE_LOSS, TrainConfig.blog(eval_every=250)
    if short:
        seeds, target = seeds[:1], 2.5
        blog, recipe = replace(blog, steps=300, eval_every=25), replace(recipe, steps=80, eval_every=10)
    held_out = len(val_ids) if not short else 8192  # characters of an evaluation
    blog = replace(blog, eval_blocks=held_out // MoEConfig.blog().block_size)
    recipe = replace(recipe, eval_blocks=held_out // model.block_size)
    settings = dict(
        target=target,
        model=asdict(model),
        recipe=asdict(recipe) | dict(optimizer="muon"),
        article=asdict(blog) | dict(clip=None),
    )
    path = out / f"article{'-short' * short}-{device}.json"
    results = open_results(path, settings, device, short)

    def build(name, seed):
        seed_everything(seed)
        return (SparseMoELanguageModel(model) if name == "ours" else PlainModel(MoEConfig.blog())).to(device)

    if "step" not in results:
        plain = build("plain", blog.seed)
        optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-5)
        contenders = {
            "ours": TrainingStep(build("ours", recipe.seed), train_ids, recipe, device, "muon"),
            "plain": lambda: plain_step(plain.train(), optimizer, train_ids, blog.batch_size),
        }
        results["step"] = compare(alternate(contenders, 10 if short else 30, device=device), "ours")
        save(path, results)
    done = {(run["name"], run["seed"]) for run in results["runs"]}
    todo = [("ours", seed) for seed in seeds] + [("plain", blog.seed)]
    for name, seed in todo:
        if (name, seed) in done:
            continue
        contender = build(name, seed)
        if name == "ours":
            tell = say(f"ours, seed {seed}")
            state = TrainState(contender, recipe, OPTIMIZERS["muon"](contender, recipe))
            state.order.manual_seed(seed)
            history = train(contender, train_ids, val_ids, replace(recipe, seed=seed), on_eval=tell, state=state)
        else:
            history = train_plain(contender, train_ids, val_ids, blog, on_eval=say("plain"))
        reached = next((record["step"] for record in history if record["val_loss"] <= target), None)
        results["runs"].append(
            dict(name=name, seed=seed, reached=reached, final=history[-1]["val_loss"], history=kept(history))
        )
        save(path, results)


# twins: mixture or dense


def twins(
    out: Path = Path("runs/bench"),
    device: str = "cpu",
    short: bool = False,
    seeds: tuple[int, ...] = SIX_SEEDS,
    text: str = "shakespeare",
    model: MoEConfig = MoEConfig.laptop(),
    recipe: TrainConfig = TrainConfig.laptop(eval_blocks=512),
    rates: tuple[float, ...] = (3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 6e-3),
):
    """A mixture against itself with capacity and against dense twins, at equal steps and at equal seconds.

    First the mixture and its twin of equal active size are trained once at each learning rate. Then all are trained
    with each seed at that of the recipe, the best that was found. At equal seconds a contender makes as many steps as
    fit into the time of the mixture; its learning rate falls to the last of them.

    Args:
        out: folder for the results.
        device: cpu or cuda.
        short: one seed and one rate, the mixture and its active twin, 150 steps.
        seeds: one run each; the twin of equal total size, whose steps take so long, and the one with capacity get the
            first three.
        text: 'shakespeare', 'tinyshakespeare' or the path of a text file.
        model: the mixture.
        recipe: the training of all of them.
        rates: learning rates that are tried with the first seed.
    """
    train_ids, val_ids, vocab_size = text_for_race(text)
    model = replace(model, vocab_size=vocab_size)
    names = list(TWINS)
    if short:
        seeds, rates, names = seeds[:1], (), [MIXTURE, ACTIVE]
        recipe = replace(recipe, steps=150, eval_every=25, eval_blocks=128)
    settings = dict(text=text, model=asdict(model), recipe=asdict(recipe))
    path = out / f"twins{'-short' * short}-{device}.json"
    results = open_results(path, settings, device, short)

    def build(name, seed):
        seed_everything(seed)
        return TWINS[name](model).to(device)

    if "step" not in results:
        sizes, memory = {}, {}
        for name in names:
            alone = TrainingStep(build(name, recipe.seed), train_ids, recipe, device)
            sizes[name] = count_parameters(alone.model)
            memory[name] = peak_memory(alone)
            del alone
        steps = {name: TrainingStep(build(name, recipe.seed), train_ids, recipe, device) for name in names}
        found = compare(alternate(steps, 10 if short else 30, device=device), MIXTURE)
        results["step"] = {
            name: dict(parameters=sizes[name][0], active=sizes[name][1], memory=memory[name], **found[name])
            for name in names
        }
        save(path, results)

    fitting = {name: round(recipe.steps / results["step"][name]["ratio"][1]) for name in names}  # in the same time
    todo = [(name, seeds[0], "steps", recipe.steps, rate) for rate in rates for name in (MIXTURE, ACTIVE)]
    for seed in seeds:
        for name in names if seed in seeds[:3] else names[:2]:
            todo.append((name, seed, "steps", recipe.steps, recipe.lr))
            if name != MIXTURE:
                todo.append((name, seed, "seconds", fitting[name], recipe.lr))
    done = {(run["name"], run["seed"], run["equal"], run["lr"]) for run in results["runs"]}
    for name, seed, equal, steps, rate in todo:
        if (name, seed, equal, rate) in done:
            continue
        done.add((name, seed, equal, rate))
        contender, start = build(name, seed), time.perf_counter()
        tell = say(f"{name}, seed {seed}, equal {equal}, learning rate {rate}")
        config = replace(recipe, seed=seed, steps=steps, lr=rate)
        history = train(contender, train_ids, val_ids, config, on_eval=tell)
        seconds = time.perf_counter() - start  # evaluations included
        final = history[-1]["val_loss"] if short else estimate_loss(contender, val_ids)[0]
        results["runs"].append(
            dict(
                name=name,
                seed=seed,
                equal=equal,
                steps=steps,
                lr=rate,
                final=final,
                seconds=seconds,
                history=kept(history),
            )
        )
        save(path, results)


# gpu: the large preset


def gpu(
    out: Path = Path("runs/bench"),
    device: str = "cuda",
    model: MoEConfig = MoEConfig.gpu(),
    recipe: TrainConfig = TrainConfig.gpu(),
):
    """The gpu preset on tiny Shakespeare, against the loss that nanoGPT reports for its model of that size.

    Args:
        out: folder for the results.
        device: cuda, or cpu for a very long time.
        model: the model.
        recipe: the training.
    """
    train_ids, val_ids, vocab_size = text_for_race("tinyshakespeare")
    model = replace(model, vocab_size=vocab_size)
    recipe = replace(recipe, eval_blocks=len(val_ids) // model.block_size)  # all of the held-out tenth
    path = out / f"gpu-{device}.json"
    results = open_results(path, dict(target=NANOGPT_LOSS, model=asdict(model), recipe=asdict(recipe)), device)
    if results["runs"]:
        return
    seed_everything(recipe.seed)
    contender = SparseMoELanguageModel(model).to(device)
    total, active = count_parameters(contender)
    history = train(contender, train_ids, val_ids, recipe, on_eval=say("gpu preset"))
    reached = next((record for record in history if record["val_loss"] < NANOGPT_LOSS), None)
    best = min(history, key=lambda record: record["val_loss"])
    results["runs"].append(
        dict(
            parameters=total,
            active=active,
            reached=reached and kept([reached])[0],
            best=kept([best])[0],
            seconds=history[-1]["seconds"],
            history=kept(history),
        )
    )
    save(path, results)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"article": article, "twins": twins, "gpu": gpu})
