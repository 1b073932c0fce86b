"""Lesson 15: files are whole or not there, they are not believed, and a training goes on from them to the same bits."""

import json
import math
import os
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from classroom.hidden import checkpoints as hidden
from makemoe import checkpoints
from makemoe.checkpoints import (
    checksum,
    load_checkpoint,
    load_training,
    read_facts,
    save_checkpoint,
    save_training,
    write_file,
)
from makemoe.checks import checkpoints as checks
from makemoe.data import CharTokenizer
from makemoe.lab import seed_everything
from makemoe.model import MoEConfig, SparseMoELanguageModel, count_parameters
from makemoe.optimizers import OPTIMIZERS
from makemoe.training import TrainConfig, TrainState, estimate_loss, train

TOKENIZER = CharTokenizer("abcdefghijk")
TINY = MoEConfig(vocab_size=11, block_size=8, n_embd=16, n_head=2, n_layer=2, num_experts=4, top_k=2, n_hidden=16)
RESTLESS = replace(TINY, router="noisy", dropout=0.3)  # random wherever it may be
SHORT = TrainConfig(steps=7, batch_size=4, lr=0.01, warmup=2, eval_every=3, eval_blocks=4)
TEXTS = [torch.randint(11, (length,), generator=torch.Generator().manual_seed(length)) for length in (200, 90)]


def tiny_model(config=TINY):
    seed_everything(1337)
    return SparseMoELanguageModel(config)


def begin(config=RESTLESS, optimizer="adamw"):
    model = tiny_model(config)
    return model, TrainState(model, SHORT, OPTIMIZERS[optimizer](model, SHORT)), notes(optimizer)


def notes(optimizer="adamw", **more):
    return dict(train=asdict(SHORT), optimizer=optimizer, **more)


def run(model, state, stop=None):
    return train(
        model, *TEXTS, SHORT, state=state, on_step=lambda state, loss: setattr(state, "stop", state.step == stop)
    )


def timeless(history):
    "The records without what a clock measured."
    return [
        {key: value for key, value in record.items() if key not in ("seconds", "tokens_per_second")}
        for record in history
    ]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("of", [checks, hidden])
def test_checks(of):
    of.check_checksum(checksum)


# ---- a model comes back


@pytest.mark.parametrize("preset", ["laptop", "gpu", "blog"])
def test_checkpoint_gives_back_the_same_model_bit_for_bit(tmp_path, preset):
    text = 'Größe, "wörtlich"\n\u2029 ☃ to be'  # characters outside ASCII too
    tokenizer = CharTokenizer(text)
    small = dict(vocab_size=tokenizer.vocab_size, block_size=8, n_embd=24, n_layer=2, n_hidden=16)
    config = getattr(MoEConfig, preset)(**(small | ({"n_head": 4} if preset == "blog" else {})))
    model = SparseMoELanguageModel(config)
    history = [dict(step=0, seconds=0.1, train_loss=1 / 3, val_loss=math.inf, load=[[1, 2]])]
    path = tmp_path / "new folder" / "model.v1.5"
    save_checkpoint(path, model, tokenizer, history)
    assert model.training  # saving changes nothing
    numbers = torch.get_rng_state()
    loaded, same, again = load_checkpoint(str(path))
    assert torch.equal(torch.get_rng_state(), numbers), "loading draws no random numbers"
    assert not loaded.training and loaded.config == config
    assert same.characters == tokenizer.characters and same.decode(same.encode(text)) == text
    assert again == history
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    ids = tokenizer.encode(text)[None, :8]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def saved(tmp_path, model=None):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model or tiny_model(), TOKENIZER)
    return path


def test_a_loaded_model_can_be_trained_and_saved_over_its_own_file(tmp_path):
    path = saved(tmp_path)
    model, tokenizer, _ = load_checkpoint(path)
    history = train(model, *TEXTS, SHORT)
    save_checkpoint(path, model, tokenizer, history)
    again, _, records = load_checkpoint(path)
    assert equal(again, model) and records == history
    assert estimate_loss(again, TEXTS[1], 4, 4)[0] == history[-1]["val_loss"]


