"""A recipe: everything that decides a run, in one YAML file."""

import dataclasses
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from handler.fields import FieldError, read
from model import ModelOptions

COUNT = {"minimum": 1}
LENGTH = {"minimum": 2, "maximum": 4096}


class RecipeError(ValueError):
    """The recipe cannot be used; the message names file, key, value and what is allowed."""


class RecipeLoader(yaml.SafeLoader):
    """Knows the numbers of YAML 1.2, too: PyYAML, which reads 1.1, takes 1e-3 for a string. A key
    that is there twice is an error, as in YAML itself: PyYAML takes the last one in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Not where keys become a dictionary: there, merge keys (<<) may have added the same ones.
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # a list or a mapping, which no option is called
            here = key.start_mark.line + 1
            if (first := lines.get((key.tag, key.value))) is not None:
                raise ValueError(f"{key.value!r} is in line {first} and again in line {here}; "
                                 "allowed: once")  # fmt: skip
            lines[key.tag, key.value] = here
        return node


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+\Z", re.ASCII),
    list("-+.0123456789"),
)


@dataclass(frozen=True)
class FilesOptions:
    """Parallel text: two files of equal line count, or one TSV. UTF-8."""

    source: str | None = None
    target: str | None = None
    tsv: str | None = None
    source_column: int = field(default=1, metadata=COUNT)
    target_column: int = field(default=2, metadata=COUNT)

    def __post_init__(self) -> None:
        pair = self.source is not None and self.target is not None
        alone = self.source is None and self.target is None
        if not ((pair and self.tsv is None) or (alone and self.tsv is not None)):
            raise ValueError(
                f"source, target, tsv: got {self.source!r}, {self.target!r}, {self.tsv!r}; "
                "allowed: source and target together, or tsv alone"
            )

        for path in self.paths():
            if os.path.isabs(path):
                raise ValueError(
                    f"source, target, tsv: got {path!r}; allowed: paths relative to data.folder, "
                    "as recipes travel with the model"
                )

    def paths(self) -> list[str]:
        return [p for p in (self.source, self.target, self.tsv) if p is not None]


@dataclass(frozen=True)
class DataOptions:
    """Where the text comes from. Paths are relative to `folder`."""

    generator: Literal["dates"] | None = None
    folder: str | None = None  # relative to the recipe file; its own folder when null
    train: FilesOptions | None = None
    validation: FilesOptions | None = None
    test: FilesOptions | None = None
    held_out: int = field(default=1000, metadata=COUNT)

    def __post_init__(self) -> None:
        if (self.generator is None) == (self.train is None):
            raise ValueError(
                f"generator, train: got {self.generator!r} and "
                f"{'no files' if self.train is None else 'files'}; allowed: one of the two"
            )

    def texts(self) -> list[tuple[str, str, Path]]:
        """Each file of text: its set, its name in the recipe, where it is."""
        given = {"train": self.train, "validation": self.validation, "test": self.test}
        return [
            (name, file, Path(self.folder or ".", file))
            for name, files in given.items()
            if files is not None
            for file in files.paths()
        ]


@dataclass(frozen=True)
class CleaningOptions:
    """Which training pairs are dropped; lengths in tokens, EOS not counted."""

    max_tokens: int = field(default=100, metadata=COUNT)
    max_length_ratio: float = field(default=4.0, metadata={"above": 1.0})
    drop_duplicates: bool = True


@dataclass(frozen=True)
class TokenizerOptions:
    """SentencePiece (arXiv 1808.06226).

    normalization: of the source, as clients type it in many forms.
    target_normalization: of the target; null: identity, so that text is learnt and written as it
        stands.
    """

    algorithm: Literal["unigram", "bpe"] = "unigram"
    joint: bool = False
    source_vocabulary: int = field(default=8000, metadata={"minimum": 8, "maximum": 1_000_000})
    target_vocabulary: int = field(default=8000, metadata={"minimum": 8, "maximum": 1_000_000})
    training_sentences: int = field(default=1_000_000, metadata=COUNT)
    byte_fallback: bool = True
    character_coverage: float = field(default=1.0, metadata={"above": 0.9, "maximum": 1.0})
    normalization: Literal["nmt_nfkc", "nfkc", "identity"] = "nmt_nfkc"
    target_normalization: Literal["nmt_nfkc", "nfkc", "identity"] | None = None

    def __post_init__(self) -> None:
        if self.joint and self.source_vocabulary != self.target_vocabulary:
            raise ValueError(
                f"source_vocabulary, target_vocabulary: got {self.source_vocabulary} and "
                f"{self.target_vocabulary} with joint: true; allowed: two equal sizes"
            )


@dataclass(frozen=True)
class TrainingOptions:
    """How the weights are learnt.

    subword_sampling: source and target are cut into other pieces at every epoch; unigram: alpha of
        Kudo 2018 (arXiv 1804.10959, equation 9), smaller being wilder; bpe: the probability that a
        merge is left out (Provilkov et al. 2020, arXiv 1910.13267).
    label_smoothing, r_drop: see `training.loss.GeneratorLoss`.
    average: decay of the moving average of weights that is validated and exported (Polyak and
        Juditsky 1992; as in Adam, arXiv 1412.6980, section 7.2).
    accumulate: batches an update, on each process: a larger batch than memory holds.
    """

    seed: int = field(default=1, metadata={"minimum": 0, "maximum": 2**31 - 1})
    epochs: float = field(default=20.0, metadata={"above": 0.0})
    batch_tokens: int = field(default=4096, metadata=COUNT)
    batch_sentences: int = field(default=1024, metadata=COUNT)
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = field(default=0.001, metadata={"above": 0.0})
    schedule: Literal[
        "constant", "linear", "inverse_sqrt", "one_cycle", "plateau", "halving"
    ] = "inverse_sqrt"
    warmup_steps: int = field(default=1000, metadata={"minimum": 0})
    halve_after_epoch: float = field(default=5.0, metadata={"minimum": 0.0})
    halve_every_epochs: float = field(default=0.5, metadata={"above": 0.0})
    accumulate: int = field(default=1, metadata=COUNT)
    loss_per: Literal["token", "sentence"] = "token"
    clip_norm: float = field(default=1.0, metadata={"above": 0.0})
    label_smoothing: float = field(default=0.0, metadata={"minimum": 0.0, "maximum": 0.9})
    r_drop: float = field(default=0.0, metadata={"minimum": 0.0, "maximum": 100.0})
    subword_sampling: float = field(default=0.0, metadata={"minimum": 0.0, "maximum": 1.0})
    average: float = field(default=0.0, metadata={"minimum": 0.0, "maximum": 0.99999})
    validate_every: int = field(default=1000, metadata=COUNT)
    select_by: Literal["perplexity", "bleu"] = "perplexity"
    patience: int = field(default=5, metadata=COUNT)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    def __post_init__(self) -> None:
        if self.schedule == "inverse_sqrt" and self.warmup_steps == 0:
            raise ValueError("warmup_steps: got 0; schedule 'inverse_sqrt' allows only 1 or more")


@dataclass(frozen=True)
class ScoringOptions:
    """How `evaluate` decodes and scores; see sacreBLEU (arXiv 1804.08771) for tokenize."""

    beam_size: int = field(default=5, metadata={"minimum": 1, "maximum": 64})
    length_penalty: float = field(default=1.0, metadata={"minimum": 0.0, "maximum": 10.0})
    tokenize: Literal["13a", "none", "intl", "char", "zh"] = "13a"
    lowercase: bool = False


@dataclass(frozen=True)
class ShortlistOptions:
    """The tokens that a sentence may become, see model/shortlist.py and training/lexicon.py.

    frequent: target pieces that every sentence may need, the most frequent ones.
    candidates: target pieces for each source piece of the sentence, the likeliest ones.
    """

    frequent: int = field(default=400, metadata={"minimum": 1, "maximum": 65536})
    candidates: int = field(default=40, metadata={"minimum": 1, "maximum": 1024})


@dataclass(frozen=True)
class ExportOptions:
    """The model's version, and what it may be asked; lengths in tokens, EOS included.

    weights: int8 makes model.pt a quarter as large and decoding on a CPU several times as fast, see
        model/quantized.py; docs/results.md says what it costs in quality.
    shortlist: choose each sentence's tokens among those that it may need; null: among all.
    source_language: of the text, whose abbreviations end no sentence: `de`, `pt-BR`; null: unknown.
    """

    version: str = "1.0"
    weights: Literal["float32", "int8"] = "float32"
    shortlist: ShortlistOptions | None = None
    source_language: str | None = None
    max_source_length: int = field(default=256, metadata=LENGTH)
    max_target_length: int = field(default=256, metadata=LENGTH)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)*", self.version):
            raise ValueError(f"version: got {self.version!r}; allowed: digits and dots, as in 1.0")
        code = self.source_language
        if code is not None and not re.fullmatch(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{1,8})*", code):
            raise ValueError(
                f"source_language: got {code!r}; allowed: null, or a code of ISO 639 as in en, "
                "pt-BR or zh-Hant"
            )
        if self.shortlist is not None and self.weights != "int8":
            raise ValueError(
                f"shortlist: got one with weights {self.weights!r}; allowed: null, as only the "
                "operators for int8 gain by it"
            )


@dataclass(frozen=True)
class Recipe:
    """A whole recipe. `path` is the file it came from."""

    name: str
    data: DataOptions
    model: ModelOptions
    cleaning: CleaningOptions = CleaningOptions()
    tokenizer: TokenizerOptions = TokenizerOptions()
    training: TrainingOptions = TrainingOptions()
    scoring: ScoringOptions = ScoringOptions()
    export: ExportOptions = ExportOptions()

    def __post_init__(self) -> None:
        if self.name[:1] in ("", ".", "-") or not all(
            c in "._-" or unicodedata.category(c)[0] in "LMN" for c in self.name
        ):
            raise ValueError(
                f"name: got {self.name!r}; allowed: letters, digits and '._-', not '.' or '-' first"
            )
        if self.training.subword_sampling and not self.tokenizer.byte_fallback:
            raise ValueError(
                f"training.subword_sampling: got {self.training.subword_sampling:g} with "
                "tokenizer.byte_fallback false; allowed: 0, as text with unknown characters cannot "
                "be cut anew"
            )

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load(path: Path, folder: str | None = None, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in the YAML file `path`.

    Args:
        folder: replaces `data.folder`; relative to the current directory.
        changes: of single keys, each `section.key=value`, the value being YAML.

    Raises:
        RecipeError: unreadable, not YAML, or an option that is wrong; one message that names it.
    """
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), RecipeLoader)
    except FileNotFoundError:
        others = ", ".join(map(str, sorted(path.parent.glob("*.yaml"))))
        there = f"; there are: {others}" if others else ""
        raise RecipeError(f"{path}: no such recipe file{there}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2001-13-45, which is no date
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    try:
        for change in changes:
            given = changed(given, change)
        recipe = read(Recipe, given)
    except FieldError as error:
        raise RecipeError(f"{path}: {error}") from None
    base = Path(folder) if folder is not None else path.parent / (recipe.data.folder or ".")
    absolute = os.path.abspath(base)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, folder=absolute))


