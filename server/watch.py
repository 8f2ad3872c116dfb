"""What TorchServe is doing, asked once a second by a thread of its own.

Who wants to know reads the last snapshot and its age, and never waits for TorchServe.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.errors import ServerError
from server.torchserve import TorchServe

INTERVAL = 1.0  # seconds between two looks
# On a GPU, TorchServe 0.12 runs nvidia-smi for each look, which can take a second: the looks take a
# tenth of the time at most, as long as that leaves one in 5 s.
_REST, _LONGEST = 9.0, 5.0
# Seconds for an answer; TorchServe answers in milliseconds, but a busy machine may hold it up.
_ANSWER_SECONDS = 3.0
# Gauges of handler/metrics.py: requests in the handler, with a first token and without.
_LIVE = ("seq2seq_live_requests", "seq2seq_pending_requests")
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{.*\})? (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Snapshot:
    """One look.

    time: when it began, seconds of the monotonic clock.
    ready: the model has a worker that is READY, which is after it has warmed up.
    pending: requests in TorchServe's queue.
    live: requests in the handler, which tells them once a second; None where it never has.
    """

    time: float = -math.inf
    ready: bool = False
    version: str = ""
    workers: tuple[int, ...] = ()
    pending: int = 0
    live: int | None = None

    @property
    def told(self) -> str:
        """What is in flight, for the log."""
        live = "an unknown number" if self.live is None else str(self.live)
        return f"{self.pending} in the queue, {live} in the handler"


def read_snapshot(time: float, versions: Sequence[dict[str, Any]], metrics: str) -> Snapshot:
    """Return what management tells of a model and the Prometheus text of its server say.

    Raises:
        KeyError, ValueError, IndexError: they are not TorchServe's.
    """
    workers = [worker for one in versions for worker in one["workers"]]
    samples: dict[str, float] = {}
    for name, value in _SAMPLE.findall(metrics):
        if name in _LIVE:
            samples[name] = samples.get(name, 0.0) + float(value)
    return Snapshot(
        time=time,
        ready=any(one["status"] == "READY" for one in workers),
        version=str(versions[0]["modelVersion"]),
        workers=tuple(int(one["pid"]) for one in workers if one["status"] == "READY"),
        pending=sum(int(one["jobQueueStatus"]["pendingRequests"]) for one in versions),
        live=round(sum(samples[name] for name in _LIVE)) if samples.keys() >= {*_LIVE} else None,
    )


class Watch:
    """Waits for a server to be ready, then looks at it until `end`.

    failure: why the server did not become ready.
    started: when it was ready first, seconds of the monotonic clock.
    ready: when it was ready last.
    restarts: workers that took the place of another.
    """

    def __init__(self, server: TorchServe) -> None:
        self.server = server
        self.name = server.options.models[0].split("=")[0]
        self.snapshot = Snapshot()
        self.failure: ServerError | None = None
        self.started: float | None = None
        self.ready = -math.inf
        self.restarts = 0
        self._workers: set[int] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Look no more; a look that is under way ends by itself."""
        self._over.set()

    def _run(self) -> None:
        try:
            self.server.wait_ready()
        except Exception as error:
            # What a server that is being stopped says has no meaning.
            if not self._over.is_set():
                self.failure = (
                    error
                    if isinstance(error, ServerError)
                    else ServerError(f"TorchServe could not be watched: {error!r}")
                )
            return
        while not self._over.is_set():
            # Whatever goes wrong, the last snapshot grows old, which is what its readers mind.
            began = time.monotonic()
            with contextlib.suppress(Exception):
                self._keep(self._look())
            took = time.monotonic() - began
            self._over.wait(max(INTERVAL, min(_REST * took, _LONGEST)))

    def _look(self) -> Snapshot:
        began = time.monotonic()
        # Metrics first: a request that leaves the queue in between is seen in it, not lost.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(self.server.torchserve_metrics_url, timeout=_ANSWER_SECONDS) as reply:
            metrics = reply.read().decode("utf-8")
        # Whether requests are read at all; what the answer says is told better by management.
        try:
            direct.open(f"{self.server.torchserve_url}/ping", timeout=_ANSWER_SECONDS).close()
        except urllib.error.HTTPError as error:
            error.close()
        versions = self.server.described(self.name, _ANSWER_SECONDS)
        return read_snapshot(began, versions, metrics)

    def _keep(self, found: Snapshot) -> None:
        if found.ready:
            self.ready = found.time
            self.started = self.started or found.time
        new = set(found.workers) - self._workers
        self.restarts += len(new) if self._workers else 0
        self._workers |= new
        self.snapshot = found
