"""A client of the REST API that needs nothing but Python's standard library."""

from __future__ import annotations

import http.client
import ipaddress
import json
import shlex
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from server.errors import ReplyError, ServerError

MODEL = "seq2seq"
DEFAULT_URL = "http://127.0.0.1:8080"
DEFAULT_TIMEOUT = 60.0


def address(url: str) -> str:
    """Where the server at `url` translates."""
    return f"{url.rstrip('/')}/predictions/{MODEL}"


def translate(
    url: str,
    texts: Sequence[str],
    options: Mapping[str, Any] | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    token: str = "",
) -> dict[str, Any]:
    """Translate texts with the server at `url`; return its answer as it came.

    `answer["translations"]` has one list for each text, its best translation first. `options` are
    those of the REST API, such as beam_size, but no stream; `timeout` is in seconds; `token` is
    the bearer token of a server that wants one.
    """
    # Escapes would double what other scripts than the Latin take of the server's limit.
    body = json.dumps({**(options or {}), "text": list(texts)}, ensure_ascii=False)
    # Half a surrogate pair is sent as it is: the server says which text has one.
    sent = body.encode("utf-8", errors="surrogatepass")
    try:
        answer = json.loads(_post(address(url), "application/json", sent, timeout, token))
    except ValueError as error:
        raise ServerError(f"server {url} answered no JSON ({error})") from error
    if not isinstance(answer, dict) or not isinstance(answer.get("translations"), list):
        raise ServerError(f"server {url} answered without translations: is it this project's?")
    if len(answer["translations"]) != len(texts):
        raise ServerError(
            f"server {url} answered {len(answer['translations'])} translations "
            f"for {len(texts)} texts: is it this project's?"
        )
    return answer


def translate_lines(
    url: str, lines: Sequence[bytes], timeout: float = DEFAULT_TIMEOUT, token: str = ""
) -> list[bytes]:
    """Translate lines of UTF-8 with the server at `url`, each to one; a blank line stays blank."""
    body = b"".join(line + b"\n" for line in lines)
    answer = _post(address(url), "text/plain", body, timeout, token)
    found = answer.removesuffix(b"\n").split(b"\n")
    if len(found) != len(lines):
        raise ServerError(
            f"server {url} answered {len(found)} lines for {len(lines)}: is it this project's?"
        )
    return found


def curl(url: str, text: str) -> str:
    """The command of a shell that asks the server at `url` to translate `text`."""
    body = shlex.quote(json.dumps({"text": [text]}, ensure_ascii=False))
    return f"curl {address(url)} -H 'Content-Type: application/json' -d {body}"


def _post(url: str, kind: str, body: bytes, timeout: float, token: str) -> bytes:
    if urlsplit(url).scheme not in ("http", "https"):
        raise ServerError(f"url is {url}: allowed is http://HOST:PORT or https://HOST:PORT")
    headers = {"Content-Type": kind}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, body, headers)
    try:
        with _opener(url).open(request, timeout=timeout) as reply:
            answer: bytes = reply.read()
            return answer
    except urllib.error.HTTPError as error:
        with error:
            raise _reply_error(error) from error
    except urllib.error.URLError as error:
        raise ServerError(
            f"server {url} cannot be reached ({error.reason}): start one with "
            "`make serve`, or give its address"
        ) from error
    except TimeoutError as error:
        raise ServerError(
            f"server {url} did not answer in {timeout:g} s: send less at once, or wait longer"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(
            f"server {url} broke off while it answered ({error}): send the request again"
        ) from error


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Return an opener that asks no proxy for this machine."""
    host = urlsplit(url).hostname or ""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if local:
        return urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener()


def _reply_error(error: urllib.error.HTTPError) -> ReplyError:
    """Read an error's body: {"code", "type", "message"}, or nothing where TorchServe sends none."""
    kind, message = "HTTPError", str(error.reason)
    try:
        body = json.loads(error.read())
        kind, message = str(body["type"]), str(body["message"])
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        if error.code == 413:
            message += ": send fewer texts at once"
    return ReplyError(error.code, kind, " ".join(message.split()))
