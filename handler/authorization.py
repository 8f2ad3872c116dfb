"""Bearer tokens (RFC 6750), one in each file of a folder, such as a mounted Kubernetes Secret.

Several files are several tokens that are valid at once. To replace one: add the new, let clients
change, take the old one out. The folder is looked at again while the service runs.

The first line of a file is the token; further ones may say what its client may have, see `Terms`:

    0123456789abcdef
    share: 2
    most_waiting: 1000
"""

import hashlib
import hmac
import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from handler.fields import read

logger = logging.getLogger(__name__)

VARIABLE = "SEQ2SERVE_TOKENS"  # names the folder; without it every request is served
SHORTEST = 16  # characters: with 6 bits each 96 bits, more than can be tried out over a network
INTERVAL = 1.0  # seconds between two looks at the folder, at least
# What a header can carry as a token: token68 of RFC 9110, section 11.2.
_TOKEN = r"[A-Za-z0-9._~+/-]+=*"
_BEARER = re.compile(rf"bearer +({_TOKEN})", re.IGNORECASE)  # the scheme's case is the client's

State = list[tuple[str, int, int, int, int]]


@dataclass(frozen=True)
class Terms:
    """What a client may have, a line `name: value` each of its token's file.

    share: of decoding beside others: one with 2 has twice the rows of one with 1, while both wait.
    most_waiting: sentences that may wait for rows; requests beyond get 429. Null: as many as all
        together may.
    """

    share: float = field(default=1.0, metadata={"minimum": 0.01, "maximum": 100.0})
    most_waiting: int | None = field(default=None, metadata={"minimum": 1})


@dataclass(frozen=True)
class Client:
    """Whoever shows a token; `name` is its file's. Without tokens all are one client."""

    name: str = ""
    terms: Terms = Terms()


ANYBODY = Client()


class Tokens:
    """The tokens that are valid now.

    Args:
        folder: of the files. Names that begin with a dot are none of them: Kubernetes keeps the
            files of a Secret in `..data`, a link that it replaces at once for all, and links to
            them from the folder.
        clock: seconds.

    Raises:
        ValueError: there is no token.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder = folder
        self.clock = clock
        self.looked = clock()
        self.state = self.seen()
        self.clients, wrong = self.read(self.state)  # by the digest of its token
        if not self.clients:
            found = f" ({'; '.join(wrong)})" if wrong else ""
            raise ValueError(
                f"{VARIABLE}: got {str(folder)!r}; allowed: a folder with a token in each file, "
                f"which this one does not have{found}; unset it to serve everybody"
            )
        tell_wrong(wrong)

    @classmethod
    def named(cls, environment: Mapping[str, str] = os.environ) -> "Tokens | None":
        """Those of the folder that `SEQ2SERVE_TOKENS` names, None where it is not set."""
        name = environment.get(VARIABLE)
        if name == "":
            # A path of no characters would be the folder that the process happens to be in.
            raise ValueError(f"{VARIABLE}: got ''; allowed: a folder of tokens, or not set at all")
        return None if name is None else cls(Path(name).absolute())

    def admit(self, headers: Sequence[str]) -> Client | None:
        """Whose valid token a request with these values of `Authorization` shows, if one.

        Two of them are a request that proxies may read differently, and none is admitted.
        """
        self.renew()
        found = _BEARER.fullmatch(headers[0].strip()) if len(headers) == 1 else None
        given = digest(found[1] if found else "")  # of no token: all have characters
        # All are compared, whichever is equal: the time that takes tells nothing of them.
        equal = [hmac.compare_digest(given, one) for one, _ in self.clients]
        return next((client for same, (_, client) in zip(equal, self.clients) if same), None)

    def renew(self) -> None:
        """Read the tokens again where the folder has changed, with a look once in `INTERVAL`."""
        now = self.clock()
        if now - self.looked < INTERVAL:
            return
        self.looked = now
        state = self.seen()
        if state != self.state:
            self.clients, wrong = self.read(state)
            self.state = state
            tell_wrong(wrong)
            logger.warning("%d tokens are valid now", len(self.clients))

    def seen(self) -> State:
        """What tells whether the files are those that were read; links are followed."""
        found: State = []
        try:
            names = sorted(os.listdir(self.folder))
        except OSError:
            return found
        for name in names:
            if name.startswith("."):
                continue
            try:
                at = os.stat(self.folder / name)
            except OSError:
                continue  # a link that Kubernetes is about to remove
            found.append((name, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns))
        return found

    def read(self, state: State) -> tuple[list[tuple[bytes, Client]], list[str]]:
        """A digest of each token and whose it is, and what is wrong with the other files. Those are
        left out: the others, and that one of them was taken out, hold nevertheless."""
        found: list[tuple[bytes, Client]] = []
        wrong: list[str] = []
        for name, *_ in state:
            try:
                content = (self.folder / name).read_bytes()
                found.append(of_file(name, content.decode("ascii", "replace")))
            except (OSError, ValueError) as error:
                wrong.append(str(error))
        return found, wrong


def tell_wrong(files: Sequence[str]) -> None:
    for one in files:
        logger.error("a token is left out: %s", one)


def of_file(name: str, content: str) -> tuple[bytes, Client]:
    """The digest of the token in a file, and its client.

    Raises:
        ValueError: the file is not as it should be. The message does not tell what could be a
            token.
    """
    token, *lines = [line.rstrip("\r") for line in content.split("\n")]
    if len(token) < SHORTEST or not re.fullmatch(_TOKEN, token):
        raise ValueError(
            f"{VARIABLE}: {name} has {len(token)} characters; allowed: at least {SHORTEST}, of "
            "letters, digits and '._~+/-'"
        )
    given: dict[str, object] = {}
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        key, colon, words = line.partition(":")
        key = key.strip()
        if not colon or key in given:
            raise ValueError(
                f"{VARIABLE}: {name}: line {number} has {len(line)} characters; allowed: lines "
                "'share: NUMBER' and 'most_waiting: NUMBER', each once"
            )
        given[key] = value_in(words.strip())
    try:
        return digest(token), Client(name, read(Terms, given, name))
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from None


def value_in(words: str) -> object:
    """A number or null as JSON has it; anything else as it is, for an error that names it."""
    try:
        return json.loads(words)
    except (ValueError, RecursionError):
        return words


def digest(token: str) -> bytes:
    """Digests are of equal length, so that comparing them does not tell the length of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
