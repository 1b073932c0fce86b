"""The command `python -m classroom`. What a person can mend ends in one line and status 2."""

import sys

import tyro

import classroom
from classroom.grading import grade
from classroom.handout import learn, release, samples

try:
    commands = {"learn": learn, "release": release, "samples": samples, "grade": grade}
    tyro.extras.subcommand_cli_from_dict(commands, prog="python -m classroom", description=classroom.__doc__)
except (OSError, ValueError, RuntimeError) as error:
    sys.exit(print(f"classroom: {error}", file=sys.stderr) or 2)
except KeyboardInterrupt as error:
    sys.exit(print(f"classroom: {error}", file=sys.stderr) or 130)