def test_nothing_of_a_file_stays_open(tmp_path):
    path = saved(tmp_path)
    model, _, _ = load_checkpoint(path)
    before = model.lm_head.weight.clone()
    path.write_bytes(bytes(path.stat().st_size))  # a mapped file would change the weights
    assert torch.equal(model.lm_head.weight, before)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) not in maps.read_text()


def test_tied_weights_are_saved_once_and_come_back_tied(tmp_path):
    model, state, told = begin(TINY)
    model.lm_head.weight = model.token_embedding.weight
    state = TrainState(model, SHORT)
    run(model, state, stop=3)
    save_training(tmp_path / "m", model, state, TOKENIZER, told)
    again, resumed, _, _ = load_training(tmp_path / "m")
    assert again.lm_head.weight is again.token_embedding.weight
    assert count_parameters(again) == count_parameters(model)
    state.stop = False
    run(model, state)
    run(again, resumed)
    assert equal(again, model)


def test_a_compiled_model_can_be_saved_whole_or_in_part(tmp_path):
    model = tiny_model()
    save_checkpoint(tmp_path / "m", torch.compile(model), TOKENIZER)
    assert equal(load_checkpoint(tmp_path / "m")[0], model)
    model.blocks[1] = torch.compile(model.blocks[1])
    save_checkpoint(tmp_path / "m", model, TOKENIZER)
    assert equal(load_checkpoint(tmp_path / "m")[0], model)


def test_a_model_in_bfloat16_stays_so(tmp_path):
    model = tiny_model().bfloat16()
    loaded, _, _ = load_checkpoint(saved(tmp_path, model))
    assert loaded.lm_head.weight.dtype == torch.bfloat16 and equal(loaded, model)


def test_a_history_of_many_evaluations_can_be_saved_and_the_header_stays_short(tmp_path):
    record = dict(step=0, load=[[123456] * 64] * 12, val_loss=1.2345678901234)  # 17,000 of them have 100 MB
    save_checkpoint(tmp_path / "m", tiny_model(), TOKENIZER, [record] * 500)
    assert len(load_checkpoint(tmp_path / "m")[2]) == 500
    assert len(json.dumps(read_facts(tmp_path / "m"))) < 2000


def test_the_model_that_comes_with_the_project_loads():
    model, tokenizer, history = load_checkpoint(Path(__file__).parent.parent / "data" / "lab.safetensors")
    assert model.config.vocab_size == tokenizer.vocab_size == 64 and len(history) > 2


def test_files_of_version_1_load_without_checksum(tmp_path):
    model, path = tiny_model(), tmp_path / "old"
    gone = dict(priority="position", importance_coef=0.0)
    facts = dict(config=asdict(TINY) | gone, characters=TOKENIZER.characters, history=[dict(step=0)])
    for version in {}, dict(version=1):
        save_file(model.state_dict(), path, metadata={"makemoe": json.dumps(facts | version)})
        loaded, _, history = load_checkpoint(path)
        assert equal(loaded, model) and history == [dict(step=0)]
    facts["config"]["priority"] = "choice"  # what it did is gone: better say so
    save_file(model.state_dict(), path, metadata={"makemoe": json.dumps(facts)})
    refused(path, "does not fit this version of makemoe .*priority")


# ---- all of it, or nothing


