"""The tables and the picture of what `speed` and `race` have measured.

    python -m benchmarks.report [--folder FOLDER]

prints the tables as Markdown, and writes them to FOLDER/DEVICE.md and the picture to FOLDER/DEVICE.png.
"""

import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import tyro
from matplotlib.ticker import LogLocator

from benchmarks.timing import describe, load

OURS, OTHER, THIRD, FOURTH = "#1f5a99", "#d9822b", "#6b6b6b", "#3f8f5b"


def table(head, rows):
    "Lines of a Markdown table; the first column is text, the others are numbers or text."
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def spread(values, digits=1):
    "Median and quartiles."
    return f"{values[1]:,.{digits}f} ({values[0]:,.{digits}f} to {values[2]:,.{digits}f})"


def of_seeds(values):
    "Mean of the seeds, and from where to where they lie."
    return f"{statistics.mean(values):.4f}" + f" ({min(values):.4f} to {max(values):.4f})" * (len(values) > 1)


def megabytes(size):
    return f"{size / 2**20:,.0f}"


# One function per section: rows or results -> (title, lines of Markdown, goals).
# A goal is (what, found, to reach, reached).

def step_section(rows):
    lines = table(["", "ms a step", "times ours"], [[r["name"], spread(r["ms"]), spread(r["ratio"], 2)] for r in rows])
    if "synchronisations" in rows[0]:
        lines += ["", f"In a step of ours the CPU waits for the GPU {rows[0]['synchronisations']} times."]
    slower = rows[1]["ratio"][1]
    goals = [("a training step of the article's model, against its algorithm written plainly",
              f"{slower:.2f} times as fast", "at least 1.8", slower >= 1.8)]
    return "A training step of the article's model, 16 x 32 characters", lines, goals


def layer_section(rows):
    def cells(r):
        if "ms" not in r:
            return [r["name"], r["case"], "", "", "", "", r["note"]]
        return [r["name"], r["case"], spread(r["ms"]), spread(r["ratio"], 2), f"{r['multiplications']:,}",
                f"{r['carried']:.0%}", r["note"]]

    lines = table(["", "tokens", "ms", "times ours", "multiplications per token", "choices carried out", ""],
                  [cells(r) for r in rows])
    lines += ["", "Ours has two matrices an expert and squared ReLU; the peers have three, narrower ones and a gate "
                  "(SwiGLU, GEGLU). All route by the same matrix. For st-moe-pytorch the multiplications of its "
                  "einsums, which carry tokens to seats and back, are counted, too."]
    goals = []
    for case in dict.fromkeys(r["case"] for r in rows):
        peers = [r for r in rows if r["case"] == case and "ms" in r and not r["name"].startswith("ours")]
        whom = (False, "the fastest peer with as many seats"), (True, "the fastest of all, with as few seats")
        for drops, who in whom:
            same = [r for r in peers if drops or not r["name"].endswith("defaults")]
            ours = [r for r in rows if r["case"] == case and r["name"].startswith("ours")][drops]
            if same:
                best = min(same, key=lambda r: r["ratio"][1])
                faster = best["ratio"][1] / ours["ratio"][1]
                goals.append((f"one mixture, {case}, against {who}: {best['name']}", f"{faster:.2f} times as fast",
                              "more than 1", faster > 1))
    return "One mixture, forward and backward, 8 experts, 2 per token", lines, goals


def generation_section(rows):
    lines = table(["", "", "tokens per second", "ms per character", "times ours"],
                  [[r["case"], r["name"], f"{r['tokens_per_second']:,.0f}", spread(r["ms"]), spread(r["ratio"], 2)]
                   for r in rows])
    lines += ["", "Both run the same model in the long run. With the cache, the newer half of a full block is read "
                  "again: a character sees 128 to 256 others. Running again, it always sees 256."]
    goals = [(f"generation, {r['case']}, against running again", f"{r['ratio'][1]:.1f} times as fast", "at least 10",
              r["ratio"][1] >= 10) for r in rows if r["name"] != "ours" and r["case"].endswith("batch 1")]
    return "Generation with a full context", lines, goals


