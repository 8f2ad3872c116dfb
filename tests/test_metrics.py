"""What is counted, and how it reaches Prometheus through TorchServe."""

import json
import re
import threading
import time
from collections import Counter
from contextlib import closing

import pytest
from conftest import GUARD_SECONDS, JSON, PREDICT, call, connected
from echo_service import Clock, Echo, answers, ask, service
from test_handler import Recorder

from handler import reporting
from handler.metrics import FROM_START, PREFIX, STEP_BUCKETS, WAIT_BUCKETS, Metrics
from handler.reporting import CEASED, Calls, TorchServeSink, report
from handler.service import Incoming, Service

Figures = dict[tuple[str, tuple[tuple[str, str], ...]], float]  # by name and labels
GAUGES = {
    "rows_in_use", "row_capacity", "live_requests", "pending_requests", "waiting_sentences",
}


def tell(metrics: Metrics, gauges: dict[str, float] | None = None) -> Figures:
    figures: Figures = {}

    def sink(name, kind, labels, values, value):
        key = name.removeprefix(PREFIX), tuple(zip(labels, values))
        assert name.startswith(PREFIX)
        assert key not in figures
        assert (kind == "gauge") == (key[0] in (gauges or {}))
        figures[key] = value

    metrics.tell(sink, gauges or {})
    return figures


def buckets(figures: Figures, name: str) -> dict[str, float]:
    own = f"{name}_bucket"
    return {dict(labels)["le"]: v for (one, labels), v in figures.items() if one == own}


def check_histogram(figures: Figures, name: str) -> float:
    """The count of a histogram whose buckets are what Prometheus takes for one."""
    found = buckets(figures, name)
    in_order = [found[le] for le in sorted(found, key=float)]
    assert in_order == sorted(in_order)
    assert found["+Inf"] == figures[f"{name}_count", ()]
    return found["+Inf"]


def test_what_was_counted_is_told_once():
    one = Metrics()
    one.count("a_total")
    one.count("a_total", 2)
    one.count("b_total", reason="x")
    one.count("b_total", reason="y")
    assert tell(one) == {
        ("a_total", ()): 3, ("b_total", (("reason", "x"),)): 1, ("b_total", (("reason", "y"),)): 1,
    }
    assert tell(one) == {}
    one.count("a_total", 5)
    assert tell(one) == {("a_total", ()): 5}


def test_gauges_are_told_when_they_have_changed():
    one = Metrics()
    assert tell(one, {"a": 0, "b": 2}) == {("a", ()): 0, ("b", ()): 2}
    assert tell(one, {"a": 0, "b": 2}) == {}
    assert tell(one, {"a": 1, "b": 2}) == {("a", ()): 1}
    assert tell(one, {"a": 0, "b": 2}) == {("a", ()): 0}


def test_an_observation_counts_in_every_bucket_that_it_fits():
    one = Metrics()
    for seconds in (0.001, 0.0005, 0.3, 7.0):
        one.observe("step_seconds", seconds, STEP_BUCKETS)
    figures = tell(one)
    assert check_histogram(figures, "step_seconds") == 4
    found = buckets(figures, "step_seconds")
    some = [found[le] for le in ("0.0005", "0.001", "0.2", "0.5", "1", "+Inf")]
    assert some == [1, 2, 2, 3, 3, 4]
    assert figures["step_seconds_sum", ()] == pytest.approx(7.3015)


@pytest.mark.parametrize("bounds", [STEP_BUCKETS, WAIT_BUCKETS])
def test_buckets_that_nothing_fell_into_are_told_besides(bounds):
    """Prometheus takes the least bucket that is there to begin at 0."""
    assert list(bounds) == sorted(bounds)
    one = Metrics()
    one.observe("x", bounds[-1], bounds)
    assert set(buckets(tell(one), "x")) == {f"{bound:g}" for bound in bounds} | {"+Inf"}


