"""What can go wrong, as one line that names the thing, its value and what to do."""

from __future__ import annotations


class ServerError(Exception):
    """The server could not start, keep running, or be reached.

    `log` holds the last lines that TorchServe wrote, for whoever wants more than the one line.
    """

    def __init__(self, message: str, log: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.log = log


class ReplyError(ServerError):
    """The server answered a request with an error."""

    def __init__(self, status: int, type: str, message: str) -> None:
        super().__init__(f"{status} {type}: {message}")
        self.status = status
        self.type = type
        self.message = message
