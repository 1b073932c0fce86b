"""Lesson 01. The oracles are Python's own: slices of strings, sorted sets, bytes of files. None needs the internet."""

import hashlib
import http.server
import math
import os
import socket
import threading
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from classroom.hidden import data as hidden
from makemoe import data
from makemoe.checks import data as visible
from makemoe.data import CharTokenizer, compact_ids, get_batch, load_text, split

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


def test_the_checks_of_the_lesson():
    for checks in visible, hidden:
        checks.check_tokenizer(CharTokenizer)
        checks.check_get_batch(get_batch)
        checks.check_split(split)


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


def test_many_unknown_characters_still_fit_on_a_line():
    with pytest.raises(ValueError) as raised:
        CharTokenizer("abc").encode("0123456789!")
    assert sum(f"'{stranger}'" in one_line(raised) for stranger in "0123456789!") >= 2


@pytest.mark.parametrize("size, dtype", [(256, torch.uint8), (257, torch.int16), (40_000, torch.int32)])
def test_compact_ids_are_those_of_the_tokenizer(size, dtype):
    text = "".join(map(chr, range(0x10000, 0x10000 + size))) * 2
    tokenizer = CharTokenizer(text)
    ids = compact_ids(tokenizer, text)
    assert ids.dtype == dtype and torch.equal(ids.long(), tokenizer.encode(text))
    assert compact_ids(tokenizer, "").shape == (0,)


def test_compact_ids_of_a_text_that_is_read_in_parts():
    text = "abc" * 700_000  # 2**20 is no multiple of 3
    ids = compact_ids(CharTokenizer(text), text)
    assert torch.equal(ids.view(-1, 3), torch.tensor([0, 1, 2], dtype=torch.uint8).expand(700_000, 3))


def test_half_a_character_is_unknown():
    with pytest.raises(ValueError, match="udce9"):  # as sys.argv holds bytes that are not UTF-8
        CharTokenizer("abc").encode("caf\udce9")


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


def test_rows_of_a_batch_are_drawn_apart():
    starts = get_batch(torch.arange(15), 10_000, 5, seeded(2))[0][:, 0]
    pairs = (starts[0::2] * 10 + starts[1::2]).bincount(minlength=100)  # all 100 are equally likely
    chi2 = ((pairs - 50) ** 2 / 50).sum()
    assert 30 < chi2 < 180  # 99 degrees of freedom: outside by chance once in 800,000 seeds


def test_a_batch_can_be_changed_apart_from_the_stream():
    stream = torch.arange(20)
    x, y = get_batch(stream, 3, 5)
    x.fill_(-1)
    y.fill_(-2)
    assert torch.equal(stream, torch.arange(20))


# Split


@given(st.integers(0, 500), st.floats(0, 1))
def test_the_parts_are_the_stream_in_order(N, held_out):
    train, valid = split(torch.arange(N), held_out)
    assert torch.equal(torch.cat([train, valid]), torch.arange(N))
    assert abs(len(valid) - held_out * N) < 1 + 1e-6  # rounded or cut off, to either side


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
    assert load_text(path) == load_text(str(path)) == unicodedata.normalize("NFC", text)


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


@pytest.mark.skipif(os.name != "posix", reason="no such files there")
def test_what_has_no_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in "/dev/zero", "/dev/urandom", tmp_path / "pipe":
        with pytest.raises(OSError, match="is a device or a pipe: give the path of a text file") as raised:
            load_text(path)
        one_line(raised)


def test_what_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "zeros.txt"
    with open(path, "wb") as file:
        file.truncate(3 * 10**9)  # takes no room on the disk
    with pytest.raises(
        ValueError, match="zeros.txt has 3.0 GB, but at most 1 GB can be read: give a part of it"
    ) as raised:
        load_text(path)
    one_line(raised)


@pytest.mark.parametrize("name", ["two\nlines.txt", "nul\0.txt"])
def test_odd_names_stay_on_one_line(name):
    with pytest.raises(FileNotFoundError, match="no file") as raised:
        load_text(name)
    assert repr(name) in one_line(raised)


def test_two_spellings_of_a_letter_are_one(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Où est le café?") for form in ("NFC", "NFD"))
    path = tmp_path / "decomposed.txt"
    path.write_text(decomposed, encoding="utf-8")
    tokenizer = CharTokenizer(load_text(path))
    assert tokenizer.decode(tokenizer.encode(composed)) == composed
    with pytest.raises(ValueError, match="in Unicode's form NFC are: use unicodedata.normalize") as raised:
        tokenizer.encode(decomposed)
    one_line(raised)
    with pytest.raises(ValueError, match="in Unicode's form NFD are"):
        CharTokenizer(decomposed).encode(composed)


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
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "urlopen", refuse)


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
    with pytest.raises(OSError, match="cannot fetch tinyshakespeare into .*wrong sha256") as raised:
        load_text("tinyshakespeare")
    assert "MAKEMOE_DATA" in one_line(raised)
    assert files(home) == []


def test_without_a_network_one_line_says_what_to_do(offline, home):
    with pytest.raises(OSError, match="cannot fetch tinyshakespeare into .*Name or service not known") as raised:
        load_text("tinyshakespeare")
    message = one_line(raised)
    assert "check the network" in message and "tinyshakespeare.txt" in message and "MAKEMOE_DATA" in message
    assert files(home) == []


class Server(http.server.BaseHTTPRequestHandler):
    "What can go wrong, each at a path of its own."

    def do_GET(self):
        if self.path == "/silent":
            self.server.over.wait(5)
        elif self.path == "/loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
            self.end_headers()
        elif self.path == "/half":
            self.send_response(200)
            self.send_header("Content-Length", str(len(TINY)))
            self.end_headers()
            self.wfile.write(TINY.encode()[:20])
        elif self.path == "/garbage":
            self.wfile.write(b"hello\r\n\r\n")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(home, monkeypatch):
    "Its address. A second of waiting is the most that a test can bear."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.over = threading.Event()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    wait = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: wait(seconds / 100))
    yield f"http://127.0.0.1:{server.server_port}"
    wait(None)
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path, says", [("silent", "timed out"), ("loop", "infinite loop"), ("garbage", "hello")])
def test_a_server_that_fails_is_one_line_and_leaves_nothing(server, home, monkeypatch, path, says):
    monkeypatch.setattr(data, "TINY_URL", f"{server}/{path}")
    with pytest.raises(OSError, match=f"cannot fetch tinyshakespeare into .*{says}") as raised:
        load_text("tinyshakespeare")
    assert "\n" not in str(raised.value) and "MAKEMOE_DATA" in str(raised.value)
    assert files(home) == []


def test_a_download_that_breaks_off_leaves_nothing(server, home, monkeypatch):
    monkeypatch.setattr(data, "TINY_URL", f"{server}/half")
    with pytest.raises((OSError, ValueError), match="tinyshakespeare") as raised:
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
