"""What Java and the worker inherit: where Python looks, how paths are spelt, where tokens are.

PYTHONPATH stays out: TorchServe 0.12 puts it before the archive on the worker's path, so that what
is imported would not be what was checked. Java reads paths in the locale's encoding, and in the
locales C and POSIX cannot read one outside ASCII: it gets one of UTF-8, as Python gives itself.
"""

from __future__ import annotations

import locale
import os
import site
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from importlib.machinery import PathFinder
from pathlib import Path

from server.errors import ServerError

TOKENS = "SEQ2SERVE_TOKENS"  # handler/authorization.py
# What the worker cannot do without; each may be missing, but must not be in PYTHONPATH alone.
_PACKAGES = ("torch", "sentencepiece", "yaml")
_LOCALES = ("C.UTF-8", "C.utf8")


def inherited_environment(
    environment: Mapping[str, str], spelling: str | None
) -> dict[str, str]:
    """Return `environment` as Java and the worker shall have it.

    Args:
        spelling: a locale of UTF-8, see `utf8_locale`.

    Raises:
        ServerError: a package is found in PYTHONPATH alone.
    """
    others = outside(environment)
    for name in _PACKAGES if others else ():
        if found(name, sys.path) and not found(name, inside(sys.path, others)):
            raise ServerError(
                f"package {name} is found through PYTHONPATH alone, which the worker does not get, "
                "so that it imports what was checked: install it in this environment, or name its "
                "folder in a .pth file of site-packages"
            )
    kept = {key: value for key, value in environment.items() if key != "PYTHONPATH"}
    if spelling is not None:
        kept["LC_ALL"] = spelling
    if kept.get(TOKENS):  # the worker stands elsewhere
        kept[TOKENS] = os.path.abspath(kept[TOKENS])
    return kept


def outside(environment: Mapping[str, str]) -> list[str]:
    """Return the folders of PYTHONPATH but those where Python looks without it."""
    given = environment.get("PYTHONPATH", "").split(os.pathsep)
    own = set(map(os.path.abspath, (*site.getsitepackages(), *sysconfig.get_paths().values())))
    return [path for one in given if one and (path := os.path.abspath(one)) not in own]


def inside(path: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return where the worker looks: Python's path without the `others`, and without the folder
    that this process was started in."""
    without = {*others, os.getcwd()}
    return [one for one in path if one and os.path.abspath(one) not in without]


def found(name: str, path: Iterable[str]) -> str | None:
    """Return the file of a module that is found in `path`, without importing it."""
    spec = PathFinder.find_spec(name, list(path))
    return spec.origin if spec is not None else None


def utf8_locale(environment: Mapping[str, str]) -> str | None:
    """Return a locale of UTF-8 that this system has; None where it has none that is known, or needs
    none (macOS spells all paths so)."""
    if sys.platform == "darwin":
        return None
    former = locale.setlocale(locale.LC_CTYPE)
    own = next((environment[k] for k in ("LC_ALL", "LC_CTYPE", "LANG") if environment.get(k)), "")
    try:
        for name in (*_LOCALES, own):
            try:
                locale.setlocale(locale.LC_CTYPE, name)
            except locale.Error:
                continue
            if locale.nl_langinfo(locale.CODESET) == "UTF-8":
                return name or None
    finally:
        locale.setlocale(locale.LC_CTYPE, former)
    return None


def check_spelling(paths: Iterable[Path], spelling: str | None) -> None:
    """Refuse paths that Java could not read.

    Raises:
        ServerError: there is no locale of UTF-8, and a path outside ASCII.
    """
    if spelling is not None or sys.platform == "darwin":
        return
    for path in paths:
        if not str(path).isascii():
            raise ServerError(
                f"path {path} is not ASCII, and this system has no locale of UTF-8 "
                f"({' or '.join(_LOCALES)}) in which Java could read it: install one, or choose "
                "another path"
            )
