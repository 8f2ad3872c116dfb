"""Part `serve`: TorchServe on the device, with a model of the Multi30k recipe's shape.

It needs TorchServe, Java and sentencepiece, which are imported where this part runs.
"""

import argparse
import http.client
import json
import random
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml

from bench.gpu.ledger import ROOT, Ledger, Record
from bench.gpu.models import MULTI30K, Models

SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {}, "beam 5": {"beam_size": 5, "length_penalty": 0.6},
}  # fmt: skip
CROWD = 64
WORDS = 15_000
MANIFEST = {
    "createdOn": "01/01/1980 00:00:00", "runtime": "python", "archiverVersion": "0.12.0",
    "model": {
        "modelName": "seq2seq", "modelVersion": "1.0", "serializedFile": "model.pt",
        "handler": "seq2serve.py", "configFile": "model-config.yaml",
    },
}  # fmt: skip


def serve(a: argparse.Namespace, models: Models, ledger: Ledger) -> None:
    head = {"part": "serve", "store": "given" if a.store else "random", "rows": a.served_rows,
            "weights": a.served_weights}  # fmt: skip
    keys = [{**head, "what": "ready"}]
    for search in SEARCHES:
        keys.append({**head, "what": "company", "search": search})
        keys += [{**head, "what": "load", "search": search, "clients": n} for n in a.clients]
    if all(ledger.of(key) is not None for key in keys):
        return
    from bench.systems import torchserve

    with tempfile.TemporaryDirectory(prefix="seq2serve-") as name:
        store, asked = store_of(a, models, Path(name))
        started = time.perf_counter()
        with torchserve("TorchServe", store) as server, ProcessPoolExecutor(
            1, get_context("spawn")
        ) as clients:
            ready = time.perf_counter() - started
            ledger.measure(keys[0], lambda: {"ready_s": ready})
            for key in keys[1:]:
                options = SEARCHES[str(key["search"])]
                bodies = [{**one, **options} for one in asked]

                def make(
                    key: Record = key, bodies: list[dict[str, Any]] = bodies
                ) -> Record:
                    if key["what"] == "company":
                        return company(server.port, server.path, bodies[: a.sentences])
                    requests = [server.request(one["text"], one) for one in bodies]
                    return loaded(clients, server.port, requests, key["clients"], a.seconds)

                ledger.measure(key, make)


def loaded(
    pool: ProcessPoolExecutor, port: int, requests: list[bytes], clients: int, seconds: float
) -> Record:
    """A closed loop: each client sends when it was answered. After one that warms up."""
    from bench.load import Load, generated

    for spent in (seconds / 3, seconds):
        outcome = pool.submit(
            generated, Load(port, requests, spent, 1, 0.0, clients)
        ).result()
    if outcome.failures:
        raise RuntimeError(f"requests failed: {dict(outcome.failures)}")
    return {"per_second": outcome.capacity, "p50_ms": outcome.p(50), "p99_ms": outcome.p(99)}


def company(port: int, path: str, bodies: list[dict[str, Any]]) -> Record:
    """Answers alone, and each three times in a crowd."""

    def ask(body: dict[str, Any]) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", path, json.dumps(body), headers)
            reply = connection.getresponse()
            answer = json.loads(reply.read())
            if reply.status != 200:
                raise RuntimeError(f"{reply.status}: {answer}")
            return answer["translations"]
        finally:
            connection.close()

    started = time.perf_counter()
    alone = [ask(one) for one in bodies]
    spent = time.perf_counter() - started
    with ThreadPoolExecutor(CROWD) as crowd:
        together = list(crowd.map(ask, bodies * 3))
    equal = sum(one == other for one, other in zip(alone * 3, together))
    return {"as_alone": equal / len(together), "alone_ms": 1e3 * spent / len(bodies)}


def store_of(
    a: argparse.Namespace, models: Models, folder: Path
) -> tuple[Path, list[dict[str, Any]]]:
    """A folder with seq2seq.mar, set up as the arguments say, and what to ask of it."""
    from bench.dynamic_batching import rebuild

    if a.store is None:
        archive, asked = of_random_weights(folder, a.served_vocabulary)
    else:
        archive = a.store / "seq2seq.mar"
        lines = a.text.read_text("utf-8").split("\n")
        asked = [{"text": line} for line in lines if line.strip()]

    def change(content: Path) -> None:
        path = content / "model-config.yaml"
        config = yaml.safe_load(path.read_text("utf-8"))
        handler = config.setdefault("handler", {})
        if a.device == "cuda":
            handler["require_gpu"] = True
        if a.served_weights != "shipped" and a.device == "cuda":
            handler["weights"] = a.served_weights
        if a.served_rows:
            handler["rows"] = a.served_rows
            config |= {"batchSize": a.served_rows + 16, "jobQueueSize": 2 * a.served_rows + 256}
        path.write_text(yaml.safe_dump(config), "utf-8")

    rebuild(archive, folder / "store", change)
    return folder / "store", asked


def of_random_weights(folder: Path, vocabulary: int) -> tuple[Path, list[dict[str, Any]]]:
    """An archive, and requests: texts of the lengths of captions, whose translations have lengths
    that are asked for, as random weights would end nowhere."""
    from model import ModelOptions, Network, ServingModel
    from model.serving import scripted
    from training.recipe import TokenizerOptions
    from training.tokenizer import learn

    texts = captions(4000)
    tokenizer = learn(TokenizerOptions(algorithm="bpe"), vocabulary, texts, "source_vocabulary")
    torch.manual_seed(1)
    network = Network(ModelOptions(**MULTI30K), vocabulary, vocabulary)
    scripted(ServingModel(network, 128, 128, '{"weights": "float32"}')).save(
        str(folder / "model.pt")
    )
    handler = ROOT / "handler"
    archive = folder / "seq2seq.mar"
    with zipfile.ZipFile(archive, "w") as content:
        content.write(folder / "model.pt", "model.pt")
        for side in ("source", "target"):
            content.writestr(f"{side}.model", tokenizer)
        for name in ("seq2serve.py", "model-config.yaml"):
            content.write(handler / name, name)
        for path in sorted(handler.rglob("*")):
            if path.suffix in (".py", ".cu"):
                content.write(path, Path("handler") / path.relative_to(handler))
        content.writestr("MAR-INF/MANIFEST.json", json.dumps(MANIFEST))
    draw = random.Random(2)
    lengths = [min(max(round(draw.gauss(15, 4)), 5), 40) for _ in texts]
    return archive, [
        {"text": text, "min_length": length, "max_length": length}
        for text, length in zip(texts[:1000], lengths)
    ]


def captions(count: int) -> list[str]:
    """Words by Zipf's law, as long as the captions of Multi30k."""
    draw = random.Random(1)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    spelt = ("".join(draw.choices(syllables, k=draw.randint(2, 4))) for _ in range(2 * WORDS))
    words = list(dict.fromkeys(spelt))[:WORDS]
    weights = list(accumulate(1 / (rank + 2.7) for rank in range(len(words))))
    lengths = [min(max(round(draw.gauss(11, 3.5)), 4), 35) for _ in range(count)]
    return [" ".join(draw.choices(words, cum_weights=weights, k=one)) for one in lengths]
