"""Load for a server that runs, by Locust (pip install seq2serve[loadtest]).

    make loadtest URL=http://... USERS=100 TIME=10m TEXT=FILE
    locust -f bench/locustfile.py --headless -H http://... -u 100 -r 10 -t 10m --text FILE

Each user sends a sentence, waits for its whole answer, thinks, and sends the next. Where the time
to the answer and under a load that does not wait matters, measure with bench/open_loop.py; this is
for a cluster: it needs Locust alone, and this file.

Rows of its table: `translate` is plain requests; `stream` is streams, until their last byte;
`time to first token` of streams, until their first event; `refused` is 503 of either kind, whose
milliseconds are not among those of answers. Ends with status 1 if anything but a refusal failed, or
if nothing was answered.
"""

from __future__ import annotations

import json
import random
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from locust import FastHttpUser, events, task
from locust.argument_parser import LocustArgumentParser
from locust.contrib.fasthttp import FAILURE_EXCEPTIONS
from locust.env import Environment
from locust.exception import StopUser

# Words of a sentence, at each twentieth of all sentences from the shortest to the longest.
# Captions: Multi30k, test_2016_flickr.en, counted: mean 11.9.
CAPTIONS = (4, 7, 8, 8, 9, 9, 10, 10, 10, 11, 11, 12, 12, 13, 13, 14, 15, 15, 17, 19, 32)
# News: 100,554 words in 4,623 sentences of the Brown corpus' category news (NLTK's count), mean
# 21.8; that they are gamma distributed with shape 4, half the mean apart, is an assumption.
NEWS_MEAN, NEWS_SHAPE = 21.8, 4.0
LENGTHS = ("captions", "news")
# As long as Multi30k's words, 4.2 letters on average. A model of another language takes them as
# well (its tokenizer knows every byte), but its answers mean nothing: give it your own lines.
WORDS = "a man in red shirt and two dogs play with the ball on green grass near water while people"

REFUSED = "refused"
WITHOUT = "503 without Retry-After"  # TorchServe's own, when its queue is full


@events.init_command_line_parser.add_listener
def options(parser: LocustArgumentParser) -> None:
    add = parser.add_argument
    add("--text", env_var="TEXT", default="", help="file of sentences, one a line, to draw from")
    add("--lengths", env_var="LENGTHS", choices=LENGTHS, default=LENGTHS[0],
        help="of made-up sentences, where no text is given")
    add("--streams", type=float, default=0.5, help="share of requests that are streams, 0 to 1")
    add("--request-options", default="{}", help="""fields of each request: '{"beam_size": 5}'""")
    add("--path", default="/predictions/seq2seq")
    add("--think", type=float, default=0.0, help="s between two requests of a user, on average")
    add("--connection-seconds", type=float, default=10.0,
        help="after which a user connects anew, half to one and a half times; 0: each time")
    # In the environment, where no list of processes shows it.
    add("--token", env_var="TOKEN", default="", include_in_web_ui=False, help="bearer token")


class Sentences:
    """What is sent.

    Raises:
        ValueError: an option that cannot be followed.
    """

    def __init__(self, asked: Namespace) -> None:
        self.lines: list[str] = []
        self.lengths = asked.lengths
        if asked.text:
            try:
                text = Path(asked.text).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"--text: {asked.text} cannot be read: {error}") from None
            self.lines = [line for line in text.splitlines() if line.strip()]
            if not self.lines:
                raise ValueError(f"--text: {asked.text} has no line with text")
        if not 0 <= asked.streams <= 1:
            raise ValueError(f"--streams: got {asked.streams}; allowed: 0 to 1")
        try:
            self.fields = json.loads(asked.request_options)
            if not isinstance(self.fields, dict):
                raise ValueError("no object")
        except ValueError as error:
            raise ValueError(
                f"--request-options: got {asked.request_options!r}, {error}; allowed: a JSON object"
            ) from None

    def draw(self) -> str:
        if self.lines:
            return random.choice(self.lines)
        if self.lengths == "news":
            count = max(1, round(random.gammavariate(NEWS_SHAPE, NEWS_MEAN / NEWS_SHAPE)))
        else:
            at = random.random() * (len(CAPTIONS) - 1)
            low, high = CAPTIONS[int(at)], CAPTIONS[int(at) + 1]
            count = round(low + (high - low) * (at % 1))
        words = " ".join(random.choices(WORDS.split(), k=count))
        return f"{words[0].upper()}{words[1:]}."


