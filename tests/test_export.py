"""What leaves a finished run: model.pt, translations on the command line, the archive."""

import hashlib
import importlib.metadata
import io
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import sacrebleu
import sentencex
import torch
from conftest import INVISIBLE, INVISIBLE_IN_A_LINE, ROOT, Toy, backwards

import training.export
from handler.extras import PINS
from handler.integrity import sha256
from handler.tokenizer import Tokenizer
from training.archive import archive, packaged
from training.evaluate import evaluate
from training.export import export, library
from training.run import Run, RunError
from training.translate import translate


@pytest.fixture
def own(toy: Toy, tmp_path: Path) -> Toy:
    """A copy of the toy run that a test may spoil."""
    shutil.copytree(toy.recipe_file.parent, tmp_path / "own")
    folder = tmp_path / "own"
    return Toy(folder / "toy.yaml", toy.recipe, Run(folder / "run"), folder / "store")


def typed(
    toy: Toy, verb: str, *more: object, cwd: Path = ROOT, given: bytes = b"", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """A verb as it is typed, in bytes."""
    command = [sys.executable, "-m", "training", verb, str(toy.recipe_file)]
    command += ["--run", str(toy.run.root), *map(str, more)]
    return subprocess.run(
        command, input=given, cwd=cwd, capture_output=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **environment},
    )  # fmt: skip


def translated(toy: Toy, given: bytes) -> list[str]:
    out = io.StringIO()
    lines = given.count(b"\n") + (not given.endswith(b"\n") and given != b"")
    assert translate(toy.recipe, toy.run, io.BytesIO(given), out) == 0
    assert out.getvalue().count("\n") == lines
    return out.getvalue().split("\n")[:-1]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_model_is_torchscript_with_what_a_server_needs(toy: Toy) -> None:
    model = torch.jit.load(str(toy.run.model))
    source, target = (Tokenizer(toy.run.tokenizer / f"{s}.model") for s in ("source", "target"))
    assert isinstance(model, torch.jit.ScriptModule)
    assert not model.training
    assert (model.format_version, model.has_attention) == (4, True)
    assert (model.pad_id, model.unk_id, model.bos_id, model.eos_id) == (0, 1, 2, 3)
    assert (model.source_vocabulary, model.target_vocabulary) == (source.size, target.size)
    limits = toy.recipe.export
    assert model.max_source_length == limits.max_source_length
    assert model.max_target_length == limits.max_target_length


def test_the_card_says_where_the_model_comes_from(toy: Toy) -> None:
    text = torch.jit.load(str(toy.run.model)).card
    card = json.loads(text)
    expected = toy.recipe.as_dict()
    del expected["data"]["folder"]
    assert card["recipe"] == expected
    report = toy.run.read_json(toy.run.report, "prepare")
    assert card["data_digests"] == report["sha256"]
    for side in ("source", "target"):
        digest = sha256(toy.run.tokenizer / f"{side}.model")
        assert card["data_digests"]["tokenizer"][f"{side}.model"] == digest
    assert card["scores"] == toy.run.read_json(toy.run.scores, "evaluate")
    signature = card["scores"]["test"]["bleu_signature"]
    assert f"version:{sacrebleu.__version__}" in signature
    assert "tok:13a" in signature
    assert card["versions"]["torch"] == torch.__version__
    assert set(card["versions"]) >= {"python", "torch", "sentencepiece"}
    assert card["step"] == card["scores"]["step"]
    assert card["version"] == toy.recipe.export.version
    for path in (toy.recipe_file.parent, Path.home(), ROOT):
        assert str(path) not in text


def test_nothing_in_the_model_names_a_local_path(toy: Toy) -> None:
    with zipfile.ZipFile(toy.run.model) as content:
        for name in content.namelist():
            if not name.endswith(".debug_pkl") and "/data/" not in name:
                assert str(toy.recipe_file.parent).encode() not in content.read(name), name


def test_scores_are_those_of_what_was_decoded(toy: Toy) -> None:
    scores = toy.run.read_json(toy.run.scores, "evaluate")
    for name in ("validation", "test"):
        decoded = (toy.run.root / f"{name}.decoded").read_text().splitlines()
        given = (toy.recipe_file.parent / f"{name}.src").read_text().splitlines()
        right = [backwards(text) for text in given]
        assert scores[name]["sentences"] == len(right) == len(decoded)
        assert scores[name]["bleu"] == pytest.approx(sacrebleu.corpus_bleu(decoded, [right]).score)
        exact = sum(a == b for a, b in zip(decoded, right)) / len(right)
        assert scores[name]["exact_match"] == pytest.approx(exact)


