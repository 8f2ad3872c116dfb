"""What only a GPU can show: steps are recorded, their replays are what a CPU computes, and nobody
waits for the device but who reads. Neither TorchServe nor its packages are needed."""

import logging
import random
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from table_model import EOS, decode
from test_laws import assert_nothing_is_held, assert_same
from test_model import VOCABULARY, build, read, sentences

from bench.gpu.models import gnmt
from bench.gpu.step import measured
from handler.decoding import DecodingOptions, Engine, kernels
from handler.decoding.cuda_runner import CudaRunner
from handler.decoding.graphs import CudaGraphs
from handler.decoding.model import load
from handler.decoding.scheduler import Plan
from handler.decoding.sentence import Sentence
from model import Network, ServingModel
from model.serving import scripted

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ROOT = Path(__file__).resolve().parent.parent
NAMES = ["sutskever", "attention with every option", "mixed ensemble"]
READY = 20  # seconds
MOST_KERNELS = {1: 25, 5: 35}
LOGGERS = ("no graph", "no kernels")  # what no test should hear


@pytest.fixture
def device():
    return torch.device("cuda", 0)


def loaded(model, device, folder, weights=None):
    path = folder / "model.pt"
    scripted(model).save(str(path))
    return load(str(path), device, weights)


def some_sources(count, longest=40, seed=1):
    draw = random.Random(seed)
    return [[draw.randrange(4, VOCABULARY) for _ in range(draw.randint(0, longest - 1))] + [EOS]
            for _ in range(count)]  # fmt: skip


def assert_recorded(engine, caplog):
    """Every step of the grid is a graph, of kernels of our own."""
    replays = [one for lane in engine.runner.static.values() for one in lane.replays.values()]
    assert replays
    assert not any(isinstance(one, partial) for one in replays)
    told = [record.getMessage() for record in caplog.records]
    assert not [one for one in told if one.startswith(LOGGERS)]


# What is computed


@pytest.mark.parametrize("beam_size", [1, 3, 5])
@pytest.mark.parametrize("name", NAMES)
def test_replays_give_the_sentences_of_a_cpu(name, beam_size, device, tmp_path, caplog):
    """In double precision, where sums in another order change no token. A beam of 3 is computed
    kernel by kernel, and so is attention that is read."""
    model = build(name)
    options = DecodingOptions(
        beam_size=beam_size, n_best=beam_size, return_scores=True, max_length=12,
        return_alignments=model.has_attention and beam_size == 3,
    )  # fmt: skip
    sources = some_sources(30, seed=beam_size)
    expected = decode(Engine(model, 20), sources, options)
    with caplog.at_level(logging.WARNING):
        engine = Engine(loaded(model, device, tmp_path), 20, device)
        found = decode(engine, sources, options)
    for mine, other in zip(found, expected, strict=True):
        assert_same(mine, other, 1e-4)
    assert_recorded(engine, caplog)
    assert_nothing_is_held(engine)


def test_newcomers_are_encoded_beside_steps_that_are_under_way(device, tmp_path):
    """Waves of sentences of two widths, some of which are cancelled; encoding is on a stream of its
    own, and what it makes is read by steps and given back meanwhile."""
    model = build("attention with every option")
    engine = Engine(loaded(model, device, tmp_path), 24, device)
    reference = Engine(model, 24)
    draw = random.Random(3)
    asked, ended, gone = {}, {}, set()
    for _ in range(30):
        for source in some_sources(draw.randint(0, 6), seed=draw.random()):
            options = DecodingOptions(beam_size=draw.choice([1, 5]), max_length=draw.randint(1, 25))
            asked[engine.admit(source, options)] = source, options
        ended |= {one.sentence: one for one in engine.advance(draw.randint(1, 6))}
        live = [one for one in asked if one not in ended and one not in gone]
        if live and draw.random() < 0.4:
            gone.add(live[0])
            engine.cancel(live[0])
    while not engine.idle:
        ended |= {one.sentence: one for one in engine.advance()}
    assert set(ended) == set(asked) - gone
    for one, event in ended.items():
        source, options = asked[one]
        (expected,) = decode(reference, [source], options)
        assert_same(event, expected, 1e-4)
    assert_nothing_is_held(engine)