def expert_section(rows):
    def memory(r):
        return [megabytes(r["memory"]), f"{r['memory_ratio']:.2f}"] if "memory" in r else ["", ""]

    lines = table(["", "", "ms", "times 8 experts", "parameters", "peak memory, MB", "times"],
                  [[r["case"], r["name"], spread(r["ms"]), spread(r["ratio"], 2), f"{r['parameters']:,}",
                    *memory(r)] for r in rows])
    lines += ["", "Peak memory holds weights, gradients, AdamW's moments and activations."]
    goals = [(f"64 experts against 8, {r['case']}", f"{r['ratio'][1]:.2f} times as long", "at most 1.25",
              r["ratio"][1] <= 1.25) for r in rows if r["experts"] == 64 and not r["name"].endswith("loop")]
    return "A step of training as experts grow, 2 per token", lines, goals


def article_section(results):
    settings, step = results["settings"], results["step"]
    rows, seconds, missed = [], {"ours": [], "plain": []}, False
    for run in sorted(results["runs"], key=lambda run: run["name"]):
        name, last = run["name"], run["history"][-1]["step"]
        steps = last if run["reached"] is None else run["reached"]
        seconds[name].append(steps * step[name]["ms"][1] / 1e3)
        missed |= name == "ours" and run["reached"] is None
        rows.append([{"ours": "ours", "plain": "the article's algorithm, plainly"}[name], run["seed"],
                     spread(step[name]["ms"]), "not reached" if run["reached"] is None else f"{run['reached']:,}",
                     f"{seconds[name][-1]:,.0f}", f"{run['final']:.4f}", f"{last:,}"])
    lines = table(["", "seed", "ms a step", "step that reached it", "seconds till then", "loss at the end",
                   "after steps"], rows)
    T, per_step = settings["model"]["block_size"], settings["recipe"]["batch_size"]
    lines += ["", "Seconds are steps times the median of both, measured in turns; where the loss was not reached, of "
                  f"all steps. Both are judged on the same {settings['recipe']['eval_blocks'] * T:,} characters of the "
                  f"held-out tenth. Ours, {settings['model']['num_experts']} experts a layer and optimizer "
                  f"{settings['recipe']['optimizer']}, reads {T} characters at a time and {per_step * T:,} a step, the "
                  "article's 32 and 512: that is part of the recipe. As in the article, its router is noisy in "
                  "evaluation, too."]
    goals = []
    if all(seconds.values()) and seconds["plain"][0]:
        share = max(seconds["ours"]) / seconds["plain"][0]
        short = settings["target"] != 1.7508
        goals = [(f"time to a validation loss of {settings['target']} on tiny Shakespeare, our slowest seed against "
                  "the plain algorithm", f"{share:.3f} of its time" + " (not every seed got there)" * missed,
                  "at most 0.1 to 1.7508", None if short else share <= 0.1 and not missed)]
    return f"Time to a validation loss of {settings['target']} on tiny Shakespeare", lines, goals


def raced(results):
    "The learning rates of the race, the largest first; those that were only tried with one seed are the search's."
    seeds = {run["lr"]: set() for run in results["runs"]}
    for run in results["runs"]:
        seeds[run["lr"]].add(run["seed"])
    several = [lr for lr, found in seeds.items() if len(found) > 1]
    return sorted(several or seeds, reverse=True)


