"""Bodies that came compressed: `Content-Encoding` of RFC 9110, section 8.4."""

import contextlib
import zlib

from handler.fields import shown
from handler.request import Refusal

ACCEPTED = "gzip, deflate"
# zlib's numbers of the formats: gzip's frame, and zlib's, which is what HTTP calls deflate.
_FORMATS = {"gzip": 31, "x-gzip": 31, "deflate": 15}


def decoded(body: object, coding: str, most: int) -> object:
    """`body` as it was before it was compressed.

    Args:
        body: bytes; what is none was not compressed.
        coding: the header's value, empty where there is none.
        most: bytes that it may expand to; no more are held than one beyond.

    Raises:
        Refusal: 415 of another coding, 400 of bytes that are not in this one, 413 of too many.
    """
    name = coding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in _FORMATS:
        raise Refusal(
            415, "UnsupportedEncoding",
            f"Content-Encoding: got {shown(coding)}; allowed: one of {ACCEPTED}, or none",
        )
    unpacker, expanded = zlib.decompressobj(_FORMATS[name]), b""
    if isinstance(body, (bytes, bytearray)):
        with contextlib.suppress(zlib.error):
            expanded = unpacker.decompress(body, most + 1)
    if len(expanded) > most:
        raise Refusal(
            413, "BodyTooLarge",
            f"the body expands to more than {most} bytes, which are allowed; send fewer texts a "
            "request",
        )
    if not unpacker.eof or unpacker.unused_data:
        raise Refusal(
            400, "InvalidEncoding", f"the body is not {name}, as Content-Encoding says it is"
        )
    return expanded
