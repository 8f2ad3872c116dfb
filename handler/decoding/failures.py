"""The one place that handles failures of decoding: each is told once, of whom it was working on."""

import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from handler.decoding.sentence import Event, failed

logger = logging.getLogger(__name__)

Given = TypeVar("Given")
# What torch says of a device that can go on: no memory is left, or a call was wrong.
PASSING = ("out of memory", "ALLOC_FAILED", "NOT_SUPPORTED", "INVALID_VALUE", "invalid argument",
           "invalid configuration", "invalid device function")


class DeviceLost(BaseException):
    """No further operation on the device can succeed in this process: an illegal access, an error
    of its memory, a device that has gone. The process has to end, so that another one is started.

    No `Exception`: nothing on the way may take it for the failure of a sentence.
    """


def guarded(
    ids: Iterable[int], work: Callable[..., Given], *arguments: Any
) -> tuple[Given | None, list[Event]]:
    """What `work` returns; or the events of the sentences that it was working on, if it fails.

    Raises:
        DeviceLost: nothing else would succeed either.
    """
    try:
        return work(*arguments), []
    except Exception as error:
        if is_lost(error):
            lines = str(error).splitlines()
            told = next((line for line in lines if "CUDA" in line), "".join(lines[:1]))
            raise DeviceLost(told.strip()) from error
        events = [failed(one, error) for one in ids]
        logger.exception("decoding failed for %d sentences", len(events))
        return None, events


def is_lost(error: Exception) -> bool:
    """Whether it is one of CUDA's errors after which every later call fails as well."""
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return False
    text = str(error)
    named = any(one in text for one in ("CUDA error", "CUDA: ", "cuDNN error"))
    return named and not any(one in text for one in PASSING)
