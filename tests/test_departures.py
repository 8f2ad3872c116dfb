"""Clients that have left, as the front tells it: read from its pipe, and their work ended."""

import json
import logging
import os

import pytest
from echo_service import answers, ask, left_nothing, service, texts

from handler.departures import _MOST, Departures


@pytest.fixture
def pipe(tmp_path):
    path = tmp_path / "left"
    os.mkfifo(path)
    front = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    departures = Departures.named({"SEQ2SERVE_LEFT": str(path)})
    yield front, departures
    os.close(front)
    os.close(departures.pipe)


def line(key: str, end: str = "CH") -> bytes:
    return json.dumps({"key": key, "end": end}).encode() + b"\n"


def test_a_request_that_was_left_is_told_once(pipe):
    front, departures = pipe
    assert departures.read() == []
    assert departures.arrived("k1", "r1", ())
    assert departures.arrived("k2", "r2", ())
    os.write(front, line("k1"))
    assert departures.read() == ["r1"]
    assert departures.read() == []


def test_one_that_left_before_it_came_is_known_when_it_comes(pipe):
    front, departures = pipe
    os.write(front, line("k1"))
    assert departures.read() == []
    assert not departures.arrived("k1", "r1", ())
    assert departures.arrived("k1", "r2", ())


def test_what_ended_well_or_never_came_here_is_nobody_s_departure(pipe):
    front, departures = pipe
    for key, end in (("k1", "--"), ("k2", "PR"), ("k3", "LR"), ("-", "CR"), ("k4", "")):
        os.write(front, line(key, end))
        assert departures.arrived(key, key, ())
    assert departures.read() == []
    assert departures.early == {}
    for key, end in (("k1", "CH"), ("k2", "CD"), ("k3", "sH"), ("k4", "SD")):
        os.write(front, line(key, end))
    assert departures.read() == ["k1", "k2", "k3", "k4"]


def test_a_line_that_comes_in_two_is_one_and_others_are_told_of(pipe, caplog):
    front, departures = pipe
    departures.arrived("k1", "r1", ())
    whole = line("k1")
    os.write(front, b'no json\n{"key": 1}\n[]\n' + whole[:9])
    with caplog.at_level(logging.WARNING):
        assert departures.read() == []
    assert len(caplog.records) == 3
    os.write(front, whole[9:])
    assert departures.read() == ["r1"]


def test_no_more_is_remembered_than_may_still_be_asked_for(pipe):
    front, departures = pipe
    for number in range(_MOST + 9):
        departures.arrived(f"k{number}", f"r{number}", {"r7"})
    assert len(departures.request_of) <= _MOST
    assert departures.request_of["k7"] == "r7"
    for number in range(_MOST + 9):
        os.write(front, line(f"early{number}"))
        departures.read()
    assert len(departures.early) == _MOST
    assert "early8" not in departures.early
    assert f"early{_MOST}" in departures.early


def test_without_a_front_nobody_is_said_to_leave():
    departures = Departures.named({})
    assert departures.arrived("", "r1", ())
    assert departures.read() == []


# The service


@pytest.mark.parametrize("more", [{}, {"stream": True}])
def test_the_work_of_a_client_that_left_ends_and_others_go_on(more):
    one = service(rows=2)
    left, stays = ask(1, ["abc"] * 6, length=50, **more), ask(2, "bcd", length=3)
    for _ in range(3):
        one.round([left, stays])
    one.leave("1")
    before = one.engine.model.rows_computed
    assert one.engine.rows_in_use <= 1
    (reply, *_) = one.round([left, stays])
    assert (reply.status, reply.kind) == ((408, "whole") if not more else (200, "last"))
    assert texts(answers(one, [stays])["2"]) == ["bbb"]
    assert one.engine.model.rows_computed - before <= 4
    assert left_nothing(one)
    assert one.metrics._counts["cancellations_total", (), ()] == 1


def test_whoever_is_not_known_leaves_without_a_trace():
    one = service()
    one.leave("nobody")
    assert left_nothing(one)
    assert texts(answers(one, [ask(1, "a")])["1"]) == ["aa"]