@events.test_start.add_listener
def begin(environment: Environment, **_: Any) -> None:
    """An option that cannot be followed ends the test before the first request."""
    assert environment.parsed_options is not None
    try:
        Sentences(environment.parsed_options)
    except ValueError as error:
        print(f"error: {error}")
        environment.process_exit_code = 2
        assert environment.runner is not None
        environment.runner.quit()


@events.quitting.add_listener
def judge(environment: Environment, **_: Any) -> None:
    """A server that says no when it is full is one that works."""
    if environment.process_exit_code is not None:
        return
    stats = environment.stats
    broken = sum(one.occurrences for one in stats.errors.values() if one.name != REFUSED)
    answered = any(
        one.num_requests > one.num_failures for one in stats.entries.values() if one.name != REFUSED
    )
    environment.process_exit_code = int(broken > 0 or not answered)


class Client(FastHttpUser):
    """One client of the server."""

    insecure = False  # it may send a token: certificates are checked (SSL_CERT_FILE: your own)

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        assert environment.parsed_options is not None
        self.asked = environment.parsed_options
        try:
            self.sentences = Sentences(self.asked)
        except ValueError:
            raise StopUser from None
        self.headers = {"Authorization": f"Bearer {self.asked.token}"} if self.asked.token else {}
        self.connected_until = 0.0

    def wait_time(self) -> float:
        return random.expovariate(1 / self.asked.think) if self.asked.think else 0.0

    @task
    def translate(self) -> None:
        """A Service picks a pod for a connection, not for a request: a client that keeps its
        connection keeps its pod, and those that autoscaling adds would stand idle."""
        if time.monotonic() >= self.connected_until:
            self.client.client.close()
            self.connected_until = (
                time.monotonic() + random.uniform(0.5, 1.5) * self.asked.connection_seconds
            )
        stream = random.random() < self.asked.streams
        body = {**self.sentences.fields, "text": self.sentences.draw(), "stream": stream}
        began = time.perf_counter()
        pause = 0.0
        with self.client.post(
            self.asked.path, json=body, headers=self.headers, stream=stream, catch_response=True,
            name="stream" if stream else "translate",
        ) as reply:  # fmt: skip
            if reply.status_code == 503:
                pause = self.refused(reply)
            elif reply.status_code != 200:
                reply.failure(said(reply))
            elif stream:
                self.listen(reply, began)
        time.sleep(pause)

    def refused(self, reply: Any) -> float:
        """Seconds until the server may be asked again."""
        after = reply.headers.get("Retry-After")
        reply.request_meta["name"] = REFUSED
        reply.failure(f"503, Retry-After {after}" if after else WITHOUT)
        return float(after) if after and after.isdigit() else 0.0

    def listen(self, reply: Any, began: float) -> None:
        """Read a stream of events to its end."""
        told, kind, ended = False, "", False
        try:
            while line := reply.stream.readline(b"\n"):
                if line.startswith(b"event:"):
                    kind = line[6:].strip().decode()
                elif line.startswith(b"data:"):
                    if kind == "error":
                        reply.failure(f"event: error {line[5:].decode().strip():.200}")
                    elif not told:
                        told = True
                        self.told(1000 * (time.perf_counter() - began))
                    ended |= kind in ("answer", "error")
                elif not line.strip():
                    kind = ""
        except FAILURE_EXCEPTIONS:
            ended = False
        reply.request_meta["response_time"] = 1000 * (time.perf_counter() - began)
        if not ended:
            reply.failure("the stream broke off")

    def told(self, ms: float) -> None:
        self.environment.events.request.fire(
            request_type="SSE", name="time to first token", response_time=ms, response_length=0,
            exception=None, context={},
        )  # fmt: skip


def said(reply: Any) -> str:
    """What a server's error says; Locust counts errors by it, so that none is told twice."""
    try:
        told = json.loads(reply.text)
        return f"{reply.status_code} {told['type']}: {told['message']:.120}"
    except (ValueError, TypeError, KeyError):
        return f"{reply.status_code} {reply.error or reply.text!r:.120}"
