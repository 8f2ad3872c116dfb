"""What only a GPU can show: graphs are recorded, and their replays are what a CPU computes."""

import logging
import random

import pytest
import torch
from table_model import EOS, decode
from test_laws import assert_same
from test_model import VOCABULARY, build, read, sentences

from handler.decoding import DecodingOptions, Engine
from handler.decoding.graphs import GraphedModel
from handler.decoding.model import load
from model.serving import scripted

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CPU = torch.device("cpu")


@pytest.fixture
def device():
    return torch.device("cuda", 0)


def loaded(model, device, folder, weights=None):
    path = folder / "model.pt"
    scripted(model).save(str(path))
    return load(str(path), device, weights)


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("name", ["sutskever", "attention with every option", "mixed ensemble"])
def test_replays_give_the_sentences_of_a_cpu(name, beam_size, device, tmp_path, caplog):
    """In double precision, where sums in another order change no token."""
    model = build(name)
    options = DecodingOptions(beam_size=beam_size, n_best=beam_size, return_scores=True,
                              return_alignments=model.has_attention, max_length=12)
    draw = random.Random(beam_size)
    sources = [[draw.randrange(4, VOCABULARY) for _ in range(draw.randint(0, 40))] + [EOS]
               for _ in range(30)]
    expected = decode(Engine(model, 20), sources, options)
    graphed = loaded(model, device, tmp_path)
    with caplog.at_level(logging.WARNING):
        found = decode(Engine(graphed, 20, device), sources, options)
    for mine, other in zip(found, expected, strict=True):
        assert_same(mine, other, 1e-4)
    assert not caplog.records
    assert graphed.graphs


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
    model = build("attention")
    graphed = loaded(model, device, tmp_path)
    waiting = GraphedModel(Waiting(graphed), device, graphed.recorder)
    sources = [[5, 6, EOS], [7, EOS]]
    options = DecodingOptions(beam_size=2, max_length=9)
    with caplog.at_level(logging.WARNING):
        found = decode(Engine(waiting, 4, device), sources, options)
    for mine, other in zip(found, decode(Engine(model, 4), sources, options), strict=True):
        assert_same(mine, other, 1e-4)
    assert len(caplog.records) == 1
    assert waiting.recorder is None


@pytest.mark.parametrize(("weights", "most"), [(None, 1e-4), ("float16", 0.02), ("bfloat16", 0.1)])
def test_logits_are_those_of_a_cpu_in_single_precision(weights, most, device, tmp_path):
    model = build("attention with every option").float()
    source, lengths = sentences(3, 6, 9)
    choices = torch.randint(4, VOCABULARY, (3, 6, 2))
    expected = read(model, source, lengths, choices)[0]
    graphed = loaded(model, device, tmp_path, weights)
    logits = read(graphed, source.to(device), lengths.to(device), choices.to(device))[0].cpu()
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().mean() / expected.abs().mean() < most
