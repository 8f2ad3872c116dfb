"""`make loadtest`: Locust against a real server, and against one that says what it was sent."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, digits

LOCUSTFILE = ROOT / "bench" / "locustfile.py"
FIRST, REST = 0.1, 0.3  # s to a stream's first event, and from there to its end
TOKEN = "a-token-of-no-worth"


@dataclass
class Row:
    """Of Locust's table; ms of all requests together."""

    name: str
    num_requests: int
    num_failures: int
    total_response_time: float

    @property
    def seconds(self) -> float:
        return self.total_response_time / self.num_requests / 1000


def locust(
    url: str, folder: Path, *more: str, seconds: float = 3, users: int = 4, **environment: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, Row]]:
    """A run, and the rows of its table by name."""
    if find_spec("locust") is None:  # not imported: it changes sockets and threads of its process
        pytest.skip("no Locust: pip install seq2serve[loadtest]")
    inherited = {k: v for k, v in os.environ.items() if k not in ("TEXT", "LENGTHS", "TOKEN")}
    done = subprocess.run(
        [
            sys.executable, "-m", "locust", "-f", LOCUSTFILE, "--headless", "--only-summary",
            "--host", url, "-u", str(users), "-r", str(users), "-t", f"{seconds}s",
            "--json-file", folder / "run", "--csv", folder / "run", *more,
        ],
        cwd=folder, env={**inherited, **environment}, text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    table = folder / "run.json"
    if not table.exists():
        return done, {}
    names = [field.name for field in fields(Row)]
    found = [Row(**{name: row[name] for name in names}) for row in json.loads(table.read_text())]
    return done, {row.name: row for row in found}


def reasons(folder: Path) -> str:
    """Of failures, as of the last whole second of the run."""
    return (folder / "run_failures.csv").read_text()


class Told(BaseHTTPRequestHandler):
    """Answers in the server's shapes, after what `server.plan` says for each request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer takes 40 ms
    server: Fake

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.asked)
            self.server.asked.append((time.monotonic(), self.client_address, self.headers, body))
        plan = self.server.plan
        kind = plan[number % len(plan)] if plan else ""
        if kind in ("busy", "full"):
            self.whole(503, {"code": 503, "type": "Overloaded", "message": "later"},
                       {"Retry-After": "1"} if kind == "busy" else {})
        elif kind == "bad":
            self.whole(413, {"code": 413, "type": "TextTooLong", "message": "text: too long"}, {})
        elif body["stream"]:
            self.events(kind)
        else:
            self.whole(200, {"translations": [[{"text": "1"}]]}, {})

    def whole(self, status: int, answer: dict[str, Any], headers: dict[str, str]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def events(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.chunk(": open\n\n")
        time.sleep(FIRST)
        self.chunk('data: {"index": 0, "text": "1"}\n\n')
        time.sleep(REST)
        if kind == "cut":
            self.close_connection = True
            return
        event = "error" if kind == "error" else "answer"
        self.chunk(f'event: {event}\ndata: {{"message": "it failed"}}\n\n')
        self.wfile.write(b"0\r\n\r\n")

    def chunk(self, text: str) -> None:
        self.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        pass


class Fake(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Told)
        self.lock = threading.Lock()
        self.plan: list[str] = []
        self.asked: list[tuple[float, Any, Any, dict[str, Any]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [body for *_, body in self.asked]

    def handle_error(self, *_: Any) -> None:
        pass  # a client that leaves at the end of a run


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_real_server_answers_plain_requests_and_streams(server: Any, tmp_path: Path) -> None:
    text = tmp_path / "lines.txt"
    text.write_text("".join(f"{line}\n" for line in digits(50, seed=5)))
    done, rows = locust(server.url, tmp_path, TEXT=str(text))
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows.keys() == {"translate", "stream", "time to first token"}
    plain, stream, first = (rows[n] for n in ("translate", "stream", "time to first token"))
    assert min(plain.num_requests, stream.num_requests) > 3
    assert 0 <= first.num_requests - stream.num_requests <= 4  # cut off at the end
    assert plain.num_failures == stream.num_failures == 0
    assert 0 < first.seconds <= stream.seconds


def test_a_real_server_that_refuses_the_request_is_told(server: Any, tmp_path: Path) -> None:
    done, rows = locust(
        server.url, tmp_path, "--request-options", '{"beam": 3}', "--streams", "0", seconds=3
    )
    assert done.returncode == 1
    assert rows["translate"].num_requests == rows["translate"].num_failures > 0
    assert "400 InvalidOption: beam" in reasons(tmp_path)


def test_the_first_token_is_told_apart_from_the_whole(fake: Fake, tmp_path: Path) -> None:
    done, rows = locust(fake.url, tmp_path, "--streams", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    first, whole = (rows[name].seconds for name in ("time to first token", "stream"))
    assert FIRST <= first < FIRST + REST
    assert whole - first >= 0.9 * REST
    assert "translate" not in rows
    assert all(body["stream"] for body in fake.bodies)
    assert {headers["Authorization"] for _, _, headers, _ in fake.asked} == {None}


def test_what_is_sent_is_what_was_asked_for(fake: Fake, tmp_path: Path) -> None:
    lines = ["eins", "zwei drei", "vier fünf sechs 😀"]
    text = tmp_path / "lines.txt"
    text.write_text("\n".join([*lines, "", "  "]), encoding="utf-8")
    done, _ = locust(
        fake.url, tmp_path, "--streams", "0", "--request-options", '{"beam_size": 5}',
        "--think", "0.05", TEXT=str(text), TOKEN=TOKEN,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert {body.pop("text") for body in fake.bodies} == set(lines)
    assert all(body == {"beam_size": 5, "stream": False} for body in fake.bodies)
    assert {headers["Authorization"] for _, _, headers, _ in fake.asked} == {f"Bearer {TOKEN}"}
    # 4 users that think 0.05 s on average: some 80 requests/s, where there would be thousands.
    assert len(fake.asked) < 3 * 120
    assert TOKEN not in done.stdout + done.stderr


DRAWN = """
import json
from argparse import Namespace
from bench.locustfile import Sentences

asked = Namespace(text="", lengths={lengths!r}, streams=0, request_options="{{}}")
print(json.dumps([Sentences(asked).draw() for _ in range(2000)]))
"""


@pytest.mark.parametrize(
    ("lengths", "mean", "longest"), [("captions", 11.9, 32), ("news", 21.8, 200)]
)
def test_made_up_sentences_are_as_long_as_real_ones(
    lengths: str, mean: float, longest: int
) -> None:
    if find_spec("locust") is None:
        pytest.skip("no Locust: pip install seq2serve[loadtest]")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DRAWN.format(lengths=lengths)],
        cwd=ROOT, text=True, capture_output=True, check=True,
    )  # fmt: skip
    words = [len(text.split()) for text in json.loads(done.stdout)]
    assert statistics.mean(words) == pytest.approx(mean, rel=0.1)
    assert 1 <= min(words) < mean / 2 < 1.5 * mean < max(words) <= longest


@pytest.mark.parametrize(
    ("seconds", "least", "most"), [("0.5", 3, 40), ("100", 2, 2)], ids=["anew", "kept"]
)
def test_clients_connect_anew_so_that_new_pods_get_their_share(
    fake: Fake, tmp_path: Path, seconds: str, least: int, most: int
) -> None:
    """3 s of 2 users, each of whose connections lasts 0.25 to 0.75 s."""
    done, rows = locust(
        fake.url, tmp_path, "--streams", "0.2", "--connection-seconds", seconds, users=2
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert least <= len({address for _, address, _, _ in fake.asked}) <= most
    assert len(fake.asked) > 2 * most or "stream" in rows


def test_a_refusal_is_no_failure_and_is_waited_for(fake: Fake, tmp_path: Path) -> None:
    fake.plan = ["busy", ""]
    done, rows = locust(fake.url, tmp_path, "--streams", "0", users=1, seconds=6)
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows["refused"].num_failures >= 2
    assert rows["translate"].num_failures == 0
    assert "503, Retry-After 1" in reasons(tmp_path)
    times = [time for time, *_ in fake.asked]
    assert all(times[i + 1] - times[i] >= 1 for i in range(0, len(times) - 1, 2))


def test_what_failed_is_told_and_is_the_status(fake: Fake, tmp_path: Path) -> None:
    fake.plan = ["full", "bad", "", "cut", "error"]
    done, rows = locust(fake.url, tmp_path, "--streams", "1", seconds=6)
    assert done.returncode == 1
    said = reasons(tmp_path)
    for what in ("413 TextTooLong: text: too long", "the stream broke off", "event: error",
                 "503 without Retry-After"):  # fmt: skip
        assert what in said
    assert 0 < rows["stream"].num_failures < rows["stream"].num_requests


@pytest.mark.parametrize("plan", [["busy"], None], ids=["only refusals", "nobody"])
def test_nothing_answered_is_no_success(fake: Fake, tmp_path: Path, plan: list[str] | None) -> None:
    fake.plan = plan or []
    url = fake.url if plan else "http://127.0.0.1:9"  # the port of discard, where nobody is
    for seconds in (1, 4, 16):  # a busy machine may not have sent anything yet
        done, rows = locust(url, tmp_path, "--streams", "0", seconds=seconds)
        if rows:
            break
    assert done.returncode == 1
    assert ("refused" in rows) == bool(plan)
    assert all(row.num_requests == row.num_failures > 0 for row in rows.values())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--text", "nothing.txt"], "--text: nothing.txt cannot be read"),
        (["--text", "empty.txt"], "--text: empty.txt has no line with text"),
        (["--streams", "2"], "--streams: got 2.0; allowed: 0 to 1"),
        (["--request-options", "[1]"], "--request-options: got '[1]'"),
        (["--lengths", "tweets"], "invalid choice: 'tweets'"),
    ],
)
def test_an_option_that_cannot_be_followed_sends_nothing(
    fake: Fake, tmp_path: Path, more: list[str], said: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    done, _ = locust(fake.url, tmp_path, *more, seconds=1)
    assert done.returncode not in (0, None)
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert fake.asked == []
