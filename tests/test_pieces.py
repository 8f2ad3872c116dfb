"""Work in turns: who has the next one, for how long, and what is left of work that is dropped."""

import pytest

from handler.pieces import SLICE, Pieces, at_once


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Desk:
    """Works whose pieces take a fifth of a turn each. done: a letter for each piece, in order."""

    def __init__(self):
        self.clock = Clock()
        self.pieces = Pieces(self.clock)
        self.done = ""
        self.closed = ""

    def add(self, name, count):
        self.pieces.add(name, self.work(name, count))

    def work(self, name, count):
        try:
            for _ in range(count):
                self.done += name
                self.clock.now += SLICE / 4.99
                yield
        finally:
            self.closed += name

    def advance(self, new, old):
        """What is done in the time of so many turns."""
        now = self.clock.now
        self.done = ""
        self.pieces.advance(now + new * SLICE, now + old * SLICE)
        return self.done


def test_what_needs_one_turn_is_done_in_the_order_in_which_it_came():
    desk = Desk()
    for name in "abc":
        desk.add(name, 2)
    assert desk.advance(9, 0) == "aabbcc"
    assert not desk.pieces
    assert desk.closed == "abc"


def test_what_is_new_waits_for_one_turn_of_the_old_and_the_old_for_its_own():
    desk = Desk()
    desk.add("A", 25)
    desk.add("B", 25)
    assert desk.advance(1.5, 0) == "AAAAABBBBB"
    for name in "abc":
        desk.add(name, 1)
    assert desk.advance(9, 1.8) == "AAAAAabcBBBBB"  # A's turn and the three took less than two
    assert desk.advance(9, 0) == "AAAAA"
    assert desk.advance(9, 2.5) == "BBBBBAAAAABBBBB"


def test_nothing_that_is_old_starves_while_new_work_comes_without_end():
    desk = Desk()
    desk.add("A", 25)
    desk.advance(1, 1)
    rounds = 0
    while "A" not in desk.closed:
        for name in "abcdefgh":
            desk.add(name, 4)
        desk.advance(4, 1)
        rounds += 1
    assert rounds == 5  # of the four turns that are left, and one that finds no more


def test_there_is_always_a_turn_of_the_old():
    desk = Desk()
    desk.add("A", 12)
    desk.advance(1, 1)
    assert desk.advance(0, 0) == "AAAAA"
    assert desk.advance(-5, -5) == "AA"
    assert not desk.pieces


@pytest.mark.parametrize("turns", [0, 1])
def test_what_is_dropped_is_closed_and_never_goes_on(turns):
    desk = Desk()
    desk.add("A", 25)
    desk.add("B", 5)
    if turns:
        desk.advance(1, 0)
    desk.pieces.drop("A")
    desk.pieces.drop("nobody")
    assert desk.closed == ("A" if turns else "")  # a generator that has not begun has no end
    assert "A" not in desk.advance(9, 9)
    assert not desk.pieces


def test_a_work_may_drop_itself_and_others():
    desk = Desk()

    def work():
        desk.pieces.drop("self")
        desk.pieces.drop("B")
        yield

    desk.add("B", 5)
    desk.advance(0.5, 0)
    desk.pieces.add("self", work())
    desk.pieces.turn(desk.pieces.new)
    assert not desk.pieces.new


def test_what_nobody_waits_beside_is_done_at_once():
    def work():
        yield
        yield
        return 7

    assert at_once(work()) == 7
