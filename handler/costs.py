"""How much memory requests may take while they are served, in bytes, known before they are decoded.

Beside what decoding itself takes (`Engine.largest_memory`), a worker holds of each request its
sentences, what was decoded of texts that are not whole yet, and what has been written of those that
are. The constants are what Python needs; the tests hold requests of all kinds to them.
"""

from collections.abc import Sequence

from handler.decoding.options import DecodingOptions
from handler.sentences import Segment

REQUEST = 50_000
TEXT = 1_000
SENTENCE = 2_500  # its place in the queue, and what is written of it
CHARACTER = 10  # of the source: as text, in segments, as tokens
RESULT = 200
TOKEN = 8
SHARE = 2  # of attention
ROW = 50  # of an alignment that is being written

BODY = 1 << 18  # bytes of the largest: max_request_size of config.properties
COPIES = 3  # of each body: as it came, cut out, and as the handler gets it
PARSED = 40  # for each byte of JSON, while one is parsed: of lists of nothing
SENT = 10  # copies of an answer on its way: in pieces, together, and as text of wide characters


def of_texts(texts: Sequence[str]) -> int:
    """Of a request that has been read."""
    return REQUEST + sum(TEXT + CHARACTER * len(text) for text in texts)


def of_sentence(source: int, target: int, options: DecodingOptions) -> int:
    """Of a sentence of so many source tokens and at most so many target tokens."""
    shares = SHARE * source * target if options.return_alignments else 0
    return SENTENCE + ROW * target + options.n_best * (RESULT + TOKEN * target + shares)


def told_of_sentence(source: int, target: int, piece: int, options: DecodingOptions) -> int:
    """Bytes of the answer; `piece`: of the longest token. Tokens may be told three times."""
    shares = 8 * source * target + piece * source if options.return_alignments else 0
    return options.n_best * (3 * piece * target + shares)


def least_told(source: int, options: DecodingOptions) -> int:
    """Bytes of the answer that a sentence has at least: of its best translation five for each share
    of attention."""
    if options.max_time is not None:  # it may be over before the first token
        return 0
    return options.min_length * (5 * source if options.return_alignments else 0)


def told_of_text(segments: Sequence[Segment], options: DecodingOptions) -> int:
    """The same of what is around the sentences of a text: names, and white space."""
    around = 100 + sum(50 + 6 * len(one.gap) for one in segments)
    return options.n_best * around


def largest(request_memory: int, answer: int, live: int, decoded: int) -> int:
    """The most that so many live requests take together.

    Args:
        request_memory, answer: see `ServiceOptions`.
        decoded: bytes of the largest body that is parsed as soon as it has come.
    """
    bodies = COPIES * live * BODY + PARSED * (BODY + live * decoded)
    return request_memory + bodies + SENT * answer
