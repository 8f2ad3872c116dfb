"""Training alone: our trainer against JoeyNMT's, on the same token ids.

    bash bench/peers/install.sh DIR
    python -m bench.training --peer DIR/joeynmt

Both train for some seconds on a corpus that is generated here: words drawn by Zipf's law, as long
as the captions of Multi30k, cut into pieces by `python -m training prepare`. JoeyNMT reads those
pieces as words. Vocabularies, sizes of layers, dropout, Adam and clipping are the same on both
sides. JoeyNMT counts a batch in tokens of the longer side with padding, in random order; its
limit is set so that an update has as many real target tokens as one of ours.

Every measurement is a process of its own; rounds go around the systems, and the median of each is
told. Starting, the first updates, validation and checkpoints are not counted, and everything else
is, such as making batches. Tokens are those of source and target without padding. As machines are
shared, tokens a CPU second (of all threads) are told beside those a second.
"""

import argparse
import json
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from bench.machine import described
from bench.peers.job import SPECIAL, Sizes
from bench.peers.training_job import TrainingJob
from training.batches import BatchSampler
from training.prepare import prepare
from training.recipe import load
from training.tokens import TokenPairs

ROOT = Path(__file__).parents[1]
VOCABULARY = 8000
WORDS = 15_000  # different ones, of each language
RECIPE = """
name: bench
data: {train: {source: train.source, target: train.target}, held_out: 20}
tokenizer: {source_vocabulary: VOCABULARY, target_vocabulary: VOCABULARY}
model: {}
""".replace("VOCABULARY", str(VOCABULARY))


