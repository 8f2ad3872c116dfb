"""Digests of everything in an archive, so that a changed byte is refused before it is served."""

import hashlib
import json
from pathlib import Path

DIGESTS = "digests.json"
MANIFEST = "MAR-INF/MANIFEST.json"


class IntegrityError(RuntimeError):
    """An archive that is not as it was built."""


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_digests(folder: Path) -> None:
    """Record every file below `folder` in `folder`/digests.json."""
    digests = {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != DIGESTS
    }
    (folder / DIGESTS).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")


def recorded(folder: Path) -> dict[str, str]:
    """What digests.json of `folder` records: digests by name.

    Raises:
        IntegrityError: it cannot be read.
    """
    try:
        digests = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        if not isinstance(digests, dict):
            raise ValueError("no mapping of names to digests")
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{DIGESTS} of the archive cannot be read ({error}): build the archive again"
        ) from None
    return digests


def verify_digests(folder: Path, suffix: str = "") -> None:
    """Check every file that digests.json records.

    Args:
        suffix: of the files whose content is read; of the others it is looked whether they exist.

    Raises:
        IntegrityError: a file that is missing or changed, by name, or no record at all.
    """
    for name, expected in recorded(folder).items():
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"{name} is missing from the archive: build the archive again")
        if name.endswith(suffix) and sha256(path) != expected:
            raise IntegrityError(
                f"{name} in the archive is not the file it was built with (sha256 {expected}): "
                "copy or build the archive again"
            )


def refuse_unlisted(folder: Path) -> None:
    """Refuse what digests.json does not record: Python would import it like the rest.

    Raises:
        IntegrityError: a file by its name, or no record at all.
    """
    known = {*recorded(folder), DIGESTS, MANIFEST}
    for path in sorted(one for one in folder.rglob("*") if not one.is_dir()):
        name = path.relative_to(folder).as_posix()
        # What Python writes of the module that TorchServe loads, before that can say not to.
        own = name.startswith("__pycache__/seq2serve.") and name.endswith(".pyc")
        if name not in known and not own:
            raise IntegrityError(
                f"{name} is in the archive, and {DIGESTS} does not list it: build the archive again"
            )
