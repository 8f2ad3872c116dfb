"""Where a start's time goes, from the process to the first answer.

    python -m bench.startup STORE [--rounds 7]

Each start is `python -m server serve` in a process of its own, with Java's flags as they were, as
they are, and with its classes written down before (`python -m server.classes`), in turns; medians.
The page cache is warm, and Python's bytecode is there: without it torch's import alone takes
seconds longer.
"""

import argparse
import re
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # comes with torchserve

from bench.jvm import VARIANTS
from bench.machine import described
from server.client import translate

PHASES = ("process 1", "Java", "imports", "digests", "model", "warm-up", "READY", "first answer",
          "Java's CPU s", "worker's CPU s")
_LOADED = re.compile(r"digests (\S+) s, model (\S+) s, warm-up (\S+) s")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.startup", description=__doc__)
    parser.add_argument("store", type=Path, help="folder of seq2seq.mar")
    parser.add_argument("--rounds", type=int, default=7, help="of which the median is told")
    arguments = parser.parse_args()
    found: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
    for number in range(arguments.rounds + 1):  # the first one fills the page cache
        for name in VARIANTS:
            row = start(name, arguments.store)
            if number:
                found[name].append(row)
    print(f"{described()}; `{' '.join(['python -m bench.startup', *sys.argv[1:]])}`\n")
    print(f"| | {' | '.join(PHASES)} |")
    print("|---" * (len(PHASES) + 1) + "|")
    for name, rows in found.items():
        cells = " | ".join(f"{statistics.median(column):.2f}" for column in zip(*rows))
        print(f"| {name} | {cells} |")


def start(variant: str, store: Path) -> list[float]:
    """Seconds of each of PHASES.

    Raises:
        RuntimeError: the server did not come up, with what it said.
    """
    began = time.time()
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.jvm", variant, "serve", "--free-ports",
         "--model-store", str(store)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    try:
        assert process.stdout is not None
        said, loading = "", 0.0
        for line in process.stdout:
            said += line
            if line.startswith("loading"):
                loading = time.time()
            if line.startswith("ready: "):
                break
        ready = time.time()
        loaded = _LOADED.search(said)
        if loaded is None or process.poll() is not None:
            raise RuntimeError(f"{variant}: the server did not come up: {said}")
        children = psutil.Process(process.pid).children()
        java = next(one for one in children if "org.pytorch.serve.ModelServer" in one.cmdline())
        worker = next(one for one in java.children() if "--sock-name" in one.cmdline())
        handler = [float(one) for one in loaded.groups()]
        # Times since the boot have another zero than the clock.
        booted = worker.create_time() - java.create_time()
        spent = [sum(one.cpu_times()[:2]) for one in (java, worker)]
        url = said.rsplit("ready: ", 1)[1].split("/predictions")[0]
        translate(url, ["A sentence."])
        return [
            loading - began, booted, ready - loading - booted - sum(handler), *handler,
            ready - began, time.time() - ready, *spent,
        ]
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        process.communicate()


if __name__ == "__main__":
    main()
