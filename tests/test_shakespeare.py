"""Lesson 16: the parts, and the command as a person would try it, in an empty folder."""

import io
import multiprocessing
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from classroom.hidden import shakespeare as hidden
from makemoe import shakespeare
from makemoe.checkpoints import load_checkpoint
from makemoe.checks import shakespeare as checks
from makemoe.model import MoEConfig, SparseMoELanguageModel
from makemoe.shakespeare import PRESETS, RESULTS, Run, hold, least_memory, main, mlflow_log, run_training
from makemoe.training import TrainConfig

ROOT = Path(__file__).parent.parent
PLAY = "KING:\nTo be, or not to be, that is the question.\n\n" * 80
MODEL = MoEConfig(n_layer=1, n_embd=16, n_head=2, n_hidden=16, block_size=16)
SHORT = TrainConfig(steps=4, batch_size=4, eval_every=2, eval_blocks=4)
TINY = (
    "--n-layer 1 --n-embd 16 --n-head 2 --n-hidden 16 --block-size 16 --batch-size 4 --eval-blocks 4 "
    "--steps 4 --eval-every 2 --device cpu --data play.txt"
).split()


@pytest.mark.parametrize("name", ["write", "new_folder", "held_out_loss"])
def test_the_exercises_of_the_lesson(name):
    for module in checks, hidden:
        if check := getattr(module, f"check_{name}", None):
            check(getattr(shakespeare, name))


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    "An empty folder with a text in it, where the command is given; MLflow writes beside it."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shakespeare, "PROJECT", tmp_path)
    Path("play.txt").write_text(PLAY, encoding="utf-8")
    return tmp_path


@pytest.fixture
def complete():
    "For a test that wants all that a run leaves."


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    "Pictures and samples take seconds: other tests do with empty pictures and a few characters."
    if "complete" in request.fixturenames:
        return
    real = shakespeare.write
    monkeypatch.setattr(
        shakespeare, "draw_history", lambda _, folder: [(folder / f"{name}.png").touch() for name in ("loss", "load")]
    )
    monkeypatch.setattr(shakespeare, "write", lambda *four, **settings: real(*four[:3], min(four[3], 60), **settings))


@pytest.fixture
def here(monkeypatch, capsys):
    "The command in this process, which has imported everything: (status, what it said, what it complained of)."

    def run(*words):
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["makemoe", *map(str, words)])
        try:
            status = main()
        except SystemExit as leave:
            status = leave.code
        return status or 0, *capsys.readouterr()

    return run


def started(*words):
    "The command as a process of its own."
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, "-m", "makemoe", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def complaint(status, said, complained):
    "What a mistake gets: status 2 and one line, and no run folder is left."
    assert status == 2 and complained.startswith("makemoe: ") and complained.count("\n") == 1, (status, complained)
    assert not any(path.is_dir() for path in Path("runs").glob("*"))
    return complained


def test_training_leaves_all_results_and_says_where(here, complete):
    status, said, complained = here("train", "laptop", *TINY, "--steps", "40", "--eval-every", "20", "--lr", "0.01")
    assert (status, complained) == (0, "")
    assert {path.name for path in Path("runs/laptop").iterdir()} == set(RESULTS)
    assert all(
        os.path.join("runs", "laptop", name) in said and Path("runs/laptop", name).stat().st_size for name in RESULTS
    )
    sample = Path("runs/laptop/sample.txt").read_text(encoding="utf-8")
    assert len(sample) == 1001 and sample.strip() in said
    lines = [line for line in said.splitlines() if line.startswith("step ")]
    assert [int(line.split()[1][:-1]) for line in lines] == [0, 20, 40]
    pattern = r": \d+ s, train \d\.\d{3}, val \d\.\d{3}, imbalance \d\.\d\d, dropped 0\.0%$"
    assert all(re.search(pattern, line) for line in lines)
    assert re.search(r"loss on the whole held-out tenth: \d\.\d{4} nats per token", said)

    model, tokenizer, history = load_checkpoint("runs/laptop")
    assert (model.config.n_layer, model.config.n_embd, model.config.block_size) == (1, 16, 16)
    assert tokenizer.characters == "".join(sorted(set(PLAY)))
    assert history[-1]["step"] == 40 and history[-1]["val_loss"] < history[0]["val_loss"]

    for where in [], ["--checkpoint", "runs/laptop"], ["--checkpoint", "runs/laptop/model.safetensors"]:
        status, said, _ = here("generate", "--num-tokens", "60", "--seed", "3", "--prompt", "KING:", *where)
        assert status == 0 and said.startswith("KING:") and len(said) == len("KING:") + 60 + 1
    assert "'é'" in here("generate", "--prompt", "KING: é")[2]
    assert "num_tokens is -1, but must be 0 or more" in here("generate", "--num-tokens", "-1")[2]
    os.makedirs("runs/exp/lr1")
    os.replace("runs/laptop/model.safetensors", "runs/exp/lr1/model.safetensors")
    assert here("generate", "--num-tokens", "1")[0] == 0, "the newest below runs may be in a folder in a folder"


