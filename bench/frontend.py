"""What logging and Java's flags do to requests a second and latency.

    python -m bench.frontend STORE SOURCE 2>/dev/null

Closed loop, one sentence a request; the servers take turns, each standing still while another is
measured, and medians of the rounds are told. Clients (in a process of their own) and servers share
the machine.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

from bench.jvm import VARIANTS, Flags
from bench.load import Load, generated
from bench.machine import described
from bench.systems import System
from server.options import ServerOptions
from server.torchserve import TorchServe

SERVERS = {
    "all logged, java's choice": (VARIANTS["java's choice"], True),
    "quiet, java's choice": (VARIANTS["java's choice"], False),
    "quiet, flags, classes": (VARIANTS["flags, classes"], False),
}


@contextmanager
def served(name: str, store: Path, flags: Flags, verbose: bool) -> Iterator[System]:
    options = replace(ServerOptions.on_free_ports(store), verbose=verbose)
    with patch("server.torchserve.jvm_flags", flags), TorchServe(options) as server:
        system = System(name, server.port, "/predictions/seq2seq", server.pid)
        with system.awake():
            pass  # and asleep until its turn
        yield system


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.frontend", description=__doc__)
    parser.add_argument("store", type=Path, help="folder of seq2seq.mar")
    parser.add_argument("source", type=Path, help="text to send, a sentence a line")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    texts = [line for line in a.source.read_text("utf-8").split("\n") if line.strip()]
    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    with ExitStack() as stack:
        pool = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
        systems = [
            stack.enter_context(served(name, a.store, *how)) for name, how in SERVERS.items()
        ]
        # TorchServe's end is not for a process that stands still.
        for system in systems:
            stack.callback(system.awake().__enter__)
        for number in range(a.rounds + 1):  # the first one warms up
            for clients in a.clients:
                for system in systems:
                    requests = [system.request(text, {}) for text in texts]
                    load = Load(system.port, requests, a.seconds, 1, 0.0, clients)
                    with system.awake():
                        run = pool.submit(generated, load).result()
                    if number:
                        row = (run.capacity, run.p(50), run.p(99))
                        found.setdefault((system.name, clients), []).append(row)
    print(f"{described()}; `{' '.join(['python -m bench.frontend', *sys.argv[1:]])}`\n")
    print("| | clients | requests/s | p50 ms | p99 ms |")
    print("|---|---|---|---|---|")
    for (name, clients), rows in sorted(found.items(), key=lambda one: one[0][1]):
        rate, p50, p99 = (statistics.median(column) for column in zip(*rows))
        print(f"| {name} | {clients} | {rate:.0f} | {p50:.1f} | {p99:.1f} |")


if __name__ == "__main__":
    main()
