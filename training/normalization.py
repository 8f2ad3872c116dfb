"""How the text of each side is normalised before it is cut into pieces, and what that changes.

Clients type a source in many forms, so `nmt_nfkc` makes them one. A target is what readers get: by
default it is learnt and written as it stands.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from handler.sentences import Segment, join
from handler.tokenizer import Tokenizer
from training.recipe import TokenizerOptions

EXAMPLES = 3
CHARACTERS = 8
SHOWN = 60  # characters of an example


@dataclass(frozen=True)
class Normalization:
    """rule: SentencePiece's name of it.
    fold: whether several spaces become one.
    """

    rule: str = "nmt_nfkc"
    fold: bool = True

    @cached_property
    def normalizer(self) -> sentencepiece.SentencePieceNormalizer:
        return sentencepiece.SentencePieceNormalizer(
            rule_name=self.rule, add_dummy_prefix=False, escape_whitespaces=False,
            remove_extra_whitespaces=self.fold,
        )  # fmt: skip

    def __call__(self, text: str) -> str:
        return str(self.normalizer.normalize(text))

    def put_into(self, model: bytes) -> bytes:
        """The SentencePiece model `model` with this normalisation in the place of its own."""
        content = ModelProto.FromString(model)
        own = ModelProto.FromString(self.normalizer.serialized_model_proto()).normalizer_spec
        own.add_dummy_prefix, own.escape_whitespaces = True, True
        content.normalizer_spec.CopyFrom(own)
        return bytes(content.SerializeToString(deterministic=True))


AS_IT_STANDS = Normalization("identity", fold=False)


def of_source(options: TokenizerOptions) -> Normalization:
    return Normalization(options.normalization)


def of_target(options: TokenizerOptions) -> Normalization:
    rule = options.target_normalization or AS_IT_STANDS.rule
    return Normalization(rule, fold=rule != AS_IT_STANDS.rule)


def written(target: Tokenizer, text: str) -> str:
    """What a reader gets of `text` from a model that translates perfectly."""
    return join([Segment("x", "")], [target.normalised(text)])


@dataclass
class Changes:
    """What becomes of the targets of a set on their way through the tokenizer.

    changed: targets that cannot be written as they stand.
    composed: those of them that look the same: in another of Unicode's forms, NFC or NFD.
    characters: that are lost, each with the number of its targets.
    examples: of targets, each with what is written in its place.
    """

    targets: int = 0
    changed: int = 0
    composed: int = 0
    characters: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[str, str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "targets": self.targets,
            "changed": self.changed,
            "composed": self.composed,
            "characters": dict(self.characters.most_common(CHARACTERS)),
            "examples": self.examples,
        }

    def warning(self, name: str, rule: str) -> str:
        """For people; `name` is the set, `rule` the normalisation."""
        of = "targets" if name == "train" else "references"
        told = (
            f"data.{name}: {self.changed:,} of {self.targets:,} {of} cannot be written as they "
            f"stand (tokenizer.target_normalization: {rule})"
        )
        if self.composed:
            told += f"; {self.composed:,} differ in Unicode's form alone, NFC or NFD"
        if self.characters:
            told += "; characters that are lost, and in how many: " + ", ".join(
                f"{character_name(one)} ({count:,})"
                for one, count in self.characters.most_common(CHARACTERS)
            )
        for before, after in self.examples:
            told += f"\n  {visible(before)}\n  -> {visible(after)}"
        return told


def visible(text: str) -> str:
    """The beginning of `text`, with escapes for characters that do not show."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:SHOWN]
    )


def changes(target: Tokenizer, texts: Iterable[str], byte_fallback: bool) -> Changes:
    """Compares each of `texts` with what can be written of it. Without `byte_fallback` a character
    may be unknown, too."""
    found = Changes()
    for text in texts:
        found.targets += 1
        after = written(target, text)
        if not byte_fallback and Tokenizer.UNK in (ids := target.encode(text)):
            after = join([Segment("x", "")], [target.decode(ids)])
        if after == text:
            continue
        found.changed += 1
        found.composed += all_alike(text, after)
        found.characters.update(sorted(set(text) - set(after)))
        if len(found.examples) < EXAMPLES:
            found.examples.append((text, after))
    return found


def all_alike(*texts: str) -> bool:
    return len({unicodedata.normalize("NFC", text) for text in texts}) == 1


def character_name(character: str) -> str:
    """U+FF08 FULLWIDTH LEFT PARENTHESIS"""
    return f"U+{ord(character):04X} {unicodedata.name(character, 'without a name')}"
