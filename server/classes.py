"""python -m server.classes: let Java keep what it makes of TorchServe's classes, so that later
starts are shorter; see server/jvm.py. It takes some seconds, once for an environment.

A server with an archive that answers nothing runs up to its first answer; Java writes down the
names of the classes that took, and then their inside.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

from server.errors import ServerError
from server.java import Java, find_java
from server.jvm import classes_file
from server.options import LOOPBACK, ServerOptions
from server.torchserve import REQUEST_SECONDS, TorchServe, class_path, torchserve_home

_HANDLER = """
class Nothing:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        context.stopping_criteria = [lambda _: None for _ in data]
        return ["{}" for _ in data]
"""
# As handler/model-config.yaml has them.
_CONFIG = "continuousBatching: true\nminWorkers: 1\nmaxWorkers: 1\nbatchSize: 2\nmaxBatchDelay: 1\n"
_MANIFEST = {
    "createdOn": "01/01/1980 00:00:00",
    "runtime": "python",
    "archiverVersion": "0.12.0",
    "model": {
        "modelName": "nothing",
        "modelVersion": "1.0",
        "handler": "nothing.py",
        "configFile": "model-config.yaml",
    },
}
_SECONDS = 120.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m server.classes", description=__doc__)
    parser.parse_args()
    try:
        java = find_java()
        print(record_classes(java, classes_file(java.version)))
    except (ServerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def record_classes(java: Java, target: Path) -> Path:
    """Write `target`, in one piece or not at all, and return it.

    Raises:
        ServerError, OSError: the server does not start, Java cannot do it, or nothing can be
            written there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, so that it can take its place.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        names, made = Path(folder, "names"), Path(folder, target.name)
        _load_classes(Path(folder), names)
        command = [
            str(java.path),
            "-Xshare:dump",
            f"-XX:SharedClassListFile={names}",
            f"-XX:SharedArchiveFile={made}",
            # Of the collectors, the one that can write objects; every other can read them.
            "-XX:+UseG1GC",
            *("-cp", class_path(torchserve_home())),
        ]
        try:
            done = subprocess.run(
                command, capture_output=True, encoding="utf-8", errors="replace", timeout=_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise ServerError(f"{java.path} wrote no classes in {_SECONDS:g} s") from error
        if done.returncode != 0 or not made.is_file():
            said = (done.stderr + done.stdout).strip().splitlines() or ["nothing"]
            raise ServerError(f"{java.path} wrote no classes, and said: {said[-1]}")
        made.chmod(0o644)
        os.replace(made, target)
    return target


def _load_classes(store: Path, names: Path) -> None:
    """Start a server, ask once and stop it."""
    with zipfile.ZipFile(store / "nothing.mar", "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(_MANIFEST))
        archive.writestr("model-config.yaml", _CONFIG)
        archive.writestr("nothing.py", _HANDLER)
    options = replace(
        ServerOptions.on_free_ports(store), models=("nothing=nothing.mar",), record_classes=names
    )
    with TorchServe(options) as server:
        connection = http.client.HTTPConnection(LOOPBACK, server.port, timeout=REQUEST_SECONDS)
        kind = {"Content-Type": "application/json"}
        connection.request("POST", "/predictions/nothing", "{}", kind)
        connection.getresponse().read()
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
