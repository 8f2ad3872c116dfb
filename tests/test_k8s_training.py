"""The steps of a training Job, with stand-ins for Python and torchrun."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from k8s_tools import K8S

STEPS = K8S / "training" / "base" / "steps.sh"
ARCHIVE = b"an archive"
DIGEST = hashlib.sha256(ARCHIVE).hexdigest()
# Tells what it was asked, then does what the verb would leave behind; FAIL names a verb that fails.
STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >> "$LOG"
[ "$1" = -c ] && exit "${GPU:-0}"
verb=''
for word in prepare train evaluate export archive; do
  for given in "$@"; do [ "$given" = "$word" ] && verb=$word; done
done
[ "$verb" = "${FAIL:-none}" ] && exit "${STATUS:-1}"
if [ "$verb" = "${SLOW:-none}" ]; then
  trap 'echo "saved" >> "$LOG"; exit 130' TERM
  echo "slow" >> "$LOG"
  i=0; while [ $i -lt 300 ]; do sleep 0.1; i=$((i + 1)); done
fi
mkdir -p "$RUN/data" "$RUN/archive"
case $verb in
  prepare) touch "$RUN/data/report.json" ;;
  train) touch "$RUN/training.json" ;;
  evaluate) touch "$RUN/scores.json" ;;
  export) touch "$RUN/model.pt" ;;
  archive) printf 'an archive' > "$RUN/archive/seq2seq.mar"
    (cd "$RUN/archive" && sha256sum seq2seq.mar > seq2seq.mar.sha256) ;;
esac
"""


class Pod:
    """A pod of the Job, with the volume that outlives it."""

    def __init__(self, folder: Path) -> None:
        self.log, self.run, self.published = folder / "log", folder / "run", folder / "published"
        programs = folder / "bin"
        programs.mkdir()
        for name in ("python", "torchrun"):
            (programs / name).write_text(STAND_IN)
            (programs / name).chmod(0o755)
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "LOG": str(self.log),
            "RUN": str(self.run),
            "RECIPE": "recipes/dates.yaml",
            "PUBLISH": str(self.published),
            "PUBLISH_URI": "gs://bucket/models",
        }

    def start(self, **changes: str) -> subprocess.Popen[str]:
        self.log.write_text("")
        return subprocess.Popen(
            ["sh", str(STEPS)],
            env=self.environment | changes,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def runs(self, **changes: str) -> tuple[int, str]:
        process = self.start(**changes)
        told, _ = process.communicate(timeout=60)
        return process.returncode, told

    def verbs(self) -> list[str]:
        """What was run: of `python -m training VERB ...` the verb."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return [line[line.index("training") + 1] for line in lines if "training" in line]

    def wait_for(self, word: str) -> None:
        deadline = time.monotonic() + 30
        while word not in self.log.read_text():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


def test_from_text_to_a_published_archive(pod: Pod) -> None:
    status, told = pod.runs(DATA="/bucket/my data", OPTIONS="--set training.seed=2")
    assert status == 0, told
    assert pod.verbs() == ["prepare", "train", "evaluate", "export", "archive"]
    name = f"seq2seq-{DIGEST}.mar"
    assert (pod.published / name).read_bytes() == ARCHIVE
    assert (pod.published / f"{name}.sha256").read_text() == f"{DIGEST}  {name}\n"
    assert sorted(path.name for path in pod.published.iterdir()) == [name, f"{name}.sha256"]
    for line in pod.log.read_text().splitlines():
        assert f"--run {pod.run} --data /bucket/my data --set training.seed=2" in line


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_options_of_training_alone_are_those_of_no_other_verb(nodes: str, pod: Pod) -> None:
    more = "--accept-changes --wandb"
    status, told = pod.runs(TRAIN=more, NODES=nodes, RENDEZVOUS="host:1")
    assert status == 0, told
    lines = pod.log.read_text().splitlines()
    assert [more in line for line in lines if "training" in line] == [
        verb == "train" for verb in pod.verbs()
    ]


def test_what_is_published_can_be_served(pod: Pod) -> None:
    """The lines that it prints are those of a serving overlay's environment.yaml."""
    _, told = pod.runs()
    lines = told[told.index("environment.yaml") :].splitlines()[1:]
    given = yaml.safe_load("\n".join(lines))
    assert given == {
        "model-sha256": DIGEST,
        "model-uri": f"gs://bucket/models/seq2seq-{DIGEST}.mar",
    }
    overlay = yaml.safe_load((K8S / "overlays" / "staging-gke" / "environment.yaml").read_text())
    assert given.keys() <= overlay["data"].keys()


@pytest.mark.parametrize("verb", ["prepare", "train", "evaluate", "export", "archive"])
def test_goes_on_where_another_pod_failed(verb: str, pod: Pod) -> None:
    status, _ = pod.runs(FAIL=verb, STATUS="7")
    assert status == 7
    assert pod.verbs()[-1] == verb
    assert not pod.published.exists()
    status, _ = pod.runs()
    assert status == 0
    assert pod.verbs()[0] == verb


def test_a_preempted_pod_saves_and_the_next_goes_on(pod: Pod) -> None:
    process = pod.start(SLOW="train")
    pod.wait_for("slow")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert "saved" in pod.log.read_text()
    assert pod.verbs() == ["prepare", "train"]
    assert pod.runs()[0] == 0
    assert pod.verbs()[0] == "train"


def test_a_published_archive_stays_as_it_is(pod: Pod) -> None:
    pod.runs()
    (archive,) = pod.published.glob("*.mar")
    before = archive.stat().st_mtime_ns, archive.stat().st_ino
    assert pod.runs()[0] == 0
    assert (archive.stat().st_mtime_ns, archive.stat().st_ino) == before


def test_without_a_gpu_that_is_required_nothing_begins(pod: Pod) -> None:
    status, _ = pod.runs(REQUIRE_GPU="true", GPU="1")
    assert status == 1
    assert pod.verbs() == []
    assert pod.runs(REQUIRE_GPU="true", GPU="0")[0] == 0


def test_several_pods_learn_together(pod: Pod) -> None:
    together = {"NODES": "2", "RENDEZVOUS": "train-0.training:29500"}
    other = Pod.__new__(Pod)
    other.log, other.environment = (
        pod.log.with_name("log1"),
        pod.environment | {"LOG": str(pod.log.with_name("log1"))},
    )
    second = other.start(**together, JOB_COMPLETION_INDEX="1", POLL="0.1")
    status, told = pod.runs(**together, JOB_COMPLETION_INDEX="0")
    assert status == 0, told
    second.communicate(timeout=30)
    assert second.returncode == 0
    assert pod.verbs() == ["prepare", "train", "evaluate", "export", "archive"]
    assert other.verbs() in (["train"], [])  # none where the first had finished before it looked
    line = next(line for line in pod.log.read_text().splitlines() if line.startswith("torchrun"))
    for option in (
        "--nnodes 2",
        "--rdzv-endpoint train-0.training:29500",
        "is_host=true",
        " -m -- training",
    ):
        assert option in line


def test_a_pod_that_is_not_the_first_writes_nothing(pod: Pod) -> None:
    (pod.run / "data").mkdir(parents=True)
    (pod.run / "data" / "report.json").touch()
    status, _ = pod.runs(
        NODES="2", RENDEZVOUS="a:1", JOB_COMPLETION_INDEX="1", FAIL="train", STATUS="3"
    )
    assert status == 3
    assert pod.verbs() == ["train"]
    assert "is_host=false" in pod.log.read_text()
    assert not pod.published.exists()
