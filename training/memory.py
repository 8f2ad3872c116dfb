"""Too little memory, told with the setting to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

from training.lines import LineError
from training.run import RunError

# As CUDA, a CPU, C++, cuBLAS and the engine, which tells an error's type alone, say it.
OUT_OF_MEMORY = (
    "out of memory", "allocate memory", "bad_alloc", "ALLOC_FAILED", "OutOfMemoryError"
)  # fmt: skip
SMALLER_MODEL = (
    "Lower the sizes of the model (model.decoder_hidden_size, model.encoder_hidden_size, "
    "model.embedding_size, layers) or the vocabularies; train --dry-run tells what each part takes"
)
SMALLER_BATCHES = (
    "Lower training.batch_tokens (training.accumulate makes up for it; a run that is begun goes on "
    "with --accept-changes) or the sizes of the model"
)
ELSEWHERE = (
    "take a machine with more memory; where a GPU has too little, --set training.device=cpu takes "
    "the machine's"
)


class TooLittleMemory(RunError):
    """What was asked for needs more memory than there is."""


@contextmanager
def enough_memory(what: str, advice: str) -> Iterator[None]:
    """Tells a lack of memory as one of the run.

    Args:
        what: is being done.
        advice: which setting to lower.

    Raises:
        TooLittleMemory: it needs more than there is.
    """
    try:
        yield
    except (MemoryError, RuntimeError, LineError) as error:
        text = (str(error) or "out of memory").splitlines()[0]
        if not isinstance(error, MemoryError) and not any(one in text for one in OUT_OF_MEMORY):
            raise
        raise TooLittleMemory(f"{what}: {text.rstrip('.')}. {advice}") from None
