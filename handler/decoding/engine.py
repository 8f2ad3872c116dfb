"""Continuous batching of a recurrent decoder.

A hypothesis of a recurrent model is one row of state of a fixed size, so sentences join and leave
the running batch at every step, and none depends on its neighbours. A `Scheduler` decides which
sentence has rows, a runner computes; this is what drives both.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from handler.decoding.cuda_runner import CudaOptions, CudaRunner
from handler.decoding.model import SourceLengthError
from handler.decoding.options import DecodingOptions
from handler.decoding.runner import Runner
from handler.decoding.scheduler import Scheduler
from handler.decoding.sentence import Event, Sentence
from handler.decoding.turns import Caller

STEPS = 16  # that a caller asks for in one call of `advance`


class Engine:
    """Decodes sentences that come and go.

    Args:
        model: see `SequenceModel`.
        rows: most hypotheses that are live at once; further sentences wait, a wide beam until all
            its rows are free. See `largest_memory`.
        device: where the model is.
        clock: seconds, for deadlines.
        cuda: how it decodes on a GPU.

    Not thread-safe: one thread calls it.
    """

    def __init__(
        self,
        model: Any,
        rows: int,
        device: torch.device = torch.device("cpu"),
        clock: Callable[[], float] = time.monotonic,
        cuda: CudaOptions = CudaOptions(),
    ) -> None:
        self.cuda = cuda
        self.model = model
        self.capacity = rows
        self.device = device
        self.clock = clock
        self.ids = itertools.count()
        self.steps = 0  # that have been made
        self.scheduler = Scheduler(rows)
        self.runner = self.new_runner()

    def new_runner(self) -> Runner:
        """For the device."""
        if self.device.type == "cuda":
            return CudaRunner(self.model, self.device, self.clock, self.capacity, self.cuda)
        return Runner(self.model, self.device, self.clock)

    def admit(
        self,
        source: Sequence[int],
        options: DecodingOptions,
        prefix: Sequence[int] = (),
        deadline: float | None = None,
        behind: int = 0,
        caller: Caller = Caller(),
        bulk: bool = False,
    ) -> int:
        """Queue a sentence.

        Args:
            source: ids of the source tokens, EOS included.
            prefix: ids that the translation begins with.
            deadline: on the engine's clock; what there is then is answered.
            behind: how many sentences of the same request are before this one.
            caller, bulk: whose turn it takes, see `turns`.

        Returns:
            The sentence's id, named by the event that ends it.

        Raises:
            SourceLengthError: a source that is empty or longer than the model reads.
            ValueError: options that this engine or model cannot fulfil.
        """
        most = self.check(source, options, len(prefix))
        sentence = Sentence(next(self.ids), source, options, most, prefix)
        due = math.inf if deadline is None else deadline
        self.scheduler.admit(sentence, caller, bulk, behind, due)
        return sentence.id

    def check(self, source: Sequence[int], options: DecodingOptions, prefix_length: int = 0) -> int:
        """The most target tokens that a sentence will have; see `admit` for what is raised."""
        limit, longest = self.model.max_source_length, self.model.max_target_length
        if not 1 <= len(source) <= limit:
            raise SourceLengthError(
                f"{len(source)} tokens; the model reads from 1 to {limit}, its end mark included"
            )
        if options.beam_size > self.capacity:
            raise ValueError(
                f"beam_size: got {options.beam_size}; allowed here: at most {self.capacity}"
            )
        if options.min_length > longest:
            raise ValueError(
                f"min_length: got {options.min_length}; allowed by this model: at most {longest}"
            )
        for name in ("coverage_penalty", "return_alignments"):
            if getattr(options, name) and not self.model.has_attention:
                raise ValueError(
                    f"{name}: got {getattr(options, name)}; allowed by this model, which has no "
                    "attention: only the default"
                )
        asked = options.max_length
        if asked is None:
            asked = max(3 * len(source) + 10, options.min_length, prefix_length)
        most = min(asked, longest)
        if prefix_length > most:
            raise ValueError(
                f"prefix: got {prefix_length} tokens; allowed: at most max_length, {most}"
            )
        return most

    @torch.inference_mode()
    def cancel(self, sentence: int) -> None:
        """Forget a sentence and free its rows; unknown and finished ones are ignored."""
        if self.scheduler.cancel(sentence) and self.idle:
            self.runner.apply(self.scheduler.plan(self.clock(), fresh=True)[0])
            self.runner.rest()

    def clear(self) -> None:
        """Forget every sentence, and all that is held for any."""
        self.scheduler = Scheduler(self.capacity)
        self.runner.clear()

    @property
    def invariant(self) -> bool | None:
        """Whether a sentence is the same, to the bit, in any company. On a CPU as the model found
        when its weights were laid out; None for one that does not say. On a GPU whether recorded
        steps gave the same logits however many rows were computed; encoding, and what is not
        recorded, is not tested there."""
        return self.runner.invariant

    @property
    def rows_in_use(self) -> int:
        return self.scheduler.rows_in_use

    @property
    def live_count(self) -> int:
        return self.scheduler.live_count

    @property
    def waiting_count(self) -> int:
        return self.scheduler.waiting_count

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    @property
    def began(self) -> list[int]:
        """Ids of sentences that got their first token in the last call of `advance`. One that also
        ended before a runner reported it is named by its event alone."""
        return self.scheduler.began

    def waiting_of(self, caller: str) -> int:
        """Sentences of a caller that have no rows yet."""
        return self.scheduler.waiting_of[caller]

    def begun(self, sentence: int) -> bool:
        """Whether a sentence that has not ended has a token."""
        return self.scheduler.tickets[sentence].begun

    @torch.inference_mode()
    def committed(self, sentence: int) -> list[int]:
        """The longest beginning that whatever comes out best will have, of a sentence that has not
        ended: what all live hypotheses and the best finished one share. It only grows."""
        return self.runner.committed(sentence) if self.begun(sentence) else []

    @torch.inference_mode()
    def advance(self, steps: int = 1, until: float = math.inf) -> list[Event]:
        """Fill free rows from the queue and decode up to `steps` tokens of every live sentence. It
        stops once the clock reaches `until`, but makes at least one step.

        A failure of the model (out of memory, say) ends the sentences it was working on, each
        with its error, and leaves the engine usable.
        """
        events: list[Event] = []
        self.scheduler.began.clear()
        last, fresh = self.steps + steps, True
        while self.steps < last and not self.idle:
            plan, expired = self.scheduler.plan(self.clock(), fresh)
            events += expired
            events += self.scheduler.settle(self.runner.apply(plan))
            due = min(until, self.scheduler.next_deadline)
            report = self.runner.run(last - self.steps, due)
            events += self.scheduler.settle(report)
            self.steps += max(report.steps, 1)
            fresh = False
            if self.clock() >= until:
                break
        if self.idle:
            self.runner.rest()
        return events

    def largest_memory(self) -> int:
        """Bytes that decoding takes at most, beside the weights, with every row in use."""
        return self.runner.largest_memory(self.capacity)
