"""Copy a model archive from Google Cloud Storage, and check it before it can be served.

Runs in an init container with Python's standard library alone. The variables:
    SEQ2SERVE_MODEL_URI     gs://BUCKET/OBJECT
    SEQ2SERVE_SHA256        the archive's digest, in hex
    SEQ2SERVE_MODEL_STORE   folder for seq2seq.mar and seq2seq.mar.sha256
    SEQ2SERVE_METADATA_URL, SEQ2SERVE_STORAGE_URL   other servers than Google's, for tests
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPResponse
from pathlib import Path
from urllib.parse import quote

NAME = "seq2seq.mar"
METADATA = "http://metadata.google.internal"
STORAGE = "https://storage.googleapis.com"
TRIES = 6
FIRST_PAUSE = 1.0  # seconds, doubled each time: 1 + 2 + 4 + 8 + 16 = 31 in all
# Of a server that is busy, and of an identity that a node does not know yet (GKE: some seconds).
PASSING = {401, 408, 429, 500, 502, 503, 504}


class FetchError(Exception):
    """The model cannot be had; one line that says why and what to do."""


def fetch(environment: Mapping[str, str], pause: float = FIRST_PAUSE) -> Path:
    """Return the archive's path; nothing is done where the right one is there already.

    Raises:
        FetchError: a variable is missing or malformed, the object cannot be read, or its digest is
            another. No archive is left then.
    """
    uri, wanted = (
        environment.get("SEQ2SERVE_MODEL_URI", ""),
        environment.get("SEQ2SERVE_SHA256", ""),
    )
    found = re.fullmatch(r"gs://([a-z0-9._-]+)/(.+)", uri)
    if found is None:
        raise FetchError(f"SEQ2SERVE_MODEL_URI is {uri!r}: allowed is gs://BUCKET/OBJECT")
    if re.fullmatch(r"[0-9a-f]{64}", wanted) is None:
        raise FetchError(f"SEQ2SERVE_SHA256 is {wanted!r}: allowed are 64 digits of 0-9a-f")
    store = Path(environment.get("SEQ2SERVE_MODEL_STORE", "/models"))
    archive, part = store / NAME, store / f".{NAME}.part"
    # A container that is started again finds what the one before left.
    if not (archive.is_file() and digest(archive) == wanted):
        archive.unlink(missing_ok=True)
        copy(environment, found[1], found[2], part, pause)
        got = digest(part)
        if got != wanted:
            part.unlink()
            raise FetchError(f"{uri} has SHA-256 {got}, wanted is {wanted}: correct one of the two")
        (store / f"{NAME}.sha256").write_text(f"{wanted}  {NAME}\n", encoding="utf-8")
        part.rename(archive)
    return archive


def copy(environment: Mapping[str, str], bucket: str, name: str, to: Path, pause: float) -> None:
    """Write an object to a file, in several tries where what hinders it may pass."""
    storage = environment.get("SEQ2SERVE_STORAGE_URL", STORAGE)
    url = f"{storage}/storage/v1/b/{bucket}/o/{quote(name, safe='')}?alt=media"
    for left in reversed(range(TRIES)):
        try:
            header = {"Authorization": f"Bearer {token(environment)}"}
            with opened(url, header) as reply, to.open("wb") as file:
                while block := reply.read(1 << 20):
                    file.write(block)
                if reply.length:  # http.client tells a connection that broke off in no other way
                    raise EOFError(f"{reply.length} bytes are missing")
                return
        except urllib.error.HTTPError as error:
            reason, passes = f"{error.code} {error.reason}", error.code in PASSING
        except (OSError, ValueError, KeyError, EOFError) as error:
            reason, passes = str(error) or type(error).__name__, True
        if not left or not passes:
            raise FetchError(
                f"gs://{bucket}/{name} cannot be read ({reason}): does it exist, and may this "
                "pod's service account read it (roles/storage.objectViewer)?"
            )
        print(f"model: {reason}; trying again", file=sys.stderr, flush=True)
        time.sleep(pause * 2 ** (TRIES - 1 - left))


def token(environment: Mapping[str, str]) -> str:
    """Return an access token of the pod's identity, as the node's metadata server gives it."""
    server = environment.get("SEQ2SERVE_METADATA_URL", METADATA)
    url = f"{server}/computeMetadata/v1/instance/service-accounts/default/token"
    with opened(url, {"Metadata-Flavor": "Google"}) as reply:
        return str(json.loads(reply.read())["access_token"])


def opened(url: str, headers: Mapping[str, str]) -> HTTPResponse:
    reply: HTTPResponse = urllib.request.urlopen(
        urllib.request.Request(url, headers=dict(headers)), timeout=30
    )
    return reply


def digest(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def main() -> int:
    # Process 1 of a container ignores what it has not asked for.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        print(f"model: {fetch(os.environ)}", flush=True)
    except (FetchError, OSError) as error:
        print(f"model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
