"""The ports of a server: chosen and checked before Java starts, and who still reads from one."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from pathlib import Path

from server.errors import ServerError

# Connections that are established, those whose client has said all that it had to say, and those
# that we have closed with bytes still to be sent: FIN_WAIT1, LAST_ACK, CLOSING.
_SENDING = ("01", "08", "04", "09", "0B")


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
            probe = held.enter_context(listening(name, host, port, 1))
            chosen[name] = probe.getsockname()[1]
    return chosen


def listening(name: str, host: str, port: int, backlog: int) -> socket.socket:
    """Return a socket that listens; port 0 means any free one.

    Args:
        backlog: connections that may wait to be taken.

    Raises:
        ServerError: it cannot be used, and by which name.
    """
    one = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # A port whose last connections are still closing is usable.
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        one.bind((host, port))
        one.listen(backlog)
    except OSError as error:
        one.close()
        raise ServerError(
            f"{name} port {port} on {host} cannot be used ({error.strerror}): "
            "stop what uses it, or choose another (0 means a free one)"
        ) from error
    return one


def unsent(port: int, tables: Path = Path("/proc/net")) -> int:
    """Return how many connections to a port of this machine have bytes that their client has not
    taken yet; 0 where the system does not tell.

    A server that ends while a slow client reads resets the connection, and what it had not handed
    to the kernel is lost.
    """
    count = 0
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (tables / name).read_text(encoding="ascii").splitlines()[1:]:
                # Documentation/networking/proc_net_tcp.rst of Linux; numbers are hexadecimal.
                _, local, _, state, queues, *_ = line.split()
                ours = int(local.rpartition(":")[2], 16) == port and state in _SENDING
                count += ours and int(queues.partition(":")[0], 16) > 0
    return count
