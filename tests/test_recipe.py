"""Recipes: what is wrong is named by file, key and value, with what is allowed."""

from pathlib import Path

import pytest

from training.recipe import Recipe, RecipeError, load

ROOT = Path(__file__).resolve().parent.parent
DATES = "name: x\ndata: {generator: dates}\nmodel: {}\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def loaded(folder: Path, text: str) -> Recipe:
    return load(written(folder, text))


def test_what_is_not_given_has_its_default(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, DATES)
    assert (recipe.name, recipe.data.generator, recipe.model.kind) == ("x", "dates", "attention")
    assert (recipe.tokenizer.source_vocabulary, recipe.training.batch_tokens) == (8000, 4096)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_of_the_repository_loads(path: Path) -> None:
    recipe = load(path)
    assert recipe.name
    assert recipe.training.epochs > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("trianing: {}", "trianing: unknown option; did you mean 'training'? allowed: name, data"),
        ("training: {epoch: 3}", "training.epoch: unknown option; did you mean 'epochs'?"),
        ("export: {3: 4}", "export.3: unknown option"),
        ("training: {epochs: many}", "training.epochs: got 'many'; allowed: a number above 0"),
        ("training: {batch_tokens: 1.5}", "training.batch_tokens: got 1.5; allowed: an integer"),
        ("training: {batch_tokens: true}", "training.batch_tokens: got true; allowed: an integer"),
        ("training: [1]", "training: got a list of 1; allowed: a mapping"),
        ("training:", "training: got null; allowed: a mapping"),
        ("cleaning: {drop_duplicates: 1}", "cleaning.drop_duplicates: got 1; allowed: true or fal"),
        ("tokenizer: {algorithm: BPE}", "tokenizer.algorithm: got 'BPE'; allowed: 'unigram' or"),
        ("training: {epochs: 0}", "training.epochs: got 0"),
        ("training: {epochs: .inf}", "training.epochs: got inf"),
        ("training: {learning_rate: .nan}", "training.learning_rate: got nan"),
        ("training: {seed: -1}", "training.seed: got -1; allowed: an integer from 0 to"),
        ("training: {label_smoothing: 0.95}", "training.label_smoothing: got 0.95; allowed: a num"),
        ("cleaning: {max_length_ratio: 1}", "cleaning.max_length_ratio: got 1"),
        ("export: {max_source_length: 1}", "export.max_source_length: got 1; allowed: an integer"),
        ("export: {version: '1/0'}", "export.version: got '1/0'; allowed: digits and dots"),
        (
            "training: {schedule: inverse_sqrt, warmup_steps: 0}",
            "training.warmup_steps: got 0; schedule 'inverse_sqrt' allows only 1 or more",
        ),
        (
            "tokenizer: {joint: true, source_vocabulary: 100, target_vocabulary: 200}",
            "tokenizer.source_vocabulary, target_vocabulary: got 100 and 200 with joint: true; "
            "allowed: two equal sizes",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, more: str, message: str) -> None:
    path = written(tmp_path, f"{DATES}{more}\n")
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the whole: got null; allowed: a mapping"),
        ("- a\n", "the whole: got a list of 1; allowed: a mapping"),
        ("name: [a\n", "not valid YAML: while parsing a flow sequence"),
        ("name: a\n  b: c\n", "not valid YAML: "),
        ("name: \x07\n", "not valid YAML: "),
        ("name: 2001-13-45\n", "not valid YAML: month must be in 1..12"),
        ("name: !!python/object/apply:os.getcwd []\n", "not valid YAML: could not determine"),
        ("data: {generator: dates}\nmodel: {}\n", "name: missing; allowed: a string"),
        ("name: x\ndata: {generator: dates}\n", "model: missing; allowed: a mapping with kind"),
        ("name: x\ndata: {}\nmodel: {}\n", "data.generator, train: got None and no files; allowed"),
        (
            "name: x\ndata: {generator: dates, train: {tsv: a}}\nmodel: {}\n",
            "data.generator, train: got 'dates' and files; allowed: one of the two",
        ),
        ("name: x\ndata: {generator: times}\nmodel: {}\n", "data.generator: got 'times'; allowed:"),
        (
            "name: x\ndata: {train: {source: a}}\nmodel: {}\n",
            "data.train.source, target, tsv: got 'a', None, None; allowed: source and target toge",
        ),
        (
            "name: x\ndata: {train: {source: a, target: b, tsv: c}}\nmodel: {}\n",
            "data.train.source, target, tsv: got 'a', 'b', 'c'; allowed: source and target toge",
        ),
        (
            "name: x\ndata: {train: {source: /a, target: b}}\nmodel: {}\n",
            "data.train.source, target, tsv: got '/a'; allowed: paths relative to data.folder",
        ),
        ("name: a/b\ndata: {generator: dates}\nmodel: {}\n", "name: got 'a/b'; allowed: letters"),
        ("name: ..\ndata: {generator: dates}\nmodel: {}\n", "name: got '..'; allowed: letters"),
        (
            "name: x\ndata: {generator: dates}\nmodel: {kind: sutskever}\n",
            "model.bidirectional: got true; kind 'sutskever' allows only false",
        ),
        (
            "name: x\ndata: {generator: dates}\n"
            "model: {kind: sutskever, bidirectional: false, encoder_layers: 2}\n",
            "model.encoder_layers, encoder_hidden_size: got 2 x 256; kind 'sutskever' hands",
        ),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: no such recipe file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match=r"cannot be read: .*directory"):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(RecipeError, match=r"latin\.yaml: cannot be read: .*utf-8"):
        load(tmp_path / "latin.yaml")


def test_text_lies_beside_the_recipe_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, elsewhere = tmp_path / "own", tmp_path / "elsewhere"
    own.mkdir()
    elsewhere.mkdir()
    files = "train: {source: a, target: b}"
    beside = written(own, f"name: x\ndata: {{{files}}}\nmodel: {{}}\n")
    assert load(beside).data.folder == str(own)
    monkeypatch.chdir(elsewhere)  # paths in a recipe do not depend on where it is read from
    assert load(Path("../own/recipe.yaml")).data.folder == str(own)
    assert load(beside, "text").data.folder == str(elsewhere / "text")
    assert load(beside, str(tmp_path)).data.folder == str(tmp_path)
    below = written(own, f"name: x\ndata: {{folder: ../text, {files}}}\nmodel: {{}}\n")
    assert load(below).data.folder == str(tmp_path / "text")
    assert load(below, "text").data.folder == str(elsewhere / "text")
    absolute = written(own, f"name: x\ndata: {{folder: {elsewhere}, {files}}}\nmodel: {{}}\n")
    assert load(absolute).data.folder == str(elsewhere)
