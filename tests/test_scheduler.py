"""Turns, rows, deadlines and cancellation, with no tensor anywhere: what a scheduler plans, and
what it makes of what a runner reports."""

import subprocess
import sys
from itertools import count

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from handler.decoding.options import DecodingOptions
from handler.decoding.scheduler import ENCODED_AHEAD, Report, Scheduler
from handler.decoding.sentence import Event, Result, Sentence
from handler.decoding.turns import BULK, TURN, Caller, Queue, Status, Ticket, Turns

IDS = count()
ANSWER = [Result([7], "eos", None, None)]


def sentence(rows=1):
    return Sentence(next(IDS), [9, 3], DecodingOptions(beam_size=rows), 20)


def ticket(caller=Caller(), bulk=False, behind=0, rows=1):
    return Ticket(sentence(rows), caller, bulk, behind)


def names(queue, number):
    """Who is next, `number` times."""
    return [queue.take().caller.name for _ in range(number)]


def test_a_scheduler_needs_no_torch():
    """Nor do what it imports, and what it hands over."""
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "import importlib.util as u, types\n"
        "package = types.ModuleType('handler.decoding'); package.__path__ = ['handler/decoding']\n"
        "sys.modules['handler.decoding'] = package\n"
        "import handler.decoding.scheduler as s\n"
        "s.Scheduler(4).plan(0.0, True)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


# Turns


def test_callers_have_turns_in_proportion_to_their_shares():
    queue, one, two = Turns(), Caller("one"), Caller("two", share=3.0)
    for _ in range(40):
        queue.add(ticket(one))
        queue.add(ticket(two))
    first = names(queue, 40)
    assert first.count("one") == pytest.approx(10, abs=1)
    assert max(first.index("one"), first.index("two")) <= 3


def test_a_turn_counts_by_its_rows():
    queue, wide, narrow = Turns(), Caller("wide"), Caller("narrow")
    for _ in range(40):
        queue.add(ticket(wide, rows=4))
        queue.add(ticket(narrow))
    assert names(queue, 40).count("wide") == pytest.approx(8, abs=1)


def test_who_was_away_has_saved_up_nothing():
    queue, busy, late = Turns(), Caller("busy"), Caller("late")
    queue.add(ticket(late))
    for _ in range(60):
        queue.add(ticket(busy))
    names(queue, 31)
    for _ in range(30):
        queue.add(ticket(late))
    assert names(queue, 20).count("busy") == pytest.approx(10, abs=1)


def test_requests_of_one_caller_take_turns():
    """Of another request that comes later, a sentence goes before the `TURN`th of the first."""
    queue = Turns()
    many = [ticket(behind=k) for k in range(20)]
    for one in many:
        queue.add(one)
    assert [queue.take() for _ in range(2)] == many[:2]
    late = ticket()
    queue.add(late)
    order = [queue.take() for _ in range(19)]
    assert order.index(late) <= TURN
    assert [one for one in order if one is not late] == many[2:]


def test_bulk_waits_and_does_not_starve():
    queue = Queue()
    for _ in range(4):
        queue.add(ticket(Caller("bulk"), bulk=True))
    for _ in range(4 * BULK):
        queue.add(ticket(Caller("live")))
    order = names(queue, 4 * BULK + 4)
    assert [i for i, name in enumerate(order) if name == "bulk"] == [
        BULK + i * (BULK + 1) for i in range(4)
    ]
    assert queue.take() is None


def test_who_was_cancelled_is_skipped():
    queue = Queue()
    gone, kept = ticket(), ticket()
    queue.add(gone)
    queue.add(kept)
    gone.status = Status.ENDED
    assert queue.take() is kept
    assert queue.take() is None


# Plans


def entered(scheduler, *rows, **options):
    """Sentences that have rows."""
    them = [sentence(each) for each in rows]
    for one in them:
        scheduler.admit(one, **options)
    plan, _ = scheduler.plan(0.0, fresh=True)
    assert plan.enter == [one.id for one in them]
    return them


def test_sentences_are_encoded_together_and_enter_as_rows_become_free():
    scheduler = Scheduler(4)
    them = [sentence() for _ in range(30)]
    for one in them:
        scheduler.admit(one)
    plan, _ = scheduler.plan(0.0, fresh=True)
    assert plan.encode == them[:ENCODED_AHEAD]
    assert plan.enter == [one.id for one in them[:4]]
    scheduler.settle(Report(events=[Event(them[1].id, ANSWER)]))
    plan, _ = scheduler.plan(0.0, fresh=False)
    assert (plan.encode, plan.enter) == ([], [them[4].id])
    assert (scheduler.rows_in_use, scheduler.live_count, scheduler.waiting_count) == (4, 4, 25)


@pytest.mark.parametrize(("capacity", "together"), [(64, 5), (256, 17)])
def test_long_sentences_are_encoded_a_few_at_a_time(capacity, together):
    """Nobody decodes meanwhile: 1,024 tokens and the rest of a sentence, or 16 a row."""
    scheduler = Scheduler(capacity)
    for _ in range(50):
        scheduler.admit(Sentence(next(IDS), [9] * 249 + [3], DecodingOptions(), 20))
    plan, _ = scheduler.plan(0.0, fresh=True)
    assert len(plan.encode) == together
    assert len(plan.enter) == together
    assert len(scheduler.plan(0.0, fresh=False)[0].encode) == together  # rows are free still


