"""Decoding alone, without text or server: our engine against other toolkits' LSTMs.

    bash bench/peers/install.sh DIR
    python -m bench.decoding --peers DIR

Networks of the same sizes with random weights decode the same sentences of 10 to 30 random tokens
into exactly 25 tokens each. Every system gets the sentences sorted by length and in its own kind of
batches, and encodes as part of what is timed; text, tokenizers and vocabularies are not. Each
system is a process of its own; rounds go around them, so that all meet the same machine, and the
median of each is told. Below the table stands what network each system has.

    python -m bench.decoding --beside FOLDER --rounds 7

measures our engine beside that of another checkout, say of the version before, in CPU time: the
ratio of medians, between the least and the greatest of the rounds.

`floor` is what the matrix products alone of our network would reach in fp32, measured in the same
rounds: see `bench.peers.floor`, which tells what it counts and what can go below it.

    python -m bench.decoding --model MODEL.pt --source-tokenizer source.model --text test.source

measures a trained model at the lengths that it gives: see `bench.peers.static`. `--profile` tells
instead where the time of our own decoding goes.
"""

import argparse
import json
import random
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.machine import described
from bench.peers import profiled, static
from bench.peers.floor import Floor
from bench.peers.job import SPECIAL, Job, Sizes
from bench.turns import alternating, ratio, revision, spread

ROOT = Path(__file__).parents[1]
PEERS = {
    "JoeyNMT": ("joeynmt", "joeynmt_rnn"),
    "OpenNMT-py": ("opennmt", "opennmt_rnn"),
    "fairseq": ("fairseq", "fairseq_lstm"),
}
OURS, INT8 = "ours", "ours int8"
# Runs a module of this bench with the packages of another checkout.
BESIDE = """
import sys, runpy
from pathlib import Path
root, folder, module = sys.argv[1:]
sys.path.insert(0, folder)
import handler, model, training
assert Path(handler.__file__).resolve().is_relative_to(Path(folder).resolve()), handler.__file__
sys.path[0] = root
runpy.run_module(module, run_name="__main__")
"""
TOKENS = 25  # of each target
VOCABULARY = 8000


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.decoding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--peers", type=Path, metavar="DIR", help="made by bench/peers/install.sh")
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="another checkout of ours")
    parser.add_argument("--sizes", nargs="+", default=["2x512", "4x1000"], metavar="LAYERSxWIDTH")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", help="default: 1 16 64; of text, 16 64")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is told")
    parser.add_argument("--sentences", type=int, default=512, help="of text: at most this many")
    parser.add_argument("--sentences-at-1", type=int, help="at batch 1, where all take long")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[*FORMATS], help="beside")
    parser.add_argument("--profile", action="store_true", help="of ours alone, by operators")
    parser.add_argument("--model", type=Path, help="a trained model.pt, instead of random weights")
    parser.add_argument("--source-tokenizer", type=Path)
    parser.add_argument("--text", type=Path, help="source sentences for --model, one a line")
    arguments = parser.parse_args()
    command = shlex.join(["python", "-m", "bench.decoding", *sys.argv[1:]])
    if arguments.model is not None:
        if arguments.source_tokenizer is None or arguments.text is None:
            parser.error("--model needs --source-tokenizer and --text")
        print(f"{described()}; `{command}`\n")
        static.measure(arguments)
        return
    if arguments.sentences_at_1 is None:
        arguments.sentences_at_1 = arguments.sentences
    if arguments.profile:
        print(f"{described()}; `{command}`\n")
        profiled.measure(jobs(arguments))
        return
    if arguments.beside is not None:
        print(f"{described()}; `{command}`; target tokens a second of CPU time\n")
        folder, work = arguments.beside.absolute(), list(jobs(arguments))
        beside(folder, work, arguments.rounds, arguments.formats)
        return
    print(
        f"{described()}; `{command}`; target tokens a second, {arguments.sentences} sentences "
        f"({arguments.sentences_at_1} at batch 1) of 10 to 30 tokens, {TOKENS} target tokens "
        f"each, vocabulary {VOCABULARY:,}, random weights, fp32, median of "
        f"{arguments.rounds} rounds\n"
    )
    with ExitStack() as stack:
        runners = {
            name: stack.enter_context(Runner(name, python, module))
            for name, python, module in installed(arguments.peers)
        }
        compare(runners, list(jobs(arguments)), arguments.rounds)


