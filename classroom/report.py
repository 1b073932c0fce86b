"""The marks: a table for the teacher, a page for each student."""

import csv
import html
import json
import os
from dataclasses import asdict, dataclass, field


@dataclass
class Result:
    "What one student gets for one lesson."

    student: str
    lesson: str
    most: dict  # {exercise: points that it can give}
    lost: dict = field(default_factory=dict)  # {exercise: why it gave none}
    note: str = ""  # what was odd about the file
    answers: dict = field(default_factory=dict)  # {exercise: the student's code}
    key: str = ""  # a hash of all that the marks depend on

    @property
    def points(self):
        "{exercise: points}"
        return {exercise: 0 if exercise in self.lost else most for exercise, most in self.most.items()}

    @property
    def total(self):
        return f"{sum(self.points.values()):g} of {sum(self.most.values()):g}"

    @property
    def message(self):
        "The note and all reasons in one line."
        return "; ".join([self.note] * bool(self.note) + [f"{exercise}: {why}" for exercise, why in self.lost.items()])


def printable(text):
    "Text that every file and terminal takes: names of folders need not be UTF-8."
    return text.encode("utf-8", "replace").decode().replace("\n", " ")


def cell(text):
    "Text for a table that a spreadsheet does not take for a formula."
    return "'" * text.startswith(("=", "+", "-", "@", "\t", "\r")) + printable(text)


def write_whole(path, text):
    "Write a file, all of it or nothing."
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8", newline="")
    os.replace(unfinished, path)


def write_csv(path, results):
    "Write one line per student and lesson: points per exercise, score, maximum, message."
    exercises = list(dict.fromkeys(exercise for result in results for exercise in result.most))
    rows = [["student", "lesson", *exercises, "score", "max", "message"]]
    for result in results:
        points = [f"{result.points[exercise]:g}" if exercise in result.most else "" for exercise in exercises]
        score, most = result.total.split(" of ")
        rows.append([cell(result.student), result.lesson, *points, score, most, cell(result.message)])
    with path.with_name(path.name + ".part").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(rows)
    os.replace(file.name, path)


def page(result):
    "The page for a student. Nothing in it is taken from a submission unescaped, and it can load nothing."
    rows = "".join(
        f"<tr><td>{exercise}</td><td>{result.points[exercise]:g} of {most:g}</td>"
        f"<td>{html.escape(printable(result.lost.get(exercise, '')))}</td></tr>"
        for exercise, most in result.most.items()
    )
    code = "".join(
        f"<h2>{exercise}</h2><pre>{html.escape(printable_lines(source))}</pre>"
        for exercise, source in result.answers.items()
    )
    return (
        f"<!DOCTYPE html><html lang='en'><meta charset='utf-8'><meta http-equiv='Content-Security-Policy' "
        f"content=\"default-src 'none'; style-src 'unsafe-inline'\"><title>{result.lesson}</title><style>"
        f"body {{ font-family: sans-serif; max-width: 60em; margin: 2em auto }} td {{ padding: 2px 20px 2px 0; "
        f"vertical-align: top }} pre {{ background: #f4f4f4; padding: 1em; overflow-x: auto }}</style>"
        f"<h1>{result.lesson}: {result.total}</h1><p>{html.escape(printable(result.student))}</p>"
        f"<p>{html.escape(printable(result.note))}</p><table>{rows}</table>{code}</html>\n"
    )


def printable_lines(text):
    return "\n".join(map(printable, text.splitlines()))


def load_results(path):
    "{(student, lesson): Result} of an earlier call, empty if there was none."
    if not path.is_file():
        return {}
    found = [Result(**facts) for facts in json.loads(path.read_text(encoding="utf-8"))]
    return {(result.student, result.lesson): result for result in found}


def save_results(path, results):
    write_whole(path, json.dumps([asdict(result) for result in results], indent=1))
