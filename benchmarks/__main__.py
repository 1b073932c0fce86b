"""Measure it all, print the tables, and write them with the numbers and a picture.

    python -m benchmarks [--full] [--out FOLDER] [--device cuda]

takes a few minutes, or hours with --full: then both races run at their whole length and go on where they were cut off.
"""

from pathlib import Path

import torch
import tyro

from benchmarks import race, report, speed


def main(out: Path = Path("runs/bench"), device: str = "", full: bool = False):
    """Measure it all.

    Args:
        out: folder for the results.
        device: cpu or cuda; by default the CPU, and then a CUDA device if there is one.
        full: the races at their whole length, and on a CUDA device the gpu preset, too.
    """
    devices = [device] if device else ["cpu", "cuda"]
    for each in devices:
        if each == "cuda" and not torch.cuda.is_available():
            print("no CUDA device here: its rows are left out")
            continue
        speed.main(out, each)
        race.twins(out, each, short=not full)
        try:
            race.article(out, each, short=not full)
            if full and each == "cuda":
                race.gpu(out)
        except OSError as error:  # these two need tiny Shakespeare, which is fetched where it is missing
            print(f"no race on tiny Shakespeare: {error}")
    report.main(out)


if __name__ == "__main__":
    tyro.cli(main)
