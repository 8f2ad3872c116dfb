"""Work that is done a piece at a time, so that nobody waits for the whole of another's.

A piece of work is a generator that yields wherever it may be interrupted, after a tenth of a
millisecond or so. Reading a request of thousands of sentences is such work, and telling its answer.
"""

from collections.abc import Callable, Generator
from typing import TypeVar

SLICE = 0.001  # seconds that one work goes on before others have their turn

Result = TypeVar("Result")
Work = Generator[None, None, Result]


class Pieces:
    """Works that take turns. What ends within its first turn waits for no more than one turn of
    those that need several; and each of these has a turn some time, whoever comes.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.new: dict[str, Work[None]] = {}
        self.old: dict[str, Work[None]] = {}  # that have had a turn, in the order of the next one

    def __bool__(self) -> bool:
        return bool(self.new or self.old)

    def __contains__(self, key: str) -> bool:
        return key in self.new or key in self.old

    def add(self, key: str, work: Work[None]) -> None:
        """`work` tells by itself what came of it, its failures too: it raises nothing."""
        self.new[key] = work

    def drop(self, key: str) -> None:
        """Do no more of a work, if there is one: its generator is closed."""
        for line in (self.new, self.old):
            work = line.pop(key, None)
            if work is not None:
                work.close()

    def clear(self) -> None:
        for key in [*self.new, *self.old]:
            self.drop(key)

    def advance(self, until_new: float, until_old: float) -> None:
        """One turn of an old work, if there is one; then each new one's first until `until_new`,
        then turns of the old ones until `until_old`."""
        if self.old:
            self.turn(self.old)
        while self.new and self.clock() < until_new:
            self.turn(self.new)
        while self.old and self.clock() < until_old:
            self.turn(self.old)

    def turn(self, line: dict[str, Work[None]]) -> None:
        """That of the first in line."""
        key = next(iter(line))
        work = line.pop(key)
        over = self.clock() + SLICE
        for _ in work:
            if self.clock() >= over:
                self.old[key] = work
                return


def at_once(work: Work[Result]) -> Result:
    """What comes of a work that nobody waits beside."""
    while True:
        try:
            next(work)
        except StopIteration as over:
            result: Result = over.value
            return result
