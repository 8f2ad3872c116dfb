"""Steps in buckets: what a GPU would record and replay is here remembered and called again, and
whatever a replay may spoil is spoilt."""

import functools
import logging
import random
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from table_model import EOS, A, B, C, D, TableModel, decode
from test_laws import Watched, alone, assert_same, run, tasks_of
from test_model import VOCABULARY, build, sentences

from bench import gpu
from handler.decoding import DecodingOptions, Engine, graphs
from handler.decoding.graphs import GraphedModel, Outputs, Recording, bucket, greatest
from handler.decoding.model import converted, load, packed
from handler.fields import FieldError, read
from handler.service_options import ServiceOptions
from model.quantized import quantized
from model.serving import scripted
from model.shortlist import Shortlist

CPU = torch.device("cpu")


def flat(best):
    return [*best[:3], *best[3], best[4]]


def spoilt(outputs):
    for t in flat(outputs):
        t.fill_(float("nan") if t.is_floating_point() else -1)


class Remembered:
    """A recorder that needs no GPU. Recordings share memory: a replay spoils the outputs of all
    others."""

    def __init__(self):
        self.recorded, self.replayed = [], []

    def record(self, function):
        values, tokens, normaliser, state, attention = function()
        outputs = Outputs(
            values.clone(), tokens.clone(), normaliser.clone(), [t.clone() for t in state],
            attention.clone(),
        )
        spoilt(outputs)
        number = len(self.recorded)
        self.recorded.append(outputs)

        def replay():
            self.replayed.append(number)
            for other in self.recorded:
                spoilt(other)
            for old, new in zip(flat(outputs), flat(function()), strict=True):
                old.copy_(new)

        return Recording(outputs, replay)


class Refusing(Remembered):
    """Cannot record, as where an operation is not allowed in a graph."""

    def record(self, function):
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")


class Wrong(Remembered):
    """Replays give something else."""

    def record(self, function):
        recording = super().record(function)
        return Recording(recording.outputs, lambda: spoilt(recording.outputs))


def graphed(model, recorder=None):
    return GraphedModel(model, CPU, recorder or Remembered())


