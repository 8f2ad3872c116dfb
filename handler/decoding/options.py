"""What a client may ask of decoding."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DecodingOptions:
    """Options of one request, the same for all its sentences.

    max_length: most target tokens of a sentence, EOS not counted. Null stands for
        min(3 * source tokens + 10, the model's limit), which stops a model that repeats itself.
    """

    max_length: int | None = field(default=None, metadata={"minimum": 1})
