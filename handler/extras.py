"""Packages beyond torch, sentencepiece and PyYAML: the extra `serving` of pyproject.toml.

Pure Python, so they travel in the archive, under its digests, and every TorchServe 0.12 serves with
the same ones. Where one is missing all the same, the option that needs it is refused by its name.
"""

import importlib
from importlib import metadata
from types import ModuleType

PINS = {"sentencex": "0.6.1"}  # as in pyproject.toml


class MissingPackage(RuntimeError):
    """A package is not there, or not in the version that is pinned; the message says what to do."""


def package(name: str) -> ModuleType:
    """The module of a package of `PINS`.

    Raises:
        MissingPackage: see there.
    """
    try:
        found = metadata.version(name)
        if found == PINS[name]:
            return importlib.import_module(name)
    except (metadata.PackageNotFoundError, ImportError):
        found = "none"
    raise MissingPackage(
        f"needs {name} {PINS[name]}, found {found}: build the archive again, or install "
        "seq2serve[serving]"
    )