def test_nothing_is_lost_while_one_thread_counts_and_another_tells():
    one, told, over = Metrics(), Counter(), threading.Event()

    def teller():
        while not over.is_set():
            told.update({name: value for (name, _), value in tell(one).items()})

    thread = threading.Thread(target=teller)
    thread.start()
    for _ in range(20_000):
        one.count("a_total")
    over.set()
    thread.join()
    told.update({name: value for (name, _), value in tell(one).items()})
    assert told["a_total"] == 20_000


def test_what_a_sink_does_not_take_is_told_the_next_time_and_all_else_now():
    one, told = Metrics(), Counter()

    def sink(name, kind, labels, values, value):
        if "bad" in name and broken:
            raise OSError("no")
        told[name] += value

    for broken in (True, True, False):
        for name in ("a_total", "bad_total", "c_total"):
            one.count(name, 2)
        if broken:
            with pytest.raises(OSError, match="no"):
                one.tell(sink, {"bad": 7, "good": 8})
        else:
            one.tell(sink, {"bad": 7, "good": 8})
    assert told == {
        "seq2seq_a_total": 6, "seq2seq_bad_total": 6, "seq2seq_c_total": 6, "seq2seq_bad": 7,
        "seq2seq_good": 8,
    }


# The service


def test_a_request_is_counted_with_its_tokens_and_steps():
    model = Echo()
    one = service(rows=2, model=model, clock=Clock(model))
    # "a" alone, as the beam of "cd" waits for both rows; then that; "b"; the line after "cd".
    steps = 3 + 2 + 3 + 2
    replies = answers(one, [ask(1, ["a", "b"], 3), ask(2, "cd\na", 2, beam_size=2, n_best=2)])
    usages = [json.loads(reply.body)["usage"] for reply in replies.values()]
    figures = tell(one.metrics, one.gauges())
    for side in ("source", "target"):
        total = sum(usage[f"{side}_tokens"] for usage in usages)
        assert figures["tokens_total", (("side", side),)] == total
    assert figures["requests_total", (("outcome", "ok"),)] == 2
    assert check_histogram(figures, "step_seconds") == steps
    assert check_histogram(figures, "first_token_seconds") == 2
    assert check_histogram(figures, "request_seconds") == 2
    assert figures["step_seconds_sum", ()] == pytest.approx(model.rows_computed / 1000, abs=1e-6)
    assert {name for name, _ in figures} >= GAUGES
    assert figures["rows_in_use", ()] == 0


def test_time_to_the_first_token_is_counted_when_it_is_there():
    model = Echo()
    one = service(rows=1, model=model, clock=Clock(model))
    live = [ask("first", "a", 5), ask("waits", "b", 5)]
    one.round(live)
    assert tell(one.metrics)["first_token_seconds_count", ()] == 1
    for _ in range(3):
        one.round(live)
        assert ("first_token_seconds_count", ()) not in tell(one.metrics)
    got = answers(one, live)
    figures = tell(one.metrics)
    assert len(got) == 2
    assert figures["first_token_seconds_count", ()] == 1
    assert figures["first_token_seconds_sum", ()] == pytest.approx(0.006, abs=1e-6)


def test_refusals_failures_and_cancellations_are_counted_by_their_reason():
    one = service(rows=4, max_waiting=4, max_texts=8)
    answers(one, [
        ask(1, "a", beam_size=0), ask(2, "a", max_length=0), ask(3, "abcdefab"), ask(4, ["a"] * 5),
        ask(5, ["a"] * 9), Incoming("6", "where", "", None), ask(7, "gab"),
        ask(8, "gab", stream=True), Incoming("9", "", "application/json", {"instances": []}),
    ])
    one.round([ask(10, ["a", "b"], 9), ask(11, "c", 9, stream=True)])
    one.round([])
    figures = tell(one.metrics)
    refusals = {labels[0][1]: v for (name, labels), v in figures.items() if "refusals" in name}
    assert refusals == {
        "InvalidOption": 3, "TextTooLong": 1, "Overloaded": 1, "TooManyTexts": 1, "NotFound": 1,
    }
    assert figures["requests_total", (("outcome", "failed"),)] == 2
    assert ("requests_total", (("outcome", "ok"),)) not in figures
    assert figures["cancellations_total", ()] == 2


