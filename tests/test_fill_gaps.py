"""Lesson 30. The checks, gaps that depend on nothing but the text, and the command that trains and fills."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close

import classroom.hidden.fill_gaps as hidden
import makemoe.checks.fill_gaps as checks
import makemoe.fill_gaps as ours
from makemoe import shakespeare
from makemoe.checkpoints import load_checkpoint, load_training, save_checkpoint
from makemoe.data import CharTokenizer
from makemoe.fill_gaps import EXAMPLE, GAP, GapConfig, GapFiller, GapRun, fill, gap_source, swapped_loss
from makemoe.model import MODELS, count_parameters
from makemoe.optimizers import OPTIMIZERS
from makemoe.page import make_page
from makemoe.shakespeare import PRESETS, find_prompt, main, run_training
from makemoe.training import TrainConfig, TrainState, estimate_loss, train

PLAY = "KING:\nTo be, or not to be, that is the question.\n\n" * 60
LETTERS = CharTokenizer(PLAY)
IDS = LETTERS.encode(PLAY)
SIZES = {"block_size": 16, "n_embd": 16, "n_head": 2, "n_hidden": 16, "num_experts": 4}
TINY = "--block-size 16 --n-embd 16 --n-head 2 --n-hidden 16 --num-experts 4 --batch-size 4 --eval-blocks 4".split()
TINY += "--steps 6 --eval-every 2 --device cpu --data play.txt".split()


@pytest.mark.parametrize("place", [checks, hidden])
@pytest.mark.parametrize("name", ["swapped_loss", "gap_source", "fill"])
def test_the_module_passes_the_checks_of_the_lesson(place, name):
    getattr(place, f"check_{name}")(getattr(ours, name))


def small(**sizes):
    return GapFiller(GapConfig(**{"vocab_size": LETTERS.vocab_size} | SIZES | sizes)).eval()


def texts(rows=6):
    return IDS[torch.arange(rows)[:, None] * 5 + torch.arange(16)]


def written(model, text, *numbers, **how):
    return "".join(character for character, _ in fill(model, LETTERS, text, *numbers, **how))


@settings(max_examples=15)
@given(
    st.lists(st.text(LETTERS.characters, max_size=30), min_size=1, max_size=5), st.integers(0, 9), st.integers(0, 99)
)
def test_filling_changes_no_character_that_was_given(pieces, num_tokens, seed):
    torch.manual_seed(seed)
    model, text = small(), GAP.join(pieces)
    model.transformer.lm_head.weight.data[34:] *= 30  # letters, not marks
    pairs = list(fill(model, LETTERS, text, num_tokens, temperature=1.0, seed=seed))
    assert "".join(c for c, expert in pairs if expert is None) == "".join(pieces)
    new = [expert for _, expert in pairs if expert is not None]
    assert len(new) <= num_tokens * (len(pieces) - 1) and set(new) <= set(range(4))


def test_a_seed_writes_the_same_text_with_other_random_numbers_for_each_gap(monkeypatch):
    def letters_by_chance(source, num_tokens, seed=None, **how):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        letters = torch.randint(34, 34 + LETTERS.vocab_size, (1, num_tokens - 1), generator=generator)
        return torch.cat([torch.tensor([[0, 2]]), letters], dim=1)

    model = small()
    monkeypatch.setattr(model.transformer, "generate", letters_by_chance)
    one, same, other = (
        "".join(c for c, _ in shakespeare.compose(model, LETTERS, GAP * 2, 8, temperature=1.0, seed=seed))
        for seed in (1, 1, 2)
    )
    assert len(one) == 16 and one == same != other and one[:8] != one[8:]


def test_the_gaps_of_an_evaluation_depend_on_nothing_but_the_text():
    model, ids = small(), texts()
    source, labels, real = model.cut(ids)
    for row in range(len(ids)):
        torch.manual_seed(row)
        for alone in model.cut(ids[row : row + 1]), model.cut(ids[[row]].to(torch.uint8)):
            assert torch.equal(alone[0][0], source[row][real[row]]) and torch.equal(alone[1][0], labels[row])
    with torch.no_grad():
        losses = [model(text[None]).lm_loss for text in ids]
        assert_close(model(ids).lm_loss, torch.stack(losses).mean())
    assert estimate_loss(model, IDS, batch_size=3, blocks=9)[0] == pytest.approx(
        estimate_loss(model, IDS, batch_size=9, blocks=9)[0]
    )
    state = torch.get_rng_state()
    model(ids)
    assert torch.equal(torch.get_rng_state(), state), "an evaluation draws no random numbers"
    model.train()
    assert not torch.equal(model.cut(ids)[1], model.cut(ids)[1]), "in training there are new gaps each time"


def test_nothing_is_dropped_and_each_side_has_its_loads():
    model = small(rate=0.9, mean_span=1.0, num_experts=1)
    output = model(texts())
    assert len(output.routings) == model.config.n_layer == len(model.blocks) == 2
    assert all(routing.dropped == 0 for routing in output.routings)
    tokens = [int((part != pad).sum()) for part, pad in zip(model.cut(texts())[:2], (0, -100))]
    assert [routing.load.sum().item() for routing in output.routings] == tokens


def test_parameters_are_counted_and_a_dense_layer_is_no_block():
    model = small(num_layers=4, num_sparse=2)
    total, active = count_parameters(model)
    assert total == sum(weight.numel() for weight in model.parameters())
    assert total - active == 4 * 3 * (2 * 16 * 16)  # 4 sparse layers, 3 of 4 experts are not asked
    assert len(model.blocks) == 4 and MODELS[GapConfig] is GapFiller


def test_with_a_head_start_the_first_loss_is_that_of_guessing_and_near_comes_first():
    model = GapFiller(GapConfig(n_embd=64))
    assert model.eval()(torch.randint(64, (8, 64))).lm_loss.item() == pytest.approx(4.585, abs=0.05)
    for stack in model.transformer.encoder, model.transformer.decoder:
        bias = stack.positions(torch.tensor([50]), torch.arange(101))[0, :, 0]
        assert (bias[:, 50:51] > bias[:, :40]).all() and (stack.decoder or (bias[:, 50:51] > bias[:, 61:]).all())


def test_it_learns_to_read():
    ids = torch.randint(8, (2000,)).repeat_interleave(16)  # which letter is hidden, only the source can tell
    model = GapFiller(GapConfig(vocab_size=8, **SIZES | {"block_size": 8}))
    config = TrainConfig(steps=50, batch_size=16, lr=2e-2, warmup=10, eval_every=50, eval_blocks=4)
    train(model, ids, ids, config, state=TrainState(model, config, OPTIMIZERS["muon"](model, config)))
    source, labels, real = model.cut(ids.view(-1, 16)[:64, :8])
    own = model.transformer(source, labels=labels, real=real).lm_loss.item()
    assert own < 0.5 < swapped_loss(model.transformer, source, labels, real)


def test_a_saved_model_is_the_same_and_fills_the_same(tmp_path):
    model = small(num_layers=2, num_sparse=2, rate=0.3)
    save_checkpoint(tmp_path / "model.safetensors", model, LETTERS, [{"step": 3}])
    same, tokenizer, history = load_checkpoint(tmp_path / "model.safetensors")
    assert type(same) is GapFiller and same.config == model.config and history == [{"step": 3}]
    assert tokenizer.characters == LETTERS.characters and not same.training
    weights = same.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    for how in {}, {"temperature": 1.0, "seed": 3}:
        assert written(same, "To ___, or ___", 9, **how) == written(model, "To ___, or ___", 9, **how)
    with pytest.raises(ValueError, match="the page cannot run SwitchRouter") as problem:
        make_page(tmp_path / "model.safetensors", tmp_path / "page.html")
    assert "\n" not in str(problem.value)


# The command


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    "(status, stdout, stderr) of the command in a folder with a text, as `python -m makemoe` runs it; no pictures."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shakespeare, "draw_history", lambda *_: None)
    Path("play.txt").write_text(PLAY, encoding="utf-8")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["makemoe", *words])
        for out in sys.stdout, sys.stderr:
            monkeypatch.setattr(out, "reconfigure", lambda **_: None, raising=False)
        try:
            status = main() or 0
        except SystemExit as leave:
            status = leave.code
        return status, *capsys.readouterr()

    return run


def test_the_command_trains_fills_and_goes_on_to_the_same_bits(here, monkeypatch):
    status, said, complained = here("train", "switch", *TINY, "--prompt", "KING: To ___, or ___ be")
    assert (status, complained) == (0, "") and "nats per token" in said
    sample = Path("runs/switch/sample.txt").read_text(encoding="utf-8")
    assert sample.startswith("KING: To ") and sample.endswith(" be") and ", or " in sample and GAP not in sample
    whole = load_file("runs/switch/model.safetensors")

    words = ["generate", "--checkpoint", "runs/switch", "--seed", "1"]
    status, said, complained = here(*words, "--prompt", "To be, ___ not", "--num-tokens", "5")
    assert (
        (status, complained) == (0, "") and said.startswith("To be, ") and said.endswith(" not\n") and GAP not in said
    )
    assert len(said) <= len("To be, ") + 5 + len(" not\n")
    for prompt, reason in ("To be", "mark what is to be written with ___"), ("Zo___", "'Z'"):
        status, said, complained = here(*words, "--prompt", prompt)
        assert (status, said) == (2, "") and reason in complained and complained.count("\n") == 1

    run = GapRun(
        GapConfig(**SIZES), TrainConfig(6, 4, 1e-2, eval_every=2, eval_blocks=4), device="cpu", data="play.txt"
    )
    run = replace(run, name="stopped", prompt="KING: To ___, or ___ be")
    report = shakespeare.report

    def stop_after_2(save, tell, record):
        report(save, tell, record)
        if record["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(shakespeare, "report", stop_after_2)
    with pytest.raises(SystemExit):
        run_training(run)
    monkeypatch.setattr(shakespeare, "report", report)
    assert load_training("runs/stopped/model.safetensors")[1].step == 2
    run_training(replace(run, resume=True))
    resumed = load_file("runs/stopped/model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole if name != "history")
    assert Path("runs/stopped/sample.txt").read_text(encoding="utf-8") == sample


def test_a_mistake_is_one_line_before_the_first_step(here):
    for words, reason in (
        (["--prompt", "To be"], "the prompt has no gap: mark what is to be written with ___"),
        (["--prompt", "Zoë ___"], "'Z', 'ë'"),
        (["--block-size", "900"], "play.txt is too short"),
        (["--n-embd", "900000"], "of memory, and there are"),
    ):
        status, said, complained = here("train", "switch", *TINY, *words)
        assert status == 2 and reason in complained and complained.count("\n") == 1, (words, complained)
    assert here("train", "switch", *TINY, "--rate", "0")[0] == 2 and not Path("runs").exists()
    assert "--mean-span" in here("train", "switch", "--help")[1]


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ({"num_sparse": 0}, "num_sparse is 0, but must be a whole number of at least 1"),
        ({"num_layers": 3, "num_sparse": 2}, "num_sparse = 2 must divide num_layers = 3"),
        ({"num_layers": 10**9}, "num_layers is 1000000000"),
        ({"n_head": 3}, "n_embd = 128 channels cannot be divided among n_head = 3 heads"),
        ({"layout": "random"}, "layout is 'random'"),
        ({"rate": 0.0}, "rate is 0.0"),
        ({"rate": 1.0}, "rate is 1.0"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"mean_span": 0.5}, "mean_span is 0.5, but must be a number of at least 1"),
        ({"jitter": 1.0}, "jitter is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"balance_coef": float("inf")}, "balance_coef is inf"),
        ({"block_size": 1}, "block_size is 1, but must be a whole number of at least 2"),
        ({"block_size": 64.0}, "block_size is 64.0"),
    ],
)
def test_a_config_that_cannot_work_says_why_in_one_line_and_draws_nothing(wrong, reason):
    state = torch.get_rng_state()
    with pytest.raises(ValueError) as problem:
        GapConfig(**wrong)
    assert reason in str(problem.value) and "\n" not in str(problem.value)
    GapConfig(dropout=0, jitter=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_prompt_there_is_one_that_the_text_allows():
    config = PRESETS["switch"].model
    assert find_prompt(config, CharTokenizer(EXAMPLE), "") == EXAMPLE and EXAMPLE.count(GAP) > 1
    assert find_prompt(config, LETTERS, "") == GAP
    assert find_prompt(config, LETTERS, "To ___") == "To ___"
    assert gap_source(LETTERS, "", [""], 8).tolist() == [2]
