"""Clients that have left, as the HTTP front tells it.

TorchServe 0.12 tells a handler of a client that leaves only when its stream is open. The front
(server/front.py, haproxy.cfg) knows of all, and writes a line for each request that ended badly
into a pipe: JSON with the `key` that the request had in its header X-Front-Key, and in `end` who
broke off and when.
"""

import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping

logger = logging.getLogger(__name__)

VARIABLE = "SEQ2SERVE_LEFT"  # names the pipe; server/torchserve.py sets it
HEADER = "x-front-key"
_MOST = 8192  # of either kind that are remembered


class Departures:
    """Which requests have been left.

    Args:
        pipe: a file descriptor that does not block; None where there is no front.
    """

    def __init__(self, pipe: int | None) -> None:
        self.pipe = pipe
        self.rest = b""
        self.request_of: dict[str, str] = {}  # TorchServe's id of each key that came
        self.early: dict[str, None] = {}  # keys that left before they came, oldest first

    @classmethod
    def named(cls, environment: Mapping[str, str] = os.environ) -> "Departures":
        """Those of the pipe that `SEQ2SERVE_LEFT` names.

        Raises:
            OSError: it cannot be read.
        """
        path = environment.get(VARIABLE)
        return cls(os.open(path, os.O_RDONLY | os.O_NONBLOCK) if path else None)

    def arrived(self, key: str, request: str, live: Collection[str]) -> bool:
        """Take note of a request; say whether its client is still there.

        Args:
            live: all requests that may still be left.
        """
        if not key:
            return True
        if key in self.early:
            del self.early[key]
            return False
        if len(self.request_of) >= _MOST:
            self.request_of = {k: one for k, one in self.request_of.items() if one in live}
        self.request_of[key] = request
        return True

    def read(self) -> list[str]:
        """The requests that have been left since the last call."""
        found = []
        for key in self.keys():
            if key in self.request_of:
                found.append(self.request_of.pop(key))
            else:
                self.early[key] = None
        while len(self.early) > _MOST:
            del self.early[next(iter(self.early))]
        return found

    def keys(self) -> Iterator[str]:
        while self.pipe is not None:
            try:
                read = os.read(self.pipe, 65536)
            except BlockingIOError:
                return
            if not read:  # the front has ended, and the server with it
                return
            *lines, self.rest = (self.rest + read).split(b"\n")
            for line in lines:
                try:
                    told = json.loads(line)
                    key, end = str(told["key"]), str(told["end"])
                except (ValueError, KeyError, TypeError):
                    logger.warning("the front wrote a line that is not understood")
                    continue
                # "P" and "L": the front's own answer, of which TorchServe has not heard.
                if key != "-" and end[:1] not in ("", "-", "P", "L"):
                    yield key
