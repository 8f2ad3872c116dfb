"""BLEU of what is served: a test set over REST, with the options that a client would send.

    python -m bench.quality STORE SOURCE TARGET '{"beam_size": 5, "length_penalty": 1.0}' ...

One row for each set of options; `{}`, greedy search, is always the first.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from bench.machine import described
from server.client import translate
from server.torchserve import ServerOptions, TorchServe
from training.corpus import lines
from training.scoring import decoded_scores

PER_REQUEST = 50  # sentences


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("store", type=Path, help="folder of seq2seq.mar")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, help="the references")
    parser.add_argument("options", type=json.loads, nargs="*", help="JSON objects")
    arguments = parser.parse_args()
    texts, references = list(lines(arguments.source)), list(lines(arguments.target))
    print(f"{described()}; `{' '.join(['python -m bench.quality', *sys.argv[1:]])}`\n")
    print("| options | BLEU | chrF | sentences/s | signature |")
    print("|---|---|---|---|---|")
    with TorchServe(ServerOptions.on_free_ports(arguments.store)) as server:
        for asked in [{}, *arguments.options]:
            started = time.perf_counter()
            hypotheses = served(server.url, texts, asked)
            rate = len(texts) / (time.perf_counter() - started)
            scores = decoded_scores(hypotheses, references)
            print(f"| `{json.dumps(asked)}` | {scores.bleu:.2f} | {scores.chrf:.2f} | {rate:.0f} "
                  f"| {scores.bleu_signature} |", flush=True)


def served(url: str, texts: list[str], options: dict[str, Any]) -> list[str]:
    """The best translation of each text, in requests of several; each text is one sentence, as it
    is in evaluation."""
    found: list[str] = []
    for first in range(0, len(texts), PER_REQUEST):
        part = texts[first : first + PER_REQUEST]
        answer = translate(url, part, {"split": False, **options})
        found += [hypotheses[0]["text"] for hypotheses in answer["translations"]]
    return found


if __name__ == "__main__":
    main()
