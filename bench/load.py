"""Clients that send at given times, whether earlier requests are answered or not: plain asyncio, in
a process of its own, so that it waits for nobody's Python."""

import asyncio
import gc
import math
import os
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from server.options import LOOPBACK

CONNECTIONS = 512  # at most; further requests wait for one that is free
DRAIN_SECONDS = 30.0  # after the last request was due; what is unanswered then has failed


def percentile(values: list[float], p: int) -> float:
    """The smallest value that at least p % of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, -(-len(ordered) * p // 100) - 1)]


@dataclass(frozen=True)
class Load:
    """What one measurement sends, and where.

    requests: whole HTTP requests to draw from.
    seconds: how long requests are sent.
    rate: of arrivals, requests/s; 0 for a closed loop.
    clients: of the closed loop, each of which sends when it was answered.
    give_up: ms; ends once more than 1 % of all planned requests are later. Infinite: never.
    """

    port: int
    requests: list[bytes]
    seconds: float
    seed: int
    rate: float = 0.0
    clients: int = 0
    give_up: float = math.inf


@dataclass
class Outcome:
    """Milliseconds from due to the whole answer, infinite for failures; and to the first event of
    those answers that are streams. `capacity` is requests/s answered, of a closed loop."""

    latency: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    capacity: float = 0.0
    lag: float = 0.0  # ms, 99 % of requests were sent at most so long after they were due
    gave_up: bool = False

    def p(self, percent: int) -> float:
        return math.inf if self.gave_up else percentile(self.latency, percent)


class Clients:
    """Sends requests over connections that are kept, each with one request at a time."""

    def __init__(self, load: Load, loop: asyncio.AbstractEventLoop) -> None:
        self.load = load
        self.loop = loop
        self.outcome = Outcome()
        self.idle: list[Connection] = []
        self.waiting: deque[tuple[float, bytes]] = deque()
        self.open = self.unanswered = self.late = 0
        self.answered = 0
        self.last = 0.0  # s, when the last answer came
        self.lags: list[float] = []  # ms
        self.again: Callable[[], None] | None = None  # called at each answer

    def send(self, due: float, request: bytes) -> None:
        self.unanswered += 1
        self.lags.append(1000 * (self.loop.time() - due))
        self.waiting.append((due, request))
        self.dispatch()

    def dispatch(self) -> None:
        while self.waiting and self.idle:
            self.idle.pop().send(*self.waiting.popleft())
        if self.waiting and self.open < CONNECTIONS:
            self.open += 1
            made = self.loop.create_connection(
                lambda: Connection(self), LOOPBACK, self.load.port
            )
            self.loop.create_task(made).add_done_callback(self.connected)

    def connected(self, task: "asyncio.Task[object]") -> None:
        if task.exception() is not None:
            self.open -= 1
            if self.waiting:
                self.done(self.waiting.popleft()[0], f"{type(task.exception()).__name__}")

    def done(self, due: float, failure: str = "") -> None:
        now = self.loop.time()
        ms = math.inf if failure else 1000 * (now - due)
        self.unanswered -= 1
        self.late += ms > self.load.give_up
        self.outcome.latency.append(ms)
        if failure:
            self.outcome.failures[failure] += 1
        else:
            self.answered += 1
            self.last = now
        if self.again is not None:
            self.again()
        self.dispatch()


class Connection(asyncio.Protocol):
    def __init__(self, clients: Clients) -> None:
        self.clients = clients
        self.due: float | None = None
        self.told = False  # that the first event came

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.clients.idle.append(self)
        self.clients.dispatch()

    def send(self, due: float, request: bytes) -> None:
        self.due, self.told, self.received = due, False, bytearray()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self.due is None:
            return
        self.received += data
        if not self.told and b"\ndata:" in self.received:
            self.told = True
            self.clients.outcome.first.append(1000 * (self.clients.loop.time() - self.due))
        if not complete(self.received):
            return
        due, self.due = self.due, None
        status = self.received[9:12].decode()
        if status == "200":
            self.clients.idle.append(self)
        else:  # servers close after an error, sooner or later
            self.transport.close()
        self.clients.done(due, "" if status == "200" else status)

    def connection_lost(self, error: Exception | None) -> None:
        self.clients.open -= 1
        if self in self.clients.idle:
            self.clients.idle.remove(self)
        if self.due is not None:
            due, self.due = self.due, None
            self.clients.done(due, "connection lost")


def complete(received: bytearray) -> bool:
    """Whether a whole HTTP/1.1 response is there."""
    head = received.find(b"\r\n\r\n")
    if head < 0:
        return False
    name = received[:head].lower().find(b"content-length:")
    if name < 0:
        return received.endswith(b"0\r\n\r\n")  # of a chunked body
    length = int(received[name + 15 : head + 2].split(b"\r", 1)[0])
    return len(received) >= head + 4 + length


async def generate(load: Load) -> Outcome:
    """Send everything, then wait for the answers; the server has nothing left to do after it."""
    loop = asyncio.get_running_loop()
    clients, draw = Clients(load, loop), random.Random(load.seed)
    begin = loop.time()
    end = begin + load.seconds
    if load.rate:
        due = begin
        tolerated = 0.01 * load.rate * load.seconds
        while (due := due + draw.expovariate(load.rate)) < end:
            request = draw.choice(load.requests)
            await asyncio.sleep(max(0.0, due - loop.time()))
            clients.send(due, request)
            if clients.late > tolerated:
                clients.outcome.gave_up = True
                break
    else:
        def again() -> None:
            if loop.time() < end:
                clients.send(loop.time(), draw.choice(load.requests))

        clients.again = again
        for _ in range(load.clients):
            again()
        await asyncio.sleep(load.seconds)
    deadline = loop.time() + DRAIN_SECONDS
    while clients.unanswered and loop.time() < deadline:
        await asyncio.sleep(0.01)
    outcome = clients.outcome
    outcome.latency += [math.inf] * clients.unanswered
    if clients.unanswered:
        outcome.failures["no answer"] += clients.unanswered
    if not load.rate and clients.answered:
        outcome.capacity = clients.answered / (clients.last - begin)
    outcome.lag = percentile(clients.lags, 99) if clients.lags else 0.0
    for one in clients.idle:
        one.due = None
        one.transport.abort()
    return outcome


def pin(cpus: set[int]) -> None:
    """Keep this process, and those it will start, on `cpus`; empty: on all."""
    if cpus:
        os.sched_setaffinity(0, cpus)


def generated(load: Load) -> Outcome:
    """Runs in the clients' process."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        return asyncio.run(generate(load))
    finally:
        gc.enable()
