"""Is data/shakespeare.txt clean, complete, and the file that data/build.py makes?"""

import hashlib
import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parent.parent / "data"
TEXT = (DATA / "shakespeare.txt").read_bytes().decode("ascii")  # fails where a byte is not ASCII
LINES = TEXT.removesuffix("\n").split("\n")
BLOCKS = TEXT.removesuffix("\n").split("\n\n")
SPEAKERS = Counter(block.split("\n")[0] for block in BLOCKS)
SPOKEN = [line for block in BLOCKS for line in block.split("\n")[1:]]

# One well-known line of each play, in the order of the file, with the name of the one who says it.
FAMOUS = [
    ("Helena", "Our remedies oft in ourselves do lie"),
    ("Enobarbus", "Age cannot wither her, nor custom stale"),
    ("Jaques", "All the world's a stage"),
    ("Dromio of Ephesus", "We came into the world like brother and brother"),
    ("Sicinius", "What is the city but the people?"),
    ("Musician", "Hark, hark! the lark at heaven's gate sings"),
    ("Hamlet", "To be, or not to be,--that is the question:"),
    ("Falstaff", "The better part of valour is discretion"),
    ("King", "Uneasy lies the head that wears a crown."),
    ("King Henry", "Once more unto the breach, dear friends, once more"),
    ("Joan la Pucelle", "Glory is like a circle in the water"),
    ("Dick", "The first thing we do, let's kill all the lawyers."),
    ("Gloster", "Suspicion always haunts the guilty mind"),
    ("Wolsey", "Had I but serv'd my God with half the zeal"),
    ("Salisbury", "To gild refined gold, to paint the lily"),
    ("Antony", "Friends, Romans, countrymen, lend me your ears"),
    ("Lear", "Blow, winds, and crack your cheeks!"),
    ("Spring", "When daisies pied and violets blue"),
    ("Macbeth", "To-morrow, and to-morrow, and to-morrow"),
    ("Escalus", "Some rise by sin, and some by virtue fall"),
    ("Portia", "The quality of mercy is not strain'd"),
    ("Pistol", "Why then, the world's mine oyster"),
    ("Lysander", "The course of true love never did run smooth"),
    ("Balthazar", "Sigh no more, ladies, sigh no more"),
    ("Iago", "It is the green-ey'd monster which doth mock"),
    ("Gower", "To sing a song that old was sung"),
    ("Gaunt", "This royal throne of kings"),
    ("King Richard", "A horse! a horse! my kingdom for a horse!"),
    ("Juliet", "wherefore art thou Romeo?"),
    ("Sly", "I'll pheeze you, in faith."),
    ("Prospero", "We are such stuff\nAs dreams are made on"),
    ("Timon", "I am Misanthropos, and hate mankind."),
    ("Titus", "That Rome is but a wilderness of tigers?"),
    ("Ulysses", "One touch of nature makes the whole world kin"),
    ("Duke", "If music be the food of love, play on"),
    ("Musicians", "Who is Silvia? What is she"),
    ("Autolycus", "When daffodils begin to peer"),
]


