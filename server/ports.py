"""Choose and check the ports of a server before Java is started."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping

from server.errors import ServerError


def choose_ports(wanted: Mapping[str, tuple[str, int]]) -> dict[str, int]:
    """Return a usable port for each name, given its (host, port); port 0 means any free one.

    Another program may still take a port between this check and the server's own bind; the server
    then stops, and says so.
    """
    chosen: dict[str, int] = {}
    with contextlib.ExitStack() as held:
        # Fixed ports first, so that no free choice takes one of them; and all held to the end, so
        # that two free choices differ.
        for name, (host, port) in sorted(wanted.items(), key=lambda item: item[1][1] == 0):
            probe = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            # As the server does it: a port whose last connections are still closing is usable.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                probe.listen(1)
            except OSError as error:
                raise ServerError(
                    f"{name} port {port} on {host} cannot be used ({error.strerror}): "
                    "stop what uses it, or choose another (0 means a free one)"
                ) from error
            chosen[name] = probe.getsockname()[1]
    return chosen
