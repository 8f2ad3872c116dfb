"""python -m server supervise: the first process of a container.

It starts the HTTP front and Java, answers the probes, lets requests in flight end before Java
does, and ends when Java ends. TorchServe 0.12 alone does none of it: its /ping is 200 while a model
loads, SIGTERM resets whatever is in flight, and its own entrypoint stays when the server has died.

After SIGTERM (or SIGINT, SIGHUP, SIGQUIT) the container has terminationGracePeriodSeconds to end:

    settle-seconds   unready, but serving: load balancers and kube-proxies need some seconds to
                     learn that the pod is leaving, and send requests until then. Each answer closes
                     its connection
    drain-seconds    at most, until the last request is answered: nobody is let in any more, and
                     connections that are idle are closed
    stop-seconds     at most, until Java has ended (it takes 3)
    5                at most, to bury what was killed

    settle + drain + stop + 5 <= terminationGracePeriodSeconds
    15     + 60    + 10   + 5 =  90
    5      + 3     + 2    + 5 =  15, about what a Spot node leaves

A preStop hook would come out of the same seconds, and is not needed. A second SIGTERM skips what is
left of the waiting; one before the model is ready finds nobody to wait for.

A drain is over when the front has ended, which it does with its last connection, and no connection
holds bytes of an answer that its client has yet to take.

Exit status: 0 where the end was asked for and no request was cut off, so that Kubernetes calls the
container Completed; 1 for all else (Java or the model failed, or requests were in flight when the
time was up), which it calls Error. The 143 that Java itself would give says neither.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from server.errors import ServerError
from server.health import PROMETHEUS, TEXT, HealthServer, Metric, Page, prometheus
from server.options import CONFIG, FRONT_CONFIG, VERBOSE, ServerOptions
from server.output import STDOUT
from server.ports import unsent
from server.process import ending_signals
from server.torchserve import TorchServe
from server.watch import Watch

STALE = 10.0  # seconds after which a snapshot says nothing of now: three looks that failed
# Seconds of the same after which TorchServe is dead: a look takes up to 5, and rests for up to 5.
SILENT = 14.0
# Seconds for which TorchServe starts a worker again (maxRetryTimeoutInSec of model-config.yaml).
_RETRY = 60.0
_TICK = 0.1  # seconds between two looks at signals and at Java


@dataclass(frozen=True)
class SupervisorOptions:
    """A server, its health port, and how it ends; seconds as the module explains."""

    server: ServerOptions = field(default_factory=ServerOptions)
    health_host: str = "0.0.0.0"
    health_port: int = 8083
    settle_seconds: float = 15.0
    drain_seconds: float = 60.0
    stop_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name in ("settle_seconds", "drain_seconds", "stop_seconds"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ServerError(f"{name} is {value}: allowed is a number of seconds from 0")
        if not 0 <= self.health_port <= 65535:
            raise ServerError(f"health_port is {self.health_port}: allowed is 0 to 65535")
        others = (self.server.port, self.server.management_port, self.server.metrics_port)
        if self.health_port and self.health_port in others:
            raise ServerError(
                f"health_port is {self.health_port}, which is another port too: choose distinct "
                "ports"
            )


def add_flags(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Give `parser` the flags of `supervise`; each has its default from a variable, if it is set:
    --settle-seconds from SEQ2SERVE_SETTLE_SECONDS."""
    defaults = SupervisorOptions()
    for flag, kind, default, explained in (
        ("model-store", Path, "/models", "folder of seq2seq.mar"),
        ("host", str, "0.0.0.0", "address to serve, of the HTTP front"),
        ("port", int, 8080, "of requests"),
        ("management-port", int, 8081, "of TorchServe's management, on loopback"),
        ("metrics-host", str, "0.0.0.0", "address of TorchServe's and the front's metrics"),
        ("metrics-port", int, 8082, "of /metrics and /front/metrics"),
        ("health-port", int, defaults.health_port, "of /livez /readyz /startupz /metrics"),
        ("settle-seconds", float, defaults.settle_seconds, "unready but serving, after SIGTERM"),
        ("drain-seconds", float, defaults.drain_seconds, "then at most for requests in flight"),
        ("stop-seconds", float, defaults.stop_seconds, "then at most for Java to end"),
        ("sha256", str, "", "digest that seq2seq.mar must have"),
        ("config", Path, CONFIG, "TorchServe's configuration"),
        ("front-config", Path, FRONT_CONFIG, "the HTTP front's configuration"),
    ):
        variable = f"SEQ2SERVE_{flag.upper().replace('-', '_')}"
        given = environment.get(variable)
        # Kubernetes gives every container SEQ2SERVE_PORT=tcp://10.0.0.1:8080 where there is a
        # Service `seq2serve` (unless enableServiceLinks is false).
        if given is not None and not given.startswith("tcp://"):
            default = given
        parser.add_argument(
            f"--{flag}", type=kind, default=default, help=f"{explained} ({variable}; %(default)s)"
        )
    add_verbose(parser, environment)


