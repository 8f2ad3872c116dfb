"""Decoding of many sentences that are all at hand."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from handler.decoding.engine import STEPS, Engine
from handler.decoding.options import DecodingOptions
from handler.decoding.sentence import Event

AHEAD = 16
Item = TypeVar("Item")


def in_order(
    engine: Engine,
    items: Iterable[Item],
    admit: Callable[[Item], list[int]],
    length: Callable[[Item], int],
    ahead: int = AHEAD,
) -> Iterator[tuple[Item, list[Event]]]:
    """Decode `items` and yield each with the events of its sentences, in order.

    The engine is refilled as sentences end. `ahead` times its rows are read at a time, and go in
    the longest first: what is encoded together is then of like length. At most twice as many are
    held, so that memory is bounded however long the input is.

    Args:
        admit: queues the sentences of an item, none or several, and names them.
        length: of an item, in tokens.
    """
    most = ahead * engine.capacity
    feed = iter(items)
    queue: deque[tuple[Item, list[int]]] = deque()
    ended: dict[int, Event] = {}
    while True:
        if engine.waiting_count < engine.capacity and len(queue) <= most:
            read = list(itertools.islice(feed, most))
            named = [list[int]()] * len(read)
            for i in sorted(range(len(read)), key=lambda i: -length(read[i])):
                named[i] = admit(read[i])
            queue.extend(zip(read, named))
        if not queue:
            return
        ended |= {event.sentence: event for event in engine.advance(STEPS)}
        while queue and all(sentence in ended for sentence in queue[0][1]):
            item, sentences = queue.popleft()
            yield item, [ended.pop(sentence) for sentence in sentences]


def decode_in_order(
    engine: Engine, sources: Iterable[list[int]], options: DecodingOptions, ahead: int = AHEAD
) -> Iterator[Event]:
    """Decode `sources` (ids with EOS) and yield one event each, in their order; see `in_order`."""
    decoded = in_order(engine, sources, lambda s: [engine.admit(s, options)], len, ahead)
    for _, (event,) in decoded:
        yield event
