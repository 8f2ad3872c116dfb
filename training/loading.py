"""Batches made ready while the network learns from those before."""

import queue
import threading
from collections.abc import Generator, Iterator, Sequence

import sentencepiece
import torch
from torch import Tensor

from handler.tokenizer import Tokenizer
from model import SpecialTokens
from training.batches import Batch, BatchSampler, collate, mixed
from training.tokens import TokenPairs

WHOLE = 1024  # most pairs of a batch that is only scored
AHEAD = 4  # updates whose batches wait ready


class Loader:
    """Collates batches of pairs in a thread of its own, and samples their subwords.

    Args:
        tokenizers: of source and target.
        sampling: see `TrainingOptions.subword_sampling`; 0 leaves the pairs as they are. Sampled
            batches are as large in sentences as planned, and a little longer in tokens.
    """

    def __init__(
        self,
        pairs: TokenPairs,
        tokenizers: tuple[Tokenizer, Tokenizer],
        device: torch.device,
        sampling: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.pairs, self.tokenizers, self.device = pairs, tokenizers, device
        self.sampling, self.seed = sampling, seed

    def batch(self, index: Tensor) -> Batch:
        """The pairs at `index` as they are."""
        return self.on_device(collate(self.pairs, index, SpecialTokens()))

    def every(self, batch_tokens: int) -> Iterator[Batch]:
        """All pairs as they are, in the same batches at every call: for a score of the whole."""
        sampler = BatchSampler(self.pairs, batch_tokens, WHOLE, seed=0)
        return (self.batch(index) for index in sampler.batches(0))

    def sampled(self, index: Tensor, seed: int) -> Batch:
        """The pairs at `index`, with subwords sampled anew; equal seeds give equal batches."""
        if self.sampling == 0.0:
            return self.batch(index)
        sentencepiece.set_random_generator_seed(seed)
        eos = SpecialTokens().eos
        texts: list[tuple[list[int], list[int]]] = []
        for i in index.tolist():
            ids = [one for one in self.pairs.source(i) if one != eos]
            texts.append((self.resampled(0, ids), self.resampled(1, self.pairs.target(i))))
        pairs = TokenPairs.of(texts, SpecialTokens())
        return self.on_device(collate(pairs, torch.arange(len(pairs)), SpecialTokens()))

    def resampled(self, side: int, ids: list[int]) -> list[int]:
        """Other pieces of the same text."""
        return self.tokenizers[side].sample(ids, self.sampling)

    def on_device(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        return Batch(*(t.pin_memory().to(self.device, non_blocking=True) for t in batch))

    def updates(
        self, plan: Sequence[Sequence[tuple[int, Tensor]]], epoch: int
    ) -> Generator[list[Batch], None, None]:
        """The batches of each update of `plan`, which gives of each batch its number in the epoch
        and the indices of its pairs. The thread ends where the generator is closed."""
        ready: queue.Queue[list[Batch] | Exception] = queue.Queue(AHEAD)
        left = threading.Event()

        def hand(item: list[Batch] | Exception) -> bool:
            while not left.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def load() -> None:
            try:
                for update in plan:
                    made = [
                        self.sampled(index, mixed(self.seed, epoch, number))
                        for number, index in update
                    ]
                    if not hand(made):
                        return
            except Exception as error:
                hand(error)

        thread = threading.Thread(target=load, name="loader", daemon=True)
        thread.start()
        try:
            for _ in plan:
                made = ready.get()
                if isinstance(made, Exception):
                    raise made
                yield made
        finally:
            left.set()
            thread.join()