def test_a_crash_at_any_byte_of_a_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    "Every write ends after some bytes, as the power fails: then nothing else happens, not even tidying up."
    path = saved(tmp_path)
    before = path.read_bytes()
    for cut in [0, 1, 7, 8, 9, 500, len(before) // 2, len(before) - 1, len(before), None]:
        with monkeypatch.context() as power:

            def open_until_the_cut(name, mode, cut=cut):
                file = open(name, mode)
                file.write, whole = (lambda content: [whole(content[:cut]), file.close(), fail()]), file.write
                return file

            def fail(*_):
                raise SystemExit("power failure")

            power.setattr(checkpoints.Path, "unlink", lambda *_: None)
            if cut is None:
                power.setattr(checkpoints.os, "replace", fail)
            else:
                power.setattr(checkpoints, "open", open_until_the_cut, raising=False)
            with pytest.raises(SystemExit, match="power failure"):
                save_checkpoint(path, tiny_model(RESTLESS), TOKENIZER)
        assert path.read_bytes() == before
    save_checkpoint(path, tiny_model(RESTLESS), TOKENIZER)  # and after all that it still works
    assert load_checkpoint(path)[0].config == RESTLESS
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_ctrl_c_while_saving_leaves_no_half_file(tmp_path, monkeypatch):
    path = saved(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    for where in "fsync", "replace":
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoints.os, where, interrupt)
            save_checkpoint(path, tiny_model(), TOKENIZER)
        assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_new_file_is_flushed_to_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    path, seen = saved(tmp_path), []
    size = path.stat().st_size
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: [seen.append(("sync", os.fstat(number).st_size)), sync(number)])
    monkeypatch.setattr(os, "replace", lambda a, b: [seen.append(("replace", Path(a).stat().st_size)), rename(a, b)])
    save_checkpoint(path, tiny_model(), TOKENIZER)
    assert seen[:2] == [("sync", size), ("replace", size)]
    assert os.name != "posix" or [what for what, _ in seen[2:]] == ["sync"], "the folder, too"


def test_a_full_disk_and_a_folder_that_cannot_be_written_are_one_line_and_lose_nothing(tmp_path, monkeypatch):
    path = saved(tmp_path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(checkpoints.os, "fsync", full)
        with pytest.raises(OSError) as caught:
            save_checkpoint(path, tiny_model(RESTLESS), TOKENIZER)
    assert str(caught.value) == f"cannot save {path} (No space left on device); what was saved there before is whole"
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(OSError, match=r"cannot save .*\((Not a directory|File exists)\)"):
        save_checkpoint(path / "below a file" / "m", tiny_model(), TOKENIZER)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"cannot save .*\(.*\); what was"):
        save_checkpoint(tmp_path / "folder", tiny_model(), TOKENIZER)
    assert path.read_bytes() == before


@pytest.mark.parametrize("failures, fine", [(1, True), (4, True), (5, False)])
def test_a_file_that_is_held_for_a_moment_is_renamed_a_little_later(tmp_path, monkeypatch, failures, fine):
    path, left, waited = saved(tmp_path), [failures], []
    rename = os.replace

    def held(old, new):
        if left[0]:
            left[0] -= 1
            raise PermissionError(13, "Permission denied")
        rename(old, new)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(checkpoints.time, "sleep", waited.append)
    if fine:
        save_checkpoint(path, tiny_model(RESTLESS), TOKENIZER)
    else:
        with pytest.raises(OSError, match="Permission denied"):
            save_checkpoint(path, tiny_model(RESTLESS), TOKENIZER)
    assert load_checkpoint(path)[0].config == (RESTLESS if fine else TINY)
    assert len(waited) == min(failures, 4) and sum(waited) < 2


def test_each_process_has_a_temporary_file_of_its_own(tmp_path, monkeypatch):
    path, names = saved(tmp_path), []
    monkeypatch.setattr(os, "replace", lambda old, new: names.append(old.name))
    for number in 11, 12:
        monkeypatch.setattr(os, "getpid", lambda number=number: number)
        save_checkpoint(path, tiny_model(), TOKENIZER)
    assert len(set(names)) == 2 and all(name.startswith(path.name) for name in names)


