"""Check a model archive before it is served."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from pathlib import Path

from server.errors import ServerError

_CHUNK = 1 << 20
_MANIFEST = "MAR-INF/MANIFEST.json"


def check_archive(archive: Path, expected: str = "") -> str | None:
    """Refuse an archive that is missing or altered; return its digest, None without one to check.

    The digest stands beside the archive in `<archive>.sha256`, as sha256sum writes it; where
    `expected` is given, it must be that too.
    """
    if not archive.is_file():
        raise ServerError(
            f"archive {archive} not found: build it (`make mar`), "
            "or name the directory that holds it as model store"
        )
    try:
        with zipfile.ZipFile(archive) as content:
            content.getinfo(_MANIFEST)
    # TorchServe unpacks what it can of a cut archive, and then reports some other trouble.
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise ServerError(
            f"archive {archive} is no complete model archive ({error}): copy or make it again"
        ) from error
    digest_file = archive.with_name(archive.name + ".sha256")
    wanted = {"sha256": expected.lower()} if expected else {}
    if digest_file.exists():
        wanted[digest_file.name] = _read_digest(digest_file, archive.name)
    if not wanted:
        return None
    with archive.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    for source, value in wanted.items():
        if digest.hexdigest() != value:
            raise ServerError(
                f"archive {archive} has SHA-256 {digest.hexdigest()}, {source} says {value}: "
                "copy or make the archive again"
            )
    return digest.hexdigest()


def unpacked_size(archive: Path) -> int:
    """Return the bytes of an archive's files, of an archive that was checked."""
    with zipfile.ZipFile(archive) as content:
        return sum(each.file_size for each in content.infolist())


def version_of(archive: Path) -> str:
    """Return the model's version, of an archive that was checked.

    Raises:
        ServerError: its manifest does not tell it.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            return str(json.loads(content.read(_MANIFEST))["model"]["modelVersion"])
    except (ValueError, KeyError, TypeError) as error:
        raise ServerError(
            f"archive {archive} has a {_MANIFEST} without model.modelVersion: make it again"
        ) from error


def _read_digest(digest_file: Path, name: str) -> str:
    try:
        lines = digest_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ServerError(
            f"digest file {digest_file} cannot be read ({error}): make it again with sha256sum"
        ) from error
    for line in lines:
        # "*" is sha256sum's mark for binary mode.
        found = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line)
        if found is not None and Path(found[2]).name == name:
            return found[1].lower()
    raise ServerError(
        f"digest file {digest_file} has no line for {name}: make it again with sha256sum"
    )
