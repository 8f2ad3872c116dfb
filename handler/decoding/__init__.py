"""The decoding engine: sentences are admitted, advance together row by row, and leave alone.

Offline evaluation, the command line and the server all decode with this one engine. Enter at
`engine.py`.
"""

from handler.decoding.engine import Engine
from handler.decoding.model import SequenceModel, SourceLengthError
from handler.decoding.offline import decode_in_order
from handler.decoding.options import DecodingOptions
from handler.decoding.sentence import Alignment, Event, Result

__all__ = [
    "Alignment",
    "DecodingOptions",
    "Engine",
    "Event",
    "Result",
    "SequenceModel",
    "SourceLengthError",
    "decode_in_order",
]