def test_weights_that_are_not_finite_are_not_saved_over_good_ones(tmp_path):
    model, state, told = begin()
    save_training(tmp_path / "m", model, state, TOKENIZER, told)
    before = (tmp_path / "m").read_bytes()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.inf
    for save in (
        lambda: save_training(tmp_path / "m", model, state, TOKENIZER, told),
        lambda: save_checkpoint(tmp_path / "m", model, TOKENIZER),
    ):
        with pytest.raises(FloatingPointError, match="lm_head.weight is not finite"):
            save()
    assert (tmp_path / "m").read_bytes() == before


# ---- nothing is believed


def refused(path, match, load=load_checkpoint):
    with pytest.raises(ValueError, match=match) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path)) and len(message) < len(str(path)) + 300
    return message


def rewrite(path, change_facts=lambda facts: None, change_tensors=lambda tensors: None):
    "The checkpoint with other facts or tensors, changed in place, and the checksum that fits them."
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["makemoe"])
    tensors = load_file(path)
    change_facts(facts)
    change_tensors(tensors)
    header = json.dumps(facts)
    save_file(tensors, path, metadata={"makemoe": header, "sha256": checksum(header, tensors)})


def test_every_single_flipped_bit_is_found(tmp_path):
    path = saved(tmp_path)
    whole, dice = path.read_bytes(), random.Random(2024)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [dice.randrange(8 * len(whole)) for _ in range(60)] + [dice.randrange(8 * header) for _ in range(140)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        refused(path, "checksum|safetensors|makemoe")


def test_files_of_a_later_version_say_so(tmp_path):
    path, written = saved(tmp_path), []
    rewrite(path, lambda facts: written.append(facts["version"]))
    assert written == [checkpoints.VERSION]
    rewrite(path, lambda facts: facts.update(config="of another shape", version=checkpoints.VERSION + 1))
    refused(path, "was saved by a newer version of makemoe: update makemoe to load it")
    rewrite(path, lambda facts: facts.update(version="newest"))
    refused(path, "does not fit this version of makemoe")


def test_a_missing_an_unreadable_and_a_strange_file_have_a_line_each(tmp_path, monkeypatch):
    for load in load_checkpoint, load_training, read_facts:
        for path in tmp_path / "none.safetensors", tmp_path, tmp_path / "none" / "m":
            with pytest.raises(FileNotFoundError, match="no checkpoint .*: train one with `python -m makemoe train`"):
                load(path)
    with pytest.raises(OSError, match=r"cannot read .*/m/x \(Not a directory\)"):
        save_checkpoint(tmp_path / "m", tiny_model(), TOKENIZER)
        load_checkpoint(tmp_path / "m" / "x")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")  # nobody writes into it: opening it would wait for ever
        refused(tmp_path / "pipe", "is not a file")
        refused(Path("/dev/zero"), "is not a file")

    def locked(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoints, "open", locked, raising=False)
    with pytest.raises(OSError, match=r"cannot read .*/m \(Permission denied\)"):
        load_checkpoint(tmp_path / "m")


def test_a_folder_is_the_checkpoint_in_it(tmp_path):
    path = saved(tmp_path)
    assert equal(load_checkpoint(tmp_path)[0], load_checkpoint(path)[0])
    assert read_facts(tmp_path) == read_facts(path)


def test_truncated_checkpoint_is_refused_wherever_it_was_cut(tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    for length in 0, 5, 8, 100, len(whole) // 2, len(whole) - 1:
        path.write_bytes(whole[:length])
        refused(path, "is not a safetensors file, or not all of one")


@pytest.mark.parametrize(
    "content",
    [
        b"to be or not to be",
        b"PK\x03\x04" + bytes(100),
        b"\x80\x02}q\x00.",
        bytes(10**6),
        b"\xff" * 100,
    ],
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused(path, "is not a safetensors file, or not all of one")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_of_somebody_else_are_refused(tmp_path, metadata):
    path = tmp_path / "bert.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
    refused(path, "is a safetensors file, but not a checkpoint of makemoe")


def config(**changes):
    return lambda facts: facts["config"].update(changes)


@pytest.mark.parametrize(
    "change, match",
    [
        *[
            (config(**changes), "size mismatch")
            for changes in (
                dict(n_layer=3),
                dict(n_layer=100_000),
                dict(n_embd=32),
                dict(n_embd=20_000),
                dict(num_experts=10**6),
                dict(n_hidden=10**6),
                dict(experts="loop", num_experts=10**5),
                dict(n_hidden=17),
            )
        ],
        (config(vocab_size=10**6), "11 characters for 1000000 tokens"),
        (config(n_layer=0), "n_layer is 0"),
        (config(n_layer=True), "n_layer is True"),
        (config(top_k=2.0), "top_k is 2.0"),
        (config(dropout=math.nan), "dropout is nan"),
        (config(routed_scaling_factor=math.inf), "routed_scaling_factor is inf"),
        (config(capacity_factor=True), "capacity_factor is True"),
        (config(future_setting=1), "future_setting"),
        (config(n_embd="many"), "n_embd is 'many'"),
        (config(n_embd=None), "n_embd is None"),
        (config(positions="learned"), "Missing key"),
        (lambda facts: facts.update(config=None), "TypeError"),
        (lambda facts: facts.update(config=[1]), "TypeError"),
        (lambda facts: facts.update(characters="abc"), "3 characters for 11 tokens"),
        (lambda facts: facts.update(characters=7), "TypeError"),
        (lambda facts: facts.update(tied={"lm_head.weight": "nothing"}), "nothing"),
        (lambda facts: facts.update(tied=3), "AttributeError"),
        (lambda facts: facts.pop("config"), "KeyError: 'config'"),
        (lambda facts: facts.pop("characters"), "KeyError: 'characters'"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path, change, match):
    path = saved(tmp_path)
    rewrite(path, change)
    assert match in refused(path, "does not fit this version of makemoe")


@pytest.mark.parametrize("header", ["not json", "[1, 2]", "null", '"config"', '{"config": {', "[" * 100_000])
def test_a_header_that_is_no_object_is_refused(tmp_path, header):
    path = saved(tmp_path)
    save_file(load_file(path), path, metadata={"makemoe": header})
    refused(path, "does not fit this version of makemoe")


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "extra"),
        (lambda tensors: tensors.pop("norm.weight"), "norm.weight"),
        (lambda tensors: tensors.pop("token_embedding.weight"), "token_embedding.weight"),
        (lambda tensors: tensors["lm_head.bias"].fill_(math.nan), "lm_head.bias is not finite"),
        (lambda tensors: tensors["lm_head.bias"].fill_(-math.inf), "lm_head.bias is not finite"),
        (lambda tensors: tensors.update({"lm_head.bias": torch.zeros(11, dtype=torch.int32)}), "RuntimeError"),
        (lambda tensors: tensors.update(history=torch.tensor([123], dtype=torch.uint8)), "JSONDecodeError"),
        *[
            (
                lambda tensors, text=text: tensors.update(history=torch.tensor(list(text), dtype=torch.uint8)),
                "no list of records",
            )
            for text in (b"{}", b"[1]", b"null", b'"[]"')
        ],
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, match):
    path = saved(tmp_path)
    rewrite(path, change_tensors=change)
    assert match in refused(path, "does not fit")


def test_nothing_is_pickled(tmp_path, monkeypatch):
    import pickle

    def refuse(*_, **__):
        raise AssertionError("pickle")

    for name in "load", "loads", "dump", "dumps", "Unpickler", "Pickler":
        monkeypatch.setattr(pickle, name, refuse)
    load_checkpoint(saved(tmp_path))


# ---- a training goes on


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(experts="loop"),
        dict(capacity_factor=0.7),
        dict(bias=True, norm="layer", positions="learned", balance_coef=0.0),
    ],
    ids=["grouped", "loop", "capacity", "bias"],
)
@pytest.mark.parametrize("optimizer, last", [("adamw", 1), ("adamw", 3), ("adamw", 5), ("muon", 1), ("muon", 5)])
def test_a_training_that_goes_on_from_its_file_ends_with_the_same_bits(tmp_path, changes, optimizer, last):
    config = replace(RESTLESS, **changes)
    whole, state, told = begin(config, optimizer)
    history = run(whole, state)
    afterwards = torch.rand(3)

    model, state, _ = begin(config, optimizer)
    run(model, state, stop=last)
    save_training(tmp_path / "m", model, state, TOKENIZER, told)
    seed_everything(99)  # another process has other random numbers
    again, state, tokenizer, same = load_training(tmp_path / "m")
    assert tokenizer.characters == TOKENIZER.characters and same == told and state.step == last
    records = run(again, state)
    assert equal(again, whole)
    assert timeless(records) == timeless(history)
    assert torch.equal(torch.rand(3), afterwards)


def test_saving_disturbs_nothing(tmp_path):
    runs = []
    for save in False, True:
        model, state, told = begin()
        history = train(
            model,
            *TEXTS,
            SHORT,
            state=state,
            on_eval=lambda record: (
                save
                and save_training(  # noqa: B023
                    tmp_path / "m", model, state, TOKENIZER, told
                )
            ),
        )  # noqa: B023
        runs.append((model, history, torch.rand(3)))
    (one, history, numbers), (other, records, same) = runs
    assert torch.equal(numbers, same) and timeless(history) == timeless(records) and equal(one, other)


def test_everything_comes_back(tmp_path):
    model, state, _ = begin()
    told = notes(text="Größe", number=math.inf)
    run(model, state, stop=5)
    random.seed(3)
    random.gauss(0, 1)  # leaves a number for the next call
    save_training(tmp_path / "m", model, state, TOKENIZER, told)
    expected = random.gauss(0, 1), random.random(), torch.rand(2), torch.rand(2, generator=state.order)
    random.seed(4)
    loaded, again, _, same = load_training(tmp_path / "m")
    found = random.gauss(0, 1), random.random(), torch.rand(2), torch.rand(2, generator=again.order)
    assert found[:2] == expected[:2] and torch.equal(found[2], expected[2]) and torch.equal(found[3], expected[3])
    assert (again.step, again.seconds, again.history, again.stop) == (5, state.seconds, state.history, False)
    assert same == told and read_facts(tmp_path / "m")["training"]["notes"] == told
    for ours, theirs in zip(model.parameters(), loaded.parameters()):
        memory, copy = state.optimizer.state[ours], again.optimizer.state[theirs]
        assert set(memory) == set(copy) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(memory[key], copy[key]) and memory[key].dtype == copy[key].dtype for key in memory)


