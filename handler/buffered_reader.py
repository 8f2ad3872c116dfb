"""Reads what TorchServe 0.12's frontend sends to its worker in large pieces.

TorchServe calls with all live requests again and again, and its worker asks the system for every
field of each of them, some thirty times a request, and decodes the body anew. Here a call is read
in as few pieces as it comes in; and where the bytes of a request are those of the call before, what
was made of them then serves again.

What comes out equals what TorchServe's own functions make of the same bytes, but for two things. A
request that comes again is the same object, so a handler must not change the bodies it is given.
And JSON of more than `DECODED` bytes stays bytes: parsed, 256 kB may become 10 MB, which would be
held for every live request; the handler parses one at a time, when its turn has come.
"""

import hashlib
import importlib
import json
import logging
import os
import struct
import sys
from pathlib import Path
from socket import socket
from typing import Any
from weakref import WeakKeyDictionary, proxy

logger = logging.getLogger(__name__)

# Of ts/protocol/otf_message_handler.py in TorchServe 0.12.0, two functions of which are replaced.
SHA256 = "83e82dc62b4a95a362efe4518786c6b389b895b85acaf37721aaff042ec9989a"
PIECE = 1 << 16  # bytes to ask for at least; a call of 80 short requests has 30 kB
LARGEST = 1 << 20  # bytes to ask for at most: memory is held for them, whether they come or not
DECODED = 1 << 12  # bytes of JSON that are parsed here; the handler parses larger bodies itself
INTEGER = struct.Struct("!i")
END = -1  # of a list; in place of a length

Request = dict[str, Any]


class Incomplete(Exception):
    """Not all has come; `end` is the least position up to which bytes are needed."""

    def __init__(self, end: int) -> None:
        self.end = end


class Reader:
    """What has come over one connection, and how far it has been read."""

    def __init__(self, connection: socket) -> None:
        self.connection = proxy(connection)  # which alone keeps its reader in `READERS`
        self.data = b""
        self.at = 0
        self.decodes = os.environ.get("TS_DECODE_INPUT_REQUEST") in (None, "true")
        # Of the call before, by id: a request's bytes and what was made of them.
        self.known: dict[bytes, tuple[bytes, Request]] = {}

    def await_bytes(self, count: int) -> None:
        """Return when `count` bytes are there that have not been read."""
        missing = self.at + count - len(self.data)
        if missing <= 0:
            return
        pieces = [self.data[self.at :]]
        while missing > 0:
            piece = self.connection.recv(min(max(PIECE, missing), LARGEST))
            if not piece:  # what follows is what TorchServe does
                logging.info("Frontend disconnected.")
                sys.exit(0)
            pieces.append(piece)
            missing -= len(piece)
        self.data, self.at = b"".join(pieces), 0

    def take(self, count: int) -> bytearray:
        """The next `count` bytes; none where that is negative, as in TorchServe."""
        self.await_bytes(count)
        begin = self.at
        self.at += max(0, count)
        return bytearray(self.data[begin : self.at])

    def requests(self) -> list[Request]:
        """The live requests of one call."""
        found: list[Request] = []
        read: dict[bytes, tuple[bytes, Request]] = {}
        while True:
            self.await_bytes(INTEGER.size)
            (length,) = INTEGER.unpack_from(self.data, self.at)
            if length == END:
                self.at += INTEGER.size
                self.known = read
                if self.at == len(self.data):  # as ever: the next call comes after the reply
                    self.data, self.at = b"", 0
                return found
            length = max(0, length)
            self.await_bytes(INTEGER.size + length)
            begin = self.at + INTEGER.size
            key = self.data[begin : begin + length]
            one = self.known.get(key)
            # Its bytes tell where they end: what begins with all of them is the same request.
            if one is None or not self.data.startswith(one[0], self.at):
                one = self.request(length)
            self.at += len(one[0])
            read[key] = one
            found.append(one[1])

    def request(self, length: int) -> tuple[bytes, Request]:
        """The bytes of the next request, whose id is `length` long, and what they mean."""
        while True:
            begin = self.at + INTEGER.size
            try:
                headers, end = listed(self.data, begin + length, 2)
                inputs, end = listed(self.data, end, 3)
                break
            except Incomplete as error:
                self.await_bytes(error.end - self.at)
        return self.data[self.at : end], {
            "requestId": bytearray(self.data[begin : begin + length]),
            "headers": [
                {"name": bytearray(name), "value": bytearray(value)}
                for name, value in zip(headers[::2], headers[1::2])
            ],
            "parameters": [
                self.input(*one) for one in zip(inputs[::3], inputs[1::3], inputs[2::3])
            ],
        }

    def input(self, name: bytes, content_type: bytes, content: bytes) -> dict[str, Any]:
        of, kind = name.decode(), content_type.decode()
        value: Any = bytearray(content)
        json_kind = kind == "application/json"
        if json_kind and len(content) > DECODED:
            return {"name": of, "contentType": kind, "value": value}
        if self.decodes and (json_kind or kind.startswith("text")):
            try:
                value = json.loads(content.decode()) if json_kind else content.decode()
            except Exception:
                what = "json" if json_kind else "utf-8"
                # TorchServe's words, by which handler/logs.py knows the line.
                logging.warning(
                    f"Failed {what} decoding of input data. Forwarding encoded payload",
                    exc_info=True,
                )
        return {"name": of, "contentType": kind, "value": value}


def listed(data: bytes, at: int, width: int) -> tuple[list[bytes], int]:
    """The fields of a list of entries of `width` fields each, and where the list ends.

    Raises:
        Incomplete: the end has not come.
    """
    found: list[bytes] = []
    try:
        while True:
            (length,) = INTEGER.unpack_from(data, at)
            at += INTEGER.size
            if length > 0:
                found.append(data[at : at + length])
                at += length
            elif length == END and len(found) % width == 0:
                return found, at
            else:  # any other negative length is that of nothing, as in TorchServe
                found.append(b"")
    except struct.error:
        raise Incomplete(at + INTEGER.size) from None


READERS: WeakKeyDictionary[socket, Reader] = WeakKeyDictionary()


def reader(connection: socket) -> Reader:
    found = READERS.get(connection)
    if found is None:
        found = READERS[connection] = Reader(connection)
    return found


def retrieve_buffer(connection: socket, length: int) -> bytearray:
    """In place of TorchServe's `_retrieve_buffer`, by which it reads all but requests."""
    return reader(connection).take(length)


def retrieve_inference_msg(connection: socket) -> list[Request]:
    """In place of TorchServe's `_retrieve_inference_msg`."""
    return reader(connection).requests()


def install() -> bool:
    """Let this process read so from the next message on. Does nothing, and says so once, where
    TorchServe is not the one that this was written for."""
    # Only the worker has it.
    replaced = importlib.import_module("ts.protocol.otf_message_handler")
    try:
        digest = hashlib.sha256(Path(str(replaced.__file__)).read_bytes()).hexdigest()
    except OSError as error:
        digest = str(error)
    if digest != SHA256:
        logger.warning(
            "TorchServe reads requests its own, slower way: %s is not that of 0.12.0 (%s)",
            replaced.__name__, digest,
        )
        return False
    replaced.__dict__.update(
        _retrieve_buffer=retrieve_buffer, _retrieve_inference_msg=retrieve_inference_msg
    )
    return True
