"""The verb report: what is computed, what is told of runs of every kind, and that the page is whole
by itself."""

import base64
import io
import json
import math
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from conftest import write_toy_text
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from handler.tokenizer import Tokenizer
from model import SpecialTokens
from training.evaluate import evaluate
from training.export import export
from training.prepare import prepare
from training.recipe import Recipe, load
from training.report import fonts, report, sections
from training.report.analysis import (
    FrequencyBucket,
    Translation,
    bleu_interval,
    by_frequency,
    by_length,
    corpus_bleu,
    examples,
    length_bounds,
    scored,
    seen_words,
)
from training.report.attention import Alignment, alignments, chosen
from training.report.curves import Curves
from training.report.figures import heat_map, panels
from training.report.page import paragraph
from training.run import Run, RunError
from training.tokens import TokenPairs
from training.train import train

RECIPE = """\
name: tiny
data:
  train: {source: train.src, target: train.tgt}
  validation: {source: validation.src, target: validation.tgt}
  test: {source: test.src, target: test.tgt}
tokenizer: {algorithm: bpe, source_vocabulary: 281, target_vocabulary: 300}
export: {max_source_length: 32, max_target_length: 32}
training: {epochs: 3, batch_tokens: 150, learning_rate: 0.006, schedule: constant,
  validate_every: 100}
scoring: {beam_size: 2}
"""
KINDS = {
    "attention": "model: {embedding_size: 32, encoder_hidden_size: 24, decoder_hidden_size: 48}\n",
    "sutskever": "model: {kind: sutskever, bidirectional: false, embedding_size: 16, "
    "encoder_hidden_size: 16, decoder_hidden_size: 16}\n",
}
HOSTILE = """<script>alert("1")</script> & '<b>' </body>"""
CURVES = ("loss", "perplexity", "bleu", "learning_rate", "gradient_norm", "speed")
WEB = re.compile(r"""(?:src|href|srcset|action|data|poster)\s*=\s*["']([^"']{0,40})""")


