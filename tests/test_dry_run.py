"""The dry run: it counts what the network has, and its memory and time follow what they should."""

import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_toy_text

from model import Network
from training.dry_run import (
    SAMPLE_PARAMETERS,
    SAMPLE_STEPS,
    Load,
    Meter,
    dry_run,
    memory,
    memory_told,
    parts,
    seconds_a_token,
)
from training.prepare import prepare
from training.recipe import Recipe, load
from training.run import Run

PAPER = ROOT / "recipes" / "paper_wmt14_en_fr.yaml"
SMALL = """\
name: small
data:
  train: {source: train.src, target: train.tgt}
  validation: {source: validation.src, target: validation.tgt}
  test: {source: test.src, target: test.tgt}
tokenizer: {algorithm: bpe, source_vocabulary: 271, target_vocabulary: 271}
model: {embedding_size: 16, encoder_hidden_size: 12, decoder_hidden_size: 20, attention_size: 16}
training: {batch_tokens: 400, device: cpu}
"""


def recipe(folder: Path, *changes: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(SMALL)
    return load(path, None, changes)


def on_meta(one: Recipe) -> Network:
    with torch.device("meta"):
        return Network(
            one.model, one.tokenizer.source_vocabulary, one.tokenizer.target_vocabulary
        )


def test_the_papers_recipe_has_the_papers_parameters() -> None:
    """Section 3.4: 384M parameters, of which 32M in the encoder and 32M in the decoder."""
    counted = {part.name: part.parameters for part in parts(on_meta(load(PAPER)))}
    millions = {name: round(count / 1e6) for name, count in counted.items()}
    assert round(sum(counted.values()) / 1e6) == 384
    assert (millions["encoder"], millions["decoder"]) == (32, 32)
    assert (millions["source embedding"], millions["target embedding"]) == (160, 80)
    assert (millions["generator"], millions["attention"], millions["bridge"]) == (80, 0, 0)


@pytest.mark.parametrize("tied", ["none", "decoder", "all"])
def test_parts_are_all_of_the_network_and_no_weight_twice(tmp_path: Path, tied: str) -> None:
    one = recipe(tmp_path, f"model.tie_embeddings={tied}", "tokenizer.joint=true")
    network = on_meta(one)
    counted = parts(network)
    assert sum(part.parameters for part in counted) == sum(
        p.numel() for p in network.parameters()
    )
    # A tied generator multiplies all the same.
    assert counted[-1].by_target == 271 * 16


def test_operations_of_the_paper_are_six_for_each_weight_that_multiplies() -> None:
    load_of = Load.of(load(PAPER), None)
    operations = {part.name: part.operations(load_of) for part in parts(on_meta(load(PAPER)))}
    assert operations["decoder"] == 6 * 4 * 4 * 1000 * 2000  # layers, gates, width, input and state
    assert operations["generator"] == 6 * 80_000 * 1000
    assert operations["source embedding"] == 0  # looked up, not multiplied


def test_fewer_source_words_cost_less(tmp_path: Path) -> None:
    encoder = parts(on_meta(recipe(tmp_path)))[1]
    half = Load(1, 1, 1, 1, 1.0, pairs=1, source_words=5, target_words=10)
    assert encoder.operations(half) == 3 * encoder.by_source


def test_memory_of_weights_gradients_and_adam(tmp_path: Path) -> None:
    one = recipe(tmp_path, "training.average=0.99")
    network = on_meta(one)
    count = sum(p.numel() for p in network.parameters())
    held = memory(one, network, Load.of(one, None), half=False)
    assert (held["weights"], held["gradients"], held["average"]) == (4 * count,) * 3
    assert (held["optimiser"], held["working copies"]) == (8 * count, 0)
    plain = recipe(tmp_path, "training.optimizer=sgd")
    held = memory(plain, network, Load.of(plain, None), half=True)
    assert (held["optimiser"], held["average"]) == (0, 0)
    assert held["working copies"] > 0


@pytest.mark.parametrize("change", ["model.dropout=0.2", "training.r_drop=1.0",
                                    "model.attention=additive", "training.batch_tokens=800",
                                    "model.decoder_layers=2"])  # fmt: skip
def test_what_keeps_more_for_backward_takes_more(tmp_path: Path, change: str) -> None:
    def kept(one: Recipe) -> int:
        return memory(one, on_meta(one), Load.of(one, None), half=False)["activations"]

    assert kept(recipe(tmp_path, change)) > 1.05 * kept(recipe(tmp_path))


@pytest.mark.parametrize("kind", ["attention", "sutskever"])
def test_activations_are_what_backward_keeps(tmp_path: Path, kind: str) -> None:
    """Against the tensors that autograd keeps of a batch as large as the largest."""
    changes = ["training.batch_tokens=3000", "model.encoder_hidden_size=64",
               "model.decoder_hidden_size=64", "model.encoder_layers=2", "model.decoder_layers=2"]
    if kind == "sutskever":
        changes += ["model.kind=sutskever", "model.bidirectional=false"]
    write_toy_text(tmp_path, 3000)
    one = recipe(tmp_path, *changes)
    run = Run(tmp_path / "run")
    prepare(one, run.root)
    given = Load.of(one, run)
    network = Network(one.model, 271, 271)
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # so that no later tensor has the same address
        return tensor

    held: list[torch.Tensor] = []
    n = given.target // 9
    source = torch.randint(4, 200, (n, given.longest))
    target = torch.randint(4, 200, (n, 9))
    lengths = torch.full((n,), given.longest), torch.full((n,), 9)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.train().features(source, lengths[0], target, lengths[1])
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = sum(size for place, size in saved.items() if place not in weights)
    estimate = memory(one, network, given, half=False)["activations"]
    assert kept < estimate < 2 * kept


def test_time_is_the_sum_of_the_parts_that_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that ticks once a call: sums, layers and shares are right, whatever is fast."""
    monkeypatch.setattr(Meter, "once", lambda self, act: [act(), 1.0][1])
    cpu = Meter(torch.device("cpu"), torch.float32)
    given = Load(90, 90, 9, 10, 90.0, pairs=20, source_words=90, target_words=180)
    one = recipe(tmp_path, "model.decoder_layers=3", "training.accumulate=2")
    found = seconds_a_token(one, on_meta(one), given, cpu)
    layer = 1 / (10 * SAMPLE_STEPS)
    assert found["decoder"] == pytest.approx(3 * layer)
    assert found["encoder"] == pytest.approx(layer / 2)  # half as many source as target words
    assert found["attention"] == pytest.approx(1 / 90)
    assert found["generator"] == pytest.approx(1 / 90)  # a chunk more takes no time by this clock
    count = sum(p.numel() for p in on_meta(one).parameters())
    assert found["update"] == pytest.approx(count / SAMPLE_PARAMETERS / 180)
    twice = recipe(tmp_path, "model.decoder_layers=3", "training.r_drop=1.0")
    assert seconds_a_token(twice, on_meta(twice), given, cpu)["decoder"] == pytest.approx(6 * layer)


def test_prepared_data_tell_hours_an_epoch_and_what_is_not_is_told_by_the_million(
    tmp_path: Path,
) -> None:
    write_toy_text(tmp_path, 500)
    one, run = recipe(tmp_path), Run(tmp_path / "run")
    assert "hours per million target tokens" in dry_run(one, run)
    assert not run.root.exists()
    prepare(one, run.root)
    text = dry_run(one, run)
    assert re.search(r"hours an epoch of 4\d\d pairs", text)
    assert "of the prepared data" in text
    assert not run.best.exists()


def test_what_does_not_fit_is_said_with_what_to_change(tmp_path: Path) -> None:
    one = recipe(tmp_path)
    held = {"weights": 4_000_000_000, "activations": 6_000_000_000}
    given = Load.of(one, None)
    cpu = torch.device("cpu")
    assert "it fits" in memory_told(one, held, given, 10_000_000_000, cpu)
    short = memory_told(one, held, given, 7_000_000_000, cpu)
    assert "DOES NOT FIT by 3.0 GB" in short
    assert f"training.batch_tokens to {given.target // 2}" in short
    none = memory_told(one, held, given, 3_000_000_000, cpu)
    assert "with no batch at all by 1.0 GB: smaller" in none
