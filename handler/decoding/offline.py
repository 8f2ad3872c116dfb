"""Decoding of many sentences that are all at hand."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from handler.decoding.engine import Engine
from handler.decoding.options import DecodingOptions
from handler.decoding.sentence import Event

AHEAD = 4
Item = TypeVar("Item")


def in_order(
    engine: Engine, items: Iterable[Item], admit: Callable[[Item], list[int]], ahead: int = AHEAD
) -> Iterator[tuple[Item, list[Event]]]:
    """Decode `items` and yield each with the events of its sentences, in order.

    The engine is refilled as sentences end. At most `ahead` times its rows are read in advance,
    so that memory is bounded however long the input is.

    Args:
        admit: queues the sentences of an item, none or several, and names them.
    """
    most = ahead * engine.capacity
    feed = iter(items)
    queue: deque[tuple[Item, list[int]]] = deque()
    ended: dict[int, Event] = {}
    exhausted = False
    while True:
        while not exhausted and len(queue) < most and len(engine.sentences) < most:
            try:
                item = next(feed)
            except StopIteration:
                exhausted = True
            else:
                queue.append((item, admit(item)))
        if not queue:
            return
        ended |= {event.sentence: event for event in engine.advance()}
        while queue and all(sentence in ended for sentence in queue[0][1]):
            item, sentences = queue.popleft()
            yield item, [ended.pop(sentence) for sentence in sentences]


def decode_in_order(
    engine: Engine, sources: Iterable[list[int]], options: DecodingOptions, ahead: int = AHEAD
) -> Iterator[Event]:
    """Decode `sources` (ids with EOS) and yield one event each, in their order; see `in_order`."""
    for _, (event,) in in_order(engine, sources, lambda s: [engine.admit(s, options)], ahead):
        yield event
