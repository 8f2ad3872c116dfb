"""From what a client sent to texts and options, or a refusal that says what to mend."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from handler.blank import blank
from handler.decoding.options import DecodingOptions
from handler.doors import DOORS, Door, Native, PlainText
from handler.fields import FieldError, read, shown

JSON = "application/json"
TEXT = "text/plain"


class Refusal(Exception):
    """A request that is not served: HTTP status, a stable type, a message for whoever sent it."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.door: Door = Native()  # whose shape the error has

    def at(self, door: Door) -> "Refusal":
        self.door = door
        return self

    def told(self) -> dict[str, object]:
        """`{"code", "type", "message"}`, the shape of every error."""
        return {"code": self.status, "type": self.kind, "message": str(self)}


@dataclass(frozen=True)
class RequestOptions(DecodingOptions):
    """Options of one request, the same for all its texts.

    prefix: what each translation begins with, in the target language; of a text of several
        sentences the first. It counts towards max_length and the score.
    split: translate paragraphs sentence by sentence and keep their line breaks. A sentence that is
        too long for the model is translated in pieces, which `usage.cut_texts` tells. Without it
        each text is one sentence.
    join_lines: take the lines of a paragraph for one, as of text wrapped at 72 columns; with
        `split` alone. Blank lines, and lines that begin as items of a list do, stay apart.
    stream: answer with server-sent events as tokens are decided.
    return_tokens: tell each translation's pieces.
    priority: bulk waits while interactive requests wait, whoever sent them, but for one turn of
        nine, so that it never starves.
    """

    prefix: str | None = field(default=None, metadata={"longest": 4096})
    split: bool = True
    join_lines: bool = False
    stream: bool = False
    return_tokens: bool = False
    priority: Literal["interactive", "bulk"] = "interactive"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.join_lines and not self.split:
            raise ValueError("join_lines: got true with split false; allowed: with split true")


NAMES = frozenset(one.name for one in fields(RequestOptions))


@dataclass(frozen=True)
class TranslationRequest:
    """What to translate, and the door it came through, whose shape the answer has."""

    texts: list[str]
    options: RequestOptions
    door: Door


def parse(content_type: str | None, body: object, most_texts: int) -> TranslationRequest:
    """The request in `body`.

    `application/json` is `{"text": string or list of strings, <options>}`, or one of the shapes of
    KServe; `text/plain` is one sentence a line, UTF-8, where a line that shows nothing is answered
    by a blank one.

    Args:
        content_type: of the HTTP header; parameters after `;` are allowed. Without one it is
            text: `curl -T FILE` sends none.
        body: bytes; or what TorchServe has decoded already: str of text, the value of JSON.

    Raises:
        Refusal: with status 400, or 413 for too many texts.
    """
    kind = (content_type or "").split(";")[0].strip().lower() or TEXT
    if kind in (JSON, TEXT) and (body is None or body in (b"", "")):
        raise Refusal(400, "InvalidRequest", f"the request has no body; send {JSON} or {TEXT}")
    if kind == JSON:
        given = decoded_json(body) if isinstance(body, (bytes, bytearray)) else body
        try:
            request = from_json(given)
            check_texts(request.texts, blank=False)
        except Refusal as refusal:
            raise refusal.at(door_of(given)()) from None
    elif kind == TEXT:
        lines = decoded_text(body).removesuffix("\n").split("\n")
        texts = ["" if blank(line) else line.removesuffix("\r") for line in lines]
        request = TranslationRequest(texts, RequestOptions(), PlainText())
        check_texts(texts, blank=True)
    else:
        # What `curl -d` says where it is told nothing else.
        curl = kind == "application/x-www-form-urlencoded"
        hint = f"; tell curl: -H 'Content-Type: {JSON}'" if curl else ""
        raise Refusal(
            400, "InvalidContentType",
            f"Content-Type: got {shown(content_type)}; allowed: {JSON} or {TEXT}{hint}",
        )
    if len(request.texts) > most_texts:
        raise Refusal(
            413, "TooManyTexts",
            f"text: got {len(request.texts)} texts; allowed: at most {most_texts} in a request",
        ).at(request.door)
    return request


def door_of(given: object) -> type[Door]:
    """The door that a JSON body came through: TorchServe hides the path, so its shape tells."""
    if isinstance(given, Mapping) and "text" not in given:
        return next((one for one in DOORS if one.mark in given), Native)
    return Native


def from_json(given: object) -> TranslationRequest:
    if not isinstance(given, Mapping):
        raise Refusal(
            400, "InvalidRequest",
            f'the body: got {shown(given)}; allowed: an object such as {{"text": "..."}}',
        )
    try:
        texts, options, door = door_of(given).enter(given, NAMES)
        request = TranslationRequest(texts, read(RequestOptions, options), door)
        if request.options.stream and not door.streams:
            raise FieldError("stream", "got true; allowed in this shape of request: false")
    except FieldError as error:
        raise Refusal(400, "InvalidOption", str(error)) from None
    return request


def decoded_json(body: bytes | bytearray) -> object:
    try:
        return json.loads(body, parse_constant=no_constant)
    except RecursionError:
        problem = "nested too deeply"
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is not {error.encoding}"
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at line {error.lineno} column {error.colno}"
    except ValueError as error:
        problem = str(error)
    raise Refusal(400, "InvalidJSON", f"the body is not valid JSON: {problem}")


def no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def decoded_text(body: object) -> str:
    if isinstance(body, str):
        return body.removeprefix("\ufeff")
    if isinstance(body, (bytes, bytearray)):
        try:
            return body.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Refusal(
                400, "InvalidText", f"the body is not UTF-8: byte {error.start} is "
                f"0x{body[error.start]:02x}; send UTF-8"
            ) from None
    raise Refusal(400, "InvalidText", f"the body: got {shown(body)}; allowed: text")


def place(texts: list[str], i: int) -> str:
    """The name of text `i` in messages."""
    return "text" if len(texts) == 1 else f"text[{i}]"


def is_unicode(text: str) -> bool:
    """Whether each half of a surrogate pair is beside the other, as one character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_texts(texts: list[str], blank: bool) -> None:
    """Refuse what is not text: nothing but space (unless `blank`), or half a surrogate pair."""
    if (blank or all(map(str.strip, texts))) and is_unicode("".join(texts)):
        return  # nearly always, and found out quickly
    for i, text in enumerate(texts):
        where = place(texts, i)
        if not blank and not text.strip():
            raise Refusal(
                400, "EmptyText", f"{where}: got {shown(text)}; allowed: text that is not blank"
            )
        surrogate = next((j for j, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
        if surrogate is not None:
            raise Refusal(
                400, "InvalidText",
                f"{where}: character {surrogate} is the lone surrogate "
                f"U+{ord(text[surrogate]):04X}; allowed: whole Unicode characters",
            )
