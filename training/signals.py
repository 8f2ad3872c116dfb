"""Stopping where everything can be saved."""

import signal
from types import FrameType, TracebackType


class Interrupted(Exception):
    """Stopped by Ctrl-C or SIGTERM; everything needed to go on is saved."""


class StopSignals:
    """Turns Ctrl-C and SIGTERM into a request to stop after the current update; a second Ctrl-C
    stops at once. A second SIGTERM does not: under torchrun and a job scheduler, both send one."""

    asked = False

    def __enter__(self) -> "StopSignals":
        kinds = (signal.SIGINT, signal.SIGTERM)
        self.former = {kind: signal.signal(kind, self.ask) for kind in kinds}
        return self

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, former in self.former.items():
            signal.signal(number, former)
