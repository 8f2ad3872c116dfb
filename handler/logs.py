"""What the worker writes.

Its standard output is its control channel: the frontend parses it line by line, and logs each line
as INFO. So every line tells its own level first, which server/log.py puts in place.
"""

import logging
import os
import re
import sys

# "true": all of it, as server/options.py has it.
VERBOSE = "SEQ2SERVE_VERBOSE"


# As server/output.py has it: what could hide the rest of a line, or make it look like several.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Levelled(logging.Formatter):
    """Each line of a message, a traceback's too, behind its level; control characters escaped."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if text.startswith("[METRICS]"):  # read by the frontend, which knows them by their start
            return text
        text = CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
        return "\n".join(f"{record.levelname} {line}" for line in text.split("\n"))


def set_up() -> None:
    """Tell levels; and drop the two lines that TorchServe logs at every call, and the traceback at
    a body that it cannot decode: neither calls nor clients shall fill the channel."""
    root = logging.getLogger()
    for one in root.handlers:
        if isinstance(one, logging.StreamHandler) and one.stream is sys.stdout:
            one.setFormatter(Levelled())
    if os.environ.get(VERBOSE) == "true":
        return
    dropped = ("Backend received", "Failed json decoding", "Failed utf-8 decoding")
    root.addFilter(lambda r: not str(r.msg).startswith(dropped))
    metrics = logging.getLogger("ts.metrics.caching_metric")
    metrics.addFilter(lambda r: "PredictionTime" not in r.getMessage())