@dataclass(frozen=True)
class System:
    name: str
    python: Path
    module: str
    precision: str = "fp32"
    input_feeding: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--peer", type=Path, metavar="DIR", help="JoeyNMT's environment")
    parser.add_argument(
        "--sizes", nargs="+", default=["1x512:256", "1x512:512", "2x512:512"],
        metavar="LAYERSxWIDTH:EMBEDDING", help="the encoder has half the width each way",
    )  # fmt: skip
    parser.add_argument("--batch-tokens", type=int, default=1500, help="of ours, with padding")
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=60, help="of each system in all rounds")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is told")
    parser.add_argument("--pairs", type=int, default=10_000)
    arguments = parser.parse_args()
    command = shlex.join(["python", "-m", "bench.training", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as name:
        pairs = prepared(Path(name), arguments.pairs)
        batch = arguments.batch_tokens
        peer_batch = as_large(pairs, batch)
        means = [f"{float(one.double().mean()):.1f}" for one in
                 (pairs.source_lengths(), pairs.target_lengths())]  # fmt: skip
        print(
            f"{described()}; `{command}`; {len(pairs)} pairs of {means[0]} source and {means[1]} "
            f"target tokens, vocabularies of {VOCABULARY:,}, dropout {arguments.dropout:g}, label "
            f"smoothing {arguments.label_smoothing:g}, Adam, median of {arguments.rounds} rounds "
            f"of {arguments.seconds / arguments.rounds:g} s; batch_tokens {batch}, JoeyNMT's "
            f"batch_size {peer_batch}\n"
        )
        work = [
            TrainingJob(
                name, sizes_of(size), batch, arguments.seconds / arguments.rounds, threads, "fp32",
                False, arguments.dropout, arguments.label_smoothing,
            )
            for size in arguments.sizes
            for threads in arguments.threads
        ]  # fmt: skip
        compare(list(systems(arguments.peer)), work, peer_batch, arguments.rounds)


def sizes_of(text: str) -> Sizes:
    layers, width, embedding = (int(one) for one in text.replace("x", ":").split(":"))
    return Sizes(layers, width, embedding, VOCABULARY)


def systems(peer: Path | None) -> Iterator[System]:
    python = peer.absolute() / "bin" / "python" if peer else None
    if python is not None and python.exists():
        yield System("JoeyNMT", python, "joeynmt_training")
        yield System("JoeyNMT, input feeding", python, "joeynmt_training", input_feeding=True)
    else:
        print("JoeyNMT: not installed, left out", file=sys.stderr)
    for precision in ("fp32", "bf16"):
        yield System(f"ours, {precision}", Path(sys.executable), "ours_training", precision)


def prepared(folder: Path, count: int) -> TokenPairs:
    """Write the corpus into `folder`: text and tokens for our trainer, and their ids as words for
    JoeyNMT's. Returns the pairs of both."""
    draw = random.Random(1)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words: list[list[str]] = []
    for _ in range(2):
        spelt = ("".join(draw.choices(syllables, k=draw.randint(2, 4))) for _ in range(2 * WORDS))
        words.append(list(dict.fromkeys(spelt))[:WORDS])
    weights = list(accumulate(1 / (rank + 2.7) for rank in range(WORDS)))  # Zipf and Mandelbrot
    source, target = [], []
    for _ in range(count):
        length = min(max(round(draw.gauss(11, 3.5)), 4), 35)
        other = max(round(length * draw.gauss(1.0, 0.15)), 3)
        source.append(" ".join(draw.choices(words[0], cum_weights=weights, k=length)))
        target.append(" ".join(draw.choices(words[1], cum_weights=weights, k=other)))
    for name, texts in (("train.source", source), ("train.target", target)):
        (folder / name).write_text("\n".join(texts) + "\n", "utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, "utf-8")
    prepare(load(folder / "recipe.yaml"), folder / "run")
    pairs = TokenPairs.load(folder / "run" / "data" / "train.tokens")
    for side, tokens, offsets, ending in (
        ("source", pairs.source_tokens, pairs.source_offsets, 1),  # JoeyNMT adds EOS itself
        ("target", pairs.target_tokens, pairs.target_offsets, 0),
    ):
        ids, ends = tokens.tolist(), offsets.tolist()
        texts = [" ".join(f"w{one}" for one in ids[first : last - ending])
                 for first, last in pairwise(ends)]  # fmt: skip
        (folder / f"ids.{side}").write_text("\n".join(texts) + "\n", "utf-8")
        (folder / f"ids-dev.{side}").write_text("\n".join(texts[:20]) + "\n", "utf-8")
    vocabulary = [f"w{one}" for one in range(SPECIAL, VOCABULARY)]
    (folder / "ids.vocabulary").write_text("\n".join(vocabulary) + "\n", "utf-8")
    return pairs


def as_large(pairs: TokenPairs, batch_tokens: int) -> int:
    """JoeyNMT's batch_size that gives as many real target tokens an update as our batch_tokens."""
    ours = len(BatchSampler(pairs, batch_tokens, 1024, 1).batches(0))
    longer = pairs.source_lengths().maximum(pairs.target_lengths()).tolist()
    random.Random(1).shuffle(longer)

    def batches(size: int) -> int:
        """As its TokenBatchSampler cuts them: the pair that reaches the limit is the last one."""
        total = count = longest = 0
        for length in longer:
            count, longest = count + 1, max(longest, length)
            if count * longest >= size:
                total, count, longest = total + 1, 0, 0
        return total + (count > 0)

    low, high = 1, 100 * batch_tokens
    while low < high:
        middle = (low + high) // 2
        if batches(middle) > ours:
            low = middle + 1
        else:
            high = middle
    return low


def measured(system: System, job: TrainingJob) -> dict[str, Any]:
    """What one process measures.

    Raises:
        RuntimeError: it failed.
    """
    process = subprocess.run(
        [str(system.python), "-W", "ignore", "-m", f"bench.peers.{system.module}"],
        cwd=ROOT, input=job.to_json(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if process.returncode != 0:
        raise RuntimeError(f"{system.name}: {process.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return answer


def compare(
    running: list[System], work: list[TrainingJob], peer_batch: int, rounds: int
) -> None:
    """Print a row for each job and system, then what the systems are."""
    print("| size | threads | system | million parameters | target tokens an update | peak MB "
          "| tokens/s | tokens/CPU s | times JoeyNMT, wall | CPU |")  # fmt: skip
    print("|" + "---|" * 10, flush=True)
    notes: dict[str, None] = {}
    for job in work:
        found: dict[str, list[dict[str, Any]]] = {one.name: [] for one in running}
        for _ in range(rounds):
            for system in running:
                peer = system.module != "ours_training"
                found[system.name].append(measured(system, replace(
                    job, batch=peer_batch if peer else job.batch, precision=system.precision,
                    input_feeding=system.input_feeding,
                )))  # fmt: skip
        first = speeds(found[running[0].name])
        for name, answers in found.items():
            print(row(job, name, answers, first), flush=True)
            notes[f"{answers[0]['system']}: {answers[0]['network']}"] = None
    print("\n" + "\n".join(f"- {note}" for note in notes))


def speeds(answers: list[dict[str, Any]]) -> tuple[float, float]:
    """Median source and target tokens a second, and a CPU second."""
    wall, cpu = (
        statistics.median((one["source_tokens"] + one["target_tokens"]) / one[clock]
                          for one in answers)
        for clock in ("wall", "cpu")
    )  # fmt: skip
    return wall, cpu


def row(
    job: TrainingJob, name: str, answers: list[dict[str, Any]], peer: tuple[float, float]
) -> str:
    sizes = job.sizes
    wall, cpu = speeds(answers)
    targets = sum(one["target_tokens"] for one in answers)
    cells = [
        f"{sizes.layers}x{sizes.hidden_size}, embeddings {sizes.embedding_size}",
        str(job.threads),
        name,
        f"{answers[0]['parameters'] / 1e6:.1f}",
        f"{targets / sum(one['updates'] for one in answers):.0f}",
        f"{max(one['peak_bytes'] for one in answers) / 1e6:.0f}",
        f"{wall:.0f}", f"{cpu:.0f}",
        f"{wall / peer[0]:.2f}", f"{cpu / peer[1]:.2f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
