"""The init container that brings a model, against a bucket and a metadata server made here."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest
from k8s_tools import K8S

SCRIPT = K8S / "components" / "model-from-gcs" / "fetch.py"
MODEL = bytes(range(256)) * 5000
DIGEST = hashlib.sha256(MODEL).hexdigest()
OBJECT = f"models/seq2seq-{DIGEST}.mar"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Cloud:
    """What is served, what goes wrong first, and what was asked."""

    url: str = ""
    content: bytes = MODEL
    first: list[int] = field(default_factory=list)  # statuses before any answer; 0: breaks off
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    state = Cloud()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(unquote(self.path))
            if self.path.startswith("/computeMetadata"):
                assert self.headers["Metadata-Flavor"] == "Google"
                self.answer(200, b'{"access_token": "secret", "expires_in": 3599}')
            elif state.first:
                self.answer(state.first.pop(0), b"")
            elif self.headers["Authorization"] != "Bearer secret":
                self.answer(403, b"")
            elif unquote(self.path) != f"/storage/v1/b/bucket/o/{OBJECT}?alt=media":
                self.answer(404, b"")
            else:
                self.answer(200, state.content)

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status or 200)
            self.send_header("Content-Length", str(len(body) if status else len(MODEL)))
            self.end_headers()
            self.wfile.write(body if status else MODEL[:1000])

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()


def variables(cloud: Cloud, store: Path, **changes: str) -> dict[str, str]:
    return {
        "SEQ2SERVE_MODEL_URI": f"gs://bucket/{OBJECT}",
        "SEQ2SERVE_SHA256": DIGEST,
        "SEQ2SERVE_MODEL_STORE": str(store),
        "SEQ2SERVE_METADATA_URL": cloud.url,
        "SEQ2SERVE_STORAGE_URL": cloud.url,
        **changes,
    }


def test_brings_the_archive_and_its_digest(
    script: ModuleType, cloud: Cloud, tmp_path: Path
) -> None:
    archive = script.fetch(variables(cloud, tmp_path))
    assert archive.read_bytes() == MODEL
    assert (tmp_path / "seq2seq.mar.sha256").read_text() == f"{DIGEST}  seq2seq.mar\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seq2seq.mar", "seq2seq.mar.sha256"]


def test_a_container_that_starts_again_asks_nobody(
    script: ModuleType, cloud: Cloud, tmp_path: Path
) -> None:
    script.fetch(variables(cloud, tmp_path))
    cloud.asked.clear()
    script.fetch(variables(cloud, tmp_path))
    assert not cloud.asked


def test_another_archive_is_replaced(script: ModuleType, cloud: Cloud, tmp_path: Path) -> None:
    (tmp_path / "seq2seq.mar").write_bytes(b"old")
    assert script.fetch(variables(cloud, tmp_path)).read_bytes() == MODEL


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_wrong_digest_leaves_no_archive(
    old: bytes | None, script: ModuleType, cloud: Cloud, tmp_path: Path
) -> None:
    if old:
        (tmp_path / "seq2seq.mar").write_bytes(old)
    cloud.content = MODEL[:-1] + b"x"
    with pytest.raises(script.FetchError, match=f"wanted is {DIGEST}"):
        script.fetch(variables(cloud, tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("first", [[503], [401, 429, 500], [0], [0, 503, 0]])
def test_what_passes_is_tried_again(
    first: list[int], script: ModuleType, cloud: Cloud, tmp_path: Path
) -> None:
    cloud.first = first
    assert script.fetch(variables(cloud, tmp_path), pause=0).read_bytes() == MODEL


@pytest.mark.parametrize("status", [403, 404])
def test_what_does_not_pass_is_told_at_once(
    status: int, script: ModuleType, cloud: Cloud, tmp_path: Path
) -> None:
    cloud.first = [status] * script.TRIES
    with pytest.raises(script.FetchError, match=str(status)):
        script.fetch(variables(cloud, tmp_path), pause=0)
    assert len(cloud.first) == script.TRIES - 1
    assert not (tmp_path / "seq2seq.mar").exists()


def test_tries_end(script: ModuleType, cloud: Cloud, tmp_path: Path) -> None:
    cloud.first = [503] * (script.TRIES + 1)
    with pytest.raises(script.FetchError, match="503"):
        script.fetch(variables(cloud, tmp_path), pause=0)
    assert len(cloud.first) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SEQ2SERVE_MODEL_URI", "s3://bucket/a.mar"),
        ("SEQ2SERVE_MODEL_URI", "gs://bucket"),
        ("SEQ2SERVE_SHA256", ""),
        ("SEQ2SERVE_SHA256", "from environment.yaml"),
    ],
)
def test_a_malformed_variable_is_named(
    name: str, value: str, script: ModuleType, cloud: Cloud, tmp_path: Path
) -> None:
    with pytest.raises(script.FetchError, match=name):
        script.fetch(variables(cloud, tmp_path, **{name: value}))
    assert not cloud.asked


def test_as_the_container_runs_it(cloud: Cloud, tmp_path: Path) -> None:
    for wanted, status in ((DIGEST, 0), ("0" * 64, 1)):
        given = variables(cloud, tmp_path, SEQ2SERVE_SHA256=wanted)
        done = subprocess.run(
            [sys.executable, "-I", str(SCRIPT)],
            env=given,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stderr
        assert ("seq2seq.mar" if status == 0 else "wanted is") in (done.stdout + done.stderr)
