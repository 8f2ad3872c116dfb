"""The rounds and the table of `bench.engine`: checkouts that do the same work in turns.

Each runs the same script in a process of its own, whose packages are the checkout's. Only one works
at a time. Every round has fresh processes: where a process' memory lies may make a few percent, for
as long as it lives.
"""

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from bench.engine import STEPS, Case, Found
from bench.machine import described

FORMS, SEARCHES = ("plain", "fused"), ("greedy", "beam 5", "mixed")
SCRIPT = Path(__file__).with_name("engine.py").resolve()
Item = TypeVar("Item")


def main(about: str | None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine", description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="another checkout")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs="+", choices=STEPS, default=tuple(STEPS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=SEARCHES)
    parser.add_argument("--attention", action="store_true", help="of a model that has some")
    parser.add_argument("--no-minimum", action="store_true", help="no min_length, see `Case`")
    compare(parser.parse_args())


def compare(arguments: argparse.Namespace) -> None:
    """Measure all cases and print the table."""
    cases = [
        Case(form, search, rows, arguments.attention, not arguments.no_minimum)
        for form in arguments.forms
        for search in arguments.searches
        for rows in arguments.rows
        if search != "mixed" or rows in (64, 256)
    ]
    folders = [SCRIPT.parents[1]]
    if arguments.beside is not None:
        folders.append(arguments.beside.resolve())
    jobs = [dataclasses.asdict(case) for case in cases]
    answers = in_turns(folders, jobs, arguments.rounds)
    found = [[[Found(**one) for one in each] for each in of_case] for of_case in answers]
    command = shlex.join(["python", "-m", "bench.engine", *sys.argv[1:]])
    names = [f"{name} ({revision(at)})" for name, at in zip(("here", "beside"), folders)]
    print(f"{described()}; `{command}`; µs of a step beyond the model's own, one core\n")
    columns = [*(f"{name}, µs" for name in names), "here / beside", "model, µs",
               *(f"{name}, tokens/s" for name in names)]  # fmt: skip
    if len(folders) == 1:
        del columns[1]
    print(f"| | | rows | {' | '.join(columns)} |\n|---|---|{'---|' * (1 + len(columns))}")
    for case, both in zip(cases, found):
        engines = [[one.engine for one in each] for each in both]
        cells = [case.form, case.search, f"{case.rows:,}", *(spread(one) for one in engines)]
        if len(folders) == 2:
            cells.append(ratio(*engines))
        cells.append(spread([one.model for each in both for one in each]))
        cells += [spread([one.tokens for one in each]) for each in both]
        print(f"| {' | '.join(cells)} |")
    every = [one.busy for both in found for each in both for one in each]
    print(f"\nThe processes had {spread(every)} of the time that passed.")
    outputs = [{one.output for each in both for one in each} for both in found]
    differing = [f"{a.form} {a.search} {a.rows}" for a, b in zip(cases, outputs) if len(b) > 1]
    print(f"Translations that differ: {', '.join(differing) or 'none'}.")


class Checkout:
    """A process that runs SCRIPT with the packages of `folder`: a line of JSON for another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Not `python script`, which would put the script's own folder before all others.
        code = f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "--child", str(folder)],
            cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> "Checkout":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """What the script says to a job.

        Raises:
            RuntimeError: its process has ended; it has said why on standard error.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(job) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self.folder}: its process has ended at {job}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def in_turns(
    folders: Sequence[Path], jobs: Sequence[dict[str, Any]], rounds: int
) -> list[list[list[dict[str, Any]]]]:
    """The answers to each job, of each folder, of each round. A job is done by all before the next
    one is; who goes first changes with the rounds."""
    answers: list[list[list[dict[str, Any]]]] = [[[] for _ in folders] for _ in jobs]
    for number in range(rounds):
        with ExitStack() as stack:
            ours = [stack.enter_context(Checkout(folder)) for folder in folders]
            for job, of_job in zip(jobs, answers):
                for place in alternating(range(len(ours)), number):
                    of_job[place].append(ours[place].answer(job))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return answers


def alternating(items: Sequence[Item], number: int) -> Sequence[Item]:
    return items[::-1] if number % 2 else items


def revision(folder: Path) -> str:
    """The commit of a checkout, with a + where files differ from it; empty where git knows none."""
    found = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--exclude=*", "--dirty=+"],
        capture_output=True, text=True,
    )  # fmt: skip
    return found.stdout.strip()


def spread(values: Sequence[float]) -> str:
    """The median, the least and the greatest."""
    least, middle, most = min(values), statistics.median(values), max(values)
    places = 2 if middle < 2 else 1 if middle < 100 else 0
    return f"{middle:,.{places}f} ({least:,.{places}f}..{most:,.{places}f})"


def ratio(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """Of the medians; between the least and the greatest of the rounds."""
    each = [a / b for a, b in zip(mine, theirs)]
    whole = statistics.median(mine) / statistics.median(theirs)
    return f"{whole:.2f} ({min(each):.2f}..{max(each):.2f})"