def test_few_newcomers_wait_for_the_next_call_where_rows_are_busy():
    scheduler = Scheduler(16)
    entered(scheduler, *[1] * 15)
    late = sentence()
    scheduler.admit(late)
    assert scheduler.plan(0.0, fresh=False)[0].encode == []
    assert scheduler.plan(0.0, fresh=True)[0].encode == [late]


def test_a_wide_beam_is_not_overtaken():
    scheduler = Scheduler(4)
    entered(scheduler, 2)
    wide, narrow = sentence(4), sentence()
    for one in (wide, narrow):
        scheduler.admit(one)
    plan, _ = scheduler.plan(0.0, fresh=True)
    assert (plan.encode, plan.enter) == ([wide, narrow], [])


def test_cancelled_rows_are_free_and_the_runner_forgets_them_first():
    scheduler = Scheduler(2)
    one, two = entered(scheduler, 1, 1)
    waiting = sentence(2)
    scheduler.admit(waiting)
    for each in (one, two):
        assert scheduler.cancel(each.id)
    assert not scheduler.cancel(one.id)
    assert scheduler.rows_in_use == 0
    plan, _ = scheduler.plan(0.0, fresh=True)
    assert (plan.drop, plan.enter) == ([one.id, two.id], [waiting.id])
    late = scheduler.settle(Report(events=[Event(one.id, ANSWER)]))  # told after all
    assert late == []


def test_a_deadline_ends_who_waits_at_once_and_asks_for_what_others_have():
    scheduler = Scheduler(1)
    (live,) = entered(scheduler, 1, deadline=2.0)
    waiting = sentence()
    scheduler.admit(waiting, deadline=1.0)
    assert scheduler.next_deadline == 1.0
    plan, events = scheduler.plan(1.0, fresh=True)
    assert ([e.sentence for e in events], plan.expire) == ([waiting.id], [])
    assert events[0].results[0].finish_reason == "time"
    assert scheduler.next_deadline == 2.0
    follower = sentence()
    scheduler.admit(follower)
    plan, events = scheduler.plan(2.0, fresh=True)
    assert (plan.expire, plan.enter, events) == ([live.id], [follower.id], [])
    (told,) = scheduler.settle(Report(events=[Event(live.id, ANSWER)]))
    assert told.sentence == live.id


def test_waiting_sentences_are_counted_by_caller():
    scheduler = Scheduler(1)
    entered(scheduler, 1, caller=Caller("a"))
    waiting = [sentence() for _ in range(3)]
    for one in waiting:
        scheduler.admit(one, Caller("a"))
    assert scheduler.waiting_of == {"a": 3}
    scheduler.cancel(waiting[0].id)
    assert scheduler.waiting_of == {"a": 2}
    for one in list(scheduler.tickets):
        scheduler.cancel(one)
    assert (dict(scheduler.waiting_of), scheduler.rows_in_use, scheduler.idle) == ({}, 0, True)


def test_who_was_cancelled_is_not_held_for_ever():
    """One that is live and has an early deadline, beside clients that come and leave."""
    scheduler = Scheduler(1)
    entered(scheduler, 1, deadline=5.0)
    for _ in range(40):
        crowd = [sentence() for _ in range(500)]
        for behind, one in enumerate(crowd):
            scheduler.admit(one, behind=behind, deadline=3600.0)
        for one in crowd:
            scheduler.cancel(one.id)
    assert scheduler.queue.size <= 2000
    assert sum(len(line.waiting) for line in scheduler.queue.interactive.lines.values()) <= 2000
    assert len(scheduler.deadlines) <= 4000


@settings(max_examples=60)
@given(st.data())
def test_every_sentence_ends_once_and_counts_add_up(data):
    """Whatever is admitted, cancelled, late, or told twice by a runner."""
    scheduler, clock, ended, admitted = Scheduler(5), 0.0, [], []
    for _ in range(data.draw(st.integers(1, 40))):
        what = data.draw(st.sampled_from(["admit", "admit", "cancel", "plan", "report"]))
        if what == "admit":
            one = sentence(data.draw(st.integers(1, 5)))
            deadline = clock + data.draw(st.sampled_from([0.0, 2.0, float("inf")]))
            scheduler.admit(one, Caller(data.draw(st.sampled_from("ab"))), bool(one.id % 2),
                            deadline=deadline)  # fmt: skip
            admitted.append(one.id)
        elif what == "cancel" and admitted:
            victim = data.draw(st.sampled_from(admitted))
            if scheduler.cancel(victim):
                ended.append(victim)
        elif what == "plan":
            clock += 1.0
            plan, events = scheduler.plan(clock, fresh=data.draw(st.booleans()))
            ended += [event.sentence for event in events]
            told = [Event(one, ANSWER) for one in plan.expire]
            ended += [event.sentence for event in scheduler.settle(Report(events=told))]
        elif admitted:
            some = data.draw(st.lists(st.sampled_from(admitted), max_size=4))
            running = [i for i in some if i in scheduler.tickets
                       and scheduler.tickets[i].status is Status.RUNNING]  # fmt: skip
            told = [Event(one, ANSWER) for one in running + running]
            ended += [event.sentence for event in scheduler.settle(Report(events=told))]
        live = [t for t in scheduler.tickets.values() if t.status is Status.RUNNING]
        assert scheduler.rows_in_use == sum(t.sentence.rows for t in live) <= 5
        assert scheduler.live_count == len(live)
        assert scheduler.waiting_count == sum(scheduler.waiting_of.values())
        assert scheduler.waiting_count == len(scheduler.tickets) - len(live)
    assert len(ended) == len(set(ended))
    assert set(ended) | set(scheduler.tickets) == set(admitted)