@pytest.fixture(scope="module")
def build():
    """data/build.py, imported by its path."""
    spec = importlib.util.spec_from_file_location("build_shakespeare", DATA / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_the_file_that_the_script_builds(build):
    digest = hashlib.sha256(TEXT.encode("ascii")).hexdigest()
    assert digest == build.SHA256
    assert digest in (DATA / "README.md").read_text(encoding="utf-8")


def test_every_block_is_a_name_and_a_speech():
    assert TEXT.endswith("\n") and not TEXT.endswith("\n\n")
    assert "\n\n\n" not in TEXT
    for block in BLOCKS:
        name, *speech = block.split("\n")
        assert re.fullmatch(r"[A-Z][A-Za-z,' -]*:", name), block
        assert speech and all(line.strip() for line in speech), block


def test_names_are_written_in_one_way():
    small = {"of", "and", "the", "de", "la"}
    for name in SPEAKERS:
        for word in re.findall(r"[A-Za-z'-]+", name):
            assert word in small or word == word.capitalize(), name
    full = {name[:-1].lower() for name in SPEAKERS}
    assert len(full) == len(SPEAKERS)  # no name in two spellings that differ by capitals only


def test_the_vocabulary_is_small():
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert set(TEXT) == set(letters + "\n !'(),-.:;?")


@pytest.mark.parametrize("pattern", [
    r"  | $|^ ",  # spaces at an end, or two together
    r"Gutenberg|Dramatis|PERSON|THE END|by William Shakespeare",
    r"\b(Exit|Exeunt|Re-enter)\b",
    r"^(ACT|SCENE|Act|Scene|SONG|Song|PROLOGUE|EPILOGUE)\b",
    r"^Enter .*\.$|^Enter [A-Z]",
    r"\b(?!ABC\b)[A-Z]{2,}\b",  # capitals: headings, and speakers that were not recognised
    r"[a-z][A-Z]",  # misprints such as FalcoNBRIDGE
    r"^[A-Z][A-Z' ]*\.( |$)(?<!^I\.)(?<!^I\. )(?<!^O\. )",
    r"^\W*$",  # lines without a letter
    r"^.{90,}$",
    r"[,;:][,;:.!?]|[!?.][,;:]",
    r" [,;:!?.]|[,;:!?][A-Za-z]",
])
def test_nothing_of_the_book_remains(pattern):
    assert [line for line in SPOKEN if re.search(pattern, line)] == []


def test_no_abbreviated_speaker_hides_in_a_speech(build):
    labels = {label for play in ("hamlet", "lear") for label, name in build.NAMES[play].items() if label != name}
    labels.remove("France")  # the country is spoken of
    assert [line for line in SPOKEN if re.split(r"\.( |$)", line)[0] in labels and "." in line] == []


def test_every_play_is_there_in_order(build):
    assert len(build.PLAYS) == len(FAMOUS) == 37
    place = 0
    for speaker, line in FAMOUS:
        found = TEXT.find(line, place)
        assert found >= 0, line
        start = TEXT.rfind("\n\n", 0, found) + 2
        assert TEXT[start:].startswith(speaker + ":\n"), (line, TEXT[start:].split("\n")[0])
        place = found


def test_sizes():
    assert 4_500_000 < len(TEXT) < 4_700_000
    assert 30_000 < len(BLOCKS) < 31_000
    assert 900 < len(SPEAKERS) < 1_000
    for name, at_least in [("Falstaff:", 450), ("Hamlet:", 350), ("Iago:", 250), ("Rosalind:", 200),
                           ("Cleopatra:", 200), ("Macbeth:", 140), ("Juliet:", 100), ("First Citizen:", 60)]:
        assert SPEAKERS[name] >= at_least, name


def test_capitals_become_names_and_directions_go(build):
    source = build.plain("""CAST\n\n\nACT I.\n\nSCENE I. Rousillon. A room.\n\n[Enter HELENA and
LAFEU.]\n\nFIRST LORD. {Aside.]\nIs it  possible?\n\n[Exit.]\n\n  Ay, [he turns] so.\n\nHELENA\n[Reads.]\n"Come."
FIRST LORD. No.\n\nSCENE II.\n\nA public place.\n\nMACBETH, LENNOX.\nWhat's the matter?\n\n[Exeunt [all.]\n""")
    assert build.read_speeches(source, {}) == [
        ("First Lord", ["Is it possible?", "Ay, so."]),
        ("Helena", ["'Come.'"]),
        ("First Lord", ["No."]),
        ("Macbeth and Lennox", ["What's the matter?"]),
    ]


def test_abbreviations_are_looked_up(build):
    source = build.plain("ACT I.\n\nScene I. A hall.\n\nHam.\nWho's there?\n\n1 Clown.\nHor.\n\nRos. and Guil.\nAy.\n")
    names = build.NAMES["hamlet"]
    assert build.read_speeches(source, names) == [
        ("Hamlet", ["Who's there?"]),
        ("First Clown", ["Hor."]),  # a one-word answer, not a second speaker
        ("Rosencrantz and Guildenstern", ["Ay."]),
    ]


@pytest.mark.parametrize("label, name", [
    ("1 KEEPER.", "First Keeper"), ("ANTIPHOLUS OF EPHESUS.", "Antipholus of Ephesus"), ("HELENA", "Helena"),
    ("CAESAR, ANTONY, and LEPIDUS.", "Caesar, Antony, and Lepidus"), ("LUCIUS' SERVANT.", "Lucius' Servant"),
])
def test_full_name(build, label, name):
    assert build.CAPITALS.fullmatch(label)
    assert build.full_name(label, {}) == name


def test_a_correction_that_fits_nowhere_is_an_error(build):
    assert build.fixed("a cat sat", [("cat", "dog")]) == "a dog sat"
    with pytest.raises(ValueError):
        build.fixed("a cat sat", [("cow", "dog")])
