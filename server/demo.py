"""python -m server.demo STORE SOURCE TARGET: serve an archive, translate a few lines, stop.

The last stage of `make demo`: what a client sends and gets, on ports that are free.
"""

import argparse
import json
import sys
from itertools import islice
from pathlib import Path

from server.client import curl, translate
from server.errors import ServerError
from server.torchserve import ServerOptions, TorchServe


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m server.demo", description=__doc__)
    parser.add_argument("store", type=Path, help="folder of the archive")
    parser.add_argument("source", type=Path, help="text to translate, a sentence a line")
    parser.add_argument("target", type=Path, help="what it should become")
    parser.add_argument("--lines", type=int, default=8, help="how many (default %(default)s)")
    arguments = parser.parse_args()
    try:
        demonstrate(arguments.store, arguments.source, arguments.target, arguments.lines)
    except (ServerError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def demonstrate(store: Path, source: Path, target: Path, count: int) -> None:
    """Raises ServerError where the server does not start or answer, or there is no text."""
    texts, expected = (first_lines(path, count) for path in (source, target))
    if not texts:
        raise ServerError(f"{source}: nothing to translate in its first {count} lines")
    print(f"starting TorchServe with {store} ...", flush=True)
    with TorchServe(ServerOptions.on_free_ports(store)) as server:
        print(curl(server.url, texts[0]))
        print(json.dumps(translate(server.url, texts[:1]), ensure_ascii=False))
        print(f"and {len(texts)} texts of the test set in one request:")
        answer = translate(server.url, texts)
        for text, hypotheses, right in zip(texts, answer["translations"], expected):
            got = hypotheses[0]["text"]
            mark = "" if got == right else f"   (reference: {right})"
            print(f"  {text}  ->  {got}{mark}")


def first_lines(path: Path, count: int) -> list[str]:
    with path.open(encoding="utf-8", newline="\n") as file:
        return [line.rstrip("\r\n") for line in islice(file, count)]


if __name__ == "__main__":
    sys.exit(main())
