"""Decoding of many sentences that are all at hand."""

from collections.abc import Iterable, Iterator

from handler.decoding.engine import Engine
from handler.decoding.options import DecodingOptions
from handler.decoding.sentence import Event


def decode_in_order(
    engine: Engine, sources: Iterable[list[int]], options: DecodingOptions, ahead: int = 4
) -> Iterator[Event]:
    """Decode `sources` (ids with EOS) and yield one event each, in their order.

    The engine is refilled as sentences end. At most `ahead` times its rows are read in advance,
    so that memory is bounded however long the input is.
    """
    most = ahead * engine.capacity
    feed = iter(sources)
    order: dict[int, Event | None] = {}
    exhausted = False
    while True:
        while not exhausted and len(order) < most:
            source = next(feed, None)
            exhausted = source is None
            if source is not None:
                order[engine.admit(source, options)] = None
        if not order:
            return
        for event in engine.advance():
            order[event.sentence] = event
        while order:
            first = next(iter(order))
            ended = order[first]
            if ended is None:
                break
            del order[first]
            yield ended
