"""Law 1 to the bit: what a sentence comes to depends on nothing beside it. Encoding, start, step
and selection alone against in company of 2 to 200 of all lengths; and whole answers through the
engine.

Weights are such that many choices nearly tie, so that a last bit that differs changes texts.
"""

import dataclasses
import random

import pytest
import torch
from test_laws import answers, drained
from torch import Tensor

from handler.decoding import DecodingOptions, Engine
from handler.decoding.model import packed
from handler.decoding.search import coverage
from handler.decoding.selection import normalisers, top
from model import Ensemble, ModelOptions, Network, ServingModel
from model.projection import Projection
from model.quantized import quantized
from model.rows import sigmoid

CPU = torch.device("cpu")
VOCABULARY, EOS = 260, 3
ops = torch.ops.seq2serve
SMALL = {"embedding_size": 20, "encoder_layers": 2, "decoder_layers": 2}
SHAPES = {
    "sutskever": ModelOptions(
        kind="sutskever", bidirectional=False, reverse_source=True, encoder_hidden_size=37,
        decoder_hidden_size=37, **SMALL,
    ),
    "dot": ModelOptions(
        encoder_hidden_size=33, decoder_hidden_size=50, attention_size=100, layer_norm=True,
        residual=True, **SMALL,
    ),
    "dot of 4 heads": ModelOptions(
        encoder_hidden_size=16, decoder_hidden_size=32, attention_size=32, attention_heads=4,
        **SMALL,
    ),
    "additive of 2 heads": ModelOptions(
        encoder_hidden_size=17, decoder_hidden_size=33, attention="additive", attention_size=34,
        attention_heads=2, **SMALL,
    ),
    "wide": ModelOptions(  # more inputs than a product takes at once
        embedding_size=24, encoder_layers=1, encoder_hidden_size=20, decoder_layers=1,
        decoder_hidden_size=1100, attention_size=16,
    ),
}  # fmt: skip
FORMATS = ["float32", "native float32", "int8", "native int8"]


def network(name: str) -> ServingModel:
    """Pairs of tokens have nearly the same weights, by less than single precision tells apart in a
    sum of a whole row, and EOS is likely enough to come."""
    torch.manual_seed(1)
    made = Network(SHAPES[name], VOCABULARY, VOCABULARY)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)
        weight, bias = made.generator.weight, made.generator.bias
        weight[5::2] = weight[4::2] * (1 + 1e-7 * torch.randn_like(weight[4::2]))
        bias[5::2] = bias[4::2]
        bias[EOS] += 2.0
    return ServingModel(made, 120, 120)


@pytest.fixture(scope="module", params=[*SHAPES, "ensemble"])
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=FORMATS)
def model(request, kind, native_library):
    native = request.param.startswith("native")
    if native and native_library is None:
        pytest.skip("no native operators on this machine")
    names = ["dot", "sutskever", "additive of 2 heads", "dot of 4 heads", "dot"]
    made = Ensemble([network(name) for name in names]) if kind == "ensemble" else network(kind)
    if "int8" in request.param:
        made = quantized(made)
    made.pack(native, torch.backends.mkldnn.is_available())
    assert made.invariant
    return made


class Crowd:
    """200 sentences, and what any of them come to when they are read and stepped together."""

    WIDTH, STEPS = 3, 2

    def __init__(self, model) -> None:
        self.model = model
        draw = random.Random(1)
        lengths = [1, 2, 3, 5, 7, 8, 13, 15, 16, 17, 20, 31, 32, 33, 48, 64, 65, 100]
        self.sources = [
            torch.tensor([*(draw.randrange(4, VOCABULARY) for _ in range(n - 1)), EOS])
            for n in (draw.choice(lengths) for _ in range(200))
        ]

    @torch.inference_mode()
    def read(self, some: list[int]) -> list[list[Tensor]]:
        """Of each: memory, first state, state, logits, attention, the best tokens and normaliser.
        """
        model, width = self.model, self.WIDTH
        sources = [self.sources[i] for i in some]
        lengths = torch.tensor([len(one) for one in sources])
        source = torch.nn.utils.rnn.pad_sequence(sources, batch_first=True)
        memory = model.encode(source, lengths)
        start = model.start(memory)
        state = [rows.repeat_interleave(width, 0) for rows in start]
        previous = torch.tensor([[4 + (7 * i + k) % 99 for k in range(width)] for i in some])
        for _ in range(self.STEPS):
            chosen: list[Tensor] = []
            if getattr(model, "fused", False):
                values, tokens, normaliser, _, _ = model.best(previous, state, memory, 6, True)
                chosen = [values, tokens, normaliser]
            logits, state, paid = model.step(previous, state, memory)
            chosen += [*top(logits, 6), normalisers(logits), coverage(paid, lengths)]
            previous = logits.argmax(2)
        per_row = [rows.view(len(some), width, -1) for rows in state]
        found = []
        for n, length in enumerate(lengths.tolist()):
            attended = [table[n, :length] for table in memory.attended]
            parts = [*memory.initial, *start, *per_row, logits, *chosen]
            found.append([*attended, paid[n, :, :length], *(part[n] for part in parts)])
        return found


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_sentence_is_the_same_bits_in_any_company(model) -> None:
    """And with any number of threads."""
    crowd, draw = Crowd(model), random.Random(1)
    alone: dict[int, list[Tensor]] = {}
    for i, size in enumerate([2, 5, *draw.sample(range(6, 200), 2), 200]):
        some = draw.sample(range(200), size)
        torch.set_num_threads(1 + i % 2)
        together = crowd.read(some)
        torch.set_num_threads(1)
        for place in {0, size - 1, draw.randrange(size)}:
            one = some[place]
            alone[one] = alone.get(one) or crowd.read([one])[0]
            assert all(torch.equal(a, b) for a, b in zip(alone[one], together[place], strict=True))


