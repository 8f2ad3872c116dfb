"""What settings of model-config.yaml do to throughput and latency, one beside the other.

    python -m bench.settings STORE SOURCE 'round_ms=10 batchSize=128' 'round_ms=20' ...

Each set of settings is the same archive with those lines changed; the servers take turns, and
medians of the rounds are told: requests/s with 128 and 48 clients in a closed loop, and latency at
a rate of requests that arrive at random.
"""

import argparse
import re
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from bench.dynamic_batching import rebuild
from bench.load import Load, generated
from bench.machine import described
from bench.systems import System, torchserve

CLIENTS = (128, 48)


def set_lines(content: Path, settings: str) -> None:
    """Change lines of model-config.yaml.

    Raises:
        ValueError: a setting that there is no line for.
    """
    config = content / "model-config.yaml"
    text = config.read_text("utf-8")
    for key, value in (setting.split("=") for setting in settings.split()):
        text, count = re.subn(rf"^( *{key}: *)[^#\n]*", rf"\g<1>{value} ", text, flags=re.M)
        if count != 1:
            raise ValueError(f"{key}: no such line in model-config.yaml")
    config.write_text(text, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.settings", description=__doc__)
    parser.add_argument("store", type=Path, help="folder of seq2seq.mar")
    parser.add_argument("source", type=Path, help="text to send, a sentence a line")
    parser.add_argument("settings", nargs="+", metavar="'KEY=VALUE ...'")
    parser.add_argument("--rate", type=float, default=300.0, help="requests/s")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    texts = [line for line in a.source.read_text("utf-8").split("\n") if line.strip()]
    print(f"{described()}; `{' '.join(['python -m bench.settings', *sys.argv[1:]])}`\n")
    found: dict[str, list[list[float]]] = {settings: [] for settings in a.settings}
    with ExitStack() as stack:
        pool = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
        systems = []
        for settings in a.settings:
            store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="seq2serve-")))
            rebuild(a.store / "seq2seq.mar", store, partial(set_lines, settings=settings))
            systems.append(stack.enter_context(torchserve(settings, store)))

        def measured(system: System, rate: float = 0.0, clients: int = 0) -> Load:
            requests = [system.request(text, {}) for text in texts]
            return Load(system.port, requests, a.seconds, 1, rate, clients)

        for number in range(a.rounds + 1):  # the first one warms up
            for system in systems:
                with system.awake():
                    run = [
                        pool.submit(generated, measured(system, clients=count)).result().capacity
                        for count in CLIENTS
                    ]
                    outcome = pool.submit(generated, measured(system, a.rate)).result()
                if number:
                    found[system.name].append([*run, outcome.p(50), outcome.p(99)])
    heads = [f"requests/s, {count} clients" for count in CLIENTS]
    print(f"| settings | {' | '.join(heads)} | p50 ms at {a.rate:g} requests/s | p99 ms |")
    print("|---|---|---|---|---|")
    for settings, rounds in found.items():
        cells = " | ".join(f"{statistics.median(column):.0f}" for column in zip(*rounds))
        print(f"| `{settings}` | {cells} |")


if __name__ == "__main__":
    main()
