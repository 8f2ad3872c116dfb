"""What a client may ask of decoding: one field an option, its formula and its source beside it."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class DecodingOptions:
    """Options of one request, the same for all its sentences. Letters as in `model`.

    Hypotheses are compared by their score, s(Y) = log P(Y | X) / lp(L, a) + b * cp(X, Y).

    beam_size: K hypotheses kept. 1 is greedy search, or sampling.
    n_best: hypotheses answered, best first; at most beam_size.
    max_length: most target tokens, EOS not counted. Null stands for min(3 * source tokens + 10,
        the model's limit), which stops a model that repeats itself.
    min_length: fewest target tokens, EOS not counted; at most max_length.
    length_penalty: a of lp(L, a); L counts EOS. 0 compares sums, as arXiv 1409.3215 does.
    length_penalty_form: power: lp = L^a. gnmt: lp = ((5 + L) / 6)^a (arXiv 1609.08144, eq. 14).
    coverage_penalty: b of cp = sum over source tokens i of log min(sum over j of p_ij, 1), where
        p_ij is the attention that target token j pays to i (eq. 15 there); EOS is a token of the
        target, not of the source. Needs a model with attention.
    no_repeat_ngram_size: no n-gram of this size occurs twice (arXiv 1705.04304, 2.5); 0: any may.
    repetition_penalty: logits of tokens that occurred are divided by it where positive, and
        multiplied where negative (arXiv 1909.05858, 4.1); 1: none.
    sampling: draw each token instead of taking the best.
    temperature: logits are divided by it before a token is drawn.
    top_k: draw from the k likeliest tokens; 0: from all.
    top_p: draw from the fewest likeliest tokens whose probabilities reach p (arXiv 1904.09751).
    seed: of the draws; the same seed draws the same, whatever else is decoded. Null: any.
    max_time: seconds after which what there is is answered, with finish_reason "time": finished
        hypotheses first, then unfinished ones, the likeliest first. Null: no limit.
    return_scores: tell each hypothesis' score.
    return_alignments: tell the attention of each target token over the source tokens.
    """

    beam_size: int = field(default=1, metadata={"minimum": 1, "maximum": 64})
    n_best: int = field(default=1, metadata={"minimum": 1, "maximum": 64})
    max_length: int | None = field(default=None, metadata={"minimum": 1})
    min_length: int = field(default=0, metadata={"minimum": 0})
    length_penalty: float = field(default=0.0, metadata={"minimum": 0.0, "maximum": 10.0})
    length_penalty_form: Literal["power", "gnmt"] = "power"
    coverage_penalty: float = field(default=0.0, metadata={"minimum": 0.0, "maximum": 10.0})
    no_repeat_ngram_size: int = field(default=0, metadata={"minimum": 0, "maximum": 100})
    repetition_penalty: float = field(default=1.0, metadata={"minimum": 0.01, "maximum": 100.0})
    sampling: bool = False
    temperature: float = field(default=1.0, metadata={"minimum": 0.01, "maximum": 100.0})
    top_k: int = field(default=0, metadata={"minimum": 0})
    top_p: float = field(default=1.0, metadata={"above": 0.0, "maximum": 1.0})
    seed: int | None = field(default=None, metadata={"minimum": 0, "maximum": 2**63 - 1})
    max_time: float | None = field(default=None, metadata={"above": 0.0, "maximum": 3600.0})
    return_scores: bool = False
    return_alignments: bool = False

    def __post_init__(self) -> None:
        if self.n_best > self.beam_size:
            raise ValueError(
                f"n_best: got {self.n_best}; allowed: at most beam_size, {self.beam_size}"
            )
        if self.max_length is not None and self.min_length > self.max_length:
            raise ValueError(
                f"min_length: got {self.min_length}; allowed: at most max_length, "
                f"{self.max_length}"
            )
        if self.sampling and self.beam_size > 1:
            raise ValueError(
                f"sampling: got true with beam_size {self.beam_size}; allowed: with beam_size 1"
            )
        for name, idle in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("seed", None)):
            if not self.sampling and getattr(self, name) != idle:
                raise ValueError(
                    f"{name}: got {getattr(self, name)} without sampling; allowed: with sampling"
                )

    @property
    def reads_attention(self) -> bool:
        return self.return_alignments or self.coverage_penalty > 0

    def length_normaliser(self, length: int) -> float:
        """lp(L, a) of a hypothesis of `length` tokens, EOS counted; of none, that of one."""
        length = max(length, 1)
        if self.length_penalty_form == "gnmt":
            return ((5 + length) / 6) ** self.length_penalty
        return float(length) ** self.length_penalty
