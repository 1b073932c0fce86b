"""Answers to lesson 13, twins."""

ANSWERS = {
    "dense_twin": {
        "right: the config changed field by field": """
def dense_twin(config, width):
    changes = {"num_experts": 1, "top_k": 1, "n_hidden": width}
    changes.update(routed_scaling_factor=1.0, capacity_factor=None, balance_coef=0.0)
    model = SparseMoELanguageModel(replace(config, **changes))
    for layer in range(config.n_layer):
        model.blocks[layer].moe = DenseMLP(config.n_embd, width, config.activation, config.bias, config.dropout)
    model.init_weights()
    return model
""",
        "right: the width read from the new config": [
            ("DenseMLP(config.n_embd, width,", "DenseMLP(config.n_embd, config.n_hidden,")],
        "the width of an expert": [("DenseMLP(config.n_embd, width,", "DenseMLP(config.n_embd, config.n_hidden // 2,")],
        "weights as PyTorch draws them": [("    model.init_weights()\n", "")],
        "the factor stays": [("routed_scaling_factor=1.0, ", "")],
        "the balance loss stays": [("\n                     balance_coef=0.0)", ")")],
        "one expert behind its router": [
            ("    for block in model.blocks:\n        block.moe = DenseMLP(config.n_embd, width, config.activation, "
             "config.bias, config.dropout)\n", "")],
        "only the first block": [("for block in model.blocks:", "for block in model.blocks[:1]:")],
        "biases forgotten": [("config.bias, config.dropout)", "False, config.dropout)")],
        "dropout forgotten": [("config.bias, config.dropout)", "config.bias, 0.0)")],
    },
    "compare": {
        "right: seeds inside": """
def compare(contenders, train_ids, val_ids, recipe, seeds=(1337,), on_eval=None):
    def run(make, seed):
        seed_everything(seed)
        return train(make(), train_ids, val_ids, replace(recipe, seed=seed), on_eval=on_eval)

    return {name: [run(make, seed) for seed in seeds] for name, make in contenders.items()}
""",
        "right: through a list of pairs": """
def compare(contenders, train_ids, val_ids, recipe, seeds=(1337,), on_eval=None):
    runs = {}
    for name in contenders:
        for seed in seeds:
            torch.manual_seed(seed)
            model = contenders[name]()
            records = train(model, train_ids, val_ids, replace(recipe, seed=seed), on_eval=on_eval)
            runs.setdefault(name, []).append(records)
    return runs
""",
        "the seed is set once": [("            seed_everything(seed)\n", "")],
        "the seed is set after the model was made": [
            ("            seed_everything(seed)\n            model = make()\n",
             "            model = make()\n            seed_everything(seed)\n")],
        "the recipe keeps its seed": [("replace(recipe, seed=seed)", "recipe")],
        "one model for all seeds": """
def compare(contenders, train_ids, val_ids, recipe, seeds=(1337,), on_eval=None):
    models = {name: make() for name, make in contenders.items()}
    runs = {name: [] for name in contenders}
    for seed in seeds:
        for name, model in models.items():
            seed_everything(seed)
            runs[name].append(train(model, train_ids, val_ids, replace(recipe, seed=seed), on_eval=on_eval))
    return runs
""",
        "only the last records": [("on_eval=on_eval))", "on_eval=on_eval)[-1:])")],
        "nobody is told": [(", on_eval=on_eval))", "))")],
        "the seeds the other way round": [("for seed in seeds:", "for seed in reversed(seeds):")],
        "one list for all contenders": [("{name: [] for name in contenders}", "dict.fromkeys(contenders, [])")],
    },
    "paired_interval": {
        "right: through sums": """
T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]
def paired_interval(gaps):
    n = len(gaps)
    if n < 2 or n > 10:
        raise ValueError(f"2 to 10 gaps, not {n}")
    middle = sum(gaps) / n
    s = (sum((gap - middle) ** 2 for gap in gaps) / (n - 1)) ** 0.5
    return middle, middle - T[n - 2] * s / n ** 0.5, middle + T[n - 2] * s / n ** 0.5
""",
        "right: with tensors": [("reach = T_95[len(gaps) - 2] * stdev(gaps) / math.sqrt(len(gaps))",
                                 "reach = T_95[len(gaps) - 2] * torch.tensor(gaps, dtype=torch.double).std().item() "
                                 "/ len(gaps) ** 0.5")],
        "the normal distribution": [("T_95[len(gaps) - 2]", "1.96")],
        "one row of the table too far": [("T_95[len(gaps) - 2]", "T_95[min(len(gaps) - 1, 8)]")],
        "the spread of the gaps, not of their mean": [(" / math.sqrt(len(gaps))", "")],
        "variance with n": [("stdev(gaps)", "(stdev(gaps) * math.sqrt((len(gaps) - 1) / len(gaps)))")],
        "divided by n": [("math.sqrt(len(gaps))", "len(gaps)")],
        "to one side only": [("mean(gaps) - reach, mean(gaps) + reach", "mean(gaps), mean(gaps) + reach")],
        "any number is taken": [("    if not 2 <= len(gaps) <= 10:\n"
                                 "        raise ValueError(f\"an interval needs 2 to 10 "
                                 "gaps, but there are {len(gaps)}\")\n", "")],
    },
}