@pytest.mark.parametrize(("weights", "most"), [(None, 1e-4), ("float16", 0.02), ("bfloat16", 0.1)])
def test_logits_are_those_of_a_cpu_in_single_precision(weights, most, device, tmp_path):
    model = build("attention with every option").float()
    source, lengths = sentences(3, 6, 9)
    choices = torch.randint(4, VOCABULARY, (3, 6, 2))
    expected = read(model, source, lengths, choices)[0]
    there = loaded(model, device, tmp_path, weights)
    logits = read(there, source.to(device), lengths.to(device), choices.to(device))[0].cpu()
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().mean() / expected.abs().mean() < most


@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("weights", [None, "float16", "bfloat16"])
def test_steps_of_a_sentence_alone_are_those_in_company(weights, width, device, tmp_path):
    """To the bit, as every runner says of itself; of sentences that were encoded together, as
    cuDNN promises nothing. How many come out alike with their encoding, `bench.gpu check` tells."""
    model = loaded(build("attention with every option").float(), device, tmp_path, weights)
    runner = CudaRunner(model, device, time.monotonic, 80)
    assert runner.invariant
    options = DecodingOptions(beam_size=width, n_best=width, max_length=20, return_scores=True)
    members = [Sentence(i, one, options, 20, []) for i, one in enumerate(some_sources(16))]
    ids = [one.id for one in members]

    def decoded(some):
        """What becomes of these of all that were encoded."""
        with torch.inference_mode():
            assert not runner.apply(Plan(encode=members, enter=some)).events
            events = [one for _ in range(9) for one in runner.run(4).events]
            runner.apply(Plan(drop=ids))
        assert sorted(one.sentence for one in events) == some
        return {one.sentence: one.results for one in events}

    together = decoded(ids)
    for one in ids:
        assert decoded([one]) == {one: together[one]}


