"""A small HTTP server for the probes of Kubernetes and for Prometheus.

It answers from what is known already, each request in a thread of its own, so that no probe waits
for anything but this process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from urllib.parse import urlsplit

from server.errors import ServerError

TEXT = "text/plain; charset=utf-8"
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"  # its text exposition format
_IDLE_SECONDS = 10.0


# What a path says: the HTTP status, the content type and the body.
Page = Callable[[], tuple[int, str, str]]


class HealthServer:
    """Serves pages from its construction to `close`."""

    def __init__(self, host: str, port: int, pages: Mapping[str, Page]) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = _IDLE_SECONDS  # of a client that connects and says nothing
            server_version, sys_version = "seq2serve", ""

            def do_GET(self) -> None:
                page = pages.get(urlsplit(self.path).path)
                known = f"no such path; there are: {' '.join(pages)}\n"
                status, kind, body = page() if page is not None else (404, TEXT, known)
                content = body.encode("utf-8")
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_HEAD = do_GET

            def log_message(self, format: str, *arguments: object) -> None:
                """Probes come every few seconds."""

        try:
            self._server = _Server((host, port), Handler)
        except OSError as error:
            raise ServerError(
                f"health port {port} on {host} cannot be used ({error.strerror}): "
                "stop what uses it, or choose another (0 means a free one)"
            ) from error
        self.port: int = self._server.server_port
        threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="health", daemon=True
        ).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def server_bind(self) -> None:
        # HTTPServer's own asks the name server for the name of the address, and waits for it.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """A prober that leaves before its answer is no event."""


# Name, kind, help, labels and value.
Metric = tuple[str, str, str, Mapping[str, str], float]


def prometheus(metrics: Sequence[Metric]) -> str:
    """Return metrics as Prometheus reads them."""
    lines = []
    for name, kind, explained, labels, value in metrics:
        quoted = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        lines += [
            f"# HELP {name} {explained}",
            f"# TYPE {name} {kind}",
            f"{name}{{{quoted}}} {value}" if quoted else f"{name} {value}",
        ]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