def test_translate_gives_what_evaluate_decoded(toy: Toy) -> None:
    given = (toy.recipe_file.parent / "test.src").read_bytes()
    done = typed(toy, "translate", given=given)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == (toy.run.root / "test.decoded").read_bytes()


def test_lines_keep_their_order_and_blank_ones_stay_blank(toy: Toy) -> None:
    given = [str(8 * 7**n) for n in range(9)] * 40
    random.Random(1).shuffle(given)
    alone = {text: translated(toy, text.encode())[0] for text in set(given)}
    assert len(set(alone.values())) == 9
    assert translated(toy, "\n".join(given).encode()) == [alone[text] for text in given]
    mixed = b"\n12\r\n \n\r\n34\n\t\n"
    one, other = (translated(toy, text)[0] for text in (b"12", b"34"))
    assert translated(toy, mixed) == ["", one, "", "", other, ""]
    assert translated(toy, b"") == []
    assert translated(toy, b"\n") == [""]


def test_only_a_line_feed_ends_a_line(toy: Toy) -> None:
    assert len(translated(toy, "1\u20282\x853\x0c4\r5\n6\n".encode())) == 2


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_a_line_that_cannot_be_translated_costs_itself_alone(toy: Toy, more: list[str]) -> None:
    bad = {
        301: (b"1" * 100, b"101 tokens; the model reads at most 63: split the line"),
        303: (b"12\xff3", b"byte 0xff at offset 2 of the line is not UTF-8; allowed: UTF-8"),
        305: (b"34\n", b""),
    }
    lines = [b"12"] * 400
    for number, (line, _) in bad.items():
        lines[number - 1] = line.removesuffix(b"\n")
    done = typed(toy, "translate", *more, given=b"\n".join(lines))
    assert done.returncode == 1
    told = done.stderr.splitlines()
    assert len(told) == 3
    for line, number in zip(told, (301, 303)):
        assert line.startswith(b"translate: line %d: %s" % (number, bad[number][1]))
    assert told[2].startswith(b"translate: 2 lines could not be translated: an empty ")
    found = done.stdout.decode().splitlines()
    assert len(found) == 400
    assert found[300] == found[302] == ("[]" if more else "")
    if not more:
        one, other = (translated(toy, text)[0] for text in (b"12", b"34"))
        assert found[304] == other
        assert {text for i, text in enumerate(found) if i not in (300, 302, 304)} == {one}


@pytest.mark.parametrize("given", [b"12\n34\n", b""])
def test_options_that_suit_no_line_stop_it_at_once(toy: Toy, given: bytes) -> None:
    options = '{"min_length": 999, "max_length": 999}'
    done = typed(toy, "translate", "--options", options, given=given)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"translate: min_length: got 999; allowed by this model: at most")
    assert done.stderr.count(b"\n") == 1


def test_utf16_is_named_once(toy: Toy) -> None:
    done = typed(toy, "translate", given="12\n34\n".encode("utf-16"))
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"translate: standard input is UTF-16: convert it by iconv")


def test_as_many_lines_come_as_go_whatever_does_not_show(toy: Toy) -> None:
    texts = [*INVISIBLE, *(f"1{c}2" for c in INVISIBLE_IN_A_LINE)]
    given = "\n".join(texts).encode()
    found = typed(toy, "translate", given=given)
    assert (found.returncode, found.stderr) == (0, b"")
    answers = found.stdout.decode().removesuffix("\n").split("\n")
    assert len(answers) == len(texts)
    assert answers[: len(INVISIBLE)] == [""] * len(INVISIBLE)
    assert all(answers[len(INVISIBLE) :])


def test_a_reader_that_leaves_early_is_no_error_of_ours(toy: Toy) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "training", "translate", str(toy.recipe_file)]
    command += ["--run", str(toy.run.root)]
    done = subprocess.run(
        command, input=b"12\n" * 300, stdout=write, stderr=subprocess.PIPE, cwd=ROOT, timeout=300,
        check=False,
    )  # fmt: skip
    os.close(write)
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b"Traceback" not in done.stderr


