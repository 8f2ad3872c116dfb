"""What TorchServe loads of an archive. It sees to it that what was checked is what runs.

TorchServe 0.12 puts PYTHONPATH before the archive on the worker's path, so a folder there with a
`handler/` or a `yaml.py` would be imported in their places. Here the archive goes first and
PYTHONPATH last, and the code is checked before it is imported.
"""

import ctypes
import os
import signal
import sys
from importlib.machinery import PathFinder
from pathlib import Path

PDEATHSIG = 1  # of prctl(2)
FOLDER = str(Path(__file__).resolve().parent)


def die_with_parent() -> None:
    """Have the kernel kill this worker when the frontend dies, also while it loads or decodes. It
    looks at the frontend's thread that started the worker, which waits for the worker's end."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def outside() -> list[str]:
    """The folders of PYTHONPATH but the archive's."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [os.path.abspath(one) for one in given if one and os.path.realpath(one) != FOLDER]


def arrange() -> None:
    """The archive is looked at first, and PYTHONPATH last: what is found nowhere else may come
    from there."""
    others = outside()
    kept = [one for one in sys.path if one != FOLDER and os.path.abspath(one) not in others]
    sys.path[:] = [FOLDER, *kept, *others]


def refuse_shadowed() -> None:
    """Refuse what was imported before this module, and would be another file now.

    Raises:
        RuntimeError: the module by its name. (For an ImportError TorchServe looks elsewhere.)
    """
    others = outside()
    for name, module in list(sys.modules.items()):
        origin = getattr(getattr(module, "__spec__", None), "origin", None)
        if "." in name or not isinstance(origin, str) or not os.path.isabs(origin):
            continue
        # A package's is its __init__.py, a folder further down.
        if not {os.path.dirname(origin), os.path.dirname(os.path.dirname(origin))} & set(others):
            continue
        found = PathFinder.find_spec(name, sys.path)
        if found is not None and found.origin is not None and found.origin != origin:
            raise RuntimeError(
                f"module {name} was imported from {origin}, which PYTHONPATH puts before "
                f"{found.origin}: start TorchServe without PYTHONPATH"
            )


die_with_parent()
arrange()
refuse_shadowed()
# Bytecode beside the code would be files that no digest lists.
sys.dont_write_bytecode = True

from handler.integrity import refuse_unlisted, verify_digests  # noqa: E402

refuse_unlisted(Path(FOLDER))
verify_digests(Path(FOLDER), ".py")

from handler.seq2seq_handler import Seq2SeqHandler  # noqa: E402


class Handler(Seq2SeqHandler):
    """The one class that TorchServe's loader wants in the module that it loads."""
