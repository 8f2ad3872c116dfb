"""What options forbid or change: one class each, with its formula and its source.

A constraint sees the logits of all sentences of a lane and changes those of the sentences that ask
for it. To add one: a field in options.py, a class here, a place in `CONSTRAINTS`, a test.
"""

from typing import Protocol

import torch
from torch import Tensor

from handler.decoding.sentence import Sentence

NEVER = float("-inf")


class Heard(Protocol):
    """What N sentences of K hypotheses have said so far; each is made when it is asked for."""

    @property
    def eos(self) -> int: ...

    def made(self) -> Tensor:
        """int64 [N]: tokens."""
        ...

    def said(self) -> Tensor:
        """int64 [N, K, T]: these, of which T - made are nothing yet."""
        ...

    def short(self) -> Tensor | None:
        """bool [N, 1]: who must not end yet; None where all may."""
        ...

    def due(self) -> Tensor | None:
        """int64 [N]: the token of the prefix that comes now, -1 where there is none; None where no
        sentence has a prefix."""
        ...


class Constraint(Protocol):
    """
    probable: whether it changes probabilities, which scores then tell; else it only forbids.
    chosen: whether a model that chooses tokens itself can do with it (`Lane.best`).
    """

    probable: bool
    chosen: bool

    def asked(self, sentence: Sentence) -> list[float]:
        """What the sentence asks for, above 0; nothing where it does not."""
        ...

    def apply(self, logits: Tensor, asked: Tensor, heard: Heard) -> Tensor:
        """The new logits of float [N, K, V], which may be overwritten; `asked` double [N, P] has 0
        where a sentence asks for nothing."""
        ...


class RepetitionPenalty:
    """Logits of tokens that occurred are divided by the penalty where positive, and multiplied
    where negative (arXiv 1909.05858, 4.1)."""

    probable, chosen = True, False

    def asked(self, sentence: Sentence) -> list[float]:
        penalty = sentence.options.repetition_penalty
        return [] if penalty == 1.0 else [penalty]

    def apply(self, logits: Tensor, asked: Tensor, heard: Heard) -> Tensor:
        penalty = asked[:, :1].unsqueeze(2).to(logits.dtype)  # [N, 1, 1]
        tokens = heard.said()
        place = torch.arange(tokens.size(2), device=logits.device)
        seen = marked(logits, tokens, place < heard.made().view(-1, 1, 1))
        changed = torch.where(logits > 0, logits / penalty, logits * penalty)
        return torch.where(seen & (penalty > 0), changed, logits)


class NoRepeatNgram:
    """No n-gram of a size occurs twice (arXiv 1705.04304, 2.5)."""

    probable, chosen = False, False

    def asked(self, sentence: Sentence) -> list[float]:
        size = sentence.options.no_repeat_ngram_size
        return [float(size)] if size else []

    def apply(self, logits: Tensor, asked: Tensor, heard: Heard) -> Tensor:
        made, tokens, due = heard.made().view(-1, 1, 1), heard.said(), heard.due()
        for size in sorted({int(size) for size in asked[:, 0].unique().tolist()} - {0}):
            if tokens.size(2) < size:
                continue
            ngrams = tokens.unfold(2, size, 1)  # [N, K, T - size + 1, size]
            last = (made - size + 1 + torch.arange(size - 1, device=logits.device)).clamp(min=0)
            begun = tokens.gather(2, last.expand(-1, tokens.size(1), -1))  # [N, K, size - 1]
            first = torch.arange(ngrams.size(2), device=logits.device)
            again = (ngrams[..., :-1] == begun.unsqueeze(2)).all(3) & (first + size <= made)
            again = again & (asked[:, :1] == size).unsqueeze(2)
            if due is not None:
                again = again & (due < 0).view(-1, 1, 1)
            logits.masked_fill_(marked(logits, ngrams[..., -1], again), NEVER)
        return logits


class MinimumLength:
    """No EOS before the minimum length."""

    probable, chosen = False, True

    def asked(self, sentence: Sentence) -> list[float]:
        least = sentence.options.min_length
        return [float(least)] if least else []

    def apply(self, logits: Tensor, asked: Tensor, heard: Heard) -> Tensor:
        short = heard.short()
        if short is not None:
            logits[:, :, heard.eos].masked_fill_(short, NEVER)
        return logits


class Prefix:
    """The translation begins with given tokens, whatever their probability."""

    probable, chosen = False, False

    def asked(self, sentence: Sentence) -> list[float]:
        return [float(token + 1) for token in sentence.prefix]

    def next(self, asked: Tensor, made: Tensor) -> Tensor:
        """int64 [N]: the token that comes after `made` ones, -1 where there is none."""
        place = made.clamp(max=asked.size(1) - 1).unsqueeze(1)
        token = asked.gather(1, place).squeeze(1).long() - 1
        return token.masked_fill(made >= asked.size(1), -1)

    def apply(self, logits: Tensor, asked: Tensor, heard: Heard) -> Tensor:
        token = heard.due()
        if token is None:
            return logits
        due = token.view(-1, 1, 1)
        place = due.clamp(min=0).expand(-1, logits.size(1), -1)  # [N, K, 1]
        alone = torch.full_like(logits, NEVER).scatter_(2, place, logits.gather(2, place))
        return torch.where(due >= 0, alone, logits)


PREFIX = Prefix()
CONSTRAINTS: tuple[Constraint, ...] = (
    RepetitionPenalty(), NoRepeatNgram(), MinimumLength(), PREFIX,
)  # fmt: skip


def marked(logits: Tensor, tokens: Tensor, where: Tensor) -> Tensor:
    """bool [N, K, V]: the ids that occur in tokens [N, K, M], counting only those `where`."""
    n, k, vocabulary = logits.shape
    found = torch.zeros((n, k, vocabulary + 1), dtype=torch.bool, device=logits.device)
    counted = torch.where(where, tokens, vocabulary)  # the others all mark one more id
    return found.scatter_(2, counted, True)[:, :, :vocabulary]
