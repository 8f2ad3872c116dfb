"""Recipes: what is wrong is named by file, key and value, with what is allowed."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from model import ModelOptions
from training.recipe import (
    DataOptions,
    FilesOptions,
    Recipe,
    RecipeError,
    changed,
    demand_text,
    load,
    separate,
)

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


def test_the_recipe_for_own_text_explains_every_key_and_shows_its_default() -> None:
    path = ROOT / "recipes" / "own.yaml"
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe = load(path)
    sections: dict[str, Any] = {"data": recipe.data, "data.train": recipe.data.train}
    for name in given.keys() - {"name", "data"}:
        sections[name] = getattr(recipe, name)
    assert given.keys() == {f.name for f in fields(Recipe)}
    for where, section in sections.items():
        stated = given["data"]["train"] if where == "data.train" else given[where]
        assert stated.keys() == {f.name for f in fields(section)}, where
    shown = Recipe(name=recipe.name, data=recipe.data, model=ModelOptions())
    assert recipe == shown
    files = FilesOptions(source="train.source", target="train.target")
    assert recipe.data == replace(DataOptions(train=files), folder=str(path.parent))
    explained = path.read_text(encoding="utf-8").splitlines()
    for key in ("label_smoothing", "r_drop", "attention", "attention_heads", "word_dropout"):
        (line,) = (one for one in explained if one.startswith(f"  {key}:"))
        assert "#" in line


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
        ("training: {r_drop: -1}", "training.r_drop: got -1; allowed: a number from 0.0 to 100"),
        ("training: {subword_sampling: 1.1}", "training.subword_sampling: got 1.1; allowed: a n"),
        ("training: {average: 1}", "training.average: got 1; allowed: a number from 0.0 to 0.9"),
        ("training: {accumulate: 0}", "training.accumulate: got 0; allowed: an integer of at le"),
        ("training: {schedule: cosine}", "training.schedule: got 'cosine'; allowed: 'constant'"),
        ("training: {precision: fp16}", "training.precision: got 'fp16'; allowed: 'auto' or 'f"),
        ("scoring: {beam_size: 65}", "scoring.beam_size: got 65; allowed: an integer from 1 to"),
        ("scoring: {length_penalty: -1}", "scoring.length_penalty: got -1; allowed: a number fr"),
        ("scoring: {tokenize: 14a}", "scoring.tokenize: got '14a'; allowed: '13a' or 'none'"),
        ("scoring: {lowercase: 1}", "scoring.lowercase: got 1; allowed: true or false"),
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


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("attention: mlp", "attention: got 'mlp'; allowed: 'dot' or 'additive'"),
        ("attention_heads: 0", "attention_heads: got 0; allowed: an integer from 1 to 64"),
        ("attention_heads: 3", "attention_heads: got 3; allowed: a divisor of attention_size, 256"),
        (
            "attention_size: 100, attention_heads: 8",
            "attention_heads: got 8; allowed: a divisor of attention_size, 100",
        ),
        ("dropout: 0.91", "dropout: got 0.91; allowed: a number from 0.0 to 0.9"),
        ("embedding_dropout: -0.1", "embedding_dropout: got -0.1; allowed: a number from 0.0"),
        ("output_dropout: off", "output_dropout: got false; allowed: a number from 0.0 to 0.9 or"),
        ("recurrent_dropout: null", "recurrent_dropout: got null; allowed: a number from 0.0 to"),
        ("word_dropout: 1", "word_dropout: got 1; allowed: a number from 0.0 to 0.9"),
        ("variational_dropout: 0.5", "variational_dropout: got 0.5; allowed: true or false"),
    ],
)
def test_a_network_that_cannot_be_is_refused(tmp_path: Path, more: str, message: str) -> None:
    path = written(tmp_path, f"name: x\ndata: {{generator: dates}}\nmodel: {{{more}}}\n")
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: model.{message}")


def test_every_head_has_its_share_of_attention() -> None:
    for heads in (1, 2, 3, 4, 6, 12):
        assert ModelOptions(attention_size=12, attention_heads=heads).attention_heads == heads


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{DATES}training: {{}}\ntraining: {{}}\n", "'training' is in line 4 and again in line 5"),
        (f"{DATES}training:\n  seed: 1\n  seed: 1\n", "'seed' is in line 5 and again in line 6"),
        (f"{DATES}training: {{seed: 1, 'seed': 2}}\n", "'seed' is in line 4 and again in line 4"),
    ],
)  # fmt: skip
def test_a_key_that_is_there_twice_is_named_with_both_lines(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        loaded(tmp_path, text)
    assert str(caught.value) == (
        f"{tmp_path / 'recipe.yaml'}: not valid YAML: {message}; allowed: once"
    )


def test_a_key_may_win_over_the_same_of_a_mapping_that_is_merged(tmp_path: Path) -> None:
    files = "train: &train {source: a, target: b}\n  test: {<<: *train, target: c}"
    recipe = loaded(tmp_path, f"name: x\ndata:\n  {files}\nmodel: {{}}\n")
    assert recipe.data.test == FilesOptions(source="a", target="c")


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ('name: "beta"', "beta"),
        ("name : x", "x"),
        ("\ufeffname: x", "x"),
        ("name: modèle", "modèle"),
        ("name: mode\u0300le", "mode\u0300le"),
        ("name: हिन्दी.2", "हिन्दी.2"),
        ("'name': 'a-b_c'  # d", "a-b_c"),
    ],
)
def test_a_name_as_people_write_it(tmp_path: Path, line: str, name: str) -> None:
    assert loaded(tmp_path, DATES.replace("name: x", line)).name == name


@pytest.mark.parametrize("name", ["a b", ".a", "-a", "''", "a/b", "a\u200bb", "a:b"])
def test_a_name_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=r"name: got '.*'; allowed: letters, digits and"):
        loaded(tmp_path, DATES.replace("name: x", f"name: {name}"))


# Changes of single keys


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        ("", []),
        (" training.seed=2 ", ["training.seed=2"]),
        ("training.seed=2  training.epochs=5", ["training.seed=2", "training.epochs=5"]),
        (
            "export.shortlist={frequent: 400, candidates: 40} export.weights=int8",
            ["export.shortlist={frequent: 400, candidates: 40}", "export.weights=int8"],
        ),
        ("training.seed = 2\nname = x", ["training.seed = 2", "name = x"]),
        ("data.folder=/a b/c=d name=e", ["data.folder=/a b/c=d", "name=e"]),
        ("training.seed=2 nonsense", ["training.seed=2 nonsense"]),
    ],
)
def test_changes_of_several_keys_are_separated(given: str, changes: list[str]) -> None:
    assert separate(given) == changes


def test_text_that_is_said_to_be_there_is(tmp_path: Path) -> None:
    files = "train: {source: a, target: b}, test: {tsv: c}"
    path = written(tmp_path, f"name: x\ndata: {{{files}}}\nmodel: {{}}\n")
    for name in "ab":
        (tmp_path / name).touch()
    with pytest.raises(RecipeError, match=r"--data: .*/c: no such file; .* data\.test"):
        demand_text(load(path, str(tmp_path)))
    (tmp_path / "c").touch()
    demand_text(load(path, str(tmp_path)))
    demand_text(load(written(tmp_path, DATES), str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("name=y", "y"),
        ("training.seed=2", 2),
        (" training.seed = 2 ", 2),
        ("training.epochs=7.5", 7.5),
        ("training.epochs=3", 3.0),
        ("training.schedule=one_cycle", "one_cycle"),
        ("training.learning_rate=2.0e-3", 0.002),
        ("model.bidirectional=false", False),
        ("model.embedding_dropout=0.1", 0.1),
        ("model.embedding_dropout=null", None),
        ("scoring.beam_size=12", 12),  # a section that the recipe has not
        ("export.version='2.0'", "2.0"),
        ('export.version="3.3"', "3.3"),
        ("cleaning={max_tokens: 50}", None),
        ("data.test={tsv: test.tsv}", None),
        ("data.test.tsv=a=b.tsv", "a=b.tsv"),  # two sections, the inner one new; a second =
    ],
)
def test_one_key_is_changed(tmp_path: Path, change: str, expected: object) -> None:
    path = written(tmp_path, DATES.replace("model: {}", "model: {embedding_dropout: 0.2}"))
    before, after = load(path).as_dict(), load(path, None, [change]).as_dict()
    keys = change.partition("=")[0].strip().split(".")
    inner_before, inner = before, after
    for key in keys[:-1]:
        assert inner[key] is not None
        inner_before, inner = inner_before[key] or {}, inner[key]
    if "{" not in change:
        assert inner[keys[-1]] == expected
        assert type(inner[keys[-1]]) is type(expected)
    assert inner[keys[-1]] != inner_before.get(keys[-1])
    after[keys[0]] = before[keys[0]]
    assert after == before  # other sections are as they were


def test_other_keys_of_a_section_stay_and_the_last_change_wins(tmp_path: Path) -> None:
    path = written(tmp_path, f"{DATES}training: {{seed: 5, epochs: 3}}\n")
    recipe = load(path, None, ["training.seed=6", "training.patience=9", "training.seed=7"])
    training = recipe.training
    assert (training.seed, training.epochs, training.patience) == (7, 3.0, 9)
    whole = load(path, None, ["training={seed: 8}"]).training
    assert (whole.seed, whole.epochs) == (8, 20.0)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1E-3", 0.001), ("1.5e0", 1.5), ("2.e+0", 2.0), (".5e0", 0.5), ("+1e0", 1)],
)
def test_numbers_with_an_exponent(tmp_path: Path, text: str, value: float) -> None:
    path = written(tmp_path, f"{DATES}training: {{learning_rate: {text}}}\n")
    assert load(path).training.learning_rate == value
    path = written(tmp_path, DATES)
    assert load(path, None, [f"training.learning_rate={text}"]).training.learning_rate == value


@pytest.mark.parametrize("text", ["'1e-3'", "1e", "e-3", "1e-3x", "nan", "1_0e-3", "1e-\u0663"])
def test_what_only_looks_like_a_number_is_none(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match=r"training\.learning_rate: got '.*; allowed: a number"):
        loaded(tmp_path, f"{DATES}training: {{learning_rate: {text}}}\n")


def test_what_a_change_begins_with_is_left_as_it_is() -> None:
    given = {"training": {"seed": 1}, "data": {"train": {"source": "a"}}}
    after = changed(changed(given, "training.seed=2"), "data.train.source=b")
    assert after == {"training": {"seed": 2}, "data": {"train": {"source": "b"}}}
    assert given == {"training": {"seed": 1}, "data": {"train": {"source": "a"}}}


@pytest.mark.parametrize(
    "change",
    ["training.seed", "", "=2", ".seed=2", "training.=2", "training..seed=2", "training.seed=[2",
     "training.seed=2: 3: 4", "training.seed=2001-13-45", "training.seed=\x07"],
)  # fmt: skip
def test_a_change_of_another_form_is_refused(tmp_path: Path, change: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(written(tmp_path, DATES), None, [change])
    assert str(caught.value) == (
        f"--set: got {change!r}; allowed: section.key=value, as training.seed=2"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trianing.seed=2", "trianing: unknown option; did you mean 'training'?"),
        ("training.sed=2", "training.sed: unknown option; did you mean 'seed'?"),
        ("training.seed.more=2", "training.seed: got a mapping; allowed: an integer from 0 to"),
        ("data.train.sauce=x", "data.train.sauce: unknown option; did you mean 'source'?"),
        ("training.seed=two", "training.seed: got 'two'; allowed: an integer from 0 to"),
        ("training.seed=2.0", "training.seed: got 2.0; allowed: an integer from 0 to"),
        ("training.seed=", "training.seed: got null; allowed: an integer from 0 to"),
        ("training.epochs=0", "training.epochs: got 0; allowed: a number above 0.0"),
        ("export.version=2.0", "export.version: got 2.0; allowed: a string"),
        ("model=attention", "model: got 'attention'; allowed: a mapping"),
        ("model.attention_heads=3", "model.attention_heads: got 3; allowed: a divisor of"),
    ],
)
def test_a_change_is_held_to_what_is_allowed(tmp_path: Path, change: str, message: str) -> None:
    path = written(tmp_path, DATES)
    with pytest.raises(RecipeError) as caught:
        load(path, None, [change])
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: no such recipe file"):
        load(tmp_path / "none.yaml")
    written(tmp_path, DATES)
    with pytest.raises(RecipeError, match=r"none\.yaml: .*; there are: .*/recipe\.yaml"):
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
