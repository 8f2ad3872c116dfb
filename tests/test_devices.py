"""Mixed devices, and waiting for the device, shown without a GPU: what runs on one runs under fake
tensors. See fake_gpu.py for how, and for what that cannot show."""

from collections import Counter

import pytest
import torch
from fake_gpu import GPU, allow_indices, waits, watching
from test_model import KINDS

from handler.decoding import DecodingOptions
from handler.decoding.cuda_runner import CudaRunner
from handler.decoding.graphs import Called
from handler.decoding.lane import Lane
from handler.decoding.model import encode_batch
from handler.decoding.scheduler import Plan
from handler.decoding.sentence import Sentence
from handler.decoding.static_lane import StaticLane
from model import Ensemble, ModelOptions, Network, ServingModel

VOCABULARY, LONGEST, EOS = 71, 40, 3


@pytest.fixture(scope="module")
def indices(tmp_path_factory):
    allow_indices(tmp_path_factory.mktemp("guard"))


@pytest.fixture
def watch(indices, monkeypatch):
    with watching(monkeypatch) as watch:
        yield watch


def network(name, **changed):
    options = ModelOptions(**{**vars(KINDS[name]), **changed})
    return Network(options, VOCABULARY, VOCABULARY).eval()


def model_of(name):
    """On the GPU that is not there."""
    with torch.device(GPU):
        if name == "mixed ensemble":
            parts = ("attention", "sutskever", "attention with every option")
            return Ensemble([ServingModel(network(one), LONGEST, LONGEST) for one in parts])
        return ServingModel(network(name), LONGEST, LONGEST)


NAMES = [*KINDS, "mixed ensemble"]


@pytest.fixture(params=NAMES)
def model(request, watch):
    return model_of(request.param)


def runner_of(model, rows=70):
    return CudaRunner(model, GPU, lambda: 0.0, rows, recorder=Called())


def sentences(count, first=0, **options):
    asked = DecodingOptions(**{"max_length": 9, **options})
    return [Sentence(first + i, [5 + i % 7, 6, EOS], asked, 9, []) for i in range(count)]


def encoded(model, members):
    memory, state = encode_batch(model, [one.source for one in members], GPU)
    return state, memory.attended


# Encoding


def test_an_encoding_waits_for_its_lengths_alone(watch, model):
    """Packing reads lengths on the host, sends the order of rows to the device, and unpacking reads
    it again. This is why a runner encodes on a stream of its own."""
    encoders = len(model.members) if isinstance(model, Ensemble) else 1
    watch.waits.clear()
    with waits(watch) as found:
        memory, state = encode_batch(model, [[5, 6, EOS], [7, EOS]], GPU)
    assert len(watch.waits) == 3 * encoders
    assert {one.partition(":")[0] for one in found} == {"encoding.py"}
    assert {t.device for t in [*memory.attended, *memory.initial, *state]} == {GPU}


# Static steps


@pytest.mark.parametrize("width", [1, 5])
def test_a_static_step_stays_on_the_device(watch, model, width):
    """Step, choice, advance and reordering, of all rows at once and in tiles."""
    lane = runner_of(model).static[width]
    for tiled in (False, True):
        lane.use_tiles(tiled)
        for count in lane.grid.sentences:
            with waits(watch) as found:
                lane.compute(count, lane.grid.sources[-1])
            assert not found


@pytest.mark.parametrize("name", ["sutskever", "attention", "mixed ensemble"])
@pytest.mark.parametrize("width", [1, 5])
def test_places_are_written_without_waiting(watch, name, width):
    """Sentences join a lane, leave it and take other places; steps are enqueued and brought to the
    host; nothing waits but who reads."""
    model = model_of(name)
    lane = runner_of(model).static[width]
    members = sentences(lane.sizes.sentences, beam_size=width)
    state, attended = encoded(model, members)
    found = {}
    with waits(watch) as found["add"]:
        lane.add(members, state, attended)
    with waits(watch) as found["enqueue"]:
        lane.enqueue(2)
    with waits(watch) as found["remove"]:
        lane.remove([one.id for one in members[:-1]])
    with waits(watch) as found["close up"]:
        lane.close_up()
    assert lane.place[members[-1].id] == 0
    assert not any(found.values()), found


@pytest.mark.parametrize("name", ["sutskever", "attention"])
def test_a_round_of_the_runner_waits_for_encoding_alone(watch, name):
    """Of two widths: newcomers, two blocks, who is cancelled; then part of a batch enters."""
    runner = runner_of(model_of(name))
    first = [*sentences(6), *sentences(4, 6, beam_size=5)]
    late = sentences(5, 20)
    with waits(watch) as found:
        assert not runner.apply(Plan(encode=first, enter=[one.id for one in first])).events
        for _ in range(3):
            assert not runner.run(4).events
        ids = [one.id for one in late]
        assert not runner.apply(Plan(drop=[0, 7], encode=late, enter=ids[:2])).events
        assert not runner.run(4).events
        assert not runner.apply(Plan(enter=ids[2:])).events
        assert not runner.run(4).events
    assert {one for one in found if not one.startswith("encoding.py:")} == set()


