"""Requests a second and latency through TorchServe, against the same engine without a server.

    python -m bench.serving STORE SOURCE [--int8 STORE] [--peers PYTHON]

Closed loop: each client sends one sentence, waits for the answer, sends the next, over a
connection that it keeps. Clients and server share this machine, as the line above the table says.
Decoding alone is the engine of an archive in this process, one sentence at a time, with as many
threads as a worker has. --int8 names the store of the same model with int8 weights; with --peers
its float32 form is served by bench/plain_server.py as well, by LitServe and by FastAPI, where
PYTHON is of an environment with litserve, torch and sentencepiece. All take turns.
"""

import argparse
import statistics
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

import torch

from bench.load import Load, generated, percentile
from bench.machine import described
from bench.systems import plain, torchserve
from handler.decoding import DecodingOptions, Engine, decode_in_order
from handler.decoding.model import load
from handler.seq2seq_handler import usable_cpus
from handler.tokenizer import Tokenizer

Row = tuple[float, float, float]  # requests/s, p50 ms, p99 ms


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serving", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("store", type=Path, help="folder of seq2seq.mar")
    parser.add_argument("source", type=Path, help="text to send, a sentence a line")
    parser.add_argument("--int8", type=Path, help="folder of seq2seq.mar with int8 weights")
    parser.add_argument("--peers", type=Path, metavar="PYTHON", help="that has litserve")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is told")
    a = parser.parse_args()
    texts = [line for line in a.source.read_text("utf-8").split("\n") if line.strip()]
    torch.set_num_threads(max(1, usable_cpus() - 1))
    stores = {"": a.store} | ({", int8": a.int8} if a.int8 else {})
    found: dict[tuple[str, int], list[Row]] = {}
    with ExitStack() as stack:
        pool = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
        alone = {form: Alone(store / "seq2seq.mar") for form, store in stores.items()}
        systems = [
            stack.enter_context(torchserve(f"TorchServe{form}", store))
            for form, store in stores.items()
        ]
        if a.peers:
            archive = a.store / "seq2seq.mar"
            for name in ("litserve", "fastapi"):
                systems.append(stack.enter_context(plain(name, a.peers, archive)))
        for system in systems:
            with system.awake():
                pass  # and asleep until its turn
        for number in range(a.rounds + 1):  # the first one warms up
            rows = {(f"decoding alone{form}", 0): one.measured(texts, a.seconds)
                    for form, one in alone.items()}  # fmt: skip
            for clients in a.clients:
                for system in systems:
                    requests = [system.request(text, {}) for text in texts]
                    asked = Load(system.port, requests, a.seconds, number, 0.0, clients)
                    with system.awake():
                        run = pool.submit(generated, asked).result()
                    if run.failures:  # a benchmark of errors means nothing
                        raise RuntimeError(f"{system.name}: {dict(run.failures)}")
                    rows[system.name, clients] = (run.capacity, run.p(50), run.p(99))
            if number:
                for key, row in rows.items():
                    found.setdefault(key, []).append(row)
    print(f"{described()}; `{' '.join(['python -m bench.serving', *sys.argv[1:]])}`\n")
    print("| | clients | requests/s | p50 ms | p99 ms | p50 / decoding alone |")
    print("|---|---|---|---|---|---|")
    for (name, clients), measured in found.items():
        rate, p50, p99 = (statistics.median(column) for column in zip(*measured))
        form = ", int8" if name.endswith("int8") else ""
        own = found[f"decoding alone{form}", 0]
        share = statistics.median(row[1] / other[1] for row, other in zip(measured, own))
        print(f"| {name} | {clients or ''} | {rate:.0f} | {p50:.2f} | {p99:.2f} | {share:.2f} |")


class Alone:
    """An archive's engine in this process, without a server."""

    def __init__(self, archive: Path) -> None:
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(archive) as content:
            content.extractall(folder)
            self.model = load(f"{folder}/model.pt", torch.device("cpu"))
            self.source, self.target = (
                Tokenizer(f"{folder}/{side}.model") for side in ("source", "target")
            )
        self.engine = Engine(self.model, rows=1)

    def measured(self, texts: list[str], seconds: float) -> Row:
        """From text to text, one after the other."""
        spent: list[float] = []
        end = time.perf_counter() + seconds
        while (started := time.perf_counter()) < end:
            tokens = [*self.source.encode(texts[len(spent) % len(texts)]), self.model.eos_id]
            (event,) = decode_in_order(self.engine, [tokens], DecodingOptions())
            self.target.decode(event.results[0].tokens)
            spent.append(1000 * (time.perf_counter() - started))
        return 1000 / statistics.mean(spent), percentile(spent, 50), percentile(spent, 99)


if __name__ == "__main__":
    main()
