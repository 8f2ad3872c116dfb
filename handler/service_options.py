"""What model-config.yaml says of the service."""

from dataclasses import dataclass, field

from handler.decoding.model import Weights


@dataclass(frozen=True)
class ServiceOptions:
    """The section `handler` of model-config.yaml.

    rows: hypotheses decoded together; the memory of decoding grows with it. Null for 64 on a CPU,
        and on a GPU for the greatest power of two up to 1,024 that its free memory allows.
    beams: on a GPU, beam sizes whose steps are recorded before the first request comes, each with
        memory for all rows; others are several times slower there. 1 is greedy search.
    batch_invariance: compute in tiles of 64 rows on a GPU, of 16 on a CPU without native operators,
        where a sentence would depend on how many are beside it; false is faster there, and says so
        in the log and the card.
    round_ms: milliseconds between two looks at new requests, and between two events of a stream.
        In them new requests are let in, those that take long for a quarter of the time, and the
        rest is decoding; then one step more at most, on a GPU four. A call costs the frontend
        2 ms and more, as it sends every live request anew: the longer a call, the less of it that
        is, and the longer a newcomer waits, half a round on average. With few requests at once 20
        is right everywhere. Where hundreds are live, as a GPU can serve, take three times what
        TorchServe needs between two calls: the mean time from one to the next, less `round_ms`.
        Measured in docs/results.md.
    max_texts: texts in one request.
    max_sentences: sentences in one request, when its texts are split.
    max_waiting: sentences that wait for rows, or are on their way into the engine; requests beyond
        get 503.
    request_memory: bytes that requests may take together, beside what decoding takes. What one may
        take is known before it is decoded (costs.py): more than a quarter gets 413, and beyond what
        others have left 503.
    max_request_bytes: of a compressed body once it is expanded; as TorchServe's max_request_size,
        which holds for bodies as they are sent.
    max_response_bytes: stays below TorchServe's max_response_size (6,553,500), beyond which the
        frontend kills the worker.
    threads: of torch on a CPU; null for one for each CPU this process may use but one, which is
        left to the frontend: threads that wait for a core they share stall every product.
    require_gpu: refuse to start on a CPU, where falling back would go unnoticed.
    weights: number format on a GPU; auto for float16 where it is fast, null for the one of the
        export.
    """

    rows: int | None = field(default=None, metadata={"minimum": 1, "maximum": 65536})
    beams: tuple[int, ...] = field(default=(1, 5), metadata={"minimum": 1, "maximum": 64})
    batch_invariance: bool = True
    round_ms: float = field(default=20.0, metadata={"minimum": 0.0, "maximum": 1000.0})
    max_texts: int = field(default=1024, metadata={"minimum": 1})
    max_sentences: int = field(default=4096, metadata={"minimum": 1})
    max_waiting: int = field(default=16384, metadata={"minimum": 1})
    request_memory: int = field(default=128_000_000, metadata={"minimum": 1_000_000})
    max_request_bytes: int = field(default=262_144, metadata={"minimum": 1})
    max_response_bytes: int = field(default=6_000_000, metadata={"minimum": 1000})
    threads: int | None = field(default=None, metadata={"minimum": 1})
    require_gpu: bool = False
    weights: Weights | None = "auto"