def installed(folder: Path | None) -> Iterator[tuple[str, Path, str]]:
    """Name, Python and module of each system that can run, ours last."""
    for name, (place, module) in PEERS.items():
        python = folder.absolute() / place / "bin" / "python" if folder else None
        if python is not None and python.exists():
            yield name, python, module
        else:
            print(f"{name}: not installed, left out", file=sys.stderr)
    yield OURS, Path(sys.executable), "ours"
    yield INT8, Path(sys.executable), "ours_int8"


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """A job for each row of the table; fewer sentences are the first ones of more."""
    draw = random.Random(1)
    sources = [
        [draw.randrange(SPECIAL, VOCABULARY) for _ in range(draw.randint(10, 30))]
        for _ in range(max(arguments.sentences, arguments.sentences_at_1))
    ]
    for size in arguments.sizes:
        layers, width = map(int, size.split("x"))
        sizes = Sizes(layers, width, embedding_size=width, vocabulary=VOCABULARY)
        for threads in arguments.threads:
            for beam_size in arguments.beams:
                for batch in arguments.batches or [1, 16, 64]:
                    count = arguments.sentences_at_1 if batch == 1 else arguments.sentences
                    cpu = arguments.beside is not None
                    yield Job(sizes, sources[:count], TOKENS, batch, beam_size, threads, cpu)


class Runner:
    """A system in a process of its own, whose complaints go to standard error."""

    def __init__(self, name: str, python: Path, module: str, folder: Path = ROOT) -> None:
        self.name = name
        run = ["-m", f"bench.peers.{module}"]
        if folder != ROOT:
            run = ["-c", BESIDE, str(ROOT), str(folder), f"bench.peers.{module}"]
        self.process = subprocess.Popen(
            [str(python), "-W", "ignore", *run],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()

    def answer(self, job: Job) -> dict[str, Any]:
        """What the system says to a job; `error` where it failed."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(job.to_json() + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return {"error": "its process has ended"}
        answer: dict[str, Any] = json.loads(line)
        return answer


FORMATS = {"float32": "ours", "int8": "ours_int8"}  # our modules of `bench.peers`


def beside(folder: Path, work: list[Job], rounds: int, formats: list[str]) -> None:
    """Print our speed, that of another checkout, and the ratio, for each job and number format."""
    names = f"here ({revision(ROOT)})", f"beside ({revision(folder)})"
    print(f"| size | threads | | batch | format | {names[0]} | {names[1]} | here / beside |")
    print("|" + "---|" * 8, flush=True)
    python = Path(sys.executable)
    with ExitStack() as stack:
        systems = [
            (form, [stack.enter_context(Runner(form, python, module, at)) for at in (ROOT, folder)])
            for form, module in FORMATS.items()
            if form in formats
        ]
        for job in work:
            for form, both in systems:
                rates: list[list[float]] = [[], []]
                for number in range(rounds):
                    for place in alternating((0, 1), number):
                        answer = both[place].answer(job)
                        if "error" in answer:
                            sys.exit(f"{names[place]}: {answer['error']}")
                        rates[place].append(answer["tokens_per_second"])
                cells = [*named(job), form, *map(spread, rates), ratio(*rates)]
                print(f"| {' | '.join(cells)} |", flush=True)


def named(job: Job) -> list[str]:
    search = "greedy" if job.beam_size == 1 else f"beam {job.beam_size}"
    size = f"{job.sizes.layers}x{job.sizes.hidden_size}"
    return [size, str(job.threads), search, str(job.batch)]


def compare(runners: dict[str, Runner], work: list[Job], rounds: int) -> None:
    """Print a row for each job as soon as it is measured, then what the systems are."""
    peers = [name for name in runners if name not in (OURS, INT8)]
    columns = [*peers, OURS, INT8, "ours / best peer", "int8 / best peer", "floor", "ours / floor"]
    print(f"| size | threads | | batch | {' | '.join(columns)} |")
    print("|" + "---|" * (4 + len(columns)), flush=True)
    notes: dict[str, str] = {}
    for job in work:
        rates: dict[str, list[float]] = {name: [] for name in [*runners, "floor"]}
        floor = Floor(job)
        for _ in range(rounds):
            for name, runner in runners.items():
                answer = runner.answer(job)
                if "error" in answer:
                    print(f"{name}: {answer['error']}", file=sys.stderr)
                    continue
                rates[name].append(answer["tokens_per_second"])
                notes[f"{answer['system']} ({answer['versions']}): {answer['network']}"] = name
            rates["floor"].append(floor.tokens_per_second())
        told = {name: statistics.median(found) for name, found in rates.items() if found}
        print(row(job, told, peers), flush=True)
    print("\n" + "\n".join(f"- {note}" for note in sorted(notes, key=lambda note: notes[note])))


def row(job: Job, told: dict[str, float], peers: list[str]) -> str:
    ours, int8, floor = told.get(OURS), told.get(INT8), told["floor"]
    best = max((told[name] for name in peers if name in told), default=None)
    cells = [
        *named(job),
        *(f"{told[name]:.0f}" if name in told else "failed" for name in [*peers, OURS, INT8]),
        f"{ours / best:.2f}" if ours and best else "",
        f"{int8 / best:.2f}" if int8 and best else "",
        f"{floor:.0f}",
        f"{ours / floor:.0%}" if ours else "",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