def test_the_optimizer_is_a_choice(here):
    assert here("train", "laptop", *TINY, "--optimizer", "muon")[0] == 0
    assert "'sgd'" in here("train", "laptop", *TINY, "--optimizer", "sgd")[2]


def test_every_field_of_the_configs_is_an_option(here):
    text = here("train", "gpu", "--help")[1]
    names = [field.name for config in (MoEConfig, TrainConfig) for field in fields(config)] + ["optimizer", "resume"]
    missing = [name for name in names if f"--{name.replace('_', '-')}" not in text]
    assert not missing and set(PRESETS) == {"laptop", "gpu", "blog", "switch"}
    assert "(default: 384)" in text, "the options start from the preset"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--data", "nowhere.txt"], "no file nowhere.txt"),
        (["--block-size", "400"], "play.txt is too short: it has 4000 characters"),
        (["--prompt", "Zoë:"], "'Z', 'ë'"),
        (["--seed", str(2**64)], "seed is 18446744073709551616, but must be below 2**64"),
        (["--device", "gpu"], "there is no device 'gpu' here, only cpu"),
        (["--device", "meta"], "there is no device 'meta' here, only cpu"),
        (["--device", "cuda:99"], "there is no device 'cuda:99' here, only cpu"),
        (["--n-embd", "10000000"], "of memory, and there are"),
        (["--batch-size", "100000000"], "of memory, and there are"),
        *(
            (["--name", name], "a run cannot have the name")
            for name in ("", ".", "..", "x/", "/tmp/x", "../x", "a/../b", "a//b", "a\nb", "C:x", "a\\b", " ", "n" * 300)
        ),
    ],
)
def test_what_can_be_known_before_the_first_step_is_said_before_it(here, words, message):
    status, said, complained = here("train", "laptop", *TINY, *words)
    assert message in complaint(status, said, complained)
    assert "step 0" not in said and not Path("runs").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "laptop", "--top-k", "9"], "top_k = 9 experts per token, but there are only num_experts = 8"),
        (["train", "laptop", "--n-hidden", str(10**40)], "n_hidden is 1"),
        (["train", "laptop", "--n-hidden", str(10**400)], "n_hidden is 1"),
        (["train", "laptop", "--steps", "0"], "steps is 0, but must be at least 1"),
        (["generate", "--checkpoint", "nowhere"], "no checkpoint nowhere"),
        (["generate"], "no model below runs yet"),
        (["generate", "--device", "cuda:99"], "there is no device 'cuda:99' here"),
    ],
)
def test_other_mistakes_are_named_too(here, words, message):
    status, _, complained = here(*words)
    assert status == 2 and message in " ".join(complained.replace("│", " ").split())


def test_a_text_without_a_new_line_will_do(here):
    Path("text8").write_text("anarchism originated as a term of abuse first used against early radicals " * 60)
    assert here("train", "laptop", *TINY, "--data", "text8")[::2] == (0, "")
    assert Path("runs/laptop/sample.txt").read_text()[0] == " "
    assert here("generate", "--num-tokens", "5")[0] == 0


def test_too_little_memory_is_one_line(here, monkeypatch):
    def no_memory(*_, **__):
        raise error

    monkeypatch.setattr(shakespeare, "train", no_memory)
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory.\nTried to"),
        RuntimeError("can't allocate memory"),
    ):
        assert "out of memory: a smaller --batch-size" in complaint(*here("train", "laptop", *TINY))
    error = RuntimeError("a mistake of ours")
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        here("train", "laptop", *TINY)


def test_the_least_memory_counts_the_weights():
    for config in MODEL, PRESETS["laptop"].model, replace(PRESETS["gpu"].model, router="noisy", bias=True):
        with torch.device("meta"):
            weights = sum(weight.numel() for weight in SparseMoELanguageModel(config).parameters())
        assert 0.9 < least_memory(config, 0) / (16 * weights) <= 1