def test_gauges_say_how_full_the_service_is():
    one = service(rows=3)
    live = [ask(1, "a", 9), ask(2, ["b", "c", "d"], 9), ask(3, "e", 9, beam_size=3)]
    one.round(live)
    assert one.gauges() == {
        "rows_in_use": 2, "row_capacity": 3, "live_requests": 2, "pending_requests": 1,
        "waiting_sentences": 3,  # the beam, which comes next, needs all rows
    }
    answers(one, live)
    assert one.gauges() == dict.fromkeys(GAUGES, 0) | {"row_capacity": 3}


# TorchServe's side


def reported(one: Service, calls: Calls, times=1) -> list[tuple]:
    """What `times` looks of the reporting thread tell TorchServe."""
    recorder, looks = Recorder(), iter(range(times))

    class OverError(Exception):
        pass

    def sleep(seconds):
        assert seconds == reporting.INTERVAL
        if next(looks, None) is None:
            raise OverError

    with pytest.raises(OverError):
        report(one, calls, recorder, sleep)
    return recorder.told


def test_each_figure_is_told_with_the_model_and_its_labels():
    one = service()
    answers(one, [ask(1, "a"), ask(2, "a", beam_size=0)])
    told = reported(one, Calls(), times=3)
    model = {"model_name": "echo", "model_version": "1.0"}
    assert ("seq2seq_row_capacity", "gauge", model, 4) in told
    assert ("seq2seq_requests_total", "counter", {**model, "outcome": "ok"}, 1) in told
    assert (
        "seq2seq_refusals_total", "counter", {**model, "reason": "InvalidOption"}, 1
    ) in told
    assert ("seq2seq_tokens_total", "counter", {**model, "side": "target"}, 2) in told
    assert ("seq2seq_step_seconds_bucket", "counter", {**model, "le": "+Inf"}, 2) in told
    assert len({(name, *labels.values()) for name, _, labels, _ in told}) == len(told)


def test_counters_that_are_asked_for_begin_at_zero():
    """Before any request; and what was counted before the first look is not lost."""
    model = {"model_name": "echo", "model_version": "1.0"}
    told = reported(service(), Calls(), times=2)
    assert ("seq2seq_requests_total", "counter", {**model, "outcome": "failed"}, 0) in told
    assert ("seq2seq_cancellations_total", "counter", model, 0) in told
    zeros = [one for one in told if one[1] == "counter"]
    assert len(zeros) == len(FROM_START)
    assert {value for *_, value in zeros} == {0}
    one = service()
    answers(one, [ask(1, "a")])
    told = reported(one, Calls())
    assert ("seq2seq_requests_total", "counter", {**model, "outcome": "ok"}, 1) in told


def test_the_labels_of_counters_that_begin_at_zero_are_the_service_s():
    """Of each such counter all that the service ever counts, but for reasons of refusals."""
    one = service(rows=4)
    answers(one, [ask(1, "a"), ask(2, "gab")])
    one.round([ask(3, "b", 9)])
    one.round([])
    counted = {key for key in tell(one.metrics) if key[0] in dict(FROM_START)}
    named = {(name, tuple(labels.items())) for name, labels in FROM_START}
    assert named - counted == {("refusals_total", (("reason", "Unauthorized"),))}
    assert counted <= named


