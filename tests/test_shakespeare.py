"""Lesson 13. The parts, and then the command, as a person would try it: in an empty folder, mostly as a process of its own."""

import functools
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from makemoe import shakespeare
from makemoe.data import CharTokenizer
from makemoe.generation import generate, stream
from makemoe.lab import seed_everything
from makemoe.model import MoEConfig, SparseMoELanguageModel
from makemoe.shakespeare import PRESETS, RESULTS, Run, main, new_folder, run_training, write
from makemoe.training import TrainConfig, load_checkpoint, mlflow_run

ROOT = Path(__file__).parent.parent
TINY = "--n-layer 1 --n-embd 16 --n-head 2 --n-hidden 16 --block-size 16 --batch-size 8 --eval-blocks 8".split()


def makemoe(*words, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "MPLBACKEND": "agg"}
    command = [sys.executable, "-m", "makemoe", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_a_new_folder_has_the_first_name_that_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [new_folder("a") for _ in range(11)] == [Path("runs", name) for name in ["a"] + [f"a-{i}" for i in range(2, 12)]]
    Path("runs/a-3").rmdir()
    Path("runs/file").touch()
    Path("runs/a/model").touch()
    for name, folder in ("a", "a-3"), ("a", "a-12"), ("a-2", "a-2-2"), ("b", "b"), ("file", "file-2"), ("v1.5", "v1.5"), ("v1.5", "v1.5-2"), ("[a]", "[a]"):
        before = set(Path("runs").iterdir())
        assert new_folder(name) == Path("runs", folder)
        assert set(Path("runs").iterdir()) - before == {Path("runs", folder)}
    assert Path("runs/a/model").exists()
    monkeypatch.chdir(new_folder("elsewhere"))
    assert new_folder("a") == Path("runs/a") and Path("runs/a").is_dir()


LETTERS = CharTokenizer("To be, or not to be\n")


def untrained(**changes):
    "A model of three small layers, in training mode, that likes some letters better than others."
    config = MoEConfig(LETTERS.vocab_size, block_size=12, n_embd=16, n_head=2, n_layer=3, n_hidden=16, dropout=0.2)
    model = SparseMoELanguageModel(replace(config, **changes))
    model.lm_head.weight.data *= 50
    return model


SETTINGS = [dict(seed=5), dict(temperature=0), dict(temperature=0.5, seed=5), dict(top_k=2, seed=5), dict(top_p=0.5, seed=5), {}]


@pytest.mark.parametrize("prompt", ["o\n", "To be, or not to be"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_write_gives_the_text_of_generate_over_several_blocks(prompt, settings):
    model, ids = untrained(), LETTERS.encode(prompt)
    new = generate(model, ids[None], 30, **settings)[0, len(ids):]
    seed_everything(1337)
    model = untrained()
    assert "".join(character for character, _ in write(model, LETTERS, prompt, 30, **settings)) == LETTERS.decode(new)
    assert model.training
    model.eval()
    assert [len(character) for character, _ in write(model, LETTERS, prompt, 3)] == [1, 1, 1]
    assert not model.training


@pytest.mark.parametrize("n_layer", [1, 3])
def test_write_names_the_expert_of_the_last_layer_that_made_the_prediction(n_layer):
    model = untrained(n_layer=n_layer, block_size=40)
    written = list(write(model, LETTERS, "To be", 35, seed=5))
    ids = LETTERS.encode("To be" + "".join(character for character, _ in written))
    with torch.no_grad():  # an uncached forward pass over the whole text
        gates = model.eval()(ids[None]).routings[-1].gates[0]
    assert [expert for _, expert in written] == gates.argmax(-1)[4:-1].tolist()
    assert {type(expert) for _, expert in written} == {int}


def test_an_expert_that_dropped_the_token_did_not_write():
    model, favourite_was_full = untrained(num_experts=3, capacity_factor=0.1, eval_capacity_factor=0.1), 0
    for n in range(5, 19):
        prompt = "To be, or not to be"[:n]
        written = list(write(model, LETTERS, prompt, 20, seed=5))
        for (_, expert), (_, routings) in zip(written, stream(model, LETTERS.encode(prompt)[None], 20, seed=5), strict=True):
            gates, logits = routings[-1].gates[0, -1], routings[-1].logits[0, -1]
            assert_close(gates[expert], gates.max())
            favourite_was_full += int(gates.max() > 0 and gates.argmax() != logits.argmax())
    assert favourite_was_full


def test_write_hands_out_each_character_as_soon_as_it_is_there_and_leaves_other_dice_alone():
    model, passes, before = untrained(), [], torch.get_rng_state()
    model.register_forward_hook(lambda *_: passes.append(1))
    writing = iter(write(model, LETTERS, "To be", 30, seed=5))
    first = next(writing)
    assert len(passes) < 30
    assert len([first, *writing]) == 30
    assert torch.equal(torch.get_rng_state(), before)
    assert list(write(model, LETTERS, "To be", 0)) == []


def test_write_refuses_a_prompt_outside_of_the_vocabulary():
    with pytest.raises(ValueError, match="'x'"):
        list(write(untrained(), LETTERS, "To be x", 3))


@pytest.fixture
def here(monkeypatch, capsys):
    "The same command in this process, which has started already."
    def run(*words, folder):
        monkeypatch.chdir(folder)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["makemoe", *words])
        try:
            status = main()
        except SystemExit as leave:
            status = leave.code
        return subprocess.CompletedProcess(words, status or 0, *capsys.readouterr())
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A folder in which a tiny model was trained on a text of its own, and what the command said."
    folder = tmp_path_factory.mktemp("trained")
    (folder / "play.txt").write_text("KING:\nTo be, or not to be, that is the question.\n\n" * 200, encoding="utf-8")
    done = makemoe("train", "laptop", *TINY, "--steps", "40", "--eval-every", "20", "--data", "play.txt", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_training_leaves_all_results_and_says_where(trained):
    folder, done = trained
    for name in RESULTS:
        assert (folder / "runs" / "laptop" / name).stat().st_size > 0
        assert os.path.join("runs", "laptop", name) in done.stdout
    assert {path.name for path in (folder / "runs" / "laptop").iterdir()} == set(RESULTS)
    sample = (folder / "runs" / "laptop" / "sample.txt").read_text(encoding="utf-8")
    assert len(sample) == 1001 and sample.strip() in done.stdout


def test_the_checkpoint_is_the_model_that_was_asked_for(trained):
    model, tokenizer, history = load_checkpoint(trained[0] / "runs" / "laptop" / "model.safetensors")
    assert (model.config.n_layer, model.config.n_embd, model.config.block_size) == (1, 16, 16)
    assert "".join(sorted(set("KING:\nTo be, or not to be, that is the question.\n\n"))) == tokenizer.characters
    assert [record["step"] for record in history] == [0, 20, 40]
    assert history[-1]["val_loss"] < history[0]["val_loss"]


def test_generation_streams_and_repeats_with_a_seed(trained, here):
    words = ["generate", "--num-tokens", "60", "--seed", "3", "--prompt", "KING:"]
    first, second = (command(*words, folder=trained[0]) for command in (makemoe, here))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.startswith("KING:") and len(first.stdout) == len("KING:") + 60 + 1


@pytest.mark.parametrize("words, message", [
    (["train", "laptop", "--data", "nowhere.txt"], "no file nowhere.txt"),
    (["train", "laptop", "--data", "short.txt"], "short.txt is too short"),
    (["train", "laptop", "--top-k", "9"], "top_k = 9 experts per token, but there are only num_experts = 8"),
    (["train", "laptop", "--steps", "0"], "steps is 0, but must be at least 1"),
    (["generate", "--checkpoint", "nowhere"], "no checkpoint nowhere"),
    (["generate"], "no model below runs yet"),
])
def test_mistakes_get_one_clear_message_and_status_2(words, message, tmp_path, here):
    (tmp_path / "short.txt").write_text("To be", encoding="utf-8")
    done = here(*words, folder=tmp_path)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert not (tmp_path / "runs").exists(), "a mistake leaves no empty folder behind"


def test_a_prompt_outside_of_the_vocabulary_is_refused(trained):
    done = makemoe("generate", "--prompt", "KING: é", folder=trained[0])
    assert done.returncode == 2 and "'é'" in done.stderr and "Traceback" not in done.stderr


def test_every_field_of_the_configs_is_an_option(tmp_path, here):
    text = here("train", "gpu", "--help", folder=tmp_path).stdout
    for config in MoEConfig, TrainConfig:
        for field in fields(config):
            assert f"--{field.name.replace('_', '-')}" in text, f"{field.name} is not an option"
    assert set(PRESETS) == {"laptop", "gpu", "blog"}
    assert "(default: 384)" in text, "the options start from the preset"


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_saves_and_says_how_to_go_on(trained, tmp_path):
    def started(command):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    process = started([sys.executable, "-m", "makemoe", "train", "laptop", *TINY, "--steps", "1000000", "--eval-every", "20",
                       "--data", str(trained[0] / "play.txt")])
    next(line for line in process.stdout if line.startswith("step 20:"))
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    checkpoint = Path("runs/laptop/model.safetensors")
    assert "stopped" in said and str(checkpoint) in said
    load_checkpoint(tmp_path / checkpoint)

    process = started(shlex.split(said.splitlines()[-1].removeprefix("to go on: ")))
    line = next(line for line in process.stdout if "going on" in line)
    process.kill()
    process.communicate(timeout=120)
    assert int(line.split()[-1]) >= 20


def test_mlflow_gets_settings_metrics_pictures_sample_and_the_place_of_the_checkpoint(trained, tmp_path, monkeypatch, capsys):
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shakespeare, "mlflow_run", functools.partial(mlflow_run, folder=tmp_path / "log"))
    model = MoEConfig(n_layer=1, n_embd=16, n_head=2, n_hidden=16, block_size=16)
    config = TrainConfig(steps=4, batch_size=4, eval_every=2, eval_blocks=4)
    run_training(Run(model, config, "tuesday", data=str(trained[0] / "play.txt"), device="cpu", mlflow=True))
    client = MlflowClient(f"sqlite:///{(tmp_path / 'log').as_posix()}/mlflow.db")
    logged, = client.search_runs([client.get_experiment_by_name("makemoe").experiment_id])
    assert (logged.info.run_name, logged.info.status) == ("tuesday", "FINISHED")
    for name, value in {**asdict(replace(model, vocab_size=22)), **asdict(config)}.items():
        assert logged.data.params[name] == str(value)
    assert logged.data.params["checkpoint"] == str(tmp_path / "runs" / "tuesday" / "model.safetensors")
    assert {"train_loss", "val_loss", "seconds", "tokens_per_second", "imbalance_0", "dropped_0"} == set(logged.data.metrics)
    assert [point.step for point in client.get_metric_history(logged.info.run_id, "val_loss")] == [0, 2, 4]
    files = tmp_path / "log" / "mlruns" / logged.info.run_id / "artifacts"
    assert {path.name for path in files.iterdir()} == set(RESULTS) - {"model.safetensors"}


def test_progress_without_a_terminal_has_a_line_for_each_evaluation(trained):
    lines = [line for line in trained[1].stdout.splitlines() if line.startswith("step ")]
    assert [int(line.split()[1][:-1]) for line in lines] == [0, 20, 40]
    assert all(re.search(r": \d+ s, train \d\.\d{3}, val \d\.\d{3}, imbalance \d\.\d\d, dropped 0\.0%$", line) for line in lines)
