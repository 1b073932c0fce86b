"""Grade what students hand in: their answers, taken out of the notebooks, on the teacher's copy of the checks."""

import hashlib
import tempfile
from contextlib import suppress
from pathlib import Path

import tyro

from classroom.collecting import collect, read_submission
from classroom.handout import lesson_to_solve
from classroom.lessons import ROOT, exercises, find_lessons, module_of, read_cells
from classroom.report import Result, load_results, page, printable, save_results, write_csv
from classroom.submission import names_of, tree_of
from classroom.workplace import Worker, workplace


def lost_points(worker, path, cells, seconds):
    "{exercise: why it gives no points} for the cells that a student handed in for the lesson `path`."
    known = exercises(read_cells(path))
    stubs = lesson_to_solve(path, answers=False, finished=False)["cells"]
    names = {name.split(".")[0] for exercise in known for name in exercise.write}
    task = dict(cells=cells, released=["".join(cell["source"]).strip() for cell in stubs], names=sorted(names))
    lost, todo = {}, [exercise.name for exercise in known]
    while todo:
        end, ready = "the process ended before its check did", False
        for exercise, reason in worker.ask(task | {"exercises": todo}, seconds):
            if exercise in todo:
                lost[exercise] = reason
                todo = [other for other in todo if other != exercise]
            ready, end = ready or exercise == "ready", reason or end if exercise is None else end
        stopped = todo[:1] if ready else todo  # where one hangs or ends the process, those after it get a new one
        lost, todo = lost | dict.fromkeys(stopped, end), todo[len(stopped) :]
    return {exercise: reason for exercise, reason in lost.items() if reason}


def answers_in(cells, path):
    "{exercise: the student's code}: the last cell that defines what was to be written."
    found = {}
    for exercise in exercises(read_cells(path)):
        wanted = {name.split(".")[0] for name in exercise.write}
        for cell in cells:
            with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
                if cell["cell_type"] == "code" and wanted & {
                    name for node in tree_of(cell["source"]).body for name in names_of(node)
                }:
                    found[exercise.name] = cell["source"][:20_000]
    return found


def grade_one(worker, path, student, files, seconds, earlier):
    "The `Result` of a student for a lesson; that of an `earlier` call if nothing that it depends on has changed."
    most = {exercise.name: exercise.points for exercise in exercises(read_cells(path))}
    result = Result(student.name, path.stem, most, lost=dict.fromkeys(most, "nothing was handed in"))
    if len(files.get(path, [])) != 1:
        others = ", ".join(file.name for file in files.get(path, files.get(None, []))[:5])
        result.note = (
            f"more than one notebook is this lesson: {others}; hand in one"
            if path in files
            else "nothing to grade" + f", only {others}" * bool(others)
        )
        return result
    file = files[path][0]
    try:
        stem = module_of(path)
        ours = (
            path,
            ROOT / "makemoe/checks/__init__.py",
            ROOT / f"makemoe/checks/{stem}.py",
            ROOT / f"classroom/hidden/{stem}.py",
        )
        result.key = hashlib.sha256(
            b"".join(hashlib.sha256(one.read_bytes()).digest() for one in (file, *ours))
        ).hexdigest()
        if earlier and earlier.key == result.key:
            return earlier
        cells = read_submission(file)
        result.lost = lost_points(worker, path, cells, seconds)
        result.answers = answers_in(cells, path)
        result.note = f"read from {file.name}" * (file.name != path.name)
    except (ValueError, OSError) as error:  # the next student's turn comes whatever this one handed in
        result.note, result.lost = str(error), dict.fromkeys(most, "not graded")
    return result


def grade(
    submissions: tyro.conf.Positional[Path], lessons: tyro.conf.Positional[tuple[str, ...]] = (), seconds: int = 60
):
    """Grade a folder of submissions: a table of marks and a page for each student, in SUBMISSIONS-grades.

    A second call grades only what has changed. This runs the students' code: use a machine or a container that you
    can lose.

    Args:
        submissions: holds one folder per student, with the student's notebooks in it
        lessons: which to grade, such as 04 or gating; if you name none, all that somebody handed in
        seconds: the check of one exercise may run for so long
    """
    if not submissions.is_dir():
        raise FileNotFoundError(f"there is no folder {submissions}")
    handed_in = collect(submissions)
    chosen = (
        find_lessons(lessons) if lessons else sorted({path for files in handed_in.values() for path in files if path})
    )
    if not chosen:
        raise ValueError(
            f"found no lesson in {submissions}: it should look like {submissions / 'anna' / '04_gating.ipynb'}"
        )
    for file in submissions.glob("*.ipynb"):
        print(f"{printable(file.name)} lies in no student's folder: left out")

    folder = submissions if submissions.name else submissions.resolve()
    out = folder.with_name(f"{folder.name}-grades")
    out.mkdir(exist_ok=True)
    results = load_results(out / "results.json")
    try:
        for path in chosen:
            with tempfile.TemporaryDirectory() as place, Worker(Path(place), module_of(path)) as worker:
                workplace(Path(place), path)
                for student, files in handed_in.items():
                    who = student.name, path.stem
                    results[who] = result = grade_one(worker, path, student, files, seconds, results.get(who))
                    (out / "feedback" / student.name).mkdir(parents=True, exist_ok=True)
                    (out / "feedback" / student.name / f"{path.stem}.html").write_text(page(result), encoding="utf-8")
                    save_results(out / "results.json", results.values())
                    write_csv(out / "grades.csv", list(results.values()))
                    print(printable(f"{student.name}, {path.stem}: {result.total} {result.note}").rstrip(), flush=True)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped; the marks so far are in {out / 'grades.csv'}, and the same command goes on"
        ) from None
    print(f"{out / 'grades.csv'}: the marks\n{out / 'feedback'}: a page for each student")
