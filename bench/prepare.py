"""The verbs prepare and train on a corpus of any size: seconds and memory.

    python -m bench.prepare --pairs 4500000

Writes a corpus of so many pairs into a temporary folder (words of Zipf's law and sentences as long
as those of news; a target says its source word by word, some words left out), runs
`python -m training prepare` on it, and then, in a process of its own, opens the tokens, draws the
batches of an epoch and collates some of them; then `python -m training train` makes a few updates
of a small network and validates once. Peak RSS is what the kernel counted of each process,
pages of mapped files included, which it takes back where memory is short. OMP_NUM_THREADS is the
number of threads that encode. Everything is removed at the end.
"""

import argparse
import itertools
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch

from bench.machine import described
from model import SpecialTokens
from training.batches import BatchSampler, collate
from training.tokens import TokenPairs

ROOT = Path(__file__).parents[1]
WORDS = 200_000  # kinds of words of a side
EXPONENT = 1.05  # of Zipf's law
MEAN_LENGTH, SHAPE = 25, 3.0  # words of a sentence: a gamma distribution
OMITTED = 0.05  # share of words that the target leaves out
CHUNK = 10_000  # pairs written together
HELD_OUT = 200  # pairs, which an untrained network translates slowly
COLLATED = 200  # batches
UPDATES = 50
RECIPE = f"""\
name: bench
data: {{train: {{source: train.source, target: train.target}}, held_out: {HELD_OUT}}}
model: {{embedding_size: 64, encoder_hidden_size: 64, decoder_hidden_size: 64, attention_size: 64}}
tokenizer: {{algorithm: %s, source_vocabulary: %d, target_vocabulary: %d}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", type=int, nargs="+", default=[450_000])
    parser.add_argument("--algorithm", choices=("unigram", "bpe"), default="unigram")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="of each side")
    parser.add_argument("--folder", type=Path, help="for the temporary files; default: TMPDIR's")
    parser.add_argument("--sample", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sample is not None:
        print(json.dumps(sampled(arguments.sample)))
        return
    command = shlex.join(["python", "-m", "bench.prepare", *sys.argv[1:]])
    print(f"{described()}, {torch.get_num_threads()} threads; `{command}`\n")
    columns = []
    for pairs in arguments.pairs:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            columns.append(measured(pairs, arguments, Path(folder)))
    print(f"| pairs | {' | '.join(f'{pairs:,}' for pairs in arguments.pairs)} |")
    print("|---|" + "---:|" * len(columns))
    for name in columns[0]:
        print(f"| {name} | {' | '.join(column[name] for column in columns)} |")


def measured(pairs: int, arguments: argparse.Namespace, folder: Path) -> dict[str, str]:
    """A column of the table, by the names of its rows; all files of it are in `folder`."""
    text = write_corpus(folder, pairs)
    size = arguments.vocabulary
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE % (arguments.algorithm, size, size))
    run = folder / "run"
    started = time.monotonic()
    prepare, _ = run_alone("-m", "training", "prepare", str(recipe), "--run", str(run))
    seconds = time.monotonic() - started
    worked = prepare.ru_utime + prepare.ru_stime
    tokens = run / "data" / "train.tokens"
    _, output = run_alone("-m", "bench.prepare", "--sample", str(tokens))
    found = json.loads(output)
    epochs = UPDATES / found["batches"]
    started = time.monotonic()
    learnt, _ = run_alone("-m", "training", "train", str(recipe), "--run", str(run),
                          "--set", f"training.epochs={epochs}")  # fmt: skip
    trained = time.monotonic() - started
    return {
        "text, both sides, MB": f"{text / 1e6:,.0f}",
        "token file of training, MB": f"{tokens.stat().st_size / 1e6:,.0f}",
        "prepare, seconds": f"{seconds:,.0f}",
        "prepare, seconds of CPU": f"{worked:,.0f}",
        "prepare, lines of both sides a second of CPU": f"{2 * pairs / worked:,.0f}",
        "prepare, peak RSS, MB": f"{prepare.ru_maxrss / 1e3:,.0f}",
        "opening the tokens, seconds": f"{found['opening']:.2f}",
        "drawing the batches of an epoch, seconds": f"{found['drawing']:.1f}",
        "batches": f"{found['batches']:,}",
        f"collating {COLLATED} of them, ms each": f"{found['collating']:.2f}",
        "drawing and collating, peak RSS, MB": f"{found['peak']:,.0f}",
        "of which torch and the rest of Python, MB": f"{found['importing']:,.0f}",
        "of which pages of the token file, MB": f"{found['mapped']:,.0f}",
        f"training, {UPDATES} updates and a validation, seconds": f"{trained:,.0f}",
        "training, peak RSS, MB": f"{learnt.ru_maxrss / 1e3:,.0f}",
    }


def run_alone(*command: str) -> tuple[resource.struct_rusage, str]:
    """Runs Python; what it used, and what it wrote to standard output."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{shlex.join(command)}: ended with {process.returncode}")
    return usage, output


