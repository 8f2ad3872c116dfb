"""The verb ensemble: several runs that translate as one, from their checkpoints to TorchServe."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import call, options, write_toy_text

import training.ensemble
from handler.decoding import DecodingOptions, Engine, decode_in_order
from handler.decoding.model import load as load_model
from handler.integrity import sha256
from model import Ensemble, ModelOptions, Network, ServingModel
from server.torchserve import TorchServe
from training.archive import archive
from training.ensemble import ensemble
from training.evaluate import best_model, evaluate
from training.export import export
from training.prepare import prepare
from training.recipe import Recipe, load
from training.run import Run, RunError
from training.tokens import TokenPairs
from training.train import tokenizers, train
from training.translate import translate

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
RECIPE = """\
name: tiny
data:
  train: {source: train.src, target: train.tgt}
  validation: {source: validation.src, target: validation.tgt}
  test: {source: test.src, target: test.tgt}
tokenizer: {algorithm: bpe, source_vocabulary: 271, target_vocabulary: 271}
model:
  embedding_size: 16
  encoder_hidden_size: 12
  decoder_hidden_size: 20
  attention_size: 16
  initialisation: uniform
  init_range: 0.8
training:
  epochs: 4
  batch_tokens: 80
  learning_rate: 0.01
  schedule: linear
  warmup_steps: 5
  validate_every: 60
scoring: {beam_size: 3, tokenize: char}
export: {max_source_length: 32, max_target_length: 24}
"""
OTHERWISE = (  # what members may differ in
    "model={kind: sutskever, bidirectional: false, embedding_size: 12, encoder_hidden_size: 14, "
    "decoder_hidden_size: 14, initialisation: uniform, init_range: 0.8}",
    "training.seed=7",
    "training.average=0.9",
)


def text(folder: Path) -> Path:
    """A folder with toy text and a recipe that reads it; the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    write_toy_text(folder, pairs=240)
    for name in ("validation", "test"):
        for side in ("src", "tgt"):
            path = folder / f"{name}.{side}"
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:12]))
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder / "tiny.yaml"


def trained(file: Path, root: Path, *changes: str) -> Run:
    recipe = load(file, changes=changes)
    prepare(recipe, root)
    train(recipe, Run(root))
    return Run(root)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of one recipe: a, b and the ensemble of both, evaluated and exported."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    recipe = load(text(folder))
    members = [trained(folder / "tiny.yaml", folder / "a"),
               trained(folder / "tiny.yaml", folder / "b", *OTHERWISE)]  # fmt: skip
    both = Run(folder / "both")
    assert ensemble(recipe, both, members) == 2
    evaluate(recipe, both)
    export(recipe, both)
    return folder


def recipe_of(runs: Path) -> Recipe:
    return load(runs / "tiny.yaml")


def network_of(run: Run) -> Network:
    """The weights that a run was judged by, read by hand."""
    stored = torch.load(run.best, weights_only=True)
    sizes = [one.size for one in tokenizers(run)]
    network = Network(ModelOptions(**stored["recipe"]["model"]), *sizes).eval()
    network.load_state_dict(stored["network"])
    with torch.no_grad():
        for parameter, average in zip(network.parameters(), stored["average"]):
            parameter.copy_(average)
    return network


@torch.no_grad()
def mean_probabilities(
    networks: list[Network], source: list[int], target: list[int]
) -> torch.Tensor:
    """[T, V]: of the token after each beginning of `target`, which begins with BOS."""
    given = [torch.tensor([source]), torch.tensor([len(source)]),
             torch.tensor([target]), torch.tensor([len(target)])]  # fmt: skip
    return torch.stack([one(*given)[0].softmax(1) for one in networks]).mean(0)


def ids_of(pairs: TokenPairs, i: int) -> tuple[list[int], list[int]]:
    source, target = pairs.source_offsets, pairs.target_offsets
    return (pairs.source_tokens[source[i] : source[i + 1]].tolist(),
            pairs.target_tokens[target[i] : target[i + 1]].tolist())  # fmt: skip


