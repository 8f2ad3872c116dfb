"""Batches made ahead: those of the plan, in its order, whatever the thread that makes them."""

import gc
import threading
import time
import weakref
from collections.abc import Sequence

import pytest
import torch
from tiny_run import Tiny, assert_equal, signal_at
from torch import Tensor

from handler.tokenizer import Tokenizer
from model import SpecialTokens
from training.batches import Batch, collate, mixed
from training.loading import AHEAD, Loader
from training.signals import Interrupted
from training.tokens import TokenPairs
from training.train import tokenizers

SPECIAL = SpecialTokens()
Plan = list[list[tuple[int, Tensor]]]


@pytest.fixture(scope="module")
def both(prepared: Tiny) -> tuple[Tokenizer, Tokenizer]:
    return tokenizers(prepared.run)


@pytest.fixture(scope="module")
def pairs(prepared: Tiny) -> TokenPairs:
    return TokenPairs.load(prepared.run.data / "train.tokens")


def loader(pairs: TokenPairs, both: tuple[Tokenizer, Tokenizer], sampling: float) -> Loader:
    return Loader(pairs, both, torch.device("cpu"), sampling, seed=5)


def plan_of(*updates: Sequence[int], size: int = 6) -> Plan:
    """Batch number n has the pairs 2n to 2n + size - 1."""
    return [[(n, torch.arange(2 * n, 2 * n + size)) for n in update] for update in updates]


def texts(rows: Tensor, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(row) for row in rows.tolist()]


def loaders() -> int:
    return sum(thread.name == "loader" for thread in threading.enumerate())


def test_without_sampling_batches_are_the_pairs_as_they_are(
    pairs: TokenPairs, both: tuple[Tokenizer, Tokenizer]
) -> None:
    index = torch.tensor([5, 0, 17])
    expected = list(collate(pairs, index, SPECIAL))
    assert_equal(list(loader(pairs, both, 0.0).sampled(index, 1)), expected)
    assert_equal(list(loader(pairs, both, 0.3).batch(index)), expected)


def test_sampled_subwords_are_the_same_text(
    pairs: TokenPairs, both: tuple[Tokenizer, Tokenizer]
) -> None:
    index = torch.arange(40)
    stored = collate(pairs, index, SPECIAL)
    sampled = loader(pairs, both, 0.3).sampled(index, 1)
    assert int(sampled.source_lengths.sum()) > int(stored.source_lengths.sum())
    assert not torch.equal(sampled.target_lengths, stored.target_lengths)
    for side, tokenizer in zip(("source", "target_out"), both):
        told = texts(getattr(stored, side), tokenizer)
        assert len(set(told)) == 40
        assert texts(getattr(sampled, side), tokenizer) == told
    for row, length in zip(sampled.source.tolist(), sampled.source_lengths.tolist()):
        assert row.index(3) == length - 1  # EOS once, at the end
    assert torch.equal(sampled.target_in[:, 1:][sampled.target_in[:, 1:] != 0],
                       sampled.target_out[(sampled.target_out != 0) & (sampled.target_out != 3)])


def test_equal_seeds_give_equal_batches(
    pairs: TokenPairs, both: tuple[Tokenizer, Tokenizer]
) -> None:
    one, other = loader(pairs, both, 0.3), loader(pairs, both, 0.3)
    index = torch.arange(20)
    first = one.sampled(index, 1)
    different = one.sampled(index, 2)
    assert_equal(list(other.sampled(index, 1)), list(first))
    assert texts(different.source, both[0]) == texts(first.source, both[0])
    assert not torch.equal(different.source_lengths, first.source_lengths)


def test_the_order_is_that_of_the_plan(
    pairs: TokenPairs, both: tuple[Tokenizer, Tokenizer]
) -> None:
    plan = plan_of([4, 1], [9], [], [0, 3, 2])
    made = list(loader(pairs, both, 0.0).updates(plan, 0))
    assert [len(update) for update in made] == [2, 1, 0, 3]
    for update, batches in zip(plan, made):
        for (_, index), batch in zip(update, batches):
            assert_equal(list(batch), list(collate(pairs, index, SPECIAL)))
    assert loaders() == 0


def test_samples_depend_on_epoch_and_number_alone(
    pairs: TokenPairs, both: tuple[Tokenizer, Tokenizer]
) -> None:
    """And so not on where an epoch was gone on with, or on which process has the batch."""
    plan = plan_of(*([n] for n in range(12)), size=20)
    whole = [batch for update in loader(pairs, both, 0.3).updates(plan, 1) for batch in update]
    rest = list(loader(pairs, both, 0.3).updates(plan[7:], 1))
    for batch, [again] in zip(whole[7:], rest, strict=True):
        assert_equal(list(again), list(batch))
    alone = loader(pairs, both, 0.3).sampled(plan[3][0][1], mixed(5, 1, 3))
    assert_equal(list(alone), list(whole[3]))
    [other] = next(loader(pairs, both, 0.3).updates(plan, 2))
    assert texts(other.source, both[0]) == texts(whole[0].source, both[0])
    assert not torch.equal(other.source_lengths, whole[0].source_lengths)


def test_an_error_in_the_thread_reaches_the_caller(
    pairs: TokenPairs, both: tuple[Tokenizer, Tokenizer]
) -> None:
    plan = plan_of([0], [1], [10**6], [2])
    updates = loader(pairs, both, 0.0).updates(plan, 0)
    assert len([next(updates), next(updates)]) == 2
    with pytest.raises(IndexError):
        next(updates)
    assert loaders() == 0


def test_leaving_early_ends_the_thread(
    pairs: TokenPairs, both: tuple[Tokenizer, Tokenizer]
) -> None:
    updates = loader(pairs, both, 0.0).updates(plan_of(*([n] for n in range(50))), 0)
    next(updates)
    assert loaders() == 1
    updates.close()
    assert loaders() == 0


@pytest.mark.usefixtures("one_thread")
def test_a_stopped_training_leaves_no_thread(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    signal_at(monkeypatch, lambda step: step == 2)
    with pytest.raises(Interrupted) as stopped:
        tiny.train()
    assert stopped.traceback  # its frames are still there
    assert loaders() == 0


def test_few_batches_are_in_memory(
    pairs: TokenPairs, both: tuple[Tokenizer, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    made = 0
    batch_of = Loader.batch

    def counted(self: Loader, index: Tensor) -> Batch:
        nonlocal made
        batch = batch_of(self, index)
        alive.add(batch.source)
        made += 1
        return batch

    monkeypatch.setattr(Loader, "batch", counted)
    updates = loader(pairs, both, 0.0).updates(plan_of(*([n] for n in range(30))), 0)
    most = 0
    for done, _ in enumerate(updates, 1):
        while made < min(30, done + AHEAD + 1):
            time.sleep(0.001)  # until the thread is as far ahead as it may be
        time.sleep(0.005)
        assert made <= done + AHEAD + 1
        most = max(most, len(alive))
    del _
    assert AHEAD < most <= AHEAD + 2  # waiting, one that finds no place, one in use
    del updates
    gc.collect()
    assert len(alive) == 0