def test_a_full_disk_names_the_folder(here, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shakespeare, "text_to_html", full)
    status, _, complained = here("train", "laptop", *TINY)
    assert (status, complained) == (2, "makemoe: cannot write all results to runs/laptop (No space left on device)\n")
    monkeypatch.setattr(shakespeare, "text_to_html", lambda *_: "written")
    status, said, _ = here("train", "laptop", *TINY, "--resume")
    assert status == 0 and "going on with runs/laptop at step 4" in said


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_what_a_console_cannot_show_is_replaced(monkeypatch, encoding):
    Path("zh.txt").write_text(
        "\u5e8a\u524d\u660e\u6708\u5149\uff0c\u7591\u662f\u5730\u4e0a\u971c\u3002\n" * 200, encoding="utf-8"
    )
    for words in ["train", "laptop", *TINY, "--data", "zh.txt"], ["generate", "--num-tokens", "20"]:
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "argv", ["makemoe", *words])
        assert main() is None
        assert b"?" in out.buffer.getvalue()
    assert "\u6708" in Path("runs/laptop/sample.txt").read_text(encoding="utf-8")


def test_the_held_out_text_is_bounded_and_its_progress_can_be_seen(here, monkeypatch):
    monkeypatch.setattr(shakespeare.held_out_loss, "__defaults__", (256, iter))
    Path("long.txt").write_text(PLAY * 30)
    said = here("train", "laptop", *TINY, "--data", "long.txt")[1]
    assert "the held-out text is read once more\nloss on 256 contexts of the held-out tenth" in said


def test_a_lock_holds_for_others_and_ends(tmp_path):
    with hold(tmp_path, "busy"):
        with pytest.raises(ValueError, match="busy"), hold(tmp_path, "busy"):
            pass
    with hold(tmp_path, "busy"), hold(tmp_path.parent, "busy"):
        pass


# ---- processes of their own


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_while_it_imports_is_one_line():
    process = started("generate")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    said, complained = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT) and said == "" and "Traceback" not in complained
    assert complained in ("makemoe: stopped\n", "")


@pytest.mark.skipif(os.name == "nt", reason="closes a pipe early")
def test_a_reader_that_has_had_enough_is_no_error():
    process = started("generate", "--checkpoint", str(ROOT / "data" / "lab.safetensors"), "--num-tokens", "2000")
    process.stdout.read(20)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=60) == 141
    process.stderr.close()


def test_the_command_leaves_a_page_and_makes_one_of_a_checkpoint():
    said, complained = started("train", "laptop", *TINY, "--moments", "2").communicate(timeout=120)
    assert os.path.join("runs", "laptop", "page.html") in said and complained == ""
    steps = [int(path.stem.removeprefix("step ")) for path in sorted(Path("runs/laptop/moments").iterdir())]
    assert len(steps) == 2 and steps[0] == 0
    assert "<html" in Path("runs/laptop/page.html").read_text(encoding="utf-8")
    for words in [], ["runs/laptop", "--weights", "float32", "--out", "other.html"]:
        said, complained = started("page", *words).communicate(timeout=120)
        assert re.fullmatch(r"(page|other).html: \d\.\d MB\n", said) and complained == ""
    assert Path("other.html").stat().st_size > Path("page.html").stat().st_size


def test_a_result_that_cannot_be_made_does_not_spoil_the_others(here, monkeypatch):
    def cannot(path, model, tokenizer, text):
        assert text == PLAY[-400:]
        raise ValueError("this model is too new")

    monkeypatch.setitem(shakespeare.MORE_RESULTS, "page.html", cannot)
    status, said, _ = here("train", "laptop", *TINY)
    assert status == 0 and "no page.html: this model is too new\n" in said and "sample.html: " in said


# ---- MLflow


PARAMS = {"data": "play.txt"}


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    "The bytes of a database with one run in it."
    root = tmp_path_factory.mktemp("log")
    mlflow_log(root, "first", PARAMS)
    return (root / "mlflow.db").read_bytes()


@pytest.fixture
def client(tmp_path, database):
    from mlflow import MlflowClient

    (tmp_path / "mlflow.db").write_bytes(database)
    return MlflowClient(f"sqlite:///{tmp_path.as_posix()}/mlflow.db")


def runs_of(client):
    return client.search_runs([client.get_experiment_by_name("makemoe").experiment_id])


RUN = Run(MODEL, SHORT, "tuesday", data="play.txt", device="cpu", mlflow=True)


def test_mlflow_gets_settings_metrics_pictures_sample_and_the_place_of_the_checkpoint(client, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "0123456789abcdef0123456789abcdef")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "77")
    run_training(RUN)
    logged = runs_of(client)[0]
    assert (logged.info.run_name, logged.info.status) == ("tuesday", "FINISHED")
    for name, value in {**asdict(replace(MODEL, vocab_size=22)), **asdict(SHORT), "optimizer": "adamw"}.items():
        assert logged.data.params[name] == str(value)
    assert logged.data.params["checkpoint"] == str(tmp_path / "runs" / "tuesday" / "model.safetensors")
    assert {"train_loss", "val_loss", "seconds", "tokens_per_second", "imbalance_0", "dropped_0"} == set(
        logged.data.metrics
    )
    assert [point.step for point in client.get_metric_history(logged.info.run_id, "val_loss")] == [0, 2, 4]
    files = list(tmp_path.glob(f"**/{logged.info.run_id}/artifacts/*")) or client.list_artifacts(logged.info.run_id)
    assert {Path(getattr(file, "path", file)).name for file in files} == set(RESULTS) - {"model.safetensors"}