def test_perplexity_is_of_the_mean_of_the_members_probabilities(runs: Path) -> None:
    networks = [network_of(Run(runs / name)) for name in "ab"]
    both = Run(runs / "both")
    pairs = TokenPairs.load(both.data / "validation.tokens")
    losses = []
    for i in range(len(pairs)):
        source, target = ids_of(pairs, i)
        probabilities = mean_probabilities(networks, source, [2, *target])
        losses += [-probabilities[j, token].log() for j, token in enumerate([*target, 3])]
    expected = torch.stack(losses).mean().exp().item()
    assert both.read_json(both.scores, "evaluate")["validation_perplexity"] == pytest.approx(
        expected, rel=1e-4
    )


def test_greedy_translations_are_those_of_the_mean_of_probabilities(runs: Path) -> None:
    networks = [network_of(Run(runs / name)) for name in "ab"]
    both = Run(runs / "both")
    pairs = TokenPairs.load(both.data / "validation.tokens")
    sources = [ids_of(pairs, i)[0] for i in range(len(pairs))]
    model, _ = best_model(recipe_of(runs), both)
    assert isinstance(model, Ensemble)
    decoded = decode_in_order(Engine(model, rows=4), sources, DecodingOptions(max_length=8))
    found = [event.results[0].tokens for event in decoded]
    for source, tokens in zip(sources, found):
        expected: list[int] = []
        while len(expected) < 8:
            probabilities = mean_probabilities(networks, source, [2, *expected])[-1]
            probabilities[:3] = 0.0  # padding, unknown and BOS are never told
            if probabilities.argmax() == 3:
                break
            expected.append(int(probabilities.argmax()))
        assert tokens == expected
    for alone in networks:  # or the test would tell nothing of both
        model = ServingModel(alone, 32, 24)
        events = decode_in_order(Engine(model, rows=4), sources, DecodingOptions(max_length=8))
        assert [event.results[0].tokens for event in events] != found


def test_an_ensemble_of_one_is_its_member(runs: Path, tmp_path: Path) -> None:
    recipe = load(runs / "tiny.yaml", changes=OTHERWISE)
    alone, member = Run(tmp_path / "alone"), Run(runs / "b")
    assert ensemble(recipe, alone, [member]) == 1
    evaluate(recipe, alone)
    evaluate(recipe, member)
    mine, its = (run.read_json(run.scores, "evaluate") for run in (alone, member))
    assert mine.pop("validation_perplexity") == pytest.approx(its.pop("validation_perplexity"))
    assert mine == its
    for name in ("validation.decoded", "test.decoded"):
        assert (alone.root / name).read_bytes() == (member.root / name).read_bytes()


def test_the_model_of_an_ensemble_follows_the_contract(runs: Path) -> None:
    both, recipe = Run(runs / "both"), recipe_of(runs)
    scripted = load_model(str(both.model), CPU)
    eager, _ = best_model(recipe, both)
    assert (scripted.format_version, scripted.has_attention) == (4, True)
    assert (scripted.max_source_length, scripted.max_target_length) == (32, 24)
    assert (scripted.pad_id, scripted.unk_id, scripted.bos_id, scripted.eos_id) == (0, 1, 2, 3)
    pairs = TokenPairs.load(both.data / "train.tokens")
    sources = [ids_of(pairs, i)[0] for i in range(40)]
    one, other = (
        [event.results for event in decode_in_order(
            Engine(model, rows=9), sources, DecodingOptions(beam_size=3, n_best=3)
        )]
        for model in (scripted, eager)
    )  # fmt: skip
    assert [[r.tokens for r in found] for found in one] == [
        [r.tokens for r in found] for found in other
    ]


