"""A recipe: everything that decides a run, in one YAML file."""

import dataclasses
import os
import re
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


@dataclass(frozen=True)
class CleaningOptions:
    """Which training pairs are dropped; lengths in tokens, EOS not counted."""

    max_tokens: int = field(default=100, metadata=COUNT)
    max_length_ratio: float = field(default=4.0, metadata={"above": 1.0})
    drop_duplicates: bool = True


@dataclass(frozen=True)
class TokenizerOptions:
    """SentencePiece (arXiv 1808.06226)."""

    algorithm: Literal["unigram", "bpe"] = "unigram"
    joint: bool = False
    source_vocabulary: int = field(default=8000, metadata={"minimum": 8, "maximum": 1_000_000})
    target_vocabulary: int = field(default=8000, metadata={"minimum": 8, "maximum": 1_000_000})
    byte_fallback: bool = True
    character_coverage: float = field(default=1.0, metadata={"above": 0.9, "maximum": 1.0})
    normalization: Literal["nmt_nfkc", "nfkc", "identity"] = "nmt_nfkc"

    def __post_init__(self) -> None:
        if self.joint and self.source_vocabulary != self.target_vocabulary:
            raise ValueError(
                f"source_vocabulary, target_vocabulary: got {self.source_vocabulary} and "
                f"{self.target_vocabulary} with joint: true; allowed: two equal sizes"
            )


@dataclass(frozen=True)
class TrainingOptions:
    """How the weights are learnt."""

    seed: int = field(default=1, metadata={"minimum": 0, "maximum": 2**31 - 1})
    epochs: float = field(default=20.0, metadata={"above": 0.0})
    batch_tokens: int = field(default=4096, metadata=COUNT)
    batch_sentences: int = field(default=1024, metadata=COUNT)
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = field(default=0.001, metadata={"above": 0.0})
    schedule: Literal["constant", "linear", "inverse_sqrt", "halving"] = "inverse_sqrt"
    warmup_steps: int = field(default=1000, metadata={"minimum": 0})
    halve_after_epoch: float = field(default=5.0, metadata={"minimum": 0.0})
    halve_every_epochs: float = field(default=0.5, metadata={"above": 0.0})
    loss_per: Literal["token", "sentence"] = "token"
    clip_norm: float = field(default=1.0, metadata={"above": 0.0})
    label_smoothing: float = field(default=0.0, metadata={"minimum": 0.0, "maximum": 0.9})
    validate_every: int = field(default=1000, metadata=COUNT)
    select_by: Literal["perplexity", "bleu"] = "perplexity"
    patience: int = field(default=5, metadata=COUNT)
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if self.schedule == "inverse_sqrt" and self.warmup_steps == 0:
            raise ValueError("warmup_steps: got 0; schedule 'inverse_sqrt' allows only 1 or more")


@dataclass(frozen=True)
class ExportOptions:
    """The model's version, and what it may be asked; lengths in tokens, EOS included."""

    version: str = "1.0"
    max_source_length: int = field(default=256, metadata=LENGTH)
    max_target_length: int = field(default=256, metadata=LENGTH)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)*", self.version):
            raise ValueError(f"version: got {self.version!r}; allowed: digits and dots, as in 1.0")


@dataclass(frozen=True)
class Recipe:
    """A whole recipe. `path` is the file it came from."""

    name: str
    data: DataOptions
    model: ModelOptions
    cleaning: CleaningOptions = CleaningOptions()
    tokenizer: TokenizerOptions = TokenizerOptions()
    training: TrainingOptions = TrainingOptions()
    export: ExportOptions = ExportOptions()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(
                f"name: got {self.name!r}; allowed: letters, digits and '._-', not '.' or '-' first"
            )

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load(path: Path, folder: str | None = None) -> Recipe:
    """The recipe in the YAML file `path`.

    Args:
        folder: replaces `data.folder`; relative to the current directory.

    Raises:
        RecipeError: unreadable, not YAML, or an option that is wrong; one message that names it.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2001-13-45, which is no date
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    try:
        recipe = read(Recipe, given)
    except FieldError as error:
        raise RecipeError(f"{path}: {error}") from None
    base = Path(folder) if folder is not None else path.parent / (recipe.data.folder or ".")
    absolute = os.path.abspath(base)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, folder=absolute))
