"""Batches: every pair once an epoch, limits kept, a pure function of seed and epoch."""

import hashlib

import torch
from hypothesis import given
from hypothesis import strategies as st

from model import SpecialTokens
from training.batches import BatchSampler, collate
from training.tokens import TokenPairs

SPECIAL = SpecialTokens()
THREE = [([5, 6], [7]), ([8], [9, 10, 11]), ([], [])]

ids = st.lists(st.integers(4, 99), max_size=12)
pair_lists = st.lists(st.tuples(ids, ids), max_size=60)


def test_a_batch_is_padded_on_the_right() -> None:
    batch = collate(TokenPairs.of(THREE, SPECIAL), torch.tensor([1, 0]), SPECIAL)
    assert batch.source.tolist() == [[8, 3, 0], [5, 6, 3]]
    assert batch.source_lengths.tolist() == [2, 3]
    assert batch.target_in.tolist() == [[2, 9, 10, 11], [2, 7, 0, 0]]
    assert batch.target_out.tolist() == [[9, 10, 11, 3], [7, 3, 0, 0]]
    assert batch.target_lengths.tolist() == [4, 2]
    assert all(t.dtype == torch.int64 for t in batch)


def test_pairs_without_a_token_can_be_collated() -> None:
    batch = collate(TokenPairs.of([([], [])], SPECIAL), torch.tensor([0]), SPECIAL)
    assert [t.tolist() for t in batch] == [[[3]], [1], [[2]], [[3]], [1]]


@given(
    pair_lists, st.integers(1, 60), st.integers(1, 9), st.integers(0, 2**31 - 1), st.integers(0, 99)
)
def test_every_pair_comes_once_within_the_limits(
    content: list[tuple[list[int], list[int]]], tokens: int, sentences: int, seed: int, epoch: int
) -> None:
    pairs = TokenPairs.of(content, SPECIAL)
    batches = BatchSampler(pairs, tokens, sentences, seed).batches(epoch)
    assert sorted(i for batch in batches for i in batch.tolist()) == list(range(len(content)))
    for indices in batches:
        batch = collate(pairs, indices, SPECIAL)
        n, t = batch.target_out.shape
        assert 1 <= n <= sentences
        assert n * t <= tokens or n == 1
        for row, i in enumerate(indices.tolist()):
            source, target = content[i]
            padding = batch.source.size(1) - len(source) - 1
            assert batch.source[row].tolist() == [*source, 3] + [0] * padding
            padding = t - len(target) - 1
            assert batch.target_in[row].tolist() == [2, *target] + [0] * padding
            assert batch.target_out[row].tolist() == [*target, 3] + [0] * padding
            assert batch.source_lengths[row] == len(source) + 1
            assert batch.target_lengths[row] == len(target) + 1


def many(count: int = 5000) -> TokenPairs:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (2, count), generator=generator).tolist()
    return TokenPairs.of((([5] * s, [6] * t) for s, t in zip(*lengths)), SPECIAL)


def test_batches_are_a_function_of_seed_and_epoch() -> None:
    pairs = many()

    def planned(seed: int, epoch: int) -> list[list[int]]:
        return [batch.tolist() for batch in BatchSampler(pairs, 512, 64, seed).batches(epoch)]

    torch.manual_seed(1)
    first = planned(1, 2)
    torch.manual_seed(2)
    assert planned(1, 2) == first
    assert planned(1, 3) != first
    assert planned(2, 2) != first
    assert planned(2, 1) != first
    mates = {frozenset(batch) for batch in first} & {frozenset(b) for b in planned(1, 3)}
    assert len(mates) < len(first) / 20


def test_the_batches_of_a_seed_are_these() -> None:
    batches = BatchSampler(many(), 512, 64, 1).batches(2)
    content = repr([batch.tolist() for batch in batches]).encode()
    assert hashlib.sha256(content).hexdigest()[:16] == "95b1274314c24b5a"


def test_batches_waste_little_and_come_in_no_order() -> None:
    pairs = many()
    batches = BatchSampler(pairs, 1024, 64, 1).batches(0)
    lengths = pairs.source_lengths()
    padded = sum(len(b) * int(lengths[b].max()) for b in batches)
    assert int(lengths.sum()) / padded > 0.9
    means = torch.stack([lengths[b].double().mean() for b in batches])
    places = torch.arange(len(means)).double()
    assert abs(float(torch.corrcoef(torch.stack([means, places]))[0, 1])) < 0.3


def test_a_pair_longer_than_a_batch_is_one() -> None:
    pairs = TokenPairs.of([([5] * 9, [6] * 50), ([5], [6]), ([5], [6])], SPECIAL)
    batches = BatchSampler(pairs, 8, 8, 0).batches(0)
    assert sorted(sorted(b.tolist()) for b in batches) == [[0], [1, 2]]