@pytest.mark.parametrize("broken", ["add_metric_to_cache", "add_or_update", "gauges", "sink"])
def test_no_failure_ends_what_is_told(broken, monkeypatch, caplog):
    """It is in the log once, and so is its end; nothing that was counted is lost."""
    one, recorder, looks, looking = service(), Recorder(), [], iter(range(6))
    answers(one, [ask(1, "a")])

    def failing(real):
        def call(*given):
            if 1 <= len(looks) <= 3:
                raise KeyError("secret")
            return real(*given)
        return call

    class OverError(Exception):
        pass

    def sleep(_):
        looks.append(next(looking, None))
        if looks[-1] is None:
            raise OverError
        one.metrics.count("refusals_total", reason=f"look {len(looks)}")

    class Cache:
        def add_metric_to_cache(self, *given):
            metric = recorder.add_metric_to_cache(*given)
            if broken == "add_or_update":
                metric.add_or_update = failing(metric.add_or_update)
            return metric

    cache = Cache()
    if broken == "add_metric_to_cache":
        cache.add_metric_to_cache = failing(cache.add_metric_to_cache)
    if broken == "gauges":
        monkeypatch.setattr(one, "gauges", failing(one.gauges))
    if broken == "sink":
        monkeypatch.setattr(reporting, "TorchServeSink", failing(TorchServeSink))
    with pytest.raises(OverError):
        report(one, Calls(), cache, sleep)
    counted = Counter()
    for name, _, labels, value in recorder.told:
        counted[name, labels.get("reason")] += value
    assert {counted["seq2seq_refusals_total", f"look {i}"] for i in range(1, 7)} == {1}
    assert counted["seq2seq_row_capacity", None] == 4
    here = threading.get_ident()  # threads of other tests' handlers go on
    told = [each.getMessage() for each in caplog.records if each.thread == here]
    assert told == [
        "metrics could not be told; they are counted until they can be", "metrics are told again",
    ]


def test_gauges_may_be_read_in_the_middle_of_a_round():
    one, over, seen = service(rows=2), threading.Event(), []

    def reader():
        while not over.is_set():
            seen.append(one.gauges())

    thread = threading.Thread(target=reader)
    thread.start()
    for i in range(60):
        answers(one, [ask((i, j), ["a", "b"], 2) for j in range(6)])
    over.set()
    thread.join()
    assert all(set(each) == GAUGES for each in seen)
    assert one.gauges() == dict.fromkeys(GAUGES, 0) | {"row_capacity": 2}


def test_a_metric_is_made_known_to_torchserve_once():
    recorder, made = Recorder(), []

    class Counting:
        def add_metric_to_cache(self, name, *more):
            made.append(name)
            return recorder.add_metric_to_cache(name, *more)

    sink = TorchServeSink(Counting(), {"name": "m", "version": "2"})
    for value in (1.0, 2.0):
        sink("seq2seq_a_total", "counter", ("reason",), ("x",), value)
    assert made == ["seq2seq_a_total"]
    assert [value for *_, value in recorder.told] == [1.0, 2.0]


def test_when_calls_have_ceased_nobody_is_there():
    """The last client of a stream leaves without a word: nothing calls the service again."""
    one, calls = service(rows=2), Calls()
    one.round([ask(1, ["a", "b", "c"], 9, stream=True)])
    busy = {name: value for name, kind, _, value in reported(one, calls)
            if kind == "gauge"}
    assert busy["seq2seq_rows_in_use"] == 2
    calls.last -= CEASED + 1
    with calls:
        assert not calls.have_ceased()  # one long call
    assert not calls.have_ceased()
    calls.last -= CEASED + 1
    assert calls.have_ceased()
    left = {name: value for name, kind, _, value in reported(one, calls)
            if kind == "gauge"}
    assert left == {
        "seq2seq_rows_in_use": 0, "seq2seq_live_requests": 0, "seq2seq_waiting_sentences": 0,
    }  # no request was pending


# A real server

LINE = re.compile(r"seq2seq_(\w+)\{(.*?),?\} (\S+)")


def scrape(server) -> Figures:
    """What Prometheus reads of ours, without the labels that all have."""
    with closing(connected(server.metrics_url)) as connection:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    figures: Figures = {}
    for name, labels, value in LINE.findall(text):
        own = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        assert own.pop("model_name") == "seq2seq"
        assert own.pop("model_version") == "1.0"
        own.pop("Hostname")
        figures[name, tuple(own.items())] = float(value)
    return figures


