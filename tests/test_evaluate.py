"""The verb evaluate: the weights that it scores, and how it decodes and scores."""

import json
import unicodedata
from collections.abc import Iterator
from typing import Any

import pytest
import sacrebleu
import torch
from tiny_run import KINDS, StraightRuns, Tiny, figures, verb

import training.evaluate
import training.scoring
from handler.request import RequestOptions
from handler.sentences import Segment, join
from handler.tokenizer import Tokenizer
from model import Network
from training import checkpoint
from training.evaluate import evaluate
from training.export import export, exported
from training.normalization import AS_IT_STANDS, Normalization
from training.recipe import ScoringOptions, TokenizerOptions, load
from training.run import RunError
from training.scoring import decoded_scores, score_text
from training.tokenizer import learn
from training.train import tokenizers

pytestmark = pytest.mark.usefixtures("one_thread")

HYPOTHESES = ["Der Hund, der bellt .", "eine KATZE"]
REFERENCES = ["Der Hund , der bellt.", "eine Katze"]


@pytest.mark.parametrize(
    ("options", "signed"),
    [
        (ScoringOptions(), ("case:mixed", "tok:13a")),
        (ScoringOptions(tokenize="none"), ("case:mixed", "tok:none")),
        (ScoringOptions(tokenize="none", lowercase=True), ("case:lc", "tok:none")),
        (ScoringOptions(tokenize="char"), ("case:mixed", "tok:char")),
    ],
)
def test_scores_are_as_the_signature_says(
    options: ScoringOptions, signed: tuple[str, str]
) -> None:
    scores = decoded_scores(HYPOTHESES, REFERENCES, options)
    assert set(signed) <= set(scores.bleu_signature.split("|"))
    how = {"tokenize": options.tokenize, "lowercase": options.lowercase, "force": True}
    alone = sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES], **how)
    assert scores.bleu == pytest.approx(alone.score)
    chrf = sacrebleu.CHRF(lowercase=options.lowercase).corpus_score(HYPOTHESES, [REFERENCES])
    assert scores.chrf == pytest.approx(chrf.score)
    assert (scores.sentences, scores.exact_match) == (2, 0.0)


def test_each_option_gives_another_score() -> None:
    options = [
        ScoringOptions(), ScoringOptions(tokenize="none"),
        ScoringOptions(tokenize="none", lowercase=True),
    ]  # fmt: skip
    assert len({decoded_scores(HYPOTHESES, REFERENCES, one).chrf for one in options}) == 2
    assert len({decoded_scores(HYPOTHESES, REFERENCES, one).bleu for one in options}) == 3


@pytest.mark.parametrize("rule", [Normalization(), AS_IT_STANDS], ids=["nmt_nfkc", "as it stands"])
def test_references_are_scored_as_they_can_be_written(
    monkeypatch: pytest.MonkeyPatch, rule: Normalization
) -> None:
    apart = unicodedata.normalize("NFD", "řezba a žlutý kůň")
    references = [apart, "（茶）2 m²", "น้ำดำ", "a\u2028b"]
    model = learn(TokenizerOptions(algorithm="bpe"), 305, references, "target_vocabulary", rule)
    tokenizer = Tokenizer(model)
    perfect = [tokenizer.encode(one) for one in references]

    def translated(*_: object) -> Iterator[list[dict[str, str]]]:
        for ids in perfect:
            yield [{"text": join([Segment("x", "")], [tokenizer.decode(ids)])}]

    monkeypatch.setattr(training.scoring, "translations", translated)
    nothing = torch.device("cpu"), ScoringOptions(tokenize="char")
    scores, _ = score_text(None, tokenizer, tokenizer, references, references, *nothing)
    assert scores.exact_match == 1.0
    assert scores.bleu == pytest.approx(100)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_evaluate_decodes_and_scores_as_the_recipe_says(
    straight: StraightRuns, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, beam_size: int
) -> None:
    tiny = straight["attention"].copy(tiny.file.parent / "scored")
    text = tiny.file.read_text()
    scoring = f"{{beam_size: {beam_size}, length_penalty: 0.5, tokenize: none, lowercase: true}}"
    tiny.file.write_text(f"{text}scoring: {scoring}\n")
    asked: list[RequestOptions] = []
    translations = training.scoring.translations

    def watched(*arguments: Any, **more: Any) -> Any:
        asked.extend(one for one in arguments if isinstance(one, RequestOptions))
        return translations(*arguments, **more)

    monkeypatch.setattr(training.scoring, "translations", watched)
    evaluate(load(tiny.file), tiny.run)
    assert [one.beam_size for one in asked] == [beam_size] * 2
    assert [one.length_penalty == 0.5 for one in asked] == [beam_size > 1] * 2
    stored = json.loads(tiny.run.scores.read_text())
    for name in ("validation", "test"):
        assert {"case:lc", "tok:none"} <= set(stored[name]["bleu_signature"].split("|"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_that_were_validated_are_evaluated_and_exported(
    straight: StraightRuns, tiny: Tiny, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], kind: str,
) -> None:  # fmt: skip
    tiny = straight[kind].copy(tiny.file.parent / "exported")
    recipe = load(tiny.file)
    evaluate(recipe, tiny.run)
    stored = json.loads(tiny.run.scores.read_text())
    [judged] = [
        line["perplexity"] for line in figures(tiny.run)
        if line["kind"] == "validation" and line["step"] == stored["step"]
    ]  # fmt: skip
    assert stored["validation_perplexity"] == pytest.approx(judged, rel=1e-4)
    export(recipe, tiny.run)
    source, target = tokenizers(tiny.run)
    network = Network(recipe.model, source.size, target.size)
    held = checkpoint.load(tiny.run.best)
    checkpoint.weights(held, network)
    wanted = network.encoder.embedding.weight.detach()
    raw = held["network"]["encoder.embedding.weight"]
    assert torch.equal(wanted, raw) == (not recipe.training.average)
    served = exported(tiny.run, torch.device("cpu")).state_dict()
    assert torch.equal(served["encoder.embedding.weight"], wanted)
    assert verb(monkeypatch, capsys, tiny, "evaluate")[0] == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Network", r"best\.pt: CUDA out of memory\. Its network does not fit: take a machine"),
        ("score_text", r"decoding validation: CUDA out of memory\. Lower scoring\.beam_size, or"),
        ("perplexity", r"perplexity of validation: CUDA out of memory\. .* training\.batch_tokens"),
    ],
)
def test_too_little_memory_is_explained(
    straight: StraightRuns, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    def no_memory(*_: object, **more: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    tiny = straight["attention"].copy(tiny.file.parent / "short")
    monkeypatch.setattr(training.evaluate, name, no_memory)
    with pytest.raises(RunError, match=said):
        evaluate(load(tiny.file), tiny.run)


def test_a_sentence_that_is_too_long_names_the_option(
    straight: StraightRuns, tiny: Tiny
) -> None:
    tiny = straight["attention"].copy(tiny.file.parent / "long")
    tiny.change("max_source_length: 32", "max_source_length: 4")
    with pytest.raises(RunError, match=r"export\.max_source_length: got 4; allowed: at least \d+"):
        evaluate(load(tiny.file), tiny.run)
