"""The batches that training sees token pairs in."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from model import SpecialTokens
from training.tokens import TokenPairs

JITTER = 1.0  # tokens; enough to mix the batches of one epoch with the next


class BatchSampler:
    """Cuts the pairs of each epoch into batches of similar lengths.

    A batch of N pairs satisfies N <= batch_sentences and N*T <= batch_tokens, where T is the
    longest target length in it, EOS included: padding is counted, the source is not. A single
    pair with more than batch_tokens is a batch of its own.
    """

    def __init__(
        self, pairs: TokenPairs, batch_tokens: int, batch_sentences: int, seed: int
    ) -> None:
        self.source_lengths = pairs.source_lengths()
        self.target_lengths = pairs.target_lengths()
        self.batch_tokens = batch_tokens
        self.batch_sentences = batch_sentences
        self.seed = seed

    def batches(self, epoch: int) -> list[Tensor]:
        """The batches of `epoch`, each an int64 tensor [N] of indices; every pair is in one.

        Depends on nothing but the pairs, the limits, the seed and the epoch, so a run that is
        resumed skips the batches it has done.
        """
        generator = torch.Generator().manual_seed(mixed(self.seed, epoch))
        order = self.order(generator)  # [all pairs]
        parts = torch.split(order, self.sizes(self.target_lengths[order].tolist()))
        return [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]

    def order(self, generator: torch.Generator) -> Tensor:
        """All indices by source, then target length, both blurred so that no two epochs agree."""
        noise = torch.rand(2, len(self.source_lengths), generator=generator) * (1 + JITTER)
        source = (self.source_lengths + noise[0]).floor()
        target = self.target_lengths + noise[1]
        by_target = target.argsort(stable=True)
        return by_target[source[by_target].argsort(stable=True)]

    def sizes(self, lengths: list[int]) -> list[int]:
        """Pairs of each batch, when pairs with these target lengths come in this order."""
        sizes: list[int] = []
        count = longest = 0
        for length in lengths:
            longest = max(longest, length)
            full = count == self.batch_sentences or (count + 1) * longest > self.batch_tokens
            if count and full:
                sizes.append(count)
                count, longest = 0, length
            count += 1
        return [*sizes, count] if count else sizes


def mixed(*numbers: int) -> int:
    """32 bits that depend on all numbers: a torch generator ignores the rest of its seed."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big")


class Batch(NamedTuple):
    """N pairs as the network reads them, padded."""

    source: Tensor  # int64 [N, S], each ending with EOS
    source_lengths: Tensor  # int64 [N]
    target_in: Tensor  # int64 [N, T], each beginning with BOS
    target_out: Tensor  # int64 [N, T], each ending with EOS
    target_lengths: Tensor  # int64 [N], of target_in and of target_out


def collate(pairs: TokenPairs, indices: Tensor, special: SpecialTokens) -> Batch:
    """The pairs at `indices`, int64 [N] with N at least 1."""
    source, source_lengths = padded(pairs.source_tokens, pairs.source_offsets, indices, special)
    body, lengths = padded(
        pairs.target_tokens, pairs.target_offsets, indices, special, extra=1
    )  # [N, T], the last column all padding
    target_in = torch.cat([torch.full_like(body[:, :1], special.bos), body[:, :-1]], 1)
    target_out = body.scatter(1, lengths.unsqueeze(1), special.eos)
    return Batch(source, source_lengths, target_in, target_out, lengths + 1)


def padded(
    tokens: Tensor, offsets: Tensor, indices: Tensor, special: SpecialTokens, extra: int = 0
) -> tuple[Tensor, Tensor]:
    """The rows at `indices`, int64 [N, longest + extra], and their lengths, int64 [N]."""
    starts = offsets[indices]
    lengths = offsets[indices + 1] - starts
    place = torch.arange(int(lengths.max()) + extra)
    inside = place < lengths.unsqueeze(1)
    rows = torch.full(inside.shape, special.pad)
    rows[inside] = tokens[(starts.unsqueeze(1) + place)[inside]].long()
    return rows, lengths
