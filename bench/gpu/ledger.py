"""Measurements as lines of JSON, of which none is made twice."""

import hashlib
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]


class Ledger:
    """A file to which measurements are appended.

    Args:
        path: of the file, which need not be there; what it holds of this machine and this code is
            not measured again.
        machine: see `machine_of`; part of every key.
        limit: seconds after which no further measurement begins.
    """

    def __init__(self, path: Path, machine: dict[str, str], limit: float) -> None:
        self.path, self.machine = path, machine
        self.until = time.monotonic() + limit
        self.found = {name(one): one for one in read(path) if "error" not in one}
        self.left = self.failed = 0

    def of(self, key: Record) -> Record | None:
        """What is there for a key: names and plain values."""
        there = self.found.get(name({"key": key, "machine": self.machine}))
        return None if there is None else there["value"]

    def measure(self, key: Record, make: Callable[[], Record]) -> Record | None:
        """What is there, or is measured now; None where it fails or no time is left. A failure is
        written too, and tried again the next time."""
        there = self.of(key)
        if there is not None:
            return there
        if time.monotonic() > self.until:
            self.left += 1
            return None
        record: Record = {"key": key, "machine": self.machine}
        started = time.time()
        try:
            record["value"] = make()
            self.found[name(record)] = record
        except Exception as error:
            traceback.print_exc()
            record["error"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            self.failed += 1
        record |= {"began": round(started), "seconds": round(time.time() - started, 2)}
        self.append(record)
        print(json.dumps({**key, **record.get("value", {"error": record.get("error")})}),
              flush=True)  # fmt: skip
        return record.get("value")

    def append(self, record: Record) -> None:
        """Behind whatever is there, a line that was cut off included."""
        with self.path.open("a+b") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write((json.dumps(record) + "\n").encode())


def read(path: Path) -> Iterator[Record]:
    """The records of a file; lines that were cut off are left out."""
    if not path.exists():
        return
    for line in path.read_text("utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            print(f"{path}: left out: {line[:60]}", file=sys.stderr)
            continue
        if isinstance(record, dict) and "key" in record:
            yield record


def name(record: Record) -> str:
    """Of what was measured, and where."""
    return json.dumps([record["key"], record["machine"]], sort_keys=True)


def machine_of(device: torch.device, code: str = "") -> dict[str, str]:
    """What figures depend on.

    Args:
        code: what the code is called; empty for a digest of all that decodes and learns.
    """
    cuda = device.type == "cuda"
    digest = hashlib.sha256()
    for folder in ("bench/gpu", "handler", "model", "training"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu"):
                digest.update(path.read_bytes())
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "no GPU",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "cores": str(len(os.sched_getaffinity(0))),
        "code": code or digest.hexdigest()[:10],
    }