def twin_section(results):
    def finals(name, equal, lr):
        same = "steps" if name == "mixture" else equal  # the mixture is the measure of both
        runs = [run for run in results["runs"] if (run["name"], run["equal"], run["lr"]) == (name, same, lr)]
        return {run["seed"]: run["final"] for run in runs}

    steps, rows, goals = results["settings"]["recipe"]["steps"], [], []
    for lr in raced(results):
        for name, facts in results["step"].items():
            by_steps, by_seconds = (finals(name, equal, lr).values() for equal in ("steps", "seconds"))
            if by_steps:
                rows.append([name, f"{lr:g}", len(by_steps), f"{facts['parameters']:,}", f"{facts['active']:,}",
                             spread(facts["ms"]), f"{facts['ratio'][1]:.2f}", megabytes(facts["memory"]),
                             of_seeds([*by_steps]), f"{round(steps / facts['ratio'][1]):,}",
                             of_seeds([*by_seconds]) if by_seconds else "not run"])
        for equal in "steps", "seconds":
            ours, twin = finals("mixture", equal, lr), finals("dense, same active size", equal, lr)
            behind = [twin[seed] - ours[seed] for seed in ours if seed in twin]
            if behind:
                goals.append((f"the laptop mixture after {steps:,} steps against its dense twin of the same active "
                              f"size, at equal {equal}, learning rate {lr:g}, "
                              f"{len(behind)} seed{'s' * (len(behind) > 1)}",
                              f"the twin's loss minus ours is {of_seeds(behind)}", "above 0 at equal seconds",
                              min(behind) > 0 if equal == "seconds" and steps >= 1000 else None))
    lines = table(["", "learning rate", "seeds", "parameters", "active", "ms a step", "times mixture",
                   "peak memory, MB", f"loss after {steps:,} steps", "steps in equal seconds",
                   "loss at equal seconds"], rows)
    lines += ["", "The same recipe for all; mean, and range of the seeds. At equal seconds everybody makes the steps "
                  "that fit into the time of the mixture, and the learning rate falls to the last of them."]
    return "The laptop mixture and its twins, validation loss", lines, goals


def gpu_section(results):
    run = results["runs"][0]
    reached, target = run["reached"], results["settings"]["target"]
    lines = table(["active of all parameters", "lowest validation loss", "at step", "of steps",
                   "seconds, with evaluations", f"seconds till below {target}"],
                  [[f"{run['active']:,} of {run['parameters']:,}", f"{run['best']['val_loss']:.4f}",
                    f"{run['best']['step']:,}", f"{run['history'][-1]['step']:,}", f"{run['seconds']:,.0f}",
                    f"{reached['seconds']:,.0f}" if reached else "never"]])
    goals = [("the gpu preset on tiny Shakespeare, lowest validation loss", f"{run['best']['val_loss']:.4f}",
              f"below {target}, nanoGPT's", bool(reached))]
    return "The gpu preset on tiny Shakespeare", lines, goals


# the picture