def sampled(path: Path) -> dict[str, float]:
    """Draws the batches of an epoch and collates some of them."""
    importing, mapped = memory("VmHWM"), memory("RssFile")
    started = time.monotonic()
    pairs = TokenPairs.load(path)
    opened = time.monotonic()
    sampler = BatchSampler(pairs, batch_tokens=4096, batch_sentences=1024, seed=1)
    batches = sampler.batches(0)
    drawn = time.monotonic()
    for indices in batches[:COLLATED]:
        collate(pairs, indices, SpecialTokens())
    collated = time.monotonic()
    return {
        "opening": opened - started,
        "drawing": drawn - opened,
        "batches": len(batches),
        "collating": 1e3 * (collated - drawn) / min(COLLATED, len(batches)),
        "importing": importing,
        "mapped": memory("RssFile") - mapped,
        "peak": memory("VmHWM"),
    }


def memory(kind: str) -> float:
    """MB of this process: VmHWM, the peak, or RssFile, pages of mapped files."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{kind}:")[1].split()[0]) / 1e3


def write_corpus(folder: Path, pairs: int) -> int:
    """Writes train.source and train.target, and returns their bytes."""
    names = "train.source", "train.target"
    with (folder / names[0]).open("w") as source, (folder / names[1]).open("w") as target:
        for source_lines, target_lines in chunks(pairs):
            source.writelines(source_lines)
            target.writelines(target_lines)
    return sum((folder / name).stat().st_size for name in names)


def chunks(pairs: int) -> Iterator[tuple[list[str], list[str]]]:
    """Lines of both sides; the same for the same count."""
    draw = numpy.random.default_rng(1)
    vocabularies = [words(draw, letters) for letters in ("etaoinshrdlu", "enirstadhulg")]
    weights = numpy.arange(1, WORDS + 1) ** -EXPONENT
    reached = numpy.cumsum(weights / weights.sum())
    for start in range(0, pairs, CHUNK):
        count = min(CHUNK, pairs - start)
        lengths = 1 + draw.gamma(SHAPE, (MEAN_LENGTH - 1) / SHAPE, count).astype(int)
        ends = lengths.cumsum()
        ranks = numpy.minimum(reached.searchsorted(draw.random(ends[-1])), WORDS - 1)
        said = draw.random(ends[-1]) >= OMITTED
        said[ends - 1] = True  # no target is empty
        told = numpy.concatenate([[0], said.cumsum()[ends - 1]])
        yield (
            sentences(vocabularies[0][ranks], numpy.concatenate([[0], ends])),
            sentences(vocabularies[1][ranks[said]], told),
        )


def words(draw: numpy.random.Generator, letters: str) -> "numpy.typing.NDArray[numpy.object_]":
    """As many distinct words, the frequent ones short."""
    found: dict[str, None] = {}
    while len(found) < WORDS:
        length = 1 + int(draw.poisson(1 + numpy.log2(2 + len(found)) / 2.5))
        found["".join(letters[i] for i in draw.integers(0, len(letters), length))] = None
    return numpy.array(list(found), dtype=object)


def sentences(
    text: "numpy.typing.NDArray[numpy.object_]", offsets: "numpy.typing.NDArray[numpy.int64]"
) -> list[str]:
    """The words between one offset and the next, as a line each."""
    all_words = text.tolist()
    return [" ".join(all_words[a:b]) + "\n" for a, b in itertools.pairwise(offsets.tolist())]


if __name__ == "__main__":
    main()
