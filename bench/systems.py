"""The servers that benchmarks compare, as context managers: up inside and gone after."""

import http.client
import json
import os
import signal
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bench.dynamic_batching import repack
from handler.seq2seq_handler import usable_cpus
from server.options import LOOPBACK
from server.ports import choose_ports
from server.process import end_group
from server.torchserve import ServerOptions, TorchServe


@dataclass(frozen=True)
class System:
    """A server that runs. `group` is the id of its group of processes."""

    name: str
    port: int
    path: str
    group: int

    def request(self, text: str, options: dict[str, object]) -> bytes:
        body = json.dumps({"text": text, **options}).encode()
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {LOOPBACK}:{self.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    @contextmanager
    def awake(self) -> Iterator[None]:
        os.killpg(self.group, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self.group, signal.SIGSTOP)


@contextmanager
def torchserve(name: str, store: Path) -> Iterator[System]:
    with TorchServe(ServerOptions.on_free_ports(store)) as server:
        port = urlsplit(server.url).port
        assert port is not None
        try:
            yield System(name, port, "/predictions/seq2seq", server.pid)
        finally:
            os.killpg(server.pid, signal.SIGCONT)


@contextmanager
def dynamic(archive: Path, size: int, delay: int) -> Iterator[System]:
    with tempfile.TemporaryDirectory(prefix="seq2serve-") as folder:
        repack(archive, Path(folder), size, delay)
        with torchserve(f"dynamic batching {size}:{delay}", Path(folder)) as system:
            yield system


@contextmanager
def plain(
    server: str, python: Path, archive: Path, beam: int = 1, size: int = 1, delay: int = 0
) -> Iterator[System]:
    """A server of bench/plain_server.py.

    Raises:
        RuntimeError: it does not come up; with what it wrote last.
    """
    port = choose_ports({server: (LOOPBACK, 0)})[server]
    script = Path(__file__).with_name("plain_server.py").absolute()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="seq2serve-")))
        with zipfile.ZipFile(archive) as content:
            for name in ("model.pt", "source.model", "target.model"):
                content.extract(name, folder)
        log = stack.enter_context((folder / "log").open("w+", encoding="utf-8"))
        process = subprocess.Popen(
            [str(python.absolute()), str(script), server, str(folder), "--port", str(port),
             "--batch", str(size), "--delay", str(delay), "--beam", str(beam),
             "--threads", str(usable_cpus())],
            cwd=folder, env=environment, stdout=log, stderr=log, text=True,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 120
            while ask(port, "GET", "/health")[0] != 200:
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"{server} did not come up: {log.read()[-2000:]}")
                time.sleep(0.2)
            yield System(f"{server} {size}:{delay}", port, "/predict", process.pid)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGCONT)
            end_group(process)


def ask(port: int, method: str, path: str, body: object = None) -> tuple[int, str, str]:
    """Status (0 where nobody listens), content type and body of one request."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=60)
    try:
        sent = None if body is None else json.dumps(body)
        connection.request(method, path, sent, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return reply.status, reply.headers.get_content_type(), reply.read().decode()
    except OSError:
        return 0, "", ""
    finally:
        connection.close()