def test_a_weight_that_has_had_no_gradient_has_no_memory_and_that_is_fine(tmp_path):
    model, state, told = begin()
    save_training(tmp_path / "m", model, state, TOKENIZER, told)  # before the first step none has
    assert not any(load_training(tmp_path / "m")[1].optimizer.state.values())
    model.lm_head.bias.requires_grad_(False)
    run(model, state)
    save_training(tmp_path / "m", model, state, TOKENIZER, told)
    again, state, _, _ = load_training(tmp_path / "m")
    assert [name for name, weight in again.named_parameters() if not state.optimizer.state.get(weight)] == [
        "lm_head.bias"
    ]


def test_the_file_of_an_unfinished_training_is_a_model_like_any_other(tmp_path):
    model, state, told = begin()
    history = run(model, state)
    save_training(tmp_path / "m", model, state, TOKENIZER, told)
    loaded, _, records = load_checkpoint(tmp_path / "m")
    assert records == history and equal(loaded, model)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda facts: facts["training"].pop("step"), "KeyError: 'step'"),
        (lambda facts: facts["training"].update(step=2.5), "step 2.5"),
        (lambda facts: facts["training"].update(step=True), "step True"),
        (lambda facts: facts["training"].update(step=-1), "step -1"),
        (lambda facts: facts["training"].update(step=8), "step 8 of 7"),
        (lambda facts: facts["training"].update(seconds="long"), "ValueError"),
        (lambda facts: facts["training"].update(seconds=math.nan), "nan seconds"),
        (lambda facts: facts["training"].update(random=None), "TypeError"),
        (lambda facts: facts["training"].update(random=[3, [2**70] * 625, None]), "OverflowError|ValueError"),
        (lambda facts: facts.update(training=[]), "TypeError"),
        (lambda facts: facts["training"]["notes"].pop("train"), "KeyError: 'train'"),
        (lambda facts: facts["training"]["notes"].update(optimizer="sgd"), "KeyError: 'sgd'"),
        (lambda facts: facts["training"]["notes"]["train"].update(lr=-1), "lr is -1"),
        (lambda facts: facts["training"]["notes"]["train"].update(steps=7.0), "steps is 7.0"),
        (lambda facts: facts["training"]["notes"]["train"].update(future=1), "future"),
    ],
)
def test_facts_of_a_training_that_do_not_fit_are_refused(tmp_path, change, message):
    model, state, told = begin()
    run(model, state, stop=3)
    save_training(tmp_path / "m", model, state, TOKENIZER, told)
    rewrite(tmp_path / "m", change)
    refused(tmp_path / "m", f"does not fit this version of makemoe .*({message})", load_training)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop("training.order"), "training.order"),
        (lambda tensors: tensors.pop("training.random.cpu"), "training.random.cpu"),
        (
            lambda tensors: tensors.update({"training.memory.exp_avg_sq.norm.weight": torch.zeros(3)}),
            "exp_avg_sq of norm.weight",
        ),
        (lambda tensors: tensors.update({"training.memory.exp_avg.nobody": torch.zeros(3)}), "nobody"),
        (lambda tensors: tensors.update({"training.order": torch.zeros(3)}), "TypeError|RuntimeError"),
    ],
)
def test_tensors_of_a_training_that_do_not_fit_are_refused(tmp_path, change, message):
    model, state, told = begin()
    run(model, state, stop=3)
    save_training(tmp_path / "m", model, state, TOKENIZER, told)
    rewrite(tmp_path / "m", change_tensors=change)
    refused(tmp_path / "m", f"does not fit this version of makemoe .*({message})", load_training)


