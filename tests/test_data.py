"""Lesson 01. The oracles are Python's own: slices of strings, sorted sets, bytes of a file. No test needs a network."""

import hashlib
import math
import os
import urllib.error
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from makemoe import data
from makemoe.data import CharTokenizer, get_batch, load_text, split

ROOT = Path(__file__).resolve().parent.parent
TINY = "Before we proceed any further, hear me speak.\n" * 3  # what plays tiny Shakespeare here


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def one_line(raised):
    "The message of an error, which must be one line that a person can read."
    message = str(raised.value)
    assert message and "\n" not in message and len(message) < 400
    assert raised.value.__cause__ is None and (raised.value.__suppress_context__ or raised.value.__context__ is None)
    return message


# Tokenizer


@given(st.text(), st.data())
def test_decode_undoes_encode(corpus, draws):
    tokenizer = CharTokenizer(corpus)
    text = draws.draw(st.text(alphabet=sorted(set(corpus)))) if corpus else ""
    ids = tokenizer.encode(text)
    assert ids.dtype == torch.long and ids.shape == (len(text),)
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text


@given(st.text())
def test_vocabulary_is_sorted_and_knows_nothing_but_the_characters(text):
    tokenizer = CharTokenizer(text)
    assert list(tokenizer.characters) == sorted(set(text))
    assert tokenizer.vocab_size == len(set(text))
    assert CharTokenizer(text[::-1]).characters == tokenizer.characters
    assert CharTokenizer(tokenizer.characters).characters == tokenizer.characters
    assert tokenizer.encode(tokenizer.characters).tolist() == list(range(tokenizer.vocab_size))


def test_white_space_and_signs_are_characters_like_any_other():
    text = " \tna\u00efve\n\n\u00b2\u2460 \r\n"
    tokenizer = CharTokenizer(text)
    assert tokenizer.characters == "".join(sorted(set(text)))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizers_do_not_share_their_vocabularies():
    first, second = CharTokenizer("abc"), CharTokenizer("xy")
    assert (first.characters, second.characters) == ("abc", "xy")
    assert first.decode(first.encode("cab")) == "cab"


def test_decode_takes_tensors_lists_and_single_elements_of_a_tensor():
    tokenizer = CharTokenizer("abc")
    assert tokenizer.decode(torch.tensor([2, 0, 1])) == tokenizer.decode([2, 0, 1]) == "cab"
    assert tokenizer.decode(list(torch.tensor([2, 0, 1]))) == "cab"
    assert tokenizer.decode([]) == tokenizer.decode(torch.tensor([], dtype=torch.long)) == ""


def test_unknown_characters_are_named_and_the_vocabulary_is_not_recited():
    with pytest.raises(ValueError) as raised:
        CharTokenizer("Romeo").encode("Romeï7o" + 99 * "7")
    message = one_line(raised)
    assert "'ï'" in message and message.count("'7'") == 1 and "'R'" not in message


def test_many_unknown_characters_still_fit_on_a_line():
    with pytest.raises(ValueError) as raised:
        CharTokenizer("abc").encode("0123456789!")
    assert sum(f"'{stranger}'" in one_line(raised) for stranger in "0123456789!") >= 2


def test_an_unknown_new_line_is_named_on_one_line():
    with pytest.raises(ValueError) as raised:
        CharTokenizer("abc").encode("a\nb")
    assert r"'\n'" in one_line(raised)


# Batches

sizes = st.tuples(st.integers(1, 12), st.integers(1, 8), st.integers(1, 30))  # block, batch, tokens beyond the block


@given(sizes, st.integers(0, 1000))
def test_windows_stand_in_the_stream_at_consecutive_places(size, seed):
    T, B, beyond = size
    stream = torch.randperm(T + beyond, generator=seeded(seed))  # every token once: it tells its place
    place = stream.argsort()
    x, y = get_batch(stream, B, T, seeded(seed))
    assert x.shape == y.shape == (B, T) and x.dtype == y.dtype == stream.dtype
    assert (place[x].diff(dim=1) == 1).all()
    assert torch.equal(place[y], place[x] + 1)