# Steps kernel by kernel

OPTIONS = {
    "greedy": {}, "greedy, scored": {"return_scores": True}, "beam": {"beam_size": 3},
    "sampling": {"sampling": True, "top_p": 0.9, "top_k": 5, "seed": 3, "temperature": 0.7},
    "constraints": {"min_length": 2, "repetition_penalty": 1.2},
    "n-grams": {"no_repeat_ngram_size": 2},
    "attention": {"beam_size": 3, "coverage_penalty": 0.3, "return_alignments": True},
}  # fmt: skip

READS = {"sampling": 3, "n-grams": 3}  # places that read; of all others one


def lane_of(model, members, runner):
    kind = runner.kind_of(members[0])._replace(plain=False)
    lane = Lane(model, runner.vocabulary, kind, runner.memory)
    lane.add(members, *encoded(model, members))
    return lane


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_kernel_by_kernel_reads_who_has_ended(watch, name):
    """Whether anybody has ended is read at one place. Before it, where tokens are drawn: who draws,
    and whether anybody draws from the likeliest alone; and where n-grams are blocked: of which
    sizes. No device is mixed up when sentences join, leave and end."""
    model = model_of("attention")
    runner = runner_of(model)
    lane = lane_of(model, sentences(4, **OPTIONS[name]), runner)
    for _ in range(3):
        with waits(watch) as found:
            assert lane.step() == []
        assert len(found) == READS.get(name, 1), found
    lane.remove([0, 3])
    more = sentences(3, 10, **OPTIONS[name])
    lane.add(more, *encoded(model, more))
    lane.step()
    lane.remove([1, 10])
    lane.step()
    watch.answer = float("inf")  # somebody has ended, or is not finite: who, is read too
    for watch.truth in (False, True):
        assert lane.step() == []


# Whether the watch sees what it should


def test_operands_of_two_devices_are_refused(watch):
    table, here = torch.zeros(4, 3, device=GPU), torch.tensor([1, 2])
    for mix in (lambda: table[here], lambda: table[:2, 0] + here, lambda: torch.cat([table[0],
                torch.zeros(3)])):  # fmt: skip
        with pytest.raises(AssertionError, match=r"operands on \['cpu', 'cuda:0'\]"):
            mix()
    assert (table + torch.tensor(1.0)).device == GPU  # a number goes with the kernel


def into(table):
    table[torch.zeros(1, dtype=torch.long, device=GPU)] = 1.0


def masked(table):
    return table[torch.ones(4, dtype=torch.bool, device=GPU)]


@pytest.mark.parametrize("read", [
    lambda t: t.sum().item(), lambda t: bool(t.any()), lambda t: t[0].tolist(), lambda t: t.cpu(),
    lambda t: t[[1, 2]], lambda t: t.nonzero(), into, masked,
    lambda t: torch.tensor([1.0], device=GPU),
    lambda t: torch.ones(3).to(GPU, non_blocking=True),  # which is not pinned
])  # fmt: skip
def test_what_waits_is_seen(watch, read):
    table = torch.zeros(4, 3, device=GPU)
    assert not watch.waits
    read(table)
    assert watch.waits


def test_what_does_not_wait_is_not_taken_for_waiting(watch):
    table, at = torch.zeros(4, 3, device=GPU), torch.ones(2).pin_memory()
    there = at.to(GPU, non_blocking=True)
    host = torch.empty(4, 3, pin_memory=True)
    host[:2].copy_(table[:2], non_blocking=True)
    table.index_fill_(0, there.long(), 1.0)
    table[:, 1:] = 0
    assert not watch.waits


# How many kernels a recorded step has


@pytest.mark.parametrize(("width", "most"), [(1, 25), (5, 35)])
def test_a_recorded_step_is_few_kernels(watch, width, most):
    """Of four layers in float16; a product may be two kernels where cuBLAS splits it."""
    options = ModelOptions(encoder_layers=4, decoder_layers=4, embedding_size=32,
                           encoder_hidden_size=16, decoder_hidden_size=32, attention_size=32)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.half)
    try:
        with torch.device(GPU):
            model = ServingModel(Network(options, VOCABULARY, VOCABULARY), LONGEST, LONGEST)
    finally:
        torch.set_default_dtype(before)
    lane: StaticLane = runner_of(model).static[width]
    watch.kernels.clear()
    lane.compute(lane.grid.sentences[-1], 32)
    expected = {
        "embedding": 1,
        "mm": 8 + 1,  # of input and state of each layer; the query of attention
        "lstm_pointwise": 4,
        "attend": 1,
        "cat": 1,  # of state and context, for the readout
        "addmm": 2,  # readout, and logits
        "tanh": 1,
        "_to_copy": 1,  # logits in float32
        "choose": 1,
        "advance": 1,
        "_foreach_copy_": 1,  # the new state, all tables at once
    }
    if width > 1:  # whose state is whose
        expected |= {"add": 1, "gather_rows": 1}
    assert watch.kernels == Counter(expected)
    assert sum(expected.values()) <= most