def test_a_finished_training_is_refused_in_one_line(tmp_path):
    refused(saved(tmp_path), "is of a finished training: there is nothing to go on with", load_training)


def test_a_file_may_hold_what_is_not_contiguous(tmp_path):
    x = torch.arange(6.0).view(2, 3)
    write_file(tmp_path / "m", {"x": x.T, "y": x[:, 1], "z": x}, {})
    found, _ = checkpoints.read_file(tmp_path / "m")
    assert torch.equal(found["x"], x.T) and torch.equal(found["y"], x[:, 1]) and torch.equal(found["z"], x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_its_random_numbers_and_the_memory_come_back_to_it(tmp_path):
    seed_everything(1337)
    model = SparseMoELanguageModel(RESTLESS).cuda()
    state = TrainState(model, SHORT)
    run(model, state, stop=5)
    save_training(tmp_path / "m", model, state, TOKENIZER, notes())
    expected = torch.rand(3, device="cuda")
    seed_everything(99)
    loaded, again, _, _ = load_training(tmp_path / "m", "cuda")
    assert torch.equal(torch.rand(3, device="cuda"), expected)
    for ours, theirs in zip(model.parameters(), loaded.parameters()):
        memory, copy = state.optimizer.state[ours], again.optimizer.state[theirs]
        assert all(torch.equal(memory[key], copy[key]) and memory[key].device == copy[key].device for key in memory)
    assert [record["step"] for record in run(loaded, again)] == [0, 3, 6, 7]