def same(got, expected):
    """Both of `best`: padding of the source and of rows moves the last digits of sums."""
    for mine, other in zip(flat(got), flat(expected), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def step_of(model, seed, n, k, longest):
    """previous [N, K], a state and a memory for a step of `model`."""
    source, lengths = sentences(seed, n, longest)
    with torch.inference_mode():
        memory = model.encode(source, lengths)
        state = [t.repeat_interleave(k, 0) for t in model.start(memory)]
    previous = torch.randint(4, VOCABULARY, (n, k), generator=torch.Generator().manual_seed(seed))
    return previous, state, memory._replace(initial=[])


@pytest.fixture(scope="module", params=["sutskever", "attention", "mixed ensemble"])
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def attention():
    return build("attention")


# The engine over it


@settings(max_examples=6)
@given(seed=st.integers(0, 9999), rows=st.integers(5, 12))
def test_sentences_come_out_as_without_graphs(model, seed, rows):
    """Greedy, beams, sampling, prefixes and all else mixed, at random times."""
    tasks = tasks_of(random.Random(seed), 9, model.has_attention)
    reference = functools.cache(lambda i, steps: alone(model, tasks[i], steps))
    events, had = run(Watched(graphed(model), rows), tasks, random.Random(seed))
    for i, event in events.items():
        assert_same(event, reference(i, had[i]), 1e-4)


@pytest.mark.parametrize("beam_size", [1, 3, 5])
def test_what_is_made_of_a_full_engine(model, beam_size):
    options = DecodingOptions(beam_size=beam_size, n_best=beam_size, return_scores=True,
                              return_alignments=model.has_attention, max_length=12)
    draw = random.Random(beam_size)
    sources = [[draw.randrange(4, VOCABULARY) for _ in range(draw.randint(0, 40))] + [EOS]
               for _ in range(30)]
    recorder = Remembered()
    expected = decode(Engine(model, 20), sources, options)
    found = decode(Engine(graphed(model, recorder), 20), sources, options)
    for mine, other in zip(found, expected, strict=True):
        assert_same(mine, other, 1e-4)
    steps = len(recorder.replayed) - len(recorder.recorded)
    assert steps > len(recorder.recorded)


@pytest.mark.parametrize("beam_size", [1, 4])
def test_a_shortlist_holds_in_recorded_steps(beam_size):
    torch.manual_seed(beam_size)
    lexicon = torch.randint(4, VOCABULARY, (VOCABULARY, 2))
    made = quantized(
        build("attention").float(), Shortlist(lexicon, torch.tensor([EOS, 4]), VOCABULARY)
    )
    made.pack(False, False)
    draw = random.Random(beam_size)
    sources = [[draw.randrange(4, VOCABULARY) for _ in range(draw.randint(0, 12))] + [EOS]
               for _ in range(12)]
    options = DecodingOptions(beam_size=beam_size, max_length=10)
    recorder = Remembered()
    expected = decode(Engine(made, 8), sources, options)
    found = decode(Engine(graphed(made, recorder), 8), sources, options)
    assert len(recorder.replayed) > len(recorder.recorded) > 0
    for source, mine, other in zip(sources, found, expected, strict=True):
        assert mine.results[0].tokens == other.results[0].tokens
        assert set(mine.results[0].tokens) <= {4, *lexicon[source].flatten().tolist()}


def test_two_engines_may_have_one_model(model):
    shared = graphed(model)
    one, two = Engine(shared, 8), Engine(shared, 8)
    options = DecodingOptions(beam_size=2, max_length=9)
    sources = [[A, B, EOS], [C, D, A, EOS], [B, EOS]]
    for engine in (one, two):
        for source in sources if engine is one else sources[::-1]:
            engine.admit(source, options)
    events = {one: {}, two: {}}
    while not (one.idle and two.idle):
        for engine in (one, two):
            events[engine] |= {event.sentence: event for event in engine.advance()}
    expected = decode(Engine(model, 8), sources, options)
    for i in range(3):
        assert_same(events[one][i], expected[i], 1e-4)
        assert_same(events[two][2 - i], expected[i], 1e-4)


def test_a_sentence_that_is_not_finite_fails_alone():
    table = TableModel({2: {A: 0.9, B: 0.1}, A: {B: 0.9, EOS: 0.1}, B: {EOS: 1.0}}, poison=C)
    table.card = "{}"
    events = decode(Engine(graphed(table), 6), [[A, EOS], [C, EOS], [B, EOS]],
                    DecodingOptions(beam_size=2))
    assert [event.error is None for event in events] == [True, False, True]
    assert events[0].results[0].tokens == events[2].results[0].tokens == [A, B]


# One step


@settings(max_examples=15)
@given(st.lists(
    st.tuples(st.integers(1, 9), st.sampled_from([1, 3]), st.sampled_from([3, 16, 17, 40]),
              st.integers(1, 8), st.booleans()),
    min_size=2, max_size=8,
))
def test_every_step_is_that_of_its_own_input(model, calls):
    """Whatever shapes and questions came before in the same buffers."""
    one, plain = graphed(model), GraphedModel(model, CPU, None)
    for seed, (n, k, longest, count, normalised) in enumerate(calls):
        given = step_of(model, seed, n, k, longest)
        got = one.best(*given, count, normalised)
        assert got[0].shape == got[1].shape == (n, k, count)
        assert got[2].shape == ((n, k) if normalised else (0,))
        same(got, plain.best(*given, count, normalised))


@pytest.mark.parametrize("normalised", [False, True])
def test_steps_kernel_by_kernel_are_the_models(model, normalised):
    previous, state, memory = given = step_of(model, 5, 4, 3, 9)
    values, tokens, normaliser, after, attention = GraphedModel(model, CPU, None).best(
        *given, 6, normalised
    )
    with torch.inference_mode():
        logits, expected, weights = model.step(previous, state, memory)
    best = logits.index_fill(2, torch.arange(3), float("-inf")).topk(6, 2)
    torch.testing.assert_close(values, best.values.float())
    assert torch.equal(tokens, best.indices)
    total = logits[:, :, 3:].logsumexp(2).float()
    torch.testing.assert_close(normaliser, total if normalised else torch.empty(0))
    assert all(map(torch.equal, after, expected))
    assert torch.equal(attention, weights)


def test_rows_that_fill_a_bucket_up_are_never_read(model):
    """Law 1: not even where they are not finite."""
    recorder = Remembered()
    one, given = graphed(model, recorder), step_of(model, 7, 5, 2, 9)
    clean = [t.clone() for t in flat(one.best(*given, 4, True))]
    previous, state, memory = step_of(model, 8, 8, 2, 16)  # of the same bucket
    state = [torch.full_like(t, float("nan")) for t in state]
    memory = memory._replace(attended=[
        torch.full_like(t, float("nan")) if t.is_floating_point() else t for t in memory.attended
    ])
    assert one.best(previous, state, memory, 4, True)[0].isnan().all()
    assert len(recorder.recorded) == 1
    assert all(map(torch.equal, flat(one.best(*given, 4, True)), clean))


def test_the_state_outlasts_later_steps(model):
    one = graphed(model)
    kept = one.best(*step_of(model, 1, 4, 2, 9), 4, True)[3]
    before = [t.clone() for t in kept]
    for n in (4, 3, 1):
        one.best(*step_of(model, n, n, 2, 9), 4, True)
    assert all(map(torch.equal, kept, before))


# Which recordings there are


def test_shapes_of_one_bucket_share_a_recording(attention):
    recorder = Remembered()
    one = graphed(attention, recorder)
    for n, longest in ((5, 3), (8, 16), (6, 9)):
        one.best(*step_of(attention, n, n, 1, longest), 1, False)
    assert recorder.replayed == [0, 0, 0, 0]  # once to try it
    one.best(*step_of(attention, 1, 9, 1, 9), 1, False)
    one.best(*step_of(attention, 1, 8, 1, 9), 2, False)
    one.best(*step_of(attention, 1, 8, 1, 9), 1, True)
    one.best(*step_of(attention, 1, 4, 2, 9), 1, False)
    assert len(recorder.recorded) == 5


def test_the_recording_that_was_not_used_for_longest_goes(attention, monkeypatch):
    monkeypatch.setattr(graphs, "GRAPHS", 2)
    recorder = Remembered()
    one, plain = graphed(attention, recorder), GraphedModel(attention, CPU, None)
    for n, recordings in ((1, 1), (2, 2), (1, 2), (4, 3), (1, 3), (2, 4), (4, 5)):
        given = step_of(attention, n, n, 1, 9)
        same(one.best(*given, 3, True), plain.best(*given, 3, True))
        assert len(recorder.recorded) == recordings
        assert len(one.graphs) <= 2


def test_recordings_have_no_more_bytes_than_they_may(attention, monkeypatch):
    """State: 8 bytes, twice 2 tensors of 9; memory of 16 tokens: keys and values of 4, 8 bytes
    each, and a mask. So 288 + 16 * 65 a row, and room for three of them."""
    row = 288 + 16 * 65
    monkeypatch.setattr(graphs, "MOST_BYTES", 4 * row - 1)
    recorder = Remembered()
    one, plain = graphed(attention, recorder), GraphedModel(attention, CPU, None)
    assert (one.most_bytes, plain.most_bytes) == (4 * row - 1, 0)
    for n, kept in ((1, [1]), (2, [1, 2]), (4, [1, 2]), (1, [2, 1]), (2, [1, 2])):
        given = step_of(attention, n, n, 1, 9)
        same(one.best(*given, 3, True), plain.best(*given, 3, True))
        assert [key[0] for key in one.graphs] == kept
    assert [graph.size for graph in one.graphs.values()] == [row, 2 * row]
    monkeypatch.setattr(graphs, "MOST_BYTES", 4 * row)
    one.best(*step_of(attention, 4, 4, 1, 9), 3, True)
    assert [key[0] for key in one.graphs] == [4]


def test_the_memory_of_several_steps_is_copied_once(attention):
    one, plain = graphed(attention), GraphedModel(attention, CPU, None)
    previous, state, memory = step_of(attention, 3, 3, 2, 9)
    first = one.best(previous, state, memory, 4, True)
    (graph,) = one.graphs.values()
    copied = []
    fill = graph.fill
    graph.fill = lambda *given: (copied.append(given[2] is not None), fill(*given))
    for other in (memory, memory, memory._replace(), memory):
        same(one.best(previous, first[3], other, 4, True),
             plain.best(previous, first[3], other, 4, True))
    for _ in range(2):
        one.best(*step_of(attention, 4, 7, 2, 9), 4, True)  # another graph
    same(one.best(previous, first[3], memory, 4, True),
         plain.best(previous, first[3], memory, 4, True))
    assert copied == [True, False, True, True, True]


def test_steps_of_very_many_rows_are_not_recorded(attention, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_ROWS", 6)
    recorder = Remembered()
    one = graphed(attention, recorder)
    one.best(*step_of(attention, 1, 4, 2, 9), 3, True)
    assert not recorder.recorded
    one.best(*step_of(attention, 1, 3, 2, 9), 3, True)
    assert recorder.recorded


@pytest.mark.parametrize(("recorder", "reason"), [
    (Refusing, "operation not permitted when stream is capturing"),
    (Wrong, "a replay gives other logits than the step it was recorded from"),
])
def test_where_recording_fails_steps_go_on_without_and_it_is_said_once(
    attention, recorder, reason, caplog
):
    one, plain = graphed(attention, recorder()), GraphedModel(attention, CPU, None)
    with caplog.at_level(logging.WARNING):
        for n in (3, 5):
            given = step_of(attention, n, n, 2, 9)
            same(one.best(*given, 4, True), plain.best(*given, 4, True))
    assert [record.getMessage() for record in caplog.records] == [
        f"no CUDA graphs from here on: {reason}"
    ]
    assert not one.graphs


@given(st.integers(1, 5000), st.sampled_from([1, 16]))
def test_a_bucket_is_not_much_larger_than_it_need_be(size, least):
    found = bucket(size, least)
    assert size <= found < max(2 * size, least + 1)
    assert bucket(found, least) == found
    assert size <= 64 or found <= 1.5 * size


def test_buckets_are_few():
    assert bucket(0, 16) == 0  # without attention there is no source to read
    ladder = sorted({bucket(size) for size in range(1, 4097)})
    assert ladder == [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048,
                      3072, 4096]
    assert all(b <= 2 * a for a, b in pairwise(ladder))


# The choice of tokens


@settings(max_examples=60)
@given(rows=st.integers(1, 3), vocabulary=st.integers(1, 400), count=st.integers(1, 12),
       levels=st.sampled_from([1, 3, 50, 10**6]), seed=st.integers(0, 999))
def test_the_greatest_come_first_and_equals_by_id(rows, vocabulary, count, levels, seed):
    draw = random.Random(seed)
    special = [float("-inf"), float("inf"), -0.25, 1e-40, -1e-40]
    logits = [
        [draw.choice(special) if draw.random() < 0.05 else draw.randint(-levels, levels) / 7
         for _ in range(vocabulary)]
        for _ in range(rows)
    ]
    given = torch.tensor(logits).unsqueeze(0)
    count = min(count, vocabulary)
    values, tokens = greatest(given, count)
    for row, found, ids in zip(given[0].tolist(), values[0].tolist(), tokens[0].tolist()):
        expected = sorted(range(vocabulary), key=lambda i, row=row: (-row[i], i))[:count]
        assert ids == expected
        assert found == [row[i] for i in expected]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("vocabulary", [30, 700])
def test_what_is_not_a_number_comes_first(vocabulary, sign):
    logits = torch.zeros(1, 2, vocabulary)
    logits[0, 1, vocabulary - 2] = torch.copysign(torch.tensor(float("nan")), torch.tensor(sign))
    values, tokens = greatest(logits, 3)
    assert values[0, 0].tolist() == [0, 0, 0]
    assert values[0, 1, 0].isnan()
    assert tokens[0, 1, 0] == vocabulary - 2


# Number formats


def written(model, folder):
    path = folder / "model.pt"
    scripted(model).save(str(path))
    return str(path)


@pytest.mark.parametrize("weights", ["float16", "bfloat16"])
def test_half_precision_is_refused_on_a_cpu(weights, tmp_path):
    path = written(build("attention").float(), tmp_path)
    with pytest.raises(ValueError, match=f"^weights: got '{weights}'; allowed on a CPU: null or "):
        load(path, CPU, weights)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["attention", "ensemble"])
def test_int8_weights_stay_what_they_are(name, device, tmp_path):
    """`converted` moves nothing, so that it can be asked about a GPU that is not there."""
    model = torch.jit.load(written(quantized(build(name).float()), tmp_path))
    for weights in ("float32", "float16"):
        with pytest.raises(ValueError, match="exported with int8 weights: null"):
            converted(model, torch.device(device), weights)
    assert converted(model, torch.device(device), None) is model


def test_weights_in_double_precision_are_not_converted():
    with pytest.raises(ValueError, match="not exported in float32: null"):
        converted(build("attention"), torch.device("cuda"), "float16")


def test_float32_may_be_named_anywhere(tmp_path):
    model = load(written(build("attention").float(), tmp_path), CPU, "float32")
    assert {t.dtype for t in model.buffers()} == {torch.float32}


@pytest.mark.parametrize(("name", "weights"), [
    ("attention", "float16"), ("sutskever with every option", "bfloat16"),
    ("mixed ensemble", "bfloat16"),
])
def test_a_step_in_half_precision_gives_logits_in_single(name, weights, tmp_path):
    single = build(name).float()
    model = torch.jit.load(written(single, tmp_path))
    model = packed(converted(model, torch.device("cuda"), weights), torch.device("cuda"))
    previous, state, memory = step_of(single, 3, 4, 2, 9)

    def halved(tensors):
        half = getattr(torch, weights)
        return [t.to(half) if t.is_floating_point() else t for t in tensors]

    with torch.inference_mode():
        expected, _, _ = single.step(previous, state, memory)
        logits, after, _ = model.step(
            previous, halved(state), memory._replace(attended=halved(memory.attended))
        )
    assert logits.dtype == torch.float32
    assert {t.dtype for t in after} == {getattr(torch, weights)}
    error = (logits - expected).abs().mean() / expected.abs().mean()
    assert 0 < error < 0.1


def test_the_option_is_read_with_the_others():
    assert read(ServiceOptions, {"weights": "bfloat16"}, "handler").weights == "bfloat16"
    assert read(ServiceOptions, {"weights": None}, "handler").weights is None
    with pytest.raises(FieldError, match=r"handler\.weights: got 'int8'; allowed: 'float32' or "):
        read(ServiceOptions, {"weights": "int8"}, "handler")


# The bench, whose device is not there


def test_the_bench_fills_its_tables(monkeypatch, capsys):
    def loaded(path, device, weights=None):
        plain = load(path, device)
        return graphed(plain) if weights else plain  # the reference names no format

    monkeypatch.setattr(gpu, "load", loaded)
    monkeypatch.setattr(sys, "argv", [
        "gpu", "--device", "cpu", "--size", "1x16", "--check-size", "1x16", "--vocabulary", "90",
        "--rows", "1", "6", "--beams", "1", "2", "--sentences", "3",
    ])
    monkeypatch.setattr(gpu, "CALLS", 2)
    gpu.main()
    tables = capsys.readouterr().out.split("\n\n")
    rows = [[line.split(" | ") for line in table.splitlines() if line[:2] == "| "]
            for table in tables]
    check, steps, engine = (table for table in rows if table)
    assert [row[-2:] for row in check[1:]] == [["100.0%", "100.0% |"]] * 4
    assert [row[1:3] for row in steps[1:]] == [["1", "1"], ["1", "6"], ["2", "6"]]
    for row in steps[1:]:
        assert all(float(cell) > 0 for cell in row[3:7])
    assert [row[:2] for row in engine[1:]] == [["| greedy", "1"], ["| greedy", "6"],
                                               ["| beam 2", "6"]]
    assert engine[0][2] == "float32, graphs: yes"
