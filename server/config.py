"""Is config.properties one that TorchServe understands, and lets itself be overridden?"""

from __future__ import annotations

import difflib
import re
import zipfile
from pathlib import Path

from server.errors import ServerError

READER = "org/pytorch/serve/util/ConfigManager.class"
# A string constant of a class: its kind, 1, its length in two bytes, and its text.
CONSTANT = re.compile(rb"\x01\x00(.)([a-z_]+)", re.DOTALL)


def check_config(config: Path, home: Path) -> None:
    """Refuse a configuration under which a server would not do what it is told to.

    Args:
        home: the folder of TorchServe's package.

    Raises:
        ServerError: it cannot be read, has a key that TorchServe would pass over in silence, or
            lets ports and addresses not be set.
    """
    try:
        text = config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ServerError(
            f"configuration {config} cannot be read ({error}): restore it, or name another"
        ) from error
    known = known_keys(home)
    for key in re.findall(r"^[ \t]*([^#!\s=:]+)[ \t]*=", text, re.MULTILINE):
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), 1)
            meant = f"write {near[0]}, or remove the line" if near else "remove the line"
            raise ServerError(
                f"configuration {config} has {key}, which TorchServe ignores: {meant}"
            )
    if re.search(r"^\s*enable_envvars_config\s*=\s*true\s*$", text, re.MULTILINE) is None:
        raise ServerError(
            f"configuration {config} lacks enable_envvars_config=true, without which ports and "
            "addresses cannot be set: add that line"
        )


def known_keys(home: Path) -> set[str]:
    """Strings of TorchServe's own reader, among which are all keys that it asks for."""
    with zipfile.ZipFile(home / "ts" / "frontend" / "model-server.jar") as jar:
        found = CONSTANT.findall(jar.read(READER))
    return {text[: length[0]].decode() for length, text in found if length[0] <= len(text)}
