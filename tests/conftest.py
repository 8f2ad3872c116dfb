"""A toy language that is learnt in a minute: digit strings, translated by reading them backwards.

The run is made once for the whole session, by the verbs a user would type; and one TorchServe
serves its archive to every test that asks for `server`.
"""

import contextlib
import http.client
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil  # comes with torchserve
import pytest
import torch
from hypothesis import HealthCheck, settings
from tiny_run import LETTERS, StraightRuns, Tiny

from handler.decoding import native
from model.native import NoCompiler, build
from server.torchserve import ServerOptions, TorchServe
from training.export import LIBRARIES
from training.prepare import prepare
from training.recipe import Recipe, load
from training.run import Run

ROOT = Path(__file__).resolve().parent.parent
# How long an example takes depends on what else the machine does.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

GUARD_SECONDS = 120  # against a hang; no statement about speed
JSON = {"Content-Type": "application/json"}
TEXT = {"Content-Type": "text/plain"}
PREDICT = "/predictions/seq2seq"

# Lines that show nothing, each of which is a blank line; and what may be inside of others.
INVISIBLE = [
    "", " ", "   ", "\t", "\u200b", "\u200e", "\ufeff", "\u00ad", "\x1a", "\u2028", "\u2029",
    "\x85", "\x0c", "\x0b", "\x1c", "\0", "\r", "\r\r", "\u2581", "\u3000", "\u180e", "\u202e",
    "\u2060", "\u3164", "\ufe0f", " \u200b\t\ufeff ",
]  # fmt: skip
INVISIBLE_IN_A_LINE = (
    "\u200b\u200e\ufeff\u00ad\x1a\u2028\u2029\x85\x0c\x0b\x1c\x1d\0\r\u2581\u3000\u202e"
)

RECIPE = """\
name: toy
data:
  train: {source: train.src, target: train.tgt}
  validation: {source: validation.src, target: validation.tgt}
  test: {source: test.src, target: test.tgt}
tokenizer: {algorithm: bpe, source_vocabulary: 271, target_vocabulary: 271}
model:
  kind: attention
  embedding_size: 32
  encoder_hidden_size: 48
  decoder_hidden_size: 64
  attention_size: 48
training:
  epochs: 6
  batch_tokens: 600
  learning_rate: 0.004
  schedule: linear
  warmup_steps: 50
  validate_every: 300
export: {max_source_length: 64, max_target_length: 64}
"""


@pytest.fixture(scope="session")
def native_library() -> Path | None:
    """The native operators, compiled and in use; None on a machine that has none."""
    try:
        library = build(LIBRARIES, native.library())
    except NoCompiler as error:
        warnings.warn(f"without native operators: {error}", stacklevel=1)
        return None
    return library if native.enable(LIBRARIES) else None


@pytest.fixture(params=["avx2", "avx512", "amx"])
def kernels(request, native_library):
    """Each kind of kernels that this processor has, in use for a test."""
    if native_library is None:
        pytest.skip("no native operators on this machine")
    fastest = native.enabled()
    if torch.ops.seq2serve.use(request.param) != request.param:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    torch.ops.seq2serve.use(fastest)