def scraped(server, expected) -> Figures:
    """What is there once `expected` holds: TorchServe is told a little later, line by line."""
    deadline = time.monotonic() + GUARD_SECONDS
    while not expected(figures := scrape(server)):
        assert time.monotonic() < deadline, figures
        time.sleep(0.2)
    time.sleep(0.2)
    return scrape(server)


def idle(figures: Figures) -> bool:
    """Rows alone do not tell: between two wide beams none is in use."""
    return all(figures.get((name, ())) == 0 for name in GAUGES - {"row_capacity"})


def settled(server) -> Figures:
    """What is there when nobody else is: a small request has come through, and all is told."""
    done = "requests_total", (("outcome", "ok"),)
    before = scrape(server).get(done, 0)
    assert call(server, body={"text": "12"}).status == 200
    time.sleep(2 * reporting.INTERVAL)  # what was counted before it is told with it
    return scraped(server, lambda f: f.get(done, 0) > before and idle(f))


def test_prometheus_reads_what_the_clients_were_told(server):
    before = settled(server)
    assert {(name, tuple(labels.items())) for name, labels in FROM_START} <= before.keys()
    usages, good = Counter(), 12
    for i in range(good):
        asked = {"text": ["12", "345"], "beam_size": 1 + i % 3, "stream": i % 4 == 0}
        reply = call(server, body=asked)
        assert reply.status == 200
        last = reply.body.decode().split("data: ")[-1] if asked["stream"] else reply.body
        usages.update(json.loads(last)["usage"])
    for _ in range(3):
        assert call(server, body={"text": "12", "beam_size": 0}).status == 400
    assert call(server, body={"text": "1" * 999}).status == 413
    assert call(server, f"{PREDICT}/1.0/elsewhere", {"text": "12"}).status == 404
    done = "requests_total", (("outcome", "ok"),)
    refused = "refusals_total", (("reason", "NotFound"),)
    after = scraped(
        server,
        lambda f: f[done] >= before[done] + good and f.get(refused, 0) > before.get(refused, 0),
    )

    def gained(name, **labels):
        key = name, tuple(labels.items())
        return after.get(key, 0) - before.get(key, 0)

    assert gained("requests_total", outcome="ok") == good
    for side in ("source", "target"):
        assert gained("tokens_total", side=side) == usages[f"{side}_tokens"]
    assert gained("refusals_total", reason="InvalidOption") == 3
    assert gained("refusals_total", reason="TextTooLong") == 1
    assert gained("refusals_total", reason="NotFound") == 1
    assert gained("cancellations_total") == 0
    assert gained("request_seconds_count") == gained("first_token_seconds_count") == good
    for name in ("request_seconds", "first_token_seconds", "step_seconds"):
        assert check_histogram(after, name) > 0
    assert after["row_capacity", ()] == 64
    scraped(server, idle)


def opened(server, body: dict):
    """A stream, of which the first part has come."""
    connection = connected(server.url)
    connection.request("POST", PREDICT, json.dumps({**body, "stream": True}).encode(), JSON)
    reply = connection.getresponse()
    assert reply.status == 200
    assert reply.getheader("Content-Type") == "text/event-stream"
    assert reply.peek(1)
    return connection, reply


def test_when_the_last_streaming_client_leaves_nothing_is_left(server):
    before = settled(server)
    gone = "cancellations_total", ()
    long = {"text": ["9" * 60] * 1024, "beam_size": 64, "min_length": 60}
    connection, _ = opened(server, long)
    scraped(server, lambda f: f["rows_in_use", ()] == 64)
    connection.close()
    scraped(server, idle)
    settled(server)  # the next call forgets what has left
    assert scraped(server, lambda f: f.get(gone, 0) > before.get(gone, 0))