def test_the_card_tells_the_members(runs: Path) -> None:
    both, recipe = Run(runs / "both"), recipe_of(runs)
    told = load_model(str(both.model), CPU).card
    card = json.loads(told)
    assert str(runs) not in told
    steps = [Run(runs / name).read_json(Run(runs / name).summary, "train")["best_step"]
             for name in "ab"]  # fmt: skip
    assert [one["sha256"] for one in card["members"]] == [
        sha256(Run(runs / name).best) for name in "ab"
    ]
    assert [one["step"] for one in card["members"]] == steps
    assert [one["recipe"]["model"]["kind"] for one in card["members"]] == ["attention", "sutskever"]
    assert [one["recipe"]["training"]["seed"] for one in card["members"]] == [1, 7]
    assert not {"model", "training"} & card["recipe"].keys()
    assert card["recipe"]["export"]["max_target_length"] == recipe.export.max_target_length
    assert card["step"] == card["scores"]["step"] == sum(steps)
    summary = both.read_json(both.summary, "ensemble")
    assert summary["members"] == 2
    assert summary["best_step"] == sum(steps)
    assert summary["parameters"] == sum(
        p.numel() for name in "ab" for p in network_of(Run(runs / name)).parameters()
    )


def test_an_ensemble_is_served_like_any_other(runs: Path, tmp_path: Path) -> None:
    both, recipe = Run(runs / "both"), recipe_of(runs)
    given = (runs / "test.src").read_text().splitlines()
    out = io.StringIO()
    translate(recipe, both, io.BytesIO("\n".join(given).encode()), out)
    archive(recipe, both, tmp_path)
    with TorchServe(options(tmp_path)) as server:
        assert call(server, body={"text": given}).texts == out.getvalue().splitlines()
        told = call(server, f"/predictions/seq2seq/{recipe.export.version}/card").json
    assert len(told["members"]) == 2


# What does not fit


def copied(runs: Path, folder: Path, name: str) -> Run:
    return Run(Path(shutil.copytree(runs / name, folder / name)))


def test_members_that_are_not_trained_are_named(runs: Path, tmp_path: Path) -> None:
    member = copied(runs, tmp_path, "b")
    member.summary.unlink()
    with pytest.raises(RunError, match=r"b/training.json: not there yet; run .* train'"):
        ensemble(recipe_of(runs), Run(tmp_path / "new"), [Run(runs / "a"), member])
    assert not (tmp_path / "new").exists()


def test_an_ensemble_is_no_member(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"both: is an ensemble; allowed: .* name its members"):
        ensemble(recipe_of(runs), Run(tmp_path / "new"), [Run(runs / "a"), Run(runs / "both")])


def test_one_run_is_not_counted_twice(runs: Path, tmp_path: Path) -> None:
    copy = copied(runs, tmp_path, "a")
    with pytest.raises(RunError, match=f"{copy.root}: has the same weights as {runs / 'a'}"):
        ensemble(recipe_of(runs), Run(tmp_path / "new"), [Run(runs / "a"), copy])


def test_a_run_that_was_trained_is_not_overwritten(runs: Path) -> None:
    former = Run(runs / "a").best.read_bytes()
    with pytest.raises(RunError, match="a: holds a run that was trained itself"):
        ensemble(recipe_of(runs), Run(runs / "a"), [Run(runs / "a"), Run(runs / "b")])
    assert Run(runs / "a").best.read_bytes() == former


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("tokenizer.normalization=nfkc", r"tokenizer\.normalization: 'nfkc' -> 'nmt_nfkc'"),
        ("cleaning.max_tokens=50", r"cleaning\.max_tokens: 50 -> 100"),
    ],
)
def test_a_member_prepared_otherwise_is_named(
    runs: Path, tmp_path: Path, change: str, named: str
) -> None:
    other = trained(runs / "tiny.yaml", tmp_path / "other", change, "training.epochs=0.1")
    with pytest.raises(RunError, match=f"other: does not fit into the ensemble: {named}"):
        ensemble(recipe_of(runs), Run(tmp_path / "new"), [Run(runs / "a"), other])