def test_the_archive_holds_what_serving_needs_and_no_more(toy: Toy) -> None:
    package = ROOT / "handler"
    code = {
        path.relative_to(ROOT).as_posix()
        for path in (*package.rglob("*.py"), *package.rglob("*.cu"))
        if path.name != "seq2serve.py"
    }
    home = Path(sentencex.__file__).parent
    code |= {path.relative_to(home.parent).as_posix() for path in home.rglob("*.py")}
    described = f"sentencex-{PINS['sentencex']}.dist-info"
    with zipfile.ZipFile(toy.store / "seq2seq.mar") as content:
        names = content.namelist()
        assert names == sorted(set(names))
        assert set(names) == code | {
            "MAR-INF/MANIFEST.json", "digests.json", "model-config.yaml", "model.pt",
            "seq2serve.py", "source.model", "target.model",
            *([library(toy.run).name] if library(toy.run).exists() else []),
            f"{described}/METADATA", f"{described}/licenses/LICENSE.txt",
        }  # fmt: skip
        digests = json.loads(content.read("digests.json"))
        assert set(digests) == set(names) - {"MAR-INF/MANIFEST.json", "digests.json"}
        for name, digest in digests.items():
            assert hashlib.sha256(content.read(name)).hexdigest() == digest
        assert content.read("model.pt") == toy.run.model.read_bytes()
        manifest = json.loads(content.read("MAR-INF/MANIFEST.json"))
        assert manifest["model"]["modelName"] == "seq2seq"
        assert manifest["model"]["modelVersion"] == toy.recipe.export.version
        for name in names:
            assert str(toy.recipe_file.parent).encode() not in content.read(name), name
    assert (toy.store / "seq2seq.mar.sha256").read_text() == (
        f"{sha256(toy.store / 'seq2seq.mar')}  seq2seq.mar\n"
    )


@pytest.mark.parametrize("version", ["1.0.32", None])
def test_an_archive_is_not_built_without_what_travels_in_it(version, tmp_path, monkeypatch):
    def found(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr("importlib.metadata.version", found)
    with pytest.raises(RunError, match=f"needs sentencex 0.6.1, found {version or 'none'}"):
        packaged("sentencex")


def test_archives_of_one_model_are_equal_and_nothing_else_is_written(
    toy: Toy, tmp_path: Path
) -> None:
    for name in ("cwd", "home", "tmp"):
        (tmp_path / name).mkdir()
    former = files(toy.recipe_file.parent)
    done = typed(
        toy, "archive", "--store", "../store", cwd=tmp_path / "cwd", HOME=str(tmp_path / "home"),
        TMPDIR=str(tmp_path / "tmp"), PYTHONHASHSEED="7",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    archive(toy.recipe, toy.run, tmp_path / "again")
    expected = files(toy.store)
    assert files(tmp_path / "store") == files(tmp_path / "again") == expected
    assert set(expected) == {"seq2seq.mar", "seq2seq.mar.sha256"}
    assert set(files(tmp_path)) == {f"{s}/{n}" for s in ("store", "again") for n in expected}
    assert files(toy.recipe_file.parent) == former


def test_evaluating_and_exporting_again_change_nothing(own: Toy, tmp_path: Path) -> None:
    former = files(own.run.root)
    evaluate(own.recipe, own.run)
    export(own.recipe, own.run)
    assert files(own.run.root).keys() == former.keys()
    for name, content in files(own.run.root).items():
        if name == "scores.json":  # float operators may be native by now, and differ in last bits
            scores, before = json.loads(content), json.loads(former[name])
            perplexity = before.pop("validation_perplexity")
            assert scores.pop("validation_perplexity") == pytest.approx(perplexity, rel=1e-5)
            assert scores == before
        elif name != "model.pt":  # TorchScript numbers its classes by process
            assert content == former[name], name
    given = b"123\n4567\n"
    assert translated(own, given) == [translated(own, text)[0] for text in given.split()]


def test_a_model_that_decodes_otherwise_is_not_left(
    own: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = training.export.load

    def spoilt(path: str, device: torch.device) -> object:
        model = load(path, device)
        with torch.no_grad():
            for one in (model.generator.bias, *model.generator.native):
                one.copy_(torch.randn(one.shape) * 100)
        return model

    monkeypatch.setattr(training.export, "load", spoilt)
    with pytest.raises(RunError, match="decodes otherwise than the network"):
        export(own.recipe, own.run)
    assert not own.run.model.exists()


def test_a_model_never_meets_other_tokenizers(own: Toy) -> None:
    with (own.run.tokenizer / "target.model").open("ab") as file:
        file.write(b"\n")
    with pytest.raises(RunError, match=r"target\.model changed since model\.pt was trained"):
        archive(own.recipe, own.run, own.store)
    with pytest.raises(RunError, match=r"target\.model changed since model\.pt was trained"):
        translate(own.recipe, own.run, io.BytesIO(b"1\n"), io.StringIO())


def test_a_spoilt_model_is_named(own: Toy) -> None:
    own.run.model.write_bytes(own.run.model.read_bytes()[:1000])
    done = typed(own, "translate", given=b"1\n")
    assert done.returncode == 1
    assert done.stderr.startswith(f"translate: {own.run.model}: not a whole model".encode())
    assert done.stderr.count(b"\n") == 1