class Waiting:
    """A model whose step reads a number on the host, which no graph may."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def step(self, previous, state, memory):
        state[0].sum().item()
        return self.model.step(previous, state, memory)


def test_a_step_that_cannot_be_recorded_is_computed(device, tmp_path, caplog):
    """Each size is told once, and the device records others as before."""
    model = build("attention")
    there = loaded(model, device, tmp_path)
    sources = [[5, 6, EOS], [7, EOS]]
    options = DecodingOptions(max_length=9)
    with caplog.at_level(logging.WARNING):
        engine = Engine(Waiting(there), 4, device)
        found = decode(engine, sources, options)
    for mine, other in zip(found, decode(Engine(model, 4), sources, options), strict=True):
        assert_same(mine, other, 1e-4)
    told = [one for one in caplog.records if one.getMessage().startswith("no graph")]
    assert len(told) == sum(len(lane.replays) for lane in engine.runner.static.values())
    caplog.clear()
    assert_recorded(Engine(there, 4, device), caplog)


# Nobody waits


def counted(monkeypatch, calls, owner, name):
    """Note each call of `owner.name`."""
    before = getattr(owner, name)

    def counting(*arguments, **named):
        calls.append(name)
        return before(*arguments, **named)

    monkeypatch.setattr(owner, name, counting)


def test_while_clients_wait_nothing_is_recorded_compiled_or_given_back(
    device, tmp_path, monkeypatch
):
    """Nor is the whole device waited for; nor does memory grow."""
    engine = Engine(loaded(build("attention"), device, tmp_path), 24, device)
    searches = [
        DecodingOptions(max_length=12), DecodingOptions(beam_size=5, max_length=12),
        DecodingOptions(beam_size=3, max_length=12),
        DecodingOptions(sampling=True, top_p=0.9, seed=1, max_length=12),
    ]  # fmt: skip
    for options in searches:
        decode(engine, some_sources(30), options)
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    calls = []
    for owner, name in ((torch.cuda, "synchronize"), (torch.cuda, "empty_cache"),
                        (CudaGraphs, "record"), (kernels.cuda, "load"),
                        (kernels.cuda, "compiled")):  # fmt: skip
        counted(monkeypatch, calls, owner, name)
    for options in searches:
        decode(engine, some_sources(30), options)
    assert calls == []
    monkeypatch.undo()
    torch.cuda.synchronize(device)
    assert torch.cuda.memory_allocated(device) == held


def test_recorded_steps_wait_for_nothing(device, tmp_path):
    """Torch raises where it would wait for the device. Encoding does, on a stream of its own."""
    model = loaded(build("attention"), device, tmp_path)
    runner = CudaRunner(model, device, time.monotonic, 24)

    def some(first, count, width):
        options = DecodingOptions(beam_size=width, min_length=30, max_length=30)
        return [Sentence(first + i, [5, 6 + i, EOS], options, 30, []) for i in range(count)]

    with torch.inference_mode():
        early, late = [*some(0, 6, 1), *some(6, 2, 5)], some(20, 4, 1)
        assert not runner.apply(Plan(encode=[*early, *late])).events
        with warnings.catch_warnings():  # that it is a prototype
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        try:
            events = runner.apply(Plan(enter=[one.id for one in early])).events
            events += runner.run(4).events
            events += runner.apply(Plan(drop=[0, 6], enter=[one.id for one in late])).events
            for _ in range(3):
                events += runner.run(4).events
            events += runner.apply(Plan(drop=[1, 2, 3, 4, 5, 7])).events
            events += runner.run(4).events
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [(one.sentence, one.error) for one in events] == []


def test_ready_within_seconds(device, tmp_path, caplog):
    """Reading, compiling and recording, each told in the log."""
    with caplog.at_level(logging.INFO):
        started = time.perf_counter()
        engine = Engine(loaded(build("attention"), device, tmp_path), 1024, device)
        spent = time.perf_counter() - started
    told = "\n".join(record.getMessage() for record in caplog.records)
    lanes = engine.runner.static.values()
    count = sum(len(lane.grid.sentences) * len(lane.grid.sources) for lane in lanes)
    assert f"{count} steps recorded in " in told
    assert "kernels compiled in " in told
    print(f"ready after {spent:.1f} s:\n{told}")
    assert spent < READY


LOST = """
import os, sys
import torch
from handler.decoding import DecodingOptions, Engine
from handler.decoding.failures import DeviceLost
from handler.decoding.model import load

device = torch.device("cuda", 0)
engine = Engine(load(sys.argv[1], device), 4, device)
engine.admit([5, 3], DecodingOptions(max_length=30, min_length=30))
engine.advance(4)
torch.zeros(2, device=device)[torch.tensor([9], device=device)]  # stops all that follows
try:
    while not engine.idle:
        engine.advance(4)
except DeviceLost as error:
    print(error, flush=True)
    os._exit(7)
os._exit(0)
"""


def test_a_device_that_is_lost_ends_the_process(tmp_path):
    """In one of its own, as nothing can be computed in it any more."""
    scripted(build("attention").float()).save(str(tmp_path / "model.pt"))
    done = subprocess.run([sys.executable, "-c", LOST, str(tmp_path / "model.pt")], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 7, done.stderr[-2000:]
    assert "CUDA error" in done.stdout


# How much is computed


@pytest.mark.parametrize("beam_size", [1, 5])
def test_a_replay_is_few_kernels(device, tmp_path, beam_size):
    """Of four layers in float16, counted by the profiler."""
    options = gnmt("4x512")
    model = loaded(ServingModel(Network(options, 8000, 8000), 64, 64), device, tmp_path, "float16")
    found = measured(model, device, 16, beam_size, 320)
    print(f"{found['ms']:.3f} ms, gaps {found['gaps']:.0%}, {found['names']}")
    assert not found["tiled"]
    assert found["kernels"] <= MOST_KERNELS[beam_size], found["names"]
