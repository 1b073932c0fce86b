"""Find out what students have handed in: which file is whose answer to which lesson."""

from classroom.handout import lesson_to_solve
from classroom.lessons import find_lessons, module_of

LARGEST = 50_000_000  # bytes of a notebook
IGNORED = {".ipynb_checkpoints", "__MACOSX", ".venv"}


def read_submission(file):
    "The cells of a student's notebook, of whatever version. Raises ValueError, in a few words, if it is none."
    import nbformat

    if file.stat().st_size > LARGEST:
        raise ValueError(f"{file.name} has {file.stat().st_size:,} bytes, more than {LARGEST:,}")
    try:
        cells = nbformat.reads(file.read_text(encoding="utf-8-sig"), as_version=4)["cells"]
        return [
            {
                "cell_type": str(cell["cell_type"]),
                "id": str(cell.get("id", "")),
                "source": "".join(cell["source"]).replace("\r\n", "\n"),
            }
            for cell in cells
        ]
    except Exception as error:
        raise ValueError(f"{file.name} cannot be read as a notebook ({type(error).__name__})") from None


def signs(cells):
    "What a notebook is recognised by: the ids and texts of its cells."
    return {sign for cell in cells for sign in (cell["id"], "".join(cell["source"]).strip()) if sign}


def recognise(file, lessons):
    """Which lesson a file is, None if that is unclear. `lessons`: {lesson: its `signs`}.

    The one with which it shares most; if it shares nothing, the one whose name or number its own begins with.
    """
    try:
        theirs = signs(read_submission(file))
    except (ValueError, OSError):
        theirs = set()
    shared = {lesson: len(theirs & own) for lesson, own in lessons.items()}
    most = max(shared.values())
    best = [lesson for lesson in lessons if most > 2 and shared[lesson] == most]
    best = best or [lesson for lesson in lessons if file.stem.startswith((lesson.stem[:2], module_of(lesson)))]
    return best[0] if len(best) == 1 else None


def collect(folder):
    "{student's folder: {lesson, or None for all else: [files]}} of a folder of submissions. Links are left out."
    lessons = {path: signs(lesson_to_solve(path, answers=False, finished=False)["cells"]) for path in find_lessons()}
    common = {sign for sign in set().union(*lessons.values()) if sum(sign in own for own in lessons.values()) > 1}
    lessons = {path: own - common for path, own in lessons.items()}
    found = {}
    for student in sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.is_symlink() and path.name[0] != "."
    ):
        found[student] = {}
        for file in sorted(student.rglob("*")):
            if (
                file.is_file()
                and not IGNORED & set(file.relative_to(student).parts)
                and file.resolve().is_relative_to(student.resolve())
            ):
                lesson = recognise(file, lessons) if file.suffix == ".ipynb" and not file.is_symlink() else None
                found[student].setdefault(lesson, []).append(file)
    return found
