"""What stands behind the HTTP front in its tests: a server that notes what it is asked, and does
what a model's name says."""

import asyncio
import contextlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from server.front import BACKLOG, Front, FrontOptions
from server.memory import FrontLimits
from server.options import FRONT_CONFIG
from server.ports import listening

LARGE = 3_000_000  # bytes of an answer of `large`
DIED = b'{"code": 500, "type": "InternalServerException", "message": "Worker died."}'


@dataclass
class Seen:
    """One request as it came; `left` is set where its connection was closed before the answer."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    left: threading.Event = field(default_factory=threading.Event)


class Backend:
    """Answers `/predictions/NAME`: `wait` when `go` is set, `events` with one event before and one
    after, `large` with many bytes, `died` as TorchServe does when its worker has died; all else
    with the body that came."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.go = threading.Event()
        self.port = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Backend":
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, *error: object) -> None:
        self.go.set()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._connected, "127.0.0.1", 0, backlog=4096)
        )
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.01))
        self._loop.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                await self._answer(await self._read(reader), reader, writer)
        writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> Seen:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        method, path, _ = first.split(" ")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int((await reader.readline()).strip(), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        else:
            body = await reader.readexactly(int(headers.get("content-length", "0")))
        seen = Seen(method, path, headers, body)
        self.seen.append(seen)
        return seen

    async def _waits(self, seen: Seen, reader: asyncio.StreamReader) -> None:
        while not self.go.is_set():
            if reader.at_eof() or reader.exception() is not None:
                seen.left.set()
                raise ConnectionResetError
            await asyncio.sleep(0.01)

    async def _answer(
        self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        name = seen.path.rpartition("/")[2]
        status, kind, body = "200 OK", "text/plain", seen.body
        if name == "events":
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n5\r\none\n\n\r\n"
            )
            await writer.drain()
            await self._waits(seen, reader)
            writer.write(b"5\r\ntwo\n\n\r\n0\r\n\r\n")
        else:
            if name == "wait":
                await self._waits(seen, reader)
            elif name == "large":
                body = b"x" * LARGE
            elif name == "died":
                status, kind, body = "500 Internal Server Error", "application/json", DIED
            head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            writer.write(f"{head}\r\n".encode() + body)
        await writer.drain()


@contextlib.contextmanager
def fronted(
    backend: Backend,
    limits: FrontLimits = FrontLimits(400, 24),
    show: Callable[[str], None] | None = None,
    **changed: str,
) -> Iterator[tuple[Front, int]]:
    """A front of that backend, and its port. `changed`: of haproxy.cfg, such as
    http_request="1s" for `timeout http-request`."""
    text = FRONT_CONFIG.read_text()
    for name, value in changed.items():
        if name == "body":
            assert "wait-for-body time 30s" in text
            text = text.replace("wait-for-body time 30s", f"wait-for-body time {value}")
            continue
        before = next(
            line for line in text.splitlines()
            if line.strip().startswith(f"timeout {name.replace('_', '-')} ")
        )
        text = text.replace(before, f"    timeout {name.replace('_', '-')} {value}")
    # Short: a socket's path has 108 bytes.
    folder = Path(tempfile.mkdtemp(prefix="front-"))
    clients, metrics = (listening(name, "127.0.0.1", 0, BACKLOG) for name in ("clients", "metrics"))
    port = clients.getsockname()[1]
    (folder / "haproxy.cfg").write_text(text)
    options = FrontOptions(
        folder / "haproxy.cfg", folder, backend.port, backend.port, backend.port, limits, show
    )
    front = Front(options, clients, metrics)
    front.metrics_port = metrics.getsockname()[1]  # type: ignore[attr-defined]
    try:
        front.start()
        yield front, port
    finally:
        front.stop()
        shutil.rmtree(folder)
