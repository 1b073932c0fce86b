"""Each contender computes what it claims. How long it takes is for `make bench` to say, not for a test."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as bench
from benchmarks import gaps, open_models, race, report, speed, timing
from benchmarks.plain import PlainModel, plain_step
from makemoe.data import get_batch
from makemoe.fill_gaps import GapConfig
from makemoe.gating import top_k_gating
from makemoe.generation import generate
from makemoe.model import MoEConfig, SparseMoELanguageModel, count_parameters
from makemoe.training import TrainConfig, estimate_loss

SMALL = MoEConfig(vocab_size=20, block_size=8, n_embd=16, n_head=2, n_layer=2, num_experts=4, top_k=2, n_hidden=24)
BLOG = MoEConfig.blog(
    vocab_size=20, block_size=8, n_embd=16, n_head=2, n_layer=2, num_experts=4, n_hidden=24, dropout=0.0
)


@pytest.fixture
def ids():
    return torch.randint(20, (400,))


def ours_from_plain(plain, config):
    "Our model with the weights of a `PlainModel`, whose scale of attention goes into the queries."
    state, slip = {}, (1 / config.n_head) ** 0.5  # (D / C) ** 0.5
    for name in (
        "token_embedding.weight",
        "position_embedding.weight",
        "norm.weight",
        "norm.bias",
        "lm_head.weight",
        "lm_head.bias",
    ):
        state[name] = plain.state_dict()[name]
    for i, block in enumerate(plain.blocks):
        heads, moe, at = block.attention.heads, block.moe, f"blocks.{i}."
        parts = [
            [head.query.weight * slip for head in heads],
            [head.key.weight for head in heads],
            [head.value.weight for head in heads],
        ]
        state[at + "attention.qkv.weight"] = torch.cat([weight for part in parts for weight in part])
        for kind in "weight", "bias":
            state |= {f"{at}{norm}.{kind}": getattr(block, norm).state_dict()[kind] for norm in ("norm1", "norm2")}
            state[f"{at}attention.proj.{kind}"] = block.attention.proj.state_dict()[kind]
            state[f"{at}moe.router.linear.{kind}"] = moe.score.state_dict()[kind]
            state[f"{at}moe.router.noise_linear.{kind}"] = moe.noise.state_dict()[kind]
            for e, expert in enumerate(moe.experts):
                state[f"{at}moe.experts.{e}.up.{kind}"] = expert[0].state_dict()[kind]
                state[f"{at}moe.experts.{e}.down.{kind}"] = expert[2].state_dict()[kind]
    ours = SparseMoELanguageModel(replace(config, experts="loop"))
    ours.load_state_dict(state)
    return ours


def test_the_plain_model_is_ours_but_for_the_scale_of_attention(ids):
    plain = PlainModel(BLOG)
    ours = ours_from_plain(plain, BLOG)
    x, y = get_batch(ids, 4, BLOG.block_size)
    torch.manual_seed(1)
    expected = plain.loss(x, y)
    torch.manual_seed(1)  # the same noise in the routers of both
    found = ours(x, y).loss
    assert_close(found, expected)
    expected.backward()
    found.backward()
    assert_close(ours.token_embedding.weight.grad, plain.token_embedding.weight.grad)
    assert_close(ours.blocks[0].moe.router.noise_linear.weight.grad, plain.blocks[0].moe.noise.weight.grad)


def test_the_plain_model_has_the_size_that_the_article_gives():
    assert sum(weight.numel() for weight in PlainModel(MoEConfig.blog()).parameters()) == 8_996_545


def test_the_plain_training_learns(ids):
    model = PlainModel(BLOG).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    same = torch.arange(20).repeat(20)  # after each number comes the next
    losses = [plain_step(model, optimizer, same).item() for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_both_are_judged_by_the_same_measure(ids):
    plain = PlainModel(BLOG)
    blocks = ids[:33].unfold(0, 9, 8)  # (4, 9)
    torch.manual_seed(1)
    expected = plain.eval().loss(blocks[:, :-1], blocks[:, 1:])
    torch.manual_seed(1)
    assert estimate_loss(race.Judged(plain), ids[:33])[0] == pytest.approx(expected.item(), rel=1e-5)


OURS = ["ours", "ours, as few seats as st-moe-pytorch"]
PEERS = [
    "Mixtral, eager",
    "Mixtral, batched_mm",
    "Mixtral, grouped_mm",
    "st-moe-pytorch, as many seats as ours",
    "st-moe-pytorch, its defaults",
]
C, H, E, K = 16, 48, 4, 2


def build(name):
    pytest.importorskip(
        "transformers" if "Mixtral" in name else "st_moe_pytorch", reason="the extra `bench` is not installed"
    )
    make, settings = speed.PEERS[name]
    return make(C, H, E, K, **settings)


def test_all_peers_are_raced():
    assert list(speed.PEERS) == [*OURS, *PEERS]


@pytest.mark.parametrize("name", PEERS[1:3])
def test_the_ways_to_run_mixtral_agree(name):
    eager, other, x = build(PEERS[0]), build(name), torch.randn(2, 8, C)
    other.load_state_dict(eager.state_dict())
    assert_close(other(x), eager(x))


def test_mixtral_routes_as_ours_does():
    router, x = torch.randn(E, C), torch.randn(2, 8, C)
    mixtral = speed.same_router(build(PEERS[0]), router)
    ours = speed.same_router(speed.our_layer(C, H, E, K), router)
    _, weights, chosen = mixtral.gate(x)
    gates = torch.zeros(16, E).scatter(1, chosen, weights)
    assert_close(ours.router(x).gates.view(16, E), gates)
    assert_close(top_k_gating(x @ router.T, K).gates.view(16, E), gates)


@pytest.mark.parametrize("name", ["ours", "Mixtral, eager", *PEERS[3:]])
def test_multiplications_are_as_many_as_are_counted(name):
    layer = speed.our_layer(C, H, E, K) if name == "ours" else build(name)
    x = torch.randn(2, 32, C)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 64 * speed.multiplications(name, layer, 32, C, H, E, K)


def test_choices_that_are_carried_out_are_counted():
    x = torch.randn(2, 32, C)
    dropless, few = (
        speed.same_router(speed.PEERS[name][0](C, H, E, K, **speed.PEERS[name][1]), torch.zeros(E, C)) for name in OURS
    )
    assert speed.carried("ours", dropless, x, K) == 1
    assert speed.carried("ours", few, x, K) == pytest.approx(10 / 32)  # 0.625 * 32 * 2 / 4 seats, for the same two
    layer = speed.same_router(
        build("st-moe-pytorch, as many seats as ours"), torch.zeros(E, C)
    )  # everybody wants the same two
    assert speed.carried("st-moe-pytorch", layer, x, K) == pytest.approx(
        16 / 32
    )  # each has seats for half of the tokens
    layer.gate.capacity_factor_train = float(E)  # a seat for everybody everywhere
    assert speed.carried("st-moe-pytorch", layer, x, K) == 1


def test_running_again_writes_what_the_cache_writes():
    model, ids = SparseMoELanguageModel(SMALL).eval(), torch.randint(20, (3, 2))
    for weight in model.parameters():
        weight.data *= 10  # so that the context matters
    torch.manual_seed(1)
    expected = generate(model, ids, 6)
    torch.manual_seed(1)
    for _ in range(6):
        ids = torch.cat([ids, speed.rerun(model, ids)], dim=1)
    assert ids.tolist() == expected.tolist()


def test_twins_have_the_sizes_that_their_names_say():
    sizes = {name: count_parameters(make(SMALL)) for name, make in race.TWINS.items()}
    router = SMALL.n_layer * (SMALL.n_embd + 1) * SMALL.num_experts  # a dense twin has none
    total, active = sizes["mixture"]
    assert sizes["mixture, capacity 1.25"] == (total, active)
    assert sizes["dense, same active size"] == (active - router, active - router)
    assert sizes["dense, same total size"] == (total - router, total - router)


def test_contenders_take_turns_there_and_back():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = timing.alternate(contenders, rounds=2, warmup=1)
    assert "".join(calls) == "abccbaabc"
    assert {name: len(each) for name, each in seconds.items()} == dict(a=2, b=2, c=2)


def test_ratios_are_taken_round_by_round():
    found = timing.compare({"ours": [1, 2, 4], "other": [2, 6, 16]}, "ours")
    assert found["other"]["ms"][1] == 6000
    assert found["other"]["ratio"] == (2.5, 3, 3.5)
    assert timing.compare({"ours": [2]}, "ours")["ours"]["ratio"] == (1, 1, 1)


def test_peak_memory_is_weights_gradients_moments_and_more_with_every_sequence(ids):
    def peak(batch_size, **changes):
        model = SparseMoELanguageModel(replace(SMALL, **changes))
        step = timing.TrainingStep(model, ids, TrainConfig(batch_size=batch_size))
        return timing.peak_memory(step), count_parameters(model)[0]

    (small, few), (wide, many) = peak(1), peak(1, num_experts=64)
    assert small > 4 * 4 * few
    assert wide - small == pytest.approx(4 * 4 * (many - few), rel=0.2)
    two, four = peak(16)[0], peak(32)[0]
    assert (
        four - two > 16 * SMALL.block_size * 4 * SMALL.n_embd * SMALL.n_layer
    )  # more than one vector a token and layer
    assert peak(16)[0] == two


TINY = dict(steps=4, batch_size=2, warmup=1, eval_every=2, eval_blocks=3)


def test_a_race_goes_on_where_it_stopped_and_has_what_a_lesson_needs(tmp_path, capsys):
    (tmp_path / "text").write_text("abcdefghijklmnopqrst" * 20, encoding="utf-8")
    how = dict(text=str(tmp_path / "text"), model=SMALL, recipe=TrainConfig(**TINY), rates=(0.1,))
    race.twins(tmp_path, seeds=(1,), **how)
    path = tmp_path / "twins-cpu.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    race.twins(tmp_path, seeds=(1, 2, 3, 4), **how)
    longer = json.loads(path.read_text(encoding="utf-8"))
    assert longer["runs"][:9] == results["runs"] and longer["step"] == results["step"]
    found = {(run["name"], run["seed"], run["equal"], run["lr"]) for run in longer["runs"]}
    assert len(found) == len(longer["runs"]) and found == {
        (name, seed, equal, 3e-3)
        for name in race.TWINS
        for seed in (1, 2, 3, 4)
        for equal in ("steps", "seconds")
        if (name, equal) != ("mixture", "seconds") and (seed < 4 or name in (race.MIXTURE, race.ACTIVE))
    } | {(name, 1, "steps", 0.1) for name in (race.MIXTURE, race.ACTIVE)}
    for run in longer["runs"]:
        assert [record["step"] for record in run["history"]][-1] == run["steps"]
        assert set(run["history"][0]) == {"step", "seconds", "train_loss", "val_loss"} and run["final"] > 0
    for facts in longer["step"].values():
        assert set(facts) == {"parameters", "active", "memory", "ms", "ratio"}
    with pytest.raises(ValueError, match="other settings"):
        race.twins(tmp_path, seeds=(1,), **how | dict(model=replace(SMALL, n_hidden=32)))


@pytest.mark.parametrize("script, model, last", [
    (open_models, SMALL, "Llama 4"),
    (gaps, GapConfig(n_embd=8, n_head=2, n_hidden=4, block_size=16), "dense, same active size, equal time"),
])
def test_models_are_compared_and_a_later_call_goes_on(tmp_path, script, model, last):
    (tmp_path / "text").write_text("abcdefghijklmnopqrst" * 600, encoding="utf-8")
    how = dict(text=str(tmp_path / "text"), model=model, recipe=TrainConfig(**TINY))
    how |= dict(small=model, control=TrainConfig(**TINY)) if script is gaps else {}
    for seeds in (1,), (1, 2):
        script.main(tmp_path, seeds=seeds, **how)
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    runs = [(run["name"], run["seed"]) for run in results["runs"]]
    assert len(set(runs)) == len(runs) and runs[-1] == (last, 2) and len(runs) == 2 * runs.index((last, 1)) + 2
    assert all(2 < run["final"] < 5 for run in results["runs"]) and len(results["step"]) >= 2


def test_the_race_against_the_article_and_the_report(tmp_path, monkeypatch, ids):
    monkeypatch.setattr(race, "text_for_race", lambda name: (ids[:300], ids[300:], 20))
    monkeypatch.setattr(race, "ARTICLE_LOSS", 3.1)  # where ours begins, and the plain model never gets
    monkeypatch.setattr(MoEConfig, "blog", lambda **changes: BLOG)
    monkeypatch.setattr(TrainConfig, "blog", lambda **changes: TrainConfig(**TINY | changes))
    race.article(tmp_path, seeds=(1, 2), model=SMALL, recipe=TrainConfig(**TINY))
    results = json.loads((tmp_path / "article-cpu.json").read_text(encoding="utf-8"))
    assert [(run["name"], run["seed"], run["reached"]) for run in results["runs"]] == [
        ("ours", 1, 0),
        ("ours", 2, 0),
        ("plain", 1337, None),
    ]
    report.main(tmp_path)
    text = (tmp_path / "cpu.md").read_text(encoding="utf-8")
    assert "0.000 of its time" in text and "not every seed" not in text and "not reached" in text


def test_every_section_runs_and_is_reported(tmp_path, ids, capsys, monkeypatch):
    monkeypatch.setattr(MoEConfig, "blog", lambda: BLOG)
    monkeypatch.setattr(MoEConfig, "laptop", lambda **changes: replace(SMALL, **changes))
    rows = speed.training_step("cpu", ids, rounds=1) + speed.layer_rows("cpu", 2, 32, C=16, H=48, E=4, rounds=1)
    rows += speed.layer_rows("cpu", 2, 32, C=16, H=48, E=4, rounds=1, most_copied=0)
    rows += speed.generation("cpu", "laptop", 1, rounds=1)
    rows += speed.expert_layers("cpu", experts=(8, 64), C=16, H=16, tokens=64, rounds=1)
    rows += speed.expert_models("cpu", ids, 2, experts=(8, 64), rounds=1)
    timing.save(tmp_path / "speed-cpu.json", dict(machine=timing.machine("cpu"), rows=rows))
    report.main(tmp_path)
    text = (tmp_path / "cpu.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    for title in "### a.", "### b.", "### c.", "### d.", "64 experts against 8", "against running again", "not run: ":
        assert title in text
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "cuda.md").exists()


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "st_moe_pytorch", None)
    rows = speed.layer_rows("cpu", 2, 32, C=16, H=48, E=4, rounds=1)
    assert [row["name"] for row in rows if "ms" in row] == OURS
    assert [row["name"] for row in rows if row.get("note", "").startswith("not run: ")] == PEERS


@pytest.mark.parametrize("cuda", [False, True])
def test_one_command_runs_it_all_and_leaves_out_what_is_not_there(monkeypatch, tmp_path, capsys, cuda):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    for module, name in (speed, "main"), (race, "article"), (race, "twins"), (race, "gpu"), (report, "main"):

        def note(out, device="", short=None, name=f"{module.__name__}.{name}"):
            calls.append((name.removeprefix("benchmarks."), device, short))

        monkeypatch.setattr(module, name, note)
    bench.main(tmp_path, full=True)
    both = [
        [("speed.main", device, None), ("race.twins", device, False), ("race.article", device, False)]
        for device in ("cpu", "cuda")
    ]
    assert calls == both[0] + (both[1] + [("race.gpu", "", None)]) * cuda + [("report.main", "", None)]
    assert ("no CUDA device" in capsys.readouterr().out) is not cuda


def test_without_tiny_shakespeare_the_rest_is_measured(monkeypatch, tmp_path, capsys):
    def missing(*arguments, **settings):
        raise OSError("cannot fetch tinyshakespeare")

    calls = []
    for module, name in (speed, "main"), (race, "twins"), (report, "main"):
        monkeypatch.setattr(module, name, lambda *a, name=f"{module.__name__}.{name}", **k: calls.append(name))
    monkeypatch.setattr(race, "article", missing)
    bench.main(tmp_path, device="cpu")
    assert calls == ["benchmarks.speed.main", "benchmarks.race.twins", "benchmarks.report.main"]
    assert "no race on tiny Shakespeare: cannot fetch tinyshakespeare" in capsys.readouterr().out
