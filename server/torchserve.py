"""Run TorchServe 0.12 behind its HTTP front: what it needs, started, watched and stopped without
leaving anything behind.

Java is started directly, because the `torchserve` command passes no signal on to it. All its ports
are on loopback; clients and Prometheus reach the front (server/front.py).
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from server.archive import check_archive, unpacked_size, version_of
from server.config import check_config
from server.cpus import frontend_cpus
from server.devices import device_environment
from server.environment import (
    check_spelling,
    found,
    inherited_environment,
    inside,
    outside,
    utf8_locale,
)
from server.errors import ServerError
from server.front import BACKLOG, Front, FrontOptions
from server.health import HealthServer
from server.java import find_java
from server.jvm import classes_file, jvm_flags
from server.log import ServerLog, exit_reason, load_failure
from server.memory import Shares, memory_limit, shares
from server.options import LOOPBACK, VERBOSE, ServerOptions
from server.output import STDOUT
from server.ports import choose_ports, listening
from server.process import (
    GONE_SECONDS,
    STOP_SECONDS,
    bound,
    end_group,
    private_directory,
)
from server.protocol import protocol_pages

__all__ = ["ServerOptions", "TorchServe"]

LOGGING = Path(__file__).resolve().parent / "log4j2.xml"
_POLL_SECONDS = 0.1
_EXPLANATION_SECONDS = 3.0
REQUEST_SECONDS = 10.0
_WAIT_SECONDS = 0.5  # between two looks at the front
# Seconds for which an answer about readiness holds: TorchServe runs nvidia-smi for each on a GPU.
_LATELY = 1.0
# Where the handler finds what the front tells it; handler/departures.py reads it.
LEFT = "SEQ2SERVE_LEFT"
# Java sets these itself from its arguments; a variable of the user's would silently win.
_OWNED_VARIABLES = {
    "LOG_LOCATION",
    "METRICS_LOCATION",
    "TS_CONFIG_FILE",
    "TS_LOAD_MODELS",
    "TS_MODEL_SERVER_HOME",
    "TS_MODEL_STORE",
    "TS_WORKFLOW_STORE",
}


class TorchServe:
    """One TorchServe with its workers; as a context manager, ready inside and gone after."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self._ports: dict[str, int] = {}
        self._process: subprocess.Popen[str] | None = None
        self._log: ServerLog | None = None
        self._directory: Path | None = None
        # SHA-256 of each model's archive, of those that have a digest to check.
        self.digests: dict[str, str] = {}
        self.memory = Shares(0, 0)  # of Java and the front
        self._front: Front | None = None
        self._pages: HealthServer | None = None
        self._ready = (-math.inf, False)  # when it was last asked for, and what the answer was
        self._ready_lock = threading.Lock()
        self.cpus = frontend_cpus()  # of Java

    def __enter__(self) -> TorchServe:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where requests go: the front."""
        return f"http://{_reachable(self.options.host)}:{self._port('inference')}"

    @property
    def port(self) -> int:
        """Where requests go, on this machine."""
        return self._port("inference")

    @property
    def torchserve_url(self) -> str:
        """TorchServe itself, behind the front."""
        return f"http://{LOOPBACK}:{self._port('torchserve')}"

    @property
    def torchserve_metrics_url(self) -> str:
        """TorchServe's metrics, behind the front."""
        return f"http://{LOOPBACK}:{self._port('torchserve metrics')}/metrics"

    @property
    def front(self) -> Front:
        """The HTTP front of a server that was started."""
        if self._front is None:
            raise ServerError("the server is not started: start it first")
        return self._front

    @property
    def front_restarts(self) -> int:
        """How often the front was started anew."""
        return self._front.restarts if self._front is not None else 0

    @property
    def management_url(self) -> str:
        """TorchServe's management interface, on loopback always."""
        return f"http://{LOOPBACK}:{self._port('management')}"

    @property
    def metrics_url(self) -> str:
        """What Prometheus reads."""
        return f"http://{_reachable(self.options.metrics_host)}:{self._port('metrics')}/metrics"

    @property
    def pid(self) -> int:
        """The process id of Java, which is also that of the process group with its workers."""
        return self._running().pid

    def start(self) -> None:
        """Check everything that can be checked, then start Java; does not wait for the model."""
        options = self.options
        if self._process is not None:
            raise ServerError(f"server {self.url} is started already: stop it first")
        home = torchserve_home()
        environment = inherited_environment(os.environ, spelling := utf8_locale(os.environ))
        check_config(options.config, home)
        self.digests = self._checked_digests()
        archives = (options.model_store / model.split("=")[1] for model in options.models)
        unpacked = sum(map(unpacked_size, archives))
        self.memory = shares(memory_limit(), unpacked)
        java = find_java()
        self._ports = choose_ports(
            {
                "inference": (options.host, options.port),
                "management": (LOOPBACK, options.management_port),
                "metrics": (options.metrics_host, options.metrics_port),
                "torchserve": (LOOPBACK, 0),
                "torchserve metrics": (LOOPBACK, 0),
                "worker": (LOOPBACK, options.worker_port),
                "grpc inference": (LOOPBACK, 0),
                "grpc management": (LOOPBACK, 0),
            }
        )
        self._directory = private_directory(options.state_dir, self._ports["worker"])
        if unpacked > (free := shutil.disk_usage(self._directory).free):
            raise ServerError(
                f"state directory {self._directory.parent} has {free} bytes free, and the archive "
                f"unpacks to {unpacked}: make room, or choose another (TMPDIR)"
            )
        store, config = options.model_store.resolve(), options.config.resolve()
        check_spelling(
            (self._directory, store, config, home, java.path, LOGGING, Path(sys.executable)),
            spelling,
        )
        self._pages = HealthServer(LOOPBACK, 0, protocol_pages(self._versions(), self.ready_lately))
        self._front = self._started_front(self._directory, self._pages.port)
        command = [
            str(java.path.absolute()),
            f"-Dmodel_server_home={home}",
            f"-Djava.io.tmpdir={self._directory}",
            f"-Dlog4j.configurationFile={LOGGING.as_uri()}",
            f"-Dseq2serve.log={'info' if options.verbose else 'warn'}",
            *jvm_flags(
                self.memory, self.cpus, classes_file(java.version), options.record_classes
            ),
            *("-cp", class_path(home)),
            "org.pytorch.serve.ModelServer",
            *("--python", sys.executable),
            *("-f", str(config)),
            *("-s", str(store)),
            "-ncs",
            "--disable-token-auth",
            # Last, because it takes every argument that follows for a model.
            *("-m", *options.models),
        ]
        self._process = subprocess.Popen(
            bound(command),
            # Java writes log directories where it stands.
            cwd=self._directory,
            env=self._environment(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            # Ctrl-C in a terminal reaches us alone, and one signal reaches every worker.
            start_new_session=True,
        )
        assert isinstance(self._process.stdout, io.TextIOWrapper)
        self._log = ServerLog(self._process.stdout, show=options.verbose)

    def wait_ready(self, timeout: float | None = None) -> None:
        """Return when every model has a worker that can answer; raise as soon as one cannot."""
        seconds = self.options.startup_timeout if timeout is None else timeout
        looked = time.monotonic()
        deadline = looked + seconds
        while not self.is_ready():
            self._raise_if_failed()
            now = time.monotonic()
            if now > deadline:
                raise self._load_error(f"server {self.url} is not ready after {seconds:g} s")
            # On a GPU, TorchServe runs nvidia-smi for every look, which can take a second.
            time.sleep(max(_POLL_SECONDS, now - looked))
            looked = time.monotonic()
        assert self._log is not None
        self._log.show(True)

    def is_ready(self) -> bool:
        """Say whether every model has a worker that can answer, as management sees it now."""
        # TorchServe's own /ping and health paths are true while a model loads and after it failed.
        names = Counter(model.split("=")[0] for model in self.options.models)
        return all(self._has_workers(name, versions) for name, versions in names.items())

    def poll(self) -> int | None:
        """Return Java's exit status, None while it runs."""
        return self._running().poll()

    def failed(self) -> bool:
        """Say whether it serves no more: Java has ended, or there is no front."""
        return self.poll() is not None or self.front.failure is not None

    def wait(self) -> None:
        """Wait until it serves no more, which does not happen by itself."""
        while not self.failed():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._running().wait(_WAIT_SECONDS)

    def failure(self) -> ServerError:
        """Return the error that tells why it serves no more."""
        if self.poll() is None and self.front.failure is not None:
            return self.front.failure
        assert self._log is not None
        self._log.close(GONE_SECONDS)
        lines, status = self._log.lines, self._running().poll()
        return ServerError(
            f"TorchServe stopped with exit status {status}: {exit_reason(lines)}", lines
        )

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Stop Java and every worker and remove their files; without effect when not running.

        Args:
            seconds: that Java has to end by itself.
        """
        process, log, directory = self._process, self._log, self._directory
        front, pages = self._front, self._pages
        self._process = self._log = self._directory = self._front = self._pages = None
        try:
            if front is not None:
                front.stop()
            if pages is not None:
                pages.close()
            if process is not None and log is not None:
                # The end of a connection to a worker looks like an error, and is logged as one.
                log.show(self.options.verbose)
                end_group(process, seconds)
                log.close(GONE_SECONDS)
        finally:
            if directory is not None:
                shutil.rmtree(directory, ignore_errors=True)

    def _environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """Return Java's environment: TS_<KEY> replaces <key> of config.properties."""
        kept = {
            key: value
            for key, value in device_environment(inherited).items()
            if key not in _OWNED_VARIABLES
        }
        ports, options = self._ports, self.options
        return kept | {
            "TS_INFERENCE_ADDRESS": f"http://{LOOPBACK}:{ports['torchserve']}",
            "TS_MANAGEMENT_ADDRESS": f"http://{LOOPBACK}:{ports['management']}",
            "TS_METRICS_ADDRESS": f"http://{LOOPBACK}:{ports['torchserve metrics']}",
            "TS_GRPC_INFERENCE_ADDRESS": LOOPBACK,
            "TS_GRPC_MANAGEMENT_ADDRESS": LOOPBACK,
            "TS_GRPC_INFERENCE_PORT": str(ports["grpc inference"]),
            "TS_GRPC_MANAGEMENT_PORT": str(ports["grpc management"]),
            "TS_INITIAL_WORKER_PORT": str(ports["worker"]),
            "TS_NUMBER_OF_NETTY_THREADS": str(self.cpus),
            VERBOSE: "true" if options.verbose else "false",
            LEFT: str(self.front.left),
        }

    def _started_front(self, folder: Path, protocol: int) -> Front:
        options, ports = self.options, self._ports
        clients = listening("inference", options.host, ports["inference"], BACKLOG)
        try:
            metrics = listening("metrics", options.metrics_host, ports["metrics"], BACKLOG)
        except ServerError:
            clients.close()
            raise
        told = FrontOptions(
            options.front_config, folder, ports["torchserve"], ports["torchserve metrics"],
            protocol, self.memory.front, STDOUT.say if options.access_log else None,
        )
        front = Front(told, clients, metrics)
        try:
            front.start()
        except BaseException:
            front.stop()
            raise
        return front

    def _versions(self) -> dict[str, list[str]]:
        """Return the versions of each model, as their archives tell them."""
        found: dict[str, list[str]] = {}
        for model in self.options.models:
            name, file = model.split("=")
            found.setdefault(name, []).append(version_of(self.options.model_store / file))
        return found

    def ready_lately(self) -> bool:
        """Say whether it was ready within the last second or so; many may ask at once."""
        with self._ready_lock:
            asked, ready = self._ready
            if time.monotonic() - asked > _LATELY:
                ready = self._process is not None and self.is_ready()
                self._ready = time.monotonic(), ready
            return ready

    def described(self, name: str, timeout: float = REQUEST_SECONDS) -> list[dict[str, Any]]:
        """Return what management tells of a model, one entry for each version.

        Raises:
            OSError, ValueError: it did not answer in `timeout` seconds, or not as it should.
        """
        request = f"{self.management_url}/models/{name}/all"
        # A proxy of the environment has no business on loopback.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=timeout) as reply:
            told: list[dict[str, Any]] = json.load(reply)
        return told

    def _checked_digests(self) -> dict[str, str]:
        found = {}
        for model in self.options.models:
            name, file = model.split("=")
            archive = self.options.model_store / file
            digest = check_archive(archive, self.options.sha256)
            if digest is not None:
                found[name] = digest
            elif self.options.require_digest:
                raise ServerError(
                    f"archive {archive} has no digest to check: put {file}.sha256 beside it, or "
                    "give sha256"
                )
        return found

    def _port(self, name: str) -> int:
        if name not in self._ports:
            raise ServerError(f"the {name} port is not known yet: start the server first")
        return self._ports[name]

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise ServerError("the server is not started: start it first")
        return self._process

    def _has_workers(self, name: str, versions: int) -> bool:
        if self._running().poll() is not None:
            return False
        try:
            loaded = self.described(name)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 404:
                raise self._load_error(f"TorchServe refused the archive of model {name}") from error
            return False
        except (OSError, ValueError, http.client.HTTPException):
            return False
        ready = (
            any(worker["status"] == "READY" for worker in version["workers"]) for version in loaded
        )
        return sum(ready) == versions

    def _raise_if_failed(self) -> None:
        if self.failed():
            raise self.failure()
        assert self._log is not None
        if self._log.worker_died:
            # The exception's own lines come by another thread of Java, a little later; there are
            # none of a worker that was killed.
            deadline = time.monotonic() + _EXPLANATION_SECONDS
            while time.monotonic() < deadline and load_failure(self._log.lines) == exit_reason(
                self._log.lines
            ):
                time.sleep(_POLL_SECONDS)
            time.sleep(5 * _POLL_SECONDS)
            raise self._load_error("the worker died while it loaded the model")

    def _load_error(self, what: str) -> ServerError:
        assert self._log is not None
        return ServerError(f"{what}: {load_failure(self._log.lines)}", self._log.lines)


def _reachable(host: str) -> str:
    return LOOPBACK if host == "0.0.0.0" else host


def class_path(home: Path) -> str:
    """Return TorchServe's jars, as Java takes them."""
    return f"{home}/ts/frontend/*"


def torchserve_home() -> Path:
    """Return the directory that holds the package `ts`, without importing it."""
    package = found("ts", inside(sys.path, outside(os.environ)))
    if package is not None:
        place = Path(package).parent
        if (place / "frontend" / "model-server.jar").is_file():
            return place.resolve().parent
    raise ServerError(
        f"TorchServe not found for {sys.executable}: run `pip install torchserve==0.12.0`"
    )
