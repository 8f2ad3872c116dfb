"""What to serve and where, checked before anything starts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from server.errors import ServerError

CONFIG = Path(__file__).resolve().parent.parent / "config.properties"
FRONT_CONFIG = CONFIG.with_name("haproxy.cfg")
LOOPBACK = "127.0.0.1"
# "true" shows all that is logged, as --verbose does; handler/logs.py reads it too.
VERBOSE = "SEQ2SERVE_VERBOSE"


@dataclass(frozen=True)
class ServerOptions:
    """What to serve and where. Port 0 means a free one; `models` are NAME=FILE in the store, and
    a NAME that comes again is another version: requests that name none go to the first."""

    model_store: Path = Path("model-store")
    models: tuple[str, ...] = ("seq2seq=seq2seq.mar",)
    host: str = LOOPBACK
    port: int = 8080
    management_port: int = 8081
    metrics_port: int = 8082
    metrics_host: str = LOOPBACK
    worker_port: int = 0
    config: Path = CONFIG
    front_config: Path = FRONT_CONFIG
    # Tell each request in a line of JSON on standard output.
    access_log: bool = False
    # Show all that TorchServe and the worker log.
    verbose: bool = False
    # Where the server's temporary directory is made; None: where the system makes such.
    state_dir: Path | None = None
    # Seconds from start() to a loaded model.
    startup_timeout: float = 300.0
    # SHA-256 that the archive must have, in hexadecimal; "": what its .sha256 file says alone.
    sha256: str = ""
    # Refuse an archive of which no digest is known.
    require_digest: bool = False
    # Where Java writes the names of the classes it loads, for server/classes.py alone.
    record_classes: Path | None = None

    @classmethod
    def on_free_ports(cls, model_store: Path) -> ServerOptions:
        """A server beside whatever else runs on this machine."""
        return cls(model_store, port=0, management_port=0, metrics_port=0)

    def __post_init__(self) -> None:
        if not self.models:
            raise ServerError("models is empty: allowed is at least one NAME=FILE")
        for model in self.models:
            # TorchServe splits this list at commas, and makes paths and URLs of both parts.
            if re.fullmatch(r"[\w.-]+=[\w.-]+", model) is None:
                raise ServerError(
                    f"models has {model!r}: allowed is NAME=FILE, of letters, digits, '_.-'"
                )
        for field in ("host", "metrics_host"):
            value = getattr(self, field)
            # TorchServe 0.12 parses addresses with a pattern that knows no IPv6.
            if re.fullmatch(r"[\w.-]+", value) is None:
                raise ServerError(f"{field} is {value!r}: allowed is a host name or IPv4 address")
        ports = ("port", "management_port", "metrics_port", "worker_port")
        for field in ports:
            if not 0 <= getattr(self, field) <= 65535:
                raise ServerError(f"{field} is {getattr(self, field)}: allowed is 0 to 65535")
        fixed = [getattr(self, field) for field in ports if getattr(self, field)]
        if len(set(fixed)) < len(fixed):
            raise ServerError(f"{', '.join(ports)} has one of {fixed} twice: choose distinct ports")
        if self.startup_timeout <= 0:
            raise ServerError(f"startup_timeout is {self.startup_timeout}: allowed is above 0")
        if self.sha256 and re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256) is None:
            raise ServerError(f"sha256 is {self.sha256!r}: allowed are 64 hexadecimal digits")
        if self.sha256 and len(self.models) > 1:
            raise ServerError(f"sha256 is of one archive: models has {len(self.models)}")
