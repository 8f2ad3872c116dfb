"""Requests a second and latency through TorchServe, against the same engine without a server.

    python -m bench.serving STORE SOURCE

Closed loop: each client sends one sentence, waits for the answer, sends the next, over a
connection that it keeps. Clients and server share this machine, as the line above the table says.
The peer is the engine of the same archive in this process, one sentence at a time: what decoding
alone costs.
"""

import argparse
import http.client
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import torch

from bench.machine import described
from handler.decoding import DecodingOptions, Engine, decode_in_order
from handler.decoding.model import load
from handler.tokenizer import Tokenizer
from server.torchserve import ServerOptions, TorchServe

WARM_UP = 20  # requests


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("store", type=Path, help="folder of seq2seq.mar")
    parser.add_argument("source", type=Path, help="text to send, a sentence a line")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=1000, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is told")
    arguments = parser.parse_args()
    texts = [line for line in arguments.source.read_text("utf-8").split("\n") if line.strip()]
    alone = decoded_alone(arguments.store / "seq2seq.mar", texts[:300])
    print(f"{described()}; `{' '.join(['python -m bench.serving', *sys.argv[1:]])}`\n")
    print("| | clients | requests/s | p50 ms | p99 ms | p50 / decoding alone |")
    print("|---|---|---|---|---|---|")
    median = statistics.median(alone)
    print(f"| decoding alone | | {1000 / statistics.mean(alone):.0f} | {median:.2f} "
          f"| {percentile(alone, 99):.2f} | 1.0 |")
    with TorchServe(ServerOptions.on_free_ports(arguments.store)) as server:
        load_clients(server.url, texts, 4, WARM_UP)
        for clients in arguments.clients:
            rounds = [
                load_clients(server.url, texts, clients, arguments.requests)
                for _ in range(arguments.rounds)
            ]
            rate = statistics.median(len(ms) / seconds for seconds, ms in rounds)
            p50, p99 = (
                statistics.median(percentile(ms, p) for _, ms in rounds) for p in (50, 99)
            )
            print(f"| TorchServe | {clients} | {rate:.0f} | {p50:.2f} | {p99:.2f} "
                  f"| {p50 / median:.1f} |", flush=True)


def percentile(values: list[float], p: int) -> float:
    """The smallest value that at least p % of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, -(-len(ordered) * p // 100) - 1)]


def decoded_alone(archive: Path, texts: list[str]) -> list[float]:
    """Milliseconds from text to text for each sentence, without a server."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(archive) as content:
        content.extractall(folder)
        model = load(f"{folder}/model.pt", torch.device("cpu"))
        source, target = (Tokenizer(f"{folder}/{side}.model") for side in ("source", "target"))
    engine = Engine(model, rows=1)
    spent = []
    for text in texts:
        started = time.perf_counter()
        tokens = [*source.encode(text), model.eos_id]
        (event,) = decode_in_order(engine, [tokens], DecodingOptions())
        target.decode(event.results[0].tokens)
        spent.append(1000 * (time.perf_counter() - started))
    return spent[WARM_UP:]


def load_clients(
    url: str, texts: list[str], clients: int, requests: int
) -> tuple[float, list[float]]:
    """Seconds for all `requests`, and milliseconds for each.

    Raises:
        RuntimeError: an answer other than 200; a benchmark of errors means nothing.
    """
    numbers = itertools.count()
    spent: list[float] = []
    failures: list[str] = []

    def client() -> None:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        while (number := next(numbers)) < requests and not failures:
            body = json.dumps({"text": texts[number % len(texts)]})
            started = time.perf_counter()
            connection.request(
                "POST", "/predictions/seq2seq", body, {"Content-Type": "application/json"}
            )
            reply = connection.getresponse()
            content = reply.read()
            spent.append(1000 * (time.perf_counter() - started))
            if reply.status != 200:
                failures.append(f"{reply.status}: {content[:200]!r}")
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise RuntimeError(failures[0])
    return time.perf_counter() - started, spent


if __name__ == "__main__":
    main()