ASKED = [
    DecodingOptions(max_length=12),
    DecodingOptions(max_length=9, return_scores=True),
    DecodingOptions(beam_size=3, n_best=3, max_length=10, length_penalty=1.0),
    DecodingOptions(beam_size=4, n_best=2, max_length=12, length_penalty=2.5, min_length=2),
    DecodingOptions(sampling=True, seed=3, top_p=0.9, max_length=8, return_scores=True),
    DecodingOptions(beam_size=2, n_best=2, no_repeat_ngram_size=2, max_length=9),
]


def test_answers_and_their_scores_are_the_same_bits_in_any_company(model) -> None:
    """Through the engine, where sentences come at random."""
    crowd, draw = Crowd(model), random.Random(2)
    count = 18 if isinstance(model, Ensemble) else 60
    coverage = {"coverage_penalty": 0.3} if model.has_attention else {}
    asked = [dataclasses.replace(o, **(coverage if o.beam_size == 4 else {})) for o in ASKED]
    tasks = [(one.tolist(), asked[i % len(asked)]) for i, one in enumerate(crowd.sources[:count])]
    engine, numbers, events = Engine(model, rows=48), {}, {}
    todo = list(range(len(tasks)))
    while todo or not engine.idle:
        for _ in range(min(len(todo), draw.randint(0, 12))):
            i = todo.pop(0)
            numbers[engine.admit(*tasks[i])] = i
        for event in engine.advance(draw.randint(1, 3)):
            events[numbers[event.sentence]] = event
    for i in draw.sample(range(count), count // 6 + 2):
        source, options = tasks[i]
        own = Engine(model, rows=options.beam_size)
        sentence = own.admit(source, options)
        expected = drained(own)[sentence]
        assert answers(events[i]) == answers(expected)
        assert events[i].results == expected.results


def test_what_torch_rounds_by_neighbours_is_found() -> None:
    """A projection that does not keep to one order goes in tiles, and says so where it must not."""
    torch.manual_seed(1)
    weight, bias = torch.randn(40, 300), torch.randn(40)
    x = torch.randn(60, 300)
    torchs = Projection(weight, bias)
    if torch.equal(torchs(x)[:1], torchs(x[:1])):
        pytest.skip("torch's own products are row by row on this machine")
    free = Projection(weight, bias)
    assert not free.pack(False, False, False)
    tiled = Projection(weight, bias)
    assert tiled.pack(False, False, True)
    assert tiled.tile == tiled.rows_of_tile
    assert all(torch.equal(tiled(x[:n]), tiled(x)[:n]) for n in (1, 2, 15, 16, 17, 59))
    torch.testing.assert_close(tiled(x), x @ weight.t() + bias)


def test_a_model_in_tiles_is_invariant_and_one_that_must_not_is_told(caplog) -> None:
    tiled, free = network("dot"), network("dot")
    tiled.pack(False, False, True)
    assert tiled.invariant
    crowd = Crowd(tiled)
    some = list(range(40))
    for one, other in zip(crowd.read([7])[0], crowd.read(some)[7], strict=True):
        assert torch.equal(one, other)
    free.pack(False, False, False)
    if not free.invariant:
        assert Engine(free, rows=4).invariant is False
        packed(free, CPU)
        assert "may depend on those beside it" in caplog.text


@pytest.mark.parametrize("count", [1, 3])
def test_sigmoid_is_one_function_for_all_elements(count) -> None:
    torch.set_num_threads(count)
    x = 5 * torch.randn(200, 1000)
    each = torch.stack([sigmoid(row) for row in x])
    assert torch.equal(sigmoid(x), each)
    assert torch.equal(sigmoid(x[:, 3:30]), each[:, 3:30])
    torch.testing.assert_close(each, torch.sigmoid(x))


def test_a_long_vocabulary_is_summed_in_one_order() -> None:
    logits = torch.randn(9, 1, 40_000)
    each = torch.cat([normalisers(one) for one in logits.split(1)])
    assert torch.equal(normalisers(logits), each)
    torch.testing.assert_close(each, logits.logsumexp(2))


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 64])
def test_every_processor_gives_the_same_bits(native_library, rows) -> None:
    """And those of a sum from the first input to the last, each step rounded once."""
    if native_library is None:
        pytest.skip("no native operators on this machine")
    torch.manual_seed(rows)
    weight, bias, x = torch.randn(70, 33), torch.randn(70), torch.randn(rows, 33)
    mine = Projection(weight, bias)
    mine.pack(True, True, True)
    by_hand = torch.zeros(rows, 70)
    for i in range(33):  # in double a product of floats is exact, and so is nearly the sum
        by_hand = (by_hand.double() + x[:, i : i + 1].double() * weight[:, i].double()).float()
    fastest = ops.float_use("")
    try:
        for name in ("avx2", "avx512"):
            if ops.float_use(name) == name:
                assert torch.equal(mine(x), by_hand + bias)
    finally:
        ops.float_use(fastest)