@dataclass(frozen=True)
class Tiny:
    """A recipe and a run of it."""

    recipe: Recipe
    run: Run

    def page(self) -> str:
        return report(self.recipe, self.run).read_text(encoding="utf-8")

    def figures(self) -> set[str]:
        """Names of the PNG files, without themes."""
        return {p.name.split(".")[0] for p in (self.run.root / "report").glob("*.png")}

    def fill(self, name: str, line: str) -> None:
        """Makes all lines of a file the same one."""
        path = self.run.root / name
        path.write_text(f"{line}\n" * path.read_bytes().count(b"\n"), encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Tiny]]:
    """A finished run of each kind."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = {}
    for kind, model in KINDS.items():
        folder = tmp_path_factory.mktemp("report") / kind
        folder.mkdir()
        write_toy_text(folder, pairs=800)
        for path in folder.glob("*.src"):  # words, most of them the same: learnt in no time
            letters = path.read_text().translate(str.maketrans("0123456789", "abcdefghij"))
            words = [" ".join(line) for line in letters.splitlines()]
            path.write_text("".join(f"{one}\n" for one in words))
            told = "".join(f"they say {one} to all of us\n" for one in words)
            path.with_suffix(".tgt").write_text(told)
        (folder / "tiny.yaml").write_text(RECIPE + model)
        recipe, run = load(folder / "tiny.yaml"), Run(folder / "run")
        prepare(recipe, run.root)
        train(recipe, run)
        evaluate(recipe, run)
        export(recipe, run)
        runs[kind] = Tiny(recipe, run)
    yield runs
    torch.set_num_threads(former)


@pytest.fixture
def tiny(made: dict[str, Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """A run of a model with attention, to change; its report has one heat map."""
    monkeypatch.setattr(sections, "HEAT_MAPS", 1)
    former = made["attention"].run.root
    shutil.copytree(former, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    return Tiny(made["attention"].recipe, Run(tmp_path / "run"))


class Elements(HTMLParser):
    """Checks that elements are closed in order; keeps what they are and what they say."""

    VOID = ("meta", "img", "source", "link", "br", "hr", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


# Buckets


@pytest.mark.parametrize(
    ("lengths", "most", "expected"),
    [
        ([1] * 5 + [2] * 5 + [3] * 5 + [4] * 5, 2, [(1, 2), (3, 4)]),
        ([1] * 5 + [2] * 5 + [3] * 5 + [4] * 5, 4, [(1, 1), (2, 2), (3, 3), (4, 4)]),
        ([1, 2, 3, 9, 9, 9], 2, [(1, 3), (4, 9)]),  # 4 to 8 belong somewhere too
        ([5] * 10 + [6, 7], 3, [(5, 5), (6, 7)]),  # one length is never divided
        ([8], 6, [(8, 8)]),
    ],
)
def test_buckets_of_length(
    lengths: list[int], most: int, expected: list[tuple[int, int]]
) -> None:
    random.Random(0).shuffle(lengths)
    assert length_bounds(lengths, most) == expected


@given(st.lists(st.integers(0, 60), min_size=1, max_size=80), st.integers(1, 9))
def test_every_sentence_is_in_one_bucket_of_length(lengths: list[int], most: int) -> None:
    bounds = length_bounds(lengths, most)
    assert 1 <= len(bounds) <= most
    for length in lengths:
        assert sum(low <= length <= high for low, high in bounds) == 1
    assert all(any(low <= one <= high for one in lengths) for low, high in bounds)


def translated(*pairs: tuple[str, str]) -> list[Translation]:
    """Translations with these references and hypotheses."""
    return scored([f"s{i}" for i in range(len(pairs))], *zip(*pairs))


def test_f1_by_frequency_by_hand() -> None:
    seen = Counter({"the": 1000, "cat": 7, "sat": 1, "on": 999})
    found = by_frequency(
        translated(("the the cat zzz", "the cat cat sat"), ("cat on", "on"), ("on", "cat on on")),
        seen, str,
    )  # fmt: skip
    assert found == [
        FrequencyBucket(0, 0, references=1, hypotheses=0, matches=0),  # zzz
        FrequencyBucket(1, 1, references=0, hypotheses=1, matches=0),  # sat
        # cat of the second reference is not matched by that of the third hypothesis
        FrequencyBucket(5, 9, references=2, hypotheses=3, matches=1),
        FrequencyBucket(100, 999, references=2, hypotheses=3, matches=2),  # on
        FrequencyBucket(1000, None, references=2, hypotheses=1, matches=1),  # the
    ]
    assert [one.f1 for one in found] == pytest.approx([0, 0, 2 / 5, 4 / 5, 2 / 3])
    assert [one.name for one in found] == ["0", "1", "5–9", "100–999", "≥ 1,000"]
    precision, recall = 1 / 3, 1 / 2
    assert found[2].f1 == pytest.approx(2 * precision * recall / (precision + recall))


def test_words_seen_in_training(made: dict[str, Tiny]) -> None:
    tokenizer = Tokenizer(made["attention"].run.tokenizer / "target.model")
    texts = ["ab cd", "ab e", "ab", "j"]
    pairs = TokenPairs.of([([5], tokenizer.encode(one)) for one in texts], SpecialTokens())
    assert seen_words(pairs, tokenizer, str) == ({"ab": 3, "cd": 1, "e": 1, "j": 1}, 1)
    assert seen_words(pairs, tokenizer, str, most=3) == ({"ab": 2, "cd": 1}, 2)
    assert seen_words(pairs, tokenizer, lambda text: text.replace("a", "x "))[0]["x"] == 3


def noisy(count: int) -> list[Translation]:
    draw = random.Random(1)
    lines = [" ".join(draw.choices("abcdefg", k=draw.randint(1, 12))) for _ in range(count)]
    return translated(*((one, one[: draw.randint(0, len(one))] + " x") for one in lines))


def test_bleu_by_length_is_that_of_the_sentences_in_each_bucket() -> None:
    lines = noisy(90)
    lengths = [len(one.reference.split()) for one in lines]
    buckets = by_length(lines, lengths, most=4)
    assert len(buckets) == 4
    assert sum(one.sentences for one in buckets) == 90
    for bucket in buckets:
        inside = [
            one for one, n in zip(lines, lengths) if bucket.shortest <= n <= bucket.longest
        ]
        expected = sacrebleu.BLEU().corpus_score(
            [one.hypothesis for one in inside], [[one.reference for one in inside]]
        )
        assert bucket.sentences == len(inside)
        assert bucket.bleu == pytest.approx(expected.score)
        assert bucket.low <= bucket.bleu <= bucket.high
    few = by_length(lines[:30], lengths[:30])  # too few for more than one bucket
    assert [one.sentences for one in few] == [30]


def test_the_interval_of_bleu_narrows_with_more_sentences() -> None:
    widths = []
    for count in (30, 480):
        n_grams = torch.tensor([one.n_grams for one in noisy(count)])
        low, high = bleu_interval(n_grams)
        assert low < corpus_bleu(n_grams.sum(0).tolist()) < high
        assert (low, high) == bleu_interval(n_grams)
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    same = torch.tensor([one.n_grams for one in translated(*[("a b c d e", "a b c d e")] * 30)])
    assert bleu_interval(same) == pytest.approx((100, 100))


def test_best_worst_and_others() -> None:
    lines = noisy(60) + translated(*[("a b c d e", "a b c d e"), ("f g h i", "f g h i")] * 8)
    lines = scored(*zip(*((str(i), one.reference, one.hypothesis) for i, one in enumerate(lines))))
    found = examples(lines)
    taken = [one.index for one in [*found.best, *found.worst, *found.drawn]]
    assert len(taken) == len(set(taken)) == 25
    assert found == examples(lines)
    assert all(one.exact for one in found.best)
    assert [len(one.reference) for one in found.best] == [9] * 8 + [7] * 2
    floor = max(one.chrf for one in found.worst)
    assert all(one.chrf >= floor for one in lines if one.index not in taken)
    assert [one.chrf for one in found.worst] == sorted(one.chrf for one in found.worst)


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_few_sentences_are_told_once(count: int) -> None:
    found = examples(noisy(count))
    taken = [one.index for one in [*found.best, *found.worst, *found.drawn]]
    assert sorted(taken) == list(range(count))


def test_what_is_exact_is_not_among_the_worst() -> None:
    assert examples(translated(*[("a", "a")] * 30)).worst == []


# Curves


def test_curves_of_a_file_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 20, "kind": "training", "loss": 3.5},
        {"step": 40, "kind": "training", "loss": float("nan")},
        {"step": 40, "kind": "validation", "bleu": 1.5},
        {"step": 60, "kind": "training", "loss": 2},
    ]
    text = "".join(json.dumps(one) + "\n" for one in lines)
    path.write_bytes(text.encode() + '{"step": 80, "kind": "training", "ü'.encode()[:-1])
    curves = Curves.read(path)
    assert curves.series("training", "loss") == ([20, 60], [3.5, 2.0])
    assert curves.series("validation", "bleu") == ([40], [1.5])
    assert curves.series("validation", "loss") == ([], [])
    assert (curves.unreadable, curves.last_step) == (1, 60)
    path.write_text('5\n[]\n{"step": "x", "kind": "training"}\n{"step": 1, "kind": "else"}\n')
    assert (Curves.read(path).unreadable, Curves.read(path).last_step) == (4, 0)


def test_panels_of_curves() -> None:
    training = [{"step": n, "loss": 3.0, "objective": 3.0, "gradient_norm": 2.0} for n in (20, 40)]
    validation = [{"step": 30, "perplexity": math.e**2, "bleu": 5.0}]
    curves = Curves({"training": training, "validation": validation}, 0)
    found = {one.name: one for one in panels(curves, 30, 1.0)}
    assert list(found) == ["loss", "perplexity", "bleu", "gradient_norm"]
    assert [one.name for one in found["loss"].lines] == ["training", "validation"]
    assert found["loss"].lines[1].series == ([30], [pytest.approx(2.0)])
    assert {one.last for one in found.values()} == {40}
    training[1]["objective"] = 3.5  # with label smoothing it is another figure
    lines = panels(curves, 30, 1.0)[0].lines
    assert [one.name for one in lines] == ["training", "validation", "objective"]


# The page


@pytest.fixture(scope="module")
def page(made: dict[str, Tiny]) -> str:
    return made["attention"].page()


def test_the_scores_are_those_of_scores_json(made: dict[str, Tiny], page: str) -> None:
    scores = json.loads(made["attention"].run.scores.read_text())
    for name in ("validation", "test"):
        told = scores[name]
        cells = [
            f"{told['sentences']:,}", f"{told['bleu']:.2f}", f"{told['chrf']:.2f}",
            f"{told['exact_match']:.2%}",
        ]  # fmt: skip
        row = f'<th scope="row">{name}</th>' + "".join(
            f'<td class="number">{cell}</td>' for cell in cells
        )
        assert row in page
    text = Elements(page).text
    assert scores["test"]["bleu_signature"] in text
    assert f"perplexity (validation) {scores['validation_perplexity']:.3f}" in text
    assert f"Weights of step {scores['step']:,}" in text


def test_the_page_tells_what_the_run_is(made: dict[str, Tiny], page: str) -> None:
    tiny, text = made["attention"], Elements(page).text
    summary = json.loads(tiny.run.summary.read_text())
    assert f"parameters {summary['parameters']:,}" in text
    assert f"The weights of step {summary['best_step']:,} were kept" in text
    assert f"torch {torch.__version__}" in text
    assert "encoder_hidden_size: 24" in text
    assert '"data_digests"' in text
    assert "model.pt 0." in text
    assert str(tiny.run.root.parent) not in page  # a path of the machine that trained
    assert "not there yet" not in text


def test_the_page_needs_nothing_else(page: str) -> None:
    elements = Elements(page)
    assert {one[:5] for one in WEB.findall(page) if not one.startswith("#")} == {"data:"}
    assert "@import" not in page
    assert "url(" not in page
    assert elements.all("script") == elements.all("link") == []
    assert elements.all("html") == [{"lang": "en"}]
    assert elements.found[2] == ("meta", {"charset": "utf-8"})
    assert page.encode().index(b"charset") < 1024  # where browsers look for it
    metas = {one.get("name") or one.get("http-equiv"): one.get("content") for one in
             elements.all("meta")}  # fmt: skip
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert "default-src 'none'" in str(metas["Content-Security-Policy"])
    targets = {one["href"] for one in elements.all("a")}
    assert targets == {f"#{one['id']}" for one in elements.all("section")}
    assert all(one["alt"] for one in elements.all("img"))


def test_figures_are_whole_and_show_something(made: dict[str, Tiny], page: str) -> None:
    tiny, embedded = made["attention"], set(re.findall(r"base64,([^\"]+)", page))
    files = list((tiny.run.root / "report").glob("*.png"))
    assert tiny.figures() == {
        *CURVES, "bleu_by_length", "f1_by_frequency", *(f"attention_{i}" for i in range(1, 7)),
    }  # fmt: skip
    assert embedded == {base64.b64encode(path.read_bytes()).decode() for path in files}
    for path in files:
        pixels = imread(io.BytesIO(path.read_bytes()))[..., :3]
        corner, dark = pixels[0, 0], ".dark." in path.name
        assert (corner.mean() < 0.5) == dark
        different = (abs(pixels - corner).max(-1) > 0.1).mean()
        assert different > 0.01, path.name
        light = path.with_name(path.name.replace(".dark.", "."))
        assert imread(light).shape == imread(path).shape


def test_a_report_made_again_is_the_same_and_leaves_nothing_stale(tiny: Tiny) -> None:
    first, folder = tiny.page(), tiny.run.root / "report"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "attention_99.png").write_bytes(b"of a longer report")
    assert tiny.page() == first
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


@pytest.mark.parametrize("name", ["data/test.source", "data/test.target", "test.decoded"])
def test_text_is_shown_and_never_obeyed(tiny: Tiny, name: str) -> None:
    tiny.fill(name, HOSTILE)
    page = tiny.page()
    elements = Elements(page)
    assert elements.all("script") == elements.all("b") == []
    assert "<script" not in page.lower()
    assert HOSTILE in elements.text
    assert paragraph("<&>\"'") == "<p>&lt;&amp;&gt;&quot;&#x27;</p>"


def test_text_of_any_script_has_its_own_direction(tiny: Tiny) -> None:
    tiny.fill("test.decoded", "שלום עולם 年")
    page = tiny.page()
    assert '<dd dir="auto"><bdi lang="" dir="auto">שלום עולם 年</bdi></dd>' in page
    assert "test.decoded gives BLEU 0.00 (" in Elements(page).text


def test_a_run_that_is_training(tiny: Tiny) -> None:
    for path in (tiny.run.summary, tiny.run.scores, tiny.run.model, tiny.run.best):
        path.unlink()
    with tiny.run.metrics.open("a") as file:
        file.write('{"step": 9999, "kind": "tr')
    text = Elements(tiny.page()).text
    assert tiny.figures() == set(CURVES)
    assert "Training has not ended; the last step that is logged is" in text
    assert "1 of its lines cannot be read" in text
    for what, verb in (
        ("Scores", "evaluate"), ("Translations of the test set", "evaluate"),
        ("Weights of a first validation", "train"), ("The model card", "export"),
    ):  # fmt: skip
        assert f"{what}: not there yet; run python -m training {verb}" in text


def test_a_run_that_has_just_begun(tiny: Tiny) -> None:
    for path in (tiny.run.summary, tiny.run.scores, tiny.run.model, tiny.run.best):
        path.unlink()
    tiny.run.metrics.write_text("")
    assert "No curves yet" in Elements(tiny.page()).text
    assert tiny.figures() == set()
    tiny.run.metrics.write_text('{"step": 20, "epoch": 1, "kind": "training", "loss": 5.0}\n')
    assert "Figures of validation: not there yet" in Elements(tiny.page()).text
    assert tiny.figures() == {"loss"}


def test_a_run_without_attention(made: dict[str, Tiny]) -> None:
    text = Elements(made["sutskever"].page()).text
    assert "A model of kind sutskever has no attention." in text
    assert made["sutskever"].figures() == {*CURVES, "bleu_by_length", "f1_by_frequency"}


def test_scores_of_other_weights_are_told(tiny: Tiny) -> None:
    scores: dict[str, Any] = json.loads(tiny.run.scores.read_text())
    scores["step"] += 1
    tiny.run.scores.write_text(json.dumps(scores))
    text = Elements(tiny.page()).text
    assert f"The scores are of step {scores['step']:,}, and the weights kept since" in text
    assert "run 'python -m training export' again" in text


def test_runs_of_which_no_report_can_be_made(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="run 'python -m training prepare' first"):
        report(tiny.recipe, Run(tmp_path / "empty"))
    assert not (tmp_path / "empty").exists()
    (tiny.run.root / "test.decoded").write_text("one line\n")
    with pytest.raises(RunError, match=r"got 1 lines; allowed: \d+.*training evaluate' again"):
        report(tiny.recipe, tiny.run)
    tiny.run.metrics.unlink()
    with pytest.raises(RunError, match="run 'python -m training train' first"):
        report(tiny.recipe, tiny.run)
    assert not (tiny.run.root / "report").exists()


def test_weights_of_another_recipe_are_refused(made: dict[str, Tiny], tiny: Tiny) -> None:
    with pytest.raises(RunError, match=r"best\.pt was trained otherwise: .*model\.kind"):
        report(made["sutskever"].recipe, tiny.run)


def test_without_matplotlib_the_message_says_how_to_install_it(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.startswith("training.report."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RunError, match=r"pip install seq2serve\[report\]"):
        report(tiny.recipe, tiny.run)


# Attention


def test_attention_is_that_of_the_translations(made: dict[str, Tiny]) -> None:
    tiny = made["attention"]
    tokenizer = Tokenizer(tiny.run.tokenizer / "source.model")
    sources = (tiny.run.data / "test.source").read_text().splitlines()
    decoded = (tiny.run.root / "test.decoded").read_text().splitlines()
    encoded = [tokenizer.encode(one) for one in sources]
    step, found = alignments(tiny.recipe, tiny.run, encoded, most=6)
    assert step == json.loads(tiny.run.scores.read_text())["step"]
    assert len(found) == 6
    for one in found:
        assert one.translation == decoded[one.index]
        assert "".join(one.source) == f"▁{sources[one.index]}</s>".replace(" ", "▁")
        weights = torch.tensor(one.weights)
        assert weights.shape == (len(one.target), len(one.source))
        assert weights.sum(1).tolist() == pytest.approx([1.0] * len(one.target), abs=2**-10)


def test_lines_of_legible_length_are_chosen() -> None:
    lengths = [1, 2, 10, 80, 11, 5, 12, 30, 24]
    assert chosen(lengths, 9) == [5, 2, 4, 6, 8]
    assert chosen(lengths, 2) == chosen(lengths, 2)
    assert set(chosen(lengths, 2)) < {2, 4, 5, 6, 8}
    assert chosen([90, 70, 80], 2) == [1, 2]
    assert chosen([], 2) == []


def test_characters_without_a_font_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "installed", dict)
    source, target = ["▁Ünï", "이천", "$x$", "</s>"], ["▁年", "a" * 40]
    # A box would be drawn with a warning, which is an error in these tests.
    drawn = heat_map("x", Alignment(0, source, target, "", [[0.25] * 4] * 2))
    assert drawn.missing == {"이", "천", "年"}
    assert fonts.labels(source, drawn.missing) == ["▁Ünï", "#2", "$x$", "</s>"]
    assert fonts.labels(target, drawn.missing) == ["#1", "a" * 17 + "…"]


def test_a_font_is_taken_where_one_has_the_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    own = next(iter(fonts.font_manager.findSystemFonts()), None)
    found = fonts.fonts_for(["abc", "Привет", "γεια", "مرحبا", "שלום", "▁"])
    assert found == fonts.Fonts([fonts.OWN], frozenset())
    if own:
        monkeypatch.setattr(fonts, "installed", lambda: {own: frozenset(map(ord, "이천"))})
        assert fonts.fonts_for(["이천 년"]).missing == {"년"}
        assert len(fonts.fonts_for(["이천 년"]).families) == 2


def test_scripts_that_run_from_right_to_left() -> None:
    assert fonts.right_to_left(["▁שלום", "</s>"])
    assert fonts.right_to_left(["▁السلام", "▁عليكم", "</s>"])
    assert not fonts.right_to_left(["▁12", "abc", "</s>"])
    assert not fonts.right_to_left([])