def bars(axes, rows, values, labels, title, unit):
    colours = [OURS if row["name"].startswith("ours") else OTHER for row in rows]
    marks = axes.barh(range(len(rows)), values, color=colours)
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.bar_label(marks, [f" {value:,.0f}" if value >= 100 else f" {value:.3g}" for value in values], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(unit, fontsize=8)


def draw_speed(section, axes, rows):
    rows = [row for row in rows if "ms" in row]
    if section == "a":
        bars(axes, rows, [row["ms"][1] for row in rows], ["ours", "plainly"], "a  a training step", "ms")
    elif section == "b":
        case = rows[-1]["case"] if "batched" not in rows[-1]["name"] else rows[0]["case"]
        shown = [row for row in rows if row["case"] == case]
        labels = [row["name"].replace("-pytorch", "").replace(", ", ",\n") for row in shown]
        bars(axes, shown, [row["ms"][1] for row in shown], labels, f"b  one mixture, {case}", "ms")
    elif section == "c":
        labels = [f"{row['case'].split()[0]}, batch {row['case'].split()[-1]}, {row['name']}" for row in rows]
        bars(axes, rows, [row["tokens_per_second"] for row in rows], labels, "c  generation", "tokens per second")
        axes.set_xscale("log")
        axes.set_xlim(right=axes.get_xlim()[1] * 4)
    else:
        for case, colour in zip(dict.fromkeys(row["case"] for row in rows), (THIRD, OURS, OTHER)):
            mine = [row for row in rows if row["case"] == case and not row["name"].endswith("loop")]
            experts, ratios = [row["experts"] for row in mine], [row["ratio"][1] for row in mine]
            axes.plot(experts, ratios, "o-", color=colour, label=case)
            if "memory_ratio" in mine[0]:
                ratios = [row["memory_ratio"] for row in mine]
                axes.plot(experts, ratios, "o:", color=colour, label="... its peak memory")
        axes.axhline(1.25, color="black", lw=0.8, ls="--")
        axes.set(xscale="log", ylim=(0.8, None))
        axes.set_xticks([8, 16, 32, 64], ["8", "16", "32", "64"])
        axes.minorticks_off()
        axes.legend(fontsize=7, frameon=False)
        axes.set_title("d  a step as experts grow", fontsize=10, loc="left")
        axes.set_xlabel("experts; times 8 experts; the line is 1.25", fontsize=8)


def draw_losses(axes, results, names, title):
    "Held-out loss over seconds, without the first guess."
    lr = raced(results)[0] if "equal" in results["runs"][0] else None  # the article's race has one for each side
    for name, (label, colour) in names.items():
        equal = "steps" if name == "mixture" else "seconds"  # the mixture is the measure of both
        runs = [run for run in results["runs"] if run["name"] == name and run.get("lr") == lr]
        runs = [run for run in runs if run.get("equal", equal) == equal]
        per_step = results["step"][name]["ms"][1] / 1e3
        for i, run in enumerate(runs):
            shown = [record for record in run["history"] if record["step"]]
            axes.plot([record["step"] * per_step for record in shown], [record["val_loss"] for record in shown],
                      color=colour, lw=1.3, label=None if i else label)
    axes.legend(fontsize=7, frameon=False)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("seconds; held-out loss in nats", fontsize=8)


def draw(speed, article, twins):
    "A figure of all that is there."
    sections = dict.fromkeys(row["section"] for row in speed["rows"]) if speed else {}
    panels = list(sections) + ["e"] * bool(article) + ["f"] * bool(twins)
    columns, lines = min(3, len(panels)), -(-len(panels) // 3)
    figure, axes = plt.subplots(lines, columns, figsize=(5.2 * columns, 3.8 * lines), squeeze=False,
                                layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        if panel == "e":
            both = {"ours": ("ours", OURS), "plain": ("the article's algorithm", OTHER)}
            draw_losses(axis, article, both, "e  time to a loss")
            axis.axhline(article["settings"]["target"], color="black", lw=0.8, ls="--")
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.minorticks_off()
        elif panel == "f":
            colours = (OURS, FOURTH, OTHER, THIRD) if len(twins["step"]) > 2 else (OURS, OTHER)
            names = {name: (name, colour) for name, colour in zip(twins["step"], colours)}
            draw_losses(axis, twins, names, "f  mixture and twins, equal seconds")
        else:
            draw_speed(panel, axis, [row for row in speed["rows"] if row["section"] == panel])
    return figure


def main(folder: Path = Path("runs/bench")):
    """Print the tables of FOLDER as Markdown, and write them and a picture beside the numbers.

    Args:
        folder: where `speed` and `race` left their results.
    """
    for device in "cpu", "cuda":
        def results(name):
            found = load(folder / f"{name}-{device}.json")
            return found if found and (found.get("rows") or found.get("runs")) else None

        speed, gpu = results("speed"), results("gpu")
        article, twins = (results(name) or results(f"{name}-short") for name in ("article", "twins"))
        makers = {"a": step_section, "b": layer_section, "c": generation_section, "d": expert_section}
        measured = speed["rows"] if speed else []
        rows = {section: [row for row in measured if row["section"] == section] for section in makers}
        sections = {section: make(rows[section]) for section, make in makers.items() if rows[section]}
        races = ("e", article, article_section), ("f", twins, twin_section), ("g", gpu, gpu_section)
        for section, found, make in races:
            if found:
                sections[section] = make(found)
        if not sections:
            continue
        where = dict.fromkeys(describe(found["machine"]) for found in (speed, article, twins, gpu) if found)
        words = {True: "yes", False: "no", None: ""}
        goals = [[section, what, found, goal, words[reached]]
                 for section, (_, _, goals) in sections.items() for what, found, goal, reached in goals]
        lines = ["; ".join(where) + ". Medians, and quartiles in brackets.", "",
                 *table(["", "what", "found", "to reach", "reached"], goals)]
        for section, (title, more, _) in sections.items():
            lines += ["", f"### {section}. {title}", "", *more]
        text = "\n".join(lines) + "\n"
        (folder / f"{device}.md").write_text(text, encoding="utf-8")
        draw(speed, article, twins).savefig(folder / f"{device}.png", dpi=120)
        print(text)


if __name__ == "__main__":
    tyro.cli(main)