def digits(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [
        "".join(draw.choice("0123456789") for _ in range(draw.randint(3, 8)))
        for _ in range(count)
    ]


def backwards(text: str) -> str:
    return text[::-1]


def write_toy_text(folder: Path, pairs: int = 20000) -> None:
    """Text of the toy language; no source of one set is in another."""
    seen: set[str] = set()
    for name, count, seed in (("test", 200, 1), ("validation", 200, 2), ("train", pairs, 3)):
        lines = [one for one in digits(count, seed) if one not in seen]
        seen |= set(lines)
        (folder / f"{name}.src").write_text("".join(f"{one}\n" for one in lines))
        (folder / f"{name}.tgt").write_text("".join(f"{backwards(one)}\n" for one in lines))


def run_verb(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    """`python -m training ...` as a user types it."""
    command = [sys.executable, "-m", "training", *map(str, arguments)]
    # Threads that share a core with others wait for each other longer than a toy computes.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, text=True, capture_output=True, timeout=600, check=False,
        env=environment, **options,
    )


@dataclass(frozen=True)
class Toy:
    """A finished run of the toy language."""

    recipe_file: Path
    recipe: Recipe
    run: Run
    store: Path  # holds seq2seq.mar


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    folder = tmp_path_factory.mktemp("toy")
    write_toy_text(folder)
    recipe_file = folder / "toy.yaml"
    recipe_file.write_text(RECIPE)
    run, store = folder / "run", folder / "store"
    for verb in ("prepare", "train", "evaluate", "export", "archive"):
        more = ("--store", store) if verb == "archive" else ()
        done = run_verb(verb, recipe_file, "--run", run, *more)
        assert done.returncode == 0, f"{verb}: {done.stderr}"
    return Toy(recipe_file, load(recipe_file), Run(run), store)


# Tiny runs: see tiny_run


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of floats may depend on the number of threads, and other tests set it."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Text and what the verb prepare made of it."""
    folder = tmp_path_factory.mktemp("tiny") / "prepared"
    folder.mkdir()
    write_toy_text(folder, pairs=240)
    for name in ("train", "validation", "test"):
        for side in ("src", "tgt"):
            path = folder / f"{name}.{side}"
            lines = path.read_text().translate(LETTERS).splitlines(keepends=True)
            path.write_text("".join(lines if name == "train" else lines[:12]))
    tiny = Tiny(folder / "tiny.yaml", Run(folder / "run")).of_kind("attention")
    prepare(load(tiny.file), tiny.run.root)
    return tiny


@pytest.fixture
def tiny(prepared: Tiny, tmp_path: Path) -> Tiny:
    return prepared.copy(tmp_path / "tiny")


@pytest.fixture(scope="session")
def straight(prepared: Tiny, tmp_path_factory: pytest.TempPathFactory) -> StraightRuns:
    return StraightRuns(prepared, tmp_path_factory.mktemp("straight"))


# The server


def options(store: Path, *models: str) -> ServerOptions:
    return ServerOptions(
        model_store=store,
        models=models or ("seq2seq=seq2seq.mar",),
        port=0,
        management_port=0,
        metrics_port=0,
        startup_timeout=GUARD_SECONDS,
    )


@dataclass(frozen=True)
class Reply:
    status: int
    content_type: str
    body: bytes
    retry_after: str | None = None

    @property
    def json(self) -> Any:
        assert self.content_type == "application/json"
        return json.loads(self.body)

    @property
    def texts(self) -> list[str]:
        assert self.status == 200, self
        return [one[0]["text"] for one in self.json["translations"]]

    @property
    def error(self) -> tuple[int, str]:
        """Status and type of an error in the shape of the contract."""
        answer = self.json
        assert list(answer) == ["code", "type", "message"]
        assert answer["code"] == self.status
        assert answer["message"]
        return self.status, answer["type"]


def connected(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(url).netloc, timeout=GUARD_SECONDS)


def raw(
    server: TorchServe,
    body: bytes | None,
    headers: dict[str, str],
    method: str = "POST",
    path: str = PREDICT,
) -> Reply:
    """A request with just these headers."""
    with closing(connected(server.url)) as connection:
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        kind, retry = (reply.getheader(one) for one in ("Content-Type", "Retry-After"))
        return Reply(reply.status, kind or "", reply.read(), retry)


def call(
    server: TorchServe, path: str = PREDICT, body: Any = None, headers: dict[str, str] = JSON
) -> Reply:
    """A POST of `body`, which is bytes or becomes JSON; a GET without one."""
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return raw(server, body, headers, "GET" if body is None else "POST", path)


def child_of(pid: int, words: str) -> psutil.Process | None:
    """The first child whose command has these words: of a server, Java or HAProxy."""
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(pid).children()
        return next((one for one in children if words in " ".join(one.cmdline())), None)
    return None


JAVA, HAPROXY = "org.pytorch.serve.ModelServer", "haproxy -db"


def versions(server: TorchServe) -> list[dict[str, Any]]:
    with closing(connected(server.management_url)) as connection:
        connection.request("GET", "/models/seq2seq/all")
        return json.load(connection.getresponse())


def workers(server: TorchServe) -> list[int]:
    return [worker["pid"] for version in versions(server) for worker in version["workers"]]


@pytest.fixture(scope="session")
def running(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    """A server whose store holds the archive alone, started where the repository is not."""
    store = tmp_path_factory.mktemp("alone")
    shutil.copy(toy.store / "seq2seq.mar", store)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        server = TorchServe(options(store))
        server.start()
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture
def server(running: TorchServe) -> Iterator[TorchServe]:
    """The server of the session; after every test its worker is the process that it was, and
    answers."""
    before = workers(running)
    yield running
    assert workers(running) == before
    assert len(call(running, body={"text": "12"}).texts) == 1