@given(sizes, st.integers(0, 1000))
def test_windows_are_substrings(size, seed):
    T, B, beyond = size
    text = "".join("abc"[i] for i in torch.randint(3, (T + beyond,), generator=seeded(seed)))
    tokenizer = CharTokenizer(text)
    x, y = get_batch(tokenizer.encode(text), B, T, seeded(seed))
    for inputs, targets in zip(x, y):
        assert tokenizer.decode(inputs) + tokenizer.decode(targets[-1:]) in text
        assert tokenizer.decode(inputs[1:]) == tokenizer.decode(targets[:-1])


def test_every_start_is_equally_likely_the_last_one_too():
    x, y = get_batch(torch.arange(13), 60_000, 4, seeded(1))
    counts = x[:, 0].bincount()
    assert len(counts) == 13 - 4 and y.max() == 12  # the last start is reached, none is beyond it
    expected = 60_000 / 9
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 40  # 8 degrees of freedom: larger by chance once in 300,000 seeds


def test_a_stream_of_a_block_and_one_token_has_one_window():
    x, y = get_batch(torch.arange(6), 50, 5)
    assert torch.equal(x, torch.arange(5).expand(50, 5))
    assert torch.equal(y, torch.arange(1, 6).expand(50, 5))


def test_rows_of_a_batch_are_drawn_apart():
    starts = get_batch(torch.arange(15), 10_000, 5, seeded(2))[0][:, 0]
    pairs = (starts[0::2] * 10 + starts[1::2]).bincount(minlength=100)  # all 100 are equally likely
    chi2 = ((pairs - 50) ** 2 / 50).sum()
    assert 30 < chi2 < 180  # 99 degrees of freedom: outside by chance once in 800,000 seeds


def test_same_generator_same_batch_whatever_else_is_drawn():
    stream = torch.arange(1000)
    first = get_batch(stream, 4, 8, seeded(3))
    torch.manual_seed(99)
    torch.rand(17)
    state = torch.get_rng_state()
    again = get_batch(stream, 4, 8, seeded(3))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert torch.equal(state, torch.get_rng_state())  # and others are not disturbed
    assert not torch.equal(first[0], get_batch(stream, 4, 8, seeded(4))[0])