def break_database(root, how, database):
    "Spoil the database, and return what has to be closed afterwards."
    file = root / "mlflow.db"
    file.write_bytes(database)
    if how == "text":
        file.write_text("no database, but a long text " * 99)
    elif how == "cut":
        file.write_bytes(database[: len(database) // 2])
    elif how == "a folder":
        file.unlink()
        file.mkdir()
    elif how in ("locked", "newer"):
        connection = sqlite3.connect(file, isolation_level=None)
        connection.execute(
            "BEGIN EXCLUSIVE" if how == "locked" else "UPDATE alembic_version SET version_num = 'future'"
        )
        return connection
    elif how == "read-only":
        os.chmod(file, 0o400)


@pytest.mark.parametrize(
    "how, says",
    [
        ("text", "not a database"),
        ("cut", "damaged|malformed"),
        ("a folder", "unable to open"),
        ("locked", "locked"),
        ("newer", "future"),
        ("read-only", "readonly"),
    ],
)
def test_mlflow_that_cannot_begin_is_one_line_before_the_first_step(here, tmp_path, database, how, says):
    if how == "read-only" and os.name == "posix" and os.geteuid() == 0:
        pytest.skip("root may write everything")
    spoiled, began = break_database(tmp_path, how, database), time.perf_counter()
    status, said, complained = here("train", "laptop", *TINY, "--mlflow")
    if spoiled:
        spoiled.close()
    assert re.search(
        rf"cannot log to {tmp_path}/mlflow.db .*({says}).*train without --mlflow", complaint(status, said, complained)
    )
    assert "step 0" not in said and time.perf_counter() - began < 15


@pytest.mark.parametrize("name", ["what?", "100%20"])
def test_mlflow_misreads_some_paths(here, tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.setattr(shakespeare, "PROJECT", tmp_path / name)
    assert "MLflow misreads a path with ? or %" in complaint(*here("train", "laptop", *TINY, "--mlflow"))


def test_without_mlflow_installed_it_is_one_line(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert "mlflow" in complaint(*here("train", "laptop", *TINY, "--mlflow"))


def test_a_deleted_experiment_comes_back(client):
    client.delete_experiment(client.get_experiment_by_name("makemoe").experiment_id)
    run_training(RUN)
    assert {run.info.run_name for run in runs_of(client)} >= {"tuesday"}


@pytest.mark.parametrize("how", ["text", "a folder"])
def test_a_training_does_not_end_because_its_log_does(client, tmp_path, capsys, monkeypatch, database, how):
    class Spoiler(dict):
        def __getitem__(self, key):
            if key == "tokens_per_second" and self["step"] == 2:
                break_database(tmp_path, how, database)
            return super().__getitem__(key)

    real = shakespeare.train
    monkeypatch.setattr(
        shakespeare,
        "train",
        lambda *arguments: real(*arguments[:5], lambda record: arguments[5](Spoiler(record)), arguments[6]),
    )
    run_training(RUN)
    said, complained = capsys.readouterr()
    assert "runs/tuesday/sample.html" in said
    assert complained.count("MLflow failed") == complained.count("\n") == 1, complained


def test_a_resumed_training_goes_on_in_its_own_mlflow_run_wherever_it_stands(client, tmp_path, monkeypatch):
    real = shakespeare.finish

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shakespeare, "finish", stop)
    for folder in "one", "two":
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        with pytest.raises(SystemExit, match="130"):
            run_training(replace(RUN, data="../play.txt"))
    monkeypatch.setattr(shakespeare, "finish", real)
    monkeypatch.chdir(tmp_path / "one")
    ids = {run.data.params["checkpoint"]: run.info.run_id for run in runs_of(client) if run.info.run_name == "tuesday"}
    run_training(replace(RUN, data="../play.txt", resume=True))
    ended = {run.info.run_id: run.info.status for run in runs_of(client)}
    assert [ended[ids[str(tmp_path / folder / "runs/tuesday/model.safetensors")]] for folder in ("one", "two")] == [
        "FINISHED",
        "KILLED",
    ]
    assert len(ended) == 3


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="forks")
def test_two_first_runs_at_once_both_log(tmp_path, database):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=mlflow_log, args=(tmp_path, name, PARAMS)) for name in ("one", "two")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (2,)