def test_a_member_of_other_text_is_named(runs: Path, tmp_path: Path) -> None:
    file = text(tmp_path)
    for side in ("src", "tgt"):
        with (tmp_path / f"train.{side}").open("a") as added:
            added.write("123454321\n")
    other = trained(file, tmp_path / "other", "training.epochs=0.1")
    told = r"other: .* the digest of text train train\.src is not that of .*/a"
    with pytest.raises(RunError, match=told):
        ensemble(recipe_of(runs), Run(tmp_path / "new"), [Run(runs / "a"), other])


def test_a_member_prepared_anew_is_named(runs: Path, tmp_path: Path) -> None:
    file = text(tmp_path)
    member = trained(file, tmp_path / "b", "training.epochs=0.1")
    for side in ("src", "tgt"):
        with (tmp_path / f"train.{side}").open("a") as added:
            added.write("123454321\n")
    prepare(load(file), member.root)
    recipe, members = recipe_of(runs), [Run(runs / "a"), member]
    with pytest.raises(RunError, match=r"b/data was prepared otherwise: .*train\.src: the text of"):
        ensemble(recipe, Run(tmp_path / "new"), members)
    elsewhere = replace(recipe, data=replace(recipe.data, folder=str(tmp_path / "nowhere")))
    with pytest.raises(RunError, match=r"b: .*: its data were prepared anew since"):
        ensemble(elsewhere, Run(tmp_path / "new"), members)


def test_a_member_whose_tokenizer_was_changed_is_named(runs: Path, tmp_path: Path) -> None:
    member = copied(runs, tmp_path, "b")
    with (member.tokenizer / "target.model").open("ab") as file:
        file.write(b"\n")
    with pytest.raises(RunError, match=r"b/tokenizer/target\.model: not what 'prepare' wrote"):
        ensemble(recipe_of(runs), Run(tmp_path / "new"), [Run(runs / "a"), member])


# The folder


def test_members_keep_the_order_in_which_they_were_named(tmp_path: Path) -> None:
    (tmp_path / "members").mkdir()
    for number in range(12, 0, -1):
        (tmp_path / "members" / f"{number}.pt").touch()
    assert [int(path.stem) for path in Run(tmp_path).members] == list(range(1, 13))


def test_an_ensemble_outlives_its_members_and_can_be_made_anew(runs: Path, tmp_path: Path) -> None:
    recipe = recipe_of(runs)
    members = [copied(runs, tmp_path, name) for name in "ab"]
    both = Run(tmp_path / "both")
    ensemble(recipe, both, members)
    former = [path.read_bytes() for path in both.members]
    train(load(runs / "tiny.yaml", changes=["training.seed=9", "training.epochs=0.1"]),
          members[0], fresh=True)  # fmt: skip
    assert [path.read_bytes() for path in both.members] == former
    shutil.rmtree(members[0].root)
    assert evaluate(recipe, both)["test"].sentences == 12
    ensemble(recipe, both, members[1:])
    assert [path.read_bytes() for path in both.members] == former[1:]
    assert not both.scores.exists()


def test_a_folder_is_no_run_before_it_is_whole(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, both = recipe_of(runs), Run(tmp_path / "both")
    members = [Run(runs / name) for name in "ab"]
    ensemble(recipe, both, members[1:])
    place = training.ensemble.place

    def full(source: str | Path, target: str | Path) -> None:
        if str(target).endswith("2.pt"):
            raise OSError("No space left on device")
        place(source, target)

    monkeypatch.setattr(training.ensemble, "place", full)
    with pytest.raises(OSError, match="No space left"):
        ensemble(recipe, both, members)
    for verb in (evaluate, export):
        with pytest.raises(RunError, match=r"training\.json: not there yet"):
            verb(recipe, both)
    monkeypatch.undo()
    assert ensemble(recipe, both, members) == 2
    assert evaluate(recipe, both)["test"].sentences == 12