def test_a_generator_goes_on_from_batch_to_batch():
    stream, generator = torch.arange(1000), seeded(5)
    first, second = (get_batch(stream, 4, 8, generator)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_without_a_generator_the_global_seed_decides():
    torch.manual_seed(6)
    first, second = (get_batch(torch.arange(1000), 4, 8)[0] for _ in range(2))
    torch.manual_seed(6)
    assert torch.equal(first, get_batch(torch.arange(1000), 4, 8)[0]) and not torch.equal(first, second)


def test_a_batch_can_be_changed_apart_from_the_stream():
    stream = torch.arange(20)
    x, y = get_batch(stream, 3, 5)
    x.fill_(-1)
    y.fill_(-2)
    assert torch.equal(stream, torch.arange(20))


@pytest.mark.parametrize("length", [0, 3, 8])
def test_a_stream_that_is_too_short_is_refused(length):
    with pytest.raises(ValueError) as raised:
        get_batch(torch.arange(length), 2, 8)
    one_line(raised)


# Split


@given(st.integers(0, 500), st.floats(0, 1))
def test_the_parts_are_the_stream_in_order(N, held_out):
    train, valid = split(torch.arange(N), held_out)
    assert torch.equal(torch.cat([train, valid]), torch.arange(N))
    assert abs(len(valid) - held_out * N) < 1 + 1e-6  # rounded or cut off, to either side


def test_the_last_tenth_is_held_out():
    train, valid = split(torch.arange(1000))
    assert (len(train), len(valid), valid[0]) == (900, 100, 900)
    assert [tuple(map(len, split(torch.arange(50), share))) for share in (0, 1)] == [(50, 0), (0, 50)]


@pytest.mark.parametrize("held_out", [-0.1, 1.5, 10])
def test_a_share_that_is_none_is_refused(held_out):
    with pytest.raises(ValueError) as raised:
        split(torch.arange(100), held_out)
    one_line(raised)


# Texts by name and by path


def test_the_corpus_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = load_text()
    assert text.encode() == (ROOT / "data" / "shakespeare.txt").read_bytes()
    assert text == load_text("shakespeare")
    assert CharTokenizer(text).vocab_size == 64


@given(st.text(alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="\r\ufeff"), min_size=1))
def test_any_text_file_by_path(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("texts") / "mine.txt"
    path.write_bytes(text.encode())
    assert load_text(path) == load_text(str(path)) == text


def test_windows_files_read_like_others(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbfFirst:\r\nSpeak, na\xc3\xafve one.\r\n")
    assert load_text(path) == "First:\nSpeak, naïve one.\n"


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_an_empty_file_is_named(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="empty.txt is empty") as raised:
        load_text(path)
    one_line(raised)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*hamlet.txt: give the path of a text file, or") as raised:
        load_text(tmp_path / "hamlet.txt")
    one_line(raised)


def test_a_folder_is_not_a_text(tmp_path):
    with pytest.raises(OSError, match="is a folder: give the path of a text file") as raised:
        load_text(tmp_path)
    one_line(raised)


@pytest.mark.parametrize("content, byte", [("naïve".encode("latin-1"), 2), ("naïve".encode("utf-16"), 0)])
def test_a_file_in_another_encoding_is_named(tmp_path, content, byte):
    path = tmp_path / "latin.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"latin.txt is not UTF-8 text \(byte {byte}\): save it as UTF-8") as raised:
        load_text(path)
    one_line(raised)


# Tiny Shakespeare: found, downloaded, checked


@pytest.mark.skipif(not os.environ.get("MAKEMOE_DATA"), reason="MAKEMOE_DATA names no folder with tinyshakespeare.txt")
def test_the_real_tiny_shakespeare():
    text = load_text("tinyshakespeare")
    assert len(text) == 1_115_394 and text.startswith("First Citizen:\nBefore we proceed")
    assert CharTokenizer(text).vocab_size == 65


def test_the_checksum_is_the_one_that_the_data_page_gives():
    assert data.TINY_SHA256 in (ROOT / "data" / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty home, no MAKEMOE_DATA, and a small file on disk in place of the one on the network."
    home, source = tmp_path / "home", tmp_path / "source.txt"
    home.mkdir()
    source.write_bytes(TINY.encode())
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.delenv("MAKEMOE_DATA", raising=False)
    monkeypatch.setattr(data, "TINY_URL", source.as_uri())
    monkeypatch.setattr(data, "TINY_SHA256", hashlib.sha256(TINY.encode()).hexdigest())
    return home


@pytest.fixture
def offline(home, monkeypatch):
    "Whoever tries the network finds none."
    def refuse(*arguments, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_downloaded_once_then_read_from_the_cache(home, monkeypatch):
    assert load_text("tinyshakespeare") == TINY
    assert files(home) == ["tinyshakespeare.txt"]
    monkeypatch.setattr(data, "TINY_URL", "file:///gone")
    assert load_text("tinyshakespeare") == TINY


def test_the_folder_named_by_makemoe_data_comes_first(offline, home, tmp_path, monkeypatch):
    monkeypatch.setenv("MAKEMOE_DATA", str(tmp_path))
    (tmp_path / "tinyshakespeare.txt").write_bytes(TINY.encode())
    cache = home / ".cache" / "makemoe"
    cache.mkdir(parents=True)
    (cache / "tinyshakespeare.txt").write_text("something else")
    assert data.find_tinyshakespeare() == tmp_path / "tinyshakespeare.txt"
    assert load_text("tinyshakespeare") == TINY


@pytest.mark.parametrize("folder", ["", "empty", "missing"])
def test_a_folder_without_the_file_falls_back_to_the_cache(home, tmp_path, monkeypatch, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "tinyshakespeare.txt").write_text("nobody asked for this one")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAKEMOE_DATA", folder and str(tmp_path / folder))
    assert data.find_tinyshakespeare() == home / ".cache" / "makemoe" / "tinyshakespeare.txt"


@pytest.mark.parametrize("wrong", [b"", TINY.encode()[:-1], TINY.replace("\n", "\r\n").encode()])
def test_a_wrong_file_in_makemoe_data_is_named_and_left_alone(offline, tmp_path, monkeypatch, wrong):
    path = tmp_path / "tinyshakespeare.txt"
    path.write_bytes(wrong)
    monkeypatch.setenv("MAKEMOE_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"txt is not tinyshakespeare \(wrong sha256\): move it away") as raised:
        load_text("tinyshakespeare")
    assert str(path) in one_line(raised)
    assert path.read_bytes() == wrong


def test_a_damaged_cache_is_named_and_left_alone(offline, home):
    path = home / ".cache" / "makemoe" / "tinyshakespeare.txt"
    path.parent.mkdir(parents=True)
    path.write_text(TINY[:20])
    with pytest.raises(ValueError, match="is not tinyshakespeare") as raised:
        load_text("tinyshakespeare")
    assert str(path) in one_line(raised)
    assert path.read_text() == TINY[:20]


def test_a_wrong_download_is_named_and_nothing_stays(home, monkeypatch):
    monkeypatch.setattr(data, "TINY_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"what came from .* is not tinyshakespeare \(wrong sha256\)") as raised:
        load_text("tinyshakespeare")
    assert "MAKEMOE_DATA" in one_line(raised)
    assert files(home) == []


def test_without_a_network_one_line_says_what_to_do(offline, home):
    with pytest.raises(OSError, match="cannot fetch tinyshakespeare into .*Name or service not known") as raised:
        load_text("tinyshakespeare")
    message = one_line(raised)
    assert "check the network" in message and "tinyshakespeare.txt" in message and "MAKEMOE_DATA" in message
    assert files(home) == []


def test_a_download_that_breaks_off_leaves_nothing(home, monkeypatch):
    class Broken:
        def __init__(self):
            self.chunks = [b"First Citizen"]

        def read(self, size):
            if self.chunks:
                return self.chunks.pop()
            raise ConnectionResetError("connection reset by peer")

        def info(self):
            return self

        def get_all(self, name):
            return None

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(torch.hub, "urlopen", lambda *arguments: Broken())
    with pytest.raises(OSError, match="cannot fetch tinyshakespeare .*connection reset by peer") as raised:
        load_text("tinyshakespeare")
    one_line(raised)
    assert files(home) == []


def test_a_home_that_cannot_be_written_is_named(home, monkeypatch):
    (home / ".cache").write_text("a file where a folder should be")  # a read-only folder would not stop root
    with pytest.raises(OSError, match="cannot fetch tinyshakespeare into .*MAKEMOE_DATA") as raised:
        load_text("tinyshakespeare")
    one_line(raised)


# From text to loss


def test_counting_pairs_beats_frequencies_beats_nothing():
    text = load_text()[:300_000]
    tokenizer = CharTokenizer(text)
    train, valid = split(tokenizer.encode(text))
    V = tokenizer.vocab_size
    table = torch.ones(V, V)
    x, y = get_batch(train, 2000, 64, seeded(7))
    table.index_put_((x.flatten(), y.flatten()), torch.tensor(1.0), accumulate=True)
    x, y = get_batch(valid, 200, 64, seeded(8))
    bigram = torch.nn.functional.cross_entropy(table.log()[x].transpose(1, 2), y)
    unigram = -(table.sum(0) / table.sum()).log()[y].mean()
    assert bigram < 2.7 and 3 < unigram < 3.5 < math.log(V)