def add_verbose(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Give `parser` the one switch of the log."""
    default = environment.get(VERBOSE, "false")
    parser.add_argument(
        "--verbose", type=_switch, nargs="?", const=True, default=default, metavar="true|false",
        help=f"show all that is logged ({VERBOSE}; {default})",
    )


def _switch(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: true or false")
    return text == "true"


def options_of(arguments: argparse.Namespace) -> SupervisorOptions:
    """Return the options that the flags say."""
    return SupervisorOptions(
        ServerOptions(
            model_store=arguments.model_store,
            host=arguments.host,
            port=arguments.port,
            management_port=arguments.management_port,
            metrics_host=arguments.metrics_host,
            metrics_port=arguments.metrics_port,
            sha256=arguments.sha256,
            config=arguments.config,
            front_config=arguments.front_config,
            access_log=True,
            verbose=arguments.verbose,
            require_digest=True,
        ),
        health_port=arguments.health_port,
        settle_seconds=arguments.settle_seconds,
        drain_seconds=arguments.drain_seconds,
        stop_seconds=arguments.stop_seconds,
    )


class Supervisor:
    """Runs a server from its start to its end."""

    def __init__(self, options: SupervisorOptions) -> None:
        self.options = options
        self.server = TorchServe(options.server)
        self.watch = Watch(self.server)
        self.signals = 0
        self.draining = False
        self.begun = time.monotonic()

    def run(self) -> int:
        """Serve until a signal or Java's end; return the exit status."""
        for number in ending_signals():
            signal.signal(number, self._count)
        health = None
        try:
            health = HealthServer(self.options.health_host, self.options.health_port, self.pages())
            say(f"health: port {health.port}")
            self._start()
            return self._serve() if not self.signals else 0
        except ServerError as error:
            say(f"error: {error}")
            return 1
        finally:
            self.watch.end()
            self.server.stop(self.options.stop_seconds)
            say("stopped")
            if health is not None:
                health.close()

    def _count(self, number: int, frame: object) -> None:
        self.signals += 1

    def _start(self) -> None:
        """Return when the model is ready, or at a signal."""
        say(f"starting TorchServe with {self.options.server.model_store}")
        self.server.start()
        say(f"loading the model; Java has a heap of {self.server.memory.heap} MiB")
        self.watch.begin()
        while not self.watch.started and not self.signals:
            self._tick()
            if self.watch.failure is not None:
                raise self.watch.failure
        if not self.signals:
            say(f"ready: {self.server.url}, metrics: {self.server.metrics_url}")

    def _serve(self) -> int:
        """Return the exit status, after a signal and all that follows it."""
        options = self.options
        while not self.signals:
            self._tick()
        self.draining = True
        front = self.server.front
        front.close()
        say(f"unready, and serving for {options.settle_seconds:g} s more")
        self._pause(options.settle_seconds)
        front.leave()
        say(f"waiting for requests in flight ({self.watch.snapshot.told}), at most "
            f"{options.drain_seconds:g} s")
        deadline = time.monotonic() + options.drain_seconds
        while not self.drained():
            if front.lost or time.monotonic() >= deadline or self.signals > 1:
                left, reading = self.watch.snapshot, unsent(self.server.port)
                say(f"stopping with {left.told}, {reading} being read")
                return int(front.lost or left.live != 0 or left.pending > 0 or reading > 0)
            self._tick()
        say("every request is answered")
        return 0

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.signals < 2:
            self._tick()

    def _tick(self) -> None:
        """Wait a little, bury orphans; raise where Java has ended."""
        time.sleep(_TICK)
        if self.server.failed():
            raise self.server.failure()
        reap_orphans(self.server.pid, self.server.front.pid)

    def drained(self) -> bool:
        """Say whether no request is in flight; see the module."""
        return self.server.front.gone() and not unsent(self.server.port)

    def dead(self) -> str:
        """Say why the container cannot mend itself, "" where it can."""
        watch = self.watch
        if watch.started is None or self.draining:
            # A start has its own time limit, and nobody restarts what is about to end.
            return ""
        age = time.monotonic() - watch.snapshot.time
        if age > SILENT:
            return f"TorchServe has not answered for {age:.0f} s"
        # TorchServe's own attempts at a new worker, the last of which takes as long as a start.
        patience = _RETRY + 2 * (watch.started - self.begun)
        silent = time.monotonic() - watch.ready
        return f"no worker was ready for {silent:.0f} s" if silent > patience else ""

    def unready(self) -> str:
        """Say why no request should come here, "" where they may."""
        age = time.monotonic() - self.watch.snapshot.time
        if self.draining:
            return "draining"
        if self.watch.started is None:
            return "the model is loading"
        if age > STALE:
            return f"TorchServe has not answered for {age:.0f} s"
        return "" if self.watch.snapshot.ready else "no worker is ready"

    def pages(self) -> dict[str, Page]:
        return {
            "/livez": lambda: _page(self.dead()),
            "/readyz": lambda: _page(self.unready()),
            "/startupz": lambda: _page("" if self.watch.started else "the model is loading"),
            "/metrics": lambda: (200, PROMETHEUS, prometheus(self.metrics())),
        }

    def metrics(self) -> list[Metric]:
        watch, last = self.watch, self.watch.snapshot
        name = watch.name
        info = {
            "name": name, "version": last.version, "sha256": self.server.digests.get(name, "")
        }
        ready = not self.unready()
        told: list[Metric] = [
            ("seq2serve_ready", "gauge", "Whether /readyz is 200.", {}, int(ready)),
            ("seq2serve_draining", "gauge", "Whether the end was asked for.", {},
             int(self.draining)),
            ("seq2serve_worker_restarts_total", "counter",
             "Workers that took the place of another.", {}, watch.restarts),
            ("seq2serve_front_restarts_total", "counter",
             "Times that the HTTP front was started anew.", {}, self.server.front_restarts),
        ]
        if watch.started is not None:
            told += [
                ("seq2serve_start_seconds", "gauge", "From the start to the first ready worker.",
                 {}, round(watch.started - self.begun, 3)),
                ("seq2serve_model_info", "gauge", "The model that is served.", info, 1),
            ]
        # What is not known is not told: a number that stood still would look like one.
        if time.monotonic() - last.time <= STALE:
            told += [
                ("seq2serve_pending_requests", "gauge", "Requests in TorchServe's queue.", {},
                 last.pending),
                ("seq2serve_live_requests", "gauge", "Requests in the handler.", {},
                 last.live or 0),
            ]
        return told


def supervise(options: SupervisorOptions) -> int:
    """Run a server as a container's first process does; return the exit status."""
    return Supervisor(options).run()


def reap_orphans(*own: int | None) -> None:
    """Bury dead processes that process 1 inherited, and leave the status of `own` where it is."""
    if not hasattr(os, "waitid"):  # macOS, where nobody is process 1 of a container
        return
    with contextlib.suppress(ChildProcessError):
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while (found := os.waitid(os.P_ALL, 0, look)) is not None and found.si_pid not in own:
            os.waitpid(found.si_pid, os.WNOHANG)


def say(line: str) -> None:
    """Write a line for whoever reads the container's log."""
    STDOUT.say(line)


def _page(problem: str) -> tuple[int, str, str]:
    return (503, TEXT, f"{problem}\n") if problem else (200, TEXT, "ok\n")