def demand_text(recipe: Recipe) -> None:
    """Whether the text is where it was said to be.

    Raises:
        RecipeError: a file of it is not there.
    """
    for name, _, path in recipe.data.texts():
        if not path.exists():
            raise RecipeError(f"--data: {path}: no such file; the recipe names it in data.{name}")


def separate(changes: str) -> list[str]:
    """The changes of several keys in one string, separated by white space, as make's SET has them:
    `training.seed=2 export.shortlist={frequent: 400, candidates: 40}`. A value may have spaces, but
    nothing in it that looks like the next key with its `=`."""
    return re.split(r"\s+(?=[^\W\d][\w.]*\s*=)", changes.strip()) if changes.strip() else []


def changed(given: Any, change: str) -> Any:
    """The recipe `given` as a mapping, with one key set: `training.seed=2`.

    Raises:
        RecipeError: not of that form. Whether there is such a key is seen when it is read.
    """
    where, equals, text = change.partition("=")
    *sections, key = where.strip().split(".")
    try:
        value = yaml.load(text, RecipeLoader)
    except (yaml.YAMLError, ValueError):  # ValueError: 2001-13-45, which is no date
        equals = ""
    if not equals or not all([*sections, key]):
        raise RecipeError(f"--set: got {change!r}; allowed: section.key=value, as training.seed=2")
    top = inner = dict(given) if isinstance(given, dict) else {}
    for section in sections:
        below = inner.get(section)
        inner[section] = dict(below) if isinstance(below, dict) else {}
        inner = inner[section]
    inner[key] = value
    return top
